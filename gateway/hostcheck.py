"""What the doctor finds of this machine: files that may be open, memory, the disk of the state folder, and ports."""

from __future__ import annotations

import errno
import http.client
import json
import os
import resource
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import median

from gateway.findings import Finding, Verdict, amount, error, graded, judged, ok, warning
from gateway.pressure import memory_groups

_OWN_FILES = 128  # of a worker: code, logs, spools, the listener, and connections to the store
_FEWEST_FILES = 256
_WORKER = 256 << 20  # bytes that a worker should have
_MEMORY = (0.8, 0.95)  # shares at which to warn, and to fail
_LEAST_ROOM = 16 << 20
_SYNCS, _SLOW_SYNC = 9, 0.05  # how many, and seconds
_LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp
_PROC = Path("/proc")


# — files


def files(in_flight: int) -> Finding:
    """Whether a worker may have the files that `in_flight` requests at once take: two sockets each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files_of(in_flight, soft, hard)


def files_of(in_flight: int, soft: int, hard: int) -> Finding:
    needed = _OWN_FILES + 2 * in_flight
    check, of = "host.files", "a worker"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ok(check, of, f"{'no limit' if soft < 0 else f'{soft:,} files'}, {in_flight:,} requests take {needed:,}")
    most = "no limit" if hard < 0 else f"{hard:,} without root"
    do = f"ulimit -n (up to {most}), LimitNOFILE= of systemd, or a smaller max_in_flight in pools.yaml"
    found, expected = f"{soft:,} files", f"{needed:,} for the {in_flight:,} requests that max_in_flight lets in"
    verdict: Verdict = "error" if soft < _FEWEST_FILES else "warning"
    return judged(verdict, check, of, found, expected, do)


# — memory


def memory(workers: int, cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = _PROC) -> Finding:
    """Whether the limits of this container leave room, or else the memory of the machine."""
    groups, wanted = memory_groups(proc / "self", cgroups), workers * _WORKER
    if groups:
        fullest = max(groups, key=lambda group: group.share)
        of, least, share = "container", min(group.limit for group in groups), fullest.share
        told, whole = f"{amount(fullest.used)} of {amount(fullest.limit)} used", f"a limit of {amount(least)}"
        do = "a larger limit, or fewer workers: from 80 % on requests are shed, and beyond the limit the kernel kills"
    else:
        least, available = _meminfo(proc)
        of, share = "machine", 1 - available / least
        told = f"no limit, {amount(available)} of the machine's {amount(least)} free"
        whole = told
        do = "more memory, or less on this machine: without a limit nothing is shed before the kernel kills somebody"
    verdict = graded(share, *_MEMORY)
    if least < wanted and verdict != "error":
        return warning("host.memory", of, whole, f"{amount(wanted)} for {workers} workers", do)
    return judged(verdict, "host.memory", of, told, f"below {_MEMORY[0]:.0%}", do)


def _meminfo(proc: Path) -> tuple[int, int]:
    """What the machine has, and what of it is available, in bytes."""
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in _lines(proc / "meminfo")}
    return sizes["MemTotal"], sizes["MemAvailable"]


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text().splitlines()
    return []


# — the disk


def disk(state: Path, spool_most: int, workers: int) -> list[Finding]:
    """Whether usage could be written down there while the store is away."""
    folder = next(parent for parent in (state.absolute(), *state.absolute().parents) if parent.exists())
    of = str(state)
    try:
        took = _synced(folder)
        room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    except OSError as failure:
        do = "rights and room of the folder (GATEWAY_STATE): while the store is away requests would get 503"
        return [error("host.disk", of, f"cannot be written: {failure.strerror}", "a folder that can be written", do)]
    most = spool_most * workers
    verdict: Verdict = "error" if room < _LEAST_ROOM else "warning" if room < most else "ok"
    expected = f"{amount(most)}: {workers} times GATEWAY_SPOOL_MOST"
    do = "more room, or a smaller GATEWAY_SPOOL_MOST: while the store is away usage is kept there"
    slow = "a local disk: while the store is away the end of each answer waits for it"
    fast = f"below {_SLOW_SYNC * 1000:.0f} ms"
    return [
        judged(verdict, "host.disk", of, f"{amount(room)} free", expected, do),
        judged(
            graded(took, _SLOW_SYNC, float("inf")), "host.fsync", of, f"fsync takes {took * 1000:.1f} ms", fast, slow
        ),
        *_spools(state / "spool", spool_most),
    ]


def _synced(folder: Path) -> float:
    """Write some, and see that it is on the disk; the median of the seconds that it takes. Raises OSError."""
    took = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return median(took)


def _spools(folder: Path, spool_most: int) -> list[Finding]:
    """What waits there for the store."""
    sizes = []
    for file in folder.glob("*.spool"):
        with suppress(FileNotFoundError):  # replayed and gone meanwhile
            sizes.append(file.stat().st_size)
    if not sizes:
        return []
    verdict = graded(max(sizes) / spool_most, 0.5, 0.9)
    do = "the store: when it is back this is settled; where no gateway runs on this folder, start one"
    found = f"{amount(sum(sizes))} in {len(sizes)} files wait for the store"
    return [judged(verdict, "host.spool", str(folder), found, "less than half of GATEWAY_SPOOL_MOST", do)]


# — ports


def port(host: str, number: int, what: str) -> Finding:
    """Whether a port can be listened on; one that a gateway has is fine."""
    of = f"{what} {host}:{number}"
    if number == 0:
        return ok("host.port", of, "any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
        except OSError as failure:
            return _taken(of, host, number) if failure.errno == errno.EADDRINUSE else _unusable(of, failure)
    return ok("host.port", of, "free")


def _taken(of: str, host: str, number: int) -> Finding:
    if _is_ours(host, number):
        return ok("host.port", of, "a gateway listens there")
    found = f"taken by {_holder(number) or 'a process of somebody else'}"
    do = "end that process, or another port"
    return error("host.port", of, found, "a port that is free, or a gateway's", do)


def _unusable(of: str, failure: OSError) -> Finding:
    said = (failure.strerror or "it cannot be used").lower()
    return error(
        "host.port", of, said, "an address of this machine, and a port from 1024", "GATEWAY_HOST, GATEWAY_PORT"
    )


def _is_ours(host: str, number: int) -> bool:
    """Whether whoever listens there says what a gateway says."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    with closing(http.client.HTTPConnection(reached, number, timeout=1)) as asked:
        try:
            asked.request("GET", "/healthz/live")
            return bool(json.loads(asked.getresponse().read(1000)) == {"status": "alive"})
        except (OSError, http.client.HTTPException, ValueError):
            return False


def _holder(number: int) -> str | None:
    """The process that listens on a port, as far as we may know."""
    wanted = {f"socket:[{inode}]" for inode in _listeners(number)}
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            if any(str(file.readlink()) in wanted for file in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()}, process {process.name}"
    return None


def _listeners(number: int) -> Sequence[str]:
    found = []
    for table in ("tcp", "tcp6"):
        for line in _lines(_PROC / "net" / table)[1:]:
            words = line.split()
            if int(words[1].rpartition(":")[2], 16) == number and words[3] == _LISTENS:
                found.append(words[9])
    return found

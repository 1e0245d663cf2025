"""What the doctor finds of this machine: files that may be open, memory, and the disk of the state folder."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from contextlib import suppress
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
    of = str(state)
    try:
        folder = next(parent for parent in (state.absolute(), *state.absolute().parents) if parent.exists())
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

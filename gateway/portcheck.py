"""What the doctor finds of the ports: whether each is free, or who has it; a gateway that has it should be ready."""

from __future__ import annotations

import errno
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from gateway.findings import Finding, error, ok

_LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp
_PROC = Path("/proc")
_DATA, _CONTROL = "data plane", "control plane"
_VARIABLES = {_DATA: "GATEWAY_HOST or GATEWAY_PORT", _CONTROL: "GATEWAY_ADMIN_HOST or GATEWAY_ADMIN_PORT"}
_PATIENCE = 1.0  # seconds for whoever listens on a port
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # where one is reached that listens everywhere


def data_port(host: str, number: int) -> Finding:
    """Whether the workers may listen there, or do."""
    return _port(_DATA, host, number)


def control_port(host: str, number: int, data: tuple[str, int]) -> Finding:
    """Whether the control plane may listen there, or does; it has another port than `data`, the workers."""
    if number == data[1] != 0 and (host == data[0] or host in _ANY or data[0] in _ANY):
        found, do = "the same port as the data plane's", "another GATEWAY_ADMIN_PORT, or another GATEWAY_PORT"
        return error("host.port", f"{_CONTROL} {host}:{number}", found, "a port for each of them", do)
    return _port(_CONTROL, host, number)


def _port(plane: str, host: str, number: int) -> Finding:
    """Whether a port can be listened on; one that a gateway has is fine."""
    of = f"{plane} {host}:{number}"
    if number == 0:
        return ok("host.port", of, "any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
        except OSError as failure:
            taken = failure.errno == errno.EADDRINUSE
            return _taken(of, plane, host, number) if taken else _unusable(of, plane, failure)
    return ok("host.port", of, "free")


def _taken(of: str, plane: str, host: str, number: int) -> Finding:
    holder = _holder(number) or "a process of somebody else"
    try:
        reasons = _unready(_ANY.get(host, host), number)
    except TimeoutError:
        found = f"taken by {holder}, which does not answer within {_PATIENCE:.0f} s"
        do = f"see why it hangs, and end it (kill -TERM, then -KILL); or another {_VARIABLES[plane]}"
        return error("host.port", of, found, "a port that is free, or a gateway's", do)
    if reasons is None:
        do = f"end that process, or another {_VARIABLES[plane]}"
        return error("host.port", of, f"taken by {holder}", "a port that is free, or a gateway's", do)
    if reasons:
        found, do = (
            f"a gateway listens there, and is not ready: {'; '.join(reasons)}",
            "what its reasons ask for; its log",
        )
        return error("host.port", of, found, "one that is ready", do)
    return ok("host.port", of, "a gateway listens there, and is ready")


def _unusable(of: str, plane: str, failure: OSError) -> Finding:
    said = (failure.strerror or "it cannot be used").lower()
    return error("host.port", of, said, "an address of this machine, and a port from 1024", _VARIABLES[plane])


def _unready(host: str, number: int) -> list[str] | None:
    """Why the gateway that listens there takes no requests; None where it is none. Raises TimeoutError."""
    try:
        if _get(host, number, "/healthz/live") == {"status": "alive"}:
            return list(map(str, _get(host, number, "/healthz/ready")["reasons"]))
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _get(host: str, number: int, path: str) -> Any:
    with closing(http.client.HTTPConnection(host, number, timeout=_PATIENCE)) as asked:
        asked.request("GET", path)
        return json.loads(asked.getresponse().read(10_000))


def _holder(number: int) -> str | None:
    """The process that listens on a port, as far as we may know."""
    wanted = {f"socket:[{inode}]" for inode in _listeners(number)}
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            if any(str(file.readlink()) in wanted for file in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()}, process {process.name}"
    return None


def _listeners(number: int) -> Iterator[str]:
    """The inodes of the sockets that listen on a port."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                words = line.split()
                if int(words[1].rpartition(":")[2], 16) == number and words[3] == _LISTENS:
                    yield words[9]

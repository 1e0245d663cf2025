"""What a supervisor and its processes tell each other: lines of JSON over a pair of sockets, one pair for each process.

The end of a line is news, too: a process whose supervisor is gone leaves, and so nothing is ever left behind.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

State = Literal["starting", "ready", "unready", "draining"]

_MOST = 1 << 20  # bytes of a line


class Told(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """What a process says of itself, and a supervisor of all of them to the control plane."""

    state: State = "starting"
    reasons: tuple[str, ...] = ()  # why it is not ready
    revision: str = ""  # of its policies
    requests: int = 0  # under way


class Worker(msgspec.Struct, frozen=True):
    """One worker as the control plane hears of it."""

    pid: int
    told: Told
    restarts: int  # of its place, since the supervisor began
    failing: bool  # whether it dies again and again


class Leave(msgspec.Struct, frozen=True, tag=True):
    """What a supervisor tells a process: to end, as SIGTERM does; said twice, at once."""


class Crew(msgspec.Struct, frozen=True, tag=True):
    """All workers, and whether everything is about to end."""

    workers: tuple[Worker, ...] = ()
    leaving: bool = False


class Asked(msgspec.Struct, frozen=True, tag=True):
    """What the control plane asks the supervisor for: that all workers read the policies anew."""


class Line:
    """One end of a pair, within an event loop. To be opened before it is used."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> Line:
        self._reader, self._writer = await asyncio.open_connection(sock=self._end, limit=_MOST)
        return self

    def say(self, what: Any) -> None:
        """Tell the other side; one that is gone hears nothing, and that is no failure."""
        if not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(what) + b"\n")

    async def heard(self, kind: Any) -> AsyncIterator[Any]:
        """What the other side says, until it is gone."""
        decode = msgspec.json.Decoder(kind).decode
        while True:
            try:
                line = await self._reader.readline()
            except ConnectionError:
                return
            if not line.endswith(b"\n"):
                return
            yield decode(line)

    def close(self) -> None:
        self._writer.close()

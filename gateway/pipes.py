"""What a supervisor and its processes tell each other: lines of JSON over a pair of sockets, one pair for each process.

The end of a line is news, too: a process whose supervisor is gone leaves, and so nothing is ever left behind.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

Kind = Literal["worker", "control"]
State = Literal["starting", "ready", "unready", "draining"]


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

    delay: float = 0.0  # seconds that it takes requests at least; its settings may say more


class Crew(msgspec.Struct, frozen=True, tag=True):
    """All workers, and whether everything is about to end."""

    workers: tuple[Worker, ...] = ()
    leaving: bool = False


class Asked(msgspec.Struct, frozen=True, tag=True):
    """What the control plane asks the supervisor for: that all workers read the policies anew."""


class Line(asyncio.Protocol):
    """One end of a pair, within an event loop. To be opened before it is used."""

    def __init__(self, end: socket.socket, unheard: bytes = b"") -> None:
        """`unheard` is what came over it already, and nobody took."""
        self._end = end
        self._lines: deque[bytes | None] = deque()  # None: the end
        self._news = asyncio.Event()
        self._rest = b""
        self._transport: asyncio.Transport
        self.data_received(unheard)

    async def open(self) -> Line:
        # The transport has a descriptor of its own, which it closes when the other side is gone.
        loop, own = asyncio.get_running_loop(), self._end.dup()
        self._transport, _ = await loop.create_connection(lambda: self, sock=own)
        return self

    def say(self, what: Any) -> None:
        """Tell the other side; one that is gone hears nothing, and that is no failure."""
        if not self._transport.is_closing():
            self._transport.write(msgspec.json.encode(what) + b"\n")

    async def heard(self, kind: Any) -> AsyncIterator[Any]:
        """What the other side says, until it is gone."""
        decode = msgspec.json.Decoder(kind).decode
        while True:
            while not self._lines:
                self._news.clear()
                await self._news.wait()
            if (line := self._lines.popleft()) is None:
                return
            yield decode(line)

    def close(self) -> None:
        self._transport.close()
        self._end.close()

    # — handed over to another program in this process

    @property
    def descriptor(self) -> int:
        """One that stays until this end is closed."""
        return self._end.fileno()

    @property
    def said(self) -> bool:
        """Whether all that was said is on its way."""
        return self._transport.get_write_buffer_size() == 0

    def unheard(self) -> bytes:
        """What came over it, and nobody took."""
        return b"\n".join([*(line for line in self._lines if line is not None), self._rest])

    # — asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines.extend(lines)
        self._news.set()

    def connection_lost(self, _: Exception | None) -> None:
        self._lines.append(None)
        self._news.set()

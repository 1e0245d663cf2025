"""A TCP proxy that does harm between any two parties, by faults that are set while it runs.

    async with Chaos(backend.url) as chaos:
        ...  # talk to chaos.url instead
        chaos.down.reset_after = 1000

`up` is the way to the target and `down` the way back. Each has its own faults, and they combine:

    delay         seconds that every piece waits
    split         pieces have at most so many bytes, each in a packet of its own
    throttle      bytes per second
    garbage       (n, noise): after n bytes of a connection these are put in
    flip          (n, mask): byte n of a connection is changed, by exclusive or
    cut_after     after so many bytes of a connection both sides are closed, by FIN
    reset_after   the same by RST
    black_hole    bytes are taken and lost; a connection that lost some carries nothing ever after

`refuse()` closes the listener and leaves open connections alone, `accept()` opens it again on the same port. While
`turn_away` is set who connects is reset at once, and counted; `hang_up()` resets every open connection. `lead_to()` is
for new connections. A fault holds for the next piece of every connection; positions count from a connection's first
byte in that direction.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


@dataclass(slots=True)
class Way:
    """One direction: its faults, and how many bytes went all the way."""

    delay: float = 0.0
    split: int = 65536
    throttle: float | None = None
    garbage: tuple[int, bytes] | None = None
    flip: tuple[int, int] | None = None
    cut_after: int | None = None
    reset_after: int | None = None
    black_hole: bool = False
    carried: int = 0

    def bent(self, data: bytes, at: int) -> bytes:
        """What becomes of the bytes that begin at this position."""
        if self.flip is not None and at <= self.flip[0] < at + len(data):
            changed = bytearray(data)
            changed[self.flip[0] - at] ^= self.flip[1]
            data = bytes(changed)
        if self.garbage is not None and at <= self.garbage[0] < at + len(data):
            put = self.garbage[0] - at
            data = data[:put] + self.garbage[1] + data[put:]
        return data

    def left(self, at: int) -> int | None:
        """How many bytes may still pass, None where no end is near."""
        ends = [end for end in (self.cut_after, self.reset_after) if end is not None]
        return max(0, min(ends) - at) if ends else None


class Chaos:
    """Listens while it is entered. `arrivals` are when connections were accepted, in the loop's time; `connections` is
    how many there were, `live` are open, `idle` is set while none is."""

    def __init__(self, target: str) -> None:
        self.up = Way()
        self.down = Way()
        self.turn_away = False
        self.arrivals: list[float] = []
        self.live = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.port = 0
        self._target = urlsplit(target)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._near: set[asyncio.StreamWriter] = set()

    def __repr__(self) -> str:
        return f"<Chaos on {self.port}, {self.live} of {self.connections} open, up {self.up}, down {self.down}>"

    @property
    def connections(self) -> int:
        return len(self.arrivals)

    @property
    def url(self) -> str:
        """The target's own address with the proxy in its place; a Unix socket here is always a store's."""
        scheme = "redis" if self._target.scheme == "unix" else self._target.scheme
        return f"{scheme}://127.0.0.1:{self.port}{'' if scheme == 'redis' else self._target.path}"

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self) -> None:
        """Listen, on the port that it had before if it had one."""
        if self._server is None:
            listener = socket.create_server(("127.0.0.1", self.port))
            self.port = listener.getsockname()[1]
            self._server = await asyncio.start_server(self._serve, sock=listener)

    async def refuse(self) -> None:
        """Do not listen: who connects is refused."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await asyncio.sleep(0)  # uvloop closes the socket in the next turn

    def hang_up(self) -> None:
        """Reset every open connection."""
        for writer in self._near:
            reset(writer)

    def lead_to(self, target: str) -> None:
        """Who connects from now on is connected with this party."""
        self._target = urlsplit(target)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.arrivals.append(asyncio.get_running_loop().time())
        if self.turn_away:
            return reset(writer)
        self._near.add(writer)
        self.live += 1
        self.idle.clear()
        near, far = _End(reader, writer), None
        try:
            with suppress(OSError):
                far = _End(*await self._reach())
                await asyncio.gather(_carry(near, far, self.up), _carry(far, near, self.down))
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            for end in (near, far):
                if end is not None:
                    end.writer.transport.abort()
            self._near.discard(writer)
            self.live -= 1
            if not self.live:
                self.idle.set()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.scheme == "unix":
            return await asyncio.open_unix_connection(self._target.path)
        return await asyncio.open_connection(self._target.hostname, self._target.port)


class _End:
    """One party's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._over = False
        writer.transport.set_write_buffer_limits(0)  # drain() returns when the socket has it all
        sock: socket.socket = writer.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def open(self) -> bool:
        return not self._over and not self.writer.is_closing()

    def finish(self, *, by_rst: bool) -> None:
        if by_rst:
            reset(self.writer)
        elif self.open:
            self.writer.write_eof()
        self._over = True


async def _carry(source: _End, sink: _End, way: Way) -> None:
    """One direction, to its end. After a cut it reads on: a socket that is closed unread sends RST, not FIN."""
    at, lost = 0, False
    while data := await source.reader.read(65536):
        lost = lost or way.black_hole
        for piece in () if lost else _pieces(way.bent(data, at), way):
            left = way.left(at)
            passes = piece if left is None else piece[:left]
            await asyncio.sleep(way.delay + (len(passes) / way.throttle if way.throttle else 0))
            if not sink.open:
                break
            sink.writer.write(passes)
            await sink.writer.drain()
            at += len(passes)
            way.carried += len(passes)
            if way.left(at) == 0:
                by_rst = way.reset_after is not None and at >= way.reset_after
                source.finish(by_rst=by_rst)
                sink.finish(by_rst=by_rst)
                break
    sink.finish(by_rst=False)


def _pieces(data: bytes, way: Way) -> Iterator[bytes]:
    """The split is asked for anew with every piece: it may be changed meanwhile."""
    at = 0
    while at < len(data):
        size = way.split
        yield data[at : at + size]
        at += size


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST instead of FIN."""
    sock: socket.socket = writer.get_extra_info("socket")
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

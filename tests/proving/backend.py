"""A backend that does what a test tells it to, over raw sockets, and remembers what it was sent.

    async with Backend(Peer.request, ok(b"{}"), Peer.reset) as backend:
        ...  # talk to backend.url
        assert backend.requests[0].body == b"..."
        await backend.peers[0].gone.wait()

The steps are played on every connection. A step is bytes (they are sent), an Event (it is waited for), or an async
function of the Peer: one of its own methods, or a whole script. After the last step a connection stays open until the
other side closes it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self, TypeAlias

Headers: TypeAlias = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was received: `head` is its bytes up to and with the blank line."""

    head: bytes
    body: bytes

    @property
    def line(self) -> bytes:
        return self.head.partition(b"\r\n")[0]

    @property
    def headers(self) -> Headers:
        fields = (line.partition(b":") for line in self.head.split(b"\r\n")[1:] if line)
        return [(name.lower(), value.strip()) for name, _, value in fields]


class Peer:
    """One connection as the backend sees it. `gone` is set once the other side has closed it."""

    def __init__(self, backend: Backend, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.gone = asyncio.Event()
        self.requests: list[Request] = []
        self.number = len(backend.peers)
        self.sent = 0  # bytes that the socket has taken, or that wait for it in the transport
        self._backend = backend
        self._reader = reader
        self._writer = writer

    async def request(self) -> None:
        """Receives one request, with the body that its content-length announces."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = dict(Request(head, b"").headers).get(b"content-length", b"0")
        self.requests.append(Request(head, await self._reader.readexactly(int(length))))
        self._backend.requests.append(self.requests[-1])

    async def head(self) -> None:
        """Receives the head of a request, and leaves its body unread."""
        self.requests.append(Request(await self._reader.readuntil(b"\r\n\r\n"), b""))
        self._backend.requests.append(self.requests[-1])

    async def send(self, *pieces: bytes) -> None:
        """Sends each piece by itself, and waits while the other side does not read."""
        for piece in pieces:
            if self._writer.is_closing():  # uvloop's own word for it is a RuntimeError
                raise ConnectionResetError
            self._writer.write(piece)
            self.sent += len(piece)
            await self._writer.drain()

    async def close(self) -> None:
        self._writer.close()

    async def reset(self) -> None:
        """Closes with RST instead of FIN."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def hung_up(self) -> int:
        """Waits until the other side closes; how many bytes it sent until then."""
        received = 0
        with suppress(ConnectionError):
            while piece := await self._reader.read(65536):
                received += len(piece)
        self.gone.set()
        return received


Step: TypeAlias = bytes | asyncio.Event | Callable[[Peer], Awaitable[object]]


class Backend:
    """Listens while it is entered. `requests` is all that came, `peers` every connection that was opened."""

    def __init__(self, *steps: Step, tls: ssl.SSLContext | None = None) -> None:
        self.steps = steps
        self.peers: list[Peer] = []
        self.requests: list[Request] = []
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listener, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome  # a script that failed has failed its test

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        try:
            await play(peer, *self.steps)
            await peer.hung_up()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side had enough, or the test
        finally:
            peer.gone.set()
            writer.transport.abort()


async def play(peer: Peer, *steps: Step) -> None:
    for step in steps:
        if isinstance(step, bytes):
            await peer.send(step)
        elif isinstance(step, asyncio.Event):
            await step.wait()
        else:
            await step(peer)


def forever(*steps: Step) -> Step:
    """The steps again and again, for as long as the connection lives."""

    async def again(peer: Peer) -> None:
        while True:
            await play(peer, *steps)

    return again


def ok(body: bytes, *fields: bytes) -> bytes:
    """A JSON answer with its length, and with further header lines."""
    head = (b"HTTP/1.1 200 OK", b"content-type: application/json", b"content-length: %d" % len(body), *fields)
    return b"\r\n".join((*head, b"", body))


EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def chunked(*pieces: bytes) -> bytes:
    """A whole event stream, one chunk for each piece."""
    return b"".join((EVENTS, *map(chunk, pieces), END))

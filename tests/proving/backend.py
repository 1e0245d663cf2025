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
import json
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from tests.proving.chaos import reset

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


@dataclass(slots=True)
class Served:
    """What was produced for one request: `prompt` and `completion` are tokens as they were reported, None until they
    were; `events` went out with a token each; `whole` says that the end was sent too."""

    id: bytes
    prompt: int | None = None
    completion: int | None = None
    events: int = 0
    whole: bool = False


class Peer:
    """One connection as the backend sees it. `gone` is set once the other side has closed it."""

    def __init__(self, backend: Backend, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.gone = asyncio.Event()
        self.requests: list[Request] = []
        self.number = len(backend.peers)
        self.sent = 0  # bytes that the socket has taken, or that wait for it in the transport
        self.backend = backend
        self._reader = reader
        self._writer = writer

    async def request(self) -> None:
        """Receives one request, with the body that its content-length announces."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = dict(Request(head, b"").headers).get(b"content-length", b"0")
        self.requests.append(Request(head, await self._reader.readexactly(int(length))))
        self.backend.requests.append(self.requests[-1])

    async def head(self) -> None:
        """Receives the head of a request, and leaves its body unread."""
        self.requests.append(Request(await self._reader.readuntil(b"\r\n\r\n"), b""))
        self.backend.requests.append(self.requests[-1])

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
        reset(self._writer)

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
    """Listens while it is entered. `requests` is all that came, `peers` every connection that was opened, `served` what
    the completions among its steps produced: the backend's own ledger."""

    def __init__(self, *steps: Step, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.steps = steps
        self.peers: list[Peer] = []
        self.requests: list[Request] = []
        self.served: list[Served] = []
        self.port = port  # 0: any free one
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
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


# — completions, and the ledger of what they produced


def token(text: str = " word") -> bytes:
    """One event of a completion, with one token."""
    return b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m",' + (
        b'"choices":[{"index":0,"text":"%b","logprobs":null,"finish_reason":null}],"usage":null}\n\n' % text.encode()
    )


DONE = b"data: [DONE]\n\n"


def reported(prompt: int, completion: int, *, choices: bytes = b"[]") -> bytes:
    """An event with the usage of the whole request."""
    usage = (prompt, completion, prompt + completion)
    return b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":%b,' % choices + (
        b'"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n' % usage
    )


FINISHED = b'[{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}]'


def completion(
    events: int,
    *,
    pace: float = 0.0,
    prompt: int = 3,
    usage: Literal["finish", "extra", "none"] = "finish",
    cut: Step | None = None,
) -> Step:
    """Receives a request and answers with a stream of so many tokens, one every `pace` seconds, and keeps the ledger.

    The usage stands in the event of the finish, as Fireworks sends it, or in one more event, as OpenAI and vLLM send it
    when they are asked. With `cut`, that step is played after the tokens, and there is no end.
    """

    async def answer(peer: Peer) -> None:
        await peer.request()
        served = Served(dict(peer.requests[-1].headers).get(b"x-request-id", b""))
        peer.backend.served.append(served)
        await peer.send(EVENTS)
        for _ in range(events):
            await peer.send(chunk(token()))
            served.events += 1
            await asyncio.sleep(pace)
        if cut is not None:
            await play(peer, cut)
            return
        if usage == "finish":
            await peer.send(chunk(reported(prompt, events, choices=FINISHED)))
        elif usage == "extra":
            await peer.send(chunk(b'data: {"choices":' + FINISHED + b"}\n\n"), chunk(reported(prompt, events)))
        if usage != "none":
            served.prompt, served.completion = prompt, events
        await peer.send(chunk(DONE) + END)
        served.whole = True

    return answer


def whole(body: bytes, *fields: bytes) -> Step:
    """Receives a request, answers with this JSON and keeps the ledger by the usage in it."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        used = json.loads(body).get("usage", {})
        served = Served(dict(peer.requests[-1].headers).get(b"x-request-id", b""))
        peer.backend.served.append(served)
        await peer.send(ok(body, *fields))
        served.prompt, served.completion, served.whole = used.get("prompt_tokens"), used.get("completion_tokens"), True

    return answer


# — faults by name


def first(*steps: Step, then: Step) -> Step:
    """The steps on the first connection; on every later one `then`, again and again."""

    async def by_number(peer: Peer) -> None:
        await (play(peer, *steps) if peer.number == 0 else play(peer, forever(then)))

    return by_number


def every(seconds: float, piece: bytes) -> Step:
    """The piece for ever, with a pause after each."""

    async def again(peer: Peer) -> None:
        while True:
            await peer.send(piece)
            await asyncio.sleep(seconds)

    return again


_GOOD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"

# What can go wrong before an answer has a head that may be relayed.
NO_ANSWER: dict[str, tuple[Step, ...]] = {
    "end of file": (Peer.request, Peer.close),
    "reset": (Peer.request, Peer.reset),
    "reset in the head": (Peer.request, _GOOD[:20], Peer.reset),
    "silence": (Peer.request,),
    "silence in the head": (Peer.request, _GOOD[:20]),
    "endless 1xx": (Peer.request, every(0.02, b"HTTP/1.1 100 Continue\r\n\r\n")),
    "binary": (Peer.request, bytes(range(128, 256)) * 8),
    "text": (Peer.request, b"220 mail.example.com ESMTP\r\n"),
    "HTTP/0.9": (Peer.request, b"<html></html>", Peer.close),
    "HTTP/2": (Peer.request, b"\0\0\x06\4\0\0\0\0\0\0\5\0\0\x40\0"),
    "a header of 1 MiB": (Peer.request, _GOOD + b"x: " + b"y" * (1 << 20) + b"\r\ncontent-length: 2\r\n\r\n{}"),
    "10,000 fields": (Peer.request, _GOOD + b"x: y\r\n" * 10_000 + b"content-length: 2\r\n\r\n{}"),
    "NUL in a value": (Peer.request, _GOOD + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}"),
    "CR in a value": (Peer.request, _GOOD + b"x: a\rset-cookie: b\r\ncontent-length: 2\r\n\r\n{}"),
    "a length and chunks": (
        Peer.request,
        _GOOD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"{}") + END,
    ),
    "two lengths": (Peer.request, _GOOD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{} "),
    "a redirect": (Peer.request, b"HTTP/1.1 302 Found\r\nlocation: /v1/admin\r\ncontent-length: 0\r\n\r\n"),
}

# How an answer is cut that has begun; each is played after some of its body.
CUTS: dict[str, tuple[Step, ...]] = {
    "by FIN": (Peer.close,),
    "by RST": (Peer.reset,),
    "by silence": (),
    "by garbage for a chunk": (b"zz\r\n",),
}

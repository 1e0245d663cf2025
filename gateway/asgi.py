"""What the gateway needs of ASGI: bodies in, refusals out, and notice when a caller leaves.

Headers are lists of (name, value) in bytes, in their order, duplicates kept; names are lower case on the way in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from email.utils import formatdate
from types import TracebackType
from typing import Any

from gateway.errors import ClientGone, Dialect, GatewayError, Shape, TooLarge, shape_for

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # how a name of a header is written, RFC 9110 section 5.6.2


class Cut(Exception):
    """The line is to be cut: something failed after the status line, and a cut answer must not look complete."""


# Where a scope has it, a function that writes a piece of the body at once, in whoever's turn: `pour(piece) -> bool`. It
# says False, and has done nothing, where the piece has to be sent: the caller must be waited for, or has left.
POUR = "gateway.pour"

END: Message = {"type": "http.response.body", "body": b"", "more_body": False}

# RFC 9110 section 7.6.1, and what practice adds to it.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


def end_to_end(headers: Iterable[tuple[bytes, bytes]], drop: frozenset[bytes] = frozenset()) -> RawHeaders:
    """The headers that travel on: without the hop-by-hop ones, those that Connection names, and `drop`."""
    kept: RawHeaders = []
    named: list[bytes] = []
    for header in headers:
        name = header[0].lower()
        if name in _HOP_BY_HOP:
            if name == b"connection":
                named += _nominated(header[1])
        elif name not in drop:
            kept.append(header)
    return [header for header in kept if header[0].lower() not in named] if named else kept


def named_by_connection(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """The names that Connection nominates: they belong to this hop, and do not travel."""
    return {word for name, value in headers if name == b"connection" for word in _nominated(value)}


def _nominated(connection: bytes) -> list[bytes]:
    return [word.strip().lower() for word in connection.split(b",")]


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def announced_length(headers: RawHeaders, at_most: int) -> int | None:
    """The length that a body's caller announces, or None. Raises TooLarge over `at_most` bytes."""
    announced = header(headers, b"content-length")
    if announced is None or not announced.isdigit():
        return None
    length = int(announced[:20])  # int() refuses thousands of digits; twenty are too many already
    if length > at_most:
        raise TooLarge(f"the body has {length} bytes, at most {at_most} are read")
    return length


def shape_of(scope: Scope, dialect: Dialect) -> Shape:
    """The shape in which a request's caller reads errors, by its Accept or else by its endpoint's dialect."""
    return shape_for(dialect, (value for name, value in scope["headers"] if name == b"accept"))


async def read_body(scope: Scope, receive: Receive, at_most: int) -> bytes:
    """The whole request body. Raises TooLarge over `at_most` bytes, before reading them where the caller says so."""
    announced_length(scope["headers"], at_most)
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body", False) and len(body) <= at_most:
        return body
    pieces = bytearray(body)
    while message["type"] == "http.request":
        if len(pieces) > at_most:
            raise TooLarge(f"the body has more than {at_most} bytes, at most so many are read")
        if not message.get("more_body", False):
            return bytes(pieces)
        message = await receive()
        pieces += message.get("body", b"")
    raise ClientGone


async def refuse(
    send: Send,
    error: GatewayError,
    *,
    shape: Shape = "openai",
    called: str | None = None,
    headers: RawHeaders | None = None,
    close: bool = False,
) -> None:
    """Answer with an error; `called` is the id of the request, `close` ends the connection, for a body not read."""
    status, own, body = error.render(shape, called)
    await respond(send, status, body, own + (headers or []), close=close or error.closes)


async def respond(send: Send, status: int, body: bytes, headers: RawHeaders, *, close: bool = False) -> None:
    """A whole answer of our own. RFC 9110 section 6.6.1: who has a clock says when."""
    headers = [
        *headers,
        (b"content-length", b"%d" % len(body)),
        (b"date", formatdate(usegmt=True).encode()),
    ]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class until_hang_up:  # noqa: N801 - reads as what it does: async with until_hang_up(receive)
    """A block that ends with ClientGone as soon as the caller is gone.

    uvicorn's send() is silent after a disconnect, so somebody has to listen while the backend is waited for and while
    it streams. The body must have been read: whatever receive() says next is that the caller left.
    """

    __slots__ = ("_gone", "_owner", "_receive", "_watch")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> None:
        owner = asyncio.current_task()
        assert owner is not None
        self._owner = owner
        self._watch = asyncio.ensure_future(self._receive())
        self._watch.add_done_callback(self._hung_up)

    def _hung_up(self, watch: asyncio.Future[Message]) -> None:
        if not watch.cancelled():
            watch.exception()  # a receive() that fails has lost the caller just the same
            self._gone = True
            self._owner.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._gone:
            self._watch.remove_done_callback(self._hung_up)
            self._watch.cancel()
        elif self._owner.uncancel() == 0 and kind in (None, asyncio.CancelledError):
            raise ClientGone from error

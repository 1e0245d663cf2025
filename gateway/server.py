"""uvicorn as the gateway uses it: its options, and its protocol with the limits that it does not have.

uvicorn leaves the framing of requests to llhttp, and has neither a cap nor a deadline for them. Here they are, and an
answer of our own, in the shape of all others, for whatever is refused before the application hears of it.

    head    the head of a request is coming: it has a size, and a moment at which it must be here
    body    its body is coming: it has a pace
    None    nothing is coming: an answer is owed, or the connection is idle (uvicorn's own timer ends that)

One request at a time is read from a connection. Who sends the next one before the answer of the first (pipelining) gets
that answer and then the end of the connection; what came too early is dropped unread, and RFC 9112 section 9.3.2 lets
him send it again. So reading goes on while an answer is owed, and a caller that leaves is seen at once. A caller that
closes only his sending side has left, too: asyncio closes the other one.

Deadlines cost a request that comes in one piece nothing: a connection has one timer, which is armed when a request is
there by half. A second one runs only while a caller does not take what is written.

uvicorn writes the head of an answer by itself, and what follows by itself. Each write to a socket costs a system call
and wakes the caller: for a short answer that is a tenth of all that the gateway does. So a head waits for what follows
it, but never longer than the turn of the event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from math import inf
from typing import Any, ClassVar, Literal, cast

import uvicorn
from httptools import HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.asgi import POUR, refuse
from gateway.errors import (
    ExpectationFailed,
    GatewayError,
    HeadTooLarge,
    InternalError,
    InvalidHTTP,
    MethodNotAllowed,
    RequestTimeout,
    TargetTooLong,
    VersionNotSupported,
)

TARGET = 8 * 1024  # bytes of a request's target; RFC 9112 section 3 recommends 8,000
HEAD = 32 * 1024  # bytes of a header block, each field as name, ": ", value and CRLF; nginx takes four times 8 KiB
FIELDS = 100  # of a header block; Apache's limit
# Bytes beside its body that a request may have while it comes: its head with all its white space, then the sizes and
# extensions of its chunks, and its trailers. llhttp limits none of them.
_BESIDE = HEAD + TARGET + 8 * 1024
_CHUNK = 16  # bytes that the size of a chunk and the ends of its lines may take in addition

_HOST = re.compile(rb"(?:[0-9A-Za-z._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
# A close while the caller still sends would be a reset, which takes back what he has not read of his answer. So for a
# moment what comes is dropped, and then the line is cut (nginx's lingering_close). Twice the usual cap of a body.
_LINGER, _DROPPED = 1.0, 64 * 1024 * 1024  # seconds, bytes
_WATCHED = frozenset((b"host", b"expect", b"transfer-encoding", b"upgrade", b"http2-settings"))


@dataclass(frozen=True)
class Patience:
    """How long a connection is waited for, in seconds."""

    head: float = 10.0  # from the connection, or the first byte on one that is kept, to the end of a head
    body: float = 10.0  # of grace, and of each stretch after it, which must bring so many times `pace`
    pace: float = 1024.0  # bytes a second
    stall: float = 30.0  # without a byte taken of what is written
    idle: int = 75  # between two requests; nginx's figure, and longer than the 60 that load balancers keep theirs


def config(app: Any, *, drain: float) -> uvicorn.Config:
    """The options of a server of ours; after SIGTERM its answers may go on for `drain` seconds."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        date_header=False,  # the backend's own Date passes; answers of ours bring one
        timeout_keep_alive=Protocol.patience.idle,
        timeout_graceful_shutdown=int(drain),
    )


class State(ServerState):
    """What all connections know of their server. `full` is called by one that is more than the `most` there may be."""

    closing = False  # whether connections end with the answer that they wait for

    def __init__(self, most: int, full: Callable[[], None]) -> None:
        super().__init__()
        self.most = most
        self.full = full


_UNHEARD = 1.0  # seconds that a request which is about to come has, when nothing new is taken any more


class Protocol(HttpToolsProtocol):
    """One connection of a caller."""

    patience: ClassVar[Patience] = Patience()

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._coming: Literal["head", "body"] | None = None
        self._since = 0.0  # when that began; 0: not noted yet
        self._received = inf  # bytes of the body in this stretch of time; inf: in its grace
        self._beside = _BESIDE  # bytes beside the body that may still come
        self._keeps = False  # whether the connection may be kept after the request that is coming
        self._deaf = False  # whether all that comes is dropped
        self._dropped = 0  # bytes
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def _closing(self) -> bool:
        """Whether this answer is the last one; a server of uvicorn's own has no word for it."""
        return isinstance(self.server_state, State) and self.server_state.closing

    # — what asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._gathered = _Gathered(self._raw, self.loop, self)
        super().connection_made(cast(asyncio.Transport, self._gathered))
        if isinstance(self.server_state, State) and len(self.connections) >= self.server_state.most:
            self.server_state.full()
        self._since = self.loop.time()
        self._late = self.loop.call_later(self.patience.head, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()
        self._late = self._stalled = None
        self._unset_keepalive_if_required()  # uvicorn leaves it running after an error
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The caller has closed his sending side: he has left. asyncio would first write what he may never take."""
        if self.cycle and not self.cycle.response_complete:
            self.transport.abort()
        elif self.transport.get_write_buffer_size():
            self.watch_writes()

    def shutdown(self) -> None:
        """Nothing follows what is under way. What has just been connected, and what is about to ask, is heard first:
        its caller was told that it is served here."""
        self._keeps = False  # of a request whose body still comes
        if self._coming == "head" or self.cycle is None:
            self.loop.call_later(_UNHEARD, self._close_idle)
        else:
            super().shutdown()

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._dropped += len(data)
            if self._dropped > _DROPPED and self.transport.is_closing():
                self.transport.abort()
            return
        self._beside -= len(data)
        try:
            self.parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._stopped(error.__context__)  # what a callback of ours raised
            return
        if self._beside < 0:
            self._refuse(HeadTooLarge(f"more than {_BESIDE} bytes came beside the body of the request"))
        elif self._coming is not None and not self._since:
            self._since = self.loop.time()
            self._arm(self.patience.head if self._coming == "head" else self.patience.body)

    # — what llhttp tells

    def on_message_begin(self) -> None:
        if self.cycle and not self.cycle.response_complete:
            raise _Pipelined
        self._unset_keepalive_if_required()  # here and not for any byte: an empty line begins nothing
        self._coming = "head"
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > TARGET:
            raise TargetTooLong(f"the target is longer than {TARGET} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._coming == "body":
            return  # a trailer: RFC 9110 section 6.5.1 lets them be dropped, and uvicorn would add them to the headers
        if len(self.headers) == FIELDS:
            raise HeadTooLarge(f"the head has more than {FIELDS} fields")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._check_head()
        super().on_headers_complete()
        self.cycle.__class__ = _Cycle
        self.scope[POUR] = self.pour  # type: ignore[literal-required]
        # An answer that begins before its request is here ends the connection: what is left of the body is not read.
        self._keeps, self.cycle.keep_alive = self.cycle.keep_alive and not self._closing, False
        self._coming, self._since, self._received = "body", 0.0, inf

    def on_body(self, body: bytes) -> None:
        self._beside += len(body) + _CHUNK
        self._received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._coming, self._since, self._beside = None, 0.0, _BESIDE
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps
        super().on_message_complete()

    def _check_head(self) -> None:
        """Refuse what llhttp lets pass and the gateway does not."""
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise VersionNotSupported("this is not HTTP/1.1, which is what is spoken here")
        method = self.parser.get_method()
        if method in (b"CONNECT", b"TRACE"):
            raise MethodNotAllowed(
                f"{method.decode()} is not for this server", headers=[(b"allow", b"GET, HEAD, POST")]
            )
        if not self.url.startswith(b"/") or b"#" in self.url or not self.url.isascii():
            raise InvalidHTTP("the target is not a path with an optional query, in ASCII")
        # Counted only where so much has come at all.
        if _BESIDE - self._beside > HEAD and sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD:
            raise HeadTooLarge(f"the header block is longer than {HEAD} bytes")
        watched = [field for field in self.headers if field[0] in _WATCHED]
        for name, value in watched:
            _check_field(name, value, version)
        names = [name for name, _ in watched]
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise InvalidHTTP("the request has no Host, or more than one")
        self.expect_100_continue = b"expect" in names and version == "1.1"  # RFC 9110 section 10.1.1

    def pour(self, piece: bytes) -> bool:
        """A piece of a chunked body that has begun, written at once; see asgi.POUR."""
        cycle = self.cycle
        if self.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding or self.transport.is_closing():
            return False
        transport = self._gathered if self._gathered.head is not None else self._raw
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    # — refusals

    def _stopped(self, cause: BaseException | None) -> None:
        """llhttp reads no further, because of a fault that it found or because a callback of ours said so."""
        if isinstance(cause, _Pipelined):
            self._deaf = True
            self.cycle.keep_alive = False
        elif isinstance(cause, GatewayError):
            self._refuse(cause)
        else:
            self._refuse(InvalidHTTP("the request is not valid HTTP/1.1"))

    def _refuse(self, error: GatewayError) -> None:
        """Answer in the place of the application, and close. An answer that has begun can only be cut."""
        self._deaf = True
        self.logger.debug("refused a request: %d %s", error.status, error.code)
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True  # to the application its caller has left
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        elif (tell := getattr(self.app, "refused", None)) is not None:  # it would not hear of it otherwise
            tell(error)
        status, headers, body = error.render()
        headers += [
            (b"content-length", b"%d" % len(body)),
            (b"date", formatdate(usegmt=True).encode()),
            (b"connection", b"close"),
        ]
        fields = b"".join(b"%b: %b\r\n" % field for field in headers)
        self.transport.write(b"".join((STATUS_LINE[status], fields, b"\r\n", body)))
        self.transport.close()

    # — deadlines

    def _arm(self, delay: float) -> None:
        """Look no later than after `delay` seconds."""
        if self._late is not None:
            if self._late.when() <= self.loop.time() + delay:
                return
            self._late.cancel()
        self._late = self.loop.call_later(delay, self._look)

    def _look(self) -> None:
        """Whether what is coming is late."""
        self._late = None
        if self.transport.is_closing():
            return
        if self._coming is None:
            if not self.cycle:  # it never asked for anything, so there is nothing to answer
                self.transport.close()
            return
        due = self.patience.head if self._coming == "head" else self.patience.body
        left = self._since + due - self.loop.time()
        if left > 0:
            self._arm(left)
        elif self._coming == "head":
            self._refuse(RequestTimeout(f"the head of the request took more than {due:g} seconds"))
        else:
            if self.flow.read_paused or self.cycle.waiting_for_100_continue:
                self._received = inf  # we are who is waited for
            if self._received < self.patience.pace * due:
                self._refuse(RequestTimeout(f"the body came with less than {self.patience.pace:g} bytes a second"))
            else:
                self._received, self._since = 0, self.loop.time()
                self._arm(due)

    def read_again(self) -> None:
        """The body had to wait for us: its time begins anew."""
        self._received, self._since = inf, self.loop.time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None and not self.transport.is_closing():
            self._stalled.cancel()
            self._stalled = None

    def sends_still(self) -> bool:
        """Whether the caller is in the middle of a request when the connection is closed; the rest is dropped."""
        self._deaf = self._deaf or self._coming is not None
        return self._deaf

    def watch_writes(self) -> None:
        """Cut the line when nothing of what is written is taken. uvicorn tells the application that the caller left."""
        if self._stalled is None:
            left = self.transport.get_write_buffer_size()
            self._stalled = self.loop.call_later(self.patience.stall, self._taken, left)

    def _taken(self, before: int) -> None:
        self._stalled = None
        if self.transport.get_write_buffer_size() < before:
            self.watch_writes()
        else:
            self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # it has not even read its answer; close() would wait for that
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()


def _check_field(name: bytes, value: bytes, version: str) -> None:
    """Refuse a field of those that are watched."""
    match name:
        case b"host":
            if not _HOST.fullmatch(value):
                raise InvalidHTTP("the Host is not a name or an address with an optional port")
        case b"expect":
            if value.lower() != b"100-continue":
                raise ExpectationFailed("the Expect is not 100-continue")
        case b"transfer-encoding":  # llhttp has no quarrel with "gzip, chunked", nor with HTTP/1.0
            if value.lower() != b"chunked" or version == "1.0":
                raise InvalidHTTP("the Transfer-Encoding is not chunked, or the version has none")
        case _:  # RFC 9110 section 7.8 lets it be ignored; what follows the head would still be in doubt
            raise InvalidHTTP("no other protocol is spoken here, and the request asks for one (Upgrade)")


class _Cycle(RequestResponseCycle):
    """One request and its answer; where the application gives none, the answer is ours."""

    async def send_500_response(self) -> None:
        await refuse(cast(Any, self.send), InternalError("the gateway failed; its log has more"), close=True)


class _Pipelined(Exception):
    """A request has begun before the one before it was answered."""


class _Gathered:
    """A transport that sends a head together with the next thing written, and that closes with patience."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, protocol: Protocol) -> None:
        self._transport = transport
        self._loop = loop
        self._protocol = protocol
        self.head: bytes | None = None
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self.head is not None:
            head, self.head = self.head, None
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1.1 "):
            self.head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        """Send what is written, and close. Where the caller still sends, he may read first."""
        self._flush()
        if self.is_closing():
            return
        if self._protocol.sends_still() and self._transport.can_write_eof():
            self._lingers = True
            self._transport.resume_reading()
            self._transport.write_eof()
            self._loop.call_later(_LINGER, self._close)
        else:
            self._close()

    def _close(self) -> None:
        self._transport.close()
        if self._transport.get_write_buffer_size():  # asyncio would wait for that without end
            self._protocol.watch_writes()

    def abort(self) -> None:
        self.head = None
        self._transport.abort()

    def resume_reading(self) -> None:
        self._transport.resume_reading()
        self._protocol.read_again()

    def _flush(self) -> None:
        head, self.head = self.head, None
        if head is not None and not self._transport.is_closing():  # uvloop refuses to write to what is closed
            self._transport.write(head)

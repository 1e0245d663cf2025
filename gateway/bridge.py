"""Exchanges with an upstream through stock httpx: HTTP/2 where the upstream offers it, for pools that ask for it.

What httpcore 1.0.9 shares between requests, it shares badly, so that each exchange here has a transport of httpx, and
with it a connection, for itself. Shared,

- a request that is cancelled before its connection is made takes its place in the pool for ever (encode/httpcore #1093)
- an HTTP/2 stream that is left is not reset: the upstream works on, and what it sends uses up the window of the others
- what the reader of an HTTP/2 stream does not take is stored while the others read, up to 16 MiB of it
- one failed read fails every stream of its connection
- bytes after an HTTP/1.1 answer become the next request's answer

Alone, it can be cancelled at any moment and thrown away. A connection that speaks HTTP/2 and whose answer has ended
serves the next exchange; one that speaks HTTP/1.1 never does, for the last reason.

A streamed body is sent to its end before httpcore listens: what an upstream answers earlier is heard then, and not at
all from one that has closed by then. The wire hears both.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from functools import cache
from importlib.util import find_spec
from typing import Any, Final, Protocol, cast

import httpx

from gateway.asgi import TOKEN
from gateway.errors import UpstreamFailed
from gateway.language import Timeouts
from gateway.wire import AT_ONCE, FIELDS, HEAD, IDLE, Pour, failure_of, head_of, timeouts_of, trusting

_HTTP2 = find_spec("h2") is not None  # an extra: without it there is HTTP/1.1
_END = 0.1  # seconds that the end of an answer may come after its last byte, for its connection to be kept

_FOREIGN: tuple[type[Exception], ...] = (httpx.TransportError, OSError)
if _HTTP2:
    from h2.exceptions import H2Error

    _FOREIGN += (H2Error,)  # httpcore lets it through

_NAME = re.compile(TOKEN)
_CONTROLS = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 section 5.5

# httpcore and h11 have one class for what is not HTTP and for an answer that was cut; these are the words for the cut.
_CUT: Final = (
    "Server disconnected",
    "peer closed connection",
    "peer unexpectedly closed connection",
    "<StreamReset",
    "<ConnectionTerminated",
)


class Bridge(httpx.AsyncBaseTransport):
    """Exchanges with the one upstream at `url`, as Wire has them: same requests, same failures, same streams.

    `ssl_context` must not be shared with a Wire: httpx writes into it that HTTP/2 is spoken.
    """

    def __init__(self, url: str, *, ssl_context: ssl.SSLContext | None = None, server_name: str | None = None) -> None:
        self._origin = httpx.URL(url)
        self._ssl = ssl_context or _trusted()
        self._extensions = {} if server_name is None else {"sni_hostname": server_name}
        self.busy: set[_Line] = set()
        self.idle: dict[_Line, asyncio.TimerHandle] = {}  # in the order of their last use, with what ends them
        self._closing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        origin = f"{self._origin.scheme}://{self._origin.netloc.decode()}"
        return f"<Bridge {origin} {len(self.busy)} busy, {len(self.idle)} idle>"

    @property
    def in_flight(self) -> int:
        """Answers that are not closed yet."""
        return len(self.busy)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer as soon as its head is here; its `stream` is a Stream. Raises UpstreamFailed, UpstreamTimeout.

        The request's `extensions` are those of Wire. A connection that was used before and is lost within a second
        of the question, with no answer, is replaced by a new one, once.
        """
        head_of(request)  # refuses CR, LF and NUL, which h2 would send
        timeouts, since = timeouts_of(request)
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        end_by = since + timeouts.total
        line = self._take()
        try:
            response = await self._ask(line, request, timeouts, since)
        except UpstreamFailed as failed:
            late = loop.time() - asked_at > AT_ONCE
            if line.fresh or late or failed.code != "upstream_disconnected" or "body" not in request.extensions:
                raise
            line = _Line(self._ssl)
            response = await self._ask(line, request, timeouts, since)
        body = Body(self, line, response, request.method, timeouts, end_by)
        return httpx.Response(response.status_code, headers=response.headers.raw, stream=body)

    def _take(self) -> _Line:
        if not self.idle:
            return _Line(self._ssl)
        line, expiry = self.idle.popitem()
        expiry.cancel()
        return line

    async def _ask(self, line: _Line, request: httpx.Request, timeouts: Timeouts, since: float) -> httpx.Response:
        body = request.extensions.get("body")
        streams = body is None and not isinstance(request.stream, httpx.ByteStream)
        deadlines = _Deadlines(timeouts, since, streams=streams)
        stream = request.stream if body is None else httpx.ByteStream(body)
        sending = _Sending(cast(httpx.AsyncByteStream, stream), deadlines) if streams else None
        own = httpx.Request(
            request.method,
            self._origin.copy_with(raw_path=request.url.raw_path),
            headers=request.headers,
            stream=sending or stream,
            extensions=dict(self._extensions),
        )
        self.busy.add(line)
        try:
            response = await line.ask(own, deadlines)
            if not _valid(response):
                raise failure_of("upstream_protocol_error")
        except BaseException:
            await self.end(line)
            raise
        finally:
            if sending is not None:
                await sending.aclose()
        return response

    async def aclose(self) -> None:
        """Ends every connection, and with it every answer that is still owed. Who asks later gets a new one."""
        for line in [*self.busy, *self.idle]:
            self._end(line)
        if self._closing:
            await asyncio.wait(set(self._closing))

    def keep(self, line: _Line) -> None:
        self.busy.discard(line)
        self.idle[line] = asyncio.get_running_loop().call_later(IDLE, self._end, line)

    async def end(self, line: _Line) -> None:
        """Closes its connection, to the end also where who waits for it is cancelled."""
        await asyncio.shield(self._end(line))

    def _end(self, line: _Line) -> asyncio.Task[None]:
        self.busy.discard(line)
        if expiry := self.idle.pop(line, None):
            expiry.cancel()
        closing = asyncio.get_running_loop().create_task(line.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing


class _Deadlines:
    """The next of the moments that an exchange has until its head is here, on one `clock`; `code` is what it is then.

    Where its body streams, the upstream is waited for in turn with the caller, and only the total counts for both.
    """

    def __init__(self, timeouts: Timeouts, since: float, *, streams: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeouts = timeouts
        self._end_by = since + timeouts.total
        self._answer_by = self._end_by if streams else min(since + timeouts.first_byte, self._end_by)
        connect_by = self._loop.time() + timeouts.connect
        sooner = connect_by < self._answer_by
        self.code = "upstream_connect_timeout" if sooner else "upstream_first_byte_timeout"
        self.clock = asyncio.timeout_at(min(connect_by, self._answer_by))

    def connected(self) -> None:
        self._until(self._answer_by, "upstream_first_byte_timeout")

    def sending(self) -> None:
        """The caller is waited for."""
        self._until(self._end_by, "upstream_total_timeout")

    def given(self) -> None:
        """The upstream has a piece to take."""
        self._until(self._loop.time() + self._timeouts.idle, "upstream_idle_timeout")

    def sent(self) -> None:
        """The upstream has everything."""
        self._until(self._loop.time() + self._timeouts.first_byte, "upstream_first_byte_timeout")

    def _until(self, due: float, code: str) -> None:
        self.code = code if due < self._end_by else "upstream_total_timeout"
        self.clock.reschedule(min(due, self._end_by))


class _Sending(httpx.AsyncByteStream):
    """A streamed body on its way: whom it waits for is told to the deadlines."""

    def __init__(self, stream: httpx.AsyncByteStream, deadlines: _Deadlines) -> None:
        self._pieces = cast("AsyncGenerator[bytes, None]", aiter(stream))
        self._deadlines = deadlines

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._deadlines.sending()
        try:
            piece = await anext(self._pieces)
        except StopAsyncIteration:
            self._deadlines.sent()
            raise
        self._deadlines.given()
        return piece

    async def aclose(self) -> None:
        await self._pieces.aclose()


class _Network(Protocol):
    """httpcore.AsyncNetworkStream, as far as it is used."""

    async def aclose(self) -> None: ...


class _Line:
    """One transport of httpx, with one connection at most."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        self.fresh = True  # whether the last question went over a connection that was made for it
        self._network: _Network | None = None
        self._transport = httpx.AsyncHTTPTransport(
            verify=ssl_context,
            trust_env=False,
            http2=_HTTP2,
            retries=0,
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None),
        )

    async def ask(self, request: httpx.Request, deadlines: _Deadlines) -> httpx.Response:
        """The head of the answer. Where it raises, the line must be closed."""
        self.fresh = connected = False

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal connected
            if event == "connection.connect_tcp.complete":
                self.fresh = True
                self._network = info["return_value"]
            elif not connected and event.startswith("http"):  # http11. or http2., after all of connection.
                connected = True
                deadlines.connected()

        request.extensions["trace"] = trace
        try:
            async with deadlines.clock:
                return await self._transport.handle_async_request(request)
        except TimeoutError as late:
            raise failure_of(deadlines.code) from late
        except ssl.SSLError as refused:  # a certificate that the upstream misses: in TLS 1.3 it says so afterwards
            raise failure_of("upstream_connect_failed") from refused
        except _FOREIGN as failed:
            raise _translated(failed) from failed

    async def close(self) -> None:
        await self._transport.aclose()
        if self._network is not None:  # httpcore forgets it when it is cancelled in a TLS handshake
            await self._network.aclose()


class Body(httpx.AsyncByteStream):
    """The body of one answer; a `gateway.wire.Stream`. It reads on when it is asked to, and holds one piece at most."""

    connected = 0.0  # httpx does not say

    def __init__(
        self, bridge: Bridge, line: _Line, response: httpx.Response, method: str, timeouts: Timeouts, end_by: float
    ) -> None:
        self.received = False
        self._bridge = bridge
        self._line = line
        self._source = cast(httpx.AsyncByteStream, response.stream)
        self._pieces = cast("AsyncGenerator[bytes, None]", aiter(self._source))
        self._idle = timeouts.idle
        self._end_by = end_by
        self._loop = asyncio.get_running_loop()
        self.delimited = _framings(response) > 0 or response.extensions.get("http_version") == b"HTTP/2"
        self._reusable = response.extensions.get("http_version") == b"HTTP/2"
        length = response.headers.get("content-length")
        bodiless = method == "HEAD" or response.status_code in (204, 304)
        self._left = None if length is None or bodiless else int(length)  # bytes, where it is known
        self._ahead: asyncio.Task[bytes | None] | None = None  # what comes next: a piece, or None for the end
        self._ended = False
        self._failure: UpstreamFailed | None = None
        self._leaving: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Body {self._failure or ('received' if self.received else 'arriving')}>"

    @property
    def complete(self) -> bool:
        """Whether it is known that nothing follows the piece that was yielded last."""
        return self.received

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        if self.received:
            raise StopAsyncIteration
        now = self._loop.time()
        silent_at = now + self._idle
        if now >= self._end_by:
            raise await self._fail(failure_of("upstream_total_timeout"))
        if not await self._look(min(silent_at, self._end_by) - now):
            code = "upstream_idle_timeout" if silent_at < self._end_by else "upstream_total_timeout"
            raise await self._fail(failure_of(code))
        if self.received or self._ahead is None:
            raise StopAsyncIteration
        piece = cast(bytes, self._ahead.result())
        self._ahead = None
        if self._left is not None:
            self._left -= len(piece)
            self.received = self._left == 0
        return piece

    async def ends(self, within: float) -> bool:
        """Whether its end comes next, within so many seconds. Raises what has failed."""
        if not self.received:
            await self._look(within)
        return self.received

    def pour(self, into: Pour) -> None:
        """Nothing is: what comes through httpx comes in a task."""

    async def _look(self, within: float) -> bool:
        """Whether it is known within so many seconds what comes next."""
        if self._failure is not None:
            raise self._failure
        if self._ahead is None:
            self._ahead = self._loop.create_task(self._pull())
        ahead = self._ahead
        if not (await asyncio.wait({ahead}, timeout=max(0.0, within)))[0]:
            return False
        if ahead.cancelled():  # by aclose
            raise self._failure or failure_of("upstream_disconnected")
        if (failed := ahead.exception()) is not None:
            raise await self._fail(failed) if isinstance(failed, UpstreamFailed) else failed
        if ahead.result() is None:
            self.received = self._ended = True
        return True

    async def _pull(self) -> bytes | None:
        try:
            async for piece in self._pieces:
                if piece:
                    return piece
        except _FOREIGN as failed:
            raise _translated(failed) from failed
        return None

    async def _fail(self, failure: UpstreamFailed) -> UpstreamFailed:
        self._failure = failure
        await self.aclose()
        return failure

    async def aclose(self) -> None:
        """Keeps the connection if it can serve again, and otherwise closes it at once. Twice is as good as once."""
        if self._leaving is None:
            self._leaving = self._loop.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        whole = self._reusable and self.received
        if whole and not self._ended:
            self._ahead = self._loop.create_task(self._pull())
            await asyncio.wait({self._ahead}, timeout=_END)
        if self._ahead is not None:
            self._ahead.cancel()
            (outcome,) = await asyncio.gather(self._ahead, return_exceptions=True)
            self._ended = outcome is None
        if not self.received and self._failure is None:
            self._failure = failure_of("upstream_disconnected")
        await self._pieces.aclose()
        await self._source.aclose()
        if whole and self._ended and self._line in self._bridge.busy:
            self._bridge.keep(self._line)
        else:
            await self._bridge.end(self._line)


def _valid(response: httpx.Response) -> bool:
    """Whether a head can be relayed: h11 lets some pass that llhttp does not, and nobody looks at values in HTTP/2."""
    fields = response.headers.raw
    return (
        200 <= response.status_code < 600
        and response.extensions.get("http_version") in (b"HTTP/2", b"HTTP/1.1", b"HTTP/1.0")
        and len(fields) <= FIELDS
        and sum(len(name) + len(value) + 4 for name, value in fields) <= HEAD
        and _framings(response) <= 1
        and all(_NAME.fullmatch(name) and not _CONTROLS.search(value) for name, value in fields)
    )


def _framings(response: httpx.Response) -> int:
    """How many fields say where the body ends."""
    return sum(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in response.headers.raw)


def _translated(failed: Exception) -> UpstreamFailed:
    match failed:
        case httpx.ConnectTimeout():
            return failure_of("upstream_connect_timeout")
        case httpx.ConnectError():
            return failure_of("upstream_connect_failed")
        case httpx.NetworkError() | OSError():
            return failure_of("upstream_disconnected")
    cut = str(failed).startswith(_CUT)
    return failure_of("upstream_disconnected" if cut else "upstream_protocol_error")


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that the system trusts; not the wire's own context, because httpx writes into this one."""
    return trusting(None, None, None)

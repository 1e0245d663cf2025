"""HTTP/1.1 to one upstream: the project's own transport under httpx, on llhttp and asyncio's protocols.

One question travels at a time over a connection, and one parser reads one answer: nothing of an exchange, neither a
byte nor a state, is left for the next one. A connection is

    busy     it belongs to one Reply, from the question until that Reply is closed
    idle     its last answer was received whole and both sides keep it open; whatever arrives now ends it
    closed   for ever. An answer that was still owed has failed: a cut body raises, it never ends cleanly

and goes from busy to idle to busy, and from either to closed. `_Connection.end` is the only way to closed.

Bytes wait in the Reply until its reader takes them. Above 32 KiB the socket is not read any more, and TCP tells the
upstream to wait.

Deadlines cost nothing per piece: the moments are noted, and one timer per connection looks at them when it fires. It
is armed again only when something is due earlier than it would fire, which on a warm connection is hardly ever.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import cache, partial
from pathlib import Path
from typing import Final, Literal, Protocol, cast

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from gateway.errors import UpstreamFailed, UpstreamTimeout
from gateway.language import Timeouts

Framing = Literal["length", "chunked", "close", "none"]

HEAD = 64 * 1024  # bytes of a head, and of all that is informational before it; h11 takes 100 KiB
FIELDS = 200  # of a head; Apache's limit is 100
# Twice that much may wait for the reader, and twice that much be in his hands; with what asyncio holds for the caller
# (64 KiB and one piece more) a stream whose caller reads nothing has less than 256 KiB here.
_WAITING = 32 * 1024  # bytes that may wait for the reader before the socket is read no more
_INBOX = 32 * 1024  # bytes of one read
_PIECES = 256  # that may wait: a piece costs some 50 bytes beyond its own, and there are chunks of one byte
IDLE = 30.0  # seconds that an unused connection is kept; that an upstream closes earlier (uvicorn: after 5) is seen
_MARGIN = 1.0  # seconds by which we are earlier than an upstream that told when it closes
AT_ONCE = 1.0  # seconds in which a kept connection dies that had been closed already: a round trip, and some patience

_FAILURES: Final[dict[str, tuple[type[UpstreamFailed], str]]] = {
    "upstream_connect_failed": (UpstreamFailed, "no connection to the upstream could be made"),
    "upstream_connect_timeout": (UpstreamTimeout, "the upstream did not accept a connection in time"),
    "upstream_disconnected": (UpstreamFailed, "the upstream's connection ended before its answer was complete"),
    "upstream_protocol_error": (UpstreamFailed, "the upstream's answer is not valid HTTP/1.1"),
    "upstream_first_byte_timeout": (UpstreamTimeout, "the upstream did not begin to answer in time"),
    "upstream_idle_timeout": (UpstreamTimeout, "the upstream fell silent before its answer was complete"),
    "upstream_total_timeout": (UpstreamTimeout, "the upstream did not complete its answer in time"),
}


_DEFAULT = Timeouts.model_construct()  # of a request that brings none


# Takes a piece at once, or says that it does not.
Pour = Callable[[bytes], bool]


class Stream(Protocol):
    """The body of an answer, piece by piece as it arrives; who iterates gets UpstreamFailed where it does not end."""

    connected: float  # when its connection stood, in time.monotonic(); 0.0 where that was there before, or is not known

    @property
    def received(self) -> bool:
        """Whether all of it is here, though the reader may not have taken all."""

    @property
    def complete(self) -> bool:
        """Whether it is known that nothing follows the piece that was yielded last."""

    @property
    def delimited(self) -> bool:
        """Whether its end can be told from a cut: by a length, by chunks, by HTTP/2."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def ends(self, within: float) -> bool:
        """Whether its end comes next, within so many seconds. Raises what has failed."""

    def pour(self, into: Pour) -> None:
        """Let pieces go there as they come, while the reader waits. He gets what is not taken there, and the last."""

    async def aclose(self) -> None:
        """Gives the connection back, or ends it where the answer has not ended."""


def failure_of(code: str, cause: BaseException | None = None) -> UpstreamFailed:
    kind, message = _FAILURES[code]
    failure = kind(message, code=code)
    failure.__cause__ = cause
    return failure


class Wire(httpx.AsyncBaseTransport):
    """Exchanges with the one upstream at `url`, whose scheme, host and port count; a request brings its own path.

    Its certificate is asked for by `server_name`, or else by the host's name, and is verified for the same.
    There is no limit of connections here: who may ask is the pool's affair. Every exception out of
    `handle_async_request` means that nothing was answered.
    """

    def __init__(self, url: str, *, ssl_context: ssl.SSLContext | None = None, server_name: str | None = None) -> None:
        origin = httpx.URL(url)
        secure = origin.scheme == "https"
        self._origin = f"{origin.scheme}://{origin.netloc.decode()}"
        self._host = origin.raw_host.decode("ascii")
        self._port = origin.port or (443 if secure else 80)
        self._ssl = (ssl_context or _trusted()) if secure else None
        self._server_name = server_name if secure else None
        self.busy: set[_Connection] = set()
        self.idle: dict[_Connection, None] = {}  # in the order of their last use: popitem takes the warmest
        # All connections read into one buffer: what was read is parsed, and so copied, before the next read begins.
        self.inbox = memoryview(bytearray(_INBOX))

    def __repr__(self) -> str:
        return f"<Wire {self._origin} {len(self.busy)} busy, {len(self.idle)} idle>"

    @property
    def in_flight(self) -> int:
        """Answers that are not closed yet."""
        return len(self.busy)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer as soon as its head is here; its `stream` is a Reply. Raises UpstreamFailed, UpstreamTimeout.

        The body is `extensions["body"]`, or else the request's own content or stream. `extensions["timeouts"]` are
        Timeouts; first byte and total count from `extensions["since"]`, in the loop's time, or else from now. The first
        byte of an answer to a stream counts from its end; what the stream itself raises comes out as it is.
        """
        question = _Question(request)
        if asyncio.get_running_loop().time() >= question.answer_by:  # other attempts took all the time
            raise failure_of("upstream_first_byte_timeout")
        answer = await self._ask_again(question)
        if answer is None:
            connection = await self._connect(question)
            connected = time.monotonic()
            answer = await connection.ask(question)
            answer.connected = connected
        return httpx.Response(answer.status, headers=answer.headers, stream=answer)

    async def _ask_again(self, question: _Question) -> Reply | None:
        """The answer over a connection that was used before. None if there is none, or if it had died meanwhile.

        An upstream may close an idle connection in the moment in which we write (RFC 9112 section 9.3.1). It has then
        not answered one byte, and the question goes once more, over a new connection, which cannot have that excuse.
        Such a close is on its way already, and shows at once. An upstream that dies later may have worked on the
        question: whether another one shall do that work again is not for us to say.
        """
        if question.body is None or not self.idle:  # a stream cannot be sent twice
            return None
        connection, _ = self.idle.popitem()
        try:
            return await connection.ask(question)
        except UpstreamFailed as failed:
            late = connection.loop.time() - connection.asked_at > AT_ONCE
            if connection.heard or late or failed.code != "upstream_disconnected":
                raise
            return None

    async def _connect(self, question: _Question) -> _Connection:
        """A new connection; TCP_NODELAY is set by both event loops."""
        loop = asyncio.get_running_loop()
        by = loop.time() + question.timeouts.connect
        try:
            async with asyncio.timeout_at(min(by, question.answer_by)):
                _, connection = await loop.create_connection(
                    partial(_Connection, self),
                    self._host,
                    self._port,
                    ssl=self._ssl,
                    server_hostname=self._server_name,
                )
        except TimeoutError as late:
            code = "upstream_connect_timeout" if by < question.answer_by else "upstream_first_byte_timeout"
            raise failure_of(code) from late
        except OSError as failed:
            raise failure_of("upstream_connect_failed") from failed
        return connection

    async def aclose(self) -> None:
        """Ends every connection, and with it every answer that is still owed. Who asks later gets a new one."""
        for connection in [*self.busy, *self.idle]:
            connection.end()

    def keep(self, connection: _Connection) -> None:
        self.busy.discard(connection)
        self.idle[connection] = None

    def forget(self, connection: _Connection) -> None:
        self.busy.discard(connection)
        self.idle.pop(connection, None)


class _Question:
    """A request as it is written: `head`, and either `body` or a `stream`; and when it is due.

    The stream has `length` bytes, or it is sent in chunks where that is None. It may come slowly: who waits for the
    first byte waits for it from the end of the stream on.
    """

    __slots__ = ("answer_by", "body", "end_by", "head", "length", "method", "stream", "timeouts")

    def __init__(self, request: httpx.Request) -> None:
        self.method = request.method
        self.head = head_of(request)
        self.timeouts, since = timeouts_of(request)
        self.end_by = since + self.timeouts.total
        self.answer_by = min(since + self.timeouts.first_byte, self.end_by)
        self.stream = cast(httpx.AsyncByteStream, request.stream)
        self.length: int | None = 0
        self.body: bytes | None = request.extensions.get("body")
        if self.body is None and isinstance(request.stream, httpx.ByteStream):
            self.body = request.content
        elif self.body is None:
            chunked = request.headers.get("transfer-encoding") == "chunked"
            self.length = None if chunked else int(request.headers["content-length"])
            self.answer_by = self.end_by


def timeouts_of(request: httpx.Request) -> tuple[Timeouts, float]:
    """A request's timeouts, and the loop's time from which they count."""
    since = request.extensions.get("since")
    return request.extensions.get("timeouts", _DEFAULT), asyncio.get_running_loop().time() if since is None else since


def head_of(request: httpx.Request) -> bytes:
    """A request's line and fields as HTTP/1.1 writes them. Raises ValueError where a value would split them."""
    fields = request.headers.raw
    start = b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)
    head = b"\r\n".join([start, *map(b": ".join, fields), b"\r\n"])
    # Whatever splits a line or a head needs a CR or an LF beyond those that we wrote. Three scans in C say it of all.
    lines = len(fields) + 2
    if head.count(b"\r") != lines or head.count(b"\n") != lines or b"\0" in head:
        raise ValueError("a request's head contains CR, LF or NUL")
    return head


class Reply(httpx.AsyncByteStream):
    """The body of one answer, piece by piece as it arrives, and what its parser reports to.

    Iterating raises UpstreamFailed or UpstreamTimeout if the upstream does not finish; an end is a true end. `aclose`
    gives the connection back if the answer was received whole, and otherwise closes it at once.
    """

    connected = 0.0  # of the class: a connection that is used again costs nothing here

    def __init__(self, connection: _Connection, method: str) -> None:
        self.status = 0  # until the head is complete
        self.headers: list[tuple[bytes, bytes]] = []  # in the order, the case and the number in which they came
        self.framed: Framing = "none"
        self.received = False  # the whole of it, though the reader may not have taken all
        self.failure: UpstreamFailed | None = None
        self.reusable_for = 0.0  # seconds that the connection may be kept afterwards
        self.waiting = 0  # bytes in pieces
        self.pieces: list[bytes] = []
        self.barren = 0  # bytes that arrived and gave no body since the last that did
        self.informed = 0  # bytes of informational answers
        self._connection = connection
        self._method = method
        self._fields: list[tuple[bytes, bytes]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._into: Pour | None = None
        self._pouring: Pour | None = None  # the same, while the reader waits for a piece and has none in his hands

    def __repr__(self) -> str:
        end = self.failure or ("received" if self.received else "arriving")
        return f"<Reply {self.status} {self.framed}, {end}, {self.waiting} bytes waiting>"

    @property
    def complete(self) -> bool:
        """Whether nothing follows the piece that was yielded last."""
        return self.received and not self.pieces

    @property
    def delimited(self) -> bool:
        return self.framed != "close"

    @property
    def refuses(self) -> bool:
        """Whether nothing more of the question is wanted: an error is answered, or all of an answer is here."""
        return self.status >= 300 or self.received

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self.pieces:
            if self.received:
                raise StopAsyncIteration
            self._connection.owes()
            self._pouring = self._into
            try:
                await self.news()
            finally:
                self._pouring = None
        piece = self.join()
        self.pieces.clear()
        self.waiting = 0
        self._connection.taken()
        return piece

    async def ends(self, within: float) -> bool:
        """Whether its end comes next, within so many seconds. Raises what has failed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not self.pieces and not self.received:
                    await self.news()
        return self.complete

    def pour(self, into: Pour) -> None:
        self._into = into

    def offer(self) -> None:
        """Pour what has come. It costs no turn of the reader's task: of what an event costs here, a fifth."""
        pieces = self.pieces
        if self.received or self._pouring is None or not pieces:
            return
        if self._pouring(pieces[0] if len(pieces) == 1 else self.join()):
            pieces.clear()
            self.waiting = 0
            self._connection.owes()
        else:
            self.wake()

    def join(self) -> bytes:
        """Makes one piece of those that wait."""
        if len(self.pieces) > 1:
            self.pieces[:] = [b"".join(self.pieces)]
        return self.pieces[0]

    async def aclose(self) -> None:
        self._connection.release(self)

    # — one waits: the reader for a piece, the writer for room, the asker for the head

    async def news(self) -> None:
        """Waits until something has changed. Raises what has failed."""
        if self.failure is not None:
            raise self.failure
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, failure: UpstreamFailed) -> None:
        self.failure = failure
        self.wake()

    def finish(self) -> None:
        self.received = True
        self.wake()

    # — what the parser says. Whatever is raised here stops it, and so ends the connection

    def on_message_begin(self) -> None:
        if self.received:
            raise HttpParserError("bytes beyond the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._connection.parser
        status = parser.get_status_code()
        fields, self._fields = self._fields, []
        if parser.get_http_version() not in ("1.1", "1.0"):
            raise HttpParserError("another protocol")
        if 100 <= status < 200:  # informational (RFC 9110 section 15.2), the answer comes; at 101 the parser stops
            self.informed += self.barren
            self.barren = 0
            if self.informed > HEAD:
                self._connection.pause()  # the deadline ends it as it ends slow ones, and costs nothing until then
            return
        if not 200 <= status < 600:
            raise HttpParserError("a status that no answer has")
        self.headers, self.framed = fields, self._framing(status, fields)
        if self.informed:
            self._connection.resume()
        self.status = status
        self.wake()
        if self._method == "HEAD":
            self.received = True
            raise HttpParserError("the parser cannot know that no body follows")

    def _framing(self, status: int, fields: list[tuple[bytes, bytes]]) -> Framing:
        """How the body ends (RFC 9112 section 6.3). The parser has refused two lengths, and a length beside chunks."""
        doubtful = self.barren > HEAD or self.informed  # a head that came in one read cannot be too large
        if len(fields) > FIELDS or (doubtful and sum(len(n) + len(v) + 4 for n, v in fields) > HEAD):
            raise HttpParserError("too large a head")
        known = {name.lower(): value for name, value in fields}
        if self._connection.parser.should_keep_alive():
            self.reusable_for = _patience(known.get(b"keep-alive"))
        coding = known.get(b"transfer-encoding")
        if coding is not None:
            named = [name.lower() for name, _ in fields].count(b"transfer-encoding")
            if named > 1 or coding.strip().lower() != b"chunked" or self._connection.parser.get_http_version() == "1.0":
                raise HttpParserError("a transfer coding that was not asked for")
        if status in (204, 304) or self._method == "HEAD":
            return "none"
        if coding is not None:
            return "chunked"
        return "length" if b"content-length" in known else "close"

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.waiting += len(piece)
        self.barren = 0
        if self._pouring is None:
            self.wake()

    def on_message_complete(self) -> None:
        if self.status:
            self.finish()


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that the system trusts: read once, it takes 45 ms."""
    return trusting(None, None, None)


def trusting(ca: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    """Verifies an upstream by the CA file, or by the system's; shows it a certificate where one is given.

    All are PEM files; `key` may stand in the certificate's file. Raises OSError, whose kin is ssl.SSLError, with the
    name of the file that cannot be used.
    """
    for file in filter(None, (ca, certificate, key)):
        with Path(file).open("rb"):  # ssl says only that one of them is not there
            pass
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as broken:
        raise ssl.SSLError(f"{ca}: holds no certificates, expected PEM") from broken
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password="")  # an encrypted key is refused, and not asked about
        except ssl.SSLError as broken:
            files = certificate if key is None else f"{certificate} and {key}"
            raise ssl.SSLError(f"{files}: no certificate with its key, expected PEM, not encrypted") from broken
    return context


def _patience(told: bytes | None) -> float:
    """How long a connection is kept whose upstream says `Keep-Alive: timeout=5`, or says nothing."""
    found = re.search(rb"timeout\s*=\s*(\d{1,9})", told, re.IGNORECASE) if told else None
    return min(IDLE, int(found[1]) - _MARGIN) if found else IDLE


class _Connection(asyncio.BufferedProtocol):
    """One socket. `expires` is when it is not worth keeping any more, in the loop's time."""

    parser: HttpResponseParser  # only while busy, because it and its answer hold each other
    _transport: asyncio.Transport

    def __init__(self, wire: Wire) -> None:
        self.loop = asyncio.get_running_loop()
        self.heard = False  # anything of an answer
        self.expires = 0.0
        self._wire = wire
        self._closed = False
        self._answer: Reply | None = None  # only while busy
        self.asked_at = 0.0
        self._answer_by = 0.0
        self._end_by = 0.0
        self._idle = 0.0  # seconds
        self._owed_since: float | None = None  # only while somebody waits for the upstream
        self._sent = True  # the whole question
        self._room: asyncio.Future[None] | None = None  # while the transport has more to write than it likes
        self._untaken = 0  # bytes of a stream that the upstream had not taken, when that was looked at last
        self._paused = False  # by us: too much waits for the reader
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    async def ask(self, question: _Question) -> Reply:
        """Its answer, once the head is here."""
        self.heard = False
        if self._closed or self._transport.is_closing():  # uvloop: reset already, and a turn later we are told
            raise failure_of("upstream_disconnected")
        self._answer = answer = Reply(self, question.method)
        self.parser = HttpResponseParser(answer)
        self._sent = True
        self._owed_since = None
        self._answer_by, self._end_by, self._idle = question.answer_by, question.end_by, question.timeouts.idle
        self.asked_at = self.loop.time()
        self._wire.busy.add(self)
        self._arm(min(self._answer_by, self.asked_at + self._idle))  # before it, nothing is ever due
        try:
            if question.body is not None:
                self._transport.writelines((question.head, question.body))  # uvloop: one writev, nothing copied
            else:
                await self._upload(question, answer)
            while not answer.status:
                await answer.news()
        except BaseException:
            self.end()
            raise
        return answer

    async def _upload(self, question: _Question, answer: Reply) -> None:
        """Sends a stream, until it has ended or is refused: then what is left is not wanted (RFC 9112 section 9.3).

        An answer that begins well is one to a stream that is still read; its head waits until the stream has ended.
        """
        self._sent = False
        self._transport.write(question.head)
        writing = self.loop.create_task(self._write(question, answer))
        writing.add_done_callback(lambda _: answer.wake())
        try:
            while not writing.done() and not answer.refuses:
                await answer.news()
            if not answer.refuses:
                writing.result()
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)  # it lets go of the stream
            self._owed_since = None

    async def _write(self, question: _Question, answer: Reply) -> None:
        """Writes a stream as fast as the upstream reads."""
        left = question.length
        async with aclosing(cast("AsyncGenerator[bytes, None]", aiter(question.stream))) as pieces:
            while left != 0 and (piece := await anext(pieces, None)) is not None:
                if answer.refuses or self._transport.is_closing():
                    return
                if left is None:
                    self._transport.writelines((b"%x\r\n" % len(piece), piece, b"\r\n") if piece else ())
                elif (left := left - len(piece)) >= 0:
                    self._transport.write(piece)
                else:
                    break
                await self._drained()
        if left:
            raise ValueError("a request's stream is not as long as its content-length says")
        if left is None:
            self._transport.write(b"0\r\n\r\n")
        self._sent = True
        self._answer_by = min(self.loop.time() + question.timeouts.first_byte, self._end_by)
        self._arm(self._answer_by)

    async def _drained(self) -> None:
        """Waits until the upstream has taken so much that more may be written."""
        if self._room is not None:
            self._untaken = self._transport.get_write_buffer_size()
            self.owes()
            await self._room
            self._owed_since = None

    def release(self, answer: Reply) -> None:
        """The reader has done with its answer; saying it twice is as good as once."""
        if answer is not self._answer:
            return
        clean = answer.received and self._sent and not self._paused and not self._transport.get_write_buffer_size()
        if clean and answer.reusable_for > 0:
            self._wire.keep(self)
            self._answer = None
            del self.parser
            self.expires = self.loop.time() + answer.reusable_for
            self._arm(self.expires)
        else:
            self.end()

    def end(self, code: str = "upstream_disconnected", cause: BaseException | None = None) -> None:
        """Closes at once, dropping what is unsent, and fails the answer that is owed."""
        if self._closed:
            return
        self._closed = True
        self._wire.forget(self)
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        answer, self._answer = self._answer, None
        if answer is not None:
            del self.parser
            if not answer.received:
                answer.fail(failure_of(code, cause))

    # — what the transport says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._wire.inbox

    def buffer_updated(self, nbytes: int) -> None:
        answer = self._answer
        if answer is None:
            self.end()  # nothing was asked
            return
        if not self.heard:
            self.heard = True
            if self._wire.inbox[0] != ord("H"):  # the parser knows RTSP and ICE too, and skips empty lines
                self.end("upstream_protocol_error")
                return
        answer.barren += nbytes
        try:
            self.parser.feed_data(self._wire.inbox[:nbytes])
        except (HttpParserError, HttpParserUpgrade) as broken:
            self.end("upstream_protocol_error", broken)
            return
        answer.offer()
        if len(answer.pieces) > _PIECES:
            answer.join()
        if answer.barren > HEAD:
            self.end("upstream_protocol_error")
        elif answer.waiting > _WAITING:
            self.pause()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._sent:
            self._read_rest()
        if exc is None and self._answer is not None and self._answer.framed == "close":
            self._answer.finish()
        # In TLS 1.3 an upstream that misses our certificate says so when its handshake is long over for us.
        refused = isinstance(exc, ssl.SSLError) and not self.heard
        self.end("upstream_connect_failed" if refused else "upstream_disconnected", exc)

    def _read_rest(self) -> None:
        """An upstream that refuses a stream answers and closes. We learn of the close where we write, and then what it
        answered may not have been read yet. It waits in the socket still, but where TLS stands before it."""
        answer = self._answer
        if answer is None or self._transport.get_extra_info("sslcontext") is not None:
            return
        self._paused = True  # the transport is not to be told
        with suppress(OSError):
            socket = self._transport.get_extra_info("socket").fileno()
            while not self._closed and answer.waiting <= _WAITING and (read := os.readv(socket, [self._wire.inbox])):
                self.buffer_updated(read)
        self._paused = False

    def pause_writing(self) -> None:
        self._room = self.loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # — what the reader says

    def owes(self) -> None:
        """From now on somebody waits for the upstream."""
        self._owed_since = self.loop.time()

    def taken(self) -> None:
        """The reader has everything and is busy with it."""
        self._owed_since = None
        self.resume()

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    # — deadlines

    def _arm(self, at: float) -> None:
        """Lets the timer fire at `at` or before."""
        if self._timer is not None:
            if self._fires_at <= at:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(at, self._look)
        self._fires_at = at

    def _look(self) -> None:
        self._timer = None
        now = self.loop.time()
        if self._owed_since is not None and self._answer is not None and not self._answer.status:  # a stream waits
            left, self._untaken = self._untaken, self._transport.get_write_buffer_size()
            if self._untaken < left:
                self._owed_since = now
        due, code = self._due(now)
        if now < due:
            self._arm(min(due, now + self._idle))  # the reader may begin to wait at any time
        else:
            self.end(code)

    def _due(self, now: float) -> tuple[float, str]:
        """When it ends, and as what."""
        if self._answer is None:
            return self.expires, ""
        if self._sent and not self._answer.status:
            code = "upstream_first_byte_timeout" if self._answer_by < self._end_by else "upstream_total_timeout"
            return self._answer_by, code
        since = now if self._owed_since is None else self._owed_since
        return min((since + self._idle, "upstream_idle_timeout"), (self._end_by, "upstream_total_timeout"))

"""One backend: what it is sent, what it answers, and how it fares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from random import uniform
from typing import cast

import httpx
import structlog

from gateway.asgi import END, Message, RawHeaders, end_to_end
from gateway.errors import GatewayError, UpstreamFailed
from gateway.health import Health, Outcome, Turn
from gateway.hops import Travelling, carried, travelling
from gateway.language import Api, Cause, PoolPolicy, Timeouts, UpstreamPolicy
from gateway.metrics import Counters
from gateway.normalize import InferenceRequest, renamed
from gateway.sse import LAST_WORDS, UsageFilter, at_boundary, error_event, finished
from gateway.uploads import Upload
from gateway.usage import Tail
from gateway.wire import Pour, Stream, failure_of

_log = structlog.get_logger("gateway.upstreams")

# SDKs stop reading at a stream's last word (`data: [DONE]`): to them that event is the last byte, so it is held back
# with the end that follows it. Backends write that end an instant later; where it does not come so soon (seconds), the
# event goes on its way.
_AFTER_DONE = 1.0
_BEGINNINGS = (b"data:", b"event:")  # of events, with which most pieces begin
_REWRITTEN = 16 * 1024 * 1024  # bytes of an answer that is held to be rewritten; a longer one keeps its backend's name

# What a backend says to whom it knows, of itself, or of limits that are not the caller's: the gateway tells its own.
_KEPT_BACK = frozenset(
    (
        b"alt-svc",
        b"anthropic-organization-id",
        b"location",
        b"openai-organization",
        b"openai-project",
        b"server",
        b"set-cookie",
        b"strict-transport-security",
        b"www-authenticate",
        b"x-powered-by",
    )
)
_KEPT_BACK_TOO = (b"ratelimit", b"x-ratelimit-", b"x-gateway-", b"anthropic-ra")  # compared by twelve bytes

# What a failure is to those who decide whether to ask once more. What timed out has left no time for that.
_CAUSES: dict[str | None, Cause] = {
    "upstream_connect_failed": "connect",
    "upstream_connect_timeout": "connect",
    "upstream_disconnected": "reset",
    "upstream_protocol_error": "reset",
    "upstream_redirected": "connect",  # of what it was meant to do it did nothing
    "upstream_unauthorized": "connect",
}


def cause_of(failure: UpstreamFailed) -> Cause | None:
    return _CAUSES.get(failure.code)


class Upstream:
    """A backend of one pool. It outlives a reload of the policies that leaves its address alone."""

    def __init__(self, policy: PoolPolicy, own: UpstreamPolicy, transport: httpx.AsyncBaseTransport) -> None:
        base = httpx.URL(own.url)
        self.name = base.netloc.decode()
        self.address = base.host, base.port or {"http": 80, "https": 443}[base.scheme]
        self.transport = transport
        self.in_flight = 0
        self.drained = False  # by command; the policy has a word in it, too
        self.health = Health(policy.health, policy.slow_start)
        self._retired = False
        self._base = base
        self._urls: dict[str, httpx.URL] = {}
        self.authorize(policy.api, "")
        self._probes: asyncio.Task[None] | None = None

    def join(
        self, pool: str, policy: PoolPolicy, own: UpstreamPolicy, may_eject: Callable[[], bool], attempts: Counters
    ) -> None:
        """Go by these rules from now on. `may_eject` says whether the pool can spare it; in `attempts` is counted how
        requests go."""
        self._pool = pool
        self._attempts = attempts
        self._policy = own
        self._may_eject = may_eject
        self._health_policy = policy.health
        self._table: Travelling = travelling(policy.forward_headers)
        self.health.adopt(policy.health, policy.slow_start)

    def authorize(self, api: Api, key: str) -> None:
        """Show this credential from the next request on, as backends of this kind want it; empty: none."""
        head = [
            (b"host", self._base.netloc),
            (b"accept-encoding", b"identity"),  # the tail is read; what a backend encodes all the same passes as it is
        ]
        if key:
            by_name = (b"x-api-key", key.encode())
            head.append(by_name if api == "anthropic" else (b"authorization", f"Bearer {key}".encode()))
        self._head: RawHeaders = head

    def __repr__(self) -> str:
        out = ", out" if self.health.out else ""
        return f"<Upstream {self.name}, {self.in_flight} of {self._policy.max_in_flight} in flight{out}>"

    def free(self, now: float) -> bool:
        """Whether a request may go there now."""
        return self.in_flight < self._policy.max_in_flight and not self.drains and self.health.asked(now)

    def weight(self, now: float) -> float:
        return self._policy.weight * self.health.share(now)

    def wait(self, now: float) -> float | None:
        """Seconds until it may be free again, as far as one can know; None: it will not be."""
        return None if self.drains else self.health.wait(now)

    @property
    def drains(self) -> bool:
        """Whether it gets nothing new, by policy or by command."""
        return self.drained or self._policy.drain

    # — an exchange

    async def ask(self, request: InferenceRequest, headers: RawHeaders, way: RawHeaders, since: float) -> Answer:
        """Its answer, to be left with `Answer.leave`. Raises UpstreamFailed, with nothing left to be given back.

        `since` is when the caller's request came here first, in the loop's time: first byte and total count from there.
        """
        self.in_flight += 1
        trial = self.health.begin()
        try:
            response = await self.transport.handle_async_request(
                self._request(request, [*carried(headers, self._table), *way], since)
            )
        except UpstreamFailed as failed:
            self.report("unreachable" if cause_of(failed) == "connect" else "failed", trial=trial)
            await self.leave()
            raise
        except BaseException:
            if trial:
                self.health.abandoned(asyncio.get_running_loop().time())
            await self.leave()
            raise
        answer = Answer(response, self, request)
        refusal = _refusal(answer.status)
        self._consider(answer, failed=refusal is not None or answer.status >= 500, trial=trial)
        if refusal is not None:
            await answer.leave()
            raise refusal
        return answer

    def _request(self, request: InferenceRequest, headers: RawHeaders, since: float) -> httpx.Request:
        """The request as this upstream gets it: built here, from its own host and credential to the framing."""
        extensions = {"timeouts": request.model.timeouts, "since": since}
        stream: httpx.AsyncByteStream = _BODY
        framing = [(b"content-type", request.content_type)] if request.content_type else []
        if request.upload is None:
            extensions["body"] = request.body
            framing.append((b"content-length", b"%d" % len(request.body)))
        else:
            stream, length = _Passing(request.upload), request.upload.length
            chunked = (b"transfer-encoding", b"chunked")
            framing.append(chunked if length is None else (b"content-length", b"%d" % length))
        head = [*self._head, *framing, *headers]
        return httpx.Request(request.method, self._url(request), headers=head, stream=stream, extensions=extensions)

    def _url(self, request: InferenceRequest) -> httpx.URL:
        if request.query or request.endpoint.body == "any":  # whatever callers write is not kept
            target = self._base.path.rstrip("/").encode() + request.path.encode()
            return self._base.copy_with(raw_path=target + b"?" * bool(request.query) + request.query)
        url = self._urls.get(request.path)
        if url is None:
            url = self._urls[request.path] = self._base.copy_with(path=self._base.path.rstrip("/") + request.path)
        return url

    def _consider(self, answer: Answer, *, failed: bool, trial: bool) -> None:
        """What an answer's head tells of the upstream. The caller's fault tells nothing but that it answers."""
        rest = retry_after(answer.headers) if answer.status in (429, 503) else None
        if rest is not None:
            self.health.rest(asyncio.get_running_loop().time(), rest)
            failed = False
        self.report("failed" if failed else "answered", trial=trial)

    def report(self, outcome: Outcome, *, trial: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        self._attempts[(self._pool, self.name, outcome)].add()
        self._tell(self.health.report(now, outcome, self._may_eject, trial=trial), outcome)

    async def leave(self) -> None:
        self.in_flight -= 1
        if self._retired and self.in_flight == 0:
            await self.transport.aclose()

    # — its life

    def watch(self) -> None:
        """Begin to probe it, where its pool says so."""
        if self._health_policy.probe and self._probes is None:
            self._probes = asyncio.ensure_future(self._probe_for_ever())

    async def _probe_for_ever(self) -> None:
        while (path := self._health_policy.probe) is not None:
            await asyncio.sleep(self._health_policy.every * uniform(0.8, 1.2))
            well = await self._probe(path, self._health_policy.probe_timeout)
            turn = self.health.probed(asyncio.get_running_loop().time(), well, self._may_eject)
            self._tell(turn, "probe")
        self._probes = None

    async def _probe(self, path: str, patience: float) -> bool:
        try:
            return 200 <= await self.status(path, patience) < 300
        except UpstreamFailed:
            return False

    async def status(self, path: str, patience: float) -> int:
        """What it answers to a GET with the gateway's own credential. Raises UpstreamFailed."""
        timeouts = Timeouts.model_construct(connect=patience, first_byte=patience, idle=patience, total=patience)
        url = self._base.copy_with(path=path)
        extensions = {"body": b"", "timeouts": timeouts}
        request = httpx.Request("GET", url, headers=self._head, stream=_BODY, extensions=extensions)
        response = await self.transport.handle_async_request(request)
        with suppress(UpstreamFailed):  # a page that is cut was sent by somebody
            async for _ in cast(Stream, response.stream):
                pass
        await cast(Stream, response.stream).aclose()
        return response.status_code

    def _tell(self, turn: Turn | None, reason: str) -> None:
        if turn is not None:
            _log.warning(f"upstream_{turn}", pool=self._pool, upstream=self.name, reason=reason)

    async def retire(self) -> None:
        """Close the connections as soon as nobody uses them."""
        self._retired = True
        if self._probes is not None:
            self._probes.cancel()
        if self.in_flight == 0:
            await self.transport.aclose()


# The wire takes the body from the extensions; httpx wants a stream all the same.
_BODY = httpx.ByteStream(b"")


class _Passing(httpx.AsyncByteStream):
    """A body that is passed on as it comes."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._upload)


def _refusal(status: int) -> UpstreamFailed | None:
    """An answer that is meant for the gateway: it would tell a caller of a credential or an address that is not his."""
    if status in (401, 407):
        return UpstreamFailed("the upstream does not take the gateway's credential", code="upstream_unauthorized")
    if 300 <= status < 400:
        return UpstreamFailed(
            "the upstream sent the request elsewhere, which is not followed", code="upstream_redirected"
        )
    return None


class Answer:
    """An open response: status, headers, and the body as it comes, of which the last piece is `end`."""

    __slots__ = (
        "_ahead",
        "_filter",
        "_last_word",
        "_source",
        "_stream",
        "_whole",
        "answered",
        "attempts",
        "end",
        "endpoint",
        "headers",
        "is_stream",
        "model",
        "status",
        "tail",
        "upstream",
    )

    def __init__(self, response: httpx.Response, upstream: Upstream, request: InferenceRequest) -> None:
        self.status = response.status_code
        self.headers = [
            h for h in end_to_end(response.headers.raw, _KEPT_BACK) if not h[0][:12].lower().startswith(_KEPT_BACK_TOO)
        ]
        self.upstream = upstream
        self.endpoint = request.endpoint
        self.model = request.model  # which answers: the one that was asked, or one that stands in for it
        self.attempts = 1
        self.answered = time.monotonic()
        self.tail = Tail(headed=request.endpoint.headed)
        content_type = _value(self.headers, b"content-type").lower()
        # Of an encoded stream nobody here reads events.
        self.is_stream = content_type.startswith(b"text/event-stream") and not _value(self.headers, b"content-encoding")
        self.end: Message = END
        self._stream = cast(Stream, response.stream)
        self._source = self._pieces()
        self._ahead: list[bytes] = []  # pieces that were read before they were asked for
        self._whole = False
        self._last_word = LAST_WORDS[request.endpoint.events]
        self._filter = UsageFilter() if request.injected and self.is_stream else None
        # A stream may get an event less here, or one more; and a 204 has no length (RFC 9110 section 8.6).
        if self.is_stream or self.status == 204:
            self.headers = [h for h in self.headers if h[0].lower() != b"content-length"]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here already, as a short JSON answer is; then there is no piece but the last."""
        return self._whole or self._stream.received

    @property
    def connected(self) -> float:
        """When its connection was made, in time.monotonic(); 0.0 where it was there before."""
        return self._stream.connected

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, but for the last one: that is sent when the usage is settled."""
        if self._ahead:
            return self._with_those_ahead()
        return self._source if self._filter is None else self._filtered(self._filter)

    async def _with_those_ahead(self) -> AsyncIterator[bytes]:
        ahead, self._ahead = self._ahead, []
        for piece in ahead:
            yield piece
        async for piece in self._source:
            yield piece

    async def gather(self, at_most: int) -> bytes | None:
        """All of the body, which then is its last piece; None where it is longer, and then it is as if nobody asked."""
        size = 0
        async for piece in self._source:
            self._ahead.append(piece)
            size += len(piece)
            if size > at_most:
                return None
        body = b"".join((*self._ahead, self.end["body"]))
        self._ahead, self._whole, self.end = [], True, _last(body)
        return body

    async def rename(self) -> None:
        """Let a JSON answer carry the public name of its model: the one rewriting there is."""
        encoded = _value(self.headers, b"content-encoding")
        json = _value(self.headers, b"content-type").lower().startswith(b"application/json")
        if self.status != 200 or not json or encoded:
            return
        if (body := await self.gather(_REWRITTEN)) is not None:
            self.end = _last(renamed(body, self.model.name))
            self.headers = [h for h in self.headers if h[0].lower() != b"content-length"]
            self.headers.append((b"content-length", b"%d" % len(self.end["body"])))

    def pour(self, into: Pour) -> None:
        """Let pieces go there as they come, as long as they are taken; iterating gives the others, and waits."""
        if self._filter is None:
            tail = self.tail
            word, within = self._last_word
            ends_with = self._ends_with

            def take(piece: bytes) -> bool:
                is_last = word in piece[-within:] or (len(piece) < within and ends_with(piece))
                taken = not is_last and into(piece)
                if taken:
                    tail.add(piece)
                return taken

            self._stream.pour(take)

    async def _pieces(self) -> AsyncGenerator[bytes]:
        stream, tail = self._stream, self.tail
        word, within = self._last_word
        try:
            async for chunk in stream:
                is_last = word in chunk[-within:] or (len(chunk) < within and self._ends_with(chunk))
                tail.add(chunk)
                if stream.complete or (is_last and await self._ends_soon()):
                    self.end = _last(chunk)
                    return
                yield chunk
            if self.is_stream and not stream.delimited and not finished(tail.bytes()):
                raise failure_of("upstream_disconnected")  # a cut looks the same there: RFC 9112 section 8
        except UpstreamFailed as failed:
            if failed.code != "upstream_total_timeout":  # that may be a caller who reads slowly
                self.upstream.report("cut")
            raise

    def _ends_with(self, piece: bytes) -> bool:
        """Whether the last word ends with a short piece, if that is the rest of an event and not a whole one."""
        word, within = self._last_word
        return not piece.startswith(_BEGINNINGS) and word in (self.tail.last(within) + piece)[-within:]

    async def _ends_soon(self) -> bool:
        """Whether the end follows a piece that looks like the last one. If a failure does, that piece goes first."""
        try:
            return await self._stream.ends(_AFTER_DONE)
        except UpstreamFailed:
            return False  # whoever reads on is told

    async def _filtered(self, usage: UsageFilter) -> AsyncIterator[bytes]:
        async for chunk in self._pieces():
            if passed := usage.feed(chunk):
                yield passed
        self.end = _last(usage.feed(self.end["body"]) + usage.flush())

    def failure(self, error: GatewayError, called: str) -> bytes | None:
        """What tells the reader of a stream that it failed midway; None where no event may follow what he has."""
        sent = self.tail.bytes()
        if self._filter is not None and (held := self._filter.flush()):
            sent = sent[: -len(held)]
        word, within = self._last_word
        if not self.is_stream or not at_boundary(sent) or word in sent[-within:]:
            return None
        return error_event(sent, self.endpoint, error, called)

    async def leave(self) -> None:
        """Give the connection back, or end it at once where the answer has not ended."""
        if self._stream.received and self.status < 300:
            self.upstream.health.ended()
        try:
            await self._stream.aclose()
        finally:
            await self.upstream.leave()


def _last(piece: bytes) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": False}


def _value(headers: RawHeaders, name: bytes) -> bytes:
    return next((value for key, value in headers if key.lower() == name), b"")


def retry_after(headers: RawHeaders) -> float | None:
    """Seconds to wait (RFC 9110 section 10.2.3), or None where an answer does not say so."""
    told = _value(headers, b"retry-after").decode("latin-1").strip()
    if told.isdecimal():
        return float(told[:9])
    try:
        return parsedate_to_datetime(told).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None

"""Pools of upstreams: which one is asked, and what it answers.

A request goes to the less busy of two upstreams drawn at random (power of two choices). While nothing was answered,
the next one is asked; after the first byte of an answer nobody else is.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import cast

import httpx

from gateway.asgi import END, Message, RawHeaders, end_to_end
from gateway.errors import GatewayError, UpstreamFailed, UpstreamsBusy
from gateway.normalize import InferenceRequest
from gateway.policy import PoolPolicy, Snapshot, Timeouts, UpstreamPolicy
from gateway.usage import Tail
from gateway.wire import Reply, Wire

_ATTEMPTS = 2

# SDKs stop reading at `data: [DONE]`: to them that event is the last byte, so it is held back with the end that follows
# it. Backends write that end an instant later; where it does not come so soon (seconds), the event goes on its way.
_DONE, _AFTER_DONE = 16, 1.0

# What a caller's head must not carry to a backend: its credentials, what belongs to its own connection, and what the
# gateway writes itself. X-Stainless-* tells of the caller's SDK, and confuses a backend that is called by another.
_OURS = frozenset(
    (
        b"accept-encoding",
        b"authorization",
        b"content-length",
        b"content-type",
        b"cookie",
        b"expect",
        b"host",
        b"x-api-key",
        b"x-request-id",
    )
)


class Upstream:
    """One backend: its address, its transport, and how many requests it is working on."""

    def __init__(self, policy: UpstreamPolicy, transport: httpx.AsyncBaseTransport, key: str | None) -> None:
        base = httpx.URL(policy.url)
        self.name = base.netloc.decode()
        self.transport = transport
        self.in_flight = 0
        self.at_most = policy.max_in_flight
        self._retired = False
        self._base = base
        self._urls: dict[str, httpx.URL] = {}
        self._head: RawHeaders = [
            (b"host", base.netloc),
            (b"content-type", b"application/json"),
            (b"accept-encoding", b"identity"),  # the tail is read; what a backend encodes all the same passes as it is
        ]
        if key:
            self._head.append((b"authorization", f"Bearer {key}".encode()))

    def __repr__(self) -> str:
        return f"<Upstream {self.name}, {self.in_flight} of {self.at_most} in flight>"

    def enter(self) -> None:
        self.in_flight += 1

    async def leave(self) -> None:
        self.in_flight -= 1
        if self._retired and self.in_flight == 0:
            await self.transport.aclose()

    async def retire(self) -> None:
        """Close the connections as soon as nobody uses them."""
        self._retired = True
        if self.in_flight == 0:
            await self.transport.aclose()

    def request(self, path: str, headers: RawHeaders, body: bytes) -> httpx.Request:
        """The request as this upstream gets it: its own host and credential, the caller's other headers, the body."""
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._base.copy_with(path=self._base.path.rstrip("/") + path)
        head = [*self._head, (b"content-length", b"%d" % len(body)), *headers]
        return httpx.Request("POST", url, headers=head, stream=_BODY, extensions={"body": body})


# The wire takes the body from the extensions; httpx wants a stream all the same.
_BODY = httpx.ByteStream(b"")


class Answer:
    """An open response: status, headers, and the body as it comes, of which the last piece is `end`."""

    __slots__ = ("_stream", "answered", "attempts", "end", "headers", "is_stream", "status", "tail", "upstream")

    def __init__(self, response: httpx.Response, upstream: Upstream, attempts: int) -> None:
        self.status = response.status_code
        self.headers = end_to_end(response.headers.raw)
        self.upstream = upstream
        self.attempts = attempts
        self.answered = time.monotonic()
        self.tail = Tail()
        content_type = next((value for name, value in self.headers if name.lower() == b"content-type"), b"")
        self.is_stream = content_type.lower().startswith(b"text/event-stream")
        self.end: Message = END
        self._stream = cast(Reply, response.stream)

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here already, as a short JSON answer is; then there is no piece but the last."""
        return self._stream.received

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, but for the last one: that is sent when the usage is settled."""
        stream, tail = self._stream, self.tail
        async for chunk in stream:
            tail.add(chunk)
            if stream.complete or (b"[DONE]" in chunk[-_DONE:] and await stream.ends(_AFTER_DONE)):
                self.end = {"type": "http.response.body", "body": chunk, "more_body": False}
                return
            yield chunk

    async def aclose(self) -> None:
        """Give the connection back, or end it at once where the answer has not ended."""
        await self._stream.aclose()


class Opening:
    """A request to a pool: entered, it is an answer; left, the answer is closed."""

    __slots__ = ("_answer", "_body", "_headers", "_path", "_upstreams")

    def __init__(self, upstreams: Sequence[Upstream], request: InferenceRequest, headers: RawHeaders) -> None:
        self._upstreams = upstreams
        self._path = request.path
        self._body = request.body
        self._headers = headers

    async def __aenter__(self) -> Answer:
        tried: list[Upstream] = []
        failure: GatewayError | None = None
        while len(tried) < _ATTEMPTS and (upstream := choose(self._upstreams, tried)) is not None:
            tried.append(upstream)
            upstream.enter()
            try:
                response = await upstream.transport.handle_async_request(
                    upstream.request(self._path, self._headers, self._body)
                )
                self._answer = Answer(response, upstream, len(tried))
            except UpstreamFailed as failed:
                await upstream.leave()
                failure = failed
            except BaseException:
                await upstream.leave()
                raise
            else:
                return self._answer
        raise failure or UpstreamsBusy("every upstream of the pool is working on all that it may", retry_after=1)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._answer.aclose()
        await self._answer.upstream.leave()


def choose(upstreams: Sequence[Upstream], tried: Sequence[Upstream]) -> Upstream | None:
    """The less busy of two upstreams drawn at random, for their shares; None where all are full or were tried."""
    free = [u for u in upstreams if u.in_flight < u.at_most and u not in tried]
    if len(free) < 2:
        return free[0] if free else None
    one, other = random.sample(free, 2)
    return one if one.in_flight <= other.in_flight else other


class Pools:
    """All pools of a policy, by name. An upstream that was there before keeps its connections and its count."""

    def __init__(
        self, policies: Mapping[str, PoolPolicy], environment: Mapping[str, str], before: Pools | None = None
    ) -> None:
        held = {} if before is None else before._upstreams
        self._upstreams: dict[tuple[str, UpstreamPolicy, Timeouts], Upstream] = {}
        self._pools: dict[str, tuple[Upstream, ...]] = {}
        for name, policy in policies.items():
            for upstream in policy.upstreams:
                identity = (name, upstream, policy.timeouts)
                key = environment.get(upstream.key_env) if upstream.key_env else None
                self._upstreams[identity] = held.get(identity) or Upstream(
                    upstream, Wire(upstream.url, policy.timeouts), key
                )
            self._pools[name] = tuple(self._upstreams[name, upstream, policy.timeouts] for upstream in policy.upstreams)

    def __repr__(self) -> str:
        return f"<Pools {self._pools}>"

    def open(self, pool: str, request: InferenceRequest, headers: RawHeaders) -> Opening:
        """The answer of a pool to a request, to be entered. Raises UpstreamFailed and its kin."""
        return Opening(self._pools[pool], request, headers)

    async def retire(self, after: Pools | None = None) -> None:
        """Close every upstream that is not in `after`, each when its last answer has ended."""
        kept = set() if after is None else set(after._upstreams.values())
        for upstream in set(self._upstreams.values()) - kept:
            await upstream.retire()


@dataclass(frozen=True, slots=True)
class Policies:
    """A snapshot and the pools that it describes: what a request keeps for its whole life."""

    snapshot: Snapshot
    pools: Pools


class Live:
    """The policies in force, swapped whole."""

    def __init__(self, policies: Policies) -> None:
        self.policies = policies


def forwarded(headers: RawHeaders, called: bytes) -> RawHeaders:
    """What of a caller's headers travels on, with the id by which the request is called."""
    kept = [h for h in end_to_end(headers, _OURS) if not h[0].startswith(b"x-stainless-")]
    kept.append((b"x-request-id", called))
    return kept

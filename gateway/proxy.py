"""The handler: one request, from bearer key to usage record. `_serve` is the first page of the book."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import ParamSpec, TypeVar, cast

from gateway.admission import Admission, Lease
from gateway.asgi import (
    POUR,
    Cut,
    Message,
    RawHeaders,
    Receive,
    Scope,
    Send,
    header,
    read_body,
    refuse,
    shape_of,
    until_hang_up,
)
from gateway.endpoints import Endpoint
from gateway.errors import BadRequest, ClientGone, Dialect, GatewayError, InternalError, ShuttingDown, UpstreamFailed
from gateway.exchange import Exchange
from gateway.hops import Samples, Way
from gateway.keys import KeyRing
from gateway.learned import Learned
from gateway.normalize import InferenceRequest, bounded, normalize, of_form, of_route
from gateway.pools import Live, Opening
from gateway.snapshot import Route, Snapshot
from gateway.sse import COMMENT, error_event
from gateway.standings import DEGRADED, standing_headers
from gateway.terms import terms_for
from gateway.uploads import Upload, read_form
from gateway.upstream import Answer

P = ParamSpec("P")
T = TypeVar("T")

_LARGE = 256 * 1024  # bytes of a body that is looked at beside the event loop


class Proxy:
    """The inference endpoints, and the routes. `observe` is told of every exchange once, when it has ended."""

    def __init__(
        self,
        live: Live,
        keys: KeyRing,
        admission: Admission,
        observe: Callable[[Exchange, Scope], None],
        name: bytes,
        samples: Samples | None = None,
    ) -> None:
        """`name` is what this gateway is called in Via; `samples` says which traces are recorded, None: no one asks."""
        self._live = live
        self._keys = keys
        self._admission = admission
        self._observe = observe
        self._learned = Learned()
        self._name = name
        self._samples = samples
        self._under_way: set[asyncio.Task[None]] = set()
        self._ending = False

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def end_all(self) -> None:
        """End what is under way: the process leaves. Each is settled, and told as far as an error can follow."""
        self._ending = True
        for task in self._under_way:
            task.cancel()

    async def __call__(self, to: Endpoint | Route, scope: Scope, receive: Receive, send: Send) -> None:
        x = Exchange(to if isinstance(to, Endpoint) else to.endpoint, _called(scope["headers"]))
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._under_way.add(task)
        try:
            await self._serve(x, to, scope, receive, send)
        except ClientGone as gone:
            x.end(gone)
        except GatewayError as error:
            await fail(x, error, scope, send)
        except (Exception, asyncio.CancelledError) as defect:
            if self._ending and isinstance(defect, asyncio.CancelledError):
                await fail(x, ShuttingDown("the gateway is shutting down; ask again", retry_after=1), scope, send)
                return
            x.end(defect)
            if not x.started:
                failed = InternalError("the gateway failed; its log has more under the id of this request")
                await say(x, failed, scope, send, close=True)
            raise
        finally:
            self._under_way.discard(task)
            if x.upload is not None:
                x.upload.give_up()
            x.teach(self._learned)
            self._observe(x, scope)

    async def _serve(self, x: Exchange, to: Endpoint | Route, scope: Scope, receive: Receive, send: Send) -> None:
        policies = self._live.policies  # one set of policies for a whole life
        snapshot = policies.snapshot
        x.timed = snapshot.gateway.perf_headers

        x.principal = self._keys.identify(scope["headers"])  # 401
        x.way = Way(scope, self._name, x.called, os.urandom(16), self._samples)  # 505, 508
        x.request = await understood(x, to, scope, receive, snapshot)  # 400, 404, 413, 422
        users, at = self._keys.stored_user, x.received_ms / 1000
        x.terms = terms_for(x.principal, x.request, snapshot, self._learned, users, at)  # 400, 403
        if x.terms.bounded:
            x.request = await beside(x.body or 0, bounded, x.request)

        async with self._admission.admit(x) as x.lease:  # 429, 503: one trip in, one trip out
            x.opening = policies.open(x.request, x.principal.team, scope["headers"], x.way)
            async with until_hang_up(x.after(receive)), commented(x.opening, x, send) as x.answer:  # 502-4
                held = await relay(x, scope, send)  # all but the last piece
        x.started = True
        for message in held:  # after settling
            await send(message)


async def understood(
    x: Exchange, to: Endpoint | Route, scope: Scope, receive: Receive, snapshot: Snapshot
) -> InferenceRequest:
    """What is asked, from a body of the kind that the endpoint has."""
    headers, most = scope["headers"], snapshot.gateway.max_body
    if (header(headers, b"content-encoding") or b"identity").lower() != b"identity":
        raise BadRequest("the body is encoded (Content-Encoding), expected it as it is", code="unsupported_encoding")
    query, asked = scope["query_string"], time.monotonic()
    if x.endpoint.body == "json":
        body = await read_body(scope, receive, most)
        x.waited = time.monotonic() - asked
        x.body = len(body)
        return await beside(x.body, normalize, x.endpoint, body, snapshot, query)
    content_type = header(headers, b"content-type") or b""
    if isinstance(to, Route):
        x.upload = upload = Upload(scope, receive, most)
        path = scope["raw_path"].decode().removeprefix("/inference")
        return of_route(to, path, query, scope["method"], content_type, upload if upload.length != 0 else None)
    form = await read_form(scope, receive, most)
    x.waited = time.monotonic() - asked
    request = of_form(to, form, content_type, query, snapshot)
    x.upload = request.upload
    return request


async def beside(size: int, work: Callable[P, T], *args: P.args, **given: P.kwargs) -> T:
    """Work on a body of so many bytes, beside the event loop if they are many."""
    return await asyncio.to_thread(work, *args, **given) if size > _LARGE else work(*args, **given)


async def relay(x: Exchange, scope: Scope, send: Send) -> list[Message]:
    """Send the answer as it comes, chunk by chunk. Returns what is held back until its usage is settled: the last
    piece, and of an answer that has come whole everything, so that it leaves in one write."""
    answer, lease = x.answer, x.lease
    assert answer is not None
    assert lease is not None
    if x.commented and not (answer.status == 200 and answer.is_stream):
        raise UpstreamFailed(f"the upstream answered {answer.status} when its stream had begun", code="upstream_late")
    if answer.model.restore_name:
        await answer.rename()
    headers = [*answer.headers, *_standings(lease, x.dialect), *_names(x, answer.headers)]
    if x.timed:
        headers.append((b"server-timing", _timing(x)))
    if answer.status >= 500 and answer.attempts > 1:
        headers = [h for h in headers if h[0].lower() != b"x-should-retry"]
        headers.append((b"x-should-retry", b"false"))  # it was tried again here
    start: Message = {"type": "http.response.start", "status": answer.status, "headers": headers}
    if not answer.is_whole and not x.started:
        x.started = True
        await send(start)
    if x.started and (pour := scope.get(POUR)) is not None:
        answer.pour(pour)
    async for chunk in answer:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    return [answer.end] if x.started else [start, answer.end]


class commented:  # noqa: N801 - reads as what it does: async with commented(opening, x, send)
    """An opening; while a stream does not begin, comments are sent if its pool says so.

    Proxies and load balancers cut connections that are silent for a minute, and a long prompt may take longer.
    """

    __slots__ = ("_every", "_opening", "_send", "_x")

    def __init__(self, opening: Opening, x: Exchange, send: Send) -> None:
        self._opening = opening
        self._x = x
        self._send = send
        self._every = opening.pool.policy.comments if x.request is not None and x.request.stream else None

    async def __aenter__(self) -> Answer:
        if self._every is None:
            return await self._opening.__aenter__()
        comments = asyncio.ensure_future(self._comment(self._every))
        try:
            return await self._opening.__aenter__()
        finally:
            comments.cancel()  # it writes nothing more; to wait for it could lose an answer that is open

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opening.__aexit__(kind, error, trace)

    async def _comment(self, every: float) -> None:
        await asyncio.sleep(every)
        x, lease = self._x, self._x.lease
        assert lease is not None
        headers = [(b"content-type", b"text/event-stream"), *_standings(lease, x.dialect), *_names(x)]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        x.started = x.commented = True
        while True:
            await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
            await asyncio.sleep(every)


async def fail(x: Exchange, error: GatewayError, scope: Scope, send: Send) -> None:
    """Answer with an error; where the answer has begun, tell it and cut the line. Raises Cut."""
    x.end(error)
    if x.started:
        await tell(x, error, send)
        raise Cut from error
    await say(x, error, scope, send, close=not x.has_all)


async def tell(x: Exchange, error: GatewayError, send: Send) -> None:
    """Tell the reader of a stream that it has failed, where an event may follow what he has read."""
    event: bytes | None = None
    if x.commented and (x.answer is None or not x.answer.tail.length):  # of what he has read all is ours
        event = error_event(b"", x.endpoint, error, x.called.decode())
    elif x.answer is not None:
        event = x.answer.failure(error, x.called.decode())
    if event is not None:
        await send({"type": "http.response.body", "body": event, "more_body": True})


async def say(x: Exchange, error: GatewayError, scope: Scope, send: Send, *, close: bool) -> None:
    """Answer with an error, in the words that the caller understands."""
    shape = shape_of(scope, x.dialect)
    headers = [*_names(x), (b"server-timing", _timing(x))] if x.timed else _names(x)
    if x.lease is not None:  # of a refusal the error has them
        headers += _standings(x.lease, x.dialect)
    await refuse(send, error, shape=shape, called=x.called.decode(), headers=headers, close=close)


def _timing(x: Exchange) -> bytes:
    """Where the time went until the first byte, in milliseconds (W3C Server Timing). What it took to wait for the store
    and for other requests in front of it is the queue; what follows the head of a stream is not told. Of what was not
    admitted all is the gateway's; where nothing was answered, the upstream has the time until that was clear."""
    now = time.monotonic()
    if x.lease is None:
        return b"gateway;dur=%.3f" % ((now - x.received) * 1000)
    queue = x.lease.since - x.lease.asked
    upstream = (now if x.answer is None else x.answer.answered) - x.lease.since
    gateway = now - x.received - queue - upstream
    if x.answer is not None and x.answer.is_stream:
        return b"upstream;dur=%.3f" % (upstream * 1000)
    return b"gateway;dur=%.3f, queue;dur=%.3f, upstream;dur=%.3f" % (gateway * 1000, queue * 1000, upstream * 1000)


def _standings(lease: Lease, dialect: Dialect) -> RawHeaders:
    """Where the caller stands, and whether the store had a say in it."""
    standings = standing_headers(lease.standings, dialect=dialect)
    return [*standings, DEGRADED] if lease.degraded else standings


# By what their SDKs report a request.
_REQUEST_IDS = {"openai": (b"x-request-id",), "anthropic": (b"x-request-id", b"request-id")}


def _names(x: Exchange, passed: Iterable[tuple[bytes, bytes]] = ()) -> RawHeaders:
    """What the exchange is called: our id always; and as its SDK reports it, where the backend did not say."""
    there = [name.lower() for name, _ in passed]
    named = [(name, x.called) for name in _REQUEST_IDS[x.dialect] if name not in there]
    return [(b"x-gateway-request-id", x.id.encode()), *named]


def _called(headers: RawHeaders) -> bytes | None:
    """The id by which the caller calls its request, where it is one. It counts nothing: ours does."""
    given = header(headers, b"x-request-id")
    return given if given is not None and _ID.fullmatch(given) else None


_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")

"""The handler: one request, from bearer key to usage record. `_serve` is the first page of the book."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from gateway.admission import Admission
from gateway.asgi import Cut, Message, RawHeaders, Receive, Scope, Send, header, read_body, refuse, until_hang_up
from gateway.errors import ClientGone, GatewayError, InternalError
from gateway.exchange import Exchange
from gateway.keys import KeyRing
from gateway.normalize import normalize
from gateway.pools import Live, forwarded
from gateway.standings import standing_headers
from gateway.terms import terms_for


class Proxy:
    """The inference endpoints. `observe` is told of every exchange once, when it has ended."""

    def __init__(
        self, live: Live, keys: KeyRing, admission: Admission, observe: Callable[[Exchange, Scope], None]
    ) -> None:
        self._live = live
        self._keys = keys
        self._admission = admission
        self._observe = observe

    async def __call__(self, endpoint: str, scope: Scope, receive: Receive, send: Send) -> None:
        x = Exchange(endpoint, _called(scope["headers"]))
        try:
            await self._serve(x, scope, receive, send)
        except ClientGone as gone:
            x.end(gone)
        except GatewayError as error:
            x.end(error)
            if x.started:
                raise Cut from error
            await refuse(send, error, headers=_names(x), close=not x.body_read)
        except (Exception, asyncio.CancelledError) as defect:
            x.end(defect)
            if not x.started:
                failed = InternalError("the gateway failed; its log has more under the id of this request")
                await refuse(send, failed, headers=_names(x), close=True)
            raise
        finally:
            self._observe(x, scope)

    async def _serve(self, x: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        policies = self._live.policies  # one set of policies for a whole life
        snapshot = policies.snapshot

        x.principal = self._keys.identify(scope["headers"])  # 401
        body = await read_body(scope, receive, snapshot.gateway.max_body)  # 413
        x.body_read = True
        x.request = normalize(x.endpoint, body, snapshot)  # 400, 404, 422
        x.terms = terms_for(x.principal, x.request, snapshot)  # 400, 403

        async with self._admission.admit(x) as x.lease:  # 429, 503: one trip in, one trip out
            head = forwarded(scope["headers"], x.called)
            async with until_hang_up(receive), policies.pools.open(x.terms.pool, x.request, head) as x.answer:  # 502-4
                held = await relay(x, send)  # all but the last piece
        x.started = True
        for message in held:  # after settling
            await send(message)


async def relay(x: Exchange, send: Send) -> list[Message]:
    """Send the answer as it comes, chunk by chunk. Returns what is held back until its usage is settled: the last
    piece, and of an answer that has come whole everything, so that it leaves in one write."""
    answer, lease = x.answer, x.lease
    assert answer is not None
    assert lease is not None
    headers = [*answer.headers, *standing_headers(lease.standings), *_names(x, answer.headers)]
    start: Message = {"type": "http.response.start", "status": answer.status, "headers": headers}
    if not answer.is_whole:
        x.started = True
        await send(start)
    async for chunk in answer:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    return [answer.end] if x.started else [start, answer.end]


def _names(x: Exchange, passed: RawHeaders | None = None) -> RawHeaders:
    """What the exchange is called: our id always; x-request-id, by which SDKs report, where the backend sent none."""
    own = (b"x-gateway-request-id", x.id.encode())
    if passed is not None and any(name.lower() == b"x-request-id" for name, _ in passed):
        return [own]
    return [own, (b"x-request-id", x.called)]


def _called(headers: RawHeaders) -> bytes | None:
    """The id by which the caller calls its request, where it is one. It counts nothing: ours does."""
    given = header(headers, b"x-request-id")
    return given if given is not None and _ID.fullmatch(given) else None


_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")

"""Warnings that a quota comes to its end: a line in the log, and a POST to a webhook.

The POST is signed as Standard Webhooks says (https://www.standardwebhooks.com): the signature is over its id, its time
and its body, and the id is the same however often it is sent. It is sent again until it is taken, for an hour at most;
what waits is in this worker's memory alone.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import random
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from hashlib import blake2b, sha256

import httpx
import msgspec
import structlog

from gateway.language import WebhookPolicy, signing_key
from gateway.standings import rfc3339
from gateway.terms import Charge

_MOST_PENDING = 100
_PASSING = {"timeout", "no connection", "408", "429"}  # and 5xx: the receiver may take it later

_log = structlog.get_logger("gateway.alerts")


class Message(msgspec.Struct, frozen=True):
    """What one webhook is sent."""

    id: str
    url: str
    secret: bytes
    body: bytes

    def __repr__(self) -> str:
        return f"<Message {self.id} to {self.host}>"

    @property
    def host(self) -> str:
        """Who gets it. The path may hold a secret of the receiver's, and is not told."""
        return self.url.split("/", 3)[2]

    def headers(self, now: int) -> dict[str, str]:
        """Those of one attempt; `now` is its Unix time."""
        signed = b"%b.%d.%b" % (self.id.encode(), now, self.body)
        signature = b64encode(hmac.digest(self.secret, signed, sha256)).decode()
        return {
            "content-type": "application/json",
            "webhook-id": self.id,
            "webhook-timestamp": str(now),
            "webhook-signature": f"v1,{signature}",
        }


class Alerts:
    """The warnings of one worker. `first` and `longest` are the seconds between attempts, which double, `patience` the
    seconds in which they are made, `timeout` those of one attempt."""

    def __init__(
        self, *, first: float = 1.0, longest: float = 300.0, patience: float = 3600.0, timeout: float = 10.0
    ) -> None:
        self._first = first
        self._longest = longest
        self._patience = patience
        self._timeout = timeout
        self._closing = asyncio.Event()
        self._pending: dict[str, asyncio.Task[None]] = {}  # by id, the oldest first
        self._client: httpx.AsyncClient | None = None  # made when the first message is: its trust takes a while to read

    def __repr__(self) -> str:
        return f"<Alerts {len(self._pending)} pending>"

    def warn(
        self,
        charge: Charge,
        organisation: str,
        share: float,
        used: int,
        window: int,
        hook: WebhookPolicy | None,
        secrets: Mapping[str, str] = os.environ,
    ) -> None:
        """Tell that `used` of a limit has reached a share of it, in the window that the store gave the admission. The
        secret of the webhook is among `secrets`."""
        limit = charge.limit
        _log.warning(
            "limit_warning",
            organisation=organisation,
            limit=limit.name,
            scope=charge.scope,
            threshold=_percent(share),
            used=used,
            capacity=limit.capacity,
            unit=limit.unit,
            window=limit.window,
        )
        if hook is None:
            return
        try:
            secret = signing_key(secrets.get(hook.secret, ""))
        except ValueError as lacking:
            _log.error("webhook_without_secret", variable=hook.secret, reason=str(lacking))
            return
        body = _body(charge, organisation, share, used, window)
        self._send(Message(_id(charge, share, window), hook.url, secret, body))

    def _send(self, message: Message) -> None:
        if message.id in self._pending:
            return
        if self._closing.is_set():
            _not_delivered(message.id, "this worker ends")
            return
        if len(self._pending) >= _MOST_PENDING:
            oldest = next(iter(self._pending))
            self._pending.pop(oldest).cancel()
            _not_delivered(oldest, f"more than {_MOST_PENDING} are pending")
        self._pending[message.id] = asyncio.ensure_future(self._deliver(message))

    async def _deliver(self, message: Message) -> None:
        """Send until it is taken, refused for good, or too old."""
        try:
            await self._insist(message)
        finally:
            if self._pending.get(message.id) is asyncio.current_task():
                del self._pending[message.id]

    async def _insist(self, message: Message) -> None:
        ends, pause, attempts = time.monotonic() + self._patience, self._first, 0
        while True:
            last = self._closing.is_set()
            outcome = await self._attempt(message)
            attempts += 1
            if outcome is None:
                return
            again = outcome in _PASSING or outcome.startswith("5")
            if last or not again or time.monotonic() + pause > ends:
                _not_delivered(message.id, outcome, host=message.host, attempts=attempts)
                return
            _log.warning("webhook_failed", id=message.id, reason=outcome, host=message.host, attempts=attempts)
            with suppress(TimeoutError):  # closing ends the pause
                await asyncio.wait_for(self._closing.wait(), pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._longest)

    async def _attempt(self, message: Message) -> str | None:
        """None: it was taken; or why not. The body of the answer is not read."""
        try:
            async with asyncio.timeout(self._timeout), self._post(message) as answer:
                return None if answer.is_success else str(answer.status_code)
        except (httpx.TimeoutException, TimeoutError):
            return "timeout"
        except httpx.TransportError:
            return "no connection"
        except (httpx.InvalidURL, UnicodeError):
            return "no address"

    def _post(self, message: Message) -> AbstractAsyncContextManager[httpx.Response]:
        if self._client is None:
            trust = ssl.create_default_context()
            self._client = httpx.AsyncClient(
                verify=trust, trust_env=False, follow_redirects=False, timeout=self._timeout
            )
        return self._client.stream("POST", message.url, content=message.body, headers=message.headers(int(time.time())))

    async def aclose(self, patience: float = 2.0) -> None:
        """Try once more what is pending, for so many seconds; what was not delivered is in the log."""
        self._closing.set()
        if self._pending:
            await asyncio.wait(list(self._pending.values()), timeout=patience)
        left, self._pending = self._pending, {}
        for id, task in left.items():
            task.cancel()
            _not_delivered(id, "this worker ends")
        await asyncio.gather(*left.values(), return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()


def _not_delivered(id: str, reason: str, **more: object) -> None:
    _log.error("webhook_not_delivered", id=id, reason=reason, **more)


def _id(charge: Charge, share: float, window: int) -> str:
    """The same for the same warning, whoever sends it: a receiver knows by it what it has had."""
    told = msgspec.json.encode((charge.key, charge.limit.capacity, share, window))
    return f"msg_{blake2b(told, digest_size=16).hexdigest()}"


def _body(charge: Charge, organisation: str, share: float, used: int, window: int) -> bytes:
    limit = charge.limit
    length: dict[str, object] = {"length": limit.window, "rolling": limit.kind == "rolling"}
    if limit.kind == "quota":
        length["starts_at"] = rfc3339(window)
    data = {
        "organisation": organisation,
        "limit": limit.name,
        "scope": charge.scope,
        "count": limit.count,
        "unit": limit.unit,
        "threshold": _percent(share),
        "used": used,
        "capacity": limit.capacity,
        "window": length,
    }
    return msgspec.json.encode({"type": "limit.warning", "timestamp": rfc3339(int(time.time())), "data": data})


def _percent(share: float) -> str:
    return f"{share * 100:g}%"

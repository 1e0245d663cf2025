"""A warning is a line in the log and a signed POST, which is sent until it is taken and never shows its secret."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway import alerts
from gateway.alerts import Alerts
from gateway.language import WebhookPolicy
from gateway.terms import Charge
from tests.proving.backend import Backend, Peer, Request, Step, ok
from tests.proving.limits import key_of, quota, until

pytestmark = pytest.mark.anyio

KEY = b"a secret of twenty-four bytes, or more"
SECRET = "whsec_" + b64encode(KEY).decode()
MONTH = quota(50_000_000, "month", name="month", count="total_tokens")
SPEND = quota(500_000_000, "month", name="spend", count="usd")
NOVEMBER = 1_793_491_200  # 2026-11-01, in UTC

Lines = list[MutableMapping[str, Any]]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)


def hook(url: str) -> WebhookPolicy:
    return WebhookPolicy(url=f"{url}/limits/a-path-that-nobody-else-knows", secret_env="HOOK_SECRET")


@asynccontextmanager
async def quick(patience: float = 30.0, timeout: float = 10.0) -> AsyncIterator[tuple[Alerts, Lines]]:
    """Alerts that try again soon, and the lines that they log."""
    told = Alerts(first=0.01, longest=0.05, patience=patience, timeout=timeout)
    with capture_logs() as lines:
        try:
            yield told, lines
        finally:
            await told.aclose(0.0)
            assert SECRET[6:] not in str(lines)
            assert KEY.decode() not in str(lines)
            assert "a-path-that-nobody-else-knows" not in str(lines)


def warn(told: Alerts, url: str | None, *, limit: Any = MONTH, share: float = 0.8, window: int = NOVEMBER) -> None:
    charge = Charge(limit, key_of(limit), "team research", 7)
    told.warn(charge, "acme", share, 40_000_001, window, None if url is None else hook(url))


def of(lines: Lines, event: str) -> Lines:
    return [line for line in lines if line["event"] == event]


async def done(told: Alerts) -> None:
    await until(lambda: repr(told) == "<Alerts 0 pending>")


def answering(*statuses: int) -> Step:
    """Answers every request on every connection, each with the next status, and with the last one again and again."""

    async def answer(peer: Peer) -> None:
        while True:
            await peer.request()
            status = statuses[min(len(peer.backend.requests), len(statuses)) - 1]
            await peer.send(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\nlocation: /elsewhere\r\n\r\n" % status)

    return answer


def verified(request: Request) -> dict[str, Any]:
    """The body of a webhook, as a receiver reads it that follows https://www.standardwebhooks.com by the letter."""
    headers = {name.decode(): value.decode() for name, value in request.headers}
    assert headers["content-type"] == "application/json"
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 60
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{request.body.decode()}"
    key = b64decode(SECRET.removeprefix("whsec_"))
    signature = b64encode(hmac.new(key, content.encode(), hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{signature}"
    body: dict[str, Any] = json.loads(request.body)
    return body


def ids(backend: Backend) -> list[bytes]:
    return [dict(request.headers)[b"webhook-id"] for request in backend.requests]


async def test_a_warning_is_a_line_in_the_log_with_or_without_a_webhook() -> None:
    async with quick() as (told, lines):
        warn(told, None, share=0.29)
    assert lines == [
        {
            "event": "limit_warning",
            "log_level": "warning",
            "organisation": "acme",
            "limit": "month",
            "scope": "team research",
            "threshold": "29%",
            "used": 40_000_001,
            "capacity": 50_000_000,
            "unit": "total tokens",
            "window": "month",
        }
    ]


async def test_the_webhook_tells_what_binds_and_is_signed_as_standard_webhooks_are() -> None:
    async with Backend(answering(204)) as backend, quick() as (told, lines):
        warn(told, backend.url)
        await done(told)
    (request,) = backend.requests
    assert request.line == b"POST /limits/a-path-that-nobody-else-knows HTTP/1.1"
    body = verified(request)
    timestamp = body.pop("timestamp")
    assert abs(time.mktime(time.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ")) - time.mktime(time.gmtime())) < 60
    assert body == {
        "type": "limit.warning",
        "data": {
            "organisation": "acme",
            "limit": "month",
            "scope": "team research",
            "count": "total_tokens",
            "unit": "total tokens",
            "threshold": "80%",
            "used": 40_000_001,
            "capacity": 50_000_000,
            "window": {"length": "month", "rolling": False, "starts_at": "2026-11-01T00:00:00Z"},
        },
    }
    assert [line["event"] for line in lines] == ["limit_warning"]


async def test_of_a_rolling_quota_no_start_is_told() -> None:
    async with Backend(answering(204)) as backend, quick() as (told, _):
        warn(told, backend.url, limit=replace(MONTH, kind="rolling", zone=None, period=2_592_000_000_000), window=17)
        await done(told)
    assert verified(backend.requests[0])["data"]["window"] == {"length": "month", "rolling": True}


@pytest.mark.parametrize("status", [408, 429, 500, 503, 599])
async def test_a_receiver_that_refuses_twice_gets_the_same_message_a_third_time(status: int) -> None:
    async with Backend(answering(status, status, 200)) as backend, quick() as (told, lines):
        warn(told, backend.url)
        await done(told)
    first, *_ = bodies = [verified(request) for request in backend.requests]
    assert bodies == [first] * 3
    assert len(set(ids(backend))) == 1
    assert [(line["reason"], line["attempts"]) for line in of(lines, "webhook_failed")] == [
        (str(status), 1),
        (str(status), 2),
    ]
    assert of(lines, "webhook_not_delivered") == []


async def test_the_time_of_the_signature_is_that_of_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    async with Backend(answering(503, 200)) as backend, quick() as (told, _):
        monkeypatch.setattr(time, "time", lambda: now - 1000 * (1 - len(backend.requests)))
        warn(told, backend.url)
        await done(told)
    monkeypatch.undo()
    times = [int(dict(request.headers)[b"webhook-timestamp"]) for request in backend.requests]
    assert times == [int(now - 1000), int(now)]
    assert backend.requests[0].body == backend.requests[1].body
    verified(backend.requests[1])


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 410])
async def test_a_receiver_that_refuses_for_good_is_not_asked_again_nor_followed_elsewhere(status: int) -> None:
    async with Backend(answering(status, 200)) as backend, quick() as (told, lines):
        warn(told, backend.url)
        await done(told)
        assert len(backend.requests) == 1
    (line,) = of(lines, "webhook_not_delivered")
    assert (line["reason"], line["host"], line["attempts"]) == (str(status), f"127.0.0.1:{backend.port}", 1)
    assert line["id"].encode() == ids(backend)[0]


async def test_lost_connections_are_tried_again_until_the_receiver_is_back() -> None:
    cut = Backend(Peer.request, Peer.reset)
    async with quick() as (told, lines):
        async with cut:
            warn(told, cut.url)
            await until(lambda: len(cut.requests) >= 2)
        lost = len(of(lines, "webhook_failed"))
        await until(lambda: len(of(lines, "webhook_failed")) > lost + 2)  # nobody listens
        async with Backend(answering(200), port=cut.port) as back:
            await done(told)
            verified(back.requests[0])
            assert set(ids(back)) == set(ids(cut))
    assert {line["reason"] for line in of(lines, "webhook_failed")} == {"no connection"}


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\nx-endless: "])
async def test_a_receiver_that_does_not_answer_costs_one_timeout_and_is_tried_again(beginning: bytes) -> None:
    async def drip(peer: Peer) -> None:
        if len(peer.backend.requests) > 1:
            await peer.send(ok(b""))
            return
        await peer.send(beginning)
        while beginning:
            await peer.send(b"x")
            await asyncio.sleep(0.05)

    async with Backend(Peer.request, drip) as backend, quick(timeout=1.0) as (told, lines):
        warn(told, backend.url)
        await done(told)
        assert len(backend.requests) == 2
    assert [line["reason"] for line in of(lines, "webhook_failed")] == ["timeout"]


async def test_an_answer_without_end_is_not_read() -> None:
    async def flood(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
        while True:
            await peer.send(b"x" * 65536)

    async with Backend(Peer.request, flood) as backend, quick() as (told, lines):
        warn(told, backend.url)
        await done(told)
        async with asyncio.timeout(20):
            await backend.peers[0].gone.wait()
        assert backend.peers[0].sent < 32 * 1024**2
    assert [line["event"] for line in lines] == ["limit_warning"]


async def test_after_its_patience_a_message_is_given_up() -> None:
    async with Backend(answering(503)) as backend, quick(patience=1.0) as (told, lines):
        warn(told, backend.url)
        await done(told)
        assert len(backend.requests) > 2
    (line,) = of(lines, "webhook_not_delivered")
    assert (line["reason"], line["attempts"]) == ("503", len(backend.requests))


async def test_the_pauses_double_up_to_the_longest_with_jitter_and_all_of_it_takes_an_hour_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock of the test's, and without a receiver."""
    pauses: list[float] = []
    clock = 1000.0

    async def passes(waiting: Any, pause: float) -> None:
        nonlocal clock
        waiting.close()
        pauses.append(pause)
        clock += pause
        raise TimeoutError

    monkeypatch.setattr("gateway.alerts.asyncio.wait_for", passes)
    monkeypatch.setattr("gateway.alerts.time.monotonic", lambda: clock)
    told = Alerts()
    with capture_logs() as lines:
        warn(told, "http://nobody.example.com")
        monkeypatch.setattr(told, "_attempt", _refused)
        (task,) = told._pending.values()
        await task
        await told.aclose()
    assert of(lines, "webhook_not_delivered")[0]["reason"] == "503"
    bases = [min(300.0, 2.0**number) for number in range(len(pauses))]
    assert all(base / 2 <= pause <= base for pause, base in zip(pauses, bases, strict=True))
    assert len({pause / base for pause, base in zip(pauses, bases, strict=True)}) > 5
    assert 3000 < sum(pauses) <= 3600


async def _refused(message: object) -> str:
    return "503"


async def test_an_address_that_is_none_is_given_up_at_once() -> None:
    async with quick() as (told, lines):
        warn(told, "http://xn--")
        await done(told)
    (line,) = of(lines, "webhook_not_delivered")
    assert (line["reason"], line["attempts"]) == ("no address", 1)


@pytest.mark.parametrize("value", ["", "whsec_", "whsec_***", SECRET.replace("whsec", "whpk"), SECRET[6:]])
async def test_without_a_secret_nothing_is_sent_and_the_log_says_which_variable_lacks_it(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", value)
    async with Backend(answering(200)) as backend, quick() as (told, lines):
        warn(told, backend.url)
        await done(told)
        assert backend.requests == []
    assert [line["event"] for line in lines] == ["limit_warning", "webhook_without_secret"]
    assert lines[1]["variable"] == "HOOK_SECRET"


async def test_the_same_warning_has_the_same_id_whoever_sends_it_and_another_one_has_another() -> None:
    async with Backend(answering(200)) as backend:
        for _ in range(2):
            async with quick() as (told, _):
                warn(told, backend.url)
                await done(told)
        async with quick() as (told, _):
            warn(told, backend.url, share=0.95)
            await done(told)
            warn(told, backend.url, window=NOVEMBER + 30 * 86_400)
            await done(told)
            warn(told, backend.url, limit=SPEND)
            await done(told)
    first, second, *others = ids(backend)
    assert first == second
    assert len({first, *others}) == 4


async def test_a_warning_that_is_pending_is_not_sent_beside_itself() -> None:
    async with Backend(answering(503)) as backend, quick() as (told, _):
        warn(told, backend.url)
        (task,) = told._pending.values()
        warn(told, backend.url)
        assert list(told._pending.values()) == [task]


async def test_at_most_a_hundred_are_pending_and_the_oldest_goes_with_a_line() -> None:
    async with Backend(Peer.request) as backend, quick() as (told, lines):
        warn(told, backend.url, window=0)
        (oldest,) = told._pending.values()
        for number in range(1, 103):
            warn(told, backend.url, window=number)
        await until(oldest.cancelled)
        assert repr(told) == "<Alerts 100 pending>"
        first, *_ = dropped = of(lines, "webhook_not_delivered")
        assert [line["reason"] for line in dropped] == ["more than 100 are pending"] * 3
        assert first["id"] == alerts._id(Charge(MONTH, key_of(MONTH), "", 1), 0.8, 0)


async def test_at_the_end_what_waits_is_tried_once_more() -> None:
    told = Alerts(first=1000.0)
    with capture_logs() as lines:
        async with Backend(answering(503, 503, 200)) as backend:
            warn(told, backend.url, window=1)
            warn(told, backend.url, window=2)
            await until(lambda: len(of(lines, "webhook_failed")) == 2)
            await told.aclose(20.0)
            assert len(backend.requests) == 4
        assert of(lines, "webhook_not_delivered") == []


async def test_at_the_end_a_last_attempt_that_fails_is_told() -> None:
    told = Alerts(first=1000.0)
    with capture_logs() as lines:
        async with Backend(answering(503)) as backend:
            warn(told, backend.url)
            await until(lambda: len(of(lines, "webhook_failed")) == 1)
            await told.aclose(20.0)
            assert len(backend.requests) == 2
            warn(told, backend.url, window=7)
            assert repr(told) == "<Alerts 0 pending>"
    assert [line["reason"] for line in of(lines, "webhook_not_delivered")] == ["503", "this worker ends"]


async def test_at_the_end_a_receiver_that_does_not_answer_is_left() -> None:
    told = Alerts()
    with capture_logs() as lines:
        async with Backend(Peer.request) as backend:
            warn(told, backend.url)
            await until(lambda: backend.requests)
            begun = time.monotonic()
            await told.aclose(0.3)
            assert 0.3 <= time.monotonic() - begun < 5
            assert told._client is not None
            assert told._client.is_closed
            async with asyncio.timeout(20):
                await backend.peers[0].gone.wait()
    assert [line["reason"] for line in of(lines, "webhook_not_delivered")] == ["this worker ends"]


async def test_a_message_does_not_show_its_secret() -> None:
    message = alerts.Message("msg_1", "https://hooks.example.com/path", KEY, b"{}")
    assert repr(message) == "<Message msg_1 to hooks.example.com>"


async def test_the_secret_of_a_webhook_may_be_a_files() -> None:
    """Which policies read: it is among their secrets by its path, and nothing of the environment counts."""
    async with Backend(answering(204)) as backend, quick() as (told, lines):
        charge = Charge(MONTH, key_of(MONTH), "team research", 7)
        hook = WebhookPolicy(url=f"{backend.url}/limits", secret_file="/run/secrets/hook")
        for secrets in ({"/run/secrets/hook": SECRET}, {"HOOK_SECRET": SECRET}):
            told.warn(charge, "acme", 0.8, 1, NOVEMBER, hook, secrets)
            await done(told)
        assert verified(backend.requests[0])
    assert len(backend.requests) == 1
    assert [line["variable"] for line in of(lines, "webhook_without_secret")] == ["/run/secrets/hook"]

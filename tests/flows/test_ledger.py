"""What callers are billed: each request once, for what its backend did, at the price of the moment; or not served."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from gateway import housekeeping, spool
from gateway.embedded import _server_binary
from gateway.reload import reload
from tests.flows.test_ten_sentences import ANSWER, BODY, STREAM, plan, rows
from tests.proving.backend import EVENTS, Backend, Peer, Step, chunk, forever, ok, reported, token, whole
from tests.proving.house import MODEL, House, Server, documents, gateway, server
from tests.proving.limits import until
from tests.proving.ports import free_ports
from tests.test_settlements import mend, spoil

SOON = 5.0
COUNTED = {"name": "counted", "count": "requests", "quota": "1000/month", "per": ["team"]}
TOKENS = {"name": "tokens", "count": "total_tokens", "quota": "100000/month", "per": ["team"]}
NONE = {"requests": 0, "input_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0}


async def asks(house: House, key: str, body: bytes = BODY) -> int:
    async with house.client(key) as client:
        return (await client.post("/v1/completions", content=body)).status_code


def pool(*urls: str, **more: Any) -> dict[str, Any]:
    return {"demo": {"upstreams": [{"url": url} for url in urls], **more}}


async def used(house: House, key: str) -> dict[str, tuple[int, int]]:
    """What is used and reserved of each limit."""
    async with house.client(key) as client:
        said = (await client.get("/v1/limits")).json()["data"]
    return {row["name"]: (row["used"], row["reserved"]) for row in said}


def members(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


# — who leaves


SO_FAR = {
    "what the backend reported last": (
        [reported(3, 1, choices=b'[{"index":0,"text":"a"}]'), reported(3, 2, choices=b'[{"index":0,"text":"b"}]')],
        (3, 2, "upstream", "upstream"),
    ),
    "its events": ([token(), token(), token()], (None, 3, "counted", "counted")),
}


@pytest.mark.parametrize("so_far", SO_FAR)
async def test_who_leaves_in_the_middle_is_billed_by(store_url: str, so_far: str) -> None:
    """And his backend stops at once."""
    events, (input_, output, *sources) = SO_FAR[so_far]
    policy = {"plans": plan(COUNTED, TOKENS)}
    async with Backend(Peer.request, EVENTS, *map(chunk, events)) as backend:
        async with gateway(store_url, documents([backend.url], **policy)) as house:
            key = await house.key()
            async with house.caller(key, STREAM) as caller:
                await caller.reader.readuntil(events[-1][-20:])
            await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
            await house.settled()
            (row,) = rows(store_url)
            assert members(row, "status", "ended", "requests", "attempt") == ("settled", "client", 1, 1)
            assert members(row, "output_tokens", "input_source", "output_source") == (output, *sources)
            assert input_ in (None, row["input_tokens"])
            assert row["cost_microusd"] == row["input_tokens"] + 2 * output
            total = row["input_tokens"] + output
            assert await used(house, key) == {"counted": (1, 0), "tokens": (total, 0)}


def refusing(status: bytes) -> Step:
    return forever(
        Peer.request, b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}" % status
    )


NO_ANSWER: dict[str, tuple[Step | None, int]] = {
    "refused connection": (None, 502),
    "503": (refusing(b"503 Busy"), 503),
    "429": (refusing(b"429 Slow Down"), 429),
    "reset": (forever(Peer.request, Peer.reset), 502),
}


@pytest.mark.parametrize("fault", NO_ANSWER)
async def test_nothing_is_charged_where_nothing_was_answered(store_url: str, fault: str) -> None:
    step, status = NO_ANSWER[fault]
    async with Backend(*([] if step is None else [step])) as backend:
        url = f"http://127.0.0.1:{free_ports(1)[0]}" if step is None else backend.url
        policy = documents([], pools=pool(url, retries={"attempts": 1}), plans=plan(COUNTED, TOKENS))
        async with gateway(store_url, policy) as house:
            key = await house.key()
            assert await asks(house, key) == status
            await house.settled()
            (row,) = rows(store_url)
            assert {name: row[name] for name in NONE} == NONE
            assert members(row, "status", "cost_microusd", "input_source", "output_source") == (
                *("settled", 0),
                *("none", "none"),
            )
            assert row["http_status"] == status
            assert await used(house, key) == {"counted": (0, 0), "tokens": (0, 0)}


async def test_a_retry_is_charged_for_the_attempt_that_answered(store_url: str) -> None:
    asked: list[bytes] = []

    async def busy_at_first(peer: Peer) -> None:
        await peer.request()
        asked.append(peer.requests[-1].body)
        await peer.send(b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}" if len(asked) == 1 else ok(ANSWER))

    async with Backend(busy_at_first) as one, Backend(busy_at_first) as other:
        pools = pool(one.url, other.url, retries={"attempts": 3, "on": [503]})
        async with gateway(store_url, documents([], pools=pools, plans=plan(COUNTED, TOKENS))) as house:
            key = await house.key()
            assert await asks(house, key) == 200
            await house.settled()
            assert await used(house, key) == {"counted": (1, 0), "tokens": (4, 0)}
    assert len(asked) == 2
    (row,) = rows(store_url)
    assert members(row, "attempt", "requests", "http_status", "input_tokens", "output_tokens") == (2, 1, 200, 3, 1)


# — prices


async def test_cached_input_and_reasoning_have_prices_of_their_own(store_url: str) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 40},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }
    answer = json.dumps({"choices": [{"index": 0, "text": "blue"}], "usage": usage}).encode()
    price = {"input": 1.0, "cached_input": 0.1, "output": 2.0, "reasoning": 3.0}
    models = {MODEL: {"pool": "demo", "price": price}}
    async with Backend(whole(answer)) as backend, gateway(store_url, documents([backend.url], models=models)) as house:
        assert await asks(house, await house.key()) == 200
        await house.settled()
    (row,) = rows(store_url)
    names = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_microusd")
    assert members(row, *names) == (100, 40, 50, 20, 60 + 4 + 60 + 60)
    assert row["price"] == {name: round(dollars * 1_000_000) for name, dollars in price.items()}


async def test_a_request_is_billed_at_the_price_of_its_day_and_no_later_change_rewrites_it(store_url: str) -> None:
    today = datetime.now(UTC).date()
    days = {-400: 7.0, -2: 1.0, 2: 100.0}
    dated = [{"from": today + timedelta(days=day), "input": at, "output": at} for day, at in days.items()]
    models = {MODEL: {"pool": "demo", "price": dated}}
    async with Backend(forever(whole(ANSWER))) as backend:
        async with gateway(store_url, documents([backend.url], models=models)) as house:
            key = await house.key()
            assert await asks(house, key) == 200
            await house.settled()
            before = rows(store_url)
            dearer = [*dated[:2], {"from": today - timedelta(days=1), "input": 5.0, "output": 5.0}]
            house.documents(documents([backend.url], models={MODEL: {"pool": "demo", "price": dearer}}))
            assert await reload(house.gateway.live, house.settings.policies)
            assert await asks(house, key) == 200
            await house.settled()
    first, second = rows(store_url)
    assert [first] == before
    assert [row["cost_microusd"] for row in (first, second)] == [4, 20]
    assert [row["price"]["input"] for row in (first, second)] == [1_000_000, 5_000_000]


# — users


@pytest.mark.parametrize("users", ["hashed", "plain"])
async def test_a_user_is_stored_as_policy_says(store_url: str, users: str) -> None:
    body = json.dumps({**json.loads(BODY), "user": "alice@example.com"}).encode()
    per_user = {"name": "each", "count": "requests", "quota": "10/day", "per": ["user"]}
    async with Backend(forever(whole(ANSWER))) as backend:
        policy = documents([backend.url], plans=plan(per_user), gateway={"schema": "strict", "users": users})
        async with gateway(store_url, policy) as house:
            key = await house.key()
            assert [await asks(house, key, body), await asks(house, key)] == [200, 200]
            await house.settled()
    named, nobody = rows(store_url)
    assert nobody["user"] is None
    if users == "plain":
        assert named["user"] == "alice@example.com"
    else:
        assert named["user"].startswith("u_")
        assert len(named["user"]) == 22
    with redis.Redis.from_url(store_url) as client:
        found: Any = client.keys("*")
        stands = b"".join([*found, *(client.dump(name) or b"" for name in found)])
    assert (b"alice" in stands) == (users == "plain")


# — a spool that takes nothing


CLOSED_SPOOL = ("unwritable", "full")


@pytest.fixture
def dying() -> Iterator[Server]:
    """A store that a test kills."""
    with server(_server_binary()) as one:
        yield one


@asynccontextmanager
async def two_teams(url: str) -> AsyncIterator[tuple[Backend, House, str, str]]:
    """A billed team and one that is open without the store: the backend, the house, and a key of each."""
    plans = {
        "paying": {"limits": [COUNTED]},
        "free": {"limits": [{**COUNTED, "when_store_fails": "open"}, {**TOKENS, "when_store_fails": "open"}]},
    }
    teams = {
        "research": {"organisation": "acme", "plan": "paying"},
        "support": {"organisation": "acme", "plan": "free"},
    }
    async with Backend(forever(whole(ANSWER))) as backend:
        policy = documents([backend.url], plans=plans, teams=teams)
        async with gateway(url, policy, store_deadline=0.3, spool_most=1 << 20) as house:
            yield backend, house, await house.key(), await house.key("support")


def shut(house: House, how: str) -> None:
    spool = house.gateway.admission.settlements._spool
    if how == "unwritable":
        spoil(house.settings.spools)
    while how == "full" and not spool.full:
        spool.note(bytes(60_000))


async def ready(house: House) -> tuple[int, str]:
    async with house.client() as client:
        answer = await client.get("/healthz/ready")
    return answer.status_code, " ".join(answer.json()["reasons"])


@pytest.mark.parametrize("how", CLOSED_SPOOL)
async def test_without_a_store_and_a_spool_a_billed_team_is_refused_before_the_backend_is_asked(
    dying: Server, how: str
) -> None:
    """And one that is open is served, with a word in the log."""
    async with two_teams(dying.url) as (backend, house, billed, free):
        assert await asks(house, billed) == 200
        dying.process.kill()
        await until(lambda: house.gateway.store.away)
        assert await asks(house, billed) == 200  # it can be written down
        # It, its end, and the end of the one before, which the store may have forgotten.
        await until(lambda: len(house.gateway.admission.settlements._spool) == 3)
        for number in list(house.gateway.admission.settlements._spool._where):
            house.gateway.admission.settlements._spool.done(number)  # so that the folder is free
        shut(house, how)
        before = len(backend.requests)
        began = time.monotonic()
        assert [await asks(house, billed) for _ in range(3)] == [503] * 3
        assert len(backend.requests) == before
        with capture_logs() as lines:
            assert [await asks(house, free) for _ in range(2)] == [200] * 2
        assert time.monotonic() - began < SOON
        assert [line["event"] for line in lines].count("not_noted") == 2
        assert len(backend.requests) == before + 2
        status, reasons = await ready(house)
        assert status == 503
        assert "the spool" in reasons or how == "full"


@pytest.mark.parametrize("how", CLOSED_SPOOL)
async def test_while_the_store_answers_nobody_needs_a_spool(
    store_url: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_OFTEN", 0.0)  # else it is tried once a second, and who tries looks once a second
    monkeypatch.setattr(housekeeping, "_EVERY", 0.05)
    async with two_teams(store_url) as (_, house, billed, free):
        shut(house, how)
        async with asyncio.timeout(SOON):
            while await house.gateway.admission.settlements._spool.probe() != (how == "full"):
                await asyncio.sleep(0.05)
        assert [await asks(house, key) for key in (billed, free)] == [200, 200]
        status, reasons = await ready(house)
        assert (status, "the spool cannot be written" in reasons) == (
            (503, True) if how == "unwritable" else (200, False)
        )
        if how == "unwritable":
            mend(house.settings.spools)
            await until(lambda: not house.gateway.admission.settlements._spool.failure)
            assert await ready(house) == (200, "")
        await house.settled()
    assert [row["requests"] for row in rows(store_url)] == [1, 1]

"""The ledger: its rows and its sums say the same, after requests through a whole gateway."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
import redis

from gateway.errors import StoreUnavailable
from gateway.ledger import COUNTERS, DIMENSIONS, Dimension, Sum, fold, rows, sums
from gateway.store import Store
from gateway.usage import UsageRecord
from tests.proving.house import MODEL, House, documents, echo, gateway

DEAR = "accounts/fireworks/models/dear"
POLICIES: dict[str, Any] = {
    "models": {
        MODEL: {"pool": "demo", "price": {"input": 1.0, "output": 2.0}},
        DEAR: {"pool": "demo", "price": {"input": 100.0, "cached_input": 10.0, "output": 200.0}},
    },
    "teams": {
        "research": {"organisation": "acme", "plan": "free"},
        "support": {"organisation": "acme", "plan": "free"},
        "guests": {"organisation": "other", "plan": "free"},
    },
}


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    store = Store(store_url, deadline=5)
    yield store
    await store.aclose()


async def ask(house: House, key: str, script: str = "tokens=4", *, status: int = 200, **members: Any) -> None:
    body = {"model": MODEL, "prompt": "The sky is", **members}
    async with house.client(key) as client:
        answer = await client.post("/v1/completions", json=body, headers={"x-echo": script})
    assert answer.status_code == status


async def every_row(store: Store, organisation: str) -> list[UsageRecord]:
    return [record async for _, record in rows(store, organisation)]


async def folded(store: Store) -> dict[tuple[str, ...], dict[str, int]]:
    """The sums as rows have them."""
    return {s.group: s.counters for s in await sums(store, DIMENSIONS)}


def told(found: Sequence[Sum], counter: str) -> dict[str, int]:
    return {"/".join(s.group): s.counters[counter] for s in found}


async def test_rows_and_sums_say_the_same_whatever_happened_to_requests(store_url: str) -> None:
    async with echo() as backend, gateway(store_url, documents([backend], **POLICIES)) as house:
        ann, bob = await house.key(user="ann"), await house.key("support")
        guest = await house.key("guests", user='quo"te|:d')
        await ask(house, ann)
        await ask(house, ann, "tokens=7; cached=2", model=DEAR, stream=True)
        await ask(house, bob, user="bo", stream=True)
        await ask(house, bob, "status=503", status=503)
        await ask(house, bob, "status=400", status=400)
        await ask(house, bob, "usage=none; tokens=5", stream=True)
        await ask(house, bob, status=404, model="no such model")
        await ask(house, guest)
        await house.settled()
        store = house.gateway.store
        records = [*await every_row(store, "acme"), *await every_row(store, "other")]
        assert [(r.status, r.source) for r in records] == [
            (200, "upstream"),
            (200, "upstream"),
            (200, "upstream"),
            (503, "none"),
            (400, "upstream"),
            (200, "counted"),
            (200, "upstream"),
        ]
        assert {group: total for group, total in fold(records).items() if any(total.values())} == {
            group: total for group, total in (await folded(store)).items() if any(total.values())
        }
        assert [r.input_tokens for r in records[:3]] == [3, 3, 3]
        assert [r.output_tokens for r in records[:3]] == [4, 7, 4]
        assert [r.cost_microusd for r in records[:3]] == [11, 1 * 100 + 2 * 10 + 7 * 200, 11]


async def test_sums_are_grouped_by_what_is_asked_the_most_expensive_first(store_url: str) -> None:
    async with echo() as backend, gateway(store_url, documents([backend], **POLICIES)) as house:
        ann, bob, guest = await house.key(user="ann"), await house.key("support"), await house.key("guests")
        for key, model in ((ann, MODEL), (ann, MODEL), (bob, DEAR), (guest, MODEL)):
            await ask(house, key, model=model)
        await house.settled()
        store = house.gateway.store
        assert list(told(await sums(store, ["team"]), "requests").items()) == [
            ("support", 1),
            ("research", 2),
            ("guests", 1),
        ]
        assert told(await sums(store, ["organisation"]), "output_tokens") == {"acme": 12, "other": 4}
        assert told(await sums(store, ["organisation", "model"]), "requests") == {
            f"acme/{DEAR}": 1,
            f"acme/{MODEL}": 2,
            f"other/{MODEL}": 1,
        }
        assert told(await sums(store, ["user"]), "requests") == {"ann": 2, "": 2}
        assert told(await sums(store, []), "requests") == {"": 4}
        (most, *_) = await sums(store, ["model", "team"])
        assert most.public(["model", "team"]) == {
            "model": DEAR,
            "team": "support",
            "requests": 1,
            "input_tokens": 3,
            "cached_tokens": 0,
            "output_tokens": 4,
            "cost_microusd": 1100,
        }


def hour(client: redis.Redis, organisation: str, number: int, **counters: int) -> None:
    """An hour's sums of one group."""
    mapping: dict[Any, Any] = {f'["red","k","","m"]:{name}': value for name, value in counters.items()}
    client.hset(f"{{{organisation}}}:usage:{number}", mapping=mapping)


@pytest.mark.parametrize(
    ("since", "expected"),
    [(0.0, 111), (7200.0, 110), (7200.0 + 3599, 110), (10800.0, 100), (14400.0, 0)],
)
async def test_sums_begin_with_the_hour_that_is_asked_for(
    store_url: str, store: Store, since: float, expected: int
) -> None:
    with redis.Redis.from_url(store_url) as client:
        for number, requests in ((1, 1), (2, 10), (3, 100)):
            hour(client, "acme", number, requests=requests)
    assert sum(s.counters["requests"] for s in await sums(store, ["team"], since)) == expected


async def test_a_thousand_hours_are_each_counted_once(store_url: str, store: Store) -> None:
    with redis.Redis.from_url(store_url) as client:
        for number in range(1000):
            hour(client, "acme" if number % 2 else "other", number, requests=1, cost_microusd=number)
    assert told(await sums(store, ["organisation"]), "requests") == {"acme": 500, "other": 500}
    assert told(await sums(store, []), "cost_microusd") == {"": 999 * 500}


async def test_an_empty_ledger_has_no_sums_and_no_rows(store: Store) -> None:
    assert await sums(store, ["team"]) == []
    assert await every_row(store, "acme") == []


def record(number: int, **members: Any) -> UsageRecord:
    usual: dict[str, Any] = {
        "id": f"r{number}",
        "organisation": "acme",
        "team": "red",
        "key": "k",
        "user": None,
        "model": "m",
        "pool": "demo",
        "upstream": None,
        "endpoint": "completions",
        "status": 200,
        "ended": "complete",
        "stream": False,
        "source": "upstream",
        "received_ms": 0,
        "first_byte_ms": None,
        "duration_ms": 0,
        "attempts": 1,
        "bytes_out": 0,
        **dict.fromkeys(COUNTERS[1:], number),
    }
    return UsageRecord(**{**usual, **members})


def test_a_fold_adds_up_by_organisation_team_key_user_and_model() -> None:
    records = [record(1), record(2), record(3, user="ann"), record(4, source="none"), record(5, organisation="other")]
    assert fold(records) == {
        ("acme", "red", "k", "", "m"): {"requests": 2, **dict.fromkeys(COUNTERS[1:], 1 + 2 + 4)},
        ("acme", "red", "k", "ann", "m"): {"requests": 1, **dict.fromkeys(COUNTERS[1:], 3)},
        ("other", "red", "k", "", "m"): {"requests": 1, **dict.fromkeys(COUNTERS[1:], 5)},
    }


async def test_rows_are_read_page_by_page_oldest_first_with_their_times(store_url: str, store: Store) -> None:
    """2,500 rows are three pages; of those with the same millisecond none is lost at a seam."""
    with redis.Redis.from_url(store_url) as client, client.pipeline() as many:
        for number in range(2500):
            row = msgspec.json.encode(record(number))
            many.xadd("{acme}:usage", {"row": row}, id=f"{1000 + number // 700}-{number % 700 + 1}")
        many.execute()
    found = [(at, r.id) async for at, r in rows(store, "acme")]
    assert found == [(1000 + number // 700, f"r{number}") for number in range(2500)]


@pytest.mark.parametrize("by", DIMENSIONS)
async def test_without_a_store_the_ledger_is_unavailable(by: Dimension) -> None:
    store = Store("unix:///nowhere/at/all", deadline=0.5)
    with pytest.raises(StoreUnavailable):
        await sums(store, [by], time.time())
    with pytest.raises(StoreUnavailable):
        await every_row(store, "acme")
    await store.aclose()

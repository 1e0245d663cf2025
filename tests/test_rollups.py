"""Rollups: what has ended is added up once, and nobody can tell but by the clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from gateway.buckets import KEPT_HOURS, bucket, cover, hours
from gateway.erase import erase
from gateway.records import DIMENSIONS, Dimension, Grain, UsageRecord, ledger_stream, sums_key
from gateway.rollups import Rollups, Run, running_hour
from gateway.store import Store, StoreError
from gateway.sums import Query, Sum, _runs, report, roll_up
from tests.proving.rows import record
from tests.test_ledger import HOUR, settle

ANN = "u_a0a0a0a0a0a0a0a0a0a0"
NOW = 497_844  # an hour of October 2026


@pytest.fixture
async def store(either_store_url: str) -> AsyncIterator[Store]:
    store = Store(either_store_url, deadline=5)
    yield store
    await store.aclose()


def kept(client: Any) -> list[str]:
    """The rollups that stand in the store, by what they are of."""
    head = f"{ledger_stream('acme')}:rollup:"
    return sorted(key.decode().removeprefix(head) for key in client.keys(f"{head}*"))


async def of(store: Store, *by: Any) -> list[Sum]:
    return await report(store, Query(by))


async def used(url: str, store: Store, per_month: int = 30) -> list[tuple[int, UsageRecord]]:
    """Rows of the three months before the one that is running, and of that one."""
    now = await running_hour(store)
    running = bucket("month", now)
    rows = []
    for month in range(running - 3, running + 1):
        begin = hours("month", month).start
        rows += [
            (begin * HOUR, record(number, user=[ANN, None][number % 2], team=f"t{number % 3}", key=f"k{number}"))
            for number in range(per_month)
        ]
    settle(url, *rows)
    return rows


def forget_sums(client: Any, grain: Grain, number: int) -> None:
    """Take the sums away, so that only who has a rollup knows them."""
    assert client.delete(sums_key("acme", grain, number)) == 1


async def test_months_that_have_ended_are_read_once(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    running = bucket("month", await running_hour(store))
    first = await of(store, "team")
    with redis.Redis.from_url(either_store_url) as client:
        for month in range(running - 3, running):
            forget_sums(client, "month", month)
    assert await of(store, "team") == first
    assert await of(store, "model") != first, "it has a rollup of its own"


async def test_what_is_running_is_always_read(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    (before,) = await of(store)
    now = await running_hour(store)
    settle(either_store_url, (now * HOUR, record(1, team="new")))
    (after,) = await of(store)
    assert after.counters["requests"] == before.counters["requests"] + 1
    assert [one.group[0] for one in await of(store, "team") if one.counters["requests"] == 1] == ["new"]


def rollups_of(needed: Sequence[Dimension], now: int = NOW) -> Rollups:
    return Rollups(Store("redis://127.0.0.1:1", deadline=1), "acme", needed, now)


async def test_what_ended_less_than_an_hour_ago_may_still_grow() -> None:
    """The store's clock may go back by then: another server, whose clock is behind, takes its place."""
    end = hours("month", bucket("month", NOW)).stop
    for now, lasts in ((end - 1, False), (end, False), (end + 1, True)):
        assert rollups_of([], now).lasting("month", bucket("month", NOW)) is lasts
    midnight = NOW // 24 * 24
    for now, lasts in ((midnight - 1, False), (midnight, False), (midnight + 1, True)):
        assert rollups_of([], now).lasting("day", midnight // 24 - 1) is lasts


async def test_hours_have_no_rollup_and_neither_has_who_asks_for_users() -> None:
    assert not rollups_of([]).lasting("hour", NOW - 100)
    assert not rollups_of(["team", "user"]).lasting("month", bucket("month", NOW) - 2)
    assert rollups_of(["team", "key"]).lasting("month", bucket("month", NOW) - 2)


async def test_a_rollup_holds_no_user(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    for by in DIMENSIONS:
        await of(store, by)
        await report(store, Query((by,), where={"team": frozenset({"t1"})}))
    with redis.Redis.from_url(either_store_url) as client:
        texts = [client.get(key) for key in client.keys("*:rollup:*")]
    assert len(texts) > 20
    assert not [text for text in texts if ANN.encode() in text]


async def test_users_are_reported_and_looked_for_beside_rollups(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    await of(store)
    assert {one.group: one.counters["requests"] for one in await of(store, "user")} == {(ANN,): 60, ("",): 60}
    (found,) = await report(store, Query(where={"user": frozenset({ANN})}))
    assert found.counters["requests"] == 60


async def test_months_side_by_side_have_one_rollup_made_of_theirs(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    running = bucket("month", await running_hour(store))
    since = hours("month", running - 3).start * 3600
    (whole,) = await report(store, Query((), since))
    with redis.Redis.from_url(either_store_url) as client:
        months = [f"month:{month}-{month}::" for month in range(running - 3, running)]
        assert kept(client) == sorted([*months, f"month:{running - 3}-{running - 1}::"])
        for month in months:
            client.delete(f"{ledger_stream('acme')}:rollup:{month}")
        for number in range(running - 3, running):
            forget_sums(client, "month", number)
    assert await report(store, Query((), since)) == [whole]


@given(st.integers(1, KEPT_HOURS - 1), st.integers(0, KEPT_HOURS), st.booleans())
def test_runs_are_the_parts_of_the_cover_and_what_is_added_comes_first(before: int, long: int, users: bool) -> None:
    first = NOW - before
    parts = cover(first, min(NOW + 1, first + long), NOW)
    runs = _runs(parts, rollups_of(["user"] if users else []))
    assert sorted((sign, run.grain, number) for sign, run in runs for number in range(run.first, run.last + 1)) == (
        sorted(parts)
    )
    assert [sign for sign, _ in runs] == sorted((sign for sign, _ in runs), reverse=True)
    assert all(run.first == run.last or rollups_of([]).lasting(run.grain, run.last) for _, run in runs)
    assert not users or all(run.first == run.last for _, run in runs)


async def test_what_was_rolled_up_while_a_user_was_erased_is_made_anew(either_store_url: str, store: Store) -> None:
    """Between two steps of an erasure a reader may see an amount under both names, or under none."""
    await used(either_store_url, store)
    now = await running_hour(store)
    early, late = Run("month", *[bucket("month", now) - 3] * 2), Run("month", *[bucket("month", now) - 2] * 2)
    reader = Rollups(store, "acme", [], now)
    await reader.read(early)
    assert (await erase(store, "acme", ANN)).sums > 0
    with redis.Redis.from_url(either_store_url) as client:
        before = kept(client)
        await reader.read(late)  # which may have begun before
        (beside,) = set(kept(client)) - set(before)
        client.delete(sums_key("acme", "month", late.first))
        assert await Rollups(store, "acme", [], now).read(late) == {}, "nobody finds what that reader has left"
    assert beside.startswith("month:")


async def test_an_erasure_that_changes_no_sums_leaves_rollups_as_they_are(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    await of(store)
    with redis.Redis.from_url(either_store_url) as client:
        before = kept(client)
        await erase(store, "acme", "u_nobody")
        await of(store)
        assert kept(client) == before


async def test_the_sums_of_a_day_are_rolled_up_where_that_is_much_shorter(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    day = now // 24 - 2
    rows = [((day * 24) * HOUR, record(number, key=f"k{number}", team=f"t{number % 2}")) for number in range(12)]
    settle(either_store_url, *rows)
    span = (day * 86400, (day + 1) * 86400)
    for by in ("team", "key"):
        assert len(await report(store, Query((by,), *span))) == len({getattr(row, by) for _, row in rows})
    with redis.Redis.from_url(either_store_url) as client:
        assert kept(client) == [f"day:{day}-{day}:team:"]


async def test_a_rollup_lapses(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    await of(store)
    with redis.Redis.from_url(either_store_url) as client:
        assert {client.ttl(key) // 86400 for key in client.keys("*:rollup:*")} <= {31, 32}
        assert kept(client) != []


async def test_a_store_that_is_full_still_tells_what_was_used(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    with redis.Redis.from_url(either_store_url) as client:
        client.config_set("maxmemory", 1)
        try:
            first = await of(store, "team")
            assert await of(store, "team") == first
            assert kept(client) == []
            assert not store.away
        finally:
            client.config_set("maxmemory", 0)
        assert await of(store, "team") == first
        assert kept(client) != []


async def test_what_is_no_rollup_is_told_with_its_key(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    await of(store)
    with redis.Redis.from_url(either_store_url) as client:
        keys = client.keys("*:rollup:*")
        for key in keys:
            client.set(key, b"\xc1")
    with pytest.raises(StoreError, match=r"\{acme\}:usage:rollup:month:.* holds no rollup: .* may be deleted"):
        await of(store)


async def test_a_year_by_team_is_at_hand_before_anybody_asks(either_store_url: str, store: Store) -> None:
    await used(either_store_url, store)
    running = bucket("month", await running_hour(store))
    since = hours("month", running - 11).start * 3600
    first = await report(store, Query(("model", "team"), since))
    with redis.Redis.from_url(either_store_url) as client:
        for key in client.keys("*:rollup:*"):
            client.delete(key)
        await roll_up(store)
        for month in range(running - 3, running):
            forget_sums(client, "month", month)
    assert await report(store, Query(("model", "team"), since)) == first
    assert sum(one.counters["requests"] for one in await report(store, Query(("team",), since))) == 120


async def test_a_month_of_which_nothing_is_there_leaves_no_rollup(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    settle(either_store_url, (now * HOUR, record()))
    assert len(await of(store)) == 1
    with redis.Redis.from_url(either_store_url) as client:
        assert kept(client) == []


def test_a_rollup_reads_as_sums_do() -> None:
    """What is left out of a group stays empty, so that both are read by the same lines."""
    place = rollups_of(["key", "pool"])._reduced(("acme", "t", "k", ANN, "m", "p"))
    assert msgspec.json.encode(place) == b'["","k","","","p"]'

"""The ledger: its rows are read whatever happens, and a difference to its sums is found, but none is made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
import pytest
import redis

from gateway.buckets import bucket, hours
from gateway.embedded import _server_binary
from gateway.errors import StoreUnavailable
from gateway.ledger import Difference, Entry, fold, follow, organisations, reconcile, rows
from gateway.records import COUNTERS, GRAINS, ORGANISATIONS, UsageRecord, group_of, ledger_stream, sums_key
from gateway.rollups import running_hour
from gateway.store import Store, leaving
from tests.proving import stores
from tests.proving.chaos import Chaos
from tests.proving.rows import record

HOUR = 3_600_000
SETTLE = """
local id = redis.call('XADD', KEYS[1], ARGV[1], 'row', ARGV[2])
local more = cmsgpack.unpack(ARGV[4])
for i = 2, #KEYS do
  local text = redis.call('HGET', KEYS[i], ARGV[3])
  local sums = text and cmsgpack.unpack(text) or {0, 0, 0, 0, 0, 0}
  for place, by in ipairs(more) do sums[place] = sums[place] + by end
  redis.call('HSET', KEYS[i], ARGV[3], cmsgpack.pack(sums))
end
return id
"""


def settlement(row: UsageRecord, at: int, entry: str) -> tuple[Any, ...]:
    """The words of a script that writes a row and its sums at once, as settling does."""
    places = [sums_key(row.organisation, grain, bucket(grain, at // HOUR)) for grain in GRAINS]
    counters = msgspec.msgpack.encode([getattr(row, counter) for counter in COUNTERS])
    keys = [ledger_stream(row.organisation), *places]
    return SETTLE, len(keys), *keys, entry, msgspec.json.encode(row), group_of(row), counters


def settle(url: str, *written: tuple[int, UsageRecord]) -> None:
    """Write rows with their sums, each at a time in ms, in this order."""
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as many:
        for number, (at, row) in enumerate(written):
            many.sadd(ORGANISATIONS, row.organisation)
            many.eval(*settlement(row, at, f"{at}-{number + 1}"))
        many.execute()


@pytest.fixture
async def store(either_store_url: str) -> AsyncIterator[Store]:
    store = Store(either_store_url, deadline=5)
    yield store
    await store.aclose()


async def every_row(store: Store, organisation: str = "acme", *bounds: int) -> list[Entry]:
    return [entry async for entry in rows(store, organisation, *bounds)]


async def now_ms(store: Store) -> int:
    """The beginning of the hour that is running."""
    return await running_hour(store) * HOUR


# — rows


async def test_rows_are_read_page_by_page_oldest_first_with_their_times(either_store_url: str, store: Store) -> None:
    """2,500 rows are three pages; of those with the same millisecond none is lost at a seam."""
    with redis.Redis.from_url(either_store_url) as client, client.pipeline() as many:
        for number in range(2500):
            row = msgspec.json.encode(record(number))
            many.xadd("{acme}:usage", {"row": row}, id=f"{1000 + number // 700}-{number % 700 + 1}")
        many.execute()
    found = [(entry.written_ms, entry.record) for entry in await every_row(store)]
    assert found == [(1000 + number // 700, record(number)) for number in range(2500)]


@pytest.mark.parametrize(
    ("bounds", "expected"), [((), [1, 2, 3]), ((20,), [2, 3]), ((0, 30), [1, 2]), ((20, 30), [2]), ((11, 12), [])]
)
async def test_rows_of_a_span_are_those_that_were_written_in_it(
    either_store_url: str, store: Store, bounds: tuple[int, ...], expected: list[int]
) -> None:
    settle(either_store_url, *((at * 10, record(at)) for at in (1, 2, 3)))
    assert [entry.record for entry in await every_row(store, "acme", *bounds)] == [record(at) for at in expected]


async def test_a_row_that_was_erased_has_the_time_of_the_first_one(either_store_url: str, store: Store) -> None:
    with redis.Redis.from_url(either_store_url) as client:
        client.xadd("{acme}:usage", {"row": msgspec.json.encode(record(1)), "at": 500}, id="9000-1")
    assert await every_row(store) == [Entry("9000-1", 500, record(1), erased=True)]
    assert await every_row(store, "acme", 500, 501) == await every_row(store)
    assert await every_row(store, "acme", 501) == []


@pytest.mark.parametrize(
    "fields", [{"row": b"{"}, {"row": b"\xff"}, {"row": b"{}"}, {"x": b"y"}, {"row": b"[]", "at": b"x"}]
)
async def test_what_is_no_row_is_counted_and_the_others_are_read(
    either_store_url: str, store: Store, fields: dict[Any, Any]
) -> None:
    now = await now_ms(store)
    settle(either_store_url, (now, record(1)))
    with redis.Redis.from_url(either_store_url) as client:
        client.xadd("{acme}:usage", fields, id=f"{now + 1}-0")
        if "at" in fields:
            client.xadd("{acme}:usage", {"row": msgspec.json.encode(record(1)), "at": b"soon"}, id=f"{now + 1}-1")
    assert [entry.record for entry in await every_row(store)] == [record(1)]
    found = await reconcile(store, "acme")
    assert (found.rows, found.unreadable, found.differences) == (1, 1 + ("at" in fields), [])


async def test_organisations_are_told_by_name(either_store_url: str, store: Store) -> None:
    assert await organisations(store) == []
    settle(either_store_url, *((1, record(organisation=name)) for name in ("zoo", "acme")))
    assert await organisations(store) == ["acme", "zoo"]


async def test_without_a_store_the_ledger_is_unavailable() -> None:
    away = Store("unix:///nowhere/at/all", deadline=0.5)
    for question in (every_row(away), organisations(away), reconcile(away, "acme")):
        with pytest.raises(StoreUnavailable):
            await question
    await away.aclose()


# — as they come


async def following(store: Store, those: Sequence[str], heard: asyncio.Queue[Entry]) -> None:
    async with aclosing(follow(store, those)) as tail:
        async for entry in tail:
            await heard.put(entry)


async def heard_until(heard: asyncio.Queue[Entry], client: redis.Redis, first: int) -> list[str]:
    """Write rows of both organisations until one of each has come: the first may be from before anybody listened."""
    ids: list[str] = []
    number = first
    async with asyncio.timeout(20):
        while len({name.partition(" ")[0] for name in ids}) < 2:
            for organisation in ("acme", "zoo"):
                row = record(number, organisation=organisation)
                client.eval(*settlement(row, 1, "*"))
            number += 1
            await asyncio.sleep(0.02)
            while not heard.empty():
                row = heard.get_nowait().record
                ids.append(f"{row.organisation} {row.id}")
    return ids


async def test_rows_are_followed_as_they_come_from_now_on(either_store_url: str, store: Store) -> None:
    settle(either_store_url, (1, record(0, id="old")), (1, record(0, id="old", organisation="zoo")))
    heard: asyncio.Queue[Entry] = asyncio.Queue()
    task = asyncio.ensure_future(following(store, ["acme", "zoo"], heard))
    with redis.Redis.from_url(either_store_url) as client:
        ids = await heard_until(heard, client, 1)
        client.xadd("{acme}:usage", {"row": msgspec.json.encode(record(0, id="erased")), "at": "1"})
        client.xadd("{acme}:usage", {"row": b"no row"})
        ids += await heard_until(heard, client, 100)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert not any("old" in name or "erased" in name for name in ids)
    for organisation in ("acme", "zoo"):
        told = [int(name.rpartition("-")[2]) for name in ids if name.startswith(organisation)]
        assert told == sorted(set(told))
        assert told[0] < 100 <= told[-1]


async def test_a_tail_goes_on_when_the_store_has_come_back_and_misses_nothing(store_url: str) -> None:
    heard: asyncio.Queue[Entry] = asyncio.Queue()
    async with Chaos(store_url) as chaos:
        store = Store(chaos.url, deadline=5)
        task = asyncio.ensure_future(following(store, ["acme", "zoo"], heard))
        with redis.Redis.from_url(store_url) as client:
            before = await heard_until(heard, client, 1)
            await chaos.refuse()
            chaos.hang_up()
            async with asyncio.timeout(10):
                while not store.away:
                    await asyncio.sleep(0.005)
            for number in range(1000, 1010):
                client.eval(*settlement(record(number), 1, "*"))
            await chaos.accept()
            after = await heard_until(heard, client, 2000)
        task.cancel()
        await asyncio.wait((task,))
        await store.aclose()
    assert before
    assert [f"acme request-{number}" for number in range(1000, 1010)] == [
        name for name in after if name.startswith("acme request-10")
    ]


async def test_nothing_is_left_behind_by_a_tail_that_is_left(store: Store) -> None:
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(following(store, ["acme"], asyncio.Queue()))
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) <= len(before) + 1:  # it has begun to wait
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait((task,))
    async with asyncio.timeout(10):  # the store looks once at how it is set up, which is nobody's to cancel
        while asyncio.all_tasks() > before:
            await asyncio.sleep(0.005)


async def test_a_cluster_is_followed_in_every_slot_and_compared() -> None:
    names = [f"org{number}" for number in range(7)]  # more than wait at once
    with stores.cluster(_server_binary()) as cluster:
        store = Store(cluster.url, deadline=5)
        heard: asyncio.Queue[Entry] = asyncio.Queue()
        task = asyncio.ensure_future(following(store, names, heard))
        missing, number = set(names), 0
        async with asyncio.timeout(30):
            while missing:
                now = await now_ms(store)
                for name in names:
                    row = record(number, organisation=name)
                    await store.call(partial(store.client.eval, *settlement(row, now, "*")))
                number += 1
                await asyncio.sleep(0.1)
                while not heard.empty():
                    missing.discard(heard.get_nowait().record.organisation)
        task.cancel()
        await asyncio.wait((task,))
        assert [(await reconcile(store, name)).differences for name in names] == [[]] * 7
        await store.aclose()


# — whether the sums are theirs


def test_a_fold_adds_up_by_hour_day_and_month_and_group() -> None:
    one, two, other = record(1), record(2), record(3, user=None)
    at = 1_795_348_800_000  # 2026-11-22T12:00:00Z
    entries = [Entry(f"{at + ms}-0", at + ms, row) for ms, row in ((0, one), (1, other), (HOUR, two))]
    hour, month = at // HOUR, 56 * 12 + 10
    ones, twos, others = ([getattr(row, counter) for counter in COUNTERS] for row in (one, two, other))
    both = [a + b for a, b in zip(ones, twos, strict=True)]
    assert fold(entries) == {
        ("hour", hour): {group_of(one): ones, group_of(other): others},
        ("hour", hour + 1): {group_of(two): twos},
        ("day", hour // 24): {group_of(one): both, group_of(other): others},
        ("month", month): {group_of(one): both, group_of(other): others},
    }


EDGES = (
    ("2026-03-01T00:00:00.000", 1_772_323_200_000),
    ("2025-12-31T23:59:59.999", 1_767_225_599_999),
    ("2026-01-01T00:00:00.000", 1_767_225_600_000),
    ("2026-03-29T00:59:59.999", 1_774_745_999_999),  # and then the clock is set in Zurich
    ("2026-03-29T01:00:00.000", 1_774_746_000_000),
)


@pytest.mark.parametrize(("text", "at"), EDGES)
def test_a_row_at_an_edge_is_in_one_hour_one_day_and_one_month(text: str, at: int) -> None:
    year, month, day, hour = int(text[:4]), int(text[5:7]), int(text[8:10]), int(text[11:13])
    found = fold([Entry(f"{at}-0", at, record())])
    assert [grain for grain, _ in found] == ["hour", "day", "month"]
    numbers: dict[str, int] = dict(found.keys())
    assert numbers["month"] == (year - 1970) * 12 + month - 1
    assert numbers["day"] - hours("month", numbers["month"]).start // 24 + 1 == day
    assert numbers["hour"] - numbers["day"] * 24 == hour


async def spread(url: str, store: Store, count: int = 40) -> int:
    """Rows of four days up to the running hour, two of three hours with some; the running hour's beginning."""
    now = await now_ms(store)
    settle(
        url,
        *(
            (now - (96 - hour) * HOUR + part * 60_000, record(hour + part, user=f"u{hour % 3}", team=f"t{part}"))
            for hour in range(97)
            if hour % 3
            for part in range(count // 20)
        ),
    )
    return now


async def test_sums_that_are_those_of_the_rows_have_no_difference(either_store_url: str, store: Store) -> None:
    now = await spread(either_store_url, store)
    found = await reconcile(store, "acme")
    first = hours("month", bucket("month", now // HOUR - 95)).start
    assert (found.rows, found.differences, found.unreadable) == (64 * 2, [], 0)
    assert found.hours == now // HOUR + 1 - first


async def test_an_empty_ledger_has_no_difference(store: Store) -> None:
    found = await reconcile(store, "acme")
    assert (found.rows, found.differences, found.unreadable) == (0, [], 0)


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("hours_ago", [0, 25])
@pytest.mark.parametrize("place", range(6))
async def test_one_unit_too_much_is_found_wherever_it_is(
    store_url: str, grain: Any, hours_ago: int, place: int
) -> None:
    store = Store(store_url, deadline=5)
    now = await spread(store_url, store, 20)
    number = bucket(grain, now // HOUR - hours_ago)
    key, field = sums_key("acme", grain, number), group_of(record(team="t0", user="u2"))
    with redis.Redis.from_url(store_url) as client:
        before = msgspec.msgpack.decode(client.hget(key, field) or msgspec.msgpack.encode([0] * 6))
        after = [counter + (number == place) for number, counter in enumerate(before)]
        client.hset(key, field, msgspec.msgpack.encode(after))
    found = await reconcile(store, "acme")
    assert found.differences == [Difference(grain, number, field, tuple(before), tuple(after))]
    await store.aclose()


async def test_a_row_that_is_gone_and_one_without_sums_are_found_in_all_grains(
    either_store_url: str, store: Store
) -> None:
    now = await spread(either_store_url, store, 20)
    entries = await every_row(store)
    gone = entries[30]
    with redis.Redis.from_url(either_store_url) as client:
        client.xdel("{acme}:usage", gone.id)
        client.xadd("{acme}:usage", {"row": msgspec.json.encode(record(5, team="new"))}, id=f"{now + 10 * 60_000}-0")
    found = await reconcile(store, "acme")
    expected = {
        (grain, bucket(grain, at // HOUR), group_of(row))
        for grain in GRAINS
        for at, row in ((now, record(team="new")), (gone.written_ms, gone.record))
    }
    # A row that is missing may have been trimmed: what begins before the second hour is not compared then.
    whole = entries[0].written_ms // HOUR + 1
    assert {d[:3] for d in found.differences} == {one for one in expected if hours(one[0], one[1]).start >= whole}


async def test_sums_of_an_hour_without_rows_are_found(either_store_url: str, store: Store) -> None:
    now = await spread(either_store_url, store, 20)
    empty = now // HOUR - 3 * 7
    with redis.Redis.from_url(either_store_url) as client:
        assert not client.exists(sums_key("acme", "hour", empty))
        client.hset(sums_key("acme", "hour", empty), "[]", msgspec.msgpack.encode([1, 2, 3, 4, 5, 6]))
    assert (await reconcile(store, "acme")).differences == [
        Difference("hour", empty, "[]", (0,) * 6, (1, 2, 3, 4, 5, 6))
    ]


async def test_sums_of_a_ledger_that_is_gone_are_found(either_store_url: str, store: Store) -> None:
    now = await now_ms(store)
    settle(either_store_url, (now, record()))
    with redis.Redis.from_url(either_store_url) as client:
        client.delete("{acme}:usage")
    assert [d.grain for d in (await reconcile(store, "acme")).differences] == ["day", "hour", "month"]


@pytest.mark.parametrize("exactly", [0, 1, HOUR // 2])
async def test_a_trimmed_ledger_is_compared_from_its_first_whole_hour(
    either_store_url: str, store: Store, exactly: int
) -> None:
    now = await spread(either_store_url, store)
    cut = now - 50 * HOUR + exactly
    with redis.Redis.from_url(either_store_url) as client:
        client.xtrim("{acme}:usage", minid=cut, approximate=False)
    found = await reconcile(store, "acme")
    first = (await every_row(store))[0].written_ms // HOUR
    assert (found.differences, found.hours) == ([], now // HOUR - first)
    with redis.Redis.from_url(either_store_url) as client:
        client.hset(sums_key("acme", "hour", first), "[]", msgspec.msgpack.encode([1] * 6))
        assert (await reconcile(store, "acme")).differences == []
        client.hset(sums_key("acme", "hour", first + 1), "[]", msgspec.msgpack.encode([1] * 6))
        assert len((await reconcile(store, "acme")).differences) == 1


async def test_a_ledger_that_was_trimmed_to_nothing_has_no_difference(either_store_url: str, store: Store) -> None:
    await spread(either_store_url, store)
    with redis.Redis.from_url(either_store_url) as client:
        client.xtrim("{acme}:usage", maxlen=0, approximate=False)
    assert await reconcile(store, "acme") == await reconcile(store, "acme")
    assert (await reconcile(store, "acme")).differences == []


async def test_rows_that_are_written_meanwhile_are_no_difference(either_store_url: str, store: Store) -> None:
    now = await spread(either_store_url, store)
    writer = Store(either_store_url, deadline=5)
    written = 0

    async def write() -> None:
        nonlocal written
        while not leaving():
            row = record(written % 50, team=f"t{written % 2}", user=f"u{written % 3}")
            await writer.client.eval(*settlement(row, await now_ms(writer), "*"))
            written += 1

    writing = [asyncio.ensure_future(write()) for _ in range(4)]
    found = [await reconcile(store, "acme") for _ in range(6)]
    before = written
    for one in writing:
        one.cancel()
    await asyncio.wait(writing)
    await writer.aclose()
    assert [one.differences for one in found] == [[]] * 6
    assert before > 50
    assert found[-1].rows > found[0].rows
    assert now <= await now_ms(store)

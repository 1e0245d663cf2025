"""Reports: every hour is in one bucket, every bucket in the fewest hashes, and the amounts are those of the rows."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.buckets import KEPT_HOURS, Part, bucket, cover, finer, hours, spans
from gateway.errors import StoreUnavailable
from gateway.ledger import Entry, fold
from gateway.records import COUNTERS, DIMENSIONS, GRAINS, ORGANISATIONS, Grain, UsageRecord, sums_key
from gateway.rollups import groups, running_hour
from gateway.store import Store, StoreError
from gateway.sums import Query, report
from tests.proving.rows import record

NOW = 497_844  # an hour of October 2026
ZONES = [
    "UTC",
    "Europe/Zurich",
    "America/St_Johns",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "Pacific/Apia",
    "Africa/Casablanca",
    "Australia/Lord_Howe",
]


@pytest.fixture
async def store(either_store_url: str) -> AsyncIterator[Store]:
    store = Store(either_store_url, deadline=5)
    yield store
    await store.aclose()


# — time


@settings(deadline=None)
@given(st.integers(0, 2_000_000))
def test_an_hour_is_in_the_day_and_the_month_that_the_calendar_says(hour: int) -> None:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=hour)
    assert bucket("hour", hour) == hour
    assert bucket("day", hour) == (at.date() - date(1970, 1, 1)).days
    assert bucket("month", hour) == (at.year - 1970) * 12 + at.month - 1
    assert all(hour in hours(grain, bucket(grain, hour)) for grain in GRAINS)


@settings(deadline=None)
@given(st.sampled_from(GRAINS), st.integers(0, 1200))
def test_what_is_finer_is_the_same_hours(grain: Grain, number: int) -> None:
    inside = [hour for part in finer(grain, number) for hour in hours(*part)]
    assert inside == ([] if grain == "hour" else list(hours(grain, number)))


def covered(parts: Sequence[Part]) -> Counter[int]:
    """How often each hour is in a cover."""
    found: Counter[int] = Counter()
    for sign, grain, number in parts:
        for hour in hours(grain, number):
            found[hour] += sign
    return found


@settings(deadline=None)
@given(st.integers(1, KEPT_HOURS - 1), st.integers(0, KEPT_HOURS), st.integers(0, 800))
def test_a_cover_has_every_hour_of_a_span_once_and_no_other(before: int, long: int, now: int) -> None:
    now += NOW
    first = now - before
    last = min(now + 1, first + long)
    found = {hour: times for hour, times in covered(cover(first, last, now)).items() if times and hour <= now}
    assert found == dict.fromkeys(range(first, last), 1)


def fewest(first: int, last: int, now: int) -> int:
    """How many hashes a span takes at least: the shortest way from its begin to its end, over the begins and ends of
    hours, days and months; only over what has ended, the way may go back."""
    ways: dict[int, set[int]] = defaultdict(set)
    low, high = bucket("month", first), bucket("month", last)
    for month in range(low - 1, high + 2):
        days = finer("month", month)
        for part in [("month", month), *days, *(hour for day in days for hour in finer(*day))]:
            inside = hours(*part)
            ways[inside.start].add(inside.stop)
            if inside.stop <= now:
                ways[inside.stop].add(inside.start)
    known, line = {first: 0}, deque([first])
    while last not in known:
        at = line.popleft()
        for there in ways[at] - known.keys():
            known[there] = known[at] + 1
            line.append(there)
    return known[last]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2500), st.integers(0, 2500))
def test_a_cover_has_the_fewest_hashes(before: int, long: int) -> None:
    first = NOW - before
    last = min(first + long, NOW)  # before what is running: an open end costs less
    assert len(cover(first, last, NOW)) == fewest(first, last, NOW)


def test_a_span_that_is_not_over_takes_what_is_running_whole() -> None:
    month = bucket("month", NOW)
    begin = hours("month", month).start
    assert cover(begin, NOW + 1, NOW) == [Part(1, "month", month)]
    assert cover(begin + 24, NOW + 1, NOW) == [Part(1, "month", month), Part(-1, "day", begin // 24)]


def test_nothing_that_is_running_is_taken_away() -> None:
    """It may grow between two reads: the month without this hour is made of what has ended."""
    begin = hours("month", bucket("month", NOW)).start
    parts = cover(begin, NOW, NOW)
    assert len(parts) > 5
    assert all(part.sign == 1 for part in parts)
    assert {part.sign for part in cover(begin - 700, begin, NOW)} == {1, -1}


def test_nothing_is_taken_away_that_may_not_be_kept_any_more() -> None:
    first = NOW - KEPT_HOURS
    month = bucket("month", first)
    assert hours("month", month).start < first
    assert all(part.sign == 1 for part in cover(first, hours("month", month).stop, NOW))


@settings(deadline=None)
@given(st.sampled_from(ZONES), st.integers(350_000, 500_000), st.integers(0, 2000), st.data())
def test_every_hour_of_a_span_is_in_one_bucket_of_a_zone(zone: str, first: int, long: int, data: Any) -> None:
    by: list[Grain] = data.draw(st.lists(st.sampled_from(GRAINS), unique=True))
    there = ZoneInfo(zone)
    found = list(spans(by, first, first + long, there))
    assert [hour for _, begin, end in found for hour in range(begin, end)] == list(range(first, first + long)) or not by
    for names, begin, end in found if by else ():
        for hour in range(begin, end):
            at = datetime.fromtimestamp(hour * 3600, there)
            text = at.isoformat()
            off = text[19:]
            expected = {"hour": f"{text[:13]}:00{off}", "day": text[:10], "month": text[:7]}
            assert names == tuple(expected[grain] for grain in by)
    named = [names for names, _, _ in found]
    assert len(named) == len(set(named)) or not by


@pytest.mark.parametrize(
    ("zone", "day", "length"),
    [
        ("Europe/Zurich", "2026-03-29", 23),
        ("Europe/Zurich", "2026-10-25", 25),
        ("Europe/Zurich", "2026-10-26", 24),
        ("America/St_Johns", "2026-03-08", 23),
        ("America/St_Johns", "2026-11-01", 25),
        ("Asia/Kolkata", "2026-03-29", 24),
        ("Pacific/Apia", "2011-12-29", 24),
        ("Pacific/Apia", "2011-12-30", 0),  # never was
        ("Pacific/Apia", "2011-12-31", 24),
        ("Africa/Casablanca", "2026-02-15", 25),  # Ramadan
        ("Africa/Casablanca", "2026-03-22", 23),
    ],
)
def test_days_on_which_the_clock_is_set_have_the_hours_that_they_have(zone: str, day: str, length: int) -> None:
    around = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) // 3600
    found = {names[0]: end - begin for names, begin, end in spans(["day"], around - 60, around + 80, ZoneInfo(zone))}
    assert found.get(day, 0) == length


def test_a_clock_that_is_set_back_by_half_an_hour_has_an_hour_more() -> None:
    first = int(datetime(2017, 4, 1, 14, tzinfo=UTC).timestamp()) // 3600
    assert [names for names, _, _ in spans(["hour"], first, first + 2, ZoneInfo("Australia/Lord_Howe"))] == [
        ("2017-04-02T01:00+11:00",),
        ("2017-04-02T01:00+10:30",),
    ]


def test_two_hours_of_the_same_number_have_two_names() -> None:
    first = int(datetime(2026, 10, 25, 0, tzinfo=UTC).timestamp()) // 3600
    assert [names for names, _, _ in spans(["hour"], first, first + 2, ZoneInfo("Europe/Zurich"))] == [
        ("2026-10-25T02:00+02:00",),
        ("2026-10-25T02:00+01:00",),
    ]


# — reports


def keep(url: str, entries: Sequence[Entry]) -> None:
    """The sums of these rows, as settling keeps them."""
    with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as many:
        for organisation in {entry.record.organisation for entry in entries}:
            many.sadd(ORGANISATIONS, organisation)
            its = [entry for entry in entries if entry.record.organisation == organisation]
            for (grain, number), found in fold(its).items():
                mapping: dict[Any, Any] = {group: msgspec.msgpack.encode(sums) for group, sums in found.items()}
                many.hset(sums_key(organisation, grain, number), mapping=mapping)
        many.execute()


def entry(hour: int, row: UsageRecord, ms: int = 0) -> Entry:
    return Entry(f"{hour * 3_600_000 + ms}-1", hour * 3_600_000 + ms, row)


def some(rnd: random.Random, now: int, count: int) -> Iterator[Entry]:
    """Rows of the last two months, most of them at an edge, for few of everything."""
    month = hours("month", bucket("month", now)).start
    edges = [month, month - 1, now, now - 1, now // 24 * 24, now // 24 * 24 - 1, now - 1400, month - 24]
    for number in range(count):
        hour = rnd.choice([*edges, now - rnd.randrange(1400)])
        row = record(
            number,
            organisation=rnd.choice(["acme", "zoo"]),
            team=rnd.choice(["red", "blue", "re*", "[a]"]),
            key=rnd.choice(["k1", "k2"]),
            user=rnd.choice([None, "ann", 'quo"te|é']),
            model=rnd.choice(["llama-8b", "llama-70b", "qwen"]),
            requests=rnd.choice([1, 1, 1, 0]),
            pool=rnd.choice(["p", "q"]),
        )
        yield entry(hour, row, rnd.randrange(3_600_000))


def expected(entries: Sequence[Entry], query: Query, wanted: dict[str, set[str]]) -> dict[tuple[str, ...], list[int]]:
    """What a report must say, row by row."""
    found: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * len(COUNTERS))
    for _, written_ms, row, _ in entries:
        hour = written_ms // 3_600_000
        at = datetime.fromtimestamp(hour * 3600, query.zone)
        text = at.isoformat()
        values: dict[str, str] = {name: getattr(row, name) or "" for name in DIMENSIONS}
        values.update(hour=f"{text[:13]}:00{text[19:]}", day=text[:10], month=text[:7])
        if query.since is not None and hour * 3600 < query.since:
            continue
        if query.until is not None and hour * 3600 >= query.until:
            continue
        if all(values[name] in those for name, those in wanted.items()):
            group = tuple(values[name] for name in query.by)
            found[group] = [a + getattr(row, counter) for a, counter in zip(found[group], COUNTERS, strict=True)]
    return dict(found)


BYS: tuple[tuple[Any, ...], ...] = (
    (),
    ("organisation",),
    ("team", "month"),
    ("day", "model"),
    ("user",),
    ("hour",),
    ("key", "pool", "month", "day"),
    DIMENSIONS,
)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Zurich", "America/St_Johns"])
async def test_a_report_says_what_the_rows_say(either_store_url: str, store: Store, zone: str) -> None:
    rnd = random.Random(zone)
    now = await running_hour(store)
    entries = list(some(rnd, now, 300))
    keep(either_store_url, entries)
    spans_of_time = [(None, None), (-1400, None), (-800, -3), (-30, 0), (-1, 1), (-700, -650), (5, 9), (-3, -9)]
    wheres: list[tuple[dict[Any, frozenset[str]], dict[str, set[str]]]] = [
        ({}, {}),
        ({"team": frozenset({"re*"})}, {"team": {"red", "re*"}}),
        ({"team": frozenset({"[a]"})}, {"team": {"[a]"}}),
        ({"model": frozenset({"llama-*"})}, {"model": {"llama-8b", "llama-70b"}}),
        ({"key": frozenset({"k1"}), "user": frozenset({"ann", ""})}, {"key": {"k1"}, "user": {"ann", ""}}),
        ({"organisation": frozenset({"zoo"}), "pool": frozenset({"q"})}, {"organisation": {"zoo"}, "pool": {"q"}}),
        ({"organisation": frozenset({"nobody"})}, {"organisation": set()}),
    ]
    for by in BYS:
        for since, until in spans_of_time if "hour" not in by else [(-200, None)]:
            where, wanted = rnd.choice(wheres)
            begin, end = (
                None if of is None else (now + of) * 3600 + rnd.choice([0, 0, 1, 3599]) for of in (since, until)
            )
            query = Query(by, begin, end, where, ZoneInfo(zone))
            found = await report(store, query)
            said = {one.group: [one.counters[counter] for counter in COUNTERS] for one in found}
            assert said == expected(entries, query, wanted), query
            assert len(said) == len(found)
            assert await report(store, query) == found, "what was added up once says the same"


async def test_a_row_at_the_end_of_a_month_is_in_that_month(either_store_url: str, store: Store) -> None:
    begin = hours("month", bucket("month", await running_hour(store))).start
    keep(either_store_url, [entry(begin - 1, record(1), 3_599_999), entry(begin, record(2))])
    for by in GRAINS:
        found = await report(store, Query((by,), (begin - 30) * 3600, (begin + 30) * 3600))
        assert [one.counters["input_tokens"] for one in found] == [101, 102]
    for since, until, told in ((begin, None, 102), (None, begin, 101), (begin - 1, begin, 101)):
        query = Query((), None if since is None else since * 3600, None if until is None else until * 3600)
        assert [one.counters["input_tokens"] for one in await report(store, query)] == [told]


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "Asia/Kathmandu", "America/St_Johns", "UTC"])
async def test_spans_that_follow_on_each_other_share_no_hour_and_lack_none(
    either_store_url: str, store: Store, zone: str
) -> None:
    now = await running_hour(store)
    keep(either_store_url, [entry(hour, record(requests=1)) for hour in range(now - 72, now)])
    midnight = datetime.fromtimestamp((now - 24) * 3600, ZoneInfo(zone)).replace(hour=0, minute=0)
    at = int(midnight.timestamp())
    begin, end = (now - 72) * 3600, now * 3600
    spans_of_time = [(begin, end), (begin, at), (at, end)]
    whole, before, after = [
        sum(one.counters["requests"] for one in await report(store, Query((), *span))) for span in spans_of_time
    ]
    assert (whole, before + after) == (72, 72)
    (day,) = await report(store, Query(("day",), at, min(at + 86400, end), zone=ZoneInfo(zone)))
    assert day.group == (f"{midnight:%Y-%m-%d}",), "the hours of a day are those of its span"


async def test_a_report_begins_with_what_is_first_and_then_with_what_costs_most(
    either_store_url: str, store: Store
) -> None:
    now = await running_hour(store)
    rows = [(now, "a", 1), (now, "b", 5), (now - 800, "a", 2), (now - 800, "c", 2), (now, "d", 5)]
    keep(either_store_url, [entry(at, record(team=team, cost_microusd=cost)) for at, team, cost in rows])
    assert [one.group[1] for one in await report(store, Query(("month", "team")))] == ["a", "c", "b", "d", "a"]
    assert [one.group[0] for one in await report(store, Query(("team", "month")))] == ["a", "c", "b", "d", "a"]
    assert [one.group[0] for one in await report(store, Query(("team",)))] == ["b", "d", "a", "c"]


async def test_groups_that_used_nothing_are_left_out(either_store_url: str, store: Store) -> None:
    nothing = record(team="idle", **dict.fromkeys(COUNTERS, 0))
    keep(either_store_url, [entry(await running_hour(store), nothing)])
    assert await report(store, Query(("team",))) == []
    assert await report(store, Query()) == []


async def test_a_correction_takes_off_what_was_counted_too_much(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    back = record(status="correction", requests=0, output_tokens=-50, cost_microusd=-7)
    keep(either_store_url, [entry(now - 1, record(30)), entry(now, back)])
    (found,) = await report(store, Query())
    assert (found.counters["requests"], found.counters["output_tokens"], found.counters["cost_microusd"]) == (1, 0, 50)


async def test_many_groups_are_each_counted_once(either_store_url: str, store: Store) -> None:
    """More than the store tells in one answer; and all that an answer may say twice while a table grows."""
    now = await running_hour(store)
    key = sums_key("acme", "month", bucket("month", now))
    keep(either_store_url, [entry(now, record(team="0"))])
    with redis.Redis.from_url(either_store_url) as client:
        value = msgspec.msgpack.encode([1] * 6)
        mapping: dict[Any, Any] = {f'["{n}","k","","m{n % 7}","p"]': value for n in range(1, 23_001)}
        client.hset(key, mapping=mapping)
    found = {one.group: one.counters["requests"] for one in await report(store, Query(("model",)))}
    assert found == {("llama",): 1, **{(f"m{n}",): len(range(n or 7, 23_001, 7)) for n in range(7)}}
    assert len(await groups(store, key)) == 23_001


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ('["a","b"]', msgspec.msgpack.encode([1] * 6)),
        ("no array", msgspec.msgpack.encode([1] * 6)),
        ('["t","k","","m","p"]', msgspec.msgpack.encode([1] * 5)),
        ('["t","k","","m","p"]', msgspec.msgpack.encode([1] * 7)),
        ('["t","k","","m","p"]', b"7"),
        ('["t","k","","m","p"]', b""),
    ],
)
async def test_sums_that_cannot_be_read_are_told_not_left_out(
    either_store_url: str, store: Store, field: str, value: bytes
) -> None:
    now = await running_hour(store)
    keep(either_store_url, [entry(now, record())])
    with redis.Redis.from_url(either_store_url) as client:
        client.hset(sums_key("acme", "month", bucket("month", now)), field, value)
    with pytest.raises(StoreError, match="acme"):
        await report(store, Query(("team",)))


async def test_without_a_store_a_report_is_unavailable() -> None:
    away = Store("unix:///nowhere/at/all", deadline=0.5)
    with pytest.raises(StoreUnavailable):
        await report(away, Query())
    await away.aclose()


async def test_a_report_that_is_cancelled_anywhere_leaves_nothing_behind(either_store_url: str, store: Store) -> None:
    now = await running_hour(store)
    keep(either_store_url, [entry(now - 700 * number, record(number)) for number in range(12)])
    before = asyncio.all_tasks()
    whole = await report(store, Query(("day",)))
    for turns in range(0, 200, 7):
        task = asyncio.ensure_future(report(store, Query(("day",))))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        assert {one for one in asyncio.all_tasks() if not one.done()} <= before
    assert await report(store, Query(("day",))) == whole

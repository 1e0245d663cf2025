"""Reports: what was used, by anything that sums are kept by, from the fewest hashes that say it.

A span of hours is covered by the sums of whole months, days and hours in UTC. Where it is shorter, parts are taken away
again: a month without its first hour is two hashes instead of fifty-three. What is taken away has ended, so it can not
change between two reads; what is still running is only ever added.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import date, datetime, tzinfo
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from operator import add, call, neg
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec

from gateway.records import COUNTERS, DIMENSIONS, GRAINS, ORGANISATIONS, Dimension, Grain, sums_key
from gateway.store import Store, StoreError

KEPT_HOURS = 400 * 24  # what the sums are kept for

_EPOCH = date(1970, 1, 1).toordinal()
_PAGE = 5000  # groups that the store looks at in one step: a millisecond or two of its time
_AHEAD = 3  # hashes that are under way while one is added up
_CHUNK = 1000  # groups that are decoded at once
_NEVER = 1 << 40  # hours

Bucket = tuple[Grain, int]


@dataclass(frozen=True, slots=True)
class Query:
    """What a report is asked for.

    `by` is what it is grouped by. `since` and `until` are seconds since 1970, or None for all there is: an hour in UTC
    is in the span if its beginning is, so that spans beside each other share none. `where` are the values of a
    dimension that count, or patterns as a shell has them.

    Times are those of `zone`. A bucket has the hours in UTC that begin in it: days have 23 to 25 of them where the
    clock is set, and where it is half an hour off, an hour of it is the one that begins at half past.
    """

    by: tuple[Dimension | Grain, ...] = ()
    since: int | None = None
    until: int | None = None
    where: Mapping[Dimension, frozenset[str]] = field(default_factory=dict)
    zone: tzinfo = ZoneInfo("UTC")


@dataclass(frozen=True, slots=True)
class Sum:
    """What a group used; costs are micro-dollars."""

    group: tuple[str, ...]  # a value for each of `by`
    counters: dict[str, int]  # of COUNTERS


# — time


class Part(NamedTuple):
    """One hash of a cover: added, or with sign -1 taken away."""

    sign: int
    grain: Grain
    number: int


def bucket(grain: Grain, hour: int) -> int:
    """The number of the hour, day or month that an hour is in, all since 1970 in UTC."""
    if grain == "hour":
        return hour
    if grain == "day":
        return hour // 24
    day = date.fromordinal(_EPOCH + hour // 24)
    return (day.year - 1970) * 12 + day.month - 1


def hours(grain: Grain, number: int) -> range:
    """The hours of an hour, a day or a month."""
    if grain == "hour":
        return range(number, number + 1)
    if grain == "day":
        return range(number * 24, number * 24 + 24)
    return range(_month_begins(number), _month_begins(number + 1))


def finer(grain: Grain, number: int) -> list[Bucket]:
    """The days of a month, the hours of a day; nothing of an hour."""
    if grain == "hour":
        return []
    inside = hours(grain, number)
    if grain == "day":
        return [("hour", hour) for hour in inside]
    return [("day", hour // 24) for hour in inside[::24]]


def cover(first: int, last: int, now: int) -> list[Part]:
    """The fewest hashes that have each hour from `first` to before `last` once, and no other.

    `now` is the hour that is running. Nothing is later, so a span that has it has no end.
    """
    last = _NEVER if last > now else last
    months = range(bucket("month", first), bucket("month", min(last, now + 1) - 1) + 1) if first < last else range(0)
    return [part for month in months for part in _cover("month", month, first, last, now)]


def _cover(grain: Grain, number: int, first: int, last: int, now: int) -> list[Part]:
    inside = hours(grain, number)
    begin, end = inside.start, inside.stop
    if last <= begin or end <= first:
        return []
    whole = Part(1, grain, number)
    if first <= begin and end <= last:
        return [whole]
    found = [part for one in finer(grain, number) for part in _cover(*one, first, last, now)]
    # What is taken away is over, and its hours are still kept.
    if begin > now - KEPT_HOURS and first <= now and (end <= last or end <= now):
        beside = ((begin, first), (last, end))
        away = [part for span in beside for one in finer(grain, number) for part in _cover(*one, *span, now)]
        if 1 + len(away) < len(found):
            return [whole, *(part._replace(sign=-part.sign) for part in away)]
    return found


def spans(by: Sequence[Grain], first: int, last: int, zone: tzinfo) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The buckets of a span of hours: their names, first hour, and the hour after the last. Each hour is in one."""
    if not by:
        yield (), first, last
        return
    for names, those in groupby(range(first, last), lambda hour: _names(by, hour, zone)):
        inside = list(those)
        yield names, inside[0], inside[-1] + 1


def _names(by: Sequence[Grain], hour: int, zone: tzinfo) -> tuple[str, ...]:
    at = datetime.fromtimestamp(hour * 3600, zone)
    return tuple(_NAMES[grain](at) for grain in by)


def _hour_name(at: datetime) -> str:
    """With what it is off UTC: where the clock is set back, two hours of a day have the same number."""
    text = at.isoformat(timespec="minutes")
    return f"{text[:13]}:00{text[16:]}"


_NAMES: Mapping[Grain, Callable[[datetime], str]] = {
    "hour": _hour_name,
    "day": lambda at: f"{at.year:04}-{at.month:02}-{at.day:02}",
    "month": lambda at: f"{at.year:04}-{at.month:02}",
}


def _month_begins(number: int) -> int:
    return (date(1970 + number // 12, number % 12 + 1, 1).toordinal() - _EPOCH) * 24


def first_hour(seconds: int) -> int:
    """The first hour since 1970 that does not begin before a moment."""
    return -(-seconds // 3600)


async def running_hour(store: Store) -> int:
    """The hour since 1970 by the store's clock, which is the one that counts."""
    seconds, _ = await store.call(store.client.time)
    return int(seconds) // 3600


# — what stands in the store


async def groups(store: Store, key: str) -> dict[bytes, bytes]:
    """One hash of sums as it stands: the group, its counters. Nothing where there is none.

    Each group is read at once, but not all of them at the same time. Raises StoreUnavailable.
    """
    found: dict[bytes, bytes] = {}
    cursor = b"0"
    while True:
        # The space keeps redis-py from making a dict of each answer: only a name that it knows has a callback.
        page = partial(store.client.execute_command, "HSCAN ", key, cursor, "COUNT", _PAGE)
        cursor, pairs = await store.call(page)
        one = iter(pairs)
        found.update(zip(one, one, strict=True))  # a table that grows meanwhile may say one twice
        if cursor == b"0":
            return found


def counters_of(organisation: str, values: Collection[bytes]) -> Sequence[tuple[int, ...]]:
    """The counters of many groups, decoded in one call. Raises StoreError."""
    try:
        # An array of arrays: 0xdd and their number are its head.
        return _decode_counters(b"\xdd%b%b" % (len(values).to_bytes(4, "big"), b"".join(values)))
    except msgspec.DecodeError as broken:
        raise StoreError(
            f"the sums of {organisation} have a group that is no array of {len(COUNTERS)} counters: {broken}"
        ) from broken


_decode_counters = msgspec.msgpack.Decoder(list[tuple[int, int, int, int, int, int]]).decode
_decode_group = msgspec.json.Decoder(tuple[str, str, str, str, str]).decode


# — reports


class _Step(NamedTuple):
    """One hash that a report reads."""

    names: tuple[str, ...]  # of its bucket of time
    sign: int
    organisation: str
    key: str


async def report(store: Store, query: Query) -> list[Sum]:
    """What was used, by time and then the most expensive first. Groups that used nothing are left out.

    The last seconds of what is running may be in one group and not yet in another, and while a user is being erased
    amounts may be under both names. Raises StoreUnavailable, and StoreError for sums that cannot be read.
    """
    now = await running_hour(store)
    times = tuple(grain for grain in GRAINS if grain in query.by)
    parts = [
        (names, part)
        for names, first, end in spans(times, *_bounds(query, now), query.zone)
        for part in sorted(cover(first, end, now), reverse=True)  # what is taken away last
    ]
    steps = [
        _Step(names, part.sign, organisation, sums_key(organisation, part.grain, part.number))
        for organisation in await _organisations(store, query)
        for names, part in parts
    ]
    totals: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * len(COUNTERS))
    tables = {step.organisation: _Groups(query, step.organisation) for step in steps}
    last: _Step | None = None
    async with aclosing(_read(store, steps)) as reading:
        async for step, found in reading:
            if last is not None and last[:3] != step[:3]:
                await tables[last.organisation].drain(totals, last.names, last.sign)
            tables[step.organisation].take(found)
            last = step
    if last is not None:
        await tables[last.organisation].drain(totals, last.names, last.sign)
    # A total is kept by times, then dimensions; what is asked for may mix them.
    order = [*times, *(name for name in query.by if name not in GRAINS)]
    places = [order.index(name) for name in query.by]
    money, output = COUNTERS.index("cost_microusd"), COUNTERS.index("output_tokens")
    ranked = sorted(
        ((group, total) for group, total in totals.items() if any(total)),
        key=lambda one: (one[0][: len(times)], -one[1][money], -one[1][output], one[0]),
    )
    return [
        Sum(tuple(group[place] for place in places), dict(zip(COUNTERS, total, strict=True))) for group, total in ranked
    ]


def _bounds(query: Query, now: int) -> tuple[int, int]:
    """The first hour and the one after the last."""
    first = now - KEPT_HOURS if query.since is None else max(first_hour(query.since), now - KEPT_HOURS)
    last = now + 1 if query.until is None else min(first_hour(query.until), now + 1)
    return first, max(first, last)


async def _organisations(store: Store, query: Query) -> list[str]:
    there = [name.decode() for name in await store.call(lambda: store.client.smembers(ORGANISATIONS))]
    wanted = query.where.get("organisation", ("*",))
    return sorted(name for name in there if _matches(name, wanted))


async def _read(store: Store, steps: Sequence[_Step]) -> AsyncGenerator[tuple[_Step, dict[bytes, bytes]], None]:
    """Each step with its hash, in their order. The next ones are on their way while one is added up."""
    left = iter(steps)
    coming: deque[tuple[_Step, asyncio.Task[dict[bytes, bytes]]]] = deque()
    try:
        while True:
            while len(coming) < _AHEAD and (step := next(left, None)):
                coming.append((step, asyncio.ensure_future(groups(store, step.key))))
            if not coming:
                return
            step, reading = coming[0]
            found = await reading
            coming.popleft()
            if found:
                yield step, found
    finally:
        for _, reading in coming:
            reading.cancel()
        await asyncio.gather(*(reading for _, reading in coming), return_exceptions=True)


class _Groups(dict[bytes, Callable[[Any], Any]]):
    """Which group of the report a group of the sums belongs to, each decoded once: the way into its list of rows."""

    def __init__(self, query: Query, organisation: str) -> None:
        self._organisation = organisation
        self._by = [DIMENSIONS.index(name) for name in query.by if name not in GRAINS]
        self._where = [(DIMENSIONS.index(name), patterns) for name, patterns in query.where.items()]
        self._values: dict[tuple[str, ...], list[bytes]] = {}

    def __missing__(self, text: bytes) -> Callable[[Any], Any]:
        try:
            values = (self._organisation, *_decode_group(text))
        except msgspec.DecodeError as broken:
            raise StoreError(f"a group of the sums of {self._organisation} is no array of names: {broken}") from broken
        put: Callable[[Any], Any] = _nowhere
        if all(_matches(values[place], patterns) for place, patterns in self._where):
            put = self._values.setdefault(tuple([values[place] for place in self._by]), []).append
        self[text] = put
        return put

    def take(self, found: dict[bytes, bytes]) -> None:
        """Put the counters of a hash into their groups, without a line of Python for each."""
        deque(map(call, map(self.__getitem__, found), found.values()), maxlen=0)

    async def drain(self, totals: dict[tuple[str, ...], list[int]], names: tuple[str, ...], sign: int) -> None:
        """Add up what was taken, and begin anew.

        It is decoded only here, as much at a time as a processor's cache holds: a year of integers that are all there
        at once takes twice as long.
        """
        done = 0
        for group, values in self._values.items():
            place = names + group
            for begin in range(0, len(values), _CHUNK):
                grown = map(sum, zip(*counters_of(self._organisation, values[begin : begin + _CHUNK]), strict=True))
                totals[place] = list(map(add, totals[place], grown if sign > 0 else map(neg, grown)))
                done += min(_CHUNK, len(values) - begin)
            values.clear()
            if done >= _CHUNK:
                done = 0
                await asyncio.sleep(0)  # who asks for a year does not keep the others waiting


_nowhere = deque[Any](maxlen=0).append


def _matches(value: str, patterns: Collection[str]) -> bool:
    return value in patterns or any(fnmatchcase(value, pattern) for pattern in patterns)

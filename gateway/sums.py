"""Reports: what was used, by anything that sums are kept by, from the fewest hashes that say it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import tzinfo
from fnmatch import fnmatchcase
from typing import NamedTuple
from zoneinfo import ZoneInfo

from gateway.buckets import KEPT_HOURS, Part, bucket, cover, first_hour, hours, spans
from gateway.records import COUNTERS, DIMENSIONS, GRAINS, ORGANISATIONS, Dimension, Grain
from gateway.rollups import Adder, Place, Rollups, Run, Totals, running_hour
from gateway.store import Store

_AHEAD = 3  # runs that are under way while one is added up


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


class Sum(NamedTuple):
    """What a group used; costs are micro-dollars."""

    group: tuple[str, ...]  # a value for each of `by`
    amounts: tuple[int, ...]  # in the order of COUNTERS; a dict for each of 20,000 takes longer than to add them up

    @property
    def counters(self) -> dict[str, int]:
        """The amounts by their names."""
        return dict(zip(COUNTERS, self.amounts, strict=True))


class _Step(NamedTuple):
    """What a report reads at once."""

    names: Place  # of its bucket of time
    sign: int
    organisation: str
    run: Run


async def report(store: Store, query: Query) -> list[Sum]:
    """What was used, by time and then the most expensive first. Groups that used nothing are left out.

    The last seconds of what is running may be in one group and not yet in another, and while a user is being erased
    amounts may be under both names. Raises StoreUnavailable, and StoreError for sums that cannot be read.
    """
    now = await running_hour(store)
    times = tuple(grain for grain in GRAINS if grain in query.by)
    parts = [(names, cover(first, end, now)) for names, first, end in spans(times, *_bounds(query, now), query.zone)]
    needed = [name for name in DIMENSIONS if name in query.by or name in query.where]
    sources = {name: Rollups(store, name, needed, now) for name in await _organisations(store, query)}
    steps = [
        _Step(names, sign, organisation, run)
        for organisation, rollups in sources.items()
        for names, some in parts
        for sign, run in _runs(some, rollups)
    ]
    totals: dict[Place, Totals] = {step.names: {} for step in steps}
    adders = {name: Adder(name, _placing(query)) for name in sources}
    async with aclosing(_read(sources, steps)) as reading:
        async for step, found in reading:
            await adders[step.organisation].add(totals[step.names], found, step.sign)
    # A total is kept by times, then dimensions; what is asked for may mix them.
    kept = [*times, *(name for name in query.by if name not in GRAINS)]
    places = [kept.index(name) for name in query.by]
    return [
        Sum(tuple([group[place] for place in places]), total)
        for names in sorted(totals)
        for group, total in _ranked(names, totals[names])
    ]


def _ranked(names: Place, totals: Totals) -> list[tuple[Place, tuple[int, ...]]]:
    """The groups that used something, the most expensive first; names of time stand before theirs."""
    used = [(names + place, total) for place, total in totals.items() if any(total)]
    used.sort(key=lambda one: (-one[1][_MONEY], -one[1][_OUTPUT], one[0]))
    return used


_MONEY, _OUTPUT = COUNTERS.index("cost_microusd"), COUNTERS.index("output_tokens")


async def roll_up(store: Store) -> None:
    """Have the rollups at hand that reports of the last twelve months are likely to need. Raises as report() does."""
    since = hours("month", bucket("month", await running_hour(store)) - 11).start * 3600
    for by in _LIKELY:
        await report(store, Query(by, since))


_LIKELY: tuple[tuple[Dimension, ...], ...] = ((), ("team",), ("model",), ("pool",), ("team", "model"))


def _bounds(query: Query, now: int) -> tuple[int, int]:
    """The first hour and the one after the last."""
    first = now - KEPT_HOURS if query.since is None else max(first_hour(query.since), now - KEPT_HOURS)
    last = now + 1 if query.until is None else min(first_hour(query.until), now + 1)
    return first, max(first, last)


async def _organisations(store: Store, query: Query) -> list[str]:
    there = [name.decode() for name in await store.call(lambda: store.client.smembers(ORGANISATIONS))]
    wanted = query.where.get("organisation", ("*",))
    return sorted(name for name in there if _matches(name, wanted))


def _runs(parts: Iterable[Part], rollups: Rollups) -> list[tuple[int, Run]]:
    """The parts of a cover, those last that are taken away; months that lie side by side and have ended are one."""
    runs: list[tuple[int, Run]] = []
    for sign, grain, number in sorted(parts, key=lambda part: (-part.sign, part.grain, part.number)):
        run = Run(grain, number, number)
        if runs and grain == "month" and rollups.lasting(grain, number):
            before = runs[-1]
            if before == (sign, before[1]._replace(grain=grain, last=number - 1)):
                run = runs.pop()[1]._replace(last=number)
        runs.append((sign, run))
    return runs


def _placing(query: Query) -> Callable[[Sequence[str]], Place | None]:
    """What says where a group of the sums belongs in a report; None: nowhere."""
    by = [DIMENSIONS.index(name) for name in query.by if name not in GRAINS]
    where = [(DIMENSIONS.index(name), patterns) for name, patterns in query.where.items()]

    def place(names: Sequence[str]) -> Place | None:
        for dimension, patterns in where:
            if not _matches(names[dimension], patterns):
                return None
        return tuple([names[dimension] for dimension in by])

    return place


async def _read(
    sources: Mapping[str, Rollups], steps: Sequence[_Step]
) -> AsyncGenerator[tuple[_Step, dict[bytes, bytes]], None]:
    """Each step with its groups, in their order. The next ones are on their way while one is added up."""
    left = iter(steps)
    coming: deque[tuple[_Step, asyncio.Task[dict[bytes, bytes]]]] = deque()
    try:
        while True:
            while len(coming) < _AHEAD and (step := next(left, None)):
                coming.append((step, asyncio.ensure_future(sources[step.organisation].read(step.run))))
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


def _matches(value: str, patterns: Collection[str]) -> bool:
    return value in patterns or any(fnmatchcase(value, pattern) for pattern in patterns)

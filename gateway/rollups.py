"""The sums of an organisation as they stand in the store, and their rollups.

The sums of a month have a group for every key, user, model and pool that used something. What has ended does not
change, so what it comes to by team, or by team and model, is added up once: the first report that asks leaves it beside
the sums, and those to come read a few rows in the place of many. A rollup is never more than a shortcut: it holds no
user, it lapses, and where it is gone it is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import add, neg
from typing import NamedTuple

import msgspec

from gateway.buckets import hours
from gateway.records import COUNTERS, DIMENSIONS, Dimension, Grain, erasures, rollup_key, sums_key
from gateway.store import Store, StoreError
from gateway.topology import Failures

Place = tuple[str, ...]
Totals = dict[Place, tuple[int, ...]]  # COUNTERS by place

_PAGE = 5000  # groups that the store looks at in one step: a millisecond or two of its time
_CHUNK = 1000  # groups that are decoded at once
_LASTS = 32 * 86400  # s, a rollup
_WORTH = 4  # how many times as long the sums of a day must be, for a rollup to be kept


async def running_hour(store: Store) -> int:
    """The hour since 1970 by the store's clock, which is the one that counts."""
    seconds, _ = await store.call(store.client.time)
    return int(seconds) // 3600


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


class Adder(dict[bytes, Place | None]):
    """Adds up groups of an organisation's sums by the place that `place` gives for their names, in the order of
    DIMENSIONS; those without one do not count. It is asked once for each group."""

    def __init__(self, organisation: str, place: Callable[[Sequence[str]], Place | None]) -> None:
        self._organisation = organisation
        self._place = place

    def __missing__(self, group: bytes) -> Place | None:
        try:
            place = self[group] = self._place((self._organisation, *_decode_group(group)))
        except msgspec.DecodeError as broken:
            raise StoreError(f"a group of the sums of {self._organisation} is no array of names: {broken}") from broken
        return place

    async def add(self, totals: Totals, found: Mapping[bytes, bytes], sign: int = 1) -> None:
        """Add the counters of these groups to the totals, or take them away. Raises StoreError."""
        names, values = list(found), list(found.values())
        for begin in range(0, len(names), _CHUNK):
            some = counters_of(self._organisation, values[begin : begin + _CHUNK])
            if sign < 0:
                some = [tuple(map(neg, counters)) for counters in some]
            for place, counters in zip(map(self.__getitem__, names[begin : begin + _CHUNK]), some, strict=True):
                if place in totals:
                    totals[place] = tuple(map(add, totals[place], counters))
                elif place is not None:
                    totals[place] = counters
            await asyncio.sleep(0)  # who asks for a year does not keep the others waiting


class Run(NamedTuple):
    """Buckets of one grain that follow on each other, the last one included."""

    grain: Grain
    first: int
    last: int


class Rollups:
    """Reads an organisation's sums for a report that needs no more than some dimensions of them, by the shortest way.

    `now` is the hour that is running.
    """

    def __init__(self, store: Store, organisation: str, needed: Sequence[Dimension], now: int) -> None:
        self._store = store
        self._organisation = organisation
        self._now = now
        self._needed = needed
        self._adder = Adder(organisation, self._reduced)
        self._erasures: bytes | None = None

    def lasting(self, grain: Grain, number: int) -> bool:
        """Whether there may be a rollup: of what has ended, and an hour more, should a store's clock go back."""
        return grain != "hour" and hours(grain, number).stop < self._now and "user" not in self._needed

    async def read(self, run: Run) -> dict[bytes, bytes]:
        """Groups and counters, as groups() has them; a run of more than one is of what lasts.

        Raises StoreUnavailable, and StoreError for what cannot be read.
        """
        grain, first, last = run
        if not self.lasting(grain, last):
            return await groups(self._store, sums_key(self._organisation, grain, first))
        if self._erasures is None:
            # They are told before the sums are read: what is made of sums that change meanwhile is never found again.
            self._erasures = (
                await self._store.call(partial(self._store.client.get, erasures(self._organisation))) or b""
            )
        made = f"{grain}:{first}-{last}:{','.join(self._needed)}:{self._erasures.decode()}"
        key = rollup_key(self._organisation, made)
        kept = await self._get(key)
        if kept is not None:
            try:
                return _decode(kept)
            except msgspec.DecodeError as broken:
                raise StoreError(f"{key} holds no rollup: {broken}. It may be deleted") from broken
        totals: Totals = {}
        whole = 0
        for number in range(first, last + 1):
            found = await (
                groups(self._store, sums_key(self._organisation, grain, number))
                if first == last
                else self.read(Run(grain, number, number))
            )
            whole += len(found)
            await self._adder.add(totals, found)
        rolled = {msgspec.json.encode(place): msgspec.msgpack.encode(total) for place, total in totals.items()}
        if rolled and (grain != "day" or len(rolled) * _WORTH <= whole):
            await self._keep(key, msgspec.msgpack.encode(rolled))
        return rolled

    async def _get(self, key: str) -> bytes | None:
        value: bytes | None = await self._store.call(partial(self._store.client.get, key))
        return value

    def _reduced(self, names: Sequence[str]) -> Place:
        """A group without what is not needed is a group still, with nothing in those places."""
        named = zip(DIMENSIONS, names, strict=True)
        return tuple([name if dimension in self._needed else "" for dimension, name in named][1:])

    async def _keep(self, key: str, rollup: bytes) -> None:
        """Without it the next report takes longer: that a store is full, or can only be read, is no failure of this."""
        with suppress(*Failures):
            async with asyncio.timeout(self._store.deadline):
                await self._store.client.set(key, rollup, ex=_LASTS)


_decode = msgspec.msgpack.Decoder(dict[bytes, bytes]).decode

"""The ledger of an organisation: its rows, oldest first or as they come, and whether the sums are those of its rows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import add
from typing import Any, NamedTuple

import msgspec
import structlog

from gateway.buckets import KEPT_HOURS, bucket, hours
from gateway.errors import StoreUnavailable
from gateway.records import (
    COUNTERS,
    GRAINS,
    ORGANISATIONS,
    Grain,
    UsageRecord,
    counted,
    group_of,
    ledger_stream,
    sums_key,
)
from gateway.rollups import counters_of, groups, running_hour
from gateway.store import Store, leaving
from gateway.topology import Failures

HOUR_MS = 3_600_000
_NEVER_MS = 1 << 62

_PAGE = 1000
_RETRY_SECONDS = 0.5
# A reader waits on a connection of its own, of which a node has few. Where there are more to follow they take turns.
_READERS = 4
_NEWS_MS, _TURN_MS = 2000, 100

_log = structlog.get_logger("gateway.ledger")

Folded = dict[tuple[Grain, int], dict[str, list[int]]]


class Entry(NamedTuple):
    """One row as it stands in the ledger."""

    id: str  # of the stream
    written_ms: int  # since 1970, by the store's clock; of a row whose user was erased, when it was first written
    record: UsageRecord
    erased: bool = False  # whether it stands for a row whose user was erased


async def organisations(store: Store) -> list[str]:
    """Everybody who ever had a reservation. Raises StoreUnavailable."""
    return sorted(name.decode() for name in await store.call(lambda: store.client.smembers(ORGANISATIONS)))


# — rows


async def rows(store: Store, organisation: str, since_ms: int = 0, until_ms: int | None = None) -> AsyncIterator[Entry]:
    """Every row that was written from `since_ms` to before `until_ms`, in the order of the stream: oldest first, but
    rows whose user was erased stand where they were erased. One that cannot be read is logged and left out.

    Raises StoreUnavailable.
    """
    async for page in pages(store, organisation, str(since_ms)):
        for entry in page:
            if isinstance(entry, Entry) and since_ms <= entry.written_ms < (until_ms or _NEVER_MS):
                yield entry


class Unreadable(NamedTuple):
    """An entry of the stream that is no row."""

    id: str
    reason: str


async def pages(
    store: Store, organisation: str, begin: str = "-", last: str = "+"
) -> AsyncIterator[list[Entry | Unreadable]]:
    """The entries of the stream from `begin` to `last`, as XRANGE has them, some at a time. Raises StoreUnavailable."""
    some = partial(store.client.xrange, ledger_stream(organisation), max=last, count=_PAGE)
    while found := await store.call(partial(some, min=begin)):
        yield [_entry(organisation, name, fields) for name, fields in found]
        begin = f"({found[-1][0].decode()}"


def _entry(organisation: str, name: bytes, fields: Mapping[bytes, bytes]) -> Entry | Unreadable:
    entry = name.decode()
    try:
        erased = b"at" in fields
        written = int(fields[b"at"] if erased else entry.partition("-")[0])
        return Entry(entry, written, _decode(fields[b"row"]), erased)
    except (msgspec.DecodeError, ValueError, KeyError) as broken:
        reason = "it has no row" if isinstance(broken, KeyError) else str(broken)
        _log.error("row_unreadable", organisation=organisation, entry=entry, reason=reason)
        return Unreadable(entry, reason)


_decode = msgspec.json.Decoder(UsageRecord).decode


# — as they come


async def follow(store: Store, those: Sequence[str]) -> AsyncGenerator[Entry, None]:
    """The rows of these organisations from now on, for ever; what is written while the store is away comes later.

    Of two organisations, rows may come out of turn. Rows that only lost their user are not told again.
    """
    slots: dict[int, dict[str, str]] = {}  # of each, the streams and what was read of them last
    for organisation in those:
        key = ledger_stream(organisation)
        slots.setdefault(store.slot(key), {})[organisation] = await _latest(store, key)
    news: asyncio.Queue[list[Entry]] = asyncio.Queue(1)  # who reads slowly makes the readers wait, not the memory grow
    turns = asyncio.Semaphore(_READERS)
    block = _NEWS_MS if len(slots) <= _READERS else _TURN_MS
    readers = [asyncio.ensure_future(_tail(store, seen, block, turns, news)) for seen in slots.values()]
    coming: asyncio.Future[list[Entry]] | None = None
    try:
        while readers:
            coming = asyncio.ensure_future(news.get())
            await asyncio.wait((coming, *readers), return_when=asyncio.FIRST_COMPLETED)
            for reader in readers:
                if reader.done():
                    reader.result()  # a reader ends only by what nobody expected
            for entry in await coming:
                yield entry
    finally:
        under_way: list[asyncio.Future[Any]] = [*readers, *([coming] if coming is not None else [])]
        for one in under_way:
            one.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _latest(store: Store, key: str) -> str:
    """The last entry of a stream, as soon as the store says."""
    while True:
        try:
            found = await store.call(lambda: store.client.xrevrange(key, count=1))
        except (*Failures, StoreUnavailable):
            await _again(store)
        else:
            return found[0][0].decode() if found else "0-0"


async def _tail(
    store: Store, seen: dict[str, str], block: int, turns: asyncio.Semaphore, news: asyncio.Queue[list[Entry]]
) -> None:
    """Put what comes into `news`, page by page; `seen` are the organisations of one slot and what was read last."""
    names = {ledger_stream(organisation).encode(): organisation for organisation in seen}
    while not leaving():

        def read() -> Awaitable[Any]:
            after = {ledger_stream(organisation): last for organisation, last in seen.items()}
            found: Awaitable[Any] = store.patient.xread(after, count=_PAGE, block=block)
            return found

        try:
            async with turns:
                found = await store.wait(read)
        except (*Failures, StoreUnavailable):
            await _again(store)
            continue
        for key, page in found.items():
            organisation = names[key]
            seen[organisation] = page[-1][0].decode()
            entries = [_entry(organisation, name, fields) for name, fields in page if b"at" not in fields]
            await news.put([entry for entry in entries if isinstance(entry, Entry)])


async def _again(store: Store) -> None:
    """Until a store that is away is back, and a moment more: many workers, one store."""
    if leaving():
        raise asyncio.CancelledError
    await store.back()
    await asyncio.sleep(random.uniform(0.5, 1.0) * _RETRY_SECONDS)


# — whether the sums are theirs


def fold(entries: Iterable[Entry]) -> Folded:
    """The sums that rows make, for each hour, day and month: what the sums must be equal to."""
    folded: Folded = {}
    for entry in entries:
        hour, group, counters = entry.written_ms // HOUR_MS, group_of(entry.record), counted(entry.record)
        for grain in GRAINS:
            _add(folded.setdefault((grain, bucket(grain, hour)), {}), group, counters)
    return folded


def _add(into: dict[str, list[int]], group: str, counters: Iterable[int]) -> None:
    into[group] = _plus(into.get(group, _NOTHING), counters)


def _plus(some: Iterable[int], more: Iterable[int]) -> list[int]:
    return list(map(add, some, more))


_NOTHING = [0] * len(COUNTERS)


class Difference(NamedTuple):
    """A group of an hour, day or month whose sums are not those of its rows."""

    grain: Grain
    number: int
    group: str
    ledger: tuple[int, ...]  # COUNTERS by the rows
    sums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a comparison found; all is well where there are no differences and nothing is unreadable."""

    rows: int
    hours: int  # that were compared
    differences: list[Difference] = field(default_factory=list)
    unreadable: int = 0


async def reconcile(store: Store, organisation: str) -> Reconciled:
    """Fold the ledger and compare it with the sums of all hours, days and months of which it holds every row.

    Nothing has to stand still: what is written meanwhile is no difference. Only an erasure at the same time may look
    like one. A ledger that was trimmed is compared from the hour after its first row, which is the first that is whole;
    one that never was from the beginning of its first month, so that sums without rows are found there, too.

    Raises StoreUnavailable, and StoreError for sums that cannot be read.
    """
    stream = await _stream(store, organisation)
    compared = _Comparison(store, organisation, stream.first_hour, await running_hour(store))
    await compared.read(stream.last)
    last = await _latest(store, ledger_stream(organisation))
    await compared.read_on(stream.last, last)
    after = await _stream(store, organisation)
    if stream.gone > compared.moved or after.first_hour > stream.first_hour:
        compared.begin = max(compared.begin, after.first_hour + 1)
    return compared.result()


class _Stream(NamedTuple):
    """What a stream says of itself at one moment."""

    first_hour: int  # of what is there; where nothing is, of what was written last
    last: str  # the entry that was written last
    gone: int  # entries that are not there any more: trimmed, or replaced


async def _stream(store: Store, organisation: str) -> _Stream:
    key = ledger_stream(organisation)
    if not await store.call(lambda: store.client.exists(key)):
        return _Stream(await running_hour(store), "0-0", 0)
    about = await store.call(lambda: store.client.xinfo_stream(key))
    last = about["last-generated-id"].decode()
    first = about["first-entry"][0].decode() if about["first-entry"] else last
    return _Stream(_hour(first), last, about["entries-added"] - about["length"])


def _hour(entry: str) -> int:
    return int(entry.partition("-")[0]) // HOUR_MS


class _Comparison:
    """One pass over a stream in the order of time. An hour is compared when the pass has left it, and so are days and
    months: no more than the groups of one of each are held.

    What differs then is kept apart, for two kinds of rows that come later. Rows of a past hour whose user was erased
    make up for it, or do not. Of what is written while the running hour is read, its sums hold the first rows, and
    nobody says how many: there is a place in the stream up to which both are equal.
    """

    def __init__(self, store: Store, organisation: str, first_hour: int, now: int) -> None:
        self._store = store
        self._organisation = organisation
        self._now = now
        self._at = hours("month", bucket("month", first_hour)).start  # the first hour that is not compared yet
        self._open: dict[Grain, dict[str, list[int]]] = {grain: {} for grain in GRAINS}
        self._apart: dict[tuple[Grain, int, str], tuple[list[int], list[int]]] = {}  # by the rows, by the sums
        self._rows = 0
        self._unreadable = 0
        self.begin = max(self._at, now - KEPT_HOURS + 1)  # what is older does not count
        self.moved = 0  # rows whose user was erased

    async def read(self, last: str) -> None:
        """Compare everything up to this entry, and what is running."""
        async for entry in self._entries("-", last):
            await self._reach(_hour(entry.id))
            self._take(entry)
        await self._reach(self._now)
        for grain in GRAINS:
            await self._compare(grain, bucket(grain, self._at))
        self._at += 1

    async def read_on(self, after: str, last: str) -> None:
        """Rows that were written while that was read: they explain a difference, and make none."""
        async for entry in self._entries(f"({after}", last):
            for key in self._places(entry):
                if key in self._apart:
                    by_rows, by_sums = self._apart.pop(key)
                    by_rows = _plus(by_rows, counted(entry.record))
                    if by_rows != by_sums:
                        self._apart[key] = (by_rows, by_sums)

    def result(self) -> Reconciled:
        differences = [
            Difference(grain, number, group, tuple(by_rows), tuple(by_sums))
            for (grain, number, group), (by_rows, by_sums) in sorted(self._apart.items())
            if by_rows != by_sums and hours(grain, number).start >= self.begin
        ]
        return Reconciled(self._rows, max(0, self._at - self.begin), differences, self._unreadable)

    async def _entries(self, begin: str, last: str) -> AsyncIterator[Entry]:
        async for page in pages(self._store, self._organisation, begin, last):
            for entry in page:
                if isinstance(entry, Unreadable):
                    self._unreadable += 1
                else:
                    self._rows += 1
                    yield entry

    async def _reach(self, hour: int) -> None:
        """Compare what has ended before this hour."""
        while self._at < hour:
            ended, self._at = self._at, self._at + 1
            for grain in GRAINS:
                if bucket(grain, ended) != bucket(grain, self._at):
                    await self._compare(grain, bucket(grain, ended))

    def _take(self, entry: Entry) -> None:
        self.moved += entry.erased
        for grain, number, group in self._places(entry):
            if number == bucket(grain, self._at):
                _add(self._open[grain], group, counted(entry.record))
            else:
                by_rows, by_sums = self._apart.get((grain, number, group), (_NOTHING, _NOTHING))
                self._apart[grain, number, group] = _plus(by_rows, counted(entry.record)), by_sums

    def _places(self, entry: Entry) -> Iterable[tuple[Grain, int, str]]:
        hour, group = entry.written_ms // HOUR_MS, group_of(entry.record)
        return [(grain, bucket(grain, hour), group) for grain in GRAINS]

    async def _compare(self, grain: Grain, number: int) -> None:
        folded, self._open[grain] = self._open[grain], {}
        key = sums_key(self._organisation, grain, number)
        found = await groups(self._store, key)
        kept = dict(
            zip(
                (name.decode() for name in found),
                map(list, counters_of(self._organisation, found.values())),
                strict=True,
            )
        )
        for group in folded.keys() | kept.keys():
            by_rows, by_sums = folded.get(group, _NOTHING), kept.get(group, _NOTHING)
            if by_rows != by_sums:
                self._apart[grain, number, group] = by_rows, by_sums

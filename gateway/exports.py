"""Exports: every row of every ledger, at least once, to wherever it is wanted (delivery.py: what a sink is).

An export is a consumer group of its name on the stream of each organisation. Whoever runs it under a consumer name of
his own takes a part of the work; what he has to remember is in the store: a row that is handed out is pending there
until the sink has it, with the number of times that it was tried.

    new → handed out → delivered → acknowledged
                     → the sink is away: not counted, tried again as long as it takes
                     → the sink refuses it: stays pending, and is tried again when it is due; of a run that is to end
                       once all is delivered, by a later run
                     → who had it is gone: tried again by whoever comes, or by himself when he is back
                     → tried `attempts` times: a dead letter, and acknowledged

So a row that is refused and one that kills whoever delivers it end in the same place, by one count that outlives them.
What is tried again is tried alone: nothing but the row itself is counted, and nothing else waits for it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, NamedTuple

import msgspec
import structlog
from redis.exceptions import ResponseError

from gateway.delivery import Rejected, Row, Sink, Unavailable
from gateway.errors import StoreUnavailable
from gateway.ledger import organisations
from gateway.records import UsageRecord, dead_letters, ledger_stream
from gateway.store import Script, Store, leaving

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # of a sink that is away; they double
_LONGEST_WISH = 300.0  # the longest pause that a sink may ask for
_NEWS_MS = 1000  # the most that a read waits for news, and so the most that a stop takes whose cancellation is lost
_GLANCE_MS = 100  # the same where it waits for nothing but what somebody else has in his hands
_NOTICE_EVERY = 2.0  # seconds until a new organisation is noticed
_LEAVE_WITHIN = 10.0  # seconds that whoever is told to leave waits for the batch that is under way
_MOST_STREAMS = 1000  # of one read
_PAGE = 100  # entries of one reading of what is pending, dead or not counted
_LONGEST_ERROR = 200

_log = structlog.get_logger("gateway.exports")
_decode = msgspec.json.Decoder(UsageRecord).decode


class Progress(NamedTuple):
    """How far an export is: rows delivered by this run, and rows that were still to do when it last looked."""

    done: int
    left: int


class _Taken(NamedTuple):
    """A row that is pending under this consumer's name."""

    stream: str
    row: Row


class Exporter:
    """One who runs an export. `consumer` is his name, the same again after a restart; nobody else has it meanwhile.

    `batch` rows are delivered at once at most, each is tried `attempts` times (at least twice if whoever had it died),
    and `claim_after` seconds after it was last tried a row is due again, whoever had it: longer than a delivery takes.
    Rows are `hold_back` seconds old before they are delivered: a store that is killed may forget younger ones, and be
    told of them in other words.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        sink: Sink,
        *,
        consumer: str,
        batch: int,
        attempts: int,
        claim_after: float = 60.0,
        hold_back: float = 0.0,
    ) -> None:
        self._store = store
        self._client = store.client
        self._name = name
        self._sink = sink
        self._consumer = consumer
        self._batch = batch
        self._attempts = attempts
        self._claim_after = claim_after
        self._hold_back = hold_back
        self._absence = _Absence(name)
        self._bury_script = Script("bury")
        self._known: set[str] = set()  # organisations
        self._lines: list[list[str]] = []  # of their streams, as far as they are streams; one line is one read
        self._full: set[str] = set()  # streams that had as much as was read
        self._unacknowledged: dict[str, list[str]] = defaultdict(list)  # entries by stream, which the sink has
        self._notice_at = 0.0
        self._due_at = 0.0  # when to look for what is due again
        self._resuming = True  # look for what was handed out to this consumer, too: he may not know of it
        self._once = False
        self._refusals: dict[str, set[str]] = defaultdict(set)  # of a run with `once`, which leaves these entries
        self._done = 0
        self._left = 0

    @property
    def refused(self) -> int:
        """How many rows the sink has refused in a run with `once`."""
        return sum(map(len, self._refusals.values()))

    def __repr__(self) -> str:
        return f"<Exporter {self._name}, {self._done} rows delivered>"

    async def run(self, *, once: bool = False, told: Callable[[Progress], None] | None = None) -> None:
        """Deliver rows for ever, or with `once` until everything is delivered, refused or buried that is there now.

        A store or a sink that is away is waited for. Whoever is cancelled ends the batch that is under way, within some
        seconds. The sink is opened and closed here; what it raises besides Rejected and Unavailable is raised.
        """
        ends: dict[str, str] | None = None
        self._once = once
        async with aclosing(self._sink):
            await self._open()
            while not leaving():
                try:
                    await self._notice(counting=told is not None)
                    if once and ends is None:
                        ends = await self._ends()
                    found = await self._round(once, told)
                    if ends is not None and not await self._to_do(ends):
                        return
                    if not found and not self._lines:
                        await asyncio.sleep(_NEWS_MS / 1000)
                except StoreUnavailable:
                    await self._store.back()
                    await self._begin_again()
                except ResponseError as refusal:  # a group or a stream is gone, or something else stands in its place
                    _log.warning("export_interrupted", export=self._name, reason=_short(str(refusal)))
                    self._unacknowledged.clear()
                    await self._begin_again()

    async def _open(self) -> None:
        while True:
            try:
                return await self._sink.open()
            except Unavailable as away:
                await self._absence.pause(away)

    async def _begin_again(self) -> None:
        """What was read and not delivered is still pending, and found again."""
        self._known.clear()
        self._full.clear()
        self._notice_at, self._resuming = 0.0, True
        await asyncio.sleep(random.uniform(0.5, 1.0))

    async def _round(self, once: bool, told: Callable[[Progress], None] | None) -> int:
        """One look at everything; how many rows were found. Where nothing is to do it waits for news."""
        before, found = self._done, 0
        await self._acknowledge()
        found += await self._take_over(once)
        for line in self._lines:
            count = max(1, self._batch // len(line))
            wait = None if found or self._full else max(1, (_GLANCE_MS if once else _NEWS_MS) // len(self._lines))
            news = await self._news(line, count, wait)
            self._full |= {stream for stream, entries in news.items() if len(entries) == count}
            found += await self._deliver(news, 1)
        for stream in sorted(self._full):
            news = await self._news([stream], self._batch, None)
            if len(news.get(stream, ())) < self._batch:
                self._full.discard(stream)
            found += await self._deliver(news, 1)
        if told is not None and self._done > before:
            told(Progress(self._done, max(0, self._left)))
        return found

    # — what there is

    async def _notice(self, *, counting: bool) -> None:
        """Take in organisations that are new. In a cluster, streams of one slot stand in one line."""
        if time.monotonic() < self._notice_at:
            return
        streams = [stream for line in self._lines for stream in line] if self._known else []
        for organisation in await organisations(self._store):
            if organisation not in self._known:
                self._known.add(organisation)
                if await _begin(self._store, organisation, self._name):
                    streams.append(ledger_stream(organisation))
        slots = defaultdict(list)
        for stream in streams:
            slots[self._store.slot(stream)].append(stream)
        self._lines = [
            slot[first : first + _MOST_STREAMS]
            for slot in slots.values()
            for first in range(0, len(slot), _MOST_STREAMS)
        ]
        if counting:
            self._left = sum([await self._behind(stream) for stream in streams])
        self._notice_at = time.monotonic() + _NOTICE_EVERY

    async def _behind(self, stream: str) -> int:
        group = await _group(self._store, stream, self._name)
        return 0 if group is None else (await _lag(self._store, stream, group))[0] + int(group["pending"])

    async def _ends(self) -> dict[str, str]:
        """The last entry that each stream has now."""
        ends = {}
        for stream in (stream for line in self._lines for stream in line):
            last = await self._store.call(partial(self._client.xrevrange, stream, count=1))
            if last:
                ends[stream] = last[0][0].decode()
        return ends

    async def _to_do(self, ends: dict[str, str]) -> bool:
        """Whether one of these entries, or one before it, is not delivered yet and was not refused in this run. What is
        done leaves the dict."""
        for stream, end in list(ends.items()):
            group = await _group(self._store, stream, self._name)
            if group is None or _number(group["last-delivered-id"].decode()) < _number(end):
                return True
            refused = self._refusals[stream]
            pending = partial(self._client.xpending_range, stream, self._name, "-", end, len(refused) + 1)
            if any(one["message_id"].decode() not in refused for one in await self._store.call(pending)):
                return True
            del ends[stream]
        return False

    async def _news(self, streams: Sequence[str], count: int, wait_ms: int | None) -> dict[str, list[Any]]:
        """Entries that nobody was given yet, by stream; so many of each at most."""
        read = partial(
            self._store.patient.xreadgroup,
            self._name,
            self._consumer,
            dict.fromkeys(streams, ">"),
            count=count,
            block=wait_ms,
        )
        return {stream.decode(): entries for stream, entries in (await self._store.wait(read)).items()}

    async def _take_over(self, once: bool) -> int:
        """Try again what is due; at the beginning, and after an absence of the store, what this consumer had, too.

        `once`: what he had is due whenever he looks.
        """
        found = 0
        if not self._resuming and not once and time.monotonic() < self._due_at:
            return found
        self._due_at = time.monotonic() + self._claim_after / 2
        for stream in (stream for line in self._lines for stream in line):
            if self._resuming or once:
                found += await self._resume(stream, 0, {"consumername": self._consumer})
            idle = int(self._claim_after * 1000)
            found += await self._resume(stream, idle, {"idle": idle})
        self._resuming = False
        return found

    async def _resume(self, stream: str, least_idle: int, whose: dict[str, Any]) -> int:
        """Try pending rows of a stream again: alone, except those that were given back untried."""
        after, found = b"-", 0
        while pending := await self._store.call(
            partial(self._client.xpending_range, stream, self._name, after, b"+", min(_PAGE, self._batch), **whose)
        ):
            after = b"(" + pending[-1]["message_id"]
            pending = [one for one in pending if one["message_id"].decode() not in self._refusals[stream]]
            found += len(pending)
            untried = [one["message_id"] for one in pending if not one["times_delivered"]]
            if untried:
                await self._deliver({stream: await self._claim(stream, untried, least_idle)}, 1)
            for one in pending:
                entry, tried = one["message_id"], one["times_delivered"]
                if tried >= max(2, self._attempts):
                    await self._bury(stream, entry.decode(), f"tried {tried} times, and whoever had it never came back")
                elif tried:
                    await self._deliver({stream: await self._claim(stream, [entry], least_idle)}, tried + 1)
        return found

    async def _claim(self, stream: str, entries: Sequence[bytes], least_idle: int) -> list[Any]:
        """Take pending entries over, and count it. One that was erased is forgotten, one that somebody else has taken
        or acknowledged meanwhile is left to him."""
        claimed = await self._store.call(
            partial(self._client.xclaim, stream, self._name, self._consumer, least_idle, entries)
        )
        return list(claimed)

    # — delivery

    async def _deliver(self, news: dict[str, list[Any]], tried: int) -> int:
        """Hand entries over that were handed out now, and `tried` times with that; how many there are."""
        taken = []
        for stream, entries in news.items():
            for entry, fields in entries:
                try:
                    taken.append(_Taken(stream, _row(entry.decode(), fields)))
                except (msgspec.MsgspecError, ValueError) as unreadable:
                    await self._bury(stream, entry.decode(), f"cannot be read: {unreadable}")
        taken = await self._kept(taken)
        for first in range(0, len(taken), self._batch):
            await self._hand_over(taken[first : first + self._batch], tried)
        return sum(map(len, news.values()))

    async def _kept(self, taken: list[_Taken]) -> list[_Taken]:
        """Those of these rows that are still there when they are as old as what a store may forget."""
        youngest = max((int(row.entry.partition("-")[0]) for _, row in taken), default=0)
        wait = self._hold_back - (time.time() - youngest / 1000)
        if wait <= 0:
            return taken
        await asyncio.sleep(min(wait, self._hold_back))
        there: set[tuple[str, str]] = set()
        for stream in {one.stream for one in taken}:
            entries = [one.row.entry for one in taken if one.stream == stream]
            some = partial(self._client.xrange, stream, min=entries[0], max=entries[-1])
            there |= {(stream, entry.decode()) for entry, _ in await self._store.call(some)}
        return [one for one in taken if (one.stream, one.row.entry) in there]

    async def _hand_over(self, taken: list[_Taken], tried: int) -> int:
        """How many of these rows the sink has, after all was tried that can be now."""
        try:
            return await self._insist(taken, tried)
        except Rejected as refusal:
            if len(taken) > 1:
                accepted = sum([await self._hand_over([one], tried) for one in taken])
                if not accepted:  # then it is rather the sink that is wrong; new rows would all end as dead letters
                    await self._absence.pause(Unavailable(f"none of {len(taken)} rows was taken"))
                return accepted
            await self._refused(taken[0], tried, str(refusal))
            return 0

    async def _insist(self, taken: list[_Taken], tried: int) -> int:
        """Deliver, however long the sink is away. That time is not counted, and the rows stay in these hands."""
        while taken:
            try:
                await _to_the_end(self._attempt(taken))
                return len(taken)
            except Unavailable as away:
                await self._hold(taken, tried - 1)
                await self._absence.pause(away)
                taken = await self._hold(taken, tried)
            except asyncio.CancelledError:
                with suppress(StoreUnavailable, ResponseError):  # it was not their fault
                    await self._hold(taken, tried - 1)
                raise
        return 0

    async def _attempt(self, taken: list[_Taken]) -> None:
        await self._sink.deliver([one.row for one in taken])
        self._absence.over()
        for stream, row in taken:
            self._unacknowledged[stream].append(row.entry)
        self._done += len(taken)
        self._left -= len(taken)
        await self._acknowledge()

    async def _acknowledge(self) -> None:
        for stream in list(self._unacknowledged):
            entries = self._unacknowledged[stream]
            await self._store.call(partial(self._client.xack, stream, self._name, *entries))
            del self._unacknowledged[stream]

    async def _hold(self, taken: Iterable[_Taken], tried: int) -> list[_Taken]:
        """Which of these are still pending; they are as if tried so many times, and last tried now."""
        streams = defaultdict(list)
        for stream, row in taken:
            streams[stream].append(row.entry)
        held = set()
        for stream, entries in streams.items():
            hold = partial(self._client.xclaim, stream, self._name, self._consumer, 0, entries)
            answer = await self._store.call(partial(hold, retrycount=tried, justid=True))
            held |= {(stream, entry.decode()) for entry in answer}
        return [one for one in taken if (one.stream, one.row.entry) in held]

    async def _refused(self, one: _Taken, tried: int, reason: str) -> None:
        if self._once:
            self._refusals[one.stream].add(one.row.entry)
        if tried >= self._attempts:
            await self._bury(one.stream, one.row.entry, reason)
            return
        _log.warning(
            "export_row_refused",
            export=self._name,
            entry=one.row.entry,
            id=one.row.record.id,
            attempt=tried,
            attempts=self._attempts,
            reason=_short(reason),
        )

    async def _bury(self, stream: str, entry: str, reason: str) -> None:
        words = (self._name, entry, _short(reason))
        log = _log.bind(export=self._name, stream=stream, entry=entry)
        try:
            if await self._store.run(self._bury_script, (stream, f"{stream}:dead:{self._name}"), words):
                log.error("export_row_buried", reason=_short(reason))
        except ResponseError as refusal:  # something else stands there: it stays pending, and holds nothing else up
            log.error("export_row_not_buried", reason=_short(str(refusal)))


class _Absence:
    """A sink that is away: it is left alone for longer and longer, and the log says when that begins and ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None
        self._pause = _FIRST_PAUSE

    async def pause(self, away: Unavailable) -> None:
        if self._since is None:
            self._since, self._pause = time.monotonic(), _FIRST_PAUSE
            _log.error("export_sink_away", export=self._name, reason=_short(str(away)))
        wish = min(away.retry_after or 0.0, _LONGEST_WISH)
        await asyncio.sleep(max(wish, self._pause * random.uniform(0.5, 1.0)))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def over(self) -> None:
        if self._since is not None:
            _log.info("export_sink_back", export=self._name, seconds=round(time.monotonic() - self._since, 3))
            self._since = None


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do it, and let it come to its end when whoever waits is cancelled, unless that takes too long."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,), timeout=_LEAVE_WITHIN)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


def _row(entry: str, fields: dict[bytes, bytes]) -> Row:
    """An entry of the ledger as a sink gets it. Raises MsgspecError and ValueError."""
    text = fields.get(b"row")
    if text is None:
        raise ValueError("it has no field `row`")
    return Row(entry, int(fields.get(b"at") or _number(entry)[0]), _decode(text), text)


def _number(entry: str) -> tuple[int, int]:
    """An id, as what compares."""
    ms, _, place = entry.partition("-")
    return int(ms), int(place)


def _short(reason: str) -> str:
    return " ".join(reason.split())[:_LONGEST_ERROR]


# — what there is to say of exports, and to do to them


class ExportStanding(msgspec.Struct, frozen=True):
    """How far an export is in the ledger of one organisation."""

    export: str
    organisation: str
    lag: int  # rows that nobody was given yet
    exact: bool  # whether `lag` is counted: after rows were erased or trimmed the store may not know it
    pending: int  # rows that were handed out, and are not acknowledged
    oldest_ms: int | None  # since 1970, of the oldest row that is not acknowledged
    dead: int


class Buried(msgspec.Struct, frozen=True):
    """A dead letter."""

    organisation: str
    id: str  # of the dead letter
    entry: str  # of the row
    error: str
    row: str  # as stored


async def standings(store: Store) -> list[ExportStanding]:
    """How far every export is, by organisation and name. Raises StoreUnavailable."""
    return [
        await _standing(store, organisation, group)
        for organisation in await organisations(store)
        for group in await _groups(store, ledger_stream(organisation))
    ]


async def ensure(store: Store, whose: Iterable[str], names: Iterable[str]) -> None:
    """See to it that every export has its group everywhere, from the first row on. Raises StoreUnavailable."""
    names = list(names)
    for organisation in whose:
        for name in names:
            await _begin(store, organisation, name)


async def forget(store: Store, name: str) -> int:
    """Forget an export that nobody runs or needs any more, with its dead letters; in how many organisations it was.

    One that begins under this name again gets every row again. Raises StoreUnavailable.
    """
    forgotten = 0
    for organisation in await organisations(store):
        stream = ledger_stream(organisation)
        if await _group(store, stream, name):
            forgotten += await store.call(partial(store.client.xgroup_destroy, stream, name))
        await store.call(partial(store.client.delete, dead_letters(organisation, name)))
    return forgotten


async def buried(store: Store, name: str) -> list[Buried]:
    """The dead letters of an export, oldest first in each organisation. Raises StoreUnavailable."""
    found = []
    for organisation in await organisations(store):
        after = b"-"
        read = partial(store.client.xrange, dead_letters(organisation, name), count=_PAGE)
        while letters := await store.call(partial(read, min=after)):
            after = b"(" + letters[-1][0]
            for letter, fields in letters:
                words = [fields.get(field, b"").decode(errors="replace") for field in (b"entry", b"error", b"row")]
                found.append(Buried(organisation, letter.decode(), *words))
    return found


async def revive(store: Store, name: str) -> int:
    """Put dead letters back for delivery, as if they were new; how many.

    Those whose row has left the ledger meanwhile remain: they are its only copy. Raises StoreUnavailable.
    """
    revived, begun = 0, {}
    # Pending since 1970 and untried: whoever looks next for what is due takes it.
    claim = partial(
        store.client.xclaim,
        groupname=name,
        consumername="revived",
        min_idle_time=0,
        time=0,
        retrycount=0,
        force=True,
        justid=True,
    )
    for letter in await buried(store, name):
        stream = ledger_stream(letter.organisation)
        if letter.organisation not in begun:
            begun[letter.organisation] = await _group(store, stream, name) is not None
        # Whoever is interrupted between the two has it delivered, and still among the dead.
        if begun[letter.organisation] and await store.call(partial(claim, stream, message_ids=[letter.entry])):
            revived += await store.call(partial(store.client.xdel, dead_letters(letter.organisation, name), letter.id))
    return revived


async def _begin(store: Store, organisation: str, name: str) -> bool:
    """See to it that an export has a group there; False where its key holds something else."""
    stream = ledger_stream(organisation)
    try:
        await store.call(partial(store.client.xgroup_create, stream, name, "0", mkstream=True))
    except ResponseError as refusal:
        if not str(refusal).startswith("BUSYGROUP"):
            _log.error("export_without_ledger", export=name, organisation=organisation, reason=_short(str(refusal)))
            return False
    return True


async def _groups(store: Store, stream: str) -> list[dict[str, Any]]:
    """The groups of a stream; none where there is no stream."""
    try:
        return list(await store.call(partial(store.client.xinfo_groups, stream)))
    except ResponseError:
        return []


async def _group(store: Store, stream: str, name: str) -> dict[str, Any] | None:
    return next((group for group in await _groups(store, stream) if group["name"] == name.encode()), None)


async def _standing(store: Store, organisation: str, group: dict[str, Any]) -> ExportStanding:
    stream, name = ledger_stream(organisation), group["name"].decode()
    lag, exact = await _lag(store, stream, group)
    oldest = None
    if group["pending"]:
        oldest = (await store.call(partial(store.client.xpending, stream, name)))["min"]
    elif lag:
        rest = await store.call(partial(store.client.xrange, stream, b"(" + group["last-delivered-id"], count=1))
        oldest = rest[0][0] if rest else None
    dead = await store.call(partial(store.client.xlen, dead_letters(organisation, name)))
    oldest_ms = None if oldest is None else _number(oldest.decode())[0]
    return ExportStanding(name, organisation, lag, exact, group["pending"], oldest_ms, dead)


async def _lag(store: Store, stream: str, group: dict[str, Any]) -> tuple[int, bool]:
    """How many rows nobody of a group was given yet, and whether that is exact.

    Where the store does not know, a few are counted, and many are estimated by where they lie between the first row and
    the last.
    """
    if group["lag"] is not None:
        return int(group["lag"]), True
    after = group["last-delivered-id"]
    rest = await store.call(partial(store.client.xrange, stream, b"(" + after, count=_PAGE))
    if len(rest) < _PAGE:
        return len(rest), True
    whole = await store.call(partial(store.client.xinfo_stream, stream))
    first, last = (_number(whole[end][0].decode())[0] for end in ("first-entry", "last-entry"))
    share = (last - _number(rest[0][0].decode())[0]) / max(1, last - first)
    return max(_PAGE, round(whole["length"] * share)), False

"""Requests that have ended: each is settled once, now or when the store is back, whoever dies meanwhile.

What the store has not acknowledged is written to the worker's spool before anybody sees the end of an answer, and sent
again until it is acknowledged: the scripts know a request by its id, so that sending twice counts once. What stands in
the spool of a worker that has died is settled by another one of the same folder.

A store that is lost may forget the last seconds of what it acknowledged (its file is written once a second, and a
replica lags behind): these are sent again when it is back, as if nobody knew whether they had arrived.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Container
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import redis.exceptions
import structlog

from gateway.ends import DEAD, UNRESERVED, Begun, End, Progressed, encode, end_of, left_in
from gateway.errors import StoreUnavailable
from gateway.intents import correction, correction_id
from gateway.records import UsageRecord, ledger_stream
from gateway.spool import Orphan, Spool, SpoolError, adopt
from gateway.store import Coalesced, Script, Store, leaving
from gateway.terms import Charge, used
from gateway.usage import Usage

# How long a given-up id is remembered: what is still on its way arrives far sooner, and whoever sends again does so
# while it is alive. And a settled one, of which there are many: who sends later than that looks into the ledger first.
_MARK, _SETTLED = 3600.0, 120.0
_LONG_AGO = -math.inf  # of what a dead worker has left: nobody knows when
_LOOK_AFTER = 90.0
_SKEW = 600.0  # seconds by which a gateway's clock may differ from the store's
_BATCH, _ROUND, _PAGE = 64, 2048, 100  # a page arrives within the deadline of a store that is busy
_AGAIN = 0.2  # seconds
_NOTED = 16  # at a time, some 2 ms
# What a store that is lost may have forgotten of what it acknowledged, in seconds: Valkey puts off writing its file for
# up to two while the disk is busy.
FORGETS = 5.0
# About 1.5 KiB each. Whoever would add one more is refused before a backend is asked: what is not written down is lost.
MOST = 100_000

_INTERRUPTED, _ABSENT, _UNWRITTEN = 2, 0, -1
_log = structlog.get_logger("gateway.admission")


# Told that of a charge in a window a threshold (1, 2 …) was reached, with what is used now.
Reached = Callable[[str, Charge, int, int, int], None]


class _Kept:
    """An end that the store has not acknowledged. `since` (by _now, None: not yet) is from when on it may have been
    settled, by whomever; `numbers` are its records in the spool; `corrects` is the end that is settled when this one
    is."""

    __slots__ = ("corrects", "end", "numbers", "orphan", "since")

    def __init__(self, end: End, orphan: _Orphaned | None = None, since: float | None = None) -> None:
        self.corrects: _Kept | None = None
        self.end = end
        self.orphan = orphan
        self.since = since
        self.numbers: list[int] = []


class _Orphaned:
    """The spool of a worker that has died, until all that stands in it is settled."""

    def __init__(self, orphan: Orphan, left: int) -> None:
        self.orphan = orphan
        self.left = left


class Settlements:
    """What one worker has to tell the store of requests that have ended."""

    def __init__(self, store: Store, spool: Spool, reached: Reached) -> None:
        self._store = store
        self._spool = spool
        self._reached = reached
        self._settle = Coalesced(store, Script("settle"), (int(_MARK * 1000), int(_SETTLED * 1000)))
        self._pending: dict[str, _Kept] = {}
        self._late: dict[str, None] = {}  # of these, whom the store did not answer; the next one first
        self._notes: dict[str, list[int]] = {}  # of requests under way that are noted in the spool
        self._orphans: dict[str, _Orphaned] = {}  # that are adopted, and those of which a file is kept
        self._settled: deque[tuple[float, _Kept]] = deque()  # in the last seconds, with when that was
        self._doubts: list[_Kept] = []  # that the store may have forgotten, and that are not noted yet
        self._losses = store.losses

    def __len__(self) -> int:
        """How many requests the store has not acknowledged."""
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    @property
    def full(self) -> bool:
        adopted = sum(orphaned.left for orphaned in self._orphans.values())
        return len(self._pending) - adopted >= MOST

    @property
    def organisations(self) -> set[str]:
        """Whose requests these are."""
        return {kept.end.organisation for kept in self._pending.values()}

    @property
    def unwritable(self) -> str:
        """Why the spool cannot be written; nothing where it can."""
        return self._spool.failure

    @property
    def unkept(self) -> str:
        """Why the spool takes nothing; nothing where it does."""
        return self._spool.failure or ("the spool is full" if self._spool.full else "")

    # — one that ends

    def send(self, end: End, *, again: bool = False) -> asyncio.Future[list[Any]]:
        """Settle now. When the future is done, what the store said has been looked at; what failed is sent later."""
        kept = self._pending.get(end.id)
        if kept is None:
            kept = self._pending[end.id] = _Kept(end)
        _may_be_settled(kept)
        answer: asyncio.Future[list[Any]] = self._settle(end.item if again else end.short)
        answer.add_done_callback(partial(self._answered, kept, again))
        return answer

    def later(self, end: End) -> None:
        """Settle when the store is back. Meanwhile somebody who sees the store may settle it as a dead worker's."""
        _may_be_settled(self._pending.setdefault(end.id, _Kept(end)))
        self._late[end.id] = None

    async def keep(self, request_id: str) -> None:
        """Return when an end that is not acknowledged is in the spool. Without one it is in memory only."""
        kept = self._pending.get(request_id)
        if kept is None:
            return
        end = kept.end
        try:
            number = await self._spool.append(encode(end.record()))
        except SpoolError as failure:
            _log.error("not_spooled", request_id=request_id, reason=str(failure))
            return
        if self._pending.get(request_id) is kept:
            kept.numbers.append(number)
        else:
            self._spool.done(number)

    def _answered(self, kept: _Kept, again: bool, answer: asyncio.Future[list[Any]]) -> None:
        end = kept.end
        reason = "not awaited" if answer.cancelled() else repr(answer.exception() or "")
        if answer.cancelled() or answer.exception() is not None or answer.result()[0] == _UNWRITTEN:
            if end.id in self._pending:
                self._late.pop(end.id, None)  # it goes behind those that may be settled
                self._late[end.id] = None
                if not again:
                    _log.warning("settle_later", request_id=end.id, reason=reason.strip("'") or "the ledger's key")
            return
        status, *more = answer.result()
        if status == _INTERRUPTED:
            self._correct(kept, more[0].decode())
            return
        if status == _ABSENT and not again and end.row:
            _log.error("settled_before", request_id=end.id)
        self._acknowledged(kept)
        for place, number, used_now in zip(more[0::3], more[1::3], more[2::3], strict=True):
            if end.charges:
                charge, window = end.charges[place - 1]
                self._reached(end.organisation, charge, number, used_now, window)

    def _acknowledged(self, kept: _Kept) -> None:
        end = kept.end
        if self._pending.get(end.id) is not kept:  # it was before, or somebody knows more of it by now
            return
        del self._pending[end.id]
        self._late.pop(end.id, None)
        self.forget(end.id)
        for number in kept.numbers:
            self._spool.done(number)
        if kept.orphan is not None:
            kept.orphan.left -= 1
            if not kept.orphan.left:
                self._release(kept.orphan)
        if kept.corrects is not None:
            self._acknowledged(kept.corrects)
        if end.row:
            self._doubt()  # before anything is forgotten here that the store may have forgotten
            now = time.monotonic()
            self._settled.append((now, kept))
            while now - self._settled[0][0] > FORGETS:
                self._settled.popleft()

    def _correct(self, kept: _Kept, text: str) -> None:
        """Its worker was taken for dead. If it was not, write down the difference to what was charged then; until that
        is settled the end is not, so that it is found again if this worker dies now."""
        end = kept.end
        if end.flags & DEAD:
            self._acknowledged(kept)
            return
        late, charged = (msgspec.json.decode(row, type=UsageRecord) for row in (end.row, text))
        more = []
        before, after = _usage(charged), _usage(late)
        for count, key, (kind, _, _, _, *rest) in zip(end.counts, end.item[0][3:], end.corrections, strict=True):
            if kind != "s":
                units = used(count, after, late.price) - used(count, before, charged.price)
                more.append((key, (kind, max(0, units), 0, 0, *rest)))
        _log.warning("interrupted_before", request_id=end.id)
        row = correction(late, charged)
        self._late.pop(end.id, None)
        self.send(end_of(row.id, end.organisation, row, more, flags=UNRESERVED), again=True)
        self._pending[row.id].corrects = kept

    # — one that is under way without the store

    def begin(self, request_id: str, organisation: str, intent: str) -> None:
        """Note a request before it is served, so that it is written down even if this worker dies. Raises
        SpoolError."""
        number = self._spool.note(encode(Begun(request_id, organisation, intent)))
        self._notes[request_id] = [number]

    def noted(self, request_id: str) -> bool:
        return request_id in self._notes

    def progress(self, request_id: str, progress: str) -> None:
        """Note how far it has come, as well as that can be."""
        notes = self._notes.get(request_id)
        if notes is not None and progress and not self._spool.full:
            with suppress(SpoolError):
                notes.append(self._spool.note(encode(Progressed(request_id, progress))))
                for number in notes[1:-1]:
                    self._spool.done(number)
                del notes[1:-1]

    def forget(self, request_id: str) -> None:
        """The store knows of it now."""
        for number in self._notes.pop(request_id, ()):
            self._spool.done(number)

    # — what is left over

    async def keep_up(self) -> None:
        """Send again what was not acknowledged, for ever."""
        while not leaving():
            self._doubt()
            await self._note_doubts()
            try:
                if not self._store.away:
                    await self.catch_up()
            except (StoreUnavailable, redis.exceptions.ResponseError) as failure:
                _log.warning("settle_later", requests=len(self), reason=type(failure).__name__)
            except Exception:  # a defect: whoever stopped here would settle nothing more
                _log.exception("settlements_failed")
            await asyncio.sleep(_AGAIN)

    async def catch_up(self) -> None:
        """Send again some of what was not acknowledged, as long as the store answers. Raises StoreUnavailable."""
        late = [self._pending[name] for name in list(self._late)[:_ROUND] if name in self._pending]
        await self._look_up([kept for kept in late if _stale(kept)])
        for start in range(0, len(late), _BATCH):
            if self._store.away:
                return
            some = late[start : start + _BATCH]
            answers = [self.send(kept.end, again=True) for kept in some if kept.end.id in self._late]
            if answers:
                await asyncio.wait(answers)

    def _doubt(self) -> None:
        """Where the store was lost, what it acknowledged shortly before it may have forgotten."""
        if self._losses == self._store.losses:
            return
        self._losses = self._store.losses
        since = self._store.lost - FORGETS
        for at, before in self._settled:
            end = before.end
            if at >= since and end.id not in self._pending:
                # It may be settled for longer than it is acknowledged: its mark may be gone by now.
                kept = self._pending[end.id] = _Kept(end, since=before.since)
                self._late[end.id] = None
                self._doubts.append(kept)
        self._settled.clear()

    async def _note_doubts(self) -> None:
        """Note those in the spool, some at a time, lest this worker dies before it can tell the store again."""
        doubts, self._doubts = self._doubts, []
        for number, kept in enumerate(doubts):
            if number % _NOTED == _NOTED - 1:
                await asyncio.sleep(0)
            if kept.end.id in self._pending:
                with suppress(SpoolError):
                    kept.numbers.append(self._spool.note(encode(kept.end.record())))

    async def _look_up(self, doubted: list[_Kept]) -> None:
        """Acknowledge those that stand in the ledger: the marks that would tell are gone. Raises StoreUnavailable."""
        by_organisation: dict[str, list[_Kept]] = {}
        for kept in doubted:
            by_organisation.setdefault(kept.end.organisation, []).append(kept)
        for organisation, some in by_organisation.items():
            received = min(msgspec.json.decode(kept.end.row, type=_Received).received_ms for kept in some)
            names = {kept.end.id for kept in some}
            since = int(received - _SKEW * 1000)
            found = await self._rows(organisation, names | {correction_id(name) for name in names}, since)
            for kept in some:
                row = found.get(kept.end.id)
                if row is None:
                    continue
                interrupted = msgspec.json.decode(row, type=UsageRecord).status == "interrupted"
                if interrupted and correction_id(kept.end.id) not in found:
                    self._correct(kept, row.decode())
                else:
                    self._acknowledged(kept)

    async def _rows(self, organisation: str, ids: set[str], first_ms: int) -> dict[str, bytes]:
        """The rows of these requests, of those that were written since then."""
        found: dict[str, bytes] = {}
        after = f"{max(0, first_ms)}"
        some = partial(self._store.client.xrange, ledger_stream(organisation), count=_PAGE)
        while entries := await self._store.call(partial(some, min=after)):
            after = f"({entries[-1][0].decode()}"
            for _, fields in entries:
                row: bytes = fields.get(b"row", b"")
                with suppress(msgspec.DecodeError):  # what cannot be read is nobody's
                    if (name := msgspec.json.decode(row, type=_Named).id) in ids:
                        found[name] = row
        return found

    async def adopt(self, folder: Path) -> None:
        """Take over what workers of this folder have left that died."""
        for orphan, found in await asyncio.to_thread(_adopted, folder, set(self._orphans)):
            for damage in (*orphan.damaged, *orphan.refused):
                where = {"file": damage.file.name, "offset": damage.offset, "lost": damage.lost}
                _log.error("spool_damaged", **where, reason=damage.why)
            ends = [end for end in found if self._knows_less(end)]
            _log.warning("spool_adopted", spool=orphan.name, requests=len(ends))
            self._orphans[orphan.name] = orphaned = _Orphaned(orphan, len(ends))
            for end in ends:
                self._pending[end.id] = _Kept(end, orphaned, since=_LONG_AGO)
                self._late[end.id] = None
            if not ends:
                self._release(orphaned)

    def _knows_less(self, end: End) -> bool:
        """Whether it is not pending here, or only as what was known of a dead worker's request."""
        kept = self._pending.get(end.id)
        return kept is None or bool(kept.end.flags & DEAD and not end.flags & DEAD)

    def _release(self, orphaned: _Orphaned) -> None:
        """All of it is settled."""
        try:
            orphaned.orphan.done()
        except SpoolError as failure:
            _log.error("spool_not_removed", spool=orphaned.orphan.name, reason=str(failure))
            return
        if orphaned.orphan.empty:
            orphaned.orphan.close()
            del self._orphans[orphaned.orphan.name]

    async def finish(self) -> None:
        """Settle what is left, as far as the store lets; the rest stays in the spool."""
        self._late = dict.fromkeys(self._pending)
        left = len(self._late) + 1
        with suppress(StoreUnavailable, redis.exceptions.ResponseError):
            while len(self._late) < left and self._late and not self._store.away:
                left = len(self._late)
                await self.catch_up()
        left_over = [name for name, kept in self._pending.items() if not kept.numbers and kept.orphan is None]
        await asyncio.gather(*map(self.keep, left_over))
        if self._pending:
            _log.error("not_settled", requests=len(self._pending))


class _Received(msgspec.Struct):
    received_ms: int


class _Named(msgspec.Struct):
    id: str


def _adopted(folder: Path, known: Container[str]) -> list[tuple[Orphan, list[End]]]:
    """Spools that are adopted, and what they leave to be settled. One that cannot be read waits for another time."""
    found = []
    for orphan in adopt(folder, known):
        try:
            found.append((orphan, left_in(orphan.records())))
        except OSError as error:
            orphan.close()
            _log.error("spool_unreadable", spool=orphan.name, reason=str(error))
    return found


def _now() -> float:
    """Seconds on a clock that nobody sets, and that goes on while a machine sleeps: as a store's marks lapse."""
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _may_be_settled(kept: _Kept) -> None:
    """From now on; sending it again changes nothing of that."""
    if kept.since is None:
        kept.since = _now()


def _stale(kept: _Kept) -> bool:
    """Whether it may have been settled so long ago that its mark is gone."""
    return bool(kept.end.row) and kept.since is not None and _now() - kept.since > _LOOK_AFTER


def _usage(row: UsageRecord) -> Usage:
    return Usage(row.input_tokens, row.output_tokens, row.cached_tokens, row.reasoning_tokens)

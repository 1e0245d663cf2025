"""Admission: every limit of a request or none, in one trip; and one trip to give back what was not used.

A Lease is an admitted request. It ends exactly once, however the block around it is left, and its end is settled
before whoever waits for it goes on: settlements.py. While the store is away each worker enforces its share of the
limits, by what the store last said: shares.py. What was served so is settled when the store is back.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

import msgspec
import redis.exceptions
import structlog

from gateway.counts import UNKNOWN_WINDOW, corrected, running_window, taken
from gateway.ends import UNRESERVED, End, end_of, live_key, reservation_key
from gateway.errors import Dialect, GatewayError, InternalError, StoreUnavailable
from gateway.intents import Charges, Intent
from gateway.records import ORGANISATIONS, UsageRecord
from gateway.refusals import Refusals, share_spent
from gateway.settlements import Reached, Settlements
from gateway.shares import Shares
from gateway.snapshot import Limit
from gateway.spool import Spool, SpoolError
from gateway.standings import DEGRADED, Standing, standings_of
from gateway.store import Coalesced, Script, Store, StoreAway, leaving
from gateway.terms import Charge, Terms
from gateway.usage import Progress

# A seat outlives its worker by so much, and so does a request; a live one is renewed three times in it. So does a
# worker's share.
SEAT_LEASE = 15.0
_RENEW_EVERY = SEAT_LEASE / 3
_BEAT_EVERY = 1.0  # and so long a worker may think that there are fewer workers than there are
# Until a worker comes to sweep what others have left; nobody serves longer than that without one.
_RESERVATION = 30 * 86_400.0
_GLANCE = 0.2  # between two looks whether that is due
_WORKERS = "{gateway}:workers"

_log = structlog.get_logger("gateway.admission")


class Admissible(Protocol):
    """A request that can be admitted. When it has ended, it says what is written down and what was used."""

    id: str
    terms: Terms

    @property
    def dialect(self) -> Dialect: ...

    def end(self, error: BaseException | None) -> None: ...

    def intent(self, charges: Charges) -> Intent: ...

    def progress(self) -> Progress | None: ...

    def record(self) -> UsageRecord: ...

    def used(self, limit: Limit) -> int: ...


class Lease:
    """An admitted request, and where its caller stands."""

    __slots__ = ("_admission", "asked", "degraded", "id", "request", "since", "standings", "terms")

    def __init__(self, admission: Admission, request: Admissible) -> None:
        self._admission = admission
        self.request = request
        self.id = request.id
        self.terms = request.terms
        self.standings: tuple[Standing, ...] = ()
        self.asked = self.since = 0.0  # when it was asked for, and given, in time.monotonic()
        self.degraded = False  # whether it was given without the store

    async def __aenter__(self) -> Lease:
        self.asked = time.monotonic()
        self.standings = await self._admission.take(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.request.end(error)
        await self._admission.settle(self)


class Admission:
    """All that is decided in the store. One for each worker. `reached` is told of thresholds, see Settlements."""

    def __init__(self, store: Store, spool: Spool, reached: Reached) -> None:
        self._store = store
        self._reached = reached
        self._admit = Coalesced(store, Script("admit"), (int(SEAT_LEASE * 1000), int(_RESERVATION * 1000)))
        self.settlements = Settlements(store, spool, reached)
        self._renew, self._beat = Script("renew"), Script("beat")
        self._worker = os.urandom(8).hex()
        self._live: dict[str, Lease] = {}
        self._seats: Counter[str] = Counter()  # that live requests have from the store, by the key of the count
        self._refusals = Refusals()
        self._shares = Shares()
        self._renewed = 0.0
        self._told = [0, 0]  # how many workers there are, and which of them this one is
        self._organisations: dict[str, bool] = {}  # that were admitted, and whether the store has been told of each

    def __repr__(self) -> str:
        return f"<Admission {len(self._live)} live, {len(self.settlements)} not settled yet>"

    @property
    def unsettled(self) -> int:
        """How many ended requests the store has not acknowledged."""
        return len(self.settlements)

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and every one that has ended is settled."""
        return not self._live and not self.settlements

    @property
    def first(self) -> bool:
        """Whether this worker is the one that does what one of them has to do."""
        return self._told[0] > 0 and self._told[1] == 0

    def admit(self, request: Admissible) -> Lease:
        """The lease of a request, to be entered. Entering raises RateLimited, QuotaExhausted or StoreUnavailable."""
        return Lease(self, request)

    def has_ledger(self, organisation: str) -> None:
        """See to it that the store knows of an organisation: its ledger is looked after and shown from then on."""
        self._organisations.setdefault(organisation, False)

    async def take(self, lease: Lease) -> tuple[Standing, ...]:
        """Take every limit of a lease, or none."""
        terms = lease.terms
        if self.settlements.full:
            raise StoreUnavailable("too many ended requests wait for the store of keys and limits", retry_after=1)
        again = self._refusals.again(terms.charges, lease.asked, lease.request.dialect)
        if again is not None:
            raise again
        organisation, charges = terms.organisation, terms.charges
        self.has_ledger(organisation)
        keys = [reservation_key(organisation, lease.id), live_key(organisation), *(charge.key for charge in charges)]
        try:
            answer = await self._admit((keys, (lease.id, _intent(lease), [taken(charge) for charge in charges])))
        except StoreUnavailable as away:
            return self._take_share(lease, away)
        except asyncio.CancelledError:
            self._give_up(lease)  # it may have been taken all the same
            raise
        except redis.exceptions.ResponseError as refusal:
            raise InternalError("the store refused the admission script") from refusal
        verdict, binding, wait, soonest, *rows = answer
        standings = standings_of(terms.charges, rows)
        lease.since = time.monotonic()
        self._shares.saw(standings, lease.since)
        if verdict not in (_ADMITTED, _REPEATED):
            raise self._refusal(lease, verdict, standings, binding - 1, wait / 1e6, soonest / 1e6)
        self._begin(lease, standings, rows[4::5])
        return standings

    def _begin(self, lease: Lease, standings: tuple[Standing, ...], flags: Iterable[int]) -> None:
        self._live[lease.id] = lease
        for standing, flag in zip(standings, flags, strict=True):
            charge = standing.charge
            if flag > 1:
                used = charge.limit.capacity - standing.remaining
                self._reached(lease.terms.organisation, charge, flag >> 1, used, standing.window)
            if not standing.over and charge.limit.returns:
                self._refusals.returns.take(charge.key, lease.id, charge.amount, lease.since)
                if charge.limit.kind == "seats":
                    self._seats[charge.key] += 1

    def _refusal(
        self, lease: Lease, verdict: int, standings: tuple[Standing, ...], binding: int, wait: float, soonest: float
    ) -> GatewayError:
        if verdict == _GIVEN_UP:
            return StoreUnavailable("the store of keys and limits answered too late", retry_after=1)
        if verdict == _FOREIGN:
            charge = standings[binding].charge
            _log.error("foreign_count", limit=charge.limit.name, count=charge.key)
            return InternalError(
                f"the count of the limit {charge.limit.name} cannot be read: its key holds something else"
            )
        charges, dialect = lease.terms.charges, lease.request.dialect
        return self._refusals.refuse(charges, standings, binding, wait, soonest, lease.since, dialect)

    # — without the store

    def _take_share(self, lease: Lease, away: StoreUnavailable) -> tuple[Standing, ...]:
        """The same by what this worker may give while the store is away."""
        terms, now = lease.terms, time.monotonic()
        refused: GatewayError = StoreUnavailable(away.message, retry_after=away.retry_after)  # `away` is others', too
        sent = not isinstance(away, StoreAway)  # it may have been taken all the same
        if not terms.closed:
            standings, refusing, wait = self._shares.admit(lease.id, terms.charges, self._seats, now)
            if refusing is None and self._noted(lease):
                lease.since, lease.degraded = now, True
                self._live[lease.id] = lease
                return standings
            if refusing is None:
                self._shares.settle(lease.id, terms.charges, [0] * len(terms.charges), now)
                refused = StoreUnavailable("what is used cannot be written down now", retry_after=1)
            else:
                refused = share_spent(standings, refusing, wait, lease.request.dialect)
        if sent:
            self._give_up(lease)
        refused.extra_headers = [*refused.extra_headers, DEGRADED]
        raise refused from away

    def _noted(self, lease: Lease) -> bool:
        """Write down a request that the store does not know of; false where that has to be and cannot."""
        try:
            if self.settlements.unkept:
                raise SpoolError(self.settlements.unkept)
            self.settlements.begin(lease.id, lease.terms.organisation, _intent(lease))
        except SpoolError as failure:
            if lease.terms.billed:
                return False
            _log.error("not_noted", request_id=lease.id, reason=str(failure))
        return True

    # — the end

    async def settle(self, lease: Lease) -> None:
        """Give back what was not used and write the row; returns when the store has, or the spool."""
        del self._live[lease.id]
        used = [0 if standing.over else lease.request.used(standing.charge.limit) for standing in lease.standings]
        now = time.monotonic()
        forgotten = lease.since < self._store.since  # it was away since, and may have forgotten what it admitted
        end, cancelled = _settlement(lease, used, forgotten), False
        if lease.degraded:
            self._shares.settle(lease.id, lease.terms.charges, used, now)
            self.settlements.later(end)
        else:
            self._give_back(lease, used, now)
            if self._store.away:
                self._shares.settle(lease.id, lease.terms.charges, used, now)
                self.settlements.later(end)
            else:
                sent = self.settlements.send(end)
                cancelled = await _shielded(sent, self._store.deadline, lease.since - lease.asked)
        if end.id in self.settlements:
            cancelled |= await _shielded(asyncio.ensure_future(self.settlements.keep(end.id)))
        if cancelled:
            raise asyncio.CancelledError

    def _give_back(self, lease: Lease, used: Sequence[int], now: float) -> None:
        for standing, amount in zip(lease.standings, used, strict=True):
            charge = standing.charge
            if not standing.over and charge.limit.returns:
                self._refusals.returns.give(charge.key, lease.id, amount, now)
                if charge.limit.kind == "seats":
                    self._seats[charge.key] -= 1
                    if not self._seats[charge.key]:
                        del self._seats[charge.key]

    def _give_up(self, lease: Lease) -> None:
        charges = [(charge, UNKNOWN_WINDOW) for charge in lease.terms.charges if not charge.limit.shadow]
        words = [(charge.key, corrected(charge, 0, UNKNOWN_WINDOW)) for charge, _ in charges]
        self.settlements.send(end_of(lease.id, lease.terms.organisation, None, words, charges=charges), again=True)

    async def finish(self) -> None:
        """Settle what is left, as far as the store lets."""
        await self.settlements.finish()

    # — what goes on beside

    async def keep_up(self) -> None:
        """Renew live requests and this worker's place among all, for ever."""
        beaten = 0.0
        while not leaving():
            now = time.monotonic()
            try:
                if not self._store.away:
                    if now - beaten >= _BEAT_EVERY:
                        beaten = now
                        await self._stay(now)
                elif now - self._renewed >= _RENEW_EVERY or self._renewed < self._store.lost:
                    self._renewed = now
                    for lease in self._live.values():
                        self._note_progress(lease)
            except (StoreUnavailable, redis.exceptions.ResponseError) as failure:
                _log.warning("not_renewed", live=len(self._live), reason=type(failure).__name__)
            except Exception:  # a defect: whoever stopped here would be taken for dead
                _log.exception("renewal_failed")
            await asyncio.sleep(_GLANCE)

    def _note_progress(self, lease: Lease) -> None:
        """What the store cannot be told of a request, and may forget of it."""
        with suppress(SpoolError):
            if not self.settlements.noted(lease.id):
                self.settlements.begin(lease.id, lease.terms.organisation, _intent(lease))
            self.settlements.progress(lease.id, _progress(lease))

    async def _stay(self, now: float) -> None:
        told = await self._store.run(self._beat, [_WORKERS], [self._worker, int(SEAT_LEASE * 1000)])
        # After an absence the first one to come back sees nobody else yet.
        self._shares.workers, self._shares.rank = max(told, self._told)
        self._told = told
        if self._renewed < self._store.since:  # it has been away, or has just been opened: it may have forgotten
            self._renewed = 0.0
            self._organisations = dict.fromkeys(self._organisations, False)
        fresh = [name for name, known in self._organisations.items() if not known]
        if fresh:
            await self._store.call(lambda: self._store.client.sadd(ORGANISATIONS, *fresh))
            self._organisations.update(dict.fromkeys(fresh, True))
        due = [lease for lease in self._live.values() if self._due(lease, now)]
        if now - self._renewed >= _RENEW_EVERY and await self._renew_live(due):
            self._renewed = now

    def _due(self, lease: Lease, now: float) -> bool:
        """Whether a lease would lapse before it is renewed next time; and what came to be without the store is told."""
        return lease.degraded or not self._renewed or now - lease.since >= _RENEW_EVERY

    async def _renew_live(self, leases: Iterable[Lease], *, unknown: bool = False) -> bool:
        """Renew these; false where the store did not answer for some."""
        by_slot: dict[int, list[Lease]] = {}
        for lease in leases:
            by_slot.setdefault(self._store.slot(live_key(lease.terms.organisation)), []).append(lease)
        batches = [held[i : i + _RENEWED] for held in by_slot.values() for i in range(0, len(held), _RENEWED)]
        lapsed, swept, all_answered = 0, 0, True
        forgotten: list[Lease] = []
        for batch in batches:
            some = [lease for lease in batch if lease.id in self._live]
            try:
                answers = await self._renewed_all(some, unknown=unknown)
            except StoreUnavailable:  # a slow moment of one batch is not the others'
                all_answered = False
                continue
            for lease, answer in zip(some, answers, strict=True):
                if answer >= 0:
                    lapsed += answer
                    self.settlements.forget(lease.id)
                elif answer == _NOT_KNOWN:
                    forgotten.append(lease)
                else:
                    swept += lease.id in self._live
        if lapsed:
            _log.warning("seats_lapsed", seats=lapsed)
        if swept:
            _log.warning("requests_lapsed", requests=swept)
        if forgotten and not unknown:
            all_answered &= await self._renew_live(forgotten, unknown=True)
        return all_answered

    async def _renewed_all(self, leases: Sequence[Lease], *, unknown: bool) -> list[int]:
        """What renew.lua says of each; of those that are not known it is told all."""
        keys: list[str] = []
        words = []
        for lease in leases:
            organisation = lease.terms.organisation
            seats = [s.charge.key for s in lease.standings if s.charge.limit.kind == "seats" and not s.over]
            keys += (reservation_key(organisation, lease.id), live_key(organisation), *seats)
            words.append((lease.id, _progress(lease), len(seats), _intent(lease) if unknown else ""))
        told = (msgspec.msgpack.encode(words), int(SEAT_LEASE * 1000), int(_RESERVATION * 1000))
        answers: list[int] = await self._store.run(self._renew, keys, told)
        return answers


# What renew.lua says of a request.
_NOT_KNOWN = -2
_RENEWED = 200  # requests in one script

_ADMITTED, _REPEATED, _GIVEN_UP, _FOREIGN = 1, 2, 3, 4


async def _shielded(answer: asyncio.Future[Any], deadline: float = math.inf, waited: float = 0.0) -> bool:
    """Wait for an answer whatever happens, as long as the deadline of its request lets. Returns whether the caller has
    left meanwhile. The store's own deadline bounds an answer; only who has waited before has less time than that."""
    cancelled = False
    ends = asyncio.get_running_loop().time() + deadline - waited if waited > deadline / 10 else None
    while not answer.done():
        left = None if ends is None else ends - asyncio.get_running_loop().time()
        if left is not None and left <= 0:
            break
        try:
            if left is None:
                await asyncio.shield(answer)
            else:
                await asyncio.wait((answer,), timeout=left)
        except asyncio.CancelledError:
            cancelled = True
        except Exception:
            break  # it is looked at by Settlements
    return cancelled


def _intent(lease: Lease) -> str:
    """What is known of a request before it is sent: enough to settle it without its worker."""
    charges = [charge for charge in lease.terms.charges if not charge.limit.shadow]
    told = tuple((c.key, c.limit.count, corrected(c, c.amount, UNKNOWN_WINDOW)) for c in charges)
    return msgspec.json.encode(lease.request.intent(told)).decode()


def _progress(lease: Lease) -> str:
    progress = lease.request.progress()
    return "" if progress is None else msgspec.json.encode(progress).decode()


def _settlement(lease: Lease, used: Sequence[int], forgotten: bool) -> End:
    """What ends a lease, which the store may have forgotten: its row, what the sums grow by, and what becomes of every
    charge."""
    needed: list[tuple[Charge, int, int]] = []
    as_taken: list[tuple[Charge, int, int]] = []
    for standing, amount in zip(lease.standings, used, strict=True):
        charge = standing.charge
        window = running_window(charge.limit) if lease.degraded else standing.window
        if not standing.over:
            idle = amount == charge.amount and not charge.limit.holds and not lease.degraded and not forgotten
            (as_taken if idle else needed).append((charge, amount, window))
    corrections = [*needed, *as_taken]
    return end_of(
        lease.id,
        lease.terms.organisation,
        lease.request.record(),
        [(charge.key, corrected(charge, amount, window)) for charge, amount, window in corrections],
        charges=[(charge, window) for charge, _, window in corrections],
        flags=UNRESERVED if lease.degraded else 0,
        needed=len(needed),
    )

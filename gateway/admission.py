"""Admission: every limit of a request or none, in one trip; and one trip to give back what was not used.

A Lease is an admitted request. It ends exactly once, however the block around it is left, and its end is settled
before whoever waits for it goes on: settlements.py. While the store is away each worker enforces its share of the
limits, by what the store last said: shares.py. What was served so is settled when the store is back.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol

import msgspec
import redis.exceptions
import structlog

from gateway.counts import UNKNOWN_WINDOW, Words, corrected, running_window, taken
from gateway.errors import Dialect, GatewayError, InternalError, RateLimited, StoreUnavailable
from gateway.refusals import POLITE, Refusals
from gateway.settlements import End, Reached, Settlements
from gateway.shares import Shares
from gateway.snapshot import Limit
from gateway.standings import DEGRADED, Standing, standing_headers
from gateway.store import Arg, Coalesced, Script, Store, StoreAway, leaving
from gateway.terms import Charge, Terms
from gateway.usage import UsageRecord

# A seat outlives its worker by so much; a live one is renewed three times in it. So does a worker's share.
SEAT_LEASE = 15.0
_RENEW_EVERY = SEAT_LEASE / 3
_BEAT_EVERY = 1.0  # and so long a worker may think that there are fewer workers than there are
# Longer than any answer may take: a reservation that is never settled ends by itself.
_RESERVATION = 86_400.0
_SETTLE_AGAIN = 0.2
_WORKERS = "{gateway}:workers"

_log = structlog.get_logger("gateway.admission")


class Admissible(Protocol):
    """A request that can be admitted. When it has ended, it says what is written down and what was used."""

    id: str
    terms: Terms

    @property
    def dialect(self) -> Dialect: ...

    def end(self, error: BaseException | None) -> None: ...

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

    def __init__(self, store: Store, reached: Reached) -> None:
        self._store = store
        self._reached = reached
        self._admit = Coalesced(store, Script("admit"), (int(SEAT_LEASE * 1000), int(_RESERVATION * 1000)))
        self._look = Coalesced(store, Script("admit"), (0, 0))  # no admission waits in one trip with these
        self._settlements = Settlements(store, reached)
        self._renew, self._beat = Script("renew"), Script("beat")
        self._worker = os.urandom(8).hex()
        self._live: dict[str, Lease] = {}
        self._seats: Counter[str] = Counter()  # that live requests have from the store, by the key of the count
        self._refusals = Refusals()
        self._shares = Shares()
        self._renewed = 0.0
        self._told = [0, 0]  # how many workers there are, and which of them this one is

    def __repr__(self) -> str:
        return f"<Admission {len(self._live)} live, {len(self._settlements)} not settled yet>"

    @property
    def unsettled(self) -> int:
        """How many ended requests the store has not acknowledged."""
        return len(self._settlements)

    @property
    def idle(self) -> bool:
        """Whether no request is under way, and every one that has ended is settled."""
        return not self._live and not self._settlements

    def admit(self, request: Admissible) -> Lease:
        """The lease of a request, to be entered. Entering raises RateLimited, QuotaExhausted or StoreUnavailable."""
        return Lease(self, request)

    async def look(self, organisation: str, charges: Sequence[Charge]) -> tuple[Standing, ...]:
        """Where these counts stand; nothing is taken. Raises StoreUnavailable."""
        keys = [_reservation(organisation, ""), *(charge.key for charge in charges)]
        _, _, _, _, *rows = await self._look((keys, ("", "", [taken(charge) for charge in charges])))
        return _standings(charges, rows)

    async def take(self, lease: Lease) -> tuple[Standing, ...]:
        """Take every limit of a lease, or none."""
        terms = lease.terms
        if self._settlements.full:
            raise StoreUnavailable("too many ended requests wait for the store of keys and limits", retry_after=1)
        again = self._refusals.again(terms.charges, lease.asked, lease.request.dialect)
        if again is not None:
            raise again
        keys = [_reservation(terms.organisation, lease.id), *(charge.key for charge in terms.charges)]
        try:
            answer = await self._admit((keys, (lease.id, _intent(lease), [taken(charge) for charge in terms.charges])))
        except StoreUnavailable as away:
            return self._take_share(lease, away)
        except asyncio.CancelledError:
            self._give_up(lease)  # it may have been taken all the same
            raise
        except redis.exceptions.ResponseError as refusal:
            raise InternalError("the store refused the admission script") from refusal
        verdict, binding, wait, soonest, *rows = answer
        standings = _standings(terms.charges, rows)
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
            if not standing.over and (charge.limit.holds or charge.limit.kind == "seats"):
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
            if refusing is None:
                lease.since, lease.degraded = now, True
                self._live[lease.id] = lease
                return standings
            refused = _share_spent(standings, refusing, wait, lease.request.dialect)
        if sent:
            self._give_up(lease)
        refused.extra_headers = [*refused.extra_headers, DEGRADED]
        raise refused from away

    # — the end

    async def settle(self, lease: Lease) -> None:
        """Give back what was not used and write the row; returns when the store has, or cannot now."""
        del self._live[lease.id]
        used = [0 if standing.over else lease.request.used(standing.charge.limit) for standing in lease.standings]
        now = time.monotonic()
        end = _settlement(lease, used)
        if lease.degraded:
            self._shares.settle(lease.id, lease.terms.charges, used, now)
            self._settlements.later(end)
            return
        for standing, amount in zip(lease.standings, used, strict=True):
            charge = standing.charge
            if not standing.over and (charge.limit.holds or charge.limit.kind == "seats"):
                self._refusals.returns.give(charge.key, lease.id, amount, now)
                if charge.limit.kind == "seats":
                    self._seats[charge.key] -= 1
                    if not self._seats[charge.key]:
                        del self._seats[charge.key]
        if self._store.away:
            self._settlements.later(end)
            self._shares.settle(lease.id, lease.terms.charges, used, now)
        elif await _shielded(self._settlements.send(end), self._store.deadline, lease.since - lease.asked):
            raise asyncio.CancelledError

    def _give_up(self, lease: Lease) -> None:
        charges = [(charge, UNKNOWN_WINDOW) for charge in lease.terms.charges if not charge.limit.shadow]
        words = [corrected(charge, 0, UNKNOWN_WINDOW) for charge, _ in charges]
        self._settlements.send(_end(lease, charges, words, "", "", ()), again=True)

    async def finish(self) -> None:
        """Settle what is left, as far as the store lets."""
        await self._settlements.finish()

    # — what goes on beside

    async def keep_up(self) -> None:
        """Renew the seats of live requests and this worker's place among all, and send again what was not acknowledged,
        for ever."""
        beaten = 0.0
        while not leaving():
            if not self._store.away:
                await self._settlements.catch_up()
            now = time.monotonic()
            if now - beaten >= _BEAT_EVERY and not self._store.away:
                beaten = now
                await self._stay(now)
            await asyncio.sleep(_SETTLE_AGAIN)

    async def _stay(self, now: float) -> None:
        try:
            told = await self._store.run(self._beat, [_WORKERS], [self._worker, int(SEAT_LEASE * 1000)])
            # After an absence the first one to come back sees nobody else yet.
            self._shares.workers, self._shares.rank = max(told, self._told)
            self._told = told
            if now - self._renewed >= _RENEW_EVERY:
                self._renewed = now
                await self._renew_seats(now)
        except (StoreUnavailable, redis.exceptions.ResponseError) as failure:
            _log.warning("seats_not_renewed", live=len(self._live), reason=type(failure).__name__)

    async def _renew_seats(self, now: float) -> None:
        held: dict[int, list[tuple[str, Lease]]] = {}
        for lease in self._live.values():
            if now - lease.since >= _RENEW_EVERY:  # of one that is degraded, where it was admitted all the same
                batch = held.setdefault(self._store.slot(_reservation(lease.terms.organisation, "")), [])
                charges = (s.charge for s in lease.standings if s.charge.limit.kind == "seats" and not s.over)
                batch += ((charge.key, lease) for charge in charges)
        lapsed = 0
        for batch in held.values():
            for start in range(0, len(batch), 500):
                some = batch[start : start + 500]
                keys = [k for key, lease in some for k in (key, _reservation(lease.terms.organisation, lease.id))]
                ids: list[Arg] = [lease.id for _, lease in some]
                kept = await self._store.run(self._renew, keys, [int(SEAT_LEASE * 1000), *ids])
                lapsed += sum(answer == 0 for answer in kept)
        if lapsed:
            _log.warning("seats_lapsed", seats=lapsed)


_ADMITTED, _REPEATED, _GIVEN_UP, _FOREIGN = 1, 2, 3, 4


async def _shielded(answer: asyncio.Future[list[int]], deadline: float, waited: float) -> bool:
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


_LONGEST_GUESS = 5.0  # seconds; when the store is back nobody knows


def _share_spent(standings: tuple[Standing, ...], bound: Standing, wait: float, dialect: Dialect) -> GatewayError:
    """What a caller is told whom this worker's share of a limit refuses: the limit itself may have room."""
    limit, scope = bound.charge.limit, bound.charge.scope
    text = f"{scope} has used this worker's share of the limit {limit.name}, while the store of limits is away"
    wait = min(max(POLITE, wait), _LONGEST_GUESS)
    headers = standing_headers(standings, bound, dialect)
    return RateLimited(text, retry_after=wait, headers=headers, policies=(limit.name,))


def _standings(charges: Sequence[Charge], rows: Sequence[int]) -> tuple[Standing, ...]:
    """What a script says of each limit: remaining, reset µs, window, held, flags."""
    resets, over = [reset / 1e6 for reset in rows[1::5]], [flags & 1 == 1 for flags in rows[4::5]]
    return tuple(map(Standing, charges, rows[0::5], resets, rows[2::5], rows[3::5], over))


def _reservation(organisation: str, request_id: str) -> str:
    return f"{{{organisation}}}:request:{request_id}"


def _intent(lease: Lease) -> str:
    """What is known of a request before it is sent: enough to settle it without its worker."""
    terms = lease.terms
    charges = [[charge.key, charge.limit.kind, charge.limit.count, charge.amount] for charge in terms.charges]
    intent = {"team": terms.team, "key": terms.key_id, "user": terms.user, "pool": terms.pool, "charges": charges}
    return msgspec.json.encode(intent).decode()


def _counters(record: UsageRecord) -> Words:
    """What the hourly sums grow by, in the order of settle.lua."""
    answered = 0 if record.source == "none" else 1
    return (answered, record.input_tokens, record.cached_tokens, record.output_tokens, record.cost_microusd)


def _settlement(lease: Lease, used: Sequence[int]) -> End:
    """What ends a lease: its row, what the sums grow by, and what becomes of every charge."""
    record = lease.request.record()
    charges: list[tuple[Charge, int]] = []
    words: list[Words] = []
    for standing, amount in zip(lease.standings, used, strict=True):
        charge, window = standing.charge, standing.window
        if lease.degraded:
            window = running_window(charge.limit)
        elif amount == charge.amount and not charge.limit.holds:
            continue  # as it was taken
        if not standing.over:
            charges.append((charge, window))
            words.append(corrected(charge, amount, window))
    return _end(lease, charges, words, msgspec.json.encode(record).decode(), sums_field(record), _counters(record))


def _end(
    lease: Lease, charges: list[tuple[Charge, int]], words: list[Words], row: str, field: str, counters: Words
) -> End:
    organisation = lease.terms.organisation
    keys = [_reservation(organisation, lease.id), ledger_stream(organisation), *(charge.key for charge, _ in charges)]
    item = (keys, (lease.id, row, field, counters, words, int(lease.degraded)))
    return End(lease.id, item, organisation, charges)


def ledger_stream(organisation: str) -> str:
    """The stream of an organisation's usage rows; its hourly sums stand under `<stream>:<hour>`."""
    return f"{{{organisation}}}:usage"


def sums_field(record: UsageRecord) -> str:
    """What the hourly sums are kept by."""
    return msgspec.json.encode([record.team, record.key, record.user or "", record.model]).decode()

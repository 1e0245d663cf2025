"""Admission: every limit of a request or none, in one trip; and one trip to give back what was not used.

A Lease is an admitted request. It ends exactly once, however the block around it is left, and its end is settled
before whoever waits for it goes on. What cannot be settled now is kept and sent again until it is: the scripts know a
request by its id, so that sending twice counts once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol
from zoneinfo import ZoneInfo

import msgspec
import redis.exceptions
import structlog

from gateway.errors import Dialect, GatewayError, InternalError, StoreUnavailable
from gateway.snapshot import Limit, windows_around
from gateway.standings import Standing, refusal
from gateway.store import Arg, Coalesced, Item, Script, Store, StoreAway, leaving
from gateway.terms import Charge, Terms
from gateway.usage import UsageRecord

# A seat outlives its worker by so much; a live one is renewed three times in it.
SEAT_LEASE = 15.0
_RENEW_EVERY = SEAT_LEASE / 3
# Longer than any answer may take: a reservation that is never settled ends by itself.
_RESERVATION = 86_400.0
# How long a given-up id is remembered: an admission that is still on its way arrives far sooner.
_MARK = 60.0
_SETTLE_AGAIN = 0.2

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

    __slots__ = ("_admission", "asked", "id", "request", "since", "standings", "terms")

    def __init__(self, admission: Admission, request: Admissible) -> None:
        self._admission = admission
        self.request = request
        self.id = request.id
        self.terms = request.terms
        self.standings: tuple[Standing, ...] = ()
        self.asked = self.since = 0.0  # when it was asked for, and given, in time.monotonic()

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
    """All that is decided in the store. One for each worker."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._admit = Coalesced(store, Script("admit"), (int(SEAT_LEASE * 1000), int(_RESERVATION * 1000)))
        self._settle = Coalesced(store, Script("settle"), (int(_MARK * 1000),))
        self._renew = Script("renew")
        self._live: dict[str, Lease] = {}
        self._unsettled: dict[str, Item] = {}
        self._late: set[str] = set()  # of these, whom the store did not answer: keep_up() sends them again

    def __repr__(self) -> str:
        return f"<Admission {len(self._live)} live, {len(self._unsettled)} not settled yet>"

    @property
    def unsettled(self) -> int:
        """How many ended requests the store has not acknowledged."""
        return len(self._unsettled)

    def admit(self, request: Admissible) -> Lease:
        """The lease of a request, to be entered. Entering raises RateLimited, QuotaExhausted or StoreUnavailable."""
        return Lease(self, request)

    async def take(self, lease: Lease) -> tuple[Standing, ...]:
        """Take every limit of a lease, or none."""
        terms = lease.terms
        keys = [_reservation(terms, lease.id), *(charge.key for charge in terms.charges)]
        limits = [_KINDS[charge.limit.kind](charge) for charge in terms.charges]
        try:
            verdict, binding, wait, *rows = await self._admit((keys, (lease.id, _intent(lease), limits)))
        except StoreAway:
            raise  # nothing was sent
        except (StoreUnavailable, asyncio.CancelledError):
            # It may have been taken all the same: give it up, whichever comes first.
            self._give_up(lease)
            raise
        except redis.exceptions.ResponseError as refusal:
            raise InternalError("the store refused the admission script") from refusal
        standings = tuple(map(Standing, terms.charges, rows[0::3], [reset / 1e6 for reset in rows[1::3]], rows[2::3]))
        if verdict not in (_ADMITTED, _REPEATED):
            raise _refusal(verdict, standings, binding - 1, wait / 1e6, lease.request.dialect)
        lease.since = time.monotonic()
        self._live[lease.id] = lease
        return standings

    async def settle(self, lease: Lease) -> None:
        """Give back what was not used and write the row; returns when the store has, or cannot now."""
        del self._live[lease.id]
        item = _settlement(lease)
        self._unsettled[lease.id] = item
        answer = self._settle(item)
        cancelled = False
        while not answer.done():
            try:
                with suppress(Exception):  # told below
                    await asyncio.shield(answer)
            except asyncio.CancelledError:  # the caller leaves; the settlement is still waited for, its time is bounded
                cancelled = True
        if not self._acknowledged(lease.id, answer):
            _log.warning("settle_later", request_id=lease.id, reason=repr(answer.exception() or "the ledger's key"))
        elif answer.result() == _ABSENT:  # the store has lost the reservation, and so the row is in the log only
            _log.error("reservation_lost", request_id=lease.id)
        if cancelled:
            raise asyncio.CancelledError

    def _give_up(self, lease: Lease) -> None:
        corrections = [_correction(charge, _UNKNOWN_WINDOW, -charge.amount) for charge in lease.terms.charges]
        self._unsettled[lease.id] = _end(lease, "", "", (), corrections)
        self._store.spawn(self._send_again(lease.id))

    async def _send_again(self, request_id: str) -> None:
        answer = self._settle(self._unsettled[request_id])
        await asyncio.wait((answer,))
        self._acknowledged(request_id, answer)

    def _acknowledged(self, request_id: str, answer: asyncio.Future[int]) -> bool:
        """Whether the store has done what it was told, or had before; if not, keep_up() tells it again."""
        done = answer.exception() is None and answer.result() != _UNWRITTEN
        if done:
            self._unsettled.pop(request_id, None)
        elif request_id in self._unsettled:
            self._late.add(request_id)
        return done

    async def keep_up(self) -> None:
        """Renew the seats of live requests, and send again what was not acknowledged, for ever."""
        renewed = time.monotonic()
        while not leaving():
            await asyncio.sleep(_SETTLE_AGAIN)
            if self._late and not self._store.away:
                late, self._late = self._late, set()
                await asyncio.gather(*map(self._send_again, late))
            if time.monotonic() - renewed >= _RENEW_EVERY:
                renewed = time.monotonic()
                await self._renew_seats(renewed)

    async def _renew_seats(self, now: float) -> None:
        keys: list[str] = []
        ids: list[Arg] = []
        for lease in list(self._live.values()):
            if now - lease.since < _RENEW_EVERY:
                continue
            for charge in lease.terms.charges:
                if charge.limit.kind == "seats":
                    keys += (charge.key, _reservation(lease.terms, lease.id))
                    ids.append(lease.id)
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            try:
                kept = await self._store.run(
                    self._renew, keys[2 * start : 2 * (start + 500)], [int(SEAT_LEASE * 1000), *some]
                )
            except (StoreUnavailable, redis.exceptions.ResponseError) as failure:
                _log.warning("seats_not_renewed", seats=len(some), reason=type(failure).__name__)
                return
            lapsed = sum(answer == 0 for answer in kept)
            if lapsed:
                _log.warning("seats_lapsed", seats=lapsed)

    async def finish(self) -> None:
        """Settle what is left, as far as the store lets; says how much it did not."""
        await asyncio.gather(*map(self._send_again, list(self._unsettled)))
        if self._unsettled:
            _log.error("not_settled", requests=len(self._unsettled))


# — the words of the scripts, see lua/

Words = tuple[str | int, ...]


def _rate(charge: Charge) -> Words:
    limit = charge.limit
    return ("r", charge.amount, limit.capacity, limit.amount, limit.period)


def _quota(charge: Charge) -> Words:
    limit = charge.limit
    assert limit.zone is not None
    return ("q", charge.amount, limit.capacity, *_windows(limit.window, limit.zone))


def _seats(charge: Charge) -> Words:
    return ("s", charge.amount, charge.limit.capacity)


_KINDS: Mapping[str, Callable[[Charge], Words]] = {"rate": _rate, "quota": _quota, "seats": _seats}

_ADMITTED, _REPEATED, _GIVEN_UP, _FOREIGN = 1, 2, 3, 4
_ABSENT, _UNWRITTEN = 0, -1
_UNKNOWN_WINDOW = 0  # of an admission that was never answered

_calendar: dict[tuple[str, str], tuple[int, ...]] = {}


def _windows(window: str, zone: ZoneInfo) -> tuple[int, ...]:
    """Four window starts around now, seconds since 1970; computed anew when the window is over."""
    now = time.time()
    starts = _calendar.get((window, zone.key))
    if starts is None or not starts[1] <= now < starts[2]:
        starts = tuple(int(at.timestamp()) for at in windows_around(window, zone, datetime.fromtimestamp(now, UTC)))
        _calendar[window, zone.key] = starts
    return starts


def _reservation(terms: Terms, request_id: str) -> str:
    return f"{{{terms.organisation}}}:request:{request_id}"


def _intent(lease: Lease) -> str:
    """What is known of a request before it is sent: enough to settle it without its worker."""
    terms = lease.terms
    charges = [[charge.key, charge.limit.kind, charge.limit.count, charge.amount] for charge in terms.charges]
    intent = {"team": terms.team, "key": terms.key_id, "user": terms.user, "pool": terms.pool, "charges": charges}
    return msgspec.json.encode(intent).decode()


def _correction(charge: Charge, window: int, difference: int) -> tuple[str, Words]:
    match charge.limit.kind:
        case "rate":
            return charge.key, ("r", difference, charge.limit.amount, charge.limit.period)
        case "quota":
            return charge.key, ("q", difference, window)
        case "seats":
            return charge.key, ("s",)


def _counters(record: UsageRecord) -> Words:
    """What the hourly sums grow by, in the order of settle.lua."""
    answered = 0 if record.source == "none" else 1
    return (answered, record.input_tokens, record.cached_tokens, record.output_tokens, record.cost_microusd)


def _settlement(lease: Lease) -> Item:
    """What ends a lease: its row, what the sums grow by, and every limit by (used - reserved)."""
    record = lease.request.record()
    corrections = []
    for standing in lease.standings:
        charge = standing.charge
        difference = lease.request.used(charge.limit) - charge.amount
        if difference:
            corrections.append(_correction(charge, standing.window, difference))
    return _end(lease, msgspec.json.encode(record).decode(), sums_field(record), _counters(record), corrections)


def _end(lease: Lease, row: str, field: str, counters: Words, corrections: list[tuple[str, Words]]) -> Item:
    keys = [_reservation(lease.terms, lease.id), ledger_stream(lease.terms.organisation)]
    keys += [key for key, _ in corrections]
    return keys, (lease.id, row, field, counters, [words for _, words in corrections])


def ledger_stream(organisation: str) -> str:
    """The stream of an organisation's usage rows; its hourly sums stand under `<stream>:<hour>`."""
    return f"{{{organisation}}}:usage"


def sums_field(record: UsageRecord) -> str:
    """What the hourly sums are kept by."""
    return msgspec.json.encode([record.team, record.key, record.user or "", record.model]).decode()


def _refusal(
    verdict: int, standings: tuple[Standing, ...], binding: int, wait: float, dialect: Dialect
) -> GatewayError:
    if verdict == _GIVEN_UP:
        return StoreUnavailable("the store of keys and limits answered too late", retry_after=1)
    if verdict == _FOREIGN:
        charge = standings[binding].charge
        _log.error("foreign_count", limit=charge.limit.name, count=charge.key)
        return InternalError(f"the count of the limit {charge.limit.name} cannot be read: its key holds something else")
    return refusal(standings, standings[binding], wait, dialect)

"""Each worker's share of every limit, while the store is away. Pure: who calls brings the time, in monotonic seconds.

What the store last said of a count is divided among the workers that there were: whole units, what cannot be divided
goes to the first ones, so that all shares together are exactly what is shared. What a share may be refilled with is
divided as well. So N workers that saw the same let through, until T seconds after they saw it,

    rates:              at most remaining + rate x T, and at most capacity + rate x T whatever was seen
    quotas, rolling:    at most remaining, and once the capacity for each window that has begun since
    seats:              at most the capacity, and what workers had of the store beyond their share

of what they reserve. Workers that saw different things stay within what the most hopeful one of them saw. What is used
beyond a reservation comes on top, and so does what an earlier absence of the store let through that has not ended yet.
A request that is larger than a worker's share of the capacity waits until the store is back.

A share lives until the store says something newer of its count: a store that comes and goes gives nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from gateway.recent import Recent
from gateway.snapshot import NOMINAL, Limit
from gateway.standings import Standing
from gateway.terms import Charge

_COUNTS = 100_000  # that are remembered, each as it was last seen; and as many shares

_Seen: TypeAlias = tuple[Standing, float]


class _Taken(NamedTuple):
    """What a request was admitted with: when, the seats that it took, and the keys of which it took nothing."""

    at: int
    seats: tuple[Charge, ...] = ()
    left_out: tuple[str, ...] = ()


_BY_THE_STORE = _Taken(-1)


class Shares:
    """What one worker may let through by itself. `workers` is how many there are, `rank` which of them this one is."""

    def __init__(self) -> None:
        self.workers = 1
        self.rank = 0
        self._seen: Recent[str, _Seen] = Recent(_COUNTS)
        self._shares: Recent[str, _Share] = Recent(_COUNTS)
        self._admitted: dict[str, _Taken] = {}  # requests under way
        self._seats: dict[str, int] = {}  # that they hold

    def __repr__(self) -> str:
        return f"<Shares {self.rank + 1}/{self.workers}, {len(self._admitted)} under way>"

    def saw(self, standings: tuple[Standing, ...], now: float) -> None:
        """Note what the store says of each count."""
        put = self._seen.put
        for standing in standings:
            put(standing.charge.key, (standing, now))

    def admit(
        self, id: str, charges: Sequence[Charge], seats: Mapping[str, int], now: float
    ) -> tuple[tuple[Standing, ...], Standing | None, float]:
        """Take every limit of a request out of this worker's shares, or none.

        `seats` says how many seats of each count the requests hold that the store has admitted for this worker. Returns
        where the caller stands; the limit that refuses, of several the one with the longest wait, or None; and that
        wait in seconds, 0 for a seat. A limit in shadow never refuses: one that would is `over`, and is not taken. What
        is `open` while the store is away stands as it was last seen.
        """
        at = _microseconds(now)
        shares = [self._share(charge, seats, at) for charge in charges]
        waits = [share.wait(charge.amount, at) for charge, share in zip(charges, shares, strict=True)]
        decided = list(zip(charges, shares, waits, strict=True))
        refusing = [
            (wait, -place)
            for place, (charge, _, wait) in enumerate(decided)
            if wait is not None and not charge.limit.shadow
        ]
        if not refusing:
            fitting = [(charge, share) for charge, share, wait in decided if wait is None]
            for charge, share in fitting:
                share.take(charge.amount)
            seated = tuple(charge for charge, share in fitting if isinstance(share, _Seats))
            for charge in seated:
                self._seats[charge.key] = self._seats.get(charge.key, 0) + charge.amount
            self._admitted[id] = _Taken(at, seated, tuple(c.key for c, _, wait in decided if wait is not None))
        standings = tuple(
            Standing(charge, *share.tell(at), over=charge.limit.shadow and wait is not None)
            for charge, share, wait in decided
        )
        if not refusing:
            return standings, None, 0.0
        wait, place = max(refusing)
        return standings, standings[-place], wait / 1e6

    def settle(self, id: str, charges: Sequence[Charge], used: Sequence[int], now: float) -> None:
        """Give back what a request did not use, and take what it used beyond its reservation.

        To be told of every request that was admitted here, whenever it ends, and of those that the store admitted and
        that end while it is away.
        """
        at = _microseconds(now)
        taken = self._admitted.pop(id, _BY_THE_STORE)
        for charge in taken.seats:
            self._leave(charge)
        for charge, amount in zip(charges, used, strict=True):
            share = self._shares.get(charge.key)
            if share is not None and charge.key not in taken.left_out:
                share.correct(charge.amount, amount, taken.at, at)

    def _leave(self, charge: Charge) -> None:
        left = self._seats[charge.key] - charge.amount
        if left:
            self._seats[charge.key] = left
        else:
            del self._seats[charge.key]

    def _share(self, charge: Charge, seats: Mapping[str, int], at: int) -> _Share | _Seats | _Open:
        limit, key = charge.limit, charge.key
        seen = self._seen.get(key)
        if limit.when_store_fails == "open":
            return _Open(limit, seen)
        if limit.kind == "seats":
            own = share_of(limit.capacity, self.workers, self.rank)
            return _Seats(own - seats.get(key, 0) - self._seats.get(key, 0))
        share = self._shares.get(key)
        if share is None or (seen is not None and share.seen is not seen):
            share = (_Rate if limit.kind == "rate" else _Quota)(limit, seen, self.workers, self.rank, at)
            self._shares.put(key, share)
        return share


def share_of(whole: int, workers: int, rank: int) -> int:
    """A worker's part of a whole; the parts of all ranks, 0 to workers - 1, sum to it."""
    part, rest = divmod(whole, workers)
    return part + (rank < rest)


def _microseconds(now: float) -> int:
    return round(now * 1e6)


class _Rate:
    """GCRA as a token bucket that refills at a share of the rate. Waits are in us, and None where it fits.

    `_level` is in parts of a unit, so many (`_unit`) that a microsecond brings a whole number of them: nothing is ever
    rounded.
    """

    __slots__ = ("_at", "_full", "_level", "_opened", "_speed", "_unit", "seen")

    def __init__(self, limit: Limit, seen: _Seen | None, workers: int, rank: int, at: int) -> None:
        remaining = limit.capacity
        if seen is not None:
            standing, when = seen
            refilled = max(0, at - _microseconds(when)) * limit.amount // limit.period
            drains = _microseconds(standing.reset) * limit.amount // limit.period
            debt = max(0, drains - limit.capacity) if standing.remaining == 0 else 0
            remaining = min(remaining, standing.remaining - debt + refilled)
        self.seen = seen
        self._speed = limit.amount
        self._unit = limit.period * min(workers, limit.capacity)  # who has no share of the burst has none of the rate
        self._full = share_of(limit.capacity, workers, rank) * self._unit
        self._level = share_of(remaining, workers, rank) * self._unit
        self._opened = self._at = at

    def wait(self, amount: int, at: int) -> int | None:
        self._refill(at)
        missing = amount * self._unit - self._level
        return -(-missing // self._speed) if missing > 0 else None

    def take(self, amount: int) -> None:
        self._level -= amount * self._unit

    def correct(self, amount: int, used: int, taken: int, at: int) -> None:
        self._refill(at)
        # What the store took was missing in what it said. What an earlier share let through was not.
        reserved = amount if taken >= self._opened or taken == _BY_THE_STORE.at else 0
        self._level = min(self._full, self._level + (reserved - used) * self._unit)

    def tell(self, at: int) -> tuple[int, float, int]:
        return max(0, self._level // self._unit), -(-(self._full - self._level) // self._speed) / 1e6, 0

    def _refill(self, at: int) -> None:
        if at > self._at:
            self._level = min(self._full, self._level + (at - self._at) * self._speed)
            self._at = at


class _Quota:
    """A quota, by the calendar or rolling: nothing comes back before its window has ended. Debt is carried."""

    __slots__ = ("_begun", "_ends", "_full", "_left", "_length", "_opened", "_window", "seen")

    def __init__(self, limit: Limit, seen: _Seen | None, workers: int, rank: int, at: int) -> None:
        self._length = limit.period or NOMINAL[limit.window] * 1_000_000
        remaining, self._window, self._ends = limit.capacity, 0, at + self._length
        if seen is not None:
            standing, when = seen
            remaining, self._window = min(remaining, standing.remaining), standing.window
            self._ends = _microseconds(when + standing.reset)
        self.seen = seen
        self._full = share_of(limit.capacity, workers, rank)
        self._left = share_of(remaining, workers, rank)
        self._opened = self._begun = at

    def wait(self, amount: int, at: int) -> int | None:
        self._turn(at)
        return self._ends - at if amount > self._left else None

    def take(self, amount: int) -> None:
        self._left -= amount

    def correct(self, amount: int, used: int, taken: int, at: int) -> None:
        self._turn(at)
        if taken >= self._begun:
            self._left += amount - used
        elif taken >= self._opened or taken == _BY_THE_STORE.at:  # in a window that may have ended: nothing comes back
            self._left -= max(0, used - amount)
        else:
            self._left -= used

    def tell(self, at: int) -> tuple[int, float, int]:
        return max(0, self._left), (self._ends - at) / 1e6, self._window

    def _turn(self, at: int) -> None:
        if at >= self._ends:
            windows = (at - self._ends) // self._length + 1
            self._left = min(self._full, windows * self._full + self._left)  # what is owed is paid from each
            self._ends += windows * self._length
            self._begun, self._window = at, 0


_Share: TypeAlias = _Rate | _Quota


class _Seats:
    """Seats that are free for one decision: they are counted where the requests are."""

    __slots__ = ("_free",)

    def __init__(self, free: int) -> None:
        self._free = free

    def wait(self, amount: int, at: int) -> int | None:
        return 0 if amount > self._free else None

    def take(self, amount: int) -> None:
        self._free -= amount

    def tell(self, at: int) -> tuple[int, float, int]:
        return max(0, self._free), 0.0, 0


class _Open:
    """A limit that is not enforced now: it stands as it was last seen, and nothing is taken."""

    __slots__ = ("_limit", "_seen")

    def __init__(self, limit: Limit, seen: _Seen | None) -> None:
        self._limit = limit
        self._seen = seen

    def wait(self, amount: int, at: int) -> int | None:
        return None

    def take(self, amount: int) -> None: ...

    def tell(self, at: int) -> tuple[int, float, int]:
        if self._seen is None:
            return self._limit.capacity, 0.0, 0
        standing, when = self._seen
        return standing.remaining, max(0.0, when + standing.reset - at / 1e6), standing.window

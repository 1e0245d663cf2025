"""When what is reserved comes back. Pure: who calls brings the time.

A caller who is refused because requests under way hold reservations has to wait until enough of these end, and that is
not the time in which the limit refills: requests that reserve 500 tokens, use 10 and take 0.3 s give 490 back in 0.3 s.
So for each count it is learned how long reservations are held and which part of them is used in the end. A reservation
is expected to end when three of four of those end that were held as long as it already is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import islice

from gateway.recent import Recent

_KEYS = 10_000  # whose reservations are remembered
_SEEN = 32  # holds that the durations are learned from, the latest ones
_GAIN = 1 / 16  # of the share that is used: an exponential mean over the last some 16
_LOOKED_AT = 32  # holds, evenly from the oldest to the youngest, that stand for all
_QUANTILE = 0.75
_OVERDUE = 0.25  # of its age: what a hold is given that already lasts longer than any that was seen
_SPREAD = 8  # holds that stand for those of other workers, where this one has none itself


class Returns:
    """The reservations of one worker, by the key of their count. Amounts are in units of the limit, times in s."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: Recent[str, _Holds] = Recent(_KEYS)

    def take(self, key: str, id: str, amount: int, now: float) -> None:
        """A request has reserved so much."""
        holds = self._keys.get(key)
        if holds is None:
            holds = _Holds()
            self._keys.put(key, holds)
        holds.live[id] = now, amount
        holds.held += amount

    def give(self, key: str, id: str, used: int, now: float) -> None:
        """A request has ended; one whose reservation is not known changes nothing."""
        holds = self._keys.get(key)
        hold = None if holds is None else holds.live.pop(id, None)
        if holds is None or hold is None:
            return
        taken, amount = hold
        holds.held -= amount
        holds.amount += (amount - holds.amount) * _GAIN
        holds.used += (used - holds.used) * _GAIN
        holds.durations.append(now - taken)

    def wait(self, key: str, over: int, now: float, *, held: int = 0, refill: float = 0.0) -> float | None:
        """Seconds until `over` units have come back, by what was learned of their count; None: that cannot be said.

        `held` is what all workers have reserved (this worker's own reservations are taken for a sample of it), and
        `refill` how many units per second come by themselves.
        """
        holds = self._keys.get(key)
        if over <= 0:
            return 0.0
        return None if holds is None or not holds.durations else holds.wait(over, now, held, refill)


class _Holds:
    """The reservations of one count that are under way, and what is learned from those that ended."""

    __slots__ = ("amount", "durations", "held", "live", "used")

    def __init__(self) -> None:
        self.live: dict[str, tuple[float, int]] = {}  # taken at, amount; the oldest first
        self.held = 0
        self.durations: deque[float] = deque(maxlen=_SEEN)
        self.amount = self.used = 0.0  # means that begin with 0 alike: only their ratio counts

    def wait(self, over: int, now: float, held: int, refill: float) -> float | None:
        durations = sorted(self.durations)
        step = -(-len(self.live) // _LOOKED_AT)
        sample: Iterable[tuple[float, int]] = islice(self.live.values(), 0, None, step) if step else ()
        ends = sorted((_residual(durations, now - taken), amount) for taken, amount in sample)
        if not ends and held:
            longest = durations[-1]
            ends = sorted((_residual(durations, longest * place / _SPREAD), 1) for place in range(_SPREAD))
        returning = max(0.0, 1 - self.used / self.amount) if self.amount else 0.0
        of_each = returning * max(held, self.held) / (sum(amount for _, amount in ends) or 1)
        missing = float(over)
        for end, amount in ends:
            if refill * end >= missing:
                break
            missing -= amount * of_each
            if refill * end >= missing:
                return end
        return missing / refill if refill else None


def _residual(durations: list[float], age: float) -> float:
    """How much longer a hold of this age lasts: three quarters of those that lasted longer than it ended by then."""
    first = bisect_right(durations, age)
    longer = len(durations) - first
    if not longer:
        return max(age, durations[-1]) * _OVERDUE
    return durations[first + int((longer - 1) * _QUANTILE)] - age

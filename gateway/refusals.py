"""What refused callers are told, and who is refused again without a trip. Pure: who calls brings the time.

With a refusal the store tells two times: when the request would fit if nothing that others hold came back early, and
when it would fit at the soonest, if all of that came back unused. Between the two, what was learned of how long
requests hold what they reserve says when to come back: returns.py. And before the latter, for a second at most, whoever
asks for the same again is refused as well: only time opens that limit, or a request that was counted and not answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from gateway.errors import Dialect, GatewayError, RateLimited
from gateway.recent import Recent
from gateway.returns import Returns
from gateway.standings import POLITE, Standing, refusal, standing_headers
from gateway.terms import Charge

_REPEATED = 1.0  # seconds that a refusal is repeated at most: an operator may have changed a count by hand
_MOST = 10_000
_LONGEST_GUESS = 5.0  # seconds; when the store is back nobody knows


class _Refused(NamedTuple):
    """A refusal that holds until then: what was asked, where the caller stood, and when to come back."""

    charges: Sequence[Charge]
    standings: tuple[Standing, ...]
    binding: int
    at: float
    until: float
    told: float

    def still(self, charges: Sequence[Charge]) -> float | None:
        """Seconds that these have to wait longer than what was refused; None: they may be decided otherwise."""
        longer = 0.0
        for place, (asked, was) in enumerate(zip(charges, self.charges, strict=True)):
            more = asked.amount - was.amount
            if asked.limit is not was.limit or (more > 0 and place != self.binding):
                return None
            if place == self.binding and more:
                if more < 0 or asked.limit.kind != "rate":
                    return None
                longer = more * asked.limit.period / 1e6 / asked.limit.amount
        return longer


class Refusals:
    """The refusals of one worker. `returns` is to be told of what is reserved."""

    def __init__(self) -> None:
        self.returns = Returns()
        self._held: Recent[tuple[str, ...], _Refused] = Recent(_MOST)

    def refuse(
        self,
        charges: Sequence[Charge],
        standings: tuple[Standing, ...],
        binding: int,
        wait: float,
        soonest: float,
        now: float,
        dialect: Dialect,
    ) -> GatewayError:
        """The refusal by the limit at the place `binding`; times in seconds, `now` is time.monotonic()."""
        standing = standings[binding]
        told = wait
        if standing.charge.limit.kind == "seats":
            told = self._until_returned(standing, now)
        elif soonest < wait:
            told = min(wait, max(soonest, self._until_returned(standing, now)))
        if soonest > 0:
            until = now + min(soonest, _REPEATED)
            counts = tuple([charge.key for charge in charges])
            self._held.put(counts, _Refused(charges, standings, binding, now, until, now + told))
        return refusal(standings, standing, told, dialect, held_back=soonest == 0)

    def again(self, charges: Sequence[Charge], now: float, dialect: Dialect) -> GatewayError | None:
        """The refusal of what was refused a moment ago and cannot fit yet; None: the store is to be asked."""
        if not self._held:
            return None
        counts = tuple([charge.key for charge in charges])
        refused = self._held.get(counts)
        if refused is None:
            return None
        if now >= refused.until:
            self._held.forget(counts)
            return None
        longer = refused.still(charges)
        if longer is None:
            return None
        passed = now - refused.at
        standings = tuple(
            msgspec.structs.replace(standing, charge=charge, reset=max(0.0, standing.reset - passed))
            for charge, standing in zip(charges, refused.standings, strict=True)
        )
        return refusal(standings, standings[refused.binding], refused.told - now + longer, dialect)

    def _until_returned(self, standing: Standing, now: float) -> float:
        """When enough of what others hold has come back, by what this worker has learned of its own."""
        charge, limit = standing.charge, standing.charge.limit
        held = limit.capacity if limit.kind == "seats" else standing.held
        refill = limit.amount / limit.period * 1e6 if limit.kind == "rate" else 0.0
        over = charge.amount - standing.remaining
        returns = self.returns.wait(charge.key, over, now, held=held, refill=refill)
        return POLITE if returns is None else returns


def share_spent(standings: tuple[Standing, ...], bound: Standing, wait: float, dialect: Dialect) -> GatewayError:
    """What a caller is told whom this worker's share of a limit refuses: the limit itself may have room."""
    limit, scope = bound.charge.limit, bound.charge.scope
    text = f"{scope} has used this worker's share of the limit {limit.name}, while the store of limits is away"
    wait = min(max(POLITE, wait), _LONGEST_GUESS)
    headers = standing_headers(standings, bound, dialect)
    return RateLimited(text, retry_after=wait, headers=headers, policies=(limit.name,))

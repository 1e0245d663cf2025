"""Whether an upstream is asked, and whether a request may be sent once more. Pure: who calls brings the time.

An upstream is

    in       it gets its share; after it came back, a share that grows over slow_start
    resting  it asked to be left alone (429 or 503 with Retry-After)
    out      too much failed. When the time is over, one request goes out as a trial: answered, it is in again; failed,
             it stays out for twice as long

Two things take it out. Connections that cannot be made say that nobody is there: asking is in vain, and whoever is
down is out, be it the whole pool. Failing answers and probes say less (a request that kills its backend fails on each
of them, a probe's path may be wrong): for these at most half of a pool is out (Envoy's panic threshold).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from gateway.language import HealthPolicy, RetryPolicy

# answered: a head came. cut: what followed it failed. The others are instead of an answer.
Outcome = Literal["answered", "cut", "failed", "unreachable"]
Turn = Literal["ejected", "returned"]

_ENOUGH = 20  # requests, before a rate means anything
_SHORTEST = 1.0  # seconds out; each failed trial doubles it
_LONGEST_REST = 300.0  # seconds: a backend that asks for a day is asked again all the same
_LEAST = 0.1  # of its share, at the beginning of a slow start
_PROBES = 2  # that fail in a row take an upstream out


class Window:
    """Two counts, of all that happened and of what matters, over the last one to two times `length` seconds."""

    __slots__ = ("_all", "_before", "_begun", "_length", "_some")

    def __init__(self, length: float) -> None:
        self._length = length
        self.clear(0.0)

    def clear(self, now: float) -> None:
        self._begun, self._all, self._some, self._before = now, 0, 0, (0, 0)

    def add(self, now: float, everything: int, some: int) -> None:
        self._turn(now)
        self._all += everything
        self._some += some

    def counts(self, now: float) -> tuple[int, int]:
        self._turn(now)
        return self._all + self._before[0], self._some + self._before[1]

    def _turn(self, now: float) -> None:
        passed = now - self._begun
        if passed >= 2 * self._length:
            self.clear(now)
        elif passed >= self._length:
            before = self._all, self._some
            self.clear(self._begun + self._length)
            self._before = before


class Health:
    """What is known of one upstream. `may_eject` says whether its pool can spare it."""

    __slots__ = (
        "_back_since",
        "_failures",
        "_lost",
        "_out_for",
        "_policy",
        "_rest_until",
        "_slow_start",
        "_trial",
        "_unanswered",
        "_until",
        "_window",
    )

    def __init__(self, policy: HealthPolicy, slow_start: float) -> None:
        self._policy = policy
        self._slow_start = slow_start
        self._window = Window(policy.window)
        self._failures = 0  # in a row
        self._unanswered = 0  # connections in a row
        self._lost = 0  # probes in a row
        self._rest_until = 0.0
        self._until: float | None = None  # while out
        self._out_for = 0.0
        self._trial = False
        self._back_since: float | None = None

    def adopt(self, policy: HealthPolicy, slow_start: float) -> None:
        """Go by other rules from now on; what is known stays known."""
        if policy.window != self._policy.window:
            self._window = Window(policy.window)
        self._policy, self._slow_start = policy, slow_start

    @property
    def out(self) -> bool:
        return self._until is not None

    def asked(self, now: float) -> bool:
        """Whether a request may go there."""
        if now < self._rest_until:
            return False
        return self._until is None or (now >= self._until and not self._trial and not self._failing_probes)

    def wait(self, now: float) -> float:
        """Seconds until it may be asked again, as far as one can know; 0 if it may be now."""
        if self.asked(now):
            return 0.0
        until = max(self._rest_until, self._until or 0.0)
        return max(until - now, self._policy.every if self._failing_probes else 0.0, _SHORTEST if self._trial else 0.0)

    def share(self, now: float) -> float:
        """The part of its weight that counts: less than 1 in a slow start."""
        if self._back_since is None:
            return 1.0
        passed = now - self._back_since
        if passed >= self._slow_start:
            self._back_since = None
            return 1.0
        return max(_LEAST, passed / self._slow_start)

    def begin(self) -> bool:
        """A request goes there. Returns whether it is the trial of one that is out: that one alone is judged."""
        if self._until is None:
            return False
        self._trial = True
        return True

    def abandoned(self, now: float) -> None:
        """The trial ended without telling anything: its caller left. It may be made again in a second."""
        self._trial = False
        self._until = now + _SHORTEST

    def rest(self, now: float, seconds: float) -> None:
        """It asked to be left alone for so long."""
        self._rest_until = max(self._rest_until, now + min(max(0.0, seconds), _LONGEST_REST))

    def report(
        self, now: float, outcome: Outcome, may_eject: Callable[[], bool], *, trial: bool = False
    ) -> Turn | None:
        """How a request went, and what came of it."""
        if self._until is not None:
            return self._judge(now, outcome) if trial else None
        self._window.add(now, outcome != "cut", outcome != "answered")
        self._unanswered = self._unanswered + 1 if outcome == "unreachable" else 0
        if outcome == "answered":
            return None
        self._failures += 1
        if self._unanswered >= self._policy.connect_failures or (self._too_much(now) and may_eject()):
            return self._eject(now, _SHORTEST)
        return None

    def ended(self) -> None:
        """An answer came whole, and was none of failure."""
        self._failures = 0

    def probed(self, now: float, well: bool, may_eject: Callable[[], bool]) -> Turn | None:
        """How a probe ended. One that is well again still has its trial to stand."""
        self._lost = 0 if well else self._lost + 1
        if self._failing_probes and self._until is None and may_eject():
            return self._eject(now, _SHORTEST)
        return None

    @property
    def _failing_probes(self) -> bool:
        return self._lost >= _PROBES and self._policy.probe is not None

    def _too_much(self, now: float) -> bool:
        if self._failures >= self._policy.failures:
            return True
        requests, failures = self._window.counts(now)
        return requests >= _ENOUGH and failures >= self._policy.error_rate * requests

    def _judge(self, now: float, outcome: Outcome) -> Turn | None:
        self._trial = False
        if outcome != "answered":
            return self._eject(now, min(2 * self._out_for, self._policy.eject))
        self._until = None
        self._back_since = now
        self._forget(now)
        return "returned"

    def _eject(self, now: float, seconds: float) -> Turn:
        self._until, self._out_for = now + seconds, seconds
        self._forget(now)
        return "ejected"

    def _forget(self, now: float) -> None:
        self._failures = self._unanswered = 0
        self._window.clear(now)


class Budget:
    """How many requests of a pool may be sent once more: a share of the last ones, so that retries never are what
    keeps a pool down (Finagle's and linkerd's retry budget)."""

    __slots__ = ("_share", "_window")

    _SECONDS, _ALWAYS = 10.0, 10  # one a second is no storm

    def __init__(self, policy: RetryPolicy) -> None:
        self._share = policy.budget
        self._window = Window(self._SECONDS)

    def asked(self, now: float) -> None:
        """A request has come."""
        self._window.add(now, 1, 0)

    def spend(self, now: float) -> bool:
        """Whether it may be sent once more; if so, that is counted."""
        requests, retries = self._window.counts(now)
        if retries + 1 > max(self._ALWAYS, self._share * requests):
            return False
        self._window.add(now, 0, 1)
        return True

"""Which of the upstreams that may be asked gets a request. Pure: who calls brings the random numbers.

A weight is a share of the requests, at every load: a canary of weight 5 beside 95 gets one in twenty, whether two
requests are in flight or two hundred. So one is drawn by weight first. Among those of the same weight the less busy of
two gets it (power of two choices: Mitzenmacher 2001); one that has no equal passes it on only when it is far busier
than its share of what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import log, sqrt
from random import Random
from typing import Generic, Protocol, TypeVar


class Candidate(Protocol):
    """What is known of an upstream here."""

    @property
    def name(self) -> str: ...
    @property
    def in_flight(self) -> int: ...


C = TypeVar("C", bound=Candidate)
Weighed = Sequence[tuple[C, float]]  # each with its weight; at least one

# Bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): so far above its share may one be that requests stick to.
_BOUND = 1.25


def least_busy(free: Weighed[C], random: Random) -> C:
    """One drawn by weight, or a less busy one."""
    if len(free) == 1:
        return free[0][0]
    one, weight = drawn = _draw(free, random)
    equals = [c for c, w in free if w == weight and c is not one]
    if equals:
        other = random.choice(equals)
        return other if other.in_flight < one.in_flight else one
    fair = _fair(free, weight)
    if one.in_flight < fair + 2 * sqrt(fair) + 1:  # two standard deviations of what chance brings
        return one
    return min(drawn, _draw([f for f in free if f[0] is not one], random), key=_load)[0]


def by_affinity(free: Weighed[C], key: bytes) -> C:
    """The same one for the same key, as long as it is there and not overloaded (weighted rendezvous hashing).

    When an upstream leaves, its keys spread over the others, and no other key moves.
    """
    if len(free) == 1:
        return free[0][0]
    ranked = sorted(free, key=lambda f: f[1] / -log(_hash(key, f[0].name)), reverse=True)
    for one, weight in ranked:
        if one.in_flight < _BOUND * _fair(free, weight) + 1:
            return one
    return min(free, key=_load)[0]


class Rotation(Generic[C]):
    """Each in its turn, as often as its weight says, and never twice in a row without need (nginx's smooth one)."""

    def __init__(self) -> None:
        self._credits: dict[C, float] = {}

    def next(self, free: Weighed[C]) -> C:
        total = 0.0
        for one, weight in free:
            self._credits[one] = self._credits.get(one, 0.0) + weight
            total += weight
        chosen = max((one for one, _ in free), key=self._credits.__getitem__)
        self._credits[chosen] -= total
        return chosen


def _draw(free: Weighed[C], random: Random) -> tuple[C, float]:
    if len(free) == 1:
        return free[0]
    return random.choices(free, [weight for _, weight in free])[0]


def _fair(free: Weighed[C], weight: float) -> float:
    """The share of a weight in what will be in flight."""
    return (sum(c.in_flight for c, _ in free) + 1) * weight / sum(w for _, w in free)


def _load(one: tuple[C, float]) -> float:
    return (one[0].in_flight + 1) / one[1]


def _hash(key: bytes, name: str) -> float:
    """A number between 0 and 1, neither of them."""
    digest = blake2b(name.encode(), key=blake2b(key, digest_size=32).digest(), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52  # exact: 1.0 would divide by zero

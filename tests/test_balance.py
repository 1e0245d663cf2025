"""Weights are shares, the less busy is preferred, and what belongs together stays together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import Rotation, by_affinity, least_busy


@dataclass(eq=False)
class One:
    name: str
    in_flight: int = 0


def some(*weights: float) -> list[tuple[One, float]]:
    return [(One(f"10.0.0.{i}:80"), weight) for i, weight in enumerate(weights)]


def simulated(pool: Sequence[tuple[One, float]], together: int, requests: int = 20_000, slow: int = 1) -> Counter[str]:
    """So many requests, so many of them in flight; which one ends next is chance. The last upstream is `slow`er."""
    random = Random(7)
    flying: list[One] = []
    served: Counter[str] = Counter()
    for _ in range(requests):
        if len(flying) >= together:
            weights = [1 / slow if one is pool[-1][0] else 1 for one in flying]
            ended = random.choices(range(len(flying)), weights)[0]
            flying.pop(ended).in_flight -= 1
        one = least_busy(pool, random)
        one.in_flight += 1
        flying.append(one)
        served[one.name] += 1
    return served


@pytest.mark.parametrize("together", [1, 2, 5, 20, 200])
def test_a_canary_of_five_per_cent_gets_five_per_cent(together: int) -> None:
    """In the house of one big upstream, at every load."""
    canary = simulated(some(95, 5), together)["10.0.0.1:80"] / 20_000
    assert 0.045 < canary < 0.055


@pytest.mark.parametrize("together", [1, 5, 50])
def test_a_canary_beside_many_gets_its_share(together: int) -> None:
    canary = simulated(some(19, 19, 19, 19, 4), together)["10.0.0.4:80"] / 20_000
    assert 0.044 < canary < 0.056


def test_among_equals_the_slow_one_gets_less() -> None:
    served = simulated(some(1, 1, 1, 1), 40, slow=4)
    assert served["10.0.0.3:80"] < 0.5 * served["10.0.0.0:80"]


def test_one_that_takes_nothing_any_more_fills_up_to_what_is_far_above_its_share_and_not_more() -> None:
    """An upstream without an equal that never answers: of a hundred in flight it holds less than a half."""
    pool = some(2, 1)
    random = Random(7)
    pool[0][0].in_flight = 60
    for _ in range(1000):
        one = least_busy(pool, random)
        one.in_flight += one is pool[1][0]
    assert pool[1][0].in_flight < 60


def test_two_equals_the_less_busy_is_taken() -> None:
    pool = some(1, 1)
    pool[0][0].in_flight = 3
    assert {least_busy(pool, Random(i)).name for i in range(50)} == {"10.0.0.1:80"}


def test_the_same_key_meets_the_same_upstream_and_keys_spread_by_weight() -> None:
    pool = some(1, 1, 2)
    met = [by_affinity(pool, b"%d" % i).name for i in range(8000)]
    assert met == [by_affinity(pool, b"%d" % i).name for i in range(8000)]
    shares = [Counter(met)[one.name] / 8000 for one, _ in pool]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.02)


def test_when_one_leaves_only_its_keys_move() -> None:
    pool = some(1, 1, 1, 1)
    for i in range(500):
        before = by_affinity(pool, b"%d" % i)
        after = by_affinity(pool[1:], b"%d" % i)
        assert after is before or before is pool[0][0]


def test_an_overloaded_one_passes_its_keys_on_to_one_other() -> None:
    pool = some(1, 1, 1, 1)
    home = by_affinity(pool, b"key")
    home.in_flight = 100
    assert len({by_affinity(pool, b"key").name for _ in range(10)} - {home.name}) == 1
    home.in_flight = 1
    assert by_affinity(pool, b"key") is home


def test_nobody_gets_more_than_a_quarter_above_its_share_by_one_key() -> None:
    pool = some(1, 1, 1, 1)
    for _ in range(100):
        by_affinity(pool, b"everybody's system prompt").in_flight += 1
    assert max(one.in_flight for one, _ in pool) <= 1.25 * 100 / 4 + 2


def test_in_turn_each_is_next_as_often_as_its_weight_says() -> None:
    pool = some(5, 1, 1)
    rotation: Rotation[One] = Rotation()
    assert "".join(rotation.next(pool).name[7] for _ in range(7)) == "0010200"


def test_in_turn_whoever_is_away_is_left_out() -> None:
    pool = some(1, 1, 1)
    rotation: Rotation[One] = Rotation()
    assert {rotation.next(pool[:2]).name for _ in range(6)} == {"10.0.0.0:80", "10.0.0.1:80"}
    assert {rotation.next(pool).name for _ in range(9)} == {one.name for one, _ in pool}


@given(
    st.lists(st.tuples(st.integers(0, 300), st.floats(0.1, 1000)), min_size=1, max_size=6),
    st.binary(max_size=20),
    st.integers(0, 9),
)
def test_whatever_they_carry_one_of_them_is_chosen(loads: list[tuple[int, float]], key: bytes, seed: int) -> None:
    pool = [(One(f"u{i}", in_flight), weight) for i, (in_flight, weight) in enumerate(loads)]
    ones = [one for one, _ in pool]
    rotation: Rotation[One] = Rotation()
    assert least_busy(pool, Random(seed)) in ones
    assert by_affinity(pool, key) in ones
    assert rotation.next(pool) in ones

"""When what is reserved comes back: whoever waits so long is admitted, and nobody waits much longer than is needed."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.returns import Returns

KEY = "{acme}:rate:tokens:research"


def learned(*durations: float, amount: int = 500, used: int = 10) -> Returns:
    """Returns that have seen reservations of so many seconds, all over when the clock shows 0."""
    returns = Returns()
    for number, duration in enumerate(durations):
        returns.take(KEY, f"before-{number}", amount, -duration)
        returns.give(KEY, f"before-{number}", used, 0.0)
    return returns


def test_nothing_is_said_of_a_count_of_which_nothing_is_known() -> None:
    returns = Returns()
    assert returns.wait(KEY, 1, 0.0, held=500) is None
    returns.take(KEY, "a", 500, 0.0)
    assert returns.wait(KEY, 1, 0.1, held=500) is None


def test_nothing_missing_is_no_wait() -> None:
    assert Returns().wait(KEY, 0, 0.0) == 0.0


def test_a_reservation_comes_back_when_those_before_it_did() -> None:
    returns = learned(*[0.3] * 5)
    returns.take(KEY, "a", 500, 1.0)
    assert returns.wait(KEY, 490, 1.1) == pytest.approx(0.2)


def test_what_is_used_does_not_come_back() -> None:
    returns = learned(*[0.3] * 5, amount=500, used=100)
    returns.take(KEY, "a", 500, 1.0)
    returns.take(KEY, "b", 500, 1.1)
    assert returns.wait(KEY, 400, 1.2) == pytest.approx(0.1)
    assert returns.wait(KEY, 401, 1.2) == pytest.approx(0.2)
    assert returns.wait(KEY, 801, 1.2) is None


def test_nothing_comes_back_of_reservations_that_are_used_up() -> None:
    returns = learned(0.3, amount=10, used=15)
    returns.take(KEY, "a", 500, 1.0)
    assert returns.wait(KEY, 1, 1.0) is None


def test_what_ended_is_not_waited_for_and_an_unknown_end_changes_nothing() -> None:
    returns = learned(0.3)
    returns.give(KEY, "never taken", 0, 5.0)
    returns.give("no such count", "a", 0, 5.0)
    returns.take(KEY, "a", 500, 1.0)
    returns.give(KEY, "a", 10, 1.3)
    returns.give(KEY, "a", 10, 1.3)
    assert returns.wait(KEY, 1, 1.3) is None


def test_three_of_four_of_those_that_lasted_as_long_say_how_long_one_lasts() -> None:
    """Short answers and long ones: what already lasts longer than the short ones is a long one."""
    returns = learned(*[0.3] * 24, *[30.0] * 8)
    returns.take(KEY, "a", 500, 0.0)
    assert returns.wait(KEY, 1, 0.0) == pytest.approx(0.3)
    assert returns.wait(KEY, 1, 5.0) == pytest.approx(25.0)


def test_what_lasts_longer_than_anything_before_is_given_a_quarter_more() -> None:
    returns = learned(0.4)
    returns.take(KEY, "a", 500, 0.0)
    assert returns.wait(KEY, 1, 0.4) == pytest.approx(0.1)
    assert returns.wait(KEY, 1, 40.0) == pytest.approx(10.0)


def test_other_durations_are_learned_within_32_answers() -> None:
    returns = learned(*[60.0] * 100, *[0.3] * 32)
    returns.take(KEY, "a", 500, 0.0)
    assert returns.wait(KEY, 1, 0.0) == pytest.approx(0.3)


def test_another_use_is_learned() -> None:
    returns = learned(*[0.3] * 100, used=500)
    for number in range(64):
        returns.take(KEY, f"after-{number}", 500, 0.0)
        returns.give(KEY, f"after-{number}", 0, 0.3)
    returns.take(KEY, "a", 500, 1.0)
    assert returns.wait(KEY, 450, 1.0) == pytest.approx(0.3)


def test_the_share_that_is_used_is_a_mean() -> None:
    returns = Returns()
    for number in range(100):
        returns.take(KEY, "before", 500, 0.0)
        returns.give(KEY, "before", 500 * (number % 2), 0.3)
    returns.take(KEY, "a", 500, 1.0)
    assert returns.wait(KEY, 230, 1.0) == pytest.approx(0.3)
    assert returns.wait(KEY, 270, 1.0) is None


def test_what_refills_meanwhile_counts() -> None:
    returns = learned(0.3, used=0)
    returns.take(KEY, "a", 500, 0.0)
    assert returns.wait(KEY, 10, 0.0, refill=100.0) == pytest.approx(0.1)
    assert returns.wait(KEY, 520, 0.0, refill=100.0) == pytest.approx(0.3)
    assert returns.wait(KEY, 560, 0.0, refill=100.0) == pytest.approx(0.6)


def test_reservations_of_this_worker_stand_for_those_of_all_workers() -> None:
    returns = learned(0.3, used=0)
    returns.take(KEY, "a", 500, 0.0)
    returns.take(KEY, "b", 500, 0.1)
    assert returns.wait(KEY, 2000, 0.2, held=4000) == pytest.approx(0.1)
    assert returns.wait(KEY, 2001, 0.2, held=4000) == pytest.approx(0.2)
    assert returns.wait(KEY, 4001, 0.2, held=4000) is None


def test_a_worker_that_has_reserved_nothing_takes_the_others_for_evenly_spread() -> None:
    returns = learned(*[0.8] * 5, used=0)
    assert returns.wait(KEY, 100, 0.0) is None
    assert returns.wait(KEY, 100, 0.0, held=800) == pytest.approx(0.1)
    assert returns.wait(KEY, 800, 0.0, held=800) == pytest.approx(0.8)


def test_of_many_reservations_some_stand_for_all() -> None:
    returns = learned(1.0, used=0)
    for number in range(1000):
        returns.take(KEY, str(number), 500, number / 1000)
    half = returns.wait(KEY, 250_000, 1.0)
    assert half is not None
    assert 0.45 < half < 0.55


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 600)), min_size=1, max_size=50),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**12)), max_size=50),
    st.integers(1, 10**12),
    st.integers(0, 10**13),
    st.sampled_from([0.0, 0.5, 1e6]),
)
def test_more_that_is_missing_is_never_there_earlier_and_more_that_is_held_never_later(
    before: list[tuple[float, int]], live: list[tuple[float, int]], over: int, held: int, refill: float
) -> None:
    returns = Returns()
    for duration, used in before:
        returns.take(KEY, "x", 500, -duration)
        returns.give(KEY, "x", used, 0.0)
    for number, (age, amount) in enumerate(live):
        returns.take(KEY, str(number), amount, 100.0 - age)

    def wait(over: int, held: int) -> float:
        told = returns.wait(KEY, over, 100.0, held=held, refill=refill)
        return float("inf") if told is None else told

    assert 0 < wait(over, held) <= wait(2 * over, held)
    if live:
        assert wait(over, 2 * held) <= wait(over, held)


# — the scene in which all were told to wait a minute for what came back after 0.3 s


# Long enough that the burst at the beginning, of which the last tenth is never free to be reserved, hardly counts.
MINUTES = 5
FITS = 500 * (MINUTES + 1)


class Bucket:
    """5,000 tokens a minute, of which requests reserve 500 and use 10. The clock is the test's."""

    amount, reserved, used = 5000, 500, 10
    speed = amount / 60

    def __init__(self) -> None:
        self.backlog, self.at = 0.0, 0.0
        self.ends: dict[int, float] = {}

    def missing(self, now: float) -> float:
        self.backlog = max(0.0, self.backlog - (now - self.at) * self.speed)
        self.at = now
        return self.backlog + self.reserved - self.amount

    def needed(self, now: float) -> float:
        """How long one who comes back alone has to wait."""
        missing, last = self.missing(now), 0.0
        for end in sorted(end - now for end in self.ends.values()):
            if missing <= end * self.speed:
                break
            missing -= self.reserved - self.used
            last = end
        return max(last, missing / self.speed)


def scene(
    duration: Callable[[], float], callers: int = 32, seconds: float = MINUTES * 60
) -> tuple[int, list[tuple[float, float]]]:
    """How many are served when everyone waits as long as he is told, and what they were told beside what was needed.
    What nobody knows yet is a second."""
    returns, bucket = Returns(), Bucket()
    served, told = 0, []
    happens: list[tuple[float, int, int]] = [(0.0, 1, caller) for caller in range(32)]
    while happens:
        now, arrives, caller = heapq.heappop(happens)
        if now > 60 * MINUTES:
            break
        missing = bucket.missing(now)
        if not arrives:
            bucket.backlog -= bucket.reserved - bucket.used
            del bucket.ends[caller]
            returns.give(KEY, str(caller), bucket.used, now)
            served += 1
            heapq.heappush(happens, (now, 1, caller))
        elif missing <= 1e-6:
            bucket.backlog += bucket.reserved
            bucket.ends[caller] = now + duration()
            returns.take(KEY, str(caller), bucket.reserved, now)
            heapq.heappush(happens, (bucket.ends[caller], 0, caller))
        else:
            held = bucket.reserved * len(bucket.ends)
            wait = returns.wait(KEY, -int(-missing // 1), now, held=held, refill=bucket.speed)
            if wait is not None:
                told.append((wait, bucket.needed(now)))
            heapq.heappush(happens, (now + (1.0 if wait is None else wait) + 1e-6, 1, caller))
    return served, told


def test_patient_callers_get_what_fits_and_nobody_waits_twice_what_is_needed() -> None:
    served, told = scene(lambda: 0.3)
    assert served >= 0.9 * FITS
    assert len(told) > 100
    assert all(0.99 * needed < wait < 1.1 * needed for wait, needed in told)


def test_with_answers_of_different_length_most_are_told_enough_and_few_much_more() -> None:
    """Of one answer nobody knows when it ends: told is what three of four stay below."""
    random = Random(7)
    served, told = scene(lambda: random.uniform(0.2, 0.4))
    assert served >= 0.9 * FITS
    assert sum(wait < needed for wait, needed in told) < 0.25 * len(told)
    assert sum(wait > 2 * needed + 0.1 for wait, needed in told) < 0.02 * len(told)


# — memory


def test_counts_that_are_idle_are_forgotten() -> None:
    returns = learned(0.3)
    for number in range(20_000):
        returns.take(str(number), "a", 500, 0.0)
    returns.take(KEY, "a", 500, 0.0)
    assert returns.wait(KEY, 1, 0.0) is None

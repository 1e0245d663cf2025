"""While the store is away each worker keeps to its share, and all shares together to what was left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.shares import Shares, share_of
from gateway.snapshot import Limit
from gateway.standings import Standing
from gateway.terms import Charge
from tests.proving.limits import key_of, quota, rate, seats

TOKENS = rate(6000, "minute", name="tokens", count="output_tokens")
DAY = quota(1000, "day", name="day", count="total_tokens")
STRETCH = replace(DAY, name="stretch", kind="rolling", period=86_400_000_000, zone=None)
SEATS = seats(8)
HOUR = 3600.0


def charge(limit: Limit, amount: int = 1) -> Charge:
    return Charge(limit, key_of(limit), "team research", amount)


def seen(limit: Limit, remaining: int, reset: float = 0.0, window: int = 0) -> Standing:
    return Standing(charge(limit), remaining, reset, window)


def shares(*standings: Standing, workers: int = 1, rank: int = 0, now: float = 0.0) -> Shares:
    """One worker's shares, after the store has said this."""
    one = Shares()
    one.workers, one.rank = workers, rank
    one.saw(standings, now)
    return one


class Caller:
    """Asks one worker, and remembers what came of it last."""

    def __init__(self, one: Shares) -> None:
        self.one = one
        self.number = 0
        self.seats: dict[str, int] = {}
        self.standings: tuple[Standing, ...] = ()
        self.refusing: Standing | None = None
        self.wait = 0.0

    def ask(self, now: float, *charges: Charge) -> bool:
        self.number += 1
        self.standings, self.refusing, self.wait = self.one.admit(f"req_{self.number}", charges, self.seats, now)
        return self.refusing is None

    def end(self, now: float, charges: Sequence[Charge], *used: int, number: int | None = None) -> None:
        self.one.settle(f"req_{number or self.number}", charges, used, now)

    def fits(self, limit: Limit, now: float) -> int:
        """How much the share holds, found by asking for it; it is given back."""
        most = limit.capacity
        while most and not self.ask(now, charge(limit, most)):
            most = min(most - 1, self.standings[0].remaining)
        if most:
            self.end(now, [charge(limit, most)], 0)
        return most


# — what is shared


@given(st.integers(-(10**12), 10**12), st.integers(1, 100))
def test_the_shares_of_all_workers_sum_to_what_is_shared_and_differ_by_one_at_most(whole: int, workers: int) -> None:
    parts = [share_of(whole, workers, rank) for rank in range(workers)]
    assert sum(parts) == whole
    assert max(parts) - min(parts) <= 1


KINDS: dict[str, Callable[[int, int], Limit]] = {
    "rate": lambda amount, capacity: rate(amount, "minute", burst=capacity),
    "quota": lambda amount, capacity: quota(capacity, "day"),
    "rolling": lambda amount, capacity: replace(STRETCH, amount=capacity, capacity=capacity),
    "seats": lambda amount, capacity: seats(capacity),
}


@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 10**12),
    st.integers(1, 500),
    st.integers(0, 500),
    st.integers(1, 9),
)
def test_all_workers_together_admit_exactly_what_was_left(
    kind: str, amount: int, capacity: int, left: int, workers: int
) -> None:
    limit = KINDS[kind](amount, capacity)
    left = min(left, capacity)
    admitted = 0
    for rank in range(workers):
        caller = Caller(shares(seen(limit, left, HOUR), workers=workers, rank=rank))
        while caller.ask(0.0, charge(limit)):
            admitted += 1
    assert admitted == (capacity if kind == "seats" else left)


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 300), st.integers(1, 9))
def test_of_a_count_that_nobody_saw_all_workers_together_admit_the_capacity(
    kind: str, capacity: int, workers: int
) -> None:
    limit = KINDS[kind](600, capacity)
    fits = [Caller(shares(workers=workers, rank=rank)).fits(limit, 0.0) for rank in range(workers)]
    assert sum(fits) == capacity


# — the bound, against an adversary who knows everything

Step = tuple[int, int, int, bool]  # worker, units, us since the step before, whether the request ends unused
STEPS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 120), st.sampled_from([0, 1, 999, 10**5, 10**7, 10**9]), st.booleans()),
    max_size=80,
)


def admitted(limit: Limit, standing: Standing, workers: int, away: int, steps: list[Step]) -> tuple[int, int]:
    """What is let through in all until the last step, and the us from when the store spoke until then."""
    callers = [Caller(shares(standing, workers=workers, rank=rank)) for rank in range(workers)]
    at, total = away, 0
    for worker, units, pause, unused in steps:
        at += pause
        caller = callers[worker % workers]
        if caller.ask(at / 1e6, charge(limit, units)):
            total += 0 if unused else units
            caller.end(at / 1e6, [charge(limit, units)], 0 if unused else units)
    return total, at


@given(st.integers(1, 10**6), st.integers(1, 200), st.integers(0, 200), st.integers(1, 5), st.integers(0, 10**7), STEPS)
def test_workers_that_saw_the_same_rate_admit_what_remained_and_what_refills_whatever_is_asked(
    amount: int, capacity: int, remaining: int, workers: int, away: int, steps: list[Step]
) -> None:
    """Exactly: nothing is added for rounding."""
    limit = rate(amount, "minute", burst=capacity)
    remaining = min(remaining, capacity)
    full_in = (capacity - remaining) * limit.period / amount / 1e6
    total, at = admitted(limit, seen(limit, remaining, full_in), workers, away, steps)
    assert total <= remaining + amount * at // limit.period
    assert total <= capacity + amount * (at - away) // limit.period


@given(
    st.sampled_from(["quota", "rolling"]),
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(0, 10**9),
    st.integers(1, 5),
    STEPS,
)
def test_workers_that_saw_the_same_quota_admit_what_remained_and_once_the_capacity_for_each_window_that_began(
    kind: str, capacity: int, remaining: int, reset: int, workers: int, steps: list[Step]
) -> None:
    limit = replace(KINDS[kind](1, capacity), window="hour", period=3_600_000_000 if kind == "rolling" else 0)
    remaining = min(remaining, capacity)
    total, at = admitted(limit, seen(limit, remaining, reset / 1e6), workers, 0, steps)
    begun = 0 if at < reset else (at - reset) // 3_600_000_000 + 1
    assert total <= remaining + capacity * begun


@given(st.integers(1, 1000), st.integers(1, 500), st.integers(0, 500), st.integers(1, 5), st.integers(1, 500))
def test_who_waits_as_long_as_told_is_admitted_and_a_microsecond_less_is_too_little(
    amount: int, capacity: int, remaining: int, workers: int, units: int
) -> None:
    limit = rate(amount, "minute", burst=capacity)
    units = min(units, share_of(capacity, workers, 0))
    remaining = min(remaining, capacity)
    full_in = (capacity - remaining) * 60 / amount
    for early, fits in ((0, True), (1, False)):
        caller = Caller(shares(seen(limit, remaining, full_in), workers=workers))
        if units and not caller.ask(0.0, charge(limit, units)):
            assert caller.ask(caller.wait - early / 1e6, charge(limit, units)) is fits


# — each kind


def test_what_refilled_since_the_store_spoke_is_shared_too() -> None:
    assert Caller(shares(seen(TOKENS, 1000, 50.0), workers=4)).fits(TOKENS, 10.0) == 500
    assert Caller(shares(seen(TOKENS, 1000, 50.0), workers=4)).fits(TOKENS, HOUR) == 1500


def test_the_debt_of_a_rate_is_seen_in_its_reset() -> None:
    """Full again in 80 s at 100 a second: 2,000 beyond the capacity."""
    caller = Caller(shares(seen(TOKENS, 0, 80.0), workers=2))
    assert not caller.ask(0.0, charge(TOKENS, 50))
    assert caller.wait == pytest.approx(21.0)
    assert caller.standings[0].reset == pytest.approx(80.0)


def test_a_share_refills_at_its_share_of_the_rate_and_never_above_its_share_of_the_burst() -> None:
    caller = Caller(shares(seen(TOKENS, 6000), workers=4))
    assert caller.ask(0.0, charge(TOKENS, 1500))
    assert not caller.ask(1.0, charge(TOKENS, 26))
    assert caller.wait == pytest.approx(0.04)
    assert caller.ask(1.0, charge(TOKENS, 25))
    assert caller.fits(TOKENS, HOUR) == 1500


def test_where_there_are_more_workers_than_units_the_rate_goes_to_those_that_have_one() -> None:
    one_a_minute = rate(1, "minute")
    first = Caller(shares(workers=4))
    assert first.ask(0.0, charge(one_a_minute))
    assert not first.ask(59.9, charge(one_a_minute))
    assert first.ask(60.0, charge(one_a_minute))
    assert not Caller(shares(workers=4, rank=1)).ask(HOUR, charge(one_a_minute))


def test_a_quota_begins_anew_when_its_window_has_ended_and_then_by_the_length_of_windows() -> None:
    caller = Caller(shares(seen(DAY, 100, HOUR, 86_400), workers=2))
    assert caller.ask(0.0, charge(DAY, 50))
    assert caller.standings[0].window == 86_400
    assert not caller.ask(1.0, charge(DAY))
    assert caller.wait == pytest.approx(HOUR - 1)
    assert caller.ask(HOUR, charge(DAY, 500))
    assert caller.standings[0] == Standing(charge(DAY, 500), 0, 24 * HOUR, 0)
    assert not caller.ask(24.5 * HOUR, charge(DAY))
    assert caller.ask(25 * HOUR, charge(DAY, 500))


def test_what_was_seen_before_its_window_ended_is_worth_the_window_of_now() -> None:
    assert Caller(shares(seen(DAY, 0, HOUR), workers=2)).fits(DAY, 2 * HOUR) == 500


def test_of_a_rolling_quota_nothing_comes_back_before_its_reset_and_then_a_share_for_each_stretch() -> None:
    caller = Caller(shares(seen(STRETCH, 100, 20 * HOUR, 7), workers=2))
    assert caller.ask(0.0, charge(STRETCH, 50))
    assert not caller.ask(20 * HOUR - 1, charge(STRETCH))
    assert caller.wait == pytest.approx(1.0)
    assert caller.ask(20 * HOUR, charge(STRETCH, 500))
    assert not caller.ask(44 * HOUR - 1, charge(STRETCH))
    assert caller.fits(STRETCH, 44 * HOUR) == 500


def test_seats_of_the_store_count_and_come_free_when_their_requests_end() -> None:
    caller = Caller(shares(workers=3))
    caller.seats = {key_of(SEATS): 2}
    assert caller.ask(0.0, charge(SEATS))
    assert not caller.ask(0.0, charge(SEATS))
    assert (caller.wait, caller.refusing) == (0.0, Standing(charge(SEATS), 0, 0.0, 0))
    caller.seats = {key_of(SEATS): 5}
    assert not caller.ask(0.0, charge(SEATS))
    assert caller.refusing == Standing(charge(SEATS), 0, 0.0, 0)
    caller.seats = {key_of(SEATS): 1}
    assert caller.ask(0.0, charge(SEATS))
    caller.end(0.0, [charge(SEATS)], 0, number=1)
    assert caller.ask(0.0, charge(SEATS))


def test_a_seat_is_given_back_once_and_only_by_who_took_it() -> None:
    caller = Caller(shares(workers=8))
    assert caller.ask(0.0, charge(SEATS))
    caller.end(0.0, [charge(SEATS)], 0, number=77)
    assert not caller.ask(0.0, charge(SEATS))
    for _ in range(2):
        caller.end(0.0, [charge(SEATS)], 0, number=1)
    assert caller.ask(0.0, charge(SEATS))
    assert not caller.ask(0.0, charge(SEATS))


def test_a_seat_outlives_the_absence_in_which_it_was_taken() -> None:
    """The store knows nothing of it: in the next absence it is still taken."""
    caller = Caller(shares(workers=8))
    assert caller.ask(0.0, charge(SEATS))
    caller.one.saw((seen(SEATS, 8),), 1.0)
    assert not caller.ask(2.0, charge(SEATS))
    caller.end(3.0, [], number=1)
    assert caller.ask(3.0, charge(SEATS))


# — several limits at once


def test_a_request_that_one_limit_refuses_takes_nothing_of_the_others() -> None:
    caller = Caller(shares(workers=1))
    charges = charge(TOKENS, 100), charge(DAY, 1001), charge(SEATS)
    assert not caller.ask(0.0, *charges)
    assert [standing.remaining for standing in caller.standings] == [6000, 1000, 8]
    assert [caller.fits(limit, 0.0) for limit in (TOKENS, DAY, SEATS)] == [6000, 1000, 8]


def test_the_limit_with_the_longest_wait_is_told() -> None:
    empty = seen(TOKENS, 0, 60.0), seen(DAY, 0, HOUR), seen(STRETCH, 0, 2 * HOUR), seen(SEATS, 0)
    caller = Caller(shares(*empty, workers=1))
    caller.seats = {key_of(SEATS): 8}
    charges = [charge(limit) for limit in (SEATS, STRETCH, TOKENS, DAY)]
    assert not caller.ask(0.0, *charges)
    assert caller.refusing is caller.standings[1]
    assert caller.wait == pytest.approx(2 * HOUR)


def test_a_limit_in_shadow_never_refuses_and_what_would_be_refused_is_not_taken_nor_corrected() -> None:
    shadow, quiet = replace(DAY, name="shadow", shadow=True), replace(SEATS, name="quiet", shadow=True)
    caller = Caller(shares(workers=1))
    caller.seats = {key_of(quiet): 8}
    charges = charge(shadow, 1001), charge(quiet), charge(TOKENS, 10)
    assert caller.ask(0.0, *charges)
    assert [(s.over, s.remaining) for s in caller.standings] == [(True, 1000), (True, 0), (False, 5990)]
    caller.end(0.0, charges, 5000, 0, 10)
    caller.seats = {}
    assert [caller.fits(limit, 0.0) for limit in (shadow, quiet, TOKENS)] == [1000, 8, 5990]
    assert caller.ask(0.0, charge(shadow))
    assert (caller.standings[0].over, caller.standings[0].remaining) == (False, 999)


@pytest.mark.parametrize("limit", [TOKENS, DAY, STRETCH, SEATS], ids=lambda limit: limit.kind)
def test_a_limit_that_is_open_is_told_as_it_was_last_seen_and_not_counted(limit: Limit) -> None:
    limit = replace(limit, name="open", when_store_fails="open")
    caller = Caller(shares(seen(limit, 3, 10.0, 7), workers=4))
    caller.seats = {key_of(limit): 100}
    for _ in range(20):
        assert caller.ask(4.0, charge(limit, 2))
        assert caller.standings == (Standing(charge(limit, 2), 3, 6.0, 7),)
        caller.end(4.0, [charge(limit, 2)], 2)
    unseen = Caller(shares(workers=4))
    assert unseen.ask(4.0, charge(limit, 2))
    assert unseen.standings[0].remaining == limit.capacity


# — the end of a request


@pytest.mark.parametrize("limit", [TOKENS, DAY, STRETCH], ids=lambda limit: limit.kind)
@pytest.mark.parametrize(("used", "left"), [(0, 100), (10, 90), (60, 40), (150, 0)])
def test_what_was_not_used_is_given_back_and_what_was_used_beyond_is_taken(limit: Limit, used: int, left: int) -> None:
    caller = Caller(shares(seen(limit, 100, HOUR)))
    assert caller.ask(0.0, charge(limit, 60))
    caller.end(0.0, [charge(limit, 60)], used)
    assert caller.fits(limit, 0.0) == left


def test_the_debt_of_a_quota_is_carried_into_its_next_windows() -> None:
    caller = Caller(shares(seen(DAY, 10, HOUR)))
    assert caller.ask(0.0, charge(DAY, 10))
    caller.end(0.0, [charge(DAY, 10)], 1210)
    assert caller.fits(DAY, HOUR) == 0
    assert caller.fits(DAY, 25 * HOUR) == 800
    late = Caller(shares(seen(DAY, 10, HOUR)))
    assert late.ask(0.0, charge(DAY, 10))
    late.end(0.0, [charge(DAY, 10)], 1210)
    assert late.fits(DAY, 25 * HOUR) == 800
    assert not late.ask(25 * HOUR, charge(DAY, 801))
    assert late.wait == pytest.approx(24 * HOUR)


def test_what_was_reserved_in_a_window_that_has_ended_does_not_come_back_into_the_next_one() -> None:
    caller = Caller(shares(seen(DAY, 100, HOUR)))
    assert caller.ask(0.0, charge(DAY, 100))
    assert caller.ask(0.0)  # another one, of no limit
    assert caller.ask(HOUR, charge(DAY, 400))
    caller.end(HOUR, [charge(DAY, 100)], 10, number=1)
    assert caller.fits(DAY, HOUR) == 600


def test_what_was_used_beyond_a_window_that_has_ended_is_taken_from_the_next_one() -> None:
    caller = Caller(shares(seen(DAY, 100, HOUR)))
    assert caller.ask(0.0, charge(DAY, 100))
    caller.end(HOUR, [charge(DAY, 100)], 130)
    assert caller.fits(DAY, HOUR) == 970


@pytest.mark.parametrize(("limit", "left"), [(TOKENS, 550), (DAY, 60), (STRETCH, 60)], ids=["rate", "quota", "rolling"])
def test_what_the_store_had_admitted_comes_back_where_no_window_can_have_ended(limit: Limit, left: int) -> None:
    caller = Caller(shares(seen(limit, 60, HOUR)))
    assert caller.fits(limit, 0.0) == 60
    caller.end(0.0, [charge(limit, 500)], 10, number=77)
    assert caller.fits(limit, 0.0) == left
    caller.end(0.0, [charge(limit, 500)], 510, number=78)
    assert caller.fits(limit, 0.0) == left - 10


def test_no_refund_lifts_a_rate_above_its_share_of_the_burst() -> None:
    caller = Caller(shares(seen(TOKENS, 6000), workers=4))
    assert caller.fits(TOKENS, 0.0) == 1500
    caller.end(0.0, [charge(TOKENS, 500)], 10, number=77)
    assert caller.fits(TOKENS, 0.0) == 1500


@pytest.mark.parametrize("limit", [TOKENS, DAY, STRETCH], ids=lambda limit: limit.kind)
def test_a_capacity_that_was_lowered_since_bounds_what_was_seen(limit: Limit) -> None:
    caller = Caller(shares(seen(limit, limit.capacity, HOUR)))
    lowered = replace(limit, capacity=70)
    assert caller.ask(0.0, charge(lowered, 70))
    assert not caller.ask(0.0, charge(lowered))


# — a store that comes and goes


@pytest.mark.parametrize("limit", [TOKENS, DAY, STRETCH], ids=lambda limit: limit.kind)
def test_a_share_lives_until_the_store_says_something_newer(limit: Limit) -> None:
    caller = Caller(shares(seen(limit, 100, HOUR), now=0.0))
    assert caller.ask(0.0, charge(limit, 100))
    assert caller.fits(limit, 0.0) == 0
    caller.one.saw((seen(limit, 70, HOUR),), 0.0)
    assert caller.fits(limit, 0.0) == 70


@pytest.mark.parametrize("limit", [TOKENS, DAY, STRETCH], ids=lambda limit: limit.kind)
def test_what_an_earlier_share_let_through_is_taken_from_this_one_when_it_is_known(limit: Limit) -> None:
    """The store has not heard of it, and so it was not missing in what it said."""
    caller = Caller(shares(seen(limit, 100, HOUR)))
    assert caller.ask(0.0, charge(limit, 60))
    caller.one.saw((seen(limit, 100, HOUR),), 0.5)
    assert caller.ask(0.5, charge(limit, 0))
    caller.end(0.5, [charge(limit, 60)], 25, number=1)
    assert caller.fits(limit, 0.5) == 75


def test_the_order_of_ends_does_not_matter() -> None:
    lefts = []
    for order in ((1, 2, 3), (3, 1, 2), (2, 3, 1)):
        caller = Caller(shares(seen(DAY, 100, HOUR)))
        for _ in range(3):
            assert caller.ask(0.0, charge(DAY, 30))
        for number in order:
            caller.end(0.0, [charge(DAY, 30)], 10 * number, number=number)
        lefts.append(caller.fits(DAY, 0.0))
    assert lefts == [40, 40, 40]


def test_a_time_that_goes_back_gives_nothing() -> None:
    caller = Caller(shares(seen(TOKENS, 100), now=10.0))
    assert caller.fits(TOKENS, 5.0) == 100
    assert caller.ask(10.0, charge(TOKENS, 100 + 500))
    assert not caller.ask(4.0, charge(TOKENS))
    assert not caller.ask(10.0, charge(TOKENS))


def test_requests_that_have_ended_leave_nothing_behind() -> None:
    one = shares(seen(TOKENS, 6000), seen(SEATS, 8))
    caller = Caller(one)
    charges = charge(TOKENS), charge(SEATS)
    for _ in range(100):
        assert caller.ask(0.0, *charges)
        caller.end(0.0, charges, 1, 0)
    assert repr(one) == "<Shares 1/1, 0 under way>"
    assert one._seats == {}


@pytest.mark.parametrize("limit", [TOKENS, DAY], ids=lambda limit: limit.kind)
def test_made_up_users_do_not_push_out_the_share_of_their_organisation(limit: Limit) -> None:
    caller = Caller(shares(seen(limit, 10, HOUR)))
    assert caller.ask(0.0, charge(limit, 10))
    for number in range(120_000):
        assert not caller.ask(0.0, charge(limit), Charge(limit, f"{{acme}}:user-{number}", "user", 1))
    assert len(caller.one._shares) <= 100_000

"""When an upstream is left alone, when it comes back, and how often a request may be sent again."""

from __future__ import annotations

from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.health import Budget, Health, Outcome, Window
from gateway.language import HealthPolicy, RetryPolicy

POLICY = HealthPolicy.model_construct()


def yes() -> bool:
    return True


def no() -> bool:
    return False


def health(slow_start: float = 0.0, **given: Any) -> Health:
    return Health(HealthPolicy.model_construct(**given), slow_start)


def reports(one: Health, now: float, outcomes: list[Outcome | Literal["whole"]]) -> list[str | None]:
    """What came of each; one that is whole was answered, and came to its end."""
    turns: list[str | None] = []
    for outcome in outcomes:
        turns.append(one.report(now, "answered" if outcome == "whole" else outcome, yes))
        if outcome == "whole":
            one.ended()
    return turns


def out(now: float = 0.0, **given: Any) -> Health:
    """One that is out since `now`, for a second."""
    one = health(**given)
    assert reports(one, now, ["unreachable"] * 3)[-1] == "ejected"
    return one


# — out


def test_connections_that_cannot_be_made_in_a_row_take_it_out() -> None:
    one = health()
    assert reports(one, 0.0, ["unreachable", "unreachable", "answered", "unreachable", "unreachable"]) == [None] * 5
    assert one.asked(0.0)
    assert one.report(0.0, "unreachable", no) == "ejected", "who is down is out, whether it can be spared or not"
    assert not one.asked(0.0)


def test_failures_in_a_row_take_it_out_if_it_can_be_spared() -> None:
    one = health()
    assert reports(one, 0.0, ["failed"] * 4) == [None] * 4
    assert one.report(0.0, "failed", no) is None
    assert one.asked(0.0)
    assert one.report(0.0, "failed", yes) == "ejected"
    assert not one.asked(0.0)


def test_an_answer_that_came_whole_ends_a_row_of_failures_and_its_head_does_not() -> None:
    """Each of these streams is cut: the head of the next one forgives nothing."""
    one, another = health(), health()
    assert reports(one, 0.0, ["answered", "cut"] * 5)[-1] == "ejected"
    for _ in range(6):
        assert reports(another, 0.0, ["answered", "cut"]) == [None, None]
        another.ended()


def test_streams_that_are_cut_are_a_rate_of_all_streams() -> None:
    one = health(failures=1000)
    assert reports(one, 0.0, ["answered", "cut", "whole"] * 11)[-2:] == ["ejected", None]


def test_half_of_twenty_that_fail_take_it_out_and_less_do_not() -> None:
    """Never four in a row: it is the rate that counts."""
    one, another = health(), health()
    assert reports(one, 0.0, ["failed", "whole"] * 10)[:19] == [None] * 19
    assert reports(one, 0.0, ["failed"]) == ["ejected"]
    assert reports(another, 0.0, ["failed", "whole", "whole"] * 20) == [None] * 60


def test_what_failed_long_ago_does_not_count() -> None:
    one = health()
    reports(one, 0.0, ["failed", "whole"] * 9)
    assert one.report(25.0, "failed", yes) is None
    assert one.report(25.0, "failed", yes) is None


def test_when_its_time_is_over_one_trial_decides() -> None:
    one = out()
    assert not one.asked(0.9)
    assert one.asked(1.0)
    assert one.begin()
    assert not one.asked(1.0), "one at a time"
    assert one.report(1.2, "failed", yes) is None, "one that went there before is not judged"
    assert one.report(1.5, "answered", yes, trial=True) == "returned"
    assert one.asked(1.5)


def test_a_failed_trial_takes_it_out_for_twice_as_long_up_to_the_longest_time() -> None:
    one, now = out(), 0.0
    waits = []
    for _ in range(4):
        now += one.wait(now)
        assert one.report(now, "unreachable", yes, trial=one.begin()) == "ejected"
        waits.append(one.wait(now))
    assert waits == [2.0, 4.0, 5.0, 5.0]


def test_a_trial_whose_caller_left_is_made_again_a_second_later() -> None:
    one = out()
    one.begin()
    one.abandoned(1.0)
    assert (one.asked(1.5), one.asked(2.0)) == (False, True)


def test_what_was_asked_before_it_went_out_tells_nothing_more() -> None:
    one = out()
    assert reports(one, 0.1, ["answered", "failed", "failed"]) == [None] * 3
    assert not one.asked(0.5)


def test_after_its_return_old_failures_are_forgotten() -> None:
    one = out()
    one.report(1.0, "answered", yes, trial=one.begin())
    assert reports(one, 1.0, ["unreachable", "unreachable"]) == [None, None]


# — resting


def test_it_rests_for_as_long_as_it_asked_and_the_longest_time_counts() -> None:
    one = health()
    one.rest(0.0, 5.0)
    one.rest(0.0, 2.0)
    assert (one.asked(4.9), one.asked(5.0), one.wait(1.0)) == (False, True, 4.0)


def test_a_rest_of_a_day_is_five_minutes_and_one_in_the_past_is_none() -> None:
    one = health()
    one.rest(0.0, -10.0)
    assert one.asked(0.0)
    one.rest(0.0, 86400.0)
    assert one.wait(0.0) == 300.0


def test_whoever_rests_is_not_out() -> None:
    one = health()
    one.rest(0.0, 5.0)
    assert not one.out


# — probes


def test_two_probes_in_a_row_take_it_out_and_one_that_is_well_lets_the_trial_begin() -> None:
    one = health(probe="/health")
    assert [one.probed(0.0, well, yes) for well in (False, True, False)] == [None] * 3
    assert one.probed(0.0, False, yes) == "ejected"
    assert not one.asked(100.0), "while its probes fail it is not tried with requests"
    one.probed(100.0, True, yes)
    assert one.asked(100.0)
    assert one.report(100.0, "answered", yes, trial=one.begin()) == "returned"


def test_who_is_not_probed_any_more_is_not_out_for_its_last_probes() -> None:
    one = health(probe="/health")
    assert [one.probed(0.0, False, yes) for _ in range(2)] == [None, "ejected"]
    assert not one.asked(2.0)
    one.adopt(POLICY, 0.0)
    assert one.asked(2.0)


def test_a_probe_that_fails_everywhere_takes_nobody_out_that_cannot_be_spared() -> None:
    one = health()
    assert [one.probed(0.0, False, no) for _ in range(5)] == [None] * 5
    assert one.asked(0.0)


# — slow start


def test_its_share_grows_while_it_starts_slowly() -> None:
    one = out(slow_start=10.0)
    assert one.share(0.0) == 1.0
    one.report(1.0, "answered", yes, trial=one.begin())
    assert [one.share(now) for now in (1.0, 3.0, 6.0, 11.0, 12.0)] == [0.1, 0.2, 0.5, 1.0, 1.0]


def test_other_rules_take_hold_and_what_is_known_stays_known() -> None:
    one = health()
    reports(one, 0.0, ["unreachable"])
    one.adopt(HealthPolicy.model_construct(connect_failures=2, window=3.0), 0.0)
    assert reports(one, 0.0, ["unreachable"]) == ["ejected"]


# — counting


def test_a_window_counts_the_last_ones_and_forgets_the_others() -> None:
    window = Window(10.0)
    window.add(0.0, 1, 1)
    window.add(9.0, 1, 0)
    assert window.counts(9.9) == (2, 1)
    assert window.counts(19.9) == (2, 1), "what is up to twice its length old may count"
    assert window.counts(20.0) == (0, 0)


def test_retries_are_a_share_of_the_requests() -> None:
    budget = Budget(RetryPolicy.model_construct(budget=0.1))
    spent = 0
    for i in range(10_000):
        budget.asked(i * 0.0005)
        spent += budget.spend(i * 0.0005)
    assert spent == 1000


def test_a_pool_with_few_requests_may_retry_ten_in_ten_seconds() -> None:
    budget = Budget(RetryPolicy.model_construct(budget=0.0))
    budget.asked(0.0)
    assert [budget.spend(0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert budget.spend(21.0)


class Life(RuleBasedStateMachine):
    """Whatever happens to it, in any order and at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.one = health(slow_start=5.0, probe="/health")
        self.spared = True
        self.trials = 0

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(outcome=st.sampled_from(["answered", "cut", "failed", "unreachable"]), old=st.booleans())
    def a_request_ends(self, outcome: Outcome, old: bool) -> None:
        was_out, trial = self.one.out, self.trials > 0 and not old
        turn = self.one.report(self.now, outcome, lambda: self.spared, trial=trial)
        if was_out and not trial:
            assert turn is None
        if turn == "returned":
            assert outcome == "answered"
        if turn == "ejected" and outcome in ("failed", "cut") and not was_out:
            assert self.spared
        if trial:
            self.trials = 0

    @rule()
    def an_answer_is_whole(self) -> None:
        self.one.ended()

    @precondition(lambda self: self.one.asked(self.now))
    @rule()
    def a_request_begins(self) -> None:
        self.trials += self.one.begin()

    @precondition(lambda self: self.trials > 0)
    @rule()
    def the_caller_of_a_trial_leaves(self) -> None:
        self.one.abandoned(self.now)
        self.trials = 0

    @rule(well=st.booleans())
    def a_probe_ends(self, well: bool) -> None:
        self.one.probed(self.now, well, lambda: self.spared)

    @rule(seconds=st.floats(-10, 1000))
    def it_asks_for_rest(self, seconds: float) -> None:
        self.one.rest(self.now, seconds)

    @rule(spared=st.booleans())
    def others_come_and_go(self, spared: bool) -> None:
        self.spared = spared

    @invariant()
    def one_trial_at_a_time(self) -> None:
        assert self.trials <= 1

    @invariant()
    def a_wait_is_told_exactly_while_it_is_not_asked(self) -> None:
        wait = self.one.wait(self.now)
        assert (wait == 0.0) == self.one.asked(self.now)
        assert wait <= 300.0

    @invariant()
    def its_share_is_a_part(self) -> None:
        assert 0.1 <= self.one.share(self.now) <= 1.0


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

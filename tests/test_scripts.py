"""The scripts of gateway/lua against a clock that the test sets, what they promise, and an exact model of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, ClassVar

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.ends import DEAD, SWEPT, UNRESERVED
from gateway.records import GRAINS, ledger_stream, sums_key
from gateway.snapshot import Limit
from gateway.store import Script
from tests.proving import house
from tests.proving.limits import key_of, quota, rate, seats
from tests.proving.scripts import (
    ABSENT,
    ADMITTED,
    EPOCH,
    FOREIGN,
    GIVEN_UP,
    GROWTH,
    INTERRUPTED,
    LIVE,
    LOOKED,
    NOMINAL,
    REFUSED,
    REPEATED,
    SEAT_LEASE,
    SETTLED,
    UNWRITTEN,
    US,
    Answer,
    Correction,
    Scripts,
    Told,
    reservation,
    rolling,
    thresholds,
)

HOUR, DAY = 3600 * US, 86_400 * US


@pytest.fixture
def store(either_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(either_store_url) as client:
        yield client


@pytest.fixture
def scripts(store: redis.Redis) -> Scripts:
    return Scripts(store)


def limits_of_every_kind() -> list[Limit]:
    return [rate(5, "day"), quota(5, "month"), rolling(5, DAY), seats(5)]


def charges(*limits: Limit, amount: int = 1) -> list[tuple[Limit, int]]:
    return [(limit, 1 if limit.kind == "seats" else amount) for limit in limits]


def used(charged: Sequence[tuple[Limit, int]], units: int, answer: Answer | None = None) -> list[Correction]:
    """That so many units of each were used, of what `answer` has admitted."""
    windows = [0] * len(charged) if answer is None else [told.window for told in answer.told]
    return [
        Correction(limit, amount, 0 if limit.kind == "seats" else units, window)
        for (limit, amount), window in zip(charged, windows, strict=True)
    ]


# — all or nothing, once


@pytest.mark.parametrize("full", ["rate", "quota", "rolling", "seats"])
def test_a_refusal_changes_no_key(scripts: Scripts, full: str) -> None:
    limits = limits_of_every_kind()
    for number in range(5):
        scripts.one(f"{number}", *charges(*(limit for limit in limits if limit.kind == full)))
    scripts.one("beside", *charges(*(limit for limit in limits if limit.kind != full)))
    before = scripts.state()
    for number, order in enumerate(itertools.permutations(limits)):
        answer = scripts.one(f"refused{number}", *charges(*order))
        assert (answer.verdict, order[answer.binding - 1].kind) == (REFUSED, full)
    assert scripts.state() == before


def test_a_look_changes_no_key_and_says_what_would_be(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    assert scripts.look(*taken)[:4] == (LOOKED, 0, 0, 0)
    assert scripts.state() == {}
    scripts.one("a", *taken)
    scripts.client.set(reservation(""), "not read")
    before = scripts.state()
    answer = scripts.look(*taken)
    assert (answer.verdict, answer.remaining) == (LOOKED, [2, 2, 2, 4])
    assert answer.wait == max(told.reset for told in answer.told[1:3])
    assert scripts.look()[:4] == (LOOKED, 0, 0, 0)
    assert scripts.state() == before


def test_a_look_in_a_batch_sees_what_stands_before_it_and_takes_nothing(scripts: Scripts) -> None:
    some = rate(5, "day")
    answers = scripts.admit(("a", [(some, 2)]), ("", [(some, 1)]), ("", [(some, 1)]), ("b", [(some, 3)]))
    assert [(answer.verdict, *answer.remaining) for answer in answers] == [
        (ADMITTED, 3),
        (LOOKED, 3),
        (LOOKED, 3),
        (ADMITTED, 0),
    ]


def test_an_admission_repeated_under_its_id_has_one_effect(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    assert scripts.one("a", *taken).verdict == ADMITTED
    before = scripts.state()
    assert [scripts.one("a", *taken).verdict for _ in range(10)] == [REPEATED] * 10
    assert scripts.state() == before


def test_an_admission_twice_in_one_batch_has_one_effect(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    first, second = scripts.admit(("a", taken), ("a", taken))
    assert (first.verdict, second.verdict) == (ADMITTED, REPEATED)
    assert first.remaining == second.remaining == [4, 4, 4, 4]


def test_a_settlement_repeated_has_one_effect(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    corrections = used(taken, 2, scripts.one("a", *taken))
    assert scripts.settle("a", *corrections, row="r") == [SETTLED]
    before = scripts.state()
    assert [scripts.settle("a", *corrections, row="r") for _ in range(5)] == [[ABSENT]] * 5
    assert scripts.state() == before
    assert scripts.client.xlen(ledger_stream("acme")) == 1


def test_a_settlement_twice_in_one_batch_has_one_effect(scripts: Scripts) -> None:
    some = rate(10, "day")
    scripts.one("a", (some, 9))
    correction = Correction(some, 9, 5)
    assert scripts.settle_all(("a", [correction]), ("a", [correction]), row="r") == [[SETTLED], [ABSENT]]
    assert scripts.look((some, 0)).remaining == [5]
    assert scripts.client.xlen(ledger_stream("acme")) == 1


def test_what_is_given_up_without_an_admission_changes_no_count(scripts: Scripts) -> None:
    scripts.one("other", *charges(*limits_of_every_kind()))
    before = scripts.state()
    assert scripts.settle("a", *used(charges(*limits_of_every_kind()), 4)) == [ABSENT]
    after = scripts.state()
    assert after.pop(reservation("a").encode())
    assert after == before


def test_what_the_store_has_forgotten_of_an_admission_is_counted_all_the_same(scripts: Scripts) -> None:
    """It was killed, and had not written what it said."""
    taken = charges(*limits_of_every_kind(), amount=3)
    corrections = used(taken, 2, scripts.one("a", *taken))
    scripts.client.flushdb()
    assert scripts.settle("a", *corrections, row="r") == [SETTLED]
    assert scripts.settle("a", *corrections, row="r") == [ABSENT]
    assert scripts.rows() == ["r"]
    assert scripts.look(*charges(*limits_of_every_kind(), amount=0)).remaining == [3, 3, 3, 5]


def test_an_admission_that_was_given_up_before_it_arrived_takes_nothing(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    assert scripts.settle("a", *used(taken, 0)) == [ABSENT]
    before = scripts.state()
    assert scripts.one("a", *taken)[:4] == (GIVEN_UP, 0, 0, 0)
    assert scripts.state() == before


def test_an_admission_that_is_given_up_afterwards_leaves_nothing(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    scripts.one("a", *taken)
    assert scripts.settle("a", *used(taken, 0)) == [SETTLED]
    assert scripts.one("b", *taken).remaining == [4, 4, 4, 4]


def test_the_row_and_the_sums_are_written_with_the_settlement(scripts: Scripts) -> None:
    scripts.admit(("a", charges(seats(5))), ("b", charges(seats(5))))
    assert scripts.settle_all(("a", ()), ("b", ()), row="r") == [[SETTLED], [SETTLED]]
    assert scripts.rows() == ["r", "r"]
    assert scripts.sums() == {grain: [2, 4, 0, 8, 0, 10] for grain in GRAINS}
    assert all(scripts.client.ttl(key) == 400 * 86_400 for key in scripts.client.scan_iter(match="*:usage:*"))


def test_a_row_may_take_away_from_the_sums(scripts: Scripts) -> None:
    """A correction does, where less was used than was charged."""
    scripts.settle("a", row="r")
    words: Any = [("b", "less", "f", (0, -2, 0, -1, 0, -5), [], UNRESERVED)]
    keys = [reservation("b"), LIVE, ledger_stream("acme")]
    assert scripts.run("settle", keys, msgspec.msgpack.encode(words), 1000, 1000) == [[SETTLED]]
    assert scripts.sums()["month"] == [1, 0, 0, 3, 0, 0]


@pytest.mark.parametrize(
    "at",
    [
        *("1970-01-01T00:00:00+00:00", "1999-12-31T23:59:59.999+00:00", "2000-01-01T00:00:00+00:00"),
        *("2026-02-28T23:59:59.999+00:00", "2026-03-01T00:00:00+00:00", "2028-02-29T12:00:00+00:00"),
        *("2026-10-25T00:59:59.999+00:00", "2100-02-28T23:59:59.999+00:00", "2100-03-01T00:00:00+00:00"),
    ],
)
def test_a_row_is_in_the_hour_the_day_and_the_month_of_its_entry(scripts: Scripts, at: str) -> None:
    moment = datetime.fromisoformat(at)
    ms = round((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))
    stream = ledger_stream("acme")
    scripts.client.xadd(stream, {"row": "before"}, id=f"{ms}-1" if ms else "0-1")
    text = Script("settle").text.replace("'XADD', ledger, '*'", f"'XADD', ledger, '{ms}-*'")
    words: Any = [("a", "r", "f", GROWTH, [], 0)]
    keys = [reservation("a"), LIVE, stream]
    scripts.client.eval(text, len(keys), *keys, msgspec.msgpack.encode(words), 1000, 1000)
    months = (moment.year - 1970) * 12 + moment.month - 1
    numbers = {"hour": ms // 3_600_000, "day": ms // 86_400_000, "month": months}
    expected = {sums_key("acme", grain, numbers[grain]).encode() for grain in GRAINS}
    assert set(scripts.client.scan_iter(match="*:usage:*")) == expected


def test_a_row_that_cannot_be_written_changes_nothing(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    scripts.one("a", *taken)
    scripts.client.set(ledger_stream("acme"), "no stream")
    before = scripts.state()
    assert scripts.settle("a", *used(taken, 0), row="r") == [UNWRITTEN]
    assert scripts.settle("never admitted", *used(taken, 3), row="r", flags=UNRESERVED) == [UNWRITTEN]
    assert scripts.state() == before


def test_the_longest_wait_is_the_one_that_binds(scripts: Scripts) -> None:
    slow, fast, seat = rate(1, "hour", name="slow"), rate(1, "minute", name="fast"), seats(1)
    scripts.one("a", *charges(slow, fast, seat))
    for order in itertools.permutations([slow, fast, seat]):
        answer = scripts.one("b", *charges(*order))
        assert (order[answer.binding - 1].name, answer.wait) == ("slow", HOUR)


# — served while the store was away


def test_what_was_served_while_the_store_was_away_is_counted_when_it_is_back(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    scripts.one("other", *taken)
    assert scripts.settle("a", *used(taken, 2), row="r", flags=UNRESERVED) == [SETTLED]
    assert scripts.look(*charges(*limits_of_every_kind(), amount=0)).remaining == [0, 0, 0, 4]
    assert scripts.client.xlen(ledger_stream("acme")) == 1
    before = scripts.state()
    assert scripts.settle("a", *used(taken, 2), row="r", flags=UNRESERVED) == [ABSENT]
    assert scripts.one("a", *taken).verdict == GIVEN_UP
    assert scripts.state() == before


def test_it_begins_the_counts_that_are_not_there(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    scripts.settle("a", *used(taken, 2), row="r", flags=UNRESERVED)
    assert scripts.look(*charges(*limits_of_every_kind(), amount=0)).remaining == [3, 3, 3, 5]
    assert all(scripts.client.pttl(key) > 0 for key in scripts.state() if key != ledger_stream("acme").encode())


def test_it_is_settled_as_usual_where_it_was_admitted(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    corrections = used(taken, 1, scripts.one("a", *taken))
    answers = [scripts.settle("a", *corrections, row="r", flags=UNRESERVED) for _ in range(3)]
    assert answers == [[SETTLED], [ABSENT], [ABSENT]]
    assert scripts.look(*charges(*limits_of_every_kind(), amount=0)).remaining == [4, 4, 4, 5]
    assert scripts.client.xlen(ledger_stream("acme")) == 1


def test_it_is_counted_once_in_a_batch_that_names_it_twice(scripts: Scripts) -> None:
    some = quota(10, "day")
    twice = [("a", [Correction(some, 3, 2)])] * 2
    assert scripts.settle_all(*twice, row="r", flags=UNRESERVED) == [[SETTLED], [ABSENT]]
    assert scripts.look((some, 0)).remaining == [8]


def test_it_is_counted_in_the_window_that_the_gateway_saw_begin(scripts: Scripts) -> None:
    hourly = quota(10, "hour")
    scripts.one("before", (hourly, 4))
    scripts.now += HOUR
    scripts.settle("a", Correction(hourly, 3, 3, scripts.starts(hourly)[1]), row="r", flags=UNRESERVED)
    assert scripts.look((hourly, 0)).remaining == [7]


def test_what_was_admitted_all_the_same_gives_nothing_back_to_a_later_window(scripts: Scripts) -> None:
    """Its gateway was not told in which window: it names the one that runs when it ends."""
    hourly = quota(10, "hour")
    scripts.one("a", (hourly, 9))
    scripts.now += HOUR
    assert scripts.one("b", (hourly, 10)).remaining == [0]
    scripts.settle("a", Correction(hourly, 9, 1, scripts.starts(hourly)[1]), row="r", flags=UNRESERVED)
    assert scripts.one("c", (hourly, 1)).verdict == REFUSED


def test_a_gateway_whose_clock_is_far_ahead_begins_no_window(scripts: Scripts) -> None:
    hourly = quota(10, "hour")
    scripts.one("before", (hourly, 4))
    scripts.settle("a", Correction(hourly, 3, 3, scripts.starts(hourly)[2]), row="r", flags=UNRESERVED)
    assert scripts.look((hourly, 0)).remaining == [3]


# — corrections


def test_what_was_not_used_is_given_back(scripts: Scripts) -> None:
    limits = [rate(10, "day"), quota(10, "month"), rolling(10, DAY)]
    answer = scripts.one("a", *charges(*limits, amount=10))
    assert scripts.one("b", *charges(*limits)).verdict == REFUSED
    scripts.settle("a", *used(charges(*limits, amount=10), 6, answer))
    answer = scripts.one("c", *charges(*limits, amount=4))
    assert (answer.verdict, answer.remaining) == (ADMITTED, [0, 0, 0])


def test_what_was_used_beyond_the_reservation_is_owed(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.one("a", (some, 1))
    scripts.settle("a", Correction(some, 1, 20))
    answer = scripts.one("b", (some, 1))
    assert answer[:3] == (REFUSED, 1, 1_100_000)
    assert answer.wait - 1 <= answer.soonest <= answer.wait
    assert answer.told == (Told(0, 2_000_000, 0, 0, 0),)
    scripts.now += answer.wait - 1
    assert scripts.one("b", (some, 1)).verdict == REFUSED
    scripts.now += 1
    assert scripts.one("b", (some, 1)).verdict == ADMITTED


def test_debt_is_owed_where_the_count_has_drained_and_gone(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.one("a", (some, 1))
    scripts.client.delete(key_of(some))
    scripts.settle("a", Correction(some, 1, 31))
    assert scripts.one("b", (some, 1)).wait == 2_100_000


@pytest.mark.parametrize("count", ["requests", "total_tokens"])
def test_what_has_drained_while_it_was_held_is_not_given_back(scripts: Scripts, count: Any) -> None:
    """Ten are reserved, drain, and turn out unused: a burst that came meanwhile is the only one."""
    some = rate(10, "second", count=count)
    scripts.one("a", (some, 10))
    scripts.now += 9 * US // 10
    assert scripts.one("b", (some, 9)).verdict == ADMITTED
    scripts.settle("a", Correction(some, 10, 0))
    assert scripts.look((some, 0)).remaining == [1]


def test_what_is_as_old_as_the_bucket_takes_to_drain_gives_nothing_back(scripts: Scripts) -> None:
    some = rate(10, "second", count="total_tokens")
    scripts.one("a", (some, 10))
    scripts.now += US
    scripts.one("b", (some, 10))
    scripts.settle("a", Correction(some, 10, 0))
    assert scripts.look((some, 0)).remaining == [0]


def test_a_refund_never_makes_a_bucket_more_than_full(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.one("a", (some, 10))
    scripts.now += US // 2  # five have drained
    scripts.settle("a", Correction(some, 10, 0))
    assert scripts.client.exists(key_of(some)) == 0
    answers = scripts.admit(("b", [(some, 10)]), ("c", [(some, 1)]))
    assert [answer.verdict for answer in answers] == [ADMITTED, REFUSED]


def test_what_is_settled_drains_before_what_is_held(scripts: Scripts) -> None:
    """So that a full bucket gives all of a refund, however long it was held."""
    some = rate(10, "second", count="total_tokens")
    scripts.one("settled", (some, 6))
    scripts.settle("settled", Correction(some, 6, 6))
    scripts.one("a", (some, 4))
    scripts.now += US // 2
    scripts.settle("a", Correction(some, 4, 0))
    assert scripts.look((some, 0)).remaining == [9]


def test_a_reservation_that_is_lost_is_held_for_two_fills_at_most(scripts: Scripts) -> None:
    some = rate(10, "second", count="total_tokens")
    scripts.one("crashed", (some, 10))
    for number in range(20):
        scripts.now += US // 10
        scripts.one(f"{number}", (some, 1))
    assert scripts.look((some, 0)).told[0].held <= 20
    scripts.now += 2 * US
    assert scripts.look((some, 0)).told[0].held == 0


def test_a_settlement_ends_what_it_held_in_whichever_generation(scripts: Scripts) -> None:
    some = rate(10, "second", count="total_tokens")
    for id_, amount in (("a", 5), ("b", 2), ("c", 1)):
        scripts.one(id_, (some, amount))
        scripts.now += US // 2
    scripts.now -= US // 2
    scripts.settle("b", Correction(some, 2, 2))
    assert scripts.look((some, 0)).told[0].held == 6


def test_what_was_held_for_long_has_drained_and_does_not_come_back_sooner(scripts: Scripts) -> None:
    some = rate(10, "second", count="total_tokens")
    for number in range(5):
        scripts.one(f"{number}", (some, 5))
        scripts.now += US // 2
    scripts.now -= US // 2
    answer = scripts.look((some, 10))
    assert (answer.told[0].held, answer.wait, answer.soonest) == (15, US // 2, 0)


def test_the_count_of_a_rate_lives_as_long_as_what_it_holds_may_come_back(store: redis.Redis) -> None:
    some, final = rate(10, "minute", count="total_tokens", name="some"), rate(10, "minute", name="final")
    Scripts(store, expiring=True).one("a", (some, 1), (final, 1))
    assert 60_000 < store.pttl(key_of(some)) <= 61_000
    assert 6_000 < store.pttl(key_of(final)) <= 7_000


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "never answered"])
@pytest.mark.parametrize("kind", ["quota", "rolling"])
def test_a_reservation_of_an_ended_window_does_not_change_the_later_one(
    scripts: Scripts, answered: bool, kind: str
) -> None:
    hourly = quota(10, "hour") if kind == "quota" else rolling(10, HOUR)
    window = scripts.one("a", (hourly, 6)).told[0].window
    scripts.now += HOUR * 121 // 120
    assert scripts.one("b", (hourly, 6)).remaining == [4]
    assert scripts.settle("a", Correction(hourly, 6, 0, window if answered else 0)) == [SETTLED]
    assert scripts.one("c", (hourly, 4)).remaining == [0]


def test_a_clock_that_goes_back_neither_locks_nor_drains_a_bucket(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.one("a", (some, 5))
    scripts.now -= HOUR
    answers = scripts.admit(("b", [(some, 5)]), ("c", [(some, 1)]))
    assert [answer.verdict for answer in answers] == [ADMITTED, REFUSED]
    assert answers[1].wait == 100_000


def test_a_faster_rate_refuses_nobody_whom_the_slower_one_let_pass(scripts: Scripts) -> None:
    """What was taken is so many units: sixty of a hundred at one a minute are not an hour at a thousand a minute."""
    slow, fast = rate(1, "minute", burst=100), rate(1000, "minute", burst=100)
    scripts.one("a", (slow, 60))
    answer = scripts.one("b", (fast, 30))
    assert (answer.verdict, answer.remaining) == (ADMITTED, [10])
    scripts.settle("a", Correction(slow, 60, 10))
    assert scripts.one("c", (slow, 1)).remaining == [59]


# — debt is carried


def test_the_debt_of_a_window_is_carried_into_the_next_ones(scripts: Scripts) -> None:
    hourly = quota(10, "hour", count="total_tokens")
    window = scripts.one("a", (hourly, 10)).told[0].window
    scripts.settle("a", Correction(hourly, 10, 34, window))
    answer = scripts.one("b", (hourly, 7))
    ends = answer.told[0].reset
    assert (answer.verdict, answer.wait, answer.soonest) == (REFUSED, ends + 3 * HOUR, ends + 3 * HOUR)
    scripts.now += ends
    assert scripts.look((hourly, 0)).remaining == [0]  # 24 are left of it
    scripts.now += HOUR
    assert scripts.look((hourly, 0)).remaining == [0]  # 14
    scripts.now += HOUR
    assert scripts.look((hourly, 0)).remaining == [6]  # 4
    assert scripts.one("b", (hourly, 7)).verdict == REFUSED
    assert scripts.one("b", (hourly, 6)).verdict == ADMITTED


def test_an_hour_that_comes_twice_is_one_window_of_a_debt(scripts: Scripts) -> None:
    hourly = quota(10, "hour", zone="Europe/Zurich", count="usd")
    scripts.now = int(datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp()) * US
    window = scripts.one("a", (hourly, 10)).told[0].window
    scripts.settle("a", Correction(hourly, 10, 25, window))
    assert scripts.look((hourly, 0)).told[0].reset == 5400 * US
    scripts.now += 5400 * US
    assert (scripts.look((hourly, 5)).wait, scripts.look((hourly, 6)).wait) == (HOUR, 2 * HOUR)  # 15 are carried


def test_the_count_of_a_debt_lives_as_long_as_the_debt(store: redis.Redis) -> None:
    scripts = Scripts(store, expiring=True)
    daily, stretch = quota(10, "day", count="total_tokens"), rolling(10, HOUR, count="total_tokens")
    for limit, windows in ((daily, 103), (stretch, 100)):
        window = scripts.one(limit.name, (limit, 10)).told[0].window
        scripts.settle(limit.name, Correction(limit, 10, 1000, window))
        length = 86_400 if limit is daily else 3600
        assert windows * length <= store.ttl(key_of(limit)) <= (windows + 2) * length


def test_what_an_ended_window_gives_back_was_carried_out_of_it(scripts: Scripts) -> None:
    hourly = quota(10, "hour", count="total_tokens")
    window = scripts.one("a", (hourly, 6)).told[0].window
    scripts.one("b", (hourly, 4))
    scripts.settle("b", Correction(hourly, 4, 9, window))
    scripts.now += HOUR
    assert scripts.one("c", (hourly, 1)).told[0][:4] == (4, scripts.look((hourly, 0)).told[0].reset, window + 3600, 6)
    assert scripts.look((hourly, 9)).soonest == 0  # five of the six may come back
    scripts.settle("a", Correction(hourly, 6, 4, window))
    assert scripts.look((hourly, 0)).told[0][:4:3] == (6, 1)
    scripts.one("d", (hourly, 1))
    scripts.now += HOUR
    assert scripts.look((hourly, 0)).remaining == [10]


def test_the_debt_of_a_stretch_takes_the_place_of_what_falls_out(scripts: Scripts) -> None:
    limit = rolling(10, HOUR, count="total_tokens")
    bucket = HOUR // 120
    scripts.now = scripts.now // bucket * bucket
    window = scripts.one("a", (limit, 10)).told[0].window
    scripts.settle("a", Correction(limit, 10, 34, window))
    answer = scripts.one("b", (limit, 7))
    # Two rounds of ten, and the four that are left leave room for six only.
    assert (answer.wait, answer.told[0].reset) == (4 * 121 * bucket, 4 * 121 * bucket)
    assert scripts.look((limit, 6)).wait == 3 * 121 * bucket
    scripts.now += 3 * 121 * bucket - 1
    assert scripts.look((limit, 0)).remaining == [0]
    scripts.now += 1
    assert scripts.look((limit, 0)).remaining == [6]


def test_a_debt_of_many_rounds_is_counted_at_once(scripts: Scripts) -> None:
    limit = rolling(1, HOUR, count="total_tokens")
    window = scripts.one("a", (limit, 1)).told[0].window
    scripts.settle("a", Correction(limit, 1, 10**12, window))
    rounds = 121 * HOUR // 120
    assert scripts.look((limit, 1)).wait == 2**53  # 285 years
    scripts.now += 10**6 * rounds
    wait = scripts.look((limit, 1)).wait
    scripts.settle("b", Correction(limit, 0, 1), row="r", flags=UNRESERVED)
    scripts.now -= 10**6 * rounds
    assert (wait, scripts.look((limit, 1)).remaining) == (2**53, [0])


def test_a_debt_of_some_rounds_is_paid_to_the_bucket(scripts: Scripts) -> None:
    limit = rolling(1, HOUR, count="total_tokens")
    rounds = 121 * HOUR // 120
    scripts.now = scripts.now // rounds * rounds
    window = scripts.one("a", (limit, 1)).told[0].window
    scripts.settle("a", Correction(limit, 1, 1000, window))
    for passed in (0, 500, 498):
        scripts.now += passed * rounds
        scripts.settle(f"{passed}", Correction(limit, 0, 0), row="r", flags=UNRESERVED)  # written once more
    assert scripts.look((limit, 1)).wait == 2 * rounds
    scripts.now += 2 * rounds
    assert scripts.one("b", (limit, 1)).verdict == ADMITTED


# — what is held


@pytest.mark.parametrize("kind", ["rate", "quota", "rolling"])
def test_what_is_held_is_told_and_when_it_would_fit_without_it(scripts: Scripts, kind: str) -> None:
    kinds = {"rate": rate(10, "hour", count="usd"), "quota": quota(10, "day", count="usd")}
    limit = kinds.get(kind) or rolling(10, DAY, count="usd")
    window = scripts.one("a", (limit, 6)).told[0].window
    scripts.one("b", (limit, 4))
    answer = scripts.one("c", (limit, 6))
    assert (answer.verdict, answer.told[0].held, answer.soonest) == (REFUSED, 10, 0)
    assert answer.wait > 0
    scripts.settle("a", Correction(limit, 6, 5, window))
    answer = scripts.one("c", (limit, 6))
    assert (answer.verdict, answer.told[0].held) == (REFUSED, 4)
    assert 0 < answer.soonest <= answer.wait
    assert scripts.look((limit, 5)).soonest == 0


def test_what_is_final_is_not_held(scripts: Scripts) -> None:
    answer = scripts.one("a", *charges(*limits_of_every_kind()))
    assert [told.held for told in answer.told] == [0, 0, 0, 0]


# — limits in shadow


@pytest.mark.parametrize("kind", ["rate", "quota", "rolling", "seats"])
def test_a_limit_in_shadow_counts_and_tells_and_refuses_nothing(scripts: Scripts, kind: str) -> None:
    limits = [replace(limit, shadow=limit.kind == kind) for limit in limits_of_every_kind()]
    (shadow,) = (limit for limit in limits if limit.shadow)
    beside = [limit for limit in limits if not limit.shadow]
    answers = [scripts.one(f"{number}", *charges(shadow)) for number in range(7)]
    assert [(answer.verdict, answer.told[0].over) for answer in answers] == [(ADMITTED, n >= 5) for n in range(7)]
    assert answers[-1].remaining == [0]
    before = scripts.state()[key_of(shadow).encode()]
    answer = scripts.one("a", *charges(shadow, *beside))
    assert (answer.verdict, answer.remaining) == (ADMITTED, [0, 4, 4, 4])
    assert [told.over for told in answer.told] == [True, False, False, False]
    assert scripts.state()[key_of(shadow).encode()] == before


# — thresholds


@pytest.mark.parametrize("kind", ["quota", "rolling"])
def test_a_threshold_is_told_once_a_window_by_whoever_reaches_it(scripts: Scripts, kind: str) -> None:
    limit = quota(100, "day") if kind == "quota" else rolling(100, DAY)
    limit = replace(limit, warn_at=(0.5, 0.8, 0.9))
    for _ in range(2):
        told = [scripts.one(f"{scripts.now}{number}", (limit, 1)).told[0].reached for number in range(100)]
        assert [(place + 1, number) for place, number in enumerate(told) if number] == [(50, 1), (80, 2), (90, 3)]
        scripts.now += DAY * 121 // 120


@pytest.mark.parametrize("kind", ["quota", "rolling"])
def test_a_threshold_is_reached_by_what_is_settled_not_by_what_is_held(scripts: Scripts, kind: str) -> None:
    limit = quota(100, "day", count="usd") if kind == "quota" else rolling(100, DAY, count="usd")
    limit = replace(limit, warn_at=(0.5, 0.8, 0.9))
    answers = [scripts.one(f"{number}", (limit, 25)) for number in range(4)]
    assert [answer.told[0].reached for answer in answers] == [0] * 4
    window = answers[0].told[0].window
    settled = [scripts.settle(f"{number}", Correction(limit, 25, 21, window)) for number in range(4)]
    assert settled == [[SETTLED], [SETTLED], [SETTLED, 1, 1, 63], [SETTLED, 1, 2, 84]]


def test_the_highest_of_several_thresholds_is_told(scripts: Scripts) -> None:
    limits = [replace(limit, warn_at=(0.5, 0.8, 0.9)) for limit in (quota(100, "day"), rolling(100, DAY))]
    corrections = [Correction(rate(5, "day"), 1, 1), *(Correction(limit, 0, 85) for limit in limits)]
    assert scripts.settle("a", *corrections, row="r", flags=UNRESERVED) == [SETTLED, 2, 2, 85, 3, 2, 85]
    assert scripts.one("b", *charges(*limits, amount=1)).told[0].reached == 0
    assert [told.reached for told in scripts.one("c", *charges(*limits, amount=14)).told] == [3, 3]


@pytest.mark.parametrize("stretches", [(HOUR, 30 * DAY), (30 * DAY, HOUR)], ids=["longer", "shorter"])
def test_a_threshold_is_told_once_a_stretch_when_that_is_another_one(scripts: Scripts, stretches: list[int]) -> None:
    first, second = (replace(rolling(10, stretch), warn_at=(0.5,)) for stretch in stretches)
    assert scripts.one("a", (first, 5)).told[0].reached == 1
    assert scripts.one("b", (second, 1)).told[0].reached == 0
    scripts.now += 60 * DAY
    assert scripts.one("c", (second, 5)).told[0].reached == 1


# — seats


def test_a_seat_ends_fifteen_seconds_after_its_worker(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.one("a", (seat, 1))
    scripts.now += SEAT_LEASE - 1
    assert scripts.one("b", (seat, 1))[:4] == (REFUSED, 1, 0, 0)
    scripts.now += 1
    assert scripts.one("b", (seat, 1)).verdict == ADMITTED
    assert scripts.client.zrange(key_of(seat), 0, -1) == [b"b"]


def test_a_seat_is_kept_while_it_is_renewed(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.one("a", (seat, 1))
    for passed in range(0, 2 * 3600, 14):  # as long as a stream of two hours
        scripts.now += 14 * US
        assert scripts.renew("a", limit=seat) == [0]
        assert passed % 1000 or scripts.one("b", (seat, 1)).verdict == REFUSED


def test_a_lapsed_seat_is_taken_again_and_reported(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.one("a", (seat, 1))
    scripts.now += 16 * US
    scripts.one("b", (seat, 1))
    assert scripts.renew("a", "b", limit=seat) == [1, 0]
    assert scripts.client.zcard(key_of(seat)) == 2


def test_a_request_that_is_not_renewed_is_swept_and_one_that_is_lives(scripts: Scripts) -> None:
    scripts.admit(("a", []), ("b", []), ("c", []))
    scripts.settle("c", row="r")
    scripts.now += SEAT_LEASE - 1
    assert scripts.sweep() == {}
    assert scripts.renew("b", progress="[1]") == [0]
    scripts.now += 1
    assert scripts.sweep() == {"a": b"%d {}\n" % (EPOCH * US)}
    scripts.now += SEAT_LEASE
    assert scripts.sweep() == {"a": b"%d {}\n" % (EPOCH * US), "b": b"%d {}\n[1]" % (EPOCH * US)}


def test_what_is_swept_has_one_row_and_its_worker_is_told_of_it(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    corrections = used(taken, 2, scripts.one("a", *taken))
    scripts.now += SEAT_LEASE
    assert list(scripts.sweep()) == ["a"]
    assert scripts.settle("a", *used(taken, 1), row="dead", flags=DEAD | SWEPT) == [SETTLED]
    assert scripts.sweep() == {}
    assert scripts.settle("a", *used(taken, 1), row="dead", flags=DEAD | SWEPT) == [INTERRUPTED, b"dead"]
    assert scripts.renew("a", limit=seats(5)) == [-1]  # it runs, and what runs is counted
    assert scripts.client.zcard(key_of(seats(5))) == 1
    assert scripts.settle("a", *corrections, row="r") == [INTERRUPTED, b"dead"]
    assert (scripts.rows(), scripts.client.zcard(key_of(seats(5)))) == (["dead"], 0)
    assert scripts.look(*charges(*limits_of_every_kind(), amount=0)).remaining == [4, 4, 4, 5]


def test_a_sweeper_who_comes_late_changes_nothing(scripts: Scripts) -> None:
    scripts.one("a")
    scripts.settle("a", row="r")
    scripts.client.delete(reservation("a"))  # the mark is gone
    before = scripts.state()
    assert scripts.settle("a", row="dead", flags=DEAD | SWEPT) == [ABSENT]
    assert scripts.state() == before


def test_what_is_written_again_is_there_before_it_has_come_anywhere(scripts: Scripts) -> None:
    assert scripts.renew("a", intent="{}") == [0]
    scripts.now += SEAT_LEASE
    assert scripts.sweep() == {"a": b"0 {}\n"}


def test_what_the_store_has_forgotten_is_written_again_as_nothing_taken(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind(), amount=3)
    corrections = used(taken, 2, scripts.one("a", *taken))
    scripts.client.flushdb()
    seat = seats(5)
    assert scripts.renew("a", limit=seat) == [-2]
    assert scripts.renew("a", limit=seat, intent="{}", progress="[2]") == [1]
    scripts.now += SEAT_LEASE
    assert scripts.sweep() == {"a": b"0 {}\n[2]"}
    assert scripts.settle("a", *corrections, row="r") == [SETTLED]
    assert scripts.look(*charges(*limits_of_every_kind(), amount=0)).remaining == [3, 3, 3, 5]


def test_the_seat_of_a_settled_or_given_up_request_does_not_come_back(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.one("a", (seat, 1))
    scripts.settle("a", Correction(seat, 1, 0))
    assert scripts.renew("a", limit=seat) == [-1]
    assert scripts.settle("a", Correction(seat, 1, 0)) == [ABSENT]
    assert scripts.renew("a", limit=seat) == [-1]
    assert scripts.client.exists(key_of(seat)) == 0


# — workers


def test_workers_are_counted_while_they_beat_and_ranked_by_their_ids(scripts: Scripts) -> None:
    assert [scripts.beat(worker) for worker in ("b", "c", "a")] == [[1, 0], [2, 1], [3, 0]]
    scripts.now += 10 * US
    assert [scripts.beat(worker) for worker in ("c", "b")] == [[3, 2], [3, 1]]
    scripts.now += 5 * US
    assert scripts.beat("b") == [2, 0]
    assert 15_000 < scripts.client.pttl("{gateway}:workers") <= 16_000


# — calendar windows


def test_the_servers_clock_decides_which_window_counts(scripts: Scripts) -> None:
    """The gateway's clock is before midnight and the server's after it, or the other way round."""
    daily = quota(10, "day")
    midnight = (EPOCH // 86_400 + 1) * 86_400
    for gateway, server in ((-5, 5), (5, -5), (-5, -5), (5, 5)):
        scripts.client.flushall()
        scripts.now = (midnight + gateway) * US
        starts = scripts.starts(daily)
        scripts.now = (midnight + server) * US
        (told,) = scripts.admit(("a", [(daily, 1)]), starts=starts)[0].told
        own = midnight if server >= 0 else midnight - 86_400
        assert (told.window, told.reset) == (own, (own + 86_400) * US - scripts.now)


def test_a_window_that_has_begun_is_not_left_when_a_clock_goes_back(scripts: Scripts) -> None:
    hourly = quota(10, "hour")
    scripts.now = (EPOCH // 3600 * 3600 + 1) * US
    scripts.one("a", (hourly, 10))
    scripts.now -= 2 * US
    answer = scripts.one("b", (hourly, 1))
    assert (answer.verdict, answer.wait) == (REFUSED, 3601 * US)
    scripts.now += 1800 * US
    assert scripts.one("b", (hourly, 1)).verdict == REFUSED


def test_a_bucket_that_has_begun_is_not_left_when_a_clock_goes_back(scripts: Scripts) -> None:
    limit = rolling(10, HOUR)
    window = scripts.one("a", (limit, 9)).told[0].window
    scripts.now -= DAY
    answers = scripts.admit(("b", [(limit, 1)]), ("c", [(limit, 1)]))
    assert [(answer.verdict, answer.told[0].window) for answer in answers] == [(ADMITTED, window), (REFUSED, window)]


@pytest.mark.parametrize("skew", [-7200, -3601, -1, 1, 3601, 7200, 86_400])
def test_clocks_that_differ_by_more_than_a_window_break_nothing(scripts: Scripts, skew: int) -> None:
    hourly = quota(3, "hour")
    starts = scripts.starts(hourly)
    scripts.now += skew * US
    verdicts = [scripts.admit((f"{i}", [(hourly, 1)]), starts=starts)[0].verdict for i in range(5)]
    assert verdicts == [ADMITTED] * 3 + [REFUSED] * 2
    assert scripts.client.ttl(key_of(hourly)) >= 3600


@pytest.mark.parametrize("before", ["hour", "month"])
def test_a_rolling_limit_of_another_stretch_counts_what_was_used_as_used_now(scripts: Scripts, before: str) -> None:
    stretches = [HOUR, 30 * DAY]
    first, second = stretches if before == "hour" else reversed(stretches)
    scripts.one("a", (rolling(10, first), 6))
    answer = scripts.one("b", (rolling(10, second), 5))
    assert (answer.verdict, answer.remaining) == (REFUSED, [4])
    scripts.now += answer.wait
    assert scripts.one("b", (rolling(10, second), 5)).verdict == ADMITTED


# — foreign keys


GARBAGE: dict[str, Callable[[redis.Redis, str], Any]] = {
    "text": lambda store, key: store.set(key, "garbage"),
    "nothing": lambda store, key: store.set(key, ""),
    "half a count": lambda store, key: store.set(key, b"\x88\xa4kind\xa1r"),
    "the count of another kind": lambda store, key: store.set(key, b"\x81\xa4kind\xa1x"),
    "a number": lambda store, key: store.set(key, b"\x05"),
    "list": lambda store, key: store.rpush(key, "x"),
    "hash": lambda store, key: store.hset(key, "a", "b"),
    "another set": lambda store, key: store.sadd(key, "x"),
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["rate", "quota", "rolling", "seats"])
def test_a_key_that_holds_something_else_fails_its_own_request_only(scripts: Scripts, kind: str, garbage: str) -> None:
    limits = limits_of_every_kind()
    (spoiled,) = (limit for limit in limits if limit.kind == kind)
    GARBAGE[garbage](scripts.client, key_of(spoiled))
    others = [limit for limit in limits if limit is not spoiled]
    before = scripts.state()
    assert scripts.one("ill", *charges(*limits))[:4] == (FOREIGN, limits.index(spoiled) + 1, 0, 0)
    shadow = replace(spoiled, shadow=True)
    assert scripts.look(*charges(shadow)) == (LOOKED, 0, 0, 0, (Told(0, 0, 0, 0, 1),))
    assert scripts.state() == before
    ill, well = scripts.admit(("ill", charges(*limits)), ("well", charges(*others)))
    assert (ill.verdict, well.verdict, well.remaining) == (FOREIGN, ADMITTED, [4, 4, 4])


@pytest.mark.parametrize("kind", ["rate", "quota", "rolling", "seats"])
def test_a_count_that_is_overwritten_while_a_request_runs_does_not_keep_it_from_settling(
    scripts: Scripts, kind: str
) -> None:
    limits = limits_of_every_kind()
    answer = scripts.one("a", *charges(*limits))
    (spoiled,) = (limit for limit in limits if limit.kind == kind)
    scripts.client.delete(key_of(spoiled))
    scripts.client.rpush(key_of(spoiled), "x")
    assert scripts.settle("a", *used(charges(*limits), 0, answer), row="r") == [SETTLED]
    assert scripts.client.lrange(key_of(spoiled), 0, -1) == [b"x"]
    assert scripts.one("b", *charges(*(limit for limit in limits if limit is not spoiled))).remaining == [4, 4, 4]


# — the exact model: each kind of count in plain numbers, time in µs, what drains in fractions


@dataclass
class Bucket:
    """A rate. What is held is kept by request, so that its sum is what live reservations say."""

    at: int
    per: Fraction  # µs per unit
    since: int
    level: Fraction = Fraction(0)
    drained: Fraction = Fraction(0)
    held: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, int] = field(default_factory=dict)
    fill: float = 0.0

    @property
    def holding(self) -> int:
        return sum(self.held.values()) + sum(self.earlier.values())

    def copy(self) -> Bucket:
        return replace(self, held=dict(self.held), earlier=dict(self.earlier))

    def pass_time(self, now: int) -> None:
        passed = (now - self.at) / self.per
        of_settled = min(passed, self.level + self.drained - self.holding)
        of_all = min(passed, self.level)
        self.level -= of_all
        self.drained += of_all - of_settled

    def begin(self, limit: Limit, now: int) -> None:
        self.per = Fraction(limit.period, limit.amount)
        self.fill = limit.capacity * (limit.period / limit.amount)  # as the script rounds it
        if now - self.at >= self.fill:
            self.held, self.earlier, self.drained, self.since = {}, {}, Fraction(0), now
        elif now - self.since >= self.fill:
            self.drained = max(Fraction(0), self.drained - sum(self.earlier.values()))
            self.held, self.earlier, self.since = {}, self.held, now

    def take(self, id_: str, amount: int, holds: bool) -> None:
        self.level += amount
        if holds:
            if not self.holding:
                self.since = self.at
            self.held[id_] = amount

    def correct(self, id_: str, one: Correction, at: int, now: int) -> None:
        drained = min(Fraction(one.taken), (now - at) / self.per)
        if now - at >= self.fill:
            drained = Fraction(one.taken)
        elif one.limit.holds:
            (self.held if at >= self.since else self.earlier).pop(id_, None)
            drained = min(drained, self.drained)
            self.drained -= drained
        self.level = max(Fraction(0), self.level + max(Fraction(one.used), drained) - one.taken)


@dataclass
class Calendar:
    """A quota of calendar windows."""

    window: int = 0
    used: int = 0
    held: dict[str, int] = field(default_factory=dict)
    carried: int = 0
    before: int = 0
    late: dict[str, int] = field(default_factory=dict)
    told: int = 0

    @property
    def holding(self) -> int:
        return sum(self.held.values()) + min(self.carried, sum(self.late.values()))

    def copy(self) -> Calendar:
        return replace(self, held=dict(self.held), late=dict(self.late))

    def begin(self, limit: Limit, start: int, last: int | None = None) -> None:
        if start <= self.window:
            return
        passed = 1 if self.window == last else max(1, int((start - self.window) / NOMINAL[limit.window] + 0.5))
        carried = max(0, self.used - passed * limit.capacity)
        self.before, self.late = (self.window, self.held) if carried else (0, {})
        self.window, self.used, self.held, self.carried, self.told = start, carried, {}, carried, 0

    def correct(self, id_: str, one: Correction, at: int) -> None:
        window, difference = one.window, one.used - one.taken
        if window == 0:
            window = self.window if at >= self.window * US else self.before
        if window == self.window:
            self.held.pop(id_, None)
            self.used += difference
        else:
            self.used += max(0, difference)
            if window == self.before:
                self.late.pop(id_, None)
                back = min(self.carried, max(0, -difference))
                self.used, self.carried = self.used - back, self.carried - back


@dataclass
class Stretch:
    """A rolling quota: of each bucket what is used in it, and what is held by whom."""

    width: int
    used: dict[int, int] = field(default_factory=dict)
    held: dict[int, dict[str, int]] = field(default_factory=dict)
    debt: int = 0
    told: int = 0
    told_in: int = 0

    @property
    def total(self) -> int:
        return sum(self.used.values())

    @property
    def holding(self) -> int:
        return sum(amount for held in self.held.values() for amount in held.values())

    def copy(self) -> Stretch:
        return replace(self, used=dict(self.used), held={bucket: dict(held) for bucket, held in self.held.items()})

    def begin(self, limit: Limit, now: int) -> int:
        running = now // self.width
        while self.used and min(self.used) + 121 <= running:
            oldest = min(self.used)
            self.used.pop(oldest)
            self.held.pop(oldest, None)
            self.absorb(limit, oldest + 121)
        self.absorb(limit, running)
        if running - self.told_in >= 121:
            self.told = 0
        return running

    def absorb(self, limit: Limit, bucket: int) -> None:
        room = min(self.debt, max(0, limit.capacity - self.total))
        if room:
            self.debt -= room
            self.used[bucket] = self.used.get(bucket, 0) + room

    def take(self, id_: str, amount: int, holds: bool, running: int) -> None:
        self.used[running] = self.used.get(running, 0) + amount
        if holds:
            self.held.setdefault(running, {})[id_] = amount

    def correct(self, id_: str, one: Correction, at: int, running: int) -> None:
        bucket = one.window or at // self.width
        if bucket in self.used:
            self.used[bucket] -= min(self.used[bucket], max(0, one.taken - one.used))
            self.held.get(bucket, {}).pop(id_, None)
        self.owe(one.limit, max(0, one.used - one.taken), running)

    def owe(self, limit: Limit, units: int, running: int) -> None:
        self.debt += units
        self.absorb(limit, running)

    def wait(self, limit: Limit, amount: int, now: int, *, held: bool = True) -> int:
        """How long it takes until so many units fit: what falls out comes back, a round later, as long as debt is
        left."""
        running = now // self.width
        rest = replace(self, used=dict(self.used), held={})
        if not held:
            for bucket, holding in self.held.items():
                rest.used[bucket] -= sum(holding.values())
            rest.absorb(limit, running)
        bucket = running
        while (over := rest.total + rest.debt + amount - limit.capacity) > 0:
            if rest.total > limit.capacity or rest.debt == 0:
                oldest = min(rest.used)
                rest.used.pop(oldest)
                bucket = oldest + 121
                rest.absorb(limit, bucket)
                continue
            rounds, over = divmod(over - 1, rest.total)
            for oldest in sorted(rest.used):
                over -= rest.used[oldest]
                if over < 0:
                    return (oldest + 121 * (rounds + 1)) * self.width - now
        return 0 if bucket == running else bucket * self.width - now


@dataclass
class Reserved:
    """One limit of a live reservation."""

    limit: Limit
    amount: int
    window: int


class Model:
    """What the scripts have to say."""

    def __init__(self) -> None:
        self.reservations: dict[str, tuple[int, dict[str, Reserved]]] = {}
        self.marks: dict[str, str] = {}
        self.leases: dict[str, int] = {}
        self.rows: list[str] = []
        self.counts: dict[str, Any] = {}
        self.seats: dict[str, dict[str, int]] = {}

    def begun(self, limit: Limit, now: int, starts: Sequence[int]) -> Any:
        """The count as it is now; nothing is kept of it until it is put back."""
        count = self.counts.get(limit.name)
        count = count and count.copy()
        match limit.kind:
            case "rate":
                count = count or Bucket(now, Fraction(limit.period, limit.amount), now)
                count.pass_time(now)
                count.begin(limit, now)
            case "quota":
                count = count or Calendar()
                before, own, _, _ = starts
                count.begin(limit, own, before)
            case "rolling":
                count = count or Stretch(-(-limit.period // 120))
                count.begin(limit, now)
        return count

    def live(self, limit: Limit, now: int) -> int:
        return sum(expiry > now for expiry in self.seats.get(limit.name, {}).values())

    def over(self, limit: Limit, amount: int, now: int, starts: Sequence[int]) -> tuple[Fraction, Fraction, Fraction]:
        """By how much it does not fit, how long it has to wait, and how long at least."""
        if limit.kind == "seats":
            return Fraction(self.live(limit, now) + amount - limit.capacity), Fraction(0), Fraction(0)
        count = self.begun(limit, now, starts)
        if limit.kind == "rate":
            over = count.level + amount - limit.capacity
            least = max(Fraction(0), over - max(Fraction(0), count.holding - count.drained))
            return over, over * count.per, least * count.per
        if limit.kind == "quota":
            over = count.used + amount - limit.capacity
            wait, least = (self.window_after(limit, units, now, starts) for units in (over, over - count.holding))
            return Fraction(over), Fraction(wait), Fraction(least)
        over = count.total + count.debt + amount - limit.capacity
        if over <= 0:
            return Fraction(over), Fraction(0), Fraction(0)
        wait, least = (count.wait(limit, amount, now, held=held) for held in (True, False))
        return Fraction(over), Fraction(wait), Fraction(least)

    def window_after(self, limit: Limit, over: int, now: int, starts: Sequence[int]) -> int:
        """How long it takes until as many windows have begun as it takes to hold so many units."""
        if over <= 0:
            return 0
        windows = -(-over // limit.capacity)
        _, _, after, last = starts
        start = after if windows == 1 else last + (windows - 2) * NOMINAL[limit.window]
        return start * US - now

    def admit(  # noqa: C901 - a table of what is compared
        self, id_: str, asked: Sequence[tuple[Limit, int]], now: int, starts: dict[str, Sequence[int]], said: Answer
    ) -> None:
        """Admit or refuse, and compare with what a script has said."""
        waits: dict[int, Fraction] = {}
        leasts: dict[int, Fraction] = {}
        blurred = False
        for place, (limit, amount) in enumerate(asked, start=1):
            over, wait, least = self.over(limit, amount, now, starts.get(limit.name, ()))
            near = limit.kind == "rate" and abs(over) <= band(limit)  # within rounding, either is right
            if limit.shadow:
                assert near or said.told[place - 1].over == (over > 0)
                continue
            assert not said.told[place - 1].over
            blurred |= near
            if over > 0 and not near:
                waits[place], leasts[place] = wait, least
        known = id_ and (id_ in self.marks or id_ in self.reservations)
        if known:
            assert said[:4] == (GIVEN_UP if id_ in self.marks else REPEATED, 0, 0, 0)
        elif waits or not blurred:
            expected = REFUSED if waits else ADMITTED
            assert said.verdict == (expected if id_ else LOOKED)
        if waits and not known:
            soonest = max(leasts.values())
            slack = 1 + max(waits.values()) / 10**9 + max(rounding(limit) for limit, _ in asked)
            assert said.soonest <= soonest + slack
            assert said.soonest >= soonest - slack or said.soonest == 2**53
            if not blurred:
                last, longest = leasts[said.binding], waits[said.binding]
                assert last >= soonest - slack
                assert said.wait == 2**53 or abs(said.wait - longest) <= slack
                assert last > 0 or longest >= max(waits.values()) - slack  # of those that all wait for what is held
        taken: dict[str, int] = {}
        if said.verdict == ADMITTED:
            self.reservations[id_], self.leases[id_] = (now, {}), now + SEAT_LEASE
            for (limit, amount), told in zip(asked, said.told, strict=True):
                if not told.over:
                    taken[limit.name] = self.take(id_, limit, amount, now, starts.get(limit.name, ()))
        for (limit, _), told in zip(asked, said.told, strict=True):
            assert told.reached == taken.get(limit.name, 0)
            self.compare(limit, now, starts.get(limit.name, ()), told)

    def take(self, id_: str, limit: Limit, amount: int, now: int, starts: Sequence[int]) -> int:
        """Take it; the threshold that this reaches."""
        window = reached = 0
        if limit.kind == "seats":
            self.seats.setdefault(limit.name, {})[id_] = now + SEAT_LEASE
        else:
            count = self.counts[limit.name] = self.begun(limit, now, starts)
        match limit.kind:
            case "rate":
                count.at = now
                count.take(id_, amount, limit.holds)
            case "quota":
                window = count.window
                count.used += amount
                if limit.holds:
                    count.held[id_] = amount
                reached = self.reach(limit, count, count.used - count.holding)
            case "rolling":
                window = now // count.width
                count.take(id_, amount, limit.holds, window)
                reached = self.reach(limit, count, count.total + count.debt - count.holding, window)
        self.reservations[id_][1][limit.name] = Reserved(limit, amount, window)
        return reached

    def reach(self, limit: Limit, count: Any, settled: int, bucket: int = 0) -> int:
        number = sum(settled >= threshold for threshold in thresholds(limit))
        if number <= count.told:
            return 0
        count.told = number
        if limit.kind == "rolling":
            count.told_in = bucket
        return number

    def compare(self, limit: Limit, now: int, starts: Sequence[int], told: Told) -> None:
        if limit.kind == "seats":
            assert told[:4] == (max(0, limit.capacity - self.live(limit, now)), 0, 0, 0)
            return
        count = self.begun(limit, now, starts)
        match limit.kind:
            case "rate":
                room = max(Fraction(0), limit.capacity - count.level)
                # Rounding decides only about a unit that is all but there.
                assert room - 1 - band(limit) <= told.remaining <= room + band(limit)
                reset = count.level * count.per
                assert abs(told.reset - reset) <= 1 + reset / 10**9 or told.reset == 2**53
                assert (told.window, told.held) == (0, count.holding)
            case "quota":
                left = max(0, limit.capacity - count.used)
                assert told[:4] == (left, starts[2] * US - now, count.window, count.holding)
            case "rolling":
                left = max(0, limit.capacity - count.total - count.debt)
                reset = count.wait(limit, limit.capacity, now) if count.total else 0
                assert told[:4] == (left, min(reset, 2**53), now // count.width, count.holding)

    def settle(  # noqa: C901 - a case for each kind
        self, id_: str, corrections: Sequence[Correction], now: int, *, row: str = "", flags: int = 0
    ) -> list[Any]:
        self.leases.pop(id_, None)
        mark, unreserved = self.marks.get(id_, ""), flags & UNRESERVED
        if mark[:1] == "~" and row:
            for one in corrections:
                self.seats.get(one.limit.name, {}).pop(id_, None)
            return [INTERRUPTED, mark[1:].encode()]
        at, _ = self.reservations.pop(id_, (None, {}))
        if mark or (at is None and (flags & SWEPT or not row)):
            if not mark and not flags & SWEPT:
                self.marks[id_] = "-"
            return [ABSENT]
        self.marks[id_] = ("~" + row if flags & (DEAD | SWEPT) else "+") if row else "-"
        self.rows += [row] if row else []
        at = at or None  # of one that was written again nothing was taken
        said: list[Any] = [SETTLED]
        for place, one in enumerate(corrections, start=1):
            limit = one.limit
            if limit.kind == "seats":
                self.seats.get(limit.name, {}).pop(id_, None)
                continue
            count = self.counts.get(limit.name)
            match limit.kind:
                case "rate":
                    count = count or Bucket(now, Fraction(limit.period, limit.amount), now)
                    count.pass_time(now)
                    count.at, count.per = now, Fraction(limit.period, limit.amount)
                    if at is None:
                        count.level += one.used
                    else:
                        count.correct(id_, one, at, now)
                    settled, bucket = 0, 0
                case "quota":
                    count = count or Calendar(window=one.window or now // US)
                    count.begin(limit, one.window)
                    if at is None:
                        count.used += one.used
                    else:
                        count.correct(id_, one._replace(window=0) if unreserved else one, at)
                    settled, bucket = count.used - count.holding, 0
                case "rolling":
                    count = count or Stretch(-(-limit.period // 120))
                    bucket = count.begin(limit, now)
                    if at is None:
                        count.owe(limit, one.used, bucket)
                    else:
                        count.correct(id_, one, at, bucket)
                    settled = count.total + count.debt - count.holding
            self.counts[limit.name] = count
            if limit.kind != "rate" and (number := self.reach(limit, count, settled, bucket)):
                said += [place, number, settled]
        return said

    def renew(self, id_: str, limit: Limit, now: int, *, intent: str = "") -> int:
        mark = self.marks.get(id_, "")
        if id_ not in self.reservations and not mark and intent:
            self.reservations[id_] = 0, {}
        known = id_ in self.reservations
        if known:
            self.leases[id_] = now + SEAT_LEASE
        elif mark[:1] != "~":
            return -1 if mark else -2
        seats = self.seats.setdefault(limit.name, {})
        lapsed = seats.get(id_, 0) <= now
        seats[id_] = now + SEAT_LEASE
        return int(lapsed) if known else -1

    def sweep(self, now: int) -> set[str]:
        over = [id_ for id_, at in self.leases.items() if at <= now]
        for id_ in over:
            if id_ not in self.reservations:
                del self.leases[id_]
        return {id_ for id_ in over if id_ in self.reservations}


def band(limit: Limit) -> Fraction:
    """What rounding may decide, in units: one part in 10^12, and never a whole unit."""
    return min(Fraction(limit.capacity, 10**12), Fraction(1, 2)) * 2


def rounding(limit: Limit) -> Fraction:
    """The same, in µs."""
    return band(limit) * limit.period / limit.amount if limit.kind == "rate" else Fraction(0)


AMOUNTS = (1, 2, 10**3, 10**9, 10**12)
EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "2000"))
SHARDS = 4

rates = st.builds(
    lambda amount, period, burst, count: rate(amount, period, burst=burst, count=count),
    st.sampled_from(AMOUNTS),
    st.sampled_from(["second", "minute", "day"]),
    st.sampled_from([None, *AMOUNTS]),
    st.sampled_from(["requests", "total_tokens"]),
).filter(lambda limit: limit.capacity * limit.period <= limit.amount * 2**53)  # full again in 285 years

shares = st.sampled_from([(), (0.5,), (0.25, 0.5, 1.0)])
hows = st.sampled_from([("", 0), ("a row", 0), ("a row", UNRESERVED), ("dead", DEAD | UNRESERVED), ("a row", 0)])


class Limits(RuleBasedStateMachine):
    """Valkey, Redis 7 and the model say the same, whatever happens in whatever order."""

    servers: ClassVar[tuple[redis.Redis, ...]]

    def __init__(self) -> None:
        super().__init__()
        for client in self.servers:
            client.flushdb()
        self.scripts = [Scripts(client) for client in self.servers]
        self.model = Model()
        self.now = EPOCH * US
        self.stated = 0
        self.ids = 0
        self.limits: dict[str, Limit] = {}
        self.crashed: set[str] = set()
        self.kept: tuple[Model, list[dict[bytes, bytes]]] | None = None
        self.again: Callable[[], None] = lambda: None

    @initialize(
        first=rates,
        second=rates,
        day=st.sampled_from(AMOUNTS),
        hour=st.integers(1, 5),
        stretch=st.sampled_from(AMOUNTS),
        at_most=st.integers(1, 3),
        warn_at=st.lists(shares, min_size=3, max_size=3),
        shadow=st.sets(st.sampled_from(["first", "second", "day", "stretch", "seats"]), max_size=2),
    )
    def policies(
        self,
        first: Limit,
        second: Limit,
        day: int,
        hour: int,
        stretch: int,
        at_most: int,
        warn_at: list[tuple[float, ...]],
        shadow: set[str],
    ) -> None:
        limits = (
            replace(first, name="first"),
            replace(second, name="second"),
            replace(quota(day, "day", zone="Asia/Kolkata", name="day", count="usd"), warn_at=warn_at[0]),
            replace(quota(hour, "hour", name="hour"), warn_at=warn_at[1]),
            replace(rolling(stretch, HOUR, name="stretch", count="total_tokens"), warn_at=warn_at[2]),
            seats(at_most, name="seats"),
        )
        self.limits = {limit.name: replace(limit, shadow=limit.name in shadow) for limit in limits}

    @rule(by=st.one_of(st.integers(0, 20), st.integers(0, 20 * US), st.integers(0, HOUR), st.integers(0, 2 * DAY)))
    def time_passes(self, by: int) -> None:
        self.now += by

    @rule()
    def the_stated_time_passes(self) -> None:
        self.now += min(self.stated, 40 * DAY)

    @rule(data=st.data(), several=st.integers(1, 3), looks=st.integers(0, 5))
    def admit(self, data: st.DataObject, several: int, looks: int) -> None:
        requests = []
        for _ in range(several):
            chosen = data.draw(st.lists(st.sampled_from([*self.limits]), min_size=1, max_size=6, unique=True))
            self.ids += 1
            id_ = "" if looks == 0 else str(self.ids)
            requests.append((id_, [(self.limits[name], self._amount(data, self.limits[name])) for name in chosen]))
        self._admit(requests)
        self.again = lambda: self._admit(requests)

    def _admit(self, requests: Sequence[tuple[str, Sequence[tuple[Limit, int]]]]) -> None:
        answers = self._same(lambda scripts: scripts.admit(*requests))
        starts = self._starts()
        for (id_, asked), said in zip(requests, answers, strict=True):
            self.model.admit(id_, asked, self.now, starts, said)
            self.stated = said.wait

    def _starts(self) -> dict[str, Sequence[int]]:
        return {name: self.scripts[0].starts(limit) for name, limit in self.limits.items() if limit.kind == "quota"}

    def _amount(self, data: st.DataObject, limit: Limit) -> int:
        if limit.kind == "seats":
            return 1
        return data.draw(st.sampled_from([0, 1, limit.capacity // 3, limit.capacity]))

    def _used(self, data: st.DataObject, amount: int) -> int:
        return data.draw(st.sampled_from([0, amount // 2, amount, amount + 1, 3 * amount]))

    @rule(data=st.data(), of=st.integers(0, 7), told=st.booleans(), how=hows)
    def settle(self, data: st.DataObject, of: int, told: bool, how: tuple[str, int]) -> None:
        live = [id_ for id_ in self.model.reservations if id_ not in self.crashed]
        id_ = live[of % len(live)] if live else str(self.ids + 1)
        _, taken = self.model.reservations.get(id_, (0, {}))
        self._settle(
            id_,
            [
                Correction(one.limit, one.amount, self._used(data, one.amount), one.window if told else 0)
                for one in taken.values()
            ],
            *how,
        )

    @rule(data=st.data(), told=st.booleans(), how=hows)
    def settle_what_was_served_while_the_store_was_away(
        self, data: st.DataObject, told: bool, how: tuple[str, int]
    ) -> None:
        self.ids += 1
        starts = self._starts()
        names = data.draw(st.lists(st.sampled_from([*self.limits]), min_size=1, max_size=4, unique=True))
        corrections = []
        for limit in (self.limits[name] for name in names):
            amount = self._amount(data, limit)
            window = starts[limit.name][1] if told and limit.kind == "quota" else 0
            corrections.append(Correction(limit, amount, self._used(data, amount), window))
        self._settle(str(self.ids), corrections, how[0], how[1] | UNRESERVED)

    @rule(of=st.integers(0, 63), how=hows)
    def settle_what_has_ended_before(self, of: int, how: tuple[str, int]) -> None:
        ended = [*self.model.marks]
        if ended:
            self._settle(ended[of % len(ended)], [Correction(self.limits["seats"], 1, 0)], *how)

    @rule(used=st.integers(0, 2))
    def sweep(self, used: int) -> None:
        """What has lapsed is settled with a part of what was taken; nothing that is alive is."""
        found = self._same(lambda scripts: sorted(scripts.sweep(1000)))
        assert set(found) == self.model.sweep(self.now)
        for id_ in found:
            _, taken = self.model.reservations[id_]
            some = [Correction(one.limit, one.amount, one.amount * used // 2) for one in taken.values()]
            self._settle(id_, some, f"swept {id_}", DEAD | SWEPT)

    def _settle(self, id_: str, corrections: list[Correction], row: str, flags: int) -> None:
        def settle() -> None:
            (said,) = self._same(lambda scripts: [scripts.settle(id_, *corrections, row=row, flags=flags)])
            assert said == self.model.settle(id_, corrections, self.now, row=row, flags=flags)

        settle()
        self.again = settle

    @rule(
        fault=st.sampled_from(
            [
                "the reply was lost",
                "a worker crashes",
                "a reservation expires",
                "the scripts are flushed",
                "renew",
                "write again",
            ]
        ),
        of=st.integers(0, 7),
    )
    def happens(self, fault: str, of: int) -> None:
        getattr(self, "_" + fault.replace(" ", "_"))(of)

    def _the_reply_was_lost(self, _: int) -> None:
        """And so the same is sent again."""
        self.again()

    def _a_worker_crashes(self, of: int) -> None:
        """Its requests are never settled."""
        self.crashed.update([*self.model.reservations][of : of + 3])

    def _a_reservation_expires(self, of: int) -> None:
        for id_ in [*self.model.reservations][of : of + 1]:
            for scripts in self.scripts:
                scripts.client.delete(reservation(id_))
            del self.model.reservations[id_]
            self.again = lambda: None  # nobody sends again for so long

    def _the_scripts_are_flushed(self, _: int) -> None:
        for scripts in self.scripts:
            scripts.client.script_flush()

    def _renew(self, of: int) -> None:
        seat = self.limits["seats"]
        holders = [id_ for id_, (_, taken) in self.model.reservations.items() if "seats" in taken]
        id_ = holders[of % len(holders)] if holders else str(self.ids + 7)
        assert self._same(lambda scripts: scripts.renew(id_, limit=seat)) == [self.model.renew(id_, seat, self.now)]

    def _write_again(self, of: int) -> None:
        """What the store has lost is known to its worker."""
        lost = [id_ for id_ in self.model.leases if id_ not in self.model.reservations]
        if lost:
            id_, seat = lost[of % len(lost)], self.limits["seats"]
            said = self._same(lambda scripts: scripts.renew(id_, limit=seat, intent="{}"))
            assert said == [self.model.renew(id_, seat, self.now, intent="{}")]

    @rule(name=st.sampled_from(["first", "second"]), to=rates)
    def a_rate_changes(self, name: str, to: Limit) -> None:
        before, count = self.limits[name], self.model.counts.get(name)
        # What was taken lasts no longer than 285 years at the new rate: a double counts no further.
        if before.count == to.count and (count is None or count.level * to.period <= to.amount * 2**53):
            self.limits[name] = replace(to, name=name, shadow=before.shadow)

    @rule(name=st.sampled_from(["day", "hour", "stretch"]), to=st.sampled_from(AMOUNTS))
    def a_quota_changes(self, name: str, to: int) -> None:
        self.limits[name] = replace(self.limits[name], amount=to, capacity=to)

    @rule()
    def the_replica_has_this(self) -> None:
        self.kept = deepcopy(self.model), [scripts.state() for scripts in self.scripts]

    @precondition(lambda self: self.kept)
    @rule()
    def the_replica_takes_over(self) -> None:
        """What was written since then is lost."""
        assert self.kept is not None
        model, states = self.kept
        self.model = deepcopy(model)
        for scripts, state in zip(self.scripts, states, strict=True):
            with scripts.client.pipeline(transaction=False) as pipeline:
                pipeline.flushdb()
                for key, dump in state.items():
                    pipeline.restore(key, 86_400_000, dump)
                pipeline.execute()

    def teardown(self) -> None:
        if self.limits:
            self._admit([("", [(limit, 1) for limit in self.limits.values()])])
            self._same(lambda scripts: [scripts.rows()])
            for scripts in self.scripts:
                rows = scripts.rows()
                assert rows == self.model.rows
                assert scripts.sums() == (
                    {grain: [len(rows) * by for by in GROWTH] for grain in GRAINS} if rows else {}
                )

    def _same(self, work: Callable[[Scripts], list[Any]]) -> list[Any]:
        for scripts in self.scripts:
            scripts.now = self.now
        first, *others = (work(scripts) for scripts in self.scripts)
        assert all(other == first for other in others)
        return first


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_valkey_redis_and_an_exact_model_agree(valkey: house.Server, redis7: house.Server, shard: int) -> None:
    with valkey.sync() as one, redis7.sync() as other:
        Limits.servers = (one, other)
        run_state_machine_as_test(
            seed(shard)(Limits),
            settings=settings(
                deadline=None,
                max_examples=max(1, EXAMPLES // SHARDS),
                stateful_step_count=50,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


# — what the limits promise, whatever callers do

property_settings = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

limits_of_any_kind = st.one_of(
    rates,
    st.builds(
        quota,
        st.sampled_from(AMOUNTS),
        st.sampled_from(["hour", "day", "week"]),
        count=st.sampled_from(["requests", "usd"]),
    ),
    st.builds(
        rolling,
        st.sampled_from(AMOUNTS),
        st.sampled_from([1000, HOUR, DAY]),
        count=st.sampled_from(["requests", "usd"]),
    ),
)


@dataclass
class Taken:
    """What one request took, and has used at last."""

    at: int
    amount: int
    window: int
    used: int | None = None

    @property
    def counted(self) -> int:
        return self.amount if self.used is None else self.used


class Adversary:
    """Takes what it gets of one limit, and settles it when it likes."""

    def __init__(self, scripts: Scripts, limit: Limit, data: st.DataObject) -> None:
        self.scripts, self.limit, self.data = scripts, limit, data
        self.requests: dict[str, Taken] = {}

    @property
    def live(self) -> list[str]:
        return [id_ for id_, taken in self.requests.items() if taken.used is None]

    def wait(self) -> None:
        """Some moments; or what it takes to refill one, a part, or all."""
        limit = self.limit
        whole = limit.capacity * limit.period // limit.amount if limit.kind == "rate" else limit.period or DAY
        self.scripts.now += self.data.draw(st.sampled_from([1, 10**6, whole // 121, whole // 3, whole, whole + 1]))

    def take(self) -> None:
        left = self.scripts.look((self.limit, 0)).remaining[0]
        for amount in (left + 1, self.data.draw(st.sampled_from([left, -(-left // 2), left // 3]))):
            id_ = str(len(self.requests))
            answer = self.scripts.one(id_, (self.limit, amount))
            if answer.verdict == ADMITTED:
                self.requests[id_] = Taken(self.scripts.now, amount, answer.told[0].window)
            else:  # its id may come again; who is in debt gets not even nothing
                assert amount in (0, left + 1)

    def settle(self, *most: int) -> None:
        if not self.live:
            return
        id_ = self.data.draw(st.sampled_from(self.live))
        taken = self.requests[id_]
        taken.used = self.data.draw(st.sampled_from([0, taken.amount // 2, taken.amount, *most]))
        answer = self.scripts.settle(id_, Correction(self.limit, taken.amount, taken.used, taken.window))
        assert answer == [SETTLED]

    def act(self, steps: int, *most: int) -> None:
        for _ in range(steps):
            kind = self.data.draw(st.sampled_from(["wait", "take", "take", "settle", "settle"]))
            if kind == "settle":
                self.settle(*most)
            elif kind == "take":
                self.take()
            else:
                self.wait()


@property_settings
@given(limit=limits_of_any_kind, data=st.data())
def test_no_window_admits_more_than_its_bound_however_requests_are_settled(
    store: redis.Redis, limit: Limit, data: st.DataObject
) -> None:
    """Who uses at most what it reserved: in any window W of a rate at most burst + rate · W, by what was used."""
    store.flushdb()
    adversary = Adversary(Scripts(store), limit, data)
    adversary.act(25)
    admitted = list(adversary.requests.values())
    for place, first in enumerate(admitted):
        total = 0
        for taken in admitted[place:]:
            total += taken.counted
            window = taken.at - first.at
            if limit.kind == "rate":
                assert total <= limit.capacity + -(-window * limit.amount // limit.period)
            elif (limit.kind == "rolling" and window <= limit.period) or taken.window == first.window:
                assert total <= limit.capacity


@property_settings
@given(limit=limits_of_any_kind, data=st.data())
def test_who_waits_the_stated_time_is_admitted_and_who_waits_less_is_not(
    store: redis.Redis, limit: Limit, data: st.DataObject
) -> None:
    store.flushdb()
    scripts = Scripts(store)
    Adversary(scripts, limit, data).act(10, *range(limit.capacity, 5 * limit.capacity, limit.capacity))
    asked = data.draw(st.sampled_from([1, -(-limit.capacity // 2), limit.capacity]))
    answer = scripts.look((limit, asked))
    start = scripts.now
    if answer.binding and answer.wait < 2**53:
        scripts.now = start + int(answer.wait * 0.95)
        assert answer.wait < 100 or scripts.one("early", (limit, asked)).verdict == REFUSED
        scripts.now = start + answer.wait
    assert scripts.one("late", (limit, asked)).verdict == ADMITTED or answer.wait == 2**53


@property_settings
@given(limit=limits_of_any_kind.filter(lambda limit: limit.holds), data=st.data())
def test_it_never_fits_sooner_than_the_soonest(store: redis.Redis, limit: Limit, data: st.DataObject) -> None:
    """Whatever of what is held comes back, and whenever."""
    store.flushdb()
    scripts = Scripts(store)
    adversary = Adversary(scripts, limit, data)
    adversary.act(10, limit.capacity, 3 * limit.capacity)
    asked = data.draw(st.sampled_from([1, -(-limit.capacity // 2), limit.capacity]))
    answer = scripts.look((limit, asked))
    assert answer.soonest <= answer.wait
    start = scripts.now
    for part in sorted(data.draw(st.lists(st.sampled_from([0, 0.5, 0.9, 0.999]), max_size=6))):
        scripts.now = start + int(answer.soonest * part)
        adversary.settle(limit.capacity)
        assert scripts.look((limit, asked)).binding or answer.soonest < 1000


@property_settings
@given(limit=limits_of_any_kind, data=st.data())
def test_all_comes_back_when_nothing_is_held_and_the_soonest_is_exact_then(
    store: redis.Redis, limit: Limit, data: st.DataObject
) -> None:
    store.flushdb()
    scripts = Scripts(store)
    adversary = Adversary(scripts, limit, data)
    adversary.act(10, limit.capacity)
    while adversary.live:
        adversary.settle()
    answer = scripts.look((limit, limit.capacity))
    assert (answer.told[0].held, answer.wait - answer.soonest) in ((0, 0), (0, 1)) or limit.kind == "rate"


@property_settings
@given(
    limit=st.sampled_from(
        [quota(10, "hour", count="usd"), quota(10, "day", count="usd"), rolling(10, HOUR, count="usd")]
    ),
    uses=st.lists(st.integers(0, 60), min_size=1, max_size=12),
)
def test_in_the_long_run_debt_is_paid_to_the_last_unit_and_not_twice(
    store: redis.Redis, limit: Limit, uses: list[int]
) -> None:
    """A greedy caller who uses what he likes of what he gets: as many windows pass as the capacity needs to hold it."""
    store.flushdb()
    scripts = Scripts(store)
    length = {"hour": HOUR, "day": DAY}.get(limit.window, 121 * HOUR // 120)
    scripts.now = start = scripts.now // (DAY * 121) * (DAY * 121)
    for number, units in enumerate(uses):
        scripts.now += scripts.look((limit, 10)).wait
        answer = scripts.one(str(number), (limit, 10))
        scripts.settle(str(number), Correction(limit, 10, 10 + units, answer.told[0].window))
    scripts.now += scripts.look((limit, 10)).wait
    assert (scripts.now - start) // length == sum(-(-(10 + units) // 10) for units in uses)
    assert scripts.look((limit, 10)).remaining == [10]


@property_settings
@given(limit=limits_of_any_kind, order=st.permutations(range(4)), data=st.data())
def test_the_order_of_settlements_does_not_change_what_is_left(
    store: redis.Redis, limit: Limit, order: list[int], data: st.DataObject
) -> None:
    uses = data.draw(st.lists(st.integers(0, 2 * limit.capacity), min_size=4, max_size=4))
    left = []
    for places in (range(4), order):
        store.flushdb()
        scripts = Scripts(store)
        amount = limit.capacity // 4
        window = 0
        for place in range(4):
            window = scripts.one(str(place), (limit, amount)).told[0].window
        for place in places:
            assert scripts.settle(str(place), Correction(limit, amount, uses[place], window)) == [SETTLED]
        scripts.now += 1
        left.append(scripts.look((limit, limit.capacity))[:4])
    assert left[0] == left[1] or (limit.kind == "rate" and abs(left[0][2] - left[1][2]) <= 1 + left[0][2] // 10**12)


@property_settings
@given(limit=limits_of_any_kind, more=st.sampled_from(AMOUNTS), data=st.data())
def test_a_raised_limit_refuses_nothing_that_was_allowed_and_time_takes_nothing_away(
    store: redis.Redis, limit: Limit, more: int, data: st.DataObject
) -> None:
    store.flushdb()
    scripts = Scripts(store)
    adversary = Adversary(scripts, limit, data)
    adversary.act(10, limit.capacity)
    left = scripts.look((limit, 0)).remaining[0]
    raised = replace(limit, capacity=limit.capacity + more)
    assert scripts.look((raised, 0)).remaining[0] >= left
    for _ in range(4):
        adversary.wait()
        before, left = left, scripts.look((limit, 0)).remaining[0]
        assert left >= before

"""Refusals: what is told between two times, and who is refused again without asking."""

from __future__ import annotations

import pytest

from gateway.errors import QuotaExhausted, RateLimited
from gateway.refusals import Refusals
from gateway.snapshot import Limit
from gateway.standings import POLITE, Standing
from gateway.terms import Charge
from tests.proving.limits import key_of, quota, rate, seats

NOW = 1000.0
TOKENS = rate(600, "minute", burst=100, name="tokens", count="total_tokens")
REQUESTS = rate(60, "minute", name="requests")
ROLLING = quota(1000, "minute", name="rolling", count="total_tokens", rolling=True)
SPEND = quota(1000, "month", name="spend", count="usd")


def charges(*amounts: tuple[Limit, int]) -> tuple[Charge, ...]:
    return tuple(Charge(limit, key_of(limit), "team research", amount) for limit, amount in amounts)


def stand(asked: tuple[Charge, ...], *, held: int = 0) -> tuple[Standing, ...]:
    return tuple(Standing(charge, 0, 10.0, 0, held) for charge in asked)


def refused(refusals: Refusals, asked: tuple[Charge, ...], wait: float, soonest: float, binding: int = 0) -> None:
    refusals.refuse(asked, stand(asked), binding, wait, soonest, NOW, "openai")


def test_what_was_refused_is_refused_again_with_the_time_that_is_left() -> None:
    refusals, asked = Refusals(), charges((TOKENS, 50), (REQUESTS, 1))
    refused(refusals, asked, 5.0, 5.0)
    again = refusals.again(asked, NOW + 0.5, "openai")
    assert isinstance(again, RateLimited)
    assert again.retry_after == pytest.approx(4.5)
    headers = dict(again.extra_headers)
    assert headers[b"ratelimit"] == b'"tokens";r=0;t=10, "requests";r=0;t=10'  # all of its limits, not the binding one


def test_a_refusal_is_repeated_for_a_second_at_most_and_not_beyond_the_soonest() -> None:
    for soonest, until in ((5.0, 1.0), (0.3, 0.3)):
        refusals, asked = Refusals(), charges((TOKENS, 50))
        refused(refusals, asked, 5.0, soonest)
        assert refusals.again(asked, NOW + until - 0.01, "openai") is not None
        assert refusals.again(asked, NOW + until, "openai") is None


def test_who_asks_for_more_of_a_rate_waits_so_much_longer() -> None:
    refusals = Refusals()
    refused(refusals, charges((TOKENS, 50)), 5.0, 5.0)
    again = refusals.again(charges((TOKENS, 70)), NOW, "openai")
    assert again is not None
    assert again.retry_after == pytest.approx(5.0 + 20 / 10)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (charges((TOKENS, 50)), charges((TOKENS, 49))),
        (charges((ROLLING, 50)), charges((ROLLING, 51))),
        (charges((TOKENS, 50), (SPEND, 5)), charges((TOKENS, 50), (SPEND, 6))),
        (charges((TOKENS, 50)), charges((TOKENS, 50), (REQUESTS, 1))),
        (charges((TOKENS, 50)), charges((rate(600, "minute", burst=100, name="tokens", count="total_tokens"), 50))),
    ],
    ids=["less", "more of what does not refill", "more of another limit", "other limits", "other policies"],
)
def test_what_may_be_decided_otherwise_is_asked(was: tuple[Charge, ...], now: tuple[Charge, ...]) -> None:
    refusals = Refusals()
    refused(refusals, was, 5.0, 5.0)
    assert refusals.again(was, NOW, "openai") is not None
    assert refusals.again(now, NOW, "openai") is None


def test_what_only_reservations_keep_out_is_always_asked_and_is_no_exhausted_quota() -> None:
    refusals, asked = Refusals(), charges((SPEND, 50))
    error = refusals.refuse(asked, stand(asked, held=500), 0, 86_400.0, 0.0, NOW, "openai")
    assert isinstance(error, RateLimited)
    assert error.retry_after == POLITE
    assert refusals.again(asked, NOW, "openai") is None


def test_a_quota_that_is_used_up_is_told_as_that_again() -> None:
    refusals, asked = Refusals(), charges((SPEND, 50))
    refused(refusals, asked, 86_400.0, 86_400.0)
    assert isinstance(refusals.again(asked, NOW, "openai"), QuotaExhausted)


def test_between_the_two_times_what_was_learned_decides() -> None:
    refusals, asked = Refusals(), charges((TOKENS, 50))
    key = key_of(TOKENS)
    for number in range(8):
        refusals.returns.take(key, f"{number}", 50, NOW - 10)
        refusals.returns.give(key, f"{number}", 0, NOW - 9.7)
    refusals.returns.take(key, "live", 50, NOW)
    error = refusals.refuse(asked, stand(asked, held=50), 0, 5.0, 0.0, NOW, "openai")
    assert error.retry_after == pytest.approx(0.3, abs=0.01)


def test_who_waits_for_a_seat_is_told_when_one_is_left() -> None:
    refusals, asked = Refusals(), charges((seats(1), 1))
    key = key_of(asked[0].limit)
    refusals.returns.take(key, "a", 1, NOW - 10)
    refusals.returns.give(key, "a", 0, NOW - 8)
    refusals.returns.take(key, "b", 1, NOW - 0.5)
    error = refusals.refuse(asked, stand(asked), 0, 0.0, 0.0, NOW, "openai")
    assert error.retry_after == pytest.approx(1.5, abs=0.05)

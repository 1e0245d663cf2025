"""Where a caller stands, in headers and in words."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Dialect, GatewayError
from gateway.snapshot import Limit
from gateway.standings import Standing, _go_duration, refusal, standing_headers
from gateway.terms import Charge
from tests.proving.limits import key_of, quota, rate, seats


def standing(limit: Limit, remaining: int, reset: float = 0.0, amount: int = 1) -> Standing:
    return Standing(Charge(limit, key_of(limit), "team research", amount), remaining, reset, 0)


REQUESTS = standing(rate(600, "minute", burst=100, name="team-requests"), 40, 6.0)
INPUT = standing(rate(1_000_000, "minute", name="input", count="input_tokens"), 900_000, 6.0)
OUTPUT = standing(rate(100_000, "minute", name="output", count="output_tokens"), 10_000, 54.0)
MONTH = standing(quota(50_000_000, "month", name="month", count="total_tokens"), 49_000_000, 1_000_000.4)
SPEND = standing(quota(500_000_000, "month", name="spend", count="usd"), 0, 1_000_000.4)
SEATS = standing(seats(64), 3)
ALL = (REQUESTS, INPUT, OUTPUT, SEATS, MONTH, SPEND)


def headers(
    *standings: Standing, binding: Standing | None = None, dialect: Dialect = "openai", now: float = 0.0
) -> dict[str, str]:
    told = standing_headers(standings, binding, dialect, now)
    fields = [(name.decode(), value.decode()) for name, value in told]
    assert len(dict(fields)) == len(fields)
    return dict(fields)


def refused(error: GatewayError) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in error.headers()}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0000001, "0ms"),
        (0.000001, "1ms"),
        (0.012, "12ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (4.35, "4.35s"),
        (59.999, "59.999s"),
        (59.9999, "1m0s"),
        (179.56, "2m59.56s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (3661.5, "1h1m1.5s"),
        (2_592_000, "720h0m0s"),
    ],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert _go_duration(seconds) == text


@given(st.integers(0, 10**13))
def test_a_duration_is_never_shorter_than_the_wait_and_at_most_a_millisecond_longer(us: int) -> None:
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s)?|(\d+)ms", _go_duration(us / 1e6))
    assert found is not None
    hours, minutes, seconds, ms = (float(part or 0) for part in found.groups())
    assert us <= round((hours * 3600 + minutes * 60 + seconds) * 1e6 + ms * 1e3) < us + 1000


def test_of_each_sort_the_limit_with_the_least_left_is_shown() -> None:
    shown = {name: value for name, value in headers(*ALL).items() if name.startswith("x-")}
    assert shown == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "40",
        "x-ratelimit-reset-requests": "6s",
        "x-ratelimit-limit-tokens": "100000",
        "x-ratelimit-remaining-tokens": "10000",
        "x-ratelimit-reset-tokens": "54s",
    }


def test_the_limit_that_refuses_is_the_one_that_is_shown() -> None:
    shown = headers(*ALL, binding=INPUT)
    assert (shown["x-ratelimit-limit-tokens"], shown["x-ratelimit-remaining-tokens"]) == ("1000000", "900000")


def test_a_caller_without_limits_is_told_of_none() -> None:
    assert headers() == {}


def test_all_limits_stand_in_the_structured_fields() -> None:
    shown = headers(*ALL)
    assert shown["ratelimit-policy"] == (
        '"team-requests";q=600;w=60, "input";q=1000000;w=60;qu="input-tokens", '
        '"output";q=100000;w=60;qu="output-tokens", "seats";q=64;qu="concurrent-requests", '
        '"month";q=50000000;qu="total-tokens", "spend";q=500000000;qu="usd"'
    )
    assert shown["ratelimit"] == (
        '"team-requests";r=40;t=6, "input";r=900000;t=6, "output";r=10000;t=54, "seats";r=3, '
        '"month";r=49000000;t=1000001, "spend";r=0;t=1000001'
    )


# RFC 9651: a list of strings with integer and string parameters.
_ITEM = r'"[ !#-\[\]-~]*"(;[a-z*][a-z0-9_.*-]*=(-?\d{1,15}|"[ !#-\[\]-~]*"))*'


@given(
    amount=st.integers(1, 10**18),
    remaining=st.integers(0, 10**18),
    reset=st.floats(0, 1e9),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
)
def test_the_structured_fields_are_well_formed(amount: int, remaining: int, reset: float, name: str) -> None:
    shown = headers(*(standing(limit, remaining, reset) for limit in (rate(amount, "day", name=name), seats(1))))
    for field in ("ratelimit", "ratelimit-policy"):
        assert re.fullmatch(f"{_ITEM}(, {_ITEM})*", shown[field])


def test_a_rate_says_when_to_come_again() -> None:
    error = refusal(ALL, REQUESTS, 1.2341)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.message == (
        "team research is over its rate team-requests (600 requests per minute): 60 of 100 requests used, "
        "1 asked for; try again in 1.235s"
    )
    told = refused(error)
    assert (told["retry-after"], told["retry-after-ms"]) == ("2", "1235")
    assert told["x-ratelimit-remaining-requests"] == "40"
    assert "x-should-retry" not in told


@pytest.mark.parametrize(
    ("wait", "seconds", "ms"), [(0.0001, "1", "1"), (1, "1", "1000"), (1.0001, "2", "1001"), (90, "90", "90000")]
)
def test_retry_after_is_whole_seconds_and_not_too_short(wait: float, seconds: str, ms: str) -> None:
    told = refused(refusal(ALL, REQUESTS, wait))
    assert (told["retry-after"], told["retry-after-ms"]) == (seconds, ms)


def test_a_quota_says_that_waiting_does_not_help() -> None:
    error = refusal(ALL, SPEND, 1_000_000.4)
    assert (error.status, error.code) == (429, "insufficient_quota")
    assert error.message == (
        "team research has exhausted its quota spend of this month: 500000000 of 500000000 micro-dollars used, "
        "1 asked for; it starts anew in 277h46m40.4s"
    )
    told = refused(error)
    assert told["x-should-retry"] == "false"
    assert not {"retry-after", "retry-after-ms"} & told.keys()


def test_a_caller_without_a_seat_is_told_how_many_are_taken() -> None:
    error = refusal(ALL, SEATS, 0)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.message == (
        "team research has 61 of 64 concurrent requests open (limit seats); one more fits when one of them ends"
    )
    assert refused(error)["retry-after"] == "1"


# — in Anthropic's words

NOON = 1_790_510_400.0  # 2026-09-27T12:00:00Z


def test_anthropics_clients_read_sorts_and_times_of_their_own() -> None:
    shown = headers(*ALL, dialect="anthropic", now=NOON + 0.5)
    assert {name: value for name, value in shown.items() if not name.startswith("ratelimit")} == {
        "anthropic-ratelimit-requests-limit": "100",
        "anthropic-ratelimit-requests-remaining": "40",
        "anthropic-ratelimit-requests-reset": "2026-09-27T12:00:07Z",
        "anthropic-ratelimit-tokens-limit": "100000",
        "anthropic-ratelimit-tokens-remaining": "10000",
        "anthropic-ratelimit-tokens-reset": "2026-09-27T12:00:55Z",
        "anthropic-ratelimit-input-tokens-limit": "1000000",
        "anthropic-ratelimit-input-tokens-remaining": "900000",
        "anthropic-ratelimit-input-tokens-reset": "2026-09-27T12:00:07Z",
        "anthropic-ratelimit-output-tokens-limit": "100000",
        "anthropic-ratelimit-output-tokens-remaining": "10000",
        "anthropic-ratelimit-output-tokens-reset": "2026-09-27T12:00:55Z",
    }


def test_the_structured_fields_are_the_same_in_both_dialects() -> None:
    openai, anthropic = headers(*ALL), headers(*ALL, dialect="anthropic")
    for field in ("ratelimit", "ratelimit-policy"):
        assert openai[field] == anthropic[field]


def test_the_limit_that_refuses_is_shown_in_each_of_its_sorts() -> None:
    shown = headers(*ALL, binding=INPUT, dialect="anthropic")
    assert shown["anthropic-ratelimit-tokens-limit"] == shown["anthropic-ratelimit-input-tokens-limit"] == "1000000"
    assert shown["anthropic-ratelimit-output-tokens-limit"] == "100000"


def test_a_sort_without_a_limit_is_not_spoken_of() -> None:
    shown = headers(MONTH, dialect="anthropic")
    assert {name for name in shown if name.startswith("anthropic")} == {
        f"anthropic-ratelimit-tokens-{what}" for what in ("limit", "remaining", "reset")
    }
    assert headers(dialect="anthropic") == {}


@given(reset=st.floats(0, 1e18), now=st.floats(0, 4e9))
def test_a_reset_is_a_time_that_is_not_too_early(reset: float, now: float) -> None:
    shown = headers(standing(rate(1, "day"), 0, reset), dialect="anthropic", now=now)
    told = shown["anthropic-ratelimit-requests-reset"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told)
    at = datetime.fromisoformat(told).timestamp()
    assert told == "9999-12-31T23:59:59Z" or now + reset <= at <= now + reset + 1


def test_without_a_time_it_is_the_clocks() -> None:
    before = int(time.time())
    told = dict(standing_headers((REQUESTS,), dialect="anthropic"))[b"anthropic-ratelimit-requests-reset"].decode()
    assert before + 6 <= datetime.fromisoformat(told).replace(tzinfo=UTC).timestamp() <= time.time() + 7


@pytest.mark.parametrize("bound", [REQUESTS, SPEND, SEATS])
def test_a_refusal_names_its_limit_and_speaks_the_dialect(bound: Standing) -> None:
    error = refusal(ALL, bound, 1, "anthropic")
    assert error.policies == (bound.charge.limit.name,)
    told = refused(error)
    assert "anthropic-ratelimit-requests-limit" in told
    assert "x-ratelimit-limit-requests" not in told
    assert "x-ratelimit-limit-requests" in refused(refusal(ALL, bound, 1))

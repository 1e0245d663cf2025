"""Where a caller stands, in headers and in words."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Dialect, GatewayError
from gateway.language import Count
from gateway.snapshot import STRETCHES, Limit
from gateway.standings import Standing, _go_duration, refusal, shown, standing_headers
from gateway.terms import Charge
from tests.proving.limits import key_of, quota, rate, seats


def standing(limit: Limit, remaining: int, reset: float = 0.0, amount: int = 1, held: int = 0) -> Standing:
    return Standing(Charge(limit, key_of(limit), "team research", amount), remaining, reset, 0, held)


def rolling(amount: int, window: str, *, name: str = "rolling", count: Count = "total_tokens") -> Limit:
    limit = quota(amount, window, name=name, count=count)
    return replace(limit, kind="rolling", period=STRETCHES[window] * 1_000_000, zone=None)


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
        "x-ratelimit-limit-tokens-prompt": "1000000",
        "x-ratelimit-remaining-tokens-prompt": "900000",
        "x-ratelimit-limit-tokens-generated": "100000",
        "x-ratelimit-remaining-tokens-generated": "10000",
    }


def test_what_a_cache_did_not_have_of_a_prompt_is_a_sort_of_its_own_and_of_anthropics_input() -> None:
    uncached = standing(rate(5000, "minute", name="uncached", count="uncached_input_tokens"), 4000, 1.0)
    told = headers(uncached)
    assert {name for name in told if "tokens" in name} == {
        *(f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")),
        *(f"x-ratelimit-{what}-tokens-cache-adjusted-prompt" for what in ("limit", "remaining")),
    }
    assert told["x-ratelimit-remaining-tokens-cache-adjusted-prompt"] == "4000"
    assert headers(uncached, dialect="anthropic")["anthropic-ratelimit-input-tokens-remaining"] == "4000"


def soft(share: float | None, remaining: int, *, shadow: bool = False) -> Standing:
    return standing(replace(rate(100, "minute"), soft=share, shadow=shadow), remaining)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize(
    ("standings", "told"),
    [
        ((soft(None, 0),), None),
        ((soft(0.8, 21),), "no"),
        ((soft(0.8, 20),), "yes"),
        ((soft(0.07, 94),), "no"),  # 0.07 of 100 is 7, and 7.000000000000001 in floats
        ((soft(0.07, 93),), "yes"),
        ((soft(1.0, 1),), "no"),
        ((soft(1.0, 0),), "yes"),
        ((soft(None, 0), soft(0.5, 60), soft(0.3, 60)), "yes"),
        ((soft(0.8, 0, shadow=True),), None),
        ((soft(0.8, 0, shadow=True), soft(0.8, 50)), "no"),
    ],
)
def test_a_soft_limit_says_from_its_share_on_that_it_is_over(
    standings: tuple[Standing, ...], told: str | None, dialect: Dialect
) -> None:
    assert headers(*standings, dialect=dialect).get("x-ratelimit-over-limit") == told


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_limit_in_shadow_is_in_no_header(dialect: Dialect) -> None:
    hidden = standing(replace(rate(5, "minute", name="hidden"), shadow=True), 0, 9.0)
    assert headers(hidden, *ALL, hidden, dialect=dialect) == headers(*ALL, dialect=dialect)
    assert headers(hidden, dialect=dialect) == {}


def test_a_rolling_quota_tells_its_stretch_and_a_calendar_month_has_none() -> None:
    some = [standing(rolling(9, window, name=window), 5, 7.0) for window in ("hour", "day", "week", "month")]
    told = headers(*some, MONTH)
    assert re.findall(r'"(\w+)";q=\d+(?:;w=(\d+))?', told["ratelimit-policy"]) == [
        ("hour", "3600"),
        ("day", "86400"),
        ("week", "604800"),
        ("month", "2592000"),
        ("month", ""),
    ]
    assert told["ratelimit"].startswith('"hour";r=5;t=7, ')


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
    ("held", "words"), [(0, ""), (25, "25 of them reserved by requests under way, "), (90, "60 of them reserved")]
)
def test_a_refusal_tells_what_of_it_requests_under_way_hold(held: int, words: str) -> None:
    bound = standing(rate(600, "minute", burst=100), 40, 6.0, held=held)  # a rate refills while it is held
    assert f"60 of 100 requests used, {words}" in refusal((bound,), bound, 1.0).message
    assert ("reserved" in refusal((bound,), bound, 1.0).message) is bool(held)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (quota(100, "month", name="q", count="output_tokens"), "this month"),
        (rolling(100, "month", name="q", count="output_tokens"), "the last 30 days"),
        (rolling(100, "week", name="q", count="output_tokens"), "the last 7 days"),
        (rolling(100, "day", name="q", count="output_tokens"), "the last 24 hours"),
        (rolling(100, "hour", name="q", count="output_tokens"), "the last 60 minutes"),
    ],
)
def test_a_quota_that_only_reservations_fill_says_when_to_come_again(limit: Limit, words: str) -> None:
    bound = standing(limit, 10, 5000.0, amount=30, held=40)
    error = refusal((bound,), bound, 0.32, held_back=True)
    assert (error.status, error.code, error.policies) == (429, "rate_limit_exceeded", ("q",))
    assert error.message == (
        f"team research has no room now in its quota q of {words}: 90 of 100 output tokens used, "
        "40 of them reserved by requests under way, 30 asked for; try again in 320ms"
    )
    told = refused(error)
    assert (told["retry-after"], told["retry-after-ms"]) == ("1", "320")
    assert "x-should-retry" not in told


@pytest.mark.parametrize(("wait", "told"), [(60.0, None), (60.1, "false")])
def test_a_long_wait_is_told_and_sdks_are_told_not_to_wait_it(wait: float, told: str | None) -> None:
    for bound in (REQUESTS, MONTH):
        found = refused(refusal(ALL, bound, wait, held_back=bound is MONTH))
        assert found.get("x-should-retry") == told
        assert found["retry-after-ms"] == str(round(wait * 1000))


def test_a_rolling_quota_that_is_used_up_says_when_it_has_room_again() -> None:
    bound = standing(rolling(100, "week", name="week"), 10, 500_000.0, amount=30)
    error = refusal((bound,), bound, 7200.0)
    assert (error.code, error.policies) == ("insufficient_quota", ("week",))
    assert error.message == (
        "team research has exhausted its quota week of the last 7 days: 90 of 100 total tokens used, 30 asked for; "
        "it has room again in 2h0m0s"
    )
    assert not {"retry-after", "retry-after-ms"} & refused(error).keys()
    assert refused(error)["x-should-retry"] == "false"


def test_the_quota_of_a_minute_is_refused_as_a_rate_is() -> None:
    bound = standing(rolling(100, "minute", name="q"), 10, 60.0, amount=30)
    error = refusal((bound,), bound, 7.5)
    assert (error.code, error.retry_after) == ("rate_limit_exceeded", 7.5)
    assert "its quota q of the last 60 seconds: 90 of 100 total tokens used, 30 asked for" in error.message


def test_a_quota_whose_next_window_begins_with_debt_says_when_it_has_room_again() -> None:
    assert refusal(ALL, SPEND, 2_000_000.0).message.endswith("; it has room again in 555h33m20s")


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


# — the whole of it


def test_a_limit_is_shown_with_what_is_used_reserved_and_left_of_it() -> None:
    limit = replace(rate(1000, "minute", burst=100, name="out", count="output_tokens"), soft=0.7, models=("kimi*",))
    assert shown(standing(limit, 30, 4.2001, held=50), NOON) == {
        "name": "out",
        "scope": "team research",
        "models": ("kimi*",),
        "kind": "rate",
        "policy": "1000/minute",
        "mode": "enforce",
        "count": "output_tokens",
        "unit": "output tokens",
        "limit": 100,
        "used": 20,
        "reserved": 50,
        "remaining": 30,
        "over_soft_limit": True,
        "reset_s": 4.201,
        "resets_at": "2026-09-27T12:00:05Z",
    }


def test_dollars_are_shown_in_micro_dollars_and_in_dollars() -> None:
    found = shown(standing(quota(500_000_000, "month", zone="Europe/Zurich", count="usd"), 1_250_001, 60.0), NOON)
    amounts = {name: found[name] for name in ("unit", "policy", "limit", "used", "reserved", "remaining", "time_zone")}
    assert amounts == {
        "unit": "micro-dollars",
        "policy": "500/month",
        "limit": 500_000_000,
        "used": 498_749_999,
        "reserved": 0,
        "remaining": 1_250_001,
        "time_zone": "Europe/Zurich",
    }
    assert found["usd"] == {"limit": 500.0, "used": 498.749999, "reserved": 0.0, "remaining": 1.250001}
    assert "over_soft_limit" not in found


def test_seats_have_no_reset_and_rolling_quotas_no_time_zone() -> None:
    open_ = shown(SEATS, NOON)
    assert (open_["policy"], open_["used"], open_["reset_s"], open_["resets_at"]) == ("64 at once", 61, None, None)
    week = shown(standing(rolling(9, "week"), 9, 3.0), NOON)
    assert (week["policy"], week["reset_s"]) == ("9/week rolling", 3.0)
    assert "time_zone" not in week


@pytest.mark.parametrize(("shadow", "mode"), [(False, "enforce"), (True, "shadow")])
def test_a_limit_in_shadow_is_shown_as_one(shadow: bool, mode: str) -> None:
    assert shown(standing(replace(rate(5, "minute"), shadow=shadow), 0), NOON)["mode"] == mode


@given(st.integers(0, 10**15), st.integers(0, 10**15), st.integers(0, 10**15), st.floats(0, 1e9))
def test_what_is_used_reserved_and_left_adds_up_and_is_json(amount: int, taken: int, held: int, reset: float) -> None:
    limit = rate(amount + 1, "day", count="usd")
    found = shown(standing(limit, max(0, amount + 1 - taken), reset, held=held))
    used, reserved, remaining = (found[what] for what in ("used", "reserved", "remaining"))
    assert isinstance(used, int)
    assert isinstance(reserved, int)
    assert isinstance(remaining, int)
    assert used >= 0 <= reserved
    assert used + reserved + remaining == found["limit"]
    assert json.loads(json.dumps(found))["usd"].keys() == {"limit", "used", "reserved", "remaining"}
    assert isinstance(found["reset_s"], float)
    assert reset - 1e-6 <= found["reset_s"] <= reset + 0.0011

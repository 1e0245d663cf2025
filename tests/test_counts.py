"""What the scripts are told of charges, and the calendar that quotas go by."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import cache
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import counts
from gateway.counts import corrected, running_window, taken
from gateway.snapshot import Limit, windows_around
from gateway.terms import Charge
from tests.proving.limits import key_of, quota, rate, seats

EPOCH = 1_772_000_000  # s: a Wednesday in February 2026


def charge(limit: Limit, amount: int = 5) -> Charge:
    return Charge(limit, key_of(limit), "team research", amount)


def test_a_rate_is_told_by_its_units_and_its_period() -> None:
    tokens = rate(600, "minute", burst=100, count="input_tokens")
    assert taken(charge(tokens)) == ("r", 5, 100, 1, 600, 60_000_000)
    assert corrected(charge(tokens), 3, 0) == ("r", -2, 5, 1, 600, 60_000_000)


def test_what_counts_requests_holds_nothing_and_a_shadow_is_told() -> None:
    assert taken(charge(rate(600, "minute"), 1))[3] == 0
    assert taken(charge(rate(600, "minute", shadow=True), 1))[3] == 2
    assert taken(charge(rate(600, "minute", count="usd", shadow=True), 1))[3] == 3
    assert taken(charge(seats(4), 1)) == ("s", 1, 4, 0)
    assert corrected(charge(seats(4), 1), 0, 0) == ("s", -1, 1, 0)


def test_a_calendar_quota_is_told_with_four_windows_around_now_and_its_thresholds() -> None:
    spend = quota(500, "day", count="usd", warn_at=(0.8, 0.95))
    letter, amount, capacity, flags, nominal, *starts, first, second = taken(charge(spend))
    assert (letter, amount, capacity, flags, nominal, first, second) == ("q", 5, 500, 1, 86_400, 400, 475)
    assert int(starts[1]) <= time.time() < int(starts[2])
    assert len(starts) == 4
    assert running_window(spend) == starts[1]
    assert corrected(charge(spend), 9, 77) == ("q", 4, 5, 1, 500, 86_400, 77, 400, 475)


def test_a_rolling_quota_is_told_by_its_stretch() -> None:
    tokens = quota(500, "month", count="total_tokens", rolling=True, warn_at=(0.5,))
    stretch = 30 * 86_400 * 10**6
    assert taken(charge(tokens)) == ("w", 5, 500, 1, stretch, 250)
    assert corrected(charge(tokens), 5, 12) == ("w", 0, 5, 1, 500, stretch, 12, 250)
    assert running_window(tokens) == counts.UNKNOWN_WINDOW


@pytest.mark.parametrize(("share", "expected"), [(0.95, 475_000_000), (0.8, 400_000_000), (1e-3, 500_000)])
def test_a_threshold_is_its_share_to_the_unit(share: float, expected: int) -> None:
    """As a decimal, which a double is not: 0.95 of 500,000,000 would be one more."""
    assert taken(charge(quota(500_000_000, "day", count="usd", warn_at=(share,))))[-1] == expected


# — calendar windows


ZONES = ["UTC", "Europe/Zurich", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "America/Havana"]
_START, _END = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (2025, 2028))
LONGEST = {"hour": 2 * 3600, "day": 25 * 3600, "week": 169 * 3600, "month": 745 * 3600}


@cache
def shifts(zone: str) -> list[int]:
    """The instants at which a zone's clocks are put forward or back, to the half hour."""
    name, step = ZoneInfo(zone), 1800
    offsets = [datetime.fromtimestamp(at, UTC).astimezone(name).utcoffset() for at in range(_START, _END, step)]
    return [_START + i * step for i in range(1, len(offsets)) if offsets[i] != offsets[i - 1]] or [EPOCH]


@pytest.mark.parametrize("window", LONGEST)
@pytest.mark.parametrize("zone", ZONES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_instant_lies_in_exactly_one_window(data: st.DataObject, zone: str, window: str) -> None:
    near = st.builds(int.__add__, st.sampled_from(shifts(zone)), st.integers(-8000, 8000))
    at = data.draw(st.one_of(near, st.integers(_START + 10**7, _END - 10**7)))

    def around(at: float) -> list[int]:
        instants = windows_around(window, ZoneInfo(zone), datetime.fromtimestamp(at, UTC))
        return [int(instant.timestamp()) for instant in instants]

    before, own, after, last = around(at)
    assert own <= at < after
    assert around(own) == around(after - 1) == [before, own, after, last]
    assert around(after)[:3] == [own, after, last]
    assert around(before)[1:3] == [before, own]
    assert 0 < after - own <= LONGEST[window]

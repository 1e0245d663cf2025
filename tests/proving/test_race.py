"""Two seeds of the race, and the judge: it finds what is beyond, and nothing else."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.proving.house import MODEL
from tests.proving.race import (
    KINDS,
    ROUNDING,
    SHARED,
    Served,
    course,
    fullest,
    policies,
    race,
    rates,
    seats,
    served,
)
from tests.proving.workers import Asked, Entry, Plan, answer_tokens, fleet, prompt_tokens

# — through real gateways


async def test_no_window_of_any_limit_holds_more_than_it_may_by_the_count_of_the_backend(store_url: str) -> None:
    courses = [course(seed) for seed in (2, 3)]
    teams = [team for one in courses for team in one.teams]
    async with fleet(store_url, policies(courses), teams, workers=4) as gateways:
        verdicts = [await race(gateways, one, seconds=2.0) for one in courses]
        assert [line for line in gateways.troubles() if line["level"] != "warning"] == []
    beyond = {name: full for v in verdicts for name, full in v.full.items() if full.beyond > ROUNDING}
    assert beyond == {}
    assert {status for v in verdicts for status in v.statuses} == {200, 429}
    full = [name for v in verdicts for name, full in v.full.items() if full.share > 0.7]
    assert len(full) >= 2  # they were raced for


async def test_what_has_drained_of_a_reservation_is_no_room_when_it_is_given_back(store_url: str) -> None:
    """One request holds nearly all of a burst until that has refilled. Then a second one takes it, the first ends with
    next to nothing used, and what comes back is not a second burst."""
    limit = {"name": "tokens", "count": "total_tokens", "rate": "24000/minute", "burst": 600, "per": ["team"]}
    documents = {
        "models": {MODEL: {"pool": "demo"}},
        "plans": {"p": {"limits": [limit]}},
        "teams": {"one": {"organisation": "acme", "plan": "p"}},
    }
    body = {"prompt": "Hi", "max_tokens": 500}
    async with fleet(store_url, documents, ["one"], workers=2) as gateways:
        first = asyncio.ensure_future(gateways.ask("one", body, Plan(tokens=5, seconds=2.2)))
        await asyncio.sleep(1.8)
        everything = [await gateways.ask("one", body, Plan(tokens=500)), await first]
        everything += [await gateways.ask("one", body, Plan(tokens=500)) for _ in range(2)]
        taken = [
            (asked.sent, entry.arrived, entry.prompt + entry.produced)
            for asked in everything
            if (entry := gateways.ledger.get(asked.id)) is not None
        ]
    assert [asked.status for asked in everything[:2]] == [200, 200]
    assert rates(600, 400, taken).beyond <= ROUNDING


# — the courses


def test_two_seeds_that_follow_one_another_have_limits_of_every_kind() -> None:
    for seed in (0, 8):
        names = {
            limit["name"] for one in (course(seed), course(seed + 1)) for some in one.teams.values() for limit in some
        }
        assert names == {kind.replace(" ", "-") for kind in KINDS}
    shared = {limit["name"] for seed in range(10) for limit in course(seed).shared}
    assert shared == {kind.replace(" ", "-") for kind in SHARED}
    assert course(5) == course(5) != course(6)


# — the judge


def at(sent: float, arrived: float | None = None, until: float | None = None, **given: Any) -> Served:
    arrived = sent if arrived is None else arrived
    return Served(sent, arrived, arrived if until is None else until, **{"prompt": 0, "completion": 0, **given})


RATE = {"count": "requests", "rate": "60/minute", "burst": 2, "per": ["team"]}


@pytest.mark.parametrize(
    ("limit", "requests", "beyond"),
    [
        (RATE, [at(0), at(0), at(1)], 0),
        (RATE, [at(0), at(0), at(0.5)], 0.5),
        (RATE, [at(0), at(0), at(0.5, 1.0)], 0),  # it may have been admitted at 1.0
        (RATE, [at(0), at(0), at(0.5, answered=0)], 0),
        (RATE, [at(0, scopes={"team": "a"}), at(0, scopes={"team": "a"}), at(0, scopes={"team": "b"})], 0),
        ({**RATE, "count": "total_tokens"}, [at(0, prompt=2), at(1, completion=1)], 0),
        ({**RATE, "count": "total_tokens"}, [at(0, prompt=2), at(1, completion=4)], 3),
        ({**RATE, "count": "input_tokens"}, [at(0, prompt=2), at(1, completion=4)], 0),
        ({**RATE, "count": "output_tokens", "burst": 1}, [at(0, completion=2)], 1),
        ({**RATE, "count": "usd", "burst": 1}, [at(0, prompt=1), at(0, completion=500)], 1000),
        ({"count": "requests", "quota": "2/hour", "per": ["team"]}, [at(0), at(3599), at(3600)], 0),
        ({"count": "requests", "quota": "2/hour", "per": ["team"]}, [at(0), at(3599), at(3599, 3600)], 0),
        ({"count": "requests", "quota": "2/hour", "per": ["team"]}, [at(0), at(0), at(3599)], 1),
        ({"count": "requests", "quota": "2/hour", "rolling": True, "per": ["team"]}, [at(0), at(0), at(1)], 1),
        ({"count": "concurrent_requests", "at_most": 1, "per": ["team"]}, [at(0, 1, 2), at(0, 2, 3)], 0),
        ({"count": "concurrent_requests", "at_most": 1, "per": ["team"]}, [at(0, 1, 2), at(0, 1.5, 3)], 1),
    ],
)
def test_the_judge_counts_what_was_surely_inside(limit: dict[str, Any], requests: list[Served], beyond: float) -> None:
    assert fullest(limit, requests).beyond == pytest.approx(beyond)


def test_a_quota_begins_with_the_hour_of_the_calendar() -> None:
    quota = {"count": "requests", "quota": "1/hour", "per": ["team"]}
    assert fullest(quota, [at(10), at(20)], since_1970=3585.0).beyond == 0
    assert fullest(quota, [at(10), at(20)], since_1970=3595.0).beyond == 1


TAKEN = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 5), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1], t[2])),
    max_size=12,
)


@given(TAKEN, st.integers(1, 20), st.integers(0, 4))
def test_the_fullest_window_is_the_fullest_of_all_windows(
    taken: list[tuple[int, int, int]], capacity: int, rate: int
) -> None:
    begins, ends = {sent for sent, _, _ in taken}, {arrived for _, arrived, _ in taken}
    most = 0
    for begin, end in product(begins, ends):
        if begin <= end:
            inside = sum(amount for sent, arrived, amount in taken if begin <= sent and arrived <= end)
            most = max(most, inside - capacity - rate * (end - begin))
    assert rates(capacity, rate, taken).beyond == most


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=12))
def test_seats_are_counted_where_most_of_them_are_taken(held: list[tuple[int, int]]) -> None:
    spans = [(begin, begin + length) for begin, length in held]
    most = max((sum(begin <= at < end for begin, end in spans) for at in range(30)), default=0)
    assert seats(1, spans).share == most


def test_of_a_caller_who_left_counts_what_he_had_received() -> None:
    asked = Asked("1", "a", {}, Plan(9), sent=1.0, left=3.0, received=4)
    assert served(asked, Entry(2.0, prompt=7, produced=8), {}) == at(1, 2, 3, prompt=7, completion=4)
    silent = Asked("1", "a", {}, Plan(9), sent=1.0, left=3.0)
    assert served(silent, Entry(2.0, prompt=7, produced=8, ended=2.5), {}) == at(1, 2, 2.5, answered=0)
    whole = Asked("1", "a", {}, Plan(9), sent=1.0)
    assert served(whole, Entry(2.0, prompt=7, produced=8, ended=2.5), {}) == at(1, 2, 2.5, prompt=7, completion=8)
    counted = Asked("1", "a", {}, Plan(9, usage="finish"), sent=1.0, left=3.0, received=4)
    assert served(counted, Entry(2.0, prompt=7, produced=8), {}) == at(1, 2, 3, completion=4)


# — the backend


@pytest.mark.parametrize(
    ("body", "prompt", "answer"),
    [
        ({"prompt": "12345"}, 3 + 1, 9),
        ({"prompt": "ä", "max_tokens": 4}, 1 + 1, 4),
        ({"prompt": ["12", "123"], "max_tokens": 4, "n": 3}, 1 + 2 + 2, 24),
        ({"prompt": [1, 2, 3], "max_tokens": None}, 3, 9),
        ({"messages": [{"content": "12"}, {"content": "1"}], "max_completion_tokens": 2}, 1 + 1 + 2, 2),
    ],
)
def test_the_backend_counts_for_itself_and_keeps_to_what_is_allowed(
    body: dict[str, Any], prompt: int, answer: int
) -> None:
    plan = Plan(tokens=9, density=2.0, extra=1)
    assert (prompt_tokens(body, plan), answer_tokens(body, plan)) == (prompt, answer)


async def test_a_caller_counts_the_tokens_that_come_and_leaves_in_time(store_url: str) -> None:
    documents = {
        "models": {MODEL: {"pool": "demo"}},
        "plans": {"p": {"limits": []}},
        "teams": {"one": {"organisation": "acme", "plan": "p"}},
    }
    body = {"prompt": "Hi", "max_tokens": 40, "stream": True}
    async with fleet(store_url, documents, ["one"], workers=1) as gateways:
        whole = await gateways.ask("one", body, Plan(tokens=40, seconds=0.1))
        left = await gateways.ask("one", body, Plan(tokens=40, seconds=5.0), leave=1.5)
    assert (whole.status, whole.received, whole.left) == (200, 40, None)
    assert gateways.ledger[whole.id].produced == 40
    assert left.status == 200
    assert left.left is not None
    assert 0 < left.received <= gateways.ledger[left.id].produced < 40
    assert gateways.ledger[left.id].ended is None

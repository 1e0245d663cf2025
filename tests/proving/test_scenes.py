"""The scenes in small: what is told is honest, what is served is near what fits, and never beyond a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway.embedded import _server_binary
from tests.proving import house
from tests.proving.race import ROUNDING, Full
from tests.proving.scenes import (
    ALONE,
    LONG,
    MOST,
    SCENES,
    Ask,
    Limit,
    Mode,
    Scene,
    Seen,
    alone,
    long_answers,
    name,
    policies,
    saturation,
    short_answers,
    split,
    worst_case,
)
from tests.proving.workers import Asked, Fleet, Plan, fleet

QUICK = Limit(a_minute=30_000, burst=4500)  # refilled after nine seconds
SMALL = Limit(a_minute=5000, burst=1000)
LITTLE = Ask("The sky is", 100, Plan(tokens=10, seconds=0.1))
QUICKLY: list[tuple[Scene, Mode]] = [
    (long_answers, "max"),
    (long_answers, "expected"),
    (worst_case, "max"),
    (worst_case, "expected"),
    (worst_case, "input"),
]
SMALLER: list[tuple[Scene, Mode]] = [(short_answers, "max"), (saturation, "expected")]


@pytest.fixture(scope="module")
async def gateways() -> AsyncIterator[Fleet]:
    """Two gateways on a store of their own; every scene has a team for itself."""
    documents, more = policies(QUICKLY, QUICK), policies(SMALLER, SMALL)
    documents = {**documents, **{section: {**documents[section], **more[section]} for section in ("plans", "teams")}}
    with house.server(_server_binary()) as store:
        async with fleet(store.url, documents, documents["teams"], workers=2) as gateways:
            yield gateways


async def test_long_answers_of_many_callers_at_once_never_pass_the_limit(gateways: Fleet) -> None:
    modes: list[Mode] = ["max", "expected"]
    ask = replace(LONG, plan=replace(LONG.plan, seconds=0.2))
    seen = await asyncio.gather(
        *(long_answers(gateways, name(long_answers, mode), mode, QUICK, 4.0, ask) for mode in modes)
    )
    assert seen[0].full.beyond <= ROUNDING
    assert not any(one.broken for one in seen)
    assert all(one.share > 0.3 for one in seen)


async def test_patient_callers_who_use_little_of_what_is_reserved_get_nearly_all_that_fits(gateways: Fleet) -> None:
    short, saturated = await asyncio.gather(
        short_answers(gateways, name(short_answers, "max"), "max", SMALL, 6.0, LITTLE),
        saturation(gateways, name(saturation, "expected"), "expected", SMALL, 6.0, LITTLE),
    )
    assert short.full.beyond <= ROUNDING
    assert short.share > 0.7
    assert not saturated.broken
    assert saturated.share > 0.9


async def test_the_worst_case_of_each_mode_is_within_its_bound_and_its_debt_is_told(gateways: Fleet) -> None:
    modes: list[Mode] = ["max", "expected", "input"]
    ask = replace(LONG, plan=replace(LONG.plan, seconds=0.3))
    careful, expected, careless = await asyncio.gather(
        *(worst_case(gateways, name(worst_case, mode), mode, QUICK, 0.0, ask) for mode in modes)
    )
    assert careful.full.beyond <= ROUNDING
    for seen in (expected, careless):
        assert 0 < seen.full.beyond <= seen.bound
        assert seen.owed < seen.after * QUICK.a_minute / 60 < seen.tokens


async def test_who_waits_alone_as_long_as_it_is_told_is_admitted_and_before_that_time_it_is_not(
    gateways: Fleet,
) -> None:
    told = await asyncio.gather(*(alone(gateways, f"alone-{kind}", kind) for kind in ALONE))
    assert {one.limit: one.then for one in told} == dict.fromkeys(ALONE, 200)
    assert [one.limit for one in told if one.early == 200] == []


def test_every_scene_has_a_team_and_its_mode() -> None:
    documents = policies(SCENES, Limit())
    modes = {team: plan["limits"][0].get("reserve") for team, plan in documents["plans"].items()}
    assert {name(*scene) for scene in SCENES} <= set(modes) == set(documents["teams"])
    assert [modes[name(scene, mode)] for scene, mode in SCENES] == [mode for _, mode in SCENES]


# — what is measured


def refused(answered: float, wait: float) -> Asked:
    return Asked("1", "a", {}, Plan(1), sent=answered, status=429, answered=answered, wait=wait)


def test_only_reservations_are_in_the_way_where_what_was_used_leaves_room() -> None:
    """A limit of one token a second and ten at once, of which each asks for four."""
    served = [(5.0, 5.5, 3), (1.0, 1.0, 7)]
    some = [refused(0.9, 0.1), refused(1.1, 0.2), refused(3.1, 0.3), refused(5.1, 0.4), refused(5.2, 0.5)]
    held_back, others = split(some, served, Limit(a_minute=60, burst=10), most=4)
    assert (held_back, others) == ([0.1, 0.3, 0.4, 0.5], [0.2])
    assert split([refused(5.1, 0.4)], served, Limit(a_minute=60, burst=10), most=6) == ([], [0.4])


def test_a_bound_is_broken_by_what_is_more_than_rounding_beyond_it() -> None:
    seen = Seen("s", "input", Limit(a_minute=60, burst=10), 5.0, tokens=30, bound=3)
    assert not replace(seen, full=Full(1.0, 3.0)).broken
    assert replace(seen, full=Full(1.0, 3.2)).broken
    assert seen.share == pytest.approx(30 / 15)


def test_what_one_may_take_is_its_bytes_and_all_of_the_answer_that_is_allowed() -> None:
    assert LONG.most >= len(LONG.prompt) + MOST
    assert LITTLE.most >= len(LITTLE.prompt) + 100
    assert LONG.body == {"prompt": LONG.prompt}
    assert LITTLE.body == {"prompt": LITTLE.prompt, "max_tokens": 100}

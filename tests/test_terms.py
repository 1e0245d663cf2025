"""What a principal may do with a request: which limits bind, what each is charged, on whose count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.endpoints import ENDPOINTS
from gateway.errors import BadRequest, Forbidden
from gateway.identity import Principal, anonymous
from gateway.language import Count
from gateway.normalize import InferenceRequest
from gateway.policy import load
from gateway.snapshot import Snapshot
from gateway.terms import Terms, terms_for, used
from gateway.usage import NOTHING, Usage

MODEL = "accounts/acme/models/llama"
LIMITS: list[dict[str, Any]] = [
    {"name": "requests", "count": "requests", "rate": "600/minute", "burst": 100, "per": ["team"]},
    {"name": "input", "count": "input_tokens", "rate": "1000/minute", "per": ["key", "model"]},
    {"name": "output", "count": "output_tokens", "rate": "1000/minute", "per": ["user"]},
    {"name": "total", "count": "total_tokens", "quota": "5000/day", "per": ["organisation"]},
    {"name": "spend", "count": "usd", "quota": "1/month", "per": ["organisation", "user", "model"]},
    {"name": "seats", "count": "concurrent_requests", "at_most": 8, "per": ["team", "user"]},
]


def snapshot(folder: Path, *limits: dict[str, Any], reserve: str = "max", models: tuple[str, ...] = ("*",)) -> Snapshot:
    prices = {"input": 2.0, "cached_input": 1.0, "output": 10.0}
    document = {
        "gateway": {"reserve": reserve},
        "models": {
            MODEL: {"pool": "demo", "aliases": ["llama"], "price": prices},
            "accounts/acme/models/qwen": {"pool": "demo"},
        },
        "pools": {"demo": {"upstreams": [{"url": "http://a"}]}},
        "plans": {"free": {"limits": list(limits)}},
        "teams": {"red": {"organisation": "acme", "plan": "free", "models": list(models)}},
    }
    (folder / "a.yaml").write_text(yaml.safe_dump(document))
    return load(folder)


def request(policies: Snapshot, **members: Any) -> InferenceRequest:
    """A request of 100 tokens for at most 200."""
    usual = {"path": "/v1/completions", "body": b"{}", "stream": False, "user": "ann"}
    numbers = {"input_estimate": 100, "output_bound": 200}
    asked = {"endpoint": ENDPOINTS["completions"], "model": policies.models["llama"], "asked_model": "llama"}
    return InferenceRequest(**{**usual, **numbers, **asked, **members})


def principal(**members: Any) -> Principal:
    return Principal(**{"key_id": "k1", "team": "red", "user": "bob", "models": (), **members})


def charged(terms: Terms) -> dict[str, tuple[str, int]]:
    return {charge.limit.name: (charge.key, charge.amount) for charge in terms.charges}


@pytest.fixture
def policies(tmp_path: Path) -> Snapshot:
    return snapshot(tmp_path, *LIMITS)


def test_every_limit_of_the_plan_is_charged_on_its_own_count(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies), policies)
    ann = anonymous("ann")
    assert charged(terms) == {
        "requests": ("{acme}:rate:requests:red", 1),
        "input": (f"{{acme}}:rate:input:k1|{MODEL}", 100),
        "output": (f"{{acme}}:rate:output:{ann}", 200),
        "total": ("{acme}:quota:total:acme", 300),
        "spend": (f"{{acme}}:quota:spend:acme|{ann}|{MODEL}", 2200),
        "seats": (f"{{acme}}:seats:seats:red|{ann}", 1),
    }
    assert (terms.organisation, terms.team, terms.key_id, terms.user, terms.pool) == (
        "acme",
        "red",
        "k1",
        "ann",
        "demo",
    )


def test_what_callers_are_told_names_the_first_scope_and_never_a_user(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies), policies)
    assert [charge.scope for charge in terms.charges] == [
        "team red",
        "key k1",
        f"user {anonymous('ann')}",
        "organisation acme",
        "organisation acme",
        "team red",
    ]


def test_with_reserve_input_nothing_is_held_for_the_output(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, *LIMITS, reserve="input")
    terms = terms_for(principal(), request(policies, output_bound=10**12), policies)
    assert [charge.amount for charge in terms.charges] == [1, 100, 0, 100, 200, 1]


@pytest.mark.parametrize(
    ("asked", "of_key", "expected"),
    [("ann", "bob", "ann"), (None, "bob", "bob"), (None, None, None), ("", "bob", "")],
)
def test_the_user_of_the_request_comes_before_the_user_of_the_key(
    policies: Snapshot, asked: str | None, of_key: str | None, expected: str | None
) -> None:
    terms = terms_for(principal(user=of_key), request(policies, user=asked), policies)
    assert terms.user == expected
    assert terms.charges[2].key == f"{{acme}}:rate:output:{anonymous(expected or '')}"


def test_an_alias_is_counted_as_its_model(policies: Snapshot) -> None:
    by_alias = terms_for(principal(), request(policies, asked_model="llama"), policies)
    by_name = terms_for(principal(), request(policies, asked_model=MODEL), policies)
    assert charged(by_alias) == charged(by_name)


@pytest.mark.parametrize(
    ("of_team", "of_key", "whose"),
    [
        (("*",), (), None),
        (("accounts/acme/*",), (), None),
        (("*",), ("accounts/acme/models/l*",), None),
        ((MODEL,), (MODEL, "other"), None),
        (("*qwen",), (), "team"),
        (("*qwen",), ("*",), "team"),
        (("*",), ("*qwen",), "key"),
        (("*",), ("llama",), "key"),  # patterns are of names, not of aliases
    ],
)
def test_team_and_key_must_both_be_allowed_the_model(
    tmp_path: Path, of_team: tuple[str, ...], of_key: tuple[str, ...], whose: str | None
) -> None:
    policies = snapshot(tmp_path, models=of_team)
    caller = principal(models=of_key)
    if whose is None:
        assert terms_for(caller, request(policies), policies).charges == ()
        return
    with pytest.raises(Forbidden, match=f"this {whose} may not use the model llama") as refused:
        terms_for(caller, request(policies), policies)
    assert (refused.value.status, refused.value.param) == (403, "model")


def test_a_team_that_is_gone_is_forbidden(policies: Snapshot) -> None:
    with pytest.raises(Forbidden, match="the team of this key is not in the policies any more"):
        terms_for(principal(team="blue"), request(policies), policies)


LOWER = " Lower max_tokens (bound: {}) or n."
NEVER = {
    "input": ({"input_estimate": 1001}, 1001, "input tokens", 1000, "", "prompt"),
    "output": ({"output_bound": 1001}, 1001, "output tokens", 1000, LOWER.format(1001), "max_tokens"),
    "total": (
        {"input_estimate": 900, "output_bound": 4101},
        5001,
        "total tokens",
        5000,
        LOWER.format(4101),
        "max_tokens",
    ),
    "spend": ({"output_bound": 100_000}, 1_000_200, "micro-dollars", 1_000_000, LOWER.format(100_000), "max_tokens"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_no_limit_could_ever_hold_is_a_bad_request(tmp_path: Path, name: str) -> None:
    """To wait would not help: it is 400 and not 429."""
    members, amount, unit, capacity, remedy, param = NEVER[name]
    policies = snapshot(tmp_path, *(limit for limit in LIMITS if limit["name"] == name))
    with pytest.raises(BadRequest) as refused:
        terms_for(principal(), request(policies, **members), policies)
    expected = f"the request may take {amount} {unit}, the limit {name} never holds more than {capacity}.{remedy}"
    assert refused.value.message == expected
    assert (refused.value.code, refused.value.param) == ("request_exceeds_limit", param)


def test_of_a_chat_the_messages_are_too_long(policies: Snapshot) -> None:
    with pytest.raises(BadRequest) as refused:
        terms_for(principal(), request(policies, endpoint=ENDPOINTS["chat/completions"], input_estimate=1001), policies)
    assert refused.value.param == "messages"


def test_what_just_fits_is_allowed(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies, input_estimate=1000, output_bound=1000), policies)
    assert [charge.amount for charge in terms.charges] == [1, 1000, 1000, 2000, 12_000, 1]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        ("requests", (1, 1, 0)),
        ("concurrent_requests", (0, 0, 0)),
        ("input_tokens", (10, 0, 0)),
        ("output_tokens", (5, 0, 0)),
        ("total_tokens", (15, 0, 0)),
        ("usd", (66, 0, 0)),
    ],
)
def test_what_was_used_is_charged_and_without_an_answer_nothing(
    policies: Snapshot, count: Count, expected: tuple[int, int, int]
) -> None:
    usages = (Usage(10, 5, 4), Usage(0, 0), NOTHING)
    assert tuple(used(count, usage, request(policies)) for usage in usages) == expected


def test_terms_are_frozen(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies), policies)
    with pytest.raises(AttributeError):
        terms.team = "blue"  # type: ignore[misc]

"""What a principal may do with a request: which limits bind, what each is charged, on whose count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import gateway.terms
from gateway.bounds import Input
from gateway.endpoints import ENDPOINTS
from gateway.errors import BadRequest, Forbidden
from gateway.identity import Principal, stored_user
from gateway.language import Count
from gateway.learned import Learned
from gateway.normalize import InferenceRequest
from gateway.policy import load
from gateway.records import Price
from gateway.snapshot import Snapshot
from gateway.terms import Terms, looked_at, used, whom
from gateway.usage import NOTHING, Usage

MODEL = "accounts/acme/models/llama"
LIMITS: list[dict[str, Any]] = [
    {"name": "requests", "count": "requests", "rate": "600/minute", "burst": 100, "per": ["team"]},
    {"name": "input", "count": "input_tokens", "rate": "1000/minute", "per": ["key", "model"]},
    {"name": "uncached", "count": "uncached_input_tokens", "rate": "1000/minute", "per": ["team"]},
    {"name": "output", "count": "output_tokens", "rate": "1000/minute", "per": ["user"]},
    {"name": "total", "count": "total_tokens", "quota": "5000/day", "per": ["organisation"]},
    {"name": "spend", "count": "usd", "quota": "1/month", "per": ["organisation", "user", "model"]},
    {"name": "seats", "count": "concurrent_requests", "at_most": 8, "per": ["team", "user"]},
]


def snapshot(
    folder: Path, *limits: dict[str, Any], reserve: str = "max", models: tuple[str, ...] = ("*",), users: str = "hashed"
) -> Snapshot:
    prices = {"input": 2.0, "cached_input": 1.0, "output": 10.0}
    document = {
        "gateway": {"reserve": reserve, "users": users},
        "models": {
            MODEL: {"pool": "demo", "aliases": ["llama"], "price": prices},
            "accounts/acme/models/qwen": {"pool": "demo"},
            "open/*": {"pool": "demo"},
        },
        "pools": {"demo": {"upstreams": [{"url": "http://a"}]}},
        "plans": {"free": {"limits": list(limits)}},
        "teams": {"red": {"organisation": "acme", "plan": "free", "models": list(models)}},
    }
    (folder / "a.yaml").write_text(yaml.safe_dump(document))
    return load(folder)


def request(policies: Snapshot, **members: Any) -> InferenceRequest:
    """A request of 100 tokens for two answers of at most 100."""
    usual = {"path": "/v1/completions", "body": b"{}", "stream": False, "user": "ann"}
    numbers = {"input": counted(100), "output_bound": 200, "answers": 2}
    asked = {"endpoint": ENDPOINTS["completions"], "model": policies.models["llama"], "asked_model": "llama"}
    return InferenceRequest(**{**usual, **numbers, **asked, **members})


def counted(tokens: int) -> Input:
    return Input(1, tokens=tokens)


def text(size: int) -> Input:
    """Text of so many bytes, with eight tokens for its ends."""
    return Input(1, size, margin=8)


NEW = Learned()
NOW = 1_800_000_000.0
PRICE = Price(2_000_000, 1_000_000, 10_000_000, 10_000_000)


def users(organisation: str, name: str, plain: bool) -> str:
    return stored_user(b"of the tests", organisation, name, plain)


ANN = users("acme", "ann", False)


def terms_for(
    principal: Principal, request: InferenceRequest, policies: Snapshot, learned: Learned, at: float = NOW
) -> Terms:
    return gateway.terms.terms_for(principal, request, policies, learned, users, at)


def priced(policies: Snapshot, price: Price, at: float = 0.0) -> Any:
    """The model at another price, from then on."""
    return replace(policies.models["llama"], prices=((at, price),))


def principal(**members: Any) -> Principal:
    return Principal(**{"key_id": "k1", "team": "red", "user": "bob", "models": (), **members})


def charged(terms: Terms) -> dict[str, tuple[str, int]]:
    return {charge.limit.name: (charge.key, charge.amount) for charge in terms.charges}


COUNTS = ("input_tokens", "uncached_input_tokens", "output_tokens", "total_tokens", "usd")
with TemporaryDirectory() as folder:
    WIDE = snapshot(Path(folder), *({"name": c, "count": c, "quota": "9999/day", "per": ["team"]} for c in COUNTS))

with TemporaryDirectory() as folder:
    PER_USER = [("user",), ("user", "model"), ("model", "user"), ("key", "user", "team")]
    SOME = [{"name": "|".join(per), "count": "requests", "rate": "9/minute", "per": list(per)} for per in PER_USER]
    WIDE_USERS = snapshot(Path(folder), *({**limit, "name": f"n{i}"} for i, limit in enumerate(SOME))).teams["red"]


@pytest.fixture
def policies(tmp_path: Path) -> Snapshot:
    return snapshot(tmp_path, *LIMITS)


def test_every_limit_of_the_plan_is_charged_on_its_own_count(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies), policies, NEW)
    assert charged(terms) == {
        "requests": ("{acme}:rate:requests:tred", 1),
        "input": (f"{{acme}}:rate:input:kk1|m{MODEL}", 100),
        "uncached": ("{acme}:rate:uncached:tred", 100),
        "output": (f"{{acme}}:rate:output:u{ANN}", 200),
        "total": ("{acme}:quota:total:oacme", 300),
        "spend": (f"{{acme}}:quota:spend:oacme|u{ANN}|m{MODEL}", 2200),
        "seats": (f"{{acme}}:seats:seats:tred|u{ANN}", 1),
    }
    assert (terms.organisation, terms.team, terms.key_id, terms.user, terms.pool) == (
        "acme",
        "red",
        "k1",
        ANN,
        "demo",
    )


def test_what_callers_are_told_names_every_scope_and_never_a_user(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies), policies, NEW)
    assert [charge.scope for charge in terms.charges] == [
        "team red",
        f"key k1 with model {MODEL}",
        "team red",
        f"user {ANN}",
        "organisation acme",
        f"organisation acme with user {ANN} with model {MODEL}",
        f"team red with user {ANN}",
    ]


def test_with_reserve_input_nothing_is_held_for_the_output(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, *LIMITS, reserve="input")
    terms = terms_for(principal(), request(policies, output_bound=10**12), policies, NEW)
    assert [charge.amount for charge in terms.charges] == [1, 100, 100, 0, 100, 200, 1]


@pytest.mark.parametrize(
    ("asked", "of_key", "expected"),
    [("ann", "bob", "ann"), (None, "bob", "bob"), (None, None, None), ("", "bob", "")],
)
def test_the_user_of_the_request_comes_before_the_user_of_the_key(
    policies: Snapshot, asked: str | None, of_key: str | None, expected: str | None
) -> None:
    terms = terms_for(principal(user=of_key), request(policies, user=asked), policies, NEW)
    stored = None if expected is None else users("acme", expected, False)
    assert terms.user == stored
    assert terms.charges[3].key == f"{{acme}}:rate:output:u{stored or ''}"


def test_an_alias_is_counted_as_its_model(policies: Snapshot) -> None:
    by_alias = terms_for(principal(), request(policies, asked_model="llama"), policies, NEW)
    by_name = terms_for(principal(), request(policies, asked_model=MODEL), policies, NEW)
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
        assert terms_for(caller, request(policies), policies, NEW).charges == ()
        return
    with pytest.raises(Forbidden, match=f"this {whose} may not use the model llama") as refused:
        terms_for(caller, request(policies), policies, NEW)
    assert (refused.value.status, refused.value.param) == (403, "model")


def test_a_team_that_is_gone_is_forbidden(policies: Snapshot) -> None:
    with pytest.raises(Forbidden, match="the team of this key is not in the policies any more"):
        terms_for(principal(team="blue"), request(policies), policies, NEW)


LOWER = " Lower max_tokens (bound: {}) or n."
SHORTEN = " Text is reserved as its bytes ({}): send a shorter prompt, or set `reserve: expected` for the limit."
NEVER: dict[str, tuple[dict[str, Any], int, str, int, str, str]] = {
    "input": ({"input": counted(1001)}, 1001, "input tokens", 1000, " Send a shorter prompt.", "prompt"),
    "input ": ({"input": text(993)}, 1001, "input tokens", 1000, SHORTEN.format(993), "prompt"),
    "uncached": ({"input": text(993)}, 1001, "uncached input tokens", 1000, SHORTEN.format(993), "prompt"),
    "output": ({"output_bound": 1001}, 1001, "output tokens", 1000, LOWER.format(1001), "max_tokens"),
    "total": (
        {"input": counted(900), "output_bound": 4101},
        5001,
        "total tokens",
        5000,
        LOWER.format(4101),
        "max_tokens",
    ),
    "total ": ({"input": text(5000), "output_bound": 9}, 5017, "total tokens", 5000, SHORTEN.format(5000), "prompt"),
    "spend": ({"output_bound": 100_000}, 1_000_200, "micro-dollars", 1_000_000, LOWER.format(100_000), "max_tokens"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_no_limit_could_ever_hold_is_a_bad_request(tmp_path: Path, name: str) -> None:
    """To wait would not help: it is 400 and not 429."""
    members, amount, unit, capacity, remedy, param = NEVER[name]
    name = name.strip()
    policies = snapshot(tmp_path, *(limit for limit in LIMITS if limit["name"] == name))
    with pytest.raises(BadRequest) as refused:
        terms_for(principal(), request(policies, **members), policies, NEW)
    expected = f"the request may take {amount} {unit}, the limit {name} never holds more than {capacity}.{remedy}"
    assert refused.value.message == expected
    assert (refused.value.code, refused.value.param) == ("request_exceeds_limit", param)


def test_of_a_chat_the_messages_are_too_long(policies: Snapshot) -> None:
    chat = request(policies, endpoint=ENDPOINTS["chat/completions"], input=text(1001))
    with pytest.raises(BadRequest, match="send a shorter messages, or set") as refused:
        terms_for(principal(), chat, policies, NEW)
    assert refused.value.param == "messages"


def test_what_just_fits_is_allowed(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies, input=counted(1000), output_bound=1000), policies, NEW)
    assert [charge.amount for charge in terms.charges] == [1, 1000, 1000, 1000, 2000, 12_000, 1]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        ("requests", (1, 1, 0)),
        ("concurrent_requests", (0, 0, 0)),
        ("input_tokens", (10, 0, 0)),
        ("uncached_input_tokens", (6, 0, 0)),
        ("output_tokens", (5, 0, 0)),
        ("total_tokens", (15, 0, 0)),
        ("usd", (66, 0, 0)),
    ],
)
def test_what_was_used_is_charged_and_without_an_answer_nothing(
    policies: Snapshot, count: Count, expected: tuple[int, int, int]
) -> None:
    usages = (Usage(10, 5, 4), Usage(0, 0), NOTHING)
    assert tuple(used(count, usage, PRICE) for usage in usages) == expected


def test_terms_are_frozen(policies: Snapshot) -> None:
    terms = terms_for(principal(), request(policies), policies, NEW)
    with pytest.raises(AttributeError):
        terms.team = "blue"  # type: ignore[misc]


# — what is reserved, by mode


def taught(*, output: int, bytes_per_token: float = 2.0, team: str = "red") -> Learned:
    """Fifty answers of so many tokens each, and as many inputs."""
    learned = Learned()
    for _ in range(500):
        size = round(1000 * bytes_per_token)
        learned.learn(team, MODEL, input_bytes=size, input_tokens=1000, output_tokens=output, answers=1)
    return learned


def amounts(policies: Snapshot, learned: Learned, **members: Any) -> list[int]:
    terms = terms_for(principal(), request(policies, **members), policies, learned)
    return [charge.amount for charge in terms.charges]


TOKENS = [limit for limit in LIMITS if limit["name"] in ("input", "uncached", "output", "total", "spend")]


def test_in_mode_max_all_that_a_request_can_take_is_reserved(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, *TOKENS)
    for learned in (NEW, taught(output=10)):
        assert amounts(policies, learned, input=text(92)) == [100, 100, 200, 300, 2200]


def test_in_mode_expected_what_was_learned_is_reserved(tmp_path: Path) -> None:
    """Of each of two answers what 95 of 100 have at most, and of the text the tokens that its bytes usually are."""
    policies = snapshot(tmp_path, *TOKENS, reserve="expected")
    assert amounts(policies, taught(output=32), input=text(90)) == pytest.approx([45, 45, 64, 109, 730], abs=10)
    assert amounts(policies, taught(output=32), input=counted(90)) == [90, 90, 64, 154, 820]


@pytest.mark.parametrize("learned", [NEW, taught(output=500), taught(output=9, team="blue")])
def test_what_is_expected_is_no_more_than_the_bound_and_the_bound_until_learned(
    tmp_path: Path, learned: Learned
) -> None:
    policies = snapshot(tmp_path, *TOKENS, reserve="expected")
    assert amounts(policies, learned)[2] == 200


def test_in_mode_input_nothing_is_reserved_for_the_output(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, *TOKENS, reserve="input")
    assert amounts(policies, NEW, input=text(90)) == [23, 23, 0, 23, 46]


def test_each_limit_goes_by_its_own_mode(tmp_path: Path) -> None:
    modes = ("max", "expected", "input")
    limits = [{**LIMITS[4], "name": mode, "reserve": mode} for mode in modes]
    assert amounts(snapshot(tmp_path, *limits), taught(output=32), input=counted(100)) == [300, 164, 100]


@pytest.mark.parametrize(
    ("price", "usage", "cost"),
    [
        (Price(2_000_000, 20_000_000, 10_000_000, 10_000_000), Usage(100, 200, 100), 4000),
        (Price(2_000_000, 1_000_000, 10_000_000, 40_000_000), Usage(100, 200, 0, 200), 8200),
        (Price(2_000_000, 20_000_000, 10_000_000, 40_000_000), Usage(100, 200, 100, 200), 10_000),
        (Price(2_000_000, 1_000_000, 10_000_000, 1_000_000), Usage(100, 200), 2200),
    ],
)
def test_where_what_is_cached_or_reasoning_is_dearer_its_price_holds_beforehand(
    tmp_path: Path, price: Price, usage: Usage, cost: int
) -> None:
    policies = snapshot(tmp_path, *TOKENS)
    assert amounts(policies, NEW, model=priced(policies, price)) == [100, 100, 200, 300, cost]
    assert used("usd", usage, price) == cost


SHARES = st.floats(0, 1)


@given(
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.tuples(SHARES, SHARES, SHARES, SHARES),
    st.builds(Price, *[st.integers(0, 10**7)] * 4),
)
def test_in_mode_max_nothing_is_used_that_was_not_reserved(
    size: int, bound: int, shares: tuple[float, float, float, float], price: Price
) -> None:
    """Whatever the backend reports, as long as a byte of text is no more than a token, and the bound holds."""
    asked = request(WIDE, input=text(size), output_bound=bound, model=priced(WIDE, price))
    input_, output = int(shares[0] * asked.input.bound), int(shares[1] * bound)
    usage = Usage(input_, output, int(shares[2] * input_), int(shares[3] * output))
    terms = terms_for(principal(), asked, WIDE, NEW)
    for charge in terms.charges:
        assert used(charge.limit.count, usage, terms.price) <= charge.amount


@pytest.mark.parametrize("mode", ["expected", "input"])
def test_what_may_be_less_than_it_seems_takes_all_of_a_limit_and_is_let_in(tmp_path: Path, mode: str) -> None:
    """Only an estimate says that it is too much. What was counted is too much, unless it may be cached."""
    policies = snapshot(tmp_path, *TOKENS, reserve=mode)
    output = 1000 if mode == "expected" else 0
    assert amounts(policies, NEW, input=text(10**7), output_bound=10**6) == [1000, 1000, output, 5000, 1_000_000]
    uncached = snapshot(tmp_path, LIMITS[2], reserve=mode)
    assert amounts(uncached, NEW, input=counted(1001)) == [1000]
    for limit, tokens in ((LIMITS[1], 1001), (LIMITS[4], 5001), (LIMITS[5], 1_000_001)):
        policies = snapshot(tmp_path, limit, reserve=mode)
        assert amounts(policies, NEW, input=counted(tokens - 1)) == [limit_of(policies)]
        with pytest.raises(BadRequest, match="never holds more than"):
            amounts(policies, NEW, input=counted(tokens))


def limit_of(policies: Snapshot) -> int:
    return policies.teams["red"].limits[0].capacity


def test_a_limit_in_shadow_refuses_nothing_and_is_told_how_much_it_would_have_been(tmp_path: Path) -> None:
    for mode, expected in (("max", 5008), ("expected", 1000)):
        policies = snapshot(tmp_path, {**LIMITS[1], "mode": "shadow"}, reserve=mode)
        assert amounts(policies, NEW, input=text(5000)) == [expected]
        assert amounts(policies, NEW, input=counted(5000)) == [5000]


# — what relies on the bound of the output


@pytest.mark.parametrize(
    ("count", "members", "expected"),
    [
        ("output_tokens", {}, True),
        ("total_tokens", {}, True),
        ("usd", {}, True),
        ("requests", {}, False),
        ("input_tokens", {}, False),
        ("uncached_input_tokens", {}, False),
        ("total_tokens", {"mode": "shadow"}, False),
        ("total_tokens", {"reserve": "expected"}, False),
        ("usd", {"reserve": "input"}, False),
        ("usd", {"models": ["*qwen"]}, False),
    ],
)
def test_a_limit_that_must_hold_relies_on_the_bound_of_what_it_counts(
    tmp_path: Path, count: str, members: dict[str, Any], expected: bool
) -> None:
    limit = {"name": "x", "count": count, "quota": "100000/day", "per": ["team"], **members}
    policies = snapshot(tmp_path, limit if count != "usd" else {**limit, "quota": "100/day"})
    assert terms_for(principal(), request(policies), policies, NEW).bounded is expected
    for price, costs in ((Price(1), False), (Price(reasoning=1), True), (Price(output=1), True)):
        asked = request(policies, model=priced(policies, price))
        assert terms_for(principal(), asked, policies, NEW).bounded is (expected and (costs or count != "usd"))


def test_the_terms_say_how_many_tokens_the_input_is_thought_to_have(policies: Snapshot) -> None:
    for learned, expected in ((NEW, 25), (taught(output=9), 50)):
        terms = terms_for(principal(), request(policies, input=text(100)), policies, learned)
        assert terms.input_estimate == pytest.approx(expected, abs=2)


# — what it costs, and whose it is


def test_a_request_has_the_price_of_the_moment_when_it_came(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, LIMITS[5])
    dear = Price(20_000_000, 10_000_000, 100_000_000, 100_000_000)
    asked = request(policies, model=replace(policies.models["llama"], prices=((0.0, PRICE), (NOW, dear))))
    before, after = (terms_for(principal(), asked, policies, NEW, at) for at in (NOW - 0.001, NOW))
    assert (before.price, before.charges[0].amount) == (PRICE, 2200)
    assert (after.price, after.charges[0].amount) == (dear, 22_000)


def test_a_limit_that_only_the_later_price_breaks_refuses_only_later(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, LIMITS[5])
    dear = Price(input=10_001_000_000)
    asked = request(policies, model=replace(policies.models["llama"], prices=((NOW, dear),)))
    assert terms_for(principal(), asked, policies, NEW, NOW - 1).charges[0].amount == 0
    with pytest.raises(BadRequest, match="never holds more than 1000000"):
        terms_for(principal(), asked, policies, NEW, NOW)


def test_where_users_are_plain_counts_and_scopes_say_the_name(tmp_path: Path) -> None:
    policies = snapshot(tmp_path, LIMITS[3], users="plain")
    terms = terms_for(principal(), request(policies), policies, NEW)
    assert (terms.user, terms.charges[0].key, terms.charges[0].scope) == ("ann", "{acme}:rate:output:uann", "user ann")


def test_limits_that_are_looked_at_are_those_that_are_charged(policies: Snapshot) -> None:
    caller, team = principal(), policies.teams["red"]
    for named in ("ann", None):
        charges = terms_for(caller, request(policies, user=named), policies, NEW).charges
        looked = looked_at(caller, team, policies.models["llama"], whom(caller, named, team, policies, users))
        assert [(charge.key, charge.scope) for charge in looked] == [(charge.key, charge.scope) for charge in charges]


@given(st.text(), st.text(), st.booleans())
def test_counts_of_two_users_are_never_one(one: str, other: str, plain: bool) -> None:
    keys = [
        [key for _, key, _ in gateway.terms._binding(WIDE_USERS, "k1", users("acme", name, plain), MODEL, MODEL).counts]
        for name in (one, other)
    ]
    assert (keys[0] == keys[1]) == (one == other)
    assert one == other or not set(keys[0]) & set(keys[1])


# — the models that a limit is for


@pytest.mark.parametrize(
    ("patterns", "model", "binds"),
    [
        (["*"], "llama", True),
        ([MODEL], "llama", True),
        (["accounts/acme/*"], "llama", True),
        (["*qwen"], "llama", False),
        (["*qwen", "*llama"], "llama", True),
        (["open/*"], "open/a", True),
        (["open/a"], "open/a", True),
        (["open/a"], "open/b", False),
        (["open/[*]"], "open/b", True),  # its entry, and nothing else
    ],
)
def test_a_limit_binds_for_the_models_that_it_is_for(
    tmp_path: Path, patterns: list[str], model: str, binds: bool
) -> None:
    policies = snapshot(tmp_path, {**LIMITS[1], "models": patterns})
    found = policies.model(model)
    terms = terms_for(principal(), request(policies, model=found), policies, NEW)
    assert found is not None
    assert [charge.key for charge in terms.charges] == [f"{{acme}}:rate:input:kk1|m{found.entry}"] * binds

"""The language of policies/: what a Snapshot answers to, and how every mistake reads."""

from __future__ import annotations

import copy
import hmac
import re
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.documents import PolicyError, Source
from gateway.language import (
    CloudEventsExport,
    Documents,
    GatewayPolicy,
    JsonLinesExport,
    LimitPolicy,
    PostgresExport,
    signing_key,
)
from gateway.policy import load
from gateway.records import Price
from gateway.snapshot import Limit, Model, Snapshot, matches

SHIPPED = Path(__file__).parent.parent / "policies"

README = (SHIPPED / "README.md").read_text("utf-8")

MODELS = "models:\n  llama: {pool: demo}\n"
POOLS = "pools:\n  demo: {upstreams: [{url: 'http://127.0.0.1:8000'}]}\n"
PLANS = "plans:\n  free: {limits: []}\n"
TEAMS = "teams:\n  red: {organisation: acme, plan: free}\n"


def snapshot(folder: Path, **files: str) -> Snapshot:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return load(folder)


def mistakes(folder: Path, **files: str) -> tuple[str, ...]:
    with pytest.raises(PolicyError) as refused:
        snapshot(folder, **files)
    return refused.value.mistakes


def limit(members: str) -> str:
    """A document whose fourth line is a limit."""
    return f"plans:\n  free:\n    limits:\n      - {{{members}}}\n"


def test_the_shipped_policies_load() -> None:
    shipped = load(SHIPPED)
    assert [model.name.rpartition("/")[2] for model in shipped.public_models] == [
        "llama-v2-7b",
        "kimi-k2-instruct-0905",
        "qwen3-8b",
        "gpt-oss-120b",
    ]
    assert set(shipped.teams) == {"research", "support"}
    assert shipped.teams["research"].limits[0].capacity == 100


def test_a_model_answers_to_its_name_and_its_aliases(tmp_path: Path) -> None:
    models = "models:\n  accounts/a/llama: {pool: demo, aliases: [llama, l], upstream_model: llama-7b}\n"
    found = snapshot(tmp_path, models=models, pools=POOLS)
    model = found.models["accounts/a/llama"]
    assert found.models["llama"] is model
    assert found.models["l"] is model
    assert found.models.get("L") is None
    assert found.public_models == (model,)
    assert (model.upstream_name, model.api, model.max_output_tokens) == ("llama-7b", "fireworks", 8192)


def test_what_is_left_out_has_the_defaults_of_the_language(tmp_path: Path) -> None:
    found = snapshot(tmp_path, all=MODELS + POOLS + PLANS + TEAMS)
    assert (found.models["llama"].strict, found.models["llama"].profile) == (True, "2026")
    assert (found.gateway.max_body, found.gateway.reserve, found.gateway.time_zone) == (33554432, "max", "UTC")
    timeouts = found.pools["demo"].timeouts
    assert (timeouts.connect, timeouts.first_byte, timeouts.idle, timeouts.total) == (2.0, 120.0, 60.0, 3600.0)
    assert found.models["llama"].upstream_name == "llama"
    assert found.teams["red"].may_use("llama")


def test_what_a_model_says_of_time_stands_before_what_its_pool_says(tmp_path: Path) -> None:
    pools = "pools:\n  demo: {timeouts: {idle: 5s, connect: 1s}, upstreams: [{url: 'http://a'}]}\n"
    models = "models:\n  llama: {pool: demo, timeouts: {idle: 7s, total: 9s}}\n  qwen: {pool: demo}\n"
    found = snapshot(tmp_path, all=models + pools).models
    times = [(t.connect, t.first_byte, t.idle, t.total) for t in (found["llama"].timeouts, found["qwen"].timeouts)]
    assert times == [(1.0, 120.0, 7.0, 9.0), (1.0, 120.0, 5.0, 3600.0)]


def test_a_model_is_stood_in_for_by_its_pools_fallback_and_then_by_its_own_and_never_twice(tmp_path: Path) -> None:
    pools = "".join(
        f"  {name}: {{api: {api}, {fallback} upstreams: [{{url: 'http://{name}'}}]}}\n"
        for name, api, fallback in (
            ("a", "fireworks", "fallback: b,"),
            ("b", "openai", "fallback: a,"),
            ("c", "openai", ""),
        )
    )
    models = "models:\n  one: {pool: a, fallback: two}\n  two: {pool: c, fallback: one}\n  three: {pool: c}\n"
    found = snapshot(tmp_path, all=models + "pools:\n" + pools).models
    routes = {name: [(m.name, m.pool, m.api) for m in model.fallbacks] for name, model in found.items()}
    assert routes == {
        "one": [("one", "b", "openai"), ("two", "c", "openai")],
        "two": [("one", "a", "fireworks"), ("one", "b", "openai")],
        "three": [],
    }


PATTERNS = """models:
  openai/*: {pool: demo, upstream_model: "*"}
  openai/gpt-5*-mini: {pool: demo}
  openai/gpt-5: {pool: demo, aliases: [five]}
  "*-embed": {pool: demo, upstream_model: "e5-*", fallback: openai/gpt-5}
"""


@pytest.mark.parametrize(
    ("asked", "entry", "name", "upstream"),
    [
        ("openai/gpt-5", "openai/gpt-5", "openai/gpt-5", "openai/gpt-5"),
        ("five", "openai/gpt-5", "openai/gpt-5", "openai/gpt-5"),
        ("openai/o9", "openai/*", "openai/o9", "o9"),
        ("openai/gpt-5.2-mini", "openai/gpt-5*-mini", "openai/gpt-5.2-mini", "openai/gpt-5.2-mini"),
        ("openai/gpt-5-mini", "openai/*", "openai/gpt-5-mini", "gpt-5-mini"),  # a star stands for something
        ("openai/a/b*", "openai/*", "openai/a/b*", "a/b*"),
        ("large-embed", "*-embed", "large-embed", "e5-large"),
    ],
)
def test_a_star_in_a_models_name_stands_for_a_part_of_it_and_the_longest_beginning_decides(
    tmp_path: Path, asked: str, entry: str, name: str, upstream: str
) -> None:
    model = snapshot(tmp_path, all=PATTERNS + POOLS).model(asked)
    assert model is not None
    assert (model.entry, model.name, model.upstream_name) == (entry, name, upstream)


@pytest.mark.parametrize(
    "asked",
    [
        "openai/",
        "-embed",
        "openai",
        "",
        "openai/a b",
        "openai/{a}",
        "openai/a|b",
        "x" * 201,
        "openai/\x1b[2J",
        "openai/\x9b",
    ],
)
def test_what_fits_no_star_or_is_no_models_name_is_no_model(tmp_path: Path, asked: str) -> None:
    assert snapshot(tmp_path, all=PATTERNS + POOLS).model(asked) is None


def test_entries_with_a_star_are_not_listed_and_teams_may_name_a_part_of_what_they_fit(tmp_path: Path) -> None:
    teams = 'teams:\n  red: {organisation: acme, plan: free, models: ["openai/o*", openai/gpt-4]}\n'
    found = snapshot(tmp_path, all=PATTERNS + POOLS + PLANS + teams)
    assert [model.name for model in found.public_models] == ["openai/gpt-5"]
    assert [found.teams["red"].may_use(name) for name in ("openai/o9", "openai/gpt-5")] == [True, False]


def test_the_same_star_holds_in_the_pool_that_is_fallen_back_to_and_not_for_another_model(tmp_path: Path) -> None:
    pools = "pools:\n  demo: {fallback: b, upstreams: [{url: 'http://a'}]}\n  b: {upstreams: [{url: 'http://b'}]}\n"
    model = snapshot(tmp_path, all=PATTERNS + pools).model("large-embed")
    assert model is not None
    chain = [(m.name, m.upstream_name, m.pool) for m in model.fallbacks]
    assert chain == [
        ("large-embed", "e5-large", "b"),
        ("openai/gpt-5", "openai/gpt-5", "demo"),
        ("openai/gpt-5", "openai/gpt-5", "b"),
    ]


def test_strictness_and_profile_are_the_models_or_the_pools_or_the_gateways(tmp_path: Path) -> None:
    documents = """
gateway: {schema: lenient, profile: 4.21.6}
models:
  one: {pool: a}
  two: {pool: b}
  three: {pool: b, schema: lenient, profile: 2026}
pools:
  a: {upstreams: [{url: "http://a"}]}
  b: {schema: strict, profile: 2023, upstreams: [{url: "http://b"}]}
"""
    models = snapshot(tmp_path, all=documents).models
    assert [(models[name].strict, models[name].profile) for name in ("one", "two", "three")] == [
        (False, "4.21.6"),
        (True, "2023"),
        (False, "2026"),
    ]


ROUTES = """routes:
  /v1/moderations: {pool: demo}
  /v1/files/*: {pool: demo, methods: [GET, POST, DELETE]}
  /v1/files/open/*: {pool: demo, methods: [GET]}
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/moderations", "/v1/moderations"),
        ("/v1/moderations/", None),
        ("/v1/files/f1", "/v1/files/*"),
        ("/v1/files/f1/content", "/v1/files/*"),
        ("/v1/files/open/f1", "/v1/files/open/*"),
        ("/v1/files", None),
        ("/v1/other", None),
    ],
)
def test_a_route_is_a_path_or_all_that_stand_below_it(tmp_path: Path, path: str, expected: str | None) -> None:
    route = snapshot(tmp_path, all=ROUTES + POOLS).route(path)
    assert (None if route is None else route.model.entry) == expected


def test_a_route_is_a_model_to_teams_and_costs_nothing(tmp_path: Path) -> None:
    teams = "teams:\n  red: {organisation: acme, plan: free, models: [/v1/moderations]}\n"
    found = snapshot(tmp_path, all=ROUTES + POOLS + PLANS + teams)
    route = found.routes["/v1/moderations"]
    assert found.teams["red"].may_use(route.model.name)
    assert not found.teams["red"].may_use("/v1/files/*")
    assert (route.methods, route.endpoint.path, route.model.price_at(0)) == (
        frozenset(["POST"]),
        "/v1/moderations",
        Price(),
    )


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        ("{input: 0.15, output: 2.5}", Price(150_000, 150_000, 2_500_000, 2_500_000)),
        ("{input: 0.15, cached_input: 0.01, output: 2.5, reasoning: 3}", Price(150_000, 10_000, 2_500_000, 3_000_000)),
        ("{input: 1, cached_input: 0, output: 1, reasoning: 0}", Price(1_000_000, 0, 1_000_000, 0)),
        ("[{input: 1}]", Price(1_000_000, 1_000_000)),
        ("{}", Price()),
    ],
)
def test_prices_are_micro_dollars_and_what_is_left_out_costs_as_what_it_is_part_of(
    tmp_path: Path, price: str, expected: Price
) -> None:
    models = f"models:\n  llama: {{pool: demo, price: {price}}}\n"
    assert snapshot(tmp_path, models=models, pools=POOLS).models["llama"].price_at(0) == expected


DATED = """models:
  llama:
    pool: demo
    price:
      - {input: 1}
      - {from: 2026-01-01, input: 2}
      - {from: "2026-06-30", input: 3}
      - {from: 2026-07-01T00:00:00+02:00, input: 4}
      - {from: "2026-07-01T00:00:00Z", input: 5}
"""


@pytest.mark.parametrize(
    ("at", "dollars"),
    [
        ("1970-01-01T00:00:00+00:00", 1),
        ("2025-12-31T23:59:59.999+00:00", 1),
        ("2026-01-01T00:00:00+00:00", 2),
        ("2026-06-29T23:59:59.999+00:00", 2),
        ("2026-06-30T00:00:00+00:00", 3),
        ("2026-06-30T21:59:59.999+00:00", 3),
        ("2026-06-30T22:00:00+00:00", 4),
        ("2026-07-01T00:00:00+00:00", 5),
        ("2999-01-01T00:00:00+00:00", 5),
    ],
)
def test_a_price_holds_from_its_instant_until_the_next_ones(tmp_path: Path, at: str, dollars: int) -> None:
    model = snapshot(tmp_path, models=DATED, pools=POOLS).models["llama"]
    assert model.price_at(datetime.fromisoformat(at).timestamp()).input == dollars * 1_000_000


def test_before_its_first_price_a_model_costs_nothing(tmp_path: Path) -> None:
    models = "models:\n  llama: {pool: demo, price: {from: 2026-01-01, input: 2, reasoning: 1}}\n"
    model = snapshot(tmp_path, models=models, pools=POOLS).models["llama"]
    begins = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert model.price_at(begins - 0.001) == Price()
    assert model.price_at(begins) == Price(2_000_000, 2_000_000, 0, 1_000_000)


@given(starts=st.lists(st.integers(-100, 100), unique=True, max_size=6).map(sorted), at=st.integers(-110, 110))
def test_the_latest_price_that_has_begun_holds(starts: list[int], at: int) -> None:
    model = Model("m", "m", None, "p", "openai", "m", 1, tuple((float(one), Price(one + 1000)) for one in starts))
    expected = max((one for one in starts if one <= at), default=None)
    assert model.price_at(at) == (Price() if expected is None else Price(expected + 1000))


def test_the_example_of_exports_is_in_the_language_once_its_comments_are_taken_away(tmp_path: Path) -> None:
    text = (SHIPPED / "exports.yaml").read_text("utf-8")
    assert load(SHIPPED).exports == {}
    example = "exports:\n" + "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#  "))
    assert [export.to for export in snapshot(tmp_path, all=example).exports.values()] == [
        "jsonl",
        "postgres",
        "cloudevents",
    ]


EXPORTS = """exports:
  archive: {to: jsonl, folder: /var/lib/gateway/usage, rotate: 1MiB, every: 10m, batch: 1000}
  warehouse: {to: postgres, dsn_env: WAREHOUSE_DSN, table: ledger.usage, attempts: 3}
  billing: {to: cloudevents, url: "https://openmeter.example/api/v1/events", token_env: OPENMETER_TOKEN}
"""


def test_exports_say_where_rows_go(tmp_path: Path) -> None:
    exports = snapshot(tmp_path, all=EXPORTS).exports
    archive, warehouse, billing = exports.values()
    assert list(exports) == ["archive", "warehouse", "billing"]
    assert isinstance(archive, JsonLinesExport)
    assert (archive.to, archive.folder, archive.rotate) == ("jsonl", "/var/lib/gateway/usage", 2**20)
    assert (archive.every, archive.batch, archive.attempts) == (600, 1000, 10)
    assert isinstance(warehouse, PostgresExport)
    assert (warehouse.to, warehouse.dsn_env, warehouse.table) == ("postgres", "WAREHOUSE_DSN", "ledger.usage")
    assert (warehouse.batch, warehouse.attempts) == (100, 3)
    assert isinstance(billing, CloudEventsExport)
    assert (billing.to, billing.url) == ("cloudevents", "https://openmeter.example/api/v1/events")
    assert (billing.token_env, billing.source, billing.type) == ("OPENMETER_TOKEN", "model-gateway", "tokens")
    assert billing.batch == 100


def test_without_a_word_about_it_users_are_hashed_rows_kept_90_days_and_nothing_exported(tmp_path: Path) -> None:
    found = snapshot(tmp_path, all=POOLS)
    assert (found.gateway.users, found.gateway.ledger.keep, found.exports) == ("hashed", 90 * 86_400, {})
    found = snapshot(tmp_path, all="gateway: {users: plain, ledger: {keep: 1h}}\n")
    assert (found.gateway.users, found.gateway.ledger.keep) == ("plain", 3600)


def test_a_section_may_be_spread_over_files_and_the_revision_tells_documents_apart(tmp_path: Path) -> None:
    more = "teams:\n  blue: {organisation: acme, plan: free}\n"
    one = snapshot(tmp_path, all=MODELS + POOLS + PLANS + TEAMS)
    two = snapshot(tmp_path, blue=more)
    assert list(two.teams) == ["red", "blue"]
    assert one.revision != two.revision
    assert load(tmp_path).revision == two.revision


def test_hidden_files_and_others_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".#all.yaml").symlink_to(tmp_path / "nowhere")  # what an editor leaves while a file is open
    (tmp_path / "README.md").write_text("teams: [")
    assert snapshot(tmp_path, all=POOLS).pools.keys() == {"demo"}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("rate: 600/minute", ("rate", 600, 600, 60_000_000)),
        ("rate: 1_000 / hour, burst: 5", ("rate", 1000, 5, 3_600_000_000)),
        ("quota: 50/month", ("quota", 50, 50, 0)),
        ("quota: 50/minute, rolling: true", ("rolling", 50, 50, 60_000_000)),
        ("quota: 50/hour, rolling: true", ("rolling", 50, 50, 3_600_000_000)),
        ("quota: 50/day, rolling: true", ("rolling", 50, 50, 86_400_000_000)),
        ("quota: 50/week, rolling: true", ("rolling", 50, 50, 604_800_000_000)),
        ("quota: 50/month, rolling: true", ("rolling", 50, 50, 30 * 86_400_000_000)),
        ("at_most: 7", ("seats", 7, 7, 0)),
    ],
)
def test_four_kinds_of_limit_become_amount_capacity_and_period(
    tmp_path: Path, members: str, expected: tuple[object, ...]
) -> None:
    count = "concurrent_requests" if "at_most" in members else "requests"
    document = limit(f"name: l, count: {count}, per: [team], {members}")
    (found,) = snapshot(tmp_path, all=document + TEAMS).teams["red"].limits
    assert (found.kind, found.amount, found.capacity, found.period) == expected


def test_dollars_are_counted_in_micro_dollars() -> None:
    policy = LimitPolicy.model_validate({"name": "l", "count": "usd", "rate": "2/day", "burst": 3, "per": ["team"]})
    found = Limit.of(policy, GatewayPolicy())
    assert (found.amount, found.capacity) == (2_000_000, 3_000_000)


def test_a_quota_without_a_time_zone_has_the_gateways(tmp_path: Path) -> None:
    both = "name: a, count: requests, quota: 1/day, per: [team]}\n      - {name: b, time_zone: Asia/Tokyo, "
    document = limit(both + "count: requests, quota: 1/day, per: [team]")
    found = snapshot(tmp_path, all=document + TEAMS, gateway="gateway: {time_zone: Europe/Zurich}")
    assert [str(one.zone) for one in found.teams["red"].limits] == ["Europe/Zurich", "Asia/Tokyo"]


def test_a_rolling_quota_has_no_time_zone(tmp_path: Path) -> None:
    document = limit("name: l, count: usd, quota: 1/day, rolling: true, per: [team]")
    (found,) = snapshot(tmp_path, all=document + TEAMS).teams["red"].limits
    assert (found.window, found.zone) == ("day", None)


def of(members: str, gateway: str = "{}") -> Limit:
    """A limit of tokens with these members."""
    usual = {"name": "l", "count": "total_tokens", "quota": "500/month", "per": ["team"]}
    policy = LimitPolicy.model_validate({**usual, **yaml.safe_load(f"{{{members}}}")})
    return Limit.of(policy, GatewayPolicy.model_validate(yaml.safe_load(gateway)))


@pytest.mark.parametrize(
    ("members", "gateway", "expected"),
    [
        ("", "{}", ("max", "local")),
        ("", "{reserve: input, when_store_fails: open}", ("input", "open")),
        ("reserve: expected", "{reserve: input, when_store_fails: open}", ("expected", "open")),
        ("when_store_fails: closed", "{reserve: input, when_store_fails: open}", ("input", "closed")),
    ],
)
def test_what_is_reserved_and_what_holds_without_the_store_are_the_limits_or_the_gateways(
    members: str, gateway: str, expected: tuple[str, str]
) -> None:
    found = of(members, gateway)
    assert (found.reserve, found.when_store_fails) == expected


def test_a_limit_says_who_is_warned_and_what_it_refuses() -> None:
    plain, full = of(""), of("mode: shadow, soft: 80%, warn_at: [50%, 99.5%], models: [llama, 'qwen*']")
    assert (plain.shadow, plain.soft, plain.warn_at, plain.models) == (False, None, (), ("*",))
    assert (full.shadow, full.soft, full.warn_at, full.models) == (True, 0.8, (0.5, 0.995), ("llama", "qwen*"))


@pytest.mark.parametrize(
    ("count", "holds"),
    [
        ("requests", False),
        ("concurrent_requests", False),
        ("input_tokens", True),
        ("uncached_input_tokens", True),
        ("output_tokens", True),
        ("total_tokens", True),
        ("usd", True),
    ],
)
def test_what_is_known_before_the_answer_is_no_reservation(count: str, holds: bool) -> None:
    kind = {"quota": None, "at_most": 5} if count == "concurrent_requests" else {}
    found = of(yaml.safe_dump({"count": count, **kind}, default_flow_style=True).strip("{}\n"))
    assert found.holds is holds


@pytest.mark.parametrize(
    ("amount", "share", "expected"),
    [(500, "95%", 475), (100, "7%", 7), (100, "0.001%", 1), (7, "50%", 4), (3, "100%", 3), (1, "80%", 1)],
)
def test_a_share_is_the_least_amount_that_is_so_large(amount: int, share: str, expected: int) -> None:
    found = of(f"quota: {amount}/day, soft: {share}")
    assert found.soft is not None
    assert found.amount_at(found.soft) == expected


@given(st.integers(1, 10**15), st.integers(1, 100_000))
def test_a_share_is_exact_whatever_the_amount(amount: int, thousandths: int) -> None:
    found = replace(of(""), capacity=amount).amount_at(float(f"{thousandths / 1000:.3f}") / 100)
    assert found * 100_000 >= amount * thousandths > (found - 1) * 100_000


ORGANISATIONS = """plans:
  acme: {limits: [{name: spend, count: usd, quota: 500/month, per: [organisation]}]}
  free: {limits: [{name: rate, count: requests, rate: 5/minute, per: [team]}]}
organisations:
  acme: {plan: acme}
teams:
  red: {organisation: acme, plan: free}
  blue: {organisation: umbrella, plan: free}
"""


def test_the_limits_of_an_organisation_bind_beside_those_of_its_teams(tmp_path: Path) -> None:
    teams = snapshot(tmp_path, all=ORGANISATIONS).teams
    assert [limit.name for limit in teams["red"].limits] == ["spend", "rate"]
    assert [limit.name for limit in teams["blue"].limits] == ["rate"]


SHARED = """plans:
  one: {limits: [{name: spend, count: usd, quota: 500/month, per: [%s]}]}
  two: {limits: [{name: spend, count: usd, quota: %s, per: [%s]}]}
teams:
  red: {organisation: acme, plan: one}
  blue: {organisation: %s, plan: two}
"""


@pytest.mark.parametrize(
    ("one", "quota", "two", "organisation"),
    [
        ("organisation", "500/month", "organisation", "acme"),  # what shares one count is one limit
        ("organisation", "5_00/month", "organisation", "acme"),
        ("organisation", "900/month", "organisation", "umbrella"),
        ("organisation", "900/month", "organisation, model", "acme"),
        ("organisation", "900/month, rolling: true", "organisation", "acme"),
        ("team", "900/month", "team", "acme"),
        ("model, key", "900/month", "model, key", "acme"),
        ("user", "900/month", "user", "acme"),
    ],
)
def test_limits_of_two_plans_may_have_one_name_where_they_are_alike_or_count_apart(
    tmp_path: Path, one: str, quota: str, two: str, organisation: str
) -> None:
    teams = snapshot(tmp_path, all=SHARED % (one, quota, two, organisation)).teams
    assert [teams[name].limits[0].name for name in teams] == ["spend", "spend"]


def test_patterns_of_a_limit_may_name_a_part_of_what_a_star_fits_and_routes(tmp_path: Path) -> None:
    document = limit('name: l, count: requests, rate: 1/day, per: [team], models: ["openai/o*", /v1/moderations]')
    found = snapshot(tmp_path, all=PATTERNS + POOLS + ROUTES + TEAMS, plans=document)
    assert found.teams["red"].limits[0].models == ("openai/o*", "/v1/moderations")


def test_a_webhook_is_an_address_and_the_name_of_a_secret(tmp_path: Path) -> None:
    hook = "{url: 'https://user-hooks.example.com/limits?a=1', secret_env: HOOK}"
    found = snapshot(tmp_path, gateway=f"gateway: {{webhook: {hook}}}").gateway.webhook
    assert found is not None
    assert (found.url, found.secret_env) == ("https://user-hooks.example.com/limits?a=1", "HOOK")


@given(st.binary(min_size=24, max_size=64))
def test_a_webhooks_secret_is_the_bytes_that_it_writes(key: bytes) -> None:
    assert signing_key("whsec_" + b64encode(key).decode()) == key


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        b64encode(b"k" * 32).decode(),
        "whsec_" + b64encode(b"k" * 23).decode(),
        "whsec_" + b64encode(b"k" * 65).decode(),
        "whsec_" + b64encode(b"k" * 32).decode()[:-1],
        "whsec_" + b64encode(b"k" * 30).decode() + "\n",
        "whsec_" + "é" * 40,
        "whsec_whsec_" + b64encode(b"k" * 30).decode(),
    ],
)
def test_what_is_no_webhooks_secret_is_told_and_not_repeated(secret: str) -> None:
    with pytest.raises(ValueError, match=r"^is no secret of a webhook, expected whsec_ and base64 of 24 to 64 bytes$"):
        signing_key(secret)


@pytest.mark.parametrize(
    ("patterns", "model", "expected"),
    [
        (("*",), "anything", True),
        (("accounts/acme/*",), "accounts/acme/models/llama", True),
        (("accounts/acme/*",), "accounts/other/models/llama", False),
        (("llama", "qwen*"), "qwen3", True),
        (("llama",), "LLAMA", False),
        ((), "llama", False),
    ],
)
def test_patterns_name_models(patterns: tuple[str, ...], model: str, expected: bool) -> None:
    assert matches(patterns, model) is expected


ONE_OF_COUNTS = "requests, input_tokens, uncached_input_tokens, output_tokens, total_tokens, usd, concurrent_requests"
SECTIONS = "gateway, models, families, pools, routes, plans, organisations, teams, exports"


def tokens(members: str) -> str:
    """A document whose fourth line is a limit of tokens, by the month unless the members say another kind."""
    kind = "" if "rate:" in members else "quota: 5/month, "
    return limit(f"name: l, count: total_tokens, {kind}per: [team], {members}")


# A document `a.yaml`, and the line that it is answered with.
A_TIME = "expected a day such as 2026-01-01, or 2026-01-01T09:00:00+01:00"
ASCENDING = "expected them to ascend"
MISTAKES = {
    "an unknown section": ("modles: {}", f"a.yaml:1 modles: is unknown, expected one of {SECTIONS}"),
    "an unknown member": (
        "gateway:\n  schema: strict\n  max_bdy: 1KiB",
        (
            "a.yaml:3 gateway.max_bdy: is unknown, expected one of "
            "schema, profile, max_body, reserve, when_store_fails, webhook, time_zone, users, ledger, perf_headers"
        ),
    ),
    "an unknown member far down": (
        "models:\n  llama:\n    pool: demo\n    price:\n      ouput: 1\n" + POOLS,
        "a.yaml:5 models.llama.price.ouput: is unknown, expected one of from, input, cached_input, output, reasoning",
    ),
    "a member that is missing": ("models:\n  llama: {}", "a.yaml:2 models.llama.pool: is missing"),
    "a member of a list's item that is missing": (
        limit("name: l, count: usd, rate: 1/day"),
        "a.yaml:4 plans.free.limits[0].per: is missing",
    ),
    "a string for a whole number": (
        "models:\n  llama: {pool: demo, max_output_tokens: '5'}\n" + POOLS,
        'a.yaml:2 models.llama.max_output_tokens: "5" is a string, expected a whole number',
    ),
    "a fraction for a whole number": (
        limit("name: l, count: usd, rate: 1/day, burst: 1.5, per: [team]"),
        "a.yaml:4 plans.free.limits[0].burst: 1.5 is a number, expected a whole number",
    ),
    "a boolean for a number": (
        "models:\n  llama: {pool: demo, price: {input: yes}}\n" + POOLS,
        "a.yaml:2 models.llama.price.input: true is a boolean, expected a number",
    ),
    "a number for a string": (
        "models:\n  llama: {pool: 5}\n" + POOLS,
        "a.yaml:2 models.llama.pool: 5 is a number, expected a string",
    ),
    "a date for a string": (
        "models:\n  llama: {pool: 2026-01-31}\n" + POOLS,
        "a.yaml:2 models.llama.pool: is a date, expected a string",
    ),
    "a string for a list": (
        "models:\n  llama: {pool: demo, aliases: l}\n" + POOLS,
        'a.yaml:2 models.llama.aliases: "l" is a string, expected a list',
    ),
    "a list for names": ("teams: [red]", "a.yaml:1 teams: is a list, expected names, each with its members"),
    "nothing for names": ("teams:", "a.yaml:1 teams: is empty, expected names, each with its members"),
    "nothing for members": (
        "pools:\n  demo:",
        (
            "a.yaml:2 pools.demo: is empty, expected members: api, schema, profile, usage, balance, transport, "
            "timeouts, retries, health, slow_start, comments, fallback, forward_headers, tls, upstreams"
        ),
    ),
    "a number for members": (
        "pools:\n  demo: {upstreams: [7]}",
        (
            "a.yaml:2 pools.demo.upstreams[0]: 7 is a number, "
            "expected members: url, key_env, key_file, weight, max_in_flight, drain"
        ),
    ),
    "a list that holds nothing": (
        limit("name: l, count: usd, rate: 1/day, per: []"),
        "a.yaml:4 plans.free.limits[0].per: holds nothing, expected at least 1 item",
    ),
    "an unknown word": (
        limit("name: l, count: tokens, rate: 1/day, per: [team]"),
        f'a.yaml:4 plans.free.limits[0].count: "tokens" is unknown, expected one of {ONE_OF_COUNTS}',
    ),
    "an unknown word in a list": (
        limit("name: l, count: usd, rate: 1/day, per: [team, teem]"),
        (
            'a.yaml:4 plans.free.limits[0].per[1]: "teem" is unknown, '
            "expected one of organisation, team, key, user, model"
        ),
    ),
    "a boolean for a word": (
        "gateway: {schema: on}",
        "a.yaml:1 gateway.schema: true is unknown, expected one of strict, lenient",
    ),
    "a rate without a unit": (
        limit("name: l, count: usd, rate: 600, per: [team]"),
        (
            "a.yaml:4 plans.free.limits[0].rate: 600 has no unit, "
            "expected an amount per second, minute, hour, day, such as 600/minute"
        ),
    ),
    "a rate with a unit of quotas": (
        limit("name: l, count: usd, rate: 600/month, per: [team]"),
        (
            'a.yaml:4 plans.free.limits[0].rate: "600/month" has no unit, '
            "expected an amount per second, minute, hour, day, such as 600/minute"
        ),
    ),
    "a quota of nothing": (
        limit("name: l, count: usd, quota: 0/day, per: [team]"),
        'a.yaml:4 plans.free.limits[0].quota: "0/day" is out of range, expected an amount from 1 to 1000000000000',
    ),
    "more dollars than can be counted": (
        limit("name: l, count: usd, quota: 1_000_000_001/day, per: [team]"),
        "a.yaml:4 plans.free.limits[0]: counts more than 1000000000 dollars, expected at most so many",
    ),
    "a time without a unit": (
        "pools:\n  demo: {timeouts: {idle: 60}, upstreams: [{url: 'http://a'}]}",
        (
            "a.yaml:2 pools.demo.timeouts.idle: 60 is no measure, expected a number with one of ms, s, m, h, d, "
            "such as 120s"
        ),
    ),
    "no time at all": (
        "pools:\n  demo: {timeouts: {idle: 0s}, upstreams: [{url: 'http://a'}]}",
        "a.yaml:2 pools.demo.timeouts.idle: 0 is too small, expected more than 0",
    ),
    "a size with a wrong unit": (
        "gateway: {max_body: 32MB}",
        (
            'a.yaml:1 gateway.max_body: "32MB" is no measure, expected a number with one of B, KiB, MiB, GiB, '
            "such as 32MiB"
        ),
    ),
    "a price of another kind": (
        "models:\n  llama: {pool: demo, price: 3}\n" + POOLS,
        "a.yaml:2 models.llama.price: 3 is a number, expected members: from, input, cached_input, output, reasoning",
    ),
    "a list without a price": (
        "models:\n  llama: {pool: demo, price: []}\n" + POOLS,
        "a.yaml:2 models.llama.price: holds nothing, expected at least 1 item",
    ),
    "no price in a list": (
        "models:\n  llama:\n    pool: demo\n    price:\n      - {input: 1}\n      - 4\n" + POOLS,
        "a.yaml:6 models.llama.price[1]: 4 is a number, expected members: from, input, cached_input, output, reasoning",
    ),
    "a member of a price in a list": (
        "models:\n  llama:\n    pool: demo\n    price:\n      - {input: 1}\n      - {from: 2026-01-01, foo: 1}\n"
        + POOLS,
        "a.yaml:6 models.llama.price[1].foo: is unknown, expected one of from, input, cached_input, output, reasoning",
    ),
    **{
        f"no time: {written}": (
            f"models:\n  llama: {{pool: demo, price: {{from: {written}}}}}\n" + POOLS,
            f"a.yaml:2 models.llama.price.from: {shown} is no time, {A_TIME}",
        )
        for written, shown in (
            ("soon", '"soon"'),
            ("'2026-02-30'", '"2026-02-30"'),
            ("20260101", "20260101"),
            ("2026-01-01 09:00:00", "2026-01-01T09:00:00"),
            ("'2026-01-01T09:00'", '"2026-01-01T09:00"'),
            ("0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00+14:00"),
        )
    },
    "prices of one day": (
        "models:\n  llama:\n    pool: demo\n    price:\n"
        "      - {from: 2026-01-01}\n      - {from: 2026-01-01T01:00:00+01:00}\n" + POOLS,
        f"a.yaml:6 models.llama.price[1].from: 2026-01-01T00:00Z is not after 2026-01-01T00:00Z, {ASCENDING}",
    ),
    "a price that is later than the next one": (
        "models:\n  llama:\n    pool: demo\n    price:\n"
        "      - {input: 1}\n      - {from: 2026-02-01}\n      - {from: 2026-01-01}\n" + POOLS,
        f"a.yaml:7 models.llama.price[2].from: 2026-01-01T00:00Z is not after 2026-02-01T00:00Z, {ASCENDING}",
    ),
    "a second price from the beginning": (
        "models:\n  llama:\n    pool: demo\n    price:\n      - {input: 1}\n      - {input: 2}\n" + POOLS,
        "a.yaml:6 models.llama.price[1].from: is missing, expected the day from which this price holds",
    ),
    "users of a third kind": (
        "gateway: {users: encrypted}\n",
        'a.yaml:1 gateway.users: "encrypted" is unknown, expected one of hashed, plain',
    ),
    "rows that go within the hour": (
        "gateway: {ledger: {keep: 59m}}\n",
        "a.yaml:1 gateway.ledger.keep: 3540 is too small, expected at least 3600",
    ),
    "a member of the ledger": (
        "gateway: {ledger: {kept: 90d}}\n",
        "a.yaml:1 gateway.ledger.kept: is unknown, expected one of keep",
    ),
    "a member of a webhook": (
        "gateway: {webhook: {url: 'http://a', secret_env: A, key: b}}\n",
        "a.yaml:1 gateway.webhook.key: is unknown, expected one of url, secret_env, secret_file",
    ),
    "a sink that nobody knows": (
        "exports:\n  a:\n    batch: 1\n    to: kafka\n",
        'a.yaml:4 exports.a.to: "kafka" is unknown, expected one of jsonl, postgres, cloudevents',
    ),
    "an export to nowhere": ("exports:\n  a: {folder: /x}\n", "a.yaml:2 exports.a.to: is missing"),
    "an export that has no members": (
        "exports:\n  a: jsonl\n",
        'a.yaml:2 exports.a: "jsonl" is a string, expected members: to, and those that it has',
    ),
    "a member of another sink": (
        "exports:\n  a: {to: jsonl, folder: /x, table: usage}\n",
        "a.yaml:2 exports.a.table: is unknown, expected one of to, folder, rotate, every, batch, attempts",
    ),
    "files without a folder": ("exports:\n  jsonl: {to: jsonl}\n", "a.yaml:2 exports.jsonl.folder: is missing"),
    "a folder that depends on where one stands": (
        "exports:\n  a: {to: jsonl, folder: usage}\n",
        'a.yaml:2 exports.a.folder: "usage" is no folder, expected one from the root on, such as /var/lib/usage',
    ),
    "a table with a blank": (
        "exports:\n  a: {to: postgres, dsn_env: A, table: my usage}\n",
        'a.yaml:2 exports.a.table: "my usage" is no name of a table, expected one such as usage, or ledger.usage',
    ),
    "a database that nobody says how to reach": (
        "exports:\n  a: {to: postgres}\n",
        "a.yaml:2 exports.a: has neither dsn_env nor dsn_file, expected one of them",
    ),
    "a database by two ways": (
        "exports:\n  a: {to: postgres, dsn_env: A, dsn_file: /run/dsn}\n",
        "a.yaml:2 exports.a: has dsn_env and dsn_file, expected one of them",
    ),
    "a token in two places": (
        "exports:\n  a: {to: cloudevents, url: 'http://a', token_env: A, token_file: /run/token}\n",
        "a.yaml:2 exports.a: has token_env and token_file, expected one of them at most",
    ),
    "a batch that receivers do not take": (
        "exports:\n  a: {to: cloudevents, url: 'http://a', batch: 101}\n",
        "a.yaml:2 exports.a.batch: 101 is too large, expected at most 100",
    ),
    "a batch of too many rows": (
        "exports:\n  a: {to: jsonl, folder: /x, batch: 1001}\n",
        "a.yaml:2 exports.a.batch: 1001 is too large, expected at most 1000",
    ),
    "a type with a blank": (
        "exports:\n  a: {to: cloudevents, url: 'http://a', type: my tokens}\n",
        'a.yaml:2 exports.a.type: "my tokens" is no word of an event, expected ASCII without a blank',
    ),
    "an export without a name": (
        "exports:\n  a b: {to: jsonl, folder: /x}\n",
        'a.yaml:2 exports.a b: "a b" is no name, expected letters, digits, dot, dash or underscore, at most 64',
    ),
    "a price below nothing": (
        "models:\n  llama: {pool: demo, price: {input: -0.5}}\n" + POOLS,
        "a.yaml:2 models.llama.price.input: -0.5 is too small, expected at least 0",
    ),
    "a price without end": (
        "models:\n  llama: {pool: demo, price: {input: .inf}}\n" + POOLS,
        "a.yaml:2 models.llama.price.input: inf is a number, expected a finite one",
    ),
    "a number of a thousand digits": (
        "models:\n  llama: {pool: demo, max_output_tokens: 0x" + "f" * 5000 + "}\n" + POOLS,
        (
            "a.yaml:2 models.llama.max_output_tokens: a number of more than 30 digits is too large, "
            "expected at most 10000000"
        ),
    ),
    "a limit with two kinds": (
        limit("name: l, count: usd, rate: 1/day, quota: 1/day, per: [team]"),
        "a.yaml:4 plans.free.limits[0]: has rate, quota, expected exactly one of rate, quota, at_most",
    ),
    "a limit without a kind": (
        limit("name: l, count: usd, per: [team]"),
        "a.yaml:4 plans.free.limits[0]: has no amount, expected exactly one of rate, quota, at_most",
    ),
    "a rate of seats": (
        limit("name: l, count: concurrent_requests, rate: 1/day, per: [team]"),
        (
            "a.yaml:4 plans.free.limits[0]: counts concurrent_requests with rate, "
            "expected at_most for concurrent_requests and only there"
        ),
    ),
    "a burst without a rate": (
        limit("name: l, count: usd, quota: 1/day, burst: 5, per: [team]"),
        "a.yaml:4 plans.free.limits[0]: has burst without rate, expected it with rate only",
    ),
    "a time zone without a quota": (
        limit("name: l, count: usd, rate: 1/day, time_zone: UTC, per: [team]"),
        "a.yaml:4 plans.free.limits[0]: has time_zone without quota, expected it with quota only",
    ),
    "a quota of calendar minutes": (
        limit("name: l, count: usd, quota: 1/minute, per: [team]"),
        "a.yaml:4 plans.free.limits[0]: has a quota of calendar minutes, expected it rolling or longer",
    ),
    "a rolling rate": (
        tokens("rate: 1/day, rolling: true"),
        "a.yaml:4 plans.free.limits[0]: has rolling without quota, expected it with quota only",
    ),
    "a rolling quota in a time zone": (
        tokens("rolling: true, time_zone: UTC"),
        (
            "a.yaml:4 plans.free.limits[0]: is rolling and has a time_zone, "
            "expected one of them: time zones are of calendars"
        ),
    ),
    "a string for a boolean": (
        tokens("rolling: 'yes'"),
        'a.yaml:4 plans.free.limits[0].rolling: "yes" is a string, expected true or false',
    ),
    "warnings of a rate": (
        tokens("rate: 1/day, warn_at: [80%]"),
        "a.yaml:4 plans.free.limits[0]: has warn_at without quota, expected it with quota only",
    ),
    "warnings of seats": (
        limit("name: l, count: concurrent_requests, at_most: 5, per: [team], warn_at: [80%]"),
        "a.yaml:4 plans.free.limits[0]: has warn_at without quota, expected it with quota only",
    ),
    **{
        f"warnings at {shares}": (
            tokens(f"warn_at: [{shares}]"),
            (
                "a.yaml:4 plans.free.limits[0]: has warn_at that does not ascend from above 0%, "
                "expected shares such as [80%, 95%]"
            ),
        )
        for shares in ("95%, 80%", "80%, 80%", "0%, 80%")
    },
    "a warning without its sign": (
        tokens("warn_at: [80%, 0.9]"),
        "a.yaml:4 plans.free.limits[0].warn_at[1]: 0.9 is no share, expected one from 0% to 100%",
    ),
    "a soft limit of nothing": (
        tokens("soft: 0%"),
        'a.yaml:4 plans.free.limits[0].soft: "0%" is too small, expected more than 0',
    ),
    "an unknown mode": (
        tokens("mode: dry-run"),
        'a.yaml:4 plans.free.limits[0].mode: "dry-run" is unknown, expected one of enforce, shadow',
    ),
    "an unknown reservation": (
        tokens("reserve: p95"),
        'a.yaml:4 plans.free.limits[0].reserve: "p95" is unknown, expected one of max, expected, input',
    ),
    "a reservation of what is known": (
        limit("name: l, count: requests, rate: 1/day, per: [team], reserve: max"),
        ("a.yaml:4 plans.free.limits[0]: reserves requests, which are known beforehand; expected tokens or usd there"),
    ),
    "an unknown way without a store": (
        "gateway: {when_store_fails: lokal}",
        'a.yaml:1 gateway.when_store_fails: "lokal" is unknown, expected one of local, open, closed',
    ),
    "a limit of no models": (
        tokens("models: []"),
        "a.yaml:4 plans.free.limits[0].models: holds nothing, expected at least 1 item",
    ),
    "a limit's pattern for no model": (
        tokens("models: [llama, 'qwen*']") + MODELS + POOLS,
        'a.yaml:4 plans.free.limits[0].models[1]: "qwen*" is not defined, expected one of llama',
    ),
    "a webhook without a secret": (
        "gateway:\n  webhook: {url: 'https://a/b'}",
        "a.yaml:2 gateway.webhook: has neither secret_env nor secret_file, expected one of them",
    ),
    "a webhook with two secrets": (
        "gateway:\n  webhook: {url: 'https://a/b', secret_env: A, secret_file: /a}",
        "a.yaml:2 gateway.webhook: has secret_env and secret_file, expected one of them",
    ),
    "an upstream with two credentials": (
        "pools:\n  demo:\n    upstreams:\n      - {url: 'http://a', key_env: A, key_file: /a}",
        "a.yaml:4 pools.demo.upstreams[0]: has key_env and key_file, expected one of them at most",
    ),
    "a credential in a file of some directory": (
        "pools:\n  demo: {upstreams: [{url: 'http://a', key_file: key}]}",
        (
            'a.yaml:2 pools.demo.upstreams[0].key_file: "key" is no file, '
            "expected its path from the root on, such as /run/secrets/key"
        ),
    ),
    **{
        f"a webhook to {url}": (
            f"gateway:\n  webhook: {{url: '{url}', secret_env: HOOK}}",
            f'a.yaml:2 gateway.webhook.url: "{url}" is no address, expected one such as https://hooks.example.com/limits',
        )
        for url in ("hooks", "http://a:99999/b", "http://a/b#c", "ftp://a/b", "http://999.0.0.1/")
    },
    "a password in an address": (
        "pools:\n  demo: {upstreams: [{url: 'http://user:p@ss/w@a'}]}",
        (
            'a.yaml:2 pools.demo.upstreams[0].url: "http://…@a" is no address, '
            "expected one such as http://10.0.0.7:8000, without /v1"
        ),
    ),
    "an organisation without a team": (
        "organisations:\n  acm: {plan: free}\n" + PLANS + TEAMS,
        'a.yaml:2 organisations.acm: "acm" has no team, expected one of acme',
    ),
    "an organisation where no team is": (
        "organisations:\n  acme: {plan: free}\n" + PLANS,
        'a.yaml:2 organisations.acme: "acme" has no team, expected one of (no team is defined)',
    ),
    "an organisation with an unknown plan": (
        "organisations:\n  acme: {plan: fre}\n" + PLANS + TEAMS,
        'a.yaml:2 organisations.acme.plan: "fre" is not defined, expected one of free',
    ),
    "an organisation with the plan of a team": (
        "organisations:\n  acme: {plan: free}\n" + PLANS + TEAMS,
        'a.yaml:2 organisations.acme.plan: "free" is the plan of one of its teams, too, expected another one',
    ),
    "a limit of a team that is called as one of its organisation": (
        ORGANISATIONS.replace("name: rate", "name: spend"),
        (
            'a.yaml:3 plans.free.limits[0].name: "spend" stands in the plan acme of the organisation acme, too, '
            "expected a name of its own"
        ),
    ),
    "two limits with one count": (
        SHARED % ("organisation", "900/month", "organisation", "acme"),
        (
            'a.yaml:3 plans.two.limits[0]: "spend" has one count in acme with that of the plan one, and differs, '
            "expected the same members, or another name"
        ),
    ),
    "two limits with one count that warn at other shares": (
        SHARED % ("model", "500/month, warn_at: [80%]", "model", "acme"),
        (
            'a.yaml:3 plans.two.limits[0]: "spend" has one count in acme with that of the plan one, and differs, '
            "expected the same members, or another name"
        ),
    ),
    "an unknown time zone": (
        "gateway: {time_zone: Europe/Zürich}",
        'a.yaml:1 gateway.time_zone: "Europe/Zürich" is no time zone, expected a name such as Europe/Zurich',
    ),
    "a name with a blank": (
        "plans:\n  free beer: {}",
        (
            'a.yaml:2 plans.free beer: "free beer" is no name, '
            "expected letters, digits, dot, dash or underscore, at most 64"
        ),
    ),
    "a model's name with a separator": (
        "models:\n  a|b: {pool: demo}\n" + POOLS,
        'a.yaml:2 models.a|b: "a|b" is no model\'s name, expected at most 200 characters, no blank, no | { }',
    ),
    "an address without a scheme": (
        "pools:\n  demo: {upstreams: [{url: localhost}]}",
        (
            'a.yaml:2 pools.demo.upstreams[0].url: "localhost" is no address, '
            "expected one such as http://10.0.0.7:8000, without /v1"
        ),
    ),
    "a member that stands twice": (
        "gateway:\n  schema: strict\n  schema: lenient",
        "a.yaml:3 gateway.schema: stands twice, expected once",
    ),
    "a section that stands twice": ("plans: {}\nplans: {}", "a.yaml:2 plans: stands twice, expected once"),
    "an unknown pool": (
        "models:\n  llama: {pool: dmo}\n" + POOLS,
        'a.yaml:2 models.llama.pool: "dmo" is not defined, expected one of demo',
    ),
    "an unknown family": (
        "models:\n  llama: {pool: demo, family: qwen}\n" + POOLS,
        'a.yaml:2 models.llama.family: "qwen" is not defined, expected one of (none is defined)',
    ),
    "an unknown plan": (
        "teams:\n  red: {organisation: acme, plan: fre}\n" + PLANS,
        'a.yaml:2 teams.red.plan: "fre" is not defined, expected one of free',
    ),
    "a pattern for no model": (
        "teams:\n  red: {organisation: acme, plan: free, models: ['*', 'qwen*']}\n" + PLANS + MODELS + POOLS,
        'a.yaml:2 teams.red.models[1]: "qwen*" is not defined, expected one of llama',
    ),
    "an alias that is a model": (
        "models:\n  llama: {pool: demo}\n  qwen: {pool: demo, aliases: [llama]}\n" + POOLS,
        'a.yaml:3 models.qwen.aliases[0]: "llama" is already a model, expected a name of its own',
    ),
    "an alias of two models": (
        "models:\n  llama: {pool: demo, aliases: [l]}\n  qwen:\n    pool: demo\n    aliases:\n      - l\n" + POOLS,
        'a.yaml:6 models.qwen.aliases[0]: "l" is already an alias of llama, expected a name of its own',
    ),
    "a limit's name that stands twice": (
        limit("name: l, count: usd, rate: 1/day, per: [team]}\n      - {name: l, count: usd, rate: 1/day, per: [key]"),
        'a.yaml:5 plans.free.limits[1].name: "l" stands twice in this plan, expected a name of its own',
    ),
    "a limit's name that stands twice for an organisation": (
        limit(
            "name: l, count: usd, rate: 1/day, per: [model]}\n      - {name: l, count: usd, rate: 2/day, per: [model]"
        )
        + TEAMS,
        'a.yaml:5 plans.free.limits[1].name: "l" stands twice in this plan, expected a name of its own',
    ),
    "a share without its sign": (
        "pools:\n  demo: {retries: {budget: 0.1}, upstreams: [{url: 'http://a'}]}",
        "a.yaml:2 pools.demo.retries.budget: 0.1 is no share, expected one from 0% to 100%",
    ),
    "a share of more than all": (
        "pools:\n  demo: {retries: {budget: 101%}, upstreams: [{url: 'http://a'}]}",
        'a.yaml:2 pools.demo.retries.budget: "101%" is no share, expected one from 0% to 100%',
    ),
    "an unknown cause": (
        "pools:\n  demo: {retries: {on: [connect, 404]}, upstreams: [{url: 'http://a'}]}",
        ("a.yaml:2 pools.demo.retries.on[1]: 404 is unknown, expected one of connect, reset, 429, 500, 502, 503, 504"),
    ),
    "a header that never travels": (
        "pools:\n  demo: {forward_headers: [x-a, cookie], upstreams: [{url: 'http://a'}]}",
        (
            'a.yaml:2 pools.demo.forward_headers[1]: "cookie" is no header\'s name in lower case that may travel, '
            "such as x-experiment"
        ),
    ),
    "a path that is none": (
        "pools:\n  demo: {health: {probe: health}, upstreams: [{url: 'http://a'}]}",
        'a.yaml:2 pools.demo.health.probe: "health" is no path, expected one such as /health',
    ),
    "a key without a certificate": (
        "pools:\n  demo: {tls: {key: k.pem}, upstreams: [{url: 'https://a'}]}",
        "a.yaml:2 pools.demo.tls: has a key without a certificate, expected one with certificate only",
    ),
    "an upstream that stands twice": (
        "pools:\n  demo: {upstreams: [{url: 'http://a'}, {url: 'http://a'}]}",
        'a.yaml:2 pools.demo.upstreams[1].url: "http://a" stands twice in this pool, expected once',
    ),
    "a pool that falls back to itself": (
        "pools:\n  demo: {fallback: demo, upstreams: [{url: 'http://a'}]}",
        'a.yaml:2 pools.demo.fallback: "demo" is not defined, expected one of (none is defined)',
    ),
    "a model that falls back to an alias": (
        "models:\n  llama: {pool: demo, fallback: q}\n  qwen: {pool: demo, aliases: [q]}\n" + POOLS,
        'a.yaml:2 models.llama.fallback: "q" is not defined, expected one of qwen',
    ),
    "a name with several stars": (
        "models:\n  a*b*: {pool: demo}\n" + POOLS,
        'a.yaml:2 models.a*b*: "a*b*" has several stars, expected one at most',
    ),
    "a star that stands for nothing": (
        "models:\n  llama: {pool: demo, upstream_model: l*}\n" + POOLS,
        'a.yaml:2 models.llama.upstream_model: "l*" has a star, and "llama" has none',
    ),
    "an alias with a star": (
        "models:\n  llama: {pool: demo, aliases: ['l*']}\n" + POOLS,
        'a.yaml:2 models.llama.aliases[0]: "l*" is an alias, expected no star in it, nor in what it stands for',
    ),
    "an alias of a name with a star": (
        "models:\n  llama*: {pool: demo, aliases: [l]}\n" + POOLS,
        'a.yaml:2 models.llama*.aliases[0]: "l" is an alias, expected no star in it, nor in what it stands for',
    ),
    "a model that falls back to names with a star": (
        "models:\n  llama: {pool: demo, fallback: q*}\n  q*: {pool: demo}\n" + POOLS,
        'a.yaml:2 models.llama.fallback: "q*" is not defined, expected one of (none is defined)',
    ),
    "a pattern of a team that no star can fit": (
        "models: {openai/*: {pool: demo}}\n" + POOLS + PLANS + TEAMS.replace("}", ", models: [o/*]}"),
        'a.yaml:7 teams.red.models[0]: "o/*" is not defined, expected one of openai/*',
    ),
    "a route that is an endpoint": (
        "routes:\n  /v1/embeddings: {pool: demo}\n" + POOLS,
        'a.yaml:2 routes./v1/embeddings: "/v1/embeddings" is an endpoint of the gateway\'s own, expected another path',
    ),
    "a route to no pool": (
        "routes:\n  /v1/files: {pool: other}\n" + POOLS,
        'a.yaml:2 routes./v1/files.pool: "other" is not defined, expected one of demo',
    ),
    "a route that is no path": (
        "routes:\n  /v1/../admin: {pool: demo}\n" + POOLS,
        'a.yaml:2 routes./v1/../admin: "/v1/../admin" is no route, expected one such as /v1/moderations, /v1/files/*',
    ),
    "a profile of no version": (
        "gateway: {profile: 2024}",
        'a.yaml:1 gateway.profile: "2024" is unknown, expected one of 2023, 4.21.6, 2026',
    ),
    "no YAML": ("gateway: {", "a.yaml:2: is no YAML: while parsing a flow node, did not find expected node content"),
    "two documents": (
        "gateway: {}\n---\ngateway: {}",
        "a.yaml:2: is no YAML: expected a single document in the stream, but found another document",
    ),
    "no text": (
        "gateway: \x00",
        "a.yaml: is no YAML: unacceptable character #x0000: control characters are not allowed",
    ),
    "a list of sections": ("- gateway", f"a.yaml:1: has no sections, expected some of {SECTIONS}"),
    "a list for a name": (
        "teams:\n  [red]: {}",
        "a.yaml:2 teams: a list or a mapping stands for a name, expected a word",
    ),
    "what is no date": (
        "gateway:\n  time_zone: 2026-99-99",
        'a.yaml:2 gateway.time_zone: "2026-99-99" is no timestamp',
    ),
    "what is no number": ("gateway: {schema: !!bool maybe}", 'a.yaml:1 gateway.schema: "maybe" is no bool'),
    "a document inside itself": (
        "gateway: &g\n  schema: *g",
        "a.yaml:1: the documents are too deep or too large, expected at most 20 levels and 300000 values",
    ),
}


@pytest.mark.parametrize(("document", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_names_file_line_and_path_and_what_was_expected(tmp_path: Path, document: str, expected: str) -> None:
    assert mistakes(tmp_path, a=document) == (expected,)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    assert mistakes(tmp_path, a="gateway: {max_body: 1}", b="teams:\n  red: {plan: 5, organisation: acme}") == (
        "a.yaml:1 gateway.max_body: 1 is no measure, expected a number with one of B, KiB, MiB, GiB, such as 32MiB",
        "b.yaml:2 teams.red.plan: 5 is a number, expected a string",
    )


def test_a_name_that_is_defined_in_two_files_is_told_with_both_places(tmp_path: Path) -> None:
    found = mistakes(tmp_path, a=TEAMS, b=f"# a comment\n{TEAMS}", c="gateway: {}", d="gateway: {}")
    assert found == (
        "b.yaml:3 teams.red: is already defined at a.yaml:2, expected once",
        "d.yaml:1 gateway: is already defined at c.yaml:1, expected once",
    )


def test_a_directory_without_documents_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"nowhere: holds no \.yaml file, expected policy documents"):
        load(tmp_path / "nowhere")


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").mkdir()
    assert mistakes(tmp_path, b=POOLS) == ("a.yaml: cannot be read (Is a directory), expected a policy document",)


def test_aliases_that_multiply_end_in_a_mistake(tmp_path: Path) -> None:
    """Nine times nine times nine: what is small on disk must not fill the memory."""
    lines = ["gateway:", "  a0: &a0 [x]"]
    lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (found,) = mistakes(tmp_path, a="\n".join(lines))
    assert "too deep or too large" in found


@pytest.mark.parametrize(
    "url",
    ["http://a", "https://vllm-0.vllm.svc:8443/base", "http://10.0.0.7:8000", "http://[::1]:80", "http://my_host"],
)
def test_addresses_that_a_wire_can_go_to_pass(tmp_path: Path, url: str) -> None:
    found = snapshot(tmp_path, a=yaml.safe_dump({"pools": {"demo": {"upstreams": [{"url": url}]}}}))
    assert found.pools["demo"].upstreams[0].url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a",
        "http://",
        "http://user:secret@a",
        "http://a/?q=1",
        "http://a:0",
        "http://a:99999",
        "http://a:b",
        "http://999.0.0.1",
        "http://10.0.0",
        "http://[::g]",
        "http://ä.example",
        "http://a b",
        "http://a\n",
    ],
)
def test_addresses_that_no_wire_can_go_to_are_mistakes(tmp_path: Path, url: str) -> None:
    (found,) = mistakes(tmp_path, a=yaml.safe_dump({"pools": {"demo": {"upstreams": [{"url": url}]}}}))
    assert "is no address, expected one such as" in found


# — what its page shows


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_the_examples_of_the_page_are_in_the_language(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    found = Documents.model_validate(Source(tmp_path, Documents.model_fields).data)
    assert found.model_fields_set


def test_the_page_shows_how_a_webhook_is_verified() -> None:
    """As Standard Webhooks signs one: what was signed is genuine, and with another key, id, time or body it is not."""
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    page: dict[str, Any] = {}
    exec(text, page)  # the page is ours
    secret = "whsec_" + b64encode(b"k" * 32).decode()
    named = {"webhook-id": "msg_1", "webhook-timestamp": "1790510400"}

    def genuine(secret: str, body: bytes, **changed: str) -> bool:
        signed = b"msg_1.1790510400.{}"
        signature = b64encode(hmac.digest(b"k" * 32, signed, "sha256")).decode()
        headers = {**named, "webhook-signature": f"v1,AAAA v1,{signature}"}
        found: bool = page["genuine"](
            secret, headers | {f"webhook-{name}": value for name, value in changed.items()}, body
        )
        return found

    assert genuine(secret, b"{}")
    assert not genuine("whsec_" + b64encode(b"l" * 32).decode(), b"{}")
    assert not genuine(secret, b"{ }")
    assert not genuine(secret, b"{}", id="msg_2")
    assert not genuine(secret, b"{}", timestamp="1790510401")
    assert not genuine(secret, b"{}", signature="v1,AAAA")


# — whatever is written, a Snapshot or a PolicyError comes of it

WORDS = st.sampled_from(
    [
        *("gateway", "models", "families", "pools", "plans", "teams", "limits", "upstreams", "url", "price", "per"),
        *(
            "exports",
            "to",
            "jsonl",
            "postgres",
            "cloudevents",
            "folder",
            "from",
            "input",
            "ledger",
            "keep",
            "2026-01-01",
        ),
        *("name", "count", "rate", "quota", "at_most", "burst", "pool", "plan", "organisation", "time_zone", "team"),
        *(
            "requests",
            "usd",
            "600/minute",
            "5/month",
            "120s",
            "32MiB",
            "http://a",
            "demo",
            "llama",
            "free",
            "*",
            "[!",
            "UTC",
        ),
    ]
)
SCALARS = WORDS | st.text(max_size=5) | st.integers() | st.floats() | st.booleans() | st.none() | st.dates()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6))
SIGNS = st.text(st.sampled_from("ab01_:.-?&*!<>|[]{},#'\"% \n\t=~@`\\/é\ud7ff\x00\x85"), max_size=60)


def anything(folder: Path, text: bytes) -> None:
    (folder / "a.yaml").write_bytes(text)
    found: Snapshot | PolicyError
    try:
        found = load(folder)
    except PolicyError as refused:
        found = refused
    if isinstance(found, PolicyError):
        assert found.mistakes
        assert all(line.startswith("a.yaml:") and line.isprintable() for line in found.mistakes)


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(document=VALUES)
def test_any_values_give_a_snapshot_or_a_policy_error(tmp_path: Path, document: Any) -> None:
    anything(tmp_path, yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))


@FUZZ
@given(text=SIGNS.map(str.encode) | st.binary(max_size=40))
def test_any_text_gives_a_snapshot_or_a_policy_error(tmp_path: Path, text: bytes) -> None:
    anything(tmp_path, text)


MERGED: Any = {name: part for file in SHIPPED.glob("*.yaml") for name, part in yaml.safe_load(file.read_text()).items()}


@FUZZ
@given(value=SCALARS | st.sampled_from(["9" * 5000, "9" * 400 + "s", "9" * 5000 + "/day", "٣/minute"]), data=st.data())
def test_any_value_in_any_place_gives_a_snapshot_or_a_policy_error(tmp_path: Path, value: Any, data: Any) -> None:
    node = merged = copy.deepcopy(MERGED)
    while True:
        step = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[step], dict | list) and node[step]) or data.draw(st.integers(0, 5)) == 0:
            node[step] = value
            break
        node = node[step]
    anything(tmp_path, yaml.safe_dump(merged).encode())

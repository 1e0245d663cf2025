"""Policy documents, checked whole and compiled into one Snapshot.

Documents are taken whole or not at all. Every mistake is told at once, with file, line, path, what was found and what
was expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gateway.documents import Path_, PolicyError, Source, show
from gateway.endpoints import ENDPOINTS, Endpoint
from gateway.language import Documents, LimitPolicy, ModelPolicy, PricePolicy, RoutePolicy, TeamPolicy, listed
from gateway.records import Price
from gateway.snapshot import Family, Limit, Model, Route, Snapshot, Team, matches


def load(directory: Path) -> Snapshot:
    """The snapshot of a directory's `*.yaml` and `*.yml` files. Raises PolicyError with every mistake found."""
    source = Source(directory, Documents.model_fields)
    try:
        documents = Documents.model_validate(source.data)
    except ValidationError as found:
        raise PolicyError(
            source.mistake(_path(error["loc"], error["type"]), _explain(error))
            for error in found.errors(include_url=False)
            if not (error["type"] == "too_short" and error["input"])  # what it held was told already
        ) from None
    mistakes = [source.mistake(path, text) for path, text in _dangling(documents)]
    if mistakes:
        raise PolicyError(mistakes)
    return _compile(documents, source.revision)


# pydantic's findings in our words, by its name for them: what was found, what was expected.
_FINDINGS: Mapping[str, str] = {
    "extra_forbidden": "is unknown, expected one of {known}",
    "missing": "is missing",
    "value_error": "{error}",
    "literal_error": "{found} is unknown, expected one of {expected}",
    "string_type": "{kind}, expected a string",
    "string_unicode": "{kind}, expected a string of Unicode characters",
    "int_type": "{kind}, expected a whole number",
    "int_from_float": "{kind}, expected a whole number",
    "bool_type": "{kind}, expected true or false",
    "float_type": "{kind}, expected a number",
    "finite_number": "{kind}, expected a finite one",
    "tuple_type": "{kind}, expected a list",
    "dict_type": "{kind}, expected names, each with its members",
    "model_type": "{kind}, expected members: {known}",
    "too_short": "holds nothing, expected at least {min_length} item",
    "greater_than": "{found} is too small, expected more than {gt}",
    "greater_than_equal": "{found} is too small, expected at least {ge}",
    "less_than_equal": "{found} is too large, expected at most {le}",
    "union_tag_invalid": '"{tag}" is unknown, expected one of {expected_tags}',
    "union_tag_not_found": "is missing",
    "model_attributes_type": "{kind}, expected members: to, and those that it has",
}


def _explain(error: Any) -> str:
    found, context = error["input"], error.get("ctx", {})
    path = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    words = {name: str(value).removesuffix(".0").replace("'", "") for name, value in context.items() if name != "error"}
    words["expected"] = words.get("expected", "").replace(" or ", ", ")
    words["error"] = str(context.get("error", ""))
    template = _FINDINGS.get(error["type"], "{found}: {msg}")
    return template.format(**words, found=show(found), kind=_kind(found), known=listed(_known(path)), msg=error["msg"])


def _kind(found: object) -> str:
    """What sort of value stands where another is expected."""
    match found:
        case None:
            return "is empty"
        case bool():
            return f"{show(found)} is a boolean"
        case str():
            return f"{show(found)} is a string"
        case int() | float():
            return f"{show(found)} is a number"
    return f"is {show(found)}"


def _path(location: Path_, kind: str) -> Path_:
    """The place of a finding; one about a name is where the name stands, one about the kind of a sink at its `to`.

    Of what may have one of several forms pydantic says which, in the midst of the path: no document has that."""
    forms = 3 if location[2:3] == ("price",) else 2 if location[0] == "exports" else len(location)
    location = location[:forms] + location[forms + 1 :]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return (*location, "to")
    return location[:-1] if location[-1] == "[key]" else location


def _known(path: Path_) -> list[str]:
    """The members that the language has at a path."""
    node = schema = _schema()
    for step in path:
        forms, kinds = node.get("oneOf"), node.get("discriminator", {}).get("mapping", {})
        named = next(iter(node.get("patternProperties", {}).values()), None)
        node = node.get("properties", {}).get(step) or named or node.get("items") or {}
        if forms:  # the step is no member, but says which of them was found
            node = {"$ref": kinds[step]} if step in kinds else forms[step == "several"]
        if "anyOf" in node:
            node = node["anyOf"][0]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return list(node.get("properties", ()))


@cache
def _schema() -> dict[str, Any]:
    return Documents.model_json_schema()


def _dangling(documents: Documents) -> Iterator[tuple[Path_, str]]:
    """Names that stand for nothing, and names that stand for two things."""
    yield from _dangling_in_models(documents)
    yield from _prices_out_of_order(documents)
    yield from _dangling_in_routes(documents)
    yield from _dangling_in_pools(documents)
    yield from _doubled_in_plans(documents)
    yield from _patterns_of_nothing_in_plans(documents)
    yield from _dangling_in_organisations(documents)
    yield from _dangling_in_teams(documents)
    yield from _doubled_in_organisations(documents)
    yield from _one_count_of_two_limits(documents)


def _dangling_in_models(documents: Documents) -> Iterator[tuple[Path_, str]]:
    names: dict[str, str] = dict.fromkeys(documents.models, "a model")
    for name, model in documents.models.items():
        if name.count("*") > 1:
            yield ("models", name), f"{show(name)} has several stars, expected one at most"
        if "*" in (model.upstream_model or "") and "*" not in name:
            yield (
                ("models", name, "upstream_model"),
                f"{show(model.upstream_model)} has a star, and {show(name)} has none",
            )
        if model.pool not in documents.pools:
            yield ("models", name, "pool"), _unknown(model.pool, documents.pools)
        if model.family is not None and model.family not in documents.families:
            yield ("models", name, "family"), _unknown(model.family, documents.families)
        others = [other for other in documents.models if other != name and "*" not in other]
        if model.fallback is not None and model.fallback not in others:
            yield ("models", name, "fallback"), _unknown(model.fallback, others)
        for i, alias in enumerate(model.aliases):
            if "*" in alias or "*" in name:
                yield ("models", name, "aliases", i), f"{show(alias)} {_STARRED}"
            if alias in names:
                yield ("models", name, "aliases", i), f'"{alias}" is already {names[alias]}, expected a name of its own'
            names[alias] = f"an alias of {name}"


def _prices_out_of_order(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, model in documents.models.items():
        for i, (before, price) in enumerate(pairwise(model.prices), 1):
            if price.since is None:
                yield ("models", name, "price", i, "from"), "is missing, expected the day from which this price holds"
            elif before.since is not None and price.since <= before.since:
                text = f"{price.since:%Y-%m-%dT%H:%MZ} is not after {before.since:%Y-%m-%dT%H:%MZ}"
                yield ("models", name, "price", i, "from"), f"{text}, expected them to ascend"


_STARRED = "is an alias, expected no star in it, nor in what it stands for"


def _dangling_in_routes(documents: Documents) -> Iterator[tuple[Path_, str]]:
    taken = {endpoint.path for endpoint in ENDPOINTS.values()} | {"/v1/models", "/v1/models/*"}
    for path, route in documents.routes.items():
        if path in taken:
            yield ("routes", path), f"{show(path)} is an endpoint of the gateway's own, expected another path"
        if route.pool not in documents.pools:
            yield ("routes", path, "pool"), _unknown(route.pool, documents.pools)


def _dangling_in_pools(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, pool in documents.pools.items():
        if pool.fallback is not None and (pool.fallback == name or pool.fallback not in documents.pools):
            yield ("pools", name, "fallback"), _unknown(pool.fallback, (p for p in documents.pools if p != name))
        urls = [upstream.url for upstream in pool.upstreams]
        for i, url in enumerate(urls):
            if url in urls[:i]:
                yield ("pools", name, "upstreams", i, "url"), f"{show(url)} stands twice in this pool, expected once"


def _doubled_in_plans(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, plan in documents.plans.items():
        seen: set[str] = set()
        for i, limit in enumerate(plan.limits):
            if limit.name in seen:
                text = f'"{limit.name}" stands twice in this plan, expected a name of its own'
                yield ("plans", name, "limits", i, "name"), text
            seen.add(limit.name)


def _dangling_in_organisations(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, organisation in documents.organisations.items():
        if organisation.plan not in documents.plans:
            yield ("organisations", name, "plan"), _unknown(organisation.plan, documents.plans)
        with_teams = dict.fromkeys(team.organisation for team in documents.teams.values())
        if name not in with_teams:
            some = listed(with_teams) or "(no team is defined)"
            yield ("organisations", name), f"{show(name)} has no team, expected one of {some}"


def _dangling_in_teams(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, team in documents.teams.items():
        if team.plan not in documents.plans:
            yield ("teams", name, "plan"), _unknown(team.plan, documents.plans)
        yield from _patterns_of_nothing(("teams", name, "models"), team.models, documents)


def _patterns_of_nothing_in_plans(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, plan in documents.plans.items():
        for i, limit in enumerate(plan.limits):
            yield from _patterns_of_nothing(("plans", name, "limits", i, "models"), limit.models, documents)


def _patterns_of_nothing(path: Path_, patterns: Iterable[str], documents: Documents) -> Iterator[tuple[Path_, str]]:
    known = [*documents.models, *documents.routes]
    for i, pattern in enumerate(patterns):
        if pattern != "*" and not any(matches((pattern,), one) or _may_meet(pattern, one) for one in known):
            yield (*path, i), _unknown(pattern, documents.models)


def _doubled_in_organisations(documents: Documents) -> Iterator[tuple[Path_, str]]:
    """Limits of a team's plan that are called as one of its organisation's: they bind the same requests."""
    for organisation, plans in _plans_of_organisations(documents).items():
        above = documents.organisations.get(organisation)
        if above is None or above.plan not in documents.plans:
            continue
        taken = {limit.name for limit in documents.plans[above.plan].limits}
        for plan in plans:
            if plan == above.plan:
                text = f"{show(plan)} is the plan of one of its teams, too, expected another one"
                yield ("organisations", organisation, "plan"), text
                continue
            for i, limit in enumerate(documents.plans[plan].limits):
                if limit.name in taken:
                    text = f'"{limit.name}" stands in the plan {above.plan} of the organisation {organisation}, too'
                    yield ("plans", plan, "limits", i, "name"), f"{text}, expected a name of its own"


def _one_count_of_two_limits(documents: Documents) -> Iterator[tuple[Path_, str]]:
    """Limits of two plans that would share one count in an organisation, and differ: the count goes by their name."""
    for organisation, plans in _plans_of_organisations(documents).items():
        first: dict[tuple[object, ...], tuple[str, LimitPolicy]] = {}
        for plan in plans:
            for i, limit in enumerate(documents.plans[plan].limits):
                if {"team", "key", "user"} & set(limit.per):
                    continue
                count = (limit.name, limit.per, limit.kind)
                where, other = first.setdefault(count, (plan, limit))
                if where != plan and limit != other:
                    text = f'"{limit.name}" has one count in {organisation} with that of the plan {where}, and differs'
                    yield ("plans", plan, "limits", i), f"{text}, expected the same members, or another name"


def _plans_of_organisations(documents: Documents) -> dict[str, list[str]]:
    """The plans of each organisation's teams, in their order."""
    found: dict[str, list[str]] = {}
    for team in documents.teams.values():
        plans = found.setdefault(team.organisation, [])
        if team.plan in documents.plans and team.plan not in plans:
            plans.append(team.plan)
    return found


def _may_meet(pattern: str, entry: str) -> bool:
    """Whether a pattern may fit a name that fits an entry with a star; what follows the first stars is not compared."""
    ours, theirs = pattern.partition("*")[0], entry.partition("*")[0]
    return "*" in entry and (ours.startswith(theirs) or ("*" in pattern and theirs.startswith(ours)))


def _unknown(found: str, known: Iterable[str]) -> str:
    return f"{show(found)} is not defined, expected one of {listed(known) or '(none is defined)'}"


def _compile(documents: Documents, revision: str) -> Snapshot:
    families = {
        name: Family(
            name,
            None if policy.reasoning_effort is None else frozenset(policy.reasoning_effort),
            None if policy.reasoning_history is None else frozenset(policy.reasoning_history),
        )
        for name, policy in documents.families.items()
    }
    plans = {
        name: tuple(Limit.of(limit, documents.gateway) for limit in plan.limits)
        for name, plan in documents.plans.items()
    }
    own = {name: _model(name, policy, documents, families) for name, policy in documents.models.items()}
    models: dict[str, Model] = {}
    for name, policy in documents.models.items():
        _, *fallbacks = _stand_ins(own[name], documents, own)
        model = replace(own[name], fallbacks=tuple(fallbacks))
        models.update(dict.fromkeys((name, *policy.aliases), model))
    patterns = sorted((model for name, model in models.items() if "*" in name), key=_beginning, reverse=True)
    models = {name: model for name, model in models.items() if "*" not in name}
    routes = {path: _route(path, policy, documents) for path, policy in documents.routes.items()}

    def shared(team: TeamPolicy) -> tuple[Limit, ...]:
        organisation = documents.organisations.get(team.organisation)
        return () if organisation is None else plans[organisation.plan]

    teams = {
        name: Team(name, policy.organisation, policy.plan, policy.models, (*shared(policy), *plans[policy.plan]))
        for name, policy in documents.teams.items()
    }
    return Snapshot(
        revision, documents.gateway, models, tuple(patterns), routes, documents.pools, teams, documents.exports
    )


def _beginning(model: Model) -> tuple[int, int]:
    return model.entry.index("*"), len(model.entry)


def _route(path: str, policy: RoutePolicy, documents: Documents) -> Route:
    names: list[str] = []
    turn: str | None = policy.pool
    while turn is not None and turn not in names:
        names.append(turn)
        turn = documents.pools[turn].fallback
    pools = [documents.pools[name] for name in names]
    together = {"first_byte": pools[0].timeouts.first_byte}  # all of them have the time that the first one has
    model, *others = (
        Model(path, path, None, name, pool.api, path, 0, timeouts=pool.timeouts.model_copy(update=together))
        for name, pool in zip(names, pools, strict=True)
    )
    model = replace(model, fallbacks=tuple(others))
    return Route(Endpoint(path, body="any"), model, frozenset(policy.methods))


def _model(name: str, policy: ModelPolicy, documents: Documents, families: Mapping[str, Family]) -> Model:
    model = Model(
        name=name,
        entry=name,
        family=None if policy.family is None else families[policy.family],
        pool="",
        api="fireworks",
        upstream_name=policy.upstream_model or name,
        max_output_tokens=policy.max_output_tokens,
        prices=tuple((price.starts, _in_microusd(price)) for price in policy.prices),
        context_window=policy.context_window,
        restore_name=policy.restore_name,
    )
    return _in_pool(model, policy.pool, documents)


def _in_microusd(price: PricePolicy) -> Price:
    cached = price.input if price.cached_input is None else price.cached_input
    reasoning = price.output if price.reasoning is None else price.reasoning
    return Price(*(round(dollars * 1_000_000) for dollars in (price.input, cached, price.output, reasoning)))


def _in_pool(model: Model, name: str, documents: Documents) -> Model:
    """The model as this pool has it."""
    pool, policy, whole = documents.pools[name], documents.models[model.name], documents.gateway
    own = policy.timeouts
    chosen = {} if own is None else {field: getattr(own, field) for field in own.model_fields_set}
    return replace(
        model,
        pool=name,
        api=pool.api,
        strict=(policy.strictness or pool.strictness or whole.strictness) == "strict",
        profile=policy.profile or pool.profile or whole.profile,
        usage=pool.usage,
        affinity=pool.balance == "affinity",
        timeouts=pool.timeouts.model_copy(update=chosen),
    )


def _stand_ins(model: Model, documents: Documents, models: Mapping[str, Model]) -> list[Model]:
    """A model and what stands in for it: the same in the pools that its pool falls back to, then its own fallback, and
    so on. What fell back to itself would go round; it stands there once."""
    found: dict[tuple[str, str], Model] = {}
    turn: Model | None = model
    together = {"first_byte": model.timeouts.first_byte}  # all of them have the time that the first one has
    while turn is not None and (turn.name, turn.pool) not in found:
        found[turn.name, turn.pool] = replace(turn, timeouts=turn.timeouts.model_copy(update=together))
        pool, other = documents.pools[turn.pool].fallback, documents.models[turn.name].fallback
        if pool is not None and (turn.name, pool) not in found:
            turn = _in_pool(turn, pool, documents)
        else:
            turn = None if other is None else models[other]
    return list(found.values())

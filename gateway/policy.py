"""The language of policies/: YAML documents → checked models → one frozen Snapshot.

Documents are read whole or not at all. Every mistake is told at once, with file, line, path, what was found and what
was expected. A file may hold any of the sections, and a section may be spread over files, so that teams can be kept by
those who know them; a name that stands twice is a mistake.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import yaml
import yaml.constructor
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

Path_ = tuple[str | int, ...]


class PolicyError(Exception):
    """Documents that cannot be taken. `mistakes` is one line each: `file:line path: found, expected`."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(
            "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in m) for m in mistakes
        )
        super().__init__("\n".join(self.mistakes))


# — scalars: a number and its unit in one word

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_WINDOWS = ("hour", "day", "week", "month")


# What the store counts is exact up to 2**53; amounts are far below, in micro-dollars too.
_MOST, _MOST_USD = 10**12, 10**9


def _measure(units: Mapping[str, float], example: str, found: object) -> float:
    """A measure such as `120s` or `32MiB`, in the base unit."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]+)", found) if isinstance(found, str) else None
    if match is None or match[2] not in units:
        raise ValueError(
            f"{_show(found)} is no measure, expected a number with one of {_list(units)}, such as {example}"
        )
    return float(match[1]) * units[match[2]]


@dataclass(frozen=True, slots=True)
class Per:
    """An amount per period: `600/minute`."""

    amount: int
    period: str

    def __str__(self) -> str:
        return f"{self.amount}/{self.period}"


def _per(periods: Iterable[str], example: str, found: object) -> Per:
    match = re.fullmatch(r"([0-9][0-9_]*)\s*/\s*([a-z]+)", found) if isinstance(found, str) else None
    if match is None or match[2] not in periods:
        raise ValueError(f"{_show(found)} has no unit, expected an amount per {_list(periods)}, such as {example}")
    digits = match[1].replace("_", "")
    if len(digits) > 15 or not 1 <= int(digits) <= _MOST:
        raise ValueError(f"{_show(found)} is out of range, expected an amount from 1 to {_MOST}")
    return Per(int(digits), match[2])


def _show(found: object) -> str:
    """A value as the document has it, and not much of it."""
    match found:
        case None:
            return "nothing"
        case bool():
            return str(found).lower()
        case str():
            return f'"{found if len(found) <= 80 else found[:79] + "…"}"'
        case int():
            return str(found) if abs(found) < 10**30 else "a number of more than 30 digits"
        case dict():
            return "a mapping"
    return str(found).removesuffix(".0") if isinstance(found, float) else f"a {type(found).__name__}"


def _list(words: Iterable[object]) -> str:
    return ", ".join(map(str, words))


def _zone(found: str) -> str:
    try:
        ZoneInfo(found)
    except (ValueError, OSError, KeyError):
        raise ValueError(f"{_show(found)} is no time zone, expected a name such as Europe/Zurich") from None
    return found


def _matching(pattern: str, what: str, found: str) -> str:
    if re.fullmatch(pattern, found) is None:
        raise ValueError(f"{_show(found)} is {what}")
    return found


def _address(found: str) -> str:
    """An address that the wire can go to: what looks like an IP address is one, and a port is below 65536."""
    try:
        parts = urlsplit(found)
        host = parts.hostname or ""
        named = re.fullmatch(r"(?=.*[A-Za-z_-])[A-Za-z0-9._-]+", host) is not None
        right = (named or ip_address(host)) and parts.port != 0 and re.fullmatch(_URL, found)
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"{_show(found)} is no address, expected one such as http://10.0.0.7:8000, without /v1")
    return found


def _form(pattern: str, *examples: str) -> WithJsonSchema:
    """What an editor is told of a text."""
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$", **({"examples": examples} if examples else {})})


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_MODEL = r"[^\s|{}]{1,200}"
_URL = r"https?://[^/?#@\s]+(/[^?#\s]*)?"
_NUMBER = r"[0-9]{1,15}(\.[0-9]{1,15})?\s*"
_AMOUNT = r"[0-9][0-9_]*\s*/\s*"

Seconds = Annotated[
    float,
    BeforeValidator(partial(_measure, _DURATIONS, "120s")),
    _form(f"{_NUMBER}({'|'.join(_DURATIONS)})", "120s", "500ms", "1h"),
]
Bytes = Annotated[
    int,
    BeforeValidator(lambda found: int(_measure(_SIZES, "32MiB", found))),
    _form(f"{_NUMBER}({'|'.join(_SIZES)})", "32MiB"),
]
Rate = Annotated[
    Per,
    BeforeValidator(partial(_per, _PERIODS, "600/minute")),
    _form(f"{_AMOUNT}({'|'.join(_PERIODS)})", "600/minute"),
]
Quota = Annotated[
    Per,
    BeforeValidator(partial(_per, _WINDOWS, "50000000/month")),
    _form(f"{_AMOUNT}({'|'.join(_WINDOWS)})", "50000000/month"),
]
Zone = Annotated[str, AfterValidator(_zone), WithJsonSchema({"type": "string", "examples": ["UTC", "Europe/Zurich"]})]
# Names become parts of Valkey keys and of log lines: no separator, no brace, no blank.
Name = Annotated[
    str,
    AfterValidator(partial(_matching, _NAME, "no name, expected letters, digits, dot, dash or underscore, at most 64")),
    _form(_NAME),
]
ModelName = Annotated[
    str,
    AfterValidator(partial(_matching, _MODEL, "no model's name, expected at most 200 characters, no blank, no | { }")),
    _form(_MODEL),
]
Url = Annotated[str, AfterValidator(_address), _form(_URL, "http://10.0.0.7:8000")]
Dollars = Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)]

Count = Literal["requests", "input_tokens", "output_tokens", "total_tokens", "usd", "concurrent_requests"]
Scope = Literal["organisation", "team", "key", "user", "model"]
Effort = Literal["none", "low", "medium", "high", "integer", "boolean"]
History = Literal["disabled", "interleaved", "preserved"]


class _Document(BaseModel):
    """Closed, strict and frozen: an unknown member is a mistake, "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class GatewayPolicy(_Document):
    """What holds for every request."""

    strictness: Literal["strict", "lenient"] = Field(
        "strict",
        alias="schema",
        description="strict: a member that the contract does not know is refused; lenient: it passes",
    )
    max_body: Bytes = Field(32 * 1024**2, description="largest request body")
    reserve: Literal["max", "input"] = Field(
        "max",
        description="what token limits hold for the output until it is known: max: all that the request may produce; "
        "input: nothing, the limit may be overshot by what is in flight",
    )
    time_zone: Zone = Field("UTC", description="of calendar quotas; a limit may name its own")


class Price(_Document):
    """US dollars per million tokens."""

    input: Dollars = Field(0.0, description="of the prompt")
    cached_input: Dollars | None = Field(None, description="of what a backend had of it already; left out: as input")
    output: Dollars = Field(0.0, description="of the answer")


class ModelPolicy(_Document):
    """One public model name."""

    aliases: tuple[ModelName, ...] = Field((), strict=False, description="other names that callers may use")
    family: str | None = Field(None, description="rules of reasoning_effort and reasoning_history, see families.yaml")
    pool: str = Field(description="where requests for it go, see pools.yaml")
    upstream_model: str | None = Field(None, description="the name the backend knows it by; left out: the same")
    max_output_tokens: int = Field(8192, ge=1, le=10**7, description="the bound where a request names none")
    price: Price = Field(Price(), description="what usage costs, for limits in usd and for the ledger")


class FamilyPolicy(_Document):
    """What a model family accepts; a rule left out lets everything pass."""

    reasoning_effort: tuple[Effort, ...] | None = Field(
        None, strict=False, description="the words that it takes; integer: a cap in tokens; boolean: true and false"
    )
    reasoning_history: tuple[History, ...] | None = Field(None, strict=False, description="the words that it takes")


class Timeouts(_Document):
    """How long an upstream may take."""

    connect: Seconds = Field(2.0, gt=0, description="until it accepts a connection")
    first_byte: Seconds = Field(120.0, gt=0, description="from the request to the head of the answer")
    idle: Seconds = Field(60.0, gt=0, description="between two pieces of an answer")
    total: Seconds = Field(3600.0, gt=0, description="for the whole answer")


class UpstreamPolicy(_Document):
    """One backend."""

    url: Url = Field(description="its base, without /v1")
    key_env: str | None = Field(None, description="the environment variable that holds the credential it asks for")
    max_in_flight: int = Field(256, ge=1, description="requests at once")


class PoolPolicy(_Document):
    """Backends that can stand in for one another."""

    api: Literal["fireworks", "openai"] = Field(
        "fireworks", description="what these backends understand; it decides which aliases are rewritten"
    )
    timeouts: Timeouts = Field(Timeouts.model_construct(), description="how long an upstream may take")
    upstreams: tuple[UpstreamPolicy, ...] = Field(strict=False, min_length=1, description="the backends")


class LimitPolicy(_Document):
    """One limit: a `rate` (with its `burst`), a calendar `quota`, or seats (`at_most`)."""

    name: Name = Field(description="what callers are told when it binds; counts go by it")
    count: Count = Field(description="what is counted")
    rate: Rate | None = Field(None, description="so much per second, minute, hour or day, refilled steadily")
    burst: int | None = Field(None, ge=1, le=_MOST, description="how much of it may come at once; left out: all of it")
    quota: Quota | None = Field(None, description="so much per calendar hour, day, week or month")
    time_zone: Zone | None = Field(None, description="of a quota's calendar; left out: the gateway's")
    at_most: int | None = Field(None, ge=1, le=_MOST, description="so many at the same time")
    per: tuple[Scope, ...] = Field(
        strict=False, min_length=1, description="each combination of these has its own count"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in ("rate", "quota", "at_most") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"has {_list(kinds) or 'no amount'}, expected exactly one of rate, quota, at_most")
        if (self.count == "concurrent_requests") != (self.at_most is not None):
            raise ValueError(
                f"counts {self.count} with {kinds[0]}, expected at_most for concurrent_requests and only there"
            )
        if self.burst is not None and self.rate is None:
            raise ValueError("has a burst without a rate, expected one with rate only")
        if self.time_zone is not None and self.quota is None:
            raise ValueError("has a time_zone without a quota, expected one with quota only")
        if self.count == "usd" and max(p.amount for p in (self.rate, self.quota) if p is not None) > _MOST_USD:
            raise ValueError(f"counts more than {_MOST_USD} dollars, expected at most so many")
        return self


class PlanPolicy(_Document):
    """Limits that hold together."""

    limits: tuple[LimitPolicy, ...] = Field((), strict=False, description="a request takes all of them or none")


class TeamPolicy(_Document):
    """A team: who pays, and what it may do."""

    organisation: Name = Field(description="who pays; its counts live on one slot of a cluster")
    plan: str = Field(description="its limits, see plans.yaml")
    models: tuple[str, ...] = Field(("*",), strict=False, description="patterns of the models that it may use")


class Documents(_Document):
    """All sections of a policy directory."""

    gateway: GatewayPolicy = Field(GatewayPolicy.model_construct(), description="what holds for every request")
    models: dict[ModelName, ModelPolicy] = Field({}, description="the public model names")
    families: dict[Name, FamilyPolicy] = Field({}, description="what each model family accepts")
    pools: dict[Name, PoolPolicy] = Field({}, description="where requests go")
    plans: dict[Name, PlanPolicy] = Field({}, description="limits, by plan")
    teams: dict[Name, TeamPolicy] = Field({}, description="who calls")


# — what decisions read


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """One limit as admission knows it. Equal to itself alone, as a Team is.

    `capacity` is in units of `count` (dollars are micro-dollars): a rate's burst, a quota's amount, the seats.
    `period` is the time in microseconds in which a rate refills `amount`; 0 for the other kinds.
    """

    name: str
    kind: Literal["rate", "quota", "seats"]
    count: Count
    amount: int
    capacity: int
    period: int
    window: str
    zone: ZoneInfo | None
    per: tuple[Scope, ...]

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return "micro-dollars" if self.count == "usd" else self.count.replace("_", " ")

    @classmethod
    def of(cls, policy: LimitPolicy, zone: str) -> Limit:
        scale = 1_000_000 if policy.count == "usd" else 1
        if policy.rate is not None:
            amount = policy.rate.amount * scale
            burst = amount if policy.burst is None else policy.burst * scale
            window = policy.rate.period
            return cls(
                policy.name, "rate", policy.count, amount, burst, _PERIODS[window] * 1_000_000, window, None, policy.per
            )
        if policy.quota is not None:
            amount, window = policy.quota.amount * scale, policy.quota.period
            own = ZoneInfo(policy.time_zone or zone)
            return cls(policy.name, "quota", policy.count, amount, amount, 0, window, own, policy.per)
        seats = policy.at_most or 0  # the third kind, as the document's check has seen to
        return cls(policy.name, "seats", policy.count, seats, seats, 0, "", None, policy.per)


def windows_around(window: str, zone: ZoneInfo, at: datetime) -> tuple[datetime, datetime, datetime, datetime]:
    """The starts of the calendar window before `at`, of its own, and of the next two, as instants in UTC.

    Three windows, because the store's clock decides, and it may be on the other side of a boundary.
    """
    start = _floor(window, at.astimezone(zone).replace(tzinfo=None, fold=0))
    # A local hour that comes twice is one window; a start that clocks leap over falls together with the next one.
    starts = sorted({_step(window, start, by).replace(tzinfo=zone).astimezone(UTC) for by in range(-2, 5)})
    place = bisect_right(starts, at)
    before, own, after, last = starts[place - 2 : place + 2]
    return before, own, after, last


def _floor(window: str, at: datetime) -> datetime:
    at = at.replace(minute=0, second=0, microsecond=0)
    if window == "hour":
        return at
    at = at.replace(hour=0)
    if window == "week":
        return at - timedelta(days=at.weekday())
    return at.replace(day=1) if window == "month" else at


def _step(window: str, start: datetime, by: int) -> datetime:
    if window == "month":
        months = start.year * 12 + start.month - 1 + by
        return start.replace(year=months // 12, month=months % 12 + 1)
    return start + by * {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}[window]


@dataclass(frozen=True, slots=True)
class Family:
    """The rules of one model family; None lets everything pass."""

    name: str
    reasoning_effort: frozenset[Effort] | None
    reasoning_history: frozenset[History] | None


@dataclass(frozen=True, slots=True)
class Model:
    """One model as requests know it. Prices are in micro-dollars per million tokens."""

    name: str
    family: Family | None
    pool: str
    api: Literal["fireworks", "openai"]
    upstream_name: str
    max_output_tokens: int
    input_price: int
    cached_input_price: int
    output_price: int


@dataclass(frozen=True, slots=True, eq=False)
class Team:
    """One team with its limits. Equal to itself alone, so that what is computed of it is found again quickly."""

    name: str
    organisation: str
    plan: str
    models: tuple[str, ...]
    limits: tuple[Limit, ...]

    def may_use(self, model: str) -> bool:
        return matches(self.models, model)


def matches(patterns: Iterable[str], model: str) -> bool:
    """Whether one of the patterns (`*`, `accounts/acme/models/*`, a whole name) names the model."""
    return any(pattern == "*" or fnmatchcase(model, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Snapshot:
    """All policies of one instant, compiled. `models` answers to every name and alias."""

    revision: str
    gateway: GatewayPolicy
    models: Mapping[str, Model]
    pools: Mapping[str, PoolPolicy]
    teams: Mapping[str, Team]

    @cached_property
    def public_models(self) -> tuple[Model, ...]:
        """Every model once, in the order of the documents."""
        return tuple({model.name: model for model in self.models.values()}.values())

    @cached_property
    def strict(self) -> bool:
        return self.gateway.strictness == "strict"


# — from files to a Snapshot


def load(directory: Path) -> Snapshot:
    """The snapshot of a directory's `*.yaml` and `*.yml` files. Raises PolicyError with every mistake found."""
    source = _Source(directory)
    try:
        documents = Documents.model_validate(source.data)
    except ValidationError as found:
        raise PolicyError(
            source.mistake(_path(error["loc"]), _explain(error))
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
    "float_type": "{kind}, expected a number",
    "finite_number": "{kind}, expected a finite one",
    "tuple_type": "{kind}, expected a list",
    "dict_type": "{kind}, expected names, each with its members",
    "model_type": "{kind}, expected members: {known}",
    "too_short": "holds nothing, expected at least {min_length} item",
    "greater_than": "{found} is too small, expected more than {gt}",
    "greater_than_equal": "{found} is too small, expected at least {ge}",
    "less_than_equal": "{found} is too large, expected at most {le}",
}


def _explain(error: Any) -> str:
    found, context = error["input"], error.get("ctx", {})
    path = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    words = {name: str(value).removesuffix(".0").replace("'", "") for name, value in context.items() if name != "error"}
    words["expected"] = words.get("expected", "").replace(" or ", ", ")
    words["error"] = str(context.get("error", ""))
    template = _FINDINGS.get(error["type"], "{found}: {msg}")
    return template.format(**words, found=_show(found), kind=_kind(found), known=_list(_known(path)), msg=error["msg"])


def _kind(found: object) -> str:
    """What sort of value stands where another is expected."""
    match found:
        case None:
            return "is empty"
        case bool():
            return f"{_show(found)} is a boolean"
        case str():
            return f"{_show(found)} is a string"
        case int() | float():
            return f"{_show(found)} is a number"
    return f"is {_show(found)}"


def _path(location: Path_) -> Path_:
    """The place of a finding; one about a name is where the name stands."""
    return location[:-1] if location[-1] == "[key]" else location


def _known(path: Path_) -> list[str]:
    """The members that the language has at a path."""
    node = schema = _schema()
    for step in path:
        named = next(iter(node.get("patternProperties", {}).values()), None)
        node = node.get("properties", {}).get(step) or named or node.get("items") or {}
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return list(node.get("properties", ()))


@cache
def _schema() -> dict[str, Any]:
    return Documents.model_json_schema()


def _dangling(documents: Documents) -> Iterator[tuple[Path_, str]]:
    """Names that stand for nothing, and names that stand for two things."""
    yield from _dangling_in_models(documents)
    yield from _doubled_in_plans(documents)
    yield from _dangling_in_teams(documents)


def _dangling_in_models(documents: Documents) -> Iterator[tuple[Path_, str]]:
    names: dict[str, str] = dict.fromkeys(documents.models, "a model")
    for name, model in documents.models.items():
        if model.pool not in documents.pools:
            yield ("models", name, "pool"), _unknown(model.pool, documents.pools)
        if model.family is not None and model.family not in documents.families:
            yield ("models", name, "family"), _unknown(model.family, documents.families)
        for i, alias in enumerate(model.aliases):
            if alias in names:
                yield ("models", name, "aliases", i), f'"{alias}" is already {names[alias]}, expected a name of its own'
            names[alias] = f"an alias of {name}"


def _doubled_in_plans(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, plan in documents.plans.items():
        seen: set[str] = set()
        for i, limit in enumerate(plan.limits):
            if limit.name in seen:
                text = f'"{limit.name}" stands twice in this plan, expected a name of its own'
                yield ("plans", name, "limits", i, "name"), text
            seen.add(limit.name)


def _dangling_in_teams(documents: Documents) -> Iterator[tuple[Path_, str]]:
    for name, team in documents.teams.items():
        if team.plan not in documents.plans:
            yield ("teams", name, "plan"), _unknown(team.plan, documents.plans)
        for i, pattern in enumerate(team.models):
            if pattern != "*" and not any(matches((pattern,), model) for model in documents.models):
                yield ("teams", name, "models", i), _unknown(pattern, documents.models)


def _unknown(found: str, known: Iterable[str]) -> str:
    return f"{_show(found)} is not defined, expected one of {_list(known) or '(none is defined)'}"


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
        name: tuple(Limit.of(limit, documents.gateway.time_zone) for limit in plan.limits)
        for name, plan in documents.plans.items()
    }
    models: dict[str, Model] = {}
    for name, policy in documents.models.items():
        price = policy.price
        cached = price.input if price.cached_input is None else price.cached_input
        model = Model(
            name=name,
            family=None if policy.family is None else families[policy.family],
            pool=policy.pool,
            api=documents.pools[policy.pool].api,
            upstream_name=policy.upstream_model or name,
            max_output_tokens=policy.max_output_tokens,
            input_price=round(price.input * 1_000_000),
            cached_input_price=round(cached * 1_000_000),
            output_price=round(price.output * 1_000_000),
        )
        models.update(dict.fromkeys((name, *policy.aliases), model))
    teams = {
        name: Team(name, policy.organisation, policy.plan, policy.models, plans[policy.plan])
        for name, policy in documents.teams.items()
    }
    return Snapshot(revision, documents.gateway, models, documents.pools, teams)


class _Source:
    """The files of a directory as one tree of plain values, and the place of every path in it."""

    # An alias of YAML is written out at each place; beyond these it is no document that people keep.
    _DEEPEST, _MOST_VALUES = 20, 300_000

    def __init__(self, directory: Path) -> None:
        self._places: dict[Path_, str] = {}
        self._mistakes: list[str] = []
        self._values = 0
        self._constructor = yaml.constructor.SafeConstructor()
        self.data: dict[str, Any] = {}
        files = sorted(p for p in directory.glob("[!.]*.y*ml") if p.suffix in (".yaml", ".yml"))
        if not files:
            raise PolicyError([f"{directory}: holds no .yaml file, expected policy documents"])
        digest = hashlib.sha256()
        for file in files:
            try:
                text = file.read_bytes()
            except OSError as error:
                self._mistakes.append(f"{file.name}: cannot be read ({error.strerror}), expected a policy document")
                continue
            digest.update(text)
            self._read(file.name, text)
        self.revision = digest.hexdigest()[:12]
        if self._mistakes:
            raise PolicyError(self._mistakes)

    def mistake(self, path: Path_, text: str) -> str:
        """One line that names file, line and path; an absent member is shown where its parent stands."""
        known = path
        while known and known not in self._places:
            known = known[:-1]
        return f"{self._places.get(known, 'policies')} {_dotted(path)}: {text}"

    def _read(self, file: str, text: bytes) -> None:
        try:
            root = yaml.compose(text, Loader=yaml.CSafeLoader)
        except yaml.YAMLError as broken:
            mark = getattr(broken, "problem_mark", None)
            where = f"{file}:{mark.line + 1}" if mark else file
            told = [word for word in (getattr(broken, "context", None), getattr(broken, "problem", None)) if word]
            self._mistakes.append(f"{where}: is no YAML: {', '.join(told) or str(broken).partition(chr(10))[0]}")
            return
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            self._mistakes.append(f"{file}:1: has no sections, expected some of {_list(Documents.model_fields)}")
            return
        before = dict(self._places)
        for section, value in self._members(file, root, ()):
            held = self.data.setdefault(section, value)
            if held is value:
                continue
            if not (isinstance(held, dict) and isinstance(value, dict)) or section == "gateway":
                self._doubled((section,), before)
                continue
            for name in held.keys() & value.keys():
                self._doubled((section, name), before)
            held.update(value)

    def _doubled(self, path: Path_, before: Mapping[Path_, str]) -> None:
        self._mistakes.append(
            self.mistake(path, f"is already defined at {before.get(path, 'another place')}, expected once")
        )

    def _members(self, file: str, node: yaml.MappingNode, path: Path_) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key_node, value_node in node.value:
            place = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._mistakes.append(
                    f"{place} {_dotted(path)}: a list or a mapping stands for a name, expected a word"
                )
                continue
            key = str(key_node.value)
            own = (*path, key)
            if key in seen:
                self._mistakes.append(f"{place} {_dotted(own)}: stands twice, expected once")
            seen.add(key)
            self._places[own] = place
            yield key, self._value(file, value_node, own)

    def _value(self, file: str, node: yaml.Node, path: Path_) -> Any:
        place = f"{file}:{node.start_mark.line + 1}"
        self._places.setdefault(path, place)
        self._values += 1
        if len(path) > self._DEEPEST or self._values > self._MOST_VALUES:
            much = f"at most {self._DEEPEST} levels and {self._MOST_VALUES} values"
            raise PolicyError([f"{place}: the documents are too deep or too large, expected {much}"])
        match node:
            case yaml.MappingNode():
                return dict(self._members(file, node, path))
            case yaml.SequenceNode():
                return [self._value(file, item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            return self._constructor.construct_object(node)
        except (ValueError, LookupError, AttributeError, yaml.YAMLError):  # all that it says of a wrong 0b_ or !!bool
            self._mistakes.append(f"{place} {_dotted(path)}: {_show(node.value)} is no {node.tag.rpartition(':')[2]}")
            return None


def _dotted(path: Path_) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")

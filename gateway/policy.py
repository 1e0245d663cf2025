"""The language of policies/: YAML documents → checked models → one frozen Snapshot.

Documents are read whole or not at all. Every mistake is told at once, with file, line, path, what was found and what
was expected. A file may hold any of the sections, and a section may be spread over files, so that teams can be kept by
those who know them; a name that stands twice is a mistake.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import yaml
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
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


# — scalars: a number and its unit in one word

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_WINDOWS = ("hour", "day", "week", "month")


def _measure(units: Mapping[str, float], example: str, found: object) -> float:
    """A measure such as `120s` or `32MiB`, in the base unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", found) if isinstance(found, str) else None
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


def _per(periods: Iterable[str], example: str, found: object) -> Per:
    match = re.fullmatch(r"(\d[\d_]*)\s*/\s*([a-z]+)", found) if isinstance(found, str) else None
    if match is None or match[2] not in periods:
        raise ValueError(f"{_show(found)} has no unit, expected an amount per {_list(periods)}, such as {example}")
    amount = int(match[1].replace("_", ""))
    if not 1 <= amount <= 10**12:
        raise ValueError(f"{_show(found)} is out of range, expected an amount from 1 to 1000000000000")
    return Per(amount, match[2])


def _show(found: object) -> str:
    return f'"{found}"' if isinstance(found, str | int | float) else f"{type(found).__name__}"


def _list(words: Iterable[object]) -> str:
    return ", ".join(map(str, words))


def _zone(found: str) -> str:
    try:
        ZoneInfo(found)
    except (ValueError, OSError, KeyError):
        raise ValueError(f'"{found}" is no time zone, expected a name such as Europe/Zurich') from None
    return found


def _text(pattern: str, description: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "description": description})


Seconds = Annotated[
    float,
    BeforeValidator(partial(_measure, _DURATIONS, "120s")),
    _text(r"^\d+(\.\d+)?(ms|s|m|h|d)$", "120s, 500ms, 1h"),
]
Bytes = Annotated[
    int,
    BeforeValidator(lambda found: int(_measure(_SIZES, "32MiB", found))),
    _text(r"^\d+(\.\d+)?(B|KiB|MiB|GiB)$", "32MiB"),
]
Rate = Annotated[
    Per,
    BeforeValidator(partial(_per, _PERIODS, "600/minute")),
    _text(r"^\d[\d_]*/(second|minute|hour|day)$", "600/minute"),
]
Quota = Annotated[
    Per,
    BeforeValidator(partial(_per, _WINDOWS, "50000000/month")),
    _text(r"^\d[\d_]*/(hour|day|week|month)$", "50000000/month"),
]
Zone = Annotated[str, AfterValidator(_zone)]
# Names become parts of Valkey keys and of log lines: no separator, no brace, no blank.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

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

    input: float = Field(0.0, ge=0)
    cached_input: float | None = Field(None, ge=0, description="left out: as input")
    output: float = Field(0.0, ge=0)


class ModelPolicy(_Document):
    """One public model name."""

    aliases: tuple[str, ...] = Field((), strict=False, description="other names that callers may use")
    family: str | None = Field(None, description="rules of reasoning_effort and reasoning_history, see families.yaml")
    pool: str = Field(description="where requests for it go, see pools.yaml")
    upstream_model: str | None = Field(None, description="the name the backend knows it by; left out: the same")
    max_output_tokens: int = Field(8192, ge=1, le=10**7, description="the bound where a request names none")
    price: Price = Price()


class FamilyPolicy(_Document):
    """What a model family accepts; a rule left out lets everything pass."""

    reasoning_effort: tuple[Effort, ...] | None = Field(None, strict=False)
    reasoning_history: tuple[History, ...] | None = Field(None, strict=False)


class Timeouts(_Document):
    """How long an upstream may take."""

    connect: Seconds = Field(2.0, gt=0, description="until it accepts a connection")
    first_byte: Seconds = Field(120.0, gt=0, description="from the request to the head of the answer")
    idle: Seconds = Field(60.0, gt=0, description="between two pieces of an answer")
    total: Seconds = Field(3600.0, gt=0, description="for the whole answer")


class UpstreamPolicy(_Document):
    """One backend."""

    url: str = Field(pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$", description="its base, without /v1")
    key_env: str | None = Field(None, description="the environment variable that holds the credential it asks for")
    max_in_flight: int = Field(256, ge=1, description="requests at once")


class PoolPolicy(_Document):
    """Backends that can stand in for one another."""

    api: Literal["fireworks", "openai"] = Field(
        "fireworks", description="what these backends understand; it decides which aliases are rewritten"
    )
    timeouts: Timeouts = Timeouts.model_construct()
    upstreams: tuple[UpstreamPolicy, ...] = Field(strict=False, min_length=1)


class LimitPolicy(_Document):
    """One limit: a `rate` (with its `burst`), a calendar `quota`, or seats (`at_most`)."""

    name: Name
    count: Count = Field(description="what is counted")
    rate: Rate | None = Field(None, description="so much per second, minute, hour or day, refilled steadily")
    burst: int | None = Field(None, ge=1, description="how much of it may come at once; left out: all of it")
    quota: Quota | None = Field(None, description="so much per calendar hour, day, week or month")
    time_zone: Zone | None = Field(None, description="of a quota's calendar; left out: the gateway's")
    at_most: int | None = Field(None, ge=1, description="so many at the same time")
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
            raise ValueError("has a burst without a rate")
        return self


class PlanPolicy(_Document):
    """Limits that hold together."""

    limits: tuple[LimitPolicy, ...] = Field((), strict=False)


class TeamPolicy(_Document):
    """A team: who pays, and what it may do."""

    organisation: Name
    plan: str
    models: tuple[str, ...] = Field(("*",), strict=False, description="patterns of the models that it may use")


class Documents(_Document):
    """All sections of a policy directory."""

    gateway: GatewayPolicy = GatewayPolicy.model_construct()
    models: dict[str, ModelPolicy] = {}
    families: dict[Name, FamilyPolicy] = {}
    pools: dict[Name, PoolPolicy] = {}
    plans: dict[Name, PlanPolicy] = {}
    teams: dict[Name, TeamPolicy] = {}


# — what decisions read


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit as admission knows it.

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
    start = _floor(window, at.astimezone(zone).replace(tzinfo=None))
    starts = (_step(window, start, -1), start, _step(window, start, 1), _step(window, start, 2))
    before, own, after, last = (naive.replace(tzinfo=zone).astimezone(UTC) for naive in starts)
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


@dataclass(frozen=True, slots=True)
class Team:
    """One team with its limits."""

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
            source.mistake(error["loc"], _explain(error)) for error in found.errors(include_url=False)
        ) from None
    mistakes = [source.mistake(path, text) for path, text in _dangling(documents)]
    if mistakes:
        raise PolicyError(mistakes)
    return _compile(documents, source.revision)


def _explain(error: Any) -> str:
    """pydantic's finding in our words: what was found, what was expected."""
    found = _show(error["input"])
    match error["type"]:
        case "extra_forbidden":
            return "is unknown"
        case "missing":
            return "is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "literal_error":
            return f"{found} is unknown, expected one of {error['ctx']['expected']}"
        case _:
            return f"{found}: {error['msg']}"


def _dangling(documents: Documents) -> Iterator[tuple[Path_, str]]:
    """Names that stand for nothing, and names that stand for two things."""
    names: dict[str, str] = dict.fromkeys(documents.models, "a model")
    for name, model in documents.models.items():
        if model.pool not in documents.pools:
            yield ("models", name, "pool"), _unknown(model.pool, documents.pools)
        if model.family is not None and model.family not in documents.families:
            yield ("models", name, "family"), _unknown(model.family, documents.families)
        for i, alias in enumerate(model.aliases):
            if alias in names:
                yield ("models", name, "aliases", i), f'"{alias}" is already {names[alias]}'
            names[alias] = f"an alias of {name}"
    for name, plan in documents.plans.items():
        seen: set[str] = set()
        for i, limit in enumerate(plan.limits):
            if limit.name in seen:
                yield ("plans", name, "limits", i, "name"), f'"{limit.name}" stands twice in this plan'
            seen.add(limit.name)
    for name, team in documents.teams.items():
        if team.plan not in documents.plans:
            yield ("teams", name, "plan"), _unknown(team.plan, documents.plans)
        for i, pattern in enumerate(team.models):
            if not any(fnmatchcase(model, pattern) for model in documents.models):
                yield ("teams", name, "models", i), _unknown(pattern, documents.models)


def _unknown(found: str, known: Iterable[str]) -> str:
    return f'"{found}" is not defined, expected one of {_list(known) or "(none is defined)"}'


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

    def __init__(self, directory: Path) -> None:
        self._places: dict[Path_, str] = {}
        self._mistakes: list[str] = []
        self.data: dict[str, Any] = {}
        files = sorted(p for p in directory.glob("*.y*ml") if p.suffix in (".yaml", ".yml"))
        if not files:
            raise PolicyError([f"{directory}: holds no .yaml file, expected policy documents"])
        digest = hashlib.sha256()
        for file in files:
            text = file.read_bytes()
            digest.update(text)
            self._read(file, text)
        self.revision = digest.hexdigest()[:12]
        if self._mistakes:
            raise PolicyError(self._mistakes)

    def mistake(self, path: Path_, text: str) -> str:
        """One line that names file, line and path; an absent member is shown where its parent stands."""
        known = path
        while known and known not in self._places:
            known = known[:-1]
        shown = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        return f"{self._places.get(known, 'policies')} {shown}: {text}"

    def _read(self, file: Path, text: bytes) -> None:
        try:
            root = yaml.compose(text, Loader=yaml.CSafeLoader)
        except yaml.YAMLError as broken:
            mark = getattr(broken, "problem_mark", None)
            where = f"{file.name}:{mark.line + 1}" if mark else file.name
            self._mistakes.append(f"{where} is no YAML: {getattr(broken, 'problem', None) or broken}")
            return
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            self._mistakes.append(f"{file.name}:1: expected sections such as models: or teams:")
            return
        for section, value in self._members(file, root, ()):
            held = self.data.setdefault(section, value)
            if held is value:
                continue
            if not (isinstance(held, dict) and isinstance(value, dict)) or section == "gateway":
                self._mistakes.append(self.mistake((section,), "stands in two files"))
                continue
            for name in held.keys() & value.keys():
                self._mistakes.append(self.mistake((section, name), "is defined twice"))
            held.update(value)

    def _members(self, file: Path, node: yaml.MappingNode, path: Path_) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            own = (*path, key)
            place = f"{file.name}:{key_node.start_mark.line + 1}"
            if key in seen:
                shown = ".".join(map(str, own))
                self._mistakes.append(f"{place} {shown}: stands twice, and only one can hold")
            seen.add(key)
            self._places[own] = place
            yield key, self._value(file, value_node, own)

    def _value(self, file: Path, node: yaml.Node, path: Path_) -> Any:
        self._places.setdefault(path, f"{file.name}:{node.start_mark.line + 1}")
        match node:
            case yaml.MappingNode():
                return dict(self._members(file, node, path))
            case yaml.SequenceNode():
                return [self._value(file, item, (*path, i)) for i, item in enumerate(node.value)]
        return yaml.SafeLoader("").construct_object(node)

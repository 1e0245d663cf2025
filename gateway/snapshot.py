"""All policies of one instant, compiled and frozen: what decisions read.

The documents that it is made of are read and checked in policy.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal
from zoneinfo import ZoneInfo

from gateway.endpoints import Endpoint
from gateway.language import (
    MODEL_NAME,
    PERIODS,
    Api,
    Count,
    Effort,
    Export,
    GatewayPolicy,
    History,
    Kind,
    LimitPolicy,
    PoolPolicy,
    Reserve,
    Scope,
    StoreFails,
    Timeouts,
)
from gateway.records import Price


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """One limit as admission knows it. Equal to itself alone, as a Team is.

    `capacity` is in units of `count` (dollars are micro-dollars): a rate's burst, a quota's amount, the seats.
    `period` is in microseconds: of a rate the time in which it refills `amount`, of a rolling quota the stretch that it
    is for; 0 for the other kinds. `soft` and `warn_at` are shares of the capacity.
    """

    name: str
    kind: Kind
    count: Count
    amount: int
    capacity: int
    period: int
    window: str
    zone: ZoneInfo | None
    per: tuple[Scope, ...]
    models: tuple[str, ...] = ("*",)
    reserve: Reserve = "max"
    when_store_fails: StoreFails = "local"
    shadow: bool = False
    soft: float | None = None
    warn_at: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return "micro-dollars" if self.count == "usd" else self.count.replace("_", " ")

    @property
    def holds(self) -> bool:
        """Whether what it takes is a reservation: more than is known before the answer."""
        return self.count not in ("requests", "concurrent_requests")

    @property
    def returns(self) -> bool:
        """Whether what it takes may come back when the request has ended: what is reserved, and seats."""
        return self.count != "requests"

    def amount_at(self, share: float) -> int:
        """The least amount that is so large a share of the capacity: of 0.95 of 500 it is 475."""
        thousandths = round(share * 100_000)  # of a percent, as exactly as shares are written
        return max(1, -(-thousandths * self.capacity // 100_000))

    @classmethod
    def of(cls, policy: LimitPolicy, gateway: GatewayPolicy) -> Limit:
        scale = 1_000_000 if policy.count == "usd" else 1
        seats = policy.at_most or 0  # for the kinds that follow it is no matter
        limit = cls(
            policy.name,
            policy.kind,
            policy.count,
            seats,
            seats,
            period=0,
            window="",
            zone=None,
            per=policy.per,
            models=policy.models,
            reserve=policy.reserve or gateway.reserve,
            when_store_fails=policy.when_store_fails or gateway.when_store_fails,
            shadow=policy.mode == "shadow",
            soft=policy.soft,
            warn_at=policy.warn_at,
        )
        if policy.rate is not None:
            amount, window = policy.rate.amount * scale, policy.rate.period
            burst = amount if policy.burst is None else policy.burst * scale
            period = PERIODS[window] * 1_000_000
            return replace(limit, amount=amount, capacity=burst, period=period, window=window)
        if policy.quota is not None:
            amount, window = policy.quota.amount * scale, policy.quota.period
            limit = replace(limit, amount=amount, capacity=amount, window=window)
            if policy.rolling:
                return replace(limit, kind="rolling", period=STRETCHES[window] * 1_000_000)
            return replace(limit, zone=ZoneInfo(policy.time_zone or gateway.time_zone))
        return limit


# What a rolling quota is for, in seconds; and how long calendar windows are: of months the mean, which is enough to say
# how many of them have passed.
STRETCHES = {"minute": 60, "hour": 3600, "day": 86_400, "week": 604_800, "month": 30 * 86_400}
NOMINAL = {**STRETCHES, "month": 2_629_746}


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


_FREE = Price()


@dataclass(frozen=True, slots=True)
class Model:
    """One model as requests know it."""

    name: str  # where the policies name it with a star, the name that was asked
    entry: str  # what the policies call it: its limits are counted by that
    family: Family | None
    pool: str
    api: Api
    upstream_name: str
    max_output_tokens: int
    prices: tuple[tuple[float, Price], ...] = ()  # each from an instant on, in seconds since 1970, ascending
    strict: bool = True
    profile: str = "2026"
    context_window: int | None = None
    restore_name: bool = False
    usage: Literal["native", "inject", "continuous"] = "native"
    affinity: bool = False  # whether its pool sends like to like
    timeouts: Timeouts = Timeouts.model_construct()
    fallbacks: tuple[Model, ...] = ()  # in whose places the same request may be answered, in this order

    def price_at(self, seconds: float) -> Price:
        """The price of a request that came then, in seconds since 1970; before the first price it costs nothing."""
        return next((price for since, price in reversed(self.prices) if since <= seconds), _FREE)

    def fits(self, name: str) -> bool:
        """Whether the star of its entry may stand for what makes this name of it."""
        before, star, after = self.entry.partition("*")
        return bool(star) and len(name) > len(before + after) and name.startswith(before) and name.endswith(after)

    def called(self, name: str) -> Model:
        """The model of this name, of an entry with a star that the name fits."""
        before, _, after = self.entry.partition("*")
        stands_for = name[len(before) : len(name) - len(after)]
        upstream = self.upstream_name.replace("*", stands_for)
        fallbacks = tuple(m.called(name) if m.entry == self.entry else m for m in self.fallbacks)
        return replace(self, name=name, upstream_name=upstream, fallbacks=fallbacks)


@dataclass(frozen=True, slots=True)
class Route:
    """A path that passes. To limits, prices and permissions it is a model, by the name of its path."""

    endpoint: Endpoint
    model: Model
    methods: frozenset[str]


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
    patterns: tuple[Model, ...]  # entries with a star, the more exact ones first: the longest beginning, then end
    routes: Mapping[str, Route]
    pools: Mapping[str, PoolPolicy]
    teams: Mapping[str, Team]
    exports: Mapping[str, Export]

    @cached_property
    def public_models(self) -> tuple[Model, ...]:
        """Every model that has a name of its own once, in the order of the documents."""
        return tuple({model.name: model for model in self.models.values()}.values())

    def model(self, name: str) -> Model | None:
        """The model that answers to a name: its own, an alias, or one that fits a star."""
        found = self.models.get(name)
        if found is not None or not self.patterns or MODEL_NAME.fullmatch(name) is None:
            return found
        entry = next((model for model in self.patterns if model.fits(name)), None)
        return None if entry is None else entry.called(name)

    def route(self, path: str) -> Route | None:
        """The route of a path: its own, or the longest one with a star at its end."""
        found = self.routes.get(path)
        while found is None and path:
            path = path.rpartition("/")[0]
            found = self.routes.get(f"{path}/*")
        return found

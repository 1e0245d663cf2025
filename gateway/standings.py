"""Where a caller stands: its limits after a decision, as headers and, when it is refused, in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import msgspec

from gateway.errors import Dialect, GatewayError, QuotaExhausted, RateLimited
from gateway.snapshot import Limit
from gateway.terms import Charge

# What a caller without a seat is told: how long other requests take is not known, one second is a polite guess.
_SEAT_WAIT = 1.0


class Standing(msgspec.Struct, frozen=True):
    """One limit after a decision. `reset` is in seconds: until it is full again, or until its window ends."""

    charge: Charge
    remaining: int
    reset: float
    window: int


def refusal(standings: tuple[Standing, ...], bound: Standing, wait: float, dialect: Dialect = "openai") -> GatewayError:
    """What a caller is told whom the limit of `bound` refuses; `wait` is in seconds, for a rate."""
    limit, scope = bound.charge.limit, bound.charge.scope
    headers = standing_headers(standings, bound, dialect)
    policies = (limit.name,)
    used = max(0, limit.capacity - bound.remaining)
    if limit.kind == "seats":
        text = (
            f"{scope} has {used} of {limit.capacity} concurrent requests open (limit {limit.name}); "
            "one more fits when one of them ends"
        )
        return RateLimited(text, retry_after=_SEAT_WAIT, headers=headers, policies=policies)
    shown = f"{used} of {limit.capacity} {limit.unit} used, {bound.charge.amount} asked for"
    if limit.kind == "quota":
        text = (
            f"{scope} has exhausted its quota {limit.name} of this {limit.window}: {shown}; "
            f"it starts anew in {_go_duration(bound.reset)}"
        )
        return QuotaExhausted(text, headers=headers, policies=policies)
    text = (
        f"{scope} is over its rate {limit.name} ({limit.amount} {limit.unit} per {limit.window}): {shown}; "
        f"try again in {_go_duration(wait)}"
    )
    return RateLimited(text, retry_after=wait, headers=headers, policies=policies)


def standing_headers(
    standings: tuple[Standing, ...],
    binding: Standing | None = None,
    dialect: Dialect = "openai",
    now: float | None = None,
) -> list[tuple[bytes, bytes]]:
    """What a caller is told of its limits: the binding one, or of each sort the one with the least left.

    `now` is the Unix time, the clock's where it is not given."""
    headers: list[tuple[bytes, bytes]] = []
    if standings and now is None:
        now = time.time()
    for sort in _SORTS[dialect]:
        shown = binding
        if shown is None or shown.charge.limit.count not in sort.counts:
            some = [s for s in standings if s.charge.limit.count in sort.counts]
            if not some:
                continue
            shown = min(some, key=_left)
        headers += (
            (sort.limit, b"%d" % shown.charge.limit.capacity),
            (sort.remaining, b"%d" % shown.remaining),
            (sort.reset, sort.write(shown.reset, now or 0.0).encode()),
        )
    if standings:
        policy = ", ".join([_policy(s.charge.limit) for s in standings])
        stands = ", ".join([_ratelimit(s) for s in standings])
        headers += ((b"ratelimit-policy", policy.encode()), (b"ratelimit", stands.encode()))
    return headers


def _left(standing: Standing) -> float:
    return standing.remaining / standing.charge.limit.capacity


_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_MOST = 10**15 - 1  # RFC 9651 section 3.3.1: what an integer of a header can be


@lru_cache(maxsize=4096)
def _policy(limit: Limit) -> str:
    """One item of RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers): quota, window in seconds, unit."""
    window = f";w={_SECONDS[limit.window]}" if limit.window in _SECONDS else ""
    unit = "" if limit.count == "requests" else f';qu="{limit.count.replace("_", "-")}"'
    return f'"{limit.name}";q={min(limit.amount, _MOST)}{window}{unit}'


def _ratelimit(standing: Standing) -> str:
    reset = "" if standing.charge.limit.kind == "seats" else f";t={-int(-standing.reset // 1)}"
    return f'"{standing.charge.limit.name}";r={min(standing.remaining, _MOST)}{reset}'


def _go_duration(seconds: float) -> str:
    """Seconds as OpenAI writes them, in Go's form: 12ms, 1.5s, 6m0s, 1h0m0s."""
    ms = -(-round(seconds * 1e6) // 1000)  # up: who waits so long has waited long enough
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    text = f"{rest / 1000:g}s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


_LAST_SECOND = 253_402_300_799  # of the year 9999, after which RFC 3339 has no times


def _timestamp(seconds: float, now: float) -> str:
    """The time in so many seconds as Anthropic writes it, in RFC 3339's form, in UTC; rounded up."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(ceil(now + seconds), _LAST_SECOND)))


class _Sort(NamedTuple):
    """Headers of one sort: which counts they speak of, their names, and how the reset is written."""

    counts: frozenset[str]
    limit: bytes
    remaining: bytes
    reset: bytes
    write: Callable[[float, float], str]


def _openai(of: str, *counts: str) -> _Sort:
    limit, remaining, reset = (f"x-ratelimit-{what}-{of}".encode() for what in ("limit", "remaining", "reset"))
    return _Sort(frozenset(counts), limit, remaining, reset, lambda seconds, now: _go_duration(seconds))


def _anthropic(of: str, *counts: str) -> _Sort:
    limit, remaining, reset = (f"anthropic-ratelimit-{of}-{what}".encode() for what in ("limit", "remaining", "reset"))
    return _Sort(frozenset(counts), limit, remaining, reset, _timestamp)


_TOKENS = ("input_tokens", "output_tokens", "total_tokens")
_SORTS: dict[Dialect, tuple[_Sort, ...]] = {
    "openai": (_openai("requests", "requests"), _openai("tokens", *_TOKENS)),
    "anthropic": (
        _anthropic("requests", "requests"),
        _anthropic("tokens", *_TOKENS),
        _anthropic("input-tokens", "input_tokens"),
        _anthropic("output-tokens", "output_tokens"),
    ),
}

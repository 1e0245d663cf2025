"""Where a caller stands: its limits after a decision, as headers and, when it is refused, in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import msgspec

from gateway.errors import Dialect, GatewayError, QuotaExhausted, RateLimited
from gateway.snapshot import Limit
from gateway.terms import Charge

# Seconds that a caller is told where nobody knows when it is worth asking again, as without a seat.
POLITE = 1.0


class Standing(msgspec.Struct, frozen=True):
    """One limit after a decision.

    `reset` is in seconds: until it is full again, or until its window ends. `held` is how much of what is taken is
    reserved by requests under way, in units of the limit. `over` says that a limit in shadow would have refused.
    """

    charge: Charge
    remaining: int
    reset: float
    window: int
    held: int = 0
    over: bool = False


def standings_of(charges: Sequence[Charge], rows: Sequence[int]) -> tuple[Standing, ...]:
    """What admit.lua says of each limit: remaining, reset µs, window, held, flags."""
    resets, over = [reset / 1e6 for reset in rows[1::5]], [flags & 1 == 1 for flags in rows[4::5]]
    return tuple(map(Standing, charges, rows[0::5], resets, rows[2::5], rows[3::5], over))


# The answer was decided without the store: each worker enforces its share, or nothing is enforced.
DEGRADED = (b"x-gateway-limits", b"degraded")


def refusal(
    standings: tuple[Standing, ...],
    bound: Standing,
    wait: float,
    dialect: Dialect = "openai",
    *,
    held_back: bool = False,
) -> GatewayError:
    """What a caller is told whom the limit of `bound` refuses.

    `wait` is in seconds: what Retry-After says of a rate, and of a quota when it has room again. `held_back` says that
    of a quota only what requests under way have reserved is in the way: then waiting helps, as it does with a rate, and
    with the quota of a minute.
    """
    limit = bound.charge.limit
    headers = standing_headers(standings, bound, dialect)
    policies = (limit.name,)
    if limit.kind in ("quota", "rolling") and limit.window != "minute" and not held_back:
        return QuotaExhausted(_exhausted(bound, wait), headers=headers, policies=policies)
    if limit.kind == "seats":
        return RateLimited(_seatless(bound), retry_after=wait or POLITE, headers=headers, policies=policies)
    text = f"{bound.charge.scope} {_over(limit)}: {_taken(bound)}; try again in {_go_duration(wait)}"
    return RateLimited(text, retry_after=wait, headers=headers, policies=policies)


def _seatless(bound: Standing) -> str:
    limit = bound.charge.limit
    return (
        f"{bound.charge.scope} has {_used(bound)} of {limit.capacity} concurrent requests open (limit {limit.name}); "
        "one more fits when one of them ends"
    )


def _exhausted(bound: Standing, wait: float) -> str:
    limit = bound.charge.limit
    # A window that begins with the debt of the one before it may have no room yet.
    anew = limit.kind == "quota" and wait <= bound.reset
    when = f"it starts anew in {_go_duration(bound.reset)}" if anew else f"it has room again in {_go_duration(wait)}"
    return f"{bound.charge.scope} has exhausted its quota {limit.name} of {_span(limit)}: {_taken(bound)}; {when}"


def _over(limit: Limit) -> str:
    if limit.kind == "rate":
        return f"is over its rate {limit.name} ({limit.amount} {limit.unit} per {limit.window})"
    return f"has no room now in its quota {limit.name} of {_span(limit)}"


_SPANS = {"minute": "60 seconds", "hour": "60 minutes", "day": "24 hours", "week": "7 days", "month": "30 days"}


def _span(limit: Limit) -> str:
    """The time that a quota is for, in words."""
    return f"the last {_SPANS[limit.window]}" if limit.kind == "rolling" else f"this {limit.window}"


def _taken(bound: Standing) -> str:
    limit, held = bound.charge.limit, _held(bound)
    reserved = f"{held} of them reserved by requests under way, " if held else ""
    return f"{_used(bound)} of {limit.capacity} {limit.unit} used, {reserved}{bound.charge.amount} asked for"


def _used(standing: Standing) -> int:
    """What is taken of a limit, reservations among it; what is beyond the limit is not told."""
    return max(0, standing.charge.limit.capacity - standing.remaining)


def _held(standing: Standing) -> int:
    """Of what is taken, what is reserved by requests under way: a rate refills while they last."""
    return min(standing.held, _used(standing))


# — headers


def standing_headers(
    standings: tuple[Standing, ...],
    binding: Standing | None = None,
    dialect: Dialect = "openai",
    now: float | None = None,
) -> list[tuple[bytes, bytes]]:
    """What a caller is told of its limits: the binding one, or of each sort the one with the least left.

    Limits in shadow are not told. `now` is the Unix time, the clock's where it is not given."""
    told = _told(tuple([s.charge.limit for s in standings]))
    if not told.places:
        return []
    if now is None:
        now = time.time()
    headers: list[tuple[bytes, bytes]] = []
    for sort, places in told.sorts[dialect]:
        if binding is not None and binding.charge.limit.count in sort.counts:
            one = binding
        elif len(places) == 1:
            one = standings[places[0]]
        else:
            one = min([standings[place] for place in places], key=_left)
        headers.append((sort.limit, b"%d" % one.charge.limit.capacity))
        headers.append((sort.remaining, b"%d" % one.remaining))
        if sort.reset:
            headers.append((sort.reset, sort.write(one.reset, now).encode()))
    if told.soft:
        over = any(standings[place].remaining <= enough for place, enough in told.soft)
        headers.append((b"x-ratelimit-over-limit", b"yes" if over else b"no"))
    headers.append((b"ratelimit-policy", told.policy))
    stands = [_ratelimit(standings[place], name, timed) for place, name, timed in told.places]
    headers.append((b"ratelimit", ", ".join(stands).encode()))
    return headers


def _left(standing: Standing) -> float:
    return standing.remaining / standing.charge.limit.capacity


class _Told(NamedTuple):
    """What headers say of some limits whatever is left of them. A place is one of a limit among them."""

    places: tuple[tuple[int, str, bool], ...]  # of those that are told: the beginning of the item, whether it resets
    sorts: Mapping[Dialect, tuple[tuple[_Sort, tuple[int, ...]], ...]]
    soft: tuple[tuple[int, int], ...]  # from how little left on it is over its soft limit
    policy: bytes


@lru_cache(maxsize=4096)
def _told(limits: tuple[Limit, ...]) -> _Told:
    enforced = [(place, limit) for place, limit in enumerate(limits) if not limit.shadow]
    sorts = {
        dialect: tuple(
            (sort, places)
            for sort in some
            if (places := tuple(place for place, limit in enforced if limit.count in sort.counts))
        )
        for dialect, some in _SORTS.items()
    }
    return _Told(
        tuple((place, f'"{limit.name}";r=', limit.kind != "seats") for place, limit in enforced),
        sorts,
        tuple((place, limit.capacity - limit.amount_at(limit.soft)) for place, limit in enforced if limit.soft),
        ", ".join(_policy(limit) for _, limit in enforced).encode(),
    )


_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_MOST = 10**15 - 1  # RFC 9651 section 3.3.1: what an integer of a header can be


def _policy(limit: Limit) -> str:
    """One item of RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers): quota, window in seconds, unit."""
    seconds = limit.period // 1_000_000 if limit.kind == "rolling" else _SECONDS.get(limit.window)
    window = "" if seconds is None else f";w={seconds}"  # months differ
    unit = "" if limit.count == "requests" else f';qu="{limit.count.replace("_", "-")}"'
    return f'"{limit.name}";q={min(limit.amount, _MOST)}{window}{unit}'


def _ratelimit(standing: Standing, name: str, timed: bool) -> str:
    left = min(standing.remaining, _MOST)
    return f"{name}{left};t={-int(-standing.reset // 1)}" if timed else f"{name}{left}"


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
    return rfc3339(min(ceil(now + seconds), _LAST_SECOND))


@lru_cache(maxsize=1024)  # many stand at the same time
def rfc3339(at: int) -> str:
    """A time in seconds since 1970, as the internet writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


class _Sort(NamedTuple):
    """Headers of one sort: which counts they speak of, their names, and how the reset is written."""

    counts: frozenset[str]
    limit: bytes
    remaining: bytes
    reset: bytes | None
    write: Callable[[float, float], str]


def _openai(of: str, *counts: str) -> _Sort:
    limit, remaining, reset = (f"x-ratelimit-{what}-{of}".encode() for what in ("limit", "remaining", "reset"))
    return _Sort(frozenset(counts), limit, remaining, reset, lambda seconds, now: _go_duration(seconds))


def _fireworks(of: str, *counts: str) -> _Sort:
    limit, remaining = (f"x-ratelimit-{what}-{of}".encode() for what in ("limit", "remaining"))
    return _Sort(frozenset(counts), limit, remaining, None, lambda seconds, now: "")


def _anthropic(of: str, *counts: str) -> _Sort:
    limit, remaining, reset = (f"anthropic-ratelimit-{of}-{what}".encode() for what in ("limit", "remaining", "reset"))
    return _Sort(frozenset(counts), limit, remaining, reset, _timestamp)


# Of the prompt Anthropic counts what its cache did not have.
_INPUT = ("input_tokens", "uncached_input_tokens")
_TOKENS = (*_INPUT, "output_tokens", "total_tokens")
_SORTS: dict[Dialect, tuple[_Sort, ...]] = {
    "openai": (
        _openai("requests", "requests"),
        _openai("tokens", *_TOKENS),
        _fireworks("tokens-prompt", "input_tokens"),
        _fireworks("tokens-cache-adjusted-prompt", "uncached_input_tokens"),
        _fireworks("tokens-generated", "output_tokens"),
    ),
    "anthropic": (
        _anthropic("requests", "requests"),
        _anthropic("tokens", *_TOKENS),
        _anthropic("input-tokens", *_INPUT),
        _anthropic("output-tokens", "output_tokens"),
    ),
}


# — the whole of it, for people


_LATE = 0.25  # seconds from what the store has said to now, at most: a window that ends at noon ends at noon


def shown(standing: Standing, now: float | None = None) -> dict[str, object]:
    """One limit as `GET /v1/limits` and `gateway limits` show it, ready for JSON.

    `limit` is what is there at most: a rate's burst, a quota's amount, the seats. It is `used` (for good, or as long as
    the window lasts), `reserved` by requests under way, or `remaining`: the three add up to it. Their unit is `unit`;
    of dollars, which are counted in micro-dollars, `usd` says the same in dollars. `reset_s` and `resets_at` (RFC 3339)
    tell when a rate is full again, and when a window ends; seats have neither. `now` is the Unix time.
    """
    limit = standing.charge.limit
    now = time.time() if now is None else now
    timed = limit.kind != "seats"
    late = 0.0 if limit.zone is None else _LATE
    amounts = {
        "limit": limit.capacity,
        "used": _used(standing) - _held(standing),
        "reserved": _held(standing),
        "remaining": standing.remaining,
    }
    return {
        "name": limit.name,
        "scope": standing.charge.scope,
        "models": limit.models,
        "kind": limit.kind,
        "policy": _worded(limit),
        "mode": "shadow" if limit.shadow else "enforce",
        "count": limit.count,
        "unit": limit.unit,
        **amounts,
        **({"usd": {what: amount / 1e6 for what, amount in amounts.items()}} if limit.count == "usd" else {}),
        **({"over_soft_limit": _used(standing) >= limit.amount_at(limit.soft)} if limit.soft else {}),
        "reset_s": ceil(standing.reset * 1000) / 1000 if timed else None,
        "resets_at": _timestamp(standing.reset - late, now) if timed else None,
        **({} if limit.zone is None else {"time_zone": limit.zone.key}),
    }


def _worded(limit: Limit) -> str:
    """What a limit allows, as the policies have it: 600/minute, 500/month, 500/month rolling, 64 at once."""
    if limit.kind == "seats":
        return f"{limit.amount} at once"
    amount = limit.amount // 1_000_000 if limit.count == "usd" else limit.amount
    return f"{amount}/{limit.window}{' rolling' if limit.kind == 'rolling' else ''}"

"""Where a caller stands: its limits after a decision, as headers and, when it is refused, in words."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from gateway.errors import GatewayError, QuotaExhausted, RateLimited
from gateway.policy import Limit
from gateway.terms import Charge

# What a caller without a seat is told: how long other requests take is not known, one second is a polite guess.
_SEAT_WAIT = 1.0


class Standing(msgspec.Struct, frozen=True):
    """One limit after a decision. `reset` is in seconds: until it is full again, or until its window ends."""

    charge: Charge
    remaining: int
    reset: float
    window: int


def refusal(standings: tuple[Standing, ...], bound: Standing, wait: float) -> GatewayError:
    """What a caller is told whom the limit of `bound` refuses; `wait` is in seconds, for a rate."""
    limit, scope = bound.charge.limit, bound.charge.scope
    headers = standing_headers(standings, binding=bound)
    used = max(0, limit.capacity - bound.remaining)
    if limit.kind == "seats":
        text = (
            f"{scope} has {used} of {limit.capacity} concurrent requests open (limit {limit.name}); "
            "one more fits when one of them ends"
        )
        return RateLimited(text, retry_after=_SEAT_WAIT, headers=headers)
    shown = f"{used} of {limit.capacity} {limit.unit} used, {bound.charge.amount} asked for"
    if limit.kind == "quota":
        text = (
            f"{scope} has exhausted its quota {limit.name} of this {limit.window}: {shown}; "
            f"it starts anew in {_go_duration(bound.reset)}"
        )
        return QuotaExhausted(text, headers=headers)
    text = (
        f"{scope} is over its rate {limit.name} ({limit.amount} {limit.unit} per {limit.window}): {shown}; "
        f"try again in {_go_duration(wait)}"
    )
    return RateLimited(text, retry_after=wait, headers=headers)


def standing_headers(standings: tuple[Standing, ...], binding: Standing | None = None) -> list[tuple[bytes, bytes]]:
    """What a caller is told of its limits: the binding one, or of each sort the one with the least left."""
    headers: list[tuple[bytes, bytes]] = []
    for counts, limit, remaining, reset in _SORTS:
        shown = binding
        if shown is None or shown.charge.limit.count not in counts:
            some = [s for s in standings if s.charge.limit.count in counts]
            if not some:
                continue
            shown = min(some, key=_left)
        headers += (
            (limit, b"%d" % shown.charge.limit.capacity),
            (remaining, b"%d" % shown.remaining),
            (reset, _go_duration(shown.reset).encode()),
        )
    if standings:
        policy = ", ".join([_policy(s.charge.limit) for s in standings])
        now = ", ".join([_ratelimit(s) for s in standings])
        headers += ((b"ratelimit-policy", policy.encode()), (b"ratelimit", now.encode()))
    return headers


# Which counts OpenAI's headers speak of, and the names of the headers.
_SORTS = (
    (
        frozenset(("requests",)),
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
    ),
    (
        frozenset(("input_tokens", "output_tokens", "total_tokens")),
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
    ),
)


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

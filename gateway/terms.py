"""What this principal may do with this request: the pool, and every limit that binds with what it will cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import msgspec

from gateway.errors import BadRequest, Forbidden
from gateway.identity import Principal, anonymous
from gateway.language import Count, Scope
from gateway.normalize import InferenceRequest
from gateway.snapshot import Limit, Snapshot, Team, matches
from gateway.usage import Usage


class Charge(msgspec.Struct, frozen=True):
    """One limit of a request: the key of its count in the store, the scope in words, and what is reserved of it."""

    limit: Limit
    key: str
    scope: str
    amount: int


class Terms(msgspec.Struct, frozen=True):
    """What is allowed. Holding one means: allowed."""

    organisation: str
    team: str
    key_id: str
    user: str | None
    pool: str
    charges: tuple[Charge, ...]


# A user is called as the caller calls him, but nobody writes a book into the ledger.
_LONGEST_NAME = 64

# What one request counts, by the name of the count. Before the answer: an upper bound. After it: what was used.
_ESTIMATES: dict[Count, Callable[[InferenceRequest, int], int]] = {
    "requests": lambda request, output: 1,
    "concurrent_requests": lambda request, output: 1,
    "input_tokens": lambda request, output: request.input_estimate,
    "output_tokens": lambda request, output: output,
    "total_tokens": lambda request, output: request.input_estimate + output,
    "usd": lambda request, output: Usage(request.input_estimate, output).cost(request.model),
}
_USED: dict[Count, Callable[[Usage, InferenceRequest], int]] = {
    "requests": lambda usage, request: 0 if usage.source == "none" else 1,
    "concurrent_requests": lambda usage, request: 0,
    "input_tokens": lambda usage, request: usage.input,
    "output_tokens": lambda usage, request: usage.output,
    "total_tokens": lambda usage, request: usage.total,
    "usd": lambda usage, request: usage.cost(request.model),
}


def used(count: Count, usage: Usage, request: InferenceRequest) -> int:
    """What an answered request used of a count; a request that got no answer used nothing."""
    return _USED[count](usage, request)


def may_use(principal: Principal, team: Team, model: str) -> bool:
    """Whether both the team and the key allow a model."""
    return team.may_use(model) and (not principal.models or matches(principal.models, model))


def terms_for(principal: Principal, request: InferenceRequest, snapshot: Snapshot) -> Terms:
    """The terms of a request. Raises Forbidden (403), and BadRequest for one that no limit could ever hold."""
    model = request.model.name
    team = snapshot.teams.get(principal.team)
    if team is None:
        raise Forbidden("the team of this key is not in the policies any more")
    if not may_use(principal, team, model):
        whose = "team" if not team.may_use(model) else "key"
        what = request.asked_model if request.asked_model.startswith("/") else f"the model {request.asked_model}"
        raise Forbidden(f"this {whose} may not use {what}", param="model")
    output = request.output_bound if snapshot.gateway.reserve == "max" else 0
    user = request.user if request.user is not None else principal.user
    if user is not None and len(user) > _LONGEST_NAME:
        user = anonymous(user)
    charges = []
    for limit, key, scope in _counts(team, principal.key_id, user, request.model.entry):
        amount = _ESTIMATES[limit.count](request, output)
        if amount > limit.capacity:
            raise _never(limit, amount, request)
        charges.append(Charge(limit, key, scope, amount))
    return Terms(team.organisation, team.name, principal.key_id, user, request.model.pool, tuple(charges))


@lru_cache(maxsize=4096)
def _counts(team: Team, key_id: str, user: str | None, model: str) -> tuple[tuple[Limit, str, str], ...]:
    """The limits of a team with the keys of their counts, and whose they are in words."""
    scopes: dict[Scope, str] = {
        "organisation": team.organisation,
        "team": team.name,
        "key": key_id,
        "user": anonymous(user or ""),
        "model": model,
    }
    # The braces are a hash tag: all counts of an organisation live on one slot of a cluster, for one script.
    return tuple(
        (
            limit,
            f"{{{team.organisation}}}:{limit.kind}:{limit.name}:{'|'.join(scopes[scope] for scope in limit.per)}",
            f"{limit.per[0]} {scopes[limit.per[0]]}",
        )
        for limit in team.limits
    )


def _never(limit: Limit, amount: int, request: InferenceRequest) -> BadRequest:
    endpoint = request.endpoint
    bounded = endpoint.output is not None and limit.count != "input_tokens"
    remedy = f" Lower {endpoint.output} (bound: {request.output_bound}) or n." if bounded else ""
    return BadRequest(
        f"the request may take {amount} {limit.unit}, "
        f"the limit {limit.name} never holds more than {limit.capacity}.{remedy}",
        code="request_exceeds_limit",
        param=endpoint.output if bounded else endpoint.input,
    )

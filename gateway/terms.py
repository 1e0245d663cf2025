"""What this principal may do with this request: the pool, and every limit that binds with what it reserves.

What is reserved of a limit of tokens or dollars is for its `reserve` to say. max: all that the request can take, so
that no window ever holds more than its limit. expected: the input by estimate, and of each answer the tokens that 95 of
100 have at most. input: the input by estimate, and nothing for the answer. What is used beyond it is debt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import msgspec

from gateway.errors import BadRequest, Forbidden
from gateway.identity import Principal, anonymous
from gateway.language import Count, Reserve, Scope
from gateway.learned import Learned
from gateway.normalize import InferenceRequest
from gateway.snapshot import Limit, Model, Snapshot, Team, matches
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
    input_estimate: int = 0  # tokens, by what was learned of the model where they were not counted
    bounded: bool = False  # whether a limit relies on the bound of the output, so that the backend must be told of it
    closed: bool = False  # whether nothing is served while the store is away


# A user is called as the caller calls him, but nobody writes a book into the ledger.
_LONGEST_NAME = 64

# What is used of a count, by its name.
_USED: dict[Count, Callable[[Usage, Model], int]] = {
    "requests": lambda usage, model: 0 if usage.source == "none" else 1,
    "concurrent_requests": lambda usage, model: 0,
    "input_tokens": lambda usage, model: usage.input,
    "uncached_input_tokens": lambda usage, model: usage.input - usage.cached,
    "output_tokens": lambda usage, model: usage.output,
    "total_tokens": lambda usage, model: usage.total,
    "usd": lambda usage, model: usage.cost(model),
}


def used(count: Count, usage: Usage, request: InferenceRequest) -> int:
    """What an answered request used of a count; a request that got no answer used nothing."""
    return _USED[count](usage, request.model)


def may_use(principal: Principal, team: Team, model: str) -> bool:
    """Whether both the team and the key allow a model."""
    return team.may_use(model) and (not principal.models or matches(principal.models, model))


def terms_for(principal: Principal, request: InferenceRequest, snapshot: Snapshot, learned: Learned) -> Terms:
    """The terms of a request. Raises Forbidden (403), and BadRequest for one that a limit could never hold.

    That is, in mode max, one that can take more than the limit's capacity; in the others one whose counted tokens alone
    are more. What is more by estimate only may be less: it takes all of the capacity, so that it waits for nothing that
    never comes.
    """
    model = request.model
    team = snapshot.teams.get(principal.team)
    if team is None:
        raise Forbidden("the team of this key is not in the policies any more")
    if not may_use(principal, team, model.name):
        whose = "team" if not team.may_use(model.name) else "key"
        what = request.asked_model if request.asked_model.startswith("/") else f"the model {request.asked_model}"
        raise Forbidden(f"this {whose} may not use {what}", param="model")
    user = _called(principal, request.user)
    estimate = request.input.at(learned.bytes_per_token(model.name))
    foreseen: dict[Reserve, Usage] = {}
    binding = _binding(team, principal.key_id, user, model.name, model.entry)
    charges = []
    for limit, key, scope in binding.counts:
        usage = foreseen.get(limit.reserve)
        if usage is None:
            usage = foreseen[limit.reserve] = _FORESEEN[limit.reserve](request, estimate, team.name, learned)
        amount = _RESERVED[limit.count](usage, model)
        if amount > limit.capacity:
            amount = _all_of(limit, amount, request)
        charges.append(Charge(limit, key, scope, amount))
    bounded = binding.rely_on_tokens or (binding.rely_on_dollars and model.output_price > 0)
    return Terms(
        organisation=team.organisation,
        team=team.name,
        key_id=principal.key_id,
        user=user,
        pool=model.pool,
        charges=tuple(charges),
        input_estimate=estimate,
        bounded=bounded,
        closed=binding.closed if charges else snapshot.gateway.when_store_fails == "closed",
    )


def _called(principal: Principal, user: str | None) -> str | None:
    """Whom a request is for: the user whom it names, else the one whom its key stands for."""
    user = principal.user if user is None else user
    return user if user is None or len(user) <= _LONGEST_NAME else anonymous(user)


def looked_at(principal: Principal, team: Team, model: Model, user: str | None = None) -> Iterator[Charge]:
    """The limits that bind a key's requests to a model, with nothing to be taken of them. `user` is whom the requests
    name, else whom the key stands for."""
    for limit, key, scope in _binding(team, principal.key_id, _called(principal, user), model.name, model.entry).counts:
        yield Charge(limit, key, scope, 0)


# What a request will use, as far as limits of each mode foresee it.
_FORESEEN: dict[Reserve, Callable[[InferenceRequest, int, str, Learned], Usage]] = {
    "max": lambda request, estimate, team, learned: Usage(request.input.bound, request.output_bound),
    "expected": lambda request, estimate, team, learned: Usage(estimate, _expected(request, team, learned)),
    "input": lambda request, estimate, team, learned: Usage(estimate, 0),
}
# What is reserved of a count for that. Whether its input will be cached is not known: the dearer price holds.
_RESERVED: dict[Count, Callable[[Usage, Model], int]] = {
    **_USED,
    "concurrent_requests": lambda usage, model: 1,
    "usd": lambda usage, model: _dearer(usage, model).cost(model),
}


def _dearer(usage: Usage, model: Model) -> Usage:
    dear = model.cached_input_price > model.input_price
    return Usage(usage.input, usage.output, usage.input) if dear else usage


def _expected(request: InferenceRequest, team: str, learned: Learned) -> int:
    """The output that is expected, over all answers."""
    one = learned.expected_output(team, request.model.name)
    return request.output_bound if one is None else min(one * request.answers, request.output_bound)


def _all_of(limit: Limit, amount: int, request: InferenceRequest) -> int:
    """What a request reserves that may take more than all of a limit. Raises BadRequest where it surely would."""
    counted = request.input.tokens or 0
    least = min(_USED[limit.count](Usage(counted, 0, cached), request.model) for cached in (0, counted))
    if limit.reserve != "max" and least <= limit.capacity:
        return limit.capacity
    if limit.shadow:
        return amount
    raise _never(limit, amount, request)


class _Binding(NamedTuple):
    """The limits that bind, with the keys of their counts and whose they are in words; and whether any of them is kept
    only if no answer is longer than what was reserved for it: of those in tokens, and of those in dollars; and whether
    any lets nothing pass while the store is away."""

    counts: tuple[tuple[Limit, str, str], ...]
    rely_on_tokens: bool
    rely_on_dollars: bool
    closed: bool


@lru_cache(maxsize=4096)
def _binding(team: Team, key_id: str, user: str | None, model: str, entry: str) -> _Binding:
    """The limits of a team that are for a model."""
    scopes: dict[Scope, str] = {
        "organisation": team.organisation,
        "team": team.name,
        "key": key_id,
        "user": anonymous(user or ""),
        "model": entry,
    }
    limits = [limit for limit in team.limits if matches(limit.models, model) or matches(limit.models, entry)]
    relying = {limit.count for limit in limits if limit.reserve == "max" and not limit.shadow}
    # The first letter of each scope: a team may be named as its organisation.
    # The braces are a hash tag: all counts of an organisation live on one slot of a cluster, for one script.
    whose = {scope: scope[0] + name for scope, name in scopes.items()}
    counts = tuple(
        (
            limit,
            f"{{{team.organisation}}}:{limit.kind}:{limit.name}:{'|'.join(whose[scope] for scope in limit.per)}",
            " with ".join(f"{scope} {scopes[scope]}" for scope in limit.per),
        )
        for limit in limits
    )
    closed = any(limit.when_store_fails == "closed" and not limit.shadow for limit in limits)
    return _Binding(counts, not relying.isdisjoint(("output_tokens", "total_tokens")), "usd" in relying, closed)


def _never(limit: Limit, amount: int, request: InferenceRequest) -> BadRequest:
    endpoint, size = request.endpoint, request.input
    input_bound = size.bound if limit.reserve == "max" else size.tokens or 0
    too_long = _RESERVED[limit.count](Usage(input_bound, 0), request.model) > limit.capacity
    if not too_long:
        remedy = f" Lower {endpoint.output} (bound: {request.output_bound}) or n."
    elif size.tokens is None:
        remedy = (
            f" Text is reserved as its bytes ({size.size}): send a shorter {endpoint.input}, "
            f"or set `reserve: expected` for the limit."
        )
    else:
        remedy = f" Send a shorter {endpoint.input}."
    return BadRequest(
        f"the request may take {amount} {limit.unit}, "
        f"the limit {limit.name} never holds more than {limit.capacity}.{remedy}",
        code="request_exceeds_limit",
        param=endpoint.input if too_long else endpoint.output,
    )

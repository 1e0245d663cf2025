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
from gateway.identity import Principal
from gateway.language import Count, Reserve, Scope, StoreFails
from gateway.learned import Learned
from gateway.normalize import InferenceRequest
from gateway.records import Price
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
    user: str | None  # as it is stored
    pool: str
    charges: tuple[Charge, ...]
    input_estimate: int = 0  # tokens, by what was learned of the model where they were not counted
    bounded: bool = False  # whether a limit relies on the bound of the output, so that the backend must be told of it
    closed: bool = False  # whether nothing is served while the store is away
    billed: bool = True  # whether nothing is served whose usage cannot be written down
    price: Price = Price()  # of the moment it came: by this it is reserved, settled and written down


# What stands for a user in the store, of an organisation, a name, and whether the policies have it plain.
Users = Callable[[str, str, bool], str]

# What is used of a count, by its name.
_USED: dict[Count, Callable[[Usage, Price], int]] = {
    "requests": lambda usage, price: int(usage.answered),
    "concurrent_requests": lambda usage, price: 0,
    "input_tokens": lambda usage, price: usage.input,
    "uncached_input_tokens": lambda usage, price: usage.input - usage.cached,
    "output_tokens": lambda usage, price: usage.output,
    "total_tokens": lambda usage, price: usage.total,
    "usd": lambda usage, price: usage.cost(price),
}


def used(count: Count, usage: Usage, price: Price) -> int:
    """What an answered request used of a count; a request that got no answer used nothing."""
    return _USED[count](usage, price)


def may_use(principal: Principal, team: Team, model: str) -> bool:
    """Whether both the team and the key allow a model."""
    return team.may_use(model) and (not principal.models or matches(principal.models, model))


def terms_for(
    principal: Principal, request: InferenceRequest, snapshot: Snapshot, learned: Learned, users: Users, at: float
) -> Terms:
    """The terms of a request that came at this time, in seconds since 1970. Raises Forbidden (403), and BadRequest for
    one that a limit could never hold.

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
    user = whom(principal, request.user, team, snapshot, users)
    price = model.price_at(at)
    estimate = request.input.at(learned.bytes_per_token(model.name))
    foreseen: dict[Reserve, Usage] = {}
    binding = _binding(team, principal.key_id, user, model.name, model.entry)
    charges = []
    for limit, key, scope in binding.counts:
        usage = foreseen.get(limit.reserve)
        if usage is None:
            usage = foreseen[limit.reserve] = _FORESEEN[limit.reserve](request, estimate, team.name, learned)
        amount = _RESERVED[limit.count](usage, price)
        if amount > limit.capacity:
            amount = _all_of(limit, amount, request, price)
        charges.append(Charge(limit, key, scope, amount))
    bounded = binding.rely_on_tokens or (binding.rely_on_dollars and max(price.output, price.reasoning) > 0)
    fails = binding.fails if charges else {snapshot.gateway.when_store_fails}
    return Terms(
        organisation=team.organisation,
        team=team.name,
        key_id=principal.key_id,
        user=user,
        pool=model.pool,
        charges=tuple(charges),
        input_estimate=estimate,
        bounded=bounded,
        closed="closed" in fails,
        billed=fails != {"open"},
        price=price,
    )


def whom(principal: Principal, named: str | None, team: Team, snapshot: Snapshot, users: Users) -> str | None:
    """Whom a request is for, as it is stored: the user whom it names, else the one whom its key stands for."""
    name = principal.user if named is None else named
    return None if name is None else users(team.organisation, name, snapshot.gateway.users == "plain")


def looked_at(principal: Principal, team: Team, model: Model, user: str | None) -> Iterator[Charge]:
    """The limits that bind a key's requests for a user (see `whom`) to a model, with nothing to be taken of them."""
    for limit, key, scope in _binding(team, principal.key_id, user, model.name, model.entry).counts:
        yield Charge(limit, key, scope, 0)


# What a request will use, as far as limits of each mode foresee it.
_FORESEEN: dict[Reserve, Callable[[InferenceRequest, int, str, Learned], Usage]] = {
    "max": lambda request, estimate, team, learned: Usage(request.input.bound, request.output_bound),
    "expected": lambda request, estimate, team, learned: Usage(estimate, _expected(request, team, learned)),
    "input": lambda request, estimate, team, learned: Usage(estimate, 0),
}
# What is reserved of a count for that. How much will be cached, and how much reasoning, is not known: the dearer price
# holds for all of it.
_RESERVED: dict[Count, Callable[[Usage, Price], int]] = {
    **_USED,
    "concurrent_requests": lambda usage, price: 1,
    "usd": lambda usage, price: _dearest(usage, price).cost(price),
}


def _dearest(usage: Usage, price: Price) -> Usage:
    cached = usage.input if price.cached_input > price.input else 0
    reasoning = usage.output if price.reasoning > price.output else 0
    return Usage(usage.input, usage.output, cached, reasoning)


def _expected(request: InferenceRequest, team: str, learned: Learned) -> int:
    """The output that is expected, over all answers."""
    one = learned.expected_output(team, request.model.name)
    return request.output_bound if one is None else min(one * request.answers, request.output_bound)


def _all_of(limit: Limit, amount: int, request: InferenceRequest, price: Price) -> int:
    """What a request reserves that may take more than all of a limit. Raises BadRequest where it surely would."""
    counted = request.input.tokens or 0
    least = min(_USED[limit.count](Usage(counted, 0, cached), price) for cached in (0, counted))
    if limit.reserve != "max" and least <= limit.capacity:
        return limit.capacity
    if limit.shadow:
        return amount
    raise _never(limit, amount, request, price)


class _Binding(NamedTuple):
    """The limits that bind, with the keys of their counts and whose they are in words; and whether any of them is kept
    only if no answer is longer than what was reserved for it: of those in tokens, and of those in dollars; and what
    they say of a store that is away."""

    counts: tuple[tuple[Limit, str, str], ...]
    rely_on_tokens: bool
    rely_on_dollars: bool
    fails: frozenset[StoreFails]


@lru_cache(maxsize=4096)
def _binding(team: Team, key_id: str, user: str | None, model: str, entry: str) -> _Binding:
    """The limits of a team that are for a model."""
    scopes: dict[Scope, str] = {
        "organisation": team.organisation,
        "team": team.name,
        "key": key_id,
        "user": user or "",
        "model": entry,
    }
    limits = [limit for limit in team.limits if matches(limit.models, model) or matches(limit.models, entry)]
    relying = {limit.count for limit in limits if limit.reserve == "max" and not limit.shadow}
    # The first letter of each scope: a team may be named as its organisation. Of all names only a plain user's may have
    # a stroke in it, and it is one at most: what is left of a key without the others' parts is his.
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
    fails = {limit.when_store_fails for limit in limits if not limit.shadow}
    rely_on_tokens = not relying.isdisjoint(("output_tokens", "total_tokens"))
    return _Binding(counts, rely_on_tokens, "usd" in relying, frozenset(fails))


def _never(limit: Limit, amount: int, request: InferenceRequest, price: Price) -> BadRequest:
    endpoint, size = request.endpoint, request.input
    input_bound = size.bound if limit.reserve == "max" else size.tokens or 0
    too_long = _RESERVED[limit.count](Usage(input_bound, 0), price) > limit.capacity
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

"""Where a caller stands: every limit that binds him, for himself and for the operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.counts import taken
from gateway.ends import live_key, reservation_key
from gateway.errors import Forbidden
from gateway.identity import Principal
from gateway.snapshot import Model, Snapshot
from gateway.standings import Standing, shown, standings_of
from gateway.store import Coalesced, Script, Store
from gateway.terms import Charge, Users, looked_at, may_use, whom

_AT_ONCE = 50  # counts that are asked for in one script: others wait for it


def team_itself(team: str) -> Principal:
    """A team as a caller without a key: limits per key, and per user where none is named, do not bind it."""
    return Principal(key_id="", team=team, user=None, models=())


class Looks:
    """The script of admissions, asked what would be. No admission waits in one trip with these."""

    def __init__(self, store: Store) -> None:
        self._look = Coalesced(store, Script("admit"), (0, 0))

    async def __call__(self, organisation: str, charges: Sequence[Charge]) -> tuple[Standing, ...]:
        """Where these counts stand; nothing is taken. Raises StoreUnavailable."""
        keys = [reservation_key(organisation, ""), live_key(organisation), *(charge.key for charge in charges)]
        _, _, _, _, *rows = await self._look((keys, ("", "", [taken(charge) for charge in charges])))
        return standings_of(charges, rows)


async def limits_of(
    looks: Looks,
    snapshot: Snapshot,
    principal: Principal,
    models: Iterable[Model],
    users: Users,
    user: str | None = None,
) -> list[dict[str, object]]:
    """Each limit that binds requests of a key to these models, those of a model for each of them, as `shown` has it.

    `user` is whom the requests name, else whom the key stands for. Raises Forbidden and StoreUnavailable.
    """
    team = snapshot.teams.get(principal.team)
    if team is None:
        raise Forbidden("the team of this key is not in the policies any more")
    stored = whom(principal, user, team, snapshot, users)
    charges: dict[str, Charge] = {}
    for model in models:
        if may_use(principal, team, model.name):
            charges.update((charge.key, charge) for charge in looked_at(principal, team, model, stored))
    nobody: set[str] = set() if principal.key_id else {"key"} | ({"user"} if stored is None else set())
    asked = [charge for charge in charges.values() if nobody.isdisjoint(charge.limit.per)]
    standings = [
        standing
        for start in range(0, len(asked), _AT_ONCE)
        for standing in await looks(team.organisation, asked[start : start + _AT_ONCE])
    ]
    return [shown(standing) for standing in standings]

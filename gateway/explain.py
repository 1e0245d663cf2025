"""Where a caller stands: every limit that binds him, for himself and for the operator."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.admission import Admission
from gateway.errors import Forbidden
from gateway.identity import Principal
from gateway.snapshot import Model, Snapshot
from gateway.standings import shown
from gateway.terms import Charge, looked_at, may_use

_AT_ONCE = 50  # counts that are asked for in one script: others wait for it


async def limits_of(
    admission: Admission, snapshot: Snapshot, principal: Principal, models: Iterable[Model], user: str | None = None
) -> list[dict[str, object]]:
    """Each limit that binds requests of a key to these models, those of a model for each of them, as `shown` has it.

    `user` is whom the requests name, else whom the key stands for. Raises Forbidden and StoreUnavailable.
    """
    team = snapshot.teams.get(principal.team)
    if team is None:
        raise Forbidden("the team of this key is not in the policies any more")
    charges: dict[str, Charge] = {}
    for model in models:
        if may_use(principal, team, model.name):
            charges.update((charge.key, charge) for charge in looked_at(principal, team, model, user))
    asked = list(charges.values())
    standings = [
        standing
        for start in range(0, len(asked), _AT_ONCE)
        for standing in await admission.look(team.organisation, asked[start : start + _AT_ONCE])
    ]
    return [shown(standing) for standing in standings]

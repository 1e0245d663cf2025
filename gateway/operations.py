"""What the control plane does for who has the admin key: what the commands do, over HTTP.

GET  /admin/v1/usage      what `gateway usage` reports: by, since, until, zone, organisation, team, key, user, model,
                          pool, top, and format=json|csv; filters may be given several times
GET  /admin/v1/exports    how far the exports are
GET  /admin/v1/keys       all keys, without their secrets; team=… those of a team
POST /admin/v1/keys       a new key: {"team": …, "user": …, "name": …, "models": […], "expires": "30d"}; shown once
POST /admin/v1/keys/ID/revoke
GET  /admin/v1/limits     where a key or a team stands: key=ID or team=…, model=…, user=…
GET  /admin/v1/upstreams  the upstreams of the policies, and which of them are drained
POST /admin/v1/upstreams/POOL/HOST:PORT/drain, …/resume
GET  /admin/v1/policies   which revision stands on the disk, since when, and what is wrong with it
POST /admin/v1/reload     read the policies; with a mistake it is told and nothing changes, else workers are asked
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from gateway.drains import drain, resume, upstreams_of
from gateway.drains import listed as upstreams_listed
from gateway.errors import NotFound
from gateway.explain import Looks, limits_of, team_itself
from gateway.exports import standings
from gateway.forms import FRESH, body_of, listed, odd, one_of, told, words_of
from gateway.identity import Principal, written_id
from gateway.keys import KeyRing, expiry
from gateway.queries import BY, Unclear, csv_of, leading, objects, query_of, with_users
from gateway.records import DIMENSIONS
from gateway.shelf import PoliciesRefused, Shelf
from gateway.snapshot import Snapshot
from gateway.store import Store
from gateway.sums import report

Handler = Callable[[Request], Awaitable[Response]]
Workers = Callable[[], Mapping[str, int]]

_WHOLE = re.compile(r"[1-9][0-9]{0,8}")
_FORMATS = ("json", "csv")
_ONCE = ("by", "since", "until", "zone", "top", "format")
_BY_THEMSELVES = "watch the documents by themselves, and take them within two seconds"

_log = structlog.get_logger("gateway.admin")


class NewKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a key is made of, as `gateway keys create` knows it."""

    team: str
    user: str | None = None
    name: str | None = None
    models: tuple[str, ...] = ()
    expires: str | None = None


class Operations:
    """All of them, by path and method. `secret` is what keys and users are hashed with, `ask_reload` tells the workers
    to read the policies, `workers` says how many of them are in which state."""

    def __init__(
        self,
        store: Store,
        secret: bytes,
        policies: Path,
        *,
        ask_reload: Callable[[], Awaitable[None]] | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._store = store
        self._secret = secret
        self._shelf = Shelf(policies)
        self._ask_reload = ask_reload
        self._workers = workers
        self._looks = Looks(store)
        self.table: Mapping[str, Mapping[str, Handler]] = {
            "/admin/v1/usage": {"GET": self._usage},
            "/admin/v1/exports": {"GET": self._exports},
            "/admin/v1/keys": {"GET": self._keys, "POST": self._create_key},
            "/admin/v1/keys/{id}/revoke": {"POST": self._revoke_key},
            "/admin/v1/limits": {"GET": self._limits},
            "/admin/v1/upstreams": {"GET": self._upstreams},
            "/admin/v1/upstreams/{name:path}/drain": {"POST": self._drain},
            "/admin/v1/upstreams/{name:path}/resume": {"POST": self._resume},
            "/admin/v1/policies": {"GET": self._policies},
            "/admin/v1/reload": {"POST": self._reload},
        }

    # — usage

    async def _usage(self, request: Request) -> Response:
        words = words_of(request, _ONCE, DIMENSIONS)
        one = {name: given[-1] for name, given in words.items() if name in _ONCE}
        where = {dimension: words.get(dimension, ()) for dimension in DIMENSIONS}
        format_, top = one.get("format", "json"), one.get("top")
        if format_ not in _FORMATS:
            raise odd("format", f'"{format_}" is no format, expected one of {", ".join(_FORMATS)}')
        if top is not None and not _WHOLE.fullmatch(top):
            raise odd("top", f'"{top}" is no number of groups, expected a whole number from 1')
        try:
            zone = one.get("zone", "UTC")
            query = query_of(one.get("by", BY), one.get("since"), one.get("until"), zone, where, time.time())
        except Unclear as unclear:
            raise odd(unclear.name, str(unclear)) from unclear
        sums = await report(self._store, await with_users(self._store, self._secret, query))
        if top is not None:
            sums, _ = leading(query, sums, int(top))
        if format_ == "csv":
            return Response(csv_of(query, sums), media_type="text/csv; charset=utf-8; header=present", headers=FRESH)
        return listed(objects(query, sums))

    async def _exports(self, request: Request) -> Response:
        words_of(request)
        return listed(msgspec.to_builtins(await standings(self._store)))

    # — keys

    async def _keys(self, request: Request) -> Response:
        team = one_of(request, "team").get("team")
        ring, now = await self._ring(), time.time()
        return listed([record.public(now) for record in ring.records() if team in (None, record.team)])

    async def _create_key(self, request: Request) -> Response:
        words_of(request)
        form, now = await body_of(request, NewKey), time.time()
        _known_team(form.team, await self._shelf.snapshot(), "invalid_body")
        try:
            until = None if form.expires is None else expiry(form.expires, now)
        except ValueError as unclear:
            raise odd("expires", str(unclear), "invalid_body") from unclear
        ring = await self._ring()
        record, key = await ring.create(form.team, user=form.user, name=form.name, models=form.models, expires=until)
        _log.info("key_created", id=record.id, team=record.team)
        return told({"key": key, **record.public(now)}, 201)

    async def _revoke_key(self, request: Request) -> Response:
        words_of(request)
        record = await (await self._ring()).revoke(written_id(request.path_params["id"]))
        if record is None:
            raise NotFound("no key has this id; GET /admin/v1/keys shows them all", code="key_not_found")
        _log.info("key_revoked", id=record.id, team=record.team)
        return told(record.public(time.time()))

    async def _ring(self) -> KeyRing:
        """All keys as they are now. Raises StoreUnavailable, and StoreError for those of another pepper."""
        ring = KeyRing(self._store, self._secret)
        await ring.load()
        return ring

    # — limits

    async def _limits(self, request: Request) -> Response:
        one = one_of(request, "key", "team", "model", "user")
        if ("key" in one) == ("team" in one):
            found = "both are named" if "key" in one else "neither is named"
            raise odd("key", f"whose limits, of a key or of a team? {found}, expected key=ID or team=NAME")
        snapshot, ring = await self._shelf.snapshot(), await self._ring()
        models = snapshot.public_models
        if (name := one.get("model")) is not None:
            if (model := snapshot.model(name)) is None:
                raise odd("model", f'"{name}" is no model of the policies', "model_not_found")
            models = (model,)
        caller = _caller(one, snapshot, ring)
        return listed(await limits_of(self._looks, snapshot, caller, models, ring.stored_user, one.get("user")))

    # — upstreams

    async def _upstreams(self, request: Request) -> Response:
        words_of(request)
        return listed(await upstreams_listed(self._store, await self._shelf.snapshot()))

    async def _drain(self, request: Request) -> Response:
        return await self._change_upstream(request, drain, "upstream_drained")

    async def _resume(self, request: Request) -> Response:
        return await self._change_upstream(request, resume, "upstream_resumed")

    async def _change_upstream(
        self, request: Request, change: Callable[[Store, str], Awaitable[None]], event: str
    ) -> Response:
        words_of(request)
        name, snapshot = request.path_params["name"], await self._shelf.snapshot()
        known = upstreams_of(snapshot)
        if name not in known:
            some = ", ".join(known) or "(none is defined)"
            raise NotFound(
                f'"{name}" is no upstream of the policies, expected one of {some}', code="upstream_not_found"
            )
        await change(self._store, name)
        _log.info(event, upstream=name)
        return told(next(row for row in await upstreams_listed(self._store, snapshot) if row["upstream"] == name))

    # — policies

    async def _policies(self, request: Request) -> Response:
        words_of(request)
        mistakes = await self._shelf.look()
        return told({"object": "policies", **self._standing(mistakes), "workers": self._workers and self._workers()})

    async def _reload(self, request: Request) -> Response:
        words_of(request)
        if mistakes := await self._shelf.look(anew=True):
            raise PoliciesRefused(mistakes)
        if self._ask_reload is not None:
            await self._ask_reload()
        asked = _BY_THEMSELVES if self._ask_reload is None else "are asked to read them"
        return told({"object": "reload", **self._standing(()), "workers": asked})

    def _standing(self, mistakes: tuple[str, ...]) -> dict[str, object]:
        if self._shelf.reloads is None:
            return {"revision": None, "since": None, "last": "refused", "at": None, "mistakes": list(mistakes)}
        return self._shelf.reloads.public()


def _known_team(name: str, snapshot: Snapshot, code: str) -> None:
    if name not in snapshot.teams:
        known = ", ".join(snapshot.teams) or "(none is defined)"
        raise odd("team", f'"{name}" is no team of the policies, expected one of {known}', code)


def _caller(one: Mapping[str, str], snapshot: Snapshot, ring: KeyRing) -> Principal:
    """Whose limits are asked for. Raises BadRequest and NotFound."""
    if "team" in one:
        _known_team(one["team"], snapshot, "invalid_query")
        return team_itself(one["team"])
    principal = ring.principal(written_id(one["key"]))
    if principal is None:
        raise NotFound("no key in force has this id; GET /admin/v1/keys shows them all", code="key_not_found")
    return principal

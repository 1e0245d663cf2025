"""The process: what is open while the gateway runs, and the table of its paths.

Every path is found in a table of exact paths, as the caller wrote them, before any router: one look-up in a dictionary
for the inference paths, one more for the rest, which is Starlette's. A router alone would not do: Starlette's matches
what is left after the escapes are undone.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway import drains, reload, snapshot, telemetry
from gateway.admission import Admission
from gateway.alerts import Alerts
from gateway.asgi import Message, Receive, Scope, Send, refuse, shape_of
from gateway.endpoints import ENDPOINTS, PREFIXES, Endpoint
from gateway.errors import (
    BadRequest,
    GatewayError,
    InternalError,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    StoreUnavailable,
)
from gateway.exchange import Exchange
from gateway.explain import Looks, limits_of
from gateway.hops import pseudonym
from gateway.housekeeping import Housekeeping
from gateway.identity import Principal
from gateway.keys import KeyRing
from gateway.meters import Meters
from gateway.metrics import OTHER
from gateway.openapi import openapi
from gateway.otel import NO_LOSSES
from gateway.pools import Live
from gateway.pressure import Level
from gateway.proxy import Proxy
from gateway.reference import page
from gateway.settings import Settings, pepper
from gateway.spool import Spool
from gateway.store import Store
from gateway.terms import Charge, may_use

if TYPE_CHECKING:
    from gateway.traces import Traces

_INFERENCE = {f"{prefix}/{name}".encode(): endpoint for prefix in PREFIXES for name, endpoint in ENDPOINTS.items()}

_log = structlog.get_logger("gateway")

# A path that may be a route's, without the prefix that the reference's server URL has before it.
_SEGMENT = rb"(?!\.{1,2}(?:[/;]|\Z))(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+"  # `..;` is `..` to Tomcat
_ROUTE = re.compile(rb"(?:/inference)?(/v1(?:/%b)+)" % _SEGMENT)

# Escapes that make two readers see two paths: of / \ . NUL CR and LF.
_AMBIGUOUS = re.compile(rb"%(?:2[ef]|5c|0[0ad])", re.IGNORECASE)


class Gateway:
    """The data plane as an ASGI application."""

    def __init__(
        self,
        live: Live,
        store: Store,
        keys: KeyRing,
        admission: Admission,
        meters: Meters,
        name: bytes,
        traces: Traces | None = None,
    ) -> None:
        self.live = live
        self.store = store
        self.keys = keys
        self.admission = admission
        self.draining = False
        self._level = Level.NONE  # of memory
        self._looks = Looks(store)
        self.meters = meters
        self.traces = traces
        told = telemetry.observer(traces)

        def observe(x: Exchange, scope: Scope) -> None:
            meters.exchange(x, scope["method"])
            told(x, scope)

        self._proxy = Proxy(live, keys, admission, observe, name, None if traces is None else traces.samples)
        self._rest = Starlette(
            routes=[
                *(Route(f"{prefix}/models", self._models, methods=["GET"]) for prefix in PREFIXES),
                *(Route(f"{prefix}/models/{{name:path}}", self._model, methods=["GET"]) for prefix in PREFIXES),
                *(Route(f"{prefix}/limits", self._limits, methods=["GET"]) for prefix in PREFIXES),
                Route("/openapi.json", self._openapi, methods=["GET"]),
                Route("/docs", self._docs, methods=["GET"]),
                Route("/healthz/live", self._live, methods=["GET"]),
                Route("/healthz/ready", self._ready, methods=["GET"]),
            ],
            exception_handlers={GatewayError: _refused, HTTPException: _refused, Exception: _failed},
        )
        self._beside = frozenset(route.path.encode() for route in self._rest.routes if isinstance(route, Route))
        self._rest.router.redirect_slashes = False  # an exact table: no path is mended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.meters.active += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self.meters.active -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path, method = scope.get("raw_path", b""), scope["method"]
        endpoint = _INFERENCE.get(raw_path)
        if endpoint is not None:
            if self._level >= Level.REFUSING:
                await self._refuse(scope, send, Overloaded("hardly any memory is left", retry_after=1), endpoint)
            elif method == "POST":
                await self._proxy(endpoint, scope, receive, send)
            else:
                await self._refuse(scope, send, _not_for(method, ("POST",)), endpoint)
        elif raw_path in self._beside:
            await self._rest(scope, receive, self._counted(scope, send, raw_path.decode()))
        elif raw_path.startswith(_ONE_MODEL):
            await self._rest(scope, receive, self._counted(scope, send, "/v1/models/{name}"))
        elif (route := self._route(raw_path)) is None:
            await self._refuse(scope, send, _nowhere(raw_path))
        elif method in route.methods:
            await self._proxy(route, scope, receive, send)
        else:
            await self._refuse(scope, send, _not_for(method, route.methods), route.endpoint)

    async def _refuse(self, scope: Scope, send: Send, error: GatewayError, endpoint: Endpoint | None = None) -> None:
        """Refuse what never became an exchange; its body is not read."""
        shape = shape_of(scope, "openai" if endpoint is None else endpoint.dialect)
        self.meters.refused(error)
        counted = self._counted(scope, send, OTHER if endpoint is None else endpoint.path)
        await refuse(counted, error, shape=shape, close=scope["method"] != "GET")

    def refused(self, error: GatewayError) -> None:
        """The server has refused what it does not understand, or what came too slowly."""
        self.meters.unread(error)

    def _counted(self, scope: Scope, send: Send, route: str) -> Send:
        """Where an answer goes that is none of an exchange, counted when it begins: it is short."""
        began = time.monotonic()

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.meters.answered(scope["method"], route, message["status"], time.monotonic() - began)
            await send(message)

        return count

    def _route(self, raw_path: bytes) -> snapshot.Route | None:
        """The policies' route of a path that no two readers can take for two."""
        path = _ROUTE.fullmatch(raw_path)
        if path is None or _AMBIGUOUS.search(raw_path):
            return None
        return self.live.policies.snapshot.route(path[1].decode())

    async def _models(self, request: Request) -> Response:
        """The models that the caller may use."""
        may = self._may(self._caller(request))
        usable = [_shown(model) for model in self.live.policies.snapshot.public_models if may(model)]
        ends = {"first_id": usable[0]["id"], "last_id": usable[-1]["id"]} if usable else {}
        return JSONResponse({"object": "list", "data": usable, "has_more": False, **ends})

    async def _model(self, request: Request) -> Response:
        """One of them, by whichever of its names."""
        return JSONResponse(_shown(self._usable(self._caller(request), request.path_params["name"])))

    async def _limits(self, request: Request) -> Response:
        """Where the caller stands with every limit that binds: of one model where the query names it, else of all."""
        principal, snapshot = self._caller(request), self.live.policies.snapshot
        name = request.query_params.get("model")
        models = snapshot.public_models if name is None else (self._usable(principal, name),)
        user, users = request.query_params.get("user"), self.keys.stored_user
        rows = await limits_of(self._looks, snapshot, principal, models, users, user)
        return JSONResponse({"object": "list", "data": rows}, headers={"cache-control": "no-store"})

    def _caller(self, request: Request) -> Principal:
        return self.keys.identify(request.scope["headers"])

    def _usable(self, principal: Principal, name: str) -> snapshot.Model:
        """The model of this name, if the caller may use it. Raises NotFound."""
        model = self.live.policies.snapshot.model(name)
        if model is None or not self._may(principal)(model):
            raise NotFound("no model of this name that the key may use", code="model_not_found", param="model")
        return model

    def _may(self, principal: Principal) -> Callable[[snapshot.Model], bool]:
        """Whether the caller may use a model."""
        team = self.live.policies.snapshot.teams.get(principal.team)
        return lambda model: team is not None and may_use(principal, team, model.name)

    async def _openapi(self, request: Request) -> Response:
        """What may be asked here, for programs."""
        document, _ = await self._described()
        return Response(document, media_type="application/json")

    async def _docs(self, request: Request) -> Response:
        """What may be asked here, for people."""
        _, page = await self._described()
        return Response(page, headers=_PAGE, media_type="text/html")

    async def _described(self) -> tuple[bytes, bytes]:
        policies = self.live.policies.snapshot
        routes = tuple((path, tuple(route.methods)) for path, route in policies.routes.items())
        return await asyncio.to_thread(_described, policies.gateway.profile, routes)

    async def _live(self, request: Request) -> Response:
        """The event loop turns; nothing else is asked, so that nothing else restarts a process."""
        return JSONResponse({"status": "alive"})

    def leave(self) -> None:
        """Be ready no more: the process has been told to end."""
        self.draining = True

    def press(self, level: Level) -> None:
        """Take less, by how much memory is left."""
        self._level = level

    def end(self) -> None:
        """End all that is under way; each is settled."""
        self._proxy.end_all()

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return self._proxy.under_way

    def unready(self) -> list[str]:
        """Why requests should not come here; nothing where they should. That the store is away is no reason: limits are
        held without it, and whoever else is asked has no other one."""
        settlements = self.admission.settlements
        return [
            reason
            for reason, holds in (
                ("draining", self.draining),
                ("hardly any memory is left", self._level >= Level.REFUSING),
                ("no key has been read yet", not self.keys.known),
                (f"the spool cannot be written: {settlements.unwritable}", settlements.unwritable),
                ("what is used can be written down nowhere", self.store.away and settlements.unkept),
            )
            if holds
        ]

    async def _ready(self, request: Request) -> Response:
        """Whether requests should come here, and what is amiss even if they should."""
        reasons = self.unready()
        amiss = [f"the store {self.store.reason}"] if self.store.away else []
        status = "not ready" if reasons else "degraded" if amiss else "ready"
        return JSONResponse({"status": status, "reasons": reasons + amiss}, status_code=503 if reasons else 200)


# The page has nothing from elsewhere, and no script.
_PAGE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}

_NO_PATH = "no such path; see /v1/models, /openapi.json and /docs"
_ONE_MODEL = tuple(f"{prefix}/models/".encode() for prefix in PREFIXES)


def _shown(model: snapshot.Model) -> dict[str, object]:
    """A model as OpenAI's clients read it, and Anthropic's."""
    openai = {"id": model.name, "object": "model", "created": 0, "owned_by": model.pool}
    return {**openai, "type": "model", "display_name": model.name, "created_at": "1970-01-01T00:00:00Z"}


@lru_cache(maxsize=2)
def _described(profile: str, routes: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[bytes, bytes]:
    document = openapi(profile, routes)
    return json.dumps(document).encode(), page(document).encode()


def _not_for(method: str, allowed: Iterable[str]) -> MethodNotAllowed:
    headers = [(b"allow", ", ".join(sorted(allowed)).encode())]
    return MethodNotAllowed(f"{method} is not for this path, expected {', '.join(sorted(allowed))}", headers=headers)


def _nowhere(raw_path: bytes) -> GatewayError:
    """What is said of a path that is not in a table."""
    if _AMBIGUOUS.search(raw_path):
        return BadRequest("the path has an encoded slash, backslash, dot, NUL, CR or LF", code="invalid_path")
    return NotFound(_NO_PATH)


async def _failed(request: Request, error: Exception) -> Response:
    """Our own shape for a defect, which Starlette raises again, for the log."""
    response = await _refused(request, InternalError("the gateway failed; its log has more"))
    response.headers["connection"] = "close"
    return response


async def _refused(request: Request, error: Exception) -> Response:
    """Our own shape for whatever the router refuses."""
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            error = _not_for(request.method, (error.headers or {}).get("Allow", "GET").split(", "))
        else:
            error = NotFound(_NO_PATH)
    assert isinstance(error, GatewayError)
    status, headers, body = error.render(shape_of(request.scope, "openai"))
    response = Response(body, status)
    response.raw_headers.extend(headers)
    return response


@asynccontextmanager
async def opened(settings: Settings, store_url: str) -> AsyncIterator[Gateway]:
    """A gateway with everything it needs open; left, everything is settled and closed. Raises PolicyError, StoreError,
    and SettingsError for OpenTelemetry's variables.

    A store that is away does not keep it from starting: it is not ready until it has read the keys there.
    """
    traces = telemetry.traces(os.environ)
    live = reload.opened(settings.policies)
    store = Store(store_url, deadline=settings.store_deadline)
    secret = pepper(settings)
    keys = KeyRing(store, secret)
    alerts = Alerts()

    def reached(organisation: str, charge: Charge, number: int, used: int, window: int) -> None:
        share = charge.limit.warn_at[number - 1]
        policies = live.policies
        alerts.warn(charge, organisation, share, used, window, policies.snapshot.gateway.webhook, policies.secrets)

    spool = Spool(settings.spools, most=settings.spool_most)
    await spool.probe()
    admission = Admission(store, spool, reached)
    lost = NO_LOSSES if traces is None else traces.losses
    meters = Meters(settings.state, live, store, admission.settlements, lost)
    gateway = Gateway(live, store, keys, admission, meters, pseudonym(secret), traces)
    chores = Housekeeping(store, admission, lambda: gateway.live.policies.snapshot, spool, settings.spools)
    with suppress(StoreUnavailable):
        await keys.load()
    followed = drains.follow(store, lambda names: gateway.live.policies.pools.drain(names))
    watched = reload.watch(live, settings.policies)
    endless = (keys.follow(), admission.keep_up(), admission.settlements.keep_up(), chores.run(), followed, watched)
    tasks = [asyncio.ensure_future(work) for work in (*endless, meters.watch(), meters.keep_up())]
    for task in tasks:
        task.add_done_callback(_over)
    try:
        yield gateway
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await admission.finish()
        await spool.aclose()
        await alerts.aclose()
        await gateway.live.policies.pools.retire()
        await store.aclose()
        if traces is not None:
            await traces.aclose()
        meters.close()


def _over(task: asyncio.Future[None]) -> None:
    """What goes on for ever has ended: nobody would hear of it otherwise, and the gateway serve on without it."""
    if not task.cancelled() and (defect := task.exception()) is not None:
        _log.error("task_died", task=repr(task), exc_info=defect)

"""The process: what is open while the gateway runs, and the table of its paths.

Every path is found in a table of exact paths, as the caller wrote them, before any router: one look-up in a dictionary
for the inference paths, one more for the rest, which is Starlette's. A router alone would not do: Starlette's matches
what is left after the escapes are undone.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway import drains, reload
from gateway.admission import Admission
from gateway.asgi import Receive, Scope, Send, refuse
from gateway.errors import BadRequest, GatewayError, InternalError, MethodNotAllowed, NotFound, StoreUnavailable
from gateway.hops import pseudonym
from gateway.keys import KeyRing
from gateway.policy import load
from gateway.pools import Live
from gateway.proxy import Proxy
from gateway.settings import Settings
from gateway.store import Store
from gateway.telemetry import observer
from gateway.terms import may_use

# As OpenAI's base URL has it, and as the reference's server URL does.
PREFIXES = ("/v1", "/inference/v1")
ENDPOINTS = ("completions", "chat/completions")
_INFERENCE = {f"{prefix}/{endpoint}".encode(): endpoint for prefix in PREFIXES for endpoint in ENDPOINTS}

_POST = [(b"allow", b"POST")]

# Escapes that make two readers see two paths: of / \ . NUL CR and LF.
_AMBIGUOUS = re.compile(rb"%(?:2[ef]|5c|0[0ad])", re.IGNORECASE)


class Gateway:
    """The data plane as an ASGI application."""

    def __init__(self, live: Live, store: Store, keys: KeyRing, admission: Admission, name: bytes) -> None:
        self.live = live
        self.store = store
        self.keys = keys
        self.admission = admission
        self.draining = False
        self._proxy = Proxy(live, keys, admission, observer(), name)
        self._rest = Starlette(
            routes=[
                *(Route(f"{prefix}/models", self._models, methods=["GET"]) for prefix in PREFIXES),
                Route("/healthz/live", self._live, methods=["GET"]),
                Route("/healthz/ready", self._ready, methods=["GET"]),
            ],
            exception_handlers={GatewayError: _refused, HTTPException: _refused, Exception: _failed},
        )
        self._beside = frozenset(route.path.encode() for route in self._rest.routes if isinstance(route, Route))
        self._rest.router.redirect_slashes = False  # an exact table: no path is mended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path = scope.get("raw_path", b"")
        endpoint = _INFERENCE.get(raw_path)
        if endpoint is None:
            if raw_path in self._beside:
                await self._rest(scope, receive, send)
            else:
                await refuse(send, _nowhere(raw_path))
        elif scope["method"] == "POST":
            await self._proxy(endpoint, scope, receive, send)
        else:
            await refuse(send, MethodNotAllowed(f"{scope['method']} is not for this path", headers=_POST), close=True)

    async def _models(self, request: Request) -> Response:
        """The models that the caller may use."""
        principal = self.keys.identify(request.scope["headers"])
        snapshot = self.live.policies.snapshot
        team = snapshot.teams.get(principal.team)
        usable = [
            {"id": model.name, "object": "model", "created": 0, "owned_by": model.pool}
            for model in snapshot.public_models
            if team is not None and may_use(principal, team, model.name)
        ]
        return JSONResponse({"object": "list", "data": usable})

    async def _live(self, request: Request) -> Response:
        """The event loop turns; nothing else is asked, so that nothing else restarts a process."""
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        """Whether requests should come here."""
        reasons = [
            reason
            for reason, holds in (
                ("draining", self.draining),
                ("keys are not loaded", not self.keys.loaded),
                ("the store is away", self.store.away),
            )
            if holds
        ]
        body = {"status": "ready" if not reasons else "not ready", "reasons": reasons}
        return JSONResponse(body, status_code=503 if reasons else 200)


_NO_PATH = "no such path; see /v1/models, /v1/completions and /v1/chat/completions"


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
            allowed = [(b"allow", (error.headers or {}).get("Allow", "POST").encode())]
            error = MethodNotAllowed(f"{request.method} is not for this path", headers=allowed)
        else:
            error = NotFound(_NO_PATH)
    assert isinstance(error, GatewayError)
    status, headers, body = error.render()
    response = Response(body, status)
    response.raw_headers.extend(headers)
    return response


@asynccontextmanager
async def opened(settings: Settings, store_url: str) -> AsyncIterator[Gateway]:
    """A gateway with everything it needs open; left, everything is settled and closed. Raises PolicyError, StoreError.

    A store that is away does not keep it from starting: it is not ready until the store has come.
    """
    policies = reload.opened(load(settings.policies))
    policies.pools.watch()
    store = Store(store_url, deadline=settings.store_deadline)
    secret = pepper(settings)
    keys = KeyRing(store, secret)
    gateway = Gateway(Live(policies), store, keys, Admission(store), pseudonym(secret))
    with suppress(StoreUnavailable):
        await keys.load()
    followed = drains.follow(store, lambda names: gateway.live.policies.pools.drain(names))
    tasks = [asyncio.ensure_future(work) for work in (keys.follow(), gateway.admission.keep_up(), followed)]
    try:
        yield gateway
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await gateway.admission.finish()
        await gateway.live.policies.pools.retire()
        await store.aclose()


def pepper(settings: Settings) -> bytes:
    """The secret that keys are hashed with: the one that is set, or one made once in the state folder."""
    if settings.key_pepper:
        return settings.key_pepper.encode()
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = settings.state / "pepper"
    if not file.exists():
        # Whoever comes second at the same moment takes what the first one made.
        draft = settings.state / f"pepper.{os.getpid()}"
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex(32))
        with suppress(FileExistsError):
            file.hardlink_to(draft)
        draft.unlink()
    return file.read_bytes().strip()

"""The control plane: the gateway's figures, health and operations over HTTP. It is no part of serving requests: it has
its own process, its own connections to the store and its own patience.

    GET /metrics          figures of everything, for Prometheus (gateway/figures.py)
    GET /healthz/live     the process is alive
    GET /healthz/ready    a worker takes requests
    /admin/v1/…           for who has the admin key (gateway/operations.py)
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from socket import socket

import structlog
import uvicorn
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.asgi import header, shape_of
from gateway.console import PATIENCE
from gateway.errors import (
    GatewayError,
    InternalError,
    MethodNotAllowed,
    NotFound,
    StoreUnavailable,
    Unauthenticated,
)
from gateway.figures import exposition
from gateway.operations import Handler, Operations, Workers
from gateway.pipes import Asked, Crew, Leave, Line, Told
from gateway.settings import Settings, admin_key, pepper
from gateway.store import Store, StoreError, leaving
from gateway.sums import roll_up

_ROLL_UP_EVERY = 600  # seconds

_log = structlog.get_logger("gateway.admin")


class Admin:
    """The control plane as an ASGI application. `key` opens its operations, `figures` is what Prometheus is told,
    `workers` says how many workers are in which state: ready, starting, draining; and `stopping`, where all of them
    are about to end."""

    def __init__(
        self,
        key: bytes,
        operations: Operations,
        figures: Callable[[], Awaitable[bytes]],
        *,
        workers: Workers | None = None,
    ) -> None:
        self._key = key
        self._operations = operations
        self._figures = figures
        self._workers = workers

    def app(self) -> Starlette:
        operations = [
            Route(path, self._for_the_key(by), methods=list(by)) for path, by in self._operations.table.items()
        ]
        app = Starlette(
            routes=[
                *operations,
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/healthz/live", self._live, methods=["GET"]),
                Route("/healthz/ready", self._ready, methods=["GET"]),
            ],
            exception_handlers={
                GatewayError: _refused,
                HTTPException: _refused,
                StoreError: _unusable,
                Exception: _failed,
            },
        )
        app.router.redirect_slashes = False  # an exact table: no path is mended
        return app

    def _for_the_key(self, by_method: Mapping[str, Handler]) -> Handler:
        """What does an operation of a path, for who has the admin key."""

        async def handle(request: Request) -> Response:
            self._identify(request)
            return await by_method["GET" if request.method == "HEAD" else request.method](request)

        return handle

    def _identify(self, request: Request) -> None:
        """Whoever asks has the admin key. Raises Unauthenticated."""
        given = header(request.scope["headers"], b"authorization")
        if given is None:
            raise Unauthenticated("no admin key: send it as 'Authorization: Bearer …'", presented=False)
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(b" "), self._key):
            raise Unauthenticated("the admin key is not valid: it is GATEWAY_ADMIN_KEY, or what stands in admin_key")

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        """Whether requests should come to the workers: at least one of them takes some. That others come and go beside
        it is how they are replaced."""
        workers = {"ready": 1} if self._workers is None else self._workers()
        reasons = ["the gateway is stopping"] if workers.get("stopping") else []
        if not workers.get("ready"):
            others = ", ".join(f"{count} {state}" for state, count in workers.items() if count and state != "stopping")
            reasons.append(f"no worker is ready: {others or 'there is none'}")
        body = {"status": "not ready" if reasons else "ready", "reasons": reasons}
        return JSONResponse(body, status_code=503 if reasons else 200)

    async def _metrics(self, request: Request) -> Response:
        return Response(await self._figures(), headers={"content-type": CONTENT_TYPE_LATEST})


class Supervised:
    """What a supervisor tells of the workers, and is asked for."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.crew = Crew()

    def workers(self) -> dict[str, int]:
        """How many workers are in which state; `stopping` where all of them are about to end."""
        counts = Counter[str](worker.told.state for worker in self.crew.workers)
        return {**counts, "stopping": 1} if self.crew.leaving else dict(counts)

    async def ask_reload(self) -> None:
        self._line.say(Asked())

    async def serve(self, server: uvicorn.Server, listener: socket) -> None:
        """Serve until a signal, or until the supervisor is gone."""
        hearing = asyncio.ensure_future(self._hear(server))
        telling = asyncio.ensure_future(self._tell(server))
        try:
            await server.serve([listener])
        finally:
            hearing.cancel()
            telling.cancel()
            await asyncio.gather(hearing, telling, return_exceptions=True)

    async def _hear(self, server: uvicorn.Server) -> None:
        async for told in self._line.heard(Crew | Leave):
            if isinstance(told, Leave):
                break
            self.crew = told
        server.should_exit = True

    async def _tell(self, server: uvicorn.Server) -> None:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        self._line.say(Told("ready"))


@asynccontextmanager
async def opened(
    settings: Settings,
    store_url: str,
    *,
    supervised: Supervised | None = None,
) -> AsyncIterator[Starlette]:
    """The control plane with its store open. `supervised` asks whoever supervises the workers; None: nobody does."""
    ask_reload, workers = (None, None) if supervised is None else (supervised.ask_reload, supervised.workers)
    store = Store(store_url, deadline=PATIENCE)
    rolling = asyncio.ensure_future(_roll_up(store))
    operations = Operations(store, pepper(settings), settings.policies, ask_reload=ask_reload, workers=workers)

    def figures() -> Awaitable[bytes]:
        return exposition(store, settings.state, settings.spools, supervised.crew if supervised else None)

    try:
        yield Admin(admin_key(settings), operations, figures, workers=workers).app()
    finally:
        rolling.cancel()
        await asyncio.wait((rolling,))
        await store.aclose()


async def _roll_up(store: Store) -> None:
    """Add up what has ended soon after it has, so that nobody who asks for a year waits for it."""
    while not leaving():
        await asyncio.sleep(_ROLL_UP_EVERY)
        try:
            await roll_up(store)
        except (StoreUnavailable, StoreError) as failure:
            _log.warning("not_rolled_up", reason=type(failure).__name__)


async def serve(settings: Settings, store_url: str, listener: socket, line: Line | None = None) -> None:
    """Serve the control plane on a listening socket, until SIGTERM, Ctrl-C or the end of the line to a supervisor."""
    supervised = None if line is None else Supervised(await line.open())
    async with opened(settings, store_url, supervised=supervised) as app:
        host, port = listener.getsockname()[:2]
        key = "GATEWAY_ADMIN_KEY" if settings.admin_key else str(settings.state / "admin_key")
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=5
        )
        if supervised is not None:  # who supervises says what there is to say
            await supervised.serve(uvicorn.Server(config), listener)
            return
        _log.info("serving", host=host, port=port, key=key)
        await uvicorn.Server(config).serve([listener])


async def _refused(request: Request, error: Exception) -> Response:
    """Our own shape for whatever is refused."""
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "GET").split(", ")))
            text = f"{request.method} is not for this path, expected {allowed}"
            error = MethodNotAllowed(text, headers=[(b"allow", allowed.encode())])
        else:
            paths = [route.path for route in request.app.routes if isinstance(route, Route)]
            error = NotFound(f"no such path, expected one of {', '.join(paths)}")
    assert isinstance(error, GatewayError)
    status, headers, body = error.render(shape_of(request.scope, "openai"))
    response = Response(body, status)
    response.raw_headers.extend(headers)
    return response


async def _unusable(request: Request, error: Exception) -> Response:
    """A store that cannot be used as it is set up; the text says what to do."""
    return await _refused(request, StoreUnavailable(str(error), retry_after=60))


async def _failed(request: Request, error: Exception) -> Response:
    """Our own shape for a defect, which Starlette raises again, for the log."""
    return await _refused(request, InternalError("the control plane failed; its log has more"))

"""The control plane: reports, exports and figures over HTTP, for who has the admin key. It is no part of serving
requests: it has its own process, its own connections to the store and its own patience.

    GET /admin/v1/usage     what `gateway usage` reports: by, since, until, zone, organisation, team, key, user, model,
                            pool, top, and format=json|csv; filters may be given several times
    GET /admin/v1/exports   how far the exports are
    GET /metrics            the figures of ledgers, exports and spools, for Prometheus
    GET /healthz/live       the process is alive
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from socket import socket

import msgspec
import structlog
import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.asgi import header, shape_of
from gateway.console import PATIENCE
from gateway.errors import (
    BadRequest,
    GatewayError,
    InternalError,
    MethodNotAllowed,
    NotFound,
    StoreUnavailable,
    Unauthenticated,
)
from gateway.exports import standings
from gateway.ledger import organisations
from gateway.pipes import Crew, Line, Told
from gateway.queries import BY, Unclear, csv_of, leading, objects, query_of, with_users
from gateway.records import DIMENSIONS, ledger_stream
from gateway.settings import Settings, admin_key, pepper
from gateway.store import Store, StoreError, leaving
from gateway.sums import report, roll_up

_ROLL_UP_EVERY = 600  # seconds

_log = structlog.get_logger("gateway.admin")

_FORMATS = ("json", "csv")
_ONCE = ("by", "since", "until", "zone", "top", "format")
_PATHS = ("/admin/v1/usage", "/admin/v1/exports", "/metrics", "/healthz/live")
_WHOLE = re.compile(r"[1-9][0-9]{0,8}")
_FRESH = {"cache-control": "no-store"}


class Admin:
    """The control plane as an ASGI application. `key` opens it, `secret` is what users are hashed with, `spool` is the
    folder of the workers' spools."""

    def __init__(self, store: Store, key: bytes, secret: bytes, spool: Path) -> None:
        self._store = store
        self._key = key
        self._secret = secret
        self._spool = spool

    def app(self) -> Starlette:
        app = Starlette(
            routes=[
                Route("/admin/v1/usage", self._usage, methods=["GET"]),
                Route("/admin/v1/exports", self._exports, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/healthz/live", self._live, methods=["GET"]),
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

    def _identify(self, request: Request) -> None:
        """Whoever asks has the admin key. Raises Unauthenticated."""
        given = header(request.scope["headers"], b"authorization")
        if given is None:
            raise Unauthenticated("no admin key: send it as 'Authorization: Bearer …'", presented=False)
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(b" "), self._key):
            raise Unauthenticated("the admin key is not valid: it is GATEWAY_ADMIN_KEY, or what stands in admin_key")

    async def _usage(self, request: Request) -> Response:
        self._identify(request)
        words = _words(request, _ONCE, DIMENSIONS)
        one = {name: given[-1] for name, given in words.items() if name in _ONCE}
        where = {dimension: words.get(dimension, ()) for dimension in DIMENSIONS}
        format_, top = one.get("format", "json"), one.get("top")
        if format_ not in _FORMATS:
            raise _odd("format", f'"{format_}" is no format, expected one of {", ".join(_FORMATS)}')
        if top is not None and not _WHOLE.fullmatch(top):
            raise _odd("top", f'"{top}" is no number of groups, expected a whole number from 1')
        try:
            zone = one.get("zone", "UTC")
            query = query_of(one.get("by", BY), one.get("since"), one.get("until"), zone, where, time.time())
        except Unclear as unclear:
            raise _odd(unclear.name, str(unclear)) from unclear
        sums = await report(self._store, await with_users(self._store, self._secret, query))
        if top is not None:
            sums, _ = leading(query, sums, int(top))
        if format_ == "csv":
            return Response(csv_of(query, sums), media_type="text/csv; charset=utf-8; header=present", headers=_FRESH)
        return JSONResponse({"object": "list", "data": objects(query, sums)}, headers=_FRESH)

    async def _exports(self, request: Request) -> Response:
        self._identify(request)
        _words(request, (), ())
        found = msgspec.to_builtins(await standings(self._store))
        return JSONResponse({"object": "list", "data": found}, headers=_FRESH)

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _metrics(self, request: Request) -> Response:
        """What is known. That the store is away is a figure, too: the spools are read then as well."""
        families = await asyncio.to_thread(_spooled, self._spool)
        try:
            families += await _stored(self._store)
            away = 0
        except GatewayError:
            away = 1
        families.append(_gauge("gateway_store_up", "whether the store answers", [((), 1 - away)]))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Known(families))
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


@asynccontextmanager
async def opened(settings: Settings, store_url: str) -> AsyncIterator[Starlette]:
    """The control plane with its store open."""
    store = Store(store_url, deadline=PATIENCE)
    rolling = asyncio.ensure_future(_roll_up(store))
    try:
        yield Admin(store, admin_key(settings), pepper(settings), settings.spools).app()
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
    async with opened(settings, store_url) as app:
        host, port = listener.getsockname()[:2]
        key = "GATEWAY_ADMIN_KEY" if settings.admin_key else str(settings.state / "admin_key")
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=5
        )
        server = _Server(config, line)
        if line is None:  # else the supervisor says it
            _log.info("serving", host=host, port=port, key=key)
        else:
            await line.open()
            server.hearing = asyncio.ensure_future(server.hear())
        await server.serve([listener])


class _Server(uvicorn.Server):
    """Tells a supervisor that it serves, and ends with it."""

    def __init__(self, config: uvicorn.Config, line: Line | None) -> None:
        super().__init__(config)
        self._line = line
        self.hearing: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self._line is not None:
            self._line.say(Told("ready"))

    async def hear(self) -> None:
        assert self._line is not None
        async for _ in self._line.heard(Crew):
            pass
        self.should_exit = True


# — queries


def _words(request: Request, once: Sequence[str], often: Sequence[str]) -> dict[str, list[str]]:
    """The words of the query by name. Raises BadRequest for a name that is not known, and for one that comes twice."""
    words: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        if name not in once and name not in often:
            raise _odd(name, f'"{name}" is unknown, expected some of {", ".join((*once, *often)) or "(none)"}')
        if name in words and name in once:
            raise _odd(name, f'"{name}" is given twice, expected once')
        words.setdefault(name, []).append(value)
    return words


def _odd(name: str, text: str) -> BadRequest:
    return BadRequest(text, code="invalid_query", param=name)


async def _refused(request: Request, error: Exception) -> Response:
    """Our own shape for whatever is refused."""
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "GET").split(", ")))
            text = f"{request.method} is not for this path, expected {allowed}"
            error = MethodNotAllowed(text, headers=[(b"allow", allowed.encode())])
        else:
            error = NotFound(f"no such path, expected one of {', '.join(_PATHS)}")
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


# — figures


class _Known(Collector):
    """Figures that are known already: to gather them takes a store, and Prometheus's collectors do not wait."""

    def __init__(self, families: Iterable[GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._families


def _gauge(
    name: str, meaning: str, values: Iterable[tuple[Sequence[str], int]], labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _spooled(folder: Path) -> list[GaugeMetricFamily]:
    """What the workers of this state folder have spooled."""
    sizes = []
    for file in folder.glob("*.spool"):
        with suppress(FileNotFoundError):  # replayed and gone meanwhile
            sizes.append(file.stat().st_size)
    return [
        _gauge("gateway_spool_files", "files of settlements that wait for the store", [((), len(sizes))]),
        _gauge("gateway_spool_bytes", "their sizes", [((), sum(sizes))]),
    ]


async def _stored(store: Store) -> list[GaugeMetricFamily]:
    """How long the ledgers are, and how far the exports. Raises StoreUnavailable."""
    rows = [
        ((name,), await store.call(partial(store.client.xlen, ledger_stream(name))))
        for name in await organisations(store)
    ]
    found = {(one.export, one.organisation): one for one in await standings(store)}
    of = ("export", "organisation")
    lag, pending, dead = (
        [(at, getattr(one, figure)) for at, one in found.items()] for figure in ("lag", "pending", "dead")
    )
    return [
        _gauge("gateway_ledger_rows", "rows that the ledger holds", rows, ("organisation",)),
        _gauge("gateway_export_lag", "rows that nobody was given yet", lag, of),
        _gauge("gateway_export_pending", "rows handed out, and not acknowledged", pending, of),
        _gauge("gateway_export_dead_letters", "rows put aside", dead, of),
    ]

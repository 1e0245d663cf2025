"""One worker: a data plane on a listening socket that it shares with others, until it is told to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from socket import socket

import structlog

from gateway import reload
from gateway.app import Gateway, opened
from gateway.pipes import Leave, Line, State, Told
from gateway.server import config
from gateway.serving import Server
from gateway.settings import Settings

_log = structlog.get_logger("gateway")

_TELLS = 0.25  # seconds between two looks at what is to be told

Started = Callable[[Settings, Gateway], Awaitable[None]]


async def serve(settings: Settings, store_url: str, listener: socket, line: Line | None, started: Started) -> None:
    """Serve until SIGTERM, Ctrl-C or the end of `line`; SIGHUP reads the policies anew. `started` is called once, when
    requests are taken. Raises PolicyError and StoreError."""
    async with opened(settings, store_url) as gateway:
        server = _Server(settings, gateway, started)
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Future[bool]] = set()

        def hang_up() -> None:
            task = asyncio.ensure_future(reload.reload(gateway.live, settings.policies))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        beside = []
        if line is not None:
            await line.open()
            beside = [asyncio.ensure_future(_tell(line, gateway, server)), asyncio.ensure_future(_until(line, server))]
        try:
            await server.serve([listener])
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


class _Server(Server):
    def __init__(self, settings: Settings, gateway: Gateway, started: Started) -> None:
        options = config(gateway, drain=settings.drain)
        super().__init__(
            options, leave=self._leaves, end=gateway.end, pressed=gateway.press, delay=settings.drain_delay
        )
        self._settings = settings
        self._gateway = gateway
        self._began = started

    def _leaves(self) -> None:
        self._gateway.leave()
        _log.info("draining", requests=self._gateway.under_way)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        await self._began(self._settings, self._gateway)


async def _tell(line: Line, gateway: Gateway, server: Server) -> None:
    """Tell the supervisor how it stands, as soon as that changes."""
    before = None
    while True:
        revision = gateway.live.policies.snapshot.revision
        told = Told(_state(gateway, server), tuple(gateway.unready()), revision, gateway.under_way)
        if told != before:
            line.say(told)
            before = told
        await asyncio.sleep(_TELLS if server.started else _TELLS / 10)


def _state(gateway: Gateway, server: Server) -> State:
    if gateway.draining:
        return "draining"
    if not server.started:
        return "starting"
    return "unready" if gateway.unready() else "ready"


async def _until(line: Line, server: Server) -> None:
    """Leave when the supervisor says so, and when it is gone."""
    async for said in line.heard(Leave):
        server.delay = max(server.delay, said.delay)
        server.handle_exit(signal.SIGTERM, None)
    if not server.leaving:
        _log.warning("supervisor_gone")
        server.handle_exit(signal.SIGTERM, None)

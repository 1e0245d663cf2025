"""The server of a worker: what it accepts while there is room, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import inf
from socket import socket
from types import FrameType
from typing import cast

import structlog
import uvicorn

from gateway.pressure import Level, Pressure, most_connections
from gateway.server import Protocol, State

_LOOKS = 0.02  # seconds between two looks at what is still under way
_SETTLING = 5.0  # seconds that settling may take: the store has a deadline, and a spool is on a disk
_TAKEN = 1.0  # seconds that what is written last has to be taken
_PRESSURE_TICKS = 5  # of a tenth of a second
_ROOM = 0.9  # of the most connections that there may be: with fewer, new ones are accepted again

_log = structlog.get_logger("gateway.serving")


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, and then lets answers end.

    A signal: `leave` is called, and what comes is still taken for `delay` seconds. Then nothing new is, and answers may
    go on for the drain of the options; what is left is ended by `end`. A second signal goes there at once.

    Where there is hardly any memory or file left, it stops to accept and goes on when there is room again; `pressed` is
    called when the level of memory changes.
    """

    server_state: State

    def __init__(
        self,
        options: uvicorn.Config,
        *,
        leave: Callable[[], None],
        end: Callable[[], None],
        pressed: Callable[[Level], None],
        delay: float = 0.0,
    ) -> None:
        super().__init__(options)
        self.server_state = State(most_connections(), self._full)
        self._leave = leave
        self._end = end
        self._pressed = pressed
        self.delay = delay
        self._pressure = Pressure()
        self._sockets: list[socket] = []
        self._accepts = True
        self._signals = 0
        self._left = inf  # when the first signal came, in time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            self._left = time.monotonic()
            self.server_state.closing = True
            self._leave()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Accept connections on copies of these sockets: who stops to accept closes them."""
        self._sockets = sockets or []
        await super().startup([listener.dup() for listener in self._sockets])

    async def on_tick(self, counter: int) -> bool:
        if counter % _PRESSURE_TICKS == 0 and self._pressure.look():
            level = self._pressure.level
            _log.warning("memory_pressure", level=level.name.lower(), share=round(self._pressure.share, 3))
            self.server_state.closing = bool(self._signals or level)
            self._pressed(level)
        room = len(self.server_state.connections) < self.server_state.most * _ROOM
        if self._pressure.level == Level.DEAF:
            self._stop_accepting()
        elif not self._accepts and room:
            self._accepts = True
            await super().startup([listener.dup() for listener in self._sockets])
            _log.info("accepts_again", connections=len(self.server_state.connections))
        return self._hurried or time.monotonic() >= self._left + self.delay

    def _full(self) -> None:
        if self._accepts:
            _log.warning("accepts_no_more", connections=len(self.server_state.connections))
            self._stop_accepting()

    def _stop_accepting(self) -> None:
        self._accepts = False
        for server in self.servers:
            server.close()
        self.servers = []

    @property
    def leaving(self) -> bool:
        return self._signals > 0

    @property
    def _hurried(self) -> bool:
        return self._signals > 1

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._stop_accepting()
        for listener in self._sockets:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._until_idle(self.config.timeout_graceful_shutdown or 0, lambda: self._hurried)
        if tasks := list(self.server_state.tasks):
            _log.warning("answers_ended", requests=len(tasks))
            self._end()
            await asyncio.wait(tasks, timeout=_SETTLING)
        await self._until_idle(_TAKEN)
        for connection in list(self.server_state.connections):
            cast(Protocol, connection).transport.abort()

    async def _until_idle(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is under way, so many seconds are over, or it is enough."""
        state, end = self.server_state, time.monotonic() + seconds
        while (state.connections or state.tasks) and not enough():
            if time.monotonic() >= end:
                return
            await asyncio.sleep(_LOOKS)

"""The supervisor: workers on one listening socket and a control plane beside them, as processes of their own.

It holds the sockets and nothing of what is served, so that it has no reason to fail. What dies is started again, at
once, and later and later where it dies again and again. Nothing outlives it: each process has a line to it, and leaves
at the end of that line. Of a worker that is to be replaced the next one is ready before it stops to accept, so that no
connection is refused. The supervisor itself is replaced last, in its own process (handover.py).

    SIGTERM, SIGINT   workers drain, then the control plane ends; a second one: at once
    SIGHUP            workers read the policies anew
    SIGUSR2           all are replaced, one by one, by the code as it is now: workers, control plane, supervisor
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress

import structlog

from gateway.embedded import Embedded
from gateway.handover import SIGNALS, Handover, Held, execute, hold_signals, take_signals, understood
from gateway.pipes import Asked, Crew, Kind, Leave, Line, Told, Worker
from gateway.store import StoreError
from gateway.telemetry import finish

_FIRST, _MOST = 0.1, 30.0  # seconds until what died is started again: at first, and at most
_STABLE = 10.0  # seconds; who lives that long has not failed to start
_FAILING = 3  # deaths in a row, after which it is said that somebody has to look
_LOOKS = 1.0  # seconds between two looks at a store of our own
_READY = 60.0  # seconds that a new worker has to get ready
_HANDS_OVER = (
    5.0  # seconds in which the one that is replaced takes requests, so that kept connections end with an answer
)
_SAYING = 1.0  # seconds that what was said to processes has to be on its way, before they are handed over
_PATIENCE = 10.0  # seconds beyond what draining may take, until a process is killed

Command = Callable[[Kind, int, int], Sequence[str]]  # of a kind, its listener, and its end of the line

_log = structlog.get_logger("gateway.supervisor")


class Process:
    """One that was started: what it has told last."""

    def __init__(
        self,
        place: Place,
        pid: int,
        exit_code: Awaitable[int],
        line: Line,
        *,
        began: float | None = None,
        told: Told | None = None,
    ) -> None:
        self.place = place
        self.pid = pid
        self.exit_code = exit_code  # as subprocess has it: of a signal, its number below zero
        self.line = line
        self.began = time.monotonic() if began is None else began
        self.told = told or Told()
        self.ready = asyncio.Event()
        self.dead = asyncio.Event()
        self.leaves = False  # it was told to end, and another one has its place

    def signal(self, number: signal.Signals) -> None:
        if not self.dead.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def leave(self, delay: float = 0.0) -> None:
        """Have it end, as SIGTERM does; unlike a signal, a word is not lost on who is only starting."""
        self.leaves = True
        self.line.say(Leave(delay))


class Place:
    """Where one process is at a time, and another one after it has died."""

    def __init__(self, kind: Kind, number: int) -> None:
        self.kind = kind
        self.name = "control" if kind == "control" else f"worker-{number}"
        self.process: Process | None = None
        self.restarts = 0
        self.deaths = 0  # in a row, soon after the start

    @property
    def failing(self) -> bool:
        return self.deaths >= _FAILING

    def shown(self) -> Worker:
        """What the control plane hears of it."""
        one = self.process
        if one is None or one.dead.is_set():
            return Worker(0, Told(), self.restarts, self.failing)
        return Worker(one.pid, one.told, self.restarts, self.failing)


class Supervisor:
    """`command` says how a process is started; `delay` and `drain` are the seconds that draining takes (see server.py).
    The listeners are closed when it ends. A `store` of our own is started again where it has died. Where it is not
    `replaceable`, SIGUSR2 replaces its processes, and not itself."""

    def __init__(
        self,
        command: Command,
        listeners: Mapping[Kind, socket.socket],
        workers: int,
        *,
        delay: float,
        drain: float,
        environment: Mapping[str, str],
        store: Embedded | None = None,
        replaceable: bool = False,
    ) -> None:
        self._command = command
        self._store = store
        self._replaceable = replaceable
        self._listeners = listeners
        self._environment = environment
        self._workers = [Place("worker", number) for number in range(1, workers + 1)]
        self._control = Place("control", 0)
        self._places = (*self._workers, self._control)
        self._delay = delay
        self._drain = drain
        self._processes: set[Process] = set()
        self._tasks: set[asyncio.Future[None]] = set()
        self._leaving = 0  # signals to end that have come
        self._end = asyncio.Event()
        self._code = 0
        self._rolling = False
        self._signals = {
            signal.SIGTERM: self._leave,
            signal.SIGINT: self._leave,
            signal.SIGHUP: self._reload,
            signal.SIGUSR2: self._roll,
        }

    async def run(self, started: Callable[[str], Awaitable[None]]) -> int:
        """Until a signal ends it, or until a first worker cannot serve; the exit code. `started` is called when all
        serve for the first time, with the revision of their policies."""
        self._take_signals()
        await asyncio.gather(*(self._start(place) for place in self._places))
        self._spawn(self._begin(started))
        return await self._until_end()

    async def go_on(self, handover: Handover) -> int:
        """As run, with what another supervisor had until now."""
        self._take_signals()
        places = {place.name: place for place in self._places}
        for name, (restarts, deaths) in handover.restarts.items():
            places[name].restarts, places[name].deaths = restarts, deaths
        for held in handover.processes:
            await self._adopt(held, places[held.place])
        await asyncio.gather(*(self._start(place) for place in self._places if place.process is None))
        self._tell()
        _log.info("replaced", process="supervisor", pid=os.getpid())
        return await self._until_end()

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signals[number])
        take_signals()

    async def _until_end(self) -> int:
        if self._store is not None:
            self._spawn(self._look_after(self._store))
        await self._end.wait()
        await self._finish()
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
        return self._code

    async def _begin(self, started: Callable[[str], Awaitable[None]]) -> None:
        told = Told()
        for place in self._places:
            assert place.process is not None
            await place.process.ready.wait()
            told = place.process.told
        await started(told.revision)

    async def _look_after(self, store: Embedded) -> None:
        while True:
            await asyncio.sleep(_LOOKS)
            try:
                if await asyncio.to_thread(store.revive):
                    _log.error("process_died", process="store", how="it did not answer; it was started again")
            except StoreError as failure:
                _log.error("store_not_started", reason=str(failure))

    # — processes

    async def _start(self, place: Place) -> None:
        place.process = await self._launch(place)
        if self._leaving:
            place.process.leave()

    async def _launch(self, place: Place) -> Process:
        """A new process for a place, which is not there yet."""
        ours, theirs = socket.socketpair()
        fds = self._listeners[place.kind].fileno(), theirs.fileno()
        with theirs:
            child = await asyncio.create_subprocess_exec(
                *self._command(place.kind, *fds),
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environment,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C on the terminal is for the supervisor
            )
        process = Process(place, child.pid, child.wait(), await Line(ours).open())
        self._know(process)
        return process

    async def _adopt(self, held: Held, place: Place) -> None:
        line = await Line(socket.socket(fileno=held.line), held.unheard).open()
        process = Process(place, held.pid, _ends(held.pid), line, began=held.began, told=held.told)
        if held.ready:
            process.ready.set()
        process.leaves = not held.current
        if held.current:
            place.process = process
            if self._leaving:
                process.leave()
        self._know(process)

    def _know(self, process: Process) -> None:
        self._processes.add(process)
        self._spawn(self._hear(process))
        self._spawn(self._watch(process))

    async def _hear(self, process: Process) -> None:
        async for told in process.line.heard(Told | Asked):
            if isinstance(told, Asked):
                self._reload()
                continue
            process.told = told
            if told.state in ("ready", "unready"):  # it serves: that the store is away is no reason to wait
                process.ready.set()
            self._tell()

    async def _watch(self, process: Process) -> None:
        """Until a process is dead; then the next one, unless it was meant."""
        code = await process.exit_code
        process.dead.set()
        process.line.close()
        self._processes.discard(process)
        place = process.place
        if self._leaving or place.process is not process:
            return
        lived = time.monotonic() - process.began
        place.deaths = place.deaths + 1 if lived < _STABLE else 1
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        _log.error("process_died", process=place.name, how=how, lived_s=round(lived, 3), in_a_row=place.deaths)
        if not process.ready.is_set() and not place.restarts and code > 0 and place.kind == "worker":
            self._code = code  # it has said why, and the next one would say the same
            self._end.set()
            return
        place.restarts += 1
        self._tell()
        if place.failing:
            _log.error("process_fails_again_and_again", process=place.name, deaths=place.deaths)
        await asyncio.sleep(0 if place.deaths == 1 else min(_MOST, _FIRST * 2**place.deaths))
        if not self._leaving and place.process is process:
            await self._start(place)

    # — what is asked

    def _tell(self) -> None:
        """Tell the control plane how the workers stand; while it is replaced there are two."""
        crew = Crew(tuple(place.shown() for place in self._workers), bool(self._leaving))
        for process in self._processes:
            if process.place is self._control:
                process.line.say(crew)

    def _reload(self) -> None:
        for place in self._workers:
            if place.process is not None and place.process.ready.is_set():
                place.process.signal(signal.SIGHUP)

    def _roll(self) -> None:
        if not self._rolling and not self._leaving:
            self._spawn(self._replace())

    async def _replace(self) -> None:
        self._rolling = True
        try:
            for place in self._places:
                before = place.process
                assert before is not None
                process = await self._launch(place)
                await _first(process.ready, process.dead, _READY)
                if not process.ready.is_set() or process.dead.is_set():
                    process.signal(signal.SIGKILL)
                    _log.error("not_replaced", process=place.name, reason="the new one did not get ready")
                    return
                place.process = process
                before.leave(_HANDS_OVER)
                if self._leaving:
                    process.leave()
                _log.info("replaced", process=place.name, pid=process.pid)
            if self._replaceable:
                await self._hand_over()
        finally:
            self._rolling = False
            self._tell()

    async def _hand_over(self) -> None:
        """Be replaced by a supervisor of the code as it is now; this one goes on where that cannot be."""
        try:
            if not await understood(self._handover(), self._environment):
                _log.error("not_replaced", process="supervisor", reason="the new one did not understand the old one")
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_SAYING):
                    while not all(process.line.said for process in self._processes):  # noqa: ASYNC110 - no event
                        await asyncio.sleep(0.01)
            finish()
            hold_signals()
            await asyncio.sleep(0.01)  # those that have come are handled
            if not self._leaving:
                execute(self._handover(), self._environment)
        except OSError as failure:
            _log.error("not_replaced", process="supervisor", reason=failure.strerror)
        finally:
            take_signals()

    def _handover(self) -> Handover:
        held = [
            Held(
                place=process.place.name,
                current=process.place.process is process,
                pid=process.pid,
                line=process.line.descriptor,
                unheard=process.line.unheard(),
                told=process.told,
                ready=process.ready.is_set(),
                began=process.began,
            )
            for process in self._processes
        ]
        restarts = {place.name: (place.restarts, place.deaths) for place in self._places}
        listeners = {kind: listener.fileno() for kind, listener in self._listeners.items()}
        return Handover(listeners, self._store.lock if self._store else -1, restarts, tuple(held))

    # — the end

    def _leave(self) -> None:
        self._leaving += 1
        for process in self._processes:
            # One that was told already has its time; told once more, it would end at once.
            if process.place is not self._control and (self._leaving > 1 or not process.leaves):
                process.leave()
        self._tell()
        if self._leaving == 1:
            # What comes after the workers have stopped to accept is refused, and does not wait for nobody.
            asyncio.get_running_loop().call_later(self._delay, self._listeners["worker"].close)
        else:
            self._listeners["worker"].close()
        self._end.set()

    async def _finish(self) -> None:
        if not self._leaving:
            self._leave()
        await self._gone([one for one in self._processes if one.place is not self._control], self._delay + self._drain)
        for process in self._processes:
            process.leave()
        await self._gone(list(self._processes), 0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners.values():
            listener.close()

    async def _gone(self, those: Sequence[Process], after: float) -> None:
        """Until these are dead; what is late is killed."""
        try:
            async with asyncio.timeout(after + _PATIENCE):
                for process in those:
                    await process.dead.wait()
        except TimeoutError:
            for process in those:
                if not process.dead.is_set():
                    _log.error("process_killed", process=process.place.name, reason="it did not end in time")
                    process.signal(signal.SIGKILL)
            for process in those:
                await process.dead.wait()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _first(one: asyncio.Event, other: asyncio.Event, patience: float) -> None:
    """Until one of two comes to pass, or patience is over."""
    waiting = [asyncio.ensure_future(one.wait()), asyncio.ensure_future(other.wait())]
    await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _ends(pid: int) -> asyncio.Future[int]:
    """The exit code of a child that another program in this process has started, and so nobody here knows."""
    loop = asyncio.get_running_loop()
    code = loop.create_future()

    def wait() -> None:
        _, status = os.waitpid(pid, 0)
        loop.call_soon_threadsafe(code.set_result, os.waitstatus_to_exitcode(status))

    threading.Thread(target=wait, name=f"wait-{pid}", daemon=True).start()
    return code


def gateway_command(kind: Kind, listener: int, line: int) -> Sequence[str]:
    """How a process of the gateway is started, from the interpreter of this one."""
    return [sys.executable, "-m", "gateway", "process", kind, "--listener", str(listener), "--line", str(line)]

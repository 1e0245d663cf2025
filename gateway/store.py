"""Valkey (or Redis): the only state that gateways share, reached through few, idempotent scripts.

What waits in the same turn of the event loop travels in one script call. A call has one deadline, and is never retried
blindly: a script that timed out may have run, so whoever sent it must be able to send the same again (the scripts know
a request by its id). When the store is away, calls fail at once, and one probe at a time asks whether it is back.

States of a Store: answering → (a lost connection, an answer that it does not do its work, or a deadline and a probe
that fails, too) → away → (a probe is answered) → answering. A probe writes, as every call does. A cluster is one store:
it is away as long as one of its primaries is.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

import msgspec
import structlog
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway import topology
from gateway.errors import StoreUnavailable
from gateway.metrics import Histograms
from gateway.topology import Failures, why

Arg = str | bytes | int | float
Item = tuple[Sequence[str], Sequence[object]]  # the keys of one request, and its words (MessagePack's types, no bytes)

# A script call stays below the 8,000 values that Lua can unpack, and below a few milliseconds of the server's time.
_MOST_ITEMS, _MOST_KEYS = 64, 4000
# Until a probe: many workers, one store, not all at once. A probe is a connection at most, so two a second at most.
_FIRST_PROBE, _NEXT_PROBE = (0.25, 0.35), (0.6, 0.9)
_LEAST_DEADLINE = 0.05  # of a probe
_PATIENCE = 0.5  # of the connection that a probe may have to open
_PROBE_KEPT_MS = 60_000
_TIMES = [0.25e-3 * 2**power for power in range(13)]  # seconds, to a second

_log = structlog.get_logger("gateway.store")


class StoreError(Exception):
    """The store cannot be used as configured; the text says what to do."""


class StoreAway(StoreUnavailable):
    """The store is known to be away: nothing was sent."""


def leaving() -> bool:
    """Whether this task has been cancelled. What goes on for ever and asks the store asks this, too.

    redis-py looks for data with timeout(0), and asyncio takes a cancellation that came just before for that timeout:
    the exception is gone, and only the count of it is left (reproduced with redis 8.1 and Python 3.11.7).
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Script:
    """One script of gateway/lua."""

    def __init__(self, name: str) -> None:
        self.name = name
        text = _lua(name)
        self.text = text if text.startswith("#!") else _lua("counts") + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA goes by


def _lua(name: str) -> str:
    return resources.files("gateway").joinpath("lua", f"{name}.lua").read_text("utf-8")


class Store:
    """Valkey or Redis, whatever stands behind its address. `deadline` (seconds) is the most that a call waits."""

    def __init__(self, url: str, *, deadline: float) -> None:
        self.deadline = deadline
        self.away = False
        self.reason = ""  # why it is away, as words that continue "the store …"
        self.losses, self.lost = 0, 0.0  # how often it was lost, and when it was last, in time.monotonic()
        self.since = time.monotonic()  # when it came back last, or was opened
        self.warnings: tuple[str, ...] = ()  # what is wrong with how it is set up
        self.times = Histograms(
            "gateway_store_call_seconds", "how long script calls took, failed ones too", _TIMES, "script"
        )
        self._topology = topology.opened(url)
        # Any: redis-py types every answer as the union of what each protocol and option could give.
        self.client: Any = topology.Client(self._topology)
        # Connections of their own for reads that wait for news, see wait().
        self.patient: Any = topology.Client(self._topology, patient=True)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._answers = asyncio.Event()
        self._answers.set()
        self._returning: asyncio.Future[None] | None = None
        self._checking: asyncio.Future[None] | None = None
        self._looked = False  # whether its setting has been looked at since it answers
        self._probe = Script("probe")

    def __repr__(self) -> str:
        return f"<Store {'away' if self.away else 'answering'}, deadline {self.deadline * 1000:.0f} ms>"

    def slot(self, key: str) -> int:
        """Keys of one slot may stand in one call; one server has one slot for all of them."""
        return self._topology.slot(key)

    async def call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to a command within the deadline. Raises StoreUnavailable, and redis's ResponseError."""
        return await self._answer(command, self.deadline)

    async def wait(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to a command of `patient`, which waits for news. Raises as call() does."""
        return await self._answer(command, None)

    async def _answer(self, command: Callable[[], Awaitable[Any]], deadline: float | None) -> Any:
        if self.away:
            raise StoreAway("the store of keys and limits is away", retry_after=1)
        try:
            async with asyncio.timeout(deadline):
                answer = await command()
        except Failures as failure:
            reason = why(failure)
            if reason is None:
                raise  # it works; what it says is the caller's to understand
            self._failed(failure, reason, sure=deadline is not None)
            raise StoreUnavailable("the store of keys and limits does not answer", retry_after=1) from failure
        if not self._looked:
            self._looked = True
            self.spawn(self._look())
        return answer

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """The answer of a script; one that the server has forgotten is loaded and called once more."""
        called = time.monotonic()
        try:
            return await self.call(lambda: self._run(script, keys, args))
        finally:
            self.times[(script.name,)].observe(time.monotonic() - called)

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        try:
            return await self.client.execute_command("EVALSHA", script.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self.client.execute_command("EVAL", script.text, len(keys), *keys, *args)

    def spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task that nobody cancels with a request; the store holds it until it is done."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # — away and back

    async def back(self) -> None:
        """Wait until the store answers."""
        await self._answers.wait()

    def _failed(self, failure: BaseException, reason: str, *, sure: bool) -> None:
        """Take note of a failed call. `sure`: that one says enough, where it is more than a slow moment."""
        if sure and not isinstance(failure, TimeoutError | RedisTimeoutError):
            self._lose(reason)
        elif self._checking is None or self._checking.done():
            # One slow moment, or more? Asked at once, so that few requests wait for a store that is away.
            self._checking = self.spawn(self._check())

    async def _check(self) -> None:
        try:
            await self._write(self.deadline)
        except Failures as failure:
            self._lose(why(failure) or "does not run scripts")

    def _lose(self, reason: str) -> None:
        if self.away:
            return
        self.away, self.reason = True, reason
        self.losses, self.lost = self.losses + 1, time.monotonic()
        self._answers.clear()
        self._topology.give_up()
        _log.error("store_away", reason=reason)
        self._returning = asyncio.ensure_future(self._come_back())

    async def _come_back(self) -> None:
        await self._topology.drop()
        bounds = _FIRST_PROBE
        while not leaving():
            await asyncio.sleep(random.uniform(*bounds))
            bounds = _NEXT_PROBE
            try:
                await self._topology.find()
                await self._write(_PATIENCE)  # it may have to connect, and to load the script
                await self._write(self.deadline)
            except Failures as failure:
                self.reason = why(failure) or "does not run scripts"
            except Exception:  # a defect: whoever stops asking would be away for ever
                _log.exception("store_probe_failed")
            else:
                self.away, self.reason, self._looked = False, "", False
                self.since = time.monotonic()
                self._answers.set()
                _log.info("store_back", seconds=round(self.since - self.lost, 3))
                return

    async def _write(self, deadline: float) -> None:
        """Write as every call does, to all who take writes. Raises what failed."""
        if not self._topology.primaries:
            await self._topology.find()
        keys = self._topology.probes()
        async with asyncio.timeout(max(deadline, _LEAST_DEADLINE)):
            written = await asyncio.gather(
                *(self._run(self._probe, [key], [_PROBE_KEPT_MS]) for key in keys), return_exceptions=True
            )
        for failure in written:
            if isinstance(failure, BaseException):
                raise failure

    async def _look(self) -> None:
        """Whether it forgets limits when it is full. Where it may not be asked, it is not known."""
        found = set()
        try:
            async with asyncio.timeout(_PATIENCE):
                for node in self._topology.primaries:
                    memory = await node.prompt.info("memory")
                    found.add(str(memory.get("maxmemory_policy", "noeviction")))
        except Failures:
            pass
        policies = sorted(found - {"noeviction"})
        self.warnings = tuple(
            f'maxmemory-policy is "{policy}", expected "noeviction": a store that is full would forget limits'
            for policy in policies
        )
        if policies:
            _log.error("store_evicts", policy=", ".join(policies), expected="noeviction")

    async def aclose(self) -> None:
        """Let what is under way end, then close the connections."""
        if self._returning is not None:
            self._returning.cancel()
            await asyncio.wait((self._returning,))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._topology.aclose()


class Coalesced:
    """A script whose calls share a trip: what waits in one turn of the event loop is one call.

    The script is given the words of all requests in one MessagePack, then `more`. It answers with a list, an element
    for each request. In a cluster, requests share a trip when their keys share a slot.
    """

    def __init__(self, store: Store, script: Script, more: Sequence[Arg]) -> None:
        self._store = store
        self._script = script
        self._more = more
        self._waiting: list[tuple[Item, asyncio.Future[Any]]] = []

    def __call__(self, item: Item) -> asyncio.Future[Any]:
        """The script's answer for one request. Cancelling the future does not cancel what was sent."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        trips: list[_Trip] = []
        last: dict[int, _Trip] = {}  # of each slot
        for one in waiting:
            keys = one[0][0]
            slot = self._store.slot(keys[0])
            trip = last.get(slot)
            if trip is None or trip.full(len(keys)):
                trip = last[slot] = _Trip()
                trips.append(trip)
            trip.take(one)
        for trip in trips:
            self._store.spawn(self._send(trip))

    async def _send(self, trip: _Trip) -> None:
        batch = trip.batch
        keys = [key for (keys, _), _ in batch for key in keys]
        try:
            words = msgspec.msgpack.encode([own for (_, own), _ in batch])
            answers = await self._store.run(self._script, keys, (words, *self._more))
            answered = list(zip(batch, answers, strict=True))
        except Exception as failure:
            for _, future in batch:
                if not future.done():
                    future.set_exception(failure)
                    future.exception()  # asked for: a caller who left does not read it
            return
        for (_, future), answer in answered:
            if not future.done():
                future.set_result(answer)


class _Trip:
    """The requests of one script call."""

    def __init__(self) -> None:
        self.batch: list[tuple[Item, asyncio.Future[Any]]] = []
        self._keys = 0

    def full(self, keys: int) -> bool:
        """Whether so many keys more are too many."""
        return len(self.batch) == _MOST_ITEMS or self._keys + keys > _MOST_KEYS

    def take(self, one: tuple[Item, asyncio.Future[Any]]) -> None:
        self.batch.append(one)
        self._keys += len(one[0][0])

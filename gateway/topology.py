"""What stands behind the address of a store: one server, a primary that Sentinels watch, or a cluster.

    redis://, rediss://, unix://                                      one server
    redis+sentinel://[user:password@]host:port,host:port/service[/n]  whichever primary its Sentinels agree on
    redis+cluster://[user:password@]host:port,host:port               each key on the node of its slot
    rediss+sentinel://, rediss+cluster://                             the same with TLS

Who takes our writes is found apart from the requests (`find`): a host that does not answer may take longer than a
request has. A request goes to whom was found last, follows MOVED and ASK, and is never sent twice to one server. This
is why redis-py's own clients of Sentinels and clusters are not used: they search within the call, one host after the
other, and close what other requests are waiting on.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import redis.asyncio
import redis.exceptions
from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands import AsyncCoreCommands
from redis.crc import key_slot
from redis.event import EventDispatcher
from redis.exceptions import AskError, MovedError, TryAgainError
from redis.maint_notifications import MaintNotificationsConfig

from gateway.settings import STORES, hosts

Failures = (redis.exceptions.RedisError, OSError, TimeoutError)

_MOST_CONNECTIONS = 8  # for each node
_OPENS_EVERY = 2.0  # seconds, once that many were opened: a store that comes and goes is not stormed
_ASKED_SECONDS = 0.5  # a Sentinel or a node that is asked where to write
_FINDS_EVERY = 1.0
_PATIENT_SECONDS = 5.0  # the most that a read may wait for news
_REDIRECTIONS = 16  # as redis-py
_TRY_AGAIN_SECONDS = 0.005
_SLOTS = 16_384
_PROBE = "{gateway}:probe"
_PROBES_TRIED = 2_000

# What a server answers that does not do its work at the moment, by the first word of the answer.
_UNABLE = {
    "BUSY": "is busy with somebody's script",
    "CLUSTERDOWN": "is a cluster that is down",
    "LOADING": "is still loading its data",
    "MASTERDOWN": "is a replica without its primary",
    "MISCONF": "cannot write to its disk (MISCONF)",
    "MOVED": "is a node of a cluster, expected redis+cluster:// before its address",
    "NOAUTH": "wants a password",
    "NOPERM": "does not permit a command that the gateway needs (NOPERM)",
    "NOREPLICAS": "has too few replicas to write (NOREPLICAS)",
    "OOM": "is full (maxmemory)",
    "READONLY": "is a replica, which takes no writes",
    "WRONGPASS": "refuses the password",
}
_UNABLE_WORDS = {
    "ACL failure in script": _UNABLE["NOPERM"],  # Valkey
    "The user executing the script can't": _UNABLE["NOPERM"],  # Redis
    "AUTH <password>": "refuses the password",
    "DB index is out of range": "has no database of that number",
    "No such master": "knows no service of that name",  # a Sentinel
    "cluster support disabled": "is no cluster, expected redis:// before its address",
    "invalid password": "refuses the password",
    "max number of clients": "has no connection left (maxclients)",
    "unknown command 'SENTINEL'": "is no Sentinel, expected redis:// before its address",
}
_LOST: Sequence[tuple[type[BaseException], str]] = (
    (ssl.SSLError, "does not speak TLS as expected"),
    (ConnectionRefusedError, "refuses the connection"),
    (FileNotFoundError, "has no socket there"),
    (socket.gaierror, "has a name that does not resolve"),
    (redis.exceptions.InvalidResponse, "does not speak the protocol of Redis"),
    (TimeoutError, "does not answer"),
    (redis.exceptions.TimeoutError, "does not answer"),
)


class NotFound(redis.exceptions.ConnectionError):
    """Nobody says who takes the writes; the text continues "the store …"."""


def why(failure: BaseException) -> str | None:
    """Why a store does not do its work, as words that continue "the store …", without a secret.

    None where it works, and only the command was wrong.
    """
    for cause in _causes(failure):
        said = _said(cause) if isinstance(cause, redis.exceptions.RedisError) else None
        if said is not None:
            return said
    if isinstance(failure, redis.exceptions.ResponseError):
        return None
    return next((reason for cause in _causes(failure) if (reason := _lost(cause))), "lost the connection")


def _said(failure: redis.exceptions.RedisError) -> str | None:
    """What the server said of itself."""
    text = str(failure)
    if isinstance(failure, NotFound):
        return text
    code = failure.status_code or text.partition(" ")[0]
    if code in _UNABLE:
        return _UNABLE[code]
    return next((reason for words, reason in _UNABLE_WORDS.items() if words in text), None)


def _lost(cause: BaseException) -> str | None:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"has a certificate that is not accepted: {cause.verify_message}"
    return next((reason for kind, reason in _LOST if isinstance(cause, kind)), None)


def _causes(failure: BaseException | None) -> Iterator[BaseException]:
    while failure is not None:
        yield failure
        failure = failure.__cause__ or failure.__context__


# — one server


class _Pace:
    """How fast connections to a server are opened: some at once, then one every so often."""

    def __init__(self) -> None:
        self._left, self._at = float(_MOST_CONNECTIONS), time.monotonic()

    def allows(self) -> bool:
        now = time.monotonic()
        self._left = min(float(_MOST_CONNECTIONS), self._left + (now - self._at) / _OPENS_EVERY)
        self._at = now
        return self._left >= 1

    def opened(self) -> None:
        self._left = max(0.0, self._left - 1)

    def slow_down(self) -> None:
        self._left = 0.0


class _Pool(redis.asyncio.ConnectionPool):
    """Connections to one server, for which callers wait in a line: the deadline is around them.

    An open one comes before a new one, and new ones are opened at a measured pace. The first one is opened whenever
    there is none: who asks for it does so after the store was away, and paces himself.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pace = _Pace()
        self._line: deque[asyncio.Future[None]] = deque()

    async def get_connection(self, command_name: object = None, *keys: object, **options: object) -> AbstractConnection:
        while True:
            if self._line or not self._ready():
                await self._wait()
            connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
            try:
                if not connection.is_connected:
                    self.pace.opened()
                    await connection.connect()  # type: ignore[no-untyped-call]
                    return connection
                if not await _stale(connection):
                    return connection
                await connection.disconnect()  # and opened again only at the pace
            except BaseException:
                await self.release(connection)
                raise
            await self.release(connection)

    async def release(self, connection: AbstractConnection) -> None:
        try:
            await super().release(connection)
        finally:
            self._next()

    async def _wait(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            while True:
                await turn
                if self._ready():
                    return
                turn = asyncio.get_running_loop().create_future()
                self._line.appendleft(turn)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()  # whose turn it was has left
            raise

    def _next(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _ready(self) -> bool:
        """Whether one can be had. An open one is then the next that is given."""
        free = self._available_connections
        for place in reversed(range(len(free))):
            if free[place].is_connected:
                free.append(free.pop(place))
                return True
        return not self._in_use_connections or (self.can_get_connection() and self.pace.allows())

    def give_up(self) -> None:
        """Nobody waits any longer; who comes back finds one connection, and gets more with time."""
        self.pace.slow_down()
        for turn in self._line:
            if not turn.done():
                turn.set_exception(redis.exceptions.ConnectionError("nobody waits for a store that is away"))
        self._line.clear()

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Close without waiting for the other side to agree: one that is silent does not, and TLS asks for it."""
        for connection in (*self._available_connections, *(self._in_use_connections if inuse_connections else ())):
            await connection.disconnect(nowait=True)

    async def drop(self) -> None:
        """Close what is idle; what is in use is closed when it is given back."""
        for connection in self._in_use_connections:
            connection.mark_for_reconnect()  # type: ignore[no-untyped-call]
        await self.disconnect(inuse_connections=False)


async def _stale(connection: AbstractConnection) -> bool:
    """Whether the server has closed it meanwhile, or said what nobody asked."""
    try:
        return bool(await connection.can_read())
    except Failures:
        return True


class Node:
    """One server: connections for commands, and one for reads that wait for news."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prompt = _client(url, socket_timeout=None)
        self.patient = _client(url, socket_timeout=_PATIENT_SECONDS)
        self.patient.connection_pool.pace = self.prompt.connection_pool.pace

    async def send(self, words: Sequence[Any], options: dict[str, Any], *, patient: bool, asking: bool) -> Any:
        """One command on a connection of its own. Packed in C: redis-py's packing and its client around it cost three
        times as much as the rest of the trip. Whoever is cancelled here closes the connection (redis-py)."""
        client = self.patient if patient else self.prompt
        pool = client.connection_pool
        name = words[0]
        packed = pack_command((*name.split(), *words[1:]) if " " in name else tuple(words))
        connection = await pool.get_connection()
        try:
            if asking:  # holds for the next command on this connection only
                await connection.send_packed_command(pack_command(("ASKING",)), check_health=False)
                await connection.read_response()
            await connection.send_packed_command(packed, check_health=False)
            return await client.parse_response(connection, name, **options)
        except RuntimeError as closed:  # uvloop's word for a connection that was reset while nobody looked
            await connection.disconnect(nowait=True)
            raise redis.exceptions.ConnectionError("the connection was reset") from closed
        finally:
            await pool.release(connection)

    @property
    def pools(self) -> tuple[_Pool, ...]:
        return (self.prompt.connection_pool, self.patient.connection_pool)

    async def drop(self) -> None:
        """Close what is idle or waits for news; what is in use else is closed when it is given back."""
        await asyncio.gather(self.prompt.connection_pool.drop(), self.patient.connection_pool.disconnect())

    async def aclose(self) -> None:
        await asyncio.gather(*(client.aclose() for client in (self.prompt, self.patient)))


def _client(url: str, *, socket_timeout: float | None) -> Any:
    """A client that does what it is told once: redis-py's own default is to send a timed-out command ten times more."""
    pool = _Pool.from_url(
        url,
        max_connections=_MOST_CONNECTIONS,
        socket_timeout=socket_timeout,
        socket_connect_timeout=5,
        **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        legacy_responses=False,
    )
    return redis.asyncio.Redis.from_pool(pool)  # and closes it


# — several


class Topology:
    """Which servers take the writes. `primaries` is empty until they were found once."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.primaries: tuple[Node, ...] = tuple(nodes)
        self._searching: asyncio.Future[None] | None = None
        self._searched = 0.0  # since when, in time.monotonic()

    def slot(self, key: str | bytes) -> int:
        """Keys of one slot may stand in one command."""
        return 0

    def slot_of(self, words: Sequence[Any]) -> int:
        """The slot of a command."""
        return 0

    def at(self, slot: int) -> Node:
        """Who takes what is written there."""
        return self.primaries[0]

    def node(self, redirected: AskError, beside: Node) -> Node:
        """Whom a server names instead of itself."""
        raise redirected

    def probes(self) -> list[str]:
        """Keys that have to be written to see whether everybody takes writes."""
        return [_PROBE]

    async def find(self) -> None:
        """Look who takes the writes. One search at a time, which goes on when who waits for it has left."""
        await asyncio.shield(self._search())

    def find_soon(self) -> None:
        """Look again without waiting for it, but not all the time."""
        if time.monotonic() - self._searched >= _FINDS_EVERY:
            self._search()

    def look(self) -> None:
        """Take notice of changes that no server tells of."""

    def _search(self) -> asyncio.Future[None]:
        if self._searching is None or self._searching.done():
            self._searched = time.monotonic()
            self._searching = asyncio.ensure_future(self._find())
            self._searching.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._searching

    async def _find(self) -> None:
        """One server is where it is."""

    @property
    def nodes(self) -> Collection[Node]:
        """Whoever is connected to for requests."""
        return self.primaries

    def give_up(self) -> None:
        """Nobody waits for a connection any longer."""
        for node in self.nodes:
            for pool in node.pools:
                pool.give_up()

    async def drop(self) -> None:
        """Close the connections; those that are in use when they are given back."""
        await asyncio.gather(*(node.drop() for node in self.nodes))

    async def aclose(self) -> None:
        if self._searching is not None:
            self._searching.cancel()
            await asyncio.wait((self._searching,))
        await asyncio.gather(*(node.aclose() for node in self.nodes))


class Sentinels(Topology):
    """The primary of a service, as its Sentinels name it."""

    def __init__(self, parts: SplitResult) -> None:
        super().__init__()
        self._service, _, database = parts.path.strip("/").partition("/")
        self._url = _urls(parts, database or "0")
        ask = _urls(parts, "0")
        # A Sentinel often has no password where its servers have one.
        self._asked = [
            [Node(url) for url in dict.fromkeys((ask(*host), ask(*host, known=False)))]
            for host in hosts(parts.netloc, STORES[parts.scheme])
        ]

    @property
    def service(self) -> str:
        """What its Sentinels call it."""
        return self._service

    @property
    def sentinels(self) -> list[Node]:
        """Its Sentinels, each as it is asked."""
        return [asked[0] for asked in self._asked]

    def look(self) -> None:
        # A primary that is well when another one is promoted hears of it seconds later, and takes writes until then.
        self.find_soon()

    async def _find(self) -> None:
        said = await _all(self._ask(sentinel) for sentinel in self._asked)
        if not said:
            raise NotFound("has no Sentinel that answers")
        named = Counter(address for address in said if address is not None)
        if not named:
            raise NotFound(f'has no primary "{self._service}" that a Sentinel knows')
        held = self.primaries[0] if self.primaries else None
        for (host, port), votes in named.most_common():
            node = Node(self._url(host, port))
            if held is not None and held.url == node.url:
                node = held
            elif held is not None and votes * 2 <= len(self._asked) and await _primary(held):
                return  # a Sentinel that was cut off tells old news
            if await _primary(node):
                self.primaries = (node,)
                if held is not None and held is not node:
                    await held.drop()
                return
            if node is not held:
                await node.aclose()
        raise NotFound("has no primary at the moment")

    async def _ask(self, sentinel: list[Node]) -> tuple[str, int] | None:
        words = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        for place, node in enumerate(sentinel):
            try:
                said = await node.send(words, {}, patient=False, asking=False)
            except redis.exceptions.RedisError as refusal:
                if place + 1 == len(sentinel) or why(refusal) != _UNABLE["WRONGPASS"]:
                    raise
            else:
                del sentinel[:place]  # asked so from now on
                return None if said is None else (said[0].decode(), int(said[1]))
        return None

    async def aclose(self) -> None:
        await super().aclose()
        await asyncio.gather(*(node.aclose() for sentinel in self._asked for node in sentinel))


class Cluster(Topology):
    """A cluster: every key is written on the node of its slot."""

    def __init__(self, parts: SplitResult) -> None:
        super().__init__()
        self._url = _urls(parts, "0")
        self._seeds = {self._url(*host): Node(self._url(*host)) for host in hosts(parts.netloc, STORES[parts.scheme])}
        self._nodes: dict[str, Node] = dict(self._seeds)
        self._slots: list[Node] = []
        self._probes: list[str] = []

    def slot(self, key: str | bytes) -> int:
        slot: int = key_slot(key.encode() if isinstance(key, str) else key)
        return slot

    def slot_of(self, words: Sequence[Any]) -> int:
        name = words[0]
        if name in ("EVALSHA", "EVAL"):
            return self.slot(words[3]) if words[2] else 0
        if name in ("XREAD", "XREADGROUP"):
            return self.slot(words[words.index(b"STREAMS") + 1])
        return self.slot(words[1]) if len(words) > 1 and isinstance(words[1], str | bytes) else 0

    def at(self, slot: int) -> Node:
        return self._slots[slot]

    def node(self, redirected: AskError, beside: Node) -> Node:
        # A node that does not know its own name leaves it out.
        node = self._node(redirected.host or urlsplit(beside.url).hostname or "", redirected.port)
        if isinstance(redirected, MovedError):
            self._slots[redirected.slot_id] = node
            self.find_soon()
        return node

    def probes(self) -> list[str]:
        return self._probes

    def _node(self, host: str, port: int) -> Node:
        url = self._url(host, port)
        if url not in self._nodes:
            self._nodes[url] = Node(url)
        return self._nodes[url]

    async def _find(self) -> None:
        """Ask every node that is known, and believe most of them: one that is cut off says what was."""
        said = await _all(self._ask(node) for node in list(self._nodes.values()))
        if not said:
            raise NotFound("has no node that answers")
        (ranges, _), *_ = Counter(said).most_common()
        slots: list[Node | None] = [None] * _SLOTS
        for first, last, host, port in ranges:
            slots[first : last + 1] = [self._node(host, port)] * (last + 1 - first)
        covered = [node for node in slots if node is not None]
        if len(covered) < _SLOTS:
            raise NotFound("is a cluster in which nobody has some of the slots")
        self._slots = covered
        self.primaries = tuple(dict.fromkeys(covered))
        self._probes = self._keys_of_all()
        left = [url for url, node in self._nodes.items() if node not in self.primaries and url not in self._seeds]
        await asyncio.gather(*(self._nodes.pop(url).drop() for url in left))

    async def _ask(self, node: Node) -> tuple[tuple[int, int, str, int], ...]:
        """Its slots: first, last, and whose they are."""
        answer = await node.send(("CLUSTER", "SLOTS"), {}, patient=False, asking=False)
        itself = urlsplit(node.url).hostname or ""
        return tuple(sorted((int(a), int(b), owner[0].decode() or itself, int(owner[1])) for a, b, owner, *_ in answer))

    def _keys_of_all(self) -> list[str]:
        """A key for each primary, as far as some tries find one."""
        found: dict[Node, str] = {}
        for number in range(_PROBES_TRIED):
            key = f"{{gateway:{number}}}:probe" if number else _PROBE
            found.setdefault(self.at(self.slot(key)), key)
            if len(found) == len(self.primaries):
                break
        return list(found.values())

    @property
    def nodes(self) -> Collection[Node]:
        return self._nodes.values()


def opened(address: str) -> Topology:
    """What stands behind an address that Settings has accepted. Nothing is connected yet."""
    parts = urlsplit(address)
    kinds: dict[str, Callable[[SplitResult], Topology]] = {"sentinel": Sentinels, "cluster": Cluster}
    kind = kinds.get(parts.scheme.partition("+")[2])
    return Topology((Node(address),)) if kind is None else kind(parts)


def _urls(parts: SplitResult, database: str) -> Callable[..., str]:
    """The address of a host as redis-py reads it, with the password and the options of the whole."""
    scheme, user = parts.scheme.partition("+")[0], parts.netloc.rpartition("@")[0]

    def url(host: str, port: int, *, known: bool = True) -> str:
        who = f"{user}@" if user and known else ""
        query = f"?{parts.query}" if parts.query else ""
        return f"{scheme}://{who}{f'[{host}]' if ':' in host else host}:{port}/{database}{query}"

    return url


async def _all(questions: Iterable[Awaitable[Any]]) -> list[Any]:
    """The answers of those who answer in time. Raises what the last one refused with where all of them refuse."""

    async def one(question: Awaitable[Any]) -> Any:
        async with asyncio.timeout(_ASKED_SECONDS):
            return await question

    said = await asyncio.gather(*map(one, questions), return_exceptions=True)
    answers = [answer for answer in said if not isinstance(answer, BaseException)]
    refusals = [answer for answer in said if isinstance(answer, BaseException)]
    if not answers and refusals and all(isinstance(refusal, Failures) for refusal in refusals):
        raise refusals[-1]
    return answers


async def _primary(node: Node) -> bool:
    """Whether a server says that it is a primary."""
    try:
        async with asyncio.timeout(_ASKED_SECONDS):
            role = await node.send(("ROLE",), {}, patient=False, asking=False)
    except redis.exceptions.NoPermissionError:
        return True  # it may not say: the first write will
    except Failures:
        return False
    return bool(role[0] in (b"master", "master"))


# — commands


class Client(AsyncCoreCommands):
    """The commands of redis-py, each sent to the server that takes it. `patient`: reads that wait for news.

    Not here: transactions and everything else that holds a connection. What has to happen at once is a script.
    """

    _event_dispatcher = EventDispatcher()  # redis-py's commands expect one

    def __init__(self, topology: Topology, *, patient: bool = False) -> None:
        self._topology = topology
        self._patient = patient

    async def execute_command(self, *words: Any, **options: Any) -> Any:
        """The answer to a command. Raises redis-py's errors."""
        topology = self._topology
        if not topology.primaries:
            await topology.find()
        topology.look()
        node, asking, redirections = topology.at(topology.slot_of(words)), False, 0
        while True:
            try:
                return await node.send(words, options, patient=self._patient, asking=asking)
            except AskError as redirected:
                redirections += 1
                if redirections > _REDIRECTIONS:
                    raise
                asking = not isinstance(redirected, MovedError)
                node = topology.node(redirected, node)
            except TryAgainError:  # its slot is on the way: some keys are here, some there; the deadline is around it
                await asyncio.sleep(_TRY_AGAIN_SECONDS)

    def scan_iter(self, *given: Any, **named: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        """Every key of every server; one that moves meanwhile may be told twice."""
        return self._scan(given, named)

    async def _scan(self, given: tuple[Any, ...], named: dict[str, Any]) -> AsyncIterator[Any]:
        if not self._topology.primaries:
            await self._topology.find()
        for node in self._topology.primaries:
            async for key in node.prompt.scan_iter(*given, **named):
                yield key

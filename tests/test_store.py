"""The store: what shares a trip, what is sent once, what a request pays while it is away, and how it comes back."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import redis
import structlog

from gateway.drains import follow
from gateway.embedded import _server_binary
from gateway.errors import StoreUnavailable
from gateway.keys import KeyRing
from gateway.store import Coalesced, Script, Store, StoreAway
from tests.proving import house, stores
from tests.proving.limits import until, wire


@pytest.fixture
def server(either_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(either_store_url) as client:
        yield client


@asynccontextmanager
async def opened(url: str, deadline: float = 5.0) -> AsyncIterator[Store]:
    store = Store(url, deadline=deadline)
    try:
        yield store
    finally:
        await store.aclose()


def calls(client: redis.Redis, command: str) -> int:
    stats: Any = client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


def script(text: str) -> Script:
    """A script of a test's own."""
    made = Script("probe")
    made.text = f"#!lua\n{text}"
    made.sha = hashlib.sha1(made.text.encode()).hexdigest()
    return made


# Answers each request with its own words and how many keys the whole call has.
TELL = script("""
    local replies = {}
    for place, words in ipairs(cmsgpack.unpack(ARGV[1])) do replies[place] = {words[1], #KEYS, ARGV[2]} end
    return replies
""")
COUNT = script("return redis.call('INCR', KEYS[1])")


async def ping(store: Store) -> bool:
    answer: bool = await store.call(lambda: store.client.ping())
    return answer


# — coalescing


@pytest.mark.parametrize(("requests", "trips"), [(1, 1), (2, 1), (64, 1), (65, 2), (150, 3)])
async def test_what_waits_in_one_turn_travels_in_one_call_and_each_gets_his_own_answer(
    either_store_url: str, server: redis.Redis, requests: int, trips: int
) -> None:
    async with opened(either_store_url) as store:
        await store.run(TELL, ["known"], [b"\x90", 0])
        tell = Coalesced(store, TELL, (7,))
        server.config_resetstat()
        answers = await asyncio.gather(*(tell(([f"k{i}", "shared"], (i,))) for i in range(requests)))
        assert calls(server, "evalsha") == trips
        assert [answer[0] for answer in answers] == list(range(requests))
        assert {answer[2] for answer in answers} == {b"7"}
        assert [answers[64 * trip][1] for trip in range(trips)] == [
            2 * min(64, requests - 64 * trip) for trip in range(trips)
        ]


async def test_requests_of_very_many_keys_travel_in_several_calls(either_store_url: str) -> None:
    """Sixty-four requests of 140 keys are more than one script call can take."""
    async with opened(either_store_url) as store:
        tell = Coalesced(store, TELL, (7,))
        answers = await asyncio.gather(*(tell(([f"k{i}"] * 140, (i,))) for i in range(64)))
        assert [answer[0] for answer in answers] == list(range(64))
        assert max(answer[1] for answer in answers) == 4000 // 140 * 140


async def test_a_caller_who_leaves_does_not_take_the_others_answers_along(either_store_url: str) -> None:
    async with opened(either_store_url) as store:
        tell = Coalesced(store, TELL, (7,))
        asking = [tell(([f"k{i}"], (i,))) for i in range(10)]
        await asyncio.sleep(0)
        for one in asking[::2]:
            one.cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [one.cancelled() for one in asking] == [True, False] * 5
        assert [answer[0] for answer in answers[1::2] if not isinstance(answer, BaseException)] == [1, 3, 5, 7, 9]


async def test_scripts_that_the_server_has_forgotten_are_not_missed(either_store_url: str, server: redis.Redis) -> None:
    async with opened(either_store_url) as store:
        for counted in range(1, 6):
            server.script_flush()
            assert await store.run(COUNT, ["counter"], []) == counted


async def test_what_fails_for_one_call_fails_for_its_callers_and_nobody_else(either_store_url: str) -> None:
    async with opened(either_store_url) as store:
        broken, sound = Coalesced(store, script("return nothing.at_all"), ()), Coalesced(store, TELL, (7,))
        failing = [broken((["k"], (1,))), broken((["k"], (2,)))]
        assert (await sound((["k"], (3,))))[0] == 3
        for future in failing:
            with pytest.raises(redis.exceptions.ResponseError):
                await future
        assert not store.away


# — deadlines


async def test_a_store_that_was_slow_once_is_given_up_for_that_call_only(either_store_url: str) -> None:
    """A probe is sent at once: it is answered, and so the store is not away."""
    async with wire(either_store_url) as line, opened(line.url, 0.25) as store:
        for _ in range(5):
            line.deaf = True
            with pytest.raises(StoreUnavailable):
                await ping(store)
            line.deaf = False
            assert store._checking is not None
            await store._checking
            assert await ping(store)
        assert not store.away


async def test_a_silent_store_is_away_after_one_request_and_one_probe(either_store_url: str) -> None:
    """However rare requests are: the second one pays nothing."""
    async with wire(either_store_url) as line, opened(line.url, 0.25) as store:
        await ping(store)
        line.deaf = True
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await ping(store)
        await until(lambda: store.away)
        assert time.monotonic() - started < 2 * 0.25 + 0.2
        assert store.reason == "does not answer"


async def test_while_it_is_away_nothing_is_sent_and_calls_fail_at_once(either_store_url: str) -> None:
    async with wire(either_store_url) as line, opened(line.url, 0.25) as store:
        line.deaf = True
        with pytest.raises(StoreUnavailable):
            await ping(store)
        await until(lambda: store.away)
        sent, started = line.lost, time.monotonic()
        for _ in range(1000):
            with pytest.raises(StoreAway):
                await store.call(lambda: store.client.set("k", "v"))
            with pytest.raises(StoreAway):
                await store.wait(lambda: store.patient.set("k", "v"))
        assert time.monotonic() - started < 1
        assert line.lost - sent <= 4  # of the probes
        line.deaf = False
        await asyncio.wait_for(store.back(), 3)
        assert await store.call(lambda: store.client.get("k")) is None


@pytest.mark.parametrize("fault", ["deaf", "cuts"])
async def test_a_command_whose_answer_is_lost_is_not_sent_again(
    either_store_url: str, server: redis.Redis, fault: str
) -> None:
    async with wire(either_store_url) as line, opened(line.url, 0.25) as store:
        await ping(store)
        setattr(line, fault, True)
        with pytest.raises(StoreUnavailable):
            await store.call(lambda: store.client.incr("counter"))
        with suppress(StoreUnavailable):
            await store.run(COUNT, ["other"], [])
        line.deaf = False
        await store.back()
        await ping(store)
        assert server.get("counter") == b"1"


async def test_connections_do_not_pile_up_before_a_slow_store(either_store_url: str) -> None:
    async with wire(either_store_url) as line, opened(line.url) as store:
        line.held.clear()
        waiting = [asyncio.ensure_future(ping(store)) for _ in range(200)]
        await until(lambda: line.connections >= 8)
        line.held.set()
        assert await asyncio.gather(*waiting) == [True] * 200
        assert line.connections == 8


async def test_a_late_store_is_one_that_does_not_answer_and_no_connections_pile_up(either_store_url: str) -> None:
    """R4: every answer comes, but not within the deadline."""
    async with line_to(either_store_url, 0.08) as line, opened(line.url, 0.05) as store:
        paid = []
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await store.run(COUNT, ["counter"], [])
            paid.append(time.monotonic() - started)
            await asyncio.sleep(0.005)
        assert sum(each > 0.03 for each in paid) <= 3
        assert line.connections <= 8


@pytest.mark.parametrize("way", ["command", "script"])
async def test_an_answer_reaches_the_caller_who_asked_whoever_left_before(either_store_url: str, way: str) -> None:
    """A caller who is cancelled between asking and hearing must not leave his answer to the next one."""
    echo = script("return ARGV[1]")
    async with opened(either_store_url) as store:

        async def ask(text: str) -> str:
            if way == "script":
                answer: bytes = await store.run(echo, [], [text])
            else:
                answer = await store.call(lambda: store.client.echo(text))
            return answer.decode()

        heard = 0
        for round_ in range(20):
            asking = [asyncio.ensure_future(ask(f"{round_}:{i}")) for i in range(40)]
            for turn in range(12):
                await asyncio.sleep(0)
                for one in asking[turn::13]:
                    one.cancel()
            for i, answer in enumerate(await asyncio.gather(*asking, return_exceptions=True)):
                if not isinstance(answer, BaseException):
                    assert answer == f"{round_}:{i}"
                    heard += 1
            assert await ask("at last") == "at last"
        assert 0 < heard < 800


# — a server that answers, but does not do its work


@contextmanager
def setting(client: Any, **values: Any) -> Iterator[None]:
    """Other settings of a server, until the block is left."""
    before = {name: client.config_get(name.replace("_", "-"))[name.replace("_", "-")] for name in values}
    try:
        for name, value in values.items():
            client.config_set(name.replace("_", "-"), value)
        yield
    finally:
        for name, value in before.items():
            client.config_set(name.replace("_", "-"), value)


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    with setting(client, maxmemory=1):
        yield


@contextmanager
def replica(client: redis.Redis) -> Iterator[None]:
    client.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        client.replicaof("NO", "ONE")


@contextmanager
def alone(client: redis.Redis) -> Iterator[None]:
    with setting(client, min_replicas_to_write=1):
        yield


Fault = Callable[[redis.Redis], AbstractContextManager[None]]
UNABLE: dict[Fault, str] = {
    full: "is full (maxmemory)",
    replica: "is a replica, which takes no writes",
    alone: "has too few replicas to write (NOREPLICAS)",
}


def clients(server: Any) -> set[str]:
    """Who is connected."""
    return {client["id"] for client in server.client_list()}


@pytest.mark.parametrize("fault", UNABLE)
async def test_a_server_that_does_not_write_is_away_until_it_does_however_well_it_answers(
    either_store_url: str, server: redis.Redis, fault: Fault
) -> None:
    """R6, a demoted primary, one that was left alone. A PING would not notice any of them; nothing is half written."""
    twice = script("redis.call('INCR', KEYS[1]) return redis.call('INCR', KEYS[2])")
    others = clients(server)
    async with opened(either_store_url, 1.0) as store:
        assert await store.run(twice, ["one", "other"], []) == 1
        await until(lambda: not store._tasks)
        before = clients(server) - others
        with structlog.testing.capture_logs() as logs:
            with fault(server):
                with pytest.raises(StoreUnavailable):
                    await store.run(twice, ["one", "other"], [])
                assert (store.away, store.reason) == (True, UNABLE[fault])
                await asyncio.sleep(1.3)  # for a probe or two
                assert (store.away, store.reason) == (True, UNABLE[fault])
                assert server.ping()
            if fault is replica:
                server.set("one", 1)
                server.set("other", 1)
            await asyncio.wait_for(store.back(), 3)
        assert await store.run(twice, ["one", "other"], []) == 2
        assert server.get("one") == b"2"
        assert before
        assert not before & clients(server), "behind a name there may be another server now"
        assert [(line["event"], line["log_level"], line.get("reason")) for line in logs] == [
            ("store_away", "error", UNABLE[fault]),
            ("store_back", "info", None),
        ]
        assert 1.3 <= logs[1]["seconds"] < 5


@pytest.mark.parametrize("binary", ["valkey-server", "redis-server"])
async def test_a_server_that_cannot_write_its_disk_is_away_until_it_can(binary: str) -> None:
    """R17: its snapshots fail, because a folder stands where the file should be."""
    found = _server_binary() if binary == "valkey-server" else shutil.which(binary)
    if found is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    with stores.node(found, dbfilename="in-the-way", save="3600 1") as node:
        (node.folder / "in-the-way").mkdir()
        async with opened(node.url, 1.0) as store:
            assert await store.run(COUNT, ["counter"], []) == 1
            node.ask("BGSAVE")
            await until(lambda: "rdb_last_bgsave_status:err" in node.ask("INFO", "persistence"))
            with pytest.raises(StoreUnavailable):
                await store.run(COUNT, ["counter"], [])
            assert (store.away, store.reason) == (True, "cannot write to its disk (MISCONF)")
            await asyncio.sleep(1)
            assert store.away
            (node.folder / "in-the-way").rmdir()
            node.ask("BGSAVE")
            await asyncio.wait_for(store.back(), 3)
            assert await store.run(COUNT, ["counter"], []) == 2


async def test_a_server_in_somebodys_script_is_away_until_it_ends(either_store_url: str, server: redis.Redis) -> None:
    """R12."""

    def forever() -> None:
        with redis.Redis.from_url(either_store_url, socket_timeout=None) as somebody, suppress(redis.RedisError):
            somebody.eval("while true do end", 0)

    async with opened(either_store_url, 1.0) as store:
        with setting(server, busy_reply_threshold=1):
            running = asyncio.ensure_future(asyncio.to_thread(forever))
            try:
                with pytest.raises(StoreUnavailable):
                    while True:
                        await store.run(COUNT, ["counter"], [])
                assert (store.away, store.reason) == (True, "is busy with somebody's script")
            finally:
                server.script_kill()
                await running
        await asyncio.wait_for(store.back(), 3)
        assert await store.run(COUNT, ["other"], []) == 1


async def test_a_server_without_a_free_connection_is_away_until_there_is_one(
    either_store_url: str, server: redis.Redis
) -> None:
    """R16."""
    connected: Any = server.info("clients")
    async with opened(either_store_url, 1.0) as store:
        with setting(server, maxclients=connected["connected_clients"]):
            with pytest.raises(StoreUnavailable):
                await ping(store)
            # Which of them depends on whether its last words are read before the connection is reset.
            assert store.away
            assert store.reason in ("has no connection left (maxclients)", "lost the connection")
            await asyncio.sleep(1)
            assert store.away
        await asyncio.wait_for(store.back(), 3)
        assert await ping(store)


# What the probe needs of a server, which is less than what the scripts of limits need.
LEAST = ("on", ">right", "resetkeys", "~{gateway}:probe", "resetchannels", "-@all", "+evalsha", "+eval", "+set")


@pytest.fixture
def person(server: Any) -> Iterator[Any]:
    """A server with a user `ann`, whose password is `right`."""
    server.execute_command("ACL", "SETUSER", "ann", *LEAST)
    yield server
    server.acl_deluser("ann")


def address(url: str, user: str, password: str) -> str:
    return url.replace("unix://", f"unix://{user}:{password}@")


async def test_a_wrong_password_is_told_without_it(either_store_url: str, person: Any) -> None:
    """R15."""
    with structlog.testing.capture_logs() as logs:
        async with opened(address(either_store_url, "ann", "canary"), 1.0) as store:
            with pytest.raises(StoreUnavailable) as refused:
                await ping(store)
            assert (store.away, store.reason) == (True, "refuses the password")
            await asyncio.sleep(1)
            assert store.away
            person.execute_command("ACL", "SETUSER", "ann", ">canary")
            await asyncio.wait_for(store.back(), 3)
    assert "canary" not in repr(logs) + str(refused.value) + repr(store)


async def test_a_password_that_is_missing_is_told(either_store_url: str, server: redis.Redis) -> None:
    with setting(server, requirepass="right"):
        async with opened(either_store_url, 1.0) as store:
            with pytest.raises(StoreUnavailable):
                await ping(store)
            assert (store.away, store.reason) == (True, "wants a password")


async def test_what_a_user_may_not_do_is_told_and_the_least_of_rights_is_enough_to_answer(
    either_store_url: str, person: Any
) -> None:
    """R15. Nothing is asked for that a script does not need: no PING, no INFO, no CONFIG."""
    probe = Script("probe")
    async with opened(address(either_store_url, "ann", "right"), 1.0) as store:
        assert await store.run(probe, ["{gateway}:probe"], [1000]) == 1
        person.execute_command("ACL", "SETUSER", "ann", "-set")
        with pytest.raises(StoreUnavailable):
            await store.run(probe, ["{gateway}:probe"], [1000])
        assert (store.away, store.reason) == (True, "does not permit a command that the gateway needs (NOPERM)")
        person.execute_command("ACL", "SETUSER", "ann", "+set")
        await asyncio.wait_for(store.back(), 3)
        assert await store.run(probe, ["{gateway}:probe"], [1000]) == 1
        assert store.warnings == ()


# — settings that lose limits


async def test_a_store_that_evicts_is_told_at_the_start_and_whenever_it_comes_back(
    either_store_url: str, server: redis.Redis
) -> None:
    """R14."""
    async with opened(either_store_url, 1.0) as store:
        with structlog.testing.capture_logs() as logs:
            await ping(store)
            await until(lambda: not store._tasks)
            assert (store.warnings, logs) == ((), [])
            with setting(server, maxmemory_policy="allkeys-lru"):
                with replica(server), pytest.raises(StoreUnavailable):
                    await store.run(COUNT, ["counter"], [])
                await store.back()
                await ping(store)
                await until(lambda: store.warnings)
                assert [line["event"] for line in logs] == ["store_away", "store_back", "store_evicts"]
                assert (logs[2]["log_level"], logs[2]["policy"]) == ("error", "allkeys-lru")
        assert store.warnings == (
            'maxmemory-policy is "allkeys-lru", expected "noeviction": a store that is full would forget limits',
        )


# — a store that dies


async def test_a_store_that_is_killed_is_away_at_once_and_comes_back_by_itself() -> None:
    """R2. A refused connection is not waited for."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        first = house.start(_server_binary(), folder)
        try:
            async with opened(first.url) as store:
                await ping(store)
                first.process.kill()
                first.process.wait()
                started = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await ping(store)
                assert (store.away, store.reason) == (True, "lost the connection")
                assert time.monotonic() - started < 0.25
                await until(lambda: store.reason == "refuses the connection")
                first = house.start(_server_binary(), folder)
                await asyncio.wait_for(store.back(), 2)
                assert (await ping(store), store.reason) == (True, "")
        finally:
            first.process.kill()
            first.process.wait()


async def test_whoever_waits_for_a_connection_to_a_store_that_is_lost_waits_no_longer(either_store_url: str) -> None:
    async with wire(either_store_url) as line, opened(line.url, 30.0) as store:
        line.held.clear()
        waiting = [asyncio.ensure_future(ping(store)) for _ in range(200)]
        await until(lambda: line.connections == 8)
        line.cuts = True
        line.held.set()
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(answer, StoreUnavailable) for answer in answers)


async def test_a_store_that_is_killed_while_nobody_asks_is_away_for_who_waits_for_news() -> None:
    with house.server(_server_binary()) as server:
        async with opened(server.url) as store:
            waiting = asyncio.ensure_future(store.wait(lambda: store.patient.xread({"news": "$"}, block=10_000)))
            while not server.sync().info("clients")["blocked_clients"]:
                await asyncio.sleep(0.01)
            server.process.kill()
            with pytest.raises(StoreUnavailable):
                await waiting
            await until(lambda: store.away)


async def test_a_connection_that_is_cut_while_it_waits_for_news_does_not_make_the_store_away(
    either_store_url: str, server: Any
) -> None:
    async with opened(either_store_url) as store:
        for _ in range(3):
            waiting = asyncio.ensure_future(store.wait(lambda: store.patient.xread({"news": "$"}, block=10_000)))
            while not server.info("clients")["blocked_clients"]:
                await asyncio.sleep(0.01)
            server.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            with pytest.raises(StoreUnavailable):
                await waiting
            assert store._checking is not None
            await store._checking
            assert not store.away


async def test_a_store_that_is_stopped_for_a_while_is_used_again_when_it_goes_on() -> None:
    """R3: one request pays the deadline, and those that are under way with it; then nobody."""
    with house.server(_server_binary()) as server:
        async with opened(server.url, 0.25) as store:
            await ping(store)
            server.process.send_signal(signal.SIGSTOP)
            paid = []
            for _ in range(200):
                started = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await ping(store)
                paid.append(time.monotonic() - started)
                await asyncio.sleep(0.01)
            assert max(paid) < 0.25 + 0.2
            assert sum(each > 0.1 for each in paid) <= 2
            server.process.send_signal(signal.SIGCONT)
            started = time.monotonic()
            await store.back()
            assert time.monotonic() - started < 2
            assert await ping(store)


async def test_a_store_that_was_never_there_is_told_at_once_and_used_when_it_comes() -> None:
    """R1."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        async with opened(f"unix://{folder}/s") as store:
            with pytest.raises(StoreUnavailable):
                await ping(store)
            assert (store.away, store.reason) == (True, "has no socket there")
            server = house.start(_server_binary(), folder)
            try:
                await asyncio.wait_for(store.back(), 2)
                assert await ping(store)
            finally:
                server.process.kill()
                server.process.wait()


async def test_a_store_that_is_away_can_be_closed_while_somebody_waits_for_it() -> None:
    async with asyncio.timeout(5):
        async with opened("unix:///nowhere/s") as store:
            with pytest.raises(StoreUnavailable):
                await ping(store)
            waiting = asyncio.ensure_future(store.back())
            await asyncio.sleep(0.5)
            waiting.cancel()
        assert "away" in repr(store)


async def test_a_store_that_comes_and_goes_is_not_stormed(store_url: str) -> None:
    """R5: up for a second, down for a second. A worker with requests and followers connects, and tries to connect,
    twice a second at most."""
    seconds = 8
    async with line_to(store_url, 0) as line, opened(line.url, 0.25) as store:
        keys = KeyRing(store, b"of the tests")
        following = [asyncio.ensure_future(keys.follow()), asyncio.ensure_future(follow(store, lambda names: None))]
        await asyncio.gather(*(ping(store) for _ in range(20)))
        assert line.connections <= 9
        line.connections = line.refused = served = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            line.up = int(end - time.monotonic()) % 2 == 0
            for answer in await asyncio.gather(*(ping(store) for _ in range(20)), return_exceptions=True):
                served += answer is True
            await asyncio.sleep(0.01)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        assert served > 100
        assert line.connections <= 2 * seconds
        assert line.refused <= 2 * seconds


# — wires


class Line:
    """What a test sees of a wire of its own, and does to it."""

    def __init__(self) -> None:
        self.url = ""
        self.up = True
        self.connections = 0
        self.refused = 0


@asynccontextmanager
async def line_to(target: str, delay: float) -> AsyncIterator[Line]:
    """A wire whose answers come later, and that can be taken down."""
    line = Line()
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(delay)
                writer.write(data)
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line.connections += line.up
        line.refused += not line.up
        if line.up:
            there = await asyncio.open_unix_connection(target.removeprefix("unix://"))
            ways = (pump(reader, there[1], 0), pump(there[0], writer, delay))
            pumps = [asyncio.ensure_future(way) for way in ways]
            tasks.update(pumps)
            while line.up and not any(one.done() for one in pumps):
                await asyncio.wait(pumps, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
            for one in pumps:
                one.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        writer.close()

    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        server = await asyncio.start_unix_server(serve, f"{folder}/w")
        line.url = f"unix://{folder}/w"
        try:
            yield line
        finally:
            line.up = False
            server.close()
            await asyncio.gather(*tasks, return_exceptions=True)

"""Stores of several servers: who takes the writes, and how soon it is known who does."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway import topology
from gateway.embedded import _server_binary
from gateway.errors import StoreUnavailable
from gateway.keys import KeyRing
from gateway.store import Coalesced, Store
from gateway.topology import NotFound, why
from tests.proving import stores
from tests.proving.ports import free_ports
from tests.test_store import COUNT, TELL

DEADLINE = 1.0  # these machines are noisy


@asynccontextmanager
async def opened(url: str, deadline: float = DEADLINE) -> AsyncIterator[Store]:
    store = Store(url, deadline=deadline)
    try:
        yield store
    finally:
        await store.aclose()


async def count(store: Store, key: str) -> int:
    counted: int = await store.run(COUNT, [key], [])
    return counted


class Load:
    """Somebody who counts under some keys all the time."""

    def __init__(self, store: Store, *keys: str) -> None:
        self.store = store
        self.counted = dict.fromkeys(keys, 0)
        self.failed = 0
        self.wrong: list[BaseException] = []
        self._enough = False
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while not self._enough:
            for key in self.counted:
                try:
                    self.counted[key] = await count(self.store, key)
                except StoreUnavailable:
                    self.failed += 1
                except Exception as wrong:
                    self.wrong.append(wrong)
            await asyncio.sleep(0.002)

    async def more(self, patience: float) -> None:
        """Until every key is counted once more."""
        before = dict(self.counted)
        async with asyncio.timeout(patience):
            while any(self.counted[key] == before[key] for key in before):
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Count no more; what was begun is counted."""
        self._enough = True
        await self._task


@asynccontextmanager
async def load(store: Store, *keys: str) -> AsyncIterator[Load]:
    made = Load(store, *keys)
    try:
        await made.more(10)
        yield made
    finally:
        await made.stop()


def aside(work: Callable[..., Any], *given: Any) -> Awaitable[Any]:
    """What would stop the event loop."""
    return asyncio.to_thread(work, *given)


# — addresses


def urls(address: str) -> list[str]:
    """The servers that are connected to first."""
    match topology.opened(address):
        case topology.Sentinels(_asked=asked):
            return [node.url for sentinel in asked for node in sentinel]
        case topology.Cluster(_nodes=nodes):
            return list(nodes)
        case one:
            return [node.url for node in one.primaries]


def test_every_server_behind_an_address_has_the_password_and_the_options_of_the_whole() -> None:
    assert urls("unix:///s?db=2") == ["unix:///s?db=2"]
    assert urls("rediss://u:p@h:1/2?ssl_cert_reqs=none") == ["rediss://u:p@h:1/2?ssl_cert_reqs=none"]
    assert urls("rediss+cluster://u:p%40@h,[fd00::3]:2?ssl_ca_certs=/ca") == [
        "rediss://u:p%40@h:6379/0?ssl_ca_certs=/ca",
        "rediss://u:p%40@[fd00::3]:2/0?ssl_ca_certs=/ca",
    ]
    assert urls("redis+sentinel://h,i:2/limits/3") == ["redis://h:26379/0", "redis://i:2/0"]


def test_a_sentinel_is_asked_with_the_password_and_then_without_one() -> None:
    assert urls("redis+sentinel://u:p@h/limits") == ["redis://u:p@h:26379/0", "redis://h:26379/0"]


# — reasons


def wrapped(cause: BaseException) -> redis.exceptions.ConnectionError:
    """As redis-py raises what happened while it connected."""
    failure = redis.exceptions.ConnectionError("Error 1 connecting to canary:6379")
    failure.__context__ = cause
    return failure


def certificate(text: str) -> ssl.SSLCertVerificationError:
    refused = ssl.SSLCertVerificationError(text)
    refused.verify_message = text
    return refused


ANSWERS = {
    "OOM command not allowed when used memory > 'maxmemory'.": "is full (maxmemory)",
    "MISCONF Valkey is configured to save RDB snapshots": "cannot write to its disk (MISCONF)",
    "BUSY Redis is busy running a script.": "is busy with somebody's script",
    "READONLY You can't write against a read only replica.": "is a replica, which takes no writes",
    "NOREPLICAS Not enough good replicas to write.": "has too few replicas to write (NOREPLICAS)",
    "CLUSTERDOWN The cluster is down": "is a cluster that is down",
    "MASTERDOWN Link with MASTER is down": "is a replica without its primary",
    "LOADING Redis is loading the dataset in memory": "is still loading its data",
    "NOAUTH Authentication required.": "wants a password",
    "WRONGPASS invalid username-password pair or user is disabled.": "refuses the password",
    "NOPERM this user has no permissions": "does not permit a command that the gateway needs (NOPERM)",
    "ERR max number of clients reached": "has no connection left (maxclients)",
    "ERR AUTH <password> called without any password configured": "refuses the password",
    "ERR This instance has cluster support disabled": "is no cluster, expected redis:// before its address",
    "MOVED 1 canary:6379": "is a node of a cluster, expected redis+cluster:// before its address",
    "ERR DB index is out of range": "has no database of that number",
    "ERR No such master with that name": "knows no service of that name",
    "ERR unknown command 'SENTINEL', with args beginning with: 'canary'": (
        "is no Sentinel, expected redis:// before its address"
    ),
    "WRONGTYPE Operation against a key holding the wrong kind of value": None,
    "ERR unknown command 'canary'": None,
    "CROSSSLOT Keys in request don't hash to the same slot": None,
    "NOSCRIPT No matching script.": None,
}
LOST = {
    ConnectionRefusedError(111, "canary"): "refuses the connection",
    FileNotFoundError(2, "canary"): "has no socket there",
    TimeoutError(): "does not answer",
    certificate("certificate has expired"): "has a certificate that is not accepted: certificate has expired",
    ssl.SSLError("canary"): "does not speak TLS as expected",
    socket.gaierror(-2, "canary"): "has a name that does not resolve",
    redis.exceptions.InvalidResponse("canary"): "does not speak the protocol of Redis",
    OSError("canary"): "lost the connection",
    NotFound("has no primary at the moment"): "has no primary at the moment",
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.items())
def test_what_a_server_says_of_itself_is_told_and_what_it_says_of_a_command_is_not(
    answer: str, expected: str | None
) -> None:
    from redis._parsers.base import BaseParser  # what makes exceptions of answers

    made: Any = BaseParser
    assert why(made.parse_error(answer)) == expected


@pytest.mark.parametrize(("cause", "expected"), LOST.items())
def test_why_a_server_is_not_reached_is_told_without_its_address(cause: BaseException, expected: str) -> None:
    assert why(wrapped(cause)) == expected


# — TLS


@pytest.fixture
def keys_of_tls(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate that only who knows it trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -subj /CN=localhost "
        "-addext subjectAltName=IP:127.0.0.1 -days 1".split(),
        check=True,
        capture_output=True,
    )
    return key, certificate


@contextmanager
def tls(keys: tuple[Path, Path]) -> Iterator[tuple[stores.Node, str]]:
    """A server that speaks TLS, too, and its address."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    key, certificate = keys
    port = free_ports(1)[0]
    options: dict[str, Any] = {
        "tls_cert_file": certificate,
        "tls_key_file": key,
        "tls_auth_clients": "no",
        "tls_port": port,
    }
    with stores.node(binary, **options) as server:
        yield server, f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"


async def test_a_certificate_that_nobody_trusts_is_told_and_one_that_is_trusted_serves(
    keys_of_tls: tuple[Path, Path],
) -> None:
    """R15."""
    with tls(keys_of_tls) as (_, address):
        async with opened(address.partition("?")[0]) as store:
            with pytest.raises(StoreUnavailable):
                await count(store, "k")
            assert store.reason == "has a certificate that is not accepted: self-signed certificate"
        async with opened(address) as store:
            assert await count(store, "k") == 1


async def test_a_silent_store_behind_tls_is_used_again_when_it_goes_on(keys_of_tls: tuple[Path, Path]) -> None:
    """R3. It does not agree to the end of a connection either, which is given five seconds for it."""
    with tls(keys_of_tls) as (server, address):
        async with opened(address) as store:
            await count(store, "k")
            await asyncio.gather(*(count(store, "k") for _ in range(2)))
            server.stop()
            with pytest.raises(StoreUnavailable):
                await count(store, "k")
            await asyncio.sleep(DEADLINE + 5.5)
            assert store.away
            server.go_on()
            await asyncio.wait_for(store.back(), 3)
            assert await count(store, "k")


# — Sentinels


@pytest.fixture(params=["valkey-server", "redis-server"])
def binary(request: pytest.FixtureRequest) -> str:
    found = _server_binary() if request.param == "valkey-server" else shutil.which(request.param)
    if found is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    return found


@pytest.fixture
def watched(binary: str) -> Iterator[stores.Watched]:
    with stores.watched(binary) as found:
        yield found


async def test_a_primary_that_is_promoted_while_the_old_one_is_well_gets_the_writes_within_a_second(
    watched: stores.Watched,
) -> None:
    """R7. The old one takes writes for seconds more, and says nothing: what it counts then is lost."""
    async with opened(watched.url) as store, load(store, "k") as counting:
        second = await aside(watched.fail_over)
        promoted, before = time.monotonic(), await aside(second.ask, "GET", "k")
        while await aside(second.ask, "GET", "k") == before:
            assert time.monotonic() - promoted < 1.5
            await asyncio.sleep(0.01)
        assert (counting.wrong, store.away) == ([], False)


async def test_a_primary_that_dies_is_away_until_a_second_after_its_successor_is_there(watched: stores.Watched) -> None:
    """R7."""
    async with opened(watched.url) as store, load(store, "k") as counting:
        first = watched.primary
        first.kill()
        second = await aside(watched.promoted, first)
        promoted = time.monotonic()
        await counting.more(1.5)
        assert time.monotonic() - promoted < 1.5
        assert int(second.ask("GET", "k")) > 0
        assert (counting.failed > 0, counting.wrong, store.away) == (True, [], False)


async def test_a_demoted_primary_is_left_for_the_new_one(watched: stores.Watched) -> None:
    """READONLY is the news of a failover, when no connection was lost."""
    async with opened(watched.url) as store:
        assert await count(store, "k") == 1
        first = watched.primary
        second = await aside(watched.fail_over)
        first.ask("REPLICAOF", "127.0.0.1", second.port)
        demoted = time.monotonic()
        while True:
            try:
                await count(store, "k")
                break
            except StoreUnavailable:
                await asyncio.sleep(0.01)
        assert time.monotonic() - demoted < 2
        assert int(second.ask("GET", "k")) >= 1


async def test_sentinels_that_are_silent_or_gone_do_not_hide_the_primary(watched: stores.Watched) -> None:
    watched.sentinels[0].stop()
    watched.sentinels[1].kill()
    try:
        async with opened(watched.url, 5.0) as store:
            assert await count(store, "k") == 1
    finally:
        watched.sentinels[0].go_on()


async def test_a_service_that_no_sentinel_knows_is_told_and_so_is_that_no_sentinel_is_there(
    watched: stores.Watched,
) -> None:
    async with opened(watched.url.replace("/limits", "/canary"), 5.0) as store:
        with pytest.raises(StoreUnavailable):
            await count(store, "k")
        assert store.reason == 'has no primary "canary" that a Sentinel knows'
        for sentinel in watched.sentinels:
            sentinel.kill()
        async with asyncio.timeout(5):
            while store.reason != "refuses the connection":
                await asyncio.sleep(0.01)


async def test_a_password_of_the_servers_is_not_needed_by_their_sentinels(watched: stores.Watched) -> None:
    watched.primary.ask("ACL", "SETUSER", "ann", "on", ">right", "~*", "+@all")
    async with opened(watched.url.replace("://", "://ann:right@"), 5.0) as store:
        assert await count(store, "k") == 1


@contextmanager
def sentinels(binary: str, *named: stores.Node) -> Iterator[list[stores.Node]]:
    """Sentinels that each name another server, as they do who are cut off. They are too few to change anything."""
    with ExitStack() as stack:
        rules = [f"sentinel monitor {stores.SERVICE} 127.0.0.1 {server.port} 9" for server in named]
        yield [stack.enter_context(stores.node(binary, None, rule)) for rule in rules]


def address(asked: list[stores.Node]) -> str:
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in asked)
    return f"redis+sentinel://{hosts}/{stores.SERVICE}"


async def test_a_server_that_is_named_and_is_no_primary_is_not_believed(binary: str) -> None:
    with stores.node(binary) as primary, stores.node(binary, replicaof=f"127.0.0.1 {primary.port}") as replica:
        with sentinels(binary, replica, replica, primary) as asked:
            async with opened(address(asked), 5.0) as store:
                assert await count(store, "k") == 1
            assert primary.ask("GET", "k") == "1"


async def test_a_sentinel_that_is_alone_does_not_lead_away_from_a_primary_that_is_well(binary: str) -> None:
    with stores.node(binary) as right, stores.node(binary) as wrong:
        with sentinels(binary, right, right, wrong) as asked:
            async with opened(address(asked), 5.0) as store:
                assert await count(store, "k") == 1
                for sentinel in asked[:2]:
                    sentinel.kill()
                end = time.monotonic() + 2.5
                while time.monotonic() < end:
                    await count(store, "k")
                    await asyncio.sleep(0.01)
                assert wrong.ask("GET", "k") is None
                right.kill()
                with pytest.raises(StoreUnavailable):
                    await count(store, "k")
                await asyncio.wait_for(store.back(), 5)  # then there is nobody else to be asked
                assert await count(store, "k") == 1


# — a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[stores.Cluster]:
    with stores.cluster(_server_binary()) as found:
        yield found


@pytest.fixture
def empty(cluster: stores.Cluster) -> stores.Cluster:
    for node in cluster.nodes:
        if node.ask("ROLE")[0] == "master":
            node.ask("FLUSHALL")
    return cluster


def elsewhere(cluster: stores.Cluster, key: str) -> stores.Node:
    """A primary that does not have a key."""
    owner = cluster.owner(key)
    return next(node for node in cluster.nodes if node is not owner and node.ask("ROLE")[0] == "master")


async def test_each_organisation_is_counted_on_the_node_of_its_slot_and_each_node_is_asked(
    empty: stores.Cluster,
) -> None:
    async with opened(empty.url) as store:
        names = [f"{{org{number}}}:k" for number in range(30)]
        assert await asyncio.gather(*(count(store, name) for name in names)) == [1] * 30
        for name in names:
            assert empty.owner(name).ask("GET", name) == "1"
        assert len({empty.owner(name).port for name in names}) == 3
        assert sorted([key.decode() async for key in store.client.scan_iter(match="{org*", count=3)]) == sorted(names)
        assert len(store._topology.probes()) == 3
        assert {empty.owner(key).port for key in store._topology.probes()} == {empty.owner(name).port for name in names}


async def test_what_waits_in_one_turn_travels_in_one_call_for_each_slot(empty: stores.Cluster) -> None:
    async with opened(empty.url) as store:
        tell = Coalesced(store, TELL, (7,))
        asked = [([f"{{org{number % 5}}}:a", f"{{org{number % 5}}}:b"], (number,)) for number in range(50)]
        answers = await asyncio.gather(*map(tell, asked))
        assert [answer[0] for answer in answers] == list(range(50))
        assert {answer[1] for answer in answers} == {20}


async def test_one_node_is_enough_to_find_all_of_them(empty: stores.Cluster) -> None:
    async with opened(f"redis+cluster://127.0.0.1:{empty.nodes[4].port}") as store:
        for number in range(20):
            assert await count(store, f"{{org{number}}}:k") == 1


async def test_a_slot_that_moves_while_its_keys_are_counted_costs_nobody_a_request(empty: stores.Cluster) -> None:
    """R9: ASK while it moves, MOVED when it has moved; every request is counted once."""
    async with opened(empty.url) as store, load(store, "{acme}:k", "{other}:k") as counting:
        for _ in range(3):
            to = await aside(elsewhere, empty, "{acme}:k")
            source = await aside(empty.begin_move, "{acme}:k", to)
            await counting.more(5)
            await aside(empty.move_keys, "{acme}:k", source, to)
            await counting.more(5)
            await aside(empty.end_move, "{acme}:k", source, to)
            await counting.more(5)
            assert empty.owner("{acme}:k") is to
            assert store._topology.at(empty.slot("{acme}:k")).url == f"{to.url}/0", "whoever comes next goes there"
        assert (counting.failed, counting.wrong, store.away) == (0, [], False)
        await counting.stop()
        assert int(to.ask("GET", "{acme}:k")) == counting.counted["{acme}:k"]


async def test_keys_that_are_apart_while_their_slot_moves_are_waited_for_as_long_as_the_deadline(
    empty: stores.Cluster,
) -> None:
    """TRYAGAIN: one key of a call is here, the other one there. Nobody else waits."""
    async with opened(empty.url, 0.5) as store:
        to = elsewhere(empty, "{acme}:k")
        await count(store, "{acme}:k")
        source = empty.begin_move("{acme}:k", to)
        try:
            with pytest.raises(StoreUnavailable):
                await store.run(TELL, ["{acme}:k", "{acme}:new"], [b"\x90", 0])
            assert await count(store, "{other}:k") == 1
            assert store._checking is not None
            await store._checking
            assert not store.away
            patient = asyncio.ensure_future(store.run(TELL, ["{acme}:k", "{acme}:new"], [b"\x90", 0]))
            await asyncio.sleep(0.1)
            assert not patient.done()
        finally:
            empty.move_keys("{acme}:k", source, to)
            empty.end_move("{acme}:k", source, to)
        assert await patient == []


async def test_keys_of_two_slots_in_one_call_are_a_mistake_and_no_fault_of_the_store(empty: stores.Cluster) -> None:
    """CROSSSLOT."""
    async with opened(empty.url) as store:
        with pytest.raises(redis.exceptions.ResponseError):
            await store.run(TELL, ["{acme}:k", "{org1}:k"], [b"\x90", 0])
        assert not store.away


async def test_callers_keys_are_kept_and_followed_in_a_cluster(empty: stores.Cluster) -> None:
    async with opened(empty.url) as store:
        ring, other = KeyRing(store, b"of the tests"), KeyRing(store, b"of the tests")
        await ring.load()
        following = asyncio.ensure_future(other.follow())
        record, _ = await ring.create("red", user=None, name=None, models=(), expires=None)
        empty.move("{gateway}:keys", elsewhere(empty, "{gateway}:keys"))
        second, _ = await ring.create("red", user=None, name=None, models=(), expires=None)
        async with asyncio.timeout(5):
            while [one.id for one in other.records()] != [record.id, second.id]:
                await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.wait((following,))


async def test_a_cluster_that_lost_a_slot_is_away_until_somebody_has_it(empty: stores.Cluster) -> None:
    """R9: CLUSTERDOWN."""
    async with opened(empty.url) as store:
        await count(store, "{acme}:k")
        owner, slot = empty.owner("{acme}:k"), empty.slot("{acme}:k")
        owner.ask("CLUSTER", "DELSLOTS", slot)
        try:
            with pytest.raises(StoreUnavailable):
                while True:
                    await count(store, "{acme}:k")
            assert store.reason in ("is a cluster that is down", "is a cluster in which nobody has some of the slots")
            await asyncio.sleep(1)
            assert store.away
        finally:
            owner.ask("CLUSTER", "ADDSLOTS", slot)
        await asyncio.wait_for(store.back(), 5)
        assert await count(store, "{acme}:k") == 2


async def test_a_node_that_is_gone_or_silent_is_away_until_its_replica_has_taken_over() -> None:
    """R9."""
    with stores.cluster(_server_binary()) as cluster:
        async with opened(cluster.url) as store, load(store, "{acme}:k", "{org1}:k", "{org2}:k") as counting:
            first = await aside(cluster.owner, "{acme}:k")
            first.kill()
            async with asyncio.timeout(3):
                while not store.away:
                    await asyncio.sleep(0.005)
            live = next(node for node in cluster.nodes if node is not first)
            await counting.more(stores.NODE_TIMEOUT_MS / 1000 + 8)
            second = await aside(cluster.owner, "{acme}:k", live)
            assert second is not first
            assert (counting.wrong, store.away) == ([], False)


async def test_a_primary_that_hangs_is_away_until_its_replica_has_taken_over() -> None:
    with stores.cluster(_server_binary()) as cluster:
        async with opened(cluster.url, 0.5) as store, load(store, "{acme}:k") as counting:
            first = await aside(cluster.owner, "{acme}:k")
            first.stop()
            try:
                async with asyncio.timeout(3):
                    while not store.away:
                        await asyncio.sleep(0.005)
                await counting.more(stores.NODE_TIMEOUT_MS / 1000 + 10)
                assert counting.wrong == []
            finally:
                first.go_on()


async def test_an_address_of_the_wrong_kind_says_which_one_is_expected(
    empty: stores.Cluster, store_url: str, binary: str
) -> None:
    async with opened(empty.nodes[0].url) as store:
        with pytest.raises(StoreUnavailable):
            for number in range(20):
                await count(store, f"{{org{number}}}:k")
        assert store.reason == "is a node of a cluster, expected redis+cluster:// before its address"
    with stores.node(binary) as one:
        async with opened(f"redis+cluster://127.0.0.1:{one.port}") as store:
            with pytest.raises(StoreUnavailable):
                await count(store, "k")
            assert store.reason == "is no cluster, expected redis:// before its address"

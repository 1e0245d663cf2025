"""What goes wrong with the store of keys and limits, by the numbers of the fault matrix (R1 to R18), end to end.

Every test has a whole gateway, a store of its own, a backend that keeps its own ledger, and callers over HTTP. A row
says what callers see meanwhile, and that the books are right afterwards: each answer of the backend has one row, and
the counts hold what the rows say.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from structlog.testing import capture_logs

from gateway.embedded import _server_binary
from gateway.identity import new_key
from tests.flows.test_ten_sentences import ANSWER, BODY, STREAM, everything, plan, rows
from tests.proving import stores
from tests.proving.backend import DONE, END, EVENTS, FINISHED, Backend, Peer, Served, Step, chunk, ok, reported, token
from tests.proving.chaos import Chaos
from tests.proving.descriptors import descriptors
from tests.proving.house import House, documents, gateway
from tests.proving.limits import until
from tests.proving.load import Read, Result, completion_request, fire, fixed, read
from tests.proving.ports import free_ports
from tests.proving.stores import Node, node

PRODUCTION = 0.05  # the deadline, where it is measured
DEADLINE = 0.3  # elsewhere: these machines are noisy
LAX = 5.0  # where what is tested is invisible, and this machine's own delays shall be, too
SOON = 5.0  # recovery
TOKENS = 4  # of one answer
POOL = 8  # connections for commands; and as many for news

COUNTED = {"name": "counted", "count": "requests", "quota": "1000000/month", "per": ["team"]}
TOLD = {"name": "told", "count": "total_tokens", "quota": "100000000/week", "rolling": True, "per": ["team"]}
PACED = {"name": "paced", "count": "requests", "rate": "6/minute", "burst": 50_000, "per": ["key"]}
SEATS = {"name": "seats", "count": "concurrent_requests", "at_most": 500, "per": ["team"]}
ALL = (COUNTED, TOLD, PACED, SEATS)


# — a store that is killed and started again


class Kept:
    """A server on one port, whose data outlive its process: without fsync it has written before it answers."""

    def __init__(self, binary: str, stack: ExitStack, folder: str, options: dict[str, object]) -> None:
        self.port = free_ports(1)[0]
        self._start: Callable[[], Node] = lambda: stack.enter_context(
            node(binary, self.port, dir=folder, appendonly="yes", appendfsync="no", **options)
        )
        self.node: Node | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.node = self._start()

    def ask(self, *words: object) -> Any:
        return self.here.ask(*words)

    @property
    def here(self) -> Node:
        assert self.node is not None
        return self.node


@contextmanager
def kept(binary: str = "", **options: object) -> Iterator[Kept]:
    """A store that is not started yet."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder, ExitStack() as stack:
        yield Kept(binary or _server_binary(), stack, folder, options)


@pytest.fixture
def store() -> Iterator[Kept]:
    with kept() as store:
        store.start()
        yield store


def debian() -> str:
    """Debian's redis-server, which speaks TLS."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    return binary


@pytest.fixture(params=["valkey", "redis7"])
def either(request: pytest.FixtureRequest) -> Iterator[Kept]:
    with kept("" if request.param == "valkey" else debian()) as store:
        store.start()
        yield store


# — a gateway before it, and its callers


@dataclass
class Case:
    """One gateway between callers, one backend and a store."""

    house: House
    backend: Backend
    key: str
    streams: asyncio.Event  # set: the streams that the backend has begun may end

    async def ask(self, body: bytes = BODY, key: str | None = None) -> Read:
        async with self.house.caller(key or self.key, body) as caller:
            return await read(caller.reader)

    async def asked(self, times: int) -> list[Read]:
        return [await self.ask() for _ in range(times)]

    async def fire(self, rate: float, seconds: float) -> Result:
        """So many requests a second, whatever becomes of them."""
        return await fire(self.house.url, completion_request(self.key), fixed(rate=rate, seconds=seconds))

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.house.client(self.key) as client:
            answer = await client.get(path)
        return answer.status_code, answer.json()

    async def reasons(self) -> list[str]:
        """What is amiss; nothing where all is well. It is ready all the same as long as callers are known: a balancer
        that took it out for its store would take out all."""
        status, said = await self.get("/healthz/ready")
        word = "degraded" if said["reasons"] else "ready"
        assert (status, said["status"]) == ((200, word) if self.house.gateway.keys.known else (503, "not ready"))
        return list(said["reasons"])

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[asyncio.Task[Read]]:
        """A stream that has begun; it is whole at the end of the block, and what it gave was no error."""
        before = len(self.backend.served)
        answer = asyncio.ensure_future(self.ask(STREAM))
        await until(lambda: any(served.events for served in self.backend.served[before:]))
        yield answer
        self.streams.set()
        got = await answer
        assert (got.status, got.whole, b'"error"' in got.body) == (200, True, False)

    async def count(self, url: str, limit: dict[str, Any]) -> str:
        """The key of a limit's count."""
        async with self.stream():  # that has a seat
            return next(key for key in counts(url) if f":{limit['name']}:".encode() in key).decode()

    async def away(self) -> None:
        await until(lambda: self.house.gateway.store.away, 2)

    async def recovered(self, within: float = SOON) -> None:
        """Until it is ready and has told the store everything."""
        async with asyncio.timeout(within):
            while await self.reasons() or self.house.gateway.admission.unsettled:
                await asyncio.sleep(0.05)

    async def right(self, url: str) -> list[dict[str, Any]]:
        """The ledger, after it was found to be right, and the counts as well."""
        await self.house.settled()
        found = rows(url)
        assert len({row["id"] for row in found}) == len(found) == len(self.backend.served)
        assert all(row["input_tokens"] + row["output_tokens"] == TOKENS for row in found)
        status, limits = await self.get("/v1/limits")
        async with asyncio.timeout(3 * SOON):
            while status == 503:  # a slow moment of this machine is an absence, too
                status, limits = await self.get("/v1/limits")
        assert status == 200
        used = {row["name"]: (row["used"], row["reserved"]) for row in limits["data"]}
        exact = {"counted": (len(found), 0), "told": (TOKENS * len(found), 0), "seats": (0, 0)}
        assert {name: used[name] for name in exact if name in used} == {
            name: held for name, held in exact.items() if name in used
        }
        return found


def answering(streams: asyncio.Event) -> Step:
    """A backend whose answers have four tokens: whole, or a stream that goes on until it is let."""

    async def answer(peer: Peer) -> None:
        while True:
            await peer.request()
            served = Served(dict(peer.requests[-1].headers).get(b"x-request-id", b""))
            peer.backend.served.append(served)
            if b'"stream": true' in peer.requests[-1].body:
                await peer.send(EVENTS, chunk(token()))
                served.events = 1
                await streams.wait()
                await peer.send(chunk(reported(3, 1, choices=FINISHED)), chunk(DONE) + END)
            else:
                await peer.send(ok(ANSWER))
            served.whole = True

    return answer


@asynccontextmanager
async def case(
    url: str, *limits: dict[str, Any], deadline: float = DEADLINE, key: str | None = None, **given: Any
) -> AsyncIterator[Case]:
    """A gateway on the store at `url`, with these limits or ALL. Nothing is left of it at the end: no task, no file.

    `key` is one of an earlier gateway, "" for none; `given` are sections of the policies.
    """
    streams = asyncio.Event()
    async with Backend(answering(streams)) as backend:
        policy = documents([backend.url], plans=plan(*(limits or ALL)), **given)
        tasks, files = asyncio.all_tasks(), descriptors()
        async with gateway(url, policy, store_deadline=deadline) as house:
            yield Case(house, backend, await _key(house) if key is None else key, streams)
            streams.set()
        for peer in backend.peers:
            await asyncio.wait_for(peer.gone.wait(), SOON)
        await until(lambda: asyncio.all_tasks() <= tasks and not descriptors() - files, 10)


async def _key(house: House) -> str:
    """A key, as soon as this late machine has read the others."""
    await until(lambda: house.gateway.keys.loaded)
    return await house.key()


def degraded(answer: Read) -> bool:
    return answer.headers.get(b"x-gateway-limits") == b"degraded"


def code(answer: Read) -> tuple[int, str]:
    assert answer.whole
    return answer.status, json.loads(answer.body)["error"]["code"]


def statuses(answers: list[Read]) -> set[int]:
    return {answer.status for answer in answers}


# — absent, dead, silent, slow


async def test_r01_a_gateway_starts_without_its_store_and_is_ready_when_that_comes(store: Kept) -> None:
    """Alive, not ready, and 503 for whoever has a key: that it is unknown (401) nobody can say yet."""
    async with case(store.url) as earlier:
        key = earlier.key
    store.here.kill()
    async with case(store.url, key=key) as it:
        assert (await it.get("/healthz/live"))[0] == 200
        await it.away()
        assert any("refuses the connection" in reason for reason in await it.reasons())
        assert code(await it.ask()) == (503, "store_unavailable")
        assert it.backend.requests == []
        await asyncio.to_thread(store.start)
        await it.recovered()
        answer = await it.ask()
        assert (answer.status, degraded(answer)) == (200, False)
        assert len(await it.right(store.url)) == 1


MODES = {"local": (200, None), "open": (200, None), "closed": (503, "store_unavailable")}


@pytest.mark.parametrize("mode", MODES)
async def test_r02_a_store_that_dies_is_done_without_as_policy_says(store: Kept, mode: str) -> None:
    """From the first request on. A stream goes on, nothing is a 500, and the books are right when it is back."""
    status, said = MODES[mode]
    async with case(store.url, gateway={"when_store_fails": mode}) as it:
        assert statuses(await it.asked(5)) == {200}
        with capture_logs() as lines:
            async with it.stream():
                store.here.kill()
                answers = await it.asked(30)
                assert statuses(answers) == {status}
                assert {degraded(answer) for answer in answers} == {True}
                if said is not None:
                    assert {code(answer) for answer in answers} == {(503, said)}
                await it.away()
                assert any("the connection" in reason for reason in await it.reasons())
                assert (await it.get("/healthz/live"))[0] == 200
            await asyncio.to_thread(store.start)
            await it.recovered()
        events = [line["event"] for line in lines]
        assert (events.count("store_away"), events.count("store_back")) == (1, 1)
        after = await it.ask()
        assert (after.status, degraded(after)) == (200, False)
        assert len(await it.right(store.url)) == 7 + (30 if status == 200 else 0)


async def test_r02_by_itself_a_gateway_gives_what_was_left_and_no_more(store: Kept) -> None:
    """The only worker's share is all that was left; beyond it is 429, and the store hears of what was given."""
    small = {"name": "counted", "count": "requests", "quota": "10/month", "per": ["team"]}
    async with case(store.url, small) as it:
        assert statuses(await it.asked(3)) == {200}
        store.here.kill()
        answers = await it.asked(9)
        assert [answer.status for answer in answers] == [200] * 7 + [429] * 2
        assert all(map(degraded, answers))
        assert code(answers[-1]) == (429, "rate_limit_exceeded")
        await asyncio.to_thread(store.start)
        await it.recovered()
        refused = await it.ask()
        assert (refused.status, degraded(refused)) == (429, False)
        assert len(await it.right(store.url)) == 10


async def in_one_of_three(measure: Callable[[], Awaitable[None]]) -> None:
    """Something that this machine may spoil twice."""
    for left in (2, 1, 0):
        try:
            await measure()
        except AssertionError:
            if not left:
                raise
        else:
            return


def paid_once(calm: Result, hit: Result) -> None:
    """Of those that came when it was gone few paid the deadline, and most nothing: this machine's own delays are what
    they were before."""
    assert hit.percentile(50) < calm.percentile(50) + 0.5 * PRODUCTION
    assert hit.latencies[-1] < calm.latencies[-1] + 3 * PRODUCTION


async def test_r03_a_store_that_falls_silent_costs_few_requests_their_deadline(store: Kept) -> None:
    """Nothing is refused, nothing reset: it is stopped while requests are under way, and they go on without."""
    loop = asyncio.get_running_loop()
    async with case(store.url, deadline=PRODUCTION) as it:

        async def measure() -> None:
            calm = await it.fire(100, 1)
            load = asyncio.ensure_future(it.fire(100, 1))
            await until(lambda: not it.house.gateway.admission.idle)
            store.here.stop()
            try:
                stopped = loop.time()
                await it.away()
                took = loop.time() - stopped
                await said(it, "does not answer")
                hit = await load
                assert (hit.errors, set(hit.statuses)) == ({}, {200})
            finally:
                store.here.go_on()
            await it.recovered(2 * SOON)
            assert took < 0.25
            paid_once(calm, hit)

        async with it.stream():
            await in_one_of_three(measure)
        await it.right(store.url)


async def test_r03_one_request_is_enough_to_find_out(store: Kept) -> None:
    """Its own deadline and that of one probe: the next one pays nothing."""
    loop = asyncio.get_running_loop()
    async with case(store.url, deadline=PRODUCTION, gateway={"when_store_fails": "closed"}) as it:

        async def timed() -> float:
            began = loop.time()
            assert code(await it.ask()) == (503, "store_unavailable")
            return loop.time() - began

        async def measure() -> None:
            assert (await it.ask()).status == 200
            store.here.stop()
            try:
                began = loop.time()
                first = await timed()
                await it.away()
                away = loop.time() - began
                later = [await timed() for _ in range(20)]
            finally:
                store.here.go_on()
            await it.recovered(2 * SOON)
            assert first < 2 * PRODUCTION
            assert away < 0.25
            assert statistics.median(later) < 0.5 * PRODUCTION

        await in_one_of_three(measure)
        await it.right(store.url)


@pytest.mark.parametrize("delay", [0.2, 5.0])
async def test_r04_a_slow_store_is_as_good_as_a_silent_one_and_connections_do_not_pile_up(
    store: Kept, delay: float
) -> None:
    """Once it is known to be away it is sent a probe now and then, and nothing of the requests."""
    async with Chaos(store.url) as chaos, case(chaos.url, deadline=PRODUCTION) as it:

        async def measure() -> None:
            calm = await it.fire(100, 1)
            told = chaos.up.carried
            chaos.down.delay = delay
            try:
                load = asyncio.ensure_future(it.fire(100, 1))
                await it.away()
                before = chaos.up.carried
                hit = await load
                assert (hit.errors, set(hit.statuses)) == ({}, {200})
                assert chaos.up.carried - before < told / 10
                assert chaos.live <= 3 * POOL  # the lost ones are closed beside
            finally:
                chaos.down.delay = 0.0
            await it.recovered(2 * SOON)
            paid_once(calm, hit)

        await in_one_of_three(measure)
        await it.right(store.url)


async def test_r05_a_store_that_comes_and_goes_is_not_stormed(store: Kept) -> None:
    """One second there, one second gone, for eight. Nobody notices; it is asked twice a second at most while gone."""
    loop = asyncio.get_running_loop()
    async with Chaos(store.url) as chaos, case(chaos.url) as it:
        await it.asked(5)
        tasks, before = len(asyncio.all_tasks()), chaos.connections
        load = asyncio.ensure_future(it.fire(60, 8.5))
        gone: list[float] = []
        for _ in range(4):
            await asyncio.sleep(1)
            chaos.turn_away = True
            chaos.hang_up()
            gone.append(loop.time())
            await asyncio.sleep(1)
            chaos.turn_away = False
        result = await load
        assert (result.errors, set(result.statuses)) == ({}, {200})
        for begin in gone:
            assert sum(begin + 0.05 <= at < begin + 1 for at in chaos.arrivals) <= 3
        assert chaos.connections - before <= 2 * (POOL + 8.5 / 2) + 2 * 8.5  # what pools reopen, and probes
        await it.recovered()
        assert max(_in_one_second(chaos.arrivals)) <= 2 * POOL + 2
        assert chaos.live <= 2 * POOL
        await it.right(store.url)
        await until(lambda: len(asyncio.all_tasks()) <= tasks + chaos.live * 3)


def _in_one_second(instants: list[float]) -> list[int]:
    """How many there were in the second after each."""
    return [sum(at <= other < at + 1 for other in instants) for at in instants]


# — answering, and refusing to work


async def test_r06_a_full_store_is_away_and_nothing_is_half_written(either: Kept) -> None:
    """Its counts stay as they were to the byte, until there is room."""
    async with case(either.url) as it:
        await it.asked(5)
        async with it.stream():
            before = acme(either.url)
            either.ask("CONFIG", "SET", "maxmemory", "1mb")
            answers = await it.asked(20)
            assert (statuses(answers), {degraded(answer) for answer in answers}) == ({200}, {True})
            await it.away()
            assert any("is full (maxmemory)" in reason for reason in await it.reasons())
            assert acme(either.url) == before
        either.ask("CONFIG", "SET", "maxmemory", "0")
        await it.recovered()
        assert len(await it.right(either.url)) == 26


def acme(url: str) -> dict[bytes, bytes | None]:
    """What belongs to the organisation, as bytes."""
    return {key: held for key, held in everything(url).items() if key.startswith(b"{acme}")}


def counts(url: str) -> dict[bytes, bytes | None]:
    """The same without what is kept for single requests."""
    return {key: held for key, held in acme(url).items() if b":request:" not in key}


# — failover


async def test_r07_sentinels_promote_another_one_and_a_second_later_it_is_used() -> None:
    """The primary is killed under load: nobody sees more than `degraded`."""
    loop = asyncio.get_running_loop()
    with stores.watched(_server_binary()) as watched:
        async with case(watched.url) as it:
            await it.asked(5)
            before = watched.primary
            before.ask("WAIT", 2, 2000)
            async with it.stream():
                load = asyncio.ensure_future(it.fire(40, 5))
                await asyncio.sleep(0.5)
                before.kill()
                after = await asyncio.to_thread(watched.promoted, before)
                promoted = loop.time()
                await until(lambda: not it.house.gateway.store.away, SOON)
                assert loop.time() - promoted < 2  # one second, and this machine's own
                result = await load
            assert (result.errors, set(result.statuses)) == ({}, {200})
            await it.recovered()
            answer = await it.ask()
            assert (answer.status, degraded(answer)) == (200, False)
            found = rows(after.url)
            assert len({row["id"] for row in found}) == len(found)


async def test_r07_a_planned_failover_is_not_noticed() -> None:
    with stores.watched(_server_binary()) as watched:
        async with case(watched.url) as it:
            load = asyncio.ensure_future(it.fire(40, 4))
            await asyncio.sleep(0.5)
            after = await asyncio.to_thread(watched.fail_over)
            result = await load
            assert (result.errors, set(result.statuses)) == ({}, {200})
            await it.recovered()
            found = rows(after.url)
            # The old primary takes writes until it is told, and these are lost: for some seconds at most.
            assert len(it.backend.served) - 3 * 40 <= len({row["id"] for row in found}) == len(found)
            answer = await it.ask()
            assert (answer.status, degraded(answer)) == (200, False)
            assert len(rows(after.url)) == len(found) + 1


async def test_r07_a_primary_that_becomes_a_replica_is_left_by_new_connections(store: Kept) -> None:
    """As behind an address that follows the primary: its READONLY is enough to connect anew."""
    with node(_server_binary()) as other:
        other.ask("REPLICAOF", "127.0.0.1", store.port)
        await until(lambda: "master_link_status:up" in other.ask("INFO", "replication"))
        async with Chaos(store.url) as chaos, case(chaos.url) as it:
            await it.asked(5)
            assert store.ask("WAIT", 1, 2000) == 1
            other.ask("REPLICAOF", "NO", "ONE")
            store.ask("REPLICAOF", "127.0.0.1", other.port)
            await until(lambda: "master_link_status:up" in store.ask("INFO", "replication"))
            answers = await it.asked(3)
            assert (statuses(answers), all(map(degraded, answers))) == ({200}, True)
            await it.away()
            assert any("is a replica" in reason for reason in await it.reasons())
            chaos.lead_to(other.url)
            await it.recovered()
            answer = await it.ask()
            assert (answer.status, degraded(answer)) == (200, False)
            assert len(await it.right(other.url)) == 9


async def test_r08_what_a_failover_loses_is_told_again(store: Kept) -> None:
    """The new primary knows nothing of the last requests: their rows are written, and they count, once."""
    small = {"name": "counted", "count": "requests", "quota": "20/month", "per": ["team"]}
    with node(_server_binary()) as other:
        other.ask("REPLICAOF", "127.0.0.1", store.port)
        await until(lambda: "master_link_status:up" in other.ask("INFO", "replication"))
        async with Chaos(store.url) as chaos, case(chaos.url, small, SEATS) as it:
            assert statuses(await it.asked(5)) == {200}
            assert store.ask("WAIT", 1, 2000) == 1
            other.ask("REPLICAOF", "NO", "ONE")  # from here on it misses everything
            lost = 7
            async with it.stream():
                assert statuses(await it.asked(lost - 1)) == {200}
                chaos.lead_to(other.url)
                chaos.hang_up()
                await until(lambda: it.house.gateway.store.losses and not it.house.gateway.store.away, SOON)
            await it.house.settled()
            await until(lambda: len(rows(other.url)) == 5 + lost, SOON)
            answers = await it.asked(20)
            assert [answer.status for answer in answers] == [200] * (15 - lost) + [429] * (5 + lost)
            await it.right(other.url)


# — a cluster


async def test_r09_a_slot_moves_under_load_and_nobody_notices() -> None:
    """There and back, key by key: MOVED and ASK are followed."""
    with stores.cluster(_server_binary()) as cluster:
        async with case(cluster.url, deadline=LAX) as it:
            home = cluster.owner("{acme}:usage")
            away = next(node for node in cluster.nodes[:3] if node is not home)
            with capture_logs() as lines:
                load = asyncio.ensure_future(it.fire(60, 5))
                async with it.stream():
                    for to in (away, home, away):
                        source = cluster.begin_move("{acme}:usage", to)
                        for _ in range(3):
                            await asyncio.sleep(0.15)
                            cluster.move_keys("{acme}:usage", source, to)
                        while cluster.move_keys("{acme}:usage", source, to):
                            await asyncio.sleep(0)
                        cluster.end_move("{acme}:usage", source, to)
                        await asyncio.sleep(0.3)
                    result = await load
            assert (result.errors, set(result.statuses)) == ({}, {200})
            unnoticed(lines)
            assert len(await it.right(away.url)) == 301
            assert {limit["name"] for limit in (await it.get("/v1/limits"))[1]["data"]} == {one["name"] for one in ALL}


def unnoticed(lines: Sequence[Mapping[str, Any]]) -> None:
    """The store was never away, and every request was settled at once."""
    assert {line["event"] for line in lines}.isdisjoint({"store_away", "settle_later"})


async def test_r09_a_cluster_that_is_down_is_done_without() -> None:
    """A primary and its replica are silent; when they answer again the cluster is up, and used."""
    with stores.cluster(_server_binary()) as cluster:
        async with case(cluster.url) as it:
            await it.asked(5)
            home = cluster.owner("{acme}:usage")
            other = next(number for number, node in enumerate(cluster.nodes[:3]) if node is not home)
            silent = (cluster.nodes[other], cluster.nodes[other + 3])
            for one in silent:
                one.stop()
            await until(lambda: "cluster_state:fail" in home.ask("CLUSTER", "INFO"))
            answers = await it.asked(20)
            assert (statuses(answers), all(map(degraded, answers))) == ({200}, True)
            await it.away()
            assert await it.reasons() != []
            for one in silent:
                one.go_on()
            await until(lambda: "cluster_state:ok" in home.ask("CLUSTER", "INFO"))
            await it.recovered()
            answer = await it.ask()
            assert (answer.status, degraded(answer)) == (200, False)
            assert len(await it.right(home.url)) == 26


# — answers that are lost, scripts that are forgotten, a server that is busy


async def test_r10_scripts_that_are_forgotten_all_the_time_are_not_missed(either: Kept) -> None:
    async with case(either.url, deadline=LAX) as it:
        with capture_logs() as lines:
            load = asyncio.ensure_future(it.fire(100, 2))
            while not load.done():
                either.ask("SCRIPT", "FLUSH")
                await asyncio.sleep(0.01)
            result = await load
        assert (result.errors, set(result.statuses)) == ({}, {200})
        unnoticed(lines)
        assert len(await it.right(either.url)) == 200


@pytest.mark.parametrize("how", ["cut", "lost"])
async def test_r11_what_was_done_and_not_heard_of_is_not_done_twice(store: Kept, how: str) -> None:
    """Every 150 ms some answers are lost, and their connections are cut, or stay silent for ever."""
    async with Chaos(store.url) as chaos, case(chaos.url) as it:
        load = asyncio.ensure_future(it.fire(80, 3))
        while not load.done():
            await asyncio.sleep(0.12)
            chaos.down.black_hole = True
            await asyncio.sleep(0.03)
            chaos.down.black_hole = False
            if how == "cut":
                chaos.hang_up()
        result = await load
        assert (result.errors, set(result.statuses)) == ({}, {200})
        await it.recovered()
        assert len(await it.right(store.url)) == 240


async def test_r11_what_was_admitted_unheard_and_settled_unheard_is_charged_once(store: Kept) -> None:
    """Its gateway takes it for one that the store knows nothing of, and sends its end again."""
    async with Chaos(store.url) as chaos, case(chaos.url) as it:
        await it.asked(2)
        for _ in range(2):
            chaos.down.black_hole = True
            answer = await it.ask()
            assert (answer.status, degraded(answer)) == (200, True)
            await it.away()
            chaos.down.black_hole = False
            await until(lambda: not it.house.gateway.store.away, SOON)
        await it.recovered()
        assert len(await it.right(store.url)) == 4


async def test_r12_a_store_that_is_busy_with_somebodys_script_is_done_without(either: Kept) -> None:
    either.ask("CONFIG", "SET", "busy-reply-threshold", 100)
    async with case(either.url) as it:
        await it.asked(5)
        with socket.create_connection(("127.0.0.1", either.port)) as other:
            other.sendall(b'EVAL "while true do end" 0\r\n')
            await it.away()
            answers = await it.asked(20)
            assert (statuses(answers), all(map(degraded, answers))) == ({200}, True)
            await said(it, "is busy with somebody's script")
            either.ask("SCRIPT", "KILL")
        await it.recovered()
        assert len(await it.right(either.url)) == 25


async def said(it: Case, reason: str) -> None:
    """Until that is told of its health."""
    async with asyncio.timeout(SOON):
        while not any(reason in one for one in await it.reasons()):
            await asyncio.sleep(0.05)


# — foreign keys, and keys that vanish

FOREIGN = (("SET", "garbage"), ("SET", "17"), ("LPUSH", "garbage"))


@pytest.mark.parametrize("limit", ALL, ids=lambda limit: str(limit["name"]))
async def test_r13_a_foreign_key_in_the_place_of_a_count_fails_its_requests_and_changes_nothing(
    either: Kept, limit: dict[str, Any]
) -> None:
    """The answer names the limit; other teams are served. When the key is gone, so is the trouble."""
    async with case(either.url, deadline=LAX) as it:
        other, name = await it.house.key("support"), await it.count(either.url, limit)
        for command, value in FOREIGN:
            either.ask("DEL", name)
            either.ask(command, name, value)
            before = acme(either.url)
            answer = await it.ask()
            assert code(answer) == (500, "internal_error")
            assert str(limit["name"]) in json.loads(answer.body)["error"]["message"]
            assert b"garbage" not in answer.body
            assert acme(either.url) == before
        assert (await it.ask(key=other)).status == 200
        assert await it.reasons() == []
        either.ask("DEL", name)
        assert (await it.ask()).status == 200


async def test_r13_a_foreign_key_in_the_place_of_the_ledger_loses_no_row(store: Kept) -> None:
    """Requests are served, and what they used is written when the key is gone."""
    async with case(store.url, COUNTED, SEATS) as it:
        store.ask("SET", "{acme}:usage", "garbage")
        assert statuses(await it.asked(3)) == {200}
        assert it.house.gateway.admission.unsettled == 3
        store.ask("DEL", "{acme}:usage")
        await it.recovered()
        assert len(await it.right(store.url)) == 3


async def test_r14_a_store_that_evicts_is_told_of_and_used(either: Kept) -> None:
    either.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with capture_logs() as lines:
        async with case(either.url) as it:
            assert (await it.ask()).status == 200
            await until(lambda: it.house.gateway.store.warnings != ())
            assert "allkeys-lru" in it.house.gateway.store.warnings[0]
            assert await it.reasons() == []
    assert [line["log_level"] for line in lines if line["event"] == "store_evicts"] == ["error"]


async def test_r14_what_vanishes_while_requests_are_under_way_is_no_failure(store: Kept) -> None:
    """Counts begin anew, and a request whose reservation has vanished has its row all the same."""
    async with case(store.url) as it:
        assert statuses(await it.asked(3)) == {200}
        async with it.stream():
            for name in acme(store.url):
                if name != b"{acme}:usage":
                    store.ask("DEL", name)
        await it.house.settled()
        assert (await it.ask()).status == 200
        await it.house.settled()
        assert len(rows(store.url)) == 5


# — who may not enter

SECRET = "wrong-horse-battery"


@contextmanager
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[list[Any]]:
    """Log lines, and whatever else is told in the block: the secret is not among it."""
    with capture_logs() as lines:
        told: list[Any] = [lines]
        yield told
    out = capfd.readouterr()
    assert SECRET not in f"{told} {out.out} {out.err}"


async def shut_out(url: str, reason: str, mend: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> None:
    """Not ready for this reason, and a 503 for whoever has a key; ready when it is mended, without a restart."""
    with quiet(capfd) as told:
        async with case(url, key=new_key()[1]) as it:
            await said(it, reason)
            answer = await it.ask()
            assert code(answer) == (503, "store_unavailable")
            assert (await it.get("/healthz/live"))[0] == 200
            told += [await it.reasons(), answer, repr(it.house.gateway.store), repr(it.house.settings)]
            mend()
            await it.recovered()
            assert (await it.ask()).status == 401  # now it is known that there is no such key
    assert [line["event"] for line in told[0]].count("store_away") == 1


def granted(store: Kept, *rules: str) -> str:
    """The address of the store for a user with these rules and the secret for a password."""
    store.ask("ACL", "SETUSER", "gateway", "on", "resetpass", f">{SECRET}", "~*", "&*", "+@all", *rules)
    return store.url.replace("://", f"://gateway:{SECRET}@")


async def test_r15_a_wrong_password_is_said_and_not_shown(either: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    url = granted(either, "resetpass", ">another")
    await shut_out(url, "refuses the password", lambda: granted(either), capfd)


async def test_r15_a_missing_password_is_said(either: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    granted(either)
    either.ask("CONFIG", "SET", "requirepass", SECRET)
    with redis.Redis(port=either.port, password=SECRET) as client:
        client.ping()
        await shut_out(either.url, "wants a password", lambda: client.config_set("requirepass", ""), capfd)


async def test_r15_a_user_without_rights_is_said(either: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    url = granted(either, "-@all")
    await shut_out(url, "does not permit a command", lambda: granted(either), capfd)


async def test_r15_a_right_that_is_lost_at_work_is_done_without(either: Kept) -> None:
    url = granted(either)
    async with case(url) as it:
        assert statuses(await it.asked(3)) == {200}
        granted(either, "-evalsha")
        answers = await it.asked(5)
        assert (statuses(answers), all(map(degraded, answers))) == ({200}, True)
        await said(it, "does not permit a command")
        granted(either)
        await it.recovered()
        assert len(await it.right(either.url)) == 8


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class Signed(NamedTuple):
    """A certificate that vouches for itself, and its key."""

    cert: Path
    key: Path


def certificate(folder: Path, name: str, ago: str = "+0") -> Signed:
    """One that is good for a day, made so long ago."""
    openssl = shutil.which("openssl")
    if openssl is None or not FAKETIME.exists():
        pytest.skip("no openssl or no libfaketime on this machine (Debian: apt-get install openssl faketime)")
    made = Signed(folder / f"{name}.pem", folder / f"{name}.key")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    who = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [openssl, "req", "-x509", *kind, *who, "-out", made.cert, "-keyout", made.key],
        env={**os.environ, "LD_PRELOAD": str(FAKETIME), "FAKETIME": ago},
        check=True,
        capture_output=True,
    )
    return made


def both(folder: Path, *trusted: Signed) -> Path:
    """A file with these certificates."""
    file = folder / "trusted.pem"
    file.write_text("".join(one.cert.read_text() for one in trusted))
    return file


REFUSED = {"expired": "certificate has expired", "unknown": "self-signed certificate"}


@pytest.mark.parametrize("what", REFUSED)
async def test_r15_a_certificate_that_is_not_accepted_is_said(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, expired = certificate(tmp_path, "good"), certificate(tmp_path, "expired", "-10d")
    shown = expired if what == "expired" else certificate(tmp_path, "unknown")
    trusted, port = both(tmp_path, good, expired), free_ports(1)[0]
    options: dict[str, Any] = {
        "tls_port": port,
        "tls_cert_file": shown.cert,
        "tls_key_file": shown.key,
        "tls_auth_clients": "no",
    }
    with node(debian(), tls_ca_cert_file=trusted, **options) as store:
        url = f"rediss://:{SECRET}@127.0.0.1:{port}?ssl_ca_certs={trusted}"
        store.ask("ACL", "SETUSER", "default", f">{SECRET}")
        with redis.Redis(port=store.port, password=SECRET) as client:
            client.ping()
            words = ("CONFIG", "SET", "tls-cert-file", str(good.cert), "tls-key-file", str(good.key))
            await shut_out(url, REFUSED[what], lambda: client.execute_command(*words), capfd)


# — no connection left, no disk left


async def test_r16_with_few_connections_requests_wait_or_go_without(either: Kept) -> None:
    async with case(either.url) as it:
        with redis.Redis(port=either.port, single_connection_client=True) as other:
            other.config_set("maxclients", 5)
            result = await it.fire(100, 3)
            assert (result.errors, set(result.statuses)) == ({}, {200})
            await it.recovered()
            other.config_set("maxclients", 1000)
        assert len(await it.right(either.url)) == 300


async def test_r16_with_none_they_go_without_until_there_is_one(either: Kept) -> None:
    async with Chaos(either.url) as chaos, case(chaos.url) as it:
        await it.asked(3)
        with redis.Redis(port=either.port, single_connection_client=True) as other:
            other.config_set("maxclients", 1)
            chaos.hang_up()
            await it.away()
            answers = await it.asked(10)
            assert (statuses(answers), all(map(degraded, answers))) == ({200}, True)
            await said(it, "has no connection left (maxclients)")
            other.config_set("maxclients", 1000)
        await it.recovered()
        assert len(await it.right(either.url)) == 13


@pytest.mark.parametrize("binary", ["valkey", "redis7"])
async def test_r17_a_store_whose_disk_is_full_is_done_without(binary: str) -> None:
    """It refuses to write (MISCONF) until there is room again; then the ledger has everything."""
    server = _server_binary() if binary == "valkey" else debian()
    with stores.small_disk() as disk, node(server, dir=disk, appendonly="yes", appendfsync="everysec") as store:
        async with case(store.url) as it:
            await it.asked(5)
            async with it.stream():
                filler = disk / "filler"
                with suppress(OSError):  # it is full
                    with filler.open("wb", buffering=0) as file:
                        while file.write(bytes(4096)):
                            pass
                async with asyncio.timeout(SOON):
                    while not it.house.gateway.store.away:
                        assert (await it.ask()).status == 200
                answers = await it.asked(10)
                assert (statuses(answers), all(map(degraded, answers))) == ({200}, True)
                await said(it, "cannot write to its disk (MISCONF)")
                filler.unlink()
            await it.recovered()
            answer = await it.ask()
            assert (answer.status, degraded(answer)) == (200, False)
            await it.right(store.url)


# — a clock that jumps

RATE, BURST = 100, 20
ON_THE_CLOCK = {"name": "paced", "count": "requests", "rate": f"{60 * RATE}/minute", "burst": BURST, "per": ["team"]}


@contextmanager
def with_a_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Node, Callable[[float], None]]]:
    """A store and what sets its clock, to so many seconds from now."""
    if not FAKETIME.exists():
        pytest.skip("no libfaketime on this machine (Debian: apt-get install faketime)")
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        clock = Path(folder) / "clock"

        def jump(seconds: float) -> None:
            # By a rename: the server may read it at any moment.
            (Path(folder) / "next").write_text(f"{seconds:+.3f}\n")
            (Path(folder) / "next").rename(clock)

        jump(0)
        with ExitStack() as stack:
            with monkeypatch.context() as start:
                start.setenv("LD_PRELOAD", str(FAKETIME))
                start.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
                start.setenv("FAKETIME_NO_CACHE", "1")
                start.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")  # a jump is one of the wall's clock
                store = stack.enter_context(node(_server_binary()))
            yield store, jump


@pytest.mark.parametrize("jump", [1.0, -1.0, 3600.0, -3600.0])
async def test_r18_a_clock_that_jumps_gives_no_more_than_it_jumped(
    monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """There and back while twice as much is asked for as is allowed: over and under by rate times jump at most."""
    loop = asyncio.get_running_loop()
    with with_a_clock(monkeypatch) as (store, set_clock):
        async with case(store.url, ON_THE_CLOCK, TOLD, SEATS, deadline=LAX) as it:
            async with it.stream():
                began = loop.time()
                load = asyncio.ensure_future(it.fire(2 * RATE, 2.5))
                await asyncio.sleep(0.5)
                set_clock(jump)
                await asyncio.sleep(1)
                for limit in (await it.get("/v1/limits"))[1]["data"]:
                    assert 0 <= limit["remaining"] <= limit["limit"]
                set_clock(0)
                result = await load
                took = loop.time() - began
            assert result.errors == {}
            assert set(result.statuses) == {200, 429}
            served = len(it.backend.served)
            gained = min(BURST, RATE * abs(jump))  # a bucket is never more than full
            assert served <= BURST + RATE * took + gained
            stalled = min(1.5, abs(jump))  # from the first jump on, or from the second
            assert served >= RATE * (2.5 - stalled) * 0.8
            await it.right(store.url)

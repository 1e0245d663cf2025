"""The store: what shares a trip, what is sent once, what happens while it is away, and the server of our own."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway import store as store_module
from gateway.admission import Admission
from gateway.errors import RateLimited, StoreUnavailable
from gateway.store import Coalesced, Embedded, Script, Store, StoreAway, StoreError, _server_binary
from tests.proving import house
from tests.proving.limits import Request, gateways, key_of, quota, rate, seats, terms, until, wire


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


# — coalescing


@pytest.mark.parametrize(("requests", "trips"), [(1, 1), (2, 1), (64, 1), (65, 2), (150, 3)])
async def test_what_waits_in_one_turn_travels_in_one_call(
    either_store_url: str, server: redis.Redis, requests: int, trips: int
) -> None:
    """And each caller gets the answer to his own request: its limits, in its order."""
    async with gateways(either_store_url) as (admission,):
        async with admission.admit(Request(terms([seats(1)]))):
            pass  # the scripts are known now
        bounds = [
            terms([rate(1000 + i, "day"), quota(5000 + i, "day")][:: (-1) ** i], organisation=f"o{i}")
            for i in range(requests)
        ]
        server.config_resetstat()
        leases = [admission.admit(Request(bound)) for bound in bounds]
        await asyncio.gather(*(lease.__aenter__() for lease in leases))
        assert calls(server, "evalsha") == trips
        for i, lease in enumerate(leases):
            assert [standing.remaining for standing in lease.standings] == [999 + i, 4999 + i][:: (-1) ** i]
        await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in leases))
        assert calls(server, "evalsha") == 2 * trips


async def test_plans_with_very_many_limits_are_admitted_and_settled_together(either_store_url: str) -> None:
    """Sixty-four requests of 140 limits are more keys than one script call can take: they travel in several."""
    bound = terms([rate(10_000, "day", name=f"rate-{i}") for i in range(140)])
    async with gateways(either_store_url) as (admission,):
        leases = [admission.admit(Request(bound)) for _ in range(64)]
        await asyncio.gather(*(lease.__aenter__() for lease in leases))
        assert sorted(lease.standings[0].remaining for lease in leases) == list(range(10_000 - 64, 10_000))
        await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in leases))
        assert admission.unsettled == 0


async def test_a_caller_who_leaves_does_not_take_the_others_answers_along(either_store_url: str) -> None:
    async with gateways(either_store_url) as (admission,):
        leases = [admission.admit(Request(terms([rate(100 + i, "day", name=f"rate{i}")]))) for i in range(10)]
        entering = [asyncio.ensure_future(lease.__aenter__()) for lease in leases]
        await asyncio.sleep(0)
        for one in entering[::2]:
            one.cancel()
        await asyncio.gather(*entering, return_exceptions=True)
        assert [one.cancelled() for one in entering] == [True, False] * 5
        assert [lease.standings[0].remaining for lease in leases[1::2]] == [100, 102, 104, 106, 108]
        await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in leases[1::2]))


async def test_scripts_that_the_server_has_forgotten_are_not_missed(either_store_url: str, server: redis.Redis) -> None:
    async with gateways(either_store_url) as (admission,):
        for _ in range(5):
            server.script_flush()
            async with admission.admit(Request(terms([rate(5, "day"), seats(5)]))):
                server.script_flush()
        with pytest.raises(RateLimited):
            await admission.admit(Request(terms([rate(5, "day")]))).__aenter__()
        assert admission.unsettled == 0


async def test_what_fails_for_one_call_fails_for_its_callers_and_nobody_else(either_store_url: str) -> None:
    async with opened(either_store_url) as store:
        broken = Coalesced(store, Script("admit"), (15_000, 86_400_000))
        # No such kind of limit: the script falls over it before it has written anything.
        first, second = (
            broken((["r", "c"], ("1", "{}", [("x", 1, 1)]))),
            broken((["r2", "c2"], ("2", "{}", [("s", 1, 1)]))),
        )
        for future in (first, second):
            with pytest.raises(redis.exceptions.ResponseError):
                await future
        answer = await broken((["r2", "c2"], ("2", "{}", [("s", 1, 1)])))
        assert answer[0] == 1


# — deadlines


async def test_a_store_that_does_not_answer_is_given_up_at_the_deadline(either_store_url: str) -> None:
    async with wire(either_store_url) as line, opened(line.url, 0.05) as store:
        line.deaf = True
        async with asyncio.timeout(1):
            with pytest.raises(StoreUnavailable):
                await store.call(lambda: store.client.ping())
        assert not store.away  # one slow moment


async def test_three_deadlines_in_a_row_and_it_is_away_until_it_answers(either_store_url: str) -> None:
    async with wire(either_store_url) as line, opened(line.url, 0.05) as store:
        line.deaf = True
        for _ in range(3):
            assert not store.away
            with pytest.raises(StoreUnavailable):
                await store.call(lambda: store.client.ping())
        assert store.away
        sent = line.lost
        for _ in range(100):
            with pytest.raises(StoreAway):  # at once, and nothing is sent
                await store.call(lambda: store.client.set("k", "v"))
        assert line.lost - sent <= 5  # of the probe
        line.deaf = False
        await until(lambda: not store.away)
        assert await store.call(lambda: store.client.get("k")) is None


async def test_two_slow_moments_with_an_answer_between_them_are_not_three(either_store_url: str) -> None:
    async with wire(either_store_url) as line, opened(line.url, 0.1) as store:
        for _ in range(3):
            line.deaf = True
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    await store.call(lambda: store.client.ping())
            line.deaf = False
            await store.call(lambda: store.client.ping())
        assert not store.away


@pytest.mark.parametrize("fault", ["deaf", "cuts"])
async def test_a_command_whose_answer_is_lost_is_not_sent_again(
    either_store_url: str, server: redis.Redis, fault: str
) -> None:
    async with wire(either_store_url) as line, opened(line.url, 0.2) as store:
        await store.call(lambda: store.client.ping())
        setattr(line, fault, True)
        with pytest.raises(StoreUnavailable):
            await store.call(lambda: store.client.incr("counter"))
        line.deaf = False
        await until(lambda: not store.away)
        await store.call(lambda: store.client.ping())
        assert server.get("counter") == b"1"


async def test_connections_do_not_pile_up_before_a_slow_store(either_store_url: str, server: redis.Redis) -> None:
    async with wire(either_store_url) as line, opened(line.url) as store:
        line.held.clear()
        waiting = [asyncio.ensure_future(store.call(lambda: store.client.ping())) for _ in range(200)]
        await until(lambda: line.connections >= 8)
        line.held.set()
        assert await asyncio.gather(*waiting) == [True] * 200
        assert line.connections == 8


@pytest.mark.parametrize("way", ["command", "script"])
async def test_an_answer_reaches_the_caller_who_asked_whoever_left_before(either_store_url: str, way: str) -> None:
    """A caller who is cancelled between asking and hearing must not leave his answer to the next one."""
    script = Script("renew")
    script.text = "#!lua\nreturn ARGV[1]"
    script.sha = hashlib.sha1(script.text.encode()).hexdigest()
    async with opened(either_store_url) as store:

        async def ask(text: str) -> str:
            if way == "script":
                answer: bytes = await store.run(script, [], [text])
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


async def test_a_full_store_is_unavailable_and_nothing_is_half_written(
    either_store_url: str, server: redis.Redis
) -> None:
    async with gateways(either_store_url) as (admission,):
        async with admission.admit(Request(terms([rate(5, "day")]))):
            pass
        before = server.get(key_of(rate(5, "day")))
        server.config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreUnavailable):
                await admission.admit(Request(terms([rate(5, "day"), seats(1)]))).__aenter__()
        finally:
            server.config_set("maxmemory", 0)
        assert (server.get(key_of(rate(5, "day"))), server.exists(key_of(seats(1)))) == (before, 0)
        await until(lambda: admission.unsettled == 0)
        async with admission.admit(Request(terms([seats(1)]))):
            pass


async def test_a_replica_is_unavailable(either_store_url: str, server: redis.Redis) -> None:
    async with opened(either_store_url) as store:
        server.replicaof("127.0.0.1", 1)
        try:
            with pytest.raises(StoreUnavailable):
                await store.run(Script("renew"), ["a", "b"], [15_000, "c"])
        finally:
            server.replicaof("NO", "ONE")
        assert await store.run(Script("renew"), ["a", "b"], [15_000, "c"]) == [-1]


# — a store that dies


@pytest.fixture
def binary(request: pytest.FixtureRequest) -> str:
    return _server_binary()


async def test_a_store_that_is_killed_is_away_at_once_and_comes_back_by_itself(binary: str) -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        first = house.start(binary, folder)
        try:
            async with gateways(first.url, deadline=5.0) as (admission,):
                store = admission._store
                async with admission.admit(Request(terms([seats(1)]))):
                    first.process.kill()
                    first.process.wait()
                    async with asyncio.timeout(2):  # a refused connection is not waited for
                        with pytest.raises(StoreUnavailable):
                            await admission.admit(Request(terms([seats(1)]))).__aenter__()
                    assert store.away
                assert admission.unsettled == 2
                first = house.start(binary, folder)
                await until(lambda: "answering" in repr(store) and admission.unsettled == 0)
                async with admission.admit(Request(terms([seats(1)]))) as lease:
                    assert lease.standings[0].remaining == 0
        finally:
            first.process.kill()
            first.process.wait()


async def test_a_store_that_is_stopped_for_a_while_is_used_again_when_it_goes_on(binary: str) -> None:
    with house.server(binary) as server:
        async with gateways(server.url, deadline=0.05) as (admission,):
            async with admission.admit(Request(terms([seats(1)]))):
                pass
            server.process.send_signal(signal.SIGSTOP)
            started = time.monotonic()
            for _ in range(20):
                with pytest.raises(StoreUnavailable):
                    await admission.admit(Request(terms([seats(1)]))).__aenter__()
            assert admission._store.away
            assert time.monotonic() - started < 2  # three deadlines, not twenty
            server.process.send_signal(signal.SIGCONT)
            await until(lambda: "answering" in repr(admission._store) and admission.unsettled == 0)
            with server.sync() as client:
                assert client.exists(key_of(seats(1))) == 0


async def test_a_store_that_was_never_there_is_told_at_once_and_used_when_it_comes(binary: str) -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        async with opened(f"unix://{folder}/s") as store:
            with pytest.raises(StoreUnavailable):
                await store.call(lambda: store.client.ping())
            assert "away" in repr(store)
            server = house.start(binary, folder)
            try:
                await until(lambda: not store.away)
                assert await store.call(lambda: store.client.ping())
            finally:
                server.process.kill()
                server.process.wait()


async def test_a_store_that_is_away_can_be_closed() -> None:
    async with asyncio.timeout(5):
        async with opened("unix:///nowhere/s") as store:
            with pytest.raises(StoreUnavailable):
                await store.call(lambda: store.client.ping())
            admission = Admission(store)
            with pytest.raises(StoreUnavailable):
                await admission.admit(Request(terms([seats(1)]))).__aenter__()


# — the embedded server


def answering(embedded: Embedded) -> bool:
    return store_module._answers(Path(embedded.url.removeprefix("unix://")))


def test_the_first_user_starts_the_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    one, other = Embedded(tmp_path / "state"), Embedded(tmp_path / "state")
    with other:
        with one:
            assert answering(one)
        assert answering(one)
        with redis.Redis.from_url(other.url) as client:
            client.set("k", "v")
    assert not answering(one)
    with one, redis.Redis.from_url(one.url) as client:
        assert client.get("k") == b"v"


USER = """
    import sys
    from pathlib import Path
    from gateway.store import Embedded
    with Embedded(Path(sys.argv[1])) as embedded:
        print(embedded.url, flush=True)
        sys.stdin.read()
"""


@contextmanager
def user(state: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that uses the embedded server until its input ends."""
    command = [sys.executable, "-c", textwrap.dedent(USER), str(state)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"unix://")
            yield process
        finally:
            process.communicate(timeout=30)


def test_processes_share_one_server(tmp_path: Path) -> None:
    with user(tmp_path), user(tmp_path) as other:
        with Embedded(tmp_path) as embedded, redis.Redis.from_url(embedded.url) as client:
            before: Any = client.info("server")
            other.kill()
            other.wait()
            after: Any = client.info("server")
            assert before["process_id"] == after["process_id"]
        assert answering(embedded)
    assert not answering(embedded)


def test_a_killed_user_holds_nothing(tmp_path: Path) -> None:
    """Its server stays for the next user, who stops it."""
    with user(tmp_path) as only:
        only.kill()
    embedded = Embedded(tmp_path)
    assert answering(embedded)
    with embedded:
        pass
    assert not answering(embedded)


def test_many_users_at_once_start_one_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(USER), str(tmp_path)]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for one in users:
        assert one.stdout is not None
        assert one.stdout.readline().startswith(b"unix://")
    log = (tmp_path / "valkey.log").read_text()
    for one in users:
        one.communicate(timeout=30)
    assert log.count("Ready to accept connections") == 1
    assert not answering(Embedded(tmp_path))


def test_what_was_written_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    embedded = Embedded(tmp_path)
    with embedded:
        with redis.Redis.from_url(embedded.url) as client:
            client.set("k", "v")
            info: Any = client.info("server")
        os.kill(info["process_id"], signal.SIGKILL)
        patience = time.monotonic() + 10
        while answering(embedded) and time.monotonic() < patience:
            time.sleep(0.005)
        with Embedded(tmp_path) as again, redis.Redis.from_url(again.url) as client:
            assert client.get("k") == b"v"
    assert not answering(embedded)


def test_a_state_folder_with_a_long_path_and_blanks_works(tmp_path: Path) -> None:
    state = tmp_path / ("a folder " * 10) / ("b" * 100)
    with Embedded(state) as embedded, redis.Redis.from_url(embedded.url) as client:
        assert len(embedded.url) < 108
        assert client.ping()
    assert (state / "appendonlydir").is_dir()
    assert not answering(embedded)


def test_a_relative_state_folder_is_the_same_one_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = Embedded(Path("state"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with embedded:
        assert (tmp_path / "state" / "valkey.log").exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """And it does not leave one behind that answers later, beside another one on the same file."""
    embedded = Embedded(tmp_path)
    with embedded, redis.Redis.from_url(embedded.url) as client:
        client.set("k", "v")
    (file,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    file.write_bytes(b"garbage" + file.read_bytes())
    with pytest.raises(StoreError, match=r"did not start; .*valkey\.log ends with: .*[Bb]ad file format"):
        embedded.__enter__()
    assert not answering(embedded)


def test_a_server_that_is_not_waited_for_any_longer_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers must never write one file."""
    slow = tmp_path / "slow-server"
    slow.write_text('#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nexec sleep 60\n')
    slow.chmod(0o700)
    monkeypatch.setattr(store_module, "_server_binary", lambda: str(slow))
    monkeypatch.setattr(store_module, "_START_SECONDS", 1.0)
    with pytest.raises(StoreError, match="did not start"):
        Embedded(tmp_path / "state").__enter__()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_state_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be started in .*file"):
        Embedded(tmp_path / "file").__enter__()


def test_without_any_server_the_text_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StoreError, match=r"gateway\[embedded\].*GATEWAY_REDIS_URL"):
        _server_binary()


def test_limits_are_never_evicted(tmp_path: Path) -> None:
    with Embedded(tmp_path) as embedded, redis.Redis.from_url(embedded.url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        mode = Path(embedded.url.removeprefix("unix://")).stat().st_mode
        assert mode & 0o077 == 0

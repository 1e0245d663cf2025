"""What happens to processes, by the numbers of the fault matrix: real processes, real signals, real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.ledger import reconcile
from gateway.store import Store
from tests.proving import house
from tests.proving.backend import (
    Backend,
    Peer,
    completion,
    forever,
)
from tests.proving.load import read
from tests.proving.processes import alive
from tests.proving.town import TEAM, WHOLE, Town, gated, town, until
from tests.proving.workers import Worker, _keys


@asynccontextmanager
async def two_gateways(store_url: str, *others: Mapping[str, Any], **environment: str) -> AsyncIterator[list[Town]]:
    """Gateways of one process each on one store, one for each of these policies beside the usual ones; the last has the
    environment."""
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend(forever(completion(2))))
        key = (await _keys(store_url, [TEAM]))[TEAM]
        store = Store(store_url, deadline=5)
        stack.push_async_callback(store.aclose)
        towns = []
        for number, other in enumerate(others):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
            limits = [{"name": "few", "count": "requests", "quota": "10/day", "per": ["team"]}]
            plans = {"free": {"limits": limits}}
            documents = {**house.documents([backend.url], plans=plans), **other}
            (folder / "policies").mkdir()
            (folder / "policies" / "all.yaml").write_text(yaml.safe_dump(documents, sort_keys=False))
            gateway = Worker(number, folder, store_url, **(environment if number == len(others) - 1 else {}))
            stack.callback(gateway.end)
            towns.append(Town(gateway, "", key, store))
        for town in towns:
            await town.gateway.serving()
        yield towns


# — G1, G2: the end


async def test_g01_a_thousand_streams_end_by_themselves_inside_the_grace(store_url: str) -> None:
    go = asyncio.Event()
    async with town(store_url, gated(go), GATEWAY_DRAIN="60", GATEWAY_DRAIN_DELAY="0.5") as of:
        streams = await of.opened(1000)
        of.gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: len(of.gateway.lines("draining")) == 2)
        assert await of.ready() == 503, "it is not ready, and says so while it still accepts"
        late = await of.opened(1)
        assert late, "what comes within the delay is served"
        await asyncio.sleep(0.6)
        with pytest.raises(ConnectionError):
            await of.ask()
        go.set()
        answers = await asyncio.gather(*(read(reader) for reader in [*streams, *late]))
        assert [one.status for one in answers if not one.whole or not one.body.endswith(WHOLE)] == []
        assert await of.ended(10) == 0
        assert await of.ledger() == [("settled", "complete", 4)] * 1001


async def test_g01_streams_that_outlive_the_grace_are_told_and_settled(store_url: str) -> None:
    async with town(store_url, gated(asyncio.Event()), GATEWAY_DRAIN="1") as of:
        streams = await of.opened(40)
        began = time.monotonic()
        of.gateway.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*(read(reader) for reader in streams))
        assert await of.ended(10) == 0
        assert 1 <= time.monotonic() - began < 4, "the grace and little more"
        for one in answers:
            last = json.loads(one.body.rstrip().rpartition(b"data: ")[2])
            assert last["error"]["code"] == "shutting_down"
            assert (one.whole, b"[DONE]" in one.body) == (False, False)
        assert await of.ledger() == [("settled", "gateway", 2)] * 40


async def test_g01_who_waits_for_a_first_byte_is_told_to_ask_again(store_url: str) -> None:
    async with town(store_url, Peer.request, asyncio.Event(), workers=1, GATEWAY_DRAIN="0") as of:
        asked = asyncio.ensure_future(of.ask())
        await until(lambda: of.gateway.process.poll() is None)
        while not await _live(of):
            await asyncio.sleep(0.02)
        of.gateway.process.send_signal(signal.SIGTERM)
        answer = await asked
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "shutting_down")
        assert answer.headers[b"retry-after"] == b"1"
        assert await of.ended(10) == 0
        assert await of.ledger() == [("settled", "gateway", 0)]


async def _live(of: Town) -> int:
    return int(await of.store.call(lambda: of.store.client.zcard("{acme}:live")))


async def test_g02_a_second_signal_ends_everything_at_once_and_settled(store_url: str) -> None:
    async with town(store_url, gated(asyncio.Event()), GATEWAY_DRAIN="600") as of:
        streams = await of.opened(20)
        of.gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: len(of.gateway.lines("draining")) == 2)
        of.gateway.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*(read(reader) for reader in streams))
        assert await of.ended(10) == 0
        assert all(b'"shutting_down"' in one.body for one in answers)
        assert await of.ledger() == [("settled", "gateway", 2)] * 20


# — G3 to G6: what dies


@pytest.mark.parametrize(("number", "row"), [(signal.SIGKILL, "g03"), (signal.SIGSEGV, "g06")], ids=["g03", "g06"])
async def test_g03_g06_the_others_serve_on_and_another_one_takes_its_place(
    store_url: str, number: signal.Signals, row: str
) -> None:
    go = asyncio.Event()
    async with town(store_url, gated(go)) as of:
        streams = await of.opened(30)
        dead, other = of.children()
        os.kill(dead, number)
        await until(lambda: dead not in of.children())
        took = await until(lambda: len(of.children()) == 2, 5)
        go.set()
        assert (await of.ask()).body.endswith(WHOLE)
        assert other in of.children()
        answers = await asyncio.gather(*(read(reader) for reader in streams))
        whole = [one for one in answers if one.body.endswith(WHOLE)]
        assert 0 < len(whole) < 30, "those of the other worker are whole, those of the dead one are cut"
        (died,) = of.gateway.lines("process_died")
        assert (died["how"], died["in_a_row"]) == (f"signal {number.name}", 1)
        assert took < 2


async def test_g04_nothing_outlives_a_supervisor_that_is_killed_and_its_port_is_free(store_url: str) -> None:
    go = asyncio.Event()
    async with town(store_url, gated(go)) as of:
        streams = await of.opened(10)
        left = [*of.children(), *of.children("control")]
        assert len(left) == 3
        of.gateway.process.kill()
        await until(lambda: len(of.gateway.lines("supervisor_gone")) == 2)
        go.set()
        answers = await asyncio.gather(*(read(reader) for reader in streams))
        assert all(one.body.endswith(WHOLE) for one in answers), "they drain, as after SIGTERM"
        await until(lambda: not alive(left))
        with socket.create_server(("127.0.0.1", of.gateway.port)):
            pass
        assert await of.ledger() == [("settled", "complete", 4)] * 10


async def test_g05_a_worker_that_is_stopped_takes_nothing_from_the_others(store_url: str) -> None:
    async with town(store_url, completion(2)) as of:
        stopped, _ = of.children()
        os.kill(stopped, signal.SIGSTOP)
        try:
            answers = [await of.ask() for _ in range(30)]
            assert all(one.body.endswith(WHOLE) for one in answers)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert all(one.body.endswith(WHOLE) for one in [await of.ask() for _ in range(10)])
        assert min(of.children()) == stopped, "it was not taken for dead"


async def test_a_worker_that_dies_again_and_again_is_started_later_and_later_and_told(store_url: str) -> None:
    async with town(store_url, completion(2), workers=1) as of:
        for _ in range(3):
            (worker,) = of.children()
            os.kill(worker, signal.SIGKILL)
            await until(lambda worker=worker: of.children() not in ([], [worker]))  # type: ignore[misc]
        assert [line["in_a_row"] for line in of.gateway.lines("process_died")] == [1, 2, 3]
        assert [line["process"] for line in of.gateway.lines("process_fails_again_and_again")] == ["worker-1"]


async def test_a_control_plane_that_dies_is_started_again_on_its_port(store_url: str) -> None:
    async with town(store_url, completion(1), workers=1) as of:
        (dead,) = of.children("control")
        os.kill(dead, signal.SIGKILL)
        await until(lambda: of.children("control") not in ([], [dead]))
        async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
            assert (await client.get(f"{of.admin}/healthz/live")).status_code == 200


# — G7, G8: memory and files


def address_space(pid: int, share: float | None) -> None:
    """Limit a process so that it has taken so much of its address space; None: as before."""
    taken = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY if share is None else int(taken / share), hard))


async def test_g07_less_is_taken_step_by_step_before_the_kernel_kills(store_url: str) -> None:
    go = asyncio.Event()
    async with town(store_url, gated(go), workers=1, GATEWAY_LOG="json") as of:
        (worker,) = of.children()
        streams = await of.opened(5)
        address_space(worker, 0.92)
        await until(lambda: bool(of.gateway.lines("memory_pressure")))
        refused = await of.ask()
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (503, "overloaded")
        assert refused.headers[b"connection"] == b"close"
        assert await of.ready() == 503
        address_space(worker, 0.98)
        await until(lambda: len(of.gateway.lines("memory_pressure")) == 2)
        waiting = asyncio.ensure_future(of.ask())
        go.set()
        assert all([(await read(reader)).body.endswith(WHOLE) for reader in streams]), "what was taken is served"
        assert not waiting.done(), "nobody accepts"
        address_space(worker, None)
        assert (await waiting).body.endswith(WHOLE)
        assert of.children() == [worker]


@contextmanager
def few_files(count: int) -> Iterator[None]:
    """What is started within the block may have so many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_g08_without_files_it_waits_and_does_not_spin_and_goes_on_when_there_are_some(store_url: str) -> None:
    async with AsyncExitStack() as stack:
        with few_files(256):
            of = await stack.enter_async_context(town(store_url, completion(2), workers=1))
        (worker,) = of.children()
        idle = [socket.create_connection(("127.0.0.1", of.gateway.port)) for _ in range(200)]
        await until(lambda: bool(of.gateway.lines("accepts_no_more")))
        asked = asyncio.ensure_future(of.ask())
        before = cpu(worker)
        await asyncio.sleep(1)
        assert cpu(worker) - before < 0.2, "it waits"
        assert not asked.done()
        for connection in idle:
            connection.close()
        assert (await asked).body.endswith(WHOLE)
        assert of.children() == [worker]
        assert of.gateway.lines("accepts_again")


# — G15: rolling restarts


ROLLS = int(os.environ.get("ROLLS", "2"))  # some seconds each; `make prove-rollouts` has twenty


async def test_g15_rolling_restarts_under_load_fail_no_request(store_url: str) -> None:
    async with town(store_url, completion(3, pace=0.01)) as of:
        over = asyncio.Event()
        failed: list[object] = []
        done = 0

        async def caller() -> None:
            nonlocal done
            while not over.is_set():
                try:
                    answer = await of.ask()
                    if answer.status != 200 or not answer.body.endswith(WHOLE):
                        failed.append(answer)
                    done += 1
                except (ConnectionError, ValueError) as failure:
                    failed.append(failure)

        callers = [asyncio.ensure_future(caller()) for _ in range(4)]
        first = of.children()
        for turn in range(1, ROLLS + 1):
            os.kill(of.supervisor, signal.SIGUSR2)
            await until(lambda turn=turn: len(of.gateway.lines("replaced")) == 4 * turn, 60)  # type: ignore[misc]
        over.set()
        await asyncio.gather(*callers)
        assert failed == []
        assert done > 10 * ROLLS
        await until(lambda: len(of.children()) == 2)
        assert not set(first) & set(of.children())


# — G18, G19: gateways that differ


async def served_together(towns: list[Town]) -> None:
    """The day's ten requests are ten, whoever is asked, and each has one row."""
    answers = [await towns[number % len(towns)].ask() for number in range(16)]
    assert sorted(one.status for one in answers) == [200] * 10 + [429] * 6
    assert await towns[0].ledger() == [("settled", "complete", 2)] * 10
    assert (await reconcile(towns[0].store, "acme")).differences == []


async def test_g18_gateways_of_other_policies_share_what_they_have_in_common(store_url: str) -> None:
    """As in a rolling update: the scripts of each go by their own hash, and the counts by the limit's name."""
    more = {"models": {**house.DOCUMENTS["models"], "another": {"pool": "demo"}}}
    async with two_gateways(store_url, {}, more) as towns:
        one, other = (town.gateway.lines("serving")[0]["revision"] for town in towns)
        assert one != other
        await served_together(towns)


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.mark.skipif(not FAKETIME.exists(), reason="no libfaketime on this machine (Debian: apt-get install faketime)")
@pytest.mark.parametrize("skew", ["+10s", "-10s"])
async def test_g19_a_gateway_whose_clock_is_off_by_ten_seconds_changes_nothing(store_url: str, skew: str) -> None:
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": skew, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    async with two_gateways(store_url, {}, {}, **faked) as towns:
        right, wrong = (town.gateway.lines("serving")[0]["timestamp"] for town in towns)
        assert abs((datetime.fromisoformat(wrong) - datetime.fromisoformat(right)).total_seconds()) > 5
        await served_together(towns)

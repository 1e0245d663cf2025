"""New code in the place of all that serves: what SIGUSR2 does to a supervisor and its processes, under real streams."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.proving.backend import completion
from tests.proving.commands import ROOT, Place
from tests.proving.load import completion_request, read
from tests.proving.processes import alive, program_of, states_of_children
from tests.proving.town import WHOLE, Town, gated, town, until


async def replaced(of: Town, turn: int = 1) -> None:
    """Have all replaced; it is the first time, or as many as there were `turn`s."""
    os.kill(of.supervisor, signal.SIGUSR2)
    await until(lambda: [line["process"] for line in of.gateway.lines("replaced")].count("supervisor") == turn, 60)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the package, which may be changed while it runs."""
    shutil.copytree(ROOT / "gateway", tmp_path / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "gateway"


def change(file: Path, what: Callable[[str], str]) -> None:
    file.write_text(what(file.read_text()))


async def test_a_stream_outlives_the_supervisor_that_it_began_under(store_url: str) -> None:
    go = asyncio.Event()
    async with town(store_url, gated(go)) as of:
        streams = await of.opened(20)
        first = of.children()
        await replaced(of)
        assert "takeover" in program_of(of.supervisor), "the same process executes another program"
        assert set(first) < set(of.children()), "who has streams is still there"
        go.set()
        answers = await asyncio.gather(*(read(reader) for reader in streams))
        assert all(one.whole and one.body.endswith(WHOLE) for one in answers)
        await until(lambda: not alive(first))
        await until(lambda: "Z" not in states_of_children(of.supervisor).values())
        assert len(of.children()) == 2
        assert of.gateway.lines() == [], "nothing to warn of"
        of.gateway.process.send_signal(signal.SIGTERM)
        assert await of.ended(20) == 0
        assert await of.ledger() == [("settled", "complete", 4)] * 20


async def test_who_is_to_go_all_the_same_lets_streams_of_before_end(store_url: str) -> None:
    go = asyncio.Event()
    async with town(store_url, gated(go), GATEWAY_DRAIN="60") as of:
        streams = await of.opened(10)
        await replaced(of)
        of.gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: len(of.gateway.lines("draining")) == 4)
        go.set()
        answers = await asyncio.gather(*(read(reader) for reader in streams))
        assert all(one.whole and one.body.endswith(WHOLE) for one in answers)
        assert await of.ended(20) == 0


async def test_a_connection_that_is_kept_ends_with_an_answer(store_url: str) -> None:
    async with town(store_url, completion(1), workers=1) as of:
        reader, writer = await asyncio.open_connection("127.0.0.1", of.gateway.port)
        of.writers.append(writer)
        request = completion_request(of.key, stream=False)
        writer.write(request)
        assert b"connection" not in (await read(reader)).headers
        os.kill(of.supervisor, signal.SIGUSR2)
        await until(lambda: bool(of.gateway.lines("replaced")), 60)
        await asyncio.sleep(2)  # longer than a request may be on its way
        writer.write(request)
        answer = await read(reader)
        assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
        await until(lambda: len(of.gateway.lines("replaced")) == 3, 60)


async def test_who_took_over_does_all_that_a_supervisor_does(store_url: str) -> None:
    async with town(store_url, completion(1)) as of:
        for turn in (1, 2):
            await replaced(of, turn)
        for number, kind in enumerate(("worker", "control"), 1):
            os.kill(of.children(kind)[-1], signal.SIGKILL)  # the newest one
            await until(lambda number=number: len(of.gateway.lines("process_died")) == number)  # type: ignore[misc]
            died = of.gateway.lines("process_died")[-1]
            assert (died["how"], died["in_a_row"]) == ("signal SIGKILL", 1)
        await until(lambda: (len(of.children()), len(of.children("control"))) == (2, 1))

        async def told() -> bool:
            async with httpx.AsyncClient(trust_env=False) as client:
                try:
                    text = (await client.get(f"{of.admin}/metrics")).text
                except httpx.TransportError:
                    return False
            return 'gateway_workers{state="ready"} 2.0' in text and "gateway_worker_restarts_total 1.0" in text

        while not await told():
            await asyncio.sleep(0.05)
        assert (await of.ask()).status == 200
        children = [*of.children(), *of.children("control")]
        os.kill(of.supervisor, signal.SIGKILL)
        await until(lambda: not alive(children))


async def test_it_is_new_code_that_takes_over(store_url: str, code: Path) -> None:
    async with town(store_url, completion(1), workers=1, PYTHONPATH=str(code.parent)) as of:
        change(code / "__init__.py", lambda text: text.replace('__version__ = "', '__version__ = "99.'))
        change(code / "supervisor.py", lambda text: text.replace('"replaced", process="supervisor"', '"anew"'))
        os.kill(of.supervisor, signal.SIGUSR2)
        await until(lambda: bool(of.gateway.lines("anew")), 60)
        async with httpx.AsyncClient(trust_env=False) as client:
            assert 'gateway_build_info{version="99.' in (await client.get(f"{of.admin}/metrics")).text


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("supervisor.py", lambda text: "raise RuntimeError('half an upgrade')\n"),
        ("handover.py", lambda text: text.replace("    lock: int", "    what_nobody_said: str\n    lock: int")),
    ],
)
async def test_code_that_could_not_take_over_leaves_all_as_it_is(
    store_url: str, code: Path, file: str, what: Callable[[str], str]
) -> None:
    async with town(store_url, completion(1), workers=1, PYTHONPATH=str(code.parent)) as of:
        change(code / file, what)
        os.kill(of.supervisor, signal.SIGUSR2)
        await until(lambda: bool(of.gateway.lines("not_replaced")), 60)
        assert [line["process"] for line in of.gateway.lines("not_replaced")] == ["supervisor"]
        assert "takeover" not in program_of(of.supervisor)
        assert (await of.ask()).status == 200
        os.kill(of.children()[-1], signal.SIGKILL)  # the newest one
        await until(lambda: bool(of.gateway.lines("process_died")) and len(of.children()) == 1)


async def test_a_signal_that_comes_between_two_supervisors_is_not_lost(store_url: str) -> None:
    async with town(store_url, completion(1), workers=1) as of:
        os.kill(of.supervisor, signal.SIGUSR2)
        await until(lambda: "takeover" in program_of(of.supervisor), 60)
        assert of.gateway.lines("replaced")[-1]["process"] != "supervisor", "nobody takes signals yet"
        of.gateway.process.send_signal(signal.SIGTERM)
        assert await of.ended(20) == 0
        assert not [pid for kind in ("worker", "control") for pid in of.children(kind)]


def test_a_store_of_our_own_stays_and_ends_with_the_last_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with place.running("serve", "--port", "0") as running:
        running.serving()
        (store,) = [pid for pid in states_of_children(running.process.pid) if "valkey" in program_of(pid)[0]]
        os.kill(running.process.pid, signal.SIGUSR2)
        running.until('"replaced"', '"supervisor"')
        place.run("keys", "list")  # the last one of the folder, if nobody held the lock
        assert alive([store])
        assert running.end() == 0
        assert not alive([store])

"""The supervisor with processes that do as a test says: who is started, replaced and ended, and what is told of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import redis
from structlog.testing import capture_logs

from gateway.embedded import Embedded
from gateway.pipes import Crew, Kind
from gateway.supervisor import Supervisor
from tests.proving.commands import ROOT
from tests.proving.processes import alive

# A process that says it is ready, unless the folder says otherwise, and ends when it is told to, or its line does.
CHILD = """
import json, os, socket, sys
from pathlib import Path
kind, line, folder = sys.argv[1], socket.socket(fileno=int(sys.argv[2])), Path(sys.argv[3])
with (folder / kind).open("a") as file: file.write(f"{os.getpid()}\\n")
what = (folder / "does").read_text() if (folder / "does").exists() and kind == "worker" else "serve"
if what.startswith("exit"): sys.exit(int(what[5:]))
if what == "serve": line.sendall(b'{"type":"Told","state":"ready","revision":"r1"}\\n')
for text in line.makefile():
    told = json.loads(text)
    with (folder / f"{kind}-told").open("a") as file: file.write(text)
    if told["type"] == "Leave": break
"""


class Crowd:
    """A supervisor under test, and what its processes wrote down."""

    def __init__(self, folder: Path, workers: int, store: Embedded | None = None) -> None:
        self.folder = folder
        listeners: dict[Kind, socket.socket] = {
            "worker": socket.create_server(("127.0.0.1", 0)),
            "control": socket.create_server(("127.0.0.1", 0)),
        }
        self.begun: list[str] = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.supervisor = Supervisor(
            self._command, listeners, workers, delay=0, drain=1, environment=environment, store=store
        )

    def _command(self, kind: Kind, listener: int, line: int) -> Sequence[str]:
        return [sys.executable, "-c", CHILD, kind, str(line), str(self.folder)]

    async def started(self, revision: str) -> None:
        self.begun.append(revision)

    def pids(self, kind: Kind = "worker") -> list[int]:
        """Of all that were started, the first one first."""
        file = self.folder / kind
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def counts(self, workers: int) -> bool:
        return len(self.pids()) == workers

    def does(self, what: str) -> None:
        (self.folder / "does").write_text(what)

    def crews(self) -> list[Crew]:
        file = self.folder / "control-told"
        lines = file.read_text().splitlines() if file.exists() else []
        return [msgspec.json.decode(line, type=Crew) for line in lines if '"Crew"' in line]

    def states(self) -> list[str]:
        """How the workers stand by what the control plane heard last."""
        return [worker.told.state for crew in self.crews()[-1:] for worker in crew.workers]


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def _told(lines: list[Any], event: str) -> bool:
    return any(line["event"] == event for line in lines)


@asynccontextmanager
async def crowd(folder: Path, workers: int = 1, store: Embedded | None = None) -> AsyncIterator[Crowd]:
    """A supervisor that runs; at the end nothing is left of it."""
    found = Crowd(folder, workers, store)
    running = asyncio.ensure_future(found.supervisor.run(found.started))
    try:
        await until(lambda: found.begun)
        yield found
    finally:
        found.supervisor._leave()
        assert await running == 0
        assert not alive(pid for kind in ("worker", "control") for pid in found.pids(kind))


async def test_all_are_started_and_end_when_they_are_told_to(tmp_path: Path) -> None:
    async with crowd(tmp_path, workers=2) as found:
        assert (found.begun, len(found.pids()), len(found.pids("control"))) == (["r1"], 2, 1)
        await until(
            lambda: found.crews() and [worker.told.state for worker in found.crews()[-1].workers] == ["ready"] * 2
        )
    assert found.crews()[-1].leaving, "the control plane hears of it before it ends itself"


async def test_who_cannot_serve_at_the_start_ends_all_with_its_code(tmp_path: Path) -> None:
    found = Crowd(tmp_path, 1)
    found.does("exit 3")
    assert await found.supervisor.run(found.started) == 3
    assert found.begun == []
    assert len(found.pids()) == 1, "the next one would say the same"
    assert not alive(found.pids("control"))


async def test_a_signal_during_the_start_is_not_lost_on_anybody(tmp_path: Path) -> None:
    found = Crowd(tmp_path, 3)
    running = asyncio.ensure_future(found.supervisor.run(found.started))
    await until(lambda: found.supervisor._processes)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(10):
        assert await running == 0
    assert not alive(pid for kind in ("worker", "control") for pid in found.pids(kind))


async def test_who_is_to_replace_another_and_dies_takes_nobodys_place(tmp_path: Path) -> None:
    async with crowd(tmp_path) as found:
        (first,) = found.pids()
        for what in ("exit 1", "hang"):
            before = len(found.pids())
            found.does(what)
            with capture_logs() as lines:
                os.kill(os.getpid(), signal.SIGUSR2)
                if what == "hang":
                    await until(partial(found.counts, before + 1))
                    os.kill(found.pids()[-1], signal.SIGKILL)
                await until(partial(_told, lines, "not_replaced"))
            await until(lambda: not found.supervisor._rolling)
            assert len(found.pids()) == before + 1, "nobody was started in its stead"
        assert alive([first])
        found.does("serve")
        os.kill(os.getpid(), signal.SIGUSR2)
        await until(lambda: not alive([first]) and len(found.pids("control")) == 2)
        await until(lambda: not found.supervisor._rolling)


async def test_restarts_and_who_fails_again_and_again_are_told(tmp_path: Path) -> None:
    async with crowd(tmp_path) as found:
        for count in range(1, 4):
            os.kill(found.pids()[-1], signal.SIGKILL)
            await until(partial(found.counts, count + 1))
        await until(lambda: found.crews()[-1].workers[0].told.state == "ready")
        (worker,) = found.crews()[-1].workers
        assert (worker.restarts, worker.failing, worker.pid) == (3, True, found.pids()[-1])


async def test_a_store_of_its_own_is_started_again(tmp_path: Path) -> None:
    def died() -> list[Any]:
        return [line for line in lines if line.get("process") == "store"]

    with Embedded(tmp_path / "state") as store, capture_logs() as lines:
        async with crowd(tmp_path, store=store):
            with redis.Redis.from_url(store.url) as client:
                os.kill(client.info("server")["process_id"], signal.SIGKILL)
            await until(died)
            with redis.Redis.from_url(store.url) as client:
                assert client.ping()
    assert len(died()) == 1

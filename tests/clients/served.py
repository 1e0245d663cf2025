"""A gateway as operators run it: processes on ports, a state folder, keys from the command line, JSON lines.

Nothing here looks into the gateway: what a test knows of it stands in an answer, in a line of its log, in what the
commands print, or in the backend's own ledger.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import yaml

from tests.proving.ports import free_port

PATIENCE = 20.0  # seconds that anything here may take; then something is wrong
ROOT = Path(__file__).parents[2]

# A deadline of 50 ms is right for a service and wrong for a test on a machine that does other things too.
ENVIRONMENT = {"GATEWAY_LOG": "json", "GATEWAY_STORE_DEADLINE": "5", "GATEWAY_DRAIN": "5"}

Line = dict[str, Any]


class Log:
    """The lines of a process as they come, each a JSON object."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.lines: list[Line] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(stream,))
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for text in stream:
            with self._news:
                self.lines.append(json.loads(text))
                self._news.notify_all()

    def of(self, called: str) -> list[Line]:
        """The lines of the exchanges that the caller called so, or the gateway."""
        return [line for line in self.lines if called in (line.get("client_request_id"), line.get("request_id"))]

    async def wait(self, called: str, number: int) -> list[Line]:
        """The lines of so many exchanges that are called so, as soon as they have ended."""

        def arrive() -> list[Line]:
            with self._news:
                self._news.wait_for(lambda: len(self.of(called)) >= number, PATIENCE)
                return self.of(called)

        lines = await asyncio.to_thread(arrive)
        assert number == len(lines), lines
        return lines

    def close(self) -> None:
        """Until the process has closed its end."""
        self._reader.join()


class Backend:
    """`gateway echo` in a process of its own, asked over `client`."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url
        self._client = client

    async def rows(self, called: str) -> list[dict[str, Any]]:
        """What the backend has written down of the requests that are called so, when the last of them has ended."""
        patience = time.monotonic() + PATIENCE
        while True:
            ledger = self._client.get(self.url + "/echo/ledger").json()
            rows = [row for row in ledger if row["id"] == called]
            if all(row["status"] != "running" for row in rows):
                return rows
            assert time.monotonic() < patience, rows
            await asyncio.sleep(0.01)


class Served:
    """`gateway serve` in a process of its own, and the commands beside it."""

    def __init__(self, url: str, options: tuple[str, ...], process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.url = url
        self.log = Log(process.stdout)
        self._options = options
        self._process = process
        self._keys: dict[tuple[str, ...], str] = {}

    def key(self, team: str, *options: str) -> str:
        """A key of this team, made by the command line; the same one for the same words."""
        asked = (team, *options)
        if asked not in self._keys:
            made = self._command("keys", "create", "--team", *asked, *self._options)
            self._keys[asked] = made["key"]
        return self._keys[asked]

    def usage(self, user: str) -> dict[str, int]:
        """What the command line tells of this user."""
        found: list[dict[str, int]] = self._command("usage", "--by", "", "--user", user, *self._options[:2])
        (sums,) = found
        return sums

    def _command(self, *words: str) -> Any:
        command = [sys.executable, "-m", "gateway", *words, "--json"]
        done = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    def terminate(self) -> None:
        """SIGTERM; it may go on until its answers have ended."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code, when it has ended and all its lines are here."""
        code = self._process.wait(PATIENCE)
        self.log.close()
        return code


@contextmanager
def backend() -> Iterator[Backend]:
    """A scripted backend that is ready, until the block is left."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _process("echo", "--port", str(port)) as process, httpx.Client(trust_env=False) as client:
        _until_ready(client, url + "/health", process)
        yield Backend(url, client)


@contextmanager
def gateway(folder: Path, documents: Mapping[str, Any]) -> Iterator[Served]:
    """A gateway that is ready. Left, it is told to stop, and must end with 0 and have complained of nothing."""
    policies, state, port = folder / "policies", folder / "state", free_port()
    policies.mkdir(parents=True)
    (policies / "all.yaml").write_text(yaml.safe_dump(dict(documents), sort_keys=False))
    options = ("--state", str(state), "--policies", str(policies))
    with _process("serve", *options, "--port", str(port), stdout=subprocess.PIPE) as process:
        served = Served(f"http://127.0.0.1:{port}", options, process)
        with httpx.Client(trust_env=False) as client:
            _until_ready(client, served.url + "/healthz/ready", process)
        yield served
        served.terminate()
        assert served.wait() == 0
        assert [line for line in served.log.lines if line["level"] != "info"] == []


@contextmanager
def _process(*words: str, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "gateway", *words]
    with subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=stdout) as process:
        try:
            yield process
        finally:
            process.terminate()  # asked, not killed, also where a test has failed: it stops the store that it started
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _environment() -> dict[str, str]:
    """Ours, without what would configure another gateway."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    return {"GATEWAY_ADMIN_PORT": "0", **ours, **ENVIRONMENT}


def _until_ready(client: httpx.Client, url: str, process: subprocess.Popen[bytes]) -> None:
    patience = time.monotonic() + PATIENCE
    while True:
        try:
            if client.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, "it ended before it was ready"
        assert time.monotonic() < patience, "it was not ready in time"
        time.sleep(0.02)

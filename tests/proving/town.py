"""A gateway as `gateway serve` starts it, of several processes, and what a proof asks of it."""

from __future__ import annotations

import asyncio
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from gateway.ledger import rows
from gateway.store import Store
from tests.proving import house
from tests.proving.backend import DONE, END, EVENTS, FINISHED, Backend, Peer, Request, chunk, forever, reported, token
from tests.proving.load import Read, completion_request, read
from tests.proving.processes import program_of, states_of_children
from tests.proving.workers import Worker, _keys

TEAM = "research"
WHOLE = b"data: [DONE]\n\n"


class Town:
    """One gateway of several processes, what it is called by, and the backend behind it."""

    def __init__(self, gateway: Worker, admin: str, key: str, store: Store, asked: Sequence[Request] = ()) -> None:
        self.gateway = gateway
        self.admin = admin
        self.key = key
        self.store = store
        self.asked = asked  # what the backend was sent
        self.writers: list[asyncio.StreamWriter] = []

    @property
    def supervisor(self) -> int:
        return self.gateway.process.pid

    def children(self, kind: str = "worker") -> list[int]:
        """The processes of a kind that its supervisor has."""
        return children_of(self.supervisor, kind)

    async def opened(self, count: int, **given: Any) -> list[asyncio.StreamReader]:
        """So many streams, each of which has begun."""
        request = completion_request(self.key, stream=True, **given)

        async def one() -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
            self.writers.append(writer)
            writer.write(request)
            await _begun(reader)
            return reader

        found: list[asyncio.StreamReader] = []
        while len(found) < count:  # as many at once as the backend's queue of connections takes
            found += await asyncio.gather(*(one() for _ in range(min(50, count - len(found)))))
        return found

    async def ask(self, key: str = "") -> Read:
        """One short answer over a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.gateway.port)
        try:
            writer.write(completion_request(key or self.key, stream=True))
            return await read(reader)
        finally:
            writer.transport.abort()

    async def ready(self) -> int:
        return (await _get(f"http://127.0.0.1:{self.gateway.port}/healthz/ready")).status_code

    async def reasons(self) -> list[str]:
        """Why it is not ready; nothing where it is."""
        told: list[str] = (await _get(f"http://127.0.0.1:{self.gateway.port}/healthz/ready")).json()["reasons"]
        return told

    async def figures(self, *names: str) -> list[float]:
        """What the control plane tells Prometheus under names that have no labels."""
        text = (await _get(f"{self.admin}/metrics")).text
        return [float(re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)[0]) for name in names]

    async def sum(self, name: str) -> float:
        """What it tells under a name over all labels."""
        text = (await _get(f"{self.admin}/metrics")).text
        return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))

    async def limits(self) -> list[dict[str, Any]]:
        """Where the key stands."""
        found: list[dict[str, Any]] = (await _get(f"http://127.0.0.1:{self.gateway.port}/v1/limits", self.key)).json()[
            "data"
        ]
        return found

    async def ended(self, patience: float) -> int:
        """Its exit code, once it and all that it started are gone."""
        await until(lambda: self.gateway.process.poll() is not None, patience)
        return self.gateway.process.returncode

    async def ledger(self) -> list[tuple[str, str, int]]:
        """The rows: status, who ended it, output tokens."""
        return [
            (one.record.status, one.record.ended, one.record.output_tokens) async for one in rows(self.store, "acme")
        ]


def children_of(supervisor: int, kind: str = "worker") -> list[int]:
    """The processes of a kind that a supervisor has."""
    children = {pid: program_of(pid) for pid in states_of_children(supervisor)}
    return sorted(pid for pid, words in children.items() if "process" in words and kind in words)


async def _begun(reader: asyncio.StreamReader) -> None:
    """Until a first token has come; it stays to be read."""
    while b'"text"' not in (come := bytes(reader._buffer)):  # type: ignore[attr-defined]
        assert not reader._eof, come  # type: ignore[attr-defined]
        assert b'"error"' not in come, come
        await reader._wait_for_data("begun")  # type: ignore[attr-defined]


async def _get(url: str, key: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=20) as client:
        return await client.get(url, headers=headers)


async def until(holds: Callable[[], bool], patience: float = 20.0) -> float:
    """Until it holds; how long that took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() < begin + patience, "it did not come to pass"
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


def gated(go: asyncio.Event, before: int = 2, after: int = 2, only: bytes = b"") -> Any:
    """A stream of some tokens, and of the others once it may go on: at once, where the request has no such word."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS, *[chunk(token())] * before)
        if only in peer.requests[-1].body:
            await go.wait()
        await peer.send(*[chunk(token())] * after, chunk(reported(3, before + after, choices=FINISHED)))
        await peer.send(chunk(DONE) + END)

    return answer


@asynccontextmanager
async def town(
    store_url: str,
    *steps: Any,
    workers: int = 2,
    policies: Mapping[str, Any] | None = None,
    **environment: str,
) -> AsyncIterator[Town]:
    """A gateway of so many workers in front of a backend with these steps; `policies` are sections beside the usual
    ones."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
        backend = await stack.enter_async_context(Backend(forever(*steps)))
        documents = house.documents([], **(policies or {}))
        documents["pools"] = {"demo": {"upstreams": [{"url": backend.url, "max_in_flight": 10_000}]}}
        (folder / "policies").mkdir()
        (folder / "policies" / "all.yaml").write_text(yaml.safe_dump(documents, sort_keys=False))
        key = (await _keys(store_url, [TEAM]))[TEAM]
        given = {"GATEWAY_WORKERS": str(workers), "GATEWAY_ADMIN_PORT": "0", **environment}
        gateway = Worker(0, folder, store_url, **given)
        store = Store(store_url, deadline=5)
        stack.push_async_callback(store.aclose)
        stack.callback(gateway.end)
        await gateway.serving()
        (told,) = gateway.lines("serving")
        of = Town(gateway, f"http://{told['admin']}", key, store, backend.requests)
        yield of
        for writer in of.writers:
            writer.transport.abort()
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: gateway.process.poll() is not None)

"""Gateways as processes on one store, and beside them a backend that keeps the ledger: what the proofs of limits drive.

    async with fleet(policies, teams=["research"], workers=4) as gateways:
        asked = await gateways.ask("research", {"prompt": "Hi", "max_tokens": 9}, Plan(tokens=5, seconds=0.3))
        gateways.ledger[asked.id].produced

The backend is told beforehand, by the id of a request, how it is to be answered, and keeps to `max_tokens` as a real
one does. All instants are time.monotonic(). A request was admitted between its `sent` and its `arrived`: what lies in a
window by these two was surely admitted in it, however late a loaded machine lets the backend see it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gateway.keys import KeyRing
from gateway.store import Store
from tests.proving.backend import DONE, END, EVENTS, Backend, Peer, chunk, forever, ok
from tests.proving.house import MODEL

ROOT = Path(__file__).parents[2]
PEPPER = "of the proofs"
_PATIENCE = 60.0  # seconds: a worker on a busy machine, which imports for a second when it has a core alone
_PIECES = 8  # in which a stream is written
_TOKEN = b'"finish_reason":null'  # what an event of a token has, and no other

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the backend answers: tokens of each choice (fewer where `max_tokens` says so), and how long that takes.

    Of a prompt it counts one token for each `density` bytes of text and `extra` ones, as templates add them. A stream
    reports usage in each event, or in the last one only.
    """

    tokens: int
    seconds: float = 0.0
    density: float = 4.0
    extra: int = 0
    usage: Literal["every", "finish"] = "every"


@dataclass(slots=True)
class Entry:
    """One request in the backend's ledger. `ended` is when its last byte was about to leave, None: it was cut."""

    arrived: float
    prompt: int
    produced: int = 0
    ended: float | None = None


@dataclass(slots=True)
class Asked:
    """One request as its caller saw it: `wait` is what Retry-After-ms said, in seconds; `left` when the caller had
    enough, `received` the tokens of a stream that had come until then."""

    id: str
    team: str
    body: Mapping[str, Any]
    plan: Plan
    sent: float
    status: int = 0
    answered: float = 0.0
    wait: float | None = None
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    left: float | None = None
    received: int = 0


# — the backend


class Ledger:
    """A script of the backend: answers by plan, and writes down what it served."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.entries: dict[str, Entry] = {}

    async def __call__(self, peer: Peer) -> None:
        await peer.request()
        request = peer.requests.pop()
        peer.backend.requests.clear()  # a proof sends many, and keeps its own book
        body = json.loads(request.body)
        asked = dict(request.headers)[b"x-request-id"].decode()
        plan = self.plans[asked]
        entry = self.entries[asked] = Entry(time.monotonic(), prompt_tokens(body, plan))
        tokens = answer_tokens(body, plan)
        if body.get("stream"):
            await self._stream(peer, plan, entry, tokens, chat="messages" in body)
        else:
            await _pause(peer, plan.seconds)
            text = json.dumps({"choices": [{"index": 0, "text": " w"}], "usage": _usage(entry, tokens)})
            entry.produced, entry.ended = tokens, time.monotonic()
            await peer.send(ok(text.encode()))

    async def _stream(self, peer: Peer, plan: Plan, entry: Entry, tokens: int, *, chat: bool) -> None:
        await peer.send(EVENTS)
        said = '"delta":{"content":" w"}' if chat else '"text":" w"'
        pieces = min(_PIECES, tokens) or 1
        for piece in range(pieces):
            await _pause(peer, plan.seconds / pieces)
            until = tokens * (piece + 1) // pieces
            events = []
            for number in range(entry.produced + 1, until + 1):
                told = json.dumps(_usage(entry, number)) if plan.usage == "every" else "null"
                events.append(f'data: {{"choices":[{{"index":0,{said},"finish_reason":null}}],"usage":{told}}}\n\n')
            await peer.send(chunk("".join(events).encode()))
            entry.produced = until
        told = json.dumps(_usage(entry, tokens))
        finish = f'data: {{"choices":[{{"index":0,"finish_reason":"stop"}}],"usage":{told}}}\n\n'.encode()
        entry.ended = time.monotonic()
        await peer.send(chunk(finish) + chunk(DONE) + END)


async def _pause(peer: Peer, seconds: float) -> None:
    await asyncio.sleep(seconds)
    if peer._reader.at_eof():
        raise ConnectionResetError("the gateway has left")


def _usage(entry: Entry, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": entry.prompt, "completion_tokens": tokens, "total_tokens": entry.prompt + tokens}


def prompt_tokens(body: Mapping[str, Any], plan: Plan) -> int:
    """What the backend counts of a request's input."""
    if "messages" in body:
        texts = [message["content"] for message in body["messages"]]
    else:
        prompt = body["prompt"]
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            return len(prompt)
        texts = [prompt] if isinstance(prompt, str) else prompt
    return sum(math.ceil(len(text.encode()) / plan.density) + plan.extra for text in texts)


def answer_tokens(body: Mapping[str, Any], plan: Plan) -> int:
    """What the backend produces if it is let, over all prompts and choices."""
    allowed: list[int] = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else 1
    choices: int = (body.get("n") or 1) * prompts
    return min([plan.tokens, *allowed]) * choices


# — the gateways


class Worker:
    """One gateway process, and what it has said."""

    def __init__(self, number: int, folder: Path, store_url: str, **environment: str) -> None:
        self._log = folder / f"worker-{number}.log"
        ours = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        given = {
            "GATEWAY_REDIS_URL": store_url,
            "GATEWAY_KEY_PEPPER": PEPPER,
            "GATEWAY_LOG": "json",
            "GATEWAY_STATE": str(folder),
            "GATEWAY_WORKERS": "0",  # in the process that is started: it is the one that is killed
            "GATEWAY_STORE_DEADLINE": "5",  # lax: these machines are noisy, and 50 ms is not what is proved
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        words = ["serve", "--policies", str(folder / "policies"), "--port", "0"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", *words],
                cwd=folder,
                env={**ours, **given},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.port = 0
        self.free: list[Connection] = []

    async def serving(self) -> None:
        """Until it serves. Raises RuntimeError with what it said where it does not."""
        until = time.monotonic() + _PATIENCE
        while not (begun := self.lines("serving")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the gateway does not serve: {self._log.read_text()}")
            await asyncio.sleep(0.02)
        self.port = begun[0]["port"]

    async def connection(self) -> Connection:
        """One that is open, as far as one can know: a gateway closes what has been idle for some seconds."""
        while self.free:
            reader, writer = self.free.pop()
            if not reader.at_eof():
                return reader, writer
            writer.transport.abort()
        return await asyncio.open_connection("127.0.0.1", self.port)

    def lines(self, *events: str) -> list[dict[str, Any]]:
        """What its log has of these events; of none, what it has of warnings and errors."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        if events:
            return [line for line in lines if line.get("event") in events]
        return [line for line in lines if line.get("level") in ("warning", "error", "critical")]

    def end(self) -> None:
        for _, writer in self.free:
            writer.transport.abort()
        self.process.kill()
        self.process.wait()


class Fleet:
    """Gateways that serve, and what their callers ask of them."""

    def __init__(self, workers: list[Worker], keys: Mapping[str, str], ledger: Ledger, store_url: str) -> None:
        self.workers = workers
        self.keys = keys
        self.store_url = store_url
        self.ledger = ledger.entries
        self._plans = ledger.plans
        self._asked = 0

    async def ask(
        self,
        team: str,
        body: Mapping[str, Any],
        plan: Plan,
        *,
        worker: int | None = None,
        leave: float | None = None,
        path: str = "completions",
    ) -> Asked:
        """Ask and read the whole answer; or leave after so many seconds, with whatever has come by then."""
        self._asked += 1
        asked_id = f"{self._asked}"
        self._plans[asked_id] = plan
        of = self.workers[self._asked % len(self.workers) if worker is None else worker]
        body = {"model": MODEL, **body}
        content = json.dumps(body).encode()
        head = (
            b"POST /v1/%b HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n"
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n"
        ) % (path.encode(), self.keys[team].encode(), asked_id.encode(), len(content))
        reader, writer = await of.connection()
        asked = Asked(asked_id, team, body, plan, time.monotonic())
        try:
            writer.write(head + content)
            async with asyncio.timeout(leave):
                await _read(reader, asked)
        except TimeoutError:
            asked.left = time.monotonic()
            writer.transport.abort()
            return asked
        except BaseException:
            writer.transport.abort()
            raise
        if asked.headers.get(b"connection") == b"close":
            writer.transport.abort()
        else:
            of.free.append((reader, writer))
        return asked

    def troubles(self) -> list[dict[str, Any]]:
        """What the gateways' logs have of warnings and errors."""
        return [line for worker in self.workers for line in worker.lines()]


async def _read(reader: asyncio.StreamReader, asked: Asked) -> None:
    """The answer, as far as it comes: of a stream the tokens are counted on the way."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    asked.answered = time.monotonic()
    line, *fields = head[:-4].split(b"\r\n")
    asked.status = int(line.split(b" ")[1])
    asked.headers = {name: value.strip() for name, _, value in (f.partition(b":") for f in fields)}
    if b"retry-after-ms" in asked.headers:
        asked.wait = int(asked.headers[b"retry-after-ms"]) / 1000
    if b"content-length" in asked.headers:
        await reader.readexactly(int(asked.headers[b"content-length"]))
        return
    tail = b""
    while not tail.endswith(b"\r\n0\r\n\r\n"):
        piece = await reader.read(65536)
        if not piece:
            raise ConnectionResetError("a stream was cut")
        asked.received += (tail[-40:] + piece).count(b'"finish_reason":null') - tail[-40:].count(
            b'"finish_reason":null'
        )
        tail = (tail + piece)[-40:]


@asynccontextmanager
async def fleet(
    store_url: str, policies: Mapping[str, Any], teams: Iterable[str], workers: int = 4, **environment: str
) -> AsyncIterator[Fleet]:
    """So many gateways on a store, a key for each of these teams, and the counting backend behind the pool `demo`."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-")))
        ledger = Ledger()
        backend = await stack.enter_async_context(Backend(forever(ledger)))
        pools = {"demo": {"upstreams": [{"url": backend.url, "max_in_flight": 10_000}]}}
        (folder / "policies").mkdir()
        (folder / "policies" / "all.yaml").write_text(yaml.safe_dump({**policies, "pools": pools}, sort_keys=False))
        keys = await _keys(store_url, teams)
        processes = []
        for number in range(workers):
            processes.append(Worker(number, folder, store_url, **environment))
            stack.callback(processes[-1].end)
        await asyncio.gather(*(process.serving() for process in processes))
        yield Fleet(processes, keys, ledger, store_url)


async def _keys(store_url: str, teams: Iterable[str]) -> dict[str, str]:
    """A key for each team, made before there is a gateway that would have to hear of it."""
    store = Store(store_url, deadline=5.0)
    try:
        ring = KeyRing(store, PEPPER.encode())
        await ring.load()
        return {t: (await ring.create(t, user=None, name=None, models=(), expires=None))[1] for t in teams}
    finally:
        await store.aclose()

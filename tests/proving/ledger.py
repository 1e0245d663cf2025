"""Every token is written down once, whatever dies: gateways, their Valkey and exporters, killed under load.

`python -m tests.proving.ledger --requests 10000 --kills 100` lets callers ask workers that share a Valkey with an AOF,
a state folder, and a backend that keeps a ledger of its own. Meanwhile a worker, Valkey or an exporter is killed with
SIGKILL every few seconds and started again, and workers are paused for up to 20 s. When all is quiet, the gateway's
ledger is held against the backend's: a verdict a line, and exit code 1 where one fails.

A caller names no id, so the backend sees the gateway's, which is the row's; how it is to be answered stands in the
prompt. All instants are time.monotonic() of this process, which is the backend's and the callers', too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import redis
import uvloop
import yaml

from gateway.embedded import _server_binary
from gateway.keys import KeyRing
from gateway.records import (
    COUNTERS,
    GRAINS,
    ORGANISATIONS,
    Grain,
    UsageRecord,
    group_of,
    ledger_stream,
    sums_key,
)
from gateway.store import Store
from tests.proving.backend import DONE, END, EVENTS, Backend, Peer, chunk, forever, ok
from tests.proving.stores import until
from tests.proving.town import children_of
from tests.proving.workers import PEPPER, ROOT, Worker

Fsync = Literal["everysec", "always"]
Span = tuple[float, float]
Outcome = Literal["", "whole", "refused", "left", "cut", "unsent", "hung"]

CORRECTION = ":correction"
EXPORT = "archive"
RENEWED = 5.0  # seconds from one renewal of a reservation, with its progress, to the next
LAPSE = 15.0  # seconds after which a reservation that nobody renewed is swept
NOISE = 2.0  # seconds by which what is periodic may be late on a busy machine
DOZE = LAPSE + 8.0  # seconds in which a worker that sleeps is surely swept
QUIET = 60.0  # seconds within which everything has to be settled, swept and exported after the last answer
_STARTS = 3  # of workers in a row, until nobody is expected to serve any more
_PATIENCE = 90.0  # of a caller: the longest answer, and the longest pause of its worker, and more
_TOKEN = b'"finish_reason":null'  # what an event of a token has, and no other


# — what is asked


class Order(msgspec.Struct, frozen=True):
    """How the backend is to answer: it stands in the first line of the prompt. The first `fails` attempts get a 503."""

    number: int
    tokens: int
    seconds: float
    usage: Literal["every", "finish"]
    cached: int = 0
    reasoning: int = 0
    fails: int = 0


@dataclass
class Life:
    """What became of one worker process."""

    number: int
    killed: float | None = None
    pauses: list[Span] = field(default_factory=list)

    def __str__(self) -> str:
        return f"worker-{self.number}"


@dataclass(slots=True)
class Call:
    """One request as its caller saw it. `received` are the tokens of a stream that had come."""

    order: Order
    team: str
    key: str
    model: str
    stream: bool
    leaves: float | None
    worker: Life
    sent: float
    most: int = 0  # tokens that may be reserved for it
    id: str = ""
    status: int = 0
    code: str = ""  # of an error
    received: int = 0
    outcome: Outcome = ""
    ended: float = 0.0


# Teams with the prices of their models: a dollar is soon gone, and nothing is rounded away.
TEAMS = {"research": "acme", "support": "acme", "trade": "globex", "bare": "globex"}  # the last one has no limits
PRICES: dict[str, dict[str, float]] = {
    "small": {"input": 0.2, "cached_input": 0.1, "output": 0.4, "reasoning": 0.6},
    "large": {"input": 3.0, "cached_input": 0.3, "output": 15.0, "reasoning": 15.0},
    "plain": {"input": 0.7, "output": 1.3},
}
_LIMITS = [
    {"name": "month-tokens", "count": "total_tokens", "quota": "1000000000/month", "per": ["team"]},
    {"name": "month-usd", "count": "usd", "quota": "100000/month", "per": ["team"]},
    {"name": "month-requests", "count": "requests", "quota": "10000000/month", "per": ["team"]},
    {"name": "seats", "count": "concurrent_requests", "at_most": 5000, "per": ["team"]},
]
_DEAREST = 15  # micro-dollars a token, of the above


def policies(backends: Sequence[str], exports: Path | None) -> dict[str, Any]:
    """The documents: limits that nobody reaches, and an export to JSON lines where there are exporters."""
    documents: dict[str, Any] = {
        "pools": {"demo": {"upstreams": [{"url": url, "max_in_flight": 10_000} for url in backends]}},
        "models": {name: {"pool": "demo", "max_output_tokens": 500, "price": price} for name, price in PRICES.items()},
        "plans": {"metered": {"limits": _LIMITS}, "free": {"limits": []}},
        "teams": {
            team: {"organisation": organisation, "plan": "free" if team == "bare" else "metered"}
            for team, organisation in TEAMS.items()
        },
    }
    if exports is not None:
        documents["exports"] = {EXPORT: {"to": "jsonl", "folder": str(exports)}}
    return documents


def order(dice: random.Random, number: int) -> Order:
    """A random answer: short ones mostly, and streams that live through a renewal or two."""
    seconds = dice.choice((0.05, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 7.0, 12.0))
    tokens = dice.randint(1, 300)
    return Order(
        number,
        tokens,
        round(seconds * dice.uniform(0.8, 1.2), 3),
        dice.choice(("every", "finish")),
        cached=dice.choice((0, 0, 7)),
        reasoning=dice.choice((0, 0, tokens // 3)),
        fails=1 if dice.random() < 0.02 else 0,
    )


def body_of(call: Call, dice: random.Random) -> tuple[str, bytes]:
    """The path of a call, and what it sends."""
    text = msgspec.json.encode(call.order).decode() + "\n" + "word " * dice.randint(5, 40)
    body: dict[str, Any] = {
        "model": call.model,
        "stream": call.stream,
        "max_tokens": call.order.tokens + dice.randint(0, 100),
        "user": f"user-{dice.randint(1, 3)}",
    }
    call.most = len(text) + 64 + int(body["max_tokens"])
    if dice.random() < 0.5:
        return "completions", json.dumps({**body, "prompt": text}).encode()
    return "chat/completions", json.dumps({**body, "messages": [{"role": "user", "content": text}]}).encode()


async def ask(call: Call, port: int, key: str, path: str, body: bytes) -> None:
    """Ask, read until the end or until the caller leaves, and note what came of it."""
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer = None
    try:
        async with asyncio.timeout(call.leaves or _PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            call.outcome = "cut"
            await _read(reader, call)
    except TimeoutError:
        call.outcome = "left" if call.leaves else "hung"
    except (ConnectionError, asyncio.IncompleteReadError):
        call.outcome = call.outcome or "unsent"
    finally:
        call.ended = time.monotonic()
        if writer is not None:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader, call: Call) -> None:
    line, *fields = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    headers = dict(one.split(b": ", 1) for one in fields if one)
    call.status = int(line.split(b" ")[1])
    call.id = headers[b"x-gateway-request-id"].decode()
    if b"content-length" in headers:
        content = await reader.readexactly(int(headers[b"content-length"]))
        call.outcome = "whole" if call.status == 200 else "refused"
        if call.outcome == "refused":
            call.code = json.loads(content).get("error", {}).get("code", "of the backend")
        return
    tail = b""
    while piece := await reader.read(65536):
        kept = tail[-len(_TOKEN) + 1 :]  # part of a token's mark may stand at the end of it, and never all of it
        call.received += (kept + piece).count(_TOKEN)
        tail = (tail + piece)[-64:]
    # Nothing but the end of the chunks says that a stream is whole.
    call.outcome = "whole" if tail.endswith(b"0\r\n\r\n") and DONE in tail else "cut"


# — the backend


@dataclass(slots=True)
class Attempt:
    """One request as the backend served it. `sent` tells when so many tokens had left, `handed` how many tokens the
    socket was given: with a caller who goes just then, they may have been read or not."""

    order: Order
    prompt: int
    arrived: float
    handed: int = 0
    sent: list[tuple[float, int]] = field(default_factory=list)
    whole: bool = False

    def surely(self, at: float) -> int:
        """The tokens that had left by then."""
        place = bisect_right(self.sent, at, key=lambda one: one[0])
        return self.sent[place - 1][1] if place else 0

    def usage(self, tokens: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": tokens,
            "total_tokens": self.prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": self.order.cached},
            "completion_tokens_details": {"reasoning_tokens": min(self.order.reasoning, tokens)},
        }


class Book:
    """A script of the backend: answers as the prompt says, and writes down what it served, by the gateway's id."""

    def __init__(self) -> None:
        self.attempts: defaultdict[str, list[Attempt]] = defaultdict(list)

    async def __call__(self, peer: Peer) -> None:
        await peer.request()
        request = peer.requests.pop()
        peer.backend.requests.clear()  # a proof sends many, and keeps its own book
        body = json.loads(request.body)
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        asked = msgspec.json.decode(text.partition("\n")[0], type=Order)
        attempts = self.attempts[dict(request.headers)[b"x-request-id"].decode()]
        attempt = Attempt(asked, -(-len(text) // 4), time.monotonic())
        attempts.append(attempt)
        if len(attempts) <= asked.fails:
            await peer.send(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")
        elif body["stream"]:
            await self._stream(peer, attempt, chat="messages" in body)
        else:
            await _pause(peer, asked.seconds)
            text = json.dumps({"choices": [{"index": 0, "text": " w"}], "usage": attempt.usage(asked.tokens)})
            attempt.handed = asked.tokens
            await peer.send(ok(text.encode()))
            attempt.sent.append((time.monotonic(), asked.tokens))
            attempt.whole = True

    async def _stream(self, peer: Peer, attempt: Attempt, *, chat: bool) -> None:
        asked = attempt.order
        said = '"delta":{"content":" w"}' if chat else '"text":" w"'
        await peer.send(EVENTS)
        pieces = min(asked.tokens, max(4, round(asked.seconds * 4)))
        for piece in range(pieces):
            await _pause(peer, asked.seconds / pieces)
            upto = asked.tokens * (piece + 1) // pieces
            events = []
            for number in range(attempt.handed + 1, upto + 1):
                told = json.dumps(attempt.usage(number)) if asked.usage == "every" else "null"
                events.append(f'data: {{"choices":[{{"index":0,{said},"finish_reason":null}}],"usage":{told}}}\n\n')
            attempt.handed = upto
            await peer.send(chunk("".join(events).encode()))
            attempt.sent.append((time.monotonic(), upto))
        told = json.dumps(attempt.usage(asked.tokens))
        finish = f'data: {{"choices":[{{"index":0,"finish_reason":"stop"}}],"usage":{told}}}\n\n'.encode()
        await peer.send(chunk(finish) + chunk(DONE) + END)
        attempt.whole = True


async def _pause(peer: Peer, seconds: float) -> None:
    await asyncio.sleep(seconds)
    if peer._reader.at_eof():
        raise ConnectionResetError("the gateway has left")


# — what is killed


SUPERVISED = {"GATEWAY_WORKERS": "1", "GATEWAY_ADMIN_PORT": "0", "GATEWAY_DRAIN": "10"}


class Gateway:
    """One worker process, from its start to its death; or a supervisor with a worker, where the course says so."""

    def __init__(self, worker: Worker, number: int, supervised: bool = False) -> None:
        self.worker = worker
        self.supervised = supervised
        self.life = Life(number)
        self.ready = False
        self.paused = False

    @property
    def takes(self) -> bool:
        """Whether a balancer would send it a request."""
        return self.ready and not self.paused and self.life.killed is None

    async def serving(self) -> None:
        """Until it says that it is ready, as it is not before it knows the keys."""
        await self.worker.serving()
        url = f"http://127.0.0.1:{self.worker.port}/healthz/ready"
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            while (await client.get(url)).status_code != 200:
                await asyncio.sleep(0.1)
        self.ready = True

    def serves(self) -> list[int]:
        """The process that serves."""
        return children_of(self.worker.process.pid) if self.supervised else [self.worker.process.pid]

    def kill(self) -> None:
        """Of a supervisor and its worker both, or only the supervisor: then its worker leaves by itself."""
        self.life.killed = time.monotonic()
        if self.life.number % 2:
            _signal(self.serves(), signal.SIGKILL)
        self.worker.end()

    async def pause(self, seconds: float) -> None:
        begin, pids = time.monotonic(), self.serves()
        self.paused = True
        _signal(pids, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        _signal(pids, signal.SIGCONT)
        self.paused = False
        self.life.pauses.append((begin, time.monotonic()))


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Valkey:
    """A store with an AOF, that comes back with what was in it."""

    def __init__(self, folder: Path, fsync: Fsync) -> None:
        self.folder = folder / "store"
        self.folder.mkdir()
        self.fsync = fsync
        self.outages: list[Span] = []
        self.up = False
        self._killed = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder / 's'}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = {
            "port": "0",
            "unixsocket": str(self.folder / "s"),
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": self.fsync,
            "logfile": str(self.folder / "log"),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen([_server_binary(), *words], stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            until(lambda: bool(client.ping()))
        self.up = True
        if self._killed:
            self.outages.append((self._killed, time.monotonic()))

    def kill(self) -> None:
        self.up = False
        self._killed = time.monotonic()
        self.end()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Exporter:
    """One `gateway export` process; its successor writes into the same folder."""

    def __init__(self, folder: Path, number: int, store_url: str) -> None:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        given = {"GATEWAY_REDIS_URL": store_url, "GATEWAY_KEY_PEPPER": PEPPER, "PYTHONPATH": str(ROOT)}
        words = ["export", EXPORT, "--policies", str(folder / "policies"), "--state", str(folder)]
        with (folder / f"exporter-{number}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", *words],
                cwd=folder,
                env={**ours, **given},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Course:
    """What a run is."""

    seed: int
    requests: int
    kills: int
    seconds: float  # over which the kills are spread, and the requests over some more
    workers: int = 4
    exporters: int = 2
    fsync: Fsync = "everysec"
    supervised: bool = False  # whether supervisors are killed, too


class Rig:
    """Everything that runs, and is killed and started again."""

    def __init__(self, course: Course, folder: Path) -> None:
        self.course = course
        self.folder = folder
        self.exports = folder / "exports" if course.exporters else None
        self.valkey = Valkey(folder, course.fsync)
        self.gateways: list[Gateway] = []  # all that ever were
        self.exporters: list[Exporter] = []
        self.kills: Counter[str] = Counter()
        self.by_itself: list[str] = []  # who died without being killed
        self._numbers = itertools.count()
        self._dice = random.Random(f"{course.seed} kills")

    async def start_gateway(self) -> None:
        """Start a worker, and another one where it does not serve."""
        for _ in range(_STARTS):
            number = next(self._numbers)
            supervised = self.course.supervised
            environment = SUPERVISED if supervised else {}
            one = Gateway(Worker(number, self.folder, self.valkey.url, **environment), number, supervised)
            self.gateways.append(one)
            try:
                return await one.serving()
            except (RuntimeError, httpx.TransportError) as failure:
                self.by_itself.append(f"{one.life} {str(failure).rstrip().rpartition(chr(10))[2]}")
                one.kill()
        raise RuntimeError(f"{_STARTS} workers did not serve, the last: {self.by_itself[-1]}")

    def start_exporter(self) -> None:
        self.exporters.append(Exporter(self.folder, next(self._numbers), self.valkey.url))

    def taking(self) -> list[Gateway]:
        return [one for one in self.gateways if one.takes]

    def live(self) -> list[Gateway]:
        return [one for one in self.gateways if one.life.killed is None]

    def end(self) -> None:
        for gateway in self.live():
            gateway.worker.end()  # nobody was killed by this, as far as the judge goes
        for exporter in self.exporters:
            exporter.kill()
        self.valkey.end()

    async def keep(self) -> None:
        """What make or a supervisor would do, for ever: whoever died by itself is noted, and started again."""
        while True:
            for one in self.live():
                if one.ready and one.worker.process.poll() is not None:
                    self.by_itself.append(f"{one.life} with {one.worker.process.returncode}")
                    one.kill()
                    await self.start_gateway()
            for place, exporter in enumerate(self.exporters):
                code = exporter.process.poll()
                if code is not None and self.valkey.up:  # one that was started without a store has nothing to do
                    if code != -signal.SIGKILL and not self._just_away():
                        self.by_itself.append(f"exporter {exporter.process.pid} with {code}")
                    self.exporters.pop(place)
                    self.start_exporter()
                    break
            await asyncio.sleep(0.5)

    def _just_away(self) -> bool:
        return bool(self.valkey.outages) and time.monotonic() - self.valkey.outages[-1][1] < 5.0

    async def kill_worker(self) -> None:
        awake = self._dice.random() < 0.9  # a paused one is killed seldom: it is to find out that it was swept
        gateway = self._dice.choice([one for one in self.live() if one.ready and (one.takes or not awake)])
        gateway.kill()
        await self.start_gateway()

    async def kill_valkey(self) -> None:
        self.valkey.kill()
        await asyncio.sleep(self._dice.uniform(0.0, 3.0))
        await asyncio.to_thread(self.valkey.start)

    async def kill_exporter(self) -> None:
        self._dice.choice(self._exporting()).kill()  # `keep` starts the next one

    async def pause_worker(self) -> None:
        await self._dice.choice(self.taking()).pause(self._dice.uniform(1.0, min(20.0, self.course.seconds / 2)))

    async def rampage(self) -> None:
        """All kills of the course and a pause for every eight of them, spread over its time. Then a worker sleeps until
        it is taken for dead: while others die, nobody may have the time to take note of that."""
        course, dice = self.course, self._dice
        exporters = course.kills // 5 if course.exporters else 0
        deck = ["valkey"] * (course.kills // 5) + ["exporter"] * exporters
        deck += ["worker"] * (course.kills - len(deck)) + ["pause"] * -(-course.kills // 8)
        dice.shuffle(deck)
        acts: dict[str, Callable[[], Awaitable[None]]] = {
            "worker": self.kill_worker,
            "valkey": self.kill_valkey,
            "exporter": self.kill_exporter,
            "pause": self.pause_worker,
        }
        begin, tasks = time.monotonic(), []
        for at, kind in zip(sorted(dice.uniform(0.0, course.seconds) for _ in deck), deck, strict=True):
            await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
            while not self._may(kind):
                await asyncio.sleep(0.05)
            self.kills[kind] += 1
            tasks.append(asyncio.ensure_future(acts[kind]()))
        await asyncio.gather(*tasks)
        await self.taking()[0].pause(DOZE)  # the oldest one, which has the most to do

    def _may(self, kind: str) -> bool:
        """Whether it can be struck now, so that somebody is left who serves."""
        if kind == "valkey":
            return self.valkey.up
        if kind == "exporter":
            return bool(self._exporting())
        return len(self.taking()) > (self.course.workers > 1)

    def _exporting(self) -> list[Exporter]:
        return [one for one in self.exporters if one.process.poll() is None]


# — the run


async def prove(course: Course, folder: Path) -> Evidence:
    """Run a course in this folder; what everybody has seen."""
    rig = Rig(course, folder)
    book = Book()
    async with AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend(forever(book))) for _ in range(2)]
        (folder / "policies").mkdir()
        documents = policies([backend.url for backend in backends], rig.exports)
        (folder / "policies" / "all.yaml").write_text(yaml.safe_dump(documents, sort_keys=False))
        stack.callback(rig.end)
        rig.valkey.start()
        keys = await _keys(rig.valkey.url)
        await asyncio.gather(*(rig.start_gateway() for _ in range(course.workers)))
        for _ in range(course.exporters):
            rig.start_exporter()
        keeper = asyncio.ensure_future(rig.keep())
        stack.callback(keeper.cancel)
        rampage = asyncio.ensure_future(rig.rampage())
        stack.callback(rampage.cancel)
        calls = await _load(rig, keys)
        await rampage
        quiet = await _quiet(rig)
        if keeper.done():
            keeper.result()  # it has failed
        return await _evidence(rig, calls, book, quiet, keys)


async def _keys(url: str) -> list[tuple[str, str, str]]:
    """Team, id and secret of two keys for each team."""
    store = Store(url, deadline=5.0)
    try:
        ring = KeyRing(store, PEPPER.encode())
        await ring.load()
        made = []
        for team in [*TEAMS, *TEAMS]:
            record, key = await ring.create(team, user=None, name=None, models=(), expires=None)
            made.append((team, record.id, key))
        return made
    finally:
        await store.aclose()


async def _load(rig: Rig, keys: Sequence[tuple[str, str, str]]) -> list[Call]:
    """All requests of the course, spread over its time; all of them have ended."""
    course = rig.course
    dice = random.Random(f"{course.seed} load")
    calls: list[Call] = []
    tasks: list[asyncio.Task[None]] = []
    begin, over = time.monotonic(), course.seconds + DOZE / 2
    for number, at in enumerate(sorted(dice.uniform(0.0, over) for _ in range(course.requests))):
        await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
        while not (taking := rig.taking()):
            await asyncio.sleep(0.02)
        team, key_id, key = dice.choice(keys)
        asked = order(dice, number)
        leaves = dice.uniform(0.02, 1.2 * asked.seconds + 0.1) if dice.random() < 0.12 else None
        gateway = dice.choice(taking)
        model = dice.choice(tuple(PRICES))
        call = Call(asked, team, key_id, model, dice.random() < 0.7, leaves, gateway.life, time.monotonic())
        calls.append(call)
        tasks.append(asyncio.ensure_future(ask(call, gateway.worker.port, key, *body_of(call, dice))))
    await asyncio.gather(*tasks)
    return calls


async def _quiet(rig: Rig) -> tuple[float, str]:
    """Wait until nothing is left to do: after how many seconds, and what was left if it did not become quiet."""
    begin = time.monotonic()
    with redis.Redis.from_url(rig.valkey.url) as client:
        while left := ", ".join(f"{name} {number}" for name, number in _left(rig, client).items() if number):
            if time.monotonic() - begin > QUIET:
                break
            await asyncio.sleep(0.25)
    return time.monotonic() - begin, left


def _left(rig: Rig, client: Any) -> dict[str, int]:
    """What is still to be done, by kind."""
    left: Counter[str] = Counter()
    for organisation in sorted(set(TEAMS.values())):
        for key in client.scan_iter(match=f"{{{organisation}}}:request:*", count=1000):
            left["reservations"] += (client.get(key) or b"-")[:1] not in b"-+~"
        left["renewals"] += client.zcard(f"{{{organisation}}}:live")
        if rig.exports is not None and client.exists(ledger_stream(organisation)):
            groups = [g for g in client.xinfo_groups(ledger_stream(organisation)) if g["name"] == EXPORT.encode()]
            last = client.xinfo_stream(ledger_stream(organisation))["last-generated-id"]
            left["groups"] += not groups
            left["undelivered"] += sum(group["last-delivered-id"] != last for group in groups)
            left["unacknowledged"] += sum(group["pending"] for group in groups)
    left["spools"] = sum(1 for file in (rig.folder / "spool").glob("**/*") if file.is_file() and file.stat().st_size)
    return dict(left)


# — what everybody has seen


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of the ledger."""

    entry: str
    written_ms: int
    record: UsageRecord


Sums = dict[tuple[str, Grain, int], dict[str, list[int]]]  # of an organisation, by group


@dataclass
class Evidence:
    """All that the judge goes by."""

    calls: list[Call] = field(default_factory=list)
    attempts: Mapping[str, list[Attempt]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    sums: Sums = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)  # by the gateway's own reconciliation
    exported: list[dict[str, Any]] | None = None  # the lines of all files; None: nothing is exported
    limits: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # by team and name, as GET /v1/limits
    outages: list[Span] = field(default_factory=list)  # of the store
    kills: Counter[str] = field(default_factory=Counter)
    by_itself: list[str] = field(default_factory=list)
    quiet: float = 0.0
    left: str = ""
    troubles: Counter[str] = field(default_factory=Counter)  # warnings and errors of the logs

    def __post_init__(self) -> None:
        self.by_id: defaultdict[str, list[UsageRecord]] = defaultdict(list)
        for row in self.rows:
            self.by_id[row.record.id.removesuffix(CORRECTION)].append(row.record)
        self.call_of = {call.id: call for call in self.calls if call.id}
        for id_, attempts in self.attempts.items():
            self.call_of[id_] = self.calls[attempts[0].order.number]


async def _evidence(
    rig: Rig, calls: list[Call], book: Book, quiet: tuple[float, str], keys: Sequence[tuple[str, str, str]]
) -> Evidence:
    troubles: Counter[str] = Counter()
    for gateway in rig.gateways:
        troubles.update(f"{line['level']} {line['event']}" for line in gateway.worker.lines())
    with redis.Redis.from_url(rig.valkey.url) as client:
        organisations = sorted({*TEAMS.values(), *(name.decode() for name in client.smembers(ORGANISATIONS))})
        rows = [row for organisation in organisations for row in _rows(client, organisation)]
        sums = {key: groups for organisation in organisations for key, groups in _sums(client, organisation)}
    return Evidence(
        calls,
        book.attempts,
        rows,
        sums,
        await _reconciled(rig.valkey.url, organisations),
        None if rig.exports is None else list(_exported(rig.exports)),
        await _limits(rig.taking()[0].worker.port, keys),
        rig.valkey.outages,
        rig.kills,
        rig.by_itself,
        *quiet,
        troubles,
    )


def _rows(client: Any, organisation: str) -> Iterator[Row]:
    after = "-"
    while entries := client.xrange(ledger_stream(organisation), min=after, count=1000):
        for name, fields in entries:
            written = int(fields.get(b"at", name.partition(b"-")[0]))
            yield Row(name.decode(), written, msgspec.json.decode(fields[b"row"], type=UsageRecord))
        after = f"({entries[-1][0].decode()}"


def _sums(client: Any, organisation: str) -> Iterator[tuple[tuple[str, Grain, int], dict[str, list[int]]]]:
    for grain in GRAINS:
        prefix = sums_key(organisation, grain, 0)[:-1]
        for key in set(client.scan_iter(match=f"{prefix}*", count=1000)):
            found = {group.decode(): msgspec.msgpack.decode(value) for group, value in client.hgetall(key).items()}
            yield (organisation, grain, int(key.decode().removeprefix(prefix))), found


async def _reconciled(url: str, organisations: Iterable[str]) -> list[str]:
    """What the gateway itself says of its sums."""
    from gateway.ledger import reconcile

    store = Store(url, deadline=30.0)
    try:
        return [str(one) for name in organisations for one in (await reconcile(store, name)).differences]
    finally:
        await store.aclose()


def _exported(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("**/*")):
        if file.is_file():
            for line in file.read_bytes().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield {"id": None, "torn": len(line)}  # of an exporter that was killed while it wrote


async def _limits(port: int, keys: Sequence[tuple[str, str, str]]) -> dict[str, dict[str, dict[str, Any]]]:
    found = {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        for team, _, key in keys:
            answer = await client.get("/v1/limits", headers={"authorization": f"Bearer {key}"})
            found[team] = {limit["name"]: limit for limit in answer.raise_for_status().json()["data"]}
    return found


# — the judge


@dataclass
class Verdict:
    """What was found of one claim; `wrong` are the requests or groups that break it, with a word of why."""

    name: str
    figure: str
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{'FAILS' if self.wrong else 'holds'}  {self.name}: {self.figure}; wrong: {len(self.wrong)}"


def total(records: Iterable[UsageRecord]) -> dict[str, int]:
    """What rows make together, by counter."""
    records = list(records)
    return {name: sum(getattr(record, name) for record in records) for name in COUNTERS}


def _alive(e: Evidence) -> Verdict:
    dead = [f"died by itself: {one}" for one in e.by_itself]
    hung = [f"hung: {c.id or c.order.number} at {c.worker}" for c in e.calls if c.outcome == "hung"]
    wrong = [*dead, *hung, *([f"left after {QUIET:g} s: {e.left}"] if e.left else [])]
    return Verdict("V0 all becomes quiet, and nobody dies by itself", f"quiet after {e.quiet:.1f} s", wrong)


def _once(e: Evidence) -> Verdict:
    wrong = []
    for id_ in {**e.attempts, **e.by_id}:
        kinds = Counter(record.status for record in e.by_id[id_]) if id_ in e.by_id else Counter()
        first, second = kinds["settled"] + kinds["interrupted"], kinds["correction"]
        # What has no row is V1's where the backend has seen it, and nobody's else.
        if first != 1 or second > 1 or (second and not kinds["interrupted"]):
            wrong.append(f"{id_} {dict(kinds) or 'no row'}: {_told(e, id_)}")
    found = Counter(row.record.status for row in e.rows)
    said = ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
    return Verdict("V1 one row for each request at the backend", f"{len(e.attempts)} ids, rows: {said}", wrong)


def _unseen(e: Evidence) -> Verdict:
    kinds: Counter[str] = Counter()
    wrong = []
    for id_, records in e.by_id.items():
        if id_ in e.attempts:
            continue
        used = total(records)
        if used["requests"] == 0 and not used["input_tokens"] and not used["output_tokens"]:
            kinds["without an answer"] += 1
        elif records[0].status == "interrupted" and used["output_tokens"] == 0:
            kinds["interrupted before it was sent"] += 1
            kinds["input tokens of these"] += used["input_tokens"]
        else:
            wrong.append(f"{id_} {used}: {_told(e, id_)}")
    said = ", ".join(f"{name} {number}" for name, number in sorted(kinds.items())) or "none"
    return Verdict("V2 rows that the backend knows nothing of used nothing", said, wrong)


def _complete(e: Evidence, id_: str) -> bool:
    """Whether the backend has finished a request, and its caller has read all of it."""
    call = e.call_of.get(id_)
    return call is not None and call.outcome == "whole" and e.attempts[id_][-1].whole


def _units(e: Evidence) -> Verdict:
    wrong, judged = [], Counter[str]()
    for id_, attempts in e.attempts.items():
        if not _complete(e, id_) or id_ not in e.by_id:  # without a row it is V1's and V4's
            continue
        call, unit, records = e.call_of[id_], attempts[-1], e.by_id[id_]
        used = total(records)
        expected = {
            "requests": 1,
            "input_tokens": unit.prompt,
            "cached_tokens": unit.order.cached,
            "output_tokens": unit.order.tokens,
            "reasoning_tokens": unit.order.reasoning,
        }
        expected["cost_microusd"] = _cost(expected, call.model)
        judged.update({"requests": 1, "tokens": unit.prompt + unit.order.tokens})
        last = records[-1]
        described = (last.organisation, last.team, last.key, last.model, last.stream)
        if used != expected:
            wrong.append(f"{id_} {used}, expected {expected}: {_told(e, id_)}")
        elif last.ended != "complete" or last.output_source != "upstream":
            wrong.append(f"{id_} ended {last.ended} by {last.output_source}: {_told(e, id_)}")
        elif described != (TEAMS[call.team], call.team, call.key, call.model, call.stream):
            wrong.append(f"{id_} is described as {described}: {_told(e, id_)}")
    said = f"{judged['requests']} complete, {judged['tokens']} tokens"
    return Verdict("V3 what is complete is written down as the unit", said, wrong)


def _cost(used: Mapping[str, int], model: str) -> int:
    """Micro-dollars: dollars per million tokens are micro-dollars per token."""
    price = PRICES[model]
    cached, thought = price.get("cached_input", price["input"]), price.get("reasoning", price["output"])
    parts = {
        "input_tokens": price["input"],
        "cached_tokens": cached - price["input"],  # they are among the input's, and reasoning among the output's
        "output_tokens": price["output"],
        "reasoning_tokens": thought - price["output"],
    }
    return (sum(used[name] * round(each * 1e6) for name, each in parts.items()) + 500_000) // 1_000_000


def _never_before(e: Evidence) -> Verdict:
    whole = [call for call in e.calls if call.outcome == "whole"]
    wrong = [f"{call.id}: {_told(e, call.id)}" for call in whole if call.id not in e.by_id]
    return Verdict("V4 who read a whole answer has a row", f"{len(whole)} whole answers", wrong)


def _interrupted(e: Evidence) -> Verdict:
    wrong, lost, seen = [], Counter[str](), Counter[str]()
    for id_, attempts in e.attempts.items():
        if _complete(e, id_) or id_ not in e.by_id:
            continue
        call, unit, records = e.call_of[id_], attempts[-1], e.by_id[id_]
        used = total(records)
        swept = records[-1].status == "interrupted"
        least = unit.surely(told_last(e, call)) if swept else call.received
        kind = "interrupted" if swept else "settled"
        seen[kind] += 1
        lost[kind] += unit.handed - used["output_tokens"]
        word = _misfit(records, used, unit, least, _cost(used, call.model))
        if word:
            wrong.append(f"{id_} {word}: {_told(e, id_)}")
    said = ", ".join(
        f"{number} {kind} with {lost[kind]} tokens fewer than produced" for kind, number in sorted(seen.items())
    )
    return Verdict("V5 what is incomplete lacks at most one interval", said or "none", wrong)


def _misfit(records: Sequence[UsageRecord], used: Mapping[str, int], unit: Attempt, least: int, cost: int) -> str:
    """What is wrong with the rows of a request that did not end well, or nothing."""
    output, last = used["output_tokens"], records[-1]
    if not least <= output <= unit.handed:
        return f"has {output} output tokens, expected {least} to {unit.handed}"
    if used["requests"] not in (0, 1) or (output and not used["requests"]):
        return f"counts as {used['requests']} requests"
    if last.ended == "complete" and output != unit.order.tokens:
        return f"ended complete with {output} of {unit.order.tokens}"
    if last.input_source == "upstream" and used["requests"] and used["input_tokens"] != unit.prompt:
        return f"has {used['input_tokens']} input tokens by the upstream, expected {unit.prompt}"
    if not 0 <= used["input_tokens"] <= 4 * unit.prompt + 64:  # as its bytes, at most
        return f"has {used['input_tokens']} input tokens, and the backend counted {unit.prompt}"
    if used["cost_microusd"] != cost:
        return f"costs {used['cost_microusd']}, expected {cost}"
    return ""


def told_last(e: Evidence, call: Call) -> float:
    """An instant up to which the progress of a request must have been told to the store: the beginning of the last
    stretch before its worker died in which both were there long enough for a renewal. 0.0: perhaps nothing was."""
    died = call.worker.killed or call.ended
    gaps = sorted([*((begin, end + NOISE) for begin, end in e.outages), *call.worker.pauses])
    for begin, end in gaps:  # a lease that lapsed was swept with what was known then
        if begin > call.sent and end - begin > LAPSE - RENEWED - NOISE:
            died = min(died, begin)
    calm = died - RENEWED - NOISE
    for begin, end in reversed([gap for gap in gaps if gap[0] < died]):
        if end > calm:
            calm = begin - RENEWED - NOISE
    return max(0.0, calm) if calm - RENEWED > call.sent else 0.0  # the first renewal may wait for the next turn


def _folded(e: Evidence) -> Verdict:
    nothing = [0] * len(COUNTERS)
    folded: Sums = {}
    for row in e.rows:
        for grain in GRAINS:
            groups = folded.setdefault((row.record.organisation, grain, number_of(grain, row.written_ms)), {})
            group = groups.setdefault(group_of(row.record), list(nothing))
            group[:] = [held + getattr(row.record, name) for held, name in zip(group, COUNTERS, strict=True)]
    wrong = [f"reconcile: {one}" for one in e.differences]
    compared = 0
    for key in sorted({*folded, *e.sums}):
        ours, theirs = folded.get(key, {}), e.sums.get(key, {})
        compared += len(ours)
        for name in sorted({*ours, *theirs}):
            rows, sums = ours.get(name, nothing), theirs.get(name, nothing)
            wrong += [f"{key} {name}: rows {rows}, sums {sums}"] if rows != sums else []
    return Verdict("V6 sums are what rows make", f"{len(folded)} hashes, {compared} groups", wrong)


def number_of(grain: Grain, ms: int) -> int:
    """The hour, day or month since 1970 in UTC of an instant."""
    at = datetime.fromtimestamp(ms // 1000, UTC)
    match grain:
        case "hour":
            return ms // 3_600_000
        case "day":
            return ms // 86_400_000
        case "month":
            return (at.year - 1970) * 12 + at.month - 1


def _delivered(e: Evidence) -> Verdict:
    name = "V7 sinks have every row, and by id each once"
    if e.exported is None:
        return Verdict(name, "no exporters in this run")
    lines: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in e.exported:
        if line["id"] is not None:
            lines[line["id"]].append(line)
    wrong = []
    for row in e.rows:
        stored = msgspec.to_builtins(row.record)
        copies = lines.get(row.record.id, [])
        if not copies:
            wrong.append(f"{row.record.id} was not delivered: {_told(e, row.record.id)}")
        elif any({key: copy.get(key) for key in stored} != stored for copy in copies):
            wrong.append(f"{row.record.id} was delivered as something else: {copies[0]}")
    wrong += [f"{id_} was delivered, and has no row" for id_ in lines.keys() - {row.record.id for row in e.rows}]
    whole = sum(map(len, lines.values()))
    torn = len(e.exported) - whole
    return Verdict(name, f"{len(e.exported)} lines, {whole - len(lines)} of them repeated, {torn} torn", wrong)


_USED: dict[str, Callable[[Mapping[str, int]], int]] = {
    "month-tokens": lambda used: used["input_tokens"] + used["output_tokens"],
    "month-usd": lambda used: used["cost_microusd"],
    "month-requests": lambda used: used["requests"],
}


def _counted(e: Evidence) -> Verdict:
    wrong, said = [], []
    for team, limits in sorted(e.limits.items()):
        records = [row.record for row in e.rows if row.record.team == team]
        swept = {r.id.removesuffix(CORRECTION) for r in records if r.status != "settled"}
        slack = sum(e.call_of[id_].most for id_ in swept if id_ in e.call_of)
        bounds = {"month-tokens": slack, "month-usd": slack * _DEAREST, "month-requests": len(swept)}
        for name, limit in sorted(limits.items()):
            if limit["reserved"]:
                wrong.append(f"{team} {name}: {limit['reserved']} reserved")
            if name == "seats":
                wrong += [f"{team} seats: {limit['used']} taken"] if limit["used"] else []
                continue
            rows = _USED[name](total(records))
            said.append(f"{team} {name} {limit['used'] - rows:+d}")
            if abs(limit["used"] - rows) > bounds[name]:
                wrong.append(f"{team} {name}: {limit['used']} used, rows have {rows}, may differ by {bounds[name]}")
    return Verdict("V8 limits count what rows have", ", ".join(said), wrong)


def judge(evidence: Evidence) -> list[Verdict]:
    """A verdict for each claim."""
    claims = (_alive, _once, _unseen, _units, _never_before, _interrupted, _folded, _delivered, _counted)
    return [claim(evidence) for claim in claims]


def _told(e: Evidence, id_: str) -> str:
    """What is known of a request, for who looks for the cause."""
    call, attempts = e.call_of.get(id_.removesuffix(CORRECTION)), e.attempts.get(id_, [])
    words = [f"{len(attempts)} attempts"]
    if attempts:
        unit = attempts[-1]
        words.append(f"the last with {unit.handed} of {unit.order.tokens} tokens{' whole' if unit.whole else ''}")
    if call is not None:
        words.append(f"sent at {_clock(call.sent)} to {call.worker}, {call.outcome} at {_clock(call.ended)}")
        words.append(f"status {call.status}, {call.received} received")
        words += [f"worker killed at {_clock(call.worker.killed)}"] if call.worker.killed else []
        words += [f"paused {_clock(b)} to {_clock(end)}" for b, end in call.worker.pauses if end > call.sent]
        near = [(b, end) for b, end in e.outages if call.sent - 5 < end and b < call.ended + 5]
        words += [f"store away {_clock(b)} to {_clock(end)}" for b, end in near]
    words += [f"row {r.status}/{r.ended} {r.input_tokens}+{r.output_tokens}" for r in e.by_id.get(id_, ())]
    return ", ".join(words)


def _clock(at: float) -> str:
    """An instant as the logs have it."""
    return datetime.fromtimestamp(at + _SINCE_1970, UTC).strftime("%H:%M:%S.%f")[:-3]


_SINCE_1970 = time.time() - time.monotonic()


# — the command


def report(course: Course, evidence: Evidence, verdicts: Sequence[Verdict]) -> None:
    """Print what was done and found."""
    retried = sum(len(attempts) > 1 for attempts in evidence.attempts.values())
    tables: dict[str, Mapping[str, int]] = {
        "killed": evidence.kills,
        "callers": Counter(call.outcome for call in evidence.calls),
        "answers": Counter(f"{call.status} {call.code}".strip() for call in evidence.calls),
        "rows": Counter(f"{row.record.status}/{row.record.ended}" for row in evidence.rows),
        "logs": evidence.troubles,
    }
    print(f"\nseed {course.seed}, appendfsync {course.fsync}: {len(evidence.calls)} requests, {retried} tried again")
    for name, table in tables.items():
        print(f"  {name:8} " + ", ".join(f"{what or '-'}: {number}" for what, number in sorted(table.items())))
    for verdict in verdicts:
        print(verdict)
        for one in verdict.wrong[:10]:
            print(f"         {one}")
    sys.stdout.flush()


def keep(evidence: Evidence, folder: Path) -> None:
    """Write what was seen into the folder of the logs, a line for each request and row."""
    with (folder / "evidence.jsonl").open("w") as file:
        for id_ in {**evidence.attempts, **evidence.by_id}:
            attempts = [msgspec.to_builtins(asdict(one)) for one in evidence.attempts.get(id_, ())]
            rows = [msgspec.to_builtins(record) for record in evidence.by_id.get(id_, ())]
            seen = {"id": id_, "told": _told(evidence, id_), "attempts": attempts, "rows": rows}
            file.write(json.dumps(seen) + "\n")


async def main(courses: Sequence[Course]) -> int:
    failed = 0
    for course in courses:
        folder = Path(tempfile.mkdtemp(prefix="gw-ledger-"))
        try:
            evidence = await prove(course, folder)
        except BaseException:
            print(f"seed {course.seed}: it broke off; its logs are in {folder}")
            raise
        verdicts = judge(evidence)
        report(course, evidence, verdicts)
        if any(verdict.wrong for verdict in verdicts):
            failed = 1
            keep(evidence, folder)
            print(f"what was seen is in {folder}")
        else:
            with suppress(OSError):
                shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m tests.proving.ledger", description=__doc__.partition("\n")[0])
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--kills", type=int, default=100, help="pauses are beside them")
    options.add_argument("--seconds", type=float, help="over which these are spread [2.5 for each kill]")
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--exporters", type=int, default=2)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument(
        "--supervised", action="store_true", help="each worker under a supervisor, which is killed too"
    )
    options.add_argument("--appendfsync", default="everysec", choices=["everysec", "always", "both"])
    given = options.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    modes: list[Fsync] = ["everysec", "always"] if given.appendfsync == "both" else [given.appendfsync]
    spread = given.seconds or 2.5 * given.kills
    whole = seed, given.requests, given.kills, spread, given.workers, given.exporters
    runs = [Course(*whole, mode, given.supervised) for mode in modes]
    sys.exit(uvloop.run(main(runs)))

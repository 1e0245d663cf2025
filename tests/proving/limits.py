"""Limits by hand: charges without documents, requests without sockets, and a wire that loses what it should."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import redis

from gateway.admission import Admission
from gateway.errors import Dialect
from gateway.exchange import new_id
from gateway.intents import Charges, Intent
from gateway.language import Count
from gateway.records import Price, UsageRecord
from gateway.settlements import Reached
from gateway.snapshot import STRETCHES, Limit
from gateway.spool import Spool
from gateway.store import Store
from gateway.terms import Charge, Terms
from gateway.usage import Progress

PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


def rate(
    amount: int, period: str, *, burst: int | None = None, name: str = "rate", count: Count = "requests", **more: Any
) -> Limit:
    capacity = amount if burst is None else burst
    return Limit(name, "rate", count, amount, capacity, PERIODS[period] * 1_000_000, period, None, ("team",), **more)


def quota(
    amount: int,
    window: str,
    *,
    zone: str = "UTC",
    name: str = "quota",
    count: Count = "requests",
    rolling: bool = False,
    **more: Any,
) -> Limit:
    if rolling:
        stretch = STRETCHES[window] * 1_000_000
        return Limit(name, "rolling", count, amount, amount, stretch, window, None, ("team",), **more)
    return Limit(name, "quota", count, amount, amount, 0, window, ZoneInfo(zone), ("team",), **more)


def seats(at_most: int, *, name: str = "seats", **more: Any) -> Limit:
    return Limit(name, "seats", "concurrent_requests", at_most, at_most, 0, "", None, ("team",), **more)


def key_of(limit: Limit, organisation: str = "acme") -> str:
    """The key of a limit's count."""
    return f"{{{organisation}}}:{limit.kind}:{limit.name}:research"


def terms(
    limits: Sequence[Limit], amounts: Mapping[str, int] = {}, *, organisation: str = "acme", closed: bool = False
) -> Terms:
    """Terms of one team; what `amounts` does not name reserves 1. `closed`: nothing is served without the store."""
    charges = tuple(
        Charge(limit, key_of(limit, organisation), "team research", amounts.get(limit.name, 1)) for limit in limits
    )
    return Terms(organisation, "research", "key_1", None, "demo", charges, closed=closed)


@dataclass
class Request:
    """What Admission wants to know of a request; `use` is what it used of a limit, by name, 1 where it is not named."""

    terms: Terms
    use: Mapping[str, int] = field(default_factory=dict)
    id: str = field(default_factory=new_id)
    ended: bool = False
    dialect: Dialect = "openai"

    def end(self, error: BaseException | None) -> None:
        assert not self.ended
        self.ended = True

    def intent(self, charges: Charges) -> Intent:
        terms = self.terms
        return Intent(
            team=terms.team,
            key=terms.key_id,
            user=terms.user,
            model="m",
            pool=terms.pool,
            endpoint="completions",
            stream=False,
            price=Price(),
            received_ms=received(self.id),
            bytes_in=0,
            input_estimate=2,
            charges=charges,
        )

    def progress(self) -> Progress | None:
        return None

    def used(self, limit: Limit) -> int:
        return 0 if limit.kind == "seats" else self.use.get(limit.name, 1)

    def record(self) -> UsageRecord:
        terms = self.terms
        return UsageRecord(
            id=self.id,
            status="settled",
            organisation=terms.organisation,
            team=terms.team,
            key=terms.key_id,
            user=terms.user,
            model="m",
            served_model="m",
            pool=terms.pool,
            upstream="u",
            endpoint="completions",
            stream=False,
            http_status=200,
            ended="complete",
            attempt=1,
            requests=1,
            input_tokens=3,
            cached_tokens=0,
            output_tokens=4,
            reasoning_tokens=0,
            input_source="upstream",
            output_source="upstream",
            price=Price(),
            cost_microusd=5,
            received_ms=received(self.id),
            first_byte_ms=None,
            ended_ms=received(self.id) + 4,
            bytes_in=0,
            bytes_out=4,
        )


@asynccontextmanager
async def gateways(
    url: str,
    count: int = 1,
    *,
    deadline: float = 5.0,
    reached: Reached = lambda *_: None,
    most: int = 1 << 24,
    folder: Path | None = None,
) -> AsyncIterator[list[Admission]]:
    """So many gateways' admissions on one store, each with connections of its own, each keeping up; their spools of
    `most` bytes in a folder of their own, or in this one."""
    stores = [Store(url, deadline=deadline) for _ in range(count)]
    own = tempfile.TemporaryDirectory(prefix="gw-")
    spools = [Spool(folder or Path(own.name), most=most) for _ in stores]
    admissions = [Admission(store, spool, reached) for store, spool in zip(stores, spools, strict=True)]
    tasks = [
        asyncio.ensure_future(work)
        for admission in admissions
        for work in (admission.keep_up(), admission.settlements.keep_up())
    ]
    try:
        await until(lambda: all(admission._told[0] for admission in admissions))
        yield admissions
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for store in stores:
            await store.aclose()
        for spool in spools:
            await spool.aclose()
        own.cleanup()


def received(request_id: str) -> int:
    """When a request came, by its id, in ms since 1970."""
    return int(request_id[4:16], 16)


Everything = dict[bytes, tuple[bytes, int]]


def everything(client: redis.Redis) -> Everything:
    """Every key of a store: its bytes, and the instant at which it ends."""
    found: Everything = {}
    keys: Any = client.keys("*")
    for key in keys:
        dump: Any = client.dump(key)
        ends: Any = client.pexpiretime(key)
        found[key] = dump, ends
    return found


async def until(condition: Any, patience: float = 20.0) -> None:
    """Until it holds; an assertion fails when it does not in all that time."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.005)


class Wire:
    """A wire to a store. `deaf`: what the store answers is lost; `held`: what it is asked waits; `cuts`: the next
    that it is asked is answered by a lost connection (not INFO: a gateway asks that when it pleases, and may go on
    without).
    """

    def __init__(self, target: str) -> None:
        self._target = target.removeprefix("unix://")
        self._pumps: set[asyncio.Task[None]] = set()
        self.deaf = False
        self.cuts = False
        self.held = asyncio.Event()
        self.held.set()
        self.lost = 0  # answers that were lost
        self.connections = 0
        self.url = ""

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._connection(reader, writer))
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                store_reader, store_writer = await asyncio.open_unix_connection(self._target)
                cut = asyncio.Event()
                await asyncio.gather(self._ask(reader, store_writer, cut), self._answer(store_reader, writer, cut))
        finally:
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        try:
            while data := await reader.read(65536):
                await self.held.wait()
                if self.cuts and b"INFO" not in data:
                    self.cuts = False
                    cut.set()
                writer.write(data)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        try:
            while data := await reader.read(65536):
                if self.deaf or cut.is_set():
                    self.lost += 1
                if cut.is_set():
                    break
                if not self.deaf:
                    writer.write(data)
        finally:
            writer.close()

    async def aclose(self) -> None:
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


@asynccontextmanager
async def wire(target: str) -> AsyncIterator[Wire]:
    """A wire to a store, on a socket of its own."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        wire = Wire(target)
        path = str(Path(folder) / "w")
        server = await asyncio.start_unix_server(wire._serve, path)
        wire.url = f"unix://{path}"
        try:
            yield wire
        finally:
            server.close()
            await wire.aclose()

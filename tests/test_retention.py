"""Retention on real stores: what is old leaves, and nothing that an export still needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import redis
from structlog.testing import capture_logs

from gateway import retention
from gateway.delivery import Row
from gateway.exports import Exporter, ensure
from gateway.records import ORGANISATIONS, ledger_stream
from gateway.retention import trim
from gateway.store import Store
from tests.proving.rows import record

ACME = ledger_stream("acme")
HOUR_MS = 3_600_000
ROW = msgspec.json.encode(record())


@pytest.fixture
def client(either_store_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(either_store_url) as client:
        yield client


@pytest.fixture
async def store(either_store_url: str) -> AsyncIterator[Store]:
    store = Store(either_store_url, deadline=5.0)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was told yet."""
    monkeypatch.setattr(retention, "_told", {})


def add(client: Any, hours_ago: float, count: int) -> list[str]:
    """Rows of so many hours ago, the oldest first; their entries."""
    seconds, microseconds = client.time()
    begin = seconds * 1000 + microseconds // 1000 - round(hours_ago * HOUR_MS)
    with client.pipeline(transaction=False) as pipe:
        for number in range(count):
            pipe.xadd(ACME, {"row": ROW}, id=f"{begin + number // 3}-{number % 3}")
        return [entry.decode() for entry in pipe.execute()]


def left(client: Any) -> list[str]:
    return [entry.decode() for entry, _ in client.xrange(ACME)]


def deliver(client: Any, name: str, count: int, acknowledged: int) -> None:
    """As if an export had been given so many rows, and had acknowledged the first ones of them."""
    given = client.xreadgroup(name, "one", {ACME: ">"}, count=count)
    rows = (given[0] if isinstance(given, list) else next(iter(given.items())))[1]
    if acknowledged:
        client.xack(ACME, name, *(entry for entry, _ in rows[:acknowledged]))


async def test_what_is_older_than_it_is_kept_leaves_to_the_last_row(store: Store, client: Any) -> None:
    add(client, 3, 2500)
    young = add(client, 1, 50)
    assert await trim(store, "acme", 7200.0, []) == 2500
    assert left(client) == young
    assert await trim(store, "acme", 7200.0, []) == 0


async def test_the_age_is_by_the_stores_clock_to_the_millisecond(store: Store, client: Any) -> None:
    add(client, 1, 3)
    young = add(client, 1 - 5000 / HOUR_MS, 1)
    assert await trim(store, "acme", 3600.0 - 2.5, []) == 3
    assert left(client) == young


async def test_it_goes_in_small_steps(store: Store, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add(client, 3, 3500)
    steps: list[int] = []
    run = store.run

    async def counted(*words: Any) -> Any:
        answer = await run(*words)
        steps.append(answer[0])
        return answer

    monkeypatch.setattr(store, "run", counted)
    assert await trim(store, "acme", 7200.0, []) == 3500
    assert max(steps) <= 1000
    assert len(steps) <= 6


@pytest.mark.parametrize(("given", "acknowledged", "gone"), [(0, 0, 0), (40, 40, 40), (40, 25, 25), (40, 0, 0)])
async def test_nothing_leaves_that_an_export_has_not_acknowledged(
    store: Store, client: Any, given: int, acknowledged: int, gone: int
) -> None:
    entries, exports = add(client, 3, 100), ["before", "slow", "thereafter"]
    await ensure(store, ["acme"], exports)
    for name in ("before", "thereafter"):
        deliver(client, name, 100, 100)
    if given:
        deliver(client, "slow", given, acknowledged)
    assert await trim(store, "acme", 7200.0, exports) == gone
    assert left(client) == entries[gone:]


async def test_a_group_that_no_policy_names_holds_rows_too(store: Store, client: Any) -> None:
    entries = add(client, 3, 10)
    await ensure(store, ["acme"], ["forgotten"])
    assert await trim(store, "acme", 7200.0, []) == 0
    assert left(client) == entries


async def test_an_export_that_has_no_group_yet_holds_everything(store: Store, client: Any) -> None:
    entries = add(client, 3, 10)
    await ensure(store, ["acme"], ["fast"])
    deliver(client, "fast", 10, 10)
    assert await trim(store, "acme", 7200.0, ["fast", "new"]) == 0
    assert left(client) == entries
    await ensure(store, ["acme"], ["new"])
    assert await trim(store, "acme", 7200.0, ["fast", "new"]) == 0
    deliver(client, "new", 10, 10)
    assert await trim(store, "acme", 7200.0, ["fast", "new"]) == 10


async def test_an_organisation_without_a_ledger_has_nothing_to_lose(store: Store, client: Any) -> None:
    assert await trim(store, "acme", 0.0, ["archive"]) == 0
    client.set(ACME, "foreign")
    assert await trim(store, "acme", 0.0, ["archive"]) == 0
    assert client.get(ACME) == b"foreign"


async def test_who_holds_rows_back_is_told_once_an_hour(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(client, 3, 1500)
    add(client, 1, 20)
    await ensure(store, ["acme"], ["fast", "slow"])
    deliver(client, "fast", 1520, 1520)
    deliver(client, "slow", 1490, 1490)
    with capture_logs() as lines:
        await trim(store, "acme", 7200.0, ["fast", "slow", "new"])
        await trim(store, "acme", 7200.0, ["fast", "slow", "new"])
        await trim(store, "acme", 7200.0, ["fast", "slow"])
        await trim(store, "acme", 7200.0, ["fast", "slow"])
    told = [(line["event"], line["organisation"], line["export"], line["rows"]) for line in lines]
    assert told == [
        ("ledger_held_back", "acme", "new", "1000 or more"),
        ("ledger_held_back", "acme", "slow", "10"),
    ]
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with capture_logs() as lines:
        await trim(store, "acme", 7200.0, ["fast", "slow"])
    assert [line["export"] for line in lines] == ["slow"]


async def test_an_export_that_has_everything_old_is_not_complained_of(store: Store, client: Any) -> None:
    add(client, 3, 10)
    add(client, 1, 20)
    await ensure(store, ["acme"], ["slow"])
    deliver(client, "slow", 10, 10)
    with capture_logs() as lines:
        assert await trim(store, "acme", 7200.0, ["slow"]) == 10
    assert lines == []


class Slow:
    """A sink that lets others have their turn, and keeps the entries that it has."""

    def __init__(self) -> None:
        self.entries: set[str] = set()

    async def open(self) -> None:
        pass

    async def deliver(self, rows: Sequence[Row]) -> None:
        await asyncio.sleep(0.002)
        self.entries.update(row.entry for row in rows)

    async def aclose(self) -> None:
        pass


async def test_trimming_beside_slow_exports_takes_nothing_from_them(store: Store, client: Any) -> None:
    """Also from one that begins meanwhile: what is there at its beginning is there until it has it."""
    entries = set(add(client, 3, 1500))
    client.sadd(ORGANISATIONS, "acme")
    sinks = {"archive": Slow(), "billing": Slow(), "late": Slow()}
    exports = {name: Exporter(store, name, sinks[name], consumer="one", batch=10, attempts=2) for name in sinks}
    await ensure(store, ["acme"], ["archive", "billing"])
    begun: set[str] = set()  # what was there when the late one began

    async def late() -> None:
        while len(left(client)) > 1000:
            await asyncio.sleep(0.001)
        await ensure(store, ["acme"], ["late"])
        begun.update(left(client))
        await exports["late"].run(once=True)

    async def trimming() -> None:
        while left(client):
            await trim(store, "acme", 7200.0, ["archive", "billing"])
            gone = entries - set(left(client))
            assert gone <= sinks["archive"].entries & sinks["billing"].entries
            assert gone & begun <= sinks["late"].entries
            await asyncio.sleep(0.001)

    async with asyncio.timeout(30):
        await asyncio.gather(exports["archive"].run(once=True), exports["billing"].run(once=True), late(), trimming())
    assert sinks["archive"].entries == sinks["billing"].entries == entries
    assert len(begun) > 300
    assert begun <= sinks["late"].entries

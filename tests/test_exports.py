"""Exports on real stores: sinks that fail, exporters that die, and rows that nobody can deliver."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from structlog.testing import capture_logs

from gateway import exports
from gateway.delivery import Rejected, Row, Unavailable
from gateway.embedded import _server_binary
from gateway.exports import Exporter, Progress, buried, ensure, forget, revive, standings
from gateway.records import ORGANISATIONS, dead_letters, ledger_stream
from gateway.retention import trim
from gateway.store import Script, Store
from tests.proving import stores
from tests.proving.rows import record

ARCHIVE = "archive"
HASTY = {"batch": 10, "attempts": 3, "claim_after": 0.05}
ACME = ledger_stream("acme")


def text(id: str, organisation: str = "acme") -> bytes:
    return msgspec.json.encode(record(id=id, organisation=organisation))


def add(client: Any, ids: Sequence[str], organisation: str = "acme", **more: str) -> list[str]:
    """Rows in the ledger of an organisation, as settlement writes them; their entries."""
    client.sadd(ORGANISATIONS, organisation)
    with client.pipeline(transaction=False) as pipe:
        for id in ids:
            pipe.xadd(ledger_stream(organisation), {"row": text(id, organisation).decode(), **more})
        return [entry.decode() for entry in pipe.execute()]


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


class Shelf:
    """A sink that keeps what it is given, and does what the test says before that."""

    def __init__(self, before: Callable[[Sequence[Row]], object] = lambda rows: None) -> None:
        self.rows: list[Row] = []
        self.batches: list[int] = []
        self.calls = 0
        self.before = before
        self.changed = asyncio.Event()
        self.closed = False

    async def open(self) -> None:
        pass

    async def deliver(self, rows: Sequence[Row]) -> None:
        self.calls += 1
        self.changed.set()
        self.before(rows)
        self.rows += rows
        self.batches.append(len(rows))

    async def aclose(self) -> None:
        self.closed = True

    @property
    def ids(self) -> list[str]:
        return [row.record.id for row in self.rows]

    async def until(self, holds: Callable[[], bool], patience: float = 20.0) -> None:
        async with asyncio.timeout(patience):
            while not holds():
                self.changed.clear()
                await self.changed.wait()
                await asyncio.sleep(0)


class Slow(Shelf):
    """A sink that lets others have their turn while it works."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    async def deliver(self, rows: Sequence[Row]) -> None:
        self.calls += 1
        self.changed.set()
        await asyncio.sleep(self.seconds)
        await super().deliver(rows)


@pytest.fixture
def client(either_store_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(either_store_url) as client:
        yield client


@pytest.fixture
async def store(either_store_url: str) -> AsyncIterator[Store]:
    async with opened(either_store_url) as store:
        yield store


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = Store(url, deadline=5.0)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink that is away is asked again soon."""
    monkeypatch.setattr(exports, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(exports, "_LONGEST_PAUSE", 0.01)


def exporter(store: Store, sink: Shelf, consumer: str = "one", **given: Any) -> Exporter:
    return Exporter(store, ARCHIVE, sink, consumer=consumer, **(HASTY | given))


@asynccontextmanager
async def running(one: Exporter) -> AsyncIterator[asyncio.Task[None]]:
    """An exporter at work until the block is left."""
    task = asyncio.ensure_future(one.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))


def owed(client: Any, stream: str = ACME, name: str = ARCHIVE) -> set[str]:
    """The entries that an export still has to deliver: what is pending, and what nobody was given yet."""
    group = next(one for one in client.xinfo_groups(stream) if one["name"] == name.encode())
    rest = client.xrange(stream, b"(" + group["last-delivered-id"])
    pending = client.xpending_range(stream, name, "-", "+", 1_000_000)
    return {entry.decode() for entry, _ in rest} | {one["message_id"].decode() for one in pending}


# — delivery


@pytest.mark.parametrize("batch", [1, 7, 1000])
async def test_every_row_of_every_organisation_is_delivered_once_and_in_order(
    store: Store, client: Any, batch: int
) -> None:
    sizes = {"acme": 35, "small": 1, "other": 20, "none": 0}
    for organisation, size in sizes.items():
        add(client, names(f"{organisation}-", size), organisation)
    client.sadd(ORGANISATIONS, "none")
    shelf = Shelf()
    await exporter(store, shelf, batch=batch).run(once=True)
    for organisation, size in sizes.items():
        assert [id for id in shelf.ids if id.startswith(organisation)] == names(f"{organisation}-", size)
        assert owed(client, ledger_stream(organisation)) == set()
    assert max(shelf.batches) <= batch
    assert shelf.closed


async def test_a_sink_gets_the_row_as_stored_with_its_entry_and_its_time(store: Store, client: Any) -> None:
    (first,), (second,) = add(client, ["r1"]), add(client, ["r2"], at="1700000000123")
    shelf = Shelf()
    await exporter(store, shelf).run(once=True)
    assert shelf.rows[0] == Row(first, int(first.partition("-")[0]), record(id="r1"), text("r1"))
    assert (shelf.rows[1].entry, shelf.rows[1].written_ms) == (second, 1_700_000_000_123)


async def test_what_the_store_forgets_while_it_is_held_back_is_not_delivered(store: Store, client: Any) -> None:
    """It is told again, and perhaps in other words."""
    entries = add(client, names("a", 3))
    shelf = Shelf()
    await ensure(store, ["acme"], [ARCHIVE])
    async with running(exporter(store, shelf, hold_back=4.0)):
        while client.xpending(ledger_stream("acme"), ARCHIVE)["pending"] < 3:
            await asyncio.sleep(0.01)
        client.xdel(ledger_stream("acme"), entries[1])
        await shelf.until(lambda: len(shelf.ids) >= 2)
    assert shelf.ids == ["a0", "a2"]


async def test_progress_counts_up_to_what_was_to_do(store: Store, client: Any) -> None:
    add(client, names("r", 25))
    told: list[Progress] = []
    await exporter(store, Shelf()).run(once=True, told=told.append)
    assert told[-1] == Progress(25, 0)
    assert all(one.done + one.left == 25 for one in told)
    assert len(told) > 1


async def test_once_ends_although_rows_keep_coming(store: Store, client: Any) -> None:
    add(client, names("r", 20))
    shelf = Shelf(before=lambda rows: client.xadd(ACME, {"row": text("late")}))
    async with asyncio.timeout(20):
        await exporter(store, shelf).run(once=True)
    assert set(names("r", 20)) <= set(shelf.ids)


async def test_news_and_new_organisations_are_delivered_within_seconds(store: Store, client: Any) -> None:
    shelf = Shelf()
    async with running(exporter(store, shelf)):
        add(client, ["first"])
        await shelf.until(lambda: shelf.ids == ["first"], 10)
        add(client, ["news"], "other")
        await shelf.until(lambda: shelf.ids == ["first", "news"], 10)
        begun = time.monotonic()
        add(client, ["more"])
        await shelf.until(lambda: shelf.ids[2:] == ["more"], 10)
        assert time.monotonic() - begun < 0.5


async def test_a_backlog_of_one_among_many_is_delivered_in_whole_batches(store: Store, client: Any) -> None:
    for organisation in names("organisation", 30):
        add(client, [organisation], organisation)
    add(client, names("r", 100))
    shelf = Shelf()
    await exporter(store, shelf).run(once=True)
    assert len(shelf.ids) == 130
    assert len(shelf.batches) <= 30
    assert max(shelf.batches) == 10


async def test_without_news_it_waits_in_one_read_for_all(store: Store, client: Any) -> None:
    for number in range(50):
        add(client, [f"r{number}"], f"organisation{number}")
    shelf = Shelf()
    async with running(exporter(store, shelf, claim_after=60.0)):
        await shelf.until(lambda: len(shelf.ids) == 50)
        await asyncio.sleep(0.5)
        client.config_resetstat()
        await asyncio.sleep(2.5)
        stats: Any = client.info("commandstats")
        assert 1 <= stats["cmdstat_xreadgroup"]["calls"] <= 5
        assert sum(one["calls"] for name, one in stats.items() if name.startswith("cmdstat_x")) <= 5


async def test_streams_of_a_cluster_are_read_by_slot() -> None:
    with stores.cluster(_server_binary()) as cluster:
        organisations = names("organisation", 6)
        owner = cluster.owner(ORGANISATIONS)
        owner.ask("SADD", ORGANISATIONS, *organisations)
        for organisation in organisations:
            stream = ledger_stream(organisation)
            for id in names(f"{organisation}-", 30):
                cluster.owner(stream).ask("XADD", stream, "*", "row", text(id, organisation))
        async with opened(cluster.url) as store:
            shelf = Shelf()
            await exporter(store, shelf).run(once=True)
            assert Counter(shelf.ids) == Counter(id for one in organisations for id in names(f"{one}-", 30))
            assert [(one.lag, one.pending) for one in await standings(store)] == [(0, 0)] * 6


# — a sink that is away


async def test_while_the_sink_is_away_nothing_is_acknowledged_and_two_lines_are_logged(
    store: Store, client: Any
) -> None:
    entries = add(client, names("r", 15))
    away = True

    def refuse(rows: Sequence[Row]) -> None:
        if away:
            raise Unavailable("no route to host")

    shelf = Shelf(before=refuse)
    with capture_logs() as lines:
        async with running(exporter(store, shelf)):
            await shelf.until(lambda: shelf.calls > 10)
            assert owed(client) == set(entries)
            away = False
            await shelf.until(lambda: len(shelf.ids) == 15)
    told = [(line["event"], line["export"]) for line in lines]
    assert told == [("export_sink_away", ARCHIVE), ("export_sink_back", ARCHIVE)]
    assert shelf.ids == names("r", 15)


async def test_the_absence_of_a_sink_counts_for_no_row_also_across_restarts(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(exports, "_LONGEST_PAUSE", 60.0)
    add(client, names("r", 15))

    def refuse(rows: Sequence[Row]) -> None:
        raise Unavailable("no route to host")

    for consumer in ("one", "one", "two", "one", "two", "two"):
        shelf = Shelf(before=refuse)
        async with running(exporter(store, shelf, consumer, attempts=2)):
            await shelf.until(lambda shelf=shelf: shelf.calls == 1)  # type: ignore[misc]
            await asyncio.sleep(0.1)  # left alone by now, which is when it is told to leave
    shelf = Shelf()
    await exporter(store, shelf, attempts=2).run(once=True)
    assert (await buried(store, ARCHIVE), sorted(shelf.ids)) == ([], sorted(names("r", 15)))
    assert max(shelf.batches) == 10


async def test_a_sink_that_cannot_be_opened_is_waited_for(store: Store, client: Any) -> None:
    add(client, ["r"])
    refusals = iter([Unavailable("no route"), Unavailable("no route", retry_after=0.5)])

    class Late(Shelf):
        async def open(self) -> None:
            for refusal in refusals:
                raise refusal

    shelf, begun = Late(), time.monotonic()
    await exporter(store, shelf).run(once=True)
    assert shelf.ids == ["r"]
    assert time.monotonic() - begun >= 0.5  # as it wished


async def test_a_sink_that_is_away_is_left_alone_for_longer_and_longer(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(exports, "_LONGEST_PAUSE", 0.4)
    add(client, ["r"])
    tries: list[float] = []

    def refuse(rows: Sequence[Row]) -> None:
        tries.append(time.monotonic())
        if len(tries) < 6:
            raise Unavailable("no route to host")

    await exporter(store, Shelf(refuse)).run(once=True)
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2, 0.2, 0.2), strict=True)] == [True] * 5
    assert sum(pauses) < 10


@pytest.mark.parametrize("seed", range(4))
async def test_a_sink_that_fails_at_random_loses_nothing(store: Store, client: Any, seed: int) -> None:
    entries = dict(zip(names("r", 200), add(client, names("r", 200)), strict=True))
    luck = random.Random(seed)

    def fail(rows: Sequence[Row]) -> None:
        delivered = {row.record.id for row in shelf.rows}
        assert {entry for id, entry in entries.items() if id not in delivered} <= owed(client)
        match luck.randrange(4):
            case 0:
                raise Unavailable("away")
            case 1:
                raise Rejected("not as they are")

    shelf = Shelf(before=fail)
    runs = [exporter(store, shelf, attempts=100)]
    await runs[-1].run(once=True)
    while runs[-1].refused:
        runs.append(exporter(store, shelf, attempts=100))
        await runs[-1].run(once=True)
    assert set(shelf.ids) == set(entries)
    assert len(runs) > 1
    assert owed(client) == set()


# — rows that cannot be delivered


def picky(*bad: str) -> Callable[[Sequence[Row]], None]:
    def refuse(rows: Sequence[Row]) -> None:
        if any(row.record.id in bad for row in rows):
            raise Rejected("a column\nis missing " + "x" * 500)

    return refuse


async def test_a_row_that_is_refused_so_often_is_buried_and_the_others_are_delivered(store: Store, client: Any) -> None:
    entries = add(client, names("r", 15), at="1700000000000")
    shelf = Shelf(before=picky("r3"))
    with capture_logs() as lines:
        async with running(exporter(store, shelf)), asyncio.timeout(20):
            while not client.exists(dead_letters("acme", ARCHIVE)):
                await asyncio.sleep(0.01)
    assert sorted(shelf.ids) == sorted(set(names("r", 15)) - {"r3"})
    (letter,) = await buried(store, ARCHIVE)
    assert (letter.organisation, letter.entry, letter.row) == ("acme", entries[3], text("r3").decode())
    assert letter.error == ("a column is missing " + "x" * 500)[:200]
    ((_, fields),) = client.xrange(dead_letters("acme", ARCHIVE))
    assert fields[b"at"] == b"1700000000000"
    assert owed(client) == set()
    told = [(line["event"], line.get("attempt")) for line in lines]
    assert told == [("export_row_refused", 1), ("export_row_refused", 2), ("export_row_buried", None)]


async def test_once_a_refused_row_is_tried_once_by_each_run_and_buried_by_the_last(store: Store, client: Any) -> None:
    entries = add(client, names("r", 25))
    add(client, ["o1"], "other")
    tries: list[str] = []

    def refuse(rows: Sequence[Row]) -> None:
        tries.extend(row.record.id for row in rows if len(rows) == 1 and row.record.id in ("r3", "r24"))
        picky("r3", "r24")(rows)

    shelf = Shelf(before=refuse)
    for run in (1, 2, 3):
        one = exporter(store, shelf, claim_after=0.001)  # it would be due at once
        async with asyncio.timeout(20):
            await one.run(once=True)
        assert (one.refused, sorted(tries)) == (2, sorted(["r3", "r24"] * run))
        assert owed(client) == ({entries[3], entries[24]} if run < 3 else set())
        assert len(await buried(store, ARCHIVE)) == (0 if run < 3 else 2)
    last = exporter(store, shelf)
    await last.run(once=True)
    assert last.refused == 0
    assert sorted(shelf.ids) == sorted((set(names("r", 25)) | {"o1"}) - {"r3", "r24"})


async def test_a_refused_row_is_tried_again_when_it_is_due_and_not_before(store: Store, client: Any) -> None:
    add(client, ["bad", "good"])
    tries: list[float] = []

    def refuse(rows: Sequence[Row]) -> None:
        if [row.record.id for row in rows] == ["bad"]:
            tries.append(time.monotonic())
        picky("bad")(rows)

    shelf = Shelf(before=refuse)
    async with running(exporter(store, shelf, claim_after=0.4)):
        await shelf.until(lambda: len(tries) == 3)
    assert min(tries[1] - tries[0], tries[2] - tries[1]) >= 0.4
    assert shelf.ids == ["good"]


async def test_a_sink_that_refuses_everything_is_slowed_down(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(exports, "_LONGEST_PAUSE", 60.0)
    add(client, names("r", 50))
    shelf = Shelf(before=picky(*names("r", 50)))
    with capture_logs() as lines:
        async with running(exporter(store, shelf)):
            await shelf.until(lambda: shelf.calls == 11)
            await asyncio.sleep(0.3)
    assert shelf.calls == 11  # a batch, and its rows one by one
    assert lines[-1]["event"] == "export_sink_away"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"row": b"{"}, "cannot be read: Input data was truncated"),
        ({"row": b'{"id": 1}'}, "cannot be read: Expected `str`, got `int` - at `$.id`"),
        ({"row": text("r"), "at": "noon"}, "cannot be read: invalid literal"),
        ({"other": "x"}, "cannot be read: it has no field `row`"),
    ],
)
async def test_a_row_that_cannot_be_read_is_buried_at_once(
    store: Store, client: Any, fields: dict[str, Any], error: str
) -> None:
    add(client, ["before"])
    client.xadd(ACME, fields)
    add(client, ["after"])
    shelf = Shelf()
    await exporter(store, shelf).run(once=True)
    assert shelf.ids == ["before", "after"]
    (letter,) = await buried(store, ARCHIVE)
    assert letter.error.startswith(error)
    assert owed(client) == set()


async def test_a_row_is_buried_once_however_often_that_is_asked(store: Store, client: Any) -> None:
    """Whoever had no answer asks again."""
    entries = add(client, names("r", 3))
    await ensure(store, ["acme"], [ARCHIVE])
    client.xreadgroup(ARCHIVE, "one", {ACME: ">"})
    client.xdel(ACME, entries[2])
    keys, bury = (ACME, dead_letters("acme", ARCHIVE)), Script("bury")
    answers = [await store.run(bury, keys, (ARCHIVE, entries[n], "wrong")) for n in (0, 0, 2)]
    assert answers == [1, 0, 0]
    assert [letter.entry for letter in await buried(store, ARCHIVE)] == entries[:1]
    assert owed(client) == {entries[1]}


async def test_dead_letters_are_put_back_and_delivered(store: Store, client: Any) -> None:
    add(client, names("r", 5))
    add(client, names("o", 5), "other")
    await exporter(store, Shelf(before=picky("r1", "r2", "o3")), attempts=1).run(once=True)
    assert [letter.organisation for letter in await buried(store, ARCHIVE)] == ["acme", "acme", "other"]
    assert await revive(store, ARCHIVE) == 3
    assert await buried(store, ARCHIVE) == []
    assert [one.pending for one in await standings(store)] == [2, 1]
    shelf = Shelf()
    async with running(exporter(store, shelf, "two", claim_after=60.0)):
        await shelf.until(lambda: len(shelf.ids) == 3)
    assert sorted(shelf.ids) == ["o3", "r1", "r2"]
    assert shelf.batches == [2, 1]
    assert await revive(store, ARCHIVE) == 0


async def test_a_dead_letter_whose_row_is_gone_remains_its_only_copy(store: Store, client: Any) -> None:
    entries = add(client, names("r", 3))
    await exporter(store, Shelf(before=picky("r0", "r1")), attempts=1).run(once=True)
    client.xdel(ACME, entries[0])
    assert await revive(store, ARCHIVE) == 1
    assert [letter.entry for letter in await buried(store, ARCHIVE)] == entries[:1]
    assert owed(client) == set(entries[1:2])


async def test_something_else_in_the_place_of_the_dead_letters_holds_up_only_the_bad_row(
    store: Store, client: Any
) -> None:
    entries = add(client, ["bad", *names("r", 15)])
    client.set(dead_letters("acme", ARCHIVE), "foreign")
    shelf = Shelf(before=picky("bad"))
    async with running(exporter(store, shelf, attempts=1)):
        await shelf.until(lambda: len(shelf.ids) == 15)
        add(client, ["later"])
        await shelf.until(lambda: "later" in shelf.ids)
    assert owed(client) == {entries[0]}


# — exporters that leave and die


async def test_whoever_is_told_to_leave_ends_his_batch(store: Store, client: Any) -> None:
    entries = add(client, names("r", 25))
    shelf = Slow(0.3)
    async with running(exporter(store, shelf)):
        await shelf.until(lambda: shelf.calls == 1)
    assert shelf.ids == names("r", 10)
    assert owed(client) == set(entries[10:])
    assert shelf.closed


async def test_whoever_is_told_to_leave_waits_so_long_and_counts_it_for_no_row(
    store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "_LEAVE_WITHIN", 0.05)
    entries = add(client, names("r", 5))
    shelf = Slow(60)
    async with asyncio.timeout(10):
        async with running(exporter(store, shelf)):
            await shelf.until(lambda: shelf.calls == 1)
    assert owed(client) == set(entries)
    pending: Any = client.xpending_range(ACME, ARCHIVE, "-", "+", 10)
    assert {one["times_delivered"] for one in pending} == {0}


@pytest.mark.parametrize("seed", range(3))
async def test_exporters_that_are_cancelled_at_random_lose_nothing(store: Store, client: Any, seed: int) -> None:
    entries = dict(zip(names("r", 300), add(client, names("r", 300)), strict=True))
    luck = random.Random(seed)
    delivered: set[str] = set()
    for _ in range(25):
        shelf = Slow(luck.uniform(0, 0.003))
        async with running(exporter(store, shelf, luck.choice("ab"))):
            await asyncio.sleep(luck.uniform(0, 0.02))
        delivered |= set(shelf.ids)
        if client.exists(ACME) and client.xinfo_groups(ACME):
            assert {entry for id, entry in entries.items() if id not in delivered} <= owed(client)
    last = Shelf()
    await exporter(store, last).run(once=True)
    assert delivered | set(last.ids) == set(entries)
    assert await buried(store, ARCHIVE) == []


async def test_two_consumers_share_the_work(store: Store, client: Any) -> None:
    add(client, names("r", 300))
    shelves = [Slow(0.002), Slow(0.002)]
    await asyncio.gather(
        *(
            exporter(store, shelf, consumer, claim_after=60.0).run(once=True)
            for shelf, consumer in zip(shelves, ("one", "two"), strict=True)
        )
    )
    assert sorted(shelves[0].ids + shelves[1].ids) == sorted(names("r", 300))
    assert min(len(shelf.ids) for shelf in shelves) > 50


async def test_what_a_dead_consumer_had_is_delivered_once_it_is_due(store: Store, client: Any) -> None:
    add(client, names("r", 20))
    await ensure(store, ["acme"], [ARCHIVE])
    client.xreadgroup(ARCHIVE, "dead", {ACME: ">"}, count=5)
    shelf = Shelf()
    begun = time.monotonic()
    async with running(exporter(store, shelf, claim_after=0.5)):
        await shelf.until(lambda: len(shelf.ids) == 20)
    assert shelf.ids == [*names("r", 20)[5:], *names("r", 5)]
    assert time.monotonic() - begun >= 0.5


async def test_what_it_had_itself_is_delivered_first_after_a_restart(store: Store, client: Any) -> None:
    add(client, names("r", 20))
    await ensure(store, ["acme"], [ARCHIVE])
    client.xreadgroup(ARCHIVE, "one", {ACME: ">"}, count=5)
    shelf = Shelf()
    async with running(exporter(store, shelf, claim_after=60.0)):
        await shelf.until(lambda: len(shelf.ids) == 20)
    assert shelf.ids == names("r", 20)
    assert shelf.batches == [1] * 5 + [10, 5]  # whatever of it may have been the end of the last one


@pytest.mark.parametrize("whose", ["one", "dead"])
async def test_rows_that_are_erased_while_they_are_pending_are_forgotten(store: Store, client: Any, whose: str) -> None:
    entries = add(client, names("r", 6))
    await ensure(store, ["acme"], [ARCHIVE])
    client.xreadgroup(ARCHIVE, whose, {ACME: ">"}, count=4)
    client.xdel(ACME, entries[1], entries[5])
    shelf = Shelf()
    await exporter(store, shelf).run(once=True)
    assert sorted(shelf.ids) == ["r0", "r2", "r3", "r4"]
    assert owed(client) == set()


async def test_a_row_that_somebody_else_has_delivered_meanwhile_is_not_delivered_again(
    store: Store, client: Any
) -> None:
    entries = add(client, names("r", 5))

    def refuse(rows: Sequence[Row]) -> None:
        if shelf.calls == 1:
            client.xack(ACME, ARCHIVE, entries[2])
            raise Unavailable("away")

    shelf = Shelf(before=refuse)
    await exporter(store, shelf).run(once=True)
    assert shelf.ids == ["r0", "r1", "r3", "r4"]


CHILD = """
import asyncio, os, signal, sys
from gateway.exports import Exporter
from gateway.store import Script, Store

class Lines:
    def __init__(self, path, poison):
        self.file, self.poison = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), poison
    async def open(self): pass
    async def aclose(self): pass
    async def deliver(self, rows):
        await asyncio.sleep(0.002)
        for row in rows:
            if row.record.id == self.poison:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(self.file, f"{row.record.id} {row.entry}\\n".encode())

async def main(url, path, poison, consumer):
    store = Store(url, deadline=5.0)
    one = Exporter(store, "archive", Lines(path, poison), consumer=consumer, batch=10, attempts=4, claim_after=0.2)
    print("begun", flush=True)
    await one.run(once=True)
    await store.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def child(url: str, path: Path, poison: str = "", consumer: str = "one") -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that runs the export into a file, until the block is left."""
    process = subprocess.Popen([sys.executable, "-c", CHILD, url, str(path), poison, consumer], stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            yield process
        finally:
            process.kill()


def written(path: Path) -> dict[str, str]:
    """What has reached a file of Lines: ids and their entries. A last line that is cut short was not delivered."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return dict(line.split(" ") for line in lines)


async def test_exporters_that_are_killed_lose_nothing(client: Any, either_store_url: str, tmp_path: Path) -> None:
    path, luck = tmp_path / "lines", random.Random(1)
    entries = add(client, names("r", 2500))
    for turn in range(8):
        with child(either_store_url, path, consumer="ab"[turn % 2]) as process:
            await asyncio.sleep(luck.uniform(0, 0.2))
            process.kill()
        if client.xinfo_groups(ACME):
            assert set(entries) - set(written(path).values()) <= owed(client)
    with child(either_store_url, path) as process:
        assert process.wait(30) == 0
    assert set(written(path)) == set(names("r", 2500))
    assert owed(client) == set()
    assert not client.exists(dead_letters("acme", ARCHIVE))


async def test_a_row_that_kills_whoever_delivers_it_is_buried_alone(
    store: Store, client: Any, either_store_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "lines"
    add(client, names("r", 25))
    ends = []
    for _ in range(6):
        with child(either_store_url, path, "r13") as process:
            ends.append(process.wait(30))
        if not ends[-1]:
            break
    assert ends == [-signal.SIGKILL] * 4 + [0]
    (letter,) = await buried(store, ARCHIVE)
    assert (letter.row, letter.error) == (text("r13").decode(), "tried 4 times, and whoever had it never came back")
    assert set(written(path)) == set(names("r", 25)) - {"r13"}


# — a store that leaves and comes back


def restart(node: stores.Node, binary: str) -> None:
    """Kill a store, and start it again on what it has written."""
    node.kill()
    node.process = subprocess.Popen([binary, str(node.folder / "server.conf")], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["valkey", "redis"])
async def test_a_store_that_is_killed_and_comes_back_is_waited_for(name: str) -> None:
    binary = _server_binary() if name == "valkey" else shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    with stores.node(binary, appendonly="yes", appendfsync="always") as node:
        try:
            with redis.Redis(port=node.port) as client:
                add(client, names("r", 400))
            async with opened(node.url) as store:
                shelf = Slow(0.005)
                async with running(exporter(store, shelf, claim_after=60.0)):
                    for share in (50, 150):
                        await shelf.until(lambda share=share: len(shelf.ids) > share)  # type: ignore[misc]
                        restart(node, binary)
                    await shelf.until(lambda: set(shelf.ids) == set(names("r", 400)))
                await exporter(store, Shelf()).run(once=True)
            with redis.Redis(port=node.port) as client:
                assert owed(client) == set()
        finally:
            node.kill()


async def test_a_group_that_is_gone_begins_again_at_the_first_row(store: Store, client: Any) -> None:
    add(client, names("r", 5))
    shelf = Shelf()
    async with running(exporter(store, shelf)):
        await shelf.until(lambda: len(shelf.ids) == 5)
        client.xgroup_destroy(ACME, ARCHIVE)
        await shelf.until(lambda: len(shelf.ids) == 10)
    assert shelf.ids == names("r", 5) * 2


async def test_something_else_in_the_place_of_a_ledger_holds_up_no_other(store: Store, client: Any) -> None:
    client.set(ledger_stream("broken"), "foreign")
    client.sadd(ORGANISATIONS, "broken")
    add(client, ["r"])
    shelf = Shelf()
    with capture_logs() as lines:
        await exporter(store, shelf).run(once=True)
    assert shelf.ids == ["r"]
    assert [(line["event"], line["organisation"]) for line in lines] == [("export_without_ledger", "broken")]
    assert [one.organisation for one in await standings(store)] == ["acme"]


# — standings


async def test_standings_tell_how_far_each_export_is(store: Store, client: Any) -> None:
    entries = add(client, names("r", 9))
    add(client, ["o"], "other")
    await ensure(store, ["acme", "other"], [ARCHIVE, "billing"])
    await ensure(store, ["acme"], [ARCHIVE])
    client.xreadgroup(ARCHIVE, "x", {ACME: ">"}, count=5)
    client.xack(ACME, ARCHIVE, *entries[:2])
    client.xadd(dead_letters("acme", ARCHIVE), {"row": "x"})
    found = {(one.organisation, one.export): one for one in await standings(store)}
    assert sorted(found) == [("acme", ARCHIVE), ("acme", "billing"), ("other", ARCHIVE), ("other", "billing")]
    archive, billing = found["acme", ARCHIVE], found["acme", "billing"]
    assert (archive.lag, archive.exact, archive.pending, archive.dead) == (4, True, 3, 1)
    assert archive.oldest_ms == int(entries[2].partition("-")[0])
    assert (billing.lag, billing.pending, billing.dead) == (9, 0, 0)
    assert billing.oldest_ms == int(entries[0].partition("-")[0])
    await exporter(store, Shelf(), "x").run(once=True)
    done = next(one for one in await standings(store) if (one.organisation, one.export) == ("other", ARCHIVE))
    assert (done.lag, done.pending, done.oldest_ms) == (0, 0, None)


async def test_a_lag_that_the_store_does_not_know_is_counted_or_estimated(store: Store, client: Any) -> None:
    client.sadd(ORGANISATIONS, "acme")
    for number in range(1000):
        client.xadd(ACME, {"row": "x"}, id=f"{1000 + number}-0")
    await ensure(store, ["acme"], [ARCHIVE])
    client.xgroup_setid(ACME, ARCHIVE, "1949-0")
    client.xdel(ACME, "1990-0")
    (near,) = await standings(store)
    assert (near.lag, near.exact) == (49, True)
    client.xgroup_setid(ACME, ARCHIVE, "1499-0")
    (far,) = await standings(store)
    assert not far.exact
    assert 490 <= far.lag <= 510


async def test_an_export_that_is_forgotten_is_gone_everywhere(store: Store, client: Any) -> None:
    for organisation in ("acme", "other"):
        add(client, ["r"], organisation)
    client.sadd(ORGANISATIONS, "none")
    await ensure(store, ["acme", "other"], [ARCHIVE, "billing"])
    client.xadd(dead_letters("acme", ARCHIVE), {"row": "x"})
    assert await forget(store, ARCHIVE) == 2
    assert {one.export for one in await standings(store)} == {"billing"}
    assert await buried(store, ARCHIVE) == []
    assert await forget(store, ARCHIVE) == 0


# — all of it at once, against a model


class Crash(Exception):
    """What ends an exporter as a signal would: nothing is given back."""


class Exports(RuleBasedStateMachine):
    """Two exports of two organisations, whose sinks and exporters fail as they like. What was added is never gone
    before both have it, and both have all of it in the end."""

    url = ""

    @initialize()
    def begin(self) -> None:
        self.client: Any = redis.Redis.from_url(self.url)
        self.client.flushall()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.entries: dict[str, dict[str, str]] = {"acme": {}, "other": {}}  # id -> entry
        self.delivered: dict[str, set[str]] = {"archive": set(), "billing": set()}
        self.count = 0
        self._do(lambda store: ensure(store, self.entries, self.delivered))

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        for name in self.delivered:
            self._run(name, "last", [])
            assert self.delivered[name] | self._dead(name) == {id for ids in self.entries.values() for id in ids}
        for organisation in self.entries:
            self.trim(organisation)
            assert self.client.xlen(ledger_stream(organisation)) == 0
        self.runner.close()
        self.client.close()

    @rule(organisation=st.sampled_from(["acme", "other"]), count=st.integers(1, 12))
    def add(self, organisation: str, count: int) -> None:
        ids = names(f"{self.count}-", count)
        self.count += 1
        entries = add(self.client, ids, organisation)
        self.entries[organisation] |= dict(zip(ids, entries, strict=True))

    @rule(
        name=st.sampled_from(["archive", "billing"]),
        consumer=st.sampled_from(["one", "two"]),
        fates=st.lists(st.sampled_from(["taken", "away", "refused", "dies before", "dies after"]), max_size=6),
    )
    def run(self, name: str, consumer: str, fates: list[str]) -> None:
        """An exporter works until it has everything, or dies."""
        self._run(name, consumer, fates)

    @rule(name=st.sampled_from(["archive", "billing"]), count=st.integers(1, 5))
    def take_and_die(self, name: str, count: int) -> None:
        self.client.xreadgroup(name, "dead", {ACME: ">"}, count=count)

    @rule(name=st.sampled_from(["archive", "billing"]))
    def revive(self, name: str) -> None:
        before = self._dead(name)
        revived = self._do(lambda store: revive(store, name))
        assert len(self._dead(name)) == len(before) - revived

    @rule(organisation=st.sampled_from(["acme", "other"]))
    def trim(self, organisation: str) -> None:
        time.sleep(0.002)  # what was written in this millisecond is not older than it
        self._do(lambda store: trim(store, organisation, 0.0, list(self.delivered)))

    @invariant()
    def what_is_gone_was_delivered_or_buried_by_all_and_what_was_not_is_still_owed(self) -> None:
        if not hasattr(self, "client"):
            return
        for organisation, entries in self.entries.items():
            stream = ledger_stream(organisation)
            there = {entry.decode() for entry, _ in self.client.xrange(stream)}
            for name, delivered in self.delivered.items():
                missing = {entry for id, entry in entries.items() if id not in delivered | self._dead(name)}
                assert missing <= there
                assert missing <= owed(self.client, stream, name)

    def _run(self, name: str, consumer: str, fates: list[str]) -> None:
        left = iter(fates)
        delivered = self.delivered[name]

        def fate(rows: Sequence[Row]) -> None:
            match next(left, "taken"):
                case "away":
                    raise Unavailable("away")
                case "refused":
                    raise Rejected("refused")
                case "dies before":
                    raise Crash
                case "dies after":
                    delivered.update(row.record.id for row in rows)
                    raise Crash
            delivered.update(row.record.id for row in rows)

        async def work(store: Store) -> None:
            one = Exporter(store, name, Shelf(fate), consumer=consumer, batch=5, attempts=2, claim_after=0.01)
            with suppress(Crash):
                await one.run(once=True)

        self._do(work)

    def _dead(self, name: str) -> set[str]:
        return {
            msgspec.json.decode(fields[b"row"])["id"]
            for organisation in self.entries
            for _, fields in self.client.xrange(dead_letters(organisation, name))
        }

    def _do(self, work: Callable[[Store], Any]) -> Any:
        async def done() -> Any:
            async with opened(self.url) as store, asyncio.timeout(20):
                return await work(store)

        return self.runner.run(done())


@pytest.mark.parametrize("examples", [25])
def test_nothing_is_lost_whatever_fails_in_whatever_order(
    either_store_url: str, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    monkeypatch.setattr(exports, "_GLANCE_MS", 2)
    machine = type("OnThisStore", (Exports,), {"url": either_store_url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

"""Every request that has ended is settled once: whatever is lost on the way, forgotten by the store, or dies."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from structlog.testing import capture_logs

from gateway import admission as admission_module
from gateway import settlements as settlements_module
from gateway import spool as spool_module
from gateway.admission import Admission, Lease
from gateway.ends import reservation_key
from gateway.intents import Charges, Intent, read_progress
from gateway.records import COUNTERS, GRAINS, Price, UsageRecord, ledger_stream
from gateway.snapshot import Limit
from gateway.spool import Spool, adopt
from gateway.terms import used
from gateway.usage import NOTHING, Progress, Usage
from tests.proving.limits import Request, Wire, gateways, key_of, quota, rate, seats, terms, until, wire

PRICE = Price(input=1_000_000, cached_input=500_000, output=2_000_000, reasoning=4_000_000)  # $1 a token, and so on
TOKENS = quota(1000, "month", name="tokens", count="total_tokens")
DOLLARS = quota(10_000, "month", name="dollars", count="usd")
PACE = rate(1000, "day", name="pace", count="output_tokens")
ASKED = quota(1000, "month", name="asked")
SEAT = seats(5)
LIMITS = [TOKENS, DOLLARS, PACE, ASKED, SEAT]
RESERVED = {"tokens": 50, "dollars": 90, "pace": 40}
LATE = Usage(20, 30, cached=8, reasoning=10)
SO_FAR = Progress(12, 4, 6, 2, "upstream", "counted", 200, 1, 99, 1_772_000_000_000, "u", "m")


@dataclass
class Asked(Request):
    """A request of which is known what it has used so far, and what it will have used."""

    so_far: Progress | None = None
    usage: Usage = LATE

    def intent(self, charges: Charges) -> Intent:
        return msgspec.structs.replace(super().intent(charges), price=PRICE)

    def progress(self) -> Progress | None:
        return self.so_far

    def used(self, limit: Limit) -> int:
        return used(limit.count, self.usage, PRICE)

    def record(self) -> UsageRecord:
        usage = self.usage
        return msgspec.structs.replace(
            super().record(),
            requests=int(usage.answered),
            input_tokens=usage.input,
            cached_tokens=usage.cached,
            output_tokens=usage.output,
            reasoning_tokens=usage.reasoning,
            input_source=usage.input_source,
            output_source=usage.output_source,
            price=PRICE,
            cost_microusd=usage.cost(PRICE),
        )


def asked(limits: Sequence[Limit] = LIMITS, organisation: str = "acme", **given: Any) -> Asked:
    return Asked(terms(limits, RESERVED, organisation=organisation), **given)


@pytest.fixture
def store(either_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(either_store_url) as client:
        yield client


# — what the books say


def counted(rows: Sequence[UsageRecord]) -> list[int]:
    """The sum of the rows' counters."""
    return [sum(getattr(row, name) for row in rows) for name in COUNTERS]


def of(usage: Usage) -> list[int]:
    """What one request of this usage counts."""
    tokens = (usage.input, usage.cached, usage.output, usage.reasoning)
    return [int(usage.answered), *tokens, usage.cost(PRICE)]


def books(store: redis.Redis, organisation: str = "acme") -> list[UsageRecord]:
    """The rows, after the sums of every grain were found to be theirs, and no request lives any more."""
    stream = ledger_stream(organisation)
    entries: Any = store.xrange(stream)
    rows = [msgspec.json.decode(fields[b"row"], type=UsageRecord) for _, fields in entries]
    for grain in GRAINS:
        keys: Any = store.keys(f"{stream}:{grain}:*")
        sums = [msgspec.msgpack.decode(held) for key in keys for held in fields_of(store, key)]
        assert [sum(column) for column in zip([0] * 6, *sums, strict=True)] == counted(rows), grain
    assert store.zcard(f"{{{organisation}}}:live") == 0
    return rows


def fields_of(store: redis.Redis, key: bytes) -> Any:
    return store.hvals(key.decode())


def stands(store: redis.Redis) -> dict[str, int]:
    """What is used of each of LIMITS; nothing of it is held."""
    found = {}
    for limit in (TOKENS, DOLLARS, ASKED):
        count = read(store, key_of(limit))
        assert count.get("held", 0) == 0, limit.name
        found[limit.name] = count.get("used", 0)
    pace = read(store, key_of(PACE))
    assert pace.get("held", 0) + pace.get("earlier", 0) == 0
    found["pace"] = math.ceil(pace.get("backlog", 0) / pace.get("unit", 1))  # what has drained since is less than one
    assert store.zcard(key_of(SEAT)) == 0
    return found


def read(store: redis.Redis, key: str) -> dict[str, Any]:
    """A count; one of which nothing is used has no key."""
    found: Any = store.get(key)
    count: dict[str, Any] = {} if found is None else msgspec.msgpack.decode(found)
    return count


def uses(usage: Usage) -> dict[str, int]:
    """What one request of this usage leaves used of LIMITS."""
    return {limit.name: used(limit.count, usage, PRICE) for limit in LIMITS if limit is not SEAT}


def known(progress: Progress) -> Usage:
    told = progress
    return Usage(told.input, told.output, told.cached, told.reasoning, told.input_source, told.output_source)


# — the spool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def copied(folder: Path, name: str = "copy") -> Path:
    """The folder as it is now: what would be left if all that use it died at once."""
    copy = folder.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def spooled(folder: Path) -> list[tuple[str, str]]:
    """What of which request stands in the spools of a folder, and is not done."""
    if not folder.exists():
        return []
    found = []
    for orphan in adopt(copied(folder, "looked-at")):
        with orphan:
            found += [tuple(msgspec.msgpack.decode(record)[:2]) for record in orphan.records()]
            assert orphan.damaged == []
    return found


def files(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.exists() else []


def spoil(folder: Path) -> None:
    """Let it not be written, although it is empty."""
    if folder.is_dir():
        folder.rmdir()
    folder.write_text("a file")


def mend(folder: Path) -> None:
    folder.unlink()


@asynccontextmanager
async def without_store(url: str, folder: Path) -> AsyncIterator[Admission]:
    """A worker whose store is away; at the end it is dead."""
    async with gateways(url, folder=folder) as (admission,):
        admission._store.away = True
        yield admission


@asynccontextmanager
async def on_line(url: str, folder: Path) -> AsyncIterator[tuple[Wire, Admission]]:
    """A worker on a wire to its store, with what it has to connect connected."""
    async with wire(url) as line, gateways(line.url, deadline=0.3, folder=folder) as (admission,):
        yield line, admission


async def serve(admission: Admission, request: Asked) -> Asked:
    async with admission.admit(request):
        pass
    return request


async def lose(line: Wire, admission: Admission) -> None:
    """The store is lost, is back, and all that may have been forgotten is told again."""
    settlements, losses = admission.settlements, admission._store.losses
    line.cuts = True
    await until(lambda: admission._store.losses == losses + 1 and not admission._store.away)
    await until(lambda: settlements._losses == losses + 1 and not settlements)


# — an answer that is lost


async def test_a_settlement_whose_answer_is_lost_is_in_the_spool_before_the_lease_ends(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    async with on_line(either_store_url, folder) as (line, admission):
        async with admission.admit(asked()) as lease:
            line.deaf = True
        assert spooled(folder) == [("end", lease.id)]
        line.deaf = False
        await until(lambda: admission.idle)
        assert files(folder) == []
    assert [row.id for row in books(store)] == [lease.id]
    assert stands(store) == uses(LATE)


async def test_without_a_spool_to_write_to_it_is_settled_all_the_same(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    spoil(folder)
    async with on_line(either_store_url, folder) as (line, admission):
        with capture_logs() as lines:
            async with admission.admit(asked()):
                line.deaf = True
        assert [line["event"] for line in lines if line["log_level"] == "error"].count("not_spooled") == 1
        line.deaf = False
        await until(lambda: admission.idle)
    assert len(books(store)) == 1


async def test_what_the_store_acknowledges_leaves_no_file(either_store_url: str, folder: Path) -> None:
    async with gateways(either_store_url, folder=folder) as (admission,):
        await asyncio.gather(*(serve(admission, asked()) for _ in range(5)))
        assert admission.idle
        assert files(folder.parent) == []


async def test_what_cannot_be_settled_at_the_end_is_left_to_the_next(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    async with without_store(either_store_url, folder) as admission:
        first = await serve(admission, asked())
        await admission.finish()
    async with gateways(either_store_url, folder=folder) as (heir,):
        await heir.settlements.adopt(folder)
        await until(lambda: heir.idle)
        assert files(folder) == []
    assert [(row.id, row.status) for row in books(store)] == [(first.id, "settled")]
    assert stands(store) == uses(LATE)


# — a worker that dies while the store is away


async def test_a_request_that_is_served_while_the_store_is_away_is_noted_before(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    """And once its worker has died there is one row of it, by the estimate of its input."""
    request = asked()
    async with without_store(either_store_url, folder) as dead:
        lease = await dead.admit(request).__aenter__()
        assert lease.degraded
        assert spooled(folder) == [("intent", request.id)]
    assert not request.ended
    async with gateways(either_store_url, folder=folder) as (heir,):
        await heir.settlements.adopt(folder)
        await until(lambda: heir.idle)
        assert files(folder) == []
    (row,) = books(store)
    assert (row.id, row.status, row.ended, row.attempt, row.http_status) == (request.id, "interrupted", "gateway", 0, 0)
    assert (row.input_source, row.output_source, row.price) == ("reserved", "reserved", PRICE)
    assert counted([row]) == of(Usage(2, 0))
    assert stands(store) == uses(Usage(2, 0))


async def test_of_one_that_came_so_far_the_row_says_how_far(
    either_store_url: str, store: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_RENEW_EVERY", 0.0)
    request = asked(so_far=msgspec.structs.replace(SO_FAR, output=5))
    async with without_store(either_store_url, folder) as dead:
        await dead.admit(request).__aenter__()
        await until(lambda: ("progress", request.id) in spooled(folder))
        request.so_far = SO_FAR
        notes = dead.settlements._notes[request.id]
        before = notes[-1]
        await until(lambda: notes[-1] > before + 1)
        assert len(notes) == 2  # what is known now, and not what was known before
    async with gateways(either_store_url, folder=folder) as (heir,):
        await heir.settlements.adopt(folder)
        await until(lambda: heir.idle)
    (row,) = books(store)
    assert (row.status, row.upstream, row.served_model, row.attempt) == ("interrupted", "u", "m", 1)
    assert (row.input_source, row.output_source, row.bytes_out) == ("upstream", "counted", 99)
    assert counted([row]) == of(known(SO_FAR))
    assert stands(store) == uses(known(SO_FAR))


async def test_one_that_has_ended_is_settled_by_its_end_and_not_by_what_was_known_before(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    async with without_store(either_store_url, folder) as dead:
        ended, cut_off = await serve(dead, asked()), asked()
        await dead.admit(cut_off).__aenter__()
        assert set(spooled(folder)) == {("intent", ended.id), ("end", ended.id), ("intent", cut_off.id)}
    async with gateways(either_store_url, folder=folder) as (heir,):
        await heir.settlements.adopt(folder)
        await until(lambda: heir.idle)
    found = {row.id: row.status for row in books(store)}
    assert found == {ended.id: "settled", cut_off.id: "interrupted"}


async def test_a_live_worker_is_not_its_own_heir_nor_anybody_elses(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    async with without_store(either_store_url, folder) as admission:
        async with gateways(either_store_url, folder=folder) as (other,):
            async with admission.admit(asked()):
                for one in (admission, other):
                    await one.settlements.adopt(folder)
                assert (admission.unsettled, other.unsettled) == (0, 0)
            admission._store.away = False
            await until(lambda: admission.idle)
            assert files(folder) == []  # neither its end nor what was noted before
    assert [row.status for row in books(store)] == ["settled"]


async def test_when_the_store_is_back_it_knows_what_was_begun_without_it(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    """It is noted there then, and no longer in the spool."""
    async with without_store(either_store_url, folder) as admission:
        async with admission.admit(asked(so_far=SO_FAR)) as lease:
            assert store.get(reservation_key("acme", lease.id)) is None
            admission._store.away, admission._renewed = False, 0.0
            await until(lambda: store.get(reservation_key("acme", lease.id)) is not None)
            await until(lambda: spooled(folder) == [])
        await until(lambda: admission.idle)
    assert len(books(store)) == 1
    assert stands(store) == uses(LATE)


async def test_a_record_that_nobody_can_read_is_told_and_keeps_no_other_from_being_settled(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    strange: list[object] = [
        b"\xc1",
        "end",
        ["end", "req_1", "acme"],
        ["end", "req_1", "acme", ["k"], ["req_1", "{}", "f", [], [], 0], []],
        ["another", "req_1", "acme", "[]"],
        ["intent", "req_2", "acme", "[]"],
        ["intent", "req_3", "acme", 7],
    ]
    async with without_store(either_store_url, folder) as dead:
        request = await serve(dead, asked())
        spool: Spool = dead.settlements._spool
        for record in strange:
            spool.note(record if isinstance(record, bytes) else msgspec.msgpack.encode(record))
    async with gateways(either_store_url, folder=folder) as (heir,):
        with capture_logs() as lines:
            await heir.settlements.adopt(folder)
            await until(lambda: heir.idle)
        assert sum(line["event"].endswith("_unreadable") for line in lines) == len(strange)
        assert files(folder) == []
    assert [row.id for row in books(store)] == [request.id]


async def test_an_adopted_spool_that_cannot_be_removed_does_not_stop_the_one_who_adopted_it(
    either_store_url: str, store: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with without_store(either_store_url, folder) as dead:
        await serve(dead, asked())
    (name,) = [name for name in files(folder) if name.endswith(".spool")]
    file = folder / name
    async with gateways(either_store_url, folder=folder) as (heir,):
        with capture_logs() as lines:
            records = spool_module.Orphan.records

            def read(orphan: spool_module.Orphan) -> Iterator[bytes]:
                yield from records(orphan)
                file.unlink()
                file.mkdir()  # nobody unlinks that

            monkeypatch.setattr(spool_module.Orphan, "records", read)
            await heir.settlements.adopt(folder)
            await until(lambda: heir.idle)
        assert "spool_not_removed" in [line["event"] for line in lines]
        await serve(heir, asked())
        assert heir.idle
    assert len(books(store)) == 2


# — what is told twice


@pytest.mark.parametrize("long_after", [False, True], ids=["within the mark", "long after"])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut off"])
async def test_what_a_dead_workers_spool_says_is_settled_once_even_if_it_was_before(
    either_store_url: str, store: redis.Redis, folder: Path, ended: bool, long_after: bool
) -> None:
    """The mark says so, and when that is gone the ledger."""
    async with without_store(either_store_url, folder) as dead:
        request = asked()
        lease = await dead.admit(request).__aenter__()
        if ended:
            await lease.__aexit__(None, None, None)
        copy = copied(folder)
    for spools in (folder, copy):
        async with gateways(either_store_url, folder=spools) as (heir,):
            await heir.settlements.adopt(spools)
            await until(lambda: heir.idle)
            assert files(spools) == []
        assert store.exists(reservation_key("acme", request.id)) == (spools is folder or not long_after)
        if long_after:
            store.delete(reservation_key("acme", request.id))
    assert [row.status for row in books(store)] == ["settled" if ended else "interrupted"]
    assert stands(store) == uses(LATE if ended else Usage(2, 0))


async def test_who_is_sent_again_when_its_mark_may_be_gone_is_looked_up(
    either_store_url: str, store: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlements_module, "_LOOK_AFTER", 0.0)
    monkeypatch.setattr(settlements_module, "_PAGE", 2)
    async with on_line(either_store_url, folder) as (line, admission):
        others = [await serve(admission, asked()) for _ in range(3)]
        async with admission.admit(asked()) as lease:
            line.deaf = True
        await until(lambda: store.xlen(ledger_stream("acme")) == 4)
        store.delete(reservation_key("acme", lease.id))
        line.deaf = False
        await until(lambda: admission.idle)
    assert [row.id for row in books(store)] == [*(other.id for other in others), lease.id]


async def test_so_it_is_where_the_clock_was_set_back_meanwhile(
    either_store_url: str, store: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How old a mark is has nothing to do with what time it is said to be."""
    monkeypatch.setattr(settlements_module, "_LOOK_AFTER", 0.05)
    async with on_line(either_store_url, folder) as (line, admission):
        other = await serve(admission, asked())
        async with admission.admit(asked()) as lease:
            line.deaf = True
        await until(lambda: store.xlen(ledger_stream("acme")) == 2)
        store.delete(reservation_key("acme", lease.id))
        earlier = time.time() - 3600
        monkeypatch.setattr(time, "time", lambda: earlier)
        await asyncio.sleep(0.1)
        line.deaf = False
        await until(lambda: admission.idle)
    assert [row.id for row in books(store)] == [other.id, lease.id]


@pytest.mark.parametrize("forgets", [True, False], ids=["forgot it", "did not"])
async def test_what_the_store_acknowledged_just_before_it_was_lost_is_told_again(
    either_store_url: str, store: redis.Redis, folder: Path, forgets: bool
) -> None:
    async with on_line(either_store_url, folder) as (line, admission):
        requests = [await serve(admission, asked()) for _ in range(3)]
        assert admission.idle
        if forgets:
            store.flushall()
        await lose(line, admission)
    assert sorted(row.id for row in books(store)) == sorted(request.id for request in requests)
    assert stands(store) == {name: 3 * amount for name, amount in uses(LATE).items()}


async def test_what_an_heir_found_in_the_ledger_is_not_settled_anew_when_the_store_is_lost_right_then(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    """What was acknowledged a moment ago may have been settled long before: its mark is gone."""
    async with without_store(either_store_url, folder) as dead:
        request = await serve(dead, asked())
        copy = copied(folder)
    async with gateways(either_store_url, folder=folder) as (heir,):
        await heir.settlements.adopt(folder)
        await until(lambda: heir.idle)
    store.delete(reservation_key("acme", request.id))
    async with on_line(either_store_url, copy) as (line, second):
        await second.settlements.adopt(copy)
        await until(lambda: second.idle)
        await lose(line, second)
    assert [row.id for row in books(store)] == [request.id]
    assert stands(store) == uses(LATE)


async def test_to_send_again_does_not_make_younger(either_store_url: str, folder: Path) -> None:
    """It may have been settled the first time: how long a mark may be there counts from then."""
    async with without_store(either_store_url, folder) as away:
        request = await serve(away, asked())
        kept = away.settlements._pending[request.id]
        first = kept.since
        assert first is not None
        await asyncio.wait((away.settlements.send(kept.end, again=True),))
        assert kept.since == first


async def test_so_is_what_was_adopted(either_store_url: str, store: redis.Redis, folder: Path) -> None:
    """Nobody else would tell it: its file is gone."""
    async with without_store(either_store_url, folder) as dead:
        ended, cut_off = await serve(dead, asked()), asked()
        await dead.admit(cut_off).__aenter__()
    async with on_line(either_store_url, folder) as (line, heir):
        await heir.settlements.adopt(folder)
        await until(lambda: heir.idle and files(folder) == [])
        store.flushall()
        await lose(line, heir)
    assert {row.id: row.status for row in books(store)} == {ended.id: "settled", cut_off.id: "interrupted"}


# — a live request


async def test_the_progress_of_a_live_request_stands_in_its_reservation(
    either_store_url: str, store: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_RENEW_EVERY", 0.0)
    async with gateways(either_store_url, folder=folder) as (admission,):
        monkeypatch.setattr(admission_module, "_BEAT_EVERY", 0.0)
        request = asked()
        async with admission.admit(request):
            assert reserved(store, request) is None
            request.so_far = SO_FAR
            await until(lambda: reserved(store, request) == SO_FAR)
            request.so_far = msgspec.structs.replace(SO_FAR, output=60)
            await until(lambda: reserved(store, request) == request.so_far)
    assert counted(books(store)) == of(LATE)


def reserved(store: redis.Redis, request: Asked) -> Progress | None:
    """How far a request has come, by its reservation."""
    found: Any = store.get(reservation_key("acme", request.id))
    return read_progress(found.partition(b"\n")[2])


async def test_a_store_that_forgot_everything_knows_live_requests_again_and_they_are_settled_once(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    async with on_line(either_store_url, folder) as (line, admission):
        requests = [asked(so_far=SO_FAR) for _ in range(3)]
        leases = [await admission.admit(request).__aenter__() for request in requests]
        await until(lambda: store.sismember("{gateway}:organisations", "acme"))
        store.flushall()
        await lose(line, admission)
        await until(lambda: store.zcard("{acme}:live") == 3)
        assert [reserved(store, request) for request in requests] == [SO_FAR] * 3
        await until(lambda: store.sismember("{gateway}:organisations", "acme"))  # a sweeper has to know where to look
        assert store.zcard(key_of(SEAT)) == 3
        await asyncio.gather(*(leave(lease) for lease in leases))
        assert admission.idle
    assert len(books(store)) == 3
    assert stands(store) == {name: 3 * amount for name, amount in uses(LATE).items()}


async def leave(lease: Lease) -> None:
    await lease.__aexit__(None, None, None)


async def test_what_was_not_answered_gives_back_all_that_it_took(
    either_store_url: str, store: redis.Redis, folder: Path
) -> None:
    async with gateways(either_store_url, folder=folder) as (admission,):
        await serve(admission, asked(usage=NOTHING))
    assert counted(books(store)) == [0] * 6
    assert stands(store) == uses(NOTHING)

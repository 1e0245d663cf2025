"""What dead workers leave is settled by one that lives: once, by what is known, and corrected if they were not dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import yaml
from structlog.testing import capture_logs

from gateway import housekeeping, settlements
from gateway.admission import Admission
from gateway.ends import live_key, reservation_key
from gateway.housekeeping import Housekeeping
from gateway.policy import load
from gateway.records import ORGANISATIONS, ledger_stream
from gateway.snapshot import Snapshot
from gateway.spool import Spool
from gateway.usage import NOTHING, Usage
from tests.proving.house import documents
from tests.proving.limits import gateways, key_of, until
from tests.test_settlements import (
    LATE,
    SEAT,
    SO_FAR,
    Asked,
    asked,
    books,
    copied,
    counted,
    files,
    folder,
    known,
    lose,
    mend,
    of,
    on_line,
    serve,
    spoil,
    spooled,
    stands,
    store,
    uses,
    without_store,
)

__all__ = ["folder", "store"]  # fixtures


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    policies = tmp_path_factory.mktemp("policies")
    (policies / "all.yaml").write_text(yaml.safe_dump(documents(["http://127.0.0.1:9"])))
    return load(policies)


@pytest.fixture
def chores(snapshot: Snapshot, tmp_path: Path) -> Callable[[Admission], Housekeeping]:
    """The chores of a worker whose spool is in tmp_path."""

    def of_worker(admission: Admission) -> Housekeeping:
        spool: Spool = admission.settlements._spool
        return Housekeeping(admission._store, admission, lambda: snapshot, spool, tmp_path / "spool")

    return of_worker


Chores = Callable[[Admission], Housekeeping]


@asynccontextmanager
async def at_work(*some: Housekeeping) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(one.run()) for one in some]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds follow one another at once, and nobody waits for a lease."""
    monkeypatch.setattr(housekeeping, "_EVERY", 0.01)
    monkeypatch.setattr(housekeeping, "_ADOPT_EVERY", 0.0)
    monkeypatch.setattr(housekeeping, "SEAT_LEASE", 0.0)


async def abandoned(admission: Admission, request: Asked, store: redis.Redis) -> Asked:
    """A request whose worker has stopped to renew it, for so long that its lease is over."""
    lease = await admission.admit(request).__aenter__()
    if request.so_far is not None:
        await admission._renew_live([lease])
    lapse(store, request)
    return request


def lapse(store: redis.Redis, request: Asked) -> None:
    assert store.zadd(live_key(request.terms.organisation), {request.id: 1}, xx=True, ch=True) == 1


async def late(admission: Admission, request: Asked) -> None:
    """Its worker was not dead."""
    await admission.settle(admission._live[request.id])


@contextmanager
def events() -> Iterator[list[str]]:
    """The names of what is logged."""
    found: list[str] = []
    with capture_logs() as lines:
        yield found
    found += [line["event"] for line in lines]


# — a request whose worker has died


@pytest.mark.parametrize("so_far", [None, SO_FAR], ids=["nothing known", "so far"])
async def test_it_becomes_one_row_of_what_is_known_and_limits_say_the_same(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, so_far: Any
) -> None:
    usage = Usage(2, 0) if so_far is None else known(so_far)
    async with gateways(either_store_url, 2, folder=folder) as (dead, sweeper):
        alive = asked()
        async with sweeper.admit(alive):
            request = await abandoned(dead, asked(so_far=so_far), store)
            assert await chores(sweeper).sweep("acme") == 1
            assert await chores(sweeper).sweep("acme") == 0
            assert store.zrange(live_key("acme"), 0, -1) == [alive.id.encode()]
        rows = {row.id: row for row in books(store)}
        row = rows[request.id]
        assert (len(rows), row.status, row.ended) == (2, "interrupted", "gateway")
        source = "reserved" if so_far is None else so_far.output_source
        assert row.output_source == source
        assert counted([row]) == of(usage)
        assert sweeper.idle
        store.zrem(key_of(SEAT), request.id)  # its seat lapses by itself
    assert stands(store) == {name: amount + uses(LATE)[name] for name, amount in uses(usage).items()}


@pytest.mark.parametrize("usage", [LATE, NOTHING, known(SO_FAR)], ids=["more", "nothing", "as much"])
async def test_who_was_not_dead_settles_the_difference_once(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, usage: Usage
) -> None:
    async with gateways(either_store_url, 2, folder=folder) as (paused, sweeper):
        request = await abandoned(paused, asked(so_far=SO_FAR, usage=usage), store)
        assert await chores(sweeper).sweep("acme") == 1
        (end,) = [end async for end in ends_of(paused, request)]
        await until(lambda: paused.idle)
        first, correction = rows = books(store)
        assert (first.status, correction.status, correction.id) == (
            "interrupted",
            "correction",
            f"{request.id}:correction",
        )
        assert counted(rows) == of(usage)
        for again in (False, True):  # within the mark of the correction, and when it is gone
            if again:
                store.delete(reservation_key("acme", correction.id))
                paused.settlements.later(end)
                paused.settlements._pending[end.id].since = settlements._now() - 91
            else:
                paused.settlements.send(end, again=True)
            await until(lambda: paused.idle)
            assert books(store) == rows
    charged, most = uses(known(SO_FAR)), uses(usage)
    assert stands(store) == {name: max(amount, most[name]) for name, amount in charged.items()}


async def ends_of(admission: Admission, request: Asked) -> AsyncIterator[Any]:
    """The end that a request comes to."""
    sent = admission.settlements.send
    found: list[Any] = []

    def send(end: Any, **given: Any) -> Any:
        found.append(end)
        return sent(end, **given)

    admission.settlements.send = send  # type: ignore[method-assign]
    await late(admission, request)
    admission.settlements.send = sent  # type: ignore[method-assign]
    yield found[0]


async def test_a_correction_is_not_lost_with_its_worker_nor_written_twice(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores
) -> None:
    """Until it is settled the end that it corrects stays in the spool; limits are corrected by that, too."""
    async with gateways(either_store_url) as (sweeper,):
        async with on_line(either_store_url, folder) as (line, paused):
            request = await abandoned(paused, asked(so_far=SO_FAR), store)
            assert await chores(sweeper).sweep("acme") == 1
            line.deaf = True
            await late(paused, request)
            await until(lambda: line.lost > 0)
            assert spooled(folder) == [("end", request.id)]
    copies = [copied(folder, "one"), copied(folder, "two")]
    for spools in (folder, *copies):
        async with gateways(either_store_url, folder=spools) as (heir,):
            await heir.settlements.adopt(spools)
            await until(lambda: heir.idle)
            assert files(spools) == []
        store.delete(reservation_key("acme", request.id), reservation_key("acme", f"{request.id}:correction"))
        rows = books(store)
        assert [row.status for row in rows] == ["interrupted", "correction"]
        assert counted(rows) == of(LATE)
        assert stands(store) == uses(LATE)


async def test_a_correction_that_the_store_forgot_is_told_again(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores
) -> None:
    async with gateways(either_store_url) as (sweeper,), on_line(either_store_url, folder) as (line, paused):
        request = await abandoned(paused, asked(so_far=SO_FAR), store)
        await chores(sweeper).sweep("acme")
        entries: Any = store.xrange(ledger_stream("acme"))
        names: Any = store.keys("{acme}:*")
        before: dict[bytes, Any] = {key: store.dump(key) for key in names}
        await late(paused, request)
        await until(lambda: paused.idle and store.xlen(ledger_stream("acme")) == 2)
        store.flushall()
        for key, dump in before.items():
            store.restore(key, 0, dump)
        assert store.xrange(ledger_stream("acme")) == entries
        await lose(line, paused)
    rows = books(store)
    assert [row.status for row in rows] == ["interrupted", "correction"]
    assert counted(rows) == of(LATE)


async def test_an_end_that_waits_is_not_swept_by_its_own_worker(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores
) -> None:
    """What it knows is more than what its reservation says."""
    store.set(ledger_stream("acme"), "not a stream")
    async with gateways(either_store_url, folder=folder) as (admission,):
        request = await serve(admission, asked())
        assert request.id in admission.settlements
        lapse(store, request)
        assert await chores(admission).sweep("acme") == 0
        store.delete(ledger_stream("acme"))
        await until(lambda: admission.idle)
    assert [row.status for row in books(store)] == ["settled"]
    assert stands(store) == uses(LATE)


async def test_many_are_swept_in_small_steps(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_SWEPT_AT_ONCE", 3)
    async with gateways(either_store_url, 2, folder=folder) as (dead, sweeper):
        for _ in range(5):
            await abandoned(dead, asked([]), store)
        assert [await chores(sweeper).sweep("acme") for _ in range(3)] == [3, 2, 0]
    assert [row.status for row in books(store)] == ["interrupted"] * 5


# — garbage

GARBAGE = {
    "no intent": b"123 garbage\n",
    "no progress": b'123 ["t","k",null,"m","p","e",false,{},1,2,3,[]]\ngarbage',
    "no UTF-8": b'123 ["\xff","k",null,"m","p","e",false,{},1,2,3,[]]\n',
    "too few words": b'123 ["t","k",null,"m","p","e",false,{},1,2,3,[["key","usd",["q"]]]]\n',
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage_in_a_reservation_is_told_once_and_keeps_nobody_from_being_swept(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, garbage: str
) -> None:
    async with gateways(either_store_url, 2, folder=folder) as (dead, sweeper):
        request = await abandoned(dead, asked(), store)
        store.set(reservation_key("acme", "req_0"), GARBAGE[garbage])
        store.zadd(live_key("acme"), {b"req_0": 0, b"\xff\xfe": 0})
        store.set(b"{acme}:request:\xff\xfe", GARBAGE["no intent"])
        with events() as told:
            assert await chores(sweeper).sweep("acme") == 1
            assert await chores(sweeper).sweep("acme") == 0
        assert told.count("reservation_unreadable") == 2
    assert [row.id for row in books(store)] == [request.id]


async def test_an_organisation_whose_keys_hold_something_else_keeps_no_other_from_being_swept(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, quick: None
) -> None:
    async with gateways(either_store_url, folder=folder) as (admission,):
        store.set(live_key("abc"), "not a set")
        store.sadd(ORGANISATIONS, "abc", "acme")
        await abandoned(admission, asked([]), store)
        with events() as told:
            async with at_work(chores(admission)):
                await until(lambda: store.xlen(ledger_stream("acme")) == 1)
        assert "not_swept" in told
    assert [row.status for row in books(store)] == ["interrupted"]


# — who, and when


async def test_the_first_worker_sweeps_and_no_other(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, quick: None
) -> None:
    async with gateways(either_store_url, 2, folder=folder) as both:
        await until(lambda: sorted(admission._told for admission in both) == [[2, 0], [2, 1]])
        first, second = sorted(both, key=lambda admission: not admission.first)
        store.sadd(ORGANISATIONS, "acme")
        await abandoned(first, asked([]), store)
        async with at_work(chores(second)):
            for name in ("one", "two"):  # the second one is adopted in a round that comes after a whole one
                await orphan(either_store_url, folder, name)
            assert store.xlen(ledger_stream("acme")) == 0
            async with at_work(chores(first)):
                await until(lambda: store.xlen(ledger_stream("acme")) == 1)
    assert [row.status for row in books(store)] == ["interrupted"]


def moved(place: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in place.iterdir():
        file.rename(folder / file.name)


async def orphan(url: str, folder: Path, name: str) -> None:
    """What a worker has left; return when it has been adopted and settled."""
    place = folder.with_name(name)
    async with without_store(url, place) as dead:
        await serve(dead, asked([], organisation=name))
    moved(place, folder)
    with redis.Redis.from_url(url) as client:
        await until(lambda: client.xlen(ledger_stream(name)) == 1 and files(folder) == [])


async def test_nobody_is_swept_before_whoever_lives_has_had_the_time_to_renew(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that was just opened, or was away until now."""
    monkeypatch.setattr(housekeeping, "_EVERY", 0.01)
    monkeypatch.setattr(housekeeping, "SEAT_LEASE", 1.5)
    async with on_line(either_store_url, folder) as (line, admission):
        store.sadd(ORGANISATIONS, "acme")
        for rows in (1, 2):
            await abandoned(admission, asked([]), store)
            admission._live.clear()  # it is not renewed either
            async with at_work(chores(admission)):
                await until(lambda rows=rows: store.xlen(ledger_stream("acme")) == rows)
            assert time.monotonic() - admission._store.since > 1.5
            await lose(line, admission)
            assert time.monotonic() - admission._store.since < 1.5
    assert [row.status for row in books(store)] == ["interrupted"] * 2


async def test_an_organisation_that_nobody_has_configured_any_more_is_swept_too(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, quick: None
) -> None:
    """And one whose request was the first and the last: admission tells of it soon."""
    async with gateways(either_store_url) as (dead,):
        await abandoned(dead, asked([], organisation="gone"), store)
        await until(lambda: store.sismember(ORGANISATIONS, "gone"))
    async with gateways(either_store_url, folder=folder) as (sweeper,):
        await until(lambda: sweeper.first or forget_worker(store, sweeper))
        async with at_work(chores(sweeper)):
            await until(lambda: store.xlen(ledger_stream("gone")) == 1)
    assert [row.organisation for row in books(store, "gone")] == ["gone"]


def forget_worker(store: redis.Redis, alive: Admission) -> bool:
    """Take the dead out of the list of workers, which would take a lease's time."""
    dead: Any = [name for name in store.zrange("{gateway}:workers", 0, -1) if name != alive._worker.encode()]
    if dead:
        store.zrem("{gateway}:workers", *dead)
    return False


async def test_a_worker_adopts_what_another_one_left_and_nothing_is_left_of_it(
    either_store_url: str, store: redis.Redis, folder: Path, chores: Chores, quick: None
) -> None:
    async with without_store(either_store_url, folder) as dead:
        ended, cut_off = await serve(dead, asked()), asked(so_far=SO_FAR)
        await dead.admit(cut_off).__aenter__()
        dead.settlements.progress(cut_off.id, msgspec.json.encode(SO_FAR).decode())
    async with gateways(either_store_url, 3, folder=folder) as three:
        async with at_work(*map(chores, three)):
            await until(lambda: store.xlen(ledger_stream("acme")) == 2 and files(folder) == [])
    rows = {row.id: row for row in books(store)}
    assert (rows[ended.id].status, rows[cut_off.id].status) == ("settled", "interrupted")
    assert counted([rows[cut_off.id]]) == of(known(SO_FAR))
    assert stands(store) == {name: amount + uses(LATE)[name] for name, amount in uses(known(SO_FAR)).items()}


async def test_a_spool_that_can_be_written_again_is_used_again(
    either_store_url: str, folder: Path, chores: Chores, quick: None
) -> None:
    spoil(folder)
    async with gateways(either_store_url, folder=folder) as (admission,):
        spool: Spool = admission.settlements._spool
        await spool.probe()
        assert admission.settlements.unkept
        async with at_work(chores(admission)):
            mend(folder)
            await until(lambda: not admission.settlements.unkept)

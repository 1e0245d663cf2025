"""A row is in the table once however often it is delivered, in its month, and no message tells what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from gateway.delivery import Rejected, Row, Unavailable
from gateway.postgres import Postgres
from gateway.records import ERASED
from tests.proving import postgres
from tests.proving.rows import NOON, PRICE, row

pytestmark = pytest.mark.anyio

NOVEMBER = 1_793_491_200_000  # 2026-11-01T00:00:00Z, in ms


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    if not postgres.installed():
        pytest.skip(postgres.LACKING)
    with postgres.postgres() as one:
        yield one


@pytest.fixture
def dsn(server: postgres.Server) -> str:
    return server.database()


@asynccontextmanager
async def sink(dsn: str, table: str = "usage", **given: Any) -> AsyncIterator[Postgres]:
    one = Postgres(dsn, table, **given)
    try:
        yield one
    finally:
        await one.aclose()


@asynccontextmanager
async def transaction(dsn: str, statement: str) -> AsyncIterator[None]:
    """Somebody else's, open until the block is left."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.execute(statement.encode())
        yield


async def delivered(sink: Postgres, rows: list[Row]) -> None:
    """As an exporter does it: again until it is taken."""
    end = asyncio.get_running_loop().time() + 20
    while True:
        try:
            return await sink.deliver(rows)
        except Unavailable:
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.02)


def partitions(server: postgres.Server, dsn: str, table: str = "usage") -> list[str]:
    found = server.ask(
        dsn,
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(%s)"
        " AND inhrelid IN (SELECT oid FROM pg_class WHERE relkind = 'r') ORDER BY 1",
        table,
    )
    return [name for (name,) in found]


# — what is there


async def test_every_member_of_a_record_has_its_column(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.open()
        await one.deliver([row(7, at=NOON + 1, entry="1-2")])
    noon = datetime(2026, 11, 22, 12, tzinfo=UTC)
    expected = {
        "event_id": "request-7",
        "written_at": noon + timedelta(milliseconds=1),
        "entry": "1-2",
        "status": "settled",
        "organisation": "acme",
        "team": "research",
        "key": "key-1",
        "user_id": "u_00112233445566778899",
        "model": "llama",
        "served_model": "llama",
        "pool": "demo",
        "upstream": "http://127.0.0.1:9000",
        "endpoint": "chat/completions",
        "stream": True,
        "http_status": 200,
        "ended": "complete",
        "attempt": 1,
        "requests": 1,
        "input_tokens": 107,
        "cached_tokens": 10,
        "output_tokens": 27,
        "reasoning_tokens": 5,
        "input_source": "upstream",
        "output_source": "counted",
        "price_input": PRICE.input,
        "price_cached_input": PRICE.cached_input,
        "price_output": PRICE.output,
        "price_reasoning": PRICE.reasoning,
        "cost_microusd": 34,
        "received_at": noon - timedelta(milliseconds=2500),
        "first_byte_at": noon - timedelta(milliseconds=2000),
        "ended_at": noon - timedelta(milliseconds=1),
        "bytes_in": 1000,
        "bytes_out": 2007,
    }
    (found,) = server.ask(dsn, "SELECT row_to_json(usage) FROM usage")
    assert list(found[0]) == list(expected)
    assert server.ask(dsn, "SELECT * FROM usage") == [tuple(expected.values())]
    members = {*row(0).record.__struct_fields__} - {"id", "user", "price", "received_ms", "first_byte_ms", "ended_ms"}
    assert members <= set(expected)


async def test_what_nothing_is_known_of_is_null(server: postgres.Server, dsn: str) -> None:
    nothing: dict[str, Any] = {"user": None, "served_model": None, "upstream": None, "first_byte_ms": None}
    async with sink(dsn) as one:
        await one.deliver([row(1, **nothing), row(2, **nothing)])
    columns = "user_id, served_model, upstream, first_byte_at"
    assert server.ask(dsn, f"SELECT DISTINCT {columns} FROM usage") == [(None, None, None, None)]


async def test_tokens_and_costs_are_exact_as_far_as_the_column_goes(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1, cost_microusd=2**63 - 1, input_tokens=-(2**63)), row(2, cost_microusd=-1)])
    found = server.ask(dsn, "SELECT cost_microusd, input_tokens FROM usage ORDER BY event_id")
    assert found == [(2**63 - 1, -(2**63)), (-1, 102)]


# — once


async def test_ten_thousand_rows_that_are_delivered_thrice_are_there_once(server: postgres.Server, dsn: str) -> None:
    rows = [row(number, at=NOON + number) for number in range(10_000)]
    async with sink(dsn) as one, sink(dsn) as other:
        for _ in range(2):
            for first in range(0, len(rows), 1000):
                await one.deliver(rows[first : first + 1000])
        await asyncio.gather(
            *(delivered(one if first % 2 else other, rows[first : first + 500]) for first in range(0)),
            each_of(one, rows, 700),
            each_of(other, rows[::-1], 900),
        )
    totals = server.ask(dsn, "SELECT count(*), sum(input_tokens)::bigint, sum(cost_microusd)::bigint FROM usage")
    assert totals == [(10_000, sum(100 + n for n in range(10_000)), sum(27 + n for n in range(10_000)))]


async def each_of(sink: Postgres, rows: list[Row], batch: int) -> None:
    for first in range(0, len(rows), batch):
        await delivered(sink, rows[first : first + batch])


async def test_two_exporters_that_begin_with_the_same_rows_make_one_table_and_no_row_twice(
    server: postgres.Server, dsn: str
) -> None:
    rows = [row(number, at=NOVEMBER + number * 86_400_000) for number in range(-40, 40)]
    async with sink(dsn) as one, sink(dsn) as other:
        await asyncio.gather(each_of(one, rows, 7), each_of(other, rows[::-1], 7))
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(80,)]
    assert partitions(server, dsn) == ["usage_2026_09", "usage_2026_10", "usage_2026_11", "usage_2026_12"]


async def test_exporters_wait_for_each_other_where_they_make_tables(server: postgres.Server, dsn: str) -> None:
    """Nobody is told that somebody else was quicker."""
    async with AsyncExitStack() as stack:
        all_ = [await stack.enter_async_context(sink(dsn)) for _ in range(8)]
        await asyncio.gather(*(one.open() for one in all_))
        months = [NOVEMBER + number * 31 * 86_400_000 for number in range(6)]
        for at in months:
            await asyncio.gather(*(one.deliver([row(number, at=at)]) for number, one in enumerate(all_)))
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(48,)]
    assert len(partitions(server, dsn)) == 6


async def test_a_batch_may_hold_a_row_twice(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1), row(1), row(2)])
    assert server.ask(dsn, "SELECT event_id FROM usage ORDER BY 1") == [("request-1",), ("request-2",)]


async def test_a_correction_stands_beside_the_row_that_it_corrects(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1), row(1, id="request-1:correction", status="correction", input_tokens=-3)])
    assert server.ask(dsn, "SELECT sum(input_tokens)::bigint FROM usage") == [(98,)]


# — erased


async def test_erasing_takes_the_name_and_leaves_the_amounts(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1), row(2)])
        await one.deliver([row(1, entry="9-9", user=ERASED, input_tokens=0)])
    found = server.ask(dsn, "SELECT entry, user_id, input_tokens FROM usage ORDER BY event_id")
    assert found == [(f"{NOON}-1", "erased", 101), (f"{NOON}-2", "u_00112233445566778899", 102)]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("erased_first", [True, False])
async def test_an_old_delivery_does_not_bring_an_erased_name_back(
    server: postgres.Server, dsn: str, together: bool, erased_first: bool
) -> None:
    old, new = row(1), row(1, entry="9-9", user=ERASED)
    rows = [new, old] if erased_first else [old, new]
    async with sink(dsn) as one:
        for batch in [rows] if together else [[rows[0]], [rows[1]]]:
            await one.deliver(batch)
        await one.deliver([old])
    assert server.ask(dsn, "SELECT user_id FROM usage") == [("erased",)]


async def test_no_other_change_of_a_row_is_taken(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        await one.deliver([row(1, user="u_another", input_tokens=9)])
    assert server.ask(dsn, "SELECT user_id, input_tokens FROM usage") == [("u_00112233445566778899", 101)]


# — months


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/St_Johns"])
async def test_a_row_is_in_the_month_of_utc_whatever_the_time_zone_of_the_server_is(
    server: postgres.Server, dsn: str, zone: str
) -> None:
    server.ask(dsn, f"ALTER DATABASE {dsn.partition('@/')[2].partition('?')[0]} SET timezone = '{zone}'")
    assert server.ask(dsn, "SHOW timezone") == [(zone,)]
    year = 1_798_761_600_000  # 2027-01-01T00:00:00Z
    edges = [NOVEMBER - 1, NOVEMBER, NOVEMBER + 1, year - 1, year]
    async with sink(dsn) as one:
        await one.deliver([row(number, at=at) for number, at in enumerate(edges)])
    found = server.ask(dsn, "SELECT tableoid::regclass::text, written_at FROM usage ORDER BY written_at")
    assert [(name, round(at.timestamp() * 1000)) for name, at in found] == [
        ("usage_2026_10", NOVEMBER - 1),
        ("usage_2026_11", NOVEMBER),
        ("usage_2026_11", NOVEMBER + 1),
        ("usage_2026_12", year - 1),
        ("usage_2027_01", year),
    ]


async def test_a_month_that_was_dropped_comes_back_when_a_row_of_it_does(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1), row(2, at=NOVEMBER - 1)])
        server.ask(dsn, "DROP TABLE usage_2026_10")
        await one.deliver([row(3), row(4, at=NOVEMBER - 2)])
    assert server.ask(dsn, "SELECT event_id FROM usage ORDER BY 1") == [("request-1",), ("request-3",), ("request-4",)]


async def test_a_month_that_was_detached_is_not_attached_again(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        server.ask(dsn, "ALTER TABLE usage DETACH PARTITION usage_2026_11")
        with pytest.raises(Unavailable, match="table usage: the partition of a month is there, but not attached"):
            await one.deliver([row(2)])
    assert server.ask(dsn, "SELECT event_id FROM usage_2026_11") == [("request-1",)]


async def test_a_month_begins_while_a_long_report_reads_the_table(server: postgres.Server, dsn: str) -> None:
    """Locks of readers would be waited for by CREATE TABLE … PARTITION OF."""
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        async with transaction(dsn, "SELECT count(*) FROM usage"):
            await asyncio.wait_for(one.deliver([row(2, at=NOVEMBER - 1)]), 5)
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(2,)]


async def test_a_table_that_somebody_has_made_without_partitions_is_good_enough(
    server: postgres.Server, dsn: str
) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
    server.ask(dsn, "CREATE SCHEMA metering")
    server.ask(dsn, 'CREATE TABLE metering."order" (LIKE usage, more text DEFAULT 5, UNIQUE (event_id, written_at))')
    async with sink(dsn, "metering.order") as one:
        await one.deliver([row(1), row(2)])
        await one.deliver([row(1), row(3)])
    found = server.ask(dsn, 'SELECT event_id, more FROM metering."order" ORDER BY 1')
    assert found == [("request-1", "5"), ("request-2", "5"), ("request-3", "5")]


async def test_a_reserved_word_in_a_schema_may_be_the_table(server: postgres.Server, dsn: str) -> None:
    server.ask(dsn, "CREATE SCHEMA metering")
    async with sink(dsn, "metering.user") as one:
        await one.deliver([row(1), row(2, at=NOVEMBER - 1)])
    assert partitions(server, dsn, 'metering."user"') == ["metering.user_2026_10", "metering.user_2026_11"]


# — what goes wrong


async def test_a_server_that_is_killed_is_gone_on_with_and_nothing_is_twice(server: postgres.Server, dsn: str) -> None:
    rows = [row(number, at=NOON + number) for number in range(4000)]
    async with sink(dsn) as one:
        await one.open()
        task = asyncio.ensure_future(each_of(one, rows, 50))
        for batches in (5, 20, 40):
            while server.ask(dsn, "SELECT count(*) < %s FROM usage", 50 * batches)[0][0]:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        await task
    assert server.ask(dsn, "SELECT count(*), count(DISTINCT event_id) FROM usage") == [(4000, 4000)]


async def test_what_was_delivered_survives_a_kill_even_where_the_database_commits_late() -> None:
    if not postgres.installed():
        pytest.skip(postgres.LACKING)
    with postgres.postgres(fsync="on", synchronous_commit="off", wal_writer_delay="10s") as server:
        dsn = server.database()
        async with sink(dsn) as one:
            await one.deliver([row(1)])
            server.kill()
            server.start()
        assert server.ask(dsn, "SELECT event_id FROM usage") == [("request-1",)]


async def test_a_server_that_is_away_is_unavailable_until_it_is_back(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        server.kill()
        try:
            with pytest.raises(Unavailable) as open_error:
                await one.open()
            with pytest.raises(Unavailable) as error:
                await one.deliver([row(1)])
        finally:
            server.start()
        await one.deliver([row(1)])
    assert {str(open_error.value), str(error.value)} <= {
        "table usage: Connection refused",
        "table usage: No such file or directory",
    }
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(1,)]


async def test_a_connection_that_the_server_ends_is_unavailable_once(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        server.ask(
            dsn, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'model-gateway'"
        )
        with pytest.raises(Unavailable, match="table usage: AdminShutdown"):
            await one.deliver([row(2)])
        await one.deliver([row(2)])
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(2,)]


async def test_a_lock_that_is_not_given_back_is_unavailable_and_the_rest_goes_on(
    server: postgres.Server, dsn: str
) -> None:
    async with sink(dsn, timeout=0.5) as one:
        await one.deliver([row(1)])
        async with transaction(dsn, "LOCK TABLE usage"):
            with pytest.raises(Unavailable, match="table usage: no answer in time"):
                await one.deliver([row(2)])
        await one.deliver([row(2)])
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(2,)]


async def test_a_delivery_that_is_cancelled_leaves_a_sink_that_goes_on(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        async with transaction(dsn, "LOCK TABLE usage"):
            task = asyncio.ensure_future(one.deliver([row(2)]))
            while not server.ask(dsn, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await one.deliver([row(3)])
    assert server.ask(dsn, "SELECT event_id FROM usage ORDER BY 1") == [("request-1",), ("request-3",)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cost_microusd": 2**63}, r"table usage: NumericValueOutOfRange \(22003\)"),
        ({"team": "a\0b"}, "table usage: DataError"),
        ({"ended_ms": 10**18}, "column ended_at: a time that no calendar holds"),
        ({"http_status": None}, r"table usage: NotNullViolation \(23502\) of http_status"),
    ],
)
async def test_a_row_that_cannot_be_a_row_there_is_rejected_and_none_of_its_batch_is_there(
    server: postgres.Server, dsn: str, given: dict[str, Any], told: str
) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        with pytest.raises(Rejected, match=told) as error:
            await one.deliver([row(2), row(3, user="a name to keep", **given)])
        await one.deliver([row(4)])
    assert "a name to keep" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert server.ask(dsn, "SELECT event_id FROM usage ORDER BY 1") == [("request-1",), ("request-4",)]


async def test_a_constraint_that_somebody_added_rejects_rows_by_its_name(server: postgres.Server, dsn: str) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        server.ask(dsn, "ALTER TABLE usage ADD CONSTRAINT cheap CHECK (cost_microusd < 100)")
        with pytest.raises(Rejected, match=r"table usage: CheckViolation \(23514\) of cheap"):
            await one.deliver([row(99)])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("ALTER TABLE usage RENAME COLUMN pool TO pools", r"UndefinedColumn \(42703\)"),
        ("REVOKE INSERT ON usage FROM writer", r"InsufficientPrivilege \(42501\)"),
        ("ALTER TABLE usage DROP CONSTRAINT usage_pkey", r"InvalidColumnReference \(42P10\)"),
    ],
)
async def test_what_a_person_can_mend_there_buries_nothing(
    server: postgres.Server, dsn: str, change: str, told: str
) -> None:
    async with sink(dsn) as one:
        await one.deliver([row(1)])
    name = dsn.partition("@/")[2].partition("?")[0]
    server.ask(dsn, f"CREATE ROLE {name} LOGIN")
    server.ask(dsn, f"GRANT SELECT, INSERT, UPDATE ON usage TO {name}")
    async with sink(dsn.replace("gateway:", f"{name}:")) as one:
        await one.deliver([row(2)])
        server.ask(dsn, change.replace("writer", name))
        with pytest.raises(Unavailable, match=f"^table usage: {told}$"):
            await one.deliver([row(3)])
    assert server.ask(dsn, "SELECT count(*) FROM usage") == [(2,)]


async def test_a_disk_that_is_full_is_unavailable(server: postgres.Server, dsn: str) -> None:
    """A trigger says so, with the server's own word."""
    async with sink(dsn) as one:
        await one.deliver([row(1)])
        server.ask(dsn, "CREATE FUNCTION full_() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE disk_full; END $$")
        server.ask(dsn, "CREATE TRIGGER full_ BEFORE INSERT ON usage FOR EACH ROW EXECUTE FUNCTION full_()")
        with pytest.raises(Unavailable, match=r"table usage: DiskFull \(53100\)"):
            await one.deliver([row(2)])


# — what is asked for


@pytest.mark.parametrize("table", ["", "Usage", "usage; DROP TABLE x", 'a"b', "a.b.c", ".usage", "1st", "u" * 56, "é"])
async def test_a_table_that_has_no_plain_name_is_refused(table: str) -> None:
    with pytest.raises(ValueError, match=r"is not a name, expected for example usage or metering\.usage"):
        Postgres("postgresql:///x", table)


async def test_the_longest_name_of_a_table_has_partitions(server: postgres.Server, dsn: str) -> None:
    name = "u" * 55
    async with sink(dsn, name) as one:
        await one.deliver([row(1)])
    assert partitions(server, dsn, name) == [f"{name}_2026_11"]


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://gateway:{postgres.PASSWORD}@[::1/x",
        f"host=127.0.0.1 password={postgres.PASSWORD} nonsense",
        f"user=me word={postgres.PASSWORD}",
    ],
)
async def test_a_dsn_that_cannot_be_read_is_refused_without_a_word_of_it(dsn: str) -> None:
    with pytest.raises(ValueError, match="the DSN cannot be read, expected for example") as error:
        Postgres(dsn, "usage")
    assert postgres.PASSWORD not in str(error.value)
    assert error.value.__suppress_context__


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("nowhere.invalid:5432", "could not translate host name"),
        ("%2Fno%2Fsuch%2Ffolder", "No such file or directory"),
    ],
)
async def test_a_place_where_nobody_answers_is_told_without_its_secret(address: str, told: str) -> None:
    async with sink(f"postgresql://gateway:{postgres.PASSWORD}@{address}/x") as one:
        with pytest.raises(Unavailable) as error:
            await one.open()
        assert repr(one) == "<Postgres usage, not connected>"
    assert str(error.value) in (f"table usage: {told}", "table usage: OperationalError")
    assert error.value.__suppress_context__


async def test_a_wrong_database_is_told_without_its_secret(server: postgres.Server) -> None:
    async with sink(server.dsn("missing")) as one:
        with pytest.raises(Unavailable, match=r"^table usage: \w+( \(3D000\))?$"):
            await one.open()

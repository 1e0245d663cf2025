"""A table of PostgreSQL as a sink: a row of the ledger is a row there, once, in a partition of its month in UTC.

What identifies a row is its event and when it was written, which is the same however often it is delivered: what is
there already is left as it is. The one change that travels is erasure: the row that replaces an erased one has the same
identity, and takes the user's name away from what is there.

The table may have been made by somebody else, with more columns, other partitions or none, as long as
(event_id, written_at) is unique in it. A partition is made when the server says that it misses one, so that nothing
here has to know which there are. Messages never repeat what the server or libpq say: that may hold values of rows.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import NamedTuple

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from gateway.delivery import Rejected, Row, Unavailable
from gateway.records import ERASED

# `_2026_11` stands behind it in the name of a partition, and a name has at most 63 bytes.
_TABLE = re.compile(r"(?:[a-z_][a-z0-9_]{0,62}\.)?[a-z_][a-z0-9_]{0,54}")
_DEFAULTS = {"application_name": "model-gateway", "connect_timeout": "10", "client_encoding": "utf8"}
# A reader of the table may hold its locks for long, and would be waited for by everybody else behind us.
_MANNERS = sql.SQL(
    "SET LOCAL lock_timeout = '10s'; SET LOCAL statement_timeout = '60s'; SET LOCAL synchronous_commit = on"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Column(NamedTuple):
    name: str
    type: str
    value: Callable[[Row], object]


def _instant(path: str) -> Callable[[Row], object]:
    """Milliseconds since 1970, exactly, as a time in UTC."""
    read = attrgetter(path)

    def value(row: Row) -> datetime | None:
        ms = read(row)
        return None if ms is None else _EPOCH + timedelta(milliseconds=ms)

    return value


_COLUMNS = (
    _Column("event_id", "text", attrgetter("record.id")),
    _Column("written_at", "timestamptz", _instant("written_ms")),
    _Column("entry", "text", attrgetter("entry")),
    _Column("status", "text", attrgetter("record.status")),
    _Column("organisation", "text", attrgetter("record.organisation")),
    _Column("team", "text", attrgetter("record.team")),
    _Column("key", "text", attrgetter("record.key")),
    _Column("user_id", "text", attrgetter("record.user")),
    _Column("model", "text", attrgetter("record.model")),
    _Column("served_model", "text", attrgetter("record.served_model")),
    _Column("pool", "text", attrgetter("record.pool")),
    _Column("upstream", "text", attrgetter("record.upstream")),
    _Column("endpoint", "text", attrgetter("record.endpoint")),
    _Column("stream", "boolean", attrgetter("record.stream")),
    _Column("http_status", "bigint", attrgetter("record.http_status")),
    _Column("ended", "text", attrgetter("record.ended")),
    _Column("attempt", "bigint", attrgetter("record.attempt")),
    _Column("requests", "bigint", attrgetter("record.requests")),
    _Column("input_tokens", "bigint", attrgetter("record.input_tokens")),
    _Column("cached_tokens", "bigint", attrgetter("record.cached_tokens")),
    _Column("output_tokens", "bigint", attrgetter("record.output_tokens")),
    _Column("reasoning_tokens", "bigint", attrgetter("record.reasoning_tokens")),
    _Column("input_source", "text", attrgetter("record.input_source")),
    _Column("output_source", "text", attrgetter("record.output_source")),
    _Column("price_input", "bigint", attrgetter("record.price.input")),  # micro-dollars per million tokens
    _Column("price_cached_input", "bigint", attrgetter("record.price.cached_input")),
    _Column("price_output", "bigint", attrgetter("record.price.output")),
    _Column("price_reasoning", "bigint", attrgetter("record.price.reasoning")),
    _Column("cost_microusd", "bigint", attrgetter("record.cost_microusd")),
    _Column("received_at", "timestamptz", _instant("record.received_ms")),
    _Column("first_byte_at", "timestamptz", _instant("record.first_byte_ms")),
    _Column("ended_at", "timestamptz", _instant("record.ended_ms")),
    _Column("bytes_in", "bigint", attrgetter("record.bytes_in")),
    _Column("bytes_out", "bigint", attrgetter("record.bytes_out")),
)
_MAY_BE_NULL = {"user_id", "served_model", "upstream", "first_byte_at"}


class Postgres:
    """Rows in `table` (or `schema.table`) of the database that `dsn` names, by one connection. A batch is a
    transaction; `timeout` is in seconds, of one batch. Raises ValueError for a DSN or a table that cannot be one."""

    def __init__(self, dsn: str, table: str, *, timeout: float = 60.0) -> None:
        if not _TABLE.fullmatch(table):
            raise ValueError(f"table {table!r} is not a name, expected for example usage or metering.usage")
        try:
            given = conninfo_to_dict(dsn)
        except psycopg.ProgrammingError:  # its text repeats the DSN, and with it the password
            raise ValueError(
                "the DSN cannot be read, expected for example postgresql://user:password@host/database"
            ) from None
        self._dsn = make_conninfo(dsn, **{name: value for name, value in _DEFAULTS.items() if name not in given})
        self._table = table
        self._timeout = timeout
        self._insert = _insert(_identifier(table))
        self._connection: psycopg.AsyncConnection | None = None

    def __repr__(self) -> str:
        return f"<Postgres {self._table}, {'connected' if self._connection else 'not connected'}>"

    async def open(self) -> None:
        """The server answers, and the table is there."""
        async with self._transaction():
            pass

    async def deliver(self, rows: Sequence[Row]) -> None:
        """The rows are committed when this returns."""
        rows = _distinct(rows)
        values = [_values(column, rows) for column in _COLUMNS]
        if not await self._inserted(values):
            await self._add_months({_month(row) for row in rows})
            if not await self._inserted(values):
                raise Unavailable(f"table {self._table}: the partition of a month is there, but not attached")

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _inserted(self, values: list[list[object]]) -> bool:
        """False: a partition is missing, and nothing was inserted."""
        try:
            async with self._transaction() as connection:
                try:
                    await connection.execute(self._insert, values)
                except (psycopg.DataError, psycopg.IntegrityError) as error:
                    raise _Refused(error) from None
        except _Refused as refused:
            if refused.misses_a_partition:
                return False
            raise Rejected(f"table {self._table}: {refused}") from None
        return True

    async def _add_months(self, months: set[tuple[int, int]]) -> None:
        table = _identifier(self._table)
        async with self._transaction() as connection:
            await self._alone(connection)
            for year, month in sorted(months):
                name = f"{self._table}_{year:04}_{month:02}"
                if not await _exists(connection, name):
                    # ATTACH lets others read and write meanwhile; CREATE … PARTITION OF does not.
                    partition = _identifier(name)
                    await connection.execute(_LIKE.format(partition=partition, table=table))
                    bounds = {"first": _first_of(year, month), "end": _first_of(year + month // 12, month % 12 + 1)}
                    await connection.execute(_ATTACH.format(partition=partition, table=table, **bounds))

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[psycopg.AsyncConnection]:
        """A transaction on the connection; after an error the next one is on a new connection, and the table is looked
        for again. Whatever else is raised in it rolls it back and no more."""
        try:
            async with asyncio.timeout(self._timeout):
                connection = self._connection = self._connection or await self._connect()
                async with connection.transaction():
                    await connection.execute(_MANNERS)
                    yield connection
        except (psycopg.Error, TimeoutError) as error:
            await self.aclose()
            raise Unavailable(f"table {self._table}: {_told(error)}") from None

    async def _connect(self) -> psycopg.AsyncConnection:
        # Nothing is prepared, so that a pooler between may give every transaction another connection.
        connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True, prepare_threshold=None)
        try:
            async with connection.transaction():
                await self._alone(connection)
                if not await _exists(connection, self._table):
                    await connection.execute(_create(_identifier(self._table)))
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _alone(self, connection: psycopg.AsyncConnection) -> None:
        """Until the transaction ends no other exporter makes tables for the same one."""
        await connection.execute(_MANNERS)
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [self._table])


# — statements

_LIKE = sql.SQL("CREATE TABLE {partition} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
_ATTACH = sql.SQL("ALTER TABLE {table} ATTACH PARTITION {partition} FOR VALUES FROM ({first}) TO ({end})")


def _identifier(name: str) -> sql.Identifier:
    return sql.Identifier(*name.split("."))


def _create(table: sql.Identifier) -> sql.Composed:
    columns = [
        sql.SQL("{} {}").format(
            sql.Identifier(column.name),
            sql.SQL(column.type if column.name in _MAY_BE_NULL else f"{column.type} NOT NULL"),
        )
        for column in _COLUMNS
    ]
    return sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY (event_id, written_at)) PARTITION BY RANGE (written_at)").format(
        table, sql.SQL(", ").join(columns)
    )


def _insert(table: sql.Identifier) -> sql.Composed:
    """Takes an array a column."""
    return sql.SQL(
        "INSERT INTO {table} AS kept ({names}) SELECT * FROM unnest({arrays}) "
        "ON CONFLICT (event_id, written_at) DO UPDATE SET user_id = excluded.user_id "
        "WHERE excluded.user_id = {erased} AND kept.user_id IS DISTINCT FROM {erased}"
    ).format(
        table=table,
        names=sql.SQL(", ").join([sql.Identifier(column.name) for column in _COLUMNS]),
        arrays=sql.SQL(", ").join([sql.SQL(f"%s::{column.type}[]") for column in _COLUMNS]),
        erased=sql.Literal(ERASED),
    )


def _first_of(year: int, month: int) -> sql.Literal:
    """Midnight in UTC, whatever the time zone of the session is."""
    return sql.Literal(f"{year:04}-{month:02}-01 00:00:00+00")


async def _exists(connection: psycopg.AsyncConnection, table: str) -> bool:
    cursor = await connection.execute("SELECT to_regclass(%s) IS NOT NULL", [_identifier(table).as_string()])
    found = await cursor.fetchone()
    return found is not None and bool(found[0])


# — rows


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Each event once: one statement changes a row only once. The one that is erased wins. In an order that all
    exporters keep, so that two that deliver the same rows do not lock each other out."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        same = (row.record.id, row.written_ms)
        if same not in found or row.record.user == ERASED:
            found[same] = row
    return [found[same] for same in sorted(found)]


def _values(column: _Column, rows: Sequence[Row]) -> list[object]:
    try:
        return [column.value(row) for row in rows]
    except OverflowError:
        raise Rejected(f"column {column.name}: a time that no calendar holds") from None


def _month(row: Row) -> tuple[int, int]:
    written = _EPOCH + timedelta(milliseconds=row.written_ms)
    return written.year, written.month


# — errors


class _Refused(Exception):
    """The server takes the values for what cannot be in the table."""

    def __init__(self, error: psycopg.DataError | psycopg.IntegrityError) -> None:
        super().__init__(_told(error))
        # A constraint that somebody has added has a name.
        self.misses_a_partition = isinstance(error, errors.CheckViolation) and error.diag.constraint_name is None


# What libpq says of a connection that failed is told by these words only.
_SAYINGS = (
    "Connection refused",
    "No such file or directory",
    "could not translate host name",
    "timeout expired",
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "the database system is starting up",
    "the database system is shutting down",
    "the database system is in recovery mode",
    "too many clients",
    "certificate verify failed",
    "does not support SSL",
    "server closed the connection unexpectedly",
)


def _told(error: BaseException) -> str:
    """What went wrong, by the names of errors, columns and constraints and never by their values."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return next((saying for saying in _SAYINGS if saying in str(error)), type(error).__name__)
    of = error.diag.column_name or error.diag.constraint_name
    return f"{type(error).__name__} ({error.sqlstate})" + (f" of {of}" if of else "")

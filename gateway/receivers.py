"""The sink that an export of the policies names, with the secret that it asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from gateway.credentials import secret_at
from gateway.delivery import Row, Sink, Unavailable
from gateway.sinks import CloudEvents, JsonLines

if TYPE_CHECKING:
    from gateway.language import CloudEventsExport, Export, JsonLinesExport, PostgresExport


def sink_of(policy: Export, environment: Mapping[str, str]) -> Sink:
    """The sink that an export of the policies names; raises ValueError with what it lacks."""
    make: Callable[..., Sink] = _MAKERS[policy.to]
    return make(policy, environment)


def _json_lines(policy: JsonLinesExport, _: Mapping[str, str]) -> Sink:
    return JsonLines(policy.folder, policy.rotate, policy.every)


def _cloud_events(policy: CloudEventsExport, environment: Mapping[str, str]) -> Sink:
    def make(token: str | None) -> Sink:
        return CloudEvents(policy.url, token, policy.source, policy.type)

    return make(None) if policy.token is None else _with_secret(make, policy.token, environment, "a token")


def _postgres(policy: PostgresExport, environment: Mapping[str, str]) -> Sink:
    try:
        from gateway.postgres import Postgres  # only where it is asked for: psycopg is an extra
    except ImportError as error:
        raise ValueError(
            "psycopg is not installed: install psycopg[binary] (the extra `postgres` of this package)"
        ) from error
    expected = "for example postgresql://user:password@host/database"
    return _with_secret(lambda dsn: Postgres(dsn, policy.table), policy.dsn, environment, expected)


def _with_secret(make: Callable[[str], Sink], source: str, environment: Mapping[str, str], expected: str) -> Sink:
    """A sink with the secret of a variable, or with the one that a file holds at the time."""
    if source.startswith("/"):
        return Renewed(make, source)
    if not (secret := secret_at(source, environment)):
        raise ValueError(f"the variable {source} is not set, expected {expected}")
    return make(secret)


class Renewed:
    """A sink with a secret in a file; one with the new secret takes its place when that has changed. Raises ValueError
    for a file that cannot be read, or that holds none."""

    def __init__(self, make: Callable[[str], Sink], file: str) -> None:
        self._make = make
        self._file = file
        try:
            self._secret = secret_at(file, {})
            self._sink = make(self._secret)
        except OSError as unread:
            raise ValueError(f"{file} cannot be read ({unread.strerror}), expected a secret") from unread
        except ValueError as wrong:
            raise ValueError(f"{file}: {wrong}") from None

    def __repr__(self) -> str:
        return f"{self._sink!r} by {self._file}"

    async def open(self) -> None:
        """As that sink does, with the secret of now."""
        await self._renew()
        await self._sink.open()

    async def deliver(self, rows: Sequence[Row]) -> None:
        """As that sink does, with the secret of now."""
        if await self._renew():
            await self._sink.open()
        await self._sink.deliver(rows)

    async def aclose(self) -> None:
        """Close that sink."""
        await self._sink.aclose()

    async def _renew(self) -> bool:
        """Whether there is another sink now."""
        try:
            secret = await asyncio.to_thread(secret_at, self._file, {})
            if secret == self._secret:
                return False
            sink = self._make(secret)
        except (OSError, ValueError) as wrong:
            why = wrong.strerror if isinstance(wrong, OSError) else wrong
            raise Unavailable(f"{self._file}: {why}") from None
        await self._sink.aclose()
        self._secret, self._sink = secret, sink
        return True


_MAKERS: Mapping[str, Callable[..., Sink]] = {
    "jsonl": _json_lines,
    "postgres": _postgres,
    "cloudevents": _cloud_events,
}

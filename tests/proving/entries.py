"""A ledger for a test, written as settlement writes it: the entries, and the sums of their hours, days and months."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis

from gateway.records import COUNTERS, ORGANISATIONS, Grain, UsageRecord, counted, group_of, ledger_stream, sums_key


def ms(text: str) -> int:
    """A moment in UTC, as milliseconds since 1970."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def numbers(at_ms: int) -> dict[Grain, int]:
    """The hour, the day and the month that a moment is in, since 1970 in UTC."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    hour = at_ms // 3_600_000
    return {"hour": hour, "day": hour // 24, "month": (at.year - 1970) * 12 + at.month - 1}


def write(client: redis.Redis, records: Iterable[UsageRecord], at_ms: int | None = None) -> list[str]:
    """Write rows at a moment (now, by the store's clock), and add them to the sums; the ids of their entries."""
    entries = []
    for record in records:
        client.sadd(ORGANISATIONS, record.organisation)
        fields: dict[Any, Any] = {"row": msgspec.json.encode(record)}
        entry = client.xadd(ledger_stream(record.organisation), fields, id="*" if at_ms is None else f"{at_ms}-*")
        assert isinstance(entry, bytes)
        entries.append(entry.decode())
        for grain, number in numbers(int(entry.partition(b"-")[0])).items():
            _add(client, sums_key(record.organisation, grain, number), record)
    return entries


def _add(client: redis.Redis, key: str, record: UsageRecord) -> None:
    held = client.hget(key, group_of(record))
    before = msgspec.msgpack.decode(held) if isinstance(held, bytes) else [0] * len(COUNTERS)
    after = [old + by for old, by in zip(before, counted(record), strict=True)]
    client.hset(key, group_of(record), msgspec.msgpack.encode(after))

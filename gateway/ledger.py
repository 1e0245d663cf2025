"""The ledger of an organisation: its rows, and the hourly sums that are kept beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec

from gateway.admission import ledger_stream
from gateway.store import Store
from gateway.usage import UsageRecord

Dimension = Literal["organisation", "team", "key", "user", "model"]
DIMENSIONS: tuple[Dimension, ...] = ("organisation", "team", "key", "user", "model")
COUNTERS = ("requests", "input_tokens", "cached_tokens", "output_tokens", "cost_microusd")


@dataclass(slots=True)
class Sum:
    """What a group used; costs are micro-dollars."""

    group: tuple[str, ...]
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def public(self, by: Sequence[Dimension]) -> dict[str, object]:
        return {**dict(zip(by, self.group, strict=True)), **self.counters}


async def sums(store: Store, by: Sequence[Dimension], since: float = 0.0) -> list[Sum]:
    """What was used since the hour of `since` (seconds since 1970), grouped by `by`, the most expensive first.

    Raises StoreUnavailable.
    """
    groups: dict[tuple[str, ...], Sum] = {}
    first = int(since // 3600)
    for key in await store.call(lambda: _keys(store, "{*}:usage:*")):
        organisation, hour = _sums_key(key)
        if hour < first:
            continue
        for name, value in (await store.call(partial(store.client.hgetall, key))).items():
            text, _, counter = name.decode().rpartition(":")
            values = dict(zip(DIMENSIONS, (organisation, *msgspec.json.decode(text)), strict=True))
            group = tuple(values[dimension] for dimension in by)
            groups.setdefault(group, Sum(group)).counters[counter] += int(value)
    return sorted(groups.values(), key=lambda s: (-s.counters["cost_microusd"], -s.counters["output_tokens"], s.group))


async def rows(store: Store, organisation: str) -> AsyncIterator[tuple[int, UsageRecord]]:
    """Every row of an organisation's ledger with its time in milliseconds since 1970, oldest first.

    Raises StoreUnavailable.
    """
    after = b"-"
    some = partial(store.client.xrange, ledger_stream(organisation), count=1000)
    while entries := await store.call(partial(some, min=after)):
        for entry, fields in entries:
            yield int(entry.partition(b"-")[0]), _decode(fields[b"row"])
        after = b"(" + entries[-1][0]


def fold(records: Iterable[UsageRecord]) -> dict[tuple[str, ...], dict[str, int]]:
    """The sums that rows make, by organisation, team, key, user and model: what the sums must be equal to."""
    totals: dict[tuple[str, ...], dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTERS, 0))
    for r in records:
        total = totals[r.organisation, r.team, r.key, r.user or "", r.model]
        total["requests"] += r.source != "none"
        for counter in COUNTERS[1:]:
            total[counter] += getattr(r, counter)
    return dict(totals)


async def _keys(store: Store, pattern: str) -> list[bytes]:
    """The keys that match, each once: a scan may say one twice."""
    return list(dict.fromkeys([key async for key in store.client.scan_iter(match=pattern, count=1000)]))


_decode = msgspec.json.Decoder(UsageRecord).decode


def _sums_key(key: bytes) -> tuple[str, int]:
    """`{organisation}:usage:<hour>`."""
    tag, _, hour = key.decode().rpartition(":usage:")
    return tag[1:-1], int(hour)

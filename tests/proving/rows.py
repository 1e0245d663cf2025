"""Rows of the ledger for the tests of what takes them."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.delivery import Row
from gateway.records import Price, UsageRecord

NOON = 1_795_348_800_000  # 2026-11-22T12:00:00Z, in ms
PRICE = Price(input=150_000, cached_input=15_000, output=600_000, reasoning=600_000)


def record(number: int = 0, **given: Any) -> UsageRecord:
    """One of many, all different."""
    values: dict[str, Any] = {
        "id": f"request-{number}",
        "status": "settled",
        "organisation": "acme",
        "team": "research",
        "key": "key-1",
        "user": "u_00112233445566778899",
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
        "input_tokens": 100 + number,
        "cached_tokens": 10,
        "output_tokens": 20 + number,
        "reasoning_tokens": 5,
        "input_source": "upstream",
        "output_source": "counted",
        "price": PRICE,
        "cost_microusd": 27 + number,
        "received_ms": NOON - 2500,
        "first_byte_ms": NOON - 2000,
        "ended_ms": NOON - 1,
        "bytes_in": 1000,
        "bytes_out": 2000 + number,
    }
    return UsageRecord(**{**values, **given})


def row(number: int = 0, *, at: int = NOON, entry: str | None = None, **given: Any) -> Row:
    """One that was written at `at`."""
    kept = record(number, **given)
    return Row(entry or f"{at}-{number}", at, kept, msgspec.json.encode(kept))

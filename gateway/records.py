"""The row of the ledger, and how its sums are kept: what settlement writes, and reports, exports and proofs read.

A request has one row, of status `settled` or `interrupted`. Where the worker of an interrupted one was not dead but
paused, a row of status `correction` holds the difference to what was used after all.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Literal, get_args

import msgspec

Source = Literal["upstream", "counted", "reserved", "none"]
Status = Literal["settled", "interrupted", "correction"]
EndedBy = Literal["complete", "client", "upstream", "timeout", "gateway"]
Dimension = Literal["organisation", "team", "key", "user", "model", "pool"]
Grain = Literal["hour", "day", "month"]

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
GRAINS: tuple[Grain, ...] = get_args(Grain)
# What sums are made of, in the order in which the store keeps them.
COUNTERS = ("requests", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_microusd")
ERASED = "erased"  # what stands in the place of a user who is forgotten


class Price(msgspec.Struct, frozen=True):
    """Micro-dollars per million tokens. Cached tokens are among the input's, reasoning tokens among the output's."""

    input: int = 0
    cached_input: int = 0
    output: int = 0
    reasoning: int = 0


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row. Its time is the store's own: the entry of the stream that holds it says when it was written."""

    id: str  # of the event: the request's; a correction's has `:correction` behind it
    status: Status
    organisation: str
    team: str
    key: str
    user: str | None
    model: str  # as asked for, by the policies' name: what limits and prices go by
    served_model: str | None  # that answered in its place, or itself; None: none did
    pool: str
    upstream: str | None
    endpoint: str
    stream: bool
    http_status: int
    ended: EndedBy
    attempt: int  # which one answered; 0: none did
    requests: int  # 1 for one that was answered; 0 for one that was not, and in corrections where it was counted before
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    input_source: Source
    output_source: Source
    price: Price
    cost_microusd: int
    received_ms: int  # since 1970, by the gateway's clock, as the next two
    first_byte_ms: int | None
    ended_ms: int
    bytes_in: int
    bytes_out: int


def group_of(record: UsageRecord) -> str:
    """The field of a row in the sums of its organisation: a JSON array of what they are kept by."""
    return msgspec.json.encode([record.team, record.key, record.user or "", record.model, record.pool]).decode()


def ledger_stream(organisation: str) -> str:
    """The stream of an organisation's rows: entries with one field, `row`, of JSON; an entry that replaces an erased
    one has a second, `at`, the time in ms since 1970 that the first one had."""
    return f"{{{organisation}}}:usage"


# What the sums grow by with a row, in the order of COUNTERS.
counted: Callable[[UsageRecord], tuple[int, ...]] = attrgetter(*COUNTERS)


def dead_letters(organisation: str, export: str) -> str:
    """The stream of rows that an export could not deliver: fields `row`, `at` if it had one, `error`, `entry`."""
    return f"{ledger_stream(organisation)}:dead:{export}"


def sums_key(organisation: str, grain: Grain, number: int) -> str:
    """The sums of one hour, day or month since 1970 in UTC: a hash of groups, each with a MessagePack array of
    COUNTERS. A row is in the sums of the instant at which the store wrote it, by the id of its entry."""
    return f"{ledger_stream(organisation)}:{grain}:{number}"


def rollup_key(organisation: str, of: str) -> str:
    """What sums that have ended come to by some dimensions, see rollups.py."""
    return f"{ledger_stream(organisation)}:rollup:{of}"


def erasures(organisation: str) -> str:
    """How often sums were merged because a user was erased: a rollup is of one such number."""
    return f"{ledger_stream(organisation)}:erasures"


ORGANISATIONS = "{gateway}:organisations"  # the set of all that ever had a reservation

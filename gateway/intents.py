"""What is written down of a request before it is served, and the row that it makes where its worker has died.

The reservation in the store holds the intent, and renewals put the progress beside it; of what is served while the
store is away, the worker's spool holds both. Either way a row can be written without the worker.
"""

from __future__ import annotations

from operator import sub

import msgspec

from gateway.counts import Words
from gateway.language import Count
from gateway.records import COUNTERS, Price, Source, UsageRecord, counted
from gateway.terms import used
from gateway.usage import Progress, Usage

# Of a request of which nothing is known but that it was to be served: a backend may have read it.
_READ: Source = "reserved"


# Of each limit, the key of its count, what it counts, and the words by which settle.lua corrects it, as if all that was
# reserved had been used.
Charges = tuple[tuple[str, Count, Words], ...]


class Intent(msgspec.Struct, array_like=True, frozen=True):
    """A request as it was admitted: enough to settle it."""

    team: str
    key: str
    user: str | None
    model: str
    pool: str
    endpoint: str
    stream: bool
    price: Price
    received_ms: int
    bytes_in: int
    input_estimate: int
    charges: Charges = ()

    def usage(self, progress: Progress | None) -> Usage:
        """What it used as far as is known."""
        if progress is None:
            return Usage(self.input_estimate, 0, input_source=_READ, output_source=_READ)
        return Usage(
            progress.input,
            progress.output,
            progress.cached,
            progress.reasoning,
            progress.input_source,
            progress.output_source,
        )

    def corrections(self, usage: Usage) -> list[tuple[str, Words]]:
        """For each limit, the key of its count and the words that correct it to what was used."""
        corrected = []
        for key, count, (kind, _, amount, *rest) in self.charges:
            assert isinstance(amount, int)
            corrected.append((key, (kind, used(count, usage, self.price) - amount, amount, *rest)))
        return corrected


_intents = msgspec.json.Decoder(Intent)
_progresses = msgspec.json.Decoder(Progress)


def read_intent(text: bytes) -> Intent:
    """Raises msgspec.DecodeError."""
    intent = _intents.decode(text)
    for key, _, words in intent.charges:
        if len(words) < 4 or not isinstance(words[2], int):
            raise msgspec.ValidationError(f"the charge of {key} has other words than a correction")
    return intent


def read_progress(text: bytes) -> Progress | None:
    """Raises msgspec.DecodeError."""
    return _progresses.decode(text) if text else None


def interrupted(
    request_id: str, organisation: str, intent: Intent, progress: Progress | None, *, ended_ms: int
) -> UsageRecord:
    """The row of a request whose worker has died: what is known of it, and no more than that."""
    usage = intent.usage(progress)
    return UsageRecord(
        id=request_id,
        status="interrupted",
        organisation=organisation,
        team=intent.team,
        key=intent.key,
        user=intent.user,
        model=intent.model,
        served_model=None if progress is None else progress.served_model,
        pool=intent.pool,
        upstream=None if progress is None else progress.upstream,
        endpoint=intent.endpoint,
        stream=intent.stream,
        http_status=0 if progress is None else progress.http_status,
        ended="gateway",
        attempt=0 if progress is None else progress.attempt,
        requests=int(usage.answered),
        input_tokens=usage.input,
        cached_tokens=usage.cached,
        output_tokens=usage.output,
        reasoning_tokens=usage.reasoning,
        input_source=usage.input_source,
        output_source=usage.output_source,
        price=intent.price,
        cost_microusd=usage.cost(intent.price),
        received_ms=intent.received_ms,
        first_byte_ms=None if progress is None else progress.first_byte_ms,
        ended_ms=ended_ms,
        bytes_in=intent.bytes_in,
        bytes_out=0 if progress is None else progress.bytes_out,
    )


def correction_id(request_id: str) -> str:
    return f"{request_id}:correction"


def correction(late: UsageRecord, charged: UsageRecord) -> UsageRecord:
    """The difference between what a request used after all, and what was charged when its worker seemed dead."""
    differences = dict(zip(COUNTERS, map(sub, counted(late), counted(charged)), strict=True))
    return msgspec.structs.replace(late, id=correction_id(late.id), status="correction", **differences)

"""What ends a request: what settle.lua is told of it, how that stands in a spool, and what dead workers have left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec
import structlog

from gateway.counts import Words
from gateway.intents import interrupted, read_intent, read_progress
from gateway.language import Count
from gateway.records import UsageRecord, counted, group_of, ledger_stream
from gateway.store import Item
from gateway.terms import Charge

# The flags of a request, see settle.lua.
UNRESERVED, DEAD, SWEPT = 1, 2, 4

_log = structlog.get_logger("gateway.admission")


class End(NamedTuple):
    """What ends a request: what the script is told, and the charges that it corrects, with the window of each: none of
    a spool's, of which it is only known what they count."""

    id: str
    item: Item
    organisation: str
    charges: list[tuple[Charge, int]]
    counts: Sequence[Count]
    needed: int  # corrections, the first ones; those after them matter only where the store has forgotten the request

    @property
    def short(self) -> Item:
        """What the script is told where the store knows the request, as it nearly always does."""
        keys, (*most, corrections, flags) = self.item
        assert isinstance(corrections, list)
        if self.needed == len(corrections):
            return self.item
        return keys[: len(keys) - len(corrections) + self.needed], (*most, corrections[: self.needed], flags)

    @property
    def row(self) -> str:
        """Its row, '' for none."""
        return str(self.item[1][1])

    @property
    def corrections(self) -> list[Words]:
        corrections = self.item[1][4]
        assert isinstance(corrections, list)
        return corrections

    @property
    def flags(self) -> int:
        flags = self.item[1][5]
        assert isinstance(flags, int)
        return flags

    def record(self) -> Ended:
        """As it stands in a spool."""
        keys, words = self.item
        return Ended(self.id, self.organisation, list(keys), tuple(words), list(self.counts))  # type: ignore[arg-type]


def end_of(
    request_id: str,
    organisation: str,
    record: UsageRecord | None,
    corrections: Iterable[tuple[str, Words]],
    *,
    charges: list[tuple[Charge, int]] | None = None,
    flags: int = 0,
    needed: int | None = None,
) -> End:
    """The end of a request with its row, or of one that is given up; so many of its corrections are needed, or all."""
    keys = [reservation_key(organisation, request_id), live_key(organisation), ledger_stream(organisation)]
    words = []
    for key, told in corrections:
        keys.append(key)
        words.append(told)
    row, field = "", ""
    counters: Words = ()
    if record is not None:
        row, field = msgspec.json.encode(record).decode(), group_of(record)
        counters = counted(record)
    charges = charges or []
    counts = [charge.limit.count for charge, _ in charges]
    item = (keys, (request_id, row, field, counters, words, flags))
    return End(request_id, item, organisation, charges, counts, len(words) if needed is None else needed)


def reservation_key(organisation: str, request_id: str) -> str:
    return f"{{{organisation}}}:request:{request_id}"


def live_key(organisation: str) -> str:
    return f"{{{organisation}}}:live"


# — in a spool


class Begun(msgspec.Struct, array_like=True, tag="intent"):
    id: str
    organisation: str
    intent: str


class Progressed(msgspec.Struct, array_like=True, tag="progress"):
    id: str
    progress: str


class Ended(msgspec.Struct, array_like=True, tag="end"):
    id: str
    organisation: str
    keys: list[str]
    words: tuple[str, str, str, Words, list[Words], int]  # as in end_of
    counts: list[Count]

    def end(self) -> End:
        """Raises msgspec.DecodeError."""
        if row := self.words[1]:
            msgspec.json.decode(row, type=UsageRecord)
        return End(self.id, (self.keys, self.words), self.organisation, [], self.counts, len(self.words[4]))


encode: Callable[[Begun | Progressed | Ended], bytes] = msgspec.msgpack.Encoder().encode
_records = msgspec.msgpack.Decoder(Begun | Progressed | Ended)


def left_in(records: Iterable[bytes]) -> list[End]:
    """What the records of a spool leave to be settled: the end of each request, or what was known of it last."""
    ends: dict[str, End] = {}
    begun: dict[str, Begun] = {}
    progress: dict[str, str] = {}
    for record in records:
        try:
            match _records.decode(record):
                case Ended() as ended:
                    ends[ended.id] = ended.end()
                case Begun() as intent:
                    begun[intent.id] = intent
                case Progressed(name, text):
                    progress[name] = text
        except msgspec.DecodeError as error:
            _log.error("record_unreadable", bytes=len(record), reason=str(error))
    now = time.time_ns() // 1_000_000
    for name, intent in begun.items():
        if name in ends:
            continue
        known = intent.intent.encode(), progress.get(name, "").encode()
        try:
            ends[name] = swept(name, intent.organisation, *known, now, UNRESERVED)
        except msgspec.DecodeError as error:
            _log.error("intent_unreadable", request_id=name, reason=str(error))
    return list(ends.values())


def swept(request_id: str, organisation: str, intent_text: bytes, progress_text: bytes, now_ms: int, how: int) -> End:
    """The end of a request whose worker has died, by what was known of it. Raises msgspec.DecodeError."""
    intent, progress = read_intent(intent_text), read_progress(progress_text)
    row = interrupted(request_id, organisation, intent, progress, ended_ms=now_ms)
    corrections = intent.corrections(intent.usage(progress))
    return end_of(request_id, organisation, row, corrections, flags=DEAD | how)

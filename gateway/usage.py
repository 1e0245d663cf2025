"""What was used: the tail of an answer → Usage → the row of the ledger.

Nothing looks into a stream on its way. The tail keeps the last bytes of it, and counts line feeds (one memchr pass,
0.1 µs a chunk): when the answer has ended, the last `usage` stands in the tail, and where a backend sent none, the
lines say how many events there were.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal, TypeVar

import msgspec

from gateway.policy import Model

T = TypeVar("T")

Source = Literal["upstream", "counted", "none"]

# More than this was not used by one request: what a backend says beyond it is not to break sums and limits.
_CREDIBLE = 10**9

# The last event of a stream, with usage and performance metrics, is below 2 KiB; a JSON answer ends with its usage.
TAIL = 8 * 1024
_SLACK = 2 * 1024  # so that not every chunk lets another one go


class Usage(msgspec.Struct, frozen=True):
    """Tokens, and where the numbers came from: the upstream's own, counted by the gateway, or none."""

    input: int
    output: int
    cached: int = 0
    source: Source = "upstream"

    @property
    def total(self) -> int:
        return self.input + self.output

    def cost(self, model: Model) -> int:
        """Micro-dollars, rounded half up once, at the end."""
        millionths = (
            (self.input - self.cached) * model.input_price
            + self.cached * model.cached_input_price
            + self.output * model.output_price
        )
        return (millionths + 500_000) // 1_000_000


NOTHING = Usage(0, 0, source="none")
REFUSED = Usage(0, 0)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Reported(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    usage: _Reported | None = None


_events = msgspec.json.Decoder(_Event)
_reports = msgspec.json.Decoder(_Reported)


class Tail:
    """The last bytes of an answer. `at_most` bytes are kept, in the chunks in which they came."""

    __slots__ = ("_chunks", "_kept", "length", "lines")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._kept = 0
        self.length = 0
        self.lines = 0

    def add(self, chunk: bytes) -> None:
        self.length += len(chunk)
        self.lines += chunk.count(b"\n")
        self._chunks.append(chunk)
        self._kept += len(chunk)
        if self._kept >= TAIL + _SLACK:
            while self._kept - len(self._chunks[0]) >= TAIL:
                self._kept -= len(self._chunks.popleft())

    def bytes(self) -> bytes:
        return b"".join(self._chunks)


def usage_of(tail: Tail, *, stream: bool, input_estimate: int) -> Usage:
    """What an answer used: the last usage that the upstream reported, or what can be counted."""
    if tail.length == 0:
        return NOTHING
    text = tail.bytes()
    reported = _last_event(text) if stream else _document(text, whole=len(text) == tail.length)
    if reported is None or reported == _Reported():
        # An event is two lines (its data and the blank one), and at least one token but for [DONE]; a plain answer is
        # text, four bytes a token.
        output = max(0, tail.lines // 2 - text[-16:].count(b"[DONE]")) if stream else -(-tail.length // 4)
        return Usage(input_estimate, output, source="counted")
    prompt = _credible(reported.prompt_tokens)
    completion = reported.completion_tokens
    if completion is None:  # nullable in the API's UsageInfo; the total is not
        completion = (reported.total_tokens or 0) - prompt
    cached = reported.prompt_tokens_details.cached_tokens if reported.prompt_tokens_details else 0
    return Usage(prompt, _credible(completion), min(_credible(cached), prompt))


def _credible(tokens: int | None) -> int:
    return min(max(0, tokens or 0), _CREDIBLE)


def _last_event(text: bytes) -> _Reported | None:
    """The usage of the last server-sent event that has one. Each line is read once, whatever stands in it."""
    end = len(text)
    while (start := text.rfind(b'"usage"', 0, end)) >= 0:
        line_start = text.rfind(b"\n", 0, start) + 1
        line_end = text.find(b"\n", start)
        line = text[line_start : line_end if line_end >= 0 else len(text)]
        reported = _usage_in(line.removeprefix(b"data:"))
        if reported is None and line_start == 0:  # the event is longer than the tail
            reported = _last_object(line)
        if reported is not None:
            return reported
        end = line_start
    return None


def _document(text: bytes, *, whole: bool) -> _Reported | None:
    """The usage of a JSON answer, of which the tail may hold the end only."""
    return _usage_in(text) if whole else _last_object(text)


# A usage object has its details one level down, and no strings with braces in it; possessive, and so of linear time.
_OBJECT = re.compile(rb'"usage"\s*+:\s*+(\{(?:[^{}]|\{[^{}]*+\})*+\})')


def _last_object(text: bytes) -> _Reported | None:
    """The last usage object in the end of a JSON text. What a model says of usage has its quotes escaped."""
    for found in reversed(list(_OBJECT.finditer(text))):
        if (reported := _decode(_reports, found[1])) is not None:
            return reported
    return None


def _usage_in(document: bytes) -> _Reported | None:
    event = _decode(_events, document)
    return event.usage if event is not None else None


def _decode(decoder: msgspec.json.Decoder[T], text: bytes) -> T | None:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None  # an upstream's words are not ours to trust: what cannot be read was not reported


class UsageRecord(msgspec.Struct, frozen=True, omit_defaults=False):
    """The ledger row. Its time is the store's own: the id of the stream entry that holds it."""

    id: str
    organisation: str
    team: str
    key: str
    user: str | None
    model: str
    pool: str
    upstream: str | None
    endpoint: str
    status: int
    ended: Literal["complete", "refused", "client", "upstream", "gateway"]
    stream: bool
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    source: Source
    cost_microusd: int
    received_ms: int
    first_byte_ms: int | None
    duration_ms: int
    attempts: int
    bytes_out: int

"""What was used: the ends of an answer → Usage → the row of the ledger.

Nothing looks into a stream on its way. The tail keeps the last bytes of it and, as what falls out of these first, the
first ones, and counts line feeds (one memchr pass, 0.1 µs a chunk): when the answer has ended, the last `usage` stands
in the tail, what Anthropic's streams say at their beginning in the head, and where a backend sent none, the lines say
how many events there were.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TypeVar

import msgspec

from gateway.endpoints import Endpoint
from gateway.records import Price, Source

T = TypeVar("T")

# More than this was not used by one request: what a backend says beyond it is not to break sums and limits.
_CREDIBLE = 10**9

# The last event of a stream, with usage and performance metrics, is below 2 KiB; a JSON answer ends with its usage.
TAIL = 8 * 1024
_SLACK = 2 * 1024  # so that not every chunk lets another one go
HEAD = 4 * 1024  # a message_start, which has the usage of the input and no text


class Usage(msgspec.Struct, frozen=True):
    """Tokens, and where each of the numbers came from: the upstream's own, counted by the gateway, or none."""

    input: int
    output: int
    cached: int = 0  # of the input
    reasoning: int = 0  # of the output
    input_source: Source = "upstream"
    output_source: Source = "upstream"

    @property
    def answered(self) -> bool:
        """Whether there was an answer; one may have no tokens."""
        return self.input_source != "none"

    @property
    def source(self) -> Source:
        """Both sources in one word: the upstream's only if both are."""
        return self.input_source if self.output_source == "upstream" else self.output_source

    @property
    def total(self) -> int:
        return self.input + self.output

    def cost(self, price: Price) -> int:
        """Micro-dollars, rounded half up once, at the end."""
        millionths = (
            (self.input - self.cached) * price.input
            + self.cached * price.cached_input
            + (self.output - self.reasoning) * price.output
            + self.reasoning * price.reasoning
        )
        return (millionths + 500_000) // 1_000_000


class Progress(msgspec.Struct, array_like=True, frozen=True):
    """How far the answer to a request has come: what is written down of it if its worker dies now."""

    input: int
    cached: int
    output: int
    reasoning: int
    input_source: Source
    output_source: Source
    http_status: int
    attempt: int
    bytes_out: int
    first_byte_ms: int
    upstream: str
    served_model: str


NOTHING = Usage(0, 0, input_source="none", output_source="none")
REFUSED = Usage(0, 0)
_ROUTED = Usage(0, 0)  # of a route nobody knows how it counts: it is metered by request


class Tail:
    """The last bytes of an answer, at least `TAIL` of them, in the chunks in which they came; and the first ones, where
    they tell of usage: thousands of streams are open at once, and most say it at their end."""

    __slots__ = ("_chunks", "_head", "_headed", "_kept", "length", "lines")

    def __init__(self, *, headed: bool = True) -> None:
        self._chunks: deque[bytes] = deque()
        self._head = b""
        self._headed = HEAD if headed else 0
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
                gone = self._chunks.popleft()
                self._kept -= len(gone)
                if len(self._head) < self._headed:
                    self._head += gone[: HEAD - len(self._head)]

    def head(self) -> bytes:
        """The first bytes, at most `HEAD` of them, as far as they are kept."""
        if not self._headed and self.length > self._kept:
            return b""
        return (self._head + self.bytes())[:HEAD] if len(self._head) < HEAD else self._head

    def last(self, size: int) -> bytes:
        """The last bytes, at least so many of them where there are as many."""
        last: deque[bytes] = deque()
        for chunk in reversed(self._chunks):
            last.appendleft(chunk)
            size -= len(chunk)
            if size <= 0:
                break
        return b"".join(last)

    def bytes(self) -> bytes:
        return b"".join(self._chunks)


def usage_of(tail: Tail, endpoint: Endpoint, *, stream: bool, input_estimate: int, output_bound: int) -> Usage:
    """What an answer used: the last usage that the upstream reported, and in the place of what it did not report what
    can be counted: of what is no stream, no more than the request allowed."""
    if endpoint.name.startswith("/"):
        return _ROUTED
    if tail.length == 0:
        return NOTHING
    reported = (_of_stream if stream else _of_document)(tail, endpoint)
    input_, output, cached, reasoning = _figures(reported or _Reported(), endpoint)
    input_source: Source = "counted" if reported is None else "upstream"
    output_source = input_source
    if input_ is None:
        input_, input_source = input_estimate, "counted"
    if output is None:
        output, output_source = _counted(tail, endpoint, stream), "counted"
        output = output if stream else min(output, output_bound)  # events are there, bytes may be anything
    return Usage(input_, output, min(cached, input_), min(reasoning, output), input_source, output_source)


# — what backends report


class _Details(msgspec.Struct):
    cached_tokens: int | None = None  # of the input
    reasoning_tokens: int | None = None  # of the output


class _Reported(msgspec.Struct):
    """A usage object of any API; what it does not have is None."""

    prompt_tokens: int | None = None  # completions, chat, embeddings, rerank
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None  # responses, messages, images, audio, Cohere's rerank
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_creation_input_tokens: int | None = None  # messages: beside input_tokens, not within
    cache_read_input_tokens: int | None = None

    @property
    def says_something(self) -> bool:
        """Not without a number, nor with zeros, which some backends send until they know (LocalAI)."""
        told = self.total_tokens or self.prompt_tokens or self.completion_tokens or self.input_tokens
        return bool(told or self.output_tokens or self.cache_creation_input_tokens or self.cache_read_input_tokens)


class _Meta(msgspec.Struct):
    """Cohere's: what was charged, and what was counted."""

    billed_units: _Reported | None = None
    tokens: _Reported | None = None


class _Event(msgspec.Struct):
    """An event, or a whole answer."""

    usage: _Reported | None = None
    meta: _Meta | None = None

    @property
    def reported(self) -> _Reported | None:
        meta = self.meta
        for usage in (self.usage,) if meta is None else (self.usage, meta.billed_units, meta.tokens):
            if usage is not None and usage.says_something:
                return usage
        return None


class _Response(msgspec.Struct):
    """An event of a stream of responses; the last one has the whole answer in it."""

    response: _Event | None = None

    @property
    def reported(self) -> _Reported | None:
        return None if self.response is None else self.response.reported


class _Start(msgspec.Struct, tag="message_start"):
    """The first event of a stream of messages."""

    message: _Event


_events = msgspec.json.Decoder(_Event)
_responses = msgspec.json.Decoder(_Response)
_starts = msgspec.json.Decoder(_Start)


def _figures(reported: _Reported, endpoint: Endpoint) -> tuple[int | None, int | None, int, int]:
    """Input, output, and how much of the input was cached, of the output reasoning, as far as they were reported."""
    produced = reported.completion_tokens_details or reported.output_tokens_details
    reasoning = 0 if produced is None else _credible(produced.reasoning_tokens) or 0
    if endpoint.events == "messages":
        cached = _credible(reported.cache_read_input_tokens) or 0
        new = _credible(reported.input_tokens)
        created = _credible(reported.cache_creation_input_tokens) or 0
        input_ = None if new is None else min(new + created + cached, _CREDIBLE)
        return input_, _credible(reported.output_tokens), cached, reasoning
    total = reported.total_tokens
    input_ = reported.prompt_tokens if reported.prompt_tokens is not None else reported.input_tokens
    if endpoint.output is None:
        input_ = total if input_ is None else input_
        output: int | None = reported.output_tokens or 0
    else:
        output = reported.completion_tokens if reported.completion_tokens is not None else reported.output_tokens
        if output is None and None not in (input_, total):  # nullable in the API's UsageInfo; the total is not
            output = (total or 0) - (input_ or 0)
    details = reported.prompt_tokens_details or reported.input_tokens_details
    cached = 0 if details is None else _credible(details.cached_tokens) or 0
    return _credible(input_), _credible(output), cached, reasoning


def _credible(tokens: int | None) -> int | None:
    return None if tokens is None else min(max(0, tokens), _CREDIBLE)


# — where they report it


def _of_stream(tail: Tail, endpoint: Endpoint) -> _Reported | None:
    """The usage of a stream: of its last event that has one, for messages with what the first event said before."""
    last = _last_event(tail.bytes(), wrapped=endpoint.events == "responses")
    if endpoint.events != "messages":
        return last
    first = _first_event(tail.head())
    if first is None or last is None:
        if first is not None:
            first.output_tokens = None  # it is of the first token
        return first or last
    for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"):
        if not getattr(last, name):
            setattr(last, name, getattr(first, name))
    return last


def _first_event(head: bytes) -> _Reported | None:
    """What a message_start says."""
    for line in head.splitlines():
        if line.startswith(b"data:") and b"message_start" in line:
            start = _decode(_starts, line[5:])
            return None if start is None else start.message.reported
    return None


_NULL = re.compile(rb'"usage"\s*+:\s*+null')


def _last_event(text: bytes, *, wrapped: bool) -> _Reported | None:
    """The usage of the last server-sent event that has one. Each line is read once, whatever stands in it."""
    end = len(text)
    while (start := text.rfind(b'"usage"', 0, end)) >= 0:
        if _NULL.match(text, start):  # as some say in each event but the last
            end = start
            continue
        line_start = text.rfind(b"\n", 0, start) + 1
        line_end = text.find(b"\n", start)
        line = text[line_start : line_end if line_end >= 0 else len(text)]
        reported = _usage_in(line.removeprefix(b"data:"), wrapped=wrapped)
        if reported is None and line_start == 0 and not line.startswith(b"data:"):  # it is longer than the tail
            reported = _at_the_end(line, wrapped=wrapped)
        if reported is not None:
            return reported
        end = line_start
    return None


def _of_document(tail: Tail, endpoint: Endpoint) -> _Reported | None:
    """The usage of a JSON answer, of which the tail may hold the end only."""
    text = tail.bytes()
    if len(text) == tail.length:
        return _usage_in(text)
    return _at_the_end(text) or _at_the_beginning(tail.head())


# How often a member may look like the one that is sought: whoever reads each to its end stands still for minutes.
_TRIES = 16

# A usage object has its details one level down, and no strings with braces in it; possessive, and so of linear time.
_OBJECT = re.compile(rb'"usage"\s*+:\s*+\{(?:[^{}]|\{[^{}]*+\})*+\}')


def _at_the_end(text: bytes, *, wrapped: bool = False) -> _Reported | None:
    """The usage in the end of a JSON text: a member of the outermost object, for the rest of the text ends just that.

    What a model says of usage has its quotes escaped, and what a caller sent in its documents is further in."""
    opening = b'{"response":{' if wrapped else b"{"
    start = len(text)
    for _ in range(_TRIES):
        start = max(text.rfind(b'"usage"', 0, start), text.rfind(b'"meta"', 0, start))
        if start < 0:
            break
        if (reported := _usage_in(opening + text[start:], wrapped=wrapped)) is not None:
            return reported
    return None


def _at_the_beginning(text: bytes) -> _Reported | None:
    """The usage in the beginning of a JSON text, before its data (vLLM's rerank, llama.cpp's embeddings): of the
    outermost object, too."""
    found = _OBJECT.search(text)
    return None if found is None else _usage_in(text[: found.end()] + b"}")


def _usage_in(document: bytes, *, wrapped: bool = False) -> _Reported | None:
    event: _Event | _Response | None = _decode(_responses, document) if wrapped else _decode(_events, document)
    return None if event is None else event.reported


def _decode(decoder: msgspec.json.Decoder[T], text: bytes) -> T | None:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # an upstream's words are not ours to trust: what cannot be read was not reported


# — what can be counted without them

# Events that have names take three lines: the name, the data and the blank one. Others take two.
_NAMED = frozenset(("responses", "messages"))


def _counted(tail: Tail, endpoint: Endpoint, stream: bool) -> int:
    """How many tokens an answer may have: an event has one at least, and a plain answer is text, four bytes a token."""
    if not stream:
        return -(-tail.length // 4)
    text = tail.bytes()
    lines, without = 2, text[-16:].count(b"[DONE]")
    if endpoint.events in _NAMED:
        begun, before = tail.head(), tail.length - len(text)
        if before <= len(begun):
            begun = begun[:before]
        else:
            begun = begun[: begun.rfind(b"\n") + 1]
            if not text.startswith(b"event:"):
                text = text[text.find(b"\n") + 1 :]  # the rest of a line
        text = (b"\n" + begun + text).replace(b"\r\n", b"\n")
        # A delta brings a token, but for message_delta, which is the last one's. (To look for it backwards is quicker.)
        deltas = text.count(b"delta\n") - (text.rfind(b"message_delta\n") >= 0)
        lines, without = 3, without + text.count(b"\nevent:") - deltas
    return max(0, tail.lines // lines - without)

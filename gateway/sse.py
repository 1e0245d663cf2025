"""What the gateway knows of server-sent events, for the places where it must: the event that nobody asked for is taken
out, a stream that failed midway says so, and its last word is known when it comes.

An event is its lines and the blank one that ends them (WHATWG HTML, section 9.2.6): a line ends with CRLF, LF or CR,
in any mixture, and where a chunk ends is chance. Everything that this file does not name passes as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import msgspec

from gateway.endpoints import Endpoint, Events
from gateway.errors import GatewayError, Object

# A line that has no field: to whoever reads the stream it is nothing, to whatever stands between a sign of life.
COMMENT = b": keep-alive\n\n"

_BOM = b"\xef\xbb\xbf"
_CR, _LF = b"\r\n"

# Possessive: CRLF is one line end, and must not be given back as two, or the end of every line were a blank one.
# Written with its two first characters in the open: the search then runs over all others in C.
_END_OF_LINE = rb"(?:\r\n?+|\n)"
_BLANK = re.compile(_END_OF_LINE)
_END = re.compile(_END_OF_LINE + _END_OF_LINE)
_ENDED = re.compile(rb"(?:\A|" + _END_OF_LINE + rb")" + _END_OF_LINE + rb"\Z")


def at_boundary(tail: bytes) -> bool:
    """Whether an event may follow what was sent so far: nothing was, or a blank line ends it.

    `tail` is the end of what was sent, four bytes of it or more where there are as many."""
    return not tail or _ENDED.search(tail[-4:]) is not None


# — the end of a stream


class LastWord(NamedTuple):
    """What stands in the event at which clients stop reading, and how far from the end of a piece it may begin."""

    word: bytes
    within: int


_DONE = LastWord(b"[DONE]", 16)
LAST_WORDS: Mapping[Events, LastWord] = {
    "completions": _DONE,
    "chat": _DONE,
    "responses": _DONE,
    # In quotes, as no model can write it into its text; Bedrock's has its metrics behind it.
    "messages": LastWord(b'"message_stop"', 256),
    "other": _DONE,
}

_FINISHED = re.compile(
    rb'(?:\A|[\r\n])data: ?\[DONE\]|"finish_reason"\s*+:\s*+"[^"]'
    rb'|"type"\s*+:\s*+"(?:message_stop|response\.(?:completed|failed|incomplete)'
    rb'|transcript\.text\.done|image_(?:generation|edit)\.completed)"'
)
_USAGE = re.compile(rb'"usage"\s*+:\s*+\{')
_FIELDS = (b"data:", b"event:", b"id:", b":")


def finished(tail: bytes) -> bool:
    """Whether the end of a stream says that no answer follows, in the words of any of the APIs."""
    return _FINISHED.search(tail) is not None or _is_end_of_last(tail)


def _is_end_of_last(tail: bytes) -> bool:
    """Whether a tail is nothing but the end of a long event that has a usage. The last event of responses and of images
    repeats all of the answer, and its type may be where the tail does not begin yet."""
    line = tail.rstrip(b"\r\n")
    is_end = line != tail and b"\n" not in line and b"\r" not in line and not line.startswith(_FIELDS)
    return is_end and _USAGE.search(line) is not None


# — the event that the caller did not ask for

# The event has a few hundred bytes; one of more than this is another. Counted without the ends of its last two lines.
LONGEST = 64 * 1024

# What stands in each such event, and in hardly another: choices that do not begin with one.
_SIGN = re.compile(rb'"choices"(?!\s*+:\s*+\[\s*+\{)')


class _Object(msgspec.Struct):
    """Any JSON object."""


class _Extra(msgspec.Struct):
    """What `stream_options.include_usage` adds to a stream: the usage of the whole request, and not one choice."""

    choices: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=0)]
    usage: _Object


_extras = msgspec.json.Decoder(_Extra)


class UsageFilter:
    """Takes the usage events out of a stream whose caller did not ask for them; all other bytes pass as they came.

    Such an event is a JSON object with `choices` (spelled in these letters), an empty list, and `usage`, an object.
    Backends send one; each is taken out, as none was asked for. It goes with its blank line, and with whatever else
    it has between two blank lines: comments, `event`, `id`.

    An event leaves when its blank line has come, and so a part of one is held: `LONGEST` bytes at most, for a longer
    event passes from there on as it comes.
    """

    __slots__ = ("_between", "_held", "_passed", "_skip_lf", "_started", "removed")

    def __init__(self) -> None:
        self.removed = False
        self._between = False  # nothing is held or expected: the next byte begins an event
        self._started = False  # whether a byte order mark is looked for no more
        self._skip_lf = False  # an event was taken out that ended with CR, of which an LF may be the other half
        self._held = bytearray()  # the event that has begun; of one that is too long, its last two bytes
        self._passed = 0  # how many of these have left: none, or all of them

    def __repr__(self) -> str:
        return f"<UsageFilter: {len(self._held) - self._passed} bytes held, removed={self.removed}>"

    def feed(self, chunk: bytes) -> bytes:
        """What may leave now."""
        # Whole events, as backends send them, in which nothing can be taken out.
        if self._between and chunk.endswith((b"\n\n", b"\r\n\r\n")) and not _SIGN.search(chunk):
            return chunk
        return self._sift(chunk)

    def flush(self) -> bytes:
        """What was held of an event that the stream's end cut."""
        rest = bytes(self._held[self._passed :])
        self._held.clear()
        self._passed = 0
        return rest

    def _sift(self, chunk: bytes) -> bytes:
        if self._skip_lf and chunk:
            self._skip_lf = False
            chunk = chunk[chunk[0] == _LF :]
        held = self._held
        # What was held has no end in it, but maybe the first half of one: CRLF at the most.
        search = max(0, len(held) - 2)
        held += chunk
        begin, first = 0, self._passed  # where the event begins, and what has not left
        out, leapt = [], False
        if not self._started:
            if len(held) < len(_BOM) and _BOM.startswith(held):
                return b""
            self._started = True
            if held.startswith(_BOM):
                begin = search = len(_BOM)

        # An empty line where an event would begin is all of it.
        while found := (_BLANK.match(held, begin) if not self._passed else None) or _END.search(held, search):
            end = found.end()
            if not self._passed and found.start() - begin <= LONGEST and _is_extra(bytes(held[begin:end])):
                self.removed = True
                self._skip_lf = end == len(held) and held[-1] == _CR
                out.append(held[first:begin])
                first = end
            self._passed = 0
            begin = search = end
            if not leapt:  # the whole events of a burst pass in one go, up to a sign
                leapt = True
                sign = _SIGN.search(held, end)
                begin = search = max(end, held.rfind(b"\n\n", end, sign.start() if sign else len(held)) + 2)

        rest = len(held) - begin
        if self._passed or rest > LONGEST + 2:  # the two may be the end of a line
            out.append(held[first:])
            del held[:-2]
            self._passed = len(held)
        else:
            out.append(held[first:begin])
            del held[:begin]
        self._between = not held and not self._skip_lf
        return b"".join(out)


def _is_extra(event: bytes) -> bool:
    if not _SIGN.search(event):
        return False  # and so it is the same however the stream is cut: `feed` lets whole events pass without it
    try:
        _extras.decode(_data(event))
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _data(event: bytes) -> bytes:
    """Its data, read as JSON is: the one blank after the colon is not looked at."""
    return b"\n".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))


# — the event that says that the stream failed

_CREDIBLE_LENGTH = 256  # of an id, of a model's name
_CREDIBLE_NUMBER = 2**53  # of a time, of an event


class _Head(msgspec.Struct):
    """What all events of a stream have in common; of any type, for a backend may write what it likes."""

    id: object = None
    created: object = None
    model: object = None
    sequence_number: object = None


_heads = msgspec.json.Decoder(_Head)

# What the chunks of a stream are called, and how a choice says nothing.
_CHUNKS: Mapping[Events, tuple[str, Object]] = {
    "completions": ("text_completion", {"text": ""}),
    "chat": ("chat.completion.chunk", {"delta": {}}),
}


def error_event(tail: bytes, endpoint: Endpoint, error: GatewayError, called: str | None = None) -> bytes:
    """The last event of a stream that failed midway. It may follow where `at_boundary` says so.

    Of completions it is a chunk that is an error to OpenAI's clients, and to Fireworks's an answer that ended with
    finish_reason "error"; of messages and responses it is their error event, and of all others OpenAI's error object.

    No `data: [DONE]` follows it: clients stop reading there, and Fireworks's would take the stream for a whole one. The
    cut that comes instead is an exception to them all.

    `tail` is the end of the stream: from its last event come id, created, model and the number, and not another word.
    `called` is the id of the request, which Anthropic's clients read there.
    """
    if endpoint.events == "messages":
        return _event(error.told("anthropic", called), name=b"error")
    told = error.body()["error"]
    if endpoint.events == "other":
        return _event({"error": told})
    heads = _heads_backwards(tail)
    if endpoint.events == "responses":
        number = next((number for head in heads if (number := _number(head.sequence_number, -1)) >= 0), -1)
        what = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return _event({**what, "sequence_number": number + 1}, name=b"error")
    head = next(heads, None) or _Head()
    kind, nothing = _CHUNKS[endpoint.events]
    chunk = {
        "id": _text(head.id),
        "object": kind,
        "created": _number(head.created, 0),
        "model": _text(head.model),
        "choices": [{"index": 0, **nothing, "logprobs": None, "finish_reason": "error"}],
        "usage": None,
        "error": told,
    }
    return _event(chunk)


def _event(data: Object, *, name: bytes | None = None) -> bytes:
    return (b"" if name is None else b"event: " + name + b"\n") + b"data: " + msgspec.json.encode(data) + b"\n\n"


def _heads_backwards(tail: bytes) -> Iterator[_Head]:
    """Of each whole event that is a JSON object, the last one first."""
    *events, _ = _END.split(tail)
    for event in reversed(events):
        try:
            yield _heads.decode(_data(event))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue  # [DONE], a comment, or the event that the tail cuts


def _number(given: object, otherwise: int) -> int:
    return given if type(given) is int and 0 <= given < _CREDIBLE_NUMBER else otherwise


def _text(given: object) -> str:
    return given if isinstance(given, str) and len(given) <= _CREDIBLE_LENGTH else ""

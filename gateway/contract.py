"""The request schemas of each endpoint, as data, and what bad input is told.

A schema is a table: a member's name, and what its value may be. A body is taken apart into members whose values stay
bytes; a value is decoded where a row asks for it, and a prompt or a conversation never is. The rows are those of
Fireworks' CompletionRequest (API 4.21.6; its ranges stand in prose only) and what its SDK sends since. Of chat, the
contract knows the members that the gateway reads; all others pass.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import DecodeError, Meta, Raw, ValidationError
from msgspec.json import Decoder, encode

from gateway.errors import BadRequest, Invalid, Problem

Members = Sequence[tuple[str, Raw]]
Values = dict[str, Any]

MAX_MEMBERS = 1000  # of an object in a large body; the contract knows 41
MAX_PARTS = 1000  # of a predicted output
BYTES_PER_TOKEN = 4  # English under the usual tokenizers; other scripts have more bytes a letter and fewer a token
_LARGE = 64 * 1024
_SHOWN = 60  # characters of what was found
_TOLD = 20  # problems of one kind that are told


@dataclass(frozen=True, slots=True)
class Member:
    """What a value may be: in words, and as the reader that returns it, or raises DecodeError, or Invalid.

    `shown` says whether a string found in its place may be told: never where callers put their prose.
    """

    expected: str
    read: Callable[[Raw], Any]
    shown: bool = False


@dataclass(frozen=True, slots=True)
class Schema:
    """What an object may be: its members, which of them must be there, and which pairs exclude each other."""

    members: Mapping[str, Member]
    required: tuple[str, ...] = ()
    apart: tuple[tuple[str, str], ...] = ()
    closed: bool = True

    def read(self, raw: Raw) -> Values:
        """The values of an object inside a body. Raises Invalid; its places start at the object."""
        values, problems = self.check(_members(raw), closed=self.closed)
        if problems:
            raise Invalid(problems)
        return values

    def check(self, given: Members, *, closed: bool) -> tuple[Values, list[Problem]]:
        """The values of the known members (None where null) and all problems. Raises BadRequest for one given twice.

        Parsers differ in which of two they take, and what is checked here must be what is obeyed there.
        """
        values: Values = {}
        problems: list[Problem] = []
        unknown: list[str] = []
        for name, raw in given:
            member = self.members.get(name)
            if member is None:
                unknown.append(name)
                continue
            if name in values:
                raise BadRequest(f"{name} stands twice in one object, expected once", param=name)
            values[name] = None
            try:
                values[name] = member.read(raw)
            except (DecodeError, Invalid) as wrong:
                problems += _problems(wrong, name, raw, member)
        problems += self._gaps(values, unknown if closed else [])
        return values, problems

    def _gaps(self, values: Values, unknown: list[str]) -> Iterator[Problem]:
        for name in unknown[:_TOLD]:
            yield Problem((cut(name),), _EXTRA, "extra_forbidden")
        for name in self.required:
            if name not in values:
                yield Problem((name,), f"is missing, expected {self.members[name].expected}", "missing")
        for alias, name in self.apart:
            if alias in values and name in values and None not in (values[alias], values[name]):
                yield Problem((alias,), f"cannot be specified together with {name}")


def read(endpoint: str, body: bytes, *, strict: bool) -> tuple[Members, Values, list[Problem]]:
    """The members of a body in their order, the values of those the endpoint knows, and what is wrong with them.

    Raises BadRequest where the body is no JSON object in UTF-8, and where a known member stands twice.
    """
    schema = SCHEMAS[endpoint]
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look into strings that nobody asks for
        given = _members(body)
        values, problems = schema.check(given, closed=strict and schema.closed)
    except UnicodeDecodeError as wrong:
        raise BadRequest(
            f"the body is not UTF-8: {wrong.reason} (byte {wrong.start}), expected a JSON object"
        ) from None
    except DecodeError as wrong:
        raise BadRequest(f"the body is no JSON object: {wrong}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply, expected some hundred levels at most") from None
    return given, values, [_placed(problem) for problem in problems] if problems else problems


# — taking apart


class _Name(str):
    """A member's name that is equal to nothing but itself, so that a dict keeps both of two equal ones."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


# The hook is called as call(_Name, "model"): a name costs no Python frame.
_DECODER = Decoder(dict[_Name, Raw], dec_hook=operator.call)


def _members(text: bytes | Raw) -> Members:
    decoder = _DECODER if len(text) <= _LARGE else Decoder(dict[_Name, Raw], dec_hook=_bounded())
    return [(str(name), raw) for name, raw in decoder.decode(text).items()]


def _bounded() -> Callable[[type, Any], Any]:
    """A hook that gives up: 32 MiB of small members would hold the event loop for seconds."""
    names = count(1)

    def name(kind: type, text: Any) -> Any:
        if next(names) > MAX_MEMBERS:
            raise BadRequest(f"an object has more than {MAX_MEMBERS} members, expected at most so many")
        return kind(text)

    return name


# — telling

_EXTRA = "Extra inputs are not permitted"  # with the field's name in the API's own words: SDKs match them
_QUOTE, _NULL = b'"n'
_KINDS = {_QUOTE: "a string", ord("["): "an array", ord("{"): "an object"}


def cut(found: object, size: int = _SHOWN) -> str:
    """What was found, in at most `size` characters."""
    text = str(found)
    return text if len(text) <= size else text[:size] + "…"


def _first(raw: Raw) -> int:
    return memoryview(raw)[0]


def _found(raw: Raw, shown: bool) -> str:
    kind = _KINDS.get(_first(raw))
    if kind is None or (shown and kind == "a string"):
        return cut(memoryview(raw)[: 4 * _SHOWN].tobytes().decode(errors="ignore"))
    return kind


def _problems(wrong: Exception, place: str | int, raw: Raw, member: Member) -> list[Problem]:
    if isinstance(wrong, Invalid):
        return [Problem((place, *inner.loc), inner.msg, inner.type) for inner in wrong.problems]
    return [Problem((place,), f"found {_found(raw, member.shown)}, expected {member.expected}")]


def _placed(problem: Problem) -> Problem:
    extra = problem.msg is _EXTRA
    text = f"{_EXTRA}, field: '{problem.path}'" if extra else f"{problem.path}: {problem.msg}"
    return Problem(problem.loc, text, problem.type)


# — kinds of members


def _leaf(expected: str, kind: Any, *, null: bool = True, shown: bool = False) -> Member:
    """A member that msgspec checks as it decodes: true is no integer, 1.0 neither, and integers have any size."""
    read = Decoder(kind | None if null else kind).decode
    return Member(f"{expected} or null" if null else expected, read, shown)


def _shape(expected: str, read: Callable[[Raw], Any]) -> Member:
    return Member(f"{expected} or null", lambda raw: None if _first(raw) == _NULL else read(raw))


def number(low: float | None = None, high: float | None = None) -> Member:
    span = "" if low is None else f" from {low} to {high}"
    return _leaf(f"a number{span}", Annotated[float, Meta(ge=low, le=high)], shown=True)


def integer(low: int | None = None, high: int | None = None, *, null: bool = True) -> Member:
    span = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
    return _leaf(f"an integer{span}", Annotated[int, Meta(ge=low, le=high)], null=null, shown=True)


def boolean(*, null: bool = True) -> Member:
    return _leaf("a boolean", bool, null=null, shown=True)


def text(*, null: bool = True) -> Member:
    return _leaf("a string", str, null=null)


def one_of(*words: str, null: bool = True) -> Member:
    literal: Any = Literal
    return _leaf(" or ".join(f'"{word}"' for word in words), literal[words], null=null, shown=True)


def tagged(tag: str, **variants: Schema) -> Member:
    """An object whose member `tag` names the schema that holds for it."""
    kind = one_of(*variants, null=False)
    opened = Schema({tag: kind}, required=(tag,), closed=False)
    schemas = {name: Schema({tag: kind, **own.members}, own.required) for name, own in variants.items()}
    return _shape(f"an object with {tag} {kind.expected}", lambda raw: schemas[opened.read(raw)[tag]].read(raw))


# — prompts and conversations: large, so looked at and not decoded


class Prompts(NamedTuple):
    """How many prompts are asked, and the tokens in them: counted where they are tokens, estimated where text."""

    number: int
    tokens: int


_ARRAY = re.compile(rb"\[")
_ITEM = re.compile(rb"\[\s*([^\s\]])")  # an array with something in it, and the something's first byte
_EMPTY = re.compile(rb"\[\s*\]")
_ITEMS, _STRINGS, _STRING_ARRAYS = Decoder(list[Raw]), Decoder(list[str]), Decoder(list[list[str]])
_NO_INTEGER = (b'"', b"{", b".", b"e", b"E", b"l")  # one of these is in every other value: 1_._0, fals_e_, nul_l_


def estimate(size: int) -> int:
    """The tokens in so many bytes of text, at least one."""
    return -(-size // BYTES_PER_TOKEN) or 1


def _prompts(raw: Raw) -> Prompts:
    if _first(raw) == _QUOTE:
        return Prompts(1, estimate(len(raw) - 2))
    item = _ITEM.match(memoryview(raw))
    if item is None or item[1] not in b'"[':
        return Prompts(1, _tokens(bytes(raw), 1))
    prompts = _ITEMS.decode(raw)
    number = len(prompts)
    # No JSON holds a zero byte, so what follows one begins a prompt: a million of them are looked at without a loop.
    joined = b"\0".join(prompts)
    if joined.count(b"\0" + item[1]) != number - 1:
        raise ValidationError("strings and arrays are mixed")
    if item[1] == b"[":
        return Prompts(number, _tokens(joined, number))
    return Prompts(number, max(number, estimate(len(joined) - 3 * number + 1)))


def _tokens(numbers: bytes, arrays: int) -> int:
    """How many integers there are in so many arrays. Scanned, not decoded: a million tokens in 4 ms instead of 45."""
    if numbers.count(b"[") != arrays or _EMPTY.search(numbers) or any(mark in numbers for mark in _NO_INTEGER):
        raise ValidationError("not arrays of integers")
    return numbers.count(b",") + arrays


def _array(pattern: re.Pattern[bytes], raw: Raw) -> Raw:
    if pattern.match(memoryview(raw)) is None:
        raise ValidationError("not such an array")
    return raw


def _images(raw: Raw) -> object:
    item = _ITEM.match(memoryview(raw))
    return (_STRING_ARRAYS if item and item[1] == b"[" else _STRINGS).decode(raw)


# — predicted outputs: read as the JSON string that `speculation` takes in their place


def _prediction(raw: Raw) -> bytes:
    content: bytes = bytes(raw) if _first(raw) == _QUOTE else _PREDICTED.read(raw)["content"]
    return content


def _content(raw: Raw) -> bytes:
    if _first(raw) == _QUOTE:
        return bytes(raw)
    texts: list[str] = []
    problems: list[Problem] = []
    parts = _ITEMS.decode(raw)
    if len(parts) > MAX_PARTS:
        raise ValidationError("too many parts")
    for i, part in enumerate(parts):
        try:
            texts.append(_PART.read(part)["text"])
        except (DecodeError, Invalid) as wrong:
            problems += _problems(wrong, i, part, _TEXT_PART)
    if problems:
        raise Invalid(problems[:_TOLD])
    return encode("".join(texts))


_ONLY_TEXT = _leaf("null, only text can be predicted", None, null=False)
_PART = Schema(
    {"type": one_of("text", null=False), "text": text(null=False), "image_url": _ONLY_TEXT, "video_url": _ONLY_TEXT},
    required=("type", "text"),
)
_TEXT_PART = Member("an object with type and text", _PART.read)
_PREDICTED = Schema(
    {
        "type": one_of("content", null=False),
        "content": Member(f"a string or an array of at most {MAX_PARTS} text parts", _content),
    },
    required=("content",),
)


# — the tables

_JSON_SCHEMA = _leaf("a string or an object", str | dict[str, Raw])
_FORMAT = {"schema": _JSON_SCHEMA, "grammar": text(), "json_schema": _JSON_SCHEMA}
_GIVEN_SCHEMA = {**_FORMAT, "json_schema": _leaf("a string or an object", str | dict[str, Raw], null=False)}

COMPLETION: Mapping[str, Member] = {
    "model": text(null=False),
    "prompt": Member("a string or a non-empty array of strings, of integers, or of non-empty integer arrays", _prompts),
    "user": text(),
    "prompt_cache_isolation_key": text(),
    "raw_output": boolean(),
    "perf_metrics_in_response": boolean(),
    "stream": boolean(),
    "n": integer(1, 128, null=False),
    "stop": _leaf("a string or an array of at most 4 strings", str | Annotated[list[str], Meta(max_length=4)]),
    "max_tokens": integer(0),
    "max_completion_tokens": integer(0),
    "temperature": number(0, 2),
    "top_k": integer(0, 100),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2),
    "mirostat_target": number(),
    "mirostat_lr": number(),
    "seed": integer(),
    "logprobs": _leaf("an integer from 0 to 5, a boolean", Annotated[int, Meta(ge=0, le=5)] | bool, shown=True),
    "top_logprobs": integer(0, 5),
    "echo": boolean(),
    "echo_last": integer(),
    "ignore_eos": boolean(null=False),
    "context_length_exceeded_behavior": one_of("error", "truncate", null=False),
    "response_format": tagged(
        "type",
        text=Schema(_FORMAT),
        json_object=Schema(_FORMAT),
        json_schema=Schema(_GIVEN_SCHEMA, required=("json_schema",)),
        grammar=Schema(_FORMAT),
    ),
    "logit_bias": _leaf("an object of numbers from -100 to 100", dict[str, Annotated[float, Meta(ge=-100, le=100)]]),
    "speculation": _leaf("a string, an array of integers", str | list[int]),
    "prediction": _shape("a string, a predicted output", _prediction),
    "metadata": _leaf("an object whose values are strings", dict[str, str]),
    "reasoning_effort": _leaf(
        '"none", "low", "medium", "high", a positive integer, a boolean',
        Literal["none", "low", "medium", "high"] | Annotated[int, Meta(ge=1)] | bool,
        shown=True,
    ),
    "reasoning_history": one_of("disabled", "interleaved", "preserved"),
    "thinking": tagged("type", enabled=Schema({"budget_tokens": integer(1024)}), disabled=Schema({})),
    "return_token_ids": boolean(),
    "images": _shape("an array of strings, an array of arrays of strings", _images),
}
SINCE_2026: Mapping[str, Member] = {
    "prompt_cache_key": text(),
    "service_tier": text(),  # priority has an effect, the API takes every other word for default
    "stream_options": _shape("an object", Schema({"include_usage": boolean()}, closed=False).read),
}
_CHAT = (
    *("model", "user", "stream", "n", "max_tokens", "max_completion_tokens", "prediction", "speculation"),
    *("reasoning_effort", "reasoning_history", "thinking"),
)
_ALIASES = (("max_completion_tokens", "max_tokens"), ("prediction", "speculation"), ("thinking", "reasoning_effort"))

SCHEMAS: Mapping[str, Schema] = {
    "completions": Schema({**COMPLETION, **SINCE_2026}, ("model", "prompt"), _ALIASES),
    "chat/completions": Schema(
        {
            **{name: COMPLETION[name] for name in _CHAT},
            **{name: SINCE_2026[name] for name in ("prompt_cache_key", "stream_options")},
            "messages": Member("an array with at least one message", partial(_array, _ITEM)),
            "tools": _shape("an array", partial(_array, _ARRAY)),
        },
        ("model", "messages"),
        _ALIASES,
        closed=False,
    ),
}

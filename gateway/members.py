"""Bodies taken apart, and what their members may be: the engine below the tables of contract.py.

A body is taken apart into members whose values stay bytes. A value is decoded where a row asks for it and where it is
small; prompts, conversations and images are looked at and never decoded. A Member is the reader of a value and its
JSON Schema, made from the same data; a Schema is a table of them.

What is no JSON, or is JSON that two parsers would read in two ways or one at great cost, is a BadRequest (400). What
is JSON and breaks the table is a Problem, told with all others of the request (422).
"""

from __future__ import annotations

import codecs
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, repeat
from types import GenericAlias
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import DecodeError, Meta, Raw, ValidationError
from msgspec.json import Decoder

from gateway.errors import BadRequest, Invalid, Problem

Members = Sequence[tuple[str, Raw]]
Values = dict[str, Any]
Document = Mapping[str, Any]  # JSON Schema, 2020-12
_T = TypeVar("_T")

MAX_VALUES = 2_000_000  # of a body: some 10 ms of parsing
MAX_MEMBERS = 1000  # of an object in a large body; the contract knows 41
MAX_PROMPTS = 10_000  # of a request, and images
MAX_PARTS = 1000  # of a predicted output
MAX_BLANK = 512 * 1024  # bytes of white space in one place; looking beyond it is slow, and holds all other threads up
MAX_DIGITS = 1000  # of a number; doubles have 17, and 309 before the point
MAX_DECODED = 128 * 1024  # bytes of a value that is decoded: some 4 ms of the event loop
MAX_OBJECT = 1024 * 1024  # bytes of an object with a table of its own, of which most is not decoded: a JSON schema
_WRONG = object()  # in the place of a value that was refused: it was given, and so may exclude another
_LARGE = 64 * 1024
_STEP = 1024 * 1024  # bytes of a large body that one call looks at, so that other threads get their turn
_SHOWN = 60  # characters of what was found
_TOLD = 20  # problems of one kind that are told


@dataclass(frozen=True, slots=True)
class Member:
    """What a value may be: in words, as JSON Schema, and as the reader that returns it, or raises DecodeError, Invalid.

    `shown` says whether a string found in its place may be told: never where callers put their prose. Values of more
    than `most` bytes are refused unread.
    """

    expected: str
    schema: Document
    read: Callable[[Raw], Any]
    shown: bool = False
    most: int = MAX_DECODED


@dataclass(frozen=True, slots=True)
class Schema:
    """What an object may be: its members, which of them must be there, and which pairs exclude each other."""

    members: Mapping[str, Member]
    required: tuple[str, ...] = ()
    apart: tuple[tuple[str, str], ...] = ()
    closed: bool = True

    def read(self, raw: Raw) -> Values:
        """The values of an object inside a body. Raises Invalid; its places start at the object."""
        return self.obeyed(_opened(raw))

    def obeyed(self, given: Mapping[str, Raw]) -> Values:
        """The values of an object's members. Raises Invalid."""
        values, problems = self.check(given.items(), closed=self.closed)
        if problems:
            raise Invalid(problems)
        return values

    def check(self, given: Iterable[tuple[str, Raw]], *, closed: bool) -> tuple[Values, list[Problem]]:
        """The values of the known members (None where null) and all problems. Raises BadRequest for one too large."""
        values: Values = {}
        problems: list[Problem] = []
        unknown: list[str] = []
        bad: list[str] = []
        known = self.members
        for name, raw in given:
            member = known.get(name)
            if len(raw) > MAX_DIGITS:
                _check_size(name, raw, sys.maxsize if member is None else member.most)
            if member is None:
                unknown.append(name)
                continue
            try:
                values[name] = member.read(raw)
            except (DecodeError, Invalid) as wrong:
                values[name] = None
                bad.append(name)
                problems += _problems(wrong, name, raw, member)
        problems += self._gaps({**values, **dict.fromkeys(bad, _WRONG)} if bad else values, unknown if closed else [])
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

    def document(self) -> dict[str, Any]:
        """The table as JSON Schema."""
        document: dict[str, Any] = {
            "type": "object",
            "properties": {
                name: {"description": member.expected, **member.schema} for name, member in self.members.items()
            },
        }
        if self.required:
            document["required"] = list(self.required)
        if self.closed:
            document["additionalProperties"] = False
        given = {"not": {"type": "null"}}
        pairs = [{"required": list(pair), "properties": dict.fromkeys(pair, given)} for pair in self.apart]
        return {**document, "allOf": [{"not": pair} for pair in pairs]} if pairs else document


# — taking apart


def take_apart(body: bytes) -> Members:
    """The members of a body, in their order. Raises BadRequest where it is no JSON object that all parsers read alike.

    That is: not UTF-8, no JSON, a name that stands twice, half of a surrogate pair, too many values or levels.
    """
    try:
        if not body.isascii():
            _check_utf8(body)  # msgspec looks into strings for halves of surrogate pairs, and for no more
        if len(body) > MAX_BLANK:
            _check_blanks(body)
        if len(body) > 2 * MAX_VALUES:  # a value has two bytes at least, with its comma
            _check_width(body)
        return list(_opened(body).items())
    except DecodeError as wrong:
        raise BadRequest(f"the body is no JSON object: {_defect(body, wrong)}") from None
    except RecursionError:
        raise too_deep() from None


_HALF = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])", re.DOTALL)  # of a surrogate pair, without the other one


def _defect(body: bytes, wrong: DecodeError) -> str:
    """What the decoder says, but for what it takes for the end: no body at all, and half a pair of its last bytes."""
    if not body:
        return "it is empty"
    return "half of a surrogate pair at its end" if _HALF.search(body[-16:]) else str(wrong)


def too_deep() -> BadRequest:
    return BadRequest("the body is nested too deeply, expected some hundred levels at most")


def _check_size(name: str, raw: Raw, most: int) -> None:
    what = "bytes"
    if _first(raw) in b"-0123456789":
        what, most = "digits", MAX_DIGITS
    if len(raw) > most:
        raise BadRequest(f"{cut(name)} has {len(raw)} {what}, expected at most {most}", param=cut(name))


# Each name is decoded into a box of its own, so that a dict keeps both of two equal ones. `repeat` is such a box: it
# equals nothing but itself, is made as call(repeat, "model"), and `next` takes the name out, without a Python frame.
def _boxing(kind: Any, hook: Callable[..., repeat[str]] = operator.call) -> Decoder[dict[repeat[str], Any]]:
    return Decoder(GenericAlias(dict, (repeat, kind)), dec_hook=hook)


_DECODER = _boxing(Raw)
_COMPACT = Decoder(dict[str, Raw])


def _opened(text: bytes | Raw) -> dict[str, Raw]:
    if len(text) > _LARGE:
        return _unboxed(_boxing(Raw, _bounded()).decode(text))
    # As SDKs write it, without blanks: where names and values fill the text, but for four signs a member and the last
    # brace, nothing stands there twice. It takes half the time.
    found = _COMPACT.decode(text)
    if sum(map(len, found)) + sum(map(len, found.values())) + 4 * len(found) + 1 == len(text):
        return found
    return _unboxed(_DECODER.decode(text))


def _unboxed(found: Mapping[repeat[str], _T]) -> dict[str, _T]:
    """The members of an object. Raises BadRequest for a name that stands twice.

    Parsers differ in which of two they take, and what is checked here must be what is obeyed there.
    """
    members = {next(name): value for name, value in found.items()}
    if len(members) < len(found):
        twice = cut(Counter(map(next, found)).most_common(1)[0][0])
        raise BadRequest(f"{twice} stands twice in one object, expected once", param=twice)
    return members


def _bounded() -> Callable[..., repeat[str]]:
    """A hook that gives up: 32 MiB of small members would hold the event loop for seconds."""
    names = count(1)

    def name(box: type[repeat[str]], text: str) -> repeat[str]:
        if next(names) > MAX_MEMBERS:
            raise BadRequest(f"an object has more than {MAX_MEMBERS} members, expected at most so many")
        return box(text)

    return name


def _check_utf8(body: bytes) -> None:
    view, start = memoryview(body), 0
    while start < len(view):
        final = start + _STEP >= len(view)
        try:
            start += codecs.utf_8_decode(view[start : start + _STEP], "strict", final)[1]
        except UnicodeDecodeError as wrong:
            told = f"{wrong.reason} (byte {start + wrong.start})"
            raise BadRequest(f"the body is not UTF-8: {told}, expected a JSON object") from None


def _check_blanks(body: bytes) -> None:
    """Nowhere twice MAX_BLANK of white space; of less than that once, nothing is told."""
    for start in range(0, len(body) - MAX_BLANK + 1, MAX_BLANK):
        if body[start : start + 64].isspace() and body[start : start + MAX_BLANK].isspace():
            raise BadRequest(f"the body has more than {MAX_BLANK} bytes of white space in one place")


_EVERY = 509  # th byte tells how dense a body is; a prime, so that no pattern of a program's making hides in it


def _check_width(body: bytes) -> None:
    """No more than MAX_VALUES, as judged by a sample, and by both ends of the body.

    Counting would cost more than parsing does. The sample takes a prompt that holds a table for many values; of the
    ends it is known what stands outside of strings.
    """
    if _marks(body[::_EVERY]) * _EVERY <= MAX_VALUES:
        return
    ends = (_unescaped(body[:_LARGE])[::2], _unescaped(body[-_LARGE:])[::-2])
    if any(_marks(b" ".join(end)) * len(body) > MAX_VALUES * _LARGE for end in ends):
        raise BadRequest(f"the body has more than {MAX_VALUES} values, expected at most so many")


def _marks(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _unescaped(text: bytes) -> list[bytes]:
    """What stands between the quotes of a JSON text, in turns outside and inside of its strings."""
    return text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')


def _has_more(text: bytes, most: int) -> bool:
    """Whether a JSON text has more values than so many, as told by the commas and brackets outside its strings."""
    number, inside, rest = 0, 0, b""
    for begin in range(0, len(text), _LARGE):
        piece = rest + text[begin : begin + _LARGE]
        rest = b"\\" if (len(piece) - len(piece.rstrip(b"\\"))) % 2 else b""  # its letter comes with the next piece
        parts = _unescaped(piece[: len(piece) - len(rest)])
        number += _marks(b"".join(parts[inside::2]))
        inside = (inside + len(parts) - 1) % 2
        if number > most:
            return True
    return False


# — telling

_EXTRA = "Extra inputs are not permitted"  # with the field's name in the API's own words: SDKs match them
_QUOTE, _NULL = b'"n'
_KINDS = {_QUOTE: "a string", ord("["): "an array", ord("{"): "an object"}


def cut(found: object, size: int = _SHOWN) -> str:
    """What was found, in at most `size` characters."""
    text = str(found)
    return text if len(text) <= size else text[:size] + "…"


def placed(problem: Problem) -> Problem:
    """The same problem with its place in its text."""
    extra = problem.msg is _EXTRA
    text = f"{_EXTRA}, field: '{problem.path}'" if extra else f"{problem.path}: {problem.msg}"
    return Problem(problem.loc, text, problem.type)


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


# — kinds of members: small values, decoded


def _or_null(expected: str, null: bool) -> str:
    return f"{expected} or null" if null else expected


def _any_of(schema: Document, null: bool) -> Document:
    if not null:
        return schema
    return {"anyOf": [*(schema["anyOf"] if set(schema) == {"anyOf"} else [schema]), {"type": "null"}]}


def leaf(expected: str, kind: Any, *, null: bool = True, shown: bool = False) -> Member:
    """A member that msgspec checks as it decodes: true is no integer, 1.0 neither, and integers have any size."""
    read = Decoder(kind | None if null else kind).decode
    return Member(_or_null(expected, null), _any_of(msgspec.json.schema(kind), null), read, shown)


def number(low: float | None = None, high: float | None = None) -> Member:
    span = "" if low is None else f" from {low} to {high}"
    return leaf(f"a number{span}", Annotated[float, Meta(ge=low, le=high)], shown=True)


def integer(low: int | None = None, high: int | None = None, *, null: bool = True) -> Member:
    span = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
    return leaf(f"an integer{span}", Annotated[int, Meta(ge=low, le=high)], null=null, shown=True)


def boolean(*, null: bool = True) -> Member:
    return leaf("a boolean", bool, null=null, shown=True)


def text(*, null: bool = True) -> Member:
    return leaf("a string", str, null=null)


def texts(most: int | None = None) -> Member:
    span = "" if most is None else f" of at most {most} strings"
    return leaf(f"an array{span or ' of strings'}", Annotated[list[str], Meta(max_length=most)])


def one_of(*words: str, null: bool = True) -> Member:
    literal: Any = Literal
    return leaf(" or ".join(f'"{word}"' for word in words), literal[words], null=null, shown=True)


def mapping(expected: str, kind: Any, *, each: str | None = None) -> Member:
    """An object of any names whose values are of one kind; with `each`, what is wrong is told by its name."""
    decode = _boxing(kind).decode

    def read(raw: Raw) -> dict[str, Any]:
        try:
            return _unboxed(decode(raw))
        except ValidationError:
            if each is None or _first(raw) != ord("{"):
                raise
        member = leaf(each, kind, null=False)
        rows = Schema(dict.fromkeys(given := _opened(raw), member))
        raise Invalid(rows.check(given.items(), closed=True)[1][:_TOLD])

    return _nullable(expected, msgspec.json.schema(dict[str, kind]), read)


def _nullable(expected: str, schema: Document, read: Callable[[Raw], Any], most: int = MAX_DECODED) -> Member:
    def read_or_null(raw: Raw) -> Any:
        return None if _first(raw) == _NULL else read(raw)

    return Member(_or_null(expected, True), _any_of(schema, True), read_or_null, most=most)


# — kinds of members: objects


def shape(expected: str, schema: Schema) -> Member:
    """An object with a table of its own."""
    return _nullable(expected, schema.document(), schema.read, MAX_OBJECT)


def tagged(tag: str, **variants: Schema) -> Member:
    """An object whose member `tag` names the schema that holds for it."""
    kind = one_of(*variants, null=False)
    opened = Schema({tag: kind}, required=(tag,), closed=False)
    schemas = {
        name: Schema({tag: one_of(name, null=False), **own.members}, (tag, *own.required))
        for name, own in variants.items()
    }

    def read(raw: Raw) -> Values:
        given = _opened(raw)
        try:
            schema = schemas[kind.read(given[tag])]
        except (KeyError, DecodeError):
            schema = opened
        return schema.obeyed(given)

    document = {"oneOf": [schema.document() for schema in schemas.values()]}
    return _nullable(f"an object with {tag} {kind.expected}", document, read, MAX_OBJECT)


# — kinds of members: large values, looked at and not decoded

_TYPES = {"string": b'"', "array": b"[", "object": b"{"}
_FILLED = re.compile(rb"\[\s*[^\s\]]")


def raw(expected: str, *types: str, null: bool = True) -> Member:
    """A value of any size whose first byte tells all that is asked of it; what it holds is between caller and model."""
    allowed = b"".join(_TYPES[kind] for kind in types)

    def read(value: Raw) -> Raw | None:
        first = _first(value)
        if first in allowed:
            return value
        if null and first == _NULL:
            return None
        raise ValidationError("another type")

    schema = {"anyOf": [{"type": kind} for kind in types]} if len(types) > 1 else {"type": types[0]}
    return Member(_or_null(expected, null), _any_of(schema, null), read, most=sys.maxsize)


def prose(*, null: bool = True) -> Member:
    return raw("a string", "string", null=null)


def filled(expected: str) -> Member:
    """An array of any size with something in it."""

    def read(value: Raw) -> Raw:
        if _FILLED.match(memoryview(value)) is None:
            raise ValidationError("no such array")
        return value

    return Member(expected, {"type": "array", "minItems": 1}, read, most=sys.maxsize)


class Prompts(NamedTuple):
    """How many prompts are asked, and how much is in them: bytes of text, or tokens that were counted."""

    number: int
    size: int  # of text as JSON writes it, which is never shorter than the text itself
    tokens: int | None = None  # None where it is text


_ITEM = re.compile(rb"\[\s*([^\s\]])")  # an array with something in it, and the something's first byte
_EMPTY = re.compile(rb"\[\s*\]")
_AFTER_ARRAY = re.compile(rb"\]\s*,\s*(\S)")
_ITEMS = Decoder(list[Raw])
_NO_INTEGER = (b'"', b"{", b".", b"e", b"E", b"l")  # one of these is in every other value: 1_._0, fals_e_, nul_l_


def _items(value: Raw) -> list[Raw]:
    """The items of an array, which are at most MAX_PROMPTS. Raises BadRequest before a million of them are made."""
    if len(value) > _LARGE:
        array, comma = bytes(value), -1
        for _ in range(MAX_PROMPTS):
            comma = array.find(b",", comma + 1)
            if comma < 0:
                break
        else:
            if _has_more(array, MAX_PROMPTS):  # commas and the array's own bracket: as many as items
                raise _too_many()
    items = _ITEMS.decode(value)
    if len(items) > MAX_PROMPTS:
        raise _too_many()
    return items


def _too_many() -> BadRequest:
    return BadRequest(f"an array has more than {MAX_PROMPTS} items, expected at most so many")


def _prompts(value: Raw) -> Prompts:
    if _first(value) == _QUOTE:
        return Prompts(1, len(value) - 2)
    item = _ITEM.match(memoryview(value))
    if item is not None and item[1] == b'"':
        texts = _items(value)
        _check_all(texts, _QUOTE)
        return Prompts(len(texts), sum(map(len, texts)) - 2 * len(texts))
    numbers = bytes(value)
    if item is None or item[1] != b"[":
        return Prompts(1, 0, _tokens(numbers, 1))
    prompts = numbers.count(b"[") - 1
    if prompts > MAX_PROMPTS:
        raise _too_many()
    tokens = _tokens(numbers, prompts + 1)
    # An array stands after each array but the last, and nowhere else.
    if _AFTER_ARRAY.findall(numbers) != [b"["] * (prompts - 1):
        raise ValidationError("arrays and integers are mixed")
    return Prompts(prompts, 0, tokens)


def _check_all(items: list[Raw], first: int) -> None:
    if not all(memoryview(item)[0] == first for item in items):
        raise ValidationError("items of other types")


def _tokens(numbers: bytes, arrays: int) -> int:
    """How many integers there are in so many arrays. Scanned, not decoded: a million tokens in 4 ms instead of 45."""
    if numbers.count(b"[") != arrays or _EMPTY.search(numbers) or any(mark in numbers for mark in _NO_INTEGER):
        raise ValidationError("not arrays of integers")
    return numbers.count(b",") + 1


def _documents(value: Raw) -> Prompts:
    items = _items(value)
    if not items:
        raise ValidationError("none")
    return Prompts(len(items), sum(map(len, items)))


DOCUMENTS = Member(
    "an array with at least one document",
    {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS},
    _documents,
    most=sys.maxsize,
)

_STRINGS: Document = {"type": "array", "items": {"type": "string"}, "maxItems": MAX_PROMPTS}
_INTEGERS: Document = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
PROMPTS = Member(
    "a string or a non-empty array of strings, of integers, or of non-empty integer arrays",
    {
        "anyOf": [
            {"type": "string"},
            {**_STRINGS, "minItems": 1},
            _INTEGERS,
            {"type": "array", "items": _INTEGERS, "minItems": 1, "maxItems": MAX_PROMPTS},
        ]
    },
    _prompts,
    most=sys.maxsize,
)


def _speculation(value: Raw) -> Raw:
    if _first(value) != _QUOTE and _EMPTY.fullmatch(memoryview(value)) is None:
        _tokens(bytes(value), 1)
    return value


SPECULATION = _nullable(
    "a string, an array of integers",
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    _speculation,
    sys.maxsize,
)


# — images, and the marks that stand for them in a prompt


@dataclass(frozen=True, slots=True)
class Images:
    """How many images there are: of the one prompt, or of each where they are nested."""

    numbers: tuple[int, ...]
    nested: bool = False


def _strings(value: Raw) -> int:
    items = _items(value)
    _check_all(items, _QUOTE)
    return len(items)


def _flat_images(value: Raw) -> Images:
    return Images((_strings(value),))


def _images(value: Raw) -> Images:
    item = _ITEM.match(memoryview(value))
    if item is None or item[1] != b"[":
        return _flat_images(value)
    lists = _items(value)
    _check_all(lists, ord("["))
    return Images(tuple(map(_strings, lists)), nested=True)


FLAT_IMAGES = _nullable("an array of strings", _STRINGS, _flat_images, sys.maxsize)
IMAGES = _nullable(
    "an array of strings, an array of arrays of strings",
    {"anyOf": [_STRINGS, {"type": "array", "items": _STRINGS, "maxItems": MAX_PROMPTS}]},
    _images,
    sys.maxsize,
)

# Go's encoder escapes both brackets. Backslashes that stand for themselves go first, with what they would begin.
_UNESCAPED = ((rb"\\", b"  "), (rb"\u003c", b"<"), (rb"\u003C", b"<"), (rb"\u003e", b">"), (rb"\u003E", b">"))


def _image_marks(prompt: Raw) -> int:
    written = bytes(prompt)
    if rb"\u003" in written:
        for escaped, plain in _UNESCAPED:
            written = written.replace(escaped, plain)
    return written.count(b"<image>")


def unmatched_images(images: Images, prompt: Raw) -> Iterator[Problem]:
    """Where a prompt of text, or several, have marks, but not as many as there are images for them. Without marks none
    is missed."""
    if not any(images.numbers):
        return
    texts = [prompt] if _first(prompt) == _QUOTE else _items(prompt)
    marks = [_image_marks(item) for item in texts]
    if images.nested and len(images.numbers) != len(marks):
        if any(marks):
            yield Problem(("images",), f"found {len(images.numbers)} arrays for {len(marks)} prompts, expected as many")
    elif images.nested or len(marks) == 1:
        for i, (found, expected) in enumerate(zip(images.numbers, marks, strict=True)):
            if expected and found != expected:
                place = ("images", i) if images.nested else ("images",)
                told = f"found {found} for a prompt with {expected} <image> marks, expected as many"
                yield Problem(place, told)


# — predicted outputs: read as the JSON string that `speculation` takes in their place


def prediction(*media: str, closed: bool = True) -> Member:
    """A string, or an object whose content is text; parts may have the members of `media`, with nothing in them."""
    nothing = leaf("null, only text can be predicted", None, null=False)
    part = Schema(
        {"type": one_of("text", null=False), "text": prose(null=False), **dict.fromkeys(media, nothing)},
        required=("type", "text"),
        closed=closed,
    )
    parts = Member("an object with type and text", part.document(), part.read)
    content = Member(
        f"a string or an array of at most {MAX_PARTS} text parts",
        {"anyOf": [{"type": "string"}, {"type": "array", "items": parts.schema, "maxItems": MAX_PARTS}]},
        lambda value: bytes(value) if _first(value) == _QUOTE else _joined(value, parts),
        most=sys.maxsize,
    )
    predicted = Schema(
        {"type": one_of("content", null=False), "content": content}, required=("content",), closed=closed
    )

    def read(value: Raw) -> bytes:
        written: bytes = bytes(value) if _first(value) == _QUOTE else predicted.read(value)["content"]
        return written

    schema = {"anyOf": [{"type": "string"}, predicted.document()]}
    return _nullable("a string, a predicted output", schema, read, sys.maxsize)


def _joined(value: Raw, member: Member) -> bytes:
    """The texts of parts as one JSON string. Written strings are joined as they are: an escape does not end in two."""
    written: list[bytes] = []
    problems: list[Problem] = []
    parts = _items(value)
    if len(parts) > MAX_PARTS:
        raise ValidationError("too many parts")
    for i, part in enumerate(parts):
        try:
            written.append(bytes(member.read(part)["text"])[1:-1])
        except (DecodeError, Invalid) as wrong:
            problems += _problems(wrong, i, part, member)
    if problems:
        raise Invalid(problems[:_TOLD])
    return b'"%b"' % b"".join(written)

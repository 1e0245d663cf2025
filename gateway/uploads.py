"""Request bodies that are passed on as they come: forms, of which the head is read, and bodies that nobody looks into.

A body has one reader at a time. Until it has begun to be passed on nobody reads it, and TCP lets the caller wait; then
whoever iterates over the Upload does; and once that has ended, `Upload.after` does, to hear that the caller has left.
So a caller who leaves before his body was taken is noticed when the next piece of it is asked for.

A form is not trusted: its model decides about permission and price, and a backend may read it with another parser than
ours. So a form must be written as RFC 7578 has it, where all parsers agree: whatever else looks like a boundary or like
a second model is refused, to the last byte, and the model's value is replaced by the one that was decided on. What a
refusal cuts off has no end, neither by its length nor by its chunks, and so no backend takes it for whole.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

from gateway.asgi import TOKEN, Message, RawHeaders, Receive, Scope, announced_length, header
from gateway.errors import BadRequest, ClientGone, Invalid, Problem, TooLarge

_PIECE = 64 * 1024  # bytes of a piece that is replayed, and of a form's head that are held in memory
_HEAD = 8 * 1024  # bytes of the headers of one part
_MODEL = 200  # bytes of the model's name
_FIELD = 1024  # bytes of another field that is remembered
_FIELDS = 64  # fields that are remembered
_PARTS = 1000  # Starlette's limit, for each kind

_WHITE = rb"[ \t]*+"  # without a way back: two of them in a row would take the square of their time
_VALUE = rb'(?:%b|"(?:[^"\\]|\\[^"])*")' % TOKEN  # its first quote ends it, for those who know of \" and for others
_PARAMETER = re.compile(rb"%b;%b(%b)=(%b)" % (_WHITE, _WHITE, TOKEN, _VALUE))
_REST = rb"((?:%b;%b%b=%b)*)%b;?%b" % (_WHITE, _WHITE, TOKEN, _VALUE, _WHITE, _WHITE)
_FORM = re.compile(rb"multipart/form-data" + _REST, re.IGNORECASE)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046 section 5.1.1
_LINE = re.compile(rb"(%b):%b([^\x00-\x08\x0a-\x1f\x7f]*)" % (TOKEN, _WHITE))
_NAME = rb'name=(?:"([0-9A-Za-z_.:\[\]-]+)"|([0-9A-Za-z_.-]+))'
_DISPOSITION = re.compile(rb"form-data%b;%b" % (_WHITE, _WHITE) + _NAME + _REST, re.IGNORECASE)
_LIKE_MODEL = re.compile(r"model(?:\[.*)?", re.IGNORECASE)


class _Coming:
    """A body as it comes. `length` is None where the caller sends chunks; `over`: nobody passes it on any more."""

    def __init__(self, scope: Scope, receive: Receive, at_most: int) -> None:
        self.length = announced_length(scope["headers"], at_most)
        if self.length is None and header(scope["headers"], b"transfer-encoding") is None:
            self.length = 0
        self.ended = self.length == 0
        self.over = asyncio.Event()
        if self.ended:
            self.over.set()
        self._receive = receive
        self._at_most = at_most
        self._read = 0

    async def next(self) -> bytes:
        """The next piece, which may be empty. Raises ClientGone, TooLarge."""
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        self._read += len(piece)
        if self._read > self._at_most:
            raise TooLarge(f"the body has more than {self._at_most} bytes, at most so many are read")
        if self._read == self.length or not message.get("more_body", False):
            self.ended = True
            self.over.set()
        return piece

    async def after(self) -> Message:
        await self.over.wait()
        while self._read <= self._at_most:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._read += len(message.get("body", b""))
        unheard: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await unheard  # nobody reads on


class Upload:
    """A request body that is passed on as it comes: iterating gives its pieces, once.

    `length` is how many bytes that will be, or None where the caller sends chunks. Raises TooLarge at once where the
    caller says so; iterating raises it, too, and ClientGone.
    """

    def __init__(self, scope: Scope, receive: Receive, at_most: int) -> None:
        self._join(_Coming(scope, receive, at_most))

    def _join(self, coming: _Coming) -> None:
        self._coming = coming
        self.length = coming.length
        self.begun = False  # whether a piece was given out, so that nobody else can be sent the whole
        self.passed = 0  # bytes that were given out

    def __repr__(self) -> str:
        state = "finished" if self.finished else "begun" if self.begun else "waiting"
        return f"<Upload of {'chunks' if self.length is None else self.length}, {state}>"

    @property
    def finished(self) -> bool:
        """Whether all of it has come from the caller."""
        return self._coming.ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.begun:
            raise RuntimeError("a body is passed on once")
        try:
            for piece in self._before():
                self.begun = True
                self.passed += len(piece)
                yield piece
            while not self.finished:
                piece = await self._coming.next()
                self._look(piece)
                if piece:
                    self.begun = True
                    self.passed += len(piece)
                    yield piece
        finally:
            if self.begun:
                self._coming.over.set()

    def _before(self) -> Iterable[bytes]:
        """What was read already."""
        return ()

    def _look(self, piece: bytes) -> None:
        """See whether a piece may pass."""

    def give_up(self) -> None:
        """Nobody passes it on any more, whether it has begun or not: an upstream has answered, or none will."""
        self._coming.over.set()

    async def after(self) -> Message:
        """What receive() says when the body is over: that the caller has left. It stands in for receive() from then on.

        Over is a body that has come whole, or was given up, or whose iteration has ended before. What then comes of the
        rest is dropped: so the caller is heard when he leaves, and one who reads only what he is answered after he has
        sent everything gets there. Beyond what may be read in all, reading ends, and such a caller is noticed when he
        does not take his answer.
        """
        return await self._coming.after()


class Form:
    """A form whose head was read: its `model`, and the short text `fields` that stand before its first file.

    Where a file stands before the model, the fields up to the next file count.
    """

    def __init__(self, coming: _Coming, scanner: Scanner, head: IO[bytes], model: Part) -> None:
        self.model = _text(model)
        self.fields = scanner.fields
        self._coming = coming
        self._scanner = scanner
        self._head = head
        self._part = model

    def upload(self, model: str) -> Upload:
        """The form as it came, with this model in the place of its own. One of them is passed on."""
        name = model.encode()
        return _FormUpload(self._coming, self, name, len(name) - (self._part.end - self._part.start))

    def passed(self, model: bytes) -> Iterator[bytes]:
        """What was read, with another model."""
        yield from self._between(0, self._part.start)
        yield model
        yield from self._between(self._part.end, None)
        self.close()

    def look(self, piece: bytes) -> None:
        """See whether what follows may pass."""
        self._scanner.feed(piece)
        if self._coming.ended:
            self._scanner.close()

    def close(self) -> None:
        """Let go of what was read: waiting for the collector, many files would be open."""
        self._head.close()

    def _between(self, start: int, end: int | None) -> Iterator[bytes]:
        while piece := self._read(start, _PIECE if end is None else min(_PIECE, end - start)):
            start += len(piece)
            yield piece

    def _read(self, start: int, size: int) -> bytes:
        self._head.seek(start)
        return self._head.read(size)


class _FormUpload(Upload):
    def __init__(self, coming: _Coming, form: Form, model: bytes, more: int) -> None:
        self._form = form
        self._model = model
        self._join(coming)
        if self.length is not None:
            self.length += more

    def _before(self) -> Iterable[bytes]:
        yield from self._form.passed(self._model)

    def _look(self, piece: bytes) -> None:
        self._form.look(piece)

    def give_up(self) -> None:
        super().give_up()
        self._form.close()


async def read_form(scope: Scope, receive: Receive, at_most: int) -> Form:
    """The form in a request, as soon as its model is known. Raises BadRequest, Invalid, TooLarge and ClientGone.

    What was read is kept for its upload: in memory, and beyond 64 KiB in a file that has no name.
    """
    scanner = Scanner(_boundary(scope["headers"]))
    coming = _Coming(scope, receive, at_most)
    head = tempfile.SpooledTemporaryFile(max_size=_PIECE)  # noqa: SIM115 - it ends with the body
    weakref.finalize(coming, head.close)
    while not scanner.headed and not coming.ended:
        piece = await coming.next()
        scanner.feed(piece)
        head.write(piece)
    if coming.ended:
        scanner.close()
    if scanner.model is None:
        raise Invalid([Problem(("model",), "model: is missing, expected a string", "missing")])
    return Form(coming, scanner, head, scanner.model)


def _boundary(headers: RawHeaders) -> bytes:
    """What separates the parts of a form. Parsers must agree on it, so it is given once, and as the RFC has it."""
    given = [value for name, value in headers if name == b"content-type"]
    kind = given[0].partition(b";")[0].strip() if given else b""
    if len(given) != 1 or kind.lower() != b"multipart/form-data":
        found = f"{len(given)} of them" if len(given) > 1 else ascii(kind[:80].decode("latin-1")) if given else "none"
        raise _wrong(f"the Content-Type is {found}, expected multipart/form-data with a boundary")
    form = _FORM.fullmatch(given[0])
    parameters = _PARAMETER.findall(form[1]) if form else []
    boundaries = [(name.lower(), value) for name, value in parameters if name.lower().startswith(b"boundary")]
    if len(boundaries) == 1:
        ((name, value),) = boundaries
        boundary: bytes = value.strip(b'"')
        if name == b"boundary" and _BOUNDARY.fullmatch(boundary):
            return boundary
    raise _wrong(
        f"the Content-Type has {len(boundaries)} boundaries that can be read or are too odd, "
        "expected multipart/form-data; boundary= with 1 to 70 letters, digits and -"
    )


@dataclass(slots=True)
class Part:
    """One part of a form: where its value stands in the bytes of the form, and the beginning of it."""

    name: str
    is_file: bool
    start: int
    end: int = -1  # until it is known
    value: bytearray = field(default_factory=bytearray)  # nothing of a file


class Scanner:
    """Finds the parts of a form, however its bytes are split. It holds the headers of one part at most.

    Raises BadRequest for what is not written as all parsers read it, and for a model that is there twice.
    """

    def __init__(self, boundary: bytes) -> None:
        self.model: Part | None = None  # once it is complete
        self.fields: dict[str, str] = {}  # of those that are complete, as long as the head comes
        self.headed = (
            False  # whether the head is over: the model has come, and a file follows it; or the form has ended
        )
        self._names_model = False  # whether a part of that name has begun
        self._mark = b"--" + boundary
        self._state: Literal["body", "mark", "head", "closed"] = "body"
        self._part: Part | None = None  # None: what comes stands before the first one, or is between two
        self._number = 0  # of the part
        self._held = b"\r\n"  # what must be looked at again, none of it from before `_state`; a form begins like a line
        self._offset = -2  # where that stands

    def feed(self, piece: bytes) -> None:
        data = self._held + piece
        at: int | None = 0
        while at is not None:
            at = self._steps[self._state](self, data, at)

    def close(self) -> None:
        """The body has ended. Raises BadRequest if the form has not."""
        if self._state != "closed":
            raise _wrong("the form ends within a part, expected a last boundary followed by --")

    # — one step: where the next one begins, or None where more must come

    def _body(self, data: bytes, at: int) -> int | None:
        found = data.find(self._mark, at)
        if found < 0:
            kept = max(at, len(data) - len(self._mark) - 1)
            self._value(data, at, kept)
            return self._wait(data, kept)
        if data[max(at, found - 2) : found] != b"\r\n":
            raise _wrong("the boundary stands within a line, expected it nowhere but between parts")
        self._value(data, at, found - 2)
        self._complete(self._offset + found - 2)
        return self._go("mark", found + len(self._mark))

    def _mark_end(self, data: bytes, at: int) -> int | None:
        follows = data[at : at + 2]
        if len(follows) < 2:
            return self._wait(data, at)
        if follows == b"--":
            self.headed = True
            return self._go("closed", at + 2)
        if follows != b"\r\n":
            raise _wrong("a boundary is followed by something else than the end of its line")
        self._number += 1
        if self._number > _PARTS:
            raise _wrong(f"the form has more than {_PARTS} parts")
        return self._go("head", at)

    def _headers(self, data: bytes, at: int) -> int | None:
        end = data.find(b"\r\n\r\n", at, at + _HEAD + 4)
        if end < 0:
            if len(data) - at >= _HEAD + 4:
                raise _wrong(f"part {self._number} of the form has headers of more than {_HEAD} bytes")
            return self._wait(data, at)
        name, is_file = self._read_head(data[at + 2 : end])
        if _LIKE_MODEL.fullmatch(name):
            if name != "model" or is_file or self._names_model:
                raise _wrong(f"part {self._number} of the form is a second model or no text, expected one named model")
            self._names_model = True
        self._part = Part(name, is_file, self._offset + end + 4)
        self.headed = self.headed or (is_file and self.model is not None)
        return self._go("body", end + 4)

    def _closed(self, data: bytes, at: int) -> int | None:
        if data.find(self._mark, at) >= 0:
            raise _wrong("the form goes on after its last boundary")
        return self._wait(data, max(at, len(data) - len(self._mark) + 1))

    _steps = {"body": _body, "mark": _mark_end, "head": _headers, "closed": _closed}  # noqa: RUF012

    def _go(self, state: Literal["body", "mark", "head", "closed"], at: int) -> int:
        self._state = state
        return at

    def _wait(self, data: bytes, kept: int) -> int | None:
        self._held = data[kept:]
        self._offset += kept
        return None

    # — parts

    def _read_head(self, block: bytes) -> tuple[str, bool]:
        """The name of a part, and whether it is a file."""
        where = f"part {self._number} of the form"
        lines = [_LINE.fullmatch(line) for line in block.split(b"\r\n")]
        fields = [(line[1].lower(), line[2].strip()) for line in lines if line]
        if len(fields) < len(lines) or self._mark in block:
            raise _wrong(f"{where} has a header that cannot be read, expected lines of a name, a colon and a value")
        dispositions = [value for name, value in fields if name == b"content-disposition"]
        found = _DISPOSITION.fullmatch(dispositions[0]) if len(dispositions) == 1 else None
        others = [name.lower() for name, _ in _PARAMETER.findall(found[3])] if found else []
        if found is None or any(name.partition(b"*")[0] == b"name" for name in others):
            raise _wrong(f'{where} is not named as expected: Content-Disposition: form-data; name="…", once')
        for name, value in fields:
            odd = value.lower() not in (b"7bit", b"8bit", b"binary")
            if (name == b"content-transfer-encoding" and odd) or (
                name == b"content-type" and value.lower().startswith(b"multipart/")
            ):
                raise _wrong(f"{where} is encoded or has parts itself, expected its bytes as they are")
        is_file = any(name.partition(b"*")[0] == b"filename" for name in others)
        return (found[1] or found[2]).decode("ascii"), is_file

    def _value(self, data: bytes, at: int, end: int) -> None:
        """More of the part's value has come."""
        part = self._part
        if part is None or part.is_file or end <= at:
            return
        most = _MODEL if part.name == "model" else _FIELD
        part.value += data[at : min(end, at + most + 1 - len(part.value))]
        if part.name == "model" and len(part.value) > _MODEL:
            raise _wrong(f"the model has more than {_MODEL} bytes")

    def _complete(self, end: int) -> None:
        part, self._part = self._part, None
        if part is None or part.is_file:
            return
        part.end = end
        if part.name == "model":
            _text(part)
            self.model = part
        elif not self.headed and len(part.value) <= _FIELD and len(self.fields) < _FIELDS:
            self.fields[part.name] = part.value.decode(errors="replace")


def _text(part: Part) -> str:
    try:
        return part.value.decode()
    except UnicodeDecodeError as broken:
        raise _wrong(f"{part.name} is not UTF-8, expected text") from broken


def _wrong(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_form")

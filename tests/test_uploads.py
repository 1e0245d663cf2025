"""Bodies that are passed on as they come: what passes, what is refused, and who reads when."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.asgi import Message, Receive, Scope, Send, respond, until_hang_up
from gateway.errors import BadRequest, ClientGone, GatewayError, Invalid, TooLarge
from gateway.uploads import Form, Scanner, Upload, read_form
from gateway.wire import Reply, Wire
from tests.proving.backend import Backend, Peer, ok
from tests.proving.house import served

BOUNDARY = b"xyz"
TYPE = b"multipart/form-data; boundary=xyz"
MOST = 10_000_000


def scope(length: int | None, *fields: tuple[bytes, bytes]) -> Scope:
    """A request's scope; without a length its body comes in chunks."""
    framing = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
    return {"type": "http", "method": "POST", "headers": [framing, *fields]}


class Caller:
    """Sends a body in pieces and then leaves, when he is let. `asked` counts how often he was asked for more."""

    def __init__(self, *pieces: bytes, last: bool = True) -> None:
        self.asked = 0
        self.leaves = asyncio.Event()
        self._left: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        self._left[-1]["more_body"] = not last
        self._asking = False

    async def receive(self) -> Message:
        assert not self._asking, "two read at a time"
        self._asking = True
        try:
            self.asked += 1
            await asyncio.sleep(0)
            if self._left:
                return self._left.pop(0)
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        finally:
            self._asking = False


async def gone() -> Message:
    return {"type": "http.disconnect"}


async def all_of(upload: Upload) -> bytes:
    return b"".join([piece async for piece in upload])


# — bodies that nobody looks into


@pytest.mark.parametrize("length", [6, None])
async def test_a_body_passes_piece_by_piece_and_is_asked_for_only_when_it_is_wanted(length: int | None) -> None:
    caller = Caller(b"abc", b"", b"de", b"f")
    upload = Upload(scope(length), caller.receive, MOST)
    assert (upload.length, upload.begun, upload.finished, caller.asked) == (length, False, False, 0)
    pieces = aiter(upload)
    assert (await anext(pieces), caller.asked, upload.begun, upload.finished) == (b"abc", 1, True, False)
    assert (await anext(pieces), caller.asked) == (b"de", 3)
    assert (await anext(pieces), upload.finished) == (b"f", True)
    assert (await anext(pieces, None), caller.asked) == (None, 4)


async def test_a_body_of_a_known_length_has_ended_with_its_last_byte() -> None:
    caller = Caller(b"abc", b"def", b"")
    upload = Upload(scope(6), caller.receive, MOST)
    assert (await all_of(upload), caller.asked) == (b"abcdef", 2)


async def test_a_request_without_a_body_has_one_of_no_bytes() -> None:
    caller = Caller(b"")
    upload = Upload({"type": "http", "headers": []}, caller.receive, MOST)
    assert (upload.length, upload.finished, await all_of(upload), upload.begun) == (0, True, b"", False)
    assert caller.asked == 0


async def test_a_body_that_has_begun_is_not_passed_on_again() -> None:
    upload = Upload(scope(6), Caller(b"abc", b"def").receive, MOST)
    await anext(aiter(upload))
    with pytest.raises(RuntimeError, match="once"):
        await all_of(upload)


async def test_a_body_of_which_nothing_was_given_out_can_be_sent_elsewhere() -> None:
    caller = Caller(b"abcdef")
    upload = Upload(scope(6), caller.receive, MOST)
    first = asyncio.ensure_future(anext(aiter(upload)))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not upload.begun
    assert await all_of(upload) == b"abcdef"


async def test_a_body_over_the_cap_is_refused_before_it_is_read_where_the_caller_says_its_length() -> None:
    with pytest.raises(TooLarge, match="has 7 bytes, at most 6"):
        Upload(scope(7), Caller(b"abcdefg").receive, 6)
    with pytest.raises(TooLarge):
        Upload({"headers": [(b"content-length", b"9" * 10_000)]}, gone, 6)
    assert Upload(scope(6), gone, 6).length == 6


async def test_chunks_over_the_cap_are_refused_when_they_come() -> None:
    upload = Upload(scope(None), Caller(b"abc", b"def", b"g").receive, 6)
    pieces = aiter(upload)
    assert [await anext(pieces), await anext(pieces)] == [b"abc", b"def"]
    with pytest.raises(TooLarge, match="more than 6"):
        await anext(pieces)


async def test_a_caller_who_leaves_in_the_middle_is_told_to_who_reads() -> None:
    caller = Caller(b"abc", last=False)
    caller.leaves.set()
    upload = Upload(scope(6), caller.receive, MOST)
    with pytest.raises(ClientGone):
        await all_of(upload)
    assert not upload.finished


def test_an_upload_tells_its_state() -> None:
    assert repr(Upload(scope(6), gone, MOST)) == "<Upload of 6, waiting>"
    assert repr(Upload(scope(0), gone, MOST)) == "<Upload of 0, finished>"


# — the end of it


async def test_who_leaves_after_his_body_is_heard_and_not_before_it_was_read() -> None:
    caller = Caller(b"abc", b"def", b"")
    upload = Upload(scope(6), caller.receive, MOST)
    after = asyncio.ensure_future(upload.after())
    await asyncio.sleep(0.01)
    assert caller.asked == 0
    assert await all_of(upload) == b"abcdef"
    await asyncio.sleep(0.01)
    assert not after.done()
    caller.leaves.set()
    assert (await after)["type"] == "http.disconnect"


async def test_what_comes_of_a_body_that_was_given_up_is_dropped_until_the_caller_leaves() -> None:
    caller = Caller(b"a", *[b"rest"] * 100)
    upload = Upload(scope(401), caller.receive, MOST)
    after = asyncio.ensure_future(upload.after())
    pieces: Any = aiter(upload)
    await anext(pieces)
    await pieces.aclose()
    caller.leaves.set()
    assert (await after)["type"] == "http.disconnect"
    assert caller.asked == 102
    assert not upload.finished


async def test_no_more_is_dropped_than_could_have_been_read() -> None:
    caller = Caller(*[b"four"] * 100, last=False)
    upload = Upload(scope(None), caller.receive, 10)
    with pytest.raises(TooLarge):
        await all_of(upload)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(upload.after(), 0.05)
    assert caller.asked == 3


async def test_a_body_that_waits_for_an_upstream_is_not_read_by_who_listens() -> None:
    """Iterating may be cancelled before it has given anything, and goes on elsewhere: nobody else may have read."""
    caller = Caller(b"abcdef")
    upload = Upload(scope(6), caller.receive, MOST)
    async with until_hang_up(upload.after):
        first = asyncio.ensure_future(anext(aiter(upload)))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        assert await all_of(upload) == b"abcdef"


# — forms


def part(name: str, value: bytes, more: bytes = b"", *headers: bytes) -> bytes:
    lines = (b'Content-Disposition: form-data; name="%b"%b' % (name.encode(), more), *headers)
    return b"--xyz\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + value + b"\r\n"


def file(value: bytes, name: str = "file") -> bytes:
    return part(name, value, b'; filename="a.wav"', b"Content-Type: audio/wav")


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--xyz--\r\n"


MODEL = part("model", b"whisper")


def cut_at(body: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({min(place, len(body)) for place in places}), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


async def read(*pieces: bytes, kind: bytes = TYPE, known: bool = True) -> Form:
    length = len(b"".join(pieces)) if known else None
    return await read_form(scope(length, (b"content-type", kind)), Caller(*pieces).receive, MOST)


async def passed(pieces: Sequence[bytes], model: str = "whisper-1-large", *, known: bool = True) -> bytes:
    upload = (await read(*pieces, known=known)).upload(model)
    body = await all_of(upload)
    assert upload.length == (len(body) if known else None)
    assert upload.finished
    return body


async def test_a_form_is_the_callers_own_but_for_the_model() -> None:
    body = b"a preamble\r\n" + form(part("stream", b"true"), MODEL, file(bytes(100_000))) + b"an epilogue"
    read_here = await read(body)
    assert (read_here.model, read_here.fields) == ("whisper", {"stream": "true"})
    assert await passed([body]) == body.replace(b"\r\nwhisper\r\n", b"\r\nwhisper-1-large\r\n")


BYTES = st.binary(max_size=40) | st.sampled_from(
    [b"\r", b"\r\n", b"\r\n-", b"\r\n--xy", b"--", b"\r\n\r\n", b"x" * 70_000]
)
FILES = st.builds(file, BYTES, st.sampled_from(["file", "image", "image[]"]))
TEXTS = st.builds(part, st.sampled_from(["stream", "user", "language", "a.b-c"]), BYTES)


@given(
    before=st.lists(FILES | TEXTS, max_size=4),
    after=st.lists(FILES | TEXTS, max_size=4),
    known=st.booleans(),
    places=st.lists(st.integers(0, 600) | st.integers(0, 75_000), max_size=12),
)
async def test_a_form_passes_however_its_bytes_are_split(
    before: list[bytes], after: list[bytes], known: bool, places: list[int]
) -> None:
    body = form(*before, MODEL, *after)
    expected = form(*before, part("model", b"w"), *after)
    assert expected == await passed(cut_at(body, places), "w", known=known)
    whole, split = await read(body), await read(*cut_at(body, places))
    assert ("whisper", whole.fields) == (split.model, split.fields)


async def test_a_form_passes_byte_by_byte() -> None:
    body = form(part("user", b"\r\n--xy\r\n"), file(b"\r\n\r\n--\r\n-"), MODEL, file(b"--xy"))
    assert await passed([body[i : i + 1] for i in range(len(body))], "whisper") == body


# The heads of parts as clients write them.
WRITTEN = {
    "httpx": b'Content-Disposition: form-data; name="model"',
    "undici, curl": b'content-disposition:form-data;name="model"',
    ".NET": b"Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name=model",
    "Apache": b'Content-Disposition: form-data; name="model"\r\n'
    b"Content-Type: text/plain; charset=ISO-8859-1\r\nContent-Transfer-Encoding: 8bit",
    "capitals": b'CONTENT-DISPOSITION: FORM-DATA; NAME="model";',
}


@pytest.mark.parametrize("head", WRITTEN.values(), ids=WRITTEN)
async def test_a_model_is_found_however_clients_write_it(head: bytes) -> None:
    read_here = await read(b"--xyz\r\n" + head + b"\r\n\r\nwhisper\r\n--xyz--")
    assert read_here.model == "whisper"


@pytest.mark.parametrize(
    "more",
    [
        b'; filename="a.wav"',
        b"; filename=a.wav; filename*=utf-8''a.wav",
        b'; filename="C:\\\\a;.wav"',
        b"; filename*=x",
    ],
)
async def test_a_file_is_a_part_with_a_file_name(more: bytes) -> None:
    body = form(part("user", b"mine", more), MODEL)
    assert (await read(body)).fields == {}
    assert await passed([body], "whisper") == body


@pytest.mark.parametrize("step", [1, 1000, 1_000_000])
async def test_fields_count_up_to_the_file_that_follows_the_model(step: int) -> None:
    """Clients write them in any order and in a segment each: how the bytes are split must not decide what is known."""
    body = form(
        file(b"1"), MODEL, part("stream", b"true"), part("user", b"me"), file(bytes(1000)), part("user", b"late")
    )
    read_here = await read(*cut_at(body, range(0, len(body), step)))
    await all_of(read_here.upload("w"))
    assert read_here.fields == {"stream": "true", "user": "me"}


async def test_nothing_is_read_beyond_the_head_of_the_first_file() -> None:
    caller = Caller(MODEL + file(b"")[:-2], *[bytes(1000)] * 10, last=False)
    read_here = await read_form(scope(None, (b"content-type", TYPE)), caller.receive, MOST)
    assert (read_here.model, caller.asked) == ("whisper", 1)


async def test_fields_that_are_long_or_too_many_pass_and_are_not_remembered() -> None:
    many = [part(f"f{i}", b"x") for i in range(200)]
    body = form(part("prompt", b"x" * 1025), part("short", b"x" * 1024), *many, MODEL)
    fields = (await read(body)).fields
    assert ("prompt" in fields, len(fields["short"]), len(fields)) == (False, 1024, 64)
    assert await passed([body], "whisper") == body


REFUSED: dict[str, tuple[bytes, str]] = {
    "a second model": (form(MODEL, file(b""), MODEL), "second model"),
    "a second model as a file": (form(MODEL, file(b"", "model")), "second model"),
    "a model that is a file": (form(file(b"whisper", "model")), "named model"),
    "a model in a list": (form(MODEL, part("model[]", b"other")), "named model"),
    "a model in capitals": (form(MODEL, part("Model", b"other")), "named model"),
    "a model of 201 bytes": (form(part("model", b"x" * 201)), "200 bytes"),
    "a model in Latin-1": (form(part("model", b"\xe9")), "not UTF-8"),
    "a boundary after LF": (
        form(file(b"x\n--xyz\nContent-Disposition: form-data; name=model\n\ny"), MODEL),
        "within a line",
    ),
    "a boundary after LF, behind the model": (form(MODEL, file(b"x\n--xyz\n")), "within a line"),
    "a boundary within a line": (form(MODEL, file(b"x--xyz")), "within a line"),
    "a boundary in the preamble": (b"x--xyz\r\n" + form(MODEL), "within a line"),
    "a boundary right after a head": (form(MODEL, part("user", b"--xyz")), "within a line"),
    "a boundary with an LF": (form(MODEL, file(b"x\r\n--xyz\n")), "end of its line"),
    "a boundary that goes on": (form(MODEL, file(b"x\r\n--xyzz")), "end of its line"),
    "a boundary and white space": (form(MODEL, file(b"x\r\n--xyz \r\n")), "end of its line"),
    "a part after the last": (form(MODEL) + form(MODEL), "after its last"),
    "a boundary in a head": (form(part("user", b"", b"", b"--xyz: a"), MODEL), "header"),
    "a folded header": (form(part("user", b"", b"", b" folded"), MODEL), "header"),
    "a header with LF": (form(part("user", b"", b"", b"a: b\nc: d"), MODEL), "header"),
    "a header with CR": (form(part("user", b"", b"", b"a: b\rc: d"), MODEL), "header"),
    "a name with a space before the colon": (form(part("user", b"", b"", b"a : b"), MODEL), "header"),
    "headers of more than 8 KiB": (form(part("user", b"", b"", b"a: " + b"b" * 8192), MODEL), "8192 bytes"),
    "endless headers": (b"--xyz\r\na: " + b"b" * 100_000, "8192 bytes"),
    "no disposition": (b"--xyz\r\na: b\r\n\r\n\r\n--xyz--", "named as expected"),
    "no headers": (b"--xyz\r\n\r\n\r\n--xyz--", "header"),
    "two dispositions": (
        form(part("user", b"", b"", b"content-disposition: form-data; name=model"), MODEL),
        "named as expected",
    ),
    "an attachment": (b"--xyz\r\ncontent-disposition: attachment; name=model\r\n\r\n\r\n--xyz--", "named as expected"),
    "no name": (b"--xyz\r\ncontent-disposition: form-data\r\n\r\n\r\n--xyz--", "named as expected"),
    "two names": (form(part("user", b"", b"; name=model"), MODEL), "named as expected"),
    "two names, one extended": (form(part("user", b"", b"; name*=utf-8''model"), MODEL), "named as expected"),
    "a name behind an escaped quote": (form(part("user", b"", b'; filename="a\\"; name="model"'), MODEL), "named as"),
    "an escaped name": (form(part("mo\\del", b"x"), MODEL), "named as expected"),
    "an encoded name": (form(part("mod%65l", b"x"), MODEL), "named as expected"),
    "a file name before the name": (
        b'--xyz\r\ncontent-disposition: form-data; filename="name=model"; name="x"\r\n\r\n\r\n' + form(MODEL),
        "named as expected",
    ),
    "quoted-printable": (form(part("model", b"=67", b"", b"Content-Transfer-Encoding: quoted-printable")), "encoded"),
    "base64": (form(part("user", b"eA==", b"", b"content-transfer-encoding:base64"), MODEL), "encoded"),
    "parts in a part": (form(part("user", b"", b"", b"Content-Type: Multipart/mixed; boundary=b"), MODEL), "has parts"),
    "1,001 parts": (form(MODEL, *[part("user", b"")] * 1000), "1000 parts"),
    "no end": (MODEL + file(bytes(100)), "ends within"),
    "half an end": (form(MODEL)[:-3], "ends within"),
    "nothing": (b"", "ends within"),
    "no form": (b'{"model": "whisper"}', "ends within"),
}


@pytest.mark.parametrize("step", [1, 10, 1_000_000])
@pytest.mark.parametrize(("body", "words"), REFUSED.values(), ids=REFUSED)
async def test_what_parsers_may_read_differently_is_refused(body: bytes, words: str, step: int) -> None:
    pieces = [body[i : i + step] for i in range(0, len(body), step)] or [b""]
    for known in (True, False):
        with pytest.raises(BadRequest, match=words) as caught:
            await passed(pieces, known=known)
        assert caught.value.code == "invalid_form"


async def test_a_second_model_is_cut_off_before_its_value_is_passed_on() -> None:
    head, rest = MODEL + file(bytes(1000)), part("model", b"dear") + b"--xyz--"
    upload = (await read(head, rest)).upload("whisper")
    given_out = []
    with pytest.raises(BadRequest, match="second model"):
        async for piece in upload:
            given_out.append(piece)  # noqa: PERF401 - what came before it is kept
    assert b"".join(given_out) == head


@pytest.mark.parametrize("parts", [(), (file(b"x"),), (part("user", b"x"),)])
async def test_a_form_without_a_model_is_told_as_any_request_without_one(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(Invalid) as caught:
        await read(form(*parts))
    (problem,) = caught.value.problems
    assert (problem.path, problem.msg, problem.type) == ("model", "model: is missing, expected a string", "missing")


@pytest.mark.parametrize(
    "kind",
    [
        b'multipart/form-data; boundary="xyz"',
        b"Multipart/Form-Data;Boundary=xyz",
        b"multipart/form-data ; charset=utf-8 ; boundary=xyz;",
    ],
)
async def test_a_boundary_may_be_written_in_several_ways(kind: bytes) -> None:
    assert (await read(form(MODEL), kind=kind)).model == "whisper"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (b"application/json", "'application/json', expected multipart/form-data"),
        (b"multipart/mixed; boundary=xyz", "'multipart/mixed'"),
        (b"", "''"),
        (b"multipart/form-data", "0 boundaries"),
        (b"multipart/form-data; boundary=", "0 boundaries"),
        (b"multipart/form-data; boundary=xyz; boundary=abc", "2 boundaries"),
        (b"multipart/form-data; boundary*=utf-8''xyz", "1 boundaries"),
        (b"multipart/form-data; boundary*0=xy; boundary*1=z", "2 boundaries"),
        (b'multipart/form-data; boundary="x\\yz"', "too odd"),
        (b'multipart/form-data; boundary="xyz "', "too odd"),
        (b"multipart/form-data; boundary=x%yz", "too odd"),
        (b"multipart/form-data; boundary=" + b"x" * 71, "too odd"),
        (b"multipart/form-data; boundary=xyz, multipart/form-data; boundary=abc", "boundaries"),
    ],
)
async def test_a_boundary_that_parsers_may_read_differently_is_refused(kind: bytes, words: str) -> None:
    with pytest.raises(BadRequest, match=words.replace("*", r"\*")):
        await read(form(MODEL), kind=kind)


@pytest.mark.parametrize(("number", "words"), [(0, "is none"), (2, "is 2 of them")])
async def test_a_content_type_is_given_once(number: int, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        await read_form(scope(6, *[(b"content-type", TYPE)] * number), gone, MOST)


async def test_a_form_has_the_cap_of_any_body_in_its_head_and_behind_it() -> None:
    with pytest.raises(TooLarge):
        await read_form(scope(101, (b"content-type", TYPE)), gone, 100)
    chunks = scope(None, (b"content-type", TYPE))
    with pytest.raises(TooLarge):
        await read_form(chunks, Caller(file(bytes(100))[:-2], MODEL).receive, 100)
    upload = (await read_form(chunks, Caller(MODEL + file(b"")[:-2], bytes(200)).receive, 200)).upload("w")
    with pytest.raises(TooLarge):
        await all_of(upload)


async def test_a_caller_who_leaves_in_the_head_of_a_form_is_gone() -> None:
    with pytest.raises(ClientGone):
        await read_form(scope(1000, (b"content-type", TYPE)), gone, MOST)


def unnamed_files() -> int:
    """Files of this process that have no name any more."""
    return sum(
        link.readlink().name.endswith("(deleted)") and "/memfd:" not in str(link.readlink())
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink()
    )


async def test_a_file_before_the_model_waits_outside_of_memory_and_is_gone_with_the_form() -> None:
    gc.collect()
    before = unnamed_files()
    body = form(file(bytes(300_000)), MODEL)
    for ends in ("passed on", "forgotten"):
        read_here = await read(*cut_at(body, range(0, len(body), 50_000)))
        assert unnamed_files() == before + 1
        if ends == "passed on":
            pieces = [piece async for piece in read_here.upload("whisper")]
            assert b"".join(pieces) == body
            assert max(map(len, pieces)) == 65536
        else:
            del read_here
            gc.collect()
        assert unnamed_files() == before
    assert (await read(form(file(bytes(1000)), MODEL), form(MODEL)[:0])).model == "whisper"
    assert unnamed_files() == before  # what is short stays in memory


async def test_a_form_that_came_whole_is_over_before_it_is_passed_on() -> None:
    caller = Caller(form(MODEL))
    read_here = await read_form(scope(len(form(MODEL)), (b"content-type", TYPE)), caller.receive, MOST)
    upload = read_here.upload("w")
    assert upload.finished
    caller.leaves.set()
    assert (await upload.after())["type"] == "http.disconnect"


NASTY = {
    "white space": b'content-disposition: form-data; name="a"' + b" " * 8000 + b"x",
    "semicolons": b'content-disposition: form-data; name="a"' + b" ;" * 4000,
    "backslashes": b'content-disposition: form-data; name="a"; b="' + b"\\" * 8000,
    "parameters": b'content-disposition: form-data; name="a"' + b"; a=b" * 1600 + b'"',
    "a token": b'content-disposition: form-data; name="a"; ' + b"a" * 8000,
    "a thousand headers": b"\r\n".join([b"a: b"] * 1300),
}


@pytest.mark.parametrize("head", NASTY.values(), ids=NASTY)
def test_headers_that_are_made_to_take_long_do_not(head: bytes) -> None:
    scanner = Scanner(BOUNDARY)
    started = time.perf_counter()
    with pytest.raises(BadRequest):
        scanner.feed(b"--xyz\r\n" + head + b"\r\n\r\n")
    assert time.perf_counter() - started < 0.05


@pytest.mark.parametrize("piece", [b"\r\n--xy" * 40_000, b"-" * 240_000, b"\r\n" * 120_000])
def test_a_body_that_is_made_to_look_like_boundaries_does_not_take_long(piece: bytes) -> None:
    scanner = Scanner(b"-" * 70)
    scanner.feed(b"--" + b"-" * 70 + b'\r\ncontent-disposition: form-data; name="a"; filename="b"\r\n\r\n')
    started = time.perf_counter()
    with_end = piece.replace(b"-" * 72, b"-" * 71 + b"+")
    scanner.feed(with_end)
    assert time.perf_counter() - started < 0.05


# — over sockets


@asynccontextmanager
async def passing(backend: Backend, ended: list[object]) -> AsyncIterator[str]:
    """The address of a server that passes forms on to the backend."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            upload = (await read_form(scope, receive, 100_000_000)).upload("other")
            framing = ("content-length", str(upload.length)) if upload.length else ("transfer-encoding", "chunked")
            request = httpx.Request("POST", backend.url, headers=[framing], stream=upload)  # type: ignore[arg-type]
            async with until_hang_up(upload.after):
                response = await wire.handle_async_request(request)
                assert isinstance(response.stream, Reply)
                body = b"".join([piece async for piece in response.stream])
                await response.stream.aclose()
            await respond(send, response.status_code, body, [])
            ended.append(upload)
        except (ClientGone, GatewayError) as error:
            ended.append(error)
            await respond(send, 400, type(error).__name__.encode(), [], close=True)

    wire = Wire(backend.url)
    async with served(application) as url:
        yield url
    await wire.aclose()


@pytest.mark.parametrize("known", [True, False])
async def test_a_form_passes_from_a_caller_to_a_backend(known: bool) -> None:
    sound = bytes(range(256)) * 20_000

    async def unchunked(peer: Peer) -> None:
        received = await peer._reader.readuntil(b"\r\n\r\n")
        while not received.endswith(b"--xyz--\r\n\r\n0\r\n\r\n"):
            received += await peer._reader.read(1 << 20)
        assert received.count(b"other") == 1
        peer.backend.served.append(received)  # type: ignore[arg-type]

    ended: list[object] = []
    async with Backend(Peer.request if known else unchunked, ok(b"{}")) as backend, passing(backend, ended) as url:
        body = form(file(sound), MODEL, part("language", b"de"))
        async with httpx.AsyncClient(trust_env=False) as client:
            if known:
                answer = await client.post(url, content=body, headers={"content-type": TYPE.decode()})
                assert backend.requests[0].body == body.replace(b"whisper", b"other")
            else:
                chunks = _in_pieces(body, 100_000)
                answer = await client.post(url, content=chunks, headers={"content-type": TYPE.decode()})
    assert (answer.status_code, answer.content) == (200, b"{}")


async def _in_pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for i in range(0, len(body), size):
        yield body[i : i + size]


async def test_a_caller_who_leaves_in_the_middle_of_a_form_ends_it_at_the_backend_too() -> None:
    ended: list[object] = []
    async with Backend(Peer.head) as backend, passing(backend, ended) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\ncontent-type: " + TYPE + b"\r\n\r\n"
        writer.write(head + MODEL + file(bytes(1000))[:-2])
        while not backend.peers or not backend.peers[0].requests:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        await asyncio.wait_for(backend.peers[0].gone.wait(), 2)
    assert [type(end) for end in ended] == [ClientGone]


async def test_a_caller_who_leaves_while_the_backend_thinks_is_noticed() -> None:
    ended: list[object] = []
    async with Backend(Peer.request) as backend, passing(backend, ended) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        body = form(MODEL, file(bytes(200_000)))
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(body))
        writer.write(b"content-type: " + TYPE + b"\r\n\r\n" + body)
        while not backend.requests:
            await asyncio.sleep(0.001)
        writer.transport.abort()
        await asyncio.wait_for(backend.peers[0].gone.wait(), 2)
    assert [type(end) for end in ended] == [ClientGone]


async def test_a_slow_backend_makes_the_caller_wait_and_nothing_piles_up() -> None:
    taken = 0
    stops = asyncio.Event()
    ended: list[object] = []

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        yield MODEL + file(b"")[:-2]
        while True:
            taken += 65536
            yield bytes(65536)

    async with Backend(Peer.head, stops) as backend, passing(backend, ended) as url:
        async with httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(5, write=0.5)) as client:
            with pytest.raises(httpx.WriteTimeout):
                await client.post(url, content=endless(), headers={"content-type": TYPE.decode()})
        assert taken < 16_000_000  # what the buffers of the kernel hold on two connections
        stops.set()
        while not ended:
            await asyncio.sleep(0.001)

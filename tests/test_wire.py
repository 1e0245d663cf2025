"""The transport to an upstream: what it sends, what it accepts, and how it ends."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import cast

import httpx
import pytest

import gateway.wire
from gateway.errors import ClientGone, TooLarge, UpstreamFailed, UpstreamTimeout
from gateway.language import Timeouts
from gateway.wire import IDLE, Reply, Stream, Wire, _patience, _Question, trusting
from tests.corpus.responses import CASES
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, chunked, forever, ok, play
from tests.proving.descriptors import descriptors

BODY = b'{"prompt": "hello"}'


class Timed(httpx.AsyncBaseTransport):
    """A transport whose requests all have the same timeouts, unless they bring their own."""

    timeouts = Timeouts()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions.setdefault("timeouts", self.timeouts)
        return await super().handle_async_request(request)


class TimedWire(Timed, Wire):
    pass


@asynccontextmanager
async def wired(backend: Backend, **timeouts: str) -> AsyncIterator[Wire]:
    """A wire to the backend; at the end nothing may be in flight."""
    wire = TimedWire(backend.url)
    wire.timeouts = Timeouts.model_validate(timeouts)
    try:
        yield wire
        assert wire.in_flight == 0
    finally:
        await wire.aclose()


def question(wire: Wire, method: str = "POST", body: bytes = BODY, **headers: str) -> httpx.Request:
    fields = {"host": "upstream", "content-length": str(len(body)), **headers}
    url = "http://upstream/v1/completions?a=%2Fb"
    return httpx.Request(method, url, headers=fields, stream=httpx.ByteStream(b""), extensions={"body": body})


async def ask(wire: Wire, method: str = "POST", body: bytes = BODY, **extensions: object) -> Reply:
    request = question(wire, method, body)
    request.extensions.update(extensions)
    response = await wire.handle_async_request(request)
    stream: Stream = cast(Reply, response.stream)  # what it offers is what pools ask for
    return cast(Reply, stream)


async def read(answer: Reply) -> bytes:
    try:
        return b"".join([piece async for piece in answer])
    finally:
        await answer.aclose()


async def exchange(wire: Wire, method: str = "POST", body: bytes = BODY) -> bytes:
    return await read(await ask(wire, method, body))


@contextmanager
def fails(code: str, kind: type[UpstreamFailed] = UpstreamFailed) -> Iterator[None]:
    """Ours, of this code, and without a word of the upstream's."""
    with pytest.raises(UpstreamFailed) as caught:
        yield
    assert (kind, code) == (type(caught.value), caught.value.code)
    assert "127.0.0.1" not in caught.value.message
    assert "SECRET" not in caught.value.message


async def until(holds: Callable[[], bool]) -> None:
    """For what the event loop does by itself and announces to nobody."""
    async with asyncio.timeout(2):
        while not holds():
            await asyncio.sleep(0.001)


async def turn(_: Peer) -> None:
    """Lets the other side read what was sent."""
    await asyncio.sleep(0)


async def promptly(event: Awaitable[object]) -> None:
    await asyncio.wait_for(event, 0.2)


# — pouring


async def poured(*steps: Step, takes: Callable[[bytes], bool]) -> tuple[list[bytes], list[bytes]]:
    """What was poured of an answer, and what its reader got."""
    into: list[bytes] = []

    def take(piece: bytes) -> bool:
        if takes(piece):
            into.append(piece)
            return True
        return False

    got = []
    async with Backend(Peer.request, EVENTS, *steps) as backend, wired(backend) as wire:
        answer = await ask(wire)
        answer.pour(take)
        try:
            got = [piece async for piece in answer]
        finally:
            await answer.aclose()
    return into, got


async def slowly(peer: Peer) -> None:
    """So that what follows comes by itself."""
    await asyncio.sleep(0.05)


async def test_pieces_are_poured_while_the_reader_waits() -> None:
    into, got = await poured(slowly, chunk(b"a"), slowly, chunk(b"b"), slowly, END, takes=lambda piece: True)
    assert (into, got) == ([b"a", b"b"], [])


async def test_what_is_not_taken_there_is_the_readers_and_in_its_order() -> None:
    taken: list[bytes] = []
    steps = [step for letter in (b"a", b"b", b"c", b"d") for step in (slowly, chunk(letter))]

    def takes(piece: bytes) -> bool:
        if piece == b"b":
            return False
        taken.append(piece)
        return True

    into, got = await poured(*steps, slowly, END, takes=takes)
    assert (into, got) == ([b"a", b"c", b"d"], [b"b"])


async def test_the_last_piece_is_the_readers() -> None:
    """What comes together with the end is not poured: nothing may follow it before the usage is settled."""
    into, got = await poured(slowly, chunk(b"a"), slowly, chunk(b"b") + END, takes=lambda piece: True)
    assert (into, got) == ([b"a"], [b"b"])


async def test_nothing_overtakes_a_piece_that_the_reader_has_in_his_hands() -> None:
    """He waits for the end, or for his caller, and has not sent it yet: what comes then waits for him."""
    order: list[bytes] = []

    def take(piece: bytes) -> bool:
        if piece != b"a":
            order.append(piece)
        return piece != b"a"

    steps = (slowly, chunk(b"a"), slowly, chunk(b"b"), slowly, END)
    async with Backend(Peer.request, EVENTS, *steps) as backend, wired(backend) as wire:
        answer = await ask(wire)
        answer.pour(take)
        async for piece in answer:
            await answer.ends(0.3)
            order.append(piece)
        await answer.aclose()
    assert order == [b"a", b"b"]


async def test_a_silence_is_counted_from_the_last_piece_that_was_poured() -> None:
    steps = [step for _ in range(4) for step in (chunk(b"a"), lambda peer: asyncio.sleep(0.25))]
    into: list[bytes] = []

    def take(piece: bytes) -> bool:
        into.append(piece)
        return True

    async with Backend(Peer.request, EVENTS, *steps, END) as backend, wired(backend, idle="600ms") as wire:
        answer = await ask(wire)
        answer.pour(take)
        assert await read(answer) + b"".join(into) == b"aaaa"


async def test_more_may_be_poured_than_may_wait() -> None:
    steps = [step for _ in range(5) for step in (slowly, chunk(bytes(60_000)))]
    into, got = await poured(*steps, slowly, END, takes=lambda piece: True)
    assert (len(b"".join(into)), got) == (300_000, [])


async def test_what_is_poured_does_not_wake_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = 0
    news = Reply.news

    async def counted(answer: Reply) -> None:
        nonlocal waits
        waits += 1
        await news(answer)

    monkeypatch.setattr(Reply, "news", counted)
    steps = [step for _ in range(5) for step in (slowly, chunk(b"a"))]
    into, _ = await poured(*steps, slowly, END, takes=lambda piece: True)
    assert b"".join(into) == b"aaaaa"
    assert waits == 2  # for the head, and for the end


# — the question


async def test_a_request_is_written_as_it_is() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, wired(backend) as wire:
        await exchange(wire)
    head = b"POST /v1/completions?a=%2Fb HTTP/1.1\r\nhost: upstream\r\ncontent-length: 19\r\n\r\n"
    assert (head, BODY) == (backend.requests[0].head, backend.requests[0].body)


async def test_headers_keep_their_order_their_case_and_their_number() -> None:
    fields = [(b"Host", b"a"), (b"X-Tag", b"1"), (b"x-TAG", b"2"), (b"Content-Length", b"0")]
    async with Backend(Peer.request, ok(b"")) as backend, wired(backend) as wire:
        request = httpx.Request("POST", "http://a/", headers=fields, extensions={"body": b""})
        response = await wire.handle_async_request(request)
        await response.aclose()
    assert (
        backend.requests[0].head == b"POST / HTTP/1.1\r\nHost: a\r\nX-Tag: 1\r\nx-TAG: 2\r\nContent-Length: 0\r\n\r\n"
    )


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\nb", "a\rb", "a\0b", "\r\n\r\nGET / HTTP/1.1"])
async def test_no_value_can_split_the_head(value: str) -> None:
    async with Backend(Peer.request) as backend, wired(backend) as wire:
        with pytest.raises(ValueError, match="CR, LF or NUL"):
            await wire.handle_async_request(question(wire, tag=value))
    assert not backend.peers


async def test_a_plain_httpx_client_can_use_it() -> None:
    async with (
        Backend(Peer.request, ok(b'{"a": 1}')) as backend,
        httpx.AsyncClient(transport=Wire(backend.url)) as client,
    ):
        response = await client.post(backend.url, json={"b": 2})
    assert (response.json(), backend.requests[0].body) == ({"a": 1}, b'{"b":2}')


async def pieces(size: int, number: int) -> AsyncIterator[bytes]:
    for i in range(number):
        await asyncio.sleep(0)
        yield bytes([i % 256]) * size


async def test_a_streamed_body_arrives_whole() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, wired(backend) as wire:
        request = httpx.Request(
            "POST", backend.url, headers={"content-length": "16000000"}, content=pieces(1_000_000, 16)
        )
        response = await wire.handle_async_request(request)
        await read(cast(Reply, response.stream))
        assert len(wire.idle) == 1
    assert b"".join([p async for p in pieces(1_000_000, 16)]) == backend.requests[0].body


async def test_a_streamed_body_is_not_pulled_faster_than_the_upstream_reads() -> None:
    pulled = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal pulled
        while True:
            pulled += 1
            yield bytes(1_000_000)

    async with Backend(Peer.head, asyncio.Event()) as backend, wired(backend, total="200ms") as wire:
        request = httpx.Request("POST", backend.url, headers={"content-length": str(10**12)}, content=endless())
        with fails("upstream_total_timeout", UpstreamTimeout):
            await wire.handle_async_request(request)
    assert 0 < pulled < 32  # what the kernel's buffers hold, and one piece


@pytest.mark.parametrize("length", [5, 7])
async def test_a_streamed_body_of_another_length_is_a_defect_and_cuts_the_line(length: int) -> None:
    async with Backend(Peer.request) as backend, wired(backend) as wire:
        request = httpx.Request("POST", backend.url, headers={"content-length": str(length)}, content=pieces(6, 1))
        with pytest.raises(ValueError, match="content-length"):
            await wire.handle_async_request(request)
        await promptly(backend.peers[0].gone.wait())
        assert not backend.requests


class Passing(httpx.AsyncByteStream):
    """A stream that is its content and nothing between."""

    def __init__(self, content: AsyncIterator[bytes]) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._content


def uploading(content: AsyncIterator[bytes], length: int | None) -> httpx.Request:
    framing = {"transfer-encoding": "chunked"} if length is None else {"content-length": str(length)}
    return httpx.Request("POST", "http://upstream/", headers={"host": "upstream", **framing}, stream=Passing(content))


async def test_a_stream_of_unknown_length_is_sent_in_chunks() -> None:
    async def script(peer: Peer) -> None:
        expected = b"POST / HTTP/1.1\r\nhost: upstream\r\ntransfer-encoding: chunked\r\n\r\n"
        expected += b"3\r\nabc\r\n" + b"2710\r\n" + b"x" * 10_000 + b"\r\n0\r\n\r\n"
        assert await peer._reader.readexactly(len(expected)) == expected

    async def content() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b""  # which would be the end
        yield b"x" * 10_000

    async with Backend(script, ok(b"{}")) as backend, wired(backend) as wire:
        response = await wire.handle_async_request(uploading(content(), None))
        assert await read(cast(Reply, response.stream)) == b"{}"
        assert len(wire.idle) == 1


@pytest.mark.parametrize("length", [1000, None])
@pytest.mark.parametrize("error", [ClientGone(), TooLarge("more")], ids=["gone", "too large"])
async def test_what_a_stream_raises_comes_out_as_it_is_and_cuts_the_line(error: Exception, length: int | None) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b"abc"
        raise error

    async with Backend(Peer.head) as backend, wired(backend) as wire:
        with pytest.raises(type(error)) as caught:
            await wire.handle_async_request(uploading(content(), length))
        assert caught.value is error
        await promptly(backend.peers[0].gone.wait())


@pytest.mark.parametrize("waits", ["for the caller", "for the upstream"])
@pytest.mark.parametrize(("step", "code"), [(ok(b"{}"), None), (Peer.reset, "upstream_disconnected")])
async def test_a_stream_is_let_go_of_when_it_is_not_wanted_any_more(waits: str, step: Step, code: str | None) -> None:
    """Nobody else may read from the caller before that."""
    ended: list[bool] = []

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"abc"
            if waits == "for the caller":
                await asyncio.Event().wait()
            while True:
                yield bytes(1_000_000)
        finally:
            ended.append(True)

    async with Backend(Peer.head, slowly, step) as backend, wired(backend) as wire:
        if code is None:
            response = await wire.handle_async_request(uploading(content(), None))
            assert ended == [True]
            await response.aclose()
        else:
            with fails(code):
                await wire.handle_async_request(uploading(content(), None))
            assert ended == [True]


async def test_a_cancelled_upload_lets_go_of_its_stream_and_of_its_connection() -> None:
    ended, begun = asyncio.Event(), asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"abc"
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with Backend(Peer.head) as backend, wired(backend) as wire:
        asking = asyncio.create_task(wire.handle_async_request(uploading(content(), 1000)))
        await begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert ended.is_set()
        await promptly(backend.peers[0].gone.wait())


async def test_the_first_byte_of_an_answer_counts_from_the_end_of_a_stream() -> None:
    async def slow() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0.1)
            yield b"abc"

    loop = asyncio.get_running_loop()
    late = (Peer.request, slowly, ok(b"{}"))
    async with Backend(*late) as backend, wired(backend, first_byte="200ms", idle="60ms") as wire:
        response = await wire.handle_async_request(uploading(slow(), 12))
        assert await read(cast(Reply, response.stream)) == b"{}"
    async with Backend(Peer.request) as backend, wired(backend, first_byte="200ms") as wire:
        started = loop.time()
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await wire.handle_async_request(uploading(slow(), 12))
        assert 0.58 < loop.time() - started < 1


async def test_a_stream_whose_caller_took_long_before_is_sent_all_the_same() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, wired(backend, first_byte="200ms") as wire:
        request = uploading(pieces(3, 1), 3)
        request.extensions["since"] = asyncio.get_running_loop().time() - 10
        response = await wire.handle_async_request(request)
        assert await read(cast(Reply, response.stream)) == b"{}"


async def test_the_total_counts_while_a_stream_is_slow() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.02)
            yield b"abc"

    async with Backend(Peer.head) as backend, wired(backend, total="300ms", first_byte="100ms") as wire:
        with fails("upstream_total_timeout", UpstreamTimeout):
            await wire.handle_async_request(uploading(endless(), None))


@pytest.mark.parametrize("takes", [False, True])
async def test_an_upstream_that_takes_nothing_of_a_stream_has_until_the_idle_deadline(takes: bool) -> None:
    """One that takes a little, however slowly, has longer: until the total."""

    async def script(peer: Peer) -> None:
        while takes:
            await asyncio.sleep(0.02)
            await peer._reader.readexactly(1_000_000)
        await asyncio.Event().wait()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(32_000_000)

    code = "upstream_total_timeout" if takes else "upstream_idle_timeout"
    async with Backend(script) as backend, wired(backend, idle="300ms", total="1s", first_byte="100ms") as wire:
        started = asyncio.get_running_loop().time()
        with fails(code, UpstreamTimeout):
            await wire.handle_async_request(uploading(endless(), None))
        took = asyncio.get_running_loop().time() - started
    assert took > 0.98 if takes else 0.28 < took < 0.9


async def test_a_caller_who_is_slow_is_not_taken_for_an_upstream_that_was() -> None:
    async def content() -> AsyncIterator[bytes]:
        yield bytes(16_000_000)  # more than the kernel holds: the upstream is waited for
        await asyncio.sleep(0.4)
        yield b"abc"

    async with Backend(Peer.request, ok(b"{}")) as backend, wired(backend, idle="200ms") as wire:
        response = await wire.handle_async_request(uploading(content(), 16_000_003))
        assert await read(cast(Reply, response.stream)) == b"{}"


async def test_an_upstream_that_was_slow_with_a_stream_is_not_held_late_with_its_answer() -> None:
    async def script(peer: Peer) -> None:
        await asyncio.sleep(0.25)
        while not (await peer._reader.read(1 << 20)).endswith(b"\r\n0\r\n\r\n"):
            pass
        await peer.send(EVENTS)
        await asyncio.sleep(0.45)
        await peer.send(chunk(b"a") + END)

    async def large() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 1_000_000

    async with Backend(Peer.head, script) as backend, wired(backend, idle="400ms") as wire:
        response = await wire.handle_async_request(uploading(large(), None))
        await asyncio.sleep(0.3)  # nobody waits for the upstream
        assert await read(cast(Reply, response.stream)) == b"a"


REFUSAL = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 9\r\nconnection: close\r\n\r\ntoo large"


@pytest.mark.parametrize("end", [Peer.close, Peer.reset])
@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_refusal_with_a_close_is_heard_in_the_middle_of_a_stream(size: int, end: Step) -> None:
    async with Backend(Peer.head, REFUSAL, turn, end) as backend, wired(backend) as wire:
        response = await wire.handle_async_request(uploading(pieces(size, 10**6), None))
        assert (response.status_code, await read(cast(Reply, response.stream))) == (413, b"too large")


async def test_a_refusal_is_heard_while_the_caller_is_slow() -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"abc"
        await asyncio.Event().wait()

    async with Backend(Peer.head, REFUSAL) as backend, wired(backend) as wire:
        response = await asyncio.wait_for(wire.handle_async_request(uploading(stuck(), 1000)), 1)
        assert (response.status_code, await read(cast(Reply, response.stream))) == (413, b"too large")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (REFUSAL, None),
        (REFUSAL[:-1], "upstream_disconnected"),
        (REFUSAL[:20], "upstream_disconnected"),
        (b"220 mail", "upstream_protocol_error"),
        (b"", "upstream_disconnected"),
        (REFUSAL.replace(b" 9", b" 1000000")[:-9] + bytes(1_000_000), "upstream_disconnected"),
    ],
    ids=["whole", "cut", "cut in the head", "not HTTP", "nothing", "more than may wait"],
)
async def test_what_was_answered_before_a_reset_is_read_though_we_were_writing(answer: bytes, code: str | None) -> None:
    """The loop sees the reset only by a write that fails: nothing else ran since the upstream answered."""
    listener = socket.create_server(("127.0.0.1", 0))
    wire = TimedWire(f"http://127.0.0.1:{listener.getsockname()[1]}")

    async def content() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await asyncio.sleep(0.05)
        peer, _ = listener.accept()
        peer.setblocking(False)
        with suppress(BlockingIOError):
            peer.send(answer)
        peer.close()  # with bytes unread: that is a reset
        for _ in range(50):
            yield b"x" * 1000

    with listener:

        async def outcome() -> tuple[int, bytes]:
            response = await wire.handle_async_request(uploading(content(), None))
            return response.status_code, await read(cast(Reply, response.stream))

        if code is None:
            assert await outcome() == (413, b"too large")
        else:
            with fails(code):
                await outcome()
    assert wire.in_flight == 0
    await wire.aclose()


# — the answer


async def test_an_answer_keeps_its_headers_as_they_came() -> None:
    fields = (b"Set-Cookie: a", b"set-cookie: b", b"X-Odd:\xff\xfe", b"X-Empty:")
    async with Backend(Peer.request, ok(b"abc", *fields)) as backend, wired(backend) as wire:
        response = await wire.handle_async_request(question(wire))
        assert await read(cast(Reply, response.stream)) == b"abc"
    expected = [
        (b"content-type", b"application/json"),
        (b"content-length", b"3"),
        (b"Set-Cookie", b"a"),
        (b"set-cookie", b"b"),
        (b"X-Odd", b"\xff\xfe"),
        (b"X-Empty", b""),
    ]
    assert (200, expected) == (response.status_code, response.headers.raw)


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabcdef"
CLOSE = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcdef"
GOOD = {
    "length": (LENGTH, b"abcdef", "length"),
    "chunked": (chunked(b"abc", b"de", b"f"), b"abcdef", "chunked"),
    "chunked with extensions and trailers": (
        EVENTS + b'3;a="b"\r\nabc\r\n3\r\ndef\r\n0\r\nX-Trailer: 1\r\nX-More: 2\r\n\r\n',
        b"abcdef",
        "chunked",
    ),
    "until the close": (CLOSE, b"abcdef", "close"),
    "until the close, in 1.0": (b"HTTP/1.0 200 OK\r\n\r\nabcdef", b"abcdef", "close"),
    "nothing, by length": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", "length"),
    "nothing, by 204": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", "none"),
    "nothing, by 304 with a length": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\n", b"", "none"),
    "after informational answers": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nX: y\r\n\r\n" + LENGTH,
        b"abcdef",
        "length",
    ),
    "without a reason": (b"HTTP/1.1 200\r\nContent-Length: 6\r\n\r\nabcdef", b"abcdef", "length"),
}


@pytest.mark.parametrize("name", GOOD)
async def test_bodies_are_the_same_however_the_bytes_are_split(name: str) -> None:
    message, body, framed = GOOD[name]
    chance = random.Random(name)

    async def scattered(peer: Peer) -> None:
        await peer.request()
        if peer.number == 0:
            cuts = list(range(1, len(message)))  # each byte alone
        elif peer.number == 1:
            cuts = []  # all at once
        else:
            cuts = sorted(chance.sample(range(1, len(message)), chance.randint(1, 12)))
        for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True):
            await play(peer, message[start:end], turn)
        if framed == "close":
            await peer.close()

    async with Backend(scattered) as backend:
        for _ in range(30):
            async with wired(backend) as wire:
                answer = await ask(wire)
                assert (body, framed) == (await read(answer), answer.framed)
                assert answer.complete
                assert not {b"X", b"X-Trailer"} & {field for field, _ in answer.headers}


async def test_a_head_request_has_no_body_whatever_its_length_says() -> None:
    head_only = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n"
    async with Backend(Peer.request, head_only) as backend, wired(backend) as wire:
        answer = await ask(wire, "HEAD", b"")
        assert (await read(answer), answer.framed, answer.complete) == (b"", "none", True)
        assert (b"Content-Length", b"6") in answer.headers


async def test_complete_is_told_with_the_last_piece_if_it_is_known_then() -> None:
    more, end = asyncio.Event(), asyncio.Event()
    steps = (Peer.request, LENGTH[:-3], more, LENGTH[-3:], Peer.request, EVENTS + chunk(b"a"), end, chunk(b"b") + END)
    async with Backend(*steps) as backend, wired(backend) as wire:
        for expected, go in (([(b"abc", False), (b"def", True)], more), ([(b"a", False), (b"b", True)], end)):
            told, answer = [], await ask(wire)
            async for piece in answer:
                told.append((piece, answer.complete))
                go.set()
            await answer.aclose()
            assert expected == told


async def test_a_terminator_that_comes_alone_completes_without_a_piece() -> None:
    end = asyncio.Event()
    async with Backend(Peer.request, EVENTS + chunk(b"a"), end, END) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert (await anext(answer), answer.complete) == (b"a", False)
        end.set()
        assert (await read(answer), answer.complete) == (b"", True)


@pytest.mark.parametrize(("rest", "expected"), [(END, True), (chunk(b"b") + END, False), (None, False)])
async def test_whether_the_end_comes_next_can_be_waited_for(rest: bytes | None, expected: bool) -> None:
    go = asyncio.Event()
    steps = (Peer.request, EVENTS + chunk(b"a"), go, rest or asyncio.Event())
    async with Backend(*steps) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert await anext(answer) == b"a"
        go.set()
        assert await answer.ends(0.05) is expected
        await answer.aclose()


async def test_waiting_for_the_end_in_vain_is_not_the_upstreams_silence() -> None:
    more = asyncio.Event()
    steps = (Peer.request, EVENTS + chunk(b"a"), more, chunk(b"b") + END)
    async with Backend(*steps) as backend, wired(backend, idle="250ms") as wire:
        answer = await ask(wire)
        assert await anext(answer) == b"a"
        assert not await answer.ends(0.01)
        await asyncio.sleep(0.4)
        more.set()
        assert await read(answer) == b"b"


# — what is no answer

HEAD = b"HTTP/1.1 200 OK\r\n"
BAD = {
    "garbage": b"SECRET\x00\x01\x02 garbage\r\n\r\n",
    "HTTP/0.9": b"<html>SECRET</html>",
    "a status line of 0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 1\r\n\r\na",
    "HTTP/2": b"HTTP/2.0 200 OK\r\nContent-Length: 1\r\n\r\na",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\nSECRET",
    "101 without an upgrade": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "a status of no class": b"HTTP/1.1 099 SECRET\r\nContent-Length: 1\r\n\r\na",
    "a status beyond 599": b"HTTP/1.1 600 SECRET\r\nContent-Length: 1\r\n\r\na",
    "length and chunks": HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "chunks and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": HEAD + b"Content-Length: 3, 4\r\n\r\nabcd",
    "no number as length": HEAD + b"Content-Length: -1\r\n\r\nabcd",
    "a coding that nobody asked for": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "a coding that is not chunked": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "a folded field": HEAD + b"X: a\r\n b\r\nContent-Length: 1\r\n\r\na",
    "NUL in a value": HEAD + b"X: a\0b\r\nContent-Length: 1\r\n\r\na",
    "a bare LF": b"HTTP/1.1 200 OK\nContent-Length: 1\n\na",
    "too many fields": HEAD + b"X: y\r\n" * 201 + b"\r\n",
    "too large a head": HEAD + (b"X: " + b"x" * 8000 + b"\r\n") * 9 + b"\r\n",
    "one endless field": HEAD + b"X: " + b"x" * 100_000,
    "an endless name": HEAD + b"x" * 100_000,
}


@pytest.mark.parametrize("name", BAD)
async def test_what_is_not_http_is_refused_and_the_connection_closed(name: str) -> None:
    async with Backend(Peer.request, BAD[name]) as backend, wired(backend) as wire:
        with fails("upstream_protocol_error"):
            await ask(wire)
        await promptly(backend.peers[0].gone.wait())
        assert not wire.idle


async def test_a_head_of_almost_the_limit_is_taken() -> None:
    message = ok(bytes(70_000), *[b"X-%d: " % i + b"x" * 300 for i in range(195)])
    steps = (Peer.request, message[:1000], turn, message[1000:])  # so that the last of the head comes with much body
    async with Backend(*steps) as backend, wired(backend) as wire:
        assert len(await exchange(wire)) == 70_000


@pytest.mark.parametrize("name", CASES)
async def test_each_answer_of_the_corpus_is_relayed_or_refused_and_none_of_it_reaches_the_next(name: str) -> None:
    case = CASES[name]

    async def script(peer: Peer) -> None:
        await peer.request()
        if len(backend.requests) > 1:
            await peer.send(ok(b"next"))
            return
        await peer.send(case.raw)
        if case.closes:
            await peer.close()

    async with Backend(forever(script)) as backend, wired(backend) as wire:
        outcome = await outcome_of(wire, case.method)
        assert case.expected == outcome
        assert await exchange(wire) == b"next"


@pytest.mark.parametrize("name", CASES)
async def test_each_answer_of_the_corpus_means_the_same_byte_by_byte(name: str) -> None:
    case = CASES[name]
    size = max(1, len(case.raw) // 1000)

    async def script(peer: Peer) -> None:
        await peer.request()
        for start in range(0, len(case.raw), size):
            await play(peer, case.raw[start : start + size], turn)
        if case.closes:
            await peer.close()

    async with Backend(script) as backend, wired(backend) as wire:
        assert case.expected == await outcome_of(wire, case.method)


async def outcome_of(wire: Wire, method: str) -> tuple[int, bytes] | str | None:
    """The status and the body that were relayed, or the code of the failure."""
    try:
        answer = await ask(wire, method)
        return answer.status, await read(answer)
    except UpstreamFailed as failed:
        return failed.code


MANGLED = {
    "a chunk longer than its size": b"3\r\nabcd\r\n",
    "a size that is no number": b"SECRET\r\n",
    "endless extensions": b"3;" + b"x" * 200_000,
    "endless trailers": b"0\r\nX: " + b"x" * 200_000,
}


@pytest.mark.parametrize("name", MANGLED)
async def test_a_stream_that_goes_wrong_delivers_what_came_before_and_raises(name: str) -> None:
    async with Backend(Peer.request, EVENTS + chunk(b"first"), MANGLED[name]) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert (await anext(answer)).startswith(b"first")
        with fails("upstream_protocol_error"):
            await read(answer)
        await promptly(backend.peers[0].gone.wait())


@pytest.mark.parametrize("how", [Peer.close, Peer.reset])
@pytest.mark.parametrize("cut", [LENGTH[:-1], EVENTS, EVENTS + chunk(b"a"), EVENTS + b"3\r\nab", chunked(b"a")[:-2]])
async def test_a_cut_answer_never_ends_cleanly(cut: bytes, how: Step) -> None:
    taken = asyncio.Event()
    async with Backend(Peer.request, cut, taken, how) as backend, wired(backend) as wire:
        answer = await ask(wire)
        taken.set()
        with fails("upstream_disconnected"):
            await read(answer)
        assert not answer.complete
        with fails("upstream_disconnected"):
            await anext(answer)


async def test_a_reset_does_not_end_a_body_that_only_the_close_ends() -> None:
    taken = asyncio.Event()
    async with Backend(Peer.request, CLOSE, taken, Peer.reset) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert await anext(answer) == b"abcdef"
        taken.set()
        with fails("upstream_disconnected"):
            await read(answer)


# — connections are used again, and never for what is not theirs


async def test_one_connection_serves_one_request_after_another() -> None:
    async with Backend(forever(Peer.request, chunked(b"a", b"b"))) as backend, wired(backend) as wire:
        for _ in range(5):
            assert await exchange(wire) == b"ab"
        assert (len(backend.peers), len(backend.requests)) == (1, 5)


async def test_the_warmest_connection_is_taken_first() -> None:
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        first, second = await ask(wire), await ask(wire)
        await read(second)
        await read(first)
        await exchange(wire)
        assert [len(peer.requests) for peer in backend.peers] == [2, 1]


async def test_exchanges_beside_one_another_never_mix() -> None:
    async def echo(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(0)
        await play(peer, chunked(*[bytes([b]) for b in peer.requests[-1].body]))

    async def one(wire: Wire, name: bytes) -> None:
        for i in range(20):
            body = b"%b-%d" % (name, i)
            assert body == await exchange(wire, body=body)

    async with Backend(forever(echo)) as backend, wired(backend) as wire:
        await asyncio.gather(*[one(wire, b"caller-%d" % i) for i in range(20)])
        assert len(backend.peers) <= 20


@pytest.mark.parametrize(
    "last",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        ok(b"{}", b"Keep-Alive: timeout=1"),
        ok(b"{}") + b"beyond the body",
        ok(b"{}") + b"HTTP/1.1 200 OK\r\nX: SECRET\r\n",
        ok(b"{}") + ok(b"SECRET"),
    ],
)
async def test_a_connection_that_must_not_serve_again_is_closed(last: bytes) -> None:
    async with Backend(Peer.request, last) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert (await read(answer), answer.failure) == (b"{}", None)
        assert not wire.idle
        await promptly(backend.peers[0].gone.wait())


@pytest.mark.parametrize("step", [ok(b"SECRET"), b"H", Peer.close, Peer.reset])
async def test_an_idle_connection_is_dropped_as_soon_as_anything_happens_on_it(step: Step) -> None:
    now = asyncio.Event()

    async def script(peer: Peer) -> None:
        await play(peer, Peer.request, ok(b"{}"))
        if peer.number == 0:
            await play(peer, now, step)

    async with Backend(script) as backend, wired(backend) as wire:
        await exchange(wire)
        assert len(wire.idle) == 1
        now.set()
        await until(lambda: not wire.idle)
        await promptly(backend.peers[0].gone.wait())
        assert await exchange(wire) == b"{}"


@pytest.mark.parametrize(("told", "kept"), [(b"timeout=5, max=100", 4), (b"timeout=3600", IDLE), (b"max=5", IDLE)])
def test_a_connection_is_not_kept_longer_than_its_upstream_says_or_than_we_like(told: bytes, kept: float) -> None:
    assert _patience(told) == kept


async def test_a_connection_that_has_ended_leaves_no_timer() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, wired(backend) as wire:
        await exchange(wire)
        (connection,) = wire.idle
        timer = connection._timer
        assert timer is not None
        assert not timer.cancelled()
        await wire.aclose()
        assert timer.cancelled()


async def test_a_connection_is_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.wire, "IDLE", 0.05)
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        await exchange(wire)
        await exchange(wire)
        assert len(backend.peers) == 1
        await promptly(backend.peers[0].gone.wait())
        assert not wire.idle


@pytest.mark.parametrize("how", [Peer.close, Peer.reset])
async def test_a_kept_connection_that_dies_as_we_write_is_replaced_unseen_and_only_once(how: Step) -> None:
    async def script(peer: Peer) -> None:
        await play(peer, Peer.request, ok(b"{}"))
        if peer.number < 2:
            await play(peer, Peer.request, how)

    async with Backend(script) as backend, wired(backend) as wire:
        first, second = await ask(wire), await ask(wire)
        await read(first)
        await read(second)
        assert len(wire.idle) == 2
        assert await exchange(wire, body=b"again") == b"{}"
        assert [r.body for r in backend.requests if r.body == b"again"] == [b"again"] * 2
        assert (len(backend.peers), len(wire.idle)) == (3, 2)


async def test_the_replacement_of_a_kept_connection_may_fail() -> None:
    async def script(peer: Peer) -> None:
        if peer.number == 0:
            await play(peer, Peer.request, ok(b"{}"))
        await play(peer, Peer.request, Peer.close)

    async with Backend(script) as backend, wired(backend) as wire:
        await exchange(wire)
        with fails("upstream_disconnected"):
            await exchange(wire)
        assert len(backend.peers) == 2


async def test_a_kept_connection_that_dies_after_working_on_the_question_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway.wire, "AT_ONCE", 0.1)

    async def works(_: Peer) -> None:
        await asyncio.sleep(0.2)

    async with Backend(Peer.request, ok(b"{}"), Peer.request, works, Peer.close) as backend, wired(backend) as wire:
        await exchange(wire)
        with fails("upstream_disconnected"):
            await exchange(wire)
        assert (len(backend.peers), len(backend.requests)) == (1, 2)


@pytest.mark.parametrize("heard", [b"H", b"HTTP/1.1 102 Processing\r\n\r\n"])
async def test_what_has_begun_to_answer_is_not_asked_again(heard: bytes) -> None:
    async with Backend(Peer.request, ok(b"{}"), Peer.request, heard, Peer.close) as backend, wired(backend) as wire:
        await exchange(wire)
        with fails("upstream_disconnected"):
            await exchange(wire)
        assert len(backend.peers) == 1


async def test_a_new_connection_that_dies_is_not_replaced() -> None:
    async with Backend(Peer.request, Peer.close) as backend, wired(backend) as wire:
        with fails("upstream_disconnected"):
            await exchange(wire)
        assert len(backend.peers) == 1


async def test_a_connection_that_ends_before_it_is_asked_is_told_as_ended() -> None:
    async with Backend(Peer.close) as backend, wired(backend) as wire:
        connection = await wire._connect(_Question(question(wire)))
        await until(lambda: connection._closed)
        with fails("upstream_disconnected"):
            await asyncio.wait_for(connection.ask(_Question(question(wire))), 1)


async def test_an_answer_before_the_end_of_the_question_is_delivered_and_its_connection_not_kept() -> None:
    async with Backend(Peer.head, ok(b"too large")) as backend, wired(backend) as wire:
        assert await exchange(wire, body=bytes(32_000_000)) == b"too large"
        assert not wire.idle


@pytest.mark.parametrize("size", [10, 1_000_000])
async def test_an_early_answer_stops_a_streamed_question(size: int) -> None:
    async with Backend(Peer.head, ok(b"too large")) as backend, wired(backend) as wire:
        content = pieces(size, 10**6)
        request = httpx.Request("POST", backend.url, headers={"content-length": str(10**12)}, content=content)
        response = await wire.handle_async_request(request)
        assert await read(cast(Reply, response.stream)) == b"too large"
        assert not wire.idle


async def test_aclose_ends_everything_and_who_asks_later_gets_a_new_connection() -> None:
    """A request that began before its upstream was retired still gets its answer."""
    async with Backend(Peer.request, ok(b"{}"), Peer.request, EVENTS) as backend:
        wire = Wire(backend.url)
        await exchange(wire)
        answer = await ask(wire)
        await wire.aclose()
        await promptly(backend.peers[0].gone.wait())
        with fails("upstream_disconnected"):
            await read(answer)
        assert (wire.in_flight, len(wire.idle)) == (0, 0)
        assert await exchange(wire) == b"{}"
        assert len(backend.peers) == 2
        await wire.aclose()
        assert (wire.in_flight, len(wire.idle)) == (0, 0)


async def test_closing_an_answer_twice_leaves_the_next_one_alone() -> None:
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        first = await ask(wire)
        await read(first)
        second = await ask(wire)
        await first.aclose()
        assert await read(second) == b"{}"
        assert len(backend.peers) == 1


# — deadlines


@contextmanager
def black_hole() -> Iterator[str]:
    """An address at which connections are neither accepted nor refused: the queue of the listener is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_an_upstream_that_does_not_accept_is_told_as_a_connect_timeout() -> None:
    with black_hole() as url:
        wire = TimedWire(url)
        wire.timeouts = Timeouts.model_validate({"connect": "50ms"})
        with fails("upstream_connect_timeout", UpstreamTimeout):
            await asyncio.wait_for(ask(wire), 1)
        assert wire.in_flight == 0


async def test_an_upstream_that_refuses_is_told_as_such() -> None:
    async with Backend() as backend:
        pass
    with fails("upstream_connect_failed"):
        await ask(Wire(backend.url))


async def test_an_upstream_that_is_silent_has_until_the_first_byte_deadline() -> None:
    async with Backend(Peer.request) as backend, wired(backend, first_byte="50ms") as wire:
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await ask(wire)
        await promptly(backend.peers[0].gone.wait())


async def test_informational_answers_do_not_move_the_first_byte_deadline() -> None:
    async def hints(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        await asyncio.sleep(0.005)

    async with Backend(Peer.request, forever(hints)) as backend, wired(backend, first_byte="60ms") as wire:
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await ask(wire)


async def test_a_flood_of_informational_answers_is_held_back_and_ends_at_the_first_byte_deadline() -> None:
    flood = forever(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
    async with Backend(Peer.request, flood) as backend, wired(backend, first_byte="1s") as wire:
        asking = asyncio.create_task(ask(wire))
        await until(lambda: any(connection._paused for connection in wire.busy))
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await asking


async def test_an_answer_that_comes_with_many_informational_ones_is_read_to_its_end() -> None:
    more = asyncio.Event()
    first, last = (b"HTTP/1.1 103 Hints\r\nX: " + b"x" * size + b"\r\n\r\n" for size in (60_000, 6000))
    async with Backend(Peer.request, first, turn, last + EVENTS, more, chunk(b"a") + END) as backend:
        async with wired(backend) as wire:
            answer = await ask(wire)
            more.set()
            assert await asyncio.wait_for(read(answer), 5) == b"a"


async def test_first_byte_and_total_count_from_when_the_request_began() -> None:
    loop = asyncio.get_running_loop()
    patient = Timeouts.model_validate({"first_byte": "2h"})
    async with Backend(forever(Peer.request)) as backend, wired(backend) as wire:
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await asyncio.wait_for(ask(wire, since=loop.time() - 119.5), 20)
        with fails("upstream_total_timeout", UpstreamTimeout):
            await asyncio.wait_for(ask(wire, since=loop.time() - 3599.5, timeouts=patient), 20)
    async with Backend(Peer.request, EVENTS, asyncio.Event()) as backend, wired(backend) as wire:
        answer = await ask(wire, since=loop.time() - 3599, timeouts=patient)
        with fails("upstream_total_timeout", UpstreamTimeout):
            await asyncio.wait_for(read(answer), 20)


async def test_a_connect_has_no_more_time_than_what_is_left_of_the_first_byte() -> None:
    loop = asyncio.get_running_loop()
    with black_hole() as url:
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await asyncio.wait_for(ask(Wire(url), since=loop.time() - 119.5), 1.9)


async def test_a_request_whose_time_is_over_is_not_asked() -> None:
    loop = asyncio.get_running_loop()
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        await exchange(wire)
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await ask(wire, since=loop.time() - 121)
        assert (len(backend.requests), len(wire.idle)) == (1, 1)


async def test_a_reader_that_left_while_it_waited_is_not_waiting_for_the_next_answer() -> None:
    end, more = asyncio.Event(), asyncio.Event()
    steps = (Peer.request, EVENTS, end, END, Peer.request, EVENTS, more, chunk(b"a") + END)
    async with Backend(*steps) as backend, wired(backend, idle="400ms") as wire:
        answer = await ask(wire)
        waiting = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)
        waiting.cancel()
        end.set()
        await until(lambda: answer.received)
        await answer.aclose()
        answer = await ask(wire)
        await asyncio.sleep(0.8)
        more.set()
        assert await read(answer) == b"a"
        assert len(backend.peers) == 1


async def test_each_request_over_a_connection_has_its_own_timeouts() -> None:
    async with Backend(Peer.request, ok(b"{}"), Peer.request, EVENTS) as backend, wired(backend) as wire:
        await exchange(wire)
        answer = await ask(wire, timeouts=Timeouts.model_validate({"idle": "300ms"}))
        with fails("upstream_idle_timeout", UpstreamTimeout):
            await asyncio.wait_for(read(answer), 20)
        assert len(backend.peers) == 1


async def test_a_timer_is_set_once_and_serves_many_requests() -> None:
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        timers = set()
        for _ in range(5):
            await exchange(wire)
            timers |= {connection._timer for connection in wire.idle}
        assert (len(timers), len(backend.peers)) == (1, 1)  # that of the first time it was idle


async def test_an_idle_connection_does_not_hold_the_question_that_it_carried() -> None:
    body = bytes(1_000_000)
    before = sys.getrefcount(body)
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        await exchange(wire, body=body)
        assert len(wire.idle) == 1
        assert before == sys.getrefcount(body)


async def test_an_upstream_that_falls_silent_has_until_the_idle_deadline() -> None:
    async with Backend(Peer.request, EVENTS + chunk(b"a")) as backend, wired(backend, idle="50ms") as wire:
        answer = await ask(wire)
        assert await anext(answer) == b"a"
        with fails("upstream_idle_timeout", UpstreamTimeout):
            await read(answer)
        await promptly(backend.peers[0].gone.wait())


async def test_the_idle_deadline_holds_after_a_head_that_took_longer() -> None:
    async def late(_: Peer) -> None:
        await asyncio.sleep(0.1)

    async with Backend(Peer.request, late, EVENTS) as backend, wired(backend, idle="50ms") as wire:
        answer = await ask(wire)
        with fails("upstream_idle_timeout", UpstreamTimeout):
            await asyncio.wait_for(read(answer), 1)


async def test_each_piece_begins_the_idle_deadline_anew() -> None:
    async def slowly(peer: Peer) -> None:
        for _ in range(8):
            await asyncio.sleep(0.03)
            await peer.send(chunk(b"a"))
        await peer.send(END)

    async with Backend(Peer.request, EVENTS, slowly) as backend, wired(backend, idle="200ms") as wire:
        assert await exchange(wire) == b"a" * 8


async def test_a_slow_reader_is_not_the_upstreams_silence() -> None:
    first, second = asyncio.Event(), asyncio.Event()
    steps = (Peer.request, EVENTS, first, turn, chunk(b"a"), second, chunk(b"b") + END)
    async with Backend(*steps) as backend, wired(backend, idle="250ms") as wire:
        answer = await ask(wire)
        for event, piece in ((first, b"a"), (second, b"b")):
            await asyncio.sleep(0.4)
            event.set()
            assert await anext(answer) == piece
        await answer.aclose()


async def test_an_answer_that_trickles_for_ever_has_until_the_total_deadline() -> None:
    async def trickle(peer: Peer) -> None:
        await peer.send(chunk(b"a"))
        await asyncio.sleep(0.01)

    async with Backend(Peer.request, EVENTS, forever(trickle)) as backend, wired(backend, total="500ms") as wire:
        answer = await ask(wire)
        with fails("upstream_total_timeout", UpstreamTimeout):
            await read(answer)
        await promptly(backend.peers[0].gone.wait())


async def test_a_deadline_of_one_request_does_not_meet_the_next() -> None:
    short = {"first_byte": "300ms", "idle": "300ms", "total": "300ms"}
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend, **short) as wire:
        for _ in range(6):
            await exchange(wire)
            await asyncio.sleep(0.08)
        assert len(backend.peers) == 1


# — backpressure


@pytest.mark.parametrize("piece", [bytes(100_000), b"x"])
async def test_a_firehose_is_held_back_and_then_read_to_its_end(piece: bytes) -> None:
    blocked = asyncio.Event()
    burst = chunk(piece) * (200_000 // len(chunk(piece)) + 1)
    bursts = 0

    async def firehose(peer: Peer) -> None:
        nonlocal bursts
        while not blocked.is_set():
            sending = asyncio.ensure_future(peer.send(burst))
            bursts += 1
            await asyncio.wait([sending], timeout=0.3)
            if not sending.done():
                blocked.set()
            await sending
        await peer.send(END)

    async with Backend(Peer.request, EVENTS, firehose) as backend, wired(backend) as wire:
        answer = await ask(wire)
        await asyncio.wait_for(blocked.wait(), 20)
        assert answer.waiting <= 64 * 1024
        assert sum(map(sys.getsizeof, answer.pieces)) <= 256 * 1024
        expected = bursts * len(burst) // len(chunk(piece)) * len(piece)
        assert expected == len(await read(answer))
        assert len(wire.idle) == 1


async def test_a_reader_that_comes_back_too_late_to_a_full_stream_is_told_so() -> None:
    steps = (Peer.request, EVENTS, forever(chunk(bytes(100_000))))
    async with Backend(*steps) as backend, wired(backend, total="100ms") as wire:
        answer = await ask(wire)
        await asyncio.wait_for(backend.peers[0].gone.wait(), 1)
        assert answer.waiting > 32 * 1024
        with fails("upstream_total_timeout", UpstreamTimeout):
            await read(answer)


async def test_what_waits_is_joined_and_nothing_else_is() -> None:
    more = asyncio.Event()
    steps = (Peer.request, EVENTS + chunk(b"a") + chunk(b"b"), more, chunk(b"c"), asyncio.Event())
    async with Backend(*steps) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert await anext(answer) == b"ab"
        more.set()
        assert await anext(answer) == b"c"
        await answer.aclose()


# — whoever leaves, leaves nothing behind


@pytest.mark.parametrize("sent", [EVENTS, EVENTS + chunk(b"a"), LENGTH[:-1], CLOSE])
async def test_the_upstream_notices_at_once_that_nobody_wants_the_rest(sent: bytes) -> None:
    async with Backend(Peer.request, sent) as backend, wired(backend) as wire:
        answer = await ask(wire)
        await answer.aclose()
        await promptly(backend.peers[0].gone.wait())
        with fails("upstream_disconnected"):
            await read(answer)


async def test_a_connection_that_we_do_not_read_is_not_kept() -> None:
    async with Backend(forever(Peer.request, ok(bytes(50_000)))) as backend, wired(backend) as wire:
        answer = await ask(wire)
        await until(lambda: answer.received)
        await answer.aclose()
        assert not wire.idle
        assert await exchange(wire) == bytes(50_000)


async def test_a_firehose_notices_too() -> None:
    async with Backend(Peer.request, EVENTS, forever(chunk(bytes(100_000)))) as backend, wired(backend) as wire:
        answer = await ask(wire)
        await anext(answer)
        await answer.aclose()
        await promptly(backend.peers[0].gone.wait())


async def test_a_cancelled_wait_for_the_head_closes_the_connection() -> None:
    async with Backend(Peer.request) as backend, wired(backend) as wire:
        asking = asyncio.create_task(ask(wire))
        await until(lambda: bool(backend.requests))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await promptly(backend.peers[0].gone.wait())


async def test_a_cancelled_question_is_not_sent_to_its_end() -> None:
    received = asyncio.get_running_loop().create_future()

    async def script(peer: Peer) -> None:
        await play(peer, Peer.head, asked)
        received.set_result(await peer.hung_up())

    asked = asyncio.Event()
    async with Backend(script) as backend, wired(backend) as wire:
        asking = asyncio.create_task(ask(wire, body=bytes(64_000_000)))
        await until(lambda: bool(backend.requests))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        asked.set()
        assert await received < 32_000_000  # what the kernel had taken


async def test_a_cancelled_connect_closes_its_socket() -> None:
    with black_hole() as url:
        wire = Wire(url)
        before = descriptors("socket:")
        asking = asyncio.create_task(ask(wire))
        await until(lambda: bool(descriptors("socket:") - before))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: not descriptors("socket:") - before)
        assert wire.in_flight == 0


async def test_a_cancel_at_any_moment_leaks_nothing() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await play(peer, EVENTS, chunk(b"a"), chunk(b"b"), END)

    async with Backend(forever(script)) as backend, wired(backend) as wire:
        outcomes = set()
        for turns in range(80):
            if turns % 2:
                await wire_emptied(wire)
            task = asyncio.create_task(exchange(wire))
            for _ in range(turns // 2):
                await asyncio.sleep(0)
            task.cancel()
            outcomes.add(type((await asyncio.gather(task, return_exceptions=True))[0]))
            assert wire.in_flight == 0
        assert {asyncio.CancelledError, bytes} == outcomes
        assert await exchange(wire) == b"ab"
        await until(lambda: sum(not peer.gone.is_set() for peer in backend.peers) == len(wire.idle))


async def wire_emptied(wire: Wire) -> None:
    for connection in list(wire.idle):
        connection.end()


# — TLS, and the other event loop


async def test_tls_is_verified_and_says_whom_it_wants(tmp_path: Path) -> None:
    server, pem = server_tls(tmp_path)
    wanted: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: wanted.append(name)
    async with Backend(forever(Peer.request, chunked(bytes(300_000), b"b")), tls=server) as backend:
        url = backend.url.replace("127.0.0.1", "localhost")
        wire = Wire(url, ssl_context=ssl.create_default_context(cafile=str(pem)))
        for _ in range(2):
            assert bytes(300_000) + b"b" == await exchange(wire)
        await wire.aclose()
        assert (wanted, len(backend.peers)) == (["localhost"], 1)
        with fails("upstream_connect_failed"):
            await ask(Wire(url))


def server_tls(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """A server for localhost, and the PEM file with its key and with the certificate that vouches for it."""
    pem = directory / "upstream.pem"
    pem.write_text(UPSTREAM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context, pem


async def test_a_certificate_is_verified_for_the_hosts_name_or_another_that_is_given(tmp_path: Path) -> None:
    context, pem = server_tls(tmp_path)
    ours = trusting(str(pem), None, None)
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        named = backend.url.replace("127.0.0.1", "localhost")
        for wire in (Wire(named, ssl_context=ours), Wire(backend.url, ssl_context=ours, server_name="localhost")):
            assert await exchange(wire) == b"{}"
            await wire.aclose()
        for wire in (
            Wire(backend.url, ssl_context=ours),
            Wire(named, ssl_context=ours, server_name="elsewhere"),
            Wire(named, ssl_context=trusting(None, None, None)),
        ):
            with fails("upstream_connect_failed"):
                await ask(wire)


async def test_a_certificate_is_shown_to_an_upstream_that_asks_for_one(tmp_path: Path) -> None:
    context, pem = server_tls(tmp_path)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(pem)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the handshake fails for both sides
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        url = backend.url.replace("127.0.0.1", "localhost")
        shown = Wire(url, ssl_context=trusting(str(pem), str(pem), str(pem)))
        assert await exchange(shown) == b"{}"
        await shown.aclose()
        with fails("upstream_connect_failed"):
            await ask(Wire(url, ssl_context=trusting(str(pem), None, None)))


@contextmanager
def demanding(pem: Path) -> Iterator[str]:
    """The address of OpenSSL's own server, which asks for a certificate, and tells by TLS 1.3 that it misses it."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl on this machine")
    command = [openssl, "s_server", "-accept", "127.0.0.1:0", *f"-cert {pem} -key {pem} -CAfile {pem}".split()]
    flags = ["-Verify", "1", "-verify_return_error", "-tls1_3"]
    with subprocess.Popen(  # it reads commands, and ends with them
        [*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        try:
            line = next(line for line in server.stdout if line.startswith(b"ACCEPT"))
            yield f"https://localhost:{int(line.rpartition(b':')[2])}"
        finally:
            server.terminate()


async def test_an_upstream_that_misses_our_certificate_after_the_handshake_was_not_connected(tmp_path: Path) -> None:
    _, pem = server_tls(tmp_path)
    with demanding(pem) as url:
        with fails("upstream_connect_failed"):
            await ask(Wire(url, ssl_context=trusting(str(pem), None, None)))


async def test_a_fault_of_tls_in_the_middle_of_an_answer_is_a_cut() -> None:
    """Only before the first byte it may be a certificate that the upstream misses."""
    async with Backend(Peer.request, EVENTS, chunk(b"a")) as backend, wired(backend) as wire:
        answer = await ask(wire)
        (connection,) = wire.busy
        connection.connection_lost(ssl.SSLError("bad record"))
        with fails("upstream_disconnected"):
            await read(answer)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_file_that_is_missing_is_named(tmp_path: Path, missing: int) -> None:
    _, pem = server_tls(tmp_path)
    files = [str(pem)] * 3
    files[missing] = str(tmp_path / "missing.pem")
    with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
        trusting(*files)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_file_that_is_no_pem_is_named(tmp_path: Path, broken: int) -> None:
    _, pem = server_tls(tmp_path)
    files = [str(pem)] * 3
    files[broken] = str(tmp_path / "broken.pem")
    Path(files[broken]).write_text("-----BEGIN NOTHING-----\n")
    with pytest.raises(ssl.SSLError, match=r"broken\.pem.*expected PEM"):
        trusting(*files)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(tmp_path: Path) -> None:
    _, pem = server_tls(tmp_path)
    key = tmp_path / "encrypted.pem"
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl on this machine")
    command = [openssl, "pkcs8", "-topk8", "-in", str(pem), "-out", str(key), "-passout", "pass:secret"]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ssl.SSLError, match=r"encrypted\.pem"):
        trusting(None, str(pem), str(key))


async def test_small_writes_are_not_held_back() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, wired(backend) as wire:
        await exchange(wire)
        (connection,) = wire.idle
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_stock_event_loop_serves_as_well() -> None:
    async def main() -> None:
        async with Backend(forever(Peer.request, chunked(bytes(300_000), b"b"))) as backend, wired(backend) as wire:
            for _ in range(3):
                assert bytes(300_000) + b"b" == await exchange(wire)
            answer = await ask(wire)
            await answer.aclose()
            await promptly(backend.peers[0].gone.wait())

    asyncio.run(main())


async def test_a_wire_tells_its_state() -> None:
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, wired(backend) as wire:
        answer = await ask(wire)
        assert f"<Wire http://127.0.0.1:{backend.port} 1 busy, 0 idle>" == repr(wire)
        assert repr(answer) == "<Reply 200 length, received, 2 bytes waiting>"
        await read(answer)
        assert f"<Wire http://127.0.0.1:{backend.port} 0 busy, 1 idle>" == repr(wire)


# For these tests alone: localhost, self-signed, until 2120.
UPSTREAM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgYPKamPvQy0LKGGV8
lCAzcKI2UdZion4h2mJSWa3qWHChRANCAASzgL6DhptC+x9/A+ElaHTSqrQTTSN2
m/P9u9mVEbPYhpwUF78XorhAh73XwIwQRu8u0KDKp/NTr3RH1EP9SLOt
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBXjCCAQSgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLOAvoOGm0L7H38D
4SVodNKqtBNNI3ab8/272ZURs9iGnBQXvxeiuECHvdfAjBBG7y7QoMqn81OvdEfU
Q/1Is62jRTBDMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAMBgNVHRMEBTADAQH/MB0G
A1UdDgQWBBSI/lnzuHvj4d7462at/Z+HLpiQDzAKBggqhkjOPQQDAgNIADBFAiBd
E7/0igALxbuEzzzltYUiM0WBWdK6LRQ+14X6tvCe2gIhAImUBziG1jSpAfLjkdqI
12mTgNHTQGb/NmsKSD/lOsaw
-----END CERTIFICATE-----
"""

"""The wire on the callers' side, over real sockets: what is refused, what is cut, and what uvicorn is not asked."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import pytest

from gateway import server
from gateway.asgi import END, POUR, Message, Receive, Scope, Send
from gateway.server import FIELDS, HEAD, TARGET, Patience, Protocol, config
from tests.corpus.requests import CHUNKED, GET, GROUPS, LENGTH, head
from tests.proving.house import Caller, served

# Nobody waits longer than this for what should be immediate; generous, because these machines are noisy.
SOON = 10.0
HELLO = head(line=GET)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
LAST = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"

OPEN: list[Message] = [
    {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]},
    {"type": "http.response.body", "body": b"ok"},
]


class Recorder:
    """An application that reads a request and says ok; it notes what it was given."""

    def __init__(self) -> None:
        self.called = 0
        self.scopes: list[Scope] = []  # of the requests that came whole
        self.bodies: list[bytes] = []
        self.left = asyncio.Event()  # a caller went before its request was here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called += 1
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                self.scopes.append(scope)
                self.bodies.append(body)
                await self.answer(scope, receive, send)
                return
            message = await receive()
        self.left.set()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in OPEN:
            await send(message)


class Slow(Recorder):
    """Reads on only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.go.wait()
        await super().__call__(scope, receive, send)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1 << 20)
    try:
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()


async def exchange(url: str, raw: bytes) -> bytes:
    """What comes back for these bytes until the connection ends."""
    async with connected(url) as caller:
        caller.writer.write(raw)
        return await asyncio.wait_for(caller.rest(), SOON)


async def answer(caller: Caller) -> bytes:
    """One answer, with its body, on a connection that may stay open."""
    start = await asyncio.wait_for(caller.head(), SOON)
    length = re.search(rb"content-length: (\d+)", start)
    assert length is not None
    return start + await caller.reader.readexactly(int(length[1]))


def refused(reply: bytes, status: int, code: str | None = None) -> None:
    """One whole answer in our own shape, and the last on its connection."""
    start, _, body = reply.partition(b"\r\n\r\n")
    line, *fields = start.decode().split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)
    assert line.split()[1] == str(status)
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert headers["content-length"] == str(len(body))
    assert headers["date"].endswith(" GMT")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code


def patient(monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    """Deadlines for what is served from now on."""
    monkeypatch.setattr(Protocol, "patience", Patience(**given))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not holds():
            await asyncio.sleep(0.005)


# — the corpus


class Made(NamedTuple):
    """What was made of a case."""

    status: int
    taken: bool
    closed: bool


EXPECTED = {name: {case.name: Made(*case[2:]) for case in group} for name, group in GROUPS.items()}


@pytest.mark.parametrize("group", GROUPS)
async def test_bytes_of_the_corpus_are_answered_once_or_refused_and_closed(group: str) -> None:
    """One answer and one request at most; a connection that stays open takes the next request as its own."""
    made = {}
    recorder = Recorder()
    async with served(recorder) as url:
        for case in GROUPS[group]:
            recorder.scopes.clear()
            async with connected(url) as caller:
                caller.writer.write(case.raw)
                first = await answer(caller)
                status, closed = int(first.split()[1]), b"connection: close" in first
                if status != 200:
                    refused(first, case.status)
                if closed:
                    assert await asyncio.wait_for(caller.rest(), SOON) == b"", case.name
                made[case.name] = Made(status, len(recorder.scopes) == 1, closed)
                if not closed:
                    caller.writer.write(HELLO)
                    assert await answer(caller) == OK, case.name
                assert len(recorder.scopes) == case.taken + (not closed), case.name
                assert b"/hidden" not in [scope["raw_path"] for scope in recorder.scopes]
    assert made == EXPECTED[group]


@pytest.mark.parametrize("group", GROUPS)
async def test_bytes_of_the_corpus_may_come_one_by_one(group: str) -> None:
    """What is made of them does not depend on where they are cut."""
    made = {}
    for case in GROUPS[group]:
        recorder = Recorder()
        protocol, transport, _ = connection(recorder)
        for i in range(len(case.raw)):
            if not transport.closed:
                protocol.data_received(case.raw[i : i + 1])
        await until(lambda: transport.written.endswith((b"ok", b"}")))  # noqa: B023
        assert transport.written.count(b"HTTP/1.1 ") == 1, case.name
        made[case.name] = Made(int(transport.written.split()[1]), len(recorder.scopes) == 1, transport.closed)
        protocol.connection_lost(None)
    assert made == EXPECTED[group]


def test_there_are_enough_of_them() -> None:
    names = [case.name for group in GROUPS.values() for case in group]
    assert (len(names) == len(set(names)), len(names) > 200) == (True, True)


# — a connection without a socket, whose time passes when a test says so


class _State:
    """What a protocol asks of its server."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.tasks: set[Any] = set()
        self.default_headers: list[tuple[bytes, bytes]] = []
        self.total_requests = 0


class _Transport(asyncio.Transport):
    """A socket that is not there; it notes what is done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = self.aborted = False
        self.waiting = 0  # bytes that nobody took

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False  # as a TLS one: it closes at once

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Plain(_Transport):
    """One that can close its sending side alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False
        self.reads = True

    def write(self, data: Any) -> None:
        assert not self.ended
        super().write(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


class _Clock:
    """An event loop with a clock of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.now = 1000.0
        self.timers: list[_Timer] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> _Timer:
        timer = _Timer(self.now + delay, lambda: callback(*args))
        self.timers.append(timer)
        return timer

    def passes(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [timer for timer in self.timers if timer.due <= until]:
            timer = min(due, key=lambda timer: timer.due)
            self.timers.remove(timer)
            self.now = timer.due
            if not timer.cancelled:
                timer.callback()
        self.now = until

    @property
    def armed(self) -> int:
        return sum(not timer.cancelled for timer in self.timers)


T = TypeVar("T", bound=_Transport)


class _Timer:
    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback = callback
        self.cancelled = False

    def when(self) -> float:
        return self.due

    def cancel(self) -> None:
        self.cancelled = True


def connection(application: Any) -> tuple[Protocol, _Transport, _Clock]:
    return over(_Transport(), application)


def over(transport: T, application: Any) -> tuple[Protocol, T, _Clock]:
    clock = _Clock()
    protocol = Protocol(config=config(application, drain=1), server_state=_State(), app_state={}, _loop=clock)
    protocol.connection_made(transport)
    return protocol, transport, clock


# — how much may come


def block(size: int) -> bytes:
    """A head whose header block has so many bytes, by the count of server.HEAD."""
    rest = size - len(b"host: gateway\r\n") - len(b"x: \r\n")
    return head(b"X: " + b"a" * rest, line=GET)


def target(size: int) -> bytes:
    return head(line=b"GET /" + b"a" * (size - 1) + b" HTTP/1.1")


def fields(number: int) -> bytes:
    return head(*[b"X: a"] * (number - 1), line=GET)


@pytest.mark.parametrize(
    ("raw", "limit", "status", "code"),
    [
        (block, HEAD, 431, "headers_too_large"),
        (fields, FIELDS, 431, "headers_too_large"),
        (target, TARGET, 414, "target_too_long"),
    ],
)
async def test_a_head_is_taken_up_to_its_limits(
    raw: Callable[[int], bytes], limit: int, status: int, code: str
) -> None:
    recorder = Recorder()
    async with served(recorder) as url, connected(url) as caller:
        for size in (limit - 1, limit):
            caller.writer.write(raw(size))
            assert await answer(caller) == OK
        refused(await exchange(url, raw(limit + 1)), status, code)
    assert recorder.called == 2


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (b"GET /", b"a" * 1000, 414),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 1000, 431),
        (b"GET / HTTP/1.1\r\nX:", b" " * 1000, 431),
        (b"GET / HTTP/1.1\r\n", b"X" * 1000, 431),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n", 431),
        (b"", b"\r\n" * 500, 431),
        (head(CHUNKED), b"0" * 1000, 431),
        (head(CHUNKED) + b"5;", b"a" * 1000, 431),
        (head(CHUNKED) + b"0\r\nX: ", b"a" * 1000, 431),
        (head(CHUNKED) + b"0\r\n", b"X: a\r\n" * 100, 431),
        (head(CHUNKED), b"1;" + b"a" * 1000 + b"\r\na\r\n", 431),
    ],
    ids=[
        "a target", "a value", "white space", "a name", "fields", "empty lines", "a chunk's size",
        "a chunk's extension", "a trailer", "trailers", "extensions of small chunks",
    ],
)  # fmt: skip
async def test_what_has_no_end_is_refused_while_it_comes(start: bytes, more: bytes, status: int) -> None:
    """No more than 64 KiB of it are taken, however it is cut."""
    protocol, transport, _ = connection(Recorder())
    protocol.data_received(start)
    taken = 0
    while not transport.closed:
        protocol.data_received(more)
        taken += len(more)
        assert taken < 64 * 1024
    refused(transport.written, status)


async def test_a_body_in_a_million_small_chunks_is_not_beside_the_limit() -> None:
    recorder = Recorder()
    protocol, transport, _ = connection(recorder)
    protocol.data_received(head(CHUNKED))
    for _ in range(100):
        protocol.data_received(b"0001\r\na\r\n" * 1000)
    protocol.data_received(b"0\r\n\r\n")
    await until(lambda: bool(transport.written))
    assert (recorder.bodies, transport.written) == ([b"a" * 100_000], OK)


async def test_trailers_are_dropped() -> None:
    """Not added to the headers of a request that is being served, as uvicorn has it."""
    recorder = Recorder()
    async with served(recorder) as url, connected(url) as caller:
        caller.writer.write(head(CHUNKED, b"Trailer: authorization") + b"0\r\nAuthorization: Bearer a\r\n\r\n")
        assert await answer(caller) == OK
    names = [name for name, _ in recorder.scopes[0]["headers"]]
    assert names == [b"host", b"transfer-encoding", b"trailer"]


# — how long it may take


async def test_a_head_that_takes_too_long_is_refused() -> None:
    protocol, transport, clock = connection(Recorder())
    clock.passes(9)
    protocol.data_received(HELLO[:5])
    clock.passes(0.9)
    assert not transport.closed
    clock.passes(0.2)
    refused(transport.written, 408, "request_timeout")
    assert transport.closed


@pytest.mark.parametrize("stray", [b"", b"\r\n"])
async def test_a_connection_that_asks_for_nothing_is_closed_without_a_word(stray: bytes) -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(stray)
    clock.passes(10)
    assert (transport.closed, transport.written) == (True, b"")


async def test_on_a_connection_that_is_kept_a_head_has_its_time_from_its_own_first_byte() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    clock.passes(60)
    protocol.data_received(HELLO[:5])
    clock.passes(9.9)
    protocol.data_received(HELLO[5:10])
    assert transport.written == OK
    clock.passes(0.2)
    assert transport.closed
    refused(transport.written.removeprefix(OK), 408)


async def test_each_head_has_the_whole_time() -> None:
    """Also where the one before it had come in pieces."""
    protocol, transport, clock = connection(Recorder())
    for _ in range(5):
        transport.writes.clear()
        protocol.data_received(HELLO[:5])
        clock.passes(9)
        protocol.data_received(HELLO[5:])
        await until(lambda: bool(transport.written))
        assert transport.written == OK
    assert not transport.closed


async def test_a_head_is_not_measured_from_the_body_before_it() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(head(LENGTH))
    clock.passes(9)
    protocol.data_received(b"hello")
    await until(lambda: bool(transport.written))
    protocol.data_received(HELLO[:5])
    clock.passes(9)
    assert (transport.written, transport.closed) == (OK, False)


async def test_a_head_does_not_wait_for_the_time_of_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a timer runs for longer, it is armed again."""
    patient(monkeypatch, head=1.0, body=10.0)
    protocol, transport, clock = connection(Recorder())
    clock.passes(0.5)
    protocol.data_received(head(LENGTH))
    clock.passes(1)
    protocol.data_received(b"hello")
    await until(lambda: bool(transport.written))
    protocol.data_received(HELLO[:5])
    clock.passes(1.1)
    refused(transport.written.removeprefix(OK), 408)


async def test_requests_that_come_whole_arm_nothing_but_the_timer_of_an_idle_connection() -> None:
    protocol, transport, clock = connection(Recorder())
    clock.passes(5)
    for _ in range(100):
        transport.writes.clear()
        protocol.data_received(head(LENGTH) + b"hello")
        await until(lambda: bool(transport.written))
    assert clock.armed == 2  # that, and the first look at the connection
    clock.passes(5)
    assert clock.armed == 1


async def test_a_connection_is_kept_for_75_seconds() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    clock.passes(74.9)
    protocol.data_received(b"\r\n")  # begins nothing, and so saves nothing
    assert not transport.closed
    clock.passes(0.2)
    assert (transport.closed, transport.aborted) == (True, False)


async def test_a_connection_is_not_idle_while_it_is_asked() -> None:
    slow = Slow()
    slow.go.set()
    protocol, transport, clock = connection(slow)
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    slow.go.clear()
    clock.passes(74)
    protocol.data_received(HELLO)
    clock.passes(10_000)
    slow.go.set()
    await until(lambda: transport.written == OK + OK)
    assert not transport.closed


async def test_who_has_not_read_his_answer_after_75_seconds_is_cut() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    transport.waiting = 1
    clock.passes(76)
    assert transport.aborted


@pytest.mark.parametrize(("pace", "cut"), [(0, True), (900, True), (1100, False), (100_000, False)])
async def test_a_body_has_a_pace_after_a_time_of_grace(pace: int, cut: bool) -> None:
    recorder = Recorder()
    protocol, transport, clock = connection(recorder)
    protocol.data_received(head(b"Content-Length: 10000000"))
    clock.passes(10)  # of grace: nothing needs to come
    for _ in range(30):
        if not transport.closed:
            protocol.data_received(b"a" * pace)
            await asyncio.sleep(0)
            clock.passes(1)
    assert transport.closed is cut
    if cut:
        refused(transport.written, 408, "request_timeout")
        await asyncio.wait_for(recorder.left.wait(), SOON)
        assert clock.now < 1022


async def test_who_sent_much_may_not_fall_silent() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(head(b"Content-Length: 1000000000"))
    for _ in range(12):
        protocol.data_received(b"a" * 1_000_000)
        await asyncio.sleep(0)
        clock.passes(1)
    clock.passes(20)
    refused(transport.written, 408)


async def test_a_body_that_we_do_not_read_is_not_late() -> None:
    slow = Slow()
    protocol, transport, clock = connection(slow)
    protocol.data_received(head(b"Content-Length: 100001"))
    protocol.data_received(b"a" * 100_000)
    clock.passes(1000)
    slow.go.set()
    await until(lambda: not protocol.flow.read_paused)
    clock.passes(9.9)  # its grace begins anew
    assert not transport.closed
    clock.passes(10.2)
    refused(transport.written, 408)


async def test_a_pause_of_ours_is_not_counted_however_short() -> None:
    """The last stretch brought 6 of its 10 KiB, because we did not read for most of it."""
    slow = Slow()
    protocol, transport, clock = connection(slow)
    protocol.data_received(head(b"Content-Length: 100000"))
    protocol.data_received(b"a" * 60_000)
    clock.passes(11)
    protocol.data_received(b"a" * 6_000)
    assert protocol.flow.read_paused
    clock.passes(8)
    slow.go.set()
    await until(lambda: not protocol.flow.read_paused)
    clock.passes(9)
    assert not transport.closed


async def test_a_body_that_we_have_not_asked_for_is_not_late() -> None:
    slow = Slow()
    protocol, transport, clock = connection(slow)
    protocol.data_received(head(LENGTH, b"Expect: 100-continue"))
    clock.passes(1000)
    assert not transport.closed
    slow.go.set()
    await until(lambda: bool(transport.written))
    protocol.data_received(b"hello")
    await until(lambda: transport.written.endswith(b"ok"))
    assert transport.written == b"HTTP/1.1 100 Continue\r\n\r\n" + OK


async def test_an_answer_that_has_begun_is_cut_and_not_followed_by_another() -> None:
    class Early(Recorder):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send(OPEN[0])
            await super().__call__(scope, receive, send)

    early = Early()
    protocol, transport, _ = connection(early)
    protocol.data_received(head(CHUNKED))
    await until(lambda: bool(transport.written))
    protocol.data_received(b"x")
    assert (transport.aborted, transport.written.count(b"HTTP/1.1")) == (True, 1)
    await asyncio.wait_for(early.left.wait(), SOON)


async def test_an_answer_that_began_early_stays_the_last() -> None:
    """Its head said so, though the whole request came before its end."""

    class Early(Recorder):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send(OPEN[0])
            await super().__call__(scope, receive, send)

        async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send(OPEN[1])

    protocol, transport, _ = connection(Early())
    protocol.data_received(head(LENGTH))
    await until(lambda: bool(transport.written))
    protocol.data_received(b"hello")
    await until(lambda: transport.written.endswith(b"ok"))
    assert (transport.written, transport.closed) == (LAST, True)


async def test_who_takes_something_is_not_cut() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    clock.passes(11)
    transport.waiting = 100_000
    protocol.pause_writing()
    for _ in range(2):
        clock.passes(29)
        transport.waiting -= 1
        clock.passes(1)
        assert not transport.closed
    clock.passes(11)
    protocol.resume_writing()
    assert clock.armed <= 1
    protocol.pause_writing()
    clock.passes(30)
    assert transport.aborted


async def test_what_is_closed_with_something_to_write_is_cut_when_nobody_takes_it() -> None:
    protocol, transport, clock = connection(Recorder())
    transport.waiting = 10
    protocol.data_received(head(b"Connection: close", line=GET))
    await until(lambda: transport.closed)
    protocol.resume_writing()  # what asyncio says below its mark, and it is not the end
    clock.passes(29)
    assert not transport.aborted
    clock.passes(1)
    assert transport.aborted


async def test_a_connection_that_is_lost_leaves_no_timer() -> None:
    protocol, transport, clock = connection(Recorder())
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    protocol.pause_writing()
    protocol.connection_lost(ConnectionResetError())
    assert clock.armed == 0


# — a close while the caller still sends


class Early(Recorder):
    """Answers before the request is here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(scope, receive, send)


async def test_who_still_sends_when_he_is_refused_has_a_second_to_read_why() -> None:
    protocol, transport, clock = over(_Plain(), Recorder())
    protocol.data_received(head(CHUNKED) + b"zz")
    refused(transport.written, 400, "invalid_http")
    for _ in range(2):
        protocol.data_received(bytes(1000))
    clock.passes(0.9)
    assert (transport.ended, transport.closed) == (True, False)
    clock.passes(0.1)
    assert (transport.closed, transport.aborted) == (True, False)


async def test_who_sends_too_much_of_what_nobody_reads_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_DROPPED", 5000)
    protocol, transport, _ = over(_Plain(), Recorder())
    protocol.data_received(head(CHUNKED) + b"zz")
    protocol.data_received(bytes(5000))
    assert not transport.closed
    protocol.data_received(b"a")
    assert transport.aborted


async def test_what_comes_too_early_is_not_a_reason_to_cut_who_is_owed_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_DROPPED", 10)
    slow = Slow()
    protocol, transport, _ = over(_Plain(), slow)
    protocol.data_received(HELLO * 2)
    protocol.data_received(HELLO)
    assert not transport.closed
    slow.go.set()
    await until(lambda: transport.ended)
    assert (transport.written, transport.closed) == (LAST, False)  # and he may read it


async def test_what_comes_after_the_last_answer_is_not_looked_at() -> None:
    protocol, transport, _ = over(_Plain(), Early())
    protocol.data_received(head(CHUNKED))
    await until(lambda: transport.ended)
    protocol.data_received(b"no chunk")
    assert transport.written == LAST


async def test_what_waits_in_the_socket_is_dropped_too_before_a_close() -> None:
    """Reading had been paused; a close with something unread would be a reset."""
    protocol, transport, _ = over(_Plain(), Early())
    protocol.data_received(head(b"Content-Length: 1000000") + bytes(100_000))
    assert not transport.reads
    await until(lambda: transport.ended)
    assert transport.reads


async def test_empty_lines_without_end_are_refused_once() -> None:
    protocol, transport, _ = over(_Plain(), Recorder())
    for _ in range(2):
        protocol.data_received(b"\r\n" * HEAD)
    refused(transport.written, 431, "headers_too_large")
    assert (transport.ended, transport.closed) == (True, False)


# — what is poured


class Pouring(Recorder):
    """Begins an answer with these fields, pours a piece, and ends it when it is told to."""

    def __init__(self, *fields: tuple[bytes, bytes]) -> None:
        super().__init__()
        self.fields = list(fields)
        self.took: list[bool] = []
        self.go = asyncio.Event()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.fields})
        self.pour = scope[POUR]
        self.took.append(self.pour(b"first"))
        await self.go.wait()
        await send(END)


CHUNKS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_a_piece_is_poured_behind_the_head_and_in_one_write_with_it() -> None:
    pouring = Pouring()
    protocol, transport, _ = connection(pouring)
    protocol.data_received(HELLO)
    await until(lambda: bool(pouring.took))
    await asyncio.sleep(0)
    assert pouring.pour(b"another")
    pouring.go.set()
    await until(lambda: len(transport.writes) == 3)
    assert transport.writes == [CHUNKS + b"5\r\nfirst\r\n", b"7\r\nanother\r\n", b"0\r\n\r\n"]
    assert pouring.took == [True]


async def test_nothing_is_poured_into_a_body_of_a_known_length() -> None:
    pouring = Pouring((b"content-length", b"5"))
    protocol, transport, _ = connection(pouring)
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.writes))
    assert pouring.took == [False]
    assert transport.written.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("how", ["he does not read", "he is lost", "he was closed by asyncio"])
async def test_nothing_is_poured_for_a_caller_who_does_not_take_it(how: str) -> None:
    pouring = Pouring()
    protocol, transport, _ = connection(pouring)
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.writes))
    match how:
        case "he does not read":
            protocol.pause_writing()
        case "he is lost":
            protocol.connection_lost(ConnectionResetError())
        case _:
            transport.closed = True
    assert not pouring.pour(b"more")
    assert transport.written == CHUNKS + b"5\r\nfirst\r\n"
    if how == "he does not read":
        protocol.resume_writing()
        assert pouring.pour(b"more")


# — the same over sockets


class Silent(Recorder):
    """Never answers; it notes when its caller left."""

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert message["type"] == "http.disconnect"
        self.left.set()


class Firehose(Recorder):
    """Answers without end; it notes when it was told that nobody reads."""

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            await asyncio.sleep(0)
        assert gone.result() == {"type": "http.disconnect"}
        self.left.set()


async def test_a_head_that_drips_is_cut_and_a_caller_beside_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, head=1.0)
    async with served(Recorder()) as url, connected(url) as slow, connected(url) as healthy:

        async def drip() -> None:
            for byte in head(b"X: " + b"a" * 10_000):
                slow.writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        dripping = asyncio.ensure_future(drip())
        cut = asyncio.ensure_future(slow.rest())
        answered = 0
        while not cut.done():
            healthy.writer.write(HELLO)
            assert await answer(healthy) == OK
            answered += 1
            await asyncio.sleep(0.02)
        dripping.cancel()
        refused(await cut, 408, "request_timeout")
        assert answered > 1


async def test_who_stops_reading_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, stall=0.5)
    hose = Firehose()
    async with served(hose) as url:
        with socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            caller.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(caller, ("127.0.0.1", int(url.rpartition(":")[2])))
            await loop.sock_sendall(caller, HELLO)
            await asyncio.wait_for(hose.left.wait(), SOON)


async def test_a_thousand_idle_connections_do_not_keep_a_caller_from_being_answered() -> None:
    async with served(Recorder()) as url:
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)] if _files(2500) else []
        try:
            assert len(idle) == 1000
            async with connected(url) as caller:
                caller.writer.write(HELLO)
                assert await answer(caller) == OK
        finally:
            for sock in idle:
                sock.close()


def _files(number: int) -> bool:
    """Whether so many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    return number <= hard


async def test_who_pipelines_and_leaves_is_seen_to_leave() -> None:
    """The bytes that come too early do not hide it, however many they are."""
    silent = Silent()
    async with served(silent) as url:
        async with connected(url) as caller:
            caller.writer.write(HELLO)
            await until(lambda: bool(silent.scopes))
            for _ in range(64):
                caller.writer.write(HELLO * 1000)
                await caller.writer.drain()
            assert not silent.left.is_set()
        await asyncio.wait_for(silent.left.wait(), SOON)
    assert silent.called == 1


async def test_an_answer_that_has_begun_is_finished_for_who_pipelines() -> None:
    """Its head went out without a word of it; the connection ends all the same."""

    class Half(Recorder):
        go = asyncio.Event()

        async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send(OPEN[0])
            await self.go.wait()
            await send(OPEN[1])

    half = Half()
    protocol, transport, _ = connection(half)
    protocol.data_received(HELLO)
    await until(lambda: bool(transport.written))
    protocol.data_received(HELLO)
    half.go.set()
    await until(lambda: transport.closed)
    assert (half.called, transport.written) == (1, OK)


async def test_who_closes_his_sending_side_has_left() -> None:
    """uvicorn drops the connection then: no answer comes, and the application is told."""
    silent = Silent()
    async with served(silent) as url, connected(url) as caller:
        caller.writer.write(HELLO)
        await until(lambda: bool(silent.scopes))
        caller.writer.write_eof()
        assert await asyncio.wait_for(caller.rest(), SOON) == b""
        await asyncio.wait_for(silent.left.wait(), SOON)


async def test_an_answer_before_the_end_of_its_request_is_the_last() -> None:
    """The rest of the body is not read: an upload without end is cut."""
    async with served(Early()) as url, connected(url) as caller:
        caller.writer.write(head(b"Content-Length: 10000000000"))
        assert await asyncio.wait_for(caller.rest(), SOON) == LAST
        sent, megabyte = 0, bytes(1 << 20)
        with pytest.raises(ConnectionError):
            while sent < 1 << 30:
                caller.writer.write(megabyte)
                await caller.writer.drain()
                sent += len(megabyte)


async def test_a_body_that_turns_out_to_be_wrong_reaches_nobody() -> None:
    recorder = Recorder()
    async with served(recorder) as url, connected(url) as caller:
        caller.writer.write(head(CHUNKED) + b"5\r\nhello\r\n")
        await until(lambda: recorder.called == 1)
        caller.writer.write(b"x")
        refused(await asyncio.wait_for(caller.rest(), SOON), 400, "invalid_http")
        await asyncio.wait_for(recorder.left.wait(), SOON)
    assert recorder.scopes == []


async def _raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a defect")


async def _returns(scope: Scope, receive: Receive, send: Send) -> None: ...


@pytest.mark.parametrize("application", [_raises, _returns])
async def test_an_application_that_fails_is_answered_for_in_our_own_shape(application: Any) -> None:
    async with served(application) as url:
        refused(await exchange(url, HELLO), 500, "internal_error")


async def test_what_is_refused_leaves_no_warning_and_none_of_its_bytes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="uvicorn.error")
    async with served(Recorder()) as url:
        for raw in (b"SECRET\r\n\r\n", head(b"Host: SECRET"), head(b"Upgrade: SECRET", b"Connection: upgrade")):
            refused(await exchange(url, raw), 400, "invalid_http")
    lines = [record for record in caplog.records if record.name.startswith("uvicorn")]
    assert [(line.levelname, line.getMessage()) for line in lines if "refused" in line.getMessage()] == [
        ("DEBUG", "refused a request: 400 invalid_http")
    ] * 3
    assert "SECRET" not in caplog.text
    assert [line for line in lines if line.levelno >= logging.WARNING] == []


# — one write where uvicorn makes two


def gathered() -> tuple[server._Gathered, _Transport]:
    noted = _Transport()
    protocol = SimpleNamespace(sends_still=lambda: False, read_again=lambda: None, watch_writes=lambda: None)
    return server._Gathered(noted, asyncio.get_running_loop(), cast(Any, protocol)), noted


async def test_a_head_leaves_with_what_follows_it() -> None:
    transport, noted = gathered()
    for data in (b"HTTP/1.1 200 OK\r\n\r\n", b"body", b"more"):
        transport.write(data)
    await asyncio.sleep(0)
    assert noted.writes == [b"HTTP/1.1 200 OK\r\n\r\nbody", b"more"]


async def test_a_head_that_nothing_follows_leaves_in_the_same_turn() -> None:
    transport, noted = gathered()
    transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
    assert noted.writes == []
    await asyncio.sleep(0)
    assert noted.writes == [b"HTTP/1.1 200 OK\r\n\r\n"]


@pytest.mark.parametrize(("end", "writes"), [("close", [b"HTTP/1.1 200 OK\r\n\r\n"]), ("abort", [])])
async def test_a_head_leaves_before_a_close_and_never_after_an_abort(end: str, writes: list[bytes]) -> None:
    transport, noted = gathered()
    transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
    getattr(transport, end)()
    await asyncio.sleep(0)
    assert noted.writes == writes


async def test_a_connection_that_died_by_itself_is_not_written_to() -> None:
    transport, noted = gathered()
    transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
    noted.closed = True
    await asyncio.sleep(0)
    assert noted.writes == []


# — leaving, and the end of the process


async def test_who_closes_his_side_with_a_little_unread_has_left_at_once() -> None:
    """asyncio would first write what he may never take, and tell nobody."""
    application = Pouring()
    protocol, transport, _ = over(_Plain(), application)
    protocol.data_received(HELLO)
    await asyncio.sleep(0)
    transport.waiting = 1000
    protocol.eof_received()
    assert transport.aborted
    application.go.set()


async def test_who_closes_his_side_and_does_not_take_his_answer_is_cut() -> None:
    protocol, transport, clock = over(_Plain(), Recorder())
    protocol.data_received(HELLO)
    await asyncio.sleep(0.05)
    assert protocol.cycle.response_complete
    transport.waiting = 1000
    protocol.eof_received()
    assert not transport.aborted
    clock.passes(31)
    assert transport.aborted


async def test_a_request_whose_body_comes_while_the_process_ends_is_the_last_one() -> None:
    recorder = Recorder()
    protocol, transport, _ = over(_Plain(), recorder)
    protocol.data_received(head(b"Content-Length: 4") + b"ab")
    protocol.shutdown()
    protocol.data_received(b"cd")
    await asyncio.sleep(0.05)
    assert b"connection: close" in transport.written
    assert transport.closed


async def test_a_deadline_says_nothing_on_a_connection_that_is_closed_already() -> None:
    protocol, transport, clock = over(_Plain(), Recorder())
    protocol.data_received(b"POST / HTTP/1.1\r\n")
    clock.passes(9.5)
    protocol.data_received(b"\x00\r\n")
    written = transport.written
    clock.passes(0.6)
    assert (transport.ended, transport.written) == (True, written)

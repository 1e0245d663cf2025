"""Stock httpx as a transport to an upstream: the same answers and failures as the wire's, and nothing left behind."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

import gateway.bridge
from gateway.bridge import Body, Bridge
from gateway.errors import ClientGone, TooLarge, UpstreamFailed, UpstreamTimeout
from gateway.language import Timeouts
from gateway.wire import Stream, trusting
from tests.corpus.responses import CASES, Case
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, chunked, forever, ok, play
from tests.proving.descriptors import descriptors
from tests.test_wire import Timed, black_hole, demanding, fails, server_tls, uploading

BODY = b'{"prompt": "hello"}'


class TimedBridge(Timed, Bridge):
    pass


@asynccontextmanager
async def bridged(url: str, *, ca: Path | None = None, **timeouts: str) -> AsyncIterator[Bridge]:
    """A bridge to an upstream; at the end nothing may be in flight."""
    bridge = TimedBridge(url, ssl_context=None if ca is None else trusting(str(ca), None, None))
    bridge.timeouts = Timeouts.model_validate(timeouts)
    try:
        yield bridge
        assert bridge.in_flight == 0
    finally:
        await bridge.aclose()


def question(method: str = "POST", body: bytes = BODY, **extensions: object) -> httpx.Request:
    fields = {"host": "localhost", "content-length": str(len(body))}
    url = "http://upstream/v1/completions?a=%2Fb"
    return httpx.Request(
        method, url, headers=fields, stream=httpx.ByteStream(b""), extensions={"body": body, **extensions}
    )


async def ask(bridge: Bridge, method: str = "POST", body: bytes = BODY, **extensions: object) -> Body:
    response = await bridge.handle_async_request(question(method, body, **extensions))
    stream: Stream = cast(Body, response.stream)  # mypy: it offers what pools ask for
    return cast(Body, stream)


async def read(answer: Body) -> bytes:
    try:
        return b"".join([piece async for piece in answer])
    finally:
        await answer.aclose()


async def exchange(bridge: Bridge, method: str = "POST", body: bytes = BODY, **extensions: object) -> bytes:
    return await read(await ask(bridge, method, body, **extensions))


async def until(holds: Callable[[], bool]) -> None:
    """For what the event loop does by itself and announces to nobody."""
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


async def gone(peer: Peer) -> None:
    await asyncio.wait_for(peer.gone.wait(), 5)


# — streamed bodies


async def slow(
    *, number: int = 4, every: float = 0.1, then: asyncio.Event | Exception | None = None
) -> AsyncIterator[bytes]:
    for _ in range(number):
        await asyncio.sleep(every)
        yield b"abc"
    if isinstance(then, Exception):
        raise then
    if then is not None:
        await then.wait()


async def test_a_streamed_body_arrives_whole() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, bridged(backend.url) as bridge:
        response = await bridge.handle_async_request(uploading(slow(number=1000, every=0), 3000))
        assert await read(cast(Body, response.stream)) == b"{}"
    assert backend.requests[0].body == b"abc" * 1000


async def test_a_stream_of_unknown_length_is_sent_in_chunks() -> None:
    async def script(peer: Peer) -> None:
        received = await peer._reader.readuntil(b"0\r\n\r\n")
        assert received.endswith(b"\r\n\r\n3\r\nabc\r\n3\r\nabc\r\n0\r\n\r\n")

    async with Backend(script, ok(b"{}")) as backend, bridged(backend.url) as bridge:
        response = await bridge.handle_async_request(uploading(slow(number=2), None))
        assert await read(cast(Body, response.stream)) == b"{}"


@pytest.mark.parametrize("error", [ClientGone(), TooLarge("more")], ids=["gone", "too large"])
async def test_what_a_stream_raises_comes_out_as_it_is_and_cuts_the_line(error: Exception) -> None:
    async with Backend(Peer.head) as backend, bridged(backend.url) as bridge:
        with pytest.raises(type(error)) as caught:
            await bridge.handle_async_request(uploading(slow(then=error), None))
        assert caught.value is error
        await gone(backend.peers[0])


async def test_the_first_byte_of_an_answer_counts_from_the_end_of_a_stream() -> None:
    loop = asyncio.get_running_loop()
    late = (Peer.request, lambda _: asyncio.sleep(0.05), ok(b"{}"))
    async with Backend(*late) as backend, bridged(backend.url, first_byte="200ms", idle="60ms") as bridge:
        response = await bridge.handle_async_request(uploading(slow(), 12))
        assert await read(cast(Body, response.stream)) == b"{}"
    async with Backend(Peer.request) as backend, bridged(backend.url, first_byte="200ms") as bridge:
        started = loop.time()
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await bridge.handle_async_request(uploading(slow(), 12))
        assert 0.58 < loop.time() - started < 1.5


async def test_a_stream_whose_caller_took_long_before_is_sent_all_the_same() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, bridged(backend.url, first_byte="200ms") as bridge:
        request = uploading(slow(number=1), 3)
        request.extensions["since"] = asyncio.get_running_loop().time() - 10
        response = await bridge.handle_async_request(request)
        assert await read(cast(Body, response.stream)) == b"{}"


async def test_an_upstream_that_takes_nothing_of_a_stream_has_until_the_idle_deadline() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1_000_000)

    async with Backend(Peer.head, asyncio.Event()) as backend, bridged(backend.url, idle="300ms") as bridge:
        with fails("upstream_idle_timeout", UpstreamTimeout):
            await bridge.handle_async_request(uploading(endless(), None))


async def test_the_total_counts_while_a_stream_is_slow() -> None:
    async with Backend(Peer.head) as backend, bridged(backend.url, total="300ms", idle="100ms") as bridge:
        with fails("upstream_total_timeout", UpstreamTimeout):
            await bridge.handle_async_request(uploading(slow(then=asyncio.Event()), None))


async def test_an_early_answer_is_heard_when_the_stream_has_ended() -> None:
    early = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 9\r\n\r\ntoo large"
    async with Backend(Peer.head, early) as backend, bridged(backend.url) as bridge:
        response = await bridge.handle_async_request(uploading(slow(), None))
        assert (response.status_code, await read(cast(Body, response.stream))) == (413, b"too large")


async def test_a_stream_is_let_go_of_where_its_upstream_closes() -> None:
    ended: list[bool] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield bytes(1000)
        finally:
            ended.append(True)

    async with Backend(Peer.head, Peer.reset) as backend, bridged(backend.url) as bridge:
        with fails("upstream_disconnected"):
            await bridge.handle_async_request(uploading(endless(), None))
        assert ended == [True]


# — what goes out and what comes back


async def test_a_request_arrives_with_its_target_its_fields_and_its_body() -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend, bridged(backend.url) as bridge:
        assert await exchange(bridge) == b"{}"
    (request,) = backend.requests
    assert request.line == b"POST /v1/completions?a=%2Fb HTTP/1.1"
    assert request.headers == [(b"host", b"localhost"), (b"content-length", b"19")]
    assert request.body == BODY


async def test_an_answer_keeps_its_status_and_its_headers_as_they_came() -> None:
    message = b"HTTP/1.1 503 Down\r\nSet-Cookie: a\r\nset-cookie: b\r\nX-Odd: \xff\r\nContent-Length: 1\r\n\r\na"
    async with Backend(Peer.request, message) as backend, bridged(backend.url) as bridge:
        response = await bridge.handle_async_request(question())
        assert await read(cast(Body, response.stream)) == b"a"
    expected = [(b"Set-Cookie", b"a"), (b"set-cookie", b"b"), (b"X-Odd", b"\xff"), (b"Content-Length", b"1")]
    assert (503, expected) == (response.status_code, response.headers.raw)


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\nb", "a\0b"])
async def test_no_value_can_split_the_head(value: str) -> None:
    async with Backend(Peer.request) as backend, bridged(backend.url) as bridge:
        request = question()
        request.headers["tag"] = value
        with pytest.raises(ValueError, match="CR, LF or NUL"):
            await bridge.handle_async_request(request)
    assert not backend.peers


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with Backend(Peer.request, ok(b"{}")) as backend, bridged(backend.url) as bridge:
        assert await exchange(bridge) == b"{}"


async def test_pieces_are_yielded_as_they_come_and_the_last_of_a_known_length_is_told() -> None:
    more = asyncio.Event()
    message = ok(b"abcdef")
    async with Backend(Peer.request, message[:-3], more, message[-3:]) as backend, bridged(backend.url) as bridge:
        told, answer = [], await ask(bridge)
        async for piece in answer:
            told.append((piece, answer.complete, answer.received))
            more.set()
        await answer.aclose()
    assert told == [(b"abc", False, False), (b"def", True, True)]


@pytest.mark.parametrize(("rest", "expected"), [(END, True), (chunk(b"b") + END, False), (None, False)])
async def test_whether_the_end_comes_next_can_be_waited_for(rest: bytes | None, expected: bool) -> None:
    go = asyncio.Event()
    steps = (Peer.request, EVENTS + chunk(b"a"), go, rest or asyncio.Event())
    async with Backend(*steps) as backend, bridged(backend.url) as bridge:
        answer = await ask(bridge)
        assert await anext(answer) == b"a"
        go.set()
        assert await answer.ends(0.3) is expected
        assert answer.complete is expected
        if rest is not None:
            assert await read(answer) == (b"" if expected else b"b")
        await answer.aclose()


# What h11 takes and llhttp does not. Nothing of it can reach another answer, because no connection serves twice.
LENIENT: dict[str, tuple[int, bytes] | str] = {
    "lines ended by LF": (200, b""),
    "a folded value": (200, b"a"),
    "chunks in 1.0": (200, b"a"),
    "two lengths that agree": (200, b"a"),
    "a list of one length": (200, b"a"),
    "spaces behind a chunk size": (200, b"hello"),
    "a semicolon and no extension": (200, b"aa"),
    "a quote that is not closed": (200, b"hello"),
    "NUL in a chunk extension": (200, b"a"),
    "CR in a chunk extension": (200, b"a"),
    "a chunk ended by LF": "upstream_idle_timeout",
    "a length beyond 64 bits": "upstream_idle_timeout",
    "a chunk size beyond 64 bits": "upstream_idle_timeout",
    "HTTP/0.9": "upstream_disconnected",
}


@pytest.mark.parametrize("name", CASES)
async def test_each_answer_of_the_corpus_is_relayed_or_refused_and_none_of_it_reaches_the_next(name: str) -> None:
    case: Case = CASES[name]

    async def script(peer: Peer) -> None:
        await peer.request()
        if len(backend.requests) > 1:
            await peer.send(ok(b"next"))
            return
        await peer.send(case.raw)
        if case.closes:
            await peer.close()

    async with Backend(forever(script)) as backend, bridged(backend.url, first_byte="1s", idle="1s") as bridge:
        outcome: tuple[int, bytes] | str | None
        try:
            response = await bridge.handle_async_request(question(case.method))
            outcome = response.status_code, await read(cast(Body, response.stream))
        except UpstreamFailed as failed:
            outcome = failed.code
        assert LENIENT.get(name, case.expected) == outcome
        assert await exchange(bridge) == b"next"


@pytest.mark.parametrize("how", [Peer.close, Peer.reset])
@pytest.mark.parametrize("cut", [b"", ok(b"abc")[:-1], EVENTS, EVENTS + b"3\r\nab", chunked(b"a")[:-2]])
async def test_a_cut_answer_never_ends_cleanly(cut: bytes, how: Step) -> None:
    async with Backend(Peer.request, cut, how) as backend, bridged(backend.url) as bridge:
        with fails("upstream_disconnected"):
            await exchange(bridge)
        assert (bridge.in_flight, len(backend.requests)) == (0, 1)


async def test_an_answer_that_failed_fails_again() -> None:
    async with Backend(Peer.request, EVENTS, Peer.close) as backend, bridged(backend.url) as bridge:
        answer = await ask(bridge)
        for _ in range(2):
            with fails("upstream_disconnected"):
                await anext(answer)
        with fails("upstream_disconnected"):
            await answer.ends(1)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b"x", b"a\r\nset-cookie: b")], 200),
        ([(b"x", b"a\0")], 200),
        ([(b"x: y", b"a")], 200),
        ([(b"", b"a")], 200),
        ([(b"x", b"y")] * 201, 200),
        ([(b"x", b"y" * 70_000)], 200),
        ([(b"content-length", b"1"), (b"Transfer-Encoding", b"chunked")], 200),
        ([], 101),
        ([], 600),
    ],
)
def test_a_head_that_must_not_be_relayed_is_not_valid(fields: list[tuple[bytes, bytes]], status: int) -> None:
    """HTTP/2 as httpcore reads it has no such rules, and nginx sends no such head."""
    version = {"http_version": b"HTTP/2"}
    assert not gateway.bridge._valid(httpx.Response(status, headers=fields, extensions=version))
    assert gateway.bridge._valid(httpx.Response(200, headers=[(b"x", b"y")] * 200, extensions=version))


# — deadlines


async def test_an_upstream_that_does_not_accept_is_told_as_a_connect_timeout() -> None:
    with black_hole() as url:
        async with bridged(url, connect="300ms") as bridge:
            with fails("upstream_connect_timeout", UpstreamTimeout):
                await ask(bridge)


async def test_an_upstream_that_refuses_is_told_as_such() -> None:
    async with Backend() as backend:
        pass
    async with bridged(backend.url) as bridge:
        with fails("upstream_connect_failed"):
            await ask(bridge)


@pytest.mark.parametrize(
    ("deadline", "sent", "code"),
    [
        ("first_byte", b"", "upstream_first_byte_timeout"),
        ("first_byte", b"HTTP/1.1 102 Processing\r\n\r\n", "upstream_first_byte_timeout"),
        ("idle", EVENTS + chunk(b"a"), "upstream_idle_timeout"),
        ("total", EVENTS + chunk(b"a"), "upstream_total_timeout"),
        ("total", b"", "upstream_total_timeout"),
    ],
)
async def test_an_upstream_that_falls_silent_has_until_the_deadline(deadline: str, sent: bytes, code: str) -> None:
    async with Backend(Peer.request, sent) as backend, bridged(backend.url) as bridge:
        short = Timeouts.model_validate({deadline: "300ms"})
        with fails(code, UpstreamTimeout):
            await exchange(bridge, timeouts=short)
        await gone(backend.peers[0])


async def test_endless_informational_answers_end_at_the_first_byte_deadline() -> None:
    flood = forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
    async with Backend(Peer.request, flood) as backend, bridged(backend.url, first_byte="500ms") as bridge:
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await ask(bridge)


async def test_first_byte_and_total_count_from_when_the_request_began() -> None:
    loop = asyncio.get_running_loop()
    async with Backend(forever(Peer.request)) as backend, bridged(backend.url) as bridge:
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await ask(bridge, since=loop.time() - 119.5)
        with fails("upstream_total_timeout", UpstreamTimeout):
            patient = Timeouts.model_validate({"first_byte": "2h"})
            await ask(bridge, since=loop.time() - 3599.5, timeouts=patient)
        assert len(backend.requests) == 2
        with fails("upstream_first_byte_timeout", UpstreamTimeout):
            await ask(bridge, since=loop.time() - 120)
        assert len(backend.requests) == 2
    with black_hole() as url:
        async with bridged(url) as bridge:
            with fails("upstream_first_byte_timeout", UpstreamTimeout):
                await asyncio.wait_for(ask(bridge, since=loop.time() - 119.5), 1.9)


async def test_the_connect_deadline_is_over_when_the_connection_is_there() -> None:
    async def works(_: Peer) -> None:
        await asyncio.sleep(0.8)

    async with Backend(Peer.request, works, ok(b"{}")) as backend, bridged(backend.url, connect="400ms") as bridge:
        assert await exchange(bridge) == b"{}"


async def test_a_tls_handshake_that_does_not_end_is_part_of_the_connect_and_is_hung_up() -> None:
    async with Backend() as backend, bridged(backend.url.replace("http:", "https:"), connect="400ms") as bridge:
        with fails("upstream_connect_timeout", UpstreamTimeout):
            await ask(bridge)
        await gone(backend.peers[0])


# — whoever leaves, leaves nothing behind


@pytest.mark.parametrize("sent", [EVENTS, EVENTS + chunk(b"a"), ok(b"abc")[:-1]])
async def test_the_upstream_notices_that_nobody_wants_the_rest(sent: bytes) -> None:
    async with Backend(Peer.request, sent) as backend, bridged(backend.url) as bridge:
        answer = await ask(bridge)
        await answer.aclose()
        await gone(backend.peers[0])
        with fails("upstream_disconnected"):
            await read(answer)


async def test_an_answer_is_closed_while_its_end_is_being_waited_for() -> None:
    async with Backend(Peer.request, EVENTS) as backend, bridged(backend.url) as bridge:
        answer = await ask(bridge)
        reading = asyncio.create_task(anext(answer))
        await asyncio.sleep(0)
        await answer.aclose()
        with fails("upstream_disconnected"):
            await reading
        await gone(backend.peers[0])


async def test_a_cancelled_wait_for_the_head_ends_the_upstreams_work() -> None:
    async with Backend(Peer.request) as backend, bridged(backend.url) as bridge:
        asking = asyncio.create_task(ask(bridge))
        await until(lambda: bool(backend.requests))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await gone(backend.peers[0])


async def test_a_cancel_at_any_moment_leaks_nothing() -> None:
    async def script(peer: Peer) -> None:
        await play(peer, Peer.request, EVENTS, chunk(b"a"), chunk(b"b"), END)

    async with Backend(forever(script)) as backend, bridged(backend.url) as bridge:
        before = descriptors("socket:")
        outcomes = set()
        for turns in range(120):
            task = asyncio.create_task(exchange(bridge))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            outcomes.add(type((await asyncio.gather(task, return_exceptions=True))[0]))
        await until(lambda: bridge.in_flight == 0 and not bridge._closing)
        assert asyncio.CancelledError in outcomes
        assert await asyncio.gather(*[exchange(bridge) for _ in range(20)]) == [b"ab"] * 20
        await until(lambda: all(peer.gone.is_set() for peer in backend.peers) and not descriptors("socket:") - before)


async def test_aclose_ends_what_is_owed_and_who_asks_later_gets_a_new_connection() -> None:
    async def script(peer: Peer) -> None:
        await play(peer, Peer.request, EVENTS if peer.number == 0 else ok(b"{}"))

    async with Backend(script) as backend, bridged(backend.url) as bridge:
        answer = await ask(bridge)
        await bridge.aclose()
        with fails("upstream_disconnected"):
            await read(answer)
        assert await exchange(bridge) == b"{}"


@pytest.mark.parametrize("piece", [bytes(100_000), b"x"])
async def test_a_firehose_waits_for_its_reader(piece: bytes) -> None:
    blocked = asyncio.Event()
    burst = chunk(piece) * (200_000 // len(chunk(piece)) + 1)

    async def firehose(peer: Peer) -> None:
        while not blocked.is_set():
            sending = asyncio.ensure_future(peer.send(burst))
            await asyncio.wait([sending], timeout=0.3)
            if not sending.done():
                blocked.set()
            await sending

    async with Backend(Peer.request, EVENTS, firehose) as backend, bridged(backend.url) as bridge:
        answer = await ask(bridge)
        assert await anext(answer)
        await asyncio.wait_for(blocked.wait(), 20)
        await answer.aclose()


# — TLS and HTTP/2


async def test_tls_is_verified_for_the_hosts_name_or_another_that_is_given(tmp_path: Path) -> None:
    context, pem = server_tls(tmp_path)
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        for url, name, code in (
            (backend.url.replace("127.0.0.1", "localhost"), None, None),
            (backend.url, "localhost", None),
            (backend.url, None, "upstream_connect_failed"),
            (backend.url, "elsewhere", "upstream_connect_failed"),
        ):
            bridge = Bridge(url, ssl_context=trusting(str(pem), None, None), server_name=name)
            if code is None:
                assert await exchange(bridge) == b"{}"
            else:
                with fails(code):
                    await ask(bridge)
            await bridge.aclose()
        bridge = Bridge(backend.url, server_name="localhost")
        with fails("upstream_connect_failed"):
            await ask(bridge)
        await bridge.aclose()


async def test_a_certificate_is_shown_to_an_upstream_that_asks_for_one(tmp_path: Path) -> None:
    context, pem = server_tls(tmp_path)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(pem)
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in which the handshake fails for both sides
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        url = backend.url.replace("127.0.0.1", "localhost")
        shown = Bridge(url, ssl_context=trusting(str(pem), str(pem), None))
        assert await exchange(shown) == b"{}"
        await shown.aclose()
        withheld = Bridge(url, ssl_context=trusting(str(pem), None, None))
        with fails("upstream_connect_failed"):
            await exchange(withheld)
        await withheld.aclose()


async def test_an_upstream_that_misses_our_certificate_after_the_handshake_was_not_connected(tmp_path: Path) -> None:
    _, pem = server_tls(tmp_path)
    with demanding(pem) as url:
        async with bridged(url, ca=pem) as bridge:
            with fails("upstream_connect_failed"):
                await ask(bridge)


NGINX = """
user root; daemon off; pid {here}/pid; error_log {here}/error.log; worker_processes 1;
events {{}}
http {{
  access_log off;
  client_body_temp_path {here}/b; proxy_temp_path {here}/p; fastcgi_temp_path {here}/f;
  uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;
  server {{
    listen 127.0.0.1:{own} ssl http2;
    ssl_certificate {here}/upstream.pem; ssl_certificate_key {here}/upstream.pem;
    add_header x-protocol $server_protocol; add_header x-number $connection_requests;
    location / {{
      proxy_pass http://127.0.0.1:{port}; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"""


@contextmanager
def nginx(port: int, here: Path) -> Iterator[tuple[str, Path]]:
    """An nginx that speaks HTTP/2 before a backend: its address, and who vouches for it."""
    if not find_spec("h2"):
        pytest.skip("no h2 in this environment (pip install h2)")
    if (binary := shutil.which("nginx") or shutil.which("/usr/sbin/nginx")) is None:
        pytest.skip("no nginx on this machine (Debian: apt-get install nginx-light)")
    _, pem = server_tls(here)
    with socket.create_server(("127.0.0.1", 0)) as free:
        own: int = free.getsockname()[1]
    (here / "nginx.conf").write_text(NGINX.format(here=here, own=own, port=port))
    command = [binary, "-p", str(here), "-e", str(here / "error.log"), "-c", str(here / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(1000):
                with suppress(OSError), socket.create_connection(("127.0.0.1", own)):
                    break
                assert server.poll() is None, (here / "error.log").read_text()
                time.sleep(0.01)
            yield f"https://localhost:{own}", pem
        finally:
            server.terminate()


async def test_http2_is_spoken_and_a_connection_serves_one_exchange_after_another(tmp_path: Path) -> None:
    large = bytes(300_000)
    async with Backend(forever(Peer.request, ok(large))) as backend:
        with nginx(backend.port, tmp_path) as (url, pem):
            async with bridged(url, ca=pem) as bridge:
                numbers = []
                for _ in range(3):
                    response = await bridge.handle_async_request(question(body=large))
                    assert response.headers["x-protocol"] == "HTTP/2.0"
                    numbers.append(response.headers["x-number"])
                    assert await read(cast(Body, response.stream)) == large
                assert numbers == ["1", "2", "3"]
                assert repr(bridge) == f"<Bridge {url} 0 busy, 1 idle>"
                assert [r.body for r in backend.requests] == [large] * 3


async def test_exchanges_over_http2_beside_one_another_never_mix(tmp_path: Path) -> None:
    async def echo(peer: Peer) -> None:
        await peer.request()
        await play(peer, chunked(*[bytes([b]) for b in peer.requests[-1].body]))

    async with Backend(forever(echo)) as backend:
        with nginx(backend.port, tmp_path) as (url, pem):
            async with bridged(url, ca=pem) as bridge:
                bodies = [b"caller-%d" % i for i in range(20)]
                for _ in range(3):
                    assert bodies == await asyncio.gather(*[exchange(bridge, body=body) for body in bodies])


async def test_pieces_over_http2_come_one_by_one_and_the_end_can_be_waited_for(tmp_path: Path) -> None:
    more, end = asyncio.Event(), asyncio.Event()
    async with Backend(Peer.request, EVENTS + chunk(b"a"), more, chunk(b"b"), end, END) as backend:
        with nginx(backend.port, tmp_path) as (url, pem):
            async with bridged(url, ca=pem) as bridge:
                answer = await ask(bridge)
                assert await anext(answer) == b"a"
                assert not await answer.ends(0)
                more.set()
                assert await anext(answer) == b"b"
                end.set()
                assert await answer.ends(5)
                assert answer.complete
                await answer.aclose()
                assert len(bridge.idle) == 1


async def test_an_upstream_behind_http2_notices_that_nobody_wants_the_rest(tmp_path: Path) -> None:
    async with Backend(Peer.request, EVENTS + chunk(b"a")) as backend:
        with nginx(backend.port, tmp_path) as (url, pem):
            async with bridged(url, ca=pem) as bridge:
                answer = await ask(bridge)
                assert await anext(answer) == b"a"
                await answer.aclose()
                await gone(backend.peers[0])
                reading = asyncio.create_task(exchange(bridge))
                await until(lambda: len(backend.requests) == 2)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await gone(backend.peers[1])


@pytest.mark.parametrize("cut", [ok(b"abc")[:-1], EVENTS, EVENTS + chunk(b"a")])
async def test_an_answer_that_is_cut_behind_http2_never_ends_cleanly(tmp_path: Path, cut: bytes) -> None:
    async with Backend(Peer.request, cut, Peer.close) as backend:
        with nginx(backend.port, tmp_path) as (url, pem):
            async with bridged(url, ca=pem) as bridge:
                with fails("upstream_disconnected"):
                    await exchange(bridge)


# — an upstream that speaks HTTP/2 as nginx does not

Answer = Callable[[asyncio.StreamWriter, Any, int], Awaitable[None]]


@asynccontextmanager
async def speaking(tls: ssl.SSLContext, answer: Answer) -> AsyncIterator[str]:
    """The address of a server whose every stream, once it has ended, is answered by a script."""
    connections = pytest.importorskip("h2.connection", reason="no h2 in this environment (pip install h2)")
    config, events = pytest.importorskip("h2.config"), pytest.importorskip("h2.events")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        settings = config.H2Configuration(
            client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        state = connections.H2Connection(config=settings)
        state.initiate_connection()
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                for event in state.receive_data(data):
                    if isinstance(event, events.StreamEnded):
                        await answer(writer, state, event.stream_id)
                writer.write(state.data_to_send())
        writer.close()

    tls.set_alpn_protocols(["h2"])
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\0b"])
async def test_no_value_over_http2_can_split_the_callers_head(tmp_path: Path, value: bytes) -> None:
    async def splits(_: asyncio.StreamWriter, state: Any, stream: int) -> None:
        state.send_headers(stream, [(b":status", b"200"), (b"x", value)], end_stream=True)

    context, pem = server_tls(tmp_path)
    async with speaking(context, splits) as url, bridged(url, ca=pem) as bridge:
        with fails("upstream_protocol_error"):
            await ask(bridge)
        assert not bridge.idle


async def test_a_kept_connection_that_dies_as_we_write_is_replaced_unseen_and_only_once(tmp_path: Path) -> None:
    asked: list[int] = []

    async def once(writer: asyncio.StreamWriter, state: Any, stream: int) -> None:
        asked.append(stream)
        if stream > 1 or len(asked) > 6:
            writer.transport.abort()
            return
        state.send_headers(stream, [(b":status", b"200")])
        state.send_data(stream, b"{}", end_stream=True)

    context, pem = server_tls(tmp_path)
    async with speaking(context, once) as url, bridged(url, ca=pem) as bridge:
        for _ in range(2):
            assert await exchange(bridge) == b"{}"
        assert asked == [1, 3, 1]
        assert await exchange(bridge) == b"{}"
        assert asked == [1, 3, 1, 3, 1]
        with fails("upstream_disconnected"):
            await exchange(bridge)
        assert asked == [1, 3, 1, 3, 1, 3, 1]


async def test_a_kept_connection_that_dies_after_working_on_the_question_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.bridge, "AT_ONCE", 0.1)
    asked: list[int] = []

    async def once(writer: asyncio.StreamWriter, state: Any, stream: int) -> None:
        asked.append(stream)
        if stream > 1:
            await asyncio.sleep(0.2)
            writer.transport.abort()
            return
        state.send_headers(stream, [(b":status", b"200")], end_stream=True)

    context, pem = server_tls(tmp_path)
    async with speaking(context, once) as url, bridged(url, ca=pem) as bridge:
        await exchange(bridge)
        with fails("upstream_disconnected"):
            await exchange(bridge)
        assert asked == [1, 3]


async def test_a_connection_is_not_kept_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.bridge, "IDLE", 0.05)

    async def answers(_: asyncio.StreamWriter, state: Any, stream: int) -> None:
        state.send_headers(stream, [(b":status", b"200")], end_stream=True)

    context, pem = server_tls(tmp_path)
    async with speaking(context, answers) as url, bridged(url, ca=pem) as bridge:
        await exchange(bridge)
        await until(lambda: not bridge.idle and not bridge._closing)
        assert await exchange(bridge) == b""

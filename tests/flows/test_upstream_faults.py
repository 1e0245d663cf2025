"""What backends do wrong, by the numbers of the fault matrix (U1 to U20), through a whole gateway.

A row says what its caller sees and what the ledger has. That nothing is left over is checked of each: the plan has one
seat and the backend takes one request at a time, and the next one is served.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from gateway import upstream
from tests.flows.test_ten_sentences import ANSWER, BODY, ONE_SEAT, STREAM, plan, rows
from tests.proving.backend import (
    CUTS,
    DONE,
    END,
    EVENTS,
    NO_ANSWER,
    Backend,
    Peer,
    Step,
    chunk,
    chunked,
    completion,
    first,
    forever,
    ok,
    token,
    whole,
)
from tests.proving.chaos import Chaos
from tests.proving.house import House, documents, gateway
from tests.proving.load import Read, completion_request, fire, fixed, read

# A deadline that is meant to pass, and that a late machine does not miss where it is not.
SHORT = {"connect": "2s", "first_byte": "1s", "idle": "1s", "total": "30s"}
SOON = 10.0


@dataclass
class Case:
    """One gateway before one backend."""

    house: House
    key: str
    backend: Backend
    store_url: str

    async def ask(self, body: bytes = BODY) -> Read:
        async with self.house.caller(self.key, body) as caller:
            return await read(caller.reader)

    async def row(self) -> dict[str, Any]:
        """The one row that the ledger has by now."""
        await self.house.settled()
        (row,) = rows(self.store_url)
        return row


@asynccontextmanager
async def case(store_url: str, *steps: Step, **pool: Any) -> AsyncIterator[Case]:
    """The steps are played on the first connection only. At the end it is closed, and another request is served."""
    async with Backend(first(*steps, then=whole(ANSWER))) as backend:
        policy = documents([], plans=plan(ONE_SEAT))
        policy["pools"] = {"demo": {"upstreams": [{"url": backend.url, "max_in_flight": 1}], "timeouts": SHORT, **pool}}
        async with gateway(store_url, policy) as house:
            case = Case(house, await house.key(), backend, store_url)
            yield case
            await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
            await house.settled()
            assert (await case.ask()).status == 200
        with redis.Redis.from_url(store_url) as store:
            assert store.zcard("{acme}:seats:seat:tresearch") == 0


def pool_of(*urls: str, **pool: Any) -> dict[str, Any]:
    """Policies with these upstreams and no limits."""
    policy = documents(list(urls))
    policy["pools"]["demo"].update(pool)
    return policy


def error(answer: Read) -> tuple[int, str]:
    assert answer.whole
    told = json.loads(answer.body)["error"]
    assert set(told) >= {"message", "type", "param", "code"}
    return answer.status, told["code"]


async def fails(store_url: str, fault: str, status: int, code: str) -> None:
    """The caller gets an error of ours, the backend's connection is closed, and nothing is charged."""
    async with case(store_url, *NO_ANSWER[fault]) as it:
        assert error(await it.ask()) == (status, code)
        row = await it.row()
        assert (row["ended"], row["http_status"]) == ("timeout" if status == 504 else "upstream", status)
        assert (row["output_tokens"], row["output_source"]) == (0, "none")


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# — before the first byte


@pytest.mark.parametrize("url", [closed_port(), "http://no-such-host.invalid:80"], ids=["refused", "no such name"])
async def test_u01_who_is_not_there_is_a_502(store_url: str, url: str) -> None:
    async with gateway(store_url, documents([url])) as house, house.client(await house.key()) as client:
        answer = await client.post("/v1/completions", content=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_connect_failed")
        await house.settled()
    assert [(row["ended"], row["output_source"]) for row in rows(store_url)] == [("upstream", "none")]


async def test_u01_who_refuses_is_passed_over_and_then_left_alone(store_url: str) -> None:
    """Another one answers; after three refusals the first is not even asked, though it listens again."""
    async with Backend(forever(whole(ANSWER))) as good, Chaos(good.url) as chaos:
        await chaos.refuse()
        policy = pool_of(good.url, chaos.url, balance="round_robin", health={"connect_failures": 3, "eject": "60s"})
        async with gateway(store_url, policy) as house, house.client(await house.key()) as client:
            for _ in range(12):
                assert (await client.post("/v1/completions", content=BODY)).status_code == 200
            await chaos.accept()
            before = len(good.requests)
            for _ in range(4):
                assert (await client.post("/v1/completions", content=BODY)).status_code == 200
            assert (chaos.connections, len(good.requests) - before) == (0, 4)


async def test_u02_a_reset_before_the_head_is_a_502(store_url: str) -> None:
    await fails(store_url, "reset", 502, "upstream_disconnected")


@pytest.mark.parametrize("fault", ["end of file", "reset in the head"])
async def test_u02_so_is_any_end_before_the_head(store_url: str, fault: str) -> None:
    await fails(store_url, fault, 502, "upstream_disconnected")


@pytest.mark.parametrize(("on", "status"), [(["connect", "reset"], 200), (["connect"], 502)])
async def test_u02_a_reset_request_goes_to_another_one_where_policy_says_so(
    store_url: str, on: list[str], status: int
) -> None:
    """The whole request was sent, and may have been worked on: an operator may want no second try."""
    async with Backend(Peer.request, Peer.reset) as bad, Backend(forever(whole(ANSWER))) as good:
        policy = pool_of(bad.url, good.url, balance="round_robin", retries={"on": on})
        async with gateway(store_url, policy) as house, house.client(await house.key()) as client:
            statuses = [(await client.post("/v1/completions", content=BODY)).status_code for _ in range(2)]
            assert sorted(statuses) == sorted([200, status])
            assert len(bad.requests) == 1


async def test_u03_a_connection_that_closes_as_we_write_is_not_seen(store_url: str) -> None:
    """It answered once, and closes when the next request comes: that goes once more, over a new connection."""
    async with case(store_url, whole(ANSWER), Peer.head, Peer.close) as it:
        assert [(await it.ask()).status for _ in range(2)] == [200, 200]
        assert len(it.backend.peers) == 2
        await it.house.settled()
        assert [row["ended"] for row in rows(store_url)] == ["complete"] * 2


@pytest.mark.parametrize("fault", ["silence", "silence in the head"])
async def test_u04_a_stall_before_the_first_byte_is_a_504(store_url: str, fault: str) -> None:
    await fails(store_url, fault, 504, "upstream_first_byte_timeout")


@pytest.mark.parametrize("fault", ["binary", "text", "HTTP/0.9", "HTTP/2"])
async def test_u08_what_is_no_http_is_a_502(store_url: str, fault: str) -> None:
    await fails(store_url, fault, 502, "upstream_protocol_error")


@pytest.mark.parametrize("fault", ["a header of 1 MiB", "10,000 fields", "NUL in a value", "CR in a value"])
async def test_u09_a_head_that_no_server_sends_is_a_502(store_url: str, fault: str) -> None:
    await fails(store_url, fault, 502, "upstream_protocol_error")


async def test_u10_informational_answers_without_end_are_a_504(store_url: str) -> None:
    await fails(store_url, "endless 1xx", 504, "upstream_first_byte_timeout")


@pytest.mark.parametrize("fault", ["a length and chunks", "two lengths"])
async def test_u11_an_answer_with_two_framings_is_a_502(store_url: str, fault: str) -> None:
    await fails(store_url, fault, 502, "upstream_protocol_error")


# — after the head


async def cut(it: Case, sent: bytes, seen: asyncio.Event) -> Read:
    """The answer to a stream; `seen` is set when this much of its body has come."""
    async with it.house.caller(it.key, STREAM) as caller:
        raw = await caller.head()
        body = b""
        while body != sent:
            body += await asyncio.wait_for(_chunk(caller.reader), SOON)
        seen.set()
        reader = asyncio.StreamReader()
        reader.feed_data(raw + chunk(body) + await asyncio.wait_for(caller.rest(), SOON))
        reader.feed_eof()
        return await read(reader)


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


CODES = {
    "by FIN": "upstream_disconnected",
    "by RST": "upstream_disconnected",
    "by silence": "upstream_idle_timeout",
    "by garbage for a chunk": "upstream_protocol_error",
}
ENDED = {how: "timeout" if code.endswith("timeout") else "upstream" for how, code in CODES.items()}


@pytest.mark.parametrize("how", CUTS)
async def test_u05_u06_an_event_stream_that_fails_says_so_and_is_cut(store_url: str, how: str) -> None:
    """At an event's end: an event with the error, no [DONE], and no end of the answer. What came is metered."""
    seen = asyncio.Event()
    async with case(store_url, Peer.request, EVENTS, chunk(token()), chunk(token()), seen, *CUTS[how]) as it:
        answer = await cut(it, token() * 2, seen)
        assert (answer.status, answer.whole) == (200, False)
        told = answer.body.removeprefix(token() * 2)
        assert told.startswith(b"data: {")
        assert told.endswith(b"}\n\n")
        event = json.loads(told.removeprefix(b"data: "))
        assert event["choices"][0]["finish_reason"] == "error"
        assert (event["error"]["type"], event["error"]["code"]) == ("server_error", CODES[how])
        row = await it.row()
        assert (row["ended"], row["output_tokens"], row["output_source"]) == (ENDED[how], 2, "counted")


@pytest.mark.parametrize("how", CUTS)
async def test_u05_u06_inside_an_event_nothing_is_said_and_the_line_is_cut(store_url: str, how: str) -> None:
    seen = asyncio.Event()
    half = token() + token()[:30]
    async with case(store_url, Peer.request, EVENTS, chunk(half), seen, *CUTS[how]) as it:
        answer = await cut(it, half, seen)
        assert (answer.body, answer.whole) == (half, False)
        assert (await it.row())["ended"] == ENDED[how]


async def test_u06_a_failure_after_done_says_nothing_inside_an_event(store_url: str) -> None:
    """The rest of an event comes together with [DONE], and then a reset: what was held back of it goes out, or not."""
    seen = asyncio.Event()
    half, rest = token()[:30], token()[30:] + DONE
    async with case(store_url, Peer.request, EVENTS, chunk(half), seen, chunk(rest), Peer.reset) as it:
        answer = await cut(it, half, seen)
        assert not answer.whole
        assert answer.body in (half, half + rest)


async def test_u05_u06_what_is_no_event_stream_is_only_cut(store_url: str) -> None:
    seen = asyncio.Event()
    encoded = EVENTS.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    piece = gzip.compress(token())
    async with case(store_url, Peer.request, encoded, chunk(piece), seen, Peer.reset) as it:
        answer = await cut(it, piece, seen)
        assert (answer.body, answer.whole) == (piece, False)


async def test_u06_the_chaos_of_a_wire_is_the_same(store_url: str) -> None:
    """A reset by what stands between, in the middle of a stream that the backend believes to have sent."""
    async with Backend(forever(completion(50, pace=0.001))) as backend, Chaos(backend.url) as chaos:
        chaos.down.reset_after = 2000
        async with gateway(store_url, documents([chaos.url])) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                answer = await read(caller.reader)
            assert (answer.status, answer.whole) == (200, False)
            await asyncio.wait_for(chaos.idle.wait(), SOON)
            await house.settled()
        assert [row["ended"] for row in rows(store_url)] == ["upstream"]
        assert [served.whole for served in backend.served] == [False]


async def test_u07_a_stream_without_usage_and_done_is_relayed_and_metered_by_its_events(store_url: str) -> None:
    async with case(store_url, Peer.request, chunked(token(), token()), Peer.close) as it:
        answer = await it.ask(STREAM)
        assert (answer.status, answer.body, answer.whole) == (200, token() * 2, True)
        row = await it.row()
        assert (row["output_tokens"], row["output_source"]) == (2, "counted")


UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize("end", [token().replace(b'reason":null', b'reason": "stop"'), DONE], ids=["finish", "done"])
async def test_u07_a_stream_that_only_its_connection_ends_is_whole_if_its_last_event_says_so(
    store_url: str, end: bytes
) -> None:
    async with case(store_url, Peer.request, UNTIL_CLOSED, token(), end, Peer.close) as it:
        answer = await it.ask(STREAM)
        assert (answer.status, answer.body, answer.whole) == (200, token() + end, True)


async def test_u07_of_any_other_nobody_knows_whether_it_is_whole_and_it_is_told_as_a_cut(store_url: str) -> None:
    async with case(store_url, Peer.request, UNTIL_CLOSED, token() * 2, Peer.close) as it:
        answer = await it.ask(STREAM)
        assert (answer.status, answer.whole) == (200, False)
        assert answer.body.startswith(token() * 2)
        assert b"upstream_disconnected" in answer.body
        row = await it.row()
        assert (row["ended"], row["output_tokens"], row["output_source"]) == ("upstream", 2, "counted")


async def test_u11_a_length_that_is_too_long_never_looks_complete(store_url: str) -> None:
    async with case(store_url, Peer.request, ok(ANSWER)[:-1], Peer.close) as it:
        answer = await it.ask()
        assert (answer.status, answer.whole) == (200, False)
        assert (await it.row())["ended"] == "upstream"


@pytest.mark.parametrize("together", [True, False], ids=["with the answer", "after it"])
async def test_u11_bytes_beyond_a_length_never_reach_the_next_answer(store_url: str, together: bool) -> None:
    """The connection that carried them is closed."""
    answered = asyncio.Event()
    beyond = ok(b"{}")
    steps = (ok(ANSWER) + beyond,) if together else (ok(ANSWER), answered, beyond)
    async with case(store_url, Peer.request, *steps) as it:
        assert (await it.ask()).body == ANSWER
        answered.set()
        await asyncio.wait_for(it.backend.peers[0].gone.wait(), SOON)
        assert [(await it.ask()).body for _ in range(3)] == [ANSWER] * 3


@pytest.mark.parametrize("text", [ANSWER, b"\0" * (10 << 20)], ids=["an answer", "a bomb of 1:1000"])
async def test_u12_what_a_backend_encodes_all_the_same_passes_as_it_is(store_url: str, text: bytes) -> None:
    body = gzip.compress(text)
    async with case(store_url, Peer.request, ok(body, b"content-encoding: gzip"), Peer.close) as it:
        tracemalloc.start()
        answer = await it.ask()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (answer.body, answer.headers[b"content-encoding"], answer.whole) == (body, b"gzip", True)
        assert peak < 2 << 20
        assert (await it.row())["ended"] == "complete"


async def test_u13_single_bytes_pass_one_by_one(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is with the caller before the next one is sent: inside a character, `data:` or CRLF just the same."""
    monkeypatch.setattr(
        upstream, "_AFTER_DONE", 0.05
    )  # so long the end of [DONE] waits for what may follow, byte by byte
    text = 'data: {"text":"é🦊"}\r\n\r\ndata: [DONE]\r\n\r\n'.encode()
    arrived = [asyncio.Event() for _ in text]
    steps = [step for byte, event in zip(text, arrived, strict=True) for step in (chunk(bytes([byte])), event)]
    async with (
        case(store_url, Peer.request, EVENTS, *steps, END, Peer.close) as it,
        it.house.caller(it.key, STREAM) as caller,
    ):
        await caller.head()
        received = b""
        while len(received) < len(text):
            received += await asyncio.wait_for(_chunk(caller.reader), SOON)
            for event in arrived[: len(received)]:
                event.set()
        assert received == text
        assert (await caller.reader.readuntil(END)).endswith(END)


# — answers that are refusals


@pytest.mark.parametrize("status", [b"500 Oops", b"429 Too Many", b"503 Busy", b"400 Bad"])
async def test_u14_a_backends_error_is_relayed_and_not_charged(store_url: str, status: bytes) -> None:
    """As it came, but for the fields of its connection; where there is nobody else to ask."""
    body = b'{"error":{"message":"the backend\'s own"},"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    answer = ok(body, b"x-kept: 1", b"connection: x-hop", b"x-hop: 1").replace(b"200 OK", status)
    async with case(store_url, Peer.request, answer, Peer.close) as it:
        got = await it.ask()
        assert (got.status, got.body, got.whole) == (int(status[:3]), body, True)
        assert got.headers[b"x-kept"] == b"1"
        assert b"x-hop" not in got.headers
        row = await it.row()
        assert (row["input_tokens"], row["output_tokens"], row["cost_microusd"]) == (0, 0, 0)
        # A refusal of the caller's fault is a request; what a backend was not able to do is not.
        assert row["output_source"] == ("upstream" if status == b"400 Bad" else "none")


@pytest.mark.parametrize(
    ("status", "on", "seen"),
    [(b"503 Busy", [503], [200] * 6), (b"429 Slow", [429], [200] * 6), (b"429 Slow", [503], [200] * 5 + [429])],
)
async def test_u14_who_asks_to_be_left_alone_is(store_url: str, status: bytes, on: list[int], seen: list[int]) -> None:
    """Retry-After rests that upstream: one of six requests goes there, and to another one too where policy says so."""
    busy = ok(b"{}", b"retry-after: 30").replace(b"200 OK", status)
    async with Backend(forever(Peer.request, busy)) as resting, Backend(forever(whole(ANSWER))) as good:
        policy = pool_of(resting.url, good.url, balance="round_robin", retries={"on": on})
        async with gateway(store_url, policy) as house, house.client(await house.key()) as client:
            statuses = [(await client.post("/v1/completions", content=BODY)).status_code for _ in range(6)]
    assert sorted(statuses) == seen
    assert len(resting.requests) == 1


async def test_u15_in_a_brown_out_attempts_stay_within_the_budget(store_url: str) -> None:
    """Half of all answers are 503. At most a tenth more is asked, and half of the pool stays in."""
    busy = ok(b"{}").replace(b"200 OK", b"503 Busy")
    async with AsyncExitStack() as stack:
        brown = Backend(forever(Peer.request, busy, whole(ANSWER)))
        backends = [await stack.enter_async_context(Backend(*brown.steps)) for _ in range(4)]
        house = await stack.enter_async_context(gateway(store_url, pool_of(*(backend.url for backend in backends))))
        result = await fire(house.url, completion_request(await house.key()), fixed(rate=100, seconds=3))
        assert (set(result.statuses), result.errors) == ({200, 503}, {})
        attempts = sum(len(backend.requests) for backend in backends)
        assert 300 < attempts <= 1.1 * 300
        before = [len(backend.requests) for backend in backends]
        await fire(house.url, completion_request(await house.key()), fixed(rate=100, seconds=0.5))
        asked = [len(backend.requests) > count for backend, count in zip(backends, before, strict=True)]
        assert sum(asked) >= 2


async def test_u16_when_all_are_down_the_answer_is_a_503_at_once_and_they_are_tried_once_a_second(
    store_url: str,
) -> None:
    """503 tells that nobody was asked, 502 that a trial was made: at most one a second and upstream."""
    loop = asyncio.get_running_loop()
    async with Backend(forever(whole(ANSWER))) as good, Chaos(good.url) as one, Chaos(good.url) as other:
        for chaos in (one, other):
            await chaos.refuse()
        policy = pool_of(one.url, other.url, health={"connect_failures": 3, "eject": "2s"})
        async with gateway(store_url, policy) as house, house.client(await house.key()) as client:
            async with asyncio.timeout(SOON):
                while (await client.post("/v1/completions", content=BODY)).status_code != 503:
                    pass
            began, statuses = loop.time(), []
            for _ in range(50):
                answer = await client.post("/v1/completions", content=BODY)
                statuses.append(answer.status_code)
                if answer.status_code == 503:
                    assert answer.json()["error"]["code"] == "upstreams_unavailable"
                    assert 1 <= int(answer.headers["retry-after"]) <= 2
            assert set(statuses) <= {502, 503}
            assert statuses.count(502) <= 2 * (1 + (loop.time() - began))
            for chaos in (one, other):
                await chaos.accept()
            async with asyncio.timeout(SOON):  # back in by themselves, as soon as their time is over
                while (await client.post("/v1/completions", content=BODY)).status_code != 200:
                    await asyncio.sleep(0.05)


async def test_u17_one_black_hole_of_four_is_hardly_touched_once_it_is_known(store_url: str) -> None:
    async with AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend(forever(whole(ANSWER)))) for _ in range(4)]
        hole = await stack.enter_async_context(Chaos(backends[0].url))
        hole.up.black_hole = True
        urls = (hole.url, *(backend.url for backend in backends[1:]))
        policy = pool_of(*urls, timeouts=SHORT, balance="round_robin", health={"failures": 1, "eject": "10s"})
        house = await stack.enter_async_context(gateway(store_url, policy))
        request = completion_request(await house.key())
        found = await fire(house.url, request, fixed(rate=100, seconds=0.5))
        assert found.statuses[504] == hole.connections > 0
        before = hole.connections
        known = await fire(house.url, request, fixed(rate=200, seconds=2))
        assert (known.errors, set(known.statuses) <= {200, 504}) == ({}, True)
        assert hole.connections - before <= 4  # of 400: the trials after 1, 2 and 4 seconds


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 Other", b"307 Temporary", b"308 Permanent"])
async def test_u18_a_redirect_is_not_followed_and_not_relayed(store_url: str, status: bytes) -> None:
    async with Backend(forever(whole(ANSWER))) as internal:
        redirect = ok(b"", b"location: " + internal.url.encode()).replace(b"200 OK", status)
        async with case(store_url, Peer.request, redirect, Peer.close) as it:
            answer = await it.ask()
            assert answer.status == 502
            assert internal.url.encode() not in answer.body
            assert b"location" not in answer.headers
            assert (await it.row())["output_source"] == "none"
        assert internal.requests == []


async def test_u19_a_firehose_waits_for_its_reader(store_url: str) -> None:
    """Who reads nothing holds back the backend; all that the process holds of the stream is a little memory."""
    piece = chunk(b"data: " + b"x" * 65500 + b"\n\n")
    async with case(store_url, Peer.request, EVENTS, forever(piece)) as it:
        async with it.house.caller(it.key, STREAM) as caller:
            caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await caller.head()
            tracemalloc.start()
            sent = -1
            while sent != it.backend.peers[0].sent:  # until it stands still
                sent = it.backend.peers[0].sent
                await asyncio.sleep(0.2)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert sent < 64 << 20  # what the kernel holds of it on its two ways
            assert peak < 1 << 20  # gateway, caller and backend together
        assert (await it.row())["ended"] == "client"


async def test_u20_an_answer_before_the_request_was_read_is_relayed(store_url: str) -> None:
    """And that connection is not used again."""
    large = json.dumps({**json.loads(BODY), "prompt": "x" * (4 << 20)}).encode()
    async with case(store_url, Peer.head, ok(ANSWER, b"connection: close")) as it:
        answer = await it.ask(large)
        assert (answer.status, answer.body, answer.whole) == (200, ANSWER, True)
        assert (await it.row())["ended"] == "complete"

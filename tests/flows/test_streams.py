"""Streams that are asked for usage, that do not begin, that fail midway; and requests that go round."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.flows.test_ten_sentences import ANSWER, BODY, ONE_SEAT, STREAM, rows
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, chunked, forever, ok
from tests.proving.house import MODEL, House, documents, gateway

WORDS = (b'data: {"id":"c1","created":7,"model":"m","choices":[{"index":0,"text":"a"}],"usage":null}\n\n', b": hm\n\n")
EXTRA = b'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"


def pool(backend: Backend | str, **members: Any) -> dict[str, Any]:
    url = backend if isinstance(backend, str) else backend.url
    return documents([], pools={"demo": {"upstreams": [{"url": url}], **members}})


async def streamed(house: House, body: bytes = STREAM) -> bytes:
    """The body of a stream that ended well."""
    async with house.client(await house.key()) as client:
        answer = await client.post("/v1/completions", content=body)
    assert answer.status_code == 200
    return answer.content


# — usage: inject


@pytest.mark.parametrize(
    ("usage", "options"),
    [
        ("native", None),
        ("inject", {"include_usage": True}),
        ("continuous", {"include_usage": True, "continuous_usage_stats": True}),
    ],
)
async def test_a_stream_is_asked_for_its_usage_where_the_pool_says_so(
    store_url: str, usage: str, options: dict[str, bool] | None
) -> None:
    async with Backend(forever(Peer.request, chunked(*WORDS, DONE))) as backend:
        async with gateway(store_url, pool(backend, usage=usage)) as house:
            await streamed(house)
            async with house.client(await house.key()) as client:
                await client.post("/v1/completions", content=BODY)
    stream, plain = (json.loads(request.body) for request in backend.requests)
    assert stream.get("stream_options") == options
    assert "stream_options" not in plain


@pytest.mark.parametrize("cut", [1, 7, 1000])
async def test_the_event_that_the_caller_did_not_ask_for_is_taken_out_and_billed(store_url: str, cut: int) -> None:
    whole = b"".join((*WORDS, EXTRA, DONE))
    pieces = [whole[i : i + cut] for i in range(0, len(whole), cut)]
    async with Backend(forever(Peer.request, chunked(*pieces))) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            assert await streamed(house) == b"".join((*WORDS, DONE))
            await house.settled()
    assert [(row["output_tokens"], row["output_source"]) for row in rows(store_url)] == [(2, "upstream")]


async def test_the_event_that_he_asked_for_stays_and_his_other_options_too(store_url: str) -> None:
    asked = json.dumps(
        {"model": MODEL, "prompt": "x", "stream": True, "stream_options": {"include_usage": True, "chunk_size": 3}}
    ).encode()
    async with Backend(forever(Peer.request, chunked(*WORDS, EXTRA, DONE))) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            assert await streamed(house, asked) == b"".join((*WORDS, EXTRA, DONE))
    (request,) = backend.requests
    assert json.loads(request.body)["stream_options"] == {"include_usage": True, "chunk_size": 3}


@pytest.mark.parametrize("given", [None, {}, {"include_usage": None}, {"include_usage": False}])
async def test_options_that_do_not_ask_for_the_event_are_no_wish_for_it(store_url: str, given: Any) -> None:
    asked = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "stream_options": given}).encode()
    async with Backend(forever(Peer.request, chunked(*WORDS, EXTRA, DONE))) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            assert await streamed(house, asked) == b"".join((*WORDS, DONE))
    (request,) = backend.requests
    assert json.loads(request.body)["stream_options"] == {"include_usage": True}


async def test_a_stream_that_ends_with_the_event_ends_all_the_same(store_url: str) -> None:
    """Nothing is left to be sent with the end but the end."""
    async with Backend(forever(Peer.request, chunked(*WORDS, EXTRA))) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            assert await streamed(house) == b"".join(WORDS)


async def test_an_encoded_stream_is_not_looked_into(store_url: str) -> None:
    head = EVENTS.replace(b"\r\n\r\n", b"\r\ncontent-encoding: br\r\n\r\n")
    async with Backend(forever(Peer.request, head, chunk(EXTRA), END)) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                await caller.head()
                assert await caller.reader.readuntil(END) == chunk(EXTRA) + END


# — failures midway

FAILURES: dict[str, tuple[tuple[Step, ...], dict[str, str], str]] = {
    "reset": ((Peer.reset,), {}, "upstream_disconnected"),
    "silence": ((), {"idle": "300ms"}, "upstream_idle_timeout"),
    "too long": ((), {"total": "300ms"}, "upstream_total_timeout"),
}


@pytest.mark.parametrize(("steps", "timeouts", "code"), FAILURES.values(), ids=FAILURES)
async def test_a_stream_that_fails_between_two_events_says_so_and_is_cut(
    store_url: str, steps: tuple[Step, ...], timeouts: dict[str, str], code: str
) -> None:
    async with Backend(Peer.request, EVENTS, chunk(WORDS[0]), *steps) as backend:
        async with gateway(store_url, pool(backend, timeouts=timeouts)) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                await caller.head()
                rest = await caller.rest()
            await house.settled()
    assert not rest.endswith(END)
    assert rest.startswith(chunk(WORDS[0]))
    event = json.loads(rest.partition(chunk(WORDS[0]))[2].partition(b"data: ")[2].partition(b"\n\n")[0])
    assert (event["id"], event["created"], event["model"]) == ("c1", 7, "m")
    assert event["choices"][0]["finish_reason"] == "error"
    assert (event["error"]["code"], event["error"]["type"]) == (code, "server_error")
    ended = "timeout" if code.endswith("timeout") else "upstream"
    assert [(row["ended"], row["output_tokens"]) for row in rows(store_url)] == [(ended, 1)]


async def test_a_stream_that_fails_within_an_event_is_cut_there(store_url: str) -> None:
    async with Backend(Peer.request, EVENTS, chunk(WORDS[0][:30]), Peer.reset) as backend:
        async with gateway(store_url, pool(backend)) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                await caller.head()
                assert await caller.rest() == chunk(WORDS[0][:30])


async def test_a_half_event_that_is_held_back_is_not_sent_before_the_error(store_url: str) -> None:
    async with Backend(Peer.request, EVENTS, chunk(WORDS[0] + WORDS[0][:30]), Peer.reset) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                await caller.head()
                rest = await caller.rest()
    assert rest.startswith(chunk(WORDS[0]))
    assert rest.count(b'"text":"a"') == 1
    assert b'"upstream_disconnected"' in rest


# — pieces that come one by one


async def test_events_that_come_one_by_one_leave_one_by_one_and_are_billed(store_url: str) -> None:
    """Each is read before the next one is sent: whoever writes it, it is written at once, and counted once."""
    turn, events = asyncio.Event(), [b'data: {"choices":[{"text":"%d"}]}\n\n' % i for i in range(6)]

    async def one_by_one(peer: Peer) -> None:
        for event in events:
            await turn.wait()
            turn.clear()
            await peer.send(chunk(event))
        await turn.wait()
        await peer.send(chunk(DONE))
        await asyncio.sleep(0.05)  # so that it is not read together with the end

    async with Backend(Peer.request, EVENTS, one_by_one, END) as backend:
        async with gateway(store_url, pool(backend)) as house:
            async with house.caller(await house.key(), STREAM.replace(b": 4", b": 9")) as caller:
                await caller.head()
                for event in events:
                    turn.set()
                    assert await caller.reader.readexactly(len(chunk(event))) == chunk(event)
                turn.set()
                assert await caller.reader.readuntil(END) == chunk(DONE) + END
            await house.settled()
    (row,) = rows(store_url)
    assert (row["output_tokens"], row["output_source"]) == (len(events), "counted")
    assert row["bytes_out"] == sum(map(len, events)) + len(DONE)


# — the last word

STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
CHAT = json.dumps({"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}], "stream": True})


@pytest.mark.parametrize("usage", ["native", "inject"])
@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/completions", STREAM, DONE),
        ("/v1/chat/completions", CHAT.encode(), DONE),
        ("/v1/messages", CHAT.encode(), STOP),
    ],
)
@pytest.mark.parametrize("cut", [0, 1, 4, 8])
async def test_who_reads_a_last_word_has_his_seat_back(
    store_url: str, path: str, body: bytes, last: bytes, cut: int, usage: str
) -> None:
    """However the backend cuts it: from its end, `cut` bytes come by themselves."""
    whole = WORDS[0] + last
    pieces = [whole[:-cut], whole[-cut:]] if cut else [WORDS[0], last]

    async def slowly(peer: Peer) -> None:
        for piece in pieces:
            await asyncio.sleep(0.03)
            await peer.send(chunk(piece))
        await asyncio.sleep(0.15)
        await peer.send(END)

    seat = {"free": {"limits": [ONE_SEAT]}}
    async with Backend(forever(Peer.request, EVENTS, slowly)) as backend:
        async with gateway(store_url, {**pool(backend, usage=usage), "plans": seat}) as house:
            key = await house.key()
            for _ in range(2):
                async with house.caller(key, body, path=path.encode()) as caller:
                    assert (await caller.head()).startswith(b"HTTP/1.1 200")
                    read = b""
                    while not b"".join(read.split(b"\r\n")[1::2]).endswith(last):
                        read += await caller.reader.read(4096)
                    assert repr(house.gateway.admission) == "<Admission 0 live, 0 not settled yet>"


# — comments


async def test_a_stream_that_does_not_begin_is_kept_alive_by_comments_where_the_pool_says_so(store_url: str) -> None:
    go_on = asyncio.Event()
    async with Backend(Peer.request, go_on, chunked(WORDS[0], DONE)) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                head = await caller.head()
                assert head.startswith(b"HTTP/1.1 200")
                assert b"content-type: text/event-stream" in head.lower()
                assert b"x-gateway-request-id: req_" in head.lower()
                comment = chunk(b": keep-alive\n\n")
                assert await caller.reader.readexactly(2 * len(comment)) == 2 * comment
                go_on.set()
                rest = await caller.reader.readuntil(END)
            assert rest.replace(comment, b"") == chunk(WORDS[0] + DONE) + END
            await house.settled()
    assert [(row["ended"], row["http_status"]) for row in rows(store_url)] == [("complete", 200)]


REFUSALS: dict[str, tuple[tuple[Step, ...], str]] = {
    "an error": ((b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}",), "upstream_late"),
    "an error as events": (
        (b"HTTP/1.1 400 X\r\ncontent-type: text/event-stream\r\ncontent-length: 2\r\n\r\n{}",),
        "upstream_late",
    ),
    "nothing": ((Peer.reset,), "upstream_disconnected"),
}


@pytest.mark.parametrize(("steps", "code"), REFUSALS.values(), ids=REFUSALS)
async def test_what_fails_after_comments_is_told_as_an_event(
    store_url: str, steps: tuple[Step, ...], code: str
) -> None:
    go_on = asyncio.Event()
    async with Backend(Peer.request, go_on, *steps) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                await caller.head()
                go_on.set()
                rest = await caller.rest()
            await house.settled()
    assert f'"code":"{code}"'.encode() in rest
    assert not rest.endswith(END)
    assert [row["output_tokens"] for row in rows(store_url)] == [0]


async def test_a_plain_answer_waits_without_comments(store_url: str) -> None:
    async def late(peer: Peer) -> None:
        await asyncio.sleep(1.5)

    async with Backend(Peer.request, late, ok(ANSWER)) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            async with house.client(await house.key()) as client:
                assert (await client.post("/v1/completions", content=BODY)).content == ANSWER


async def test_a_stream_that_has_begun_gets_no_comments(store_url: str) -> None:
    """Between two pieces of an event one would be a part of it."""
    half = len(WORDS[0]) // 2

    async def late(peer: Peer) -> None:
        await asyncio.sleep(1.5)

    steps = (EVENTS, chunk(WORDS[0][:half]), late, chunk(WORDS[0][half:]), chunk(DONE), END)
    async with Backend(Peer.request, *steps) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            assert await streamed(house) == WORDS[0] + DONE


async def test_a_503_that_was_tried_twice_tells_an_sdk_not_to_try_again(store_url: str) -> None:
    busy = forever(Peer.request, b"HTTP/1.1 503 X\r\nX-Should-Retry: true\r\ncontent-length: 2\r\n\r\n{}")
    async with Backend(busy) as one, Backend(busy) as two:
        for backends, told in (((one, two), "false"), ((one,), "true")):
            async with gateway(store_url, documents([backend.url for backend in backends])) as house:
                async with house.client(await house.key()) as client:
                    answer = await client.post("/v1/completions", content=BODY)
            assert (answer.status_code, answer.headers.get("x-should-retry")) == (503, told)


# — the way


async def test_a_gateway_that_is_its_own_backend_says_so(store_url: str) -> None:
    """The first hop's upstream is the gateway itself: the second one sees its own name in Via."""
    async with gateway(store_url, pool("http://127.0.0.1:9")) as house:
        key = await house.key()
        async with house.caller(key, BODY, b"via: 1.1 " + house.gateway._proxy._name) as caller:
            assert (await caller.head()).startswith(b"HTTP/1.1 508")


async def test_a_backend_is_told_of_the_way(store_url: str) -> None:
    trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend, gateway(store_url, pool(backend)) as house:
        async with house.caller(await house.key(), BODY, b"traceparent: " + trace, b"x-request-id: mine") as caller:
            await caller.head()
    headers = dict(backend.requests[0].headers)
    assert headers[b"via"].startswith(b"1.1 gw-")
    assert headers[b"forwarded"].startswith(b"for=127.0.0.1;proto=http;by=_gw-")
    assert headers[b"x-request-id"] == b"mine"
    assert headers[b"traceparent"][:36] == trace[:36]
    assert headers[b"traceparent"][36:52] != trace[36:52]


async def test_http_1_0_is_told_to_speak_1_1(store_url: str) -> None:
    async with gateway(store_url, pool("http://127.0.0.1:9")) as house:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        key = (await house.key()).encode()
        writer.write(b"POST /v1/completions HTTP/1.0\r\nauthorization: Bearer %b\r\n\r\n" % key)
        assert (await reader.read()).startswith(b"HTTP/1.1 505")
        writer.close()


async def test_a_stream_of_known_length_may_lose_an_event_or_get_one(store_url: str) -> None:
    """A proxy before the backend has collected it: the length is not passed on."""
    whole = b"".join((*WORDS, EXTRA, DONE))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
    async with Backend(forever(Peer.request, head % len(whole) + whole)) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            assert await streamed(house) == b"".join((*WORDS, DONE))
    async with Backend(Peer.request, head % len(whole), WORDS[0], Peer.close) as backend:
        async with gateway(store_url, pool(backend)) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                await caller.head()
                rest = await caller.rest()
    assert rest.startswith(chunk(WORDS[0]))
    assert b"upstream_disconnected" in rest
    assert not rest.endswith(END)


async def test_who_leaves_as_the_answer_comes_leaves_nothing_open(store_url: str) -> None:
    """Whichever turn of the event loop it is in, and with comments on their way."""
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            key = await house.key()
            for turns in range(30):
                async with house.caller(key, STREAM) as caller:
                    before = len(backend.requests)
                    while len(backend.requests) == before:
                        await asyncio.sleep(0)
                    for _ in range(turns % 10):
                        await asyncio.sleep(0)
                    caller.writer.transport.abort()
            await house.settled()
            upstream = house.gateway.live.policies.pools["demo"].upstreams[0]
            async with asyncio.timeout(5):
                while upstream.in_flight:
                    await asyncio.sleep(0.01)

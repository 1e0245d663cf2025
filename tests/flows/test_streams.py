"""Streams that are asked for usage, that do not begin, that fail midway; and requests that go round."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.flows.test_ten_sentences import ANSWER, BODY, STREAM, rows
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
    assert [(row["output_tokens"], row["source"]) for row in rows(store_url)] == [(2, "upstream")]


async def test_the_event_that_he_asked_for_stays_and_his_other_options_too(store_url: str) -> None:
    asked = json.dumps(
        {"model": MODEL, "prompt": "x", "stream": True, "stream_options": {"include_usage": True, "chunk_size": 3}}
    ).encode()
    async with Backend(forever(Peer.request, chunked(*WORDS, EXTRA, DONE))) as backend:
        async with gateway(store_url, pool(backend, usage="inject")) as house:
            assert await streamed(house, asked) == b"".join((*WORDS, EXTRA, DONE))
    (request,) = backend.requests
    assert json.loads(request.body)["stream_options"] == {"include_usage": True, "chunk_size": 3}


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
    assert [(row["ended"], row["output_tokens"]) for row in rows(store_url)] == [("upstream", 1)]


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


# — comments


async def test_a_stream_that_does_not_begin_is_kept_alive_by_comments_where_the_pool_says_so(store_url: str) -> None:
    go_on = asyncio.Event()
    async with Backend(Peer.request, go_on, chunked(WORDS[0], DONE)) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            async with house.caller(await house.key(), STREAM) as caller:
                head = await caller.head()
                assert head.startswith(b"HTTP/1.1 200")
                assert b"content-type: text/event-stream" in head.lower()
                comment = chunk(b": keep-alive\n\n")
                assert await caller.reader.readexactly(2 * len(comment)) == 2 * comment
                go_on.set()
                rest = await caller.reader.readuntil(END)
            assert rest.replace(comment, b"") == chunk(WORDS[0] + DONE) + END
            await house.settled()
    assert [(row["ended"], row["status"]) for row in rows(store_url)] == [("complete", 200)]


REFUSALS: dict[str, tuple[tuple[Step, ...], str]] = {
    "an error": ((b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}",), "upstream_late"),
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
    async with Backend(Peer.request, ok(ANSWER)) as backend:
        async with gateway(store_url, pool(backend, comments="1s")) as house:
            async with house.client(await house.key()) as client:
                assert (await client.post("/v1/completions", content=BODY)).content == ANSWER


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

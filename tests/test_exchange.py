"""One request and its answer: what is written down of it, while it is under way and at its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import redis

from gateway.endpoints import ENDPOINTS
from gateway.errors import (
    ClientGone,
    GatewayError,
    InternalError,
    RequestTimeout,
    StoreUnavailable,
    TooLarge,
    UpstreamFailed,
    UpstreamsBusy,
    UpstreamTimeout,
)
from gateway.exchange import Exchange
from gateway.identity import stored_user
from gateway.records import Price, UsageRecord
from gateway.reload import reload
from gateway.usage import Progress
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, chunked, forever, ok
from tests.proving.house import MODEL, House, documents, gateway

DONE = b"data: [DONE]\n\n"
PRICE = {"input": 1.0, "cached_input": 0.5, "output": 2.0, "reasoning": 4.0}


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def policies(url: str, price: Any = PRICE, **of_gateway: Any) -> dict[str, Any]:
    models = {MODEL: {"aliases": ["llama"], "pool": "demo", "price": price}}
    pools = {"demo": {"upstreams": [{"url": url}], "timeouts": {"first_byte": "1s", "idle": "1s"}}}
    return documents([], pools=pools, models=models, gateway=of_gateway)


def rows(store_url: str) -> list[UsageRecord]:
    """The ledger of acme."""
    with redis.Redis.from_url(store_url) as client:
        entries: Any = client.xrange("{acme}:usage")
    return [msgspec.json.decode(fields[b"row"], type=UsageRecord) for _, fields in entries]


BODY = json.dumps({"model": "llama", "prompt": "The sky is", "max_tokens": 64, "user": "ann"}).encode()
STREAM = BODY[:-1] + b',"stream":true}'


@asynccontextmanager
async def house_on(store_url: str, *steps: Step, **given: Any) -> AsyncIterator[tuple[House, Backend]]:
    async with Backend(*steps) as backend, gateway(store_url, policies(backend.url, **given)) as house:
        yield house, backend


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


def live(house: House) -> Exchange:
    """The one exchange that is admitted at this moment."""
    (lease,) = house.gateway.admission._live.values()
    assert isinstance(lease.request, Exchange)
    return lease.request


async def test_a_row_says_all_that_was_used_of_whom_and_for_how_much(store_url: str) -> None:
    answer = ok(json.dumps({"choices": [{"text": "blue"}], "usage": usage(100, 50, 40, 30)}).encode())
    async with house_on(store_url, forever(Peer.request, answer)) as (house, backend):
        before = time.time_ns() // 1_000_000
        key = await house.key(user="bob")
        async with house.client(key) as client:
            given = await client.post("/v1/completions", content=BODY)
        await house.settled()
        (row,) = rows(store_url)
        assert row == UsageRecord(
            id=given.headers["x-gateway-request-id"],
            status="settled",
            organisation="acme",
            team="research",
            key=key.split("_")[1],
            user=stored_user(b"of the tests", "acme", "ann", plain=False),
            model=MODEL,
            served_model=MODEL,
            pool="demo",
            upstream=backend.url.removeprefix("http://"),
            endpoint="completions",
            stream=False,
            http_status=200,
            ended="complete",
            attempt=1,
            requests=1,
            input_tokens=100,
            cached_tokens=40,
            output_tokens=50,
            reasoning_tokens=30,
            input_source="upstream",
            output_source="upstream",
            price=Price(1_000_000, 500_000, 2_000_000, 4_000_000),
            cost_microusd=60 * 1 + 40 // 2 + 20 * 2 + 30 * 4,
            received_ms=row.received_ms,
            first_byte_ms=row.first_byte_ms,
            ended_ms=row.ended_ms,
            bytes_in=len(BODY),
            bytes_out=len(given.content),
        )
        assert row.first_byte_ms is not None
        assert before <= row.received_ms <= row.first_byte_ms <= row.ended_ms <= time.time_ns() // 1_000_000 + 1


@pytest.mark.parametrize("users", ["hashed", "plain"])
async def test_what_stands_in_the_store_names_a_user_only_where_the_policies_say_so(store_url: str, users: str) -> None:
    limit = {"name": "mine", "count": "requests", "rate": "1/hour", "per": ["user"]}
    answer = ok(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}')
    async with Backend(forever(Peer.request, answer)) as backend:
        given = policies(backend.url, users=users) | {"plans": {"free": {"limits": [limit]}}}
        async with gateway(store_url, given) as house:
            key = await house.key()
            body = json.dumps({"model": MODEL, "prompt": "x", "user": "canary-ann"}).encode()
            async with house.client(key) as client:
                statuses = [(await client.post("/v1/completions", content=body)) for _ in range(2)]
                standing = (await client.get("/v1/limits?user=canary-ann")).json()["data"]
                stranger = (await client.get("/v1/limits?user=somebody")).json()["data"]
            await house.settled()
        (row,) = rows(store_url)
    stored = stored_user(b"of the tests", "acme", "canary-ann", plain=users == "plain")
    assert [answer.status_code for answer in statuses] == [200, 429]
    assert f"user {stored} " in statuses[1].json()["error"]["message"]
    assert (row.user, standing[0]["scope"], standing[0]["used"]) == (stored, f"user {stored}", 1)
    assert stranger[0]["used"] == 0
    assert (b"canary" in everything(store_url)) == (users == "plain")


def everything(store_url: str) -> bytes:
    """All keys of acme, with what they hold."""
    with redis.Redis.from_url(store_url) as client:
        keys: list[Any] = list(client.scan_iter("{acme}*", count=1000))
        return repr(keys).encode() + b"".join(
            repr(client.xrange(key)).encode()
            if client.type(key) == b"stream"
            else repr(client.hgetall(key)).encode()
            if client.type(key) == b"hash"
            else repr(client.get(key)).encode()
            if client.type(key) == b"string"
            else b""
            for key in keys
        )


async def test_a_price_that_changes_while_a_request_is_under_way_does_not_change_it(store_url: str) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def begun(_: Peer) -> None:
        asked.set()

    answer = ok(json.dumps({"usage": usage(1000, 0)}).encode())
    async with house_on(store_url, forever(Peer.request, begun, go_on, answer)) as (house, backend):
        async with house.client(await house.key()) as client:
            asking = asyncio.ensure_future(client.post("/v1/completions", content=BODY))
            await asked.wait()
            house.documents(policies(backend.url, {"input": 7.0}))
            assert await reload(house.gateway.live, house.settings.policies)
            go_on.set()
            await asking
            await client.post("/v1/completions", content=BODY)
        await house.settled()
    assert [(row.price.input, row.cost_microusd) for row in rows(store_url)] == [(1_000_000, 1000), (7_000_000, 7000)]


async def test_a_price_holds_by_the_time_when_the_request_came(store_url: str) -> None:
    answer = ok(json.dumps({"usage": usage(1000, 0)}).encode())
    ahead = [{"from": "2020-01-01", "input": 2.0}, {"from": "2999-01-01", "input": 9.0}]
    async with house_on(store_url, forever(Peer.request, answer), price=ahead) as (house, _):
        async with house.client(await house.key()) as client:
            await client.post("/v1/completions", content=BODY)
        await house.settled()
    assert [row.cost_microusd for row in rows(store_url)] == [2000]


# — progress


CHUNKS = [event(choices=[{"index": 0, "text": "a"}]) for _ in range(4)]


async def test_progress_is_read_anew_while_a_stream_runs_and_is_the_usage_at_its_end(store_url: str) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    last = event(choices=[], usage=usage(3, 9, 2, 5))
    steps = (
        Peer.request,
        gates[0],
        EVENTS + chunk(CHUNKS[0]) + chunk(CHUNKS[1]),
        gates[1],
        chunk(CHUNKS[2]),
        gates[2],
        chunk(last) + chunk(DONE) + END,
    )
    async with house_on(store_url, *steps) as (house, backend):
        async with house.client(await house.key()) as client, asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.post("/v1/completions", content=STREAM))
            await until(lambda: bool(backend.requests))
            x = live(house)
            assert x.progress() is None
            gates[0].set()
            await until(lambda: (found := x.progress()) is not None and found.output == 2)
            first = x.progress()
            assert first is not None
            gates[1].set()
            await until(lambda: (found := x.progress()) is not None and found.output == 3)
            second = x.progress()
            assert second is not None
            gates[2].set()
        assert asking.result().content == b"".join((*CHUNKS[:3], last, DONE))  # nothing was taken from the stream
        await house.settled()
        at_the_end = x.progress()
    (row,) = rows(store_url)
    assert first == Progress(
        input=x.terms.input_estimate,
        cached=0,
        output=2,
        reasoning=0,
        input_source="counted",
        output_source="counted",
        http_status=200,
        attempt=1,
        bytes_out=len(CHUNKS[0]) * 2,
        first_byte_ms=row.first_byte_ms or 0,
        upstream=row.upstream or "",
        served_model=MODEL,
    )
    assert second == msgspec.structs.replace(first, output=3, bytes_out=len(CHUNKS[0]) * 3)
    assert at_the_end == Progress(
        input=row.input_tokens,
        cached=row.cached_tokens,
        output=row.output_tokens,
        reasoning=row.reasoning_tokens,
        input_source=row.input_source,
        output_source=row.output_source,
        http_status=row.http_status,
        attempt=row.attempt,
        bytes_out=row.bytes_out,
        first_byte_ms=row.first_byte_ms or 0,
        upstream=row.upstream or "",
        served_model=row.served_model or "",
    )
    assert (row.input_tokens, row.cached_tokens, row.output_tokens, row.reasoning_tokens) == (3, 2, 9, 5)


async def test_progress_goes_by_the_last_usage_that_a_backend_reported(store_url: str) -> None:
    go_on = asyncio.Event()
    so_far = [event(choices=[{"index": 0, "text": "a"}], usage=usage(3, number)) for number in (1, 2)]
    async with house_on(store_url, Peer.request, EVENTS + b"".join(map(chunk, so_far)), go_on, END) as (house, _):
        async with house.client(await house.key()) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(client.post("/v1/completions", content=STREAM))
            await until(lambda: bool(house.gateway.admission._live))
            x = live(house)
            await until(lambda: (found := x.progress()) is not None and found.output == 2)
            found = x.progress()
            assert found is not None
            assert (found.input, found.input_source, found.output_source) == (3, "upstream", "upstream")
            go_on.set()


@pytest.mark.parametrize("status", [b"503 Busy", b"429 Slow", b"500 Oh"])
async def test_of_a_backend_that_was_not_able_to_answer_there_is_no_progress(store_url: str, status: bytes) -> None:
    """Its body is on its way, and is no answer."""
    go_on = asyncio.Event()
    head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{"
    async with house_on(store_url, Peer.request, head, go_on, b"}") as (house, _):
        async with house.client(await house.key()) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(client.post("/v1/completions", content=BODY))
            await until(lambda: bool(house.gateway.admission._live) and live(house).answer is not None)
            x = live(house)
            await until(lambda: x.answer is not None and x.answer.tail.length > 0)
            assert x.progress() is None
            go_on.set()
        await house.settled()
    assert [(row.requests, row.output_source, row.ended) for row in rows(store_url)] == [(0, "none", "complete")]


# — who ended it


def exchange() -> Exchange:
    return Exchange(ENDPOINTS["completions"], None)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (None, "complete"),
        (ClientGone(), "client"),
        (TooLarge("x"), "refused"),
        (RequestTimeout("x"), "refused"),
        (UpstreamFailed("x"), "upstream"),
        (UpstreamsBusy("x"), "upstream"),
        (UpstreamTimeout("x"), "timeout"),
        (StoreUnavailable("x"), "gateway"),
        (InternalError("x"), "gateway"),
        (RuntimeError("x"), "gateway"),
        (asyncio.CancelledError(), "gateway"),
    ],
)
def test_an_exchange_knows_who_ended_it(error: BaseException | None, ended: str) -> None:
    x = exchange()
    x.end(error)
    assert x.ended == ended
    assert x.error is (error if isinstance(error, GatewayError) else None)


def test_an_exchange_ended_when_that_was_said_first() -> None:
    x = exchange()
    x.end(None)
    ended_at = x.ended_at
    x.end(RuntimeError("x"))
    assert 0 < ended_at == x.ended_at


@pytest.mark.parametrize(
    ("steps", "status", "ended"),
    [
        ((Peer.request,), 504, "timeout"),
        ((Peer.request, EVENTS + chunk(CHUNKS[0])), 200, "timeout"),
        ((Peer.request, Peer.reset), 502, "upstream"),
        ((Peer.request, EVENTS + chunk(CHUNKS[0]), Peer.reset), 200, "upstream"),
        ((Peer.request, chunked(CHUNKS[0], DONE)), 200, "complete"),
    ],
    ids=["no answer", "it falls silent", "it ends before an answer", "it is cut", "it is whole"],
)
async def test_a_row_says_who_ended_it(store_url: str, steps: tuple[Step, ...], status: int, ended: str) -> None:
    async with house_on(store_url, *steps) as (house, _):
        async with house.caller(await house.key(), STREAM) as caller:
            await caller.head()
            await asyncio.wait_for(until(lambda: house.gateway.admission.idle), 10)
        await house.settled()
    (row,) = rows(store_url)
    assert (row.http_status, row.ended) == (status, ended)
    tokens = 0 if status >= 500 else 1
    assert (row.requests, row.output_tokens, row.output_source) == (tokens, tokens, "counted" if tokens else "none")
    assert (row.attempt, row.served_model) == ((1, MODEL) if tokens else (0, None))


async def test_what_was_the_callers_own_fault_is_ended_by_the_client_in_rows(store_url: str) -> None:
    """A form that goes on after its last boundary, of which the backend has the beginning."""
    form = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\n' + MODEL.encode() + b"\r\n--b\r\n"
    form += b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 100_000
    wrong = b"--b\r\n"  # a boundary within a line
    async with house_on(store_url, Peer.head) as (house, backend):
        fields = (b"content-type: multipart/form-data; boundary=b", b"content-length: %d" % len(form + wrong))
        async with house.caller(await house.key(), form, *fields, path=b"/v1/audio/transcriptions") as caller:
            await until(lambda: bool(backend.requests))
            caller.writer.write(wrong)
            assert b" 400 " in await caller.head()
        await house.settled()
    (row,) = rows(store_url)
    assert (row.ended, row.http_status, row.requests) == ("client", 400, 0)
    assert 0 < row.bytes_in <= len(form)


async def test_bytes_of_a_form_are_those_that_were_passed_on(store_url: str) -> None:
    form = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nllama\r\n--b\r\n'
    form += b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 300_000 + b"\r\n--b--\r\n"
    async with house_on(store_url, Peer.request, ok(b'{"text":"a"}')) as (house, backend):
        async with house.client(await house.key()) as client:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            answer = await client.post("/v1/audio/transcriptions", content=form, headers=headers)
            assert answer.status_code == 200
        await house.settled()
        (row,) = rows(store_url)
        assert row.bytes_in == len(backend.requests[0].body)


def test_what_was_not_read_has_no_bytes() -> None:
    x = exchange()
    assert not x.has_all
    x.body = 0
    assert x.has_all  # an empty body is one

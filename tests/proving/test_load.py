"""The load client does what it says: it is not slowed down by what it measures, and reads strictly."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from statistics import mean

import pytest

from tests.proving.backend import END, EVENTS, Backend, Peer, chunk, chunked, completion, forever, ok, whole
from tests.proving.house import documents, echo, gateway
from tests.proving.load import Result, completion_request, fire, fixed, poisson, read

ASKED = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"


async def test_a_server_that_stands_still_is_asked_all_the_same_and_the_wait_of_each_counts() -> None:
    """It answers nobody for as long as the schedule lasts, and then all: a closed loop would have asked once."""
    starts = fixed(rate=100, seconds=0.5)
    all_asked = asyncio.Event()
    asked = 0

    async def held(peer: Peer) -> None:
        nonlocal asked
        await peer.request()
        asked += 1
        if asked == len(starts):
            all_asked.set()
        await all_asked.wait()
        await peer.send(ok(b"{}"))

    async with Backend(held) as backend:
        result = await fire(backend.url, ASKED, starts)
    assert (result.statuses, result.errors) == ({200: 50}, {})
    assert len(backend.peers) == 50
    assert result.percentile(100) >= 0.49  # who was due first has waited for the last one
    assert result.percentile(50) >= 0.24


async def test_what_a_late_client_adds_counts() -> None:
    """The loop stands still when the request is due: its latency begins when it should have begun."""
    asyncio.get_running_loop().call_later(0.05, time.sleep, 0.4)
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend:
        result = await fire(backend.url, ASKED, [0.1])
    assert result.late >= 0.3
    assert result.percentile(50) >= result.late


async def test_connections_are_kept_and_errors_are_counted_by_kind() -> None:
    async def third_is_cut(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(ok(b"{}"))
        await peer.request()
        await peer.send(ok(b"{}")[:-1])
        await peer.close()

    async with Backend(third_is_cut) as backend:
        result = await fire(backend.url, ASKED, fixed(rate=10, seconds=0.6))
        assert (result.statuses, result.errors) == ({200: 4}, {"cut": 2})
        assert len(backend.peers) == 2
    refused = await fire(backend.url, ASKED, [0.0])
    assert refused.errors == {"ConnectionRefusedError": 1}


def test_a_schedule_is_known_before_it_begins() -> None:
    assert fixed(rate=4, seconds=1) == [0, 0.25, 0.5, 0.75]
    starts = poisson(rate=100, seconds=20, seed=1)
    assert starts == poisson(rate=100, seconds=20, seed=1) != poisson(rate=100, seconds=20, seed=2)
    assert mean(b - a for a, b in pairwise(starts)) == pytest.approx(0.01, rel=0.1)


def test_a_percentile_is_the_nearest_rank() -> None:
    result = Result((), {}, {}, tuple(map(float, range(1, 101))), 0.0)  # type: ignore[arg-type]
    assert [result.percentile(p) for p in (0, 1, 50, 99, 99.5, 100)] == [1, 1, 50, 99, 100, 100]


@pytest.mark.parametrize(
    ("came", "body", "complete"),
    [
        (chunked(b"ab", b"c"), b"abc", True),
        (chunked(b"ab", b"c")[: -len(END)], b"abc", False),
        (chunked(b"ab", b"c")[:-2], b"abc", False),
        (EVENTS + chunk(b"ab")[:4], b"a", False),
        (ok(b"{}"), b"{}", True),
        (ok(b"{}")[:-1], b"{", False),
    ],
)
async def test_an_answer_is_whole_only_with_its_end(came: bytes, body: bytes, complete: bool) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(came)
    reader.feed_eof()
    answer = await read(reader)
    assert (answer.body, answer.whole) == (body, complete)


@pytest.mark.parametrize(
    "came", [b"HTTP/1.0 200 OK\r\n\r\n", EVENTS + b"-1\r\n", EVENTS + b"1\r\nab\r\n", b"x\r\n\r\n"]
)
async def test_what_is_not_http_is_no_answer(came: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(came)
    reader.feed_eof()
    with pytest.raises(ValueError, match="no "):
        await read(reader)


async def test_the_backend_keeps_a_ledger_of_what_it_produced() -> None:
    """Reported tokens where it told them, and whether the end was sent."""
    answer = b'{"usage":{"prompt_tokens":5,"completion_tokens":7}}'
    scripts = [
        completion(4, prompt=3),
        completion(2, usage="extra"),
        completion(2, usage="none"),
        completion(3, cut=Peer.reset),
        whole(answer),
    ]
    seen = []
    for step in scripts:
        async with Backend(step) as backend:
            reader, writer = await asyncio.open_connection("127.0.0.1", backend.port)
            writer.write(ASKED.replace(b"host", b"x-request-id: r1\r\nhost"))
            complete = (await read(reader)).whole
            writer.transport.abort()
            await backend.peers[0].gone.wait()
            (row,) = backend.served
            assert row.id == b"r1"
            seen.append((row.prompt, row.completion, row.events, row.whole, complete))
    assert seen == [
        (3, 4, 4, True, True),
        (3, 2, 2, True, True),
        (None, None, 2, True, True),
        (None, None, 3, False, False),
        (5, 7, 0, True, True),
    ]


async def test_the_gateway_can_be_loaded_from_its_own_event_loop(store_url: str) -> None:
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        result = await fire(house.url, completion_request(await house.key()), poisson(rate=200, seconds=1, seed=7))
    assert (result.errors, set(result.statuses)) == ({}, {200})
    assert result.statuses[200] == len(result.begun) == len(result.latencies)


async def test_forever_and_open_connections_do_not_hold_the_load() -> None:
    async with Backend(forever(Peer.request, chunked(b"data: 1\n\n"))) as backend:
        result = await fire(backend.url, ASKED, fixed(rate=300, seconds=0.3))
    assert result.statuses == {200: 90}

"""What callers do wrong, by the numbers of the fault matrix (C1 to C9), through a whole gateway.

What becomes of the caller, of the backend that works for it, and of the ledger; and that others do not notice.
"""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from gateway.server import Patience, Protocol
from tests.flows.test_ten_sentences import ANSWER, STREAM, rows
from tests.flows.test_upstream_faults import SOON
from tests.flows.test_upstream_faults import case as any_case
from tests.proving.backend import EVENTS, Backend, Peer, chunk, completion, first, forever, ok, whole
from tests.proving.chaos import Chaos, reset
from tests.proving.house import Caller, House, documents, gateway
from tests.proving.load import completion_request, fire, fixed, poisson, read

# A caller's faults do not need a backend's deadlines to be short.
case = partial(any_case, timeouts={})


def impatient(monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(Protocol, "patience", replace(Patience(), **given))


async def healthy(house: House, key: str, number: int = 20) -> None:
    """Others are served meanwhile."""
    result = await fire(house.url, completion_request(key), fixed(rate=100, seconds=number / 100))
    assert (result.statuses, result.errors) == ({200: number}, {})


def leave(caller: Caller) -> None:
    caller.writer.close()


def leave_by_reset(caller: Caller) -> None:
    reset(caller.writer)


LEAVING = pytest.mark.parametrize("leaves", [leave, leave_by_reset], ids=["FIN", "RST"])


# — who leaves


@LEAVING
async def test_c01_who_leaves_before_the_first_byte_ends_the_backends_work_and_pays_nothing(
    store_url: str, leaves: Callable[[Caller], None]
) -> None:
    asked = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.hung_up()

    async with case(store_url, silent) as it, it.house.caller(it.key, STREAM) as caller:
        await asyncio.wait_for(asked.wait(), SOON)
        leaves(caller)
        await asyncio.wait_for(it.backend.peers[0].gone.wait(), SOON)
        row = await it.row()
        assert (row["ended"], row["http_status"], row["output_tokens"], row["output_source"]) == (
            "client",
            499,
            0,
            "none",
        )


@LEAVING
async def test_c02_who_leaves_in_the_middle_ends_the_backends_work_and_pays_for_what_he_got(
    store_url: str, leaves: Callable[[Caller], None]
) -> None:
    """No more than the backend made, and no less than he saw."""
    async with case(store_url, completion(100_000, pace=0.005)) as it, it.house.caller(it.key, STREAM) as caller:
        seen = b""
        while seen.count(b"data: ") < 7:
            seen += await asyncio.wait_for(caller.reader.read(1 << 16), SOON)
        leaves(caller)
        await asyncio.wait_for(it.backend.peers[0].gone.wait(), SOON)
        row = await it.row()
        (served,) = it.backend.served
        assert (row["ended"], row["output_source"], served.whole) == ("client", "counted", False)
        assert seen.count(b"data: ") <= row["output_tokens"] <= served.events


async def test_c04_who_closes_his_sending_side_has_left(store_url: str) -> None:
    """It is not answered, the backend is told, and it is not billed as complete."""
    asked = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.hung_up()

    async with case(store_url, silent) as it, it.house.caller(it.key, STREAM) as caller:
        await asyncio.wait_for(asked.wait(), SOON)
        caller.writer.write_eof()
        assert await asyncio.wait_for(caller.rest(), SOON) == b""
        assert (await it.row())["ended"] == "client"


# — who does not read, or not send


async def test_c03_who_reads_nothing_holds_a_little_memory_and_nobody_else(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend waits for him, others are served, and after the write-stall deadline his line is cut."""
    impatient(monkeypatch, stall=2.0)
    piece = chunk(b"data: " + b"x" * 65500 + b"\n\n")
    async with Backend(first(Peer.request, EVENTS, forever(piece), then=whole(ANSWER))) as backend:
        async with gateway(store_url, documents([backend.url])) as house:
            key = await house.key()
            async with house.caller(key, STREAM) as caller:
                caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await caller.head()
                tracemalloc.start()
                sent = -1
                while sent != backend.peers[0].sent:  # until it stands still
                    sent = backend.peers[0].sent
                    await asyncio.sleep(0.2)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak < 1 << 20  # gateway, caller and backend together
                await healthy(house, key)
                await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
            await house.settled()
        assert [row["ended"] for row in rows(store_url)].count("client") == 1


async def test_c03_who_reads_slowly_is_not_cut(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A modem is no attack: as long as something is taken, the stream goes on to its end."""
    impatient(monkeypatch, stall=1.5)
    body = b'{"text":"' + b"x" * (32 << 20) + b'"}'  # more than the kernel holds on the way
    async with (
        Backend(forever(Peer.request, ok(body))) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        async with Chaos(house.url) as slow:
            slow.down.throttle = 8 << 20
            reader, writer = await asyncio.open_connection("127.0.0.1", slow.port)
            writer.write(completion_request(await house.key()))
            answer = await asyncio.wait_for(read(reader), 60)
            writer.transport.abort()
        assert (len(answer.body), answer.whole) == (len(body), True)


SLOW = {
    "a head": b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nx-slow: ",
    "a body": b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer KEY\r\ncontent-length: 1000\r\n\r\n",
}


@pytest.mark.parametrize("begin", SLOW.values(), ids=SLOW)
async def test_c05_who_sends_a_byte_at_a_time_is_ended(
    store_url: str, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    """Twenty of them: each gets a 408 and the end, and others are served."""
    impatient(monkeypatch, head=1.0, body=1.0)

    async def drip(port: int, key: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin.replace(b"KEY", key.encode()))
        answer = asyncio.ensure_future(reader.read())
        while not answer.done():
            if not writer.is_closing():
                writer.write(b"x")
            await asyncio.wait((answer,), timeout=0.1)
        writer.transport.abort()
        return await answer

    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, documents([backend.url])) as house:
        key = await house.key()
        port = int(house.url.rpartition(":")[2])
        slow = asyncio.gather(*(drip(port, key) for _ in range(20)))
        await healthy(house, key)
        answers = await asyncio.wait_for(slow, 30)
        assert {answer[:12] for answer in answers} == {b"HTTP/1.1 408"}
        assert len(backend.requests) == 20  # of the healthy


async def test_c05_idle_connections_are_closed_and_nobody_waits_for_them(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, head=1.0)
    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, documents([backend.url])) as house:
        key = await house.key()
        port = int(house.url.rpartition(":")[2])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        await healthy(house, key)
        ends = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in silent)), 30)
        for _, writer in silent:
            writer.transport.abort()
        assert set(ends) == {b""}


# — who sends too much, or nonsense


@pytest.mark.parametrize(
    ("good", "framing", "status"),
    [
        (True, b"content-length: 10000000000", b"413"),
        (True, b"transfer-encoding: chunked", b"413"),
        (False, b"content-length: 10000000000", b"401"),
        (False, b"transfer-encoding: chunked", b"401"),
    ],
)
async def test_c06_a_body_without_end_is_refused_and_cut(
    store_url: str, good: bool, framing: bytes, status: bytes
) -> None:
    """The answer comes before the body ends, what is dropped after it is bounded, and no backend hears of it."""
    async with Backend(forever(whole(ANSWER))) as backend:
        policy = documents([backend.url], gateway={"max_body": "64KiB"})
        async with gateway(store_url, policy) as house:
            key = await house.key() if good else "gw_wrong"
            async with house.caller(key, b"", framing) as caller:
                piece = b" " * 65536 if framing.startswith(b"content") else chunk(b" " * 65536)
                sent = 0
                with pytest.raises(ConnectionError):
                    while sent < 1 << 30:
                        caller.writer.write(piece)
                        await asyncio.wait_for(caller.writer.drain(), SOON)
                        sent += len(piece)
                assert sent < 128 << 20
            async with house.caller(key, b"", framing) as caller:  # a reset takes an answer along: ask with less
                caller.writer.write(piece * 2)
                assert (await asyncio.wait_for(caller.head(), SOON))[9:12] == status
        assert backend.requests == []


async def test_c07_pipelined_requests_are_answered_in_order_each_by_its_own_key_or_not_at_all(store_url: str) -> None:
    """A hundred in one write, every third with a wrong key. What is answered belongs to its request."""
    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, documents([backend.url])) as house:
        keys = [await house.key() if i % 3 else "gw_wrong" for i in range(100)]
        sent = [
            completion_request(key).replace(b"host:", b"x-request-id: r%d\r\nhost:" % i) for i, key in enumerate(keys)
        ]
        statuses: list[int] = []
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        writer.write(b"".join(sent))
        try:
            while True:
                answer = await asyncio.wait_for(read(reader), SOON)
                assert answer.whole
                assert answer.headers[b"x-request-id"] == b"r%d" % len(statuses)
                statuses.append(answer.status)
        except ConnectionError:
            pass  # closed
        writer.transport.abort()
        assert statuses
        assert statuses == [200 if i % 3 else 401 for i in range(len(statuses))]
        await house.settled()
    assert len(rows(store_url)) == statuses.count(200)


BOMBS = {
    "depth": b"[" * 200_000,
    "depth in a member": b'{"model":"llama","prompt":' + b'{"a":' * 100_000,
    "depth that is closed": b'{"model":"llama","prompt":"x","metadata":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a number of a million digits": b'{"model":"llama","prompt":"x","max_tokens":' + b"9" * 1_000_000 + b"}",
    "a hundred thousand members": b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
    "the same member again and again": b"{" + b",".join([b'"model":"llama"'] * 100_000) + b"}",
    "half a surrogate": b'{"model":"llama","prompt":"\\ud800"',
    "not UTF-8": b'{"model":"llama","prompt":"\xff\xfe"}',
    "not a number": b'{"model":"llama","prompt":"x","temperature":NaN}',
    "nothing": b"",
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
async def test_c08_a_bomb_is_the_callers_mistake(store_url: str, body: bytes) -> None:
    """400 or 422, in little memory, and no backend hears of it."""
    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, documents([backend.url])) as house:
        key = await house.key()
        async with house.caller(key, body) as caller:
            tracemalloc.start()
            answer = await asyncio.wait_for(read(caller.reader), SOON)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert answer.status in (400, 422)
        assert set(json.loads(answer.body)["error"]) >= {"message", "type", "param", "code"}
        assert peak < 10 * len(body) + (1 << 20)
        await healthy(house, key)
        assert len(backend.requests) == 20


async def test_c09_in_a_storm_the_backend_gets_what_it_can_do_and_afterwards_all_is_well(store_url: str) -> None:
    """Ten callers for each that can be served: the others get a 503 with Retry-After, and none is lost."""
    busy, at_once = 0, []

    async def works(peer: Peer) -> None:
        nonlocal busy
        busy += 1
        at_once.append(busy)
        await asyncio.sleep(0.1)
        busy -= 1

    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend(forever(Peer.request, works, ok(ANSWER))))
        policy = documents([])
        policy["pools"] = {"demo": {"upstreams": [{"url": backend.url, "max_in_flight": 4}]}}  # 40 a second
        house = await stack.enter_async_context(gateway(store_url, policy))
        request = completion_request(await house.key())
        storm = await fire(house.url, request, poisson(rate=400, seconds=1, seed=9))
        assert (storm.errors, set(storm.statuses)) == ({}, {200, 503})
        assert storm.statuses.total() == len(storm.begun)
        assert max(at_once) == 4
        assert storm.statuses[200] == len(at_once)
        after = await fire(house.url, request, fixed(rate=5, seconds=1))
        assert (after.statuses, after.errors) == ({200: 5}, {})
        await house.settled()
    complete = [row for row in rows(store_url) if row["output_source"] == "upstream"]
    assert len(complete) == storm.statuses[200] + 5

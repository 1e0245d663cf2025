"""Forms and bodies that pass through as they come, while one side or the other goes wrong in the middle of them."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_callers_faults import impatient
from tests.flows.test_endpoints import FILE, FORM, ROUTES, answer, form
from tests.flows.test_ten_sentences import ONE_SEAT, plan, rows
from tests.flows.test_upstream_faults import SOON
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, forever, ok, play
from tests.proving.house import MODEL, House, documents, gateway

pytestmark = pytest.mark.anyio

TRANSCRIPTIONS = b"/v1/audio/transcriptions"
WHOLE = form(('name="model"', MODEL.encode()), FILE)
FIELDS = tuple(f"{name}: {value}".encode() for name, value in FORM.items())
ANNOUNCED = (b"content-length: %d" % len(WHOLE), *FIELDS)
CHUNKED = (b"transfer-encoding: chunked", *FIELDS)
SEATS = {"plans": plan(ONE_SEAT)}


def said(status: bytes, body: bytes = b"{}", *fields: bytes) -> bytes:
    return ok(body, *fields).replace(b"200 OK", status, 1)


def upstreams(house: House) -> list[Any]:
    return list(house.gateway.live.policies.pools._upstreams.values())


async def at_rest(house: House) -> None:
    """Nothing of an exchange is left: no seat, nobody in flight, nobody thought ill of, no connection that is busy."""
    async with asyncio.timeout(SOON):
        await house.settled()
        while any(upstream.in_flight for upstream in upstreams(house)):
            await asyncio.sleep(0.005)
    assert [upstream.transport.in_flight for upstream in upstreams(house)] == [0] * len(upstreams(house))


async def failures(house: House) -> list[bool]:
    return [upstream.health.out for upstream in upstreams(house)]


# — retries and fallbacks


async def test_an_upload_that_an_upstream_stops_taking_is_sent_to_nobody_else(store_url: str) -> None:
    """A part of it is gone, so another pool could be sent the rest at most."""
    async with Backend(Peer.head, asyncio.Event()) as stuck, Backend(forever(Peer.request, answer(text="x"))) as other:
        pools = {
            "first": {
                "fallback": "second",
                "timeouts": {"idle": "300ms", "first_byte": "20s"},
                "upstreams": [{"url": stuck.url}],
            },
            "second": {"upstreams": [{"url": other.url}]},
        }
        policies = documents([], models={MODEL: {"pool": "first"}}, pools=pools)
        async with gateway(store_url, policies) as house:
            big = form(('name="model"', MODEL.encode()), (FILE[0], b"\0" * 30_000_000))
            framing = (b"content-length: %d" % len(big), *FIELDS)
            async with house.caller(await house.key(), big, *framing, path=TRANSCRIPTIONS) as caller:
                head = await asyncio.wait_for(caller.head(), SOON)
            await at_rest(house)
    assert head.startswith(b"HTTP/1.1 504 ")
    assert other.peers == []


@pytest.mark.parametrize(("step", "status"), [(said(b"503 Busy"), 503), (Peer.reset, 502)])
async def test_an_upload_that_fails_in_the_middle_is_sent_to_nobody_else(
    store_url: str, step: Step, status: int
) -> None:
    async def some(peer: Peer) -> None:
        await peer.head()
        await peer._reader.readexactly(100_000)
        await play(peer, step)

    async with Backend(some) as first, Backend(some) as second, Backend() as other:
        pools = {"demo": {"upstreams": [{"url": first.url}, {"url": second.url}], "fallback": "next"}}
        pools["next"] = {"upstreams": [{"url": other.url}]}
        async with gateway(store_url, documents([], pools=pools)) as house:
            async with house.caller(await house.key(), WHOLE, *ANNOUNCED, path=TRANSCRIPTIONS) as caller:
                head = await asyncio.wait_for(caller.head(), SOON)
            await at_rest(house)
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (len(first.peers) + len(second.peers), other.peers) == (1, [])


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, b"/v1/moderations"])
async def test_an_upload_that_nobody_began_to_take_goes_whole_to_another(store_url: str, path: bytes) -> None:
    async with Backend(forever(Peer.request, answer(text="x"))) as other:
        pools = {"demo": {"upstreams": [{"url": "http://127.0.0.1:9"}], "fallback": "next"}}
        pools["next"] = {"upstreams": [{"url": other.url}]}
        async with gateway(store_url, documents([], pools=pools, routes=ROUTES, **SEATS)) as house:
            async with house.caller(await house.key(), WHOLE, *ANNOUNCED, path=path) as caller:
                head = await asyncio.wait_for(caller.head(), SOON)
            await at_rest(house)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert [request.body for request in other.requests] == [WHOLE]


async def test_a_route_without_a_body_is_answered_by_the_pool_that_stands_in(store_url: str) -> None:
    async with Backend(forever(Peer.request, answer(text="x"))) as other:
        pools = {"demo": {"upstreams": [{"url": "http://127.0.0.1:9"}], "fallback": "next"}}
        pools["next"] = {"upstreams": [{"url": other.url}]}
        async with gateway(store_url, documents([], pools=pools, routes=ROUTES)) as house:
            async with house.client(await house.key()) as client:
                got = [await client.get("/v1/files/f?after=1") for _ in range(2)]
    assert [one.status_code for one in got] == [200, 200]
    assert [request.line for request in other.requests] == [b"GET /v1/files/f?after=1 HTTP/1.1"] * 2
    assert len(other.peers) == 1  # as any request that can be sent again over a connection that was kept
    assert b"content-type" not in dict(other.requests[0].headers)


async def test_an_upload_that_was_refused_before_it_came_goes_whole_to_another(store_url: str) -> None:
    refused = asyncio.Event()

    async def busy(peer: Peer) -> None:
        await peer.head()
        await peer.send(said(b"503 Busy"))
        refused.set()
        await asyncio.Event().wait()

    async with Backend(busy) as first, Backend(forever(Peer.request, answer(text="x"))) as other:
        pools = {"demo": {"upstreams": [{"url": first.url}], "fallback": "next"}}
        pools["next"] = {"upstreams": [{"url": other.url}]}
        async with gateway(store_url, documents([], pools=pools, routes=ROUTES, **SEATS)) as house:
            path = b"/v1/moderations"
            async with house.caller(await house.key(), b"", b"content-length: 5", path=path) as caller:
                await asyncio.wait_for(refused.wait(), SOON)
                caller.writer.write(b"12345")
                head = await asyncio.wait_for(caller.head(), SOON)
            await at_rest(house)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert [request.body for request in other.requests] == [b"12345"]


# — who is told, and when


async def test_who_leaves_a_stream_that_began_before_his_body_did_is_noticed(store_url: str) -> None:
    begun = asyncio.Event()

    async def begins(peer: Peer) -> None:
        await peer.head()
        await peer.send(EVENTS, chunk(b"data: {}\n\n"))
        begun.set()

    async with Backend(begins) as backend, gateway(store_url, documents([backend.url], routes=ROUTES)) as house:
        async with house.caller(await house.key(), b"", b"content-length: 10", path=b"/v1/moderations"):
            await asyncio.wait_for(begun.wait(), SOON)
        await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
        await at_rest(house)
        (row,) = rows(store_url)
    assert row["ended"] == "client"


async def test_an_upstream_that_closes_its_side_in_the_middle_and_reads_no_more_has_failed_at_once(
    store_url: str,
) -> None:
    async def half(peer: Peer) -> None:
        await peer.head()
        peer._writer.write_eof()
        await asyncio.sleep(SOON * 3)

    async with Backend(half) as backend, gateway(store_url, documents([backend.url])) as house:
        framing = ANNOUNCED
        async with house.caller(await house.key(), WHOLE, *framing, path=TRANSCRIPTIONS) as caller:
            head = await asyncio.wait_for(caller.head(), SOON)
        await at_rest(house)
    assert head.startswith(b"HTTP/1.1 502 ")


# — callers who leave, and upstreams that answer in the middle

LEAVES = {
    "before his body": (0, 0),
    "in the head of his form": (50, 0),
    "in the middle": (len(WHOLE) // 2, 1),
    "before the last boundary": (len(WHOLE) - 10, 1),
    "before the last chunk": (len(WHOLE), 1),
    "after his body": (len(WHOLE) + 5, 1),
}


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("when", LEAVES)
async def test_a_caller_may_leave_at_any_moment_of_his_form_and_it_is_his_own_doing(
    store_url: str, when: str, how: str
) -> None:
    """The backend sees an end that is none, nobody thinks ill of it, and everything is given back."""
    sent, asked = LEAVES[when]
    body = chunk(WHOLE[:sent]) if 0 < sent <= len(WHOLE) else chunk(WHOLE) + b"0\r\n\r\n" if sent else b""
    async with Backend(Peer.head) as backend, gateway(store_url, one_pool(backend, **SEATS)) as house:
        key, tasks = await house.key(), len(asyncio.all_tasks())
        async with house.caller(key, body, *CHUNKED, path=TRANSCRIPTIONS) as caller:
            async with asyncio.timeout(SOON):
                while len(backend.requests) < asked:
                    await asyncio.sleep(0.002)
            await asyncio.sleep(0.02)
            getattr(caller.writer, how, caller.writer.transport.abort)()
            if asked:
                await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
            await at_rest(house)
        async with asyncio.timeout(SOON):
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.005)
        assert not any(upstream.health.out for upstream in upstreams(house))
        assert [row["ended"] for row in rows(store_url)] == ["client"] * asked
    assert len(backend.peers) == asked


def one_pool(backend: Backend, **sections: Any) -> dict[str, Any]:
    """A pool that ejects at the first failure, because another one is there for it."""
    first = {"upstreams": [{"url": backend.url}], "health": {"failures": 1}, "fallback": "other"}
    return {
        **documents([], **sections),
        "pools": {"demo": first, "other": {"upstreams": [{"url": "http://127.0.0.1:9"}]}},
    }


EARLY = {
    "413": (said(b"413 Too Large"), 413),
    "413 and a close": (said(b"413 Too Large", b"{}", b"connection: close"), 413),
    "429": (said(b"429 Slow Down", b"{}", b"retry-after: 7"), 429),
    "500": (said(b"500 No"), 500),
    "503": (said(b"503 No"), 503),
    "401": (said(b"401 Who"), 502),
    "302": (said(b"302 There", b"{}", b"location: /x"), 502),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
}


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("reads", [0, 100_000])
@pytest.mark.parametrize("told", EARLY)
async def test_what_an_upstream_answers_in_the_middle_reaches_the_caller_and_the_rest_reaches_nobody(
    store_url: str, told: str, reads: int, closes: bool
) -> None:
    reply, status = EARLY[told]

    async def early(peer: Peer) -> None:
        await peer.head()
        await peer._reader.readexactly(reads)
        await peer.send(reply)
        if closes:
            await peer.close()
        await asyncio.Event().wait()

    times = 1 if told == "429" else 3
    async with Backend(early) as backend, gateway(store_url, documents([backend.url], **SEATS)) as house:
        key = await house.key()
        for _ in range(times):  # no seat is lost
            async with house.caller(key, WHOLE[: len(WHOLE) // 2], *ANNOUNCED, path=TRANSCRIPTIONS) as caller:
                head = await asyncio.wait_for(caller.head(), SOON)
                caller.writer.write(WHOLE[len(WHOLE) // 2 :])
                await asyncio.wait_for(caller.rest(), SOON)
            await at_rest(house)
            assert head.startswith(b"HTTP/1.1 %d " % status)
            assert b"\r\nconnection: close\r\n" in head
    assert len(backend.peers) == times


async def test_an_upstream_may_begin_to_answer_well_while_it_still_reads(store_url: str) -> None:
    """Its head waits here for the end of the body: who stopped sending would be waited for, and would wait himself."""
    seen = bytearray()

    async def eager(peer: Peer) -> None:
        await peer.head()
        await peer.send(EVENTS, chunk(b"data: {}\n\n"))
        while not seen.endswith(WHOLE[-40:]):
            seen.extend(await peer._reader.read(65536))
        await peer.send(chunk(b"data: [DONE]\n\n") + END)

    async with Backend(eager) as backend, gateway(store_url, documents([backend.url], **SEATS)) as house:
        async with house.caller(await house.key(), WHOLE, *ANNOUNCED, path=TRANSCRIPTIONS) as caller:
            await asyncio.wait_for(caller.head(), SOON)
            body = await asyncio.wait_for(caller.reader.readuntil(b"\r\n0\r\n\r\n"), SOON)
        await at_rest(house)
    assert b"data: {}" in body
    assert b"[DONE]" in body
    assert len(seen) == len(WHOLE)


CALLERS_FAULTS = {
    "too large": (chunk(WHOLE[:1_000_000]) + chunk(b"\0" * 1_000_000) * 2, 413),
    "a second model": (chunk(WHOLE.removesuffix(b"--\r\n") + form(('name="model"', b"x"))[12:]), 400),
    "no end": (chunk(WHOLE[:-4]) + b"0\r\n\r\n", 400),
    "no chunk": (chunk(WHOLE[:-4]) + b"zz\r\n", 400),
}


@pytest.mark.parametrize("fault", CALLERS_FAULTS)
async def test_a_fault_in_the_middle_of_a_form_is_told_to_its_caller_and_is_no_failure_of_the_upstream(
    store_url: str, fault: str
) -> None:
    body, status = CALLERS_FAULTS[fault]
    seen = bytearray()

    async def reads(peer: Peer) -> None:
        await peer.head()
        while piece := await peer._reader.read(65536):
            seen.extend(piece)
        peer.gone.set()

    policies = {**SEATS, "gateway": {"max_body": "2400KiB"}}
    async with Backend(reads) as backend, gateway(store_url, one_pool(backend, **policies)) as house:
        async with house.caller(await house.key(), body, *CHUNKED, path=TRANSCRIPTIONS) as caller:
            head = await asyncio.wait_for(caller.head(), SOON)
        await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
        await at_rest(house)
        assert not any(upstream.health.out for upstream in upstreams(house))
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (b"\r\nconnection: close\r\n" in head) == (fault != "no end")  # of which all has come
    assert not seen.endswith(b"0\r\n\r\n")
    assert b'"model"' not in bytes(seen)[1000:]


async def test_a_caller_who_is_too_slow_with_his_form_is_told_so_and_his_upstream_is_not_blamed(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, body=0.2)
    async with Backend(Peer.head) as backend, gateway(store_url, one_pool(backend, **SEATS)) as house:
        async with house.caller(await house.key(), WHOLE[:100_000], *ANNOUNCED, path=TRANSCRIPTIONS) as caller:
            head = await asyncio.wait_for(caller.head(), SOON)
        await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
        await at_rest(house)
        assert not any(upstream.health.out for upstream in upstreams(house))
    assert head.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("framing", [ANNOUNCED, CHUNKED])
async def test_the_next_request_may_follow_a_form_on_its_connection(store_url: str, framing: tuple[bytes, ...]) -> None:
    async def reads(peer: Peer) -> None:
        if framing is ANNOUNCED:
            await peer.request()
        else:
            await peer.head()
            seen = b""
            while not seen.endswith(b"\r\n0\r\n\r\n"):
                seen = seen[-10:] + await peer._reader.read(65536)

    body = WHOLE if framing is ANNOUNCED else chunk(WHOLE) + b"0\r\n\r\n"
    async with (
        Backend(forever(reads, answer(text="x"))) as backend,
        gateway(store_url, documents([backend.url], **SEATS)) as house,
    ):
        key = await house.key()
        async with house.caller(key, body, *framing, path=TRANSCRIPTIONS) as caller:
            heads = [await asyncio.wait_for(caller.head(), SOON)]
            await caller.reader.readexactly(len(answer(text="x").partition(b"\r\n\r\n")[2]))
            again = [b"POST " + TRANSCRIPTIONS + b" HTTP/1.1", b"host: g", b"authorization: Bearer " + key.encode()]
            caller.writer.write(b"\r\n".join((*again, *framing, b"", body)))
            heads.append(await asyncio.wait_for(caller.head(), SOON))
        await at_rest(house)
    assert all(head.startswith(b"HTTP/1.1 200 ") and b"connection: close" not in head for head in heads)
    assert len(backend.requests) == 2


async def test_who_waits_for_a_100_gets_it_when_his_body_is_wanted(store_url: str) -> None:
    async with (
        Backend(forever(Peer.request, answer(text="x"))) as backend,
        gateway(store_url, documents([backend.url], routes=ROUTES)) as house,
    ):
        key = await house.key()
        waiting = b"expect: 100-continue"
        for path, body, fields in (
            (TRANSCRIPTIONS, WHOLE, ANNOUNCED),
            (b"/v1/moderations", b"12345", (b"content-length: 5",)),
        ):
            async with house.caller(key, b"", *fields, waiting, path=path) as caller:
                assert (await asyncio.wait_for(caller.head(), SOON)).startswith(b"HTTP/1.1 100 ")
                caller.writer.write(body)
                assert (await asyncio.wait_for(caller.head(), SOON)).startswith(b"HTTP/1.1 200 ")
            async with house.caller("gw_no", b"", *fields, waiting, path=path) as caller:
                assert (await asyncio.wait_for(caller.head(), SOON)).startswith(b"HTTP/1.1 401 ")
    assert [request.body for request in backend.requests] == [WHOLE, b"12345"]


# — routes


async def test_a_route_passes_a_body_with_any_method(store_url: str) -> None:
    routes = {"/v1/files/*": {"pool": "demo", "methods": ["GET", "DELETE", "PUT", "PATCH"]}}
    async with (
        Backend(forever(Peer.request, answer(a=1))) as backend,
        gateway(store_url, documents([backend.url], routes=routes)) as house,
    ):
        async with house.client(await house.key()) as client:
            for method in ("GET", "DELETE", "PUT", "PATCH"):
                assert (await client.request(method, f"/v1/files/{method}", content=b"abc")).status_code == 200
        assert upstreams(house)[0]._urls == {}  # whatever callers write is not kept
    assert [request.body for request in backend.requests] == [b"abc"] * 4


SMUGGLED = (
    (b"content-length: 5", b"transfer-encoding: chunked"),
    (b"content-length: 5", b"content-length: 6"),
    (b"content-length: +5",),
    (b"content-length: 5, 5",),
    (b"transfer-encoding: gzip, chunked",),
    (b"transfer-encoding: chunked, identity",),
    (b"transfer-encoding: chunked", b"transfer-encoding: chunked"),
    (b"transfer-encoding:\x0bchunked",),
    (b"content-length: 5", b"content-type: a\rx: y"),
    (b"content-length: 5", b"content-type: a\nx: y"),
    (b"content-length: 5", b"content-type: a\0b"),
    (b"content-length: 5", b"content-type: a\r\n b"),
    (b"content-length: 5", b"content-encoding: gzip"),
)


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, b"/v1/moderations"])
@pytest.mark.parametrize("fields", SMUGGLED)
async def test_a_framing_or_a_field_that_two_may_read_differently_reaches_nobody(
    store_url: str, path: bytes, fields: tuple[bytes, ...]
) -> None:
    async with Backend() as backend, gateway(store_url, documents([backend.url], routes=ROUTES)) as house:
        async with house.caller(await house.key(), b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n", *fields, path=path) as caller:
            head = await asyncio.wait_for(caller.head(), SOON)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert backend.peers == []


async def test_what_a_caller_sends_beyond_his_length_is_no_part_of_his_body(store_url: str) -> None:
    async with (
        Backend(forever(Peer.request, answer(text="x"))) as backend,
        gateway(store_url, documents([backend.url], routes=ROUTES)) as house,
    ):
        beyond = b"DELETE /v1/moderations HTTP/1.1\r\nhost: g\r\n\r\n"
        framing = b"content-length: 5"
        async with house.caller(await house.key(), b"12345" + beyond, framing, path=b"/v1/moderations") as caller:
            head = await asyncio.wait_for(caller.head(), SOON)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert [request.body for request in backend.requests] == [b"12345"]


# — an answer that is looked into before it is passed on

RENAMED = {"models": {"public": {"pool": "demo", "upstream_model": "inner", "restore_name": True}}}
CUT = ok(b'{"model":"inner","data":"' + b"x" * 100_000 + b'"}')[:-50_000]
EMBED = json.dumps({"model": "public", "input": "x"}).encode()


@pytest.mark.parametrize("end", [Peer.close, Peer.reset])
async def test_an_answer_that_is_cut_while_it_is_renamed_is_an_error_and_not_half_an_answer(
    store_url: str, end: Step
) -> None:
    async with (
        Backend(Peer.request, CUT, end) as backend,
        gateway(store_url, documents([backend.url], **RENAMED, **SEATS)) as house,
    ):
        async with house.caller(await house.key(), EMBED, path=b"/v1/embeddings") as caller:
            head = await asyncio.wait_for(caller.head(), SOON)
        await at_rest(house)
        (row,) = rows(store_url)
    assert head.startswith(b"HTTP/1.1 502 ")
    assert (row["http_status"], row["ended"], row["output_source"], row["input_tokens"]) == (502, "upstream", "none", 0)


async def test_an_answer_that_is_too_long_to_be_renamed_passes_as_it_is(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.upstream._REWRITTEN", 100_000)
    body = json.dumps({"model": "inner", "data": "x" * 300_000}).encode()

    async def in_pieces(peer: Peer) -> None:
        await peer.request()
        await peer.send(*(ok(body)[at : at + 50_000] for at in range(0, len(ok(body)), 50_000)))

    async with Backend(in_pieces) as backend, gateway(store_url, documents([backend.url], **RENAMED)) as house:
        async with house.client(await house.key()) as client:
            got = await client.post("/v1/embeddings", content=EMBED)
    assert (got.status_code, got.content) == (200, body)


MISFIT = said(b"400 No", b'{"error":{"message":"' + b"x" * 1000 + b'"}}')[:-500]
FITTED = {"models": {"m": {"pool": "demo"}}}


@pytest.mark.parametrize(
    ("policies", "path", "request_", "begun"),
    [
        (RENAMED, b"/v1/embeddings", EMBED, CUT),
        (FITTED, b"/v1/chat/completions", b'{"model":"m","messages":[{"role":"user","content":"x"}]}', MISFIT),
    ],
)
async def test_who_leaves_while_an_answer_is_gathered_ends_it_once(
    store_url: str, policies: dict[str, Any], path: bytes, request_: bytes, begun: bytes
) -> None:
    async with Backend(Peer.request, begun) as backend:
        pools = {"demo": {"upstreams": [{"url": backend.url}], "api": "openai"}}
        async with gateway(store_url, {**documents([], **policies, **SEATS), "pools": pools}) as house:
            async with house.caller(await house.key(), request_, path=path) as caller:
                async with asyncio.timeout(SOON):
                    while not (backend.peers and backend.peers[0].sent):
                        await asyncio.sleep(0.005)
                await asyncio.sleep(0.05)
                caller.writer.close()
                await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
            await at_rest(house)
            assert [upstream.in_flight for upstream in upstreams(house)] == [0]
            assert [row["ended"] for row in rows(store_url)] == ["client"]


@pytest.mark.parametrize("size", [100, 70_000])
async def test_a_400_that_is_a_stream_is_the_callers_as_it_is(store_url: str, size: int) -> None:
    events = [b"data: " + b"x" * size + b"\n\n", b"data: [DONE]\n\n"]
    reply = b"".join((EVENTS.replace(b"200 OK", b"400 No"), *map(chunk, events), b"0\r\n\r\n"))
    async with Backend(forever(Peer.request, reply)) as backend:
        pools = {"demo": {"upstreams": [{"url": backend.url}], "api": "openai", "usage": "inject"}}
        async with gateway(store_url, {**documents([], **FITTED, **SEATS), "pools": pools}) as house:
            async with house.client(await house.key()) as client:
                body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
                got = await client.post("/v1/chat/completions", json=body)
            await at_rest(house)
    assert (got.status_code, got.content) == (400, b"".join(events))


async def test_an_error_that_does_not_end_is_waited_for_as_long_as_an_answer(store_url: str) -> None:
    async with Backend(Peer.request, MISFIT) as backend:
        pools = {"demo": {"upstreams": [{"url": backend.url}], "api": "openai", "timeouts": {"idle": "300ms"}}}
        async with gateway(store_url, {**documents([], **FITTED, **SEATS), "pools": pools}) as house:
            async with house.client(await house.key()) as client:
                body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
                got = await client.post("/v1/chat/completions", json=body)
            await at_rest(house)
            (row,) = rows(store_url)
    assert (got.status_code, row["http_status"]) == (504, 504)


# — comments


async def test_a_form_that_asks_for_a_stream_gets_comments_while_it_comes_and_a_fault_of_it_as_an_event(
    store_url: str,
) -> None:
    parts = [('name="model"', MODEL.encode()), ('name="stream"', b"true"), FILE]
    body = form(*parts)
    async with Backend(Peer.head) as backend:
        pools = {"demo": {"upstreams": [{"url": backend.url}], "comments": "1s"}}
        async with gateway(store_url, documents([], **SEATS) | {"pools": pools}) as house:
            async with house.caller(await house.key(), chunk(body[:100_000]), *CHUNKED, path=TRANSCRIPTIONS) as caller:
                head = await asyncio.wait_for(caller.head(), SOON)
                await asyncio.wait_for(caller.reader.readuntil(b"\n\n"), SOON)
                caller.writer.write(chunk(body[100_000:-4]) + b"0\r\n\r\n")
                rest = await asyncio.wait_for(caller.rest(), SOON)
            await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
            await at_rest(house)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"invalid_form" in rest
    assert not rest.endswith(b"0\r\n\r\n")


# — what is left over


MODEL_LAST = form((FILE[0], b"\0" * 200_000), ('name="model"', MODEL.encode()))
LEFT = {
    "a second model": (form((FILE[0], b"\0" * 200_000), *[('name="model"', MODEL.encode())] * 2), 400),
    "no model": (form((FILE[0], b"\0" * 200_000)), 422),
    "another's model": (form((FILE[0], b"\0" * 200_000), ('name="model"', b"other")), 404),
    "no upstream": (MODEL_LAST, 502),
    "upstreams that hang up": (MODEL_LAST, 502),
    "an upstream that answers at once": (MODEL_LAST, 413),
    "well": (MODEL_LAST, 200),
}


@pytest.mark.parametrize("end", LEFT)
async def test_a_form_leaves_no_file_open_however_it_ends(store_url: str, end: str) -> None:
    """Nor waits for the collector, which comes late where little else is left to it."""

    async def play(peer: Peer) -> None:
        if end == "well":
            await peer.request()
            await peer.send(answer(text="x"))
        elif end == "upstreams that hang up":
            await peer.close()
        else:
            await peer.head()
            await peer.send(said(b"413 Too Large"))
            await asyncio.Event().wait()

    body, status = LEFT[end]
    async with Backend(play) as backend:
        nobody = {"upstreams": [{"url": "http://127.0.0.1:9"}], "health": {"connect_failures": 100}}
        first = nobody if end == "no upstream" else {"upstreams": [{"url": backend.url}], "health": {"failures": 100}}
        policies = documents([], pools={"demo": {**first, "fallback": "other"}, "other": nobody})
        async with gateway(store_url, policies) as house:
            key = await house.key()
            async with house.caller(key, body, *FIELDS, path=TRANSCRIPTIONS) as caller:
                await asyncio.wait_for(caller.head(), SOON)
            await at_rest(house)
            gc.collect()
            gc.disable()
            try:
                before = files()
                for _ in range(5):
                    async with house.caller(key, body, *FIELDS, path=TRANSCRIPTIONS) as caller:
                        head = await asyncio.wait_for(caller.head(), SOON)
                await at_rest(house)
                after = files()
            finally:
                gc.enable()
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert after == before


def files() -> int:
    """How many files without a name are open."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += "(deleted)" in str(descriptor.readlink())
    return found

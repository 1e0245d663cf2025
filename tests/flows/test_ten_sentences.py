"""The ten sentences that stay true, each shown over real sockets on a real store."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import Any

import httpx
import pytest
import redis
from structlog.testing import capture_logs

from gateway.reload import reload
from tests.proving.backend import END, EVENTS, Backend, Peer, chunk, chunked, forever, ok
from tests.proving.house import MODEL, House, documents, echo, gateway

BODY = json.dumps({"model": MODEL, "prompt": "The sky is", "max_tokens": 4}).encode()
STREAM = json.dumps({"model": MODEL, "prompt": "The sky is", "max_tokens": 4, "stream": True}).encode()
ANSWER = b'{"choices":[{"index":0,"text":"blue"}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}'
FINISH = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'

REQUESTS = {"name": "requests", "count": "requests", "rate": "600/minute", "burst": 50, "per": ["team"]}
TOKENS = {"name": "tokens", "count": "total_tokens", "quota": "100000/day", "per": ["key"]}
ONE_SEAT = {"name": "seat", "count": "concurrent_requests", "at_most": 1, "per": ["team"]}


def plan(*limits: dict[str, Any]) -> dict[str, Any]:
    return {"free": {"limits": list(limits)}}


def everything(store_url: str) -> dict[bytes, bytes | None]:
    """Every key of the store, as its bytes."""
    with redis.Redis.from_url(store_url) as client:
        return {key: client.dump(key) for key in client.scan_iter(count=10_000)}


def rows(store_url: str) -> list[dict[str, Any]]:
    """The ledger of acme."""
    with redis.Redis.from_url(store_url) as client:
        entries: Any = client.xrange("{acme}:usage")
        return [json.loads(fields[b"row"]) for _, fields in entries]


async def ends_by_itself(house: House, key: str) -> int:
    async with house.client(key) as client:
        return (await client.post("/v1/completions", content=BODY)).status_code


async def test_1_a_request_lives_in_one_snapshot(store_url: str) -> None:
    """The policies change while it waits for its answer; it is charged by those it began with."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await go_on.wait()
        await peer.send(ok(ANSWER))

    async with Backend(slow) as backend, gateway(store_url, documents([backend.url])) as house:
        key = await house.key()
        first = asyncio.ensure_future(ends_by_itself(house, key))
        await asked.wait()
        other = {"accounts/acme/models/other": {"pool": "demo", "price": {"input": 9.0, "output": 9.0}}}
        house.documents(documents([backend.url + "/elsewhere"], models=other))
        assert await reload(house.gateway.live, house.settings.policies)
        go_on.set()

        assert await first == 200
        await house.settled()
        assert [(row["model"], row["cost_microusd"]) for row in rows(store_url)] == [(MODEL, 3 * 1 + 1 * 2)]
        assert await ends_by_itself(house, key) == 404


async def test_1_a_reload_while_the_body_comes_does_not_fail_it(store_url: str) -> None:
    """Its upstream is retired before it is asked, and answers all the same."""
    async with (
        Backend(forever(Peer.request, ok(ANSWER))) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        async with house.caller(await house.key(), BODY[:10], b"content-length: %d" % len(BODY)) as caller:
            async with house.client() as client:  # by its answer the gateway has taken the first half too
                await client.get("/healthz/live")
            policy = documents([backend.url])
            policy["pools"]["demo"]["timeouts"] = {"connect": "3s"}
            house.documents(policy)
            assert await reload(house.gateway.live, house.settings.policies)
            caller.writer.write(BODY[10:])
            assert (await caller.head()).startswith(b"HTTP/1.1 200")


async def test_2_nothing_between_the_two_sockets_looks_into_a_chunk(store_url: str) -> None:
    """Bytes that are no text, no events and no JSON arrive as they were sent, each before the next one is sent."""
    noise = random.Random(2)
    pieces = [noise.randbytes(noise.choice((1, 2, 700, 9000))) for _ in range(40)] + [
        b"\r\n0\r\n\r\ndata: [DONE]",
        b"\xff",
    ]
    arrived = [asyncio.Event() for _ in pieces]
    steps = [step for piece, event in zip(pieces, arrived, strict=True) for step in (chunk(piece), event)]

    async with (
        Backend(Peer.request, EVENTS, *steps, END) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        async with (
            house.client(await house.key()) as client,
            client.stream("POST", "/v1/completions", content=STREAM) as answer,
        ):
            received, due = b"", 0
            async for some in answer.aiter_raw():
                received += some
                while due < len(pieces) and len(received) >= sum(map(len, pieces[: due + 1])):
                    arrived[due].set()
                    due += 1
    assert received == b"".join(pieces)


async def test_3_admission_takes_every_limit_or_none(store_url: str) -> None:
    """While the only seat is taken, a refused request leaves the other counts as they were, to the byte."""
    go_on = asyncio.Event()
    limits = plan(REQUESTS, TOKENS, ONE_SEAT)
    async with (
        Backend(Peer.request, EVENTS, chunk(b"data: {}\n\n"), go_on, chunk(FINISH), END) as backend,
        gateway(store_url, documents([backend.url], plans=limits)) as house,
    ):
        key = await house.key()
        async with house.caller(key, STREAM) as streaming:
            await streaming.head()
            before = everything(store_url)

            async with house.client(key) as client:
                refused = await client.post("/v1/completions", content=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert everything(store_url) == before
            go_on.set()
            await streaming.reader.readuntil(END)


BAD: dict[str, tuple[dict[str, str], bytes, int]] = {
    "no key": ({"authorization": "Basic eDp5"}, BODY, 401),
    "a wrong key": ({"authorization": "Bearer gw_wrong"}, BODY, 401),
    "too large": ({}, b" " * (1 << 20) + BODY, 413),
    "no JSON": ({}, b"{", 400),
    "a bad value": ({}, BODY.replace(b"4", b'"4"'), 422),
    "an unknown model": ({}, BODY.replace(b"llama", b"lama"), 404),
    "never fits": ({}, BODY.replace(b"4", b"1000000"), 400),
    "no seat": ({}, BODY, 429),
}


@pytest.mark.parametrize(("headers", "body", "status"), BAD.values(), ids=BAD)
async def test_4_a_refused_request_costs_nothing(
    store_url: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    """No count moves, no backend is asked, no row is written."""
    never = {"name": "one-a-day", "count": "requests", "quota": "1/day", "per": ["team"]}
    policy = documents([], plans=plan(TOKENS, never), gateway={"max_body": "1MiB"})
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend:
        policy["pools"] = {"demo": {"upstreams": [{"url": backend.url}]}}
        async with gateway(store_url, policy) as house:
            key = await house.key()
            assert await ends_by_itself(house, key) == 200
            before, asked = everything(store_url), len(backend.requests)
            async with house.client(key) as client:
                answer = await client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == status
            assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
            assert (everything(store_url), len(backend.requests)) == (before, asked)


async def test_5_a_seat_is_held_until_the_last_byte_and_no_longer(store_url: str) -> None:
    """On a limit of one seat, who has seen the end of an answer may ask again at once: fifty times, none refused."""
    async with echo() as backend, gateway(store_url, documents([backend], plans=plan(ONE_SEAT))) as house:
        key = await house.key()
        async with house.client(key) as client:
            for body in (BODY, STREAM) * 25:
                assert (await client.post("/v1/completions", content=body)).status_code == 200
        await house.settled()
        with redis.Redis.from_url(store_url) as store:
            assert store.zcard("{acme}:seats:seat:tresearch") == 0


async def test_6_another_upstream_is_tried_only_while_nothing_was_answered(store_url: str) -> None:
    """One that refuses is passed over unnoticed; one that fails after its head is not made up for by another."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with Backend(forever(Peer.request, ok(ANSWER))) as good, Backend(Peer.request, Peer.reset) as broken:
        for bad in (closed, broken.url):
            async with gateway(store_url, documents([bad, good.url])) as house:
                key = await house.key()
                assert [await ends_by_itself(house, key) for _ in range(10)] == [200] * 10

    half = ok(ANSWER)[:-10]
    async with Backend(Peer.request, half, Peer.reset) as first, Backend(Peer.request, half, Peer.reset) as second:
        async with (
            gateway(store_url, documents([first.url, second.url])) as house,
            house.client(await house.key()) as client,
        ):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/v1/completions", content=BODY)
        assert len(first.requests) + len(second.requests) == 1


CUTS = {
    "chunked, by FIN": (EVENTS, chunk(b"data: 1\n\n"), Peer.close),
    "chunked, by RST": (EVENTS, chunk(b"data: 1\n\n"), Peer.reset),
    "with a length, by FIN": (ok(ANSWER)[:-1], Peer.close),
    "garbage for a chunk": (EVENTS, chunk(b"data: 1\n\n"), b"zz\r\n"),
}


@pytest.mark.parametrize("steps", CUTS.values(), ids=CUTS)
async def test_7_after_the_status_line_failure_cuts_the_line(store_url: str, steps: tuple[Any, ...]) -> None:
    """A truncated answer never looks complete: no last chunk, no full length. A stream's reader is told as well."""
    async with Backend(Peer.request, *steps) as backend, gateway(store_url, documents([backend.url])) as house:
        async with house.caller(await house.key(), STREAM) as caller:
            head, rest = await caller.head(), await caller.rest()
        assert head.startswith(b"HTTP/1.1 200")
        assert not rest.endswith(END)
        assert b'"finish_reason":"error"' in rest if EVENTS in steps else len(rest) < len(ANSWER)
        await house.settled()
    assert [row["ended"] for row in rows(store_url)] == ["upstream"]


@pytest.mark.parametrize("whole", [ok(ANSWER), chunked(b"data: {}\n\n", FINISH)], ids=["a length", "chunks"])
async def test_8_usage_is_settled_before_the_end_is_sent(store_url: str, whole: bytes) -> None:
    """While the store keeps still the end is held back; when it has written the row, the end is sent."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await go_on.wait()
        await peer.send(whole)

    async with Backend(script) as backend, gateway(store_url, documents([backend.url])) as house:
        async with house.caller(await house.key(), STREAM) as caller:
            await asked.wait()
            with redis.Redis.from_url(store_url) as store:
                store.client_pause(5000, all=False)  # writes wait, until we say otherwise
                go_on.set()
                end = asyncio.ensure_future(caller.reader.readuntil(END if END in whole else ANSWER[-20:]))
                done, _ = await asyncio.wait((end,), timeout=0.3)
                assert not done
                assert rows(store_url) == []
                store.client_unpause()
            await end
            assert [row["ended"] for row in rows(store_url)] == ["complete"]


async def test_8_done_is_the_end_to_an_sdk(store_url: str) -> None:
    """`data: [DONE]` waits for the settlement too, though the backend sends the last chunk in another packet."""
    seen, go_on = asyncio.Event(), asyncio.Event()
    done = chunk(b"data: [DONE]\n\n")
    async with (
        Backend(Peer.request, EVENTS, chunk(FINISH), seen, done, go_on, END) as backend,
        gateway(store_url, documents([backend.url], plans=plan(ONE_SEAT))) as house,
        house.caller(await house.key(), STREAM) as caller,
    ):
        await caller.reader.readuntil(FINISH)
        seen.set()
        end = asyncio.ensure_future(caller.reader.readuntil(b"[DONE]"))
        held, _ = await asyncio.wait((end,), timeout=0.1)
        assert not held
        go_on.set()
        await end
        assert [row["ended"] for row in rows(store_url)] == ["complete"]


async def test_8_what_follows_done_late_is_not_lost(store_url: str) -> None:
    """A backend that does not end after it is not waited for: the event goes on, and so does whatever comes."""
    go_on = asyncio.Event()
    async with (
        Backend(Peer.request, EVENTS, chunk(b"data: [DONE]\n\n"), go_on, chunk(b": more\n\n"), END) as backend,
        gateway(store_url, documents([backend.url])) as house,
        house.caller(await house.key(), STREAM) as caller,
    ):
        await caller.reader.readuntil(b"[DONE]")
        go_on.set()
        assert b": more\n\n" in await caller.reader.readuntil(END)


async def test_8_no_answer_no_charge(store_url: str) -> None:
    """A backend that gives none leaves the counts of tokens and requests as if nobody had asked."""
    async with (
        Backend(forever(Peer.request, Peer.reset)) as backend,
        gateway(store_url, documents([backend.url], plans=plan(REQUESTS, TOKENS, ONE_SEAT))) as house,
    ):
        key = await house.key()
        assert await ends_by_itself(house, key) == 502
        await house.settled()
        async with house.client(key) as client:
            counts = (await client.get("/v1/limits")).json()["data"]
        assert [(count["used"], count["reserved"]) for count in counts] == [(0, 0)] * 3
        assert [(row["output_tokens"], row["output_source"], row["ended"]) for row in rows(store_url)] == [
            (0, "none", "upstream")
        ]


async def test_9_a_bad_policy_document_changes_nothing(store_url: str) -> None:
    """It is refused with file and line, the old policies stay, and the next good ones are taken."""
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        key = await house.key()
        before = house.gateway.live.policies
        (house.settings.policies / "all.yaml").write_text("teams:\n  research: {organisation: acme, plan: fre}\n")
        with capture_logs() as lines:
            assert not await reload(house.gateway.live, house.settings.policies)
        assert house.gateway.live.policies is before
        assert [line["event"] for line in lines] == ["policies_refused"]
        assert lines[0]["mistakes"][0].startswith("all.yaml:2 teams.research.plan:")
        assert await ends_by_itself(house, key) == 200

        house.documents(documents([backend], teams={}))
        assert await reload(house.gateway.live, house.settings.policies)
        assert await ends_by_itself(house, key) == 403


async def test_10_every_exchange_leaves_exactly_one_log_line(store_url: str) -> None:
    """Whatever became of it, and with neither prompt nor key in it."""
    canary = "the-canary-in-the-prompt"
    body = json.dumps({"model": MODEL, "prompt": f"{canary} #tokens=3", "user": "u"}).encode()
    with capture_logs() as lines:
        async with echo() as backend, gateway(store_url, documents([backend], plans=plan(ONE_SEAT))) as house:
            key = await house.key()
            async with house.client(key) as client:
                for content, name in (
                    (body, None),
                    (body[:-1], None),
                    (body.replace(b"tokens=3", b"cut=1"), None),
                    (body.replace(b"tokens=3", b"status=503"), None),
                    (body, canary),
                ):
                    headers = {} if name is None else {"authorization": f"Bearer {name}"}
                    try:
                        await client.post("/v1/completions", content=content, headers=headers)
                    except httpx.RemoteProtocolError:
                        assert b"cut" in content
            await house.settled()
    exchanges = [line for line in lines if line["event"] == "http_access"]
    assert [(line["http.response.status_code"], line["outcome"]) for line in exchanges] == [
        (200, "complete"),
        (400, "refused"),
        (200, "upstream"),
        (503, "complete"),
        (401, "refused"),
    ]
    assert len({line["request_id"] for line in exchanges}) == 5
    assert canary not in str(lines)
    assert key[16:] not in str(lines)

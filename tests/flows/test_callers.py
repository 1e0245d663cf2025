"""Callers that leave, that send too much, or whose headers must not travel."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.flows.test_ten_sentences import ANSWER, BODY, FINISH, ONE_SEAT, STREAM, plan, rows
from tests.proving.backend import END, EVENTS, Backend, Peer, chunk, forever, ok
from tests.proving.house import MODEL, documents, gateway

# Nobody waits longer than this for what should be immediate; generous, because these machines are noisy.
SOON = 2.0


async def test_who_leaves_before_the_first_byte_takes_the_backend_with_him(store_url: str) -> None:
    asked = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.request()
        asked.set()

    async with Backend(silent) as backend, gateway(store_url, documents([backend.url], plans=plan(ONE_SEAT))) as house:
        async with house.caller(await house.key(), BODY):
            await asked.wait()
        await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
        await house.settled()
    assert [(row["ended"], row["http_status"], row["output_tokens"]) for row in rows(store_url)] == [("client", 499, 0)]


async def test_who_leaves_in_the_middle_pays_for_what_was_produced(store_url: str) -> None:
    """Counted by events, and flagged: the usage had not come yet."""
    events = [chunk(b'data: {"choices":[{"index":0,"text":" word"}],"usage":null}\n\n')] * 7
    async with (
        Backend(Peer.request, EVENTS, *events) as backend,
        gateway(store_url, documents([backend.url], plans=plan(ONE_SEAT))) as house,
    ):
        async with house.caller(await house.key(), STREAM) as caller:
            await caller.head()
            seen = b""
            while seen.count(b"data:") < 7:
                seen += await caller.reader.read(1 << 16)
        await asyncio.wait_for(backend.peers[0].gone.wait(), SOON)
        await house.settled()
    (row,) = rows(store_url)
    assert (row["ended"], row["output_tokens"], row["output_source"]) == ("client", 7, "counted")


async def test_a_bad_key_is_refused_before_the_body_is_asked_for(store_url: str) -> None:
    """Expect: 100-continue gets its 401 at once; with a good key it gets its 100."""
    async with (
        Backend(forever(Peer.request, ok(ANSWER))) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        for key, line in (("gw_wrong", b"HTTP/1.1 401"), (await house.key(), b"HTTP/1.1 100")):
            async with house.caller(key, b"", b"expect: 100-continue", b"content-length: 10") as caller:
                assert (await caller.head()).startswith(line)


async def test_an_endless_upload_with_a_bad_key_is_cut(store_url: str) -> None:
    """It is answered and closed; for a second, and 64 MiB at most, what comes is dropped, so that he can read why."""
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        async with house.caller("no", b"", b"content-length: 10000000000") as caller:
            sent, megabyte = 0, b" " * (1 << 20)
            with pytest.raises(ConnectionError):
                while sent < 1 << 30:
                    caller.writer.write(megabyte)
                    await caller.writer.drain()
                    sent += len(megabyte)
            assert sent < 128 << 20


async def test_who_is_refused_in_the_middle_of_an_upload_can_read_why(store_url: str) -> None:
    """A close would be a reset, which takes the answer back from those who read it late."""
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house, house.client("gw_wrong") as client:
        for _ in range(5):
            answer = await client.post("/v1/completions", content=b" " * (20 << 20))
            assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_a_body_over_the_cap_is_not_read_to_its_end(store_url: str) -> None:
    """Announced or in chunks: 413 in our own shape, and the connection is closed."""
    policy = documents(["http://127.0.0.1:9"], gateway={"max_body": "64KiB"})
    async with gateway(store_url, policy) as house:
        key = await house.key()
        for framing, body in ((b"content-length: 70000", b""), (b"transfer-encoding: chunked", chunk(b" " * 70_000))):
            async with house.caller(key, body, framing) as caller:
                head = await caller.head()
                error = json.loads(await caller.rest())["error"]
            assert head.startswith(b"HTTP/1.1 413")
            assert error["code"] == "request_too_large"


async def test_nothing_of_the_callers_own_connection_and_credentials_travels(store_url: str) -> None:
    """Its key, its cookies, what Connection names, what the SDK tells of itself and what no table names stay here."""
    fields = (
        b"x-api-key: %b",
        b"cookie: a=b",
        b"connection: keep-alive, x-client-request-id",
        b"x-client-request-id: 1",
        b"x-private: 1",
        b"x_session_affinity: s0",
        b"x-forwarded-for: 10.0.0.1",
        b"forwarded: for=10.0.0.1",
        b"te: trailers",
        b"x-stainless-lang: python",
        b"accept-encoding: gzip",
        b"x-session-affinity: s1",
        b"x-session-affinity: s2",
        b"accept: text/\xe9",
    )
    async with (
        Backend(forever(Peer.request, ok(ANSWER))) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        key = await house.key()
        async with house.caller(key, BODY, *(f.replace(b"%b", key.encode()) for f in fields)) as caller:
            await caller.head()
    (request,) = backend.requests
    names = [name for name, _ in request.headers]
    assert key.encode() not in request.head
    gone = {b"authorization", b"x-api-key", b"cookie", b"x-client-request-id", b"x-private", b"te", b"x-stainless-lang"}
    assert not (gone | {b"x_session_affinity", b"x-forwarded-for"}) & set(names)
    assert b"10.0.0.1" not in request.head
    assert [value for name, value in request.headers if name == b"x-session-affinity"] == [b"s1", b"s2"]
    assert dict(request.headers)[b"accept"] == b"text/\xe9"
    assert dict(request.headers)[b"accept-encoding"] == b"identity"
    assert dict(request.headers)[b"host"] == backend.url.removeprefix("http://").encode()
    assert request.line == b"POST /v1/completions HTTP/1.1"
    assert request.body == BODY


async def test_the_answers_headers_pass_as_they_came(store_url: str) -> None:
    """Duplicates and their order, bytes outside ASCII and a content-encoding stay; what belongs to the hop goes, and
    what a backend says of itself, or to the gateway as its own caller."""
    came = (
        b"x-note: 1",
        b"X-Thing: caf\xc3\xa9",
        b"x-note: 2",
        b"content-encoding: gzip",
        b"set-cookie: a=1",
        b"server: uvicorn",
        b"X-RateLimit-Remaining-Requests: 7",
        b"connection: keep-alive, x-hop",
        b"x-hop: 1",
        b"keep-alive: timeout=9",
        b"proxy-authenticate: Basic",
    )
    async with (
        Backend(forever(Peer.request, ok(ANSWER, *came))) as backend,
        gateway(store_url, documents([backend.url])) as house,
    ):
        async with house.caller(await house.key(), BODY) as caller:
            head = await caller.head()
    lines = head.split(b"\r\n")
    kept = [line for line in lines if line.lower().startswith((b"x-note", b"x-thing", b"content-encoding"))]
    assert [line.lower() for line in kept] == [field.lower() for field in came[:4]]
    gone = (b"x-hop", b"keep-alive", b"proxy-", b"connection", b"set-cookie", b"server", b"x-ratelimit-remaining-req")
    assert not [line for line in lines if line.lower().startswith(gone)]


async def test_a_backend_gets_its_own_credential(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "secret-of-the-backend")
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend:
        policy = documents([])
        policy["pools"] = {"demo": {"upstreams": [{"url": backend.url + "/inference", "key_env": "UPSTREAM_KEY"}]}}
        async with gateway(store_url, policy) as house, house.client(await house.key()) as client:
            assert (await client.post("/inference/v1/completions", content=BODY)).status_code == 200
    (request,) = backend.requests
    assert dict(request.headers)[b"authorization"] == b"Bearer secret-of-the-backend"
    assert request.line == b"POST /inference/v1/completions HTTP/1.1"


async def test_a_pool_that_is_full_says_so_at_once(store_url: str) -> None:
    go_on = asyncio.Event()
    async with Backend(Peer.request, EVENTS, chunk(FINISH), go_on, END) as backend:
        policy = documents([])
        policy["pools"] = {"demo": {"upstreams": [{"url": backend.url, "max_in_flight": 1}]}}
        async with gateway(store_url, policy) as house:
            key = await house.key()
            async with house.caller(key, STREAM) as first:
                await first.head()
                async with house.client(key) as client:
                    second = await client.post("/v1/completions", content=BODY)
                assert (second.status_code, second.json()["error"]["code"]) == (503, "upstreams_unavailable")
                assert second.headers["retry-after"] == "1"
                go_on.set()
                await first.reader.readuntil(END)


async def test_two_gateways_on_one_store_are_one(store_url: str) -> None:
    """A key that one makes opens the other, and a limit of five is five for both together."""
    limits = plan({"name": "five", "count": "requests", "quota": "5/day", "per": ["team"]})
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend:
        policy = documents([backend.url], plans=limits)
        async with gateway(store_url, policy) as one, gateway(store_url, policy) as two:
            key = await one.key()
            async with two.client(key) as client:
                async with asyncio.timeout(1):  # a key, or its revocation, is known everywhere within a second
                    while (await client.get("/v1/models")).status_code != 200:
                        await asyncio.sleep(0.01)

            async def ask(url: str) -> int:
                async with one.client(key) as client:
                    return (await client.post(f"{url}/v1/completions", content=BODY)).status_code

            answers = await asyncio.gather(*(ask(url) for url in (one.url, two.url) * 10))
    assert sorted(answers) == [200] * 5 + [429] * 15


async def test_models_lists_what_the_caller_may_use(store_url: str) -> None:
    policy = documents(["http://127.0.0.1:9"])
    policy["models"]["accounts/acme/models/small"] = {"pool": "demo"}
    policy["teams"]["support"]["models"] = ["accounts/acme/*"]
    seen = []
    async with gateway(store_url, policy) as house:
        for key in (
            await house.key(),
            await house.key("support"),
            await house.key(models=("accounts/fireworks/*",)),
        ):
            async with house.client(key) as client:
                seen.append([model["id"] for model in (await client.get("/v1/models")).json()["data"]])
    assert seen == [[MODEL, "accounts/acme/models/small"], ["accounts/acme/models/small"], [MODEL]]

"""Keys and prompts are planted wherever a caller, a backend or an operator can put them, and every output is searched.

Whatever is planted has `kolibri` in it, with the number of the place. What a caller is told of his own request is his.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis
import structlog

from gateway import admin, doctor, metrics, proxy, telemetry
from gateway.embedded import _server_binary
from gateway.identity import make_key
from gateway.reload import reload
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, forever, ok, play
from tests.proving.collector import Collector, collector
from tests.proving.house import MODEL, House, documents, gateway, served, server

ROOT = Path(__file__).parents[2]
FORGED = make_key("kolibri00abc", 2**255 + 777)  # a key of ours that nobody has made
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
STATUSES = (400, 401, 422, 429, 500, 503)
LIMITS = [{"name": "requests", "count": "requests", "rate": "600/minute", "per": ["team", "user"]}]
SECTIONS: dict[str, Any] = {
    "routes": {"/v1/files/*": {"pool": "demo", "methods": ["GET", "POST"]}},
    "plans": {"free": {"limits": LIMITS}},
}


class Plants:
    """Words that nothing else has in it, each with its own number."""

    def __init__(self) -> None:
        self._numbers = count()

    def prompt(self) -> str:
        return f"kolibri{next(self._numbers)}x"

    def key(self) -> str:
        return f"sk-proj-Kolibri{next(self._numbers)}x0123456789"

    def both(self) -> str:
        return f"{self.prompt()} {self.key()} Bearer {self.prompt()}-of-a-backend {FORGED}"


@pytest.fixture(params=["json", "people"])
def said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """What goes to standard output, with what libraries say when they are asked to say everything."""
    stream, root, before, configure = io.BytesIO(), logging.getLogger(), structlog.get_config(), structlog.configure
    handlers, level = root.handlers, root.level
    uncached = lambda **given: configure(**{**given, "cache_logger_on_first_use": False})  # noqa: E731
    monkeypatch.setattr(structlog, "configure", uncached)
    telemetry.set_up(request.param, stream)
    yield stream
    configure(**before)
    root.handlers = handlers
    root.setLevel(level)


# — what a backend says


def backend(plants: Plants) -> Step:
    """Answers in every way that it can fail, or be rude, one after the other; all of it is full of canaries."""
    numbers = count()

    async def answer(peer: Peer) -> None:
        await peer.request()
        told = plants.both().encode()
        error = b'{"error":{"message":"%b","type":"%b","code":"%b","param":"%b"}}' % ((told,) * 4)
        head = b"content-type: application/json\r\nx-echoed: %b\r\nset-cookie: %b\r\ncontent-length: %d\r\n\r\n"
        whole = b'{"id":"%b","model":"%b","choices":[{"text":"%b"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
        event = b'data: {"id":"c","choices":[{"index":0,"text":"%b"}]}\n\n' % told
        relayed = [
            b"HTTP/1.1 %d %b\r\n" % (status, told) + head % (told, told, len(error)) + error for status in STATUSES
        ]
        ways: list[tuple[Step, ...]] = [
            *((one,) for one in relayed),
            (b"HTTP/1.1 302 Found\r\nlocation: http://%b@x/%b\r\ncontent-length: 0\r\n\r\n" % (told[:8], told[:8]),),
            (told, Peer.close),
            (b"HTTP/1.1 200 OK\r\n%b: \x01\r\n\r\n" % told[:8],),
            (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n" + told[:50],
                Peer.reset,
            ),
            (EVENTS + chunk(event), Peer.reset),
            (EVENTS + chunk(event) + b"zz %b\r\n" % told, Peer.close),
            (EVENTS + chunk(event) + chunk(b"data: %b\n\n" % told) + chunk(b'data: {"error":"%b"}\n\n' % told) + END,),
            (ok(told),),
            (ok(whole % ((told,) * 3)),),
        ]
        await play(peer, *ways[next(numbers) % len(ways)])

    return answer


# — what a caller says


def requests(plants: Plants) -> Iterator[dict[str, Any]]:
    """Requests as httpx takes them; the ones that are understood come often enough for every answer of the backend."""
    plant, key = plants.both, plants.key
    good = {"model": MODEL, "prompt": "a", "max_tokens": 4}
    for number in range(16):
        yield {"json": {**good, "prompt": plant(), "user": plant(), "stream": number % 2 == 0}}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": plant()}], "user": plant()}
    yield {"url": "/v1/chat/completions", "json": chat}
    yield {"json": {**good, "prompt": [plant(), plant()], "stop": plant()[:60]}}
    for member in ("model", "max_tokens", "temperature", "stream", "n", "logit_bias", "user"):  # not what it should be
        yield {"json": {**good, member: plant()}}
        yield {"json": {**good, member: {plant(): plant()}}}
    yield {"json": {**good, plant(): plant()}}
    yield {"json": {**chat, "messages": [{"role": plant(), "content": [{"type": plant(), plant(): plant()}]}]}}
    for body in (
        b'{"prompt": "%b',
        b'["%b"]',
        b'"%b"',
        b"\xff%b",
        b'{"model":"x","prompt":"%b\xff"}',
        b"[" * 9000 + b"%b",
    ):
        yield {"content": body % plant().encode()}
    yield from with_headers(plants, good)
    for own in (key(), FORGED, f"Bearer {plants.prompt()}", plants.prompt()):
        yield {"json": good, "headers": {"authorization": f"Bearer {own}"}}
    yield {"url": f"/v1/completions?{plants.prompt()}={key()}", "json": good}
    for path in (
        "/v1/{}",
        "/v1/models/{}",
        "/{}/../%2e",
        "/v1/files/{}",
        "/v1/files/{}%2f",
        "/inference/v1/{}",
        "/docs?{}",
    ):
        yield {"method": "GET", "url": path.format(plants.prompt() + key())}
        yield {"url": path.format(plants.prompt() + key()), "json": good}
    yield {"method": plants.prompt().upper(), "json": good}
    yield {"url": f"/v1/limits?model={key()}&user={plants.prompt()}", "method": "GET"}
    form = {"model": plant(), "prompt": plant(), plants.prompt(): plant()}
    for fields in (form, {**form, "model": MODEL}):
        yield {
            "url": "/v1/images/edits",
            "data": fields,
            "files": {"image": (f"{plants.prompt()}.png", plant().encode())},
        }
        yield {"url": "/v1/audio/transcriptions", "data": fields, "files": {"file": (key(), plant().encode(), "a/b")}}
    yield {"url": "/v1/files/x", "content": plant().encode()}
    yield {"url": "/v1/messages", "json": {**chat, "max_tokens": 4, "system": plant()}}
    yield {"url": "/v1/embeddings", "json": {"model": MODEL, "input": plant()}}


def with_headers(plants: Plants, good: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A good request, with all that its headers may hold."""
    plant, key = plants.both, plants.key
    for name in ("authorization", "x-api-key", "cookie", "user-agent", "referer", "x-echo", "accept", "baggage", "via"):
        yield {"json": good, "headers": {name: plant()}}
    for name in ("traceparent", "tracestate", "forwarded", "x-forwarded-for", "content-type", "content-encoding"):
        yield {"json": good, "headers": {name: plant()}}
    for members in ({}, {"stream": True}, {"max_tokens": 4.5}):  # a trace that is one, of a caller who tells all in it
        state = {"traceparent": PARENT, "tracestate": f"a={plants.prompt()},b={key()}", "baggage": f"c={key()}"}
        yield {"json": {**good, **members}, "headers": state}
    for name in ("x-request-id", "x-stainless-retry-count", "x-session-affinity", "idempotency-key", plants.prompt()):
        yield {"json": good, "headers": {name: key()}}  # an id is a caller's to choose, and told; a key is masked


RAW = (
    b"%b\r\n\r\n",
    b"GET /%b\x00 HTTP/1.1\r\nhost: g\r\n\r\n",
    b"GET / HTTP/9.%b\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\nhost: g\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nexpect: %b\r\ncontent-length: 5\r\n\r\n%b",
    b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: %b\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer %b\r\ncontent-length: 99\r\n\r\n%b",
)


async def plant_all(house: House, key: str, plants: Plants) -> int:
    """Everything that a caller can say. Returns how many requests were answered."""
    answered = 0
    async with house.client(key) as client:
        for request in requests(plants):
            with suppress(httpx.RemoteProtocolError, httpx.ReadError, UnicodeEncodeError):
                await client.request(**{"method": "POST", "url": "/v1/completions", **request})
                answered += 1
    for raw in RAW:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        writer.write(raw.replace(b"%b", plants.key().encode()))
        writer.write_eof()
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
    return answered


# — what is searched


def counted(house: House) -> bytes:
    house.gateway.meters._look()
    house.gateway.meters._flush()
    return metrics._text(metrics._gather(house.settings.state / "metrics"))


def stored(store_url: str) -> bytes:
    """All keys and values of a store."""
    with redis.Redis.from_url(store_url) as client:
        readers: dict[bytes, Callable[[bytes], Any]] = {
            b"string": client.get,
            b"hash": client.hgetall,
            b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
            b"set": client.smembers,
            b"list": lambda key: client.lrange(key, 0, -1),
            b"stream": client.xrange,
        }
        return b"\n".join(repr((key, readers[client.type(key)](key))).encode() for key in client.scan_iter())


async def told_to_others(house: House, key: str) -> bytes:
    """Heads and bodies of what somebody else is told, errors mostly."""
    asked: list[dict[str, Any]] = [
        {"method": "GET", "url": url}
        for url in ("/v1/models", "/v1/limits", "/v1/models/none", "/none", "/healthz/ready", "/docs", "/openapi.json")
    ]
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    asked += [{"json": {**body, "model": "none"}}, {"json": {**body, "n": "x"}}, {"content": b"{"}, {"json": {}}]
    asked += [{"json": body, "headers": {"authorization": "Bearer none"}}]
    found = []
    async with house.client(key) as client:
        for one in asked:
            answer = await client.request(**{"method": "POST", "url": "/v1/completions", **one})
            found.append(repr(answer.headers.raw).encode() + answer.content)
    return b"\n".join(found)


async def commands(house: House, store_url: str) -> bytes:
    """What people see of the ledger, and of the keys."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GATEWAY_REDIS_URL": store_url}
    environment |= {"GATEWAY_KEY_PEPPER": "of the tests", "GATEWAY_STATE": str(house.settings.state)}

    def run(*words: str) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "gateway", *words], env=environment, capture_output=True, check=True, timeout=50
        )
        return done.stdout + done.stderr

    words = (("usage", "--by", "user,model"), ("keys", "list"))
    return b"\n".join(await asyncio.gather(*(asyncio.to_thread(run, *some) for some in words)))


async def reports(house: House, store_url: str) -> bytes:
    """What the control plane says."""
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(admin.opened(house.settings, store_url))
        url = await stack.enter_async_context(served(app))
        key = (house.settings.state / "admin_key").read_text().strip()
        head = {"authorization": f"Bearer {key}"}
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=head))
        paths = ("/admin/v1/usage?by=user", "/admin/v1/usage?by=key,model", "/admin/v1/exports", "/metrics")
        return b"\n".join([(await client.get(path)).content for path in paths])


@asynccontextmanager
async def traced(plants: Plants, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that wants to see passwords; whoever starts within sends it all its traces."""
    async with collector() as taken:
        address = taken.url.replace("//", f"//{plants.prompt()}:{plants.key()}@")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-key={plants.key()}")
        monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "gen_ai_latest_experimental")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100000")
        yield taken


def exported(taken: Collector) -> bytes:
    """What the collector was sent, as it was sent and as it reads that."""
    assert all(b"authorization" in sent and b"x-key" in sent for sent in taken.requests)
    return b"\n".join((*taken.bodies, repr((taken.resources, taken.spans)).encode()))


def left_in(folder: Path) -> bytes:
    """The files of the state folder, but for the policies, which are an operator's own."""
    files = [file for file in folder.rglob("*") if file.is_file() and "policies" not in file.parts]
    return b"\n".join(file.read_bytes() for file in files)


# — the test


@asynccontextmanager
async def planted(store_url: str, plants: Plants) -> AsyncIterator[House]:
    async with Backend(forever(backend(plants))) as rude:
        async with gateway(store_url, documents([rude.url], **SECTIONS)) as house:
            yield house


def search(outputs: Mapping[str, bytes], *keys: str) -> None:
    """Look for everything that was planted, and for these keys of ours."""
    for name, output in outputs.items():
        assert output, name
        found = re.search(rb".{0,200}kolibri\d+.{0,100}", output, re.IGNORECASE)
        assert found is None, (name, found)
        for key in keys:
            assert key[16:].encode() not in output, name


async def test_no_key_and_no_prompt_is_in_any_output(
    store_url: str, said: io.BytesIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    plants = Plants()
    async with traced(plants, monkeypatch) as taken:
        async with planted(store_url, plants) as house:
            key = await house.key(user="ann")
            other = await house.key("support")
            answered = await plant_all(house, key, plants)
            assert answered > 60

            def defect(principal: Any, request: Any, *rest: Any) -> None:
                """A mistake of ours, in the middle of what callers have said, with a key in its own words."""
                prompt = request.body
                raise ZeroDivisionError(f"{plants.key()} {key} {len(prompt)}")

            with monkeypatch.context() as patched:
                patched.setattr(proxy, "terms_for", defect)
                async with house.client(key) as client:
                    body = {"model": MODEL, "prompt": plants.both()}
                    assert (await client.post("/v1/completions", json=body)).status_code == 500

            wrong = documents([f"http://user:{plants.key()}@127.0.0.1:9"], **SECTIONS)
            wrong["teams"][plants.key()] = {"plan": plants.key(), "organisation": FORGED}
            house.documents(wrong)
            assert not await reload(house.gateway.live, house.settings.policies)
            for tell in (logging.getLogger("redis").error, logging.getLogger("uvicorn.error").error):
                tell("failed: %s", f"redis://user:{plants.prompt()}@host/{plants.key()} Bearer {plants.prompt()}")

            await house.settled()
            outputs = {
                "metrics": counted(house),
                "store": stored(store_url),
                "others": await told_to_others(house, other),
                "state": left_in(house.settings.state),
                "control plane": await reports(house, store_url),
            }
            if b"\x1b[" not in said.getvalue():
                outputs["commands"] = await commands(house, store_url)
        outputs["log"], outputs["traces"] = said.getvalue(), exported(taken)
    search(outputs, key, other, FORGED)
    assert outputs["log"].count(b"[masked]") >= 4
    assert b"ZeroDivisionError" in outputs["log"]
    assert b"gateway_requests_ended_total" in outputs["metrics"]
    assert outputs["store"].count(b"request_id") + outputs["store"].count(b'"id":"req_') > 10
    if "commands" in outputs:
        lines = [json.loads(line) for line in said.getvalue().splitlines()]
        assert "policies_refused" in {line["event"] for line in lines}
        exchanges = sorted(line["request_id"] for line in lines if line["event"] == "http_access")
        told = sorted(span.said["gateway.request.id"] for span in taken.spans if "gateway.request.id" in span.said)
        assert len(exchanges) > 60
        assert told == exchanges
        assert sum(span.trace == TRACE for span in taken.spans) > 6


@pytest.mark.parametrize("said", ["json"], indirect=True)
async def test_while_the_store_is_away_no_key_and_no_prompt_is_kept_nor_told(
    said: io.BytesIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plants = Plants()
    secret = plants.prompt()
    with server(_server_binary()) as store:
        with store.sync() as client:
            client.config_set("requirepass", secret)
        address = store.url.replace("unix://", f"unix://:{secret}@")
        async with traced(plants, monkeypatch) as taken:
            async with planted(address, plants) as house:
                key = await house.key(user="ann")
                outputs = {"with the store": await examined(house, address, capsys)}
                store.process.kill()
                answered = await plant_all(house, key, plants)
                assert answered > 60
                outputs |= {
                    "without": await examined(house, address, capsys),
                    "metrics": counted(house),
                    "spool": b"".join(file.read_bytes() for file in house.settings.spools.glob("*.spool")),
                    "state": left_in(house.settings.state),
                }
            outputs["log"], outputs["traces"] = said.getvalue(), exported(taken)
    search(outputs, key, FORGED)
    assert outputs["spool"].count(b"req_") > 10
    assert b"store_away" in outputs["log"]
    assert b"answers" in outputs["with the store"]
    assert b"refuses the connection" in outputs["without"]


async def examined(house: House, address: str, capsys: pytest.CaptureFixture[str]) -> bytes:
    """What the doctor says, to people and to programs."""
    findings = await doctor.examine(replace(house.settings, redis_url=address), deadline=3)
    assert {"traces", "store", "upstream.answer"} <= {one.check for one in findings}
    capsys.readouterr()
    doctor.show(findings)
    told = capsys.readouterr()
    return (told.out + told.err).encode() + msgspec.json.encode(findings)

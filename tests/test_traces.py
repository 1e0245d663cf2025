"""The spans of exchanges, as a collector gets them: real sockets, OpenAI's SDK, backends that fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import structlog
import typer

from gateway import metrics, telemetry, traces
from gateway.console import run_or_exit
from gateway.settings import SettingsError
from tests.proving.backend import EVENTS, Backend, Peer, Step, chunk, completion, forever, ok, token
from tests.proving.collector import Collector, Taken, collector
from tests.proving.commands import Place
from tests.proving.house import MODEL, House, documents, gateway
from tests.proving.ports import free_port

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
SERVER, CLIENT = 2, 3
CHAT = json.dumps(
    {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "answer-canary"}, "finish_reason": "stop"}
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 4,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 5},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
    }
).encode()


IDLE = documents(["http://127.0.0.1:9"])  # policies whose upstream nobody asks


def always(*steps: Step) -> Step:
    return forever(Peer.request, *steps)


def broken(status: int) -> Step:
    return always(b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status)


def traceparents(backend: Backend) -> list[list[str]]:
    """What a backend was told of the trace: version, trace, span and flags."""
    return [dict(request.headers)[b"traceparent"].decode().split("-") for request in backend.requests]


@pytest.fixture
async def taken(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that the gateways of a test send to."""
    async with collector() as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", taken.url)
        yield taken


@asynccontextmanager
async def opened(store_url: str, policies: Mapping[str, Any]) -> AsyncIterator[tuple[House, openai.AsyncOpenAI]]:
    """A gateway, and OpenAI's client of it. When it is left, the collector has every span."""
    async with gateway(store_url, policies) as house:
        key = await house.key(user="user-canary")
        async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=key, max_retries=0) as client:
            yield house, client


def within(inner: Taken, outer: Taken) -> bool:
    return outer.began <= inner.began <= inner.ended <= outer.ended


# — what is told


async def test_a_stream_that_another_upstream_answers_is_a_trace_whose_spans_travel(
    taken: Collector, store_url: str
) -> None:
    async with Backend(broken(503)) as bad, Backend(forever(completion(3))) as good:
        policies = documents([bad.url, good.url], models={MODEL: {"pool": "demo"}})
        policies["pools"]["demo"] |= {"balance": "round_robin"}
        async with opened(store_url, policies) as (_, client):
            stream = await client.completions.create(model=MODEL, prompt="Hi", stream=True, extra_headers=PARENT)
            assert "".join([event.choices[0].text async for event in stream]) == " word word word"
    assert taken.tree() == [
        "POST /v1/completions",
        "  admit",
        f"  text_completion {MODEL} !",
        f"  text_completion {MODEL}",
        "    connect",
        "    first byte",
        "    stream",
    ]
    whole = taken.one("POST /v1/completions")
    first, second = sorted(taken.named(f"text_completion {MODEL}"), key=lambda span: span.began)
    assert {span.trace for span in taken.spans} == {TRACE}
    assert (whole.kind, whole.parent, whole.flags, first.flags) == (SERVER, SPAN, 0x301, 0x101)
    assert (first.kind, first.parent, second.parent) == (CLIENT, whole.id, whole.id)
    assert traceparents(bad) == [["00", TRACE, first.id, "01"]]
    assert traceparents(good) == [["00", TRACE, second.id, "01"]]
    assert (first.said["error.type"], first.said["server.port"]) == ("503", bad.port)
    assert (first.said["http.response.status_code"], second.said["http.response.status_code"]) == (503, 200)
    assert (second.said["http.request.resend_count"], second.said["server.port"]) == (1, good.port)
    assert "http.request.resend_count" not in first.said
    assert len({span.id for span in taken.spans}) == 7
    parents = {span.id: span for span in taken.spans}
    assert all(within(span, parents[span.parent]) for span in taken.spans if span is not whole)
    assert first.ended <= second.began
    assert abs(whole.ended / 1e9 - time.time()) < 30


@pytest.mark.parametrize(
    ("version", "provider", "also"),
    [
        ("", "gen_ai.system", set[str]()),
        (
            "http, gen_ai_latest_experimental",
            "gen_ai.provider.name",
            {"gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.reasoning.output_tokens"},
        ),
    ],
)
async def test_an_answer_has_its_numbers_and_sizes_in_the_names_of_the_version_that_is_asked_for(
    taken: Collector,
    store_url: str,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    provider: str,
    also: set[str],
) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", version)
    async with Backend(always(ok(CHAT))) as backend:
        async with opened(store_url, documents([backend.url])) as (_, client):
            for _ in range(2):
                await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": "Hi"}],
                    max_completion_tokens=7,
                    temperature=0.5,
                    seed=3,
                    n=2,
                )
    first, said = (span.said for span in taken.named(f"chat {MODEL}"))
    assert (
        said.keys()
        == first.keys()
        == also
        | {provider, "server.address", "server.port", "gateway.pool"}
        | {
            *(
                "gen_ai.operation.name",
                "gen_ai.request.model",
                "gen_ai.request.max_tokens",
                "gen_ai.request.temperature",
            ),
            *("gen_ai.request.seed", "gen_ai.request.choice.count", "gen_ai.response.model"),
            *("gen_ai.response.finish_reasons", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"),
            *("gateway.usage.source", "http.response.status_code"),
        }
    )
    expected = {
        provider: "fireworks",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 4,
    }
    if also:
        expected |= {"gen_ai.usage.cache_read.input_tokens": 5, "gen_ai.usage.reasoning.output_tokens": 2}
    assert said == said | expected
    assert len(taken.named("connect")) == 1, "the second one found a connection"
    whole = taken.named("POST /v1/chat/completions")[0].said
    assert whole == whole | {
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "http.response.body.size": len(CHAT),
        "http.request.body.size": len(backend.requests[0].body) + len("completion_"),  # as the caller wrote it
        "gateway.team": "research",
        "gateway.ended": "complete",
        "gateway.cost_usd": pytest.approx((9 * 1.0 + 4 * 2.0) / 1e6),
    }


async def test_a_number_that_no_attribute_holds_is_left_out_and_harms_nobody(taken: Collector, store_url: str) -> None:
    async with Backend(always(ok(CHAT))) as backend:
        async with opened(store_url, documents([backend.url])) as (house, client):
            given = {"model": MODEL, "prompt": "Hi", "top_k": 3, "temperature": 1, "seed": 2**70}
            async with house.client(client.api_key) as raw:
                for _ in range(2):  # on one connection
                    assert (await raw.post("/v1/completions", json=given)).status_code == 200
                assert len({peer.number for peer in backend.peers}) == 1
    first, second = (span.said for span in taken.named(f"text_completion {MODEL}"))
    assert {name: second[name] for name in second if name.startswith("gen_ai.request")} == {
        "gen_ai.request.model": MODEL,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_k": 3.0,
    }
    assert first.keys() == second.keys()
    assert type(second["gen_ai.request.top_k"]) is float


async def test_what_looks_like_a_key_is_masked_in_a_model_that_a_caller_names(taken: Collector, store_url: str) -> None:
    async with Backend(always(ok(CHAT))) as backend:
        policies = documents([backend.url], models={"any/*": {"pool": "demo"}})
        async with opened(store_url, policies) as (_, client):
            await client.completions.create(model="any/sk-proj-canary0123456789", prompt="Hi")
            await client.completions.create(model="any/one", prompt="Hi")
    names = [span.said["gen_ai.request.model"] for span in taken.spans if span.kind == CLIENT]
    assert names == ["any/[masked]", "any/one"]
    assert taken.one("text_completion any/[masked]").said["gen_ai.response.model"] == "any/[masked]"
    assert b"canary" not in b"".join(taken.bodies)


async def test_a_refusal_is_a_trace_without_an_attempt_and_no_failure_of_ours(taken: Collector, store_url: str) -> None:
    limit = {"name": "few", "count": "requests", "rate": "1/hour", "burst": 1, "per": ["team"]}
    async with Backend(always(ok(CHAT))) as backend:
        policies = documents([backend.url], plans={"free": {"limits": [limit]}})
        async with opened(store_url, policies) as (house, client):
            messages: Any = [{"role": "user", "content": "Hi"}]
            await client.chat.completions.create(model=MODEL, messages=messages)
            taken.spans.clear()
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model=MODEL, messages=messages, extra_headers=PARENT)
            async with house.client("gw_nobody") as nobody:
                told = await nobody.post("/v1/completions", headers=PARENT, json={})
            assert told.status_code == 401
    refused, unknown = [span for span in taken.spans if span.trace == TRACE and span.kind == SERVER]
    assert [span.name for span in taken.spans if span.parent == refused.id] == []
    assert (refused.parent, unknown.parent) == (SPAN, SPAN)
    assert refused.said["gateway.limits.refused"] == ["few"]
    assert (refused.said["http.response.status_code"], refused.failed) == (429, False)
    assert (unknown.said["error.type"], unknown.failed, unknown.name) == (
        "invalid_api_key",
        False,
        "POST /v1/completions",
    )


async def test_a_caller_who_leaves_ends_the_spans_and_is_nobodys_failure(taken: Collector, store_url: str) -> None:
    async with Backend(Peer.request, EVENTS, chunk(token())) as midway, Backend(Peer.request) as silent:
        models = {"midway": {"pool": "midway"}, "silent": {"pool": "silent"}}
        pools = {"midway": {"upstreams": [{"url": midway.url}]}, "silent": {"upstreams": [{"url": silent.url}]}}
        async with opened(store_url, documents([], models=models, pools=pools)) as (house, client):
            stream = await client.completions.create(model="midway", prompt="Hi", stream=True)
            await anext(aiter(stream))
            await stream.close()
            asked = asyncio.ensure_future(client.completions.create(model="silent", prompt="Hi"))
            while not silent.requests:
                await asyncio.sleep(0.005)
            asked.cancel()
            with suppress(asyncio.CancelledError):
                await asked
            await silent.peers[0].gone.wait()
            await midway.peers[0].gone.wait()
            await house.settled()
    assert [span.name for span in taken.spans if span.failed] == []
    assert taken.one("stream").parent == taken.one("text_completion midway").id
    left = taken.one("text_completion silent")
    assert traceparents(silent)[0][2] == left.id
    assert [span.name for span in taken.spans if span.parent == left.id] == []
    begun, unanswered = taken.named("POST /v1/completions")
    assert (begun.said["gateway.ended"], unanswered.said["gateway.ended"]) == ("client", "client")
    assert begun.said["http.response.status_code"] == 200
    assert "http.response.status_code" not in unanswered.said, "nobody was told one"


async def test_failures_of_backends_are_failures_of_their_spans(taken: Collector, store_url: str) -> None:
    async with Backend(Peer.request, EVENTS, chunk(token()), Peer.reset) as cut:
        nobody = f"http://127.0.0.1:{free_port()}"
        models = {"cut": {"pool": "cut"}, "none": {"pool": "none"}}
        pools = {"cut": {"upstreams": [{"url": cut.url}]}, "none": {"upstreams": [{"url": nobody}]}}
        async with opened(store_url, documents([], models=models, pools=pools)) as (_, client):
            with pytest.raises(openai.APIError):
                async for _ in await client.completions.create(model="cut", prompt="Hi", stream=True):
                    pass
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(model="none", prompt="Hi")
    assert taken.tree() == [
        "POST /v1/completions !",
        "  admit",
        "  text_completion cut !",
        "    connect",
        "    first byte",
        "    stream",
        "POST /v1/completions !",
        "  admit",
        "  text_completion none !",
        "    connect !",
    ]
    failures = {span.name: span.said["error.type"] for span in taken.spans if span.failed and span.kind == CLIENT}
    assert failures == {
        "text_completion cut": "upstream_disconnected",
        "text_completion none": "upstream_connect_failed",
    }


async def test_a_port_that_no_address_names_is_told(taken: Collector, store_url: str) -> None:
    pools = {scheme: {"upstreams": [{"url": f"{scheme}://127.0.0.77"}]} for scheme in ("http", "https")}
    policies = documents([], models={scheme: {"pool": scheme} for scheme in pools}, pools=pools)
    async with opened(store_url, policies) as (_, client):
        for model in pools:
            with suppress(openai.InternalServerError):
                await client.completions.create(model=model, prompt="Hi")
    asked = [span.said for span in taken.spans if span.kind == CLIENT]
    assert [(said["server.address"], said["server.port"]) for said in asked] == [
        ("127.0.0.77", 80),
        ("127.0.0.77", 443),
    ]


async def test_no_word_of_a_request_or_an_answer_nor_a_key_nor_a_user_is_told(taken: Collector, store_url: str) -> None:
    async with Backend(always(ok(CHAT.replace(b'"stop"', b'"reason_canary"')))) as backend:
        async with opened(store_url, documents([backend.url])) as (house, client):
            given: dict[str, Any] = {
                "model": MODEL,
                "messages": [{"role": "user", "content": "prompt-canary"}],
                "user": "user-canary",
                "stop": ["stop-canary"],
                "metadata": {"a": "metadata-canary"},
            }
            canary = {"x-request-id": "id-canary", "x-session-affinity": "session-canary", "user-agent": "agent-canary"}
            await client.chat.completions.create(**given, extra_headers=canary, extra_query={"q": "query-canary"})
            with suppress(openai.APIStatusError):
                await client.chat.completions.create(**{**given, "model": "model-canary"})
            with suppress(openai.APIStatusError):
                await client.chat.completions.create(**given, extra_body={"field-canary": 1})
            key = client.api_key
            async with house.client(key) as raw:
                await raw.post("/v1/completions", content=b"{broken-canary")
    assert len(taken.named("POST /v1/chat/completions")) == 3
    told = b"".join(taken.bodies)
    assert b"canary" not in told
    assert key.encode() not in told
    assert b"gw_" not in told


# — which are told


@pytest.mark.parametrize(
    ("sampler", "flags", "given", "spans"),
    [("always_off", "00", "01", 0), ("always_on", "01", "00", 6), ("parentbased_always_on", "02", "02", 0)],
)
async def test_backends_are_told_whether_the_trace_is_recorded(
    taken: Collector,
    store_url: str,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    flags: str,
    given: str,
    spans: int,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    async with Backend(forever(completion(1))) as backend:
        async with opened(store_url, documents([backend.url])) as (_, client):
            parent = {"traceparent": f"00-{TRACE}-{SPAN}-{given}"}
            async for _ in await client.completions.create(model=MODEL, prompt="a", stream=True, extra_headers=parent):
                pass
    assert [(trace, told) for _, trace, _, told in traceparents(backend)] == [(TRACE, flags)]
    assert len(taken.spans) == spans


async def test_a_trace_of_ours_has_a_random_id_no_parent_and_its_first_chunk_timed(
    taken: Collector, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "gen_ai_latest_experimental")
    async with Backend(forever(completion(1))) as backend:
        async with opened(store_url, documents([backend.url])) as (house, client):
            async for _ in await client.completions.create(model=MODEL, prompt="a", stream=True):
                pass
            async with house.client("gw_nobody") as nobody:
                await nobody.post("/v1/completions", json={})
    answered, refused = taken.named("POST /v1/completions")
    asked = taken.one(f"text_completion {MODEL}")
    assert [(trace, flags) for _, trace, _, flags in traceparents(backend)] == [(answered.trace, "03")]
    assert (answered.parent, answered.flags, asked.flags) == ("", 0x103, 0x103)
    assert (refused.parent, refused.flags) == ("", 0x103)
    assert 0 < asked.said["gen_ai.response.time_to_first_chunk"] < 30
    assert asked.said["gen_ai.request.stream"] is True


async def test_without_the_variables_nothing_is_made(store_url: str) -> None:
    async with gateway(store_url, IDLE) as house:
        assert house.gateway.traces is None


def test_without_the_variables_no_library_is_imported() -> None:
    code = "import sys, gateway.app; print({'google', 'opentelemetry.proto', 'gateway.traces'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# — how they get there


async def _ask(house: House) -> None:
    async with house.client() as nobody:
        assert (await nobody.post("/v1/completions", json={})).status_code == 401


async def test_they_travel_as_it_was_asked(taken: Collector, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-api-key=of%20the%20collector",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_SERVICE_NAME": "front",
    }.items():
        monkeypatch.setenv(name, value)
    async with gateway(store_url, IDLE) as house:
        for _ in range(3):
            await _ask(house)
    assert len(taken.named("POST /v1/completions")) == 3
    (sent,), (resource,) = taken.requests, taken.resources
    assert (sent[b":path"], sent[b"x-api-key"]) == (b"/v1/traces", b"of the collector")
    assert (sent[b"content-type"], sent[b"content-encoding"]) == (b"application/x-protobuf", b"gzip")
    assert resource["service.name"] == "front"


async def test_a_full_batch_is_sent_at_once_and_the_rest_when_its_time_has_come(
    taken: Collector, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    async with gateway(store_url, IDLE) as house:
        await _ask(house)
        await _ask(house)
        await asyncio.wait_for(taken.asked.wait(), 10)
        await _ask(house)
        assert len(taken.requests) == 1
    assert (len(taken.requests), len(taken.spans)) == (2, 3)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    taken.asked.clear()
    async with gateway(store_url, IDLE) as house:
        await _ask(house)
        await asyncio.wait_for(taken.asked.wait(), 10)


@pytest.mark.parametrize(
    ("answers", "refuses", "requests", "lost"),
    [
        ([503, 429], 0, 3, {}),
        ([400], 0, 1, {"refused": 1}),
        ([], 1, 1, {"refused": 1}),
        ([], 7, 1, {"refused": 1}),
        ([202], 0, 1, {}),
    ],
    ids=["away", "refused", "some refused", "more refused than there were", "taken for later"],
)
async def test_a_batch_is_sent_again_where_that_may_help_and_counted_where_it_is_lost(
    taken: Collector,
    store_url: str,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[int],
    refuses: int,
    requests: int,
    lost: dict[str, int],
) -> None:
    monkeypatch.setattr(traces, "_BACK_OFF", 0.01)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    taken.answers, taken.refuses = answers, refuses
    async with gateway(store_url, IDLE) as house:
        await _ask(house)
        await _sent(house, taken, requests)
        found = _losses(house)
    assert len(taken.requests) == requests
    assert found == {"queue_full": 0, "unavailable": 0, "refused": 0, "ended": 0, **lost}


async def _sent(house: House, taken: Collector, requests: int) -> None:
    """Until the collector has had so many requests, and nothing waits."""
    while len(taken.requests) < requests or "<Traces 0 spans waiting" not in repr(house.gateway.traces):
        await asyncio.sleep(0.005)


def _losses(house: House) -> dict[str, float]:
    """The spans that were lost, as the metrics tell them."""
    house.gateway.meters._look()
    house.gateway.meters._flush()
    told = {family.name: family.samples for family in metrics._gather(house.settings.state / "metrics")}
    return {sample.labels["reason"]: sample.value for sample in told["gateway_trace_spans_lost"]}


@pytest.mark.parametrize(("timeout", "lost"), [("10000", 0), ("200", 1)], ids=["in time", "too late for this one"])
async def test_a_collector_that_says_when_is_not_asked_before(
    taken: Collector, store_url: str, monkeypatch: pytest.MonkeyPatch, timeout: str, lost: int
) -> None:
    monkeypatch.setattr(traces, "_BACK_OFF", 0.01)
    monkeypatch.setattr(traces, "_LONGEST", 0.4)  # it wants more than one waits at most
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", timeout)
    taken.answers, taken.later = [429], 60
    async with gateway(store_url, IDLE) as house:
        await _ask(house)
        await asyncio.wait_for(taken.asked.wait(), 10)
        await _ask(house)
        await _sent(house, taken, 3 - lost)
        assert _losses(house)["unavailable"] == lost
    first, second, *_ = taken.times
    assert second - first >= 0.4
    assert len(taken.spans) == 2 - lost


async def test_what_is_lost_at_the_end_is_counted_too(
    taken: Collector, store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(traces, "PATIENCE", 0.3)
    taken.hangs = True
    async with gateway(store_url, IDLE, state=tmp_path) as house:
        await _ask(house)
    told = {family.name: family.samples for family in metrics._gather(house.settings.state / "metrics")}
    lost = {sample.labels["reason"]: sample.value for sample in told["gateway_trace_spans_lost"]}
    assert lost == {"queue_full": 0, "unavailable": 0, "refused": 0, "ended": 1}


async def test_a_collector_that_hangs_holds_neither_a_request_nor_the_end(
    taken: Collector, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "PATIENCE", 0.3)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "5")
    taken.hangs = True
    with structlog.testing.capture_logs() as lines:
        async with gateway(store_url, IDLE) as house:
            await _ask(house)
            await _ask(house)
            await asyncio.wait_for(taken.asked.wait(), 10)
            for _ in range(6):
                await _ask(house)
            ours = house.gateway.traces
            assert ours is not None
            assert repr(ours) == "<Traces 5 spans waiting, 3 lost>"
            began = time.monotonic()
            await ours.aclose()
            assert time.monotonic() - began < traces.PATIENCE + 1
            assert {loss: spans for loss, spans in ours.losses.items() if spans} == {"queue_full": 3, "ended": 5}
    told = [line for line in lines if line["event"] == "traces_lost"]
    assert [(line["spans"], line["reason"]) for line in told] == [(1, "the queue is full")], (
        "and then for a minute none"
    )


def test_what_is_part_of_a_library_that_is_not_there_is_not_there() -> None:
    assert [telemetry._installed(name) for name in ("gateway.traces", "gateway.none", "none.at.all")] == [
        True,
        False,
        False,
    ]


def test_a_missing_library_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gateway.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.trace.v1.trace_pb2", None)
    with pytest.raises(SettingsError, match="install the extra `traces` of this package, or set OTEL_TRACES_EXPORTER"):
        telemetry.traces({"OTEL_TRACES_EXPORTER": "otlp"})


def test_it_is_told_before_anything_is_started(tmp_path: Path) -> None:
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c:1", "OTEL_EXPORTER_OTLP_CERTIFICATE": "none.pem"}
    done = Place(tmp_path).run("serve", **asked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gateway: OTEL_EXPORTER_OTLP_CERTIFICATE or its kin: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".gateway").exists()


def test_a_gateway_does_not_start_with_variables_that_it_does_not_understand(
    store_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def start() -> None:
        async with gateway(store_url, IDLE):
            pass

    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(typer.Exit) as ended:
        run_or_exit(start(), asyncio.run)
    assert (ended.value.exit_code, capsys.readouterr().err) == (
        2,
        'gateway: OTEL_TRACES_EXPORTER is "zipkin", expected otlp or none\n',
    )

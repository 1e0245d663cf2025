"""What the data plane tells Prometheus: every name with its labels, and nothing by which callers could fill it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway import __version__, meters, metrics
from gateway.embedded import _server_binary
from gateway.records import ledger_stream
from gateway.reload import reload
from tests.proving import house as proving
from tests.proving.backend import DONE, END, EVENTS, Backend, Peer, chunk, completion, forever, ok, token
from tests.proving.house import MODEL, House, documents, echo, gateway
from tests.proving.ports import free_port

README = (Path(__file__).parents[1] / "README.md").read_text()
ANSWER = b'{"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}'
Samples = dict[tuple[str, ...], float]

PRICE = {"input": 1.0, "cached_input": 0.5, "output": 2.0}
PLANS = {
    "free": {"limits": [{"name": "per-team", "count": "requests", "rate": "60/hour", "burst": 3, "per": ["team"]}]}
}


def told(house: House) -> Samples:
    """What is told now, each name with the values of its labels as they stand in the names' order."""
    house.gateway.meters._look()
    house.gateway.meters._flush()
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in metrics._gather(house.settings.state / "metrics")
        for sample in family.samples
    }


def of(samples: Samples, name: str) -> Samples:
    """Those of one name, by their labels."""
    return {tuple(labels): value for (found, *labels), value in samples.items() if found == name}


@asynccontextmanager
async def served(store_url: str, **sections: Any) -> AsyncIterator[tuple[House, str]]:
    async with echo() as backend, gateway(store_url, documents([backend], **sections)) as house:
        yield house, await house.key()


async def ask(house: House, key: str | None, script: str = "", **members: Any) -> int:
    body = {"model": MODEL, "prompt": "my canary sings", "max_tokens": 5, **members}
    async with house.client(key) as client:  # to make a TLS context takes longer than to ask
        try:
            return (await client.post("/v1/completions", json=body, headers={"x-echo": script})).status_code
        except httpx.RemoteProtocolError:
            return 0


async def test_every_number_has_its_name_and_labels(store_url: str) -> None:
    models = {MODEL: {"pool": "demo", "price": PRICE}}
    async with served(store_url, models=models, plans=PLANS) as (house, key):
        upstream = house.gateway.live.policies.pools["demo"].upstreams[0].name
        assert await ask(house, key, "cached=2") == 200
        assert await ask(house, key, "pace=0.01", stream=True) == 200
        assert await ask(house, key, "status=503") == 503
        assert await ask(house, key, "cut=2", stream=True) == 0
        assert await ask(house, key) == 429
        assert await ask(house, None) == 401
        async with house.client(key) as client:
            assert (await client.get("/v1/completions")).status_code == 405
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.get("/v1/models/llama")).status_code == 404
            assert (await client.get("/healthz/live")).status_code == 200
        await house.settled()
        found = told(house)
        revision = house.gateway.live.policies.snapshot.revision
    route = "/v1/completions"
    assert of(found, "gateway_http_requests_total") == {
        ("POST", route, "200"): 3,
        ("POST", route, "503"): 1,
        ("POST", route, "429"): 1,
        ("POST", route, "401"): 1,
        ("GET", route, "405"): 1,
        ("GET", "/v1/models", "200"): 1,
        ("GET", "/v1/models/{name}", "404"): 1,
        ("GET", "/healthz/live", "200"): 1,
    }
    assert of(found, "gateway_http_request_duration_seconds_count")[(route,)] == 7
    assert of(found, "gateway_requests_ended_total") == {("complete",): 3, ("upstream",): 1, ("refused",): 2}
    assert of(found, "gateway_refusals_total") == {
        ("rate_limit_exceeded", "per-team"): 1,
        ("invalid_request_error", ""): 1,
        ("upstream_disconnected", ""): 1,
        ("method_not_allowed", ""): 1,
    }
    assert of(found, "gateway_tokens_total") == {
        (MODEL, "research", "input"): 1 + 3 + 4,
        (MODEL, "research", "cached"): 2,
        (MODEL, "research", "output"): 12,
    }
    assert of(found, "gateway_time_to_first_byte_seconds_count") == {(MODEL,): 4}
    assert of(found, "gateway_time_per_output_token_seconds_count") == {(MODEL,): 2}
    assert of(found, "gateway_overhead_seconds_count") == {(): 4}
    assert of(found, "gateway_upstream_attempts_total") == {
        ("demo", "answered", upstream): 3,
        ("demo", "failed", upstream): 1,
        ("demo", "cut", upstream): 1,
    }
    assert of(found, "gateway_store_call_seconds_count")[("admit",)] >= 5
    assert set(of(found, "gateway_store_call_seconds_count")) >= {("admit",), ("settle",)}
    plain = {
        ("gateway_http_active_requests",): 0,
        ("gateway_upstream_up", "demo", upstream): 1,
        ("gateway_upstream_in_flight", "demo", upstream): 0,
        ("gateway_store_up",): 1,
        ("gateway_store_losses_total",): 0,
        ("gateway_spool_takes",): 1,
        ("gateway_policies_info", revision): 1,
        ("gateway_policies_last_reload_successful",): 1,
        ("gateway_log_lines_dropped_total",): 0,
        ("gateway_build_info", __version__): 1,
    }
    assert {name: found.get(name) for name in plain} == plain
    names = {re.sub(r"_(bucket|sum|count)$", "", name[0]) for name in found}
    section = README.partition("### Figures")[2].partition("What is in the store")[0]
    assert names == set(re.findall(r"`(gateway_\w+)`", section))


async def test_tokens_and_cost_are_those_of_the_ledger(store_url: str) -> None:
    models = {MODEL: {"pool": "demo", "price": PRICE}}
    async with served(store_url, models=models) as (house, key):
        for number in range(1, 6):
            assert await ask(house, key, f"cached={number % 3}", max_tokens=number, stream=number % 2 == 0) == 200
        await house.settled()
        stream = await house.gateway.store.client.xrange(ledger_stream("acme"))
        found = told(house)
    ledger = [json.loads(fields[b"row"]) for _, fields in stream]
    assert len(ledger) == 5
    tokens = of(found, "gateway_tokens_total")
    assert tokens[(MODEL, "research", "cached")] == sum(row["cached_tokens"] for row in ledger) == 6
    assert tokens[(MODEL, "research", "input")] + 6 == sum(row["input_tokens"] for row in ledger)
    assert tokens[(MODEL, "research", "output")] == sum(row["output_tokens"] for row in ledger) == 15
    cost = of(found, "gateway_cost_usd_total")[(MODEL, "research")]
    assert cost == pytest.approx(sum(row["cost_microusd"] for row in ledger) / 1e6)
    assert cost > 0


async def test_the_time_of_a_body_that_comes_slowly_is_none_of_the_gateways(store_url: str) -> None:
    async with served(store_url) as (house, key):
        body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 2}).encode()
        async with house.caller(key, body[:10], b"content-length: %d" % len(body)) as caller:
            await asyncio.sleep(0.5)
            caller.writer.write(body[10:])
            assert (await caller.head()).startswith(b"HTTP/1.1 200 ")
        await house.settled()
        found = told(house)
    assert of(found, "gateway_overhead_seconds_count") == {(): 1}
    took = of(found, "gateway_http_request_duration_seconds_sum")[("/v1/completions",)]
    assert took > 0.4
    assert of(found, "gateway_overhead_seconds_sum")[()] < took - 0.4


async def test_what_is_under_way_is_told_while_it_is(store_url: str) -> None:
    more = asyncio.Event()
    steps = (Peer.request, EVENTS + chunk(token()), more, chunk(token()) + chunk(DONE) + END)
    async with Backend(*steps) as backend, gateway(store_url, documents([backend.url])) as house:
        upstream = house.gateway.live.policies.pools["demo"].upstreams[0].name
        body = json.dumps({"model": MODEL, "prompt": "a", "stream": True}).encode()
        async with house.caller(await house.key(), body) as caller:
            await caller.head()
            during = told(house)
            more.set()
            await caller.reader.readuntil(b"0\r\n\r\n")
            await house.settled()
            after = told(house)
    for name in (("gateway_http_active_requests",), ("gateway_upstream_in_flight", "demo", upstream)):
        assert (during[name], after[name]) == (1, 0)


async def test_g11_an_event_loop_that_is_blocked_for_a_second_shows(store_url: str) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        await asyncio.sleep(0.15)
        time.sleep(1)  # noqa: ASYNC251 - the fault that is to be seen
        await asyncio.sleep(0.15)
        found = told(house)
    buckets = of(found, "gateway_event_loop_lag_seconds_bucket")
    assert buckets[("+Inf",)] - buckets[("0.5",)] >= 1
    assert buckets[("+Inf",)] >= 2


async def test_an_upstream_that_is_out_is_not_up(store_url: str) -> None:
    async with Backend(forever(completion(1))) as backend:
        gone = f"127.0.0.1:{free_port()}"
        policies = documents([backend.url, f"http://{gone}"])
        policies["pools"]["demo"]["balance"] = "round_robin"
        async with gateway(store_url, policies) as house:
            key = await house.key()
            async with asyncio.timeout(20):
                while not house.gateway.live.policies.pools["demo"].upstreams[1].health.out:
                    await ask(house, key, stream=True)
            found = told(house)
    up, attempts = of(found, "gateway_upstream_up"), of(found, "gateway_upstream_attempts_total")
    assert up == {("demo", backend.url.removeprefix("http://")): 1, ("demo", gone): 0}
    assert attempts[("demo", "unreachable", gone)] >= 1
    assert attempts[("demo", "answered", backend.url.removeprefix("http://"))] >= 1


async def test_a_store_that_is_lost_is_told_and_its_calls_are_timed(tmp_path: Path) -> None:
    with proving.server(_server_binary()) as server:
        async with echo() as backend, gateway(server.url, documents([backend])) as house:
            key = await house.key()
            assert await ask(house, key) == 200
            server.process.kill()
            assert await ask(house, key) == 200
            found = told(house)
    assert (found[("gateway_store_up",)], found[("gateway_store_losses_total",)]) == (0, 1)
    assert of(found, "gateway_store_call_seconds_count")[("admit",)] >= 1


# — policies change


async def test_a_team_that_leaves_takes_no_count_with_it_and_reloads_are_told(store_url: str) -> None:
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        assert await ask(house, await house.key()) == 200
        before = told(house)
        left = documents([backend])
        del left["teams"]["research"]
        house.documents(left)
        assert await reload(house.gateway.live, house.settings.policies)
        assert await ask(house, await house.key("support")) == 200
        after = told(house)
        house.documents({"models": 5})
        assert not await reload(house.gateway.live, house.settings.policies)
        refused = told(house)
    for team in ("research", "support"):
        assert of(after, "gateway_tokens_total")[(MODEL, team, "output")] == 5
    (old,), (new,) = of(before, "gateway_policies_info"), of(after, "gateway_policies_info")
    assert old != new
    assert of(refused, "gateway_policies_info") == {new: 1}
    assert sum(of(after, "gateway_upstream_attempts_total").values()) == 2
    told_of = [
        (of(found, "gateway_policies_reloads_total"), found[("gateway_policies_last_reload_successful",)])
        for found in (before, after, refused)
    ]
    assert told_of == [
        ({("taken",): 0, ("refused",): 0}, 1),
        ({("taken",): 1, ("refused",): 0}, 1),
        ({("taken",): 1, ("refused",): 1}, 0),
    ]


async def test_an_upstream_that_leaves_the_policies_leaves_the_gauges(store_url: str) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9", "http://127.0.0.1:10"])) as house:
        assert len(of(told(house), "gateway_upstream_up")) == 2
        house.documents(documents(["http://127.0.0.1:10"]))
        assert await reload(house.gateway.live, house.settings.policies)
        assert list(of(told(house), "gateway_upstream_up")) == [("demo", "127.0.0.1:10")]


# — what callers write


async def test_g17_a_flood_of_names_adds_no_series_each(store_url: str) -> None:
    """10,000 paths, methods, models and headers that nobody knows; with a star, names that policies let pass."""
    models = {"any/*": {"pool": "demo"}, MODEL: {"pool": "demo"}}
    async with AsyncExitStack() as stack:
        stack.enter_context(capture_logs())  # their lines are another matter
        backend = await stack.enter_async_context(Backend(forever(Peer.request, ok(ANSWER))))
        house = await stack.enter_async_context(gateway(store_url, documents([backend.url], models=models)))
        key = await house.key()

        async def call(method: str, path: str, body: bytes) -> None:
            headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
            scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}

            bodies = [body]

            async def receive() -> Any:
                if not bodies:
                    await asyncio.Event().wait()  # for a caller who does not leave
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}

            async def send(message: Any) -> None:
                pass

            await house.gateway({**scope, "headers": headers, "http_version": "1.1", "scheme": "http"}, receive, send)

        async def flood(number: int) -> None:
            name = f"name{number}"
            await call("GET", f"/v1/{name}", b"")
            await call(name.upper(), "/v1/completions", b"")
            await call("GET", f"/v1/models/{name}", b"")
            await call("POST", "/v1/completions", b'{"model":"%b","prompt":"a"}' % name.encode())
            if number % 25 == 0:
                await call("POST", "/v1/completions", b'{"model":"any/%b","prompt":"a"}' % name.encode())

        for number in range(25):
            await flood(number)
        before = told(house)
        for number in range(25, 2525):
            await flood(number)
        after = told(house)
    assert after.keys() == before.keys()
    requests = of(after, "gateway_http_requests_total")
    assert sum(requests.values()) == 2525 * 4 + 101
    assert requests[("GET", "other", "404")] == 2525
    assert requests[("other", "/v1/completions", "405")] == 2525
    assert not [name for name in after if "name" in "".join(name[1:]).lower().replace("{name}", "")]


async def test_what_the_server_itself_refuses_is_counted(store_url: str) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        writer.write(b"no HTTP\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        found = told(house)
    assert of(found, "gateway_http_requests_total") == {("other", "other", "400"): 1}
    assert of(found, "gateway_refusals_total") == {("invalid_http", ""): 1}


# — workers


async def test_two_workers_of_a_folder_are_told_as_one_and_one_that_ends_leaves_its_counts(
    store_url: str, tmp_path: Path
) -> None:
    async with echo() as backend, gateway(store_url, documents([backend]), state=tmp_path) as first:
        key = await first.key()
        async with gateway(store_url, documents([backend]), state=tmp_path) as second:
            await second.gateway.keys.load()
            for house in (first, second):
                assert await ask(house, key) == 200
                found = told(house)
            assert of(found, "gateway_http_requests_total") == {("POST", "/v1/completions", "200"): 2}
            in_flight = of(found, "gateway_upstream_in_flight")
            assert list(in_flight.values()) == [0]
            assert await ask(second, key) == 200
        found = told(first)
    assert of(found, "gateway_http_requests_total") == {("POST", "/v1/completions", "200"): 3}
    assert of(found, "gateway_build_info") == {(__version__,): 1}


async def test_numbers_are_written_without_being_asked_for(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_FLUSHES", 0.05)
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        assert await ask(house, await house.key()) == 200
        folder = house.settings.state / "metrics"
        async with asyncio.timeout(10):
            while not [f for f in metrics._gather(folder) if f.name == "gateway_tokens" and f.samples]:
                await asyncio.sleep(0.05)


async def test_a_folder_that_cannot_be_written_is_told_once_and_holds_nobody_up(store_url: str, tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("no folder")
    with capture_logs() as logs:
        async with echo() as backend, gateway(store_url, documents([backend]), state=tmp_path) as house:
            for _ in range(3):
                house.gateway.meters._flush()
            assert await ask(house, await house.key()) == 200
    assert [line["log_level"] for line in logs if line["event"] == "metrics_not_written"] == ["error"]

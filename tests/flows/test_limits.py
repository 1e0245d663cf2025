"""Limits as callers and operators meet them: over real sockets, on a real store."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from structlog.testing import capture_logs

from tests.proving.backend import Backend, Peer, completion, forever, ok, whole
from tests.proving.house import MODEL, documents, gateway
from tests.proving.limits import until
from tests.proving.ports import free_port

ANSWER = b'{"choices":[{"index":0,"text":"blue"}],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'
ASKED = {"model": MODEL, "prompt": "The sky is", "max_tokens": 4}


def limited(url: str, *limits: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return documents([url], plans={"free": {"limits": list(limits)}}, **sections)


def limit(name: str, count: str, per: str = "team", **more: Any) -> dict[str, Any]:
    return {"name": name, "count": count, "per": [per], **more}


EVERY_SORT = (
    limit("asked", "requests", rate="600/minute", burst=50),
    limit("prompt", "input_tokens", rate="10000/day"),
    limit("fresh", "uncached_input_tokens", rate="9000/day"),
    limit("said", "output_tokens", rate="8000/day"),
    limit("all", "total_tokens", quota="7000/day"),
    limit("seats", "concurrent_requests", at_most=5),
)
NAMES = {
    "x-ratelimit-limit-requests": "50",
    "x-ratelimit-remaining-requests": "49",
    "x-ratelimit-limit-tokens-prompt": "10000",
    "x-ratelimit-limit-tokens-cache-adjusted-prompt": "9000",
    "x-ratelimit-limit-tokens-generated": "8000",
    "x-ratelimit-remaining-tokens-generated": "7996",
}


@pytest.mark.parametrize("how", ["JSON", "stream", "an error of the backend's", "a failure of the backend's"])
async def test_every_answer_says_where_its_caller_stands(store_url: str, how: str) -> None:
    steps = {
        "JSON": whole(ANSWER),
        "stream": completion(2),
        "an error of the backend's": forever(Peer.request, b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}"),
        "a failure of the backend's": forever(Peer.request, Peer.close),
    }[how]
    async with Backend(steps) as backend, gateway(store_url, limited(backend.url, *EVERY_SORT)) as house:
        async with house.client(await house.key()) as client:
            answer = await client.post("/v1/completions", json={**ASKED, "stream": how == "stream"})
    assert answer.status_code == {"an error of the backend's": 400, "a failure of the backend's": 502}.get(how, 200)
    assert {name: answer.headers.get(name) for name in NAMES} == NAMES
    assert all(f'"{one["name"]}";r=' in answer.headers["ratelimit"] for one in EVERY_SORT)
    assert all(f'"{one["name"]}";q=' in answer.headers["ratelimit-policy"] for one in EVERY_SORT)


async def test_a_caller_sees_every_limit_that_binds_with_what_is_used_and_reserved(store_url: str) -> None:
    go_on = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.request()
        await go_on.wait()
        await peer.send(ok(ANSWER))

    async with Backend(forever(slow)) as backend, gateway(store_url, limited(backend.url, *EVERY_SORT)) as house:
        async with house.client(await house.key()) as client:
            asking = asyncio.ensure_future(client.post("/v1/completions", json=ASKED))
            while not backend.requests:
                await asyncio.sleep(0.005)
            during = {row["name"]: row for row in (await client.get("/v1/limits")).json()["data"]}
            go_on.set()
            await asking
            after = {
                row["name"]: row for row in (await client.get("/v1/limits", params={"model": "llama"})).json()["data"]
            }
            unknown = await client.get("/v1/limits", params={"model": "nobody's"})
    assert list(during) == list(after) == [one["name"] for one in EVERY_SORT]
    assert (during["said"]["reserved"], during["said"]["used"], during["said"]["remaining"]) == (4, 0, 7996)
    assert (during["seats"]["limit"], during["seats"]["remaining"]) == (5, 4)
    assert (after["said"]["reserved"], after["said"]["used"], after["seats"]["remaining"]) == (0, 4, 5)
    assert (after["all"]["used"], after["all"]["remaining"], after["all"]["limit"]) == (7, 6993, 7000)
    assert 0 < after["all"]["reset_s"] <= 86_400
    assert unknown.status_code == 404


async def test_a_key_sees_its_own_counts_and_nobody_without_one_sees_any(store_url: str) -> None:
    own = limit("own", "requests", per="key", rate="10/hour")
    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, limited(backend.url, own)) as house:
        one, other = await house.key(), await house.key()
        async with house.client() as client:
            shown = []
            for key in (one, other):
                bearer = {"authorization": f"Bearer {key}"}
                if key == one:
                    await client.post("/v1/completions", json=ASKED, headers=bearer)
                (row,) = (await client.get("/v1/limits", headers=bearer)).json()["data"]
                shown.append((row["used"], row["remaining"], key.split("_")[1] in row["scope"]))
            assert shown == [(1, 9, True), (0, 10, True)]
            assert (await client.get("/v1/limits")).status_code == 401


async def test_limits_of_an_organisation_bind_all_of_its_teams_together(store_url: str) -> None:
    plans = {
        "free": {"limits": []},
        "acme": {"limits": [limit("together", "requests", per="organisation", rate="2/hour")]},
    }
    async with Backend(forever(whole(ANSWER))) as backend:
        policies = documents([backend.url], plans=plans, organisations={"acme": {"plan": "acme"}})
        async with gateway(store_url, policies) as house:
            statuses = []
            for team in ("research", "support", "research"):
                async with house.client(await house.key(team)) as client:
                    statuses.append((await client.post("/v1/completions", json=ASKED)).status_code)
    assert statuses == [200, 200, 429]


async def test_a_soft_limit_is_flagged_before_it_refuses(store_url: str) -> None:
    soft = limit("asked", "requests", rate="4/hour", soft="50%")
    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, limited(backend.url, soft)) as house:
        async with house.client(await house.key()) as client:
            answers = [await client.post("/v1/completions", json=ASKED) for _ in range(5)]
    assert [(a.status_code, a.headers["x-ratelimit-over-limit"]) for a in answers] == [
        (200, "no"),
        (200, "yes"),
        (200, "yes"),
        (200, "yes"),
        (429, "yes"),
    ]


async def test_a_limit_in_shadow_refuses_nothing_and_tells_what_it_would_refuse(store_url: str) -> None:
    shadow = limit("tried", "requests", rate="2/hour", mode="shadow")
    async with Backend(forever(whole(ANSWER))) as backend, gateway(store_url, limited(backend.url, shadow)) as house:
        async with house.client(await house.key()) as client:
            with capture_logs() as lines:
                statuses = [(await client.post("/v1/completions", json=ASKED)).status_code for _ in range(4)]
            (row,) = (await client.get("/v1/limits")).json()["data"]
    assert statuses == [200] * 4
    would = [line.get("limits.would_refuse") for line in lines if line["event"] == "http_access"]
    assert would == [None, None, ["tried"], ["tried"]]
    assert (row["mode"], row["used"], row["remaining"]) == ("shadow", 2, 0)


async def test_a_threshold_is_told_to_the_webhook_once_and_signed(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = os.urandom(32)
    monkeypatch.setenv("HOOK_SECRET", "whsec_" + base64.b64encode(secret).decode())
    tokens = limit("all", "total_tokens", quota="28/month", warn_at=["50%", "100%"])
    async with (
        Backend(forever(whole(ANSWER))) as backend,
        Backend(forever(Peer.request, ok(b"{}"))) as hook,
    ):
        settings = {"webhook": {"url": hook.url + "/limits", "secret_env": "HOOK_SECRET"}, "reserve": "input"}
        async with gateway(store_url, limited(backend.url, tokens, gateway=settings)) as house:
            async with house.client(await house.key()) as client:
                for _ in range(4):
                    assert (await client.post("/v1/completions", json=ASKED)).status_code == 200
            await until(lambda: len(hook.requests) >= 2)
    told = []
    for request in hook.requests:
        headers = dict(request.headers)
        signed = b".".join((headers[b"webhook-id"], headers[b"webhook-timestamp"], request.body))
        expected = b"v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest())
        assert headers[b"webhook-signature"] == expected
        told.append(json.loads(request.body)["data"])
    assert [(data["limit"], data["threshold"], data["used"]) for data in told] == [
        ("all", "50%", 14),
        ("all", "100%", 28),
    ]


async def test_in_mode_expected_what_is_reserved_is_what_was_learned(store_url: str) -> None:
    """In mode max one request of 500 fits into a limit of 1,000 beside another one; here ten do, once it is known that
    they take seven."""
    go_on = asyncio.Event()
    slow: list[bool] = []

    async def answer(peer: Peer) -> None:
        await peer.request()
        if slow:
            await go_on.wait()
        await peer.send(ok(ANSWER))

    tokens = limit("said", "output_tokens", rate="1000/hour")
    asked = {**ASKED, "max_tokens": 500}
    async with Backend(forever(answer)) as backend:
        async with gateway(store_url, limited(backend.url, tokens, gateway={"reserve": "expected"})) as house:
            async with house.client(await house.key()) as client:
                for _ in range(25):
                    assert (await client.post("/v1/completions", json=asked)).status_code == 200
                slow.append(True)
                asking = [asyncio.ensure_future(client.post("/v1/completions", json=asked)) for _ in range(10)]
                while len(backend.requests) < 35:
                    await asyncio.sleep(0.005)
                (row,) = (await client.get("/v1/limits")).json()["data"]
                go_on.set()
                assert [one.status_code for one in await asyncio.gather(*asking)] == [200] * 10
                (settled,) = (await client.get("/v1/limits")).json()["data"]
    assert 10 * 4 <= row["reserved"] <= 10 * 6
    assert (settled["used"], settled["reserved"]) == (35 * 4, 0)


# — workers that die


async def test_the_seats_of_a_killed_worker_are_free_within_sixteen_seconds(tmp_path: Path, redis7: Any) -> None:
    """And not before its lease is over: the worker might only be slow."""
    never = asyncio.Event()
    seat = limit("seat", "concurrent_requests", at_most=1)
    with redis7.sync() as client:
        client.flushall()
    async with Backend(forever(Peer.request, never)) as backend:
        policies = limited(backend.url, seat)
        (tmp_path / "all.yaml").write_text(yaml.safe_dump(policies))
        port = free_port()
        ours = {"GATEWAY_REDIS_URL": redis7.url, "GATEWAY_KEY_PEPPER": "of the tests", "GATEWAY_WORKERS": "0"}
        environment = {**os.environ, **ours}
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--policies", str(tmp_path)]
        worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)  # noqa: ASYNC220 - it is to be killed
        try:
            async with gateway(redis7.url, policies, key_pepper="of the tests") as house:
                key = await house.key()
                async with house.client(key) as client, httpx.AsyncClient(trust_env=False, timeout=30) as direct:
                    doomed = asyncio.ensure_future(_until_answered(direct, port, key))
                    while not backend.requests:
                        await asyncio.sleep(0.01)
                    worker.send_signal(signal.SIGKILL)
                    killed = time.monotonic()
                    await asyncio.gather(doomed, return_exceptions=True)
                    assert (await client.post("/v1/completions", json=ASKED)).status_code == 429
                    asking: asyncio.Future[Any] | None = None
                    while len(backend.requests) == 1:
                        if asking is None or asking.done():
                            asking = asyncio.ensure_future(client.post("/v1/completions", json=ASKED))
                        await asyncio.sleep(0.1)
                    assert 5 < time.monotonic() - killed < 16
                    assert asking is not None
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
        finally:
            worker.kill()
            worker.wait()


async def _until_answered(client: httpx.AsyncClient, port: int, key: str) -> None:
    """Asks a worker that is starting until it takes the request."""
    bearer = {"authorization": f"Bearer {key}"}
    while True:
        try:
            answer = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=ASKED, headers=bearer)
        except httpx.ConnectError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return
        await asyncio.sleep(0.05)

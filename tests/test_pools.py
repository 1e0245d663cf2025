"""Who is asked, who is asked next, and what becomes of those who fail. Real sockets, no gateway around them."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.asgi import RawHeaders
from gateway.endpoints import ENDPOINTS
from gateway.errors import UpstreamFailed, UpstreamsBusy
from gateway.hops import Way
from gateway.normalize import normalize
from gateway.policy import load
from gateway.pools import Opening, Policies, Pools
from gateway.snapshot import Snapshot
from gateway.upstream import Answer
from tests.proving.backend import END, EVENTS, Backend, Peer, Step, chunk, forever, ok
from tests.proving.house import MODEL, documents

ANSWER = b'{"choices":[{"text":"blue"}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4}}'
GOOD = forever(Peer.request, ok(ANSWER))
OTHER = "accounts/acme/models/other"


def status(code: int, *fields: bytes) -> Step:
    """Answers every request with this status."""
    head = (b"HTTP/1.1 %d X" % code, b"content-length: 2", *fields)
    return forever(Peer.request, b"\r\n".join((*head, b"", b"{}")))


def nobody() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def snapshot(pools: Mapping[str, Any], models: Mapping[str, Any] | None = None, **sections: Any) -> Snapshot:
    policy = {**documents([]), "pools": dict(pools), **sections}
    policy["models"] = {MODEL: {"pool": next(iter(pools))}, **(models or {})}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all.yaml").write_text(yaml.safe_dump(policy, sort_keys=False))
        return load(Path(folder))


def pool(*upstreams: Backend | str | dict[str, Any], **members: Any) -> dict[str, Any]:
    """A pool's document. It comes back as fast as it may, unless a test says otherwise."""
    urls = [u if isinstance(u, dict) else {"url": u if isinstance(u, str) else u.url} for u in upstreams]
    return {"slow_start": "0s", "upstreams": urls, **members}


class Asked:
    """Policies in force, and requests to them."""

    def __init__(self, policies: Policies) -> None:
        self.policies = policies
        self.pools = policies.pools

    def opening(self, *headers: tuple[bytes, bytes], team: str = "research", **members: Any) -> Opening:
        body = json.dumps({"model": MODEL, "prompt": "The sky is", **members}).encode()
        request = normalize(ENDPOINTS["completions"], body, self.policies.snapshot)
        given: RawHeaders = list(headers)
        way = Way({"http_version": "1.1", "scheme": "http", "headers": []}, b"gw-0", b"r1", bytes(range(16)))
        return self.policies.open(request, team, given, way)

    async def answer(
        self, *headers: tuple[bytes, bytes], team: str = "research", **members: Any
    ) -> tuple[Answer, bytes]:
        """An answer, whole, and its body."""
        async with self.opening(*headers, team=team, **members) as answer:
            pieces = [piece async for piece in answer]
            return answer, b"".join(pieces) + answer.end["body"]

    async def status(self) -> int | str | None:
        """The status of an answer, or the code of its failure."""
        try:
            answer, _ = await self.answer()
        except UpstreamFailed as failed:
            return failed.code
        return answer.status


@asynccontextmanager
async def opened(
    pools: Mapping[str, Any], models: Mapping[str, Any] | None = None, **sections: Any
) -> AsyncIterator[Asked]:
    found = snapshot(pools, models, **sections)
    policies = Policies(found, Pools(found.pools, {}))
    policies.pools.watch()
    try:
        yield Asked(policies)
    finally:
        await policies.pools.retire()


# — another one is asked


@pytest.mark.parametrize(
    "steps",
    [(Peer.request, Peer.reset), (Peer.request, Peer.close), (Peer.request, b"garbage\r\n\r\n"), (status(503),)],
    ids=["reset", "closed", "garbage", "503"],
)
async def test_one_that_fails_before_an_answer_is_passed_over(steps: tuple[Step, ...]) -> None:
    async with Backend(*steps) as bad, Backend(GOOD) as good, opened({"demo": pool(bad, good)}) as asked:
        answers = [await asked.answer() for _ in range(8)]
    assert [(answer.status, body) for answer, body in answers] == [(200, ANSWER)] * 8
    assert {answer.upstream.name for answer, _ in answers} == {good.url.removeprefix("http://")}
    assert max(answer.attempts for answer, _ in answers) == 2


async def test_an_answer_that_is_passed_over_is_left() -> None:
    """Its place is free again, and its connection serves the next request."""
    async with Backend(status(503)) as bad, Backend(GOOD) as good:
        async with opened({"demo": pool(bad, good, balance="round_robin")}) as asked:
            for _ in range(6):
                assert await asked.status() == 200
            assert [upstream.in_flight for upstream in asked.pools["demo"].upstreams] == [0, 0]
        assert len(bad.requests) > 1
        assert len(bad.peers) == 1


async def test_a_caller_that_leaves_before_the_answer_gives_its_place_back() -> None:
    async with Backend(Peer.request) as silent, opened({"demo": pool(silent)}) as asked:
        caller = asyncio.ensure_future(asked.answer())
        while not silent.requests:
            await asyncio.sleep(0.001)
        caller.cancel()
        await asyncio.wait((caller,))
        assert caller.cancelled()
        assert asked.pools["demo"].upstreams[0].in_flight == 0
        async with asyncio.timeout(10):
            await silent.peers[0].gone.wait()


async def test_what_policy_does_not_name_is_not_sent_again() -> None:
    retries = {"on": ["connect"]}
    async with Backend(status(503)) as bad, Backend(Peer.request, Peer.reset) as worse:
        async with opened({"demo": pool(bad, retries=retries)}) as asked:
            assert await asked.status() == 503
        async with opened({"demo": pool(worse, bad, retries=retries, fallback="b"), "b": pool(bad)}) as asked:
            seen = {await asked.status() for _ in range(8)}
            assert seen == {503, "upstream_disconnected"}
        assert len(bad.requests) + len(worse.requests) == 9


async def test_429_is_sent_on_only_where_policy_says_so() -> None:
    async with Backend(status(429)) as full, Backend(GOOD) as good:
        async with opened({"demo": pool(full, good)}) as asked:
            assert {await asked.status() for _ in range(30)} == {200, 429}
        async with opened({"demo": pool(full, good, retries={"on": [429], "budget": "100%"})}) as asked:
            assert {await asked.status() for _ in range(30)} == {200}


async def test_the_callers_own_fault_is_answered_once_and_says_nothing_of_the_upstream() -> None:
    async with Backend(status(400)) as strict, opened({"demo": pool(strict, nobody())}) as asked:
        for _ in range(60):
            assert await asked.status() == 400
        assert not asked.pools["demo"].upstreams[0].health.out


async def test_no_more_upstreams_are_asked_than_policy_says() -> None:
    async with (
        Backend(status(503)) as a,
        Backend(status(503)) as b,
        Backend(status(503)) as c,
        Backend(status(503)) as d,
    ):
        async with opened({"demo": pool(a, b, c, d, retries={"attempts": 3})}) as asked:
            answer, _ = await asked.answer()
        assert (answer.status, answer.attempts) == (503, 3)
        assert sorted(len(backend.requests) for backend in (a, b, c, d)) == [0, 1, 1, 1]


async def test_under_a_brown_out_a_tenth_is_sent_again_and_half_of_the_pool_stays() -> None:
    """Four that fail every second request: attempts are at most 1.1 times the requests."""

    def half() -> Step:
        turn = 0

        async def answers(peer: Peer) -> None:
            nonlocal turn
            while True:
                await peer.request()
                turn += 1
                await peer.send(ok(ANSWER) if turn % 2 else b"HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\n{}")

        return answers

    async with Backend(half()) as a, Backend(half()) as b, Backend(half()) as c, Backend(half()) as d:
        backends = (a, b, c, d)
        async with opened({"demo": pool(*backends)}) as asked:
            for _ in range(1000):
                assert await asked.status() in (200, 503)
                assert sum(u.health.out for u in asked.pools["demo"].upstreams) <= 2
    attempts = sum(len(backend.requests) for backend in backends)
    assert 1000 < attempts <= 1110


async def test_what_was_never_sent_costs_no_budget() -> None:
    """Of 0 % one a second is left, ten in all: every connection beyond these would be refused its second upstream."""
    health, retries = {"connect_failures": 1000, "failures": 1000, "error_rate": "100%"}, {"budget": "0%"}
    async with Backend(GOOD) as good, opened({"demo": pool(nobody(), good, health=health, retries=retries)}) as asked:
        answers = [(await asked.answer())[0] for _ in range(80)]
    assert sum(answer.attempts == 2 for answer in answers) > 15


async def test_all_attempts_together_take_no_longer_than_the_first_byte_may() -> None:
    """The second one has what the first one left."""

    async def slow_refusal(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(0.6)
        await peer.send(b"HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\n{}")
        await peer.request()
        await peer.hung_up()

    timeouts = {"first_byte": "1s"}
    async with Backend(slow_refusal) as one, Backend(slow_refusal) as two:
        async with opened({"demo": pool(one, two, timeouts=timeouts)}) as asked:
            begun = asyncio.get_running_loop().time()
            assert await asked.status() == "upstream_first_byte_timeout"
            assert asyncio.get_running_loop().time() - begun < 1.19, "0.6 + 0.6 would be both of them"


async def test_a_model_has_timeouts_of_its_own() -> None:
    models = {MODEL: {"pool": "demo", "timeouts": {"first_byte": "300ms"}}}
    async with Backend(Peer.request) as silent, opened({"demo": pool(silent)}, models) as asked:
        assert await asked.status() == "upstream_first_byte_timeout"


async def test_a_failure_after_two_attempts_tells_an_sdk_not_to_try_again() -> None:
    async with opened({"demo": pool(nobody(), nobody())}) as asked:
        with pytest.raises(UpstreamFailed) as failed:
            await asked.answer()
    assert (b"x-should-retry", b"false") in failed.value.headers()


async def test_a_failure_after_one_attempt_leaves_it_to_the_sdk() -> None:
    async with opened({"demo": pool(nobody())}) as asked:
        with pytest.raises(UpstreamFailed) as failed:
            await asked.answer()
    assert b"x-should-retry" not in dict(failed.value.headers())


# — nobody is left


async def test_when_nobody_can_be_reached_it_is_said_at_once_and_until_when() -> None:
    """After three connections each, nobody is asked any more until the time has come for a trial."""
    async with opened({"demo": pool(nobody(), nobody())}) as asked:
        for _ in range(3):
            assert await asked.status() == "upstream_connect_failed"
        with pytest.raises(UpstreamsBusy) as busy:
            await asked.answer()
    assert busy.value.retry_after is not None
    assert 0 < busy.value.retry_after <= 1


async def test_one_that_comes_back_is_asked_again() -> None:
    """The trial finds it, half a pool's worth of failures later."""
    async with Backend(GOOD) as gone:
        url, port = gone.url, gone.port
    async with opened({"demo": pool(url)}) as asked:
        for _ in range(3):
            assert await asked.status() == "upstream_connect_failed"
        assert await asked.status() == "upstreams_unavailable"
        async with Backend(GOOD, port=port):
            async with asyncio.timeout(10):
                while (found := await asked.status()) != 200:
                    assert found == "upstreams_unavailable"
                    await asyncio.sleep(0.05)


async def test_one_that_asks_for_rest_is_left_alone_and_the_others_are_not() -> None:
    async with Backend(status(429, b"retry-after: 30")) as tired, Backend(GOOD) as good:
        async with opened({"demo": pool(tired, good)}) as asked:
            seen = Counter([await asked.status() for _ in range(40)])
        assert (seen[429], len(tired.requests)) == (1, 1)
        async with opened({"demo": pool(tired)}) as asked:
            assert await asked.status() == 429
            with pytest.raises(UpstreamsBusy) as busy:
                await asked.answer()
    assert busy.value.retry_after == pytest.approx(30, abs=1)


async def test_who_finds_all_at_rest_is_told_of_the_first_one_that_may_be_asked() -> None:
    async with Backend(status(429, b"retry-after: 30")) as long, Backend(status(429, b"retry-after: 9")) as short:
        async with opened({"demo": pool(long, short)}) as asked:
            assert [await asked.status() for _ in range(2)] == [429] * 2
            with pytest.raises(UpstreamsBusy) as busy:
                await asked.answer()
    assert busy.value.retry_after == pytest.approx(9, abs=2)


async def test_one_that_asks_for_rest_has_not_failed() -> None:
    async with Backend(status(503, b"retry-after: 0")) as tired, Backend(GOOD) as good:
        async with opened({"demo": pool(tired, good, retries={"on": ["connect"]})}) as asked:
            seen = Counter([await asked.status() for _ in range(60)])
            assert seen[503] > 5
            assert not asked.pools["demo"].upstreams[0].health.out


@pytest.mark.parametrize("when", [b"soon", b"", b"-1", "١".encode()])
async def test_a_rest_that_cannot_be_read_is_none(when: bytes) -> None:
    async with Backend(status(429, b"retry-after: " + when)) as odd, opened({"demo": pool(odd)}) as asked:
        assert [await asked.status() for _ in range(3)] == [429] * 3


async def test_what_is_drained_gets_nothing_new() -> None:
    async with Backend(GOOD) as one, Backend(GOOD) as two:
        drained = {"url": one.url, "drain": True}
        async with opened({"demo": pool(drained, two)}) as asked:
            assert {await asked.status() for _ in range(10)} == {200}
        assert one.requests == []
        async with opened({"demo": pool(drained)}) as asked:
            assert await asked.status() == "upstreams_unavailable"


async def test_what_is_drained_by_command_gets_nothing_new_until_the_command_is_taken_back() -> None:
    async with Backend(GOOD) as one, Backend(GOOD) as two:
        async with opened({"demo": pool(one, two)}) as asked:
            asked.pools.drain(frozenset({f"demo/127.0.0.1:{one.port}"}))
            assert {(await asked.answer())[0].upstream.name for _ in range(10)} == {f"127.0.0.1:{two.port}"}
            asked.pools.drain(frozenset({f"demo/127.0.0.1:{two.port}"}))
            assert {(await asked.answer())[0].upstream.name for _ in range(10)} == {f"127.0.0.1:{one.port}"}


async def test_one_whose_streams_are_all_cut_is_out() -> None:
    cut = (Peer.request, EVENTS, chunk(b"data: 1\n\n"), Peer.reset)
    async with Backend(*cut) as bad, Backend(GOOD) as good, opened({"demo": pool(bad, good)}) as asked:
        seen = Counter([await asked.status() for _ in range(100)])
        assert asked.pools["demo"].upstreams[0].health.out
    assert 0 < seen["upstream_disconnected"] < 30


async def test_weights_are_shares() -> None:
    async with Backend(GOOD) as main, Backend(GOOD) as canary:
        weighed = pool({"url": main.url, "weight": 95}, {"url": canary.url, "weight": 5})
        async with opened({"demo": weighed}) as asked:
            for _ in range(600):
                await asked.answer()
    assert 10 <= len(canary.requests) <= 60


async def test_in_turn_is_in_turn() -> None:
    async with Backend(GOOD) as one, Backend(GOOD) as two:
        async with opened({"demo": pool(one, two, balance="round_robin")}) as asked:
            names = [(await asked.answer())[0].upstream.name for _ in range(6)]
    assert names[0::2] == [names[0]] * 3
    assert names[1::2] == [names[1]] * 3
    assert names[0] != names[1]


# — what belongs together


async def test_a_session_stays_with_its_upstream_and_teams_are_apart() -> None:
    """A header comes before prompt_cache_key, that before user, and that before the beginning of the prompt."""
    async with Backend(GOOD) as a, Backend(GOOD) as b, Backend(GOOD) as c:
        async with opened({"demo": pool(a, b, c, balance="affinity")}) as asked:

            async def met(*headers: tuple[bytes, bytes], **given: Any) -> str:
                return (await asked.answer(*headers, **given))[0].upstream.name

            for i in range(12):
                named = {"x": (b"x-session-affinity", b"s%d" % i)}
                by_header = await met(named["x"], prompt_cache_key=f"{i}a", user=f"{i}b")
                assert by_header == await met(named["x"], prompt_cache_key=f"{i}c")
                by_key = await met(prompt_cache_key=f"k{i}", user=f"{i}d")
                assert by_key == await met(prompt_cache_key=f"k{i}", user=f"{i}e", prompt="another")
                assert await met(user=f"u{i}", prompt="one") == await met(user=f"u{i}", prompt="two")
                long = f"{i}" * 1024
                assert await met(prompt=long + "one") == await met(prompt=long + "two")
            assert len({await met(prompt=f"{i}" * 1024) for i in range(12)}) == 3
            teams = {await met(prompt="the same", team=f"team-{i}") for i in range(12)}
            assert len(teams) == 3


# — another pool, another model


async def test_a_pool_that_is_down_is_replaced_by_its_fallback() -> None:
    async with Backend(GOOD) as good:
        pools = {"demo": pool(nobody(), fallback="spare"), "spare": pool(good)}
        async with opened(pools) as asked:
            answers = [await asked.answer() for _ in range(6)]
    assert [(answer.status, answer.model.name, answer.model.pool) for answer, _ in answers] == [
        (200, MODEL, "spare")
    ] * 6


async def test_a_pool_that_is_full_is_replaced_by_its_fallback() -> None:
    go_on = asyncio.Event()
    async with Backend(Peer.request, EVENTS, chunk(b"data: 1\n\n"), go_on) as busy, Backend(GOOD) as spare:
        full = pool({"url": busy.url, "max_in_flight": 1}, fallback="spare")
        async with opened({"demo": full, "spare": pool(spare)}) as asked:
            async with asked.opening() as first:
                assert first.status == 200
                answer, _ = await asked.answer()
                assert answer.model.pool == "spare"


async def test_a_model_that_stands_in_is_asked_by_its_own_name_and_in_its_own_words() -> None:
    """Another api has other aliases; a model of another family is passed over where it does not take the request."""
    models = {
        MODEL: {"pool": "demo", "fallback": OTHER},
        OTHER: {"pool": "spare", "upstream_model": "other", "fallback": "last"},
        "last": {"pool": "good"},
    }
    async with Backend(status(503)) as spare, Backend(GOOD) as good:
        pools = {"demo": pool(nobody(), api="openai"), "spare": pool(spare), "good": pool(good)}
        async with opened(pools, models) as asked:
            answer, _ = await asked.answer(max_completion_tokens=5)
    assert answer.model.name == "last"
    assert answer.attempts == 3
    assert [json.loads(r.body)["model"] for b in (spare, good) for r in b.requests] == ["other", "last"]
    assert json.loads(good.requests[0].body)["max_tokens"] == 5


async def test_a_model_whose_family_does_not_take_the_request_does_not_stand_in() -> None:
    models = {
        MODEL: {"pool": "demo", "fallback": OTHER},
        OTHER: {"pool": "spare", "family": "plain", "fallback": "last"},
        "last": {"pool": "good"},
    }
    families = {"plain": {"reasoning_effort": ["low"]}}
    async with Backend(GOOD) as spare, Backend(GOOD) as good:
        pools = {"demo": pool(nobody()), "spare": pool(spare), "good": pool(good)}
        async with opened(pools, models, families=families) as asked:
            assert (await asked.answer(reasoning_effort="high"))[0].model.name == "last"
            assert (await asked.answer(reasoning_effort="low"))[0].model.name == OTHER


async def test_a_pool_that_does_not_take_the_credential_is_replaced_by_its_fallback() -> None:
    async with Backend(status(401)) as strict, Backend(GOOD) as good:
        async with opened({"demo": pool(strict, fallback="spare"), "spare": pool(good)}) as asked:
            assert [await asked.status() for _ in range(3)] == [200] * 3


async def test_what_was_added_for_one_pool_is_not_taken_for_the_callers_own_by_the_next() -> None:
    """Both ask for usage, and each takes out the event that the caller did not ask for."""
    extra = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\n'
    stream = EVENTS + chunk(b"data: 1\n\n") + chunk(extra) + END
    async with Backend(forever(Peer.request, stream)) as good:
        pools = {"demo": pool(nobody(), usage="inject", fallback="spare"), "spare": pool(good, usage="inject")}
        async with opened(pools) as asked:
            _, body = await asked.answer(stream=True)
    assert body == b"data: 1\n\n"


async def test_the_last_failure_is_told_where_all_fail() -> None:
    async with Backend(status(503)) as bad:
        async with opened({"demo": pool(nobody(), fallback="spare"), "spare": pool(bad)}) as asked:
            answer, _ = await asked.answer()
            assert answer.status == 503


# — what is not for callers


@pytest.mark.parametrize(
    ("code", "expected"),
    [(302, "upstream_redirected"), (401, "upstream_unauthorized"), (407, "upstream_unauthorized")],
)
async def test_what_a_backend_tells_the_gateway_is_not_for_callers(code: int, expected: str) -> None:
    hint = b"location: http://169.254.169.254/"
    async with Backend(status(code, hint)) as backend, opened({"demo": pool(backend)}) as asked:
        assert await asked.status() == expected
        assert asked.pools["demo"].upstreams[0].in_flight == 0
        assert len(backend.requests) == 1


async def test_what_a_backend_says_of_itself_stays_here() -> None:
    theirs = (
        b"Server: uvicorn",
        b"Set-Cookie: a=b",
        b"Alt-Svc: h3",
        b"Location: /x",
        b"X-Powered-By: x",
        b"Strict-Transport-Security: max-age=1",
        b"WWW-Authenticate: Basic",
        b"X-RateLimit-Limit: 7",
        b"RateLimit: x",
        b"X-Gateway-Request-Id: forged",
        b"Connection: x-hop",
        b"X-Hop: 1",
        b"X-Kept: 2",
    )
    async with Backend(forever(Peer.request, ok(ANSWER, *theirs))) as backend:
        async with opened({"demo": pool(backend)}) as asked:
            answer, _ = await asked.answer()
    assert {name.lower() for name, _ in answer.headers} == {b"content-type", b"content-length", b"x-kept"}


# — probes


async def test_a_probe_that_fails_twice_takes_an_upstream_out_and_a_good_one_brings_it_back() -> None:
    sick = asyncio.Event()

    async def server(peer: Peer) -> None:
        while True:
            await peer.request()
            probe = peer.requests[-1].line.startswith(b"GET /health ")
            await peer.send(
                ok(ANSWER) if not (probe and sick.is_set()) else b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"
            )

    async with Backend(server) as one, Backend(GOOD) as other:
        health = {"probe": "/health", "every": "100ms", "probe_timeout": "2s"}
        async with opened({"demo": pool(one, other, health=health)}) as asked:
            first = asked.pools["demo"].upstreams[0]
            sick.set()
            async with asyncio.timeout(20):
                while not first.health.out:
                    await asyncio.sleep(0.01)
                sick.clear()
                while (await asked.answer())[0].upstream is not first:
                    await asyncio.sleep(0.01)


async def test_a_probe_that_finds_no_page_has_failed() -> None:
    """Whatever is no 2xx: what listens there is not the backend that was meant."""
    async with Backend(status(404)) as other, Backend(GOOD) as good:
        health = {"probe": "/health", "every": "100ms"}
        async with opened({"demo": pool(other, good, health=health)}) as asked:
            async with asyncio.timeout(20):
                while not asked.pools["demo"].upstreams[0].health.out:
                    await asyncio.sleep(0.01)
            assert not asked.pools["demo"].upstreams[1].health.out


async def test_reloads_do_not_pile_up_probes_and_none_outlives_its_pool() -> None:
    def probes() -> int:
        names = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
        return sum(name == "Upstream._probe_for_ever" for name in names)

    async with (
        Backend(GOOD) as one,
        opened({"demo": pool(one, health={"probe": "/health", "every": "100ms"})}) as asked,
    ):
        pools = asked.pools
        for _ in range(5):
            after = Pools(asked.policies.snapshot.pools, {}, pools)
            after.watch()
            await pools.retire(after)
            pools = after
        assert probes() == 1
        async with asyncio.timeout(10):
            while len(one.requests) < 2:
                await asyncio.sleep(0.01)
            await pools.retire()
            while probes():
                await asyncio.sleep(0)


# — policies change


async def test_a_reload_keeps_connections_and_what_is_known_and_takes_other_weights() -> None:
    async with Backend(GOOD) as one, Backend(GOOD) as two:
        async with opened({"demo": pool(one, two)}) as asked:
            while not (one.requests and two.requests):
                await asked.answer()
            before = asked.pools["demo"].upstreams
            drained = snapshot({"demo": pool({"url": one.url, "drain": True}, two)})
            after = Pools(drained.pools, {}, asked.pools)
            assert after["demo"].upstreams == before
            there = Asked(Policies(drained, after))
            asked_before = len(one.requests)
            for _ in range(10):
                await there.answer()
            assert len(one.requests) == asked_before
            assert len(two.peers) == 1
            await asked.pools.retire(after)
            assert await there.status() == 200


async def test_a_reload_that_changes_nothing_goes_on_over_the_same_connection() -> None:
    async with Backend(GOOD) as one, opened({"demo": pool(one)}) as asked:
        await asked.answer()
        after = Pools(asked.policies.snapshot.pools, {}, asked.pools)
        await asked.pools.retire(after)
        for _ in range(2):
            await Asked(Policies(asked.policies.snapshot, after)).answer()
        assert len(one.peers) == 1


async def test_a_reload_takes_another_credential() -> None:
    keys = {"OLD": "old", "NEW": "new"}
    async with Backend(GOOD) as one:
        first, second = (snapshot({"demo": pool({"url": one.url, "key_env": name})}) for name in keys)
        before = Pools(first.pools, keys)
        await Asked(Policies(first, before)).answer()
        after = Pools(second.pools, keys, before)
        await before.retire(after)
        await Asked(Policies(second, after)).answer()
        await after.retire()
    sent = [dict(request.headers)[b"authorization"] for request in one.requests]
    assert sent == [b"Bearer old", b"Bearer new"]


async def test_a_stream_outlives_the_upstream_that_a_reload_removes() -> None:
    go_on = asyncio.Event()
    async with Backend(Peer.request, EVENTS, chunk(b"data: 1\n\n"), go_on, chunk(b"data: 2\n\n"), b"0\r\n\r\n") as old:
        async with Backend(GOOD) as new, opened({"demo": pool(old)}) as asked:
            async with asked.opening() as answer:
                pieces = aiter(answer)
                assert await anext(pieces) == b"data: 1\n\n"
                after = Pools(snapshot({"demo": pool(new)}).pools, {}, asked.pools)
                await asked.pools.retire(after)
                assert not old.peers[0].gone.is_set()
                go_on.set()
                rest = [piece async for piece in pieces] + [answer.end["body"]]
                assert b"".join(rest) == b"data: 2\n\n"
            async with asyncio.timeout(5):
                await old.peers[0].gone.wait()
            await after.retire()


# — what reviews found


async def test_a_spent_budget_does_not_keep_a_request_from_the_fallback() -> None:
    async with Backend(status(503)) as bad, Backend(GOOD) as good:
        pools = {"demo": pool(bad, retries={"budget": "0%"}, fallback="spare"), "spare": pool(good)}
        async with opened(pools) as asked:
            assert {await asked.status() for _ in range(40)} == {200}


async def test_a_stand_in_has_no_more_time_than_the_model_that_was_asked() -> None:
    """However long its own pool lets it take: all attempts have the first one's time, and then nobody else is asked."""
    async with Backend(Peer.request) as silent, Backend(GOOD) as good:
        times = {"first_byte": "300ms"}
        models = {MODEL: {"pool": "demo", "timeouts": times, "fallback": OTHER}, OTHER: {"pool": "spare"}}
        async with opened(
            {"demo": pool(nobody()), "spare": pool(silent, fallback="last"), "last": pool(good)}, models
        ) as a:
            begun = asyncio.get_running_loop().time()
            assert await a.status() == "upstream_first_byte_timeout"
            assert asyncio.get_running_loop().time() - begun < 60, "its own would be two minutes"
        assert good.requests == []


async def test_one_whose_key_is_not_taken_is_passed_over_and_then_out() -> None:
    async with Backend(status(401)) as locked, Backend(GOOD) as good:
        async with opened({"demo": pool(locked, good)}) as asked:
            assert {await asked.status() for _ in range(40)} == {200}
        assert len(locked.requests) == 5


async def test_what_is_drained_does_not_count_as_there() -> None:
    """Of two, one is drained: the other one is all that there is, and failing does not take it out."""
    async with Backend(status(500)) as failing, Backend(GOOD) as drained:
        async with opened({"demo": pool(failing, {"url": drained.url, "drain": True})}) as asked:
            assert {await asked.status() for _ in range(20)} == {500}


async def test_a_drain_by_command_outlives_a_reload_that_makes_the_upstream_anew() -> None:
    async with Backend(GOOD) as one, opened({"demo": pool(one)}) as asked:
        asked.pools.drain(frozenset({f"demo/{one.url.removeprefix('http://')}"}))
        other = snapshot({"demo": pool({"url": one.url, "key_env": "ANOTHER"})})
        after = Pools(other.pools, {}, asked.pools)
        try:
            assert await Asked(Policies(other, after)).status() == "upstreams_unavailable"
        finally:
            await after.retire()


async def test_streams_that_are_cut_take_an_upstream_out_though_each_begins_well() -> None:
    async with Backend(Peer.request, EVENTS, chunk(b"data: 1\n\n"), Peer.reset) as cutting, Backend(GOOD) as good:
        async with opened({"demo": pool(cutting, good)}) as asked:
            for _ in range(60):
                with suppress(UpstreamFailed):
                    await asked.answer()
        assert len(cutting.requests) == 5


async def test_a_caller_who_leaves_while_an_answer_is_closed_leaves_no_seat_behind() -> None:
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend, opened({"demo": pool(backend)}) as asked:
        upstream = asked.pools["demo"].upstreams[0]
        opening = asked.opening()
        answer = await opening.__aenter__()
        closing = asyncio.Event()

        async def slowly() -> None:
            closing.set()
            await asyncio.Event().wait()

        with pytest.MonkeyPatch.context() as patch:
            stream = answer._stream
            close = stream.aclose
            patch.setattr(stream, "aclose", slowly)
            leaving = asyncio.ensure_future(opening.__aexit__(None, None, None))
            await closing.wait()
            leaving.cancel()
            await asyncio.wait((leaving,))
        await close()
        assert upstream.in_flight == 0

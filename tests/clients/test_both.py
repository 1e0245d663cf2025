"""What both SDKs see, through each of their four clients."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from gateway.identity import make_key
from tests.clients.sdks import ALIAS, MODEL, OTHER, Api, Caller, Sdk, done, rest, take, text
from tests.clients.served import Backend, Served

pytestmark = pytest.mark.anyio

apis = pytest.mark.parametrize("api", ["completions", "chat"])

PROMPT = "to be or not"
COUNTS = (4, 6, 10)  # of PROMPT, and of its first six words said again
LONG = 400  # tokens of a stream that nobody reads to its end
SLACK = 25  # tokens that may be under way when a caller leaves: half a second of a stream


def counts(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def counted(line: dict[str, Any]) -> tuple[str, str, int, int]:
    return line["outcome"], line["usage_source"], line["input_tokens"], line["output_tokens"]


async def statuses(backend: Backend, caller: Caller) -> list[str]:
    """How the caller's requests ended at the backend, those that came so far."""
    return [row["status"] for row in await backend.rows(caller.called)]


# — answers


@apis
async def test_an_answer_is_the_backends_text_and_usage(caller: Caller, gateway: Served, api: Api) -> None:
    answer = await caller.ask(PROMPT, api, max_tokens=6)
    assert text(answer) == "to be or not to be"
    assert counts(answer.usage) == COUNTS
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "upstream", 4, 6)


@apis
async def test_a_stream_is_the_backends_text_and_usage(
    caller: Caller, gateway: Served, backend: Backend, api: Api
) -> None:
    chunks = await rest(await caller.ask(PROMPT, api, max_tokens=6, stream=True))
    assert "".join(map(text, chunks)) == "to be or not to be"
    assert [counts(chunk.usage) for chunk in chunks if chunk.usage] == [COUNTS]
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "upstream", 4, 6)
    assert await statuses(backend, caller) == ["complete"]


async def test_who_leaves_a_stream_pays_for_what_was_written_until_then(
    caller: Caller, gateway: Served, backend: Backend
) -> None:
    stream = await caller.ask(f"{PROMPT} #pace=0.02", "chat", max_tokens=LONG, stream=True)
    await take(stream, 8)
    await done(stream.close())

    (line,) = await gateway.log.wait(caller.called, 1)
    (row,) = await backend.rows(caller.called)
    charged = gateway.usage(caller.called)
    assert (line["outcome"], line["usage_source"]) == ("client", "counted")
    assert (charged["requests"], charged["output_tokens"]) == (1, line["output_tokens"])
    assert row["status"] == "aborted"
    assert 7 <= row["completion_tokens"] < LONG
    assert abs(charged["output_tokens"] - row["completion_tokens"]) <= SLACK


async def test_an_alias_reaches_the_backend_as_its_model(caller: Caller, backend: Backend) -> None:
    answer = await caller.ask(PROMPT, model=ALIAS)
    assert answer.model == MODEL
    assert [row["model"] for row in await backend.rows(caller.called)] == [MODEL]


@apis
async def test_what_is_told_in_other_words_reaches_the_backend_in_its_own(
    caller: Caller, backend: Backend, api: Api
) -> None:
    told: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"prediction": {"type": "content", "content": "or not"}}, {"speculation": "or not"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"reasoning_effort": 2048}),
        ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
        ({"reasoning_effort": True}, {"reasoning_effort": "medium"}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    ]
    for given, _ in told:
        await caller.ask(PROMPT, api, extra_body=given)
    common = {"model", "prompt", "messages", "user"}
    bodies = [json.loads(row["body"]) for row in await backend.rows(caller.called)]
    arrived = [{name: value for name, value in body.items() if name not in common} for body in bodies]
    assert [expected for _, expected in told] == arrived


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_tells_where_the_caller_stands(caller: Caller, stream: bool) -> None:
    response = await caller.ask(PROMPT, raw=True, max_tokens=6, stream=stream)
    headers = response.headers
    if stream:
        await rest(await done(response.parse()))
    assert headers["x-ratelimit-limit-requests"] == "100000"
    assert int(headers["x-ratelimit-remaining-requests"]) < 100_000
    assert headers["x-ratelimit-limit-tokens"] == "1000000000"
    assert int(headers["x-ratelimit-remaining-tokens"]) < 1_000_000_000
    assert re.fullmatch(r"(\d+m)?[\d.]+m?s", headers["x-ratelimit-reset-requests"])


async def test_a_request_has_one_name_on_both_sides_of_the_gateway(
    caller: Caller, gateway: Served, backend: Backend
) -> None:
    response = await caller.ask(PROMPT, raw=True)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert response.headers["x-request-id"] == caller.called == line["client_request_id"]
    assert response.headers["x-gateway-request-id"] == line["request_id"]
    assert [row["code"] for row in await backend.rows(caller.called)] == [200]


async def test_a_request_without_a_name_gets_the_gateways(caller: Caller, gateway: Served) -> None:
    response = await caller.ask(PROMPT, raw=True, extra_headers={})
    own = response.headers["x-request-id"]
    (line,) = await gateway.log.wait(own, 1)
    assert (line["request_id"], line["http.response.status_code"]) == (own, 200)


# — refusals of the gateway


def refused(error: Any) -> tuple[str | None, str | None, str | None]:
    """The refusal's type, code and param, as OpenAI's object has them."""
    found = error.response.json()["error"]
    return found["type"], found["code"], found["param"]


@pytest.mark.parametrize(
    "key",
    [make_key("q7ZxN2vT9wKb", 2**255 + 12345), "sk-Zq8rT2vXw5yB7nM4kJ1hG6fD3sA9pL0c"],
    ids=["well-formed", "of-another-service"],
)
async def test_a_wrong_key_is_refused_without_a_word_of_it(sdk: Sdk, gateway: Served, key: str) -> None:
    async with sdk.caller(gateway.url, key) as caller:
        with pytest.raises(sdk.package.AuthenticationError) as caught:
            await caller.ask(PROMPT)
    assert refused(caught.value) == ("invalid_request_error", "invalid_api_key", None)
    (line,) = await gateway.log.wait(caller.called, 1)
    told = f"{caught.value} {caught.value.response.text} {caught.value.response.headers} {line}"
    assert [key[at : at + 6] for at in range(len(key) - 5) if key[at : at + 6] in told] == []


async def test_no_key_is_told_from_a_wrong_one(caller: Caller, gateway: Served) -> None:
    anonymous = {"Authorization": caller.sdk.package.Omit(), "x-request-id": caller.called}
    with pytest.raises(caller.sdk.package.AuthenticationError) as caught:
        await caller.ask(PROMPT, extra_headers=anonymous)
    assert refused(caught.value) == ("invalid_request_error", None, None)
    assert caught.value.response.headers["www-authenticate"] == 'Bearer realm="gateway"'
    (line,) = await gateway.log.wait(caller.called, 1)
    assert "key_id" not in line


async def test_a_model_that_nobody_knows_is_not_found(caller: Caller) -> None:
    with pytest.raises(caller.sdk.package.NotFoundError) as caught:
        await caller.ask(PROMPT, model="accounts/nobody/models/none")
    assert refused(caught.value) == ("invalid_request_error", "model_not_found", "model")


async def test_a_model_that_is_not_for_this_key_is_denied(sdk: Sdk, gateway: Served) -> None:
    async with sdk.caller(gateway.url, gateway.key("roomy", "--models", OTHER)) as caller:
        assert text(await caller.ask(PROMPT, model=OTHER, max_tokens=1)) == "to"
        with pytest.raises(sdk.package.PermissionDeniedError) as caught:
            await caller.ask(PROMPT)
    assert refused(caught.value) == ("permission_error", "permission_denied", "model")


async def test_a_bad_value_is_told_in_both_shapes(caller: Caller, backend: Backend) -> None:
    with pytest.raises(caller.sdk.package.UnprocessableEntityError) as caught:
        await caller.ask(PROMPT, temperature=5)
    assert refused(caught.value) == ("invalid_request_error", "invalid_request_error", "temperature")
    (detail,) = caught.value.response.json()["detail"]
    assert (detail["loc"], detail["type"]) == (["body", "temperature"], "value_error")
    assert "found 5, expected a number from 0 to 2" in detail["msg"]
    assert await statuses(backend, caller) == []


async def test_who_is_over_a_rate_is_told_when_to_come_back(sdk: Sdk, gateway: Served, backend: Backend) -> None:
    async with sdk.caller(gateway.url, gateway.key("one-at-a-time")) as caller:

        async def hurry() -> None:
            for _ in range(20):
                await caller.ask(PROMPT)

        with pytest.raises(sdk.package.RateLimitError) as caught:
            await hurry()
    assert refused(caught.value) == ("rate_limit_error", "rate_limit_exceeded", None)
    headers = caught.value.response.headers
    assert headers["retry-after"] == "1"
    assert 0 < int(headers["retry-after-ms"]) <= 200
    assert headers["x-ratelimit-remaining-requests"] == "0"
    answered = await statuses(backend, caller)
    lines = await gateway.log.wait(caller.called, len(answered) + 1)
    assert [line["http.response.status_code"] for line in lines] == [*[200] * len(answered), 429]


async def test_a_client_that_may_try_again_waits_as_told_and_succeeds(
    sdk: Sdk, gateway: Served, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    requests = 4
    async with sdk.caller(gateway.url, gateway.key("one-at-a-time"), max_retries=2) as caller:
        with caplog.at_level(logging.INFO, sdk.package.__name__):
            for _ in range(requests):
                assert text(await caller.ask(PROMPT, max_tokens=1)) == "to"
    waits = [float(wait) for wait in re.findall(r"Retrying request.* in ([\d.]+) seconds", caplog.text)]
    lines = await gateway.log.wait(caller.called, requests + len(waits))

    assert waits  # of its own an SDK waits for at least 0.375 seconds
    assert all(0 < wait <= 0.2 for wait in waits)
    answered = [line["sdk_retry_count"] for line in lines if line["http.response.status_code"] == 200]
    sent_away = [line["sdk_retry_count"] for line in lines if line["http.response.status_code"] == 429]
    assert (sum(answered), sent_away) == (len(waits), [0] * len(waits))  # told once was enough
    assert len(answered) == requests
    assert await statuses(backend, caller) == ["complete"] * requests


async def test_an_exhausted_quota_is_told_at_once_and_not_asked_again(
    sdk: Sdk, gateway: Served, backend: Backend
) -> None:
    async with sdk.caller(gateway.url, gateway.key("one-for-all"), max_retries=3) as caller:
        await caller.ask(PROMPT)
        with pytest.raises(sdk.package.RateLimitError) as caught:
            await caller.ask(PROMPT)
        assert refused(caught.value) == ("insufficient_quota", "insufficient_quota", None)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert "retry-after" not in caught.value.response.headers
        with pytest.raises(sdk.package.RateLimitError):
            await caller.ask(PROMPT)
    lines = await gateway.log.wait(caller.called, 3)
    told = [(line["http.response.status_code"], line["sdk_retry_count"]) for line in lines]
    assert told == [(200, 0), (429, 0), (429, 0)]
    assert await statuses(backend, caller) == ["complete"]


# — failures of the backend


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_backend_passes_as_it_is_and_costs_nothing(
    caller: Caller, gateway: Served, backend: Backend, stream: bool
) -> None:
    with pytest.raises(caller.sdk.package.InternalServerError) as caught:
        await caller.ask(f"{PROMPT} #status=503 #retry-after=0", stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "0"
    assert caught.value.response.json()["error"]["message"] == "the script says so"
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "none", 0, 0)
    assert await statuses(backend, caller) == ["complete"]


@apis
async def test_a_stream_that_is_cut_never_looks_complete(
    caller: Caller, gateway: Served, backend: Backend, api: Api
) -> None:
    stream = await caller.ask(f"{PROMPT} #cut=3", api, max_tokens=6, stream=True)
    with pytest.raises(caller.sdk.cut):
        await rest(stream)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["error.type"]) == ("upstream", "upstream_disconnected")
    (row,) = await backend.rows(caller.called)
    assert (row["status"], row["completion_tokens"]) == ("aborted", 3)


async def test_a_whole_answer_that_is_cut_is_none(caller: Caller, gateway: Served) -> None:
    with pytest.raises(caller.sdk.package.APIConnectionError):
        await caller.ask(f"{PROMPT} #cut=3", max_tokens=6)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["error.type"]) == ("upstream", "upstream_disconnected")


async def test_who_does_not_wait_for_an_answer_stops_the_backend(
    caller: Caller, gateway: Served, backend: Backend
) -> None:
    with pytest.raises(caller.sdk.package.APITimeoutError):
        await caller.ask(f"{PROMPT} #delay=60", timeout=0.2)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["http.response.status_code"]) == ("client", 499)
    assert await statuses(backend, caller) == ["aborted"]

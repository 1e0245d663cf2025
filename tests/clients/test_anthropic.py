"""What the Anthropic SDK sees: the messages, and errors and limits in Anthropic's own words."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest

from tests.clients.sdks import ALIAS, ANTHROPIC, MODEL, MODELS, OTHER, Caller, Sdk, done, rest, take
from tests.clients.served import Backend, Served

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("sdk", ANTHROPIC, indirect=True)]

PROMPT = "to be or not"


async def say(caller: Caller, prompt: str = PROMPT, raw: bool = False, **given: Any) -> Any:
    """The message that answers, or its stream; `raw`: the response that it comes in."""
    messages = [{"role": "user", "content": prompt}]
    asked = {"model": MODEL, "messages": messages, "max_tokens": 6, "extra_headers": caller.named}
    resource = caller.client.messages
    return await done((resource.with_raw_response if raw else resource).create(**{**asked, **given}))


def counted(line: dict[str, Any]) -> tuple[str, str, int, int, int]:
    return line["outcome"], line["usage_source"], line["input_tokens"], line["cached_tokens"], line["output_tokens"]


async def test_a_message_is_the_backends_text_and_usage(caller: Caller, gateway: Served, backend: Backend) -> None:
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "very brief"}]
    message = await say(caller, system=parts, model=ALIAS)
    assert [block.text for block in message.content] == ["to be or not to be"]
    assert (message.model, message.stop_reason) == (MODEL, "max_tokens")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 6)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "upstream", 7, 0, 6)
    (row,) = await backend.rows(caller.called)
    assert (row["path"], row["model"]) == ("/v1/messages", MODEL)


async def test_what_came_from_a_cache_counts_as_input(caller: Caller, gateway: Served) -> None:
    for stream in (False, True):
        answer = await say(caller, f"{PROMPT} #cached=3", stream=stream)
        usage = (await rest(answer))[0].message.usage if stream else answer.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens) == (2, 3)
    for line in await gateway.log.wait(caller.called, 2):
        assert counted(line) == ("complete", "upstream", 5, 3, 6)


async def test_a_stream_has_the_events_of_the_api(caller: Caller, gateway: Served) -> None:
    events = await rest(await say(caller, f"{PROMPT} #tokens=2", stream=True))
    assert [event.type for event in events] == [
        *("message_start", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "upstream", 5, 0, 2)


async def texts(stream: Any) -> AsyncIterator[str]:
    """The pieces of text of an accumulating stream of either client."""
    if hasattr(stream.text_stream, "__aiter__"):
        async for piece in stream.text_stream:
            yield piece
    else:
        for piece in stream.text_stream:
            yield piece


async def test_a_stream_adds_up_to_the_message(caller: Caller) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    manager = caller.client.messages.stream(model=MODEL, messages=messages, max_tokens=6)
    asynchronous = hasattr(manager, "__aenter__")
    stream = await manager.__aenter__() if asynchronous else manager.__enter__()
    try:
        assert "".join([piece async for piece in texts(stream)]) == "to be or not to be"
        message = await done(stream.get_final_message())
    finally:
        await (manager.__aexit__(None, None, None) if asynchronous else done(manager.__exit__(None, None, None)))
    assert [block.text for block in message.content] == ["to be or not to be"]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("max_tokens", 4, 6)


async def test_an_error_inside_a_stream_is_raised(caller: Caller) -> None:
    stream = await say(caller, f"{PROMPT} #error=2", stream=True)
    await take(stream, 4)
    with pytest.raises(anthropic.APIStatusError, match="the script ends here"):
        await rest(stream)


async def test_a_stream_that_is_cut_ends_with_an_error(caller: Caller, gateway: Served) -> None:
    stream = await say(caller, f"{PROMPT} #cut=3", stream=True)
    with pytest.raises(caller.sdk.cut):
        await rest(stream)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["error.type"]) == ("upstream", "upstream_disconnected")


async def test_the_key_is_taken_as_x_api_key_too(sdk: Sdk, gateway: Served) -> None:
    key = gateway.key("roomy")
    async with sdk.caller(gateway.url, "no-key-at-all") as caller:
        headers = {**caller.named, "Authorization": anthropic.Omit(), "x-api-key": key}
        assert (await say(caller, extra_headers=headers)).content[0].text == "to be or not to be"
    (line,) = await gateway.log.wait(caller.called, 1)
    assert line["http.response.status_code"] == 200


def refused(error: anthropic.APIStatusError, caller: Caller) -> str:
    """The kind of an error that has Anthropic's shape, and names the request alike in body and header."""
    body, headers = error.response.json(), error.response.headers
    assert (set(body), body["type"]) == ({"type", "error", "request_id"}, "error")
    assert set(body["error"]) >= {"type", "message"}
    assert error.request_id == body["request_id"]
    assert error.request_id in (caller.called, headers["x-gateway-request-id"])
    return str(body["error"]["type"])


async def test_a_wrong_key_is_no_authentication(sdk: Sdk, gateway: Served) -> None:
    async with sdk.caller(gateway.url, "sk-ant-nobody") as caller:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await say(caller)
    assert refused(caught.value, caller) == "authentication_error"


async def test_a_model_that_nobody_knows_is_not_found(caller: Caller) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await say(caller, model="nobodys")
    assert refused(caught.value, caller) == "not_found_error"


async def test_a_model_that_is_not_for_this_key_is_denied(sdk: Sdk, gateway: Served) -> None:
    async with sdk.caller(gateway.url, gateway.key("roomy", "--models", OTHER)) as caller:
        with pytest.raises(anthropic.PermissionDeniedError) as caught:
            await say(caller)
    assert refused(caught.value, caller) == "permission_error"


async def test_all_bad_values_are_told_at_once(caller: Caller, backend: Backend) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await say(caller, extra_body={"temperature": 5, "top_p": 2})
    assert refused(caught.value, caller) == "invalid_request_error"
    assert [name for name in ("temperature", "top_p") if name in caught.value.message] == ["temperature", "top_p"]
    assert await backend.rows(caller.called) == []


async def test_an_answer_tells_where_the_caller_stands(caller: Caller) -> None:
    headers = (await say(caller, raw=True)).headers
    assert headers["anthropic-ratelimit-requests-limit"] == "100000"
    assert int(headers["anthropic-ratelimit-requests-remaining"]) < 100_000
    assert headers["anthropic-ratelimit-tokens-limit"] == "1000000000"
    for count in ("requests", "tokens"):
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", headers[f"anthropic-ratelimit-{count}-reset"])
    assert headers["request-id"] == caller.called


async def test_who_is_over_a_rate_is_told_when_to_come_back(sdk: Sdk, gateway: Served) -> None:
    async with sdk.caller(gateway.url, gateway.key("one-at-a-time")) as caller:

        async def hurry() -> None:
            for _ in range(20):
                await say(caller, metadata={"user_id": caller.called})

        with pytest.raises(anthropic.RateLimitError) as caught:
            await hurry()
    assert refused(caught.value, caller) == "rate_limit_error"
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["anthropic-ratelimit-requests-remaining"]) == ("1", "0")


async def test_an_exhausted_quota_is_not_asked_again(sdk: Sdk, gateway: Served) -> None:
    async with sdk.caller(gateway.url, gateway.key("one-for-all"), max_retries=3) as caller:
        owner = {"user_id": caller.called}
        await say(caller, metadata=owner)
        with pytest.raises(anthropic.RateLimitError) as caught:
            await say(caller, metadata=owner)
    assert caught.value.response.headers["x-should-retry"] == "false"
    lines = await gateway.log.wait(caller.called, 2)
    assert [line["http.response.status_code"] for line in lines] == [200, 429]


async def test_an_error_of_the_backend_passes_as_it_is(caller: Caller) -> None:
    with pytest.raises(anthropic.InternalServerError) as caught:
        await say(caller, f"{PROMPT} #status=529")
    assert refused(caught.value, caller) == "overloaded_error"
    assert "the script says so" in caught.value.message


async def test_models_are_listed_and_found_by_name(caller: Caller) -> None:
    listed = await done(caller.client.models.list())
    assert [model.id for model in listed.data] == MODELS
    found = await done(caller.client.models.retrieve(MODEL))
    assert (found.id, found.display_name, found.type, found.created_at.year) == (MODEL, MODEL, "model", 1970)
    with pytest.raises(anthropic.NotFoundError):
        await done(caller.client.models.retrieve("nobodys/model"))

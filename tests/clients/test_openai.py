"""What the OpenAI SDK sees and no other."""

from __future__ import annotations

import openai
import pytest

from tests.clients.sdks import MODEL, OTHER, Caller, Sdk, done, rest, take, text
from tests.clients.served import Backend, Served

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("sdk", ["openai", "openai-async"], indirect=True)]


async def test_models_are_those_that_the_key_may_use(sdk: Sdk, gateway: Served) -> None:
    listed = []
    for key in (gateway.key("roomy"), gateway.key("roomy", "--models", OTHER)):
        async with sdk.caller(gateway.url, key) as caller:
            listed.append([model.id for model in (await done(caller.client.models.list())).data])
    assert listed == [[MODEL, OTHER], [OTHER]]


async def test_an_answer_and_an_error_tell_the_request_id(caller: Caller, gateway: Served) -> None:
    answer = await caller.ask("to be")
    with pytest.raises(openai.NotFoundError) as caught:
        await caller.ask("to be", model="none")
    assert [answer._request_id, caught.value.request_id] == [caller.called] * 2
    lines = await gateway.log.wait(caller.called, 2)
    assert [line["http.response.status_code"] for line in lines] == [200, 404]


async def test_an_error_has_type_code_and_param(caller: Caller) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await caller.ask("to be", model="none")
    error = caught.value
    assert (error.type, error.code, error.param) == ("invalid_request_error", "model_not_found", "model")


async def test_usage_that_is_asked_for_comes_in_a_chunk_of_its_own(caller: Caller, gateway: Served) -> None:
    stream = await caller.ask("to be", "chat", stream=True, stream_options={"include_usage": True}, max_tokens=2)
    *chunks, last = await rest(stream)
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert (last.choices, last.usage.total_tokens) == ([], 4)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["usage_source"], line["input_tokens"], line["output_tokens"]) == ("upstream", 2, 2)


async def test_an_error_inside_a_stream_is_raised(caller: Caller, backend: Backend) -> None:
    stream = await caller.ask("to be or not #error=2", stream=True)
    assert "".join(map(text, await take(stream, 2))) == "to be"
    with pytest.raises(openai.APIError) as caught:
        await rest(stream)
    assert type(caught.value) is openai.APIError  # told by the backend; the connection held
    assert [row["status"] for row in await backend.rows(caller.called)] == ["complete"]

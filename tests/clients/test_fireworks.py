"""What the Fireworks SDK sees and no other."""

from __future__ import annotations

import json

import fireworks
import pytest

from tests.clients.sdks import MODEL, MODELS, Caller, done, rest, text
from tests.clients.served import Backend, Served

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("sdk", ["fireworks", "fireworks-async"], indirect=True)]


async def test_models_stand_where_the_inference_api_has_them(caller: Caller) -> None:
    listed = await done(caller.client.get("/inference/v1/models", cast_to=object))
    assert [model["id"] for model in listed["data"]] == MODELS


async def test_the_api_of_accounts_is_not_the_gateways(caller: Caller) -> None:
    with pytest.raises(fireworks.NotFoundError, match="no such path; see /v1/models"):
        await done(caller.client.models.list(account_id="acme"))


async def test_its_own_parameters_reach_the_backend_in_its_words(caller: Caller, backend: Backend) -> None:
    thinking = {"type": "enabled"}
    answer = await caller.ask("to be", max_completion_tokens=3, prediction="or not", thinking=thinking, top_k=5)
    assert text(answer) == "to be to"
    (row,) = await backend.rows(caller.called)
    body = json.loads(row["body"])
    told = ("max_tokens", "speculation", "reasoning_effort", "top_k")
    assert [body[name] for name in told] == [3, "or not", "medium", 5]
    assert set(body) == {"model", "prompt", "user", *told}


async def test_performance_metrics_come_in_headers_and_where_asked_for_in_the_answer(caller: Caller) -> None:
    response = await caller.ask("to be or not #cached=3", raw=True, perf_metrics_in_response=True)
    answer = await done(response.parse())
    assert response.headers["fireworks-cached-prompt-tokens"] == "3"
    assert answer.perf_metrics["cached-prompt-tokens"] == 3


async def test_an_error_inside_a_stream_is_a_chunk_and_what_was_said_before_is_charged(
    caller: Caller, gateway: Served
) -> None:
    *said, failed = await rest(await caller.ask("to be or not #error=2", stream=True))
    assert "".join(map(text, said)) == "to be"
    assert failed.error["code"] == "server_error"
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["usage_source"]) == ("complete", "counted")
    assert line["output_tokens"] >= 2


async def test_its_messages_are_anthropics(caller: Caller, gateway: Served, backend: Backend) -> None:
    asked = {"messages": [{"role": "user", "content": "to be or not"}], "model": MODEL, "extra_headers": caller.named}
    message = await done(caller.client.messages.create(max_tokens=6, **asked))
    assert [block.text for block in message.content] == ["to be or not to be"]
    assert [message.usage[f"{kind}_tokens"] for kind in ("input", "output")] == [4, 6]
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["usage_source"], line["input_tokens"], line["output_tokens"]) == ("upstream", 4, 6)
    assert [row["path"] for row in await backend.rows(caller.called)] == ["/v1/messages"]

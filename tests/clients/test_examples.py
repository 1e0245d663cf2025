"""The examples of the two references, as these print them."""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from typing import Any

import httpx
import pytest
from fireworks.types import CompletionChunk, CompletionCreateResponse
from fireworks.types.shared import LogProbs

from tests.clients.sdks import NEWER
from tests.clients.served import Backend, Served

pytestmark = pytest.mark.anyio

# completions-api-old.txt
CURL = """\
curl --request POST \\
  --url https://api.fireworks.ai/inference/v1/completions \\
  --header 'Authorization: Bearer <token>' \\
  --header 'Content-Type: application/json' \\
  --data '{
  "model": "accounts/fireworks/models/llama-v2-7b",
  "prompt": "The sky is",
  "images": [
    "<string>"
  ],
  "max_tokens": 16,
  "logprobs": 2,
  "echo": true,
  "temperature": 1,
  "top_p": 1,
  "top_k": 50,
  "frequency_penalty": 0,
  "presence_penalty": 0,
  "n": 1,
  "stop": "<string>",
  "response_format": {
    "type": "json_object",
    "schema": {}
  },
  "stream": true,
  "context_length_exceeded_behavior": "truncate",
  "user": "<string>"
}'
"""

# completions-api.md: its examples, then its defaults; a member that has neither may be null, but for the prompt.
EXAMPLES = {"model": NEWER, "n": 1, "temperature": 1, "top_k": 50, "top_p": 1}
DEFAULTS = {
    "raw_output": False,
    "perf_metrics_in_response": False,
    "stream": False,
    "echo": False,
    "ignore_eos": False,
    "context_length_exceeded_behavior": "truncate",
    "return_token_ids": False,
}
WITH_NEITHER = [
    *("user", "prompt_cache_isolation_key", "stop", "max_tokens", "max_completion_tokens", "min_p", "typical_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "mirostat_target", "mirostat_lr", "seed"),
    *("logprobs", "top_logprobs", "echo_last", "response_format", "logit_bias", "speculation", "prediction"),
    *("metadata", "reasoning_effort", "reasoning_history", "thinking", "images"),
]
BODY: dict[str, Any] = {"prompt": "The sky is", **EXAMPLES, **DEFAULTS, **dict.fromkeys(WITH_NEITHER)}

# What it prints in its prose, each with what the backend is told instead where that is said in other words.
PRINTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"response_format": {"type": "json_object"}}, {}),
    ({"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}}, {}),
    ({"repetition_penalty": 1.2}, {}),
    ({"temperature": 0.8}, {}),
    ({"temperature": 0.2, "top_p": 0.1}, {}),
    ({"logprobs": 5}, {}),
    ({"logprobs": True, "top_logprobs": 5}, {}),
    ({"images": ["data:image/jpeg;base64,/9j/"], "prompt": "<image> is"}, {}),
    ({"reasoning_effort": True}, {"reasoning_effort": "medium"}),
    ({"reasoning_effort": False}, {"reasoning_effort": "none"}),
    ({"reasoning_history": "preserved"}, {}),
    ({"thinking": {"type": "enabled"}}, {"reasoning_effort": "medium"}),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning_effort": 1024}),
    ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
    ({"prompt": [[1, 2], [3]]}, {}),
]


def given(body: dict[str, Any]) -> dict[str, Any]:
    """The members that say something: null is as good as absent."""
    return {name: value for name, value in body.items() if value is not None}


async def test_the_older_references_curl_streams_a_completion(gateway: Served, backend: Backend) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine (Debian: apt-get install curl)")
    called = f"test-{uuid.uuid4().hex}"
    command = CURL.replace("https://api.fireworks.ai", gateway.url).replace("<token>", gateway.key("roomy"))
    # Beside what is printed: a name, to find the request again.
    command = command.replace("curl ", f"curl --header 'x-request-id: {called}' ", 1)
    curl = await asyncio.create_subprocess_shell(
        command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    told, _ = await curl.communicate()
    *events, end, rest = told.decode().split("\n\n")
    assert (curl.returncode, end, rest) == (0, "data: [DONE]", "")
    chunks = [CompletionChunk.model_validate_json(event.removeprefix("data: "), strict=True) for event in events]
    said = "".join(chunk.choices[0].text for chunk in chunks)
    assert said == "The sky is" + " The sky is" * 5 + " The"
    logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    assert [len(found.tokens or ()) for found in logprobs if isinstance(found, LogProbs)] == [1] * 16
    assert chunks[-1].usage is not None
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].usage.total_tokens) == ("length", 19)
    (row,) = await backend.rows(called)
    assert json.loads(CURL.partition("--data '")[2].rpartition("'")[0]) == json.loads(row["body"])


async def ask(gateway: Served, called: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"authorization": f"Bearer {gateway.key('roomy')}", "x-request-id": called}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers) as client:
        return await client.post("/inference/v1/completions", json=body)


async def test_the_newer_references_examples_and_defaults_are_a_request(gateway: Served, backend: Backend) -> None:
    called = f"test-{uuid.uuid4().hex}"
    assert len(BODY) == 38
    answer = await ask(gateway, called, BODY)
    assert answer.status_code == 200, answer.text
    read = CompletionCreateResponse.model_validate(answer.json(), strict=True)
    assert (read.model, read.choices[0].text) == (NEWER, " ".join(["The sky is"] * 5) + " The")
    (row,) = await backend.rows(called)
    assert given(BODY) == given(json.loads(row["body"]))


@pytest.mark.parametrize(("printed", "instead"), PRINTED, ids=lambda value: json.dumps(value)[1:-1] or "the same")
async def test_what_the_newer_reference_prints_in_its_prose_is_taken_at_its_word(
    gateway: Served, backend: Backend, printed: dict[str, Any], instead: dict[str, Any]
) -> None:
    called = f"test-{uuid.uuid4().hex}"
    answer = await ask(gateway, called, {**BODY, **printed})
    assert answer.status_code == 200, answer.text
    (row,) = await backend.rows(called)
    told = {name: value for name, value in printed.items() if name != "thinking"}
    assert given({**BODY, **told, **instead}) == given(json.loads(row["body"]))

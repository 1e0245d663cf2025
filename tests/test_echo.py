"""The scripted backend over real sockets: what it says, how it misbehaves, and that its ledger is right."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import re
import socket
import struct
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from anthropic.types import Message as AnthropicMessage
from fireworks import AsyncFireworks
from fireworks.types import CompletionChunk, CompletionCreateResponse
from hypothesis import given
from hypothesis import strategies as st
from openai import APIError, AsyncOpenAI
from openai.types import Completion, CreateEmbeddingResponse, ImagesResponse
from openai.types.audio import Transcription
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from starlette.requests import Request

from gateway import echo, echoes

Json = dict[str, Any]
TEXT, CHAT, LEDGER = "/v1/completions", "/v1/chat/completions", "/echo/ledger"
RESPONSES, MESSAGES, HEARD = "/v1/responses", "/v1/messages", "/v1/audio/transcriptions"
TRANSLATED = "/v1/audio/translations"
FOREVER = 600  # seconds: who waits for the end of it has hung


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """The address of a backend with a ledger of its own."""
    config = uvicorn.Config(
        echo.create_app(), log_config=None, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server.serve([listening]))
        try:
            yield "http://{}:{}".format(*listening.getsockname())
        finally:
            server.should_exit = True
            await task


@pytest.fixture(scope="module")
async def address() -> AsyncIterator[str]:
    async with serving() as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        await client.delete(LEDGER)
        yield client


def text(prompt: object, **more: object) -> Json:
    return {"model": "any", "prompt": prompt, **more}


def chat(*messages: tuple[str, object], **more: object) -> Json:
    return {"model": "any", "messages": [{"role": role, "content": content} for role, content in messages], **more}


def events_of(stream: str) -> list[Json]:
    """The JSON of a data-only stream that ends as it should."""
    *events, end, rest = stream.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def ask(client: httpx.AsyncClient, body: Json, script: str = "") -> httpx.Response:
    return await post(client, CHAT if "messages" in body else TEXT, body, script)


async def post(client: httpx.AsyncClient, path: str, body: Json, script: str = "") -> httpx.Response:
    return await client.post(path, json={"model": "any", **body}, headers={"x-echo": script} if script else {})


async def told(client: httpx.AsyncClient, body: Json, script: str = "") -> list[Json]:
    """The events of a stream."""
    return events_of((await ask(client, {**body, "stream": True}, script)).text)


async def entry(client: httpx.AsyncClient, *awaited: str) -> Json:
    """The one row of the ledger, as soon as it has one of these states; by default, any that is an end."""
    async with asyncio.timeout(10):
        while True:
            rows = (await client.get(LEDGER)).json()
            if rows and rows[-1]["status"] in (awaited or ("complete", "aborted")):
                (row,) = rows
                return dict(row)


def named_events_of(stream: str) -> list[Json]:
    """The JSON of a stream whose events bear the names of their types."""
    *events, rest = stream.split("\n\n")
    assert rest == ""
    named = [re.fullmatch(r"event: (.+)\ndata: (.+)", event) for event in events]
    told = [(match[1], json.loads(match[2])) for match in named if match]
    assert len(events) == len(told)
    assert [name for name, _ in told] == [data["type"] for _, data in told]
    return [data for _, data in told]


def words_of(events: list[Json], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def usage(prompt: int, completion: int, cached: int = 0) -> Json:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


# — what it says


async def test_a_completion_repeats_the_words_of_its_prompt_and_counts_them(client: httpx.AsyncClient) -> None:
    answer = (await ask(client, text("to be or", max_tokens=5))).json()
    Completion.model_validate(answer, strict=True)
    CompletionCreateResponse.model_validate(answer, strict=True)
    choice = {"index": 0, "text": "to be or to be", "logprobs": None, "finish_reason": "length"}
    assert [choice] == answer["choices"]
    assert usage(3, 5) == answer["usage"]
    assert (answer["object"], answer["model"]) == ("text_completion", "any")


async def test_a_chat_repeats_the_last_user_message_and_counts_all_of_them(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "to be"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    body = chat(("system", "be brief"), ("user", parts), ("assistant", None), max_completion_tokens=3)
    answer = (await ask(client, body)).json()
    ChatCompletion.model_validate(answer, strict=True)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "to be to"}
    assert usage(4, 3) == answer["usage"]


async def test_sixteen_words_are_said_where_nothing_else_is_asked(client: httpx.AsyncClient) -> None:
    (choice,) = (await ask(client, text("word"))).json()["choices"]
    assert (len(choice["text"].split()), choice["finish_reason"]) == (16, "length")


@pytest.mark.parametrize(
    ("prompt", "tokens", "texts"),
    [
        (["a b", "c"], 3, ["a b", "c c"]),
        ([7, 8, 9], 3, ["7 8"]),
        ([[7, 8], [9]], 3, ["7 8", "9 9"]),
        ("", 0, ["echo echo"]),
    ],
)
async def test_every_form_of_prompt_is_read(
    client: httpx.AsyncClient, prompt: object, tokens: int, texts: list[str]
) -> None:
    answer = (await ask(client, text(prompt, max_tokens=2))).json()
    assert texts == [choice["text"] for choice in answer["choices"]]
    assert usage(tokens, 2 * len(texts)) == answer["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_and_n_make_several_choices(client: httpx.AsyncClient, stream: bool) -> None:
    body = text(["a", "b"], n=2, max_tokens=2)
    events = await told(client, body) if stream else [(await ask(client, body)).json()]
    assert [words_of(events, index) for index in range(5)] == ["a a", "a a", "b b", "b b", ""]
    assert usage(2, 8) == events[-1]["usage"]
    assert (await entry(client))["completion_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_says_the_prompt_first_and_does_not_count_it(client: httpx.AsyncClient, stream: bool) -> None:
    body = text("to  be ", echo=True, max_tokens=1)
    events = await told(client, body) if stream else [(await ask(client, body)).json()]
    assert words_of(events) == "to  be  to"
    assert usage(2, 1) == events[-1]["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_the_legacy_arrays_and_offsets_point_into_the_text(
    client: httpx.AsyncClient, stream: bool
) -> None:
    body = text("to be", logprobs=1, echo=True, max_tokens=2)
    events = await told(client, body) if stream else [(await ask(client, body)).json()]
    said = words_of(events)
    probed = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    tokens = [token for p in probed for token in p["tokens"]]
    assert tokens == [" to", " be"]
    assert tokens == [said[at : at + 3] for p in probed for at in p["text_offset"]]
    assert [list(top.values()) for p in probed for top in p["top_logprobs"]] == [[-0.5], [-0.5]]


@pytest.mark.parametrize("stream", [False, True])
async def test_performance_metrics_are_headers_and_on_request_members(client: httpx.AsyncClient, stream: bool) -> None:
    for asked in (False, True):
        answer = await ask(client, text("to be", stream=stream, perf_metrics_in_response=asked))
        last = events_of(answer.text)[-1] if stream else answer.json()
        assert answer.headers["fireworks-prompt-tokens"] == "2"
        assert 0 <= float(answer.headers["fireworks-server-time-to-first-token"]) < 10
        assert asked == ("perf_metrics" in last)
    assert last["perf_metrics"]["prompt-tokens"] == 2


async def test_a_stream_is_an_event_a_token_with_usage_in_the_finish_chunk(client: httpx.AsyncClient) -> None:
    answer = await ask(client, text("to be", max_tokens=3, stream=True))
    assert answer.headers["content-type"] == "text/event-stream"
    events = events_of(answer.text)
    for event in events:
        CompletionChunk.model_validate(event, strict=True)
    assert [event["choices"][0]["text"] for event in events] == ["to", " be", " to", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert [None, None, None, usage(2, 3)] == [event.get("usage") for event in events]


async def test_a_chat_stream_names_its_role_first(client: httpx.AsyncClient) -> None:
    events = await told(client, chat(("user", "to be"), max_tokens=2))
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
    deltas = [{"role": "assistant", "content": ""}, {"content": "to"}, {"content": " be"}, {}]
    assert deltas == [event["choices"][0]["delta"] for event in events]


async def test_stream_options_ask_for_usage_in_a_chunk_of_its_own(client: httpx.AsyncClient) -> None:
    events = await told(client, chat(("user", "to be"), max_tokens=1, stream_options={"include_usage": True}))
    assert [None, None, None, usage(2, 1)] == [event["usage"] for event in events]
    assert [len(event["choices"]) for event in events] == [1, 1, 1, 0]


async def test_both_sdks_read_its_streams(address: str) -> None:
    async with AsyncOpenAI(api_key="any", base_url=f"{address}/v1") as openai:
        chunks = await openai.completions.create(model="any", prompt="to be", max_tokens=2, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in chunks]) == "to be"
    async with AsyncFireworks(api_key="any", base_url=address) as fireworks:
        parts = await fireworks.completions.create(model="any", prompt="to be", max_tokens=2, stream=True)
        assert "".join([part.choices[0].text async for part in parts]) == "to be"


async def test_the_request_id_of_the_caller_comes_back(client: httpx.AsyncClient) -> None:
    answer = await client.post(TEXT, json=text("to be"), headers={"x-request-id": "req-1"})
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("req-1", "cmpl-req-1")
    assert (await entry(client))["id"] == "req-1"


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model":"any"}', b'{"model":"any","prompt":"\xff"}', b"{}"])
async def test_what_it_cannot_read_is_a_bad_request(client: httpx.AsyncClient, body: bytes) -> None:
    for path in (TEXT, CHAT):
        answer = await client.post(path, content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_it_is_healthy_has_a_model_and_explains_itself(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["echo"]
    assert echo.__doc__ == (await client.get("/")).text


async def test_with_a_key_in_the_environment_no_other_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ECHO_KEY", "secret")
    async with serving() as address, httpx.AsyncClient(base_url=address) as client:
        for headers in ({}, {"authorization": "Bearer other"}):
            posted = await client.post(TEXT, json=text("to be"), headers=headers)
            listed = await client.get("/v1/models", headers=headers)
            assert [posted.status_code, listed.status_code] == [401, 401]
            assert "secret" not in posted.text + listed.text
        known = {"authorization": "Bearer secret"}
        posted = await client.post(TEXT, json=text("to be"), headers=known)
        listed = await client.get("/v1/models", headers=known)
        assert [posted.status_code, listed.status_code] == [200, 200]


# — the other APIs


def response_usage(prompt: int, output: int, cached: int = 0) -> Json:
    counts = {"input_tokens": prompt, "output_tokens": output, "total_tokens": prompt + output}
    details = {"input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0}}
    return {**counts, **details, "output_tokens_details": {"reasoning_tokens": 0}}


async def test_a_response_repeats_the_last_user_message_and_counts_instructions_too(client: httpx.AsyncClient) -> None:
    parts = [{"type": "input_text", "text": "to be"}]
    items = [{"role": "user", "content": "hush"}, {"role": "user", "content": parts}, {"type": "reasoning"}]
    for told, prompt in (("to be", 2), (items, 3)):
        body = {"input": told, "instructions": "be brief", "max_output_tokens": 3}
        answer = (await post(client, RESPONSES, body, "cached=1")).json()
        read = Response.model_validate(answer, strict=True)
        assert (read.output_text, read.status) == ("to be to", "incomplete")
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response_usage(prompt + 2, 3, cached=1) == answer["usage"]


async def test_a_streamed_response_has_named_and_numbered_events(client: httpx.AsyncClient) -> None:
    answer = await post(client, RESPONSES, {"input": "to be #tokens=3", "stream": True})
    events = named_events_of(answer.text)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 3,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in events[4:7]) == events[7]["text"] == "to be to"
    Response.model_validate(events[0]["response"], strict=True)
    read = Response.model_validate(events[-1]["response"], strict=True)
    assert (read.output_text, read.status) == ("to be to", "completed")
    assert response_usage(3, 3) == events[-1]["response"]["usage"]
    assert [event["response"]["usage"] for event in events[:2]] == [None, None]
    assert (await entry(client))["completion_tokens"] == 3


async def test_an_anthropic_message_repeats_the_last_user_message_and_counts_them_all(
    client: httpx.AsyncClient,
) -> None:
    parts = [{"type": "text", "text": "to be"}]
    body = {"system": "be brief", "messages": [{"role": "user", "content": parts}], "max_tokens": 3}
    answer = (await post(client, MESSAGES, body, "cached=1")).json()
    AnthropicMessage.model_validate(answer, strict=True)
    assert answer["content"] == [{"type": "text", "text": "to be to"}]
    assert answer["stop_reason"] == "max_tokens"
    counts = {"input_tokens": 3, "cache_read_input_tokens": 1, "cache_creation_input_tokens": 0, "output_tokens": 3}
    assert counts == answer["usage"]
    assert (await entry(client))["prompt_tokens"] == 4


async def test_an_anthropic_stream_tells_input_first_and_output_last(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "to be #tokens=2"}], "max_tokens": 9, "stream": True}
    events = named_events_of((await post(client, MESSAGES, body)).text)
    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start", "ping"),
        *["content_block_delta"] * 2,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    begun = events[0]["message"]
    AnthropicMessage.model_validate(begun, strict=True)
    assert (begun["usage"]["input_tokens"], begun["usage"]["output_tokens"]) == (3, 0)
    assert "".join(event["delta"]["text"] for event in events[3:5]) == "to be"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == {"output_tokens": 2}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (529, "overloaded_error"),
    ],
)
async def test_errors_of_messages_have_anthropics_shape(client: httpx.AsyncClient, status: int, kind: str) -> None:
    body = {"messages": [{"role": "user", "content": f"a #status={status}"}], "max_tokens": 1}
    answer = await post(client, MESSAGES, body)
    called = answer.headers["request-id"]
    error = {"type": kind, "message": "the script says so"}
    assert (answer.status_code, answer.json()) == (status, {"type": "error", "error": error, "request_id": called})


async def test_an_embedding_is_the_same_in_both_formats_and_of_the_length_that_is_asked_for(
    client: httpx.AsyncClient,
) -> None:
    body = {"input": ["to be", "or not to be", "to be"], "dimensions": 5}
    floats = (await post(client, "/v1/embeddings", body)).json()
    packed = (await post(client, "/v1/embeddings", {**body, "encoding_format": "base64"})).json()
    CreateEmbeddingResponse.model_validate(floats, strict=True)
    vectors = [row["embedding"] for row in floats["data"]]
    assert vectors == [[*struct.unpack("<5f", base64.b64decode(row["embedding"]))] for row in packed["data"]]
    assert vectors[0] == vectors[2] != vectors[1]
    assert [row["index"] for row in floats["data"]] == [0, 1, 2]
    assert floats["usage"] == packed["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    plain = (await post(client, "/v1/embeddings", {"input": [7, 8]})).json()
    assert [len(row["embedding"]) for row in plain["data"]] == [echoes.DIMENSIONS]
    assert all(-1 <= number < 1 for number in plain["data"][0]["embedding"])


async def test_a_rerank_puts_the_documents_first_that_have_the_words(client: httpx.AsyncClient) -> None:
    documents = ["or not", {"text": "to be or"}, "what is to come", "to be"]
    body = {"query": "to be #tokens=9", "documents": documents, "top_n": 3}
    answer = (await post(client, "/v1/rerank", {**body, "return_documents": True})).json()
    assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(1, 1.0), (3, 1.0), (2, 0.5)]
    assert [r["document"]["text"] for r in answer["results"]] == ["to be or", "to be", "what is to come"]
    assert answer["usage"] == {"prompt_tokens": 14, "total_tokens": 14}
    assert "document" not in (await post(client, "/v1/rerank", body)).json()["results"][0]


async def test_an_image_is_a_png_and_costs_its_tokens(client: httpx.AsyncClient) -> None:
    answer = (await post(client, "/v1/images/generations", {"prompt": "to be", "n": 2}, "tokens=7")).json()
    ImagesResponse.model_validate(answer, strict=True)
    first, second = (base64.b64decode(image["b64_json"]) for image in answer["data"])
    assert first == second
    chunks, at = [], 8
    while at < len(first):
        (size,) = struct.unpack_from(">I", first, at)
        kind, (crc,) = first[at + 4 : at + 8], struct.unpack_from(">I", first, at + 8 + size)
        assert crc == zlib.crc32(first[at + 4 : at + 8 + size])
        chunks.append(kind)
        at += 12 + size
    assert (first[:8], chunks) == (b"\x89PNG\r\n\x1a\n", [b"IHDR", b"IDAT", b"IEND"])
    assert [answer["usage"][f"{kind}_tokens"] for kind in ("input", "output", "total")] == [2, 14, 16]
    assert (await entry(client))["completion_tokens"] == 14


async def test_a_transcription_says_its_prompt_and_the_ledger_knows_the_file_by_its_digest(
    client: httpx.AsyncClient,
) -> None:
    sound = random.Random(7).randbytes(300_000)
    form = {"model": "whisper", "prompt": "to be", "temperature": "0"}
    answer = (await client.post(HEARD, data=form, files={"file": ("spëech.wav", sound, "audio/wav")})).json()
    Transcription.model_validate(answer, strict=True)
    assert answer["text"] == " ".join(["to be"] * 8)
    counts = {"type": "tokens", "input_tokens": 2, "output_tokens": 16, "total_tokens": 18}
    assert {**counts, "input_token_details": {"text_tokens": 2, "audio_tokens": 0}} == answer["usage"]
    row = await entry(client)
    file = {"filename": "spëech.wav", "size": len(sound), "sha256": hashlib.sha256(sound).hexdigest()}
    assert {**form, "file": file} == json.loads(row["body"])
    assert (row["model"], row["stream"], row["completion_tokens"]) == ("whisper", False, 16)


async def test_a_streamed_transcription_ends_with_the_whole_text_and_usage(client: httpx.AsyncClient) -> None:
    form = {"model": "whisper", "prompt": "to be #tokens=2", "stream": "true"}
    answer = await client.post(HEARD, data=form, files={"file": b"sound"})
    assert answer.headers["content-type"] == "text/event-stream"
    events = [json.loads(event.removeprefix("data: ")) for event in answer.text.split("\n\n")[:-1]]
    assert [event["type"] for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(event["delta"] for event in events[:2]) == events[2]["text"] == "to be"
    assert events[2]["usage"]["output_tokens"] == 2
    row = await entry(client)
    assert (row["stream"], row["completion_tokens"]) == (True, 2)


async def test_an_edit_takes_several_images(client: httpx.AsyncClient) -> None:
    images = [("image[]", (f"{name}.png", name.encode(), "image/png")) for name in "ab"]
    form = {"model": "paint", "prompt": "to be", "n": "3"}
    answer = (await client.post("/v1/images/edits", data=form, files=images)).json()
    assert len(answer["data"]) == 3
    files = json.loads((await entry(client))["body"])["image[]"]
    assert [(file["filename"], file["size"]) for file in files] == [("a.png", 1), ("b.png", 1)]


FORM = b'--X\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--X\r\n'
FORM += b'Content-Disposition: form-data; filename="f"; name=file\r\ncontent-type: a/b\r\n\r\n-\r\n--\r\n--Y\r\n--X--'


@given(cuts=st.lists(st.integers(0, len(FORM)), max_size=8), preamble=st.sampled_from([b"", b"hello\r\n", b"--Y\r\n"]))
async def test_a_form_is_the_same_however_its_bytes_arrive(cuts: list[int], preamble: bytes) -> None:
    points = [0, *sorted(cuts), len(FORM)]
    pieces = [preamble, *(FORM[a:b] for a, b in pairwise(points)), b"\r\nepilogue"]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request"})

    async def receive() -> Json:
        return messages.pop(0)

    headers = [(b"content-type", b'multipart/form-data; boundary="X"')]
    read = await echo.read_form(Request({"type": "http", "headers": headers}, receive))
    content = b"-\r\n--\r\n--Y"
    digest = hashlib.sha256(content).hexdigest()
    assert json.loads(read) == {"model": "m", "file": {"filename": "f", "size": len(content), "sha256": digest}}
    assert messages == []


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("application/json", FORM, "found 'application/json', expected multipart/form-data with a boundary"),
        ("multipart/form-data", FORM, "expected multipart/form-data with a boundary"),
        ("multipart/form-data; boundary=X", FORM[:-2], "the form ends in the midst of a part"),
        ("multipart/form-data; boundary=Z", FORM, "the form ends in the midst of a part"),
        ("multipart/form-data; boundary=X", FORM.replace(b"name=file", b"name=fill"), "missing required field `file`"),
        ("multipart/form-data; boundary=X", FORM.replace(b' filename="f";', b""), "Expected `object`, got `str`"),
    ],
)
async def test_what_is_no_whole_form_is_a_bad_request(
    client: httpx.AsyncClient, kind: str, body: bytes, reason: str
) -> None:
    answer = await client.post(HEARD, content=body, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert reason in answer.json()["error"]["message"]


async def test_an_upload_that_breaks_off_is_aborted(client: httpx.AsyncClient) -> None:
    stuck = asyncio.Event()

    async def broken() -> AsyncIterator[bytes]:
        yield FORM[:-5]
        await stuck.wait()

    headers = {"content-type": "multipart/form-data; boundary=X"}
    uploading = asyncio.create_task(client.post(HEARD, content=broken(), headers=headers))
    assert (await entry(client, "running"))["code"] is None
    uploading.cancel()
    row = await entry(client)
    assert (row["status"], row["code"], row["body"]) == ("aborted", None, "")


EVERY_API: dict[str, Json] = {
    TEXT: {"prompt": "to be"},
    CHAT: {"messages": [{"role": "user", "content": "to be"}]},
    RESPONSES: {"input": "to be"},
    MESSAGES: {"messages": [{"role": "user", "content": "to be"}], "max_tokens": 5},
    "/v1/embeddings": {"input": "to be"},
    "/v1/rerank": {"query": "to be", "documents": ["or"]},
    "/v1/images/generations": {"prompt": "to be"},
    "/v1/images/edits": {"prompt": "to be"},
    "/v1/images/variations": {"prompt": "to be"},
    HEARD: {"prompt": "to be"},
    TRANSLATED: {"prompt": "to be"},
}
STREAMED = [TEXT, CHAT, RESPONSES, MESSAGES, HEARD, TRANSLATED]


async def call(
    client: httpx.AsyncClient, path: str, script: str = "", *, stream: bool = False, also: dict[str, str] | None = None
) -> httpx.Response:
    """An answer of any API, asked as it must be."""
    body = {"model": "any", **EVERY_API[path], **({"stream": True} if stream else {})}
    headers = {"x-echo": script, **(also or {})}
    if not echoes.APIS[path].form:
        return await client.post(path, json=body, headers=headers)
    fields = {name: str(value).lower() for name, value in body.items()}
    return await client.post(path, data=fields, files={"file": b"-"}, headers=headers)


def test_the_manual_and_these_tests_know_every_api() -> None:
    assert echo.__doc__ is not None
    assert [*echoes.APIS] == re.findall(r"POST (/v1/\S+)  ", echo.__doc__)
    assert set(echoes.APIS) == set(EVERY_API)
    assert [path for path, api in echoes.APIS.items() if issubclass(api, echoes.Streaming)] == STREAMED


@pytest.mark.parametrize("path", EVERY_API)
async def test_every_api_has_a_row_in_the_ledger_and_follows_the_script(client: httpx.AsyncClient, path: str) -> None:
    answer = await call(client, path, "usage=none; status=503; retry-after=1")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    await client.delete(LEDGER)
    whole = await call(client, path, "usage=none")
    assert whole.is_success
    assert "usage" not in whole.json()
    assert "usage" in (await call(client, path)).json()
    assert [row["path"] for row in (await client.get(LEDGER)).json()] == [path, path]
    with pytest.raises(json.JSONDecodeError):
        (await call(client, path, "garbage")).json()
    with pytest.raises(httpx.RemoteProtocolError):
        await call(client, path, "cut=0")


@pytest.mark.parametrize("path", STREAMED)
async def test_every_stream_can_be_cut_fail_and_have_garbage(client: httpx.AsyncClient, path: str) -> None:
    whole = (await call(client, path, stream=True)).text
    assert '"usage":{' in whole
    garbled = (await call(client, path, "garbage", stream=True)).text
    assert ("data: {no json" in whole, garbled.count("data: {no json\n\n")) == (False, 1)
    silent = (await call(client, path, "usage=none", stream=True)).text
    assert (len(silent) < len(whole), '"usage":{' in silent) == (True, False)
    failed = (await call(client, path, "error=2", stream=True)).text
    assert failed.count("the script ends here") == 1
    await client.delete(LEDGER)
    with pytest.raises(httpx.RemoteProtocolError):
        await call(client, path, "cut=2", stream=True)
    row = await entry(client)
    assert (row["status"], row["completion_tokens"], row["stream"]) == ("aborted", 2, True)


async def test_an_error_in_a_stream_is_told_in_the_words_of_its_api(client: httpx.AsyncClient) -> None:
    said = "the script ends here"
    told = named_events_of((await call(client, RESPONSES, "error=1", stream=True)).text)
    expected: Json = {"type": "error", "code": "server_error", "message": said, "param": None, "sequence_number": 5}
    assert expected == told[-1]
    told = named_events_of((await call(client, MESSAGES, "error=1", stream=True)).text)
    assert (told[-1]["type"], told[-1]["error"]) == ("error", {"type": "api_error", "message": said})


@pytest.mark.parametrize("path", EVERY_API)
async def test_every_api_takes_the_key_as_bearer_or_as_x_api_key(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("GATEWAY_ECHO_KEY", "secret")
    async with serving() as address, httpx.AsyncClient(base_url=address) as client:
        codes = [
            (await call(client, path, also={name: value})).status_code
            for name, value in (
                ("authorization", "Bearer secret"),
                ("x-api-key", "secret"),
                ("authorization", "secret"),
                ("x-api-key", "Bearer secret"),
                ("x-other", "secret"),
            )
        ]
    assert codes == [200, 200, 401, 401, 401]


# — a backend with a small context window


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (text("to be or not", max_tokens=6), None),
        (text("to be or not", max_completion_tokens=7), (11, 4, 7)),
        (text("to be or not", max_tokens=7), (11, 4, 7)),
        (chat(("system", "be brief"), ("user", "to be"), max_tokens=7), (11, 4, 7)),
        (text("a " * 11), (11, 11, None)),
        (text("a " * 11, max_tokens=0), (11, 11, 0)),
    ],
)
async def test_context_refuses_what_does_not_fit_in_vllms_words(
    client: httpx.AsyncClient, body: Json, expected: tuple[int, int, int | None] | None
) -> None:
    answer = await ask(client, body, "context=10")
    if expected is None:
        assert answer.json()["usage"]["total_tokens"] == 10
        return
    total, prompt, asked = expected
    parts = f"({prompt} in the messages, {asked} in the completion). Please reduce the length of the messages or "
    tail = "in the messages, Please reduce the length of the messages." if asked is None else parts + "completion."
    message = f"This model's maximum context length is 10 tokens. However, you requested {total} tokens {tail}"
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["message"]) == (400, "context_length_exceeded", message)
    assert (await entry(client))["prompt_tokens"] == 0


async def test_what_is_said_without_a_limit_ends_at_the_window(client: httpx.AsyncClient) -> None:
    answer = (await ask(client, text("to be or not"), "context=10")).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (6, "length")


async def test_strict_openai_does_not_know_what_to_do_beyond_the_context(client: httpx.AsyncClient) -> None:
    for value in ("truncate", None):
        body = text("to be", context_length_exceeded_behavior=value)
        assert (await ask(client, body)).is_success
        answer = await ask(client, body, "strict-openai")
        named = "Unrecognized request argument supplied: context_length_exceeded_behavior"
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, named)
    assert (await ask(client, text("to be"), "strict-openai")).is_success


# — the script


def test_the_manual_knows_every_directive_and_no_other() -> None:
    assert echo.__doc__ is not None
    assert set(re.findall(r"^    #([a-z-]+)", echo.__doc__, re.MULTILINE)) == echoes.DIRECTIVES


def test_the_examples_of_the_manual_are_scripts() -> None:
    assert echo.__doc__ is not None
    examples = re.findall(r"^    (#\S+)", echo.__doc__, re.MULTILINE)
    assert len(echoes.DIRECTIVES) == len(examples)
    assert echoes.read_script(examples) != echoes.Script()


def test_the_header_wins_over_the_prompt() -> None:
    expected = echoes.Script(tokens=2, delay=0.5, garbage=True)
    assert expected == echoes.read_script(["say #tokens=9 #delay=0.5"], " tokens=2;garbage; ")


@pytest.mark.parametrize(
    "header", ["delay=soon", "delay=-1", "delay=inf", "status=200", "usage=some", "split=0", "cat=1"]
)
async def test_what_is_no_directive_in_the_header_is_refused(client: httpx.AsyncClient, header: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        echoes.read_script([], header)
    assert (await ask(client, text("to be"), header)).status_code == 400


async def test_words_that_only_look_like_directives_are_words(client: httpx.AsyncClient) -> None:
    answer = (await ask(client, text("# #hash a#cut=0", max_tokens=3))).json()
    assert answer["choices"][0]["text"] == "# #hash a#cut=0"


async def test_directives_count_as_prompt_but_are_not_repeated(client: httpx.AsyncClient) -> None:
    answer = (await ask(client, text("to be #tokens=3"))).json()
    assert answer["choices"][0]["text"] == "to be to"
    assert usage(3, 3) == answer["usage"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, (20, "stop")), (30, (20, "stop")), (20, (20, "length")), (5, (5, "length")), (0, (0, "length"))],
)
async def test_tokens_says_how_many_within_max_tokens(
    client: httpx.AsyncClient, limit: int | None, expected: tuple[int, str]
) -> None:
    (choice,) = (await ask(client, text("a #tokens=20", max_tokens=limit))).json()["choices"]
    assert expected == (len(choice["text"].split()), choice["finish_reason"])


@pytest.mark.parametrize("stream", [False, True])
async def test_delay_holds_back_the_first_byte(client: httpx.AsyncClient, stream: bool) -> None:
    answer = await ask(client, text("to be", stream=stream), "delay=0.05")
    assert float(answer.headers["fireworks-server-time-to-first-token"]) >= 0.045  # timers tick in milliseconds


async def test_pace_stands_between_the_tokens(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        began = time.perf_counter()
        await ask(client, text("to be", stream=stream), "pace=0.02; tokens=4")
        assert time.perf_counter() - began >= 3 * 0.015  # timers tick in milliseconds


async def test_status_answers_with_an_error_that_costs_nothing(client: httpx.AsyncClient) -> None:
    for body in (text("a #status=503 #retry-after=2", stream=True), chat(("user", "a #status=503 #retry-after=2"))):
        await client.delete(LEDGER)
        answer = await ask(client, body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert {"object", "type", "code", "param", "message"} == set(answer.json()["error"])
        row = await entry(client)
        assert tuple(row[k] for k in ("code", "status", "prompt_tokens", "completion_tokens")) == (
            503,
            "complete",
            0,
            0,
        )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("none", ["absent"] * 3),
        ("finish", ["absent", "absent", 2]),
        ("extra", [None, None, None, 2]),
        ("every", [1, 2, 2]),
    ],
)
async def test_usage_is_reported_where_it_is_told(
    client: httpx.AsyncClient, where: str, expected: list[object]
) -> None:
    events = await told(client, text("to be", max_tokens=2), f"usage={where}")
    found = [event.get("usage", "absent") for event in events]
    assert expected == [u["completion_tokens"] if isinstance(u, dict) else u for u in found]
    whole = (await ask(client, text("to be", max_tokens=2), f"usage={where}")).json()
    assert (where != "none") == ("usage" in whole)


async def test_cached_says_what_came_from_a_cache(client: httpx.AsyncClient) -> None:
    assert usage(4, 16, cached=3) == (await ask(client, text("to be or #cached=3"))).json()["usage"]


@pytest.mark.parametrize("tokens", [0, 2, 4])
async def test_cut_drops_a_stream_after_its_tokens(client: httpx.AsyncClient, tokens: int) -> None:
    read = ""
    with pytest.raises(httpx.RemoteProtocolError):
        async with client.stream("POST", TEXT, json=text(f"a #cut={tokens}", stream=True, max_tokens=4)) as answer:
            async for piece in answer.aiter_text():
                read += piece
    assert tokens == read.count("data: ")
    row = await entry(client)
    assert ("aborted", tokens) == (row["status"], row["completion_tokens"])


async def test_cut_drops_an_answer_half_way_and_one_beyond_the_end_drops_nothing(client: httpx.AsyncClient) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await ask(client, text("a #cut=5"))
    row = await entry(client)
    assert (row["status"], row["completion_tokens"]) == ("aborted", 5)
    for stream in (False, True):
        assert (await ask(client, text("a #cut=17", stream=stream))).is_success


async def test_error_ends_a_stream_as_the_sdk_expects_it(client: httpx.AsyncClient, address: str) -> None:
    events = await told(client, text("a #error=2"))
    assert ["choices" if "choices" in event else "error" for event in events] == ["choices", "choices", "error"]
    assert (await entry(client))["completion_tokens"] == 2
    async with AsyncOpenAI(api_key="any", base_url=f"{address}/v1") as openai:
        chunks = await openai.completions.create(model="any", prompt="a #error=2", stream=True)
        with pytest.raises(APIError, match="the script ends here"):
            [chunk async for chunk in chunks]


async def test_garbage_is_no_json(client: httpx.AsyncClient) -> None:
    stream = (await ask(client, text("a #garbage", max_tokens=1, stream=True))).text
    assert stream.split("\n\n")[1] == "data: {no json"
    assert stream.count("data: ") == 4
    with pytest.raises(json.JSONDecodeError):
        (await ask(client, text("a #garbage"))).json()


async def test_split_writes_a_stream_in_small_pieces(client: httpx.AsyncClient, address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(text("a", stream=True, max_tokens=2)).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nhost: a\r\nx-echo: split=7\r\nconnection: close\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    raw = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    sizes = [int(size, 16) for size in re.findall(rb"(?:^|\r\n)([0-9a-f]+)\r\n", raw.partition(b"\r\n\r\n")[2])]
    assert (max(sizes), sizes[-1]) == (7, 0)
    assert (await entry(client))["completion_tokens"] == 2
    assert words_of(await told(client, text("a", max_tokens=2), "split=7")) == "a a"


# — the ledger


async def test_the_ledger_tells_what_was_received_and_produced(client: httpx.AsyncClient) -> None:
    body = b'{"model": "m",  "prompt":"to be", "max_tokens": 3}'
    await client.post(TEXT, content=body, headers={"authorization": "Bearer any", "x-request-id": "r"})
    row = await entry(client)
    assert ["authorization", "Bearer any"] in row.pop("headers")
    expected = {"id": "r", "path": TEXT, "model": "m", "body": body.decode(), "stream": False, "status": "complete"}
    assert {**expected, "prompt_tokens": 2, "completion_tokens": 3, "code": 200} == row


async def test_the_ledger_forgets_on_request(client: httpx.AsyncClient) -> None:
    await ask(client, text("to be"))
    assert len((await client.get(LEDGER)).json()) == 1
    assert (await client.delete(LEDGER)).status_code == 204
    assert (await client.get(LEDGER)).json() == []


async def test_a_client_that_leaves_between_tokens_ends_the_production(client: httpx.AsyncClient) -> None:
    body = text("a", stream=True)
    async with client.stream("POST", TEXT, json=body, headers={"x-echo": f"pace={FOREVER}"}) as answer:
        assert (await anext(answer.aiter_text()))[:7] == "data: {"
        assert (await entry(client, "running"))["completion_tokens"] == 1
    row = await entry(client)
    assert (row["status"], row["completion_tokens"]) == ("aborted", 1)


async def test_a_client_that_leaves_a_full_pipe_is_not_produced_for(client: httpx.AsyncClient) -> None:
    tokens = 200_000  # far more than sockets hold: the backend stands in the middle of a write
    async with client.stream("POST", TEXT, json=text("a", stream=True, max_tokens=tokens)) as answer:
        await anext(answer.aiter_raw())
    row = await entry(client)
    assert row["status"] == "aborted"
    assert 0 < row["completion_tokens"] < tokens


@pytest.mark.parametrize("script", [f"delay={FOREVER}", f"pace={FOREVER}", f"delay={FOREVER}; status=503"])
async def test_a_client_that_leaves_before_the_answer_was_told_nothing(client: httpx.AsyncClient, script: str) -> None:
    leaving = asyncio.create_task(ask(client, text("a"), script))
    await entry(client, "running")
    leaving.cancel()
    row = await entry(client)
    assert (row["status"], row["completion_tokens"], row["code"]) == ("aborted", 0, None)

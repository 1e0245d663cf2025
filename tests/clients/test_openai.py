"""What the OpenAI SDK sees and no other."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
from typing import Any

import openai
import pytest

from tests.clients.sdks import ALIAS, MODEL, MODELS, OTHER, Caller, Sdk, done, rest, take, text
from tests.clients.served import Backend, Served

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("sdk", ["openai", "openai-async"], indirect=True)]


async def test_models_are_those_that_the_key_may_use(sdk: Sdk, gateway: Served) -> None:
    listed = []
    for key in (gateway.key("roomy"), gateway.key("roomy", "--models", OTHER)):
        async with sdk.caller(gateway.url, key) as caller:
            listed.append([model.id for model in (await done(caller.client.models.list())).data])
    assert listed == [MODELS, [OTHER]]


async def test_a_model_is_found_by_a_name_with_slashes(sdk: Sdk, gateway: Served) -> None:
    async with sdk.caller(gateway.url, gateway.key("roomy", "--models", OTHER)) as caller:
        assert (await done(caller.client.models.retrieve(OTHER))).id == OTHER
        for denied in (MODEL, "nobodys", "accounts/nobody/models/none"):
            with pytest.raises(openai.NotFoundError) as caught:
                await done(caller.client.models.retrieve(denied))
            assert caught.value.code == "model_not_found"


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


# — the other endpoints


def counted(line: dict[str, Any]) -> tuple[str, str, int, int]:
    return line["outcome"], line["usage_source"], line["input_tokens"], line["output_tokens"]


async def test_an_embedding_is_the_backends_in_every_format(caller: Caller, gateway: Served, backend: Backend) -> None:
    asked = {"model": ALIAS, "input": ["to be", "or not"], "dimensions": 3, "extra_headers": caller.named}
    create = caller.client.embeddings.create
    answers = [await done(create(**asked, **more)) for more in ({}, {"encoding_format": "float"})]
    packed = await done(create(**asked, encoding_format="base64"))
    decoded = [[*struct.unpack("<3f", base64.b64decode(row.embedding))] for row in packed.data]
    assert [[row.embedding for row in answer.data] for answer in answers] == [decoded, decoded]
    assert (answers[0].model, answers[0].usage.prompt_tokens) == (MODEL, 4)
    lines = await gateway.log.wait(caller.called, 3)
    assert [counted(line) for line in lines] == [("complete", "upstream", 4, 0)] * 3
    rows = await backend.rows(caller.called)
    assert [json.loads(row["body"]).get("encoding_format") for row in rows] == ["base64", "float", "base64"]


async def test_a_response_is_the_backends_text_and_usage(caller: Caller, gateway: Served) -> None:
    asked = {"model": MODEL, "input": "to be or not #tokens=6", "instructions": "be brief"}
    response = await done(caller.client.responses.create(**asked, extra_headers=caller.named))
    assert (response.output_text, response.status, response.usage.total_tokens) == (
        "to be or not to be",
        "completed",
        13,
    )
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "upstream", 7, 6)


async def test_a_response_that_reaches_its_limit_is_incomplete(caller: Caller, gateway: Served) -> None:
    create = caller.client.responses.create
    asked = {"model": MODEL, "input": "to be or not", "max_output_tokens": 16, "extra_headers": caller.named}
    whole = await done(create(**asked))
    events = await rest(await done(create(**asked, stream=True)))
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert events[-1].type == "response.incomplete"
    for line in await gateway.log.wait(caller.called, 2):
        assert counted(line) == ("complete", "upstream", 4, 16)


async def test_a_streamed_response_has_the_events_of_the_api(caller: Caller, gateway: Served) -> None:
    asked = {"model": MODEL, "input": "to be or not #tokens=6", "stream": True, "extra_headers": caller.named}
    events = await rest(await done(caller.client.responses.create(**asked)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "to be or not to be"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.output_text == "to be or not to be"
    (line,) = await gateway.log.wait(caller.called, 1)
    assert counted(line) == ("complete", "upstream", 5, 6)


async def test_a_streamed_response_that_is_cut_never_looks_complete(caller: Caller, gateway: Served) -> None:
    asked = {"model": MODEL, "input": "to be #cut=3", "stream": True, "extra_headers": caller.named}
    events: list[Any] = []
    with pytest.raises(openai.APIError):
        await into(events, await done(caller.client.responses.create(**asked)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "to be to"
    assert (events[-1].type, events[-1].code) == ("error", "upstream_disconnected")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["error.type"]) == ("upstream", "upstream_disconnected")


async def into(events: list[Any], stream: Any) -> None:
    """Reads a stream as far as it goes."""
    while True:
        try:
            events += await take(stream, 1)
        except (StopIteration, StopAsyncIteration):
            return


async def test_images_are_made_and_edited(caller: Caller, gateway: Served, backend: Backend) -> None:
    images = caller.client.images
    made = await done(images.generate(model=MODEL, prompt="to be", n=2, extra_headers=caller.named))
    png = base64.b64decode(made.data[0].b64_json)
    named = {"model": ALIAS, "prompt": "to be", "extra_headers": caller.named}
    edited = await done(images.edit(image=[("a.png", png), ("b.png", png)], **named))
    assert [len(answer.data) for answer in (made, edited)] == [2, 1]
    with pytest.deprecated_call():
        varied = await done(images.create_variation(image=("a.png", png), model=ALIAS, extra_headers=caller.named))
    assert [answer.usage.total_tokens for answer in (made, edited, varied)] == [2 + 32, 2 + 16, 16]
    lines = await gateway.log.wait(caller.called, 3)
    assert [line["outcome"] for line in lines] == ["complete"] * 3
    _, form, _ = (json.loads(row["body"]) for row in await backend.rows(caller.called))
    (files,) = (value for name, value in form.items() if name.startswith("image"))
    assert form["model"] == MODEL
    assert [file["sha256"] for file in files] == [hashlib.sha256(png).hexdigest()] * 2


async def test_a_recording_is_transcribed_and_never_changed(caller: Caller, gateway: Served, backend: Backend) -> None:
    sound = bytes(range(256)) * 4000  # far more than is read for the model's name
    asked = {"model": ALIAS, "prompt": "to be or not #tokens=6", "extra_headers": caller.named}
    heard = await done(caller.client.audio.transcriptions.create(file=("a.wav", io.BytesIO(sound)), **asked))
    assert (heard.text, heard.usage.total_tokens) == ("to be or not to be", 11)
    (row,) = await backend.rows(caller.called)
    form = json.loads(row["body"])
    digest = hashlib.sha256(sound).hexdigest()
    assert form["file"] == {"filename": "a.wav", "size": len(sound), "sha256": digest}
    assert (form["model"], row["status"]) == (MODEL, "complete")
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["usage_source"]) == ("complete", "upstream")


async def test_a_recording_is_translated(caller: Caller, gateway: Served, backend: Backend) -> None:
    asked = {"model": ALIAS, "prompt": "to be #tokens=3", "extra_headers": caller.named}
    with pytest.deprecated_call():
        heard = await done(caller.client.audio.translations.create(file=("a.wav", b"sound"), **asked))
    assert heard.text == "to be to"
    assert [json.loads(row["body"])["model"] for row in await backend.rows(caller.called)] == [MODEL]
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["http.route"], line["outcome"]) == ("/v1/audio/translations", "complete")


async def test_a_transcription_is_streamed(caller: Caller, gateway: Served) -> None:
    asked = {"model": MODEL, "prompt": "to be or not #tokens=6", "stream": True, "extra_headers": caller.named}
    events = await rest(await done(caller.client.audio.transcriptions.create(file=("a.wav", b"sound"), **asked)))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == "to be or not to be"
    assert (events[-1].type, events[-1].usage.total_tokens) == ("transcript.text.done", 11)
    (line,) = await gateway.log.wait(caller.called, 1)
    assert (line["outcome"], line["usage_source"]) == ("complete", "upstream")


async def test_a_form_without_a_model_that_is_known_never_reaches_the_backend(caller: Caller, backend: Backend) -> None:
    create = caller.client.audio.transcriptions.create
    with pytest.raises(openai.NotFoundError) as caught:
        await done(create(file=("a.wav", b"sound" * 100_000), model="nobodys", extra_headers=caller.named))
    assert caught.value.code == "model_not_found"
    assert await backend.rows(caller.called) == []

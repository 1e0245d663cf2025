"""What the OpenAI SDK for Node sees: one script of node/ for each claim, which prints what it was told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import uuid
from typing import Any

import pytest

from tests.clients.sdks import MODEL, MODELS
from tests.clients.served import PATIENCE, ROOT, Backend, Served

pytestmark = pytest.mark.anyio

SCRIPTS = ROOT / "tests" / "clients" / "node"
OLDEST = 20  # of Node, for files in forms
SAID = "to be or not to be"


@pytest.fixture(scope="module")
def node() -> str:
    """Node, with the SDK beside the scripts."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node on this machine (Debian: apt-get install npm)")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST:
        pytest.skip(f"found node {version}, expected v{OLDEST} or newer")
    if not (SCRIPTS / "node_modules" / "openai").is_dir():
        pytest.skip("openai is not installed for node (make test does it, where npm is)")
    return found


class Calling:
    """Runs scripts with a key of this team; its requests are called `called`."""

    def __init__(self, node: str, gateway: Served) -> None:
        self.called = f"test-{uuid.uuid4().hex}"
        self._node = node
        self._gateway = gateway

    async def run(self, script: str, team: str = "roomy") -> Any:
        """What the script has told."""
        given = {"GATEWAY": self._gateway.url, "KEY": self._gateway.key(team), "CALLED": self.called, "MODEL": MODEL}
        process = await asyncio.create_subprocess_exec(
            self._node, SCRIPTS / f"{script}.mjs", env={**os.environ, **given}, stdout=asyncio.subprocess.PIPE
        )
        told, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 0
        return json.loads(told)

    async def lines(self, number: int) -> list[dict[str, Any]]:
        return await self._gateway.log.wait(self.called, number)

    async def counted(self) -> tuple[str, str, int, int]:
        (line,) = await self.lines(1)
        return line["outcome"], line["usage_source"], line["input_tokens"], line["output_tokens"]


@pytest.fixture
def calling(node: str, gateway: Served) -> Calling:
    return Calling(node, gateway)


async def test_a_chat_stream_is_the_backends_text_and_usage(calling: Calling) -> None:
    *chunks, last = await calling.run("chat_stream")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == SAID
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 10)
    assert await calling.counted() == ("complete", "upstream", 4, 6)


async def test_a_completion_has_its_usage(calling: Calling) -> None:
    answer = await calling.run("completion")
    assert (answer["choices"][0]["text"], answer["usage"]["total_tokens"]) == (SAID, 10)
    assert await calling.counted() == ("complete", "upstream", 4, 6)


async def test_an_embedding_is_the_same_in_both_formats(calling: Calling, backend: Backend) -> None:
    told = await calling.run("embeddings")
    vectors = {name: [row["embedding"] for row in answer["data"]] for name, answer in told.items()}
    assert vectors["unpacked"] == vectors["floats"]
    assert [len(vector) for vector in vectors["floats"]] == [3, 3]
    rows = await backend.rows(calling.called)
    assert [json.loads(row["body"])["encoding_format"] for row in rows] == ["base64", "float"]


async def test_a_streamed_response_has_the_events_of_the_api(calling: Calling) -> None:
    events = await calling.run("responses_stream")
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == SAID
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.completed")
    assert await calling.counted() == ("complete", "upstream", 5, 6)


async def test_a_recording_may_stand_before_the_models_name(calling: Calling, backend: Backend) -> None:
    assert (await calling.run("transcription"))["text"] == SAID
    (row,) = await backend.rows(calling.called)
    form = json.loads(row["body"])
    sound = b"sound" * 200_000
    digest = hashlib.sha256(sound).hexdigest()
    assert [*form][:2] == ["file", "model"]
    assert form["file"] == {"filename": "a.wav", "size": len(sound), "sha256": digest}


async def test_an_error_has_its_fields(calling: Calling) -> None:
    error = await calling.run("not_found")
    assert (error["name"], error["status"], error["requestID"]) == ("Error", 404, calling.called)
    assert [error[name] for name in ("type", "code", "param")] == ["invalid_request_error", "model_not_found", "model"]


async def test_models_are_listed_and_found_by_a_name_with_slashes(calling: Calling) -> None:
    told = await calling.run("models")
    assert [model["id"] for model in told["listed"]] == MODELS
    assert told["found"]["id"] == MODEL


async def test_an_exhausted_quota_is_told_at_once_and_not_asked_again(calling: Calling) -> None:
    first, second = await calling.run("quota", team="one-for-all")
    assert first is None
    assert (second["status"], second["code"], second["retry"]) == (429, "insufficient_quota", "false")
    lines = await calling.lines(2)
    assert [line["http.response.status_code"] for line in lines] == [200, 429]

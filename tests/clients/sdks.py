"""The SDKs' clients behind one face: what they have in common is said once."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import anthropic
import fireworks
import httpx
import openai

from tests.clients.served import PATIENCE

Api = Literal["completions", "chat"]

MODEL = "accounts/fireworks/models/qwen3-8b"
ALIAS = "qwen3-8b"
OTHER = "accounts/fireworks/models/llama-v2-7b"  # the older reference's example
NEWER = "accounts/fireworks/models/kimi-k2-instruct-0905"  # the newer one's
MODELS = [MODEL, OTHER, NEWER]


async def done(result: Any) -> Any:
    """The result of a call, whichever kind of client was called."""
    return await result if inspect.isawaitable(result) else result


async def take(stream: Any, number: int) -> list[Any]:
    """The next chunks of a stream."""
    return [await anext(stream) if hasattr(stream, "__anext__") else next(stream) for _ in range(number)]


async def rest(stream: Any) -> list[Any]:
    """All chunks that are left."""
    if hasattr(stream, "__aiter__"):
        return [chunk async for chunk in stream]
    return list(stream)


def text(answer: Any) -> str:
    """What the first choice of an answer, or of a chunk, says."""
    if not answer.choices:
        return ""
    choice = answer.choices[0]
    for member in ("message", "delta"):
        if hasattr(choice, member):
            return getattr(choice, member).content or ""
    return str(choice.text)


@dataclass(frozen=True)
class Sdk:
    """One kind of client: its package, whose exceptions have the same names in both, where it finds its API, and what
    it raises where a stream ends before its end."""

    package: ModuleType
    kind: type[Any]
    base: str
    cut: type[Exception]

    @asynccontextmanager
    async def caller(self, url: str, key: str, **given: Any) -> AsyncIterator[Caller]:
        """A client of the gateway at `url`, closed at the end; it does not try again unless it is told to."""
        client = self.kind(base_url=url + self.base, api_key=key, **{"max_retries": 0, "timeout": PATIENCE, **given})
        try:
            yield Caller(self, client, f"test-{uuid.uuid4().hex}")
        finally:
            await done(client.close())


@dataclass(frozen=True)
class Caller:
    """A client, and the name by which its requests are called: as x-request-id and as user."""

    sdk: Sdk
    client: Any
    called: str

    @property
    def named(self) -> dict[str, str]:
        """The headers that call a request so."""
        return {"x-request-id": self.called}

    async def ask(self, prompt: str, api: Api = "completions", *, raw: bool = False, **given: Any) -> Any:
        """The answer, or the stream of it; `raw`: the response that it comes in."""
        words: dict[str, Any] = {"prompt": prompt}
        if api == "chat":
            words = {"messages": [{"role": "user", "content": prompt}]}
        named = {"user": self.called, "extra_headers": self.named}
        resource = self.client.chat.completions if api == "chat" else self.client.completions
        create = (resource.with_raw_response if raw else resource).create
        return await done(create(**{"model": MODEL, **words, **named, **given}))


SDKS = {
    "openai": Sdk(openai, openai.OpenAI, "/v1", openai.APIError),
    "openai-async": Sdk(openai, openai.AsyncOpenAI, "/v1", openai.APIError),
    "fireworks": Sdk(fireworks, fireworks.Fireworks, "", httpx.TransportError),
    "fireworks-async": Sdk(fireworks, fireworks.AsyncFireworks, "", httpx.TransportError),
}

# Anthropic's have an API of their own.
ANTHROPIC = {
    "anthropic": Sdk(anthropic, anthropic.Anthropic, "", anthropic.APIError),
    "anthropic-async": Sdk(anthropic, anthropic.AsyncAnthropic, "", anthropic.APIError),
}

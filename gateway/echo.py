"""A scripted model backend: the one fake of the project, for the first run, for demonstrations and for tests.

It speaks the APIs below the way a Fireworks-style backend does. A token is a word, and what it generates is the
prompt's own words, over and over. Play with it:

    curl -N localhost:8000/v1/completions -H 'content-type: application/json' \
        -d '{"model": "any", "prompt": "to be or not #pace=0.2", "stream": true}'

    POST /v1/completions             the prompt's words, JSON or a stream
    POST /v1/chat/completions        those of the last user message, JSON or a stream
    POST /v1/responses               those of the input's last user message, JSON or a stream with named events
    POST /v1/messages                Anthropic's API: the same, and errors in Anthropic's shape
    POST /v1/embeddings              a vector for each text, always the same, as floats or in base64
    POST /v1/rerank                  the documents, by how many of the query's words they have
    POST /v1/images/generations      one tiny PNG, n times; an image counts as so many tokens of output
    POST /v1/images/edits            the same, from a form
    POST /v1/images/variations       the same, without a prompt
    POST /v1/audio/transcriptions    the words of the form's prompt, as if heard in its file; JSON or a stream
    POST /v1/audio/translations      the same
    GET  /v1/models                  the model `echo`; any other name is served, too

How to misbehave is told in the request, by words of the prompt (in a chat: of the last user message; in a rerank: of
the query), or by the header `x-echo: delay=0.2; tokens=50`, which wins and keeps prompts clean. Words that direct are
prompt tokens like any other, but they are not repeated.

    #tokens=50         produces 50 tokens in each choice, or max_tokens if that is fewer; without either: 16
    #delay=0.2         seconds before the first byte
    #pace=0.01         seconds between tokens
    #usage=finish      reports usage in the finish chunk, as Fireworks does unasked; or `extra`, in a chunk of its own,
                       as OpenAI does by stream_options; `every`, so far, in each chunk, as vLLM can; `none`, nowhere.
                       Streams of other APIs have one place for it, and know `none` only
    #cached=3          says that 3 of the prompt's tokens came from a cache
    #status=503        answers with this error and produces nothing
    #retry-after=2     with #status: asks to wait 2 seconds
    #context=100       has a context window of 100 tokens, and refuses a prompt and max_tokens beyond it, as vLLM does
    #strict-openai     refuses context_length_exceeded_behavior, as OpenAI does what it does not know
    #cut=5             drops the connection after 5 tokens, without a proper end; an answer that is no stream, half-way
    #error=5           ends a stream after 5 tokens with an error event (and [DONE], where there is one), as vLLM does
    #garbage           puts an event that is no JSON before the finish chunk; the answer that is no stream is no JSON
    #split=7           writes 7 bytes at a time, so that events arrive in pieces

GET /echo/ledger tells what was served, as this side counted it; DELETE /echo/ledger forgets it. Of a form it keeps the
fields and, for each file, name, size and SHA-256. With GATEWAY_ECHO_KEY in the environment, /v1 asks for that key, as
bearer or x-api-key.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from email import message_from_string
from email.message import Message
from typing import Literal

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.echoes import (
    APIS,
    Ask,
    Event,
    File,
    Json,
    Refusal,
    Said,
    Script,
    Streaming,
    encode,
    openai_error,
    read_script,
    refused,
)

KEPT = 50_000  # entries of the ledger; older ones are forgotten, so that a long demonstration stays small
STRANGER = "found no key, or another than GATEWAY_ECHO_KEY"


@dataclass(slots=True)
class Entry:
    """One request as this side saw it, a row of the ledger. `completion_tokens` are those that were written."""

    id: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes = b""
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: Literal["running", "complete", "aborted"] = "running"
    code: int | None = None  # the HTTP status that was answered

    def row(self) -> Json:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers]
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**row, "headers": headers, "body": self.body.decode(errors="replace")}


# — forms, read as they come


class NoForm(Exception):
    """What came is no multipart form."""


class Pieces:
    """Bytes that come in pieces, read up to one mark after another. Raises NoForm where they end before it."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._rest = b"\r\n"  # every boundary follows a line, but for the first

    async def until(self, mark: bytes) -> AsyncIterator[bytes]:
        """What comes before the mark, which is taken, too."""
        while (at := self._rest.find(mark)) < 0:
            sure = max(len(self._rest) - len(mark) + 1, 0)
            yield self._rest[:sure]
            self._rest = self._rest[sure:] + await self._more()
        yield self._rest[:at]
        self._rest = self._rest[at + len(mark) :]

    async def closing(self) -> bool:
        """Whether the boundary that was taken is the last one; the rest is read then, and its line end otherwise."""
        while len(self._rest) < 2:
            self._rest += await self._more()
        if self._rest[:2] != b"--":
            return False
        async for _ in self._stream:
            pass
        return True

    async def _more(self) -> bytes:
        piece = await anext(self._stream, b"")
        if not piece:
            raise NoForm("the form ends in the midst of a part, expected its last boundary")
        return piece


async def joined(pieces: AsyncIterator[bytes]) -> str:
    return b"".join([piece async for piece in pieces]).decode()


async def digested(filename: str, pieces: AsyncIterator[bytes]) -> File:
    """What is kept of a file, of which no more than a piece is ever here."""
    size, digest = 0, hashlib.sha256()
    async for piece in pieces:
        size += len(piece)
        digest.update(piece)
    return File(filename, size, digest.hexdigest())


async def read_form(request: Request) -> bytes:
    """A form as JSON: its fields as strings, its files as File; a name that comes again has a list."""
    kind = Message()
    kind["content-type"] = request.headers.get("content-type", "")
    boundary = kind.get_boundary()
    if kind.get_content_type() != "multipart/form-data" or not boundary:
        raise NoForm(f"found {kind['content-type']!r}, expected multipart/form-data with a boundary")
    pieces, mark = Pieces(request.stream()), f"\r\n--{boundary}".encode()
    parts: dict[str, list[str | File]] = {}
    await joined(pieces.until(mark))
    while not await pieces.closing():
        head = message_from_string((await joined(pieces.until(b"\r\n\r\n"))).lstrip())
        name, filename = head.get_param("name", header="content-disposition"), head.get_filename()
        value = pieces.until(mark)
        part = await joined(value) if filename is None else await digested(filename, value)
        parts.setdefault(str(name), []).append(part)
    return encode({name: values[0] if len(values) == 1 else values for name, values in parts.items()})


# — answers


@dataclass(slots=True)
class Reply:
    """The way back to one client. What waits or writes raises BrokenPipeError where the line ends: left, or cut."""

    entry: Entry
    send: Send
    gone: asyncio.Task[None]
    script: Script
    names: Sequence[str]  # of the headers that tell the request's id

    async def pause(self, seconds: float) -> None:
        if seconds > 0 and (await asyncio.wait({self.gone}, timeout=seconds))[0]:
            raise BrokenPipeError

    async def start(self, code: int, content_type: str, headers: Mapping[str, object]) -> None:
        self.entry.code = code
        given = {"content-type": content_type, **dict.fromkeys(self.names, self.entry.id), **headers}
        raw = [(name.encode(), str(value).encode("latin-1")) for name, value in given.items()]
        await self.send({"type": "http.response.start", "status": code, "headers": raw})

    async def write(self, data: bytes, tokens: int = 0) -> None:
        """Writes bytes that carry so many tokens; these count once all bytes are written."""
        if self.entry.completion_tokens == self.script.cut:
            raise BrokenPipeError
        step = self.script.split or len(data)
        for at in range(0, len(data), step):
            await self.send({"type": "http.response.body", "body": data[at : at + step], "more_body": True})
            if self.gone.done():
                raise BrokenPipeError
        self.entry.completion_tokens += tokens

    async def end(self) -> None:
        await self.send({"type": "http.response.body", "body": b""})
        self.entry.status = "complete"

    async def json(self, code: int, body: bytes, headers: Mapping[str, object], tokens: int = 0) -> None:
        await self.start(code, "application/json", {"content-length": len(body), **headers})
        if self.script.cut is not None and self.script.cut <= tokens:
            await self.write(body[: len(body) // 2], self.script.cut)
            raise BrokenPipeError
        await self.write(body, tokens)
        await self.end()

    async def stream(self, ask: Streaming, events: Iterator[Event], headers: Mapping[str, object]) -> None:
        await self.start(200, "text/event-stream", headers)
        for data, tokens, seconds in events:
            await self.pause(seconds)
            await self.write(ask.framed(data), tokens)
        await self.end()


# — the application


class Endpoint:
    """One of the APIs, as an ASGI application."""

    def __init__(self, api: type[Ask], ledger: deque[Entry], key: str | None) -> None:
        self.api, self.ledger, self.key = api, ledger, key
        self.decode = msgspec.json.Decoder(api, strict=not api.form).decode  # all that a form has is text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        entry = Entry(request.headers.get("x-request-id") or uuid.uuid4().hex, scope["path"], scope["headers"])
        self.ledger.append(entry)
        try:
            asked = await self.read(request, entry)
            async with hearing(receive) as gone:
                await self.answer(asked, Reply(entry, send, gone, Script(), self.api.id_headers))
        except (BrokenPipeError, ClientDisconnect):
            pass  # an answer without its end tells an ASGI server to close the connection
        finally:
            if entry.status == "running":
                entry.status = "aborted"

    async def read(self, request: Request, entry: Entry) -> tuple[Ask, Script] | Refusal:
        """What is asked, and how to answer; or why it cannot be told."""
        try:
            entry.body = await (read_form(request) if self.api.form else request.body())
            if not known(request, self.key):
                return Refusal(401, STRANGER, headers={"www-authenticate": "Bearer"})
            ask = self.decode(entry.body)
            script = read_script(ask.texts(), request.headers.get("x-echo", ""))
        except (NoForm, msgspec.DecodeError, UnicodeDecodeError) as mistake:
            return Refusal(400, str(mistake))
        entry.model, entry.stream = ask.model, ask.streamed
        return ask, script

    async def answer(self, asked: tuple[Ask, Script] | Refusal, reply: Reply) -> None:
        began, entry = time.perf_counter(), reply.entry
        if isinstance(asked, Refusal):
            return await self.refuse(asked, reply)
        ask, script = asked
        reply.script = script
        await reply.pause(script.delay)
        if refusal := refused(ask, script):
            return await self.refuse(refusal, reply)

        said = Said(ask, script, entry.id, time.perf_counter() - began)
        entry.prompt_tokens = said.input
        headers = {f"fireworks-{name}": value for name, value in said.metrics.items()}
        if isinstance(ask, Streaming) and ask.streamed:
            return await reply.stream(ask, ask.events(said), headers)
        await reply.pause(script.pace * (said.count - 1))
        body = b"<html>no json</html>" if script.garbage else encode(ask.whole(said))
        return await reply.json(200, body, headers, said.total)

    async def refuse(self, refusal: Refusal, reply: Reply) -> None:
        error = self.api.error(refusal.status, refusal.message, reply.entry.id, refusal.code)
        await reply.json(refusal.status, encode(error), refusal.headers)


def known(request: Request, key: str | None) -> bool:
    """Whether the caller has the key, if there is one."""
    given = (request.headers.get("authorization"), request.headers.get("x-api-key"))
    return key is None or given[0] == f"Bearer {key}" or given[1] == key


@asynccontextmanager
async def hearing(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """What is done when the client is gone; what it has not been read of, is thrown away."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(hang_up())
    try:
        yield gone
    finally:
        gone.cancel()


def create_app() -> Starlette:
    """The backend, with a ledger of its own; reads GATEWAY_ECHO_KEY."""
    key = os.environ.get("GATEWAY_ECHO_KEY") or None
    ledger: deque[Entry] = deque(maxlen=KEPT)

    async def models(request: Request) -> Response:
        if not known(request, key):
            return JSONResponse(openai_error(401, STRANGER, ""), 401)
        data = [{"id": "echo", "object": "model", "owned_by": "echo", "created": 0}]
        return JSONResponse({"object": "list", "data": data})

    async def accounts(request: Request) -> Response:
        if request.method != "DELETE":
            return Response(encode([entry.row() for entry in ledger]), media_type="application/json")
        ledger.clear()
        return Response(status_code=204)

    return Starlette(
        routes=[
            *(Route(path, Endpoint(api, ledger, key), methods=["POST"]) for path, api in APIS.items()),
            Route("/v1/models", models),
            Route("/echo/ledger", accounts, methods=["GET", "DELETE"]),
            Route("/health", JSONResponse({"status": "ok"})),
            Route("/", PlainTextResponse(__doc__)),
        ]
    )


app = create_app()

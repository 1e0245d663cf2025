"""A scripted model backend: the one fake of the project, for the first run, for demonstrations and for tests.

It speaks the completions and chat API the way a Fireworks-style backend does. A token is a word, and what it generates
is the prompt's own words, over and over. Play with it:

    curl -N localhost:8000/v1/completions -H 'content-type: application/json' \
        -d '{"model": "any", "prompt": "to be or not #pace=0.2", "stream": true}'

How to misbehave is told in the request, by words of the prompt (in a chat: of the last user message), or by the header
`x-echo: delay=0.2; tokens=50`, which wins and keeps prompts clean. Words that direct are prompt tokens like any other,
but they are not repeated.

    #tokens=50         produces 50 tokens in each choice, or max_tokens if that is fewer; without either: 16
    #delay=0.2         seconds before the first byte
    #pace=0.01         seconds between tokens
    #usage=finish      reports usage in the finish chunk, as Fireworks does unasked; or `extra`, in a chunk of its own,
                       as OpenAI does by stream_options; `every`, so far, in each chunk, as vLLM can; `none`, nowhere
    #cached=3          says that 3 of the prompt's tokens came from a cache
    #status=503        answers with this error and produces nothing
    #retry-after=2     with #status: asks to wait 2 seconds
    #cut=5             drops the connection after 5 tokens, without a proper end; an answer that is no stream, half-way
    #error=5           ends a stream after 5 tokens with an error event and [DONE], as vLLM does
    #garbage           puts an event that is no JSON before the finish chunk; the answer that is no stream is no JSON
    #split=7           writes 7 bytes at a time, so that events arrive in pieces

GET /echo/ledger tells what was served, as this side counted it; DELETE /echo/ledger forgets it. With GATEWAY_ECHO_KEY
in the environment, /v1 asks for that bearer key.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, cycle, islice
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

KEPT = 50_000  # entries of the ledger; older ones are forgotten, so that a long demonstration stays small
STRANGER = "found no key, or another than GATEWAY_ECHO_KEY"
DEFAULT_TOKENS = 16  # what max_tokens was by default, before the API left it to the model

Json: TypeAlias = dict[str, Any]
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
encode = msgspec.json.encode


class Script(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What to do with one request: the table above, as types."""

    tokens: Count | None = None
    delay: Seconds = 0
    pace: Seconds = 0
    usage: Literal["finish", "extra", "every", "none"] | None = None
    cached: Count = 0
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None
    retry_after: Count | None = None
    cut: Count | None = None
    error: Count | None = None
    garbage: bool = False
    split: Annotated[int, msgspec.Meta(ge=1)] | None = None


DIRECTIVES = frozenset(f.encode_name for f in msgspec.structs.fields(Script))


def directs(word: str) -> bool:
    return word[0] == "#" and word[1:].partition("=")[0] in DIRECTIVES


def read_script(texts: Sequence[str], header: str = "") -> Script:
    """The script in a request's texts and in its header. Raises msgspec.ValidationError for what cannot be one."""
    words = [word[1:] for text in texts if "#" in text for word in text.split() if directs(word)]
    words += [word.strip() for word in header.split(";") if word.strip()]
    return msgspec.convert({k: v or "true" for k, _, v in (w.partition("=") for w in words)}, Script, strict=False)


# — requests: the members that matter here; all others are welcome


class Completion(msgspec.Struct):
    model: str
    prompt: str | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1)]
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = 1
    stream: bool | None = False
    stream_options: Json | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    perf_metrics_in_response: bool | None = False
    echo: bool | None = False
    logprobs: bool | int | None = None

    names: ClassVar = ("cmpl", "text_completion", "text_completion")  # prefix of ids; an answer's object, a chunk's
    opening: ClassVar[Json] = {}  # what a streamed choice begins with, if anything
    closing: ClassVar[Json] = {"text": ""}  # what its finish chunk carries

    def texts(self) -> list[str]:
        """What is to be continued, prompt by prompt."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: Sequence[object] = [self.prompt] if alone else self.prompt
        return [" ".join(map(str, p)) if isinstance(p, list) else str(p) for p in prompts]

    def prompt_tokens(self) -> int:
        return sum(len(text.split()) for text in self.texts())

    def member(self, text: str) -> Json:
        """How a choice carries a text, whole or a piece of it."""
        return {"text": text}


class Part(msgspec.Struct):
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else " ".join(p.text or "" for p in self.content or ())


class Chat(Completion, kw_only=True):
    prompt: str = ""
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]

    names = ("chatcmpl", "chat.completion", "chat.completion.chunk")
    opening = {"delta": {"role": "assistant", "content": ""}}
    closing = {"delta": {}}

    def texts(self) -> list[str]:
        return [next((m.text() for m in reversed(self.messages) if m.role == "user"), "")]

    def prompt_tokens(self) -> int:
        return sum(len(m.text().split()) for m in self.messages)

    def member(self, text: str) -> Json:
        return {"delta": {"content": text}} if self.stream else {"message": {"role": "assistant", "content": text}}


@dataclass(slots=True)
class Entry:
    """One request as this side saw it, a row of the ledger. `completion_tokens` are those that were written."""

    id: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
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


# — answers: decided first, written afterwards


class Answer:
    """What is said to one request: each prompt n times, continued by its own words."""

    def __init__(self, ask: Completion, script: Script, entry: Entry, metrics: Json) -> None:
        self.ask, self.script, self.prompt_tokens = ask, script, entry.prompt_tokens
        limit = ask.max_completion_tokens if ask.max_tokens is None else ask.max_tokens
        self.count = min((n for n in (script.tokens, limit) if n is not None), default=DEFAULT_TOKENS)
        stopped = script.tokens is not None and (limit is None or script.tokens < limit)
        self.finish = "stop" if stopped else "length"
        self.said = [self._say(text) for text in ask.texts() for _ in range(ask.n or 1)]
        self.total = self.count * len(self.said)
        prefix, *objects = ask.names
        named = {"id": f"{prefix}-{entry.id}", "object": objects[bool(ask.stream)]}
        self.head = {**named, "created": int(time.time()), "model": ask.model}
        self.perf = {"perf_metrics": metrics} if ask.perf_metrics_in_response else {}

    def _say(self, text: str) -> tuple[str, list[str]]:
        """What a choice echoes of its prompt, and its tokens with the blanks between them."""
        spoken = [word for word in text.split() if not directs(word)] or ["echo"]
        words = [f" {word}" for word in islice(cycle(spoken), self.count)]
        return (text, words) if self.ask.echo else ("", [word[1:] for word in words[:1]] + words[1:])

    def _choice(self, index: int, member: Json, finish: str | None, words: Sequence[str] = (), at: int = 0) -> Json:
        logprobs: Json | None = None
        if words and type(self.ask.logprobs) is int:  # the legacy form; the one that `true` asks for is not played
            logprobs = {"tokens": words, "token_logprobs": [-0.5] * len(words)}
            logprobs["top_logprobs"] = [{word: -0.5} for word in words]
            logprobs["text_offset"] = [*accumulate(map(len, words), initial=at)][:-1]
        return {"index": index, **member, "logprobs": logprobs, "finish_reason": finish}

    def usage(self, tokens: int) -> Json:
        counts = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + tokens}
        details = {"cached_tokens": self.script.cached}
        return {"usage": {**counts, "completion_tokens": tokens, "prompt_tokens_details": details}}

    def whole(self) -> bytes:
        """The answer in one piece."""
        if self.script.garbage:
            return b"<html>no json</html>"
        choices = [
            self._choice(i, self.ask.member(echoed + "".join(words)), self.finish, words, len(echoed))
            for i, (echoed, words) in enumerate(self.said)
        ]
        usage = {} if self.script.usage == "none" else self.usage(self.total)
        return encode({**self.head, "choices": choices, **usage, **self.perf})

    def events(self) -> Iterator[tuple[float, int, object]]:
        """The answer as a stream: the seconds before each event, the tokens in it, its data."""
        ask, script, at = self.ask, self.script, [len(echoed) for echoed, _ in self.said]
        report = script.usage or ("extra" if (ask.stream_options or {}).get("include_usage") else "finish")
        done = 0

        def chunk(choice: Json) -> Json:
            usage = self.usage(done) if report == "every" else {"usage": None} if report == "extra" else {}
            return {**self.head, "choices": [choice], **usage}

        for i, (echoed, _) in enumerate(self.said):
            for member in [ask.opening] * bool(ask.opening) + [ask.member(echoed)] * bool(echoed):
                yield 0, 0, chunk(self._choice(i, member, None))
        tokens = ((n, i, words[n]) for n in range(self.count) for i, (_, words) in enumerate(self.said))
        for n, i, word in islice(tokens, script.error):
            done += 1
            yield script.pace if n and not i else 0, 1, chunk(self._choice(i, ask.member(word), None, [word], at[i]))
            at[i] += len(word)
        if script.error is not None and script.error <= self.total:
            yield 0, 0, {"error": error(500, "the script ends here")}
        else:
            if script.garbage:
                yield 0, 0, b"{no json"
            for i in range(len(self.said)):
                finish = chunk(self._choice(i, ask.closing, self.finish))
                if i == len(self.said) - 1:
                    finish |= self.perf | (self.usage(done) if report == "finish" else {})
                yield 0, 0, finish
            if report == "extra":
                yield 0, 0, {**self.head, "choices": [], **self.usage(done)}
        yield 0, 0, b"[DONE]"


def error(code: int, message: str) -> Json:
    """The error object, as Fireworks fills OpenAI's."""
    kind = "server_error" if code >= 500 else "rate_limit_error" if code == 429 else "invalid_request_error"
    return {"object": "error", "type": kind, "code": kind, "param": None, "message": message}


@dataclass(slots=True)
class Reply:
    """The way back to one client. What waits or writes raises BrokenPipeError where the line ends: left, or cut."""

    entry: Entry
    send: Send
    gone: asyncio.Task[None]
    script: Script

    async def pause(self, seconds: float) -> None:
        if seconds > 0 and (await asyncio.wait({self.gone}, timeout=seconds))[0]:
            raise BrokenPipeError

    async def start(self, code: int, content_type: str, headers: Json) -> None:
        self.entry.code = code
        given = {"content-type": content_type, "x-request-id": self.entry.id, **headers}
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

    async def json(self, code: int, body: bytes, headers: Json, tokens: int = 0) -> None:
        await self.start(code, "application/json", {"content-length": len(body), **headers})
        if self.script.cut is not None and self.script.cut <= tokens:
            await self.write(body[: len(body) // 2], self.script.cut)
            raise BrokenPipeError
        await self.write(body, tokens)
        await self.end()

    async def stream(self, events: Iterator[tuple[float, int, object]], headers: Json) -> None:
        await self.start(200, "text/event-stream", headers)
        for seconds, tokens, data in events:
            await self.pause(seconds)
            await self.write(b"data: %s\n\n" % (data if isinstance(data, bytes) else encode(data)), tokens)
        await self.end()


# — the application


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the two APIs, as an ASGI application."""

    decode: Callable[[bytes], Completion]
    ledger: deque[Entry]
    bearer: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return  # a request that never was
        entry = Entry(request.headers.get("x-request-id") or uuid.uuid4().hex, scope["path"], scope["headers"], body)
        self.ledger.append(entry)
        gone = asyncio.create_task(hang_up(receive))
        try:
            await self.serve(request.headers, Reply(entry, send, gone, Script()))
        except BrokenPipeError:
            pass  # an answer without its end tells an ASGI server to close the connection
        finally:
            gone.cancel()
            if entry.status == "running":
                entry.status = "aborted"

    async def serve(self, headers: Headers, reply: Reply) -> None:
        began, entry = time.perf_counter(), reply.entry

        async def refuse(code: int, message: str, headers: Json) -> None:
            await reply.json(code, encode({"error": error(code, message), "request_id": entry.id}), headers)

        if self.bearer and headers.get("authorization") != self.bearer:
            return await refuse(401, STRANGER, {"www-authenticate": "Bearer"})
        try:
            ask = self.decode(entry.body)
            script = read_script(ask.texts(), headers.get("x-echo", ""))
        except (msgspec.DecodeError, UnicodeDecodeError) as mistake:
            return await refuse(400, str(mistake), {})
        entry.model, entry.stream, reply.script = ask.model, bool(ask.stream), script
        await reply.pause(script.delay)
        if script.status:
            after = {} if script.retry_after is None else {"retry-after": script.retry_after}
            return await refuse(script.status, "the script says so", after)

        entry.prompt_tokens = ask.prompt_tokens()
        metrics: Json = {"prompt-tokens": entry.prompt_tokens, "cached-prompt-tokens": script.cached}
        metrics["server-time-to-first-token"] = round(time.perf_counter() - began, 4)
        named = {f"fireworks-{name}": value for name, value in metrics.items()}
        answer = Answer(ask, script, entry, metrics)
        if ask.stream:
            return await reply.stream(answer.events(), named)
        await reply.pause(script.pace * (answer.count - 1))
        return await reply.json(200, answer.whole(), named, answer.total)


async def hang_up(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def create_app() -> Starlette:
    """The backend, with a ledger of its own; reads GATEWAY_ECHO_KEY."""
    key = os.environ.get("GATEWAY_ECHO_KEY")
    bearer = f"Bearer {key}" if key else None
    ledger: deque[Entry] = deque(maxlen=KEPT)

    async def models(request: Request) -> Response:
        if bearer and request.headers.get("authorization") != bearer:
            return JSONResponse({"error": error(401, STRANGER)}, 401)
        data = [{"id": "echo", "object": "model", "owned_by": "echo", "created": 0}]
        return JSONResponse({"object": "list", "data": data})

    async def accounts(request: Request) -> Response:
        if request.method != "DELETE":
            return Response(encode([entry.row() for entry in ledger]), media_type="application/json")
        ledger.clear()
        return Response(status_code=204)

    completions = Endpoint(msgspec.json.Decoder(Completion).decode, ledger, bearer)
    chat = Endpoint(msgspec.json.Decoder(Chat).decode, ledger, bearer)
    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/echo/ledger", accounts, methods=["GET", "DELETE"]),
            Route("/health", JSONResponse({"status": "ok"})),
            Route("/", PlainTextResponse(__doc__)),
        ]
    )


app = create_app()

"""What the scripted backend says: its scripts, and each API that it speaks as a class of its own.

A request is a struct with the members that matter here; all others are welcome. Its class knows what words are in it
(`texts`), how they are told in one piece (`whole`) and, where the API streams, how they are told token by token
(`opening`, `piece`, `closing`). What is told is decided before, once for all of them: `Said`. Nothing here waits, reads
or writes; that is gateway/echo.py, whose first lines are the manual of the scripts.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, cycle, islice
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import msgspec

MOST = 100_000  # tokens of a choice, whatever is asked for: all of them are made at once
DEFAULT_TOKENS = 16  # what max_tokens was by default, before the API left it to the model
DIMENSIONS = 8  # of an embedding, where the request names no number
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # 1 by 1

Json: TypeAlias = dict[str, Any]
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
encode = msgspec.json.encode


# — scripts


class Script(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What to do with one request: the table of the manual, as types."""

    tokens: Count | None = None
    delay: Seconds = 0
    pace: Seconds = 0
    usage: Literal["finish", "extra", "every", "none"] | None = None
    cached: Count = 0
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None
    retry_after: Count | None = None
    context: Count | None = None
    strict_openai: bool = False
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


# — errors, in two dialects


def openai_error(status: int, message: str, called: str, code: str | None = None) -> Json:
    """OpenAI's error object, as Fireworks fills it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"object": "error", "type": kind, "code": code or kind, "param": None, "message": message}
    return {"error": error, "request_id": called}


ANTHROPIC_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
ANTHROPIC_KINDS |= {413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error", 529: "overloaded_error"}


def anthropic_error(status: int, message: str, called: str, code: str | None = None) -> Json:
    """Anthropic's error, which has no codes."""
    kind = ANTHROPIC_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": called}


# — what is said


class Token(NamedTuple):
    """One token of a stream."""

    text: str
    choice: int  # whose it is
    at: int  # where it begins in the text of its choice
    number: int  # of tokens so far, in all choices, with this one
    pause: float  # the seconds before it


class Event(NamedTuple):
    """One event of a stream."""

    data: Json | bytes  # bytes: as they are, which is no JSON
    tokens: int = 0
    pause: float = 0  # the seconds before it


class Said:
    """What is said to one request: each of its texts so many times, continued by its own words."""

    def __init__(self, ask: Ask, script: Script, called: str, waited: float = 0) -> None:
        self.script, self.called, self.created = script, called, int(time.time())
        self.input, limit = ask.prompt_tokens(), ask.limit
        room = None if script.context is None else max(script.context - self.input, 0)
        self.count = min((n for n in (script.tokens, limit) if n is not None), default=DEFAULT_TOKENS)
        self.count = min(self.count, MOST)
        self.count = self.count if room is None else min(self.count, room)
        self.stopped = self.count == script.tokens != limit  # of its own, not by a limit
        self.finish = "stop" if self.stopped else "length"
        texts = [text for text in ask.texts() for _ in range(ask.times)]
        self.choices = [(text if ask.echoes else "", self._words(ask, text)) for text in texts]
        self.total = self.count * len(self.choices)
        self.text = "".join(self.choices[0][1])  # all there is, where an API has no choices
        self.metrics: Json = {"prompt-tokens": self.input, "cached-prompt-tokens": script.cached}
        self.metrics["server-time-to-first-token"] = round(waited, 4)

    def _words(self, ask: Ask, text: str) -> list[str]:
        """The tokens of a choice, with the blanks between them."""
        spoken = [word for word in text.split() if not directs(word)] or ["echo"]
        words = [f" {word}" for word in islice(cycle(spoken), self.count)]
        return words if ask.echoes else [word[1:] for word in words[:1]] + words[1:]

    @property
    def fails(self) -> bool:
        """Whether the script ends it with an error."""
        return self.script.error is not None and self.script.error <= self.total

    def tokens(self) -> Iterator[Token]:
        """The tokens as they are produced, choice by choice in turn, up to the script's error."""
        at = [len(echoed) for echoed, _ in self.choices]
        order = ((n, i, words[n]) for n in range(self.count) for i, (_, words) in enumerate(self.choices))
        for number, (n, i, word) in enumerate(islice(order, self.script.error), 1):
            yield Token(word, i, at[i], number, self.script.pace if n and not i else 0)
            at[i] += len(word)

    def counts(self, output: int) -> Json:
        """The usage of so many tokens, in the words of OpenAI's older APIs."""
        counts = {"prompt_tokens": self.input, "total_tokens": self.input + output, "completion_tokens": output}
        return {**counts, "prompt_tokens_details": {"cached_tokens": self.script.cached}}

    def reported(self, usage: Json) -> Json:
        """The member that tells it, unless the script keeps it."""
        return {} if self.script.usage == "none" else {"usage": usage}


# — the APIs


class Ask(msgspec.Struct, kw_only=True):
    """A request of any API."""

    model: str

    form: ClassVar[bool] = False  # whether it comes as a multipart form
    error = staticmethod(openai_error)
    id_headers: ClassVar[Sequence[str]] = ("x-request-id",)
    streamed: ClassVar[Any] = False
    echoes: ClassVar[Any] = False  # whether what is said begins with the text itself
    times: ClassVar[Any] = 1  # how often each text is continued
    limit: ClassVar[Any] = None  # how many tokens may be said, at most

    def texts(self) -> list[str]:
        """What is to be continued, one by one."""
        raise NotImplementedError

    def prompt_tokens(self) -> int:
        return count(*self.texts())

    def whole(self, said: Said) -> Json:
        """The answer in one piece."""
        raise NotImplementedError


class Streaming(Ask, kw_only=True):
    """A request whose answer may be asked for token by token."""

    stream: bool | None = False

    named: ClassVar[bool] = False  # whether its events have names, which are their types
    last: ClassVar[Sequence[Event]] = ()  # what every stream ends with, failed or not

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    def events(self, said: Said) -> Iterator[Event]:
        """The answer as a stream."""
        yield from self.opening(said)
        yield from (self.piece(said, token) for token in said.tokens())
        if said.fails:
            yield self.failure(said, "the script ends here")
        else:
            if said.script.garbage:
                yield Event(b"{no json")
            yield from self.closing(said)
        yield from self.last

    def framed(self, data: Json | bytes) -> bytes:
        """An event as it is written."""
        name = b"event: %s\n" % data["type"].encode() if self.named and isinstance(data, dict) else b""
        return b"%sdata: %s\n\n" % (name, data if isinstance(data, bytes) else encode(data))

    def opening(self, said: Said) -> Iterator[Event]:
        """What comes before the tokens."""
        return iter(())

    def piece(self, said: Said, token: Token) -> Event:
        raise NotImplementedError

    def closing(self, said: Said) -> Iterator[Event]:
        """What comes after the tokens."""
        raise NotImplementedError

    def failure(self, said: Said, reason: str) -> Event:
        """What ends a stream before its time."""
        return Event({"error": openai_error(500, reason, said.called)["error"]})


def count(*texts: str) -> int:
    """How many tokens these are."""
    return sum(len(text.split()) for text in texts)


Prompt: TypeAlias = str | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1)]


def each(prompt: Prompt) -> list[str]:
    """The texts of a prompt, of which tokens are told as their numbers."""
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts: Sequence[object] = [prompt] if alone else prompt
    return [" ".join(map(str, p)) if isinstance(p, list) else str(p) for p in prompts]


class Part(msgspec.Struct):
    text: str | None = None


Content: TypeAlias = str | list[Part] | None


def text_of(content: Content) -> str:
    return content if isinstance(content, str) else " ".join(part.text or "" for part in content or ())


class Message(msgspec.Struct):
    """A message of a chat; an item of a response's input need not be one, and has no role then."""

    role: str = ""
    content: Content = None


Messages: TypeAlias = Annotated[list[Message], msgspec.Meta(min_length=1)]


def last_of(messages: Sequence[Message]) -> str:
    """What the user said last."""
    return next((text_of(m.content) for m in reversed(messages) if m.role == "user"), "")


class Completion(Streaming, kw_only=True):
    """POST /v1/completions"""

    prompt: Prompt
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = 1
    stream_options: Json | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    perf_metrics_in_response: bool | None = False
    echo: bool | None = False
    logprobs: bool | int | None = None
    context_length_exceeded_behavior: Any = msgspec.UNSET

    names: ClassVar = ("cmpl", "text_completion", "text_completion")  # prefix of ids; an answer's object, a chunk's
    start: ClassVar[Json] = {}  # what a streamed choice begins with, if anything
    end: ClassVar[Json] = {"text": ""}  # what its finish chunk carries
    last = (Event(b"[DONE]"),)

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def times(self) -> int:
        return self.n or 1

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def texts(self) -> list[str]:
        return each(self.prompt)

    def member(self, text: str) -> Json:
        """How a choice carries a text, whole or a piece of it."""
        return {"text": text}

    def whole(self, said: Said) -> Json:
        choices = [
            self._choice(i, self.member(echoed + "".join(words)), said.finish, words, len(echoed))
            for i, (echoed, words) in enumerate(said.choices)
        ]
        return {**self._head(said), "choices": choices, **said.reported(said.counts(said.total)), **self._perf(said)}

    def opening(self, said: Said) -> Iterator[Event]:
        for i, (echoed, _) in enumerate(said.choices):
            for member in [self.start] * bool(self.start) + [self.member(echoed)] * bool(echoed):
                yield Event(self._chunk(said, self._choice(i, member), 0))

    def piece(self, said: Said, token: Token) -> Event:
        choice = self._choice(token.choice, self.member(token.text), None, [token.text], token.at)
        return Event(self._chunk(said, choice, token.number), tokens=1, pause=token.pause)

    def closing(self, said: Said) -> Iterator[Event]:
        ends = [self._chunk(said, self._choice(i, self.end, said.finish), said.total) for i in range(len(said.choices))]
        ends[-1] |= self._perf(said)
        if self._reports(said) == "finish":
            ends[-1] |= {"usage": said.counts(said.total)}
        if self._reports(said) == "extra":
            ends.append({**self._head(said), "choices": [], "usage": said.counts(said.total)})
        yield from map(Event, ends)

    def _head(self, said: Said) -> Json:
        prefix, *objects = self.names
        named = {"id": f"{prefix}-{said.called}", "object": objects[self.streamed]}
        return {**named, "created": said.created, "model": self.model}

    def _choice(
        self, index: int, member: Json, finish: str | None = None, words: Sequence[str] = (), at: int = 0
    ) -> Json:
        logprobs: Json | None = None
        if words and type(self.logprobs) is int:  # the legacy form; the one that `true` asks for is not played
            logprobs = {"tokens": words, "token_logprobs": [-0.5] * len(words)}
            logprobs["top_logprobs"] = [{word: -0.5} for word in words]
            logprobs["text_offset"] = [*accumulate(map(len, words), initial=at)][:-1]
        return {"index": index, **member, "logprobs": logprobs, "finish_reason": finish}

    def _reports(self, said: Said) -> str:
        """Where a stream tells its usage."""
        asked = (self.stream_options or {}).get("include_usage")
        return said.script.usage or ("extra" if asked else "finish")

    def _chunk(self, said: Said, choice: Json, tokens: int) -> Json:
        where = self._reports(said)
        usage = {"usage": said.counts(tokens)} if where == "every" else {"usage": None} if where == "extra" else {}
        return {**self._head(said), "choices": [choice], **usage}

    def _perf(self, said: Said) -> Json:
        return {"perf_metrics": said.metrics} if self.perf_metrics_in_response else {}


class Chat(Completion, kw_only=True):
    """POST /v1/chat/completions"""

    prompt: str = ""
    messages: Messages

    names = ("chatcmpl", "chat.completion", "chat.completion.chunk")
    start = {"delta": {"role": "assistant", "content": ""}}
    end = {"delta": {}}

    def texts(self) -> list[str]:
        return [last_of(self.messages)]

    def prompt_tokens(self) -> int:
        return count(*(text_of(m.content) for m in self.messages))

    def member(self, text: str) -> Json:
        return {"delta": {"content": text}} if self.stream else {"message": {"role": "assistant", "content": text}}


class Responses(Streaming, kw_only=True):
    """POST /v1/responses"""

    input: str | list[Message] = ""
    instructions: str | None = None
    max_output_tokens: Count | None = None

    named = True

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    def texts(self) -> list[str]:
        return [self.input if isinstance(self.input, str) else last_of(self.input)]

    def prompt_tokens(self) -> int:
        items = [self.input] if isinstance(self.input, str) else [text_of(item.content) for item in self.input]
        return count(self.instructions or "", *items)

    def whole(self, said: Said) -> Json:
        ends = {"reason": "max_output_tokens"} if self.limit is not None and not said.stopped else None
        status = "incomplete" if ends else "completed"
        details = {"input_tokens_details": {"cached_tokens": said.script.cached, "cache_write_tokens": 0}}
        details["output_tokens_details"] = {"reasoning_tokens": 0}
        counts = {"input_tokens": said.input, "output_tokens": said.total, "total_tokens": said.input + said.total}
        done = {"status": status, "incomplete_details": ends, "output": [self._item(said, status, said.text)]}
        return {**self._head(said), **done, **said.reported({**counts, **details})}

    def events(self, said: Said) -> Iterator[Event]:
        """The answer as a stream, of which each event has its number."""
        for number, event in enumerate(super().events(said)):
            if isinstance(event.data, dict):
                event.data["sequence_number"] = number
            yield event

    def opening(self, said: Said) -> Iterator[Event]:
        begun = {**self._head(said), "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        yield Event({"type": "response.created", "response": begun})
        yield Event({"type": "response.in_progress", "response": begun})
        item = {**self._item(said, "in_progress", ""), "content": []}
        yield Event({"type": "response.output_item.added", "output_index": 0, "item": item})
        yield Event({"type": "response.content_part.added", **self._place(said), "part": self._part("")})

    def piece(self, said: Said, token: Token) -> Event:
        delta = {"type": "response.output_text.delta", **self._place(said), "delta": token.text, "logprobs": []}
        return Event(delta, tokens=1, pause=token.pause)

    def closing(self, said: Said) -> Iterator[Event]:
        whole = self.whole(said)
        yield Event({"type": "response.output_text.done", **self._place(said), "text": said.text, "logprobs": []})
        yield Event({"type": "response.content_part.done", **self._place(said), "part": self._part(said.text)})
        yield Event({"type": "response.output_item.done", "output_index": 0, "item": whole["output"][0]})
        yield Event({"type": f"response.{whole['status']}", "response": whole})

    def failure(self, said: Said, reason: str) -> Event:
        return Event({"type": "error", "code": "server_error", "message": reason, "param": None})

    def _head(self, said: Said) -> Json:
        asked: Json = {"instructions": self.instructions, "max_output_tokens": self.max_output_tokens, "metadata": {}}
        tools = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
        named = {"id": f"resp_{said.called}", "object": "response", "created_at": said.created, "model": self.model}
        return {**named, "error": None, "temperature": 1.0, "top_p": 1.0, **asked, **tools}

    def _item(self, said: Said, status: str, text: str) -> Json:
        told = {"role": "assistant", "status": status, "content": [self._part(text)]}
        return {"id": f"msg_{said.called}", "type": "message", **told}

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _place(self, said: Said) -> Json:
        return {"item_id": f"msg_{said.called}", "output_index": 0, "content_index": 0}


class AnthropicMessages(Streaming, kw_only=True):
    """POST /v1/messages"""

    messages: Messages
    max_tokens: Count
    system: Content = None

    error = staticmethod(anthropic_error)
    id_headers = ("x-request-id", "request-id")  # Anthropic's clients read the other one
    named = True

    @property
    def limit(self) -> int:
        return self.max_tokens

    def texts(self) -> list[str]:
        return [last_of(self.messages)]

    def prompt_tokens(self) -> int:
        return count(text_of(self.system), *(text_of(m.content) for m in self.messages))

    def whole(self, said: Said) -> Json:
        content = [{"type": "text", "text": said.text}]
        return self._message(said, content, self._reason(said), said.total)

    def opening(self, said: Said) -> Iterator[Event]:
        yield Event({"type": "message_start", "message": self._message(said, [], None, 0)})
        yield Event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        yield Event({"type": "ping"})

    def piece(self, said: Said, token: Token) -> Event:
        delta = {"type": "text_delta", "text": token.text}
        return Event({"type": "content_block_delta", "index": 0, "delta": delta}, tokens=1, pause=token.pause)

    def closing(self, said: Said) -> Iterator[Event]:
        yield Event({"type": "content_block_stop", "index": 0})
        delta = {"stop_reason": self._reason(said), "stop_sequence": None}
        yield Event({"type": "message_delta", "delta": delta, **said.reported({"output_tokens": said.total})})
        yield Event({"type": "message_stop"})

    def failure(self, said: Said, reason: str) -> Event:
        return Event(anthropic_error(500, reason, said.called))

    def _reason(self, said: Said) -> str:
        return "end_turn" if said.stopped else "max_tokens"

    def _message(self, said: Said, content: list[Json], reason: str | None, output: int) -> Json:
        cached = min(said.script.cached, said.input)
        usage = {"input_tokens": said.input - cached, "cache_read_input_tokens": cached, "output_tokens": output}
        named = {"id": f"msg_{said.called}", "type": "message", "role": "assistant", "model": self.model}
        ends = {"stop_reason": reason, "stop_sequence": None}
        return {**named, "content": content, **ends, **said.reported({**usage, "cache_creation_input_tokens": 0})}


class Embeddings(Ask, kw_only=True):
    """POST /v1/embeddings: a text always has the same vector."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=8192)] | None = None

    limit = 0

    def texts(self) -> list[str]:
        return each(self.input)

    def whole(self, said: Said) -> Json:
        rows = [
            {"object": "embedding", "index": i, "embedding": self._embedding(text)}
            for i, text in enumerate(self.texts())
        ]
        usage = {"prompt_tokens": said.input, "total_tokens": said.input}
        return {"object": "list", "data": rows, "model": self.model, **said.reported(usage)}

    def _embedding(self, text: str) -> list[float] | str:
        """The vector, of numbers that are the same in both formats."""
        digest = hashlib.shake_128(text.encode()).digest(self.dimensions or DIMENSIONS)
        vector = [(byte - 128) / 128 for byte in digest]
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return packed if self.encoding_format == "base64" else vector


class Rerank(Ask, kw_only=True):
    """POST /v1/rerank: a document is relevant by the share of the query's words that it has."""

    query: str
    documents: Annotated[list[str | Part], msgspec.Meta(min_length=1)]
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool | None = False

    limit = 0

    def texts(self) -> list[str]:
        return [self.query]

    def prompt_tokens(self) -> int:
        return count(self.query, *self._documents())

    def whole(self, said: Said) -> Json:
        results = [self._result(i, text) for i, text in enumerate(self._documents())]
        results.sort(key=lambda result: -result["relevance_score"])
        usage = said.reported({"prompt_tokens": said.input, "total_tokens": said.input})
        return {"id": f"rerank-{said.called}", "model": self.model, "results": results[: self.top_n], **usage}

    def _documents(self) -> list[str]:
        return [document if isinstance(document, str) else document.text or "" for document in self.documents]

    def _result(self, index: int, text: str) -> Json:
        words = {word for word in self.query.split() if not directs(word)}
        score = len(words & set(text.split())) / (len(words) or 1)
        document = {"document": {"text": text}} if self.return_documents else {}
        return {"index": index, "relevance_score": score, **document}


class Images(Ask, kw_only=True):
    """POST /v1/images/generations: each image is the same point, and made of so many tokens."""

    prompt: str
    n: Annotated[int, msgspec.Meta(ge=1, le=10)] | None = 1

    @property
    def times(self) -> int:
        return self.n or 1

    def texts(self) -> list[str]:
        return [self.prompt]

    def whole(self, said: Said) -> Json:
        counts = {"input_tokens": said.input, "output_tokens": said.total, "total_tokens": said.input + said.total}
        details = {"input_tokens_details": {"text_tokens": said.input, "image_tokens": 0}}
        data = [{"b64_json": PNG}] * self.times
        return {"created": said.created, "data": data, "output_format": "png", **said.reported({**counts, **details})}


class File(msgspec.Struct):
    """What is kept of a file in a form."""

    filename: str
    size: int
    sha256: str


class ImageEdits(Images, kw_only=True):
    """POST /v1/images/edits: what is to be edited is not looked at."""

    form = True


class ImageVariations(ImageEdits, kw_only=True):
    """POST /v1/images/variations: of an image that is not looked at, by no words."""

    prompt: str = ""


class Transcription(Streaming, kw_only=True):
    """POST /v1/audio/transcriptions and /v1/audio/translations: what is heard in a file is what its prompt says."""

    file: File
    prompt: str = ""

    form = True

    def texts(self) -> list[str]:
        return [self.prompt]

    def whole(self, said: Said) -> Json:
        counts = {"input_tokens": said.input, "output_tokens": said.total, "total_tokens": said.input + said.total}
        details = {"input_token_details": {"text_tokens": said.input, "audio_tokens": 0}}
        return {"text": said.text, **said.reported({"type": "tokens", **counts, **details})}

    def piece(self, said: Said, token: Token) -> Event:
        return Event({"type": "transcript.text.delta", "delta": token.text}, tokens=1, pause=token.pause)

    def closing(self, said: Said) -> Iterator[Event]:
        yield Event({"type": "transcript.text.done", **self.whole(said)})


APIS: Mapping[str, type[Ask]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": Chat,
    "/v1/responses": Responses,
    "/v1/messages": AnthropicMessages,
    "/v1/embeddings": Embeddings,
    "/v1/rerank": Rerank,
    "/v1/images/generations": Images,
    "/v1/images/edits": ImageEdits,
    "/v1/images/variations": ImageVariations,
    "/v1/audio/transcriptions": Transcription,
    "/v1/audio/translations": Transcription,
}


# — refusals


class Refusal(NamedTuple):
    """Why a request is not answered."""

    status: int
    message: str
    code: str | None = None
    headers: Mapping[str, object] = MappingProxyType({})


def refused(ask: Ask, script: Script) -> Refusal | None:
    """What the script has against a request that could be read."""
    if script.status is not None:
        after = {} if script.retry_after is None else {"retry-after": script.retry_after}
        return Refusal(script.status, "the script says so", headers=after)
    if script.strict_openai and getattr(ask, "context_length_exceeded_behavior", msgspec.UNSET) is not msgspec.UNSET:
        return Refusal(400, "Unrecognized request argument supplied: context_length_exceeded_behavior")
    prompt = ask.prompt_tokens()
    if script.context is None or prompt + (ask.limit or 0) <= script.context:
        return None
    # vLLM's words, which are OpenAI's of 2023.
    asked = f"{prompt} tokens in the messages, Please reduce the length of the messages."
    if ask.limit is not None:
        asked = f"{prompt + ask.limit} tokens ({prompt} in the messages, {ask.limit} in the completion). "
        asked += "Please reduce the length of the messages or completion."
    told = f"This model's maximum context length is {script.context} tokens. However, you requested {asked}"
    return Refusal(400, told, "context_length_exceeded")

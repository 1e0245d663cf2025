"""An exchange that has ended, as the spans of a trace.

    POST /v1/chat/completions        server: the whole exchange; its parent is the caller's span
      admit                          the store was asked
      chat qwen3-8b                  client: an attempt that gave nothing; its backend's parent is this one
        connect                      where it got no further
      chat qwen3-8b                  client: the one that was answered, until the answer ended
        connect                      where no connection was there
        first byte
        stream                       where the answer was one

Nothing is noted for them on the way but what the exchange notes anyway; the rest is worked out here. Of what was asked
they have the numbers, of what was answered its size, its tokens and its end: never a word of either, nor a key, a user
or a path that a caller chose. One text is a caller's own, the name of a model where policies leave it to him: of that
what looks like a key is masked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import msgspec

from gateway.asgi import Scope
from gateway.exchange import Exchange
from gateway.masks import masked_text
from gateway.normalize import InferenceRequest
from gateway.snapshot import Model
from gateway.upstream import Answer, Upstream

Kind = Literal["internal", "server", "client"]
Value = str | bool | int | float | tuple[str, ...]
Attributes = dict[str, Value]


class Span(NamedTuple):
    """One of them; ids are hex digits, times of time.monotonic()."""

    name: str
    kind: Kind
    id: bytes
    parent: bytes  # empty: none
    began: float
    ended: float
    attributes: Attributes
    failed: bool = False


# — the names of the GenAI conventions, which are not stable yet

# What is told → its name in version 1.36 and in the newest one, None: it has none there.
_NAMES: Mapping[str, tuple[str | None, str | None]] = {
    "operation": ("gen_ai.operation.name", "gen_ai.operation.name"),
    "provider": ("gen_ai.system", "gen_ai.provider.name"),
    "model": ("gen_ai.request.model", "gen_ai.request.model"),
    "max_tokens": ("gen_ai.request.max_tokens", "gen_ai.request.max_tokens"),
    "temperature": ("gen_ai.request.temperature", "gen_ai.request.temperature"),
    "top_p": ("gen_ai.request.top_p", "gen_ai.request.top_p"),
    "top_k": ("gen_ai.request.top_k", "gen_ai.request.top_k"),
    "frequency_penalty": ("gen_ai.request.frequency_penalty", "gen_ai.request.frequency_penalty"),
    "presence_penalty": ("gen_ai.request.presence_penalty", "gen_ai.request.presence_penalty"),
    "seed": ("gen_ai.request.seed", "gen_ai.request.seed"),
    "n": ("gen_ai.request.choice.count", "gen_ai.request.choice.count"),
    "stream": (None, "gen_ai.request.stream"),
    "served_model": ("gen_ai.response.model", "gen_ai.response.model"),
    "finish_reasons": ("gen_ai.response.finish_reasons", "gen_ai.response.finish_reasons"),
    "first_chunk": (None, "gen_ai.response.time_to_first_chunk"),
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.input_tokens"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.output_tokens"),
    "cached_tokens": (None, "gen_ai.usage.cache_read.input_tokens"),
    "reasoning_tokens": (None, "gen_ai.usage.reasoning.output_tokens"),
}

# Endpoint → its well-known operation; others are called by their own name.
_OPERATIONS = {"completions": "text_completion", "chat/completions": "chat", "responses": "chat", "messages": "chat"}

Names = Mapping[str, str]


def names(*, latest: bool) -> Names:
    """What is told → the attribute that it is told in."""
    return {told: name for told, both in _NAMES.items() if (name := both[latest]) is not None}


# — an exchange


def spans_of(x: Exchange, scope: Scope, parent: bytes, names: Names) -> list[Span]:
    """The spans of an exchange; `parent` is the caller's, empty where there is none."""
    server = os.urandom(8).hex().encode()
    failed = x.status >= 500 or x.ended in ("upstream", "timeout", "gateway")
    spans = [
        Span(
            f"{scope['method']} {x.endpoint.path}",
            "server",
            server,
            parent,
            x.received,
            time.monotonic(),
            _exchange(x, scope, failed=failed),
            failed,
        )
    ]
    if x.lease is not None:
        spans.append(_part("admit", server, x.lease.asked, x.lease.since))
    if x.opening is not None:
        spans += _attempts(x, server, names)
    return spans


def _exchange(x: Exchange, scope: Scope, *, failed: bool) -> Attributes:
    """What is said of the whole. Names are HTTP's stable ones, or begin with gateway."""
    said: Attributes = {
        "http.request.method": scope["method"],
        "http.route": x.endpoint.path,
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "gateway.request.id": x.id,
        "gateway.ended": x.ended,
    }
    if x.started or x.ended != "client":  # who left before has got none
        said["http.response.status_code"] = x.status
    if x.endpoint.body != "any":  # of a route the path is a caller's
        said["url.path"] = scope["raw_path"].decode()
    if (size := x.body if x.upload is None else x.upload.passed) is not None:
        said["http.request.body.size"] = size
    if x.principal is not None:
        said["gateway.team"] = x.principal.team
    if x.lease is not None and x.lease.degraded:
        said["gateway.limits.degraded"] = True
    if x.answer is not None:
        said["http.response.body.size"] = x.answer.tail.length
        said["gateway.cost_usd"] = x.usage.cost(x.terms.price) / 1e6
    if x.error is not None:
        said["error.type"] = x.error.code or x.error.type
        if x.error.policies:
            said["gateway.limits.refused"] = x.error.policies
    elif failed:
        said["error.type"] = str(x.status)
    return said


def _attempts(x: Exchange, server: bytes, names: Names) -> Iterator[Span]:
    """A client span for every attempt, each with what it consists of. One begins when the one before has ended."""
    assert x.request is not None
    assert x.lease is not None
    assert x.opening is not None
    assert x.way is not None
    asked = _numbers(x.request, names)
    began, again = x.lease.since, 0
    for again, tried in enumerate(x.opening.tried, 1):
        said = asked | _asked(x, tried.model, tried.upstream, again - 1, names)
        if failed := tried.outcome != "cancelled":
            said["error.type"] = tried.outcome
        if tried.outcome.isdecimal():
            said["http.response.status_code"] = int(tried.outcome)
        yield Span(_name(x, tried.model), "client", tried.span, server, began, tried.ended, said, failed)
        if tried.outcome.startswith("upstream_connect_"):
            yield _part("connect", tried.span, began, tried.ended, failed=True)
        began = tried.ended
    if (answer := x.answer) is not None:
        span, said = x.way.span, asked | _asked(x, answer.model, answer.upstream, again, names)
        failure = _failure(x, answer)
        if failure is not None:
            said["error.type"] = failure
        said |= _answered(x, answer, answer.answered - began, names)
        yield Span(_name(x, answer.model), "client", span, server, began, x.ended_at, said, failure is not None)
        if answer.connected:
            yield _part("connect", span, began, answer.connected)
            began = answer.connected
        yield _part("first byte", span, began, answer.answered)
        if answer.is_stream:
            yield _part("stream", span, answer.answered, x.ended_at)


def _part(name: str, parent: bytes, began: float, ended: float, *, failed: bool = False) -> Span:
    return Span(name, "internal", os.urandom(8).hex().encode(), parent, began, ended, {}, failed)


def _name(x: Exchange, model: Model) -> str:
    return f"{_OPERATIONS.get(x.endpoint.name, x.endpoint.name)} {_called(model)}"


def _called(model: Model) -> str:
    return model.name if model.name == model.entry else masked_text(model.name)


def _asked(x: Exchange, model: Model, upstream: Upstream, again: int, names: Names) -> Attributes:
    """What is said of every attempt: who was asked, and for what."""
    said: Attributes = {
        names["operation"]: _OPERATIONS.get(x.endpoint.name, x.endpoint.name),
        names["provider"]: model.api,
        names["model"]: _called(model),
        "gateway.pool": model.pool,
        "server.address": upstream.address[0],
        "server.port": upstream.address[1],
    }
    if again:
        said["http.request.resend_count"] = again
    return said


def _answered(x: Exchange, answer: Answer, first: float, names: Names) -> Attributes:
    """What is said of an answer; `first` is how long its head took, in seconds."""
    usage = x.usage
    said: dict[str, Value] = {"served_model": _called(answer.model)}
    if answer.is_stream:
        said["first_chunk"] = first
    if reasons := _finish_reasons(answer):
        said["finish_reasons"] = reasons
    if usage.answered:
        said |= {"input_tokens": usage.input, "output_tokens": usage.output}
        said |= {"cached_tokens": usage.cached, "reasoning_tokens": usage.reasoning}
    said = _told(said, names)
    return {**said, "http.response.status_code": answer.status, "gateway.usage.source": usage.source}


def _failure(x: Exchange, answer: Answer) -> str | None:
    """What an attempt that was answered failed by, if it did."""
    if x.error is not None and x.error.fault == "upstream":
        return x.error.code or x.error.type
    return str(answer.status) if answer.status >= 400 else None


def _told(said: Mapping[str, Value], names: Names) -> Attributes:
    return {names[told]: value for told, value in said.items() if told in names}


# — what bodies say in numbers


class _Numbers(msgspec.Struct):
    """The members that have no words in them. Stop sequences have: they are the caller's text."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None  # as version 1.36 has it
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    n: int | None = None


_LARGE = 64 * 1024  # bytes of a body in which nothing is looked for: this happens on the event loop
_numbers_in = msgspec.json.Decoder(_Numbers)


def _numbers(request: InferenceRequest, names: Names) -> Attributes:
    """What was asked for, as far as it is numbers."""
    said: dict[str, Value] = {"stream": True} if request.stream else {}
    if request.endpoint.body == "json" and len(request.body) <= _LARGE:
        try:
            asked = _numbers_in.decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _told(said, names)
        numbers = msgspec.structs.asdict(asked)
        numbers["max_tokens"] = asked.max_tokens or asked.max_completion_tokens or asked.max_output_tokens
        numbers["n"] = None if asked.n == 1 else asked.n
        said |= {told: number for told, number in numbers.items() if number is not None and abs(number) < _ATTRIBUTE}
    return _told(said, names)


_ATTRIBUTE = 2**63  # integers of attributes have 64 bits, and a seed may be any

_END = 4 * 1024  # bytes at the end of an answer in which the reasons of its ends stand
_FINISH = re.compile(rb'"(?:finish_reason|stop_reason)"\s*:\s*"([a-z_]{1,20})"')
# A list, so that nothing else is told whatever a backend writes there.
_REASONS = frozenset(
    (
        *("stop", "length", "error", "abort", "content_filter", "tool_calls", "function_call"),
        *("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal"),
    )
)


def _finish_reasons(answer: Answer) -> tuple[str, ...]:
    """Why the choices of an answer ended. Within an answer's texts the quotes would be escaped."""
    found = (reason.decode() for reason in _FINISH.findall(answer.tail.last(_END)[-_END:]))
    return tuple(reason for reason in found if reason in _REASONS)[:8]

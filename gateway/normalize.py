"""Client bytes → InferenceRequest: aliases, model families, what fits a context window, splicing.

What a backend is asked is what the caller wrote. Only where an alias, a model's name or a boolean stands for
something else is that one member replaced in its place; the bytes of every other value stay, and where nothing stands
for anything else the body is the very object that came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import get_args

import msgspec
from msgspec.json import Decoder, encode

from gateway import contract
from gateway.contract import Members, Prompts, Values, cut
from gateway.endpoints import Endpoint
from gateway.errors import BadRequest, ContextLengthExceeded, Invalid, NotFound, Problem
from gateway.language import Effort
from gateway.snapshot import Family, Model, Route, Snapshot
from gateway.uploads import Form, Upload

# Callers may write integers of any size. No limit is larger (language.py), and the store's arithmetic is exact so far.
MAX_BOUND = 10**12


class InferenceRequest(msgspec.Struct, frozen=True):
    """A request that the backends of its model can be asked."""

    endpoint: Endpoint
    path: str  # what is asked of the upstream: "/v1/completions"
    model: Model
    asked_model: str  # the name as the caller wrote it
    body: bytes  # what goes upstream
    stream: bool
    user: str | None
    input_estimate: int  # tokens: a quarter of the bytes of text, or the exact count of a prompt in tokens
    output_bound: int  # the most output tokens that it may produce, over all prompts and choices
    session: bytes = b""  # what requests have in common that should meet the same upstream; only where a pool asks
    injected: bool = False  # the body asks for usage in an event of its own, and the caller did not
    truncates: bool = False  # it is to be made to fit where a backend says that it is too long for its model
    given: bytes = b""  # the caller's own body; only where it may have to be made into another one
    query: bytes = b""  # of the target, passed on as it came
    method: str = "POST"
    content_type: bytes = b"application/json"
    upload: Upload | None = None  # the body, where it is passed on as it comes


def normalize(endpoint: Endpoint, body: bytes, snapshot: Snapshot, query: bytes = b"") -> InferenceRequest:
    """The request in a body. Raises BadRequest (400), Invalid (422, all problems at once) and NotFound (404)."""
    members = contract.take_apart(body)
    asked = contract.model_of(members)
    model = None if asked is None else snapshot.model(asked)
    if model is not None:
        return _for(model, endpoint, body, members, query)
    _, problems = contract.check(
        endpoint.name, members, profile=snapshot.gateway.profile, strict=snapshot.gateway.strictness == "strict"
    )
    if problems:
        raise Invalid(problems, status=endpoint.invalid)
    assert asked is not None, "the contract has told of a model that is missing"
    raise _not_found(asked)


def instead(request: InferenceRequest, model: Model) -> InferenceRequest:
    """The same request for a model that stands in for its own. Raises Invalid, BadRequest where it does not take it."""
    if request.endpoint.body == "json":
        return _for(model, request.endpoint, request.given, contract.take_apart(request.given), request.query)
    if model.upstream_name != request.model.upstream_name:
        raise Invalid([Problem(("model",), "the name stands in a body that is passed on as it comes")])
    return msgspec.structs.replace(request, model=model)


def fitted(request: InferenceRequest, room: int | None) -> InferenceRequest:
    """The same request for at most so many tokens in each answer, and for no more than it was; None: for as many as the
    backend finds room for."""
    members = contract.take_apart(request.given)
    return _for(request.model, request.endpoint, request.given, members, request.query, room or _UNBOUND)


def of_form(endpoint: Endpoint, form: Form, content_type: bytes, query: bytes, snapshot: Snapshot) -> InferenceRequest:
    """The request in a form, whose body is passed on as it comes but for the model's name. Raises NotFound."""
    model = snapshot.model(form.model)
    if model is None:
        raise _not_found(form.model)
    return InferenceRequest(
        endpoint=endpoint,
        path=endpoint.path,
        model=model,
        asked_model=form.model,
        body=b"",
        stream=form.fields.get("stream") == "true",
        user=form.fields.get("user"),
        input_estimate=0,  # what a sound or an image holds is known afterwards
        output_bound=0,
        query=query,
        content_type=content_type,
        upload=form.upload(model.upstream_name),
    )


def of_route(
    route: Route, path: str, query: bytes, method: str, content_type: bytes, upload: Upload | None
) -> InferenceRequest:
    """The request to a path that passes."""
    return InferenceRequest(
        endpoint=route.endpoint,
        path=path,
        model=route.model,
        asked_model=route.model.name,
        body=b"",
        stream=False,
        user=None,
        input_estimate=0,
        output_bound=0,
        query=query,
        method=method,
        content_type=content_type,
        upload=upload,
    )


def _not_found(asked: str) -> NotFound:
    unknown = f'Model not found, inaccessible, and/or not deployed: "{cut(asked, 200)}"'
    return NotFound(unknown, code="model_not_found", param="model")


def _for(
    model: Model, endpoint: Endpoint, body: bytes, members: Members, query: bytes, room: int | None = None
) -> InferenceRequest:
    values, problems = contract.check(endpoint.name, members, profile=model.profile, strict=model.strict)
    if model.family is not None and endpoint.rewrites:
        problems += _unsupported(model, model.family, values)
    if problems:
        raise Invalid(problems, status=endpoint.invalid)
    prompts = _prompts(values)
    asked = values["model"]
    stream = values.get("stream") is True
    truncates = endpoint.rewrites and model.api == "openai" and values.get(_BEHAVIOUR) != "error"
    output = _asked_output(values)
    if room is None:
        room = _room(model, values, prompts, output, truncates)
    elif room != _UNBOUND:
        room = min(room, model.max_output_tokens if output is None else output)  # more was not reserved
    edits = _edits(endpoint, model, asked, values, room)
    injected = (
        stream and endpoint.rewrites and model.usage != "native" and _asks_for_usage(model, members, values, edits)
    )
    return InferenceRequest(
        endpoint=endpoint,
        path=endpoint.path,
        model=model,
        asked_model=asked,
        body=_spliced(body, members, edits),
        stream=stream,
        user=_user(endpoint, values),
        input_estimate=prompts.tokens,
        output_bound=_output_bound(endpoint, model, values, members, prompts.number, room or output),
        session=_session(endpoint, members, values) if model.affinity else b"",
        injected=injected,
        truncates=truncates,
        given=body if model.fallbacks or truncates else b"",
        query=query,
    )


def _user(endpoint: Endpoint, values: Values) -> str | None:
    name = values.get("user") if endpoint.dialect == "openai" else (values.get("metadata") or {}).get("user_id")
    return name if isinstance(name, str) else None


_BEGINNING = 1024  # bytes of a prompt that are taken for what it shares with others: a system prompt, a document


def _session(endpoint: Endpoint, members: Members, values: Values) -> bytes:
    """What an upstream's cache knows a request by, as far as the body tells (headers come before it)."""
    named = values.get("prompt_cache_key") or values.get("user")
    if named is not None:
        return str(named).encode("utf-8", "surrogatepass")
    prompt = next((raw for name, raw in members if name == endpoint.input), b"")
    return bytes(memoryview(prompt)[:_BEGINNING])


# Members that are read by the model, of whichever endpoint.
_TEXTS = ("messages", "tools", "system", "input", "instructions", "query", "documents", "prompt")


def _prompts(values: Values) -> Prompts:
    for name in ("prompt", "input"):
        if isinstance(prompts := values.get(name), Prompts):
            shown = values.get("images")
            images = 0 if shown is None else sum(shown.numbers)
            return prompts._replace(tokens=prompts.tokens + images * IMAGE_TOKENS) if images else prompts
    texts = [values[name] for name in _TEXTS if values.get(name)]
    size, images = sum(map(len, texts)), 0
    if size > _SMALL:
        for text in texts:
            hidden, found = _images_in(bytes(text))
            size -= hidden
            images += found
    return Prompts(1, contract.estimate(size) + images * IMAGE_TOKENS)


IMAGE_TOKENS = 1600  # of an image, as far as one can say beforehand: what Anthropic's largest take, and OpenAI's nearly
_SMALL = 2048  # bytes that are no image
_IMAGES = 1000  # that are looked for
_DATA = (b";base64,", b'"data":"', b'"data": "')  # OpenAI's data URLs; Anthropic's sources, and sounds


def _images_in(text: bytes) -> tuple[int, int]:
    """The bytes of the images in a JSON text, and how many they are: four of these bytes are no token."""
    size = number = 0
    for mark in _DATA:
        start, quote = text.find(mark), 0
        for _ in range(_IMAGES):
            if start < 0:
                break
            start += len(mark)
            if quote < start:
                quote = text.find(b'"', start)
            blank = text.find(b" ", start, quote)
            end = quote if blank < 0 else blank  # behind a blank it is prose, whatever stands before it
            if end - start > _SMALL and not text.startswith(b"data:", start):
                size += end - start
                number += 1
            start = text.find(mark, end)
    return size, number


_OUTPUTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def _asked_output(values: Values) -> int | None:
    for name in _OUTPUTS:
        asked: int | None = values.get(name)
        if asked is not None:
            return asked
    return None


def _output_bound(
    endpoint: Endpoint, model: Model, values: Values, members: Members, prompts: int, asked: int | None
) -> int:
    if endpoint.output is None:
        return 0
    choices = values.get("n") or 1
    if len(values) < len(members):
        more = _unlisted(members, values)
        choices = max(choices, more.get("best_of", 1))
        asked = max(asked or 0, more["max_completion_tokens"]) if "max_completion_tokens" in more else asked
    if asked is None:
        asked = model.max_output_tokens
    return int(min(asked * choices * prompts, MAX_BOUND))


_UNLISTED = ("best_of", "max_completion_tokens")  # that pass where the contract is lenient, and backends may know
_INTEGER = Decoder(int)


def _unlisted(members: Members, values: Values) -> dict[str, int]:
    """What raises the output of a request, of members that its contract does not know."""
    found = {}
    for name, raw in members:
        if name in _UNLISTED and name not in values:
            with suppress(msgspec.DecodeError):
                found[name] = _INTEGER.decode(raw)
    return found


# — context windows, for backends that do not see to them

_BEHAVIOUR = "context_length_exceeded_behavior"
_UNBOUND = 0  # a room that means that no bound is asked for


def _room(model: Model, values: Values, prompts: Prompts, asked: int | None, truncates: bool) -> int | None:
    """What max_tokens is lowered to, so that prompt and answer fit; None: it stays, and the backend may know better.

    Raises ContextLengthExceeded where the prompt was counted and not estimated, and the caller wants an error.
    """
    window = model.context_window
    if window is None or asked is None or model.api != "openai" or prompts.number != 1:
        return None
    room = window - prompts.tokens
    if asked <= room:
        return None
    if truncates:
        return room if room >= 1 else None
    if prompts.counted and values.get(_BEHAVIOUR) == "error":
        raise ContextLengthExceeded(
            f"the prompt has {prompts.tokens} tokens and max_tokens is {asked}, "
            f"the context window of {model.name} holds {window} together",
            param="max_tokens",
        )
    return None


# — reasoning: a boolean stands for a word, and `thinking` for both


def _effort(values: Values) -> str | int | bool | None:
    """What is asked as reasoning_effort, or as the thinking that stands for it."""
    thinking = values.get("thinking")
    if thinking is None:
        effort: str | int | bool | None = values.get("reasoning_effort")
        return effort
    return "none" if thinking["type"] == "disabled" else thinking.get("budget_tokens") or True


def _word(effort: str | int | bool | None) -> str | int | None:
    return ("medium" if effort else "none") if isinstance(effort, bool) else effort


def _kinds(effort: str | int | bool | None) -> set[str]:
    """What a family must take for an effort: a boolean is taken as one, and as the word that it stands for."""
    match effort:
        case None:
            return set()
        case bool():
            return {"boolean", "medium" if effort else "none"}
        case int():
            return {"integer"}
        case word:
            return {word}


def _unsupported(model: Model, family: Family, values: Values) -> Iterator[Problem]:
    effort, accepted = _effort(values), family.reasoning_effort
    if effort is not None and accepted is not None and (lacking := _kinds(effort) - accepted):
        told = str(effort).lower() if lacking == {"boolean"} else cut(_word(effort))
        expected = (kind for kind in get_args(Effort) if kind in accepted)
        # Of the booleans, a family that always reasons takes only this one.
        named = ("true" if kind == "boolean" and "none" not in accepted else kind for kind in expected)
        place = "reasoning_effort" if values.get("thinking") is None else "thinking"
        text = f"Invalid reasoning effort: {told}, {model.name} supports {', '.join(named)}"
        yield Problem((place,), text)
    history, known = values.get("reasoning_history"), family.reasoning_history
    if history is not None and known is not None and history not in known:
        text = f"reasoning_history: found {history}, {model.name} supports {', '.join(sorted(known))}"
        yield Problem(("reasoning_history",), text)


# — splicing

# What becomes of a member: its name and its value (None: the bytes it has), or None where it goes.
Edit = tuple[str, bytes | None] | None

# The names that stand for others, by what the backends understand.
_STAND_INS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "fireworks": (
        ("max_completion_tokens", "max_tokens"),
        ("prediction", "speculation"),
        ("thinking", "reasoning_effort"),
    ),
    "openai": (("thinking", "reasoning_effort"),),
    "anthropic": (),
}


def _edits(endpoint: Endpoint, model: Model, asked: str, values: Values, room: int | None) -> dict[str, Edit]:
    edits: dict[str, Edit] = {}
    if model.upstream_name != asked:
        edits["model"] = ("model", encode(model.upstream_name))
    if not endpoint.rewrites:
        return edits
    if model.api == "openai" and _BEHAVIOUR in values:
        edits[_BEHAVIOUR] = None
    if room == _UNBOUND:
        edits.update(dict.fromkeys((name for name in _OUTPUTS if name in values), None))
    elif room is not None:
        name = next((name for name in _OUTPUTS if values.get(name) is not None), "max_tokens")
        edits[name] = (name, b"%d" % room)
    for alias, name in _STAND_INS[model.api]:
        if alias in values:
            edits[alias] = (name, _meant(alias, values)) if values[alias] is not None else None
            # Of two that were given one is null: the contract refuses both.
            if name in values and values[name] is None:
                edits[name] = None
    if isinstance(values.get("reasoning_effort"), bool):
        edits["reasoning_effort"] = ("reasoning_effort", encode(_word(_effort(values))))
    return edits


def _meant(alias: str, values: Values) -> bytes | None:
    if alias == "thinking":
        return encode(_word(_effort(values)))
    return values[alias] if alias == "prediction" else None


def _asks_for_usage(model: Model, members: Members, values: Values, edits: dict[str, Edit]) -> bool:
    """Adds the edit that makes a stream tell its usage. Returns whether the caller had not asked for that himself."""
    raw = next((raw for name, raw in members if name == "stream_options"), None)
    try:
        given = (None if raw is None else _OPTIONS.decode(raw)) or {}
    except msgspec.ValidationError:
        return False  # no object, and not known to the model's profile: between the caller and the backend
    edits["stream_options"] = ("stream_options", encode({**given, **dict.fromkeys(_USAGE_OPTIONS[model.usage], _TRUE)}))
    return bytes(given.get("include_usage", b"")) != b"true"


_OPTIONS = Decoder(dict[str, msgspec.Raw] | None)  # what stands in them keeps its bytes
_TRUE = msgspec.Raw(b"true")
_USAGE_OPTIONS = {"inject": ("include_usage",), "continuous": ("include_usage", "continuous_usage_stats")}

_NAME = re.compile(rb'\s*[{,](\s*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*)')


def _spliced(body: bytes, members: Members, edits: Mapping[str, Edit]) -> bytes:
    """The body with its edits, each in its place, and at the end what had none; the same object without edits."""
    if not edits:
        return body
    view = memoryview(body)
    pieces: list[bytes | memoryview] = []
    end, left = 0, len(edits)
    for name, raw in members:
        if pieces and not left:
            break  # the rest stays as it is
        key = _NAME.match(body, end)
        assert key is not None, "each value has a name before it in a body that was read"
        start, value = key.span(1)
        end = value + len(raw)
        comma = b"," if pieces else b"{"
        if name not in edits:
            pieces += (comma, view[start:end])
            continue
        left -= 1
        if (edit := edits[name]) is not None:
            new_name, new_value = edit
            pieces += (comma, encode(new_name), b":", new_value or view[value:end])
    if not left:
        return b"".join((*pieces, view[end:]))
    brace = body.rindex(b"}")
    names = {name for name, _ in members}
    new = [b",%b:%b" % (encode(edit[0]), edit[1] or b"") for name, edit in edits.items() if name not in names and edit]
    return b"".join((*pieces, view[end:brace], *new, view[brace:]))


def renamed(document: bytes, name: str) -> bytes:
    """A JSON object with this name as its `model`; what is none, or has none, as it is."""
    try:
        members = contract.take_apart(document)
    except BadRequest:
        return document
    if all(member != "model" for member, _ in members):
        return document
    return _spliced(document, members, {"model": ("model", encode(name))})

"""Client bytes → InferenceRequest: aliases, model families, bounds that backends are told, splicing.

What a backend is asked is what the caller wrote. Only where an alias, a model's name or a boolean stands for
something else is that one member replaced in its place; the bytes of every other value stay, and where nothing stands
for anything else the body is the very object that came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, get_args

import msgspec
from msgspec.json import Decoder, encode

from gateway import contract
from gateway.bounds import (
    BEHAVIOUR,
    BYTES_PER_TOKEN,
    OUTPUTS,
    Input,
    input_of,
    lowered,
    named_output,
    output_of,
    room_in,
)
from gateway.contract import Members, Values, cut
from gateway.endpoints import Endpoint
from gateway.errors import BadRequest, Invalid, NotFound, Problem
from gateway.language import Effort
from gateway.snapshot import Family, Model, Route, Snapshot
from gateway.uploads import Form, Upload


class Untold(NamedTuple):
    """A bound that was reserved because the caller named none: the member by which a backend is told of it, if it is to
    be told, and whether the caller wrote that, as null."""

    member: str | None
    most: int  # tokens of one answer
    is_null: bool


class InferenceRequest(msgspec.Struct, frozen=True):
    """A request that the backends of its model can be asked."""

    endpoint: Endpoint
    path: str  # what is asked of the upstream: "/v1/completions"
    model: Model
    asked_model: str  # the name as the caller wrote it
    body: bytes  # what goes upstream
    stream: bool
    user: str | None
    output_bound: int  # the most output tokens that it may produce, over all prompts and choices
    answers: int = 0  # prompts times choices: so many answers share the bound
    input: Input = Input()
    untold: Untold | None = None  # where the caller named no bound, and the backend has not been told of one
    told: int = 0  # the tokens of one answer that were reserved, where backends are told of them
    session: bytes = b""  # what requests have in common that should meet the same upstream; only where a pool asks
    injected: bool = False  # the body asks for usage in an event of its own, and the caller did not
    truncates: bool = False  # it is to be made to fit where a backend says that it is too long for its model
    given: bytes = b""  # the caller's own body; only where it may have to be made into another one
    query: bytes = b""  # of the target, passed on as it came
    method: str = "POST"
    content_type: bytes = b"application/json"
    upload: Upload | None = None  # the body, where it is passed on as it comes

    @property
    def input_estimate(self) -> int:
        """The tokens of its input, at four bytes each where they were not counted."""
        return self.input.at(BYTES_PER_TOKEN)


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
        members = contract.take_apart(request.given)
        again = _for(model, request.endpoint, request.given, members, request.query, told=request.told)
        return bounded(again) if request.told else again
    if model.upstream_name != request.model.upstream_name:
        raise Invalid([Problem(("model",), "the name stands in a body that is passed on as it comes")])
    return msgspec.structs.replace(request, model=model)


def fitted(request: InferenceRequest, room: int | None) -> InferenceRequest:
    """The same request for at most so many tokens in each answer, and for no more than it was; None: for as many as the
    backend finds room for."""
    members = contract.take_apart(request.given)
    return _for(
        request.model, request.endpoint, request.given, members, request.query, room or _UNBOUND, told=request.told
    )


def bounded(request: InferenceRequest) -> InferenceRequest:
    """The same request, whose backend is told how many tokens were reserved for each answer; where the caller named a
    bound it is the very object.

    A completion of OpenAI's ends after 16 tokens where it names no bound, and vLLM's and SGLang's do: there nothing is
    written, which would only make it longer. That holds for no backend that goes on without one (llama.cpp, Ollama).
    Of Fireworks' the reference names no default, and so it is told.
    """
    untold = request.untold
    if untold is None:
        return request
    body, told = request.body, request.told or request.model.max_output_tokens
    if untold.member is not None:
        members = contract.take_apart(body) if untold.is_null else ()
        body = _spliced(body, members, {untold.member: (untold.member, b"%d" % untold.most)})
    return msgspec.structs.replace(request, body=body, untold=None, told=told)


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
        output_bound=0,  # what a sound or an image holds is known afterwards
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
    model: Model,
    endpoint: Endpoint,
    body: bytes,
    members: Members,
    query: bytes,
    room: int | None = None,
    told: int = 0,
) -> InferenceRequest:
    values, problems = contract.check(endpoint.name, members, profile=model.profile, strict=model.strict)
    if model.family is not None and endpoint.rewrites:
        problems += _unsupported(model, model.family, values)
    if problems:
        raise Invalid(problems, status=endpoint.invalid)
    size = input_of(members, values)
    asked = values["model"]
    stream = values.get("stream") is True
    truncates = endpoint.rewrites and model.api == "openai" and values.get(BEHAVIOUR) != "error"
    named = named_output(values)
    most = min(told or model.max_output_tokens, model.max_output_tokens)
    if room is None:
        room = lowered(model, values, size, named, truncates)
    elif room != _UNBOUND:
        room = min(room, most if named is None else named)  # more was not reserved
    edits = _edits(endpoint, model, asked, values, room)
    output = output_of(endpoint, values, members, size.prompts, room or named)
    untold = _untold(endpoint, model, values, size, most) if output.named is None and room is None else None
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
        output_bound=output.bound(most),
        answers=output.answers,
        input=size,
        untold=untold,
        told=told,
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


# — the bound of an answer

_UNBOUND = 0  # a room that means that no bound is asked for

# OpenAI's own models that reason refuse max_tokens. All other backends know it, and some know no other name: llama.cpp
# until 2026 (ggml-org/llama.cpp#13700), llama-cpp-python (abetlen/llama-cpp-python#1907) and Ollama pass over that.
_REFUSES_MAX_TOKENS = re.compile(r"(?:openai/)?(?:o[1-9]|gpt-(?:[5-9]|\d\d))")


def _member(endpoint: Endpoint, model: Model) -> str:
    """The member by which a model's backends are told how long an answer may be, where the caller does not say it."""
    if endpoint.events == "chat" and model.api == "openai" and _REFUSES_MAX_TOKENS.match(model.upstream_name):
        return "max_completion_tokens"
    return endpoint.output or ""


def _untold(endpoint: Endpoint, model: Model, values: Values, size: Input, most: int) -> Untold:
    room = room_in(model, size)
    if room is not None and room >= 1:
        most = min(most, room)  # else a backend would refuse what it takes without a bound
    member = _member(endpoint, model)
    is_null = member in values
    has_default = endpoint.events == "completions" and model.api == "openai" and not is_null
    return Untold(None if has_default else member, most, is_null)


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
    if model.api == "openai" and BEHAVIOUR in values:
        edits[BEHAVIOUR] = None
    if room == _UNBOUND:
        edits.update(dict.fromkeys((name for name in OUTPUTS if name in values), None))
    elif room is not None:
        name = next((name for name in OUTPUTS if values.get(name) is not None), _member(endpoint, model))
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

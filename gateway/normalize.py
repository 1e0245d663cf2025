"""Client bytes → InferenceRequest: aliases, model families, splicing.

What a backend is asked is what the caller wrote. Only where an alias, a model's name or a boolean stands for
something else is that one member replaced in its place; the bytes of every other value stay, and where nothing stands
for anything else the body is the very object that came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import msgspec
from msgspec.json import Decoder, encode

from gateway import contract
from gateway.contract import Members, Prompts, Values, cut
from gateway.errors import Invalid, NotFound, Problem
from gateway.language import Effort
from gateway.policy import Family, Model, Snapshot

# Callers may write integers of any size. No limit is larger (policy.py), and the store's arithmetic is exact so far.
MAX_BOUND = 10**12


class InferenceRequest(msgspec.Struct, frozen=True):
    """A request that the backends of its model can be asked."""

    endpoint: str  # "completions" or "chat/completions"
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
    given: bytes = b""  # the caller's own body; only where another model may have to answer it


def normalize(endpoint: str, body: bytes, snapshot: Snapshot) -> InferenceRequest:
    """The request in a body. Raises BadRequest (400), Invalid (422, all problems at once) and NotFound (404)."""
    members, values, problems = contract.read(endpoint, body, strict=snapshot.strict)
    asked = values.get("model")
    model = None if asked is None else snapshot.models.get(asked)
    if problems or model is not None:
        return _for(model, endpoint, body, members, values, problems)
    assert asked is not None
    unknown = f'Model not found, inaccessible, and/or not deployed: "{cut(asked, 200)}"'
    raise NotFound(unknown, code="model_not_found", param="model")


def instead(request: InferenceRequest, model: Model, snapshot: Snapshot) -> InferenceRequest:
    """The same request for a model that stands in for its own. Raises Invalid where that does not take it."""
    members, values, problems = contract.read(request.endpoint, request.given, strict=snapshot.strict)
    return _for(model, request.endpoint, request.given, members, values, problems)


def _for(
    model: Model | None, endpoint: str, body: bytes, members: Members, values: Values, problems: list[Problem]
) -> InferenceRequest:
    if model is not None and model.family is not None:
        problems += _unsupported(model, model.family, values)
    if problems:
        raise Invalid(problems)
    assert model is not None
    prompts = _prompts(values)
    asked = values["model"]
    stream = values.get("stream") is True
    edits = _edits(model, asked, values)
    injected = stream and model.usage != "native" and _asks_for_usage(model, members, values, edits)
    return InferenceRequest(
        endpoint=endpoint,
        path=f"/v1/{endpoint}",
        model=model,
        asked_model=asked,
        body=_spliced(body, members, edits),
        stream=stream,
        user=values.get("user"),
        input_estimate=prompts.tokens,
        output_bound=_output_bound(model, values, prompts.number),
        session=_session(members, values) if model.affinity else b"",
        injected=injected,
        given=body if model.fallbacks else b"",
    )


_BEGINNING = 1024  # bytes of a prompt that are taken for what it shares with others: a system prompt, a document


def _session(members: Members, values: Values) -> bytes:
    """What an upstream's cache knows a request by, as far as the body tells (headers come before it)."""
    named = values.get("prompt_cache_key") or values.get("user")
    if named is not None:
        return str(named).encode("utf-8", "surrogatepass")
    prompt = next(raw for name, raw in members if name in ("prompt", "messages"))
    return bytes(memoryview(prompt)[:_BEGINNING])


def _prompts(values: Values) -> Prompts:
    prompts: Prompts | None = values.get("prompt")
    if prompts is not None:
        return prompts
    return Prompts(1, contract.estimate(len(values["messages"]) + len(values.get("tools") or b"")))


def _output_bound(model: Model, values: Values, prompts: int) -> int:
    asked = values.get("max_tokens")
    if asked is None:
        asked = values.get("max_completion_tokens")
    if asked is None:
        asked = model.max_output_tokens
    return int(min(asked * values.get("n", 1) * prompts, MAX_BOUND))


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
}


def _edits(model: Model, asked: str, values: Values) -> dict[str, Edit]:
    edits: dict[str, Edit] = {}
    if model.upstream_name != asked:
        edits["model"] = ("model", encode(model.upstream_name))
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
    given = values.get("stream_options") or {}
    options = dict.fromkeys(_USAGE_OPTIONS[model.usage], True)
    raw = next((raw for name, raw in members if given and name == "stream_options"), None)
    if raw is not None:
        options = {**_OPTIONS.decode(raw), **options}
    edits["stream_options"] = ("stream_options", encode(options))
    return given.get("include_usage") is not True


_OPTIONS = Decoder(dict[str, Any])
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

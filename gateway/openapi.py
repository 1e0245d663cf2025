"""The gateway as an OpenAPI document.

Requests are told by the schemas that check them (gateway/contract.py), errors by the objects that are raised
(gateway/errors.py); neither is written down a second time. What backends answer is theirs, and is left open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from msgspec.json import decode, encode

from gateway import __version__, contract
from gateway.endpoints import ENDPOINTS, Endpoint
from gateway.errors import (
    BadRequest,
    ContextLengthExceeded,
    Dialect,
    Forbidden,
    GatewayError,
    Invalid,
    NotFound,
    Problem,
    QuotaExhausted,
    RateLimited,
    Shape,
    StoreUnavailable,
    TooLarge,
    Unauthenticated,
    UpstreamFailed,
    UpstreamsBusy,
    UpstreamTimeout,
)

Json = dict[str, Any]

_ABOUT = (
    "One front door to an organisation's language models. Every request shows a key, as bearer or as x-api-key. "
    "Answers of a backend, its errors among them, pass as they came; the errors below are the gateway's own."
)


def openapi(profile: str, routes: Iterable[tuple[str, Iterable[str]]] = ()) -> Json:
    """The OpenAPI 3.1 document of a gateway that checks requests by this profile, with the routes of its policies."""
    paths: Json = {endpoint.path: {"post": _inference(endpoint)} for endpoint in ENDPOINTS.values()}
    paths |= {"/v1/models": {"get": _models()}, "/v1/models/{model}": {"get": _one_model()}}
    paths |= {"/v1/limits": {"get": _limits_operation()}}
    for path, methods in routes:
        parameters = {"parameters": [_REST]} if path.endswith("*") else {}
        passing = {method.lower(): _passing(path, method) for method in sorted(methods)}
        paths[path.replace("*", "{rest}")] = parameters | passing
    return {
        "openapi": "3.1.0",
        "info": {"title": "Model gateway", "version": f"{__version__}, profile {profile}", "description": _ABOUT},
        "servers": [{"url": "/"}, {"url": "/inference"}],
        "security": [{name: []} for name in _SECURITY],
        "paths": paths,
        "components": {
            "securitySchemes": _SECURITY,
            "schemas": _SHAPES | {"models": _MODEL_LIST, "model": _MODEL, "limits": _LIMIT_LIST} | _requests(profile),
            "responses": {
                _key(dialect, status): _refusal(dialect, status, errors)
                for dialect in _DIALECTS
                for status, errors in _by_status(dialect).items()
            },
            "headers": {name: header for group in _HEADERS.values() for name, header in group.items()},
        },
    }


# — operations


class _Told(NamedTuple):
    """What a reader is told of an endpoint beside its schema; `streams`: it may answer with events."""

    summary: str
    example: Json
    streams: bool = False


_MODEL_NAME = "kimi-k2"  # of policies/models.yaml
_CHAT = [{"role": "user", "content": "Say hello to the reader."}]

_TOLD: Mapping[str, _Told] = {
    "completions": _Told("Complete a prompt", {"prompt": "Once upon a time", "max_tokens": 32}, streams=True),
    "chat/completions": _Told("Answer in a conversation", {"messages": _CHAT, "max_tokens": 32}, streams=True),
    "responses": _Told(
        "Answer with a response object", {"input": "Say hello to the reader.", "max_output_tokens": 32}, streams=True
    ),
    "messages": _Told(
        "Answer in a conversation, in Anthropic's dialect", {"messages": _CHAT, "max_tokens": 32}, streams=True
    ),
    "embeddings": _Told("Turn texts into vectors", {"input": ["a cat", "a dog"]}),
    "rerank": _Told(
        "Order documents by how well they answer a query",
        {"query": "What purrs?", "documents": ["A cat purrs.", "A dog barks."], "top_n": 1},
    ),
    "images/generations": _Told("Draw images", {"prompt": "a cat on a mat", "n": 1}, streams=True),
    "images/edits": _Told("Change an image", {"image": "cat.png", "prompt": "put a hat on it"}, streams=True),
    "images/variations": _Told("Draw variations of an image", {"image": "cat.png"}),
    "audio/transcriptions": _Told("Write down what is said", {"file": "speech.mp3"}, streams=True),
    "audio/translations": _Told("Write down in English what is said", {"file": "speech.mp3"}),
}
# The parts of forms that hold a file.
_FILES: Json = {
    "image": {"type": "string", "contentMediaType": "image/png", "description": "a file"},
    "file": {"type": "string", "contentMediaType": "audio/mpeg", "description": "a file"},
}


def _inference(endpoint: Endpoint) -> Json:
    told = _TOLD[endpoint.name]
    schema = _form(told.example) if endpoint.body == "form" else _schema(endpoint.name)
    content = {"schema": schema, "example": {"model": _MODEL_NAME, **told.example}}
    media_type = "multipart/form-data" if endpoint.body == "form" else "application/json"
    answers: Json = {"application/json": {"schema": {"type": "object"}}}
    if told.streams:
        answers["text/event-stream"] = {}
    if endpoint.name.startswith("audio/"):
        answers["text/plain"] = {"schema": {"type": "string"}}
    return {
        "operationId": _operation_id("post", endpoint.path),
        "summary": told.summary,
        "tags": ["Inference"],
        "requestBody": {"required": True, "content": {media_type: content}},
        "responses": {
            "200": _answer("The answer of the backend, as it came", answers, endpoint.dialect, limited=True),
            **_refusals(endpoint.dialect),
        },
    }


def _form(example: Json) -> Json:
    """A form: of its parts the gateway reads the model; all others pass, as do those that are not named here."""
    parts = {name: _FILES.get(name, {"type": "string", "description": "a string"}) for name in ("model", *example)}
    return {"type": "object", "properties": parts, "required": ["model"]}


def _models() -> Json:
    return {
        "operationId": _operation_id("get", "/v1/models"),
        "summary": "The models that the key may use",
        "tags": ["Models"],
        "responses": {
            "200": _answer("All of them", {"application/json": {"schema": _schema("models")}}),
            **_refusals("openai", 401),
        },
    }


def _one_model() -> Json:
    name = {"type": "string", "minLength": 1}
    described = "Its name, or one of its aliases; slashes stand as they are"
    return {
        "operationId": _operation_id("get", "/v1/models/{model}"),
        "summary": "One model that the key may use",
        "tags": ["Models"],
        "parameters": [
            {"name": "model", "in": "path", "required": True, "description": described, "schema": name}
            | {"example": _MODEL_NAME}
        ],
        "responses": {
            "200": _answer("The model", {"application/json": {"schema": _schema("model")}}),
            **_refusals("openai", 401, 404),
        },
    }


def _limits_operation() -> Json:
    text = {"type": "string", "minLength": 1}
    return {
        "operationId": _operation_id("get", "/v1/limits"),
        "summary": "Where the caller stands with every limit that binds",
        "tags": ["Limits"],
        "parameters": [
            {"name": "model", "in": "query", "description": "of this model only", "schema": text}
            | {"example": _MODEL_NAME},
            {"name": "user", "in": "query", "description": "of the user whom requests name", "schema": text}
            | {"example": "ada"},
        ],
        "responses": {
            "200": _answer("Each of them", {"application/json": {"schema": _schema("limits")}}),
            **_refusals("openai", 401, 403, 404, 503),
        },
    }


# What the star of a route stands for. Its segments are those of gateway/app.py, without escapes.
_SEGMENT = r"(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+"
_REST: Json = {
    "name": "rest",
    "in": "path",
    "required": True,
    "description": "One segment or several",
    "schema": {"type": "string", "pattern": f"^{_SEGMENT}(/{_SEGMENT})*$"},
    "example": "one",
}


def _passing(path: str, method: str) -> Json:
    """A route: nothing of it is looked into."""
    told: Json = {
        "operationId": _operation_id(method.lower(), path.replace("*", "rest")),
        "summary": f"{method} passes to the backends",
        "tags": ["Routes"],
    }
    if method in ("POST", "PUT", "PATCH"):
        told["requestBody"] = {"content": {"*/*": {}}}
    answer = _answer("The answer of the backend, as it came", {"*/*": {}}, "openai", limited=True)
    return told | {"responses": {"200": answer, **_refusals("openai", *(_STATUSES - {422}))}}


def _operation_id(method: str, path: str) -> str:
    """`post_v1_chat_completions`. What is no letter or digit has its number, so that no two paths have one id."""
    words = re.sub(r"[^A-Za-z0-9/]", lambda sign: "" if sign[0] in "{}" else f"__{ord(sign[0]):x}_", path)
    return method + words.replace("/", "_")


def _answer(description: str, content: Json, dialect: Dialect = "openai", *, limited: bool = False) -> Json:
    groups = ("named", dialect, "limited", "timed") if limited else ()
    return {"description": description, "headers": _headers(*groups), "content": content}


# — schemas


def _schema(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{_component(name)}"}


def _component(name: str) -> str:
    return name.replace("/", "_")


def _requests(profile: str) -> Json:
    return {
        _component(endpoint.name): contract.document(endpoint.name, profile)
        for endpoint in ENDPOINTS.values()
        if endpoint.body == "json"
    }


def _object(**members: Json) -> Json:
    """An object that has these members, and may have more."""
    return {"type": "object", "properties": members, "required": list(members)}


_TEXT: Json = {"type": "string"}
_TEXT_OR_NULL: Json = {"type": ["string", "null"]}
_WRONG: Json = {
    "type": "array",
    "items": _object(loc={"type": "array", "items": {"type": ["string", "integer"]}}, msg=_TEXT, type=_TEXT),
}
_ERROR = _object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)

# Errors, by shape: as gateway/errors.py renders them, and as the backends' own may look in the same place.
_SHAPES: Json = {
    "openai_error": _object(error=_ERROR),
    "openai_invalid": _object(error=_ERROR, detail=_WRONG),
    "anthropic_error": _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)),
    "problem": {
        "type": "object",
        "properties": {
            **dict.fromkeys(("type", "title", "detail", "instance"), _TEXT),
            "status": {"type": "integer"},
            "violated-policies": {"type": "array", "items": _TEXT},
            "error": _ERROR,
            "errors": _WRONG,
        },
        "required": ["type", "title", "status", "detail"],
    },
}

# A model and the list of them, as OpenAI's clients read them, and Anthropic's.
_MODEL = _object(
    id=_TEXT,
    object={"const": "model"},
    created={"type": "integer"},
    owned_by=_TEXT,
    type={"const": "model"},
    display_name=_TEXT,
    created_at=_TEXT,
)
_MODEL_LIST = _object(
    object={"const": "list"}, data={"type": "array", "items": _schema("model")}, has_more={"type": "boolean"}
)

_COUNT: Json = {"type": "integer", "minimum": 0}
_LIMIT_LIST = _object(
    object={"const": "list"},
    data={
        "type": "array",
        "items": _object(name=_TEXT, scope=_TEXT, kind=_TEXT, limit=_COUNT, used=_COUNT, reserved=_COUNT)
        | {"description": "Amounts are in its `unit`"},
    },
)

_SECURITY: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


# — headers


def _header(description: str, kind: str = "string") -> Json:
    return {"description": description, "schema": {"type": kind}}


def _limits(name: str, of: str, reset: str) -> Json:
    """The three headers that tell of one sort of limits; `name` has a place for which of the three it is."""
    return {
        name.format("limit"): _header(f"How many {of} the limit allows", "integer"),
        name.format("remaining"): _header(f"How many {of} are left", "integer"),
        name.format("reset"): _header(f"When it allows all {of} again: {reset}"),
    }


_HEADERS: Mapping[str, Json] = {
    "named": {
        "x-gateway-request-id": _header("The gateway's id of the request"),
        "x-request-id": _header("The id by which the caller, the gateway or the backend calls it"),
        "request-id": _header("The same, as Anthropic's SDKs read it: of /v1/messages only"),
    },
    "openai": {
        **_limits("x-ratelimit-{}-requests", "requests", "in so long a time"),
        **_limits("x-ratelimit-{}-tokens", "tokens", "in so long a time"),
        **{
            f"x-ratelimit-{what}-tokens-{of}": _header(f"{said} {of} tokens, as Fireworks names them", "integer")
            for of in ("prompt", "cache-adjusted-prompt", "generated")
            for what, said in (("limit", "The limit of"), ("remaining", "What is left of"))
        },
    },
    "anthropic": {
        name: header
        for of in ("requests", "tokens", "input-tokens", "output-tokens")
        for name, header in _limits(f"anthropic-ratelimit-{of}-{{}}", of.replace("-", " "), "at that time").items()
    },
    "limited": {
        "ratelimit": _header("What is left of each limit, and in how many seconds it is whole again"),
        "ratelimit-policy": _header("Each limit: its quota, its window in seconds, its unit"),
        "x-ratelimit-over-limit": _header("yes: more is used than a soft limit says; nothing is refused for that"),
        "x-gateway-limits": _header("degraded: the store of limits is away, each worker holds its share of them"),
    },
    "timed": {"server-timing": _header("Where the time went, in milliseconds, if the policies say perf_headers")},
    "later": {
        "retry-after": _header("In how many seconds to try again", "integer"),
        "retry-after-ms": _header("The same in milliseconds", "integer"),
        "x-should-retry": _header("false: to wait does not help"),
    },
    "unknown": {"www-authenticate": _header("How a key is shown")},
}


def _headers(*groups: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for group in groups for name in _HEADERS[group]}


# — errors: one that is raised for each thing that can be wrong

_DIALECTS: tuple[Dialect, ...] = ("openai", "anthropic")
_PROBLEM = Problem(("n",), "n: found 0, expected an integer from 1 to 128")
_ERRORS: tuple[GatewayError, ...] = (
    BadRequest("the body is no JSON object: it is empty"),
    ContextLengthExceeded(
        "the prompt has 5000 tokens and max_tokens is 4000, the context window of kimi-k2 holds 8192 together",
        param="max_tokens",
    ),
    Unauthenticated("the API key is not known, has expired or was revoked"),
    Forbidden(f"this key may not use the model {_MODEL_NAME}", param="model"),
    NotFound("Model not found, inaccessible, and/or not deployed", code="model_not_found", param="model"),
    TooLarge("the body has 33554433 bytes, at most 33554432 are read"),
    Invalid([_PROBLEM]),
    RateLimited(
        "team research is over its rate team-requests (600 requests per minute): 100 of 100 requests used, "
        "1 asked for; try again in 100ms",
        retry_after=0.1,
        policies=["team-requests"],
    ),
    QuotaExhausted(
        "team research has exhausted its quota monthly-spend of this month: 500 of 500 usd used, 1 asked for; "
        "it starts anew in 24h0m0s",
        policies=["monthly-spend"],
    ),
    UpstreamFailed("the upstream answered 500"),
    UpstreamsBusy("every upstream of the pool is full or away", retry_after=1),
    StoreUnavailable("the store of keys and limits does not answer", retry_after=1),
    UpstreamTimeout("the upstream did not begin to answer in time", code="upstream_first_byte_timeout"),
)
_STATUSES = frozenset(error.status for error in _ERRORS)
_GROUPS = {401: ("unknown",), 429: ("limited", "later"), 503: ("later",)}  # of headers
_CALLED = "req_019ab3f29c8e4f1d2a6b7c8d9e0f"


def _by_status(dialect: Dialect) -> dict[int, list[GatewayError]]:
    """The errors that callers of this dialect see."""
    found: dict[int, list[GatewayError]] = {}
    for error in _ERRORS:
        if isinstance(error, Invalid) and dialect == "anthropic":
            error = Invalid(error.problems, status=ENDPOINTS["messages"].invalid)
        found.setdefault(error.status, []).append(error)
    return dict(sorted(found.items()))


def _refusals(dialect: Dialect, *only: int) -> Json:
    return {
        str(status): {"$ref": f"#/components/responses/{_key(dialect, status)}"}
        for status in _by_status(dialect)
        if not only or status in only
    }


def _key(dialect: Dialect, status: int) -> str:
    return f"{dialect}_{status}"


def _refusal(dialect: Dialect, status: int, errors: list[GatewayError]) -> Json:
    schema = "openai_invalid" if status == 422 else f"{dialect}_error"
    limits = (dialect,) if status == 429 else ()
    return {
        "description": " ".join(dict.fromkeys(_meaning(error) for error in errors)),
        "headers": _headers("named", *limits, "timed", *_GROUPS.get(status, ())),
        "content": {
            "application/json": _media(schema, dialect, errors),
            "application/problem+json": _media("problem", "problem", errors),
        },
    }


def _media(schema: str, shape: Shape, errors: list[GatewayError]) -> Json:
    return {
        "schema": _schema(schema),
        "examples": {type(error).__name__: {"value": _as_sent(error, shape)} for error in errors},
    }


def _as_sent(error: GatewayError, shape: Shape) -> Any:
    return decode(encode(error.told(shape, _CALLED)))


def _meaning(error: GatewayError) -> str:
    """The first sentence of its class, without the status."""
    told = (type(error).__doc__ or "").partition("\n")[0].partition(": ")[2].partition(". ")[0].rstrip(".")
    return f"{told[:1].upper()}{told[1:]}." if told else HTTPStatus(error.status).phrase

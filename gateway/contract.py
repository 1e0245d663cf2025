"""The request schemas of each endpoint, as data: a row for each member, a table for each profile.

A profile is a version of Fireworks' CompletionRequest: the page of 2023, the API's 4.21.6 (its ranges stand in prose
only), and what its SDK sends in 2026. Completions are closed, an unknown member is refused where the policy is strict.
Of the other endpoints the contract knows what the gateway reads and what both SDKs agree on; all else passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta
from msgspec.json import Decoder

from gateway.errors import Problem
from gateway.members import (
    DOCUMENTS,
    FLAT_IMAGES,
    IMAGES,
    MAX_DECODED,
    PROMPTS,
    SPECULATION,
    Member,
    Members,
    Prompts,
    Schema,
    Values,
    boolean,
    cut,
    filled,
    integer,
    leaf,
    mapping,
    number,
    one_of,
    placed,
    prediction,
    prose,
    raw,
    shape,
    tagged,
    take_apart,
    text,
    texts,
    too_deep,
    unmatched_images,
)

__all__ = [
    "DEFAULT_PROFILE",
    "PROFILES",
    "SCHEMAS",
    "Members",
    "Prompts",
    "Values",
    "check",
    "cut",
    "document",
    "model_of",
    "take_apart",
]

PROFILES = ("2023", "4.21.6", "2026")
DEFAULT_PROFILE = "2026"
Rows = Mapping[str, Member]


def model_of(given: Members) -> str | None:
    """The model that a body names; None where it names none, or not by a string."""
    for name, value in given:
        if name == "model":
            is_string = memoryview(value)[0] == ord('"') and len(value) <= MAX_DECODED
            return _STRING.decode(value) if is_string else None
    return None


_STRING = Decoder(str)


def check(endpoint: str, given: Members, *, profile: str, strict: bool) -> tuple[Values, list[Problem]]:
    """The values of the members that the endpoint knows, and all that is wrong with the request.

    Raises BadRequest where a value is too large or too deep to be decoded, or has a name twice.
    """
    schema = SCHEMAS[profile][endpoint]
    try:
        values, problems = schema.check(given, closed=strict and schema.closed)
    except RecursionError:
        raise too_deep() from None
    prompts = values.get("prompt")
    if values.get("images") is not None and isinstance(prompts, Prompts) and prompts.tokens is None:
        prompt = next(value for name, value in given if name == "prompt")
        problems += unmatched_images(values["images"], prompt)
    return values, [placed(problem) for problem in problems] if problems else problems


def document(endpoint: str, profile: str) -> dict[str, Any]:
    """The request of an endpoint as JSON Schema. That images match the marks in a prompt is beyond its words."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": f"{endpoint} ({profile})", **SCHEMAS[profile][endpoint].document()}


# — rows that stand in several tables

_STOP = leaf("a string or an array of at most 4 strings", str | Annotated[list[str], Meta(max_length=4)])
_BIAS = Annotated[float, Meta(ge=-100, le=100)]
_METADATA = mapping("an object whose values are strings", str)
_TOOLS = raw("an array", "array")
_BEHAVIOUR = one_of("error", "truncate", null=False)

# — completions

_SCHEMA = raw("a string or an object", "string", "object")
_GIVEN_SCHEMA = raw("a string or an object", "string", "object", null=False)
_FORMAT = {"schema": _SCHEMA, "grammar": prose(), "json_schema": _SCHEMA}

COMPLETIONS_2023: Rows = {
    "model": text(null=False),
    "prompt": PROMPTS,
    "images": FLAT_IMAGES,
    "max_tokens": integer(0),
    "logprobs": integer(0, 5),
    "echo": boolean(),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "n": integer(1, 128),
    "stop": _STOP,
    "response_format": tagged("type", text=Schema({"schema": _SCHEMA}), json_object=Schema({"schema": _SCHEMA})),
    "stream": boolean(),
    "context_length_exceeded_behavior": _BEHAVIOUR,
    "user": text(),
}
COMPLETIONS_4_21_6: Rows = {
    **COMPLETIONS_2023,
    "prompt_cache_isolation_key": text(),
    "raw_output": boolean(),
    "perf_metrics_in_response": boolean(),
    "n": integer(1, 128, null=False),
    "max_completion_tokens": integer(0),
    "top_k": integer(0, 100),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "repetition_penalty": number(0, 2),
    "mirostat_target": number(),
    "mirostat_lr": number(),
    "seed": integer(),
    "logprobs": leaf("an integer from 0 to 5, a boolean", Annotated[int, Meta(ge=0, le=5)] | bool, shown=True),
    "top_logprobs": integer(0, 5),
    "echo_last": integer(),
    "ignore_eos": boolean(null=False),
    "response_format": tagged(
        "type",
        text=Schema(_FORMAT),
        json_object=Schema(_FORMAT),
        json_schema=Schema({**_FORMAT, "json_schema": _GIVEN_SCHEMA}, required=("json_schema",)),
        grammar=Schema(_FORMAT),
    ),
    "logit_bias": mapping("an object of numbers from -100 to 100", _BIAS, each="a number from -100 to 100"),
    "speculation": SPECULATION,
    "prediction": prediction("image_url"),
    "metadata": _METADATA,
    "reasoning_effort": leaf(
        '"none", "low", "medium", "high", a positive integer, a boolean',
        Literal["none", "low", "medium", "high"] | Annotated[int, Meta(ge=1)] | bool,
        shown=True,
    ),
    "reasoning_history": one_of("disabled", "interleaved", "preserved"),
    "thinking": tagged("type", enabled=Schema({"budget_tokens": integer(1024)}), disabled=Schema({})),
    "return_token_ids": boolean(),
    "images": IMAGES,
}
COMPLETIONS_2026: Rows = {
    **COMPLETIONS_4_21_6,
    "prediction": prediction("image_url", "video_url"),
    "prompt_cache_key": text(),
    "service_tier": text(),  # priority has an effect, the API takes every other word for default
    "stream_options": shape("an object", Schema({"include_usage": boolean()}, closed=False)),
}
COMPLETIONS: Mapping[str, Rows] = dict(
    zip(PROFILES, (COMPLETIONS_2023, COMPLETIONS_4_21_6, COMPLETIONS_2026), strict=True)
)

# — the other endpoints

# Where OpenAI's own API takes more than Fireworks', more is taken.
CHAT: Rows = {
    "messages": filled("an array with at least one message"),
    "tools": _TOOLS,
    "n": integer(1, 128),
    "top_k": integer(),  # vLLM's backends take -1 for all
    "repetition_penalty": number(),
    "logprobs": COMPLETIONS_2026["logprobs"],
    "top_logprobs": integer(0, 20),
    "reasoning_effort": leaf(
        "a string, a positive integer, a boolean", str | Annotated[int, Meta(ge=1)] | bool, shown=True
    ),
    "response_format": shape("an object with a type", Schema({"type": text(null=False)}, ("type",), closed=False)),
    "prediction": prediction("image_url", "video_url", closed=False),
}
_NOT_CHAT = ("prompt", "images")

RESPONSES: Rows = {
    "model": text(null=False),
    "input": raw("a string or an array", "string", "array"),
    "instructions": prose(),
    "max_output_tokens": integer(1),
    "stream": boolean(),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "tools": _TOOLS,
    "user": text(),
    "prompt_cache_key": text(),
    "metadata": _METADATA,
    "store": boolean(),
    "background": boolean(),
    "reasoning": raw("an object", "object"),
}
MESSAGES: Rows = {
    "model": text(null=False),
    "messages": CHAT["messages"],
    "max_tokens": integer(0, null=False),  # 0 fills the prompt cache, and nothing is said
    "stream": boolean(),
    "system": raw("a string or an array", "string", "array"),
    "stop_sequences": texts(),
    "temperature": number(0, 1),
    "top_p": number(0, 1),
    "top_k": integer(0),
    "tools": _TOOLS,
    "metadata": shape("an object", Schema({"user_id": text()}, closed=False)),
    "thinking": CHAT["response_format"],
}
EMBEDDINGS: Rows = {
    "model": text(null=False),
    "input": PROMPTS,
    "encoding_format": one_of("float", "base64"),
    "dimensions": integer(1),
    "user": text(),
}
RERANK: Rows = {
    "model": text(null=False),
    "query": prose(null=False),
    "documents": DOCUMENTS,
    "top_n": integer(1),
    "return_documents": boolean(),
}
IMAGE_GENERATIONS: Rows = {
    "model": text(null=False),
    "prompt": prose(null=False),
    "n": integer(1, 10),
    "user": text(),
    "stream": boolean(),
}

_ALIASES = (("max_completion_tokens", "max_tokens"), ("prediction", "speculation"), ("thinking", "reasoning_effort"))


def _schemas(rows: Rows) -> Mapping[str, Schema]:
    # Chat has one table in all profiles, but for the rows that the profile words in its own way.
    shared = {name: row for name, row in {**COMPLETIONS_2026, **rows}.items() if name not in _NOT_CHAT}
    return {
        "completions": Schema(rows, ("model", "prompt"), tuple(pair for pair in _ALIASES if set(pair) <= set(rows))),
        "chat/completions": Schema({**shared, **CHAT}, ("model", "messages"), _ALIASES, closed=False),
        "responses": Schema(RESPONSES, ("model",), closed=False),
        "messages": Schema(MESSAGES, ("model", "messages", "max_tokens"), closed=False),
        "embeddings": Schema(EMBEDDINGS, ("model", "input"), closed=False),
        "rerank": Schema(RERANK, ("model", "query", "documents"), closed=False),
        "images/generations": Schema(IMAGE_GENERATIONS, ("model", "prompt"), closed=False),
    }


SCHEMAS: Mapping[str, Mapping[str, Schema]] = {profile: _schemas(rows) for profile, rows in COMPLETIONS.items()}

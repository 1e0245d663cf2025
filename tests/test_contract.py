"""Each row of the request tables takes what the API's documents say, and tells what is wrong with the rest."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import fireworks.types.chat.completion_create_params as fireworks_chat
import fireworks.types.completion_create_params as fireworks_completions
import openai.types as openai_types
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completions
import openai.types.image_generate_params as openai_images
import openai.types.responses.response_create_params as openai_responses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import contract
from gateway.errors import BadRequest, Invalid, Problem

REQUIRED: dict[str, dict[str, Any]] = {
    "completions": {"model": "m", "prompt": "p"},
    "chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
    "responses": {"model": "m"},
    "messages": {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16},
    "embeddings": {"model": "m", "input": "i"},
    "rerank": {"model": "m", "query": "q", "documents": ["d"]},
    "images/generations": {"model": "m", "prompt": "p"},
}


def read(
    body: bytes, endpoint: str = "completions", *, profile: str = "2026", strict: bool = True
) -> tuple[contract.Values, list[Problem]]:
    return contract.check(endpoint, contract.take_apart(body), profile=profile, strict=strict)


def check(
    members: dict[str, Any], endpoint: str = "completions", *, profile: str = "2026", strict: bool = True
) -> list[Problem]:
    body = json.dumps({**REQUIRED[endpoint], **members}).encode()
    return read(body, endpoint, profile=profile, strict=strict)[1]


def told(members: dict[str, Any], endpoint: str = "completions", *, strict: bool = True) -> list[str]:
    return [problem.msg for problem in check(members, endpoint, strict=strict)]


# — the case table: what the documents say of each member, typed from them

# integer 1..128 and number 0..2 have their bounds; array+ and object+ must not be empty; "error" is a word.
PAGE_OF_2023 = """
model: string
prompt: string | array+
images: array | null
max_tokens: integer 0.. | null
logprobs: integer 0..5 | null
echo: boolean | null
temperature: number 0..2 | null
top_p: number 0..1 | null
top_k: integer | null
frequency_penalty: number -2..2 | null
presence_penalty: number -2..2 | null
n: integer 1..128 | null
stop: string | array | null
response_format: object+ | null
stream: boolean | null
context_length_exceeded_behavior: "truncate" | "error"
user: string | null
"""
API_4_21_6 = """
model: string
user: string | null
prompt_cache_isolation_key: string | null
raw_output: boolean | null
perf_metrics_in_response: boolean | null
stream: boolean | null
n: integer 1..128
stop: string | array | null
max_tokens: integer 0.. | null
max_completion_tokens: integer 0.. | null
temperature: number 0..2 | null
top_k: integer 0..100 | null
top_p: number 0..1 | null
min_p: number 0..1 | null
typical_p: number 0..1 | null
frequency_penalty: number -2..2 | null
presence_penalty: number -2..2 | null
repetition_penalty: number 0..2 | null
mirostat_target: number | null
mirostat_lr: number | null
seed: integer | null
logprobs: integer 0..5 | boolean | null
top_logprobs: integer 0..5 | null
echo: boolean | null
echo_last: integer | null
ignore_eos: boolean
context_length_exceeded_behavior: "error" | "truncate"
response_format: object+ | null
logit_bias: object | null
speculation: string | array | null
prediction: string | object+ | null
metadata: object | null
reasoning_effort: "low" | "medium" | "high" | "none" | integer 1.. | boolean | null
reasoning_history: "disabled" | "interleaved" | "preserved" | null
thinking: object+ | null
return_token_ids: boolean | null
prompt: string | array+
images: array | null
"""
SDK_OF_2026 = (
    API_4_21_6
    + """
prompt_cache_key: string | null
service_tier: string | null
stream_options: object | null
"""
)
SAID = {"2023": PAGE_OF_2023, "4.21.6": API_4_21_6, "2026": SDK_OF_2026}
ABSENT = object()
ANYTHING: list[Any] = [ABSENT, None, True, False, 0, 1, -1, 1.5, "", "s", [], {}]


@cache
def said(profile: str) -> dict[str, list[str]]:
    rows = (line.split(": ") for line in SAID[profile].split("\n") if line)
    return {name: kinds.split(" | ") for name, kinds in rows}


def takes(kind: str, value: Any) -> bool:
    name, _, span = kind.partition(" ")
    if name in ("integer", "number"):
        low, _, high = span.partition("..")
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole or (name == "number" and isinstance(value, float))
        return fits and (not low or value >= float(low)) and (not high or value <= float(high))
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return value == [] or isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "array+" | "object+":
            return False  # of what is walked here; what is in them is told in ROWS
    return bool(json.loads(name) == value)


def bounds(schema: Any) -> Iterator[Any]:
    """Every bound and word in a row, and what lies just beyond."""
    if isinstance(schema, list):
        for inner in schema:
            yield from bounds(inner)
    elif isinstance(schema, dict):
        for edge in ("minimum", "maximum"):
            if edge in schema:
                at = int(schema[edge])
                yield from (at - 1, at, at + 1, *((at - 0.01, at + 0.01) if schema["type"] == "number" else ()))
        for word in schema.get("enum", ()):
            yield from (word, word.upper(), word[:-1])
        yield from bounds(schema.get("anyOf", []))


def walked(profile: str, name: str) -> list[Any]:
    # The documents' own bounds too: a row that forgot one has none to be found.
    spans = [span for kind in said(profile)[name] for span in kind.partition(" ")[2].split("..") if span]
    edges = [int(span) + step for span in spans for step in (-1, 0, 1)]
    return [*ANYTHING, *edges, *bounds(contract.document("completions", profile)["properties"][name])]


@pytest.mark.parametrize(
    ("profile", "name"), [(profile, name) for profile in contract.PROFILES for name in said(profile)]
)
def test_each_member_takes_what_the_documents_say_and_nothing_else(profile: str, name: str) -> None:
    def refused(value: Any) -> bool:
        members = {**REQUIRED["completions"], name: value}
        if value is ABSENT:
            del members[name]
        problems = read(json.dumps(members).encode(), profile=profile)[1]
        assert {problem.loc[0] for problem in problems} <= {name}
        return problems != []

    def to_be_refused(value: Any) -> bool:
        if value is ABSENT:
            return name in ("model", "prompt")
        return not any(takes(kind, value) for kind in said(profile)[name])

    values = walked(profile, name)
    assert [(value, refused(value)) for value in values] == [(value, to_be_refused(value)) for value in values]


@pytest.mark.parametrize("profile", contract.PROFILES)
def test_a_profile_has_the_members_of_its_document_and_no_other(profile: str) -> None:
    assert set(said(profile)) == set(contract.document("completions", profile)["properties"])
    assert len(said(profile)) == {"2023": 17, "4.21.6": 38, "2026": 41}[profile]


@pytest.mark.parametrize(
    ("profile", "members", "wrong"),
    [
        ("2023", {"seed": 1}, ["seed"]),
        ("2023", {"images": [["a"]]}, ["images"]),
        ("2023", {"logprobs": True}, ["logprobs"]),
        ("2023", {"top_k": 500, "n": None}, []),
        ("2023", {"response_format": {"type": "json_object", "schema": {}}}, []),
        ("2023", {"response_format": {"type": "json_schema", "json_schema": {}}}, ["response_format.type"]),
        ("4.21.6", {"prompt_cache_key": "k", "service_tier": "flex"}, ["prompt_cache_key", "service_tier"]),
        ("4.21.6", {"images": [["a"]]}, []),
        (
            "4.21.6",
            {"prediction": {"content": [{"type": "text", "text": "a", "video_url": None}]}},
            ["prediction.content[0].video_url"],
        ),
        ("2026", {"prediction": {"content": [{"type": "text", "text": "a", "video_url": None}]}}, []),
        (
            "2026",
            {"prediction": {"content": [{"type": "text", "text": "a", "video_url": {"url": "u"}}]}},
            ["prediction.content[0].video_url"],
        ),
    ],
)
def test_profiles_differ_where_the_documents_do(profile: str, members: dict[str, Any], wrong: list[str]) -> None:
    assert [problem.path for problem in check(members, profile=profile)] == wrong


OLD_EXAMPLE = b"""{
  "model": "accounts/fireworks/models/llama-v2-7b",
  "prompt": "The sky is",
  "images": [
    "<string>"
  ],
  "max_tokens": 16,
  "logprobs": 2,
  "echo": true,
  "temperature": 1,
  "top_p": 1,
  "top_k": 50,
  "frequency_penalty": 0,
  "presence_penalty": 0,
  "n": 1,
  "stop": "<string>",
  "response_format": {
    "type": "json_object",
    "schema": {}
  },
  "stream": true,
  "context_length_exceeded_behavior": "truncate",
  "user": "<string>"
}"""


@pytest.mark.parametrize("profile", contract.PROFILES)
def test_the_example_of_the_old_page_passes_as_it_is_printed(profile: str) -> None:
    assert read(OLD_EXAMPLE, profile=profile)[1] == []


# — what stands inside of the members

# Per member of the newest profile: values that pass, and values that do not.
ROWS: dict[str, tuple[list[Any], list[Any]]] = {
    "model": (["m", ""], [None, 1, ["m"]]),
    "prompt": (
        ["", "p", ["a", "b"], [""], [1, 2], [[1], [2, 3]], [2**70], [-1]],
        [
            *(None, 5, True, {}, [], [[]], [[1], []], ["a", 1], [1, "a"], [1, True], [1, None], [1, 1.5], [1, [2]]),
            *([[1], 2], [[1], "a"], [[[1]]], [["a"]], [{}], [None], ["a", None], ["a", ["b"]], [1, {}], [False]),
        ],
    ),
    "user": (["u", "", None], [1, ["u"]]),
    "prompt_cache_isolation_key": (["k", None], [1]),
    "raw_output": ([True, False, None], [0, 1, "true"]),
    "perf_metrics_in_response": ([True, False, None], [0, "true"]),
    "stream": ([True, False, None], [0, 1, "true"]),
    "n": ([1, 128], [0, 129, None, True, 1.5, "1", 2**70]),
    "stop": (["s", ["a"], ["a", "b", "c", "d"], [], None], [["a", "b", "c", "d", "e"], 1, [1], {"a": 1}]),
    "max_tokens": ([0, 1, 2**70, None], [-1, True, "5", 1.5, [1]]),
    "max_completion_tokens": ([0, 1, 2**70, None], [-1, True, "5", 1.5, [1]]),
    "temperature": ([0, 2, 0.7, 1e-7, None], [-0.1, 2.0001, True, "1", 2**70]),
    "top_k": ([0, 100, None], [-1, 101, 1.5, True]),
    "top_p": ([0, 1, 0.5, None], [-0.1, 1.1, False]),
    "min_p": ([0, 1, None], [-0.1, 1.1]),
    "typical_p": ([0, 1, None], [-0.1, 1.1]),
    "frequency_penalty": ([-2, 2, 0.5, None], [-2.1, 2.1, "0"]),
    "presence_penalty": ([-2, 2, 0.5, None], [-2.1, 2.1, "0"]),
    "repetition_penalty": ([0, 2, None], [-0.1, 2.1]),
    "mirostat_target": ([-5, 7.5, None], ["1", True]),
    "mirostat_lr": ([-5, 7.5, None], ["1", True]),
    "seed": ([0, -1, 2**70, None], [1.5, True, "1"]),
    "logprobs": ([0, 5, True, False, None], [-1, 6, 1.5, "1"]),
    "top_logprobs": ([0, 5, None], [-1, 6, True]),
    "echo": ([True, False, None], [1]),
    "echo_last": ([0, 5, None], [True, "1", 0.5]),
    "ignore_eos": ([True, False], [None, 1]),
    "context_length_exceeded_behavior": (["error", "truncate"], [None, "ERROR", "", 1]),
    "response_format": (
        [
            None,
            *({"type": kind} for kind in ("text", "json_object", "grammar")),
            {"type": "json_object", "schema": {"type": "object"}},
            {"type": "grammar", "grammar": "root ::= x"},
            {"type": "json_schema", "json_schema": {"a": [1]}},
            {"type": "json_schema", "json_schema": "{}"},
        ],
        [
            *("text", {}, {"type": "yaml"}, {"type": None}, {"type": "json_schema"}, {"type": "text", "x": 1}),
            *({"type": "json_schema", "json_schema": None}, {"type": "json_schema", "schema": {}}),
            *({"type": "grammar", "grammar": 1}, {"type": "json_object", "schema": [1]}),
        ],
    ),
    "logit_bias": ([{"1": 100, "2": -100}, {"1": 0.5}, {}, None], [{"1": 101}, {"1": "1"}, [1], {"1": None}]),
    "speculation": (
        ["s", [1, 2], [], [-1, 2**70], None],
        [1, ["a"], {"a": 1}, [1.5], [True], [None], [[1]], [1, "a"], [{}]],
    ),
    "prediction": (
        [
            None,
            "text",
            {"content": "text"},
            {"type": "content", "content": "text"},
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]},
        ],
        [
            *(1, ["text"], {}, {"type": "content"}, {"type": "text", "content": "a"}, {"content": "a", "x": 1}),
            *({"content": None}, {"content": 1}, {"type": None, "content": "a"}, {"content": ["a"]}),
            *({"content": [{"type": "text"}]}, {"content": [{"type": "text", "text": None}]}),
            {"content": [{"type": "image_url", "image_url": {"url": "u"}}]},
            {"content": [{"type": "text", "text": "a", "image_url": {"url": "u"}}]},
        ],
    ),
    "metadata": ([{"a": "b"}, {}, None], [{"a": 1}, {"a": None}, "a", ["a"]]),
    "reasoning_effort": (
        ["none", "low", "medium", "high", 1, 2**70, True, False, None],
        ["", "MEDIUM", "xhigh", 0, -1, 1.5, [], {}],
    ),
    "reasoning_history": (["disabled", "interleaved", "preserved", None], ["", "all", True, 1]),
    "thinking": (
        [
            *(None, {"type": "enabled"}, {"type": "enabled", "budget_tokens": None}, {"type": "disabled"}),
            *({"type": "enabled", "budget_tokens": 1024}, {"budget_tokens": 2**70, "type": "enabled"}),
        ],
        [
            *("enabled", True, {}, {"type": "auto"}, {"type": None}, {"budget_tokens": 1024}),
            *({"type": "enabled", "budget_tokens": budget} for budget in (1023, 0, -1, True, False, "2048", 1024.5)),
            *({"type": "disabled", "budget_tokens": budget} for budget in (1024, None)),
            {"type": "enabled", "x": 1},
        ],
    ),
    "return_token_ids": ([True, False, None], [1]),
    "images": (
        [["a"], [["a"], ["b"]], [[], ["a", "b"]], [[]], [], None],
        ["a", [1], [["a"], "b"], ["a", ["b"]], [[1]], [None], [[None]], {"a": "b"}],
    ),
    "prompt_cache_key": (["k", None], [1]),
    "service_tier": (["priority", "flex", None], [1]),
    "stream_options": (
        [{"include_usage": True}, {"include_obfuscation": False}, {}, None],
        [True, {"include_usage": 1}],
    ),
}
GOOD = [pytest.param(name, value, id=f"{name}={value!r}"[:60]) for name, (good, _) in ROWS.items() for value in good]
BAD = [pytest.param(name, value, id=f"{name}={value!r}"[:60]) for name, (_, bad) in ROWS.items() for value in bad]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_value_of_the_reference_passes(name: str, value: object) -> None:
    assert told({name: value}) == []


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_outside_it_is_one_members_problem(name: str, value: object) -> None:
    problems = check({name: value})
    assert {name} == {problem.loc[0] for problem in problems}
    assert all(problem.path in problem.msg for problem in problems)


def test_the_table_has_a_row_for_every_member_and_no_other() -> None:
    assert set(ROWS) == set(said("2026"))


# The other endpoints: what passes, what does not; all of them let pass what they do not know.
OTHERS: list[tuple[str, str, list[Any], list[Any]]] = [
    ("chat/completions", "messages", [["anything"], [{}]], [None, [], {}, "hi"]),
    ("chat/completions", "tools", [None, [], [1]], [{}, "t"]),
    ("chat/completions", "n", [None, 1, 128], [0, 129, "1"]),
    ("chat/completions", "logprobs", [None, True, 0, 5], [6, "1"]),
    ("chat/completions", "top_logprobs", [None, 0, 20], [-1, 21]),
    ("chat/completions", "temperature", [None, 0, 2], [-1, 2.1, "1"]),
    ("chat/completions", "stop", [None, "s", ["a"] * 4], [["a"] * 5, 1]),
    ("chat/completions", "reasoning_effort", [None, "minimal", "xhigh", 1, True, False], [0, -1, 1.5, []]),
    (
        "chat/completions",
        "response_format",
        [None, {"type": "text"}, {"type": "new", "x": 1}],
        [{}, {"type": 1}, "text"],
    ),
    ("chat/completions", "thinking", [None, {"type": "enabled"}], [{"type": "enabled", "budget_tokens": 5}, "enabled"]),
    (
        "chat/completions",
        "prediction",
        [None, "t", {"type": "content", "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": {}}]}],
        [1, {"content": [{"type": "text"}]}],
    ),
    ("responses", "input", ["i", [], [{}]], [1, {}]),
    ("responses", "instructions", [None, "i"], [1, ["i"]]),
    ("responses", "max_output_tokens", [None, 1, 2**70], [0, "1"]),
    ("responses", "temperature", [0, 2], [2.1]),
    ("responses", "top_p", [0, 1], [1.1]),
    ("responses", "stream", [None, True], [1]),
    ("responses", "tools", [[], [1]], [{}]),
    ("responses", "metadata", [None, {"a": "b"}], [{"a": 1}]),
    ("responses", "store", [None, False], ["no"]),
    ("responses", "background", [None, False], ["no"]),
    ("responses", "reasoning", [None, {}, {"effort": "new"}], ["high", []]),
    ("responses", "n", [7, "seven"], []),
    ("messages", "max_tokens", [0, 1, 2**70], [-1, None, "1", 1.5]),
    ("messages", "messages", [[1]], [[], None, "hi"]),
    ("messages", "system", ["s", [{}]], [1, {}]),
    ("messages", "stop_sequences", [[], ["a"] * 9], ["a", [1]]),
    ("messages", "temperature", [0, 1], [1.1, -0.1]),
    ("messages", "top_p", [0, 1], [1.1]),
    ("chat/completions", "top_k", [-1, 500], [1.5]),
    ("chat/completions", "repetition_penalty", [3.5], ["1"]),
    ("messages", "top_k", [0, 500], [-1]),
    ("messages", "metadata", [{}, {"user_id": "u"}, {"user_id": None}, {"x": 1}], [{"user_id": 1}, "u"]),
    ("messages", "thinking", [{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1}], [{}, {"type": 1}, True]),
    ("embeddings", "input", ["", ["a"], [1], [[1], [2]]], [None, [], [[]], [1.5], {}, 1]),
    ("embeddings", "encoding_format", ["float", "base64"], ["int8", 1]),
    ("embeddings", "dimensions", [1], [0, "1"]),
    ("rerank", "query", ["q", ""], [None, 1, ["q"]]),
    ("rerank", "documents", [["d"], [{"text": "d"}]], [[], None, "d", {}]),
    ("rerank", "top_n", [None, 1], [0]),
    ("rerank", "return_documents", [None, True], [1]),
    ("images/generations", "prompt", ["p"], [None, ["p"], 1]),
    ("images/generations", "n", [None, 1, 10], [0, 11]),
    ("images/generations", "stream", [None, True], [1]),
]


@pytest.mark.parametrize(("endpoint", "name", "good", "bad"), OTHERS, ids=[f"{row[0]}-{row[1]}" for row in OTHERS])
def test_the_other_endpoints_check_what_they_know(endpoint: str, name: str, good: list[Any], bad: list[Any]) -> None:
    assert [told({name: value}, endpoint) for value in good] == [[]] * len(good)
    assert [[problem.loc[0] for problem in check({name: value}, endpoint)] for value in bad] == [[name]] * len(bad)


@pytest.mark.parametrize("endpoint", REQUIRED)
def test_what_must_be_there_is_told_when_it_is_not(endpoint: str) -> None:
    _, problems = read(b"{}", endpoint)
    assert [(problem.path, problem.type) for problem in problems] == [(name, "missing") for name in REQUIRED[endpoint]]


@pytest.mark.parametrize("endpoint", REQUIRED)
def test_completions_alone_are_closed(endpoint: str) -> None:
    closed = endpoint == "completions"
    assert [problem.type for problem in check({"x": {"y": []}}, endpoint)] == ["extra_forbidden"] * closed
    assert check({"x": {"y": []}}, endpoint, strict=False) == []
    assert contract.document(endpoint, "2026").get("additionalProperties") is (False if closed else None)


# — what the SDKs' types allow


PLAIN: dict[Any, list[Any]] = {str: ["", "s"], int: [1], float: [0.5, 1], bool: [True, False], type(None): [None]}


def examples(hint: Any) -> list[Any]:
    """A value of each kind that a type hint of an SDK allows; of its objects, what they must have."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        return [value for arm in arms for value in examples(arm)]
    if origin in (typing.Required, typing.Annotated):
        return examples(arms[0])
    if origin is Literal:
        return list(arms)
    if origin is dict:
        return [{}, *({"k": value} for value in examples(arms[1]))]
    if origin is not None:
        return [[value] for value in examples(arms[0])]  # Iterable, List, SequenceNotStr
    if hasattr(hint, "__required_keys__"):
        hints = typing.get_type_hints(hint, include_extras=True)
        columns = {name: examples(of) for name, of in hints.items() if typing.get_origin(of) is typing.Required}
        longest = max(map(len, columns.values()), default=1)
        return [{name: values[i % len(values)] for name, values in columns.items()} for i in range(longest)]
    return PLAIN.get(hint, [{"x": [1]}])


SDKS = [
    ("completions", fireworks_completions.CompletionCreateParamsNonStreaming),
    ("completions", fireworks_completions.CompletionCreateParamsStreaming),
    ("chat/completions", fireworks_chat.CompletionCreateParamsNonStreaming),
    ("chat/completions", fireworks_chat.CompletionCreateParamsStreaming),
    ("chat/completions", openai_chat.CompletionCreateParamsNonStreaming),
    ("chat/completions", openai_chat.CompletionCreateParamsStreaming),
    ("responses", openai_responses.ResponseCreateParamsNonStreaming),
    ("responses", openai_responses.ResponseCreateParamsStreaming),
    ("embeddings", openai_types.EmbeddingCreateParams),
    ("images/generations", openai_images.ImageGenerateParamsNonStreaming),
    ("images/generations", openai_images.ImageGenerateParamsStreaming),
]
# What a type allows and the text beside it does not.
UNSAID: list[tuple[str, Any]] = [
    ("prediction", {"content": [{"type": "s"}]}),  # only text can be predicted (T8)
    ("prediction", {"content": [{"type": ""}]}),
    ("response_format", {"type": "json_schema"}),  # "a JSON schema must be provided"
    ("model", None),  # OpenAI has a default image model, the gateway has none
]


@pytest.mark.parametrize(("endpoint", "sent"), SDKS, ids=[f"{sdk.__module__}.{sdk.__name__}" for _, sdk in SDKS])
def test_what_an_sdk_sends_is_never_refused(endpoint: str, sent: Any) -> None:
    refused = [
        (name, value, problem.msg)
        for name, hint in typing.get_type_hints(sent).items()
        for value in examples(hint)
        if (name, value) not in UNSAID
        for problem in check({name: value}, endpoint)
    ]
    assert refused == []


def test_of_openais_completions_two_members_are_unknown_to_this_api() -> None:
    sent = openai_completions.CompletionCreateParamsBase.__annotations__
    assert set(sent) - set(said("2026")) == {"best_of", "suffix"}


# — images and their marks

TWO = ["data:image/png;base64,AA==", "data:image/png;base64,AB=="]


@pytest.mark.parametrize(
    ("prompt", "images", "expected"),
    [
        ("a <image> and <image>", TWO, []),
        ("a <image>", TWO, ["images: found 2 for a prompt with 1 <image> marks, expected as many"]),
        ("<image><image><image>", TWO, ["images: found 2 for a prompt with 3 <image> marks, expected as many"]),
        (["a <image>"], TWO, ["images: found 2 for a prompt with 1 <image> marks, expected as many"]),
        ("<image><image>", [TWO], []),
        ("<image>", [TWO], ["images[0]: found 2 for a prompt with 1 <image> marks, expected as many"]),
        (["<image><image>", "<image>"], [TWO, TWO[:1]], []),
        (
            ["<image>", "<image><image>"],
            [TWO, TWO],
            ["images[0]: found 2 for a prompt with 1 <image> marks, expected as many"],
        ),
        (["<image>", "<image>"], [TWO[:1]], ["images: found 1 arrays for 2 prompts, expected as many"]),
        # Where there is no mark, no image, or no text, nothing is missed.
        ("no mark", TWO, []),
        (["no mark", "<image>"], [TWO, TWO[:1]], []),
        (["a", "b"], [TWO], []),
        (["<image>", "<image>"], TWO, []),
        ("an <image> tag", [], []),
        ("an <image> tag", None, []),
        ([1, 2], TWO, []),
        ([[1], [2]], [TWO, TWO], []),
    ],
)
def test_images_match_the_marks_in_a_prompt_of_text(prompt: Any, images: Any, expected: list[str]) -> None:
    assert told({"prompt": prompt, "images": images}) == expected


def test_marks_count_however_their_brackets_are_written() -> None:
    def problems(prompt: bytes) -> int:
        return len(read(b'{"images":["a","b"],"model":"m","prompt":"%b"}' % prompt)[1])

    assert problems(rb"\u003cimage\u003e <image>") == problems(rb"\u003Cimage> <image\u003E") == 0
    assert problems(rb"\u003cimage\u003e") == 1
    assert problems(rb"<image> \\u003cimage>") == 1  # a backslash and the letters u003c


# — JSON Schema says what the checks do


def valid(schema: Any, value: Any) -> bool:
    """The keywords of JSON Schema that the documents have, and no other."""
    rules = {name: rule for name, rule in schema.items() if name not in ("$schema", "title", "description")}
    return all(KEYWORDS[name](rule, value, rules) for name, rule in rules.items())


TYPES = {"null": type(None), "boolean": bool, "string": str, "array": list, "object": dict}


def of_type(kind: str, value: Any) -> bool:
    if kind in TYPES:
        return isinstance(value, TYPES[kind])
    return not isinstance(value, bool) and isinstance(value, int if kind == "integer" else (int, float))


def is_number(value: Any) -> bool:
    return of_type("number", value)


def others(value: dict[str, Any], rules: dict[str, Any]) -> list[Any]:
    return [inner for name, inner in value.items() if name not in rules.get("properties", {})]


KEYWORDS: dict[str, Any] = {
    "type": lambda kind, value, _: of_type(kind, value),
    "enum": lambda words, value, _: value in words,
    "minimum": lambda low, value, _: not is_number(value) or value >= low,
    "maximum": lambda high, value, _: not is_number(value) or value <= high,
    "minItems": lambda least, value, _: not isinstance(value, list) or len(value) >= least,
    "maxItems": lambda most, value, _: not isinstance(value, list) or len(value) <= most,
    "items": lambda inner, value, _: not isinstance(value, list) or all(valid(inner, item) for item in value),
    "required": lambda names, value, _: not isinstance(value, dict) or set(names) <= set(value),
    "properties": lambda rows, value, _: (
        not isinstance(value, dict) or all(valid(rows[name], value[name]) for name in rows if name in value)
    ),
    "additionalProperties": lambda inner, value, rules: (
        not isinstance(value, dict)
        or (not others(value, rules) if inner is False else all(valid(inner, item) for item in others(value, rules)))
    ),
    "anyOf": lambda schemas, value, _: any(valid(schema, value) for schema in schemas),
    "oneOf": lambda schemas, value, _: sum(valid(schema, value) for schema in schemas) == 1,
    "allOf": lambda schemas, value, _: all(valid(schema, value) for schema in schemas),
    "not": lambda schema, value, _: not valid(schema, value),
}

WORDS = ["", "s", "text", "content", "enabled", "disabled", "error", "low", "json_object", "json_schema", "float"]
NAMES = ["type", "text", "content", "schema", "json_schema", "budget_tokens", "image_url", "include_usage", "user_id"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 130),
    st.sampled_from([1023, 1024, 2**70, 0.5, -2.5, 2.5, 100.5, 127.5]),
    st.sampled_from(WORDS),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), endpoint=st.sampled_from(list(REQUIRED)), profile=st.sampled_from(contract.PROFILES))
def test_a_document_takes_what_the_check_takes(data: st.DataObject, endpoint: str, profile: str) -> None:
    document = contract.document(endpoint, profile)
    name = st.sampled_from([*document["properties"], "unknown"])
    body = {**REQUIRED[endpoint], **data.draw(st.dictionaries(name, JSON, min_size=1, max_size=3))}
    for gone in data.draw(st.sets(st.sampled_from(list(REQUIRED[endpoint])), max_size=1)):
        del body[gone]
    assert valid(document, body) is (read(json.dumps(body).encode(), endpoint, profile=profile)[1] == [])


@pytest.mark.parametrize("name", ROWS)
def test_a_document_takes_what_each_row_takes(name: str) -> None:
    document = contract.document("completions", "2026")
    good, bad = ROWS[name]
    assert [valid(document, {**REQUIRED["completions"], name: value}) for value in good] == [True] * len(good)
    assert [valid(document, {**REQUIRED["completions"], name: value}) for value in bad] == [False] * len(bad)


def test_a_document_tells_words_and_ranges() -> None:
    document = contract.document("completions", "2023")
    assert (document["title"], document["required"]) == ("completions (2023)", ["model", "prompt"])
    assert document["properties"]["n"] == {
        "description": "an integer from 1 to 128 or null",
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": 128}, {"type": "null"}],
    }


# — what is told


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"temperature": 2.5}, "temperature: found 2.5, expected a number from 0 to 2 or null"),
        ({"n": None}, "n: found null, expected an integer from 1 to 128"),
        ({"max_tokens": "5"}, 'max_tokens: found "5", expected an integer of at least 0 or null'),
        ({"seed": [1]}, "seed: found an array, expected an integer or null"),
        (
            {"context_length_exceeded_behavior": "stop"},
            'context_length_exceeded_behavior: found "stop", expected "error" or "truncate"',
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 5}},
            "thinking.budget_tokens: found 5, expected an integer of at least 1024 or null",
        ),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 5}},
            "Extra inputs are not permitted, field: 'thinking.budget_tokens'",
        ),
        (
            {"prediction": {"content": [{"type": "text", "text": "a"}, {"type": "text"}]}},
            "prediction.content[1].text: is missing, expected a string",
        ),
        ({"promptCacheKey": "k"}, "Extra inputs are not permitted, field: 'promptCacheKey'"),
        ({"best_of": 2}, "Extra inputs are not permitted, field: 'best_of'"),
    ],
)
def test_the_text_says_what_was_found_and_what_was_expected(members: dict[str, Any], expected: str) -> None:
    assert told(members) == [expected]


def test_all_problems_are_told_at_once_with_their_places() -> None:
    _, problems = read(b'{"n":0,"stop":1,"x":1,"thinking":{"y":1},"metadata":[]}')
    assert [(p.loc, p.type) for p in problems] == [
        (("n",), "value_error"),
        (("stop",), "value_error"),
        (("thinking", "type"), "missing"),
        (("metadata",), "value_error"),
        (("x",), "extra_forbidden"),
        (("model",), "missing"),
        (("prompt",), "missing"),
    ]


def test_long_values_and_names_are_cut_and_many_unknown_members_are_told_in_part() -> None:
    (problem,) = check({"seed": "é" * 10_000})
    assert len(problem.msg) < 150
    (problem,) = check({"x" * 10_000: 1})
    assert len(problem.msg) < 150
    assert len(problem.path) < 100
    assert len(check({f"x{i}": 1 for i in range(900)})) == 20


PROSE = [
    ("completions", {"prompt": {"a": "SECRET"}}),
    ("completions", {"prompt": ["SECRET", 1]}),
    ("completions", {"metadata": "SECRET"}),
    ("completions", {"metadata": {"SECRET": 1}}),
    ("completions", {"logit_bias": "SECRET"}),
    ("completions", {"stop": {"SECRET": "SECRET"}}),
    ("completions", {"images": "SECRET"}),
    ("completions", {"response_format": {"type": "json_schema", "json_schema": ["SECRET"]}}),
    ("completions", {"response_format": "SECRET"}),
    ("completions", {"speculation": ["SECRET"]}),
    ("completions", {"prediction": ["SECRET"]}),
    ("completions", {"prediction": {"content": ["SECRET"]}}),
    ("completions", {"prediction": {"content": [{"type": "text", "text": "SECRET", "image_url": {"url": "SECRET"}}]}}),
    ("chat/completions", {"messages": "SECRET"}),
    ("chat/completions", {"messages": {"SECRET": "SECRET"}}),
    ("chat/completions", {"tools": "SECRET"}),
]


@pytest.mark.parametrize(("endpoint", "members"), PROSE)
def test_no_prose_of_a_caller_is_repeated(endpoint: str, members: dict[str, Any]) -> None:
    status, _, body = Invalid(check(members, endpoint)).render()
    assert (status, b"SECRET" in body) == (422, False)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, []),
        ({"x": 1, "tool_choice": 5, "images": 5}, []),
        (
            {"n": 0, "seed": "s"},
            [
                "n: found 0, expected an integer from 1 to 128 or null",
                'seed: found "s", expected an integer or null',
            ],
        ),
        ({"stream": "yes"}, ['stream: found "yes", expected a boolean or null']),
        ({"messages": []}, ["messages: found an array, expected an array with at least one message"]),
        ({"tools": {}}, ["tools: found an object, expected an array or null"]),
        (
            {"max_tokens": 1, "max_completion_tokens": 1},
            ["max_completion_tokens: cannot be specified together with max_tokens"],
        ),
    ],
)
def test_chat_tells_what_it_knows(members: dict[str, Any], expected: list[str]) -> None:
    assert told(members, "chat/completions") == expected


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            {"max_tokens": -1, "max_completion_tokens": 4},
            [
                "max_tokens: found -1, expected an integer of at least 0 or null",
                "max_completion_tokens: cannot be specified together with max_tokens",
            ],
        ),
        (
            {"speculation": "a", "prediction": 5},
            [
                "prediction: found 5, expected a string, a predicted output or null",
                "prediction: cannot be specified together with speculation",
            ],
        ),
        ({"max_tokens": None, "max_completion_tokens": 4}, []),
    ],
)
def test_what_excludes_another_is_told_in_the_round_in_which_it_is_wrong(
    members: dict[str, Any], expected: list[str]
) -> None:
    assert told(members) == expected


def test_each_bias_that_is_wrong_is_told_by_its_token() -> None:
    assert told({"logit_bias": {"1": 101, "2": "SECRET", "3": None, "4": 1}}) == [
        "logit_bias.1: found 101, expected a number from -100 to 100",
        "logit_bias.2: found a string, expected a number from -100 to 100",
        "logit_bias.3: found null, expected a number from -100 to 100",
    ]
    assert len(told({"logit_bias": dict.fromkeys(map(str, range(100)), 101)})) == 20


def test_lenient_lets_unknown_members_pass_and_nothing_else() -> None:
    assert told({"promptCacheKey": "k", "best_of": 2}, strict=False) == []
    assert told({"temperature": 3, "thinking": {"type": "disabled", "x": 1}}, strict=False) == [
        "temperature: found 3, expected a number from 0 to 2 or null",
        "Extra inputs are not permitted, field: 'thinking.x'",
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', "m"),
        (b'{"model":"m\\u00e9"}', "mé"),
        (b'{"model":""}', ""),
        (b"{}", None),
        (b'{"model":null}', None),
        (b'{"model":["m"]}', None),
        (b'{"model":5}', None),
        (b'{"model":"' + b"m" * 1_000_000 + b'"}', None),
    ],
)
def test_the_model_is_known_before_the_rest_is_checked(body: bytes, expected: str | None) -> None:
    assert contract.model_of(contract.take_apart(body)) == expected


def test_what_the_rewriting_reads_has_its_form() -> None:
    values, problems = read(
        json.dumps(
            {
                "model": "m",
                "messages": [1],
                "tools": [],
                "stream": True,
                "n": None,
                "user": "u",
                "max_tokens": 5,
                "max_completion_tokens": None,
                "prompt_cache_key": "k",
                "reasoning_history": None,
                "prediction": {"content": [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]},
                "thinking": {"type": "enabled", "budget_tokens": 2048},
                "stream_options": {"include_usage": True},
            }
        ).encode(),
        "chat/completions",
    )
    assert problems == []
    assert (bytes(values.pop("messages")), bytes(values.pop("tools"))) == (b"[1]", b"[]")
    assert values == {
        "model": "m",
        "stream": True,
        "n": None,
        "user": "u",
        "max_tokens": 5,
        "max_completion_tokens": None,
        "prompt_cache_key": "k",
        "reasoning_history": None,
        "prediction": rb'"a\nb"',
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "stream_options": {"include_usage": True},
    }


def test_what_is_decoded_has_a_size() -> None:
    for members in ({"stop": "s" * 200_000}, {"metadata": {"a": "b" * 200_000}}, {"logit_bias": {"1" * 200_000: 1}}):
        with pytest.raises(BadRequest, match=r"^\w+ has 200\d+ bytes, expected at most 131072$"):
            check(members)
    with pytest.raises(BadRequest, match=r"^response_format has \d+ bytes, expected at most 1048576$"):
        check({"response_format": {"type": "json_schema", "json_schema": "x" * 2_000_000}})

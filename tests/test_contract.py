"""Each row of the request tables takes what the API's reference says, and tells what is wrong with the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fireworks.types.completion_create_params import CompletionCreateParamsBase, CompletionCreateParamsStreaming
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAIParams

from gateway import contract
from gateway.errors import BadRequest, Invalid, Problem

REQUIRED: dict[str, Any] = {"model": "m", "prompt": "p"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def check(members: dict[str, Any], endpoint: str = "completions", *, strict: bool = True) -> list[Problem]:
    needed = REQUIRED if endpoint == "completions" else CHAT
    return contract.read(endpoint, json.dumps({**needed, **members}).encode(), strict=strict)[2]


def told(members: dict[str, Any], endpoint: str = "completions", *, strict: bool = True) -> list[str]:
    return [problem.msg for problem in check(members, endpoint, strict=strict)]


def prompts(prompt: object) -> tuple[int, int]:
    _, values, problems = contract.read("completions", json.dumps({**REQUIRED, "prompt": prompt}).encode(), strict=True)
    assert problems == []
    number, tokens = values["prompt"]
    return number, tokens


# Per member of the reference: values that pass, and values that do not. null stands where it belongs.
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
    "speculation": (["s", [1, 2], [], None], [1, ["a"], {"a": 1}]),
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
    "images": ([["a"], [["a"], ["b"]], [], None], ["a", [1], [["a"], "b"], ["a", ["b"]], [[1]]]),
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
    assert set(ROWS) == set(contract.SCHEMAS["completions"].members)
    assert len(contract.COMPLETION) == 38


def test_the_sdk_of_the_api_sends_nothing_unknown() -> None:
    sent = {*CompletionCreateParamsBase.__annotations__, *CompletionCreateParamsStreaming.__annotations__}
    assert sent - set(contract.SCHEMAS["completions"].members) == set()


def test_of_openais_sdk_two_members_are_unknown_to_this_api() -> None:
    assert set(OpenAIParams.__annotations__) - set(contract.SCHEMAS["completions"].members) == {"best_of", "suffix"}


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
    _, _, problems = contract.read(
        "completions", b'{"n":0,"stop":1,"x":1,"thinking":{"y":1},"metadata":[]}', strict=True
    )
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
        ({"stop": 1, "seed": "s", "x": 1, "temperature": 9}, []),
        ({"tools": [], "stream": None}, []),
        ({"tools": None}, []),
        ({"n": 0}, ["n: found 0, expected an integer from 1 to 128"]),
        ({"stream": "yes"}, ['stream: found "yes", expected a boolean or null']),
        ({"messages": []}, ["messages: found an array, expected an array with at least one message"]),
        ({"messages": None}, ["messages: found null, expected an array with at least one message"]),
        ({"messages": "hi"}, ["messages: found a string, expected an array with at least one message"]),
        ({"tools": {}}, ["tools: found an object, expected an array or null"]),
        (
            {"max_tokens": 1, "max_completion_tokens": 1},
            ["max_completion_tokens: cannot be specified together with max_tokens"],
        ),
    ],
)
def test_of_chat_only_what_the_gateway_reads_is_checked(members: dict[str, Any], expected: list[str]) -> None:
    assert told(members, "chat/completions") == expected


def test_lenient_lets_unknown_members_pass_and_nothing_else() -> None:
    assert told({"promptCacheKey": "k", "best_of": 2}, strict=False) == []
    assert told({"temperature": 3, "thinking": {"type": "disabled", "x": 1}}, strict=False) == [
        "temperature: found 3, expected a number from 0 to 2 or null",
        "Extra inputs are not permitted, field: 'thinking.x'",
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", (1, 1)),
        ("abcd", (1, 1)),
        ("abcde", (1, 2)),
        ("a" * 400, (1, 100)),
        (["abcd", "abcdefg"], (2, 3)),
        (["a,b]", '"[', "", ""], (4, 4)),
        ([1, 2, 3], (1, 3)),
        ([[1, 2], [3], [4, 5, 6]], (3, 6)),
    ],
)
def test_prompts_are_counted_and_their_tokens_with_them(prompt: object, expected: tuple[int, int]) -> None:
    assert prompts(prompt) == expected


def test_many_parts_of_a_predicted_output_are_refused_in_short() -> None:
    part = {"type": "text", "text": "a"}
    assert told({"prediction": {"content": [part] * 1000}}) == []
    assert told({"prediction": {"content": [part] * 1001}}) == [
        "prediction.content: found an array, expected a string or an array of at most 1000 text parts"
    ]
    assert len(told({"prediction": {"content": [5] * 1000}})) == 20


def test_blanks_between_tokens_do_not_count() -> None:
    body = b'{"model":"m","prompt" : [ [ 1 ,\n2 ] , [3]\t] }'
    assert contract.read("completions", body, strict=True)[1]["prompt"] == (2, 3)
    body = b'{"model":"m","prompt" : [ "abcd"\n,\n"efgh" ] }'
    assert contract.read("completions", body, strict=True)[1]["prompt"] == (2, 2)


@pytest.mark.parametrize(
    "mixed", [b'"a",[1]', b'[1],"a"', b'["a"],[1]', b'[1],{"a":[2]}', b'"a",["b","c"]', b"[1],[ ]"]
)
def test_mixed_prompts_are_refused_however_they_are_written(mixed: bytes) -> None:
    for separated in (mixed, mixed.replace(b",", b",\n"), mixed.replace(b",", b" , ")):
        body = b'{"model":"m","prompt":[' + separated + b"]}"
        assert [problem.path for problem in contract.read("completions", body, strict=True)[2]] == ["prompt"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "no JSON object: Input data was truncated"),
        (b"{", "no JSON object"),
        (b"[]", "no JSON object: Expected `object`, got `array`"),
        (b"null", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b"\xef\xbb\xbf{}", "no JSON object"),
        (b"{} {}", "trailing"),
        (b'{"a":NaN}', "no JSON object"),
        (b'{"a":-Infinity}', "no JSON object"),
        (b'{"a":01}', "no JSON object"),
        (b'{"a":1,}', "no JSON object"),
        (b"{'a':1}", "no JSON object"),
        (b'{"a":"\x01"}', "no JSON object"),
        (b'{"a":"\\x"}', "no JSON object"),
        (b'{"a":"\xff"}', "not UTF-8: invalid start byte (byte 6)"),
        (b'{"\xc3":1}', "not UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"model":"m","model":"m"}', "model stands twice"),
        (b'{"model":1,"model":"m"}', "model stands twice"),
        (b'{"model":"m","mod\\u0065l":"n"}', "model stands twice"),
        (b'{"max_tokens":null,"max_tokens":5}', "max_tokens stands twice"),
        (b'{"temperature":1,"temperature":1}', "temperature stands twice"),
        (b'{"thinking":{"type":"enabled","type":"disabled"}}', "type stands twice"),
        (b'{"thinking":{"type":"enabled","budget_tokens":5,"budget_tokens":2048}}', "budget_tokens stands twice"),
        (b'{"prediction":{"content":"a","content":"b"}}', "content stands twice"),
        (b'{"prediction":{"content":[{"type":"text","text":"a","text":"b"}]}}', "text stands twice"),
        (b'{"response_format":{"type":"text","type":"json_object"}}', "type stands twice"),
    ],
)
def test_what_is_no_json_or_reads_two_ways_is_a_bad_request(body: bytes, expected: str) -> None:
    with pytest.raises(BadRequest) as refused:
        contract.read("completions", body, strict=False)
    assert expected in refused.value.message
    assert refused.value.status == 400


@pytest.mark.parametrize("twice", [b'{"x":1,"x":2,', b'{"metadata":{"a":"1","a":"2"},'])
def test_what_nobody_reads_may_stand_twice(twice: bytes) -> None:
    body = twice + b'"model":"m","prompt":"p"}'
    assert contract.read("completions", body, strict=False)[2] == []


@pytest.mark.parametrize("member", ["x", "response_format", "prompt", "metadata", "logit_bias"])
def test_no_depth_is_a_surprise(member: str) -> None:
    def outcome(depth: int) -> str:
        nested = b"[" * depth + b"]" * depth
        if member == "response_format":
            nested = b'{"type":"json_schema","json_schema":{"a":' + nested + b"}}"
        body = b'{"model":"m","%s":%s}' % (member.encode(), nested)
        try:
            return contract.read("completions", body, strict=False)[2][-1].path
        except BadRequest as refused:
            return refused.message

    too_deep = "the body is nested too deeply, expected some hundred levels at most"
    # Around the interpreter's limit a value can be shallow enough to be found, and too deep to be decoded.
    assert {outcome(depth) for depth in range(800, 1010)} == {"prompt", too_deep}
    assert (outcome(100), outcome(100_000)) == ("prompt", too_deep)


def test_a_large_body_of_many_members_is_left_early() -> None:
    wide = b"{" + b",".join(b'"x%d":1' % i for i in range(100_000)) + b"}"
    with pytest.raises(BadRequest, match="more than 1000 members"):
        contract.read("completions", wide, strict=False)


def test_a_large_body_of_few_members_is_not() -> None:
    members = b",".join(b'"x%d":"%s"' % (i, b"y" * 1000) for i in range(998))
    body = b'{"model":"m","prompt":"p",' + members + b"}"
    assert contract.read("completions", body, strict=False)[2] == []

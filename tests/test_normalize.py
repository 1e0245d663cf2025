"""What backends are asked: the rules T1 to T31 of the API's conventions, model families, and bytes that stay."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import policy
from gateway.asgi import Message
from gateway.bounds import MAX_BOUND, Input
from gateway.endpoints import ENDPOINTS, Endpoint
from gateway.errors import BadRequest, GatewayError, Invalid, NotFound
from gateway.normalize import InferenceRequest, bounded, fitted, instead, normalize, of_route, renamed
from gateway.snapshot import Route, Snapshot
from gateway.uploads import Upload

POLICIES = Path(__file__).parent.parent / "policies"
FAMILIES = ("qwen3", "minimax-m2", "deepseek-v3", "glm-4.5", "glm-4.6", "glm-4.7", "gpt-oss", "kimi-k2")


def snapshot(schema: str) -> Snapshot:
    """The families of the real documents, each with a model at either kind of backend, and models of no family."""
    models = {
        "plain": {"pool": "fireworks", "max_output_tokens": 100},
        "open": {"pool": "openai", "max_output_tokens": 100},
        "accounts/acme/models/long": {"pool": "fireworks", "aliases": ["short"], "max_output_tokens": 100},
        "gpt-5-mini": {"pool": "openai"},
        "o3": {"pool": "openai", "upstream_model": "openai/o3-pro"},
        "gpt-oss": {"pool": "openai", "upstream_model": "openai/gpt-oss-120b"},
        "claude": {"pool": "anthropic"},
        "falls": {"pool": "openai", "max_output_tokens": 500, "fallback": "plain"},
        "falls-low": {"pool": "fireworks", "max_output_tokens": 50, "fallback": "open"},
        "renamed": {"pool": "openai", "upstream_model": "vendor/name", "aliases": ["other", "vendor/name"]},
        "inject": {"pool": "inject"},
        "continuous": {"pool": "continuous"},
        "window": {"pool": "openai", "context_window": 40, "upstream_model": "v"},
        "old": {"pool": "inject", "profile": "2023", "schema": "lenient", "max_output_tokens": 100},
        **{f"fireworks/{family}": {"pool": "fireworks", "family": family} for family in FAMILIES},
        **{f"openai/{family}": {"pool": "openai", "family": family} for family in FAMILIES},
    }
    upstreams = [{"url": "http://127.0.0.1:1"}]
    documents = {
        "gateway": {"schema": schema},
        "models": models,
        "pools": {
            **{api: {"api": api, "upstreams": upstreams} for api in ("fireworks", "openai", "anthropic")},
            **{usage: {"api": "openai", "usage": usage, "upstreams": upstreams} for usage in ("inject", "continuous")},
        },
    }
    with TemporaryDirectory() as directory:
        (Path(directory) / "families.yaml").write_text((POLICIES / "families.yaml").read_text())
        (Path(directory) / "models.yaml").write_text(json.dumps(documents))
        return policy.load(Path(directory))


STRICT, LENIENT = snapshot("strict"), snapshot("lenient")


@dataclass(frozen=True)
class Refused:
    """An expected refusal: its status, the member at fault, and words of its text."""

    status: int
    param: str | None
    words: str


def ask(body: dict[str, Any] | bytes, endpoint: str = "completions", policies: Snapshot = STRICT) -> InferenceRequest:
    return normalize(ENDPOINTS[endpoint], body if isinstance(body, bytes) else json.dumps(body).encode(), policies)


def refusal(body: dict[str, Any] | bytes, endpoint: str = "completions", policies: Snapshot = STRICT) -> GatewayError:
    with pytest.raises((BadRequest, Invalid, NotFound)) as refused:
        ask(body, endpoint, policies)
    return refused.value


# — T1 to T31

OPEN, CHAT, LOOSE = {"model": "open"}, {"endpoint": "chat/completions"}, {"policies": LENIENT}
GPT_OSS, MINIMAX = {"model": "fireworks/gpt-oss"}, {"model": "fireworks/minimax-m2"}
SAME: dict[str, Any] = {"the body": "is the object that came"}


def together(alias: str) -> Refused:
    return Refused(422, alias, f"{alias}: cannot be specified together with")


def wrong(param: str, words: str = "expected") -> Refused:
    return Refused(422, param, words)


def part(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": kind, **members}


TEXTS = [part("text", text="te"), part("text", text="xt")]
BOTH = {"thinking": part("enabled"), "reasoning_effort": True}

# Name, members given, and what follows: the members that go upstream, SAME, or a refusal. Then who is asked, and how.
RULES: list[tuple[str, dict[str, Any], dict[str, Any] | Refused, dict[str, Any]]] = [
    ("T1", {"max_completion_tokens": 7}, {"max_tokens": 7}, {}),
    ("T1 chat", {"max_completion_tokens": 7}, {"max_tokens": 7}, CHAT),
    ("T1 openai keeps it", {"max_completion_tokens": 7}, SAME, OPEN),
    ("T2 different", {"max_completion_tokens": 7, "max_tokens": 8}, together("max_completion_tokens"), {}),
    ("T2 equal", {"max_tokens": 7, "max_completion_tokens": 7}, together("max_completion_tokens"), {}),
    ("T2 zero", {"max_tokens": 0, "max_completion_tokens": 0}, together("max_completion_tokens"), {}),
    ("T2 openai", {"max_tokens": 7, "max_completion_tokens": 7}, together("max_completion_tokens"), OPEN),
    ("T2 chat", {"max_tokens": 7, "max_completion_tokens": 7}, together("max_completion_tokens"), CHAT),
    ("T3 alias null", {"max_completion_tokens": None, "max_tokens": 5}, {"max_tokens": 5}, {}),
    ("T3 name null", {"max_completion_tokens": 5, "max_tokens": None}, {"max_tokens": 5}, {}),
    ("T3 name null first", {"max_tokens": None, "max_completion_tokens": 5}, {"max_tokens": 5}, {}),
    ("T3 both null", {"max_completion_tokens": None, "max_tokens": None}, {}, {}),
    ("T3 alias alone null", {"max_completion_tokens": None}, {}, {}),
    ("T3 name alone null", {"max_tokens": None}, SAME, {}),
    ("T3 openai keeps nulls", {"max_completion_tokens": None, "max_tokens": 5}, SAME, OPEN),
    ("T4 true", {"max_tokens": True}, wrong("max_tokens", "found true, expected an integer"), {}),
    ("T4 string", {"max_tokens": "5"}, wrong("max_tokens"), {}),
    ("T4 negative", {"max_tokens": -1}, wrong("max_tokens"), {}),
    ("T4 alias false", {"max_completion_tokens": False}, wrong("max_completion_tokens", "found false"), {}),
    ("T4 alias negative", {"max_completion_tokens": -1}, wrong("max_completion_tokens"), {}),
    ("T4 zero with echo", {"max_tokens": 0, "echo": True}, SAME, {}),
    ("T4 chat", {"max_tokens": True}, wrong("max_tokens"), CHAT),
    ("T5 default", {"max_tokens": 10**9}, SAME, {}),
    ("T5 error", {"max_tokens": 10**9, "context_length_exceeded_behavior": "error"}, SAME, {}),
    ("T6", {"prediction": "text"}, {"speculation": "text"}, {}),
    ("T6 empty", {"prediction": ""}, {"speculation": ""}, {}),
    ("T6 openai keeps it", {"prediction": "text"}, SAME, OPEN),
    ("T7 with type", {"prediction": part("content", content="text")}, {"speculation": "text"}, {}),
    ("T7 without", {"prediction": {"content": "text"}}, {"speculation": "text"}, {}),
    ("T7 openai keeps it", {"prediction": part("content", content="text")}, SAME, OPEN),
    ("T8", {"prediction": {"content": TEXTS}}, {"speculation": "text"}, {}),
    ("T8 escapes", {"prediction": {"content": [part("text", text='"\n\\é😀')]}}, {"speculation": '"\n\\é😀'}, {}),
    (
        "T8 image",
        {"prediction": {"content": [*TEXTS, part("image_url", image_url={"url": "u"})]}},
        wrong("prediction.content[2].type"),
        {},
    ),
    (
        "T8 text and image",
        {"prediction": {"content": [part("text", text="t", image_url={"url": "u"})]}},
        wrong("prediction.content[0].image_url"),
        {},
    ),
    ("T8 null", {"prediction": {"content": [part("text", text=None)]}}, wrong("prediction.content[0].text"), {}),
    ("T8 no text", {"prediction": {"content": [part("text")]}}, wrong("prediction.content[0].text", "is missing"), {}),
    ("T9 type", {"prediction": part("text", content="text")}, wrong("prediction.type"), {}),
    ("T9 no content", {"prediction": part("content")}, wrong("prediction.content", "is missing"), {}),
    ("T9 extra", {"prediction": {"content": "a", "x": 1}}, wrong("prediction.x", "Extra inputs are not permitted"), {}),
    (
        "T9 extra, lenient",
        {"prediction": {"content": "a", "x": 1}},
        wrong("prediction.x", "Extra inputs are not permitted"),
        LOOSE,
    ),
    ("T10", {"prediction": "a", "speculation": "a"}, together("prediction"), {}),
    ("T10 openai", {"prediction": "a", "speculation": [1]}, together("prediction"), OPEN),
    ("T10 one null", {"prediction": None, "speculation": "a"}, {"speculation": "a"}, {}),
    ("T10 other null", {"prediction": "a", "speculation": None}, {"speculation": "a"}, {}),
    ("T11", {"speculation": [1, 2, 2**70]}, SAME, {}),
    ("T12", {"thinking": part("enabled")}, {"reasoning_effort": "medium"}, {}),
    ("T12 null budget", {"thinking": part("enabled", budget_tokens=None)}, {"reasoning_effort": "medium"}, {}),
    ("T12 openai too", {"thinking": part("enabled")}, {"reasoning_effort": "medium"}, OPEN),
    ("T12 chat", {"thinking": part("enabled")}, {"reasoning_effort": "medium"}, CHAT),
    ("T13 least", {"thinking": part("enabled", budget_tokens=1024)}, {"reasoning_effort": 1024}, {}),
    ("T13 huge", {"thinking": part("enabled", budget_tokens=2**70)}, {"reasoning_effort": 2**70}, {}),
    *(
        (f"T13 {budget}", {"thinking": part("enabled", budget_tokens=budget)}, wrong("thinking.budget_tokens"), {})
        for budget in (1023, 0, -1, True, False)
    ),
    ("T14", {"thinking": part("disabled")}, {"reasoning_effort": "none"}, {}),
    (
        "T14 budget",
        {"thinking": part("disabled", budget_tokens=2048)},
        wrong("thinking.budget_tokens", "Extra inputs"),
        {},
    ),
    ("T14 unknown type", {"thinking": part("auto")}, wrong("thinking.type", 'found "auto", expected "enabled"'), {}),
    ("T14 no type", {"thinking": {}}, wrong("thinking.type", "is missing"), {}),
    ("T15", BOTH, together("thinking"), {}),
    ("T15 equivalent", {"thinking": part("disabled"), "reasoning_effort": "none"}, together("thinking"), {}),
    ("T15 openai", BOTH, together("thinking"), OPEN),
    ("T15 thinking null", {"thinking": None, "reasoning_effort": True}, {"reasoning_effort": "medium"}, {}),
    ("T15 effort null", {"thinking": part("enabled"), "reasoning_effort": None}, {"reasoning_effort": "medium"}, {}),
    ("T15 both null", {"thinking": None, "reasoning_effort": None}, {}, {}),
    ("T16 true", {"reasoning_effort": True}, {"reasoning_effort": "medium"}, {}),
    ("T16 false", {"reasoning_effort": False}, {"reasoning_effort": "none"}, {}),
    ("T16 openai too", {"reasoning_effort": False}, {"reasoning_effort": "none"}, OPEN),
    (
        "T16 says none",
        {"reasoning_effort": False},
        wrong("reasoning_effort", "Invalid reasoning effort: none"),
        GPT_OSS,
    ),
    ("T17 one", {"reasoning_effort": 1}, SAME, {}),
    ("T17 zero", {"reasoning_effort": 0}, wrong("reasoning_effort"), {}),
    ("T17 negative", {"reasoning_effort": -1}, wrong("reasoning_effort"), {}),
    *((f"T18 {word}", {"reasoning_effort": word}, SAME, {}) for word in ("low", "medium", "high", "none")),
    *(
        (f"T18 {word!r}", {"reasoning_effort": word}, wrong("reasoning_effort"), {})
        for word in ("", "MEDIUM", "lowest")
    ),
    ("T19", {}, SAME, {}),
    ("T19 null", {"thinking": None}, {}, {}),
    ("T19 openai null", {"thinking": None}, {}, OPEN),
    ("T20", {"reasoning_effort": True}, wrong("reasoning_effort", "Invalid reasoning effort: true"), MINIMAX),
    ("T20 thinking", {"thinking": part("enabled")}, wrong("thinking", "Invalid reasoning effort: true"), MINIMAX),
    ("T21", {"thinking": part("disabled")}, wrong("thinking", "Invalid reasoning effort: none"), GPT_OSS),
    (
        "T21 budget",
        {"thinking": part("enabled", budget_tokens=2048)},
        wrong("thinking", "Invalid reasoning effort: 2048"),
        GPT_OSS,
    ),
    ("T22 four", {"stop": ["a", "b", "c", "d"]}, SAME, {}),
    ("T22 five", {"stop": ["a", "b", "c", "d", "e"]}, wrong("stop", "at most 4"), {}),
    *((f"T23 {n}", {"n": n}, wrong("n", "from 1 to 128"), {}) for n in (0, 129, None)),
    ("T23 most", {"n": 128}, SAME, {}),
    ("T24", {"top_logprobs": 6}, wrong("top_logprobs"), {}),
    ("T24 five", {"top_logprobs": 5}, SAME, {}),
    ("T25", {"logprobs": 6}, wrong("logprobs"), {}),
    *((f"T25 {given}", {"logprobs": given}, SAME, {}) for given in (True, False, 0, 5)),
    (
        "T26",
        {"promptCacheKey": "k"},
        wrong("promptCacheKey", "Extra inputs are not permitted, field: 'promptCacheKey'"),
        {},
    ),
    ("T26 openai's own", {"best_of": 2}, wrong("best_of", "field: 'best_of'"), {}),
    ("T26 lenient", {"promptCacheKey": "k", "best_of": 2}, SAME, LOOSE),
    ("T26 chat", {"promptCacheKey": "k", "best_of": 2}, SAME, CHAT),
    ("T27", {"metadata": {"a": 1}}, wrong("metadata"), {}),
    ("T27 strings", {"metadata": {"a": "1"}}, SAME, {}),
    ("T28 no schema", {"response_format": part("json_schema")}, wrong("response_format.json_schema", "is missing"), {}),
    ("T28 schema", {"response_format": part("json_schema", json_schema={"type": "object"})}, SAME, {}),
    ("T28 type", {"response_format": part("yaml")}, wrong("response_format.type"), {}),
    ("T29 null", {"prompt": None}, wrong("prompt", "found null, expected a string or a non-empty array"), {}),
    ("T29 empty", {"prompt": []}, wrong("prompt"), {}),
    ("T29 mixed", {"prompt": ["a", 1]}, wrong("prompt"), {}),
    ("T29 mixed tokens", {"prompt": [1, [2]]}, wrong("prompt"), {}),
    ("T30 low end", {"temperature": 0, "top_p": 0, "frequency_penalty": -2, "top_k": 0}, SAME, {}),
    ("T30 high end", {"temperature": 2, "top_p": 1, "frequency_penalty": 2.0, "top_k": 100}, SAME, {}),
    ("T30 over", {"temperature": 2.0001}, wrong("temperature", "found 2.0001, expected a number from 0 to 2"), {}),
    ("T30 NaN", {"temperature": float("nan")}, Refused(400, None, "no JSON object"), {}),
    ("T30 Infinity", {"temperature": float("-inf")}, Refused(400, None, "no JSON object"), {}),
    ("T30 NaN unread", {"x": float("nan")}, Refused(400, None, "no JSON object"), LOOSE),
]


@pytest.mark.parametrize(("members", "expected", "how"), [pytest.param(*row[1:], id=row[0]) for row in RULES])
def test_rule(members: dict[str, Any], expected: dict[str, Any] | Refused, how: dict[str, Any]) -> None:
    how = dict(how)
    endpoint = how.get("endpoint", "completions")
    needed = {"prompt": "p"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "p"}]}
    base = {"model": how.pop("model", "plain"), **needed}
    body = json.dumps({**base, **members}).encode()
    if isinstance(expected, Refused):
        refused = refusal(body, **how)
        assert (refused.status, refused.param) == (expected.status, expected.param)
        assert expected.words in refused.message
    elif expected is SAME:
        assert ask(body, **how).body is body
    else:
        assert json.loads(ask(body, **how).body) == {**base, **expected}


def test_every_rule_has_its_rows() -> None:
    told = {row[0].split()[0] for row in RULES} | {"T31"}  # T31: bytes, below
    assert told == {f"T{i}" for i in range(1, 32)}


# — T31: bytes

UNTOUCHED = [
    b'{"model":"plain","prompt":"p","seed":1180591620717411303424,"temperature":1e-7}',
    b' {\n\t"prompt" : "caf\\u00e9 \\ud83d\\ude00 \\/" ,"model":"plain" ,\r\n "top_p":1.0E-0}\n ',
    '{"prompt":"日本 é","model":"plain","logit_bias":{"5":-0.0}}'.encode(),
    b'{"mod\\u0065l":"pl\\u0061in","prompt":[1, 2]}',
    b'{"model":"plain","prompt":"p","max_tokens":null,"reasoning_effort":null}',
]


@pytest.mark.parametrize("body", UNTOUCHED)
def test_t31_a_body_that_needs_nothing_is_the_very_same_object(body: bytes) -> None:
    assert ask(body).body is body


REWRITTEN = [
    (
        b'{"seed":1180591620717411303424,"model":"short","temperature":1e-7,"prompt":"caf\\u00e9"}',
        b'{"seed":1180591620717411303424,"model":"accounts/acme/models/long","temperature":1e-7,"prompt":"caf\\u00e9"}',
    ),
    (
        b'{\n  "model": "plain",\n  "max_completion_tokens": 1180591620717411303424,\n  "prompt": "p"\n}\n',
        b'{\n  "model": "plain","max_tokens":1180591620717411303424,\n  "prompt": "p"\n}\n',
    ),
    (
        b'{"max_tokens":null,"prompt":"p","max_completion_tokens":05,"model":"plain"}'.replace(b"05", b"5"),
        b'{"prompt":"p","max_tokens":5,"model":"plain"}',
    ),
    (
        b'{"thinking":null,"prompt":"a\\"},{\\"b\\":\\\\","prediction":"\\u00e9\\n","model":"plain","thin\\u0020g":[{"a":1}]}',
        b'{"prompt":"a\\"},{\\"b\\":\\\\","speculation":"\\u00e9\\n","model":"plain","thin\\u0020g":[{"a":1}]}',
    ),
    (
        b'{"model":"plain","prompt":"p","prediction":{"type":"content","content":"\\u00e9"},"thinking":{"type":"enabled"}}',
        b'{"model":"plain","prompt":"p","speculation":"\\u00e9","reasoning_effort":"medium"}',
    ),
    (
        b'{"x":1,"model":"other","y":1E+2,"prompt":"p","max_completion_tokens": 5,"reasoning_effort":false ,"\\"":0}',
        (
            b'{"x":1,"model":"vendor/name","y":1E+2,"prompt":"p","max_completion_tokens": 5,'
            b'"reasoning_effort":"none" ,"\\"":0}'
        ),
    ),
    (
        b' { "thinking" : null , "model":"plain", "prompt":"p" } ',
        b'{ "model":"plain", "prompt":"p" } ',
    ),
]


@pytest.mark.parametrize(("body", "expected"), REWRITTEN)
def test_t31_only_what_changes_is_spliced_and_in_its_place(body: bytes, expected: bytes) -> None:
    assert ask(body, policies=LENIENT).body == expected


@pytest.mark.parametrize(
    "name",
    [
        *("model", "prompt", "stream", "n", "max_tokens", "max_completion_tokens", "prediction", "speculation", "user"),
        *("thinking", "reasoning_effort", "reasoning_history"),
    ],
)
@pytest.mark.parametrize("escaped", [False, True])
def test_t31_a_member_that_is_read_may_not_stand_twice(name: str, escaped: bool) -> None:
    again = f"\\u{ord(name[0]):04x}{name[1:]}" if escaped else name
    body = b'{"%s":null,"model":"plain","prompt":"p","%s":null}' % (name.encode(), again.encode())
    refused = refusal(body, policies=LENIENT)
    assert (refused.status, refused.param) == (400, name)
    assert f"{name} stands twice" in refused.message


@pytest.mark.parametrize("name", [b"tools", b"unheard_of"])
def test_t31_not_even_what_nobody_knows_may_stand_twice(name: bytes) -> None:
    body = b'{"model":"plain","messages":[{}],"%b":[],"%b":[]}' % (name, name)
    refused = refusal(body, "chat/completions")
    assert (refused.status, refused.param) == (400, name.decode())


# — model families, a row for each cell of the reference's table

EVERY = {"none", "false", "true", "low", "medium", "high", "integer"}
TAKEN = {
    "qwen3": EVERY,
    "minimax-m2": {"low", "medium", "high"},
    "deepseek-v3": EVERY,
    "glm-4.5": EVERY,
    "glm-4.6": EVERY,
    "glm-4.7": EVERY,
    "gpt-oss": {"true", "low", "medium", "high"},
    "kimi-k2": EVERY,
}
SUPPORTED = {"minimax-m2": "low, medium, high", "gpt-oss": "low, medium, high, true"}
# A cell, the members that ask for it, and what goes upstream.
ASKED: list[tuple[str, dict[str, Any], str | int]] = [
    ("none", {"reasoning_effort": "none"}, "none"),
    ("none", {"thinking": {"type": "disabled"}}, "none"),
    ("false", {"reasoning_effort": False}, "none"),
    ("true", {"reasoning_effort": True}, "medium"),
    ("true", {"thinking": {"type": "enabled"}}, "medium"),
    ("low", {"reasoning_effort": "low"}, "low"),
    ("medium", {"reasoning_effort": "medium"}, "medium"),
    ("high", {"reasoning_effort": "high"}, "high"),
    ("integer", {"reasoning_effort": 1}, 1),
    ("integer", {"thinking": {"type": "enabled", "budget_tokens": 2048}}, 2048),
]
TOLD = {"none": "none", "false": "none", "true": "true"}
HISTORIES = {
    "minimax-m2": {"disabled", "interleaved"},
    "glm-4.6": {"disabled", "interleaved"},
}


@pytest.mark.parametrize("pool", ["fireworks", "openai"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("cell", "members", "upstream"), ASKED)
def test_a_family_takes_an_effort_or_says_what_it_takes(
    pool: str, family: str, cell: str, members: dict[str, Any], upstream: str | int
) -> None:
    body = {"model": f"{pool}/{family}", "prompt": "p", **members}
    if cell in TAKEN[family]:
        assert json.loads(ask(body).body) == {
            "model": f"{pool}/{family}",
            "prompt": "p",
            "reasoning_effort": upstream,
        }
    else:
        refused = refusal(body)
        told = TOLD.get(cell, str(upstream))
        assert refused.message == (f"Invalid reasoning effort: {told}, {pool}/{family} supports {SUPPORTED[family]}")
        assert (refused.status, refused.param) == (422, *members)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("history", ["disabled", "interleaved", "preserved", None])
def test_a_family_takes_a_history_or_says_what_it_takes(family: str, history: str | None) -> None:
    body = json.dumps({"model": f"fireworks/{family}", "prompt": "p", "reasoning_history": history}).encode()
    if history is None or history in HISTORIES.get(family, {history}):
        assert ask(body).body is body
    else:
        assert refusal(body).message == (
            f"reasoning_history: found {history}, fireworks/{family} supports disabled, interleaved"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_left_to_the_model(family: str) -> None:
    body = b'{"model":"fireworks/%s","prompt":"p"}' % family.encode()
    assert ask(body).body is body


def test_the_families_of_the_documents_hold_for_their_models() -> None:
    real = policy.load(POLICIES)
    assert {model.family.name for model in real.public_models if model.family is not None} <= set(FAMILIES)
    refused = refusal({"model": "gpt-oss-120b", "prompt": "p", "reasoning_effort": False}, policies=real)
    assert refused.message == (
        "Invalid reasoning effort: none, accounts/fireworks/models/gpt-oss-120b supports low, medium, high, true"
    )
    asked = ask({"model": "qwen3-8b", "prompt": "p"}, policies=real)
    assert json.loads(asked.body)["model"] == asked.model.name == "accounts/fireworks/models/qwen3-8b"


def test_family_and_contract_are_told_at_once() -> None:
    refused = refusal({"model": "fireworks/glm-4.6", "prompt": 5, "reasoning_history": "preserved", "x": 1, "n": 0})
    assert isinstance(refused, Invalid)
    assert [problem.path for problem in refused.problems] == ["prompt", "n", "x", "reasoning_history"]


# — the other words of a request


def test_a_request_says_what_is_asked_of_whom() -> None:
    body = b'{"model":"short","prompt":"abcde","stream":true,"user":"u","max_tokens":7}'
    assert ask(body) == InferenceRequest(
        endpoint=ENDPOINTS["completions"],
        path="/v1/completions",
        model=STRICT.models["accounts/acme/models/long"],
        asked_model="short",
        body=body.replace(b"short", b"accounts/acme/models/long"),
        stream=True,
        user="u",
        output_bound=7,
        answers=1,
        input=Input(1, 5, margin=8),
    )
    assert ask(body).input_estimate == 2


def test_a_chat_is_estimated_by_its_messages_and_tools() -> None:
    messages, tools = [{"role": "user", "content": "x" * 100}], [{"type": "function"}]
    asked = ask({"model": "plain", "messages": messages, "tools": tools}, "chat/completions")
    assert asked.path == "/v1/chat/completions"
    assert asked.input_estimate == -(-(len(json.dumps(messages)) + len(json.dumps(tools))) // 4)
    assert (asked.stream, asked.user, asked.output_bound) == (False, None, 100)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, 100),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 0, "echo": True}, 0),
        ({"max_tokens": None}, 100),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": 0}, 0),
        ({"max_tokens": 7, "n": 3}, 21),
        ({"max_tokens": 7, "n": 3, "prompt": ["a", "b"]}, 42),
        ({"n": 2, "prompt": [[1, 2], [3], [4]]}, 600),
        ({"prompt": [1, 2, 3]}, 100),
        ({"max_tokens": 2**70}, MAX_BOUND),
        ({"max_tokens": 10**900, "n": 128}, MAX_BOUND),
    ],
)
def test_the_output_is_bound_over_all_prompts_and_choices(members: dict[str, Any], expected: int) -> None:
    assert ask({"model": "plain", "prompt": "p", **members}).output_bound == expected
    assert ask({"model": "open", "prompt": "p", **members}).output_bound == expected


@pytest.mark.parametrize(
    ("asked", "upstream"),
    [
        ("short", "accounts/acme/models/long"),
        ("accounts/acme/models/long", "accounts/acme/models/long"),
        ("renamed", "vendor/name"),
        ("other", "vendor/name"),
        ("vendor/name", "vendor/name"),
    ],
)
def test_a_backend_is_asked_by_the_name_it_knows(asked: str, upstream: str) -> None:
    body = json.dumps({"model": asked, "prompt": "p"}).encode()
    request = ask(body)
    assert (request.asked_model, json.loads(request.body)["model"]) == (asked, upstream)
    assert (request.body is body) == (asked == upstream)


@pytest.mark.parametrize(("stream", "expected"), [(True, True), (False, False), (None, False)])
def test_a_stream_is_what_asks_for_one(stream: bool | None, expected: bool) -> None:
    assert ask({"model": "plain", "prompt": "p", "stream": stream}).stream is expected


@pytest.mark.parametrize("name", ["gone", "", "plain ", "x" * 10_000])
def test_an_unknown_model_is_not_found_and_named_in_short(name: str) -> None:
    refused = refusal({"model": name, "prompt": "p"})
    assert isinstance(refused, NotFound)
    assert (refused.status, refused.code, refused.param) == (404, "model_not_found", "model")
    assert refused.message.startswith(f'Model not found, inaccessible, and/or not deployed: "{name[:200]}')
    assert len(refused.message) < 300


@pytest.mark.parametrize(
    ("endpoint", "missing"),
    [("completions", ["model", "prompt"]), ("chat/completions", ["model", "messages"])],
)
def test_what_a_request_cannot_be_without(endpoint: str, missing: list[str]) -> None:
    refused = refusal({}, endpoint)
    assert isinstance(refused, Invalid)
    assert [problem.path for problem in refused.problems] == missing


BOMBS = [
    b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"model":"plain","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 100_000,
    b'{"model":"plain","prompt":"p","x":' + b"9" * 5000 + b"}",
    *(
        b'{"model":"plain","prompt":"p","%s":%s}' % (name, b"9" * 5000)
        for name in (b"max_tokens", b"seed", b"temperature")
    ),
    b'{"model":"plain","prompt":"p","reasoning_effort":' + b"9" * 5000 + b"}",
    b'{"model":"plain","prompt":"p","thinking":{"type":"enabled","budget_tokens":' + b"9" * 5000 + b"}}",
    b'{"model":"fireworks/gpt-oss","prompt":"p","reasoning_effort":' + b"9" * 4300 + b"}",
    b'{"model":"plain","prompt":[' + b"9" * 5000 + b"]}",
    b'{"model":"plain","prompt":"p","temperature":1e999999}',
    b'{"model":"plain","prompt":"p",' + b",".join(b'"x%d":1' % i for i in range(5_000)) + b"}",
    b'{"model":"plain","prompt":"p",' + b",".join(b'"x%d":1' % i for i in range(200_000)) + b"}",
    b'{"model":"plain","prompt":"p","metadata":{' + b",".join(b'"x%d":1' % i for i in range(50_000)) + b"}}",
    b'{"model":"plain","prompt":[' + b",".join([b"[1]"] * 50_000) + b"]}",
    b'{"model":"plain","prompt":["' + b"\\u0000" * 100_000 + b'"]}',
]


@pytest.mark.parametrize("policies", [STRICT, LENIENT], ids=["strict", "lenient"])
@pytest.mark.parametrize("body", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_passes_untouched_or_is_refused_in_short(body: bytes, policies: Snapshot) -> None:
    try:
        assert ask(body, policies=policies).body is body
    except (BadRequest, Invalid) as refused:
        answer = refused.render()[2]
        assert len(answer) < 10_000


# — any body at all

RAW = st.recursive(
    st.sampled_from(
        ["1", "-0", "1e-7", "1E+5", "1180591620717411303424", "0.10", "true", "null", '"\\u00e9\\/"', '"é😀"']
    )
    | st.text(max_size=5).map(json.dumps)
    | st.integers().map(str),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[ " + " ,".join(items) + "]")
        | st.dictionaries(st.text(string.ascii_letters, max_size=3), inner, max_size=3).map(
            lambda items: "{" + ", ".join(f'"{name}" :{value}' for name, value in items.items()) + " }"
        )
    ),
    max_leaves=6,
)
BLANKS = st.sampled_from(["", "", " ", "\n  ", "\t\r\n"])
TOKENS = st.sampled_from(["null", "0", "7", str(2**70)])
PREDICTIONS = st.sampled_from(
    ["null", '"t\\u00e9"', '{"content": "t"}', '{"content":[{"type":"text","text":"a"},{"text":"b","type":"text"}]}']
)
THOUGHTS = st.sampled_from(
    [
        *("null", '{"type":"enabled"}', '{"type":"disabled"}'),
        *('{"type":"enabled","budget_tokens":null}', '{"budget_tokens" : 4096,"type":"enabled"}'),
    ]
)
EFFORTS = st.sampled_from(["null", "true", "false", '"low"', "12"])


def pairs(alias: str, aliased: st.SearchStrategy[str], name: str, named: st.SearchStrategy[str]) -> Any:
    """An alias and its name, either of them null or left out."""
    null = st.just("null")
    return st.fixed_dictionaries({}, optional={alias: aliased, name: null}) | st.fixed_dictionaries(
        {}, optional={alias: null, name: named}
    )


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A body, and its members: names and values as they are written."""
    members = {
        "model": json.dumps(draw(st.sampled_from(["plain", "open", "short", "other"]))),
        "prompt": '"p\\u00e9"',
        **draw(pairs("max_completion_tokens", TOKENS, "max_tokens", TOKENS)),
        **draw(pairs("prediction", PREDICTIONS, "speculation", st.sampled_from(['"s"', "[1, 2]"]))),
        **draw(pairs("thinking", THOUGHTS, "reasoning_effort", EFFORTS)),
        **{f"x{name}": value for name, value in draw(st.dictionaries(st.text(max_size=4), RAW, max_size=4)).items()},
    }
    names = draw(st.permutations(list(members)))
    blank = [draw(BLANKS) for _ in range(4)]
    written = (f"{blank[0]}{json.dumps(name)}{blank[1]}:{blank[2]}{members[name]}{blank[3]}" for name in names)
    return blank[0] + "{" + ",".join(written) + "}" + blank[1], {name: members[name] for name in names}


STAND_FOR = {"max_completion_tokens": "max_tokens", "prediction": "speculation", "thinking": "reasoning_effort"}
NAMES = {"short": "accounts/acme/models/long", "other": "vendor/name"}


def by_the_rules(given: dict[str, Any]) -> dict[str, Any]:
    """What the rules make of a body's members, in their order: the same thing told a second time."""
    fireworks = given["model"] in ("plain", "short")
    stand_for = STAND_FOR if fireworks else {"thinking": "reasoning_effort"}
    replaced = {stand_for[name] for name in given if name in stand_for}
    return {
        stand_for.get(name, name): meant(name, value, fireworks)
        for name, value in given.items()
        if value is not None or (name not in stand_for and name not in replaced)
    }


def meant(name: str, value: Any, fireworks: bool) -> Any:
    match name, value:
        case "model", str():
            return NAMES.get(value, value)
        case ("thinking", {"type": "disabled"}) | ("reasoning_effort", False):
            return "none"
        case "thinking", {"budget_tokens": int(budget)}:
            return budget
        case ("thinking", {"type": "enabled"}) | ("reasoning_effort", True):
            return "medium"
        case "prediction", {"content": str(text)} if fireworks:
            return text
        case "prediction", {"content": list(parts)} if fireworks:
            return "".join(part["text"] for part in parts)
    return value


@given(bodies())
def test_any_body_follows_the_rules_and_keeps_all_other_bytes(drawn: tuple[str, dict[str, str]]) -> None:
    text, members = drawn
    body = text.encode()
    out = ask(body, policies=LENIENT).body
    expected = by_the_rules(json.loads(body))
    assert list(json.loads(out).items()) == list(expected.items())
    raw = {name: bytes(value) for name, value in msgspec.json.decode(out, type=dict[str, msgspec.Raw]).items()}
    unread = {name: value.encode() for name, value in members.items() if name.startswith("x") or name == "prompt"}
    assert {name: raw[name] for name in unread} == unread
    if expected == json.loads(body):
        assert out is body


@given(RAW, st.sampled_from(["completions", "chat/completions"]), st.sampled_from(["model", "prompt", "messages"]))
def test_no_body_is_a_surprise(value: str, endpoint: str, name: str) -> None:
    members = {"model": '"plain"', "prompt": '"p"', "messages": "[1]", name: value}
    for body in (value, "{" + ",".join(f'"{key}":{raw}' for key, raw in members.items()) + "}"):
        try:
            asked = ask(body.encode(), endpoint, LENIENT)
        except (BadRequest, Invalid, NotFound):
            continue
        assert asked.input_estimate >= 1


@given(st.binary(max_size=40))
def test_no_bytes_are_a_surprise(body: bytes) -> None:
    assert refusal(body).status in (400, 422)


@given(st.binary(max_size=12), st.integers(0, 60))
def test_no_damage_is_a_surprise(damage: bytes, at: int) -> None:
    sound = b'{"model":"plain","prompt":"p","max_completion_tokens":5,"x":[1]}'
    body = sound[:at] + damage + sound[at + len(damage) :]
    try:
        out = ask(body, policies=LENIENT).body
    except (BadRequest, Invalid, NotFound):
        return
    assert json.loads(out) == by_the_rules(json.loads(body))


# — usage of streams


@pytest.mark.parametrize(
    ("given", "expected", "injected"),
    [
        (b'{"model":"inject","prompt":"x","stream":true}', b',"stream_options":{"include_usage":true}}', True),
        (b'{"model":"inject","prompt":"x","stream":true }\n', b' ,"stream_options":{"include_usage":true}}\n', True),
        (b'{"model":"inject","stream_options":null,"stream":true,"prompt":"x"}', None, True),
        (b'{"model":"inject","stream_options":{"include_usage":false,"a":1e3},"stream":true,"prompt":"x"}', None, True),
        (b'{"model":"inject","stream_options":{"include_usage":true},"stream":true,"prompt":"x"}', None, False),
    ],
)
def test_a_stream_is_made_to_tell_its_usage_and_the_rest_of_the_body_stays(
    given: bytes, expected: bytes | None, injected: bool
) -> None:
    asked = ask(given)
    assert asked.injected is injected
    if expected is not None:
        assert asked.body == given.rstrip()[:-1].rstrip() + expected
    before, after = json.loads(given), json.loads(asked.body)
    assert after.pop("stream_options") == {**(before.pop("stream_options", None) or {}), "include_usage": True}
    assert after == before


@pytest.mark.parametrize("body", [b'{"model":"inject","prompt":"x"}', b'{"model":"open","prompt":"x","stream":true}'])
def test_what_is_no_stream_or_tells_by_itself_is_not_asked(body: bytes) -> None:
    asked = ask(body)
    assert asked.body is body
    assert not asked.injected


def test_a_backend_that_can_tells_it_all_the_time() -> None:
    asked = ask({"model": "continuous", "messages": [{"role": "user"}], "stream": True}, "chat/completions")
    assert json.loads(asked.body)["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(
    ("model", "given", "expected", "injected"),
    [
        ("inject", b'{"x":[1.50,%b]}' % (b"9" * 30), b'{"x":[1.50,%b],"include_usage":true}' % (b"9" * 30), True),
        ("inject", b'{"include_usage":true,"x":1e999}', b'{"include_usage":true,"x":1e999}', False),
        ("inject", b'{"include_usage":true,"x":[%b]}' % (b"9" * 5000), None, False),
        ("inject", b'{"include_usage": null, "a": {"b": [ ]}}', b'{"include_usage":true,"a":{"b": [ ]}}', True),
        ("old", b'{"include_usage":true,"x":1}', b'{"include_usage":true,"x":1}', False),
        ("old", b'{"include_usage":false}', b'{"include_usage":true}', True),
        ("old", b"5", b" 5", False),
    ],
)
def test_what_a_caller_says_of_his_stream_keeps_its_bytes(
    model: str, given: bytes, expected: bytes | None, injected: bool
) -> None:
    """Members that the gateway does not know stay, whatever their numbers; and who asked for his usage gets it, by
    whichever profile his model is checked."""
    asked = ask(b'{"model":"%b","prompt":"x","stream":true,"stream_options": %b}' % (model.encode(), given))
    assert asked.body.partition(b'"stream_options":')[2] == (expected or given) + b"}"
    assert asked.injected is injected


# — what may be produced, and what was read


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ({"best_of": 20, "max_tokens": 5}, 100),
        ({"best_of": 2, "n": 3, "max_tokens": 5}, 15),
        ({"best_of": "20", "max_tokens": 5}, 5),
        ({"best_of": -1, "max_tokens": 5}, 5),
        ({"max_completion_tokens": 500}, 500),
        ({"max_completion_tokens": 500, "max_tokens": 5}, 500),
        ({"max_completion_tokens": 5, "max_tokens": 500}, 500),
        ({"max_completion_tokens": None}, 100),
        ({"n": None, "max_tokens": 7, "prompt": ["a", "b"]}, 14),
        ({"max_tokens": 0, "echo": True}, 0),
    ],
)
def test_a_bound_holds_for_members_that_only_the_backend_knows(given: dict[str, Any], bound: int) -> None:
    """`old` is lenient, and by its profile it has neither best_of nor max_completion_tokens."""
    assert ask({"model": "old", "prompt": "x", **given}).output_bound == bound


@pytest.mark.parametrize(
    ("given", "room", "expected"),
    [
        ({"max_tokens": 50}, 90, 50),
        ({"max_tokens": 50}, 40, 40),
        ({"max_completion_tokens": 50}, 90, 50),
        ({}, 90, 90),
        ({}, 101, 100),
        ({"max_tokens": None}, 101, 100),
    ],
)
def test_what_a_backend_has_room_for_raises_no_bound(given: dict[str, Any], room: int, expected: int) -> None:
    """What was reserved is the bound of the first request: the second one may not produce more."""
    request = ask({"model": "open", "prompt": "x", **given})
    again = fitted(request, room)
    sent = json.loads(again.body)
    assert [sent[name] for name in ("max_tokens", "max_completion_tokens") if sent.get(name)] == [expected]
    assert again.output_bound == expected <= request.output_bound


def test_images_stand_beside_more_tokens_than_there_may_be_prompts() -> None:
    body = {"model": "plain", "prompt": [1] * 20_000, "images": ["data:image/png;base64,AA=="]}
    assert ask(body).input_estimate == 20_000 + 1600


def test_a_body_that_is_passed_on_goes_to_no_model_of_another_name() -> None:
    """It holds the name, and nobody looks into it a second time."""

    async def nothing() -> Message:
        raise AssertionError("nobody reads it here")

    own, same, other = (STRICT.models[name] for name in ("plain", "open", "renamed"))
    route = Route(Endpoint("/v1/files", body="any"), own, frozenset(("POST",)))
    request = of_route(route, "/v1/files", b"", "POST", b"", Upload({"headers": []}, nothing, 9))
    same = replace(same, upstream_name=own.upstream_name)
    assert instead(request, same) == msgspec.structs.replace(request, model=same)
    with pytest.raises(Invalid, match="the name stands in a body"):
        instead(request, other)


@pytest.mark.parametrize(
    ("prompt", "marks"),
    [
        (r'"<image>\u003cimage\u003E"', 2),
        (r'"\\\u003Cimage>"', 1),
        (r'"\\u003cimage> <image>"', 1),
        (r'"<ima\\ge> <image>"', 1),
    ],
)
def test_marks_are_counted_however_they_are_escaped(prompt: str, marks: int) -> None:
    """A backslash may stand before a mark, and be none of it; and what looks like an escape may be text."""
    for images in (1, 2, 3):
        body = f'{{"model":"plain","prompt":{prompt},"images":{json.dumps(["data:"] * images)}}}'.encode()
        if images == marks:
            assert ask(body).body == body
        else:
            assert refusal(body).param == "images"


# — context windows

TRUNCATE, ERROR = ({"context_length_exceeded_behavior": word} for word in ("truncate", "error"))


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"max_tokens": 37}, {"max_tokens": 37}),
        ({"max_tokens": 38}, {"max_tokens": 37}),
        ({"max_completion_tokens": 38, **TRUNCATE}, {"max_completion_tokens": 37}),
        ({"max_tokens": None, "max_completion_tokens": 99}, {"max_tokens": None, "max_completion_tokens": 37}),
        ({"prompt": [1] * 39, "max_tokens": 2}, {"max_tokens": 1}),
        ({"prompt": [1] * 40, "max_tokens": 2}, {"max_tokens": 2}),
        ({"prompt": [1] * 50, "max_tokens": 0}, {"max_tokens": 0}),
        ({"prompt": [[1], [2]], "max_tokens": 99}, {"max_tokens": 99}),
        ({"prompt": ["a", "b"], "max_tokens": 99}, {"max_tokens": 99}),
        ({"prompt": "a" * 12, "max_tokens": 99}, {"max_tokens": 37}),
        ({"prompt": "a" * 12, "max_tokens": 99, **ERROR}, {"max_tokens": 99}),
        ({"max_tokens": 37, **ERROR}, {"max_tokens": 37}),
        ({}, {}),
        ({"n": 3, "max_tokens": 38, "stream": True}, {"n": 3, "max_tokens": 37, "stream": True}),
    ],
)
def test_what_is_asked_is_lowered_to_what_the_window_holds(given: dict[str, Any], sent: dict[str, Any]) -> None:
    """Beside three tokens; and by the endpoint's own number where nothing would be left, or nobody can say how much."""
    body = {"model": "window", "prompt": [1, 2, 3], **given}
    asked = ask(body)
    assert json.loads(asked.body) == {"model": "v", "prompt": body["prompt"], **sent}
    bound = sent.get("max_tokens") if sent.get("max_tokens") is not None else sent.get("max_completion_tokens", 8192)
    prompts = 2 if body["prompt"] in ([[1], [2]], ["a", "b"]) else 1
    assert asked.output_bound == (bound or 0) * sent.get("n", 1) * prompts


def test_a_counted_prompt_that_leaves_too_little_is_an_error_where_one_is_wanted() -> None:
    refused = refusal({"model": "window", "prompt": [1, 2, 3], "max_tokens": 38, **ERROR})
    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "max_tokens")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_request_without_a_bound_keeps_what_was_reserved_for_it(name: str) -> None:
    """The backend finds out how much fits; nothing else of the request changes."""
    body = {"model": "window", "messages": [{"role": "user"}], name: 30, "stop": ["a"], "n": 2, **TRUNCATE}
    again = fitted(ask(body, "chat/completions"), None)
    assert json.loads(again.body) == {"model": "v", "messages": [{"role": "user"}], "stop": ["a"], "n": 2}
    assert again.output_bound == 60


# — a bound that the caller did not name

CHATTING = '"messages":[{"role":"user"}]'
UNNAMED: list[tuple[str, str, str, str]] = [
    # model, endpoint, the caller's other members, what is told behind them
    ("plain", "completions", '"prompt":"p"', ',"max_tokens":100'),
    ("plain", "chat/completions", CHATTING, ',"max_tokens":100'),
    ("open", "chat/completions", CHATTING, ',"max_tokens":100'),
    ("claude", "chat/completions", CHATTING, ',"max_tokens":8192'),
    ("gpt-oss", "chat/completions", CHATTING, ',"max_tokens":8192'),
    ("gpt-5-mini", "chat/completions", CHATTING, ',"max_completion_tokens":8192'),
    ("o3", "chat/completions", CHATTING, ',"max_completion_tokens":8192'),
    ("open", "responses", '"input":"a"', ',"max_output_tokens":100'),
    ("plain", "responses", '"input":"a"', ',"max_output_tokens":100'),
    ("gpt-5-mini", "responses", '"input":"a"', ',"max_output_tokens":8192'),
    ("plain", "completions", '"max_completion_tokens":null,"prompt":"p"', ',"max_tokens":100'),
    ("plain", "completions", '"max_tokens":null,"max_completion_tokens":null,"prompt":"p"', ',"max_tokens":100'),
    ("open", "chat/completions", '"max_completion_tokens":null,' + CHATTING, ',"max_tokens":100'),
    ("old", "completions", '"max_completion_tokens":null,"prompt":["a","b"],"max_tokens":null', ""),
    ("window", "chat/completions", CHATTING, ',"max_tokens":35'),
    ("window", "responses", '"input":"a"', ',"max_output_tokens":39'),
    ("window", "chat/completions", CHATTING.replace("user", "u" * 200), ',"max_tokens":8192'),
]


@pytest.mark.parametrize(("model", "endpoint", "members", "told"), UNNAMED)
def test_what_was_reserved_is_told_where_the_caller_named_no_bound(
    model: str, endpoint: str, members: str, told: str
) -> None:
    """By the name that the backend knows, at the end; and no more than its window holds."""
    request = ask(f'{{"model":"{model}", {members} }}\n'.encode(), endpoint)
    again = bounded(request)
    if told:
        assert again.body == request.body[:-2] + told.encode() + b"}\n"
    assert json.loads(again.body) != json.loads(request.body)
    same = {"body": request.body, "untold": request.untold, "told": 0}
    assert msgspec.structs.replace(again, **same) == request
    assert bounded(again) is again


@pytest.mark.parametrize(
    ("model", "endpoint", "before", "after"),
    [
        ("plain", "completions", '"max_tokens": null,"prompt":"p"', '"max_tokens":100,"prompt":"p"'),
        ("open", "completions", '"prompt":"p", "max_tokens":null ', '"prompt":"p","max_tokens":100 '),
        ("plain", "chat/completions", f'{CHATTING},"max_tokens":null', f'{CHATTING},"max_tokens":100'),
        (
            "o3",
            "chat/completions",
            f'"max_completion_tokens":null,{CHATTING}',
            f'"max_completion_tokens":8192,{CHATTING}',
        ),
        ("open", "responses", '"max_output_tokens":null,"input":"a"', '"max_output_tokens":100,"input":"a"'),
        ("old", "completions", '"max_tokens":null,"prompt":["a","b"]', '"max_tokens":100,"prompt":["a","b"]'),
    ],
)
def test_a_bound_of_null_is_none_and_what_was_reserved_stands_in_its_place(
    model: str, endpoint: str, before: str, after: str
) -> None:
    upstream = STRICT.models[model].upstream_name
    again = bounded(ask(f'{{"model":"{model}",{before}}}'.encode(), endpoint))
    assert again.body == f'{{"model":"{upstream}",{after}}}'.encode()


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("completions", {"model": "plain", "prompt": "p", "max_tokens": 5}),
        ("completions", {"model": "plain", "prompt": "p", "max_tokens": 0}),
        ("completions", {"model": "plain", "prompt": "p", "max_completion_tokens": 5, "max_tokens": None}),
        ("completions", {"model": "old", "prompt": "p", "max_completion_tokens": 500}),
        ("chat/completions", {"model": "open", "messages": [{}], "max_completion_tokens": 5}),
        ("chat/completions", {"model": "window", "messages": [{}], "max_tokens": 10**6}),
        ("responses", {"model": "open", "input": "a", "max_output_tokens": 5}),
        ("messages", {"model": "claude", "messages": [{}], "max_tokens": 5}),
        ("embeddings", {"model": "plain", "input": "a"}),
        ("rerank", {"model": "plain", "query": "q", "documents": ["d"]}),
        ("images/generations", {"model": "plain", "prompt": "a"}),
    ],
)
def test_a_bound_that_the_caller_named_is_the_one(endpoint: str, body: dict[str, Any]) -> None:
    request = ask(body, endpoint)
    assert bounded(request) is request


def test_a_completion_of_openais_ends_by_itself_and_is_not_made_longer() -> None:
    request = ask({"model": "open", "prompt": "p"})
    assert bounded(request).body is request.body
    assert bounded(request).output_bound == 100


@pytest.mark.parametrize(
    ("asked", "instead_of_it", "told"),
    [("falls", "plain", 100), ("falls-low", "open", 50), ("falls-low", "falls", 50)],
)
@pytest.mark.parametrize("named", [{}, {"max_tokens": None}])
def test_a_model_that_stands_in_is_told_no_more_than_was_reserved_nor_than_it_gives(
    asked: str, instead_of_it: str, told: int, named: dict[str, None]
) -> None:
    request = ask({"model": asked, "messages": [{}], **named}, "chat/completions")
    other = STRICT.models[instead_of_it]
    again = instead(bounded(request), other)
    assert json.loads(again.body)["max_tokens"] == told
    assert (again.output_bound, again.untold) == (told, None)
    assert json.loads(instead(request, other).body).get("max_tokens") is None  # nobody was to be told


def test_a_model_that_stands_in_is_told_though_the_backends_of_the_first_need_not_be() -> None:
    request = bounded(ask({"model": "falls", "prompt": "p"}))
    assert "max_tokens" not in json.loads(request.body)
    assert json.loads(instead(request, STRICT.models["plain"]).body)["max_tokens"] == 100


def test_a_model_that_stands_in_gets_the_bound_that_the_caller_named() -> None:
    request = bounded(ask({"model": "falls", "prompt": "p", "max_tokens": 300}))
    assert json.loads(instead(request, STRICT.models["plain"]).body)["max_tokens"] == 300


@pytest.mark.parametrize(("room", "expected"), [(90, 90), (101, 100), (30, 30), (None, None)])
def test_a_request_that_is_fitted_stays_within_what_was_told(room: int | None, expected: int | None) -> None:
    """Without a bound a backend has room for less than was told: that is why it refused."""
    request = bounded(ask({"model": "open", "messages": [{}]}, "chat/completions"))
    again = fitted(request, room)
    assert json.loads(again.body).get("max_tokens") == expected
    assert (again.output_bound, bounded(again)) == (expected or 100, again)
    low = fitted(
        instead(bounded(ask({"model": "falls-low", "messages": [{}]}, "chat/completions")), STRICT.models["open"]), room
    )
    assert json.loads(low.body).get("max_tokens") == (None if room is None else min(room, 50))


def test_a_fitted_request_is_told_by_the_name_that_its_model_knows() -> None:
    again = fitted(ask({"model": "gpt-5-mini", "messages": [{}]}, "chat/completions"), 30)
    assert json.loads(again.body) == {"model": "gpt-5-mini", "messages": [{}], "max_completion_tokens": 30}


@given(bodies())
def test_any_body_that_is_told_its_bound_is_otherwise_the_same(drawn: tuple[str, dict[str, str]]) -> None:
    request = ask(drawn[0].encode(), policies=LENIENT)
    again = bounded(request)
    before, after = json.loads(request.body), json.loads(again.body)
    named = [name for name in ("max_tokens", "max_completion_tokens") if before.get(name) is not None]
    silent = request.model.api == "openai" and "max_tokens" not in before
    if named or silent:
        assert again.body is request.body
    else:
        assert after == {**before, "max_tokens": request.output_bound // request.answers}


# — what differs between the endpoints


def test_an_endpoint_without_aliases_passes_what_is_an_alias_elsewhere() -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2048}, "reasoning_effort": True, **ERROR}
    body = {"messages": [{"role": "user"}], "max_tokens": 9, "stream": True, **thinking, "metadata": {"user_id": "u"}}
    asked = ask({"model": "window", "user": "not this one", **body}, "messages")
    assert json.loads(asked.body) == {"model": "v", "user": "not this one", **body}
    assert (asked.user, asked.output_bound, asked.truncates) == ("u", 9, False)


def test_what_produces_no_tokens_reserves_none() -> None:
    assert ask({"model": "plain", "input": ["a", "b"]}, "embeddings").output_bound == 0


def test_every_image_of_every_prompt_is_counted() -> None:
    body = {"model": "plain", "prompt": ["a", "b"], "images": [["data:", "data:"], ["data:"]]}
    assert ask(body).input_estimate == 2 + 3 * 1600


def test_an_answer_without_a_model_gets_none() -> None:
    assert renamed(b'{"id":1}', "m") == b'{"id":1}'
    assert renamed(b'{"model":"v", "x": 1.50}', "m") == b'{"model":"m", "x": 1.50}'

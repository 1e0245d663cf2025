"""From the caller's bytes to the backend's: what is accepted arrives as the same JSON value after the T-rules, what is
refused never arrives.

The rules are written here a second time, from the documents and on plain Python values, as an oracle that shares no
code with the gateway. Bodies are random near the contract: good and bad values of known members, aliases in conflict,
nulls, members that nobody knows, odd numbers, escapes and white space. CONTRACT_BODIES says how many (100,000 take a
quarter of an hour).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.proving.backend import Backend, Peer, forever, ok
from tests.proving.house import documents, gateway

pytestmark = pytest.mark.anyio

BODIES = int(os.environ.get("CONTRACT_BODIES", "800"))
FAMILIES = Path(__file__).parents[2] / "policies" / "families.yaml"


# — the models that are asked, one for each way in which a backend may be spoken to


@dataclass(frozen=True)
class Facts:
    """What the policies say of a model."""

    api: str = "fireworks"
    profile: str = "2026"
    strict: bool = True
    usage: str = "native"
    upstream: str | None = None
    family: str | None = None
    window: int | None = None


FAMILY_RULES: dict[str, tuple[set[str] | None, set[str] | None]] = {
    "qwen3": ({"none", "low", "medium", "high", "integer", "boolean"}, None),
    "minimax-m2": ({"low", "medium", "high"}, {"disabled", "interleaved"}),
    "glm-4.7": (
        {"none", "low", "medium", "high", "integer", "boolean"},
        {"disabled", "interleaved", "preserved"},
    ),
    "gpt-oss": ({"low", "medium", "high", "boolean"}, None),
    "kimi-k2": (None, {"disabled", "interleaved", "preserved"}),
}
ODD_NAME = 'vendor/"né"\\m'
MODELS: dict[str, Facts] = {
    "plain": Facts(),
    "renamed": Facts(upstream=ODD_NAME),
    "lenient": Facts(strict=False, upstream="v"),
    "mid": Facts(profile="4.21.6", strict=False),
    "old": Facts(profile="2023"),
    "old-lenient": Facts(profile="2023", strict=False, upstream="v"),
    "open": Facts(api="openai"),
    "open/*": Facts(api="openai", upstream="up/*", strict=False),
    "inject": Facts(api="openai", usage="inject", upstream=ODD_NAME),
    "continuous": Facts(api="openai", usage="continuous", profile="4.21.6", strict=False),
    "window": Facts(api="openai", window=40, usage="inject", upstream="v"),
    "claude": Facts(api="anthropic", upstream="v"),
    **{f"fw-{family}": Facts(family=family) for family in FAMILY_RULES},
    **{f"oa-{family}": Facts(family=family, api="openai", upstream="v") for family in FAMILY_RULES},
}


def policies(url: str) -> dict[str, Any]:
    """A pool for each model, all of them with this one backend."""
    models: dict[str, Any] = {}
    pools: dict[str, Any] = {}
    for i, (name, facts) in enumerate(MODELS.items()):
        pools[f"p{i}"] = {"api": facts.api, "usage": facts.usage, "upstreams": [{"url": url}]}
        models[name] = {
            "pool": f"p{i}",
            "profile": facts.profile,
            "schema": "strict" if facts.strict else "lenient",
            **({} if "*" in name else {"aliases": [f"{name}-alias"]}),
            **{
                key: value
                for key, value in (
                    ("upstream_model", facts.upstream),
                    ("family", facts.family),
                    ("context_window", facts.window),
                )
                if value is not None
            },
        }
    return documents([url], models=models, pools=pools, **yaml.safe_load(FAMILIES.read_text()))


# — JSON as it is compared: numbers are their texts


@dataclass(frozen=True)
class Number:
    text: str

    def whole(self) -> bool:
        return re.fullmatch(r"-?\d+", self.text) is not None


class Twice(dict[str, Any]):
    """An object with a name that stands twice in it."""


class NoJson(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    kind = dict if len(dict(pairs)) == len(pairs) else Twice
    return kind(pairs)


def _constant(found: str) -> Any:
    raise NoJson(found)


def parsed(body: bytes) -> Any:
    """The value of a JSON text. Raises NoJson, also for halves of surrogate pairs."""
    try:
        value = json.loads(
            body.decode(), parse_int=Number, parse_float=Number, parse_constant=_constant, object_pairs_hook=_object
        )
        json.dumps(value, ensure_ascii=False, default=lambda number: number.text).encode()
    except (ValueError, RecursionError) as wrong:
        raise NoJson from wrong
    return value


# — the contract, from the documents: name → whether a value that is not null is right

Right = Callable[[Any], bool]


def boolean(value: Any) -> bool:
    return isinstance(value, bool)


def text(value: Any) -> bool:
    return isinstance(value, str)


def an_object(value: Any) -> bool:
    return isinstance(value, dict)


def an_array(value: Any) -> bool:
    return isinstance(value, list)


def filled(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def prose_or(kind: type) -> Right:
    return lambda value: isinstance(value, (str, kind))


def whole(low: int | None = None, high: int | None = None) -> Right:
    def right(value: Any) -> bool:
        if not isinstance(value, Number) or not value.whole():
            return False
        return (low is None or int(value.text) >= low) and (high is None or int(value.text) <= high)

    return right


def within(low: float | None = None, high: float | None = None) -> Right:
    def right(value: Any) -> bool:
        if not isinstance(value, Number) or abs(float(value.text)) == float("inf"):
            return False
        return (low is None or float(value.text) >= low) and (high is None or float(value.text) <= high)

    return right


def one_of(*words: str) -> Right:
    return lambda value: isinstance(value, str) and value in words


def either(*kinds: Right) -> Right:
    return lambda value: any(kind(value) for kind in kinds)


def array_of(kind: Right, least: int = 0, most: int | None = None) -> Right:
    def right(value: Any) -> bool:
        return (
            isinstance(value, list)
            and all(map(kind, value))
            and least <= len(value)
            and (most is None or len(value) <= most)
        )

    return right


def object_of(kind: Right) -> Right:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def members(known: Mapping[str, Right], *required: str, closed: bool = True, null: tuple[str, ...] = ()) -> Right:
    """An object with these members; those of `null` may be null, and so may be left out."""

    def right(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and all(name in value for name in required)
            and all(
                (name in null and item is None) or known[name](item) if name in known else not closed
                for name, item in value.items()
            )
        )

    return right


PROMPT = either(
    text, array_of(text, 1), array_of(whole(), 1), array_of(array_of(whole(), 1), 1)
)  # T29: not null, not empty, not mixed
SCHEMA = either(text, an_object)
STOP = either(text, array_of(text, most=4))  # T22
METADATA = object_of(text)  # T27
TYPED = members({"type": text}, "type", closed=False)


def response_format(*kinds: str, **more: Right) -> Right:
    known = {"type": one_of(*kinds), "schema": SCHEMA, **more}
    shaped = members(known, "type", null=("schema", *more))
    # T28
    return lambda value: shaped(value) and (value["type"] != "json_schema" or value.get("json_schema") is not None)


def predicted(*media: str, closed: bool = True) -> Right:  # T6 to T9
    def nothing(value: Any) -> bool:
        return False  # only text can be predicted

    part = members(
        {"type": one_of("text"), "text": text, **dict.fromkeys(media, nothing)},
        "type",
        "text",
        closed=closed,
        null=media,
    )
    content = either(text, array_of(part))
    return either(text, members({"type": one_of("content"), "content": content}, "content", closed=closed))


def thinking(value: Any) -> bool:  # T12 to T14
    if isinstance(value, dict) and value.get("type") == "enabled":
        return members({"type": text, "budget_tokens": whole(1024)}, null=("budget_tokens",))(value)
    return members({"type": one_of("disabled")}, "type")(value)


OLD: dict[str, Right] = {
    "model": text,
    "prompt": PROMPT,
    "images": array_of(text),
    "max_tokens": whole(0),  # T4
    "logprobs": whole(0, 5),
    "echo": boolean,
    "temperature": within(0, 2),  # T30
    "top_p": within(0, 1),
    "top_k": whole(),
    "frequency_penalty": within(-2, 2),
    "presence_penalty": within(-2, 2),
    "n": whole(1, 128),  # T23
    "stop": STOP,
    "response_format": response_format("text", "json_object"),
    "stream": boolean,
    "context_length_exceeded_behavior": one_of("error", "truncate"),
    "user": text,
}
NEW: dict[str, Right] = {
    **OLD,
    "prompt_cache_isolation_key": text,
    "raw_output": boolean,
    "perf_metrics_in_response": boolean,
    "max_completion_tokens": whole(0),
    "top_k": whole(0, 100),
    "min_p": within(0, 1),
    "typical_p": within(0, 1),
    "repetition_penalty": within(0, 2),
    "mirostat_target": within(),
    "mirostat_lr": within(),
    "seed": whole(),
    "logprobs": either(whole(0, 5), boolean),  # T25
    "top_logprobs": whole(0, 5),  # T24
    "echo_last": whole(),
    "ignore_eos": boolean,
    "response_format": response_format(
        "json_object", "json_schema", "grammar", "text", grammar=text, json_schema=SCHEMA
    ),
    "logit_bias": object_of(within(-100, 100)),
    "speculation": either(text, array_of(whole())),  # T11
    "prediction": predicted("image_url"),
    "metadata": METADATA,
    "reasoning_effort": either(one_of("none", "low", "medium", "high"), whole(1), boolean),  # T16 to T18
    "reasoning_history": one_of("disabled", "interleaved", "preserved"),
    "thinking": thinking,
    "return_token_ids": boolean,
    "images": either(array_of(text), array_of(array_of(text))),
}
NEWEST: dict[str, Right] = {
    **NEW,
    "prediction": predicted("image_url", "video_url"),
    "prompt_cache_key": text,
    "service_tier": text,
    "stream_options": members({"include_usage": boolean}, closed=False, null=("include_usage",)),
}
CHAT: dict[str, Right] = {
    **{name: right for name, right in NEWEST.items() if name not in ("prompt", "images")},
    "messages": filled,
    "tools": an_array,
    "top_k": whole(),
    "repetition_penalty": within(),
    "top_logprobs": whole(0, 20),
    "reasoning_effort": either(text, whole(1), boolean),
    "response_format": TYPED,
    "prediction": predicted("image_url", "video_url", closed=False),
}
OTHERS: dict[str, dict[str, Right]] = {
    "responses": {
        "model": text,
        "input": prose_or(list),
        "instructions": text,
        "max_output_tokens": whole(1),
        "stream": boolean,
        "temperature": within(0, 2),
        "top_p": within(0, 1),
        "tools": an_array,
        "user": text,
        "prompt_cache_key": text,
        "metadata": METADATA,
        "store": boolean,
        "background": boolean,
        "reasoning": an_object,
    },
    "messages": {
        "model": text,
        "messages": filled,
        "max_tokens": whole(0),  # 0: to fill the prompt cache
        "stream": boolean,
        "system": prose_or(list),
        "stop_sequences": array_of(text),
        "temperature": within(0, 1),
        "top_p": within(0, 1),
        "top_k": whole(0),
        "tools": an_array,
        "metadata": members({"user_id": text}, closed=False, null=("user_id",)),
        "thinking": TYPED,
    },
    "embeddings": {
        "model": text,
        "input": PROMPT,
        "encoding_format": one_of("float", "base64"),
        "dimensions": whole(1),
        "user": text,
    },
    "rerank": {"model": text, "query": text, "documents": filled, "top_n": whole(1), "return_documents": boolean},
    "images/generations": {"model": text, "prompt": text, "n": whole(1, 10), "user": text, "stream": boolean},
}
REQUIRED: dict[str, tuple[str, ...]] = {
    "completions": ("model", "prompt"),
    "chat/completions": ("model", "messages"),
    "responses": ("model",),
    "messages": ("model", "messages", "max_tokens"),
    "embeddings": ("model", "input"),
    "rerank": ("model", "query", "documents"),
    "images/generations": ("model", "prompt"),
}
BEHAVIOUR = "context_length_exceeded_behavior"
REWRITTEN = ("completions", "chat/completions")
PAIRS = [("max_completion_tokens", "max_tokens"), ("prediction", "speculation"), ("thinking", "reasoning_effort")]


def rows(endpoint: str, profile: str) -> dict[str, Right]:
    if endpoint == "completions":
        return {"2023": OLD, "4.21.6": NEW, "2026": NEWEST}[profile]
    return CHAT if endpoint == "chat/completions" else OTHERS[endpoint]


def not_null(endpoint: str, profile: str) -> set[str]:
    named = {*REQUIRED[endpoint], "ignore_eos", BEHAVIOUR}
    return named | {"n"} if endpoint == "completions" and profile != "2023" else named


# — the rules, on values


class Refused(Exception):
    def __init__(self, *statuses: int) -> None:
        self.statuses = statuses


def facts_of(name: str) -> tuple[Facts, str] | None:
    """What is known of the model of this name, and what its backends call it."""
    if name.startswith("open/") and re.fullmatch(r"[^\s|{}]{6,200}", name):
        return MODELS["open/*"], "up/" + name.removeprefix("open/")
    own = name.removesuffix("-alias")
    if own not in MODELS or "*" in own:
        return None
    return MODELS[own], MODELS[own].upstream or own


def reaches(endpoint: str, body: bytes, sizes: Mapping[str, int]) -> Any:
    """What a backend is to be asked. Raises Refused, with the statuses that may be answered.

    `sizes` are the bytes of the members as they are written, for what is estimated by them.
    """
    broken = 400 if endpoint == "messages" else 422
    try:
        given = parsed(body)
    except NoJson:
        raise Refused(400) from None
    if not isinstance(given, dict) or isinstance(given, Twice):  # T31
        raise Refused(400)
    asked = given.get("model")
    found = facts_of(asked) if isinstance(asked, str) else None
    facts, upstream = found or (Facts(), "")
    known = rows(endpoint, facts.profile)
    never_null = not_null(endpoint, facts.profile)
    if any(_is_twice(name, value) for name, value in given.items() if name in READ and name in known):
        raise Refused(400, broken)
    wrong = [name for name in REQUIRED[endpoint] if name not in given]
    wrong += [
        name
        for name, value in given.items()
        if name in known and (name in never_null if value is None else not known[name](value))
    ]
    if endpoint == "completions" and facts.strict:
        wrong += given.keys() - known  # T26
    if endpoint in REWRITTEN:
        wrong += [a for a, b in PAIRS if {a, b} <= set(known) and None not in (given.get(a), given.get(b))]
    if not wrong and endpoint == "completions" and given.get("images") is not None:
        wrong += [] if _marked(given["prompt"], given["images"]) else ["images"]
    if not wrong and endpoint in REWRITTEN and facts.family is not None:
        wrong += _family(facts.family, given)
    if wrong:
        raise Refused(broken)
    if found is None:
        raise Refused(404)
    sent = {**given, "model": upstream}
    return _rewritten(sent, known, facts, endpoint, sizes) if endpoint in REWRITTEN else sent


READ = ("prediction", "logit_bias", "metadata", "thinking", "stream_options", "response_format")


def _is_twice(name: str, value: Any) -> bool:
    """Whether a name stands twice in what is read of a value: an object, and the parts of a prediction."""
    parts = value.get("content") if name == "prediction" and isinstance(value, dict) else None
    return isinstance(value, Twice) or (isinstance(parts, list) and any(isinstance(part, Twice) for part in parts))


def _marked(prompt: Any, images: list[Any]) -> bool:
    """Whether the images are as many as the marks, where a prompt of text has any."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    nested = bool(images) and isinstance(images[0], list)
    numbers = [len(of_one) for of_one in images] if nested else [len(images)]
    if not isinstance(prompts[0], str) or not any(numbers):
        return True
    marks = [each.count("<image>") for each in prompts]
    if nested and len(numbers) != len(marks):
        return not any(marks)
    if not nested and len(marks) != 1:
        return True
    return all(not expected or found == expected for found, expected in zip(numbers, marks, strict=True))


def _effort(given: Mapping[str, Any]) -> Any:
    """What a body means as reasoning_effort: a boolean, a word, a number, or None."""
    thought = given.get("thinking")
    if thought is None:
        return given.get("reasoning_effort")
    return "none" if thought["type"] == "disabled" else thought.get("budget_tokens") or True


def _word(effort: Any) -> Any:
    return effort if not isinstance(effort, bool) else "medium" if effort else "none"  # T16


def _family(family: str, given: Mapping[str, Any]) -> list[str]:
    efforts, histories = FAMILY_RULES[family]
    wrong = []
    effort = _effort(given)
    if effort is not None and efforts is not None:
        kind = "integer" if isinstance(_word(effort), Number) else _word(effort)
        if kind not in efforts or (isinstance(effort, bool) and "boolean" not in efforts):  # T20, T21
            wrong.append("reasoning_effort")
    history = given.get("reasoning_history")
    if history is not None and histories is not None and history not in histories:
        wrong.append("reasoning_history")
    return wrong


def _rewritten(
    sent: dict[str, Any], known: Mapping[str, Right], facts: Facts, endpoint: str, sizes: Mapping[str, int]
) -> dict[str, Any]:
    given = dict(sent)
    for alias, name in {"fireworks": PAIRS, "openai": PAIRS[2:], "anthropic": []}[facts.api]:
        if alias in given and alias in known:
            _stand_in(sent, alias, name)
    if "reasoning_effort" in known and "reasoning_effort" in sent:
        sent["reasoning_effort"] = _word(sent["reasoning_effort"])
    if facts.api == "openai":
        sent.pop(BEHAVIOUR, None)
        _fit(sent, given, facts, endpoint, sizes)
    if given.get("stream") is True and facts.usage != "native":
        options = given.get("stream_options") or {}
        if isinstance(options, dict):
            more = ["include_usage"] if facts.usage == "inject" else ["include_usage", "continuous_usage_stats"]
            sent["stream_options"] = {**options, **dict.fromkeys(more, True)}
    return sent


def _stand_in(sent: dict[str, Any], alias: str, name: str) -> None:
    """Put what an alias means in the place of its name."""
    effort = _word(_effort(sent))
    value = sent.pop(alias)
    if sent.get(name) is None:  # T3
        sent.pop(name, None)
    if value is not None:
        sent[name] = effort if alias == "thinking" else _predicted(value) if alias == "prediction" else value


def _predicted(value: Any) -> str:
    content = value if isinstance(value, str) else value["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)  # T8


def _fit(sent: dict[str, Any], given: Mapping[str, Any], facts: Facts, endpoint: str, sizes: Mapping[str, int]) -> None:
    """Lower max_tokens to what the window holds beside one prompt."""
    name = next((name for name in ("max_tokens", "max_completion_tokens") if given.get(name) is not None), None)
    if facts.window is None or name is None:
        return
    tokens = _tokens(given, endpoint, sizes)
    room = None if tokens is None else facts.window - tokens
    if room is None or int(given[name].text) <= room:
        return
    if given.get(BEHAVIOUR) != "error":
        if room >= 1:
            sent[name] = Number(str(room))
    elif endpoint == "completions" and not _is_text(given["prompt"]):
        raise Refused(400)


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or isinstance(prompt[0], str)


def _tokens(given: Mapping[str, Any], endpoint: str, sizes: Mapping[str, int]) -> int | None:
    """The tokens of a single prompt: counted, or a quarter of its bytes and 1600 an image; None for several."""
    if endpoint == "chat/completions":
        return -(-sum(sizes[name] for name in ("messages", "tools") if given.get(name) is not None) // 4) or 1
    prompt, images = given["prompt"], (given.get("images") or [])
    shown = 1600 * sum(len(image) if isinstance(image, list) else 1 for image in images)
    if isinstance(prompt, str):
        return (-(-(sizes["prompt"] - 2) // 4) or 1) + shown
    if isinstance(prompt[0], Number):
        return len(prompt) + shown
    if len(prompt) > 1:
        return None
    return None if isinstance(prompt[0], str) else len(prompt[0]) + shown


# — bodies, as their texts

BLANKS = st.sampled_from(["", "", "", " ", "\n\t ", "\r\n"])
STRINGS = st.one_of(
    st.sampled_from([
        '""', '"a"', '"é😀"', r'"\ud83d\ude00\u00e9"', r'"a\"b\\"', r'"\u003cimage\u003e"', '"<image>"',
        '"<image> <image>"', r'"\/"', '"],}{[\\""', '"none"', '"high"', '"interleaved"', '"truncate"', '"float"',
        '"data:image/png;base64,AA=="',
    ]),
    st.text(max_size=8).map(lambda s: json.dumps(s, ensure_ascii=False)),
    st.text(max_size=8).map(json.dumps),
)  # fmt: skip
NUMBERS = st.sampled_from([
    "0", "-0", "1", "2", "5", "6", "40", "128", "129", "1023", "1024", "-1", "-2", "0.5", "1.0", "2.0", "2.0001",
    "1e-7", "1E2", "1e400", "9007199254740993", "12345678901234567890123", "-100", "100", "100.5", "0.1000", "1" * 400,
])  # fmt: skip
LEAVES = st.one_of(STRINGS, NUMBERS, st.sampled_from(["true", "false", "null", "null"]))


def _joined(inside: list[str], brackets: str = "[]", blank: str = "") -> str:
    return brackets[0] + blank + f"{blank},{blank}".join(inside) + blank + brackets[1]


def arrays(items: st.SearchStrategy[str], most: int = 6) -> st.SearchStrategy[str]:
    return st.builds(_joined, st.lists(items, max_size=most), st.just("[]"), BLANKS)


def objects(names: st.SearchStrategy[str], values: st.SearchStrategy[str], most: int = 3) -> st.SearchStrategy[str]:
    pairs = st.lists(st.tuples(names, values), max_size=most, unique_by=lambda pair: pair[0])
    # Now and then a name stands twice.
    twice = st.tuples(pairs, st.integers(0, 30)).map(lambda t: t[0] + t[0][:1] if t[1] == 0 else t[0])
    return st.builds(
        lambda found, blank: _joined([f"{json.dumps(n)}{blank}:{v}" for n, v in found], "{}", blank), twice, BLANKS
    )


ANY = st.recursive(LEAVES, lambda inner: st.one_of(arrays(inner, 3), objects(st.text(max_size=3), inner)), max_leaves=5)
TOKENS = arrays(st.sampled_from(["1", "2", "-3", "12345678901234567890"]))


def likely(**known: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """An object that mostly has these members, and sometimes others or none of them."""
    right = st.fixed_dictionaries({}, optional=known).map(
        lambda found: _joined([f'"{name}":{value}' for name, value in found.items()], "{}")
    )
    return st.one_of(right, right, right, ANY)


def words(*of: str) -> st.SearchStrategy[str]:
    return st.sampled_from([json.dumps(word) for word in of])


PARTS = arrays(
    st.one_of(
        st.builds(lambda s: f'{{"type":"text","text":{s}}}', STRINGS),
        likely(type=words("text", "image_url"), text=STRINGS, image_url=LEAVES, video_url=st.just("null")),
    ),
    3,
)
SOUND = st.sampled_from(
    ["true", "false", "0", "1", "2", "5", "0.5", '"a"', "[]", '["a","b"]', '{"a":"b"}', "null", "1e-7"]
)
NEAR: dict[str, st.SearchStrategy[str]] = {
    "prompt": st.one_of(STRINGS, TOKENS, arrays(TOKENS, 3), arrays(STRINGS, 3), ANY),
    "input": st.one_of(STRINGS, TOKENS, arrays(TOKENS, 3), arrays(STRINGS, 3), ANY),
    "messages": st.one_of(arrays(likely(role=words("user"), content=STRINGS), 3), ANY),
    "documents": arrays(STRINGS, 3),
    "query": STRINGS,
    "max_tokens": st.one_of(NUMBERS, st.sampled_from(["7", "38", "39", "null"])),
    "max_completion_tokens": st.one_of(NUMBERS, st.sampled_from(["7", "38", "39", "null"])),
    "max_output_tokens": NUMBERS,
    "images": st.one_of(arrays(STRINGS, 3), arrays(arrays(STRINGS, 2), 3), ANY),
    "prediction": st.one_of(STRINGS, likely(type=words("content"), content=st.one_of(STRINGS, PARTS, PARTS)), ANY),
    "speculation": st.one_of(st.just("null"), STRINGS, TOKENS, ANY),
    "thinking": st.one_of(
        st.sampled_from(['{"type":"enabled"}', '{"type":"disabled"}', "null"]),
        likely(type=words("enabled", "disabled"), budget_tokens=st.sampled_from(["1024", "1023", "null", "5000"])),
    ),
    "reasoning_effort": st.one_of(st.sampled_from(["true", "false", "1", "null"]), words("low", "none", "xhigh"), ANY),
    "reasoning_history": words("disabled", "interleaved", "preserved", "other"),
    "response_format": likely(
        type=words("json_object", "json_schema", "text", "grammar"), schema=ANY, json_schema=ANY, grammar=STRINGS
    ),
    "stream": st.sampled_from(["true", "true", "true", "false", "null", "1"]),
    "stream_options": likely(include_usage=st.sampled_from(["true", "false", "null", "1"]), x=ANY, y=NUMBERS),
    "stop": st.one_of(STRINGS, arrays(STRINGS)),
    "logit_bias": st.one_of(objects(st.text(max_size=3), NUMBERS), ANY),
    "metadata": st.one_of(objects(st.text(max_size=3), STRINGS), ANY),
    BEHAVIOUR: words("truncate", "error", "other"),
    "n": NUMBERS,
}
ALL_NAMES = sorted({*NEWEST, *CHAT, *(name for table in OTHERS.values() for name in table)} - {"model"})
STRANGE = ["unheard_of", "promptCacheKey", "Model", "", "é", "best_of_", 'a"b', "\\"]
OFTEN = ["stream", "stream_options", "thinking", "reasoning_effort", "max_tokens", "max_completion_tokens", BEHAVIOUR,
         "prediction", "speculation"]  # fmt: skip
NAMES = [*MODELS, *(f"{name}-alias" for name in MODELS if "*" not in name), "open/a", "open/b/c", "open/", "nobody", ""]
SANE: dict[str, st.SearchStrategy[str]] = {
    "prompt": st.one_of(STRINGS, TOKENS.filter(lambda t: any(map(str.isdigit, t)))),
    "messages": st.sampled_from(['[{"role":"user","content":"hello"}]', '[ {"role":"user"} ,1]']),
    "max_tokens": st.sampled_from(["0", "9"]),
    "query": STRINGS,
    "documents": st.just('["a", {"text":"b"}]'),
    "input": st.one_of(STRINGS, st.just("[1,2]")),
}


@dataclass(frozen=True)
class Body:
    endpoint: str
    text: bytes
    sizes: Mapping[str, int]


@st.composite
def bodies(draw: st.DrawFn) -> Body:
    endpoint = draw(st.sampled_from([*REQUIRED, "completions", "completions", "chat/completions"]))
    own = [*rows(endpoint, "2026")]
    chosen = draw(
        st.lists(
            st.one_of(
                st.sampled_from(own), st.sampled_from(OFTEN), st.sampled_from(OFTEN), st.sampled_from(own + STRANGE),
                st.sampled_from(ALL_NAMES)
            ),
            max_size=7,
            unique=True,
        )
    )  # fmt: skip
    sane = draw(st.integers(0, 9)) < 9  # or what is required may be wrong or missing, too
    given: dict[str, str] = {}
    for name in [*REQUIRED[endpoint], *chosen]:
        if sane and name in REQUIRED[endpoint]:
            model = st.sampled_from(NAMES[:-3] if draw(st.integers(0, 19)) else NAMES).map(json.dumps)
            given[name] = draw(model if name == "model" else SANE[name])
        elif sane or draw(st.booleans()):
            given[name] = draw(st.one_of(NEAR.get(name, SOUND), SOUND, ANY) if not sane else NEAR.get(name, SOUND))
    order = draw(st.permutations([*given]))
    if draw(st.integers(0, 39)) == 0 and order:
        order = [*order, order[0]]  # a name twice
    blank, after = draw(BLANKS), draw(BLANKS)
    escaped = draw(st.integers(0, 9)) == 0
    written = [f"{_name(name, escaped)}{blank}:{after}{given[name]}" for name in order]
    whole = after + _joined(written, "{}", blank) + after
    if draw(st.integers(0, 39)) == 0:
        at = draw(st.integers(0, len(whole)))
        whole = (
            whole[:at] + draw(st.sampled_from(["", ",", "}", "NaN", '"', "\\", "\x00", "{}", r'"\ud800"'])) + whole[at:]
        )
    return Body(endpoint, whole.encode(), {name: len(value.encode()) for name, value in given.items()})


def _name(name: str, escaped: bool) -> str:
    return '"' + "".join(f"\\u{ord(letter):04x}" for letter in name) + '"' if escaped else json.dumps(name)


# — the proof


def ask(port: int, key: str, body: Body) -> int:
    """The status of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", f"/v1/{body.endpoint}", body.text, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def told(body: Body) -> Any:
    """What reaches a backend, or the refusal."""
    try:
        return reaches(body.endpoint, body.text, body.sizes)
    except Refused as refused:
        return refused


async def test_what_is_accepted_reaches_the_backend_as_the_same_value_and_what_is_refused_never_does(
    store_url: str,
) -> None:
    async with Backend(forever(Peer.request, ok(b"{}"))) as backend, gateway(store_url, policies(backend.url)) as house:
        port, key = int(house.url.rpartition(":")[2]), await house.key()

        @settings(max_examples=BODIES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(bodies())
        def proof(body: Body) -> None:
            before = len(backend.requests)
            status = ask(port, key, body)
            came = backend.requests[before:]
            expected = told(body)
            if isinstance(expected, Refused):
                event(f"refused: {expected.statuses}")
                assert (status in expected.statuses, came) == (True, []), (status, expected.statuses, body.text)
                return
            event(f"accepted: {body.endpoint}")
            assert (status, len(came)) == (200, 1), body.text
            assert parsed(came[0].body) == expected, (body.text, came[0].body)
            if expected == parsed(body.text):
                assert came[0].body == body.text  # T31

        await asyncio.to_thread(proof)


async def test_a_model_that_cannot_hold_a_request_does_not_stand_in_for_another(store_url: str) -> None:
    """Its refusal says nothing of the model that was asked: what that one failed of is told."""
    async with Backend(Peer.request, Peer.close) as away, Backend(forever(Peer.request, ok(b"{}"))) as other:
        pools = {
            "away": {"upstreams": [{"url": away.url}], "retries": {"attempts": 1}},
            "small": {"api": "openai", "upstreams": [{"url": other.url}]},
        }
        models = {"asked": {"pool": "away", "fallback": "small"}, "small": {"pool": "small", "context_window": 4}}
        request = {"model": "asked", "prompt": [1, 2, 3], "max_tokens": 9, BEHAVIOUR: "error"}
        async with gateway(store_url, documents([], models=models, pools=pools)) as house:
            async with house.client(await house.key()) as client:
                answer = await client.post("/v1/completions", json=request)
    assert (answer.status_code, answer.json()["error"]["code"], other.requests) == (502, "upstream_disconnected", [])

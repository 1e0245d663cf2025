"""The most that a request can take, and what it takes by estimate: text by its bytes, images, prompts and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import contract
from gateway.bounds import IMAGE_TOKENS, MAX_BOUND, Input, Output, input_of, output_of
from gateway.endpoints import ENDPOINTS

MESSAGE = {"role": "user", "content": "hi"}
DATA = "data:image/png;base64," + "iVBORw0K" * 500
LETTERS = "helloworld" * 600


def sized(endpoint: str, **members: Any) -> Input:
    """The input of a request."""
    given = contract.take_apart(json.dumps({"model": "m", **members}).encode())
    values, problems = contract.check(endpoint, given, profile="2026", strict=False)
    assert problems == []
    return input_of(given, values)


def written(*values: Any) -> int:
    return sum(len(json.dumps(value)) for value in values)


# — text and tokens


@pytest.mark.parametrize(
    ("prompt", "estimate", "bound"),
    [
        ("", 1, 9),
        ("abcd", 1, 12),
        ("abcde", 2, 13),
        (["abcd", "efgh"], 2, 24),
        (["", "", ""], 3, 27),
        ([1, 2, 3], 3, 3),
        ([[1, 2], [3]], 3, 3),
    ],
)
def test_text_has_a_token_for_each_byte_at_most_and_tokens_are_counted(prompt: Any, estimate: int, bound: int) -> None:
    """Of each text one at least, and eight more for what begins and ends it."""
    found = sized("completions", prompt=prompt)
    assert (found.at(4.0), found.bound) == (estimate, bound)
    assert sized("embeddings", input=prompt) == found


def test_what_a_template_is_given_and_what_follows_a_gap_is_read_too() -> None:
    """As members that the contract does not know: Llama 3.1's template writes its date_string into every prompt."""
    for name in ("chat_template", "chat_template_kwargs"):
        value = {"date_string": LETTERS}
        assert sized("chat/completions", messages=[MESSAGE], **{name: value}).size == written([MESSAGE], value)
    assert sized("completions", prompt=["ab", "cd"], suffix=LETTERS).bound >= 2 * (2 + len(LETTERS))
    assert sized("completions", prompt=[1, 2, 3], suffix=LETTERS).bound >= 3 + len(LETTERS)


@pytest.mark.parametrize(("bytes_per_token", "expected"), [(0.5, 20), (3.0, 4), (4.0, 3), (16.0, 1)])
def test_an_estimate_is_of_so_many_bytes_a_token_rounded_up(bytes_per_token: float, expected: int) -> None:
    assert sized("completions", prompt="ten bytes!").at(bytes_per_token) == expected
    assert sized("completions", prompt=[1, 2]).at(bytes_per_token) == 2


@given(st.text(), st.sampled_from([True, False]))
def test_the_bound_is_never_below_the_bytes_of_the_text(text: str, ascii_only: bool) -> None:
    """However it is written: an escape has more bytes than what it stands for."""
    messages = [{"role": "user", "content": text}]
    raw = json.dumps({"model": "m", "messages": messages, "prompt": text}, ensure_ascii=ascii_only)
    given = contract.take_apart(raw.encode("utf-8", "replace"))
    for endpoint in ("completions", "chat/completions"):
        values, _ = contract.check(endpoint, given, profile="2026", strict=False)
        found = input_of(given, values)
        assert found.bound >= len(text.encode("utf-8", "replace")) + 8
        assert found.at(0.5) >= found.at(4.0) >= 1


def test_a_conversation_is_all_that_its_model_reads_and_its_template() -> None:
    tools, schema = [{"type": "function", "function": {"name": "f"}}], {"type": "json_object"}
    plain = sized("chat/completions", messages=[MESSAGE], user="u", metadata={"a": "b" * 999}, stop=["c"])
    assert plain == Input(1, written([MESSAGE]), margin=64)
    full = sized("chat/completions", messages=[MESSAGE], tools=tools, response_format=schema, documents=["d"])
    assert full == Input(1, written([MESSAGE], tools, schema, ["d"]), margin=64 + 512)
    assert sized("chat/completions", messages=[MESSAGE], functions=tools).margin == 64 + 512
    assert sized("chat/completions", messages=[MESSAGE], tools=[]).margin == 64
    assert sized("chat/completions", messages=[MESSAGE], tools=None) == plain


@pytest.mark.parametrize(
    ("endpoint", "members", "read"),
    [
        ("responses", {"input": "a" * 50, "instructions": "b" * 30}, ("a" * 50, "b" * 30)),
        ("responses", {"input": [MESSAGE], "text": {"verbosity": "low"}}, ([MESSAGE], {"verbosity": "low"})),
        ("messages", {"messages": [MESSAGE], "system": "be brief", "max_tokens": 9}, ([MESSAGE], "be brief")),
        ("images/generations", {"prompt": "a cat"}, ("a cat",)),
    ],
)
def test_each_endpoint_has_its_texts(endpoint: str, members: dict[str, Any], read: tuple[Any, ...]) -> None:
    assert sized(endpoint, **members) == Input(1, written(*read), margin=64)


def test_a_query_is_read_beside_every_document() -> None:
    documents = ["one", {"text": "two, and a half"}, ""]
    found = sized("rerank", query="which?", documents=documents)
    assert found == Input(3, written(*documents) + 3 * written("which?"), margin=24)


# — images


def image(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat/completions", {"messages": image(DATA)}),
    "chat, a small one": ("chat/completions", {"messages": image(DATA[:40])}),
    "chat, by its address": ("chat/completions", {"messages": image("https://example.com/cat.png")}),
    "responses": ("responses", {"input": [{"type": "input_image", "image_url": DATA}]}),
    "responses, by its address": ("responses", {"input": [{"type": "input_image", "image_url": "http://a/b"}]}),
    "responses, by its id": ("responses", {"input": [{"type": "input_image", "file_id": "file-6F2k"}]}),
    "responses, a file": ("responses", {"input": [{"type": "input_file", "file_data": DATA}]}),
    "messages": ("messages", {"messages": [{"source": {"type": "base64", "data": DATA[22:]}}], "max_tokens": 9}),
    "messages, by its address": ("messages", {"messages": [{"source": {"url": "https://a/b"}}], "max_tokens": 9}),
    "messages, by its id": ("messages", {"messages": [{"source": {"file_id": "file_011C"}}], "max_tokens": 9}),
    "a sound": ("chat/completions", {"messages": [{"input_audio": {"data": DATA[22:], "format": "wav"}}]}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_an_image_counts_as_one_wherever_it_is(name: str) -> None:
    """Its bytes are no text; where they are elsewhere, it is an image all the same."""
    found = sized(SOURCES[name][0], **SOURCES[name][1])
    assert found.images == 1
    assert found.size < 200
    assert found.at(4.0) < 50 + IMAGE_TOKENS
    assert found.bound < 264 + IMAGE_TOKENS


@pytest.mark.parametrize(
    "members",
    [
        {"messages": [{"role": "user", "content": DATA}]},
        {"messages": [{"role": "user", "content": LETTERS}]},
        {"messages": [{"role": "user", "content": json.dumps(image(DATA))}]},
        {"messages": [{"role": "user", "content": "https://example.com/cat.png"}]},
        {"messages": image("data:image/png;base64," + "hello world " * 500)},
        {"messages": image("data:image/png;base64," + "日本語" * 900)},
        {"messages": [{"input": {"data": "hello, world " * 500}}]},
        {"messages": [MESSAGE], "tools": [{"url": DATA}, {"source": {"data": LETTERS}}, {"url": "https://a"}]},
    ],
)
def test_prose_is_prose_whatever_it_looks_like(members: dict[str, Any]) -> None:
    """A limit that must not be overshot cannot go by what a caller calls an image."""
    found = sized("chat/completions", **members)
    assert found.size == written(*members.values())
    assert found.at(4.0) >= found.size / 4


def test_an_image_is_one_though_its_encoder_escapes_slashes() -> None:
    messages = json.dumps(image("data:image/png;base64," + "a/b+" * 600)).replace("/", r"\/")
    given = contract.take_apart(b'{"model":"m","messages":%b}' % messages.encode())
    assert input_of(given, contract.check("chat/completions", given, profile="2026", strict=True)[0]).images == 1


@given(st.text(alphabet='":{}\\ urldatfiehps/;,b64A', max_size=300))
def test_no_string_of_a_message_becomes_an_image(text: str) -> None:
    found = sized("chat/completions", messages=[{"role": "user", "content": text}])
    assert (found.images, found.size) == (0, written([{"role": "user", "content": text}]))


def test_images_beside_a_prompt_are_counted_for_each_prompt() -> None:
    found = sized("completions", prompt=["a", "b"], images=[["data:", "data:"], ["data:"]])
    assert (found.at(4.0), found.bound) == (2 + 3 * IMAGE_TOKENS, 2 + 16 + 3 * IMAGE_TOKENS)


# — answers


@pytest.mark.parametrize(
    ("endpoint", "members", "prompts", "expected"),
    [
        ("completions", {"prompt": "p"}, 1, Output(1, None)),
        ("completions", {"prompt": "p", "max_tokens": 7, "n": 3}, 2, Output(6, 7)),
        ("completions", {"prompt": "p", "max_tokens": 0}, 1, Output(1, 0)),
        ("completions", {"prompt": "p", "best_of": 5}, 2, Output(10, None)),
        ("chat/completions", {"messages": [1], "n": None}, 1, Output(1, None)),
        ("chat/completions", {"messages": [1], "max_completion_tokens": 5}, 1, Output(1, 5)),
        ("responses", {"max_output_tokens": 5}, 1, Output(1, 5)),
        ("embeddings", {"input": "a"}, 1, Output(0, 0)),
        ("images/generations", {"prompt": "a", "n": 4}, 1, Output(0, 0)),
    ],
)
def test_answers_are_those_of_all_prompts_and_choices(
    endpoint: str, members: dict[str, Any], prompts: int, expected: Output
) -> None:
    given = contract.take_apart(json.dumps({"model": "m", **members}).encode())
    values, _ = contract.check(endpoint, given, profile="2026", strict=False)
    named = next((values[name] for name in values if name.startswith("max_")), None)
    assert output_of(ENDPOINTS[endpoint], values, given, prompts, named) == expected


def test_the_bound_of_all_answers_is_that_of_each_and_no_more_than_a_limit_counts() -> None:
    assert Output(6, 7).bound(100) == 42
    assert Output(6, 0).bound(100) == 0
    assert Output(6, None).bound(100) == 600
    assert Output(2, 10**30).bound(100) == MAX_BOUND

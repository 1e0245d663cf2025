"""What backends say of a context that is exceeded, and what can be read from it.

The texts are the backends' own (the numbers of those from a source are made up); where each was seen stands beside it.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.context import _TEXTS, UNSAID, room


class Said(NamedTuple):
    source: str
    room: int | None
    text: str


# What is said, how much room that leaves, and where the text is from.
SAID = (
    Said(
        "FastChat, lm-sys/FastChat#2432",
        1465,
        "This model's maximum context length is 2048 tokens. However, you requested 3583 tokens (583 in the "
        "messages, 3000 in the completion). Please reduce the length of the messages or completion.",
    ),
    Said(
        "vLLM 0.9, vllm-project/vllm#20409",
        6793,
        "This model's maximum context length is 16384 tokens. However, you requested 19591 tokens (9591 in the "
        "messages, 10000 in the completion). Please reduce the length of the messages or completion. None",
    ),
    Said(
        "vLLM 0.9 and a prompt that does not fit, vllm-project/vllm#20409",
        0,
        "This model's maximum context length is 16384 tokens. However, you requested 122946 tokens (112946 in the "
        "messages, 10000 in the completion). Please reduce the length of the messages or completion.",
    ),
    Said(
        "DeepSeek, evalstate/fast-agent#621",
        8130,
        "This model's maximum context length is 131072 tokens. However, you requested 131134 tokens (122942 in "
        "the messages, 8192 in the completion). Please reduce the length of the messages or completion.",
    ),
    Said(
        "OpenAI's completions, run-llama/llama_index#948",
        237,
        "This model's maximum context length is 4097 tokens, however you requested 4116 tokens (3860 in your "
        "prompt; 256 for  the completion). Please reduce your prompt; or completion length.",
    ),
    Said(
        "OpenAI's completions in 2022, stanford-crfm/helm#94",
        0,
        "This model's maximum context length is 2049 tokens, however you requested 2054 tokens (2049 in your "
        "prompt, 5 for the completion). Please reduce your prompt or completion length.",
    ),
    Said(
        "OpenAI with functions",
        453,
        "This model's maximum context length is 4097 tokens. However, you requested 4372 tokens (3372 in the "
        "messages, 272 in the functions, and 728 in the completion). Please reduce the length of the messages, "
        "functions, or completion.",
    ),
    Said(
        "OpenAI's chat, dimagi/open-chat-studio#463",
        0,
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 8202 tokens. "
        "Please reduce the length of the messages.",
    ),
    Said(
        "vLLM 0.10, stepfun-ai/Step-Audio-R1#3",
        8136,
        "'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum context length is "
        "32768 tokens and your request has 24632 input tokens (32000 > 32768 - 24632).",
    ),
    Said(
        "vLLM 0.10 and a prompt that does not fit, vllm-project/vllm serving_engine.py",
        0,
        "This model's maximum context length is 32768 tokens. However, your request has 40000 input tokens. "
        "Please reduce the length of the input messages.",
    ),
    Said(
        "vLLM 0.6, vllm-project/vllm serving_engine.py at 685c99ee",
        0,
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens in the messages, "
        "Please reduce the length of the messages.",
    ),
    Said(
        "vLLM 0.9's engine, Gabesarch/grounded-rl#16",
        0,
        "The decoder prompt (length 10127) is longer than the maximum model length of 8192. Make sure that "
        "`max_model_len` is no smaller than the number of text tokens plus multimodal tokens.",
    ),
    Said(
        "vLLM since 2026 and a prompt in tokens, vllm-project/vllm renderers/params.py",
        100,
        "You passed 900 input tokens and requested 200 output tokens. However, the model's context length is only "
        "1000 tokens, resulting in a maximum input length of 800 tokens. Please reduce the length of the input "
        "prompt.",
    ),
    Said(
        "vLLM since 2026 stops counting at the first token too many, vllm-project/vllm renderers/params.py",
        UNSAID,
        "You passed 801 input tokens and requested 200 output tokens. However, the model's context length is only "
        "1000 tokens, resulting in a maximum input length of 800 tokens. Please reduce the length of the input "
        "prompt.",
    ),
    Said(
        "vLLM says in a later version that it stopped",
        UNSAID,
        "This model's maximum context length is 65536 tokens. However, you requested 16384 output tokens and your "
        "prompt contains at least 49153 input tokens, for a total of at least 65537 tokens. Please reduce the "
        "length of the input prompt or the number of requested output tokens. (parameter=input_tokens, "
        "value=49153)",
    ),
    Said(
        "vLLM in a later version, and a prompt that does not fit",
        0,
        "This model's maximum context length is 4096 tokens. However, you requested 0 output tokens and your "
        "prompt contains at least 4097 input tokens, for a total of at least 4097 tokens.",
    ),
    Said(
        "vLLM in a later version, and a prompt in tokens",
        596,
        "This model's maximum context length is 4096 tokens. However, you requested 1000 output tokens and your "
        "prompt contains 3500 input tokens, for a total of 4500 tokens.",
    ),
    Said(
        "vLLM in a later version counts letters",
        UNSAID,
        "This model's maximum context length is 4096 tokens. However, you requested 4096 output tokens and your "
        "prompt contains 581 characters (more than 0 characters, which is the upper bound for 0 input tokens).",
    ),
    Said(
        "SGLang, sgl-project/sglang tokenizer_manager.py",
        14803,  # and not 14804: it refuses a sum that is the window
        "Requested token count exceeds the model's maximum context length of 16384 tokens. You requested a total "
        "of 17964 tokens: 1580 tokens from the input messages and 16384 tokens for the completion. Please reduce "
        "the number of tokens in the input messages or the completion to fit within the limit.",
    ),
    Said(
        "iFlow, which has SGLang's with points",
        131059,
        "Bad request!: Requested token count exceeds the model's maximum context length of 131072 tokens. You "
        "requested a total of 524300.0 tokens: 12 tokens from the input messages and 524288.0 tokens for the "
        "completion.",
    ),
    Said(
        "SGLang and a prompt that does not fit, QwenLM/Qwen3#1321",
        0,
        "The input (61709 tokens) is longer than the model's context length (40960 tokens).",
    ),
    Said(
        "SGLang's scheduler, sgl-project/sglang#4048",
        0,
        "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens).",
    ),
    Said(
        "vLLM's engine in 2026",
        0,
        "Input length (196905) exceeds model's maximum context length (196608).",
    ),
    Said(
        "Fireworks, fw-ai/cookbook#134",
        0,
        "The prompt is too long: 40177, model maximum context length: 32767",
    ),
    Said(
        "TGI, huggingface/llm-vscode#94",
        0,
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 3474 `inputs` tokens "
        "and 60 `max_new_tokens`",
    ),
    Said(
        "TGI and a prompt that fits, huggingface/chat-ui#340",
        512,
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 1512. Given: 1000 `inputs` tokens "
        "and 1024 `max_new_tokens`",
    ),
    Said(
        "TGI's input alone, huggingface/text-generation-inference#937",
        0,
        "Input validation error: `inputs` must have less than 1024 tokens. Given: 1872",
    ),
    Said(
        "llama.cpp since b7498, ggml-org/llama.cpp server-context.cpp",
        0,
        "request (14429 tokens) exceeds the available context size (8192 tokens), try increasing it",
    ),
    Said(
        "llama-cpp-python, fedora-copr/logdetective#100",
        0,
        "Requested tokens (2138) exceed context window of 2048",
    ),
    Said(
        "OpenRouter, Aider-AI/aider#3721",
        120537,
        "This endpoint's maximum context length is 131072 tokens. However, you requested about 141607 tokens "
        "(10535 of text input, 131072 in the output). Please reduce the length of either one, or use the "
        '"middle-out" transform.',
    ),
    Said(
        "OpenRouter with tools, boldsoftware/shelley#159",
        119368,
        "This endpoint's maximum context length is 204800 tokens. However, you requested about 205432 tokens "
        "(81684 of text input, 3748 of tool input, 120000 in the output). Please reduce the length of either one",
    ),
    Said(
        "OpenRouter and a prompt that does not fit, topoteretes/cognee#1061",
        0,
        "This endpoint's maximum context length is 16384 tokens. However, you requested about 94307 tokens (94307 "
        "of text input). Please reduce the length of either one",
    ),
    Said(
        "Mistral, by way of Bedrock",
        0,
        "Prompt contains 235396 tokens and 0 draft tokens, too large for model with 131072 maximum context length",
    ),
    Said(
        "Anthropic, docker/docker-agent#569",
        21041,
        "input length and `max_tokens` exceed context limit: 178959 + 64000 > 200000, decrease input length or "
        "`max_tokens` and try again",
    ),
    Said(
        "Anthropic and a prompt that does not fit, stackblitz/bolt.new#2449",
        0,
        "prompt is too long: 202095 tokens > 200000 maximum",
    ),
    Said(
        "xAI, cline/cline#3120",
        0,
        "This model's maximum prompt length is 131072 but the request contains 136973 tokens.",
    ),
    Said(
        "numbers may have commas",
        0,
        "Prompt contains 235,396 tokens, too large for model with 131,072 maximum context length",
    ),
    Said(
        "and room all the same",
        8130,
        "This model's maximum context length is 131,072 tokens. However, you requested 131,134 tokens (122,942 in "
        "the messages, 8,192 in the completion).",
    ),
    # Others, and such as name no numbers, or not the one that counts.
    Said(
        "only the sum, THUDM/LongBench#104",
        None,
        "This model's maximum context length is 131072 tokens. However, you requested 351430 tokens. Please "
        "reduce the length of the messages.",
    ),
    Said(
        "OpenAI today",
        None,
        "Your input exceeds the context window of this model. Please adjust your input.",
    ),
    Said(
        "Groq",
        None,
        "Please reduce the length of the messages or completion",
    ),
    Said(
        "llama.cpp before, ggml-org/llama.cpp#14839",
        None,
        "the request exceeds the available context size. try increasing the context size or enable context shift",
    ),
    Said(
        "another limit",
        None,
        "max_tokens must be at least 1, got 0.",
    ),
    Said(
        "a window of nothing",
        None,
        "Requested tokens (2138) exceed context window of 0",
    ),
    Said(
        "a number that is none",
        None,
        "Requested tokens (5) exceed context window of 99999999999",
    ),
    Said(
        "more than any context",
        None,
        "Requested tokens (5) exceed context window of 1000000001",
    ),
    Said(
        "the most",
        999999995,
        "Requested tokens (5) exceed context window of 1000000000",
    ),
)
BY_SOURCE = pytest.mark.parametrize("said", SAID, ids=[said.source for said in SAID])


def openai(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": 400}}).encode()


@BY_SOURCE
def test_the_room_that_a_backend_tells_of(said: Said) -> None:
    assert room(openai(said.text)) == said.room


@BY_SOURCE
def test_it_is_found_wherever_the_backend_has_its_message(said: Said) -> None:
    message = said.text
    wrapped = f'litellm.BadRequestError: Fireworks_aiException - {{"error":{{"message":"{message}"}}}}'
    for answer in (
        {"object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400},
        {"error": message, "error_type": "validation"},
        {"detail": message},
        {"type": "error", "error": {"type": "invalid_request_error", "message": message}, "request_id": "r"},
        {"error": {"message": wrapped}},
    ):
        assert room(json.dumps(answer).encode()) == said.room


def test_every_text_that_is_known_is_tried_here() -> None:
    assert [text for text in _TEXTS if not any(text.pattern.search(said.text.lower()) for said in SAID)] == []


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"n_prompt_tokens": 14429, "n_ctx": 8192}, 0),  # oobabooga/textgen#7257
        ({"n_prompt_tokens": 1407, "n_ctx": 2000}, 593),
        ({"n_prompt_tokens": 8192, "n_ctx": 8192}, 0),
        ({"n_prompt_tokens": -1, "n_ctx": 8192}, None),
        ({"n_prompt_tokens": 1, "n_ctx": 10**10}, None),
        ({"n_prompt_tokens": True, "n_ctx": 8192}, None),
        ({"n_prompt_tokens": "14429", "n_ctx": 8192}, None),
        ({"n_ctx": 8192}, None),
    ],
)
def test_llama_cpp_has_members_for_its_numbers(members: dict[str, object], expected: int | None) -> None:
    error = {"code": 400, "message": "the request exceeds the available context size", **members}
    assert room(json.dumps({"error": error}).encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"Requested tokens (5) exceed context window of 10"',
        b"Requested tokens (5) exceed context window of 10",
        b'{"error": null}',
        b'{"error": []}',
        b'{"error": {"message": null}}',
        b'{"error": {"message": ["Requested tokens (5) exceed context window of 10"]}}',
        b'{"detail": [{"loc": ["body"], "msg": "Requested tokens (5) exceed context window of 10"}]}',
        b'{"error": "\xff Requested tokens (5) exceed context window of 10"}',
        b"[" * 60_000,
        b'{"error": ' * 6_000,
        b'{"error": "Requested tokens (5) exceed context window of 10", "x": "' + b"x" * 65_536 + b'"}',
    ],
)
def test_what_is_no_error_that_can_be_read_tells_of_no_room(body: bytes) -> None:
    assert room(body) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_read(body: bytes) -> None:
    assert room(body) is None


@given(
    st.lists(
        st.sampled_from([*(said.text for said in SAID), "1", "99999999999", ",", " tokens", "(", "you requested "]),
        max_size=8,
    ).map("".join)
)
def test_there_is_never_less_room_than_none_or_more_than_any_context_has(message: str) -> None:
    found = room(openai(message))
    assert found in (None, UNSAID) or 0 <= found <= 10**9


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "trap",
    [
        "1,111" * 13_000,
        "1" * 65_000,
        "context length is " * 3_600,
        "context length is 1 tokens. However, you requested 1 tokens (" * 1_000,
        "context length is 1 tokens. However, you requested 1 tokens (" + "1 in the messages, " * 3_000,
        "Prompt contains 1 tokens " * 2_600,
        "`max_new_tokens` must be <= 1. Given: " * 1_700,
        "prompt is too long: " * 3_200,
    ],
)
def test_a_long_message_is_read_in_time(trap: str) -> None:
    assert room(openai(trap[:65_000])) is None

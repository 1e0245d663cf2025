"""What a backend says of a context that is exceeded: a 400 answer → how many tokens of completion would have fitted.

The APIs have a code for it at best, and no member for the numbers (llama.cpp has two): they stand in the text, and each
backend has its own, which changes with its version. So the texts are rows, the newest backends' first.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

_LONGEST = 64 * 1024  # no error message is longer
UNSAID = -1  # something fits, and how much only the backend could say: it stopped counting the prompt
_SANE = 10**9  # no context is larger, and no count of tokens


class _Text(NamedTuple):
    """One backend's text, and what it says with it.

    Of the groups, `window` is all that fits, and `prompt` what the backend counted. Where it gives a sum instead, that
    is `total`, and `output` the part of it that the completion was to have.
    """

    pattern: re.Pattern[str]
    spare: int = 0  # tokens of the window that can be used by nobody
    cuts: bool = False  # whether it stops counting a prompt at the first token too many


def _text(pattern: str, *, spare: int = 0, cuts: bool = False) -> _Text:
    """A row. Its pattern is in small letters; a word in capitals is a number, in a group of its name."""
    named = re.sub(
        r"\b(WINDOW|PROMPT|OUTPUT|TOTAL)\b", lambda n: rf"(?<!\d)(?P<{n[0].lower()}>\d{{1,10}})(?!\d)", pattern
    )
    return _Text(re.compile(named), spare, cuts)


# Each begins with words in the open, and nothing in it repeats without a bound: of linear time, whatever is searched.
_TEXTS = (
    # vLLM: a prompt is only tokenised up to one token more than fits, unless it came in tokens.
    _text(
        r"context length is WINDOW tokens\. however, you requested OUTPUT output tokens "
        r"and your prompt contains (?:at least )?PROMPT input tokens",
        cuts=True,
    ),
    _text(
        r"you passed PROMPT input tokens and requested OUTPUT output tokens\. "
        r"however, the model's context length is only WINDOW tokens",
        cuts=True,
    ),
    _text(
        r"context length is WINDOW tokens\. however, you requested OUTPUT output tokens "
        r"and your prompt contains \d{1,10} characters"
    ),
    _text(r"context length is WINDOW tokens and your request has PROMPT input tokens"),
    _text(r"context length is WINDOW tokens\. however, your (?:request|prompt) has PROMPT input tokens"),
    _text(r"prompt \(length PROMPT\) is longer than the maximum model length of WINDOW"),
    # OpenAI, and whoever took its words: DeepSeek, FastChat, llama-cpp-python, older vLLM, OpenRouter.
    _text(
        r"context length is WINDOW tokens[.,] however,? you requested (?:about )?TOTAL tokens "
        r"\((?:[^()]{0,200}[ (])?OUTPUT (?:in|for) {1,2}the (?:completion|output)\)"
    ),
    _text(r"context length is WINDOW tokens\. however, you requested about PROMPT tokens \(\d{1,10} of text input\)"),
    _text(r"context length is WINDOW tokens\. however, you requested PROMPT tokens in the messages"),
    _text(r"context length is WINDOW tokens\. however, your messages resulted in PROMPT tokens"),
    # SGLang: what fills the window to its last token is refused, too.
    _text(
        r"context length of WINDOW tokens\. you requested a total of \d{1,10}(?:\.0)? tokens: "
        r"PROMPT tokens from the input messages",
        spare=1,
    ),
    _text(r"input \(PROMPT tokens\) is longer than the model's context length \(WINDOW tokens\)", spare=1),
    _text(r"input length \(PROMPT(?: tokens)?\) exceeds (?:the|model's) maximum (?:allowed|context) length \(WINDOW"),
    # Fireworks, and Ollama's cloud.
    _text(r"prompt is too long: PROMPT, model maximum context length: WINDOW"),
    # Text Generation Inference.
    _text(r"`max_new_tokens` must be <= WINDOW\. given: PROMPT `inputs` tokens"),
    _text(r"`inputs` must have less than WINDOW tokens\. given: PROMPT"),
    # llama.cpp, which has the numbers in members as well, and llama-cpp-python.
    _text(r"request \(PROMPT tokens\) exceeds the available context size \(WINDOW tokens\)"),
    _text(r"requested tokens \(PROMPT\) exceed context window of WINDOW"),
    # Mistral, Anthropic, xAI.
    _text(r"prompt contains PROMPT tokens[^.]{0,60} too large for model with WINDOW maximum context length"),
    _text(r"exceed context limit: PROMPT \+ \d{1,10} > WINDOW"),
    _text(r"prompt is too long: PROMPT tokens > WINDOW maximum"),
    _text(r"maximum prompt length is WINDOW but the request contains PROMPT tokens"),
)


def room(body: bytes) -> int | None:
    """How many tokens of completion fit beside the prompt, as the backend counted it; 0 where not even that fits, and
    UNSAID where it did not count to the end.

    `body` is a 400 answer. None where it is another error, or one that does not say how long the prompt is.
    """
    if len(body) > _LONGEST:
        return None
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return _told(answer) if isinstance(answer, dict) else None


def _told(answer: dict[str, Any]) -> int | None:
    error = answer.get("error")
    where = error if isinstance(error, dict) else answer
    window, prompt = where.get("n_ctx"), where.get("n_prompt_tokens")
    if type(window) is int and type(prompt) is int:
        return _left(window, prompt)
    said = error if isinstance(error, str) else where.get("message", where.get("detail"))
    return _read(said) if isinstance(said, str) else None


_THOUSANDS = re.compile(r"(?<=\d),(?=\d\d\d)")


def _read(said: str) -> int | None:
    said = _THOUSANDS.sub("", said.lower())
    for text in _TEXTS:
        if found := text.pattern.search(said):
            number = {name: int(digits) for name, digits in found.groupdict().items()}
            if not number.keys() & {"prompt", "total"}:
                return UNSAID
            window, output = number["window"] - text.spare, number.get("output", 0)
            prompt = number["prompt"] if "prompt" in number else number["total"] - output
            if text.cuts and window > prompt == window - output + 1:
                return UNSAID
            return _left(window, prompt)
    return None


def _left(window: int, prompt: int) -> int | None:
    return max(0, window - prompt) if 0 < window <= _SANE and 0 <= prompt <= _SANE else None

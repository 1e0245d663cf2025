"""The most that a request can take: tokens of its input, tokens of its output.

Of text it is known before the answer how many tokens it can be at most: one for each of its bytes. Byte-level BPE makes
no more (Sennrich et al. 2016 in the form of Radford et al. 2019), nor does SentencePiece that falls back to bytes, and
a JSON string is never shorter than the text that it stands for. What a template adds to a message has fewer tokens than
the message's JSON has bytes; what it adds once has a margin here. Most texts are a quarter of that bound, and so it is
for limits that must not be overshot; the others go by an estimate.

Beyond the bound is what a backend reads and the body does not hold: stored conversations, searches, files and images.
Those images that the body names count for what one usually takes; so do those that it holds.
"""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import islice
from math import ceil

import msgspec
from msgspec.json import Decoder

from gateway.contract import Members, Prompts, Values
from gateway.endpoints import Endpoint
from gateway.errors import ContextLengthExceeded
from gateway.snapshot import Model

BYTES_PER_TOKEN = 4.0  # English under the usual tokenizers; other scripts have more bytes a letter and fewer a token
IMAGE_TOKENS = 1600  # of an image, as far as one can say beforehand: what Anthropic's largest take, and OpenAI's nearly

# Callers may write integers of any size. No limit is larger (language.py), and the store's arithmetic is exact so far.
MAX_BOUND = 10**12

# Tokens that no caller wrote.
_ENDS = 8  # of a text: what begins, ends and separates it
_TEMPLATE = 64  # of a conversation, beside the 28 bytes of syntax that its first message has: gpt-oss's has 70 tokens
_TOOLS = 512  # of a conversation with tools, beside some 50 bytes of the first one: up to 530 at Anthropic


class Input(msgspec.Struct, frozen=True, gc=False):
    """How large an input is: bytes of text, or tokens that were counted, and images."""

    prompts: int = 0
    size: int = 0  # bytes of text, which stand for tokens; 0 where those were counted
    tokens: int | None = None  # counted, where prompts came as tokens
    images: int = 0
    margin: int = 0  # tokens that come on top of those of the text

    def at(self, bytes_per_token: float) -> int:
        """The tokens that it has by count, or by estimate: of each prompt one at least."""
        text = max(self.prompts, ceil(self.size / bytes_per_token)) if self.tokens is None else self.tokens
        return text + self.images * IMAGE_TOKENS

    @property
    def bound(self) -> int:
        """The tokens that it has at most."""
        text = max(self.prompts, self.size) + self.margin if self.tokens is None else self.tokens
        return text + self.images * IMAGE_TOKENS


# Members that are read by the model, of whichever endpoint.
_READ = frozenset(
    (
        *("messages", "system", "instructions", "input", "prompt", "documents"),
        *("tools", "functions", "response_format", "text", "chat_template", "chat_template_kwargs"),
    )
)
_SHOWING = ("messages", "system", "input")  # in which images are images, and no text of a tool's
_OF_TOOLS = ("tools", "functions")
_NONE = len("null")


def input_of(members: Members, values: Values) -> Input:
    """The input of a request in JSON."""
    for name in ("prompt", "input"):
        if isinstance(prompts := values.get(name), Prompts):
            shown = values.get("images")
            images = 0 if shown is None else sum(shown.numbers)
            size, tokens = prompts.size, prompts.tokens
            if more := prompts.number * sum(len(raw) for name, raw in members if name == "suffix"):
                size, tokens = size + (tokens or 0) + more, None  # what follows a gap is text, and read with each
            return Input(prompts.number, size, tokens, images, _ENDS * prompts.number)
    if isinstance(documents := values.get("documents"), Prompts):  # each is read beside the query
        number, query = documents.number, len(values["query"])
        return Input(number, documents.size + number * query, margin=_ENDS * number)
    size = images = 0
    margin = _TEMPLATE
    for name, raw in members:
        if name in _READ and len(raw) > _NONE:
            hidden, found = _images_in(bytes(raw)) if name in _SHOWING else (0, 0)
            size += len(raw) - hidden
            images += found
            margin += _TOOLS * (name in _OF_TOOLS)
    return Input(1, size, images=images, margin=margin)


# Values of members: quotes in prose are escaped, so that none of it looks like one.
_SOURCE = re.compile(rb'": ?"(https?:|file[-_]|data:[^,"]{0,200};base64,|(?=[A-Za-z0-9+/]{64}))')
_NAMES = (b"url", b"file_id", b"file_data", b'"data')  # OpenAI's, and what Anthropic's sources and sounds are in
_IMAGES = 1000  # that are looked for
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_"


def _images_in(text: bytes) -> tuple[int, int]:
    """The bytes of the images in a JSON text, four of which are no token; and how many there are, here or elsewhere."""
    size = number = 0
    for source in islice(_SOURCE.finditer(text), _IMAGES):
        if text.endswith(_NAMES, 0, source.start()):
            start = source.end()
            if source[1][:4] in (b"data", b""):
                data = text[start : text.find(b'"', start)]
                if data.replace(rb"\/", b"/").translate(None, _BASE64):
                    continue  # prose, wherever it stands
                size += len(data)
            number += 1
    return size, number


class Output(msgspec.Struct, frozen=True, gc=False):
    """How many answers there will be, over all prompts and choices, and how many tokens the caller wants in each."""

    answers: int
    named: int | None  # None: the caller names no bound

    def bound(self, most: int) -> int:
        """The tokens of all answers, with `most` in each where the caller names no bound."""
        return int(min((most if self.named is None else self.named) * self.answers, MAX_BOUND))


OUTPUTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def named_output(values: Values) -> int | None:
    """The bound that is named among the members that the contract knows."""
    for name in OUTPUTS:
        asked: int | None = values.get(name)
        if asked is not None:
            return asked
    return None


def output_of(endpoint: Endpoint, values: Values, members: Members, prompts: int, named: int | None) -> Output:
    """The output of a request in JSON, of `prompts` prompts, whose bound is `named` as far as the contract knows it."""
    if endpoint.output is None:
        return Output(0, 0)
    choices = values.get("n") or 1
    if len(values) < len(members):
        more = _unlisted(members, values)
        choices = max(choices, more.get("best_of", 1))
        if (other := more.get("max_completion_tokens", -1)) >= 0:
            named = max(named or 0, other)
    return Output(choices * prompts, named)


_UNLISTED = ("best_of", "max_completion_tokens")  # that pass where the contract is lenient, and backends may know
_INTEGER = Decoder(int)


def _unlisted(members: Members, values: Values) -> dict[str, int]:
    """What raises the output of a request, of members that its contract does not know."""
    found = {}
    for name, raw in members:
        if name in _UNLISTED and name not in values:
            with suppress(msgspec.DecodeError):
                found[name] = _INTEGER.decode(raw)
    return found


# — context windows, for backends that do not see to them

BEHAVIOUR = "context_length_exceeded_behavior"


def room_in(model: Model, size: Input) -> int | None:
    """What the model's window holds beside one prompt, by estimate where it is text; None: the backend knows better."""
    if model.context_window is None or model.api != "openai" or size.prompts != 1:
        return None
    return model.context_window - size.at(BYTES_PER_TOKEN)


def lowered(model: Model, values: Values, size: Input, named: int | None, truncates: bool) -> int | None:
    """What max_tokens is lowered to, so that prompt and answer fit; None: it stays, and the backend may know better.

    Raises ContextLengthExceeded where the prompt was counted and not estimated, and the caller wants an error.
    """
    room = room_in(model, size)
    if room is None or named is None or named <= room:
        return None
    if truncates:
        return room if room >= 1 else None
    if size.tokens is not None and values.get(BEHAVIOUR) == "error":
        raise ContextLengthExceeded(
            f"the prompt has {size.at(BYTES_PER_TOKEN)} tokens and max_tokens is {named}, "
            f"the context window of {model.name} holds {model.context_window} together",
            param="max_tokens",
        )
    return None

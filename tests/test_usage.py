"""What an answer used, from its last bytes: whatever a backend reports, however its answer is cut into chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fractions import Fraction
from math import floor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.endpoints import ENDPOINTS, Endpoint
from gateway.records import Price
from gateway.usage import HEAD, NOTHING, TAIL, Tail, Usage, usage_of

ESTIMATE = 77
DONE = b"data: [DONE]\n\n"


def report(input_: int, output: int, cached: int | None = None) -> dict[str, Any]:
    """A usage as backends write it."""
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": input_, "completion_tokens": output, "total_tokens": input_ + output, **details}


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members, ensure_ascii=False).encode() + b"\n\n"


def word(text: str, **members: Any) -> bytes:
    """A chunk of a completion."""
    return event(id="c", object="text_completion", choices=[{"index": 0, "text": text}], **members)


def used(
    chunks: Iterable[bytes], endpoint: str | Endpoint = "completions", *, stream: bool = True, bound: int = 10**9
) -> Usage:
    where = ENDPOINTS[endpoint] if isinstance(endpoint, str) else endpoint
    tail = Tail(headed=where.headed)
    for chunk in chunks:
        tail.add(chunk)
    return usage_of(tail, where, stream=stream, input_estimate=ESTIMATE, output_bound=bound)


def counted(output: int) -> Usage:
    """What is counted of an answer that reports nothing."""
    return Usage(ESTIMATE, output, input_source="counted", output_source="counted")


def document(usage: object, text: str = "blue") -> bytes:
    return json.dumps({"id": "c", "choices": [{"text": text}], "usage": usage}).encode()


# Streams and what they used. What is `counted` has no report that can be read.
STREAMS: dict[str, tuple[list[bytes], Usage]] = {
    "Fireworks reports in the finish chunk": (
        [word("a"), word("b"), word("", usage=report(3, 2, 1), finish_reason="length"), DONE],
        Usage(3, 2, 1),
    ),
    "OpenAI reports in a chunk of its own": (
        [word("a", usage=None), word("b", usage=None), event(choices=[], usage=report(3, 2, 1)), DONE],
        Usage(3, 2, 1),
    ),
    "vLLM reports in every chunk, and the last one counts": (
        [word("a", usage=report(3, 1)), word("b", usage=report(3, 2)), word("c", usage=report(3, 3)), DONE],
        Usage(3, 3),
    ),
    "null after a report is none": (
        [word("a", usage=report(3, 1)), word("b", usage=None), DONE],
        Usage(3, 1),
    ),
    "perf_metrics may follow usage in its event": (
        [word("a", usage=report(3, 1), perf_metrics={"prompt-tokens": 3, "latency": 0.1}), DONE],
        Usage(3, 1),
    ),
    "an error event after the report": (
        [word("a", usage=report(3, 1)), event(error={"message": "gone"}), DONE],
        Usage(3, 1),
    ),
    "lines may end as on the wire of HTTP": (
        [word("a").replace(b"\n", b"\r\n"), event(choices=[], usage=report(3, 2)).replace(b"\n", b"\r\n")],
        Usage(3, 2),
    ),
    "data: may stand without a blank": ([event(usage=report(3, 2)).replace(b"data: ", b"data:")], Usage(3, 2)),
    "an event may be named": ([b"event: message\n" + event(usage=report(3, 2))], Usage(3, 2)),
    "what the model says of usage is text": (
        [word('{"usage": {"prompt_tokens": 1000000, "completion_tokens": 1000000}}'), DONE],
        counted(1),
    ),
    "what the model says of usage after the report is text": (
        [word("a", usage=report(3, 2)), word('"usage": {"prompt_tokens": 0}'), word("usage"), DONE],
        Usage(3, 2),
    ),
    "a usage further in is another one": (
        [word("a", usage=report(3, 2)), event(choices=[{"usage": report(9, 9)}], timing={"usage": report(8, 8)}), DONE],
        Usage(3, 2),
    ),
    "completion_tokens may be null": (
        [event(usage={"prompt_tokens": 3, "completion_tokens": None, "total_tokens": 5})],
        Usage(3, 2),
    ),
    "completion_tokens may be missing": ([event(usage={"prompt_tokens": 3, "total_tokens": 5})], Usage(3, 2)),
    "prompt_tokens_details may be null": (
        [event(usage={**report(3, 2), "prompt_tokens_details": None})],
        Usage(3, 2),
    ),
    "cached_tokens may be null": (
        [event(usage={**report(3, 2), "prompt_tokens_details": {"cached_tokens": None}})],
        Usage(3, 2),
    ),
    "not more is cached than was sent": ([event(usage=report(3, 2, 10))], Usage(3, 2, 3)),
    "half a report is completed by counting": (
        [word("a"), word("b", usage={"prompt_tokens": 3})],
        Usage(3, 2, output_source="counted"),
    ),
    "the other half, too": (
        [word("a"), word("b", usage={"completion_tokens": 9})],
        Usage(ESTIMATE, 9, input_source="counted"),
    ),
    "a total of nothing known says nothing": (
        [word("a", usage={"total_tokens": 9})],
        counted(1),
    ),
    "it may be written as newer endpoints do": (
        [word("a", usage={"input_tokens": 3, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}})],
        Usage(3, 2, 1),
    ),
    "a response further in is another one": (
        [word("a"), event(response={"usage": report(9, 9)})],
        counted(2),
    ),
    "of the output some is reasoning": (
        [event(usage={**report(3, 9), "completion_tokens_details": {"reasoning_tokens": 7}})],
        Usage(3, 9, reasoning=7),
    ),
    "not more is reasoning than was produced": (
        [event(usage={**report(3, 9), "completion_tokens_details": {"reasoning_tokens": 10}})],
        Usage(3, 9, reasoning=9),
    ),
    "reasoning may be null": (
        [event(usage={**report(3, 9), "completion_tokens_details": {"reasoning_tokens": None, "x": 1}})],
        Usage(3, 9),
    ),
    "its details may be null": ([event(usage={**report(3, 9), "completion_tokens_details": None})], Usage(3, 9)),
    "less reasoning than nothing is none": (
        [event(usage={**report(3, 9), "completion_tokens_details": {"reasoning_tokens": -1}})],
        Usage(3, 9),
    ),
    "reasoning may be told as newer endpoints do": (
        [event(usage={"input_tokens": 3, "output_tokens": 9, "output_tokens_details": {"reasoning_tokens": 7}})],
        Usage(3, 9, reasoning=7),
    ),
    "reasoning of a null output is of what was counted": (
        [word("a"), word("b", usage={"prompt_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 7}})],
        Usage(3, 2, reasoning=2, output_source="counted"),
    ),
    "null that follows a usage in its event is none": (
        [b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 2}, "choices": [{"usage": null}]}\n\n'],
        Usage(3, 2),
    ),
    "less than nothing is nothing": ([event(usage=report(-3, -2, -1))], Usage(0, 0)),
    "more than is credible is cut": ([event(usage=report(2**62, 10**15, 10**15))], Usage(10**9, 10**9, 10**9)),
    "without a report events are counted": ([word("a"), word("b"), DONE], counted(2)),
    "null is no report": ([word("a", usage=None), word("b", usage=None)], counted(2)),
    "nothing is no report": ([word("a", usage={}), word("b")], counted(2)),
    "zeros are no report, as LocalAI writes them until its last chunk": (
        [word("a", usage=report(0, 0, 0)), word("b", usage=report(0, 0))],
        counted(2),
    ),
    "zeros after a report are none": ([word("a", usage=report(3, 1)), word("b", usage=report(0, 0))], Usage(3, 1)),
    "a comment is no report": (
        [word("a"), b': "usage": {"prompt_tokens": 9, "completion_tokens": 9}}\n\n'],
        counted(2),
    ),
    "a word is no report": ([word("a", usage="3"), word("b")], counted(2)),
    "words are no numbers": (
        [word("a", usage={"prompt_tokens": "3", "completion_tokens": "2"})],
        counted(1),
    ),
    "a report that is cut is none": (
        [word("a"), event(usage=report(3, 2))[:-20]],
        counted(1),
    ),
    "an empty answer used nothing": ([], NOTHING),
    "an answer of no bytes used nothing": ([b"", b""], NOTHING),
}


@pytest.mark.parametrize(("chunks", "expected"), STREAMS.values(), ids=STREAMS)
def test_what_a_stream_used(chunks: list[bytes], expected: Usage) -> None:
    assert used(chunks) == expected


@pytest.mark.parametrize(("chunks", "expected"), STREAMS.values(), ids=STREAMS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_a_stream_used_does_not_depend_on_its_chunks(chunks: list[bytes], expected: Usage, data: Any) -> None:
    assert used(pieces(b"".join(chunks), data)) == expected


def pieces(text: bytes, data: Any) -> list[bytes]:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), size=st.integers(1, 40))
def test_the_last_bytes_are_so_many_as_one_asks_for(data: Any, size: int) -> None:
    tail, said = Tail(), bytes(range(30))
    assert tail.last(size) == b""
    chunks = pieces(said, data)
    for chunk in chunks:
        tail.add(chunk)
    assert tail.last(size).endswith(said[-size:])
    assert said.endswith(tail.last(size))
    assert len(tail.last(size)) < size + max(map(len, chunks))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), words=st.lists(st.integers(1, 3000), max_size=30), used_=st.integers(0, 10**6))
def test_a_long_stream_is_read_from_its_end(data: Any, words: list[int], used_: int) -> None:
    """Of whatever came before, some of the last bytes are kept, and not much more than asked for."""
    text = b"".join(word("x" * length, usage=report(3, 1)) for length in words) + word("", usage=report(3, used_))
    chunks = pieces(text + DONE, data)
    tail = Tail()
    for chunk in chunks:
        tail.add(chunk)
    assert usage_of(
        tail, ENDPOINTS["chat/completions"], stream=True, input_estimate=ESTIMATE, output_bound=10**9
    ) == Usage(3, used_)
    assert tail.head() == (text + DONE)[:HEAD]
    kept = tail.bytes()
    assert (text + DONE).endswith(kept)
    assert min(TAIL, len(text + DONE)) <= len(kept) <= TAIL + max(map(len, chunks))
    assert (tail.length, tail.lines) == (len(text + DONE), 2 * (len(words) + 2))


@pytest.mark.parametrize("before", range(TAIL - 400, TAIL + 40, 7))
def test_an_event_that_the_tail_cuts_is_read_if_its_usage_is_whole(before: int) -> None:
    """The last event is as long as the tail, and the cut is at every place of it."""
    last = event(id="c", usage=report(3, 2, 1), logprobs="x" * before)
    found = used([b"data: ", last[6:], DONE])
    assert found == Usage(3, 2, 1)
    one_by_one = used([bytes([byte]) for byte in last + DONE])
    assert one_by_one in (Usage(3, 2, 1), counted(1))
    if len(last + DONE) <= TAIL:
        assert one_by_one == Usage(3, 2, 1)


def test_an_event_that_the_tail_cuts_before_its_usage_is_read() -> None:
    last = event(choices=[{"text": "x" * 3 * TAIL}], usage=report(3, 2, 1), id="c")
    assert used([bytes([byte]) for byte in last + DONE]) == Usage(3, 2, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (document(report(3, 2, 1)), Usage(3, 2, 1)),
        (json.dumps(json.loads(document(report(3, 2))), indent=2).encode() + b"\n", Usage(3, 2)),
        (document(report(3, 2), text='"usage": {"prompt_tokens": 9}'), Usage(3, 2)),
        (document(None), counted(15)),
        (document(report(3, 2, 1), text="x" * 3 * TAIL), Usage(3, 2, 1)),
        (document(report(3, 2), text='"usage": {"prompt_tokens": 9}' * TAIL), Usage(3, 2)),
        (json.dumps({"text": "x" * 3 * TAIL, "usage": report(3, 2)}, indent=2).encode(), Usage(3, 2)),
        (b"not json at all", counted(4)),
        (b"x", counted(1)),
        (b'{"usage": {"prompt_tokens": 3, ' * 1000, counted(7750)),
        (b"x" * 2 * TAIL + b'"usage"', counted(4098)),
        (b"x" * 2 * TAIL + b'"usage": null, "a": {"prompt_tokens": 9}', counted(4106)),
        (b"", NOTHING),
    ],
)
def test_what_a_document_used(text: bytes, expected: Usage) -> None:
    assert used([text], stream=False) == expected
    assert used([text[at : at + 1000] for at in range(0, len(text), 1000)], stream=False) == expected


EVERY = st.sampled_from(list(ENDPOINTS))


@given(chunks=st.lists(st.binary(max_size=200), max_size=20), stream=st.booleans(), endpoint=EVERY)
def test_garbage_is_counted(chunks: list[bytes], stream: bool, endpoint: str) -> None:
    found = used(chunks, endpoint, stream=stream)
    assert found.source == ("counted" if any(chunks) else "none")


SIGNS = st.sampled_from(
    [
        b'"usage"',
        b"usage",
        b":",
        b"{",
        b"}",
        b"\n",
        b"data:",
        b"null",
        b"[",
        b"]",
        b'"',
        b"\\",
        b" ",
        b",",
        b"3",
        b"-",
        b'"prompt_tokens"',
        b'"completion_tokens"',
        b'"prompt_tokens_details"',
        b'"input_tokens"',
        b'"output_tokens"',
        b'"cache_read_input_tokens"',
        b'"total_tokens"',
        b'"message"',
        b'"response"',
        b'"type":"message_start"',
        b'"meta"',
        b'"tokens"',
        b"\xff",
        b"1e999",
        b"9" * 30,
    ]
)


@given(signs=st.lists(SIGNS, max_size=40), before=st.sampled_from([0, TAIL]), stream=st.booleans(), endpoint=EVERY)
def test_what_looks_like_usage_never_breaks_anything(
    signs: list[bytes], before: int, stream: bool, endpoint: str
) -> None:
    found = used([b"x" * before, *signs], endpoint, stream=stream)
    assert 0 <= found.cached <= found.input <= 10**9
    assert 0 <= found.reasoning <= found.output <= 10**9


@pytest.mark.parametrize(
    "hole",
    [
        b'{"usage":' * 100_000,
        b'data: {"usage":' + b"[" * 100_000,
        b'"usage":{' * 100_000,
        b'data: ["' + b'usage","' * 100_000 + b'"]',
        b'"usage"\n' * 100_000,
        b'"usage":{"a":{' + b" " * 1_000_000,
        b'"usage":{"a":{}' * 50_000,
        b'"usage"' + b" " * 1_000_000,
        b'"meta":{"usage":' * 60_000,
        b"event: \n" * 120_000,
        b"event: " * 140_000,
        b'data: {"type":"message_start","message":' + b'{"usage":' * 100_000,
    ],
)
@pytest.mark.parametrize(("endpoint", "stream"), [("completions", True), ("messages", True), ("responses", False)])
@pytest.mark.timeout(5)
def test_a_megabyte_of_traps_is_left_in_time(hole: bytes, endpoint: str, stream: bool) -> None:
    """Whoever reads each of them to the end needs minutes, and the event loop stands still."""
    assert used([hole], endpoint, stream=stream).source == "counted"
    assert used([b"x" * TAIL, hole], endpoint, stream=stream).source == "counted"


# — messages, in Anthropic's words


def named(type_: str, **members: Any) -> bytes:
    """An event of messages and of responses."""
    return f"event: {type_}\n".encode() + event(type=type_, **members)


def anthropic(input_: int | None = None, output: int | None = None, created: Any = None, read: Any = None) -> Any:
    """A usage as Anthropic writes it, with the members that are given."""
    members = {
        "input_tokens": input_,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
        "output_tokens": output,
    }
    return {name: value for name, value in members.items() if value is not None}


def begin(usage: object) -> bytes:
    return named("message_start", message={"id": "msg_1", "type": "message", "content": [], "usage": usage})


def text(words: str) -> bytes:
    return named("content_block_delta", index=0, delta={"type": "text_delta", "text": words})


def end(usage: object) -> bytes:
    return named("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


OPEN = named("content_block_start", index=0, content_block={"type": "text", "text": ""})
PING = named("ping")
STOP = named("message_stop")

MESSAGES: dict[str, tuple[list[bytes], Usage]] = {
    "the input is in the first event, the output in the last one": (
        [begin(anthropic(3, 1)), OPEN, PING, text("a"), end(anthropic(output=2)), STOP],
        Usage(3, 2),
    ),
    "what was cached or is from now on is input, too": (
        [begin(anthropic(3, 1, created=10, read=100)), text("a"), end(anthropic(output=2)), STOP],
        Usage(113, 2, 100),
    ),
    "the last event may say it all": ([text("a"), end(anthropic(3, 2, 10, 100)), STOP], Usage(113, 2, 100)),
    "and what it says holds": (
        [begin(anthropic(1, 1, 1, 1)), text("a"), end(anthropic(3, 2, 10, 100)), STOP],
        Usage(113, 2, 100),
    ),
    "member by member": ([begin(anthropic(3, 1, 10, 100)), end(anthropic(5, 2)), STOP], Usage(115, 2, 100)),
    "zeros do not repeat": (
        [begin(anthropic(3, 1, 10, 100)), text("a"), end(anthropic(0, 2, 0, 0)), STOP],
        Usage(113, 2, 100),
    ),
    "the first event may know nothing": (
        [begin(anthropic(0, 0)), text("a"), end(anthropic(3, 2)), STOP],
        Usage(3, 2),
    ),
    "the last of several counts": (
        [begin(anthropic(3, 1)), end(anthropic(output=2)), text("a"), end(anthropic(output=7)), STOP],
        Usage(3, 7),
    ),
    "a stream that is cut is counted from its first event on": (
        [begin(anthropic(3, 1, read=2)), OPEN, PING, text("a"), text("b")],
        Usage(5, 2, 2, output_source="counted"),
    ),
    "without a first event the input is estimated": (
        [text("a"), end(anthropic(output=2)), STOP],
        Usage(ESTIMATE, 2, input_source="counted"),
    ),
    "without a report only events with text are counted": (
        [begin(None), OPEN, PING, text("a"), text("b"), text("c"), named("content_block_stop"), end(None), STOP],
        counted(3),
    ),
    "words are no numbers": (
        [begin({"input_tokens": "3"}), text("a"), end({"output_tokens": "2"}), STOP],
        counted(1),
    ),
    "less than nothing is nothing": ([begin(anthropic(-3, 1, -1, -1)), end(anthropic(output=-2))], Usage(0, 0)),
    "more than is credible is cut": (
        [begin(anthropic(2**70, 1, 10**15, 10**15)), end(anthropic(output=10**12))],
        Usage(10**9, 10**9, 10**9),
    ),
    "what the model says of a beginning is text": (
        [begin(anthropic(3, 1)), text(begin(anthropic(9, 9)).decode()), end(anthropic(output=2))],
        Usage(3, 2),
    ),
    "lines may end as on the wire of HTTP": (
        [
            chunk.replace(b"\n", b"\r\n")
            for chunk in (begin(anthropic(3, 1)), text("a"), end(anthropic(output=2)), STOP)
        ],
        Usage(3, 2),
    ),
}


@pytest.mark.parametrize(("chunks", "expected"), MESSAGES.values(), ids=MESSAGES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_a_stream_of_messages_used(chunks: list[bytes], expected: Usage, data: Any) -> None:
    assert used(pieces(b"".join(chunks), data), "messages") == expected


@settings(max_examples=50, deadline=None)
@given(data=st.data(), words=st.lists(st.integers(1, 3000), min_size=10, max_size=30))
def test_the_beginning_of_a_long_stream_is_kept(data: Any, words: list[int]) -> None:
    said = begin(anthropic(3, 1, read=2)) + OPEN + b"".join(text("x" * length) for length in words)
    assert used(pieces(said + end(anthropic(output=9)) + STOP, data), "messages") == Usage(5, 9, 2)
    assert used(pieces(said, data), "messages") == Usage(5, len(words), 2, output_source="counted")


@pytest.mark.parametrize("words", [1, 3, 2000])
@pytest.mark.parametrize("end_of_line", [b"\n", b"\r\n"])
def test_events_with_names_are_counted_however_their_lines_end(words: int, end_of_line: bytes) -> None:
    said = begin(anthropic(3, 1)) + OPEN + text("x") * words
    assert used([said.replace(b"\n", end_of_line)], "messages") == Usage(3, words, output_source="counted")


def test_a_whole_message_used() -> None:
    whole = {"type": "message", "content": [{"text": "x"}], "usage": anthropic(3, 2, 10, 100)}
    assert used([json.dumps(whole).encode()], "messages", stream=False) == Usage(113, 2, 100)
    whole["content"] = [{"text": "x" * 3 * TAIL}]
    assert used([json.dumps(whole).encode()], "messages", stream=False) == Usage(113, 2, 100)


# — responses


def response(usage: object, words: str = "", **members: Any) -> dict[str, Any]:
    """A response as OpenAI writes it, its text in the middle and its usage behind it."""
    return {"id": "r", "object": "response", "output": [{"text": words}], "usage": usage, "user": None, **members}


def newer(input_: int, output: int, cached: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": input_,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_ + output,
    }


def delta(words: str) -> bytes:
    return named("response.output_text.delta", delta=words)


CREATED = named("response.created", response=response(None)) + named("response.in_progress", response=response(None))
WORDS = "x" * 3 * TAIL

RESPONSES: dict[str, tuple[list[bytes], Usage]] = {
    "the last event has the whole response in it": (
        [CREATED, delta("a"), delta("b"), named("response.completed", response=response(newer(3, 2, 1)))],
        Usage(3, 2, 1),
    ),
    "however it ended": (
        [CREATED, delta("a"), named("response.incomplete", response=response(newer(3, 2, 1)))],
        Usage(3, 2, 1),
    ),
    "it may be longer than the tail": (
        [CREATED, delta(WORDS), named("response.completed", response=response(newer(3, 2, 1), WORDS))],
        Usage(3, 2, 1),
    ),
    "and its number may stand behind it": (
        [CREATED, event(type="response.completed", response=response(newer(3, 2), WORDS), sequence_number=9), DONE],
        Usage(3, 2),
    ),
    "a stream that is cut is counted by its words": (
        [CREATED, named("response.output_item.added"), delta("a"), delta("b"), named("response.output_text.done")],
        counted(2),
    ),
    "and so is one that failed": (
        [CREATED, delta("a"), named("response.failed", response=response(None))],
        counted(1),
    ),
    "calls of functions are words": (
        [CREATED, named("response.function_call_arguments.delta", delta="{")],
        counted(1),
    ),
    "a usage beside the response is another one": (
        [CREATED, delta("a"), named("x", usage=newer(9, 9)), named("y", response={"x": {"usage": newer(9, 9)}})],
        counted(1),
    ),
    "and so is one of an item": (
        [CREATED, delta("a"), named("z", item={"usage": newer(9, 9)})],
        counted(1),
    ),
    "wherever that stands": (
        [event(type="z", item={"usage": newer(9, 9)}) + delta("a")],
        counted(1),
    ),
}


@pytest.mark.parametrize(("chunks", "expected"), RESPONSES.values(), ids=RESPONSES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_what_a_stream_of_responses_used(chunks: list[bytes], expected: Usage, data: Any) -> None:
    assert used(pieces(b"".join(chunks), data), "responses") == expected


@pytest.mark.parametrize("words", ["a", WORDS])
def test_what_a_response_used(words: str) -> None:
    assert used([json.dumps(response(newer(3, 2, 1), words)).encode()], "responses", stream=False) == Usage(3, 2, 1)


# — endpoints whose answers hold no tokens of output

DATA = [{"embedding": [0.25] * 9000}]
COHERE = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1, "input_tokens": 5}}


@pytest.mark.parametrize(
    ("endpoint", "answer", "expected"),
    [
        ("embeddings", {"data": DATA, "usage": {"prompt_tokens": 3, "total_tokens": 3}}, Usage(3, 0)),
        ("embeddings", {"data": DATA, "usage": {"total_tokens": 3}}, Usage(3, 0)),
        ("embeddings", {"data": DATA, "usage": {**report(3, 9), "total_tokens": 12}}, Usage(3, 0)),
        ("embeddings", {"model": "m", "usage": {"prompt_tokens": 3, "total_tokens": 3}, "data": DATA}, Usage(3, 0)),
        ("embeddings", {"data": DATA, "usage": report(0, 0)}, counted(0)),
        ("embeddings", {"data": DATA}, counted(0)),
        ("rerank", {"results": DATA, "usage": {"total_tokens": 3}}, Usage(3, 0)),
        ("rerank", {"id": "r", "usage": {"prompt_tokens": 3, "total_tokens": 3}, "results": DATA}, Usage(3, 0)),
        ("rerank", {"results": DATA, "meta": COHERE}, Usage(5, 0)),
        ("rerank", {"results": DATA, "meta": {"tokens": {"input_tokens": 5, "output_tokens": 0}}}, Usage(5, 0)),
        (
            "rerank",
            {"results": DATA, "meta": {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": 5}}},
            Usage(5, 0),
        ),
        (
            "rerank",
            {"results": DATA, "meta": {"billed_units": {"search_units": 1}}},
            counted(0),
        ),
        ("images/generations", {"data": DATA, "usage": {"input_tokens": 3, "output_tokens": 272}}, Usage(3, 272)),
        ("images/generations", {"data": [{"b64_json": "x" * 2**22}]}, counted(0)),
        ("images/edits", {"data": [{"b64_json": "x" * 2**22}], "usage": newer(3, 2)}, Usage(3, 2)),
        ("audio/transcriptions", {"text": "a", "usage": {"type": "tokens", **newer(3, 2)}}, Usage(3, 2)),
        (
            "audio/transcriptions",
            {"text": "a", "usage": {"type": "duration", "seconds": 9}},
            counted(0),
        ),
        ("audio/translations", {"text": "a" * 9000}, counted(0)),
    ],
)
def test_what_answers_without_text_used(endpoint: str, answer: Any, expected: Usage) -> None:
    whole = json.dumps(answer).encode()
    assert used([whole], endpoint, stream=False) == expected
    assert used([whole[at : at + 1000] for at in range(0, len(whole), 1000)], endpoint, stream=False) == expected


def test_a_text_that_is_no_json_has_no_tokens_there() -> None:
    assert used([b"one two three"], "audio/transcriptions", stream=False) == counted(0)


@pytest.mark.parametrize(
    ("endpoint", "events", "expected"),
    [
        (
            "audio/transcriptions",
            [event(type="transcript.text.delta", delta="a"), event(type="transcript.text.done", usage=newer(3, 2))],
            Usage(3, 2),
        ),
        (
            "audio/transcriptions",
            [event(type="transcript.text.delta", delta="a")],
            counted(0),
        ),
        (
            "images/generations",
            [event(type="image_generation.completed", b64_json="x" * 2**20, usage=newer(3, 272))],
            Usage(3, 272),
        ),
    ],
)
def test_what_their_streams_used(endpoint: str, events: list[bytes], expected: Usage) -> None:
    assert used(events, endpoint) == expected
    assert used([b"".join(events)[at : at + 500] for at in range(0, len(b"".join(events)), 500)], endpoint) == expected


@pytest.mark.parametrize("where", ["results", "data"])
@pytest.mark.parametrize("padding", [0, 3 * TAIL])
def test_what_a_caller_sent_of_usage_is_not_believed(where: str, padding: int) -> None:
    """A backend may say a caller's documents back, and these may look like reports."""
    said = {"usage": {"total_tokens": 0}, "meta": {"tokens": {"input_tokens": 0}}}
    for answer in (
        {where: [{"document": said}, {"document": {"text": "x" * padding, **said}}]},
        {where: [{"document": said}, {"document": {**said, "text": "x" * padding}}]},
        {where: {**said, "x": {"y": "x" * padding, **said}}},
    ):
        whole = json.dumps(answer).encode()
        chunks = [whole[at : at + 1000] for at in range(0, len(whole), 1000)]
        assert used(chunks, "rerank", stream=False) == counted(0)


def test_more_is_not_counted_than_could_be_produced() -> None:
    """Log probabilities of a prompt follow the usage in vLLM's answers, and are a hundred bytes a token."""
    usage = {"usage": report(3, 2), "prompt_logprobs": [{"17": {"logprob": -0.5, "rank": 1}}] * 5000}
    answer = json.dumps({"choices": [{"text": "a"}], **usage}).encode()
    chunks = [answer[at : at + 1000] for at in range(0, len(answer), 1000)]
    assert used(chunks, stream=False, bound=16) == counted(16)
    assert used([word("a")] * 20, bound=16) == counted(20)  # events are there
    assert used([word("a"), event(usage=report(3, 20))], bound=16) == Usage(3, 20)


@pytest.mark.parametrize("stream", [True, False])
def test_a_route_is_metered_by_request(stream: bool) -> None:
    route = Endpoint("/v1/moderations*", body="any")
    for chunks in ([], [json.dumps({"usage": report(3, 2)}).encode()], [word("a"), word("b")]):
        assert used(chunks, route, stream=stream) == Usage(0, 0)


# — what it costs


USUAL = Price(200_000, 100_000, 900_000, 700_000)


@pytest.mark.parametrize(
    ("usage", "price", "expected"),
    [
        (Usage(1_000_000, 0), USUAL, 200_000),
        (Usage(0, 1_000_000), USUAL, 900_000),
        (Usage(1_000_000, 0, 1_000_000), USUAL, 100_000),
        (Usage(0, 1_000_000, 0, 1_000_000), USUAL, 700_000),
        (Usage(10, 5, 4), USUAL, 6),  # 1.2 + 0.4 + 4.5 = 6.1
        (Usage(0, 5), Price(output=100_000), 1),  # half a micro-dollar is one
        (Usage(0, 4), Price(output=100_000), 0),
        (Usage(1, 1), Price(400_000, output=400_000), 1),  # rounded once, not twice
        (Usage(10**9, 10**9), Price(10**10, 10**10, 10**10, 10**10), 2 * 10**13),
        (NOTHING, USUAL, 0),
    ],
)
def test_a_cost_is_rounded_once_to_the_micro_dollar(usage: Usage, price: Price, expected: int) -> None:
    assert usage.cost(price) == expected


TOKENS = st.integers(0, 10**9)
PRICES = st.builds(Price, *[st.integers(0, 10**10)] * 4)


@given(input_=TOKENS, output=TOKENS, cached=st.floats(0, 1), reasoning=st.floats(0, 1), price=PRICES)
def test_a_cost_is_the_nearest_micro_dollar_of_the_exact_sum(
    input_: int, output: int, cached: float, reasoning: float, price: Price
) -> None:
    usage = Usage(input_, output, int(input_ * cached), int(output * reasoning))
    dearer = ((usage.cached, price.cached_input - price.input), (usage.reasoning, price.reasoning - price.output))
    whole = ((input_, price.input), (output, price.output), *dearer)
    exact = sum(Fraction(tokens * each, 1_000_000) for tokens, each in whole)
    assert usage.cost(price) == floor(exact + Fraction(1, 2))


def test_a_total_is_input_and_output() -> None:
    assert Usage(3, 2, 1, 1).total == 5


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(3, 2), ("upstream", True)),
        (Usage(3, 2, input_source="counted"), ("counted", True)),
        (Usage(3, 2, output_source="counted"), ("counted", True)),
        (counted(2), ("counted", True)),
        (NOTHING, ("none", False)),
    ],
)
def test_one_word_says_where_both_numbers_came_from(usage: Usage, expected: tuple[str, bool]) -> None:
    assert (usage.source, usage.answered) == expected

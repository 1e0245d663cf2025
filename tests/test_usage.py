"""What an answer used, from its last bytes: whatever a backend reports, however its answer is cut into chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy import Model
from gateway.usage import NOTHING, TAIL, Tail, Usage, usage_of

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


def used(chunks: Iterable[bytes], *, stream: bool = True) -> Usage:
    tail = Tail()
    for chunk in chunks:
        tail.add(chunk)
    return usage_of(tail, stream=stream, input_estimate=ESTIMATE)


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
        Usage(ESTIMATE, 1, source="counted"),
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
    "less than nothing is nothing": ([event(usage=report(-3, -2, -1))], Usage(0, 0)),
    "more than is credible is cut": ([event(usage=report(2**62, 10**15, 10**15))], Usage(10**9, 10**9, 10**9)),
    "without a report events are counted": ([word("a"), word("b"), DONE], Usage(ESTIMATE, 2, source="counted")),
    "null is no report": ([word("a", usage=None), word("b", usage=None)], Usage(ESTIMATE, 2, source="counted")),
    "nothing is no report": ([word("a", usage={}), word("b")], Usage(ESTIMATE, 2, source="counted")),
    "a word is no report": ([word("a", usage="3"), word("b")], Usage(ESTIMATE, 2, source="counted")),
    "words are no numbers": (
        [word("a", usage={"prompt_tokens": "3", "completion_tokens": "2"})],
        Usage(ESTIMATE, 1, source="counted"),
    ),
    "half a report is none": (
        [word("a"), event(usage=report(3, 2))[:-20]],
        Usage(ESTIMATE, 1, source="counted"),
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
@given(data=st.data(), words=st.lists(st.integers(1, 3000), max_size=30), used_=st.integers(0, 10**6))
def test_a_long_stream_is_read_from_its_end(data: Any, words: list[int], used_: int) -> None:
    """Of whatever came before, some of the last bytes are kept, and not much more than asked for."""
    text = b"".join(word("x" * length, usage=report(3, 1)) for length in words) + word("", usage=report(3, used_))
    chunks = pieces(text + DONE, data)
    tail = Tail()
    for chunk in chunks:
        tail.add(chunk)
    assert usage_of(tail, stream=True, input_estimate=ESTIMATE) == Usage(3, used_)
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
    assert one_by_one in (Usage(3, 2, 1), Usage(ESTIMATE, 1, source="counted"))
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
        (document(None), Usage(ESTIMATE, 15, source="counted")),
        (document(report(3, 2, 1), text="x" * 3 * TAIL), Usage(3, 2, 1)),
        (document(report(3, 2), text='"usage": {"prompt_tokens": 9}' * TAIL), Usage(3, 2)),
        (json.dumps({"text": "x" * 3 * TAIL, "usage": report(3, 2)}, indent=2).encode(), Usage(3, 2)),
        (b"not json at all", Usage(ESTIMATE, 4, source="counted")),
        (b"x", Usage(ESTIMATE, 1, source="counted")),
        (b'{"usage": {"prompt_tokens": 3, ' * 1000, Usage(ESTIMATE, 7750, source="counted")),
        (b"x" * 2 * TAIL + b'"usage"', Usage(ESTIMATE, 4098, source="counted")),
        (b"x" * 2 * TAIL + b'"usage": null, "a": {"prompt_tokens": 9}', Usage(ESTIMATE, 4106, source="counted")),
        (b"", NOTHING),
    ],
)
def test_what_a_document_used(text: bytes, expected: Usage) -> None:
    assert used([text], stream=False) == expected
    assert used([text[at : at + 1000] for at in range(0, len(text), 1000)], stream=False) == expected


@given(chunks=st.lists(st.binary(max_size=200), max_size=20), stream=st.booleans())
def test_garbage_is_counted(chunks: list[bytes], stream: bool) -> None:
    found = used(chunks, stream=stream)
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
        b"\xff",
        b"1e999",
        b"9" * 30,
    ]
)


@given(signs=st.lists(SIGNS, max_size=40), before=st.sampled_from([0, TAIL]), stream=st.booleans())
def test_what_looks_like_usage_never_breaks_anything(signs: list[bytes], before: int, stream: bool) -> None:
    found = used([b"x" * before, *signs], stream=stream)
    assert 0 <= found.cached <= found.input <= 10**9
    assert 0 <= found.output <= 10**9


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
    ],
)
@pytest.mark.timeout(5)
def test_a_megabyte_of_traps_is_left_in_time(hole: bytes) -> None:
    """Whoever reads each of them to the end needs minutes, and the event loop stands still."""
    for stream in (True, False):
        assert used([hole], stream=stream).source == "counted"
        assert used([b"x" * TAIL, hole], stream=stream).source == "counted"


# — what it costs


def model(input_price: int, cached: int, output: int) -> Model:
    """Prices are micro-dollars per million tokens."""
    return Model("m", None, "demo", "fireworks", "m", 16, input_price, cached, output)


@pytest.mark.parametrize(
    ("usage", "prices", "expected"),
    [
        (Usage(1_000_000, 0), (200_000, 100_000, 900_000), 200_000),
        (Usage(0, 1_000_000), (200_000, 100_000, 900_000), 900_000),
        (Usage(1_000_000, 0, 1_000_000), (200_000, 100_000, 900_000), 100_000),
        (Usage(10, 5, 4), (200_000, 100_000, 900_000), 6),  # 1.2 + 0.4 + 4.5 = 6.1
        (Usage(0, 5), (0, 0, 100_000), 1),  # half a micro-dollar is one
        (Usage(0, 4), (0, 0, 100_000), 0),
        (Usage(1, 1), (400_000, 0, 400_000), 1),  # rounded once, not twice
        (Usage(10**9, 10**9), (10**10, 10**10, 10**10), 2 * 10**13),
        (NOTHING, (200_000, 100_000, 900_000), 0),
    ],
)
def test_a_cost_is_rounded_once_to_the_micro_dollar(usage: Usage, prices: tuple[int, int, int], expected: int) -> None:
    assert usage.cost(model(*prices)) == expected


def test_a_total_is_input_and_output() -> None:
    assert Usage(3, 2, 1).total == 5

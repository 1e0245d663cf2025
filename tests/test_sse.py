"""The usage event leaves a stream, and nothing else does; an error event is one to the clients that will read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, get_args

import anthropic
import fireworks
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.endpoints import ENDPOINTS, Endpoint, Events
from gateway.errors import RateLimited, UpstreamFailed, UpstreamTimeout
from gateway.sse import COMMENT, LAST_WORDS, LONGEST, UsageFilter, at_boundary, error_event, finished
from gateway.usage import TAIL
from tests.proving.backend import Backend, Peer, chunked

BOM = b"\xef\xbb\xbf"
DONE = b"data: [DONE]\n\n"
ENDS = (b"\n", b"\r\n", b"\r")
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def event(*lines: bytes, end: bytes = b"\n") -> bytes:
    return b"".join(line + end for line in (*lines, b""))


def data(end: bytes = b"\n", **members: Any) -> bytes:
    return event(b"data: " + json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode(), end=end)


def word(text: str, end: bytes = b"\n", **members: Any) -> bytes:
    return data(end, id="c", choices=[{"index": 0, "text": text}], **members)


def extra(end: bytes = b"\n", **members: Any) -> bytes:
    return data(end, id="c", choices=[], usage=USAGE, **members)


def sifted(chunks: Iterable[bytes]) -> tuple[bytes, bool]:
    """What the caller gets, and whether something was taken out."""
    usage = UsageFilter()
    return b"".join([*map(usage.feed, chunks), usage.flush()]), usage.removed


def single(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


def every_cut(stream: bytes) -> Iterable[list[bytes]]:
    yield single(stream)
    for at in range(len(stream) + 1):
        yield [stream[:at], stream[at:]]


# — what is taken out

# Data of the event that the caller did not ask for, as backends might write it, each by lines.
EXTRA: dict[str, list[bytes]] = {
    "compact": [b'data: {"id":"c","choices":[],"usage":{"total_tokens":5}}'],
    "with blanks": [b'data: { "choices" : [ ] , "usage" : { "total_tokens": 5 } } '],
    "without a blank after the colon": [b'data:{"choices":[],"usage":{"total_tokens":5}}'],
    "of no numbers": [b'data: {"choices":[],"usage":{}}'],
    "in any order, with more": ['data: {"usage":{"a":[{}]},"x":[[1]],"é":"ü\\n","choices":[]}'.encode()],
    "in several lines": [b"data: {", b'data: "choices":', b"data: [],", b'data:"usage"', b"data", b"data: :{}}"],
    "with other fields": [b"event: message", b"id: 7", b": hello", b'data: {"choices":[],"usage":{}}', b"retry: 1"],
}
# And what only looks like it.
OTHERS: dict[str, list[bytes]] = {
    "usage is null": [b'data: {"choices":[],"usage":null}'],
    "usage is a list": [b'data: {"choices":[],"usage":[]}'],
    "usage is missing": [b'data: {"choices":[],"x":{"usage":{}}}'],
    "choices are null": [b'data: {"choices":null,"usage":{}}'],
    "choices are missing": [b'data: {"x":{"choices":[]},"usage":{}}'],
    "choices are an object": [b'data: {"choices":{},"usage":{}}'],
    "there is a choice": [b'data: {"choices":[{"text":""}],"usage":{}}'],
    "there is a choice, of another kind": [b'data: {"choices":[0],"usage":{}}'],
    "the names are escaped": [b'data: {"\\u0063hoices":[],"usage":{}}'],
    "an object within a list": [b'data: [{"choices":[],"usage":{}}]'],
    "what the model says": [word('"choices":[],"usage":{}')[:-2]],
    "what the model says, with line ends": [word('\ndata: {"choices":[],"usage":{}}\n\n')[:-2]],
    "two objects": [b'data: {"choices":[],"usage":{}}', b'data: {"choices":[],"usage":{}}'],
    "half of it": [b'data: {"choices":[],"usage":{'],
    "half of it, and not UTF-8": [b'data: {"\xff":"\xff","choices":[],"usage":{'],
    "deep": [b'data: {"choices":[],"usage":{"a":' + b"[" * 5000],
    "a comment": [b': {"choices":[],"usage":{}}'],
    "a comment, of data": [b':data: {"choices":[],"usage":{}}'],
    "another field": [b'dat: {"choices":[],"usage":{}}', b'database: {"choices":[],"usage":{}}'],
    "a field that is indented": [b' data: {"choices":[],"usage":{}}'],
    "a byte order mark further on": [BOM + b'data: {"choices":[],"usage":{}}'],
    "done": [b"data: [DONE]"],
    "a name without a value": [b"data", b"event", b"id"],
    "unicode": ['data: {"choices":[{"text":"ü\u2028\u0085\x0b€😀"}]}'.encode()],
    "not JSON": [b"data: \xff\xfe\x00"],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("lines", EXTRA.values(), ids=EXTRA)
def test_the_usage_event_is_taken_out_with_its_blank_line_wherever_it_is_cut(lines: list[bytes], end: bytes) -> None:
    before, after = word("a", end), event(b"data: [DONE]", end=end)
    for chunks in every_cut(before + event(*lines, end=end) + after):
        assert (before + after, True) == sifted(chunks)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("lines", OTHERS.values(), ids=OTHERS)
def test_whatever_else_stays_as_it_is(lines: list[bytes], end: bytes) -> None:
    stream = event(b"data: 1", end=end) + event(*lines, end=end) + event(b"data: [DONE]", end=end)
    for chunks in every_cut(stream) if len(stream) < 1000 else [[stream], single(stream)]:
        assert (stream, False) == sifted(chunks)


@pytest.mark.parametrize("end", ENDS)
def test_a_byte_order_mark_stays_where_the_first_event_does_not(end: bytes) -> None:
    for chunks in every_cut(BOM + extra(end) + DONE):
        assert sifted(chunks) == (BOM + DONE, True)
    for stream in (BOM, BOM[:2], BOM[:1] + DONE, BOM + end + word("a", end)):
        for chunks in every_cut(stream):
            assert (stream, False) == sifted(chunks)


@pytest.mark.parametrize("end", ENDS)
def test_only_the_blank_line_that_ends_the_event_goes_with_it(end: bytes) -> None:
    for chunks in every_cut(end + extra(end) + end + end + extra(end) + end):
        assert (4 * end, True) == sifted(chunks)


def test_the_second_half_of_its_last_line_end_goes_too_when_it_comes_later() -> None:
    usage = UsageFilter()
    assert usage.feed(extra(b"\r\n")[:-1]) == b""
    assert usage.feed(b"") == b""
    assert usage.feed(b"\n\n" + DONE) == b"\n" + DONE


def test_an_event_without_its_blank_line_stays() -> None:
    for chunks in every_cut(DONE + extra()[:-1]):
        assert (DONE + extra()[:-1], False) == sifted(chunks)


# Pieces of a stream: what they are, and whether the caller did not ask for them. None begins with the LF that would
# make one line end of two, or with the mark that means nothing but at the start of a stream.
alone = ("deep", "a byte order mark further on")
blocks = st.sampled_from([*EXTRA.items(), *((name, lines) for name, lines in OTHERS.items() if name not in alone)])
pieces = st.one_of(
    st.builds(lambda item, end: (event(*item[1], end=end), item[0] in EXTRA), blocks, st.sampled_from(ENDS)),
    st.builds(lambda text, end: (word(text, end, usage=None), False), st.text(max_size=20), st.sampled_from(ENDS)),
    st.builds(lambda text, end: (word(text, end, usage=USAGE), False), st.text(max_size=20), st.sampled_from(ENDS)),
    st.builds(lambda text, end: (extra(end, model=text), True), st.text(max_size=20), st.sampled_from(ENDS)),
    st.sampled_from([(COMMENT, False), (b"\r\n", False), (DONE, False)]),
)
streams = st.tuples(st.sampled_from([b"", BOM]), st.lists(pieces, max_size=8), st.sampled_from([b"", b"data: 1", b":"]))


@settings(max_examples=400, deadline=None)
@given(stream=streams, draw=st.data())
def test_of_any_stream_in_any_pieces_exactly_the_usage_events_are_taken_out(
    stream: tuple[bytes, list[tuple[bytes, bool]], bytes], draw: Any
) -> None:
    """And after each chunk all events that are whole have left, up to the second half of a CRLF."""
    mark, events, rest = stream
    parts = [(mark, False), *events]
    whole = b"".join(part for part, _ in parts) + rest
    expected = b"".join(part for part, taken in parts if not taken) + rest
    if draw.draw(st.booleans()):
        chunks = single(whole)
    else:
        cuts = sorted(draw.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
        chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    usage = UsageFilter()
    came, got = 0, b""
    for chunk in chunks:
        came, got = came + len(chunk), got + usage.feed(chunk)
        ended = due = 0
        for part, taken in parts:
            ended += len(part)
            due += 0 if taken or ended > came else len(part)
        assert expected.startswith(got)
        assert due <= len(got)
    assert (expected, any(taken for _, taken in events)) == (got + usage.flush(), usage.removed)


# — what is held


@pytest.mark.parametrize("end", ENDS[:2])
def test_a_chunk_of_whole_events_passes_as_the_same_object(end: bytes) -> None:
    usage = UsageFilter()
    usage.feed(word("a", end))
    for chunk in (word("b", end), word("c", end, usage=None) + word("d", end, usage=USAGE), event(b"data: [DONE]")):
        assert usage.feed(chunk) is chunk


def test_a_part_of_an_event_waits_for_its_blank_line() -> None:
    usage = UsageFilter()
    assert [usage.feed(part) for part in (b"data: 1", b"\n", b"\ndata", b": 2\r\n\r", b"\n")] == [
        b"",
        b"",
        b"data: 1\n\n",
        b"data: 2\r\n\r",
        b"\n",
    ]
    usage.feed(b"data: 3")
    assert "7 bytes held" in repr(usage)
    assert (usage.flush(), usage.flush()) == (b"data: 3", b"")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("over", [0, 1])
def test_an_event_of_more_than_the_longest_is_not_taken_out(end: bytes, over: int) -> None:
    padding = LONGEST + over - len(extra(end, x="")) + 2 * len(end)
    long = extra(end, x="x" * padding)
    expected = (DONE + over * long + DONE, not over)
    whole = DONE + long + extra(end) + DONE
    for at in (0, len(DONE), len(DONE) + 1, *range(len(DONE + long) - 5, len(DONE + long) + 2)):
        assert (expected[0], True) == sifted([whole[:at], whole[at:]])
    assert expected == sifted(single(DONE + long + DONE))


def test_a_long_event_passes_as_it_comes_and_the_usage_after_it_is_taken_out() -> None:
    usage = UsageFilter()
    assert usage.feed(b"data: " + b"x" * (LONGEST - 6)) == b""
    assert len(usage.feed(b"xxx")) == LONGEST + 3
    for chunk in (b"x", b"\r", b"\ndata: ", extra()[6:-2], b"\r\n", b"data: 2", b"\n"):
        assert usage.feed(chunk) == chunk
        assert len(usage._held) == 2
    assert usage.feed(b"\n" + extra() + DONE) == b"\n" + DONE
    assert usage.removed


def test_the_end_of_a_long_event_is_no_event() -> None:
    usage = UsageFilter()
    usage.feed(b"data: " + b"x" * LONGEST)
    assert usage.feed(b"\n" + extra()) == b"\n" + extra()
    assert (usage.feed(extra()), usage.removed) == (b"", True)
    usage.feed(b"data: " + b"x" * LONGEST)
    assert usage.flush() == b""


@pytest.mark.parametrize("line", [b"data: " + b"x" * 2**20, b"data: 1\n" * 2**17, b'data: "choices"\r' * 2**16])
def test_work_grows_with_the_length_of_an_event_and_not_faster(line: bytes) -> None:
    """In a second or so; what starts again at the beginning with each piece needs minutes."""
    stream = line + b"\n\n" + extra()
    assert sifted(stream[i : i + 4] for i in range(0, len(stream), 4)) == (line + b"\n\n", True)


@pytest.mark.parametrize("end", ENDS)
def test_work_grows_with_the_number_of_events_and_not_faster(end: bytes) -> None:
    stream = (word("a", end) + event(b'data: {"choices": [], "usage": null}', end=end)) * 10_000
    assert sifted([b"data", stream, extra(end), stream]) == (b"data" + 2 * stream, True)


# — the event that says that the stream failed

FAILED = UpstreamFailed('the "upstream" closed its line:\n\nearly', code="upstream_disconnected")
HEAD: dict[str, Any] = {"id": "cmpl-1", "created": 1_700_000_000, "model": "qwen3-8b"}
NOTHING = {"id": "", "created": 0, "model": ""}


def told(tail: bytes, endpoint: str = "completions") -> dict[str, Any]:
    """The error event that follows a tail, as an object."""
    text, rest = error_event(tail, ENDPOINTS[endpoint], FAILED).split(b"\n\n")
    assert rest == b""
    assert (text[:6], text.count(b"\n"), text.count(b"\r")) == (b"data: ", 0, 0)
    found: dict[str, Any] = json.loads(text[6:])
    return found


@pytest.mark.parametrize(
    ("endpoint", "kind", "nothing"),
    [("completions", "text_completion", {"text": ""}), ("chat/completions", "chat.completion.chunk", {"delta": {}})],
)
def test_the_error_event_is_a_chunk_of_its_stream_and_the_last_one(
    endpoint: str, kind: str, nothing: dict[str, Any]
) -> None:
    tail = data(**HEAD, choices=[{"index": 1, "text": "SECRET", "delta": {"content": "SECRET"}}], usage=USAGE)
    assert told(tail, endpoint) == {
        **HEAD,
        "object": kind,
        "choices": [{"index": 0, **nothing, "logprobs": None, "finish_reason": "error"}],
        "usage": None,
        "error": {
            "message": FAILED.message,
            "type": "server_error",
            "param": None,
            "code": "upstream_disconnected",
        },
    }


# Tails, and what is known of the stream from them.
TAILS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "nothing": (b"", NOTHING),
    "comments": (COMMENT + COMMENT, NOTHING),
    "the last event counts": (data(id="x", created=1, model="y") + data(**HEAD), HEAD),
    "what is not an object is passed over": (
        data(**HEAD) + COMMENT + b"data: 7\n\ndata: {\n\ndata: [1]\n\n" + DONE,
        HEAD,
    ),
    "what is not UTF-8 is passed over": (data(**HEAD) + b'data: {"id":"\xff"}\n\n', HEAD),
    "what is too deep is passed over": (data(**HEAD) + b'data: {"x":' + b"[" * 9000 + b"\n\n", HEAD),
    "a number out of range is passed over": (data(**HEAD) + b'data: {"created":1e999}\n\n', HEAD),
    "half a surrogate is passed over": (data(**HEAD) + b'data: {"id":"\\ud800"}\n\n', HEAD),
    "an event that has not ended does not count": (data(**HEAD) + data(id="x", created=1, model="y")[:-1], HEAD),
    "the first event is cut": (data(**HEAD)[20:] + data(**HEAD), HEAD),
    "the only event is cut": (data(**HEAD)[20:], NOTHING),
    "it may be named, and end in any way": (event(b"event: x", data(**HEAD)[:-2], end=b"\r"), HEAD),
    "it may stand in several lines": (
        event(*(b"data:" + x for x in json.dumps(HEAD, indent=1).encode().split(b"\n"))),
        HEAD,
    ),
    "members may be missing": (data(id="c"), {**NOTHING, "id": "c"}),
    "members may be null": (data(id=None, created=None, model=None), NOTHING),
    "members may be of any type": (data(id=7, created="7", model={"a": 1}), NOTHING),
    "true is no time": (data(created=True), NOTHING),
    "a fraction is no time": (data(created=1.5), NOTHING),
    "what is no time at all": (data(created=2**64), NOTHING),
    "before all times": (data(created=-1), NOTHING),
    "256 characters are a name": (data(id="é" * 256, model="é" * 257), {**NOTHING, "id": "é" * 256}),
    "a name may have anything in it": (
        data(**{**HEAD, "id": '"\n\n\r\0\u2028data: '}),
        {**HEAD, "id": '"\n\n\r\0\u2028data: '},
    ),
}


@pytest.mark.parametrize(("tail", "expected"), TAILS.values(), ids=TAILS)
def test_the_error_event_is_called_as_the_last_event_before_it(tail: bytes, expected: dict[str, Any]) -> None:
    assert {name: told(tail)[name] for name in NOTHING} == expected


TAIL_OF_ANY = st.binary(max_size=50) | st.lists(pieces, max_size=3).map(lambda parts: b"".join(p for p, _ in parts))


@settings(max_examples=100, deadline=None)
@given(tail=TAIL_OF_ANY)
def test_an_error_event_can_be_made_of_any_tail(tail: bytes) -> None:
    assert told(tail[-TAIL:])["choices"][0]["finish_reason"] == "error"
    for endpoint in ENDPOINTS.values():
        made = error_event(tail[-TAIL:], endpoint, FAILED)
        assert (made[-2:], made.count(b"\n\n"), b"[DONE]" in made) == (b"\n\n", 1, False)
        assert isinstance(json.loads(made.partition(b"data: ")[2]), dict)


def test_the_error_event_of_messages_is_anthropics() -> None:
    made = error_event(data(**HEAD), ENDPOINTS["messages"], RateLimited("over its rate"), "req_1")
    name, text = made.removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    assert json.loads(text.removeprefix(b"data: ")) == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "over its rate"},
        "request_id": "req_1",
    }


# Tails of responses, and the number of the event that follows.
NUMBERED: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 0),
    "comments": (COMMENT, 0),
    "the last event counts": (data(sequence_number=3) + data(sequence_number=4), 5),
    "even if it is named": (event(b"event: x", data(type="x", sequence_number=0)[:-2]), 1),
    "one without a number is passed over": (data(sequence_number=3) + data(type="x"), 4),
    "so is one that is cut": (data(sequence_number=3) + data(sequence_number=9)[:-1], 4),
    "and one whose number is none": (
        data(sequence_number=3) + data(sequence_number="9") + data(sequence_number=-2) + data(sequence_number=2.5),
        4,
    ),
    "and one that is beyond belief": (data(sequence_number=2**60) + data(sequence_number=True), 0),
}


@pytest.mark.parametrize(("tail", "number"), NUMBERED.values(), ids=NUMBERED)
def test_the_error_event_of_responses_is_numbered(tail: bytes, number: int) -> None:
    made = error_event(tail, ENDPOINTS["responses"], FAILED)
    name, text = made.removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    assert json.loads(text.removeprefix(b"data: ")) == {
        "type": "error",
        "code": "upstream_disconnected",
        "message": FAILED.message,
        "param": None,
        "sequence_number": number,
    }


@pytest.mark.parametrize("endpoint", [ENDPOINTS["audio/transcriptions"], Endpoint("/v1/any*", body="any")])
def test_the_error_event_of_all_others_is_openais_error_object(endpoint: Endpoint) -> None:
    made = error_event(data(**HEAD), endpoint, FAILED)
    assert json.loads(made.removeprefix(b"data: ")) == {"error": FAILED.body()["error"]}


# — the end of a stream

REPEATED = data(type="response.completed", response={"output": "x" * TAIL, "usage": USAGE}, sequence_number=9)
IMAGE = data(type="image_edit.completed", b64_json="x" * TAIL, usage=USAGE)

# Tails of streams that are not delimited, and whether the answer is whole.
FINISHED: dict[str, tuple[bytes, bool]] = {
    "nothing": (b"", False),
    "OpenAI's mark": (word("a") + DONE, True),
    "a choice that is finished": (data(choices=[{"text": "", "finish_reason": "stop"}]), True),
    "a choice that is not, as LocalAI writes it": (data(choices=[{"text": "a", "finish_reason": ""}]), False),
    "a choice that is not": (data(choices=[{"text": "a", "finish_reason": None}]), False),
    "Anthropic's last event": (event(b"event: message_stop", b'data: {"type": "message_stop"}'), True),
    "Anthropic's last but one": (event(b"event: message_delta", b'data: {"type": "message_delta"}'), False),
    "its name alone": (b"event: message_stop\n", False),
    "a completed response": (data(type="response.completed"), True),
    "a failed response": (data(type="response.failed"), True),
    "an incomplete response": (data(type="response.incomplete"), True),
    "a response that goes on": (data(type="response.output_text.done"), False),
    "a transcript": (data(type="transcript.text.done"), True),
    "a part of a transcript": (data(type="transcript.text.delta"), False),
    "an image": (data(type="image_generation.completed"), True),
    "an edited image": (data(type="image_edit.completed"), True),
    "a part of an image": (data(type="image_generation.partial_image"), False),
    "the end of a long response": (REPEATED[-TAIL:], True),
    "the end of a long image": (IMAGE[-TAIL:], True),
    "the end of a long image, as on the wire of HTTP": (IMAGE[-TAIL:].replace(b"\n", b"\r\n"), True),
    "the end of a long event that is cut": (REPEATED[-TAIL:-2], False),
    "the end of a long event without usage": (data(type="x", b64_json="x" * TAIL)[-TAIL:], False),
    "a short event with usage": (data(choices=[], usage=USAGE), False),
    "a named event with usage": (event(b"event: message_start", data(message={"usage": USAGE})[:-2]), False),
    "an event with usage that is not the last one": (IMAGE[-TAIL:] + data(type="x"), False),
    "what the model says of OpenAI's mark": (word("data: [DONE] [DONE]"), False),
    "OpenAI's mark alone": (b"data:[DONE]\r\n\r\n", True),
    "what the model says of it": (word('{"type": "message_stop"} "type": "response.completed"'), False),
}


@pytest.mark.parametrize(("tail", "expected"), FINISHED.values(), ids=FINISHED)
def test_whether_a_stream_has_finished(tail: bytes, expected: bool) -> None:
    assert finished(tail) is expected


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "trap",
    [b'"usage":{' * 100_000, b'"usage"' + b" " * 10**6, b'"type"' + b" " * 10**6, b'"finish_reason"' + b" " * 10**6],
)
def test_whether_a_stream_has_finished_is_known_in_time(trap: bytes) -> None:
    assert not finished(trap)
    assert not finished(trap + b"\nx")


# The last event of each kind of stream, as backends send it.
LAST: dict[Events, list[bytes]] = {
    "completions": [DONE, b"data:[DONE]\r\n\r\n"],
    "chat": [DONE],
    "responses": [DONE],
    "messages": [
        event(b"event: message_stop", b'data: {"type":"message_stop"}'),
        event(b"event: message_stop", b'data: {"type": "message_stop"            }', end=b"\r\n"),
        event(
            b"event: message_stop",
            b'data: {"type":"message_stop","amazon-bedrock-invocationMetrics":{"inputTokenCount":1000000,'
            b'"outputTokenCount":1000000,"invocationLatency":1000000,"firstByteLatency":1000000,'
            b'"cacheReadInputTokenCount":1000000,"cacheWriteInputTokenCount":1000000}}',
        ),
    ],
    "other": [DONE],
}


@pytest.mark.parametrize("events", get_args(Events))
def test_the_last_word_of_a_stream_stands_at_its_end(events: Events) -> None:
    marker, within = LAST_WORDS[events]
    for last in LAST[events]:
        assert marker in (word("a") + last)[-within:]
    assert marker not in word('"message_stop"')[-within:]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b"", True),
        (b"\n", True),
        (b"\r\n", True),
        (b"\r", True),
        (b"data: 1\n\n", True),
        (b"data: 1\r\n\r\n", True),
        (b"data: 1\r\r", True),
        (b"data: 1\r\n\n", True),
        (b"data: 1\n\r\n", True),
        (b"data: 1\r\r\n", True),
        (b"data: 1\r\n\r", True),
        (b"data: 1\n\r", True),
        (b"1\n\n", True),
        (COMMENT, True),
        (b"data: 1\r\n", False),
        (b"a\r\n", False),
        (b"aa\r\n", False),
        (b"data: 1\n", False),
        (b"data: 1\r", False),
        (b"data: 1", False),
        (b"\n\ndata", False),
        (b"\n\n\n1", False),
        (COMMENT[:-1], False),
    ],
)
def test_an_event_may_follow_a_blank_line(tail: bytes, expected: bool) -> None:
    assert at_boundary(tail) is expected


# — to the clients that read it

PATHS = {"completions": "/v1/completions", "chat/completions": "/v1/chat/completions"}
ASKED: dict[str, Any] = {"model": "m", "stream": True}


def failing(endpoint: str, *before: bytes) -> Backend:
    """A stream that sends a comment and some events, and then fails as ours do."""
    error = UpstreamTimeout("the upstream fell silent", code="upstream_idle_timeout")
    sent = b"".join((COMMENT, *before))
    return Backend(Peer.request, chunked(sent, error_event(sent, ENDPOINTS[endpoint], error, "req_1")))


def chunk(endpoint: str, end: bytes) -> bytes:
    text: dict[str, Any] = {"text": "a"} if endpoint == "completions" else {"delta": {"content": "a"}}
    return data(end, **HEAD, object="x", choices=[{"index": 0, **text, "finish_reason": None}])


async def read(client: Any, endpoint: str, into: list[Any]) -> None:
    if endpoint == "completions":
        stream = await client.completions.create(prompt="p", **ASKED)
    else:
        stream = await client.chat.completions.create(messages=[{"role": "user", "content": "p"}], **ASKED)
    async for chunk in stream:
        into.append(chunk)  # noqa: PERF401 — what came before it raises is kept


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("endpoint", PATHS)
async def test_the_openai_client_raises_our_error(endpoint: str, end: bytes) -> None:
    chunks: list[Any] = []
    async with failing(endpoint, chunk(endpoint, end)) as backend:
        async with openai.AsyncOpenAI(base_url=backend.url + "/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.APIError) as caught:
                await read(client, endpoint, chunks)
    error = caught.value
    assert (error.message, error.code, error.type) == (
        "the upstream fell silent",
        "upstream_idle_timeout",
        "server_error",
    )
    assert len(chunks) == 1


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("endpoint", PATHS)
async def test_the_fireworks_client_sees_an_answer_that_ended_with_an_error(endpoint: str, end: bytes) -> None:
    chunks: list[Any] = []
    async with failing(endpoint, chunk(endpoint, end)) as backend:
        async with fireworks.AsyncFireworks(base_url=backend.url, api_key="k", max_retries=0) as client:
            await read(client, endpoint, chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "error"]
    assert [(chunk.id, chunk.created, chunk.model) for chunk in chunks] == [tuple(HEAD.values())] * 2


MESSAGE = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "m", "usage": {"input_tokens": 1}}


async def test_the_anthropic_client_raises_our_error() -> None:
    first = event(b"event: message_start", data(type="message_start", message=MESSAGE)[:-2])
    seen: list[Any] = []
    async with failing("messages", first) as backend:
        async with anthropic.AsyncAnthropic(base_url=backend.url, api_key="k", max_retries=0) as client:
            asked: dict[str, Any] = {**ASKED, "max_tokens": 1, "messages": [{"role": "user", "content": "p"}]}
            with pytest.raises(anthropic.APIStatusError) as caught:
                async for event_ in await client.messages.create(**asked):
                    seen.append(event_.type)  # noqa: PERF401 — what came before it raises is kept
    assert seen == ["message_start"]
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "timeout_error", "message": "the upstream fell silent"},
        "request_id": "req_1",
    }


async def test_the_openai_client_reads_an_error_event_of_responses() -> None:
    first = event(b"event: response.output_text.delta", data(type="response.output_text.delta", sequence_number=6)[:-2])
    seen: list[Any] = []
    async with failing("responses", first) as backend:
        async with openai.AsyncOpenAI(base_url=backend.url + "/v1", api_key="k", max_retries=0) as client:
            asked: dict[str, Any] = {**ASKED, "input": "p"}
            stream = await client.responses.create(**asked)
            seen = [event_ async for event_ in stream]
    assert [type(event_).__name__ for event_ in seen] == ["ResponseTextDeltaEvent", "ResponseErrorEvent"]
    assert (seen[1].code, seen[1].message, seen[1].sequence_number) == (
        "upstream_idle_timeout",
        "the upstream fell silent",
        7,
    )


async def test_the_openai_client_raises_our_error_from_any_other_stream() -> None:
    async with failing("images/generations", data(type="image_generation.partial_image")) as backend:
        async with openai.AsyncOpenAI(base_url=backend.url + "/v1", api_key="k", max_retries=0) as client:
            asked: dict[str, Any] = {**ASKED, "prompt": "p"}
            with pytest.raises(openai.APIError, match="the upstream fell silent") as caught:
                async for _ in await client.images.generate(**asked):
                    pass
    assert caught.value.code == "upstream_idle_timeout"

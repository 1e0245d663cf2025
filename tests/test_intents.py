"""What is written down of a request before it is served is enough to settle it, and to correct that afterwards."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.intents import Intent, correction, interrupted, read_intent, read_progress
from gateway.language import Count
from gateway.records import COUNTERS, Price, Source, UsageRecord
from gateway.terms import used
from gateway.usage import Progress, Usage
from tests.proving.rows import record

TEXT = st.text(max_size=20)
TOKENS = st.integers(0, 10**9)
PRICES = st.builds(Price, *[st.integers(0, 10**9)] * 4)
SOURCES = st.sampled_from(get_args(Source))
COUNTS: tuple[Count, ...] = get_args(Count)


@st.composite
def progresses(draw: st.DrawFn) -> Progress:
    input_, output = draw(TOKENS), draw(TOKENS)
    return Progress(
        input=input_,
        cached=draw(st.integers(0, input_)),
        output=output,
        reasoning=draw(st.integers(0, output)),
        input_source=draw(SOURCES),
        output_source=draw(SOURCES),
        http_status=draw(st.integers(200, 599)),
        attempt=draw(st.integers(1, 9)),
        bytes_out=draw(TOKENS),
        first_byte_ms=draw(TOKENS),
        upstream=draw(TEXT),
        served_model=draw(TEXT),
    )


WORDS = st.builds(
    lambda kind, amount, rest: (kind, 0, amount, *rest),
    st.sampled_from("rqw"),
    TOKENS,
    st.lists(st.integers(0, 2**53), min_size=1, max_size=5),
)
INTENTS = st.builds(
    Intent,
    team=TEXT,
    key=TEXT,
    user=st.none() | TEXT,
    model=TEXT,
    pool=TEXT,
    endpoint=TEXT,
    stream=st.booleans(),
    price=PRICES,
    received_ms=TOKENS,
    bytes_in=TOKENS,
    input_estimate=TOKENS,
    charges=st.lists(st.tuples(TEXT, st.sampled_from(COUNTS), WORDS), max_size=4).map(tuple),
)


def counters(row: UsageRecord) -> dict[str, int]:
    return {name: getattr(row, name) for name in COUNTERS}


@given(INTENTS, st.none() | progresses())
def test_an_intent_and_its_progress_are_read_as_they_were_written_each_on_one_line(
    intent: Intent, progress: Progress | None
) -> None:
    """The reservation parts them by a line feed."""
    text = msgspec.json.encode(intent)
    so_far = b"" if progress is None else msgspec.json.encode(progress)
    assert b"\n" not in text + so_far
    assert read_intent(text) == intent
    assert read_progress(so_far) == progress


@given(INTENTS, st.none() | progresses())
def test_an_interrupted_row_says_what_is_known_and_no_more(intent: Intent, progress: Progress | None) -> None:
    row = interrupted("req_1", "acme", intent, progress, ended_ms=7)
    assert (row.id, row.status, row.ended, row.ended_ms) == ("req_1", "interrupted", "gateway", 7)
    for name in ("team", "key", "user", "model", "pool", "endpoint", "stream", "price", "received_ms", "bytes_in"):
        assert getattr(row, name) == getattr(intent, name)
    told: dict[str, Any]
    if progress is None:
        told = {"input_tokens": intent.input_estimate, "cached_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0}
        told |= {"input_source": "reserved", "output_source": "reserved", "requests": 1, "http_status": 0}
        told |= {"upstream": None, "served_model": None, "attempt": 0, "first_byte_ms": None, "bytes_out": 0}
    else:
        told = {"input_tokens": progress.input, "cached_tokens": progress.cached, "output_tokens": progress.output}
        told |= {"reasoning_tokens": progress.reasoning, "requests": int(progress.input_source != "none")}
        alike = ("input_source", "output_source", "http_status", "upstream", "served_model", "attempt")
        told |= {name: getattr(progress, name) for name in (*alike, "first_byte_ms", "bytes_out")}
    assert {name: getattr(row, name) for name in told} == told
    usage = Usage(row.input_tokens, row.output_tokens, row.cached_tokens, row.reasoning_tokens)
    assert row.cost_microusd == usage.cost(intent.price)


@given(INTENTS, st.none() | progresses())
def test_what_was_reserved_and_its_correction_are_what_was_used(intent: Intent, progress: Progress | None) -> None:
    usage = intent.usage(progress)
    corrected = intent.corrections(usage)
    assert len(corrected) == len(intent.charges)
    for (key, count, reserved), (corrected_key, words) in zip(intent.charges, corrected, strict=True):
        (kind, none, amount, *rest), (_, difference, _, *_) = reserved, words
        assert (corrected_key, none, words[0], words[2:]) == (key, 0, kind, (amount, *rest))
        assert isinstance(difference, int)
        assert isinstance(amount, int)
        assert amount + difference == used(count, usage, intent.price)


@given(INTENTS, st.none() | progresses(), progresses(), st.integers(0, 1))
def test_an_interrupted_row_and_its_correction_are_what_was_used_after_all(
    intent: Intent, progress: Progress | None, end: Progress, requests: int
) -> None:
    charged = interrupted("req_1", "acme", intent, progress, ended_ms=7)
    usage = intent.usage(end)
    late = record(
        id="req_1",
        price=intent.price,
        requests=requests,
        input_tokens=usage.input,
        cached_tokens=usage.cached,
        output_tokens=usage.output,
        reasoning_tokens=usage.reasoning,
        cost_microusd=usage.cost(intent.price),
    )
    row = correction(late, charged)
    assert (row.id, row.status) == ("req_1:correction", "correction")
    both = {name: counters(charged)[name] + counters(row)[name] for name in COUNTERS}
    assert both == counters(late)
    assert msgspec.structs.replace(row, id=late.id, status=late.status, **counters(late)) == late


WELL = ["t", "k", None, "m", "p", "completions", False, {"input": 1}, 1, 2, 3, [["key", "usd", ["q", 0, 5, 1, 9]]]]
ILL: dict[str, object] = {
    "nothing": None,
    "too short": WELL[:5],
    "a number for a name": [7, *WELL[1:]],
    "a limit that counts what nobody counts": [*WELL[:11], [["key", "words", ["q", 0, 5, 1, 9]]]],
    "too few words": [*WELL[:11], [["key", "usd", ["q", 0]]]],
    "a word for an amount": [*WELL[:11], [["key", "usd", ["q", 0, "5", 1, 9]]]],
}


@pytest.mark.parametrize("ill", ILL)
def test_what_is_no_intent_is_told_as_that(ill: str) -> None:
    assert read_intent(msgspec.json.encode(WELL)).input_estimate == 3
    with pytest.raises(msgspec.DecodeError):
        read_intent(msgspec.json.encode(ILL[ill]))

"""What travels, what is said of the way, and what came in a circle."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import LoopDetected, VersionNotSupported
from gateway.hops import Way, carried, parent_of, pseudonym, travelling

NAME = b"gw-0123456789ab"
SPAN = bytes(range(16))
TRACE, PARENT = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"


def way(*headers: tuple[bytes, bytes], **scope: Any) -> dict[bytes, bytes]:
    whole = {"http_version": "1.1", "scheme": "http", "client": ("10.1.2.3", 5), "headers": list(headers), **scope}
    return dict(Way(whole, NAME, b"r1", SPAN).headers)


# — what travels


def test_headers_travel_by_a_table_and_a_pool_adds_to_it() -> None:
    given = [(b"accept", b"a"), (b"x-mine", b"1"), (b"cookie", b"c"), (b"accept", b"b")]
    assert carried(given, travelling()) == [(b"accept", b"a"), (b"accept", b"b")]
    assert carried(given, travelling(["x-mine"])) == [(b"accept", b"a"), (b"x-mine", b"1"), (b"accept", b"b")]


def test_what_connection_names_stays() -> None:
    given = [(b"connection", b"close, X-Session-Affinity"), (b"x-session-affinity", b"1"), (b"accept", b"a")]
    assert carried(given, travelling()) == [(b"accept", b"a")]


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20))))
def test_no_name_is_ever_the_callers(headers: list[tuple[bytes, bytes]]) -> None:
    table = travelling()
    assert {name for name, _ in carried(headers, table)} <= set(table.values())


# — Via, and circles


def test_via_is_added_to() -> None:
    assert way()[b"via"] == b"1.1 " + NAME
    assert way((b"via", b"1.0 fred"), (b"via", b"1.1 p.example"))[b"via"] == b"1.0 fred, 1.1 p.example, 1.1 " + NAME


def test_http_1_0_is_told_what_to_speak() -> None:
    with pytest.raises(VersionNotSupported, match=r"expected HTTP/1\.1"):
        way(http_version="1.0")


@pytest.mark.parametrize(
    "via", [b"1.1 " + NAME, b"1.0 fred, 1.1 " + NAME + b" (a comment), 1.1 x", b"HTTP/1.1\t" + NAME]
)
def test_what_was_here_before_is_refused(via: bytes) -> None:
    with pytest.raises(LoopDetected) as found:
        way((b"via", via))
    assert found.value.status == 508
    assert (b"x-should-retry", b"false") in found.value.headers()


@pytest.mark.parametrize(
    "via", [b"1.1 gw-other", NAME, b"1.1 x" + NAME, b"1.1 fred (" + NAME + b")", b"", b", ,", b"1.1"]
)
def test_another_gateway_is_no_circle(via: bytes) -> None:
    assert way((b"via", via))[b"via"].endswith(b"1.1 " + NAME)


def test_the_name_is_the_same_for_one_secret_and_tells_nothing_of_it() -> None:
    assert pseudonym(b"a") == pseudonym(b"a") != pseudonym(b"b")
    assert re.fullmatch(rb"gw-[0-9a-f]{12}", pseudonym(b"a"))


# — Forwarded


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("10.1.2.3", 5), b"for=10.1.2.3;proto=http;by=_" + NAME),
        (("2001:db8::1", 5), b'for="[2001:db8::1]";proto=http;by=_' + NAME),
        (None, b"for=unknown;proto=http;by=_" + NAME),
    ],
)
def test_the_caller_is_told_as_he_was_seen(client: object, expected: bytes) -> None:
    assert way((b"forwarded", b"for=evil"), client=client)[b"forwarded"] == expected


# — traces


def test_a_trace_goes_on_with_a_span_of_our_own() -> None:
    found = way((b"traceparent", b"00-%b-%b-01" % (TRACE, PARENT)), (b"tracestate", b"a=1"), (b"tracestate", b"b=2"))
    assert found[b"traceparent"] == b"00-%b-0001020304050607-01" % TRACE
    assert found[b"tracestate"] == b"a=1,b=2"


def test_a_later_version_is_read_by_its_first_fields() -> None:
    assert way((b"traceparent", b"01-%b-%b-01-more" % (TRACE, PARENT)))[b"traceparent"].split(b"-")[1] == TRACE


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        b"00-%b-%b-01-more" % (TRACE, PARENT),
        b"ff-%b-%b-01" % (TRACE, PARENT),
        b"00-%b-%b-01" % (b"0" * 32, PARENT),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-01" % (TRACE.upper(), PARENT),
        b"00-%b-%b" % (TRACE, PARENT),
    ],
)
def test_what_is_no_trace_begins_a_new_one_without_its_state(parent: bytes) -> None:
    found = way((b"traceparent", parent), (b"tracestate", b"a=1"))
    assert found[b"traceparent"] == b"00-%b-0001020304050607-02" % SPAN.hex().encode(), "whose id is random"
    assert b"tracestate" not in found


def test_two_parents_are_none() -> None:
    parent = (b"traceparent", b"00-%b-%b-01" % (TRACE, PARENT))
    assert way(parent, parent)[b"traceparent"].split(b"-")[1] == SPAN.hex().encode()


@pytest.mark.parametrize(
    ("flags", "samples", "expected"),
    [(b"01", False, b"00"), (b"00", True, b"01"), (b"03", False, b"02"), (b"fe", True, b"03"), (None, True, b"03")],
)
def test_who_samples_says_so_and_leaves_whether_the_id_is_random(
    flags: bytes | None, samples: bool, expected: bytes
) -> None:
    asked = []
    headers = [] if flags is None else [(b"traceparent", b"00-%b-%b-%b" % (TRACE, PARENT, flags))]
    scope = {"http_version": "1.1", "scheme": "http", "client": None, "headers": headers}
    found = Way(scope, NAME, b"r1", SPAN, lambda trace, parent: asked.append((trace, parent)) or samples)  # type: ignore[func-returns-value]
    assert asked == [(SPAN.hex().encode(), None) if flags is None else (TRACE, bool(int(flags, 16) & 1))]
    assert (dict(found.headers)[b"traceparent"][-2:], found.sampled) == (expected, samples)


@pytest.mark.parametrize(("flags", "expected"), [(b"00", b"00"), (b"01", b"01"), (b"03", b"03"), (b"fd", b"01")])
def test_where_nobody_samples_the_callers_word_goes_on_and_flags_that_nobody_knows_do_not(
    flags: bytes, expected: bytes
) -> None:
    assert way((b"traceparent", b"00-%b-%b-%b" % (TRACE, PARENT, flags)))[b"traceparent"][-2:] == expected


KEYCHARS = b"abcdefghijklmnopqrstuvwxyz0123456789_-*/"
VALUECHARS = bytes(byte for byte in range(0x20, 0x7F) if byte not in b",=")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([b"foo=1 \t , \t bar=2,\tbaz=3 "], b"foo=1,bar=2,baz=3"),
        ([b"", b"foo=1,,", b" "], b"foo=1"),
        ([b",".join(b"k%d=%d" % (n, n) for n in range(20)), b",".join(b"l%d=1" % n for n in range(12))], None),
        ([KEYCHARS + b"=" + VALUECHARS], None),
        ([KEYCHARS + b"@a-z0-9_-*/=" + VALUECHARS], None),
        ([b"0tenant@vendor=x"], None),
        ([b"z" * 256 + b"=" + b"v" * 256], None),
    ],
)
def test_a_state_that_is_one_goes_on_in_one_line(given: list[bytes], expected: bytes | None) -> None:
    lines = [(b"tracestate", line) for line in given]
    found = way((b"traceparent", b"00-%b-%b-01" % (TRACE, PARENT)), *lines)
    assert found[b"tracestate"] == (b",".join(given) if expected is None else expected)


@pytest.mark.parametrize(
    "given",
    [
        *(
            [b""],
            [b" , "],
            [b"foo"],
            [b"foo=,bar=3"],
            [b"=1"],
            [b"foo =1"],
            [b"FOO=1"],
            [b"foo.bar=1"],
            [b"@foo=1,a=2"],
        ),
        *([b"foo=bar=baz"], [b"foo=\xc3\xa9"], [b"foo=1\x7f"], [b"foo=1,foo=2"], [b"foo=1", b"foo=1"]),
        *([b"foo=1", b"z" * 257 + b"=1"], [b"foo=1", b"z=" + b"v" * 257], [b",".join(b"k%d=1" % n for n in range(33))]),
        [b"a prompt that somebody put there"],
    ],
)
def test_a_state_that_is_none_stays_and_leaves_the_trace_as_it_is(given: list[bytes]) -> None:
    found = way((b"traceparent", b"00-%b-%b-01" % (TRACE, PARENT)), *((b"tracestate", line) for line in given))
    assert b"tracestate" not in found
    assert found[b"traceparent"] == b"00-%b-0001020304050607-01" % TRACE


def test_each_time_it_goes_out_as_another_span_of_the_same_trace() -> None:
    scope: dict[str, Any] = {"http_version": "1.1", "scheme": "http", "client": None, "headers": []}
    found = Way(scope, NAME, b"r1", SPAN)
    before = found.headers
    found.again(b"\xff" * 8)
    assert found.span == b"f" * 16
    assert dict(before)[b"traceparent"] == b"00-%b-0001020304050607-02" % SPAN.hex().encode()
    assert dict(found.headers)[b"traceparent"] == b"00-%b-ffffffffffffffff-02" % SPAN.hex().encode()
    assert dict(before) | dict(found.headers) == dict(found.headers)


def test_a_callers_span_is_found_where_his_request_names_one() -> None:
    named = (b"traceparent", b"00-%b-%b-01" % (TRACE, PARENT))
    assert parent_of([named]) == (TRACE, PARENT, b"01")
    assert parent_of([]) is parent_of([named, named]) is None


@given(st.lists(st.tuples(st.sampled_from([b"via", b"traceparent", b"tracestate"]), st.binary(max_size=80))))
def test_whatever_came_there_is_a_way(headers: list[tuple[bytes, bytes]]) -> None:
    found = way(*headers)
    assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", found[b"traceparent"])
    assert found[b"via"].endswith(b"1.1 " + NAME)

"""The error family: what every one of them looks like at the door."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import errors
from gateway.errors import (
    Dialect,
    GatewayError,
    Invalid,
    MethodNotAllowed,
    NotFound,
    Problem,
    QuotaExhausted,
    RateLimited,
    Shape,
    StoreUnavailable,
    Unauthenticated,
    shape_for,
)

# Class: status, OpenAI's type, code, whose fault.
FAMILY: dict[str, tuple[int, str, str | None, str]] = {
    "GatewayError": (500, "server_error", None, "gateway"),
    "Unauthenticated": (401, "invalid_request_error", "invalid_api_key", "caller"),
    "BadRequest": (400, "invalid_request_error", None, "caller"),
    "ContextLengthExceeded": (400, "invalid_request_error", "context_length_exceeded", "caller"),
    "Forbidden": (403, "permission_error", "permission_denied", "caller"),
    "NotFound": (404, "invalid_request_error", "not_found", "caller"),
    "MethodNotAllowed": (405, "invalid_request_error", "method_not_allowed", "caller"),
    "InvalidHTTP": (400, "invalid_request_error", "invalid_http", "caller"),
    "RequestTimeout": (408, "invalid_request_error", "request_timeout", "caller"),
    "TargetTooLong": (414, "invalid_request_error", "target_too_long", "caller"),
    "ExpectationFailed": (417, "invalid_request_error", "expectation_failed", "caller"),
    "HeadTooLarge": (431, "invalid_request_error", "headers_too_large", "caller"),
    "VersionNotSupported": (505, "invalid_request_error", "http_version_not_supported", "caller"),
    "LoopDetected": (508, "server_error", "loop_detected", "gateway"),
    "TooLarge": (413, "invalid_request_error", "request_too_large", "caller"),
    "RateLimited": (429, "rate_limit_error", "rate_limit_exceeded", "caller"),
    "QuotaExhausted": (429, "insufficient_quota", "insufficient_quota", "caller"),
    "UpstreamFailed": (502, "server_error", "upstream_failed", "upstream"),
    "UpstreamTimeout": (504, "server_error", "upstream_timeout", "upstream"),
    "UpstreamsBusy": (503, "server_error", "upstreams_unavailable", "upstream"),
    "StoreUnavailable": (503, "server_error", "store_unavailable", "gateway"),
    "ShuttingDown": (503, "server_error", "shutting_down", "gateway"),
    "Overloaded": (503, "server_error", "overloaded", "gateway"),
    "InternalError": (500, "server_error", "internal_error", "gateway"),
}


def body(error: GatewayError, shape: Shape = "openai", called: str | None = None) -> Any:
    return json.loads(error.render(shape, called)[2])


def test_the_whole_family_is_tried_here() -> None:
    family = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, GatewayError)}
    assert family == {*FAMILY, "Invalid"}


@pytest.mark.parametrize("name", FAMILY)
def test_an_error_has_status_type_code_and_fault(name: str) -> None:
    error = getattr(errors, name)("what was found, what was expected")
    status, headers, text = error.render()
    expected_status, expected_type, code, fault = FAMILY[name]
    assert (status, error.fault) == (expected_status, fault)
    assert json.loads(text) == {
        "error": {"message": "what was found, what was expected", "type": expected_type, "param": None, "code": code}
    }
    assert (b"content-type", b"application/json") in headers


def test_code_and_param_of_one_error_are_its_own() -> None:
    error = errors.NotFound("no such model", code="model_not_found", param="model")
    assert body(error)["error"] == {
        "message": "no such model",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert errors.NotFound("no such path").code == "not_found"


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"),
    [(0.0, b"1", b"1"), (0.0012, b"1", b"2"), (1.0, b"1", b"1000"), (1.001, b"2", b"1001"), (59.5, b"60", b"59500")],
)
def test_a_wait_is_rounded_up_so_that_who_waits_is_let_in(seconds: float, whole: bytes, milliseconds: bytes) -> None:
    headers = dict(RateLimited("wait", retry_after=seconds).headers())
    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (whole, milliseconds)


def test_without_a_wait_nobody_is_told_to_wait() -> None:
    assert b"retry-after" not in dict(StoreUnavailable("away").headers())


def test_an_exhausted_quota_tells_sdks_not_to_try_again() -> None:
    assert (b"x-should-retry", b"false") in QuotaExhausted("used up").headers()
    assert b"x-should-retry" not in dict(RateLimited("wait", retry_after=1).headers())


@pytest.mark.parametrize(("wait", "again"), [(59.9, True), (60.0, True), (60.001, False), (3600.0, False)])
def test_a_wait_that_some_sdks_do_not_honour_tells_them_not_to_try_again(wait: float, again: bool) -> None:
    headers = RateLimited("wait", retry_after=wait).headers()
    assert ((b"x-should-retry", b"false") in headers) is not again
    assert dict(headers)[b"retry-after-ms"] == b"%d" % round(wait * 1000)


def test_headers_of_an_error_go_out_beside_the_usual_ones() -> None:
    error = MethodNotAllowed("GET is not for this path", headers=[(b"allow", b"POST")])
    assert error.headers() == [(b"content-type", b"application/json"), (b"allow", b"POST")]


def test_a_challenge_says_invalid_token_only_where_one_was_presented() -> None:
    presented, missing = Unauthenticated("not valid"), Unauthenticated("none", presented=False)
    assert dict(presented.headers())[b"www-authenticate"] == b'Bearer realm="gateway", error="invalid_token"'
    assert dict(missing.headers())[b"www-authenticate"] == b'Bearer realm="gateway"'
    assert (presented.code, missing.code) == ("invalid_api_key", None)


def test_a_request_that_was_not_read_to_its_end_closes_the_connection_and_no_other() -> None:
    unread = {name for name in FAMILY if FAMILY[name][0] in (408, 413, 414, 417, 431, 505)} | {"InvalidHTTP"}
    assert {name for name in [*FAMILY, "Invalid"] if getattr(errors, name).closes} == unread


def test_a_broken_contract_tells_all_problems_in_both_shapes() -> None:
    problems = [Problem(("messages", 0, "role"), "role: found x"), Problem(("n",), "n: found 0", "int_type")]
    error = Invalid(problems)
    assert error.status == 422
    assert body(error) == {
        "error": {
            "message": "role: found x; n: found 0",
            "type": "invalid_request_error",
            "param": "messages[0].role",
            "code": "invalid_request_error",
        },
        "detail": [
            {"loc": ["body", "messages", 0, "role"], "msg": "role: found x", "type": "value_error"},
            {"loc": ["body", "n"], "msg": "n: found 0", "type": "int_type"},
        ],
    }


@pytest.mark.parametrize(
    ("loc", "path"), [((), ""), (("n",), "n"), (("prompt", 0), "prompt[0]"), (("a", "b", 1, 2), "a.b[1][2]")]
)
def test_a_place_is_written_as_readers_write_it(loc: tuple[str | int, ...], path: str) -> None:
    assert Problem(loc, "x").path == path


def test_a_problem_of_the_whole_body_names_no_param() -> None:
    assert Invalid([Problem((), "no object")]).param is None


def test_a_broken_contract_is_400_where_clients_know_no_422() -> None:
    error = Invalid([Problem(("n",), "n: found 0")], status=400)
    assert error.render()[0] == 400
    assert body(error, "anthropic")["error"]["type"] == "invalid_request_error"
    assert Invalid([Problem(("n",), "n: found 0")]).status == 422


# — Anthropic's

# Class → its word for it.
WORDS = {
    "GatewayError": "api_error",
    "Unauthenticated": "authentication_error",
    "BadRequest": "invalid_request_error",
    "ContextLengthExceeded": "invalid_request_error",
    "Forbidden": "permission_error",
    "NotFound": "not_found_error",
    "MethodNotAllowed": "invalid_request_error",
    "InvalidHTTP": "invalid_request_error",
    "RequestTimeout": "invalid_request_error",
    "TargetTooLong": "invalid_request_error",
    "ExpectationFailed": "invalid_request_error",
    "HeadTooLarge": "invalid_request_error",
    "VersionNotSupported": "api_error",
    "LoopDetected": "api_error",
    "TooLarge": "request_too_large",
    "RateLimited": "rate_limit_error",
    "QuotaExhausted": "rate_limit_error",
    "UpstreamFailed": "api_error",
    "UpstreamTimeout": "timeout_error",
    "UpstreamsBusy": "overloaded_error",
    "StoreUnavailable": "overloaded_error",
    "ShuttingDown": "overloaded_error",
    "Overloaded": "overloaded_error",
    "InternalError": "api_error",
}


@pytest.mark.parametrize("name", FAMILY)
def test_anthropics_clients_read_their_own_words(name: str) -> None:
    status, headers, text = getattr(errors, name)("what was found").render("anthropic", "req_1")
    assert status == FAMILY[name][0]
    assert json.loads(text) == {
        "type": "error",
        "error": {"type": WORDS[name], "message": "what was found"},
        "request_id": "req_1",
    }
    assert (b"content-type", b"application/json") in headers


def test_a_request_without_an_id_has_none_in_anthropics_shape() -> None:
    error = NotFound("no such model")
    assert body(error, "anthropic")["request_id"] is None


def test_all_problems_of_a_broken_contract_stand_in_anthropics_message() -> None:
    error = Invalid([Problem(("a",), "a: is missing"), Problem(("b",), "b: found 0")], status=400)
    assert body(error, "anthropic")["error"] == {
        "type": "invalid_request_error",
        "message": "a: is missing; b: found 0",
    }


@pytest.mark.parametrize("shape", get_args(Shape))
def test_what_a_caller_is_told_beside_the_body_is_the_same_in_all_shapes(shape: Shape) -> None:
    headers = dict(QuotaExhausted("used up", retry_after=2, headers=[(b"x", b"1")]).render(shape, "req_1")[1])
    assert headers.keys() - {b"content-type"} == {
        b"x",
        b"retry-after",
        b"retry-after-ms",
        b"x-should-retry",
    }


# — problem documents (RFC 9457)

REGISTRY = "https://iana.org/assignments/http-problem-types#"


def test_a_problem_document_has_openais_error_for_an_extension() -> None:
    error = NotFound("no such model", code="model_not_found", param="model")
    status, headers, text = error.render("problem", "req_1")
    assert status == 404
    assert json.loads(text) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "no such model",
        "instance": "urn:request:req_1",
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        },
    }
    assert [value for name, value in headers if name == b"content-type"] == [b"application/problem+json"]


def test_a_problem_of_limits_is_of_a_registered_type_and_names_them() -> None:
    told = body(RateLimited("wait", policies=("team-requests", "seats")), "problem")
    assert told["type"] == REGISTRY + "quota-exceeded"
    assert told["violated-policies"] == ["team-requests", "seats"]
    assert "violated-policies" not in body(RateLimited("wait"), "problem")


def test_a_lack_of_capacity_is_of_a_registered_type() -> None:
    told = body(StoreUnavailable("away"), "problem")
    assert told["type"] == REGISTRY + "temporary-reduced-capacity"
    assert "instance" not in told


def test_a_broken_contract_tells_all_problems_beside_the_detail() -> None:
    told = body(Invalid([Problem(("a", 0), "a: found x"), Problem((), "no object", "type")]), "problem")
    assert (told["title"], told["detail"]) == ("Unprocessable Content", "a: found x; no object")
    assert told["errors"] == [
        {"loc": ["body", "a", 0], "msg": "a: found x", "type": "value_error"},
        {"loc": ["body"], "msg": "no object", "type": "type"},
    ]
    assert told["error"]["param"] == "a[0]"


@pytest.mark.parametrize("name", FAMILY)
def test_every_problem_has_a_title_of_its_status(name: str) -> None:
    told = body(getattr(errors, name)("x"), "problem")
    assert told["status"] == FAMILY[name][0]
    assert re.fullmatch("[A-Z][A-Za-z -]+", told["title"])


@given(st.from_regex(r"\A[A-Za-z0-9._:/+=-]{1,128}\Z") | st.text(max_size=20))
def test_the_instance_is_a_uri_whatever_a_request_is_called(called: str) -> None:
    try:
        told = body(NotFound("x"), "problem", called)
    except UnicodeEncodeError:
        return  # half a surrogate is no id
    assert re.fullmatch(r"urn:request:[A-Za-z0-9._~:/+=%-]*", told["instance"])


# — which of them


PROBLEM = "application/problem+json"
# Accept → whether it prefers problem documents.
ACCEPTS: list[tuple[tuple[str, ...], bool]] = [
    ((), False),
    (("",), False),
    (("*/*",), False),
    (("application/*",), False),
    (("application/json",), False),
    (("text/event-stream, application/json",), False),
    ((PROBLEM,), True),
    (("Application/Problem+JSON",), True),
    ((f"{PROBLEM}, */*",), True),
    ((f"{PROBLEM}, application/*",), True),
    ((f"{PROBLEM}, */*;q=0.5",), True),
    ((f"{PROBLEM}, application/json",), False),
    ((f"application/json, {PROBLEM}",), False),
    (("application/json", PROBLEM), False),
    (("text/html", f"{PROBLEM} ; q=0.9", "application/json;q=0.8"), True),
    ((f"{PROBLEM};q=0.8, application/json;q=0.9",), False),
    ((f"{PROBLEM};q=0.8, */*",), False),
    ((f"{PROBLEM};q=0.5, application/*;q=0.2, */*",), True),
    ((f"{PROBLEM};q=0.5, application/json;q=0.2, application/*, */*",), True),
    ((f"{PROBLEM};q=0.2, application/*;q=0.5, */*;q=0.1",), False),
    ((f"{PROBLEM};q=0",), False),
    ((f"{PROBLEM};q=0.000, */*;q=0",), False),
    ((f"{PROBLEM};q=0.001",), True),
    ((f"{PROBLEM};q=0.001, application/json;q=0",), True),
    ((f"{PROBLEM};charset=utf-8;q=0.9, application/json;q=0.8",), True),
    ((f"{PROBLEM};Q=0.7, application/json;q=0.8",), False),
    ((f"{PROBLEM};q=1.5",), False),
    ((f"{PROBLEM};q=much",), False),
    ((f"{PROBLEM};q=",), False),
    ((f"{PROBLEM}x",), False),
    ((f"text/{PROBLEM}",), False),
    ((f"{PROBLEM};q=0.1, {PROBLEM};q=0.9, application/json;q=0.5",), True),
    ((f"{PROBLEM};q=0.9, {PROBLEM};q=0.1, application/json;q=0.5",), True),
]


@pytest.mark.parametrize("dialect", get_args(Dialect))
@pytest.mark.parametrize(("accept", "preferred"), ACCEPTS)
def test_a_problem_document_is_for_who_names_it_and_prefers_it(
    accept: tuple[str, ...], preferred: bool, dialect: Dialect
) -> None:
    assert shape_for(dialect, [value.encode() for value in accept]) == ("problem" if preferred else dialect)


PARTS = st.sampled_from(
    [PROBLEM, "application/json", "*/*", ";", "q", "=", ",", " ", "0", "1", ".", "5", '"', "é", "\t"]
)


@given(st.lists(PARTS, max_size=12).map("".join))
def test_any_accept_has_a_shape(accept: str) -> None:
    assert shape_for("openai", [accept.encode("latin-1")]) in ("openai", "problem")


@pytest.mark.timeout(5)
def test_a_long_accept_is_read_in_time() -> None:
    for accept in (PROBLEM + ";" * 100_000, f"{PROBLEM}," * 10_000, PROBLEM + ";q=0." + " " * 100_000 + "x"):
        assert shape_for("openai", [accept.encode()]) in ("openai", "problem")

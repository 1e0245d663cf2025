"""The error family: what every one of them looks like at the door."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway import errors
from gateway.errors import (
    GatewayError,
    Invalid,
    MethodNotAllowed,
    Problem,
    QuotaExhausted,
    RateLimited,
    StoreUnavailable,
    Unauthenticated,
)

# Class: status, OpenAI's type, code, whose fault.
FAMILY: dict[str, tuple[int, str, str | None, str]] = {
    "GatewayError": (500, "server_error", None, "gateway"),
    "Unauthenticated": (401, "invalid_request_error", "invalid_api_key", "caller"),
    "BadRequest": (400, "invalid_request_error", None, "caller"),
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
    "InternalError": (500, "server_error", "internal_error", "gateway"),
}


def body(error: GatewayError) -> Any:
    return json.loads(error.render()[2])


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

"""The error family: status, code and whose fault, rendered in one place.

An error is raised where it is known and rendered once, at the door, in the shape that the caller reads: OpenAI's,
Anthropic's, or a problem document. The text says what was found and what was expected; it never carries a key, a prompt
or a backend's own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import ClassVar, Literal
from urllib.parse import quote

import msgspec

Fault = Literal["caller", "upstream", "gateway"]
Dialect = Literal["openai", "anthropic"]
Shape = Literal["openai", "anthropic", "problem"]
Headers = Sequence[tuple[bytes, bytes]]
Object = Mapping[str, object]


class GatewayError(Exception):
    """A request that the gateway answers itself.

    `status` is the HTTP status, `type` and `code` are OpenAI's words for it, `param` names the member of the request
    that is at fault, `retry_after` is in seconds, `headers` go out beside the usual ones, `policies` are the names of
    the limits that refuse it.
    """

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None
    fault: ClassVar[Fault] = "gateway"
    closes: ClassVar[bool] = False  # whether the connection ends with this answer

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Headers = (),
        policies: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else type(self).code
        self.param = param
        self.retry_after = retry_after
        self.extra_headers = headers
        self.policies = tuple(policies)

    def body(self) -> Object:
        """OpenAI's error object: message, type, param and code, all four present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def extensions(self) -> Object:
        """What a problem document says beyond RFC 9457's members."""
        return {"error": self.body()["error"]} | ({"violated-policies": self.policies} if self.policies else {})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer carries beside its length: Retry-After in whole seconds, and in milliseconds for the SDKs."""
        headers = [(b"content-type", b"application/json"), *self.extra_headers]
        if self.retry_after is not None:
            headers += [
                (b"retry-after", b"%d" % max(1, ceil(self.retry_after))),
                (b"retry-after-ms", b"%d" % max(1, ceil(self.retry_after * 1000))),
            ]
        return headers

    def told(self, shape: Shape = "openai", called: str | None = None) -> Object:
        """The body in a shape, as an object; `called` is the id of the request."""
        if shape == "anthropic":
            kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": called}
        if shape == "problem":
            kind, title = _PROBLEMS.get(self.status, ("about:blank", _phrase(self.status)))
            what = {"type": kind, "title": title, "status": self.status, "detail": self.message}
            which = {} if called is None else {"instance": "urn:request:" + quote(called, safe="/:+=")}
            return {**what, **which, **self.extensions()}
        return self.body()

    def render(
        self, shape: Shape = "openai", called: str | None = None
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body, ready to be sent."""
        headers = self.headers()
        if shape == "problem":
            headers[0] = (b"content-type", b"application/problem+json")
        return self.status, headers, msgspec.json.encode(self.told(shape, called))


# Status → Anthropic's word for it; of others it has the two that are told by whose fault it is.
_ANTHROPIC = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

# Status → type and title of the problem as draft-ietf-httpapi-ratelimit-headers registers them.
_REGISTRY = "https://iana.org/assignments/http-problem-types"
_PROBLEMS = {
    429: (f"{_REGISTRY}#quota-exceeded", "Request cannot be satisfied as assigned quota has been exceeded"),
    503: (
        f"{_REGISTRY}#temporary-reduced-capacity",
        "Request cannot be satisfied due to temporary server capacity constraints",
    ),
}

# RFC 9110's phrases where Python's differ, which depend on its version.
_PHRASES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}


def _phrase(status: int) -> str:
    return _PHRASES.get(status) or HTTPStatus(status).phrase


# — which shape a caller reads


_JSON, _PROBLEM = b"application/json", b"application/problem+json"
# The ranges that hold JSON, the most specific one first (RFC 9110 section 12.5.1).
_RANGES = (_JSON, b"application/*", b"*/*")
_WEIGHT = re.compile(rb"[ \t]*+q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)[ \t]*+\Z", re.IGNORECASE)


def shape_for(dialect: Dialect, accept: Iterable[bytes]) -> Shape:
    """The shape in which a caller wants its errors: a problem document where Accept names it and prefers it to JSON.

    `accept` are the values of the field. Only a range that names problem documents asks for them, wildcards do not; a
    tie with JSON goes to the endpoint's own dialect, unless a wildcard is all that holds JSON.
    """
    given = b",".join(accept).lower()
    if _PROBLEM not in given:
        return dialect
    weights = _weights(given)
    problem = weights.get(_PROBLEM, 0.0)
    json = next((weights[name] for name in _RANGES if name in weights), 0.0)
    return "problem" if problem > json or (problem == json > 0 and _JSON not in weights) else dialect


def _weights(given: bytes) -> dict[bytes, float]:
    """Media range → its weight; what is not one has none."""
    weights: dict[bytes, float] = {}
    for part in given.split(b","):
        name, *parameters = part.split(b";")
        found = next((parameter for parameter in parameters if parameter.lstrip()[:2] == b"q="), b"q=1")
        weight = _WEIGHT.match(found)
        if weight:
            name = name.strip()
            weights[name] = max(weights.get(name, 0.0), float(weight[1]))
    return weights


# — the caller's


class Unauthenticated(GatewayError):
    """401: nobody that we know. RFC 6750 section 3.1: without credentials there is no error attribute."""

    status = 401
    type = "invalid_request_error"
    code: str | None = "invalid_api_key"
    fault = "caller"

    def __init__(self, message: str, *, presented: bool = True) -> None:
        challenge = b'Bearer realm="gateway"' + (b', error="invalid_token"' if presented else b"")
        super().__init__(message, headers=[(b"www-authenticate", challenge)])
        if not presented:
            self.code = None


class BadRequest(GatewayError):
    """400: not understood, or never possible."""

    status = 400
    type = "invalid_request_error"
    fault = "caller"


class ContextLengthExceeded(BadRequest):
    """400: the prompt and what is to be produced do not fit into the model's context."""

    code = "context_length_exceeded"


class Forbidden(GatewayError):
    """403: known, but not for this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"
    fault = "caller"


class NotFound(GatewayError):
    """404: no such path, no such model."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"
    fault = "caller"


class MethodNotAllowed(GatewayError):
    """405, with the methods that are."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    fault = "caller"


class TooLarge(GatewayError):
    """413: the body is over the cap; the rest of it is not read."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    fault = "caller"
    closes = True


class InvalidHTTP(BadRequest):
    """400: not a request that is read here. Where the next one would begin is in doubt, so the connection ends."""

    code = "invalid_http"
    closes = True


class RequestTimeout(GatewayError):
    """408: the rest of the request did not come in its time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    fault = "caller"
    closes = True


class TargetTooLong(GatewayError):
    """414: the target is over the cap."""

    status = 414
    type = "invalid_request_error"
    code = "target_too_long"
    fault = "caller"
    closes = True


class ExpectationFailed(GatewayError):
    """417: an Expect other than 100-continue."""

    status = 417
    type = "invalid_request_error"
    code = "expectation_failed"
    fault = "caller"
    closes = True


class HeadTooLarge(GatewayError):
    """431: the header block is over a cap, in bytes or in fields."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"
    fault = "caller"
    closes = True


class VersionNotSupported(GatewayError):
    """505: another HTTP than 1.0 and 1.1."""

    status = 505
    type = "invalid_request_error"
    code = "http_version_not_supported"
    fault = "caller"
    closes = True


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a request: where (`("prompt", 0)`), what was found and expected, and its kind."""

    loc: tuple[str | int, ...]
    msg: str
    type: str = "value_error"

    @property
    def path(self) -> str:
        """The place as a reader writes it: `messages[0].role`."""
        return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.loc).lstrip(".")


class Invalid(GatewayError):
    """422: the body breaks the contract. All problems at once, in OpenAI's shape and in HTTPValidationError's.

    `status` is another where an endpoint's clients know no 422: Anthropic's is 400.
    """

    status = 422
    type = "invalid_request_error"
    code = "invalid_request_error"
    fault = "caller"

    def __init__(self, problems: Sequence[Problem], *, status: int = 422) -> None:
        super().__init__("; ".join(p.msg for p in problems), param=problems[0].path or None)
        self.status = status
        self.problems = tuple(problems)

    def body(self) -> Object:
        return {**super().body(), "detail": self._detail()}

    def extensions(self) -> Object:
        return {**super().extensions(), "errors": self._detail()}  # RFC 9457 has a `detail` of its own

    def _detail(self) -> list[Object]:
        return [{"loc": ["body", *p.loc], "msg": p.msg, "type": p.type} for p in self.problems]


_NOT_AGAIN = (b"x-should-retry", b"false")  # the SDKs heed it whatever the status is
_LONGEST = 60.0  # seconds of Retry-After that all SDKs honour: beyond them some come back at once, and some sleep


class RateLimited(GatewayError):
    """429: over a rate or out of seats; waiting helps, and Retry-After says how long."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    fault = "caller"

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = super().headers()
        return [*headers, _NOT_AGAIN] if (self.retry_after or 0.0) > _LONGEST else headers


class QuotaExhausted(GatewayError):
    """429: a quota is used up. Waiting does not help a client that sleeps: x-should-retry says so to the SDKs."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    fault = "caller"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), _NOT_AGAIN]


# — the upstream's


class UpstreamFailed(GatewayError):
    """502: no upstream gave an answer that can be relayed."""

    status = 502
    type = "server_error"
    code = "upstream_failed"
    fault = "upstream"


class UpstreamTimeout(UpstreamFailed):
    """504: an upstream did not answer in its time."""

    status = 504
    code = "upstream_timeout"


class UpstreamsBusy(UpstreamFailed):
    """503: every upstream of the pool is full or away."""

    status = 503
    code = "upstreams_unavailable"


# — the gateway's


class StoreUnavailable(GatewayError):
    """503: the store of limits does not answer, and policy says not to serve without it."""

    status = 503
    code = "store_unavailable"


class Overloaded(GatewayError):
    """503: the process has hardly any memory left, and serves what it has taken."""

    status = 503
    code = "overloaded"


class ShuttingDown(GatewayError):
    """503: the process ends, and this request had all the time that there was."""

    status = 503
    code = "shutting_down"


class LoopDetected(GatewayError):
    """508: the request came through this gateway before (RFC 5842 section 7.2 lends the number)."""

    status = 508
    code = "loop_detected"


class InternalError(GatewayError):
    """500: a defect of ours."""

    code = "internal_error"


class ClientGone(Exception):
    """The caller hung up. Nothing is answered: there is nobody to read it."""

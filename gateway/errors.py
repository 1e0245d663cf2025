"""The error family: status, code and whose fault, rendered in one place.

An error is raised where it is known and rendered once, at the door. The text says what was found and what was
expected; it never carries a key, a prompt or a backend's own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import msgspec

Fault = Literal["caller", "upstream", "gateway"]
Headers = Sequence[tuple[bytes, bytes]]


class GatewayError(Exception):
    """A request that the gateway answers itself.

    `status` is the HTTP status, `type` and `code` are OpenAI's words for it, `param` names the member of the request
    that is at fault, `retry_after` is in seconds, `headers` go out beside the usual ones.
    """

    status: ClassVar[int] = 500
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
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else type(self).code
        self.param = param
        self.retry_after = retry_after
        self.extra_headers = headers

    def body(self) -> Mapping[str, object]:
        """OpenAI's error object: message, type, param and code, all four present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the answer carries beside its length: Retry-After in whole seconds, and in milliseconds for the SDKs."""
        headers = [(b"content-type", b"application/json"), *self.extra_headers]
        if self.retry_after is not None:
            headers += [
                (b"retry-after", b"%d" % max(1, ceil(self.retry_after))),
                (b"retry-after-ms", b"%d" % max(1, ceil(self.retry_after * 1000))),
            ]
        return headers

    def render(self) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body, ready to be sent."""
        return self.status, self.headers(), msgspec.json.encode(self.body())


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
    """422: the body breaks the contract. All problems at once, in OpenAI's shape and in HTTPValidationError's."""

    status = 422
    type = "invalid_request_error"
    code = "invalid_request_error"
    fault = "caller"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(p.msg for p in problems), param=problems[0].path or None)
        self.problems = tuple(problems)

    def body(self) -> Mapping[str, object]:
        detail = [{"loc": ["body", *p.loc], "msg": p.msg, "type": p.type} for p in self.problems]
        return {**super().body(), "detail": detail}


class RateLimited(GatewayError):
    """429: over a rate or out of seats; waiting helps, and `retry_after` says how long."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    fault = "caller"


class QuotaExhausted(GatewayError):
    """429: a quota is used up. Waiting does not help a client that sleeps: x-should-retry says so to the SDKs."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    fault = "caller"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"x-should-retry", b"false")]


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


class LoopDetected(GatewayError):
    """508: the request came through this gateway before (RFC 5842 section 7.2 lends the number)."""

    status = 508
    code = "loop_detected"


class InternalError(GatewayError):
    """500: a defect of ours."""

    code = "internal_error"


class ClientGone(Exception):
    """The caller hung up. Nothing is answered: there is nobody to read it."""

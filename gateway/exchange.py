"""One request and its answer: the one mutable record, filled on the way, observed once."""

from __future__ import annotations

import os
import time
from typing import Literal

from gateway.admission import Lease
from gateway.asgi import Receive
from gateway.endpoints import Endpoint
from gateway.errors import ClientGone, Dialect, Fault, GatewayError, UpstreamTimeout
from gateway.hops import Way
from gateway.identity import Principal
from gateway.intents import Charges, Intent
from gateway.learned import Learned
from gateway.normalize import InferenceRequest
from gateway.pools import Opening
from gateway.records import EndedBy, UsageRecord
from gateway.snapshot import Limit
from gateway.terms import Terms, used
from gateway.uploads import Upload
from gateway.upstream import Answer
from gateway.usage import NOTHING, REFUSED, Progress, Usage, usage_of

Ended = EndedBy | Literal["refused"]  # refused: by the caller's own fault; client: he left


class Exchange:
    """What is known of one exchange, in the order in which it becomes known; None: not yet, or never."""

    __slots__ = (
        "_usage",
        "answer",
        "body",
        "called",
        "commented",
        "ended",
        "ended_at",
        "endpoint",
        "error",
        "id",
        "lease",
        "opening",
        "principal",
        "received",
        "request",
        "started",
        "terms",
        "timed",
        "upload",
        "waited",
        "way",
    )

    def __init__(self, endpoint: Endpoint, called: bytes | None) -> None:
        self.id = new_id()
        self.called = called or self.id.encode()  # what the caller and the backend call it
        self.endpoint = endpoint
        self.received = time.monotonic()
        self.waited = 0.0  # seconds, for the caller's body
        self.body: int | None = None  # bytes of a body that was read before it was understood
        self.upload: Upload | None = None  # a body that is passed on as it comes
        self.principal: Principal | None = None
        self.way: Way | None = None
        self.request: InferenceRequest | None = None
        self.terms: Terms  # known before it is admitted
        self.lease: Lease | None = None
        self.opening: Opening | None = None
        self.answer: Answer | None = None
        self.error: GatewayError | None = None
        self.ended: Ended = "gateway"
        self.ended_at = 0.0  # when that was clear, in time.monotonic(), which is before it was settled
        self.started = False  # whether a status line went out
        self.commented = False  # and whether that was ours, before there was an answer
        self.timed = False  # whether its answer says where the time went
        self._usage: Usage | None = None

    @property
    def has_all(self) -> bool:
        """Whether all of the request is here, so that the next one may follow on its connection."""
        return self.body is not None or (self.upload is not None and self.upload.finished)

    def after(self, receive: Receive) -> Receive:
        """What says that the caller has left, once all of his request is here."""
        return receive if self.upload is None else self.upload.after

    @property
    def status(self) -> int:
        """The status that was answered; 499 where the caller did not wait for one (nginx's number for it)."""
        if self.answer is not None and (self.started or self.error is None):  # one may fail before it is passed on
            return self.answer.status
        if self.error is not None:
            return self.error.status
        return 499 if self.ended == "client" else 500

    @property
    def usage(self) -> Usage:
        """What was used, once the answer has ended: nothing without an answer, nor of a backend that was not able to
        give one (429, 5xx); one that found the caller at fault took a request, and no tokens."""
        answer = self.answer
        if answer is None or self.request is None or self.status == 429 or self.status >= 500:
            return NOTHING
        if self._usage is None:
            self._usage = self._read(answer, self.request)
        return self._usage

    def progress(self) -> Progress | None:
        """What was used so far, and of whom, while the answer comes; None while nothing was answered."""
        answer = self.answer
        if answer is None or self.request is None or self.status == 429 or self.status >= 500:
            return None
        usage = self._read(answer, self.request)
        if not usage.answered:
            return None
        return Progress(
            input=usage.input,
            cached=usage.cached,
            output=usage.output,
            reasoning=usage.reasoning,
            input_source=usage.input_source,
            output_source=usage.output_source,
            http_status=answer.status,
            attempt=answer.attempts,
            bytes_out=answer.tail.length,
            first_byte_ms=self._ms(answer.answered),
            upstream=answer.upstream.name,
            served_model=answer.model.name,
        )

    def _read(self, answer: Answer, request: InferenceRequest) -> Usage:
        if answer.status >= 400:
            return REFUSED
        return usage_of(
            answer.tail,
            self.endpoint,
            stream=answer.is_stream,
            input_estimate=self.terms.input_estimate,
            output_bound=request.output_bound,
        )

    def teach(self, learned: Learned) -> None:
        """What there is to learn of an answer that is complete, and whose usage the upstream has told."""
        request, answer, usage = self.request, self.answer, self.usage
        if request is None or answer is None or answer.model.name != request.model.name:
            return
        if self.ended != "complete" or self.status != 200 or usage.source != "upstream":
            return
        learned.learn(
            self.terms.team,
            request.model.name,
            input_bytes=0 if request.input.images else request.input.size,
            input_tokens=usage.input,
            output_tokens=usage.output,
            answers=request.answers,
        )

    # — what a lease asks

    @property
    def dialect(self) -> Dialect:
        return self.endpoint.dialect

    def end(self, error: BaseException | None) -> None:
        """Note how it ended: with an error of ours, because the caller left, or well; and when it first did."""
        self.ended_at = self.ended_at or time.monotonic()
        match error:
            case None:
                self.ended = "complete"
            case ClientGone():
                self.ended = "client"
            case UpstreamTimeout():
                self.error = error.with_traceback(None)
                self.ended = "timeout"
            case GatewayError():
                self.error = error.with_traceback(None)  # whose frames hold all that was on the way, and this
                self.ended = _ENDED_BY[error.fault]
            case _:
                self.ended = "gateway"

    def intent(self, charges: Charges) -> Intent:
        """What is known before it is sent."""
        terms, request = self.terms, self.request
        assert request is not None
        return Intent(
            team=terms.team,
            key=terms.key_id,
            user=terms.user,
            model=request.model.name,
            pool=terms.pool,
            endpoint=self.endpoint.name,
            stream=request.stream,
            price=terms.price,
            received_ms=self.received_ms,
            bytes_in=self.body or 0,
            input_estimate=terms.input_estimate,
            charges=charges,
        )

    def used(self, limit: Limit) -> int:
        return used(limit.count, self.usage, self.terms.price)

    def record(self) -> UsageRecord:
        """The row of the ledger."""
        assert self.request is not None
        usage, answer = self.usage, self.answer
        return UsageRecord(
            id=self.id,
            status="settled",
            organisation=self.terms.organisation,
            team=self.terms.team,
            key=self.terms.key_id,
            user=self.terms.user,
            model=self.request.model.name,
            served_model=None if answer is None else answer.model.name,
            pool=self.terms.pool if answer is None else answer.model.pool,
            upstream=None if answer is None else answer.upstream.name,
            endpoint=self.endpoint.name,
            stream=self.request.stream,
            http_status=self.status,
            ended="client" if self.ended == "refused" else self.ended,
            attempt=0 if answer is None else answer.attempts,
            requests=int(usage.answered),
            input_tokens=usage.input,
            cached_tokens=usage.cached,
            output_tokens=usage.output,
            reasoning_tokens=usage.reasoning,
            input_source=usage.input_source,
            output_source=usage.output_source,
            price=self.terms.price,
            cost_microusd=usage.cost(self.terms.price),
            received_ms=self.received_ms,
            first_byte_ms=None if answer is None else self._ms(answer.answered),
            ended_ms=self._ms(self.ended_at or time.monotonic()),
            bytes_in=self.body or 0 if self.upload is None else self.upload.passed,
            bytes_out=0 if answer is None else answer.tail.length,
        )

    def _ms(self, at: float) -> int:
        """A time of time.monotonic(), in milliseconds since 1970, counted from when the request came."""
        return self.received_ms + round((at - self.received) * 1000)

    @property
    def received_ms(self) -> int:
        """When the request came, in milliseconds since 1970."""
        return int(self.id[4:16], 16)


_ENDED_BY: dict[Fault, Ended] = {"caller": "refused", "upstream": "upstream", "gateway": "gateway"}


def new_id() -> str:
    """An id that nobody guesses and that sorts by time: 48 bits of milliseconds, 80 random ones (as a UUIDv7 has)."""
    return f"req_{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"

"""Traces: the spans of sampled exchanges, in batches, to a collector of OpenTelemetry (OTLP over HTTP, protobuf).

    record   in the turn in which an exchange ends: its spans, as bytes that wait in memory; full: they are lost
    batch    when there are enough, or every few seconds: one request, sent once more where that may help, and not
             before the time that the collector says
    aclose   what waits is sent, for as long as one is patient; what is not gone then is lost

What is lost is counted, and told at most once a minute; nobody waits for a collector but the task that talks to it.

OpenTelemetry's SDK is not used: to encode the five spans of a request takes it 330 µs, and in a thread of its own it
keeps the event loop from the interpreter for 5 ms at a time. Here the same messages are filled in directly, in 65 µs.
Messages of protobuf that are written one after the other are one message, so that a batch is a join.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from gzip import compress
from typing import NamedTuple

import httpx
import structlog
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

from gateway import __version__
from gateway.asgi import Scope
from gateway.exchange import Exchange
from gateway.hops import RANDOM, SAMPLED, parent_of
from gateway.otel import NO_LOSSES, Loss, Tracing
from gateway.spans import Span, Value, names, spans_of
from gateway.upstream import retry_after

PATIENCE = 3.0  # seconds that the end of the process waits for a collector
_SELDOM = 60.0  # seconds between two lines that say that something was lost
_PASSING = (429, 502, 503, 504)  # the collector may take it later, says OTLP
_BACK_OFF = 0.5  # seconds before it is sent once more; then twice as long
_LONGEST = 60.0  # seconds that a collector may ask for

_KINDS = {
    "internal": Message.SPAN_KIND_INTERNAL,
    "server": Message.SPAN_KIND_SERVER,
    "client": Message.SPAN_KIND_CLIENT,
}
_LOCAL = 0x100  # of its flags: it is known whether the parent is in another process
_REMOTE = 0x300  # and it is

_log = structlog.get_logger("gateway.traces")


class Failure(NamedTuple):
    """Why a collector has not taken a batch."""

    loss: Loss
    reason: str
    again: float | None = None  # seconds that it wants to be left alone; None: it will not take it


class Traces:
    """The traces of one worker. `losses` are the spans that no collector has taken, by the reason."""

    def __init__(self, tracing: Tracing, trust: ssl.SSLContext | bool) -> None:
        """To be made in an event loop. `trust` is what the collector is verified by."""
        self.samples = tracing.sampled
        self.losses: dict[Loss, int] = dict(NO_LOSSES)
        self._tracing = tracing
        self._names = names(latest=tracing.latest)
        self._client = httpx.AsyncClient(verify=trust, timeout=tracing.timeout, trust_env=False)
        self._headers = {**tracing.headers, "content-type": "application/x-protobuf"}
        if tracing.gzip:
            self._headers["content-encoding"] = "gzip"
        self._resource = ResourceSpans()
        for key, value in tracing.resource.items():
            _put(self._resource.resource.attributes.add(), key, value)
        scope = ScopeSpans()
        scope.scope.name, scope.scope.version = "gateway", __version__
        self._scope = scope.SerializeToString()
        self._waiting: deque[tuple[int, bytes]] = deque()  # the spans of one exchange, and how many they are
        self._held = 0  # spans that wait
        self._enough = asyncio.Event()
        self._closing = asyncio.Event()
        self._quiet = 0.0  # until when the collector wants to be left alone, in time.monotonic()
        self._told = (float("-inf"), 0)  # when it was told that something was lost, and how much that was
        self._task = asyncio.ensure_future(self._send_for_ever())
        self._task.add_done_callback(_over)

    def __repr__(self) -> str:
        return f"<Traces {self._held} spans waiting, {self.lost} lost>"

    @property
    def lost(self) -> int:
        """How many spans no collector has taken."""
        return sum(self.losses.values())

    def record(self, x: Exchange, scope: Scope) -> None:
        """Keep the spans of an exchange that has ended, if its trace is sampled."""
        caller = parent_of(scope["headers"])
        if x.way is None:  # it was refused before anybody asked
            trace, flags = (caller.trace, caller.known) if caller else (x.id[-32:].encode(), RANDOM)
            if not self.samples(trace, caller.sampled if caller else None):
                return
            flags |= SAMPLED
        elif not x.way.sampled:
            return
        else:
            trace, flags = x.way.trace_id.encode(), x.way.flags
        spans = spans_of(x, scope, caller.span if caller else b"", self._names)
        if self._task.done():
            self._lose(len(spans), "ended", "the gateway ended")
        elif self._held + len(spans) > self._tracing.queue:
            self._lose(len(spans), "queue_full", "the queue is full")
        else:
            self._waiting.append((len(spans), _encoded(spans, trace, flags)))
            self._held += len(spans)
            if self._held >= self._tracing.batch:
                self._enough.set()

    async def aclose(self) -> None:
        """Send what waits, within PATIENCE. Saying it twice is as good as once."""
        self._closing.set()
        self._enough.set()
        await asyncio.wait((self._task,), timeout=PATIENCE)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._held:
            self._lose(self._held, "ended", "the gateway ended")
            self._held = 0
        await self._client.aclose()

    # — sending

    async def _send_for_ever(self) -> None:
        while not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._enough.wait(), self._tracing.delay)
            self._enough.clear()
            while self._waiting:
                await asyncio.sleep(self._quiet - time.monotonic())
                await self._send()

    async def _send(self) -> None:
        """Send one batch. It waits until it is sent, or lost: what comes meanwhile finds less room."""
        number, pieces = 0, [self._scope]
        while self._waiting and (not number or number + self._waiting[0][0] <= self._tracing.batch):
            spans, piece = self._waiting.popleft()
            number += spans
            pieces.append(piece)
        request = ExportTraceServiceRequest()
        request.resource_spans.add().CopyFrom(self._resource)
        request.resource_spans[0].scope_spans.add().MergeFromString(b"".join(pieces))
        body = request.SerializeToString()
        if self._tracing.gzip:
            body = await asyncio.to_thread(compress, body, 1)
        answer = await self._post(body)
        self._held -= number
        if isinstance(answer, Failure):
            self._lose(number, answer.loss, answer.reason)
        elif refused := min(_refused(answer), number):
            self._lose(refused, "refused", "the collector refused some")

    async def _post(self, body: bytes) -> bytes | Failure:
        """What the collector says who has taken it. Sent again while that may help and there is time."""
        until, pause = time.monotonic() + self._tracing.timeout, _BACK_OFF
        while True:
            answer = await self._post_once(body, until - time.monotonic())
            if not isinstance(answer, Failure) or answer.again is None:
                return answer
            self._quiet = time.monotonic() + answer.again
            if max(self._quiet, time.monotonic() + pause) > until:
                return answer
            await asyncio.sleep(answer.again)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), max(0.0, pause * random.uniform(0.8, 1.2) - answer.again))
                return answer  # nobody waits for a collector that was away when the process ends
            pause *= 2

    async def _post_once(self, body: bytes, within: float) -> bytes | Failure:
        try:
            async with asyncio.timeout(within):
                answer = await self._client.post(self._tracing.endpoint, content=body, headers=self._headers)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            return Failure("unavailable", f"the collector cannot be reached ({type(error).__name__})", again=0.0)
        if answer.is_success:
            return answer.content
        reason = f"the collector answered {answer.status_code}"
        if answer.status_code not in _PASSING:
            return Failure("refused", reason)
        return Failure("unavailable", reason, again=min(max(0.0, retry_after(answer.headers.raw) or 0.0), _LONGEST))

    def _lose(self, number: int, loss: Loss, reason: str) -> None:
        """Count what is lost, and tell it where it was not told lately."""
        self.losses[loss] += number
        at, told = self._told
        if time.monotonic() - at > _SELDOM:
            _log.warning("traces_lost", spans=self.lost - told, reason=reason)
            self._told = time.monotonic(), self.lost


def _refused(answer: bytes) -> int:
    """How many spans of a batch a collector has not taken, by its own word."""
    with suppress(DecodeError):
        return max(0, int(ExportTraceServiceResponse.FromString(answer).partial_success.rejected_spans))
    return 0


def _over(task: asyncio.Task[None]) -> None:
    """It has ended before it was to: nobody would hear of it otherwise, but of a queue that is full."""
    if not task.cancelled() and (defect := task.exception()) is not None:
        _log.error("task_died", task=repr(task), exc_info=defect)


# — as protobuf


def _encoded(spans: list[Span], trace: bytes, flags: int) -> bytes:
    """The spans of one trace, as a message of ScopeSpans without its scope."""
    shift = time.time_ns() - time.monotonic_ns()
    message, trace_id = ScopeSpans(), bytes.fromhex(trace.decode())
    for name, kind, own, parent, began, ended, attributes, failed in spans:
        span = message.spans.add()
        span.trace_id = trace_id
        span.span_id = bytes.fromhex(own.decode())
        if parent:
            span.parent_span_id = bytes.fromhex(parent.decode())
        span.flags = flags | (_REMOTE if parent and kind == "server" else _LOCAL)
        span.name = name
        span.kind = _KINDS[kind]
        span.start_time_unix_nano = int(began * 1e9) + shift
        span.end_time_unix_nano = max(int(ended * 1e9), int(began * 1e9)) + shift
        for key, value in attributes.items():
            _put(span.attributes.add(), key, value)
        if failed:
            span.status.code = Status.STATUS_CODE_ERROR
    encoded: bytes = message.SerializeToString()
    return encoded


def _put(entry: KeyValue, key: str, value: Value) -> None:
    entry.key = key
    if isinstance(value, tuple):
        for one in value:
            entry.value.array_value.values.add().string_value = one
    else:
        setattr(entry.value, _MEMBERS[type(value)], value)


_MEMBERS: Mapping[type, str] = {
    str: "string_value",
    bool: "bool_value",
    int: "int_value",
    float: "double_value",
}

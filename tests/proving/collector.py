"""A collector of OpenTelemetry: takes OTLP over HTTP, and remembers the spans.

async with collector() as taken:
    ...  # the exporter's endpoint is taken.url
    assert taken.tree() == ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from gzip import decompress
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from gateway.asgi import Receive, Scope, Send, read_body, respond
from tests.proving.house import served

Value = Any  # of an attribute: str, bool, int, float, or a list of str


@dataclass(frozen=True)
class Taken:
    """One span; ids are hex digits, times nanoseconds since 1970."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    flags: int
    began: int
    ended: int
    said: dict[str, Value]
    failed: bool


@dataclass
class Collector:
    """What it was sent. `answers` are the statuses of the next requests, then 200; while it `hangs` it answers none.
    What it does not take it wants `later`, in seconds."""

    url: str = ""
    spans: list[Taken] = field(default_factory=list)
    resources: list[dict[str, Value]] = field(default_factory=list)
    requests: list[dict[bytes, bytes]] = field(default_factory=list)  # their headers
    times: list[float] = field(default_factory=list)  # when they came, in time.monotonic()
    bodies: list[bytes] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    later: int | None = None
    refuses: int = 0  # spans of each batch
    hangs: bool = False
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    def named(self, name: str) -> list[Taken]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Taken:
        """The one span of this name."""
        (span,) = self.named(name)
        return span

    def tree(self) -> list[str]:
        """The names, each indented below its parent, in the order of their beginnings; `!` after those that failed."""
        there = {span.id for span in self.spans}

        def below(parent: str | None, depth: int) -> list[str]:
            children = [s for s in self.spans if (s.parent == parent if parent else s.parent not in there)]
            lines = []
            for span in sorted(children, key=lambda span: (span.began, span.ended)):
                lines += ["  " * depth + span.name + " !" * span.failed, *below(span.id, depth + 1)]
            return lines

        return below(None, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, 1 << 26)
        self.times.append(time.monotonic())
        self.requests.append({**dict(scope["headers"]), b":path": scope["raw_path"]})
        self.asked.set()
        if self.hangs:
            await receive()  # until the other side has had enough
            return
        status = self.answers.pop(0) if self.answers else 200
        told = ExportTraceServiceResponse()
        headers = [(b"content-type", b"application/x-protobuf")]
        if status >= 400 and self.later is not None:
            headers.append((b"retry-after", b"%d" % self.later))
        if status < 300:
            self._take(decompress(body) if self.requests[-1].get(b"content-encoding") == b"gzip" else body)
            told.partial_success.rejected_spans = self.refuses
        await respond(send, status, told.SerializeToString(), headers)

    def _take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(_said(resource.resource.attributes))
            for scope in resource.scope_spans:
                assert scope.scope.name == "gateway"
                self.spans += [
                    Taken(
                        name=span.name,
                        kind=span.kind,
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        flags=span.flags,
                        began=span.start_time_unix_nano,
                        ended=span.end_time_unix_nano,
                        said=_said(span.attributes),
                        failed=span.status.code == Status.STATUS_CODE_ERROR,
                    )
                    for span in scope.spans
                ]


def _said(attributes: Any) -> dict[str, Value]:
    said = {}
    for entry in attributes:
        kind = entry.value.WhichOneof("value")
        value = getattr(entry.value, kind)
        said[entry.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    assert len(said) == len(attributes), "an attribute was told twice"
    return said


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    taken = Collector()
    async with served(taken) as taken.url:
        yield taken

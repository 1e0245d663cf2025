"""What the gateway tells of itself: one line per exchange, never a body, never a key.

structlog is set up once. On a terminal the lines are for people, elsewhere they are JSON. What other libraries log
takes the same way, and at the sink whatever looks like a key is masked, wherever it came from. Nobody who logs waits
for who reads (lines.py), but on a terminal.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import ssl
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from importlib.util import find_spec
from io import UnsupportedOperation
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import structlog

from gateway import __version__
from gateway.admission import Lease
from gateway.asgi import Cut, Scope, header
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.lines import Lines
from gateway.masks import masked
from gateway.otel import Tracing
from gateway.settings import SettingsError
from gateway.wire import trusting

if TYPE_CHECKING:
    from gateway.traces import Traces

_PATIENCE = 1.0  # seconds that the end of the process waits for lines to be taken

_lines: Lines | None = None  # those of the last set_up, where they wait


def set_up(format_: str, stream: BinaryIO | None = None) -> None:
    """Lines to `stream` (standard output), for `people` or as `json`; `auto` is people on a terminal. They go out of a
    thread: a process that is forked later has to set up anew."""
    stream = stream or sys.stdout.buffer
    people = format_ == "people" or (format_ == "auto" and stream.isatty())
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if people else "iso", utc=not people, key="timestamp"),
    ]
    render = _People() if people else _json
    out = _waiting(stream, render, people)
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.BytesLoggerFactory(file=out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_Sink(out))
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            lambda *event: render(*event).decode(),
        ],
        foreign_pre_chain=[*shared, _logger_name],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_meant)


def _waiting(stream: BinaryIO, render: _Render, people: bool) -> Any:
    """A stream that nobody waits for; a terminal, and what has no descriptor, as it is."""
    global _lines  # one for the process, as structlog's configuration is
    _lines = None
    try:
        descriptor = stream.fileno()
    except UnsupportedOperation:
        return stream
    if stream.isatty():
        return stream

    def told(number: int) -> bytes:
        at = f"{datetime.now():%H:%M:%S}" if people else f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        event = {"event": "log_lines_dropped", "lines": number, "level": "warning", "timestamp": at}
        return render(None, "warning", event) + b"\n"

    stream.flush()
    _lines = Lines(os.dup(descriptor), told)
    atexit.register(finish)
    return _lines


def dropped() -> int:
    """How many lines were dropped, as nobody took them."""
    return 0 if _lines is None else _lines.dropped


def finish() -> bool:
    """Wait until all lines are out, a second at most; the end of the process does so by itself. Returns whether they
    are."""
    return _lines is None or _lines.drain(_PATIENCE)


def observer(traces: Traces | None = None) -> Callable[[Exchange, Scope], None]:
    """What is told of every exchange at its end. Made after set_up: a logger that is bound once is bound for good."""
    log = structlog.get_logger("gateway.access").bind()

    def observe(x: Exchange, scope: Scope) -> None:
        log.info("http_access", **access_fields(x, scope))
        if traces is not None:
            traces.record(x, scope)

    return observe


def tracing(environment: Mapping[str, str]) -> Tracing | None:
    """What OpenTelemetry's variables ask for; None where that is no traces. Raises SettingsError, also where its
    library is not installed, which is not imported here."""
    found = Tracing.read(environment, __version__)
    if found is not None and not all(map(_installed, ("google.protobuf", "opentelemetry.proto.trace.v1.trace_pb2"))):
        raise SettingsError(
            "traces are asked for (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT), and opentelemetry-proto is not "
            "installed: install the extra `traces` of this package, or set OTEL_TRACES_EXPORTER=none"
        )
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is a part of is not there
        return False


def trusted(tracing: Tracing) -> ssl.SSLContext | bool:
    """What a collector is verified by. A plain one needs nothing, and the system's certificates take 45 ms to read.
    Raises SettingsError for certificates that cannot be read."""
    if tracing.endpoint.startswith("http:"):
        return False
    try:
        return trusting(tracing.ca, tracing.certificate, tracing.key)
    except OSError as error:
        raise SettingsError(f"OTEL_EXPORTER_OTLP_CERTIFICATE or its kin: {error}") from error


def traces(environment: Mapping[str, str]) -> Traces | None:
    """What records traces, where OpenTelemetry's variables ask for them. Its library is imported only then.

    To be called in an event loop. Raises SettingsError.
    """
    asked = tracing(environment)
    if asked is None:
        return None
    from gateway.traces import Traces

    return Traces(asked, trusted(asked))


def access_fields(x: Exchange, scope: Scope) -> dict[str, Any]:
    """The one line of an exchange. Field names after OpenTelemetry, units in the names."""
    request, answer, usage = x.request, x.answer, x.usage
    now = time.monotonic()
    fields: dict[str, Any] = {
        "request_id": x.id,
        "http.request.method": scope["method"],
        "http.route": x.endpoint.path,
        "http.response.status_code": x.status,
        "outcome": x.ended,
        "duration_s": round(now - x.received, 6),
    }
    if x.called != x.id.encode():
        fields["client_request_id"] = x.called.decode()
    if x.way is not None:
        fields["trace_id"] = x.way.trace_id
    if x.principal is not None:
        fields["key_id"] = x.principal.key_id
        fields["team"] = x.principal.team
    if request is not None:
        fields["gen_ai.request.model"] = request.model.name
        fields["stream"] = request.stream
    if answer is not None:
        if request is not None and answer.model.name != request.model.name:
            fields["gen_ai.response.model"] = answer.model.name
        fields["upstream.name"] = answer.upstream.name
        fields["upstream.attempts"] = answer.attempts
        fields["ttft_s"] = round(answer.answered - x.received, 6)
        fields["input_tokens"] = usage.input
        fields["cached_tokens"] = usage.cached
        fields["output_tokens"] = usage.output
        fields["reasoning_tokens"] = usage.reasoning
        fields["usage_source"] = usage.source
        fields["bytes_out"] = answer.tail.length
    if x.lease is not None:
        fields |= _limits(x.lease)
    if x.error is not None:
        fields |= _failure(x.error)
    retries = header(scope["headers"], b"x-stainless-retry-count")
    if retries is not None and retries.isdigit():
        fields["sdk_retry_count"] = int(retries[:3])
    return fields


def _failure(error: GatewayError) -> dict[str, Any]:
    refused = {"limits.refused": error.policies} if error.policies else {}
    return {"error.type": error.code or error.type, **refused}


def _limits(lease: Lease) -> dict[str, Any]:
    """What is said of limits where there is more to say than that they let pass."""
    over = [standing.charge.limit.name for standing in lease.standings if standing.over]
    said: dict[str, Any] = {"limits.would_refuse": over} if over else {}
    return said | {"limits.degraded": True} if lease.degraded else said


_Render = Callable[[Any, str, MutableMapping[str, Any]], bytes]


def _json(logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
    if event.get("event") == "http_access":
        text = msgspec.json.encode(event)
    else:  # whatever others log: msgspec refuses half characters, and hides bytes in base64 where no mask finds a key
        text = json.dumps(event, default=repr, ensure_ascii=False, skipkeys=True).encode("utf-8", "backslashreplace")
    return masked(text)


class _People:
    """Columns for people: an exchange is a row, the rest is structlog's own console."""

    def __init__(self) -> None:
        self._console = structlog.dev.ConsoleRenderer(colors=True, pad_event_to=24)

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> bytes:
        if event.get("event") == "http_access":
            return masked(_row(event).encode())
        return masked(str(self._console(logger, method, event)).encode("utf-8", "backslashreplace"))


_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_COLOURS = {2: "\x1b[32m", 4: "\x1b[33m", 5: "\x1b[31m"}


def _row(e: Mapping[str, Any]) -> str:
    status = e["http.response.status_code"]
    tokens = f"{e['input_tokens']:>6} → {e['output_tokens']:<6}" if "input_tokens" in e else " " * 15
    counted = "~" if e.get("usage_source") == "counted" else " "
    model = e.get("gen_ai.request.model", "-").rpartition("/")[2]
    why = e.get("error.type") or ("" if e["outcome"] == "complete" else e["outcome"])
    return (
        f"{_DIM}{e['timestamp']}{_PLAIN} {_COLOURS.get(status // 100, '')}{_BOLD}{status}{_PLAIN} "
        f"{e['http.route']:<20} {model:<24.24} {e.get('team', '-'):<12.12} {tokens}{counted} "
        f"{e['duration_s'] * 1000:>8.1f} ms  {_DIM}{e['request_id']}{_PLAIN} {why}"
    )


def _logger_name(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["logger"] = event["_record"].name
    return event


def _meant(record: logging.LogRecord) -> bool:
    """Not a defect, and so not a line: an answer that is cut off on purpose ends uvicorn's task with an exception."""
    return not (record.exc_info and isinstance(record.exc_info[1], Cut | asyncio.CancelledError))


class _Sink:
    """The text side of the byte stream that the lines go to."""

    def __init__(self, out: BinaryIO | Lines) -> None:
        self._out = out

    def write(self, text: str) -> None:
        self._out.write(text.encode("utf-8", "replace"))

    def flush(self) -> None:
        self._out.flush()

"""What the doctor finds of traces: whether what asks for them is understood, and whether the collector takes them."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

from gateway import telemetry
from gateway.findings import Finding, error, ok, warning
from gateway.otel import Tracing
from gateway.settings import SettingsError

_CHECK = "traces"
_VARIABLES = "OTEL_* variables"
_PATIENCE = 3.0  # seconds that a collector has to answer
_UNKNOWN = (401, 403, 407)


async def trace_findings(environment: Mapping[str, str]) -> list[Finding]:
    """A finding of the variables; where they ask for traces, one of the collector, which is sent a batch of none."""
    try:
        tracing = telemetry.tracing(environment)
        if tracing is None:
            return [ok(_CHECK, _VARIABLES, "none are asked for")]
        trust = telemetry.trusted(tracing)
    except SettingsError as failure:
        do = "mend it, or OTEL_TRACES_EXPORTER=none: a gateway does not start with it"
        return [error(_CHECK, _VARIABLES, str(failure), "variables that are understood", do)]
    share = f"{tracing.ratio * 100:g} % of new ones{', and what callers record' if tracing.by_parent else ''}"
    async with httpx.AsyncClient(verify=trust, timeout=_PATIENCE, trust_env=False) as client:
        return [ok(_CHECK, _VARIABLES, share), await _asked(client, tracing)]


async def _asked(client: httpx.AsyncClient, tracing: Tracing) -> Finding:
    """Requests are served without a collector, too, and so it is never an error."""
    headers = {**tracing.headers, "content-type": "application/x-protobuf"}
    of, expected = f"collector {tracing.where}", "a collector that takes OTLP over HTTP"
    try:
        answer = await client.post(tracing.endpoint, content=b"", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as failure:  # whose words may hold an address with a password
        do = "start it, or OTEL_EXPORTER_OTLP_ENDPOINT: HTTP is on port 4318 as a rule, and 4317 is gRPC's"
        return warning(_CHECK, of, f"cannot be reached ({type(failure).__name__})", expected, do)
    if answer.is_success:
        return ok(_CHECK, of, "takes them")
    variable = "HEADERS" if answer.status_code in _UNKNOWN else "ENDPOINT"
    do = f"OTEL_EXPORTER_OTLP_{variable}, or its own log"
    return warning(_CHECK, of, f"answered {answer.status_code}", expected, do)

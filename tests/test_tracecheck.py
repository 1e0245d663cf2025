"""What the doctor finds of traces: the variables, and a collector that is really asked."""

from __future__ import annotations

import pytest

from gateway.findings import Finding
from gateway.tracecheck import trace_findings
from tests.proving.collector import collector
from tests.proving.ports import free_port


def told(findings: list[Finding]) -> list[tuple[str, str]]:
    assert {one.check for one in findings} == {"traces"}
    assert all((one.verdict == "ok") != bool(one.expected and one.do) for one in findings)
    return [(one.verdict, one.found) for one in findings]


async def test_traces_that_nobody_asks_for_are_well() -> None:
    assert told(await trace_findings({})) == [("ok", "none are asked for")]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"OTEL_TRACES_SAMPLER": "some"}, 'OTEL_TRACES_SAMPLER is "some", expected one of always_on, '),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "none.pem"}, "OTEL_EXPORTER_OTLP_CERTIFICATE or its kin: [Errno 2]"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "sk-canary"}, "OTEL_EXPORTER_OTLP_HEADERS is another text"),
    ],
)
async def test_what_keeps_a_gateway_from_starting_is_an_error(variables: dict[str, str], found: str) -> None:
    ((verdict, said),) = told(await trace_findings({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://c:1", **variables}))
    assert (verdict, said.startswith(found)) == ("error", True)
    assert "canary" not in said


@pytest.mark.parametrize(
    ("status", "verdict", "found", "do"),
    [
        (200, "ok", "takes them", ""),
        (401, "warning", "answered 401", "OTEL_EXPORTER_OTLP_HEADERS, or its own log"),
        (404, "warning", "answered 404", "OTEL_EXPORTER_OTLP_ENDPOINT, or its own log"),
    ],
)
async def test_the_collector_is_sent_a_batch_of_none_with_what_it_wants_to_see(
    status: int, verdict: str, found: str, do: str
) -> None:
    async with collector() as taken:
        taken.answers = [status]
        address = taken.url.replace("//", "//user:canary@")
        asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_EXPORTER_OTLP_HEADERS": "x-key=canary"}
        findings = await trace_findings(
            {**asked, "OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": ".5"}
        )
    assert told(findings) == [("ok", "50 % of new ones"), (verdict, found)]
    assert (findings[1].of, findings[1].do) == (f"collector {taken.url[7:]}", do)
    (sent,) = taken.requests
    assert (sent[b"x-key"], sent[b"authorization"][:6], sent[b":path"]) == (b"canary", b"Basic ", b"/v1/traces")
    assert taken.spans == []
    assert "canary" not in repr(findings)


@pytest.mark.parametrize("address", ["http://user:canary@127.0.0.1:{}", "http://user:canary@1.2.3.999"])
async def test_a_collector_that_is_away_is_a_risk_and_no_error(address: str) -> None:
    findings = await trace_findings({"OTEL_EXPORTER_OTLP_ENDPOINT": address.format(free_port())})
    assert [verdict for verdict, _ in told(findings)] == ["ok", "warning"]
    assert findings[1].found.startswith("cannot be reached (")
    assert "canary" not in repr(findings)

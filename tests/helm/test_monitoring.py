"""Alerts and dashboard speak of figures that there are, and every alert has a page to turn to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import yaml

from tests.helm.rendered import CHART, case, of_kind, one, render
from tests.proving.commands import ROOT

ALERTS = yaml.safe_load((CHART / "alerts.yaml").read_text("utf-8"))
DASHBOARD = json.loads((CHART / "dashboards" / "gateway.json").read_text("utf-8"))

# The figures of the control plane, with their labels; those of a histogram have le besides, those of a pod what the
# scrape adds.
METRICS: dict[str, set[str]] = {
    "gateway_http_requests_total": {"method", "route", "status"},
    "gateway_http_request_duration_seconds": {"route"},
    "gateway_http_active_requests": set(),
    "gateway_refusals_total": {"code", "limit"},
    "gateway_requests_ended_total": {"ended"},
    "gateway_tokens_total": {"team", "model", "type"},
    "gateway_cost_usd_total": {"team", "model"},
    "gateway_time_to_first_byte_seconds": {"model"},
    "gateway_time_per_output_token_seconds": {"model"},
    "gateway_overhead_seconds": set(),
    "gateway_event_loop_lag_seconds": set(),
    "gateway_upstream_up": {"pool", "upstream"},
    "gateway_upstream_in_flight": {"pool", "upstream"},
    "gateway_upstream_attempts_total": {"pool", "upstream", "result"},
    "gateway_store_up": set(),
    "gateway_store_call_seconds": {"script"},
    "gateway_store_losses_total": set(),
    "gateway_spool_bytes": set(),
    "gateway_spool_files": set(),
    "gateway_spool_takes": set(),
    "gateway_ledger_rows": {"organisation"},
    "gateway_export_lag": {"export", "organisation"},
    "gateway_export_pending": {"export", "organisation"},
    "gateway_export_dead_letters": {"export", "organisation"},
    "gateway_policies_info": {"revision"},
    "gateway_policies_reloads_total": {"result"},
    "gateway_policies_last_reload_successful": set(),
    "gateway_trace_spans_lost_total": {"reason"},
    "gateway_log_lines_dropped_total": set(),
    "gateway_workers": {"state"},
    "gateway_worker_restarts_total": set(),
    "gateway_build_info": {"version"},
}


def test_the_figures_named_here_are_those_of_the_gateway() -> None:
    """The README's table is compared with what workers tell (test_meters.py), and the control plane's own are its."""
    told = (ROOT / "README.md").read_text("utf-8").partition("### Figures")[2].partition("What is in the store")[0]
    workers = set(re.findall(r"`(gateway_\w+)`", told))
    own = set(re.findall(r'"(gateway_\w+)"', (ROOT / "gateway" / "figures.py").read_text("utf-8")))
    named = {name.removesuffix("_total") for name in METRICS}
    assert named == {name.removesuffix("_total") for name in workers | own}


HISTOGRAMS = {
    "gateway_http_request_duration_seconds",
    "gateway_time_to_first_byte_seconds",
    "gateway_time_per_output_token_seconds",
    "gateway_overhead_seconds",
    "gateway_event_loop_lag_seconds",
    "gateway_store_call_seconds",
}
SCRAPED = {"pod", "namespace", "app_kubernetes_io_instance"}


def _rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = one(case("pod-monitor"), "PrometheusRule")["spec"]["groups"][0]["rules"]
    return rules


def _queries() -> Iterator[tuple[str, str]]:
    """Every expression of alerts, dashboard and scalers, with where it stands."""
    for rule in _rules():
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    yield "keda", one(case("keda"), "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]


QUERIES = dict(_queries())


@pytest.mark.parametrize("where", QUERIES)
def test_queries_ask_for_figures_and_labels_that_there_are(where: str) -> None:
    query = QUERIES[where]
    metrics = re.findall(r"\bgateway_\w+", re.sub(r'"[^"]*"', '""', query))
    assert metrics
    known = set(SCRAPED)
    for metric in metrics:
        name = metric.removesuffix("_bucket")
        assert name in METRICS
        assert (name in HISTOGRAMS) == metric.endswith("_bucket")
        known |= METRICS[name] | ({"le"} if metric.endswith("_bucket") else set())
    for labels in re.findall(r"\bby \(([^)]*)\)", query):
        assert {label.strip() for label in labels.split(",")} <= known
    for matchers in re.findall(r"\{([^}]*)\}", query):
        assert set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', matchers)) <= known


@pytest.mark.parametrize("where", QUERIES)
def test_queries_ask_for_one_release_and_are_whole(where: str) -> None:
    query = QUERIES[where]
    of = r'namespace="(llm|\$namespace)",app_kubernetes_io_instance="(gw|\$release)"'
    assert len(re.findall(of, query)) == len(re.findall(r"\bgateway_\w+\{", query)) > 0
    assert not set(re.findall(r"\$(\w+)", query)) - {"namespace", "release", "__rate_interval"}
    for rate in re.findall(r"\b(?:rate|increase|changes)\((gateway_\w+)", query):
        assert rate.endswith(("_total", "_bucket"))  # of what only grows


# PromQL, as much as we write of it: what is whole becomes what it is, V figures of now, R of a time, N a number.
GRAMMAR = [
    (r'\bgateway_\w+\{(?:\w+(?:=|!=|=~|!~)"[^"]*",?)*\}', "V"),
    (r"V\[(?:\d+[smh]|\$__rate_interval)\]", "R"),
    (r"(?<![\w.$])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", "N"),
    (r"\b(?:rate|increase|changes)\(R\)", "V"),
    (r"\b(?:sum|min|max|count)(?: by \(\w+(?:, \w+)*\) )?\(V\)", "V"),
    (r"\bhistogram_quantile\(N, V\)", "V"),
    (r"\bvector\(N\)", "V"),
    (r"(?<!\w)(?<!\) )\(V\)", "V"),
    (r"\bN \* N\b", "N"),
    (r"\bV (?:[*/]|or|[=!]=|[<>]=?) [VN]\b", "V"),
]


def _read(query: str) -> str:
    """What is left of a query when all that is whole in it is read: V, or where it is wrong."""
    before, left = "", " ".join(query.split())
    while left != before:
        before = left
        for whole, what in GRAMMAR:
            left = re.sub(whole, what, left)
    return left


@pytest.mark.parametrize("where", QUERIES)
def test_queries_are_written_as_promql_is(where: str) -> None:
    assert _read(QUERIES[where]) == "V"


@pytest.mark.parametrize(
    "broken",
    [
        "sum(gateway_a{}",
        "sum(gateway_a{)}",
        "summ(gateway_a{})",
        "sum by pod (gateway_a{})",
        "sum(gateway_a{}[5m])",
        "rate(gateway_a{}[5 m])",
        "gateway_a{} == $x",
        'gateway_a{b="c" d="e"}',
        "gateway_a{} gateway_b{}",
        "gateway_a{}[5m]",
        "up{} == 0",
    ],
)
def test_a_query_that_is_not_promql_is_found(broken: str) -> None:
    assert _read(broken) != "V"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    readme = (CHART / "README.md").read_text("utf-8")
    headings = re.findall(r"^### (Gateway\w+)$", readme, re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]
    for rule in _rules():
        assert rule["annotations"]["runbook_url"] == f"helm/README.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]


def test_links_of_the_readme_lead_to_headings_of_it() -> None:
    readme = (CHART / "README.md").read_text("utf-8")
    headings = {
        re.sub(r"[^\w-]", "", line.lower().replace(" ", "-")) for line in re.findall(r"^#+ (.+)$", readme, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", readme)) <= headings


def test_labels_that_a_summary_shows_are_left_by_its_expression() -> None:
    for alert in ALERTS:
        kept = {label for labels in re.findall(r"\bby \(([^)]*)\)", alert["expr"]) for label in labels.split(", ")}
        assert set(re.findall(r"\$labels\.(\w+)", alert["summary"])) <= kept - {"le"}


def test_alerts_of_two_releases_are_two() -> None:
    """What they add up has no label of a release, and Alertmanager takes for one what has the same labels."""
    for rule in _rules():
        assert rule["labels"].items() >= {"namespace": "llm", "release": "gw"}.items()


def test_a_pod_that_says_it_is_not_ready_is_no_error_of_a_request() -> None:
    (errors,) = (rule["expr"] for rule in _rules() if rule["alert"] == "GatewayErrors")
    assert errors.count('route!~"/healthz/.*"') == errors.count("gateway_http_requests_total{") == 2


def test_thresholds_are_those_of_the_values() -> None:
    given = {"enabled": True, "errorRatio": 0.01, "overheadSeconds": 0.5, "exportLag": 10**9, "runbooks": "https://w/x"}
    values = {"prometheusRule": given, "podMonitor": {"enabled": True}, "workers": 4, "spoolMost": 2**30}
    rules = {r["alert"]: r for r in one(render(values), "PrometheusRule")["spec"]["groups"][0]["rules"]}
    assert rules["GatewayErrors"]["expr"].endswith("> 0.01")
    assert rules["GatewaySlow"]["expr"].endswith("> 0.5")
    assert rules["GatewayExportBehind"]["expr"].endswith("> 1000000000")
    assert rules["GatewaySpoolFills"]["expr"].endswith(f"> 0.5 * {4 * 2**30}")
    assert rules["GatewaySlow"]["annotations"]["runbook_url"] == "https://w/x#gatewayslow"


def test_what_the_operator_looks_for_is_on_its_objects() -> None:
    made = case("service-monitor")
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert one(made, kind)["metadata"]["labels"]["release"] == "prom"
    assert one(made, "ServiceMonitor")["spec"]["podTargetLabels"] == ["app.kubernetes.io/instance"]
    assert one(case("pod-monitor"), "PodMonitor")["spec"]["podTargetLabels"] == ["app.kubernetes.io/instance"]


def test_the_dashboard_arrives_as_it_is_and_is_found() -> None:
    found = [m for m in of_kind(case("service-monitor"), "ConfigMap") if m["metadata"]["name"].endswith("-dashboard")]
    assert [json.loads(manifest["data"]["model-gateway.json"]) for manifest in found] == [DASHBOARD]
    assert found[0]["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_panels_do_not_lie_on_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places) > 20
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_the_dashboard_shows_what_operators_ask_for() -> None:
    shown = {name.removesuffix("_bucket") for query in QUERIES.values() for name in re.findall(r"gateway_\w+", query)}
    beside = {"gateway_spool_files", "gateway_ledger_rows", "gateway_export_pending", "gateway_build_info"}
    assert set(METRICS) - shown == beside

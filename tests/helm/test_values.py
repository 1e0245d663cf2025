"""What may be set: everything that is not in the schema is refused, and the refusal names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.otel import Tracing
from tests import docs
from tests.helm.rendered import CHART, EXTERNAL, MATRIX, case, chart, gateway_pod, helm, one, render, schema, texts

# Whose content is not ours to know: Kubernetes checks affinities and whole objects, the gateway its documents.
FREE = {
    "affinity.nodeAffinity",
    "affinity.podAffinity",
    "affinity.podAntiAffinity",
    "extraObjects[]",
    "extraVolumes[]",
    "global",
    "policies.documents{}",
}


def _objects(node: Any, path: str, whole: Any) -> Iterator[tuple[str, Any]]:
    """Every schema of an object, with the path of the value that it is for."""
    if "$ref" in node:
        assert set(node) == {"$ref"}  # what stands beside it is not read
        node = whole["definitions"][node["$ref"].rpartition("/")[2]]
    if node.get("type") == "object":
        yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from _objects(inner, f"{path}.{name}".lstrip("."), whole)
    for inner in node.get("anyOf", ()):
        yield from _objects(inner, path, whole)
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(node.get(key), dict):
            yield from _objects(node[key], path + mark, whole)


def test_every_object_is_closed() -> None:
    found = list(_objects(schema(), "", schema()))
    assert len(found) > 50
    assert {path for path, node in found if node.get("additionalProperties", True) is True} == FREE


def _paths(values: Any, path: str = "") -> Iterator[str]:
    """The path of every member of values, down to what has none."""
    for name, inner in values.items() if isinstance(values, dict) else ():
        yield f"{path}{name}"
        yield from _paths(inner, f"{path}{name}.")


def test_values_and_schema_know_the_same_keys() -> None:
    in_schema = {
        f"{path}.{name}".lstrip(".")
        for path, node in _objects(schema(), "", schema())
        for name in node.get("properties", ())
    }
    in_values = set(_paths(chart().values))
    assert in_values - in_schema == {
        *(
            f"{where}.{kind}.{what}"
            for where in ("resources", "valkey.resources")
            for kind in ("requests",)
            for what in ("cpu", "memory")
        ),
        "resources.limits.memory",
        "valkey.resources.limits.memory",
        "dashboard.labels.grafana_dashboard",
    }
    missing = {path for path in in_schema - in_values if "[]" not in path and "{}" not in path}
    assert missing == {"global", *(path for path in FREE if path.startswith("affinity."))}


def test_no_variable_that_the_chart_sets_can_be_set_besides() -> None:
    told = {variable["name"] for variable in gateway_pod(case("nothing"))["containers"][0]["env"]}
    assert told == set(schema()["definitions"]["variable"]["not"]["enum"])


def test_the_values_that_are_there_fit() -> None:
    chart().validate_schema({})
    chart().validate_schema({"global": {"whatever": 1}})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 3}, "'replica' not allowed"),
        ({"replicas": "3"}, "/replicas'"),
        ({"replicas": 2.5}, "/replicas'"),
        ({"workers": 0}, "/workers'"),
        ({"maxStreamSeconds": -1}, "/maxStreamSeconds'"),
        ({"preStopSeconds": "10s"}, "/preStopSeconds'"),
        ({"spoolMost": "256Mi"}, "/spoolMost'"),
        ({"log": "text"}, "/log'"),
        ({"image": {"tagg": "1"}}, "'tagg' not allowed"),
        ({"image": {"tag": 1.1}}, "/image/tag'"),
        ({"image": {"digest": "sha256:abc"}}, "/image/digest'"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy'"),
        ({"policies": {"documents": {"teams.json": {}}}}, "'teams.json'"),
        ({"policies": {"documents": {"../teams.yaml": {}}}}, "'../teams.yaml'"),
        ({"policies": {"documents": {"teams.yaml": 7}}}, "/policies/documents/teams.yaml'"),
        ({"secrets": {"keyPepper": "a secret"}}, "'keyPepper' not allowed"),
        ({"secrets": {"env": [{"name": "A", "value": "a secret"}]}}, "'value' not allowed"),
        ({"secrets": {"env": [{"name": "A-B", "secret": "s", "key": "k"}]}}, "/secrets/env/0/name'"),
        ({"secrets": {"files": [{"secret": "s"}]}}, "missing property 'path'"),
        ({"store": {"url": "redis://:secret@valkey"}}, "'url' not allowed"),
        ({"store": {"existingSecret": "Not_A_Name"}}, "/store/existingSecret'"),
        ({"valkey": {"password": "a secret"}}, "'password' not allowed"),
        ({"valkey": {"maxMemory": "1Gi"}}, "/valkey/maxMemory'"),
        ({"valkey": {"appendfsync": "no"}}, "/valkey/appendfsync'"),
        ({"resources": {"limits": {"memory": "1 GB"}}}, "/resources/limits/memory'"),
        ({"resources": {"limit": {}}}, "'limit' not allowed"),
        ({"extraEnv": [{"name": "GATEWAY_ADMIN_KEY", "value": "a secret"}]}, "/extraEnv/0/name'"),
        ({"extraEnv": [{"name": "GATEWAY_DRAIN", "value": "5"}]}, "/extraEnv/0/name'"),
        ({"secrets": {"env": [{"name": "GATEWAY_PORT", "secret": "s", "key": "k"}]}}, "/secrets/env/0/name'"),
        ({"tolerations": [{"effect": "NoSchedul"}]}, "/tolerations/0/effect'"),
        ({"affinity": {"nodeAfinity": {}}}, "'nodeAfinity' not allowed"),
        ({"service": {"type": "ExternalName"}}, "/service/type'"),
        ({"service": {"port": 70000}}, "/service/port'"),
        ({"ingress": {"hosts": ["https://llm.example"]}}, "/ingress/hosts/0'"),
        ({"httpRoute": {"parentRefs": [{"namespace": "edge"}]}}, "missing property 'name'"),
        ({"autoscaling": {"minReplicas": 0}}, "/autoscaling/minReplicas'"),
        ({"autoscaling": {"targetCPU": "70%"}}, "/autoscaling/targetCPU'"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "/podDisruptionBudget/maxUnavailable'"),
        ({"networkPolicy": {"callers": [{}]}}, "/networkPolicy/callers/0'"),
        ({"networkPolicy": {"egress": [{"port": 443}]}}, "'port' not allowed"),
        ({"serviceMonitor": {"interval": 15}}, "/serviceMonitor/interval'"),
        ({"prometheusRule": {"errorRatio": 5}}, "/prometheusRule/errorRatio'"),
        ({"exporters": {"Ware_house": {}}}, "'Ware_house'"),
        ({"exporters": {"warehouse": {"dsn": "a secret"}}}, "'dsn' not allowed"),
        ({"extraObjects": [{"kind": "ConfigMap"}]}, "/extraObjects/0'"),
    ],
    ids=lambda found: str(found)[:50],
)
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmValuesError) as refused:
        chart().validate_schema(values)
    assert named in str(refused.value)
    assert "a secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"autoscaling": {"enabled": True}, "keda": {"enabled": True, "serverAddress": "http://p"}},
            "both true, expected one of them: two",
        ),
        ({"keda": {"enabled": True}}, "keda.serverAddress is empty, expected the address of Prometheus"),
        (
            {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 3}},
            "minReplicas is 9, expected at most autoscaling.maxReplicas, 3",
        ),
        (
            {"autoscaling": {"enabled": True, "targetCPU": 0, "targetInFlight": 0}},
            "are both 0, expected one to scale by",
        ),
        (
            {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}},
            "resources.requests.cpu is missing",
        ),
        (
            {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
            "expected one of them: everything would be counted twice",
        ),
        (
            {"prometheusRule": {"enabled": True}},
            "without figures to look at, expected serviceMonitor.enabled or podMonitor",
        ),
        ({"store": {"existingSecret": "store"}}, "expected one store: set valkey.enabled to false"),
        ({"valkey": {"enabled": False}}, "there is no store, expected store.existingSecret"),
        (
            {"valkey": {"maxMemory": "2gb"}},
            "maxMemory is 2gb, expected less than valkey.resources.limits.memory, 2Gi",
        ),
        (
            {"valkey": {"maxMemory": "954mb", "resources": {"limits": {"memory": 1e9}}}},
            "maxMemory is 954mb, expected less than valkey.resources.limits.memory, 1e+09",
        ),
        ({"policies": {"documents": {"a.yaml": {}}, "existingConfigMap": "b"}}, "are both set, expected one of them"),
        ({"ingress": {"enabled": True}}, "ingress.hosts is empty, expected at least one host name"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs is empty, expected at least one Gateway"),
        (
            {"exporters": {"archive": {"claim": "usage"}}},
            "exporters.archive has one of claim and path, expected both or none",
        ),
    ],
    ids=lambda found: str(found)[:50],
)
def test_what_does_not_go_together_is_refused_with_what_was_expected(values: dict[str, Any], told: str) -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        texts(values)
    assert told in str(refused.value)


def test_a_release_whose_name_no_service_can_have_is_told_what_to_do() -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        texts({}, release="7")
    assert "called 7, expected a name that begins with a letter" in str(refused.value)
    assert texts({"fullnameOverride": "seven"}, release="7")


@pytest.mark.parametrize(("most", "limit"), [("2047mb", "2Gi"), ("1gb", "1.1Gi"), ("953mb", 1e9), ("100gb", None)])
def test_a_store_that_has_room_may_be_as_large_as_it_likes(most: str, limit: object) -> None:
    assert texts({"valkey": {"maxMemory": most, "resources": {"limits": {"memory": limit}}}})


def test_all_that_does_not_go_together_is_told_at_once() -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        texts({"valkey": {"enabled": False}, "ingress": {"enabled": True}, "httpRoute": {"enabled": True}})
    assert str(refused.value).count("expected") == 3


def test_what_the_readme_shows_can_be_installed(tmp_path: Path) -> None:
    readme = (CHART / "README.md").read_text("utf-8")
    production, traces, exporters = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    )
    made = render({**production, **traces, **exporters})
    kinds = {manifest["kind"] for manifest in made}
    told = {variable["name"]: variable.get("value", "") for variable in gateway_pod(made)["containers"][0]["env"]}
    asked = Tracing.read(told, "0")
    assert asked is not None
    assert (asked.endpoint, asked.ratio) == ("http://collector.monitoring:4318/v1/traces", 0.01)
    assert {"ScaledObject", "PodMonitor", "PrometheusRule", "HTTPRoute"} <= kinds
    assert not {"Secret", "StatefulSet"} & kinds
    (set_file,) = re.findall(r"--set-file '(.*?)=policies.yaml'", readme)
    (tmp_path / "policies.yaml").write_text("gateway: {}\n")
    given = helm.parse_set_file(f"{set_file}={tmp_path / 'policies.yaml'}")
    assert one(render(given), "ConfigMap")["data"] == {"all.yaml": "gateway: {}\n"}


def test_the_matrix_sets_every_group_of_values() -> None:
    settled = {name for values in MATRIX.values() for name in values}
    assert set(yaml.safe_load((CHART / "values.yaml").read_text())) - settled == {
        "nameOverride",
        "log",
        "resources",
    }
    assert EXTERNAL.items() <= MATRIX["own-store"].items()


def test_a_value_without_a_word_about_it_is_a_defect() -> None:
    good = "# -- about a\na: 1\ngroup:\n  # -- about b\n  b:\n    c: 2\n"
    told = dict(docs.explained(good))
    assert told == {("a",): "about a", ("group", "b"): "about b"}
    with pytest.raises(ValueError, match=r"values.yaml:7 group.d has no comment, expected `# -- meaning` above it"):
        list(docs.explained(good + "  d: 3\n"))

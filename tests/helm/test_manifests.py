"""What the chart makes is what Kubernetes takes, whatever is set: fields, names, references, numbers, rights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import yaml

from gateway import supervisor
from gateway.policy import load
from gateway.settings import Settings
from tests.helm.rendered import (
    CHART,
    MATRIX,
    Manifest,
    case,
    component,
    every_case,
    gateway_pod,
    helm,
    of_kind,
    one,
    pods,
    render,
    secrets_of,
    texts,
)

kubernetes: Any = pytest.importorskip(
    "kubernetes_validate", reason="no schemas of Kubernetes here (kubernetes-validate, in requirements-dev.lock)"
)
# The validator reads 1 MB of definitions for each object, and we have many.
kubernetes.utils.schema_contents = cache(kubernetes.utils.schema_contents)

VERSIONS = ("1.30", "1.34", "1.37")  # the oldest of Chart.yaml, one between, the newest that there are schemas of

# What is no part of Kubernetes: the fields of `spec` that its owners require, and those that the chart may use besides.
FOREIGN: Mapping[tuple[str, str], tuple[set[str], set[str]]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): ({"endpoints", "selector"}, {"podTargetLabels"}),
    ("monitoring.coreos.com/v1", "PodMonitor"): ({"podMetricsEndpoints", "selector"}, {"podTargetLabels"}),
    ("monitoring.coreos.com/v1", "PrometheusRule"): ({"groups"}, set()),
    ("keda.sh/v1alpha1", "ScaledObject"): (
        {"scaleTargetRef", "triggers"},
        {"minReplicaCount", "maxReplicaCount", "advanced"},
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): ({"parentRefs", "rules"}, {"hostnames"}),
}


@every_case
def test_helm_finds_nothing_to_complain_of(name: str) -> None:
    report = helm.lint(CHART, MATRIX[name], strict=True, namespace="llm", kube_version="v1.30.0")
    said = [message for message in report["messages"] if message["error"] != "icon is recommended"]
    assert (said, report["errors"]) == ([], [])


@every_case
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    taken = 0
    for manifest in case(name):
        if (manifest["apiVersion"], manifest["kind"]) not in FOREIGN:
            kubernetes.validate(manifest, version, strict=True)
            taken += 1
    assert taken >= 5


@every_case
def test_what_is_not_of_kubernetes_has_the_fields_that_its_owners_require(name: str) -> None:
    for manifest in case(name):
        if (manifest["apiVersion"], manifest["kind"]) in FOREIGN:
            required, allowed = FOREIGN[manifest["apiVersion"], manifest["kind"]]
            assert required <= set(manifest["spec"]) <= required | allowed
            assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}


def test_the_oldest_version_is_the_one_that_the_chart_names() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["kubeVersion"] == f">={VERSIONS[0]}.0-0"


def test_every_object_that_is_foreign_is_in_the_matrix() -> None:
    found = {(manifest["apiVersion"], manifest["kind"]) for name in MATRIX for manifest in case(name)}
    assert set(FOREIGN) <= found


@every_case
def test_no_two_objects_have_one_name_and_all_names_are_labels(name: str) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in case(name)]
    assert len(set(names)) == len(names)
    assert [found for _, found in names if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", found)] == []


def test_a_long_name_leaves_room_for_what_is_put_after_it() -> None:
    made = render({"fullnameOverride": "a" * 40, "exporters": {"b" * 12: {}}})
    assert max(len(manifest["metadata"]["name"]) for manifest in made) <= 63


def test_names_that_look_like_numbers_or_more_of_yaml_stay_names() -> None:
    odd = {
        "nameOverride": "1e3",
        "fullnameOverride": "gw",
        "image": {"pullSecrets": ["1e3"]},
        "priorityClassName": "1000",
        "serviceAccount": {"name": "0x1f"},
        "secrets": {
            "existingSecret": "123",
            "env": [{"name": "NO", "secret": "1.5", "key": "yes"}],
            "envFrom": ["7"],
            "files": [{"secret": "8", "path": "/etc/a, b}"}],
        },
        "extraEnv": [{"name": "Y", "value": "no"}],
        "store": {"existingSecret": "9", "key": "1"},
        "valkey": {"enabled": False},
        "policies": {"existingConfigMap": "2026"},
        "ingress": {"enabled": True, "hosts": ["a"], "className": "1", "tlsSecret": "2"},
        "exporters": {
            "2026": {
                "export": "1e3",
                "claim": "10",
                "path": "/var/a b",
                "env": [{"name": "N", "secret": "1", "key": "0"}],
            }
        },
    }
    stored = {"valkey": {"existingSecret": "1", "persistence": {"storageClass": "2", "size": 1000000000}}}
    for made in (render(odd, release="7"), render({**stored, "fullnameOverride": "gw"}, release="7")):
        for manifest in made:
            kubernetes.validate(manifest, VERSIONS[-1], strict=True)
    (pod,) = (spec for meta, spec in pods(render(odd)) if meta["labels"].get("model-gateway/export") == "2026")
    assert pod["containers"][0]["args"] == ["export", "1e3"]
    assert {"/etc/a, b}", "/var/a b"} < {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


def test_a_new_version_replaces_no_pod_that_it_does_not_change() -> None:
    """The store is one pod: while it is replaced, limits are held without it."""
    for metadata, _ in pods([m for m in case("exporters") if m["kind"] != "Pod"]):
        assert {name.rpartition("/")[2] for name in metadata["labels"]} <= {"name", "instance", "component", "export"}


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(inner)
    else:
        yield tree


@every_case
def test_whole_numbers_stay_whole(name: str) -> None:
    """Helm's numbers are floats: 600 becomes 600.0 in TOML, and 1e+06 in text."""
    assert [leaf for manifest in case(name) for leaf in _leaves(manifest) if isinstance(leaf, float)] in ([], [0.1])
    found = [text for text in texts(MATRIX[name]).values() if re.search(r"[0-9]e\+?[0-9]{2}\b", text)]
    assert found == []


# — what belongs together


def _fits(selector: Manifest, labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


@every_case
def test_selectors_find_their_own_pods_and_no_others(name: str) -> None:
    made = case(name)
    labels = {json.dumps(metadata["labels"]): metadata["labels"] for metadata, _ in pods(made)}.values()
    for manifest in of_kind(made, "Deployment", "StatefulSet"):
        selector = manifest["spec"]["selector"]["matchLabels"]
        assert [found for found in labels if _fits(selector, found)] == [
            manifest["spec"]["template"]["metadata"]["labels"]
        ]
    wanted = {"gateway": "gateway", "admin": "gateway", "valkey": "valkey", "exporter": "exporter", "test": "test"}
    selectors = [(component(service), service["spec"]["selector"]) for service in of_kind(made, "Service")]
    selectors += [
        (component(manifest), manifest["spec"][where]["matchLabels"])
        for kind, where in (
            ("PodDisruptionBudget", "selector"),
            ("NetworkPolicy", "podSelector"),
            ("PodMonitor", "selector"),
        )
        for manifest in of_kind(made, kind)
    ]
    for spread in gateway_pod(made).get("topologySpreadConstraints", ()):
        selectors.append(("gateway", spread["labelSelector"]["matchLabels"]))
    for of, selector in selectors:
        found = {one["app.kubernetes.io/component"] for one in labels if _fits(selector, one)}
        assert found == {wanted[of]}


def test_a_service_monitor_finds_the_service_of_the_control_plane_alone() -> None:
    made = case("service-monitor")
    monitor = one(made, "ServiceMonitor")["spec"]
    found = [s for s in of_kind(made, "Service") if _fits(monitor["selector"]["matchLabels"], s["metadata"]["labels"])]
    assert [service["metadata"]["name"] for service in found] == ["gw-model-gateway-admin"]
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in found[0]["spec"]["ports"]}
    pod_monitor = one(case("pod-monitor"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert pod_monitor == [{"port": "admin", "path": "/metrics", "interval": "1m"}]


@every_case
def test_ports_that_are_named_exist(name: str) -> None:
    made = case(name)
    by_component = {
        metadata["labels"]["app.kubernetes.io/component"]: {
            port["name"] for container in spec["containers"] for port in container.get("ports", ())
        }
        for metadata, spec in pods(made)
    }
    for _, spec in pods(made):
        for container in spec["containers"]:
            own = {port["name"] for port in container.get("ports", ())}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                action = container.get(probe, {})
                for how in ("httpGet", "tcpSocket"):
                    assert how not in action or action[how]["port"] in own
    for service in of_kind(made, "Service"):
        of = service["spec"]["selector"]["app.kubernetes.io/component"]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= by_component[of]
    for ingress in of_kind(made, "Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend == {"name": one(made, "Service")["metadata"]["name"], "port": {"name": "http"}}
    for route in of_kind(made, "HTTPRoute"):
        (to,) = route["spec"]["rules"][0]["backendRefs"]
        service = one(made, "Service")
        assert (to["name"], to["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])


@every_case
def test_volumes_secrets_and_documents_that_are_mounted_exist(name: str) -> None:
    made, values = case(name), json.dumps(MATRIX[name])
    here = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in made}
    for _, spec in pods(made):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        claims = {"data"} if any(container["name"] == "valkey" for container in spec["containers"]) else set()
        for container in spec["containers"]:
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(set(paths)) == len(paths)
            assert {mount["name"] for mount in container.get("volumeMounts", ())} == set(volumes) | claims
            wanted = [("Secret", one["valueFrom"]["secretKeyRef"]) for one in container["env"] if "valueFrom" in one]
            wanted += [("Secret", one["secretRef"]) for one in container.get("envFrom", ())]
            wanted += [("ConfigMap", one["configMap"]) for one in volumes.values() if "configMap" in one]
            for kind, reference in wanted:
                assert (kind, reference["name"]) in here or f'"{reference["name"]}"' in values
                if (kind, reference["name"]) in here and "key" in reference:
                    assert reference["key"] in secrets_of(made)[reference["name"]]
        if spec["serviceAccountName"] != "somebody":
            assert ("ServiceAccount", spec["serviceAccountName"]) in here


@every_case
def test_variables_that_others_are_made_of_come_before_them(name: str) -> None:
    """Kubernetes replaces $(NAME) by what stands above, and leaves it as it is otherwise."""
    for _, spec in pods(case(name)):
        for container in spec["containers"]:
            known: list[str] = []
            for variable in container["env"]:
                assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= set(known)
                known.append(variable["name"])
            assert set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", ())))) <= set(known)
            assert len(set(known)) == len(known)


@every_case
def test_what_the_gateway_is_told_are_settings_of_it(name: str) -> None:
    known = {f"GATEWAY_{setting.name.upper()}" for setting in fields(Settings)}
    told = [variable["name"] for variable in gateway_pod(case(name))["containers"][0]["env"]]
    assert {variable for variable in told if variable.startswith("GATEWAY_")} <= known
    assert {"GATEWAY_KEY_PEPPER", "GATEWAY_ADMIN_KEY", "GATEWAY_REDIS_URL", "GATEWAY_DRAIN"} <= set(told)


@every_case
def test_one_thing_scales_the_deployment(name: str) -> None:
    made = case(name)
    deployment, scalers = one(made, "Deployment"), of_kind(made, "HorizontalPodAutoscaler", "ScaledObject")
    assert len(scalers) == (1 if name.startswith(("hpa", "keda")) else 0)
    assert ("replicas" in deployment["spec"]) == (not scalers)
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert len(scaler["spec"].get("metrics", scaler["spec"].get("triggers"))) == (1 if "by-cpu" in name else 2)


def test_scalers_look_at_cpu_and_at_requests_in_flight() -> None:
    cpu, in_flight = one(case("hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert cpu["containerResource"]["container"] == gateway_pod(case("hpa"))["containers"][0]["name"]
    assert cpu["containerResource"]["target"]["averageUtilization"] == 70
    assert in_flight["pods"]["metric"]["name"] == "gateway_http_active_requests"
    assert in_flight["pods"]["target"]["averageValue"] == "200"
    asked, cpu = one(case("keda"), "ScaledObject")["spec"]["triggers"]
    assert asked["metadata"]["query"].startswith("sum(gateway_http_active_requests{")
    assert (asked["metadata"]["threshold"], cpu["metadata"]["value"]) == ("200", "70")
    assert asked["metadata"]["ignoreNullValues"] == "false"  # else no pod is needed while Prometheus is away
    for scaler in (one(case("hpa"), "HorizontalPodAutoscaler"), one(case("keda"), "ScaledObject")):
        text = json.dumps(scaler["spec"])
        assert '"stabilizationWindowSeconds": 600' in text  # a pod that goes keeps its streams: there is no hurry


# — what pods may do


@every_case
def test_pods_keep_the_restricted_standard(name: str) -> None:
    for _, spec in pods(case(name)):
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
        assert all(
            {"configMap", "secret", "emptyDir", "persistentVolumeClaim"} & set(v) for v in spec.get("volumes", ())
        )
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert "hostPort" not in json.dumps(container)


@every_case
def test_no_secret_stands_outside_a_secret(name: str) -> None:
    made = case(name)
    values = {value for secret in secrets_of(made).values() for value in secret.values()}
    rest = json.dumps([manifest for manifest in made if manifest["kind"] != "Secret"])
    assert len(values) == sum(len(secret) for secret in secrets_of(made).values())
    assert [value for value in values if value in rest or len(value) < 32] == []
    for _, spec in pods(made):
        for container in spec["containers"]:
            for variable in container["env"]:
                if re.search("KEY|PASSWORD|PEPPER|DSN|TOKEN|AUTH", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}


def test_what_is_made_once_is_kept_and_what_exists_is_not_made() -> None:
    kept = of_kind(case("nothing"), "Secret")
    assert [secret["metadata"]["annotations"]["helm.sh/resource-policy"] for secret in kept] == ["keep", "keep"]
    assert secrets_of(case("all-existing")) == {}
    used = json.dumps(gateway_pod(case("all-existing"))["containers"][0]["env"])
    assert used.count('"secrets"') == 2
    assert '{"name": "store", "key": "address"}' in used


@every_case
def test_network_policies_let_pass_what_is_needed(name: str) -> None:
    made = case(name)
    policies = {component(policy): policy["spec"] for policy in of_kind(made, "NetworkPolicy")}
    if name == "bare":
        assert policies == {}
        return
    container = gateway_pod(made)["containers"][0]
    probed = {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    open_ports = {port["port"]: rule for rule in policies["gateway"]["ingress"] for port in rule["ports"]}
    assert probed | {"http", "admin"} == set(open_ports)
    assert len(open_ports["admin"]["from"]) == 2  # who scrapes, and `helm test`
    assert len(open_ports["http"].get("from", ())) == (2 if name == "closed-network" else 0)
    listens = {
        of: {port["containerPort"] for port in container.get("ports", ())}
        for of, container in (
            (metadata["labels"]["app.kubernetes.io/component"], spec["containers"][0]) for metadata, spec in pods(made)
        )
    }
    for of in {"gateway", "exporter", "test"} & set(policies):
        out = policies[of]["egress"]
        assert {port["port"] for port in out[0]["ports"]} == {53}
        to = {
            rule["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: {
                port["port"] for port in rule["ports"]
            }
            for rule in out
            if set(rule.get("to", [{}])[0]) == {"podSelector"}
        }
        wanted = {"gateway"} if of == "test" else {"valkey"} & set(policies)
        assert to == {component: listens[component] for component in wanted}
    assert len(policies["test"]["egress"]) == 2
    assert ("exporter" in policies) == (name == "exporters")
    if "valkey" in policies:
        (rule,) = policies["valkey"]["ingress"]
        may = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]]
        assert (may, policies["valkey"]["egress"]) == (["gateway", "exporter"], [])


def test_requests_may_not_go_where_clouds_keep_credentials() -> None:
    rules = one(case("nothing"), "NetworkPolicy")["spec"]["egress"]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule.get("to", ()) if "ipBlock" in peer]
    closed = [ip_network(one) for block in blocks for one in block["except"]]
    for address in ("169.254.169.254", "fd00:ec2::254", "168.63.129.16", "100.100.100.200"):  # Azure's, Alibaba's
        assert any(ip_address(address) in network for network in closed)


# — what follows from what


@pytest.mark.parametrize(("stream", "sleep", "delay"), [(600, 10, 0), (1, 0, 0), (7200, 30, 15)])
def test_the_grace_period_has_room_for_the_longest_stream(stream: int, sleep: int, delay: int) -> None:
    made = render({"maxStreamSeconds": stream, "preStopSeconds": sleep, "drainDelaySeconds": delay})
    spec = gateway_pod(made)
    told = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
    assert (told["GATEWAY_DRAIN"], told["GATEWAY_DRAIN_DELAY"]) == (str(stream), str(delay))
    # What the supervisor waits for workers beyond draining, and for the control plane after them.
    assert spec["terminationGracePeriodSeconds"] == sleep + delay + stream + supervisor._PATIENCE + 5
    hook = spec["containers"][0].get("lifecycle")
    assert hook == ({"preStop": {"sleep": {"seconds": sleep}}} if sleep else None)


def test_whoever_replaces_or_evicts_pods_leaves_enough_of_them() -> None:
    made = case("own-store")
    spec = one(made, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    for spread in gateway_pod(made)["topologySpreadConstraints"]:
        assert spread["matchLabelKeys"] == ["pod-template-hash"]  # the new ones spread by themselves
    budget = one(made, "PodDisruptionBudget")["spec"]
    assert spec["replicas"] == budget["maxUnavailable"] == 1  # a single pod keeps no node from being emptied
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@every_case
def test_callers_do_not_reach_the_control_plane_and_liveness_asks_for_nothing_else(name: str) -> None:
    made, container = case(name), gateway_pod(case(name))["containers"][0]
    assert one(made, "Service", "admin")["spec"]["type"] == "ClusterIP"
    asked = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert asked == {
        "startupProbe": "/healthz/live",
        "livenessProbe": "/healthz/live",
        "readinessProbe": "/healthz/ready",
    }
    assert one(made, "Pod", "test")["metadata"]["annotations"]["helm.sh/hook"] == "test"


def test_nginx_does_not_hold_back_nor_cut_what_streams() -> None:
    annotations = one(case("nginx"), "Ingress")["metadata"]["annotations"]
    own = {name.removeprefix("nginx.ingress.kubernetes.io/"): value for name, value in annotations.items()}
    assert (own["proxy-buffering"], own["proxy-read-timeout"], own["proxy-next-upstream"]) == ("off", "600", "off")
    assert own["proxy-body-size"] == "32m"  # what is set comes first
    unnamed = one(case("routes"), "Ingress")["metadata"]["annotations"]  # the cluster's own class may be nginx
    assert unnamed == {**annotations, "nginx.ingress.kubernetes.io/proxy-body-size": "0"}
    other = render({"ingress": {"enabled": True, "hosts": ["llm.example"], "className": "traefik"}})
    assert "annotations" not in one(other, "Ingress")["metadata"]


def test_a_route_has_no_timeout_that_would_cut_a_stream() -> None:
    (rule,) = one(case("routes"), "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert one(case("routes"), "HTTPRoute")["spec"]["parentRefs"][0]["port"] == 443


@pytest.mark.parametrize("name", ["large", "nothing"])
def test_the_disk_of_a_pod_has_room_for_all_spools(name: str) -> None:
    spec = gateway_pod(case(name))
    told = {variable["name"]: variable.get("value") for variable in spec["containers"][0]["env"]}
    (state,) = (volume for volume in spec["volumes"] if volume["name"] == "state")
    room = int(state["emptyDir"]["sizeLimit"].removesuffix("Mi")) * 2**20
    assert room == int(told["GATEWAY_WORKERS"]) * int(told["GATEWAY_SPOOL_MOST"]) + 64 * 2**20


def test_a_change_of_policies_rolls_the_pods_and_nothing_else_does() -> None:
    def checksum(documents: dict[str, Any], **values: Any) -> str | None:
        made = render({"policies": {"documents": documents}, **values})
        (metadata,) = (metadata for metadata, spec in pods(made) if spec["containers"][0]["name"] == "gateway")
        found: str | None = metadata["annotations"].get("checksum/policies")
        return found

    once = checksum({"a.yaml": {"gateway": {}}})
    assert once == checksum({"a.yaml": {"gateway": {}}}, replicas=9)
    assert once != checksum({"a.yaml": {"gateway": {"max_body": "1MiB"}}})
    assert once != checksum({"b.yaml": {"gateway": {}}})
    kept = render({"policies": {"rollOnChange": False}, "exporters": {"archive": {}}})
    rolled = {
        spec["containers"][0]["name"]: "checksum/policies" in one.get("annotations", {}) for one, spec in pods(kept)
    }
    assert (rolled["gateway"], rolled["exporter"]) == (False, True)  # which do not read them anew


def test_documents_arrive_as_they_were_written(tmp_path: Any) -> None:
    data = one(case("policies"), "ConfigMap")["data"]
    for file, text in data.items():
        (tmp_path / file).write_text(text)
    documents: dict[str, Any] = MATRIX["policies"]["policies"]["documents"]
    assert yaml.safe_load(data["models.yaml"]) == documents["models.yaml"]
    assert data["teams.yaml"] == documents["teams.yaml"]
    assert "10000000" in data["models.yaml"]
    snapshot = load(tmp_path)
    assert (list(snapshot.teams), list(snapshot.pools)) == (["research"], ["demo"])


def test_without_policies_there_is_a_document_that_says_nothing(tmp_path: Any) -> None:
    (tmp_path / "gateway.yaml").write_text(one(case("nothing"), "ConfigMap")["data"]["gateway.yaml"])
    assert not load(tmp_path).teams
    assert "THERE ARE NO POLICIES" in texts({})["NOTES.txt"]
    assert "THERE ARE NO POLICIES" not in texts(MATRIX["policies"])["NOTES.txt"]


def test_exporters_are_deployments_of_their_own() -> None:
    found = {
        manifest["metadata"]["name"].removeprefix("gw-model-gateway-export-"): manifest["spec"]
        for manifest in of_kind(case("exporters"), "Deployment")
        if component(manifest) == "exporter"
    }
    told = {name: spec["template"]["spec"]["containers"][0]["args"] for name, spec in found.items()}
    assert told == {
        "warehouse": ["export", "warehouse"],
        "archive": ["export", "archive_2026"],
        "paused": ["export", "paused"],
    }
    assert {name: found[name]["replicas"] for name in told} == {"warehouse": 2, "archive": 1, "paused": 0}
    (claim,) = (v for v in found["archive"]["template"]["spec"]["volumes"] if v["name"] == "claim")
    assert (claim["persistentVolumeClaim"], found["archive"]["strategy"]) == (
        {"claimName": "usage"},
        {"type": "Recreate"},
    )
    names = {variable["name"] for variable in found["warehouse"]["template"]["spec"]["containers"][0]["env"]}
    assert "WAREHOUSE_DSN" in names
    assert not {"GATEWAY_KEY_PEPPER", "GATEWAY_ADMIN_KEY"} & names  # it needs neither


def test_what_is_set_for_all_pods_is_with_gateway_and_exporters_alike() -> None:
    made = render({**MATRIX["secrets"], "exporters": {"archive": {}}})
    for _, spec in pods(of_kind(made, "Deployment")):
        (mount,) = (one for one in spec["containers"][0]["volumeMounts"] if one["name"] == "roots")
        assert mount == {"name": "roots", "mountPath": "/etc/roots", "readOnly": True}
        (volume,) = (one for one in spec["volumes"] if one["name"] == "roots")
        assert volume["configMap"] == {"name": "roots", "defaultMode": 256}
    told = {variable["name"]: variable.get("value") for variable in gateway_pod(made)["containers"][0]["env"]}
    assert (told["GATEWAY_HOST"], told["GATEWAY_ADMIN_HOST"]) == ("::", "::")


def test_an_image_is_named_by_its_digest_where_there_is_one() -> None:
    placed, bare = gateway_pod(case("placed")), gateway_pod(case("nothing"))
    assert placed["containers"][0]["image"] == "registry.example:5000/gateway@sha256:" + "f" * 64
    assert bare["containers"][0]["image"] == "model-gateway:0.1.0"
    assert placed["imagePullSecrets"] == [{"name": "pull"}]

"""The chart as Helm's own engine renders it, for a table of values that stands for how it is used."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

helm: Any = pytest.importorskip("helm_python", reason="no Helm engine here (helm-python-sdk, in requirements-dev.lock)")

Manifest: TypeAlias = dict[str, Any]

CHART = Path(__file__).parent.parent.parent / "helm"
RELEASE, NAMESPACE = "gw", "llm"
EXTERNAL = {"valkey": {"enabled": False}, "store": {"existingSecret": "store"}}
MONITORED = {"prometheusRule": {"enabled": True, "labels": {"release": "prom"}}, "dashboard": {"enabled": True}}
POLICIES = {
    "models.yaml": {
        "models": {"openai/*": {"pool": "demo", "max_output_tokens": 10_000_000}},
        "pools": {"demo": {"upstreams": [{"url": "http://vllm:8000", "key_env": "VLLM_KEY"}]}},
    },
    "teams.yaml": "  # text that begins with a space, as it is kept elsewhere\n"
    "teams:\n  research: {organisation: acme, plan: free}\nplans:\n  free: {limits: []}\n",
}

# How the chart is used: by name what is set. Every template is in it with and without what it does.
MATRIX: dict[str, dict[str, Any]] = {
    "nothing": {},
    "policies": {"policies": {"documents": POLICIES, "rollOnChange": False}},
    "own-store": {**EXTERNAL, "replicas": 1},
    "all-existing": {
        "valkey": {"enabled": False},
        "store": {"existingSecret": "store", "key": "address"},
        "secrets": {"existingSecret": "secrets"},
        "policies": {"existingConfigMap": "policies"},
        "serviceAccount": {"create": False, "name": "somebody"},
    },
    "valkey": {
        "valkey": {
            "existingSecret": "password",
            "appendfsync": "always",
            "maxMemory": "3gb",
            "resources": {"limits": {"memory": "6Gi"}},
            "image": {"digest": "sha256:" + "0" * 64},
            "persistence": {"size": "100Gi", "storageClass": "fast"},
        }
    },
    "hpa": {"autoscaling": {"enabled": True, "minReplicas": 2}},
    "hpa-by-cpu": {"autoscaling": {"enabled": True, "targetInFlight": 0}},
    "keda": {"keda": {"enabled": True, "serverAddress": "http://prometheus:9090"}},
    "keda-by-cpu": {"keda": {"enabled": True}, "autoscaling": {"targetInFlight": 0}},
    "service-monitor": {**MONITORED, "serviceMonitor": {"enabled": True, "labels": {"release": "prom"}}},
    "pod-monitor": {**MONITORED, "podMonitor": {"enabled": True, "interval": "1m"}},
    "nginx": {
        "ingress": {
            "enabled": True,
            "className": "nginx-internal",
            "hosts": ["llm.example", "*.llm.example"],
            "tlsSecret": "tls",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "32m"},
        }
    },
    "routes": {
        "ingress": {"enabled": True, "hosts": ["llm.example"]},
        "httpRoute": {
            "enabled": True,
            "parentRefs": [{"name": "edge", "namespace": "edge", "sectionName": "https", "port": 443}],
            "hostnames": ["llm.example"],
        },
        "service": {"type": "LoadBalancer", "port": 8443, "annotations": {"lb": "internal"}},
    },
    "exporters": {
        "exporters": {
            "warehouse": {"replicas": 2, "env": [{"name": "WAREHOUSE_DSN", "secret": "warehouse", "key": "dsn"}]},
            "archive": {"export": "archive_2026", "claim": "usage", "path": "/var/lib/usage"},
            "paused": {"replicas": 0, "resources": {"requests": {"cpu": 0.1, "memory": "64Mi"}}},
        }
    },
    "closed-network": {
        "networkPolicy": {
            "callers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "edge"}}}],
            "scrapers": [{"podSelector": {"matchExpressions": [{"key": "prometheus", "operator": "Exists"}]}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 8000, "protocol": "TCP"}]}],
        }
    },
    "bare": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "preStopSeconds": 0,
    },
    "placed": {
        "image": {
            "repository": "registry.example:5000/gateway",
            "digest": "sha256:" + "f" * 64,
            "pullSecrets": ["pull"],
        },
        "nodeSelector": {"pool": "llm"},
        "tolerations": [{"key": "llm", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "front",
        "podLabels": {"team": "platform"},
        "podAnnotations": {"note": "1e6"},
        "podDisruptionBudget": {"maxUnavailable": "20%"},
        "fullnameOverride": "front-door",
    },
    "large": {
        "replicas": 1000,
        "workers": 64,
        "maxStreamSeconds": 86400,
        "drainDelaySeconds": 300,
        "spoolMost": 10 * 1024**3,
        "storeDeadline": 1,
        **MONITORED,
        "podMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True, "exportLag": 10**12, "errorRatio": 0.001},
    },
    "secrets": {
        "secrets": {
            "env": [{"name": "VLLM_KEY", "secret": "upstreams", "key": "vllm"}],
            "envFrom": ["more"],
            "files": [{"secret": "certificates", "path": "/etc/gateway/tls"}],
        },
        "extraEnv": [{"name": "OTEL_TRACES_SAMPLER_ARG", "value": "1e-3"}],
        "extraVolumes": [{"name": "roots", "configMap": {"name": "roots", "defaultMode": 256}}],
        "extraVolumeMounts": [{"name": "roots", "mountPath": "/etc/roots", "readOnly": True}],
        "listen": "::",
        "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}, "data": {"a": "b"}}],
    },
}


@cache
def chart() -> Any:
    """The loaded chart; Helm's library is 240 MB, and loaded once."""
    return helm.Chart.load(CHART)


def texts(values: Mapping[str, Any], release: str = RELEASE) -> dict[str, str]:
    """What each template makes of values that fit the schema, as an installation does it. Raises helm.HelmError."""
    chart().validate_schema(dict(values))
    found: dict[str, str] = chart().render(dict(values), name=release, namespace=NAMESPACE)
    return {name.removeprefix("model-gateway/templates/"): text for name, text in found.items()}


def render(values: Mapping[str, Any], release: str = RELEASE) -> list[Manifest]:
    """The objects that these values make."""
    told = texts(values, release).items()
    made = (yaml.load_all(text, yaml.CSafeLoader) for name, text in told if name != "NOTES.txt")
    return [manifest for several in made for manifest in several if manifest is not None]


@cache
def case(name: str) -> tuple[Manifest, ...]:
    """The objects of a row of MATRIX."""
    return tuple(render(MATRIX[name]))


every_case = pytest.mark.parametrize("name", MATRIX)


def of_kind(manifests: tuple[Manifest, ...] | list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def component(manifest: Manifest) -> str:
    found: str = manifest["metadata"].get("labels", {}).get("app.kubernetes.io/component", "")
    return found


def one(manifests: tuple[Manifest, ...] | list[Manifest], kind: str, of: str = "gateway") -> Manifest:
    """The one object of a kind and component."""
    (found,) = (manifest for manifest in of_kind(manifests, kind) if component(manifest) == of)
    return found


def pods(manifests: tuple[Manifest, ...] | list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each pod that there will be, as its metadata and its spec."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest["metadata"], manifest["spec"]
        elif "template" in manifest.get("spec", {}):
            yield manifest["spec"]["template"]["metadata"], manifest["spec"]["template"]["spec"]


def gateway_pod(manifests: tuple[Manifest, ...] | list[Manifest]) -> Manifest:
    """The spec of a pod of the gateway."""
    spec: Manifest = one(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def environment(container: Manifest, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The variables of a container as the kubelet sets them, from literals and from Secrets. Raises KeyError."""
    found: dict[str, str] = {}
    for variable in container["env"]:
        if "value" in variable:
            found[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], variable["value"])
        else:
            reference = variable["valueFrom"]["secretKeyRef"]
            found[variable["name"]] = secrets[reference["name"]][reference["key"]]
    return found


def secrets_of(manifests: tuple[Manifest, ...] | list[Manifest]) -> dict[str, dict[str, str]]:
    """The Secrets among the objects, in the clear."""
    return {
        secret["metadata"]["name"]: {
            key: base64.b64decode(value).decode() for key, value in secret.get("data", {}).items()
        }
        for secret in of_kind(manifests, "Secret")
    }


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    return found

"""What the chart looks up in the cluster: secrets that stay what they were, and the content of a ConfigMap that exists.
Helm's engine asks a server that knows just that."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helm.rendered import CHART, NAMESPACE, RELEASE, helm

Objects = dict[str, dict[str, Any]]

_KINDS = {"secrets": "Secret", "configmaps": "ConfigMap"}
_NOT_FOUND = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
_DISCOVERY: Objects = {
    "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["get"]}
            for name, kind in _KINDS.items()
        ],
    },
}


@contextmanager
def _cluster(objects: Objects) -> Iterator[str]:
    """The address of an API server with these objects, by `secrets/NAME` and `configmaps/NAME`."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/api/v1/namespaces/{NAMESPACE}/")
            kind = {"apiVersion": "v1", "kind": _KINDS.get(name.partition("/")[0], "")}
            found = {**kind, **objects[name]} if name in objects else _DISCOVERY.get(path)
            body = json.dumps(found or _NOT_FOUND).encode()
            self.send_response(200 if found else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: who asks is us."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


Included = Callable[..., str]


@pytest.fixture
def included(tmp_path: Path) -> Included:
    """What a named template gives in a cluster. Helm shows no manifest that the cluster has not checked, so the chart
    gets a template that fails with it."""

    def include(call: str, objects: Objects, **values: Any) -> str:
        copy = tmp_path / "chart"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(CHART, copy)
        for file in (copy / "templates").glob("*.yaml"):
            file.unlink()
        (copy / "templates" / "said.yaml").write_text('{{ fail (printf "said<%s>" (' + call + ")) }}\n")
        with _cluster(objects) as url:
            kubeconfig = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
                "current-context": "c",
            }
            config = helm.Config(
                kubeconfig_content=json.dumps(kubeconfig), namespace=NAMESPACE, storage_driver="memory"
            )
            with config, pytest.raises(helm.HelmError) as failed:
                config.install(copy, RELEASE, values, namespace=NAMESPACE, dry_run="server")
        (said,) = re.findall(r"said<(.*?)>", str(failed.value))
        return str(said)

    return include


KEPT = 'include "gateway.kept" (list . "gw-model-gateway" "key-pepper")'


def test_a_secret_that_was_made_stays_what_it_was(included: Included) -> None:
    old = base64.b64encode(b"the pepper of the first day").decode()
    assert included(KEPT, {"secrets/gw-model-gateway": {"data": {"key-pepper": old}}}) == old


def test_what_a_secret_does_not_have_yet_is_made(included: Included) -> None:
    made = [included(KEPT, objects) for objects in ({}, {"secrets/gw-model-gateway": {"data": {"admin-key": "b2xk"}}})]
    assert [len(base64.b64decode(secret)) for secret in made] == [64, 64]
    assert len({*made, "b2xk"}) == 3


def test_pods_are_replaced_when_a_config_map_that_exists_has_changed(included: Included) -> None:
    def checksum(text: str) -> str:
        objects = {"configmaps/ours": {"metadata": {"resourceVersion": text}, "data": {"a.yaml": text}}}
        return included('include "gateway.policiesChecksum" .', objects, policies={"existingConfigMap": "ours"})

    assert checksum("one") == checksum("one") != checksum("two")

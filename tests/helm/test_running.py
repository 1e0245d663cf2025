"""What the chart starts, started: the containers' command lines and variables as the kubelet would have them, with
addresses and folders of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis
import redis.retry
from redis.backoff import NoBackoff

from gateway.embedded import _server_binary
from tests.helm.rendered import CHART, Manifest, environment, gateway_pod, of_kind, one, pods, render, secrets_of
from tests.proving.commands import PATIENCE, ROOT
from tests.proving.house import DOCUMENTS
from tests.proving.ports import free_port


@dataclass
class Running:
    """A pod of the gateway as a process, with the variables it has."""

    process: subprocess.Popen[bytes]
    spec: Manifest
    env: dict[str, str]
    folder: Path

    def url(self, port: str) -> str:
        """The address of a container's port here."""
        return f"http://127.0.0.1:{self.env[{'http': 'GATEWAY_PORT', 'admin': 'GATEWAY_ADMIN_PORT'}[port]]}"

    def status(self, port: str, path: str, **headers: str) -> int:
        """What is answered, 0: nothing."""
        try:
            return httpx.get(self.url(port) + path, headers=headers, timeout=5, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    def until(self, port: str, path: str, expected: int, **headers: str) -> int:
        """The status of a path, as soon as it is the one that is expected; after 20 seconds, whatever it is."""
        patience = time.monotonic() + PATIENCE
        while (found := self.status(port, path, **headers)) != expected and time.monotonic() < patience:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.02)
        return found


def _ran(words: list[str], env: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=dict(env), cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@contextmanager
def _started(words: list[str], env: Mapping[str, str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out, subprocess.Popen(words, env=dict(env), cwd=folder, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _mounted(folder: Path, documents: Mapping[str, str]) -> Path:
    """A ConfigMap as the kubelet mounts it: links to a folder that is swapped whole."""
    content = folder / "..2026_01_01"
    content.mkdir(parents=True)
    (folder / "..data").symlink_to(content.name)
    for name, text in documents.items():
        (content / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def _client(port: int, password: str | None) -> redis.Redis:
    """A client that asks once: redis-py asks ten times for what was refused."""
    return redis.Redis(port=port, password=password, decode_responses=True, retry=redis.retry.Retry(NoBackoff(), 0))


@contextmanager
def _valkey(made: list[Manifest], folder: Path) -> Iterator[int]:
    """The port of the bundled Valkey, started as its container is."""
    container = one(made, "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"][0]
    env = environment(container, secrets_of(made))
    port, data = free_port(), folder / "data"
    data.mkdir()
    assert container["command"] == ["valkey-server"]
    words = [re.sub(r"\$\((\w+)\)", lambda name: env[name[1]], word) for word in container["args"]]
    here = {"6379": str(port), "/data": str(data)}
    command = [_server_binary(), *(here.get(word, word) for word in words), "--bind", "127.0.0.1"]
    with _started(command, os.environ, folder, folder / "valkey.log") as process:
        with _client(port, env["VALKEY_PASSWORD"]) as client:
            patience = time.monotonic() + PATIENCE
            while True:
                try:
                    client.ping()
                    break
                except redis.exceptions.ConnectionError:
                    assert process.poll() is None, (folder / "valkey.log").read_text()
                    assert time.monotonic() < patience
                    time.sleep(0.01)
        yield port


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    documents = {
        **DOCUMENTS,
        "pools": {"demo": {"upstreams": [{"url": "http://127.0.0.1:9"}]}},  # nobody asks it
        "exports": {"archive": {"to": "jsonl", "folder": str(tmp_path_factory.mktemp("usage"))}},
    }
    return render({"policies": {"documents": {"all.yaml": documents}}, "exporters": {"archive": {}}})


@pytest.fixture(scope="module")
def valkey_port(made: list[Manifest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with _valkey(made, tmp_path_factory.mktemp("valkey")) as port:
        yield port


def _local(made: list[Manifest], container: Manifest, folder: Path, valkey_port: int) -> dict[str, str]:
    """The container's variables, with what is elsewhere here."""
    told = environment(container, secrets_of(made))
    store = one(made, "StatefulSet", "valkey")["metadata"]["name"]
    assert told["GATEWAY_REDIS_URL"].endswith(f"@{store}:6379/0")
    here = {
        "GATEWAY_STATE": str(folder / "state"),
        "GATEWAY_POLICIES": str(folder / "policies"),
        "GATEWAY_REDIS_URL": told["GATEWAY_REDIS_URL"].replace(f"{store}:6379", f"127.0.0.1:{valkey_port}"),
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_ADMIN_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(free_port()),
        "GATEWAY_ADMIN_PORT": str(free_port()),
        "GATEWAY_STORE_DEADLINE": "5",  # this machine is noisy
    }
    if "GATEWAY_DRAIN_DELAY" in told:
        here["GATEWAY_DRAIN_DELAY"] = str(min(1, int(told["GATEWAY_DRAIN_DELAY"])))
    ours = {name: os.environ[name] for name in ("PATH", "LANG", "VIRTUAL_ENV") if name in os.environ}
    return {**ours, "PYTHONPATH": str(ROOT), **told, **{name: here[name] for name in here if name in told}}


@pytest.fixture(scope="module")
def pod(made: list[Manifest], valkey_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("pod")
    spec = gateway_pod(made)
    (container,) = spec["containers"]
    env = _local(made, container, folder, valkey_port)
    _mounted(folder / "policies", one(made, "ConfigMap")["data"])
    (folder / "root").mkdir()  # the read-only file system: nothing may be written where it stands
    with ExitStack() as stack:
        words = [sys.executable, "-m", "gateway", *container["args"]]
        process = stack.enter_context(_started(words, env, folder / "root", folder / "log"))
        running = Running(process, spec, env, folder)
        assert running.until("http", "/healthz/ready", 200) == 200, (folder / "log").read_text()
        yield running


def test_the_bundled_store_keeps_what_it_is_told_and_asks_for_its_password(
    made: list[Manifest], valkey_port: int
) -> None:
    password = secrets_of(made)["gw-model-gateway-valkey"]["password"]
    with _client(valkey_port, password) as client:
        wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": ""}
        assert client.config_get(*wanted) == wanted
        assert client.config_get("maxmemory") == {"maxmemory": str(768 * 2**20)}
    with _client(valkey_port, None) as client:
        with pytest.raises(redis.exceptions.AuthenticationError):
            client.ping()


def test_the_container_serves_whom_its_own_command_gives_a_key(pod: Running) -> None:
    assert pod.status("http", "/v1/models") == 401
    words = [sys.executable, "-m", "gateway", "keys", "create", "--team", "research"]
    done = _ran(words, pod.env, pod.folder / "root")  # as `kubectl exec` does
    assert (done.returncode, done.stderr) == (0, "")
    (key,) = re.findall(r"gw_[\w]+", done.stdout)[-1:]
    assert pod.until("http", "/v1/models", 200, authorization=f"Bearer {key}") == 200


def test_an_exporter_runs_with_what_its_deployment_tells_it(
    made: list[Manifest], valkey_port: int, tmp_path: Path
) -> None:
    (container,) = (
        spec["containers"][0]
        for _, spec in pods(of_kind(made, "Deployment"))
        if spec["containers"][0]["name"] == "exporter"
    )
    env = _local(made, container, tmp_path, valkey_port)
    _mounted(tmp_path / "policies", one(made, "ConfigMap")["data"])
    done = _ran([sys.executable, "-m", "gateway", *container["args"], "--once"], env, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_probes_of_the_manifest_are_answered(pod: Running) -> None:
    (container,) = pod.spec["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert pod.until(asked["port"], asked["path"], 200) == 200


def test_the_healthcheck_of_the_image_finds_it_well(pod: Running) -> None:
    text = (CHART / "Dockerfile").read_text("utf-8")
    (command,) = re.findall(r"HEALTHCHECK.*\\\n\s+CMD (\[.*\])", text)
    assert pod.until("admin", "/healthz/live", 200) == 200
    words = [sys.executable, *json.loads(command)[1:]]
    assert _ran(words, pod.env, pod.folder / "root").returncode == 0
    away = {**pod.env, "GATEWAY_ADMIN_PORT": str(free_port())}
    assert _ran(words, away, pod.folder / "root").returncode != 0


def test_helm_test_finds_it_well(made: list[Manifest], pod: Running) -> None:
    (container,) = one(made, "Pod", "test")["spec"]["containers"]
    service, admin = of_kind(made, "Service")[:2]
    assert {variable["name"]: variable["value"] for variable in container["env"]} == {
        "GATEWAY": f"http://{service['metadata']['name']}:80",
        "ADMIN": f"http://{admin['metadata']['name']}:9090",
    }
    assert pod.until("admin", "/healthz/ready", 200) == 200
    env = {"GATEWAY": pod.url("http"), "ADMIN": pod.url("admin")}
    words = [sys.executable, *container["command"][1:], *container["args"]]
    done = _ran(words, env, pod.folder / "root")
    assert (done.returncode, done.stdout.count("as expected")) == (0, 5), done.stdout + done.stderr


def test_while_the_store_is_away_the_pod_stays_among_those_that_are_asked(
    made: list[Manifest], valkey_port: int, pod: Running
) -> None:
    """Limits are held without it, and all pods have the same store: not one of them would be left."""
    asked = pod.spec["containers"][0]["readinessProbe"]["httpGet"]
    with _client(valkey_port, secrets_of(made)["gw-model-gateway-valkey"]["password"]) as client:
        client.shutdown(nosave=True)
    patience = time.monotonic() + PATIENCE
    while b"\ngateway_store_up 0" not in httpx.get(pod.url("admin") + "/metrics", trust_env=False).content:
        assert time.monotonic() < patience
        time.sleep(0.05)
    answer = httpx.get(pod.url("http") + "/healthz/ready", trust_env=False)
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert pod.status(asked["port"], asked["path"]) == 200


def test_told_to_go_it_ends_kept_connections_with_an_answer_goes_and_has_written_nothing_but_its_state(
    pod: Running,
) -> None:
    assert int(pod.env["GATEWAY_DRAIN_DELAY"]) > 0  # else they are closed under whoever is about to ask
    with httpx.Client(base_url=pod.url("http"), trust_env=False) as caller:
        assert "connection" not in caller.get("/healthz/live").headers  # kept
        pod.process.send_signal(signal.SIGTERM)
        while caller.get("/healthz/live").headers.get("connection") != "close":
            time.sleep(0.02)
    assert pod.process.wait(PATIENCE) == 0
    assert list((pod.folder / "root").iterdir()) == []
    assert sorted(path.name for path in pod.folder.iterdir()) == ["log", "policies", "root", "state"]
    said = (pod.folder / "log").read_text()
    assert [secret for secret in ("GATEWAY_KEY_PEPPER", "GATEWAY_ADMIN_KEY") if pod.env[secret] in said] == []

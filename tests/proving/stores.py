"""Stores of several servers on the loopback: a primary with two replicas and three Sentinels, and a cluster of six.

They are real servers on free ports; a test kills, stops and moves them as it likes, and nothing outlives its block.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.proving.ports import free_ports

DOWN_AFTER_MS = 500  # until a Sentinel takes a silent primary for dead
NODE_TIMEOUT_MS = 1000  # until a cluster takes a silent node for dead
SERVICE = "limits"


def until(holds: Callable[[], bool], patience: float = 20.0) -> None:
    """Until it holds; a server that is not there yet holds nothing."""
    end = time.monotonic() + patience
    while True:
        try:
            if holds():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@dataclass
class Node:
    """One server on the loopback."""

    port: int
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def ask(self, *words: Any) -> Any:
        """The answer to one command on a connection of its own, as the server gives it."""
        client = redis.Redis(
            port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0), decode_responses=True, protocol=2
        )
        with client:
            client.response_callbacks.clear()
            return client.execute_command(*words)  # type: ignore[no-untyped-call]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Silent from now on: connections are accepted by the kernel, and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def node(binary: str, port: int | None = None, *more: str, **options: object) -> Iterator[Node]:
    """A server without persistence until the block is left; `options` are those of its configuration, with _ for -."""
    port = free_ports(1)[0] if port is None else port
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        settings: Mapping[str, object] = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": '""', **options}
        config = Path(folder) / "server.conf"
        lines = [f"{name.replace('_', '-')} {value}" for name, value in settings.items()]
        config.write_text("\n".join([*lines, *more, ""]))
        words = [binary, str(config), *(["--sentinel"] if any(line.startswith("sentinel") for line in more) else [])]
        log = (Path(folder) / "log").open("wb")
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "LC_ALL": "C"})
        log.close()
        one = Node(port, process, Path(folder))
        try:
            until(lambda: _answers(one))
            yield one
        finally:
            process.kill()
            process.wait()


def _answers(one: Node) -> bool:
    assert one.process.poll() is None, (one.folder / "log").read_text()
    try:
        return bool(one.ask("PING"))
    except (redis.AuthenticationError, redis.ResponseError):
        return True


# — Sentinels


class Watched:
    """A primary with two replicas, and the three Sentinels that watch it."""

    def __init__(self, servers: list[Node], sentinels: list[Node]) -> None:
        self.servers = servers
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    @property
    def primary(self) -> Node:
        """Whom most of the Sentinels name."""
        named = [int(one.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) for one in self.sentinels]
        port = max(named, key=named.count)
        return next(server for server in self.servers if server.port == port)

    def fail_over(self) -> Node:
        """The new primary, which the Sentinels have promoted while the old one is well."""
        before = self.primary
        self.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE)
        return self.promoted(before)

    def promoted(self, before: Node) -> Node:
        """The new primary, as soon as there is one."""
        until(lambda: self.primary is not before and self.primary.ask("ROLE")[0] == "master")
        return self.primary


@contextmanager
def watched(binary: str) -> Iterator[Watched]:
    """Three servers and three Sentinels that know one another."""
    first, *others = free_ports(6)
    with ExitStack() as stack:
        servers = [stack.enter_context(node(binary, first, repl_diskless_sync_delay=0))]
        for port in others[:2]:
            replica = node(binary, port, replicaof=f"127.0.0.1 {first}", repl_diskless_sync_delay=0)
            servers.append(stack.enter_context(replica))
        rules = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {first} 2",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} 3000",
        )
        until(lambda: "slave1:" in servers[0].ask("INFO", "replication"))
        sentinels = [stack.enter_context(node(binary, port, *rules)) for port in others[2:]]
        found = Watched(servers, sentinels)
        until(lambda: all(_knows_all(one) for one in sentinels))
        yield found


def _knows_all(sentinel: Node) -> bool:
    said = sentinel.ask("SENTINEL", "MASTER", SERVICE)
    known = dict(zip(said[::2], said[1::2], strict=True))
    return (known["num-slaves"], known["num-other-sentinels"], known["flags"]) == ("2", "2", "master")


# — a cluster


class Cluster:
    """Three primaries, each with a replica: nodes 0 to 2, and 3 to 5."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.ids = [node.ask("CLUSTER", "MYID") for node in nodes]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def slot(self, key: str) -> int:
        return int(self.nodes[0].ask("CLUSTER", "KEYSLOT", key))

    def owner(self, key: str, asked: Node | None = None) -> Node:
        """Who takes what is written under a key, as a node says that lives."""
        slot = self.slot(key) if asked is None else int(asked.ask("CLUSTER", "KEYSLOT", key))
        for first, last, (_, port, *_), *_ in (asked or self.nodes[0]).ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def begin_move(self, key: str, to: Node) -> Node:
        """Begin to move the slot of a key; the node that it leaves. Its keys are still there."""
        slot, source = self.slot(key), self.owner(key)
        to.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(to))
        return source

    def move_keys(self, key: str, source: Node, to: Node) -> int:
        """Move the keys of the slot; how many there were."""
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", self.slot(key), 1000)
        for name in keys:
            source.ask("MIGRATE", "127.0.0.1", to.port, name, 0, 5000)
        return len(keys)

    def end_move(self, key: str, source: Node, to: Node) -> None:
        """Both nodes agree that the slot has moved."""
        for one in (to, source):
            one.ask("CLUSTER", "SETSLOT", self.slot(key), "NODE", self._id(to))

    def move(self, key: str, to: Node) -> None:
        """Move the slot of a key with all that is in it."""
        source = self.begin_move(key, to)
        while self.move_keys(key, source, to):
            pass
        self.end_move(key, source, to)

    def _id(self, node: Node) -> str:
        return str(self.ids[self.nodes.index(node)])


@contextmanager
def cluster(binary: str) -> Iterator[Cluster]:
    """Six nodes that agree that all is well."""
    ports = free_ports(12)
    with ExitStack() as stack:
        options = {"cluster_enabled": "yes", "cluster_node_timeout": NODE_TIMEOUT_MS, "repl_diskless_sync_delay": 0}
        nodes = [
            stack.enter_context(node(binary, port, cluster_port=bus, **options))
            for port, bus in zip(ports[:6], ports[6:], strict=True)
        ]
        found = Cluster(nodes)
        for number, one in enumerate(nodes):
            one.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            one.ask("CLUSTER", "MEET", "127.0.0.1", ports[0], ports[6])
        third = 16384 // 3
        for number, one in enumerate(nodes[:3]):
            one.ask("CLUSTER", "ADDSLOTSRANGE", number * third, 16383 if number == 2 else (number + 1) * third - 1)
        until(lambda: all("cluster_known_nodes:6" in one.ask("CLUSTER", "INFO") for one in nodes))
        for number, one in enumerate(nodes[3:]):
            until(partial(_replicates, one, found.ids[number]))
        until(lambda: all("cluster_state:ok" in one.ask("CLUSTER", "INFO") for one in nodes))
        until(lambda: all("master_link_status:up" in one.ask("INFO", "replication") for one in nodes[3:]))
        until(lambda: all(_has_replicas(one) for one in nodes))
        yield found


def _replicates(one: Node, primary: str) -> bool:
    return bool(one.ask("CLUSTER", "REPLICATE", primary) == "OK")


def _has_replicas(asked: Node) -> bool:
    return sorted(len(entry) for entry in asked.ask("CLUSTER", "SLOTS")) == [4, 4, 4]


@contextmanager
def small_disk() -> Iterator[Path]:
    """A folder with one megabyte."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            pytest.skip("only who may mount a small disk can fill it")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """It has no room until the block is left."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    yield
    filler.unlink()

"""What a request costs, beside nginx in the same run: `make bench`.

CPU is user and system time of the measured process, from /proc, over the requests answered: requests per second on a
shared machine measure the load generator too. The measured process has one core to itself, the load and the backend
another. Every figure is the median of rounds that take turns; the ratio is to nginx as a proxy in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import redis
import yaml

from tests.bench import contract
from tests.bench.backend import EVENTS
from tests.proving.ports import free_port

ROOT = Path(__file__).parents[2]
MEASURED, OTHERS = {0}, {1}

POLICIES = {
    "gateway": {"reserve": "max"},
    "models": {
        "accounts/fireworks/models/llama-v2-7b": {"pool": "bench", "price": {"input": 0.2, "output": 0.2}},
    },
    "plans": {
        "bench": {
            "limits": [
                {"name": "requests", "count": "requests", "rate": "10000000/minute", "per": ["team"]},
                {"name": "input", "count": "input_tokens", "rate": "10000000000/minute", "per": ["key", "model"]},
                {"name": "output", "count": "output_tokens", "rate": "10000000000/minute", "per": ["key", "model"]},
                {"name": "seats", "count": "concurrent_requests", "at_most": 100000, "per": ["team"]},
                {"name": "monthly", "count": "total_tokens", "quota": "1000000000000/month", "per": ["team"]},
            ]
        }
    },
    "teams": {"bench": {"organisation": "acme", "plan": "bench"}},
}

NGINX = """
worker_processes 1; daemon off; pid nginx.pid; error_log stderr crit;
events { worker_connections 8192; }
http {
  access_log off; client_body_temp_path t1; proxy_temp_path t2;
  fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
  upstream backend { server 127.0.0.1:%d; keepalive 1024; keepalive_requests 1000000000; }
  server {
    listen 127.0.0.1:%d backlog=4096; keepalive_requests 1000000000;
    location / {
      proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }
  }
}
"""


@dataclass
class Measured:
    """A proxy under test: where it listens, and the processes whose CPU counts."""

    name: str
    port: int
    key: str
    pids: list[int]
    store: int | None = None
    cpu: list[float] = field(default_factory=list)
    store_cpu: list[float] = field(default_factory=list)
    rps: list[float] = field(default_factory=list)


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes, in seconds."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def resident(pids: list[int]) -> int:
    """Resident memory of processes, in bytes."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def start(stack: ExitStack, command: list[str], cores: set[int], **given: object) -> subprocess.Popen[bytes]:
    """A process on its cores, ended with the stack."""
    process: subprocess.Popen[bytes] = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, cores)), *command],
        stdout=subprocess.DEVNULL,
        stderr=given.pop("stderr", None),  # type: ignore[call-overload]
        cwd=given.pop("cwd", ROOT),
        **given,
    )

    def end() -> None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()

    stack.callback(end)
    return process


def listening(port: int, patience: float = 15) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.01)
    sys.exit(f"nothing listens on port {port}")


def load(port: int, key: str, callers: int, seconds: float, *words: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.load", str(port), key, str(callers), str(seconds), *words]
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, OTHERS)), *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seen: dict[str, float] = json.loads(done.stdout)
    if seen["errors"]:
        sys.exit(f"{seen['errors']:.0f} of {seen['answers']:.0f} answers were no 200")
    return seen


# — what is measured


@contextmanager
def house(keys: int = 0) -> Iterator[list[Measured]]:
    """nginx (where there is one), uvicorn's hello, forwarding alone, and the gateway, on one backend."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        backend = free_port()
        start(stack, [sys.executable, "-m", "tests.bench.backend", str(backend)], OTHERS)
        listening(backend)
        proxies = []
        if shutil.which("nginx"):
            port = free_port()
            (folder / "nginx.conf").write_text(NGINX % (backend, port))
            start(stack, ["nginx", "-p", str(folder), "-c", "nginx.conf"], MEASURED, stderr=subprocess.DEVNULL)
            listening(port)
            worker = subprocess.run(
                ["pgrep", "-P", (folder / "nginx.pid").read_text().strip()], capture_output=True, text=True
            )
            proxies.append(Measured("nginx", port, "-", [int(pid) for pid in worker.stdout.split()]))
        for name, words in (("uvicorn's hello", ["0"]), ("forwarding alone", [str(backend)])):
            port = free_port()
            process = start(stack, [sys.executable, "-m", "tests.bench.forward", str(port), *words], MEASURED)
            listening(port)
            proxies.append(Measured(name, port, "-", [process.pid]))
        pool = {"upstreams": [{"url": f"http://127.0.0.1:{backend}", "max_in_flight": 100000}]}
        proxies.append(gateway(stack, folder, pool))
        yield proxies


@dataclass
class Served:
    """A gateway process on its core, with its ledger and its access log, and a key for each team; its embedded store,
    which shares the other core."""

    port: int
    process: int
    store: int
    keys: dict[str, str]


def serve(stack: ExitStack, folder: Path, documents: dict[str, Any]) -> Served:
    """A gateway with these policies."""
    policies = folder / "policies"
    policies.mkdir()
    (policies / "all.yaml").write_text(yaml.safe_dump(documents))
    words = ["--policies", str(policies), "--state", str(folder / "state")]
    command = [sys.executable, "-m", "gateway"]
    keys = {}
    for team in documents["teams"]:
        create = [*command, "keys", "create", "--team", team, "--json", *words]
        made = subprocess.run(create, capture_output=True, check=True, cwd=ROOT)
        keys[team] = json.loads(made.stdout)["key"]
    port = free_port()
    environment = {**os.environ, "GATEWAY_STORE_DEADLINE": "1", "GATEWAY_LOG": "json", "GATEWAY_WORKERS": "0"}
    process = start(stack, [*command, "serve", "--port", str(port), *words], MEASURED, env=environment)
    listening(port)
    with redis.Redis(unix_socket_path=str(folder / "state" / "valkey.sock")) as client:
        store = int(client.info("server")["process_id"])
    os.sched_setaffinity(store, OTHERS)
    return Served(port, process.pid, store, keys)


def gateway(stack: ExitStack, folder: Path, pool: dict[str, Any]) -> Measured:
    """A served gateway with five limits."""
    served = serve(stack, folder, {**POLICIES, "pools": {"bench": pool}})
    return Measured("gateway", served.port, served.keys["bench"], [served.process], served.store)


def requests(proxies: list[Measured], rounds: int, seconds: float, callers: int) -> None:
    """CPU and rate per JSON request, in turns."""
    for proxy in proxies:
        load(proxy.port, proxy.key, callers, 1)  # warm
    for _ in range(rounds):
        for proxy in proxies:
            before, store = cpu_seconds(proxy.pids), cpu_seconds([proxy.store] if proxy.store else [])
            seen = load(proxy.port, proxy.key, callers, seconds)
            proxy.cpu.append((cpu_seconds(proxy.pids) - before) / seen["answers"] * 1e6)
            proxy.rps.append(seen["answers"] / seen["seconds"])
            if proxy.store:
                proxy.store_cpu.append((cpu_seconds([proxy.store]) - store) / seen["answers"] * 1e6)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def ratio(proxy: Measured, proxies: list[Measured], of: Callable[[Measured], list[float]]) -> str:
    """The median of the ratios to nginx, round by round."""
    base = next((p for p in proxies if p.name == "nginx"), None)
    if base is None:
        return "no nginx here"
    return f"{median(a / b for a, b in zip(of(proxy), of(base), strict=True)):.1f}"


def show_requests(proxies: list[Measured], callers: int) -> None:
    rows = [
        (
            p.name,
            f"{median(p.cpu):.0f}",
            ratio(p, proxies, lambda m: m.cpu),
            f"{median(p.store_cpu):.0f}" if p.store_cpu else "",
            f"{median(p.rps):,.0f}",
        )
        for p in proxies
    ]
    table(
        (f"JSON requests, {callers} callers", "CPU µs a request", "× nginx", "Valkey CPU µs", "requests/s on one core"),
        rows,
    )


def show_latency(proxies: list[Measured], rounds: int, seconds: float) -> None:
    seen: dict[str, list[dict[str, float]]] = {p.name: [] for p in proxies}
    for _ in range(rounds):
        for p in proxies:
            seen[p.name].append(load(p.port, p.key, 1, seconds))
    rows = [
        (name, f"{median(s['p50_ms'] for s in some):.2f}", f"{median(s['p99_ms'] for s in some):.2f}")
        for name, some in seen.items()
    ]
    table(("latency, one caller", "p50 ms", "p99 ms"), rows)


def show_streams(proxies: list[Measured], streams: int, rounds: int) -> None:
    """CPU per event and memory per open stream."""
    figures: dict[str, list[tuple[float, float]]] = {p.name: [] for p in proxies}
    for _ in range(rounds):
        for p in proxies:
            before, idle = cpu_seconds(p.pids), resident(p.pids)
            command = [sys.executable, "-m", "tests.bench.load", str(p.port), p.key, str(streams), "0", "stream"]
            process = subprocess.Popen(["taskset", "-c", "1", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            time.sleep(4)  # in the middle of the streams, which last eight seconds
            grown = resident(p.pids) - idle
            out, _ = process.communicate()
            events = json.loads(out)["events"]
            assert events == streams * EVENTS, f"{events} of {streams * EVENTS} events came through {p.name}"
            figures[p.name].append(((cpu_seconds(p.pids) - before) / events * 1e6, grown / streams / 1024))
    base = figures.get("nginx")
    rows = []
    for name, some in figures.items():
        cpu = [c for c, _ in some]
        against = f"{median(a / b for a, (b, _) in zip(cpu, base, strict=True)):.2f}" if base else "no nginx here"
        # The first round is the one in which memory grows; later ones reuse it.
        rows.append((name, f"{median(cpu):.0f}", against, f"{max(m for _, m in some):.0f}"))
    table((f"{streams} paced streams", "CPU µs an event", "× nginx", "KiB a stream"), rows)


def show_bursts(proxies: list[Measured], rounds: int, seconds: float) -> None:
    """CPU per event where a stream's events come all at once."""
    figures: dict[str, list[float]] = {p.name: [] for p in proxies}
    for _ in range(rounds):
        for p in proxies:
            before = cpu_seconds(p.pids)
            seen = load(p.port, p.key, 8, seconds, "burst")
            figures[p.name].append((cpu_seconds(p.pids) - before) / seen["events"] * 1e6)
    base = figures.get("nginx")
    rows = []
    for name, some in figures.items():
        against = f"{median(a / b for a, b in zip(some, base, strict=True)):.2f}" if base else "no nginx here"
        rows.append((name, f"{median(some):.2f}", against))
    table((f"streams of {EVENTS} events at once, 8 callers", "CPU µs an event", "× nginx"), rows)


class Hole(threading.Thread):
    """A backend that takes every request and answers none. `taken` is how many."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port: int = self.listener.getsockname()[1]
        self.taken = 0
        self.start()

    def run(self) -> None:
        held = []
        with suppress(OSError):
            while True:
                held.append(self.listener.accept()[0])
                self.taken += 1  # a connection that is never answered carries one request


def show_black_hole(seconds: float) -> None:
    """How many requests go to one of four upstreams that does not answer, before it is ejected and after."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = [free_port() for _ in range(3)]
        for port in ports:
            start(stack, [sys.executable, "-m", "tests.bench.backend", str(port)], OTHERS)
            listening(port)
        hole = Hole()
        pool = {
            "upstreams": [{"url": f"http://127.0.0.1:{port}"} for port in (hole.port, *ports)],
            "timeouts": {"first_byte": "1s"},
        }
        gate = gateway(stack, folder, pool)
        rows = []
        for name in ("first", "next", "last"):
            before = hole.taken
            command = [sys.executable, "-m", "tests.bench.load", str(gate.port), gate.key, "32", str(seconds)]
            done = subprocess.run(
                ["taskset", "-c", "1", *command], cwd=ROOT, capture_output=True, text=True, check=True
            )
            seen = json.loads(done.stdout)
            taken = hole.taken - before
            rows.append(
                (
                    f"{name} {seconds:.0f} s",
                    f"{seen['answers']:,.0f}",
                    f"{taken}",
                    f"{taken / seen['answers']:.2%}",
                    f"{seen['errors']:.0f}",
                )
            )
        table(("one black hole among four", "answers", "went to it", "share", "failed"), rows)


def main() -> None:
    """Measure and print; the tables are the README's."""
    words = argparse.ArgumentParser(prog="make bench", description=__doc__)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--seconds", type=float, default=3)
    words.add_argument("--callers", type=int, default=32)
    words.add_argument("--streams", type=int, nargs="*", default=[100, 500, 1000])
    given = words.parse_args()
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    print(f"{os.cpu_count()} × {model}, Linux {platform.release()}, Python {platform.python_version()}")
    with house() as proxies:
        requests(proxies, given.rounds, given.seconds, given.callers)
        show_requests(proxies, given.callers)
        show_latency(proxies, 3, given.seconds)
        for streams in given.streams:
            show_streams([p for p in proxies if p.name != "uvicorn's hello"], streams, 2)
        show_bursts([p for p in proxies if p.name != "uvicorn's hello"], 3, given.seconds)
    show_black_hole(given.seconds)
    table(contract.HEAD, contract.rows())


if __name__ == "__main__":
    main()

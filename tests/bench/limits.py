"""What a team that is refused costs the others, and what a refusal costs: `python -m tests.bench.limits`.

Isolation: team B asks within its limits, at random instants that are known before (an open loop), with and without team
A, which asks at a hundred times its limit and is refused nearly always. Both are on one worker, which has one core; the
rounds take turns, and the ratio is the median over pairs.

Cost: CPU of the gateway and of Valkey for an answer, from /proc, where every request is admitted and where every one is
refused, on the same five limits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.__main__ import (
    OTHERS,
    POLICIES,
    ROOT,
    Served,
    cpu_seconds,
    listening,
    serve,
    start,
    table,
)
from tests.proving.ports import free_port

A_LIMIT = 2  # requests a second
TEAMS = {"within": None, "refused": 1, "loud": A_LIMIT}  # requests a second that a team may ask for, None: plenty
_WARM = 1.0  # seconds by which A begins before B and ends after it


def gate(stack: ExitStack) -> Served:
    """One worker on its core, on a store and a backend on the other one."""
    folder, backend = Path(stack.enter_context(tempfile.TemporaryDirectory())), free_port()
    start(stack, [sys.executable, "-m", "tests.bench.backend", str(backend)], OTHERS)
    listening(backend)
    return serve(stack, folder, policies(backend))


def policies(backend: int) -> dict[str, Any]:
    """The five limits of the other benchmarks for each team; what a team may ask for is the first of them."""
    limits = POLICIES["plans"]["bench"]["limits"]  # type: ignore[index]
    documents: dict[str, Any] = {**POLICIES, "plans": {}, "teams": {}}
    documents["pools"] = {"bench": {"upstreams": [{"url": f"http://127.0.0.1:{backend}", "max_in_flight": 100_000}]}}
    for team, a_second in TEAMS.items():
        rate = {} if a_second is None else {"rate": f"{a_second * 60}/minute", "burst": 10}
        documents["plans"][team] = {"limits": [{**limits[0], **rate}, *limits[1:]]}
        documents["teams"][team] = {"organisation": team, "plan": team}
    return documents


# — isolation


def fire(port: int, key: str, rate: float, seconds: float, seed: int) -> subprocess.Popen[str]:
    """An open-loop load in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.limits", "fire", str(port), key, str(rate), str(seconds), str(seed)]
    return subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, OTHERS)), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def fired(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it saw: statuses, and percentiles of the latency in milliseconds."""
    out, _ = process.communicate(timeout=120)
    seen: dict[str, Any] = json.loads(out)
    return seen


def show_isolation(gate: Served, pairs: int, seconds: float, within: float, loud: float) -> None:
    """B with A and without it, in turns; which of the two comes first takes turns as well."""
    seen: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    refused = asked = 0
    for pair in range(pairs):
        for beside in (False, True) if pair % 2 else (True, False):
            noise = fire(gate.port, gate.keys["loud"], loud, seconds + 2 * _WARM, pair) if beside else None
            time.sleep(_WARM)
            quiet = fire(gate.port, gate.keys["within"], within, seconds, pair)
            seen[beside].append(fired(quiet))
            if noise is not None:
                statuses = fired(noise)["statuses"]
                refused, asked = refused + statuses.get("429", 0), asked + sum(statuses.values())
    wrong = [one["statuses"] for some in seen.values() for one in some if set(one["statuses"]) != {"200"}]
    if wrong:
        sys.exit(f"team B was within its limits, and was answered {wrong}")
    rows = []
    for word in ("p50_ms", "p99_ms"):
        alone, beside_a = ([one[word] for one in seen[beside]] for beside in (False, True))
        ratio = median(a / b for a, b in zip(beside_a, alone, strict=True))
        rows.append((word[:3], f"{median(alone):.2f}", f"{median(beside_a):.2f}", f"{ratio:.2f}"))
    told = f"B at {within:g}/s, A at {loud:g}/s of its {A_LIMIT}/s ({refused / asked:.0%} refused)"
    table((told, "B alone, ms", "beside A, ms", "ratio"), rows)


def _fire(port: str, key: str, rate: str, seconds: str, seed: str) -> None:
    """The process that fires; it prints what it saw."""
    import uvloop

    from tests.proving.load import completion_request, poisson
    from tests.proving.load import fire as shoot

    starts = poisson(float(rate), float(seconds), int(seed))
    result = uvloop.run(shoot(f"http://127.0.0.1:{port}", completion_request(key), starts))
    seen = {
        "statuses": {str(status): times for status, times in result.statuses.items()},
        "p50_ms": result.percentile(50) * 1000,
        "p99_ms": result.percentile(99) * 1000,
        "late_ms": result.late * 1000,
    }
    if result.errors:
        sys.exit(f"requests failed: {dict(result.errors)}")
    print(json.dumps(seen))


# — what a refusal costs


@dataclass
class Cost:
    """CPU of an answer in microseconds, round by round."""

    gateway: list[float] = field(default_factory=list)
    store: list[float] = field(default_factory=list)


def show_costs(gate: Served, rounds: int, seconds: float, callers: int) -> None:
    """Admissions and refusals in turns, by callers that ask again at once."""
    costs = {"admitted": Cost(), "refused": Cost()}
    for number in range(rounds + 1):
        for name, team in (("admitted", "within"), ("refused", "refused")):
            before = cpu_seconds([gate.process]), cpu_seconds([gate.store])
            command = [sys.executable, "-m", "tests.bench.load", str(gate.port), gate.keys[team], str(callers)]
            done = subprocess.run(
                ["taskset", "-c", ",".join(map(str, OTHERS)), *command, str(seconds)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            seen = json.loads(done.stdout)
            share = seen["errors"] / seen["answers"]  # to this load every answer but 200 is an error
            if share > 0 if name == "admitted" else share < 0.95:
                sys.exit(f"{share:.0%} of the requests that were to be {name} were refused")
            if number:  # the first round warms
                costs[name].gateway.append((cpu_seconds([gate.process]) - before[0]) / seen["answers"] * 1e6)
                costs[name].store.append((cpu_seconds([gate.store]) - before[1]) / seen["answers"] * 1e6)
    rows = []
    admitted, refused = costs["admitted"], costs["refused"]
    for what, one, other in (
        ("gateway", admitted.gateway, refused.gateway),
        ("Valkey", admitted.store, refused.store),
    ):
        ratio = median(b / a for a, b in zip(one, other, strict=True))
        rows.append((what, f"{median(one):.0f}", f"{median(other):.0f}", f"{ratio:.2f}"))
    table((f"CPU µs a request, {callers} callers", "admitted and answered", "refused", "ratio"), rows)


def main() -> None:
    """Measure and print."""
    words = argparse.ArgumentParser(prog="python -m tests.bench.limits", description=__doc__)
    words.add_argument("--pairs", type=int, default=7, help="of rounds with A and without")
    words.add_argument("--seconds", type=float, default=10, help="of a round")
    words.add_argument("--within", type=float, default=50, help="requests a second of B")
    words.add_argument("--rounds", type=int, default=5, help="of admissions and refusals")
    words.add_argument("--callers", type=int, default=32)
    given = words.parse_args()
    busy = os.getloadavg()[0]  # what others do on this machine is in the latencies of both, and not in the same way
    print(f"{os.cpu_count()} cores, load {busy:.1f}, Linux {platform.release()}, Python {platform.python_version()}")
    with ExitStack() as stack:
        one = gate(stack)
        show_costs(one, given.rounds, min(given.seconds, 3), given.callers)
        show_isolation(one, given.pairs, given.seconds, given.within, 100 * A_LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["fire"]:
        _fire(*sys.argv[2:])
    else:
        main()

"""How large a store has to be: `make bench-sizing`. What a request costs Valkey, and how much memory what takes there.

CPU is user and system time of a Valkey with its log on (AOF, everysec), from /proc, over the requests answered, with
the five limits of the other benchmarks and the ledger; requests a second of one core are its inverse: what a Valkey
that does nothing else would do. Bytes are those that MEMORY USAGE counts: keys with everything that belongs to them,
without what the server needs for itself and without the holes between (mem_fragmentation_ratio).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

import redis

from gateway.buckets import bucket
from gateway.embedded import _server_binary
from gateway.keys import KeyRing
from gateway.records import ledger_stream, sums_key
from gateway.store import Store
from tests.bench.__main__ import (
    OTHERS,
    POLICIES,
    ROOT,
    Served,
    cpu_seconds,
    listening,
    load,
    resident,
    serve,
    start,
    table,
)
from tests.bench.reports import build
from tests.proving import house
from tests.proving.ports import free_port

ORGANISATION = "acme"
_OPEN_FOR = 6.0  # seconds: the streams of the load last eight
_KEPT = (b":rate:", b":quota:", b":rolling:")  # counts, which do not grow with the requests


Row = tuple[str, int, float]  # what, how many, bytes each


class Counted(NamedTuple):
    """What a store has counted until now."""

    cpu: float
    received: int
    sent: int
    logged: int


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def counted(client: redis.Redis, pid: int) -> Counted:
    info = client.info("everything")
    return Counted(
        cpu_seconds([pid]),
        info["total_net_input_bytes"],
        info["total_net_output_bytes"],
        info["aof_current_size"],
    )


def taken(client: redis.Redis, keys: Iterable[bytes | str]) -> int:
    """The bytes that these keys take."""
    with client.pipeline(transaction=False) as many:
        for key in keys:
            many.memory_usage(key, samples=0)
        return sum(size or 0 for size in many.execute())


def underway(client: redis.Redis) -> list[bytes]:
    """The keys that requests have, under way or ended lately: reservations, seats, and when they have to be renewed."""
    whole = list(client.scan_iter(match=f"{{{ORGANISATION}}}:*", count=1000))
    return [key for key in whole if b":usage" not in key and not any(word in key for word in _KEPT)]


# — requests


def show_requests(served: Served, client: redis.Redis, rounds: int, seconds: float) -> None:
    """What a request costs Valkey, with few callers and with many, whose requests share trips."""
    rows = []
    for callers in (1, 32, 256):
        cpu: list[float] = []
        load(served.port, served.keys["bench"], callers, 1)  # warm
        before, answers = counted(client, served.store), 0.0
        for _ in range(rounds):
            used = cpu_seconds([served.store])
            seen = load(served.port, served.keys["bench"], callers, seconds)
            cpu.append((cpu_seconds([served.store]) - used) / seen["answers"] * 1e6)
            answers += seen["answers"]
        after = counted(client, served.store)
        sizes = [(now - then) / answers for then, now in zip(before[1:], after[1:], strict=True)]
        one = median(cpu)
        rows.append((f"{callers}", f"{one:.0f}", f"{1e6 / one:,.0f}", *(f"{size:,.0f}" for size in sizes)))
    head = ("callers", "Valkey CPU µs a request", "requests/s of a core", "bytes in", "bytes out", "bytes of log")
    table(head, rows)


# — bytes


def show_bytes(streams: list[Row], client: redis.Redis, keys: int) -> None:
    """Of requests in the store that serves; of keys and sums in one that has nothing else."""
    rows = [*streams, _of_rows(client)]
    with house.server(_server_binary()) as other, other.sync() as empty:
        rows += asyncio.run(_of_keys(empty, keys, other.url))
        rows.append(_of_groups(empty))
    table(("what", "how many", "bytes each"), [(name, f"{count:,}", f"{size:,.0f}") for name, count, size in rows])


def of_streams(served: Served, client: redis.Redis, streams: int) -> list[Row]:
    """Open streams, in the store and in a worker that has served nothing yet: it keeps the memory that it once had. And
    what is kept of them for two minutes after they ended."""
    idle = resident(family(served.process))
    command = [sys.executable, "-m", "tests.bench.load", str(served.port), served.keys["bench"], str(streams), "0"]
    cores = ",".join(map(str, OTHERS))
    opened = subprocess.Popen(["taskset", "-c", cores, *command, "stream"], cwd=ROOT, stdout=subprocess.DEVNULL)
    live = f"{{{ORGANISATION}}}:live"
    until = time.monotonic() + _OPEN_FOR
    while (count := int(client.zcard(live))) < streams and time.monotonic() < until:
        time.sleep(0.05)
    if count < streams / 2:
        sys.exit(f"{count} of {streams} streams were open after {_OPEN_FOR:g} s: this machine is too busy")
    own, grown = taken(client, underway(client)), resident(family(served.process)) - idle
    opened.wait(60)
    time.sleep(0.5)
    marks = taken(client, underway(client))
    return [
        ("open stream, in Valkey", count, own / count),
        ("open stream, in its worker", count, grown / count),
        ("request that ended less than two minutes ago", streams, marks / streams),
    ]


def _of_rows(client: redis.Redis) -> Row:
    stream = ledger_stream(ORGANISATION)
    count = client.xlen(stream)
    return "row of the ledger", count, taken(client, [stream]) / count


async def _of_keys(client: redis.Redis, keys: int, url: str) -> list[Row]:
    """API keys in the store, and in the memory of every worker."""
    store = Store(url, deadline=30)
    ring = KeyRing(store, b"of the benchmark")
    await ring.load()
    for begin in range(0, keys, 500):
        many = (
            ring.create("bench", user=f"user-{number}", name="of the benchmark", models=(), expires=None)
            for number in range(begin, min(keys, begin + 500))
        )
        await asyncio.gather(*many)
    worker, idle = KeyRing(store, b"of the benchmark"), resident([os.getpid()])
    await worker.load()
    grown = resident([os.getpid()]) - idle
    await store.aclose()
    return [
        ("API key, in Valkey", keys, taken(client, ["{gateway}:keys"]) / keys),
        ("change of an API key, of which 10,000 are kept", keys, taken(client, ["{gateway}:key-changes"]) / keys),
        ("API key, in each worker", keys, grown / keys),
    ]


def _of_groups(client: redis.Redis) -> Row:
    """Sums of a month, by team, key, model and pool: one group for each combination that was used."""
    month = bucket("month", int(time.time()) // 3600)
    count = build(client, [("month", month)])
    size = taken(client, [sums_key(ORGANISATION, "month", month)]) / count
    return "group of sums, of an hour, a day or a month", count, size


def main() -> None:
    """Measure and print."""
    words = argparse.ArgumentParser(prog="make bench-sizing", description=__doc__)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--seconds", type=float, default=3, help="of a round")
    words.add_argument("--streams", type=int, default=300)
    words.add_argument("--keys", type=int, default=10_000)
    given = words.parse_args()
    busy = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {busy:.1f}, Linux {platform.release()}, Python {platform.python_version()}")
    with ExitStack() as stack:
        folder, backend = Path(stack.enter_context(tempfile.TemporaryDirectory())), free_port()
        start(stack, [sys.executable, "-m", "tests.bench.backend", str(backend)], OTHERS)
        listening(backend)
        upstream = {"url": f"http://127.0.0.1:{backend}", "max_in_flight": 100_000}
        served = serve(stack, folder, {**POLICIES, "pools": {"bench": {"upstreams": [upstream]}}})
        socket = folder / "state" / "valkey.sock"
        client = stack.enter_context(redis.Redis(unix_socket_path=str(socket)))
        version = client.info("server").get("valkey_version", "?")
        print(f"Valkey {version}, appendfsync everysec, one worker")
        client.config_set("auto-aof-rewrite-percentage", 0)  # the log's growth is measured
        streams = of_streams(served, client, given.streams)
        show_requests(served, client, given.rounds, given.seconds)
        show_bytes(streams, client, given.keys)


if __name__ == "__main__":
    main()

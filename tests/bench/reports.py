"""How long a report over a year takes, beside plain HGETALL of the same hashes: `python -m tests.bench.reports`.

A thousand teams use twenty models in each of thirteen months, the one that is running among them: 20,000 groups each.
Of the first month the days stand there, too, with a half of the groups, and hours of it, with a twentieth. Every figure
is the median of rounds; CPU is this process's. The first report of its kind leaves rollups of what has ended in the
store, and has a figure of its own.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import msgspec
import redis
import uvloop

from gateway.buckets import Bucket, bucket, cover, finer, hours
from gateway.embedded import _server_binary
from gateway.records import ORGANISATIONS, Grain, sums_key
from gateway.rollups import running_hour
from gateway.store import Store
from gateway.sums import Query, report
from tests.proving import house

TEAMS, MODELS, MONTHS = 1000, 20, 13
SHARE: dict[Grain, int] = {"month": 1, "day": 2, "hour": 20}  # of how many groups one is there
BYS: tuple[tuple[Any, ...], ...] = (("team",), ("model",), ("team", "model"), ("month",))


def build(client: redis.Redis, buckets: list[Bucket]) -> int:
    """The sums of these buckets; how many groups they are."""
    rnd = random.Random(1)
    fields = [
        msgspec.json.encode(
            [f"team-{team:04}", f"{team:010}Kx", "", f"accounts/fireworks/models/model-{model:02}", "serverless"]
        )
        for team in range(TEAMS)
        for model in range(MODELS)
    ]
    client.sadd(ORGANISATIONS, "acme")
    count = 0
    for grain, number in buckets:
        those = rnd.sample(fields, len(fields) // SHARE[grain])
        with client.pipeline(transaction=False) as many:
            for begin in range(0, len(those), 500):
                mapping: dict[Any, Any] = {}
                for group in those[begin : begin + 500]:
                    n = rnd.randrange(1, 5000)
                    mapping[group] = msgspec.msgpack.encode([n, n * 800, n * 300, n * 400, n * 50, n * 1234])
                many.hset(sums_key("acme", grain, number), mapping=mapping)
            many.execute()
        count += len(those)
    return count


async def measured(rounds: int, question: Callable[[], Awaitable[Any]]) -> tuple[float, float, float]:
    """Milliseconds of an answer: the first, the median of the others, and the median of their CPU."""
    took, cpu = [], []
    for _ in range(rounds + 1):
        before, busy = time.perf_counter(), time.process_time()
        await question()
        took.append((time.perf_counter() - before) * 1e3)
        cpu.append((time.process_time() - busy) * 1e3)
    return took[0], median(took[1:]), median(cpu[1:])


async def bench(url: str, client: redis.Redis, rounds: int) -> None:
    store = Store(url, deadline=30)
    now = await running_hour(store)
    running = bucket("month", now)
    first = running - MONTHS + 1
    days = finer("month", first)
    count = build(client, [("month", first + n) for n in range(MONTHS)])
    count += build(client, [*days, *(hour for day in days[:5] for hour in finer(*day))])
    memory = client.info("memory")["used_memory"] / 1e6
    print(f"{count:,} groups in {client.dbsize() - 1:,} hashes, {memory:.0f} MB: {memory * 1e6 / count:.0f} bytes each")
    begin = hours("month", first).start
    for name, since in (
        ("twelve months, the one that is running among them", hours("month", first + 1).start),
        ("since the third of the first month at 10:00", begin + 58),
    ):
        parts = cover(since, now + 1, now)
        keys = [sums_key("acme", part.grain, part.number) for part in parts]
        read = sum(client.hlen(key) for key in keys)
        print(f"\n{name}: {len(keys)} hashes, {read:,} groups")

        async def plain(keys: list[str] = keys) -> None:
            for key in keys:
                await store.client.hgetall(key)

        _, least, load = await measured(rounds, plain)
        print(f"  {'HGETALL of all of them':42}{least:7.0f} ms  CPU{load:6.0f} ms")
        for by in BYS:

            async def asked(by: tuple[Any, ...] = by, since: int = since) -> None:
                await report(store, Query(by, since * 3600))

            once, took, cpu = await measured(rounds, asked)
            print(
                f"  by {', '.join(by):21}first{once:6.0f} ms, then{took:7.0f} ms  CPU{cpu:6.0f} ms"
                f"  {took / least:5.2f} of HGETALL"
            )
    await store.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with house.server(_server_binary()) as server, server.sync() as client:
        uvloop.run(bench(server.url, client, rounds))


if __name__ == "__main__":
    main()

"""What it costs to tell: of a request to the figures and the log, of the files once a second, of a scrape.

`make bench-told`. CPU time of this process by its own clock, the least of several rounds; nothing else runs in it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import structlog

from gateway import metrics, telemetry
from gateway.embedded import _server_binary
from gateway.exchange import Exchange
from gateway.metrics import Counters, Histograms, Metrics
from tests.bench.__main__ import table
from tests.proving import house

_ROUNDS = 7


def microseconds(work: Callable[[], object], times: int, settle: Callable[[], object] = lambda: None) -> float:
    """CPU time of one of so many, of all threads."""
    rounds = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        for _ in range(times):
            work()
        settle()
        rounds.append((time.process_time() - began) / times * 1e6)
    return min(rounds)


async def exchanges(store_url: str) -> list[tuple[str, float]]:
    """What is done at the end of an exchange, and once a second."""
    seen: list[tuple[Exchange, Any]] = []
    async with house.echo() as backend, house.gateway(store_url, house.documents([backend])) as served:
        meters, proxy = served.gateway.meters, cast(Any, served.gateway)._proxy
        told = telemetry.observer()
        proxy._observe = lambda x, scope: seen.append((x, scope))
        async with served.client(await served.key()) as client:
            for stream in (False, True):
                body = {"model": house.MODEL, "prompt": "a b c", "max_tokens": 5, "stream": stream}
                await client.post("/v1/completions", json=body)
        (whole, scope), (streamed, _) = seen
        rows = [
            ("figures of a JSON answer", microseconds(lambda: meters.exchange(whole, "POST"), 5000)),
            ("figures of a stream", microseconds(lambda: meters.exchange(streamed, "POST"), 5000)),
            (
                "the line, and the thread that writes it",
                microseconds(lambda: told(whole, scope), 2000, telemetry.finish),
            ),
        ]

        def a_second() -> None:
            meters.exchange(streamed, "POST")
            meters._look()
            meters._flush()

        return [*rows, ("to look, and to write what has changed", microseconds(a_second, 50))]


def scrape(workers: int, teams: int, models: int) -> list[tuple[str, float]]:
    """Of so many workers that have all counted all teams and models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(workers):
            tokens = Counters("tokens_total", "of teams", "team", "model", "type")
            times = Histograms("times_seconds", "of models", [0.01 * 2**power for power in range(14)], "model")
            for model in range(models):
                times[(f"model-{model}",)].observe(1)
                for team in range(teams):
                    for kind in ("input", "output"):
                        tokens[(f"team-{team}", f"model-{model}", kind)].add()
            Metrics(folder, tokens, times).flush()  # it lives on
        families = metrics._gather(folder)
        series = len(metrics._text(families).splitlines())
        return [
            (f"to add up {workers} workers, {series:,} lines", microseconds(lambda: metrics._gather(folder), 1)),
            ("to render them", microseconds(lambda: metrics._text(families), 1)),
        ]


def main() -> None:
    """Measure and print."""
    with Path(os.devnull).open("wb") as nowhere:
        telemetry.set_up("json", nowhere)
        with house.server(_server_binary()) as server:
            rows = asyncio.run(exchanges(server.url))
        structlog.reset_defaults()
    rows += scrape(4, 100, 20)
    table(("to tell", "CPU µs"), [(what, f"{took:,.1f}") for what, took in rows])


if __name__ == "__main__":
    main()

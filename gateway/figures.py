"""What Prometheus is told by the control plane: what it gathers itself, from the store and from the disk, and what the
workers have counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.errors import GatewayError
from gateway.exports import standings
from gateway.ledger import organisations
from gateway.metrics import gathered
from gateway.pipes import Crew, State
from gateway.records import ledger_stream
from gateway.store import Store


async def exposition(store: Store, state: Path, spools: Path, crew: Crew | None = None) -> bytes:
    """What is known, in Prometheus's text format. That the store is away is a figure, too: the rest is told then.
    `crew` are the workers, where somebody supervises them."""
    counted = await asyncio.to_thread(gathered, state)
    families = await asyncio.to_thread(_spooled, spools)
    families += [] if crew is None else _crew(crew)
    try:
        families += await _stored(store)
        away = 0
    except GatewayError:
        away = 1
    families.append(_gauge("gateway_store_up", "whether the store answers", [((), 1 - away)]))
    # A name may stand once in an exposition; of one that the workers have, theirs counts.
    return counted + _written(family for family in families if b"# TYPE %b " % family.name.encode() not in counted)


class _Known(Collector):
    """Figures that are known already: to gather them takes a store, and Prometheus's collectors do not wait."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _written(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Known(list(families)))
    return generate_latest(registry)


def _gauge(
    name: str, meaning: str, values: Iterable[tuple[Sequence[str], int]], labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _crew(crew: Crew) -> list[Metric]:
    states = Counter[str](worker.told.state for worker in crew.workers)
    restarts = CounterMetricFamily("gateway_worker_restarts", "workers that were started in the place of dead ones")
    restarts.add_metric((), sum(worker.restarts for worker in crew.workers))
    counted = [((state,), states[state]) for state in get_args(State)]
    return [_gauge("gateway_workers", "processes that serve, by how they stand", counted, ("state",)), restarts]


def _spooled(folder: Path) -> list[Metric]:
    """What the workers of this state folder have spooled."""
    sizes = []
    for file in folder.glob("*.spool"):
        with suppress(FileNotFoundError):  # replayed and gone meanwhile
            sizes.append(file.stat().st_size)
    return [
        _gauge("gateway_spool_files", "files of settlements that wait for the store", [((), len(sizes))]),
        _gauge("gateway_spool_bytes", "their sizes", [((), sum(sizes))]),
    ]


async def _stored(store: Store) -> list[Metric]:
    """How long the ledgers are, and how far the exports. Raises StoreUnavailable."""
    rows = [
        ((name,), await store.call(partial(store.client.xlen, ledger_stream(name))))
        for name in await organisations(store)
    ]
    found = {(one.export, one.organisation): one for one in await standings(store)}
    of = ("export", "organisation")
    lag, pending, dead = (
        [(at, getattr(one, figure)) for at, one in found.items()] for figure in ("lag", "pending", "dead")
    )
    return [
        _gauge("gateway_ledger_rows", "rows that the ledger holds", rows, ("organisation",)),
        _gauge("gateway_export_lag", "rows that nobody was given yet", lag, of),
        _gauge("gateway_export_pending", "rows handed out, and not acknowledged", pending, of),
        _gauge("gateway_export_dead_letters", "rows put aside", dead, of),
    ]

"""Which upstreams are drained by command: a set in the store that every gateway reads once a second.

A policy says what shall be; a command is for the hour in which a machine is repaired. Both drain alike: an upstream
gets nothing new, and ends what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from gateway.errors import StoreUnavailable
from gateway.language import UpstreamPolicy
from gateway.snapshot import Snapshot
from gateway.store import Store, leaving
from gateway.topology import Failures

_DRAINED = "{gateway}:drained"
_EVERY = 1.0  # seconds


def upstreams_of(snapshot: Snapshot) -> dict[str, UpstreamPolicy]:
    """The upstreams of the policies, by the names that commands and logs have for them: `pool/host:port`."""
    return {
        f"{name}/{urlsplit(own.url).netloc}": own for name, pool in snapshot.pools.items() for own in pool.upstreams
    }


async def listed(store: Store, snapshot: Snapshot) -> list[dict[str, object]]:
    """The upstreams of the policies, and which of them are drained, and by whom."""
    by_command = await drained(store)
    return [
        {
            "upstream": name,
            "weight": own.weight,
            "drained": "by command" if name in by_command else "by policy" if own.drain else None,
        }
        for name, own in upstreams_of(snapshot).items()
    ]


async def drained(store: Store) -> frozenset[str]:
    """The upstreams, as `pool/host:port`. Raises StoreUnavailable, as all of these do."""
    found = await store.call(lambda: store.client.smembers(_DRAINED))
    return frozenset(name.decode() for name in found)


async def drain(store: Store, upstream: str) -> None:
    await store.call(lambda: store.client.sadd(_DRAINED, upstream))


async def resume(store: Store, upstream: str) -> None:
    await store.call(lambda: store.client.srem(_DRAINED, upstream))


async def follow(store: Store, take: Callable[[frozenset[str]], None]) -> None:
    """Tell which ones there are, for ever. While the store is away, what was told last holds."""
    while not leaving():
        with suppress(*Failures, StoreUnavailable):  # nothing is sent while it is away
            take(await drained(store))
        await asyncio.sleep(_EVERY)

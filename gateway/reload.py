"""Policies while the gateway runs: read whole, checked whole, swapped whole, or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from gateway.documents import PolicyError
from gateway.pools import Live, Policies, Pools
from gateway.reading import Reading, Reloads, look, read

_LOOK_EVERY = 1.0  # seconds
_log = structlog.get_logger("gateway.policies")


def opened(directory: Path) -> Live:
    """The policies of a directory in force. Raises PolicyError for a mistake in them, or in a file that they name."""
    reading = read(directory)
    reloads = Reloads.begun(reading)
    live = Live(policies_of(reading), reloads)
    live.policies.pools.watch()
    return live


async def reload(live: Live, directory: Path) -> bool:
    """Take the documents as they are now; with a mistake in them everything stays as it is. Returns whether it did."""
    async with live.turn:
        # Off the loop: thousands of teams are read in most of a second.
        reading = await asyncio.to_thread(read, directory, live.reloads.reading)
        before = live.policies
        try:
            policies = policies_of(reading, before.pools)
        except PolicyError as found:
            live.reloads.refuse(reading, found.mistakes)
            _log.error("policies_refused", mistakes=found.mistakes, revision=live.reloads.revision)
            return False
        live.policies = policies
        live.reloads.take(reading)
        policies.pools.watch()
        _log.info("policies_taken", revision=live.reloads.revision)
        await before.pools.retire(policies.pools)
        return True


async def watch(live: Live, directory: Path, every: float = _LOOK_EVERY) -> None:
    """Take the documents whenever they, or the files that they name, have changed and stood still for a look; for ever.

    What was refused is looked at again when it changes again: one line in the log for each mistake that is made.
    """
    before = live.reloads.reading.marks
    while True:
        await asyncio.sleep(every)
        now = await asyncio.to_thread(look, live.reloads.reading)
        if now == before and now != live.reloads.reading.marks:
            await reload(live, directory)
        before = now


def policies_of(reading: Reading, before: Pools | None = None) -> Policies:
    """What was read with its pools. Raises PolicyError; nothing has changed then."""
    snapshot = reading.found()
    for name, pool in snapshot.pools.items():
        for upstream in pool.upstreams:
            if upstream.key_env and not reading.secrets[upstream.key_env]:
                _log.warning("upstream_without_key", pool=name, url=upstream.url, variable=upstream.key_env)
    try:
        return Policies(snapshot, Pools(snapshot.pools, reading.secrets, before), reading.secrets)
    except OSError as unread:  # changed since it was read
        raise PolicyError([f"pools: tls: {unread}"]) from unread

"""Policies while the gateway runs: read whole, checked whole, swapped whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from gateway.policy import PolicyError, load
from gateway.pools import Live, Policies, Pools

_log = structlog.get_logger("gateway.policies")


def read(directory: Path, before: Pools | None = None) -> Policies:
    """The policies of a directory with their pools. Raises PolicyError."""
    snapshot = load(directory)
    for name, pool in snapshot.pools.items():
        for upstream in pool.upstreams:
            if upstream.key_env and not os.environ.get(upstream.key_env):
                _log.warning("upstream_without_key", pool=name, url=upstream.url, variable=upstream.key_env)
    return Policies(snapshot, Pools(snapshot.pools, os.environ, before))


async def reload(live: Live, directory: Path) -> bool:
    """Take the documents as they are now; with a mistake in them everything stays as it is. Returns whether it did."""
    before = live.policies
    try:
        live.policies = read(directory, before.pools)
    except (PolicyError, OSError) as found:
        mistakes = found.mistakes if isinstance(found, PolicyError) else (str(found),)
        _log.error("policies_refused", mistakes=mistakes, revision=before.snapshot.revision)
        return False
    _log.info("policies_taken", revision=live.policies.snapshot.revision)
    await before.pools.retire(live.policies.pools)
    return True

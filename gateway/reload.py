"""Policies while the gateway runs: read whole, checked whole, swapped whole, or not at all."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from gateway.documents import PolicyError
from gateway.language import signing_key
from gateway.policy import load
from gateway.pools import Live, Policies, Pools
from gateway.snapshot import Snapshot

_log = structlog.get_logger("gateway.policies")
_one_at_a_time = asyncio.Lock()


def opened(snapshot: Snapshot, before: Pools | None = None) -> Policies:
    """A snapshot with its pools. Raises PolicyError for a file that the policies name and that cannot be read."""
    for name, pool in snapshot.pools.items():
        for upstream in pool.upstreams:
            key = os.environ.get(upstream.key_env, "").strip() if upstream.key_env else "-"
            if not (key.isascii() and key.isprintable()):
                raise PolicyError([f"pools.{name}: {upstream.key_env} holds no credential, expected printable ASCII"])
            if not key:
                _log.warning("upstream_without_key", pool=name, url=upstream.url, variable=upstream.key_env)
    hook = snapshot.gateway.webhook
    if hook is not None:
        try:
            signing_key(os.environ.get(hook.secret_env, ""))
        except ValueError as lacking:
            raise PolicyError([f"gateway.webhook.secret_env: {hook.secret_env} {lacking}"]) from None
    try:
        return Policies(snapshot, Pools(snapshot.pools, os.environ, before))
    except OSError as unread:
        raise PolicyError([f"pools: tls: {unread}"]) from unread


async def reload(live: Live, directory: Path) -> bool:
    """Take the documents as they are now; with a mistake in them everything stays as it is. Returns whether it did."""
    async with _one_at_a_time:
        return await _reload(live, directory)


async def _reload(live: Live, directory: Path) -> bool:
    before = live.policies
    try:
        snapshot = await asyncio.to_thread(load, directory)  # thousands of teams are read in most of a second
        policies = opened(snapshot, before.pools)
    except (PolicyError, OSError) as found:
        mistakes = found.mistakes if isinstance(found, PolicyError) else (str(found),)
        _log.error("policies_refused", mistakes=mistakes, revision=before.snapshot.revision)
        live.reloads.refused += 1
        live.reloads.mistakes = tuple(mistakes)
        return False
    live.policies, live.reloads.mistakes = policies, ()
    live.reloads.taken += 1
    policies.pools.watch()
    _log.info("policies_taken", revision=live.policies.snapshot.revision)
    await before.pools.retire(live.policies.pools)
    return True

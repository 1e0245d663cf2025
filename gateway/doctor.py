"""What `gateway doctor` looks at: whether everything that a gateway stands on is well, and what to do where it is not.

All checks run at the same time, each with a deadline of its own: what hangs is told, and keeps nobody waiting. Nothing
is changed but what every gateway does: the probe of the store is written, and an embedded store that does not run is
started, and stopped again.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from gateway import hostcheck, portcheck
from gateway.console import PATIENCE, table
from gateway.documents import PolicyError
from gateway.drains import drained
from gateway.embedded import Embedded
from gateway.errors import StoreUnavailable
from gateway.exports import ExportStanding, standings
from gateway.findings import Finding, error, graded, judged, ok, warning, worst
from gateway.keys import PEPPER, KeyRing
from gateway.language import Export
from gateway.pools import Policies
from gateway.reading import read
from gateway.reload import policies_of
from gateway.settings import Settings, kept_pepper
from gateway.store import Store, StoreError
from gateway.storecheck import store_findings
from gateway.tracecheck import trace_findings
from gateway.upstreamcheck import each, upstream_findings

T = TypeVar("T")

_DEADLINE = 15.0  # seconds of one check
_EMBEDDED_DEADLINE = 45.0  # an embedded store may have a long AOF to read
_PEPPER = "GATEWAY_KEY_PEPPER as the other gateways of this store have it, or their state folder (GATEWAY_STATE)"
_OLD = 3600.0  # seconds that a row may wait for its export


def show(findings: list[Finding]) -> None:
    """Print a table of everything, and below it what is not well, with what to do."""
    table(("verdict", "check", "of", "found"), [[one.verdict, one.check, one.of, one.found] for one in findings])
    for one in findings:
        if one.verdict != "ok":
            print(f"\n{one.verdict}: {one.check} of {one.of}: {one.found}; expected {one.expected}\n  do: {one.do}")
    errors, warnings = (sum(one.verdict == verdict for one in findings) for verdict in ("error", "warning"))
    print(f"\n{len(findings)} findings, {errors} errors, {warnings} warnings")


async def examine(settings: Settings, deadline: float = _DEADLINE) -> list[Finding]:
    """All findings, in the order of the checks. `deadline` is what one of them may take, in seconds."""
    told, policies = await _policies(settings, deadline)
    in_flight = sum(own.max_in_flight for _, _, _, own in each(policies)) if policies else 0
    workers, data = max(1, settings.workers), (settings.host, settings.port)
    control = (settings.admin_host, settings.admin_port, data)
    checks: list[Awaitable[list[Finding]]] = [
        _store_and_upstreams(settings, policies, deadline),
        _within(deadline, "traces", "the collector", trace_findings(os.environ)),
        _here(deadline, "host.files", lambda: [hostcheck.files(in_flight)]),
        _here(deadline, "host.memory", lambda: [hostcheck.memory(workers)]),
        _here(deadline, "host.disk", lambda: hostcheck.disk(settings.state, settings.spool_most, workers)),
        _here(deadline, "host.port", lambda: [portcheck.data_port(*data)]),
    ]
    if settings.workers:  # one that is alone has no control plane
        checks.append(_here(deadline, "host.port", lambda: [portcheck.control_port(*control)]))
    try:
        found = await asyncio.gather(*checks)
    finally:
        if policies is not None:
            await policies.pools.retire()
    return [*told, *(finding for part in found for finding in part)]


def _here(deadline: float, check: str, look: Callable[[], list[Finding]]) -> Awaitable[list[Finding]]:
    """Findings of this machine: a disk may hang, too."""
    return _within(deadline, check, "this machine", beside(look))


async def _within(deadline: float, check: str, of: str, look: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        async with asyncio.timeout(deadline):
            return await look
    except TimeoutError:
        return [error(check, of, f"no result within {deadline:g} s", "an answer", "see why it hangs")]


async def beside(work: Callable[[], T]) -> T:
    """The result of something that blocks, in a thread that nobody has to wait for, not even at the end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(set_: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, work())
        except Exception as failure:
            outcome = (future.set_exception, failure)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=run, daemon=True).start()
    return await future


# — policies


async def _policies(settings: Settings, deadline: float) -> tuple[list[Finding], Policies | None]:
    """What is said of the policies, and them, where they can be taken."""
    of = f"{settings.policies}/"
    try:
        async with asyncio.timeout(deadline):
            policies = policies_of(await beside(lambda: read(settings.policies)))
    except (PolicyError, OSError) as failure:
        late = f"not read within {deadline:g} s"
        mistakes = failure.mistakes if isinstance(failure, PolicyError) else (str(failure) or late,)
        do = "mend it; a gateway that runs keeps the policies that it has, and a new one does not start"
        return [error("policies", of, mistake, "documents without mistakes", do) for mistake in mistakes], None
    snapshot = policies.snapshot
    models = len(snapshot.public_models) + len(snapshot.patterns)
    held = f"{models} models, {len(snapshot.pools)} pools, {len(snapshot.teams)} teams"
    return [ok("policies", of, f"revision {snapshot.revision}: {held}")], policies


# — the store, and what is known from it


async def _store_and_upstreams(settings: Settings, policies: Policies | None, deadline: float) -> list[Finding]:
    """Upstreams wait for the store, which knows which of them are drained, and for nothing else."""
    by_command: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()
    store = asyncio.ensure_future(_store(settings, policies, deadline, by_command))
    try:
        upstreams = await _upstreams(policies, by_command, deadline) if policies else []
        return [*await store, *upstreams]
    finally:
        store.cancel()


async def _upstreams(policies: Policies, by_command: asyncio.Future[frozenset[str]], deadline: float) -> list[Finding]:
    with suppress(TimeoutError):
        async with asyncio.timeout(deadline):
            policies.pools.drain(await asyncio.shield(by_command))
    parts = [
        _within(deadline, "upstream.answer", name, upstream_findings(name, upstream, pool, own, beside))
        for name, upstream, pool, own in each(policies)
    ]
    return [finding for part in await asyncio.gather(*parts) for finding in part]


async def _store(
    settings: Settings, policies: Policies | None, deadline: float, by_command: asyncio.Future[frozenset[str]]
) -> list[Finding]:
    """All findings of the store; `by_command` is told what is drained, or nothing where that is not known."""
    try:
        async with _address(settings) as url:
            found = await _within(deadline, "store", "the store", store_findings(url, settings.store_deadline))
            if worst(one for one in found if one.check == "store") == "ok":
                exports = policies.snapshot.exports if policies else None
                asked = _contents(url, settings, exports, by_command)
                found += await _within(deadline, "store", "what it holds", asked)
            return found
    except StoreError as failure:
        do = (
            "rights of the folder; valkey.log in it; one that hangs has to go on, or be ended, before another may start"
        )
        return [error("store", str(settings.state), str(failure), "an embedded store that answers", do)]
    finally:
        if not by_command.done():
            by_command.set_result(frozenset())


@asynccontextmanager
async def _address(settings: Settings) -> AsyncIterator[str]:
    """The address of the store. Raises StoreError where an embedded one cannot be started."""
    if settings.redis_url:
        yield settings.redis_url
        return
    embedded = Embedded(settings.state)
    try:
        async with asyncio.timeout(_EMBEDDED_DEADLINE):
            if await beside(embedded.hangs):
                raise StoreError(f"the embedded Valkey of {embedded.state} is there and does not answer")
            await beside(embedded.__enter__)
    except TimeoutError:
        raise StoreError(f"no result within {_EMBEDDED_DEADLINE:g} s") from None
    try:
        yield embedded.url
    finally:
        with suppress(TimeoutError):  # another command is starting it, which takes as long
            async with asyncio.timeout(_EMBEDDED_DEADLINE):
                await beside(embedded.__exit__)


async def _contents(
    url: str, settings: Settings, known: Mapping[str, Export] | None, by_command: asyncio.Future[frozenset[str]]
) -> list[Finding]:
    """Findings of the keys and exports that the store has."""
    store = Store(url, deadline=PATIENCE)
    try:
        by_command.set_result(await drained(store))
        found = [await _keys(store, settings)]
        if known is not None:
            found += exports_of(known, await standings(store), time.time())
        return found
    except StoreUnavailable:
        do = "try again; its own log"
        return [error("store", "the store", f"the store {store.reason or 'does not answer'}", "an answer", do)]
    finally:
        await store.aclose()


async def _keys(store: Store, settings: Settings) -> Finding:
    """Whether the keys of the store are ours. A store without keys is left as it is."""
    check, of = "keys", "the store"
    if not await store.call(lambda: store.client.exists(PEPPER)):
        return ok(check, of, "none was made yet")
    try:
        kept = await beside(lambda: kept_pepper(settings))
    except OSError as failure:
        kept, told = None, f"{settings.state}/pepper cannot be read: {(failure.strerror or 'unknown').lower()}"
    else:
        told = f"it has keys, and there is neither GATEWAY_KEY_PEPPER nor {settings.state}/pepper"
    expected = "the pepper of the gateway that made them"
    if kept is None:
        return error(check, of, told, expected, _PEPPER)
    ring = KeyRing(store, kept)
    try:
        await ring.load()
    except StoreError:
        return error(check, of, "its keys were made under another pepper", expected, _PEPPER)
    now = time.time()
    states = [record.state(now) for record in ring.records()]
    return ok(check, of, f"{states.count('active'):,} in force of {len(states):,}")


def exports_of(known: Mapping[str, Export], found: Iterable[ExportStanding], now: float) -> list[Finding]:
    """What is said of the exports: those of the policies, and those that the store knows of."""
    findings, begun = [], set()
    for one in found:
        begun.add(one.export)
        findings.append(_export(one, now, is_known=one.export in known))
    return [*findings, *(ok("exports", name, "no row yet") for name in known if name not in begun)]


def _export(one: ExportStanding, now: float, *, is_known: bool) -> Finding:
    check, of = "exports", f"{one.export} of {one.organisation}"
    age = 0.0 if one.oldest_ms is None else now - one.oldest_ms / 1000
    found = f"{one.lag:,} rows to deliver, {one.pending:,} under way, {one.dead:,} put aside"
    if not is_known:
        do = f"gateway exports forget {one.export}: it keeps rows from being trimmed"
        return warning(check, of, f"{found}; it is in no policy", "an export of the policies", do)
    if one.dead:
        do = f"gateway exports dead {one.export} says why; gateway exports revive {one.export} tries again"
        return warning(check, of, found, "none put aside", do)
    do = f"gateway export {one.export} has to run, and its receiver has to take rows: see its log"
    return judged(
        graded(age, _OLD, float("inf")), check, of, f"{found}, the oldest for {age / 60:,.0f} min", "an hour", do
    )

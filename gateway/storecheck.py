"""What the doctor finds of the store: of each server its version, memory, files, replicas, pace and clock; of all of
them together whether scripts run and whether Sentinels or a cluster would survive the loss of one.

Nothing is written but the probe, which every gateway writes too. What a server may not be asked is not known, and said
to be so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

from gateway.findings import Finding, amount, error, graded, judged, ok, warning
from gateway.store import Script
from gateway.topology import Client, Cluster, Failures, Node, Sentinels, Topology, opened, why

_OLDEST = (7, 0)  # scripts begin with #!lua, and XINFO GROUPS tells the lag
_PINGS, _PINGS_FOR = 100, 3.0  # at most, and seconds
_SKEW = (1.0, 300.0)  # seconds that clocks differ at which to warn, and to fail
_SILENT = 10  # seconds that a replica may have said nothing: it does so each second
_PROBE_KEPT_MS = 60_000
_ASKED = 2.0  # seconds for one answer
_FULL = (0.75, 0.9)  # shares of memory and of connections at which to warn, and to fail

_ROOM = (
    "a larger maxmemory (CONFIG SET) or machine, a shorter ledger.keep, or more shards: a full store takes no requests"
)
_SERVICE = "the name at the end of GATEWAY_REDIS_URL, as `sentinel monitor` has it"
# What to do about a store or a Sentinel that does not do its work, by words in what is said of it (topology.why).
_DO: Mapping[str, str] = {
    "a certificate": "a new certificate there, or ?ssl_ca_certs= in GATEWAY_REDIS_URL, the file of who vouches for it",
    "a name that": "DNS, or the host in GATEWAY_REDIS_URL",
    "database": "the database at the end of GATEWAY_REDIS_URL",
    "does not answer": "see whether its process is stopped, busy (SLOWLOG GET) or behind a firewall that is silent",
    "expected": "GATEWAY_REDIS_URL: its beginning says what stands there",
    "maxclients": "a larger maxclients there, or fewer who connect",
    "maxmemory": _ROOM,
    "MISCONF": "room and rights of its disk: its own log says more",
    "NOPERM": "its user needs ~* for keys, and +@all -@dangerous +info +role +cluster|slots for commands",
    "password": "the user and the password in GATEWAY_REDIS_URL, in which %40 stands for @",
    "protocol of Redis": "the port in GATEWAY_REDIS_URL: something else listens there, or it wants TLS (rediss://)",
    "a Sentinel knows": _SERVICE,
    "no service": _SERVICE,
    "speak TLS": "rediss:// is for stores with TLS, redis:// for those without",
    "takes no writes": "name its primary in GATEWAY_REDIS_URL, or the Sentinels who know it",
    "too few replicas": "start its replicas, or a smaller min-replicas-to-write",
}


@dataclass(frozen=True)
class Server:
    """What one server said of itself, and how fast."""

    name: str
    info: Mapping[str, Any]  # INFO, as redis-py reads it
    config: Mapping[str, str]  # those of its settings that it tells
    pings: list[float]  # seconds
    skew: float  # seconds by which its clock is ahead of ours


async def store_findings(url: str, deadline: float) -> list[Finding]:
    """All findings of the store at `url`, of which a request waits for `deadline` seconds at most."""
    topology = opened(url)
    try:
        try:
            async with asyncio.timeout(_ASKED):
                await topology.find()
        except Failures as failure:
            return [_away(_place(url), failure), *await _shape(topology)]
        servers = await asyncio.gather(*(_server(node) for node in topology.primaries), return_exceptions=True)
        found: list[Finding] = []
        for node, server in zip(topology.primaries, servers, strict=True):
            if isinstance(server, Failures):
                found.append(_away(_name(node), server))
            elif isinstance(server, BaseException):
                raise server
            else:
                found += [ok("store", server.name, "answers"), *_judge(server, deadline, topology)]
        if all(finding.check != "store" or finding.verdict == "ok" for finding in found):
            found.append(await _scripts(topology, url))
        return [*found, *await _shape(topology)]
    finally:
        await topology.aclose()


def _away(place: str, failure: BaseException) -> Finding:
    said = _said(failure)
    do = _do(said, "start it, or mend GATEWAY_REDIS_URL or the network")
    return error("store", place, f"the store {said}", "a store that answers", do)


def _said(failure: BaseException) -> str:
    """Why somebody does not do his work, as words that continue "the store …"."""
    return why(failure) or f"says: {str(failure).partition(chr(10))[0][:200]}"


def _do(said: str, otherwise: str) -> str:
    return next((do for words, do in _DO.items() if words in said), otherwise)


def _place(url: str) -> str:
    """Where a store is, without its password."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or parts.path


def _name(node: Node) -> str:
    return _place(node.url)


# — one server


async def _server(node: Node) -> Server:
    """Raises what redis-py raises where the server does not answer."""
    async with asyncio.timeout(_ASKED):
        info = await node.prompt.info()
    config = {}
    with suppress(*Failures):  # managed stores tell nobody
        async with asyncio.timeout(_ASKED):
            config = await node.prompt.config_get("appendfsync", "save")
    pings: list[float] = []
    until = time.monotonic() + _PINGS_FOR
    async with asyncio.timeout(_PINGS_FOR + _ASKED):
        while len(pings) < _PINGS and (not pings or time.monotonic() < until):
            began = time.perf_counter()
            await node.prompt.ping()
            pings.append(time.perf_counter() - began)
        skew = min([await _skew(node) for _ in range(5)])[1]
    return Server(_name(node), info, {_text(k): _text(v) for k, v in config.items()}, pings, skew)


async def _skew(node: Node) -> tuple[float, float]:
    """How long it took to ask for the time, and by how much it is ahead of ours."""
    before = time.time()
    seconds, micros = await node.prompt.time()
    after = time.time()
    return after - before, seconds + micros / 1e6 - (before + after) / 2


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _judge(server: Server, deadline: float, topology: Topology) -> list[Finding]:
    found = [judge(server) for judge in _JUDGES]
    if server.info.get("cluster_enabled") and not isinstance(topology, Cluster):
        do = "redis+cluster:// in GATEWAY_REDIS_URL: the other nodes would refuse what is theirs"
        said = "it is a node of a cluster, and asked as if it were alone"
        found.append(error("store.cluster", server.name, said, "redis+cluster:// before its address", do))
    return [*found, _latency(server, deadline), _replicas(server, several=isinstance(topology, Sentinels | Cluster))]


def _version(server: Server) -> Finding:
    valkey = server.info.get("valkey_version")
    told = str(valkey or server.info.get("redis_version", ""))
    parts = tuple(int(part) for part in told.split(".")[:2] if part.isdecimal())
    found, wanted = f"{'Valkey' if valkey else 'Redis'} {told or '?'}", "Valkey, or Redis 7.0 or newer"
    if parts >= _OLDEST:
        return ok("store.version", server.name, found)
    return error("store.version", server.name, found, wanted, "upgrade it: scripts and streams do not work there")


def _eviction(server: Server) -> Finding:
    policy = _text(server.info.get("maxmemory_policy", "noeviction"))
    verdict = graded(policy != "noeviction", 2, 1)
    do = "CONFIG SET maxmemory-policy noeviction, and in its configuration: a store that is full would forget limits"
    return judged(verdict, "store.eviction", server.name, f"maxmemory-policy {policy}", "noeviction", do)


def _persistence(server: Server) -> Finding:
    check, info, fsync = "store.persistence", server.info, server.config.get("appendfsync", "not told")
    if not info.get("aof_enabled"):
        snapshots = server.config.get("save", "not told") or "off"
        found, wanted = f"AOF off, snapshots {snapshots}", "appendonly yes, appendfsync everysec"
        do = "CONFIG SET appendonly yes, and in its configuration: else a restart forgets keys, counts and rows"
        return warning(check, server.name, found, wanted, do)
    if (status := _text(info.get("aof_last_write_status", "ok"))) != "ok":
        return error(
            check, server.name, f"AOF cannot be written ({status})", "a disk that takes it", "room on its disk"
        )
    found = f"AOF on, appendfsync {fsync}"
    if fsync == "no":
        do = "CONFIG SET appendfsync everysec: a machine that dies takes up to 30 s of rows along"
        return warning(check, server.name, found, "everysec, or always", do)
    return ok(check, server.name, found)


def _memory(server: Server) -> Finding:
    used, most = int(server.info.get("used_memory", 0)), int(server.info.get("maxmemory", 0))
    whole = most or int(server.info.get("total_system_memory", 0))
    share = used / whole if whole else 0.0
    of = "maxmemory" if most else "its machine, no maxmemory"
    found = f"{amount(used)} of {amount(whole)} ({of})"
    return judged(graded(share, *_FULL), "store.memory", server.name, found, f"below {_FULL[0]:.0%}", _ROOM)


def _connections(server: Server) -> Finding:
    used, most = int(server.info.get("connected_clients", 0)), int(server.info.get("maxclients", 0))
    share = used / most if most else 0.0
    do = "a larger maxclients: a worker has up to 16 connections to each server"
    found = f"{used:,} clients of {most:,}"
    return judged(graded(share, *_FULL), "store.connections", server.name, found, f"below {_FULL[0]:.0%}", do)


def _clock(server: Server) -> Finding:
    skew = server.skew
    told = f"{round(skew * 1000):+} ms" if abs(skew) < 10 else f"{round(skew):+,} s"
    do = "NTP on both: limits go by the store's clock, but expiry of keys and new prices by the gateway's"
    found, verdict = f"{told} against this machine", graded(abs(skew), *_SKEW)
    return judged(verdict, "store.clock", server.name, found, f"within {_SKEW[0]:.0f} s", do)


_JUDGES: Sequence[Callable[[Server], Finding]] = (_version, _eviction, _persistence, _memory, _connections, _clock)


def _latency(server: Server, deadline: float) -> Finding:
    """A request makes two trips, and waits for the deadline in both together."""
    cuts = quantiles(server.pings, n=100, method="inclusive") if len(server.pings) > 1 else [*server.pings * 99]
    p50, p99 = cuts[49], cuts[98]
    found = f"p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms of {len(server.pings)} pings"
    wanted = f"p50 below a quarter, p99 below a half of GATEWAY_STORE_DEADLINE ({deadline * 1000:.0f} ms)"
    verdict = graded(max(p50 / deadline, p99 / deadline / 2), 0.25, 0.75)
    do = "a store that is nearer or less busy, or a longer deadline: what is late is held by the worker's share"
    return judged(verdict, "store.latency", server.name, found, wanted, do)


def _replicas(server: Server, *, several: bool) -> Finding:
    count = int(server.info.get("connected_slaves", 0))
    states = [server.info.get(f"slave{number}", {}) for number in range(count)]
    lost = [state for state in states if isinstance(state, Mapping) and not _follows(state)]
    found = f"{count - len(lost)} of {count} replicas online" if count else "no replica"
    if lost or (several and not count):
        do = "start a replica: without one nobody takes over when this server dies"
        return warning("store.replicas", server.name, found, "a replica at least, and all of them online", do)
    return ok("store.replicas", server.name, found)


def _follows(replica: Mapping[str, Any]) -> bool:
    return replica.get("state", "online") == "online" and int(replica.get("lag", 0)) <= _SILENT


# — all of them


async def _scripts(topology: Topology, url: str) -> Finding:
    """Write to everybody who takes writes, as every gateway does."""
    client, text, failures = Client(topology), Script("probe").text, []
    for key in topology.probes():
        try:
            async with asyncio.timeout(_ASKED):
                await client.execute_command("EVAL", text, 1, key, _PROBE_KEPT_MS)
        except Failures as failure:
            failures.append(failure)
    if not failures:
        return ok("store.scripts", _place(url), "scripts run and write")
    said = _said(failures[0])
    do = _do(said, "what it says")
    return error("store.scripts", _place(url), f"the store {said}", "a script that writes", do)


async def _shape(topology: Topology) -> list[Finding]:
    if isinstance(topology, Sentinels):
        return await _sentinels(topology)
    return await _cluster(topology) if isinstance(topology, Cluster) and topology.primaries else []


async def _ask(node: Node, *words: str) -> Any:
    """The answer as the server gives it, or why there is none."""
    try:
        async with asyncio.timeout(_ASKED):
            return await node.send(words, {}, patient=False, asking=False)
    except Failures as failure:
        return failure


async def _sentinels(topology: Sentinels) -> list[Finding]:
    """Whether enough Sentinels answer to promote another primary."""
    nodes, service = topology.sentinels, topology.service
    said = await asyncio.gather(*(_ask(node, "SENTINEL", "CKQUORUM", service) for node in nodes))
    found = []
    for node, answer in zip(nodes, said, strict=True):
        if isinstance(answer, Failures):
            told = _said(answer)
            do = _do(told, "start it, or see what it says: while most of them disagree nobody is promoted")
            lost = f"the Sentinel {told}"
            found.append(warning("store.sentinels", _name(node), lost, "a Sentinel with a quorum", do))
    well = len(nodes) - len(found)
    told = f"{well} of {len(nodes)} in GATEWAY_REDIS_URL answer and have a quorum"
    if 2 * well <= len(nodes):
        do = "start them: while most are away a primary that dies is not replaced"
        return [error("store.sentinels", service, told, "most of them", do), *found]
    if len(nodes) < 3:
        do = "name three Sentinels or more, on three machines"
        return [warning("store.sentinels", service, told, "three or more", do), *found]
    return [ok("store.sentinels", service, told), *found]


async def _cluster(topology: Cluster) -> list[Finding]:
    """Whether the cluster says of itself that it is well, and how many may die."""
    primaries = topology.primaries
    said = await asyncio.gather(*(_ask(node, "CLUSTER", "INFO") for node in primaries))
    found, states = [], set()
    for node, answer in zip(primaries, said, strict=True):
        if not isinstance(answer, bytes | str):
            continue  # that it is away was told already, and what it may not say is not known
        state = _told(answer).get("cluster_state", "not told")
        states.add(state)
        if state != "ok":
            do = "CLUSTER NODES says who is missing: without all slots it takes no writes"
            found.append(error("store.cluster", _name(node), f"cluster_state {state}", "cluster_state ok", do))
    told = f"{len(primaries)} primaries"
    if len(primaries) < 3:
        do = "three primaries or more: with fewer no majority is left to promote a replica"
        found.append(warning("store.cluster", "cluster", told, "three or more", do))
    return found or [ok("store.cluster", "cluster", f"{told}, cluster_state {''.join(states) or 'not told'}")]


def _told(answer: bytes | str) -> dict[str, str]:
    """The lines `name:value` of an answer."""
    return dict(line.split(":", 1) for line in _text(answer).splitlines() if ":" in line)

"""What the doctor finds of stores: real ones where a test can have them, and what one said of itself where not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from gateway.embedded import _server_binary
from gateway.findings import Finding
from gateway.storecheck import _JUDGES, Server, _judge, _latency, _replicas, store_findings
from gateway.topology import Cluster, Sentinels, Topology
from tests.proving import stores
from tests.proving.chaos import Chaos
from tests.proving.stores import node

DEADLINE = 5.0  # lax: this machine's own delays are not what is found
MIB = 1 << 20
WELL: Mapping[str, Any] = {
    "redis_version": "7.2.4",
    "valkey_version": "9.1.2",
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "used_memory": 100 * MIB,
    "maxmemory": 1000 * MIB,
    "connected_clients": 50,
    "maxclients": 10_000,
}
PASSWORD = "of-the-tests"
SERVER = Server("one:6379", WELL, {"appendfsync": "everysec", "save": ""}, [0.0002] * 100, 0.001)


@pytest.fixture(scope="module")
def guarded() -> Iterator[int]:
    """The port of a server that wants a password."""
    with node(_server_binary(), requirepass=PASSWORD) as one:
        yield one.port


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def verdicts(findings: list[Finding]) -> dict[str, str]:
    """The verdicts of all that is not well."""
    return {finding.check: finding.verdict for finding in findings if finding.verdict != "ok"}


def judged(**said: Any) -> dict[str, Finding]:
    server = replace(SERVER, info={**WELL, **said})
    return by_check([judge(server) for judge in _JUDGES])


# — what a server says of itself


def test_a_server_as_it_should_be_is_well_and_nothing_is_to_be_done() -> None:
    found = judged()
    assert [(one.verdict, one.do) for one in found.values()] == [("ok", "")] * 6
    assert found["store.version"].found == "Valkey 9.1.2"
    assert found["store.persistence"].found == "AOF on, appendfsync everysec"
    assert found["store.memory"].found == "100 MiB of 1000 MiB (maxmemory)"


@pytest.mark.parametrize(
    ("said", "check", "verdict", "found"),
    [
        ({"valkey_version": None, "redis_version": "7.0.15"}, "store.version", "ok", "Redis 7.0.15"),
        ({"valkey_version": None, "redis_version": "6.2.14"}, "store.version", "error", "Redis 6.2.14"),
        ({"valkey_version": None, "redis_version": ""}, "store.version", "error", "Redis ?"),
        ({"maxmemory_policy": "allkeys-lru"}, "store.eviction", "error", "maxmemory-policy allkeys-lru"),
        ({"aof_enabled": 0}, "store.persistence", "warning", "AOF off, snapshots off"),
        ({"aof_last_write_status": "err"}, "store.persistence", "error", "AOF cannot be written (err)"),
        ({"used_memory": 740 * MIB}, "store.memory", "ok", "740 MiB of 1000 MiB (maxmemory)"),
        ({"used_memory": 760 * MIB}, "store.memory", "warning", "760 MiB of 1000 MiB (maxmemory)"),
        ({"used_memory": 950 * MIB}, "store.memory", "error", "950 MiB of 1000 MiB (maxmemory)"),
        (
            {"maxmemory": 0, "total_system_memory": 110 * MIB},
            "store.memory",
            "error",
            "100 MiB of 110 MiB (its machine, no maxmemory)",
        ),
        ({"connected_clients": 9_500}, "store.connections", "error", "9,500 clients of 10,000"),
    ],
)
def test_each_thing_that_a_server_says_is_judged(said: dict[str, Any], check: str, verdict: str, found: str) -> None:
    one = judged(**said)[check]
    assert (one.verdict, one.found) == (verdict, found)
    assert (bool(one.expected), bool(one.do)) == (verdict != "ok",) * 2


def test_a_log_that_is_never_synced_is_told() -> None:
    server = replace(SERVER, config={"appendfsync": "no"})
    (found,) = [one for judge in _JUDGES if (one := judge(server)).verdict != "ok"]
    assert (found.check, found.verdict, found.found) == ("store.persistence", "warning", "AOF on, appendfsync no")


@pytest.mark.parametrize(
    ("skew", "verdict", "told"),
    [
        (-0.0001, "ok", "+0 ms"),
        (0.9, "ok", "+900 ms"),
        (1.1, "warning", "+1100 ms"),
        (-299.0, "warning", "-299 s"),
        (-3600.0, "error", "-3,600 s"),
    ],
)
def test_clocks_that_differ_are_told_and_by_minutes_they_are_an_error(skew: float, verdict: str, told: str) -> None:
    found = by_check([judge(replace(SERVER, skew=skew)) for judge in _JUDGES])["store.clock"]
    assert (found.verdict, found.found) == (verdict, f"{told} against this machine")


@pytest.mark.parametrize(
    ("pings", "verdict"),
    [
        ([0.001] * 100, "ok"),
        ([0.001] * 90 + [0.03] * 10, "warning"),  # p99 beyond a half of the deadline
        ([0.02] * 100, "warning"),  # p50 beyond a quarter
        ([0.04] * 100, "error"),
        ([0.3], "error"),
    ],
)
def test_a_slow_store_is_judged_by_what_a_request_waits_for_it(pings: list[float], verdict: str) -> None:
    found = _latency(replace(SERVER, pings=pings), 0.05)
    assert found.verdict == verdict
    assert f"of {len(pings)} pings" in found.found


@pytest.mark.parametrize(
    ("said", "several", "verdict", "found"),
    [
        ({}, False, "ok", "no replica"),
        ({}, True, "warning", "no replica"),
        ({"connected_slaves": 1, "slave0": {"state": "online"}}, True, "ok", "1 of 1 replicas online"),
        ({"connected_slaves": 1, "slave0": {"state": "wait_bgsave"}}, False, "warning", "0 of 1 replicas online"),
        ({"connected_slaves": 1, "slave0": {"state": "online", "lag": 2}}, True, "ok", "1 of 1 replicas online"),
        ({"connected_slaves": 1, "slave0": {"state": "online", "lag": 60}}, True, "warning", "0 of 1 replicas online"),
    ],
)
def test_replicas_are_wanted_where_somebody_would_promote_them(
    said: dict[str, Any], several: bool, verdict: str, found: str
) -> None:
    one = _replicas(replace(SERVER, info={**WELL, **said}), several=several)
    assert (one.verdict, one.found) == (verdict, found)


@pytest.mark.parametrize("kind", [Topology, Sentinels])
def test_a_node_of_a_cluster_that_is_asked_as_if_it_were_alone_is_an_error(kind: type[Topology]) -> None:
    """The probe may be its own by chance, and most organisations are not."""
    server = replace(SERVER, info={**WELL, "cluster_enabled": 1})
    alone = by_check(_judge(server, DEADLINE, object.__new__(kind)))["store.cluster"]
    assert (alone.verdict, alone.expected) == ("error", "redis+cluster:// before its address")
    assert "store.cluster" not in by_check(_judge(server, DEADLINE, object.__new__(Cluster)))
    assert "store.cluster" not in by_check(_judge(SERVER, DEADLINE, object.__new__(kind)))


# — real ones


async def test_a_real_store_is_asked_and_only_its_missing_log_is_a_warning(either_store_url: str) -> None:
    """Valkey and Redis say the same things of themselves."""
    found = by_check(await store_findings(either_store_url, DEADLINE))
    assert verdicts(list(found.values())) == {"store.persistence": "warning"}
    assert set(found) == {
        *("store", "store.version", "store.eviction", "store.persistence", "store.memory", "store.connections"),
        *("store.clock", "store.latency", "store.replicas", "store.scripts"),
    }
    assert "of 100 pings" in found["store.latency"].found


async def test_a_store_that_forgets_or_takes_no_writes_is_an_error() -> None:
    with node(_server_binary(), maxmemory_policy="allkeys-lru", appendonly="yes", min_replicas_to_write="1") as one:
        found = await store_findings(one.url, DEADLINE)
        assert verdicts(found) == {"store.eviction": "error", "store.scripts": "error"}
        assert "too few replicas" in by_check(found)["store.scripts"].found


async def test_a_store_that_is_not_there_is_one_finding_and_its_password_is_none() -> None:
    found = await store_findings("redis://:of-the-tests@127.0.0.1:1", DEADLINE)
    assert [(one.check, one.of, one.verdict, one.found) for one in found] == [
        ("store", "127.0.0.1:1", "error", "the store refuses the connection")
    ]
    assert "of-the-tests" not in repr(found)


@pytest.mark.parametrize(
    ("address", "found", "do"),
    [
        ("redis://127.0.0.1:{port}", "the store wants a password", "the user and the password in GATEWAY_REDIS_URL"),
        ("redis://:of-the-tests-too@127.0.0.1:{port}", "the store refuses the password", "the user and the password"),
        ("redis://:of-the-tests@127.0.0.1:{port}/99", "the store has no database of that number", "the database at"),
        (
            "redis+cluster://:of-the-tests@127.0.0.1:{port}",
            "the store is no cluster, expected redis:// before its address",
            "GATEWAY_REDIS_URL: its beginning",
        ),
        (
            "redis+sentinel://:of-the-tests@127.0.0.1:{port}/limits",
            "the store is no Sentinel, expected redis:// before its address",
            "GATEWAY_REDIS_URL: its beginning",
        ),
        ("redis://no-such-host.invalid", "the store has a name that does not resolve", "DNS"),
    ],
)
async def test_what_to_do_goes_by_why_a_store_does_not_do_its_work(
    guarded: int, address: str, found: str, do: str
) -> None:
    one = (await store_findings(address.format(port=guarded), DEADLINE))[0]
    assert (one.check, one.verdict, one.found, one.do[: len(do)]) == ("store", "error", found, do)
    assert PASSWORD not in repr(one)


async def test_what_to_do_about_a_store_that_is_full_is_room() -> None:
    with node(_server_binary(), maxmemory="1mb") as one:
        found = by_check(await store_findings(one.url, DEADLINE))
    assert (found["store.scripts"].found, found["store.memory"].verdict) == ("the store is full (maxmemory)", "error")
    assert found["store.scripts"].do == found["store.memory"].do


async def test_a_store_that_falls_silent_is_told_soon(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.storecheck._ASKED", 0.3)
    with node(_server_binary()) as one:
        one.stop()
        (found,) = await store_findings(one.url, DEADLINE)
        one.go_on()
    assert (found.verdict, found.found) == ("error", "the store does not answer")


async def test_the_distance_of_a_store_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.storecheck._PINGS_FOR", 0.3)
    with node(_server_binary(), appendonly="yes") as one:
        async with Chaos(one.url) as chaos:
            chaos.down.delay = 0.06
            found = by_check(await store_findings(chaos.url, 0.05))
    assert found["store.latency"].verdict == "error"
    assert found["store.scripts"].verdict == "ok"


async def test_what_a_user_may_not_ask_is_not_known_and_the_rest_is() -> None:
    with node(_server_binary()) as one:
        one.ask("ACL", "SETUSER", "gw", "on", ">secret", "~*", "+@all", "-@dangerous", "+info", "+role")
        found = by_check(await store_findings(one.url.replace("//", "//gw:secret@"), DEADLINE))
    assert found["store.persistence"].found == "AOF off, snapshots not told"
    assert verdicts(list(found.values())) == {"store.persistence": "warning"}


# — several


async def test_sentinels_are_well_with_a_quorum_and_an_error_without() -> None:
    with stores.watched(_server_binary()) as watched:
        found = await store_findings(watched.url, DEADLINE)
        assert verdicts(found) == {"store.persistence": "warning"}
        assert by_check(found)["store.sentinels"].found == "3 of 3 in GATEWAY_REDIS_URL answer and have a quorum"
        assert by_check(found)["store.replicas"].found == "2 of 2 replicas online"

        other = await store_findings(watched.url.replace(stores.SERVICE, "other"), DEADLINE)
        assert other[0].found == 'the store has no primary "other" that a Sentinel knows'
        to_do = [one.do for one in other if one.check == "store" or one.verdict == "warning"]
        assert to_do == ["the name at the end of GATEWAY_REDIS_URL, as `sentinel monitor` has it"] * 4

        alone = f"redis+sentinel://127.0.0.1:{watched.sentinels[0].port}/{stores.SERVICE}"
        assert verdicts(await store_findings(alone, DEADLINE))["store.sentinels"] == "warning"

        for sentinel in watched.sentinels[1:]:
            sentinel.kill()
        found = await store_findings(watched.url, DEADLINE)
        told = [(one.verdict, one.of) for one in found if one.check == "store.sentinels"]
        assert told[0] == ("error", stores.SERVICE)
        assert sorted(told[1:])[-2:] == sorted(("warning", f"127.0.0.1:{s.port}") for s in watched.sentinels[1:])

        for server in watched.servers:
            server.kill()
        found = await store_findings(watched.url, DEADLINE)
        assert (found[0].check, found[0].verdict) == ("store", "error")


async def test_a_cluster_is_asked_server_by_server() -> None:
    with stores.cluster(_server_binary()) as cluster:
        found = await store_findings(cluster.url, DEADLINE)
        assert verdicts(found) == {"store.persistence": "warning"}
        assert {one.of for one in found if one.check == "store.version"} == {
            f"127.0.0.1:{one.port}" for one in cluster.nodes[:3]
        }
        assert by_check(found)["store.cluster"].found == "3 primaries, cluster_state ok"

        for one in (cluster.nodes[2], cluster.nodes[5]):
            one.kill()
        asked = cluster.nodes[0]
        stores.until(lambda: "cluster_state:fail" in asked.ask("CLUSTER", "INFO"))
        bad = verdicts(await store_findings(cluster.url, DEADLINE))
        assert (bad["store"], bad["store.cluster"]) == ("error", "error")

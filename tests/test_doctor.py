"""The doctor as a whole: everything is looked at, what hangs keeps nobody waiting, and what is wrong ends with 1."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import yaml

from gateway.doctor import beside, examine, exports_of, show
from gateway.embedded import Embedded
from gateway.exports import ExportStanding
from gateway.findings import Finding, Verdict, amount, warning, worst
from gateway.findings import ok as ok_
from gateway.keys import KeyRing
from gateway.language import JsonLinesExport
from gateway.settings import Settings
from gateway.store import Store
from tests.proving.backend import Backend, Peer, ok
from tests.proving.commands import Place
from tests.proving.house import DOCUMENTS, documents

CHECKS = {
    *("policies", "store", "store.version", "store.eviction", "store.persistence", "store.memory"),
    *("store.connections", "store.clock", "store.latency", "store.replicas", "store.scripts", "keys"),
    *("upstream.connect", "upstream.answer", "host.files", "host.memory", "host.disk", "host.fsync", "host.port"),
    "traces",
}


def settings(folder: Path, url: str, policies: dict[str, Any], **given: Any) -> Settings:
    (folder / "policies").mkdir(exist_ok=True)
    (folder / "policies" / "all.yaml").write_text(yaml.safe_dump(policies))
    ours = {"policies": folder / "policies", "state": folder / "state", "redis_url": url, "port": 0}
    return Settings.read({}, **{**ours, "key_pepper": "of the tests", "store_deadline": 5.0, **given})


def of(findings: list[Finding], check: str) -> list[tuple[Verdict, str]]:
    return [(one.verdict, one.found) for one in findings if one.check == check]


async def test_everything_is_looked_at(tmp_path: Path, store_url: str) -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend:
        findings = await examine(settings(tmp_path, store_url, documents([backend.url])))
    assert {one.check for one in findings} == CHECKS
    assert worst(one for one in findings if one.check not in ("host.port", "store.persistence")) == "ok"
    assert of(findings, "policies")[0][1].endswith("1 models, 1 pools, 2 teams")
    assert of(findings, "keys") == [("ok", "none was made yet")]


async def test_nothing_is_written_into_a_store_but_its_probe(tmp_path: Path, store_url: str) -> None:
    await examine(settings(tmp_path, store_url, DOCUMENTS | {"models": {}}))
    store = Store(store_url, deadline=5)
    assert {key async for key in store.client.scan_iter()} == {b"{gateway}:probe"}
    await store.aclose()
    assert not (tmp_path / "state").exists()


async def test_keys_of_another_pepper_are_an_error(tmp_path: Path, store_url: str) -> None:
    store = Store(store_url, deadline=5)
    ring = KeyRing(store, b"of the tests")
    await ring.load()
    made, _ = await ring.create("research", user=None, name=None, models=(), expires=None)
    await ring.create("research", user=None, name=None, models=(), expires=None)
    await ring.revoke(made.id)
    await store.aclose()
    policies = DOCUMENTS | {"models": {}}
    assert of(await examine(settings(tmp_path, store_url, policies)), "keys") == [("ok", "1 in force of 2")]
    ((verdict, found),) = of(await examine(settings(tmp_path, store_url, policies, key_pepper="another")), "keys")
    assert (verdict, found) == ("error", "its keys were made under another pepper")


async def test_a_pepper_that_is_not_here_is_told_and_none_is_made(tmp_path: Path, store_url: str) -> None:
    store = Store(store_url, deadline=5)
    await KeyRing(store, b"of the tests").load()
    await store.aclose()
    asked = settings(tmp_path, store_url, DOCUMENTS | {"models": {}}, key_pepper="")
    state = tmp_path / "state"
    told = f"it has keys, and there is neither GATEWAY_KEY_PEPPER nor {state}/pepper"
    assert of(await examine(asked), "keys") == [("error", told)]
    assert not state.exists()

    state.mkdir()
    (state / "pepper").write_text("of the tests\n")
    assert of(await examine(asked), "keys") == [("ok", "0 in force of 0")]

    (state / "pepper").unlink()
    (state / "pepper").mkdir()
    assert of(await examine(asked), "keys") == [("error", f"{state}/pepper cannot be read: is a directory")]


async def test_without_policies_and_without_a_store_the_rest_is_looked_at(tmp_path: Path) -> None:
    findings = await examine(settings(tmp_path, "redis://127.0.0.1:1", {"teams": [], "plans": []}))
    assert of(findings, "policies") == [
        ("error", "all.yaml:1 plans: is a list, expected names, each with its members"),
        ("error", "all.yaml:2 teams: is a list, expected names, each with its members"),
    ]
    assert of(findings, "store") == [("error", "the store refuses the connection")]
    assert {one.check for one in findings if one.check.startswith("host.")} == {c for c in CHECKS if "host." in c}


async def test_a_store_of_our_own_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    findings = await examine(settings(tmp_path, "", DOCUMENTS | {"models": {}}, redis_url=None))
    ((verdict, found),) = of(findings, "store")
    assert (verdict, found.startswith("the embedded Valkey cannot be started")) == ("error", True)
    assert of(findings, "host.disk") == [("error", "cannot be written: Not a directory")]


async def test_an_embedded_store_that_hangs_is_told_soon(tmp_path: Path) -> None:
    """The commands that need it wait for half a minute: it may have been shut down a moment ago."""
    with Embedded(tmp_path / "state") as embedded:
        with redis.Redis(unix_socket_path=embedded.url.removeprefix("unix://")) as client:
            process = int(client.info("server")["process_id"])
        os.kill(process, signal.SIGSTOP)
        try:
            began = time.monotonic()
            findings = await examine(settings(tmp_path, "", DOCUMENTS | {"models": {}}, redis_url=None))
            took = time.monotonic() - began
        finally:
            os.kill(process, signal.SIGCONT)
    state = tmp_path / "state"
    assert of(findings, "store") == [("error", f"the embedded Valkey of {state} is there and does not answer")]
    assert took < 15


async def test_one_that_serves_alone_needs_no_port_of_a_control_plane(tmp_path: Path, store_url: str) -> None:
    for workers, ports in ((1, 2), (0, 1)):
        asked = settings(tmp_path, store_url, DOCUMENTS | {"models": {}}, workers=workers)
        assert len(of(await examine(asked), "host.port")) == ports


async def test_what_hangs_is_told_and_keeps_nobody_waiting(tmp_path: Path, store_url: str) -> None:
    """A store that takes connections and says nothing, and an upstream of the same kind."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"127.0.0.1:{hole.getsockname()[1]}"
        policies = documents([f"http://{address}"])
        began = time.monotonic()
        findings = await examine(settings(tmp_path, f"redis://{address}", policies), deadline=0.5)
        assert time.monotonic() - began < 4
    assert of(findings, "store") == [("error", "no result within 0.5 s")]
    assert of(findings, "upstream.answer") == [("error", "no result within 0.5 s")]
    assert of(findings, "host.disk")[0][0] == "ok"


async def test_a_folder_of_policies_that_hangs_is_told(tmp_path: Path, store_url: str) -> None:
    """As one does on a network that is away: a pipe that nobody writes."""
    asked = settings(tmp_path, store_url, DOCUMENTS)
    (tmp_path / "policies" / "all.yaml").unlink()
    os.mkfifo(tmp_path / "policies" / "all.yaml")
    findings = await examine(asked, deadline=0.5)
    assert of(findings, "policies") == [("error", "not read within 0.5 s")]
    assert of(findings, "store") == [("ok", "answers")]
    os.close(os.open(tmp_path / "policies" / "all.yaml", os.O_WRONLY))  # whoever reads it may go


async def test_what_is_drained_by_command_may_be_broken(tmp_path: Path, store_url: str) -> None:
    store = Store(store_url, deadline=5)
    await store.client.sadd("{gateway}:drained", "demo/127.0.0.1:1")
    await store.aclose()
    findings = await examine(settings(tmp_path, store_url, documents(["http://127.0.0.1:1"])))
    assert of(findings, "upstream.connect") == [("warning", "it refuses the connection (it is drained)")]


# — a thread that nobody waits for


async def test_what_blocks_beside_gives_its_result_its_failure_and_its_place() -> None:
    def fail() -> None:
        raise LookupError("of the test")

    assert await beside(lambda: 7) == 7
    with pytest.raises(LookupError, match="of the test"):
        await beside(fail)
    let_go = threading.Event()
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await beside(let_go.wait)
        left = [thread for thread in threading.enumerate() if thread.daemon and thread.name.endswith("(run)")]
        assert len(left) == 1
    finally:
        let_go.set()
    left[0].join(5)
    assert not left[0].is_alive()


# — exports


NOW = 1_800_000_000.0
KNOWN = {"files": JsonLinesExport(to="jsonl", folder="/of/the/tests")}


def standing(**given: Any) -> ExportStanding:
    known: dict[str, Any] = {"export": "files", "organisation": "acme", "lag": 0, "exact": True}
    return ExportStanding(**{**known, "pending": 0, "oldest_ms": None, "dead": 0, **given})


@pytest.mark.parametrize(
    ("given", "verdict", "do"),
    [
        ({}, "ok", ""),
        ({"lag": 5, "oldest_ms": int((NOW - 3500) * 1000)}, "ok", ""),
        ({"lag": 5, "oldest_ms": int((NOW - 3700) * 1000)}, "warning", "gateway export files has to run"),
        ({"dead": 1}, "warning", "gateway exports dead files"),
        ({"export": "gone"}, "warning", "gateway exports forget gone"),
    ],
)
def test_an_export_that_is_behind_or_unknown_is_told(given: dict[str, Any], verdict: str, do: str) -> None:
    one = exports_of(KNOWN, [standing(**given)], NOW)[0]
    assert (one.verdict, one.do[: len(do)] if do else one.do) == (verdict, do)


def test_an_export_that_has_no_row_yet_is_well() -> None:
    assert [(one.verdict, one.of, one.found) for one in exports_of(KNOWN, [], NOW)] == [("ok", "files", "no row yet")]


# — findings


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (100 << 20, "100 MiB"), (1 << 60, "1048576 TiB")],
)
def test_bytes_are_told_as_people_read_them(size: int, told: str) -> None:
    assert amount(size) == told


# — the command


def test_the_command_tells_programs_everything_and_ends_with_1_where_something_is_wrong(tmp_path: Path) -> None:
    """With a store that it starts and stops itself, and an upstream that is not there."""
    done = Place(tmp_path).run("doctor", "--json", GATEWAY_PORT="0")
    said = json.loads(done.stdout)
    findings = msgspec.convert(said["findings"], list[Finding])
    assert (done.returncode, done.stderr, said["verdict"]) == (1, "", "error")
    assert [one.check for one in findings if one.verdict == "error" and one.check != "host.port"] == [
        "upstream.connect"
    ]
    assert of(findings, "store.persistence") == [("ok", "AOF on, appendfsync everysec")]
    assert not (tmp_path / ".gateway" / "valkey.sock").exists()


def test_people_get_a_table_and_below_it_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        [ok_("store", "one:6379", "answers"), warning("store.memory", "one:6379", "9 of 10", "below 7", "a larger one")]
    )
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["verdict", "check", "of", "found"]
    assert [row.split() for row in rows[:2]] == [
        ["ok", "store", "one:6379", "answers"],
        ["warning", "store.memory", "one:6379", "9", "of", "10"],
    ]
    assert rows[2:] == [
        "",
        "warning: store.memory of one:6379: 9 of 10; expected below 7",
        "  do: a larger one",
        "",
        "2 findings, 0 errors, 1 warnings",
    ]

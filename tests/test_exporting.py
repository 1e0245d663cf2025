"""The commands that carry the ledger elsewhere: real stores, real files, processes that are really ended."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import redis

from gateway.records import UsageRecord, dead_letters, ledger_stream
from tests.proving import entries
from tests.proving.commands import Place
from tests.proving.house import DOCUMENTS
from tests.proving.rows import record
from tests.proving.stores import until


def write(client: redis.Redis, records: Iterable[UsageRecord]) -> list[str]:
    """Rows that are old enough to be delivered at once."""
    return entries.write(client, records, time.time_ns() // 1_000_000 - 10_000)


class Exports(Place):
    """A place with one export, and a store that a test fills."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url
        self.client = redis.Redis.from_url(url)
        self.files = folder / "exported"
        self.exports({"archive": {"to": "jsonl", "folder": str(self.files)}})

    def exports(self, exports: dict[str, Any]) -> None:
        pools = {"demo": {"upstreams": [{"url": f"http://127.0.0.1:{self.port}"}]}}
        self.write({**DOCUMENTS, "pools": pools, "exports": exports})

    def environment(self, **given: str) -> dict[str, str]:
        return super().environment(**{"GATEWAY_REDIS_URL": self.url, **given})

    def exported(self) -> list[str]:
        """The ids of the rows in the files, in their order."""
        files = sorted(file for file in self.files.glob("**/*") if file.is_file()) if self.files.exists() else []
        lines = [line for file in files for line in file.read_text().splitlines() if line.startswith("{")]
        return [json.loads(line)["id"] for line in lines]

    def bury(self, entry: str) -> None:
        """An entry as it is among the dead letters, acknowledged in its group."""
        ((_, fields),) = self.client.xrange(ledger_stream("acme"), entry, entry)  # type: ignore[misc]
        given: dict[Any, Any] = {"row": fields[b"row"], "error": "no such column", "entry": entry}  # type: ignore[index]
        self.client.xadd(dead_letters("acme", "archive"), given)


@pytest.fixture
def place(tmp_path: Path, store_url: str) -> Exports:
    return Exports(tmp_path, store_url)


def test_an_export_once_delivers_what_is_there_and_ends(place: Exports) -> None:
    write(place.client, [record(number) for number in range(250)])
    write(place.client, [record(250, organisation="other")])
    assert [row["lag"] for row in place.json("exports", "list")] == []
    assert place.run("exports", "list").stdout.split()[6:] == ["archive", "jsonl", "-", "-", "-", "-"]

    done = place.run("export", "archive", "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(place.exported()) == sorted(f"request-{number}" for number in range(251))
    first, second = place.json("exports", "list")
    assert (first["export"], first["organisation"], second["organisation"]) == ("archive", "acme", "other")
    assert [(one["lag"], one["pending"], one["dead"]) for one in (first, second)] == [(0, 0, 0)] * 2

    write(place.client, [record(300)])
    rows = [line.split() for line in place.run("exports", "list").stdout.splitlines()]
    assert rows == [
        ["export", "to", "organisation", "lag", "pending", "dead"],
        ["archive", "jsonl", "acme", "1", "0", "0"],
        ["archive", "jsonl", "other", "0", "0", "0"],
    ]
    assert place.run("export", "archive", "--once").returncode == 0
    assert place.exported()[-1] == "request-300"
    assert len(place.exported()) == 252, "nothing twice"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_goes_on_until_it_is_ended(place: Exports, number: int) -> None:
    write(place.client, [record(0)])
    with place.running("export", "archive") as running:
        until(lambda: len(place.exported()) == 1)
        write(place.client, [record(1)])
        until(lambda: len(place.exported()) == 2)
        assert running.end(number) == 0
    assert not any("Traceback" in line for line in running.said)
    (standing,) = place.json("exports", "list")
    assert (standing["lag"], standing["pending"]) == (0, 0)


def test_two_of_one_export_share_the_work_under_names_of_their_own(place: Exports) -> None:
    write(place.client, [record(0)])
    with place.running("export", "archive") as one, place.running("export", "archive") as other:

        def names() -> list[str]:
            consumers: Any = place.client.xinfo_consumers(ledger_stream("acme"), "archive")
            return [consumer["name"].decode() for consumer in consumers]

        until(lambda: bool(place.client.exists(ledger_stream("acme"))) and len(names()) == 2)
        assert {name.rpartition("-")[2] for name in names()} == {"0", "1"}
        assert (one.end(), other.end()) == (0, 0)
    assert place.run("export", "archive", "--once").returncode == 0
    assert len(names()) == 2, "whoever comes next has a name that is free"


class Picky(BaseHTTPRequestHandler):
    """A receiver that takes no batch in which a certain event is."""

    def do_POST(self) -> None:  # as http.server calls it
        events = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(400 if "request-1" in [event["id"] for event in events] else 204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def picky() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Picky) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        serving.join()


def test_an_export_once_says_how_many_rows_were_refused_and_leaves_them_for_later(place: Exports, picky: str) -> None:
    place.exports({"archive": {"to": "cloudevents", "url": picky, "attempts": 2}})
    write(place.client, [record(number) for number in range(3)])
    told = "export archive: 1 rows were refused, expected none; each is tried 2 times, once by a run, before it is a"
    for pending, dead in ((1, 0), (0, 1)):
        done = place.run("export", "archive", "--once")
        assert (done.returncode, done.stderr) == (1, f"gateway: {told} dead letter\n")
        (standing,) = place.json("exports", "list")
        assert (standing["lag"], standing["pending"], standing["dead"]) == (0, pending, dead)
    assert place.run("export", "archive", "--once").returncode == 0


def test_dead_letters_are_listed_and_revived(place: Exports) -> None:
    entries = write(place.client, [record(number) for number in range(2)])
    assert place.run("export", "archive", "--once").returncode == 0
    place.bury(entries[0])
    (letter,) = place.json("exports", "dead", "archive")
    assert (letter["organisation"], letter["entry"], letter["error"]) == ("acme", entries[0], "no such column")
    assert json.loads(letter["row"])["id"] == "request-0"
    rows = [line.split() for line in place.run("exports", "dead", "archive").stdout.splitlines()]
    assert rows == [["organisation", "entry", "error"], ["acme", entries[0], "no", "such", "column"]]
    assert place.json("exports", "list")[0]["dead"] == 1

    assert place.run("exports", "revive", "archive").stdout == "1 rows are to be delivered by archive again\n"
    assert place.run("export", "archive", "--once").returncode == 0
    assert place.exported().count("request-0") == 2
    assert place.json("exports", "list")[0]["dead"] == 0


def test_an_export_is_forgotten_once_it_is_out_of_the_policies(place: Exports) -> None:
    write(place.client, [record(0), record(1, organisation="other")])
    assert place.run("export", "archive", "--once").returncode == 0
    refused = place.run("exports", "forget", "archive")
    assert (refused.returncode, refused.stderr) == (
        1,
        'gateway: "archive" is in policies/, expected an export that is not there any more\n',
    )
    place.exports({})
    assert "not in the policies" in place.run("exports", "list").stdout
    assert place.run("exports", "forget", "archive").stdout == "export archive is forgotten in 2 ledgers\n"
    assert place.json("exports", "list") == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "archiv"], '"archiv" is no export of policies/, expected one of archive'),
        (["exports", "forget", "archiv"], '"archiv" has delivered nothing yet, expected one of (none)'),
        (["exports", "dead", "archiv"], '"archiv" has delivered nothing yet, expected one of (none)'),
        (["exports", "revive", "archiv"], '"archiv" has delivered nothing yet, expected one of (none)'),
    ],
)
def test_an_export_that_is_not_there_is_told(place: Exports, words: list[str], told: str) -> None:
    done = place.run(*words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"gateway: {told}\n")


def test_what_an_export_lacks_is_told(place: Exports) -> None:
    events = {"to": "cloudevents", "url": "https://127.0.0.1:1/", "token_env": "NO_SUCH_TOKEN"}
    place.exports({"billing": events})
    done = place.run("export", "billing")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("gateway: export billing: ")
    assert "NO_SUCH_TOKEN" in done.stderr


def test_a_store_that_is_not_there_is_told(place: Exports) -> None:
    done = place.run("exports", "list", GATEWAY_REDIS_URL="unix:///nowhere/at/all")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "gateway: the store of keys and limits has no socket there\n"

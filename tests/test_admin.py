"""The control plane over real sockets, on real stores: who may ask, what is answered, and what is not understood."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import redis
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway import admin
from gateway.identity import stored_user
from gateway.pipes import Crew, State, Told, Worker
from gateway.records import COUNTERS, DIMENSIONS, dead_letters, ledger_stream, sums_key
from gateway.settings import Settings
from tests.proving import house
from tests.proving.commands import Place
from tests.proving.entries import write
from tests.proving.rows import record

KEY = "the-key-of-the-tests"
YESTERDAY = datetime.now(UTC).replace(hour=10, minute=0, second=0, microsecond=0) - timedelta(days=1)


class Desk:
    """A served control plane, the store behind it, and its folder."""

    def __init__(self, url: str, client: redis.Redis, folder: Path) -> None:
        self.url = url
        self.client = client
        self.folder = folder

    def row(self, number: int = 0, *, hours: int = 0, **given: Any) -> None:
        at = YESTERDAY + timedelta(hours=hours)
        write(self.client, [record(number, **given)], int(at.timestamp() * 1000))

    async def get(self, path: str, key: str | None = KEY, **headers: str) -> httpx.Response:
        return await self.ask("GET", path, key=key, headers=headers)

    async def ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        key: str | None = KEY,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        headers = dict(headers or {})
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, verify=False, timeout=20) as client:
            return await client.request(method, path, headers=headers, content=content)

    def policies(self, documents: Mapping[str, Any]) -> None:
        """Write the policies that the control plane reads."""
        (self.folder / "policies").mkdir(exist_ok=True)
        (self.folder / "policies" / "all.yaml").write_text(yaml.safe_dump(dict(documents), sort_keys=False))

    async def data(self, path: str) -> list[dict[str, Any]]:
        answer = await self.get(path)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        told = answer.json()
        assert told["object"] == "list"
        found: list[dict[str, Any]] = told["data"]
        return found

    async def figures(self) -> dict[tuple[str, ...], float]:
        """Every sample: its name and the values of its labels, and its value."""
        answer = await self.get("/metrics", key=None)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        return {
            (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }


class Overseen(admin.Supervised):
    """Workers in these states, and whoever is asked to have them reload."""

    def __init__(self, states: Mapping[str, int], reload: Callable[[], Awaitable[None]] | None = None) -> None:
        workers = [name for name, count in states.items() if name != "stopping" for _ in range(count)]
        crew = tuple(Worker(1, Told(cast(State, name)), 2, False) for name in workers)
        self.crew = Crew(crew, "stopping" in states)
        self._reload = reload

    async def ask_reload(self) -> None:
        assert self._reload is not None
        await self._reload()


@asynccontextmanager
async def opened(
    store_url: str,
    folder: Path,
    *,
    supervised: admin.Supervised | None = None,
    **given: Any,
) -> AsyncIterator[Desk]:
    ours = {"state": folder, "policies": folder / "policies", "key_pepper": "of the tests", "admin_key": KEY}
    settings = Settings.read({}, **{**ours, **given})
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(admin.opened(settings, store_url, supervised=supervised))
        url = await stack.enter_async_context(house.served(app))
        yield Desk(url, redis.Redis.from_url(store_url), folder)


@pytest.fixture
async def desk(store_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened(store_url, tmp_path) as found:
        yield found


# — who may ask


@pytest.mark.parametrize("path", ["/admin/v1/usage", "/admin/v1/exports", "/admin/v1/usage?unknown=1"])
async def test_nobody_asks_without_the_key(desk: Desk, path: str) -> None:
    for headers in ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer"}):
        answer = await desk.get(path, key=None, **headers)
        assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer")
    for key in (KEY + "x", KEY[:-1], KEY.upper()):
        answer = await desk.get(path, key=key)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"], told["type"]) == (401, "invalid_api_key", "invalid_request_error")
        assert KEY not in answer.text
    missing = (await desk.get(path, key=None)).json()["error"]["message"]
    assert missing == "no admin key: send it as 'Authorization: Bearer …'"


async def test_figures_and_health_are_for_everybody(desk: Desk) -> None:
    for path in ("/metrics", "/healthz/live"):
        assert (await desk.get(path, key=None)).status_code == 200
    assert (await desk.get("/healthz/live", key=None)).json() == {"status": "alive"}


async def test_a_problem_document_is_for_who_prefers_it(desk: Desk) -> None:
    answer = await desk.get("/admin/v1/usage", key=None, accept="application/problem+json")
    assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")
    assert answer.json()["status"] == 401


async def test_the_key_is_made_once_and_for_us_alone(store_url: str, tmp_path: Path) -> None:
    keys = set()
    for _ in range(2):
        async with opened(store_url, tmp_path, admin_key="") as desk:
            key = (tmp_path / "admin_key").read_text()
            keys.add(key)
            assert (await desk.get("/admin/v1/exports", key=key)).status_code == 200
            assert (await desk.get("/admin/v1/exports")).status_code == 401
    assert len(keys) == 1
    assert len(key) == 64
    assert stat.S_IMODE((tmp_path / "admin_key").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["admin_key"], "no draft is left"  # noqa: PTH208


# — usage


async def test_usage_is_what_the_command_reports(desk: Desk) -> None:
    desk.row(0, team="a", cost_microusd=5, user=None)
    desk.row(0, team="b", cost_microusd=7, user=None)
    desk.row(0, team="b", cost_microusd=7, user=None, hours=1)
    tokens = {"input_tokens": 100, "cached_tokens": 10, "output_tokens": 20, "reasoning_tokens": 5}
    twice = {name: 2 * count for name, count in tokens.items()}
    assert await desk.data("/admin/v1/usage") == [
        {"team": "b", "model": "llama", "requests": 2, **twice, "cost_microusd": 14},
        {"team": "a", "model": "llama", "requests": 1, **tokens, "cost_microusd": 5},
    ]
    assert [one["team"] for one in await desk.data("/admin/v1/usage?top=1")] == ["b"]
    (whole,) = await desk.data("/admin/v1/usage?by=")
    assert (whole["requests"], "team" in whole) == (3, False)
    by_user = await desk.data("/admin/v1/usage?by=user")
    assert [one["user"] for one in by_user] == [None]


async def test_filters_span_and_zone_hold(desk: Desk) -> None:
    for number, team in enumerate("abc"):
        desk.row(number, team=team, pool=f"p{team}", hours=number)

    async def teams(query: str) -> set[str]:
        return {one["team"] for one in await desk.data(f"/admin/v1/usage?by=team&{query}")}

    assert await teams("") == {"a", "b", "c"}
    assert await teams("team=a&team=c") == {"a", "c"}
    assert await teams("team=a&pool=pc") == set()
    since, until = (f"{YESTERDAY + timedelta(hours=hour):%Y-%m-%dT%H:00Z}" for hour in (1, 2))
    assert await teams(f"since={since}") == {"b", "c"}
    assert await teams(f"since={since}&until={until}") == {"b"}
    (hour, *_) = await desk.data("/admin/v1/usage?by=hour,team&team=a&zone=Asia/Kolkata&since=3d")
    assert hour["hour"] == f"{YESTERDAY:%Y-%m-%d}T15:00+05:30"


async def test_a_user_is_asked_for_by_name(desk: Desk) -> None:
    for name in ("ann", "bob"):
        desk.row(0, user=stored_user(b"of the tests", "acme", name, False))
    (found,) = await desk.data("/admin/v1/usage?by=user&user=ann")
    assert (found["user"], found["requests"]) == (stored_user(b"of the tests", "acme", "ann", False), 1)


async def test_csv_is_a_header_and_raw_numbers(desk: Desk) -> None:
    desk.row(0, team='t"1, 2', cost_microusd=1_234_567)
    answer = await desk.get("/admin/v1/usage?by=team&format=csv")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/csv; charset=utf-8; header=present")
    assert answer.text.endswith("\r\n")
    assert list(csv.reader(io.StringIO(answer.text))) == [
        ["team", *COUNTERS],
        ['t"1, 2', "1", "100", "10", "20", "5", "1234567"],
    ]


@pytest.mark.parametrize(
    ("query", "param", "told"),
    [
        (
            "teem=a",
            "teem",
            f'"teem" is unknown, expected some of by, since, until, zone, top, format, {", ".join(DIMENSIONS)}',
        ),
        ("by=team&by=model", "by", '"by" is given twice, expected once'),
        (
            "by=teem",
            "by",
            '"teem" is unknown, expected some of organisation, team, key, user, model, pool, hour, day, month',
        ),
        (
            "since=monday",
            "since",
            '"monday" is no time, expected for example 7d, 12h, 2026-11-01, this-month or last-month',
        ),
        ("zone=Zurich", "zone", '"Zurich" is no time zone, expected for example UTC or Europe/Zurich'),
        ("format=xml", "format", '"xml" is no format, expected one of json, csv'),
        ("top=0", "top", '"0" is no number of groups, expected a whole number from 1'),
        ("top=%D9%A1", "top", '"١" is no number of groups, expected a whole number from 1'),
        ("since=1d&until=2d", "until", '"2d" is not after "1d", expected a time after since'),
    ],
)
async def test_a_query_that_is_not_understood_is_told(desk: Desk, query: str, param: str, told: str) -> None:
    answer = await desk.get(f"/admin/v1/usage?{query}")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_query")
    assert error["message"] == told


async def test_a_path_or_a_method_that_is_not_there_is_told(desk: Desk) -> None:
    answer = await desk.get("/admin/v1/usage/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "/admin/v1/exports" in answer.json()["error"]["message"]
    answer = await desk.ask("POST", "/admin/v1/usage")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert (await desk.get("/admin/v1/exports?team=a")).status_code == 400


# — exports and figures


def export(desk: Desk, organisation: str, taken: int, acknowledged: int, dead: int) -> None:
    """An export of that organisation, as its group stands."""
    stream = ledger_stream(organisation)
    desk.client.xgroup_create(stream, "archive", "0")
    if taken:
        read: Any = desk.client.xreadgroup("archive", "one", {stream: ">"}, count=taken)
        if acknowledged:
            desk.client.xack(stream, "archive", *(entry for entry, _ in read[0][1][:acknowledged]))
    for _ in range(dead):
        desk.client.xadd(dead_letters(organisation, "archive"), {"row": "{}"})


async def test_exports_are_told_by_name_and_organisation(desk: Desk) -> None:
    desk.row(0)
    for number in range(5):
        desk.row(number, organisation="other")
    export(desk, "acme", 0, 0, 0)
    export(desk, "other", 3, 1, 2)
    found = [
        (one["export"], one["organisation"], one["lag"], one["pending"], one["dead"])
        for one in await desk.data("/admin/v1/exports")
    ]
    assert found == [("archive", "acme", 1, 0, 0), ("archive", "other", 2, 2, 2)]
    figures = await desk.figures()
    assert {name: value for name, value in figures.items() if len(name) > 1} == {
        ("gateway_ledger_rows", "acme"): 1,
        ("gateway_ledger_rows", "other"): 5,
        ("gateway_export_lag", "archive", "acme"): 1,
        ("gateway_export_lag", "archive", "other"): 2,
        ("gateway_export_pending", "archive", "acme"): 0,
        ("gateway_export_pending", "archive", "other"): 2,
        ("gateway_export_dead_letters", "archive", "acme"): 0,
        ("gateway_export_dead_letters", "archive", "other"): 2,
    }
    assert figures["gateway_store_up",] == 1


async def test_spools_are_measured(desk: Desk) -> None:
    assert (await desk.figures())["gateway_spool_files",] == 0
    spool = desk.folder / "spool"
    spool.mkdir()
    for name, size in (("a.000001.spool", 10), ("b.000002.spool", 25), ("a.lock", 0)):
        (spool / name).write_bytes(b"x" * size)
    figures = await desk.figures()
    assert (figures["gateway_spool_files",], figures["gateway_spool_bytes",]) == (2, 35)


# — stores that are wrong


async def test_a_store_that_is_away_is_told_and_its_figures_say_so(valkey: house.Server, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "a.000001.spool").write_bytes(b"x" * 7)
    async with opened(f"unix://{tmp_path}/nowhere", tmp_path) as desk:
        for path in ("/admin/v1/usage", "/admin/v1/exports"):
            answer = await desk.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "store_unavailable"
        figures = await desk.figures()
        assert (figures["gateway_store_up",], figures["gateway_spool_bytes",]) == (0, 7)
        assert ("gateway_ledger_rows", "acme") not in figures
        assert (await desk.get("/healthz/live")).status_code == 200


async def test_sums_that_cannot_be_read_and_another_pepper_are_told(desk: Desk, store_url: str) -> None:
    desk.row(0, user="u_" + "0" * 20)
    assert await desk.data("/admin/v1/usage?user=ann") == []
    async with opened(store_url, desk.folder, key_pepper="another") as other:
        answer = await other.get("/admin/v1/usage?user=ann")
        assert (answer.status_code, "another pepper" in answer.json()["error"]["message"]) == (503, True)
    hour = int(YESTERDAY.timestamp()) // 3600
    desk.client.hset(sums_key("acme", "hour", hour), "no array", b"\xc1")
    answer = await desk.get("/admin/v1/usage?by=hour&since=2d")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")


# — health, and the figures of the workers


@pytest.mark.parametrize(
    ("workers", "reasons"),
    [
        (None, []),
        ({"ready": 1, "starting": 0, "draining": 0}, []),
        ({"ready": 1, "starting": 1, "draining": 1}, []),
        ({"ready": 0, "starting": 2, "draining": 1}, ["no worker is ready: 2 starting, 1 draining"]),
        ({}, ["no worker is ready: there is none"]),
        ({"ready": 2, "stopping": 1}, ["the gateway is stopping"]),
        (
            {"ready": 0, "draining": 2, "stopping": 1},
            ["the gateway is stopping", "no worker is ready: 2 draining"],
        ),
    ],
)
async def test_it_is_ready_while_a_worker_is_and_says_why_not(
    store_url: str, tmp_path: Path, workers: dict[str, int] | None, reasons: list[str]
) -> None:
    async with opened(store_url, tmp_path, supervised=None if workers is None else Overseen(workers)) as desk:
        answer = await desk.get("/healthz/ready", key=None)
    word = "not ready" if reasons else "ready"
    assert (answer.status_code, answer.json()) == (503 if reasons else 200, {"status": word, "reasons": reasons})


async def test_what_workers_count_is_told_beside_and_no_name_twice(store_url: str, tmp_path: Path) -> None:
    async with house.gateway(store_url, house.documents(["http://127.0.0.1:9"]), state=tmp_path) as served:
        info = ("gateway_policies_info", served.gateway.live.reloads.revision)
        async with opened(store_url, tmp_path, supervised=Overseen({"ready": 2, "draining": 1})) as desk:
            async with asyncio.timeout(20):
                while info not in (figures := await desk.figures()):  # workers write once a second
                    await asyncio.sleep(0.05)
            text = (await desk.get("/metrics", key=None)).text
    assert figures[info] == 1
    assert text.count("\ngateway_store_up ") == 1
    assert [figures["gateway_workers", state] for state in ("ready", "starting", "unready", "draining")] == [2, 0, 0, 1]
    assert figures["gateway_worker_restarts_total",] == 6


# — the command


def test_the_command_serves_until_it_is_ended(tmp_path: Path, store_url: str) -> None:
    place = Place(tmp_path)
    with place.running("admin", "--port", "0", GATEWAY_REDIS_URL=store_url) as running:
        told = json.loads(running.until('"serving"'))
        assert told["key"] == ".gateway/admin_key"
        key = (tmp_path / ".gateway" / "admin_key").read_text()
        url = f"http://127.0.0.1:{told['port']}"
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.get(f"{url}/admin/v1/usage", headers=headers, trust_env=False, timeout=20)
        assert (answer.status_code, answer.json()) == (200, {"object": "list", "data": []})
        taken = place.run("admin", "--port", str(told["port"]), GATEWAY_REDIS_URL=store_url)
        assert taken.returncode == 3
        assert "Address already in use" in taken.stderr
        assert running.end() == 0
        assert key not in "".join(running.said)


def test_a_key_that_no_header_carries_is_refused(tmp_path: Path) -> None:
    done = Place(tmp_path).run("admin", GATEWAY_ADMIN_KEY="two words")
    assert (done.returncode, done.stdout) == (2, "")
    assert "GATEWAY_ADMIN_KEY is another value, expected printable ASCII without spaces" in done.stderr
    assert "two words" not in done.stderr

"""Policies that change while requests are under way: taken whole, by every request as one version, or not at all."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import certifi
import pytest
import typer
import yaml
from structlog.testing import capture_logs

from gateway import reading
from gateway.cli import check
from gateway.documents import PolicyError
from gateway.marks import Marks
from gateway.policy import load
from gateway.reload import reload, watch
from tests.flows.test_ten_sentences import ANSWER, BODY, STREAM, rows
from tests.proving.backend import END, EVENTS, Backend, Peer, chunk, forever, ok
from tests.proving.house import DOCUMENTS, MODEL, House, documents, gateway
from tests.proving.limits import until
from tests.test_wire import server_tls

_SOON = 0.02  # seconds between two looks
GOOD = forever(Peer.request, ok(ANSWER))


@asynccontextmanager
async def watched(house: House) -> AsyncIterator[reading.Reloads]:
    """What becomes of its documents, which are looked at often meanwhile."""
    task = asyncio.ensure_future(watch(house.gateway.live, house.settings.policies, _SOON))
    try:
        yield house.gateway.live.reloads
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def status(house: House, key: str) -> int:
    async with house.client(key) as client:
        return (await client.post("/v1/completions", content=BODY)).status_code


def refused(logs: list[Any]) -> list[Any]:
    return [line["mistakes"] for line in logs if line["event"] == "policies_refused"]


# — documents


async def test_g12_documents_with_a_mistake_change_nothing_and_say_file_and_line(
    store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Backend(GOOD) as backend, gateway(store_url, documents([backend.url])) as house:
        key, before = await house.key(), house.gateway.live.policies
        async with watched(house) as told, house.client(key) as client:
            with capture_logs() as logs:
                wrong = "teams:\n  research: {organisation: acme, plan: fre}\n"
                (house.settings.policies / "teams.yaml").write_text(wrong)
                await until(lambda: told.refused)
                await asyncio.sleep(10 * _SOON)  # looks that find what they found before
            (mistakes,) = refused(logs)
            assert mistakes[0].startswith("teams.yaml:2 teams.research: ")
            assert (told.last, told.mistakes, told.revision) == ("refused", mistakes, before.snapshot.revision)
            assert house.gateway.live.policies is before
            assert (await client.post("/v1/completions", content=BODY)).content == ANSWER
            assert (await client.get("/healthz/ready")).status_code == 200
            with pytest.raises(typer.Exit) as ended:
                check(house.settings.policies)
            assert (ended.value.exit_code, capsys.readouterr().err.splitlines()) == (1, list(mistakes))

            (house.settings.policies / "teams.yaml").write_text("teams: {}")
            await until(lambda: told.taken)
            assert (told.last, told.mistakes, told.taken, told.refused) == ("taken", (), 1, 1)
            assert told.revision == house.gateway.live.policies.snapshot.revision != before.snapshot.revision


async def test_a_document_that_comes_or_goes_is_a_change(store_url: str) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house, watched(house) as told:
        more = house.settings.policies / "more.yml"
        more.write_text("models: {other: {pool: demo}}")
        await until(lambda: told.taken == 1)
        assert "other" in house.gateway.live.policies.snapshot.models
        (house.settings.policies / ".more.yml.swp").write_text("as an editor leaves it")
        more.unlink()
        await until(lambda: told.taken == 2)
        assert "other" not in house.gateway.live.policies.snapshot.models
        (house.settings.policies / "all.yaml").unlink()
        await until(lambda: told.refused == 1)
        assert told.mistakes == (f"{house.settings.policies}: holds no .yaml file, expected policy documents",)


async def test_a_gateway_watches_by_itself(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.reload.watch", partial(watch, every=_SOON))
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        (house.settings.policies / "more.yaml").write_text("models: {other: {pool: demo}}")
        await until(lambda: "other" in house.gateway.live.policies.snapshot.models)


async def test_what_is_still_being_written_is_not_taken(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look finds another change, until the ninth finds none: what is taken then is the last one, and once."""
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        looks = 0

        def look(seen: reading.Reading) -> Marks:
            nonlocal looks
            looks += 1
            if looks < 9:
                models = {**DOCUMENTS["models"], **{f"m{i}": {"pool": "demo"} for i in range(looks)}}
                house.documents(documents(["http://127.0.0.1:9"], models=models))
            return reading.look(seen)

        monkeypatch.setattr("gateway.reload.look", look)
        async with watched(house) as told:
            await until(lambda: told.taken)
            assert looks >= 9
            assert "m7" in house.gateway.live.policies.snapshot.models
            await until(lambda: looks > 12)
            assert told.taken == 1


@pytest.mark.parametrize(("changes", "taken"), [(1, True), (4, True), (5, False)])
async def test_what_changes_while_it_is_read_is_read_again(
    store_url: str, monkeypatch: pytest.MonkeyPatch, changes: int, taken: bool
) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house:
        reads = 0

        def changing(directory: Path) -> Any:
            nonlocal reads
            found = load(directory)
            reads += 1
            if reads <= changes:
                models = {**DOCUMENTS["models"], f"m{reads}": {"pool": "demo"}}
                house.documents(documents(["http://127.0.0.1:9"], models=models))
            return found

        monkeypatch.setattr(reading, "load", changing)
        assert await reload(house.gateway.live, house.settings.policies) is taken
        assert (f"m{changes}" in house.gateway.live.policies.snapshot.models) is taken
        folder = house.settings.policies
        never = (f"{folder}: changed 5 times while it was read, expected it to stand still",)
        assert house.gateway.live.reloads.mistakes == (() if taken else never)


async def test_a_defect_in_reading_is_a_mistake_and_ends_no_watch(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(store_url, documents(["http://127.0.0.1:9"])) as house, watched(house) as told:
        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(reading, "load", lambda _: 1 / 0)
            (house.settings.policies / "more.yaml").write_text("models: {}")
            await until(lambda: told.refused)
        assert told.mistakes == (f"{house.settings.policies}: ZeroDivisionError; the log has more",)
        assert [line["event"] for line in logs] == ["policies_unreadable", "policies_refused"]
        (house.settings.policies / "more.yaml").unlink()
        await until(lambda: told.taken)


# — under load


def version(number: int, url: str) -> dict[str, Any]:
    """Documents of which a request shows whether it met one version of them: in its path, its model and its cost."""
    price = {"input": float(number)}
    models = {MODEL: {"pool": "demo", "upstream_model": f"m{number}", "price": price}}
    return documents([f"{url}/{number}"], models=models)


async def test_g13_a_hundred_reloads_under_load_lose_nothing_and_a_request_meets_one_version(store_url: str) -> None:
    mixed: list[bytes] = []
    reloaded = asyncio.Event()

    async def answer(peer: Peer) -> None:
        """The prompt has as many tokens as the version has a number. A stream waits for the next version."""
        while True:
            await peer.request()
            asked = peer.requests[-1]
            found = re.match(rb"POST /(\d+)/v1/completions ", asked.line)
            number = found[1] if found else b"0"
            if json.loads(asked.body)["model"] != f"m{int(number)}":
                mixed.append(asked.line)
            usage = b'"usage":{"prompt_tokens":%b,"completion_tokens":0,"total_tokens":%b}' % (number, number)
            if b'"stream"' not in asked.body:
                await peer.send(ok(b'{"choices":[],%b}' % usage))
                continue
            await peer.send(EVENTS, chunk(b'data: {"choices":[]}\n\n'))
            await reloaded.wait()
            await peer.send(chunk(b'data: {"choices":[],%b}\n\n' % usage), chunk(b"data: [DONE]\n\n"), END)

    async with Backend(answer) as backend, gateway(store_url, version(1, backend.url)) as house:
        over, sent, answered = asyncio.Event(), 0, 0

        async def ask(body: bytes, end: bytes) -> None:
            nonlocal sent
            async with house.client(key) as client:
                while not over.is_set():
                    found = await client.post("/v1/completions", content=body)
                    assert (found.status_code, found.content[-len(end) :]) == (200, end)
                    sent += 1

        key, live = await house.key(), house.gateway.live
        load = [ask(BODY, b"}}") for _ in range(4)] + [ask(STREAM, b"data: [DONE]\n\n") for _ in range(4)]
        asking = asyncio.gather(*load)
        for number in range(2, 102):
            house.documents(version(number, backend.url))
            assert await reload(live, house.settings.policies)
            reloaded.set()
            reloaded.clear()
            answered += 2
            await until(lambda: sent >= answered)  # noqa: B023 - it is over before the next round
        over.set()
        while not asking.done():
            reloaded.set()
            await asyncio.sleep(0.01)
        await asking
        await house.settled()
        found = rows(store_url)
        assert mixed == []
        assert len(found) == sent >= 200
        assert [row for row in found if row["cost_microusd"] != row["input_tokens"] ** 2] == []
        assert {row["ended"] for row in found} == {"complete"}
        assert len({row["input_tokens"] for row in found}) > 50
        assert (live.reloads.taken, live.reloads.refused) == (100, 0)

        def is_open(peer: Peer) -> bool:
            return not peer.gone.is_set()

        wire = live.policies.pools["demo"].upstreams[0].transport
        await until(lambda: sum(map(is_open, backend.peers)) == len(wire.idle))  # type: ignore[attr-defined]


async def test_g13_reloads_that_come_at_once_follow_one_another(store_url: str) -> None:
    async with Backend(GOOD) as backend, gateway(store_url, documents([backend.url])) as house:
        live, folder = house.gateway.live, house.settings.policies
        assert await asyncio.gather(*(reload(live, folder) for _ in range(10))) == [True] * 10
        assert await status(house, await house.key()) == 200
        assert len(backend.peers) == 1


async def test_g13_a_stream_ends_over_an_upstream_that_is_taken_out_and_its_key_that_is_revoked(
    store_url: str,
) -> None:
    go_on = asyncio.Event()
    steps = (Peer.request, EVENTS, chunk(b"data: 1\n\n"), go_on, chunk(b"data: [DONE]\n\n"), END)
    async with Backend(*steps) as old, Backend(GOOD) as new, gateway(store_url, documents([old.url])) as house:
        key = await house.key()
        async with house.client(key) as client, client.stream("POST", "/v1/completions", content=STREAM) as answer:
            pieces = answer.aiter_raw()
            assert await anext(pieces) == b"data: 1\n\n"
            house.documents(documents([new.url]))
            assert await reload(house.gateway.live, house.settings.policies)
            assert await status(house, key) == 200
            (record,) = house.gateway.keys.records()
            await house.gateway.keys.revoke(record.id)
            assert await status(house, key) == 401
            assert not old.peers[0].gone.is_set()
            go_on.set()
            assert b"".join([piece async for piece in pieces]) == b"data: [DONE]\n\n"
        async with asyncio.timeout(5):
            await old.peers[0].gone.wait()
        await house.settled()
        assert [row["ended"] for row in rows(store_url)] == ["complete", "complete"]
        assert len(new.requests) == 1


# — as Kubernetes mounts them


class Mounted:
    """A directory as the kubelet keeps it: files are links through `..data`, which is renamed into its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._swaps = 0

    def swap(self, files: Mapping[str, str]) -> None:
        self._swaps += 1
        own = self.folder / f"..2026_{self._swaps}"
        own.mkdir()
        for name, text in files.items():
            (own / name).write_text(text)
        fresh = self.folder / "..data_tmp"
        fresh.symlink_to(own.name)
        fresh.rename(self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")


async def test_g14_a_config_map_and_a_secret_that_are_swapped_are_taken_whole(store_url: str, tmp_path: Path) -> None:
    """Two documents that only go together, and a credential: both links change in one step, and so do the policies."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    secret = Mounted(secrets)

    def config(pool: str, url: str) -> dict[str, str]:
        pools = {"pools": {pool: {"upstreams": [{"url": url, "key_file": str(secrets / "key")}]}}}
        models = {**DOCUMENTS, "models": {MODEL: {"pool": pool}}}
        return {"models.yaml": yaml.safe_dump(models), "pools.yaml": yaml.safe_dump(pools)}

    async with Backend(GOOD) as one, Backend(GOOD) as two:
        async with gateway(store_url, documents([one.url])) as house:
            key, live, mounted = await house.key(), house.gateway.live, Mounted(house.settings.policies)
            secret.swap({"key": "first\n"})
            mounted.swap(config("one", one.url))
            (mounted.folder / "all.yaml").unlink()
            assert await reload(live, mounted.folder)
            assert await status(house, key) == 200
            async with watched(house) as told:
                mounted.swap(config("two", two.url))
                await until(lambda: told.taken == 2)
                assert await status(house, key) == 200
                secret.swap({"key": "second\n"})
                await until(lambda: told.taken == 3)
                assert await status(house, key) == 200
            assert told.refused == 0
    shown = [dict(request.headers)[b"authorization"] for request in (*one.requests, *two.requests)]
    assert shown == [b"Bearer first", b"Bearer first", b"Bearer second"]
    assert len(two.peers) == 1, "another credential needs no other connection"


# — files that policies name


async def test_a_credential_that_is_gone_or_empty_is_told_and_the_last_good_one_goes_on(
    store_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("canary-one")
    async with Backend(GOOD) as backend:
        pools = {"demo": {"upstreams": [{"url": backend.url, "key_file": str(file)}]}}
        async with gateway(store_url, documents([], pools=pools)) as house, watched(house) as told:
            key = await house.key()
            with capture_logs() as logs:
                file.unlink()
                await until(lambda: told.refused == 1)
                assert await status(house, key) == 200
                file.write_text("\n")
                await until(lambda: told.refused == 2)
                assert await status(house, key) == 200
                file.write_text("canary-two")
                await until(lambda: told.taken == 1)
                assert await status(house, key) == 200
            place = "pools.demo.upstreams[0].key_file"
            assert refused(logs) == [
                (f"{place}: {file} cannot be read (No such file or directory), expected a secret",),
                (f"{place}: {file} holds nothing, expected a secret",),
            ]
            assert "canary" not in f"{logs} {house.gateway.live.policies!r} {told!r}"
    shown = [dict(request.headers)[b"authorization"] for request in backend.requests]
    assert shown == [b"Bearer canary-one", b"Bearer canary-one", b"Bearer canary-two"]


async def test_a_file_that_documents_were_refused_for_is_waited_for(store_url: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    async with Backend(GOOD) as backend, gateway(store_url, documents([backend.url])) as house:
        async with watched(house) as told:
            pools = {"demo": {"upstreams": [{"url": backend.url, "key_file": str(file)}]}}
            house.documents(documents([], pools=pools))
            await until(lambda: told.refused)
            assert not told.taken
            file.write_text("late")
            await until(lambda: told.taken)
            assert await status(house, await house.key()) == 200
    assert dict(backend.requests[0].headers)[b"authorization"] == b"Bearer late"


async def test_certificates_that_change_under_the_same_path_are_read_anew(store_url: str, tmp_path: Path) -> None:
    context, pem = server_tls(tmp_path)
    trusted = tmp_path / "trusted.pem"
    trusted.write_text(certifi.contents())
    async with Backend(GOOD, tls=context) as backend:
        tls = {"ca": str(trusted), "server_name": "localhost"}
        policy = documents([], pools={"demo": {"upstreams": [{"url": backend.url}], "tls": tls}})
        async with gateway(store_url, policy) as house, watched(house) as told:
            key = await house.key()
            assert await status(house, key) == 502
            trusted.write_text(pem.read_text())
            await until(lambda: told.taken)
            assert await status(house, key) == 200
            trusted.write_text("nothing")
            await until(lambda: told.refused)
            assert told.mistakes == (f"pools.demo.tls: {trusted}: holds no certificates, expected PEM",)
            assert await status(house, key) == 200


async def test_a_pool_trusts_the_ca_that_its_policy_names_under_the_name_that_it_names(
    store_url: str, tmp_path: Path
) -> None:
    context, pem = server_tls(tmp_path)
    async with Backend(GOOD, tls=context) as backend:
        tls = {"ca": str(pem), "server_name": "localhost"}
        pools = {"demo": {"upstreams": [{"url": backend.url}], "tls": tls}}
        async with gateway(store_url, documents([], pools=pools)) as house:
            key = await house.key()
            assert await status(house, key) == 200
            house.documents(documents([backend.url]))  # as the system trusts
            assert await reload(house.gateway.live, house.settings.policies)
            assert await status(house, key) == 502


async def test_nothing_begins_with_a_file_that_cannot_be_read(store_url: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    wrong = {"demo": {"upstreams": [{"url": "https://127.0.0.1:9"}], "tls": {"ca": missing}}}
    with pytest.raises(PolicyError, match=missing):
        async with gateway(store_url, documents([], pools=wrong)):
            pass

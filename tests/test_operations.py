"""What the control plane can be asked to do, over real sockets on a real store, and what becomes of it in a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.policy import load
from gateway.reload import reload
from tests.flows.test_ten_sentences import ANSWER, BODY, everything
from tests.proving import house
from tests.proving.backend import Backend, Peer, forever, ok
from tests.proving.house import DOCUMENTS, documents
from tests.test_admin import KEY, Desk, Overseen, opened

TEAM = {"name": "of-team", "count": "requests", "quota": "600/day", "per": ["team"]}
BY_KEY = {"name": "of-key", "count": "total_tokens", "quota": "1000/day", "per": ["key"]}
BY_USER = {"name": "of-user", "count": "requests", "quota": "10/day", "per": ["user", "model"]}
POLICIES = {
    **DOCUMENTS,
    "pools": {"demo": {"upstreams": [{"url": "http://10.0.0.1:80"}, {"url": "http://[::1]:81/v0", "drain": True}]}},
    "plans": {"free": {"limits": [TEAM, BY_KEY, BY_USER]}},
}
ONE, TWO = "demo/10.0.0.1:80", "demo/[::1]:81"


@pytest.fixture
async def desk(store_url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with opened(store_url, tmp_path) as found:
        found.policies(POLICIES)
        yield found


async def post(desk: Desk, path: str, body: object = None) -> Any:
    """What was answered to a request that is taken."""
    answer = await desk.ask("POST", f"/admin/v1{path}", None if body is None else json.dumps(body).encode())
    assert (answer.status_code // 100, answer.headers["cache-control"]) == (2, "no-store")
    return answer.json()


async def refusal(desk: Desk, method: str, path: str, body: bytes | None = None) -> tuple[int, str, str | None, str]:
    """What is said of a request that is not taken."""
    answer = await desk.ask(method, f"/admin/v1{path}", body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"], error["message"]


async def test_nobody_does_anything_without_the_key(desk: Desk, store_url: str) -> None:
    (made,) = [await post(desk, "/keys", {"team": "research"})]
    before = everything(store_url)
    asked = ("keys", "reload", f"keys/{made['id']}/revoke", f"upstreams/{ONE}/drain", f"upstreams/{ONE}/resume")
    for path in asked:
        for key in (None, made["key"], KEY[:-1]):
            answer = await desk.ask("POST", f"/admin/v1/{path}", b'{"team": "research"}', key=key)
            assert answer.status_code == 401
    for path in ("keys", "limits?team=research", "upstreams", "policies"):
        assert (await desk.get(f"/admin/v1/{path}", key=None)).status_code == 401
        assert (await desk.get(f"/admin/v1/{path}")).status_code == 200
    assert everything(store_url) == before


async def test_another_path_names_those_that_are_there_and_another_method_its_own(desk: Desk) -> None:
    status, _, _, told = await refusal(desk, "GET", "/key")
    assert (status, told.startswith("no such path, expected one of /admin/v1/usage, ")) == (404, True)
    assert "/admin/v1/keys/{id}/revoke" in told
    assert (await refusal(desk, "DELETE", "/keys"))[:2] == (405, "method_not_allowed")
    answer = await desk.ask("GET", "/admin/v1/reload")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# — keys


async def test_a_key_is_shown_once_and_opens_until_it_is_revoked(desk: Desk, store_url: str) -> None:
    async with house.gateway(store_url, documents(["http://127.0.0.1:9"])) as served, served.client() as client:

        async def until(key: str, status: int) -> None:
            async with asyncio.timeout(5):
                while (await client.get("/v1/models", headers={"x-api-key": key})).status_code != status:
                    await asyncio.sleep(0.005)

        with capture_logs() as logs:
            form = {"team": "research", "user": "ann", "name": "laptop", "models": ["l*"], "expires": "30d"}
            made = await post(desk, "/keys", form)
            key = made.pop("key")
            assert {name: made[name] for name in ("team", "user", "name", "models", "state")} == {
                **{name: form[name] for name in ("team", "user", "name", "models")},
                "state": "active",
            }
            other = await post(desk, "/keys", {"team": "support"})
            await until(key, 200)
            assert await desk.data("/admin/v1/keys") == [made, {k: v for k, v in other.items() if k != "key"}]
            assert await desk.data("/admin/v1/keys?team=research") == [made]
            assert key not in (await desk.get("/admin/v1/keys")).text
            revoked = await post(desk, f"/keys/gw_{made['id']}_and-more/revoke")
            assert (revoked["id"], revoked["state"]) == (made["id"], "revoked")
            await until(key, 401)
            await until(other["key"], 200)
            assert await post(desk, f"/keys/{made['id']}/revoke") == revoked
        ours = [(line["event"], line["id"]) for line in logs if line["event"].startswith("key_")]
        assert ours[:3] == [("key_created", made["id"]), ("key_created", other["id"]), ("key_revoked", made["id"])]
        assert key not in str(logs)


_MEMBERS = "expected JSON with some of team, user, name, models, expires"


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (b"", None, f"Input data was truncated; {_MEMBERS}"),
        (b"{}", None, f"Object missing required field `team`; {_MEMBERS}"),
        (b'{"teem": "research"}', None, f"Object contains unknown field `teem`; {_MEMBERS}"),
        (b'{"team": 7}', None, f"Expected `str`, got `int` - at `$.team`; {_MEMBERS}"),
        (b'{"team": "reserch"}', "team", '"reserch" is no team of the policies, expected one of research, support'),
        (
            b'{"team": "research", "expires": "soon"}',
            "expires",
            '"soon" is no time, expected for example 30d, 12h or 2027-01-31',
        ),
        (
            b'{"team": "research", "expires": "2001-01-01"}',
            "expires",
            '"2001-01-01" is past, expected a time to come',
        ),
    ],
)
async def test_a_key_that_cannot_be_made_is_told(desk: Desk, body: bytes, param: str | None, told: str) -> None:
    assert await refusal(desk, "POST", "/keys", body) == (400, "invalid_body", param, told)
    assert await desk.data("/admin/v1/keys") == []


async def test_a_key_that_is_not_there_and_a_body_that_is_too_long_are_told(desk: Desk) -> None:
    text = "no key has this id; GET /admin/v1/keys shows them all"
    assert await refusal(desk, "POST", "/keys/nobody/revoke") == (404, "key_not_found", None, text)
    status, code, _, _ = await refusal(desk, "POST", "/keys", b'{"team": "%b"}' % (b"x" * 70_000))
    assert (status, code) == (413, "request_too_large")


# — limits


async def test_limits_stand_as_a_key_meets_them_and_as_a_team_does(store_url: str, tmp_path: Path) -> None:
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend, opened(store_url, tmp_path) as desk:
        policies = documents([backend.url], plans=POLICIES["plans"])
        desk.policies(policies)
        async with house.gateway(store_url, policies) as served:
            key = await served.key(user="ann")
            async with served.client(key) as client:
                assert (await client.post("/v1/completions", content=BODY)).status_code == 200
                mine = (await client.get("/v1/limits")).json()["data"]
            await served.settled()

        async def used(query: str) -> dict[str, tuple[str, int]]:
            rows = await desk.data(f"/admin/v1/limits?{query}")
            return {row["name"]: (row["scope"].partition(" ")[0], row["used"]) for row in rows}

        own = {"of-team": ("team", 1), "of-key": ("key", 4), "of-user": ("user", 1)}
        assert await used(f"key={key[:16]}") == await used(f"key={key.split('_')[1]}&model=llama") == own
        assert [row["name"] for row in mine] == list(own)
        assert await used("team=research") == {"of-team": ("team", 1)}
        assert await used("team=research&user=ann") == {"of-team": ("team", 1), "of-user": ("user", 1)}
        assert await used("team=support") == {"of-team": ("team", 0)}


@pytest.mark.parametrize(
    ("query", "status", "code", "told"),
    [
        (
            "",
            400,
            "invalid_query",
            "whose limits, of a key or of a team? neither is named, expected key=ID or team=NAME",
        ),
        (
            "key=a&team=b",
            400,
            "invalid_query",
            "whose limits, of a key or of a team? both are named, expected key=ID or team=NAME",
        ),
        (
            "team=reserch",
            400,
            "invalid_query",
            '"reserch" is no team of the policies, expected one of research, support',
        ),
        ("team=research&model=lama", 400, "model_not_found", '"lama" is no model of the policies'),
        ("key=nobody", 404, "key_not_found", "no key in force has this id; GET /admin/v1/keys shows them all"),
        ("team=a&team=b", 400, "invalid_query", '"team" is given twice, expected once'),
        ("teem=a", 400, "invalid_query", '"teem" is unknown, expected some of key, team, model, user'),
    ],
)
async def test_limits_of_nobody_are_told(desk: Desk, query: str, status: int, code: str, told: str) -> None:
    found = await refusal(desk, "GET", f"/limits?{query}")
    assert (found[0], found[1], found[3]) == (status, code, told)


# — upstreams


async def test_upstreams_are_drained_and_resumed_and_the_list_says_so(desk: Desk) -> None:
    async def drained() -> dict[str, str | None]:
        return {row["upstream"]: row["drained"] for row in await desk.data("/admin/v1/upstreams")}

    with capture_logs() as logs:
        assert await drained() == {ONE: None, TWO: "by policy"}
        assert await post(desk, f"/upstreams/{ONE}/drain") == {"upstream": ONE, "weight": 1, "drained": "by command"}
        await post(desk, f"/upstreams/{TWO}/drain")
        assert await drained() == {ONE: "by command", TWO: "by command"}
        assert await post(desk, f"/upstreams/{ONE}/resume") == {"upstream": ONE, "weight": 1, "drained": None}
        assert await drained() == {ONE: None, TWO: "by command"}
    changes = [(line["event"], line["upstream"]) for line in logs if "upstream" in line]
    assert changes == [("upstream_drained", ONE), ("upstream_drained", TWO), ("upstream_resumed", ONE)]
    told = f'"demo/10.0.0.2:80" is no upstream of the policies, expected one of {ONE}, {TWO}'
    found = await refusal(desk, "POST", "/upstreams/demo/10.0.0.2:80/drain")
    assert found == (404, "upstream_not_found", None, told)


# — policies


async def test_policies_are_told_as_they_stand_on_the_disk(desk: Desk) -> None:
    async def standing() -> dict[str, Any]:
        found: dict[str, Any] = (await desk.get("/admin/v1/policies")).json()
        return found

    first = await standing()
    revision = load(desk.folder / "policies").revision
    assert (first["object"], first["revision"], first["last"], first["mistakes"]) == ("policies", revision, "taken", [])
    assert first["workers"] is None
    desk.policies({**POLICIES, "teams": {"research": {"organisation": "acme", "plan": "fre"}}})
    wrong = await standing()
    (mistake,) = wrong["mistakes"]
    assert mistake.startswith("all.yaml:")
    assert 'teams.research.plan: "fre" is not defined' in mistake
    assert (wrong["revision"], wrong["since"], wrong["last"]) == (revision, first["since"], "refused")
    assert len(await desk.data("/admin/v1/upstreams")) == 2, "the last good ones hold"
    desk.policies({**POLICIES, "teams": {}})
    again = await standing()
    assert (again["last"], again["mistakes"]) == ("taken", [])
    assert again["revision"] != revision


async def test_where_there_never_were_policies_it_is_told_and_the_rest_works(store_url: str, tmp_path: Path) -> None:
    async with opened(store_url, tmp_path) as desk:
        told = f"{tmp_path}/policies: holds no .yaml file, expected policy documents"
        answer = await desk.get("/admin/v1/upstreams")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "policies_refused")
        assert answer.json()["mistakes"] == [told]
        found = (await desk.get("/admin/v1/policies")).json()
        assert (found["revision"], found["last"], found["mistakes"]) == (None, "refused", [told])
        assert await desk.data("/admin/v1/keys") == []
        assert await desk.data("/admin/v1/usage") == []
        desk.policies(POLICIES)
        assert len(await desk.data("/admin/v1/upstreams")) == 2


async def test_a_reload_is_asked_of_the_workers_once_the_documents_have_no_mistake(
    store_url: str, tmp_path: Path
) -> None:
    async with house.gateway(store_url, documents(["http://127.0.0.1:9"])) as served:
        # Another folder than the one that the gateway watches by itself.
        live, folder = served.gateway.live, tmp_path / "others"
        shutil.copytree(served.settings.policies, folder)

        async def ask() -> None:
            await reload(live, folder)

        given: Any = {"supervised": Overseen({"ready": 2}, ask), "policies": folder}
        async with opened(store_url, tmp_path, **given) as desk:
            assert (await desk.get("/admin/v1/policies")).json()["workers"] == {"ready": 2}
            (folder / "more.yaml").write_text("teams:\n  more: {organisation: acme, plan: fre}\n")
            answer = await desk.ask("POST", "/admin/v1/reload")
            mistake = 'more.yaml:2 teams.more.plan: "fre" is not defined, expected one of free'
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "policies_refused")
            assert answer.json()["mistakes"] == [mistake]
            problem = await desk.ask("POST", "/admin/v1/reload", headers={"accept": "application/problem+json"})
            assert (problem.json()["status"], problem.json()["mistakes"]) == (422, [mistake])
            assert (live.reloads.taken, live.reloads.refused) == (0, 0), "nobody was asked"

            (folder / "more.yaml").write_text("teams:\n  more: {organisation: acme, plan: free}\n")
            found = await post(desk, "/reload")
            assert (live.reloads.taken, "more" in live.policies.snapshot.teams) == (1, True)
            assert (found["revision"], found["mistakes"]) == (live.reloads.revision, [])
            assert found["workers"] == "are asked to read them"


async def test_a_reload_reads_what_seems_to_be_unchanged(desk: Desk) -> None:
    """As an editor may leave it that keeps size and time; nobody who asks for a reload wants to hear of marks."""
    before = (await post(desk, "/reload"))["revision"]
    file = desk.folder / "policies" / "all.yaml"
    seen = file.stat()
    file.write_text(file.read_text().replace("10.0.0.1", "10.0.0.2"))
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert (await desk.get("/admin/v1/policies")).json()["revision"] == before
    assert (await post(desk, "/reload"))["revision"] != before


async def test_without_a_supervisor_a_reload_says_that_workers_watch_by_themselves(desk: Desk) -> None:
    found = await post(desk, "/reload")
    assert (found["object"], found["last"]) == ("reload", "taken")
    assert found["workers"] == "watch the documents by themselves, and take them within two seconds"


async def test_a_store_that_is_away_is_told_and_policies_are_read_without_it(tmp_path: Path) -> None:
    async with opened(f"unix://{tmp_path}/nowhere", tmp_path) as desk:
        desk.policies(POLICIES)
        for path in ("keys", "limits?team=research", "upstreams"):
            assert (await refusal(desk, "GET", f"/{path}"))[:2] == (503, "store_unavailable")
        assert (await refusal(desk, "POST", "/keys", b'{"team": "research"}'))[:2] == (503, "store_unavailable")
        assert (await post(desk, "/reload"))["last"] == "taken"
        assert (await desk.get("/admin/v1/policies")).json()["last"] == "taken"

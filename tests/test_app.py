"""The table of paths: what is not in it, byte for byte, is nowhere. And no answer beside the hot path is text."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.endpoints import ENDPOINTS, PREFIXES
from tests.proving.house import MODEL, House, documents, gateway

POSTED = [f"{prefix}/{endpoint}".encode() for prefix in PREFIXES for endpoint in ENDPOINTS]
# Which stand for all of the table, whose paths are found in the same way.
VARIED = [f"{prefix}/{endpoint}".encode() for prefix in PREFIXES for endpoint in ("completions", "chat/completions")]
GOT = [*(f"{prefix}/models".encode() for prefix in PREFIXES), b"/healthz/live", b"/healthz/ready", b"/openapi.json"]
ONE_MODEL = tuple(f"{prefix}/models/".encode() for prefix in PREFIXES)  # below which any name may stand
NOWHERE = documents(["http://127.0.0.1:9"])


def escaped(path: bytes, at: int, form: str = "%{:02x}") -> bytes:
    return path[:at] + form.format(path[at]).encode() + path[at + 1 :]


def mutations(path: bytes) -> Iterator[bytes]:
    """Other spellings that some reader, somewhere, takes for this path."""
    last = path.rpartition(b"/")[2]
    yield from (
        path + end for end in (b"/", b"//", b"/.", b"/..", b";", b";a=b", b".", b"%20", b"%00", b"%0d%0a", b"%23")
    )
    yield from (
        path + end for end in (b"%3f", b"/x", b".json", b"+", b"%", b"%zz", b"\\", b"%5c", b"%2f", b"%2e", b"%3b")
    )
    yield from (
        start + path for start in (b"/", b"/.", b"/x/..", b"/%2e", b"/%2e%2e", b"//x", b"/;a", b"/%00", b"/%2f")
    )
    yield from (b"/" + start + path for start in (b"@gateway", b"gateway", b"http://gateway", b"http:", b"\\gateway"))
    yield from (
        path.upper(),
        path.title(),
        path.swapcase(),
        path.replace(b"/", b"\\"),
        b"/" + path.replace(b"/", b"%2F"),
    )
    yield from (path.replace(b"/", sep) for sep in (b"//", b"/./", b"/;/", b"/%2f", b"%2f", b"%252f", b"/x/../"))
    yield from (path.replace(b"/" + last, between + last) for between in (b"/%2e/", b"/..;/", b"/%2e%2e/", b"/\t/"))
    for at in range(1, len(path)):
        yield escaped(path, at)
        yield escaped(path, at, "%25{:02x}")
    # seeded: a failure can be repeated
    chance = random.Random(path)
    for _ in range(40):
        at = chance.randrange(1, len(path))
        yield path[:at] + bytes([chance.randrange(1, 256)]) + path[at + chance.randrange(2) :]


async def answered(house: House, method: bytes, target: bytes) -> tuple[int, Any]:
    """The status of an answer, and its body, which is JSON."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
    try:
        writer.write(method + b" " + target + b" HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n")
        start, _, body = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
        assert b"\r\ncontent-type: application/json\r\n" in start + b"\r\n", (target, start)
        return int(start.split()[1]), json.loads(body)
    finally:
        writer.transport.abort()


async def test_a_listed_path_is_found_by_its_own_bytes(store_url: str) -> None:
    """401: the route asks who calls. A query is no part of a path."""
    async with gateway(store_url, NOWHERE) as house:
        for query in (b"", b"?", b"?api-version=1"):
            assert [(await answered(house, b"POST", path + query))[0] for path in POSTED] == [401] * len(POSTED)
            assert [(await answered(house, b"GET", path + query))[0] for path in GOT] == [401, 401, 200, 200, 200]


async def test_no_other_spelling_of_a_listed_path_is_found(store_url: str) -> None:
    """A thousand of them; 400 where two readers could see two paths, else 404, or 400 by the wire."""
    listed = {*POSTED, *GOT}
    wanted = {(method, other) for paths, method in ((VARIED, b"POST"), (GOT, b"GET")) for path in paths
              for other in mutations(path)
              if other.partition(b"?")[0] not in listed and not other.startswith(ONE_MODEL)}  # fmt: skip
    assert len(wanted) > 900
    async with gateway(store_url, NOWHERE) as house:
        found = {}
        for method, target in wanted:
            status, body = await answered(house, method, target)
            if (status, body["error"]["code"]) not in (
                (404, "not_found"),
                (400, "invalid_path"),
                (400, "invalid_http"),
            ):
                found[target] = status, body
    assert found == {}


@pytest.mark.parametrize("escape", ["%2f", "%2F", "%2e", "%2E", "%5c", "%5C", "%00", "%0d", "%0D", "%0a", "%0A"])
async def test_an_escape_that_hides_a_boundary_is_refused_by_name(store_url: str, escape: str) -> None:
    async with gateway(store_url, NOWHERE) as house:
        status, body = await answered(house, b"GET", f"/v1/models{escape}x".encode())
    assert (status, body["error"]["code"]) == (400, "invalid_path")


@pytest.mark.parametrize("path", [*POSTED, *GOT], ids=lambda path: path.decode())
async def test_another_method_is_told_which_is_allowed(store_url: str, path: bytes) -> None:
    async with gateway(store_url, NOWHERE) as house:
        for method in (b"DELETE", b"PUT", b"OPTIONS", b"POST" if path in GOT else b"GET"):
            status, body = await answered(house, method, path)
            assert status == 405
            assert "is not for this path" in body["error"]["message"]


async def test_a_defect_beside_the_hot_path_is_answered_in_our_own_shape(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("a defect with a SECRET")

    async with gateway(store_url, NOWHERE) as house:
        monkeypatch.setattr(house.gateway.keys, "identify", fails)
        status, body = await answered(house, b"GET", b"/v1/models")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "SECRET" not in json.dumps(body)


async def test_who_may_use_no_model_sees_none(store_url: str) -> None:
    async with gateway(store_url, NOWHERE) as house:
        async with house.client(await house.key(models=("another",))) as client:
            listed, one = await client.get("/v1/models"), await client.get(f"/v1/models/{MODEL}")
        async with house.client(await house.key()) as client:
            assert (await client.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
    assert (listed.status_code, listed.json()) == (200, {"object": "list", "data": [], "has_more": False})
    assert (one.status_code, one.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_body_for_nobody_is_not_read_and_ends_the_connection(store_url: str) -> None:
    async with gateway(store_url, NOWHERE) as house:
        async with house.caller("nobody", b"GET /healthz/live HTTP/1.1\r\n\r\n", path=b"/v1/nothing") as caller:
            said = await asyncio.wait_for(caller.rest(), 30)
    assert said.startswith(b"HTTP/1.1 404 ")
    assert b"\r\nconnection: close\r\n" in said
    assert said.count(b"HTTP/1.1 ") == 1


async def test_anthropics_clients_are_told_in_their_own_shape_that_a_method_is_not_for_a_path(store_url: str) -> None:
    async with gateway(store_url, NOWHERE) as house:
        told = {path: (await answered(house, b"GET", path))[1] for path in (b"/v1/messages", b"/v1/completions")}
    assert told[b"/v1/messages"]["type"] == "error"
    assert told[b"/v1/completions"]["error"]["code"] == "method_not_allowed"

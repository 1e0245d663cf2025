"""Policies that name files: what a pool trusts, and what becomes of a file that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.documents import PolicyError
from gateway.reload import reload
from tests.flows.test_ten_sentences import ANSWER, BODY
from tests.proving.backend import Backend, Peer, forever, ok
from tests.proving.house import documents, gateway
from tests.test_wire import server_tls


async def test_a_pool_trusts_the_ca_that_its_policy_names_under_the_name_that_it_names(
    store_url: str, tmp_path: Path
) -> None:
    context, pem = server_tls(tmp_path)
    async with Backend(forever(Peer.request, ok(ANSWER)), tls=context) as backend:
        tls = {"ca": str(pem), "server_name": "localhost"}
        pools = {"demo": {"upstreams": [{"url": backend.url}], "tls": tls}}
        async with gateway(store_url, documents([], pools=pools)) as house, house.client(await house.key()) as client:
            assert (await client.post("/v1/completions", content=BODY)).content == ANSWER
            house.documents(documents([backend.url]))  # as the system trusts
            assert await reload(house.gateway.live, house.settings.policies)
            assert (await client.post("/v1/completions", content=BODY)).status_code == 502


async def test_a_file_that_cannot_be_read_is_a_mistake_and_changes_nothing(store_url: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    wrong = {"demo": {"upstreams": [{"url": "https://127.0.0.1:9"}], "tls": {"ca": missing}}}
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend:
        async with gateway(store_url, documents([backend.url])) as house, house.client(await house.key()) as client:
            before = house.gateway.live.policies
            house.documents(documents([], pools=wrong))
            with capture_logs() as logs:
                assert not await reload(house.gateway.live, house.settings.policies)
            (line,) = [line for line in logs if line["event"] == "policies_refused"]
            assert missing in line["mistakes"][0]
            assert house.gateway.live.policies is before
            assert (await client.post("/v1/completions", content=BODY)).content == ANSWER
    with pytest.raises(PolicyError, match=missing):
        async with gateway(store_url, documents([], pools=wrong)):
            pass

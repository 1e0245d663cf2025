"""`gateway serve` on several servers, as an operator has it: the address in the environment, a key by the command, a
call, its row; then the primary that has the organisation is killed, and callers go on.

How each fault looks from within is in test_store_faults.py (R7 to R9); here the processes are those of production.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.embedded import _server_binary
from tests.proving import stores
from tests.proving.commands import PATIENCE, Place
from tests.proving.house import MODEL, documents, echo
from tests.proving.limits import until
from tests.proving.stores import Node

LEDGER = "{acme}:usage"
LIMITS = {"limits": [{"name": "counted", "count": "requests", "quota": "1000000/month", "per": ["team"]}]}
BODY = {"model": MODEL, "prompt": "The sky is", "max_tokens": 4}

Several = Callable[[str], AbstractContextManager[Any]]
# The stores, who of them has the organisation, and who has it after that one died, as soon as there is such a one.
SENTINELS = (stores.watched, lambda watched: watched.primary, lambda watched, dead: watched.promoted(dead))
CLUSTER = (stores.cluster, lambda cluster: cluster.owner(LEDGER), lambda cluster, dead: heir_of(cluster, dead))


def heir_of(cluster: stores.Cluster, dead: Node) -> Node:
    """Who has the ledger's slot now."""
    asked = next(node for node in cluster.nodes if node is not dead)
    stores.until(lambda: cluster.owner(LEDGER, asked) is not dead)
    stores.until(lambda: "cluster_state:ok" in asked.ask("CLUSTER", "INFO"))
    return cluster.owner(LEDGER, asked)


def ids(node: Node) -> list[str]:
    """The requests of the ledger that a server has, one for each row."""
    return [json.loads(fields[1])["id"] for _, fields in node.ask("XRANGE", LEDGER, "-", "+")]


@asynccontextmanager
async def served(folder: Path, store_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A caller with a key of the command's, and the process that serves him. It ends well when the block is left."""
    place = Place(folder)
    given = {
        "GATEWAY_REDIS_URL": store_url,
        "GATEWAY_KEY_PEPPER": "of the tests",
        "GATEWAY_STORE_DEADLINE": "0.3",  # this machine is noisy
    }
    async with echo() as backend:
        place.write(documents([backend], plans={"free": LIMITS}))
        made = await asyncio.to_thread(place.run, "keys", "create", "--team", "research", "--json", **given)
        assert made.returncode == 0, made.stderr
        headers = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}
        with place.running("serve", "--port", "0", **given) as serving:
            url = await asyncio.to_thread(serving.serving)
            async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE) as client:
                yield client
            assert await asyncio.to_thread(serving.end) == 0


class Caller:
    """Who asks again and again, and keeps all answers."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.answers: list[httpx.Response] = []

    async def ask(self) -> bool:
        """Ask once; whether the store took part in it."""
        self.answers.append(await self._client.post("/v1/completions", json=BODY))
        return "x-gateway-limits" not in self.answers[-1].headers

    @property
    def ids(self) -> list[str]:
        """The requests that were answered, by the ids that their rows have."""
        return sorted(answer.headers["x-gateway-request-id"] for answer in self.answers)


@pytest.mark.parametrize(("several", "primary", "after"), [SENTINELS, CLUSTER], ids=["sentinels", "cluster"])
async def test_a_key_works_its_rows_are_written_and_a_primary_may_die(
    tmp_path: Path, several: Several, primary: Callable[[Any], Node], after: Callable[[Any, Node], Node]
) -> None:
    """Every answer is 200 and has one row, those among them that were given while nobody took writes."""
    with several(_server_binary()) as store:
        async with served(tmp_path, store.url) as client:
            caller = Caller(client)
            assert await caller.ask()
            before = primary(store)
            assert ids(before) == caller.ids

            before.kill()
            promoted = asyncio.ensure_future(asyncio.to_thread(after, store, before))
            without = 0
            while not promoted.done():
                without += not await caller.ask()
                await asyncio.sleep(0.05)
            heir = await promoted
            async with asyncio.timeout(PATIENCE):
                while not await caller.ask():
                    await asyncio.sleep(0.05)
            assert without > 0
            assert {answer.status_code for answer in caller.answers} == {200}
            await until(lambda: len(ids(heir)) >= len(caller.ids), PATIENCE)
            assert sorted(ids(heir)) == caller.ids

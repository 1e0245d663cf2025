"""What one gateway is told to drain, all of them do."""

from __future__ import annotations

import asyncio

from gateway.drains import drain, drained, resume
from gateway.store import Store
from tests.flows.test_ten_sentences import ANSWER, BODY
from tests.proving.backend import Backend, Peer, forever, ok
from tests.proving.house import House, documents, gateway


async def test_a_drained_upstream_gets_nothing_new_in_any_gateway_until_it_is_resumed(store_url: str) -> None:
    async with Backend(forever(Peer.request, ok(ANSWER))) as backend:
        policy = documents([backend.url])
        name = f"demo/{backend.url.removeprefix('http://')}"
        async with gateway(store_url, policy) as one, gateway(store_url, policy) as two:
            key = await one.key()
            store = Store(store_url, deadline=5.0)

            async def until(house: House, status: int) -> None:
                async with asyncio.timeout(10), house.client(key) as client:
                    while (await client.post("/v1/completions", content=BODY)).status_code != status:
                        await asyncio.sleep(0.05)

            try:
                await until(two, 200)  # which hears of the key first
                await drain(store, name)
                assert await drained(store) == {name}
                await asyncio.gather(until(one, 503), until(two, 503))
                await resume(store, name)
                await asyncio.gather(until(one, 200), until(two, 200))
            finally:
                await store.aclose()

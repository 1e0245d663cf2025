"""Forwarding alone: the wire between two sockets, without key, contract, limits, ledger and log.

`python -m tests.bench.forward PORT BACKEND_PORT`, or 0 for no backend: an answer from memory, the floor of all that
stands on uvicorn. What the gateway costs beyond it is what its decisions cost.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import uvicorn

from gateway.asgi import Receive, Scope, Send, read_body
from gateway.endpoints import ENDPOINTS
from gateway.language import PoolPolicy, UpstreamPolicy
from gateway.metrics import Counters
from gateway.normalize import InferenceRequest
from gateway.server import config
from gateway.snapshot import Model
from gateway.upstream import Upstream
from gateway.wire import Wire
from tests.bench.backend import ANSWER


class Forward:
    """POST anything, and it goes to the one upstream."""

    def __init__(self, port: int) -> None:
        own = UpstreamPolicy(url=f"http://127.0.0.1:{port}")
        pool = PoolPolicy(upstreams=(own,))
        self.upstream = Upstream(pool, own, Wire(own.url))
        self.upstream.join("bench", pool, own, lambda: False, Counters("attempts", "", "pool", "upstream", "result"))
        self.model = Model("m", "m", None, "bench", "fireworks", "m", 1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, 1 << 20)
        request = InferenceRequest(ENDPOINTS["completions"], scope["path"], self.model, "m", body, False, None, 0, 0)
        answer = await self.upstream.ask(request, scope["headers"], [], asyncio.get_running_loop().time())
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        async for chunk in answer:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await answer.leave()
        await send(answer.end)


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The backend's own answer, without a backend."""
    await read_body(scope, receive, 1 << 20)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER, "more_body": False})


if __name__ == "__main__":
    port, backend = int(sys.argv[1]), int(sys.argv[2])
    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    uvicorn.Server(config(Forward(backend) if backend else hello, drain=0)).run([listener])

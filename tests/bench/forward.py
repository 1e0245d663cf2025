"""Forwarding alone: the wire between two sockets, without key, contract, limits, ledger and log.

`python -m tests.bench.forward PORT BACKEND_PORT`, or 0 for no backend: an answer from memory, the floor of all that
stands on uvicorn. What the gateway costs beyond it is what its decisions cost.
"""

from __future__ import annotations

import socket
import sys

import uvicorn

from gateway.asgi import Receive, Scope, Send, read_body
from gateway.policy import PoolPolicy, UpstreamPolicy
from gateway.pools import Answer, Upstream
from gateway.server import config
from gateway.wire import Wire
from tests.bench.backend import ANSWER


class Forward:
    """POST anything, and it goes to the one upstream."""

    def __init__(self, port: int) -> None:
        policy = UpstreamPolicy(url=f"http://127.0.0.1:{port}")
        timeouts = PoolPolicy(upstreams=(policy,)).timeouts
        self.upstream = Upstream(policy, Wire(policy.url, timeouts), None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, 1 << 20)
        response = await self.upstream.transport.handle_async_request(self.upstream.request(scope["path"], [], body))
        answer = Answer(response, self.upstream, 1)
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        async for chunk in answer:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await answer.aclose()
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

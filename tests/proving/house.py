"""A whole gateway for a test: real store, real sockets, in the test's own event loop.

`async with gateway(store_url, documents(…)) as house` serves on a free port of the loopback; `house.key()` makes a key,
`house.client()` an httpx client, `house.caller()` a raw connection. Policies are Python values; what a test does not
name is DOCUMENTS.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis
import uvicorn
import yaml

from gateway import app
from gateway.echo import create_app
from gateway.server import config
from gateway.settings import Settings

MODEL = "accounts/fireworks/models/llama-v2-7b"

DOCUMENTS: dict[str, Any] = {
    "gateway": {"schema": "strict"},
    "models": {MODEL: {"aliases": ["llama"], "pool": "demo", "price": {"input": 1.0, "output": 2.0}}},
    "plans": {"free": {"limits": []}},
    "teams": {
        "research": {"organisation": "acme", "plan": "free"},
        "support": {"organisation": "acme", "plan": "free"},
    },
}


@dataclass
class House:
    """A served gateway and what a test asks of it."""

    url: str
    gateway: app.Gateway
    settings: Settings

    async def key(self, team: str = "research", **given: Any) -> str:
        defaults: dict[str, Any] = {"user": None, "name": None, "models": (), "expires": None}
        _, key = await self.gateway.keys.create(team, **{**defaults, **given})
        return key

    def client(self, key: str | None = None, **given: Any) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # It speaks plain HTTP: to read what a client would trust takes 36 ms each time.
        return httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, verify=False, timeout=30, **given)

    @asynccontextmanager
    async def caller(
        self, key: str, body: bytes, *fields: bytes, path: bytes = b"/v1/completions"
    ) -> AsyncIterator[Caller]:
        """A raw connection on which one request has been sent; a framing among the fields stands for the body's own."""
        port = int(self.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = [b"POST " + path + b" HTTP/1.1", b"host: gateway", b"authorization: Bearer " + key.encode(), *fields]
        if not any(field.startswith((b"content-length", b"transfer-encoding")) for field in fields):
            head.append(b"content-length: %d" % len(body))
        try:
            writer.write(b"\r\n".join((*head, b"", body)))
            yield Caller(reader, writer)
        finally:
            writer.transport.abort()

    def documents(self, documents: Mapping[str, Any]) -> None:
        """Write other policies; they hold when the gateway reads them."""
        (self.settings.policies / "all.yaml").write_text(yaml.safe_dump(dict(documents), sort_keys=False))

    async def settled(self) -> None:
        """Until every request that has ended is settled."""
        while not self.gateway.admission.idle:
            await asyncio.sleep(0.005)


@dataclass
class Caller:
    """A caller without an HTTP library between it and the bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> bytes:
        """The head of the answer, with its blank line."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return await self.reader.read()


def documents(upstreams: list[str], **sections: Any) -> dict[str, Any]:
    """DOCUMENTS with a demo pool of these addresses; a section that is given takes the place of its default."""
    pools = {"demo": {"upstreams": [{"url": url} for url in upstreams], "forward_headers": ["x-echo"]}}
    return {**deepcopy(DOCUMENTS), "pools": pools, **sections}


@asynccontextmanager
async def served(application: Any) -> AsyncIterator[str]:
    """The address of an ASGI application that is served in this event loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config(application, drain=5))
    task = asyncio.ensure_future(server._serve([listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.001)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await task


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """The address of a scripted backend."""
    async with served(create_app()) as url:
        yield url


@asynccontextmanager
async def gateway(store_url: str, policies: Mapping[str, Any], **given: Any) -> AsyncIterator[House]:
    """A served gateway on a store. Its deadline is lax: these machines are noisy, and 50 ms is not what is tested."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "policies"
        directory.mkdir()
        (directory / "all.yaml").write_text(yaml.safe_dump(dict(policies), sort_keys=False))
        settings = Settings.read(
            {},
            **{
                "policies": directory,
                "state": Path(folder),
                "key_pepper": "of the tests",
                "store_deadline": 5.0,
                **given,
            },
        )
        async with app.opened(settings, store_url) as opened, served(opened) as url:
            yield House(url, opened, settings)


# — stores


@dataclass(frozen=True)
class Server:
    """A Valkey or Redis of a test's own, on a socket in a folder."""

    url: str
    process: subprocess.Popen[bytes]

    def sync(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)


def start(binary: str, folder: str) -> Server:
    """A store without persistence, and its socket in this folder; it answers."""
    path = os.path.join(folder, "s")  # noqa: PTH118 - short: a socket's path has 107 bytes
    command = [binary, "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 10
    with redis.Redis(unix_socket_path=path) as client:
        while True:
            try:
                client.ping()
            except redis.exceptions.ConnectionError:
                if process.poll() is not None or time.monotonic() > patience:
                    raise
                time.sleep(0.005)
            else:
                return Server(f"unix://{path}", process)


@contextmanager
def server(binary: str) -> Iterator[Server]:
    """A store without persistence, until the block is left."""
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        server = start(binary, folder)
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()

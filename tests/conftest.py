"""What every test may use: the event loop of production, and stores that really run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from gateway.embedded import _server_binary
from tests.proving import house


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def valkey() -> Iterator[house.Server]:
    """A Valkey for the whole session; `store_url` empties it for each test."""
    with house.server(_server_binary()) as server:
        yield server


@pytest.fixture
def store_url(valkey: house.Server) -> str:
    """The address of an empty store."""
    with valkey.sync() as client:
        client.flushall()
    return valkey.url


@pytest.fixture(scope="session")
def redis7() -> Iterator[house.Server]:
    """Debian's Redis 7."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    with house.server(binary) as server:
        yield server


@pytest.fixture(params=["valkey", "redis7"])
def either_store_url(request: pytest.FixtureRequest) -> str:
    """The address of an empty store, once a Valkey and once a Redis 7."""
    server: house.Server = request.getfixturevalue(request.param)
    with server.sync() as client:
        client.flushall()
    return server.url

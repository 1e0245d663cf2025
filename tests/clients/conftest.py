"""One served gateway for all of this directory, with a scripted backend behind it."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import pytest

from tests.clients import served
from tests.clients.sdks import ALIAS, ANTHROPIC, MODEL, NEWER, OTHER, SDKS, Caller, Sdk

# Each test is a user of its own, so that no test takes another one's share.
PLANS = {
    "roomy": {
        "limits": [
            {"name": "requests", "count": "requests", "rate": "100000/minute", "per": ["team"]},
            # Not `max`, for which the backend would be told a bound that the caller does not name.
            {
                "name": "tokens",
                "count": "total_tokens",
                "rate": "1000000000/minute",
                "per": ["team"],
                "reserve": "expected",
            },
        ]
    },
    "one-at-a-time": {
        "limits": [{"name": "steps", "count": "requests", "rate": "5/second", "burst": 1, "per": ["user"]}]
    },
    "one-for-all": {"limits": [{"name": "only", "count": "requests", "quota": "1/month", "per": ["user"]}]},
}


def policies(backend: str) -> dict[str, Any]:
    """Three models on one backend, and a team for each plan, called as the plan."""
    price = {"input": 1.0, "output": 2.0}
    return {
        "models": {
            MODEL: {"aliases": [ALIAS], "family": "qwen3", "pool": "demo", "price": price},
            OTHER: {"pool": "demo", "price": price},
            NEWER: {"pool": "demo", "price": price},
        },
        "families": {"qwen3": {"reasoning_effort": ["none", "low", "medium", "high", "integer", "boolean"]}},
        "pools": {"demo": {"upstreams": [{"url": backend}]}},
        "plans": PLANS,
        "teams": {plan: {"organisation": "acme", "plan": plan} for plan in PLANS},
    }


@pytest.fixture(scope="package", autouse=True)
def loopback() -> Iterator[None]:
    """Clients speak plain HTTP to the loopback: past any proxy, and with one TLS context, 50 ms each, for them all."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="package")
def backend() -> Iterator[served.Backend]:
    with served.backend() as backend:
        yield backend


@pytest.fixture(scope="package")
def gateway(backend: served.Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[served.Served]:
    with served.gateway(tmp_path_factory.mktemp("gateway"), policies(backend.url)) as gateway:
        yield gateway


@pytest.fixture(params=SDKS)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """Each of the four kinds of client in turn, where a test names no others."""
    return (SDKS | ANTHROPIC)[request.param]


@pytest.fixture
async def caller(sdk: Sdk, gateway: served.Served) -> AsyncIterator[Caller]:
    """A client with a key that has room."""
    async with sdk.caller(gateway.url, gateway.key("roomy")) as caller:
        yield caller

"""What the doctor finds of upstreams, over real sockets and real TLS."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.doctor import beside
from gateway.findings import Finding
from gateway.reading import read
from gateway.reload import policies_of
from gateway.upstreamcheck import each, upstream_findings
from gateway.wire import trusting
from tests.proving.backend import Backend, Peer, ok
from tests.proving.house import DOCUMENTS

SECRET = "sk-the-credential-of-the-tests"
Told = list[tuple[str, str, str]]


async def findings(folder: Path, pool: dict[str, Any]) -> list[Finding]:
    """What is said of the first upstream of a pool."""
    (folder / "all.yaml").write_text(yaml.safe_dump({**DOCUMENTS, "pools": {"demo": pool}}))
    policies = policies_of(read(folder))
    (name, upstream, policy, own), *_ = each(policies)
    try:
        return await upstream_findings(name, upstream, policy, own, beside)
    finally:
        await policies.pools.retire()


def told(found: list[Finding]) -> Told:
    return [(one.check, one.verdict, one.found) for one in found]


def connected(found: list[Finding]) -> bool:
    return any(one.check == "upstream.connect" and one.verdict == "ok" for one in found)


def answer(status: bytes) -> bytes:
    return b"HTTP/1.1 " + status + b" -\r\ncontent-length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("probe", "path", "status", "check", "verdict", "found"),
    [
        (None, b"/v1/models", b"200", "upstream.answer", "ok", "GET /v1/models: HTTP 200"),
        (None, b"/v1/models", b"404", "upstream.answer", "ok", "GET /v1/models: HTTP 404"),
        (None, b"/v1/models", b"502", "upstream.answer", "error", "GET /v1/models: HTTP 502"),
        (None, b"/v1/models", b"301", "upstream.answer", "error", "GET /v1/models: HTTP 301: it sends elsewhere"),
        (None, b"/v1/models", b"407", "upstream.credential", "error", "GET /v1/models: HTTP 407: refused"),
        ("/health", b"/health", b"204", "upstream.answer", "ok", "GET /health: HTTP 204"),
        ("/health", b"/health", b"404", "upstream.answer", "error", "GET /health: HTTP 404"),
        (None, b"/v1/models", b"401", "upstream.credential", "error", "GET /v1/models: HTTP 401: refused"),
        ("/health", b"/health", b"403", "upstream.credential", "error", "GET /health: HTTP 403: refused"),
    ],
)
async def test_an_upstream_is_asked_as_it_is_probed_and_its_answer_is_judged(
    tmp_path: Path, probe: str | None, path: bytes, status: bytes, check: str, verdict: str, found: str
) -> None:
    async with Backend(Peer.request, answer(status)) as backend:
        health = {} if probe is None else {"health": {"probe": probe}}
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url}], **health})
    assert connected(said)
    assert told(said)[-1] == (check, verdict, found)
    assert [request.line for request in backend.requests] == [b"GET " + path + b" HTTP/1.1"]


@pytest.mark.parametrize(
    ("api", "header"), [("fireworks", (b"authorization", b"Bearer ")), ("anthropic", (b"x-api-key", b""))]
)
async def test_the_credential_is_sent_to_the_upstream_and_told_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: str, header: tuple[bytes, bytes]
) -> None:
    monkeypatch.setenv("OF_THE_TESTS", f" {SECRET}\n")
    async with Backend(Peer.request, answer(b"401")) as backend:
        said = await findings(tmp_path, {"api": api, "upstreams": [{"url": backend.url, "key_env": "OF_THE_TESTS"}]})
    name, before = header
    assert dict(backend.requests[0].headers)[name] == before + SECRET.encode()
    assert told(said)[0] == ("upstream.credential", "ok", "OF_THE_TESTS is set")
    assert (said[-1].verdict, said[-1].do) == ("error", "the credential in OF_THE_TESTS")
    assert SECRET not in repr(said)


async def test_a_credential_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TESTS", " ")
    async with Backend(Peer.request, ok(b"{}")) as backend:
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url, "key_env": "OF_THE_TESTS"}]})
    assert told(said)[0] == ("upstream.credential", "error", "OF_THE_TESTS is empty")


async def test_the_base_of_an_upstream_stands_before_its_list_of_models(tmp_path: Path) -> None:
    async with Backend(Peer.request, ok(b"{}")) as backend:
        said = await findings(tmp_path, {"upstreams": [{"url": f"{backend.url}/inference/"}]})
    assert said[-1].found == "GET /inference/v1/models: HTTP 200"


# — what cannot be reached


async def test_an_upstream_that_is_not_there_is_not_asked_further(tmp_path: Path) -> None:
    said = await findings(tmp_path, {"upstreams": [{"url": "http://127.0.0.1:1"}]})
    assert told(said) == [("upstream.connect", "error", "it refuses the connection")]


async def test_a_name_that_nobody_knows_is_told(tmp_path: Path) -> None:
    said = await findings(tmp_path, {"upstreams": [{"url": "http://no-such-host.invalid:80"}], "timeouts": LONG})
    assert told(said) == [("upstream.connect", "error", "no-such-host.invalid has no address")]


LONG = {"connect": "15s"}


async def test_one_that_takes_connections_and_says_nothing_is_waited_for_as_long_as_a_probe(tmp_path: Path) -> None:
    async with Backend(Peer.request, Peer.hung_up) as backend:
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url}], "health": {"probe_timeout": "300ms"}})
    assert connected(said)
    last = told(said)[-1]
    assert last[:2] == ("upstream.answer", "error")
    assert "in time" in last[2]


async def test_one_that_is_no_http_is_told(tmp_path: Path) -> None:
    async with Backend(Peer.request, b"220 ready\r\n") as backend:
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url}]})
    assert told(said)[-1] == (
        "upstream.answer",
        "error",
        "GET /v1/models: the upstream's answer is not valid HTTP/1.1",
    )


async def test_what_is_drained_may_be_broken(tmp_path: Path) -> None:
    said = await findings(tmp_path, {"upstreams": [{"url": "http://127.0.0.1:1", "drain": True}]})
    assert told(said) == [("upstream.connect", "warning", "it refuses the connection (it is drained)")]


# — TLS


def issued(folder: Path, days: int) -> tuple[ssl.SSLContext, Path]:
    """A server for localhost with a certificate of so many days, and the PEM file that vouches for it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    pem = folder / f"{days}.pem"
    words = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {pem}.key -out {pem} "
    names = f"-subj /CN=localhost -addext subjectAltName=DNS:localhost -days {days}"
    subprocess.run((words + names).split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, f"{pem}.key")
    return context, pem


@pytest.mark.parametrize(("days", "verdict"), [(90, "ok"), (20, "warning"), (2, "error")])
async def test_days_that_a_certificate_has_left_are_counted(tmp_path: Path, days: int, verdict: str) -> None:
    context, pem = issued(tmp_path, days)
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        tls = {"ca": str(pem), "server_name": "localhost"}
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url}], "tls": tls})
    one = next(one for one in said if one.check == "upstream.certificate")
    assert (one.verdict, one.found) == (verdict, f"its certificate has {days} days left")
    assert (said[-1].check == "upstream.answer") == (verdict != "error")


async def test_a_certificate_that_nobody_vouches_for_is_told(tmp_path: Path) -> None:
    context, _ = issued(tmp_path, 90)
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url}]})
    assert [(one.check, one.verdict) for one in said] == [("upstream.certificate", "error")]
    assert "self-signed certificate" in said[0].found


async def test_what_is_trusted_is_read_once_and_not_in_the_time_to_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes some 40 ms: sixty upstreams at once were out of time before they began."""
    context, pem = issued(tmp_path, 90)
    read = []

    def slow(*files: str | None) -> ssl.SSLContext:
        read.append(files)
        time.sleep(0.7)
        return trusting(*files)

    monkeypatch.setattr("gateway.upstreamcheck._read", lru_cache(slow))
    async with Backend(Peer.request, ok(b"{}"), tls=context) as backend:
        tls = {"ca": str(pem), "server_name": "localhost"}
        pool = {"upstreams": [{"url": backend.url}], "tls": tls, "timeouts": {"connect": "500ms"}}
        said = await asyncio.gather(*(findings(tmp_path, pool) for _ in range(3)))
    assert [connected(one) for one in said] == [True] * 3
    assert read == [(str(pem), None, None)]


async def test_one_that_does_not_speak_tls_is_told(tmp_path: Path) -> None:
    async with Backend(b"220 ready\r\n") as backend:
        said = await findings(tmp_path, {"upstreams": [{"url": backend.url.replace("http:", "https:")}]})
    ((check, verdict, found),) = told(said)
    assert (check, verdict) == ("upstream.connect", "error")
    assert found.startswith("it does not speak TLS as expected")

"""What the doctor finds of ports: free ones, those that somebody has, and those of a gateway, ready or not."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from gateway.findings import Finding
from gateway.portcheck import control_port, data_port
from tests.proving.house import served

HOST = "127.0.0.1"
NAME = Path("/proc/self/comm").read_text().strip()


def told(finding: Finding) -> tuple[str, str]:
    return finding.verdict, finding.found


def test_a_free_port_is_free_and_any_will_do() -> None:
    with socket.create_server((HOST, 0)) as taken:
        number = taken.getsockname()[1]
    assert told(data_port(HOST, number)) == ("ok", "free")
    assert told(data_port(HOST, 0)) == ("ok", "any that is free")
    assert told(control_port(HOST, 0, (HOST, 0))) == ("ok", "any that is free")


def test_a_port_that_somebody_has_is_told_with_his_name_and_that_he_is_silent() -> None:
    with socket.create_server((HOST, 0)) as taken:
        number = taken.getsockname()[1]
        one = control_port(HOST, number, (HOST, 0))
    assert told(one) == ("error", f"taken by {NAME}, process {os.getpid()}, which does not answer within 1 s")
    assert (one.of, one.do[-21:]) == (f"control plane {HOST}:{number}", "or GATEWAY_ADMIN_PORT")


def test_an_address_of_another_machine_is_told_with_what_names_it() -> None:
    data, control = data_port("192.0.2.1", 8080), control_port("192.0.2.1", 9090, ("192.0.2.1", 8080))
    assert told(data) == told(control) == ("error", "cannot assign requested address")
    assert (data.do, control.do) == ("GATEWAY_HOST or GATEWAY_PORT", "GATEWAY_ADMIN_HOST or GATEWAY_ADMIN_PORT")


@pytest.mark.parametrize(
    ("data", "control", "verdict"),
    [
        ("127.0.0.1", "127.0.0.1", "error"),
        ("0.0.0.0", "127.0.0.1", "error"),
        ("127.0.0.1", "::", "error"),
        ("127.0.0.1", "127.0.0.2", "ok"),
    ],
)
def test_both_planes_cannot_have_one_port(data: str, control: str, verdict: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        number = taken.getsockname()[1]
    assert control_port(control, number, (data, number)).verdict == verdict


@pytest.mark.parametrize(
    ("live", "ready", "verdict", "found"),
    [
        (b'{"status":"alive"}', b'{"reasons":[]}', "ok", "a gateway listens there, and is ready"),
        (
            b'{"status":"alive"}',
            b'{"reasons":["draining","the store does not answer"]}',
            "error",
            "a gateway listens there, and is not ready: draining; the store does not answer",
        ),
        (b'{"status":"alive"}', b"[]", "error", None),
        (b'{"status":"up"}', b'{"reasons":[]}', "error", None),
        (b"nothing", b"", "error", None),
        (b"[" * 9000, b"", "error", None),
    ],
)
async def test_a_port_that_a_gateway_has_is_well_when_it_is_ready(
    live: bytes, ready: bytes, verdict: str, found: str | None
) -> None:
    async def answer(scope: dict[str, object], receive: object, send: object) -> None:
        body = live if scope["path"] == "/healthz/live" else ready
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
        await send(start)  # type: ignore[operator]
        await send({"type": "http.response.body", "body": body})  # type: ignore[operator]

    async with served(answer) as url:
        one = await asyncio.to_thread(data_port, HOST, int(url.rpartition(":")[2]))
    assert told(one) == (verdict, found or f"taken by {NAME}, process {os.getpid()}")

"""The sinks that exports of the policies name, and secrets that are rotated while rows go there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from gateway.delivery import Sink, Unavailable
from gateway.language import Export
from gateway.receivers import sink_of
from tests.proving.backend import Backend, forever, ok
from tests.proving.commands import ROOT
from tests.proving.rows import row

TOKEN = "om_4f1c0b6f2d"
DSN = "postgresql://me@warehouse/x"
ENVIRONMENT = {"WAREHOUSE_DSN": f"{DSN}\n", "OPENMETER_TOKEN": f"{TOKEN}\n"}


def policy(to: str, **given: Any) -> Export:
    """As the policies have it."""
    needed: dict[str, dict[str, Any]] = {
        "jsonl": {"folder": "/var/lib/usage"},
        "postgres": {} if "dsn_file" in given else {"dsn_env": "WAREHOUSE_DSN"},
        "cloudevents": {"url": "https://openmeter.example/api/v1/events"},
    }
    export: Export = TypeAdapter(Export).validate_python({"to": to, **needed[to], **given})
    return export


@pytest.mark.parametrize(
    ("to", "given", "expected"),
    [
        ("jsonl", {}, "<JsonLines /var/lib/usage, no file>"),
        ("postgres", {"table": "metering.usage"}, "<Postgres metering.usage, not connected>"),
        ("cloudevents", {"token_env": "OPENMETER_TOKEN"}, "<CloudEvents to openmeter.example>"),
        ("cloudevents", {}, "<CloudEvents to openmeter.example>"),
    ],
)
def test_an_export_of_the_policies_has_its_sink(to: str, given: dict[str, Any], expected: str) -> None:
    assert repr(sink_of(policy(to, **given), ENVIRONMENT)) == expected


@pytest.mark.parametrize(
    ("to", "given", "told"),
    [
        ("postgres", {}, "the variable WAREHOUSE_DSN is not set, expected for example postgresql://"),
        ("cloudevents", {"token_env": "OPENMETER_TOKEN"}, "the variable OPENMETER_TOKEN is not set, expected a token"),
    ],
)
@pytest.mark.parametrize("environment", [{}, {"WAREHOUSE_DSN": " ", "OPENMETER_TOKEN": "\n"}])
def test_a_variable_that_is_not_set_is_named(
    to: str, given: dict[str, Any], told: str, environment: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=f"^{told}"):
        sink_of(policy(to, **given), environment)


# — a secret in a file


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text("first\n")
    return file


def rotate(file: Path, secret: str | None) -> None:
    """As it is mounted: another file in its place, or none."""
    if secret is None:
        file.unlink()
    else:
        (file.parent / "next").write_text(secret)
        (file.parent / "next").rename(file)


async def test_what_is_rotated_is_sent_with_the_next_batch(secret: Path) -> None:
    async with Backend(forever(lambda peer: peer.request(), ok(b""))) as backend:
        sink = sink_of(policy("cloudevents", url=backend.url, token_file=str(secret)), {})
        await sink.open()
        for number, token in enumerate(("first", "second", "second")):
            rotate(secret, token)
            await sink.deliver([row(number)])
        await sink.aclose()
    sent = [dict(request.headers)[b"authorization"] for request in backend.requests]
    assert sent == [b"Bearer first", b"Bearer second", b"Bearer second"]


async def test_a_file_that_is_not_there_for_a_while_is_waited_for(secret: Path) -> None:
    async with Backend(forever(lambda peer: peer.request(), ok(b""))) as backend:
        sink: Sink = sink_of(policy("cloudevents", url=backend.url, token_file=str(secret)), {})
        await sink.open()
        for wrong, told in (("", "holds nothing"), ("two words", "no header can hold"), (None, "No such file")):
            rotate(secret, wrong)
            with pytest.raises(Unavailable, match=f"^{re.escape(str(secret))}: .*{told}") as failure:
                await sink.deliver([row(1)])
            assert not wrong or wrong not in str(failure.value)
        rotate(secret, "third")
        await sink.deliver([row(1)])
        await sink.aclose()
    (request,) = backend.requests
    assert dict(request.headers)[b"authorization"] == b"Bearer third"


def test_a_database_is_reached_by_what_a_file_says(secret: Path) -> None:
    secret.write_text(f"{DSN}\n")
    sink = sink_of(policy("postgres", dsn_file=str(secret)), {})
    assert repr(sink) == f"<Postgres usage, not connected> by {secret}"


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (None, r" cannot be read \(No such file or directory\), expected a secret"),
        ("", ": holds nothing, expected a secret"),
        ("host=warehouse password='hunter2", ": the DSN cannot be read, expected for example postgresql://"),
    ],
)
def test_a_file_that_is_wrong_at_the_start_is_told(secret: Path, held: str | None, told: str) -> None:
    rotate(secret, held)
    with pytest.raises(ValueError, match=f"^{re.escape(str(secret))}{told}") as failure:
        sink_of(policy("postgres", dsn_file=str(secret)), {})
    assert "hunter2" not in str(failure.value)


# — packages


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "gateway.postgres", raising=False)
    told = "psycopg is not installed: install psycopg[binary] (the extra `postgres` of this package)"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        sink_of(policy("postgres"), ENVIRONMENT)


def test_psycopg_is_loaded_only_where_an_export_asks_for_it() -> None:
    script = "import sys, gateway.receivers; print('psycopg' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    assert said.stdout == b"False\n"

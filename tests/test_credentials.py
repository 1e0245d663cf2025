"""Secrets that policies name: what is taken of a variable and of a file, and what is said of one that holds none."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from gateway.credentials import files_named, secrets_of, wrong_certificates
from gateway.snapshot import Snapshot
from tests.test_pools import snapshot
from tests.test_wire import server_tls

HOOK = "whsec_" + b64encode(b"x" * 32).decode()


def keyed(**own: Any) -> Snapshot:
    return snapshot({"demo": {"upstreams": [{"url": "http://a"}, {"url": "http://b", **own}]}})


def hooked(**own: Any) -> Snapshot:
    webhook = {"url": "https://hooks.example.com", **own}
    return snapshot({"demo": {"upstreams": [{"url": "http://a"}]}}, gateway={"webhook": webhook})


def test_a_secret_is_taken_without_the_blanks_around_it(tmp_path: Path) -> None:
    """As a file that is mounted as a secret ends with a line's end."""
    file = tmp_path / "key"
    file.write_text(" from a file\r\n")
    assert secrets_of(keyed(key_env="KEY"), {"KEY": "from a variable\n"}) == ({"KEY": "from a variable"}, [])
    assert secrets_of(keyed(key_file=str(file)), {"KEY": "another"}) == ({str(file): "from a file"}, [])


def test_a_variable_may_be_empty_and_a_file_may_not(tmp_path: Path) -> None:
    file = tmp_path / "key"
    assert secrets_of(keyed(key_env="KEY"), {}) == ({"KEY": ""}, [])
    place = "pools.demo.upstreams[1].key_file"
    missing = f"{place}: {file} cannot be read (No such file or directory), expected a secret"
    assert secrets_of(keyed(key_file=str(file)), {}) == ({}, [missing])
    file.write_text(" \n")
    assert secrets_of(keyed(key_file=str(file)), {}) == ({}, [f"{place}: {file} holds nothing, expected a secret"])


@pytest.mark.parametrize("secret", ["two\nlines", "sécret", "a\tb"])
def test_a_credential_that_no_header_carries_is_told_and_not_repeated(tmp_path: Path, secret: str) -> None:
    file = tmp_path / "key"
    file.write_text(secret)
    for found in (secrets_of(keyed(key_env="KEY"), {"KEY": secret}), secrets_of(keyed(key_file=str(file)), {})):
        ((mistake,), secrets) = found[::-1]
        assert mistake.endswith(" holds no credential, expected printable ASCII")
        assert secrets == {}
        assert secret not in mistake


def test_the_secret_of_a_webhook_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "hook"
    file.write_text(HOOK + "\n")
    assert secrets_of(hooked(secret_file=str(file)), {}) == ({str(file): HOOK}, [])
    assert secrets_of(hooked(secret_env="HOOK"), {"HOOK": HOOK}) == ({"HOOK": HOOK}, [])
    file.write_text("a secret of another kind")
    wrong = "is no secret of a webhook, expected whsec_ and base64 of 24 to 64 bytes"
    assert secrets_of(hooked(secret_file=str(file)), {})[1] == [f"gateway.webhook.secret_file: {file} {wrong}"]
    assert secrets_of(hooked(secret_env="HOOK"), {})[1] == [f"gateway.webhook.secret_env: HOOK {wrong}"]


def test_all_files_are_named_once(tmp_path: Path) -> None:
    tls = {"ca": "/ca", "certificate": "/certificate", "key": "/key"}
    upstreams = [{"url": "https://a", "key_file": "/a"}, {"url": "https://b", "key_file": "/a"}]
    upstreams.append({"url": "https://c", "key_env": "C"})
    webhook = {"url": "https://hooks.example.com", "secret_file": "/hook"}
    found = snapshot({"demo": {"upstreams": upstreams, "tls": tls}}, gateway={"webhook": webhook})
    assert files_named(found) == {"/ca", "/certificate", "/key", "/a", "/hook"}


def test_a_certificate_that_is_none_is_told_with_its_pool_and_file(tmp_path: Path) -> None:
    _, pem = server_tls(tmp_path)
    upstreams = [{"url": "https://a"}]
    assert wrong_certificates(snapshot({"demo": {"upstreams": upstreams, "tls": {"ca": str(pem)}}})) == []
    pem.write_text("nothing")
    assert wrong_certificates(snapshot({"demo": {"upstreams": upstreams, "tls": {"ca": str(pem)}}})) == [
        f"pools.demo.tls: {pem}: holds no certificates, expected PEM"
    ]
    pem.unlink()
    assert wrong_certificates(snapshot({"demo": {"upstreams": upstreams, "tls": {"ca": str(pem)}}})) == [
        f"pools.demo.tls: {pem} cannot be read (No such file or directory)"
    ]

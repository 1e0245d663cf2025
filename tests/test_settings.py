"""The environment: each field is one GATEWAY_ variable, and what cannot be read is told without a secret."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings, SettingsError, admin_key, hosts, pepper

READ: dict[str, tuple[str, Any]] = {
    "policies": ("/etc/gateway", Path("/etc/gateway")),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("9000", 9000),
    "state": ("/var/lib/gateway", Path("/var/lib/gateway")),
    "redis_url": ("rediss://:pass@valkey:6380/1", "rediss://:pass@valkey:6380/1"),
    "key_pepper": ("of the tests", "of the tests"),
    "spool_most": ("2097152", 2 << 20),
    "admin_key": ("of-the-tests", "of-the-tests"),
    "store_deadline": ("0.25", 0.25),
    "workers": ("4", 4),
    "admin_host": ("::1", "::1"),
    "admin_port": ("9191", 9191),
    "drain_delay": ("2.5", 2.5),
    "drain": ("5", 5.0),
    "log": ("json", "json"),
}

A_TIME = "expected a number from 0.001 to 60"
AN_ADDRESS = (
    "an address that begins with redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://, "
    "redis+cluster://, rediss+cluster://"
)
A_PORT = "a host, and a port that is a number"
A_SERVICE = "at its end the name of the service that the Sentinels watch: redis+sentinel://host:port/service"
ONE_HOST = "one host; an address of several begins with redis+sentinel:// or redis+cluster://"
A_HASH = "%23 for a # in a password"
AN_OPTION = (
    "after a ? one of client_name, db, password, username, each with a value that fits; %3F for a ? in a password"
)
A_TLS_OPTION = AN_OPTION.replace(
    "username,",
    "username, ssl_cert_reqs, ssl_check_hostname, ssl_ca_certs, ssl_ca_path, ssl_certfile, ssl_keyfile, ssl_password,",
)
WRONG_ADDRESSES = {
    "http://:canary@valkey": AN_ADDRESS,
    "canary": AN_ADDRESS,
    "redis://": AN_ADDRESS,
    "redis+cluster+sentinel://canary/limits": AN_ADDRESS,
    "redis://:canary@valkey:canary": A_PORT,
    "redis://:canary@valkey:0": A_PORT,
    "redis://:canary@:6379": A_PORT,
    "redis+cluster://:canary@one:1,two:canary": A_PORT,
    "redis+cluster://:canary@one:1,": A_PORT,
    "redis+sentinel://:canary@one:1,two:65536/limits": A_PORT,
    "redis+sentinel://:canary@one,two": A_SERVICE,
    "rediss+sentinel://:canary@one,two/": A_SERVICE,
    "redis://:canary@one,two": ONE_HOST,
    "redis://:canary@one/canary": "a database that is a number",
    "redis+sentinel://one/limits/canary": "a database that is a number",
    "redis://u:12#canary@one": A_HASH,
    "redis://:canary@one?foo=bar": AN_OPTION,
    "redis://one?canary=": AN_OPTION,
    "redis://:canary@one?db=canary": AN_OPTION,
    "redis://u:12?canary@one": AN_OPTION,
    "redis+cluster://one?socket_timeout=1": AN_OPTION,
    "redis://one?ssl_ca_certs=/canary": AN_OPTION,
    "unix:///run/valkey.sock?path=/canary": AN_OPTION,
    "rediss://one?ssl_cert_reqs=canary": A_TLS_OPTION,
    "redis+cluster://:canary@one/1": "no database, or 0: a cluster has no other",
}
ADDRESSES = [
    "redis://valkey",
    "rediss://user:p%40ss@valkey:6380/1?ssl_cert_reqs=none",
    "rediss://[::1]:6379",
    "unix:///run/valkey.sock",
    "redis+sentinel://one,two:26380,[fd00::3]:26379/limits",
    "rediss+sentinel://user:pass@one:1/limits/3",
    "redis+cluster://one",
    "redis://one?db=3&client_name=gateway",
    "rediss+sentinel://one/limits?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=false&password=p%23ss",
    "rediss+cluster://:pass@one:1,two:2/0",
]
MISTAKES = {
    ("port", "http"): 'GATEWAY_PORT is "http", expected a whole number',
    ("port", "80.5"): 'GATEWAY_PORT is "80.5", expected a whole number',
    ("port", "65536"): 'GATEWAY_PORT is "65536", expected a number from 0 to 65535',
    ("store_deadline", "50ms"): 'GATEWAY_STORE_DEADLINE is "50ms", expected a number',
    ("store_deadline", "0"): f'GATEWAY_STORE_DEADLINE is "0.0", {A_TIME}',
    ("store_deadline", "nan"): f'GATEWAY_STORE_DEADLINE is "nan", {A_TIME}',
    ("workers", "257"): 'GATEWAY_WORKERS is "257", expected a number from 0 to 256',
    ("admin_port", "nine"): 'GATEWAY_ADMIN_PORT is "nine", expected a whole number',
    ("drain_delay", "-1"): 'GATEWAY_DRAIN_DELAY is "-1.0", expected a number from 0 to 3600',
    ("drain", "inf"): 'GATEWAY_DRAIN is "inf", expected a number from 0 to 86400',
    **{
        ("admin_key", key): "GATEWAY_ADMIN_KEY is another value, "
        "expected printable ASCII without spaces, as it has to travel in a header"
        for key in ("canary key", "canary\n", "canäry")
    },
    ("log", "text"): 'GATEWAY_LOG is "text", expected one of auto, people, json',
    **{
        ("redis_url", address): f"GATEWAY_REDIS_URL is another value, expected {expected}"
        for address, expected in WRONG_ADDRESSES.items()
    },
}


def test_every_setting_is_tried_here() -> None:
    assert [setting.name for setting in fields(Settings)] == list(READ)


@pytest.mark.parametrize("name", READ)
def test_each_setting_is_one_variable(name: str) -> None:
    text, expected = READ[name]
    settings = Settings.read({f"GATEWAY_{name.upper()}": text})
    assert getattr(settings, name) == expected
    others = [setting.name for setting in fields(Settings) if setting.name != name]
    assert all(getattr(settings, other) == getattr(Settings(), other) for other in others)


@pytest.mark.parametrize("name", READ)
def test_an_empty_variable_is_none(name: str) -> None:
    assert Settings.read({f"GATEWAY_{name.upper()}": ""}) == Settings()


def test_what_is_given_wins_and_none_is_not_given() -> None:
    environment = {"GATEWAY_PORT": "9000", "GATEWAY_HOST": "0.0.0.0"}
    settings = Settings.read(environment, port=9001, host=None)
    assert (settings.port, settings.host) == (9001, "0.0.0.0")


def test_the_process_environment_is_read_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "9000")
    assert Settings.read().port == 9000


@pytest.mark.parametrize(("mistake", "expected"), MISTAKES.items())
def test_a_mistake_names_the_variable_what_was_found_and_what_was_expected(
    mistake: tuple[str, str], expected: str
) -> None:
    name, text = mistake
    with pytest.raises(SettingsError) as refused:
        Settings.read({f"GATEWAY_{name.upper()}": text})
    assert str(refused.value) == expected
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_kind_of_store_has_an_address(address: str) -> None:
    assert Settings.read({"GATEWAY_REDIS_URL": address}).redis_url == address


def test_the_hosts_of_an_address_have_the_port_that_is_meant_where_none_is_written() -> None:
    assert hosts("user:p@ss@one,two:7,[fd00::3]:8", 26379) == (("one", 26379), ("two", 7), ("fd00::3", 8))


def test_secrets_do_not_show() -> None:
    secrets = ("GATEWAY_KEY_PEPPER", "GATEWAY_ADMIN_KEY")
    settings = Settings.read({"GATEWAY_REDIS_URL": "redis://:canary@valkey", **dict.fromkeys(secrets, "canary")})
    assert "canary" not in repr(settings)
    assert settings.key_pepper == "canary"


def test_secrets_of_a_state_folder_are_made_once_for_us_alone_unless_they_are_set(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    kept = Settings.read({"GATEWAY_STATE": str(folder)})
    made = {"pepper": pepper(kept), "admin_key": admin_key(kept)}
    assert (pepper(kept), admin_key(kept)) == tuple(made.values()), "the same again"
    assert len({*made.values()}) == 2
    assert {file.name: (file.read_bytes(), file.stat().st_mode & 0o777) for file in folder.iterdir()} == {
        name: (secret, 0o600) for name, secret in made.items()
    }
    given = Settings.read(
        {"GATEWAY_STATE": str(tmp_path / "none"), "GATEWAY_KEY_PEPPER": "a", "GATEWAY_ADMIN_KEY": "b"}
    )
    assert (pepper(given), admin_key(given), (tmp_path / "none").exists()) == (b"a", b"b", False)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]

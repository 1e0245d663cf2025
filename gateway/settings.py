"""The environment, read once and frozen: addresses, secrets, paths. What is a rule stands in policies/, not here."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, urlsplit

LogFormat = Literal["auto", "people", "json"]

# The port that is meant where none is written.
STORES: Mapping[str, int] = {
    "redis": 6379,
    "rediss": 6379,
    "unix": 0,
    "redis+sentinel": 26379,
    "rediss+sentinel": 26379,
    "redis+cluster": 6379,
    "rediss+cluster": 6379,
}


# What may stand behind `?` there, and how its value looks; with TLS more.
_OPTIONS: Mapping[str, str] = {"client_name": r"\S+", "db": r"\d+", "password": ".*", "username": ".*"}
_TLS_OPTIONS: Mapping[str, str] = {
    **_OPTIONS,
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": "true|false",
    **dict.fromkeys(("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"), ".+"),
}


class SettingsError(Exception):
    """A variable that cannot be read; the text names it, what was found (never a secret) and what was expected."""


def hosts(netloc: str, default: int) -> tuple[tuple[str, int], ...]:
    """The hosts and ports of `user:password@host:port,host:port`. Raises ValueError."""
    found = []
    for part in netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{part}")
        if not one.hostname or one.port == 0:
            raise ValueError(f"{part!r} is no host and port")
        found.append((one.hostname, one.port or default))
    return tuple(found)


def _unfit_address(text: str) -> str | None:
    """What is expected of the address of a store, or None."""
    scheme, _, rest = text.partition("://")
    if scheme not in STORES or not rest:
        return f"an address that begins with {', '.join(f'{known}://' for known in STORES)}"
    unfit = _unfit_options(scheme, rest)
    if unfit is not None or scheme == "unix":
        return unfit
    try:
        parts = urlsplit(text)
        found = hosts(parts.netloc, STORES[scheme])
    except ValueError:
        return "a host, and a port that is a number"
    first, _, second = parts.path.strip("/").partition("/")
    service, database = (first, second) if scheme.endswith("+sentinel") else ("-", first)
    if not service:
        return "at its end the name of the service that the Sentinels watch: redis+sentinel://host:port/service"
    if len(found) > 1 and "+" not in scheme:
        return "one host; an address of several begins with redis+sentinel:// or redis+cluster://"
    if not (database or "0").isdecimal():
        return "a database that is a number"
    if scheme.endswith("+cluster") and int(database or 0):
        return "no database, or 0: a cluster has no other"
    return None


def _unfit_options(scheme: str, rest: str) -> str | None:
    """What is expected of what stands after `?`, or None."""
    if "#" in rest:
        return "%23 for a # in a password"
    options = _TLS_OPTIONS if scheme.startswith("rediss") else _OPTIONS
    for name, value in parse_qsl(rest.partition("?")[2], keep_blank_values=True):
        if name not in options or re.fullmatch(options[name], value) is None:
            return f"after a ? one of {', '.join(options)}, each with a value that fits; %3F for a ? in a password"
    return None


def _unfit_key(text: str) -> str | None:
    """What is expected of a key that travels in a header, or None."""
    fits = text.isascii() and text.isprintable() and " " not in text
    return None if fits else "printable ASCII without spaces, as it has to travel in a header"


def _setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    secret: bool = False,
    within: tuple[float, float] | None = None,
    unfit: Callable[[str], str | None] = lambda text: None,
) -> Any:
    """A field: its default, and what is known of it. `within` are the bounds of a number, both allowed; `unfit` says
    what is expected of a text that does not fit."""
    known = {"description": description, "unit": unit, "secret": secret, "within": within, "unfit": unfit}
    return field(default=default, repr=not secret, metadata=known)


@dataclass(frozen=True, slots=True)
class Settings:
    """One field, one GATEWAY_ variable of the same name in capitals."""

    policies: Path = _setting(Path("policies"), "directory of the policy documents")
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "port to listen on; 0: any free one", within=(0, 65535))
    state: Path = _setting(
        Path(".gateway"),
        "folder of the embedded store and its socket, the spools, the key pepper and the admin key",
    )
    redis_url: str = _setting(
        "",
        "an existing Valkey or Redis instead of the embedded one: redis://host:port, unix:///path, "
        "redis+sentinel://host:port,host:port/service, redis+cluster://host:port,host:port; with TLS rediss",
        secret=True,
        unfit=_unfit_address,
    )
    key_pepper: str = _setting(
        "",
        "secret that keys are hashed with, one for all gateways on one store; left out: made once, kept in the state "
        "folder",
        secret=True,
    )
    spool_most: int = _setting(
        256 * 1024 * 1024,
        "the most that a worker keeps of usage on the disk, while the store of limits is away",
        unit="bytes",
        within=(1 << 20, 1 << 40),
    )
    admin_key: str = _setting(
        "", "key of the control plane; left out: made once, kept in the state folder", secret=True, unfit=_unfit_key
    )
    store_deadline: float = _setting(
        0.05, "the most that a request waits for the store", unit="seconds", within=(0.001, 60)
    )
    workers: int = _setting(
        1,
        "processes that serve, under a supervisor and beside a control plane; 0: one alone, with neither",
        within=(0, 256),
    )
    admin_host: str = _setting("127.0.0.1", "address of the control plane")
    admin_port: int = _setting(9090, "port of the control plane; 0: any free one", within=(0, 65535))
    drain_delay: float = _setting(
        0.0,
        "how long requests are still taken after SIGTERM, while load balancers hear of it",
        unit="seconds",
        within=(0, 3600),
    )
    drain: float = _setting(30.0, "how long answers may go on after that", unit="seconds", within=(0, 86400))
    log: LogFormat = _setting("auto", "people (columns and colours), json, or auto: people on a terminal")

    @property
    def spools(self) -> Path:
        """The folder of what could not be told to the store."""
        return self.state / "spool"

    def environment(self) -> dict[str, str]:
        """The environment of this process with these settings in it, for processes that it starts."""
        ours = {f"GATEWAY_{setting.name.upper()}": str(getattr(self, setting.name)) for setting in fields(self)}
        return {**os.environ, **ours}

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """The settings of an environment; what is `given` and not None comes before it. Raises SettingsError."""
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for setting in fields(cls):
            name = f"GATEWAY_{setting.name.upper()}"
            if given.get(setting.name) is not None:
                values[setting.name] = given[setting.name]
            elif environment.get(name):  # an empty one is as good as none
                values[setting.name] = _parse(name, setting.default, environment[name])
            if setting.name in values and (expected := _unfit(setting.metadata, values[setting.name])):
                found = "another value" if setting.metadata["secret"] else f'"{values[setting.name]}"'
                raise SettingsError(f"{name} is {found}, expected {expected}")
        settings = cls(**values)
        if settings.log not in get_args(LogFormat):
            raise SettingsError(f'GATEWAY_LOG is "{settings.log}", expected one of {", ".join(get_args(LogFormat))}')
        return settings


def _parse(name: str, default: Any, text: str) -> Any:
    """The text of a variable as its field's type."""
    try:
        return type(default)(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[type(default)]
        raise SettingsError(f'{name} is "{text}", expected {expected}') from None


def _unfit(known: Mapping[str, Any], value: Any) -> str | None:
    """What is expected where a value does not fit, or None."""
    within = known["within"]
    if within is not None and not within[0] <= value <= within[1]:
        return f"a number from {within[0]} to {within[1]}"
    expected: str | None = known["unfit"](value)
    return expected


def pepper(settings: Settings) -> bytes:
    """The secret that keys and users are hashed with: the one that is set, or one made once in the state folder."""
    return settings.key_pepper.encode() or _kept(settings.state, "pepper")


def kept_pepper(settings: Settings) -> bytes | None:
    """The pepper that `pepper` would find; None where it would make one. Raises OSError where it cannot be read."""
    try:
        return settings.key_pepper.encode() or (settings.state / "pepper").read_bytes().strip()
    except FileNotFoundError:
        return None


def admin_key(settings: Settings) -> bytes:
    """What opens the control plane: the key that is set, or one made once in the state folder."""
    return settings.admin_key.encode() or _kept(settings.state, "admin_key")


def _kept(state: Path, name: str) -> bytes:
    """A secret of a state folder, made when it is first asked for: 64 hex digits in a file of our own."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = state / name
    if not file.exists():
        # Whoever comes second at the same moment takes what the first one made.
        draft = state / f"{name}.{os.getpid()}"
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_hex(32))
        with suppress(FileExistsError):
            file.hardlink_to(draft)
        draft.unlink()
    return file.read_bytes().strip()

"""The environment, read once and frozen: addresses, secrets, paths. What is a rule stands in policies/, not here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

LogFormat = Literal["auto", "people", "json"]


class SettingsError(Exception):
    """A variable that cannot be read; the text names it, what was found (never a secret) and what was expected."""


def _setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    secret: bool = False,
    within: tuple[float, float] | None = None,
    beginning: tuple[str, ...] = (),
) -> Any:
    """A field: its default, and what is known of it. `within` are the bounds of a number, both allowed."""
    known = {"description": description, "unit": unit, "secret": secret, "within": within, "beginning": beginning}
    return field(default=default, repr=not secret, metadata=known)


@dataclass(frozen=True, slots=True)
class Settings:
    """One field, one GATEWAY_ variable of the same name in capitals."""

    policies: Path = _setting(Path("policies"), "directory of the policy documents")
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "port to listen on; 0: any free one", within=(0, 65535))
    state: Path = _setting(Path(".gateway"), "folder of the embedded store, its socket and the key pepper")
    redis_url: str = _setting(
        "",
        "an existing Valkey or Redis (redis://, rediss://, unix://) instead of the embedded one",
        secret=True,
        beginning=("redis://", "rediss://", "unix://"),
    )
    key_pepper: str = _setting(
        "",
        "secret that keys are hashed with, one for all gateways on one store; left out: made once, kept in the state "
        "folder",
        secret=True,
    )
    store_deadline: float = _setting(
        0.05, "the most that a request waits for the store", unit="seconds", within=(0.001, 60)
    )
    drain: float = _setting(30.0, "how long answers may go on after SIGTERM", unit="seconds", within=(0, 86400))
    log: LogFormat = _setting("auto", "people (columns and colours), json, or auto: people on a terminal")

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
    within, beginning = known["within"], known["beginning"]
    if within is not None and not within[0] <= value <= within[1]:
        return f"a number from {within[0]} to {within[1]}"
    if beginning and not (value.startswith(beginning) and _parts(value)):
        return f"an address that begins with {', '.join(beginning)}, and a port that is a number"
    return None


def _parts(address: str) -> bool:
    try:
        return urlsplit(address).port != 0
    except ValueError:
        return False

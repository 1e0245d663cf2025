"""The environment, read once and frozen: addresses, secrets, paths. What is a rule stands in policies/, not here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

LogFormat = Literal["auto", "people", "json"]


class SettingsError(Exception):
    """A variable that cannot be read; the text names it, what was found (never a secret) and what was expected."""


def _setting(default: Any, description: str, *, unit: str = "", secret: bool = False) -> Any:
    return field(default=default, metadata={"description": description, "unit": unit, "secret": secret})


@dataclass(frozen=True, slots=True)
class Settings:
    """One field, one GATEWAY_ variable of the same name in capitals."""

    policies: Path = _setting(Path("policies"), "directory of the policy documents")
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8080, "port to listen on")
    state: Path = _setting(Path(".gateway"), "folder of the embedded store, its socket and the key pepper")
    redis_url: str = _setting(
        "", "an existing Valkey or Redis (redis://, rediss://, unix://) instead of the embedded one", secret=True
    )
    key_pepper: str = _setting(
        "",
        "secret that keys are hashed with, one for all gateways on one store; left out: made once, kept in the state folder",
        secret=True,
    )
    store_deadline: float = _setting(0.05, "the most that a request waits for the store", unit="seconds")
    drain: float = _setting(30.0, "how long answers may go on after SIGTERM", unit="seconds")
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
            elif name in environment:
                values[setting.name] = _parse(name, setting.default, setting.metadata["secret"], environment[name])
        settings = cls(**values)
        if settings.log not in get_args(LogFormat):
            raise SettingsError(f'GATEWAY_LOG is "{settings.log}", expected one of {", ".join(get_args(LogFormat))}')
        return settings


def _parse(name: str, default: Any, secret: bool, text: str) -> Any:
    """The text of a variable as its field's type."""
    try:
        return type(default)(text)
    except ValueError:
        found = "set" if secret else f'"{text}"'
        expected = {int: "a whole number", float: "a number"}[type(default)]
        raise SettingsError(f"{name} is {found}, expected {expected}") from None

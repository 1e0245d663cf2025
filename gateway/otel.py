"""OpenTelemetry's own variables, read once: whether traces are asked for, of which requests, and where they go.

The names are those of its specification, so that whoever runs a collector sets what he sets everywhere. What is not
known here is refused, and not taken for something else. Durations are in milliseconds, as the specification has them
(its SDK for Python reads the timeout in seconds): https://opentelemetry.io/docs/specs/otel/configuration/
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

from gateway.asgi import TOKEN
from gateway.settings import SettingsError

_LATEST = "gen_ai_latest_experimental"  # of OTEL_SEMCONV_STABILITY_OPT_IN

# Each as the share of new traces that is recorded, None: OTEL_TRACES_SAMPLER_ARG; and whether a caller's word for his
# own trace comes before it.
_SAMPLERS: Mapping[str, tuple[float | None, bool]] = {
    "always_on": (1.0, False),
    "always_off": (0.0, False),
    "traceidratio": (None, False),
    "parentbased_always_on": (1.0, True),
    "parentbased_always_off": (0.0, True),
    "parentbased_traceidratio": (None, True),
}


# Why spans are lost: there are too many, the collector is away or has no time, it does not take them, or they were left
# when the process ended.
Loss = Literal["queue_full", "unavailable", "refused", "ended"]
NO_LOSSES: Mapping[Loss, int] = MappingProxyType(dict.fromkeys(get_args(Loss), 0))


@dataclass(frozen=True, slots=True)
class Tracing:
    """What was asked for. Times are in seconds; `queue` and `batch` are spans."""

    endpoint: str
    headers: Mapping[str, str]
    resource: Mapping[str, str]  # what is said of this process
    ratio: float = 1.0
    by_parent: bool = True
    latest: bool = False  # the newest names of the GenAI conventions, or those of their version 1.36
    timeout: float = 10.0
    gzip: bool = False
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    queue: int = 2048
    batch: int = 512
    delay: float = 5.0

    def __repr__(self) -> str:
        return f"<Tracing to {self.where}, {self.ratio:g} of all>"  # the headers hold a key

    @property
    def where(self) -> str:
        """The collector's host and port, without what an address may hold beside it."""
        return urlsplit(self.endpoint).netloc.rpartition("@")[2]

    @classmethod
    def read(cls, environment: Mapping[str, str], version: str) -> Tracing | None:
        """What the variables ask for; None where that is no traces. Raises SettingsError."""
        if not _asked(environment):
            return None
        _word(environment, "PROTOCOL", "http/protobuf", ("http/protobuf",))
        ratio, by_parent = _sampler(environment)
        batch = _number(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, 1)
        return cls(
            endpoint=_endpoint(environment),
            headers=_headers(environment),
            resource=_resource(environment, version),
            ratio=ratio,
            by_parent=by_parent,
            latest=_LATEST in environment.get("OTEL_SEMCONV_STABILITY_OPT_IN", "").replace(" ", "").split(","),
            timeout=_number(environment, _own(environment, "TIMEOUT")[0], 10_000, 1) / 1000,
            gzip=_word(environment, "COMPRESSION", "none", ("none", "gzip")) == "gzip",
            ca=_own(environment, "CERTIFICATE")[1],
            certificate=_own(environment, "CLIENT_CERTIFICATE")[1],
            key=_own(environment, "CLIENT_KEY")[1],
            queue=int(_number(environment, "OTEL_BSP_MAX_QUEUE_SIZE", 2048, batch)),
            batch=int(batch),
            delay=_number(environment, "OTEL_BSP_SCHEDULE_DELAY", 5000, 1) / 1000,
        )

    def sampled(self, trace: bytes, parent: bool | None) -> bool:
        """Whether a trace (32 hex digits) is recorded; `parent` is the caller's word for it, if he has begun it.

        All who sample by the trace's id take the same ones: its last 64 bits are compared.
        """
        if self.by_parent and parent is not None:
            return parent
        return int(trace[16:], 16) < round(self.ratio * (1 << 64))


def _asked(environment: Mapping[str, str]) -> bool:
    """Whether there are to be traces: where it is said, or where it is said where they go."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter not in ("", "otlp", "none"):
        raise SettingsError(f'OTEL_TRACES_EXPORTER is "{exporter}", expected otlp or none')
    return exporter == "otlp" or (not exporter and _own(environment, "ENDPOINT")[1] is not None)


def _own(environment: Mapping[str, str], what: str) -> tuple[str, str | None]:
    """A variable of the exporter and its value: the one for traces before the one for all."""
    name = f"OTEL_EXPORTER_OTLP_TRACES_{what}"
    if not environment.get(name):
        name = f"OTEL_EXPORTER_OTLP_{what}"
    return name, environment.get(name) or None


def _endpoint(environment: Mapping[str, str]) -> str:
    name, address = _own(environment, "ENDPOINT")
    address = address or "http://localhost:4318"
    try:
        parts = urlsplit(address)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and _PLAIN.fullmatch(address)
    except ValueError:
        fits = False
    if not fits:  # it may hold a password
        raise SettingsError(f"{name} is no address, expected one like http://collector:4318")
    return address if "TRACES" in name else f"{address.rstrip('/')}/v1/traces"


def _word(environment: Mapping[str, str], what: str, default: str, known: tuple[str, ...]) -> str:
    name, found = _own(environment, what)
    if (word := (found or default).strip().lower()) not in known:
        raise SettingsError(f'{name} is "{word}", expected {" or ".join(known)}; without traces: {_WITHOUT}')
    return word


_WITHOUT = "OTEL_TRACES_EXPORTER=none"


def _number(environment: Mapping[str, str], name: str, default: float, least: float) -> float:
    text = environment.get(name) or str(default)
    try:
        if least <= (number := float(text)) < float("inf"):
            return number
    except ValueError:
        pass
    raise SettingsError(f'{name} is "{text}", expected a number from {least:g} on')


def _sampler(environment: Mapping[str, str]) -> tuple[float, bool]:
    name = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
    if name not in _SAMPLERS:
        raise SettingsError(f'OTEL_TRACES_SAMPLER is "{name}", expected one of {", ".join(_SAMPLERS)}')
    ratio, by_parent = _SAMPLERS[name]
    if ratio is None:
        ratio = _number(environment, "OTEL_TRACES_SAMPLER_ARG", 1, 0)
        if ratio > 1:
            raise SettingsError(f'OTEL_TRACES_SAMPLER_ARG is "{ratio:g}", expected a number from 0 to 1')
    return ratio, by_parent


def _headers(environment: Mapping[str, str]) -> dict[str, str]:
    name, text = _own(environment, "HEADERS")
    headers = {key.lower(): value for key, value in _pairs(name, text).items()}
    if not all(_TOKEN.fullmatch(key) and _VALUE.fullmatch(value) for key, value in headers.items()):
        raise SettingsError(
            f"{name} has a name or a value that no header has, expected ASCII without control characters"
        )
    return headers


_PLAIN = re.compile(r"[!-~]+")
_TOKEN = re.compile(TOKEN.decode())
_VALUE = re.compile(r"(?:[!-~]+(?:[ \t]+[!-~]+)*)?")


def _pairs(name: str, text: str | None) -> dict[str, str]:
    """`key=value,key=value`, where the values are percent-encoded."""
    pairs: dict[str, str] = {}
    for pair in filter(None, map(str.strip, (text or "").split(","))):
        key, equals, value = pair.partition("=")
        if not (key.strip() and equals):  # what is wrong may be a key
            raise SettingsError(f"{name} is another text, expected key=value,key=value")
        pairs[key.strip()] = unquote(value.strip())
    return pairs


def _resource(environment: Mapping[str, str], version: str) -> dict[str, str]:
    ours = {"service.name": "model-gateway", "service.version": version, "host.name": socket.gethostname()}
    given = _pairs("OTEL_RESOURCE_ATTRIBUTES", environment.get("OTEL_RESOURCE_ATTRIBUTES"))
    named = {"service.name": name} if (name := environment.get("OTEL_SERVICE_NAME")) else {}
    return {**ours, **given, **named}

"""The language of policies/: what may stand in the documents, as types that check and describe themselves.

Strict and closed: an unknown member is a mistake, and "1" is no number. The tables of policies/README.md and the JSON
Schema for editors are generated from here.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from ipaddress import ip_address
from math import inf
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from gateway.documents import show

# — scalars: a number and its unit in one word

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_WINDOWS = ("minute", "hour", "day", "week", "month")


# What the store counts is exact up to 2**53; amounts are far below, in micro-dollars too.
_MOST, _MOST_USD = 10**12, 10**9


def _measure(units: Mapping[str, float], example: str, found: object) -> float:
    """A measure such as `120s` or `32MiB`, in the base unit."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]+)", found) if isinstance(found, str) else None
    if match is None or match[2] not in units:
        raise ValueError(
            f"{show(found)} is no measure, expected a number with one of {listed(units)}, such as {example}"
        )
    return float(match[1]) * units[match[2]]


@dataclass(frozen=True, slots=True)
class Per:
    """An amount per period: `600/minute`."""

    amount: int
    period: str

    def __str__(self) -> str:
        return f"{self.amount}/{self.period}"


def _per(periods: Iterable[str], example: str, found: object) -> Per:
    match = re.fullmatch(r"([0-9][0-9_]*)\s*/\s*([a-z]+)", found) if isinstance(found, str) else None
    if match is None or match[2] not in periods:
        raise ValueError(f"{show(found)} has no unit, expected an amount per {listed(periods)}, such as {example}")
    digits = match[1].replace("_", "")
    if len(digits) > 15 or not 1 <= int(digits) <= _MOST:
        raise ValueError(f"{show(found)} is out of range, expected an amount from 1 to {_MOST}")
    return Per(int(digits), match[2])


def listed(words: Iterable[object]) -> str:
    return ", ".join(map(str, words))


def _zone(found: str) -> str:
    try:
        ZoneInfo(found)
    except (ValueError, OSError, KeyError):
        raise ValueError(f"{show(found)} is no time zone, expected a name such as Europe/Zurich") from None
    return found


def _matching(pattern: str, what: str, found: str) -> str:
    if re.fullmatch(pattern, found) is None:
        raise ValueError(f"{show(found)} is {what}")
    return found


def _address(form: str, example: str, found: str) -> str:
    """An address that can be gone to: what looks like an IP address is one, and a port is below 65536."""
    try:
        parts = urlsplit(found)
        host = parts.hostname or ""
        named = re.fullmatch(r"(?=.*[A-Za-z_-])[A-Za-z0-9._-]+", host) is not None
        right = (named or ip_address(host)) and parts.port != 0 and re.fullmatch(form, found)
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"{show(found)} is no address, expected one such as {example}")
    return found


def _instant(found: object) -> datetime:
    """A time, of what YAML or ISO 8601 (RFC 3339) knows for one; a day begins at midnight UTC."""
    try:
        match found:
            case str():
                return _instant(date.fromisoformat(found) if len(found) == 10 else datetime.fromisoformat(found))
            case datetime(tzinfo=zone) if zone is not None:
                return found.astimezone(UTC)
            case date() if not isinstance(found, datetime):
                return datetime(found.year, found.month, found.day, tzinfo=UTC)
    except (ValueError, OverflowError):
        pass
    shown = found.isoformat() if isinstance(found, date) else show(found)
    raise ValueError(f"{shown} is no time, expected a day such as 2026-01-01, or 2026-01-01T09:00:00+01:00")


def _percent(found: object) -> float:
    """A share such as `10%`, as a number from 0 to 1."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*%", found) if isinstance(found, str) else None
    if match is None or float(match[1]) > 100:
        raise ValueError(f"{show(found)} is no share, expected one from 0% to 100%")
    return float(match[1]) / 100


def _form(pattern: str, *examples: str) -> WithJsonSchema:
    """What an editor is told of a text."""
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$", **({"examples": examples} if examples else {})})


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_MODEL = r"[^\s\x00-\x1f\x7f-\x9f|{}]{1,200}"  # callers make them up where there is a star, and terminals show them
MODEL_NAME = re.compile(_MODEL)
_ROUTE = r"/v1(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]{1,100}){1,10}(?:/\*)?"
_URL = r"https?://[^/?#@\s]+(/[^?#\s]*)?"
_HOOK = r"https?://[^/?#@\s]+(/[^#\s]*)?"
_PATH = r"/[A-Za-z0-9/._~-]{0,200}"
# What a caller may not send on in any case: credentials, framing, and what the gateway says itself.
_HEADER = (
    r"(?!(?:authorization|connection|content-.*|cookie|expect|forwarded|host|keep-alive|proxy-.*|te|trailer"
    r"|transfer-encoding|upgrade|via|x-api-key|x-forwarded-.*|x-real-ip|x-request-id|x-stainless-.*)$)[a-z0-9-]{1,64}"
)
_TABLE = r"(?:[a-z_][a-z0-9_]{0,47}\.)?[a-z_][a-z0-9_]{0,47}"  # PostgreSQL has 63; a partition's name is longer
_FILE = r"/[^\x00-\x1f\x7f]{1,1000}"
_FOLDER = r"/[^\x00-\x1f\x7f]{0,1000}"
_EVENT_WORD = r"[!-~]{1,200}"
_NUMBER = r"[0-9]{1,15}(\.[0-9]{1,15})?\s*"
_AMOUNT = r"[0-9][0-9_]*\s*/\s*"

Seconds = Annotated[
    float,
    BeforeValidator(partial(_measure, _DURATIONS, "120s")),
    _form(f"{_NUMBER}({'|'.join(_DURATIONS)})", "120s", "500ms", "1h"),
]
Bytes = Annotated[
    int,
    BeforeValidator(lambda found: int(_measure(_SIZES, "32MiB", found))),
    _form(f"{_NUMBER}({'|'.join(_SIZES)})", "32MiB"),
]
Rate = Annotated[
    Per,
    BeforeValidator(partial(_per, PERIODS, "600/minute")),
    _form(f"{_AMOUNT}({'|'.join(PERIODS)})", "600/minute"),
]
Quota = Annotated[
    Per,
    BeforeValidator(partial(_per, _WINDOWS, "50000000/month")),
    _form(f"{_AMOUNT}({'|'.join(_WINDOWS)})", "50000000/month"),
]
Zone = Annotated[str, AfterValidator(_zone), WithJsonSchema({"type": "string", "examples": ["UTC", "Europe/Zurich"]})]
# Names become parts of Valkey keys and of log lines: no separator, no brace, no blank.
Name = Annotated[
    str,
    AfterValidator(partial(_matching, _NAME, "no name, expected letters, digits, dot, dash or underscore, at most 64")),
    _form(_NAME),
]
ModelName = Annotated[
    str,
    AfterValidator(partial(_matching, _MODEL, "no model's name, expected at most 200 characters, no blank, no | { }")),
    _form(_MODEL),
]
Url = Annotated[
    str,
    AfterValidator(partial(_address, _URL, "http://10.0.0.7:8000, without /v1")),
    _form(_URL, "http://10.0.0.7:8000"),
]
HookUrl = Annotated[
    str,
    AfterValidator(partial(_address, _HOOK, "https://hooks.example.com/limits")),
    _form(_HOOK, "https://hooks.example.com/limits"),
]
Percent = Annotated[float, BeforeValidator(_percent), _form(r"[0-9]{1,3}(\.[0-9]{1,3})?%", "10%")]
UrlPath = Annotated[
    str,
    AfterValidator(partial(_matching, _PATH, "no path, expected one such as /health")),
    _form(_PATH, "/health"),
]
RoutePath = Annotated[
    str,
    AfterValidator(partial(_matching, _ROUTE, "no route, expected one such as /v1/moderations, /v1/files/*")),
    _form(_ROUTE, "/v1/moderations", "/v1/files/*"),
]
HeaderName = Annotated[
    str,
    AfterValidator(partial(_matching, _HEADER, "no header's name in lower case that may travel, such as x-experiment")),
    _form(_HEADER, "x-experiment"),
]
Instant = Annotated[
    datetime,
    BeforeValidator(_instant),
    WithJsonSchema({"type": "string", "examples": ["2026-01-01", "2026-01-01T09:00:00+01:00"]}),
]
TableName = Annotated[
    str,
    AfterValidator(partial(_matching, _TABLE, "no name of a table, expected one such as usage, or ledger.usage")),
    _form(_TABLE, "usage", "ledger.usage"),
]
Folder = Annotated[
    str,
    AfterValidator(partial(_matching, _FOLDER, "no folder, expected one from the root on, such as /var/lib/usage")),
    _form(_FOLDER, "/var/lib/gateway/usage"),
]
SecretFile = Annotated[
    str,
    AfterValidator(partial(_matching, _FILE, "no file, expected its path from the root on, such as /run/secrets/key")),
    _form(_FILE, "/run/secrets/upstream/key"),
]
EventWord = Annotated[
    str,
    AfterValidator(partial(_matching, _EVENT_WORD, "no word of an event, expected ASCII without a blank")),
    _form(_EVENT_WORD),
]
Profile = Annotated[
    Literal["2023", "4.21.6", "2026"],
    BeforeValidator(lambda found: str(found) if type(found) is int else found),  # as YAML reads a year
    WithJsonSchema({"enum": ["2023", "4.21.6", "2026", 2023, 2026]}),
]
Dollars = Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)]

Count = Literal[
    "requests", "input_tokens", "uncached_input_tokens", "output_tokens", "total_tokens", "usd", "concurrent_requests"
]
Kind = Literal["rate", "quota", "rolling", "seats"]
Reserve = Literal["max", "expected", "input"]
StoreFails = Literal["local", "open", "closed"]
Scope = Literal["organisation", "team", "key", "user", "model"]
Cause = Literal["connect", "reset", 429, 500, 502, 503, 504]
Effort = Literal["none", "low", "medium", "high", "integer", "boolean"]
History = Literal["disabled", "interleaved", "preserved"]
Api = Literal["fireworks", "openai", "anthropic"]
Strictness = Literal["strict", "lenient"]
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


class _Document(BaseModel):
    """Closed, strict and frozen: an unknown member is a mistake, "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


def _one_source(name: str, variable: str | None, file: str | None, *, at_most: bool = False) -> None:
    """Refuse a secret that stands in two places, or nowhere where it has to stand somewhere. Raises ValueError."""
    if variable is not None and file is not None:
        raise ValueError(f"has {name}_env and {name}_file, expected one of them{' at most' if at_most else ''}")
    if variable is None and file is None and not at_most:
        raise ValueError(f"has neither {name}_env nor {name}_file, expected one of them")


class WebhookPolicy(_Document):
    """Where warnings go, signed as Standard Webhooks are."""

    url: HookUrl = Field(description="gets a POST for each")
    secret_env: str | None = Field(
        None, description="the environment variable that holds the secret: whsec_ and base64 of 24 to 64 bytes"
    )
    secret_file: SecretFile | None = Field(None, description="or the file that holds it, see `key_file` of upstreams")

    @property
    def secret(self) -> str:
        """The variable or the file that holds it."""
        return self.secret_file or self.secret_env or ""

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        _one_source("secret", self.secret_env, self.secret_file)
        return self


def signing_key(secret: str) -> bytes:
    """The bytes that a webhook is signed with, of a secret as Standard Webhooks writes one. Raises ValueError, which
    does not repeat it."""
    try:
        key = b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:  # what is no ASCII, too
        key = b""
    if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError("is no secret of a webhook, expected whsec_ and base64 of 24 to 64 bytes")
    return key


class LedgerPolicy(_Document):
    """How long rows of the ledger are kept; the sums of hours, days and months are for 400 days."""

    keep: Seconds = Field(
        90 * 86_400.0, ge=3600, description="then a row goes, once every export has it that the policies name"
    )


class GatewayPolicy(_Document):
    """What holds for every request."""

    strictness: Strictness = Field(
        "strict",
        alias="schema",
        description="strict: a member that the contract of completions does not know is refused; lenient: it passes; "
        "of other endpoints it always passes",
    )
    profile: Profile = Field("2026", description="the version of the API by which requests are checked")
    max_body: Bytes = Field(32 * 1024**2, description="largest request body")
    reserve: Reserve = Field(
        "max",
        description="what limits of tokens and dollars hold until usage is known: max: all that the request may take "
        "and produce; expected: the learned size of its input, and what 95 of 100 answers of the team and model stay "
        "below; input: nothing for the output. The bounds of each stand above",
    )
    when_store_fails: StoreFails = Field(
        "local",
        description="while Valkey does not answer: local: each worker enforces its share of the limit; open: the limit "
        "is not enforced; closed: 503",
    )
    webhook: WebhookPolicy | None = Field(None, description="who is told of `warn_at`; left out: the log alone")
    time_zone: Zone = Field("UTC", description="of calendar quotas; a limit may name its own")
    users: Literal["hashed", "plain"] = Field(
        "hashed",
        description="how `user` of requests and keys stands in counts, rows and sums: hashed: as HMAC-SHA256 under a "
        "secret of the gateway, so that it is known again and not read; plain: as callers write it",
    )
    ledger: LedgerPolicy = Field(LedgerPolicy.model_construct(), description="how long rows are kept")
    perf_headers: bool = Field(
        False, description="true: answers say in server-timing where their time went: gateway, queue, upstream"
    )


class PricePolicy(_Document):
    """US dollars per million tokens."""

    since: Instant | None = Field(
        None,
        alias="from",
        description="a day, which begins at midnight UTC, or a time with its zone; requests that come from then on "
        "have this price, until the next one of the list; left out: from the beginning",
    )
    input: Dollars = Field(0.0, description="of the prompt")
    cached_input: Dollars | None = Field(None, description="of what a backend had of it already; left out: as input")
    output: Dollars = Field(0.0, description="of the answer")
    reasoning: Dollars | None = Field(None, description="of what of it is reasoning; left out: as output")

    @property
    def starts(self) -> float:
        """From when on it holds, in seconds since 1970."""
        return -inf if self.since is None else self.since.timestamp()


# One price, or each from its day on.
_Prices = Annotated[
    Annotated[PricePolicy, Tag("one")]
    | Annotated[tuple[PricePolicy, ...], Field(strict=False, min_length=1), Tag("several")],
    Discriminator(lambda found: "several" if isinstance(found, list | tuple) else "one"),
]


class Timeouts(_Document):
    """How long an upstream may take. A model's own ones stand before its pool's, one by one."""

    connect: Seconds = Field(2.0, gt=0, description="until it accepts a connection")
    first_byte: Seconds = Field(120.0, gt=0, description="from the request to the head of the answer")
    idle: Seconds = Field(60.0, gt=0, description="between two pieces of an answer")
    total: Seconds = Field(3600.0, gt=0, description="for the whole answer")


class ModelPolicy(_Document):
    """One public model name; or, with one `*` in it, all names that it fits and no other entry names."""

    aliases: tuple[ModelName, ...] = Field((), strict=False, description="other names that callers may use")
    family: str | None = Field(None, description="rules of reasoning_effort and reasoning_history, see families.yaml")
    pool: str = Field(description="where requests for it go, see pools.yaml")
    upstream_model: str | None = Field(
        None,
        description="the name the backend knows it by, with `*` for what the star of the name stands for; left out: "
        "the same",
    )
    restore_name: bool = Field(
        False,
        description="true: JSON answers carry the public name in `model`, and so are rewritten there; streams are not",
    )
    strictness: Strictness | None = Field(None, alias="schema", description="left out: the pool's")
    profile: Profile | None = Field(None, description="left out: the pool's")
    fallback: ModelName | None = Field(
        None, description="model that answers when the pool is down or full; limits and prices stay those of this one"
    )
    timeouts: Timeouts | None = Field(None, description="those that differ from the pool's")
    context_window: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="tokens of prompt and answer together, to which `max_tokens` is lowered where the backends do not "
        "do that themselves (`api: openai`); left out: not known",
    )
    max_output_tokens: int = Field(8192, ge=1, le=10**7, description="the bound where a request names none")
    price: _Prices = Field(
        PricePolicy.model_construct(),
        description="what usage costs, for limits in usd and for the ledger: one price, or a list of them, ascending "
        "by `from`; before the first one it costs nothing, and a request keeps the price of the moment when it came",
    )

    @property
    def prices(self) -> tuple[PricePolicy, ...]:
        return self.price if isinstance(self.price, tuple) else (self.price,)


class FamilyPolicy(_Document):
    """What a model family accepts; a rule left out lets everything pass."""

    reasoning_effort: tuple[Effort, ...] | None = Field(
        None, strict=False, description="the words that it takes; integer: a cap in tokens; boolean: true and false"
    )
    reasoning_history: tuple[History, ...] | None = Field(None, strict=False, description="the words that it takes")


class UpstreamPolicy(_Document):
    """One backend."""

    url: Url = Field(description="its base, without /v1")
    key_env: str | None = Field(None, description="the environment variable that holds the credential it asks for")
    key_file: SecretFile | None = Field(
        None, description="or the file that holds it, which is read anew when it changes; blanks around it do not count"
    )
    weight: int = Field(1, ge=1, le=1000, description="its share of the requests, beside the others' weights")
    max_in_flight: int = Field(256, ge=1, description="requests at once")
    drain: bool = Field(False, description="true: it gets no new request, and ends those that it has")

    @property
    def key(self) -> str | None:
        """The variable or the file that holds its credential; None: it asks for none."""
        return self.key_file or self.key_env

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        _one_source("key", self.key_env, self.key_file, at_most=True)
        return self


class RetryPolicy(_Document):
    """When a request is sent once more, to another upstream, while nothing was answered."""

    attempts: int = Field(2, ge=1, le=10, description="upstreams of the pool that one request may be sent to")
    budget: Percent = Field(
        0.1,
        description="so many of the requests of the last 10 s may be sent again, and one a second always; connections "
        "that could not be made do not count",
    )
    on: tuple[Cause, ...] = Field(
        ("connect", "reset", 502, 503, 504),
        strict=False,
        description="connect: no connection could be made; reset: it ended before an answer came; or the status",
    )


class HealthPolicy(_Document):
    """When an upstream is left alone, and for how long. What is the caller's fault never counts."""

    connect_failures: int = Field(3, ge=1, description="connections in a row that could not be made")
    failures: int = Field(5, ge=1, description="requests in a row that failed: 5xx, reset, timeout, no HTTP")
    error_rate: Percent = Field(0.5, gt=0, description="failures among at least 20 requests of the window")
    window: Seconds = Field(10.0, gt=0, description="time over which the rate is taken")
    eject: Seconds = Field(5.0, ge=1, description="longest time until it is tried again; it begins with 1s and doubles")
    probe: UrlPath | None = Field(None, description="path that is asked regularly, 2xx is well; left out: none is")
    every: Seconds = Field(5.0, ge=0.1, description="between two probes, ± 20 %")
    probe_timeout: Seconds = Field(2.0, gt=0, description="for the answer to a probe; two that fail in a row count")


class TlsPolicy(_Document):
    """How https upstreams are trusted, and how the gateway shows who it is. Files are PEM."""

    ca: str | None = Field(None, description="file of the certificates that are trusted; left out: the system's")
    certificate: str | None = Field(None, description="file of the gateway's own certificate, and of those above it")
    key: str | None = Field(None, description="file of its key; left out: it stands with the certificate")
    server_name: str | None = Field(None, description="the name that certificates must have; left out: the url's host")

    @property
    def files(self) -> tuple[str, ...]:
        """All that it names; they are read anew when they change."""
        return tuple(file for file in (self.ca, self.certificate, self.key) if file is not None)

    @model_validator(mode="after")
    def _key_of_something(self) -> Self:
        if self.key is not None and self.certificate is None:
            raise ValueError("has a key without a certificate, expected one with certificate only")
        return self


class PoolPolicy(_Document):
    """Backends that can stand in for one another."""

    api: Api = Field(
        "fireworks",
        description="what these backends understand; it decides which aliases are rewritten, whether the gateway sees "
        "to `context_length_exceeded_behavior` (openai), and how the credential is shown (anthropic: x-api-key)",
    )
    strictness: Strictness | None = Field(None, alias="schema", description="left out: the gateway's")
    profile: Profile | None = Field(None, description="left out: the gateway's")
    usage: Literal["native", "inject", "continuous"] = Field(
        "native",
        description="native: streams report usage by themselves; inject: ask with stream_options, and take out the "
        "event that the caller did not ask for; continuous: the same, and usage in every event (vLLM, SGLang), so that "
        "a stream that is cut is billed by the backend's count",
    )
    balance: Literal["least_busy", "affinity", "round_robin"] = Field(
        "least_busy",
        description="least_busy: the less busy of two drawn at random; affinity: the same one for the same "
        "x-session-affinity, prompt_cache_key, user or beginning of the prompt; round_robin: in turn",
    )
    transport: Literal["wire", "httpx"] = Field(
        "wire", description="wire: the gateway's own HTTP/1.1; httpx: for HTTP/2 over TLS, slower"
    )
    timeouts: Timeouts = Field(Timeouts.model_construct(), description="how long an upstream may take")
    retries: RetryPolicy = Field(RetryPolicy.model_construct(), description="when a request is sent once more")
    health: HealthPolicy = Field(HealthPolicy.model_construct(), description="when an upstream is left alone")
    slow_start: Seconds = Field(10.0, ge=0, description="in which an upstream that returns gets back to its share")
    comments: Seconds | None = Field(
        None,
        ge=1,
        description="while a stream has not begun, a comment each time (for proxies that cut silent connections); the "
        "status is then 200 whatever follows; left out: none",
    )
    fallback: str | None = Field(None, description="pool that is asked when this one is down or full")
    forward_headers: tuple[HeaderName, ...] = Field(
        (), strict=False, description="headers of the caller that travel on beside the usual ones"
    )
    tls: TlsPolicy | None = Field(None, description="for https upstreams; left out: what the system trusts")
    upstreams: tuple[UpstreamPolicy, ...] = Field(strict=False, min_length=1, description="the backends")


class RoutePolicy(_Document):
    """A path of the backends' beside the inference endpoints: it passes with a key, counted as a request."""

    pool: str = Field(description="where its requests go, see pools.yaml")
    methods: tuple[Method, ...] = Field(("POST",), strict=False, min_length=1, description="those that pass")


_ONLY_WITH = {"burst": "rate", "rolling": "quota", "time_zone": "quota", "warn_at": "quota"}


class LimitPolicy(_Document):
    """One limit: a `rate` (with its `burst`), a `quota` by the calendar or rolling, or seats (`at_most`)."""

    name: Name = Field(description="what callers are told when it binds; counts go by it")
    count: Count = Field(description="what is counted")
    rate: Rate | None = Field(None, description="so much per second, minute, hour or day, refilled steadily")
    burst: int | None = Field(None, ge=1, le=_MOST, description="how much of it may come at once; left out: all of it")
    quota: Quota | None = Field(
        None, description="so much per calendar hour, day, week or month; per minute where it is rolling"
    )
    rolling: bool = Field(
        False,
        description="true: the quota holds for every stretch of so long, 30 days for a month, not by the calendar",
    )
    time_zone: Zone | None = Field(None, description="of a quota's calendar; left out: the gateway's")
    at_most: int | None = Field(None, ge=1, le=_MOST, description="so many at the same time")
    per: tuple[Scope, ...] = Field(
        strict=False, min_length=1, description="each combination of these has its own count"
    )
    models: tuple[str, ...] = Field(
        ("*",), strict=False, min_length=1, description="patterns of the models, and of the routes, that it is for"
    )
    mode: Literal["enforce", "shadow"] = Field(
        "enforce", description="shadow: it counts, and tells what it would refuse, and refuses nothing"
    )
    soft: Percent | None = Field(
        None, gt=0, description="from this share on answers say `x-ratelimit-over-limit: yes`; left out: they do not"
    )
    warn_at: tuple[Percent, ...] = Field(
        (), strict=False, description="shares of a quota at which the log and the webhook are told, once a window each"
    )
    reserve: Reserve | None = Field(None, description="left out: the gateway's")
    when_store_fails: StoreFails | None = Field(None, description="left out: the gateway's")

    @property
    def kind(self) -> Kind:
        if self.quota is not None:
            return "rolling" if self.rolling else "quota"
        return "seats" if self.rate is None else "rate"

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in ("rate", "quota", "at_most") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"has {listed(kinds) or 'no amount'}, expected exactly one of rate, quota, at_most")
        if (self.count == "concurrent_requests") != (self.at_most is not None):
            raise ValueError(
                f"counts {self.count} with {kinds[0]}, expected at_most for concurrent_requests and only there"
            )
        for member, kind in _ONLY_WITH.items():
            if getattr(self, member) and getattr(self, kind) is None:
                raise ValueError(f"has {member} without {kind}, expected it with {kind} only")
        if self.rolling and self.time_zone is not None:
            raise ValueError("is rolling and has a time_zone, expected one of them: time zones are of calendars")
        if self.quota is not None and self.quota.period == "minute" and not self.rolling:
            raise ValueError("has a quota of calendar minutes, expected it rolling or longer")
        return self

    @model_validator(mode="after")
    def _amounts(self) -> Self:
        if not all(share > 0 for share in self.warn_at) or list(self.warn_at) != sorted(set(self.warn_at)):
            raise ValueError("has warn_at that does not ascend from above 0%, expected shares such as [80%, 95%]")
        if self.reserve is not None and self.count in ("requests", "concurrent_requests"):
            raise ValueError(f"reserves {self.count}, which are known beforehand; expected tokens or usd there")
        if self.count == "usd" and max(p.amount for p in (self.rate, self.quota) if p is not None) > _MOST_USD:
            raise ValueError(f"counts more than {_MOST_USD} dollars, expected at most so many")
        return self


class PlanPolicy(_Document):
    """Limits that hold together."""

    limits: tuple[LimitPolicy, ...] = Field((), strict=False, description="a request takes all of them or none")


class OrganisationPolicy(_Document):
    """Who pays: what holds for all of its teams together."""

    plan: str = Field(description="limits that bind its requests beside those of the team's plan, see plans.yaml")


class TeamPolicy(_Document):
    """A team: who pays, and what it may do."""

    organisation: Name = Field(description="who pays; its counts live on one slot of a cluster")
    plan: str = Field(description="its limits, see plans.yaml")
    models: tuple[str, ...] = Field(
        ("*",), strict=False, description="patterns of the models, and of the paths of routes, that it may use"
    )


_TOGETHER = "rows that are delivered together at most"
_ATTEMPTS = Field(
    10, ge=1, le=1000, description="how often a row may be rejected; then it is put aside, see `gateway exports dead`"
)


class JsonLinesExport(_Document):
    """Rows as lines of JSON in files, which never change once they are closed."""

    to: Literal["jsonl"] = Field(description="files")
    folder: Folder = Field(description="where the files are; it is made")
    rotate: Bytes = Field(64 * 1024**2, ge=1, description="a file of this size is closed")
    every: Seconds = Field(3600.0, gt=0, description="and so is one that is so old")
    batch: int = Field(100, ge=1, le=1000, description=_TOGETHER)
    attempts: int = _ATTEMPTS


class PostgresExport(_Document):
    """Rows of a table of PostgreSQL, which is made, with a partition for each month."""

    to: Literal["postgres"] = Field(description="a database; needs psycopg, the extra `postgres` of this package")
    dsn_env: str | None = Field(None, description="the environment variable that says how to connect: postgresql://…")
    dsn_file: SecretFile | None = Field(None, description="or the file that does, which is read anew when it changes")
    table: TableName = Field("usage", description="its name, in a schema or not")
    batch: int = Field(100, ge=1, le=1000, description=_TOGETHER)
    attempts: int = _ATTEMPTS

    @property
    def dsn(self) -> str:
        """The variable or the file that says how to connect."""
        return self.dsn_file or self.dsn_env or ""

    @model_validator(mode="after")
    def _one_dsn(self) -> Self:
        _one_source("dsn", self.dsn_env, self.dsn_file)
        return self


class CloudEventsExport(_Document):
    """Rows as CloudEvents 1.0 over HTTP, in the batches that OpenMeter takes."""

    to: Literal["cloudevents"] = Field(description="a receiver of events")
    url: HookUrl = Field(description="gets a POST for each batch")
    token_env: str | None = Field(
        None, description="the environment variable that holds the token it asks for; left out: it asks for none"
    )
    token_file: SecretFile | None = Field(
        None, description="or the file that holds it, which is read anew when it changes"
    )
    source: EventWord = Field("model-gateway", description="`source` of the events")
    type: EventWord = Field("tokens", description="`type` of the events, by which OpenMeter's meters know them")
    batch: int = Field(100, ge=1, le=100, description=_TOGETHER)
    attempts: int = _ATTEMPTS

    @property
    def token(self) -> str | None:
        """The variable or the file that holds its token; None: it asks for none."""
        return self.token_file or self.token_env

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        _one_source("token", self.token_env, self.token_file, at_most=True)
        return self


Export = Annotated[JsonLinesExport | PostgresExport | CloudEventsExport, Field(discriminator="to")]


class Documents(_Document):
    """All sections of a policy directory."""

    gateway: GatewayPolicy = Field(GatewayPolicy.model_construct(), description="what holds for every request")
    models: dict[ModelName, ModelPolicy] = Field({}, description="the public model names")
    families: dict[Name, FamilyPolicy] = Field({}, description="what each model family accepts")
    pools: dict[Name, PoolPolicy] = Field({}, description="where requests go")
    routes: dict[RoutePath, RoutePolicy] = Field({}, description="further paths of the backends")
    plans: dict[Name, PlanPolicy] = Field({}, description="limits, by plan")
    organisations: dict[Name, OrganisationPolicy] = Field({}, description="who pays, where it has limits of its own")
    teams: dict[Name, TeamPolicy] = Field({}, description="who calls")
    exports: dict[Name, Export] = Field({}, description="where rows of the ledger go")

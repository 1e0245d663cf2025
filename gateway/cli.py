"""The commands: serve, demo, echo, check, keys, upstreams, usage. Tables for people, --json for programs.

Exit codes: 0 done; 1 the thing asked about is wrong or not there; 2 the command line is wrong; 3 the store or the
address cannot be used.

What a command needs is imported when it runs: `gateway serve` does not wait for tables, `gateway keys` not for uvicorn.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import typer

from gateway.documents import PolicyError
from gateway.embedded import Embedded
from gateway.errors import GatewayError, StoreUnavailable
from gateway.language import UpstreamPolicy
from gateway.policy import load
from gateway.settings import Settings, SettingsError
from gateway.snapshot import Snapshot
from gateway.store import Store, StoreError

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.keys import KeyRing

T = TypeVar("T")

WRONG, USAGE, UNUSABLE = 1, 2, 3
_DEMO_PORT = 8000
# A command is not a request: it may wait for a store that is busy.
_PATIENCE = 5.0

app = typer.Typer(
    help="One front door to an organisation's language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
keys_app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")
upstreams_app = typer.Typer(help="List, drain and resume backends.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(upstreams_app, name="upstreams")

PoliciesOption = Annotated[Path | None, typer.Option("--policies", metavar="DIR", help="policy documents [policies]")]
StateOption = Annotated[Path | None, typer.Option("--state", metavar="DIR", help="state folder [.gateway]")]
HostOption = Annotated[str | None, typer.Option("--host", help="address to listen on [127.0.0.1]")]
PortOption = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="port to listen on [8080]")]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]


def main() -> NoReturn:
    """The `gateway` command."""
    app()
    sys.exit(0)


# — serving


@app.command()
def serve(
    policies: PoliciesOption = None, host: HostOption = None, port: PortOption = None, state: StateOption = None
) -> None:
    """Serve, until SIGTERM or Ctrl-C. SIGHUP reads the policies anew."""
    settings = _settings(policies=policies, host=host, port=port, state=state)
    _serve(settings, _announce)


@app.command()
def demo(
    policies: PoliciesOption = None, host: HostOption = None, port: PortOption = None, state: StateOption = None
) -> None:
    """Serve with a scripted backend beside it, and a first key on the first start: what `make run` runs."""
    settings = _settings(policies=policies, host=host, port=port, state=state)
    backend = subprocess.Popen([sys.executable, "-m", "gateway", "echo"], start_new_session=True)
    try:
        _serve(settings, _welcome)
    finally:
        backend.terminate()
        backend.wait()


@app.command()
def echo(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on")] = _DEMO_PORT,
) -> None:
    """A scripted model backend: says the prompt's own words, and misbehaves when asked to (see gateway/echo.py)."""
    import uvicorn

    from gateway.echo import create_app

    listener = _listen(host, port)
    config = uvicorn.Config(
        create_app(), log_config=None, access_log=False, lifespan="off", loop="uvloop", http="httptools"
    )
    with _own_signals():
        uvicorn.Server(config).run([listener])


def _serve(settings: Settings, started: Callable[[Settings, Gateway], Awaitable[None]]) -> None:
    import uvloop

    from gateway import telemetry

    telemetry.set_up(settings.log)
    with _store_of(settings) as url, _own_signals():
        _run_or_exit(_serving(settings, url, started), uvloop.run)


async def _serving(settings: Settings, url: str, started: Callable[[Settings, Gateway], Awaitable[None]]) -> None:
    import uvicorn

    from gateway.app import opened
    from gateway.reload import reload
    from gateway.server import config

    async with opened(settings, url) as gateway:

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                await started(settings, gateway)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                gateway.draining = True
                await super().shutdown(sockets)

        reloads: set[asyncio.Task[bool]] = set()

        def hang_up() -> None:
            task = asyncio.ensure_future(reload(gateway.live, settings.policies))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
        listener = _listen(settings.host, settings.port)
        settings = replace(settings, port=listener.getsockname()[1])
        await Server(config(gateway, drain=settings.drain)).serve([listener])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, or a word why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        _fail(f"cannot listen on {host}:{port}: {error.strerror or error}", UNUSABLE)
    listener.listen(2048)
    listener.setblocking(False)
    return listener


@contextmanager
def _own_signals() -> Iterator[None]:
    """uvicorn drains on SIGTERM and SIGINT, then raises them again for whoever was there before: for us, nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _announce(settings: Settings, gateway: Gateway) -> None:
    import structlog

    snapshot = gateway.live.policies.snapshot
    structlog.get_logger("gateway").info(
        "serving", host=settings.host, port=settings.port, revision=snapshot.revision, keys=len(gateway.keys.records())
    )


async def _welcome(settings: Settings, gateway: Gateway) -> None:
    """What a newcomer needs: the addresses, a key where there is none yet, a line to paste."""
    snapshot = gateway.live.policies.snapshot
    key, team = "", next(iter(snapshot.teams), None)
    if team is not None and not gateway.keys.records():
        _, key = await gateway.keys.create(team, user=None, name="first key", models=(), expires=None)
    base = f"http://{settings.host}:{settings.port}"
    model = snapshot.public_models[0].name if snapshot.public_models else "MODEL"
    shown = key or "$GATEWAY_KEY"
    lines = [
        "",
        f"  gateway   {base}/v1   (also {base}/inference/v1)",
        f"  backend   http://127.0.0.1:{_DEMO_PORT}, scripted: it says the words of the prompt",
        f"  policies  {settings.policies}/, revision {snapshot.revision}",
        f"  state     {settings.state}/",
        "",
        f"  key       {key}   (team {team}; shown this once)"
        if key
        else "  key       the one from the first start, or: gateway keys create --team " + str(team),
        "",
        f'  curl {base}/v1/completions -H "Authorization: Bearer {shown}" \\',
        "       -H 'Content-Type: application/json' \\",
        f'       -d \'{{"model": "{model}", "prompt": "The sky is", "max_tokens": 16}}\'',
        "",
    ]
    print("\n".join(lines), flush=True)


# — policies


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="policy documents")] = Path("policies"),
) -> None:
    """Read policy documents as the gateway would, and tell every mistake."""
    try:
        snapshot = load(directory)
    except PolicyError as error:
        for mistake in error.mistakes:
            typer.echo(mistake, err=True)
        raise typer.Exit(WRONG) from None
    models = len(snapshot.public_models) + len(snapshot.patterns)
    held = f"{models} models, {len(snapshot.pools)} pools, {len(snapshot.teams)} teams"
    typer.echo(f"{directory}: revision {snapshot.revision}: {held}, no mistakes")


# — keys


@keys_app.command("create")
def keys_create(
    team: Annotated[str, typer.Option(help="the team that the key belongs to")],
    user: Annotated[str | None, typer.Option(help="whom the key stands for")] = None,
    name: Annotated[str | None, typer.Option(help="what people call it")] = None,
    expires: Annotated[str | None, typer.Option(help="30d, 12h, or a time such as 2027-01-31")] = None,
    models: Annotated[str | None, typer.Option(help="patterns, separated by commas [all of the team's]")] = None,
    as_json: JsonOption = False,
    policies: PoliciesOption = None,
    state: StateOption = None,
) -> None:
    """Create a key. It is shown once, and kept as a hash."""
    settings = _settings(policies=policies, state=state)
    teams = _policies(settings).teams
    if team not in teams:
        _fail(f'"{team}" is no team of {settings.policies}/, expected one of {", ".join(teams) or "(none)"}', WRONG)
    patterns = tuple(part.strip() for part in models.split(",")) if models else ()
    until = None if expires is None else _moment(expires, future=True)

    async def create(ring: KeyRing) -> None:
        record, key = await ring.create(team, user=user, name=name, models=patterns, expires=until)
        if as_json:
            typer.echo(json.dumps({"key": key, **record.public(time.time())}))
        else:
            typer.echo(f"{key}\n\nkey {record.id} of team {team}; it is not shown again", err=False)

    _with_keys(settings, create)


@keys_app.command("list")
def keys_list(as_json: JsonOption = False, state: StateOption = None) -> None:
    """List all keys, without their secrets."""

    async def show(ring: KeyRing) -> None:
        now = time.time()
        records = [record.public(now) for record in ring.records()]
        if as_json:
            typer.echo(json.dumps(records))
            return
        columns = ("id", "team", "user", "name", "models", "state", "created", "expires")
        _table(columns, [[_cell(record[column]) for column in columns] for record in records])

    _with_keys(_settings(state=state), show)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="the id, gw_ID_…")],
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Revoke a key: within a second it is refused everywhere."""

    async def revoke(ring: KeyRing) -> None:
        record = await ring.revoke(key_id)
        if record is None:
            _fail("no key has this id; gateway keys list shows them all", WRONG)
        typer.echo(json.dumps(record.public(time.time())) if as_json else f"key {record.id} is revoked")

    _with_keys(_settings(state=state), revoke)


# — upstreams

UpstreamArgument = Annotated[str, typer.Argument(metavar="UPSTREAM", help="POOL/HOST:PORT, as the list has it")]


@upstreams_app.command("list")
def upstreams_list(as_json: JsonOption = False, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """List the upstreams of the policies, and which of them are drained."""
    from gateway.drains import drained

    settings = _settings(policies=policies, state=state)
    known = _upstreams(settings)

    async def show(store: Store) -> None:
        by_command = await drained(store)
        rows = []
        for name, own in known.items():
            by = "by command" if name in by_command else "by policy" if own.drain else None
            rows.append({"upstream": name, "weight": own.weight, "drained": by})
        if as_json:
            typer.echo(json.dumps(rows))
            return
        columns = ("upstream", "weight", "drained")
        _table(columns, [[_cell(row[column]) for column in columns] for row in rows])

    _with_store(settings, show)


@upstreams_app.command("drain")
def upstreams_drain(upstream: UpstreamArgument, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """Give nothing new to an upstream, within a second and in every gateway of the store; what it has goes on."""
    from gateway.drains import drain

    _change_upstream(_settings(policies=policies, state=state), upstream, drain)
    typer.echo(f"{upstream} is drained; gateway upstreams resume {upstream} ends it")


@upstreams_app.command("resume")
def upstreams_resume(upstream: UpstreamArgument, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """End what `drain` began."""
    from gateway.drains import resume

    _change_upstream(_settings(policies=policies, state=state), upstream, resume)
    typer.echo(f"{upstream} gets requests again")


def _change_upstream(
    settings: Settings, upstream: str, change: Callable[[Store, str], Coroutine[Any, Any, None]]
) -> None:
    known = _upstreams(settings)
    if upstream not in known:
        _fail(f'"{upstream}" is no upstream of the policies, expected one of {", ".join(known)}', WRONG)
    _with_store(settings, lambda store: change(store, upstream))


def _upstreams(settings: Settings) -> dict[str, UpstreamPolicy]:
    """The upstreams of the policies, by the names that commands and logs have for them."""
    pools = _policies(settings).pools
    return {f"{name}/{urlsplit(own.url).netloc}": own for name, pool in pools.items() for own in pool.upstreams}


# — limits


@app.command()
def limits(
    key_id: Annotated[str, typer.Option("--key", metavar="ID", help="the id of a key, gw_ID_…")],
    model: Annotated[str | None, typer.Option(help="of this model [of all that the key may use]")] = None,
    user: Annotated[str | None, typer.Option(help="whom its requests name [whom the key stands for]")] = None,
    as_json: JsonOption = False,
    policies: PoliciesOption = None,
    state: StateOption = None,
) -> None:
    """Show where a key stands: every limit that binds it, what is used, reserved and left, and when that ends."""
    from gateway.admission import Admission
    from gateway.app import pepper
    from gateway.explain import limits_of
    from gateway.keys import KeyRing

    settings = _settings(policies=policies, state=state)
    snapshot = _policies(settings)
    named = None if model is None else snapshot.model(model)
    if model is not None and named is None:
        _fail(f'"{model}" is no model of the policies', WRONG)

    async def show(store: Store) -> None:
        ring = KeyRing(store, pepper(settings))
        await ring.load()
        principal = ring.principal(key_id.removeprefix("gw_").partition("_")[0])
        if principal is None:
            _fail("no key in force has this id; gateway keys list shows them all", WRONG)
        models = snapshot.public_models if named is None else (named,)
        rows: Any = await limits_of(Admission(store, lambda *_: None), snapshot, principal, models, user)
        if as_json:
            typer.echo(json.dumps(rows))
            return
        head = ("name", "scope", "limit", "mode", "used", "reserved", "left", "of", "whole again in")
        amounts = ("used", "reserved", "remaining", "limit")
        cells = []
        for row in rows:
            amount = row.get("usd", row)  # dollars are read more easily than their millionths
            told = [
                row["name"],
                row["scope"],
                row["policy"],
                row["mode"],
                *(f"{amount[one]:,.6f}".rstrip("0").rstrip(".") for one in amounts),
            ]
            cells.append([*told, str(timedelta(seconds=ceil(row["reset_s"]))) if row["reset_s"] else "-"])
        _table(head, cells, right=5)

    _with_store(settings, show)


# — usage


@app.command()
def usage(
    by: Annotated[str, typer.Option(help="organisation, team, key, user, model; separated by commas")] = "team,model",
    since: Annotated[str | None, typer.Option(help="24h, 7d, or a time such as 2026-11-01 [everything]")] = None,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """What was used, summed by hour."""
    from gateway.ledger import DIMENSIONS, Dimension, sums

    asked = [word.strip() for word in by.split(",")]
    wrong = [word for word in asked if word not in DIMENSIONS]
    if wrong:
        _fail(f'"{wrong[0]}" is unknown, expected some of {", ".join(DIMENSIONS)}', USAGE)
    dimensions: list[Dimension] = [d for word in asked for d in DIMENSIONS if d == word]
    start = 0.0 if since is None else _moment(since, future=False)

    async def show(store: Store) -> None:
        found = await sums(store, dimensions, start)
        if as_json:
            typer.echo(json.dumps([s.public(dimensions) for s in found]))
            return
        head = (*dimensions, "requests", "input", "cached", "output", "USD")
        cells = []
        for s in found:
            c = s.counters
            numbers = (c["requests"], c["input_tokens"], c["cached_tokens"], c["output_tokens"])
            cells.append(
                [*(part or "-" for part in s.group), *(f"{n:,}" for n in numbers), f"{c['cost_microusd'] / 1e6:,.6f}"]
            )
        _table(head, cells, right=5)

    _with_store(_settings(state=state), show)


# — what the commands share


def _settings(**given: Any) -> Settings:
    try:
        return Settings.read(**given)
    except SettingsError as error:
        _fail(str(error), USAGE)


def _policies(settings: Settings) -> Snapshot:
    try:
        return load(settings.policies)
    except PolicyError as error:
        _fail(str(error), WRONG)


def _store_of(settings: Settings) -> Any:
    """The address of the store, embedded or not, as a context."""
    if settings.redis_url:
        return nullcontext(settings.redis_url)
    return _embedded(settings.state)


@contextmanager
def _embedded(state: Path) -> Iterator[str]:
    try:
        server = Embedded(state)
        with server:
            yield server.url
    except StoreError as error:
        _fail(str(error), UNUSABLE)


def _with_store(settings: Settings, work: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # it is told once, below

    async def run(url: str) -> None:
        store = Store(url, deadline=_PATIENCE)
        try:
            await work(store)
        except StoreUnavailable as away:
            raise StoreError(f"the store of keys and limits {store.reason or 'does not answer'}") from away
        finally:
            await store.aclose()

    with _store_of(settings) as url:
        _run_or_exit(run(url), asyncio.run)


def _with_keys(settings: Settings, work: Callable[[KeyRing], Coroutine[Any, Any, None]]) -> None:
    from gateway.app import pepper
    from gateway.keys import KeyRing

    async def run(store: Store) -> None:
        ring = KeyRing(store, pepper(settings))
        await ring.load()
        await work(ring)

    _with_store(settings, run)


def _run_or_exit(work: Coroutine[Any, Any, T], run: Callable[[Coroutine[Any, Any, T]], T]) -> T:
    """The result of some work; what an operator can mend is one line and an exit code, not a traceback."""
    try:
        return run(work)
    except PolicyError as error:
        _fail(str(error), WRONG)
    except StoreError as error:
        _fail(str(error), UNUSABLE)
    except GatewayError as error:
        cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
        _fail(f"{error.message}{cause}", UNUSABLE)


def _fail(text: str, code: int) -> NoReturn:
    typer.echo(f"gateway: {text}", err=True)
    raise typer.Exit(code)


_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def _moment(text: str, *, future: bool) -> float:
    """A time: so long from now (or ago), or a date; seconds since 1970."""
    now = time.time()
    match = re.fullmatch(r"([0-9]{1,5})([mhdw])", text)
    if match:
        distance = int(match[1]) * _UNITS[match[2]]
        return now + (distance if future else -distance)
    try:
        at = datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError, OSError):
        _fail(f'"{text}" is no time, expected for example 30d, 12h or 2027-01-31', USAGE)
    if future and at <= now:
        _fail(f'"{text}" is past, expected a time to come', USAGE)
    return at


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "*"
    return "-" if value is None else str(value)


def _table(head: tuple[str, ...], rows: list[list[str]], *, right: int = 0) -> None:
    """A table for people; the last `right` columns are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i >= len(head) - right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if not rows:
        console.print("(nothing)")

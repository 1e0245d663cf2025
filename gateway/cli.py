"""The commands: serve, demo, echo, admin, check, keys, upstreams, limits, usage, export, exports, doctor. Tables for
people, --json for programs. Exit codes: see gateway/console.py.

What a command needs is imported when it runs: `gateway serve` does not wait for tables, `gateway keys` not for uvicorn.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gateway.console import (
    PATIENCE,
    USAGE,
    WRONG,
    JsonOption,
    PoliciesOption,
    StateOption,
    cell,
    check_tracing,
    embedded_of,
    fail,
    listen,
    mask_defects,
    own_signals,
    read_policies,
    read_settings,
    run_or_exit,
    silence,
    store_of,
    table,
    tell_defect,
    with_keys,
    with_store,
)
from gateway.documents import PolicyError
from gateway.embedded import Embedded
from gateway.exporting import export, exports_app
from gateway.pipes import Kind, Line
from gateway.reports import usage_app
from gateway.settings import Settings, pepper
from gateway.store import Store

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.keys import KeyRing
    from gateway.supervisor import Supervisor

_DEMO_PORT = 8000

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

HostOption = Annotated[str | None, typer.Option("--host", help="address to listen on [127.0.0.1]")]
PortOption = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="port to listen on [8080]")]


WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=0, max=256, help="processes; 0: this one alone, without control plane [1]"),
]
AdminHostOption = Annotated[str | None, typer.Option("--admin-host", help="address of the control plane [127.0.0.1]")]
AdminPortOption = Annotated[
    int | None, typer.Option("--admin-port", min=0, max=65535, help="port of the control plane [9090]")
]


def main() -> NoReturn:
    """The `gateway` command."""
    mask_defects()
    try:
        app()
    except Exception as defect:
        tell_defect(defect)
        sys.exit(WRONG)
    sys.exit(0)


# — serving


@app.command()
def serve(
    policies: PoliciesOption = None,
    host: HostOption = None,
    port: PortOption = None,
    state: StateOption = None,
    workers: WorkersOption = None,
    admin_host: AdminHostOption = None,
    admin_port: AdminPortOption = None,
) -> None:
    """Serve: workers on one port, a control plane beside them. SIGHUP reads policies anew, SIGUSR2 takes new code."""
    given = {"host": host, "port": port, "workers": workers, "admin_host": admin_host, "admin_port": admin_port}
    _serve(read_settings(policies=policies, state=state, **given), _announce, replaceable=True)


@app.command()
def demo(
    policies: PoliciesOption = None,
    host: HostOption = None,
    port: PortOption = None,
    state: StateOption = None,
    workers: WorkersOption = None,
    admin_host: AdminHostOption = None,
    admin_port: AdminPortOption = None,
) -> None:
    """Serve with a scripted backend beside it, and a first key on the first start: what `make run` runs."""
    given = {"host": host, "port": port, "workers": workers, "admin_host": admin_host, "admin_port": admin_port}
    settings = read_settings(policies=policies, state=state, **given)
    backend = subprocess.Popen([sys.executable, "-m", "gateway", "echo"], start_new_session=True)
    try:
        _serve(settings, _welcome, replaceable=False)  # who would end the backend?
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

    listener = listen(host, port)
    config = uvicorn.Config(
        create_app(), log_config=None, access_log=False, lifespan="off", loop="uvloop", http="httptools"
    )
    with own_signals():
        uvicorn.Server(config).run([listener])


@app.command()
def admin(
    policies: PoliciesOption = None,
    state: StateOption = None,
    host: Annotated[str | None, typer.Option(help="address to listen on [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="port to listen on [9090]")] = None,
) -> None:
    """Serve the control plane alone: figures, reports, keys, limits and upstreams, for who has the admin key."""
    import uvloop

    from gateway import telemetry
    from gateway.admin import serve

    settings = read_settings(policies=policies, state=state, admin_host=host, admin_port=port)
    telemetry.set_up(settings.log)
    with store_of(settings) as url, own_signals():
        run_or_exit(serve(settings, url, listen(settings.admin_host, settings.admin_port)), uvloop.run)


@app.command(hidden=True)
def process(
    kind: Annotated[str, typer.Argument()],
    listener: Annotated[int, typer.Option()],
    line: Annotated[int, typer.Option()],
) -> None:
    """One of the processes of `gateway serve`, which starts it: a worker, or the control plane."""
    import uvloop

    from gateway import admin, telemetry, worker

    settings = read_settings()
    telemetry.set_up(settings.log)
    ears, end = socket.socket(fileno=listener), socket.socket(fileno=line)
    end.setblocking(False)
    with own_signals():
        work = (
            worker.serve(settings, settings.redis_url, ears, Line(end), _quietly)
            if kind == "worker"
            else admin.serve(settings, settings.redis_url, ears, Line(end))
        )
        run_or_exit(work, uvloop.run)


async def _quietly(settings: Settings, gateway: Gateway) -> None:
    """The supervisor says what there is to say."""


Started = Callable[[Settings, str, int], Awaitable[None]]  # of a revision, and of so many workers


def _serve(settings: Settings, started: Started, *, replaceable: bool) -> None:
    """Serve in processes under a supervisor, or in this one alone."""
    import uvloop

    from gateway import telemetry

    check_tracing()
    telemetry.set_up(settings.log)
    listener = listen(settings.host, settings.port)
    settings = replace(settings, port=listener.getsockname()[1])
    with embedded_of(settings) as store, own_signals():
        if store is not None:
            settings = replace(settings, redis_url=store.url)
        if settings.workers:
            read_policies(settings)
            run = _supervised(settings, listener, started, store, replaceable=replaceable)
        else:
            run = _alone(settings, listener, started)
        if code := run_or_exit(run, uvloop.run):
            raise typer.Exit(code)


async def _alone(settings: Settings, listener: socket.socket, started: Started) -> int:
    from gateway.worker import serve

    async def begun(settings: Settings, gateway: Gateway) -> None:
        await started(settings, gateway.live.policies.snapshot.revision, 0)

    await serve(settings, settings.redis_url, listener, None, begun)
    return 0


async def _supervised(
    settings: Settings, listener: socket.socket, started: Started, store: Embedded | None, *, replaceable: bool
) -> int:
    control = listen(settings.admin_host, settings.admin_port)
    settings = replace(settings, admin_port=control.getsockname()[1])
    supervisor = _supervisor(settings, {"worker": listener, "control": control}, store, replaceable=replaceable)
    return await supervisor.run(lambda revision: started(settings, revision, settings.workers))


def _supervisor(
    settings: Settings, listeners: Mapping[Kind, socket.socket], store: Embedded | None, *, replaceable: bool
) -> Supervisor:
    from gateway.supervisor import Supervisor, gateway_command

    return Supervisor(
        gateway_command,
        listeners,
        settings.workers,
        delay=settings.drain_delay,
        drain=settings.drain,
        environment=settings.environment(),
        store=store,
        replaceable=replaceable,
    )


@app.command(hidden=True)
def takeover(file: Annotated[int, typer.Argument()], trial: Annotated[bool, typer.Option("--trial")] = False) -> None:
    """The supervisor of `gateway serve` after SIGUSR2, with what the one before had. `--trial`: whether it could be."""
    import msgspec
    import uvloop

    from gateway import telemetry
    from gateway.handover import Handover, taken

    settings = read_settings()
    try:
        held = Handover.read(file) if trial else taken(file)
    except msgspec.MsgspecError as other:
        fail(f"what the supervisor has left is of another version: {other}", WRONG)
    store = None if held.lock < 0 else Embedded(settings.state, held.lock)
    listeners = {kind: socket.socket(fileno=number) for kind, number in held.listeners.items()}
    supervisor = _supervisor(settings, listeners, store, replaceable=True)
    if trial:
        return
    telemetry.set_up(settings.log)
    with store or nullcontext(), own_signals():
        if code := run_or_exit(supervisor.go_on(held), uvloop.run):
            raise typer.Exit(code)


async def _announce(settings: Settings, revision: str, workers: int) -> None:
    import structlog

    control = {"admin": f"{settings.admin_host}:{settings.admin_port}"} if workers else {}
    structlog.get_logger("gateway").info(
        "serving", host=settings.host, port=settings.port, revision=revision, workers=workers, **control
    )


async def _welcome(settings: Settings, revision: str, workers: int) -> None:
    """What a newcomer needs: the addresses, a key where there is none yet, a line to paste."""
    from gateway.keys import KeyRing

    snapshot = read_policies(settings)
    key, team = "", next(iter(snapshot.teams), None)
    store = Store(settings.redis_url, deadline=PATIENCE)
    try:
        keys = KeyRing(store, pepper(settings))
        await keys.load()
        if team is not None and not keys.records():
            _, key = await keys.create(team, user=None, name="first key", models=(), expires=None)
    finally:
        await store.aclose()
    base = f"http://{settings.host}:{settings.port}"
    model = snapshot.public_models[0].name if snapshot.public_models else "MODEL"
    shown = key or "$GATEWAY_KEY"
    lines = [
        "",
        f"  gateway   {base}/v1   (also {base}/inference/v1)",
        f"  backend   http://127.0.0.1:{_DEMO_PORT}, scripted: it says the words of the prompt",
        f"  control   http://{settings.admin_host}:{settings.admin_port}, its key is in {settings.state}/admin_key",
        f"  policies  {settings.policies}/, revision {revision}",
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
    from gateway.policy import load

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
    from gateway.keys import expiry

    settings = read_settings(policies=policies, state=state)
    teams = read_policies(settings).teams
    if team not in teams:
        fail(f'"{team}" is no team of {settings.policies}/, expected one of {", ".join(teams) or "(none)"}', WRONG)
    patterns = tuple(part.strip() for part in models.split(",")) if models else ()
    try:
        until = None if expires is None else expiry(expires, time.time())
    except ValueError as unclear:
        fail(str(unclear), USAGE)

    async def create(ring: KeyRing) -> None:
        record, key = await ring.create(team, user=user, name=name, models=patterns, expires=until)
        if as_json:
            typer.echo(json.dumps({"key": key, **record.public(time.time())}))
        else:
            typer.echo(f"{key}\n\nkey {record.id} of team {team}; it is not shown again", err=False)

    with_keys(settings, create)


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
        table(columns, [[cell(record[column]) for column in columns] for record in records])

    with_keys(read_settings(state=state), show)


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
            fail("no key has this id; gateway keys list shows them all", WRONG)
        typer.echo(json.dumps(record.public(time.time())) if as_json else f"key {record.id} is revoked")

    with_keys(read_settings(state=state), revoke)


# — upstreams

UpstreamArgument = Annotated[str, typer.Argument(metavar="UPSTREAM", help="POOL/HOST:PORT, as the list has it")]


@upstreams_app.command("list")
def upstreams_list(as_json: JsonOption = False, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """List the upstreams of the policies, and which of them are drained."""
    from gateway.drains import listed

    settings = read_settings(policies=policies, state=state)
    snapshot = read_policies(settings)

    async def show(store: Store) -> None:
        rows = await listed(store, snapshot)
        if as_json:
            typer.echo(json.dumps(rows))
            return
        columns = ("upstream", "weight", "drained")
        table(columns, [[cell(row[column]) for column in columns] for row in rows])

    with_store(settings, show)


@upstreams_app.command("drain")
def upstreams_drain(upstream: UpstreamArgument, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """Give nothing new to an upstream, within a second and in every gateway of the store; what it has goes on."""
    from gateway.drains import drain

    _change_upstream(read_settings(policies=policies, state=state), upstream, drain)
    typer.echo(f"{upstream} is drained; gateway upstreams resume {upstream} ends it")


@upstreams_app.command("resume")
def upstreams_resume(upstream: UpstreamArgument, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """End what `drain` began."""
    from gateway.drains import resume

    _change_upstream(read_settings(policies=policies, state=state), upstream, resume)
    typer.echo(f"{upstream} gets requests again")


def _change_upstream(
    settings: Settings, upstream: str, change: Callable[[Store, str], Coroutine[Any, Any, None]]
) -> None:
    from gateway.drains import upstreams_of

    known = upstreams_of(read_policies(settings))
    if upstream not in known:
        fail(f'"{upstream}" is no upstream of the policies, expected one of {", ".join(known)}', WRONG)
    with_store(settings, lambda store: change(store, upstream))


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
    from gateway.explain import Looks, limits_of
    from gateway.identity import written_id
    from gateway.keys import KeyRing

    settings = read_settings(policies=policies, state=state)
    snapshot = read_policies(settings)
    named = None if model is None else snapshot.model(model)
    if model is not None and named is None:
        fail(f'"{model}" is no model of the policies', WRONG)

    async def show(store: Store) -> None:
        ring = KeyRing(store, pepper(settings))
        await ring.load()
        principal = ring.principal(written_id(key_id))
        if principal is None:
            fail("no key in force has this id; gateway keys list shows them all", WRONG)
        models = snapshot.public_models if named is None else (named,)
        rows: Any = await limits_of(Looks(store), snapshot, principal, models, ring.stored_user, user)
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
        table(head, cells, right=5)

    with_store(settings, show)


# — the ledger

app.command("export")(export)
app.add_typer(usage_app, name="usage")
app.add_typer(exports_app, name="exports")


# — the whole


@app.command()
def doctor(as_json: JsonOption = False, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """Check store, policies, upstreams, exports, traces, clocks, files, disk, ports and memory, and say what to do."""
    import msgspec

    from gateway.doctor import examine, show
    from gateway.findings import worst

    settings = read_settings(policies=policies, state=state)
    silence()
    findings = asyncio.run(examine(settings))
    verdict = worst(findings)
    if as_json:
        typer.echo(msgspec.json.encode({"verdict": verdict, "findings": findings}))
    else:
        show(findings)
    if verdict == "error":
        raise typer.Exit(WRONG)

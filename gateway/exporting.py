"""The commands `gateway export` and `gateway exports …`: the ledger carried elsewhere, and how far that is."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from gateway.console import (
    UNUSABLE,
    WRONG,
    JsonOption,
    PoliciesOption,
    StateOption,
    fail,
    progress,
    read_policies,
    read_settings,
    table,
    until_signalled,
    with_store,
)
from gateway.exports import Exporter, buried, forget, revive, standings
from gateway.settings import Settings
from gateway.store import Store

if TYPE_CHECKING:
    from gateway.language import Export

exports_app = typer.Typer(
    help="List exports, forget one, see to its dead letters.", no_args_is_help=True, rich_markup_mode=None
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="of the export, as the policies have it")]


def export(
    name: NameArgument,
    once: Annotated[
        bool, typer.Option("--once", help="end when all that is there now is delivered, or was refused")
    ] = False,
    policies: PoliciesOption = None,
    state: StateOption = None,
) -> None:
    """Deliver the ledger's rows where an export of the policies says, until SIGTERM or Ctrl-C."""
    from gateway import telemetry
    from gateway.receivers import sink_of
    from gateway.settlements import FORGETS

    settings = read_settings(policies=policies, state=state)
    policy = _policy(settings, name)
    telemetry.set_up(settings.log)
    try:
        sink = sink_of(policy, os.environ)
    except ValueError as missing:
        fail(f"export {name}: {missing}", UNUSABLE)

    async def deliver(store: Store) -> None:
        with _consumer(settings.state, name) as consumer:
            exporter = Exporter(
                store,
                name,
                sink,
                consumer=consumer,
                batch=policy.batch,
                attempts=policy.attempts,
                hold_back=FORGETS,
            )
            ended = await until_signalled(_deliver(exporter, name, once=once))
        if once and not ended:
            fail(f"export {name} was ended before everything was delivered", WRONG)
        if exporter.refused:
            later = f"each is tried {policy.attempts:,} times, once by a run, before it is a dead letter"
            fail(f"export {name}: {exporter.refused:,} rows were refused, expected none; {later}", WRONG)

    with_store(settings, deliver, quiet=False)


async def _deliver(exporter: Exporter, name: str, *, once: bool) -> None:
    """Rows to a sink, with a bar that tells how many."""
    with progress(f"export {name}", event="exporting") as told:
        await exporter.run(once=once, told=lambda far: told(far.done, far.left))


@contextmanager
def _consumer(state: Path, name: str) -> Iterator[str]:
    """The name of one who runs an export here: his alone as long as he runs it, and after a restart the same again, so
    that he goes on with what he had."""
    folder = state / "exports"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in count():
        with (folder / f"{name}.{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield f"{socket.gethostname()}-{number}"
            return


def _policy(settings: Settings, name: str) -> Export:
    exports = read_policies(settings).exports
    if name not in exports:
        fail(f'"{name}" is no export of {settings.policies}/, expected one of {", ".join(exports) or "(none)"}', WRONG)
    return exports[name]


@exports_app.command("list")
def exports_list(as_json: JsonOption = False, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """List the exports: what each has still to deliver, has under way, and has put aside."""
    settings = read_settings(policies=policies, state=state)
    known = read_policies(settings).exports

    async def show(store: Store) -> None:
        found = await standings(store)
        if as_json:
            typer.echo(msgspec.json.encode(found))
            return
        rows = [
            [
                one.export,
                known[one.export].to if one.export in known else "not in the policies",
                one.organisation,
                f"{'' if one.exact else '~'}{one.lag:,}",
                f"{one.pending:,}",
                f"{one.dead:,}",
            ]
            for one in found
        ]
        waiting = [[name, export.to, "-", "-", "-", "-"] for name, export in known.items()]
        begun = {one.export for one in found}
        rows += [row for row in waiting if row[0] not in begun]
        table(("export", "to", "organisation", "lag", "pending", "dead"), rows, right=3)

    with_store(settings, show)


@exports_app.command("forget")
def exports_forget(name: NameArgument, policies: PoliciesOption = None, state: StateOption = None) -> None:
    """Forget an export that nobody needs any more, so that it keeps no rows from being trimmed."""
    settings = read_settings(policies=policies, state=state)
    if name in read_policies(settings).exports:
        fail(f'"{name}" is in {settings.policies}/, expected an export that is not there any more', WRONG)

    async def away(store: Store) -> None:
        await _begun(store, name)
        typer.echo(f"export {name} is forgotten in {await forget(store, name):,} ledgers")

    with_store(settings, away)


@exports_app.command("dead")
def exports_dead(name: NameArgument, as_json: JsonOption = False, state: StateOption = None) -> None:
    """List the rows that an export has put aside, each with what its sink said of it."""

    async def show(store: Store) -> None:
        await _begun(store, name)
        found = await buried(store, name)
        if as_json:
            typer.echo(msgspec.json.encode(found))
            return
        rows = [[letter.organisation, letter.entry, letter.error] for letter in found]
        table(("organisation", "entry", "error"), rows)

    with_store(read_settings(state=state), show)


@exports_app.command("revive")
def exports_revive(name: NameArgument, state: StateOption = None) -> None:
    """Give the rows that an export has put aside back to be delivered."""

    async def back(store: Store) -> None:
        await _begun(store, name)
        typer.echo(f"{await revive(store, name):,} rows are to be delivered by {name} again")

    with_store(read_settings(state=state), back)


async def _begun(store: Store, name: str) -> None:
    """Make sure that the store knows the export."""
    begun = sorted({one.export for one in await standings(store)})
    if name not in begun:
        fail(f'"{name}" has delivered nothing yet, expected one of {", ".join(begun) or "(none)"}', WRONG)

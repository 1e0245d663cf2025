"""The commands `gateway usage …`: what was used, as it is being used, whether the ledger says the same, and a user
forgotten."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import datetime, tzinfo
from typing import Annotated

import msgspec
import typer

from gateway.buckets import KEPT_HOURS, first_hour
from gateway.charts import draw, usd
from gateway.console import (
    USAGE,
    WRONG,
    JsonOption,
    StateOption,
    fail,
    progress,
    read_settings,
    table,
    until_signalled,
    with_store,
)
from gateway.erase import erase
from gateway.errors import StoreUnavailable
from gateway.ledger import Entry, Reconciled, follow, organisations, pages, reconcile
from gateway.queries import BY, Unclear, csv_of, leading, matches, objects, query_of, stored_users, wanted, with_users
from gateway.records import COUNTERS, ERASED, Dimension
from gateway.rollups import running_hour
from gateway.settings import pepper
from gateway.store import Store
from gateway.sums import Query, report

_NOTICE_SECONDS = 1.0  # until rows of a new organisation are shown

usage_app = typer.Typer(rich_markup_mode=None)

Several = Annotated[
    list[str] | None, typer.Option(help="only this one, or a pattern as a shell has them ('a*'); any number of times")
]
Users = Annotated[
    list[str] | None,
    typer.Option(help="only this one, by its plain name, or as it is stored, or a pattern of that"),
]


@usage_app.callback(invoke_without_command=True)
def usage(
    context: typer.Context,
    by: Annotated[
        str, typer.Option(help="some of organisation, team, key, user, model, pool, hour, day, month; with commas")
    ] = BY,
    since: Annotated[
        str | None, typer.Option(help="7d, 12h, 2026-11-01, this-month, last-month: their beginning [everything]")
    ] = None,
    until: Annotated[str | None, typer.Option(help="up to, and without, such a time [now]")] = None,
    organisation: Several = None,
    team: Several = None,
    key: Several = None,
    user: Users = None,
    model: Several = None,
    pool: Several = None,
    zone: Annotated[str, typer.Option(help="whose days and months they are, such as Europe/Zurich")] = "UTC",
    top: Annotated[int | None, typer.Option(min=1, help="only so many groups, the most expensive")] = None,
    live: Annotated[bool, typer.Option("--follow", help="show rows as they are written, until Ctrl-C")] = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="for spreadsheets")] = False,
    state: StateOption = None,
) -> None:
    """What was used, summed by whatever is asked for."""
    given = [name for name in context.params if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"]
    if context.invoked_subcommand is not None:
        if given:
            fail(f"{_option(given[0])} stands before {context.invoked_subcommand}, expected after it", USAGE)
        return
    _check_together(given)
    where: dict[Dimension, list[str] | None] = {
        "organisation": organisation,
        "team": team,
        "key": key,
        "user": user,
        "model": model,
        "pool": pool,
    }
    try:
        asked = query_of(by, since, until, zone, where, time.time())
    except Unclear as unclear:
        fail(str(unclear), USAGE)
    settings = read_settings(state=state)

    async def show(store: Store) -> None:
        query = await with_users(store, pepper(settings), asked)
        if live:
            await until_signalled(_follow(store, query, as_json))
            return
        sums = await report(store, query)
        shown, others = leading(query, sums, len(sums) if top is None else top)
        if as_json:
            typer.echo(json.dumps(objects(query, shown), ensure_ascii=False))
        elif as_csv:
            typer.echo(csv_of(query, shown), nl=False)
        else:
            draw(query, shown, others, _cut(query, await running_hour(store)))

    with_store(settings, show)


def _check_together(given: Sequence[str]) -> None:
    """Refuse options that make no sense beside each other."""
    if "as_json" in given and "as_csv" in given:
        fail("--json and --csv are given, expected one of them", USAGE)
    odd = [name for name in ("by", "since", "until", "top", "as_csv") if name in given]
    if "live" in given and odd:
        fail(f"{_option(odd[0])} is given with --follow, which shows each row from now on, expected without", USAGE)


def _cut(query: Query, now: int) -> str:
    """A word on what was asked for and is not kept any more."""
    kept = now - KEPT_HOURS
    if query.since is None or first_hour(query.since) >= kept:
        return ""
    begin = datetime.fromtimestamp(kept * 3600, query.zone)
    return f"sums are kept for {KEPT_HOURS // 24} days: what was used before {begin:%Y-%m-%d %H:%M} is not in this"


def _option(name: str) -> str:
    """An option as it is written."""
    return {"as_json": "--json", "as_csv": "--csv", "live": "--follow"}.get(name, f"--{name}")


# — as it is being used


async def _follow(store: Store, query: Query, as_json: bool) -> None:
    """A line for each row that is asked for, also of organisations that come later."""
    those = set(await _wanted(store, query)) | query.where.get("organisation", frozenset())

    async def tell(entries: AsyncIterator[Entry]) -> None:
        async for entry in entries:
            if matches(query.where, entry.record):
                typer.echo(_as_json(entry) if as_json else _line(entry, query.zone))

    await asyncio.gather(tell(follow(store, sorted(those))), tell(_of_newcomers(store, query, those)))


async def _of_newcomers(store: Store, query: Query, known: Collection[str]) -> AsyncIterator[Entry]:
    """The rows of organisations that come later, from their first one on. They are few: it looks, and keeps no
    connection waiting for each."""
    read: dict[str, str] = {}  # where the next rows of each begin
    while True:
        try:
            for name in await _wanted(store, query):
                if name in known:
                    continue
                async for page in pages(store, name, read.get(name, "-")):
                    read[name] = f"({page[-1].id}"
                    for entry in page:
                        if isinstance(entry, Entry) and not entry.erased:
                            yield entry
        except StoreUnavailable:
            await store.back()
        await asyncio.sleep(_NOTICE_SECONDS)


async def _wanted(store: Store, query: Query) -> list[str]:
    """The organisations that there are and that are asked for."""
    named = query.where.get("organisation")
    return [one for one in await organisations(store) if named is None or wanted(one, named)]


def _as_json(entry: Entry) -> str:
    row = msgspec.to_builtins(entry.record)
    return json.dumps({"entry": entry.id, "written_ms": entry.written_ms, **row}, ensure_ascii=False)


def _line(entry: Entry, zone: tzinfo) -> str:
    """A row for people: when, who, what, how much, and how it ended."""
    row = entry.record
    at = datetime.fromtimestamp(entry.written_ms / 1000, zone)
    told = row.ended if row.status == "settled" else f"{row.status}, {row.ended}"
    return (
        f"{at:%H:%M:%S}  {row.team:<16.16} {row.key:<14.14} {row.model.rpartition('/')[2]:<28.28} "
        f"{row.input_tokens:>8,} → {row.output_tokens:<8,} {usd(row.cost_microusd):>14}  {told}"
    )


# — whether it is right


@usage_app.command("reconcile")
def usage_reconcile(
    organisation: Annotated[str | None, typer.Option(help="only this one [all]")] = None,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Add up the ledger's rows and compare them with the sums: where they differ, it ends with 1."""
    found: dict[str, Reconciled] = {}

    async def compare(store: Store) -> None:
        for name in await _named(store, organisation):
            found[name] = await reconcile(store, name)

    with_store(read_settings(state=state), compare)
    if as_json:
        typer.echo(json.dumps([_told(name, one) for name, one in found.items()], ensure_ascii=False))
    else:
        rows = [
            [name, f"{one.rows:,}", f"{one.hours:,}", f"{one.unreadable:,}", f"{len(one.differences):,}"]
            for name, one in found.items()
        ]
        table(("organisation", "rows", "hours", "unreadable", "differences"), rows, right=4)
        _show_differences(found)
    if any(one.differences or one.unreadable for one in found.values()):
        raise typer.Exit(WRONG)


def _show_differences(found: Mapping[str, Reconciled]) -> None:
    """Every sum that is not what its rows add up to, counter by counter."""
    rows = [
        [name, one.grain, str(one.number), one.group, counter, f"{ledger:,}", f"{kept:,}"]
        for name, reconciled in found.items()
        for one in reconciled.differences
        for counter, ledger, kept in zip(COUNTERS, one.ledger, one.sums, strict=True)
        if ledger != kept
    ]
    if rows:
        table(("organisation", "grain", "number", "group", "counter", "ledger", "sums"), rows, right=2)


def _told(name: str, one: Reconciled) -> dict[str, object]:
    differences = [difference._asdict() for difference in one.differences]
    numbers = {"rows": one.rows, "hours": one.hours, "unreadable": one.unreadable}
    return {"organisation": name, **numbers, "differences": differences}


async def _named(store: Store, organisation: str | None) -> Sequence[str]:
    """The organisation that is asked for, or all."""
    known = await organisations(store)
    if organisation is not None and organisation not in known:
        fail(f'"{organisation}" has no ledger, expected one of {", ".join(known) or "(none)"}', WRONG)
    return known if organisation is None else [organisation]


# — forgetting


@usage_app.command("erase")
def usage_erase(
    user: Annotated[str, typer.Option(help="whom to forget, by the plain name or as it is stored")],
    organisation: Annotated[str, typer.Option(help="where")],
    yes: Annotated[bool, typer.Option("--yes", help="without asking")] = False,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Forget a user: rows and sums keep their amounts, and nobody's name. It cannot be undone.

    Where nothing has the user it ends with 1.
    """
    if user in ("", ERASED):
        fail(f'"{user}" stands for nobody, expected a user', USAGE)
    if not yes:
        if not sys.stdin.isatty():
            fail("nobody is here to be asked, expected --yes", USAGE)
        typer.confirm(f"Forget this user in every row and sum of {organisation}? It cannot be undone", abort=True)
    settings = read_settings(state=state)

    async def forget(store: Store) -> None:
        await _named(store, organisation)
        rows = sums = 0
        for form in await stored_users(store, pepper(settings), [user], [organisation]):
            with progress("rows and sums") as told:
                erased = await erase(store, organisation, form, lambda done, whole: told(done, whole - done))
            rows, sums = rows + erased.rows, sums + erased.sums
        if as_json:
            typer.echo(json.dumps({"organisation": organisation, "rows": rows, "sums": sums}))
        if not rows and not sums:
            fail(f"no row and no sum of {organisation} has this user, expected one who is there", WRONG)
        if not as_json:
            typer.echo(f"forgotten in {rows:,} rows and {sums:,} sums of {organisation}; their amounts are kept")

    with_store(settings, forget)

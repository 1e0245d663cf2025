"""What the commands share: exit codes, options, settings and stores opened, tables drawn.

Exit codes: 0 done; 1 the thing asked about is wrong or not there; 2 the command line is wrong; 3 the store or the
address cannot be used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from gateway.documents import PolicyError
from gateway.embedded import Embedded
from gateway.errors import GatewayError, StoreUnavailable
from gateway.masks import masked_text
from gateway.settings import Settings, SettingsError, pepper
from gateway.store import Store, StoreError

if TYPE_CHECKING:
    from gateway.keys import KeyRing
    from gateway.snapshot import Snapshot

T = TypeVar("T")

WRONG, USAGE, UNUSABLE = 1, 2, 3
# A command is not a request: it may wait for a store that is busy.
PATIENCE = 5.0

PoliciesOption = Annotated[Path | None, typer.Option("--policies", metavar="DIR", help="policy documents [policies]")]
StateOption = Annotated[Path | None, typer.Option("--state", metavar="DIR", help="state folder [.gateway]")]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]


def fail(text: str, code: int) -> NoReturn:
    """End the command with a line on stderr."""
    typer.echo(f"gateway: {text}", err=True)
    raise typer.Exit(code)


def mask_defects() -> None:
    """Have what ends a thread told as Python does, but for what looks like a key: its words may be anybody's."""
    threading.excepthook = lambda ended: tell_defect(ended.exc_value)
    sys.unraisablehook = lambda ended: tell_defect(ended.exc_value)


def tell_defect(defect: BaseException | None) -> None:
    """A traceback on stderr, with what looks like a key masked."""
    if isinstance(defect, Exception):
        sys.stderr.write(masked_text("".join(traceback.format_exception(defect))))


# — what a command works with


def read_settings(**given: Any) -> Settings:
    """The settings, where what is given and not None comes before the environment."""
    try:
        return Settings.read(**given)
    except SettingsError as error:
        fail(str(error), USAGE)


def check_tracing() -> None:
    """End the command where OpenTelemetry's variables ask for traces that cannot be had."""
    from gateway import telemetry

    try:
        if (asked := telemetry.tracing(os.environ)) is not None:
            telemetry.trusted(asked)
    except SettingsError as error:
        fail(str(error), USAGE)


def read_policies(settings: Settings) -> Snapshot:
    """The policies as they stand in their folder."""
    from gateway.policy import load

    try:
        return load(settings.policies)
    except PolicyError as error:
        fail(str(error), WRONG)


def store_of(settings: Settings) -> AbstractContextManager[str]:
    """The address of the store, embedded or not, as a context."""
    if settings.redis_url:
        return nullcontext(settings.redis_url)
    return _embedded_url(settings.state)


def embedded_of(settings: Settings) -> AbstractContextManager[Embedded | None]:
    """The embedded store as a context; None where an address is set."""
    return nullcontext(None) if settings.redis_url else embedded(settings.state)


@contextmanager
def _embedded_url(state: Path) -> Iterator[str]:
    with embedded(state) as server:
        yield server.url


@contextmanager
def embedded(state: Path) -> Iterator[Embedded]:
    """The embedded store of a state folder; what an operator can mend is one line."""
    try:
        server = Embedded(state)
        with server:
            yield server
    except StoreError as error:
        fail(str(error), UNUSABLE)


def silence() -> None:
    """Log nothing: a command says itself what is wrong."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def with_store(settings: Settings, work: Callable[[Store], Coroutine[Any, Any, None]], *, quiet: bool = True) -> None:
    """Do some work with the store; one that is away ends the command. `quiet`: nothing is logged meanwhile."""
    if quiet:  # what is wrong is told once, below
        silence()

    async def run(url: str) -> None:
        store = Store(url, deadline=PATIENCE)
        try:
            await work(store)
        except StoreUnavailable as away:
            raise StoreError(f"the store of keys and limits {store.reason or 'does not answer'}") from away
        finally:
            await store.aclose()

    with store_of(settings) as url:
        run_or_exit(run(url), asyncio.run)


def with_keys(settings: Settings, work: Callable[[KeyRing], Coroutine[Any, Any, None]]) -> None:
    """Do some work with the keys of the store."""
    from gateway.keys import KeyRing

    async def run(store: Store) -> None:
        ring = KeyRing(store, pepper(settings))
        await ring.load()
        await work(ring)

    with_store(settings, run)


def run_or_exit(work: Coroutine[Any, Any, T], run: Callable[[Coroutine[Any, Any, T]], T]) -> T:
    """The result of some work; what an operator can mend is one line and an exit code, not a traceback."""
    try:
        return run(work)
    except PolicyError as error:
        fail(str(error), WRONG)
    except SettingsError as error:
        fail(str(error), USAGE)
    except StoreError as error:
        fail(str(error), UNUSABLE)
    except GatewayError as error:
        cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
        fail(f"{error.message}{cause}", UNUSABLE)


async def until_signalled(work: Coroutine[Any, Any, None]) -> bool:
    """Do work that may go on for ever; whether it ended by itself. SIGTERM and Ctrl-C cancel it: no failure either."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task
    return not task.cancelled()


# — serving


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or a word why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror or error}", UNUSABLE)
    listener.listen(2048)
    listener.setblocking(False)
    return listener


@contextmanager
def own_signals() -> Iterator[None]:
    """uvicorn drains on SIGTERM and SIGINT, then raises them again for whoever was there before: for us, nothing."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# — tables


def cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "*"
    return "-" if value is None else str(value)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0, total: Sequence[str] = (), below: str = ""
) -> None:
    """A table for people; the last `right` columns are numbers. `total` is a last row, `below` a line under it all."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(head):
        number = i >= len(head) - right
        drawn.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        drawn.add_row(*map(_plain, row))
    if total and rows:
        drawn.add_row(*map(_plain, total), style="bold")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(drawn)
    if not rows:
        console.print("(nothing)")
    if below:
        console.print(_plain(below), style="dim", soft_wrap=True)


def _plain(text: str) -> Any:
    """A text as it is: names are not the markup that they may look like."""
    from rich.text import Text

    return Text(text)


_LINE_SECONDS = 10.0


@contextmanager
def progress(what: str, *, event: str = "") -> Iterator[Callable[[int, int], None]]:
    """What is told how much is done and how much is left: it moves a bar on a terminal; elsewhere it writes a line of
    the log every 10 seconds, where there is an `event` to call it."""
    with _bar(what) if sys.stderr.isatty() else nullcontext(_lines(event)) as told:
        yield told


def _lines(event: str) -> Callable[[int, int], None]:
    import structlog

    log, next_line = structlog.get_logger("gateway"), time.monotonic() + _LINE_SECONDS

    def told(done: int, left: int) -> None:
        nonlocal next_line
        if event and time.monotonic() >= next_line:
            next_line = time.monotonic() + _LINE_SECONDS
            log.info(event, done=done, left=left)

    return told


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, left: bar.update(task, completed=done, total=done + left)

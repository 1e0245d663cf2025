"""How a supervisor gives its place to new code and keeps everything: its number, its sockets, its processes.

A process that executes another program stays the same process. Its children stay its children, and descriptors stay
open where it says so: the listening sockets, so that no connection is refused, the lines to all processes, so that none
of them sees an end, and the lock on a store of our own. What else the next supervisor has to know is in a file without
a name. Whether it understands that is tried before, in a child, for there is no way back.

Signals wait meanwhile, and the next supervisor takes them as soon as it can.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final, Self

import msgspec

from gateway.pipes import Kind, Told

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)

_PATIENCE = 20.0  # seconds that the trial may take


class Held(msgspec.Struct, frozen=True):
    """One process that is handed over."""

    place: str
    current: bool  # whether it has the place; if not, it is on its way out
    pid: int
    line: int  # descriptor
    unheard: bytes  # what came over the line, and nobody took
    told: Told
    ready: bool
    began: float  # time.monotonic, which is the machine's


class Handover(msgspec.Struct, frozen=True):
    """All that a supervisor holds, in descriptors and numbers."""

    listeners: dict[Kind, int]
    lock: int  # on a store of our own; -1: there is none
    restarts: dict[str, tuple[int, int]]  # of each place: all of them, and deaths in a row
    processes: tuple[Held, ...]

    def written(self) -> int:
        """The descriptor of a file that holds it. The caller closes it. Raises OSError."""
        file = _nameless()
        os.pwrite(file, msgspec.json.encode(self), 0)
        return file

    @classmethod
    def read(cls, file: int) -> Self:
        """What stands in such a file. Raises msgspec.MsgspecError where another version has written it."""
        return msgspec.json.decode(os.pread(file, os.fstat(file).st_size, 0), type=cls)

    def descriptors(self) -> list[int]:
        lock = [] if self.lock < 0 else [self.lock]
        return [*self.listeners.values(), *(held.line for held in self.processes), *lock]


def command(file: int, *, trial: bool = False) -> list[str]:
    """How the next supervisor is executed; as a trial, it only says with its exit code whether it could be."""
    return [sys.executable, "-m", "gateway", "takeover", str(file), *(["--trial"] if trial else [])]


async def understood(handover: Handover, environment: Mapping[str, str]) -> bool:
    """Whether the code as it is now would take this over. Its own words go to stderr."""
    file = handover.written()
    try:
        child = await asyncio.create_subprocess_exec(
            *command(file, trial=True),
            stdin=asyncio.subprocess.DEVNULL,
            env=environment,
            pass_fds=(*handover.descriptors(), file),
        )
    finally:
        os.close(file)
    try:
        async with asyncio.timeout(_PATIENCE):
            return await child.wait() == 0
    except TimeoutError:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        return False


def execute(handover: Handover, environment: Mapping[str, str]) -> None:
    """Be the next supervisor. Returns only by OSError, and then nothing has changed."""
    file = handover.written()
    stay = [*handover.descriptors(), file]
    try:
        _inherit(stay, True)
        words = command(file)
        os.execve(words[0], words, environment)
    except OSError:
        _inherit(stay, False)
        os.close(file)
        raise


def taken(file: int) -> Handover:
    """What was handed over to this process, by the descriptor that its command line has."""
    handover = Handover.read(file)
    os.close(file)
    _inherit(handover.descriptors(), False)
    return handover


def hold_signals() -> None:
    """Have signals wait, in this program and in the one that it executes, which has no handlers when it begins."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def take_signals() -> None:
    """Take the signals that have waited, and all that come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _nameless() -> int:
    """A file in memory, where there may be no folder to write to, and no room; elsewhere one on the disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("handover")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _inherit(descriptors: Iterable[int], through: bool) -> None:
    for descriptor in descriptors:
        os.set_inheritable(descriptor, through)

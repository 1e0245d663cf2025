"""What the kernel says of processes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Stat(NamedTuple):
    """How a process stands; state Z is one that ended and that its parent took no note of."""

    state: str
    parent: int


def stat_of(pid: int) -> Stat | None:
    """None where there is no such process."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return Stat(state, int(parent))


def program_of(pid: int) -> list[str]:
    """The words that it was executed with; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def all_processes() -> dict[int, Stat]:
    """Those that there are at the moment."""
    found = {int(folder.name): stat_of(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    return {pid: stat for pid, stat in found.items() if stat is not None}


def states_of_children(parent: int) -> dict[int, str]:
    return {pid: stat.state for pid, stat in all_processes().items() if stat.parent == parent}


def alive(pids: Iterable[int]) -> list[int]:
    """Those of them that have not ended."""
    return [pid for pid in pids if (stat := stat_of(pid)) is not None and stat.state != "Z"]

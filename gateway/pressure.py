"""How near a process is to what the host lets it have: memory and open files.

The kernel kills who takes too much memory, with all that he serves, and a process without a free file cannot even
accept a connection to refuse it. So less is taken before that, in steps.

    memory 80 %   connections end with their answers, and what Python holds back is given back
    memory 90 %   new requests are refused
    memory 95 %   and no connection is accepted

Files are counted as connections: each may need another one to a backend. No more are accepted than there are files for
both, with some left over for stores, spools and logs.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_KEPT_FILES = 64  # beside connections: the store's, the spool, pipes, policies while they are read
_STEPS = (0.80, 0.90, 0.95)
_BACK = 0.03  # how far a figure must fall below a step, so that it is left
_ROOT = Path("/sys/fs/cgroup")
_PAGE = resource.getpagesize()


class Level(IntEnum):
    """What is done about it; each has what those before it have."""

    NONE = 0
    CLOSING = 1  # connections end with their answers
    REFUSING = 2  # new requests are refused
    DEAF = 3  # no connection is accepted


def most_connections() -> int:
    """How many callers there are files for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, (min(soft, 1 << 20) - _KEPT_FILES) // 2)


def memory_used(proc: Path = Path("/proc/self"), root: Path = _ROOT) -> float:
    """The share of what there is that is used: of the process's address space, where that is limited, or of the memory
    of a control group, its own or one above it, whichever is nearest to its end. 0 where nothing is limited."""
    shares = [group.share for group in memory_groups(proc, root)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        shares.append(int((proc / "statm").read_text().split()[0]) * _PAGE / limit)
    return max(shares, default=0.0)


class Group(NamedTuple):
    """A control group whose memory is limited, in bytes."""

    limit: int
    used: int  # without files that the kernel can drop

    @property
    def share(self) -> float:
        return self.used / max(1, self.limit)


class _Version(NamedTuple):
    folder: str  # where its groups stand, below the root of all
    limit: str
    used: str
    dropped: str  # what memory.stat calls files that the kernel can drop, with those of the groups below


# By what stands before a group in /proc/self/cgroup: `0::/pods/one` is of version 2, `4:memory:/pods/one` of version 1.
_VERSIONS = {
    "": _Version("", "memory.max", "memory.current", "inactive_file"),
    "memory": _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_NO_LIMIT = 1 << 60  # version 1 has a number for it


def memory_groups(proc: Path = Path("/proc/self"), root: Path = _ROOT) -> list[Group]:
    """The control group of a process and those above it, as far as their memory is limited, from below.

    Whichever is full first, the kernel kills. In a container its own group is the root, whatever it is called outside.
    """
    groups = []
    for line in _read(proc / "cgroup").splitlines():
        controllers, _, own = line.partition(":")[2].partition(":")
        for controller in controllers.split(","):
            if (version := _VERSIONS.get(controller)) is not None:
                top, names = root / version.folder, [name for name in own.split("/") if name]
                folders = [top.joinpath(*names[:depth]) for depth in range(len(names), -1, -1)]
                groups += [group for folder in folders if (group := _group(folder, version)) is not None]
    return groups


def _group(folder: Path, version: _Version) -> Group | None:
    """A control group, or None where it is not there or has no limit."""
    limit = _read(folder / version.limit)
    if not limit.isdecimal() or int(limit) >= _NO_LIMIT:
        return None
    used = int(_read(folder / version.used) or 0)
    stat = _read(folder / "memory.stat").splitlines()
    dropped = sum(int(line.split()[1]) for line in stat if line.startswith(f"{version.dropped} "))
    return Group(int(limit), used - dropped)


def _read(file: Path) -> str:
    """What stands in a file of the kernel's; nothing where there is none."""
    try:
        return os.fsdecode(file.read_bytes()).strip()
    except OSError:
        return ""


def give_back() -> None:
    """Give memory that nothing uses back to the kernel."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


class Pressure:
    """The level of a process. `used` says the share of memory that is used, `relieve` is called when much of it is."""

    def __init__(self, used: Callable[[], float] = memory_used, relieve: Callable[[], None] = give_back) -> None:
        self.level = Level.NONE
        self.share = 0.0
        self._used = used
        self._relieve = relieve

    def look(self) -> bool:
        """Look anew; whether the level is another one."""
        before, self.share = self.level, self._used()
        level = Level(sum(self.share >= step for step in _STEPS))
        if level < before and self.share >= _STEPS[before - 1] - _BACK:
            level = before
        if level and not before:
            self._relieve()
        self.level = level
        return level != before

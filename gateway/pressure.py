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
import resource
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

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
    of its control group, whichever is nearer to its end. 0 where nothing is limited."""
    shares = [0.0]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        shares.append(int((proc / "statm").read_text().split()[0]) * _PAGE / limit)
    with suppress(OSError, ValueError, IndexError):
        own = (proc / "cgroup").read_text().strip().rpartition("::")[2]
        # In a container its own group is the root.
        found = map(group_memory, (root / own.lstrip("/"), root))
        shares += [used / limit for limit, used in filter(None, found)]
    return max(shares)


def group_memory(folder: Path) -> tuple[int, int] | None:
    """The limit of a control group (version 2) and what it uses, without files that the kernel can drop, in bytes. None
    where it has none."""
    limit, used, stat = (_read(folder / f"memory.{name}") for name in ("max", "current", "stat"))
    if not limit.isdecimal():
        return None
    dropped = [int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")]
    return int(limit), int(used or 0) - sum(dropped)


def _read(file: Path) -> str:
    """What stands in a file of the kernel's; nothing where there is none."""
    try:
        return file.read_text().strip()
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

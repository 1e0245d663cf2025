"""Whether files have changed: a look at them costs a stat each, and reads nothing.

A mark follows links, so that a mounted directory of Kubernetes shows its change: there `..data` is swapped for a link
to another directory, and every file is another one at once. Whoever reads several files compares their marks before
and after: only what has stood still meanwhile was read whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

# Device, inode, time of the last change in nanoseconds, size; None: it is not there, or may not be looked at.
Mark = tuple[int, int, int, int] | None
Marks = Mapping[str, Mark]


def marks_of(files: Iterable[str | os.PathLike[str]]) -> Marks:
    """The mark of each file, by its path."""
    return {os.fspath(file): _mark(file) for file in files}


def _mark(file: str | os.PathLike[str]) -> Mark:
    try:
        found = os.stat(file)  # noqa: PTH116 - a second of every worker has as many of these as there are files
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

"""What a process has open, by name, for tests that say that nothing is left open."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path


def descriptors(kind: str = "") -> Counter[str]:
    """How often each file, pipe and socket is open here whose name begins with `kind`; a socket's is `socket:[…]`.

    Subtract an earlier one to see what came since. Equal they need not be: what an earlier test left to the garbage
    collector is closed whenever that runs.
    """
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that the folder itself is read with
            name = str(link.readlink())
            found[name] += name.startswith(kind)
    return found

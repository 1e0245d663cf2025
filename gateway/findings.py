"""What the doctor says of one thing: what was found, what is expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Verdict = Literal["ok", "warning", "error"]

_WORST_FIRST: tuple[Verdict, ...] = ("error", "warning")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. What is `expected` and what to `do` is said of what is not well."""

    check: str  # what was looked at, the same word for the same thing for ever: store.memory
    of: str  # whose: a server, an upstream, a folder
    verdict: Verdict
    found: str
    expected: str = ""
    do: str = ""


def ok(check: str, of: str, found: str) -> Finding:
    return Finding(check, of, "ok", found)


def warning(check: str, of: str, found: str, expected: str, do: str) -> Finding:
    """What is going to be trouble, or is a risk that somebody may have chosen to take."""
    return Finding(check, of, "warning", found, expected, do)


def error(check: str, of: str, found: str, expected: str, do: str) -> Finding:
    """What keeps requests from being served as they should be, now."""
    return Finding(check, of, "error", found, expected, do)


def graded(share: float, warn: float, fail: float) -> Verdict:
    """The verdict on what should be small."""
    return "error" if share >= fail else "warning" if share >= warn else "ok"


def judged(verdict: Verdict, check: str, of: str, found: str, expected: str, do: str) -> Finding:
    """A finding with this verdict; of what is well nothing more is said."""
    return ok(check, of, found) if verdict == "ok" else Finding(check, of, verdict, found, expected, do)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The verdict on all of them together."""
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in _WORST_FIRST if verdict in found), "ok")


def amount(size: float) -> str:
    """Bytes as people read them: 3.2 GiB."""
    power = 0
    while size >= 1024 and power < len(_UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.0f} {_UNITS[power]}" if size >= 100 or power == 0 else f"{size:.1f} {_UNITS[power]}"

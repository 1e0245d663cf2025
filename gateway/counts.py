"""The counts of the store: what the scripts of lua/ are told of a charge when it is taken, and when it is corrected.

A limit is told as its kind, what is taken, its capacity, flags, and what its kind needs; a correction as its kind, the
difference between used and taken, what was taken, flags, and what its kind needs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from gateway.snapshot import NOMINAL, Limit, windows_around
from gateway.terms import Charge

Words = tuple[str | int, ...]

UNKNOWN_WINDOW = 0  # of a charge of which the store has not said in which window it stands

_HOLDS, _SHADOW = 1, 2
_LETTERS: Mapping[str, str] = {"rate": "r", "quota": "q", "rolling": "w", "seats": "s"}


class _Told(NamedTuple):
    """What is told of a limit whatever is charged: before its calendar, and after it."""

    letter: str
    flags: int
    own: Words
    thresholds: Words


@lru_cache(maxsize=4096)
def _told(limit: Limit) -> _Told:
    own: Words = {
        "rate": (limit.amount, limit.period),
        "quota": (NOMINAL.get(limit.window, 0),),
        "rolling": (limit.period,),
        "seats": (),
    }[limit.kind]
    thresholds = tuple(max(1, limit.amount_at(share)) for share in limit.warn_at)
    return _Told(_LETTERS[limit.kind], _HOLDS * limit.holds + _SHADOW * limit.shadow, own, thresholds)


def taken(charge: Charge) -> Words:
    """A charge in the words of admit.lua."""
    limit = charge.limit
    told = _told(limit)
    starts = () if limit.zone is None else _windows(limit.window, limit.zone)
    return (told.letter, charge.amount, limit.capacity, told.flags, *told.own, *starts, *told.thresholds)


def corrected(charge: Charge, used: int, window: int) -> Words:
    """What becomes of a charge of which so much was used, in the words of settle.lua; `window` is the one in which it
    was taken."""
    limit = charge.limit
    told = _told(limit)
    words = (told.letter, used - charge.amount, charge.amount, told.flags)
    if limit.kind in ("quota", "rolling"):
        return (*words, limit.capacity, *told.own, window, *told.thresholds)
    return (*words, *told.own)


def running_window(limit: Limit) -> int:
    """The start of a calendar quota's window by this gateway's clock, in seconds since 1970; else an unknown one."""
    return UNKNOWN_WINDOW if limit.zone is None else _windows(limit.window, limit.zone)[1]


_calendar: dict[tuple[str, str], tuple[int, ...]] = {}


def _windows(window: str, zone: ZoneInfo) -> tuple[int, ...]:
    """Four window starts around now, seconds since 1970; computed anew when the window is over."""
    now = time.time()
    starts = _calendar.get((window, zone.key))
    if starts is None or not starts[1] <= now < starts[2]:
        starts = tuple(int(at.timestamp()) for at in windows_around(window, zone, datetime.fromtimestamp(now, UTC)))
        _calendar[window, zone.key] = starts
    return starts

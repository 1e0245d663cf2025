"""Buckets of time: hours, days and months in UTC, which of them cover a span, and what they are called in a zone.

A span of hours is covered by whole months, days and hours. Where it is shorter, parts are taken away again: a month
without its first hour is two buckets instead of fifty-three. What is taken away has ended, so it can not change between
two reads; what is still running is only ever added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, tzinfo
from itertools import groupby
from typing import NamedTuple

from gateway.records import Grain

KEPT_HOURS = 400 * 24  # what sums are kept for

_EPOCH = date(1970, 1, 1).toordinal()
_NEVER = 1 << 40  # hours

Bucket = tuple[Grain, int]


class Part(NamedTuple):
    """One hash of a cover: added, or with sign -1 taken away."""

    sign: int
    grain: Grain
    number: int


def bucket(grain: Grain, hour: int) -> int:
    """The number of the hour, day or month that an hour is in, all since 1970 in UTC."""
    if grain == "hour":
        return hour
    if grain == "day":
        return hour // 24
    day = date.fromordinal(_EPOCH + hour // 24)
    return (day.year - 1970) * 12 + day.month - 1


def hours(grain: Grain, number: int) -> range:
    """The hours of an hour, a day or a month."""
    if grain == "hour":
        return range(number, number + 1)
    if grain == "day":
        return range(number * 24, number * 24 + 24)
    return range(_month_begins(number), _month_begins(number + 1))


def finer(grain: Grain, number: int) -> list[Bucket]:
    """The days of a month, the hours of a day; nothing of an hour."""
    if grain == "hour":
        return []
    inside = hours(grain, number)
    if grain == "day":
        return [("hour", hour) for hour in inside]
    return [("day", hour // 24) for hour in inside[::24]]


def cover(first: int, last: int, now: int) -> list[Part]:
    """The fewest hashes that have each hour from `first` to before `last` once, and no other.

    `now` is the hour that is running. Nothing is later, so a span that has it has no end.
    """
    last = _NEVER if last > now else last
    months = range(bucket("month", first), bucket("month", min(last, now + 1) - 1) + 1) if first < last else range(0)
    return [part for month in months for part in _cover("month", month, first, last, now)]


def _cover(grain: Grain, number: int, first: int, last: int, now: int) -> list[Part]:
    inside = hours(grain, number)
    begin, end = inside.start, inside.stop
    if last <= begin or end <= first:
        return []
    whole = Part(1, grain, number)
    if first <= begin and end <= last:
        return [whole]
    found = [part for one in finer(grain, number) for part in _cover(*one, first, last, now)]
    # What is taken away is over, and its hours are still kept.
    if begin > now - KEPT_HOURS and first <= now and (end <= last or end <= now):
        beside = ((begin, first), (last, end))
        away = [part for span in beside for one in finer(grain, number) for part in _cover(*one, *span, now)]
        if 1 + len(away) < len(found):
            return [whole, *(part._replace(sign=-part.sign) for part in away)]
    return found


def spans(by: Sequence[Grain], first: int, last: int, zone: tzinfo) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The buckets of a span of hours: their names, first hour, and the hour after the last. Each hour is in one."""
    if not by:
        yield (), first, last
        return
    for names, those in groupby(range(first, last), lambda hour: _names(by, hour, zone)):
        inside = list(those)
        yield names, inside[0], inside[-1] + 1


def _names(by: Sequence[Grain], hour: int, zone: tzinfo) -> tuple[str, ...]:
    at = datetime.fromtimestamp(hour * 3600, zone)
    return tuple(_NAMES[grain](at) for grain in by)


def _hour_name(at: datetime) -> str:
    """With what it is off UTC: where the clock is set back, two hours of a day have the same number."""
    text = at.isoformat(timespec="minutes")
    return f"{text[:13]}:00{text[16:]}"


_NAMES: Mapping[Grain, Callable[[datetime], str]] = {
    "hour": _hour_name,
    "day": lambda at: f"{at.year:04}-{at.month:02}-{at.day:02}",
    "month": lambda at: f"{at.year:04}-{at.month:02}",
}


def _month_begins(number: int) -> int:
    return (date(1970 + number // 12, number % 12 + 1, 1).toordinal() - _EPOCH) * 24


def first_hour(seconds: int) -> int:
    """The first hour since 1970 that does not begin before a moment."""
    return -(-seconds // 3600)

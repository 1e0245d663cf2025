"""What a report is asked for, in words, by a command line or a query; and what it found, as programs read it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from zoneinfo import ZoneInfo

from gateway.buckets import first_hour
from gateway.identity import is_stored_user, stored_user
from gateway.keys import KeyRing
from gateway.ledger import organisations
from gateway.records import COUNTERS, DIMENSIONS, GRAINS, Dimension, Grain, UsageRecord
from gateway.store import Store
from gateway.sums import Query, Sum

Where = Mapping[Dimension, frozenset[str]]

BY = "team,model"
KNOWN: Mapping[str, Dimension | Grain] = {**{word: word for word in DIMENSIONS}, **{word: word for word in GRAINS}}
_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would reckon (OWASP, CSV Injection)


class Unclear(ValueError):
    """A word that is not understood: `name` is what it was given for, the text what was found and what is expected."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def query_of(
    by: str,
    since: str | None,
    until: str | None,
    zone: str,
    where: Mapping[Dimension, Iterable[str] | None],
    now: float,
) -> Query:
    """The query that these words ask for; a dimension without values is not looked at. Raises Unclear.

    Dates and months are those of the zone; so long ago is the beginning of the hour in UTC that it falls in. `until` is
    the first moment that is not in the report.
    """
    place = _zone(zone)
    begin, end = (
        None if text is None else _moment(name, text, place, now) for name, text in (("since", since), ("until", until))
    )
    if begin is not None and end is not None and begin >= end:
        raise Unclear("until", f'"{until}" is not after "{since}", expected a time after since')
    if begin is not None and end is not None and first_hour(begin) == first_hour(end):
        raise Unclear("until", f'no hour begins from "{since}" to before "{until}", expected a longer span')
    kept = {dimension: frozenset(values) for dimension, values in where.items() if values}
    return Query(by=_grouping(by), since=begin, until=end, where=kept, zone=place)


def _grouping(text: str) -> tuple[Dimension | Grain, ...]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words:
        if word not in KNOWN:
            raise Unclear("by", f'"{word}" is unknown, expected some of {", ".join(KNOWN)}')
    return tuple(KNOWN[word] for word in words)


def _zone(text: str) -> ZoneInfo:
    try:
        return ZoneInfo(text)
    except (KeyError, ValueError, OSError):  # not there; a path; a folder
        raise Unclear("zone", f'"{text}" is no time zone, expected for example UTC or Europe/Zurich') from None


def _moment(name: str, text: str, zone: ZoneInfo, now: float) -> int:
    """A time in seconds since 1970: so long ago, a date, or a month's beginning."""
    ago = re.fullmatch(r"([0-9]{1,5})([mhdw])", text)
    try:
        if ago:
            return (int(now) - int(ago[1]) * _UNITS[ago[2]]) // 3600 * 3600
        this_month = datetime.fromtimestamp(now, zone).replace(day=1, hour=0, minute=0, second=0, microsecond=0, fold=0)
        if text == "this-month":
            at = this_month
        elif text == "last-month":
            at = (this_month - timedelta(days=1)).replace(day=1)
        else:
            at = datetime.fromisoformat(text)
        return int((at if at.tzinfo else at.replace(tzinfo=zone)).timestamp())
    except (ValueError, OverflowError, OSError):
        expected = "expected for example 7d, 12h, 2026-11-01, this-month or last-month"
        raise Unclear(name, f'"{text}" is no time, {expected}') from None


# — users


async def stored_users(store: Store, secret: bytes, names: Iterable[str], within: Iterable[str] = ()) -> list[str]:
    """The forms in which rows may hold these users, in these organisations or in all that there are.

    Both forms, because the policies may say today `hashed` and have said `plain` before; a form that is stored already
    stands for itself. Raises StoreUnavailable, and StoreError where the keys were made under another pepper.
    """
    names = list(names)
    plain = [name for name in names if name and not is_stored_user(name)]
    if not plain:
        return names
    await KeyRing(store, secret).load()  # under another pepper nobody would be found, and nothing told
    places = list(within) or await organisations(store)
    return [*names, *(stored_user(secret, place, name, False) for name in plain for place in places)]


async def with_users(store: Store, secret: bytes, query: Query) -> Query:
    """The query with its users as rows hold them. Raises as stored_users() does."""
    names = query.where.get("user")
    if not names:
        return query
    users = await stored_users(store, secret, names, query.where.get("organisation", ()))
    where = {**query.where, "user": frozenset(users)}
    return Query(by=query.by, since=query.since, until=query.until, where=where, zone=query.zone)


def matches(where: Where, record: UsageRecord) -> bool:
    """Whether a row is one of those that are asked for, as sums are: by values, or patterns as a shell has them."""
    return all(wanted(getattr(record, dimension) or "", values) for dimension, values in where.items())


def wanted(value: str, values: Iterable[str]) -> bool:
    """Whether a value is one of these, or fits one that is a pattern."""
    return any(value == one or fnmatchcase(value, one) for one in values)


# — what programs read


def leading(query: Query, sums: Sequence[Sum], most: int) -> tuple[list[Sum], list[Sum]]:
    """The sums of the most expensive groups, whatever their times, and the others; both in the order that they had."""
    costs: dict[tuple[str, ...], tuple[int, int]] = {}
    for one in sums:
        cost, tokens = costs.get(group := lasting(query, one), (0, 0))
        costs[group] = (cost + cost_of(one), tokens + tokens_of(one))
    first = set(sorted(costs, key=lambda group: (costs[group], group), reverse=True)[:most])
    return (
        [one for one in sums if lasting(query, one) in first],
        [one for one in sums if lasting(query, one) not in first],
    )


def lasting(query: Query, one: Sum) -> tuple[str, ...]:
    """The group without its time; where there is nothing but time, the time."""
    group = tuple(part for name, part in zip(query.by, one.group, strict=True) if name in DIMENSIONS)
    return group or one.group


def tokens_of(one: Sum) -> int:
    return one.amounts[_INPUT] + one.amounts[_OUTPUT]


def cost_of(one: Sum) -> int:
    """Micro-dollars."""
    return one.amounts[_COST]


_INPUT, _OUTPUT, _COST = map(COUNTERS.index, ("input_tokens", "output_tokens", "cost_microusd"))


def objects(query: Query, sums: Sequence[Sum]) -> list[dict[str, object]]:
    """One object for each sum: its group, then its counters; rows that name no user have null there."""
    return [
        {**{name: part or None for name, part in zip(query.by, one.group, strict=True)}, **one.counters} for one in sums
    ]


def csv_of(query: Query, sums: Sequence[Sum]) -> str:
    """A header and one line for each sum, after RFC 4180; numbers are whole, costs micro-dollars.

    A name that a spreadsheet would take for a formula has a ' before it: callers choose names, others open it.
    """
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow((*query.by, *COUNTERS))
    lines.writerows((*map(_cell, one.group), *one.amounts) for one in sums)
    return text.getvalue()


def _cell(name: str) -> str:
    return f"'{name}" if name.startswith(_FORMULA) else name

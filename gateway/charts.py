"""A report for people: a table whose groups have each a bar for their share, and a line for how they went over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date, datetime
from math import ceil
from typing import NamedTuple

from gateway.console import table
from gateway.queries import cost_of, lasting, tokens_of
from gateway.records import COUNTERS, GRAINS, Dimension, Grain
from gateway.sums import Query, Sum

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_BAR = 10  # characters
_POINTS = 31  # of a line at most: the days of a month

_AMOUNTS = ("requests", "input", "cached", "output", "reasoning", "USD")
_Weigh = Callable[[Sequence[Sum]], int]


def draw(query: Query, sums: Sequence[Sum], others: Sequence[Sum], note: str = "") -> None:
    """Print a report; the `others` are one row, and part of the total. The `note` stands below."""
    everything = [*sums, *others]
    weigh, unit = _weight(everything)
    whole = weigh(everything)
    times = _times(query, everything)
    names: list[str] = [name for name in query.by if times is None or name != times.grain] or [""]

    def row(group: Sequence[str], members: Sequence[Sum]) -> list[str]:
        line = [] if times is None else [sparkline(times.over(members, weigh))]
        return [*group, *line, *_amounts(members), share(weigh(members), whole)]

    def one(title: str, members: Sequence[Sum]) -> list[str]:
        return row([title, *[""] * (len(names) - 1)], members)

    groups: dict[tuple[str, ...], list[Sum]] = defaultdict(list)
    for found in sums:
        groups[found.group if times is None else lasting(query, found)].append(found)
    # The heaviest first; what has its time beside it, as time goes.
    clocks = [(name, place) for place, name in enumerate(query.by) if times is None and name in GRAINS]
    rows = [
        row([part or "-" for part in group] or ["all"], members)
        for group, members in sorted(
            groups.items(),
            key=lambda kept: ([_position(name, kept[0][place]) for name, place in clocks], -weigh(kept[1]), kept[0]),
        )
    ]
    if others:
        count = len({lasting(query, other) for other in others})
        rows.append(one(f"({count:,} others)", others))
    head = [*names, *([] if times is None else [f"{unit} by {times.grain}"]), *_AMOUNTS, "share"]
    total = one("total", everything) if len(rows) > 1 else ()
    below = "\n".join(line for line in ("" if times is None else times.legend, note) if line)
    table(head, rows, right=len(_AMOUNTS) + 1, total=total, below=below)


def _weight(sums: Sequence[Sum]) -> tuple[_Weigh, str]:
    """What groups are compared by: dollars; where nothing costs anything, tokens."""
    costly = any(map(cost_of, sums))
    if costly:
        return lambda members: sum(map(cost_of, members)), "USD"
    return lambda members: sum(map(tokens_of, members)), "tokens"


def _amounts(members: Sequence[Sum]) -> list[str]:
    totals = [sum(one.amounts[place] for one in members) for place in range(len(COUNTERS))]
    return [*(f"{total:,}" for total in totals[:-1]), usd(totals[-1])]


def usd(micro: int) -> str:
    """Micro-dollars as dollars, to the last digit."""
    dollars, rest = divmod(abs(micro), 1_000_000)
    return f"{'-' if micro < 0 else ''}{dollars:,}.{rest:06}"


def share(part: int, whole: int) -> str:
    """A bar and a percentage."""
    if whole <= 0:
        return "-"
    eighths = round(min(max(part / whole, 0.0), 1.0) * _BAR * 8)
    bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8]
    return f"{bar:<{_BAR}} {part / whole:6.1%}"


def sparkline(values: Sequence[int]) -> str:
    """A character for each value, as high as it is beside the greatest; only nothing is as low as it gets."""
    most = max(values, default=0)
    return "".join(_LEVELS[ceil(value / most * (len(_LEVELS) - 1)) if value > 0 else 0] for value in values)


# — time along a line


class _Times(NamedTuple):
    """The buckets from the first to the last that has something, as positions of which a point of a line holds some."""

    grain: Dimension | Grain
    place: int  # of the bucket in a group
    first: int
    last: int
    labels: tuple[str, str]

    @property
    def step(self) -> int:
        return ceil((self.last - self.first + 1) / _POINTS)

    def over(self, members: Sequence[Sum], weigh: _Weigh) -> list[int]:
        """What each point holds of these sums."""
        points = [0] * ceil((self.last - self.first + 1) / self.step)
        for one in members:
            points[(_position(self.grain, one.group[self.place]) - self.first) // self.step] += weigh([one])
        return points

    @property
    def legend(self) -> str:
        first, last = self.labels
        each = f", {self.step} {self.grain}s a character" if self.step > 1 else ""
        return f"{first} … {last}{each}"


def _times(query: Query, sums: Sequence[Sum]) -> _Times | None:
    """The time along which groups are drawn: where one grain is asked for beside something else."""
    grains = [(place, name) for place, name in enumerate(query.by) if name in GRAINS]
    if len(grains) != 1 or len(query.by) == 1 or not sums:
        return None
    ((place, grain),) = grains
    at = {_position(grain, one.group[place]): one.group[place] for one in sums}
    first, last = min(at), max(at)
    return _Times(grain, place, first, last, (at[first], at[last]))


def _position(grain: str, label: str) -> int:
    """Where a bucket stands among its like, by its ISO 8601 label."""
    if grain == "month":
        year, month = label.split("-")
        return int(year) * 12 + int(month)
    if grain == "day":
        return date.fromisoformat(label).toordinal()
    return int(datetime.fromisoformat(label).timestamp()) // 3600

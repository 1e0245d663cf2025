"""Reports as people and programs read them: of real stores, by the command itself."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from gateway.charts import share, sparkline, usd
from gateway.identity import stored_user
from gateway.queries import Unclear, csv_of, query_of
from gateway.records import COUNTERS, ERASED, Dimension, ledger_stream, sums_key
from gateway.settings import Settings, pepper
from gateway.sums import Query, Sum
from tests.proving.commands import Done, Place
from tests.proving.entries import ms, numbers, write
from tests.proving.rows import record
from tests.proving.stores import until

NOW = datetime(2026, 11, 22, 12, 30, tzinfo=UTC).timestamp()
ZURICH = ZoneInfo("Europe/Zurich")


class Ledger(Place):
    """A place whose commands find a store that a test fills."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url
        self.client = redis.Redis.from_url(url)

    def environment(self, **given: str) -> dict[str, str]:
        return super().environment(**{"GATEWAY_REDIS_URL": self.url, **given})

    def row(self, at: datetime, **given: Any) -> None:
        """One more row; each is not before the last."""
        tokens = {"input_tokens": 10, "cached_tokens": 2, "output_tokens": 5, "reasoning_tokens": 1}
        row = record(**{**tokens, "cost_microusd": 100, "user": None, **given})
        write(self.client, [row], int(at.timestamp() * 1000))

    def lines(self, *words: str, code: int = 0) -> list[str]:
        """What it says to people, each line without what fills it up."""
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (code, "")
        return [" ".join(line.split()) for line in done.stdout.splitlines()]

    def secret(self) -> bytes:
        return pepper(Settings.read({}, state=self.folder / ".gateway"))


TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def ago(days: int, hour: int = 10, minute: int = 0) -> datetime:
    """A time of the day so many days ago, in UTC: sums are kept for 400 of them."""
    return TODAY - timedelta(days=days) + timedelta(hours=hour, minutes=minute)


def month(back: int, zone: tzinfo = UTC) -> datetime:
    """Where the month so many months ago begins."""
    number = TODAY.year * 12 + TODAY.month - 1 - back
    return datetime(number // 12, number % 12 + 1, 1, tzinfo=zone)


@pytest.fixture
def ledger(tmp_path: Path, store_url: str) -> Ledger:
    return Ledger(tmp_path, store_url)


# — what is asked for


def asked(
    since: str | None = None, until: str | None = None, zone: str = "UTC", by: str = "team", now: float = NOW
) -> tuple[float | None, float | None]:
    query = query_of(by, since, until, zone, {}, now)
    return query.since, query.until


def utc(text: str) -> int:
    return ms(text) // 1000


@pytest.mark.parametrize(
    ("since", "zone", "expected"),
    [
        ("90m", "UTC", utc("2026-11-22T11:00")),
        ("12h", "UTC", utc("2026-11-22T00:00")),  # the hour that it falls in
        ("7d", "Europe/Zurich", utc("2026-11-15T12:00")),
        ("2w", "UTC", utc("2026-11-08T12:00")),
        ("2026-11-01", "UTC", utc("2026-11-01T00:00")),
        ("2026-11-01", "Europe/Zurich", utc("2026-10-31T23:00")),
        ("2026-07-01", "Europe/Zurich", utc("2026-06-30T22:00")),
        ("2026-11-01T10:00+05:30", "Europe/Zurich", utc("2026-11-01T04:30")),
        ("this-month", "UTC", utc("2026-11-01T00:00")),
        ("this-month", "Europe/Zurich", utc("2026-10-31T23:00")),
        ("last-month", "UTC", utc("2026-10-01T00:00")),
        ("last-month", "Europe/Zurich", utc("2026-09-30T22:00")),  # the clocks changed in October
    ],
)
def test_a_time_is_so_long_ago_or_a_date_of_the_zone_or_where_a_month_begins(
    since: str, zone: str, expected: int
) -> None:
    assert asked(since, zone=zone) == (expected, None)
    assert asked("2001-01-01", since, zone=zone)[1] == expected


def test_last_month_of_january_is_in_the_year_before() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert asked("last-month", "this-month", now=now) == (utc("2025-12-01T00:00"), utc("2026-01-01T00:00"))


@given(
    now=st.integers(0, 4 * 10**9), zone=st.sampled_from(["UTC", "Europe/Zurich", "America/St_Johns", "Pacific/Apia"])
)
def test_months_begin_at_their_first_midnight_and_follow_on_each_other(now: int, zone: str) -> None:
    begin, end = asked("last-month", "this-month", zone=zone, now=now)
    assert begin is not None
    assert end is not None
    assert begin < end <= now
    first, second, today = (datetime.fromtimestamp(at, ZoneInfo(zone)) for at in (begin, end, now))
    assert (second.year, second.month) == (today.year, today.month)
    assert second.year * 12 + second.month == first.year * 12 + first.month + 1
    assert {(at.day, at.hour, at.minute, at.second) for at in (first, second)} == {(1, 0, 0, 0)}


@pytest.mark.parametrize(
    ("given", "name", "told"),
    [
        (
            {"by": "team,teem"},
            "by",
            '"teem" is unknown, expected some of organisation, team, key, user, model, pool, hour, day, month',
        ),
        (
            {"since": "monday"},
            "since",
            '"monday" is no time, expected for example 7d, 12h, 2026-11-01, this-month or last-month',
        ),
        (
            {"until": "99999999d"},
            "until",
            '"99999999d" is no time, expected for example 7d, 12h, 2026-11-01, this-month or last-month',
        ),
        ({"zone": "Zurich"}, "zone", '"Zurich" is no time zone, expected for example UTC or Europe/Zurich'),
        (
            {"zone": "../etc/passwd"},
            "zone",
            '"../etc/passwd" is no time zone, expected for example UTC or Europe/Zurich',
        ),
        ({"zone": "Europe"}, "zone", '"Europe" is no time zone, expected for example UTC or Europe/Zurich'),
        (
            {"since": "1d", "until": "2d"},
            "until",
            '"2d" is not after "1d", expected a time after since',
        ),
        (
            {"since": "2026-11-01T10:10", "until": "2026-11-01T10:50"},
            "until",
            'no hour begins from "2026-11-01T10:10" to before "2026-11-01T10:50", expected a longer span',
        ),
    ],
)
def test_a_word_that_is_not_understood_is_told_with_what_is_expected(
    given: dict[str, Any], name: str, told: str
) -> None:
    with pytest.raises(Unclear) as found:
        asked(**given)
    assert (found.value.name, str(found.value)) == (name, told)


def test_dimensions_without_values_are_not_looked_at_and_words_count_once() -> None:
    where: dict[Dimension, list[str] | None] = {"team": ["a", "b", "a"], "model": None, "pool": []}
    query = query_of(" team , day,team,", None, None, "UTC", where, NOW)
    assert (query.by, query.where) == (("team", "day"), {"team": frozenset({"a", "b"})})


# — what it looks like


@given(st.integers(-(10**12), 10**12))
def test_dollars_are_exact(micro: int) -> None:
    text = usd(micro).replace(",", "")
    assert re.fullmatch(r"-?\d+\.\d{6}", text)
    assert int(text.replace(".", "")) == micro


@given(st.lists(st.integers(0, 10**12), max_size=40))
def test_a_line_is_highest_at_the_most_and_lowest_only_at_nothing(values: list[int]) -> None:
    line = sparkline(values)
    assert len(line) == len(values)
    for value, character in zip(values, line, strict=True):
        assert (character == "▁") == (value == 0)
        assert (character == "█") == (value > 0 and value * 7 > max(values) * 6)
    assert sorted(line) == [character for _, character in sorted(zip(values, line, strict=True))]


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (1, 1, "██████████ 100.0%"),
        (1, 2, "█████       50.0%"),
        (1, 16, "▋            6.2%"),
        (0, 5, "             0.0%"),
        (-1, 5, "           -20.0%"),
        (3, 2, "██████████ 150.0%"),
        (0, 0, "-"),
    ],
)
def test_a_share_is_a_bar_as_long_as_it_is_large(part: int, whole: int, expected: str) -> None:
    assert share(part, whole) == expected


def test_people_get_groups_by_their_cost_shares_and_a_total(ledger: Ledger) -> None:
    ledger.row(ago(2), team="small", cost_microusd=250_000)
    ledger.row(ago(2), team="[b]large", model="qwen", cost_microusd=1_500_000_000, input_tokens=1_234_567)
    ledger.row(ago(1), team="[b]large", model="qwen", cost_microusd=749_999_999)
    assert ledger.lines("usage") == [
        "team model requests input cached output reasoning USD share",
        "[b]large qwen 2 1,234,577 4 10 2 2,249.999999 ██████████ 100.0%",
        "small llama 1 10 2 5 1 0.250000 0.0%",
        "total 3 1,234,587 6 15 3 2,250.249999 ██████████ 100.0%",
    ]
    drawn = ledger.run("usage").stdout.splitlines()
    assert {line.index(".") for line in drawn[1:]} == {drawn[1].index(".")}, "dollars stand below each other"


def test_a_single_group_needs_no_total_and_nothing_is_said_to_be_nothing(ledger: Ledger) -> None:
    assert ledger.lines("usage")[1:] == ["(nothing)"]
    ledger.row(ago(2))
    assert ledger.lines("usage", "--by", "") == [
        "requests input cached output reasoning USD share",
        "all 1 10 2 5 1 0.000100 ██████████ 100.0%",
    ]


def test_times_beside_groups_are_drawn_along_a_line_with_its_gaps(ledger: Ledger) -> None:
    for day, cost in ((1, 700), (2, 100), (4, 400)):
        ledger.row(ago(6 - day), team="research", cost_microusd=cost)
    ledger.row(ago(1), team="support", cost_microusd=1)
    assert ledger.lines("usage", "--by", "team,day") == [
        "team USD by day requests input cached output reasoning USD share",
        "research █▂▁▅▁ 3 30 6 15 3 0.001200 ██████████ 99.9%",
        "support ▁▁▁▁█ 1 10 2 5 1 0.000001 0.1%",
        "total █▂▁▅▂ 4 40 8 20 4 0.001201 ██████████ 100.0%",
        f"{ago(5):%Y-%m-%d} … {ago(1):%Y-%m-%d}",
    ]


def test_what_costs_nothing_is_compared_by_tokens(ledger: Ledger) -> None:
    for hour, tokens in ((10, 95), (11, 195)):
        ledger.row(ago(2, hour), team="research", cost_microusd=0, input_tokens=tokens)
    ledger.row(ago(2, 11, 30), team="support", cost_microusd=0, input_tokens=95)
    head, research, support, *_ = ledger.lines("usage", "--by", "team,hour")
    assert head.startswith("team tokens by hour ")
    assert (research.split()[:3], research.split()[-1]) == (["research", "▅█", "2"], "75.0%")
    assert (support.split()[:3], support.split()[-1]) == (["support", "▁█", "1"], "25.0%")


def test_a_line_has_as_many_points_as_a_month_has_days_at_most(ledger: Ledger) -> None:
    for hour in range(64):
        ledger.row(ago(9, hour), cost_microusd=hour // 3 + 1)
    _, row, legend = ledger.lines("usage", "--by", "team,hour")
    points = list(row.split()[1])
    assert (len(points), points[:-1]) == (22, sorted(points[:-1]))
    assert points[-1] == "▄", "the last one holds one hour, the others three"
    assert legend.endswith(", 3 hours a character")


def test_times_alone_go_down_the_page_as_time_goes(ledger: Ledger) -> None:
    for back, cost in ((5, 5), (4, 9), (3, 3), (1, 1)):
        ledger.row(month(back), cost_microusd=cost)
    rows = [line.split() for line in ledger.lines("usage", "--by", "month")]
    assert [row[0] for row in rows] == ["month", *(f"{month(back):%Y-%m}" for back in (5, 4, 3, 1)), "total"]
    assert [row[6] for row in rows[1:]] == ["0.000005", "0.000009", "0.000003", "0.000001", "0.000018"]


def test_the_most_expensive_groups_stand_first_and_the_others_are_one_row(ledger: Ledger) -> None:
    for team, day, cost in (("a", 1, 10), ("b", 1, 6), ("b", 2, 6), ("c", 2, 1), ("d", 2, 2)):
        ledger.row(ago(4 - day), team=team, cost_microusd=cost)
    lines = [line.split() for line in ledger.lines("usage", "--by", "team,day", "--top", "2")]
    assert [line[:2] for line in lines[1:4]] == [["b", "██"], ["a", "█▁"], ["(2", "others)"]]
    assert lines[3][2:4] == ["▁█", "2"]
    assert (lines[4][0], lines[4][7]) == ("total", "0.000025"), "of everything"
    shown = ledger.json("usage", "--by", "team,day", "--top", "1")
    assert {(one["team"], one["day"], one["cost_microusd"]) for one in shown} == {
        ("b", f"{ago(3):%Y-%m-%d}", 6),
        ("b", f"{ago(2):%Y-%m-%d}", 6),
    }


# — what programs get


def test_programs_get_objects_with_whole_numbers(ledger: Ledger) -> None:
    ledger.row(ago(2), user="u_" + "0" * 20, cost_microusd=2**53 + 1)
    ledger.row(ago(2, 11))
    ledger.row(ago(2, 11), model="Grün")
    found = ledger.json("usage", "--by", "organisation,user,model,pool,key")
    same = {"organisation": "acme", "pool": "demo", "key": "key-1"}
    numbers = {"requests": 1, "input_tokens": 10, "cached_tokens": 2, "output_tokens": 5, "reasoning_tokens": 1}
    assert sorted(found, key=lambda one: (str(one["user"]), str(one["model"]))) == [
        {**same, "user": None, "model": "Grün", **numbers, "cost_microusd": 100},
        {**same, "user": None, "model": "llama", **numbers, "cost_microusd": 100},
        {**same, "user": "u_" + "0" * 20, "model": "llama", **numbers, "cost_microusd": 2**53 + 1},
    ]


def test_spreadsheets_get_a_header_and_quoted_names(ledger: Ledger) -> None:
    ledger.row(ago(2), model='a "b", c', cost_microusd=1_000_000)
    done = ledger.run("usage", "--by", "model,user", "--csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(csv.reader(io.StringIO(done.stdout))) == [
        ["model", "user", *COUNTERS],
        ['a "b", c', "", "1", "10", "2", "5", "1", "1000000"],
    ]
    assert '"a ""b"", c"' in done.stdout


@pytest.mark.parametrize("begin", list("=+-@\t\r"))
def test_a_name_that_a_spreadsheet_would_reckon_is_text(begin: str) -> None:
    query = Query(by=("model", "user", "day"))
    amounts = (-1,) * len(COUNTERS)
    name = begin + 'HYPERLINK("http://x")'
    text = csv_of(query, [Sum((name, "a=b", "2026-11-01"), amounts)])
    _, line = csv.reader(io.StringIO(text, newline=""))
    assert line == ["'" + name, "a=b", "2026-11-01", *["-1"] * len(COUNTERS)]


def test_hours_days_and_months_are_those_of_the_zone(ledger: Ledger) -> None:
    begins = month(1, ZURICH)
    before, after = f"{month(2):%Y-%m}", f"{month(1):%Y-%m}"
    ledger.row(begins - timedelta(milliseconds=1), cost_microusd=1)
    ledger.row(begins, cost_microusd=2)
    for zone, expected in (("UTC", {before: 3}), ("Europe/Zurich", {before: 1, after: 2})):
        found = ledger.json("usage", "--by", "month", "--zone", zone)
        assert {one["month"]: one["cost_microusd"] for one in found} == expected


def test_people_are_told_that_what_they_asked_for_is_not_kept_any_more(ledger: Ledger) -> None:
    ledger.row(ago(2))
    words = ("usage", "--by", "team,day", "--zone", "Asia/Kolkata")
    kept = ago(398, 12)  # whose day in Kolkata begins within the 400, whatever the hour is here
    assert not [line for line in ledger.lines(*words) if "kept" in line]
    assert not [line for line in ledger.lines(*words, "--since", f"{kept:%Y-%m-%d}") if "kept" in line]
    *_, legend, told = ledger.lines(*words, "--since", "2001-01-01")
    assert "…" in legend
    found = re.fullmatch(r"sums are kept for 400 days: what was used before (.{10} ..:30) is not in this", told)
    assert found
    first = datetime.fromisoformat(found[1]).replace(tzinfo=ZoneInfo("Asia/Kolkata"))
    assert timedelta(days=400) <= datetime.now(UTC) - first <= timedelta(days=400, hours=2)
    assert len(ledger.json("usage", "--since", "2001-01-01")) == 1, "programs get nothing but groups"


def test_the_help_says_that_filters_are_patterns(place: Place) -> None:
    said = " ".join(place.run("usage", "--help", COLUMNS="200").stdout.split())
    assert said.count("a pattern as a shell has them ('a*')") == 5
    assert "as it is stored, or a pattern of that" in said


def test_the_span_and_every_filter_hold(ledger: Ledger) -> None:
    given = {"organisation": "other", "team": "t", "key": "k", "model": "m", "pool": "p"}
    ledger.row(ago(4, 23, 59))
    for name, value in given.items():
        ledger.row(ago(3), **{name: value})
    ledger.row(ago(2, 0))

    def requests(*words: str) -> int:
        return sum(one["requests"] for one in ledger.json("usage", "--by", "", *words))

    assert requests() == 7
    assert requests("--since", f"{ago(3):%Y-%m-%d}", "--until", f"{ago(2):%Y-%m-%d}") == 5
    assert {name: requests(f"--{name}", value) for name, value in given.items()} == dict.fromkeys(given, 1)
    assert requests("--team", "t", "--team", "research") == 7
    assert requests("--team", "t", "--key", "k") == 0


def test_a_user_is_found_by_the_plain_name_however_it_was_stored(ledger: Ledger) -> None:
    for organisation in ("acme", "other"):
        hashed = stored_user(ledger.secret(), organisation, "ann", False)
        ledger.row(ago(2), organisation=organisation, user=hashed)
    ledger.row(ago(2), user="ann")  # from when the policies said plain
    ledger.row(ago(2), user="bob")
    ledger.row(ago(2))
    acme = stored_user(ledger.secret(), "acme", "ann", False)

    def requests(*words: str) -> int:
        return sum(one["requests"] for one in ledger.json("usage", "--by", "", *words))

    assert requests("--user", "ann") == 3
    assert requests("--user", "ann", "--organisation", "other") == 1
    assert requests("--user", acme) == 1
    assert requests("--user", "") == 1, "rows that name nobody"
    assert requests("--user", "nobody") == 0
    other = ledger.run("usage", "--user", "ann", GATEWAY_KEY_PEPPER="another")
    assert other.returncode == 3
    assert "made under another pepper" in other.stderr


def wrong(done: Done) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--by", "teem"],
            '"teem" is unknown, expected some of organisation, team, key, user, model, pool, hour, day, month',
        ),
        (
            ["--since", "monday"],
            '"monday" is no time, expected for example 7d, 12h, 2026-11-01, this-month or last-month',
        ),
        (["--zone", "Mars/Base"], '"Mars/Base" is no time zone, expected for example UTC or Europe/Zurich'),
        (["--json", "--csv"], "--json and --csv are given, expected one of them"),
        (
            ["--follow", "--since", "1d"],
            "--since is given with --follow, which shows each row from now on, expected without",
        ),
        (["--json", "reconcile"], "--json stands before reconcile, expected after it"),
        (
            ["erase", "--user", "erased", "--organisation", "acme", "--yes"],
            '"erased" stands for nobody, expected a user',
        ),
        (["erase", "--user", "ann", "--organisation", "acme"], "nobody is here to be asked, expected --yes"),
    ],
)
def test_a_wrong_word_is_told_before_the_store_is_asked(place: Place, words: list[str], told: str) -> None:
    done = place.run("usage", *words, GATEWAY_REDIS_URL="unix:///nowhere/at/all")
    assert wrong(done) == (2, "", f"gateway: {told}\n")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# — as it is being used


def test_rows_are_shown_as_they_are_written_until_ctrl_c(ledger: Ledger) -> None:
    ledger.row(ago(2), id="before")
    users = [stored_user(ledger.secret(), "acme", name, False) for name in ("ann", "bob")]
    words = ("usage", "--follow", "--json", "--team", "research", "--user", "ann")
    with ledger.running(*words) as programs, ledger.running("usage", "--follow", "--zone", "Europe/Zurich") as people:
        followed(ledger, 2)
        entries = write(
            ledger.client,
            [
                record(1, user=users[0], team="support"),
                record(2, user=users[1]),
                record(3, user=users[0], model="a/b/Grün", cost_microusd=12_345_678),
                record(4, user=users[0], status="interrupted", ended="gateway", input_tokens=1_000),
            ],
        )
        programs.until("request-4")
        seen = [json.loads(line) for line in programs.said]
        assert [(one["id"], one["entry"]) for one in seen] == [("request-3", entries[2]), ("request-4", entries[3])]
        assert seen[0]["written_ms"] == int(entries[2].partition("-")[0])
        assert (seen[0]["cost_microusd"], seen[0]["model"]) == (12_345_678, "a/b/Grün")

        people.until("interrupted")
        shown = [line.split() for line in people.said]
        at = datetime.fromtimestamp(int(entries[2].partition("-")[0]) / 1000, ZURICH)
        assert len(shown) == 4
        assert shown[2] == [f"{at:%H:%M:%S}", "research", "key-1", "Grün", "103", "→", "23", "12.345678", "complete"]
        assert shown[3][-2:] == ["interrupted,", "gateway"]
        assert programs.end(signal.SIGINT) == 0
        assert people.end(signal.SIGTERM) == 0
        assert not any("Traceback" in line for line in programs.said + people.said)


def test_rows_of_organisations_that_come_later_are_shown_from_their_first_one(ledger: Ledger) -> None:
    ledger.row(ago(2), id="before")
    every, some = ("usage", "--follow", "--json"), ("usage", "--follow", "--json", "--organisation", "late*")
    with ledger.running(*every) as all_of_them, ledger.running(*some) as late:
        followed(ledger, 2)
        for number, organisation in enumerate(["other", "late-1", "acme", "late-2", "late-1"]):
            write(ledger.client, [record(number, organisation=organisation)])
        for shown, expected in ((all_of_them, [0, 1, 2, 3, 4]), (late, [1, 3, 4])):
            while len(shown.said) < len(expected):
                shown.until('"id"')
            assert {json.loads(line)["id"] for line in shown.said} == {f"request-{number}" for number in expected}
        write(ledger.client, [record(5, organisation="late-2")])
        for shown in (all_of_them, late):
            assert json.loads(shown.until('"id"'))["id"] == "request-5", "each once"
            assert shown.end(signal.SIGINT) == 0


def test_where_nobody_was_yet_the_first_row_is_shown(ledger: Ledger) -> None:
    with ledger.running("usage", "--follow", "--json") as shown:
        until(lambda: any("smembers" in one["cmd"] for one in ledger.client.client_list()))
        write(ledger.client, [record(1)])
        assert json.loads(shown.until('"id"'))["id"] == "request-1"
        assert shown.end() == 0


def followed(ledger: Ledger, count: int) -> None:
    """Until so many wait for news of the ledger."""

    def waiting() -> int:
        return sum("xread" in one["cmd"] and "b" in one["flags"] for one in ledger.client.client_list())

    until(lambda: waiting() >= count)


# — whether it is right


def test_a_ledger_that_agrees_with_its_sums_ends_well(ledger: Ledger) -> None:
    for organisation in ("acme", "other"):
        for hour in (9, 10, 11):
            ledger.row(ago(2, hour), organisation=organisation)
    head, *rows = (line.split() for line in ledger.lines("usage", "reconcile"))
    assert head == ["organisation", "rows", "hours", "unreadable", "differences"]
    assert [(row[:2], row[3:]) for row in rows] == [(["acme", "3"], ["0", "0"]), (["other", "3"], ["0", "0"])]
    assert all(int(row[2]) >= 3 for row in rows)
    (only,) = ledger.json("usage", "reconcile", "--organisation", "other")
    assert (only["organisation"], only["rows"], only["differences"], only["unreadable"]) == ("other", 3, [], 0)


def test_a_sum_that_is_wrong_is_shown_and_ends_with_1(ledger: Ledger) -> None:
    ledger.row(ago(2, 9))
    ledger.row(ago(2))
    ledger.row(ago(2, 11))
    hour = numbers(int(ago(2).timestamp() * 1000))["hour"]
    (group,) = ledger.client.hkeys(sums_key("acme", "hour", hour))
    ledger.client.hset(sums_key("acme", "hour", hour), group, msgpack.encode([1, 10, 2, 5, 1, 100_000]))
    lines = ledger.lines("usage", "reconcile", code=1)
    assert re.fullmatch(r"acme 3 \d+ 0 1", lines[1])
    assert lines[2:] == [
        "organisation grain number group counter ledger sums",
        f'acme hour {hour} ["research","key-1","","llama","demo"] cost_microusd 100 100,000',
    ]
    done = ledger.run("usage", "reconcile", "--json")
    ((difference,),) = (one["differences"] for one in json.loads(done.stdout))
    assert (done.returncode, difference["grain"], difference["number"]) == (1, "hour", hour)


@pytest.mark.parametrize(
    "words", [["reconcile", "--organisation", "acne"], ["erase", "--organisation", "acne", "--user", "ann", "--yes"]]
)
def test_an_organisation_without_a_ledger_is_told(ledger: Ledger, words: list[str]) -> None:
    ledger.row(ago(2, 9))
    assert wrong(ledger.run("usage", *words)) == (
        1,
        "",
        'gateway: "acne" has no ledger, expected one of acme\n',
    )


# — forgetting


def test_a_user_is_forgotten_and_the_amounts_are_kept(ledger: Ledger) -> None:
    hashed, bob = (stored_user(ledger.secret(), "acme", name, False) for name in ("ann", "bob"))
    for user in (hashed, "ann", bob):
        ledger.row(ago(2), user=user)
    ledger.row(ago(2), user=stored_user(ledger.secret(), "other", "ann", False), organisation="other")
    done = ledger.run("usage", "erase", "--user", "ann", "--organisation", "acme", "--yes")
    assert wrong(done) == (0, "forgotten in 2 rows and 6 sums of acme; their amounts are kept\n", "")
    rows: Any = ledger.client.xrange(ledger_stream("acme"))
    users = [json.loads(fields[b"row"])["user"] for _, fields in rows]
    assert sorted(users) == sorted([bob, ERASED, ERASED])
    left = {one["user"]: one["requests"] for one in ledger.json("usage", "--by", "user", "--organisation", "acme")}
    assert left == {bob: 1, ERASED: 2}
    assert ledger.json("usage", "--by", "organisation", "--user", "ann")[0]["organisation"] == "other"


def test_a_user_who_is_nowhere_is_told_and_ends_with_1(ledger: Ledger) -> None:
    ledger.row(ago(2), user="ann")
    words = ("usage", "erase", "--user", "anne", "--organisation", "acme", "--yes")
    told = "gateway: no row and no sum of acme has this user, expected one who is there\n"
    assert wrong(ledger.run(*words)) == (1, "", told)
    assert wrong(ledger.run(*words, "--json")) == (1, '{"organisation": "acme", "rows": 0, "sums": 0}\n', told)

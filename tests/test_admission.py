"""The limits hold: against many gateways at once, lost replies, lost workers, other clocks, and an exact model."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from fractions import Fraction
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from gateway import admission as admission_module
from gateway.admission import SEAT_LEASE, Admission, ledger_stream
from gateway.errors import GatewayError, InternalError, QuotaExhausted, RateLimited, StoreUnavailable
from gateway.snapshot import Limit, windows_around
from gateway.store import Script
from tests.proving import house
from tests.proving.limits import Request, everything, gateways, key_of, quota, rate, seats, terms, until, wire

EPOCH = 1_772_000_000  # s: a Wednesday in February 2026
US = 1_000_000
DAY = 86_400 * US


@pytest.fixture
def store(either_store_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(either_store_url) as client:
        yield client


def limits_of_every_kind() -> list[Limit]:
    return [rate(5, "day"), quota(5, "month"), seats(5)]


# — many callers, two gateways


@pytest.mark.parametrize("limit", limits_of_every_kind(), ids=lambda limit: limit.kind)
async def test_fifty_callers_at_once_on_a_limit_of_five_never_get_six(either_store_url: str, limit: Limit) -> None:
    async with gateways(either_store_url, 2) as two:
        for round_ in range(20):
            bound = terms([limit], organisation=f"round{round_}")
            requests = [Request(bound) for _ in range(50)]
            leases = [two[i % 2].admit(request) for i, request in enumerate(requests)]
            results = await asyncio.gather(*(lease.__aenter__() for lease in leases), return_exceptions=True)
            admitted = [lease for lease, result in zip(leases, results, strict=True) if result is lease]
            refused = [result for result in results if isinstance(result, GatewayError)]
            assert (len(admitted), len(refused)) == (5, 45)
            expected = QuotaExhausted if limit.kind == "quota" else RateLimited
            assert {type(error) for error in refused} == {expected}
            await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in admitted))
            assert all(request.ended is (lease in admitted) for request, lease in zip(requests, leases, strict=True))


async def test_seats_that_are_left_are_free_at_once(either_store_url: str) -> None:
    async with gateways(either_store_url, 2) as (one, other):
        bound = terms([seats(1)])
        for _ in range(20):
            async with one.admit(Request(bound)):
                with pytest.raises(RateLimited):
                    await other.admit(Request(bound)).__aenter__()
            async with other.admit(Request(bound)):
                pass


# — all or nothing


@pytest.mark.parametrize("full", ["rate", "quota", "seats"])
async def test_a_refusal_changes_no_key(either_store_url: str, store: redis.Redis, full: str) -> None:
    limits = limits_of_every_kind()
    async with gateways(either_store_url) as (admission,), AsyncExitStack() as held:
        only = terms([limit for limit in limits if limit.kind == full])
        for _ in range(5):
            await held.enter_async_context(admission.admit(Request(only)))
        await held.enter_async_context(
            admission.admit(Request(terms([limit for limit in limits if limit.kind != full])))
        )
        before = everything(store)
        for order in itertools.permutations(limits):
            with pytest.raises((RateLimited, QuotaExhausted), match=full):
                await admission.admit(Request(terms(order))).__aenter__()
        assert everything(store) == before


async def test_the_longest_wait_is_what_the_caller_is_told(either_store_url: str) -> None:
    """A seat may be free in a moment, a rate in an hour: who waits for the shorter one has waited in vain."""
    slow, seat = rate(1, "hour", name="slow"), seats(1)
    async with gateways(either_store_url) as (admission,), admission.admit(Request(terms([slow, seat]))):
        for order in ([slow, seat], [seat, slow]):
            with pytest.raises(RateLimited, match="rate slow") as refused:
                await admission.admit(Request(terms(order))).__aenter__()
            assert refused.value.retry_after == pytest.approx(3600, abs=30)


# — the scripts themselves, with a clock that the test sets


class Scripts:
    """The scripts of gateway/lua on one server, and the instant (µs) that they take for its TIME."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.now = EPOCH * US
        self._texts = {name: self._load(Script(name).text) for name in ("admit", "settle", "renew")}

    def _load(self, text: str) -> str:
        text = text.replace("redis.call('TIME')", "{ARGV[#ARGV - 1], ARGV[#ARGV]}")
        text = text.replace("/ 1000 + 1000", "/ 1000 + 10^9")  # the server's own clock ends no count: it is another one
        assert "'TIME'" not in text
        loaded: Any = self.client.script_load(text)
        return str(loaded)

    def _run(self, name: str, keys: Sequence[str], *args: Any) -> Any:
        seconds, microseconds = divmod(self.now, US)
        return self.client.evalsha(self._texts[name], len(keys), *keys, *args, seconds, microseconds)

    def admit(self, *requests: tuple[str, Sequence[tuple[Limit, int]]], starts: Sequence[int] = ()) -> list[list[int]]:
        keys: list[str] = []
        words = []
        for id_, charges in requests:
            keys += [reservation(id_), *(key_of(limit) for limit, _ in charges)]
            words.append((id_, "{}", [self._limit(limit, amount, starts) for limit, amount in charges]))
        answers: list[list[int]] = self._run("admit", keys, msgspec.msgpack.encode(words), 15_000, 86_400_000)
        return answers

    def _limit(self, limit: Limit, amount: int, starts: Sequence[int]) -> tuple[Any, ...]:
        match limit.kind:
            case "rate":
                return "r", amount, limit.capacity, limit.amount, limit.period
            case "quota":
                return "q", amount, limit.capacity, *(starts or self.starts(limit))
        return "s", amount, limit.capacity

    def starts(self, limit: Limit) -> list[int]:
        assert limit.zone is not None
        at = datetime.fromtimestamp(self.now // US, UTC)
        return [int(start.timestamp()) for start in windows_around(limit.window, limit.zone, at)]

    def settle(self, id_: str, *corrections: tuple[Limit, int], row: str = "", window: int = 0) -> int:
        keys = [reservation(id_), ledger_stream("acme"), *(key_of(limit) for limit, _ in corrections)]
        words = [self._correction(limit, difference, window) for limit, difference in corrections]
        request = (id_, row, "f", (1, 2, 0, 4, 5) if row else (), words)
        (answer,) = self._run("settle", keys, msgspec.msgpack.encode([request]), 60_000)
        return int(answer)

    def _correction(self, limit: Limit, difference: int, window: int) -> tuple[Any, ...]:
        match limit.kind:
            case "rate":
                return "r", difference, limit.amount, limit.period
            case "quota":
                return "q", difference, window
        return ("s",)

    def renew(self, *ids: str, limit: Limit) -> list[int]:
        keys = [key for id_ in ids for key in (key_of(limit), reservation(id_))]
        answers: list[int] = self._run("renew", keys, 15_000, *ids)
        return answers

    def state(self) -> dict[bytes, bytes]:
        return {key: dump for key, (dump, _) in everything(self.client).items()}


def reservation(id_: str) -> str:
    return f"{{acme}}:request:{id_}"


@pytest.fixture
def scripts(store: redis.Redis) -> Scripts:
    return Scripts(store)


ADMITTED, REFUSED, REPEATED, GIVEN_UP, FOREIGN = 1, 0, 2, 3, 4


def charges(*limits: Limit, amount: int = 1) -> list[tuple[Limit, int]]:
    return [(limit, amount) for limit in limits]


def test_an_admission_repeated_under_its_id_has_one_effect(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    assert scripts.admit(("a", taken))[0][0] == ADMITTED
    before = scripts.state()
    assert [scripts.admit(("a", taken))[0][0] for _ in range(10)] == [REPEATED] * 10
    assert scripts.state() == before


def test_an_admission_twice_in_one_batch_has_one_effect(scripts: Scripts) -> None:
    taken = charges(*limits_of_every_kind())
    first, second = scripts.admit(("a", taken), ("a", taken))
    assert (first[0], second[0]) == (ADMITTED, REPEATED)
    assert first[3::3] == second[3::3] == [4, 4, 4]


def test_a_settlement_repeated_has_one_effect(scripts: Scripts) -> None:
    some, monthly, seat = limits_of_every_kind()
    scripts.admit(("a", [(some, 3), (monthly, 3), (seat, 1)]))
    corrections = [(some, -1), (monthly, -1), (seat, 0)]
    assert scripts.settle("a", *corrections, row="r") == 1
    before = scripts.state()
    assert [scripts.settle("a", *corrections, row="r") for _ in range(5)] == [0] * 5
    after = scripts.state()
    assert after.pop(reservation("a").encode())  # the mark
    assert after == before
    assert scripts.client.xlen(ledger_stream("acme")) == 1


def test_a_settlement_twice_in_one_batch_has_one_effect(scripts: Scripts) -> None:
    some = rate(10, "day")
    scripts.admit(("a", charges(some, amount=9)))
    keys = [reservation("a"), ledger_stream("acme"), key_of(some)]
    request = ("a", "r", "f", (1, 2, 0, 4, 5), [("r", -4, some.amount, some.period)])
    assert scripts._run("settle", keys * 2, msgspec.msgpack.encode([request] * 2), 60_000) == [1, 0]
    assert scripts.admit(("b", [(some, 0)]))[0][3] == 5
    assert scripts.client.xlen(ledger_stream("acme")) == 1


def test_a_settlement_without_an_admission_changes_no_count(scripts: Scripts) -> None:
    scripts.admit(("other", charges(*limits_of_every_kind())))
    before = scripts.state()
    assert scripts.settle("a", *((limit, 3) for limit in limits_of_every_kind()), row="r") == 0
    after = scripts.state()
    assert after.pop(reservation("a").encode())
    assert after == before


def test_an_admission_that_was_given_up_before_it_arrived_takes_nothing(scripts: Scripts) -> None:
    corrections = [(limit, -1) for limit in limits_of_every_kind()]
    assert scripts.settle("a", *corrections) == 0
    before = scripts.state()
    assert scripts.admit(("a", charges(*limits_of_every_kind())))[0][0] == GIVEN_UP
    assert scripts.state() == before


def test_an_admission_that_is_given_up_afterwards_leaves_nothing(scripts: Scripts) -> None:
    scripts.admit(("a", charges(*limits_of_every_kind())))
    assert scripts.settle("a", *((limit, -1) for limit in limits_of_every_kind())) == 1
    first = scripts.admit(("b", charges(*limits_of_every_kind())))[0]
    assert first[3::3] == [4, 4, 4]


def test_the_row_and_the_sums_are_written_with_the_settlement(scripts: Scripts) -> None:
    scripts.admit(("a", charges(seats(5))), ("b", charges(seats(5))))
    assert (scripts.settle("a", row="r"), scripts.settle("b", row="r")) == (1, 1)
    (sums,) = scripts.client.scan_iter(match="*:usage:*")
    held: Any = scripts.client.hgetall(sums)
    assert held == {b"f:requests": b"2", b"f:input_tokens": b"4", b"f:output_tokens": b"8", b"f:cost_microusd": b"10"}
    assert scripts.client.ttl(sums) == 400 * 86_400


# — corrections


def test_what_was_not_used_is_given_back(scripts: Scripts) -> None:
    some, monthly = rate(10, "day"), quota(10, "month")
    scripts.admit(("a", [(some, 10), (monthly, 10)]))
    assert scripts.admit(("b", charges(some, monthly)))[0][0] == REFUSED
    before: Any = scripts.client.ttl(key_of(monthly))
    scripts.settle("a", (some, -4), (monthly, -4))
    assert scripts.client.ttl(key_of(monthly)) >= before - 2 > 28 * 86_400
    answer = scripts.admit(("c", charges(some, monthly, amount=4)))[0]
    assert (answer[0], answer[3::3]) == (ADMITTED, [0, 0])


def test_what_was_used_beyond_the_reservation_is_owed(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.admit(("a", charges(some)))
    scripts.settle("a", (some, 20 - 1))
    verdict, _, wait, remaining, reset, _ = scripts.admit(("b", charges(some)))[0]
    assert (verdict, wait, remaining, reset) == (REFUSED, 1_100_000, 0, 2_000_000)
    scripts.now += wait - 1
    assert scripts.admit(("b", charges(some)))[0][0] == REFUSED
    scripts.now += 1
    assert scripts.admit(("b", charges(some)))[0][0] == ADMITTED


def test_debt_is_owed_where_the_count_has_drained_and_gone(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.admit(("a", charges(some)))
    scripts.client.delete(key_of(some))
    scripts.settle("a", (some, 30))
    assert scripts.admit(("b", charges(some)))[0][2] == 2_100_000


def test_a_refund_never_makes_a_bucket_more_than_full(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.admit(("a", charges(some, amount=10)))
    scripts.now += US // 2  # five have drained
    scripts.settle("a", (some, -10))
    assert scripts.client.exists(key_of(some)) == 0
    answer = scripts.admit(("b", charges(some, amount=10)), ("c", charges(some)))
    assert [one[0] for one in answer] == [ADMITTED, REFUSED]


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "never answered"])
def test_a_reservation_of_an_ended_window_does_not_change_the_later_one(scripts: Scripts, answered: bool) -> None:
    hourly = quota(10, "hour")
    window = scripts.admit(("a", charges(hourly, amount=6)))[0][5]
    scripts.now += 3600 * US
    assert scripts.admit(("b", charges(hourly, amount=6)))[0][3] == 4
    assert scripts.settle("a", (hourly, -6), window=window if answered else 0) == 1
    assert scripts.admit(("c", charges(hourly, amount=4)))[0][3] == 0


def test_a_clock_that_goes_back_neither_locks_nor_drains_a_bucket(scripts: Scripts) -> None:
    some = rate(10, "second")
    scripts.admit(("a", charges(some, amount=5)))
    scripts.now -= 3600 * US
    answers = scripts.admit(("b", charges(some, amount=5)), ("c", charges(some)))
    assert [answer[0] for answer in answers] == [ADMITTED, REFUSED]
    assert answers[1][2] == 100_000


def test_a_faster_rate_refuses_nobody_whom_the_slower_one_let_pass(scripts: Scripts) -> None:
    """What was taken is so many units: sixty of a hundred at one a minute are not an hour at a thousand a minute."""
    slow, fast = rate(1, "minute", burst=100), rate(1000, "minute", burst=100)
    scripts.admit(("a", charges(slow, amount=60)))
    assert scripts.admit(("b", charges(fast, amount=30)))[0][:4] == [ADMITTED, 0, 0, 10]
    scripts.settle("a", (slow, -50))
    assert scripts.admit(("c", charges(slow)))[0][3] == 59


# — seats


def test_a_seat_ends_fifteen_seconds_after_its_worker(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.admit(("a", charges(seat)))
    scripts.now += int(SEAT_LEASE * US) - 1
    assert scripts.admit(("b", charges(seat)))[0][0] == REFUSED
    scripts.now += 1
    assert scripts.admit(("b", charges(seat)))[0][0] == ADMITTED
    assert scripts.client.zrange(key_of(seat), 0, -1) == [b"b"]


def test_a_seat_is_kept_while_it_is_renewed(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.admit(("a", charges(seat)))
    for _ in range(10):
        scripts.now += 14 * US
        assert scripts.renew("a", limit=seat) == [1]
        assert scripts.admit(("b", charges(seat)))[0][0] == REFUSED


def test_a_lapsed_seat_is_taken_again_and_reported(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.admit(("a", charges(seat)))
    scripts.now += 16 * US
    scripts.admit(("b", charges(seat)))
    assert scripts.renew("a", "b", limit=seat) == [0, 1]
    assert scripts.client.zcard(key_of(seat)) == 2


def test_the_seat_of_a_settled_or_given_up_request_does_not_come_back(scripts: Scripts) -> None:
    seat = seats(1)
    scripts.admit(("a", charges(seat)))
    scripts.settle("a", (seat, 0))
    assert scripts.renew("a", limit=seat) == [-1]
    assert scripts.settle("a", (seat, 0)) == 0  # and now its id is marked
    assert scripts.renew("a", limit=seat) == [-1]
    assert scripts.client.exists(key_of(seat)) == 0


async def test_a_live_request_renews_its_seat(
    either_store_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_RENEW_EVERY", 0.0)
    monkeypatch.setattr(admission_module, "_SETTLE_AGAIN", 0.005)
    seat = seats(1)
    async with gateways(either_store_url) as (admission,), admission.admit(Request(terms([seat]))) as lease:
        first: Any = store.zscore(key_of(seat), lease.id)
        await until(lambda: store.zscore(key_of(seat), lease.id) > first)


# — calendar windows


def test_the_servers_clock_decides_which_window_counts(scripts: Scripts) -> None:
    """The gateway's clock is before midnight and the server's after it, or the other way round."""
    daily = quota(10, "day")
    midnight = (EPOCH // 86_400 + 1) * 86_400
    for gateway, server in ((-5, 5), (5, -5), (-5, -5), (5, 5)):
        scripts.client.flushall()
        scripts.now = (midnight + gateway) * US
        starts = scripts.starts(daily)
        scripts.now = (midnight + server) * US
        _, _, _, _, reset, window = scripts.admit(("a", charges(daily)), starts=starts)[0]
        own = midnight if server >= 0 else midnight - 86_400
        assert (window, reset) == (own, (own + 86_400) * US - scripts.now)


def test_a_window_that_has_begun_is_not_left_when_a_clock_goes_back(scripts: Scripts) -> None:
    hourly = quota(10, "hour")
    scripts.now = (EPOCH // 3600 * 3600 + 1) * US
    scripts.admit(("a", charges(hourly, amount=10)))
    scripts.now -= 2 * US
    answer = scripts.admit(("b", charges(hourly)))[0]
    assert (answer[0], answer[2]) == (REFUSED, 3601 * US)
    scripts.now += 1800 * US
    assert scripts.admit(("b", charges(hourly)))[0][0] == REFUSED


@pytest.mark.parametrize("skew", [-7200, -3601, -1, 1, 3601, 7200, 86_400])
def test_clocks_that_differ_by_more_than_a_window_break_nothing(scripts: Scripts, skew: int) -> None:
    hourly = quota(3, "hour")
    starts = scripts.starts(hourly)
    scripts.now += skew * US
    verdicts = [scripts.admit((f"{i}", charges(hourly)), starts=starts)[0][0] for i in range(5)]
    assert verdicts == [ADMITTED] * 3 + [REFUSED] * 2
    assert scripts.client.ttl(key_of(hourly)) >= 3600


ZONES = ["UTC", "Europe/Zurich", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "America/Havana"]
_START, _END = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (2025, 2028))
LONGEST = {"hour": 2 * 3600, "day": 25 * 3600, "week": 169 * 3600, "month": 745 * 3600}


@cache
def shifts(zone: str) -> list[int]:
    """The instants at which a zone's clocks are put forward or back, to the half hour."""
    name, step = ZoneInfo(zone), 1800
    offsets = [datetime.fromtimestamp(at, UTC).astimezone(name).utcoffset() for at in range(_START, _END, step)]
    return [_START + i * step for i in range(1, len(offsets)) if offsets[i] != offsets[i - 1]] or [EPOCH]


@pytest.mark.parametrize("window", LONGEST)
@pytest.mark.parametrize("zone", ZONES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_instant_lies_in_exactly_one_window(data: st.DataObject, zone: str, window: str) -> None:
    near = st.builds(int.__add__, st.sampled_from(shifts(zone)), st.integers(-8000, 8000))
    at = data.draw(st.one_of(near, st.integers(_START + 10**7, _END - 10**7)))

    def around(at: float) -> list[int]:
        instants = windows_around(window, ZoneInfo(zone), datetime.fromtimestamp(at, UTC))
        return [int(instant.timestamp()) for instant in instants]

    before, own, after, last = around(at)
    assert own <= at < after
    assert around(own) == around(after - 1) == [before, own, after, last]
    assert around(after)[:3] == [own, after, last]
    assert around(before)[1:3] == [before, own]
    assert 0 < after - own <= LONGEST[window]


# — the exact model


class Model:
    """The three kinds of limit in fractions: what the scripts have to say. Time is in µs, buckets are in units."""

    def __init__(self) -> None:
        self.reservations: dict[str, dict[str, tuple[Limit, int, int]]] = {}
        self.given_up: set[str] = set()
        self.levels: dict[str, tuple[int, Fraction]] = {}
        self.used: dict[str, tuple[int, int]] = {}
        self.seats: dict[str, dict[str, int]] = {}

    def level(self, limit: Limit, now: int) -> Fraction:
        at, level = self.levels.get(limit.name, (now, Fraction(0)))
        return max(Fraction(0), level - Fraction((now - at) * limit.amount, limit.period))

    def admit(
        self, id_: str, taken: Sequence[tuple[Limit, int]], now: int, starts: dict[str, list[int]], said: list[int]
    ) -> None:
        """Admit or refuse, and compare with what a script has said."""
        if id_ in self.given_up or id_ in self.reservations:
            assert said[0] == (GIVEN_UP if id_ in self.given_up else REPEATED)
        else:
            waits: dict[int, Fraction] = {}
            blurred = False
            for place, (limit, amount) in enumerate(taken, start=1):
                over, wait = self._over(limit, amount, now, starts)
                if limit.kind == "rate" and abs(over) <= band(limit):
                    blurred = True  # within rounding, either is right
                elif over > 0:
                    waits[place] = wait
            if blurred and not waits:
                assert said[0] in (ADMITTED, REFUSED)
            else:
                assert said[0] == (REFUSED if waits else ADMITTED)
            if said[0] == REFUSED and waits:
                longest = max(waits.values())
                slack = 1 + longest / 10**9 + max(rounding(limit) for limit, _ in taken)
                assert abs(said[2] - longest) <= slack
                assert blurred or waits[said[1]] >= longest - slack
            if said[0] == ADMITTED:
                self.reservations[id_] = {}
                for limit, amount in taken:
                    self._take(id_, limit, amount, now, starts)
        for place, (limit, _) in enumerate(taken):
            self._compare(limit, now, starts, said[3 + 3 * place : 6 + 3 * place])

    def _over(self, limit: Limit, amount: int, now: int, starts: dict[str, list[int]]) -> tuple[Fraction, Fraction]:
        match limit.kind:
            case "rate":
                over = self.level(limit, now) + amount - limit.capacity
                return over, over * limit.period / limit.amount
            case "quota":
                _, used, ends = self._window(limit, now, starts)
                return Fraction(used + amount - limit.capacity), Fraction(ends * US - now)
        return Fraction(self.live(limit, now) + amount - limit.capacity), Fraction(0)

    def _window(self, limit: Limit, now: int, starts: dict[str, list[int]]) -> tuple[int, int, int]:
        _, own, after, _ = starts[limit.name]
        window, used = self.used.get(limit.name, (0, 0))
        return own, used if window == own else 0, after

    def live(self, limit: Limit, now: int) -> int:
        return sum(expiry > now for expiry in self.seats.get(limit.name, {}).values())

    def _take(self, id_: str, limit: Limit, amount: int, now: int, starts: dict[str, list[int]]) -> None:
        own = 0
        match limit.kind:
            case "rate":
                self.levels[limit.name] = now, self.level(limit, now) + amount
            case "quota":
                own, used, _ = self._window(limit, now, starts)
                self.used[limit.name] = own, used + amount
            case "seats":
                self.seats.setdefault(limit.name, {})[id_] = now + 15 * US
        self.reservations[id_][limit.name] = limit, amount, own

    def _compare(self, limit: Limit, now: int, starts: dict[str, list[int]], said: list[int]) -> None:
        remaining, reset, window = said
        match limit.kind:
            case "rate":
                level = self.level(limit, now)
                exact = max(Fraction(0), limit.capacity - level)
                # Rounding decides only about a unit that is all but there.
                assert exact - 1 - band(limit) <= remaining <= exact + band(limit)
                assert (
                    abs(reset - level * limit.period / limit.amount) <= 1 + level * limit.period / limit.amount / 10**9
                )
            case "quota":
                own, used, ends = self._window(limit, now, starts)
                assert (remaining, reset, window) == (max(0, limit.capacity - used), ends * US - now, own)
            case "seats":
                assert remaining == max(0, limit.capacity - self.live(limit, now))

    def settle(self, id_: str, differences: dict[str, int], now: int) -> int:
        taken = self.reservations.pop(id_, None)
        if taken is None:
            self.given_up.add(id_)
            return 0
        for limit, _, own in taken.values():
            match limit.kind:
                case "rate":
                    level = max(Fraction(0), self.level(limit, now) + differences[limit.name])
                    self.levels[limit.name] = now, level
                case "quota":
                    window, used = self.used[limit.name]
                    if window == own:
                        self.used[limit.name] = window, max(0, used + differences[limit.name])
                case "seats":
                    self.seats[limit.name].pop(id_, None)
        return 1

    def renew(self, id_: str, limit: Limit, now: int) -> int:
        if id_ not in self.reservations or limit.name not in self.reservations[id_]:
            return -1
        kept = self.seats[limit.name].get(id_, 0) > now
        self.seats[limit.name][id_] = now + 15 * US
        return int(kept)


def band(limit: Limit) -> Fraction:
    """What rounding may decide, in units: one part in 10^12, and never a whole unit."""
    return min(Fraction(limit.capacity, 10**12), Fraction(1, 2)) * 2


def rounding(limit: Limit) -> Fraction:
    """The same, in µs."""
    return band(limit) * limit.period / limit.amount


AMOUNTS = (1, 2, 10**3, 10**9, 10**12)
rates = st.builds(
    lambda amount, period, burst: rate(amount, period, burst=burst),
    st.sampled_from(AMOUNTS),
    st.sampled_from(["second", "minute", "day"]),
    st.sampled_from([None, *AMOUNTS]),
).filter(lambda limit: limit.capacity * limit.period <= limit.amount * 2**53)  # full again in 285 years


class Limits(RuleBasedStateMachine):
    """Valkey, Redis 7 and the model say the same, whatever happens in whatever order."""

    servers: tuple[redis.Redis, ...]

    def __init__(self) -> None:
        super().__init__()
        self.scripts = [Scripts(client) for client in self.servers]
        for client in self.servers:
            client.flushdb()
        self.model = Model()
        self.now = EPOCH * US
        self.stated = 0
        self.ids = 0
        self.limits: list[Limit] = []

    @initialize(
        first=rates, second=rates, day=st.sampled_from(AMOUNTS), hour=st.integers(1, 5), at_most=st.integers(1, 3)
    )
    def policies(self, first: Limit, second: Limit, day: int, hour: int, at_most: int) -> None:
        self.limits = [
            rate(first.amount, first.window, burst=first.capacity, name="first"),
            rate(second.amount, second.window, burst=second.capacity, name="second"),
            quota(day, "day", zone="Asia/Kolkata", name="day"),
            quota(hour, "hour", name="hour"),
            seats(at_most),
        ]

    @rule(by=st.one_of(st.integers(0, 20), st.integers(0, 3 * US), st.integers(0, 20 * US), st.integers(0, 2 * DAY)))
    def time_passes(self, by: int) -> None:
        self.now += by

    @rule()
    def the_stated_time_passes(self) -> None:
        self.now += min(self.stated, 400 * DAY)

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        requests = []
        for _ in range(data.draw(st.integers(1, 3))):
            chosen = data.draw(
                st.lists(st.sampled_from(self.limits), min_size=1, max_size=5, unique_by=lambda x: x.name)
            )
            self.ids += 1
            id_ = str(data.draw(st.sampled_from([self.ids, self.ids, self.ids, max(1, self.ids - 1)])))
            requests.append((id_, [(limit, self._amount(data, limit)) for limit in chosen]))
        answers = self._same(lambda scripts: scripts.admit(*requests))
        starts = {limit.name: self.scripts[0].starts(limit) for limit in self.limits if limit.kind == "quota"}
        for (id_, taken), said in zip(requests, answers, strict=True):
            self.model.admit(id_, taken, self.now, starts, said)
            self.stated = said[2]

    def _amount(self, data: st.DataObject, limit: Limit) -> int:
        if limit.kind == "seats":
            return 1
        return data.draw(st.one_of(st.sampled_from([0, 1, limit.capacity]), st.integers(0, limit.capacity)))

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from([*self.model.reservations, str(self.ids + 1), "1"]))
        taken = self.model.reservations.get(id_, {})
        differences = {
            limit.name: data.draw(st.one_of(st.just(-amount), st.integers(-amount, amount)))
            for limit, amount, _ in taken.values()
        }
        window = {name: own for name, (_, _, own) in taken.items()}
        answers = self._same(lambda scripts: self._settle(scripts, id_, taken, differences, window))
        assert answers == self.model.settle(id_, differences, self.now)

    def _settle(
        self,
        scripts: Scripts,
        id_: str,
        taken: dict[str, tuple[Limit, int, int]],
        differences: dict[str, int],
        window: dict[str, int],
    ) -> int:
        keys = [reservation(id_), ledger_stream("acme"), *(key_of(limit) for limit, _, _ in taken.values())]
        words = [
            scripts._correction(limit, differences[limit.name], window[limit.name]) for limit, _, _ in taken.values()
        ]
        (answer,) = scripts._run("settle", keys, msgspec.msgpack.encode([(id_, "", "", (), words)]), 86_400_000)
        return int(answer)

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        holders = [id_ for id_, taken in self.model.reservations.items() if "seats" in taken]
        id_ = data.draw(st.sampled_from([*holders, str(self.ids + 7)]))
        seat = self.limits[-1]
        assert self._same(lambda scripts: scripts.renew(id_, limit=seat)) == [self.model.renew(id_, seat, self.now)]

    def _same(self, work: Any) -> Any:
        for scripts in self.scripts:
            scripts.now = self.now
        first, *others = (work(scripts) for scripts in self.scripts)
        assert all(other == first for other in others)
        return first


def test_valkey_redis_and_an_exact_model_agree(valkey: house.Server, redis7: house.Server) -> None:
    with valkey.sync() as one, redis7.sync() as other:
        Limits.servers = (one, other)
        run_state_machine_as_test(
            Limits,
            settings=settings(
                deadline=None, max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck)
            ),
        )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=rates,
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 10**12)), min_size=5, max_size=40
    ),
)
def test_no_window_admits_more_than_its_burst_and_its_rate(
    store: redis.Redis, limit: Limit, steps: list[tuple[int, int, int]]
) -> None:
    """An adversary who takes all that is left whenever he can: admitted in any window W ≤ burst + rate · W."""
    store.flushdb()
    scripts = Scripts(store)
    admitted: list[tuple[int, int]] = []
    for number, (kind, moment, amount) in enumerate(steps):
        scripts.now += (0, moment, moment * limit.period // (limit.amount * 10**6), limit.period // limit.amount)[kind]
        left = scripts.admit((f"look{number}", [(limit, 0)]))[0][3]
        admitted += [
            (scripts.now, tried)
            for tried in (left + 1, left, amount)
            if scripts.admit((f"{number}:{tried}", [(limit, tried)]))[0][0] == ADMITTED
        ]
    for first in range(len(admitted)):
        total = 0
        for at, amount in admitted[first:]:
            total += amount
            window = at - admitted[first][0]
            assert total <= limit.capacity + -(-window * limit.amount // limit.period)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=rates, part=st.integers(1, 100), data=st.data())
def test_who_waits_the_stated_time_is_admitted_and_who_waits_less_is_not(
    store: redis.Redis, limit: Limit, part: int, data: st.DataObject
) -> None:
    store.flushdb()
    scripts = Scripts(store)
    scripts.admit(("a", [(limit, max(1, limit.capacity * part // 100))]))
    asked = data.draw(st.integers(max(1, limit.capacity // 2), limit.capacity))
    verdict, _, wait, *_ = scripts.admit(("b", [(limit, asked)]))[0]
    if verdict == ADMITTED:
        return
    start = scripts.now
    for name, share, expected in (("early", 0.95, REFUSED), ("late", 1, ADMITTED)):
        scripts.now = start + int(wait * share)
        if wait > 100 or expected == ADMITTED:
            assert scripts.admit((name, [(limit, asked)]))[0][0] == expected


# — foreign keys


GARBAGE: dict[str, Any] = {
    "text": lambda store, key: store.set(key, "garbage"),
    "half a count": lambda store, key: store.set(key, "12 "),
    "no unit": lambda store, key: store.set(key, "12 5 0"),
    "list": lambda store, key: store.rpush(key, "x"),
    "hash": lambda store, key: store.hset(key, "a", "b"),
    "another set": lambda store, key: store.sadd(key, "x"),
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["rate", "quota", "seats"])
async def test_a_key_that_holds_something_else_fails_its_own_request_only(
    either_store_url: str, store: redis.Redis, kind: str, garbage: str
) -> None:
    limits = limits_of_every_kind()
    (spoiled,) = (limit for limit in limits if limit.kind == kind)
    GARBAGE[garbage](store, key_of(spoiled))
    before = everything(store)
    well = [Request(terms(limits, organisation=f"other{i}")) for i in range(3)]
    ill = Request(terms(limits))
    async with gateways(either_store_url) as (admission,):
        leases = [admission.admit(request) for request in (*well[:2], ill, *well[2:])]
        results = await asyncio.gather(*(lease.__aenter__() for lease in leases), return_exceptions=True)
        error = results.pop(2)
        assert isinstance(error, InternalError)
        assert f"limit {kind}" in error.message
        after = everything(store)
        assert {key: value for key, value in after.items() if key in before or b"{acme}" in key} == before
        assert [result.standings[0].remaining for result in results if not isinstance(result, BaseException)] == [4] * 3
        await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in (*leases[:2], *leases[3:])))


@pytest.mark.parametrize("kind", ["rate", "quota", "seats"])
def test_a_count_that_is_overwritten_while_a_request_runs_does_not_keep_it_from_settling(
    scripts: Scripts, kind: str
) -> None:
    limits = limits_of_every_kind()
    scripts.admit(("a", charges(*limits, amount=1)))
    (spoiled,) = (limit for limit in limits if limit.kind == kind)
    scripts.client.delete(key_of(spoiled))
    scripts.client.rpush(key_of(spoiled), "x")
    assert scripts.settle("a", *((limit, -1) for limit in limits), row="r") == 1
    assert scripts.client.lrange(key_of(spoiled), 0, -1) == [b"x"]
    others = [limit for limit in limits if limit is not spoiled]
    assert scripts.admit(("b", charges(*others)))[0][3::3] == [4, 4]


async def test_a_row_that_cannot_be_written_waits_until_it_can(either_store_url: str, store: redis.Redis) -> None:
    """And is written once then; the settlements beside it do not wait."""
    some = rate(10, "day")
    store.set(ledger_stream("acme"), "not a stream")
    async with gateways(either_store_url) as (admission,):
        bound = terms([some], {"rate": 5})
        requests = [Request(bound), Request(terms([some], organisation="other"))]
        leases = [admission.admit(request) for request in requests]
        await asyncio.gather(*(lease.__aenter__() for lease in leases))
        await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in leases))
        assert (admission.unsettled, store.xlen(ledger_stream("other"))) == (1, 1)
        await until(lambda: not admission._late)  # it was tried again
        store.delete(ledger_stream("acme"))
        await until(lambda: admission.unsettled == 0)
        assert store.xlen(ledger_stream("acme")) == 1
        async with admission.admit(Request(bound)) as lease:
            assert lease.standings[0].remaining == 10 - 1 - 5


# — what is lost on the way


async def test_a_lost_reply_is_told_within_the_deadline_and_nothing_stays_taken(
    either_store_url: str, store: redis.Redis
) -> None:
    limits = limits_of_every_kind()
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.2) as (admission,):
        async with admission.admit(Request(terms(limits))):
            pass
        line.deaf = True
        request = Request(terms(limits))
        async with asyncio.timeout(2):
            with pytest.raises(StoreUnavailable):
                await admission.admit(request).__aenter__()
        await until(lambda: line.lost >= 2)
        assert admission.unsettled == 1
        line.deaf = False
        await until(lambda: admission.unsettled == 0)
        assert store.zcard(key_of(limits[2])) == 0
        async with admission.admit(Request(terms(limits))) as lease:
            assert [standing.remaining for standing in lease.standings] == [3, 3, 4]
        assert store.xlen(ledger_stream("acme")) == 2  # no row of a request that was not served


async def test_an_admission_that_arrives_after_it_was_given_up_takes_nothing(
    either_store_url: str, store: redis.Redis
) -> None:
    seat = seats(1)
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.2) as (admission,):
        async with admission.admit(Request(terms([seat]))):
            pass
        line.held.clear()
        with pytest.raises(StoreUnavailable):
            await admission.admit(Request(terms([seat]))).__aenter__()
        await until(lambda: admission._late or admission._store.away)  # nor does giving up arrive
        line.held.set()  # all of it arrives now, in whatever order
        await until(lambda: admission.unsettled == 0)
        await until(lambda: store.zcard(key_of(seat)) == 0)
        async with admission.admit(Request(terms([seat]))):
            pass


async def test_a_lost_settlement_is_sent_again_and_counts_once(either_store_url: str, store: redis.Redis) -> None:
    some = rate(10, "day")
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.2) as (admission,):
        bound = terms([some], {"rate": 5})
        async with admission.admit(Request(bound, {"rate": 2})):
            line.cuts = True
        assert admission.unsettled == 1
        await until(lambda: admission.unsettled == 0)
        async with admission.admit(Request(bound)) as lease:
            assert lease.standings[0].remaining == 10 - 2 - 5
        assert store.xlen(ledger_stream("acme")) == 2


async def test_while_the_store_is_known_to_be_away_nothing_is_kept_of_a_refused_request(either_store_url: str) -> None:
    async with gateways(either_store_url) as (admission,):
        admission._store.away = True
        for _ in range(100):
            with pytest.raises(StoreUnavailable):
                await admission.admit(Request(terms([seats(1)]))).__aenter__()
        assert admission.unsettled == 0
        admission._store.away = False


@pytest.mark.parametrize("turns", range(6))
async def test_a_caller_who_leaves_while_he_is_admitted_takes_nothing(
    either_store_url: str, store: redis.Redis, turns: int
) -> None:
    limits = limits_of_every_kind()
    async with gateways(either_store_url) as (admission,):
        lease = admission.admit(Request(terms(limits)))
        entering = asyncio.ensure_future(lease.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        assert not entering.done()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        await until(lambda: admission.unsettled == 0)
        async with admission.admit(Request(terms(limits))) as lease:
            assert [standing.remaining for standing in lease.standings] == [4, 4, 4]


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_caller_who_leaves_while_he_is_settled_is_settled(
    either_store_url: str, store: redis.Redis, times: int
) -> None:
    async with gateways(either_store_url) as (admission,):
        lease = admission.admit(Request(terms([seats(1)])))
        await lease.__aenter__()
        leaving = asyncio.ensure_future(lease.__aexit__(None, None, None))
        for _ in range(times):
            await asyncio.sleep(0)
            leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (store.zcard(key_of(seats(1))), store.xlen(ledger_stream("acme"))) == (0, 1)
        assert (admission.unsettled, admission._live) == (0, {})


async def test_what_is_left_at_the_end_is_settled_by_finish(either_store_url: str, store: redis.Redis) -> None:
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.2) as (admission,):
        requests = [Request(terms([seats(9)])) for _ in range(3)]
        leases = [await admission.admit(request).__aenter__() for request in requests]
        line.cuts = True
        await asyncio.gather(*(lease.__aexit__(None, None, None) for lease in leases))
        await until(lambda: not admission._store.away)
        await admission.finish()
        assert (admission.unsettled, store.xlen(ledger_stream("acme"))) == (0, 3)


async def test_an_idle_store_holds_no_reservation_and_no_seat(either_store_url: str, store: redis.Redis) -> None:
    """And every count ends by itself."""
    limits = limits_of_every_kind()
    async with gateways(either_store_url, 2) as two:

        async def one(admission: Admission) -> None:
            try:
                async with admission.admit(Request(terms(limits))):
                    await asyncio.sleep(0)
            except GatewayError:
                pass

        await asyncio.gather(*(one(two[i % 2]) for i in range(60)))
        left = {key: ends for key, (_, ends) in everything(store).items()}
        now = time.time() * 1000
        assert not [key for key in left if b":request:" in key or b":seats:" in key]
        assert all(now < ends < now + 401 * 86_400_000 for key, ends in left.items() if not key.endswith(b":usage"))

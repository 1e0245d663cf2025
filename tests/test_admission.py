"""The limits hold: against many gateways at once, lost replies, lost workers, other clocks, and an exact model."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from gateway import admission as admission_module
from gateway import settlements
from gateway.admission import Admission
from gateway.errors import GatewayError, InternalError, QuotaExhausted, RateLimited, StoreUnavailable
from gateway.explain import Looks
from gateway.records import ledger_stream
from gateway.snapshot import Limit
from gateway.terms import Charge
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


# — seats


async def test_a_live_request_renews_its_seat(
    either_store_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_RENEW_EVERY", 0.0)
    monkeypatch.setattr(admission_module, "_GLANCE", 0.005)
    seat = seats(1)
    async with gateways(either_store_url) as (admission,), admission.admit(Request(terms([seat]))) as lease:
        first: Any = store.zscore(key_of(seat), lease.id)
        await until(lambda: store.zscore(key_of(seat), lease.id) > first)


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
        before = trips(store)
        await until(lambda: trips(store) > before + 1)  # it was tried again
        store.delete(ledger_stream("acme"))
        await until(lambda: admission.unsettled == 0)
        assert store.xlen(ledger_stream("acme")) == 1
        async with admission.admit(Request(bound)) as lease:
            assert lease.standings[0].remaining == 10 - 1 - 5


async def test_rows_that_cannot_be_written_do_not_keep_others_waiting(
    either_store_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlements, "_ROUND", 4)
    store.set(ledger_stream("acme"), "not a stream")
    async with gateways(either_store_url) as (admission,):
        async with AsyncExitStack() as held:
            for organisation in ("other", *["acme"] * 4):  # the last one ends first
                bound = terms([rate(10, "day")], organisation=organisation)
                await held.enter_async_context(admission.admit(Request(bound)))
            admission._store.away = True
        admission._store.away = False
        await until(lambda: store.xlen(ledger_stream("other")) == 1)
        await until(lambda: admission.unsettled == 4)


# — what is lost on the way


async def test_a_lost_reply_is_told_within_the_deadline_and_nothing_stays_taken(
    either_store_url: str, store: redis.Redis
) -> None:
    limits = limits_of_every_kind()
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.2) as (admission,):
        async with admission.admit(Request(terms(limits))):
            pass
        line.deaf = True
        request = Request(terms(limits, closed=True))
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
            await admission.admit(Request(terms([seat], closed=True))).__aenter__()
        await until(lambda: admission.settlements._late or admission._store.away)  # nor does giving up arrive
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
                await admission.admit(Request(terms([seats(1)], closed=True))).__aenter__()
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
        await until(lambda: admission.idle)


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
        assert not [key for key in left if b":seats:" in key or key.endswith(b":live")]
        marks = [key for key in left if b":request:" in key]  # so that what is sent twice is known
        assert {store.get(mark) for mark in marks} == {b"+"}
        assert all(now < left[mark] < now + 121_000 for mark in marks)
        assert all(now < ends < now + 401 * 86_400_000 for key, ends in left.items() if not key.endswith(b":usage"))


# — refusals that need no trip


def trips(store: redis.Redis) -> int:
    """How many scripts the store has run."""
    stats: Any = store.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


async def refused(admission: Admission, request: Request) -> GatewayError:
    with pytest.raises(GatewayError) as error:
        await admission.admit(request).__aenter__()
    return error.value


async def test_what_time_alone_opens_is_refused_again_without_asking(either_store_url: str, store: redis.Redis) -> None:
    slow = rate(2, "hour")
    async with gateways(either_store_url) as (admission,):
        for _ in range(2):
            async with admission.admit(Request(terms([slow]))):
                pass
        first = await refused(admission, Request(terms([slow])))
        before = trips(store)
        again = [await refused(admission, Request(terms([slow]))) for _ in range(100)]
        assert trips(store) - before <= 2  # the seats' renewal may be among them
        assert {type(error) for error in again} == {RateLimited}
        assert first.retry_after is not None
        told = [error.retry_after for error in again if error.retry_after is not None]
        assert len(told) == 100
        assert first.retry_after >= told[0] >= told[-1] > first.retry_after - 5


async def test_who_asks_for_less_is_asked_about(either_store_url: str) -> None:
    tokens = rate(100, "hour", count="input_tokens")
    async with gateways(either_store_url) as (admission,):
        async with admission.admit(Request(terms([tokens], {"rate": 60}), {"rate": 60})):
            pass
        await refused(admission, Request(terms([tokens], {"rate": 50})))
        async with admission.admit(Request(terms([tokens], {"rate": 40}))):
            pass


async def test_who_asks_for_more_is_told_how_long_that_takes(either_store_url: str, store: redis.Redis) -> None:
    """Though it is refused without asking: what is told is for what it asks."""
    tokens = rate(3600, "hour", count="input_tokens")
    async with gateways(either_store_url) as (admission,):
        async with admission.admit(Request(terms([tokens], {"rate": 3600}), {"rate": 3600})):
            pass
        await refused(admission, Request(terms([tokens], {"rate": 100})))
        before = trips(store)
        error = await refused(admission, Request(terms([tokens], {"rate": 3000})))
        assert trips(store) - before <= 1  # the seats' renewal may be among them
        assert error.retry_after == pytest.approx(3000, abs=30)
        assert "3000 asked for" in str(error)


async def test_a_limit_of_new_policies_is_asked_about(either_store_url: str) -> None:
    async with gateways(either_store_url) as (admission,):
        async with admission.admit(Request(terms([rate(1, "hour")]))):
            pass
        await refused(admission, Request(terms([rate(1, "hour")])))
        async with admission.admit(Request(terms([rate(10, "hour")]))):
            pass


async def test_who_is_refused_for_what_others_hold_is_told_when_it_comes_back(either_store_url: str) -> None:
    """Not when time alone would make room, and not as a quota that is exhausted."""
    for limit in (rate(100, "hour", count="total_tokens"), quota(100, "month", count="total_tokens", name="rate")):
        bound = terms([limit], {"rate": 60}, organisation=limit.kind)
        async with gateways(either_store_url) as (admission,):
            for _ in range(3):
                async with admission.admit(Request(bound, {"rate": 1})):
                    await asyncio.sleep(0.2)
            async with admission.admit(Request(bound, {"rate": 1})):
                error = await refused(admission, Request(bound))
                assert isinstance(error, RateLimited)
                assert error.retry_after is not None
                assert error.retry_after <= 1.0
            async with admission.admit(Request(bound, {"rate": 1})):
                pass  # and it has come back


async def test_who_is_refused_a_seat_is_told_when_one_is_left(either_store_url: str) -> None:
    bound = terms([seats(1)])
    async with gateways(either_store_url) as (admission,):
        for _ in range(3):
            async with admission.admit(Request(bound)):
                await asyncio.sleep(0.2)
        async with admission.admit(Request(bound)):
            error = await refused(admission, Request(bound))
            assert error.retry_after is not None
            assert 0.05 <= error.retry_after <= 0.6


# — looking, shadows, thresholds


async def test_to_look_changes_nothing_and_tells_what_is_reserved(either_store_url: str, store: redis.Redis) -> None:
    limits = [rate(100, "day", count="input_tokens"), quota(100, "month", count="total_tokens"), seats(5)]
    bound = terms(limits, {"rate": 30, "quota": 40})
    async with gateways(either_store_url) as (admission,):
        async with admission.admit(Request(bound, {"rate": 10, "quota": 20})):
            before = everything(store)
            looked = await Looks(admission._store)("acme", bound.charges)
            assert [(s.remaining, s.held) for s in looked][:2] == [(70, 30), (60, 40)]
            assert looked[2].remaining == 4
            assert everything(store) == before
        looked = await Looks(admission._store)("acme", bound.charges)
        assert [(s.remaining, s.held) for s in looked] == [(90, 0), (80, 0), (5, 0)]


async def test_a_limit_in_shadow_refuses_nobody_and_tells_whom_it_would_have(either_store_url: str) -> None:
    shadow, enforced = rate(2, "hour", name="shadow", shadow=True), rate(5, "hour", name="enforced")
    async with gateways(either_store_url) as (admission,):
        would = []
        for _ in range(5):
            async with admission.admit(Request(terms([shadow, enforced]))) as lease:
                would.append([standing.over for standing in lease.standings])
        assert would == [[False, False]] * 2 + [[True, False]] * 3
        error = await refused(admission, Request(terms([shadow, enforced])))
        assert error.policies == ("enforced",)


async def test_each_threshold_is_told_once_by_whichever_gateway_reaches_it(either_store_url: str) -> None:
    told: list[tuple[str, str, int, int]] = []

    def reached(organisation: str, charge: Charge, number: int, used: int, window: int) -> None:
        assert window > EPOCH
        told.append((organisation, charge.limit.name, number, used))

    tokens = quota(100, "month", count="total_tokens", name="tokens", warn_at=(0.5, 0.8))
    requests = quota(4, "month", name="requests", warn_at=(0.5,))
    async with gateways(either_store_url, 2, reached=reached) as two:
        for turn in range(4):
            bound = terms([tokens, requests], {"tokens": 25})
            async with two[turn % 2].admit(Request(bound, {"tokens": 22})):
                pass
    assert told == [
        ("acme", "requests", 1, 2),
        ("acme", "tokens", 1, 66),
        ("acme", "tokens", 2, 88),
    ]


# — while the store is away


async def test_the_deadline_is_paid_once_and_the_workers_share_is_spent(
    either_store_url: str, store: redis.Redis
) -> None:
    """And what was served so is counted and written down when the store is back, once."""
    some = rate(10, "day")
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.3) as (admission,):
        async with admission.admit(Request(terms([some]))):
            pass
        line.deaf = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with admission.admit(Request(terms([some]))) as lease:
            assert lease.degraded
        assert loop.time() - began < 0.3 + 0.25
        await until(lambda: admission._store.away)
        served = 0
        while served < 20:
            began = loop.time()
            try:
                async with admission.admit(Request(terms([some]))):
                    served += 1
            except RateLimited:
                break
            assert loop.time() - began < 0.2
        assert served == 10 - 2
        error = await refused(admission, Request(terms([some])))
        assert (b"x-gateway-limits", b"degraded") in error.extra_headers
        line.deaf = False
        await until(lambda: admission.idle)
        assert store.xlen(ledger_stream("acme")) == 10
        assert (await Looks(admission._store)("acme", terms([some]).charges))[0].remaining == 0
        assert {store.get(key) for key in everything(store) if b":request:" in key} <= {b"+", b"-"}


async def test_a_request_that_has_waited_for_its_admission_waits_the_less_for_its_settlement(
    either_store_url: str,
) -> None:
    async with wire(either_store_url) as line, gateways(line.url, deadline=1.0) as (admission,):
        async with admission.admit(Request(terms([seats(5)]))):
            pass
        loop = asyncio.get_running_loop()
        line.held.clear()
        loop.call_later(0.6, line.held.set)
        began = loop.time()
        async with admission.admit(Request(terms([seats(5)]))) as lease:
            line.held.clear()
        assert not lease.degraded
        assert loop.time() - began < 1.0 + 0.3
        assert admission.unsettled == 1
        line.held.set()
        await until(lambda: admission.idle)


async def test_what_is_closed_without_the_store_is_refused_and_says_so(either_store_url: str) -> None:
    async with gateways(either_store_url) as (admission,):
        admission._store.away = True
        error = await refused(admission, Request(terms([rate(5, "day")], closed=True)))
        assert isinstance(error, StoreUnavailable)
        assert (b"x-gateway-limits", b"degraded") in error.extra_headers
        admission._store.away = False


async def test_who_is_refused_in_one_trip_with_others_is_told_once_that_the_store_is_away(
    either_store_url: str,
) -> None:
    async with gateways(either_store_url) as (admission,):
        admission._store.away = True
        bound = terms([rate(5, "day")], closed=True)
        errors = await asyncio.gather(*(refused(admission, Request(bound)) for _ in range(5)))
        assert [error.extra_headers for error in errors] == [[(b"x-gateway-limits", b"degraded")]] * 5
        admission._store.away = False


async def test_what_is_open_without_the_store_is_served_and_counted_afterwards(
    either_store_url: str, store: redis.Redis
) -> None:
    some = rate(3, "day", when_store_fails="open")
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.3) as (admission,):
        line.cuts = True
        async with AsyncExitStack() as held:
            for _ in range(10):
                await held.enter_async_context(admission.admit(Request(terms([some]))))
        await until(lambda: admission.idle)
        assert store.xlen(ledger_stream("acme")) == 10
        error = await refused(admission, Request(terms([some])))
        assert error.retry_after == pytest.approx(8 * 86_400 / 3, rel=0.01)  # eight more than there were


async def test_after_an_absence_settlements_are_sent_batch_by_batch(either_store_url: str, store: redis.Redis) -> None:
    some = rate(10_000, "day")
    async with wire(either_store_url) as line, gateways(line.url, deadline=2.0) as (admission,):
        async with admission.admit(Request(terms([some]))):
            pass
        line.cuts = True
        async with admission.admit(Request(terms([some]))):
            pass
        assert admission._store.away
        for _ in range(500):
            async with admission.admit(Request(terms([some]))):
                pass
        before = trips(store)
        await until(lambda: admission.idle)
        assert trips(store) - before <= 500 // 64 + 6
        assert store.xlen(ledger_stream("acme")) == 502


async def test_what_cannot_be_remembered_is_refused_before_it_is_served(
    either_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlements, "MOST", 3)
    async with gateways(either_store_url) as (admission,):
        admission._store.away = True
        for _ in range(3):
            async with admission.admit(Request(terms([rate(100, "day")]))):
                pass
        assert isinstance(await refused(admission, Request(terms([rate(100, "day")]))), StoreUnavailable)
        admission._store.away = False
        await until(lambda: admission.idle)


async def test_workers_on_one_store_know_of_one_another(either_store_url: str, store: redis.Redis) -> None:
    async with gateways(either_store_url, 3) as three:
        await until(lambda: store.zcard("{gateway}:workers") == 3)
        for admission in three:
            await admission._stay(time.monotonic())
        assert [admission._shares.workers for admission in three] == [3, 3, 3]
        assert sorted(admission._shares.rank for admission in three) == [0, 1, 2]


async def test_a_worker_whose_seats_have_lapsed_learns_it(
    either_store_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was paused for too long does, and takes them again: what runs is counted."""
    monkeypatch.setattr(admission_module, "_RENEW_EVERY", 0.0)
    seat = seats(1)
    async with gateways(either_store_url) as (admission,), admission.admit(Request(terms([seat]))):
        with capture_logs() as lines:
            store.delete(key_of(seat))
            await until(lambda: any(line["event"] == "seats_lapsed" for line in lines))
        assert store.zcard(key_of(seat)) == 1


async def test_a_seat_that_was_taken_although_its_answer_came_too_late_is_renewed(
    either_store_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "_RENEW_EVERY", 0.0)
    seat = seats(1)
    async with wire(either_store_url) as line, gateways(line.url, deadline=0.3) as (admission,):
        async with admission.admit(Request(terms([seat]))):
            pass
        line.held.clear()
        async with admission.admit(Request(terms([seat]))) as lease:
            assert lease.degraded
            line.held.set()
            await until(lambda: store.zscore(key_of(seat), lease.id) is not None)
            first: Any = store.zscore(key_of(seat), lease.id)
            await until(lambda: store.zscore(key_of(seat), lease.id) > first)
        await until(lambda: admission.idle)
        assert store.zcard(key_of(seat)) == 0


async def test_a_share_that_is_spent_is_told_as_that_and_not_as_a_quota_that_is_used_up(either_store_url: str) -> None:
    bound = terms([quota(1000, "month", count="output_tokens")], {"quota": 300})
    async with gateways(either_store_url) as (admission,):
        admission._shares.workers = 4
        admission._store.away = True
        error = await refused(admission, Request(bound))
        assert isinstance(error, RateLimited)
        assert "this worker's share of the limit quota" in error.message
        assert (error.policies, error.retry_after) == (("quota",), 5.0)
        admission._store.away = False


async def test_who_looks_keeps_no_admission_waiting_in_its_trip(either_store_url: str, store: redis.Redis) -> None:
    limits = [rate(100, "day", name=f"l{i}") for i in range(40)]
    async with gateways(either_store_url) as (admission,):
        before = trips(store)
        looking = asyncio.ensure_future(Looks(admission._store)("acme", terms(limits).charges))
        async with admission.admit(Request(terms(limits[:1]))):
            assert len(await looking) == 40
        assert trips(store) - before >= 3

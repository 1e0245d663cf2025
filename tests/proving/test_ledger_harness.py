"""A small run of the kill harness, and its judge: it finds what is wrong, and nothing else."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.records import COUNTERS, GRAINS, Price, UsageRecord, group_of
from tests.proving import ledger
from tests.proving.backend import DONE, END, EVENTS, Backend, Peer, chunk, ok
from tests.proving.ledger import (
    CORRECTION,
    Attempt,
    Call,
    Course,
    Evidence,
    Life,
    Order,
    Row,
    Sums,
    ask,
    body_of,
    judge,
    keep,
    number_of,
    order,
    prove,
    report,
    told_last,
)

# — through real processes


@pytest.mark.timeout(300)
async def test_every_token_is_written_down_once_whatever_dies(tmp_path: Path) -> None:
    course = Course(seed=6, requests=600, kills=10, seconds=16.0)
    evidence = await prove(course, tmp_path)
    verdicts = judge(evidence)
    report(course, evidence, verdicts)
    keep(evidence, tmp_path)
    assert [(verdict.name, verdict.wrong) for verdict in verdicts if verdict.wrong] == []
    assert (evidence.kills["worker"], evidence.kills["valkey"], evidence.kills["exporter"]) == (6, 2, 2)
    assert {row.record.status for row in evidence.rows} == {"settled", "interrupted", "correction"}
    outcomes = Counter(call.outcome for call in evidence.calls)
    assert len(evidence.calls) == 600
    assert outcomes["whole"] > 300
    assert outcomes["left"] > 0
    assert outcomes["cut"] > 0


# — the judge

MONTH, DAY, HOUR = (2026 - 1970) * 12 + 10, 20_779, 20_779 * 24 + 16  # of the rows below
MS = HOUR * 3_600_000 + 5


def record(id_: str, **given: Any) -> UsageRecord:
    """The row of an answer of 40 tokens to a prompt of 25, of which 7 were cached; 10 were thought."""
    fields: dict[str, Any] = {
        "status": "settled",
        "organisation": "acme",
        "team": "research",
        "key": "k",
        "user": "u_1",
        "model": "small",
        "served_model": "small",
        "pool": "demo",
        "upstream": "127.0.0.1:1",
        "endpoint": "completions",
        "stream": True,
        "http_status": 200,
        "ended": "complete",
        "attempt": 1,
        "requests": 1,
        "input_tokens": 25,
        "cached_tokens": 7,
        "output_tokens": 40,
        "reasoning_tokens": 10,
        "input_source": "upstream",
        "output_source": "upstream",
        "price": Price(200_000, 100_000, 400_000, 600_000),
        "cost_microusd": 22,  # 18 * 0.2 + 7 * 0.1 + 30 * 0.4 + 10 * 0.6 = 22.3
        "received_ms": MS,
        "first_byte_ms": MS,
        "ended_ms": MS,
        "bytes_in": 100,
        "bytes_out": 4000,
    }
    return UsageRecord(id=id_, **{**fields, **given})


def request(
    number: int, outcome: Any, sent: float, produced: int, *, whole: bool, **given: Any
) -> tuple[Call, Attempt]:
    asked = Order(number, 40, 10.0, "every", cached=7, reasoning=10)
    call = Call(asked, "research", "k", "small", True, None, Life(number), sent, most=100, id=f"req_{number}")
    call.outcome, call.status, call.ended, call.received = outcome, 200, sent + 10.0, produced
    for name, value in given.items():
        setattr(call, name, value)
    steps = [(sent + 0.25 * n, n) for n in range(1, produced + 1)]
    return call, Attempt(asked, 25, sent, produced, steps, whole)


EMPTY = dict.fromkeys(COUNTERS, 0)


def evidence(change: Callable[[dict[str, Any]], None] = lambda seen: None) -> Evidence:
    """A sound run of six requests, or what `change` makes of what was seen of it."""
    whole = request(0, "whole", 100.0, 40, whole=True)
    killed = request(1, "cut", 100.0, 38, whole=False)
    killed[0].worker.killed = 113.0
    paused = request(2, "whole", 100.0, 40, whole=True)
    paused[0].worker.pauses.append((104.0, 123.0))
    left = request(3, "left", 100.0, 12, whole=False, received=11)
    early = request(4, "cut", 100.0, 0, whole=False)
    early[0].worker.killed = 100.01
    refused = request(5, "refused", 100.0, 0, whole=False, status=503)
    progress = record("req_2", status="interrupted", ended="gateway", output_tokens=15, reasoning_tokens=10)
    rest = {**EMPTY, "output_tokens": 25, "cost_microusd": 10}
    seen: dict[str, Any] = {
        "calls": [call for call, _ in (whole, killed, paused, left, early, refused)],
        "attempts": {call.id: [attempt] for call, attempt in (whole, killed, paused, left)},
        "records": [
            record("req_0"),
            record("req_1", status="interrupted", ended="gateway", output_tokens=30, cost_microusd=18),
            msgspec.structs.replace(progress, cost_microusd=12),
            record("req_2" + CORRECTION, status="correction", **rest),
            record("req_3", ended="client", output_tokens=12, cost_microusd=11),
            record("req_4", **EMPTY | {"status": "interrupted", "ended": "gateway", "requests": 1, "input_tokens": 30}),
            record("req_5", **EMPTY | {"ended": "gateway", "http_status": 503}),
        ],
        "quiet": 17.0,
    }
    change(seen)
    rows = [Row(f"{MS}-{n}", MS, one) for n, one in enumerate(seen.pop("records"))]
    sums: Sums = {}
    for row in rows:
        for grain in GRAINS:
            numbers = {"hour": HOUR, "day": DAY, "month": MONTH}
            groups = sums.setdefault((row.record.organisation, grain, numbers[grain]), {})
            held = groups.setdefault(group_of(row.record), [0] * 6)
            groups[group_of(row.record)] = [a + getattr(row.record, n) for a, n in zip(held, COUNTERS, strict=True)]
    exported = [{"entry": row.entry, "written_ms": MS, **msgspec.to_builtins(row.record)} for row in rows]
    used = {name: sum(getattr(row.record, name) for row in rows) for name in COUNTERS}
    limits = {
        "month-requests": {"used": used["requests"], "reserved": 0},
        "month-tokens": {"used": used["input_tokens"] + used["output_tokens"], "reserved": 0},
        "month-usd": {"used": used["cost_microusd"], "reserved": 0},
        "seats": {"used": 0, "reserved": 0},
    }
    found = {"rows": rows, "sums": sums, "exported": exported, "limits": {"research": limits}}
    late = seen.pop("late", lambda found: None)
    late(found)
    return Evidence(**{**found, **seen})


def failing(of: Evidence) -> list[str]:
    return [verdict.name[:2] for verdict in judge(of) if verdict.wrong]


def test_nothing_is_wrong_with_a_sound_run() -> None:
    assert [verdict.wrong for verdict in judge(evidence())] == [[]] * 9


def row_of(seen: dict[str, Any], place: int, **given: Any) -> None:
    seen["records"][place] = msgspec.structs.replace(seen["records"][place], **given)


def twice(seen: dict[str, Any]) -> None:
    seen["records"].append(seen["records"][0])


def unsettled(seen: dict[str, Any]) -> None:
    """The paused request without its correction: whole for its caller, and a part of it in the ledger."""
    del seen["records"][3]


def dropped(seen: dict[str, Any]) -> None:
    """A request was complete, and its row is gone; so is the hash of its sums, and its line."""
    del seen["records"][0]


def correction(seen: dict[str, Any]) -> None:
    """One where there is nothing to correct."""
    seen["records"].append(record("req_0" + CORRECTION, **EMPTY | {"status": "correction"}))


def late(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda seen: seen.update(late=change)


def sums_grow(found: dict[str, Any]) -> None:
    groups = found["sums"]["acme", "day", DAY]
    name = next(iter(groups))
    groups[name] = [groups[name][0] + 1, *groups[name][1:]]


def group_without_rows(found: dict[str, Any]) -> None:
    found["sums"]["acme", "hour", HOUR - 1] = {'["research","k","","small","demo"]': [1, 0, 0, 0, 0, 0]}


def limit(name: str, what: str, by: int) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        found["limits"]["research"][name][what] += by

    return late(change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda seen: seen.update(left="spools 1"), ["V0"]),
        (lambda seen: seen.update(by_itself=["worker-3 with 1"]), ["V0"]),
        (lambda seen: setattr(seen["calls"][3], "outcome", "hung"), ["V0"]),
        (twice, ["V1", "V3"]),
        (correction, ["V1"]),
        (dropped, ["V1", "V4"]),
        (lambda seen: seen["records"].pop(1), ["V1"]),
        (lambda seen: row_of(seen, 1, status="correction"), ["V1", "V5"]),
        (lambda seen: row_of(seen, 6, requests=1), ["V2"]),
        (lambda seen: row_of(seen, 6, output_tokens=1), ["V2"]),
        (lambda seen: row_of(seen, 5, output_tokens=1), ["V2"]),
        (unsettled, ["V3"]),
        (lambda seen: row_of(seen, 0, output_tokens=39), ["V3"]),
        (lambda seen: row_of(seen, 0, input_tokens=26), ["V3"]),
        (lambda seen: row_of(seen, 0, cached_tokens=0), ["V3"]),
        (lambda seen: row_of(seen, 0, cost_microusd=23), ["V3"]),
        (lambda seen: row_of(seen, 0, ended="client"), ["V3"]),
        (lambda seen: row_of(seen, 0, team="support"), ["V3"]),
        (lambda seen: row_of(seen, 0, key="another"), ["V3"]),
        (lambda seen: row_of(seen, 3, requests=1), ["V3"]),
        (lambda seen: row_of(seen, 1, output_tokens=23, cost_microusd=16), ["V5"]),  # 24 had left seven seconds before
        (lambda seen: row_of(seen, 1, output_tokens=24, cost_microusd=16), []),
        (lambda seen: row_of(seen, 1, output_tokens=39, cost_microusd=22), ["V5"]),
        (lambda seen: row_of(seen, 1, input_tokens=24, cost_microusd=18), ["V5"]),
        (lambda seen: row_of(seen, 1, cost_microusd=19), ["V5"]),
        (lambda seen: row_of(seen, 1, input_source="counted", input_tokens=1000, cost_microusd=213), ["V5"]),
        (lambda seen: row_of(seen, 1, input_source="counted", input_tokens=30, cost_microusd=19), []),
        (lambda seen: setattr(seen["attempts"]["req_3"][0], "whole", True), []),
        (lambda seen: row_of(seen, 1, requests=0), ["V5"]),
        (lambda seen: row_of(seen, 4, output_tokens=10), ["V5"]),
        (lambda seen: row_of(seen, 4, ended="complete"), ["V5"]),
        (late(sums_grow), ["V6"]),
        (late(group_without_rows), ["V6"]),
        (lambda seen: seen.update(differences=["hour 7"]), ["V6"]),
        (late(lambda found: found["exported"].pop(2)), ["V7"]),
        (late(lambda found: found["exported"][2].update(output_tokens=1)), ["V7"]),
        (late(lambda found: found["exported"].append({"id": "req_9"})), ["V7"]),
        (late(lambda found: found["exported"].append({**found["exported"][0]})), []),
        (late(lambda found: found["exported"].append({"id": None, "torn": 9})), []),
        (lambda seen: seen.update(exported=None), []),
        (limit("month-requests", "used", 4), ["V8"]),  # three have rows that were swept
        (limit("month-requests", "used", 3), []),
        (limit("month-tokens", "used", -301), ["V8"]),
        (limit("month-tokens", "used", -300), []),
        (limit("month-usd", "used", 4501), ["V8"]),
        (limit("month-usd", "reserved", 1), ["V8"]),
        (limit("seats", "used", 1), ["V8"]),
    ],
)
def test_the_judge_finds_what_is_wrong_and_nothing_else(
    change: Callable[[dict[str, Any]], None], expected: list[str]
) -> None:
    assert failing(evidence(change)) == expected


KILLED = 130.0


@pytest.mark.parametrize(
    ("outages", "pauses", "sent", "expected"),
    [
        ([], [], 100.0, 123.0),  # a renewal every 5 s, and 2 s for it
        ([], [], 117.9, 123.0),
        ([], [], 118.1, 0.0),  # it was too young for one
        ([(124.0, 125.0)], [], 100.0, 117.0),  # in the last seven seconds the store was away, and 2 s to come back
        ([(120.0, 121.0)], [], 100.0, 123.0),
        ([(120.0, 121.5)], [], 100.0, 113.0),
        ([(115.0, 116.0), (124.0, 125.0)], [], 100.0, 108.0),
        ([(115.0, 116.0), (124.0, 125.0)], [], 104.0, 0.0),
        ([], [(122.0, 124.0)], 100.0, 115.0),
        ([], [(108.0, 119.0)], 90.0, 101.0),  # it may have lapsed when its worker was paused
        ([], [(108.0, 119.0)], 100.0, 0.0),
        ([(131.0, 140.0)], [], 100.0, 123.0),
    ],
)
def test_progress_was_surely_told_before_the_last_long_calm(
    outages: list[tuple[float, float]], pauses: list[tuple[float, float]], sent: float, expected: float
) -> None:
    call, _ = request(0, "cut", sent, 0, whole=False)
    call.worker.killed, call.worker.pauses = KILLED, pauses
    assert told_last(Evidence([call], outages=outages), call) == expected


def test_a_month_ends_with_its_last_millisecond() -> None:
    midnight = 1_793_491_200_000  # 2026-11-01
    assert number_of("month", midnight) == MONTH
    assert number_of("month", midnight - 1) == MONTH - 1
    assert [number_of("day", midnight - 1), number_of("hour", midnight)] == [20_757, 20_758 * 24]


# — the callers and the backend


async def asked(*steps: Any, leaves: float | None = None) -> Call:
    call = Call(Order(0, 3, 0.1, "finish"), "research", "k", "small", True, leaves, Life(0), 0.0)
    path, body = body_of(call, random.Random(0))
    async with Backend(*steps) as backend:
        await ask(call, backend.port, "key", path, body)
    return call


async def soon(peer: Peer) -> None:
    await asyncio.sleep(0.1)


HEAD = b"x-gateway-request-id: req_1\r\n"
STREAM = EVENTS.replace(b"content-type", HEAD + b"content-type")
EVENT = chunk(b'data: {"choices":[{"text":" w","finish_reason":null}]}\n\n')


@pytest.mark.parametrize(
    ("steps", "outcome", "received"),
    [
        ((STREAM, EVENT * 2, chunk(DONE) + END, Peer.close), "whole", 2),
        ((STREAM, EVENT[:45], soon, EVENT[45:] + chunk(DONE) + END[:2], soon, END[2:], Peer.close), "whole", 1),
        ((STREAM, EVENT * 2, chunk(DONE), Peer.close), "cut", 2),
        ((STREAM, EVENT * 2, END, Peer.close), "cut", 2),
        ((STREAM, EVENT, Peer.reset), "cut", 1),
        ((STREAM[:30], Peer.close), "cut", 0),
        ((ok(b"{}", HEAD.strip()), Peer.close), "whole", 0),
        ((ok(b"{}", HEAD.strip())[:-1], Peer.close), "cut", 0),
        ((ok(b"{}", HEAD.strip()).replace(b"200 OK", b"503 No"), Peer.close), "refused", 0),
    ],
)
async def test_a_caller_has_all_of_an_answer_only_with_its_end(steps: Any, outcome: str, received: int) -> None:
    call = await asked(Peer.request, *steps)
    assert (call.outcome, call.received) == (outcome, received)


async def test_a_caller_leaves_in_time_and_one_who_stays_is_not_left_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    left = await asked(Peer.request, STREAM, EVENT, leaves=0.4)
    assert (left.outcome, left.id, left.received) == ("left", "req_1", 1)
    monkeypatch.setattr(ledger, "_PATIENCE", 0.4)
    assert (await asked(Peer.request, STREAM, EVENT)).outcome == "hung"


async def test_a_caller_who_found_nobody_has_sent_nothing() -> None:
    async with Backend() as backend:
        port = backend.port
    call = Call(Order(0, 3, 0.1, "finish"), "research", "k", "small", True, None, Life(0), 0.0)
    await ask(call, port, "key", "completions", b"{}")
    assert (call.outcome, call.status) == ("unsent", 0)


async def test_what_has_left_the_backend_is_known_for_each_instant() -> None:
    attempt = Attempt(Order(0, 9, 1.0, "every"), 5, 10.0, 9, [(11.0, 3), (12.0, 9)])
    assert [attempt.surely(at) for at in (0.0, 10.9, 11.0, 11.9, 12.0, 99.0)] == [0, 0, 3, 3, 9, 9]


def test_orders_are_of_every_kind_and_the_same_for_a_seed() -> None:
    orders = [order(random.Random(f"{seed}"), seed) for seed in range(300)]
    assert orders == [order(random.Random(f"{seed}"), seed) for seed in range(300)]
    assert {one.usage for one in orders} == {"every", "finish"}
    assert min(one.seconds for one in orders) < 0.1
    assert max(one.seconds for one in orders) > 12
    assert sum(one.fails for one in orders) > 0
    assert len({one.cached for one in orders}) == 2

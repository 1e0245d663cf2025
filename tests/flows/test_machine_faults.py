"""What a machine does to the gateways on it, by the numbers of the fault matrix: its disk (G9) and its clock (G10)."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.ledger import reconcile, rows
from tests.flows.test_process_faults import FAKETIME
from tests.flows.test_store_faults import Kept, kept
from tests.flows.test_ten_sentences import BODY, STREAM, plan
from tests.proving.backend import END, Backend, completion, forever
from tests.proving.house import Caller, House, documents, gateway
from tests.proving.limits import until as soon
from tests.proving.load import Read, read
from tests.proving.stores import full, small_disk
from tests.proving.town import WHOLE, Town, gated, town, until
from tests.proving.workers import _keys
from tests.test_spool import watched

COUNTED = {"name": "counted", "count": "requests", "quota": "1000/month", "per": ["team"]}
DEADLINE = "2"  # of the store, in seconds: it refuses connections at once


def code(answer: Read) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["error"]["code"]


# — G9: a disk without room


TEAMS = {"research": "local", "support": "open", "audit": "closed"}


@pytest.fixture
def store() -> Iterator[Kept]:
    with kept() as one:
        one.start()
        yield one


async def told(of: Town, **expected: float) -> None:
    """Until the control plane tells these figures."""
    names, found = [f"gateway_{name}" for name in expected], list[float]()
    try:
        async with asyncio.timeout(10):
            while found != [*expected.values()]:
                found = await of.figures(*names)
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{found}, expected {expected}") from None


async def test_g09_on_a_full_disk_who_is_billed_is_refused_the_alert_is_told_and_no_row_is_lost(store: Kept) -> None:
    """By policy: who is open is served all the same. A stream that is under way ends, and is settled from memory."""
    policies = {
        "plans": {name: {"limits": [{**COUNTED, "when_store_fails": mode}]} for name, mode in TEAMS.items()},
        "teams": {name: {"organisation": "acme", "plan": name} for name in TEAMS},
    }
    keys, go = await _keys(store.url, TEAMS), asyncio.Event()
    with small_disk() as disk:
        slow, given = gated(go, only=b"wait"), {"GATEWAY_STATE": str(disk), "GATEWAY_STORE_DEADLINE": DEADLINE}
        async with town(store.url, slow, workers=1, policies=policies, **given) as of:
            billed, free, closed = (keys[name] for name in TEAMS)
            (stream,) = await of.opened(1, prompt="wait")
            store.here.kill()
            assert [(await of.ask(key)).status for key in (billed, free)] == [200, 200]
            await told(of, store_up=0, spool_takes=1, spool_files=1)
            with full(disk):
                async with asyncio.timeout(10):  # there is room in the block that was begun
                    while (refused := await of.ask(billed)).status == 200:
                        pass
                before = len(of.asked)
                assert code(refused) == (503, "store_unavailable")
                assert b"what is used cannot be written down now" in refused.body
                assert [(await of.ask(key)).status for key in (billed, free, closed)] == [503, 200, 503]
                assert len(of.asked) == before + 1, "the others are refused before the backend is asked"
                go.set()
                assert (await read(stream)).body.endswith(WHOLE)
                await told(of, spool_takes=0, spool_files=1)
                assert (
                    "the spool cannot be written: the folder of the spool cannot be written: No space left on device"
                    in (await of.reasons())
                )
                await asyncio.to_thread(store.start)
                await told(of, store_up=1, spool_takes=0)
                assert (await of.ask(billed)).status == 200, "who has a store needs no disk"
                await _settled(of)
            await told(of, store_up=1, spool_takes=1, spool_files=0, spool_bytes=0)
            assert await of.reasons() == []
            assert await of.ledger() == [("settled", "complete", 4)] * len(of.asked)
            assert (await reconcile(of.store, "acme")).differences == []
            await until(lambda: len(of.gateway.lines("spool_takes_nothing", "spool_takes_again")) == 2)


async def _settled(of: Town) -> None:
    """Until each that was asked for has its row."""
    async with asyncio.timeout(10):
        while len(await of.ledger()) < len(of.asked):
            await asyncio.sleep(0.05)


# — G9: a disk that is slow, or fails


@dataclass
class Cut:
    """A gateway without its store, and a key."""

    house: House
    key: str
    backend: Backend

    async def asks(self) -> int:
        async with self.house.caller(self.key, BODY) as caller:
            return (await read(caller.reader)).status


@asynccontextmanager
async def cut_off(store: Kept) -> AsyncIterator[Cut]:
    async with Backend(forever(completion(3))) as backend:
        policies = documents([backend.url], plans=plan(COUNTED))
        async with gateway(store.url, policies, store_deadline=float(DEADLINE)) as house:
            it = Cut(house, await house.key(), backend)
            store.here.kill()
            await soon(lambda: house.gateway.store.away)
            yield it
            await asyncio.to_thread(store.start)
            await house.settled()
            found = [row.record.id async for row in rows(house.gateway.store, "acme")]
            assert len(set(found)) == len(found) == len(backend.served), "each has its row"


async def test_g09_a_slow_disk_holds_up_the_end_of_an_answer_and_nothing_else(
    store: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an fsync does not return, answers begin and go on. What an end waits for is that its usage is safe."""
    async with cut_off(store) as it:
        with watched(monkeypatch) as seen:
            seen.gate.clear()
            try:
                async with it.house.caller(it.key, STREAM) as first, it.house.caller(it.key, STREAM) as second:
                    await tokens(first)
                    await seen.begun()  # its end is being written down
                    await tokens(second)
                    ends = [asyncio.ensure_future(caller.reader.readuntil(END)) for caller in (first, second)]
                    assert (await asyncio.wait(ends, timeout=0.3))[0] == set()
                    seen.gate.set()
                    await asyncio.gather(*ends)
            finally:
                seen.gate.set()


async def tokens(caller: Caller) -> None:
    """Until all three of a stream have come, within a second."""
    async with asyncio.timeout(1):
        for _ in range(3):
            await caller.reader.readuntil(b'"text":" word"')


@pytest.mark.parametrize("fails", [(1,), (1, 2)], ids=["once", "twice"])
async def test_g09_what_a_disk_fails_to_keep_is_written_again_or_told_and_is_in_the_ledger(
    store: Kept, monkeypatch: pytest.MonkeyPatch, fails: tuple[int, ...]
) -> None:
    """EIO of an fsync: the kernel has thrown away what it could not write, and the next fsync succeeds without it."""
    async with cut_off(store) as it:
        with watched(monkeypatch, fails=fails), capture_logs() as lines:
            assert await it.asks() == 200, "it has been served"
            spooled = len(fails) == 1
            assert await it.asks() == (200 if spooled else 503), "nothing more is, where nothing can be written"
            assert len(it.backend.served) == (2 if spooled else 1)
            assert it.house.gateway.unready() == ([] if spooled else [FAILED, NOWHERE])
            await soon(lambda: not it.house.gateway.unready())  # the disk is tried once a second
            assert await it.asks() == 200
        told = Counter(line["event"] for line in lines if line["log_level"] == "error")
        once = {"spool_fsync_failed": 1}
        assert (
            told == once if spooled else {**once, "spool_not_writable": 1, "not_spooled": 1, "spool_takes_nothing": 1}
        )


FAILED = "the spool cannot be written: the folder of the spool cannot be written: Input/output error"
NOWHERE = "what is used can be written down nowhere"


# — G10: a clock that jumps


class Clock:
    """What the processes take for the time that are started with its environment."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self._set(0)

    @property
    def environment(self) -> dict[str, str]:
        faked = {"FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_CACHE_DURATION": "1"}
        return {"LD_PRELOAD": str(FAKETIME), "FAKETIME_DONT_FAKE_MONOTONIC": "1", **faked}

    def _set(self, seconds: float) -> None:
        draft = self._file.with_suffix(".next")  # by a rename: they may read it at any moment
        draft.write_text(f"{seconds:+.0f}\n")
        draft.rename(self._file)

    async def jump(self, of: Town, seconds: float) -> None:
        """To so many seconds from now; returns when it has been seen, and what a worker does every second was done."""
        self._set(seconds)
        async with asyncio.timeout(20):
            while abs(await _date(of) - time.time() - seconds) > 60:
                await asyncio.sleep(0.05)
            before = await _place(of)
            while await _place(of) == before:
                await asyncio.sleep(0.05)


async def _date(of: Town) -> float:
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=20) as client:
        answer = await client.post(f"http://127.0.0.1:{of.gateway.port}/v1/completions")
    return parsedate_to_datetime(answer.headers["date"]).timestamp()


async def _place(of: Town) -> float:
    """Until when its worker has a place among all."""
    ((_, lapses),) = await of.store.call(lambda: of.store.client.zrange("{gateway}:workers", 0, -1, withscores=True))
    return float(lapses)


AN_HOUR = [
    {"name": "requests", "count": "requests", "quota": "11/hour", "per": ["team"]},
    {"name": "tokens", "count": "total_tokens", "quota": "100000/hour", "per": ["team"]},
    {"name": "rolling", "count": "total_tokens", "quota": "100000/hour", "rolling": True, "per": ["team"]},
]
USED = 7  # tokens of each answer: three of the prompt, and four


@pytest.mark.skipif(not FAKETIME.exists(), reason="no libfaketime on this machine (Debian: apt-get install faketime)")
async def test_g10_a_clock_that_jumps_ends_nothing_gives_nothing_away_and_bends_no_row(
    store_url: str, tmp_path: Path
) -> None:
    """An hour ahead, and an hour back, for all processes of a gateway, while streams go on and requests come."""
    await well_within_an_hour()
    clock, go, began = Clock(tmp_path), asyncio.Event(), time.time()
    policies = {"plans": {"free": {"limits": AN_HOUR}}}
    slow = gated(go, only=b"wait")
    async with town(store_url, slow, workers=1, policies=policies, **clock.environment) as of:
        streams = await of.opened(3, prompt="wait")
        assert [(await of.ask()).status for _ in range(2)] == [200, 200]
        for jump, answers in ((AHEAD, 4), (BEHIND, 6)):
            await clock.jump(of, jump)
            assert [(await of.ask()).status for _ in range(2)] == [200, 200]
            assert await used(of) == {"requests": 3 + answers, "tokens": USED * answers, "rolling": USED * answers}
        go.set()
        assert [(await read(stream)).body.endswith(WHOLE) for stream in streams] == [True] * 3
        assert [(await of.ask()).status for _ in range(2)] == [200] * 2, "and two more, of eleven"
        await is_refused_until_the_hour_of_the_store_is_over(of)
        await clock.jump(of, AHEAD)
        await is_refused_until_the_hour_of_the_store_is_over(of)
        assert of.gateway.lines(*LATE) == []
        found = [row async for row in rows(of.store, "acme")]
        assert (await reconcile(of.store, "acme")).differences == []
    assert [(row.record.status, row.record.ended) for row in found] == [("settled", "complete")] * 11
    written = [row.written_ms / 1000 for row in found]
    assert began - 1 < written[0], "they are of the store's time"
    assert written == sorted(written)
    assert written[-1] < time.time() + 1
    came = Counter(round((row.record.received_ms / 1000 - began) / 3600) for row in found)
    assert came == {0: 5, 1: 2, -1: 4}, "when each came is told by the gateway's clock"
    for row in found:
        assert row.record.first_byte_ms is not None
        assert (
            row.record.received_ms <= row.record.first_byte_ms <= row.record.ended_ms < row.record.received_ms + 60_000
        )


AHEAD, BEHIND = 3600, -3600
# What the log has where somebody was taken for dead, or too late.
LATE = ("seats_lapsed", "requests_lapsed", "requests_swept", "interrupted_before", "settled_before", "process_died")


async def well_within_an_hour() -> None:
    """What is counted in the next seconds is counted in one hour."""
    if (left := 3600 - time.time() % 3600) < 20:
        await asyncio.sleep(left)


async def is_refused_until_the_hour_of_the_store_is_over(of: Town) -> None:
    refused = await of.ask()
    assert code(refused) == (429, "insufficient_quota")
    left = int(refused.headers[b"ratelimit"].partition(b"t=")[2].partition(b",")[0])
    assert abs(left - (3600 - time.time() % 3600)) < 20


async def used(of: Town) -> dict[str, int]:
    """What is used of each limit, and not only reserved."""
    return {row["name"]: row["used"] for row in await of.limits()}

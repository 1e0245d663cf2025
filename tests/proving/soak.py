"""A gateway under mixed load for long, and whether it is afterwards as it was before: `python -m tests.proving.soak`.

Callers stream, ask for JSON, leave in the middle, are refused, and meet a backend that fails; policies are reloaded.
First all processes are replaced and get warm, and what they hold when all is quiet is measured; after the rest of the
time it is measured again. Then memory is flat, there are no more files and threads than are kept for a moment, no
process is left over, nothing is under way and nothing is spooled; in the store is no seat, no reservation and no key
but those that belong there or lapse; and sums and limits say what the rows say.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from gateway.embedded import _server_binary
from gateway.ledger import reconcile, rows
from tests.proving import house
from tests.proving.backend import Peer, completion, play
from tests.proving.load import completion_request, read
from tests.proving.processes import all_processes
from tests.proving.town import Town, town

CALLERS = 16
WARM = 0.25  # of the time
FILES = 2 * CALLERS  # more than before: connections that are kept for some seconds
THREADS = 4
GROWTH = 0.03  # of memory, that there may be more
# ms after which the mark of a request is gone: settled, given up, and in the ledger under another attempt.
LAPSES = {b"+": 120_000, b"-": 3_600_000, b"~": 86_400_000}

LIMITS: list[dict[str, Any]] = [
    {"name": "seats", "count": "concurrent_requests", "at_most": 500, "per": ["team"]},
    {"name": "month", "count": "total_tokens", "quota": "1000000000/month", "per": ["team"]},
    {"name": "rolling", "count": "usd", "quota": "1000000/day", "rolling": True, "per": ["key"]},
    {"name": "pace", "count": "requests", "rate": "9000/minute", "burst": 150, "per": ["team"]},  # refuses now and then
]

# The keys that a store may have when all is quiet, beside marks of requests: as many as there are limits and periods.
BELONG = re.compile(
    r"\{acme\}:((quota|rolling|rate):.*|usage|usage:(hour|day|month):\d+|usage:rollup:.*)"
    r"|\{gateway\}:(organisations|workers|probe|drained|pepper|keys|key-changes)"
)


@dataclass(frozen=True)
class Held:
    """What the processes of a gateway have when all is quiet."""

    memory: float  # MiB
    files: int
    threads: int

    def __str__(self) -> str:
        return f"{self.memory:.1f} MiB, {self.files} files, {self.threads} threads"


def family(of: Town) -> list[int]:
    return [*of.children(), *of.children("control"), of.supervisor]


def held(of: Town) -> Held:
    memory, files, threads = 0, 0, 0
    for pid in family(of):
        memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        threads += len(list(Path(f"/proc/{pid}/task").iterdir()))
    return Held(memory * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threads)


async def moody(peer: Peer) -> None:
    """A backend that mostly streams, now and then fails, and now and then ends in the middle."""
    peer.backend.requests.clear()
    peer.backend.served.clear()
    mood = random.random()
    if mood < 0.03:
        await peer.request()
        await peer.close()
    elif mood < 0.06:
        await play(peer, completion(3, cut=Peer.reset))
    else:
        await play(peer, completion(random.randrange(1, 20), pace=0.002))


async def caller(of: Town, over: asyncio.Event, seen: Counter[str]) -> None:
    while not over.is_set():
        stream, leaves = random.random() < 0.8, random.random() < 0.15
        key = of.key if random.random() < 0.95 else "gw_no"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", of.gateway.port)
        except ConnectionError:
            seen["unconnected"] += 1
            continue
        try:
            writer.write(completion_request(key, stream=stream, prompt="x" * random.randrange(1, 4000)))
            if leaves:
                await asyncio.sleep(random.random() * 0.03)
                seen["left"] += 1
            else:
                answer = await read(reader)
                seen[f"{answer.status}" if answer.whole else "cut"] += 1
        except (ConnectionError, ValueError):
            seen["broken"] += 1
        finally:
            writer.transport.abort()


async def load(of: Town, seconds: float, seen: Counter[str]) -> None:
    """So much of it; policies are read anew every five seconds."""
    over, end = asyncio.Event(), time.monotonic() + seconds
    callers = [asyncio.ensure_future(caller(of, over, seen)) for _ in range(CALLERS)]
    while (left := end - time.monotonic()) > 0:
        os.kill(of.supervisor, signal.SIGHUP)
        await asyncio.sleep(min(5.0, left))
    over.set()
    await asyncio.gather(*callers)


async def soak(store_url: str, minutes: float) -> list[str]:
    """What was wrong at the end."""
    seconds, seen = minutes * 60, Counter[str]()
    async with town(store_url, moody, policies={"plans": {"free": {"limits": LIMITS}}}, GATEWAY_DRAIN="10") as of:
        replacing = asyncio.ensure_future(_replaced(of))
        await load(of, seconds * WARM, seen)
        await replacing
        await load(of, seconds * WARM, seen)
        await _quiet(of)
        before, warm = held(of), seen.total()
        await load(of, seconds * (1 - 2 * WARM), seen)
        await _quiet(of)
        after = await _calm(of, before)
        print(f"{minutes:g} minutes: {dict(seen)}\n  {before}; and {seen.total() - warm} requests later {after}")
        return [*_grown(before, after), *_processes(of), *await _figures(of), *await _left(of), *_told(of)]


async def _replaced(of: Town) -> None:
    """All processes are new ones, and the supervisor is new code in its own."""
    os.kill(of.supervisor, signal.SIGUSR2)
    async with asyncio.timeout(60):
        while len(of.gateway.lines("replaced")) < 4:
            await asyncio.sleep(0.1)


async def _quiet(of: Town) -> None:
    """Nothing is under way any more."""
    async with asyncio.timeout(60):
        while await of.store.call(lambda: of.store.client.zcard("{acme}:live")) or await of.figures(*IDLE) != NOTHING:
            await asyncio.sleep(0.1)


IDLE = ("gateway_http_active_requests", "gateway_spool_files")
NOTHING = [0.0, 0.0]


async def _calm(of: Town, before: Held) -> Held:
    """What is held, when connections that are kept for a moment have been closed."""
    end = time.monotonic() + 10
    while (now := held(of)).files > before.files + FILES and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return now


# — what is wrong


def _grown(before: Held, after: Held) -> list[str]:
    allowed = Held(before.memory * (1 + GROWTH), before.files + FILES, before.threads + THREADS)
    return [
        f"{name} grew: {before}, then {after}"
        for name in ("memory", "files", "threads")
        if getattr(after, name) > getattr(allowed, name)
    ]


def _processes(of: Town) -> list[str]:
    """Those in its folder are the supervisor and what it has, and all of them live."""
    folder, known = Path(f"/proc/{of.supervisor}/cwd").resolve(), family(of)
    wrong = [] if len(known) == 4 else [f"{len(known)} processes, expected two workers, a control plane, a supervisor"]
    for pid, stat in all_processes().items():
        if stat.state == "Z" and stat.parent in known:
            wrong.append(f"{pid} has ended, and nobody has heard it")
        with suppress(OSError):  # it has ended meanwhile, or is not for us to look at
            if pid not in known and Path(f"/proc/{pid}/cwd").resolve() == folder:
                wrong.append(f"{pid} is left over")
    return wrong


async def _figures(of: Town) -> list[str]:
    return [
        f"{name} {value:g}, expected 0"
        for name in ("gateway_http_active_requests", "gateway_upstream_in_flight", "gateway_spool_bytes")
        if (value := await of.sum(name))
    ]


async def _left(of: Town) -> list[str]:
    """What is in the store that should not be."""
    wrong = []
    async for key in of.store.client.scan_iter(count=1000):
        name = key.decode()
        if ":seats:" in name:
            wrong += [f"{name} holds seats"] if await of.store.client.zcard(key) else []
        elif ":request:" in name:
            mark, lapses = (await of.store.client.get(key) or b"+")[:1], await of.store.client.pttl(key)
            if mark not in LAPSES:
                wrong.append(f"{name} is a reservation that nobody has")
            elif not -2 <= lapses <= LAPSES[mark] or lapses == -1:  # -2: it has lapsed meanwhile, -1: it never does
                wrong.append(f"{name} is a mark {mark!r} that lapses in {lapses} ms, expected {LAPSES[mark]} at most")
        elif not BELONG.fullmatch(name):
            wrong.append(f"{name} does not belong there")
    found = await reconcile(of.store, "acme")
    print(f"  {found.rows} rows, {len(found.differences)} differences")
    wrong += [f"the sums differ: {one}" for one in found.differences[:3]]
    used = {one["name"]: (one["used"], one["reserved"]) for one in await of.limits()}
    tokens = sum([one.record.input_tokens + one.record.output_tokens async for one in rows(of.store, "acme")])
    if used["month"] != (tokens, 0):
        wrong.append(f"the limit says {used['month']} of tokens used and reserved, the rows {tokens}")
    return wrong + [f"{name} has reserved {held}" for name, (_, held) in used.items() if held]


def _told(of: Town) -> list[str]:
    troubles = [line for line in of.gateway.lines() if line.get("level") in ("error", "critical")]
    return [f"the log has {line}" for line in troubles[:5]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    minutes = parser.parse_args().minutes
    with house.server(_server_binary()) as server:
        wrong = uvloop.run(soak(server.url, minutes))
    for line in wrong:
        print(f"FAILS  {line}")
    print("FAILS" if wrong else "holds  all is as it was before")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

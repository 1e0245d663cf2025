"""A gateway under mixed load for long, and whether it is afterwards as it was before: `python -m tests.proving.soak`.

Callers stream, ask for JSON, leave in the middle, are refused, and meet a backend that fails; policies are reloaded and
workers replaced now and then. When all is quiet: no seat, no live request and no reservation is left in the store but
marks that lapse, no more files are open than connections are kept, memory is flat over the second half, and sums are
those of the rows.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path
from statistics import mean

import uvloop

from gateway.embedded import _server_binary
from gateway.ledger import reconcile
from tests.proving import house
from tests.proving.backend import Peer, completion, play
from tests.proving.load import completion_request, read
from tests.proving.town import Town, town

CALLERS = 16
GROWTH = 0.10  # of the memory of the third quarter, that the last one may have more
FILES = 3 * CALLERS  # more than before: connections to the backend and to the store that two workers keep


def family(of: Town) -> list[int]:
    return [*of.children(), *of.children("control")]


def files(pids: list[int]) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)


def resident(pids: list[int]) -> float:
    """MiB of all of them."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def moody(peer: Peer) -> None:
    """A backend that mostly streams, now and then fails, and now and then ends in the middle."""
    mood = random.random()
    if mood < 0.03:
        await peer.request()
        await peer.close()
    elif mood < 0.06:
        await play(peer, completion(3, cut=Peer.reset))
    else:
        await play(peer, completion(random.randrange(1, 20), pace=0.002))


async def caller(of: Town, over: asyncio.Event, seen: dict[str, int]) -> None:
    while not over.is_set():
        stream, leaves, key = (
            random.random() < 0.8,
            random.random() < 0.15,
            of.key if random.random() < 0.95 else "gw_no",
        )
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
                seen["whole" if answer.whole else "cut"] += 1
        except (ConnectionError, ValueError):
            seen["broken"] += 1
        finally:
            writer.transport.abort()


async def soak(store_url: str, minutes: float) -> list[str]:
    """What was wrong at the end."""
    async with town(store_url, moody, GATEWAY_DRAIN="10") as of:
        await of.ask()
        before, seen = files(family(of)), dict.fromkeys(("whole", "cut", "left", "broken", "unconnected"), 0)
        over, end = asyncio.Event(), time.monotonic() + minutes * 60
        callers = [asyncio.ensure_future(caller(of, over, seen)) for _ in range(CALLERS)]
        memory: list[float] = []
        begun, turn = time.monotonic(), 0
        while time.monotonic() < end:
            await asyncio.sleep(1)
            turn += 1
            if turn % 5 == 0:
                os.kill(of.supervisor, signal.SIGHUP)
            if turn == 10:  # before memory is watched: new processes begin anew
                os.kill(of.supervisor, signal.SIGUSR2)
            if time.monotonic() > begun + (end - begun) / 2:
                memory.append(resident(family(of)))
        over.set()
        await asyncio.gather(*callers)
        quarter = len(memory) // 2
        third, last = mean(memory[:quarter]), mean(memory[quarter:])
        print(
            f"{minutes:g} minutes: {seen}\n  memory of all processes {third:.1f} MiB, then {last:.1f}; files {before}",
            end="",
        )
        wrong = [f"memory grew from {third:.1f} to {last:.1f} MiB"] if last > third * (1 + GROWTH) else []
        await _quiet(of)
        print(f", then {files(family(of))}")
        if files(family(of)) > before + FILES:
            wrong.append(f"{files(family(of))} files are open, {before} were")
        wrong += await _left(of)
        troubles = [line for line in of.gateway.lines() if line.get("level") in ("error", "critical")]
        return wrong + [f"the log has {line}" for line in troubles[:5]]


async def _quiet(of: Town) -> None:
    async with asyncio.timeout(60):
        while await of.store.call(lambda: of.store.client.zcard("{acme}:live")):
            await asyncio.sleep(0.1)


async def _left(of: Town) -> list[str]:
    """What is in the store that should not be."""
    wrong = []
    async for key in of.store.client.scan_iter(match="{acme}:*", count=1000):
        name = key.decode()
        if ":seats:" in name and await of.store.client.zcard(key):
            wrong.append(f"{name} holds seats")
        if ":request:" in name and (await of.store.client.get(key) or b"+")[:1] not in b"+-~":
            wrong.append(f"{name} is a reservation that nobody has")
    found = await reconcile(of.store, "acme")
    print(f"  {found.rows} rows, {len(found.differences)} differences")
    return wrong + [f"the sums differ: {one}" for one in found.differences[:3]]


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

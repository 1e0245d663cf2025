"""A load of our own: callers that ask, read the whole answer, and ask again.

`python -m tests.bench.load PORT KEY CALLERS SECONDS` prints one JSON line: answers, errors, seconds, latency
percentiles in milliseconds. `… stream` opens CALLERS streams once and reads each to its end: events and streams.
`… burst` asks for SECONDS for streams whose events come all at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from statistics import quantiles
from typing import cast

import uvloop

MODEL = "accounts/fireworks/models/llama-v2-7b"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


def request(key: str, kind: str) -> bytes:
    """A request as an SDK sends it."""
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 64, "stream": kind != "json"}
    body = json.dumps({**asked, "user": "burst"} if kind == "burst" else asked).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        b"content-type: application/json\r\nuser-agent: OpenAI/Python 3.54.0\r\nx-stainless-lang: python\r\n"
        b"x-stainless-retry-count: 0\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
    )
    return head % (key.encode(), len(body)) + body


class Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.received = 0
        self.expected = -1
        self.tail = b""
        self.done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.received, self.expected, self.tail = 0, -1, b""
        self.asked = time.perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        if self.expected == -1:
            end = data.find(b"\r\n\r\n")  # heads are small, and come whole on the loopback
            head = data[:end].lower()
            self.load.errors += not head.startswith(b"http/1.1 200")
            at = head.find(b"content-length:")
            self.expected = -2 if at < 0 else end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        self.received += len(data)
        if self.expected == -2:
            self.load.events += data.count(b'"usage":null')
            self.tail = (self.tail + data)[-7:]
            if not self.tail.endswith(b"\r\n0\r\n\r\n"):
                return
        elif self.received < self.expected:
            return
        self.load.answered(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done:
            self.load.errors += 1
            self.load.leave(self)


class Load:
    """What the callers share."""

    def __init__(self, key: str, seconds: float, kind: str) -> None:
        self.request = request(key, kind)
        self.until = time.perf_counter() + seconds
        self.once = kind == "stream"
        self.errors = self.events = 0
        self.times: list[float] = []
        self.callers = 0
        self.ended = asyncio.Event()

    def answered(self, caller: Caller) -> None:
        now = time.perf_counter()
        self.times.append(now - caller.asked)
        if self.once or now > self.until:
            caller.transport.close()
            self.leave(caller)
        else:
            caller.ask()

    def leave(self, caller: Caller) -> None:
        caller.done = True
        self.callers -= 1
        if self.callers == 0:
            self.ended.set()


async def main(port: int, key: str, callers: int, seconds: float, kind: str) -> None:
    """Run the load and print what was seen."""
    load = Load(key, seconds, kind)
    load.callers = callers
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    for i in range(callers):
        await loop.create_connection(lambda: Caller(load), "127.0.0.1", port)
        if load.once and i % 50 == 49:
            await asyncio.sleep(0.05)
    await load.ended.wait()
    cuts = quantiles(load.times, n=100) if len(load.times) > 1 else load.times * 99
    print(
        json.dumps(
            {
                "answers": len(load.times),
                "errors": load.errors,
                "events": load.events,
                "seconds": time.perf_counter() - started,
                "p50_ms": cuts[49] * 1000,
                "p99_ms": cuts[98] * 1000,
            }
        )
    )


if __name__ == "__main__":
    port, key, callers, seconds, *words = sys.argv[1:]
    uvloop.run(main(int(port), key, int(callers), float(seconds), *words or ["json"]))

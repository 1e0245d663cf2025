"""What it costs to check a request, beside what it costs to parse it: `python -m tests.bench.contract`.

The standard library's json.loads is the measure, in turns in the same run; a body over 256 KiB is looked at beside the
event loop, and the last column is how late a timer of that loop was meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from gateway import contract

IMAGE = "data:image/jpeg;base64," + "/9j4AAQSkZJRgABAQAAAQABAAD2wBD" * (4 * 1024 * 1024 // 30)
MEMBERS: dict[str, Any] = {
    "model": "accounts/fireworks/models/llama-v2-7b",
    "max_tokens": 256,
    "temperature": 0.7,
    "top_p": 1,
    "top_k": 50,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "n": 1,
    "stop": ["\n\n"],
    "stream": True,
    "user": "user-17",
    "seed": 7,
    "metadata": {"job": "7"},
    "response_format": {"type": "json_object"},
}
CHAT = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}
BODIES = {
    "completions, 2 KiB": ("completions", {**MEMBERS, "prompt": "The sky is blue. " * 105}),
    "completions, an image of 4 MiB": ("completions", {**MEMBERS, "prompt": "<image> What is it?", "images": [IMAGE]}),
    "chat, an image of 4 MiB": ("chat/completions", {**MEMBERS, "messages": [CHAT]}),
}
ROUNDS = 31


HEAD = ("requests checked", "check µs", "json.loads µs", "ratio", "the loop was late, ms")


def rows() -> list[tuple[str, ...]]:
    """A row for each body: its check and its parse in µs, their ratio, and how late the event loop was in ms."""
    found: list[tuple[str, ...]] = []
    for name, (endpoint, members) in BODIES.items():
        body = json.dumps(members, separators=(",", ":")).encode()  # as the SDKs write it
        times = 200 if len(body) < 10_000 else 1

        def check(body: bytes = body, endpoint: str = endpoint) -> object:
            given = contract.take_apart(body)
            values, problems = contract.check(endpoint, given, profile="2026", strict=True)
            assert not problems
            return values

        pairs = [
            (_seconds(check, times), _seconds(lambda body=body: json.loads(body), times))  # type: ignore[misc]
            for _ in range(ROUNDS)
        ]
        checked, parsed = (median(one) * 1e6 for one in zip(*pairs, strict=True))
        ratio = median(one / other for one, other in pairs)
        late = "" if times > 1 else f"{median(asyncio.run(_lateness(check)) for _ in range(ROUNDS)) * 1e3:.1f}"
        found.append((name, f"{checked:,.0f}", f"{parsed:,.0f}", f"{ratio:.2f}", late))
    return found


def _seconds(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


async def _lateness(work: Callable[[], object]) -> float:
    """The longest time in seconds that a loop which turns all the time stood still while a thread did the work."""
    worker = asyncio.ensure_future(asyncio.to_thread(work))
    longest, before = 0.0, time.perf_counter()
    while not worker.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    await worker
    return longest


if __name__ == "__main__":
    for row in (HEAD, *rows()):
        print("| " + " | ".join(row) + " |")

"""An open-loop load: requests start when they are due, whatever the answers do.

A closed loop asks again when it has its answer, and so asks less of a server that is slow: coordinated omission. Here
the schedule is made before, and a latency is the time from the intended start to the last byte: what a late client
adds counts, and a stall counts for all who came during it.

    result = await fire(url, request, fixed(rate=300, seconds=2))
    result.statuses[200], result.percentile(99)
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.proving.house import MODEL

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def fixed(rate: float, seconds: float) -> list[float]:
    """So many starts a second, evenly: seconds since the begin."""
    return [i / rate for i in range(round(rate * seconds))]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Starts as callers make them who know nothing of each other: so many a second on average."""
    chance, at, starts = random.Random(seed), 0.0, []
    while (at := at + chance.expovariate(rate)) < seconds:
        starts.append(at)
    return starts


def completion_request(key: str, **given: object) -> bytes:
    """A request to the gateway, as bytes."""
    body = json.dumps({"model": MODEL, "prompt": "The sky is", "max_tokens": 4, **given}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    return head % (key.encode(), len(body)) + body


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a load. Times are seconds; a latency belongs to a request that was answered whole."""

    begun: tuple[float, ...]  # when each request was due, since the first instant
    statuses: Counter[int]
    errors: Counter[str]  # by kind: the name of the exception, or "cut"
    latencies: tuple[float, ...]  # sorted
    late: float  # the most that the client itself was behind its schedule

    def percentile(self, percent: float) -> float:
        """The latency that so many percent do not exceed (nearest rank); NaN where nothing was answered."""
        if not self.latencies:
            return math.nan
        return self.latencies[max(0, math.ceil(len(self.latencies) * percent / 100) - 1)]


async def fire(url: str, request: bytes, starts: Sequence[float], *, patience: float = 30.0) -> Result:
    """Send the request at each of these times, over connections that are kept alive; wait for every answer."""
    loop = asyncio.get_running_loop()
    address = urlsplit(url)
    free: list[Connection] = []
    statuses: Counter[int] = Counter()
    errors: Counter[str] = Counter()
    latencies: list[float] = []

    async def shoot(due: float) -> None:
        try:
            async with asyncio.timeout(patience):
                reader, writer = free.pop() if free else await asyncio.open_connection(address.hostname, address.port)
                try:
                    writer.write(request)
                    answer = await read(reader)
                except BaseException:
                    writer.transport.abort()
                    raise
        except (OSError, ValueError, TimeoutError) as error:
            errors[type(error).__name__] += 1
            return
        if answer.whole:
            statuses[answer.status] += 1
            latencies.append(loop.time() - due)
        else:
            errors["cut"] += 1
        if answer.reusable:
            free.append((reader, writer))
        else:
            writer.transport.abort()

    began, late = loop.time(), 0.0
    async with asyncio.TaskGroup() as shots:
        for start in starts:
            due = began + start
            await asyncio.sleep(due - loop.time())
            late = max(late, loop.time() - due)
            shots.create_task(shoot(due))
    for _, writer in free:
        writer.transport.abort()
    return Result(tuple(starts), statuses, errors, tuple(sorted(latencies)), late)


# — an answer, read strictly


@dataclass(frozen=True, slots=True)
class Read:
    """One answer. `whole`: its end has come; of chunks that is the last chunk, never the end of the connection."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes
    whole: bool

    @property
    def reusable(self) -> bool:
        return self.whole and self.headers.get(b"connection", b"").lower() != b"close"


async def read(reader: asyncio.StreamReader) -> Read:
    """The next answer of a connection. Raises ValueError for what is not HTTP/1.1, ConnectionError before a head.

    Of an answer that is cut by FIN or RST it returns what had come.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as over:
        raise ConnectionResetError(f"ended after {len(over.partial)} bytes of a head") from None
    line, *fields = head[:-4].split(b"\r\n")
    version, _, rest = line.partition(b" ")
    if version != b"HTTP/1.1" or not rest[:3].isdigit():
        raise ValueError(f"no status line: {line!r}")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(b":") for field in fields)}
    pieces: list[bytes] = []
    whole = True
    try:
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            await _chunks(reader, pieces)
        elif b"content-length" in headers:
            await _exactly(reader, int(headers[b"content-length"]), pieces)
        else:
            raise ValueError("neither a length nor chunks")
    except ConnectionError:
        whole = False
    return Read(int(rest[:3]), headers, b"".join(pieces), whole)


async def _exactly(reader: asyncio.StreamReader, count: int, pieces: list[bytes]) -> None:
    """So many bytes, piece by piece; ConnectionError where the line ends before."""
    while count:
        piece = await reader.read(count)
        if not piece:
            raise ConnectionResetError
        pieces.append(piece)
        count -= len(piece)


async def _chunks(reader: asyncio.StreamReader, pieces: list[bytes]) -> None:
    """Chunks up to the last one (RFC 9112 section 7.1), which alone ends them."""
    while size := await _size(reader):
        await _exactly(reader, size, pieces)
        await _line_end(reader)
    await _line_end(reader)


async def _size(reader: asyncio.StreamReader) -> int:
    try:
        line = await reader.readuntil(b"\r\n")
    except asyncio.IncompleteReadError:
        raise ConnectionResetError from None
    if not line[:-2].isalnum():
        raise ValueError(f"no size of a chunk: {line!r}")
    return int(line, 16)


async def _line_end(reader: asyncio.StreamReader) -> None:
    end: list[bytes] = []
    await _exactly(reader, 2, end)
    if b"".join(end) != b"\r\n":
        raise ValueError(f"no line end after a chunk: {end!r}")

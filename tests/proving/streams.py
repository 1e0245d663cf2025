"""Random streams through a whole gateway: whole ones arrive to the byte, and cut ones never look complete.

`python -m tests.proving.streams --streams 10000` sends so many whole streams and as many that are cut at a random byte
of the answer, head included, by FIN or by RST. It prints its seed, and exits with 1 if any was not as it must be.

A stream is a function of the seed and its number: `--seed S --only N` plays one again.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog
import uvloop

from gateway.embedded import _server_binary
from tests.proving import house
from tests.proving.backend import DONE, END, Backend, Peer, Step, chunk
from tests.proving.load import Read, completion_request, read

# A lone upstream whose streams are cut by half is meant to be asked all the same.
POOL = {"health": {"failures": 1_000_000, "connect_failures": 1_000_000, "error_rate": "100%"}}

_LARGE = 4 << 20  # bytes of one event, in one stream of a hundred
_TEXT = "the quick brown fox, ein Gürteltier, 素早い茶色の狐, быстрая лиса, 🦊🦊"
_ENDS = (b"\n", b"\r\n", b"\r")


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer: the bytes that its caller must see, and how they are sent."""

    head: bytes
    body: bytes
    sent: bytes  # the body in its framing
    encoded: bool
    pieces: tuple[int, ...]  # sizes in which the backend writes, the last one again and again
    cut: int | None  # after so many bytes of head and body, None: whole
    by: str  # "FIN" or "RST"

    @property
    def kind(self) -> str:
        return f"{'length' if b'content-length' in self.head else 'chunked'}, {self.by if self.cut is not None else ''}"


def stream(seed: int, number: int, *, cut: bool) -> Stream:
    """The stream of this number."""
    dice = random.Random(f"{seed} {number} {cut}")
    large = number % 100 == 7
    body = b"".join(_events(dice, large))
    encoded = dice.random() < 0.2
    if encoded:
        body = gzip.compress(body, compresslevel=1, mtime=0)
    chunked = dice.random() < 0.75
    fields = [b"HTTP/1.1 200 OK", b"content-type: text/event-stream"]
    fields += [b"content-encoding: gzip"] * encoded
    fields += [b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(body), b"", b""]
    head = b"\r\n".join(fields)
    sent = b"".join((*_chunks(dice, body), END)) if chunked else body
    sizes = (1, 2, 3, 7, 100, 1000, 1 << 16)
    pieces = (*dice.choices(sizes, k=dice.randrange(1, 12)), 1 << 20 if large else dice.choice((1000, 1 << 16)))
    whole = len(head) + len(sent)
    places = dice.randrange(whole), dice.randrange(whole), max(0, whole - 40), dice.randrange(len(head))
    place = min(whole - 1, dice.choice(places) + dice.randrange(40))  # the end of an answer is where it matters most
    return Stream(head, body, sent, encoded, pieces, place if cut else None, dice.choice(("FIN", "RST")))


def _events(dice: random.Random, large: bool) -> Iterable[bytes]:
    """Events as backends and proxies write them: any line end, comments, names, no data at all, a BOM."""
    end = dice.choice(_ENDS)
    if dice.random() < 0.1:
        yield b"\xef\xbb\xbf"
    for i in range(dice.randrange(1, 30)):
        if dice.random() < 0.1:
            end = dice.choice(_ENDS)
        if dice.random() < 0.15:
            yield b": " + dice.choice((b"keep-alive", b"OPENROUTER PROCESSING", b"")) + end
        if dice.random() < 0.1:
            yield b"event: ping" + end
        text = _TEXT[dice.randrange(len(_TEXT)) :] if not (large and i == 0) else "x🦊" * (_LARGE // 5)
        document = json.dumps(
            {"choices": [{"index": 0, "text": text}], "usage": None}, ensure_ascii=dice.random() < 0.5
        )
        yield b"data: " + document.encode() + end + end
    if dice.random() < 0.8:
        yield b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}}' + end + end
    if dice.random() < 0.8:
        yield DONE


def _chunks(dice: random.Random, body: bytes) -> Iterable[bytes]:
    """The body in chunks of any size: a cut may stand inside a character, a line end or `data:`."""
    at = 0
    for _ in range(dice.randrange(60)):
        size = dice.choice((1, 2, 5, 50, 500, 5000))
        if at + size >= len(body):
            break
        yield chunk(body[at : at + size])
        at += size
    yield chunk(body[at:])


# — the two parties


def backend(seed: int) -> Step:
    """Answers a request with the stream that its prompt names."""

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            number, cut = json.loads(peer.requests.pop().body)["prompt"].split()
            peer.backend.requests.clear()
            answer = stream(seed, int(number), cut=cut == "cut")
            data = (answer.head + answer.sent)[: answer.cut]
            await peer.send(*_pieces(data, answer.pieces))
            if answer.cut is not None:
                await (peer.reset() if answer.by == "RST" else peer.close())
                return

    return serve


def _pieces(data: bytes, sizes: tuple[int, ...]) -> Iterable[bytes]:
    at = 0
    for size in sizes[:-1]:
        yield data[at : at + size]
        at += size
    while at < len(data):
        yield data[at : at + sizes[-1]]
        at += sizes[-1]


class Caller:
    """A caller of the gateway, which keeps its connection where it may."""

    def __init__(self, url: str, key: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._key = key
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, prompt: str) -> Read:
        if self._connection is None:
            self._connection = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._connection
        writer.write(completion_request(self._key, prompt=prompt, stream=True))
        answer = await read(reader)
        if not answer.reusable:
            self.close()
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection[1].transport.abort()
            self._connection = None


# — the proof


def wrong(expected: Stream, got: Read) -> str | None:
    """What is not as it must be with an answer."""
    if expected.cut is None:
        if got.status != 200 or not got.whole:
            return f"status {got.status}, whole: {got.whole}"
        if got.headers.get(b"content-encoding") != (b"gzip" if expected.encoded else None):
            return "another content-encoding"
        return None if got.body == expected.body else f"{len(got.body)} bytes, not the same as {len(expected.body)}"
    if got.status >= 500:
        return None if expected.cut < len(expected.head) or got.status == 502 else f"status {got.status}"
    if got.whole:
        return "looks complete"
    return None if _is_beginning(expected, got.body) else "what came is no beginning of what was sent"


def _is_beginning(expected: Stream, body: bytes) -> bool:
    """Whether all that came was sent, but for the event by which the gateway may say that more is missing."""
    if expected.body.startswith(body):
        return True
    said = body.rfind(b"data: ")
    told = body[said:]
    return (
        not expected.encoded
        and b'"error"' in told
        and told.endswith(b"}\n\n")
        and expected.body.startswith(body[:said])
        and (said == 0 or body[:said].endswith((b"\n\n", b"\r\r", b"\n\r", b"\n\r\n", b"\r\r\n")))
    )


@dataclass
class Verdict:
    """What was seen: how many of each kind, and every failure."""

    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = "; ".join(f"{count} {kind}" for kind, count in sorted(self.seen.items()))
        return f"{'FAILED' if self.failures else 'held'}: {len(self.failures)} wrong of {self.seen.total()} ({kinds})"


async def prove(
    url: str, key: str, numbers: Iterable[int], seed: int, *, at_once: int = 16, say: Callable[[str], None] = print
) -> Verdict:
    """Each number once whole and once cut, so many at a time, through the gateway at `url` with `backend(seed)`."""
    verdict, todo = Verdict(), iter([(number, cut) for number in numbers for cut in (False, True)])

    async def work() -> None:
        caller = Caller(url, key)
        for number, cut in todo:
            expected = stream(seed, number, cut=cut)
            try:
                got = await caller.ask(f"{number} {'cut' if cut else 'whole'}")
                found = wrong(expected, got)
                became = "answered 502" if got.status == 502 else "cut after the status line" if cut else "identical"
            except (ConnectionError, ValueError) as error:
                caller.close()
                found, became = f"{type(error).__name__}: {error}", "lost"
            verdict.seen[f"{became} ({expected.kind})" if cut else became] += 1
            if found is not None:
                verdict.failures.append(f"stream {number}, cut {expected.cut} ({expected.kind}): {found}")
                say(verdict.failures[-1])
            if verdict.seen.total() % 1000 == 0:
                say(f"{verdict.seen.total()} streams, {len(verdict.failures)} wrong")
        caller.close()

    await asyncio.gather(*(work() for _ in range(at_once)))
    return verdict


def documents(url: str) -> dict[str, object]:
    """Policies with one upstream that is asked whatever it did."""
    policies = house.documents([url])
    policies["pools"]["demo"].update(POOL)
    return policies


async def main(numbers: Iterable[int], seed: int, at_once: int) -> int:
    began = time.monotonic()
    print(f"seed {seed}", flush=True)
    with house.server(_server_binary()) as store:
        async with Backend(backend(seed)) as upstream, house.gateway(store.url, documents(upstream.url)) as served:
            verdict = await prove(
                served.url, await served.key(), numbers, seed, at_once=at_once, say=lambda line: print(line, flush=True)
            )
            await served.settled()
    print(f"{verdict}, in {time.monotonic() - began:.0f} s, seed {seed}")
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m tests.proving.streams", description=__doc__.partition("\n")[0])
    options.add_argument("--streams", type=int, default=10_000, help="whole ones, and as many that are cut")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options.add_argument("--only", type=int, help="the number of one stream")
    options.add_argument("--at-once", type=int, default=16)
    given = options.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)  # uvicorn writes a traceback for every line that is cut
    sys.exit(uvloop.run(main(range(given.streams) if given.only is None else [given.only], given.seed, given.at_once)))

"""What a limit of 5,000 tokens a minute lets pass, and what it tells, by the backend's ledger, beside its bound.

`python -m tests.proving.scenes` prints a Markdown table of these scenes; it exits with 1 where a bound was broken,
or less was served than has to be.

    long answers    no max_tokens, answers of 2,000 tokens, 64 callers at once
    …, any minute   the same where the limit is a rolling quota, and has no burst beside what refills
    short answers   max_tokens: 500, answers of 10 tokens that take 0.3 s, 32 patient callers
    saturation      the same callers, once the burst is gone: what they get of the refill
    worst case      64 callers at once whose answers are as long as they may be, after short ones were learned
    alone           one caller whom a limit has refused: it asks once before its time, and once at it

A patient caller waits for exactly as long as Retry-After-ms says and asks again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import uvloop

from gateway.embedded import _server_binary
from tests.proving import house
from tests.proving.race import ROUNDING, Full, rates
from tests.proving.workers import Asked, Fleet, Plan, fleet

Mode = Literal["max", "expected", "input"]
MOST = 2048  # max_output_tokens of the model
LEARNED = 25  # answers after which a gateway knows how long they are
_MARGIN = 16  # by which the gateway may think a prompt of one line larger than it is, beside its bytes


@dataclass(frozen=True)
class Limit:
    """A rate in total tokens, and how much of it may come at once; or a rolling quota of a minute."""

    a_minute: int = 5000
    burst: int = 5000
    rolling: bool = False

    @property
    def refill(self) -> float:
        """Tokens a second. What a minute has taken comes back after it, which is more than a scene lasts."""
        return 0.0 if self.rolling else self.a_minute / 60

    @property
    def document(self) -> dict[str, Any]:
        amount = f"{self.a_minute}/minute"
        return {"quota": amount, "rolling": True} if self.rolling else {"rate": amount, "burst": self.burst}

    def fits(self, seconds: float) -> float:
        """Tokens that it lets pass in so long a time, beginning with all of the burst."""
        return self.burst + self.refill * seconds


@dataclass(frozen=True)
class Ask:
    """What all callers of a scene ask, and how they are answered."""

    prompt: str
    max_tokens: int | None
    plan: Plan

    @property
    def body(self) -> dict[str, Any]:
        bound = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {"prompt": self.prompt, **bound}

    @property
    def most(self) -> int:
        """The most that one of them may take: a token for each byte, and all of the answer that is allowed."""
        return len(self.prompt) + _MARGIN + (MOST if self.max_tokens is None else self.max_tokens)


LONG = Ask("Tell me a long story.", None, Plan(tokens=2000, seconds=1.0))
SHORT = Ask("The sky is", 500, Plan(tokens=10, seconds=0.3))


@dataclass
class Seen:
    """What a scene was like. `full` is of the fullest window; `held_back` are the waits of those who would have been
    admitted but for what was reserved and never used, `waits` those of all others, in seconds."""

    scene: str
    mode: str
    limit: Limit
    seconds: float
    tokens: int = 0
    full: Full = field(default_factory=Full)
    bound: int = 0  # the most beyond the limit, by the formula of the mode
    held_back: Sequence[float] = ()
    waits: Sequence[float] = ()
    after: float = 0.0  # what the next caller is told to wait, where something was beyond
    owed: float = 0.0  # tokens beyond the limit that had not drained when he was told, at least

    @property
    def share(self) -> float:
        """Of what fits, what was served."""
        return self.tokens / self.limit.fits(self.seconds)

    @property
    def broken(self) -> bool:
        return self.full.beyond > self.bound + ROUNDING


def taken(gateways: Fleet, everything: Iterable[Asked]) -> list[tuple[float, float, int]]:
    """What was served, by the ledger: the instants before and after each admission, and its tokens."""
    both = ((asked, gateways.ledger.get(asked.id)) for asked in everything)
    return [(asked.sent, entry.arrived, entry.prompt + entry.produced) for asked, entry in both if entry is not None]


def split(
    refused: Iterable[Asked], served: Sequence[tuple[float, float, int]], limit: Limit, most: int
) -> tuple[list[float], list[float]]:
    """The waits of those who were in the way of nothing but reservations, and of all others.

    What was used alone is a leaky bucket over the ledger; `most` would have fitted into it, or not."""
    held_back: list[float] = []
    others: list[float] = []
    backlog, at, place = 0.0, 0.0, 0
    served = sorted(served)
    for asked in sorted(refused, key=lambda one: one.answered):
        while place < len(served) and served[place][0] <= asked.answered:
            then, _, tokens = served[place]
            backlog, at, place = max(0.0, backlog - (then - at) * limit.refill) + tokens, then, place + 1
        now = max(0.0, backlog - (asked.answered - at) * limit.refill)
        assert asked.wait is not None
        (held_back if now + most <= limit.burst else others).append(asked.wait)
    return held_back, others


async def patient(gateways: Fleet, team: str, ask: Ask, callers: int, seconds: float) -> list[Asked]:
    """What patient callers ask in so long a time, each one thing after the other."""
    over = time.monotonic() + seconds
    everything: list[Asked] = []

    async def call(number: int) -> None:
        while time.monotonic() < over:
            asked = await gateways.ask(team, ask.body, ask.plan, worker=number % len(gateways.workers))
            everything.append(asked)
            if asked.status == 429:
                assert asked.wait is not None, "a refusal without Retry-After"
                await asyncio.sleep(max(0.0, min(asked.wait, over - time.monotonic())))
            else:
                assert asked.status == 200, f"answered {asked.status}"

    await asyncio.gather(*(call(number) for number in range(callers)))
    return everything


# — the scenes


async def long_answers(gateways: Fleet, team: str, mode: Mode, limit: Limit, seconds: float, ask: Ask = LONG) -> Seen:
    """64 callers at once whose answers are nearly as long as they may be."""
    everything = await patient(gateways, team, ask, 64, seconds)
    served = taken(gateways, everything)
    bound = 0 if mode == "max" else 64 * ask.most
    return _seen("long answers", mode, limit, seconds, everything, served, bound, ask.most)


async def long_answers_any_minute(gateways: Fleet, team: str, mode: Mode, limit: Limit, seconds: float) -> Seen:
    """The same on a limit that no minute exceeds."""
    seen = await long_answers(gateways, team, mode, _ROLLING, min(seconds, 60.0))
    return replace(seen, scene="long answers, any minute")


async def short_answers_any_minute(gateways: Fleet, team: str, mode: Mode, limit: Limit, seconds: float) -> Seen:
    """Short answers on a limit that no minute exceeds."""
    seen = await short_answers(gateways, team, mode, _ROLLING, min(seconds, 60.0))
    return replace(seen, scene="short answers, any minute")


_ROLLING = Limit(rolling=True)


async def short_answers(gateways: Fleet, team: str, mode: Mode, limit: Limit, seconds: float, ask: Ask = SHORT) -> Seen:
    """32 patient callers who use little of what is reserved for them."""
    everything = await patient(gateways, team, ask, 32, seconds)
    served = taken(gateways, everything)
    bound = 0 if mode == "max" else 32 * ask.most
    return _seen("short answers", mode, limit, seconds, everything, served, bound, ask.most)


async def saturation(gateways: Fleet, team: str, mode: Mode, limit: Limit, seconds: float, ask: Ask = SHORT) -> Seen:
    """Patient callers once the burst is gone: `share` is of the refill alone."""
    began = time.monotonic()
    everything = await patient(gateways, team, ask, 32, seconds)
    served = taken(gateways, everything)
    refilled = seconds / 2  # the second half; the burst is gone long before
    later = [one for one in served if began + seconds - refilled <= one[1] < began + seconds]
    bound = 0 if mode == "max" else 32 * ask.most
    seen = _seen("saturation", mode, limit, seconds, everything, served, bound, ask.most)
    return replace(seen, limit=replace(limit, burst=0), seconds=refilled, tokens=sum(tokens for _, _, tokens in later))


async def worst_case(gateways: Fleet, team: str, mode: Mode, limit: Limit, seconds: float, ask: Ask = LONG) -> Seen:
    """All at once, with answers as long as they may be, after each gateway has learned of short ones only; the bound is
    C × (B - E): callers times what one may take less what is reserved for it."""
    callers, short = 64, replace(ask.plan, tokens=10, seconds=0.0)
    numbers = [number for number in range(len(gateways.workers)) for _ in range(LEARNED)]
    learned = taken(gateways, [await gateways.ask(team, ask.body, short, worker=number) for number in numbers])
    await asyncio.sleep(sum(tokens for _, _, tokens in learned) * 60 / limit.a_minute)  # until it has drained
    first = await gateways.ask(team, ask.body, short)
    reserved = limit.burst - int(first.headers[b"x-ratelimit-remaining-tokens"])
    most = replace(ask.plan, tokens=MOST if ask.max_tokens is None else ask.max_tokens)
    everything = await asyncio.gather(*(gateways.ask(team, ask.body, most) for _ in range(callers)))
    await asyncio.sleep(1.2)  # a gateway may repeat a refusal for a second, and others have settled since
    next_one = await gateways.ask(team, ask.body, ask.plan)
    served = taken(gateways, everything)
    bound = 0 if mode == "max" else callers * (ask.most - reserved)
    seen = _seen("worst case", mode, limit, 0.0, everything, served, bound, ask.most)
    passed = next_one.answered - min(asked.sent for asked in everything)
    return replace(seen, after=next_one.wait or 0.0, owed=seen.tokens - limit.fits(passed))


def _seen(
    scene: str,
    mode: Mode,
    limit: Limit,
    seconds: float,
    everything: Sequence[Asked],
    served: Sequence[tuple[float, float, int]],
    bound: int,
    most: int,
) -> Seen:
    refused = [asked for asked in everything if asked.status == 429]
    held_back, waits = split(refused, served, limit, most)
    return Seen(
        scene,
        mode,
        limit,
        seconds,
        tokens=sum(tokens for _, _, tokens in served),
        full=rates(limit.burst, limit.refill, served),
        bound=bound,
        held_back=held_back,
        waits=waits,
    )


# — alone


@dataclass(frozen=True)
class Alone:
    """A caller that is alone at a limit: what it was told, and what it got before that time and at it."""

    limit: str
    wait: float
    early: int | None  # status; None: this machine was too slow to be early
    then: int


ALONE: dict[str, dict[str, Any]] = {
    "requests": {"count": "requests", "rate": "30/minute", "burst": 2},
    "input-tokens": {"count": "input_tokens", "rate": "600/minute", "burst": 100},
    "output-tokens": {"count": "output_tokens", "rate": "600/minute", "burst": 100},
    "total-tokens": {"count": "total_tokens", "rate": "300/minute", "burst": 150},
    "usd": {"count": "usd", "rate": "6/minute", "burst": 1},
}
ALONE_ASK = Ask("The sky is blue and the sea is not.", 40, Plan(tokens=40, density=1.0))
PRICE = {"input": 5_000.0, "output": 10_000.0}  # US dollars per million tokens: a request costs half of one


async def alone(gateways: Fleet, team: str, limit: str, ask: Ask = ALONE_ASK) -> Alone:
    """Use a limit up, ask again at nine tenths of what is told, and again at it."""
    for _ in range(20):
        refused = await gateways.ask(team, ask.body, ask.plan)
        if refused.status == 429:
            break
    assert refused.status == 429, f"the limit {limit} has never refused"
    assert refused.wait is not None
    await asyncio.sleep(refused.answered + 0.9 * refused.wait - time.monotonic())
    early = await gateways.ask(team, ask.body, ask.plan)
    sure = early.answered < refused.sent + refused.wait
    await asyncio.sleep(max(0.0, refused.answered + refused.wait - time.monotonic()))
    then = await gateways.ask(team, ask.body, ask.plan)
    return Alone(limit, refused.wait, early.status if sure else None, then.status)


# — all of them


Scene = Callable[[Fleet, str, Mode, Limit, float], Awaitable[Seen]]
SCENES: tuple[tuple[Scene, Mode], ...] = (
    (long_answers, "max"),
    (long_answers, "expected"),
    (long_answers_any_minute, "max"),
    (long_answers_any_minute, "expected"),
    (short_answers, "max"),
    (short_answers, "expected"),
    (short_answers_any_minute, "expected"),
    (saturation, "max"),
    (saturation, "expected"),
    (worst_case, "max"),
    (worst_case, "expected"),
    (worst_case, "input"),
)


# Of what fits, what a scene of a minute has to serve.
LEAST: Mapping[tuple[Scene, Mode], float] = {
    (short_answers, "expected"): 0.90,
    (short_answers_any_minute, "expected"): 0.90,
    (saturation, "max"): 0.99,
    (saturation, "expected"): 0.99,
}


def name(scene: Scene, mode: Mode) -> str:
    """The team of a scene."""
    return f"{scene.__name__}-{mode}".replace("_", "-")


def policies(scenes: Iterable[tuple[Scene, Mode]], limit: Limit) -> dict[str, Any]:
    """A team for each scene, and one for each limit that a caller is alone at."""
    documents: dict[str, Any] = {
        "models": {house.MODEL: {"pool": "demo", "max_output_tokens": MOST, "price": PRICE}},
        "plans": {},
        "teams": {},
    }
    limits: dict[str, Mapping[str, Any]] = {f"alone-{kind}": one for kind, one in ALONE.items()}
    for scene, mode in scenes:
        own = _ROLLING if scene.__name__.endswith("any_minute") else limit
        limits[name(scene, mode)] = {"count": "total_tokens", **own.document, "reserve": mode}
    for team, one in limits.items():
        documents["plans"][team] = {"limits": [{"name": "tokens", **one, "per": ["team"]}]}
        documents["teams"][team] = {"organisation": team, "plan": team}
    return documents


def _spread(waits: Sequence[float]) -> str:
    return f"{median(waits):.2f} / {max(waits):.2f} ({len(waits)})" if waits else ""


def row(seen: Seen) -> str:
    """A line of the table."""
    cells = (
        seen.scene,
        seen.mode,
        f"{seen.tokens:,}" + (f" in {seen.seconds:.0f} s" if seen.seconds else " at once"),
        f"{seen.share:.1%}" if seen.seconds else "",
        f"{seen.full.share:.0%}",
        f"{seen.bound:,}",
        f"{seen.full.beyond:,.0f}",
        _spread(seen.held_back),
        _spread(seen.waits) if not seen.after else f"{seen.after:.0f} s for the next",
    )
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "scene",
    "reserve",
    "tokens served",
    "of what fits",
    "fullest window",
    "may be beyond",
    "was beyond",
    "Retry-After, s, where only reservations are in the way: p50 / max (n)",
    "where the limit is used up: p50 / max (n)",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


async def main(chosen: Sequence[str], seconds: float, workers: int) -> int:
    scenes = [(scene, mode) for scene, mode in SCENES if not chosen or name(scene, mode) in chosen]
    limit, broken = Limit(), []
    documents = policies(scenes, limit)
    print(f"{workers} gateways, {limit.a_minute:,} tokens a minute\n\n{HEAD}", flush=True)
    with house.server(_server_binary()) as store:
        async with fleet(store.url, documents, documents["teams"], workers) as gateways:
            for scene, mode in scenes:
                seen = await scene(gateways, name(scene, mode), mode, limit, seconds)
                short = seconds >= 60 and seen.share < LEAST.get((scene, mode), 0.0)
                broken += [name(scene, mode)] if seen.broken or short else []
                print(row(seen), flush=True)
            print("\n| alone at | told to wait, s | asked at 0.9 of it | asked then |\n|---|---|---|---|")
            for one in await asyncio.gather(*(alone(gateways, f"alone-{kind}", kind) for kind in ALONE)):
                print(f"| {one.limit} | {one.wait:.3f} | {one.early or 'too late'} | {one.then} |")
                broken += [one.limit] if one.early == 200 or one.then != 200 else []
            troubles = gateways.troubles()
    for line in troubles[:20]:
        print(line)
    print(f"\nbroken: {', '.join(broken) or 'none'}; {len(troubles)} warnings")
    return 1 if broken else 0


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m tests.proving.scenes", description=__doc__.partition("\n")[0])
    options.add_argument("--seconds", type=float, default=60.0, help="of a scene")
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--scenes", nargs="*", default=[], choices=[name(*scene) for scene in SCENES])
    given = options.parse_args()
    sys.exit(uvloop.run(main(given.scenes, given.seconds, given.workers)))

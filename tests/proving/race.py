"""Many callers at many gateways of one store, against limits of every kind, counted by the backend: nothing beyond.

`python -m tests.proving.race --seeds 20` lets 64 callers race at 4 gateways for some seconds a seed: prompts of any
form, choices, answer lengths up to what is allowed, streams, callers who leave. A seed has its own organisation, teams
and limits, all of `reserve: max`. It prints a table, and exits with 1 if any window of any limit held more than it may.

The verdict is the backend's ledger alone. A request counts in a window when its caller had sent it after the beginning
and the backend had it before the end: it was admitted in between. Where a caller left, what it had received counts: the
gateway saw that much for sure, and perhaps more.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from gateway.embedded import _server_binary
from tests.proving import house
from tests.proving.workers import Asked, Entry, Fleet, Plan, fleet

# — the judge


@dataclass(frozen=True, slots=True)
class Served:
    """What one request took for sure, and when: admitted from `sent` to `arrived`, open at the backend `until` then."""

    sent: float
    arrived: float
    until: float
    prompt: int
    completion: int
    answered: int = 1  # 0: its caller left before an answer, and it may have been counted as none
    scopes: Mapping[str, str] = field(default_factory=dict)


def served(asked: Asked, entry: Entry, scopes: Mapping[str, str]) -> Served:
    """What is sure of a request that reached the backend."""
    whole = asked.left is None
    # Where it was answered whole and its caller left unread what had come, the earlier of both is sure.
    until = min(at for at in (asked.left, entry.ended) if at is not None)
    reported = whole or (asked.plan.usage == "every" and asked.received > 0)
    return Served(
        asked.sent,
        entry.arrived,
        until,
        prompt=entry.prompt if reported else 0,
        completion=entry.produced if whole else asked.received,
        answered=1 if whole or asked.received else 0,
        scopes=scopes,
    )


IN_PRICE, OUT_PRICE = 1000, 2000  # micro-dollars a token: no cost is rounded, and a dollar is soon gone
AMOUNTS: dict[str, Callable[[Served], int]] = {
    "requests": lambda s: s.answered,
    "input_tokens": lambda s: s.prompt,
    "uncached_input_tokens": lambda s: s.prompt,
    "output_tokens": lambda s: s.completion,
    "total_tokens": lambda s: s.prompt + s.completion,
    "usd": lambda s: IN_PRICE * s.prompt + OUT_PRICE * s.completion,
    "concurrent_requests": lambda s: 1,
}


@dataclass(frozen=True, slots=True)
class Full:
    """How full the fullest window was, as a share of what it may hold, and the most that any held beyond that."""

    share: float = 0.0
    beyond: float = 0.0

    def __or__(self, other: Full) -> Full:
        return Full(max(self.share, other.share), max(self.beyond, other.beyond))


def fullest(limit: Mapping[str, Any], requests: Iterable[Served], since_1970: float = 0.0) -> Full:
    """How full a limit was, by its member of the policies; `since_1970` is what time.monotonic() lacks to the time."""
    amount = AMOUNTS[limit["count"]]
    counts: defaultdict[tuple[str, ...], list[Served]] = defaultdict(list)
    for request in requests:
        counts[tuple(request.scopes.get(scope, "") for scope in limit["per"])].append(request)
    return _over(counts.values(), lambda some: _fullest(limit, some, amount, since_1970))


def _over(parts: Iterable[list[Served]], judge: Callable[[list[Served]], Full]) -> Full:
    full = Full()
    for part in parts:
        full |= judge(part)
    return full


def _fullest(
    limit: Mapping[str, Any], requests: list[Served], amount: Callable[[Served], int], since_1970: float
) -> Full:
    scale = 1_000_000 if limit["count"] == "usd" else 1
    if "at_most" in limit:
        return seats(limit["at_most"], [(r.arrived, r.until) for r in requests])
    if "rate" in limit:
        per, _, period = limit["rate"].partition("/")
        capacity = limit.get("burst", int(per)) * scale
        rate = int(per) * scale / {"second": 1, "minute": 60, "hour": 3600}[period]
        return rates(capacity, rate, [(r.sent, r.arrived, amount(r)) for r in requests])
    capacity = int(limit["quota"].partition("/")[0]) * scale
    if limit.get("rolling"):  # no proof lasts as long as the stretch
        return _share(sum(map(amount, requests)), capacity)
    hours: Counter[int] = Counter()
    for request in requests:
        first, last = (int((at + since_1970) // 3600) for at in (request.sent, request.arrived))
        if first == last:
            hours[first] += amount(request)
    return _share(max(hours.values(), default=0), capacity)


def _share(held: float, capacity: float) -> Full:
    return Full(held / capacity, max(0.0, held - capacity))


def rates(capacity: float, rate: float, taken: Sequence[tuple[float, float, int]]) -> Full:
    """The fullest window of a rate: of all that begin with a request and end with one, `capacity` and `rate` a second
    for as long as they last. `taken` are the instants before and after each admission, and what it took."""
    full, inside = Full(), list[tuple[float, int]]()
    for begin, arrived, amount in sorted(taken, reverse=True):
        insort(inside, (arrived, amount))
        held = 0
        for end, more in inside:
            held += more
            full |= _share(held, capacity + rate * (end - begin))
    return full


def seats(at_most: int, held: Iterable[tuple[float, float]]) -> Full:
    """The most seats that were taken at once; one that is given back is free at that very instant."""
    live = most = 0
    for _, change in sorted((at, change) for begin, end in held for at, change in ((begin, 1), (max(begin, end), -1))):
        live += change
        most = max(most, live)
    return _share(most, at_most)


ROUNDING = 0.1  # of a unit: what is beyond by less is not beyond


# — what is raced for

SECONDS = 3.0
CALLERS = 64
MODELS = ("a", "b")
LONGEST = 80  # tokens of an answer whose caller has named no bound
# One limit of each kind, of a size that the callers reach: what `dice` throws is between half and twice of it. No
# request is larger than the smallest burst.
Dice = Callable[[int], int]
KINDS: dict[str, Callable[[Dice], dict[str, Any]]] = {
    "requests": lambda dice: _rate("requests", dice(300), dice(8)),
    "input": lambda dice: _rate("input_tokens", dice(20_000), 2 * dice(500), "key"),
    "output": lambda dice: _rate("output_tokens", dice(10_000), 2 * dice(500)),
    "total": lambda dice: _rate("total_tokens", dice(15_000), 2 * dice(700)),
    "by model": lambda dice: _rate("total_tokens", dice(10_000), 2 * dice(700), "team", "model"),
    "by user": lambda dice: _rate("output_tokens", dice(4000), 2 * dice(500), "team", "user"),
    "uncached": lambda dice: _rate("uncached_input_tokens", dice(20_000), 2 * dice(500)),
    "dollars": lambda dice: _rate("usd", dice(30), 2 * dice(1)),
    "seats": lambda dice: {"count": "concurrent_requests", "at_most": dice(8), "per": ["team"]},
    "quota": lambda dice: {"count": "total_tokens", "quota": f"{dice(2500)}/hour", "per": ["team"]},
    "requests an hour": lambda dice: {"count": "requests", "quota": f"{dice(30)}/hour", "per": ["team"]},
    "rolling": lambda dice: {
        "count": "output_tokens",
        "quota": f"{dice(2000)}/hour",
        "rolling": True,
        "per": ["team"],
    },
}
# What all teams of a seed share.
SHARED: dict[str, Callable[[Dice], dict[str, Any]]] = {
    "all tokens": lambda dice: _rate("total_tokens", dice(30_000), 2 * dice(1500), "organisation"),
    "all seats": lambda dice: {"count": "concurrent_requests", "at_most": dice(16), "per": ["organisation"]},
}


def _rate(count: str, a_minute: int, burst: int, *per: str) -> dict[str, Any]:
    return {"count": count, "rate": f"{a_minute}/minute", "burst": burst, "per": list(per) or ["team"]}


@dataclass(frozen=True)
class Course:
    """What a seed is: its teams with their limits, what they share, and how its backend counts and reports."""

    seed: int
    teams: Mapping[str, list[dict[str, Any]]]
    shared: list[dict[str, Any]]
    density: float
    usage: Any

    @property
    def organisation(self) -> str:
        return f"org-{self.seed}"


def course(seed: int, kinds: Sequence[str] = tuple(KINDS), shared: Sequence[str] = tuple(SHARED)) -> Course:
    """The course of a seed: one to four teams with two or three limits each, from a deck that is dealt through."""
    dice = random.Random(seed)

    def some(size: int) -> int:
        return dice.randint(max(1, size // 2), size * 2)

    deck = [*kinds, *kinds]
    random.Random(seed // 2).shuffle(deck)  # two seeds that follow one another have all kinds twice
    deck = deck[: len(kinds)] if seed % 2 else deck[len(kinds) :]
    teams: dict[str, list[dict[str, Any]]] = {}
    while deck:
        hand = [deck.pop() for _ in range(min(len(deck), dice.choice((2, 3, 4))))]
        teams[f"team-{seed}-{len(teams)}"] = [
            {"name": kind.replace(" ", "-"), **KINDS[kind](some)} for kind in dict.fromkeys(hand)
        ]
    common = dice.choice([None, *shared]) if shared else None
    return Course(
        seed,
        teams,
        [] if common is None else [{"name": common.replace(" ", "-"), **SHARED[common](some)}],
        density=dice.choice((1, 2, 3, 4, 6)),
        usage=dice.choice(("every", "finish")),
    )


def policies(courses: Iterable[Course]) -> dict[str, Any]:
    """The documents of all seeds together: what one learns of its models is nothing to another."""
    price = {"input": float(IN_PRICE), "output": float(OUT_PRICE)}
    documents: dict[str, Any] = {"gateway": {"reserve": "max"}, "models": {}, "plans": {}, "teams": {}}
    for one in courses:
        for model in MODELS:
            documents["models"][f"{model}-{one.seed}"] = {"pool": "demo", "max_output_tokens": LONGEST, "price": price}
        for team, limits in one.teams.items():
            documents["plans"][team] = {"limits": limits}
            documents["teams"][team] = {"organisation": one.organisation, "plan": team}
        if one.shared:
            documents["plans"][one.organisation] = {"limits": one.shared}
            documents.setdefault("organisations", {})[one.organisation] = {"plan": one.organisation}
    return documents


# — the race


def ask_for(dice: random.Random, one: Course) -> tuple[str, dict[str, Any], Plan, float | None]:
    """One random request: its endpoint, its body, how it is answered, and after how long its caller leaves."""
    text = "word " * dice.randint(1, 20)
    body: dict[str, Any] = {"model": f"{dice.choice(MODELS)}-{one.seed}", "user": f"user-{dice.randint(1, 3)}"}
    path = dice.choice(("completions", "chat/completions"))
    if path == "completions":
        body["prompt"] = dice.choice([text, text, [text, text[:50]], [17] * dice.randint(1, 30)])
    else:
        body["messages"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    if dice.random() < 0.85:
        body["max_tokens"] = dice.randint(1, LONGEST // 2)
    if dice.random() < 0.2:
        body["n"] = 2
    body["stream"] = dice.random() < 0.5
    seconds = dice.choice((0.0, 0.0, 0.02, 0.02, 0.05, 0.1, 0.2, 0.5, 2.0))
    tokens = dice.choice((1, 10, LONGEST, LONGEST))  # the last ones: all that is allowed
    plan = Plan(tokens, seconds, one.density, extra=dice.randint(0, 3), usage=one.usage)
    return path, body, plan, dice.uniform(0.0, 0.3) if dice.random() < 0.15 else None


@dataclass
class Verdict:
    """What became of a seed."""

    course: Course
    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    full: dict[str, Full] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        strange = [status for status in self.statuses if status not in (200, 429)]
        return bool(strange) or any(full.beyond > ROUNDING for full in self.full.values())


async def race(gateways: Fleet, one: Course, seconds: float = SECONDS, callers: int = CALLERS) -> Verdict:
    """The callers of one seed, each asking again as soon as it may, or before."""
    verdict = Verdict(one)
    since_1970 = time.time() - time.monotonic()
    over = time.monotonic() + seconds
    everything: list[Asked] = []

    async def call(number: int) -> None:
        dice = random.Random(f"{one.seed} {number}")
        team = list(one.teams)[number % len(one.teams)]
        while time.monotonic() < over:
            path, body, plan, leave = ask_for(dice, one)
            worker = dice.randrange(len(gateways.workers))
            asked = await gateways.ask(team, body, plan, worker=worker, leave=leave, path=path)
            everything.append(asked)
            if asked.left is not None:
                verdict.left += 1
            else:
                verdict.statuses[asked.status] += 1
            if asked.status == 429:
                await asyncio.sleep(min(1.0 if asked.wait is None else asked.wait, dice.uniform(0.01, 0.2)))

    await asyncio.gather(*(call(number) for number in range(callers)))
    verdict.full = judge(one, everything, gateways.ledger, since_1970)
    return verdict


def judge(one: Course, everything: Sequence[Asked], ledger: Mapping[str, Entry], since_1970: float) -> dict[str, Full]:
    """How full each limit of a course was, by its name; where teams have the same, the fuller one."""
    at_backend: defaultdict[str, list[Served]] = defaultdict(list)
    for asked in everything:
        entry = ledger.get(asked.id)
        if entry is not None and (asked.left is not None or entry.ended is not None):
            scopes = {
                "organisation": one.organisation,
                "team": asked.team,
                "key": asked.team,
                "user": asked.body["user"],
                "model": asked.body["model"],
            }
            at_backend[asked.team].append(served(asked, entry, scopes))
    full: dict[str, Full] = {}
    for team, limits in one.teams.items():
        for limit in limits:
            full[limit["name"]] = full.get(limit["name"], Full()) | fullest(limit, at_backend[team], since_1970)
    for limit in one.shared:
        full[limit["name"]] = fullest(limit, [s for some in at_backend.values() for s in some], since_1970)
    return full


def row(verdict: Verdict) -> str:
    """A line of the table."""
    limits = ", ".join(
        f"{name} {full.share:.0%}" + (f" ({full.beyond:.1f} BEYOND)" if full.beyond > ROUNDING else "")
        for name, full in sorted(verdict.full.items())
    )
    told = " ".join(f"{status}: {times}" for status, times in sorted(verdict.statuses.items()))
    return f"| {verdict.course.seed} | {told} | {verdict.left} | {limits} |"


async def main(seeds: Sequence[int], seconds: float, callers: int, workers: int, kinds: Sequence[str]) -> int:
    courses = [course(seed, kinds) for seed in seeds]
    teams = [team for one in courses for team in one.teams]
    wrong, troubles = [], []
    print(f"{workers} gateways, {callers} callers, {seconds:g} s a seed, kinds: {', '.join(kinds)}\n")
    print("| seed | answers | left | the fullest window of each limit |\n|---|---|---|---|", flush=True)
    with house.server(_server_binary()) as store:
        async with fleet(store.url, policies(courses), teams, workers) as gateways:
            for one in courses:
                verdict = await race(gateways, one, seconds, callers)
                wrong += [one.seed] if verdict.wrong else []
                print(row(verdict), flush=True)
            troubles = gateways.troubles()
    for line in troubles[:20]:
        print(line)
    print(f"\n{len(seeds)} seeds, beyond a limit or answered wrongly: {wrong or 'none'}; {len(troubles)} warnings")
    return 1 if wrong else 0


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m tests.proving.race", description=__doc__.partition("\n")[0])
    options.add_argument("--seeds", type=int, default=20, help="how many")
    options.add_argument("--first", type=int, default=0, help="the first of them")
    options.add_argument("--seconds", type=float, default=SECONDS, help="of a seed")
    options.add_argument("--callers", type=int, default=CALLERS)
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="of limits")
    given = options.parse_args()
    numbers = range(given.first, given.first + given.seeds)
    sys.exit(uvloop.run(main(numbers, given.seconds, given.callers, given.workers, given.kinds)))

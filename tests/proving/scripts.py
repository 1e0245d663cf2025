"""The scripts of gateway/lua on a server, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from hashlib import sha1
from math import ceil
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import redis

from gateway.ends import live_key, reservation_key
from gateway.language import Count
from gateway.records import ledger_stream
from gateway.snapshot import Limit, windows_around
from gateway.store import Script
from tests.proving.limits import everything, key_of

EPOCH = 1_772_000_000  # s: a Wednesday in February 2026
US = 1_000_000
SEAT_LEASE = 15 * US
GROWTH = (1, 2, 0, 4, 0, 5)  # of the sums by a row, in the order of COUNTERS

ADMITTED, REFUSED, REPEATED, GIVEN_UP, FOREIGN, LOOKED = 1, 0, 2, 3, 4, 5
SETTLED, ABSENT, UNWRITTEN, INTERRUPTED = 1, 0, -1, 2
LIVE = live_key("acme")

NOMINAL = {"hour": 3600, "day": 86_400, "week": 604_800, "month": 2_629_746}


def rolling(amount: int, stretch: int, *, name: str = "rolling", count: Count = "requests") -> Limit:
    """A quota of every stretch of so many microseconds."""
    return Limit(name, "rolling", count, amount, amount, stretch, "", None, ("team",))


def reservation(id_: str) -> str:
    return reservation_key("acme", id_)


class Told(NamedTuple):
    """What is said of one limit."""

    remaining: int
    reset: int
    window: int
    held: int
    flags: int

    @property
    def over(self) -> bool:
        return self.flags % 2 == 1

    @property
    def reached(self) -> int:
        return self.flags // 2


class Answer(NamedTuple):
    """What is said of one request."""

    verdict: int
    binding: int
    wait: int
    soonest: int
    told: tuple[Told, ...]

    @classmethod
    def of(cls, words: Sequence[int]) -> Answer:
        verdict, binding, wait, soonest, *rest = words
        return cls(verdict, binding, wait, soonest, tuple(Told(*rest[i : i + 5]) for i in range(0, len(rest), 5)))

    @property
    def remaining(self) -> list[int]:
        return [told.remaining for told in self.told]


class Correction(NamedTuple):
    """A limit of which so much was taken, in that window, and so much used."""

    limit: Limit
    taken: int
    used: int
    window: int = 0


class Scripts:
    """The scripts on one server, and the instant (µs) that they take for its TIME."""

    def __init__(self, client: redis.Redis, *, expiring: bool = False) -> None:
        self.client = client
        self.now = EPOCH * US
        self._texts = _clocked(expiring)
        self._shas = {name: sha1(text.encode()).hexdigest() for name, text in self._texts.items()}

    def run(self, name: str, keys: Sequence[str], *args: Any) -> Any:
        words = (*keys, *args, *divmod(self.now, US))
        try:
            return self.client.evalsha(self._shas[name], len(keys), *words)
        except redis.exceptions.NoScriptError:
            return self.client.eval(self._texts[name], len(keys), *words)

    def admit(self, *requests: tuple[str, Sequence[tuple[Limit, int]]], starts: Sequence[int] = ()) -> list[Answer]:
        """Requests, each an id with the limits and how much it takes of them."""
        keys: list[str] = []
        words = []
        for id_, charges in requests:
            keys += [reservation(id_), LIVE, *(key_of(limit) for limit, _ in charges)]
            words.append((id_, "{}", [self._limit(limit, amount, starts) for limit, amount in charges]))
        answers = self.run("admit", keys, msgspec.msgpack.encode(words), SEAT_LEASE // 1000, 86_400_000)
        return [Answer.of(answer) for answer in answers]

    def one(self, id_: str, *charges: tuple[Limit, int]) -> Answer:
        return self.admit((id_, charges))[0]

    def look(self, *charges: tuple[Limit, int]) -> Answer:
        return self.admit(("", charges))[0]

    def _limit(self, limit: Limit, amount: int, starts: Sequence[int]) -> tuple[Any, ...]:
        words = (limit.kind[0] if limit.kind != "rolling" else "w", amount, limit.capacity, flags(limit))
        match limit.kind:
            case "rate":
                return (*words, limit.amount, limit.period)
            case "quota":
                return (*words, NOMINAL[limit.window], *(starts or self.starts(limit)), *thresholds(limit))
            case "rolling":
                return (*words, limit.period, *thresholds(limit))
        return words

    def starts(self, limit: Limit) -> tuple[int, ...]:
        assert limit.zone is not None
        return _starts(limit.window, limit.zone.key, self.now // US // 900)

    def settle(self, id_: str, *corrections: Correction, row: str = "", flags: int = 0) -> list[Any]:
        return self.settle_all((id_, corrections), row=row, flags=flags)[0]

    def settle_all(self, *requests: tuple[str, Sequence[Correction]], row: str = "", flags: int = 0) -> list[list[Any]]:
        keys: list[str] = []
        words = []
        for id_, corrections in requests:
            keys += [reservation(id_), LIVE, ledger_stream("acme"), *(key_of(one.limit) for one in corrections)]
            counters = GROWTH if row else ()
            words.append((id_, row, "f", counters, [_correction(one) for one in corrections], flags))
        answers: list[list[Any]] = self.run("settle", keys, msgspec.msgpack.encode(words), 86_400_000, 120_000)
        return answers

    def renew(self, *ids: str, limit: Limit | None = None, progress: str = "", intent: str = "") -> list[int]:
        seats = [] if limit is None else [key_of(limit)]
        keys = [key for id_ in ids for key in (reservation(id_), LIVE, *seats)]
        words = [(id_, progress, len(seats), intent) for id_ in ids]
        answers: list[int] = self.run("renew", keys, msgspec.msgpack.encode(words), SEAT_LEASE // 1000, 86_400_000)
        return answers

    def sweep(self, most: int = 64) -> dict[str, bytes]:
        found: list[bytes] = self.run("sweep", [LIVE, reservation("")], most)
        return {name.decode(): value for name, value in zip(found[0::2], found[1::2], strict=True)}

    def rows(self) -> list[str]:
        entries: Any = self.client.xrange(ledger_stream("acme"))
        return [fields[b"row"].decode() for _, fields in entries]

    def sums(self) -> dict[str, list[int]]:
        """Those of the field `f`, by grain."""
        found = {}
        for key in self.client.scan_iter(match="*:usage:*"):
            packed: Any = self.client.hget(key, "f")
            found[key.decode().split(":")[-2]] = msgspec.msgpack.decode(packed)
        return found

    def beat(self, worker: str, lease: int = 15_000) -> list[int]:
        answer: list[int] = self.run("beat", ["{gateway}:workers"], worker, lease)
        return answer

    def state(self) -> dict[bytes, bytes]:
        return {key: dump for key, (dump, _) in everything(self.client).items()}


@cache
def _clocked(expiring: bool) -> dict[str, str]:
    """The scripts with a clock that they are given. The server's own ends a count only if it is expiring: it is another
    clock."""
    clock, expiry = "redis.call('TIME')", "format('%.0f', min(ms, LONGEST / 1000))"
    texts = {name: Script(name).text.replace(clock, "{ARGV[#ARGV - 1], ARGV[#ARGV]}") for name in _NAMES}
    assert all("'TIME'" not in text for text in texts.values())
    if not expiring:
        assert all(expiry in texts[name] for name in ("admit", "settle"))
        texts = {name: text.replace(expiry, "'1000000000000'") for name, text in texts.items()}
    return texts


_NAMES = ("admit", "settle", "renew", "sweep", "beat")


@lru_cache(maxsize=1 << 16)
def _starts(window: str, zone: str, quarter: int) -> tuple[int, ...]:
    """Four starts around a quarter of an hour; no window begins within one."""
    at = datetime.fromtimestamp(quarter * 900, UTC)
    return tuple(int(start.timestamp()) for start in windows_around(window, ZoneInfo(zone), at))


def flags(limit: Limit) -> int:
    return limit.holds + 2 * limit.shadow


def thresholds(limit: Limit) -> tuple[int, ...]:
    return tuple(max(1, ceil(share * limit.capacity)) for share in limit.warn_at)


def _correction(one: Correction) -> tuple[Any, ...]:
    limit = one.limit
    words = (limit.kind[0] if limit.kind != "rolling" else "w", one.used - one.taken, one.taken, flags(limit))
    match limit.kind:
        case "rate":
            return (*words, limit.amount, limit.period)
        case "quota":
            return (*words, limit.capacity, NOMINAL[limit.window], one.window, *thresholds(limit))
        case "rolling":
            return (*words, limit.capacity, limit.period, one.window, *thresholds(limit))
    return words

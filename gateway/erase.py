"""The right to be forgotten: a user leaves the ledger and the sums, the amounts stay.

Not here: what sinks have already, requests under way, those that were interrupted a day ago or less, and
keys that were made for the user. A request that ends meanwhile or later writes the user down again, perhaps in the row
and not in the sums: erase once more. Exports get each row again, under the same event id.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from gateway.buckets import KEPT_HOURS, Bucket, bucket, finer
from gateway.records import ERASED, GRAINS, Grain, dead_letters, erasures, ledger_stream, sums_key
from gateway.rollups import groups, running_hour
from gateway.store import Arg, Script, Store

_PAGE = 1000
_STEP = 100  # entries or groups that one call of the script changes
_USER = 2  # its place in a group, see records.group_of

Told = Callable[[int, int], None]  # how much is done, and of how much: entries and months


@dataclass(frozen=True, slots=True)
class Erased:
    """What had the user: rows of the ledger, and groups of the sums of hours, days and months."""

    rows: int
    sums: int


async def erase(store: Store, organisation: str, user: str, told: Told | None = None) -> Erased:
    """Put `erased` in the place of a user, given as the rows have it, in small steps.

    What is left half-way or sent twice is made good by the next time. Raises ValueError for who is no user, and
    StoreUnavailable.
    """
    if user in ("", ERASED):
        raise ValueError(f'"{user}" is what stands for no user, expected one as the rows have it')
    one = _Erasure(store, organisation, user)
    length = await store.call(lambda: store.client.xlen(ledger_stream(organisation)))
    now = await running_hour(store)
    months = range(bucket("month", now - KEPT_HOURS), bucket("month", now + 1) + 1)
    told = told or (lambda done, whole: None)
    looked = rows = sums = 0
    async for seen, changed in one.rows(ledger_stream(organisation)):
        looked, rows = looked + seen, rows + changed
        told(min(looked, length), length + len(months))
    for key in await one.dead_letters() if length else ():
        async for _ in one.rows(key):
            pass
    for done, month in enumerate(months, 1):
        sums += await one.month(month)
        told(length + done, length + len(months))
    return Erased(rows, sums)


class _Erasure:
    """What is done for one user."""

    def __init__(self, store: Store, organisation: str, user: str) -> None:
        self._store = store
        self._organisation = organisation
        self._user = user
        self._script = Script("erase")

    async def dead_letters(self) -> list[str]:
        """The streams of rows that exports could not deliver."""
        key = ledger_stream(self._organisation)
        groups = await self._store.call(lambda: self._store.client.xinfo_groups(key))
        return [dead_letters(self._organisation, group["name"].decode()) for group in groups]

    async def rows(self, key: str) -> AsyncIterator[tuple[int, int]]:
        """Replace the rows that are there now, page by page: how many were looked at, how many had the user."""
        latest = await self._store.call(lambda: self._store.client.xrevrange(key, count=1))
        if not latest:
            return
        some = partial(self._store.client.xrange, key, max=latest[0][0], count=_PAGE)
        begin = "-"
        while page := await self._store.call(partial(some, min=begin)):
            begin = f"({page[-1][0].decode()}"
            yield len(page), await self._run("rows", [key], list(self._replaced(page)))

    def _replaced(self, page: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> Iterator[tuple[Arg, ...]]:
        """Of the entries with the user: their id, the row without, and when it was first written."""
        for entry, fields in page:
            row = fields.get(b"row", b"")
            try:
                if _decode_who(row).user != self._user:
                    continue
                members = {**_decode_members(row), "user": ERASED}
            except msgspec.DecodeError:
                continue  # nobody can read it, and reconciling tells of it
            written = fields.get(b"entry", entry).partition(b"-")[0]  # of a dead letter, that of the row
            yield entry, msgspec.json.encode(members), fields.get(b"at", written)

    async def month(self, number: int) -> int:
        """Merge the groups that the user has in the sums of a month, and of its days and hours; how many there were.

        A group of an hour is in its day and its month, too, and leaves those last: so nothing is looked for where it
        is not, and what was left half-way is found. What is running, or about to, is merged at once, because somebody
        may add to it in between.
        """
        found = await groups(self._store, sums_key(self._organisation, "month", number))
        those = [group for group in found if _decode_group(group)[_USER] == self._user]
        now = await running_hour(self._store)
        running = list(dict.fromkeys((grain, bucket(grain, hour)) for hour in (now, now + 1) for grain in GRAINS))
        merged = await self._over("month", number, those, running)
        if ("month", number) in running:
            merged += await self._merge(running, those)
        return merged

    async def _over(self, grain: Grain, number: int, those: Sequence[bytes], running: Sequence[Bucket]) -> int:
        """Merge what is over of a month, a day or an hour, the finest first."""
        if not those:
            return 0
        key = sums_key(self._organisation, grain, number)
        values = await self._store.call(lambda: self._store.client.hmget(key, those))
        there = [group for group, value in zip(those, values, strict=True) if value is not None]
        merged = 0
        for part in finer(grain, number) if there else ():
            merged += await self._over(*part, there, running)
        return merged if (grain, number) in running else merged + await self._merge([(grain, number)], there)

    async def _merge(self, buckets: Sequence[Bucket], those: Sequence[bytes]) -> int:
        keys = [erasures(self._organisation), *(sums_key(self._organisation, *one) for one in buckets)]
        return await self._run("sums", keys, [(group, _without_user(group)) for group in those])

    async def _run(self, step: str, keys: Sequence[str], changes: Sequence[tuple[Arg, ...]]) -> int:
        changed = 0
        for begin in range(0, len(changes), _STEP):
            words = [word for change in changes[begin : begin + _STEP] for word in change]
            changed += await self._store.run(self._script, keys, [step, *words])
        return changed


def _without_user(group: bytes) -> bytes:
    names = list(_decode_group(group))
    names[_USER] = ERASED
    return msgspec.json.encode(names)


class _Who(msgspec.Struct):
    user: str | None


_decode_who = msgspec.json.Decoder(_Who).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_group = msgspec.json.Decoder(tuple[str, str, str, str, str]).decode

"""What has to be done beside requests: sweep what dead workers have left, adopt their spools, trim the ledger.

Every worker adopts spools of its own folder. The rest is for one worker at a time, which is whoever is the first of
all; should two of them think so for a moment, nothing is done twice: scripts know a request by its id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import redis.exceptions
import structlog

from gateway.admission import SEAT_LEASE, Admission
from gateway.ends import SWEPT, live_key, reservation_key, swept
from gateway.errors import StoreUnavailable
from gateway.exports import ensure
from gateway.ledger import organisations
from gateway.retention import trim
from gateway.snapshot import Snapshot
from gateway.spool import Spool, SpoolError
from gateway.store import Script, Store, leaving

_EVERY = 1.0  # seconds between two rounds
_SWEPT_AT_ONCE, _STEPS = 64, 16  # of one organisation in a round
_ORGANISATIONS = 64  # that are swept in one round
_PAUSED = SEAT_LEASE / 3
_ADOPT_EVERY, _TRIM_EVERY = 5.0, 60.0

_log = structlog.get_logger("gateway.housekeeping")


class Housekeeping:
    """The chores of one worker."""

    def __init__(
        self, store: Store, admission: Admission, snapshot: Callable[[], Snapshot], spool: Spool, spools: Path
    ) -> None:
        self._store = store
        self._admission = admission
        self._snapshot = snapshot
        self._spool = spool
        self._spools = spools
        self._sweep = Script("sweep")
        self._unkept = ""
        self._next: list[str] = []  # organisations that are still to be swept in this turn

    async def run(self) -> None:
        """For ever."""
        adopted = trimmed = 0.0
        before = time.monotonic()
        while not leaving():
            now = time.monotonic()
            paused, before = now - before > _PAUSED, now  # what it has itself may have lapsed
            self._tell()
            try:
                if self._spool.failure:
                    await self._spool.probe()
                if now - adopted >= _ADOPT_EVERY:
                    adopted = now
                    await self._admission.settlements.adopt(self._spools)
                    for organisation in self._concerned():
                        self._admission.has_ledger(organisation)
                # Whoever lives has renewed what is his by then, in a store that was away or has just been started.
                answered = not self._store.away and now - self._store.since > SEAT_LEASE
                if self._admission.first and answered and not paused:
                    await self._sweep_some()
                    if now - trimmed >= _TRIM_EVERY:
                        trimmed = now
                        await self._trim()
            except (StoreUnavailable, SpoolError, OSError, redis.exceptions.ResponseError) as failure:
                _log.warning("housekeeping_failed", reason=type(failure).__name__)
            except Exception:  # a defect: whoever stopped here would sweep nothing more
                _log.exception("housekeeping_failed")
            await asyncio.sleep(_EVERY)

    def _tell(self) -> None:
        """Say once that usage cannot be written down while the store is away, and once that it can again."""
        unkept = self._admission.settlements.unkept
        if unkept and not self._unkept:
            _log.error("spool_takes_nothing", reason=unkept)
        elif self._unkept and not unkept:
            _log.info("spool_takes_again")
        self._unkept = unkept

    def _concerned(self) -> set[str]:
        """The organisations of the policies, and those of what is not settled yet: they have, or may have, a ledger."""
        teams = self._snapshot().teams.values()
        return {team.organisation for team in teams} | self._admission.settlements.organisations

    async def _sweep_some(self) -> None:
        if not self._next:
            self._next = await organisations(self._store)
        some, self._next = self._next[:_ORGANISATIONS], self._next[_ORGANISATIONS:]
        for organisation in some:
            try:
                for _ in range(_STEPS):
                    if await self.sweep(organisation) < _SWEPT_AT_ONCE:
                        break
            except redis.exceptions.ResponseError as failure:  # its keys hold something else; the others' do not
                _log.warning("not_swept", organisation=organisation, reason=str(failure))

    async def sweep(self, organisation: str) -> int:
        """Settle requests whose workers have not renewed them, some at once. Returns how many there were."""
        keys = [live_key(organisation), reservation_key(organisation, "")]
        found = await self._store.run(self._sweep, keys, [_SWEPT_AT_ONCE])
        settlements = self._admission.settlements
        answers, now_ms = [], time.time_ns() // 1_000_000
        for name, value in zip(found[0::2], found[1::2], strict=True):
            _, _, text = value.partition(b" ")
            intent, _, progress = text.partition(b"\n")
            try:
                end = swept(name.decode(), organisation, intent, progress, now_ms, SWEPT)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                _log.error("reservation_unreadable", request_id=name.decode("utf-8", "replace"), reason=str(error))
                await self._store.call(partial(self._store.client.zrem, keys[0], name))
                continue
            if end.id not in settlements:  # else it has ended here, and its own end says more
                answers.append(settlements.send(end, again=True))
        if answers:
            _log.warning("requests_swept", organisation=organisation, requests=len(answers))
            await asyncio.wait(answers)
        return len(answers)

    async def _trim(self) -> None:
        snapshot = self._snapshot()
        known = await organisations(self._store)
        await ensure(self._store, known, snapshot.exports)
        for organisation in known:
            await trim(self._store, organisation, snapshot.gateway.ledger.keep, tuple(snapshot.exports))

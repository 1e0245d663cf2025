"""Requests that have ended: each is settled once, now or when the store is back.

What the store has not acknowledged is kept and sent again until it is: the scripts know a request by its id, so that
sending twice counts once. After an absence it is sent batch by batch, one after the other, and not all at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import structlog

from gateway.store import Coalesced, Item, Script, Store
from gateway.terms import Charge

# How long a settled or given-up id is remembered: what is still on its way arrives far sooner, and whoever sends again
# does so while it is alive.
_MARK = 3600.0
_BATCH, _ROUND = 64, 2048
# About 1.5 KiB each. Whoever would add one more is refused before a backend is asked: what is not written down is lost.
MOST = 100_000

_ABSENT, _UNWRITTEN = 0, -1

_log = structlog.get_logger("gateway.admission")


class End(NamedTuple):
    """What ends a request: what the script is told, and the charges that it corrects, with the window of each."""

    id: str
    item: Item
    organisation: str
    charges: list[tuple[Charge, int]]


# Told that of a charge in a window a threshold (1, 2 …) was reached, with what is used now.
Reached = Callable[[str, Charge, int, int, int], None]


class Settlements:
    """What one worker has to tell the store of requests that have ended."""

    def __init__(self, store: Store, reached: Reached) -> None:
        self._store = store
        self._reached = reached
        self._settle = Coalesced(store, Script("settle"), (int(_MARK * 1000),))
        self._pending: dict[str, End] = {}
        self._late: dict[str, None] = {}  # of these, whom the store did not answer; the next one first

    def __len__(self) -> int:
        """How many requests the store has not acknowledged."""
        return len(self._pending)

    @property
    def full(self) -> bool:
        return len(self._pending) >= MOST

    def send(self, end: End, *, again: bool = False) -> asyncio.Future[list[int]]:
        """Settle now. When the future is done, what the store said has been looked at; what failed is sent later."""
        self._pending[end.id] = end
        answer: asyncio.Future[list[int]] = self._settle(end.item)
        answer.add_done_callback(partial(self._answered, end, again))
        return answer

    def later(self, end: End) -> None:
        """Settle when the store is back."""
        self._pending[end.id] = end
        self._late[end.id] = None

    def pending(self, request_id: str) -> bool:
        return request_id in self._pending

    def _answered(self, end: End, again: bool, answer: asyncio.Future[list[int]]) -> None:
        reason = "not awaited" if answer.cancelled() else repr(answer.exception() or "")
        if answer.cancelled() or answer.exception() is not None or answer.result()[0] == _UNWRITTEN:
            if end.id in self._pending:
                self._late.pop(end.id, None)  # it goes behind those that may be settled
                self._late[end.id] = None
                if not again:
                    _log.warning("settle_later", request_id=end.id, reason=reason.strip("'") or "the ledger's key")
            return
        self._pending.pop(end.id, None)
        self._late.pop(end.id, None)
        status, *reached = answer.result()
        if status == _ABSENT and not again and end.item[1][1]:  # it has a row, which is now in the log only
            _log.error("reservation_lost", request_id=end.id)
        for place, number, used in zip(reached[0::3], reached[1::3], reached[2::3], strict=True):
            charge, window = end.charges[place - 1]
            self._reached(end.organisation, charge, number, used, window)

    async def catch_up(self) -> None:
        """Send again some of what was not acknowledged, as long as the store answers."""
        late = list(self._late)[:_ROUND]
        for start in range(0, len(late), _BATCH):
            if self._store.away:
                return
            some = [self._pending[name] for name in late[start : start + _BATCH] if name in self._pending]
            if some:
                await asyncio.wait([self.send(end, again=True) for end in some])

    async def finish(self) -> None:
        """Settle what is left, as far as the store lets; says how much it did not."""
        self._late = dict.fromkeys(self._pending)
        while self._late and not self._store.away:
            left = len(self._late)
            await self.catch_up()
            if len(self._late) == left:
                break
        if self._pending:
            _log.error("not_settled", requests=len(self._pending))

"""Retention: rows leave a ledger when they are older than they have to be kept, and every export has delivered them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import structlog

from gateway.records import ledger_stream
from gateway.store import Script, Store

_STEP = 1000  # rows at most that one call removes: about a millisecond of the store's time
_TELL_EVERY = 3600.0
_COUNTED = 1000  # of what is held back: enough to see whether it is much

_log = structlog.get_logger("gateway.retention")
_trim = Script("trim")
_told: dict[tuple[str, str], float] = {}  # organisation and export -> when the log last said that it holds rows back


async def trim(store: Store, organisation: str, keep: float, exports: Sequence[str]) -> int:
    """Remove the rows that are older than `keep` seconds by the store's clock, as far as every consumer group has
    acknowledged them; how many these were.

    One of `exports` that has no group yet has acknowledged nothing. Who holds rows back is in the log, once an hour.
    Raises StoreUnavailable.
    """
    stream = ledger_stream(organisation)
    removed, step = 0, _STEP
    while step >= _STEP // 2:  # not until nothing is left: rows get old while we look
        step, old, *blocking = await store.run(_trim, (stream,), (int(keep * 1000), _STEP, *exports))
        removed += step
    for name, first in zip(blocking[::2], blocking[1::2], strict=True):
        await _tell(store, organisation, name.decode(), b"-" if first == b"-" else first, b"(" + old)
    return removed


async def _tell(store: Store, organisation: str, export: str, first: bytes, old: bytes) -> None:
    """Say how many old rows an export holds back, unless that was said in this hour."""
    now = time.monotonic()
    if now - _told.get((organisation, export), -_TELL_EVERY) < _TELL_EVERY:
        return
    look = partial(store.client.xrange, ledger_stream(organisation), first, old, count=_COUNTED)
    rows = len(await store.call(look))
    if not rows:
        return
    _told[organisation, export] = now
    _log.warning(
        "ledger_held_back",
        organisation=organisation,
        export=export,
        rows=f"{rows} or more" if rows == _COUNTED else str(rows),
        reason="this export has no group yet" if first == b"-" else "this export has not delivered them",
    )

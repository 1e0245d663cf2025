"""What an export hands over, and what a sink says of it. A new kind of sink is one file that has a class of this
protocol, and one line in `receivers.sink_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gateway.records import UsageRecord


class Row(NamedTuple):
    """One entry of the ledger on its way out."""

    entry: str  # of the stream: `ms-n`
    written_ms: int  # since 1970: the entry's, or the `at` of one that replaces an erased row
    record: UsageRecord
    text: bytes  # the JSON as stored


class Rejected(Exception):
    """The sink understood, and will never take these rows as they are: the fault is in a row.

    Whatever a person can mend where the rows go (a full disk, a wrong password, a missing right) is Unavailable: else
    a wrong setting would bury the ledger.
    """


class Unavailable(Exception):
    """The sink may take the rows later; nothing is known of them now."""

    def __init__(self, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after  # seconds, where the other side named them


class Sink(Protocol):
    """Takes rows, each at least once: whoever reads them there tells them apart by the id of the record."""

    async def open(self) -> None:
        """Get ready, once, before the first delivery; raises Unavailable."""

    async def deliver(self, rows: Sequence[Row]) -> None:
        """All rows are safely there when this returns; raises Rejected or Unavailable, then some of them may be."""

    async def aclose(self) -> None:
        """Give back what is held."""

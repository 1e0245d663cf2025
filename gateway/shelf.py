"""The policies as the control plane knows them: looked at whenever somebody asks, read again when they have changed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.errors import GatewayError, Object
from gateway.reading import Reading, Reloads, look, read
from gateway.snapshot import Snapshot


class PoliciesRefused(GatewayError):
    """422: documents with mistakes, all of which are told; 503 where something else was asked that needs them."""

    status = 422
    type = "invalid_request_error"
    code = "policies_refused"

    def __init__(self, mistakes: tuple[str, ...], *, status: int = 422) -> None:
        super().__init__(f"the policies have mistakes: {'; '.join(mistakes)}")
        self.status = status
        self.mistakes = mistakes

    def body(self) -> Object:
        return {**super().body(), "mistakes": self.mistakes}

    def extensions(self) -> Object:
        return {**super().extensions(), "mistakes": self.mistakes}


class Shelf:
    """The policies of a directory, and what is wrong with them now. Where something is, the last good ones hold."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._turn = asyncio.Lock()
        self._reading: Reading | None = None
        self._snapshot: Snapshot | None = None
        self.reloads: Reloads | None = None  # of what could be read at least once

    async def look(self, *, anew: bool = False) -> tuple[str, ...]:
        """What is wrong with the documents as they are now. `anew`: read, though nothing seems to have changed."""
        async with self._turn:
            seen = self._reading
            if seen is None or anew or await asyncio.to_thread(look, seen) != seen.marks:
                self._take(await asyncio.to_thread(read, self._directory, seen))
            assert self._reading is not None
            return self._reading.mistakes

    def _take(self, reading: Reading) -> None:
        self._reading = reading
        if self.reloads is not None and reading.mistakes:
            self.reloads.refuse(reading, reading.mistakes)
        elif not reading.mistakes:
            self._snapshot = reading.found()
            if self.reloads is None:
                self.reloads = Reloads.begun(reading)
            else:
                self.reloads.take(reading)

    async def snapshot(self) -> Snapshot:
        """The policies that the last good documents made. Raises PoliciesRefused where there never were any."""
        mistakes = await self.look()
        if self._snapshot is None:
            raise PoliciesRefused(mistakes, status=503)
        return self._snapshot

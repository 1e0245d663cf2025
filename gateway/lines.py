"""Lines that go out while nobody waits for it: whoever reads them may be slow, or read nothing at all.

Who writes puts a line in a queue of so many bytes, and one thread takes them out. Where the queue is full, lines are
dropped and counted, and in their place stands a line that says how many, as soon as one is taken again.

The thread writes whole lines, as many as a pipe takes at once or not at all (PIPE_BUF): so no line is torn, not where
several processes share a pipe either, but for one that is longer than that. After each time it rests for a moment, in
which lines gather: who is serving would otherwise wake it for each of them.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator

_MOST = 4 * 1024 * 1024  # bytes that wait
_PIPE_BUF = select.PIPE_BUF
_REST = 0.01  # seconds


class Lines:
    """A stream of whole lines to a file descriptor. `told(number)` is the line that says how many were dropped."""

    def __init__(self, fd: int, told: Callable[[int], bytes], most: int = _MOST) -> None:
        self.dropped = 0
        self._fd = fd
        self._told = told
        self._most = most
        self._waiting: list[bytes] = []
        self._size = 0  # bytes that wait, or are being written
        self._untold = 0  # dropped lines of which nothing was said yet
        self._takes = True  # whether what was written last went out
        self._lock = threading.Lock()
        self._bell, self._hurry, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._idle.set()
        threading.Thread(target=self._run, name="lines", daemon=True).start()

    def write(self, line: bytes) -> None:
        """Take a line, with its end. Never waits."""
        with self._lock:
            if self._size + len(line) > self._most:
                self.dropped += 1
                self._untold += 1
                return
            self._confess()
            self._waiting.append(line)
            self._size += len(line)
            if not self._idle.is_set():
                return
            self._idle.clear()
        self._bell.set()

    def flush(self) -> None:
        """Nothing: who logs does not wait. See drain()."""

    def drain(self, patience: float) -> bool:
        """Wait until all is written, at most so many seconds. Returns whether it is."""
        self._hurry.set()
        try:
            return self._idle.wait(patience)
        finally:
            self._hurry.clear()

    def _confess(self) -> None:
        if self._untold:
            line = self._told(self._untold)
            self._untold = 0
            self._waiting.append(line)
            self._size += len(line)

    def _run(self) -> None:
        while True:
            self._bell.wait()
            self._bell.clear()
            while lines := self._next():
                for piece, number in _pieces(lines):
                    self._takes = self._out(piece)
                    with self._lock:
                        self._size -= len(piece)
                        if not self._takes:
                            self.dropped += number
                            self._untold += number
                self._hurry.wait(_REST)

    def _next(self) -> list[bytes]:
        """What waits; nothing where the thread may wait, too."""
        with self._lock:
            if not self._waiting and self._takes:
                self._confess()
            lines, self._waiting = self._waiting, []
            if not lines:
                self._idle.set()
            return lines

    def _out(self, piece: bytes) -> bool:
        """Write it all. Returns whether that was possible: nobody may read any more, or a disk be full."""
        rest = memoryview(piece)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:  # somebody who shares the descriptor has made it so
                select.select([], [self._fd], [], 1.0)
            except OSError:
                time.sleep(_REST)
                return False
        return True


def _pieces(lines: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """Lines together, as far as a pipe takes them at once, and how many they are."""
    some: list[bytes] = []
    size = 0
    for line in lines:
        if some and size + len(line) > _PIPE_BUF:
            yield b"".join(some), len(some)
            some, size = [], 0
        some.append(line)
        size += len(line)
    if some:
        yield b"".join(some), len(some)

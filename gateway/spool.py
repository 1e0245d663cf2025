"""Records that could not be told to the store, on the disk until they are.

A process has files of its own in the folder: `<name>.lock`, which it holds locked (flock) while it lives, and
segments, `<name>.<number>.spool`. The first record makes them, and they go when all records are done: in calm times
there is none. What a process leaves behind is adopted by another one, and only then is a spool read.

A segment is a header, of 24 bytes of text with the version and 8 of a marker that was drawn for it, and then frames:
8 bytes of marker, 4 of length and 4 of CRC32C, and the record. Of a record that is done the marker is inverted, in
place. The sum is over the version, the place in the file, the length and the record, so that nothing that looks like a
frame is taken for one where it was not written: not a spool inside a record, nor an old block of the disk. What does
not fit is skipped up to the next marker that begins what fits; a damaged byte loses one record at most, and that is
told. A version that is not known is left alone.

A record counts as safe after an fsync, which many share. When an fsync fails the kernel has thrown away what it could
not write, and the next one succeeds without it (https://wiki.postgresql.org/wiki/Fsync_Errors): so what was not safe
then is written again, to a new segment.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import secrets
import time
from array import array
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Self

import structlog

MIB = 1 << 20
LONGEST = MIB  # of a record

_MAGIC = b"model-gateway spool 001\n"
_VERSION = re.compile(rb"model-gateway spool (\d{3})\n")
_MARKER = 8
_HEADER = len(_MAGIC) + _MARKER
_HEAD = Struct(f"<{_MARKER}sII")  # of a frame: marker, length, sum
_PLACED = Struct("<QI")  # place and length, as summed
_OURS = re.compile(r"([0-9a-f]{24})\.(?:lock|\d{6}\.spool)")
_OFTEN = 1.0  # seconds between two tries of a folder
_TRIED = bytes(64 * 1024)  # what is written to try it
_MOST_FRESH = MIB  # bytes that may be not yet safe before somebody sees to it

_log = structlog.get_logger("gateway.spool")


class SpoolError(Exception):
    """A record that is not in the spool, or a folder that cannot be used: why."""


class Damage(NamedTuple):
    """Bytes of a file that cannot be read; whether they were of a record that was done cannot be told."""

    file: Path
    offset: int
    lost: int  # bytes
    why: str


# — CRC32C


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum of RFC 3720; 80 µs per KiB."""
    one, *four = _tables()
    by_8, by_6, by_4, by_2 = four
    whole = len(data) & ~7
    sum = 0xFFFFFFFF
    for a, b, c, d in _EIGHT.iter_unpack(memoryview(data)[:whole]):
        sum = by_8[a ^ (sum & 0xFFFF)] ^ by_6[b ^ (sum >> 16)] ^ by_4[c] ^ by_2[d]
    for byte in data[whole:]:
        sum = one[(sum ^ byte) & 0xFF] ^ (sum >> 8)
    return sum ^ 0xFFFFFFFF


_EIGHT = Struct("<4H")


@cache
def _tables() -> Sequence[array[int]]:
    """Slicing by 8 bytes (Kounavis and Berry, 2005), as four times 16 bits; 1 MiB and 30 ms, when first needed."""
    return [_table(bits, size) for bits, size in ((8, 1), (16, 8), (16, 6), (16, 4), (16, 2))]


def _table(bits: int, size: int) -> array[int]:
    """What each value of so many bits leaves when `size` bytes are summed that begin with it."""
    table = [0]
    for bit in range(bits):
        left = 1 << bit
        for _ in range(8 * size):
            left = (left >> 1) ^ (0x82F63B78 if left & 1 else 0)
        table += [value ^ left for value in table]
    return array("I", table)


# — frames


def _sum(place: int, record: bytes) -> int:
    return crc32c(_MAGIC + _PLACED.pack(place, len(record)) + record)


def _inverse(marker: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in marker)


class _Frame(NamedTuple):
    place: int
    end: int
    record: bytes | None  # None: these bytes are none
    done: bool = False


def _walk(data: bytes, marker: bytes) -> Iterator[_Frame]:
    """All frames of a segment, and what is between them."""
    if len(data) < _HEADER:
        return
    marks = re.compile(b"|".join(map(re.escape, (marker, _inverse(marker)))))
    known = place = _HEADER  # up to `known` all is told
    while found := marks.search(data, place):
        place = found.start()
        if (record := _fitting(data, place)) is None:
            place += 1
            continue
        if place > known:
            yield _Frame(known, place, None)
        known = place + _HEAD.size + len(record)
        yield _Frame(place, known, record, found.group() != marker)
        place = known
    if known < len(data):
        yield _Frame(known, len(data), None)


def _fitting(data: bytes, place: int) -> bytes | None:
    start = place + _HEAD.size
    if start > len(data):
        return None
    _, length, sum = _HEAD.unpack_from(data, place)
    if length > LONGEST or start + length > len(data):
        return None
    record = data[start : start + length]
    return record if _sum(place, record) == sum else None


def _marker_of(data: bytes) -> bytes | None:
    """By the header, or by the first frame where that one is damaged; None: this is no segment of this version."""
    told, first = data[len(_MAGIC) : _HEADER], data[_HEADER : _HEADER + _MARKER]
    for marker in (told, first if first[:1] == b"\xff" else _inverse(first)):
        if len(marker) == _MARKER and any(frame.record is not None for frame in _walk(data, marker)):
            return marker
    return told if _MAGIC.startswith(data[: len(_MAGIC)]) else None


def _unread(data: bytes, gap: _Frame) -> str:
    """Why a gap is one."""
    if gap.end < len(data):
        return "damaged"
    start = gap.place + _HEAD.size
    if start > len(data) or start + _HEAD.unpack_from(data, gap.place)[1] > len(data):
        return "cut off"
    return "damaged"


# — what is written


class _Segment:
    """One file that is written."""

    __slots__ = ("dirty", "fd", "left", "marker", "path", "size")

    def __init__(self, path: Path) -> None:
        # No text has the byte FF, so that a search stops at frames only.
        self.marker = b"\xff" + secrets.token_bytes(_MARKER - 1)
        self.path = path
        self.size = 0  # up to here, records are whole
        self.left = 0  # records that are not done
        self.dirty = True
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self._write(_MAGIC + self.marker)
        except OSError:
            self.remove()
            raise

    def add(self, record: bytes) -> int:
        """Where it stands."""
        place = self.size
        self._write(_HEAD.pack(self.marker, len(record), _sum(place, record)) + record)
        self.left += 1
        return place

    def _write(self, data: bytes) -> None:
        """All of it, or nothing."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self.fd, data[written:], self.size + written)
        except OSError:
            os.ftruncate(self.fd, self.size)
            raise
        self.size += len(data)
        self.dirty = True

    def done(self, place: int) -> None:
        self.left -= 1
        with suppress(OSError):  # it is told twice, then
            os.pwrite(self.fd, _inverse(self.marker), place)

    def close(self) -> None:
        os.close(self.fd)

    def remove(self) -> None:
        self.close()
        with suppress(OSError):
            self.path.unlink()


class Spool:
    """The records of one process that are not done. `most` are the bytes of all its files, `segment` those of one,
    `commit` the seconds between two fsyncs. It belongs to one event loop."""

    def __init__(self, folder: Path, *, most: int, commit: float = 0.005, segment: int = 16 * MIB) -> None:
        self._folder = folder
        self._most = most
        self._commit = commit
        self._segment = min(segment, most // 8)
        self._reserve = most // 8
        self._name = ""
        self._lock: int | None = None
        self._begun = 0
        self._segments: list[_Segment] = []
        self._current: _Segment | None = None
        self._folders: set[Path] = set()  # whose entries are not safe
        self._where: dict[int, tuple[_Segment, int]] = {}  # of what is not done
        self._fresh: dict[int, bytes] = {}  # of these, what is not safe
        self._fresh_bytes = 0
        self._again = False  # what is fresh may be nowhere: an fsync has failed
        self._last = 0  # number
        self._safe = 0  # up to this number
        self._synced = float("-inf")
        self._syncing: asyncio.Task[str] | None = None
        self._tried = float("-inf")
        self._told_full = False
        self._closed = False
        self.failure = ""  # why nothing can be written, until `probe` finds that it can

    def __repr__(self) -> str:
        return f"<Spool {len(self)} records, {self.size} bytes{', ' + self.failure if self.failure else ''}>"

    def __len__(self) -> int:
        """How many records are not done."""
        return len(self._where)

    @property
    def size(self) -> int:
        """Bytes on the disk; those of a record that is done go with its segment."""
        return sum(segment.size for segment in self._segments)

    @property
    def full(self) -> bool:
        """Whether only the last eighth is left: for what has begun already, and nothing new."""
        return self.size > self._most - self._reserve

    async def append(self, record: bytes) -> int:
        """Its number, when it is safe: on the disk for good. One whose caller is cancelled before is not kept; whoever
        wants it to be calls `note`, and then waits for `commit`."""
        number = self.note(record)
        try:
            await self.commit()
        except BaseException:
            self.done(number)
            raise
        return number

    def note(self, record: bytes) -> int:
        """Its number, when it is written: it outlives this process, though not the machine. Raises SpoolError where
        that cannot be, and then nothing of it is there."""
        self._see_room(record)
        self._last += 1
        try:
            self._put(self._last, record)
        except OSError as error:
            self._fail(error)
            self._reap()
            raise SpoolError(self.failure) from error
        self._fresh[self._last] = record
        self._fresh_bytes += len(record)
        if self._fresh_bytes > _MOST_FRESH:
            self._sync_soon()
        return self._last

    def _see_room(self, record: bytes) -> None:
        if len(record) > LONGEST:
            raise SpoolError(f"a record of {len(record)} bytes, expected at most {LONGEST}")
        if self._closed or self.failure:
            raise SpoolError(self.failure or "the spool is closed")
        if self.size + _HEADER + _HEAD.size + len(record) > self._most:
            if not self._told_full:
                _log.error("spool_full", records=len(self), bytes=self.size, most=self._most)
            self._told_full = True
            raise SpoolError(f"the spool is full: {self.size} bytes, expected at most {self._most}")

    def done(self, number: int) -> None:
        """It need not be kept any more. One that is done stays done."""
        if self._closed or number not in self._where:
            return
        segment, place = self._where.pop(number)
        self._forget(number)
        segment.done(place)
        if not segment.left:
            self._reap()

    async def commit(self) -> None:
        """Return when all that was noted before is safe."""
        last = self._last
        while self._safe < last:
            reason = await asyncio.shield(self._sync_soon())
            if reason and self._safe < last:
                raise SpoolError(reason)

    async def probe(self) -> bool:
        """Whether the folder can be written, as tried at most once a second; where it can again, it is used again."""
        if time.monotonic() - self._tried >= _OFTEN:
            self._tried = time.monotonic()
            try:
                await asyncio.to_thread(_try, self._folder)
            except OSError as error:
                self._fail(error)
            else:
                if self.failure:
                    _log.info("spool_writable", folder=str(self._folder))
                self.failure = ""
                if self._again:
                    self._sync_soon()
        return not self.failure

    async def aclose(self) -> None:
        """Leave what is not done to whoever adopts it; nothing can be appended or done afterwards."""
        if self._closed:
            return
        self._closed = True
        with suppress(SpoolError):
            await self.commit()
        if self._syncing is not None:
            await asyncio.shield(self._syncing)
        self._reap()
        for segment in self._segments:
            segment.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Files

    def _put(self, number: int, record: bytes) -> None:
        if self._current is None or self._current.size > self._segment:
            self._current = self._begin()
        try:
            self._where[number] = self._current, self._current.add(record)
        except OSError:
            self._current = None  # what is torn, if it could not be taken back, is to be the end of its file
            raise

    def _begin(self) -> _Segment:
        if self._lock is not None and not os.fstat(self._lock).st_nlink:  # somebody has removed the folder
            os.close(self._lock)
            self._lock = None
        if self._lock is None:
            _make(self._folder)
            self._name, self._lock = _own(self._folder)
        self._begun += 1
        segment = _Segment(self._folder / f"{self._name}.{self._begun:06d}.spool")
        self._segments.append(segment)
        self._folders.add(self._folder)
        return segment

    def _reap(self) -> None:
        """Remove the segments that nobody needs; not while a thread has them in hand."""
        if self._syncing is not None:
            return
        idle = [segment for segment in self._segments if not segment.left and segment is not self._current]
        if not self._where:
            idle, self._current = self._segments, None
        self._segments = [segment for segment in self._segments if segment not in idle]
        for segment in idle:
            segment.remove()
        if idle and not self.full:
            self._told_full = False
        if not self._segments and self._lock is not None:
            _give_back(self._folder / f"{self._name}.lock", self._lock)
            self._lock = None

    # Safety

    def _forget(self, number: int) -> None:
        if (record := self._fresh.pop(number, None)) is not None:
            self._fresh_bytes -= len(record)

    def _sync_soon(self) -> asyncio.Task[str]:
        if self._syncing is None:
            self._syncing = asyncio.ensure_future(self._sync())
        return self._syncing

    async def _sync(self) -> str:
        """Make safe what is fresh; "", or why it cannot be."""
        pause = self._synced + self._commit - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        reason = ""
        try:
            if not await self._synchronise():
                await self._synchronise(last=True)
        except OSError as error:
            self._fail(error)
            reason = self.failure
        self._syncing = None
        self._reap()
        return reason

    async def _synchronise(self, *, last: bool = False) -> bool:
        if self._again:
            self._write_again()
        upto, dirty, folders = self._last, [each for each in self._segments if each.dirty], list(self._folders)
        self._synced = time.monotonic()
        for segment in dirty:
            segment.dirty = False
        try:
            await asyncio.to_thread(_fsync, [segment.fd for segment in dirty], folders)
        except OSError as error:
            self._again, self._current = True, None
            if last:
                raise
            _log.error("spool_fsync_failed", reason=_reason(error), records=len(self._fresh))
            return False
        self._folders.difference_update(folders)
        self._safe = upto
        for number in [number for number in self._fresh if number <= upto]:
            self._forget(number)
        return True

    def _write_again(self) -> None:
        """What is fresh, to a segment that has not failed."""
        self._current = None
        for number, record in self._fresh.items():
            segment, place = self._where[number]
            self._put(number, record)
            segment.done(place)
        self._again = False

    def _fail(self, error: OSError) -> None:
        reason = f"the folder of the spool cannot be written: {_reason(error)}"
        if not self.failure:
            _log.error("spool_not_writable", folder=str(self._folder), reason=_reason(error))
        self.failure = reason


@contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpoolError(f"the folder of the spool cannot be {what}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _fsync(files: Sequence[int], folders: Sequence[Path]) -> None:
    for file in files:
        os.fsync(file)
    for folder in folders:
        entries = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _fsync((), [folder.parent])


def _try(folder: Path) -> None:
    """Do there once what a spool does."""
    _make(folder)
    file = folder / f"{secrets.token_hex(12)}.probe"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        file.unlink()
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        written = 0
        while written < len(_TRIED):
            written += os.write(fd, _TRIED[written:])
        os.fsync(fd)
    finally:
        os.close(fd)


# — whose it is


def _locked(path: Path) -> int | None:
    """The lock file, locked; None: somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)  # the one who had it is still there, or has just removed it
    return None


def _own(folder: Path) -> tuple[str, int]:
    """A name that nobody had before, and its lock; names sort by time."""
    while True:
        name = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        if (lock := _locked(folder / f"{name}.lock")) is not None:
            return name, lock


def _give_back(path: Path, lock: int) -> None:
    with suppress(OSError):
        path.unlink()
    os.close(lock)


# — what is read


class Orphan:
    """What a process left behind. Until `close` nobody else adopts it; it is a context manager that does."""

    def __init__(self, folder: Path, name: str, lock: int) -> None:
        self.name = name
        self.damaged: list[Damage] = []  # so far
        self.refused: list[Damage] = []  # files that are left as they are
        self._path = folder / f"{name}.lock"
        self._lock: int | None = lock
        self._files = sorted(folder.glob(f"{name}.*.spool"))
        self._read: dict[
            Path, list[tuple[int, bytes]]
        ] = {}  # per file, what was given and is not done: place and marker
        self._finished: list[Path] = []

    def __repr__(self) -> str:
        return f"<Orphan {self.name}, {len(self._files)} files, {len(self.damaged)} damages>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def empty(self) -> bool:
        return not self._files

    def records(self) -> Iterator[bytes]:
        """Those that are not done, in order; to be read once. One that was being written again after a failed fsync may
        be among them twice."""
        for file in list(self._files):
            try:
                data = file.read_bytes()
            except OSError as error:
                self.refused.append(Damage(file, 0, 0, f"cannot be read: {_reason(error)}"))
                continue
            if (marker := _marker_of(data)) is None:
                self.refused.append(Damage(file, 0, 0, _unknown(data)))
                continue
            if 0 < len(data) < _HEADER:
                self.damaged.append(Damage(file, 0, len(data), "cut off"))
            elif data and data[:_HEADER] != _MAGIC + marker:
                self.damaged.append(Damage(file, 0, 0, "header"))
            given = self._read.setdefault(file, [])
            for frame in _walk(data, marker):
                if frame.record is None:
                    self.damaged.append(Damage(file, frame.place, frame.end - frame.place, _unread(data, frame)))
                elif not frame.done:
                    given.append((frame.place, marker))
                    yield frame.record
            self._finished.append(file)

    def done(self) -> None:
        """What was given so far need not be kept: it is not given again, and a file that was read to its end goes.
        Raises SpoolError where it may be given again."""
        if self._lock is not None:
            with _telling("written"):
                self._done()

    def _done(self) -> None:
        for file in self._finished:
            file.unlink(missing_ok=True)
            self._files.remove(file)
            del self._read[file]
        self._finished.clear()
        for file, given in self._read.items():
            fd = os.open(file, os.O_WRONLY)
            try:
                for place, marker in given:
                    os.pwrite(fd, _inverse(marker), place)
            finally:
                os.close(fd)
            given.clear()
        if not self._files:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _unknown(data: bytes) -> str:
    version = _VERSION.match(data)
    found = f"version {version[1].decode()}" if version else "no spool"
    return f"{found}, expected version {_MAGIC[-4:-1].decode()}"


def adopt(folder: Path, known: Container[str] = ()) -> Iterator[Orphan]:
    """What processes that are gone have left in the folder, the oldest first; but not those of a name that is known.
    Raises SpoolError."""
    with _telling("read"), suppress(FileNotFoundError):  # nobody has needed it yet
        names = sorted({found[1] for file in folder.iterdir() if (found := _OURS.fullmatch(file.name))})
        for name in names:
            if name in known or (lock := _locked(folder / f"{name}.lock")) is None:
                continue
            orphan = Orphan(folder, name, lock)
            if orphan.empty:
                orphan.done()
                orphan.close()
            else:
                yield orphan

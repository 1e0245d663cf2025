"""Files of numbers by name, in the format of prometheus_client's multiprocess mode, in sets that processes hold.

The files are written and not mapped, as the library would do it: to touch a mapped page on a full disk ends the process
(SIGBUS). A number stands in its place for good; new ones are appended, and then the head says how far they go.

A set is all files `<type>_<number>.db`. A process holds the lock of its set (flock of `<number>.lock`) while it lives;
who starts takes the first set that nobody holds, and goes on in it. So there are no more sets than there were processes
at one time.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import structlog

_USED, _LENGTH, _VALUE = struct.Struct("i"), struct.Struct("i"), struct.Struct("dd")  # the second is a time, not used
_HEADER = 8  # bytes: how many are used, and four of nothing

_log = structlog.get_logger("gateway.metrics")


def _entry(key: str, value: float) -> bytes:
    text = key.encode()
    padded = text + b" " * (8 - (len(text) + _LENGTH.size) % 8)
    return _LENGTH.pack(len(text)) + padded + _VALUE.pack(value, 0.0)


def key_of(family: str, sample: str, labels: Mapping[str, str], meaning: str) -> str:
    """What the library calls a number."""
    return json.dumps([family, sample, labels, meaning], sort_keys=True)


def whole(values: Mapping[str, float]) -> bytes:
    """A file of these, for one that is written anew each time."""
    told = bytearray(_HEADER)
    for key, value in values.items():
        told += _entry(key, value)
    _USED.pack_into(told, 0, len(told))
    return bytes(told)


class Values:
    """A file of numbers by name, of which each has a place. What stood in it before is added to what is put there."""

    def __init__(self, path: Path) -> None:
        try:
            self._image = bytearray(path.read_bytes())
            self._places = dict(_read(self._image))
        except FileNotFoundError:
            self._begin(path)
        except (struct.error, ValueError) as damage:  # the machine has failed, and the disk had not everything yet
            _log.warning("metrics_damaged", file=str(path), reason=type(damage).__name__)
            self._begin(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        del self._image[_USED.unpack_from(self._image)[0] :]
        self._before = {place: _VALUE.unpack_from(self._image, place)[0] for place in self._places.values()}
        self._first, self._last = 0, len(self._image)  # what is to be written; new names begin at _first or behind it

    def _begin(self, path: Path) -> None:
        """A file without a number; who reads meanwhile finds that, or what was there before."""
        self._image, self._places = bytearray(whole({})), {}
        draft = path.with_suffix(".new")
        draft.write_bytes(self._image)
        draft.replace(path)

    def place(self, key: str) -> int:
        """Where the number of this name stands."""
        place = self._places.get(key)
        if place is None:
            self._image += _entry(key, 0.0)
            _USED.pack_into(self._image, 0, len(self._image))
            place = self._places[key] = len(self._image) - _VALUE.size
        return place

    def put(self, place: int, value: float) -> None:
        _VALUE.pack_into(self._image, place, self._before.get(place, 0.0) + value, 0.0)
        self._first = min(self._first, place)
        self._last = max(self._last, place + _VALUE.size)

    def write(self) -> None:
        """Write what was put since the last time: the numbers, and then how far they go."""
        if self._last:
            rest = memoryview(bytes(self._image[self._first : self._last]))  # of the image itself it could not grow
            while rest:
                rest = rest[os.pwrite(self._fd, rest, self._last - len(rest)) :]
            os.pwrite(self._fd, self._image[:_HEADER], 0)
            self._first, self._last = len(self._image), 0

    def close(self) -> None:
        os.close(self._fd)


def _read(image: bytearray) -> Iterator[tuple[str, int]]:
    """The names in a file with their places. Raises struct.error or ValueError where it is none."""
    used = _USED.unpack_from(image)[0]
    at = _HEADER
    while at < used:
        length = _LENGTH.unpack_from(image, at)[0]
        key = image[at + _LENGTH.size : at + _LENGTH.size + length].decode()
        json.loads(key)
        at += _LENGTH.size + length + 8 - (length + _LENGTH.size) % 8
        _VALUE.unpack_from(image, at)
        yield key, at
        at += _VALUE.size


# — sets


@contextmanager
def _held(folder: Path, how: int) -> Iterator[None]:
    """While nobody takes a set, or (LOCK_EX) looks who has one."""
    fd = os.open(folder / "sets.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def claim(folder: Path) -> tuple[int, int]:
    """The first set that nobody holds, and its lock."""
    with _held(folder, fcntl.LOCK_EX):
        for number in count():
            fd = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
            else:
                return number, fd
    raise AssertionError("numbers do not end")


def files_in(folder: Path) -> list[str]:
    """What is told: the files of all sets, but gauges only of those that a process holds."""
    if not folder.is_dir():
        return []
    alive = _living(folder)
    files = sorted(folder.glob("*.db"))
    return [str(file) for file in files if file.name[:5] != "gauge" or file.stem.rpartition("_")[2] in alive]


def _living(folder: Path) -> set[str]:
    found = set()
    with _held(folder, fcntl.LOCK_SH):
        for lock in folder.glob("[0-9]*.lock"):
            fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.add(lock.stem)
            finally:
                os.close(fd)
    return found


def sound(files: Iterable[str]) -> Iterator[str]:
    """Those that can be read; a damaged one is taken over by who starts next, and begins anew."""
    for file in files:
        with suppress(struct.error, ValueError):
            image = bytearray(Path(file).read_bytes())
            list(_read(image))
            yield file

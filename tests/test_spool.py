"""What was appended is read again: whatever dies, fills up or is damaged, and by one process only."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway import spool
from gateway.spool import LONGEST, MIB, Damage, Orphan, Spool, SpoolError, adopt, crc32c
from tests.proving.descriptors import descriptors
from tests.proving.stores import small_disk

pytestmark = pytest.mark.anyio

MAGIC = b"model-gateway spool 001\n"
HEADER, HEAD = 32, 16  # bytes, of a file and of a frame


@asynccontextmanager
async def opened(folder: Path, **how: Any) -> AsyncIterator[Spool]:
    it = Spool(folder, **{"most": 16 * MIB, **how})
    try:
        yield it
    finally:
        await it.aclose()


def files(folder: Path, kind: str = "*") -> list[Path]:
    return sorted(folder.glob(kind))


def taken(folder: Path) -> list[bytes]:
    """All that is left in a folder, and is so no more."""
    found = []
    for orphan in adopt(folder):
        with orphan:
            found += list(orphan.records())
            assert (orphan.damaged, orphan.refused) == ([], [])
            orphan.done()
    return found


def bitwise(data: bytes) -> int:
    """CRC32C as its definition says."""
    left = 0xFFFFFFFF
    for byte in data:
        left ^= byte
        for _ in range(8):
            left = (left >> 1) ^ (0x82F63B78 if left & 1 else 0)
    return left ^ 0xFFFFFFFF


# — the sum, and the form of a file


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4; and the check value of the catalogue of CRCs
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (
            bytes.fromhex(
                "01c00000 00000000 00000000 00000000 14000000 00000400"
                "00000014 00000018 28000000 00000000 02000000 00000000"
            ),
            0xD9963A56,
        ),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_the_sum_is_the_one_of_rfc_3720(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@given(st.binary(max_size=100))
def test_the_sum_is_what_its_definition_says_at_any_length(data: bytes) -> None:
    assert crc32c(data) == bitwise(data)


async def test_a_file_is_a_header_and_frames(tmp_path: Path) -> None:
    async with opened(tmp_path / "state" / "spool") as it:
        for record in (b"first", b"second"):
            it.note(record)
        (file,) = files(tmp_path / "state" / "spool", "*.spool")
        data = file.read_bytes()
    marker = data[24:32]
    assert (data[:24], marker[0]) == (MAGIC, 0xFF)
    expected = data[:HEADER]
    for record in (b"first", b"second"):
        summed = MAGIC + struct.pack("<QI", len(expected), len(record)) + record
        expected += marker + struct.pack("<II", len(record), bitwise(summed)) + record
    assert data == expected


async def test_in_calm_times_there_is_no_file_and_afterwards_none_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    async with opened(folder) as it:
        assert not folder.exists()
        number = await it.append(b"one")
        assert {file.suffix for file in files(folder)} == {".spool", ".lock"}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in files(folder)} == {0o600}
        it.done(number)
        assert (files(folder), len(it), it.size) == ([], 0, 0)
        it.done(await it.append(b"and again"))
        assert files(folder) == []


# — appending


class Fsyncs:
    """How many there were of files, on which threads, and of which folders. Files wait while the gate is not set."""

    def __init__(self) -> None:
        self.number = 0
        self.folders: list[int] = []  # inodes
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    async def begun(self, number: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.number < number:
                await asyncio.sleep(0.001)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, *, fails: Sequence[int] = ()) -> Iterator[Fsyncs]:
    """Sees every fsync; those whose numbers are given fail."""
    real, seen = os.fsync, Fsyncs()

    def fsync(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            seen.number += 1
            seen.threads.add(threading.get_ident())
            number = seen.number
            assert seen.gate.wait(30)
            if number in fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        else:
            seen.folders.append(os.fstat(fd).st_ino)
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield seen


async def test_concurrent_appends_share_an_fsync_and_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [b"record %d" % i for i in range(100)]
    with watched(monkeypatch) as seen:
        async with opened(tmp_path) as it:
            numbers = await asyncio.gather(*map(it.append, records))
            assert seen.number <= 2
            assert threading.get_ident() not in seen.threads
    assert numbers == sorted(set(numbers))
    assert taken(tmp_path) == records


async def test_an_append_returns_when_it_is_on_the_disk_and_the_next_ones_share_the_next_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path) as it:
            seen.gate.clear()
            first = asyncio.ensure_future(it.append(b"first"))
            await seen.begun()
            others = [asyncio.ensure_future(it.append(b"%d" % i)) for i in range(50)]
            await asyncio.sleep(0.02)
            assert not any(each.done() for each in (first, *others))
            seen.gate.set()
            await asyncio.gather(first, *others)
            assert seen.number == 2


async def test_new_files_and_folders_are_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path / "spool", segment=1) as it:
            await it.append(b"one")
            inodes = [folder.stat().st_ino for folder in (tmp_path, tmp_path / "spool")]
            assert seen.folders == inodes
            await it.append(b"to a second file")
            assert seen.folders == [*inodes, inodes[1]]


async def test_one_after_the_other_they_are_an_fsync_per_commit_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path, commit=0.05) as it:
            began = time.monotonic()
            for _ in range(5):
                await it.append(b"x")
            assert time.monotonic() - began > 4 * 0.045, "a timer of uvloop is up to a millisecond early"
            assert seen.number == 5


async def test_what_is_noted_is_written_without_an_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path) as it:
            it.note(b"noted")
            (file,) = files(tmp_path, "*.spool")
            assert file.read_bytes().endswith(b"noted")
            assert seen.number == 0
            await it.commit()
            await it.commit()
            assert seen.number == 1


async def test_what_is_done_during_an_fsync_goes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen, capture_logs() as lines:
        async with opened(tmp_path) as it:
            seen.gate.clear()
            number = it.note(b"one")
            commit = asyncio.ensure_future(it.commit())
            await seen.begun()
            it.done(number)
            assert len(files(tmp_path)) == 2
            seen.gate.set()
            await commit
            assert files(tmp_path) == []
    assert lines == []


async def test_much_that_is_noted_is_made_safe_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path) as it:
            for _ in range(5):
                it.note(bytes(MIB // 4))
            await seen.begun()


async def test_an_append_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path) as it:
            kept = it.note(b"kept")
            seen.gate.clear()
            gone = asyncio.ensure_future(it.append(b"gone"))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            seen.gate.set()
            await it.commit()
            assert len(it) == 1
    assert taken(tmp_path) == [b"kept"]
    assert kept == 1


async def test_nothing_of_the_process_is_left_open(tmp_path: Path) -> None:
    async def once() -> None:
        async with opened(tmp_path, most=MIB, segment=1000) as it:
            numbers = await asyncio.gather(*(it.append(bytes(300)) for _ in range(20)))
            for number in numbers[5:]:
                it.done(number)
            await it.probe()
        assert len(taken(tmp_path)) == 5
        assert files(tmp_path) == []

    await once()  # what the first one opens, threads and all, may stay
    tasks, opens = asyncio.all_tasks(), descriptors()
    await once()
    await once()
    assert asyncio.all_tasks() == tasks
    assert not descriptors() - opens


async def test_a_closed_one_takes_and_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        number = await it.append(b"one")
        await it.aclose()
        it.done(number)
        with pytest.raises(SpoolError, match="closed"):
            await it.append(b"two")
    assert taken(tmp_path) == [b"one"]


# — what is done


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 12))
def test_done_in_any_order_frees_segments_and_is_not_given_again(order: list[int], few: int) -> None:
    async def run(folder: Path) -> None:
        async with opened(folder, segment=250) as it:
            numbers = [it.note(b"%02d" % i + bytes(98)) for i in range(12)]
            assert len(files(folder, "*.spool")) == 6
            for i in order[:few]:
                it.done(numbers[i])
                it.done(numbers[i])
            left = set(range(12)) - set(order[:few])
            assert len(it) == len(left)
            last = {10, 11} if left else set()  # that one is still written to
            segments = {i // 2 for i in left | last}
            assert len(files(folder, "*.spool")) == len(segments)
            assert it.size == sum(file.stat().st_size for file in files(folder, "*.spool"))
        assert [int(record[:2]) for record in taken(folder)] == sorted(left)
        assert files(folder) == []

    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        asyncio.run(run(Path(folder)))


# — no room


async def test_a_full_one_says_so_early_and_then_takes_nothing(tmp_path: Path) -> None:
    with capture_logs() as lines:
        async with opened(tmp_path, most=64 * 1024) as it:
            numbers, early = [], 0
            with pytest.raises(SpoolError, match="the spool is full"):
                for _ in range(100):
                    early += not it.full
                    numbers.append(await it.append(bytes(1000)))
            assert 50 <= early < len(numbers) <= 64
            with pytest.raises(SpoolError, match="the spool is full"):
                it.note(bytes(1000))
            assert it.size == sum(file.stat().st_size for file in files(tmp_path, "*.spool")) <= 64 * 1024
            assert it.failure == ""
            for number in numbers[:20]:
                it.done(number)
            assert not it.full
            await it.append(bytes(1000))
    assert [line["event"] for line in lines] == ["spool_full"]
    assert len(taken(tmp_path)) == len(numbers) - 20 + 1


async def test_a_record_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        with pytest.raises(SpoolError, match=f"{LONGEST + 1} bytes, expected at most {LONGEST}"):
            it.note(bytes(LONGEST + 1))
        await it.append(bytes(LONGEST))
    assert taken(tmp_path) == [bytes(LONGEST)]


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk() as folder:
        yield folder


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is tried whenever asked."""
    monkeypatch.setattr(spool, "_OFTEN", 0.0)


@pytest.mark.usefixtures("often")
async def test_on_a_disk_without_room_nothing_is_torn_and_it_goes_on_when_there_is_room(disk: Path) -> None:
    with capture_logs() as lines:
        async with opened(disk / "spool") as it:
            kept = []
            filler = disk / "filler"
            filler.write_bytes(bytes(600 * 1024))
            with pytest.raises(SpoolError, match="No space left on device"):
                for i in range(2000):
                    record = b"%06d" % i + bytes(1500)
                    await it.append(record)
                    kept.append(record)
            assert len(kept) > 100
            assert "No space left" in it.failure
            assert not await it.probe()
            with pytest.raises(SpoolError, match="No space left"):
                await it.append(b"refused at once")
            filler.unlink()
            assert await it.probe()
            assert it.failure == ""
            kept.append(b"later")
            await it.append(b"later")
    assert [line["event"] for line in lines] == ["spool_not_writable", "spool_writable"]
    assert taken(disk / "spool") == kept


@pytest.mark.usefixtures("often")
async def test_a_disk_that_became_read_only_is_told(disk: Path) -> None:
    def mount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

    mount("ro")
    async with opened(disk / "spool") as it:
        assert not await it.probe()
        assert it.failure == "the folder of the spool cannot be written: Read-only file system"
        with pytest.raises(SpoolError, match="Read-only"):
            it.note(b"one")
        mount("rw")
        assert await it.probe()
        assert files(disk / "spool") == []
        await it.append(b"one")


@pytest.mark.usefixtures("often")
async def test_a_folder_that_is_none_is_told_with_or_without_a_probe(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file")
    async with opened(tmp_path / "spool") as it, opened(tmp_path / "spool") as other:
        assert not await it.probe()
        with pytest.raises(SpoolError, match="the folder of the spool cannot be written: "):
            await other.append(b"one")
        assert other.failure == it.failure != ""
    with pytest.raises(SpoolError, match="cannot be read: Not a directory"):
        list(adopt(tmp_path / "spool"))


async def test_a_folder_is_tried_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        async with opened(tmp_path / "spool") as it:
            assert [await it.probe() for _ in range(5)] == [True] * 5
            assert seen.number == 1
            assert files(tmp_path / "spool") == []


@pytest.mark.parametrize("torn", [False, True])
async def test_a_write_that_ends_halfway_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    """And if it cannot be, what is torn is the end of a file."""
    real = os.pwrite

    def pwrite(fd: int, data: bytes, place: int) -> int:
        if data.endswith(b"unlucky"):
            real(fd, data[:-3], place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, place)

    def ftruncate(fd: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with opened(tmp_path) as it, opened(tmp_path / "other") as other:
        await it.append(b"before")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            if torn:
                patch.setattr(os, "ftruncate", ftruncate)
            for each in (it, other):
                with pytest.raises(SpoolError):
                    each.note(b"unlucky")
            assert files(tmp_path / "other") == []
        assert await it.probe()
        await it.append(b"after")
    (orphan,) = adopt(tmp_path)
    with orphan:
        assert list(orphan.records()) == [b"before", b"after"]
        assert [damage.why for damage in orphan.damaged] == ["cut off"] * torn


async def test_what_a_disk_takes_in_parts_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: real(fd, data[:7], place))
    async with opened(tmp_path) as it:
        await it.append(b"a record of more than seven bytes")
    assert taken(tmp_path) == [b"a record of more than seven bytes"]


async def test_when_somebody_removes_the_folder_the_next_file_has_a_lock_that_can_be_seen(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool", segment=1) as it:
        await it.append(b"lost")
        shutil.rmtree(tmp_path / "spool")
        await it.append(b"kept")
        assert list(adopt(tmp_path / "spool")) == []
    assert taken(tmp_path / "spool") == [b"kept"]


# — an fsync that fails


async def test_what_an_fsync_failed_for_is_written_again_to_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch, fails=[2]) as seen, capture_logs() as lines:
        async with opened(tmp_path) as it:
            await it.append(b"safe")
            await asyncio.gather(*(it.append(b"%d" % i) for i in range(3)))
            assert (seen.number, len(it), it.failure) == (3, 4, "")
            first, second = files(tmp_path, "*.spool")
            assert second.read_bytes()[HEADER + HEAD :].startswith(b"0")
            await it.append(b"next")
            assert second.read_bytes().endswith(b"next")
            assert not first.read_bytes().endswith(b"next")
    assert [line["event"] for line in lines] == ["spool_fsync_failed"]
    assert taken(tmp_path) == [b"safe", b"0", b"1", b"2", b"next"]


@pytest.mark.usefixtures("often")
async def test_when_it_fails_again_appends_are_refused_and_what_was_noted_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch, fails=[2, 3]) as seen, capture_logs() as lines:
        async with opened(tmp_path) as it:
            await it.append(b"safe")
            it.note(b"noted")
            with pytest.raises(SpoolError, match="Input/output error"):
                await it.append(b"refused")
            with pytest.raises(SpoolError, match="Input/output error"):
                it.note(b"refused at once")
            assert len(it) == 2
            assert await it.probe()  # the fourth
            await seen.begun(5)
            await it.commit()
            assert seen.number == 5
            assert (files(tmp_path, "*.spool")[-1].read_bytes().count(b"noted"), it.failure) == (1, "")
    assert [line["event"] for line in lines] == ["spool_fsync_failed", "spool_not_writable", "spool_writable"]
    assert taken(tmp_path) == [b"safe", b"noted"]


# — whose it is


async def test_a_spool_that_is_used_is_not_adopted_even_by_its_own_process(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        await it.append(b"mine")
        assert list(adopt(tmp_path)) == []
    assert taken(tmp_path) == [b"mine"]


async def test_an_orphan_is_given_to_one_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        await it.append(b"one")
    (orphan,) = adopt(tmp_path)
    assert list(adopt(tmp_path)) == []
    assert list(orphan.records()) == [b"one"]
    orphan.close()
    orphan.done()  # it is not its own any more
    assert taken(tmp_path) == [b"one"]
    assert list(adopt(tmp_path)) == []


async def test_what_is_done_of_an_orphan_is_not_given_again(tmp_path: Path) -> None:
    async with opened(tmp_path, segment=100) as it:
        for i in range(10):
            it.note(b"%d" % i + bytes(40))
    (orphan,) = adopt(tmp_path)
    with orphan:
        records = orphan.records()
        given = [next(records)[:1] for _ in range(4)]
        orphan.done()
        next(records)
    assert given == [b"0", b"1", b"2", b"3"]
    assert [record[:1] for record in taken(tmp_path)] == [b"4", b"5", b"6", b"7", b"8", b"9"]
    assert files(tmp_path) == []


async def test_spools_are_adopted_the_oldest_first_and_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.spool").write_text("not ours")
    (tmp_path / f"{'0' * 24}.lock").touch()  # of one that died before its first record
    for name in (b"first", b"second"):
        async with opened(tmp_path) as it:
            await it.append(name)
    assert taken(tmp_path) == [b"first", b"second"]
    assert files(tmp_path) == [tmp_path / "notes.spool"]
    assert list(adopt(tmp_path / "nobody was here")) == []


async def test_a_name_whose_lock_another_process_has_just_taken_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    lock = spool._locked(tmp_path / f"{1:016x}aaaaaaaa.lock")
    assert lock is not None
    async with opened(tmp_path) as it:
        await it.append(b"one")
        assert files(tmp_path, "*.spool")[0].name == f"{1:016x}bbbbbbbb.000001.spool"
    os.close(lock)


async def test_a_lock_that_another_process_has_just_removed_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    removed: list[Path] = []

    def flock(fd: int, how: int) -> None:
        if not removed:
            removed.extend(files(tmp_path))
            removed[0].unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    async with opened(tmp_path) as it:
        await it.append(b"one")
        (lock,) = files(tmp_path, "*.lock")
        assert lock not in removed
        assert list(adopt(tmp_path)) == []


CHILD = """
import asyncio, sys
from pathlib import Path
from gateway.spool import Spool, adopt

async def writes(folder):
    it = Spool(folder, most=1 << 28, segment=20_000)
    async def one(i):
        for j in range(1_000_000):
            record = b"%d %d" % (i, j)
            await it.append(record + bytes(500))
            sys.stdout.buffer.write(record + b"\\n")
            sys.stdout.buffer.flush()
    await asyncio.gather(*map(one, range(8)))

def adopts(folder):
    print("ready", flush=True)
    sys.stdin.readline()
    for orphan in adopt(folder):
        with orphan:
            print(*(record.decode() for record in orphan.records()), flush=True)
            orphan.done()

def holds(folder):
    for orphan in adopt(folder):
        print("held", flush=True)
        sys.stdin.readline()

what, folder = sys.argv[1], Path(sys.argv[2])
asyncio.run(writes(folder)) if what == "writes" else {"adopts": adopts, "holds": holds}[what](folder)
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that does one thing with a folder."""
    started = []

    def start(what: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, what, str(tmp_path / "spool")]
        started.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(spool.__file__).parents[1], bufsize=0
            )
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()
        for pipe in (each.stdin, each.stdout):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize("after", [1, 50, 777])
def test_whatever_was_acknowledged_before_a_kill_is_in_the_orphan_in_order(
    tmp_path: Path, child: Callable[[str], subprocess.Popen[bytes]], after: int
) -> None:
    it = child("writes")
    assert it.stdout is not None
    told = [it.stdout.readline() for _ in range(after)]
    it.send_signal(signal.SIGKILL)
    told += [line for line in it.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    it.wait()
    found = []
    for orphan in adopt(tmp_path / "spool"):
        with orphan:
            found += [record[:-500] + b"\n" for record in orphan.records()]
            assert {damage.why for damage in orphan.damaged} <= {"cut off"}
    assert set(told) <= set(found)
    assert len(set(found)) == len(found)
    for i in range(8):
        mine = [record for record in found if record.startswith(b"%d " % i)]
        assert mine == [b"%d %d\n" % (i, j) for j in range(len(mine))]


async def test_many_processes_that_adopt_at_once_get_each_orphan_once(
    tmp_path: Path, child: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    for i in range(30):
        async with opened(tmp_path / "spool") as it:
            await it.append(b"%d" % i)
    adopters = [child("adopts") for _ in range(4)]
    for each in adopters:
        assert each.stdout is not None
        assert each.stdout.readline() == b"ready\n"
    for each in adopters:
        assert each.stdin is not None
        each.stdin.write(b"go\n")
    found = b"".join(each.communicate(timeout=30)[0] for each in adopters).split()
    assert sorted(map(int, found)) == list(range(30))
    assert files(tmp_path / "spool") == []


async def test_an_adopter_that_dies_leaves_the_orphan_to_the_next_one(
    tmp_path: Path, child: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    async with opened(tmp_path / "spool") as it:
        await it.append(b"one")
    other = child("holds")
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    assert taken(tmp_path / "spool") == []
    other.kill()
    other.wait()
    assert taken(tmp_path / "spool") == [b"one"]


# — damage

NAME = f"{7:024x}"


class Case:
    """A file as a spool wrote it, and what should be read of it."""

    def __init__(self, data: bytes, records: list[bytes], done: set[int]) -> None:
        self.data = data
        self.done = done
        self.records = records
        ends = [HEADER]
        for record in records:
            ends.append(ends[-1] + HEAD + len(record))
        self.ends = ends
        assert ends[-1] == len(data)

    def expected(self, first: int | None = None) -> list[bytes]:
        return [record for i, record in enumerate(self.records[:first]) if i not in self.done]


async def _case(folder: Path, parts: list[bytes | None], done: set[int]) -> Case:
    """None among the parts: a record that is the spool itself, as it is then."""
    records: list[bytes] = []
    async with opened(folder) as it:
        for part in parts:
            found = files(folder, "*.spool")
            records.append(part if part is not None else found[0].read_bytes() if found else MAGIC)
            it.note(records[-1])
        for i in done:
            if i + 1 < len(parts):
                it.done(i + 1)
        (file,) = files(folder, "*.spool")
        data = file.read_bytes()
    return Case(data, records, {i for i in done if i + 1 < len(parts)})


cases = st.tuples(
    st.lists(
        st.one_of(
            st.none(),
            st.binary(max_size=40),
            st.sampled_from([b"", MAGIC, b'{"id":"a","tokens":7}', b"\xff" * 16, bytes(16)]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sets(st.integers(0, 4), max_size=2),
)


def case_of(drawn: tuple[list[bytes | None], set[int]]) -> Case:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        return asyncio.run(_case(Path(folder), *drawn))


def read(folder: Path, data: bytes) -> tuple[list[bytes], Orphan]:
    file = os.open(folder / f"{NAME}.000001.spool", os.O_WRONLY | os.O_CREAT)
    os.pwrite(file, data, 0)  # over what was there: to empty a file first is slow
    os.ftruncate(file, len(data))
    os.close(file)
    (orphan,) = adopt(folder)
    with orphan:
        return list(orphan.records()), orphan


@settings(max_examples=12, deadline=None)
@given(cases, st.integers(1, 255))
def test_a_changed_byte_anywhere_loses_one_record_at_most_and_is_told(
    drawn: tuple[list[bytes | None], set[int]], mask: int
) -> None:
    case = case_of(drawn)
    whole, data = case.expected(), bytearray(case.data)
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        found, orphan = read(Path(folder), case.data)
        assert (found, orphan.damaged, orphan.refused) == (whole, [], [])
        for place in range(len(data)):
            for change in {mask, 0x01, 0xFF}:
                data[place] ^= change
                found, orphan = read(Path(folder), bytes(data))
                data[place] ^= change
                assert orphan.damaged, place
                assert not orphan.refused, place
                if place < HEADER:
                    assert found == whole, place
                    continue
                hit = next(i for i, end in enumerate(case.ends[1:]) if place < end)
                expected = [r for i, r in enumerate(case.records) if i != hit and i not in case.done]
                (damage,) = orphan.damaged
                if len(case.records) == 1 and damage.why == "header":  # of two markers either may be the damaged one
                    assert found in (whole, []), place
                    continue
                assert found == expected, place
                assert (damage.offset, damage.lost) == (case.ends[hit], HEAD + len(case.records[hit])), place


@settings(max_examples=30, deadline=None)
@given(cases)
def test_of_a_file_that_is_cut_off_anywhere_the_whole_records_are_read_and_the_rest_is_told(
    drawn: tuple[list[bytes | None], set[int]],
) -> None:
    case = case_of(drawn)
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        for size in range(len(case.data)):
            found, orphan = read(Path(folder), case.data[:size])
            whole = sum(end <= size for end in case.ends[1:])
            assert found == case.expected(whole), size
            start = case.ends[whole] if size >= HEADER else 0
            file = Path(folder) / f"{NAME}.000001.spool"
            told = [Damage(file, start, size - start, "cut off")] if size > start else []
            assert (orphan.damaged, orphan.refused) == (told, []), size


def within(some: list[bytes], all: list[bytes]) -> bool:
    """Whether they are among them, in order."""
    left = iter(all)
    return [each for each in some if each not in left] == []


@settings(max_examples=50, deadline=None)
@given(cases, st.integers(0, 400), st.binary(min_size=1, max_size=100))
def test_whatever_is_overwritten_nothing_is_read_that_was_not_written(
    drawn: tuple[list[bytes | None], set[int]], place: int, other: bytes
) -> None:
    case = case_of(drawn)
    data = bytearray(case.data)
    data[place : place + len(other)] = other
    hit = {
        i
        for i, (start, end) in enumerate(zip(case.ends, case.ends[1:], strict=False))
        if start < place + len(other) and place < end
    }
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        found, _ = read(Path(folder), bytes(data[: len(case.data)]))
    assert within(found, case.expected())
    if place >= HEADER:
        assert within([r for i, r in enumerate(case.records) if i not in hit | case.done], found)


async def test_an_old_block_of_the_disk_is_no_record(tmp_path: Path) -> None:
    """The bytes of one spool at the same place of another."""
    old = await _case(tmp_path / "old", [b"old", b"older"], set())
    new = await _case(tmp_path / "new", [b"new", b"newer"], set())
    found, orphan = read(tmp_path, new.data[: new.ends[1]] + old.data[old.ends[1] :])
    assert found == [b"new"]
    assert [(damage.offset, damage.lost) for damage in orphan.damaged] == [(new.ends[1], HEAD + 5)]


async def test_a_frame_at_another_place_is_no_record(tmp_path: Path) -> None:
    case = await _case(tmp_path / "spool", [b"first", b"other"], set())
    twice = case.data + case.data[case.ends[0] : case.ends[1]]
    found, orphan = read(tmp_path, twice)
    assert found == [b"first", b"other"]
    assert [(damage.offset, damage.why) for damage in orphan.damaged] == [(len(case.data), "damaged")]


async def test_a_frame_is_found_right_behind_what_looks_like_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as it:
        it.note(b"first")
        (file,) = files(tmp_path / "spool", "*.spool")
        marker = file.read_bytes()[24:32]
        it.note(marker)
        it.note(b"last")
        data = bytearray(file.read_bytes())
    data[HEADER + HEAD + 5 + 8] ^= 1  # the length of the second
    found, _ = read(tmp_path, bytes(data))
    assert found == [b"first", b"last"]


async def test_much_damage_is_passed_in_no_time(tmp_path: Path) -> None:
    case = await _case(tmp_path / "spool", [b"only"], set())
    marker, rest = case.data[24:32], os.urandom(MIB)
    long, too_long = (struct.pack("<8sII", marker, size, 0) * 64 for size in (MIB // 16, 4 * MIB))
    for filler in (bytes(8 * MIB), marker * (16 * 1024), rest * 8, long, too_long + rest * 8):
        began = time.process_time()
        found, orphan = read(tmp_path, case.data + filler)
        assert time.process_time() - began < 5
        assert (found, len(orphan.damaged), orphan.damaged[0].lost) == ([b"only"], 1, len(filler))


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"model-gateway spool 002\n", "version 002, expected version 001"),
        (b"something quite different", "no spool, expected version 001"),
    ],
)
async def test_a_file_of_an_unknown_version_is_told_and_kept(tmp_path: Path, head: bytes, told: str) -> None:
    async with opened(tmp_path) as it:
        await it.append(b"ours")
    (file,) = files(tmp_path, "*.spool")
    other = file.with_name(file.name.replace("000001", "000002"))
    other.write_bytes(head + bytes(100))
    (orphan,) = adopt(tmp_path)
    with orphan:
        assert list(orphan.records()) == [b"ours"]
        assert (orphan.damaged, orphan.refused) == ([], [Damage(other, 0, 0, told)])
        orphan.done()
    assert files(tmp_path, "*.spool") == [other]
    assert list(adopt(tmp_path, known={orphan.name})) == []
    (orphan,) = adopt(tmp_path)
    with orphan:
        assert list(orphan.records()) == []


async def test_a_file_that_cannot_be_read_is_told_and_kept(tmp_path: Path) -> None:
    case = await _case(tmp_path / "spool", [b"a"], set())
    (tmp_path / f"{NAME}.000002.spool").write_bytes(case.data)
    (folder := tmp_path / f"{NAME}.000001.spool").mkdir()
    (orphan,) = adopt(tmp_path)
    with orphan:
        assert list(orphan.records()) == [b"a"]
        assert orphan.refused == [Damage(folder, 0, 0, "cannot be read: Is a directory")]
        orphan.done()
    assert files(tmp_path, "*.spool") == [folder]


async def test_what_cannot_be_marked_as_done_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        await it.append(b"one")
    (orphan,) = adopt(tmp_path)
    with orphan:
        assert list(orphan.records()) == [b"one"]
        file = orphan._files[0]
        with pytest.raises(SpoolError, match="cannot be written: Is a directory"):
            file.unlink()
            file.mkdir()
            orphan.done()
        file.rmdir()
        orphan.done()
    assert files(tmp_path) == []


async def test_a_damaged_file_is_removed_when_what_could_be_read_is_done(tmp_path: Path) -> None:
    case = await _case(tmp_path / "spool", [b"a", b"b", b"c"], set())
    damaged = case.data[:-1] + b"x"
    (file := tmp_path / f"{NAME}.000001.spool").write_bytes(damaged)
    (orphan,) = adopt(tmp_path)
    with orphan:
        assert list(orphan.records()) == [b"a", b"b"]
        assert orphan.damaged == [Damage(file, case.ends[2], HEAD + 1, "damaged")]
        orphan.done()
    assert files(tmp_path) == [tmp_path / "spool"]

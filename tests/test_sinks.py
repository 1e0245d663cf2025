"""A row that was delivered is in a file that stays, or with a receiver that said so; and what went wrong is told by
whose fault it is: the row's, or the moment's."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway import sinks
from gateway.delivery import Rejected, Row, Unavailable
from gateway.sinks import CloudEvents, JsonLines
from tests.proving.backend import Backend, Peer, Step
from tests.proving.descriptors import descriptors
from tests.proving.rows import NOON, record, row

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent.parent
TOKEN = "a-token-that-nobody-else-knows"
PATH = "/api/v1/a-path-that-nobody-else-knows"


# — files


@asynccontextmanager
async def files(folder: Path, rotate: int = 2**20, every: float = 3600.0) -> AsyncIterator[JsonLines]:
    one = JsonLines(folder, rotate, every)
    await one.open()
    try:
        yield one
    finally:
        await one.aclose()


def closed(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def pending(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lines(folder: Path) -> list[dict[str, Any]]:
    """All that is in closed files, as a strict reader of JSON lines has it."""
    found = [line for path in closed(folder) for line in path.read_bytes().splitlines(keepends=True)]
    assert all(line.endswith(b"\n") for line in found)
    return [json.loads(line) for line in found]


def ids(folder: Path) -> list[str]:
    return sorted(line["id"] for line in lines(folder))


def sizes(count: int) -> int:
    """How many bytes so many lines of this length are."""
    return sum(len(sinks._line(row(number))) for number in range(count))


async def test_a_line_is_the_row_as_stored_with_its_entry_and_its_time(tmp_path: Path) -> None:
    delivered = row(7, at=NOON + 1, entry="1795348800005-3", user='Zoë \u2028 \n " {', served_model=None)
    async with files(tmp_path) as one:
        await one.deliver([delivered])
    (line,) = lines(tmp_path)
    assert {"entry": line.pop("entry"), "written_ms": line.pop("written_ms")} == {
        "entry": "1795348800005-3",
        "written_ms": NOON + 1,
    }
    assert msgspec.convert(line, type=type(delivered.record)) == delivered.record
    assert line == json.loads(delivered.text)


async def test_a_row_that_is_stored_on_several_lines_is_on_one(tmp_path: Path) -> None:
    text = json.dumps(json.loads(row(1).text), indent=2).encode() + b"\n"
    async with files(tmp_path) as one:
        await one.deliver([Row("1-1", NOON, record(1), text), row(2)])
    assert ids(tmp_path) == ["request-1", "request-2"]


@given(st.text(), st.integers(min_value=0, max_value=2**60), st.integers(min_value=-(2**60), max_value=2**60))
def test_any_row_is_one_line_that_any_reader_of_json_reads(user: str, at: int, tokens: int) -> None:
    kept = row(1, at=at, user=user.encode(errors="replace").decode(), input_tokens=tokens)
    line = sinks._line(kept)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"entry": kept.entry, "written_ms": at, **json.loads(kept.text)}


async def test_what_was_delivered_is_synced_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, int] = {}
    really = os.fsync

    def fsync(fd: int) -> None:
        really(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        synced[path.name] = path.stat().st_size if path.is_file() else len(list(path.iterdir()))

    monkeypatch.setattr(os, "fsync", fsync)
    async with files(tmp_path) as one:
        for number in range(3):
            await one.deliver([row(number)])
            (part,) = pending(tmp_path)
            assert synced[part.name] == part.stat().st_size == sizes(number + 1)
            assert synced[tmp_path.name] == 1, "the name of the file, too"


async def test_a_file_is_closed_before_it_is_longer_than_it_may_be(tmp_path: Path) -> None:
    async with files(tmp_path, rotate=sizes(3)) as one:
        for number in range(7):
            await one.deliver([row(number)])
            assert all(path.stat().st_size <= sizes(3) for path in [*closed(tmp_path), *pending(tmp_path)])
        assert (len(closed(tmp_path)), len(pending(tmp_path))) == (2, 1)
    assert [len(path.read_bytes().splitlines()) for path in closed(tmp_path)].count(3) == 2
    assert ids(tmp_path) == [f"request-{number}" for number in range(7)]


async def test_a_batch_that_is_longer_than_a_file_may_be_is_a_file(tmp_path: Path) -> None:
    async with files(tmp_path, rotate=10) as one:
        await one.deliver([row(1), row(2)])
        await one.deliver([row(3)])
        assert [len(path.read_bytes().splitlines()) for path in closed(tmp_path)] == [2]
    assert ids(tmp_path) == ["request-1", "request-2", "request-3"]


async def test_a_file_is_closed_when_it_is_old_though_nothing_comes(tmp_path: Path) -> None:
    async with files(tmp_path, every=0.3) as one:
        for number in range(2):
            await one.deliver([row(number)])
            assert len(pending(tmp_path)) == 1
            while pending(tmp_path):
                await asyncio.sleep(0.01)
            assert len(closed(tmp_path)) == number + 1


async def test_a_closed_file_never_changes(tmp_path: Path) -> None:
    async with files(tmp_path, rotate=sizes(2)) as one:
        seen: dict[Path, bytes] = {}
        for number in range(9):
            await one.deliver([row(number)])
            for path in closed(tmp_path):
                assert seen.setdefault(path, path.read_bytes()) == path.read_bytes()
    async with files(tmp_path):
        pass
    assert {path: path.read_bytes() for path in seen} == seen


async def test_a_sink_that_was_given_nothing_leaves_no_file(tmp_path: Path) -> None:
    async with files(tmp_path / "a" / "b") as one:
        assert repr(one) == f"<JsonLines {tmp_path}/a/b, no file>"
    assert names(tmp_path / "a" / "b") == []


async def test_nobody_else_gets_into_a_folder_that_is_made(tmp_path: Path) -> None:
    async with files(tmp_path / "usage") as one:
        await one.deliver([row(1)])
    assert (tmp_path / "usage").stat().st_mode & 0o777 == 0o700
    assert closed(tmp_path / "usage")[0].stat().st_mode & 0o007 == 0


async def test_a_name_tells_when_the_file_was_begun(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    async with files(tmp_path) as one:
        await one.deliver([row(1)])
    said = re.fullmatch(r"usage-(\d{8}T\d{6})Z-[0-9a-f]{8}\.jsonl", closed(tmp_path)[0].name)
    assert said is not None
    assert before <= datetime.strptime(said[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC) <= datetime.now(UTC)


# — files of others, and of the dead


async def test_exporters_that_share_a_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    async def export(own: int) -> None:
        for start in range(5):
            async with files(tmp_path, rotate=sizes(4)) as one:
                for number in range(10):
                    await one.deliver([row(own * 1000 + start * 100 + number)])

    with capture_logs() as logged:
        await asyncio.gather(*map(export, range(4)))
    expected = [o * 1000 + s * 100 + n for o in range(4) for s in range(5) for n in range(10)]
    assert ids(tmp_path) == sorted(f"request-{number}" for number in expected)
    assert (pending(tmp_path), logged) == ([], [])


async def test_a_file_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    async with files(tmp_path) as writer:
        await writer.deliver([row(1)])
        (part,) = pending(tmp_path)
        async with files(tmp_path):
            assert pending(tmp_path) == [part]
        await writer.deliver([row(2)])
    assert ids(tmp_path) == ["request-1", "request-2"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_closed_while_its_lock_was_waited_for_is_not_ours(tmp_path: Path, replaced: bool) -> None:
    part = tmp_path / "usage-20261101T000000Z-00000000.jsonl.part"
    with part.open("wb") as mine:
        part.rename(part.with_suffix(""))
        if replaced:
            part.touch()
        assert not sinks._locked(mine.fileno(), part)
        assert sinks._locked(mine.fileno(), part.with_suffix(""))


@pytest.mark.parametrize("cut", [1, 10, -1])
async def test_a_line_that_was_cut_short_is_cut_off_and_told(tmp_path: Path, cut: int) -> None:
    last = sinks._line(row(3))[:-1][:cut]
    (tmp_path / "usage-20261101T000000Z-00000000.jsonl.part").write_bytes(
        sinks._line(row(1)) + sinks._line(row(2)) + last
    )
    with capture_logs() as logged:
        async with files(tmp_path):
            pass
    assert ids(tmp_path) == ["request-1", "request-2"]
    assert pending(tmp_path) == []
    assert logged == [
        {
            "event": "export_line_cut",
            "log_level": "warning",
            "file": "usage-20261101T000000Z-00000000.jsonl.part",
            "bytes": len(last),
        }
    ]


@pytest.mark.parametrize("content", [b"", b'{"entry"'])
async def test_a_file_without_a_whole_line_goes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "usage-20261101T000000Z-00000000.jsonl.part").write_bytes(content)
    async with files(tmp_path):
        pass
    assert names(tmp_path) == []


async def test_what_is_not_ours_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "other.jsonl.part", "usage-old.jsonl"):
        (tmp_path / name).write_bytes(b"not a line")
    async with files(tmp_path) as one:
        await one.deliver([row(1)])
    assert [(tmp_path / name).read_bytes() for name in ("notes.txt", "other.jsonl.part", "usage-old.jsonl")] == [
        b"not a line"
    ] * 3


EXPORTER = """
import asyncio, sys
from gateway.sinks import JsonLines
from tests.proving.rows import row

async def main(folder, own):
    one = JsonLines(folder, 20_000, 3600)
    await one.open()
    for number in range(10**9):
        await one.deliver([row(own * 10**6 + 10 * number + n) for n in range(10)])
        print(own * 10**6 + 10 * number, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def killed(folder: Path, own: int, after: int) -> set[str]:
    """What an exporter had acknowledged that is killed after so many batches."""
    words = [sys.executable, "-c", EXPORTER, str(folder), str(own)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=HERE) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    first = [int(line) for line in said if line.endswith(b"\n")]
    return {f"request-{number + n}" for number in first for n in range(10)}


async def test_what_was_acknowledged_before_a_kill_is_in_a_closed_file_after_the_next_start(tmp_path: Path) -> None:
    acknowledged = {id for own in range(4) for id in await asyncio.to_thread(killed, tmp_path, own, 20 + 7 * own)}
    async with files(tmp_path):
        pass
    assert pending(tmp_path) == []
    assert len(acknowledged) >= 4 * 200
    assert acknowledged <= set(ids(tmp_path))
    assert len(ids(tmp_path)) == len(set(ids(tmp_path)))
    assert len(ids(tmp_path)) - len(acknowledged) <= 4 * 10, "at most the batch that was under way"


# — files that cannot be written


def failing(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> Callable[[], None]:
    """Let a call of the system fail with this number of an error, until what is returned is called."""

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    really = getattr(os, call)
    monkeypatch.setattr(os, call, fails)
    return lambda: monkeypatch.setattr(os, call, really)


@pytest.fixture
def small_disk() -> Any:
    """A file system that really fills."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


async def test_a_disk_that_is_full_is_unavailable_and_no_line_in_a_file_is_torn(small_disk: Path) -> None:
    async with files(small_disk) as one:
        with pytest.raises(Unavailable) as error:
            for first in range(0, 1000, 7):
                await one.deliver([row(number) for number in range(first, first + 7)])
        assert str(error.value) == f"{small_disk}: No space left on device, expected a folder that can be written"
        before = ids(small_disk)
        assert len(before) == first
        with pytest.raises(Unavailable, match="No space left on device"):
            await one.deliver([row(number) for number in range(first, first + 7)])
        assert ids(small_disk) == before
        closed(small_disk)[0].unlink()  # somebody makes room
        await one.deliver([row(number) for number in range(7)])
    assert ids(small_disk) == sorted(f"request-{number}" for number in range(7))
    assert pending(small_disk) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_after_a_sync_that_failed_another_file_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What a failed sync has not written may be dropped from the cache, and the next sync says that all is well."""
    async with files(tmp_path) as one:
        await one.deliver([row(1)])
        (part,) = pending(tmp_path)
        mended = failing(monkeypatch, "fsync", number)
        with pytest.raises(Unavailable, match=re.escape(os.strerror(number))):
            await one.deliver([row(2)])
        mended()
        await one.deliver([row(2)])
        assert [json.loads(line)["id"] for line in part.read_bytes().splitlines()] == ["request-1"]
    async with files(tmp_path):  # if it could not be closed, it is now
        pass
    assert set(ids(tmp_path)) == {"request-1", "request-2"}


async def test_a_file_that_could_not_be_closed_is_closed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = JsonLines(tmp_path, 2**20, 3600)
    await one.open()
    await one.deliver([row(1)])
    with monkeypatch.context() as broken, capture_logs() as logged:
        broken.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "")))
        await one.aclose()
    assert [(line["event"], line["reason"]) for line in logged] == [("export_file_not_closed", "Read-only file system")]
    assert len(pending(tmp_path)) == 1
    async with files(tmp_path):
        pass
    assert ids(tmp_path) == ["request-1"]


async def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="file/usage: Not a directory, expected a folder that can be written"):
        await JsonLines(tmp_path / "file" / "usage", 10, 10).open()


async def test_a_folder_that_was_removed_is_unavailable_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    async with files(folder) as one:
        folder.rmdir()
        with pytest.raises(Unavailable, match="usage: No such file or directory"):
            await one.deliver([row(1)])
        folder.mkdir()
        await one.deliver([row(1)])
    assert ids(folder) == ["request-1"]


async def test_a_right_that_is_lacking_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with files(tmp_path) as one:
        mended = failing(monkeypatch, "open", errno.EACCES)
        with pytest.raises(Unavailable, match="Permission denied"):
            await one.deliver([row(1)])
        mended()
        await one.deliver([row(1)])
    assert ids(tmp_path) == ["request-1"]


async def test_no_descriptor_is_left_open_by_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with files(tmp_path) as one:
        before = descriptors()
        for call in ("write", "fsync"):
            mended = failing(monkeypatch, call, errno.EIO)
            for _ in range(5):
                with pytest.raises(Unavailable):
                    await one.deliver([row(1)])
            mended()
        assert not descriptors() - before


async def test_a_delivery_that_is_cancelled_ends_before_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, begun = os.fsync, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(fd: int) -> None:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.2)
        really(fd)

    async with files(tmp_path) as one:
        await one.deliver([row(1)])
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", slow)
            task = asyncio.ensure_future(one.deliver([row(2)]))
            await begun.wait()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await one.aclose()
    assert ids(tmp_path) == ["request-1", "request-2"]
    assert pending(tmp_path) == []


# — CloudEvents

MEMBERS = {"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"}


class Meter:
    """A receiver that takes CloudEvents 1.0 by the letter, and knows by source and id what it has had."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], dict[str, Any]] = {}
        self.batches: list[int] = []

    async def take(self, peer: Peer) -> None:
        await peer.request()
        request = peer.requests[-1]
        headers = {name.decode(): value.decode() for name, value in request.headers}
        assert request.line == b"POST %b HTTP/1.1" % PATH.encode()
        assert headers["content-type"] == "application/cloudevents-batch+json"
        assert headers["authorization"] == f"Bearer {TOKEN}"
        assert "cookie" not in headers
        events = json.loads(request.body)
        assert 1 <= len(events) <= 100
        self.batches.append(len(events))
        for event in events:
            assert set(event) == MEMBERS
            assert event["specversion"] == "1.0"
            assert all(isinstance(event[name], str) and event[name] for name in MEMBERS - {"data"})
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
            assert datetime.fromisoformat(event["time"]).tzinfo is not None
            assert event["datacontenttype"] == "application/json"
            self.kept.setdefault((event["source"], event["id"]), event)


def answers(meter: Meter, *replies: bytes | Step) -> Step:
    """Takes request after request, and gives each its reply, the last one again and again."""

    async def serve(peer: Peer) -> None:
        while True:
            try:
                await meter.take(peer)
            except asyncio.IncompleteReadError:
                return
            reply = replies[min(len(meter.batches), len(replies)) - 1]
            if callable(reply):
                await reply(peer)
                return
            if isinstance(reply, bytes):
                await peer.send(reply)

    return serve


def status(code: int, *fields: str, body: str = "") -> bytes:
    head = "".join(f"{field}\r\n" for field in fields)
    length = "" if code == 204 else f"content-length: {len(body)}\r\n"
    return f"HTTP/1.1 {code} X\r\n{length}{head}\r\n{body}".encode()


DONE = status(204)


@asynccontextmanager
async def receiver(*replies: bytes | Step, timeout: float = 10.0) -> AsyncIterator[tuple[CloudEvents, Meter, Backend]]:
    meter = Meter()
    async with Backend(answers(meter, *(replies or (DONE,)))) as backend:
        one = CloudEvents(backend.url + PATH, TOKEN, "model-gateway", "tokens", timeout=timeout)
        await one.open()
        try:
            yield one, meter, backend
        finally:
            await one.aclose()


async def test_a_row_is_an_event_whose_data_is_the_row(tmp_path: Path) -> None:
    delivered = row(7, at=NOON + 45, user="Zoë", served_model=None)
    async with receiver() as (one, meter, _):
        await one.deliver([delivered])
    assert list(meter.kept.values()) == [
        {
            "specversion": "1.0",
            "id": "request-7",
            "source": "model-gateway",
            "type": "tokens",
            "subject": "research",
            "time": "2026-11-22T12:00:00.045Z",
            "datacontenttype": "application/json",
            "data": json.loads(delivered.text),
        }
    ]


@given(st.integers(min_value=0, max_value=253_402_300_799_999))
def test_the_time_of_an_event_is_exact(ms: int) -> None:
    told = datetime.fromisoformat(sinks._rfc3339(ms))
    assert told.timestamp() == pytest.approx(ms / 1000, abs=1e-4)
    assert int(told.timestamp()) * 1000 + told.microsecond // 1000 == ms
    assert told.microsecond % 1000 == 0


@pytest.mark.parametrize(
    ("count", "batches"), [(1, [1]), (100, [100]), (101, [100, 1]), (250, [100, 100, 50]), (0, [])]
)
async def test_no_batch_has_more_than_a_hundred_events(count: int, batches: list[int]) -> None:
    async with receiver() as (one, meter, backend):
        await one.deliver([row(number) for number in range(count)])
        assert len(backend.peers) <= 1, "one connection for all"
    assert meter.batches == batches
    assert [id for _, id in meter.kept] == [f"request-{number}" for number in range(count)]


async def test_what_is_delivered_again_is_known_by_its_id() -> None:
    rows = [row(number) for number in range(150)]
    async with receiver(DONE, status(503), DONE) as (one, meter, _):
        with pytest.raises(Unavailable):
            await one.deliver(rows)
        await one.deliver(rows)
        await one.deliver(rows)
    assert len(meter.kept) == 150
    assert sum(event["data"]["input_tokens"] for event in meter.kept.values()) == sum(range(100, 250))


@pytest.mark.parametrize("code", [200, 201, 202, 204])
async def test_what_is_taken_is_delivered(code: int) -> None:
    async with receiver(status(code, body="" if code == 204 else "{}")) as (one, meter, _):
        await one.deliver([row(1)])
        await one.deliver([row(2)])
    assert len(meter.kept) == 2


@pytest.mark.parametrize("code", [400, 409, 413, 422])
async def test_what_is_said_of_the_events_rejects_them(code: int) -> None:
    async with receiver(status(code, body="request-1 is bad, and so is its user")) as (one, _, _):
        with pytest.raises(Rejected) as error:
            await one.deliver([row(1)])
    assert str(error.value) == f"127.0.0.1: status {code}, expected 2xx"


@pytest.mark.parametrize("code", [301, 307, 401, 403, 404, 405, 408, 415, 425, 429, 500, 502, 503, 504])
async def test_what_time_or_a_person_can_mend_is_unavailable(code: int) -> None:
    async with receiver(status(code, "location: /elsewhere", body=TOKEN), DONE) as (one, meter, _):
        with pytest.raises(Unavailable) as error:
            await one.deliver([row(1)])
        assert (str(error.value), error.value.retry_after) == (f"127.0.0.1: status {code}, expected 2xx", None)
        await one.deliver([row(1)])
    assert meter.batches == [1, 1], "a redirect is not followed"


@pytest.mark.parametrize(
    ("told", "expected"),
    [("7", 7.0), ("0", 0.0), ("999999", 3600.0), ("9" * 5000, 3600.0), ("soon", None), ("-1", None), ("1.5", None)],
)
async def test_a_receiver_says_how_long_to_wait(told: str, expected: float | None) -> None:
    async with receiver(status(429, f"retry-after: {told}")) as (one, _, _):
        with pytest.raises(Unavailable) as error:
            await one.deliver([row(1)])
    assert error.value.retry_after == expected


async def test_a_receiver_may_say_until_when_to_wait() -> None:
    soon = datetime.fromtimestamp(time.time() + 60, UTC)
    async with receiver(
        status(503, f"retry-after: {format_datetime(soon, usegmt=True)}"),
        status(503, "retry-after: Sun, 06 Nov 1994 08:49:37 GMT"),
    ) as (one, _, _):
        for least, most in ((50, 60), (0, 0)):
            with pytest.raises(Unavailable) as error:
                await one.deliver([row(1)])
            assert error.value.retry_after is not None
            assert least <= error.value.retry_after <= most


async def hangs(peer: Peer) -> None:
    await peer.hung_up()


async def cuts_an_answer(peer: Peer) -> None:
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-len")
    await peer.reset()


async def talks_nonsense(peer: Peer) -> None:
    await peer.send(b"220 mail.example ESMTP\r\n\r\n")


@pytest.mark.parametrize("reply", [Peer.close, Peer.reset, cuts_an_answer, talks_nonsense])
async def test_a_connection_that_breaks_after_the_events_is_unavailable_and_they_count_once(reply: Step) -> None:
    async with receiver(reply, DONE) as (one, meter, _):
        with pytest.raises(Unavailable, match=r"^127\.0\.0\.1: no connection, or one that broke$"):
            await one.deliver([row(1)])
        await one.deliver([row(1)])
    assert meter.batches == [1, 1]
    assert len(meter.kept) == 1


async def test_a_receiver_that_is_slow_is_unavailable_in_time() -> None:
    async with receiver(hangs, DONE, timeout=0.4) as (one, meter, _):
        with pytest.raises(Unavailable, match=r"^127\.0\.0\.1: no answer within 0\.4 s$"):
            await one.deliver([row(1)])
        await one.deliver([row(1)])
    assert len(meter.kept) == 1


async def test_a_receiver_that_trickles_its_answer_is_unavailable_in_time() -> None:
    async def trickles(peer: Peer) -> None:
        with suppress(ConnectionError):
            for letter in status(200, "x: " + "x" * 10_000):
                await peer.send(bytes([letter]))
                await asyncio.sleep(0.05)

    async with receiver(trickles, timeout=0.4) as (one, _, _):
        with pytest.raises(Unavailable, match="no answer within"):
            await one.deliver([row(1)])


async def test_a_receiver_that_is_not_there_is_unavailable() -> None:
    async with Backend() as backend:
        url = backend.url
    one = CloudEvents(url + PATH, TOKEN, "model-gateway", "tokens")
    await one.open()
    with pytest.raises(Unavailable) as error:
        await one.deliver([row(1)])
    await one.aclose()
    assert TOKEN not in f"{error.value} {one!r}"
    assert PATH not in f"{error.value} {one!r}"


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with receiver() as (one, meter, _):
        await one.deliver([row(1)])
    assert len(meter.kept) == 1


async def test_a_cookie_is_not_kept() -> None:
    async with receiver(status(200, "set-cookie: a=b; path=/")) as (one, meter, _):
        await one.deliver([row(1)])
        await one.deliver([row(2)])  # the meter refuses cookies
    assert meter.batches == [1, 1]


async def test_a_receiver_without_a_token_is_sent_none() -> None:
    seen: list[bytes] = []

    async def take(peer: Peer) -> None:
        await peer.request()
        seen.append(peer.requests[0].head.lower())
        await peer.send(DONE)

    async with Backend(take) as backend:
        one = CloudEvents(backend.url, None, "model-gateway", "tokens")
        await one.open()
        await one.deliver([row(1)])
        await one.aclose()
    assert b"authorization" not in seen[0]


async def test_a_time_that_no_calendar_holds_is_the_rows_fault() -> None:
    async with receiver() as (one, meter, _):
        with pytest.raises(Rejected, match=f"^written_ms is {10**17}, expected a time before the year 10000$"):
            await one.deliver([row(1), row(2, at=10**17)])
    assert meter.batches == []


@pytest.mark.parametrize(
    "url",
    ["", "openmeter.example", "ftp://openmeter.example", "https://", "https://a:b@c/", "http://a:port/"],
)
async def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^url is not an address, expected for example https://"):
        CloudEvents(url, TOKEN, "model-gateway", "tokens")


@pytest.mark.parametrize("token", ["", "two words", "a\r\nx-evil: 1", "schlüssel"])
async def test_a_token_that_no_header_can_hold_is_refused_without_repeating_it(token: str) -> None:
    with pytest.raises(ValueError, match=r"^the token has a space or a character that no header can hold") as error:
        CloudEvents("https://openmeter.example/", token, "model-gateway", "tokens")
    assert not token or token not in str(error.value)

"""Where rows of the ledger go: files of JSON lines, a receiver of CloudEvents, and (postgres.py) a table.

Files are for whoever has no other place, and for whatever ships files. A process writes a file of its own, named
`….jsonl.part` and locked while it is written; closed, it is `….jsonl` and never changes again. What a process that died
has left is closed by the next one, without the line that was cut short: its row was not acknowledged, and comes again.

CloudEvents are what meters take (https://cloudevents.io, in batches; OpenMeter has this form at /api/v1/events). The id
of an event is the row's, by which a receiver knows what it has had; its subject is the team, whom a bill goes to.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import re
import secrets
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import structlog

from gateway.delivery import Rejected, Row, Unavailable

_log = structlog.get_logger("gateway.sinks")


# — files


class _Open(NamedTuple):
    """A file that is being written, by this process alone."""

    path: Path
    fd: int


class JsonLines:
    """Rows as JSON lines in files of a folder: what is stored, with `entry` and `written_ms` before it.

    A file is closed before it would be longer than `rotate` bytes (one batch may be), and `every` seconds after it was
    begun at the latest. Any number of processes may share the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], rotate: int, every: float) -> None:
        self._folder = Path(folder)
        self._rotate = rotate
        self._every = every
        self._busy = threading.Lock()  # a cancelled delivery goes on in its thread until it is done
        self._file: _Open | None = None
        self._size = 0  # of what is safely in the file
        self._due: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<JsonLines {self._folder}, {self._file.path.name if self._file else 'no file'}>"

    async def open(self) -> None:
        """The folder is there, and what dead processes left in it is closed."""
        await asyncio.to_thread(self._clear)

    async def deliver(self, rows: Sequence[Row]) -> None:
        """The rows are on the disk when this returns."""
        await asyncio.to_thread(self._append, b"".join(map(_line, rows)))
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(self._every, self._age)

    async def aclose(self) -> None:
        """Close the file."""
        if self._due is not None:
            self._due.cancel()
        await asyncio.to_thread(self._close)

    def _age(self) -> None:
        self._due = None
        asyncio.get_running_loop().run_in_executor(None, self._close)

    # From here on in a thread.

    def _clear(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("usage-*.jsonl.part")):
                _adopt(path)
        except OSError as error:
            raise self._unavailable(error) from error

    def _append(self, lines: bytes) -> None:
        with self._busy:
            try:
                if self._file is not None and self._size + len(lines) > self._rotate:
                    self._end()
                if self._file is None:
                    self._file, self._size = _begin(self._folder), 0
                _write(self._file.fd, lines)
                os.fsync(self._file.fd)
                self._size += len(lines)
            except OSError as error:
                # Whether what came before this batch is still in the cache is unknown after a failed fsync, but it is
                # on the disk: the file ends there, and the next batch begins another one.
                self._give_up()
                raise self._unavailable(error) from error

    def _close(self) -> None:
        with self._busy:
            try:
                self._end()
            except OSError as error:
                _log.warning("export_file_not_closed", folder=str(self._folder), reason=_reason(error))

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                _finish(file, self._size)
            finally:
                os.close(file.fd)

    def _give_up(self) -> None:
        with suppress(OSError):  # then it is left as one of the dead are
            self._end()

    def _unavailable(self, error: OSError) -> Unavailable:
        return Unavailable(f"{self._folder}: {_reason(error)}, expected a folder that can be written")


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__


def _line(row: Row) -> bytes:
    """The row as stored, on one line: a line break between the members of an object is only space."""
    stored = row.text.strip().replace(b"\n", b" ")
    return b'{"entry":"%b","written_ms":%d,%b\n' % (row.entry.encode(), row.written_ms, stored[1:])


def _begin(folder: Path) -> _Open:
    """A new file that is locked. One that is seen before it is locked may be taken for a dead process's and removed."""
    while True:
        now = datetime.now(UTC)
        path = folder / f"usage-{now:%Y%m%dT%H%M%S}Z-{secrets.token_hex(4)}.jsonl.part"
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            if _locked(fd, path):
                _sync_folder(folder)
                return _Open(path, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _adopt(path: Path) -> None:
    """Close what a dead process has left, up to its last whole line."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # another process was quicker
        return
    try:
        if not _locked(fd, path):
            return
        size = os.fstat(fd).st_size
        whole = _whole(fd, size)
        if whole < size:
            _log.warning("export_line_cut", file=path.name, bytes=size - whole)
        _finish(_Open(path, fd), whole)
    finally:
        os.close(fd)


def _whole(fd: int, size: int) -> int:
    """Where the last whole line ends."""
    if not size:
        return 0
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def _locked(fd: int, path: Path) -> bool:
    """Whether the file is ours now, and is still what its name says: a lock may come after somebody closed it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _finish(file: _Open, size: int) -> None:
    """Cut the file to what is whole in it, and give it the name of one that never changes; an empty one goes."""
    if size:
        if os.fstat(file.fd).st_size > size:
            os.ftruncate(file.fd, size)
            os.fsync(file.fd)
        file.path.rename(file.path.with_suffix(""))
    else:
        file.path.unlink()
    _sync_folder(file.path.parent)


def _write(fd: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]


def _sync_folder(folder: Path) -> None:
    """What is named in it stays named after a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# — CloudEvents

_MOST_EVENTS = 100  # in one batch: what OpenMeter and Lago take
# What is said of the events. Every other refusal is of the address, the token or the moment, which a person or time
# can mend; 413 is here because the exporter sends what was rejected once more row by row.
_OF_THE_EVENTS = {400, 409, 413, 422}
_LONGEST_PAUSE = 3600.0
_MOST_READ = 65536  # of an answer, so that its connection can be used again


class _Event(msgspec.Struct):
    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    datacontenttype: str
    data: msgspec.Raw


class CloudEvents:
    """Rows as events of one `source` and one `type`, POSTed to a URL; `timeout` is in seconds, of one POST."""

    def __init__(self, url: str, token: str | None, source: str, type: str, *, timeout: float = 30.0) -> None:
        try:
            self._url = httpx.URL(url)
        except httpx.InvalidURL:
            self._url = httpx.URL()
        if self._url.scheme not in ("http", "https") or not self._url.host or self._url.userinfo:
            raise ValueError("url is not an address, expected for example https://openmeter.example/api/v1/events")
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise ValueError("the token has a space or a character that no header can hold, expected visible ASCII")
        self._source = source
        self._type = type
        self._timeout = timeout
        self._headers = {"content-type": "application/cloudevents-batch+json"}
        if token is not None:
            self._headers["authorization"] = f"Bearer {token}"
        # Less for the connection: httpcore loses a place in its pool where one is cancelled that it makes.
        self._patience = httpx.Timeout(timeout, connect=timeout / 2).as_dict()
        self._transport: httpx.AsyncHTTPTransport | None = None  # no client, which keeps cookies

    def __repr__(self) -> str:
        return f"<CloudEvents to {self._url.host}>"

    async def open(self) -> None:
        """Nothing is asked of the receiver yet."""
        trust = await asyncio.to_thread(ssl.create_default_context)
        self._transport = httpx.AsyncHTTPTransport(verify=trust, trust_env=False)

    async def deliver(self, rows: Sequence[Row]) -> None:
        """The receiver has said 2xx to all of them when this returns."""
        for first in range(0, len(rows), _MOST_EVENTS):
            await self._post([self._event(row) for row in rows[first : first + _MOST_EVENTS]])

    async def aclose(self) -> None:
        """Close the connections."""
        if self._transport is not None:
            await self._transport.aclose()

    def _event(self, row: Row) -> _Event:
        return _Event(
            specversion="1.0",
            id=row.record.id,
            source=self._source,
            type=self._type,
            subject=row.record.team,
            time=_rfc3339(row.written_ms),
            datacontenttype="application/json",
            data=msgspec.Raw(row.text),
        )

    async def _post(self, events: list[_Event]) -> None:
        assert self._transport is not None, "open() comes first"
        body, extensions = msgspec.json.encode(events), {"timeout": self._patience}
        request = httpx.Request("POST", self._url, content=body, headers=self._headers, extensions=extensions)
        try:
            async with (
                asyncio.timeout(self._timeout),
                aclosing(await self._transport.handle_async_request(request)) as answer,
            ):
                self._judge(answer)
                await _read(answer)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise Unavailable(f"{self._url.host}: no answer within {self._timeout:g} s") from error
        except httpx.TransportError as error:
            raise Unavailable(f"{self._url.host}: no connection, or one that broke") from error

    def _judge(self, answer: httpx.Response) -> None:
        """Raise what the status says. What the receiver writes with it may repeat the events, and is not told."""
        if answer.is_success:
            return
        told = f"{self._url.host}: status {answer.status_code}, expected 2xx"
        if answer.status_code in _OF_THE_EVENTS:
            raise Rejected(told)
        raise Unavailable(told, retry_after=_pause(answer.headers.get("retry-after", "")))


async def _read(answer: httpx.Response) -> None:
    received = 0
    async for piece in answer.aiter_raw():
        received += len(piece)
        if received > _MOST_READ:
            return


def _pause(retry_after: str) -> float | None:
    """Seconds, at most an hour; None where nothing is said that can be read (RFC 9110, 10.2.3)."""
    try:
        seconds = float(retry_after) if retry_after.isdecimal() else _until(retry_after)
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE)


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


def _rfc3339(ms: int) -> str:
    """In UTC, with milliseconds; what no calendar holds is the row's fault."""
    try:
        instant = datetime.fromtimestamp(ms // 1000, UTC)
    except (ValueError, OverflowError, OSError):
        raise Rejected(f"written_ms is {ms}, expected a time before the year 10000") from None
    return f"{instant:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"

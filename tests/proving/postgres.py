"""A PostgreSQL on a Unix socket in a folder of its own: a test kills it, starts it again and has databases of it.

    with postgres() as server:
        dsn = server.database()

It refuses to run as root, and runs as `postgres` or `nobody` then.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

PASSWORD = "a-password-that-nobody-else-knows"  # asked for by nobody here, and looked for in every message
LACKING = "PostgreSQL is not installed (Debian: apt-get install postgresql)"


def program(name: str) -> str | None:
    """Where a program of PostgreSQL is; Debian puts them beside the path."""
    found = shutil.which(name)
    beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return found or (str(beside[-1]) if beside else None)


def installed() -> bool:
    return program("postgres") is not None and program("initdb") is not None


def _user() -> dict[str, Any]:
    """Who runs it, for subprocess."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


class Server:
    """One cluster, in the words of PostgreSQL: a server with its data. `options` are those of its configuration."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.options = {"listen_addresses": "", "unix_socket_directories": folder, "shared_buffers": "32MB", **options}
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://gateway:{PASSWORD}@/{database}?host={self.folder}"

    def database(self) -> str:
        """The DSN of a new database."""
        self._databases += 1
        name = f"test{self._databases}"
        self.ask("postgres", f"CREATE DATABASE {name} STRATEGY file_copy")
        return self.dsn(name)

    def ask(self, database: str, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows that a statement gives, on a connection of its own."""
        dsn = database if "://" in database else self.dsn(database)
        with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(query.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def start(self, *, wait: bool = True) -> None:
        words = [program("postgres") or "", "-D", str(self.folder / "data")]
        words += [word for name, value in self.options.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env={"LC_ALL": "C"}, cwd="/", **_user())
        if wait:
            self.until_it_answers()

    def until_it_answers(self, patience: float = 20.0) -> None:
        end = time.monotonic() + patience
        while not self._answers():
            assert time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()
        try:
            return self.ask("postgres", "SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False

    def kill(self) -> None:
        """As a crash ends it; its children end with it, and what was committed is there after `start`."""
        self._end(signal.SIGQUIT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None


@contextmanager
def postgres(**options: object) -> Iterator[Server]:
    """A server until the block is left. It does not wait for the disk unless it is told to (fsync="on")."""
    folder = Path(tempfile.mkdtemp(prefix="gw-pg-"))
    user = _user()
    if user:
        os.chown(folder, user["user"], user["group"])
    server = Server(folder, **{"fsync": "off", **options})
    try:
        words = [program("initdb") or "", "-D", str(folder / "data"), "-U", "gateway", "-A", "trust", "-E", "UTF8"]
        subprocess.run(
            [*words, "--locale=C", "--no-sync"], check=True, capture_output=True, env={"LC_ALL": "C"}, cwd="/", **user
        )
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)

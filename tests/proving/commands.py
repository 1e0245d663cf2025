"""Commands as people and programs run them: processes of their own, in a folder with policies and state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tests.proving.house import DOCUMENTS
from tests.proving.ports import free_port

Done: TypeAlias = "subprocess.CompletedProcess[str]"

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 20  # seconds: who needs more than that has hung


class Place:
    """A folder with policies and state, and the commands that are run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.write({**DOCUMENTS, "pools": {"demo": {"upstreams": [{"url": f"http://127.0.0.1:{self.port}"}]}}})

    def write(self, documents: Mapping[str, Any]) -> None:
        (self.folder / "policies").mkdir(exist_ok=True)
        (self.folder / "policies" / "all.yaml").write_text(yaml.safe_dump(dict(documents)))

    def environment(self, **given: str) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        return {**ours, "PYTHONPATH": str(ROOT), "GATEWAY_LOG": "json", "GATEWAY_ADMIN_PORT": "0", **given}

    def run(self, *words: str, **given: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "gateway", *words],
            cwd=self.folder,
            env=self.environment(**given),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def json(self, *words: str) -> Any:
        done = self.run(*words, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    @contextmanager
    def running(self, *words: str, **given: str) -> Iterator[Running]:
        """A command that goes on; at the end it has to have ended, or it is ended."""
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", *words],
            cwd=self.folder,
            env=self.environment(**given),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running = Running(process)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


class Running:
    """A command that goes on, and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        self.port = 0

    def until(self, *words: str) -> str:
        """The first line from here on that has all of these words in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if all(word in line for word in words):
                return line
        raise AssertionError(f"it ended before it said {words}: {''.join(self.said)}")

    def serving(self) -> str:
        """The address, when it serves."""
        self.port = json.loads(self.until('"serving"'))["port"]
        return f"http://127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=PATIENCE)
        self.said += rest.splitlines(keepends=True)
        return self.process.returncode

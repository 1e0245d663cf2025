"""Every command as people and programs run it: a process of its own, with its own state folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway import cli
from gateway.embedded import _socket_path
from gateway.identity import key_id_of
from tests.proving.commands import PATIENCE, ROOT, Place, Running
from tests.proving.house import DOCUMENTS, MODEL


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ask(url: str, key: str, prompt: str = "The sky is") -> httpx.Response:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4}
    head = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=head, trust_env=False, timeout=PATIENCE)


# — check


def test_check_says_what_it_read(place: Place) -> None:
    done = place.run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"policies: revision [0-9a-f]{12}: 1 models, 1 pools, 2 teams, no mistakes\n", done.stdout)


def test_check_takes_the_shipped_policies(place: Place) -> None:
    assert place.run("check", str(ROOT / "policies")).returncode == 0


def test_check_tells_every_mistake_on_stderr(place: Place) -> None:
    (place.folder / "policies" / "all.yaml").write_text("gateway: {max_body: 1}\nteams: []\n")
    done = place.run("check", "policies")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "all.yaml:1 gateway.max_body: 1 is no measure, expected a number with one of B, KiB, MiB, GiB, such as 32MiB",
        "all.yaml:2 teams: is a list, expected names, each with its members",
    ]


def test_check_of_nothing_is_wrong(place: Place) -> None:
    done = place.run("check", "nowhere")
    assert (done.returncode, done.stderr) == (1, "nowhere: holds no .yaml file, expected policy documents\n")


# — keys


def test_keys_are_created_listed_and_revoked(place: Place) -> None:
    made = place.json("keys", "create", "--team", "research", "--user", "ann", "--name", "laptop", "--models", "l*, m")
    assert key_id_of(made.pop("key").encode()) == made["id"]
    assert {name: made[name] for name in ("team", "user", "name", "models", "state", "expires", "revoked")} == {
        "team": "research",
        "user": "ann",
        "name": "laptop",
        "models": ["l*", "m"],
        "state": "active",
        "expires": None,
        "revoked": None,
    }
    assert place.json("keys", "list") == [made]
    revoked = place.json("keys", "revoke", made["id"])
    assert revoked["state"] == "revoked"
    assert revoked["revoked"] >= made["created"]
    assert place.json("keys", "list") == [revoked]


def test_keys_for_people_are_a_line_and_a_table(place: Place) -> None:
    made = place.run("keys", "create", "--team", "research", "--expires", "30d")
    key, _, told, *_ = made.stdout.splitlines()
    key_id = key_id_of(key.encode())
    assert told == f"key {key_id} of team research; it is not shown again"
    listed = place.run("keys", "list").stdout
    head, row = listed.splitlines()
    assert head.split() == ["id", "team", "user", "name", "models", "state", "created", "expires"]
    assert row.split()[:6] == [key_id, "research", "-", "-", "*", "active"]
    assert key[16:] not in listed
    assert place.run("keys", "revoke", str(key_id)).stdout == f"key {key_id} is revoked\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (
            ["create", "--team", "reserch"],
            1,
            'gateway: "reserch" is no team of policies/, expected one of research, support',
        ),
        (
            ["create", "--team", "research", "--expires", "soon"],
            2,
            'gateway: "soon" is no time, expected for example 30d, 12h or 2027-01-31',
        ),
        (
            ["create", "--team", "research", "--expires", "2001-01-01"],
            2,
            'gateway: "2001-01-01" is past, expected a time to come',
        ),
        (
            ["create", "--team", "research", "--expires", "9" * 30 + "d"],
            2,
            f'gateway: "{"9" * 30}d" is no time, expected for example 30d, 12h or 2027-01-31',
        ),
        (["revoke", "nobody"], 1, "gateway: no key has this id; gateway keys list shows them all"),
    ],
)
def test_a_wrong_word_for_keys_is_told(place: Place, words: list[str], code: int, told: str) -> None:
    done = place.run("keys", *words)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told + "\n")


def test_the_command_line_itself_is_checked(place: Place) -> None:
    for words in (["keys", "create"], ["serve", "--port", "99999"]):
        done = place.run(*words)
        assert (words, done.returncode, done.stdout) == (words, 2, "")
        assert "Usage: " in done.stderr


def test_help_names_every_command(place: Place) -> None:
    told = place.run("--help").stdout
    assert all(
        f"  {command} " in told
        for command in ("serve", "demo", "echo", "admin", "check", "keys", "usage", "export", "doctor")
    )


def test_keys_of_another_pepper_are_told(place: Place) -> None:
    place.json("keys", "create", "--team", "research")
    done = place.run("keys", "list", GATEWAY_KEY_PEPPER="another")
    assert done.returncode == 3
    assert "made under another pepper: set GATEWAY_KEY_PEPPER" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["keys", "list"], ["usage"]])
def test_a_store_that_is_not_there_is_told(place: Place, words: list[str]) -> None:
    done = place.run(*words, GATEWAY_REDIS_URL="unix:///nowhere/at/all")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "gateway: the store of keys and limits has no socket there\n"


@pytest.mark.parametrize("words", [["serve"], ["usage"]])
def test_a_variable_that_cannot_be_read_is_told(place: Place, words: list[str]) -> None:
    done = place.run(*words, GATEWAY_STORE_DEADLINE="50ms")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'gateway: GATEWAY_STORE_DEADLINE is "50ms", expected a number\n'


def test_upstreams_are_drained_and_resumed_and_the_list_says_so(place: Place) -> None:
    place.write(
        {
            **DOCUMENTS,
            "pools": {
                "demo": {
                    "upstreams": [
                        {"url": "http://10.0.0.1:80"},
                        {"url": "http://10.0.0.2:80", "drain": True, "weight": 3},
                    ]
                }
            },
        }
    )

    def listed() -> list[tuple[str, int, str | None]]:
        return [(row["upstream"], row["weight"], row["drained"]) for row in place.json("upstreams", "list")]

    assert listed() == [("demo/10.0.0.1:80", 1, None), ("demo/10.0.0.2:80", 3, "by policy")]
    assert place.run("upstreams", "drain", "demo/10.0.0.1:80").returncode == 0
    assert listed()[0] == ("demo/10.0.0.1:80", 1, "by command")
    assert "by command" in place.run("upstreams", "list").stdout
    assert place.run("upstreams", "resume", "demo/10.0.0.1:80").returncode == 0
    assert listed()[0] == ("demo/10.0.0.1:80", 1, None)
    unknown = place.run("upstreams", "drain", "demo/10.0.0.9:80")
    assert (unknown.returncode, "expected one of demo/10.0.0.1:80" in unknown.stderr) == (1, True)


# — serve


def test_a_port_that_is_taken_is_told(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = place.run("serve", "--port", str(port))
    assert done.returncode == 3
    assert done.stderr == f"gateway: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_policies_with_mistakes_are_not_served(place: Place) -> None:
    place.write({"teams": []})
    done = place.run("serve", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gateway: all.yaml:1 teams: is a list, expected names, each with its members\n"


def test_serving_is_ready_until_sigterm_and_takes_keys_and_policies_as_they_change(place: Place) -> None:
    """One process, from its first line to its last: to start one takes most of the time of this file."""
    with (
        place.running("echo", "--port", str(place.port)) as backend,
        place.running("serve", "--port", "0") as gateway,
    ):
        url = gateway.serving()
        ready = httpx.get(f"{url}/healthz/ready", trust_env=False)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "reasons": []})

        # A key that another process creates works here, and revoked it does not: test_keys.py tells how soon.
        made = place.json("keys", "create", "--team", "research", "--user", "ann")
        until = time.monotonic() + 5
        while (answer := ask(url, made["key"])).status_code == 401 and time.monotonic() < until:
            time.sleep(0.02)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 4

        (used,) = place.json("usage", "--by", "team", "--user", "ann", "--since", "1h")
        assert used == {
            "team": "research",
            "requests": 1,
            "input_tokens": 3,
            "cached_tokens": 0,
            "output_tokens": 4,
            "reasoning_tokens": 0,
            "cost_microusd": 11,
        }
        table = place.run("usage").stdout.splitlines()
        head = ["team", "model", "requests", "input", "cached", "output", "reasoning", "USD", "share"]
        assert table[0].split() == head
        assert table[1].split()[:8] == ["research", MODEL, "1", "3", "0", "4", "0", "0.000011"]

        # Documents with a mistake change nothing.
        good = (place.folder / "policies" / "all.yaml").read_text()
        (place.folder / "policies" / "all.yaml").write_text("teams: []")
        gateway.process.send_signal(signal.SIGHUP)
        refused = json.loads(gateway.until("policies_refused"))
        assert refused["mistakes"] == ["all.yaml:1 teams: is a list, expected names, each with its members"]
        assert ask(url, made["key"]).status_code == 200

        # Documents without one hold at once.
        documents = yaml.safe_load(good)
        documents["teams"]["research"]["models"] = ["nothing*"]
        documents["models"]["nothing-at-all"] = {"pool": "demo"}
        place.write(documents)
        gateway.process.send_signal(signal.SIGHUP)
        taken = json.loads(gateway.until("policies_taken"))
        assert taken["revision"] != refused["revision"]
        assert ask(url, made["key"]).status_code == 403

        place.json("keys", "revoke", made["id"])
        until = time.monotonic() + 5
        while ask(url, made["key"]).status_code != 401:
            assert time.monotonic() < until
            time.sleep(0.02)

        assert gateway.end() == 0
        assert backend.end() == 0
        lines = [json.loads(line) for line in gateway.said]
        assert {line["event"] for line in lines} == {
            "serving",
            "http_access",
            "policies_refused",
            "policies_taken",
            "draining",
        }
        assert made["key"][16:] not in "".join(gateway.said)


def test_sigint_ends_it_too_and_the_embedded_store_with_it(place: Place) -> None:
    with place.running("serve", "--port", "0") as gateway:
        gateway.serving()
        store = _socket_path(place.folder / ".gateway")
        assert store.exists()
        assert gateway.end(signal.SIGINT) == 0
    assert not store.exists()


def test_sigterm_waits_for_an_answer_under_way(place: Place) -> None:
    with (
        place.running("echo", "--port", str(place.port)),
        place.running("serve", "--port", "0") as gateway,
    ):
        url = gateway.serving()
        key = place.json("keys", "create", "--team", "research")["key"]
        until = time.monotonic() + 2
        while ask(url, key).status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.02)
        body = {"model": MODEL, "prompt": "on and on #pace=0.2", "max_tokens": 4, "stream": True}
        head = {"authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=head, trust_env=False) as answer:
            chunks = answer.iter_bytes()
            first = next(chunks)
            gateway.process.send_signal(signal.SIGTERM)
            rest = b"".join(chunks)
        assert (first + rest).endswith(b"data: [DONE]\n\n")
        assert gateway.process.wait(timeout=PATIENCE) == 0


# — demo

BUSY = "something listens on port 8000, where the demo's backend has to"


def port_8000_is_free() -> bool:
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind(("127.0.0.1", 8000))
        except OSError:
            return False
        return True


@contextmanager
def demonstrating(place: Place) -> Iterator[tuple[Running, str]]:
    """The demo with the shipped policies, and what it shows a newcomer."""
    with place.running("demo", "--port", "0", "--policies", str(ROOT / "policies")) as demo:
        demo.until("  gateway   http://")
        demo.until("       -d ")
        yield demo, "".join(demo.said)


def pasted(shown: str, **environment: str) -> Any:
    """The answer of the line to paste, by a shell, once the backend is up."""
    line = shown[shown.index("  curl ") :].replace("curl ", "curl --silent --noproxy '*' ", 1)
    until = time.monotonic() + 10
    while True:
        done = subprocess.run(
            ["sh", "-c", line],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
            env={**os.environ, **environment},
        )
        answer = json.loads(done.stdout)
        if answer.get("error", {}).get("type") != "server_error" or time.monotonic() > until:
            return answer
        time.sleep(0.05)  # the backend is a process that starts at the same time


@pytest.mark.xdist_group("port 8000")
@pytest.mark.skipif(shutil.which("curl") is None, reason="the line to paste is for curl")
def test_the_demo_shows_a_key_once_and_a_line_that_works_when_pasted(place: Place) -> None:
    if not port_8000_is_free():
        pytest.skip(BUSY)
    with demonstrating(place) as (demo, shown):
        keys = re.findall(r"gw_\w+", shown)
        assert len(keys) == 2, "the key, and the line to paste"
        assert keys[0] == keys[1]
        assert "shown this once" in shown
        answer = pasted(shown)
        assert (answer["object"], answer["usage"]["completion_tokens"]) == ("text_completion", 16)
        assert demo.end() == 0
        assert sum(keys[0] in line for line in demo.said) == 2
    with demonstrating(place) as (demo, shown):
        assert re.findall(r"gw_\w+", shown) == []
        assert "the one from the first start, or: gateway keys create --team research" in shown
        answer = pasted(shown, GATEWAY_KEY=keys[0])
        assert answer["usage"]["completion_tokens"] == 16
        assert [used["requests"] for used in place.json("usage", "--by", "team")] == [2]
        assert demo.end() == 0
    assert port_8000_is_free(), "the backend ends with the demo"


def test_a_defect_is_told_with_its_traceback_and_without_what_looks_like_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "of sk-proj-canary0123456789 at redis://:canary@host"

    def defect() -> None:
        raise ZeroDivisionError(text)

    for module, hook in ((threading, "excepthook"), (sys, "unraisablehook")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # put back afterwards
    monkeypatch.setattr(cli, "app", defect)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    thread = threading.Thread(target=defect)
    thread.start()
    thread.join()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert told.count("Traceback (most recent call last):") == told.count("in defect") == 2
    assert "canary" not in told
    assert told.count("ZeroDivisionError: of [masked] at redis://[masked]@host\n") == 2

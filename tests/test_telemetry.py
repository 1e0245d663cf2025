"""What the gateway tells of itself: one line for each exchange, and never a secret or a prompt."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import structlog

from gateway import metrics, telemetry
from gateway.asgi import Cut
from gateway.identity import make_key, new_key
from gateway.lines import Lines
from tests.proving.house import MODEL, House, documents, echo, gateway

KEY = make_key("0123456789ab", 2**255 + 12345)
SECRETS = {
    "a key": (KEY, KEY[16:]),
    "a piece of a key": (KEY[:40], KEY[16:40]),
    "OpenAI's": ("sk-proj-Canary0123456789", "Canary"),
    "Fireworks'": ("fw_Canary0123456789", "Canary"),
    "a bearer": ("Authorization: Bearer canary.of-a/backend==", "canary"),
    "a bearer in capitals": ("BEARER   canary", "canary"),
    "in a list": (f"['{KEY}', 'sk-Canary12345678']", "anary"),
    "in an address": ("redis://:canary@host:6379/0", "canary"),
    "in several": ("rediss+sentinel://ann:canary@a:1,b:2/x http://ann:canary@[::1]/y", "canary"),
    "after a line": (f"first line\n{KEY}\nsk-Canary12345678\tsk-Canary12345678", "Canary"),
}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], io.BytesIO]]:
    """Sets telemetry up on a stream; afterwards all of it is as it was."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers, root.level
    configure = structlog.configure
    monkeypatch.setattr(
        structlog, "configure", lambda **given: configure(**{**given, "cache_logger_on_first_use": False})
    )

    def set_up(format_: str, stream: Any = None) -> Any:
        stream = stream or io.BytesIO()
        root.setLevel(logging.DEBUG)
        telemetry.set_up(format_, stream)
        return stream

    yield set_up
    monkeypatch.setattr(telemetry, "_lines", None)
    configure(**before)
    root.handlers = handlers
    root.setLevel(level)


def parsed(stream: io.BytesIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def log() -> Any:
    return structlog.get_logger("gateway.tests")


async def exchanges(stream: io.BytesIO, number: int) -> list[dict[str, Any]]:
    """The lines of so many exchanges, when they are there."""
    async with asyncio.timeout(5):
        while stream.getvalue().count(b"http_access") + stream.getvalue().count(b" ms ") < number:
            await asyncio.sleep(0.005)
    return [line for line in parsed(stream) if line["event"] == "http_access"] if b"{" in stream.getvalue() else []


async def ask(house: House, key: str | None, *, head: dict[str, str] | None = None, **members: Any) -> int:
    body = {"model": MODEL, "prompt": "my canary sings", "max_tokens": 5, **members}
    async with house.client(key) as client:
        return (await client.post("/v1/completions", json=body, headers=head)).status_code


# — one line for each exchange

ALWAYS = {
    "event",
    "level",
    "timestamp",
    "request_id",
    "http.request.method",
    "http.route",
    "http.response.status_code",
    "outcome",
    "duration_s",
}
KNOWN = {"key_id", "team", "trace_id"}
UNDERSTOOD = {"gen_ai.request.model", "stream"}
ANSWERED = {
    "upstream.name",
    "upstream.attempts",
    "ttft_s",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
    "usage_source",
    "bytes_out",
}


async def test_an_exchange_is_one_json_line_with_names_that_stay(
    lines: Callable[[str], io.BytesIO], store_url: str
) -> None:
    stream = lines("json")
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        key = await house.key(user="ann")
        head = {"x-request-id": "mine-1", "x-stainless-retry-count": "2"}
        assert await ask(house, key, stream=True) == 200
        assert await ask(house, key, head=head) == 200
        assert await ask(house, None) == 401
        assert await ask(house, key, model="no such model") == 404
        assert await ask(house, key, max_tokens="five") == 422
        found = await exchanges(stream, 5)
    assert [set(line) for line in found] == [
        ALWAYS | KNOWN | UNDERSTOOD | ANSWERED,
        ALWAYS | KNOWN | UNDERSTOOD | ANSWERED | {"client_request_id", "sdk_retry_count"},
        ALWAYS | {"error.type"},
        ALWAYS | KNOWN | {"error.type"},
        ALWAYS | KNOWN | {"error.type"},
    ]
    assert [line["http.response.status_code"] for line in found] == [200, 200, 401, 404, 422]
    assert [line["outcome"] for line in found] == ["complete", "complete", "refused", "refused", "refused"]
    assert [line.get("error.type") for line in found[3:]] == ["model_not_found", "invalid_request_error"]
    first, second = found[:2]
    assert (first["team"], first["gen_ai.request.model"], first["stream"]) == ("research", MODEL, True)
    assert (first["input_tokens"], first["output_tokens"], first["usage_source"]) == (3, 5, "upstream")
    assert (first["http.request.method"], first["http.route"]) == ("POST", "/v1/completions")
    assert 0 < first["ttft_s"] <= first["duration_s"] < 5
    assert (second["client_request_id"], second["sdk_retry_count"]) == ("mine-1", 2)
    assert re.fullmatch(r"req_[0-9a-f]{32}", first["request_id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", first["timestamp"])


@pytest.mark.parametrize("format_", ["json", "people"])
async def test_no_line_has_a_prompt_an_answer_a_user_or_a_key(
    lines: Callable[[str], io.BytesIO], store_url: str, format_: str
) -> None:
    stream = lines(format_)
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        key = await house.key(user="canary-user")
        for members in ({}, {"stream": True}, {"prompt": ["canary"] * 3}, {"prompt": {"canary": 1}}, {"canary": 1}):
            await ask(house, key, **members)
        await ask(house, f"{KEY[:-1]}0", user="canary")
        await ask(house, key, model="canary")
        await exchanges(stream, 7)
        told = stream.getvalue()
    assert b"canary" not in told
    assert key[16:].encode() not in told
    assert KEY[16:50].encode() not in told


async def test_for_people_an_exchange_is_a_row_of_columns(lines: Callable[[str], io.BytesIO], store_url: str) -> None:
    stream = lines("people")
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        key = await house.key()
        await ask(house, key)
        await ask(house, None)
        await exchanges(stream, 2)
    plain = re.sub(r"\x1b\[\d+m", "", stream.getvalue().decode()).splitlines()
    row = r"\d\d:\d\d:\d\d {} /v1/completions      {:<24} {:<12} {:>15}  +\d+\.\d ms  req_\w{{32}} {}"
    assert re.fullmatch(row.format(200, "llama-v2-7b", "research", "     3 → 5     ", ""), plain[0])
    assert re.fullmatch(row.format(401, "-", "-", "", ".*"), plain[1])


# — the rest of what is said


@pytest.mark.parametrize("format_", ["json", "people"])
@pytest.mark.parametrize(("text", "canary"), SECRETS.values(), ids=SECRETS)
def test_a_secret_is_masked_wherever_it_stands(
    lines: Callable[[str], io.BytesIO], format_: str, text: str, canary: str
) -> None:
    stream = lines(format_)
    library = logging.getLogger("a.library")
    log().info(text)
    log().info("event", field=text, inner={"a": [text]}, raw=text.encode(), error=ValueError(text))
    library.warning("found %s", text)
    for tell in (log().exception, library.exception):
        try:
            raise ValueError(text)
        except ValueError:
            tell("failed")
    told = stream.getvalue()
    assert canary.encode() not in told
    assert told.count(b"[masked]") >= 8
    if format_ == "json":
        assert [line["level"] for line in parsed(stream)] == ["info", "info", "warning", "error", "error"]


@pytest.mark.parametrize("number", range(20))
def test_no_fresh_key_passes(lines: Callable[[str], io.BytesIO], number: int) -> None:
    stream = lines("json")
    _, key = new_key()
    log().info("event", key=key)
    (line,) = parsed(stream)
    assert line["key"] == "[masked]"


@pytest.mark.parametrize(
    "text",
    [
        *("the task-1234567890 ended", "disk_0123456789", "gw_x", "a bearer", "unmasked", "flask-sqlalchemy"),
        *("http://host:80/a@b", "http://host?a=b@c", "see http://host or ask ann@host"),
    ],
)
def test_what_is_no_secret_is_told(lines: Callable[[str], io.BytesIO], text: str) -> None:
    stream = lines("json")
    log().info(text)
    assert parsed(stream)[0]["event"] == text


def test_other_libraries_take_the_same_way(lines: Callable[[str], io.BytesIO]) -> None:
    stream = lines("json")
    library = logging.getLogger("a.library")
    library.info("not told")
    library.warning("told %s", 1)
    (line,) = parsed(stream)
    assert (line["event"], line["level"], line["logger"]) == ("told 1", "warning", "a.library")


@pytest.mark.parametrize("format_", ["json", "people"])
def test_a_line_is_told_whatever_it_is_of(lines: Callable[[str], io.BytesIO], format_: str) -> None:
    stream = lines(format_)
    log().info("half a character \ud800", odd={1: object, (): 1, "path": b"\xff", "set": {1}}, big=2**100)
    logging.getLogger("a.library").warning("\ud800")
    assert stream.getvalue().count(b"\n") == 2
    if format_ == "json":
        assert [line["level"] for line in parsed(stream)] == ["info", "warning"]


def test_an_answer_that_is_cut_on_purpose_is_no_defect(lines: Callable[[str], io.BytesIO]) -> None:
    stream = lines("json")
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.setLevel(logging.NOTSET)  # whatever a server in another test has set
    for error in (Cut(), ValueError("a defect")):
        uvicorn.error("Exception in ASGI application", exc_info=error)
    (line,) = parsed(stream)
    assert "a defect" in line["exception"]
    assert "Cut" not in line["exception"]


@pytest.mark.parametrize(
    ("terminal", "format_", "people"),
    [(True, "auto", True), (False, "auto", False), (True, "json", False), (False, "people", True)],
)
def test_auto_is_for_people_on_a_terminal(
    lines: Callable[[str], io.BytesIO], terminal: bool, format_: str, people: bool
) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return terminal

    stream = Terminal()
    telemetry.set_up(format_, stream)
    log().info("event")
    assert (b"\x1b[" in stream.getvalue()) is people


# — nobody waits for who reads


@pytest.fixture
def pipe() -> Iterator[tuple[int, BinaryIO]]:
    """A pipe that holds four KiB."""
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(into, "wb") as stream:
        yield out, stream
    os.close(out)


def read_all(out: int) -> list[dict[str, Any]]:
    """The lines in a pipe, once all that wait for it are out."""
    read = b""
    os.set_blocking(out, False)
    while True:
        done = telemetry._lines is not None and telemetry._lines.drain(0.02)
        try:
            read += os.read(out, 65536)
        except BlockingIOError:
            if done:
                return [json.loads(line) for line in read.splitlines()]


def test_lines_of_all_who_log_keep_their_order_in_a_pipe(lines: Callable[..., Any], pipe: tuple[int, BinaryIO]) -> None:
    out, into = pipe
    lines("json", into)
    library = logging.getLogger("a.library")
    for number in range(0, 200, 2):
        log().info("ours", number=number)
        library.warning("%d", number + 1)
    found = read_all(out)
    assert [line.get("number", line["event"]) for line in found] == [n if n % 2 == 0 else str(n) for n in range(200)]
    assert (found[1]["level"], found[1]["logger"], telemetry.dropped()) == ("warning", "a.library", 0)


async def test_g16_a_pipe_that_nobody_reads_holds_up_no_request_and_drops_are_told(
    lines: Callable[..., Any], pipe: tuple[int, BinaryIO], store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "Lines", partial(Lines, most=20_000))
    out, into = pipe
    lines("json", into)
    async with echo() as backend, gateway(store_url, documents([backend])) as house:
        key = await house.key()
        async with house.client(key) as client:
            body = {"model": MODEL, "prompt": "a b", "max_tokens": 2}
            answers = [(await client.post("/v1/completions", json=body)).status_code for _ in range(80)]
        dropped = telemetry.dropped()
        house.gateway.meters._look()
        house.gateway.meters._flush()
        told = {family.name: family.samples for family in metrics._gather(house.settings.state / "metrics")}
        assert [sample.value for sample in told["gateway_log_lines_dropped"]] == [dropped]
        found = await asyncio.to_thread(read_all, out)
    access = [line for line in found if line["event"] == "http_access"]
    (notice,) = [line for line in found if line["event"] == "log_lines_dropped"]
    assert answers == [200] * 80
    assert dropped > 20
    assert (len(access), notice["lines"], notice["level"]) == (80 - dropped, dropped, "warning")
    assert set(notice) == {"event", "level", "timestamp", "lines"}


LOGS = """
import os, sys, structlog
from gateway import telemetry
child = os.fork()
telemetry.set_up("json", (sys.stderr if child else sys.stdout).buffer)
for number in range(1000):
    structlog.get_logger("gateway").info("event", number=number)
"""


def test_a_process_that_ends_has_said_everything_and_waits_for_nobody_who_does_not_read() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(telemetry.__file__).parents[1])}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", LOGS]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as both:
        assert both.stdout is not None
        assert both.stderr is not None
        said = [json.loads(line)["number"] for line in both.stderr]  # until both have ended
        assert both.wait(20) == 0
        begun = [json.loads(line)["number"] for line in both.stdout]
    assert said == list(range(1000))
    assert begun == said[: len(begun)]
    assert 0 < len(begun) < 1000


def test_a_terminal_gets_its_lines_at_once(lines: Callable[..., Any]) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "wb") as stream:
        lines("auto", stream)
        log().info("event")
        assert telemetry._lines is None
        assert b"event" in os.read(master, 4096)
    os.close(master)

"""Lines go out in their order and whole, and nobody who writes one waits."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from gateway.lines import Lines

PAGE = 4096  # bytes: the least that a pipe holds


class Pipe:
    """A pipe that holds little."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()
        fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, PAGE)

    def lines(self, number: int) -> list[bytes]:
        """So many lines, when they are there."""
        read = b""
        while read.count(b"\n") < number:
            read += os.read(self.out, PAGE)
        return read.splitlines(keepends=True)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    found = Pipe()
    yield found
    os.close(found.out)  # who still writes there is told; the other end may be in use, and stays


def told(number: int) -> bytes:
    return b"dropped %d\n" % number


def numbered(count: int, size: int = 100) -> list[bytes]:
    return [b"%d %b\n" % (number, b"." * size) for number in range(count)]


def test_every_line_arrives_in_its_order(pipe: Pipe) -> None:
    lines = Lines(pipe.into, told)
    sent = numbered(3000)
    for line in sent:  # far more than the pipe holds, and nobody reads yet
        lines.write(line)
    assert pipe.lines(len(sent)) == sent
    assert lines.drain(10)
    assert lines.dropped == 0


def test_what_does_not_fit_is_dropped_and_told_where_it_is_missing(pipe: Pipe) -> None:
    lines = Lines(pipe.into, told, most=20_000)
    sent = numbered(1000)
    for line in sent:
        lines.write(line)
    kept = len(sent) - lines.dropped
    assert 100 < kept < 300
    first = pipe.lines(kept + 1)
    assert first == [*sent[:kept], told(lines.dropped)], "the notice comes although no line follows"
    assert lines.drain(10)
    lines.write(b"after\n")
    assert pipe.lines(1) == [b"after\n"]


def test_a_notice_stands_exactly_where_lines_are_missing(pipe: Pipe) -> None:
    lines = Lines(pipe.into, told, most=20_000)
    read = b""
    for number, line in enumerate(numbered(3000), 1):
        lines.write(line)
        if number % 100 == 0:
            read += os.read(pipe.out, PAGE)
    accepted = False
    while not read.endswith(b"last\n"):
        if not accepted:
            before = lines.dropped
            lines.write(b"last\n")
            accepted = lines.dropped == before
        read += os.read(pipe.out, PAGE)
    expected = 0
    for line in read.splitlines()[:-1]:
        word, _, rest = line.partition(b" ")
        expected += int(rest) if word == b"dropped" else 1
        assert word == b"dropped" or int(word) == expected - 1
    assert lines.dropped > 1000
    assert read.count(b"dropped") > 5


def test_no_line_is_torn_where_several_write_to_one_pipe(pipe: Pipe) -> None:
    both = [Lines(pipe.into, told) for _ in range(3)]
    for number in range(400):
        for place, lines in enumerate(both):
            lines.write(b"%d " % place + b"%d" % place * (number * 7 % 1500) + b"\n")
    found = pipe.lines(1200)
    for line in found:
        writer, _, rest = line.rstrip(b"\n").partition(b" ")
        assert set(rest) <= set(writer), line
    assert len(found) == 1200


def test_a_line_longer_than_a_pipe_passes_whole(pipe: Pipe) -> None:
    lines = Lines(pipe.into, told)
    long = b"." * 100_000 + b"\n"
    lines.write(long)
    lines.write(b"next\n")
    assert pipe.lines(2) == [long, b"next\n"]


def test_a_descriptor_that_others_made_non_blocking_gets_all(pipe: Pipe) -> None:
    os.set_blocking(pipe.into, False)
    lines = Lines(pipe.into, told)
    sent = [*numbered(500), b"long " * 10_000 + b"\n", *numbered(10)]
    for line in sent:
        lines.write(line)
    assert pipe.lines(len(sent)) == sent


def test_where_nobody_reads_any_more_lines_are_counted_and_nothing_else() -> None:
    out, into = os.pipe()
    lines = Lines(into, told)
    os.close(out)
    for number in range(3):
        lines.write(b"%d\n" % number)
        assert lines.drain(10)
        assert lines.dropped >= number + 1
    assert lines.dropped <= 3 + 2, "notices are lines, too, and are not tried for ever"
    os.close(into)


def test_to_drain_ends_after_its_patience(pipe: Pipe) -> None:
    lines = Lines(pipe.into, told)
    for line in numbered(100):
        lines.write(line)
    assert not lines.drain(0.05)
    pipe.lines(100)
    assert lines.drain(10)

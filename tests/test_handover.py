"""What a supervisor leaves to the next one is read as it was written, and lines lose nothing on the way."""

from __future__ import annotations

import asyncio
import os
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.handover import Handover, Held, execute
from gateway.pipes import Line, Told
from tests.proving.descriptors import descriptors

HELD = Held("worker-1", True, 4711, 7, b'{"type":"To\xff', Told("ready", ("why",), "r1", 3), True, 12.5)
HANDOVER = Handover({"worker": 3, "control": 4}, 5, {"worker-1": (2, 1), "control": (0, 0)}, (HELD,))


def test_what_is_written_is_what_is_read() -> None:
    file = HANDOVER.written()
    try:
        assert Handover.read(file) == HANDOVER == Handover.read(file), "a trial has read it before"
    finally:
        os.close(file)
    assert HANDOVER.descriptors() == [3, 4, 7, 5]


def test_what_another_version_has_written_is_refused() -> None:
    file = HANDOVER.written()
    try:
        os.pwrite(file, b'{"what":1}'.ljust(os.fstat(file).st_size), 0)
        with pytest.raises(msgspec.MsgspecError, match="listeners"):
            Handover.read(file)
    finally:
        os.close(file)


def test_where_nothing_can_be_executed_nothing_has_changed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = descriptors()
        with pytest.raises(OSError, match="Argument list too long"):
            execute(Handover({"worker": ours.fileno()}, -1, {}, ()), {"HUGE": "x" * 10_000_000})
        assert not os.get_inheritable(ours.fileno())
        assert not descriptors() - before


async def test_a_line_is_handed_over_although_the_other_side_is_gone() -> None:
    """Its process is on the way out, and nobody has taken note of that yet."""
    ours, theirs = socket.socketpair()
    line = await Line(ours).open()
    line.say(Told())  # unread, it makes an error of the end
    theirs.sendall(msgspec.json.encode(Told(requests=7)) + b"\n")
    theirs.close()
    while not line._transport.is_closing():
        await asyncio.sleep(0)
    next_one = await Line(socket.socket(fileno=os.dup(line.descriptor)), line.unheard()).open()
    assert [told.requests async for told in next_one.heard(Told)] == [7]
    for one in (line, next_one):
        one.close()


@given(st.lists(st.integers(0, 999), max_size=8), st.data())
def test_what_nobody_has_heard_is_heard_by_the_next_one_wherever_it_was_cut(
    numbers: list[int], data: st.DataObject
) -> None:
    sent = b"".join(msgspec.json.encode(Told(requests=number)) + b"\n" for number in numbers)
    cut = data.draw(st.integers(0, len(sent)))
    taken = data.draw(st.integers(0, sent[:cut].count(b"\n")))

    async def heard() -> list[int]:
        ours, theirs = socket.socketpair()
        with theirs:
            first = await Line(ours).open()
            first.data_received(sent[:cut])
            told = first.heard(Told)
            before = [(await anext(told)).requests for _ in range(taken)]
            next_one = await Line(socket.socket(fileno=os.dup(first.descriptor)), first.unheard()).open()
            first.close()
            theirs.sendall(sent[cut:])
            theirs.shutdown(socket.SHUT_WR)
            after = [told.requests async for told in next_one.heard(Told)]
            next_one.close()
            return before + after

    assert asyncio.run(heard()) == numbers

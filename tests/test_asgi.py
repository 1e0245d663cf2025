"""Headers that travel on, bodies that come in, callers that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.asgi import Message, RawHeaders, Receive, end_to_end, header, read_body, refuse, until_hang_up
from gateway.errors import ClientGone, Forbidden, TooLarge

# — headers


@pytest.mark.parametrize(
    "name",
    [
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"Transfer-Encoding",
    ],
)
def test_hop_by_hop_headers_stay_behind(name: bytes) -> None:
    assert end_to_end([(b"a", b"1"), (name, b"x"), (b"b", b"2")]) == [(b"a", b"1"), (b"b", b"2")]


def test_what_connection_names_stays_behind_wherever_it_stands() -> None:
    headers = [(b"X-Mine", b"1"), (b"Connection", b"close, X-MINE , x-other"), (b"x-other", b"2"), (b"x-kept", b"3")]
    assert end_to_end(headers) == [(b"x-kept", b"3")]


def test_what_is_dropped_stays_behind() -> None:
    assert end_to_end([(b"Cookie", b"a"), (b"x", b"b")], frozenset((b"cookie",))) == [(b"x", b"b")]


NAMES = st.sampled_from([b"a", b"B", b"x-request-id", b"set-cookie", b"X-Long-Name"])


@given(st.lists(st.tuples(NAMES, st.binary(max_size=5))))
def test_all_others_keep_their_bytes_their_order_and_their_doubles(headers: RawHeaders) -> None:
    assert end_to_end(headers) == headers


def test_the_first_value_of_a_header_counts() -> None:
    assert header([(b"a", b"1"), (b"b", b"2"), (b"b", b"3")], b"b") == b"2"
    assert header([], b"b") is None


# — bodies


def saying(messages: Iterable[Message]) -> Receive:
    """A receive() that says these, and then waits."""
    left = iter(messages)

    async def receive() -> Message:
        for message in left:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def pieces(*bodies: bytes) -> list[Message]:
    """A body in pieces."""
    last = len(bodies) - 1
    return [{"type": "http.request", "body": body, "more_body": i < last} for i, body in enumerate(bodies)]


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"headers": list(headers)}


@pytest.mark.parametrize("bodies", [(b"",), (b"abcdef",), (b"abc", b"def"), (b"", b"abcdef", b""), (b"abcde", b"f")])
async def test_a_body_up_to_the_cap_is_read_in_whatever_pieces_it_comes(bodies: tuple[bytes, ...]) -> None:
    assert await read_body(scope(), saying(pieces(*bodies)), 6) == b"".join(bodies)


async def test_a_body_that_is_announced_as_too_large_is_not_read() -> None:
    async def receive() -> Message:
        raise AssertionError("nothing is read")

    with pytest.raises(TooLarge, match="the body has 7 bytes, at most 6 are read") as refused:
        await read_body(scope((b"content-length", b"7")), receive, 6)
    assert refused.value.closes


async def test_an_announcement_of_thousands_of_digits_is_too_large() -> None:
    with pytest.raises(TooLarge):
        await read_body(scope((b"content-length", b"9" * 5000)), saying([]), 6)


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"6")], [(b"content-length", b"six")]])
@pytest.mark.parametrize("bodies", [(b"abcdefg",), (b"abc", b"defg", b"never read")])
async def test_a_body_that_grows_too_large_is_read_no_further(headers: RawHeaders, bodies: tuple[bytes, ...]) -> None:
    read = 0

    async def receive() -> Message:
        nonlocal read
        read += 1
        return pieces(*bodies)[read - 1]

    with pytest.raises(TooLarge, match="more than 6 bytes"):
        await read_body(scope(*headers), receive, 6)
    assert read == min(2, len(bodies))


@pytest.mark.parametrize("before", [[], pieces(b"abc", b"def")[:1]])
async def test_a_caller_who_leaves_with_half_a_body_is_gone(before: list[Message]) -> None:
    with pytest.raises(ClientGone):
        await read_body(scope(), saying([*before, {"type": "http.disconnect"}]), 6)


# — refusals


async def test_a_refusal_is_a_whole_answer() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await refuse(send, Forbidden("not for this key"), headers=[(b"x-request-id", b"r1")])
    start, body = sent
    headers = dict(start["headers"])
    assert start["status"] == 403
    assert int(headers[b"content-length"]) == len(body["body"])
    assert headers[b"x-request-id"] == b"r1"
    assert headers[b"date"].endswith(b" GMT")
    assert b"connection" not in headers
    assert not body["more_body"]


async def test_a_refusal_is_told_in_the_shape_that_its_reader_knows() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await refuse(send, Forbidden("no"), shape="anthropic", called="req_1")
    await refuse(send, Forbidden("no"), shape="problem", called="req_1")
    _, anthropic, problem, document = sent
    assert b'"request_id":"req_1"' in anthropic["body"]
    assert (b"content-type", b"application/problem+json") in problem["headers"]
    assert b'"instance":"urn:request:req_1"' in document["body"]


@pytest.mark.parametrize(("error", "close"), [(Forbidden("no"), True), (TooLarge("no"), False)])
async def test_a_refusal_of_a_body_that_was_not_read_closes(error: Forbidden | TooLarge, close: bool) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await refuse(send, error, close=close)
    assert (b"connection", b"close") in sent[0]["headers"]


# — callers who leave


class Caller:
    """A caller who leaves when told to; `failing` as a server whose receive() breaks."""

    def __init__(self, *, failing: bool = False) -> None:
        self._left = asyncio.Event()
        self._failing = failing

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        await self._left.wait()
        if self._failing:
            raise ConnectionResetError
        return {"type": "http.disconnect"}


@pytest.fixture
async def no_task_is_left() -> Any:
    """Whatever a test does here, nothing of it runs on."""
    yield
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if "receive" in repr(task.get_coro())] == []


leaves_no_task = pytest.mark.usefixtures("no_task_is_left")


@leaves_no_task
@pytest.mark.parametrize("failing", [False, True])
async def test_a_block_ends_when_the_caller_leaves(failing: bool) -> None:
    caller = Caller(failing=failing)
    reached = False
    with pytest.raises(ClientGone):
        async with until_hang_up(caller.receive):
            caller.leave()
            await asyncio.sleep(10)
            reached = True
    assert not reached
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # and nothing of the cancellation comes later


@leaves_no_task
async def test_a_caller_who_left_before_is_gone_too() -> None:
    caller = Caller()
    caller.leave()
    with pytest.raises(ClientGone):
        async with until_hang_up(caller.receive):
            await asyncio.sleep(10)


@leaves_no_task
async def test_a_block_that_ends_first_ends_well() -> None:
    caller = Caller()
    async with until_hang_up(caller.receive):
        await asyncio.sleep(0)
    caller.leave()
    await asyncio.sleep(0.01)  # a caller who leaves afterwards cancels nothing


@leaves_no_task
async def test_an_error_of_the_block_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        async with until_hang_up(Caller().receive):
            raise ZeroDivisionError


@leaves_no_task
async def test_an_error_on_the_way_out_passes_and_the_task_is_not_cancelled_any_more() -> None:
    caller = Caller()
    with pytest.raises(ZeroDivisionError):
        async with until_hang_up(caller.receive):
            caller.leave()
            try:
                await asyncio.sleep(10)
            finally:
                raise ZeroDivisionError
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@leaves_no_task
async def test_who_cancels_for_another_reason_is_obeyed() -> None:
    async def work() -> None:
        async with until_hang_up(Caller().receive):
            await asyncio.sleep(10)

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@leaves_no_task
async def test_of_two_cancellations_the_other_one_is_obeyed() -> None:
    """The process shuts down in the very turn in which the caller leaves."""
    caller = Caller()

    async def work() -> None:
        async with until_hang_up(caller.receive):
            await asyncio.sleep(10)

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0.01)
    caller.leave()
    await asyncio.sleep(0)  # receive() has returned, and nobody was told yet
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@leaves_no_task
async def test_a_timeout_around_the_block_stays_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), until_hang_up(Caller().receive):
            await asyncio.sleep(10)


@leaves_no_task
async def test_a_timeout_inside_the_block_stays_the_blocks_own() -> None:
    caller = Caller()
    async with until_hang_up(caller.receive):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)


@leaves_no_task
async def test_a_caller_who_leaves_during_a_timeout_inside_is_gone() -> None:
    caller = Caller()
    with pytest.raises(ClientGone):
        async with until_hang_up(caller.receive), asyncio.timeout(10):
            caller.leave()
            await asyncio.sleep(10)

"""Two hundred random streams through the gateway; `python -m tests.proving.streams` sends as many as one likes."""

from __future__ import annotations

import asyncio

import pytest

from tests.proving import house
from tests.proving.backend import Backend
from tests.proving.load import Read
from tests.proving.streams import Stream, backend, documents, prove, stream, wrong

SEED = 3


async def test_whole_streams_arrive_to_the_byte_and_cut_ones_never_look_complete(store_url: str) -> None:
    async with (
        Backend(backend(SEED)) as upstream,
        house.gateway(store_url, documents(upstream.url)) as served,
        asyncio.timeout(50),
    ):
        verdict = await prove(served.url, await served.key(), range(100), SEED)
    assert verdict.failures == []
    assert verdict.seen["identical"] == 100
    cut = {kind for kind in verdict.seen if kind.startswith("cut")}
    assert cut == {f"cut after the status line ({f}, {by})" for f in ("length", "chunked") for by in ("FIN", "RST")}


def test_a_stream_is_the_same_whoever_makes_it() -> None:
    assert stream(1, 2, cut=True) == stream(1, 2, cut=True) != stream(1, 3, cut=True)


def of(cut: bool, *, encoded: bool = False) -> Stream:
    return Stream(b"head", b"data: 1\n\ndata: 2\n\n", b"", encoded, (), 10 if cut else None, "FIN")


ERROR = b'data: {"error":{"message":"m"}}\n\n'


@pytest.mark.parametrize(
    ("expected", "body", "whole", "found"),
    [
        (of(False), b"data: 1\n\ndata: 2\n\n", True, None),
        (of(False), b"data: 1\n\ndata: 2\n\n", False, "status 200, whole: False"),
        (of(False), b"data: 1\n\ndata: 3\n\n", True, "18 bytes, not the same as 18"),
        (of(True), b"data: 1\n\n", False, None),
        (of(True), b"data: 1\n\n", True, "looks complete"),
        (of(True), b"data: 1\n\n" + ERROR, False, None),
        (of(True), b"data: 1\n" + ERROR, False, "what came is no beginning of what was sent"),
        (of(True, encoded=True), b"data: 1\n\n" + ERROR, False, "what came is no beginning of what was sent"),
        (of(True), b"data: 2\n\n", False, "what came is no beginning of what was sent"),
    ],
)
def test_what_is_wrong_is_found(expected: Stream, body: bytes, whole: bool, found: str | None) -> None:
    headers = {b"content-encoding": b"gzip"} if expected.encoded else {}
    assert wrong(expected, Read(200, headers, body, whole)) == found

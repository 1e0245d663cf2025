"""A backend that costs as little as Python lets it: fixed JSON answers, and streams of events at a steady pace.

`python -m tests.bench.backend PORT`. POST …/completions with "stream": true streams EVENTS events, PACE a second; all
streams share one clock, so that a thousand of them are one timer. With "user": "burst" all of them come at once.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

TEXT = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"' + b"word " * 60
)
ANSWER = (
    TEXT + b'","logprobs":null,"finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":20,"total_tokens":80,"completion_tokens":60,"prompt_tokens_details":{"cached_tokens":0}}}'
)
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"accounts/fireworks/models/llama-v2-7b",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
FINISH = (
    b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"","finish_reason":"length"}],'
    b'"usage":{"prompt_tokens":20,"total_tokens":80,"completion_tokens":60}}\n\ndata: [DONE]\n\n'
)
EVENTS, PACE = 200, 25.0

JSON_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


BURST = STREAM_HEAD + _chunk(EVENT) * EVENTS + _chunk(FINISH) + b"0\r\n\r\n"


class Backend(asyncio.Protocol):
    """One connection: requests with a Content-Length, one after the other."""

    streams: dict[Backend, int]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = self.received[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.received) < end + 4 + length:
                return
            body = self.received[end + 4 : end + 4 + length]
            self.received = self.received[end + 4 + length :]
            if b'"user": "burst"' in body:
                self.transport.write(BURST)
            elif b'"stream": true' in body:
                self.transport.write(STREAM_HEAD)
                self.streams[self] = 0
            else:
                self.transport.write(JSON_ANSWER)

    def connection_lost(self, exc: Exception | None) -> None:
        self.streams.pop(self, None)


async def _clock() -> None:
    loop = asyncio.get_running_loop()
    event, last = _chunk(EVENT), _chunk(FINISH) + b"0\r\n\r\n"
    tick = loop.time()
    # Streams are spread over ten phases of a period: real ones do not tick together.
    phase = 0
    while True:
        tick += 1 / PACE / 10
        await asyncio.sleep(max(0, tick - loop.time()))
        phase = (phase + 1) % 10
        for connection, sent in list(Backend.streams.items()):
            if id(connection) // 64 % 10 != phase:
                continue
            if sent < EVENTS:
                connection.transport.write(event)
                Backend.streams[connection] = sent + 1
            else:
                del Backend.streams[connection]
                connection.transport.write(last)


async def main(port: int) -> None:
    """Serve until killed."""
    Backend.streams = {}
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", port, backlog=4096)
    async with server:
        await _clock()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))

"""uvicorn as the gateway uses it: its options, and its protocol with one write where it makes two.

uvicorn writes the head of an answer by itself, and what follows by itself. Each write to a socket costs a system call
and wakes the caller: for a short answer that is a tenth of all that the gateway does. So a head waits for what follows
it, but never longer than the turn of the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def config(app: Any, *, drain: float) -> uvicorn.Config:
    """The options of a server of ours; after SIGTERM its answers may go on for `drain` seconds."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        date_header=False,  # the backend's own Date passes; answers of ours bring one
        timeout_graceful_shutdown=int(drain),
    )


class Protocol(HttpToolsProtocol):
    """One connection of a caller."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, _Gathered(cast(asyncio.Transport, transport), self.loop)))


class _Gathered:
    """A transport that sends a head together with the next thing written."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, None
        if head is not None and not self._transport.is_closing():  # uvloop refuses to write to what is closed
            self._transport.write(head)

"""What of a caller's head travels on to a backend, and what the gateway says there of the way that it came.

A header travels only if its name stands in a table, and it is the table's name that is written: of a caller's bytes
nothing but values reaches a backend. Credentials, cookies, X-Forwarded-* and what tells of the caller's SDK
(X-Stainless-*) are not in the table.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gateway.asgi import RawHeaders, named_by_connection
from gateway.errors import LoopDetected, VersionNotSupported

# What backends of this kind are known to read. A pool names further ones (forward_headers).
_USUAL = (
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "idempotency-key",
    "openai-beta",
    "user-agent",
    "x-client-request-id",
    "x-multi-turn-session-id",
    "x-prompt-cache-isolation-key",
    "x-session-affinity",
)

Travelling = Mapping[bytes, bytes]
Samples = Callable[[bytes, bool | None], bool]  # of a trace's id, and of what its parent says, if there is one


def travelling(more: Iterable[str] = ()) -> Travelling:
    """The table of the headers that travel, with those that a pool adds."""
    return {name.encode(): name.encode() for name in (*_USUAL, *more)}


def carried(headers: RawHeaders, table: Travelling) -> RawHeaders:
    """The headers that travel. What Connection names belongs to the caller's connection (RFC 9110 section 7.6.1)."""
    kept = [(table[name], value) for name, value in headers if name in table]
    dropped = named_by_connection(headers)
    return [header for header in kept if header[0] not in dropped] if dropped else kept


def pseudonym(secret: bytes) -> bytes:
    """What this gateway is called in Via: the same for all that share a secret, and telling nothing else of them."""
    return b"gw-" + hmac.digest(secret, b"via", "sha256").hex()[:12].encode()


class Way:
    """How a request came: what is told to a backend beside the caller's own headers.

    RFC 9110 section 7.6.3 (Via), RFC 7239 (Forwarded), W3C Trace Context (traceparent, tracestate).
    """

    __slots__ = ("flags", "headers", "sampled", "span", "trace_id")

    def __init__(
        self, scope: Mapping[str, Any], name: bytes, called: bytes, span: bytes, samples: Samples | None = None
    ) -> None:
        """`called` is the request's id, `span` sixteen random bytes; `samples` says of a trace whether it is recorded.

        Raises VersionNotSupported for HTTP/1.0, and LoopDetected for a request that was here before.
        """
        if scope["http_version"] == "1.0":  # it has no chunks, and so no stream whose end can be told from a cut
            raise VersionNotSupported("the request is HTTP/1.0, expected HTTP/1.1 (nginx: proxy_http_version 1.1)")
        via, parent, state = _given(scope["headers"])
        if any(_passed(hop, name) for hop in via):
            raise LoopDetected(
                "the request came through this gateway already: an upstream leads back to it",
                headers=[(b"x-should-retry", b"false")],
            )
        via.append(b"%b %b" % (scope["http_version"].encode(), name))
        found = _parent(parent)
        trace, self.flags = (found.trace, found.known) if found else (span.hex().encode(), RANDOM)
        self.sampled = False
        if samples is not None:
            self.sampled = samples(trace, found.sampled if found else None)
            self.flags = self.flags & ~SAMPLED | self.sampled
        self.trace_id = trace.decode()
        self.span = span[:8].hex().encode()  # the backend's parent: the attempt that asks it
        self.headers: RawHeaders = [
            (b"via", b", ".join(via)),
            (b"forwarded", _forwarded(scope, name)),
            (b"x-request-id", called),
            (b"traceparent", b"00-%b-%b-%02x" % (trace, self.span, self.flags)),
        ]
        if found is not None and (members := _members(state)):
            self.headers.append((b"tracestate", members))

    def again(self, span: bytes) -> None:
        """Go out once more, as another span: eight random bytes."""
        self.span = span.hex().encode()
        self.headers = [
            (name, value[:36] + self.span + value[52:] if name == b"traceparent" else value)
            for name, value in self.headers
        ]


def _given(headers: RawHeaders) -> tuple[list[bytes], bytes | None, list[bytes]]:
    """Via, traceparent and tracestate as they came. Two traceparents are none: nobody knows which one is meant."""
    found: dict[bytes, list[bytes]] = {b"via": [], b"traceparent": [], b"tracestate": []}
    for name, value in headers:
        if name in found:
            found[name].append(value)
    parents = found[b"traceparent"]
    return found[b"via"], parents[0].strip() if len(parents) == 1 else None, found[b"tracestate"]


class Parent(NamedTuple):
    """The caller's span, whose child a request is: trace, span and flags in hex digits."""

    trace: bytes
    span: bytes
    flags: bytes

    @property
    def sampled(self) -> bool:
        """Whether the caller records it."""
        return bool(self.known & SAMPLED)

    @property
    def known(self) -> int:
        """The flags that have a meaning; who makes a span of his own sets no others."""
        return int(self.flags, 16) & (SAMPLED | RANDOM)


def parent_of(headers: RawHeaders) -> Parent | None:
    """The caller's span, where his request names one."""
    return _parent(_given(headers)[1])


def _passed(via: bytes, name: bytes) -> bool:
    """Whether a hop of this name is in a Via: `1.1 name (a comment), 1.0 other`."""
    return any(hop.split(b"(")[0].split()[1:2] == [name] for hop in via.split(b","))


# A later version has the first four fields too, and may have more.
_PARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
SAMPLED = 1  # the flag that says that a caller records the trace
RANDOM = 2  # and the one that says that the trace's id is random, as ours are: it holds whoever samples (level 2)


def _parent(header: bytes | None) -> Parent | None:
    found = _PARENT.fullmatch(header) if header else None
    if found is None or (found[0].startswith(b"00") and len(found[0]) != 55):
        return None
    return Parent(found[1], found[2], found[3])


# A member of a tracestate. Level 1 allows the @ once, and level 2 wherever it is not the first.
_MEMBER = re.compile(
    rb"([a-z0-9][a-z0-9_*/@-]{0,255})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_MOST_MEMBERS = 32


def _members(state: list[bytes]) -> bytes:
    """A caller's tracestate as one list; empty where it is none, for it is taken whole or not at all.

    It is the caller's, and goes where his prompt goes, as W3C wants it; no span of ours has it, nor any line.
    """
    members = [member for part in b",".join(state).split(b",") if (member := part.strip(b" \t"))]
    keys = {found[1] for member in members if (found := _MEMBER.fullmatch(member))}
    return b",".join(members) if len(keys) == len(members) <= _MOST_MEMBERS else b""


def _forwarded(scope: Mapping[str, Any], name: bytes) -> bytes:
    client = scope.get("client")
    host = str(client[0]) if client else "unknown"
    node = f'"[{host}]"' if ":" in host else host
    return f"for={node};proto={scope['scheme']};by=_{name.decode()}".encode()

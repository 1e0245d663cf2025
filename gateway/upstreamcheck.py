"""What the doctor finds of the upstreams: whether each can be reached, is whom it should be, answers, and takes the
gateway's credential, which is never shown."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from gateway.errors import UpstreamFailed
from gateway.findings import Finding, error, graded, judged, ok, warning
from gateway.language import PoolPolicy, TlsPolicy, UpstreamPolicy
from gateway.pools import Policies
from gateway.upstream import Upstream
from gateway.wire import trusting

_DAY = 86_400.0
_SOON, _TOO_SOON = 21, 3  # days that a certificate has left

_reading = threading.Lock()
_read = lru_cache(trusting)

# Does something that blocks beside the event loop, in a thread that nobody has to wait for.
Beside = Callable[[Callable[[], Any]], Awaitable[Any]]


async def upstream_findings(
    name: str, upstream: Upstream, pool: PoolPolicy, own: UpstreamPolicy, beside: Beside
) -> list[Finding]:
    """All findings of one upstream, `name` in logs."""
    found = _credential(name, own)
    reached = await _reached(name, pool, own, beside)
    found += reached
    if all(finding.verdict != "error" for finding in reached):
        found += await _answers(name, upstream, pool, own)
    if upstream.drains:  # what is taken out for repair may be broken
        found = [_softened(finding) for finding in found]
    return found


def each(policies: Policies) -> list[tuple[str, Upstream, PoolPolicy, UpstreamPolicy]]:
    """Every upstream of the policies with what is said of it."""
    found = []
    for pool, policy in policies.snapshot.pools.items():
        for upstream, own in zip(policies.pools[pool].upstreams, policy.upstreams, strict=True):
            found.append((f"{pool}/{upstream.name}", upstream, policy, own))
    return found


def _softened(finding: Finding) -> Finding:
    if finding.verdict != "error":
        return finding
    return warning(finding.check, finding.of, f"{finding.found} (it is drained)", finding.expected, finding.do)


def _credential(name: str, own: UpstreamPolicy) -> list[Finding]:
    """Of a file it is told with the policies, which cannot be taken without it."""
    if own.key is None:
        return []
    if own.key_file or os.environ.get(own.key, "").strip():
        return [ok("upstream.credential", name, f"{own.key} is set")]
    do = f"set {own.key} in the environment of the gateway"
    return [error("upstream.credential", name, f"{own.key} is empty", "a credential", do)]


async def _reached(name: str, pool: PoolPolicy, own: UpstreamPolicy, beside: Beside) -> list[Finding]:
    """Whether its name resolves, a connection is made, and the certificate is good for a while."""
    parts = urlsplit(own.url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    check, patience = "upstream.connect", pool.timeouts.connect
    try:
        async with asyncio.timeout(patience):
            await beside(lambda: _resolved(host, port))
    except (OSError, UnicodeError) as failure:
        said = f"{host} is not resolved within {patience:g} s" if _late(failure) else f"{host} has no address"
        return [error(check, name, said, "a name that resolves", "DNS, or the url in pools.yaml")]
    try:
        tls = await _tls(pool, host, beside) if secure else {}
        began = time.perf_counter()
        async with asyncio.timeout(patience):
            days = await _connected(host, port, tls)
    except ssl.SSLCertVerificationError as refused:
        do = "a new certificate at the upstream, or tls.ca and tls.server_name in pools.yaml"
        return [error("upstream.certificate", name, refused.verify_message, "a certificate that is accepted", do)]
    except OSError as failure:
        said = f"no connection within {patience:g} s" if _late(failure) else _words(failure)
        return [error(check, name, said, "a connection", "start it, or mend the url, the network or a firewall")]
    well = ok(check, name, f"connected in {(time.perf_counter() - began) * 1000:.1f} ms")
    return [well] if days is None else [well, _certificate(name, days)]


def _certificate(name: str, days: float) -> Finding:
    found, expected = f"its certificate has {days:.0f} days left", f"more than {_SOON}"
    verdict = graded(-days, -_SOON, -_TOO_SOON)
    return judged(verdict, "upstream.certificate", name, found, expected, "renew it at the upstream")


def _resolved(host: str, port: int) -> None:
    socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _late(failure: BaseException) -> bool:
    return isinstance(failure, TimeoutError)


def _words(failure: OSError) -> str:
    if isinstance(failure, ssl.SSLError):
        return f"it does not speak TLS as expected ({(failure.reason or 'unknown').lower().replace('_', ' ')})"
    return "it refuses the connection" if isinstance(failure, ConnectionRefusedError) else failure.strerror or "no way"


async def _tls(pool: PoolPolicy, host: str, beside: Beside) -> dict[str, Any]:
    """How a connection of a pool is secured, as asyncio takes it. Raises OSError for a file that cannot be read."""
    tls = pool.tls or TlsPolicy.model_construct()
    context = await beside(lambda: _trusting(tls.ca, tls.certificate, tls.key))
    return {"ssl": context, "server_hostname": tls.server_name or host}


def _trusting(ca: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    """What `trusting` gives, read once: it takes some 40 ms, which many upstreams at once would take from the time that
    they have to connect."""
    with _reading:
        return _read(ca, certificate, key)


async def _connected(host: str, port: int, tls: dict[str, Any]) -> float | None:
    """Connect once; the days that its certificate has left, where there is one. Raises OSError."""
    _, writer = await asyncio.open_connection(host, port, **tls)
    certificate: dict[str, Any] = writer.get_extra_info("peercert") or {}
    writer.transport.abort()
    with suppress(KeyError, ValueError):
        return (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / _DAY
    return None


async def _answers(name: str, upstream: Upstream, pool: PoolPolicy, own: UpstreamPolicy) -> list[Finding]:
    """What it says to its probe; to one that has none, whether it lists its models."""
    probe, patience = pool.health.probe, pool.health.probe_timeout
    path = probe or f"{urlsplit(own.url).path.rstrip('/')}/v1/models"
    try:
        status = await upstream.status(path, patience)
    except UpstreamFailed as failure:
        do = "its own log: it takes connections, and does not answer"
        return [error("upstream.answer", name, f"GET {path}: {failure.message}", "an answer", do)]
    found = f"GET {path}: HTTP {status}"
    if status in (401, 403, 407):
        do = f"the credential in {own.key_env}" if own.key_env else "key_env in pools.yaml: it asks for a credential"
        return [error("upstream.credential", name, f"{found}: refused", "a credential that it takes", do)]
    if 300 <= status < 400:
        do = "the url in pools.yaml: https:// where it wants that, or the address that it sends to; it is not followed"
        return [error("upstream.answer", name, f"{found}: it sends elsewhere", "2xx", do)]
    if 200 <= status < 300 or (probe is None and status < 500):
        return [ok("upstream.answer", name, found)]
    do = "its own log" if status >= 500 else "health.probe in pools.yaml names a path that answers 2xx"
    return [error("upstream.answer", name, found, "2xx", do)]

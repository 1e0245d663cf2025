"""Pools of upstreams: who is asked, who is asked next, and who when a whole pool is down.

While nothing was answered, another upstream may be asked, and after all of a pool another pool; after the first byte
of an answer nobody else is. All of it happens within the time that the first upstream had for its first byte.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import NamedTuple

from gateway.asgi import RawHeaders, header
from gateway.balance import Rotation, Weighed, by_affinity, least_busy
from gateway.bridge import Bridge
from gateway.context import UNSAID, room
from gateway.credentials import Secrets
from gateway.errors import BadRequest, Invalid, UpstreamFailed, UpstreamsBusy
from gateway.health import Budget
from gateway.hops import Way
from gateway.language import Cause, PoolPolicy, TlsPolicy, UpstreamPolicy
from gateway.marks import Mark, marks_of
from gateway.metrics import Counters
from gateway.normalize import InferenceRequest, fitted, instead
from gateway.reading import Reloads
from gateway.snapshot import Model, Snapshot
from gateway.upstream import Answer, Upstream, cause_of
from gateway.wire import Wire, trusting

_MISFITS = (400, 413, 422)  # what backends say to a request that does not fit
_ERROR = 64 * 1024  # bytes of an error that is looked into
_SOON = 1.0  # seconds after which one may ask again where nobody knows: all are busy
_random = random.Random()

_OVERDUE = ("upstream_first_byte_timeout", "upstream_total_timeout")  # no time is left for anybody else


class Pool:
    """The upstreams that can stand in for one another, under one policy."""

    def __init__(self, name: str, policy: PoolPolicy, upstreams: Sequence[Upstream], attempts: Counters) -> None:
        self.name = name
        self.policy = policy
        self.upstreams = tuple(upstreams)
        self.budget = Budget(policy.retries)
        self._rotation: Rotation[Upstream] = Rotation()
        for upstream, own in zip(upstreams, policy.upstreams, strict=True):
            upstream.join(name, policy, own, self._can_spare_one, attempts)

    def __repr__(self) -> str:
        return f"<Pool {self.name}: {self.upstreams}>"

    def free(self, now: float, tried: Sequence[Upstream] = ()) -> list[Upstream]:
        """Whoever may be asked now, and was not yet."""
        return [upstream for upstream in self.upstreams if upstream not in tried and upstream.free(now)]

    def choose(self, now: float, tried: Sequence[Upstream], session: bytes) -> Upstream | None:
        """Who is asked next; None where nobody is free. Requests of one `session` meet the same one, if they may."""
        free = self.free(now, tried)
        if len(free) < 2:
            return free[0] if free else None
        weighed: Weighed[Upstream] = [(upstream, upstream.weight(now)) for upstream in free]
        match self.policy.balance:
            case "affinity":
                return by_affinity(weighed, session)
            case "round_robin":
                return self._rotation.next(weighed)
        return least_busy(weighed, _random)

    def may_ask_another(self, now: float, tried: Sequence[Upstream], cause: Cause | int | None) -> bool:
        """Whether a request goes to another upstream after this; if so, that is counted. A connection that could not be
        made cost nobody anything."""
        if len(tried) >= self.policy.retries.attempts or not self.free(now, tried):
            return False
        return cause == "connect" or self.budget.spend(now)

    def away(self, now: float) -> UpstreamsBusy:
        """What is told when nobody is free, with the time until somebody may be."""
        waits = [wait for upstream in self.upstreams if (wait := upstream.wait(now)) is not None]
        return UpstreamsBusy("every upstream of the pool is full or away", retry_after=min(waits, default=0.0) or _SOON)

    def _can_spare_one(self) -> bool:
        """Whether one more may be ejected: at most half of a pool is, unless another pool is there to stand in."""
        there = [upstream for upstream in self.upstreams if not upstream.drains]
        return self.policy.fallback is not None or 2 * (1 + sum(u.health.out for u in there)) <= len(there)


class Attempt(NamedTuple):
    """An attempt of which nothing was passed on to the caller."""

    span: bytes  # what its backend was told, in hex digits
    upstream: Upstream
    model: Model
    ended: float  # in time.monotonic(); it began when the one before ended, or when the request was admitted
    outcome: str  # the code of its failure, or the status that was answered; cancelled: the caller left


class Opening:
    """A request to the pool of its model: entered, it is an answer; left, the answer is closed.

    `tried` are the attempts before that answer, or all of them where there is none.
    """

    __slots__ = (
        "_answer",
        "_attempts",
        "_headers",
        "_is_final",
        "_policies",
        "_request",
        "_since",
        "_team",
        "_way",
        "tried",
    )

    def __init__(self, policies: Policies, request: InferenceRequest, team: str, headers: RawHeaders, way: Way) -> None:
        self._policies = policies
        self._request = request
        self._team = team
        self._headers = headers
        self._way = way
        self.tried: list[Attempt] = []
        self._attempts = 0
        self._is_final = False  # policy forbids to send it once more, wherever to

    @property
    def pool(self) -> Pool:
        """The one that is asked first."""
        return self._policies.pools[self._request.model.pool]

    async def __aenter__(self) -> Answer:
        self._since = self._now()
        failure: UpstreamFailed | None = None
        for request, is_last in self._requests():
            pool = self._policies.pools[request.model.pool]
            try:
                self._answer = await self._ask(pool, request, is_last)
            except UpstreamFailed as failed:
                failure = failed
                if is_last or self._is_final or not self._in_time(request):
                    break
            else:
                if request.upload is not None:
                    request.upload.give_up()
                self._answer.attempts = self._attempts
                return self._answer
        assert failure is not None, "the model that was asked comes first"
        if self._attempts > 1:  # what was tried again here need not be tried again from farther away
            failure.extra_headers = [*failure.extra_headers, (b"x-should-retry", b"false")]
        raise failure

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._answer.leave()

    def _requests(self) -> Iterator[tuple[InferenceRequest, bool]]:
        """The request, and it for the models that stand in, each with whether it is the last one."""
        request = self._request
        models = list(request.model.fallbacks)
        while True:
            yield request, not models
            while models:
                with suppress(Invalid, BadRequest):  # what another model does not take, or hold, it is not asked
                    request = instead(self._request, models.pop(0))
                    break
            else:
                return

    async def _ask(self, pool: Pool, request: InferenceRequest, is_last: bool) -> Answer:
        """The answer of a pool. Where that says that the request does not fit its model's context, and the caller wants
        it cut to what does, it is asked once more for as much as it says that there is room for."""
        answer = await self._ask_once(pool, request, is_last)
        if answer.status not in _MISFITS or not request.truncates:
            return answer
        try:
            told = await answer.gather(_ERROR)
            left = None if told is None else room(told)
            if left == UNSAID and request.endpoint.events != "chat":
                left = None  # a chat without a bound gets what is left, a completion sixteen tokens
        except BaseException:
            await answer.leave()
            raise
        if not left:
            return answer
        await answer.leave()
        self._in_vain(answer.upstream, request, str(answer.status))
        smaller = await asyncio.to_thread(fitted, request, None if left == UNSAID else left)
        return await self._ask_once(pool, smaller, is_last)

    async def _ask_once(self, pool: Pool, request: InferenceRequest, is_last: bool) -> Answer:
        """The answer of a pool. Raises UpstreamFailed where it has none, or one that another pool may better."""
        tried: list[Upstream] = []
        session = self._session(request)
        pool.budget.asked(self._now())
        while (upstream := pool.choose(self._now(), tried, session)) is not None:
            tried.append(upstream)
            self._attempts += 1
            answer: Answer | None = None
            try:
                answer = await upstream.ask(request, self._headers, self._way.headers, self._since)
                cause: Cause | int | None = answer.status
            except UpstreamFailed as failed:
                failure, cause = failed, cause_of(failed)
                self._in_vain(upstream, request, failed.code or failed.type)
            except BaseException:
                self._in_vain(upstream, request, "cancelled")
                raise
            may = cause in pool.policy.retries.on and self._in_time(request) and not _is_underway(request)
            here = may and pool.may_ask_another(self._now(), tried, cause)
            if answer is not None:
                if not may or (is_last and not here):
                    return answer
                await answer.leave()
                self._in_vain(upstream, request, str(answer.status))
                failure = UpstreamFailed(f"the upstream answered {answer.status}")
            if not here:
                never = failure.code in _OVERDUE or _is_underway(request)
                self._is_final = never or (cause is not None and not may)
                raise failure
        raise pool.away(self._now())

    def _in_vain(self, upstream: Upstream, request: InferenceRequest, outcome: str) -> None:
        """Note an attempt. To the next backend the next one is another span."""
        self.tried.append(Attempt(self._way.span, upstream, request.model, time.monotonic(), outcome))
        self._way.again(os.urandom(8))

    def _session(self, request: InferenceRequest) -> bytes:
        """Who shares it meets the same upstream. The team is part of it: no team sees where another one is served."""
        if not request.model.affinity:
            return b""
        return b"%b\0%b" % (self._team.encode(), header(self._headers, b"x-session-affinity") or request.session)

    def _in_time(self, request: InferenceRequest) -> bool:
        return self._now() - self._since < request.model.timeouts.first_byte

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _is_underway(request: InferenceRequest) -> bool:
    """Whether a part of its body is gone, so that nobody else can be sent it."""
    return request.upload is not None and request.upload.begun


class Pools:
    """All pools of a policy, by name. An upstream that was there before keeps its connections and its health."""

    def __init__(self, policies: Mapping[str, PoolPolicy], secrets: Secrets, before: Pools | None = None) -> None:
        """Raises OSError for a certificate that cannot be read; nothing has changed then."""
        held = {} if before is None else before._upstreams
        self.attempts: Counters = _attempts() if before is None else before.attempts
        self._upstreams: dict[_Identity, Upstream] = {}
        for name, policy in policies.items():
            certificates = tuple(marks_of(policy.tls.files).values()) if policy.tls else ()
            for own in policy.upstreams:
                identity = (name, own.url, own.key, policy.transport, policy.tls, certificates)
                self._upstreams[identity] = held.get(identity) or _upstream(policy, own)
        self._drained: frozenset[str] = frozenset() if before is None else before._drained
        upstreams = iter(self._upstreams.values())
        self._pools = {
            name: Pool(name, policy, list(islice(upstreams, len(policy.upstreams))), self.attempts)
            for name, policy in policies.items()
        }
        for pool in self._pools.values():
            for upstream, own in zip(pool.upstreams, pool.policy.upstreams, strict=True):
                upstream.authorize(pool.policy.api, secrets.get(own.key or "", ""))
        self.drain(self._drained)

    def __repr__(self) -> str:
        return f"<Pools {list(self._pools.values())}>"

    def __getitem__(self, name: str) -> Pool:
        return self._pools[name]

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools.values())

    def watch(self) -> None:
        """Begin to probe, where policies say so."""
        for upstream in self._upstreams.values():
            upstream.watch()

    def drain(self, names: frozenset[str]) -> None:
        """Give nothing new to these upstreams, `pool/host:port`, and to all others what is theirs."""
        self._drained = names
        for pool in self._pools.values():
            for upstream in pool.upstreams:
                upstream.drained = f"{pool.name}/{upstream.name}" in names

    async def retire(self, after: Pools | None = None) -> None:
        """Close every upstream that is not in `after`, each when its last answer has ended."""
        kept = set() if after is None else set(after._upstreams.values())
        for upstream in set(self._upstreams.values()) - kept:
            await upstream.retire()


def _attempts() -> Counters:
    meaning = "how requests to upstreams went: answered, failed, unreachable; cut: answered, and failed after that"
    return Counters("gateway_upstream_attempts_total", meaning, "pool", "upstream", "result")


_Identity = tuple[str, str, str | None, str, TlsPolicy | None, tuple[Mark, ...]]


def _upstream(policy: PoolPolicy, own: UpstreamPolicy) -> Upstream:
    tls = policy.tls or TlsPolicy.model_construct()
    trusted = trusting(tls.ca, tls.certificate, tls.key) if policy.tls else None
    kind = {"wire": Wire, "httpx": Bridge}[policy.transport]
    transport = kind(own.url, ssl_context=trusted, server_name=tls.server_name)
    return Upstream(policy, own, transport)


@dataclass(frozen=True, slots=True)
class Policies:
    """A snapshot and the pools that it describes: what a request keeps for its whole life."""

    snapshot: Snapshot
    pools: Pools
    secrets: Secrets = field(default_factory=dict, repr=False, compare=False)

    def open(self, request: InferenceRequest, team: str, headers: RawHeaders, way: Way) -> Opening:
        """The answer to a request, to be entered. Entering raises UpstreamFailed and its kin."""
        return Opening(self, request, team, headers, way)


class Live:
    """The policies in force, swapped whole, and what became of the documents that they are made of."""

    def __init__(self, policies: Policies, reloads: Reloads) -> None:
        self.policies = policies
        self.reloads = reloads
        self.turn = asyncio.Lock()  # of who changes them

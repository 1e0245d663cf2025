"""What the data plane tells of itself in numbers: of each exchange when it has ended, of everything else once a second.

Labels come from tables and from policies; whatever callers write is "other". What others count (the store its calls,
the pools how upstreams answer) they count in families of their own, which are told from here.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

import structlog

from gateway import __version__
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.metrics import FOLDER, OTHER, Counters, Gauges, Histograms, Labels, Metrics
from gateway.otel import Loss
from gateway.pools import Live
from gateway.settlements import Settlements
from gateway.store import Store
from gateway.telemetry import dropped

_FLUSHES, _LOOKS = 1.0, 0.1  # seconds between two flushes, and two looks whether the event loop turns

# Buckets, in seconds. Those of requests, of first bytes and of tokens are OpenTelemetry's for generative AI.
_DURATIONS = [0.01 * 2**power for power in range(14)]
_FIRST_BYTES = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
_PER_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
_OVERHEADS = [0.25e-3 * 2**power for power in range(13)]
_LAGS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]

_METHODS = {name: name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
_STATUSES = {status: str(status) for status in (*map(int, HTTPStatus), 499, 529)}

_log = structlog.get_logger("gateway.metrics")


class Meters:
    """The numbers of one worker, in files of the state folder that workers share."""

    def __init__(
        self,
        state: Path,
        live: Live,
        store: Store,
        settlements: Settlements,
        spans_lost: Mapping[Loss, int],
    ) -> None:
        """`spans_lost` is looked at as it changes."""
        self._live, self._store, self._settlements = live, store, settlements
        self._failing = False  # whether the files could not be written last
        self.active = 0  # requests that are being answered
        self._requests = Counters("gateway_http_requests_total", "requests that ended", "method", "route", "status")
        self._durations = Histograms(
            "gateway_http_request_duration_seconds", "from a request to the end of its answer", _DURATIONS, "route"
        )
        self._ended = Counters("gateway_requests_ended_total", "exchanges by how they ended", "ended")
        self._refusals = Counters(
            "gateway_refusals_total", "errors of the gateway's own, and the limits that refused", "code", "limit"
        )
        self._tokens = Counters(
            "gateway_tokens_total",
            "tokens, each once: input is what was not cached, output what was no reasoning",
            *("team", "model", "type"),
        )
        self._cost = Counters("gateway_cost_usd_total", "what answers cost, in dollars", "team", "model")
        self._first_bytes = Histograms(
            "gateway_time_to_first_byte_seconds", "from a request to the head of its answer", _FIRST_BYTES, "model"
        )
        self._per_token = Histograms(
            "gateway_time_per_output_token_seconds", "of streams, after the first token", _PER_TOKEN, "model"
        )
        self._overheads = Histograms(
            "gateway_overhead_seconds", "from a request, without its body's time, to asking an upstream", _OVERHEADS
        )
        self._lags = Histograms("gateway_event_loop_lag_seconds", "how late the event loop turns", _LAGS)
        self._reloads = Counters(
            "gateway_policies_reloads_total", "policies that were read anew: taken, refused", "result"
        )
        self._losses = Counters("gateway_store_losses_total", "how often the store was lost")
        self._dropped = Counters("gateway_log_lines_dropped_total", "log lines that nobody took")
        self._spans_lost = spans_lost
        self._lost = Counters("gateway_trace_spans_lost_total", "spans that no collector took, and why", "reason")
        for family in (self._overheads, self._lags, self._losses, self._dropped):
            family[()]  # told from the start, as 0
        self._active = Gauges("gateway_http_active_requests", "requests that are being answered", "livesum")
        of = ("pool", "upstream")
        self._up = Gauges("gateway_upstream_up", "whether the upstream is in, with all workers", "livemin", *of)
        self._in_flight = Gauges("gateway_upstream_in_flight", "requests at the upstream", "livesum", *of)
        self._store_up = Gauges("gateway_store_up", "whether the store answers all workers", "livemin")
        self._takes = Gauges("gateway_spool_takes", "whether what the store does not take can be spooled", "livemin")
        self._policies = Gauges("gateway_policies_info", "the policies in force", "livemax", "revision")
        self._reloaded = Gauges(
            "gateway_policies_last_reload_successful", "whether all workers took what they read last", "livemin"
        )
        self._build = Gauges("gateway_build_info", "the gateway that runs", "livemax", "version")
        self._build[(__version__,)] = 1
        own = [one for one in vars(self).values() if isinstance(one, Counters | Histograms | Gauges)]
        self._metrics = Metrics(state / FOLDER, *own, store.times, live.policies.pools.attempts)

    # — what ends

    def exchange(self, x: Exchange, method: str) -> None:
        """An exchange has ended."""
        now = time.monotonic()
        self.answered(method, x.endpoint.path, x.status, now - x.received)
        self._ended[(x.ended,)].add()
        if x.error is not None:
            self.refused(x.error)
        if x.lease is not None and x.lease.since:
            self._overheads[()].observe(x.lease.since - x.received - x.waited)
        if x.answer is not None and x.request is not None:
            model = x.request.model.entry  # its name may be a caller's
            self._first_bytes[(model,)].observe(x.answer.answered - x.received)
            self._used(x, model, now - x.answer.answered if x.answer.is_stream else 0.0)

    def _used(self, x: Exchange, model: str, streamed: float) -> None:
        usage, team = x.usage, x.terms.team
        if not usage.total:
            return
        for kind, tokens in (
            ("input", usage.input - usage.cached),
            ("cached", usage.cached),
            ("output", usage.output - usage.reasoning),
            ("reasoning", usage.reasoning),
        ):
            if tokens > 0:
                self._tokens[(team, model, kind)].add(tokens)
        if cost := usage.cost(x.terms.price):
            self._cost[(team, model)].add(cost / 1e6)
        if streamed and usage.output > 1:
            self._per_token[(model,)].observe(streamed / (usage.output - 1))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request has ended, be it an exchange or another one."""
        labels = _METHODS.get(method, OTHER), route, _STATUSES.get(status, OTHER)
        self._requests[labels].add()
        self._durations[(route,)].observe(seconds)

    def refused(self, error: GatewayError) -> None:
        """Somebody was told an error of ours."""
        self._refusals[(error.code or error.type, error.policies[0] if error.policies else "")].add()

    def unread(self, error: GatewayError) -> None:
        """What came was refused before it was read."""
        self._requests[(OTHER, OTHER, _STATUSES.get(error.status, OTHER))].add()
        self.refused(error)

    # — what is looked at

    async def watch(self) -> NoReturn:
        """See how late the event loop turns, for ever."""
        lag = self._lags[()]
        while True:
            due = time.monotonic() + _LOOKS
            await asyncio.sleep(_LOOKS)
            lag.observe(max(0.0, time.monotonic() - due))

    async def keep_up(self) -> NoReturn:
        """Tell everything, for ever."""
        while True:
            self._look()
            await asyncio.to_thread(self._flush)  # a disk may be slow
            await asyncio.sleep(_FLUSHES)

    def close(self) -> None:
        """Tell how it ended."""
        self._look()
        self._flush()
        self._metrics.close()

    def _look(self) -> None:
        """How it is now."""
        reloads, up = self._live.reloads, dict[Labels, float]()
        in_flight: defaultdict[Labels, float] = defaultdict(float)
        for pool in self._live.policies.pools:
            for upstream in pool.upstreams:
                labels = pool.name, upstream.name
                up[labels] = min(up.get(labels, 1), not upstream.health.out)
                in_flight[labels] += upstream.in_flight
        self._up.set(up)
        self._in_flight.set(in_flight)
        self._active.set({(): self.active})
        self._store_up.set({(): not self._store.away})
        self._takes.set({(): not self._settlements.unkept})
        self._policies.set({(self._live.policies.snapshot.revision,): 1})
        self._reloaded.set({(): not reloads.mistakes})
        for result, number in (("taken", reloads.taken), ("refused", reloads.refused)):
            self._reloads[(result,)].raise_to(number)
        self._losses[()].raise_to(self._store.losses)
        self._dropped[()].raise_to(dropped())
        for reason, number in self._spans_lost.items():
            self._lost[(reason,)].raise_to(number)

    def _flush(self) -> None:
        try:
            self._metrics.flush()
        except OSError as failure:
            if not self._failing:
                _log.error("metrics_not_written", reason=str(failure))
            self._failing = True
        else:
            self._failing = False

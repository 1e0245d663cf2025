"""One front door to an organisation's language models.

The files stand on floors; a file imports only what stands before it in this list (tests/test_floors.py holds it true).

floor 0, words:     records, errors, asgi, uploads, endpoints
floor 1, documents: settings, otel, marks, documents, language, snapshot, policy
floor 2, decisions: findings, identity, members, contract, bounds, context, normalize, usage, learned, terms, standings,
                    recent, returns, refusals, shares, counts, intents, buckets, hops, sse, masks, health, balance
floor 3, resources: tallies, metrics, topology, store, embedded, keys, drains, alerts, spool, ends, settlements,
                    admission, explain, rollups, sums, ledger, erase, delivery, postgres, sinks, exports, retention,
                    housekeeping, wire, bridge, upstream, credentials, receivers, reading, pools, pressure
floor 4, exchange:  exchange, proxy
floor 5, process:   lines, spans, traces, telemetry, meters, reload, echoes, echo, openapi, reference, app, server,
                    serving, pipes, worker, handover, supervisor, console, queries, charts, reports, exporting,
                    storecheck, upstreamcheck, hostcheck, tracecheck, portcheck, doctor, figures, forms, shelf,
                    operations, admin, cli
"""

__version__ = "0.1.0"

"""The coordinator's Prometheus figures, in a registry of their own.

Names follow vLLM's where the meaning is the same, under the prefix `echelon_`; those of the process itself (memory,
descriptors, CPU) are Prometheus' own. Counted by the service as it executes effects; served by prometheus-client's
small HTTP server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from echelon.errors import ConfigError

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Every figure; `create` registers them."""

    registry: CollectorRegistry
    requests: Counter
    requests_ended: Counter
    generated_tokens: Counter
    replayed_requests: Counter
    queued: Gauge
    running: Gauge
    parked: Gauge
    remembered: Gauge
    open_streams: Gauge
    kept_events: Gauge
    tasks: Gauge
    kept_bytes: Gauge
    forgotten_early: Gauge
    journal_bytes: Gauge
    journal_damaged_bytes: Gauge
    time_to_first_token: Histogram
    inter_token: Histogram
    kv_cache_usage: Gauge
    replicas: Gauge
    replicas_serving: Gauge
    affinity_hits: Gauge
    drafted_tokens: Gauge
    accepted_tokens: Gauge
    tokens_per_step: Gauge
    epoch: Gauge
    term: Gauge
    journal_durable: Gauge

    @classmethod
    def create(cls) -> Metrics:
        """All figures in a fresh registry."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"echelon_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"echelon_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"echelon_{name}", text, registry=registry, buckets=SECONDS)

        return cls(
            registry=registry,
            requests=counter("requests", "Requests submitted; re-attachments do not count."),
            requests_ended=counter("requests_ended", "Requests ended, by finish reason or error reason.", "reason"),
            generated_tokens=counter("generated_tokens", "Tokens journaled."),
            replayed_requests=counter("replayed_requests", "Requests taken up again after a fault."),
            queued=gauge("num_requests_waiting", "Requests queued for a replica."),
            running=gauge("num_requests_running", "Requests assigned to a replica."),
            parked=gauge("num_requests_parked", "Requests whose client vanished, waiting to be resumed."),
            remembered=gauge("num_requests_remembered", "Requests known by their id, ended ones included."),
            open_streams=gauge("open_streams", "Clients and job items that read a request's tokens now."),
            kept_events=gauge("kept_events", "Events that can still be listed."),
            tasks=gauge("asyncio_tasks", "Tasks on the coordinator's event loop."),
            kept_bytes=gauge("kept_request_bytes", "Memory of ended and parked requests, about."),
            forgotten_early=gauge("forgotten_early", "Requests forgotten within the resume window, for want of room."),
            journal_bytes=gauge("journal_bytes", "The journal's size on disk; at 32 MiB it is begun anew."),
            journal_damaged_bytes=gauge(
                "journal_damaged_bytes", "Of the predecessor's journal, what this coordinator could not read."
            ),
            time_to_first_token=seconds("time_to_first_token_seconds", "From arrival to the first token."),
            inter_token=seconds("inter_token_latency_seconds", "Between deltas of one request, per token."),
            kv_cache_usage=gauge("kv_cache_usage_ratio", "Referenced share of a replica's KV blocks.", "replica"),
            replicas=gauge("replicas", "Copies of the model that are to serve."),
            replicas_serving=gauge("replicas_serving", "Replicas that serve now."),
            affinity_hits=gauge(
                "affinity_hits", "Requests sent to a replica for their prefix, since its epoch began.", "replica"
            ),
            drafted_tokens=gauge("drafted_tokens", "Ids that were guessed since its epoch began.", "replica"),
            accepted_tokens=gauge("accepted_tokens", "Of these, ids that were drawn indeed.", "replica"),
            tokens_per_step=gauge(
                "tokens_per_step", "Ids that a choice gains by a step in which it decodes, on average.", "replica"
            ),
            epoch=gauge("replica_epoch", "The replica's epoch.", "replica"),
            term=gauge("coordinator_term", "The coordinator's term."),
            journal_durable=gauge("journal_durable", "1 while what is delivered is in the journal before."),
        )

    def speculated(self, replica: int, counters: Mapping[str, int]) -> None:
        """What guesses have brought a replica, by the counters of its leader."""
        drafted, accepted = counters.get("drafted_tokens", 0), counters.get("accepted_tokens", 0)
        self.drafted_tokens.labels(str(replica)).set(drafted)
        self.accepted_tokens.labels(str(replica)).set(accepted)
        self.tokens_per_step.labels(str(replica)).set(1 + accepted / max(counters.get("decode_rows", 0), 1))

    def serve(self, address: str) -> None:
        """Serve /metrics on host:port. Raises ConfigError when the address cannot be bound."""
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), addr=host, registry=self.registry)
        except (OSError, ValueError) as error:
            raise ConfigError(f"metrics-address {address}: {error}", field="metrics-address") from error

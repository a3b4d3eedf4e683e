"""Metrics of one replica for Prometheus; no label holds a name or a text of a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from reir.records import SearchResult

LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 100)


class Metrics:
    """What this replica did, in a registry of its own; others may register theirs beside it."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "requests_total", "Requests answered.", "method", "route", "status"
        )
        self._latency = self._histogram(
            "latency_seconds", "From the request to the end of its answer.", "route"
        )
        self._stages = self._histogram("stage_seconds", "Time of one stage of a search.", "stage")
        self._batch = Histogram(
            "reir_serve_batch_queries",
            "Queries of one call of the backend.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._degraded = self._counter("degraded_total", "Answers without a stage.", "stage")
        self._problems = self._counter("problems_total", "Requests refused or failed.", "problem")
        self._writes = self._counter("writes_total", "Photos added and deleted.", "action")
        self.in_flight = Gauge(
            "reir_serve_in_flight_requests", "Requests being answered.", registry=self.registry
        )

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def note_problem(self, problem: str) -> None:
        """Count a refusal or failure by its kind."""
        self._problems.labels(problem).inc()

    def note_write(self, action: str) -> None:
        """Count an added or deleted photo."""
        self._writes.labels(action).inc()

    def note_timings(self, timings_ms: Mapping[str, float]) -> None:
        """Count the stages of one answer."""
        for stage, ms in timings_ms.items():
            self._stages.labels(stage).observe(ms / 1e3)

    def note_results(self, results: Sequence[SearchResult]) -> None:
        """Count the answers of one call of the backend; the timings of each are those of all."""
        if not results:
            return
        self._batch.observe(len(results))
        self.note_timings(results[0].timings_ms)
        for result in results:
            for stage in result.degraded:
                self._degraded.labels(stage).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"reir_serve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        options: dict[str, Any] = {"buckets": LATENCY_BUCKETS_S, "registry": self.registry}
        return Histogram(f"reir_serve_{name}", text, labels, **options)

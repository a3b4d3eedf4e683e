"""Metrics for Prometheus; no label holds a name or a text of a user.

Where `PROMETHEUS_MULTIPROC_DIR` names a folder, all processes that share it count together, and
each tells of all: so it does not matter which replica is asked. Counts of processes that have gone
stay; what is a matter of the moment goes with its process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from reir.records import SearchResult

LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 100)


UNKNOWN_ROUTE = "unknown"
"""Label of requests that reached no route."""

SHARED = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """What this replica did, in a registry of its own; others may register theirs beside it."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Start at zero."""
        if folder := os.environ.get(SHARED):
            Path(folder).mkdir(parents=True, exist_ok=True)
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
        self._parts = Histogram(
            "reir_serve_part_batch",
            "Calls that a part of the service worked on together.",
            ["part"],
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._waiting = self._gauge("part_waiting", "Calls that wait for a part.", "part")
        self.in_flight = self._gauge("in_flight_requests", "Requests being answered.")
        self._gauge("replicas", "Processes that answer requests.").set(1)

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def note_problem(self, problem: str) -> None:
        """Count a refusal or failure by its kind."""
        self._problems.labels(problem).inc()

    def note_refusals(self, method: str, status: int, problem: str, count: int) -> None:
        """Count requests that were refused before anybody looked at what they want."""
        self._requests.labels(method, UNKNOWN_ROUTE, str(status)).inc(count)
        self._problems.labels(problem).inc(count)

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

    def note_batch(self, part: str, size: int, waiting: int) -> None:
        """Count a batch of a part of the service, and note how many calls wait for the next."""
        self._parts.labels(part).observe(size)
        self._waiting.labels(part).set(waiting)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format, those of all processes that share."""
        folder = os.environ.get(SHARED)
        if folder is None:
            return generate_latest(self.registry)
        _forget_the_dead(Path(folder))
        everyone = CollectorRegistry()
        multiprocess.MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return generate_latest(everyone)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"reir_serve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        options: dict[str, Any] = {"buckets": LATENCY_BUCKETS_S, "registry": self.registry}
        return Histogram(f"reir_serve_{name}", text, labels, **options)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(
            f"reir_serve_{name}",
            text,
            labels,
            registry=self.registry,
            multiprocess_mode="livesum",
        )


def _forget_the_dead(folder: Path) -> None:
    """Remove what processes that have gone said of the moment."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if not Path("/proc", pid).exists():
            multiprocess.mark_process_dead(int(pid), str(folder))  # type: ignore[no-untyped-call]

"""Metrics for Prometheus. No label contains a name or a text from a user.

If `PROMETHEUS_MULTIPROC_DIR` names a folder, all processes that share it count together, and each
returns the metrics of all of them, so it does not matter which replica answers. Counters keep the
counts of processes that have ended; gauges describe the present, so they count only live processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from reir.results import SearchResult

LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 100)

UNKNOWN_ROUTE = "unknown"
"""Route label of requests that reached no route."""

SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The metrics of this replica, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Start at zero."""
        # The Prometheus client opens files in this folder as soon as a metric is created.
        if folder := os.environ.get(SHARED_FOLDER_VARIABLE):
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.registry = CollectorRegistry()
        self._requests = self._counter(
            "requests_total", "Number of requests that were answered.", "method", "route", "status"
        )
        self._latency = self._histogram(
            "latency_seconds",
            "Time from the request to the end of its answer, in seconds.",
            "route",
        )
        self._stages = self._histogram(
            "stage_seconds", "Duration of one stage of a search, in seconds.", "stage"
        )
        self._batch = Histogram(
            "reir_serve_batch_queries",
            "Number of queries in one search call of the backend.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._degraded = self._counter(
            "degraded_total", "Number of answers for which this stage was skipped.", "stage"
        )
        self._problems = self._counter(
            "problems_total", "Number of requests that ended with this problem.", "problem"
        )
        self._writes = self._counter("writes_total", "Number of photos added or deleted.", "action")
        self._feedback = self._counter(
            "feedback_total", "Number of verdicts of users that were recorded.", "verdict"
        )
        self._search_log_dropped = self._counter(
            "search_log_dropped_total", "Number of events that the search log could not write."
        )
        self._worker_batch = Histogram(
            "reir_serve_worker_batch",
            "Number of calls that a worker processed in one batch.",
            ["worker"],
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._worker_waiting = self._gauge(
            "worker_waiting", "Number of calls that wait for a worker.", "worker"
        )
        self.in_flight = self._gauge("in_flight_requests", "Number of requests in progress.")
        # Gauges are added up over all live processes, so this counts the replicas.
        self._gauge("replicas", "Number of processes that answer requests.").set(1)

    def note_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def note_problem(self, problem: str) -> None:
        """Count a problem by its kind."""
        self._problems.labels(problem).inc()

    def note_rejections(self, method: str, status: int, problem: str, count: int) -> None:
        """Count requests that were rejected before their route was looked up."""
        self._requests.labels(method, UNKNOWN_ROUTE, str(status)).inc(count)
        self._problems.labels(problem).inc(count)

    def note_write(self, action: str) -> None:
        """Count an added or deleted photo."""
        self._writes.labels(action).inc()

    def note_feedback(self, verdict: str) -> None:
        """Count a recorded verdict of a user."""
        self._feedback.labels(verdict).inc()

    def note_dropped_event(self) -> None:
        """Count an event that the search log could not write; may be called in any thread."""
        self._search_log_dropped.inc()

    def note_timings(self, timings_ms: Mapping[str, float]) -> None:
        """Record the durations of the stages of one answer."""
        for stage, ms in timings_ms.items():
            self._stages.labels(stage).observe(ms / 1e3)

    def note_results(self, results: Sequence[SearchResult]) -> None:
        """Record the results of one call of the backend."""
        if not results:
            return
        self._batch.observe(len(results))
        self.note_timings(results[0].timings_ms)  # each result has the timings of the whole call
        for result in results:
            for stage in result.degraded:
                self._degraded.labels(stage).inc()

    def note_batch(self, worker: str, size: int, waiting: int) -> None:
        """Record a batch of a worker, and how many calls wait for the next one."""
        self._worker_batch.labels(worker).observe(size)
        self._worker_waiting.labels(worker).set(waiting)

    def text(self) -> bytes:
        """Return the metrics of all processes of this server, in Prometheus's text format."""
        folder = os.environ.get(SHARED_FOLDER_VARIABLE)
        if folder is None:
            return generate_latest(self.registry)
        _remove_gauges_of_ended_processes(Path(folder))
        all_processes = CollectorRegistry()
        multiprocess.MultiProcessCollector(all_processes)  # type: ignore[no-untyped-call]
        return generate_latest(all_processes)

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


def _remove_gauges_of_ended_processes(folder: Path) -> None:
    # Ray may kill a replica, which then cannot remove its gauges itself.
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if not Path("/proc", pid).exists():
            multiprocess.mark_process_dead(int(pid), str(folder))  # type: ignore[no-untyped-call]

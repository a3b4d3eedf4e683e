"""Metrics for Prometheus. No label contains a name or a text from a user.

If `PROMETHEUS_MULTIPROC_DIR` names a folder, all processes that share it count together, and each
returns the metrics of all of them, so it does not matter which replica answers. Counters keep the
counts of processes that have ended; gauges describe the present, so they count only live processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from reir.operations.feedback import Verdict
from reir.prometheus_metric import PrometheusMetric
from reir.results import SearchResult
from reir_serving.http.problems import PROBLEM_KINDS
from reir_serving.middleware.metrics_server import serve_metrics

UNKNOWN_ROUTE = "unknown"
"""Route label of requests that reached no route."""

SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

PORT_VARIABLE = "REIR_SERVE_METRICS_PORT"
"""Variable with a port on which replicas serve the metrics of their machine: `serve_metrics`."""

LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 100)

REQUESTS = PrometheusMetric(
    "reir_serve_requests_total",
    "counter",
    "Number of requests that were answered.",
    ("method", "route", "status"),
    # The share of failed requests must count the first failures, too.
    starts_with=tuple(
        ("POST", route, status)
        for route in ("/v1/search", UNKNOWN_ROUTE)
        for status in ("200", "500", "503")
    ),
)
LATENCY = PrometheusMetric(
    "reir_serve_latency_seconds",
    "histogram",
    "Time from the request to the end of its answer, in seconds.",
    ("route",),
    buckets=LATENCY_BUCKETS_S,
)
STAGE = PrometheusMetric(
    "reir_serve_stage_seconds",
    "histogram",
    "Duration of one stage of a search, in seconds.",
    ("stage",),
    buckets=LATENCY_BUCKETS_S,
)
BATCH = PrometheusMetric(
    "reir_serve_batch_queries",
    "histogram",
    "Number of queries in one search call of the backend.",
    buckets=BATCH_BUCKETS,
)
DEGRADED = PrometheusMetric(
    "reir_serve_degraded_total",
    "counter",
    "Number of answers for which this stage was skipped.",
    ("stage",),
    starts_with=("rerank", "verify", "zoom", "localize", "compare"),
)
PROBLEMS = PrometheusMetric(
    "reir_serve_problems_total",
    "counter",
    "Number of requests that ended with this problem.",
    ("problem",),
    starts_with=tuple(kind.name for kind in PROBLEM_KINDS),
)
WRITES = PrometheusMetric(
    "reir_serve_writes_total",
    "counter",
    "Number of photos added or deleted.",
    ("action",),
    starts_with=("add", "delete"),
)
FEEDBACK = PrometheusMetric(
    "reir_serve_feedback_total",
    "counter",
    "Number of verdicts of users that were recorded.",
    ("verdict",),
    starts_with=get_args(Verdict),
)
SEARCH_LOG_DROPPED = PrometheusMetric(
    "reir_serve_search_log_dropped_total",
    "counter",
    "Number of searches and verdicts that could not be written.",
)
WORKER_BATCH = PrometheusMetric(
    "reir_serve_worker_batch",
    "histogram",
    "Number of calls that a worker processed in one batch.",
    ("worker",),
    buckets=BATCH_BUCKETS,
)
WORKER_WAITING = PrometheusMetric(
    "reir_serve_worker_waiting", "gauge", "Number of calls that wait for a worker.", ("worker",)
)
IN_FLIGHT = PrometheusMetric(
    "reir_serve_in_flight_requests", "gauge", "Number of requests in progress."
)
REPLICAS = PrometheusMetric(
    "reir_serve_replicas", "gauge", "Number of processes that answer requests."
)
REPLICAS_KILLED = PrometheusMetric(
    "reir_serve_replicas_killed_total",
    "counter",
    "Number of processes that ended without having been stopped.",
)
METRICS = tuple(each for each in [*globals().values()] if isinstance(each, PrometheusMetric))


class Metrics:
    """The metrics of this replica, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        """Start at zero."""
        # The Prometheus client opens files in this folder as soon as a metric is created.
        if folder := os.environ.get(SHARED_FOLDER_VARIABLE):
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.registry = CollectorRegistry()
        self._requests = REQUESTS.counter(self.registry)
        self._latency = LATENCY.histogram(self.registry)
        self._stages = STAGE.histogram(self.registry)
        self._batch = BATCH.histogram(self.registry)
        self._degraded = DEGRADED.counter(self.registry)
        self._problems = PROBLEMS.counter(self.registry)
        self._writes = WRITES.counter(self.registry)
        self._feedback = FEEDBACK.counter(self.registry)
        self._search_log_dropped = SEARCH_LOG_DROPPED.counter(self.registry)
        self._worker_batch = WORKER_BATCH.histogram(self.registry)
        # Gauges are added up over all live processes, so `REPLICAS` counts them.
        self._worker_waiting = WORKER_WAITING.gauge(self.registry, multiprocess_mode="livesum")
        self.in_flight = IN_FLIGHT.gauge(self.registry, multiprocess_mode="livesum")
        REPLICAS.gauge(self.registry, multiprocess_mode="livesum").set(1)
        self._killed = REPLICAS_KILLED.counter(self.registry)
        # Last, because a scrape may come at once.
        if port := os.environ.get(PORT_VARIABLE):
            serve_metrics(int(port), self.text)

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
        """Count a search or verdict that could not be written; may be called in any thread."""
        self._search_log_dropped.inc()

    def note_timings(self, timings_ms: Mapping[str, float]) -> None:
        """Record the durations of the stages of one answer."""
        for stage, ms in timings_ms.items():
            self._stages.labels(stage).observe(ms / 1e3)

    def note_results(self, results: Sequence[SearchResult], slice_size: int) -> None:
        """Record the results of one call of the backend.

        Args:
            results: in their order.
            slice_size: number of queries that were answered together; each of their results has the
                timings of all of them.
        """
        if not results:
            return
        self._batch.observe(len(results))
        for first in results[::slice_size]:
            self.note_timings(first.timings_ms)
        for result in results:
            for stage in result.degraded:
                self._degraded.labels(stage).inc()

    def note_batch(self, worker: str, size: int, waiting: int) -> None:
        """Record a batch of a worker, and how many calls wait for the next one."""
        self._worker_batch.labels(worker).observe(size)
        self._worker_waiting.labels(worker).set(waiting)

    def close(self) -> None:
        """Remove the gauges of this process, which is being stopped."""
        if folder := os.environ.get(SHARED_FOLDER_VARIABLE):
            multiprocess.mark_process_dead(os.getpid(), folder)  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        """Return the metrics of all processes of this server, in Prometheus's text format."""
        folder = os.environ.get(SHARED_FOLDER_VARIABLE)
        if folder is None:
            return generate_latest(self.registry)
        self._killed.inc(_remove_gauges_of_killed_processes(Path(folder)))
        all_processes = CollectorRegistry()
        multiprocess.MultiProcessCollector(all_processes)  # type: ignore[no-untyped-call]
        return generate_latest(all_processes)


def _remove_gauges_of_killed_processes(folder: Path) -> int:
    """Remove the gauges of processes that ended without `Metrics.close`; return their number."""
    num_killed = 0
    for file in folder.glob("gauge_live*_*.db"):  # all gauges of a process are in one file
        if not _exists(int(file.stem.rpartition("_")[2])):
            # Several processes may find the file at once; the one that removes it counts it.
            with suppress(FileNotFoundError):
                file.unlink()
                num_killed += 1
    return num_killed


def _exists(pid: int) -> bool:
    """Return whether a process exists, also on systems without `/proc`."""
    try:
        os.kill(pid, 0)  # sends no signal
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists, and belongs to another user
    return True

"""Prometheus metrics of an indexing run, computed from the records of the run.

Every record has `event`, `time` (Unix seconds), `stage_seconds` (busy seconds of each stage since
the last record, summed over threads) and `queues` (number of results that wait for the next stage).
These are the events, with the fields that only they have:

    start      gallery, version, source, num_encoders
    listed     total: images in the source
    unchanged  images; read: whether their files had to be opened to see that they are unchanged
    batch      images, outcomes, failures by reason, duplicates, instances, bytes, store_seconds,
               freshness_seconds: from the listing of the first image until it is searchable,
               stage_times: stage -> Unix times of its first start and last end in this batch
    end        report: the dictionary that `IndexReport.to_dict` returns
    stopped    error: why the run ended early
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, start_http_server

from reir.errors import ConfigError, ImageFailure
from reir.index_report import STAGES
from reir.prometheus_metric import PrometheusMetric
from reir.sinks import Record

LOOPBACK = "127.0.0.1"

IMAGES = PrometheusMetric(
    "reir_index_images_total",
    "counter",
    "Images by outcome: new, changed, unchanged or failed.",
    ("outcome",),
    starts_with=("new", "changed", "unchanged", "failed"),
)
FAILURES = PrometheusMetric(
    "reir_index_failures_total",
    "counter",
    "Images that could not be indexed, by reason.",
    ("reason",),
    starts_with=tuple(ImageFailure),
)
DUPLICATES = PrometheusMetric(
    "reir_index_duplicates_total",
    "counter",
    "Images whose content another image already holds.",
)
INSTANCES = PrometheusMetric(
    "reir_index_instances_total", "counter", "Instances written to the store."
)
READ = PrometheusMetric(
    "reir_index_read_bytes_total", "counter", "Size of the image files that were read."
)
BUSY = PrometheusMetric(
    "reir_index_stage_busy_seconds_total",
    "counter",
    "Busy time of each stage, summed over threads.",
    ("stage",),
    starts_with=STAGES,
)
WAITING = PrometheusMetric(
    "reir_index_queue_items", "gauge", "Results that wait for the next stage.", ("queue",)
)
SOURCE = PrometheusMetric("reir_index_source_images", "gauge", "Images in the source.")
ENCODER_BUSY = PrometheusMetric(
    "reir_index_encoder_busy_ratio", "gauge", "Fraction of time that the encoders were busy."
)
STORE_LATENCY = PrometheusMetric(
    "reir_index_store_latency_seconds",
    "histogram",
    "Time to write a batch to the store.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
FRESHNESS = PrometheusMetric(
    "reir_index_freshness_seconds",
    "histogram",
    "Time from the listing of a file until it is searchable.",
    buckets=(0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)
# In the order of their declaration; docs/metrics.md is generated from it.
METRICS = tuple(each for each in [*globals().values()] if isinstance(each, PrometheusMetric))


class PrometheusSink:
    """A sink that turns the records of a run into metrics.

    The metrics have a registry of their own, because the default registry of the Prometheus client
    rejects a second metric of the same name, as a second run in this process would create.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        self._images = IMAGES.counter(self.registry)
        self._failures = FAILURES.counter(self.registry)
        self._duplicates = DUPLICATES.counter(self.registry)
        self._instances = INSTANCES.counter(self.registry)
        self._bytes = READ.counter(self.registry)
        self._busy = BUSY.counter(self.registry)
        self._waiting = WAITING.gauge(self.registry)
        self._total = SOURCE.gauge(self.registry)
        self._share = ENCODER_BUSY.gauge(self.registry)
        self._latency = STORE_LATENCY.histogram(self.registry)
        self._freshness = FRESHNESS.histogram(self.registry)
        # A time of 0 stands for no record so far.
        self._num_encoders, self._last_s = 1, 0.0
        self._close: Callable[[], None] = lambda: None

    def serve(self, port: int, host: str = LOOPBACK) -> int:
        """Answer `GET /metrics`; return the port.

        Args:
            port: port to listen on; 0 takes a free one.
            host: address to listen on.

        Raises:
            ConfigError: the port is in use or not allowed.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port} ({error}); choose another port, or 0 "
                f"for any free one"
            ) from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close = close
        return int(server.server_port)

    def write(self, record: Record) -> None:
        """Update the metrics from one record."""
        self._note_time(record)
        match record["event"]:
            case "start":
                self._num_encoders = record["num_encoders"]
            case "listed":
                self._total.set(record["total"])
            case "unchanged":
                self._images.labels("unchanged").inc(record["images"])
            case "batch":
                self._note_batch(record)

    def close(self) -> None:
        """Stop the server."""
        self._close()

    def _note_batch(self, record: Record) -> None:
        for outcome, number in record["outcomes"].items():
            self._images.labels(outcome).inc(number)
        # `outcomes` leaves out the photos that failed.
        for reason, number in record["failures"].items():
            self._images.labels("failed").inc(number)
            self._failures.labels(reason).inc(number)
        self._duplicates.inc(record["duplicates"])
        self._instances.inc(record["instances"])
        self._bytes.inc(record["bytes"])
        self._latency.observe(record["store_seconds"])
        self._freshness.observe(record["freshness_seconds"])

    def _note_time(self, record: Record) -> None:
        for stage, seconds in record["stage_seconds"].items():
            self._busy.labels(stage).inc(seconds)
        for queue, waiting in record["queues"].items():
            self._waiting.labels(queue).set(waiting)
        passed_s = record["time"] - self._last_s
        if self._last_s and passed_s > 0:  # the clock may have been set back
            busy = record["stage_seconds"]["encode"] / (passed_s * self._num_encoders)
            # The time of a batch is counted at its end, so it may exceed the time since the last
            # record.
            self._share.set(min(busy, 1.0))
        self._last_s = record["time"]

"""The metrics of `reir monitor`.

All are gauges, whose values are replaced as a whole after each check, so that series of galleries
that no longer exist disappear. Points in time are exported as Unix timestamps, as is usual for
Prometheus: `time() - reir_monitor_backup_timestamp_seconds` is the age of a backup.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reir.prometheus_metric import PrometheusMetric


class MonitorMetric(PrometheusMetric):
    """A gauge of the monitor."""

    def sample(self, value: float, *labels: str) -> Sample:
        """Return a value of this metric.

        Raises:
            ValueError: the number of labels is wrong.
        """
        if len(labels) != len(self.labels):
            raise ValueError(f"{self.name} has labels {self.labels}, got {labels}")
        return Sample(self, labels, value)


@dataclass(frozen=True)
class Sample:
    """One value of a metric."""

    metric: MonitorMetric
    labels: tuple[str, ...]
    value: float

    @property
    def gallery(self) -> str:
        """The gallery that it is about; empty if it is about none."""
        return dict(zip(self.metric.labels, self.labels, strict=True)).get("gallery", "")


GALLERY = ("gallery",)

STORE_UP = MonitorMetric("reir_monitor_store_up", "gauge", "Whether the store answers: 1 or 0.")
STORE_LATENCY = MonitorMetric(
    "reir_monitor_store_latency_seconds",
    "gauge",
    "Time that the store takes to list its galleries.",
)
STORE_SIZE = MonitorMetric(
    "reir_monitor_store_size_bytes", "gauge", "Size of the files of an embedded store."
)
STORE_FREE = MonitorMetric(
    "reir_monitor_store_free_bytes", "gauge", "Free space on the disk of an embedded store."
)
STORE_DISK = MonitorMetric(
    "reir_monitor_store_disk_bytes", "gauge", "Size of the disk of an embedded store."
)

PHOTOS = MonitorMetric(
    "reir_monitor_photos", "gauge", "Photos of the live version, by status.", ("gallery", "status")
)
FAILURES = MonitorMetric(
    "reir_monitor_failed_photos",
    "gauge",
    "Photos of the live version that failed, by reason.",
    ("gallery", "reason"),
)
INSTANCES = MonitorMetric(
    "reir_monitor_instances", "gauge", "Instances of the live version.", GALLERY
)
VERSIONS = MonitorMetric(
    "reir_monitor_versions", "gauge", "Versions of a gallery, including the live one.", GALLERY
)
INDEXED = MonitorMetric(
    "reir_monitor_index_timestamp_seconds",
    "gauge",
    "Unix time at which `reir index` or `reir reindex` last ended.",
    GALLERY,
)
BACKED_UP = MonitorMetric(
    "reir_monitor_backup_timestamp_seconds",
    "gauge",
    "Unix time at which the last backup ended.",
    GALLERY,
)
REINDEX_STATE = MonitorMetric(
    "reir_monitor_reindex_state",
    "gauge",
    "State of the last re-indexing job: 1 for the one that it is in.",
    ("gallery", "state"),
)
REINDEX_CHANGED = MonitorMetric(
    "reir_monitor_reindex_timestamp_seconds",
    "gauge",
    "Unix time at which the last re-indexing job changed its state.",
    GALLERY,
)
REINDEX_STOPPED = MonitorMetric(
    "reir_monitor_reindex_stopped",
    "gauge",
    "Whether the last re-indexing job has not ended, but no process works on it: 1 or 0.",
    GALLERY,
)

RECALL = MonitorMetric(
    "reir_monitor_recall_ratio",
    "gauge",
    "Recall@10 of the store's search for recent expressions, compared with an exact scan.",
    GALLERY,
)
CANARIES = MonitorMetric(
    "reir_monitor_canaries",
    "gauge",
    "Number of canaries that were asked, by kind.",
    ("gallery", "kind"),
)
CANARY_BR = MonitorMetric(
    "reir_monitor_canary_br_ratio",
    "gauge",
    "BR@K of the canaries: share of known answers in the first K hits.",
    ("gallery", "k"),
)
CANARY_ABSENT = MonitorMetric(
    "reir_monitor_canary_absent_ratio",
    "gauge",
    "Share of the absent canaries that are recognized as absent.",
    GALLERY,
)
LATENCY = MonitorMetric(
    "reir_monitor_search_latency_seconds",
    "gauge",
    "95th percentile of the time of a search in the process of the monitor.",
    GALLERY,
)
PRESENCE = MonitorMetric(
    "reir_monitor_presence_mean_ratio",
    "gauge",
    "Mean presence of the answers to recent searches, and to those before.",
    ("gallery", "window"),
)

SCHEDULER_UP = MonitorMetric(
    "reir_monitor_scheduler_up", "gauge", "Whether the scheduler process runs: 1 or 0."
)
SCHEDULE_FAILED = MonitorMetric(
    "reir_monitor_schedule_failed",
    "gauge",
    "Whether the last run of a schedule failed: 1 or 0.",
    ("schedule",),
)
SCHEDULE_SUCCEEDED = MonitorMetric(
    "reir_monitor_schedule_success_timestamp_seconds",
    "gauge",
    "Unix time at which a schedule last succeeded; at first, when it was added.",
    ("schedule",),
)
SCHEDULE_DUE = MonitorMetric(
    "reir_monitor_schedule_due_timestamp_seconds",
    "gauge",
    "Unix time by which a schedule should have succeeded again.",
    ("schedule",),
)

CHECK_FAILED = MonitorMetric(
    "reir_monitor_check_failed",
    "gauge",
    "Whether a check of the monitor failed: 1 or 0.",
    ("check",),
)
CHECK_ENDED = MonitorMetric(
    "reir_monitor_check_timestamp_seconds",
    "gauge",
    "Unix time at which a check of the monitor last ended.",
    ("check",),
)
CHECK_SECONDS = MonitorMetric(
    "reir_monitor_check_duration_seconds",
    "gauge",
    "How long a check of the monitor took.",
    ("check",),
)

METRICS = tuple(each for each in [*globals().values()] if isinstance(each, MonitorMetric))
"""All metrics, in the order in which they are exported."""


class MonitorCollector(Collector):
    """The current values, by the check that measured them; a registry asks it at each scrape."""

    def __init__(self) -> None:
        """Start without values."""
        self._samples: Mapping[str, Sequence[Sample]] = {}
        self._mutex = threading.Lock()

    def replace(self, check: str, samples: Iterable[Sample]) -> None:
        """Replace all values that a check has measured before."""
        measured = tuple(samples)
        with self._mutex:
            # A new mapping, because the thread that answers a scrape reads without the mutex.
            self._samples = {**self._samples, check: measured}

    def measured(self, check: str) -> Sequence[Sample]:
        """Return the values that a check has measured."""
        return self._samples.get(check, ())

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, also those without a value."""
        samples = [sample for of_check in self._samples.values() for sample in of_check]
        for metric in METRICS:
            # Prometheus wants all samples of a metric together, but here they are grouped by check.
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for sample in samples:
                if sample.metric is metric:
                    family.add_metric(sample.labels, sample.value)
            yield family

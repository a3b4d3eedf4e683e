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

PREFIX = "reir_monitor_"


@dataclass(frozen=True)
class MonitorMetric:
    """One metric.

    Attributes:
        name: without the prefix; ends in the unit.
        help: what it says.
        labels: names of its labels.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()

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


GALLERY = ("gallery",)

STORE_UP = MonitorMetric("store_up", "Whether the store answers: 1 or 0.")
STORE_LATENCY = MonitorMetric(
    "store_latency_seconds", "Time that the store takes to list its galleries."
)
STORE_SIZE = MonitorMetric("store_size_bytes", "Size of the files of an embedded store.")
STORE_FREE = MonitorMetric("store_free_bytes", "Free space on the disk of an embedded store.")
STORE_DISK = MonitorMetric("store_disk_bytes", "Size of the disk of an embedded store.")

PHOTOS = MonitorMetric("photos", "Photos of the live version, by status.", ("gallery", "status"))
FAILURES = MonitorMetric(
    "failed_photos", "Photos of the live version that failed, by reason.", ("gallery", "reason")
)
INSTANCES = MonitorMetric("instances", "Instances of the live version.", GALLERY)
VERSIONS = MonitorMetric("versions", "Versions of a gallery, including the live one.", GALLERY)
INDEXED = MonitorMetric(
    "index_timestamp_seconds",
    "Unix time at which `reir index` or `reir reindex` last ended.",
    GALLERY,
)
BACKED_UP = MonitorMetric(
    "backup_timestamp_seconds", "Unix time at which the last backup ended.", GALLERY
)
REINDEX_STATE = MonitorMetric(
    "reindex_state",
    "State of the last re-indexing job: 1 for the one that it is in.",
    ("gallery", "state"),
)
REINDEX_CHANGED = MonitorMetric(
    "reindex_timestamp_seconds",
    "Unix time at which the last re-indexing job changed its state.",
    GALLERY,
)

RECALL = MonitorMetric(
    "recall_ratio",
    "Recall@10 of the store's search for recent expressions, compared with an exact scan.",
    GALLERY,
)
CANARIES = MonitorMetric(
    "canaries", "Number of canaries that were asked, by kind.", ("gallery", "kind")
)
CANARY_BR = MonitorMetric(
    "canary_br_ratio",
    "BR@K of the canaries: share of known answers in the first K hits.",
    ("gallery", "k"),
)
CANARY_ABSENT = MonitorMetric(
    "canary_absent_ratio", "Share of the absent canaries that are recognized as absent.", GALLERY
)
LATENCY = MonitorMetric(
    "search_latency_seconds",
    "95th percentile of the time of a search in the process of the monitor.",
    GALLERY,
)
PRESENCE = MonitorMetric(
    "presence_mean_ratio",
    "Mean presence of the answers to recent searches, and to those before.",
    ("gallery", "window"),
)

SCHEDULER_UP = MonitorMetric("scheduler_up", "Whether the scheduler process runs: 1 or 0.")
SCHEDULE_FAILED = MonitorMetric(
    "schedule_failed", "Whether the last run of a schedule failed: 1 or 0.", ("schedule",)
)
SCHEDULE_SUCCEEDED = MonitorMetric(
    "schedule_success_timestamp_seconds",
    "Unix time at which a schedule last succeeded; at first, when it was added.",
    ("schedule",),
)
SCHEDULE_DUE = MonitorMetric(
    "schedule_due_timestamp_seconds",
    "Unix time by which a schedule should have succeeded again.",
    ("schedule",),
)

CHECK_FAILED = MonitorMetric(
    "check_failed", "Whether a check of the monitor failed: 1 or 0.", ("check",)
)
CHECK_ENDED = MonitorMetric(
    "check_timestamp_seconds", "Unix time at which a check of the monitor last ended.", ("check",)
)
CHECK_SECONDS = MonitorMetric(
    "check_duration_seconds", "How long a check of the monitor took.", ("check",)
)

METRICS = (
    STORE_UP,
    STORE_LATENCY,
    STORE_SIZE,
    STORE_FREE,
    STORE_DISK,
    PHOTOS,
    FAILURES,
    INSTANCES,
    VERSIONS,
    INDEXED,
    BACKED_UP,
    REINDEX_STATE,
    REINDEX_CHANGED,
    RECALL,
    CANARIES,
    CANARY_BR,
    CANARY_ABSENT,
    LATENCY,
    PRESENCE,
    SCHEDULER_UP,
    SCHEDULE_FAILED,
    SCHEDULE_SUCCEEDED,
    SCHEDULE_DUE,
    CHECK_FAILED,
    CHECK_ENDED,
    CHECK_SECONDS,
)
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
            self._samples = {**self._samples, check: measured}

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, also those without a value."""
        samples = [sample for of_check in self._samples.values() for sample in of_check]
        for metric in METRICS:
            family = GaugeMetricFamily(PREFIX + metric.name, metric.help, labels=metric.labels)
            for sample in samples:
                if sample.metric is metric:
                    family.add_metric(sample.labels, sample.value)
            yield family

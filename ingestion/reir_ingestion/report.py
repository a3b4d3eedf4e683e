"""Counters of an indexing run, from which its progress and its report are made."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from reir.index_report import STAGES, IndexProgress, Stage
from reir.records import ImageRecord
from reir.sinks import Record, Sink
from reir.tracing import Period

Outcome = Literal["new", "changed", "unchanged"]

_LOCAL_ATTRIBUTES = frozenset(
    {"on_progress", "sinks", "queues", "_total", "_emitted_s", "_started_s", "_lock"}
)
"""Attributes of `RunCounters` that are neither sent to another process nor added up."""

MAX_WARNINGS = 20
"""Maximum number of warnings about parts of a source that cannot be listed, since every line of a
list may be bad. All of them are counted."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchTimes:
    """Times of one batch.

    Attributes:
        listed_s: Unix times at which the images of the batch were listed.
        store_s: time in seconds that the store took to write the batch.
        periods: when each stage worked on an image of the batch, or on the whole batch.
    """

    listed_s: Sequence[float] = ()
    store_s: float = 0.0
    periods: Sequence[Period] = ()

    @property
    def freshness_s(self) -> float:
        """Time from the first listing to now, when the batch is searchable; never negative."""
        return max(time.time() - min(self.listed_s, default=time.time()), 0.0)

    @property
    def of_stages(self) -> dict[str, tuple[float, float]]:
        """Stage -> Unix times at which it began and ended its work on the batch."""
        times: dict[str, tuple[float, float]] = {}
        for period in self.periods:
            start_s, end_s = period.start_ns / 1e9, period.end_ns / 1e9
            first_s, last_s = times.get(period.name, (start_s, end_s))
            times[period.name] = min(first_s, start_s), max(last_s, end_s)
        return times


def peak_rss_bytes() -> int:
    """Return the peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@dataclass
class RunCounters:
    """Counts of a run in progress; every method may be called from any thread.

    It can be pickled: the copy has the same counts, but its clock starts anew, and it has neither
    `on_progress` nor sinks.

    Attributes:
        on_progress: called after each change, in the thread that made the change, and never in two
            threads at the same time.
        sinks: receive one record for each change, in the same way; see `reir_ingestion.metrics`.
        queues: name of a queue -> function that returns how many results wait in it.
    """

    on_progress: Callable[[IndexProgress], None] | None = None
    sinks: Sequence[Sink] = ()
    queues: dict[str, Callable[[], int]] = field(default_factory=dict)
    _total: int | None = None
    _outcomes: Counter[Outcome] = field(default_factory=Counter)
    _failed: Counter[str] = field(default_factory=Counter)
    _failed_before: int = 0
    _unlisted: int = 0
    _erased: int = 0
    _duplicates: int = 0
    _read: int = 0
    _read_bytes: int = 0
    _instances: int = 0
    _sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _emitted_s: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _seconds: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _started_s: float = field(default_factory=time.perf_counter)
    # Reentrant, because methods that hold it call `emit`, which takes it as well.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def total(self) -> int | None:
        """Number of images in the source; None until the listing has ended."""
        with self._lock:
            return self._total

    @contextmanager
    def stage(self, name: Stage, periods: list[Period] | None = None) -> Iterator[None]:
        """Add the time that the block takes to a stage, and its period to `periods`."""
        start_ns, started_s = time.time_ns(), time.perf_counter()
        try:
            yield
        finally:
            spent_s = time.perf_counter() - started_s
            if periods is not None:
                periods.append(Period(name, start_ns, start_ns + round(spent_s * 1e9)))
            with self._lock:
                self._seconds[name] += spent_s

    def set_total(self, total: int) -> None:
        """Set the number of images in the source, once the listing has ended."""
        with self._lock:
            self._total = total
            self._report_progress()
            self.emit("listed", total=total)

    def add_unlisted(self, part: str, error: Exception) -> None:
        """Count a folder, an archive or a line of the source that cannot be listed."""
        with self._lock:
            self._unlisted += 1
            if self._unlisted <= MAX_WARNINGS:
                # The text of an OSError repeats the path. In a log, the path has to be ASCII, since
                # a file name may contain any bytes.
                reason = getattr(error, "strerror", None) or error
                logger.warning("%s cannot be listed: %s", ascii(part), reason)

    def add_erased(self, number: int) -> None:
        """Count photos that are left out because they were erased."""
        with self._lock:
            self._erased += number
            self._report_progress()

    def add_unchanged(self, rows: Sequence[ImageRecord], *, read: bool = False) -> None:
        """Count ledger rows that stay as they are.

        Args:
            rows: the ledger rows.
            read: whether the files had to be read to see that they are unchanged.
        """
        with self._lock:
            for record in rows:
                self._count_image(record, "unchanged")
            self._failed_before += sum(record.status == "failed" for record in rows)
            if read:
                self._count_read(rows)
            self._report_progress()
            if rows:
                self.emit("unchanged", images=len(rows), read=read)

    def add_written(
        self,
        records: Sequence[ImageRecord],
        outcomes: Sequence[Outcome],
        times: BatchTimes | None = None,
    ) -> None:
        """Count ledger rows that have been written to the store.

        Args:
            records: the rows.
            outcomes: one per row; ignored for rows that have failed.
            times: times of the batch.
        """
        with self._lock:
            for record, outcome in zip(records, outcomes, strict=True):
                self._count_image(record, outcome)
                if record.holds_instances:
                    size = size_bucket(record)
                    self._sizes[size, "images"] += 1
                    self._sizes[size, "instances"] += record.num_instances
            self._count_read(records)
            self._instances += sum(record.num_instances for record in records)
            self._report_progress()
            if records:
                self.emit("batch", **_batch_figures(records, outcomes, times or BatchTimes()))

    def emit(self, event: str, **figures: Any) -> None:
        """Send a new record, with the current time, to all sinks."""
        if not self.sinks:
            return
        with self._lock:
            # Not negative: records of another process may arrive before its counts.
            spent_s = {n: max(self._seconds[n] - self._emitted_s[n], 0.0) for n in STAGES}
            record = {
                "event": event,
                "time": time.time(),
                **figures,
                "stage_seconds": spent_s,
                "queues": {name: waiting() for name, waiting in self.queues.items()},
            }
            self.forward(record)

    def forward(self, record: Record) -> None:
        """Send an existing record to all sinks; its stage seconds are not emitted again."""
        with self._lock:
            for name, spent_s in record["stage_seconds"].items():
                self._emitted_s[name] += spent_s
            for sink in self.sinks:
                sink.write(record)

    def add(self, other: RunCounters) -> None:
        """Add the counts of another process."""
        with self._lock:
            # Over all attributes, so that a new count cannot be forgotten here.
            for name, theirs in other._counts_only().items():
                if isinstance(theirs, dict):
                    ours = getattr(self, name)
                    for key, count in theirs.items():
                        ours[key] = ours.get(key, 0) + count
                else:
                    setattr(self, name, getattr(self, name) + theirs)
            self._report_progress()

    def drain(self) -> RunCounters:
        """Return the counts so far, and start again from zero."""
        with self._lock:
            drained = RunCounters._from_counts(self._counts_only())
            vars(self).update(RunCounters()._counts_only())
        return drained

    def counts(self) -> dict[str, Any]:
        """Return the counts under the names of `IndexReport`."""
        with self._lock:
            return {
                "new": self._outcomes["new"],
                "changed": self._outcomes["changed"],
                "unchanged": self._outcomes["unchanged"],
                "failed": dict(sorted(self._failed.items())),
                "failed_before": self._failed_before,
                "unlisted": self._unlisted,
                "erased": self._erased,
                "duplicates": self._duplicates,
                "instances": self._instances,
                "read": self._read,
                "read_bytes": self._read_bytes,
                "sizes": self._sizes_by_name(),
                "seconds": time.perf_counter() - self._started_s,
                "stage_seconds": dict(self._seconds),
                "peak_rss_bytes": peak_rss_bytes(),
            }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the counters."""
        with self._lock:
            return RunCounters._from_counts, (self._counts_only(),)

    @staticmethod
    def _from_counts(counts: dict[str, Any]) -> RunCounters:
        counters = RunCounters()
        vars(counters).update(counts)
        return counters

    def _counts_only(self) -> dict[str, Any]:
        """Return all attributes but `_LOCAL_ATTRIBUTES`."""
        return {name: value for name, value in vars(self).items() if name not in _LOCAL_ATTRIBUTES}

    def _sizes_by_name(self) -> dict[str, dict[str, int]]:
        found = [size for size in SIZES if (size, "images") in self._sizes]
        return {size: {each: self._sizes[size, each] for each in _OF_A_SIZE} for size in found}

    def _count_read(self, records: Sequence[ImageRecord]) -> None:
        self._read += len(records)
        self._read_bytes += sum(record.size_bytes for record in records)

    def _count_image(self, record: ImageRecord, outcome: Outcome) -> None:
        if record.status == "failed":
            self._failed[record.reason] += 1
        else:
            self._outcomes[outcome] += 1
            self._duplicates += bool(record.same_as)

    def _report_progress(self) -> None:
        if self.on_progress is not None:
            failed = sum(self._failed.values())
            done = sum(self._outcomes.values()) + failed + self._erased
            busy_s = sum(self._seconds.values())  # 0 before the first stage has ended
            shares = {name: spent_s / busy_s for name, spent_s in self._seconds.items() if busy_s}
            self.on_progress(IndexProgress(done, self._total, failed, shares))


SIZES = ("up to 640", "641 to 1280", "1281 to 2560", "2561 to 5120", "over 5120")
"""Buckets of the longer side of a photo, in pixels."""
_OF_A_SIZE = ("images", "instances")
_SIZE_LIMITS_PX = (640, 1280, 2560, 5120)


def size_bucket(record: ImageRecord) -> str:
    """Return the bucket in `SIZES` to which a photo belongs."""
    return SIZES[bisect_left(_SIZE_LIMITS_PX, max(record.width_px, record.height_px))]


def _batch_figures(
    records: Sequence[ImageRecord], outcomes: Sequence[Outcome], times: BatchTimes
) -> dict[str, Any]:
    """Return the fields that only the record of a batch has."""
    pairs = zip(records, outcomes, strict=True)
    return {
        "images": len(records),
        "outcomes": Counter(outcome for row, outcome in pairs if row.status == "indexed"),
        "failures": Counter(row.reason for row in records if row.status == "failed"),
        "duplicates": sum(bool(row.same_as) for row in records),
        "instances": sum(row.num_instances for row in records),
        "bytes": sum(row.size_bytes for row in records),
        "store_seconds": times.store_s,
        "freshness_seconds": times.freshness_s,
        "stage_times": times.of_stages,
    }

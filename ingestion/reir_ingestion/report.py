"""Counts what an indexing run does, and reports it at the end. Does not access a store."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

from rich.table import Table

from reir.records import ImageRecord
from reir.sinks import Record, Sink

Outcome = Literal["new", "changed", "unchanged"]
Stage = Literal["list", "read", "decode", "encode", "store"]
STAGES: tuple[Stage, ...] = ("list", "read", "decode", "encode", "store")

_OF_THIS_PROCESS = frozenset(
    {"on_progress", "sinks", "queues", "_total", "_told_s", "_started_s", "_lock"}
)
"""Attributes of a tally that are neither sent to another process nor added up."""

MAX_WARNINGS = 20
"""Number of parts that cannot be listed and are named in a warning; all are counted."""

MAX_KINDS = 8
"""Number of kinds of skipped files that are listed by name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        done: images whose state is in the ledger.
        total: images in the source; None until the listing has ended.
        failed: images among `done` that could not be indexed.
        shares: stage -> its fraction of the busy time of all stages; the fractions add up to 1.
    """

    done: int
    total: int | None
    failed: int
    shares: Mapping[Stage, float] = field(default_factory=dict, compare=False)

    @property
    def percent(self) -> Mapping[Stage, int]:
        """The shares as whole percentages that add up to 100."""
        ends = [round(100 * end) for end in accumulate(self.shares.values())]
        parts = (end - start for start, end in pairwise([0, *ends]))
        return dict(zip(self.shares, parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What a run did with every image of the source, and the time and memory it took.

    Each listed image is counted once: new, changed, unchanged or failed.

    Attributes:
        gallery, version: the version that was written.
        num_images: ledger rows of the version after the run, of all sources.
        num_instances: instance rows of the version after the run.
        kept_versions: other versions of the gallery -> their ledger rows, oldest first.
        new: indexed for the first time.
        changed: indexed again, because the content changed or the last attempt had failed.
        unchanged: indexed earlier, left as they are.
        failed: reason -> images that cannot be indexed, including those from earlier runs.
        failed_before: how many of `failed` are from earlier runs and were not tried again.
        unlisted: folders, archives and lines of the source that could not be listed; their images
            are left as they are.
        passed_over: suffix -> number of files in the folder that were skipped, as in
            `LocalSource.passed_over`.
        duplicates: images among the new, changed and unchanged whose content another image held
            when they were processed.
        merged: images whose content another image held too, because two runs wrote at the same
            time; they are duplicates of that image now.
        look_alikes: images of the gallery that look like another one but are not identical to it.
        missing: images of the gallery whose file is gone from the source; still searchable.
        removed: such images that were deleted from the gallery.
        instances: instances written by this run.
        read: number of files that this run opened.
        read_bytes: total size of those files.
        sizes: longer side of the indexed photos -> number of images and of instances.
        seconds: wall time.
        stage_seconds: stage -> busy seconds, summed over threads; stages overlap.
        peak_rss_bytes: peak memory of this process.
    """

    gallery: str
    version: str
    num_images: int
    num_instances: int
    kept_versions: Mapping[str, int]
    new: int
    changed: int
    unchanged: int
    failed: Mapping[str, int]
    failed_before: int
    unlisted: int
    duplicates: int
    merged: int
    look_alikes: int
    missing: int
    removed: int
    instances: int
    read: int
    read_bytes: int
    sizes: Mapping[str, Mapping[str, int]]
    seconds: float
    stage_seconds: Mapping[str, float]
    peak_rss_bytes: int
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        """Images that cannot be indexed."""
        return sum(self.failed.values())

    @property
    def num_listed(self) -> int:
        """Images in the source."""
        return self.new + self.changed + self.unchanged + self.num_failed

    @property
    def images_per_s(self) -> float:
        """Files opened per second; 0.0 when nothing was read."""
        return self.read / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir index --json` prints."""
        derived = {
            "num_failed": self.num_failed,
            "num_listed": self.num_listed,
            "images_per_s": round(self.images_per_s, 3),
        }
        return asdict(self) | derived

    def table(self) -> Table:
        """Return the summary for a terminal."""
        table = Table(title=f"gallery {self.gallery}, version {self.version}", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim")
        for name, value, remark in self._rows():
            table.add_row(name, value, remark)
        return table

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        yield "new", f"{self.new:,}", ""
        yield "changed", f"{self.changed:,}", ""
        yield "unchanged", f"{self.unchanged:,}", "skipped"
        known = f"{self.failed_before:,} known before" if self.failed_before else ""
        yield "failed", f"{self.num_failed:,}", known
        for reason, count in sorted(self.failed.items()):
            yield f"  {reason}", f"{count:,}", ""
        if self.unlisted:
            yield "not listed", f"{self.unlisted:,}", "folders or lines; see the warnings"
        if self.passed_over:
            yield "skipped", f"{sum(self.passed_over.values()):,}", counted(self.passed_over)
        if self.duplicates:
            yield "duplicates", f"{self.duplicates:,}", "of the same content; encoded once"
        if self.merged:
            remark = "stored twice by two concurrent runs; now duplicates"
            yield "merged", f"{self.merged:,}", remark
        if self.look_alikes:
            yield "look alike", f"{self.look_alikes:,}", "of the whole gallery"
        if self.missing:
            yield "gone from source", f"{self.missing:,}", "kept; --prune removes them"
        if self.removed:
            yield "removed", f"{self.removed:,}", "gone from source"
        yield "instances written", f"{self.instances:,}", ""
        for size, counts in self.sizes.items():
            instances = f"{counts['instances']:,} instances"
            yield f"  photos of {size} px", f"{counts['images']:,}", instances
        rate = f"{self.images_per_s:,.1f} images/s" if self.read else ""
        yield "time", f"{self.seconds:,.1f} s", rate
        busy = ", ".join(f"{name} {self.stage_seconds[name]:.1f}" for name in STAGES)
        yield "busy seconds", f"{sum(self.stage_seconds.values()):,.1f}", busy
        yield "peak memory", f"{self.peak_rss_bytes / 2**20:,.0f} MiB", "this process"


def counted(numbers: Mapping[str, int]) -> str:
    """Return, e.g., ".mov 12, hidden 3 and 4 others": the `MAX_KINDS` largest first."""
    ordered = sorted(numbers.items(), key=lambda each: (-each[1], each[0]))
    text = ", ".join(f"{name} {number:,}" for name, number in ordered[:MAX_KINDS])
    rest = sum(number for _, number in ordered[MAX_KINDS:])
    return f"{text} and {rest:,} others" if rest else text


@dataclass(frozen=True)
class BatchTimes:
    """Times of one batch.

    Attributes:
        listed_s: Unix times at which its images were listed.
        store_s: how long the store took.
    """

    listed_s: Sequence[float] = ()
    store_s: float = 0.0

    @property
    def freshness_s(self) -> float:
        """From the first listing to now, when the batch can be searched; never negative."""
        return max(time.time() - min(self.listed_s, default=time.time()), 0.0)


def peak_rss_bytes() -> int:
    """Peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Tally:
    """Counts of a run in progress; every method may be called from any thread.

    It can be pickled: what arrives elsewhere has the counts, and a clock of its own.

    Attributes:
        on_progress: told after each change, from whichever thread made it, one at a time.
        sinks: get one record for each change, in the same way; see `reir_ingestion.metrics`.
        queues: name -> how many results wait in it, asked when a record is made.
    """

    on_progress: Callable[[Progress], None] | None = None
    sinks: Sequence[Sink] = ()
    queues: dict[str, Callable[[], int]] = field(default_factory=dict)
    _total: int | None = None
    _outcomes: Counter[Outcome] = field(default_factory=Counter)
    _failed: Counter[str] = field(default_factory=Counter)
    _failed_before: int = 0
    _unlisted: int = 0
    _duplicates: int = 0
    _read: int = 0
    _read_bytes: int = 0
    _instances: int = 0
    _sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _told_s: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _seconds: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _started_s: float = field(default_factory=time.perf_counter)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def total(self) -> int | None:
        """Images in the source, None until the listing has ended."""
        with self._lock:
            return self._total

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            spent_s = time.perf_counter() - started_s
            with self._lock:
                self._seconds[name] += spent_s

    def listed(self, total: int) -> None:
        """Record the number of images at the end of the listing."""
        with self._lock:
            self._total = total
            self._report_progress()
            self.tell("listed", total=total)

    def not_listed(self, part: str, error: Exception) -> None:
        """Count a folder, an archive or a line of the source that could not be listed."""
        with self._lock:
            self._unlisted += 1
            if self._unlisted <= MAX_WARNINGS:
                said = getattr(error, "strerror", None) or error
                logger.warning("%s cannot be listed: %s", ascii(part), said)

    def skipped(self, known: Sequence[ImageRecord], *, read: bool = False) -> None:
        """Count ledger rows that stay as they are.

        Args:
            known: the rows.
            read: whether their files had to be read to find that out.
        """
        with self._lock:
            for record in known:
                self._settle(record, "unchanged")
            self._failed_before += sum(record.status == "failed" for record in known)
            if read:
                self._note_read(known)
            self._report_progress()
            if known:
                self.tell("skipped", images=len(known), read=read)

    def written(
        self,
        records: Sequence[ImageRecord],
        outcomes: Sequence[Outcome],
        times: BatchTimes | None = None,
    ) -> None:
        """Count ledger rows that have been written to the store.

        Args:
            records: the rows.
            outcomes: one per row; it counts only for rows that are indexed.
            times: of the batch.
        """
        with self._lock:
            for record, outcome in zip(records, outcomes, strict=True):
                self._settle(record, outcome)
                if record.holds_instances:
                    size = size_bucket(record)
                    self._sizes[size, "images"] += 1
                    self._sizes[size, "instances"] += record.num_instances
            self._note_read(records)
            self._instances += sum(record.num_instances for record in records)
            self._report_progress()
            if records:
                self.tell("batch", **_batch_figures(records, outcomes, times or BatchTimes()))

    def tell(self, event: str, **figures: Any) -> None:
        """Send a record with the current time to all sinks."""
        if not self.sinks:
            return
        with self._lock:
            spent_s = {name: self._seconds[name] - self._told_s[name] for name in STAGES}
            self._told_s = dict(self._seconds)
            record = {
                "event": event,
                "time": time.time(),
                **figures,
                "stage_seconds": spent_s,
                "queues": {name: waiting() for name, waiting in self.queues.items()},
            }
            self.pass_on(record)

    def pass_on(self, record: Record) -> None:
        """Send an existing record to all sinks."""
        with self._lock:
            for sink in self.sinks:
                sink.write(record)

    def add(self, other: Tally) -> None:
        """Add the counts of another tally, such as one from a worker."""
        with self._lock:
            for name, theirs in other._counted().items():
                if isinstance(theirs, dict):
                    ours = getattr(self, name)
                    for key, count in theirs.items():
                        ours[key] = ours.get(key, 0) + count
                else:
                    setattr(self, name, getattr(self, name) + theirs)
            self._report_progress()

    def take(self) -> Tally:
        """Return the counts so far as a separate tally, and start again from zero."""
        with self._lock:
            taken = Tally._of(self._counted())
            vars(self).update(Tally()._counted())
        return taken

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
            return Tally._of, (self._counted(),)

    @staticmethod
    def _of(counted: dict[str, Any]) -> Tally:
        tally = Tally()
        vars(tally).update(counted)
        return tally

    def _counted(self) -> dict[str, Any]:
        """The counters: all attributes but `_OF_THIS_PROCESS`."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THIS_PROCESS}

    def _sizes_by_name(self) -> dict[str, dict[str, int]]:
        found = [size for size in SIZES if (size, "images") in self._sizes]
        return {size: {each: self._sizes[size, each] for each in _OF_A_SIZE} for size in found}

    def _note_read(self, records: Sequence[ImageRecord]) -> None:
        self._read += len(records)
        self._read_bytes += sum(record.size_bytes for record in records)

    def _settle(self, record: ImageRecord, outcome: Outcome) -> None:
        if record.status == "failed":
            self._failed[record.reason] += 1
        else:
            self._outcomes[outcome] += 1
            self._duplicates += bool(record.same_as)

    def _report_progress(self) -> None:
        if self.on_progress is not None:
            failed = sum(self._failed.values())
            done = sum(self._outcomes.values()) + failed
            busy_s = sum(self._seconds.values())
            shares = {name: spent_s / busy_s for name, spent_s in self._seconds.items() if busy_s}
            self.on_progress(Progress(done, self._total, failed, shares))


SIZES = ("up to 640", "641 to 1280", "1281 to 2560", "2561 to 5120", "over 5120")
"""Buckets of the longer side of a photo, in pixels."""
_OF_A_SIZE = ("images", "instances")
_SIZE_LIMITS_PX = (640, 1280, 2560, 5120)


def size_bucket(record: ImageRecord) -> str:
    """Return the bucket in `SIZES` of a photo."""
    return SIZES[bisect_left(_SIZE_LIMITS_PX, max(record.width_px, record.height_px))]


def _batch_figures(
    records: Sequence[ImageRecord], outcomes: Sequence[Outcome], times: BatchTimes
) -> dict[str, Any]:
    """Fields of the record of a batch, beyond those of every record."""
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
    }

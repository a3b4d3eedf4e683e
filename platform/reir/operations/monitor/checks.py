"""The checks of the monitor: each measures something, and yields it as samples of metrics."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reir.errors import GalleryNotFound, StoreError, StoreUnavailable
from reir.operations.canary import Canary, canaries_of
from reir.operations.gate.recall import search_recall
from reir.operations.lease import holder_of
from reir.operations.monitor import metrics
from reir.operations.monitor.metrics import Sample
from reir.operations.monitor.searches import LoggedSearches
from reir.store.contract import InstanceStore, VersionInfo

SOURCE, REINDEX, BACKUP = "source", "reindex", "backup"
"""Kinds of documents that indexing, re-indexing and backups leave in the store."""

REINDEX_ENDS = ("done", "rejected", "dropped")
"""States in which a re-indexing job has ended."""

RECALL_EXPRESSIONS = 50


@dataclass(frozen=True, kw_only=True)
class MonitoredSystem:
    """What the checks look at.

    Attributes:
        store: the store.
        store_folder: folder of an embedded store; None for a Milvus server.
        galleries: names of the galleries to look at; None for all.
        searches: the search log; None if there is none.
        schedules: file and folder of runs of the schedules of this machine; None for neither.
    """

    store: InstanceStore
    store_folder: Path | None
    galleries: tuple[str, ...] | None
    searches: LoggedSearches | None
    schedules: tuple[Path, Path] | None

    def found_galleries(self) -> list[str]:
        """Return the names of the galleries to look at that exist."""
        found = self.store.galleries()
        return [name for name in found if self.galleries is None or name in self.galleries]

    def is_live(self, gallery: str) -> bool:
        """Whether a gallery has a live version."""
        try:
            self.store.live_version(gallery)
        except GalleryNotFound:  # its first run has just begun
            return False
        return True


@dataclass(frozen=True)
class GalleryFailure:
    """One gallery could not be measured; the others were.

    Attributes:
        gallery: its name.
        error: why.
    """

    gallery: str
    error: Exception


Check = Callable[[MonitoredSystem], Iterator[Sample | GalleryFailure]]


def check_store(system: MonitoredSystem) -> Iterator[Sample]:
    """Measure whether and how fast the store answers, and its disk."""
    if system.store_folder is not None:
        if not system.store_folder.is_dir():  # its server may still answer from open files
            yield metrics.STORE_UP.sample(0)
            return
        usage = shutil.disk_usage(system.store_folder)
        yield metrics.STORE_FREE.sample(usage.free)
        yield metrics.STORE_DISK.sample(usage.total)
        yield metrics.STORE_SIZE.sample(_folder_bytes(system.store_folder))
    started_s = time.perf_counter()
    try:
        system.store.galleries()
    except StoreError:
        yield metrics.STORE_UP.sample(0)
        return
    yield metrics.STORE_UP.sample(1)
    yield metrics.STORE_LATENCY.sample(time.perf_counter() - started_s)


def check_galleries(system: MonitoredSystem) -> Iterator[Sample | GalleryFailure]:
    """Count photos, failures and versions; and tell when galleries were indexed and backed up."""
    return _each_gallery(system, _gallery_samples)


def check_searches(system: MonitoredSystem) -> Iterator[Sample | GalleryFailure]:
    """Compare the presence of recent answers with that of earlier ones."""
    return _each_gallery(system, _search_samples)


def check_quality(system: MonitoredSystem) -> Iterator[Sample | GalleryFailure]:
    """Ask the canaries, and search for recent expressions once more with an exact scan."""
    return _each_gallery(system, _quality_samples)


def check_schedules(system: MonitoredSystem) -> Iterator[Sample]:
    """Tell whether the scheduler runs, and how the last runs ended."""
    if system.schedules is None:
        return
    from reir.operations.schedule.runs import due_s, last_success_s, own_runs
    from reir.operations.schedule.scheduler import is_scheduler_alive
    from reir.operations.schedule.schedules import read_schedules

    file, folder = system.schedules
    known = read_schedules(file)
    if not known:
        return
    yield metrics.SCHEDULER_UP.sample(is_scheduler_alive(folder))
    for name, schedule in known.items():
        ended = [run for run in own_runs(folder, name, schedule) if run.status != "running"]
        yield metrics.SCHEDULE_FAILED.sample(bool(ended and ended[0].has_failed), name)
        yield metrics.SCHEDULE_SUCCEEDED.sample(last_success_s(folder, name, schedule), name)
        due = due_s(folder, name, schedule)
        if due is not None:
            yield metrics.SCHEDULE_DUE.sample(due, name)


CHECKS: Mapping[str, Check] = {
    "store": check_store,
    "galleries": check_galleries,
    "searches": check_searches,
    "schedules": check_schedules,
    "quality": check_quality,
}
DEEP = frozenset({"quality"})
"""Checks that load models and scan vectors; they run less often."""


def _each_gallery(
    system: MonitoredSystem, measure: Callable[[MonitoredSystem, str], Iterator[Sample]]
) -> Iterator[Sample | GalleryFailure]:
    """Measure every gallery that has a live version, even if others cannot be measured."""
    for gallery in system.found_galleries():
        try:
            # Completed first: half of the values of a gallery would be wrong.
            samples = [*measure(system, gallery)] if system.is_live(gallery) else []
        except StoreUnavailable as error:
            # Ends the check if the store is down: each gallery would wait for all retries again.
            system.store.galleries()
            yield GalleryFailure(gallery, error)
        except Exception as error:  # noqa: BLE001, the caller logs it
            yield GalleryFailure(gallery, error)
        else:
            yield from samples


def _gallery_samples(system: MonitoredSystem, gallery: str) -> Iterator[Sample]:
    versions = system.store.versions(gallery)
    live = next((each for each in versions if each.live), None)
    yield metrics.VERSIONS.sample(len(versions), gallery)
    if live is not None:
        yield from _live_samples(system.store, gallery, live)
    yield from _document_samples(system.store, gallery)


def _search_samples(system: MonitoredSystem, gallery: str) -> Iterator[Sample]:
    if system.searches is not None:
        for window, mean in system.searches.mean_presence(gallery).items():
            yield metrics.PRESENCE.sample(mean, gallery, window)


def _quality_samples(system: MonitoredSystem, gallery: str) -> Iterator[Sample]:
    # Loads models, which takes seconds.
    from reir.operations.gate.measure import measure_version
    from reir.query.search import open_gallery

    canaries = canaries_of(system.store, gallery)
    with open_gallery(gallery, store=system.store) as opened:
        measured = measure_version(system.store, opened, canaries)
        yield metrics.LATENCY.sample(measured.latency_p95_ms / 1e3, gallery)
        recent = [] if system.searches is None else system.searches.expressions(gallery)
        recall = measured.recall
        if recent:
            vectors = opened.encode_expressions(recent[:RECALL_EXPRESSIONS])
            version = opened.refresh()
            recall = float(np.mean(search_recall(system.store, gallery, version, vectors)))
        yield metrics.RECALL.sample(recall, gallery)
    yield from _canary_kinds(gallery, canaries)
    for k in (1, 10):
        if right := measured.right_within(k):
            yield metrics.CANARY_BR.sample(float(np.mean([*right.values()])), gallery, str(k))
    if recognized := measured.recognized():
        share = float(np.mean([*recognized.values()]))
        yield metrics.CANARY_ABSENT.sample(share, gallery)


def _live_samples(store: InstanceStore, gallery: str, live: VersionInfo) -> Iterator[Sample]:
    yield metrics.PHOTOS.sample(live.num_images - live.num_failed, gallery, "indexed")
    yield metrics.PHOTOS.sample(live.num_failed, gallery, "failed")
    yield metrics.INSTANCES.sample(live.num_instances, gallery)
    if live.num_failed:
        failed = store.iter_images(gallery, live.name, status="failed")
        for reason, number in Counter(row.reason for row in failed).items():
            yield metrics.FAILURES.sample(number, gallery, reason)


def _document_samples(store: InstanceStore, gallery: str) -> Iterator[Sample]:
    sources = store.find_documents(SOURCE, f"{gallery}/").values()
    job = store.find_documents(REINDEX, gallery).get(gallery)
    indexed_s = [float(each["indexed_s"]) for each in sources]
    if job is not None:
        yield metrics.REINDEX_STATE.sample(1, gallery, job["state"])
        yield metrics.REINDEX_CHANGED.sample(job["updated_s"], gallery)
        has_ended = job["state"] in REINDEX_ENDS
        is_stopped = not has_ended and holder_of(store, f"{REINDEX}/{gallery}") is None
        yield metrics.REINDEX_STOPPED.sample(is_stopped, gallery)
        if job["state"] == "done":
            indexed_s.append(job["updated_s"])
    if indexed_s:
        yield metrics.INDEXED.sample(max(indexed_s), gallery)
    backups = store.find_documents(BACKUP, f"{gallery}/").values()
    if ended_s := [float(each["ended_s"]) for each in backups]:
        yield metrics.BACKED_UP.sample(max(ended_s), gallery)


def _canary_kinds(gallery: str, canaries: Sequence[Canary]) -> Iterator[Sample]:
    present = sum(each.is_present for each in canaries)
    absent = sum(each.absent for each in canaries)
    kinds = {"present": present, "absent": absent, "query": len(canaries) - present - absent}
    for kind, number in kinds.items():
        yield metrics.CANARIES.sample(number, gallery, kind)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # Milvus Lite has just replaced it
            continue
    return total

"""Index a source into a gallery: open its version, run the stages, handle files that are gone.

The stages are in `stages.py`. Two runners execute them: `local_runner.py` in this process, and
`ray/runner.py` with Ray Data. `runner_choice.py` chooses between them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from reir.errors import GalleryNotFound, SchemaMismatch, StoreError
from reir.images.large_photos import with_views
from reir.images.near_duplicates import NearDuplicates
from reir.images.views import ViewSettings
from reir.index_report import IndexProgress, IndexReport
from reir.models.interfaces import InstanceEncoder
from reir.operations.erase.tombstones import tombstones_of
from reir.operations.live_history import make_live
from reir.sinks import Sink
from reir.store.contract import LEDGER_LAYOUT, InstanceStore, ServerStore, VersionSpec
from reir.store.duplicates import remove_images
from reir_ingestion import stages
from reir_ingestion.content_index import DuplicateMerger
from reir_ingestion.known_sources import remember_source
from reir_ingestion.local_runner import run_in_threads
from reir_ingestion.report import RunCounters
from reir_ingestion.retries import call_with_retries
from reir_ingestion.sources import Source, open_source
from reir_ingestion.sources.local import LocalSource
from reir_ingestion.stages import IndexOptions, Job
from reir_ingestion.threads import background_thread
from reir_ingestion.verify import damaged_images

__all__ = [
    "IndexOptions",
    "ProgressCallback",
    "Runner",
    "apply_views",
    "index",
    "index_with",
    "resolve_source",
    "version_name",
    "version_settings",
    "version_spec",
]

Settings = Mapping[str, str | int | float | bool]
ProgressCallback = Callable[[IndexProgress], None]

INDEX_TIMEOUT_S = 600.0
"""How long a run waits for the server to index the last instances that were written. After that the
run ends with a warning, and the server continues by itself."""

logger = logging.getLogger(__name__)

Runner = Callable[[Job, RunCounters], RunCounters]
"""Takes a job through all stages and returns the exact counts.

The counters that a runner gets only show progress: they may lag behind, and they may count work
twice that was done twice. If they are always exact, as in one process, the runner returns them.
"""


def index(  # noqa: PLR0913 - the options are keyword-only
    source: Source | str | Path,
    gallery: str,
    store: InstanceStore,
    encoder: InstanceEncoder,
    *,
    options: IndexOptions | None = None,
    progress: ProgressCallback | None = None,
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source, in this process.

    Writes to the version that belongs to the encoder and its settings, and creates it if needed.
    If the gallery has no live version, that version becomes live at once, and otherwise when the
    run is complete. Other versions are kept.

    Args:
        source: the images to index; a string is opened with `open_source`.
        gallery: name of the gallery, which is created if it does not exist.
        store: receives instances and ledger rows.
        encoder: the model; called from several threads at once.
        options: see `IndexOptions`.
        progress: called from several threads, but never from two at the same time.
        sinks: receive the records of the run, also from one thread at a time; the caller closes
            them.

    Raises:
        SourceError: the source does not exist or contains no images.
        ConfigError: an option or the name of the gallery is not allowed.
        StoreUnavailable: the store could not be reached for half a minute.
        SchemaMismatch: the version exists with another dimension.
        CheckpointError: the model refused very many images in a row, or returned a wrong number
            of results.
        TooManyFailures: more images failed than `max_failures` allows.
    """
    options = options or IndexOptions()
    encoder = apply_views(encoder, options)
    return index_with(
        partial(run_in_threads, store=store, encoder=encoder),
        resolve_source(source),
        gallery,
        store,
        version_spec(encoder, options),
        options=options,
        progress=progress,
        sinks=sinks,
    )


def index_with(  # noqa: PLR0913 - see `index`
    run: Runner,
    source: Source,
    gallery: str,
    store: InstanceStore,
    spec: VersionSpec,
    *,
    options: IndexOptions,
    progress: ProgressCallback | None = None,
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source, with a given runner; see `index`.

    Args:
        run: the runner.
        source: the images to index.
        gallery: name of the gallery, which is created if it does not exist.
        store: receives instances and ledger rows.
        spec: from `version_spec`.
        options: see `IndexOptions`.
        progress: see `index`.
        sinks: see `index`.
    """
    version, is_live = _open_version(store, gallery, spec, options.candidate)
    job, counters = Job(source, gallery, version, options), RunCounters(progress, sinks)
    names = {"gallery": gallery, "version": version, "source": source.text}
    call_with_retries(tombstones_of(store, gallery).refresh)
    counters.emit("start", **names, num_encoders=options.num_encoders)
    try:
        end = _bring_up_to_date(run, job, store, counters)
    except BaseException as error:  # Ctrl-C, too: the last record says why a run stopped
        counters.emit("stopped", error=f"{type(error).__name__}: {error}")
        raise
    # Only now: until the run is complete, searches see all photos in the version that was live.
    if not is_live and not options.candidate:
        make_live(store, gallery, version, by="reir index")
    if options.origin is not None:
        remember_source(store, gallery, options.origin)
    versions = {each.name: each for each in store.versions(gallery)}
    written = versions.pop(version)
    report = IndexReport(
        gallery=gallery,
        version=version,
        num_images=written.num_images,
        num_instances=written.num_instances,
        kept_versions={each.name: each.num_images for each in versions.values()},
        **end,
    )
    counters.emit("end", report=report.to_dict())
    return report


def apply_views(encoder: InstanceEncoder, options: IndexOptions) -> InstanceEncoder:
    """Return an encoder that encodes large photos as the options say."""
    return with_views(encoder, options.views)


def resolve_source(source: Source | str | Path) -> Source:
    """Return the source itself, or open the one with this name; see `open_source`."""
    return open_source(source) if isinstance(source, str | Path) else source


def version_spec(encoder: InstanceEncoder, options: IndexOptions) -> VersionSpec:
    """Return the spec of the version to which an encoder and its options write."""
    return VersionSpec(
        dim=encoder.dim,
        digest=encoder.digest,
        settings=version_settings(encoder, options.at_least_px, options.views),
        encoder=options.encoder_spec,
    )


def version_settings(
    encoder: InstanceEncoder, at_least_px: int | None = None, views: ViewSettings | None = None
) -> Settings:
    """Return the settings that determine, together with the weights, what is stored for an image.

    The ledger's layout is one of them, so that a new layout leads to a new version.
    """
    settings: dict[str, str | int | float | bool] = {
        "num_candidates": encoder.num_candidates,
        "layout": LEDGER_LAYOUT,
    }
    # A setting is only added where it differs from the default, so that the names of existing
    # versions do not change when a new setting is introduced.
    if encoder.masks:
        settings["masks"] = True
    if at_least_px is not None:
        settings["at_least_px"] = at_least_px
    return settings if views is None else settings | views.settings


def version_name(digest: str, settings: Settings) -> str:
    """Return the name of the version for a checkpoint and settings: 12 hex digits."""
    # Sorted, so that the name does not depend on the order of the settings.
    text = json.dumps([digest, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _open_version(
    store: InstanceStore, gallery: str, spec: VersionSpec, candidate: str
) -> tuple[str, bool]:
    """Create the version to write to, unless it exists.

    Returns:
        Its name, and whether it is the live version.
    """
    if candidate:
        call_with_retries(partial(store.create_version, gallery, candidate, spec))
        return candidate, False
    version = version_name(spec.digest, spec.settings)
    try:
        live = call_with_retries(partial(store.live_version, gallery))
    except GalleryNotFound:
        call_with_retries(partial(store.create_version, gallery, version, spec))
        # Without a live version nothing can be searched, so a partial one is better than none.
        make_live(store, gallery, version, by="reir index")
        return version, True
    try:
        # A version that `reir reindex` built has a name of its own, and the spec of this run.
        call_with_retries(partial(store.create_version, gallery, live, spec))
    except SchemaMismatch:
        call_with_retries(partial(store.create_version, gallery, version, spec))
        return version, version == live
    return live, True


def _bring_up_to_date(
    run: Runner, job: Job, store: InstanceStore, counters: RunCounters
) -> dict[str, Any]:
    """Do the job; return the counts under the names of `IndexReport`."""
    if job.options.repair:
        # Without their ledger rows, the run takes these images for new ones and encodes them again.
        _remove(job, store, damaged_images(store, job.gallery, job.version), counters)
    with background_thread("reir-count", partial(_count, job.source, counters)):
        counted = run(job, counters)
    # An image that was killed between its instances and its ledger row is repaired when it is
    # read again. If its file is gone, that will never happen, so delete its instances here.
    unfinished = store.unfinished_images(job.gallery, job.version)
    _remove(job, store, [key for key, uri in unfinished if job.source.has_lost(uri)], counted)
    missing, found = _review(job, store, counted)
    removed = _remove(job, store, missing, counted) if job.options.prune else 0
    if isinstance(job.source, LocalSource):  # no other source counts what it skips
        found["skipped"] = dict(job.source.skipped)
    _wait_until_indexed(job, store, counted)
    return found | {"missing": len(missing) - removed, "removed": removed} | counted.counts()


def _wait_until_indexed(job: Job, store: InstanceStore, counters: RunCounters) -> None:
    """Wait until a server has indexed all new instances, before the version goes live."""
    num_written = counters.counts()["instances"]
    if not num_written or not isinstance(store, ServerStore):
        return
    # Imported rows are sealed at once, so they need no wait; the store itself knows how many rows
    # of a bulk import were upserted instead.
    num_upserted = 0 if job.options.bulk_import else num_written
    wait = partial(
        store.wait_until_indexed,
        job.gallery,
        job.version,
        num_upserted=num_upserted,
        timeout_s=INDEX_TIMEOUT_S,
    )
    try:
        with counters.stage("store"):
            is_indexed = call_with_retries(wait)
    except StoreError as error:
        # Everything is written, so this is no reason to fail. An account may be allowed to write
        # without being allowed to flush.
        logger.warning("cannot tell whether the last instances are indexed: %s", error)
        return
    if not is_indexed:
        logger.warning(
            "after %g s the server has not indexed the last instances; until it has, searches "
            "may miss a few of them",
            INDEX_TIMEOUT_S,
        )


def _review(
    job: Job, store: InstanceStore, counters: RunCounters
) -> tuple[list[str], dict[str, Any]]:
    """Read the whole ledger to find missing files, near duplicates, and contents stored twice.

    Another run may have written at the same time. Whichever run finishes last finds every content
    that both of them have stored, and leaves it with one holder.

    Returns:
        Ids of the images whose file is gone from the source; and the counts `near_duplicates` (of
        the other images) and `merged` of `IndexReport`.
    """
    missing: list[str] = []
    alike = NearDuplicates()
    merger = DuplicateMerger(store, job.gallery, job.version)
    with counters.stage("list"):
        rows = store.iter_images(job.gallery, job.version)
        while chunk := list(islice(rows, stages.LEDGER_CHUNK)):
            merger.add(chunk)
            for row in chunk:
                if job.source.has_lost(row.uri):
                    missing.append(row.image_id)
                else:
                    alike.add(row)
        merged = merger.merge()  # after the loop, because it changes rows that the loop reads
        return missing, {"near_duplicates": sum(map(len, alike.groups())), "merged": merged}


def _remove(job: Job, store: InstanceStore, image_ids: Sequence[str], counters: RunCounters) -> int:
    """Delete images from the gallery; return how many of them it had."""
    size = stages.LEDGER_CHUNK
    chunks = (image_ids[start : start + size] for start in range(0, len(image_ids), size))
    delete = partial(remove_images, store, job.gallery, job.version)
    with counters.stage("store"):
        return sum(call_with_retries(partial(delete, chunk)) for chunk in chunks)


def _count(source: Source, counters: RunCounters, stop: threading.Event) -> None:
    """Count the images of the source, so that the progress bar has a total.

    The run itself lists the source only as fast as it reads the images.
    """
    total = 0
    for _ in source.uris():
        if stop.is_set():  # the run has ended before the count
            return
        total += 1
    counters.set_total(total)

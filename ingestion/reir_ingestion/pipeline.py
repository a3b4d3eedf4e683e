"""Index a source into a gallery: open its version, run the stages, account for what is gone.

The stages are in `stages.py`. Two runners overlap them: `threads.py` within this process, and
`jobs.py` with Ray Data, on this machine or on a cluster. `runners.py` says when which one is taken.
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

from reir.errors import GalleryNotFound, StoreError
from reir.models.seams import InstanceEncoder
from reir.near_duplicates import LookAlikes
from reir.sinks import Sink
from reir.store.contract import LEDGER_LAYOUT, InstanceStore, VersionSpec
from reir.store.duplicates import remove_images
from reir.tiling import TiledEncoder, Tiling
from reir_ingestion import stages
from reir_ingestion.contents import ConcurrentDuplicates
from reir_ingestion.report import IndexReport, Progress, Tally
from reir_ingestion.sources import Source, open_source
from reir_ingestion.sources.local import LocalSource
from reir_ingestion.stages import IndexOptions, Job
from reir_ingestion.threads import beside, run_in_threads
from reir_ingestion.verify import damaged_images
from reir_ingestion.writer import patiently

__all__ = [
    "IndexOptions",
    "Runner",
    "ShowProgress",
    "as_source",
    "cut_as_asked",
    "index",
    "index_with",
    "version_name",
    "version_settings",
    "version_spec",
]

Settings = Mapping[str, str | int | float | bool]
ShowProgress = Callable[[Progress], None]

SETTLE_S = 600.0
"""How long a run waits for a server to index the last of what it wrote."""

logger = logging.getLogger(__name__)

Runner = Callable[[Job, Tally], Tally]
"""Takes a job through all stages and returns what was counted.

The tally that it is given is for progress: counts may reach it late, or twice where work was done
twice. A runner that counts without such doubts returns that same tally.
"""


def index(  # noqa: PLR0913 - the whole job; all but its four parts are by name
    source: Source | str | Path,
    gallery: str,
    store: InstanceStore,
    encoder: InstanceEncoder,
    *,
    options: IndexOptions | None = None,
    progress: ShowProgress | None = None,
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source, within this process.

    Writes into the version that belongs to the encoder and its settings, which is made when absent.
    That version goes live at once when the gallery has no live one, and otherwise when all is
    done; other versions stay.

    Args:
        source: what to index; a text is opened with `open_source`.
        gallery: name; made when absent.
        store: where instances and ledger go.
        encoder: the model; called from several threads at once.
        options: see `IndexOptions`.
        progress: called from several threads, one at a time.
        sinks: get the records of the run, in the same way; the caller closes them.

    Raises:
        SourceError: the source does not exist or holds no image.
        ConfigError: an option or the gallery's name is not allowed.
        StoreUnavailable: the store could not be reached for half a minute.
        SchemaMismatch: the version exists with another dimension.
        CheckpointError: the model refused very many images in a row, or lost count.
        TooManyFailures: more images failed than `max_failures` allows.
    """
    options = options or IndexOptions()
    encoder = cut_as_asked(encoder, options)
    return index_with(
        partial(run_in_threads, store=store, encoder=encoder),
        as_source(source),
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
    progress: ShowProgress | None = None,
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source; `run` does the stages. See `index`.

    Args:
        run: the runner.
        source: what to index.
        gallery: name; made when absent.
        store: where instances and ledger go.
        spec: of the encoder, as `version_spec` gives it.
        options: see `IndexOptions`.
        progress: called from several threads, one at a time.
        sinks: likewise; see `index`.
    """
    version = version_name(spec.digest, spec.settings)
    live = _open_version(store, gallery, version, spec)
    job, tally = Job(source, gallery, version, options), Tally(progress, sinks)
    names = {"gallery": gallery, "version": version, "source": source.text}
    tally.tell("start", **names, num_encoders=options.num_encoders)
    try:
        end = _bring_up_to_date(run, job, store, tally)
    except BaseException as error:
        tally.tell("stopped", error=f"{type(error).__name__}: {error}")
        raise
    if live != version:
        store.promote(gallery, version)
    held = {each.name: each for each in store.versions(gallery)}
    written = held.pop(version)
    report = IndexReport(
        gallery=gallery,
        version=version,
        num_images=written.num_images,
        num_instances=written.num_instances,
        kept_versions={each.name: each.num_images for each in held.values()},
        **end,
    )
    tally.tell("end", report=report.to_dict())
    return report


def cut_as_asked(encoder: InstanceEncoder, options: IndexOptions) -> InstanceEncoder:
    """Return an encoder that sees large photos in tiles, if the options say so."""
    return encoder if options.tiling is None else TiledEncoder(encoder, options.tiling)


def as_source(source: Source | str | Path) -> Source:
    """Return a source as it is, or the one that a name stands for; see `open_source`."""
    return open_source(source) if isinstance(source, str | Path) else source


def version_spec(encoder: InstanceEncoder, options: IndexOptions) -> VersionSpec:
    """Return what makes the version that an encoder and its options belong to."""
    return VersionSpec(
        dim=encoder.dim,
        digest=encoder.digest,
        settings=version_settings(encoder, options.at_least_px, options.tiling),
        encoder=options.encoder_spec,
    )


def version_settings(
    encoder: InstanceEncoder, at_least_px: int | None = None, tiling: Tiling | None = None
) -> Settings:
    """Return what beside the weights decides which instances an image has, and how it is kept."""
    settings: dict[str, str | int | float | bool] = {
        "num_candidates": encoder.num_candidates,
        "layout": LEDGER_LAYOUT,
    }
    if encoder.masks:
        settings["masks"] = True
    if at_least_px is not None:
        settings["at_least_px"] = at_least_px
    return settings if tiling is None else settings | tiling.settings


def version_name(digest: str, settings: Settings) -> str:
    """Return the name of the version of a checkpoint and settings: 12 hex digits."""
    text = json.dumps([digest, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _open_version(store: InstanceStore, gallery: str, version: str, spec: VersionSpec) -> str:
    """Create the version if it is absent; returns the live one, which may be the same."""
    patiently(partial(store.create_version, gallery, version, spec))
    try:
        return store.live_version(gallery)
    except GalleryNotFound:
        store.promote(gallery, version)
        return version


def _bring_up_to_date(run: Runner, job: Job, store: InstanceStore, tally: Tally) -> dict[str, Any]:
    """Do the job; returns what was counted and found, as `IndexReport` names it."""
    if job.options.repair:
        _remove(job, store, damaged_images(store, job.gallery, job.version), tally)
    with beside("reir-count", partial(_count, job.source, tally)):
        counted = run(job, tally)
    unfinished = store.unfinished_images(job.gallery, job.version)
    _remove(job, store, [key for key, uri in unfinished if job.source.has_lost(uri)], counted)
    missing, found = _review(job, store, counted)
    removed = _remove(job, store, missing, counted) if job.options.prune else 0
    if isinstance(job.source, LocalSource):
        found["passed_over"] = dict(job.source.passed_over)
    _settle(job, store, counted)
    return found | {"missing": len(missing) - removed, "removed": removed} | counted.counts()


def _settle(job: Job, store: InstanceStore, tally: Tally) -> None:
    """Wait until all is searched as well as it will be, so that a version goes live like that."""
    written = tally.counts()["instances"]
    if not written:
        return
    # what was imported is sealed; how much was not, the store can tell where nothing was replaced
    fresh = 0 if job.options.bulk_import else written
    settle = partial(store.settle, job.gallery, job.version, fresh=fresh, within_s=SETTLE_S)
    try:
        with tally.stage("store"):
            done = patiently(settle)
    except StoreError as error:  # all is written; an account may be allowed that, and not this
        logger.warning("whether the last instances are indexed is not known: %s", error)
        return
    if not done:
        logger.warning(
            "after %g s the server has not indexed the last instances; until it has, searches "
            "may miss a few of them",
            SETTLE_S,
        )


def _review(job: Job, store: InstanceStore, tally: Tally) -> tuple[list[str], dict[str, Any]]:
    """Read the ledger once more, and leave each content with one holder.

    Another run may have written at the same time. The one that finishes last finds here every
    content that both of them stored.

    Returns:
        Ids of the images whose file is gone from the source; and the counts `look_alikes` (of the
        other images) and `merged` of `IndexReport`.
    """
    missing: list[str] = []
    alike = LookAlikes()
    concurrent = ConcurrentDuplicates(store, job.gallery, job.version)
    with tally.stage("list"):
        rows = store.iter_images(job.gallery, job.version)
        while chunk := list(islice(rows, stages.LEDGER_CHUNK)):
            concurrent.add(chunk)
            for row in chunk:
                if job.source.has_lost(row.uri):
                    missing.append(row.image_id)
                else:
                    alike.add(row)
        merged = concurrent.merge()
        return missing, {"look_alikes": sum(map(len, alike.groups())), "merged": merged}


def _remove(job: Job, store: InstanceStore, image_ids: Sequence[str], tally: Tally) -> int:
    """Delete images from the gallery; returns how many were there."""
    size = stages.LEDGER_CHUNK
    chunks = (image_ids[start : start + size] for start in range(0, len(image_ids), size))
    delete = partial(remove_images, store, job.gallery, job.version)
    with tally.stage("store"):
        return sum(patiently(partial(delete, chunk)) for chunk in chunks)


def _count(source: Source, tally: Tally, stop: threading.Event) -> None:
    """Count the source, so that progress has a total."""
    total = 0
    for _ in source.uris():
        if stop.is_set():
            return
        total += 1
    tally.listed(total)

"""Index a source into a gallery: open its version, run the stages, account for what is gone.

The stages are in `stages.py`. Two runners overlap them: `threads.py` within this process, and
`jobs.py` with Ray Data, on this machine or on a cluster. `runners.py` says when which one is taken.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from reir.errors import GalleryNotFound
from reir.models.seams import InstanceEncoder
from reir.store.contract import InstanceStore, VersionSpec
from reir_ingestion import stages
from reir_ingestion.report import IndexReport, Progress, Tally
from reir_ingestion.sources import Source, open_source
from reir_ingestion.stages import IndexOptions, Job
from reir_ingestion.threads import run_in_threads
from reir_ingestion.writer import patiently

__all__ = [
    "IndexOptions",
    "Runner",
    "ShowProgress",
    "as_source",
    "index",
    "index_with",
    "version_name",
    "version_settings",
    "version_spec",
]

Settings = Mapping[str, str | int | float | bool]
ShowProgress = Callable[[Progress], None]

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

    Raises:
        SourceError: the source does not exist or holds no image.
        ConfigError: an option or the gallery's name is not allowed.
        StoreUnavailable: the store could not be reached for half a minute.
        SchemaMismatch: the version exists with another dimension.
        CheckpointError: the model refused very many images in a row, or lost count.
    """
    options = options or IndexOptions()
    return index_with(
        partial(run_in_threads, store=store, encoder=encoder),
        as_source(source),
        gallery,
        store,
        version_spec(encoder, options),
        options=options,
        progress=progress,
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
    """
    version = version_name(spec.digest, spec.settings)
    live = _open_version(store, gallery, version, spec)
    job, tally = Job(source, gallery, version, options), Tally(progress)
    with _counting(source, tally):
        tally = run(job, tally)
    missing = _find_missing(job, store, tally)
    removed = _remove(job, store, missing, tally) if options.prune else 0
    if live != version:
        store.promote(gallery, version)
    num_images = {each.name: each.num_images for each in store.versions(gallery)}
    return IndexReport(
        gallery=gallery,
        version=version,
        num_images=num_images.pop(version),
        kept_versions=num_images,
        missing=len(missing) - removed,
        removed=removed,
        **tally.counts(),
    )


def as_source(source: Source | str | Path) -> Source:
    """Return a source as it is, or the one that a name stands for; see `open_source`."""
    return open_source(source) if isinstance(source, str | Path) else source


def version_spec(encoder: InstanceEncoder, options: IndexOptions) -> VersionSpec:
    """Return what makes the version that an encoder and its options belong to."""
    return VersionSpec(
        dim=encoder.dim,
        digest=encoder.digest,
        settings=version_settings(encoder, options.at_least_px),
        encoder=options.encoder_spec,
    )


def version_settings(encoder: InstanceEncoder, at_least_px: int | None = None) -> Settings:
    """Return what beside the weights decides which instances an image has."""
    settings = {"num_candidates": encoder.num_candidates}
    if encoder.masks:
        settings["masks"] = True
    return settings if at_least_px is None else settings | {"at_least_px": at_least_px}


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


def _find_missing(job: Job, store: InstanceStore, tally: Tally) -> list[str]:
    """Ids of the gallery's images whose file is gone from the source."""
    with tally.stage("list"):
        rows = store.iter_images(job.gallery, job.version)
        return [row.image_id for row in rows if job.source.has_lost(row.uri)]


def _remove(job: Job, store: InstanceStore, image_ids: Sequence[str], tally: Tally) -> int:
    """Delete images from the gallery; returns how many were there."""
    size = stages.LEDGER_CHUNK
    chunks = (image_ids[start : start + size] for start in range(0, len(image_ids), size))
    delete = partial(store.delete_images, job.gallery, job.version)
    with tally.stage("store"):
        return sum(patiently(partial(delete, chunk)) for chunk in chunks)


@contextmanager
def _counting(source: Source, tally: Tally) -> Iterator[None]:
    """Count the source in a thread meanwhile, so that progress has a total."""
    stop = threading.Event()

    def count() -> None:
        total = 0
        for _ in source.uris():
            if stop.is_set():
                return
            total += 1
        tally.listed(total)

    thread = threading.Thread(target=count, name="reir-count", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

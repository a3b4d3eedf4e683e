"""Index a source into a gallery: list, skip what the ledger holds, read, encode, store.

    listing, ledger look-up, decoding    a few reader threads
    the model, batch by batch            a few encoder threads, which share the cores
    the store, batch by batch            one writer thread

All stages overlap and every queue between them is bounded, by images and by bytes. The unit of
restart is one batch: a killed run leaves whole batches behind, and the next one goes on from there.
Single process; knows the store and the model by their contracts only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from reir.errors import (
    CheckpointError,
    ConfigError,
    GalleryNotFound,
    ImageError,
    ImageFailure,
)
from reir.models.seams import InstanceEncoder, RgbImage
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store.contract import InstanceStore, VersionSpec
from reir_ingestion.loading import Loaded, Task, is_settled, load
from reir_ingestion.readahead import Bounds, ReadAhead
from reir_ingestion.report import IndexReport, Outcome, Progress, Tally
from reir_ingestion.sources import Source, open_source
from reir_ingestion.writer import Writer, patiently

LEDGER_CHUNK = 512
"""Images that one ledger look-up or deletion takes."""

MAX_AHEAD_BYTES = 256 * 1024**2
"""Pixels that may wait for the model."""

MAX_BATCH_BYTES = 128 * 1024**2
"""Pixels of one batch; large photos make it shorter."""

MAX_REFUSED_IN_A_ROW = 100
"""So many images that the model cannot encode, one after another, are the model's fault."""

MAX_THREADS = 4

Settings = Mapping[str, str | int | float | bool]

logger = logging.getLogger(__name__)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How to index; none but `at_least_px` changes what is stored.

    Attributes:
        batch_size: images that the model takes at once and the store writes at once.
        num_readers: threads that read and decode.
        num_encoders: batches that the model works on side by side. Many small steps of a model do
            not gain from several cores, so the cores are shared out among the batches.
        prune: delete images of the gallery whose file is gone from the source.
        retry_failed: try images again that failed before and have not changed.
        at_least_px: decode large JPEGs at a smaller scale, see `reir.images.decode`.
        encoder_spec: where the encoder was found; kept with a version that is made.

    Raises:
        ConfigError: a number is below 1.
    """

    batch_size: int = 16
    num_readers: int = min(MAX_THREADS, num_cores())
    num_encoders: int = min(MAX_THREADS, num_cores())
    prune: bool = False
    retry_failed: bool = False
    at_least_px: int | None = None
    encoder_spec: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("batch_size", "num_readers", "num_encoders", "at_least_px"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")


def index(  # noqa: PLR0913 - the whole job; all but its four parts are by name
    source: Source | str | Path,
    gallery: str,
    store: InstanceStore,
    encoder: InstanceEncoder,
    *,
    options: IndexOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IndexReport:
    """Bring a gallery up to date with a source.

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
    found = open_source(source) if isinstance(source, str | Path) else source
    version, live = _open_version(store, gallery, encoder, options)
    run = _Run(found, gallery, version, store, encoder, options, Tally(progress))
    run.add_and_change()
    missing = run.find_missing()
    removed = run.remove(missing) if options.prune else 0
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
        **run.tally.counts(),
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


def encode_each(
    encoder: InstanceEncoder, images: Sequence[RgbImage]
) -> list[Instances | ImageError]:
    """Encode a batch; when the model refuses it, image by image, to keep the sound ones.

    Returns:
        For each image its instances, or a NOT_ENCODED error with what the model said.

    Raises:
        CheckpointError: the model gave more or fewer answers than it got images.
    """
    if not images:
        return []
    try:
        return _checked(encoder.encode_images(images), len(images))
    except (ValueError, RuntimeError) as error:
        if len(images) == 1:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            return [ImageError(ImageFailure.NOT_ENCODED, said)]
        logger.warning("the model refused a batch of %d images: %s", len(images), error)
    return [answer for image in images for answer in encode_each(encoder, [image])]


def _checked(answers: list[Instances], wanted: int) -> list[Instances | ImageError]:
    if len(answers) != wanted:
        raise CheckpointError(f"the model gave {len(answers)} answers for {wanted} images")
    return list(answers)


def _open_version(
    store: InstanceStore, gallery: str, encoder: InstanceEncoder, options: IndexOptions
) -> tuple[str, str]:
    """Return the version to write, created if absent, and the live one, which may be the same."""
    settings = version_settings(encoder, options.at_least_px)
    version = version_name(encoder.digest, settings)
    spec = VersionSpec(
        dim=encoder.dim, digest=encoder.digest, settings=settings, encoder=options.encoder_spec
    )
    patiently(partial(store.create_version, gallery, version, spec))
    try:
        return version, store.live_version(gallery)
    except GalleryNotFound:
        store.promote(gallery, version)
        return version, version


@dataclass(frozen=True)
class _Row:
    """One image on its way to the store, and its ledger row of an earlier run."""

    image: IndexedImage
    known: ImageRecord | None


@dataclass(frozen=True)
class _Done:
    """A batch for the store: what is to be written, and ledger rows that only change their time."""

    rows: list[_Row]
    touched: list[ImageRecord]


@dataclass
class _Run:
    """One indexing run: what its steps share."""

    source: Source
    gallery: str
    version: str
    store: InstanceStore
    encoder: InstanceEncoder
    options: IndexOptions
    tally: Tally
    refused_in_a_row: int = 0

    def add_and_change(self) -> None:
        """Index every image of the source that is new, has changed or is to be tried again."""
        options = self.options
        work = partial(
            load,
            source=self.source,
            at_least_px=options.at_least_px,
            retry_failed=options.retry_failed,
            tally=self.tally,
        )
        reading = ReadAhead(
            self._tasks(),
            work,
            lambda loaded: loaded.num_bytes,
            Bounds(options.num_readers, 2 * options.batch_size, MAX_AHEAD_BYTES),
        )
        encoding = ReadAhead(
            _batches(iter(reading), options.batch_size, MAX_BATCH_BYTES),
            self._encode,
            lambda _: 0,
            Bounds(options.num_encoders, options.num_encoders + 1),
        )
        with (
            self._counting(),
            _cores_shared(options.num_encoders),
            Writer(self._write) as writer,
            reading,
            encoding,
        ):
            for done in encoding:
                self._check_refusals(done.rows)
                writer.put(done)

    def find_missing(self) -> list[str]:
        """Ids of the gallery's images whose file is gone from the source."""
        with self.tally.stage("list"):
            rows = self.store.iter_images(self.gallery, self.version)
            return [row.image_id for row in rows if self.source.has_lost(row.uri)]

    def remove(self, image_ids: Sequence[str]) -> int:
        """Delete images from the gallery; returns how many were there."""
        chunks = (
            image_ids[start : start + LEDGER_CHUNK]
            for start in range(0, len(image_ids), LEDGER_CHUNK)
        )
        delete = partial(self.store.delete_images, self.gallery, self.version)
        with self.tally.stage("store"):
            return sum(patiently(partial(delete, chunk)) for chunk in chunks)

    def _tasks(self) -> Iterator[Task]:
        """Files that have to be read, in the order of the listing."""
        files = self.source.files(self.tally.not_listed)
        look_up = partial(self.store.get_images, self.gallery, self.version)
        while True:
            with self.tally.stage("list"):
                tasks = {}
                for file in islice(files, LEDGER_CHUNK):
                    task = Task(file, file.uri, None)
                    tasks[task.image_id] = task
                ledger = patiently(partial(look_up, list(tasks)))
            if not tasks:
                return
            settled = [
                row
                for image_id, row in ledger.items()
                if is_settled(row, tasks[image_id].file, retry_failed=self.options.retry_failed)
            ]
            self.tally.skipped(settled)
            for row in settled:
                del tasks[row.image_id]
            for image_id, task in tasks.items():
                yield Task(task.file, task.uri, ledger.get(image_id))

    def _encode(self, batch: Sequence[Loaded]) -> _Done:
        images = [each.pixels for each in batch if each.pixels is not None]
        with self.tally.stage("encode"):
            answers = iter(encode_each(self.encoder, images))
        done = _Done([], [])
        for each in batch:
            known = each.task.known
            if each.is_as_before and known is not None:
                done.touched.append(replace(known, mtime_ns=each.task.file.mtime_ns))
                continue
            answer = each.error or next(answers)
            image = each.indexed(answer) if isinstance(answer, Instances) else each.failed(answer)
            done.rows.append(_Row(image, known))
        return done

    def _check_refusals(self, rows: Sequence[_Row]) -> None:
        """Stop when so many images were refused that the fault must be the model's."""
        for record in (row.image.record for row in rows):
            if record.status == "indexed":
                self.refused_in_a_row = 0
            elif record.reason == ImageFailure.NOT_ENCODED:
                self.refused_in_a_row += 1
            if self.refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
                raise CheckpointError(
                    f"the model refused {self.refused_in_a_row} images in a row, the last one "
                    f"with {record.detail!r}; the fault is hardly theirs: check the checkpoint "
                    f"and the device, then run again with --retry-failed"
                )

    def _write(self, done: _Done) -> None:
        fresh = [row.image for row in done.rows if row.image.record != row.known]
        mtimes_ns = {record.image_id: record.mtime_ns for record in done.touched}
        with self.tally.stage("store"):
            if fresh:
                patiently(partial(self.store.upsert_images, self.gallery, self.version, fresh))
            if mtimes_ns:
                patiently(partial(self.store.touch_images, self.gallery, self.version, mtimes_ns))
        outcomes: list[Outcome] = ["new" if row.known is None else "changed" for row in done.rows]
        self.tally.written([row.image.record for row in done.rows], outcomes)
        self.tally.skipped(done.touched, read=True)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the source in a thread meanwhile, so that progress has a total."""
        stop = threading.Event()

        def count() -> None:
            total = 0
            for _ in self.source.uris():
                if stop.is_set():
                    return
                total += 1
            self.tally.listed(total)

        thread = threading.Thread(target=count, name="reir-count", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def _cores_shared(num_threads: int) -> Iterator[None]:
    """Have each of so many threads use its share of the cores in torch, if torch is in use."""
    torch = sys.modules.get("torch")
    if torch is None or num_threads == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // num_threads))  # also of threads that start later
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(items: Iterator[Loaded], batch_size: int, max_bytes: int) -> Iterator[list[Loaded]]:
    """Group items: at most `batch_size`, and no more bytes than `max_bytes` unless it is one."""
    batch: list[Loaded] = []
    held_bytes = 0
    for item in items:
        if batch and held_bytes + item.num_bytes > max_bytes:
            yield batch
            batch, held_bytes = [], 0
        batch.append(item)
        held_bytes += item.num_bytes
        if len(batch) == batch_size:
            yield batch
            batch, held_bytes = [], 0
    if batch:
        yield batch

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
import time
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
from reir.near_duplicates import LookAlikes
from reir.records import ImageRecord, IndexedImage, Instances
from reir.sinks import Sink
from reir.store.contract import LEDGER_LAYOUT, InstanceStore, VersionSpec
from reir.store.duplicates import remove_images
from reir.tiling import TiledEncoder, Tiling
from reir_ingestion.contents import Contents
from reir_ingestion.failures import FailureBudget, FailureLimit
from reir_ingestion.loading import Loaded, Task, is_settled, load
from reir_ingestion.readahead import Bounds, ReadAhead
from reir_ingestion.report import BatchTimes, IndexReport, Outcome, Progress, Tally
from reir_ingestion.sources import Source, open_source
from reir_ingestion.verify import damaged_images
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
    """How to index; none but `tiling` and `at_least_px` changes what is stored.

    Attributes:
        batch_size: images that the model takes at once and the store writes at once.
        num_readers: threads that read and decode.
        num_encoders: batches that the model works on side by side. Many small steps of a model do
            not gain from several cores, so the cores are shared out among the batches.
        prune: delete images of the gallery whose file is gone from the source.
        retry_failed: try images again that failed before and have not changed.
        repair: index images anew whose instances are not all in the store.
        tiling: how large photos are cut; None sees every photo as a whole.
        at_least_px: decode large JPEGs at a smaller scale, see `reir.images.decode`.
        encoder_spec: where the encoder was found; kept with a version that is made.
        max_failures: stop when more images fail than this; None goes on to the end.

    Raises:
        ConfigError: a number is below 1.
    """

    batch_size: int = 16
    num_readers: int = min(MAX_THREADS, num_cores())
    num_encoders: int = min(MAX_THREADS, num_cores())
    prune: bool = False
    retry_failed: bool = False
    repair: bool = False
    tiling: Tiling | None = None
    at_least_px: int | None = None
    encoder_spec: str = ""
    max_failures: FailureLimit | None = None

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
    sinks: Sequence[Sink] = (),
) -> IndexReport:
    """Bring a gallery up to date with a source.

    Writes into the version that belongs to the encoder and its settings, which is made when absent.
    That version goes live at once when the gallery has no live one, and otherwise when all is
    done; other versions stay.

    Args:
        source: folder, file or glob; see `open_source`.
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
    found = source if isinstance(source, Source) else open_source(source)
    if options.tiling is not None:
        encoder = TiledEncoder(encoder, options.tiling)
    version, live = _open_version(store, gallery, encoder, options)
    tally = Tally(progress, sinks)
    contents, budget = Contents(store, gallery, version), FailureBudget(options.max_failures)
    run = _Run(found, gallery, version, store, encoder, options, tally, contents, budget)
    names = {"gallery": gallery, "version": version, "source": found.text}
    tally.tell("start", **names, num_encoders=options.num_encoders)
    try:
        end = run.bring_up_to_date()
    except BaseException as error:
        tally.tell("stopped", error=f"{type(error).__name__}: {error}")
        raise
    if live != version:
        store.promote(gallery, version)
    num_images = {each.name: each.num_images for each in store.versions(gallery)}
    report = IndexReport(
        gallery=gallery,
        version=version,
        num_images=num_images.pop(version),
        kept_versions=num_images,
        missing=end.missing,
        removed=end.removed,
        look_alikes=end.look_alikes,
        **tally.counts(),
    )
    tally.tell("end", report=report.to_dict())
    return report


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
    settings = version_settings(encoder, options.at_least_px, options.tiling)
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
    """A batch for the store.

    Attributes:
        rows: what is to be written.
        touched: ledger rows that only change their time.
        listed_s: Unix times at which the images were listed.
    """

    rows: list[_Row]
    touched: list[ImageRecord]
    listed_s: list[float]


@dataclass(frozen=True)
class _End:
    """What only the end of a run knows; see `IndexReport`."""

    missing: int
    removed: int
    look_alikes: int


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
    contents: Contents
    budget: FailureBudget
    refused_in_a_row: int = 0

    def bring_up_to_date(self) -> _End:
        """Do the job."""
        if self.options.repair:
            self.remove(damaged_images(self.store, self.gallery, self.version))
        self.add_and_change()
        self.remove_leftovers()
        missing, look_alikes = self.review()
        removed = self.remove(missing) if self.options.prune else 0
        return _End(len(missing) - removed, removed, look_alikes)

    def add_and_change(self) -> None:
        """Index every image of the source that is new, has changed or is to be tried again."""
        options = self.options
        work = partial(
            load,
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
            map(self._claim, _batches(iter(reading), options.batch_size, MAX_BATCH_BYTES)),
            self._encode,
            lambda _: 0,
            Bounds(options.num_encoders, options.num_encoders + 1),
        )
        self.tally.queues.update(decoded=reading.num_waiting, encoded=encoding.num_waiting)
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

    def review(self) -> tuple[list[str], int]:
        """Go through the ledger once more.

        Returns:
            Ids of the images whose file is gone from the source, and how many of the others look
            like another one.
        """
        missing: list[str] = []
        alike = LookAlikes()
        with self.tally.stage("list"):
            for row in self.store.iter_images(self.gallery, self.version):
                if self.source.has_lost(row.uri):
                    missing.append(row.image_id)
                else:
                    alike.add(row)
            return missing, sum(map(len, alike.groups()))

    def remove_leftovers(self) -> None:
        """Delete what runs that were cut short left of images whose file is gone since."""
        unfinished = self.store.unfinished_images(self.gallery, self.version)
        self.remove([key for key, uri in unfinished if self.source.has_lost(uri)])

    def remove(self, image_ids: Sequence[str]) -> int:
        """Delete images from the gallery; returns how many were there."""
        chunks = (
            image_ids[start : start + LEDGER_CHUNK]
            for start in range(0, len(image_ids), LEDGER_CHUNK)
        )
        delete = partial(remove_images, self.store, self.gallery, self.version)
        with self.tally.stage("store"):
            return sum(patiently(partial(delete, chunk)) for chunk in chunks)

    def _tasks(self) -> Iterator[Task]:
        """Files that have to be read, in the order of the listing."""
        files = self.source.files(self.tally.not_listed)
        look_up = partial(self.store.get_images, self.gallery, self.version)
        while True:
            with self.tally.stage("list"):
                tasks = {}
                listed_s = time.time()
                for file in islice(files, LEDGER_CHUNK):
                    task = Task(file, file.uri, None, listed_s)
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
                yield replace(task, known=ledger.get(image_id))

    def _claim(self, batch: Sequence[Loaded]) -> list[Loaded]:
        """Find the duplicates of a batch, which are not encoded."""
        with self.tally.stage("list"):
            return patiently(partial(self.contents.claim, batch))

    def _encode(self, batch: Sequence[Loaded]) -> _Done:
        images = [each.pixels for each in batch if each.pixels is not None]
        with self.tally.stage("encode"):
            answers = iter(encode_each(self.encoder, images))
        done = _Done([], [], [each.task.listed_s for each in batch])
        for each in batch:
            known = each.task.known
            if each.is_as_before and known is not None:
                done.touched.append(replace(known, mtime_ns=each.task.file.mtime_ns))
                continue
            if each.same_as:
                done.rows.append(_Row(each.duplicate(), known))
                continue
            answer = each.error or next(answers)
            image = each.indexed(answer) if isinstance(answer, Instances) else each.failed(answer)
            done.rows.append(_Row(image, known))
        return done

    def _check_refusals(self, rows: Sequence[_Row]) -> None:
        """Stop when so many images were refused that the fault must be the model's."""
        for record in (row.image.record for row in rows):
            if record.holds_instances:
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
        images, known = [row.image for row in done.rows], [row.known for row in done.rows]
        mtimes_ns = {record.image_id: record.mtime_ns for record in done.touched}
        started_s = time.perf_counter()
        with self.tally.stage("store"):
            records = self.contents.write(images, known)
            if mtimes_ns:
                patiently(partial(self.store.touch_images, self.gallery, self.version, mtimes_ns))
        outcomes: list[Outcome] = ["new" if before is None else "changed" for before in known]
        times = BatchTimes(done.listed_s, time.perf_counter() - started_s)
        self.tally.written(records, outcomes, times)
        self.tally.skipped(done.touched, read=True)
        self.budget.spend(records, self.tally.total)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the source in a thread meanwhile, so that progress has a total."""
        stop = threading.Event()

        def count() -> None:
            total = 0
            for _ in self.source.paths():
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

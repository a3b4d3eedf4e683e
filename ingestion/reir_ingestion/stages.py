"""The stages of indexing: list, look up in the ledger, read, find duplicates, encode, write.

Each is a function of a `Job` and a batch, and counts what it did in a tally. None of them knows
what runs it: `threads.py` overlaps them within this process, `jobs.py` spreads them over a cluster.
The unit of restart is one batch: a killed run leaves whole batches behind, and the next one goes
on from there. Knows the store and the model by their contracts only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from reir.cores import num_cores
from reir.errors import CheckpointError, ConfigError, ImageError, ImageFailure
from reir.models.seams import InstanceEncoder, RgbImage
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store.contract import InstanceStore
from reir.tiling import Tiling
from reir_ingestion.contents import Contents
from reir_ingestion.failures import FailureBudget, FailureLimit
from reir_ingestion.loading import Loaded, Task, is_settled, load
from reir_ingestion.report import BatchTimes, Outcome, Tally
from reir_ingestion.sources import Source, SourceFile
from reir_ingestion.writer import patiently

LEDGER_CHUNK = 512
"""Images that one ledger look-up or deletion takes."""

MAX_AHEAD_BYTES = 256 * 1024**2
"""Pixels that may wait for one model."""

MAX_BATCH_BYTES = 128 * 1024**2
"""Pixels of one batch; large photos make it shorter."""

MAX_REFUSED_IN_A_ROW = 100
"""So many images that the model cannot encode, one after another, are the model's fault."""

IMPORT_IMAGES = 3_200
"""Images of one bulk import: some 100,000 instances, which cost Milvus one segment."""

MAX_THREADS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How to index; none but `tiling` and `at_least_px` changes what is stored.

    Attributes:
        batch_size: images that the model takes at once and the store writes at once.
        num_readers: threads that read and decode, in the run within one process.
        num_encoders: batches that the model works on side by side, in the run within one process.
            Many small steps of a model do not gain from several cores, so the cores are shared out
            among the batches.
        prune: delete images of the gallery whose file is gone from the source.
        retry_failed: try images again that failed before and have not changed.
        repair: index images anew whose instances are not all in the store.
        tiling: how large photos are cut; None sees every photo as a whole.
        at_least_px: decode large JPEGs at a smaller scale, see `reir.images.decode`.
        encoder_spec: where the encoder was found; kept with a version that is made.
        max_failures: stop when more images fail than this; None goes on to the end.
        bulk_import: storage by which new images reach a Milvus server, `IMPORT_IMAGES` at a time,
            which are the unit of restart then; see `InstanceStore.import_images`.

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
    bulk_import: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("batch_size", "num_readers", "num_encoders", "at_least_px"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")

    @property
    def images_a_write(self) -> int:
        """Images that are written together, about."""
        return IMPORT_IMAGES if self.bulk_import else 1


@dataclass(frozen=True)
class Job:
    """What every stage of a run has to know; it can be pickled.

    Attributes:
        source: what to index.
        gallery, version: what to write.
        options: how.
    """

    source: Source
    gallery: str
    version: str
    options: IndexOptions


@dataclass(frozen=True)
class Row:
    """One image on its way to the store, and its ledger row of an earlier run."""

    image: IndexedImage
    known: ImageRecord | None


@dataclass(frozen=True)
class Encoded:
    """A batch for the store.

    Attributes:
        rows: what is to be written.
        touched: ledger rows that only change their time.
        unreached: failures of this run of images that stay as they were indexed earlier.
        listed_s: Unix times at which the images were listed.
    """

    rows: list[Row]
    touched: list[ImageRecord]
    unreached: list[ImageRecord]
    listed_s: list[float]

    @staticmethod
    def joined(parts: Sequence[Encoded]) -> Encoded:
        """Return several batches as one."""
        return Encoded(
            [row for part in parts for row in part.rows],
            [record for part in parts for record in part.touched],
            [record for part in parts for record in part.unreached],
            [each_s for part in parts for each_s in part.listed_s],
        )


def listed(job: Job, tally: Tally) -> Iterator[list[SourceFile]]:
    """Files of the source, `LEDGER_CHUNK` at a time, in the order of the listing."""
    files = iter(job.source.files(tally.not_listed))
    while True:
        with tally.stage("list"):
            chunk = list(islice(files, LEDGER_CHUNK))
        if not chunk:
            return
        yield chunk


def look_up(
    job: Job, store: InstanceStore, files: Sequence[SourceFile], tally: Tally
) -> list[Task]:
    """Which of these files have to be read; the others are counted as they stand in the ledger.

    Raises:
        StoreUnavailable: the store could not be reached for half a minute.
    """
    listed_s = time.time()
    found = (Task(file, file.uri, None, listed_s) for file in files)
    tasks = {task.image_id: task for task in found}
    with tally.stage("list"):
        ledger = patiently(partial(store.get_images, job.gallery, job.version, list(tasks)))
    settled = [
        row
        for image_id, row in ledger.items()
        if is_settled(row, tasks[image_id].file, retry_failed=job.options.retry_failed)
    ]
    tally.skipped(settled)
    for row in settled:
        del tasks[row.image_id]
    return [replace(task, known=ledger.get(image_id)) for image_id, task in tasks.items()]


def loader(job: Job, tally: Tally) -> Callable[[Task], Loaded]:
    """Return what reads and decodes one file of the job; see `load`."""
    options = job.options
    return partial(
        load,
        source=job.source,
        at_least_px=options.at_least_px,
        retry_failed=options.retry_failed,
        tally=tally,
    )


def batches(items: Iterator[Loaded], batch_size: int) -> Iterator[list[Loaded]]:
    """Group items: at most `batch_size`, and `MAX_BATCH_BYTES` of pixels unless it is one."""
    batch: list[Loaded] = []
    held_bytes = 0
    for item in items:
        if batch and held_bytes + item.num_bytes > MAX_BATCH_BYTES:
            yield batch
            batch, held_bytes = [], 0
        batch.append(item)
        held_bytes += item.num_bytes
        if len(batch) == batch_size:
            yield batch
            batch, held_bytes = [], 0
    if batch:
        yield batch


def encode(encoder: InstanceEncoder, batch: Sequence[Loaded], tally: Tally) -> Encoded:
    """Run the model on a batch; what cannot be encoded becomes a failure with its reason.

    Raises:
        CheckpointError: the model gave more or fewer answers than it got images.
    """
    images = [each.pixels for each in batch if each.pixels is not None]
    with tally.stage("encode"):
        answers = iter(encode_each(encoder, images))
    encoded = Encoded([], [], [], [each.task.listed_s for each in batch])
    for each in batch:
        known = each.task.known
        if each.is_as_before and known is not None:
            encoded.touched.append(replace(known, mtime_ns=each.task.file.mtime_ns))
            continue
        if each.error is not None and each.stays_as_known:
            encoded.unreached.append(each.failed(each.error).record)
            continue
        if each.same_as:
            encoded.rows.append(Row(each.duplicate(), known))
            continue
        answer = each.error or next(answers)
        image = each.indexed(answer) if isinstance(answer, Instances) else each.failed(answer)
        encoded.rows.append(Row(image, known))
    return encoded


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
    except (ValueError, RuntimeError, MemoryError) as error:
        if len(images) == 1:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            return [ImageError(ImageFailure.NOT_ENCODED, said)]
        logger.warning("the model refused a batch of %d images: %s", len(images), error)
    return [answer for image in images for answer in encode_each(encoder, [image])]


def _checked(answers: list[Instances], wanted: int) -> list[Instances | ImageError]:
    if len(answers) != wanted:
        raise CheckpointError(f"the model gave {len(answers)} answers for {wanted} images")
    return list(answers)


class Refusals:
    """Stops a run when one model refuses image after image: then the fault must be its own."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def check(self, encoded: Encoded) -> Encoded:
        """Return the batch.

        Raises:
            CheckpointError: `MAX_REFUSED_IN_A_ROW` images were refused without a sound one between.
        """
        for record in (row.image.record for row in encoded.rows):
            if record.holds_instances:
                self._in_a_row = 0
            elif record.reason == ImageFailure.NOT_ENCODED:
                self._in_a_row += 1
            if self._in_a_row >= MAX_REFUSED_IN_A_ROW:
                raise CheckpointError(
                    f"the model refused {self._in_a_row} images in a row, the last one "
                    f"with {record.detail!r}; the fault is hardly theirs: check the checkpoint "
                    f"and the device, then run again with --retry-failed"
                )
        return encoded


class Keeper:
    """What one place has to know of a whole run: who holds which content, and how many failed.

    Every method may be called from any thread.
    """

    def __init__(self, job: Job, store: InstanceStore) -> None:
        self._job, self._store = job, store
        self._contents = Contents(
            store, job.gallery, job.version, bulk_import=job.options.bulk_import
        )
        self._budget = FailureBudget(job.options.max_failures)
        self._one_at_a_time = threading.Lock()

    def claim(self, batch: Sequence[Loaded], tally: Tally) -> list[Loaded]:
        """Find the duplicates of a batch, which are not encoded; they lose their pixels.

        Raises:
            StoreUnavailable: the store could not be reached for half a minute.
        """
        with tally.stage("list"):
            return patiently(partial(self._contents.claim, batch))

    def write(self, encoded: Encoded, tally: Tally) -> None:
        """Write a batch: instances, then ledger rows. Doing it twice changes nothing.

        Raises:
            StoreUnavailable: the store could not be reached for half a minute.
            StoreError: the store refused the batch.
            TooManyFailures: more images failed than `max_failures` allows.
        """
        mtimes_ns = {record.image_id: record.mtime_ns for record in encoded.touched}
        touch = partial(self._store.touch_images, self._job.gallery, self._job.version, mtimes_ns)
        started_s = time.perf_counter()
        parts = self._parts(encoded.rows)
        with tally.stage("store"):
            records = [record for part in parts for record in self._write(part)]
            if mtimes_ns:
                with self._one_at_a_time:
                    patiently(touch)
        known = [row.known for part in parts for row in part]
        outcomes: list[Outcome] = ["new" if before is None else "changed" for before in known]
        records += encoded.unreached
        outcomes += ["unchanged"] * len(encoded.unreached)
        times = BatchTimes(encoded.listed_s, time.perf_counter() - started_s)
        tally.written(records, outcomes, times)
        tally.skipped(encoded.touched, read=True)
        self._budget.spend(records, tally.total)

    def _parts(self, rows: list[Row]) -> list[list[Row]]:
        """What is written together: all, but an import must not hold up whoever changes holders."""
        if not self._job.options.bulk_import:
            return [rows]
        fresh: list[Row] = []
        others: list[Row] = []
        for row in rows:
            (others if _changes_holders(row) else fresh).append(row)
        return [fresh, others]

    def _write(self, rows: list[Row]) -> list[ImageRecord]:
        # batches of new contents may be written side by side; what changes holders may not
        with self._one_at_a_time if any(map(_changes_holders, rows)) else nullcontext():
            return self._contents.write([row.image for row in rows], [row.known for row in rows])


def _changes_holders(row: Row) -> bool:
    """Whether writing it may change who holds the instances of a content."""
    return row.known is not None or bool(row.image.record.same_as)


def gathered(encoded: Iterable[Encoded], num_images: int) -> Iterator[Encoded]:
    """Join batches until each has so many rows, or is the last."""
    held: list[Encoded] = []
    for each in encoded:
        held.append(each)
        if sum(len(each.rows) for each in held) >= num_images:
            yield Encoded.joined(held)
            held = []
    if held:
        yield Encoded.joined(held)

"""The stages of indexing: list, look up in the ledger, read and decode, encode, write.

Each is a function of a `Job` and a batch, and counts what it did in a tally. None of them knows
what runs it: `threads.py` overlaps them within this process, `jobs.py` spreads them over a cluster.
The unit of restart is one batch: a killed run leaves whole batches behind, and the next one goes
on from there. Knows the store and the model by their contracts only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from reir.errors import CheckpointError, ConfigError, ImageError, ImageFailure
from reir.models.seams import InstanceEncoder, RgbImage
from reir.records import ImageRecord, IndexedImage, Instances
from reir.store.contract import InstanceStore
from reir_ingestion.loading import Loaded, Task, is_settled, load
from reir_ingestion.report import Outcome, Tally
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

MAX_THREADS = 4

logger = logging.getLogger(__name__)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How to index; none but `at_least_px` changes what is stored.

    Attributes:
        batch_size: images that the model takes at once and the store writes at once.
        num_readers: threads that read and decode, in the run within one process.
        num_encoders: batches that the model works on side by side, in the run within one process.
            Many small steps of a model do not gain from several cores, so the cores are shared out
            among the batches.
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
    """A batch for the store: what is to be written, and ledger rows that only change their time."""

    rows: list[Row]
    touched: list[ImageRecord]


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
    tasks = {task.image_id: task for task in (Task(file, file.uri, None) for file in files)}
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
    encoded = Encoded([], [])
    for each in batch:
        known = each.task.known
        if each.is_as_before and known is not None:
            encoded.touched.append(replace(known, mtime_ns=each.task.file.mtime_ns))
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
            if record.status == "indexed":
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


def write(job: Job, store: InstanceStore, encoded: Encoded, tally: Tally) -> None:
    """Write a batch: instances, then ledger rows. Doing it twice changes nothing.

    Raises:
        StoreUnavailable: the store could not be reached for half a minute.
        StoreError: the store refused the batch.
    """
    fresh = [row.image for row in encoded.rows if row.image.record != row.known]
    mtimes_ns = {record.image_id: record.mtime_ns for record in encoded.touched}
    with tally.stage("store"):
        if fresh:
            patiently(partial(store.upsert_images, job.gallery, job.version, fresh))
        if mtimes_ns:
            patiently(partial(store.touch_images, job.gallery, job.version, mtimes_ns))
    outcomes: list[Outcome] = ["new" if row.known is None else "changed" for row in encoded.rows]
    tally.written([row.image.record for row in encoded.rows], outcomes)
    tally.skipped(encoded.touched, read=True)

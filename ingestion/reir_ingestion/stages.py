"""The stages of indexing: list, look up in the ledger, read, find duplicates, encode, write.

Each stage is a function of a `Job` and a batch, and counts what it did. No stage depends on its
runner: `local_runner.py` runs the stages in threads, `ray/runner.py` distributes them over a
cluster. The unit of restart is one batch: a killed run leaves whole batches behind, and the next
run continues after them. The stages use the store and the model through their contracts only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from reir.cores import num_cores
from reir.errors import CheckpointError, ConfigError, ImageError, ImageFailure
from reir.images.views import ViewSettings
from reir.models.interfaces import InstanceEncoder
from reir.operations.erase.tombstones import Tombstones, tombstones_of
from reir.records import ImageRecord, Instances, RgbImage
from reir.store.contract import InstanceStore
from reir.tracing import Period
from reir_ingestion.content_index import ContentIndex, ImageUpdate
from reir_ingestion.failures import FailureBudget, FailureLimit
from reir_ingestion.known_sources import KnownSource
from reir_ingestion.loading import LoadedImage, PendingImage, is_up_to_date, load_image
from reir_ingestion.report import BatchTimes, Outcome, RunCounters
from reir_ingestion.retries import call_with_retries
from reir_ingestion.sources import Source, SourceFile

LEDGER_CHUNK = 512
"""Number of images in one ledger look-up or deletion."""

MAX_QUEUED_BYTES = 256 * 1024**2
"""Maximum size of the pixels that wait for one model: two batches of `MAX_BATCH_BYTES`."""

MAX_BATCH_BYTES = 128 * 1024**2
"""Maximum size of the pixels in one batch. A batch of large photos has fewer photos."""

MAX_CONSECUTIVE_REFUSALS = 100
"""If the model refuses this many images without a success in between, the model is at fault."""

IMPORT_IMAGES = 3_200
"""Number of images in one bulk import: some 100,000 instances, for which Milvus creates one
segment."""

# More readers than cores brought no gain (docs/LOG.md).
MAX_THREADS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How to index. Only `views` and `at_least_px` change what is stored.

    Attributes:
        batch_size: number of images per call of the model and per write to the store.
        num_readers: threads that read and decode, when indexing in this process.
        num_encoders: batches that the model encodes at the same time, when indexing in this
            process. A model that makes many small steps gains nothing from several cores, so the
            cores are divided among the batches.
        prune: delete images from the gallery whose file is gone from the source.
        retry_failed: try images again that failed before and have not changed.
        repair: index images again if some of their instances are missing from the store.
        views: in which parts large photos are encoded; None encodes every photo as a whole only.
        at_least_px: decode large JPEGs at a smaller scale, see `reir.images.decode.decode`.
        encoder_spec: name of the encoder, which a new version stores.
        max_failures: stop when more images fail than this; None never stops.
        origin: the source as the user named it, to be kept with the gallery; None keeps nothing.
        include_erased: index photos again that `reir erase` has deleted.
        candidate: version to write to, which then does not become live; empty for the version that
            belongs to the encoder and its settings.
        bulk_import: storage through which new images reach a Milvus server, `IMPORT_IMAGES` at a
            time, which is then the unit of restart; see `ServerStore.import_images`.

    Raises:
        ConfigError: a number is below 1.
    """

    # Batches of 8 and of 64 photos were not faster (docs/LOG.md), and a killed run repeats a batch.
    batch_size: int = 16
    num_readers: int = min(MAX_THREADS, num_cores())
    num_encoders: int = min(MAX_THREADS, num_cores())
    prune: bool = False
    retry_failed: bool = False
    repair: bool = False
    views: ViewSettings | None = None
    at_least_px: int | None = None
    encoder_spec: str = ""
    max_failures: FailureLimit | None = None
    origin: KnownSource | None = None
    include_erased: bool = False
    candidate: str = ""
    bulk_import: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("batch_size", "num_readers", "num_encoders", "at_least_px"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")

    @property
    def images_per_write(self) -> int:
        """Minimum number of images in one write."""
        return IMPORT_IMAGES if self.bulk_import else 1


@dataclass(frozen=True)
class Job:
    """What every stage of a run needs to know. A job can be pickled.

    Attributes:
        source: the images to index.
        gallery, version: where to write them.
        options: how to index.
    """

    source: Source
    gallery: str
    version: str
    options: IndexOptions


@dataclass(frozen=True)
class EncodedBatch:
    """A batch to be written to the store.

    Attributes:
        updates: images to write.
        touched: ledger rows of which only the time changes.
        unreachable: failures of this run for images that keep the instances of an earlier run.
        listed_s: Unix times at which the images were listed.
        periods: when the stages worked on the images.
    """

    updates: list[ImageUpdate]
    touched: list[ImageRecord]
    unreachable: list[ImageRecord]
    listed_s: list[float]
    periods: list[Period] = field(default_factory=list)

    @staticmethod
    def concatenate(parts: Sequence[EncodedBatch]) -> EncodedBatch:
        """Return several batches as one."""
        return EncodedBatch(
            [update for part in parts for update in part.updates],
            [record for part in parts for record in part.touched],
            [record for part in parts for record in part.unreachable],
            [each_s for part in parts for each_s in part.listed_s],
            [period for part in parts for period in part.periods],
        )


def list_chunks(job: Job, counters: RunCounters) -> Iterator[list[SourceFile]]:
    """Yield the files of the source, `LEDGER_CHUNK` at a time, in the order of the listing."""
    files = iter(job.source.files(counters.add_unlisted))
    while True:
        # The block ends before the `yield`, so that it does not count the time of later stages.
        with counters.stage("list"):
            chunk = list(islice(files, LEDGER_CHUNK))
        if not chunk:
            return
        yield chunk


def look_up(
    job: Job, store: InstanceStore, files: Sequence[SourceFile], counters: RunCounters
) -> list[PendingImage]:
    """Return the images that have to be read; count the others as unchanged.

    Raises:
        StoreUnavailable: the store could not be reached for half a minute.
    """
    listed_s = time.time()
    found = (PendingImage(file, None, listed_s) for file in files)
    # A dict, since a list may name an image twice; the last line counts.
    images = {image.image_id: image for image in found}
    with counters.stage("list"):
        if not job.options.include_erased:
            images = _without_erased(images, tombstones_of(store, job.gallery), counters)
        ledger = call_with_retries(
            partial(store.get_images, job.gallery, job.version, list(images))
        )
    up_to_date = [
        row
        for image_id, row in ledger.items()
        if is_up_to_date(row, images[image_id].file, retry_failed=job.options.retry_failed)
    ]
    counters.add_unchanged(up_to_date)
    for row in up_to_date:
        del images[row.image_id]
    return [replace(image, previous=ledger.get(image_id)) for image_id, image in images.items()]


def _without_erased(
    images: dict[str, PendingImage], tombstones: Tombstones, counters: RunCounters
) -> dict[str, PendingImage]:
    kept = {
        key: image for key, image in images.items() if not tombstones.covers_uri(image.file.uri)
    }
    counters.add_erased(len(images) - len(kept))
    return kept


def image_loader(job: Job, counters: RunCounters) -> Callable[[PendingImage], LoadedImage]:
    """Return the function that loads one image of the job; see `load_image`."""
    options = job.options
    return partial(
        load_image,
        source=job.source,
        at_least_px=options.at_least_px,
        retry_failed=options.retry_failed,
        counters=counters,
    )


def group_batches(images: Iterator[LoadedImage], batch_size: int) -> Iterator[list[LoadedImage]]:
    """Group images into batches of at most `batch_size` images and `MAX_BATCH_BYTES` of pixels.

    An image that is larger than that is a batch of its own.
    """
    batch: list[LoadedImage] = []
    batch_bytes = 0
    for image in images:
        if batch and batch_bytes + image.num_bytes > MAX_BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(image)
        batch_bytes += image.num_bytes
        if len(batch) == batch_size:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def encode_batch(
    encoder: InstanceEncoder, batch: Sequence[LoadedImage], counters: RunCounters
) -> EncodedBatch:
    """Run the model on a batch; an image that cannot be encoded becomes a failure with a reason.

    Raises:
        CheckpointError: the model returned more or fewer results than it got images.
    """
    pixels = [image.pixels for image in batch if image.pixels is not None]
    periods = [period for image in batch for period in image.periods]
    with counters.stage("encode", periods):
        results = iter(encode_images_or_fail(encoder, pixels))
    encoded = EncodedBatch([], [], [], [image.pending.listed_s for image in batch], periods)
    for image in batch:
        previous = image.pending.previous
        if image.is_unchanged and previous is not None:
            # With the new time in the ledger, the next run does not have to read the file again.
            encoded.touched.append(replace(previous, mtime_ns=image.pending.file.mtime_ns))
            continue
        if image.error is not None and image.keeps_earlier_instances:
            encoded.unreachable.append(image.to_failed(image.error).record)
            continue
        if image.same_as:
            encoded.updates.append(ImageUpdate(image.to_duplicate(), previous))
            continue
        # The results are those of the images with pixels, in the order of the batch.
        result = image.error or next(results)
        if isinstance(result, Instances):
            indexed = image.to_indexed(result)
        else:
            indexed = image.to_failed(result)
        encoded.updates.append(ImageUpdate(indexed, previous))
    return encoded


def encode_images_or_fail(
    encoder: InstanceEncoder, images: Sequence[RgbImage]
) -> list[Instances | ImageError]:
    """Encode a batch; if the model refuses it, encode image by image to find the bad ones.

    Returns:
        For each image its instances, or a NOT_ENCODED error with the message of the model.

    Raises:
        CheckpointError: the model returned more or fewer results than it got images.
    """
    if not images:
        return []
    try:
        results: list[Instances | ImageError] = list(encoder.encode_images(images))
    # torch raises a RuntimeError, also if the memory of a GPU runs out.
    except (ValueError, RuntimeError, MemoryError) as error:
        if len(images) == 1:
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            return [ImageError(ImageFailure.NOT_ENCODED, message)]
        logger.warning("the model refused a batch of %d images: %s", len(images), error)
        return [result for image in images for result in encode_images_or_fail(encoder, [image])]
    # Checked outside the `try`: instances would go to the wrong photos, which no retry can repair.
    if len(results) != len(images):
        raise CheckpointError(
            f"the model returned {len(results)} results for {len(images)} images; "
            f"check that the checkpoint and the encoder belong together"
        )
    return results


class RefusalGuard:
    """Stops a run if the model refuses image after image, which means that the model is broken."""

    def __init__(self) -> None:
        self._num_consecutive = 0

    def check(self, encoded: EncodedBatch) -> EncodedBatch:
        """Count the refusals in a batch, and return the batch as it is.

        Raises:
            CheckpointError: the model refused `MAX_CONSECUTIVE_REFUSALS` images one after another.
        """
        for record in (update.image.record for update in encoded.updates):
            if record.holds_instances:
                self._num_consecutive = 0
            elif record.reason == ImageFailure.NOT_ENCODED:
                self._num_consecutive += 1
            if self._num_consecutive >= MAX_CONSECUTIVE_REFUSALS:
                raise CheckpointError(
                    f"the model refused {self._num_consecutive} images in a row, the last one "
                    f"with {record.detail!r}. The images are unlikely to be the cause: check the "
                    f"checkpoint and the device, then run again with --retry-failed"
                )
        return encoded


class Coordinator:
    """Decides which photo holds a content, and stops a run with too many failures.

    Both decisions need all batches of a run, so there is one coordinator per run. Every method may
    be called from any thread.
    """

    def __init__(self, job: Job, store: InstanceStore) -> None:
        self._job, self._store = job, store
        self._content_index = ContentIndex(
            store, job.gallery, job.version, bulk_import=job.options.bulk_import
        )
        self._budget = FailureBudget(job.options.max_failures)
        self._holder_lock = threading.Lock()

    def mark_duplicates(
        self, batch: Sequence[LoadedImage], counters: RunCounters
    ) -> list[LoadedImage]:
        """Mark the duplicates in a batch and drop their pixels, so that they are not encoded.

        Raises:
            StoreUnavailable: the store could not be reached for half a minute.
        """
        with counters.stage("list"):
            return call_with_retries(partial(self._content_index.mark_duplicates, batch))

    def write(self, encoded: EncodedBatch, counters: RunCounters) -> None:
        """Write a batch: first the instances, then the ledger rows.

        Writing the same batch twice has the same result as writing it once.

        Raises:
            StoreUnavailable: the store could not be reached for half a minute.
            StoreError: the store refused the batch.
            TooManyFailures: more images failed than `max_failures` allows.
        """
        mtimes_ns = {record.image_id: record.mtime_ns for record in encoded.touched}
        touch = partial(self._store.touch_images, self._job.gallery, self._job.version, mtimes_ns)
        started_s = time.perf_counter()
        parts = self._split(self._without_erased(encoded.updates, counters))
        periods = list(encoded.periods)
        with counters.stage("store", periods):
            records = [record for part in parts for record in self._write(part)]
            if mtimes_ns:
                # The store reads these rows and writes them again, which would undo what another
                # batch changes in them meanwhile.
                with self._holder_lock:
                    call_with_retries(touch)
        previous = [update.previous for part in parts for update in part]
        outcomes: list[Outcome] = ["new" if row is None else "changed" for row in previous]
        records += encoded.unreachable
        outcomes += ["unchanged"] * len(encoded.unreachable)
        times = BatchTimes(encoded.listed_s, time.perf_counter() - started_s, periods)
        counters.add_written(records, outcomes, times)
        counters.add_unchanged(encoded.touched, read=True)
        # Last, because it may stop the run: `reir failures` can then list this batch's failures.
        self._budget.spend(records, counters.total)

    def _without_erased(
        self, updates: Sequence[ImageUpdate], counters: RunCounters
    ) -> list[ImageUpdate]:
        """Leave out photos with a content that was erased, now that their content is known.

        If such photos are wanted again, they are taken off the list of what was erased instead.
        """
        tombstones = tombstones_of(self._store, self._job.gallery)
        erased = [update for update in updates if tombstones.covers(update.image.record)]
        if not erased:
            return list(updates)
        if self._job.options.include_erased:
            tombstones.remove([update.image.record for update in erased])
            return list(updates)
        counters.add_erased(len(erased))
        return [update for update in updates if update not in erased]

    def _split(self, updates: list[ImageUpdate]) -> list[list[ImageUpdate]]:
        """Return the parts of a batch that are written one after another."""
        if not self._job.options.bulk_import:
            return [updates]
        # An import takes some 20 seconds. New images must not hold the lock for that long, so they
        # are imported without it, before the updates that need it.
        new: list[ImageUpdate] = []
        others: list[ImageUpdate] = []
        for update in updates:
            (others if _may_change_holder(update) else new).append(update)
        return [new, others]

    def _write(self, updates: list[ImageUpdate]) -> list[ImageRecord]:
        # Batches with only new contents may be written at the same time. Two batches that change
        # which photo holds a content must not: each would read the ledger before the other has
        # written it.
        with self._holder_lock if any(map(_may_change_holder, updates)) else nullcontext():
            return self._content_index.write(updates)


def _may_change_holder(update: ImageUpdate) -> bool:
    """Return whether writing the image may change which photo holds the instances of a content."""
    return update.previous is not None or bool(update.image.record.same_as)


def merge_batches(batches: Iterable[EncodedBatch], num_images: int) -> Iterator[EncodedBatch]:
    """Merge batches until each has at least `num_images` updates; the last one may have fewer."""
    group: list[EncodedBatch] = []
    for batch in batches:
        group.append(batch)
        if sum(len(each.updates) for each in group) >= num_images:
            yield EncodedBatch.concatenate(group)
            group = []
    if group:
        yield EncodedBatch.concatenate(group)

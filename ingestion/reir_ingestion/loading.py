"""From one listed file to pixels, or to the reason why there are none.

Knows the ledger row that an image had before, no store and no model. Runs in reader threads.
"""

# Shapes: H x W pixels of the upright photo

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import imagehash
from PIL import Image

from reir.errors import ImageError, ImageFailure, ImageUnreachable
from reir.images import content_hash, decode, image_id
from reir.models.seams import RgbImage
from reir.records import ImageRecord, IndexedImage, Instances
from reir_ingestion.report import Tally
from reir_ingestion.sources.contract import NOWHERE, UNKNOWN_TIME_NS, Source, SourceFile
from reir_ingestion.writer import patiently

READ_AGAIN_AFTER_S = (0.1, 0.4, 1.6)
"""Pauses between attempts to read a file from a disk or server that fails just now."""

MAX_DETAIL_CHARS = 500
_HASHED_SIDE_PX = 64


@dataclass(frozen=True)
class Task:
    """A file to read.

    Attributes:
        file: as listed.
        uri: canonical URI.
        known: ledger row of an earlier run, None when the file is new.
        listed_s: Unix time of the listing.
    """

    file: SourceFile
    uri: str
    known: ImageRecord | None
    listed_s: float = 0.0

    @property
    def image_id(self) -> str:
        """Key of the image."""
        return image_id(self.uri)


@dataclass(frozen=True)
class Loaded:
    """What reading gave: `pixels`, or an `error`, or neither when the content is as before.

    Attributes:
        task: what was read.
        content_hash: sha256 of the bytes; empty when they could not be read.
        pixels: (H, W, 3) uint8, at the scale that was asked for.
        width_px, height_px: of the whole upright photo.
        error: why there are no pixels.
        perceptual_hash: alike for photos that look alike; empty when there are no pixels.
        same_as: id of the photo that holds this content already; then there are no pixels.
    """

    task: Task
    content_hash: str = ""
    pixels: RgbImage | None = None
    width_px: int = 0
    height_px: int = 0
    error: ImageError | None = None
    perceptual_hash: str = ""
    same_as: str = ""

    @property
    def num_bytes(self) -> int:
        """Memory that the pixels hold."""
        return 0 if self.pixels is None else self.pixels.nbytes

    @property
    def is_as_before(self) -> bool:
        """Whether the content is that of the known ledger row."""
        return self.pixels is None and self.error is None and not self.same_as

    @property
    def stays_as_known(self) -> bool:
        """Whether the image was indexed earlier and its place cannot be reached just now."""
        known, error = self.task.known, self.error
        return (
            known is not None
            and known.status == "indexed"
            and error is not None
            and error.reason == ImageFailure.UNREACHABLE
        )

    @property
    def record(self) -> ImageRecord:
        """Ledger row as far as reading tells it."""
        return ImageRecord(
            image_id=self.task.image_id,
            uri=self.task.uri,
            status="indexed",
            content_hash=self.content_hash,
            size_bytes=self.task.file.size_bytes,
            mtime_ns=self.task.file.mtime_ns,
            width_px=self.width_px,
            height_px=self.height_px,
            attributes=self.task.file.attributes,
            same_as=self.same_as,
            perceptual_hash=self.perceptual_hash,
        )

    def indexed(self, instances: Instances) -> IndexedImage:
        """Return the image with its instances, ready for the store."""
        return IndexedImage(replace(self.record, num_instances=len(instances)), instances)

    def duplicate(self) -> IndexedImage:
        """Return the image as a duplicate of `same_as`, ready for the store."""
        return IndexedImage(self.record, None)

    def failed(self, error: ImageError) -> IndexedImage:
        """Return the image as a failure, ready for the store."""
        return IndexedImage(
            replace(
                self.record,
                status="failed",
                reason=error.reason.value,
                detail=error.detail[:MAX_DETAIL_CHARS],
            ),
            None,
        )


def is_settled(known: ImageRecord | None, file: SourceFile, *, retry_failed: bool) -> bool:
    """Whether the ledger already says what reading `file` would.

    A file whose bytes could not be read is tried each time: nothing of it can be compared. New
    attributes have to reach the instances, so they count as a change.
    """
    if known is None or file.mtime_ns == UNKNOWN_TIME_NS or known.attributes != file.attributes:
        return False
    if known.status == "failed" and (retry_failed or not known.content_hash):
        return False
    return (known.size_bytes, known.mtime_ns) == (file.size_bytes, file.mtime_ns)


def load(
    task: Task, *, source: Source, at_least_px: int | None, retry_failed: bool, tally: Tally
) -> Loaded:
    """Read and decode one file; a bad file gives a `Loaded` with its error.

    Args:
        task: the file.
        source: what it was listed by.
        at_least_px: see `reir.images.decode`; None decodes at full size.
        retry_failed: decode content that failed before, too.
        tally: told how long reading and decoding took.
    """
    try:
        with tally.stage("read"):
            data = patiently(
                partial(source.read, task.file),
                pauses_s=READ_AGAIN_AFTER_S,
                passing=ImageUnreachable,
            )
            digest = content_hash(data)
    except (ImageError, MemoryError) as error:
        return Loaded(task, error=_failure(error))
    task = _with_size(task, len(data))
    known = task.known
    if known is not None and _is_as_before(known, task.file, digest, retry_failed=retry_failed):
        return Loaded(task, digest)
    try:
        with tally.stage("decode"):
            image = decode(data, at_least_px=at_least_px)
            looks = perceptual_hash(image.pixels)
    except (ImageError, MemoryError) as error:
        return Loaded(task, digest, error=_failure(error))
    return Loaded(
        task, digest, image.pixels, image.width_px, image.height_px, perceptual_hash=looks
    )


def _is_as_before(known: ImageRecord, file: SourceFile, digest: str, *, retry_failed: bool) -> bool:
    """Whether a file that was read is as in the ledger, except for its time, which is updated."""
    return (
        known.content_hash == digest
        and known.attributes == file.attributes
        and file.size_bytes in (0, known.size_bytes)
        and not (known.status == "failed" and retry_failed)
    )


def _with_size(task: Task, num_bytes: int) -> Task:
    """Set the size of a file that did not exist when it was listed, but could be read later.

    Its time stays unknown, so the next run reads it again.
    """
    if (task.file.size_bytes, task.file.mtime_ns) != NOWHERE:
        return task
    return replace(task, file=replace(task.file, size_bytes=num_bytes))


def _failure(error: ImageError | MemoryError) -> ImageError:
    """Return the error for the ledger; running out of memory counts as a failure of the photo."""
    if isinstance(error, ImageError):
        return error
    return ImageError(ImageFailure.TOO_LARGE, "this machine does not have enough memory to load it")


def perceptual_hash(pixels: RgbImage) -> str:
    """Return 16 hex digits that change little with size, format and light of a photo (pHash)."""
    image = Image.fromarray(pixels)
    # the hash looks at 32 x 32 pixels; averaging down to twice that first is several times faster
    factor = max(min(image.size) // _HASHED_SIDE_PX, 1)
    return str(imagehash.phash(image.reduce(factor)))

"""Load one listed image: read and decode its file, or record why that failed.

Runs in reader threads, and uses neither the store nor the model.
"""

# Shapes: H x W pixels of the upright photo

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import imagehash
from PIL import Image

from reir.errors import ImageError, ImageFailure, ImageUnreachable
from reir.images.decode import content_hash, decode, image_id
from reir.records import ImageRecord, IndexedImage, Instances, RgbImage
from reir.tracing import Period
from reir_ingestion.report import RunCounters
from reir_ingestion.retries import call_with_retries
from reir_ingestion.sources.contract import ABSENT_FILE, UNKNOWN_TIME_NS, Source, SourceFile

READ_RETRY_PAUSES_S = (0.1, 0.4, 1.6)
"""Pauses between attempts to read from a disk or file server that fails temporarily."""

MAX_DETAIL_CHARS = 500
_HASHED_SIDE_PX = 64


@dataclass(frozen=True)
class PendingImage:
    """A listed image whose file has to be read.

    Attributes:
        file: as listed.
        previous: ledger row of an earlier run; None if the image is new.
        listed_s: Unix time of the listing.
    """

    file: SourceFile
    previous: ImageRecord | None = None
    listed_s: float = 0.0

    @property
    def image_id(self) -> str:
        """Id of the image, which is the key of its ledger row."""
        return image_id(self.file.uri)


@dataclass(frozen=True)
class LoadedImage:
    """The result of reading: `pixels`, an `error`, or neither if the content is unchanged.

    Attributes:
        pending: the image that was read.
        content_hash: SHA-256 of the bytes; empty if they could not be read.
        pixels: (H, W, 3) uint8, at the requested scale.
        width_px, height_px: size of the whole upright photo.
        error: why there are no pixels.
        perceptual_hash: a hash that is similar for photos that look similar; empty if the photo was
            not decoded.
        same_as: id of the photo that already holds this content. If it is set, there are no pixels.
        periods: when it was read and decoded.
    """

    pending: PendingImage
    content_hash: str = ""
    pixels: RgbImage | None = None
    width_px: int = 0
    height_px: int = 0
    error: ImageError | None = None
    perceptual_hash: str = ""
    same_as: str = ""
    periods: Sequence[Period] = ()

    @property
    def num_bytes(self) -> int:
        """Number of bytes that the pixels occupy in memory."""
        return 0 if self.pixels is None else self.pixels.nbytes

    @property
    def is_unchanged(self) -> bool:
        """Whether the content equals that of the previous ledger row."""
        return self.pixels is None and self.error is None and not self.same_as

    @property
    def keeps_earlier_instances(self) -> bool:
        """Whether the image was indexed earlier and just cannot be reached at the moment."""
        # A file server that is down for a while must not empty the gallery.
        previous, error = self.pending.previous, self.error
        return (
            previous is not None
            and previous.status == "indexed"
            and error is not None
            and error.reason == ImageFailure.UNREACHABLE
        )

    @property
    def record(self) -> ImageRecord:
        """The ledger row, with everything that is known after reading."""
        return ImageRecord(
            image_id=self.pending.image_id,
            uri=self.pending.file.uri,
            status="indexed",
            content_hash=self.content_hash,
            size_bytes=self.pending.file.size_bytes,
            mtime_ns=self.pending.file.mtime_ns,
            width_px=self.width_px,
            height_px=self.height_px,
            attributes=self.pending.file.attributes,
            same_as=self.same_as,
            perceptual_hash=self.perceptual_hash,
        )

    def to_indexed(self, instances: Instances) -> IndexedImage:
        """Return the image with its instances, ready for the store."""
        return IndexedImage(replace(self.record, num_instances=len(instances)), instances)

    def to_duplicate(self) -> IndexedImage:
        """Return the image as a duplicate of `same_as`, ready for the store."""
        return IndexedImage(self.record, None)

    def to_failed(self, error: ImageError) -> IndexedImage:
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


def is_up_to_date(previous: ImageRecord | None, file: SourceFile, *, retry_failed: bool) -> bool:
    """Return whether the ledger row is up to date, so that `file` need not be read."""
    # Instances carry the attributes of their image, so new attributes count as a change.
    if (
        previous is None
        or file.mtime_ns == UNKNOWN_TIME_NS
        or previous.attributes != file.attributes
    ):
        return False
    # Without a content hash, the bytes were never read, so there is nothing to compare: try again.
    if previous.status == "failed" and (retry_failed or not previous.content_hash):
        return False
    return (previous.size_bytes, previous.mtime_ns) == (file.size_bytes, file.mtime_ns)


def load_image(
    pending: PendingImage,
    *,
    source: Source,
    at_least_px: int | None,
    retry_failed: bool,
    counters: RunCounters,
) -> LoadedImage:
    """Read and decode one image. For a bad file, return a `LoadedImage` with an error.

    Args:
        pending: the image.
        source: the source that listed it.
        at_least_px: see `reir.images.decode.decode`; None decodes at full size.
        retry_failed: whether content that failed before is decoded again.
        counters: count the time that reading and decoding take.
    """
    periods: list[Period] = []
    try:
        with counters.stage("read", periods):
            # Only local files raise `ImageUnreachable`. Reads over a network have been retried by
            # the source already.
            data = call_with_retries(
                partial(source.read, pending.file),
                pauses_s=READ_RETRY_PAUSES_S,
                retry_on=ImageUnreachable,
            )
            digest = content_hash(data)
    except (ImageError, MemoryError) as error:  # out of memory: only this photo fails
        return LoadedImage(pending, error=failure_of(error), periods=periods)
    pending = _with_size(pending, len(data))
    # A file with a new time but unchanged bytes is not decoded.
    previous = pending.previous
    if previous is not None and _is_unchanged(
        previous, pending.file, digest, retry_failed=retry_failed
    ):
        return LoadedImage(pending, digest, periods=periods)
    try:
        with counters.stage("decode", periods):
            image = decode(data, at_least_px=at_least_px)
            appearance = perceptual_hash(image.pixels)
    except (ImageError, MemoryError) as error:
        return LoadedImage(pending, digest, error=failure_of(error), periods=periods)
    return LoadedImage(
        pending,
        digest,
        image.pixels,
        image.width_px,
        image.height_px,
        perceptual_hash=appearance,
        periods=periods,
    )


def _is_unchanged(
    previous: ImageRecord, file: SourceFile, digest: str, *, retry_failed: bool
) -> bool:
    """Return whether a file that was read equals its ledger row, apart from the time."""
    return (
        previous.content_hash == digest
        and previous.attributes == file.attributes
        # 0 is the size of all rows of tables, and of files for which a web server reports no size.
        and file.size_bytes in (0, previous.size_bytes)
        and not (previous.status == "failed" and retry_failed)
    )


def _with_size(pending: PendingImage, num_bytes: int) -> PendingImage:
    """Set the size of a file that did not exist when it was listed, but could be read later.

    Its time stays 0, so that the next run reads the file again: it may not have been complete yet.
    """
    if (pending.file.size_bytes, pending.file.mtime_ns) != ABSENT_FILE:
        return pending
    return replace(pending, file=replace(pending.file, size_bytes=num_bytes))


def failure_of(error: ImageError | MemoryError) -> ImageError:
    """Return the error for the ledger; a photo for which memory ran out is `too_large`."""
    if isinstance(error, ImageError):
        return error
    return ImageError(ImageFailure.TOO_LARGE, "this machine does not have enough memory to load it")


def perceptual_hash(pixels: RgbImage) -> str:
    """Return the pHash of a photo: 16 hex digits that change little with size, format and light."""
    image = Image.fromarray(pixels)
    # The hash uses 32 x 32 pixels. Reducing the photo to about twice that size first is several
    # times as fast.
    factor = max(min(image.size) // _HASHED_SIDE_PX, 1)
    return str(imagehash.phash(image.reduce(factor)))

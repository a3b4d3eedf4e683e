"""Validated records of photos and instances: what encoders return and stores keep.

Boxes are xyxy, normalized to [0, 1] of the upright image.
"""

# Shapes: N instances of one image, D vector dimension

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
RgbImage = npt.NDArray[np.uint8]
"""(H, W, 3) uint8, upright, RGB."""
Box = tuple[float, float, float, float]
"""xyxy in [0, 1] of the upright photo."""
JsonValue = str | int | float | bool | None
Attributes = Mapping[str, JsonValue]
ImageStatus = Literal["indexed", "failed"]


MAX_RLE_BYTES = 16_384
"""Size limit of one mask's runs: thousands of rows have to fit into one response of the store."""


@dataclass(frozen=True, slots=True)
class MaskRle:
    """The pixels of one instance, run-length encoded; `reir.images.rle` encodes and decodes it.

    Attributes:
        size: (height, width) of the mask in pixels; it covers the whole upright photo.
        counts: COCO's compressed runs; pycocotools accepts `{"size": size, "counts": counts}`.

    Raises:
        ValueError: a side is below 1, or the runs are empty or not ASCII.
    """

    size: tuple[int, int]
    counts: str

    def __post_init__(self) -> None:
        """Check what can be checked without decoding the runs."""
        if min(self.size) < 1 or not self.counts or not self.counts.isascii():
            raise ValueError(
                f"a mask needs a size of at least (1, 1) and ASCII runs that are not empty, "
                f"got {self.size} and {self.counts[:20]!r}"
            )


def _float32(name: str, value: npt.ArrayLike, shape: tuple[int | None, ...]) -> FloatArray:
    """Return `value` as a C-contiguous float32 array of `shape` (None: any length)."""
    array = np.ascontiguousarray(value, dtype=np.float32)
    matches = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not matches:
        want = "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{name} must have shape {want}, got {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} must be finite, got {bad} values that are NaN or infinite")
    return array


@dataclass(frozen=True)
class Instances:
    """The instances of one image, as the visual stream finds them without any query.

    Attributes:
        boxes: (N, 4) float32, xyxy in [0, 1] of the upright image.
        objectness: (N,) float32 in [0, 1], in descending order; neither is checked.
        vectors: (N, D) float32. Their lengths may differ: that of a vector is a part of its scores.
        image_vector: (D,) float32, of the whole photo in the same space, for image retrieval.
        masks: N masks in the same order; None if the encoder gives none.

    Raises:
        ValueError: an array has a wrong shape or values that are not finite, a box is not xyxy in
            [0, 1], or there is not one mask for each box; the message says what is expected.
    """

    boxes: FloatArray
    objectness: FloatArray
    vectors: FloatArray
    image_vector: FloatArray
    masks: tuple[MaskRle, ...] | None = None

    def __post_init__(self) -> None:
        """Validate every field and convert it to float32."""
        boxes = _float32("boxes", self.boxes, (None, 4))
        num = len(boxes)
        if boxes.size and (boxes.min() < 0 or boxes.max() > 1):
            raise ValueError(
                f"boxes must lie in [0, 1] (xyxy, normalized), got [{boxes.min()}, {boxes.max()}]"
            )
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError("boxes must be xyxy with x2 >= x1 and y2 >= y1")
        if self.masks is not None and len(self.masks) != num:
            raise ValueError(f"there must be {num} masks, one for each box, got {len(self.masks)}")
        vectors = _float32("vectors", self.vectors, (num, None))
        # The only way to set fields of a frozen dataclass, before anybody has seen the record.
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "objectness", _float32("objectness", self.objectness, (num,)))
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(
            self,
            "image_vector",
            _float32("image_vector", self.image_vector, (vectors.shape[1],)),
        )

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.boxes)

    @property
    def dim(self) -> int:
        """Vector dimension D."""
        return int(self.vectors.shape[1])

    @property
    def areas(self) -> FloatArray:
        """(N,) fraction of the image that each box covers."""
        # In float32, exactly as `reir.store.filter_fields.box_areas`: a filter on the area must
        # keep the same instances in every store.
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One ledger row: the outcome of indexing one image into a gallery version.

    Attributes:
        image_id: stable key, derived from the canonical URI (`reir.images.decode.image_id`).
        uri: canonical URI, percent-encoded, e.g. `file:///photos/a%20b.jpg`.
        status: "indexed" or "failed".
        content_hash: sha256 of the bytes, hex; empty if they could not be read.
        size_bytes, mtime_ns: a rerun compares them first, and hashes only files that differ.
        width_px, height_px: of the upright image; 0 if it could not be decoded.
        num_instances: number of instances stored under this image.
        reason: an `ImageFailure` value; empty if indexed.
        detail: the failure in words; empty if indexed.
        attributes: the user's columns, which filters can use.
        same_as: for a duplicate, the id of the image with the same content that its instances are
            stored under; empty otherwise.
        perceptual_hash: 16 hex digits; photos that look alike differ in few bits. Empty if not
            computed.
    """

    image_id: str
    uri: str
    status: ImageStatus
    content_hash: str = ""
    size_bytes: int = 0
    mtime_ns: int = 0
    width_px: int = 0
    height_px: int = 0
    num_instances: int = 0
    reason: str = ""
    detail: str = ""
    attributes: Attributes = field(default_factory=dict)
    same_as: str = ""
    perceptual_hash: str = ""

    @property
    def holds_instances(self) -> bool:
        """Whether the instances of this content are stored under this photo."""
        return self.status == "indexed" and not self.same_as

    def __post_init__(self) -> None:
        """Check that the status fits the other fields."""
        if self.status not in ("indexed", "failed"):
            raise ValueError(f"status must be 'indexed' or 'failed', got {self.status!r}")
        if (self.status == "failed") != bool(self.reason):
            raise ValueError(
                f"a failed image needs a reason and an indexed image must not have one, "
                f"got status={self.status!r} reason={self.reason!r}"
            )
        # The instances of a duplicate are stored under the photo that it names, and only there.
        if self.same_as and (self.status != "indexed" or self.num_instances):
            raise ValueError(
                f"a duplicate must be indexed and have 0 instances, "
                f"got status={self.status!r} num_instances={self.num_instances}"
            )


@dataclass(frozen=True)
class IndexedImage:
    """One image to be stored: its ledger row and its instances.

    A failed image and a duplicate have no instances.
    """

    record: ImageRecord
    instances: Instances | None

    def __post_init__(self) -> None:
        """Check that the instances are those that the ledger row announces."""
        num_found = 0 if self.instances is None else len(self.instances)
        if self.record.num_instances != num_found:
            raise ValueError(
                f"ledger row of {self.record.image_id} says {self.record.num_instances} "
                f"instances, got {num_found}"
            )
        if self.record.holds_instances != (self.instances is not None):
            kind = "a duplicate" if self.record.same_as else self.record.status
            raise ValueError(
                f"image {self.record.image_id} is {kind} but instances are "
                f"{'absent' if self.instances is None else 'present'}"
            )

"""The validated containers that cross part borders: visual stream -> store -> ranking -> user.

Knows numpy and nothing else of the platform but its errors. Boxes are xyxy, normalised to [0, 1]
of the upright image.
"""

# Shapes: N instances of one image, D vector dimension

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

FloatArray = npt.NDArray[np.float32]
JsonValue = str | int | float | bool | None
Attributes = Mapping[str, JsonValue]
ImageStatus = Literal["indexed", "failed"]


MAX_RLE_BYTES = 16_384
"""Of the runs of one mask; a page of thousands of rows has to fit into one answer of the store."""


@dataclass(frozen=True, slots=True)
class MaskRle:
    """The pixels of one instance, run by run; `reir.rle` makes and reads it.

    Attributes:
        size: (height, width) in pixels of the raster, which covers the whole upright photo.
        counts: COCO's compressed runs; `{"size": .., "counts": ..}` is what pycocotools takes.

    Raises:
        ValueError: a side is below 1, or the runs are missing or not in ASCII.
    """

    size: tuple[int, int]
    counts: str

    def __post_init__(self) -> None:
        """Check what can be checked without reading the runs."""
        if min(self.size) < 1 or not self.counts or not self.counts.isascii():
            raise ValueError(
                f"a mask needs a size of at least (1, 1) and runs in ASCII, "
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
        raise ValueError(f"{name} must be finite, got {bad} bad values")
    return array


@dataclass(frozen=True)
class Instances:
    """What the visual stream says of one image, without any query.

    Attributes:
        boxes: (N, 4) float32, xyxy in [0, 1] of the upright image.
        objectness: (N,) float32 in [0, 1], best first.
        vectors: (N, D) float32, unit length.
        image_vector: (D,) float32, the whole photo in the same space (image retrieval).
        masks: N masks, best first; None from an encoder that gives none.

    Raises:
        ValueError: a shape, a range or a length differs; the message gives both.
    """

    boxes: FloatArray
    objectness: FloatArray
    vectors: FloatArray
    image_vector: FloatArray
    masks: tuple[MaskRle, ...] | None = None

    def __post_init__(self) -> None:
        """Validate and normalise every field to float32."""
        boxes = _float32("boxes", self.boxes, (None, 4))
        num = len(boxes)
        if boxes.size and (boxes.min() < 0 or boxes.max() > 1):
            raise ValueError(
                f"boxes must lie in [0, 1] (xyxy, normalised), got [{boxes.min()}, {boxes.max()}]"
            )
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError("boxes must be xyxy with x2 >= x1 and y2 >= y1")
        if self.masks is not None and len(self.masks) != num:
            raise ValueError(f"masks must be {num}, one a box, got {len(self.masks)}")
        vectors = _float32("vectors", self.vectors, (num, None))
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
        """(N,) share of the image that each box covers, in [0, 1]."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return np.asarray(sides[:, 0] * sides[:, 1], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One ledger row: what became of one image of a gallery version.

    Attributes:
        image_id: stable key, derived from the canonical URI (`reir.images.image_id`).
        uri: canonical URI, percent-encoded, e.g. `file:///photos/a%20b.jpg`.
        status: "indexed" or "failed".
        content_hash: sha256 of the bytes, hex; empty when they could not be read.
        size_bytes, mtime_ns: what the incremental run compares before it hashes.
        width_px, height_px: of the upright image; 0 when it could not be decoded.
        num_instances: instances stored.
        reason: an `ImageFailure` value, empty when indexed.
        detail: for a person, empty when indexed.
        attributes: user columns, filterable.
        same_as: image id of the photo that holds the instances of this content; empty unless this
            is a duplicate, which has none of its own.
        perceptual_hash: 16 hex digits, alike for photos that look alike; empty when not computed.
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
        """Check that status and the fields that explain it agree."""
        if self.status not in ("indexed", "failed"):
            raise ValueError(f"status must be 'indexed' or 'failed', got {self.status!r}")
        if (self.status == "failed") != bool(self.reason):
            raise ValueError(
                f"a failed image needs a reason and an indexed one has none, "
                f"got status={self.status!r} reason={self.reason!r}"
            )
        if self.same_as and (self.status != "indexed" or self.num_instances):
            raise ValueError(
                f"a duplicate is indexed and has 0 instances, "
                f"got status={self.status!r} num_instances={self.num_instances}"
            )


@dataclass(frozen=True)
class IndexedImage:
    """One image on its way into the store: its ledger row and the instances that it holds.

    A failed image and a duplicate hold none.
    """

    record: ImageRecord
    instances: Instances | None

    def __post_init__(self) -> None:
        """An image that holds instances has as many as its row says, any other has none."""
        found = 0 if self.instances is None else len(self.instances)
        if self.record.num_instances != found:
            raise ValueError(
                f"ledger row of {self.record.image_id} says {self.record.num_instances} "
                f"instances, got {found}"
            )
        if self.record.holds_instances != (self.instances is not None):
            kind = "a duplicate" if self.record.same_as else self.record.status
            raise ValueError(
                f"image {self.record.image_id} is {kind} but instances are "
                f"{'absent' if self.instances is None else 'present'}"
            )


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """Another instance of a hit's photo that speaks for it.

    Attributes:
        instance_id: `<image_id>#<n>`.
        box: xyxy in [0, 1] of the upright photo.
        weight: its share of the re-ranker's attention, in [0, 1].
    """

    instance_id: str
    box: tuple[float, float, float, float]
    weight: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Why a hit stands where it stands; given on request (`explain`).

    Attributes:
        dual_score: inner product of instance and query vector.
        rerank_score: of the relation re-ranker; None where it did not run.
        margin: score above that of the next hit; above the best instance left out for the last.
        neighbours: the instances of the photo that the re-ranker looked at most, most first.
    """

    dual_score: float
    rerank_score: float | None = None
    margin: float | None = None
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One instance returned for an expression.

    Attributes:
        instance_id: `<image_id>#<n>`.
        image_id, uri: the photo.
        box: xyxy in [0, 1] of the upright photo.
        score: what hits are ordered by: the re-ranker's where it ran, else the inner product of
            instance and expression vector; higher is better.
        objectness: query-free confidence in [0, 1].
        attributes: user columns of the photo.
        mask: pixels of the instance, where the gallery was indexed with masks or it was localised.
        presence: calibrated probability in [0, 1] that this is the described instance; None
            without a calibration.
        evidence: on request.
    """

    instance_id: str
    image_id: str
    uri: str
    box: tuple[float, float, float, float]
    score: float
    objectness: float
    attributes: Attributes = field(default_factory=dict)
    mask: MaskRle | None = None
    presence: float | None = None
    evidence: Evidence | None = None

    @property
    def area(self) -> float:
        """Share of the photo that the box covers."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)


@dataclass(frozen=True, kw_only=True)
class Located:
    """One box that answers an expression within one photo.

    Attributes:
        box: xyxy in [0, 1] of the upright photo.
        score: of box and expression, higher is better.
        presence: calibrated probability that this is the described instance; None without a
            calibration.
        mask: where the checkpoint has a mask branch.
    """

    box: tuple[float, float, float, float]
    score: float
    presence: float | None
    mask: MaskRle | None = None


@dataclass(frozen=True, kw_only=True)
class Localisation:
    """Where an expression is in one photo.

    Attributes:
        expression: as asked.
        width_px, height_px: of the upright photo.
        present: whether anything fits: the best presence reaches the checkpoint's threshold.
        presence: calibrated probability that the described instance is in this photo; None without
            a calibration.
        boxes: best first.
        timings_ms: stage -> milliseconds.
    """

    expression: str
    width_px: int
    height_px: int
    present: bool
    presence: float | None
    boxes: tuple[Located, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The answer to one expression: hits, best first, and how they came about.

    Attributes:
        expression: as asked.
        gallery, version: what was searched.
        hits: best first; at most `per_image` of each photo.
        timings_ms: stage -> milliseconds (`text`, `search`, `rerank`, `localise`, `rank`).
        degraded: stages left out because their time budget was over, or because they failed.
        digest: of the checkpoint that made the vectors.
        presence: calibrated probability in [0, 1] that the described instance is in the gallery;
            None without a calibration.
        found: False where there is no hit, or `presence` is below the checkpoint's threshold: what
            was described is not there, and the hits are only what comes nearest.
        equally_good: how many of the first hits cannot be told apart by their scores; 1 is a clear
            answer, 0 none.
        cursor: where the next page begins; empty when there is none.
    """

    expression: str
    gallery: str
    version: str
    hits: tuple[Hit, ...]
    timings_ms: Mapping[str, float]
    degraded: tuple[str, ...] = ()
    digest: str = ""
    presence: float | None = None
    found: bool = True
    equally_good: int = 0
    cursor: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir search --json` prints."""
        from dataclasses import asdict

        return asdict(self)

    def draw(self, columns: int = 4) -> Image.Image:
        """Return a contact sheet of the hits with boxes and scores."""
        from reir.drawing import contact_sheet

        return contact_sheet(self, columns=columns)

    def save_drawing(self, path: str | Path) -> None:
        """Write `draw()` to a file; the ending chooses the format."""
        self.draw().save(path)

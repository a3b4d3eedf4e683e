"""`TiledEncoder`: encodes large photos in overlapping tiles, with any `InstanceEncoder`.

A model resizes photos to its own resolution, so it misses small instances in a large photo. Here, a
large photo is encoded as a whole and in overlapping tiles. Boxes that an inner edge of a tile cuts
are dropped: instances smaller than the overlap are complete in another tile, and larger ones are
found in the whole photo. Instances that several views contain are merged by box and vector.
"""

# Shapes: T tiles of one photo, N instances of one photo, D vector dimension, H x W pixels

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir.images.boxes import elementwise_iou
from reir.models.delegating_encoder import DelegatingEncoder
from reir.models.interfaces import InstanceEncoder
from reir.records import FloatArray, Instances, RgbImage

VIEWS_AT_ONCE = 8
"""Number of views to encode at once: a large photo has many, and each takes memory."""

_EDGE = 0.01
"""Fraction of a tile's side within which a box counts as touching its edge."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """When and how a photo is divided into tiles; part of a version's settings.

    Attributes:
        above_px: photos with a longer side than this are tiled.
        side_px: side of a tile; larger if a photo would otherwise need more than `max_tiles`.
        overlap: minimum overlap of neighboring tiles, as a fraction of the side.
        max_tiles: maximum number of tiles per photo.
        times: a tiled photo keeps this many times the encoder's `num_candidates`.
        same_iou, same_similarity: two instances of different views are the same if both the IoU of
            their boxes and the cosine of their vectors are larger than these.

    Raises:
        ConfigError: a value is out of range.
    """

    above_px: int = 1600
    side_px: int = 832
    overlap: float = 0.2
    max_tiles: int = 64
    times: int = 4
    same_iou: float = 0.5
    same_similarity: float = 0.5

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("above_px", "side_px", "max_tiles", "times"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap must be at least 0 and below 1, got {self.overlap}")

    @property
    def settings(self) -> dict[str, int | float]:
        """The values under the names that a version stores them by."""
        return {f"tile_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Tiling | None:
        """Return the tiling in the settings of a version; None if it was indexed without tiles."""
        if not cls().settings.keys() <= settings.keys():
            return None
        return cls(**{each.name: settings[f"tile_{each.name}"] for each in fields(cls)})

    def tiles(self, width_px: int, height_px: int) -> npt.NDArray[np.int64]:
        """Return the (T, 4) xyxy tiles of a photo in pixels, row by row; none for a small photo."""
        if max(width_px, height_px) <= self.above_px:
            return np.empty((0, 4), dtype=np.int64)
        side_px = self.side_px
        # Larger tiles rather than fewer: the whole photo has to be covered.
        while self._count(width_px, side_px) * self._count(height_px, side_px) > self.max_tiles:
            side_px = math.ceil(side_px * 1.1)
        columns, rows = self._places(width_px, side_px), self._places(height_px, side_px)
        return np.array(
            [
                (x, y, min(x + side_px, width_px), min(y + side_px, height_px))
                for y in rows
                for x in columns
            ],
            dtype=np.int64,
        )

    def _count(self, length_px: int, side_px: int) -> int:
        """Return how many tiles cover a length."""
        if length_px <= side_px:
            return 1
        step_px = max(side_px * (1 - self.overlap), 1.0)
        return 1 + math.ceil((length_px - side_px) / step_px)

    def _places(self, length_px: int, side_px: int) -> list[int]:
        """Return the evenly spaced starts of the tiles."""
        # Evenly, so that all overlaps are equal and no tile extends beyond the photo.
        last = max(length_px - side_px, 0)
        return [round(place) for place in np.linspace(0, last, self._count(length_px, side_px))]


@dataclass(frozen=True)
class _View:
    """A part of photo number `photo`: its pixels, and its (4,) normalized box in the photo."""

    photo: int
    pixels: RgbImage
    frame: FloatArray


class TiledEncoder(DelegatingEncoder):
    """An `InstanceEncoder` that also encodes the tiles of large photos.

    Args:
        encoder: encodes whole photos and tiles.
        tiling: when and how to divide photos.

    Raises:
        ConfigError: the encoder returns masks, which cannot be merged across tiles.
    """

    masks = False

    def __init__(self, encoder: InstanceEncoder, tiling: Tiling) -> None:
        if encoder.masks:
            raise ConfigError(
                "masks cannot be merged across tiles; use --no-tile, or an encoder without masks"
            )
        super().__init__(encoder)
        self.tiling = tiling

    @property
    def num_candidates(self) -> int:
        """Maximum number of instances per photo."""
        return self._encoder.num_candidates * self.tiling.times

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        """Return the instances of each photo, by descending objectness."""
        found: list[list[tuple[Instances, FloatArray]]] = [[] for _ in images]
        views = list(self._views(images))
        for start in range(0, len(views), VIEWS_AT_ONCE):
            part = views[start : start + VIEWS_AT_ONCE]
            answers = self._encoder.encode_images([view.pixels for view in part])
            for view, instances in zip(part, answers, strict=True):
                found[view.photo].append((instances, view.frame))
        return [self._merge(parts) for parts in found]

    def _views(self, images: Sequence[RgbImage]) -> Iterator[_View]:
        """Yield every photo, followed by its tiles."""
        for number, image in enumerate(images):
            height_px, width_px = image.shape[:2]
            yield _View(number, image, np.array([0, 0, 1, 1], dtype=np.float32))
            for x1, y1, x2, y2 in self.tiling.tiles(width_px, height_px).tolist():
                frame = np.array([x1 / width_px, y1 / height_px, x2 / width_px, y2 / height_px])
                pixels = np.ascontiguousarray(image[y1:y2, x1:x2])
                yield _View(number, pixels, frame.astype(np.float32))

    def _merge(self, parts: Sequence[tuple[Instances, FloatArray]]) -> Instances:
        """Merge the instances of all views of one photo; the first view is the whole photo."""
        whole = parts[0][0]
        if len(parts) == 1:
            return whole
        kept = [drop_cut_boxes(instances, frame) for instances, frame in parts]
        boxes, objectness, vectors = (np.concatenate(each) for each in zip(*kept, strict=True))
        view_N = np.repeat(np.arange(len(kept)), [len(each[0]) for each in kept])
        chosen = self._distinct_rows(boxes, objectness, vectors, view_N)
        return Instances(
            boxes=boxes[chosen],
            objectness=objectness[chosen],
            vectors=vectors[chosen],
            image_vector=whole.image_vector,
        )

    def _distinct_rows(
        self,
        boxes: FloatArray,
        objectness: FloatArray,
        vectors: FloatArray,
        view_N: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Return the rows of instances, best first, without those found better in another view."""
        waiting = np.argsort(-objectness, kind="stable")
        chosen: list[int] = []
        while waiting.size and len(chosen) < self.num_candidates:
            best, waiting = int(waiting[0]), waiting[1:]
            chosen.append(best)
            iou = elementwise_iou(boxes[best], boxes[waiting])
            # Two people behind each other have overlapping boxes, but different vectors.
            alike = vectors[waiting] @ vectors[best] > self.tiling.same_similarity
            # Instances of one view are distinct already, since its encoder applies NMS.
            same = (iou > self.tiling.same_iou) & alike & (view_N[waiting] != view_N[best])
            waiting = waiting[~same]
        return np.array(chosen, dtype=np.int64)


def drop_cut_boxes(
    instances: Instances, frame: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return boxes in the whole photo, objectness and vectors, without boxes that a tile cuts.

    Args:
        instances: of the tile.
        frame: (4,) xyxy of the tile in [0, 1] of the photo.
    """
    # Only at edges within the photo: at the border of the photo itself, an instance is complete.
    near = instances.boxes[:, :2] <= _EDGE
    far = instances.boxes[:, 2:] >= 1 - _EDGE
    inner_near, inner_far = frame[:2] > 0, frame[2:] < 1
    kept = ~((near & inner_near) | (far & inner_far)).any(axis=1)
    corner, size = np.tile(frame[:2], 2), np.tile(frame[2:] - frame[:2], 2)
    boxes = np.clip(instances.boxes[kept] * size + corner, 0, 1)
    return boxes.astype(np.float32), instances.objectness[kept], instances.vectors[kept]

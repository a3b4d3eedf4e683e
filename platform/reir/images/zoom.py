"""`ZoomEncoder`: encodes the parts of a large photo that deserve a closer look, and no others.

A cheap look finds boxes in the whole photo without vectors. At the size that the model sees, small
instances look alike and their boxes are rough, but most places with instances get a box. Parts of
nearly full resolution are laid around these boxes, as few as possible, and only these are encoded.
"""

# Shapes: T parts of one photo, N boxes of the cheap look, P possible places of a part

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir.images.tiling import Tiling
from reir.images.views import ViewsEncoder, ViewSettings
from reir.models.interfaces import BoxProposer, InstanceEncoder
from reir.records import FloatArray, RgbImage

_PLACES_PER_SIDE = 6
"""Possible places of a part, per length of its side."""

_OFF_CENTER = 0.3
"""Share of a box's score that is lost where it lies at the edge of a part instead of its center."""


@dataclass(frozen=True, kw_only=True)
class Zoom(ViewSettings):
    """When and how large photos are looked at more closely; see `ViewSettings`.

    Attributes:
        side_px: side of a part; larger if a photo would otherwise need more than `max_parts`.
        max_parts: maximum number of parts per photo, which bounds the cost.
        look_px: photos with a longer side than this get several cheap looks, each at a tile of
            this side, because one look would show too little.
        num_boxes: number of boxes of the cheap looks that are considered, those with the best
            scores.
        min_score: boxes with lower scores are not considered.
        max_share: boxes whose side is a larger share of the look are not considered, because their
            instances are seen well enough without zoom.

    Raises:
        ConfigError: a value is out of range.
    """

    prefix: ClassVar[str] = "zoom_"
    at_least_1: ClassVar[tuple[str, ...]] = (
        "above_px",
        "times",
        "side_px",
        "max_parts",
        "look_px",
        "num_boxes",
    )

    times: int = 16
    side_px: int = 540
    max_parts: int = 24
    look_px: int = 4000
    num_boxes: int = 200
    min_score: float = 0.05
    max_share: float = 0.15

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in ("min_score", "max_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} must be above 0 and at most 1, got {getattr(self, name)}"
                )

    def parts(
        self, width_px: int, height_px: int, boxes_px: FloatArray, scores: FloatArray
    ) -> npt.NDArray[np.int64]:
        """Return the parts of a photo to look at, the most promising first.

        Args:
            width_px, height_px: of the photo.
            boxes_px: (N, 4) xyxy of the boxes to look at; those that fit into no part are ignored.
            scores: (N,) in [0, 1].

        Returns:
            (T, 4) xyxy in pixels, at most `max_parts`.
        """
        side_px = self.side_px
        # This ends: a part as large as the photo has one place, and `max_parts` is at least 1.
        while True:
            places = _places(width_px, height_px, side_px)
            chosen = _cover(places, boxes_px, scores, self.min_score)
            # Larger parts rather than fewer, so that no promising place is left out.
            if len(chosen) <= self.max_parts:
                return places[chosen]
            side_px = math.ceil(side_px * 1.1)

    def _encoder(self, encoder: InstanceEncoder) -> ZoomEncoder:
        return ZoomEncoder(encoder, self)


class ZoomEncoder(ViewsEncoder):
    """An `InstanceEncoder` that also encodes the promising parts of large photos.

    Args:
        encoder: encodes whole photos and parts. The cheap look is its `propose_boxes`, or, if it is
            no `BoxProposer`, its instances.
        zoom: when and how to look more closely.

    Raises:
        ConfigError: the encoder returns masks, which cannot be merged across parts.
    """

    def __init__(self, encoder: InstanceEncoder, zoom: Zoom) -> None:
        super().__init__(encoder, zoom)
        self._zoom = zoom

    def parts(self, image: RgbImage) -> npt.NDArray[np.int64]:
        """Return the (T, 4) parts of a photo to look at, in pixels; see `Zoom.parts`."""
        height_px, width_px = image.shape[:2]
        boxes_px, scores = self._small_boxes(image)
        best = np.argsort(-scores, kind="stable")[: self._zoom.num_boxes]
        return self._zoom.parts(width_px, height_px, boxes_px[best], scores[best])

    def _small_boxes(self, image: RgbImage) -> tuple[FloatArray, FloatArray]:
        """Return the (N, 4) boxes in pixels of small instances in cheap looks, and their scores."""
        height_px, width_px = image.shape[:2]
        looks = _looks(width_px, height_px, self._zoom.look_px)
        found = []
        for x1, y1, x2, y2 in looks.tolist():
            boxes, scores = self._propose(np.ascontiguousarray(image[y1:y2, x1:x2]))
            sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
            kept = (scores >= self._zoom.min_score) & (sides <= self._zoom.max_share)
            size, corner = np.tile([x2 - x1, y2 - y1], 2), np.tile([x1, y1], 2)
            found.append((boxes[kept] * size + corner, scores[kept]))
        boxes_px, all_scores = (np.concatenate(each) for each in zip(*found, strict=True))
        return boxes_px.astype(np.float32), all_scores.astype(np.float32)

    def _propose(self, image: RgbImage) -> tuple[FloatArray, FloatArray]:
        """Return the boxes of one look, and their scores."""
        if isinstance(self._encoder, BoxProposer):
            return self._encoder.propose_boxes(image, self._zoom.num_boxes)
        (instances,) = self._encoder.encode_images([image])
        return instances.boxes, instances.objectness


def _looks(width_px: int, height_px: int, look_px: int) -> npt.NDArray[np.int64]:
    """Return the (n, 4) parts of a photo, in each of which the detector runs once."""
    if max(width_px, height_px) <= look_px:
        return np.array([[0, 0, width_px, height_px]])
    return Tiling(above_px=look_px, side_px=look_px).tiles(width_px, height_px)


def _places(width_px: int, height_px: int, side_px: int) -> npt.NDArray[np.int64]:
    """Return the (P, 4) possible places of a part, in pixels."""
    overlap = 1 - 1 / _PLACES_PER_SIDE
    most = (width_px + height_px) ** 2  # all of them
    return Tiling(above_px=1, side_px=side_px, overlap=overlap, max_tiles=most).tiles(
        width_px, height_px
    )


def _cover(
    places: npt.NDArray[np.int64], boxes_px: FloatArray, scores: FloatArray, min_score: float
) -> list[int]:
    """Choose places, best first, until every box that fits into one is inside a chosen place."""
    starts, ends = places[:, None, :2], places[:, None, 2:]
    within = (boxes_px[:, :2] >= starts) & (boxes_px[:, 2:] <= ends)
    inside = np.asarray(within.all(axis=2))
    # 0 at the center, 1 in a corner. A box is the rough center of what a closer look will find.
    twice_off = np.abs(boxes_px[:, :2] + boxes_px[:, 2:] - starts - ends) / (ends - starts)
    gain = inside * (1 - _OFF_CENTER * twice_off.mean(axis=2))
    waiting = scores.copy()
    chosen: list[int] = []
    while True:
        best = int((gain @ waiting).argmax())
        # Each box of `_small_boxes` has at least this score, so no place holds a waiting one now.
        if (waiting * inside[best]).sum() < min_score:
            return chosen
        chosen.append(best)
        waiting[inside[best]] = 0

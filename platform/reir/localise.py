"""Where an expression is in one photo, on its pixels.

`locate` is plain REC: the photo is encoded, its instances are scored. `refine` looks at hits of a
gallery again: a crop around the box is encoded at higher resolution, and what it shows in the place
of the hit gives a closer box, and a mask where the encoder has them. Knows the encoder's seam; no
store and no Ray.
"""

# Shapes: N instances of a photo or crop, D vector dimension, H x W pixels

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reir import rle
from reir.boxes import elementwise_iou
from reir.images import decode_image, path_of_uri, read_bytes
from reir.models.seams import InstanceEncoder, RgbImage
from reir.presence import Calibration
from reir.records import FloatArray, Instances, MaskRle
from reir.stages import Box, Refined, Refinement

CONTEXT = 1.0
"""Margin around a box in a crop, in sides of the box: neighbours stay in the picture."""

LEAST_CROP = 0.25
"""Of the photo's sides that a crop has."""

SAME_IOU = 0.5
"""Overlap with the hit from which on an instance of the crop is the same."""

BETTER = 0.02
"""Score above the hit's own, seen in the whole photo, from which on the new box replaces it."""


@dataclass(frozen=True, kw_only=True)
class LocatedInstance:
    """One instance of a photo, for one expression.

    Attributes:
        score: inner product of instance and expression vector.
        presence: calibrated probability that it is the described one; None without a calibration.
        mask: where the encoder gives them.
    """

    box: Box
    score: float
    presence: float | None
    mask: MaskRle | None


@dataclass(frozen=True, kw_only=True)
class Located:
    """The answer to one expression in one photo.

    Attributes:
        instances: best first.
        presence: that the described instance is in the photo; None without a calibration.
        present: False where nothing is there, or `presence` is below the threshold.
    """

    instances: tuple[LocatedInstance, ...]
    presence: float | None
    present: bool


def photo_at(uri: str) -> RgbImage:
    """Return the pixels of a local photo.

    Raises:
        SourceError: the URI is not local.
        ImageError: it cannot be read.
    """
    return decode_image(read_bytes(path_of_uri(uri)))


class PixelLocaliser:
    """Finds instances on the pixels of photos."""

    def __init__(
        self,
        encoder: InstanceEncoder,
        calibration: Calibration | None = None,
        photo: Callable[[str], RgbImage] = photo_at,
    ) -> None:
        """See with `encoder`; `photo` gives the pixels of a photo by its URI."""
        self._encoder, self._calibration, self._photo = encoder, calibration, photo

    def locate(self, image: RgbImage, expressions: Sequence[str], k: int = 5) -> list[Located]:
        """Find the best `k` instances of one photo for each expression.

        Args:
            image: (H, W, 3) uint8, upright.
            expressions: as encoders take them.
            k: most instances.
        """
        (instances,) = self._encoder.encode_images([image])
        return [
            self._located(instances, vector, k)
            for vector in self._encoder.encode_expressions(expressions)
        ]

    def refine(self, requests: Sequence[Refinement]) -> list[Refined]:
        """Look at hits again, each in a crop of its photo.

        Raises:
            ImageError: a photo cannot be read any more.
        """
        views = [_crop(self._photo(each.uri), each.box) for each in requests]
        if not views:
            return []
        seen = self._encoder.encode_images([view.pixels for view in views])
        return [_refined(*each) for each in zip(requests, views, seen, strict=True)]

    def _located(self, instances: Instances, vector_D: FloatArray, k: int) -> Located:
        scores = instances.vectors @ vector_D
        order = np.argsort(-scores, kind="stable")
        best = scores[order].tolist()
        found = tuple(
            LocatedInstance(
                box=_box(instances.boxes[number]),
                score=float(scores[number]),
                presence=self._presence(float(scores[number]), best),
                mask=None if instances.masks is None else instances.masks[number],
            )
            for number in order[:k].tolist()
        )
        if not found:
            absent = None if self._calibration is None else 0.0
            return Located(instances=(), presence=absent, present=False)
        if self._calibration is None:
            return Located(instances=found, presence=None, present=True)
        presence = self._calibration.of_photo(best)
        present = presence >= self._calibration.photo_threshold
        return Located(instances=found, presence=presence, present=present)

    def _presence(self, score: float, best: Sequence[float]) -> float | None:
        return None if self._calibration is None else self._calibration.of_box(score, best)


@dataclass(frozen=True)
class _View:
    """A crop of a photo.

    Attributes:
        frame: (4,) xyxy of the crop in [0, 1] of the photo.
        photo_px: (height, width) of the photo.
    """

    pixels: RgbImage
    frame: FloatArray
    photo_px: tuple[int, int]


def _crop(image: RgbImage, box: Box) -> _View:
    """Cut out a box with its surroundings, within the photo."""
    height, width = image.shape[:2]
    corners = np.array(box, dtype=np.float64)
    centre, side = (corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]
    half = np.maximum(side * (0.5 + CONTEXT), LEAST_CROP / 2)
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    x1, y1 = np.floor(low * (width, height)).astype(int).tolist()
    x2, y2 = np.ceil(high * (width, height)).astype(int).tolist()
    frame = np.array([x1 / width, y1 / height, x2 / width, y2 / height], dtype=np.float32)
    return _View(np.ascontiguousarray(image[y1:y2, x1:x2]), frame, (height, width))


def _refined(request: Refinement, view: _View, seen: Instances) -> Refined:
    """Choose what the crop shows in the place of the hit, if it fits better."""
    corner, size = np.tile(view.frame[:2], 2), np.tile(view.frame[2:] - view.frame[:2], 2)
    boxes = np.clip(seen.boxes * size + corner, 0, 1)
    same = elementwise_iou(np.array(request.box), boxes) >= SAME_IOU
    scores = np.where(same, seen.vectors @ request.vector, -np.inf)
    if not same.any() or scores.max() < request.score + BETTER:
        return Refined(box=request.box)
    best = int(scores.argmax())
    mask = None if seen.masks is None else _in_photo(seen.masks[best], view)
    return Refined(box=_box(boxes[best]), mask=mask)


def _in_photo(mask: MaskRle, view: _View) -> MaskRle:
    """Return the mask of a crop as a mask of the whole photo."""
    height, width = view.photo_px
    x1, y1, x2, y2 = (view.frame * (width, height, width, height)).round().astype(int).tolist()
    whole = np.zeros(view.photo_px, dtype=np.bool_)
    whole[y1:y2, x1:x2] = rle.resized(rle.decode(mask), (y2 - y1, x2 - x1))
    return rle.encode(whole)


def _box(corners: FloatArray) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2

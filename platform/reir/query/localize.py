"""Where an expression is in one photo, on its pixels.

`locate` is plain REC: the photo is encoded, its instances are scored. `refine` looks at hits of a
gallery again: a crop around the box is encoded at higher resolution, and the box is moved half way
to what the crop shows in its place; from there comes a mask too, where the encoder has them. Taking
the second box as it is made boxes worse, by score, overlap or objectness alike
(`benchmarks/localization.py`). Knows the encoder's seam; no store and no Ray.
"""

# Shapes: N instances of a photo or crop, D vector dimension, H x W pixels

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reir.images import rle
from reir.images.boxes import elementwise_iou
from reir.images.decode import decode_image, path_of_uri, read_bytes
from reir.models.interfaces import InstanceEncoder
from reir.query.presence import Calibration
from reir.query.stages import RefineRequest, RefineResult
from reir.records import Box, FloatArray, Instances, MaskRle, RgbImage
from reir.results import Localization, LocalizedBox

CONTEXT = 0.5
"""Margin around a box in a crop, in sides of the box: what touches it stays in the picture."""

LEAST_CROP = 0.2
"""Of the photo's sides that a crop has."""

SAME_IOU = 0.5
"""Overlap with the hit from which on an instance of the crop is the same."""

SECOND_LOOK = 0.5
"""Share of the box in the crop; the rest is that of the first look."""


def photo_at(uri: str) -> RgbImage:
    """Return the pixels of a local photo.

    Raises:
        SourceError: the URI is not local.
        ImageError: it cannot be read.
    """
    return decode_image(read_bytes(path_of_uri(uri)))


class PixelLocalizer:
    """Finds instances on the pixels of photos."""

    def __init__(
        self,
        encoder: InstanceEncoder,
        calibration: Calibration | None = None,
        photo: Callable[[str], RgbImage] = photo_at,
    ) -> None:
        """See with `encoder`; `photo` gives the pixels of a photo by its URI."""
        self._encoder, self._calibration, self._photo = encoder, calibration, photo

    def locate(self, image: RgbImage, expressions: Sequence[str], k: int = 5) -> list[Localization]:
        """Find the best `k` instances of one photo for each expression; without timings.

        Args:
            image: (H, W, 3) uint8, upright.
            expressions: as encoders take them.
            k: most instances.
        """
        (instances,) = self._encoder.encode_images([image])
        height_px, width_px = image.shape[:2]
        vectors = self._encoder.encode_expressions(expressions)
        answers = []
        for expression, vector in zip(expressions, vectors, strict=True):
            boxes, best = self._boxes(instances, vector, k)
            presence = self._presence(best)
            answers.append(
                Localization(
                    expression=expression,
                    width_px=width_px,
                    height_px=height_px,
                    present=bool(boxes) and self._is_there(presence),
                    presence=presence,
                    boxes=boxes,
                )
            )
        return answers

    def refine(self, requests: Sequence[RefineRequest]) -> list[RefineResult]:
        """Look at hits again, each in a crop of its photo.

        Raises:
            ImageError: a photo cannot be read any more.
        """
        views = [_crop(self._photo(each.uri), each.box) for each in requests]
        if not views:
            return []
        seen = self._encoder.encode_images([view.pixels for view in views])
        return [_refined(*each) for each in zip(requests, views, seen, strict=True)]

    def _boxes(
        self, instances: Instances, vector_D: FloatArray, k: int
    ) -> tuple[tuple[LocalizedBox, ...], list[float]]:
        """Return the best instances for a query, and the scores of all, best first."""
        scores = instances.vectors @ vector_D
        order = np.argsort(-scores, kind="stable")
        best = scores[order].tolist()
        calibration = self._calibration
        boxes = tuple(
            LocalizedBox(
                box=_box(instances.boxes[number]),
                score=score,
                presence=None if calibration is None else calibration.of_box(score, best),
                mask=None if instances.masks is None else instances.masks[number],
            )
            for number, score in zip(order[:k].tolist(), best, strict=False)
        )
        return boxes, best

    def _presence(self, best: Sequence[float]) -> float | None:
        if self._calibration is None:
            return None
        return self._calibration.of_photo(best) if best else 0.0

    def _is_there(self, presence: float | None) -> bool:
        """Whether a photo of this presence counts as showing it."""
        if presence is None or self._calibration is None:
            return True
        return presence >= self._calibration.photo_threshold


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
    center, side = (corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]
    half = np.maximum(side * (0.5 + CONTEXT), LEAST_CROP / 2)
    low, high = np.clip(center - half, 0, 1), np.clip(center + half, 0, 1)
    x1, y1 = np.floor(low * (width, height)).astype(int).tolist()
    x2, y2 = np.ceil(high * (width, height)).astype(int).tolist()
    frame = np.array([x1 / width, y1 / height, x2 / width, y2 / height], dtype=np.float32)
    return _View(np.ascontiguousarray(image[y1:y2, x1:x2]), frame, (height, width))


def _refined(request: RefineRequest, view: _View, seen: Instances) -> RefineResult:
    """Move the box towards what the crop shows in its place, if anything."""
    corner, size = np.tile(view.frame[:2], 2), np.tile(view.frame[2:] - view.frame[:2], 2)
    boxes = np.clip(seen.boxes * size + corner, 0, 1)
    first = np.array(request.box, dtype=np.float32)
    iou = elementwise_iou(first, boxes)
    if iou.max(initial=0.0) < SAME_IOU:
        return RefineResult(box=request.box)
    best = int(iou.argmax())
    box = SECOND_LOOK * boxes[best] + (1 - SECOND_LOOK) * first
    mask = None if seen.masks is None else _in_photo(seen.masks[best], view)
    return RefineResult(box=_box(box.astype(np.float32)), mask=mask)


def _in_photo(mask: MaskRle, view: _View) -> MaskRle:
    """Return the mask of a crop as a mask of the whole photo."""
    height, width = view.photo_px
    x1, y1, x2, y2 = (view.frame * (width, height, width, height)).round().astype(int).tolist()
    whole = np.zeros(view.photo_px, dtype=np.bool_)
    whole[y1:y2, x1:x2] = rle.resize_mask(rle.decode(mask), (y2 - y1, x2 - x1))
    return rle.encode(whole)


def _box(corners: FloatArray) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2

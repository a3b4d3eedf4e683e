"""Finds the instances that an expression describes on the pixels of one photo.

`PixelLocalizer.locate` is referring expression comprehension (REC): it encodes a photo, scores its
instances, and compares the first ones with the colors of the expression.

`PixelLocalizer.refine` improves hits of a gallery. A segmenter, if there is one, finds the pixels
of each hit, and a tighter box. Without one, a crop around the box is encoded, in which the instance
is larger, and the box that the crop has at the same place is taken. The box of the hit moves half
of the way to that box. If the encoder computes masks, the mask comes from the crop, too.

Depends on the interface of encoders; not on a store or on Ray.
"""

# Shapes: N instances of a photo or crop, D vector dimension, H x W pixels

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from reir.errors import ImageError
from reir.images import rle
from reir.images.boxes import elementwise_iou
from reir.images.photo_files import photo_at
from reir.images.remembered import remembered
from reir.models.interfaces import (
    InstanceEncoder,
    Segmenter,
    candidate_dims,
)
from reir.query.presence import Calibration, count_words
from reir.query.stages import RefineRequest, RefineResult
from reir.query.verify.photos import PixelVerifier
from reir.query.verify.scores import (
    VERIFIED_INSTANCES,
    RankedInstances,
    by_score,
    rank_instances,
    scores_in_photo,
)
from reir.records import Box, FloatArray, Instances, MaskRle, RgbImage
from reir.results import Localization, LocalizedBox

CONTEXT = 0.5
"""Margin on each side of a box in a crop, as a share of the box's side. It keeps what is next to
the instance in the crop."""

LEAST_CROP = 0.2
"""Smallest side of a crop, as a share of the photo's side."""

SEGMENTED_HITS, ENCODED_HITS = 24, 3
"""Number of first hits to refine with a segmenter, about as many as a person looks at, and without
one, when each of them takes about .2 s on two slow cores."""

SEGMENTING_THREADS = 2
"""Hits that are segmented at the same time: while one photo is decoded, another is segmented."""

MAX_CACHED = 4096
"""Maximum number of refined hits to keep in memory; each takes a few kilobytes."""

SAME_IOU = 0.5
"""Smallest IoU with the hit's box at which an instance of the crop counts as the same instance."""

# Half, because the box of the second look alone is no better than the first one. See
# `benchmarks/localization.py` for the gain of the mean.
SECOND_LOOK = 0.5
"""Weight of the box from the second look; the box of the hit has the rest."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PixelLocalizer:
    """Finds instances on the pixels of photos."""

    def __init__(
        self,
        encoder: InstanceEncoder,
        calibration: Calibration | None = None,
        segmenter: Segmenter | None = None,
        verifier: PixelVerifier | None = None,
        photo: Callable[[str], RgbImage] = photo_at,
    ) -> None:
        """Prepare the localizer.

        Args:
            encoder: encodes photos, crops and expressions.
            calibration: of the encoder's checkpoint; without it, no presence is computed.
            segmenter: finds the pixels of instances.
            verifier: compares colors; without it, colors count only as far as vectors know them.
            photo: returns the pixels of a photo by its URI.
        """
        self._encoder, self._calibration, self._photo = encoder, calibration, photo
        self._segmenter, self._verifier = segmenter, verifier
        self._threads = ThreadPoolExecutor(SEGMENTING_THREADS, "segment")
        # Whoever switches between boxes and masks, or turns a page back, asks for the same hits.
        self._segmented = remembered(self._segment, MAX_CACHED)

    @property
    def max_hits(self) -> int:
        """Number of first hits of an answer that `refine` is meant for."""
        return ENCODED_HITS if self._segmenter is None else SEGMENTED_HITS

    def locate(
        self, image: RgbImage, expressions: Sequence[str], k: int = 5, *, masks: bool = False
    ) -> list[Localization]:
        """Find the best `k` instances of one photo for each expression; without timings.

        Args:
            image: (H, W, 3) uint8, upright.
            expressions: normalized expressions.
            k: maximum number of instances per expression.
            masks: return masks and tighter boxes, if there is a segmenter or a mask branch.
        """
        height_px, width_px = image.shape[:2]
        answers = []
        # Instances do not depend on the expression, so the photo is encoded once for all of them.
        (instances,) = self._encoder.encode_images([image])
        vectors = self._encoder.encode_expressions(expressions)
        for expression, vector in zip(expressions, vectors, strict=True):
            calibration = self._calibration
            background = calibration.background.score(vector) if calibration else 0.0
            ranked = self._ranked(image, expression, instances, vector)
            boxes = self._boxes(instances, ranked, k, background)
            boxes = self._with_masks(image, boxes) if masks else _without_masks(boxes)
            presence = self._presence(ranked, background, count_words(expression))
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

    def refine(self, requests: Sequence[RefineRequest]) -> list[RefineResult | None]:
        """Refine the boxes of hits, each in a crop of its photo; None if it cannot be read.

        Raises:
            ImageError: none of the photos can be read.
        """
        if self._segmenter is not None:
            found = list(self._threads.map(partial(_if_readable, self._segmented), requests))
        else:
            found = self._seen_in_crops(requests)
        errors = [each for each in found if isinstance(each, ImageError)]
        # Not an answer without any result: the stage must not count as one that runs fast.
        if errors and len(errors) == len(found):
            raise errors[0]
        if errors:
            logger.warning(
                "%d of %d hits were not localized, because their photos cannot be read: %s",
                len(errors),
                len(found),
                errors[0],
            )
        return [None if isinstance(each, ImageError) else each for each in found]

    def _seen_in_crops(self, requests: Sequence[RefineRequest]) -> list[RefineResult | ImageError]:
        """Refine hits by the encoder, all crops in one batch."""
        views = [_if_readable(self._view, each) for each in requests]
        pixels = [view.pixels for view in views if isinstance(view, _View)]
        seen = iter(self._encoder.encode_images(pixels) if pixels else ())
        return [
            _refined(request, view, next(seen)) if isinstance(view, _View) else view
            for request, view in zip(requests, views, strict=True)
        ]

    def _view(self, request: RefineRequest) -> _View:
        return _crop(self._photo(request.uri), request.box)

    def _segment(self, request: RefineRequest) -> RefineResult:
        """Refine a hit by the segmenter."""
        assert self._segmenter is not None, "`refine` checks it"
        prompt = np.array([request.box], dtype=np.float32)
        (found,) = self._segmenter.segment(self._photo(request.uri), prompt)
        return RefineResult(box=_between(request.box, found.box), mask=found.mask)

    def _ranked(
        self, image: RgbImage, expression: str, instances: Instances, vector_D: FloatArray
    ) -> RankedInstances | None:
        """Rank the instances of a photo for an expression; None if there are none."""
        if not len(instances):
            return None
        compared = (instances.vectors, vector_D, candidate_dims(self._encoder))
        if self._verifier is None:
            return rank_instances(*compared)
        first = by_score(scores_in_photo(*compared))[:VERIFIED_INSTANCES]
        return rank_instances(
            *compared, self._verifier.read(image, expression, instances.boxes[first])
        )

    def _boxes(
        self, instances: Instances, ranked: RankedInstances | None, k: int, background: float
    ) -> tuple[LocalizedBox, ...]:
        """Return the best `k` instances."""
        if ranked is None:
            return ()
        calibration = self._calibration
        return tuple(
            LocalizedBox(
                box=_box(instances.boxes[number]),
                score=score,
                presence=(
                    None
                    if calibration is None
                    # All scores, not only the first k: the score is compared with those of others.
                    else calibration.of_box(score, ranked.scores, background)
                ),
                mask=None if instances.masks is None else instances.masks[number],
            )
            for number, score in zip(ranked.order[:k].tolist(), ranked.scores, strict=False)
        )

    def _with_masks(
        self, image: RgbImage, boxes: tuple[LocalizedBox, ...]
    ) -> tuple[LocalizedBox, ...]:
        """Give boxes the masks of the segmenter; without one, they keep those of the encoder."""
        if self._segmenter is None or not boxes:
            return boxes
        prompts = np.array([each.box for each in boxes], dtype=np.float32)
        found = self._segmenter.segment(image, prompts)
        return tuple(
            replace(each, box=_between(each.box, segment.box), mask=segment.mask)
            for each, segment in zip(boxes, found, strict=True)
        )

    def _presence(
        self, ranked: RankedInstances | None, background: float, num_words: int
    ) -> float | None:
        if self._calibration is None:
            return None
        if ranked is None:
            return 0.0
        return self._calibration.of_photo(ranked.score, background, num_words, ranked.colors)

    def _is_there(self, presence: float | None) -> bool:
        """Whether a photo with this presence counts as showing the described instance."""
        # Without a calibration nothing can be ruled out, so the best box is offered as the answer.
        if presence is None or self._calibration is None:
            return True
        return presence >= self._calibration.photo_threshold


def _without_masks(boxes: tuple[LocalizedBox, ...]) -> tuple[LocalizedBox, ...]:
    return tuple(replace(each, mask=None) for each in boxes)


@dataclass(frozen=True)
class _View:
    """A crop of a photo.

    Attributes:
        pixels: (h, w, 3) of the crop.
        frame: (4,) xyxy of the crop in [0, 1] of the photo.
        photo_px: (height, width) of the photo.
    """

    pixels: RgbImage
    frame: FloatArray
    photo_px: tuple[int, int]


def _if_readable(work: Callable[[RefineRequest], T], request: RefineRequest) -> T | ImageError:
    """Return what `work` returns, or the error of a photo that cannot be read."""
    try:
        return work(request)
    except ImageError as error:
        return error


def _crop(image: RgbImage, box: Box) -> _View:
    """Cut out a box with its surroundings, as far as the photo goes."""
    height, width = image.shape[:2]
    corners = np.array(box, dtype=np.float64)
    center, side = (corners[:2] + corners[2:]) / 2, corners[2:] - corners[:2]
    half = np.maximum(side * (0.5 + CONTEXT), LEAST_CROP / 2)
    low, high = np.clip(center - half, 0, 1), np.clip(center + half, 0, 1)
    # Rounded outward, so that the crop has at least one pixel even in a tiny photo.
    x1, y1 = np.floor(low * (width, height)).astype(int).tolist()
    x2, y2 = np.ceil(high * (width, height)).astype(int).tolist()
    # The frame of the whole pixels that were cut out, not of the exact margins: boxes in the crop
    # are relative to it, and would be shifted otherwise.
    frame = np.array([x1 / width, y1 / height, x2 / width, y2 / height], dtype=np.float32)
    return _View(np.ascontiguousarray(image[y1:y2, x1:x2]), frame, (height, width))


def _refined(request: RefineRequest, view: _View, seen: Instances) -> RefineResult:
    """Move the box of a hit toward the instance that the crop shows at the same place, if any."""
    corner, size = np.tile(view.frame[:2], 2), np.tile(view.frame[2:] - view.frame[:2], 2)
    boxes = np.clip(seen.boxes * size + corner, 0, 1)
    first = np.array(request.box, dtype=np.float32)
    iou = elementwise_iou(first, boxes)
    # `initial`, because the maximum of no instances is an error in numpy.
    if iou.max(initial=0.0) < SAME_IOU:
        return RefineResult(box=request.box)
    # By overlap, not by score: another instance of the crop may fit the expression as well.
    best = int(iou.argmax())
    mask = None if seen.masks is None else _in_photo(seen.masks[best], view)
    return RefineResult(box=_between(request.box, _box(boxes[best])), mask=mask)


def _between(first: Box, second: Box) -> Box:
    """Return the box between that of the hit and that of the second look."""
    mixed = (1 - SECOND_LOOK) * np.array(first) + SECOND_LOOK * np.array(second)
    return _box(mixed.astype(np.float32))


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

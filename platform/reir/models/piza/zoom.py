"""`ZoomingLocalizer`: finds a small instance by looking at smaller and smaller parts of a photo.

The best box of a look is what the next one sees, cut out of the photo at full resolution. The
history encoder ends the search. The release works on one photo at a time and has no guards; here,
all photos at the same step are looked at together, and a search also ends, with the best that it
has found, when a look shows nothing or when there are too few pixels left to look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from reir.models.interfaces import FoundBoxes
from reir.models.zoom_steps import ZoomSearch, ZoomStep
from reir.records import Box, FloatArray, RgbImage

END_PROBABILITY = 0.95
"""A search ends when this probability that the last box is the target is reached."""
MAX_STEPS = 5
"""Looks of one search."""
LEAST_CROP_PX = 16
"""Side of a part of a photo below which another look at it could show nothing new."""
WHOLE_PHOTO = (0.0, 0.0, 1.0, 1.0)


class ZoomModel(Protocol):
    """What a search needs of a model.

    Attributes:
        digest: identifies the model revision.
    """

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        ...

    def look(
        self,
        crops: Sequence[RgbImage],
        expressions: Sequence[str],
        histories: Sequence[FloatArray],
    ) -> list[FoundBoxes]:
        """Find what each expression describes in a part of a photo.

        Args:
            crops: (h, w, 3) uint8.
            expressions: one for each crop.
            histories: for each crop, the (T, 4) boxes of its search, xyxy in [0, 1] of the photo;
                the first is the whole photo, the last what the crop shows.

        Returns:
            for each crop, boxes in [0, 1] of the crop.
        """
        ...

    def end_probabilities(self, histories: Sequence[FloatArray]) -> list[float]:
        """Return the probability that the last box of each search is its target."""
        ...


class ZoomingLocalizer:
    """Finds what expressions describe by zooming in; as thread-safe as its model.

    It is an `ExpressionLocalizer`, and a `Zoomer`, which also says where it looked.

    Args:
        model: looks at parts of photos.
    """

    def __init__(self, model: ZoomModel) -> None:
        self._model = model

    @property
    def digest(self) -> str:
        """Sha256 of the weights."""
        return self._model.digest

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        """Return the boxes of the last look at each photo; see `ExpressionLocalizer.localize`."""
        return [search.found for search in self._search(images, expressions)]

    def zoom(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[ZoomSearch]:
        """Return the looks at each photo, and the best box; see `Zoomer.zoom`."""
        return [search.result() for search in self._search(images, expressions)]

    def _search(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[_Search]:
        if len(images) != len(expressions):
            raise ValueError(
                f"each photo needs one expression, got {len(images)} and {len(expressions)}"
            )
        searches = [_Search(*each) for each in zip(images, expressions, strict=True)]
        for step in range(MAX_STEPS):
            # The first look is never skipped, not even at a photo of a few pixels.
            looking = [each for each in searches if each.goes_on(first=step == 0)]
            if not looking:
                break
            self._look(looking)
        return searches

    def _look(self, searches: Sequence[_Search]) -> None:
        """Look once at the current part of each photo."""
        found = self._model.look(
            [each.crop() for each in searches],
            [each.expression for each in searches],
            [each.history for each in searches],
        )
        for each, boxes in zip(searches, found, strict=True):
            each.add(boxes)
        ends = self._model.end_probabilities([each.history for each in searches])
        for each, end in zip(searches, ends, strict=True):
            each.end_with(end)


@dataclass
class _Search:
    """A search of one photo.

    Attributes:
        image: (H, W, 3) of the photo.
        expression: what is searched for.
        boxes: of the search so far; the first is the whole photo.
        steps: looks so far.
        found: boxes of the last look that showed anything, in [0, 1] of the photo.
        over: whether the search has ended.
    """

    image: RgbImage
    expression: str
    boxes: list[FloatArray] = field(
        default_factory=lambda: [np.array(WHOLE_PHOTO, dtype=np.float32)]
    )
    steps: list[ZoomStep] = field(default_factory=list)
    found: FoundBoxes = field(
        default_factory=lambda: FoundBoxes(
            np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32)
        )
    )
    over: bool = False

    @property
    def history(self) -> FloatArray:
        """(T, 4) boxes of the search so far."""
        return np.stack(self.boxes)

    def goes_on(self, *, first: bool) -> bool:
        """Whether to look again."""
        x1, y1, x2, y2 = self._frame_px()
        return not self.over and (first or min(x2 - x1, y2 - y1) >= LEAST_CROP_PX)

    def crop(self) -> RgbImage:
        """Return the part of the photo within the last box."""
        if len(self.boxes) == 1:
            # Not a view of it, so that a model sees that several searches look at one photo.
            return self.image
        x1, y1, x2, y2 = self._frame_px()
        return self.image[y1:y2, x1:x2]

    def add(self, seen: FoundBoxes) -> None:
        """Add what a look at the current part showed, in [0, 1] of that part."""
        height, width = self.image.shape[:2]
        # The frame of the pixels that were cut out, not the box, which may end within a pixel.
        frame = np.divide(self._frame_px(), (width, height) * 2, dtype=np.float32)
        low, high = frame[:2], frame[2:]
        inside = np.clip(seen.boxes, 0, 1)
        boxes = inside * np.tile(high - low, 2) + np.tile(low, 2)
        best = boxes[0] if _shows_something(inside, seen.scores) else None
        if best is not None:
            # The sum may be rounded to a little more than 1. In whole pixels, which are rounded
            # outward, such a box would end beyond the photo.
            self.boxes.append(np.minimum(best.astype(np.float32), 1))
            self.found = FoundBoxes(np.minimum(boxes, 1).astype(np.float32), seen.scores)
        self.over = best is None
        self.steps.append(
            ZoomStep(
                frame=_box(frame),
                box=_box(self.boxes[-1] if best is not None else frame),
                score=float(seen.scores[0]) if best is not None else 0.0,
                end=0.0,
            )
        )

    def end_with(self, probability: float) -> None:
        """End the search if the last box is the target with a sufficient probability."""
        if self.over:
            return
        self.steps[-1] = replace(self.steps[-1], end=probability)
        self.over = probability >= END_PROBABILITY

    def result(self) -> ZoomSearch:
        """Return the search; without any instance, its box is the whole photo with a score of 0."""
        best = next((each for each in reversed(self.steps) if each.score > 0), self.steps[0])
        return ZoomSearch(steps=tuple(self.steps), box=best.box, score=best.score)

    def _frame_px(self) -> tuple[int, int, int, int]:
        """Return the last box in whole pixels, rounded outward."""
        height, width = self.image.shape[:2]
        x1, y1, x2, y2 = (self.boxes[-1] * (width, height, width, height)).tolist()
        return int(x1), int(y1), int(np.ceil(x2)), int(np.ceil(y2))


def _shows_something(boxes: FloatArray, scores: FloatArray) -> bool:
    """Whether the best box of a look has a score and an area."""
    if not len(boxes):
        return False
    x1, y1, x2, y2 = boxes[0].tolist()
    return bool(scores[0] > 0 and x2 > x1 and y2 > y1)


def _box(corners: FloatArray) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2

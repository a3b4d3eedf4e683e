"""Decides whether to believe the box that a localizer found for a sentence.

A localizer always finds something. A box is kept if the localizer finds it again in the mirrored
photo, with left and right swapped in the sentence, and if a second localizer finds it too. That a
model should find the same in a mirrored photo is what semi-supervised detection trains on (Jeong et
al. 2019, "Consistency-based Semi-supervised Learning for Object Detection").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from reir.images.boxes import elementwise_iou
from reir.models.interfaces import ExpressionLocalizer
from reir.records import Box, RgbImage
from reir.text import swap_left_right

MIN_IOU = 0.5


class Refusal(StrEnum):
    """Why a sentence got no box."""

    NOTHING_FOUND = "nothing found"
    MIRRORED = "another box in the mirrored photo"
    SECOND = "another box by the second localizer"
    UNREADABLE = "photo cannot be decoded"


@dataclass(frozen=True)
class FoundLabel:
    """The box of a sentence.

    Attributes:
        box: xyxy in [0, 1] of the photo.
        score: the lowest score in [0, 1] that a view gave to its box.
    """

    box: Box
    score: float


@dataclass(frozen=True)
class AgreementFilter:
    """Finds boxes on which all views agree.

    Attributes:
        localizer: finds the boxes.
        second: must find the same boxes; None for no second localizer.
        min_iou: two views agree if their boxes have at least this IoU.
    """

    localizer: ExpressionLocalizer
    second: ExpressionLocalizer | None = None
    min_iou: float = MIN_IOU

    def labels(self, photo: RgbImage, sentences: Sequence[str]) -> list[FoundLabel | Refusal]:
        """Return the box of each sentence about one photo, or why it has none."""
        # Contiguous, because torch does not accept arrays with a negative stride.
        mirrored = np.ascontiguousarray(photo[:, ::-1])
        swapped = [swap_left_right(text) for text in sentences]
        views = zip(
            _best(self.localizer, photo, sentences),
            _best(self.localizer, mirrored, swapped),
            strict=True,
        )
        found = [
            self._agreed(one, other and _mirrored(other), Refusal.MIRRORED) for one, other in views
        ]
        if self.second is None:
            return found
        kept = [row for row, each in enumerate(found) if isinstance(each, FoundLabel)]
        seconds = _best(self.second, photo, [sentences[row] for row in kept])
        for row, second in zip(kept, seconds, strict=True):
            first = found[row]
            assert isinstance(first, FoundLabel)
            found[row] = self._agreed(first, second, Refusal.SECOND)
        return found

    def _agreed(
        self, one: FoundLabel | None, other: FoundLabel | None, otherwise: Refusal
    ) -> FoundLabel | Refusal:
        """Return the first of two boxes with the lower score, or why it is refused."""
        if one is None:
            return Refusal.NOTHING_FOUND
        if other is None or elementwise_iou([one.box], [other.box])[0] < self.min_iou:
            return otherwise
        return FoundLabel(one.box, min(one.score, other.score))


def _best(
    localizer: ExpressionLocalizer, photo: RgbImage, sentences: Sequence[str]
) -> list[FoundLabel | None]:
    """Return the best box of each sentence; None where the localizer finds nothing."""
    # The same array for all sentences, which lets a localizer look at the photo only once.
    found = localizer.localize([photo] * len(sentences), sentences)
    return [
        FoundLabel(_box(each.boxes[0]), float(each.scores[0])) if len(each.boxes) else None
        for each in found
    ]


def _mirrored(label: FoundLabel) -> FoundLabel:
    x1, y1, x2, y2 = label.box
    return FoundLabel((1 - x2, y1, 1 - x1, y2), label.score)


def _box(row: np.ndarray) -> Box:
    x1, y1, x2, y2 = map(float, row)
    return x1, y1, x2, y2

"""Validation during training: SOREC's accuracy on the held-out photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from reir.images.decode import read_image
from reir.metrics.sorec import SorecScores, sorec_scores
from reir.models.interfaces import ExpressionLocalizer
from reir.records import FloatArray
from reir_training.data.examples import TrainPhoto

NUM_BOXES = 10
"""Boxes of each photo that the metric reads."""


def validate_localizer(
    localizer: ExpressionLocalizer, photos: Sequence[TrainPhoto]
) -> dict[str, float]:
    """Search the held-out photos for their expressions.

    Returns:
        macc, acc50 and acc75 in percent; empty without expressions.

    Raises:
        ImageError: a photo cannot be decoded.
    """
    found = [each for photo in photos for each in _found(localizer, photo)]
    if not found:
        return {}
    boxes, targets = (np.stack(each) for each in zip(*found, strict=True))
    return figures(sorec_scores(boxes, targets))


def figures(scores: SorecScores) -> dict[str, float]:
    """Return macc, acc50 and acc75 in percent."""
    values = {
        "macc": scores.mean_accuracy,
        "acc50": scores.hits(1, 0.5),
        "acc75": scores.hits(1, 0.75),
    }
    return {name: round(100 * float(value.mean()), 2) for name, value in values.items()}


def _found(
    localizer: ExpressionLocalizer, photo: TrainPhoto
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Yield the first boxes for each expression, in pixels and filled up with NaN, and its box."""
    if not photo.expressions:
        return
    image, scale = read_image(photo.path), np.tile(photo.size_px, 2)
    said = photo.expressions
    all_boxes = localizer.localize([image] * len(said), [each.text for each in said])
    for each, boxes in zip(said, all_boxes, strict=True):
        filled = np.full((NUM_BOXES, 4), np.nan)
        num = min(len(boxes.boxes), NUM_BOXES)
        filled[:num] = boxes.boxes[:num] * scale
        yield filled, photo.boxes[each.box] * scale

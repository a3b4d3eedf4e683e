"""Referring expression comprehension: whether the top box in the given photo is right."""

# Shapes: M queries, T IoU thresholds

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reir.images.boxes import elementwise_iou

IOU_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
EPSILON = 1e-6  # added to both areas by the published evaluators


@dataclass(frozen=True)
class RecHits:
    """Whether the top box of each of M queries is right.

    Attributes:
        iou: (M,) IoU of the top box with the true box; 0 if the photo has no box.
        hits: (M, T) whether the IoU is **above** each threshold, whereas BR@K requires only that it
            reaches the threshold.
        iou_thresholds: the T thresholds.
    """

    iou: npt.NDArray[np.float64]
    hits: npt.NDArray[np.bool_]
    iou_thresholds: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of queries M."""
        return len(self.hits)


def rec_hits(
    top_boxes_px: npt.ArrayLike,
    target_boxes_px: npt.ArrayLike,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> RecHits:
    """Compare the top box of each query with its true box.

    Args:
        top_boxes_px: (M, 4) xyxy in pixels; a row of NaN if the photo has no box, which is a miss.
        target_boxes_px: (M, 4) xyxy in pixels.
        iou_thresholds: IoUs that a hit must exceed.

    Raises:
        ValueError: the shapes differ or a target is not finite.
    """
    top = np.asarray(top_boxes_px, dtype=np.float64).reshape(-1, 4)
    target = np.asarray(target_boxes_px, dtype=np.float64).reshape(-1, 4)
    if top.shape != target.shape:
        raise ValueError(f"top boxes have shape {top.shape}, target boxes {target.shape}")
    if not np.isfinite(target).all():
        raise ValueError("target_boxes_px must be finite, got NaN or infinity")
    answered = np.isfinite(top).all(axis=1)
    iou = np.zeros(len(top))
    iou[answered] = elementwise_iou(top[answered], target[answered], epsilon=EPSILON)
    thresholds = tuple(float(value) for value in iou_thresholds)
    return RecHits(iou, iou[:, None] > np.array(thresholds), thresholds)

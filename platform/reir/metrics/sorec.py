"""SOREC's accuracy: how well the first boxes of a given photo fit the described instance.

A box fits if its IoU **reaches** the threshold, as in the released evaluator of SOREC; in
`reir.metrics.rec`, as in the evaluators of RefCOCO, it has to exceed it.
"""

# Shapes: M queries, N ranked boxes, K values of `TOP_KS`

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reir.images.boxes import elementwise_iou
from reir.metrics.reir import Bools, Floats

TOP_KS = (1, 5, 10)
# Quotients, because sums of steps of .05 differ from .15 and from some others in the last bit.
IOU_THRESHOLDS = tuple(step / 20 for step in range(1, 20))
MEAN_THRESHOLDS = IOU_THRESHOLDS[9:]
"""The ten thresholds of mAcc, from .5 to .95."""
IOU_OF_PRECISION = 0.5


@dataclass(frozen=True)
class SorecScores:
    """How well the first boxes of M queries fit.

    Attributes:
        best_iou: (M, K) highest IoU among the first 1, 5 and 10 boxes; 0 if there are none.
    """

    best_iou: Floats

    def __len__(self) -> int:
        """Return the number of queries M."""
        return len(self.best_iou)

    def hits(self, k: int, iou_threshold: float) -> Bools:
        """(M,) whether one of the first k boxes reaches an IoU; k is one of `TOP_KS`."""
        if k not in TOP_KS:
            raise ValueError(f"k must be one of {TOP_KS}, got {k}")
        return np.asarray(self.best_iou[:, TOP_KS.index(k)] >= iou_threshold)

    @property
    def mean_accuracy(self) -> Floats:
        """(M,) share of `MEAN_THRESHOLDS` that the first box reaches; its mean is mAcc."""
        return _mean([self.hits(1, iou) for iou in MEAN_THRESHOLDS])

    @property
    def mean_precision(self) -> Floats:
        """(M,) share of `TOP_KS` with a hit at IoU .5; the release calls it `mean_precision`."""
        return _mean([self.hits(k, IOU_OF_PRECISION) for k in TOP_KS])


def sorec_scores(ranked_boxes_px: npt.ArrayLike, target_boxes_px: npt.ArrayLike) -> SorecScores:
    """Compare the boxes of each query, best first, with its true box.

    Args:
        ranked_boxes_px: (M, N, 4) xyxy in pixels; rows of NaN where a photo has fewer boxes.
        target_boxes_px: (M, 4) xyxy in pixels.

    Raises:
        ValueError: a shape is wrong or a target is not finite.
    """
    ranked = np.asarray(ranked_boxes_px, dtype=np.float64)
    target = np.asarray(target_boxes_px, dtype=np.float64)
    if target.ndim != 2 or target.shape[1] != 4:
        raise ValueError(f"target_boxes_px must have shape (M, 4), got {target.shape}")
    if ranked.ndim != 3 or (len(ranked), ranked.shape[2]) != target.shape:
        raise ValueError(
            f"ranked_boxes_px must have shape ({len(target)}, N, 4), got {ranked.shape}"
        )
    if not np.isfinite(target).all():
        raise ValueError("target_boxes_px must be finite, got NaN or infinity")
    present = np.isfinite(ranked).all(axis=2)
    iou = np.where(present, elementwise_iou(np.nan_to_num(ranked), target[:, None]), 0.0)
    return SorecScores(np.stack([iou[:, :k].max(axis=1, initial=0.0) for k in TOP_KS], axis=1))


def _mean(columns: Sequence[Bools]) -> Floats:
    """Return the (M,) mean of columns with M values each."""
    return np.asarray(np.mean(columns, axis=0), dtype=np.float64)

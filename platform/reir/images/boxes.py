"""Area and overlap of boxes as numpy arrays.

Boxes are xyxy, in pixels or normalized to [0, 1]. A box from 10 to 12 is 2 wide: both coordinates
are edges, not pixels that the box includes.
"""

# Shapes: N and M boxes, "..." any leading axes

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating[Any]]


def area(boxes: npt.ArrayLike) -> Values:
    """(...) areas; a box with a negative side has area 0."""
    x1, y1, x2, y2 = _columns(boxes)
    values: Values = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
    return values


def elementwise_iou(a: npt.ArrayLike, b: npt.ArrayLike, *, epsilon: float = 0.0) -> Values:
    """(...) intersection over union of boxes at equal positions; shapes broadcast.

    Args:
        a, b: (..., 4); two boxes without area have IoU 0.
        epsilon: added to the areas of intersection and union, as some published metrics do.
    """
    ax1, ay1, ax2, ay2 = _columns(a)
    bx1, by1, bx2, by2 = _columns(b)
    width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0)
    height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0)
    intersection = width * height
    union = area(a) + area(b) - intersection
    if epsilon:
        intersection, union = intersection + epsilon, union + epsilon
    iou: Values = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def pairwise_iou(a: npt.ArrayLike, b: npt.ArrayLike) -> Values:
    """(N, M) intersection over union of every box of (N, 4) with every box of (M, 4)."""
    rows, columns = np.stack(_columns(a), axis=-1), np.stack(_columns(b), axis=-1)
    return elementwise_iou(rows[:, None], columns[None, :])


def _columns(boxes: npt.ArrayLike) -> tuple[Values, Values, Values, Values]:
    """Return the four columns of (..., 4) boxes as floats; float32 and float64 are kept."""
    array = np.asarray(boxes)
    if array.size == 0 and array.ndim == 1:  # an empty list
        array = array.reshape(0, 4)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes must have shape (..., 4), got {array.shape}")
    # Areas in integers could overflow, and float16 cannot represent every pixel of a large photo.
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    return array[..., 0], array[..., 1], array[..., 2], array[..., 3]

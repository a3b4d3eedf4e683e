"""Box geometry on numpy arrays: forms, frames, overlap, suppression.

Boxes are xyxy unless a name says otherwise. Nothing here cares whether they are pixels or
normalised, except where a function takes the size of the photo. An edge has no width: a box from
10 to 12 is 2 wide.
"""

# Shapes: N and M boxes, "..." any leading axes

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.floating[Any]]
Values = npt.NDArray[np.floating[Any]]


def xywh_to_xyxy(boxes: npt.ArrayLike) -> Boxes:
    """(..., 4) left, top, width, height -> left, top, right, bottom."""
    x, y, w, h = _columns(boxes)
    return np.stack([x, y, x + w, y + h], axis=-1)


def xyxy_to_xywh(boxes: npt.ArrayLike) -> Boxes:
    """(..., 4) left, top, right, bottom -> left, top, width, height."""
    x1, y1, x2, y2 = _columns(boxes)
    return np.stack([x1, y1, x2 - x1, y2 - y1], axis=-1)


def xyxy_to_cxcywh(boxes: npt.ArrayLike) -> Boxes:
    """(..., 4) left, top, right, bottom -> centre x, centre y, width, height."""
    x1, y1, x2, y2 = _columns(boxes)
    return np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=-1)


def cxcywh_to_xyxy(boxes: npt.ArrayLike) -> Boxes:
    """(..., 4) centre x, centre y, width, height -> left, top, right, bottom."""
    x, y, w, h = _columns(boxes)
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=-1)


def to_pixels(boxes: npt.ArrayLike, width_px: float, height_px: float) -> Boxes:
    """(..., 4) normalised boxes -> pixels of a photo of that size."""
    return np.stack(_columns(boxes), axis=-1) * _scale(width_px, height_px)


def to_normalised(boxes_px: npt.ArrayLike, width_px: float, height_px: float) -> Boxes:
    """(..., 4) boxes in pixels of a photo of that size -> normalised; inverse of `to_pixels`."""
    return np.stack(_columns(boxes_px), axis=-1) / _scale(width_px, height_px)


def clip(boxes: npt.ArrayLike, width: float = 1.0, height: float = 1.0) -> Boxes:
    """(..., 4) boxes moved into [0, width] x [0, height]; the default frame is normalised."""
    x1, y1, x2, y2 = _columns(boxes)
    xs = np.clip([x1, x2], 0, width)
    ys = np.clip([y1, y2], 0, height)
    return np.stack([xs[0], ys[0], xs[1], ys[1]], axis=-1)


def area(boxes: npt.ArrayLike) -> Values:
    """(...) areas; a box with a negative side has area 0."""
    x1, y1, x2, y2 = _columns(boxes)
    values: Values = np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
    return values


def elementwise_iou(a: npt.ArrayLike, b: npt.ArrayLike, epsilon: float = 0.0) -> Values:
    """(...) intersection over union of boxes at equal positions; shapes broadcast.

    `epsilon` is added to both areas, as some published metrics do; without it, two boxes that
    cover nothing have IoU 0.
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


def nms(
    boxes: npt.ArrayLike,
    scores: npt.ArrayLike,
    iou_threshold: float,
    max_kept: int | None = None,
) -> npt.NDArray[np.intp]:
    """Class-agnostic greedy non-maximum suppression.

    Args:
        boxes: (N, 4).
        scores: (N,); of equal scores the lower index goes first.
        iou_threshold: a box is dropped when its IoU with a kept one is larger than this.
        max_kept: stop after so many boxes; None keeps all that survive.

    Returns:
        (K,) kept indices, best first.

    Raises:
        ValueError: lengths differ, or the threshold is outside [0, 1].
    """
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")
    frame = np.stack(_columns(boxes), axis=-1)
    values = np.asarray(scores)
    if values.shape != frame.shape[:1]:
        raise ValueError(f"scores must have shape {frame.shape[:1]} like boxes, got {values.shape}")
    waiting = np.argsort(-values, kind="stable")
    kept: list[int] = []
    while waiting.size and (max_kept is None or len(kept) < max_kept):
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        waiting = waiting[elementwise_iou(frame[best], frame[waiting]) <= iou_threshold]
    return np.array(kept, dtype=np.intp)


def _columns(boxes: npt.ArrayLike) -> tuple[Values, Values, Values, Values]:
    """The four columns of (..., 4) boxes, floating; float32 and float64 are kept."""
    array = np.asarray(boxes)
    if array.size == 0 and array.ndim == 1:
        array = array.reshape(0, 4)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes must have shape (..., 4), got {array.shape}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    return array[..., 0], array[..., 1], array[..., 2], array[..., 3]


def _scale(width_px: float, height_px: float) -> npt.NDArray[np.float32]:
    if width_px <= 0 or height_px <= 0:
        raise ValueError(f"a photo must be at least 1 x 1 px, got {width_px} x {height_px}")
    return np.array([width_px, height_px, width_px, height_px], dtype=np.float32)

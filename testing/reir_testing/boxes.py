"""Functions on boxes that only tests and benchmarks need: a simple NMS, and true boxes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reir.datasets import Expression, ReferringDataset
from reir.images.boxes import elementwise_iou


def nms(
    boxes: npt.NDArray[np.floating], scores: npt.NDArray[np.floating], max_iou: float, num_keep: int
) -> npt.NDArray[np.intp]:
    """Class-agnostic greedy non-maximum suppression, the reference for the batched versions.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,) scores; of equal scores, the lower index goes first.
        max_iou: a box is dropped if its IoU with a kept box is larger than this.
        num_keep: maximum number of kept boxes.

    Returns:
        (K,) kept indices, best first.
    """
    # A stable sort gives ties to the lower index.
    remaining = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while remaining.size and len(kept) < num_keep:
        best, remaining = remaining[0], remaining[1:]
        kept.append(int(best))
        remaining = remaining[elementwise_iou(boxes[best], boxes[remaining]) <= max_iou]
    return np.array(kept, dtype=np.intp)


def target_box(
    dataset: ReferringDataset, expression: Expression
) -> tuple[float, float, float, float]:
    """Return the box of the instance that an expression describes: xyxy in [0, 1] of its photo.

    Raises:
        ValueError: the expression describes no instance of its photo.
    """
    if expression.instance_id is None:
        raise ValueError(f"expression {expression.expression_id!r} has no instance")
    image = dataset.images_by_id[expression.image_id]
    x1, y1, x2, y2 = dataset.instances_by_id[expression.instance_id].box_xyxy_px
    width, height = image.width_px, image.height_px
    return x1 / width, y1 / height, x2 / width, y2 / height

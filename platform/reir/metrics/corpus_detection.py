"""Average precision over a corpus: an expression is scored as a class of a detector would be.

The detections of an expression are the best instances of the whole gallery; its targets are the
true instances. pycocotools computes COCO's AP of this one class, so a detection in a photo without
targets is a false positive.
"""

# Shapes: N detections or targets of one expression

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from reir.images import rle
from reir.images.boxes import pairwise_iou
from reir.metrics.reir import Floats, Ints
from reir.records import MaskRle


@dataclass(frozen=True)
class Regions:
    """N boxes or masks in photos of a gallery.

    Attributes:
        images: (N,) integers, the photo of each.
        boxes_px: (N, 4) xyxy in pixels of that photo.
        masks: N masks, which are compared instead of the boxes; None to compare boxes. All masks of
            a photo must have the same size.
    """

    images: Ints
    boxes_px: Floats
    masks: Sequence[MaskRle] | None = None

    def iou(self, other: Regions) -> Floats:
        """(N, M) IoU with every region of the same photo; of masks if both have any."""
        if self.masks is not None and other.masks is not None:
            return rle.pairwise_iou(self.masks, other.masks)
        return np.asarray(pairwise_iou(self.boxes_px, other.boxes_px), dtype=np.float64)


def average_precision(
    found: Regions, scores: npt.NDArray[np.floating[Any]], true: Regions
) -> tuple[float, float]:
    """Return COCO's AP (IoU .5 to .95) and AP50 of one expression, both in [0, 1].

    Args:
        found: detections.
        scores: (N,) their scores; of equal ones, the photo with the lower number goes first.
        true: targets, at least one; both have masks, or neither has.

    Raises:
        ValueError: there are no targets.
    """
    if not len(true.images):
        raise ValueError("average precision needs at least one target")
    if not len(found.images):
        return 0.0, 0.0
    with redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        truth, detected = _coco(true, np.zeros(len(true.images))), _coco(found, scores)
        evaluation = COCOeval(truth, detected, "segm" if true.masks else "bbox")
        evaluation.params.imgIds = sorted({*true.images.tolist(), *found.images.tolist()})
        # The defaults would keep at most 100 detections of a photo, and evaluate by size as well.
        evaluation.params.maxDets = [len(found.images)]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # IoU thresholds, recall thresholds, and one each: class, area, number of detections
    precision = evaluation.eval["precision"][:, :, 0, 0, 0]
    return float(precision.mean()), float(precision[0].mean())


def _coco(regions: Regions, scores: npt.NDArray[np.floating[Any]]) -> Any:
    coco = COCO()
    images = set(regions.images.tolist())
    coco.dataset = {
        # Sizes are only needed for polygons.
        "images": [{"id": image, "width": 0, "height": 0} for image in images],
        "annotations": [
            _annotation(regions, row, float(scores[row])) for row in range(len(scores))
        ],
        "categories": [{"id": 1}],
    }
    coco.createIndex()
    return coco


def _annotation(regions: Regions, row: int, score: float) -> dict[str, Any]:
    x1, y1, x2, y2 = regions.boxes_px[row].tolist()
    shared = {
        # From 1: pycocotools takes a match with the id 0 for no match.
        "id": row + 1,
        "image_id": int(regions.images[row]),
        "category_id": 1,
        "iscrowd": 0,
        "score": score,
    }
    if regions.masks is None:
        return shared | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    mask = regions.masks[row]
    runs = {"size": list(mask.size), "counts": mask.counts}
    return shared | {"segmentation": runs, "area": rle.area_px(mask)}

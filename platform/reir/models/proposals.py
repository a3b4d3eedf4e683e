"""Candidates: the instances that a detector proposes for a photo, and how they are selected."""

# Shapes: B images, A anchors of the detector, C features, K classes, N candidates of one image

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Number of boxes that enter NMS. Boxes of lower rank would not be among the first few hundred
# after it.
NMS_POOL = 1000
# Relative to the photo; thinner boxes are remains of clipping.
MIN_SIDE = 1 / 416


class DetectorOutput(NamedTuple):
    """The output of a detector for a batch, before any selection.

    Attributes:
        boxes: (B, A, 4) float32, xyxy relative to the sides of the image, unclipped.
        class_scores: (B, A, K) float32 in [0, 1].
        features: (B, A, C) features from which the class scores are computed.
    """

    boxes: Tensor
    class_scores: Tensor
    features: Tensor


@dataclass(frozen=True)
class Candidates:
    """The instances proposed for one image, best first; N may be 0.

    Attributes:
        boxes: (N, 4) float32, xyxy in [0, 1] of the upright image.
        class_scores: (N, K) float32.
        features: (N, C).
    """

    boxes: Tensor
    class_scores: Tensor
    features: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.boxes)

    @property
    def scores(self) -> Tensor:
        """(N,) best class score: the query-free ranking."""
        return self.class_scores.amax(dim=1)


def select_candidates(
    output: DetectorOutput, num_candidates: int, *, nms_iou: float
) -> list[Candidates]:
    """Choose the best instances of each image, without any query.

    Boxes are clipped to the image, and very thin boxes and boxes with score 0 are dropped. Then
    class-agnostic NMS keeps the best of boxes that overlap by more than `nms_iou`. Equal scores
    keep the order of the anchors.

    Args:
        output: of a detector, B images.
        num_candidates: maximum number per image; an image may have fewer, or none.
        nms_iou: IoU above which the box with the lower score is dropped.

    Returns:
        The candidates of the B images.

    Raises:
        ValueError: num_candidates is below 1.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    boxes = output.boxes.clamp(0, 1)
    # NaN is not larger than anything, so a box with NaN is dropped, too.
    usable = ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(dim=2)
    scores = torch.where(usable, output.class_scores.amax(dim=2), 0.0)
    # Stable, so that anchors with equal scores are chosen in the same order on every machine.
    pool_scores, pool = scores.sort(dim=1, descending=True, stable=True)
    pool_scores, pool = pool_scores[:, :NMS_POOL], pool[:, :NMS_POOL]
    pool_boxes = boxes.gather(1, pool[..., None].expand(-1, -1, 4))
    picks, counts = greedy_nms(pool_boxes, pool_scores, num_candidates, nms_iou)
    found = []
    for i, count in enumerate(counts.tolist()):
        anchors = pool[i, picks[i, :count]]
        found.append(
            Candidates(
                boxes[i, anchors], output.class_scores[i, anchors], output.features[i, anchors]
            )
        )
    return found


def greedy_nms(
    boxes: Tensor, scores: Tensor, num_keep: int, max_iou: float
) -> tuple[Tensor, Tensor]:
    """Class-agnostic greedy non-maximum suppression of a whole batch at once.

    Each round keeps one box of every image, so the cost grows with the number of boxes kept and not
    with the square of the number of boxes. There is no data-dependent control flow, so a GPU never
    waits for the CPU.

    Args:
        boxes: (B, M, 4) xyxy, best first.
        scores: (B, M), descending; rows with score 0 are never kept.
        num_keep: number of rounds.
        max_iou: a box is dropped if its IoU with a kept box is larger than this.

    Returns:
        (B, num_keep) int64 rows to keep, in order, and (B,) how many of them are valid.
    """
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    alive = scores > 0
    picks, kept = [], []
    for _ in range(min(num_keep, scores.shape[1])):
        # Rows are sorted, so the first one that is left is the best; `argmax` takes no booleans.
        first = alive.byte().argmax(dim=1, keepdim=True)
        picks.append(first)
        kept.append(alive.gather(1, first))
        box = boxes.gather(1, first[..., None].expand(-1, -1, 4))
        sides = torch.minimum(boxes[..., 2:], box[..., 2:]) - torch.maximum(
            boxes[..., :2], box[..., :2]
        )
        overlap = sides.clamp_(min=0).prod(dim=2)
        union = area + area.gather(1, first) - overlap
        # Multiplied instead of divided, because two boxes without area have a union of 0.
        alive = (alive & (overlap <= max_iou * union)).scatter(1, first, False)
    return torch.cat(picks, dim=1), torch.cat(kept, dim=1).sum(dim=1)

"""Matching of queries to targets: simOTA for the decoder, Hungarian for the encoder's proposals.

See docs/clare.md, section 4.1. Targets of a batch are padded to one length, so that all photos and
all layers are matched by the same few tensor operations; no gradient flows. Knows no model.
"""

# Shapes: B photos, N queries, A proposals, G targets per photo (padded), C texts per photo (padded)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from reir.losses import center_size, generalized_iou, pairwise_iou

# All costs are those of the released code (docs/clare.md, section 4.1).
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
CENTER_RADIUS = 2.5 / 32
NUM_OVERLAPS = 10
OTA_GIOU, OTA_NOT_BOTH, OTA_NEITHER = 3.0, 100.0, 10_000.0
HUNGARIAN_CLASS, HUNGARIAN_L1, HUNGARIAN_GIOU = 2.0, 5.0, 2.0
FIRST_TRIED = 1024
"""Number of proposals per target whose GIoU is computed first; quadrupled if too few."""
WORST_COST = 1e6
"""Replaces a cost that is NaN; higher than any other cost."""


@dataclass(frozen=True)
class Targets:
    """The instances that the queries should find in B photos.

    In detection, the texts are the C = 80 class names, and each instance has one. In grounding,
    they are C expressions of the photo, each of which describes one instance. Several expressions
    may describe the same instance, which is still one target.

    Attributes:
        boxes_xyxy: (B, G, 4) in [0, 1]; zeros on padding.
        texts: (B, G, C) bool, whether the text describes the instance; False on padding.
        valid: (B, G) bool, False on padding.
        text_valid: (B, C) bool, False on padding.

    Raises:
        ValueError: the shapes do not fit one another.
    """

    boxes_xyxy: Tensor
    texts: Tensor
    valid: Tensor
    text_valid: Tensor

    def __post_init__(self) -> None:
        """Check that the four tensors have the same B, G and C."""
        batch, targets, texts = self.texts.shape
        for name, want in (
            ("boxes_xyxy", (batch, targets, 4)),
            ("valid", (batch, targets)),
            ("text_valid", (batch, texts)),
        ):
            got = tuple(getattr(self, name).shape)
            if got != want:
                raise ValueError(
                    f"{name} must have shape {want} to fit texts of shape "
                    f"{tuple(self.texts.shape)}, got {got}"
                )

    def class_agnostic(self) -> Targets:
        """Return the same boxes with a single text that describes all of them."""
        one = self.valid.new_ones(len(self.valid), 1)
        return Targets(self.boxes_xyxy, self.valid[..., None], self.valid, one)


def focal_cost(logits: Tensor) -> Tensor:
    """Return the cost of labeling a pair as positive: its focal loss as a positive minus that as a
    negative.

    The logarithms have a minimum argument of 1e-8, so the cost is bounded. Otherwise, extreme
    scores would outweigh the boxes.
    """
    p = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - p).pow(FOCAL_GAMMA) * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p.pow(FOCAL_GAMMA) * -(1 - p + 1e-8).log()
    return positive - negative


def simota_cost(logits: Tensor, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
    """Return the (..., B, G, N) cost of each pair of target and query; infinite for padding.

    Args:
        logits: (..., B, N, C), with any leading axes (such as layers).
        boxes_xyxy: (..., B, N, 4).
        targets: targets of the B photos. If several texts describe one, their costs are averaged.
    """
    share_BGC = targets.texts / targets.texts.sum(-1, keepdim=True).clamp(min=1)
    by_class = share_BGC.to(logits.dtype) @ focal_cost(logits).transpose(-1, -2)
    boxes_BG4 = targets.boxes_xyxy.to(boxes_xyxy.dtype)
    giou = generalized_iou(boxes_BG4[:, :, None], boxes_xyxy[..., None, :, :])
    in_box, in_region = _center_within(boxes_xyxy, boxes_BG4)
    somewhere = ((in_box | in_region) & targets.valid[..., None]).any(-2, keepdim=True)
    cost = by_class - OTA_GIOU * giou + OTA_NOT_BOTH * ~(in_box & in_region)
    cost = cost + OTA_NEITHER * ~somewhere
    return cost.nan_to_num(nan=WORST_COST).masked_fill(~targets.valid[..., None], torch.inf)


def _center_within(boxes_xyxy: Tensor, targets_BG4: Tensor) -> tuple[Tensor, Tensor]:
    """Return two (..., B, G, N) bool: query center in the target's box, and near its center."""
    center = center_size(boxes_xyxy)[..., None, :, :2]
    box = targets_BG4[:, :, None]
    in_box = ((center > box[..., :2]) & (center < box[..., 2:])).all(-1)
    middle = center_size(box)[..., :2]
    in_region = (center > middle - CENTER_RADIUS) & (center < middle + CENTER_RADIUS)
    return in_box, in_region.all(-1)


@torch.no_grad()
def simota(logits: Tensor, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
    """Assign one to ten queries to every target, per photo and layer (docs/clare.md, section 4.1).

    A target takes its k cheapest queries, where k is the sum of its ten largest IoUs. A query that
    several targets take goes to the target with the lowest cost. Then each target without a query
    gets one, in order of cost: a free query or, if there is none, a query of a target that has
    several. So if there are at least as many queries as targets, every target has a query. Ties go
    to the lower index.

    Args:
        logits: (..., B, N, C) score of each query for each text of its photo.
        boxes_xyxy: (..., B, N, 4) boxes of the queries, in [0, 1].
        targets: targets of the B photos.

    Returns:
        (..., B, N) int64, the index of the query's target in its photo, or -1.
    """
    shape, num_targets = boxes_xyxy.shape[:-1], targets.valid.shape[1]
    if not num_targets or not shape[-1]:
        return torch.full(shape, -1, dtype=torch.long, device=boxes_xyxy.device)
    # In bf16, many costs would be equal and the ties would decide the matching.
    with torch.autocast(boxes_xyxy.device.type, enabled=False):
        logits, boxes_xyxy = full_precision(logits), full_precision(boxes_xyxy)
        cost = simota_cost(logits, boxes_xyxy, targets)
        overlap = pairwise_iou(targets.boxes_xyxy.to(boxes_xyxy.dtype), boxes_xyxy)
        assigned = _dynamic_k(cost, overlap, targets.valid)
        return _serve_orphans(cost, assigned, targets.valid)


def _dynamic_k(cost: Tensor, overlap: Tensor, valid_BG: Tensor) -> Tensor:
    """Let each target take its k cheapest queries; (..., B, G, N) -> (..., B, N) targets, or -1."""
    most = min(NUM_OVERLAPS, cost.shape[-1])
    num_taken = overlap.topk(most, dim=-1).values.sum(-1).floor().clamp(min=1)
    # A stable sort, because `topk` would not give ties to the lower index.
    chosen = cost.sort(dim=-1, stable=True).indices[..., :most]
    within = torch.arange(most, device=cost.device) < num_taken[..., None]
    taken = torch.zeros_like(cost, dtype=torch.bool)
    taken = taken.scatter(-1, chosen, within & valid_BG[..., None])
    claims = taken.sum(-2)
    # As in the released code, a contested query goes to the target with the lowest cost of all,
    # even if that target did not take it. (`argmax` does not accept bool tensors.)
    owner = torch.where(claims > 1, cost.argmin(-2), taken.to(torch.uint8).argmax(-2))
    return owner.masked_fill(claims == 0, -1)


def _serve_orphans(cost: Tensor, assigned: Tensor, valid_BG: Tensor) -> Tensor:
    """Give each target without a query one: in each round, one target per photo and layer.

    The released code leaves such targets without a query (docs/clare.md, section 9.2).
    """
    num_targets, num_queries = cost.shape[-2:]
    index_G1 = torch.arange(num_targets, device=cost.device)[:, None]
    while True:  # ends, because no target loses its last query and so each round has fewer orphans
        num_owned = (assigned[..., None, :] == index_G1).sum(-1)
        free = assigned < 0
        spare = num_owned.gather(-1, assigned.clamp(min=0)) > 1
        allowed = torch.where(free.any(-1, keepdim=True), free, spare)
        orphan = valid_BG & (num_owned == 0)
        price = cost.masked_fill(~(orphan[..., None] & allowed[..., None, :]), torch.inf)
        pair = price.flatten(-2).argmin(-1, keepdim=True)
        served = price.flatten(-2).gather(-1, pair) < torch.inf
        if not served.any():
            return assigned
        query, target = pair % num_queries, pair // num_queries
        kept = assigned.gather(-1, query)
        assigned = assigned.scatter(-1, query, torch.where(served, target, kept))


def cheapest_proposals(
    logits_BA: Tensor, boxes_xyxy: Tensor, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Find the k proposals with the lowest matching cost for each target.

    The cost is `2 * class + 5 * L1 - 2 * GIoU`. A photo has tens of thousands of proposals, and
    GIoU has many intermediate values per pair, so it is computed only for the candidates that are
    cheapest without it. GIoU lowers a cost by at most 2. So the candidates include the k cheapest
    proposals if the k-th of their full costs is at least 2 below the highest of their costs
    without GIoU; otherwise, four times as many candidates are tried.

    Returns:
        (B, G, k) costs in ascending order, and (B, G, k) the index of each proposal. k is the
        smaller of G and A.
    """
    boxes_BG4 = targets.boxes_xyxy.to(boxes_xyxy.dtype)
    l1 = torch.cdist(center_size(boxes_BG4), center_size(boxes_xyxy), p=1)
    without_giou = HUNGARIAN_CLASS * focal_cost(logits_BA)[:, None] + HUNGARIAN_L1 * l1
    # If a step diverges, the trainer must see a loss that is not finite, not an exception here.
    without_giou = without_giou.nan_to_num(nan=WORST_COST)
    num_kept, num_proposals = min(without_giou.shape[1:]), without_giou.shape[2]
    num_tried = min(max(FIRST_TRIED, num_kept), num_proposals)
    while True:
        partial_cost, where = without_giou.topk(num_tried, largest=False)
        tried = boxes_xyxy[:, None].expand(-1, len(partial_cost[0]), -1, -1)
        tried = tried.gather(2, where[..., None].expand(-1, -1, -1, 4))
        cost = partial_cost - HUNGARIAN_GIOU * generalized_iou(boxes_BG4[:, :, None], tried)
        cost, place = cost.nan_to_num(nan=WORST_COST).topk(num_kept, largest=False)
        if num_tried == num_proposals or _all_found(cost, partial_cost, targets.valid):
            return cost, where.gather(-1, place)
        num_tried = min(4 * num_tried, num_proposals)


def _all_found(cost_BGk: Tensor, partial_BGS: Tensor, valid_BG: Tensor) -> bool:
    """Return whether every proposal that was not tried costs at least as much as those found."""
    bound_BG = partial_BGS[..., -1] - HUNGARIAN_GIOU
    return bool(((cost_BGk[..., -1] <= bound_BG) | ~valid_BG).all())


@torch.no_grad()
def hungarian(logits_BA: Tensor, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
    """Assign one encoder proposal to each target, at the lowest total cost.

    See docs/clare.md, section 4.1. If several assignments are optimal, scipy chooses one of them.

    Args:
        logits_BA: class-agnostic score of each proposal.
        boxes_xyxy: (B, A, 4) in [0, 1].
        targets: targets of the B photos; some get no proposal if there are too few.

    Returns:
        (B, A) int64, the index of the proposal's target in its photo, or -1.
    """
    with torch.autocast(boxes_xyxy.device.type, enabled=False):
        # With G targets, some optimal assignment gives each target one of its G cheapest proposals,
        # since the other targets occupy at most G - 1 of them. So only these leave the device.
        cheapest, where = cheapest_proposals(
            full_precision(logits_BA), full_precision(boxes_xyxy), targets
        )
    # scipy solves one photo at a time, on the host, so everything is copied at once.
    assigned = np.full(logits_BA.shape, -1, dtype=np.int64)
    host = (x.cpu().numpy() for x in (cheapest, where, targets.valid))
    for row, cost_GK, where_GK, valid_G in zip(assigned, *host, strict=True):
        real = np.flatnonzero(valid_G)
        proposals, column = np.unique(where_GK[real], return_inverse=True)
        few = np.full((len(real), len(proposals)), np.inf)
        np.put_along_axis(few, column.reshape(cost_GK[real].shape), cost_GK[real], axis=1)
        target, proposal = linear_sum_assignment(few)
        row[proposals[proposal]] = real[target]
    return torch.from_numpy(assigned).to(boxes_xyxy.device)


def full_precision(values: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values

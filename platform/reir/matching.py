"""Which query learns which target: simOTA for the decoder, Hungarian for the encoder's proposals.

clare.md section 4.1. Targets of a batch are padded to one length, so that all photos and all layers
are matched by the same few tensor operations; no gradient flows. Knows no model. Needs scipy.
"""

# Shapes: B photos, N queries, A proposals, G targets a photo (padded), C texts a photo (padded)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from reir.losses import centre_size, generalised_iou, pairwise_iou

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
CENTRE_RADIUS = 2.5 / 32
NUM_OVERLAPS = 10
OTA_GIOU, OTA_NOT_BOTH, OTA_NEITHER = 3.0, 100.0, 10_000.0
HUNGARIAN_CLASS, HUNGARIAN_L1, HUNGARIAN_GIOU = 2.0, 5.0, 2.0
FIRST_SEEN = 1024
"""Number of proposals per target whose GIoU is computed first; quadrupled while too few."""
WORST_COST = 1e6
"""In place of a cost that is not a number; above any that is."""


@dataclass(frozen=True)
class Targets:
    """The instances to be found in B photos.

    Detection: C = 80 classes, each instance has one. Grounding: C expressions of the photo, each of
    which describes one instance; an instance that several of them describe is still one target.

    Attributes:
        boxes_xyxy: (B, G, 4) in [0, 1]; zeros on padding.
        texts: (B, G, C) bool, the texts that describe the instance; False on padding.
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
        """Check that the four tensors speak of the same B, G and C."""
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
        """Return the same boxes, all described by one text: "an instance"."""
        one = self.valid.new_ones(len(self.valid), 1)
        return Targets(self.boxes_xyxy, self.valid[..., None], self.valid, one)


def focal_cost(logits: Tensor) -> Tensor:
    """What it costs to call an element positive: its focal loss as one, less that as a negative.

    Bounded for any logit (the logarithm is of 1e-8 at least), so that boxes still decide where the
    scores have run away.
    """
    p = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - p).pow(FOCAL_GAMMA) * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p.pow(FOCAL_GAMMA) * -(1 - p + 1e-8).log()
    return positive - negative


def simota_cost(logits: Tensor, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
    """(..., B, G, N) cost of each target with each query; infinite for padding.

    Args:
        logits: (..., B, N, C), any leading axes (layers).
        boxes_xyxy: (..., B, N, 4).
        targets: of the B photos. Where several texts describe one, their costs are averaged.
    """
    share_BGC = targets.texts / targets.texts.sum(-1, keepdim=True).clamp(min=1)
    by_class = share_BGC.to(logits.dtype) @ focal_cost(logits).transpose(-1, -2)
    boxes_BG4 = targets.boxes_xyxy.to(boxes_xyxy.dtype)
    giou = generalised_iou(boxes_BG4[:, :, None], boxes_xyxy[..., None, :, :])
    in_box, in_region = _centre_within(boxes_xyxy, boxes_BG4)
    somewhere = ((in_box | in_region) & targets.valid[..., None]).any(-2, keepdim=True)
    cost = by_class - OTA_GIOU * giou + OTA_NOT_BOTH * ~(in_box & in_region)
    cost = cost + OTA_NEITHER * ~somewhere
    return cost.nan_to_num(nan=WORST_COST).masked_fill(~targets.valid[..., None], torch.inf)


def _centre_within(boxes_xyxy: Tensor, targets_BG4: Tensor) -> tuple[Tensor, Tensor]:
    """Return (..., B, G, N) bool: centre of the query in the target's box; near its centre."""
    centre = centre_size(boxes_xyxy)[..., None, :, :2]
    box = targets_BG4[:, :, None]
    in_box = ((centre > box[..., :2]) & (centre < box[..., 2:])).all(-1)
    middle = centre_size(box)[..., :2]
    in_region = (centre > middle - CENTRE_RADIUS) & (centre < middle + CENTRE_RADIUS)
    return in_box, in_region.all(-1)


@torch.no_grad()
def simota(logits: Tensor, boxes_xyxy: Tensor, targets: Targets) -> Tensor:
    """Assign about one to ten queries to every target, per photo and per layer (clare.md 4.1).

    A target takes its k cheapest queries, k being the sum of its ten largest IoUs; a query that
    several take goes to the target for which it is cheapest. Targets left with none are then
    served one by one, cheapest pair first: by a free query or, when all are taken, by one of
    a target that has several. So with at least as many queries as targets each gets one. Ties go to
    the lower index.

    Args:
        logits: (..., B, N, C) score of each query with each text of its photo.
        boxes_xyxy: (..., B, N, 4) of the queries, in [0, 1].
        targets: of the B photos.

    Returns:
        (..., B, N) int64, the index of the query's target in its photo, or -1.
    """
    shape, num_targets = boxes_xyxy.shape[:-1], targets.valid.shape[1]
    if not num_targets or not shape[-1]:
        return torch.full(shape, -1, dtype=torch.long, device=boxes_xyxy.device)
    with torch.autocast(boxes_xyxy.device.type, enabled=False):
        logits, boxes_xyxy = full_precision(logits), full_precision(boxes_xyxy)
        cost = simota_cost(logits, boxes_xyxy, targets)
        overlap = pairwise_iou(targets.boxes_xyxy.to(boxes_xyxy.dtype), boxes_xyxy)
        assigned = _dynamic_k(cost, overlap, targets.valid)
        return _serve_orphans(cost, assigned, targets.valid)


def _dynamic_k(cost: Tensor, overlap: Tensor, valid_BG: Tensor) -> Tensor:
    """(..., B, G, N) cost and IoU -> (..., B, N) target of each query or -1; conflicts resolved."""
    most = min(NUM_OVERLAPS, cost.shape[-1])
    num_taken = overlap.topk(most, dim=-1).values.sum(-1).floor().clamp(min=1)
    chosen = cost.sort(dim=-1, stable=True).indices[..., :most]
    within = torch.arange(most, device=cost.device) < num_taken[..., None]
    taken = torch.zeros_like(cost, dtype=torch.bool)
    taken = taken.scatter(-1, chosen, within & valid_BG[..., None])
    claims = taken.sum(-2)
    # As released: a contested query goes to the cheapest target of all, not only of its claimants.
    owner = torch.where(claims > 1, cost.argmin(-2), taken.to(torch.uint8).argmax(-2))
    return owner.masked_fill(claims == 0, -1)


def _serve_orphans(cost: Tensor, assigned: Tensor, valid_BG: Tensor) -> Tensor:
    """Give every target without a query one; in each round one target a photo and layer."""
    num_targets, num_queries = cost.shape[-2:]
    index_G1 = torch.arange(num_targets, device=cost.device)[:, None]
    while True:  # a round leaves fewer orphans, since it takes from nobody's last query
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
    l1 = torch.cdist(centre_size(boxes_BG4), centre_size(boxes_xyxy), p=1)
    without_giou = HUNGARIAN_CLASS * focal_cost(logits_BA)[:, None] + HUNGARIAN_L1 * l1
    # If a step diverges, the trainer must see a loss that is not finite, not an exception here.
    without_giou = without_giou.nan_to_num(nan=WORST_COST)
    num_kept, num_proposals = min(without_giou.shape[1:]), without_giou.shape[2]
    num_tried = min(max(FIRST_SEEN, num_kept), num_proposals)
    while True:
        partial_cost, where = without_giou.topk(num_tried, largest=False)
        tried = boxes_xyxy[:, None].expand(-1, len(partial_cost[0]), -1, -1)
        tried = tried.gather(2, where[..., None].expand(-1, -1, -1, 4))
        cost = partial_cost - HUNGARIAN_GIOU * generalised_iou(boxes_BG4[:, :, None], tried)
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
    """Assign one encoder proposal to every target at the least total cost (clare.md 4.1).

    Which of several best assignments comes out is scipy's choice.

    Args:
        logits_BA: class-agnostic score of each proposal.
        boxes_xyxy: (B, A, 4) in [0, 1].
        targets: of the B photos; with more targets than proposals the dearest stay without.

    Returns:
        (B, A) int64, the index of the proposal's target in its photo, or -1.
    """
    with torch.autocast(boxes_xyxy.device.type, enabled=False):
        # With G targets, some optimal assignment gives each target one of its G cheapest proposals,
        # since the other targets occupy at most G - 1 of them. So only these leave the device.
        cheapest, where = cheapest_proposals(
            full_precision(logits_BA), full_precision(boxes_xyxy), targets
        )
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
    """Half precision -> float32; float32 and float64 stay."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values

"""The loss of masks, as pure functions of tensors (clare.md 4.5: focal and dice).

Masks are large, so only some of the matched queries are asked for theirs: at most so many a photo
and layer, which keeps memory bounded and every shape known ahead of the data.
"""

# Shapes: L layers, B photos of this worker, N queries, G targets a photo (padded), P queries asked
#         for their mask, h x w cells of stride 4

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reir.losses import focal_loss
from reir.matching import NUM_OVERLAPS

DICE_SMOOTHING = 1.0


@dataclass(frozen=True)
class MaskOutputs:
    """What the masks of a step are judged by.

    Attributes:
        predict: (L, B, P) int64 queries of each layer and photo -> (L, B, P, h, w) mask logits.
        targets: (B, G, h, w) bool.
        known: (B, G) bool, False where a target's mask is not annotated, and on padding.
        inside: (B, h, w) bool, False for cells whose centre lies in the padding of the photo.
    """

    predict: Callable[[Tensor], Tensor]
    targets: Tensor
    known: Tensor
    inside: Tensor


@dataclass(frozen=True)
class MaskPairs:
    """The matched queries that are asked for their masks.

    Attributes:
        query: (L, B, P) int64.
        target: (L, B, P) int64, -1 where there was nothing left to ask for.
    """

    query: Tensor
    target: Tensor


@torch.no_grad()
def choose_pairs(assigned_LBN: Tensor, known_BG: Tensor, most: int) -> MaskPairs:
    """Choose at most `most` matched queries a photo and layer, fairly.

    Every target's first query comes before any target's second one; within these the lower index,
    which is the proposal of higher objectness. Targets without a mask are left out.
    """
    num_targets, num_queries = known_BG.shape[1], assigned_LBN.shape[-1]
    most = min(most, num_queries, NUM_OVERLAPS * max(num_targets, 1))
    target_G = torch.arange(num_targets, device=assigned_LBN.device)
    own_LBNG = (assigned_LBN[..., None] == target_G) & known_BG[:, None]
    turn_LBN = (own_LBNG.cumsum(-2) * own_LBNG).sum(-1)  # 1 for a target's first query, 0 for none
    order = turn_LBN.masked_fill(turn_LBN == 0, num_queries + 1).sort(dim=-1, stable=True)
    query = order.indices[..., :most]
    target = assigned_LBN.gather(-1, query).masked_fill(order.values[..., :most] > num_queries, -1)
    return MaskPairs(query, target)


def mask_distances(logits: Tensor, targets: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss and dice loss, mask by mask; cells of the padding do not count.

    Args:
        logits: (..., h, w).
        targets: (..., h, w) bool.
        inside: (..., h, w) bool, the cells of the photo.

    Returns:
        (...) focal loss (alpha .25, gamma 2), mean over cells, and (...) 1 - dice in [0, 1).
    """
    wanted = targets.to(logits.dtype)
    num_cells = inside.sum((-2, -1)).clamp(min=1)
    focal = (focal_loss(logits, wanted) * inside).sum((-2, -1)) / num_cells
    p = logits.sigmoid() * inside
    common, both = (p * wanted).sum((-2, -1)), p.sum((-2, -1)) + wanted.sum((-2, -1))
    return focal, 1 - (2 * common + DICE_SMOOTHING) / (both + DICE_SMOOTHING)

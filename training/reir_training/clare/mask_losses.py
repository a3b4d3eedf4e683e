"""The focal and dice losses of masks, as pure functions of tensors (docs/clare.md, section 4.5).

Masks are large, so they are computed for a limited number of matched queries per photo and layer.
This bounds the memory, and the shapes do not depend on the data.
"""

# Shapes: L layers, B photos of this worker, N queries, G targets per photo (padded), P queries
# whose masks are computed, h x w cells of stride 4

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reir.losses import dice_loss, focal_loss
from reir_training.clare.matching import NUM_OVERLAPS


@dataclass(frozen=True)
class MaskOutputs:
    """The mask outputs and mask targets of a step.

    Attributes:
        predict: maps (L, B, P) int64 queries of each layer and photo to (L, B, P, h, w) mask
            logits.
        targets: (B, G, h, w) bool masks.
        known: (B, G) bool, whether the mask of the target is annotated; False on padding.
        inside: (B, h, w) bool, False for cells whose center is in the padding of the photo.
    """

    predict: Callable[[Tensor], Tensor]
    targets: Tensor
    known: Tensor
    inside: Tensor


@dataclass(frozen=True)
class MaskPairs:
    """The matched queries whose masks are computed.

    Attributes:
        query: (L, B, P) int64.
        target: (L, B, P) int64 target of each query, -1 for unused places.
    """

    query: Tensor
    target: Tensor


@torch.no_grad()
def choose_pairs(assigned_LBN: Tensor, known_BG: Tensor, max_pairs: int) -> MaskPairs:
    """Choose at most `max_pairs` matched queries per photo and layer.

    The first query of every target comes before the second query of any target, so that targets
    with many queries do not displace others. Among these, the lower index comes first, which is the
    proposal with the higher objectness. Targets without a mask are ignored.
    """
    num_targets, num_queries = known_BG.shape[1], assigned_LBN.shape[-1]
    # The matching assigns at most `NUM_OVERLAPS` times as many queries as there are targets.
    max_pairs = min(max_pairs, num_queries, NUM_OVERLAPS * max(num_targets, 1))
    target_G = torch.arange(num_targets, device=assigned_LBN.device)
    own_LBNG = (assigned_LBN[..., None] == target_G) & known_BG[:, None]
    turn_LBN = (own_LBNG.cumsum(-2) * own_LBNG).sum(-1)  # 1 for a target's first query, 0 for none
    order = turn_LBN.masked_fill(turn_LBN == 0, num_queries + 1).sort(dim=-1, stable=True)
    query = order.indices[..., :max_pairs]
    target = assigned_LBN.gather(-1, query).masked_fill(
        order.values[..., :max_pairs] > num_queries, -1
    )
    return MaskPairs(query, target)


def mask_distances(logits: Tensor, targets: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the focal loss and the dice loss of each mask, ignoring cells in the padding.

    Args:
        logits: (..., h, w).
        targets: (..., h, w) bool.
        inside: (..., h, w) bool, whether the cell is in the photo.

    Returns:
        (...) focal loss (alpha .25, gamma 2), averaged over the cells inside, and (...) 1 - dice,
        in [0, 1).
    """
    labels = targets.to(logits.dtype)
    num_cells = inside.sum((-2, -1)).clamp(min=1)
    focal = (focal_loss(logits, labels) * inside).sum((-2, -1)) / num_cells
    return focal, dice_loss(logits.sigmoid() * inside, labels)

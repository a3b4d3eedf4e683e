"""Contrastive denoising queries: shaken copies of the targets that the decoder learns to mend.

See docs/clare.md, section 3.4. In training they stand in front of the matching queries, in groups
that do not see one another and that the matching queries do not see, since these could otherwise
read off the answer.
"""

# Shapes: B photos, G targets a photo (padded), C text width, D dimension, N matching queries,
#         R groups, Q = R * 2 * G denoising queries

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reir.losses import center_size

NUM_QUERIES = 200
MIN_SIDE = 1e-3
"""A box that the noise turned inside out, or pushed out of the photo, keeps this much."""


@dataclass(frozen=True)
class DenoisingQueries:
    """Denoising queries of B photos; group by group, in each the positives, then the negatives.

    Attributes:
        content: (B, Q, D); zeros on padding.
        boxes_cxcywh: (B, Q, 4) in (0, 1).
        attention_mask: (Q + N, Q + N) bool, True where the row may not attend to the column.
        positive: (B, Q) bool, the query shall find its target; else it shall be turned down.
        target: (B, Q) int64, index of the target that the query was made of; -1 on padding.
    """

    content: Tensor
    boxes_cxcywh: Tensor
    attention_mask: Tensor
    positive: Tensor
    target: Tensor


class DenoisingContent(nn.Module):
    """Text feature of a target -> content of its queries: `LayerNorm(Linear(C -> D))`."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text_BGC: Tensor) -> Tensor:
        """Return (B, G, D)."""
        return torch.as_tensor(self.norm(self.linear(text_BGC)))


def num_groups(num_targets: int) -> int:
    """R for G targets a photo: as many as fit into 200 queries, one at least."""
    return max(1, NUM_QUERIES // (2 * num_targets)) if num_targets else 0


def denoising_queries(
    content_BGD: Tensor,
    boxes_xyxy: Tensor,
    valid_BG: Tensor,
    *,
    num_queries: int,
    seeds: Sequence[int],
) -> DenoisingQueries:
    """Make one positive and one negative query of every target in each group.

    Every side of a positive is moved by less than half of the box's width or height, every side of
    a negative by half to all of it.

    Args:
        content_BGD: what `DenoisingContent` makes of the text of each target.
        boxes_xyxy: (B, G, 4) of the targets, in [0, 1].
        valid_BG: bool, False on padding.
        num_queries: N matching queries, which follow the denoising ones.
        seeds: one a photo; its noise follows from its seed and from G, whatever stands beside it.
    """
    num_targets = valid_BG.shape[1]
    groups = num_groups(num_targets)
    device = boxes_xyxy.device
    slot_Q = torch.arange(groups * 2 * num_targets, device=device)
    target_Q = slot_Q % max(num_targets, 1)
    positive_Q = slot_Q // max(num_targets, 1) % 2 == 0
    real_BQ = valid_BG[:, target_Q]
    boxes = _shaken(boxes_xyxy[:, target_Q], positive_Q, seeds)
    return DenoisingQueries(
        content=content_BGD[:, target_Q] * real_BQ[..., None],
        boxes_cxcywh=torch.where(real_BQ[..., None], boxes, 0.5),
        attention_mask=isolation_mask(groups, 2 * num_targets, num_queries, device=device),
        positive=real_BQ & positive_Q,
        target=torch.where(real_BQ, target_Q, -1),
    )


def _shaken(boxes_xyxy: Tensor, positive_Q: Tensor, seeds: Sequence[int]) -> Tensor:
    """(B, Q, 4) xyxy -> cxcywh with noise; float32, whatever the precision of the model."""
    boxes, source = boxes_xyxy.float(), torch.Generator()
    drawn = [
        torch.rand(2, *own.shape, generator=source.manual_seed(seed))
        for own, seed in zip(boxes, seeds, strict=True)
    ]
    random = torch.stack(drawn, dim=1).to(boxes.device)
    share = (random[0] + ~positive_Q[:, None]) / 2
    sign = torch.where(random[1] < 0.5, -1.0, 1.0)
    size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    moved = (boxes + sign * share * size).clamp(0, 1)
    return center_size(moved).clamp(MIN_SIDE, 1 - MIN_SIDE)


def isolation_mask(
    groups: int, group_size: int, num_queries: int, *, device: torch.device
) -> Tensor:
    """(Q + N, Q + N) bool, True where the row may not attend to the column.

    A denoising query attends to its own group and to the matching queries, a matching query to the
    matching queries alone.
    """
    total = groups * group_size
    group = torch.arange(total + num_queries, device=device) // max(group_size, 1)
    denoising = torch.arange(total + num_queries, device=device) < total
    return denoising & (group[:, None] != group)

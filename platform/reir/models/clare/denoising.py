"""Contrastive denoising queries: noisy copies of the targets, which the decoder learns to correct.

See docs/clare.md, section 3.4. In training, they are put before the matching queries. They form
groups that cannot attend to each other. The matching queries cannot attend to them at all, since
they could otherwise copy the answer.
"""

# Shapes: B photos, G targets per photo (padded), C text width, D dimension, N matching queries,
#         R groups, Q = R * 2 * G denoising queries

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reir.losses import center_size

NUM_QUERIES = 200
MIN_SIDE = 1e-3
"""Smallest width and height of a noisy box. Noise can move its left side past its right one, or all
of it out of the photo."""


@dataclass(frozen=True)
class DenoisingQueries:
    """Denoising queries of B photos, group by group; each group has positives, then negatives.

    Attributes:
        content: (B, Q, D); zeros on padding.
        boxes_cxcywh: (B, Q, 4) in (0, 1).
        attention_mask: (Q + N, Q + N) bool, True if the row must not attend to the column.
        positive: (B, Q) bool, True if the query should predict its target; otherwise, it should
            predict that it matches nothing.
        target: (B, Q) int64, index of the target that the query is a copy of; -1 on padding.
    """

    content: Tensor
    boxes_cxcywh: Tensor
    attention_mask: Tensor
    positive: Tensor
    target: Tensor


class DenoisingContent(nn.Module):
    """Projects the text feature of a target to the content of its queries, with LayerNorm."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text_BGC: Tensor) -> Tensor:
        """Return (B, G, D)."""
        return torch.as_tensor(self.norm(self.linear(text_BGC)))


def num_groups(num_targets: int) -> int:
    """Return R for G targets per photo: as many groups as fit into 200 queries, at least one."""
    return max(1, NUM_QUERIES // (2 * num_targets)) if num_targets else 0


def denoising_queries(
    content_BGD: Tensor,
    boxes_xyxy: Tensor,
    valid_BG: Tensor,
    *,
    num_queries: int,
    seeds: Sequence[int],
) -> DenoisingQueries:
    """Create a positive and a negative query for every target in each group.

    Every side of a positive box is moved by less than half of the box's width or height, and every
    side of a negative box by half to all of it.

    Args:
        content_BGD: output of `DenoisingContent` for the text of each target.
        boxes_xyxy: (B, G, 4) boxes of the targets, in [0, 1].
        valid_BG: bool, False on padding.
        num_queries: N, the number of matching queries, which follow the denoising queries.
        seeds: one seed per photo. The noise of a photo depends only on its seed and on G, and not
            on the other photos of the batch.
    """
    num_targets = valid_BG.shape[1]
    groups = num_groups(num_targets)
    device = boxes_xyxy.device
    slot_Q = torch.arange(groups * 2 * num_targets, device=device)
    # `max`, because a batch without targets would divide by 0; it has no queries either.
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
    # Drawn on the CPU with the photo's own seed, so that the noise depends neither on the device
    # nor on the other photos: a resumed run repeats the same steps.
    drawn = [
        torch.rand(2, *own.shape, generator=source.manual_seed(seed))
        for own, seed in zip(boxes, seeds, strict=True)
    ]
    random = torch.stack(drawn, dim=1).to(boxes.device)
    # From 0 to a half for positives, from a half to 1 for negatives.
    share = (random[0] + ~positive_Q[:, None]) / 2
    sign = torch.where(random[1] < 0.5, -1.0, 1.0)
    size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    moved = (boxes + sign * share * size).clamp(0, 1)
    # Away from 0 and 1, where the logit of a box, which the decoder takes, is infinite.
    return center_size(moved).clamp(MIN_SIDE, 1 - MIN_SIDE)


def isolation_mask(
    groups: int, group_size: int, num_queries: int, *, device: torch.device
) -> Tensor:
    """(Q + N, Q + N) bool, True if the row must not attend to the column.

    A denoising query attends to its own group and to the matching queries. A matching query attends
    to the matching queries only.
    """
    total = groups * group_size
    # Matching queries get group numbers of their own, which no denoising query has.
    group = torch.arange(total + num_queries, device=device) // max(group_size, 1)
    denoising = torch.arange(total + num_queries, device=device) < total
    return denoising & (group[:, None] != group)

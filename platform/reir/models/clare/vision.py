"""The vision stream of CLARE (docs/clare.md, section 3.2): SigLIP patches, pyramid of four maps.

Given which cells hold the photo, nothing of the padding reaches them: it is not attended to, not
pooled, not counted by the norms, and positions are stretched over the photo alone. Knows torch, no
configuration, no text, no device.
"""

# Shapes: B photos, H x W pixels of the padded batch, h x w cells of a map, C tower width,
#         D dimension; g side of the position grid

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 4
NORM_GROUPS = 32


def resampling_weights(sizes_B: Tensor, num_out: int, num_in: int) -> Tensor:
    """Bicubic resampling with antialiasing as a matrix for each photo.

    The same as `F.interpolate(..., mode="bicubic", antialias=True)` to each size, but of all
    photos of a batch at once and without knowing their sizes on the host.

    Args:
        sizes_B: outputs of each photo, at most `num_out`.
        num_out: rows; those from the photo's size on are 0.
        num_in: columns.

    Returns:
        (B, num_out, num_in), rows sum to 1 or are 0.
    """
    sizes_B = sizes_B.float()
    step_B11 = (num_in / sizes_B)[:, None, None]
    out = torch.arange(num_out, device=sizes_B.device)
    source = torch.arange(num_in, device=sizes_B.device) + 0.5
    distance = (((out + 0.5)[:, None] * step_B11 - source) / step_B11.clamp(min=1)).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far) * (distance < 2)
    real = (out < sizes_B[:, None])[..., None]
    return torch.where(real, weights / weights.sum(dim=-1, keepdim=True), 0.0)


def encode_patches(tower: Any, pixels: Tensor, cells_B2: Tensor, valid: Tensor | None) -> Tensor:
    """All patch states of a SigLIP vision tower, after its last norm.

    Args:
        tower: `SiglipVisionModel`.
        pixels: (B, 3, H, W), normalized.
        cells_B2: columns and rows of patches that the position grid of each photo is stretched to.
        valid: (B, h, w) bool, patches that may be attended to; None for all.

    Returns:
        (B, C, h, w).
    """
    core = tower.base_model
    states = core.embeddings.patch_embedding(pixels)
    rows, columns = states.shape[2:]
    positions = core.embeddings.position_embedding
    # called, not read: ZeRO-3 brings the weights of a module together while it is called
    grid = positions(torch.arange(positions.num_embeddings, device=pixels.device))
    side = math.isqrt(len(grid))
    across = resampling_weights(cells_B2[:, 0], columns, side)
    down = resampling_weights(cells_B2[:, 1], rows, side)
    stretched = torch.einsum("bhi,ijc->bhjc", down, grid.view(side, side, -1))
    states = states + torch.einsum("bwj,bhjc->bchw", across, stretched)
    allowed = None if valid is None else valid.flatten(1)[:, None, None]
    states = core.encoder(states.flatten(2).transpose(1, 2), attention_mask=allowed)
    states = core.post_layernorm(states.last_hidden_state)
    return torch.as_tensor(states.transpose(1, 2).unflatten(-1, (rows, columns)))


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm whose mean and variance are those of the valid cells."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, D, h, w) -> the same shape; `valid` is (B, h, w) bool, None for all."""
        if valid is None:
            return super().forward(x)
        groups = x.float().view(len(x), self.num_groups, -1, *x.shape[2:])
        counted = valid[:, None, None].float()
        count = counted.sum(dim=(2, 3, 4), keepdim=True) * groups.shape[2]
        mean = (groups * counted).sum(dim=(2, 3, 4), keepdim=True) / count
        centered = groups - mean
        variance = (centered.square() * counted).sum(dim=(2, 3, 4), keepdim=True) / count
        unit = (centered * (variance + self.eps).rsqrt()).flatten(1, 2)
        return torch.as_tensor(unit * self.weight[:, None, None] + self.bias[:, None, None])


class Pyramid(nn.Module):
    """Patch states -> four maps of stride 8, 16, 32 and 64, projected to D channels."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        projections = [nn.Conv2d(c, dim, 1) for c in (width // 2, width, width)]
        projections.append(nn.Conv2d(width, dim, 3, stride=2, padding=1))
        self.projections = nn.ModuleList(projections)
        self.norms = nn.ModuleList(MaskedGroupNorm(NORM_GROUPS, dim) for _ in range(NUM_LEVELS))
        for parameter in self.projections.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, patches: Tensor, valid: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the four maps.

        Args:
            patches: (B, C, h, w), h and w even.
            valid: (B, h, w) bool for each map; cells outside the photo then read as if they were
                beyond the border of the map. None lets them take part.
        """
        if valid is None:
            coarse = F.max_pool2d(patches, 2)
        else:
            outside, outside_coarse = ~valid[1][:, None], ~valid[2][:, None]
            coarse = F.max_pool2d(patches.masked_fill(outside, -torch.inf), 2)
            coarse = coarse.masked_fill(outside_coarse, 0.0)
        maps = [self.upsample(patches), patches, coarse, coarse]
        masks = [None] * NUM_LEVELS if valid is None else valid
        return [
            norm(project(x), mask)
            for project, norm, x, mask in zip(
                self.projections, self.norms, maps, masks, strict=True
            )
        ]

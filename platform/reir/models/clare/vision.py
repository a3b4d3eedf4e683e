"""The vision tower and the feature pyramid of CLARE (docs/clare.md, section 3.2).

If the functions are told which cells belong to the photo, the padding of the batch does not affect
them: attention, pooling and norms leave it out, and the position embeddings are resampled to the
photo without padding.
"""

# Shapes: B photos, H x W pixels of the padded batch, h x w cells of a map, C tower width,
#         D dimension

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
    """Return bicubic resampling with antialiasing as one matrix per photo.

    The matrices give the same result as `F.interpolate(..., mode="bicubic", antialias=True)`, but
    resample a whole batch to different sizes at once, and the CPU need not know these sizes.

    Args:
        sizes_B: number of outputs for each photo, at most `num_out`.
        num_out: number of rows; the rows from the photo's size on are 0.
        num_in: number of columns.

    Returns:
        (B, num_out, num_in); each row sums to 1 or is 0.
    """
    # Not `F.interpolate` itself: torch 2.13 returns wrong values if the output has one column.
    sizes_B = sizes_B.float()
    step_B11 = (num_in / sizes_B)[:, None, None]
    out = torch.arange(num_out, device=sizes_B.device)
    source = torch.arange(num_in, device=sizes_B.device) + 0.5
    distance = (((out + 0.5)[:, None] * step_B11 - source) / step_B11.clamp(min=1)).abs()
    # Cubic convolution (Keys, 1981) with a = -0.5, as in torch and Pillow.
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far) * (distance < 2)
    real = (out < sizes_B[:, None])[..., None]
    return torch.where(real, weights / weights.sum(dim=-1, keepdim=True), 0.0)


def encode_patches(tower: Any, pixels: Tensor, cells_B2: Tensor, valid: Tensor | None) -> Tensor:
    """Return the states of all patches of a SigLIP vision tower, after its last norm.

    Args:
        tower: a `SiglipVisionModel`.
        pixels: (B, 3, H, W), normalized.
        cells_B2: columns and rows of patches to which the position grid is resampled for each
            photo.
        valid: (B, h, w) bool, patches that may be attended to; None for all.

    Returns:
        (B, C, h, w).
    """
    # The parts of the tower are called one by one, since its own `forward` resamples the position
    # grid to the padded batch, and takes no mask.
    core = tower.base_model
    states = core.embeddings.patch_embedding(pixels)
    rows, columns = states.shape[2:]
    positions = core.embeddings.position_embedding
    # The module is called instead of reading its `weight`, because ZeRO-3 gathers the weights of a
    # module only while it is called.
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
    """Group norm whose mean and variance are computed from the valid cells only."""

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
    """Computes four maps of stride 8, 16, 32 and 64 with D channels from the patch states."""

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
            valid: (B, h, w) bool for each map. Cells outside the photo are then treated as if they
                were beyond the border of the map. If None, they take part like any other cell.
        """
        if valid is None:
            coarse = F.max_pool2d(patches, 2)
        else:
            outside, outside_coarse = ~valid[1][:, None], ~valid[2][:, None]
            # Minus infinity never is the maximum, except in a coarse cell without any patch of the
            # photo, which becomes 0.
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

"""Deformable convolution: each tap of the kernel reads the map where a learned offset points.

Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.1.
"""

# Shapes: B photos, C channels, G groups of channels, T taps of the kernel (9), H x W cells

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 3
TAPS = KERNEL * KERNEL


class DeformableConvolution(nn.Conv2d):
    """A 3x3 convolution of stride 1 whose taps are moved by offsets; it keeps the map size.

    Args:
        channels: C, of input and output.
        groups: G, each with offsets of its own.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, KERNEL, padding=KERNEL // 2)
        self.offset_groups = groups

    def forward(self, x_BCHW: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve a map.

        Args:
            x_BCHW: the map; cells outside it are 0.
            offsets: (B, G * T * 2, H, W) in cells: for each group and each tap, row by row, first
                the vertical one, then the horizontal one.

        Returns:
            (B, C, H, W).
        """
        taps = _read_taps(x_BCHW, offsets, self.offset_groups)
        convolved = torch.einsum("bcthw,oct->bohw", taps, self.weight.flatten(2))
        return convolved if self.bias is None else convolved + self.bias[:, None, None]


def _read_taps(x_BCHW: Tensor, offsets: Tensor, groups: int) -> Tensor:
    """Return what each tap reads at each cell, (B, C, T, H, W), interpolated between four cells."""
    batch, channels, height, width = x_BCHW.shape
    reach = torch.arange(KERNEL, device=x_BCHW.device, dtype=x_BCHW.dtype) - KERNEL // 2
    tap_y, tap_x = reach.repeat_interleave(KERNEL), reach.repeat(KERNEL)
    rows = torch.arange(height, device=x_BCHW.device, dtype=x_BCHW.dtype)
    columns = torch.arange(width, device=x_BCHW.device, dtype=x_BCHW.dtype)
    moved = offsets.reshape(batch * groups, TAPS, 2, height, width)
    y = moved[:, :, 0] + tap_y[:, None, None] + rows[:, None]
    x = moved[:, :, 1] + tap_x[:, None, None] + columns
    # `grid_sample` without aligned corners takes -1 and 1 as the outer edges of the map.
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    read = F.grid_sample(
        x_BCHW.reshape(batch * groups, channels // groups, height, width),
        grid.flatten(1, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return read.reshape(batch, channels, TAPS, height, width)

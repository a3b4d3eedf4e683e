"""Multi-scale fusion: brings what the finer maps of YOLOv3 show into the cells of the coarsest.

Source: Jin et al. 2023, "RefCLIP", and its released code. The code also projects the other two
fused maps, which nothing uses ("scale selection"); they are left out here.
"""

# Shapes: B photos, C channels, H x W cells of the coarsest map, A = H * W anchors

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reir.models.weak_rec.yolov3 import ConvBlock

MAP_CHANNELS = (1024, 512, 256)
"""Of the coarse, middle and fine map of YOLOv3."""
WIDTH = 1024


class MultiScaleFusion(nn.Module):
    """Fuses three maps from coarse to fine, and back to the coarsest; all of it is trained.

    Args:
        map_channels: of the coarse, middle and fine map.
        width: C, channels of the result; each path between two maps has half as many.
    """

    def __init__(self, map_channels: Sequence[int] = MAP_CHANNELS, width: int = WIDTH) -> None:
        super().__init__()
        coarse, middle, fine = map_channels
        half = width // 2
        self.up_to_middle = _path(nn.UpsamplingNearest2d(scale_factor=2), coarse, half)
        self.up_to_fine = _path(nn.UpsamplingNearest2d(scale_factor=2), half + middle, half)
        self.down_to_middle = _path(nn.AvgPool2d(2), half + fine, half)
        self.down_to_coarse = _path(nn.AvgPool2d(2), half + half + middle, half)
        self.project = ConvBlock(half + coarse, width, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return one feature vector for each cell of the coarsest map.

        Args:
            maps: coarse (B, 1024, H, W), middle (B, 512, 2H, 2W) and fine (B, 256, 4H, 4W).

        Returns:
            (B, A, C), the cells ordered by row.
        """
        coarse, middle, fine = maps
        middle = torch.cat([self.up_to_middle(coarse), middle], dim=1)
        fine = torch.cat([self.up_to_fine(middle), fine], dim=1)
        middle = torch.cat([self.down_to_middle(fine), middle], dim=1)
        coarse = torch.cat([self.down_to_coarse(middle), coarse], dim=1)
        fused: Tensor = self.project(coarse).flatten(2).transpose(1, 2)
        return fused


def _path(resize: nn.Module, c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(resize, ConvBlock(c_in, c_out, 1), ConvBlock(c_out, c_out, 3))

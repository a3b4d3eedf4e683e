"""`MaskHead`: the pixels of an instance, and a tighter box, from a crop around its box.

The frozen crop network sees the crop, and a small decoder combines its features from coarse to
fine, as a feature pyramid does (Lin et al. 2017). The box is the prompt: every cell knows where it
lies relative to the box, so that the decoder knows which of several instances is meant. The head
does not depend on any sentence, and is distinct from CLARE's mask branch.
"""

# Shapes: N crops, s side of a crop in pixels, C channels, h x w cells of a level

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROMPT_CHANNELS = 4
BOX_EDGES = 4


@dataclass(frozen=True, kw_only=True)
class MaskHeadConfig:
    """The hyperparameters of the head; stored in the `mask_head.json` of a checkpoint.

    Attributes:
        width: channels of the decoder.
        crop_px: side of a crop; masks have half of it.
        margin: part of the photo around the box that the crop shows, as a share of the box's side.
    """

    width: int = 64
    crop_px: int = 128
    margin: float = 0.25


class MaskOutput(NamedTuple):
    """The output for N crops.

    Attributes:
        logits: (N, s/2, s/2), positive on the pixels of the instance.
        edges: (N, 4, s/4) logits of the position of the box's left, top, right and bottom edge, in
            equal steps from one side of the crop to the other.
    """

    logits: Tensor
    edges: Tensor

    def boxes(self) -> Tensor:
        """(N, 4) xyxy in [0, 1] of the crop: the mean position of each edge."""
        num = self.edges.shape[2]
        centers = (torch.arange(num, device=self.edges.device) + 0.5) / num
        return self.edges.float().softmax(2) @ centers


class ChannelsLastConv(nn.Conv2d):
    """A convolution in the memory order that is several times as fast on a CPU.

    The weights themselves stay contiguous, since DeepSpeed broadcasts no others.
    """

    def forward(self, x_NChw: Tensor) -> Tensor:
        """Return (N, C, h, w)."""
        order = torch.channels_last
        x, weight = (each.contiguous(memory_format=order) for each in (x_NChw, self.weight))
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class ResidualBlock(nn.Module):
    """Two convolutions that look at the neighbors of each cell, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = ChannelsLastConv(width, width, 3, padding=1)
        self.second = ChannelsLastConv(width, width, 3, padding=1)

    def forward(self, x_NChw: Tensor) -> Tensor:
        """Return (N, C, h, w)."""
        out: Tensor = x_NChw + self.second(F.relu(self.first(self.norm(x_NChw))))
        return out


class MaskHead(nn.Module):
    """Decodes features of the crop network.

    Args:
        config: hyperparameters.
        channels: of the levels of features, from stride 2 to stride 32.
    """

    def __init__(self, config: MaskHeadConfig, channels: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        # The finest level has most of the cells, so it is narrower.
        widths = [config.width // 2, *[config.width] * (len(channels) - 1)]
        self.lateral = nn.ModuleList(
            ChannelsLastConv(c + PROMPT_CHANNELS, w, 1)
            for c, w in zip(channels, widths, strict=True)
        )
        # Two blocks where a cell sees much of the crop and costs little, one at the finest levels.
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(w) for _ in range(1 if i < 2 else 2)))
            for i, w in enumerate(widths)
        )
        self.narrow = ChannelsLastConv(config.width, widths[0], 1)
        self.to_mask = ChannelsLastConv(widths[0], 1, 1)
        # How far the edges of prompts usually are from those of the instances.
        self.precision = nn.Parameter(torch.tensor([5.0]))
        self.to_profile = ChannelsLastConv(config.width, config.width, 1)
        self.edges = nn.ModuleList(_edge_layers(config.width) for _ in ("horizontal", "vertical"))

    def forward(self, levels: Sequence[Tensor], boxes_N4: Tensor) -> MaskOutput:
        """Return masks and boxes.

        Args:
            levels: (N, C, h, w) features of each level, fine to coarse, each with half the side.
            boxes_N4: prompts, xyxy in [0, 1] of the crop.
        """
        coarser: Tensor | None = None
        for i in reversed(range(1, len(levels))):
            coarser = self._level(i, levels[i], boxes_N4, coarser)
        assert coarser is not None, "there are at least two levels"
        finest = self._level(0, levels[0], boxes_N4, self.narrow(coarser))
        # Edges come from the second finest level, which is fine enough for a mean position.
        edges = self._edges(coarser) + self._prior(boxes_N4, coarser.shape[2])
        return MaskOutput(self.to_mask(finest)[:, 0], edges)

    def _prior(self, boxes_N4: Tensor, side: int) -> Tensor:
        """(N, 4, side) logits of a normal distribution of each edge around that of the prompt."""
        at = (torch.arange(side, device=boxes_N4.device) + 0.5) / side
        return -self.precision.exp() * (at - boxes_N4[:, :, None]).square()

    def _level(self, i: int, level: Tensor, boxes_N4: Tensor, coarser: Tensor | None) -> Tensor:
        """(N, C, h, w) of one level, from its features, the prompt and the next coarser level."""
        prompt = prompt_map(boxes_N4, level.shape[2]).to(level.dtype)
        x = self.lateral[i](torch.cat([level, prompt], dim=1))
        if coarser is not None:
            x = x + F.interpolate(coarser, scale_factor=2.0, mode="bilinear")
        out: Tensor = self.blocks[i](x)
        return out

    def _edges(self, x_NChw: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 4, w) logits of left, top, right and bottom."""
        x = F.relu(self.to_profile(x_NChw))
        # An edge is where something begins in any row or column, hence the maximum.
        horizontal, vertical = self.edges[0](x.amax(2)), self.edges[1](x.amax(3))
        pairs = [horizontal[:, 0], vertical[:, 0], horizontal[:, 1], vertical[:, 1]]
        return torch.stack(pairs, dim=1)


def _edge_layers(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(width, width, 5, padding=2), nn.ReLU(), nn.Conv1d(width, 2, 5, padding=2)
    )


def prompt_map(boxes_N4: Tensor, side: int) -> Tensor:
    """(N, 4, side, side) the distance of each cell to the four edges of its box, in box sides."""
    at = (torch.arange(side, device=boxes_N4.device) + 0.5) / side
    x1, y1, x2, y2 = boxes_N4.float()[:, :, None].unbind(1)
    wide, high = (x2 - x1).clamp(min=1e-3), (y2 - y1).clamp(min=1e-3)
    across = [((at - x1) / wide), ((x2 - at) / wide)]
    down = [((at - y1) / high), ((y2 - at) / high)]
    columns = [each[:, None, :].expand(-1, side, -1) for each in across]
    rows = [each[:, :, None].expand(-1, -1, side) for each in down]
    return torch.stack([*columns, *rows], dim=1).clamp(-1, 2)

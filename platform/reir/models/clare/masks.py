"""The optional mask branch of CLARE: a small network of its own for each instance.

CondInst (docs/clare.md, section 3.8): a convolutional network computes a few feature maps of the
photo. From the decoder state of an instance, a controller generates the weights of three 1 x 1
convolutions. They read those maps and the position of each cell relative to the instance's box, and
predict which cells belong to the instance. Masks are computed at stride 8 and returned at stride 4.
Knows torch, no configuration, no loss, no device.
"""

# Shapes: B photos, h x w cells of the finest map (stride 8), D width, K decoder layers, N queries,
#         P instances whose masks are asked for, C = 8 channels, S = C + 2

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.images.rle import BoolMask
from reir.losses import center_size
from reir.models.clare.deformable import EncoderMemory, TokenGrid
from reir.models.clare.vision import NORM_GROUPS, MaskedGroupNorm

CHANNELS = 8
LAYERS = ((CHANNELS + 2, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, 1))
"""Inputs and outputs of the three convolutions of an instance."""

NUM_WEIGHTS = sum((inputs + 1) * outputs for inputs, outputs in LAYERS)  # 169
NUM_MAPS = 3
"""The finest maps, of stride 8, 16 and 32, are read."""

LEAST_SIDE = 8
"""Cells; relative places in a smaller box are counted in so many, lest they become huge."""

UPSAMPLING = 2
"""From the stride at which masks are computed to the one at which they are reported."""


@dataclass(frozen=True)
class MaskInputs:
    """What the masks of B photos are made from.

    Attributes:
        maps: (B, S, h, w) float32: the channels, then x and y of the center of each cell in the
            frame of the photo. Cells in the padding repeat the photo's nearest.
        states: (K, B, N, D) of the decoder.
    """

    maps: Tensor
    states: Tensor


class MaskBranch(nn.Module):
    """Channels of the photo, and the controller that makes each instance's convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(NUM_MAPS))
        self.norms = nn.ModuleList(MaskedGroupNorm(NORM_GROUPS, dim) for _ in range(NUM_MAPS))
        self.channels = nn.Conv2d(dim, CHANNELS, 1)
        self.controller = nn.Sequential(
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            nn.ReLU(),
            nn.Linear(dim, NUM_WEIGHTS),
        )

    def inputs(self, memory: EncoderMemory, states_KBND: Tensor) -> MaskInputs:
        """Collect what masks are made from; nothing of the padding reaches the photo."""
        sides = memory.grid.sides[:NUM_MAPS]
        levels = torch.split(memory.tokens, [h * w for h, w in memory.grid.sides], dim=1)
        valid = memory.grid.valid_maps()
        mixed: Tensor | None = None
        for level in reversed(range(NUM_MAPS)):
            x = levels[level].transpose(1, 2).reshape(len(valid[0]), -1, *sides[level])
            if mixed is not None:  # onto the four finer cells; the photo's lie in the photo's
                x = x + F.interpolate(mixed, scale_factor=2.0, mode="nearest")
            x = self.mixes[level](x.masked_fill(~valid[level][:, None], 0.0))
            mixed = self.norms[level](x, valid[level]).relu()
        channels_BChw = self.channels(mixed).float()
        maps = torch.cat([channels_BChw, cell_centers(memory.grid)], dim=1)
        return MaskInputs(repeat_edges(maps, valid[0]), states_KBND)

    def forward(self, maps_BShw: Tensor, states_BPD: Tensor, boxes_BP4: Tensor) -> Tensor:
        """Say which cells belong to each instance.

        Args:
            maps_BShw: of `inputs`.
            states_BPD: the decoder's, of the instances asked for.
            boxes_BP4: their boxes, xyxy in the frame of the photo; masks do not move them.

        Returns:
            (B, P, 2h, 2w) float32 logits at stride 4.
        """
        weights = self.controller(states_BPD)
        with torch.autocast(maps_BShw.device.type, enabled=False):
            logits = convolve(maps_BShw, weights.float(), boxes_BP4.detach().float())
            return F.interpolate(logits, scale_factor=UPSAMPLING, mode="bilinear")

    def of_queries(self, inputs: MaskInputs, boxes_KBN4: Tensor, query_KBP: Tensor) -> Tensor:
        """(K, B, P, 2h, 2w) logits of some queries of each layer and photo."""
        layers, _, asked = query_KBP.shape
        row = query_KBP[..., None]
        states, boxes = (
            values.gather(2, row.expand(-1, -1, -1, values.shape[-1])).transpose(0, 1).flatten(1, 2)
            for values in (inputs.states, boxes_KBN4)
        )
        logits: Tensor = self(inputs.maps, states, boxes)
        return logits.view(-1, layers, asked, *logits.shape[2:]).transpose(0, 1)


def cell_centers(grid: TokenGrid) -> Tensor:
    """(B, 2, h, w) x and y of the cells of the finest map in the frame of the photo."""
    height, width = grid.sides[0]
    return grid.centers[:, : height * width].transpose(1, 2).reshape(-1, 2, height, width)


def repeat_edges(maps: Tensor, valid_Bhw: Tensor) -> Tensor:
    """(B, S, h, w) -> the same, where cells right of and below the photo repeat its nearest."""
    height, width = valid_Bhw.shape[1:]
    last_row, last_column = (valid_Bhw.any(dim=axis).sum(dim=1) - 1 for axis in (2, 1))
    rows = torch.minimum(torch.arange(height, device=maps.device), last_row[:, None])
    columns = torch.minimum(torch.arange(width, device=maps.device), last_column[:, None])
    maps = maps.gather(2, rows[:, None, :, None].expand_as(maps))
    return maps.gather(3, columns[:, None, None].expand_as(maps))


def convolve(maps_BShw: Tensor, weights_BPW: Tensor, boxes_BP4: Tensor) -> Tensor:
    """(B, P, h, w) logits of all instances at once.

    Relative places differ by instance but are linear in the place, so they go into the weights of
    the first convolution, and all instances of a photo read one input.
    """
    height, width = maps_BShw.shape[2:]
    (first, bias), *others = split_weights(weights_BPW)
    cell_B12 = 2 * maps_BShw[:, None, CHANNELS:, 0, 0]  # the first center is half a cell in
    box_BP4 = center_size(boxes_BP4)
    side_BP2 = torch.maximum(box_BP4[..., 2:], LEAST_SIDE * cell_B12)
    by_place = first[..., CHANNELS:] / side_BP2[:, :, None]
    bias = bias - (by_place * box_BP4[:, :, None, :2]).sum(-1)
    first = torch.cat([first[..., :CHANNELS], by_place], dim=-1)
    x = torch.einsum("bpos,bsx->bpox", first, maps_BShw.flatten(2)) + bias[..., None]
    for weight, bias in others:
        x = torch.einsum("bpoc,bpcx->bpox", weight, x.relu()) + bias[..., None]
    return x.reshape(*x.shape[:2], height, width)


def split_weights(weights_BPW: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(B, P, 169) -> (B, P, outputs, inputs) weight and (B, P, outputs) bias of each layer."""
    sizes = [size for inputs, outputs in LAYERS for size in (inputs * outputs, outputs)]
    parts = torch.split(weights_BPW, sizes, dim=-1)
    return [
        (weight.view(*weight.shape[:-1], outputs, inputs), bias)
        for (inputs, outputs), weight, bias in zip(LAYERS, parts[::2], parts[1::2], strict=True)
    ]


def paint(
    logits_HW: Tensor, share: Sequence[float], box: Sequence[float], size_px: tuple[int, int]
) -> BoolMask:
    """Turn the logits of one instance into a mask of the photo, at any size; within its box.

    Args:
        logits_HW: of `MaskBranch`, over the padded batch.
        share: of height and width of the padded batch that the photo covers.
        box: xyxy in [0, 1] of the photo.
        size_px: (height, width) of the mask.
    """
    height, width = size_px
    left, top = math.floor(box[0] * width), math.floor(box[1] * height)
    right, bottom = math.ceil(box[2] * width), math.ceil(box[3] * height)
    device = logits_HW.device
    x = (torch.arange(left, right, device=device) + 0.5) * (2 * share[1] / width) - 1
    y = (torch.arange(top, bottom, device=device) + 0.5) * (2 * share[0] / height) - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    read = F.grid_sample(
        logits_HW[None, None], places[None], padding_mode="border", align_corners=False
    )
    mask = np.zeros(size_px, dtype=np.bool_)
    mask[top:bottom, left:right] = (read[0, 0] > 0).cpu().numpy()
    return mask

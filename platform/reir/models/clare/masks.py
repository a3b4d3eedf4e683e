"""The optional mask branch of CLARE, as in CondInst (docs/clare.md, section 3.8).

A convolutional network computes a few feature maps of the photo. From the decoder state of an
instance, a controller generates the weights of three 1 x 1 convolutions. They read those maps and
the position of each cell relative to the instance's box, and predict which cells belong to the
instance. Masks are computed at stride 8 and returned at stride 4.
"""

# Shapes: B photos, h x w cells of the finest map (stride 8), D width, K decoder layers, N queries,
#         P instances whose masks are requested, C = 8 channels, S = C + 2

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
"""Numbers of input and output channels of the three convolutions of an instance. The two further
inputs of the first one are the relative coordinates."""

NUM_WEIGHTS = sum((inputs + 1) * outputs for inputs, outputs in LAYERS)  # 169
NUM_MAPS = 3
"""Number of maps that are read: those of stride 8, 16 and 32."""

LEAST_SIDE = 8
"""Relative coordinates are divided by the sides of the box, but by at least this number of cells:
in a tiny box they would become huge."""

UPSAMPLING = 2
"""Factor from the resolution at which masks are computed to that at which they are returned."""


@dataclass(frozen=True)
class MaskInputs:
    """The inputs from which the masks of B photos are computed.

    Attributes:
        maps: (B, S, h, w) float32: the channels, then x and y of the center of each cell,
            normalized to the photo. Cells in the padding repeat the nearest cell of the photo.
        states: (K, B, N, D) states of the decoder.
    """

    maps: Tensor
    states: Tensor


class MaskBranch(nn.Module):
    """Computes feature maps of the photo, and generates the convolutions of each instance."""

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
        """Return the inputs for masks; they do not depend on the padding of the batch."""
        sides = memory.grid.sides[:NUM_MAPS]
        levels = torch.split(memory.tokens, [h * w for h, w in memory.grid.sides], dim=1)
        valid = memory.grid.valid_maps()
        # From coarse to fine, so that fine maps contain what coarse ones know of larger parts.
        mixed: Tensor | None = None
        for level in reversed(range(NUM_MAPS)):
            x = levels[level].transpose(1, 2).reshape(len(valid[0]), -1, *sides[level])
            if mixed is not None:
                # Nearest, because each coarse cell then only reaches the four fine cells within it.
                # Those of the photo lie in a coarse cell of the photo, so no padding gets in.
                x = x + F.interpolate(mixed, scale_factor=2.0, mode="nearest")
            x = self.mixes[level](x.masked_fill(~valid[level][:, None], 0.0))
            mixed = self.norms[level](x, valid[level]).relu()
        channels_BChw = self.channels(mixed).float()
        maps = torch.cat([channels_BChw, cell_centers(memory.grid)], dim=1)
        return MaskInputs(repeat_edges(maps, valid[0]), states_KBND)

    def forward(self, maps_BShw: Tensor, states_BPD: Tensor, boxes_BP4: Tensor) -> Tensor:
        """Predict which cells belong to each instance.

        Args:
            maps_BShw: `maps` of `inputs`.
            states_BPD: decoder states of the requested instances.
            boxes_BP4: their boxes, xyxy, normalized to the photo; they get no gradients from masks.

        Returns:
            (B, P, 2h, 2w) float32 logits at stride 4.
        """
        weights = self.controller(states_BPD)
        # In float32, because bfloat16 cannot tell the coordinates of neighboring cells apart.
        with torch.autocast(maps_BShw.device.type, enabled=False):
            logits = convolve(maps_BShw, weights.float(), boxes_BP4.detach().float())
            return F.interpolate(logits, scale_factor=UPSAMPLING, mode="bilinear")

    def of_queries(self, inputs: MaskInputs, boxes_KBN4: Tensor, query_KBP: Tensor) -> Tensor:
        """Return (K, B, P, 2h, 2w) logits of some queries of each layer and photo."""
        layers, _, asked = query_KBP.shape
        row = query_KBP[..., None]
        states, boxes = (
            values.gather(2, row.expand(-1, -1, -1, values.shape[-1])).transpose(0, 1).flatten(1, 2)
            for values in (inputs.states, boxes_KBN4)
        )
        logits: Tensor = self(inputs.maps, states, boxes)
        return logits.view(-1, layers, asked, *logits.shape[2:]).transpose(0, 1)


def cell_centers(grid: TokenGrid) -> Tensor:
    """(B, 2, h, w) x and y of the cells of the finest map, normalized to the photo."""
    height, width = grid.sides[0]
    return grid.centers[:, : height * width].transpose(1, 2).reshape(-1, 2, height, width)


def repeat_edges(maps: Tensor, valid_Bhw: Tensor) -> Tensor:
    """Return (B, S, h, w) maps whose cells right of and below the photo repeat its nearest cell.

    Otherwise, upsampling would mix the padding into the masks along the border of the photo.
    """
    height, width = valid_Bhw.shape[1:]
    last_row, last_column = (valid_Bhw.any(dim=axis).sum(dim=1) - 1 for axis in (2, 1))
    rows = torch.minimum(torch.arange(height, device=maps.device), last_row[:, None])
    columns = torch.minimum(torch.arange(width, device=maps.device), last_column[:, None])
    maps = maps.gather(2, rows[:, None, :, None].expand_as(maps))
    return maps.gather(3, columns[:, None, None].expand_as(maps))


def convolve(maps_BShw: Tensor, weights_BPW: Tensor, boxes_BP4: Tensor) -> Tensor:
    """Return the (B, P, h, w) logits of all instances.

    The relative coordinates differ between instances, but they are linear in the coordinates of the
    photo. So scale and offset are moved into the weights and the bias of the first convolution, and
    all instances of a photo can read the same maps.
    """
    height, width = maps_BShw.shape[2:]
    (first, bias), *others = split_weights(weights_BPW)
    cell_B12 = 2 * maps_BShw[:, None, CHANNELS:, 0, 0]  # the first center is half a cell from 0
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
    """Turn the logits of one instance into a mask of the photo; outside its box, it is empty.

    Args:
        logits_HW: output of `MaskBranch`, which covers the padded batch.
        share: fractions of the height and the width of the padded batch that the photo covers.
        box: xyxy in [0, 1] of the photo.
        size_px: (height, width) of the mask, which may be any.
    """
    height, width = size_px
    left, top = math.floor(box[0] * width), math.floor(box[1] * height)
    right, bottom = math.ceil(box[2] * width), math.ceil(box[3] * height)
    device = logits_HW.device
    # Sampled at the centers of the pixels; only those in the box, which are few in a large photo.
    x = (torch.arange(left, right, device=device) + 0.5) * (2 * share[1] / width) - 1
    y = (torch.arange(top, bottom, device=device) + 0.5) * (2 * share[0] / height) - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    read = F.grid_sample(
        logits_HW[None, None], places[None], padding_mode="border", align_corners=False
    )
    mask = np.zeros(size_px, dtype=np.bool_)
    mask[top:bottom, left:right] = (read[0, 0] > 0).cpu().numpy()  # a probability above one half
    return mask

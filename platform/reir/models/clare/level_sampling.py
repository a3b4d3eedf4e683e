"""Weighted bilinear samples of a feature pyramid, by the way that the device is fast at."""

# Shapes: B images, T tokens of all levels, Q queries, D width, L levels, H heads, P points,
#         E = D / H

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_levels(
    value_BTHE: Tensor,
    sides: Sequence[tuple[int, int]],
    locations_BQHLP2: Tensor,
    weights_BQHLP: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of all levels.

    Args:
        value_BTHE: what is sampled, by head.
        sides: (height, width) of each map in cells.
        locations_BQHLP2: x and y as shares of the padded map; outside it a sample is 0.
        weights_BQHLP: weight of each sample.

    Returns:
        (B, Q, D) float32.
    """
    # bfloat16 cannot tell neighboring cells apart, so places and samples are float32
    value, locations, weights = (
        x if x.dtype == torch.float64 else x.float()
        for x in (value_BTHE, locations_BQHLP2, weights_BQHLP)
    )
    sample = sum_cells if value.device.type == "cpu" else sum_samples
    return sample(value, sides, locations, weights)


def sum_samples(
    value_BTHE: Tensor, sides: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """As `sample_levels`, by sampling every map; what GPUs are fast at."""
    num_images, num_queries, num_heads = locations.shape[:3]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    weights = weights.transpose(1, 2).flatten(0, 1)
    maps = value_BTHE.permute(0, 2, 3, 1).flatten(0, 1)  # (B*H, E, T)
    total = maps.new_zeros(len(maps), maps.shape[1], num_queries)
    levels = torch.split(maps, [height * width for height, width in sides], dim=-1)
    for level, (cells, side) in enumerate(zip(levels, sides, strict=True)):
        samples = F.grid_sample(
            cells.view(*cells.shape[:2], *side),
            grids[:, :, level],
            mode="bilinear",
            align_corners=False,
        )
        total = total + (samples * weights[:, None, :, level]).sum(dim=-1)
    by_head = total.view(num_images, num_heads, -1, num_queries)
    return by_head.permute(0, 3, 1, 2).flatten(2)


def sum_cells(
    value_BTHE: Tensor, sides: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """As `sample_levels`, by one weighted sum over the cells around all places of a query.

    Whole rows of E numbers are read and nothing is kept of the samples, which a CPU does several
    times as fast as sampling each channel's map.
    """
    num_images, num_tokens, num_heads = value_BTHE.shape[:3]
    sides_L2 = locations.new_tensor([(width, height) for height, width in sides])[:, None]
    num_cells_L1 = sides_L2.prod(dim=-1)
    first_cell_L1 = num_cells_L1.cumsum(dim=0) - num_cells_L1
    places = locations * sides_L2 - 0.5
    low = places.detach().floor()
    columns, column_shares = _neighbors(places[..., 0], low[..., 0], sides_L2[..., 0])
    rows, row_shares = _neighbors(places[..., 1], low[..., 1], sides_L2[..., 1])
    photo = torch.arange(num_images, dtype=torch.int32)[:, None, None, None, None]
    head = torch.arange(num_heads, dtype=torch.int32)[:, None, None]
    indices, shares = [], []
    for row, row_share in zip(rows, row_shares, strict=True):
        row_start, row_share = row * sides_L2[..., 0] + first_cell_L1, row_share * weights
        for column, column_share in zip(columns, column_shares, strict=True):
            cell = (row_start + column).to(torch.int32)
            indices.append((photo * num_tokens + cell) * num_heads + head)
            shares.append(row_share * column_share)
    bags = math.prod(locations.shape[:3])
    read = F.embedding_bag(
        torch.stack(indices, dim=-1).view(bags, -1),
        value_BTHE.reshape(-1, value_BTHE.shape[-1]),
        mode="sum",
        per_sample_weights=torch.stack(shares, dim=-1).view(bags, -1),
    )
    return read.view(*locations.shape[:2], -1)


def _neighbors(
    places: Tensor, low: Tensor, side: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cells before and after each place along one axis, moved onto the map; their shares.

    A cell beyond the map has a share of 0.
    """
    after = places - low
    shares = (1 - after) * ((low >= 0) & (low < side)), after * ((low >= -1) & (low < side - 1))
    cells = low.clamp(min=0).minimum(side - 1), (low + 1).clamp(min=0).minimum(side - 1)
    return cells, shares

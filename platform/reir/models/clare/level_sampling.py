"""Weighted sums of bilinear samples of a feature pyramid, in a way that suits the device.

GPUs sample every map with `grid_sample` (`sum_samples`). On a CPU, `grid_sample` reads the map of
each channel separately, so a sum over the cells around the points is used there (`sum_cells`), in
which all channels of a cell are read at once.
"""

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
    """Return the weighted sum of bilinear samples of all levels.

    Args:
        value_BTHE: the features to sample, by head.
        sides: (height, width) of each map in cells.
        locations_BQHLP2: x and y of the points, normalized to the padded map; outside it, a sample
            is 0.
        weights_BQHLP: weight of each sample.

    Returns:
        (B, Q, D) float32.
    """
    # In float32, because bfloat16 coordinates cannot tell neighboring cells apart. float64, with
    # which tests compare gradients, stays.
    value, locations, weights = (
        x if x.dtype == torch.float64 else x.float()
        for x in (value_BTHE, locations_BQHLP2, weights_BQHLP)
    )
    sample = sum_cells if value.device.type == "cpu" else sum_samples
    return sample(value, sides, locations, weights)


def sum_samples(
    value_BTHE: Tensor, sides: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Implement `sample_levels` by `grid_sample` on every map, which is fast on GPUs."""
    num_images, num_queries, num_heads = locations.shape[:3]
    # `grid_sample` takes coordinates in [-1, 1]. Heads become photos of the batch, since each head
    # has points of its own.
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    weights = weights.transpose(1, 2).flatten(0, 1)
    maps = value_BTHE.permute(0, 2, 3, 1).flatten(0, 1)  # (B*H, E, T)
    # Added level by level, so that memory holds the samples of one level only.
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
    """Implement `sample_levels` by one weighted sum over the cells around all points of a query.

    It reads whole rows of E numbers and does not store the samples. On a CPU, this is several times
    as fast as sampling the map of each channel.
    """
    num_images, num_tokens, num_heads = value_BTHE.shape[:3]
    sides_L2 = locations.new_tensor([(width, height) for height, width in sides])[:, None]
    num_cells_L1 = sides_L2.prod(dim=-1)
    first_cell_L1 = num_cells_L1.cumsum(dim=0) - num_cells_L1
    places = locations * sides_L2 - 0.5  # in cells; the center of the first cell is 0
    low = places.detach().floor()
    columns, column_shares = _neighbors(places[..., 0], low[..., 0], sides_L2[..., 0])
    rows, row_shares = _neighbors(places[..., 1], low[..., 1], sides_L2[..., 1])
    photo = torch.arange(num_images, dtype=torch.int32)[:, None, None, None, None]
    head = torch.arange(num_heads, dtype=torch.int32)[:, None, None]
    indices, shares = [], []
    for row, row_share in zip(rows, row_shares, strict=True):
        row_start, row_share = row * sides_L2[..., 0] + first_cell_L1, row_share * weights
        for column, column_share in zip(columns, column_shares, strict=True):
            # int32 is enough for `embedding_bag`, and takes half the memory of int64.
            cell = (row_start + column).to(torch.int32)
            indices.append((photo * num_tokens + cell) * num_heads + head)
            shares.append(row_share * column_share)
    # One bag per query and head: it sums four cells for each of the L * P points.
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
    """Return the cells before and after each point along one axis, and their bilinear weights.

    A cell beyond the map gets a weight of 0, and the index of a cell on the map.
    """
    after = places - low
    shares = (1 - after) * ((low >= 0) & (low < side)), after * ((low >= -1) & (low < side - 1))
    cells = low.clamp(min=0).minimum(side - 1), (low + 1).clamp(min=0).minimum(side - 1)
    return cells, shares

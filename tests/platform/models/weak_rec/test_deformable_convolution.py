"""Deformable convolution against a slow loop, and against a plain convolution."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.models.weak_rec.deformable_convolution import DeformableConvolution


def random_layer(channels: int = 6, groups: int = 3) -> DeformableConvolution:
    torch.manual_seed(0)
    return DeformableConvolution(channels, groups).double()


def value_at(plane: Tensor, y: float, x: float) -> float:
    """Interpolate between the four cells around a point; cells outside the map are 0."""
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                total += weight * plane[row, column].item()
    return total


def slow(layer: DeformableConvolution, x: Tensor, offsets: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    assert layer.bias is not None
    out = layer.bias.detach()[None, :, None, None].repeat(batch, 1, height, width)
    for b in range(batch):
        for c in range(channels):
            group = c // (channels // groups)
            for i in range(height):
                for j in range(width):
                    for tap in range(9):
                        at = 18 * group + 2 * tap
                        dy, dx = offsets[b, at, i, j].item(), offsets[b, at + 1, i, j].item()
                        y, x_ = i + tap // 3 - 1 + dy, j + tap % 3 - 1 + dx
                        read = value_at(x[b, c], y, x_)
                        out[b, :, i, j] += layer.weight[:, c, tap // 3, tap % 3].detach() * read
    return out


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale", [0.3, 5.0], ids=["near", "beyond the map"])
def test_equals_the_loop(groups: int, scale: float) -> None:
    layer = random_layer(groups=groups)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    offsets = torch.randn(2, groups * 18, 4, 5, dtype=torch.float64) * scale
    torch.testing.assert_close(layer(x, offsets), slow(layer, x, offsets, groups))


def test_without_offsets_it_is_a_convolution() -> None:
    layer, x = random_layer(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, x.new_zeros(2, 54, 5, 4)), plain)


def test_maps_of_one_cell() -> None:
    layer, x = random_layer(), torch.randn(1, 6, 1, 1, dtype=torch.float64)
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, x.new_zeros(1, 54, 1, 1)), plain)

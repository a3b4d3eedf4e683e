"""What the transformer of `clare-nano` knows about boxes: places, sizes, and pairs of them."""

# Shapes: B photos, T boxes

from __future__ import annotations

import torch
from torch import Tensor

GEOMETRY_FEATURES = 13
PAIR_FEATURES = 8


def box_geometry(boxes: Tensor, objectness: Tensor, aspect: Tensor) -> Tensor:
    """(B, T, 13) position, size and shape of each box, and the photo's aspect ratio."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    # Padding has sides of 0, of which there is no logarithm.
    w, h = (x2 - x1).clamp(min=1e-4), (y2 - y1).clamp(min=1e-4)
    photo = aspect[:, None].expand_as(x1)
    shape = (w / h).log() + photo  # in pixels: w and h are relative to sides of different lengths
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    parts = [x1, y1, x2, y2, cx, cy, w, h, (w * h).sqrt(), (w * h).log() / 4, shape, photo]
    return torch.stack([*parts, objectness], dim=-1)


def pair_geometry(boxes: Tensor) -> Tensor:
    """(B, T, T, 8) position and size of each box relative to each other box."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    w, h = (x2 - x1).clamp(min=1e-3), (y2 - y1).clamp(min=1e-3)

    def between(value: Tensor) -> Tensor:
        return value[:, None, :] - value[:, :, None]

    dx, dy = between(cx), between(cy)
    overlap_w = torch.minimum(x2[:, None], x2[:, :, None]) - torch.maximum(
        x1[:, None], x1[:, :, None]
    )
    overlap_h = torch.minimum(y2[:, None], y2[:, :, None]) - torch.maximum(
        y1[:, None], y1[:, :, None]
    )
    inside = overlap_w.clamp(min=0) * overlap_h.clamp(min=0) / (w * h)[:, :, None]
    # Next to a tiny box, distances in units of its sides would outweigh all other features.
    relative = [(dx / w[:, :, None]).clamp(-8, 8) / 4, (dy / h[:, :, None]).clamp(-8, 8) / 4]
    sizes = [between(w.log()) / 2, between(h.log()) / 2]
    distance = (dx.square() + dy.square() + 1e-6).sqrt()  # at 0, the gradient would be infinite
    return torch.stack([dx, dy, distance, inside, *relative, *sizes], dim=-1)

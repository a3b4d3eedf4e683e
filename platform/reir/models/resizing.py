"""Photos and parts of photos at another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reir.models.seams import RgbImage


def resize(image: RgbImage, height_px: int, width_px: int) -> Tensor:
    """Resize with a bilinear filter that takes in every pixel of the original.

    Within one level what Pillow's `resize` gives, in a third of the time.

    Args:
        image: may be a part of a larger one.
        height_px, width_px: the new size.

    Returns:
        (height_px, width_px, 3) uint8.
    """
    # torch warns of arrays that must not be written to
    pixels = torch.from_numpy(image if image.flags.writeable else image.copy())
    one = pixels.permute(2, 0, 1)[None]
    size = (height_px, width_px)
    return F.interpolate(one, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)

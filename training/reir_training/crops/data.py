"""The pixels that the crop network is trained on: randomly changed crops of candidates."""

# Shapes: B photos, K candidates, N pictures, s side of a crop and S side of a photo in pixels

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reir.models.nano.candidates import crop_boxes
from reir.models.nano.model import ClareNanoConfig
from reir.models.resizing import resize
from reir.records import FloatArray, RgbImage
from reir_training.nano.batches import NanoBatch

SHIFT, SCALE = 0.07, 0.15
"""The largest shift of a box, and the largest change of its sides, as shares of its sides."""
MARGINS = (0.05, 0.2)
"""The smallest and the largest margin around a box, as shares of its sides."""
CONTRAST, BRIGHTNESS = 0.15, 12.0
"""Standard deviations of random changes of the pixels."""
COVERED_SHARE, COVERED_SIDE = 0.25, 0.45
"""Share of the crops in which a rectangle is covered, and its longest side in sides of a crop."""
MIDDLE_GRAY = 127


@dataclass
class CropBatch:
    """The input of one step.

    Attributes:
        step: the batch as for a frozen crop network, with the features of its cache.
        crops: (B, K, s, s, 3) uint8 crops of the candidates; black where there is none.
        scenes: (B, S, S, 3) uint8 whole photos.
    """

    step: NanoBatch
    crops: Tensor
    scenes: Tensor

    def to(self, device: torch.device | str) -> CropBatch:
        """Return the batch on a device."""
        return CropBatch(self.step.to(device), self.crops.to(device), self.scenes.to(device))


def plain_pixels(
    photo: RgbImage, boxes: FloatArray, config: ClareNanoConfig
) -> tuple[Tensor, Tensor]:
    """Return what the crop network sees of a photo when it is indexed.

    Args:
        photo: upright RGB.
        boxes: (K, 4) xyxy in [0, 1] of its candidates.
        config: of the model.

    Returns:
        (K, s, s, 3) crops and the (S, S, 3) photo, uint8.
    """
    crops = crop_boxes(photo, boxes, config.crop_px, config.crop_margin)
    return crops, resize(photo, config.scene_px, config.scene_px)


def changed_pixels(
    photo: RgbImage, boxes: FloatArray, config: ClareNanoConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return the same as `plain_pixels`, with random changes.

    Boxes move, and their margin changes; half of the crops are mirrored; a rectangle of some is
    covered; contrast and brightness change. Colors do not, because expressions name them.
    """
    margin = float(rng.uniform(*MARGINS))
    crops = crop_boxes(photo, _moved(boxes, rng), config.crop_px, margin)
    # Each crop by itself: the model uses the same features of a crop for the mirror image of
    # the photo (`CandidateBatch.mirror`), so they must fit both.
    mirrored = torch.from_numpy(rng.random(len(crops)) < 0.5)
    crops = torch.where(mirrored[:, None, None, None], crops.flip(2), crops)
    for i in np.flatnonzero(rng.random(len(crops)) < COVERED_SHARE):
        _cover(crops[i], rng)
    # Not mirrored: for the mirror image, `CropObjective` flips the grid of its features instead.
    scene = resize(photo, config.scene_px, config.scene_px)
    return _recolored(crops, rng), _recolored(scene[None], rng)[0]


def _moved(boxes: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return (K, 4) boxes that are shifted and resized at random."""
    size = boxes[:, 2:] - boxes[:, :2]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2 + size * rng.uniform(-SHIFT, SHIFT, size.shape)
    half = size / 2 * (1 + rng.uniform(-SCALE, SCALE, size.shape))
    moved = np.concatenate([center - half, center + half], axis=1).clip(0, 1)
    return np.asarray(moved, dtype=np.float32)


def _cover(crop: Tensor, rng: np.random.Generator) -> None:
    """Cover a random rectangle of an (s, s, 3) crop with gray, in place."""
    side = crop.shape[0]
    height, width = (rng.uniform(0.15, COVERED_SIDE, 2) * side).astype(int).tolist()
    top, left = rng.integers(0, side - height), rng.integers(0, side - width)
    crop[top : top + height, left : left + width] = MIDDLE_GRAY


def _recolored(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Change contrast and brightness of each of (N, s, s, 3) pictures at random."""
    contrast, brightness = rng.normal(0, 1, (2, len(pixels), 1))
    levels = (np.arange(256) - MIDDLE_GRAY) * (1 + CONTRAST * contrast) + MIDDLE_GRAY
    # One table for all three channels, because different ones would change the color of the crop.
    table = torch.from_numpy((levels + BRIGHTNESS * brightness).clip(0, 255).astype(np.uint8))
    # A table of 256 gray levels takes half the time of arithmetic with every pixel.
    return torch.stack(
        [
            row.index_select(0, picture.flatten().int()).view_as(picture)
            for row, picture in zip(table, pixels, strict=True)
        ]
    )

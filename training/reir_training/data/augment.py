"""Augmentation: photos are mirrored, cropped and resized (docs/clare.md, section 5.3).

An `AugmentedView` describes one random augmentation. It is drawn before any pixels are touched, so
mirroring, cropping and resizing resample the pixels only once, and boxes, masks and expressions are
transformed by the same description.
"""

# Shapes: H x W pixels, N boxes, h x w cells of a view

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image
from pydantic import Field

from reir.config import StrictConfig
from reir.images.decode import fitted_size
from reir.images.rle import BoolMask
from reir.records import FloatArray, RgbImage
from reir.text import has_ordinal, swap_left_right


class Augmentation(StrictConfig):
    """Settings of the augmentation, in pixels. The defaults are those of the published runs.

    Attributes:
        short_sides: lengths from which the shorter side is drawn.
        long_side: maximum length of the longer side.
        crop_short_sides: lengths from which the shorter side is drawn before cropping.
        crop_sides: minimum and maximum length of each side of the crop.
        crop_probability: probability of cropping; a photo with an ordinal in an expression is never
            cropped, because cropping could change the count.
        mirror_probability: probability of mirroring left and right.
    """

    short_sides: tuple[int, ...] = Field(tuple(range(480, 801, 32)), min_length=1)
    long_side: int = Field(1333, ge=1)
    crop_short_sides: tuple[int, ...] = Field((400, 500, 600), min_length=1)
    crop_sides: tuple[int, int] = (384, 600)
    crop_probability: float = Field(0.5, ge=0, le=1)
    mirror_probability: float = Field(0.5, ge=0, le=1)


@dataclass(frozen=True)
class AugmentedView:
    """A mirrored, cropped and resized version of a photo.

    Attributes:
        region_px: xyxy of the cropped part, in pixels of the upright photo.
        width_px, height_px: size after resizing.
        mirrored: whether left and right are swapped.
    """

    region_px: tuple[float, float, float, float]
    width_px: int
    height_px: int
    mirrored: bool = False


def draw_view(
    width_px: float,
    height_px: float,
    rng: np.random.Generator,
    settings: Augmentation,
    expressions: Sequence[str] = (),
) -> AugmentedView:
    """Draw a view of a photo of this size, or of a crop of it, which has these expressions."""
    mirrored = bool(rng.random() < settings.mirror_probability)
    cuts = bool(rng.random() < settings.crop_probability)
    region = (0.0, 0.0, float(width_px), float(height_px))
    if cuts and not any(map(has_ordinal, expressions)):
        region = _draw_region(width_px, height_px, rng, settings)
    short_side = int(rng.choice(settings.short_sides))
    width, height = fitted_size(
        region[2] - region[0], region[3] - region[1], short_side, settings.long_side
    )
    return AugmentedView(region, width, height, mirrored)


def _draw_region(
    width_px: float, height_px: float, rng: np.random.Generator, settings: Augmentation
) -> tuple[float, float, float, float]:
    """Draw a crop whose sides, in the photo resized for cropping, are within `crop_sides`."""
    short_side = int(rng.choice(settings.crop_short_sides))
    scale = short_side / min(width_px, height_px)
    least, most = settings.crop_sides
    width, height = (
        rng.uniform(min(least, whole), min(most, whole)) / scale
        for whole in (width_px * scale, height_px * scale)
    )
    # `crop_sides` apply to the resized photo; the crop itself is in pixels of the original one.
    left, top = rng.uniform(0, width_px - width), rng.uniform(0, height_px - height)
    return float(left), float(top), float(left + width), float(top + height)


def apply_view(image: RgbImage, view: AugmentedView) -> RgbImage:
    """Resample the pixels: (H, W, 3) uint8 -> (height_px, width_px, 3) uint8."""
    # `box` may have fractions of pixels, so that the transformed boxes fit the pixels exactly.
    seen = Image.fromarray(image).resize(
        (view.width_px, view.height_px), Image.Resampling.BILINEAR, box=view.region_px
    )
    pixels = np.asarray(seen)
    return np.ascontiguousarray(pixels[:, ::-1] if view.mirrored else pixels)


def boxes_in(view: AugmentedView, boxes_px: FloatArray) -> FloatArray:
    """Transform (N, 4) xyxy in pixels of the photo to xyxy in [0, 1] of the view, clipped.

    A box outside of the view keeps its row and has no area.
    """
    x1, y1, x2, y2 = view.region_px
    size = np.array([x2 - x1, y2 - y1] * 2)
    inside: FloatArray = np.clip((np.asarray(boxes_px) - [x1, y1, x1, y1]) / size, 0, 1)
    if view.mirrored:
        inside = np.stack([1 - inside[:, 2], inside[:, 1], 1 - inside[:, 0], inside[:, 3]], axis=1)
    return inside.astype(np.float32)


def mask_in(
    view: AugmentedView, mask: BoolMask, size_px: tuple[int, int], stride_px: int
) -> BoolMask:
    """Transform a (H, W) mask of a photo to a (h, w) mask of the view, sampled at cell centers.

    Args:
        view: view of the photo.
        mask: mask of the whole photo, at any resolution.
        size_px: width and height of the photo.
        stride_px: side of a cell, in pixels of the view. A last cell whose center is outside of
            the view is False.
    """
    across, down = (np.arange(stride_px / 2, n, stride_px) for n in (view.width_px, view.height_px))
    if view.mirrored:
        # Look up the cells from right to left, instead of mirroring the mask.
        across = view.width_px - across
    x1, y1, x2, y2 = view.region_px
    columns = (x1 + across * ((x2 - x1) / view.width_px)) * (mask.shape[1] / size_px[0])
    rows = (y1 + down * ((y2 - y1) / view.height_px)) * (mask.shape[0] / size_px[1])
    seen = mask[np.ix_(rows.astype(np.int64), columns.astype(np.int64))]
    sides = (-(-view.height_px // stride_px), -(-view.width_px // stride_px))
    return np.pad(seen, [(0, side - got) for side, got in zip(sides, seen.shape, strict=True)])


def shrink_boxes_to_masks(
    view: AugmentedView,
    boxes_px: FloatArray,
    masks: Sequence[BoolMask | None],
    size_px: tuple[int, int],
) -> FloatArray:
    """Return the (N, 4) boxes of a photo, shrunk to the visible parts of their masks.

    The visible part of a mask is the part in the view (docs/clare.md, section 3.8). A box without a
    mask is unchanged. If no part of a mask is visible, its box gets no area.
    """
    out = np.array(boxes_px)
    for box, mask in zip(out, masks, strict=True):
        if mask is not None:
            extent = _visible_extent(view, mask, size_px)
            # The box is only ever shrunk: annotated boxes have fractions of pixels, masks do not.
            box[:2] = np.maximum(box[:2], extent[:2])
            box[2:] = np.maximum(box[:2], np.minimum(box[2:], extent[2:]))
    return out


def _visible_extent(view: AugmentedView, mask: BoolMask, size_px: tuple[int, int]) -> FloatArray:
    """Return (4,) xyxy, in pixels of the photo, of the visible part of a mask; zeros if none."""
    scale = np.tile(np.array(mask.shape[::-1]) / size_px, 2)
    x1, y1, x2, y2 = np.array(view.region_px) * scale
    left, top = int(x1), int(y1)
    part = mask[top : ceil(y2), left : ceil(x2)]
    columns, rows = (np.flatnonzero(part.any(axis)) for axis in (0, 1))
    if not len(rows):
        return np.zeros(4, np.float32)
    extent = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    return np.asarray(np.array(extent) / scale, dtype=np.float32)


def text_in(view: AugmentedView, text: str) -> str:
    """Adapt an expression to the view: "left" and "right" are swapped if it is mirrored."""
    return swap_left_right(text) if view.mirrored else text

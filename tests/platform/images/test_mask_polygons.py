"""Outlines against the masks that they are of."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from reir.images.mask_polygons import outlines
from reir.images.rle import BoolMask, encode

SCALE = 8


def filled(polygons: list[list[tuple[float, float]]], height: int, width: int) -> BoolMask:
    """Fill polygons by the even-odd rule at a larger scale and look at the middles of pixels."""
    canvas = Image.new("1", (width * SCALE, height * SCALE))
    for polygon in polygons:
        layer = Image.new("1", canvas.size)
        corners = [(x * width * SCALE - 0.5, y * height * SCALE - 0.5) for x, y in polygon]
        ImageDraw.Draw(layer).polygon(corners, fill=1)
        canvas = ImageChops.logical_xor(canvas, layer)
    found: BoolMask = np.asarray(canvas)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
    return found


def test_a_box_has_four_corners() -> None:
    mask = np.zeros((20, 40), dtype=bool)
    mask[5:15, 10:30] = True
    (polygon,) = outlines(encode(mask))
    assert sorted(polygon) == [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]


def test_holes_and_parts_are_polygons_of_their_own() -> None:
    mask = np.zeros((30, 30), dtype=bool)
    mask[2:28, 2:20] = True
    mask[8:20, 6:14] = False
    mask[10:14, 24:29] = True
    polygons = outlines(encode(mask))
    assert len(polygons) == 3
    assert (filled(polygons, 30, 30) == mask).all()


def test_pixels_that_touch_at_a_corner_are_apart() -> None:
    mask = np.zeros((12, 12), dtype=bool)
    mask[1:6, 1:6] = mask[6:11, 6:11] = True
    assert len(outlines(encode(mask))) == 2


def test_no_mask_has_no_outline() -> None:
    assert outlines(encode(np.zeros((5, 5), dtype=bool))) == []


@pytest.mark.parametrize("seed", range(5))
def test_filled_outlines_give_the_mask_back(seed: int) -> None:
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:80, :100]
    mask = np.zeros((80, 100), dtype=bool)
    for _ in range(4):
        (cx, cy), radius = random.uniform(20, 80, 2), random.uniform(8, 25)
        mask ^= (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    polygons = outlines(encode(mask))
    assert sum(map(len, polygons)) < 400
    changed = filled(polygons, 80, 100) != mask
    border = np.zeros_like(mask)
    for axis in (0, 1):
        for shift in (-1, 1):
            border |= np.roll(mask, shift, axis) != mask
    assert changed.mean() < 0.02
    assert not (changed & ~border).any()

"""Augmentation: pixels, boxes, masks and words are transformed consistently."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import ConfigError
from reir_training.data.augment import (
    Augmentation,
    AugmentedView,
    apply_view,
    boxes_in,
    draw_view,
    mask_in,
    shrink_boxes_to_masks,
    text_in,
)

SMALL = Augmentation(
    short_sides=(48, 64), long_side=100, crop_short_sides=(60, 80), crop_sides=(30, 60)
)


@given(width=st.integers(20, 900), height=st.integers(20, 900), seed=st.integers(0, 10**6))
def test_views_are_within_their_bounds(width: int, height: int, seed: int) -> None:
    view = draw_view(width, height, np.random.default_rng(seed), SMALL)
    x1, y1, x2, y2 = view.region_px
    assert 0 <= x1 < x2 <= width + 1e-6
    assert 0 <= y1 < y2 <= height + 1e-6
    assert max(view.width_px, view.height_px) <= SMALL.long_side
    wide_enough = max(view.width_px, view.height_px) == SMALL.long_side
    assert min(view.width_px, view.height_px) in SMALL.short_sides or wide_enough
    aspect = (x2 - x1) / (y2 - y1)
    assert view.width_px == pytest.approx(view.height_px * aspect, abs=1 + aspect)


@given(seed=st.integers(0, 10**6))
def test_crops_have_sides_within_the_bounds(seed: int) -> None:
    always = SMALL.model_copy(update={"crop_probability": 1.0, "crop_short_sides": (80,)})
    view = draw_view(160, 80, np.random.default_rng(seed), always)
    x1, y1, x2, y2 = view.region_px
    assert 30 <= x2 - x1 <= 60
    assert 30 <= y2 - y1 <= 60


def test_photos_are_cropped_and_mirrored_with_the_given_probability() -> None:
    rng = np.random.default_rng(0)
    settings = SMALL.model_copy(update={"crop_probability": 0.25, "mirror_probability": 0.75})
    views = [draw_view(200, 120, rng, settings) for _ in range(2000)]
    cut = np.mean([view.region_px != (0, 0, 200, 120) for view in views])
    assert cut == pytest.approx(0.25, abs=0.04)
    assert np.mean([view.mirrored for view in views]) == pytest.approx(0.75, abs=0.04)


def test_photos_with_ordinals_are_not_cropped() -> None:
    always = SMALL.model_copy(update={"crop_probability": 1.0})
    rng = np.random.default_rng(0)
    for _ in range(50):
        texts = ["a red cup", "the second cup from the left"]
        assert draw_view(200, 120, rng, always, texts).region_px == (0, 0, 200, 120)
        assert draw_view(200, 120, rng, always, texts[:1]).region_px != (0, 0, 200, 120)


@given(seed=st.integers(0, 10**6))
def test_boxes_follow_the_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.zeros((120, 200, 3), np.uint8)
    x1, y1 = rng.integers(0, 150), rng.integers(0, 80)
    x2, y2 = x1 + rng.integers(20, 50), y1 + rng.integers(20, 40)
    image[y1:y2, x1:x2] = 255
    view = draw_view(200, 120, rng, SMALL)
    pixels = apply_view(image, view)
    assert pixels.shape == (view.height_px, view.width_px, 3)
    (box,) = boxes_in(view, np.array([[x1, y1, x2, y2]], np.float32))
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    if (box[2:] - box[:2] > 0.1).all():
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        expected = box * ([view.width_px, view.height_px] * 2)
        np.testing.assert_allclose(found, expected, atol=2)


def test_boxes_by_hand() -> None:
    view = AugmentedView((10, 20, 110, 70), 200, 100)
    boxes = np.array([[10, 20, 60, 45], [0, 0, 5, 5], [60, 45, 300, 300]], np.float32)
    expected = np.array([[0, 0, 0.5, 0.5], [0, 0, 0, 0], [0.5, 0.5, 1, 1]])
    np.testing.assert_allclose(boxes_in(view, boxes), expected)
    turned = AugmentedView(view.region_px, 200, 100, mirrored=True)
    expected = np.array([[0.5, 0, 1, 0.5], [1, 0, 1, 0], [0, 0.5, 0.5, 1]])
    np.testing.assert_allclose(boxes_in(turned, boxes), expected)
    assert boxes_in(view, np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_left_and_right_are_swapped_in_mirrored_views() -> None:
    view = AugmentedView((0, 0, 10, 10), 10, 10)
    assert text_in(view, "left of the bus") == "left of the bus"
    turned = AugmentedView((0, 0, 10, 10), 10, 10, mirrored=True)
    assert text_in(turned, "left of the bus") == "right of the bus"


def test_invalid_settings_are_refused() -> None:
    from reir.config import load_config

    with pytest.raises(ConfigError, match="mirror_probability"):
        load_config(Augmentation, {"mirror_probability": 2})


# ------------------------------------------------------------------------------------------- masks


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1, 2]))
def test_masks_are_sampled_at_cell_centers(seed: int, scale: int) -> None:
    """Each cell has the value of the mask at its center, for any view and mask resolution."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(30, 90, size=2).tolist()
    coarse = rng.random((height, width)) < 0.5
    mask = coarse.repeat(scale, 0).repeat(scale, 1)
    view = draw_view(width, height, rng, SMALL)
    got = mask_in(view, mask, (width, height), 4)
    assert got.shape == (-(-view.height_px // 4), -(-view.width_px // 4))
    x1, y1, x2, y2 = view.region_px
    for row, column in rng.integers(0, got.shape, size=(20, 2)).tolist():
        x, y = 4 * column + 2, 4 * row + 2
        if x >= view.width_px or y >= view.height_px:
            assert not got[row, column]
            continue
        u = (1 - x / view.width_px) if view.mirrored else x / view.width_px
        at = (y1 + y / view.height_px * (y2 - y1), x1 + u * (x2 - x1))
        if min(abs(each - round(each)) for each in at) > 1e-6:  # not between two pixels
            assert got[row, column] == coarse[int(at[0]), int(at[1])]


def test_masks_follow_the_pixels() -> None:
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:40, 20:70] = True
    pixels = np.where(mask[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    for seed in range(20):
        view = draw_view(90, 60, np.random.default_rng(seed), SMALL)
        seen = apply_view(pixels, view)[2::4, 2::4, 0]
        got = mask_in(view, mask, (90, 60), 4)[: seen.shape[0], : seen.shape[1]]
        assert ((seen > 127) == got).mean() > 0.93  # but for cells on the edge


def test_boxes_shrink_to_the_visible_part_of_their_masks() -> None:
    """A mask like an L: its upper half is narrow."""
    mask = np.zeros((100, 100), dtype=bool)
    mask[20:80, 10:20] = mask[60:80, 10:70] = True
    boxes = np.array([[10.25, 20, 69.5, 80]] * 2, dtype=np.float32)
    whole, upper, beside = (
        AugmentedView(region, 64, 64)
        for region in ((0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 50.0), (30.0, 0.0, 90.0, 50.0))
    )
    for view, want in (
        (whole, [10.25, 20, 69.5, 80]),
        (upper, [10.25, 20, 20, 50]),
        (beside, None),
    ):
        got = shrink_boxes_to_masks(view, boxes, [mask, None], (100, 100))
        np.testing.assert_array_equal(got[1], boxes[1])
        if want is None:
            assert (got[0, 2:] <= got[0, :2]).any()
        else:
            np.testing.assert_allclose(got[0], want)
    half = mask[::2, ::2]
    np.testing.assert_allclose(
        shrink_boxes_to_masks(upper, boxes[:1], [half], (100, 100))[0], [10.25, 20, 20, 50]
    )

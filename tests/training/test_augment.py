"""Views of photos: pixels, boxes and words stay together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import ConfigError
from reir_training.augment import Augmentation, View, boxes_in, draw_view, see, text_in

SMALL = Augmentation(
    short_sides=(48, 64), long_side=100, crop_short_sides=(60, 80), crop_sides=(30, 60)
)


@given(width=st.integers(20, 900), height=st.integers(20, 900), seed=st.integers(0, 10**6))
def test_views_obey_their_bounds(width: int, height: int, seed: int) -> None:
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
def test_a_part_has_sides_between_the_bounds(seed: int) -> None:
    always = SMALL.model_copy(update={"crop_probability": 1.0, "crop_short_sides": (80,)})
    view = draw_view(160, 80, np.random.default_rng(seed), always)
    x1, y1, x2, y2 = view.region_px
    assert 30 <= x2 - x1 <= 60
    assert 30 <= y2 - y1 <= 60


def test_photos_are_cut_and_mirrored_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    settings = SMALL.model_copy(update={"crop_probability": 0.25, "mirror_probability": 0.75})
    views = [draw_view(200, 120, rng, settings) for _ in range(2000)]
    cut = np.mean([view.region_px != (0, 0, 200, 120) for view in views])
    assert cut == pytest.approx(0.25, abs=0.04)
    assert np.mean([view.mirrored for view in views]) == pytest.approx(0.75, abs=0.04)


def test_where_an_expression_counts_nothing_is_cut_away() -> None:
    always = SMALL.model_copy(update={"crop_probability": 1.0})
    rng = np.random.default_rng(0)
    for _ in range(50):
        texts = ["a red cup", "the second cup from the left"]
        assert draw_view(200, 120, rng, always, texts).region_px == (0, 0, 200, 120)
        assert draw_view(200, 120, rng, always, texts[:1]).region_px != (0, 0, 200, 120)


@given(seed=st.integers(0, 10**6))
def test_a_rectangle_is_where_its_box_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.zeros((120, 200, 3), np.uint8)
    x1, y1 = rng.integers(0, 150), rng.integers(0, 80)
    x2, y2 = x1 + rng.integers(20, 50), y1 + rng.integers(20, 40)
    image[y1:y2, x1:x2] = 255
    view = draw_view(200, 120, rng, SMALL)
    pixels = see(image, view)
    assert pixels.shape == (view.height_px, view.width_px, 3)
    (box,) = boxes_in(view, np.array([[x1, y1, x2, y2]], np.float32))
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    if (box[2:] - box[:2] > 0.1).all():
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        expected = box * ([view.width_px, view.height_px] * 2)
        np.testing.assert_allclose(found, expected, atol=2)


def test_boxes_by_hand() -> None:
    view = View((10, 20, 110, 70), 200, 100)
    boxes = np.array([[10, 20, 60, 45], [0, 0, 5, 5], [60, 45, 300, 300]], np.float32)
    expected = np.array([[0, 0, 0.5, 0.5], [0, 0, 0, 0], [0.5, 0.5, 1, 1]])
    np.testing.assert_allclose(boxes_in(view, boxes), expected)
    turned = View(view.region_px, 200, 100, mirrored=True)
    expected = np.array([[0.5, 0, 1, 0.5], [1, 0, 1, 0], [0, 0.5, 0.5, 1]])
    np.testing.assert_allclose(boxes_in(turned, boxes), expected)
    assert boxes_in(view, np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_words_follow_the_mirror() -> None:
    view = View((0, 0, 10, 10), 10, 10)
    assert text_in(view, "left of the bus") == "left of the bus"
    turned = View((0, 0, 10, 10), 10, 10, mirrored=True)
    assert text_in(turned, "left of the bus") == "right of the bus"


def test_wrong_settings_are_refused() -> None:
    from reir.config import load_config

    with pytest.raises(ConfigError, match="mirror_probability"):
        load_config(Augmentation, {"mirror_probability": 2})

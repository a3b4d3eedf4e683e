"""`reir.images.boxes` against plain Python loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reir.images import boxes as box

# Whole numbers on a small grid, so that touching, equal and empty boxes are common.
grid_boxes = hnp.arrays(
    np.float64, st.tuples(st.integers(0, 12), st.just(4)), elements=st.integers(0, 6).map(float)
).map(lambda a: np.concatenate([np.minimum(a[:, :2], a[:, 2:]), np.maximum(a[:, :2], a[:, 2:])], 1))


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return float(width * height / union)


@given(grid_boxes, grid_boxes)
def test_pairwise_iou_matches_reference(a: np.ndarray, b: np.ndarray) -> None:
    expected = [[slow_iou(x, y) for y in b] for x in a]
    got = box.pairwise_iou(a, b)
    assert got.shape == (len(a), len(b))
    np.testing.assert_allclose(got, np.array(expected).reshape(got.shape), atol=1e-12)


@given(grid_boxes)
def test_elementwise_iou_is_the_diagonal(a: np.ndarray) -> None:
    b = a[::-1]
    np.testing.assert_array_equal(box.elementwise_iou(a, b), np.diag(box.pairwise_iou(a, b)))


def test_float32_stays_float32() -> None:
    boxes = np.array([[0, 0, 1, 1]], dtype=np.float32)
    assert box.area(boxes).dtype == np.float32
    assert box.pairwise_iou(boxes, boxes).dtype == np.float32


def test_no_boxes() -> None:
    assert box.area([]).shape == (0,)
    assert box.pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)


def test_boxes_without_area_overlap_nothing() -> None:
    assert box.elementwise_iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\), got \(3, 5\)"):
        box.area(np.zeros((3, 5)))

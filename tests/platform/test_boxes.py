"""`reir.boxes` against plain Python loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reir import boxes as box

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


def slow_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(slow_iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


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


@given(grid_boxes, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_nms_matches_reference(boxes: np.ndarray, seed: int, threshold: float) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, len(boxes)) / 4  # ties
    expected = slow_nms(boxes, scores, threshold)
    assert box.nms(boxes, scores, threshold).tolist() == expected
    assert box.nms(boxes, scores, threshold, max_kept=2).tolist() == expected[:2]


@given(grid_boxes)
def test_forms_are_inverse(boxes: np.ndarray) -> None:
    np.testing.assert_allclose(box.xywh_to_xyxy(box.xyxy_to_xywh(boxes)), boxes)
    np.testing.assert_allclose(box.cxcywh_to_xyxy(box.xyxy_to_cxcywh(boxes)), boxes)
    np.testing.assert_allclose(
        box.to_pixels(box.to_normalised(boxes, 640, 427), 640, 427), boxes, rtol=1e-12
    )


def test_forms_of_one_known_box() -> None:
    np.testing.assert_array_equal(box.xywh_to_xyxy([10, 20, 4, 6]), [10, 20, 14, 26])
    np.testing.assert_array_equal(box.xyxy_to_cxcywh([10, 20, 14, 26]), [12, 23, 4, 6])
    np.testing.assert_array_equal(box.to_pixels([0.5, 0.25, 1, 1], 200, 100), [100, 25, 200, 100])


def test_clip_moves_corners_into_the_frame() -> None:
    clipped = box.clip([[-5, 2, 30, 12], [25, -3, 28, -1]], width=20, height=10)
    np.testing.assert_array_equal(clipped, [[0, 2, 20, 10], [20, 0, 20, 0]])
    np.testing.assert_array_equal(box.clip([-0.1, 0.2, 1.1, 0.4]), [0, 0.2, 1, 0.4])


def test_float32_stays_float32() -> None:
    boxes = np.array([[0, 0, 1, 1]], dtype=np.float32)
    for result in (
        box.xywh_to_xyxy(boxes),
        box.to_pixels(boxes, 640, 480),
        box.clip(boxes),
        box.pairwise_iou(boxes, boxes),
    ):
        assert result.dtype == np.float32


def test_no_boxes() -> None:
    assert box.xywh_to_xyxy([]).shape == (0, 4)
    assert box.pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert box.nms([], [], 0.5).tolist() == []


def test_boxes_without_area_overlap_nothing() -> None:
    assert box.elementwise_iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., 4\), got \(3, 5\)"):
        box.area(np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"scores must have shape \(2,\).*\(3,\)"):
        box.nms(np.zeros((2, 4)), np.zeros(3), 0.5)
    with pytest.raises(ValueError, match=r"iou_threshold.*1\.5"):
        box.nms(np.zeros((2, 4)), np.zeros(2), 1.5)
    with pytest.raises(ValueError, match="0 x 10"):
        box.to_normalised([0, 0, 1, 1], 0, 10)

"""`reir.metrics.corpus_detection` against a loop over thresholds and detections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.images import rle
from reir.images.boxes import elementwise_iou
from reir.metrics.corpus_detection import Regions, average_precision

SIZE_PX = 12


def slow_precision(found: Regions, scores: np.ndarray, true: Regions, least_iou: float) -> float:
    """AP at one threshold: match by descending score, then average at 101 recalls."""
    taken: set[int] = set()
    right = []
    for row in np.argsort(-scores, kind="stable"):
        best, best_iou = -1, least_iou
        for target in range(len(true.images)):
            overlap = float(elementwise_iou(found.boxes_px[row], true.boxes_px[target]))
            same = found.images[row] == true.images[target]
            if same and target not in taken and overlap >= best_iou:
                best, best_iou = target, overlap
        taken |= {best} - {-1}
        right.append(best >= 0)
    hits = np.cumsum(right)
    recall, precision = hits / len(true.images), hits / (1 + np.arange(len(right)))
    at = [max(precision[recall >= level], default=0.0) for level in np.linspace(0, 1, 101)]
    return float(np.mean(at))


def regions(rng: np.random.Generator, num: int) -> Regions:
    corner = rng.integers(0, 4, (num, 2))
    boxes = np.concatenate([corner, corner + rng.integers(3, 8, (num, 2))], axis=1)
    # As if sorted by photo, which is how pycocotools orders equal scores.
    return Regions(np.sort(rng.integers(0, 3, num)), boxes.astype(float))


def with_masks(boxes: Regions) -> Regions:
    """The same regions as masks that fill their boxes."""
    masks = []
    for x1, y1, x2, y2 in boxes.boxes_px.astype(int):
        pixels = np.zeros((SIZE_PX, SIZE_PX), dtype=bool)
        pixels[y1:y2, x1:x2] = True
        masks.append(rle.encode(pixels))
    return Regions(boxes.images, boxes.boxes_px, masks)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 5))
def test_average_precision_equals_the_slow_one(seed: int, num: int, num_targets: int) -> None:
    rng = np.random.default_rng(seed)
    found, true = regions(rng, num), regions(rng, num_targets)
    scores = rng.permutation(num).astype(float)
    ap, ap50 = average_precision(found, scores, true)
    assert ap50 == pytest.approx(slow_precision(found, scores, true, 0.5), abs=1e-9)
    levels = np.linspace(0.5, 0.95, 10)
    slow = [slow_precision(found, scores, true, least - 1e-9) for least in levels]
    assert ap == pytest.approx(np.mean(slow), abs=1e-9)
    # A mask that fills its box has the IoU of the box.
    assert average_precision(with_masks(found), scores, with_masks(true)) == (ap, ap50)


def test_a_detection_in_a_photo_without_targets_costs_precision(
    capsys: pytest.CaptureFixture[str],
) -> None:
    box = np.array([[1.0, 1, 5, 5]])
    true = Regions(np.array([3]), box)
    right = Regions(np.array([3]), box)
    assert average_precision(right, np.array([0.1]), true) == pytest.approx((1, 1))
    wrong_first = Regions(np.array([9, 3]), np.repeat(box, 2, axis=0))
    assert average_precision(wrong_first, np.array([0.9, 0.1]), true)[1] == pytest.approx(0.5)
    nothing = Regions(np.empty(0, dtype=int), np.empty((0, 4)))
    assert average_precision(nothing, np.empty(0), true) == (0, 0)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="needs at least one target"):
        average_precision(right, np.array([0.1]), nothing)

"""`reir.metrics.sorec` against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.metrics.reir import Gallery, Queries, ranked_instances, top_instances
from reir.metrics.sorec import IOU_THRESHOLDS, TOP_KS, sorec_scores

BOX = [10.0, 10.0, 30.0, 30.0]
NONE = [float("nan")] * 4


def slow_iou(a: list[float], b: list[float]) -> float:
    if np.isnan(a).any():
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def slow_hit(ranked: list[list[float]], target: list[float], k: int, threshold: float) -> bool:
    return any(slow_iou(box, target) >= threshold for box in ranked[:k])


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    corner = rng.integers(0, 4, size=(*shape, 2)).astype(float)
    return np.concatenate([corner, corner + rng.integers(4, 8, (*shape, 2))], axis=-1)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
def test_scores_equal_those_of_loops(seed: int, num: int, num_boxes: int) -> None:
    rng = np.random.default_rng(seed)
    ranked, targets = random_boxes(rng, num, num_boxes), random_boxes(rng, num)
    ranked[rng.random((num, num_boxes)) < 0.2] = np.nan
    scores = sorec_scores(ranked, targets)
    assert len(scores) == num
    for row, (boxes, target) in enumerate(zip(ranked.tolist(), targets.tolist(), strict=True)):
        for k in TOP_KS:
            for iou in IOU_THRESHOLDS:
                assert scores.hits(k, iou)[row] == slow_hit(boxes, target, k, iou)
        first = [slow_hit(boxes, target, 1, percent / 100) for percent in range(50, 100, 5)]
        assert scores.mean_accuracy[row] == pytest.approx(sum(first) / 10)
        hits = [slow_hit(boxes, target, k, 0.5) for k in TOP_KS]
        assert scores.mean_precision[row] == pytest.approx(sum(hits) / 3)


def test_an_iou_that_equals_the_threshold_is_a_hit() -> None:
    # The overlaps are 1/20 to 19/20 of the target.
    targets = np.tile([0.0, 0.0, 20.0, 1.0], (19, 1))
    ranked = np.array([[[0.0, 0.0, width, 1.0]] for width in range(1, 20)])
    scores = sorec_scores(ranked, targets)
    for at, iou in enumerate(IOU_THRESHOLDS):
        assert scores.hits(1, iou).tolist() == [False] * at + [True] * (19 - at)
    # IoU .5 reaches one of the ten thresholds of mAcc, and .95 all of them.
    assert scores.mean_accuracy[8:10].tolist() == [0, 0.1]
    assert scores.mean_accuracy[18] == 1


def test_more_boxes_never_make_it_worse() -> None:
    scores = sorec_scores([[NONE, [50.0, 50.0, 60.0, 60.0], BOX]], [BOX])
    assert scores.best_iou.tolist() == [[0, 1, 1]]
    assert scores.mean_precision.tolist() == pytest.approx([2 / 3])


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(2, N, 4\), got \(1, 1, 4\)"):
        sorec_scores([[BOX]], [BOX, BOX])
    with pytest.raises(ValueError, match=r"must have shape \(M, 4\), got \(4,\)"):
        sorec_scores([[BOX]], BOX)
    with pytest.raises(ValueError, match="finite"):
        sorec_scores([[BOX]], [NONE])
    with pytest.raises(ValueError, match=r"k must be one of \(1, 5, 10\), got 2"):
        sorec_scores([[BOX]], [BOX]).hits(2, 0.5)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 20), st.integers(1, 7))
def test_ranked_instances_equal_a_sort_of_each_photo(
    seed: int, num_queries: int, num_instances: int, query_chunk: int
) -> None:
    rng = np.random.default_rng(seed)
    # Small whole numbers, so that many scores are equal.
    gallery = Gallery(
        rng.integers(-1, 2, (num_instances, 3)).astype(np.float32),
        rng.integers(0, 3, num_instances),
        random_boxes(rng, num_instances),
    )
    queries = Queries(
        rng.integers(-1, 2, (num_queries, 3)).astype(np.float32),
        rng.integers(0, 4, num_queries),
        random_boxes(rng, num_queries),
    )
    found = ranked_instances(queries, gallery, 4, query_chunk=query_chunk)
    assert found.shape == (num_queries, 4)
    for row in range(num_queries):
        own = np.flatnonzero(gallery.images == queries.images[row])
        key = {}
        for each in own.tolist():
            iou = slow_iou(gallery.boxes_px[each].tolist(), queries.boxes_px[row].tolist())
            key[each] = (-float(queries.vectors[row] @ gallery.vectors[each]), round(iou, 9))
        expected = sorted(key.values())[:4]
        ranked = [each for each in found[row].tolist() if each >= 0]
        assert [key[each] for each in ranked] == expected
        assert len(set(ranked)) == len(ranked)
        assert found[row].tolist() == ranked + [-1] * (4 - len(ranked))
    np.testing.assert_array_equal(top_instances(queries, gallery), found[:, 0])

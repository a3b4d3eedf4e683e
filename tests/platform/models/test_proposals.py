"""Candidates match a slow reference."""

from __future__ import annotations

import pytest
import torch

from reir.models.proposals import (
    MIN_SIDE,
    NMS_POOL,
    Candidates,
    DetectorOutput,
    greedy_nms,
    select_candidates,
)


def random_output(
    num_images: int, num_anchors: int, seed: int, *, levels: int = 0
) -> DetectorOutput:
    """Overlapping boxes, some outside the image; `levels` > 0 makes scores tie.

    The first feature is the number of the anchor.
    """
    rng = torch.Generator().manual_seed(seed)
    center = torch.rand(num_images, num_anchors, 2, generator=rng) * 1.2 - 0.1
    half = torch.rand(num_images, num_anchors, 2, generator=rng) * 0.3 - 0.01
    scores = torch.rand(num_images, num_anchors, 80, generator=rng)
    if levels:
        scores = (
            (scores.amax(2, keepdim=True) ** 50 * levels).floor() / levels * scores.new_ones(80)
        )
    features = torch.rand(num_images, num_anchors, 6, generator=rng)
    features[..., 0] = torch.arange(num_anchors)
    return DetectorOutput(torch.cat((center - half, center + half), dim=2), scores, features)


def anchors(candidates: Candidates) -> list[int]:
    return [int(number) for number in candidates.features[:, 0]]


def slow_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return overlap / (area - overlap)


def slow_anchors(output: DetectorOutput, image: int, keep: int) -> list[int]:
    """Clip, drop slivers, sort all, then compare every box with every kept one."""
    rows = []
    for anchor, box in enumerate(output.boxes[image].tolist()):
        clipped = [min(max(v, 0.0), 1.0) for v in box]
        score = float(output.class_scores[image, anchor].max())
        sides = (clipped[2] - clipped[0], clipped[3] - clipped[1])
        if min(sides) >= MIN_SIDE and score > 0:
            rows.append((-score, anchor, clipped))
    kept: list[tuple[int, list[float]]] = []
    for _, anchor, box in sorted(rows):
        if len(kept) < keep and all(slow_iou(box, other) <= 0.7 for _, other in kept):
            kept.append((anchor, box))
    return [anchor for anchor, _ in kept]


@pytest.mark.parametrize("keep", [1, 7, 400], ids=["one", "few", "more-than-there-are"])
@pytest.mark.parametrize("levels", [0, 5], ids=["distinct", "ties"])
@pytest.mark.parametrize("num_anchors", [1, 40, 300])
def test_select_candidates_equals_the_slow_reference(
    num_anchors: int, levels: int, keep: int
) -> None:
    output = random_output(2, num_anchors, seed=num_anchors + levels, levels=levels)
    for i, candidates in enumerate(select_candidates(output, keep, nms_iou=0.7)):
        assert anchors(candidates) == slow_anchors(output, i, keep)


def test_candidates_have_the_box_scores_and_features_of_their_anchor() -> None:
    output = random_output(2, 200, seed=3)
    candidates = select_candidates(output, 20, nms_iou=0.7)[1]
    rows = anchors(candidates)
    torch.testing.assert_close(candidates.boxes, output.boxes[1, rows].clamp(0, 1))
    torch.testing.assert_close(candidates.class_scores, output.class_scores[1, rows])
    torch.testing.assert_close(candidates.features, output.features[1, rows])
    torch.testing.assert_close(candidates.scores, candidates.class_scores.amax(1))
    assert (candidates.scores.diff() <= 0).all()


def test_an_image_without_candidates_gives_empty_tensors_beside_a_full_one() -> None:
    output = random_output(3, 50, seed=4)
    output.class_scores[1] = 0
    output.boxes[2] = torch.tensor([-0.5, -0.5, -0.1, -0.1])
    full, no_score, outside = select_candidates(output, 10, nms_iou=0.7)
    assert len(full) == 10
    for empty in (no_score, outside):
        assert len(empty) == 0
        assert empty.boxes.shape == (0, 4)
        assert empty.class_scores.shape == (0, 80)
        assert empty.features.shape == (0, 6)


def test_candidates_with_nan_are_never_chosen() -> None:
    output = random_output(1, 30, seed=5)
    output.boxes[0, :10] = float("nan")
    output.class_scores[0, 10:20] = float("nan")
    candidates = select_candidates(output, 30, nms_iou=0.7)[0]
    assert len(candidates) > 0
    assert min(anchors(candidates)) >= 20
    assert candidates.boxes.isfinite().all()


def test_only_the_best_scores_enter_suppression() -> None:
    output = random_output(1, NMS_POOL + 500, seed=6)
    output.boxes[:] = torch.tensor([0.1, 0.1, 0.9, 0.9])
    ranks = output.class_scores[0].amax(1).argsort(descending=True, stable=True)
    everything = select_candidates(output, NMS_POOL + 500, nms_iou=1.0)[0]
    assert anchors(everything) == ranks[:NMS_POOL].tolist()


def test_suppression_keeps_touching_boxes_and_drops_equal_ones() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 2, 1]]])
    scores = torch.tensor([[0.9, 0.9, 0.8, 0.7]])
    picks, counts = greedy_nms(boxes, scores, 4, max_iou=0.5)
    assert counts.tolist() == [3]
    assert picks[0, :3].tolist() == [0, 2, 3]  # an overlap of exactly max_iou stays


def test_a_number_of_candidates_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
        select_candidates(random_output(2, 5, seed=0), 0, nms_iou=0.7)

"""`reir.losses` against slow loops and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reir.losses import (
    box_loss,
    clia_loss,
    discrimination_loss,
    focal_loss,
    generalized_iou,
    pairwise_iou,
    ranking_loss,
    soft_target,
)

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None)


def random_for(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(num: int, seed: int) -> Tensor:
    points = torch.rand(num, 2, 2, generator=random_for(seed), dtype=torch.float64)
    return points.sort(dim=1).values.flatten(1)


def slow_focal(logit: float, target: float, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = 1 / (1 + math.exp(-logit))
    if target == 1:
        return -alpha * math.pow(1 - p, gamma) * math.log(p)
    return -(1 - alpha) * math.pow(p, gamma) * math.log(1 - p)


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    inter = width * height
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return inter / (areas - inter) if areas > inter else 0.0


# ------------------------------------------------------------------------------------------ focal


def test_focal_by_hand() -> None:
    got = focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    # p = 1/2: weight .25 or .75, times 1/4, times ln 2
    assert got.tolist() == pytest.approx([math.log(2) / 16, 3 * math.log(2) / 16])


@given(seeds)
@few
def test_focal_equals_the_loop(seed: int) -> None:
    random = random_for(seed)
    logits = torch.randn(4, 5, generator=random, dtype=torch.float64) * 3
    targets = (torch.rand(4, 5, generator=random) < 0.3).double()
    want = [
        [slow_focal(x, t) for x, t in zip(xs, ts, strict=True)]
        for xs, ts in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(focal_loss(logits, targets), torch.tensor(want).double())


def test_focal_without_gamma_is_weighted_cross_entropy() -> None:
    logits, targets = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    got = focal_loss(logits, targets, alpha=0.5, gamma=0.0)
    torch.testing.assert_close(got, plain / 2)


# --------------------------------------------------------------------------------- discrimination


def slow_discrimination(logits: Tensor, overlap: Tensor, valid: Tensor) -> float:
    total, positives = 0.0, 0
    for m, k in torch.nonzero(valid).tolist():
        positive = overlap[m, k].item() >= 0.5
        positives += positive
        total += slow_focal(logits[m, k].item(), float(positive))
    return total / max(positives, 1)


@given(seeds)
@few
def test_discrimination_equals_the_loop(seed: int) -> None:
    random = random_for(seed)
    logits = torch.randn(3, 6, generator=random, dtype=torch.float64)
    overlap = torch.rand(3, 6, generator=random, dtype=torch.float64)
    overlap[0, 0] = 0.5  # the edge counts as a positive
    valid = torch.rand(3, 6, generator=random) < 0.7
    got = discrimination_loss(logits, overlap, valid).item()
    assert got == pytest.approx(slow_discrimination(logits, overlap, valid))


def test_discrimination_ignores_padding() -> None:
    logits, overlap = torch.tensor([[1.0, 50.0]]), torch.tensor([[0.9, 0.9]])
    valid = torch.tensor([[True, False]])
    alone = discrimination_loss(logits[:, :1], overlap[:, :1], valid[:, :1])
    torch.testing.assert_close(discrimination_loss(logits, overlap, valid), alone)


def test_discrimination_without_positives_counts_negatives_once() -> None:
    got = discrimination_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool())
    assert got.item() == pytest.approx(2 * 3 * math.log(2) / 16)


# ---------------------------------------------------------------------------------------- ranking


def test_soft_target_by_hand() -> None:
    got = soft_target(torch.tensor([[0.5, 0.75, 0.49], [0.8, 0.8, 0.0], [0.1, 0.2, 0.0]]))
    ratio = math.e  # exp(4 * .75) / exp(4 * .5)
    want = [[1 / (1 + ratio), ratio / (1 + ratio), 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(got, torch.tensor(want))


def slow_ranking(logits: Tensor, target: Tensor, valid: Tensor) -> float:
    total, rows = 0.0, 0
    for row_logits, row_target, row_valid in zip(logits, target, valid, strict=True):
        if row_target.sum() == 0:
            continue
        rows += 1
        normalizer = math.log(sum(math.exp(x) for x in row_logits[row_valid].tolist()))
        for x, t, v in zip(
            row_logits.tolist(), row_target.tolist(), row_valid.tolist(), strict=True
        ):
            total += t * (normalizer - x) if v else 0.0
    return total / max(rows, 1)


@given(seeds)
@few
def test_ranking_equals_the_loop_with_weighted_rows(seed: int) -> None:
    random = random_for(seed)
    logits = torch.randn(5, 7, generator=random, dtype=torch.float64) * 3
    valid = torch.rand(5, 7, generator=random) < 0.8
    overlap = torch.rand(5, 7, generator=random, dtype=torch.float64) * valid
    overlap[1] = 0  # a row without target
    weight = torch.rand(5, 1, generator=random, dtype=torch.float64) + 0.1
    target = soft_target(overlap) * weight
    got = ranking_loss(logits, target, valid).item()
    assert got == pytest.approx(slow_ranking(logits, target, valid))


def test_ranking_of_a_weighted_row_scales_with_the_weight() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    target = torch.tensor([[0.5, 0.0], [0.0, 2.0]])
    got = ranking_loss(logits, target, torch.ones(2, 2).bool())
    assert got.item() == pytest.approx((0.5 + 2.0) * math.log(2) / 2)


def test_ranking_ties_and_masks() -> None:
    logits = torch.tensor([[3.0, 3.0, 99.0]])
    target = torch.tensor([[0.5, 0.5, 0.0]])
    valid = torch.tensor([[True, True, False]])
    assert ranking_loss(logits, target, valid).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("rows", [0, 2])
def test_ranking_without_any_target_is_zero(rows: int) -> None:
    logits = torch.randn(rows, 3, requires_grad=True)
    loss = ranking_loss(logits, torch.zeros(rows, 3), torch.ones(rows, 3).bool())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


# ------------------------------------------------------------------------------------------- clia


def slow_clia(logits: Tensor, positive: Tensor, counted: Tensor, weight: Tensor) -> float:
    total = 0.0
    for m in range(len(logits)):
        for j in range(logits.shape[1]):
            x = logits[m, j].item()
            if positive[m, j]:
                total += weight[m].item() * math.log1p(math.exp(-x))
            elif counted[m, j]:
                total += weight[m].item() * math.log1p(math.exp(x))
    return total / max(len(logits), 1)


@given(seeds)
@few
def test_clia_equals_the_loop(seed: int) -> None:
    random = random_for(seed)
    logits = torch.randn(4, 9, generator=random, dtype=torch.float64) * 4
    positive = torch.rand(4, 9, generator=random) < 0.2
    counted = torch.rand(4, 9, generator=random) < 0.6
    weight = torch.rand(4, generator=random, dtype=torch.float64)
    got = clia_loss(logits, positive, counted, weight).item()
    assert got == pytest.approx(slow_clia(logits, positive, counted, weight))


def test_clia_by_hand() -> None:
    logits = torch.zeros(1, 3)
    positive = torch.tensor([[True, False, False]])
    counted = torch.tensor([[False, True, False]])  # the positive counts whatever the mask says
    assert clia_loss(logits, positive, counted).item() == pytest.approx(2 * math.log(2))


def test_clia_without_weights_counts_all_alike() -> None:
    logits = torch.randn(3, 4, generator=random_for(1))
    positive, counted = torch.eye(3, 4).bool(), torch.ones(3, 4).bool()
    torch.testing.assert_close(
        clia_loss(logits, positive, counted), clia_loss(logits, positive, counted, torch.ones(3))
    )


def test_clia_masked_pairs_carry_no_gradient() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    counted = torch.tensor([[True, False]])
    clia_loss(logits, torch.zeros(1, 2).bool(), counted).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (2, 0)])
def test_clia_without_pairs_is_zero(rows: int, columns: int) -> None:
    nothing = torch.zeros(rows, columns, dtype=torch.bool)
    logits = torch.zeros(rows, columns, requires_grad=True)
    loss = clia_loss(logits, nothing, nothing, torch.ones(rows))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0


# ------------------------------------------------------------------------------------------ boxes


@given(seeds)
@few
def test_pairwise_iou_equals_the_loop(seed: int) -> None:
    a, b = random_boxes(4, seed), random_boxes(3, seed + 1)
    want = torch.tensor([[slow_iou(x, y) for y in b.tolist()] for x in a.tolist()]).double()
    torch.testing.assert_close(pairwise_iou(a, b), want)


def test_pairwise_iou_of_boxes_without_area_and_of_none() -> None:
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert pairwise_iou(point, point).tolist() == [[0.0]]
    assert pairwise_iou(point, torch.zeros(0, 4)).shape == (1, 0)


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0.0),  # side by side: no gap in the hull
        ((0, 0, 0.25, 1), (0.75, 0, 1, 1), -0.5),  # half of the hull is empty
        ((0, 0, 1, 1), (0, 0, 0.5, 0.5), 0.25),  # inside: the hull is the larger box
        ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), -0.5),
        ((0, 0, 0, 0), (1, 1, 1, 1), -1.0),
    ],
)
def test_generalized_iou_by_hand(a: tuple[float, ...], b: tuple[float, ...], want: float) -> None:
    left, right = torch.tensor([a], dtype=torch.float32), torch.tensor([b], dtype=torch.float32)
    assert generalized_iou(left, right).item() == pytest.approx(want)
    assert generalized_iou(right, left).item() == pytest.approx(want)


@given(seeds)
@few
def test_generalized_iou_never_exceeds_iou(seed: int) -> None:
    a, b = random_boxes(6, seed), random_boxes(6, seed + 1)
    giou = generalized_iou(a, b)
    iou = torch.tensor([slow_iou(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    assert (giou <= iou + 1e-6).all()
    assert (giou >= -1).all()


def test_box_loss_by_hand() -> None:
    predicted = torch.tensor([[0.0, 0.0, 0.25, 1.0]])
    target = torch.tensor([[0.75, 0.0, 1.0, 1.0]])
    # the center is .75 away, the size agrees; GIoU is -1/2
    assert box_loss(predicted, target).item() == pytest.approx(5 * 0.75 + 2 * 1.5)
    assert box_loss(target, target).item() == pytest.approx(0, abs=1e-6)


def test_box_loss_of_no_boxes_is_zero_and_has_a_gradient() -> None:
    predicted = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss(predicted, torch.zeros(0, 4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0


# -------------------------------------------------------------------------------------- gradients


def all_losses(logits: Tensor, boxes: Tensor) -> Tensor:
    positive = torch.eye(*logits.shape).bool()
    everything = torch.ones_like(positive)
    return torch.stack(
        [
            focal_loss(logits, positive.to(logits.dtype)).mean(),
            discrimination_loss(logits, positive.float(), everything),
            ranking_loss(logits, soft_target(positive.float()), everything),
            clia_loss(logits, positive, everything),
            box_loss(boxes, random_boxes(len(boxes), 5).float()),
        ]
    ).sum()


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0], ids=["ties", "usual", "saturated"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_gradients_are_finite(scale: float, half: bool) -> None:
    a = (torch.randn(3, 8, generator=random_for(0)) * scale).requires_grad_()
    b = torch.randn(6, 8, generator=random_for(1)).requires_grad_()
    boxes = random_boxes(3, 2).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = all_losses(a @ b.T, boxes)
    loss.backward()  # type: ignore[no-untyped-call]
    for leaf in (a, b, boxes):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any() or scale == 0.0


def test_boxes_without_area_have_finite_gradients() -> None:
    boxes = torch.full((2, 4), 0.5, requires_grad=True)
    box_loss(boxes, torch.zeros(2, 4)).backward()  # type: ignore[no-untyped-call]
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()

"""Matching, compared with nested loops over Python numbers and cases worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reir.losses import center_size, generalized_iou
from reir_training.clare import matching
from reir_training.clare.matching import (
    Targets,
    cheapest_proposals,
    focal_cost,
    hungarian,
    simota,
    simota_cost,
)

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)
Box = list[float]


def random_boxes(*shape: int, random: torch.Generator) -> Tensor:
    points = torch.rand(*shape, 2, 2, generator=random, dtype=torch.float64)
    return points.sort(dim=-2).values.flatten(-2)


def random_case(
    seed: int, layers: int = 2, photos: int = 3, queries: int = 12, most: int = 4, texts: int = 3
) -> tuple[Tensor, Tensor, Targets]:
    """Queries that crowd around targets, some photos with few targets or none."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, photos, queries, texts, generator=random, dtype=torch.float64) * 2
    target_boxes = random_boxes(photos, most, random=random)
    near = torch.randint(most, (layers, photos, queries), generator=random)
    boxes = target_boxes[torch.arange(photos)[:, None], near]
    boxes = boxes + 0.1 * torch.randn(boxes.shape, generator=random, dtype=torch.float64)
    boxes = boxes.reshape(layers, photos, queries, 2, 2).sort(dim=-2).values
    boxes = boxes.flatten(-2).clamp(0, 1)
    count = torch.randint(0, most + 1, (photos, 1), generator=random)
    valid = torch.arange(most) < count
    described = torch.rand(photos, most, texts, generator=random) < 0.3
    described[..., 0] |= ~described.any(-1)
    targets = Targets(
        target_boxes * valid[..., None],
        described & valid[..., None],
        valid,
        torch.ones(photos, texts, dtype=torch.bool),
    )
    return logits, boxes, targets


# ------------------------------------------------------------------------------ the slow reference


def slow_focal_cost(logit: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    positive = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8)
    negative = -0.75 * p**2 * math.log(1 - p + 1e-8)
    return positive - negative


def slow_iou_and_giou(a: Box, b: Box) -> tuple[float, float]:
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = inter / union if union > 0 else 0.0
    return iou, iou - (hull - union) / hull if hull > 0 else iou


def slow_simota_cost(
    logits: list[list[float]], boxes: list[Box], targets: list[Box], texts: list[list[int]]
) -> list[list[float]]:
    """One photo and layer: cost of each target (row) with each query (column)."""
    radius = 2.5 / 32
    in_box, in_region = [], []
    for target in targets:
        tx, ty = (target[0] + target[2]) / 2, (target[1] + target[3]) / 2
        centers = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
        in_box.append([target[0] < x < target[2] and target[1] < y < target[3] for x, y in centers])
        in_region.append([abs(x - tx) < radius and abs(y - ty) < radius for x, y in centers])
    cost = []
    for g, target in enumerate(targets):
        row = []
        for n, box in enumerate(boxes):
            value = sum(slow_focal_cost(logits[n][c]) for c in texts[g]) / len(texts[g])
            value -= 3 * slow_iou_and_giou(target, box)[1]
            if not (in_box[g][n] and in_region[g][n]):
                value += 100
            if not any(in_box[other][n] or in_region[other][n] for other in range(len(targets))):
                value += 10_000
            row.append(value)
        cost.append(row)
    return cost


def slow_assign(cost: list[list[float]], overlap: list[list[float]], num_queries: int) -> list[int]:
    """Target of each query, or -1."""
    claims: list[list[int]] = [[] for _ in range(num_queries)]
    for g, row in enumerate(cost):
        k = max(1, math.floor(sum(sorted(overlap[g], reverse=True)[:10])))
        for n in sorted(range(num_queries), key=lambda n: row[n])[:k]:
            claims[n].append(g)
    owner = [-1] * num_queries
    for n, claimants in enumerate(claims):
        if len(claimants) == 1:
            owner[n] = claimants[0]
        elif claimants:
            owner[n] = min(range(len(cost)), key=lambda g: cost[g][n])
    while True:
        orphans = [g for g in range(len(cost)) if g not in owner]
        allowed = [n for n in range(num_queries) if owner[n] < 0]
        allowed = allowed or [n for n in range(num_queries) if owner.count(owner[n]) > 1]
        pairs = [(cost[g][n], g, n) for g in orphans for n in allowed]
        if not pairs:
            return owner
        _, g, n = min(pairs)
        owner[n] = g


def slow_simota(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    out = torch.full(boxes.shape[:-1], -1)
    for layer, photo in itertools.product(range(boxes.shape[0]), range(boxes.shape[1])):
        real = targets.valid[photo].nonzero()[:, 0].tolist()
        wanted = [targets.boxes_xyxy[photo, g].tolist() for g in real]
        texts = [targets.texts[photo, g].nonzero()[:, 0].tolist() for g in real]
        said, found = logits[layer, photo].tolist(), boxes[layer, photo].tolist()
        overlap = [[slow_iou_and_giou(target, box)[0] for box in found] for target in wanted]
        owner = slow_assign(slow_simota_cost(said, found, wanted, texts), overlap, len(found))
        out[layer, photo] = torch.tensor([real[g] if g >= 0 else -1 for g in owner])
    return out


# -------------------------------------------------------------------------------------- focal cost


def test_focal_cost_by_hand() -> None:
    # p = 1/2: (.25 - .75) / 4 * ln 2
    assert focal_cost(torch.zeros(1)).item() == pytest.approx(-math.log(2) / 8)


def test_focal_cost_is_bounded_and_falls_with_the_score() -> None:
    cost = focal_cost(torch.tensor([-5e4, -3.0, 0.0, 3.0, 5e4]))
    assert cost.isfinite().all()
    assert (cost.diff() < 0).all()
    assert cost[0].item() == pytest.approx(0.25 * 8 * math.log(10), rel=1e-3)


# ------------------------------------------------------------------------------------------ simOTA


@given(seeds)
@few
def test_simota_cost_equals_the_loop(seed: int) -> None:
    logits, boxes, targets = random_case(seed)
    cost = simota_cost(logits, boxes, targets)
    for layer, photo in itertools.product(range(2), range(3)):
        num = int(targets.valid[photo].sum())
        want = slow_simota_cost(
            logits[layer, photo].tolist(),
            boxes[layer, photo].tolist(),
            targets.boxes_xyxy[photo, :num].tolist(),
            [targets.texts[photo, g].nonzero()[:, 0].tolist() for g in range(num)],
        )
        got = cost[layer, photo]
        assert got[num:].isinf().all()
        if num:
            torch.testing.assert_close(got[:num], torch.tensor(want, dtype=torch.float64))


@given(seeds)
@few
def test_simota_equals_the_loop(seed: int) -> None:
    logits, boxes, targets = random_case(seed)
    assert simota(logits, boxes, targets).tolist() == slow_simota(logits, boxes, targets).tolist()


@given(seeds, st.integers(1, 5), st.integers(1, 6))
@few
def test_simota_equals_the_loop_with_few_queries(seed: int, queries: int, most: int) -> None:
    logits, boxes, targets = random_case(seed, queries=queries, most=most)
    assert simota(logits, boxes, targets).tolist() == slow_simota(logits, boxes, targets).tolist()


@given(seeds)
@few
def test_simota_equals_the_loop_with_ties(seed: int) -> None:
    """Equal scores and repeated boxes: every cost comes twice at least."""
    logits, boxes, targets = random_case(seed, queries=8)
    logits, boxes = torch.zeros_like(logits), boxes[..., :4, :].repeat(1, 1, 2, 1)
    assert simota(logits, boxes, targets).tolist() == slow_simota(logits, boxes, targets).tolist()


@given(seeds, st.integers(1, 14), st.integers(1, 6))
@few
def test_simota_gives_every_target_a_query_while_queries_last(
    seed: int, queries: int, most: int
) -> None:
    logits, boxes, targets = random_case(seed, queries=queries, most=most)
    assigned = simota(logits, boxes, targets)
    assert assigned.shape == boxes.shape[:-1]
    for layer, photo in itertools.product(range(2), range(3)):
        num = int(targets.valid[photo].sum())
        used = set(assigned[layer, photo].tolist()) - {-1}
        assert used <= set(range(num))  # a query has one entry, so one target at most
        assert len(used) == min(num, queries)  # every target is served while queries last


@given(seeds)
@few
def test_simota_of_a_photo_does_not_depend_on_the_batch(seed: int) -> None:
    logits, boxes, targets = random_case(seed)
    together = simota(logits, boxes, targets)
    for photo in range(3):
        one, num = slice(photo, photo + 1), int(targets.valid[photo].sum())
        alone = Targets(
            targets.boxes_xyxy[one, :num],
            targets.texts[one, :num],
            targets.valid[one, :num],
            targets.text_valid[one],
        )
        got = simota(logits[:, one], boxes[:, one], alone)
        assert got.tolist() == together[:, one].tolist()


def targets_of(*boxes: tuple[float, float, float, float]) -> Targets:
    """One photo, one text, that describes all."""
    num = len(boxes)
    return Targets(
        torch.tensor(boxes, dtype=torch.float64).reshape(1, num, 4),
        torch.ones(1, num, 1, dtype=torch.bool),
        torch.ones(1, num, dtype=torch.bool),
        torch.ones(1, 1, dtype=torch.bool),
    )


def boxes_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float64)[None]


def test_simota_cost_by_hand() -> None:
    targets = targets_of((0.2, 0.2, 0.6, 0.6), (0.9, 0.9, 1.0, 1.0))
    boxes = boxes_of(
        (0.2, 0.2, 0.6, 0.6),  # the first target itself
        (
            0.2,
            0.2,
            0.4,
            0.6,
        ),  # its left half: center in the box, .1 from the center region's middle
        (0.0, 0.0, 0.1, 0.1),  # nowhere
    )
    cost = simota_cost(torch.zeros(1, 3, 1, dtype=torch.float64), boxes, targets)[0, 0]
    base = -math.log(2) / 8
    hull, union = 0.36, 0.16 + 0.01
    want = [base - 3, base - 1.5 + 100, base + 3 * (hull - union) / hull + 100 + 10_000]
    assert cost.tolist() == pytest.approx(want)


def test_simota_ignores_padding() -> None:
    """A query in the corner is not near the zeros that fill up the targets."""
    corner = boxes_of((0.0, 0.0, 0.02, 0.02))
    one = targets_of((0.5, 0.5, 0.7, 0.7))
    padded = Targets(
        torch.nn.functional.pad(one.boxes_xyxy, (0, 0, 0, 1)),
        torch.nn.functional.pad(one.texts, (0, 0, 0, 1)),
        torch.tensor([[True, False]]),
        one.text_valid,
    )
    logits = torch.zeros(1, 1, 1, dtype=torch.float64)
    cost = simota_cost(logits, corner, padded)[0]
    assert cost[0].item() > 10_000
    assert torch.equal(cost[:1], simota_cost(logits, corner, one)[0])


def test_simota_number_of_queries_is_the_sum_of_the_ious() -> None:
    target = (0.2, 0.2, 0.6, 0.6)
    halves = ((0.2, 0.2, 0.6, 0.4), (0.2, 0.4, 0.6, 0.6), (0.2, 0.2, 0.4, 0.6))
    boxes = boxes_of(target, *halves, (0.8, 0.8, 0.9, 0.9))
    assigned = simota(torch.zeros(1, 5, 1), boxes, targets_of(target))
    # IoU 1 + 3/2: two queries. The halves tie, the first of them is taken
    assert assigned.tolist() == [[0, 0, -1, -1, -1]]


def test_simota_score_decides_between_equal_boxes() -> None:
    target = (0.2, 0.2, 0.6, 0.6)
    half = (0.2, 0.2, 0.6, 0.5)
    logits = torch.tensor([[[0.0], [2.0], [1.0]]])
    # three times IoU 3/4: two queries
    assert simota(logits, boxes_of(half, half, half), targets_of(target)).tolist() == [[-1, 0, 0]]


def test_simota_contested_query_goes_to_the_cheaper_target() -> None:
    left, right = (0.2, 0.2, 0.6, 0.6), (0.22, 0.2, 0.62, 0.6)
    near_left, far = (0.2, 0.2, 0.6, 0.61), (0.9, 0.9, 0.95, 0.95)
    assigned = simota(torch.zeros(1, 2, 1), boxes_of(near_left, far), targets_of(left, right))
    # both want query 0; the loser is served by what is left
    assert assigned.tolist() == [[0, 1]]


def test_simota_takes_a_query_from_a_target_with_several_if_none_is_free() -> None:
    target, far = (0.2, 0.2, 0.6, 0.6), (0.8, 0.8, 0.9, 0.9)
    boxes = boxes_of(target, target, target)
    assert simota(torch.zeros(1, 3, 1), boxes, targets_of(target, far)).tolist() == [[1, 0, 0]]


def test_simota_with_more_targets_than_queries_serves_the_cheapest() -> None:
    a, b, c = (0.0, 0.0, 0.2, 0.2), (0.4, 0.4, 0.6, 0.6), (0.8, 0.8, 1.0, 1.0)
    assert simota(torch.zeros(1, 1, 1), boxes_of(b), targets_of(a, b, c)).tolist() == [[1]]


@pytest.mark.parametrize(("queries", "targets"), [(0, 2), (3, 0), (0, 0)])
def test_simota_without_queries_or_targets(queries: int, targets: int) -> None:
    none = Targets(
        torch.zeros(2, targets, 4),
        torch.zeros(2, targets, 5, dtype=torch.bool),
        torch.zeros(2, targets, dtype=torch.bool),
        torch.ones(2, 5, dtype=torch.bool),
    )
    assigned = simota(torch.zeros(6, 2, queries, 5), torch.zeros(6, 2, queries, 4), none)
    assert assigned.shape == (6, 2, queries)
    assert (assigned == -1).all()


def test_simota_has_no_gradient_and_accepts_nan() -> None:
    logits = torch.full((1, 4, 1), torch.nan, requires_grad=True)
    boxes = torch.rand(1, 4, 4).sort().values
    boxes[0, 0] = torch.nan
    assigned = simota(logits, boxes, targets_of((0.2, 0.2, 0.6, 0.6), (0.3, 0.3, 0.5, 0.5)))
    assert not assigned.requires_grad
    assert set(assigned.flatten().tolist()) == {-1, 0, 1}


def test_simota_in_half_precision_under_autocast_is_computed_in_float32() -> None:
    logits, boxes, targets = random_case(5)
    logits, boxes = logits.bfloat16(), boxes.bfloat16()
    want = simota(logits.float(), boxes.float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert simota(logits, boxes, targets).tolist() == want.tolist()


def test_simota_under_autocast_distinguishes_small_differences() -> None:
    target = (0.2, 0.2, 0.6, 0.6)
    boxes = boxes_of(*[(0.2, 0.2, 0.6, 0.4)] * 3).float()  # three times IoU 1/2: one query
    logits = torch.tensor([[[1.0], [1.0001], [1.0002]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert simota(logits, boxes, targets_of(target)).tolist() == [[-1, -1, 0]]


# --------------------------------------------------------------------------------------- Hungarian


def slow_total(logits: Tensor, boxes: Tensor, targets: Tensor) -> list[list[float]]:
    """One photo: cost of each target (row) with each proposal (column)."""
    out = []
    for target in targets.tolist():
        row = []
        for logit, box in zip(logits.tolist(), boxes.tolist(), strict=True):
            center = [(box[i] + box[i + 2] - target[i] - target[i + 2]) / 2 for i in (0, 1)]
            size = [(box[i + 2] - box[i]) - (target[i + 2] - target[i]) for i in (0, 1)]
            l1 = sum(abs(x) for x in center + size)
            giou = slow_iou_and_giou(target, box)[1]
            row.append(2 * slow_focal_cost(logit) + 5 * l1 - 2 * giou)
        out.append(row)
    return out


def best_total(cost: list[list[float]], num_columns: int) -> float:
    """The least total over every way to pair rows and columns one to one."""
    num_rows = len(cost)
    if num_rows <= num_columns:
        ways = itertools.permutations(range(num_columns), num_rows)
        return min(sum(cost[g][a] for g, a in enumerate(way)) for way in ways)
    turned = [[cost[g][a] for g in range(num_rows)] for a in range(num_columns)]
    return best_total(turned, num_rows)


@given(seeds, st.integers(1, 5), st.integers(1, 4))
@few
def test_hungarian_has_the_lowest_cost_of_all_assignments(
    seed: int, proposals: int, most: int
) -> None:
    logits, boxes, targets = random_case(seed, layers=1, queries=proposals, most=most)
    logits, boxes = logits[0, ..., 0], boxes[0]
    assigned = hungarian(logits, boxes, targets)
    assert assigned.shape == (3, proposals)
    for photo in range(3):
        num = int(targets.valid[photo].sum())
        cost = slow_total(logits[photo], boxes[photo], targets.boxes_xyxy[photo, :num])
        found, where = (x[photo, :num].tolist() for x in cheapest_proposals(logits, boxes, targets))
        for row, cheapest, whose in zip(cost, found, where, strict=True):
            assert cheapest == pytest.approx(sorted(row)[: len(cheapest)])
            assert cheapest == pytest.approx([row[a] for a in whose])
        pairs = [(g, a) for a, g in enumerate(assigned[photo].tolist()) if g >= 0]
        assert len(pairs) == len({g for g, _ in pairs}) == min(num, proposals)
        got = sum(cost[g][a] for g, a in pairs)
        assert got == pytest.approx(best_total(cost, proposals) if num else 0)


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_giou_is_computed_for_few_proposals_only(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result equals the full computation, even when the first candidates do not suffice."""
    logits, boxes, targets = random_case(5, layers=1, queries=3000, most=4)
    logits, boxes = spread * logits[0, ..., 0], boxes[0]
    counts: list[int] = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        counts.append(b.shape[-2])
        return generalized_iou(a, b)

    monkeypatch.setattr(matching, "generalized_iou", counted)
    monkeypatch.setattr(matching, "FIRST_TRIED", 40)
    found, where = cheapest_proposals(logits, boxes, targets)
    assert counts[0] == 40
    assert sum(counts) < 3000
    monkeypatch.setattr(matching, "FIRST_TRIED", 3000)
    wanted, whose = cheapest_proposals(logits, boxes, targets)
    for photo in range(len(logits)):
        num = int(targets.valid[photo].sum())
        torch.testing.assert_close(found[photo, :num], wanted[photo, :num])
        assert torch.equal(where[photo, :num], whose[photo, :num])


@pytest.mark.parametrize("kind", ["random", "rounded", "equal", "points", "far", "nan"])
def test_few_candidates_give_the_same_result_as_all_proposals(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the full computation; also for equal costs and for boxes without area."""
    for seed in range(20):
        monkeypatch.setattr(matching, "FIRST_TRIED", 1 + seed % 10)
        logits, boxes, targets = random_case(seed, layers=1, queries=150, most=1 + seed % 4)
        logits, boxes = 2 * logits[0, ..., 0], boxes[0]
        if kind == "rounded":
            logits, boxes = logits.round(), (4 * boxes).round() / 4
        elif kind == "equal":
            logits, boxes = torch.zeros_like(logits), boxes[:, :1].expand_as(boxes)
        elif kind == "points":
            boxes = torch.cat([boxes[..., :2], boxes[..., :2]], dim=-1)
        elif kind == "far":
            boxes = 20 * boxes - 10
        elif kind == "nan":
            logits[0], boxes[1, ::3] = torch.nan, torch.nan
        wanted = targets.boxes_xyxy[:, :, None]
        l1 = (center_size(wanted) - center_size(boxes)[:, None]).abs().sum(-1)
        giou = generalized_iou(wanted, boxes[:, None])
        cost = (2 * focal_cost(logits)[:, None] + 5 * l1 - 2 * giou).nan_to_num(nan=1e6)
        found, where = cheapest_proposals(logits, boxes, targets)
        cheapest = cost.topk(found.shape[-1], largest=False).values
        real = targets.valid  # rtol lets costs of 1e6, which stand for NaN, differ by 2 * GIoU
        torch.testing.assert_close(found[real], cheapest[real], rtol=3e-6, atol=1e-9)
        torch.testing.assert_close(cost.gather(-1, where)[real], found[real], rtol=3e-6, atol=1e-9)


def test_hungarian_by_hand() -> None:
    """The greedy choice, target 0 with its own box, would leave target 1 with the far one."""
    a, b = (0.2, 0.2, 0.4, 0.4), (0.22, 0.2, 0.42, 0.4)
    boxes = boxes_of(b, (0.7, 0.7, 0.9, 0.9), a)
    assert hungarian(torch.zeros(1, 3), boxes, targets_of(a, b)).tolist() == [[1, -1, 0]]
    better = torch.tensor([[0.0, 0.0, 0.0]])
    twins = boxes_of(a, a, a)
    better[0, 1] = 3.0
    assert hungarian(better, twins, targets_of(a)).tolist() == [[-1, 0, -1]]


@pytest.mark.parametrize(("proposals", "targets"), [(0, 2), (3, 0)])
def test_hungarian_without_targets(proposals: int, targets: int) -> None:
    none = Targets(
        torch.rand(2, targets, 4),
        torch.ones(2, targets, 5, dtype=torch.bool),
        torch.ones(2, targets, dtype=torch.bool),
        torch.ones(2, 5, dtype=torch.bool),
    )
    assigned = hungarian(torch.zeros(2, proposals), torch.zeros(2, proposals, 4), none)
    assert assigned.shape == (2, proposals)
    assert (assigned == -1).all()


def test_hungarian_accepts_nan_and_half_precision() -> None:
    logits = torch.tensor([[torch.nan, 0.0, -torch.inf]], dtype=torch.bfloat16)
    boxes = boxes_of((0.2, 0.2, 0.4, 0.4), (0.2, 0.2, 0.4, 0.4), (0.2, 0.2, 0.4, 0.4)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assigned = hungarian(logits, boxes, targets_of((0.2, 0.2, 0.4, 0.4)))
    assert assigned.tolist() == [[-1, 0, -1]]

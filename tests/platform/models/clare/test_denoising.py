"""Denoising queries against one query at a time, and their noise against its bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reir.models.clare.denoising import (
    MIN_SIDE,
    DenoisingContent,
    DenoisingQueries,
    denoising_queries,
    isolation_mask,
    num_groups,
)

CPU = torch.device("cpu")
DIM = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    boxes: Tensor, valid: Tensor, *, num_queries: int = 5, seed: int = 0
) -> tuple[DenoisingQueries, Tensor]:
    content = torch.randn(*valid.shape, DIM, generator=seeded(9)).requires_grad_()
    seeds = [len(boxes) * seed + photo for photo in range(len(boxes))]
    queries = denoising_queries(content, boxes, valid, num_queries=num_queries, seeds=seeds)
    return queries, content


def inner_boxes(photos: int, targets: int, seed: int) -> Tensor:
    """Far enough from the edge that the noise is never cut off."""
    middle = 0.4 + 0.2 * torch.rand(photos, targets, 2, generator=seeded(seed))
    half = 0.05 + 0.1 * torch.rand(photos, targets, 2, generator=seeded(seed + 1))
    return torch.cat([middle - half, middle + half], -1)


def slow_layout(num_targets: int, valid: list[bool]) -> list[tuple[int, bool]]:
    """(target or -1, positive) of each query of one photo, in order."""
    groups = max(1, 200 // (2 * num_targets))
    out = []
    for _ in range(groups):
        for positive in (True, False):
            for target in range(num_targets):
                real = valid[target]
                out.append((target if real else -1, positive and real))
    return out


@pytest.mark.parametrize(
    ("targets", "groups"), [(0, 0), (1, 100), (2, 50), (3, 33), (100, 1), (101, 1), (500, 1)]
)
def test_number_of_denoising_groups_by_hand(targets: int, groups: int) -> None:
    assert num_groups(targets) == groups


@pytest.mark.parametrize("num_targets", [1, 3, 60])
def test_the_layout_of_denoising_queries_equals_the_loop(num_targets: int) -> None:
    valid = torch.rand(3, num_targets, generator=seeded(4)) < 0.6
    valid[0], valid[1] = True, False
    queries, content = make(inner_boxes(3, num_targets, 2), valid)
    for photo in range(3):
        want = slow_layout(num_targets, valid[photo].tolist())
        assert queries.target[photo].tolist() == [target for target, _ in want]
        assert queries.positive[photo].tolist() == [positive for _, positive in want]
        for row, (target, _) in zip(queries.content[photo], want, strict=True):
            expected = content[photo, target] if target >= 0 else torch.zeros(DIM)
            assert torch.equal(row, expected)


def corner_moves(queries: DenoisingQueries, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, 4) how far each side went, as a share of the size; and whether the box is whole."""
    own = boxes.gather(1, queries.target[..., None].expand(-1, -1, 4))
    found = queries.boxes_cxcywh
    low, high = found[..., :2] - found[..., 2:] / 2, found[..., :2] + found[..., 2:] / 2
    size = (own[..., 2:] - own[..., :2]).repeat(1, 1, 2)
    moved = (torch.cat([low, high], -1) - own).abs() / size
    return moved, (found[..., 2:] > 2 * MIN_SIDE).all(-1)


@given(st.integers(0, 2**31 - 1), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_noise_moves_positives_less_than_half_a_side_and_negatives_more(
    seed: int, num_targets: int
) -> None:
    boxes = inner_boxes(2, num_targets, seed)
    queries, _ = make(boxes, torch.ones(2, num_targets, dtype=torch.bool), seed=seed)
    moved, whole = corner_moves(queries, boxes)
    assert whole[queries.positive].float().mean() > 0.97  # both sides may go in by nearly half
    assert (moved[queries.positive & whole] < 0.5 + 1e-4).all()
    negatives = ~queries.positive & whole
    assert (moved[negatives] >= 0.5 - 1e-4).all()
    assert (moved[negatives] <= 1 + 1e-4).all()


def test_noise_fills_its_range_in_both_directions() -> None:
    boxes = torch.tensor([[[0.4, 0.4, 0.6, 0.6]]])
    queries, _ = make(boxes, torch.ones(1, 1, dtype=torch.bool))
    found = queries.boxes_cxcywh[queries.positive]
    left = (found[:, 0] - found[:, 2] / 2 - 0.4) / 0.2
    assert left.min() < -0.4
    assert left.max() > 0.4
    assert abs(left.mean().item()) < 0.1
    moved, whole = corner_moves(queries, boxes)
    negatives = moved[~queries.positive & whole]
    assert negatives.min() < 0.55
    assert negatives.max() > 0.95
    assert 0 < (~whole).sum() < 80  # sides that cross leave next to nothing, never a good box


def test_boxes_at_the_edge_stay_within_the_open_unit_square() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.99, 0.0, 1.0, 0.01], [0.3, 0.3, 0.3, 0.3]]])
    queries, _ = make(boxes, torch.tensor([[True, True, True]]))
    assert (queries.boxes_cxcywh > 0).all()
    assert (queries.boxes_cxcywh < 1).all()
    assert queries.boxes_cxcywh.logit().isfinite().all()


def test_the_seeds_determine_the_noise() -> None:
    boxes, valid = inner_boxes(2, 2, 0), torch.ones(2, 2, dtype=torch.bool)
    first, again, other = (make(boxes, valid, seed=seed)[0].boxes_cxcywh for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first[0].tolist()}) == first.shape[1]


def test_the_noise_of_a_photo_does_not_depend_on_the_batch() -> None:
    boxes, valid = inner_boxes(3, 2, 0), torch.ones(3, 2, dtype=torch.bool)
    content = torch.zeros(3, 2, DIM)
    whole = denoising_queries(content, boxes, valid, num_queries=5, seeds=[7, 8, 9])
    part = denoising_queries(content[1:], boxes[1:], valid[1:], num_queries=5, seeds=[8, 9])
    assert torch.equal(part.boxes_cxcywh, whole.boxes_cxcywh[1:])


def test_boxes_are_float32_in_a_half_precision_model() -> None:
    boxes, valid = inner_boxes(1, 2, 0), torch.ones(1, 2, dtype=torch.bool)
    queries = denoising_queries(
        torch.zeros(1, 2, DIM, dtype=torch.bfloat16),
        boxes.bfloat16(),
        valid,
        num_queries=3,
        seeds=[0],
    )
    assert queries.boxes_cxcywh.dtype == torch.float32
    assert queries.content.dtype == torch.bfloat16


def test_padding_has_no_content_and_the_middle_box() -> None:
    queries, content = make(inner_boxes(1, 2, 0), torch.tensor([[True, False]]))
    padding = queries.target < 0
    assert padding.sum() == 100
    assert (queries.boxes_cxcywh[padding] == 0.5).all()
    queries.content.sum().backward()  # type: ignore[no-untyped-call]
    assert content.grad is not None
    assert content.grad[0, 0].tolist() == [100.0] * DIM  # 50 groups, two queries each
    assert not content.grad[0, 1].any()


def slow_mask(groups: int, size: int, num_queries: int) -> list[list[bool]]:
    kinds = [g for g in range(groups) for _ in range(size)] + [None] * num_queries
    return [[there is not None and there != here for there in kinds] for here in kinds]


@pytest.mark.parametrize(
    ("groups", "size", "queries"), [(3, 4, 5), (1, 2, 1), (2, 2, 0), (0, 0, 3)]
)
def test_the_isolation_mask_equals_the_loop(groups: int, size: int, queries: int) -> None:
    mask = isolation_mask(groups, size, queries, device=CPU)
    assert mask.tolist() == slow_mask(groups, size, queries)


def test_the_isolation_mask_by_hand() -> None:
    """Two groups of one positive and one negative, one matching query."""
    queries = isolation_mask(2, 2, 1, device=CPU)
    assert queries.int().tolist() == [
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
    ]


def test_matching_queries_do_not_change_through_attention_with_denoising_queries() -> None:
    queries, _ = make(inner_boxes(1, 3, 0), torch.ones(1, 3, dtype=torch.bool), num_queries=7)
    matching = torch.randn(1, 7, DIM, generator=seeded(3))
    together = torch.cat([queries.content.detach(), matching], dim=1)
    attend = torch.nn.functional.scaled_dot_product_attention
    seen = attend(together, together, together, attn_mask=~queries.attention_mask)
    torch.testing.assert_close(seen[:, -7:], attend(matching, matching, matching))


def test_photos_without_targets_have_no_denoising_queries() -> None:
    queries, content = make(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    assert queries.content.shape == (2, 0, DIM)
    assert queries.boxes_cxcywh.shape == (2, 0, 4)
    assert queries.positive.shape == queries.target.shape == (2, 0)
    assert queries.attention_mask.tolist() == [[False] * 5] * 5
    queries.content.sum().backward()  # type: ignore[no-untyped-call]
    assert content.grad is not None


def test_denoising_content_is_a_normalized_projection() -> None:
    torch.manual_seed(0)
    layer = DenoisingContent(4, DIM)
    text = torch.randn(2, 3, 4)
    got = layer(text)
    plain = text @ layer.linear.weight.T + layer.linear.bias
    centered = plain - plain.mean(-1, keepdim=True)
    want = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(got, want)
    assert layer(torch.zeros(2, 0, 4)).shape == (2, 0, DIM)

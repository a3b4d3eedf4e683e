"""Anchors, their selection, and the candidates of `clare-nano` as anchors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reir.models.nano.box_geometry import box_geometry
from reir.models.nano.model import CandidateBatch
from reir.models.weak_rec.anchors import Anchors, CandidateAnchors, FrozenParts, Standardize
from reir_testing.tiny import tiny_batch, tiny_model

NUM_PHOTOS, NUM_ANCHORS, NUM_BOXES = 3, 5, 2


def random_anchors() -> Anchors:
    """Anchors whose confidences all differ, with padding in two of three photos."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(NUM_PHOTOS, NUM_ANCHORS, *shape, generator=random)

    valid = torch.ones(NUM_PHOTOS, NUM_ANCHORS, dtype=torch.bool)
    valid[1, 3:], valid[2] = False, False
    return Anchors(uniform(7), uniform(NUM_BOXES, 4), uniform(NUM_BOXES), uniform(6), valid)


# ---------------------------------------------------------------------------------------- anchors


@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_anchors_of_the_highest_mean_confidence_are_kept_with_all_that_is_known(
    num: int,
) -> None:
    found = random_anchors()
    kept = found.most_confident(num)
    for photo in range(NUM_PHOTOS):
        means = {
            row: sum(found.confidence[photo, row].tolist()) / NUM_BOXES
            for row in range(NUM_ANCHORS)
            if found.valid[photo, row]
        }
        best = sorted(means, key=lambda row: -means[row])[:num]
        assert kept.valid[photo].tolist() == [place < len(best) for place in range(num)]
        for place, row in enumerate(best):
            for of_kept, of_found in zip(kept, found, strict=True):
                assert torch.equal(of_kept[photo, place], of_found[photo, row])


def test_more_anchors_than_there_are_keep_all() -> None:
    found = random_anchors()
    kept = found.most_confident(100)
    assert kept.valid.shape == (NUM_PHOTOS, NUM_ANCHORS)
    assert torch.equal(kept.valid.sum(1), found.valid.sum(1))


def test_the_answer_is_the_most_confident_box_of_an_anchor() -> None:
    found = random_anchors()
    answers = found.answers()
    for photo in range(NUM_PHOTOS):
        for row in range(NUM_ANCHORS):
            first, second = found.confidence[photo, row].tolist()
            assert torch.equal(answers[photo, row], found.boxes[photo, row, int(second > first)])


# -------------------------------------------------------------------------------------- candidates


@pytest.fixture(scope="module")
def source() -> CandidateAnchors:
    return CandidateAnchors(FrozenParts.of(tiny_model()))


@pytest.fixture
def candidates() -> CandidateBatch:
    """Candidates of three photos, two of which have padding, with values that must not count."""
    batch = tiny_batch(NUM_PHOTOS, NUM_ANCHORS)
    batch.valid[1, 3:], batch.valid[2] = False, False
    return batch


def test_features_are_differences_from_the_mean_of_the_photo(candidates: CandidateBatch) -> None:
    found = CandidateAnchors.features(candidates)
    place = box_geometry(candidates.boxes, candidates.objectness, candidates.aspect)
    every = torch.cat([candidates.crops, candidates.detector, place], dim=-1).double()
    assert found.shape[-1] == CandidateAnchors.width == every.shape[-1]
    for photo, count in enumerate((5, 3, 0)):
        rows = every[photo, :count]
        torch.testing.assert_close(found[photo, :count].double(), rows - rows.mean(0))
        assert not found[photo, count:].any()


def test_what_all_candidates_of_a_photo_share_changes_nothing(
    source: CandidateAnchors, candidates: CandidateBatch
) -> None:
    source.fit(candidates)
    before = source(candidates.tensors())
    common = torch.randn(NUM_PHOTOS, 1, candidates.crops.shape[-1])
    after = source(replace(candidates, crops=candidates.crops + common).tensors())
    torch.testing.assert_close(after.features, before.features, atol=1e-3, rtol=1e-4)
    own = torch.randn(NUM_PHOTOS, NUM_ANCHORS, candidates.crops.shape[-1])
    other = source(replace(candidates, crops=candidates.crops + own).tensors())
    assert (other.features - before.features).abs().mean() > 0.1


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_candidates_for_a_deviation_keep_their_features(
    source: CandidateAnchors, candidates: CandidateBatch, num: int
) -> None:
    alone = CandidateAnchors(source.parts)
    only = torch.zeros_like(candidates.valid)
    only[0, :num] = True
    alone.fit(replace(candidates, valid=only))
    expected = CandidateAnchors.features(candidates)
    assert torch.equal(alone(candidates.tensors()).features, expected)


def test_padding_changes_nothing(source: CandidateAnchors, candidates: CandidateBatch) -> None:
    padding = ~candidates.valid[..., None]
    changed = {
        name: getattr(candidates, name) + 9 * padding for name in ("crops", "detector", "boxes")
    }
    source.fit(candidates)
    mean = source.standardize.mean.clone()
    before, after = source(candidates.tensors()), source({**candidates.tensors(), **changed})
    valid = candidates.valid
    assert torch.equal(after.features[valid], before.features[valid])
    source.fit(replace(candidates, **changed))
    assert torch.equal(source.standardize.mean, mean)


def test_each_candidate_is_an_anchor_with_one_box(
    source: CandidateAnchors, candidates: CandidateBatch
) -> None:
    found = source(candidates.tensors())
    assert found.boxes.shape == (NUM_PHOTOS, NUM_ANCHORS, 1, 4)
    assert torch.equal(found.answers(), candidates.boxes)
    assert torch.equal(found.confidence[..., 0], candidates.objectness)
    assert torch.equal(found.class_scores, candidates.class_scores)
    assert torch.equal(found.valid, candidates.valid)
    assert not any(p.requires_grad for p in source.parameters())


def test_standardized_features_have_mean_0_and_deviation_1() -> None:
    rows = torch.randn(50, 3) * torch.tensor([1e-9, 1.0, 40.0]) + torch.tensor([2.0, 0.0, -7.0])
    layer = Standardize(3)
    assert torch.equal(layer(rows), rows)
    layer.fit(rows)
    found = layer(rows)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    # A feature that hardly varies is not blown up.
    assert found[:, 0].std() < 1e-3
    torch.testing.assert_close(found[:, 1:].std(0), torch.ones(2))
    values = rows[:, 2].tolist()
    mean = math.fsum(values) / 50
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / 49)
    assert found[7, 2].item() == pytest.approx((values[7] - mean) / deviation, rel=1e-4)

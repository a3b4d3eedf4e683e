"""The mask losses, compared with nested loops and by hand; choice of queries; two workers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reir_testing.clare_steps import (
    CELLS,
    LAYERS,
    PHOTOS,
    QUERIES,
    some_masks,
    some_predictions,
    some_targets,
)
from reir_training.clare.losses import ClareLossWeights, Predictions, StepOutputs, clare_losses
from reir_training.clare.mask_losses import MaskOutputs, choose_pairs, mask_distances
from reir_training.clare.matching import Targets, simota

seeds = st.integers(0, 2**31 - 1)
PLAIN = ClareLossWeights(classes=0, l1=0, giou=0, mask_focal=1, mask_dice=1)
NAMES = ("mask_focal", "mask_dice")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_step(seed: int) -> tuple[Predictions, Targets, MaskOutputs, Tensor]:
    random = seeded(seed)
    decoder, targets = some_predictions(random), some_targets(random)
    return decoder, targets, *some_masks(random, targets)


# ------------------------------------------------------------------------------------- one by one


def slow_mask(logits: Tensor, wanted: Tensor, inside: Tensor) -> tuple[float, float]:
    """Focal loss a cell, and 1 - dice, of one mask."""
    focal = common = both = cells = 0.0
    for row in range(logits.shape[0]):
        for column in range(logits.shape[1]):
            if not inside[row, column]:
                continue
            p = 1 / (1 + math.exp(-logits[row, column].item()))
            if wanted[row, column]:
                focal += -0.25 * (1 - p) ** 2 * math.log(p)
                common += p
            else:
                focal += -0.75 * p**2 * math.log(1 - p)
            both += p + float(wanted[row, column])
            cells += 1
    return focal / cells, 1 - (2 * common + 1) / (both + 1)


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_mask_losses_equal_the_loop(seed: int) -> None:
    decoder, targets, masks, logits = some_step(seed)
    losses = clare_losses(StepOutputs(decoder, masks=masks), targets, PLAIN)
    assigned = simota(decoder.logits, decoder.boxes_xyxy, targets)
    want = [0.0, 0.0]
    for layer in range(LAYERS):
        pairs = [
            slow_mask(logits[layer, b, n], masks.targets[b, g], masks.inside[b])
            for b in range(PHOTOS)
            for n in range(QUERIES)
            if (g := int(assigned[layer, b, n])) >= 0 and masks.known[b, g]
        ]
        for part in (0, 1):
            want[part] += sum(pair[part] for pair in pairs) / len(pairs) if pairs else 0.0
    assert [losses[name].item() for name in NAMES] == pytest.approx(want)


def test_mask_distances_by_hand() -> None:
    """Two cells of the mask, of one the model is sure; the padding does not count."""
    logits = torch.tensor([[100.0, 0.0, 100.0], [-100.0, -100.0, 100.0]])
    targets = torch.tensor([[True, True, False], [False, False, False]])
    inside = torch.tensor([[True, True, False], [True, True, False]])
    focal, dice = mask_distances(logits, targets, inside)
    assert focal.item() == pytest.approx(0.25 * 0.25 * math.log(2) / 4)
    assert dice.item() == pytest.approx(1 - (2 * 1.5 + 1) / (1.5 + 2 + 1))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    focal, dice = mask_distances(torch.full((2, 3), -100.0), nothing, inside)
    assert [focal.item(), dice.item()] == pytest.approx([0, 0])


def test_default_weights_are_the_published_ones() -> None:
    decoder, targets, masks, _ = some_step(0)
    outputs = StepOutputs(decoder, masks=masks)
    plain, weighted = (clare_losses(outputs, targets, w) for w in (PLAIN, ClareLossWeights()))
    assert weighted["mask_focal"].item() == pytest.approx(2 * plain["mask_focal"].item())
    assert weighted["mask_dice"].item() == pytest.approx(5 * plain["mask_dice"].item())


# --------------------------------------------------------------------------------- who is compared


def test_pairs_are_limited_fairly_to_matched_queries() -> None:
    assigned = torch.tensor([[[0, 0, -1, 0, 1, 2, 1]]])  # target 2 has no mask
    known = torch.tensor([[True, True, False]])
    for most, want in (
        (1, [(0, 0)]),
        (2, [(0, 0), (4, 1)]),
        (4, [(0, 0), (4, 1), (1, 0), (6, 1)]),
        (7, [(0, 0), (4, 1), (1, 0), (6, 1), (3, 0)]),
    ):
        pairs = choose_pairs(assigned, known, most)
        assert pairs.query.shape == (1, 1, most)
        got = list(zip(pairs.query[0, 0].tolist(), pairs.target[0, 0].tolist(), strict=True))
        assert [pair for pair in got if pair[1] >= 0] == want


@given(seeds, st.integers(1, QUERIES))
@settings(max_examples=30, deadline=None)
def test_numbers_of_pairs_per_target_differ_by_at_most_one(seed: int, most: int) -> None:
    random = seeded(seed)
    assigned = torch.randint(-1, 3, (LAYERS, PHOTOS, QUERIES), generator=random)
    known = torch.rand(PHOTOS, 3, generator=random) < 0.7
    pairs = choose_pairs(assigned, known, most)
    for layer in range(LAYERS):
        for b in range(PHOTOS):
            owned = Counter(g for g in assigned[layer, b].tolist() if g >= 0 and known[b, g])
            got = Counter(g for g in pairs.target[layer, b].tolist() if g >= 0)
            assert got.total() == min(most, owned.total())
            for g, number in got.items():
                assert known[b, g]
                assert number >= min(owned[g], max(got.values()) - 1)
            for n, g in zip(pairs.query[layer, b], pairs.target[layer, b], strict=True):
                assert g < 0 or assigned[layer, b, n] == g


def test_few_targets_need_few_masks() -> None:
    assigned = torch.zeros(1, 1, 50, dtype=torch.long)
    assert choose_pairs(assigned, torch.ones(1, 1, dtype=torch.bool), 32).query.shape == (1, 1, 10)
    assert choose_pairs(assigned - 1, torch.ones(1, 0, dtype=torch.bool), 32).target.max() == -1


# ------------------------------------------------------------------------- many workers, no masks


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([losses[name] for name in NAMES]).sum()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_two_workers_equal_one(cut: int) -> None:
    decoder, targets, masks, logits = some_step(5)
    weights = ClareLossWeights(masks_per_photo=2)
    outputs = StepOutputs(decoder, masks=masks)
    one = clare_losses(outputs, targets, weights, lambda counts: counts)
    (one_gradient,) = torch.autograd.grad(total(one), logits, retain_graph=True)
    workers = [part(outputs, targets, logits, rows) for rows in (slice(0, cut), slice(cut, None))]
    counted: list[Tensor] = []

    def note(counts: Tensor) -> Tensor:
        counted.append(counts)
        return counts

    for mine, wanted in workers:
        clare_losses(mine, wanted, weights, note)
    mean = torch.stack(counted).mean(0)
    two = [clare_losses(*worker, weights, lambda _: mean) for worker in workers]
    for name in NAMES:
        assert one[name].item() > 0
        torch.testing.assert_close((two[0][name] + two[1][name]) / 2, one[name])
    (two_gradient,) = torch.autograd.grad((total(two[0]) + total(two[1])) / 2, logits)
    torch.testing.assert_close(two_gradient, one_gradient)


def part(
    outputs: StepOutputs, targets: Targets, logits: Tensor, rows: slice
) -> tuple[StepOutputs, Targets]:
    """What a worker has that holds these photos."""
    masks = outputs.masks
    assert masks is not None

    def predict(query_LBP: Tensor) -> Tensor:
        return logits[:, rows].gather(2, query_LBP[..., None, None].expand(-1, -1, -1, *CELLS))

    mine = MaskOutputs(predict, masks.targets[rows], masks.known[rows], masks.inside[rows])
    decoder = Predictions(outputs.decoder.logits[:, rows], outputs.decoder.boxes_xyxy[:, rows])
    fields = ("boxes_xyxy", "texts", "valid", "text_valid")
    return StepOutputs(decoder, masks=mine), Targets(*(getattr(targets, f)[rows] for f in fields))


def test_targets_without_masks_have_zero_loss_with_gradients() -> None:
    decoder, targets, masks, logits = some_step(1)
    lengths = []

    def note(counts: Tensor) -> Tensor:
        lengths.append(len(counts))
        return counts

    for known in (masks.known, torch.zeros_like(masks.known)):
        outputs = StepOutputs(decoder, masks=replace(masks, known=known))
        losses = clare_losses(outputs, targets, ClareLossWeights(), note)
    assert lengths == [2 * LAYERS] * 2
    assert all(losses[name].item() == 0 for name in NAMES)
    (gradient,) = torch.autograd.grad(total(losses), logits)
    assert not gradient.any()
    bare = clare_losses(StepOutputs(decoder), targets, ClareLossWeights())
    assert set(losses) == set(bare) | set(NAMES)
    assert all(torch.equal(losses[name], value) for name, value in bare.items())


@pytest.mark.parametrize("scale", [0.0, 1e4], ids=["ties", "saturated"])
def test_gradients_are_finite(scale: float) -> None:
    decoder, targets, masks, logits = some_step(2)
    far = (logits.detach() * scale).bfloat16().requires_grad_()

    def predict(query_LBP: Tensor) -> Tensor:
        return far.gather(2, query_LBP[..., None, None].expand(-1, -1, -1, *CELLS))

    outputs = StepOutputs(decoder, masks=replace(masks, predict=predict))
    losses = clare_losses(outputs, targets, ClareLossWeights())
    assert losses["mask_focal"].dtype == torch.float32
    (gradient,) = torch.autograd.grad(total(losses), far)
    assert gradient.isfinite().all()

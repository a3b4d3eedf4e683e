"""CLARE's losses, compared with nested loops and values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reir_testing.clare_steps import (
    LAYERS,
    MOST_TARGETS,
    PHOTOS,
    QUERIES,
    some_clia,
    some_denoising,
    some_predictions,
    some_proposals,
    some_step,
    some_targets,
)
from reir_training.clare.losses import (
    ClareLossWeights,
    CliaBatch,
    Predictions,
    StepOutputs,
    clare_losses,
)
from reir_training.clare.matching import Targets, hungarian, simota

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=20, deadline=None)
PLAIN = ClareLossWeights(classes=1, l1=1, giou=1, clia=1, clia_auxiliary=1)
RELEASED = PLAIN.model_copy(update={"mask_false_negatives": False})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ the slow reference


def slow_focal(logit: float, target: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    if target:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def slow_box(a: list[float], b: list[float]) -> tuple[float, float]:
    """L1 of center and size, and 1 - GIoU."""
    l1 = sum(abs((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2) for i in (0, 1))
    l1 += sum(abs((a[i + 2] - a[i]) - (b[i + 2] - b[i])) for i in (0, 1))
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return l1, 1 - (inter / union - (hull - union) / hull)


def slow_layer(
    logits: Tensor, boxes: Tensor, assigned: Tensor, targets: Targets, counted: Tensor
) -> list[float]:
    """Classes, L1 and GIoU of one layer."""
    classes = l1 = giou = matched = 0.0
    for b in range(logits.shape[0]):
        for n in range(logits.shape[1]):
            if not counted[b, n]:
                continue
            g = int(assigned[b, n])
            for c in range(logits.shape[2]):
                if targets.text_valid[b, c]:
                    wanted = g >= 0 and bool(targets.texts[b, g, c])
                    classes += slow_focal(logits[b, n, c].item(), wanted)
            if g >= 0:
                matched += 1
                parts = slow_box(boxes[b, n].tolist(), targets.boxes_xyxy[b, g].tolist())
                l1, giou = l1 + parts[0], giou + parts[1]
    return [value / matched if matched else 0.0 for value in (classes, l1, giou)]


def slow_parts(
    said: Predictions, assigned: Tensor, targets: Targets, counted: Tensor | None = None
) -> list[float]:
    if counted is None:
        counted = torch.ones(said.boxes_xyxy.shape[1:3], dtype=torch.bool)
    layers = [
        slow_layer(logits, boxes, owner, targets, counted)
        for logits, boxes, owner in zip(said.logits, said.boxes_xyxy, assigned, strict=True)
    ]
    return [sum(values) for values in zip(*layers, strict=True)]


def parts_of(losses: dict[str, Tensor], prefix: str = "") -> list[float]:
    return [losses[prefix + name].item() for name in ("classes", "l1", "giou")]


# ---------------------------------------------------------------------- decoder, encoder, denoising


@given(seeds)
@few
def test_decoder_losses_equal_the_loop(seed: int) -> None:
    random = seeded(seed)
    decoder, targets = some_predictions(random), some_targets(random)
    losses = clare_losses(StepOutputs(decoder), targets, PLAIN)
    assert set(losses) == {"classes", "l1", "giou"}
    assigned = simota(decoder.logits, decoder.boxes_xyxy, targets)
    assert parts_of(losses) == pytest.approx(slow_parts(decoder, assigned, targets))


@given(seeds)
@few
def test_proposal_losses_equal_the_loop(seed: int) -> None:
    random = seeded(seed)
    targets = some_targets(random)
    logits_BA, boxes = some_proposals(random)
    outputs = StepOutputs(some_predictions(random), proposals=(logits_BA, boxes))
    losses = clare_losses(outputs, targets, PLAIN)
    said = Predictions(logits_BA[None, ..., None], boxes[None])
    assigned = hungarian(logits_BA, boxes, targets)[None]
    want = slow_parts(said, assigned, targets.class_agnostic())
    assert parts_of(losses, "proposal_") == pytest.approx(want)


@given(seeds)
@settings(max_examples=5, deadline=None)
def test_denoising_losses_equal_the_loop(seed: int) -> None:
    random = seeded(seed)
    targets = some_targets(random)
    said, queries = some_denoising(random, targets)
    outputs = StepOutputs(some_predictions(random), denoising=(said, queries))
    losses = clare_losses(outputs, targets, PLAIN)
    assigned = [
        [t if p else -1 for t, p in zip(*row, strict=True)]
        for row in zip(queries.target.tolist(), queries.positive.tolist(), strict=True)
    ]
    every_layer = torch.tensor(assigned).expand(LAYERS, -1, -1)
    want = slow_parts(said, every_layer, targets, counted=queries.target >= 0)
    assert parts_of(losses, "denoising_") == pytest.approx(want)


def one_target(box: tuple[float, float, float, float]) -> Targets:
    true = torch.ones(1, 1, dtype=torch.bool)
    return Targets(torch.tensor([[box]]), true[None], true, true)


def test_decoder_losses_by_hand() -> None:
    """One target, one layer, two queries of score 0: the box itself and one far away."""
    target = (0.0, 0.0, 0.25, 1.0)
    boxes = torch.tensor([[[target, (0.75, 0.0, 1.0, 1.0)]]])
    losses = clare_losses(
        StepOutputs(Predictions(torch.zeros(1, 1, 2, 1), boxes)),
        one_target(target),
        ClareLossWeights(),
    )
    # ln 2 / 16 for the match and three times that for the other query, weight 2
    assert losses["classes"].item() == pytest.approx(2 * 4 * math.log(2) / 16)
    assert losses["l1"].item() == pytest.approx(0)
    assert losses["giou"].item() == pytest.approx(0, abs=1e-6)


def test_box_losses_by_hand() -> None:
    said = Predictions(torch.zeros(1, 1, 1, 1), torch.tensor([[[[0.0, 0.0, 0.25, 1.0]]]]))
    losses = clare_losses(StepOutputs(said), one_target((0.75, 0.0, 1.0, 1.0)), ClareLossWeights())
    # the center is .75 away, the size agrees; GIoU is -1/2
    assert losses["l1"].item() == pytest.approx(5 * 0.75)
    assert losses["giou"].item() == pytest.approx(2 * 1.5)


def test_a_detection_batch_trains_eighty_classes() -> None:
    random = seeded(3)
    decoder = some_predictions(random, texts=80)
    targets = some_targets(random, texts=80)
    one_class = torch.randint(80, (PHOTOS, MOST_TARGETS), generator=random)
    texts = torch.nn.functional.one_hot(one_class, 80).bool() & targets.valid[..., None]
    targets = replace(targets, texts=texts, text_valid=torch.ones(PHOTOS, 80, dtype=torch.bool))
    losses = clare_losses(StepOutputs(decoder), targets, PLAIN)
    assigned = simota(decoder.logits, decoder.boxes_xyxy, targets)
    assert parts_of(losses) == pytest.approx(slow_parts(decoder, assigned, targets))


def test_padding_does_not_change_the_loss() -> None:
    random = seeded(8)
    decoder, targets = some_predictions(random), some_targets(random)
    losses = clare_losses(StepOutputs(decoder), targets, PLAIN)
    more = Targets(
        torch.cat([targets.boxes_xyxy, torch.full((PHOTOS, 2, 4), 0.3)], 1),
        torch.nn.functional.pad(targets.texts, (0, 4, 0, 2)),
        torch.nn.functional.pad(targets.valid, (0, 2)),
        torch.nn.functional.pad(targets.text_valid, (0, 4)),
    )
    logits = torch.nn.functional.pad(decoder.logits, (0, 4), value=9.0)
    padded = clare_losses(StepOutputs(Predictions(logits, decoder.boxes_xyxy)), more, PLAIN)
    for name, value in losses.items():
        torch.testing.assert_close(padded[name], value)


# -------------------------------------------------------------------------------------------- CLIA


def slow_clia(clia: CliaBatch, assigned: Tensor, layer: int, mask: bool) -> float:
    total = 0.0
    num_expressions = len(clia.photo)
    for m in range(num_expressions):
        for b in range(PHOTOS):
            for n in range(QUERIES):
                x = clia.logits[layer, m, b, n].item()
                g = int(assigned[layer, b, n])
                if clia.photo[m] == b and g >= 0 and clia.target[m] == g:
                    total += math.log1p(math.exp(-x))
                    continue
                same_photo = clia.photo[m] != b and clia.image[m] == clia.photo_image[b]
                same_instance = (
                    g >= 0
                    and clia.instance[m] >= 0
                    and clia.instance[m] == clia.target_instance[b, g]
                )
                if not (mask and (same_photo or same_instance)):
                    total += math.log1p(math.exp(x))
    return total / num_expressions


@pytest.mark.parametrize("weights", [PLAIN, RELEASED], ids=["masked", "released"])
@given(seed=seeds)
@few
def test_clia_equals_the_loop(weights: ClareLossWeights, seed: int) -> None:
    random = seeded(seed)
    decoder, targets = some_predictions(random), some_targets(random)
    clia = some_clia(random, targets)
    losses = clare_losses(StepOutputs(decoder, clia=clia), targets, weights)
    assigned = simota(decoder.logits, decoder.boxes_xyxy, targets)
    want = [slow_clia(clia, assigned, i, weights.mask_false_negatives) for i in range(LAYERS)]
    assert losses["clia"].item() == pytest.approx(want[-1])
    assert losses["clia_auxiliary"].item() == pytest.approx(sum(want[:-1]))


def two_photos(instance: tuple[int, int], image: tuple[int, int]) -> tuple[StepOutputs, Targets]:
    """Two photos of one target, two queries and one expression each; all CLIA scores are 0."""
    box = torch.tensor([0.2, 0.2, 0.6, 0.6])
    boxes = torch.stack([box, torch.tensor([0.8, 0.8, 0.9, 0.9])]).expand(1, 2, 2, 4)
    true = torch.ones(2, 1, dtype=torch.bool)
    clia = CliaBatch(
        logits=torch.zeros(1, 2, 2, 2),
        photo=torch.tensor([0, 1]),
        target=torch.tensor([0, 0]),
        image=torch.tensor(image),
        instance=torch.tensor(instance),
        photo_image=torch.tensor(image),
        target_instance=torch.tensor(instance)[:, None],
    )
    outputs = StepOutputs(Predictions(torch.zeros(1, 2, 2, 1), boxes), clia=clia)
    return outputs, Targets(box.expand(2, 1, 4), true[..., None], true, true)


@pytest.mark.parametrize(
    ("instance", "image", "pairs"),
    [
        pytest.param((1, 2), (1, 2), 8, id="nothing-shared"),
        pytest.param((1, 2), (1, 1), 4, id="same-photo"),  # the own photo's pairs are left
        pytest.param((1, 1), (1, 2), 6, id="same-instance"),  # less its query in the other photo
        pytest.param((1, 1), (1, 1), 4, id="both"),
        pytest.param((-1, -1), (1, 2), 8, id="unknown-instance"),
    ],
)
def test_false_negatives_by_hand(
    instance: tuple[int, int], image: tuple[int, int], pairs: int
) -> None:
    outputs, targets = two_photos(instance, image)
    masked = clare_losses(outputs, targets, PLAIN)["clia"]
    assert masked.item() == pytest.approx(pairs * math.log(2) / 2)
    released = clare_losses(outputs, targets, RELEASED)["clia"]
    assert released.item() == pytest.approx(8 * math.log(2) / 2)


@pytest.mark.parametrize(
    ("logit", "loss"),
    [(-1_000.0, 1_000.0), (-50_000.0, 50_000.0), (-60_000.0, 50_000.0), (-math.inf, 50_000.0)],
)
def test_scores_are_clamped_as_in_the_released_code(logit: float, loss: float) -> None:
    """Each expression scores `logit` with its matching query, and with all other queries."""
    outputs, targets = two_photos((1, 2), (1, 2))
    assert outputs.clia is not None
    clia = replace(outputs.clia, logits=torch.full((1, 2, 2, 2), logit))
    losses = clare_losses(replace(outputs, clia=clia), targets, PLAIN)
    assert losses["clia"].item() == pytest.approx(loss)  # one match per expression


def test_all_expressions_of_an_instance_share_its_queries() -> None:
    outputs, targets = two_photos((1, 2), (1, 2))
    assert outputs.clia is not None
    twice = replace(
        outputs.clia,
        logits=torch.tensor([30.0, -30.0]).expand(1, 3, 2, 2).clone(),
        photo=torch.tensor([0, 0, 1]),
        image=torch.tensor([1, 1, 2]),
        instance=torch.tensor([1, 1, 2]),
        target=torch.tensor([0, 0, 0]),
    )
    twice.logits[:, :2, 1], twice.logits[:, 2, 0] = -30.0, -30.0
    loss = clare_losses(replace(outputs, clia=twice), targets, PLAIN)["clia"]
    assert loss.item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------ weights and errors


def test_default_weights_are_the_published_ones() -> None:
    outputs, targets = some_step(1)
    plain = clare_losses(outputs, targets, PLAIN)
    published = clare_losses(outputs, targets, ClareLossWeights())
    want = {"clia": 4.0, "clia_auxiliary": 1.0}
    for prefix in ("", "proposal_", "denoising_"):
        want |= {prefix + "classes": 2.0, prefix + "l1": 5.0, prefix + "giou": 2.0}
    assert set(published) == set(want)
    for name, factor in want.items():
        torch.testing.assert_close(published[name], factor * plain[name])


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"giou\n.*greater than or equal to 0"):
        ClareLossWeights(giou=-2)


def test_predictions_with_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape.*\(6, 2, 9, 1\) and \(6, 2, 8, 4\)"):
        Predictions(torch.zeros(6, 2, 9, 1), torch.zeros(6, 2, 8, 4))
    targets = one_target((0, 0, 1, 1))
    said = Predictions(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4))
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 3\) do not fit texts.*\(1, 1, 1\)"):
        clare_losses(StepOutputs(said), targets, PLAIN)

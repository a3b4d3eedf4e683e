"""The losses of a step against nested loops and by hand; two workers against one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reir.clare_losses import (
    ClareLossWeights,
    CliaBatch,
    Predictions,
    StepOutputs,
    clare_losses,
)
from reir.matching import Targets, hungarian, simota
from reir.models.denoising import DenoisingQueries, denoising_queries

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=20, deadline=None)
PLAIN = ClareLossWeights(classes=1, l1=1, giou=1, clia=1, clia_auxiliary=1)
RELEASED = replace(PLAIN, mask_false_negatives=False)
LAYERS, PHOTOS, QUERIES, MOST, TEXTS = 3, 4, 7, 3, 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, random: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def some_boxes(*shape: int, random: torch.Generator) -> Tensor:
    points = torch.rand(*shape, 2, 2, generator=random, dtype=torch.float64)
    return points.sort(dim=-2).values.flatten(-2)


def some_predictions(
    random: torch.Generator, num: int = QUERIES, texts: int = TEXTS
) -> Predictions:
    return Predictions(
        normal(LAYERS, PHOTOS, num, texts, random=random).requires_grad_(),
        some_boxes(LAYERS, PHOTOS, num, random=random).requires_grad_(),
    )


def some_targets(random: torch.Generator, texts: int = TEXTS) -> Targets:
    """The first photo is full, the second empty, the others as they come."""
    count = torch.randint(0, MOST + 1, (PHOTOS, 1), generator=random)
    count[0], count[1] = MOST, 0
    valid = torch.arange(MOST) < count
    text_valid = torch.rand(PHOTOS, texts, generator=random) < 0.7
    text_valid[:, 0] = True
    described = (torch.rand(PHOTOS, MOST, texts, generator=random) < 0.5) & text_valid[:, None]
    described[..., 0] |= ~described.any(-1)
    boxes = some_boxes(PHOTOS, MOST, random=random) * valid[..., None]
    return Targets(boxes, described & valid[..., None], valid, text_valid)


def some_denoising(
    random: torch.Generator, targets: Targets
) -> tuple[Predictions, DenoisingQueries]:
    queries = denoising_queries(
        torch.zeros(*targets.valid.shape, 2),
        targets.boxes_xyxy,
        targets.valid,
        num_queries=QUERIES,
        generator=random,
    )
    return some_predictions(random, num=queries.target.shape[1]), queries


# ------------------------------------------------------------------------------ the slow reference


def slow_focal(logit: float, target: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    if target:
        return -0.25 * (1 - p) ** 2 * math.log(p)
    return -0.75 * p**2 * math.log(1 - p)


def slow_box(a: list[float], b: list[float]) -> tuple[float, float]:
    """L1 of centre and size, and 1 - GIoU."""
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
    logits_BA, boxes = normal(PHOTOS, 9, random=random), some_boxes(PHOTOS, 9, random=random)
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
    # the centre is .75 away, the size agrees; GIoU is -1/2
    assert losses["l1"].item() == pytest.approx(5 * 0.75)
    assert losses["giou"].item() == pytest.approx(2 * 1.5)


def test_a_detection_batch_learns_eighty_classes() -> None:
    random = seeded(3)
    decoder = some_predictions(random, texts=80)
    targets = some_targets(random, texts=80)
    one_class = torch.randint(80, (PHOTOS, MOST), generator=random)
    texts = torch.nn.functional.one_hot(one_class, 80).bool() & targets.valid[..., None]
    targets = replace(targets, texts=texts, text_valid=torch.ones(PHOTOS, 80, dtype=torch.bool))
    losses = clare_losses(StepOutputs(decoder), targets, PLAIN)
    assigned = simota(decoder.logits, decoder.boxes_xyxy, targets)
    assert parts_of(losses) == pytest.approx(slow_parts(decoder, assigned, targets))


def test_padding_does_not_reach_the_loss() -> None:
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


def some_clia(random: torch.Generator, targets: Targets) -> CliaBatch:
    """One or two expressions of every target, and as many of other workers.

    Identities are few, so that photos and instances come twice.
    """
    own = targets.valid.nonzero().repeat(2, 1)
    own = own[torch.rand(len(own), generator=random) < 0.7]
    photo_image = torch.randint(3, (PHOTOS,), generator=random)
    instance = torch.randint(-1, 5, targets.valid.shape, generator=random)
    instance = torch.where(targets.valid, instance, -1)
    others = len(own) + 1
    nowhere = torch.full((others,), -1)
    photo = torch.cat([own[:, 0], nowhere])
    strange_image = torch.randint(4, (others,), generator=random)
    strange_instance = torch.randint(-1, 6, (others,), generator=random)
    return CliaBatch(
        logits=normal(LAYERS, len(photo), PHOTOS, QUERIES, random=random).requires_grad_(),
        photo=photo,
        target=torch.cat([own[:, 1], nowhere]),
        image=torch.cat([photo_image[own[:, 0]], strange_image]),
        instance=torch.cat([instance[own[:, 0], own[:, 1]], strange_instance]),
        photo_image=photo_image,
        target_instance=instance,
    )


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


def full_step(seed: int, half: bool = False) -> tuple[StepOutputs, Targets]:
    random = seeded(seed)
    targets = some_targets(random)
    proposals = (
        normal(PHOTOS, 9, random=random).requires_grad_(),
        some_boxes(PHOTOS, 9, random=random).requires_grad_(),
    )
    outputs = StepOutputs(
        some_predictions(random),
        proposals=proposals,
        denoising=some_denoising(random, targets),
        clia=some_clia(random, targets),
    )
    return (to_half(outputs) if half else outputs), targets


def leaves(outputs: StepOutputs) -> list[Tensor]:
    assert outputs.proposals is not None
    assert outputs.denoising is not None
    assert outputs.clia is not None
    said = outputs.denoising[0]
    decoder = outputs.decoder
    pairs = [
        (decoder.logits, decoder.boxes_xyxy),
        outputs.proposals,
        (said.logits, said.boxes_xyxy),
    ]
    return [tensor for pair in pairs for tensor in pair] + [outputs.clia.logits]


def rebuilt(outputs: StepOutputs, change: Callable[[Tensor], Tensor]) -> StepOutputs:
    """The same outputs with every prediction passed through `change`."""
    a, b, c, d, e, f, g = (change(leaf) for leaf in leaves(outputs))
    assert outputs.denoising is not None
    assert outputs.clia is not None
    return StepOutputs(
        Predictions(a, b),
        proposals=(c, d),
        denoising=(Predictions(e, f), outputs.denoising[1]),
        clia=replace(outputs.clia, logits=g),
    )


def to_half(outputs: StepOutputs) -> StepOutputs:
    return rebuilt(outputs, lambda leaf: leaf.detach().bfloat16().requires_grad_())


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def test_the_published_weights() -> None:
    outputs, targets = full_step(1)
    plain = clare_losses(outputs, targets, PLAIN)
    published = clare_losses(outputs, targets, ClareLossWeights())
    want = {"clia": 4.0, "clia_auxiliary": 1.0}
    for prefix in ("", "proposal_", "denoising_"):
        want |= {prefix + "classes": 2.0, prefix + "l1": 5.0, prefix + "giou": 2.0}
    assert set(published) == set(want)
    for name, factor in want.items():
        torch.testing.assert_close(published[name], factor * plain[name])


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="giou must be 0 or more, got -2"):
        ClareLossWeights(giou=-2)


def test_predictions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"agree.*\(6, 2, 9, 1\) and \(6, 2, 8, 4\)"):
        Predictions(torch.zeros(6, 2, 9, 1), torch.zeros(6, 2, 8, 4))
    targets = one_target((0, 0, 1, 1))
    said = Predictions(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4))
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 3\) do not fit texts.*\(1, 1, 1\)"):
        clare_losses(StepOutputs(said), targets, PLAIN)


# ------------------------------------------------------------------------------------ many workers


def photos_of(outputs: StepOutputs, targets: Targets, rows: slice) -> tuple[StepOutputs, Targets]:
    """What a worker has that holds these photos; expressions of others stay, without a photo."""
    assert outputs.proposals is not None
    assert outputs.denoising is not None
    assert outputs.clia is not None
    said, queries = outputs.denoising
    clia = outputs.clia
    here = (clia.photo >= rows.start) & (clia.photo < rows.stop)
    return StepOutputs(
        Predictions(outputs.decoder.logits[:, rows], outputs.decoder.boxes_xyxy[:, rows]),
        proposals=(outputs.proposals[0][rows], outputs.proposals[1][rows]),
        denoising=(
            Predictions(said.logits[:, rows], said.boxes_xyxy[:, rows]),
            replace(queries, positive=queries.positive[rows], target=queries.target[rows]),
        ),
        clia=replace(
            clia,
            logits=clia.logits[:, :, rows],
            photo=torch.where(here, clia.photo - rows.start, -1),
            target=torch.where(here, clia.target, -1),
            photo_image=clia.photo_image[rows],
            target_instance=clia.target_instance[rows],
        ),
    ), Targets(
        targets.boxes_xyxy[rows], targets.texts[rows], targets.valid[rows], targets.text_valid[rows]
    )


def local_expressions(outputs: StepOutputs) -> StepOutputs:
    """Without the expressions that no photo here has."""
    assert outputs.clia is not None
    clia, own = outputs.clia, outputs.clia.photo >= 0
    return replace(
        outputs,
        clia=replace(
            clia,
            logits=clia.logits[:, own],
            **{k: getattr(clia, k)[own] for k in ("photo", "target", "image", "instance")},
        ),
    )


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_workers_equal_one(seed: int, cut: int) -> None:
    outputs, targets = full_step(seed)
    whole = local_expressions(outputs)
    one = clare_losses(whole, targets, ClareLossWeights(), lambda counts: counts)
    one_gradient = torch.autograd.grad(total(one), leaves(outputs), retain_graph=True)

    workers = [photos_of(whole, targets, slice(0, cut)), photos_of(whole, targets, slice(cut, 4))]
    counted: list[Tensor] = []

    def note(counts: Tensor) -> Tensor:
        counted.append(counts)
        return counts

    for mine, wanted in workers:
        clare_losses(mine, wanted, ClareLossWeights(), note)
    mean = torch.stack(counted).mean(0)
    two = [clare_losses(*worker, ClareLossWeights(), lambda _: mean) for worker in workers]
    for name, value in one.items():
        torch.testing.assert_close((two[0][name] + two[1][name]) / 2, value)
    two_gradient = torch.autograd.grad((total(two[0]) + total(two[1])) / 2, leaves(outputs))
    for got, want in zip(two_gradient, one_gradient, strict=True):
        torch.testing.assert_close(got, want)


def test_counts_are_averaged_in_one_call_of_a_length_that_no_data_changes() -> None:
    lengths = []

    def note(counts: Tensor) -> Tensor:
        lengths.append(counts.shape)
        return counts

    for seed in range(3):
        clare_losses(*full_step(seed), PLAIN, note)
    assert lengths == [(LAYERS + 1 + LAYERS + 1,)] * 3


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that make an accelerator wait for the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scalars, self.shapes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.scalars += name == "_local_scalar_dense"
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in masks)
        self.shapes += by_mask or name in ("nonzero", "masked_select", "unique")
        return func(*args, **(kwargs or {}))


def test_reads_are_seen() -> None:
    with Reads() as reads:
        assert torch.ones(3)[torch.tensor([True, False, True])].any()
        assert torch.ones(3).nonzero().shape == (3, 1)
    assert (reads.scalars, reads.shapes) == (1, 2)


def test_nothing_is_read_back_but_whether_each_target_is_served() -> None:
    outputs, targets = full_step(3)
    with Reads() as reads:
        clare_losses(outputs, targets, ClareLossWeights(), lambda counts: counts)
    with Reads() as matching:
        simota(outputs.decoder.logits, outputs.decoder.boxes_xyxy, targets)
    assert reads.shapes == 0
    assert reads.scalars == matching.scalars >= 1


# --------------------------------------------------------------------------- gradients, empty cases


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["ties", "usual", "saturated"])
@pytest.mark.parametrize("half", [False, True], ids=["float64", "bf16"])
def test_gradients_are_finite(scale: float, half: bool) -> None:
    outputs, targets = full_step(2)
    leaf_of = iter(leaves(outputs))
    outputs = rebuilt(
        outputs,
        lambda _: (
            (next(leaf_of).detach() * scale)
            .to(torch.bfloat16 if half else torch.float64)
            .requires_grad_()
        ),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = total(clare_losses(outputs, targets, ClareLossWeights()))
    assert loss.isfinite()
    assert loss.dtype == (torch.float32 if half else torch.float64)
    for leaf, gradient in zip(
        leaves(outputs), torch.autograd.grad(loss, leaves(outputs)), strict=True
    ):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


def test_half_precision_is_near_full() -> None:
    outputs, targets = full_step(2)
    half = to_half(outputs)
    again = rebuilt(half, lambda leaf: leaf.float())
    torch.testing.assert_close(
        total(clare_losses(half, targets, PLAIN)), total(clare_losses(again, targets, PLAIN))
    )


def test_masked_scores_cost_nothing() -> None:
    """Proposals on padded pixels come with a score of minus infinity."""
    outputs, targets = full_step(4)
    assert outputs.proposals is not None
    logits, boxes = outputs.proposals
    far = torch.cat([logits, torch.full((PHOTOS, 3), -torch.inf)], 1)
    more = (far, torch.cat([boxes, torch.ones(PHOTOS, 3, 4)], 1))
    got = clare_losses(replace(outputs, proposals=more), targets, PLAIN)
    want = clare_losses(outputs, targets, PLAIN)
    for name in ("proposal_classes", "proposal_l1", "proposal_giou"):
        torch.testing.assert_close(got[name], want[name])
    (gradient,) = torch.autograd.grad(got["proposal_classes"], logits)
    assert gradient.isfinite().all()


def without_targets(photos: int, most: int) -> Targets:
    return Targets(
        torch.zeros(photos, most, 4, dtype=torch.float64),
        torch.zeros(photos, most, TEXTS, dtype=torch.bool),
        torch.zeros(photos, most, dtype=torch.bool),
        torch.ones(photos, TEXTS, dtype=torch.bool),
    )


@pytest.mark.parametrize("most", [0, MOST])
def test_a_batch_without_targets_costs_nothing_and_has_a_graph(most: int) -> None:
    random = seeded(6)
    targets = without_targets(PHOTOS, most)
    nothing = torch.zeros(0, dtype=torch.long)
    clia = CliaBatch(
        logits=torch.zeros(LAYERS, 0, PHOTOS, QUERIES, requires_grad=True),
        photo=nothing,
        target=nothing,
        image=nothing,
        instance=nothing,
        photo_image=torch.arange(PHOTOS),
        target_instance=torch.full((PHOTOS, most), -1),
    )
    outputs = StepOutputs(
        some_predictions(random),
        proposals=(
            normal(PHOTOS, 9, random=random).requires_grad_(),
            some_boxes(PHOTOS, 9, random=random).requires_grad_(),
        ),
        denoising=some_denoising(random, targets),
        clia=clia,
    )
    losses = clare_losses(outputs, targets, ClareLossWeights())
    assert len(losses) == 11
    assert all(value.item() == 0 and value.requires_grad for value in losses.values())
    for gradient in torch.autograd.grad(total(losses), leaves(outputs)):
        assert not gradient.any()


def test_a_worker_without_targets_still_learns_what_others_count() -> None:
    random = seeded(7)
    decoder = some_predictions(random)
    losses = clare_losses(
        StepOutputs(decoder),
        without_targets(PHOTOS, 1),
        PLAIN,
        lambda counts: counts + 0.5,  # one match on two workers
    )
    focal = sum(slow_focal(x, False) for x in decoder.logits.flatten().tolist())
    assert losses["classes"].item() == pytest.approx(focal / 0.5)
    assert losses["l1"].item() == 0


def test_descent_finds_the_boxes_and_tells_the_expressions_apart() -> None:
    """Free queries under the whole loss end up where the targets are."""
    random = seeded(11)
    targets = one_target((0.1, 0.1, 0.4, 0.5))
    two = torch.tensor([[[0.1, 0.1, 0.4, 0.5], [0.5, 0.4, 0.9, 0.8]]])
    texts = torch.eye(2, dtype=torch.bool)[None]
    true = torch.ones(1, 2, dtype=torch.bool)
    targets = Targets(two, texts, true, true)
    logits = torch.zeros(1, 1, 6, 2, requires_grad=True)
    centre = torch.rand(1, 1, 6, 2, generator=random)
    corners = torch.cat([centre - 0.1, centre + 0.1], -1).requires_grad_()
    optimiser = torch.optim.Adam([logits, corners], lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        losses = clare_losses(
            StepOutputs(Predictions(logits, corners)), targets, ClareLossWeights()
        )
        total(losses).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    best = logits[0, 0].argmax(0)
    torch.testing.assert_close(corners[0, 0, best], two[0], atol=0.05, rtol=0)
    assert len(set(best.tolist())) == 2

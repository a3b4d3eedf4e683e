"""The losses of a whole step: two workers, gradients, batches without targets, synchronization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reir.losses import focal_loss
from reir_testing.clare_steps import (
    LAYERS,
    MOST_TARGETS,
    PHOTOS,
    QUERIES,
    TEXTS,
    some_denoising,
    some_masks,
    some_predictions,
    some_proposals,
    some_step,
)
from reir_training.clare.losses import (
    ClareLossWeights,
    CliaBatch,
    Predictions,
    StepOutputs,
    clare_losses,
)
from reir_training.clare.matching import Targets, simota

PLAIN = ClareLossWeights(classes=1, l1=1, giou=1, clia=1, clia_auxiliary=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    """Apply `change` to every prediction of the outputs."""
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


# ------------------------------------------------------------------------------------ many workers


def photos_of(outputs: StepOutputs, targets: Targets, rows: slice) -> tuple[StepOutputs, Targets]:
    """Return the outputs of a worker with these photos; other expressions have no photo there."""
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
    """Remove the expressions of other workers."""
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
    outputs, targets = some_step(seed)
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


def test_counts_are_averaged_in_one_call_of_constant_length() -> None:
    lengths = []

    def note(counts: Tensor) -> Tensor:
        lengths.append(counts.shape)
        return counts

    for seed in range(3):
        clare_losses(*some_step(seed), PLAIN, note)
    assert lengths == [(LAYERS + 1 + LAYERS + 1,)] * 3


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that synchronize an accelerator with the host."""

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


def test_the_counter_detects_synchronization() -> None:
    with Reads() as reads:
        assert torch.ones(3)[torch.tensor([True, False, True])].any()
        assert torch.ones(3).nonzero().shape == (3, 1)
    assert (reads.scalars, reads.shapes) == (1, 2)


def test_only_the_matching_loop_synchronizes_with_the_host() -> None:
    outputs, targets = some_step(3)
    outputs = replace(outputs, masks=some_masks(seeded(3), targets)[0])
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
    outputs, targets = some_step(2)
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


def test_half_precision_is_close_to_full_precision() -> None:
    outputs, targets = some_step(2)
    half = to_half(outputs)
    again = rebuilt(half, lambda leaf: leaf.float())
    torch.testing.assert_close(
        total(clare_losses(half, targets, PLAIN)), total(clare_losses(again, targets, PLAIN))
    )


def test_masked_scores_add_no_loss() -> None:
    """Proposals on padded pixels have a score of minus infinity."""
    outputs, targets = some_step(4)
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


@pytest.mark.parametrize("most", [0, MOST_TARGETS])
def test_a_batch_without_targets_has_zero_loss_with_gradients(most: int) -> None:
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
        proposals=some_proposals(random),
        denoising=some_denoising(random, targets),
        clia=clia,
    )
    losses = clare_losses(outputs, targets, ClareLossWeights())
    assert len(losses) == 11
    assert all(value.item() == 0 and value.requires_grad for value in losses.values())
    for gradient in torch.autograd.grad(total(losses), leaves(outputs)):
        assert not gradient.any()


def test_a_worker_without_targets_uses_the_counts_of_other_workers() -> None:
    random = seeded(7)
    decoder = some_predictions(random)
    losses = clare_losses(
        StepOutputs(decoder),
        without_targets(PHOTOS, 1),
        PLAIN,
        lambda counts: counts + 0.5,  # one match on two workers
    )
    focal = focal_loss(decoder.logits, torch.zeros_like(decoder.logits)).sum()
    assert losses["classes"].item() == pytest.approx(focal.item() / 0.5)
    assert losses["l1"].item() == 0


def test_gradient_descent_finds_boxes_and_distinguishes_expressions() -> None:
    """Free queries under the whole loss end up where the targets are."""
    random = seeded(11)
    two = torch.tensor([[[0.1, 0.1, 0.4, 0.5], [0.5, 0.4, 0.9, 0.8]]])
    texts = torch.eye(2, dtype=torch.bool)[None]
    true = torch.ones(1, 2, dtype=torch.bool)
    targets = Targets(two, texts, true, true)
    logits = torch.zeros(1, 1, 6, 2, requires_grad=True)
    center = torch.rand(1, 1, 6, 2, generator=random)
    corners = torch.cat([center - 0.1, center + 0.1], -1).requires_grad_()
    optimizer = torch.optim.Adam([logits, corners], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        losses = clare_losses(
            StepOutputs(Predictions(logits, corners)), targets, ClareLossWeights()
        )
        total(losses).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    best = logits[0, 0].argmax(0)
    torch.testing.assert_close(corners[0, 0, best], two[0], atol=0.05, rtol=0)
    assert len(set(best.tolist())) == 2

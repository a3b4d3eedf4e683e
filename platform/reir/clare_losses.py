"""The loss of one training step of the published CLARE, as pure functions of tensors.

clare.md sections 4.1 to 4.5: every decoder layer tells the instances of a photo apart and finds
their boxes, the encoder finds the boxes of its proposals, denoising queries do both once more, and
stage 2 adds CLIA, which holds each query against the expressions of the global batch. Knows no
model and no other worker; the trainer gathers expressions and passes a function that averages
counts.
"""

# Shapes: L layers, B photos of this worker, N queries, A proposals, Q denoising queries,
#         G targets a photo (padded), C texts a photo (padded), M expressions of the global batch

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from reir.config import StrictConfig
from reir.losses import box_distances, clia_loss, focal_loss
from reir.mask_losses import MaskOutputs, MaskPairs, choose_pairs, mask_distances
from reir.matching import Targets, full_precision, hungarian, simota
from reir.models.denoising import DenoisingQueries

MAX_LOGIT = 50_000.0
MeanOverWorkers = Callable[[Tensor], Tensor]
"""(K,) float counts of this worker -> (K,) their mean over all workers, without gradient."""


class ClareLossWeights(StrictConfig):
    """Weights of the parts of the loss (clare.md 4.5) and what CLIA takes for a negative.

    Attributes:
        classes, l1, giou: of focal loss, L1 and GIoU; in decoder, encoder and denoising alike.
        mask_focal, mask_dice: of the masks.
        masks_per_photo: of a photo and decoder layer at most so many masks are compared.
        clia: of the last decoder layer.
        clia_auxiliary: of each other layer.
        mask_false_negatives: leave out of CLIA the pairs of an expression with another record of
            its photo or with its own instance in another record. The released code does not.
    """

    classes: float = Field(2.0, ge=0)
    l1: float = Field(5.0, ge=0)
    giou: float = Field(2.0, ge=0)
    mask_focal: float = Field(2.0, ge=0)
    mask_dice: float = Field(5.0, ge=0)
    masks_per_photo: int = Field(32, ge=1)
    clia: float = Field(4.0, ge=0)
    clia_auxiliary: float = Field(1.0, ge=0)
    mask_false_negatives: bool = True


@dataclass(frozen=True)
class Predictions:
    """What queries say, of any leading axes (the decoder's layers).

    Attributes:
        logits: (..., B, N, C) score of each query with each text of its photo.
        boxes_xyxy: (..., B, N, 4) in [0, 1].

    Raises:
        ValueError: the shapes do not fit one another.
    """

    logits: Tensor
    boxes_xyxy: Tensor

    def __post_init__(self) -> None:
        """Check that logits and boxes speak of the same queries."""
        if self.logits.shape[:-1] != self.boxes_xyxy.shape[:-1] or self.boxes_xyxy.shape[-1] != 4:
            raise ValueError(
                "logits (..., B, N, C) and boxes_xyxy (..., B, N, 4) must agree in all but the "
                f"last axis, got {tuple(self.logits.shape)} and {tuple(self.boxes_xyxy.shape)}"
            )


@dataclass(frozen=True)
class CliaBatch:
    """Every expression of the global batch against every query of this worker.

    Attributes:
        logits: (L, M, B, N) `scale * (o . T) + bias`, with each layer's own scale and bias.
        photo: (M,) int64, index of the expression's photo in this worker's batch; -1 for the
            expressions of other workers.
        target: (M,) int64, index of its target among those of that photo; -1 likewise.
        image: (M,) int64, identity of its photo in the data set.
        instance: (M,) int64, identity of its instance in the data set; -1 where unknown.
        photo_image: (B,) int64, identity of each photo of this worker.
        target_instance: (B, G) int64, identity of each target of this worker; -1 where unknown
            and on padding.
    """

    logits: Tensor
    photo: Tensor
    target: Tensor
    image: Tensor
    instance: Tensor
    photo_image: Tensor
    target_instance: Tensor


@dataclass(frozen=True)
class StepOutputs:
    """What a step is judged by.

    Attributes:
        decoder: (L, B, N, ..) of the matching queries, the last layer last.
        proposals: (B, A) class-agnostic logits and (B, A, 4) xyxy boxes of the encoder.
        denoising: (L, B, Q, ..) of the denoising queries, and how these were made.
        masks: of a model with the mask branch.
        clia: in stage 2 only.
    """

    decoder: Predictions
    proposals: tuple[Tensor, Tensor] | None = None
    denoising: tuple[Predictions, DenoisingQueries] | None = None
    masks: MaskOutputs | None = None
    clia: CliaBatch | None = None


@dataclass(frozen=True)
class _Part:
    """Predictions with their assignment: what one kind of query is trained on.

    Attributes:
        assigned: (..., B, N) index of the query's target, or -1.
        counted: (B, N) bool, False where the query is padding; None counts all.
    """

    name: str
    predictions: Predictions
    targets: Targets
    assigned: Tensor
    counted: Tensor | None = None


def clare_losses(
    outputs: StepOutputs,
    targets: Targets,
    weights: ClareLossWeights,
    mean_over_workers: MeanOverWorkers | None = None,
) -> dict[str, Tensor]:
    """Return the parts of the loss by name, weighted; the loss of the step is their sum.

    Layers are summed. Each layer is divided by the number of its matched queries, its masks by the
    number that are compared, CLIA by the number of expressions. Without `mean_over_workers` these
    are the worker's own matched queries and the expressions of the global batch, as released; with
    it they are means over the workers, so that gradients averaged over workers equal those of one
    worker that holds the global batch. As released, averaging gradients over G workers scales CLIA
    by 1 / G.

    Args:
        outputs: of the model; what is None adds nothing.
        targets: of the B photos.
        weights: of the parts.
        mean_over_workers: called once, with a vector whose length depends on L and on which parts
            there are, never on the data.

    Raises:
        ValueError: the texts of predictions and targets differ in number.
    """
    _check_texts(outputs.decoder, targets)
    parts, masks, clia = _assign(outputs, targets), outputs.masks, outputs.clia
    counts = [(part.assigned >= 0).sum((-1, -2)).flatten() for part in parts]
    if masks is not None:
        pairs = choose_pairs(parts[0].assigned, masks.known, weights.masks_per_photo)
        counts.append((pairs.target >= 0).sum((-1, -2)))
    if clia is not None:
        counts.append(_num_expressions(clia, on_this_worker=mean_over_workers is not None))
    norm = torch.cat(counts).float()
    if mean_over_workers is not None:
        norm = mean_over_workers(norm)
    norms = torch.split(norm, [len(count) for count in counts])
    losses: dict[str, Tensor] = {}
    for part, norm_L in zip(parts, norms, strict=False):
        losses |= _part_losses(part, norm_L, weights)
    if masks is not None:
        losses |= _mask_losses(masks, pairs, norms[len(parts)], weights)
    if clia is not None:
        losses |= _clia_losses(clia, parts[0].assigned, norms[-1], weights)
    return losses


def _check_texts(decoder: Predictions, targets: Targets) -> None:
    said, wanted = decoder.logits.shape, targets.texts.shape
    if (said[-3], said[-1]) != (wanted[0], wanted[2]):
        raise ValueError(
            f"logits (L, B, N, C) of shape {tuple(said)} do not fit texts (B, G, C) of shape "
            f"{tuple(wanted)}: B and C must agree"
        )


def _assign(outputs: StepOutputs, targets: Targets) -> list[_Part]:
    """Matching queries first, then proposals and denoising queries where there are any."""
    said = outputs.decoder
    parts = [_Part("", said, targets, simota(said.logits, said.boxes_xyxy, targets))]
    if outputs.proposals is not None:
        logits_BA, boxes = outputs.proposals
        assigned_BA = hungarian(logits_BA, boxes, targets)
        said = Predictions(logits_BA[..., None], boxes)
        parts.append(_Part("proposal_", said, targets.class_agnostic(), assigned_BA))
    if outputs.denoising is not None:
        said, queries = outputs.denoising
        assigned_BQ = torch.where(queries.positive, queries.target, -1)
        assigned = assigned_BQ.expand(said.boxes_xyxy.shape[:-1])
        parts.append(_Part("denoising_", said, targets, assigned, queries.target >= 0))
    return parts


def _part_losses(part: _Part, norm_L: Tensor, weights: ClareLossWeights) -> dict[str, Tensor]:
    """Focal loss over all queries, L1 and GIoU over the matched ones; layers summed."""
    logits = _bounded(part.predictions.logits)
    boxes = full_precision(part.predictions.boxes_xyxy)
    positive = _of_target(part.targets.texts, part.assigned)
    counted = part.targets.text_valid[:, None]
    if part.counted is not None:
        counted = counted & part.counted[..., None]
    focal = focal_loss(logits, positive.to(logits.dtype)) * counted
    target_boxes = _of_target(part.targets.boxes_xyxy, part.assigned).to(boxes.dtype)
    l1, giou = (each * (part.assigned >= 0) for each in box_distances(boxes, target_boxes))
    sums = {"classes": focal.sum(-1), "l1": l1, "giou": giou}
    return {
        part.name + name: getattr(weights, name) * _ratio(each.sum((-1, -2)).flatten(), norm_L)
        for name, each in sums.items()
    }


def _mask_losses(
    masks: MaskOutputs, pairs: MaskPairs, norm_L: Tensor, weights: ClareLossWeights
) -> dict[str, Tensor]:
    """Focal and dice loss of the masks that were asked for; layers summed."""
    logits = _bounded(masks.predict(pairs.query))
    wanted = _of_target(masks.targets, pairs.target)
    distances = mask_distances(logits, wanted, masks.inside[:, None])
    focal, dice = ((each * (pairs.target >= 0)).sum((-1, -2)) for each in distances)
    return {
        "mask_focal": weights.mask_focal * _ratio(focal, norm_L),
        "mask_dice": weights.mask_dice * _ratio(dice, norm_L),
    }


def _num_expressions(clia: CliaBatch, *, on_this_worker: bool) -> Tensor:
    """(1,) expressions of this worker's photos, or of the global batch."""
    if on_this_worker:
        return (clia.photo >= 0).sum()[None]
    return clia.photo.new_full((1,), len(clia.photo))


def _clia_losses(
    clia: CliaBatch, assigned: Tensor, norm_1: Tensor, weights: ClareLossWeights
) -> dict[str, Tensor]:
    """CLIA of the last layer and of the others (clare.md 4.4).

    An expression's positives are the queries matched to its target. A negative may in truth be the
    instance where the pair comes from two records: of one photo, or of one instance. Within
    a record every pair is known.
    """
    num_photos, num_targets = clia.target_instance.shape
    photo_B = torch.arange(num_photos, device=clia.photo.device)
    target_G = torch.arange(num_targets, device=clia.photo.device)
    here_BM = photo_B[:, None] == clia.photo
    own_BGM = here_BM[:, None] & (target_G[:, None] == clia.target)
    known_M = clia.instance >= 0
    twin_BGM = (clia.target_instance[..., None] == clia.instance) & known_M
    unsure_BM = (clia.photo_image[:, None] == clia.image) & ~here_BM
    values = []
    for logits, assigned_BN in zip(clia.logits, assigned, strict=True):
        positive_BNM = _of_target(own_BGM, assigned_BN)
        counted_BNM = torch.ones_like(positive_BNM)
        if weights.mask_false_negatives:
            counted_BNM = ~(_of_target(twin_BGM, assigned_BN) | unsure_BM[:, None])
        value = clia_loss(
            _bounded(logits).flatten(1),
            positive_BNM.flatten(0, 1).T,
            counted_BNM.flatten(0, 1).T,
        )
        values.append(value * len(logits))  # the mean over M, back to the sum
    value_L = torch.stack([_ratio(value[None], norm_1) for value in values])
    return {
        "clia": weights.clia * value_L[-1],
        "clia_auxiliary": weights.clia_auxiliary * value_L[:-1].sum(),
    }


def _bounded(logits: Tensor) -> Tensor:
    """Full precision, within ±50,000 as released: masked scores (-inf) give no NaN."""
    return full_precision(logits).clamp(-MAX_LOGIT, MAX_LOGIT)


def _of_target(values: Tensor, assigned: Tensor) -> Tensor:
    """(B, G, ...) values of targets and (..., B, N) -> (..., B, N, ...); zero where there is none.

    The zeros are put behind the last target, which is where index -1 finds them.
    """
    nothing = values.new_zeros(values.shape[0], 1, *values.shape[2:])
    photo_B1 = torch.arange(len(values), device=values.device)[:, None]
    return torch.cat([values, nothing], dim=1)[photo_B1, assigned]


def _ratio(sums: Tensor, norm: Tensor) -> Tensor:
    """Sum of `sums / norm`, 0 (with a gradient of 0) where the norm is 0."""
    return (sums * (norm > 0) / torch.where(norm > 0, norm, 1)).sum()

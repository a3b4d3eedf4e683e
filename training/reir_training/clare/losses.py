"""The loss of one training step of the published CLARE, as pure functions of tensors.

See docs/clare.md, section 4. Every decoder layer is trained to match queries to texts and to locate
the targets; so are the denoising queries. The encoder is trained to locate targets with its
proposals. Stage 2 adds CLIA, which contrasts each query with the expressions of the global batch.
The functions use no model and do not communicate: the caller gathers the expressions of all workers
and passes a function that averages counts over them.
"""

# Shapes: L layers, B photos of this worker, N queries, A proposals, Q denoising queries, G targets
# per photo (padded), C texts per photo (padded), M expressions of the global batch

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from reir.config import StrictConfig
from reir.losses import box_distances, clia_loss, focal_loss
from reir.models.clare.denoising import DenoisingQueries
from reir_training.clare.mask_losses import MaskOutputs, MaskPairs, choose_pairs, mask_distances
from reir_training.clare.matching import Targets, full_precision, hungarian, simota

# As in the released code (docs/clare.md, section 3.7).
MAX_LOGIT = 50_000.0
MeanOverWorkers = Callable[[Tensor], Tensor]
"""Averages (K,) float counts over all workers, without gradient."""


class ClareLossWeights(StrictConfig):
    """Weights of the loss terms (docs/clare.md, section 4.5), and which pairs CLIA leaves out.

    Attributes:
        classes, l1, giou: weights of the focal loss, L1 and GIoU in the decoder, the encoder and
            the denoising queries.
        mask_focal, mask_dice: weights of the mask losses.
        masks_per_photo: maximum number of masks that are compared per photo and decoder layer.
        clia: weight of CLIA in the last decoder layer.
        clia_auxiliary: weight of CLIA in each other layer.
        mask_false_negatives: exclude from CLIA the pairs of an expression with another record of
            its photo, or with its own instance in another record. The released code counts them
            as negatives.
    """

    classes: float = Field(2.0, ge=0)
    l1: float = Field(5.0, ge=0)
    giou: float = Field(2.0, ge=0)
    mask_focal: float = Field(2.0, ge=0)
    mask_dice: float = Field(5.0, ge=0)
    masks_per_photo: int = Field(32, ge=1)
    # The released table of weights lacks the names of the auxiliary terms, so they count with 1
    # instead of 4, presumably by accident (docs/clare.md, section 8).
    clia: float = Field(4.0, ge=0)
    clia_auxiliary: float = Field(1.0, ge=0)
    mask_false_negatives: bool = True


@dataclass(frozen=True)
class Predictions:
    """The predictions of queries, with any leading axes (such as the decoder's layers).

    Attributes:
        logits: (..., B, N, C) score of each query for each text of its photo.
        boxes_xyxy: (..., B, N, 4) in [0, 1].

    Raises:
        ValueError: the shapes do not fit one another.
    """

    logits: Tensor
    boxes_xyxy: Tensor

    def __post_init__(self) -> None:
        """Check that logits and boxes belong to the same queries."""
        if self.logits.shape[:-1] != self.boxes_xyxy.shape[:-1] or self.boxes_xyxy.shape[-1] != 4:
            raise ValueError(
                "logits (..., B, N, C) and boxes_xyxy (..., B, N, 4) must have the same shape "
                f"except for the last axis, got {tuple(self.logits.shape)} and "
                f"{tuple(self.boxes_xyxy.shape)}"
            )


@dataclass(frozen=True)
class CliaBatch:
    """The scores of every expression of the global batch with every query of this worker.

    Attributes:
        logits: (L, M, B, N) `scale * (o . T) + bias`, with the scale and bias of each layer.
        photo: (M,) int64, index of the expression's photo in this worker's batch; -1 for
            expressions of other workers.
        target: (M,) int64, index of its target in that photo; -1 for expressions of other workers.
        image: (M,) int64, id of its photo in the data set.
        instance: (M,) int64, id of its instance in the data set; -1 if unknown.
        photo_image: (B,) int64, id of each photo of this worker in the data set.
        target_instance: (B, G) int64, id of each target of this worker in the data set; -1 if
            unknown and on padding.
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
    """The outputs of the model that the losses of a step need.

    Attributes:
        decoder: (L, B, N, ..) predictions of the matching queries, the last layer last.
        proposals: (B, A) class-agnostic logits and (B, A, 4) xyxy boxes of the encoder.
        denoising: (L, B, Q, ..) predictions of the denoising queries, and these queries.
        masks: outputs of the mask branch; None without one.
        clia: scores for CLIA; None except in stage 2.
    """

    decoder: Predictions
    proposals: tuple[Tensor, Tensor] | None = None
    denoising: tuple[Predictions, DenoisingQueries] | None = None
    masks: MaskOutputs | None = None
    clia: CliaBatch | None = None


@dataclass(frozen=True)
class _QueryGroup:
    """One kind of query: its predictions and the targets that they are matched to.

    Attributes:
        assigned: (..., B, N) index of the query's target, or -1.
        counted: (B, N) bool, False for queries that are padding; None if all count.
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
    """Compute the weighted loss terms by name; the loss of the step is their sum.

    Layers are summed. Each layer is divided by the number of its matched queries, its masks by the
    number of compared masks, and CLIA by the number of expressions.

    With `mean_over_workers`, these counts are means over all workers, so that gradients averaged
    over the workers equal those of one worker with the global batch. Without it, they are this
    worker's matched queries and the expressions of the global batch, as in the released code;
    averaging the gradients over G workers then scales CLIA by 1 / G.

    Args:
        outputs: outputs of the model; those that are None add no loss.
        targets: targets of the B photos.
        weights: weights of the loss terms.
        mean_over_workers: averages counts over all workers. It is called once, with a vector
            whose length does not depend on the data, so that the workers cannot get out of step.

    Raises:
        ValueError: the predictions and the targets have different numbers of texts.
    """
    _check_texts(outputs.decoder, targets)
    groups, masks, clia = _match_queries(outputs, targets), outputs.masks, outputs.clia
    counts = [(group.assigned >= 0).sum((-1, -2)).flatten() for group in groups]
    if masks is not None:
        pairs = choose_pairs(groups[0].assigned, masks.known, weights.masks_per_photo)
        counts.append((pairs.target >= 0).sum((-1, -2)))
    if clia is not None:
        counts.append(_num_expressions(clia, on_this_worker=mean_over_workers is not None))
    # One vector, so that the workers communicate only once.
    norm = torch.cat(counts).float()
    if mean_over_workers is not None:
        norm = mean_over_workers(norm)
    norms = torch.split(norm, [len(count) for count in counts])
    losses: dict[str, Tensor] = {}
    # Not strict, because `norms` continues with the divisors of masks and CLIA.
    for group, norm_L in zip(groups, norms, strict=False):
        losses |= _group_losses(group, norm_L, weights)
    if masks is not None:
        losses |= _mask_losses(masks, pairs, norms[len(groups)], weights)
    if clia is not None:
        losses |= _clia_losses(clia, groups[0].assigned, norms[-1], weights)
    return losses


def _check_texts(decoder: Predictions, targets: Targets) -> None:
    logits, texts = decoder.logits.shape, targets.texts.shape
    if (logits[-3], logits[-1]) != (texts[0], texts[2]):
        raise ValueError(
            f"logits (L, B, N, C) of shape {tuple(logits)} do not fit texts (B, G, C) of shape "
            f"{tuple(texts)}: B and C must agree"
        )


def _match_queries(outputs: StepOutputs, targets: Targets) -> list[_QueryGroup]:
    """Match each kind of query to the targets: matching queries, proposals, denoising queries."""
    decoder = outputs.decoder
    assigned_LBN = simota(decoder.logits, decoder.boxes_xyxy, targets)
    groups = [_QueryGroup("", decoder, targets, assigned_LBN)]
    if outputs.proposals is not None:
        logits_BA, boxes = outputs.proposals
        assigned_BA = hungarian(logits_BA, boxes, targets)
        proposals = Predictions(logits_BA[..., None], boxes)
        groups.append(_QueryGroup("proposal_", proposals, targets.class_agnostic(), assigned_BA))
    if outputs.denoising is not None:
        denoising, queries = outputs.denoising
        assigned_BQ = torch.where(queries.positive, queries.target, -1)  # made from their targets
        assigned = assigned_BQ.expand(denoising.boxes_xyxy.shape[:-1])
        # A query on padding was made from no target, so it must not count as a negative either.
        counted_BQ = queries.target >= 0
        groups.append(_QueryGroup("denoising_", denoising, targets, assigned, counted_BQ))
    return groups


def _group_losses(
    group: _QueryGroup, norm_L: Tensor, weights: ClareLossWeights
) -> dict[str, Tensor]:
    """Compute the focal loss over all queries, and L1 and GIoU over the matched ones."""
    logits = _bounded(group.predictions.logits)
    boxes = full_precision(group.predictions.boxes_xyxy)
    positive = _of_target(group.targets.texts, group.assigned)
    counted = group.targets.text_valid[:, None]
    if group.counted is not None:
        counted = counted & group.counted[..., None]
    focal = focal_loss(logits, positive.to(logits.dtype)) * counted
    target_boxes = _of_target(group.targets.boxes_xyxy, group.assigned).to(boxes.dtype)
    l1, giou = (each * (group.assigned >= 0) for each in box_distances(boxes, target_boxes))
    sums = {"classes": focal.sum(-1), "l1": l1, "giou": giou}
    return {
        group.name + name: getattr(weights, name) * _ratio(each.sum((-1, -2)).flatten(), norm_L)
        for name, each in sums.items()
    }


def _mask_losses(
    masks: MaskOutputs, pairs: MaskPairs, norm_L: Tensor, weights: ClareLossWeights
) -> dict[str, Tensor]:
    """Compute the focal and dice losses of the chosen masks, summed over layers."""
    logits = _bounded(masks.predict(pairs.query))
    targets = _of_target(masks.targets, pairs.target)
    distances = mask_distances(logits, targets, masks.inside[:, None])
    focal, dice = ((each * (pairs.target >= 0)).sum((-1, -2)) for each in distances)
    return {
        "mask_focal": weights.mask_focal * _ratio(focal, norm_L),
        "mask_dice": weights.mask_dice * _ratio(dice, norm_L),
    }


def _num_expressions(clia: CliaBatch, *, on_this_worker: bool) -> Tensor:
    """Return the (1,) number of expressions of this worker's photos, or of the global batch."""
    if on_this_worker:
        return (clia.photo >= 0).sum()[None]
    return clia.photo.new_full((1,), len(clia.photo))


def _clia_losses(
    clia: CliaBatch, assigned: Tensor, norm_1: Tensor, weights: ClareLossWeights
) -> dict[str, Tensor]:
    """Compute CLIA of the last layer and of the other layers (docs/clare.md, section 4.4).

    The positives of an expression are the queries that were matched to its target; all other
    queries are negatives. If the photo or the instance also occurs in a second record of the batch,
    a query there may show the described instance without being labeled as a positive.
    `mask_false_negatives` excludes such pairs.
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
        values.append(value * len(logits))  # `clia_loss` averages over M; undo that
    value_L = torch.stack([_ratio(value[None], norm_1) for value in values])
    return {
        "clia": weights.clia * value_L[-1],
        "clia_auxiliary": weights.clia_auxiliary * value_L[:-1].sum(),
    }


def _bounded(logits: Tensor) -> Tensor:
    """Convert to full precision and clamp to ±50,000, so that masked scores (-inf) give no NaN."""
    return full_precision(logits).clamp(-MAX_LOGIT, MAX_LOGIT)


def _of_target(values: Tensor, assigned: Tensor) -> Tensor:
    """Look up the (B, G, ...) values of each query's target; (..., B, N) -> (..., B, N, ...).

    Queries without a target get zeros: these are appended after the last target, where the
    index -1 finds them.
    """
    nothing = values.new_zeros(values.shape[0], 1, *values.shape[2:])
    photo_B1 = torch.arange(len(values), device=values.device)[:, None]
    return torch.cat([values, nothing], dim=1)[photo_B1, assigned]


def _ratio(sums: Tensor, norm: Tensor) -> Tensor:
    """Return the sum of `sums / norm`, without NaN in values or gradients where the norm is 0."""
    return (sums * (norm > 0) / torch.where(norm > 0, norm, 1)).sum()

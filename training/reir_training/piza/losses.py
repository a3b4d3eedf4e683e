"""Losses of a grounding model that looks for the one instance an expression describes.

Weights and costs are those of MM-GroundingDINO, with which PIZA was published. Denoising queries
are left out, because the models of `transformers` have none.
"""

# Shapes: B expressions, each with a picture of its own, Q predicted boxes, L tokens, S places of
#         the encoder

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reir.losses import box_distances, focal_loss, generalized_iou
from reir_training.clare.matching import (
    HUNGARIAN_CLASS,
    HUNGARIAN_GIOU,
    HUNGARIAN_L1,
    WORST_COST,
    full_precision,
)

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
ENCODER = "encoder_"
"""Prefix of the loss terms of the encoder's proposals."""


@dataclass(frozen=True)
class Grounding:
    """What a model should predict for B expressions.

    Attributes:
        boxes_xyxy: (B, 4) box of the described instance, in [0, 1] of the picture.
        is_word: (B, L) bool, whether a token belongs to the expression.
        is_token: (B, L) bool, False on padding. The tokens that are no words, such as the final
            period, are negatives of every box.
    """

    boxes_xyxy: Tensor
    is_word: Tensor
    is_token: Tensor


@dataclass(frozen=True)
class Predictions:
    """The predictions of one layer.

    Attributes:
        name: prefix of its loss terms; empty for the last layer of the decoder.
        logits: (B, Q, L) one logit for each box and token; anything on padding.
        boxes_xyxy: (B, Q, 4) in [0, 1] of the picture.
    """

    name: str
    logits: Tensor
    boxes_xyxy: Tensor


def layers_of(output: Any, num_tokens: int, num_proposals: int) -> Iterator[Predictions]:
    """Yield the predictions of every layer: decoder, last layer first, then the encoder.

    Args:
        output: of `PizaModel.forward` with `all_layers`.
        num_tokens: L; the model pads its logits to its longest text.
        num_proposals: number of the encoder's best proposals that count, one for each query.
    """
    yield _predictions("", output.logits, output.pred_boxes, num_tokens)
    for number, layer in enumerate(output.auxiliary_outputs):
        yield _predictions(f"layer_{number}_", layer["logits"], layer["pred_boxes"], num_tokens)
    logits_BSL, places_BS4 = output.enc_outputs_class, output.enc_outputs_coord_logits
    # Not `encoder_logits` and `encoder_pred_boxes`: these have no gradient.
    best_BQ = logits_BSL.amax(-1).topk(num_proposals, dim=1).indices[..., None]
    yield _predictions(
        ENCODER,
        logits_BSL.take_along_dim(best_BQ, dim=1),
        places_BS4.take_along_dim(best_BQ, dim=1).sigmoid(),
        num_tokens,
    )


def _predictions(name: str, logits: Tensor, boxes: Tensor, num_tokens: int) -> Predictions:
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([center - half, center + half], dim=-1)
    return Predictions(name, logits[..., :num_tokens], corners)


@torch.no_grad()
def match(logits: Tensor, boxes_xyxy: Tensor, truth: Grounding) -> Tensor:
    """Return (B,) which of the Q boxes is assigned to the described instance.

    It is the box with the lowest cost: focal loss, summed over the tokens, L1 and GIoU. With one
    true box, this is the Hungarian assignment.
    """
    by_class = _token_losses(logits, truth.is_word[:, None].expand_as(logits), truth).sum(-1)
    target = truth.boxes_xyxy[:, None]
    boxes = full_precision(boxes_xyxy)
    l1, _ = box_distances(boxes, target)
    cost = HUNGARIAN_CLASS * by_class + HUNGARIAN_L1 * l1
    cost = cost - HUNGARIAN_GIOU * generalized_iou(boxes, target)
    return cost.nan_to_num(nan=WORST_COST).argmin(1)


def _token_losses(logits: Tensor, is_positive: Tensor, truth: Grounding) -> Tensor:
    """Return the (B, Q, L) focal loss of each box and token; 0 on padding."""
    counted = truth.is_token[:, None]
    # Padding may have a logit of minus infinity, whose loss times 0 is not a number.
    kept = full_precision(logits).masked_fill(~counted, 0.0)
    return focal_loss(kept, is_positive.to(kept.dtype)) * counted


def grounding_loss(predictions: Predictions, truth: Grounding) -> dict[str, Tensor]:
    """Return the weighted terms of one layer, each a mean over the B expressions.

    Args:
        predictions: of the layer.
        truth: what it should predict.

    Returns:
        "class", the sigmoid focal loss summed over boxes and tokens; "l1", of center and size; and
        "giou". The names have the prefix of the layer.
    """
    found_B = match(predictions.logits, predictions.boxes_xyxy, truth)
    num = predictions.logits.shape[1]
    is_found_BQ = torch.nn.functional.one_hot(found_B, num).bool()
    is_positive = is_found_BQ[..., None] & truth.is_word[:, None]
    losses = _token_losses(predictions.logits, is_positive, truth)
    boxes = predictions.boxes_xyxy.take_along_dim(found_B[:, None, None], dim=1)[:, 0]
    l1, giou = box_distances(full_precision(boxes), truth.boxes_xyxy)
    terms = {
        "class": CLASS_WEIGHT * losses.sum() / len(found_B),
        "l1": L1_WEIGHT * l1.mean(),
        "giou": GIOU_WEIGHT * giou.mean(),
    }
    return {predictions.name + name: term for name, term in terms.items()}

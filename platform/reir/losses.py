"""Losses of all trainings as pure functions of tensors.

Stage 1, grounding, discriminates the described instance from the other candidates of its own photo
(`discrimination_loss`) and refines boxes (`box_loss`). Stage 2, CLIA, contrasts every expression
with the candidates of all photos in the batch (`clia_loss`, docs/clare.md, section 4.4). Training
without boxes contrasts every sentence with the best anchors of all photos (`anchor_contrast`).
In distributed training, callers pass tensors that they have gathered from all ranks.
"""

# Shapes: M expressions, J candidates of the whole batch, K candidates of one photo, N boxes, h x w
#         cells of a mask; without boxes: N pairs of text and photo, k anchors of one photo,
#         D dimension

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Without smoothing, the dice of an empty prediction for an empty mask would be 0 / 0.
DICE_SMOOTHING = 1.0


def focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Element-wise sigmoid focal loss, same shape as `logits` (docs/clare.md, section 4.2).

    Args:
        logits: any shape.
        targets: same shape, in [0, 1].
        alpha: weight of the positive class.
        gamma: focusing exponent; larger values reduce the weight of easy elements.
    """
    # From logits, because the logarithm of a rounded probability would be infinite at 0.
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    p_target = p * targets + (1 - p) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * (1 - p_target).pow(gamma) * cross_entropy


def discrimination_loss(logits_MK: Tensor, overlap_MK: Tensor, valid_MK: Tensor) -> Tensor:
    """In-photo instance discrimination: focal loss, normalized by the number of positives.

    Args:
        logits_MK: score of each candidate of the expression's own photo.
        overlap_MK: IoU of the candidate with the target box; a positive has at least 0.5.
        valid_MK: bool, False on padding.

    Returns:
        Scalar; the divisor is 1 if there is no positive.
    """
    positive = (overlap_MK >= 0.5) & valid_MK
    losses = focal_loss(logits_MK, positive.to(logits_MK.dtype)) * valid_MK
    return losses.sum() / positive.sum().clamp(min=1)


def soft_target(overlap: Tensor) -> Tensor:
    """Return a distribution over candidates with IoU >= 0.5 that favors tight boxes.

    It is over the last axis; rows without such a candidate are all zero.
    """
    # NMS leaves boxes that overlap by up to .7, so several candidates may fit the target.
    weight = torch.where(overlap >= 0.5, (overlap * 4).exp(), torch.zeros_like(overlap))
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-9)


def ranking_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Softmax cross-entropy with a soft target, averaged over the rows that have a target.

    Args:
        logits: (M, J) or (M, K).
        target: same shape; a row sums to 1, to the weight of the row, or to 0 for no target.
        valid: same shape, bool; False excludes the entry from the softmax.
    """
    # Not minus infinity, which times a target of 0 would be NaN.
    log_p = logits.masked_fill(~valid, -1e4).log_softmax(-1)
    rows = -(target * log_p).sum(-1)
    return rows.sum() / (target.sum(-1) > 0).sum().clamp(min=1)


def clia_loss(
    logits_MJ: Tensor, positive_MJ: Tensor, counted_MJ: Tensor, weight_M: Tensor | None = None
) -> Tensor:
    """Cross-image sigmoid contrastive loss, summed over candidates, averaged over expressions.

    Args:
        logits_MJ: `scale * (o . T) + bias` of every expression with every candidate of the batch.
        positive_MJ: bool, True if the candidate is the described instance.
        counted_MJ: bool, False if the pair must not count as a negative: the candidate is padding,
            or an instance that the expression may also describe.
        weight_M: weight of each expression; None for equal weights.

    Returns:
        Scalar, divided by M as in docs/clare.md, section 4.4; 0 without expressions.
    """
    sign = positive_MJ.to(logits_MJ.dtype) * 2 - 1
    # Positives count whatever the mask says, which only guards against false negatives.
    pairs = -F.logsigmoid(sign * logits_MJ) * (counted_MJ | positive_MJ)
    rows_M = pairs.sum(-1) if weight_M is None else pairs.sum(-1) * weight_M
    return rows_M.sum() / max(len(logits_MJ), 1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, 4) and (..., M, 4) xyxy boxes -> (..., N, M) intersection over union."""
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    inter = (bottom_right - top_left).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    # The smallest union is above 0, so that two boxes without area have an IoU of 0 and not NaN.
    return inter / (area_a[..., :, None] + area_b[..., None, :] - inter).clamp(min=1e-9)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes at equal positions: (..., 4) and (..., 4) xyxy -> (...) in [-1, 1]."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    # Boxes without area would otherwise divide by 0, which makes all gradients NaN.
    hull = hull.clamp(min=0).prod(-1).clamp(min=1e-9)
    return inter / union.clamp(min=1e-9) - (hull - union) / hull


def center_size(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) xyxy -> (..., 4) center x, center y, width, height."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def box_distances(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two terms of the box loss for each box (docs/clare.md, section 4.3).

    Args:
        predicted: (..., 4) xyxy in [0, 1].
        target: (..., 4) xyxy in [0, 1].

    Returns:
        (...) L1 distance of center and size, and (...) 1 - GIoU.
    """
    l1 = (center_size(predicted) - center_size(target)).abs().sum(-1)
    return l1, 1 - generalized_iou(predicted, target)


def box_loss(
    predicted: Tensor, target: Tensor, *, l1_weight: float = 5.0, giou_weight: float = 2.0
) -> Tensor:
    """Average `5 * L1 + 2 * (1 - GIoU)` over N matched boxes (docs/clare.md, section 4.3).

    Args:
        predicted: (N, 4) xyxy in [0, 1].
        target: (N, 4) xyxy in [0, 1].
        l1_weight: weight of the L1 distance, taken on center and size.
        giou_weight: weight of 1 - GIoU.

    Returns:
        Scalar; 0 without boxes.
    """
    if not len(predicted):
        # 0, as the mean of nothing would be NaN; part of the graph, so that `backward` works.
        return predicted.sum()
    l1, giou = box_distances(predicted, target)
    return (l1_weight * l1 + giou_weight * giou).mean()


def dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - dice of masks: (..., h, w) and (..., h, w) in [0, 1] -> (...) in [0, 1).

    Source: docs/clare.md, section 4.5.
    """
    common = (probabilities * labels).sum((-2, -1))
    both = probabilities.sum((-2, -1)) + labels.sum((-2, -1))
    return 1 - (2 * common + DICE_SMOOTHING) / (both + DICE_SMOOTHING)


# --------------------------------------------------------------------------- training without boxes


def anchor_contrast(
    texts_ND: Tensor, anchors_NkD: Tensor, valid_Nk: Tensor, same_NN: Tensor | None = None
) -> Tensor:
    """Contrast each text's best anchor in its photo with two anchors of each other photo.

    The logits of a text are inner products with the best anchor of every photo, and with the second
    best of every other photo; the target is the best anchor of its own photo. A photo with one
    anchor has no second one. Source: Jin et al. 2023, "RefCLIP".

    Args:
        texts_ND: row i describes something in photo i.
        anchors_NkD: anchors of each photo.
        valid_Nk: bool, False on padding. Photos without anchors, and their texts, do not count.
        same_NN: bool, True where two rows have the same photo, which is then no negative; None if
            all photos differ.

    Returns:
        Scalar, averaged over texts; 0 if no photo has anchors.
    """
    counted_N = valid_Nk.any(dim=1)
    texts, anchors, valid = texts_ND[counted_N], anchors_NkD[counted_N], valid_Nk[counted_N]
    best_NN, second_NN = _two_best_similarities(texts, anchors, valid)
    own_NN = torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    if same_NN is not None:
        same_photo_NN = same_NN[counted_N][:, counted_N]
        best_NN = best_NN.masked_fill(same_photo_NN & ~own_NN, -torch.inf)
        second_NN = second_NN.masked_fill(same_photo_NN, -torch.inf)
    # The best anchors come first, so that column i of row i is the target.
    logits = torch.cat([best_NN, second_NN.masked_fill(own_NN, -torch.inf)], dim=1)
    targets = torch.arange(len(texts), device=texts.device)
    # Not the mean, which is NaN without texts.
    return F.cross_entropy(logits, targets, reduction="sum") / max(len(texts), 1)


def false_negative_suppression(
    texts_ND: Tensor, anchors_NkD: Tensor, valid_Nk: Tensor, *, detach_target: bool = False
) -> Tensor:
    """Let a photo match the text of a similar pair, which may describe it as well.

    With V the best anchor of each photo for its own text T, this is the mean absolute difference
    between `softmax((V V' + T T') / 2)` and `softmax(V T')`, where each row is a photo.
    Source: Chu et al. 2024 (CMA), and its released code.

    Args:
        texts_ND: row i describes something in photo i.
        anchors_NkD: anchors of each photo.
        valid_Nk: bool, False on padding. Photos without anchors, and their texts, do not count.
        detach_target: do not train through the first softmax; the authors train through both.

    Returns:
        Scalar, averaged over pairs; 0 if no photo has anchors.
    """
    counted_N = valid_Nk.any(dim=1)
    texts, anchors, valid = texts_ND[counted_N], anchors_NkD[counted_N], valid_Nk[counted_N]
    similar_Nk = torch.einsum("nd,nkd->nk", texts, anchors).masked_fill(~valid, -torch.inf)
    best_ND = anchors[torch.arange(len(texts), device=texts.device), similar_Nk.argmax(dim=1)]
    target = ((best_ND @ best_ND.T + texts @ texts.T) / 2).softmax(dim=1)
    if detach_target:
        target = target.detach()
    difference = (target - (best_ND @ texts.T).softmax(dim=1)).abs()
    return difference.sum() / max(difference.numel(), 1)


def equivariance(texts_ND: Tensor, anchors_NkD: Tensor, valid_Nk: Tensor) -> Tensor:
    """Let the probabilities of two pairs change alike when their texts, or photos, are exchanged.

    With P_ij the softmax over photos j of text i's similarity to its best anchor of photo j, this
    is the mean over all i and j != i of `|(P_ii - P_ij) - (P_jj - P_ji)|` plus
    `|(P_ii - P_ji) - (P_jj - P_ij)|`. Source: Wang et al. 2023, "Equivariant Similarity", in the
    form of Chu et al. 2024 (CMA).

    Args:
        texts_ND: row i describes something in photo i.
        anchors_NkD: anchors of each photo.
        valid_Nk: bool, False on padding. Photos without anchors, and their texts, do not count.

    Returns:
        Scalar; 0 with fewer than two pairs.
    """
    counted_N = valid_Nk.any(dim=1)
    best_NN, _ = _two_best_similarities(
        texts_ND[counted_N], anchors_NkD[counted_N], valid_Nk[counted_N]
    )
    p_NN = best_NN.softmax(dim=1)
    own_gap_NN = p_NN.diagonal()[:, None] - p_NN.diagonal()[None, :]
    swap_NN = p_NN - p_NN.T
    total = (own_gap_NN - swap_NN).abs() + (own_gap_NN + swap_NN).abs()
    num_pairs = len(p_NN) * (len(p_NN) - 1)
    # The diagonal is 0.
    return total.sum() / max(num_pairs, 1)


def _two_best_similarities(
    texts_ND: Tensor, anchors_NkD: Tensor, valid_Nk: Tensor
) -> tuple[Tensor, Tensor]:
    """Compare every text with the anchors of every photo.

    Returns:
        (N, N) inner products of text i with the best and with the second best anchor of photo j;
        minus infinity if there is none.
    """
    similar_NNk = torch.einsum("id,jkd->ijk", texts_ND, anchors_NkD)
    similar_NNk = similar_NNk.masked_fill(~valid_Nk, -torch.inf)
    # Photos of one anchor get a second column, too.
    best_NN, second_NN = F.pad(similar_NNk, (0, 1), value=-torch.inf).topk(2).values.unbind(-1)
    return best_NN, second_NN

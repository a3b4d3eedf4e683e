"""The objective of `clare-nano`: the losses of one step of either stage.

The losses compare photos with one another. So every worker gathers the outputs of all workers and
computes the losses of the global batch, and the result does not depend on the number of workers.
"""

# Shapes: B photos, K candidates, J = 2 * B * K of photos and mirror images, M expressions,
#         C captions, P candidates that match an annotated box, D dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.losses import box_loss, clia_loss, discrimination_loss, ranking_loss, soft_target
from reir.models.nano.encoder import tokenize
from reir.models.nano.model import ClareNano, VisualOutput, split_members
from reir_training.config import NanoLossWeights
from reir_training.nano.batches import MATCH_IOU, NanoBatch
from reir_training.run.schedule import Stage

LENGTH_BUCKETS = 3
# As in CLIP, the learned scale is bounded, so that training cannot make it grow without end.
MAX_SCALE = 100.0


class WorkerGather(Protocol):
    """Collective operations between workers; all workers must call them in the same order."""

    @property
    def rank(self) -> int:
        """The rank of this worker."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Gather the (M, ...) rows of all workers, in order of rank, floats with gradients."""
        ...


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the losses: model outputs and targets of B photos and their mirror images.

    Attributes:
        vectors: (2B, K, D) vectors of all candidates, of the photos, then of their mirror images.
        valid: (2B, K) bool, False on padding.
        image_vectors: (B, D) vectors of the photos without mirror images.
        boxes, class_logits: (P, 4) and (P, 80) predictions for the candidates that match an
            annotated box.
        expressions, captions: (M, D) and (C, D) text vectors.
        right, wrong: (A, D) text vectors of expressions, and of the same with one wrong word.
        described: (A, D) vectors of the instances that these expressions describe.

    The other attributes are the same as in `NanoBatch`.
    """

    vectors: Tensor
    valid: Tensor
    image_vectors: Tensor
    boxes: Tensor
    class_logits: Tensor
    expressions: Tensor
    captions: Tensor
    right: Tensor
    wrong: Tensor
    described: Tensor
    owner: Tensor
    overlap: Tensor
    sided: Tensor
    cross_weight: Tensor
    caption_owner: Tensor
    matched_boxes: Tensor
    matched_classes: Tensor

    @classmethod
    def of(cls, batch: NanoBatch, visual: VisualOutput, text_ND: Tensor) -> LossInputs:
        """Build the inputs of one worker from its batch and the outputs of the model."""
        photo, candidate = batch.matched.unbind(1)
        num_expressions = len(batch.owner)
        num_right = num_expressions + len(batch.caption_owner)
        share_AK = soft_target(batch.overlap[batch.altered])
        vectors_AKD = visual.vectors[batch.owner[batch.altered]]
        return cls(
            vectors=visual.vectors,
            valid=batch.candidates.valid,
            image_vectors=visual.image_vectors[: batch.num_photos],
            boxes=visual.boxes[photo, candidate],
            class_logits=visual.class_logits[photo, candidate],
            expressions=text_ND[:num_expressions],
            captions=text_ND[num_expressions:num_right],
            right=text_ND[batch.altered],
            wrong=text_ND[num_right:],
            described=torch.einsum("ak,akd->ad", share_AK.to(vectors_AKD.dtype), vectors_AKD),
            owner=batch.owner,
            overlap=batch.overlap,
            sided=batch.sided,
            cross_weight=batch.cross_weight,
            caption_owner=batch.caption_owner,
            matched_boxes=batch.matched_boxes,
            matched_classes=batch.matched_classes,
        )

    @property
    def num_photos(self) -> int:
        """B, the number of photos without their mirror images."""
        return len(self.image_vectors)

    def gathered(self, workers: WorkerGather) -> LossInputs:
        """Gather the inputs of all workers, each of which has the same number of photos."""
        # Indices of photos must count from the first photo of the global batch.
        first = workers.rank * self.num_photos
        moved = {
            "owner": self.owner + first,
            "caption_owner": torch.where(
                self.caption_owner >= 0, self.caption_owner + first, self.caption_owner
            ),
        }
        # These hold photos and mirror images; each half is gathered separately to keep the order.
        halves = {"vectors", "valid"}
        everything = {
            name: _all_halves(values, workers) if name in halves else workers.gather(values)
            for name, values in (vars(self) | moved).items()
        }
        return LossInputs(**everything)

    def members(self, num_members: int) -> list[LossInputs]:
        """Return the inputs of each ensemble member, which uses its own part of every vector."""
        names = (
            *("vectors", "image_vectors", "expressions", "captions"),
            *("right", "wrong", "described"),
        )
        parts = zip(*(split_members(getattr(self, n), num_members) for n in names), strict=True)
        return [replace(self, **dict(zip(names, part, strict=True))) for part in parts]


def _all_halves(values: Tensor, workers: WorkerGather) -> Tensor:
    """Gather (2B, ...) rows: the photos of all workers, then the mirror images of all workers."""
    return torch.cat([workers.gather(half) for half in values.chunk(2)])


class NanoObjective(nn.Module):
    """The model and its losses in one module, which DeepSpeed wraps.

    Args:
        model: model to train.
        tokenizer: tokenizer of its text tower.
        weights: weights of the loss terms.
        workers: communication with the other workers; None for a single worker.
        half: run the model under bf16 autocast.
    """

    def __init__(
        self,
        model: ClareNano,
        tokenizer: Tokenizer,
        weights: NanoLossWeights,
        *,
        workers: WorkerGather | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # One element instead of a scalar, which DeepSpeed cannot broadcast. The logarithm keeps the
        # scale positive.
        self.log_ranking_scale = nn.Parameter(torch.tensor([20.0]).log())
        self._tokenizer, self._weights, self._workers = tokenizer, weights, workers
        self._half = half

    def forward(self, batch: NanoBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted loss and its unweighted terms by name, over all workers."""
        device = batch.owner.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._half):
            visual = self.model.visual(batch.candidates)
            text = self._encode(batch.texts)
        step = LossInputs.of(batch, visual, text)
        if self._workers is not None:
            step = step.gathered(self._workers)
        members = step.members(self.model.config.num_members)
        parts = _mean([self._member_parts(each, stage) for each in members])
        parts |= self._boxes(step)
        weights = self._weights.model_dump()
        values = torch.stack(list(parts.values()))
        total = (values * values.new_tensor([weights[name] for name in parts])).sum()
        return total, dict(zip(parts, values.detach().tolist(), strict=True))

    def _member_parts(self, step: LossInputs, stage: Stage) -> dict[str, Tensor]:
        """Compute the losses on the vectors of one ensemble member."""
        parts = self._within(step)
        if stage == "clia":
            parts |= self._across(step)
            parts |= self._captions(step)
        return parts

    def _encode(self, texts: list[str]) -> Tensor:
        """Encode texts into (M + C, D) vectors.

        Texts of similar length are encoded together, so that little of a batch is padding. The
        number of forward passes is constant: under ZeRO stage 3, each one gathers weights from all
        workers, so all workers need the same number.
        """
        # Empty texts make sure that no bucket is empty; their vectors are cut off at the end.
        shown = texts + [""] * (LENGTH_BUCKETS - len(texts))
        order = torch.tensor(sorted(range(len(shown)), key=lambda i: len(shown[i])))
        outs = []
        device = self.log_ranking_scale.device
        for rows in order.tensor_split(LENGTH_BUCKETS):
            some = [shown[i] for i in rows.tolist()]
            ids_NL, mask_NL = tokenize(self._tokenizer, some, self.model.config.max_tokens)
            outs.append(self.model.text(ids_NL.to(device), mask_NL.to(device)))
        return torch.cat(outs)[order.argsort()[: len(texts)]]

    def _scale(self) -> Tensor:
        return self.log_ranking_scale.exp().clamp(max=MAX_SCALE)

    def _within(self, step: LossInputs) -> dict[str, Tensor]:
        """Compute the losses within the photo: the expression must rank its candidate first.

        If the expression contains "left" or "right", the candidates of the mirror image are
        additional negatives. They differ from the right candidate only in the side.
        """
        here, there = step.owner, step.owner + step.num_photos
        vectors_MKD = torch.cat([step.vectors[here], step.vectors[there]], dim=1)
        valid_MK = torch.cat([step.valid[here], step.valid[there] & step.sided[:, None]], dim=1)
        overlap_MK = torch.cat([step.overlap, torch.zeros_like(step.overlap)], dim=1)
        scale = self._scale()
        logits_MK = scale * torch.einsum("mkd,md->mk", vectors_MKD, step.expressions)
        return {
            "ranking": ranking_loss(logits_MK, soft_target(overlap_MK), valid_MK),
            # The focal loss needs a threshold: here, a cosine of one half has a probability of .5.
            "discrimination": discrimination_loss(logits_MK - scale / 2, overlap_MK, valid_MK),
            "wrong_word": self._wrong_word(step),
        }

    def _wrong_word(self, step: LossInputs) -> Tensor:
        """Compute the loss of sentences with a wrong word: the right one must score higher."""
        if not len(step.wrong):
            # As in `_boxes`, a zero with a gradient.
            return step.wrong.sum() * 0
        margin_A = ((step.right - step.wrong) * step.described).sum(-1)
        return F.softplus(-self._scale() * margin_A).mean()

    def _boxes(self, step: LossInputs) -> dict[str, Tensor]:
        """Compute the box and class losses of candidates that match an annotated box."""
        known = step.matched_classes >= 0
        class_logits = step.class_logits[known]
        # A zero with a gradient: DeepSpeed needs a gradient for every parameter on every worker.
        category = class_logits.sum() * 0
        if len(class_logits):
            category = F.cross_entropy(
                class_logits, step.matched_classes[known], label_smoothing=0.1
            )
        return {"box": box_loss(step.boxes, step.matched_boxes), "category": category}

    def _across(self, step: LossInputs) -> dict[str, Tensor]:
        """Compute the losses across photos (CLIA): expressions against all candidates of the batch.

        Expressions that are unique only within their photo get a lower weight, because they may
        also describe an instance in another photo.
        """
        shown = step.cross_weight > 0
        text_MD, owner = step.expressions[shown], step.owner[shown]
        weight_M = step.cross_weight[shown]
        valid_J = step.valid.flatten()
        similar_MJ = text_MD @ step.vectors.flatten(0, 1).T
        overlap_MJ = similar_MJ.new_zeros(len(owner), *step.valid.shape)
        rows, overlap_MK = torch.arange(len(owner)), step.overlap[shown]
        overlap_MJ[rows, owner] = overlap_MK
        # In the mirror image, the instance is right unless the expression names a side.
        overlap_MJ[rows, owner + step.num_photos] = overlap_MK * ~step.sided[shown][:, None]
        overlap_MJ = overlap_MJ.flatten(1)
        scale, bias = self.model.log_scale.exp().clamp(max=MAX_SCALE), self.model.bias
        # Weights of mean 1, so that the size of the loss does not depend on how many expressions of
        # the batch are short.
        share_M = weight_M / weight_M.mean().clamp(min=1e-9)
        clia = clia_loss(
            scale * similar_MJ + bias,
            overlap_MJ >= MATCH_IOU,
            valid_J.expand_as(similar_MJ),
            share_M,
        )
        target_MJ = soft_target(overlap_MJ) * share_M[:, None]
        ranking = ranking_loss(self._scale() * similar_MJ, target_MJ, valid_J.expand_as(similar_MJ))
        return {"clia": clia, "cross_ranking": ranking}

    def _captions(self, step: LossInputs) -> dict[str, Tensor]:
        """Compute the loss between photo vectors and captions; near misses are negatives."""
        right = torch.nonzero(step.caption_owner >= 0)[:, 0]
        if not len(right):
            # As in `_boxes`, a zero with a gradient.
            return {"caption": step.captions.sum() * 0}
        photos = step.caption_owner[right]
        logits_CB = self._scale() * step.captions @ step.image_vectors.T
        to_photo = F.cross_entropy(logits_CB[right], photos)
        # Near misses are among the columns here, so a photo must prefer its right caption.
        to_caption = F.cross_entropy(logits_CB.T[photos], right)
        return {"caption": (to_photo + to_caption) / 2}


def _mean(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each loss term over the ensemble members."""
    return {name: torch.stack([each[name] for each in parts]).mean() for name in parts[0]}

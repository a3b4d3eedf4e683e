"""The loss of one step of either stage; what the other workers see is passed in.

The losses compare photos with one another, so every worker computes them for the global batch, from
the outputs of all workers: there is one way to compute them, whatever the number of workers.
"""

# Shapes: B photos, K candidates, J = 2 * B * K of photos and mirror images, M expressions,
#         C captions, P candidates that fit an annotated box, D dimension

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.losses import box_loss, clia_loss, discrimination_loss, ranking_loss, soft_target
from reir.models.clare_nano import ClareNano, VisualOutput, split_members
from reir.models.nano_encoder import tokenise
from reir_training.batches import MATCH_IOU, TrainBatch
from reir_training.config import LossWeights
from reir_training.plan import Stage

LENGTH_BUCKETS = 3
MAX_SCALE = 100.0


class Workers(Protocol):
    """What a worker asks of the others; every worker asks the same, in the same order."""

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        ...

    def all(self, values: Tensor) -> Tensor:
        """(M, ...) of this worker -> those of all, in order of rank; floats carry gradients."""
        ...


@dataclass(frozen=True)
class StepView:
    """What the losses of a step are computed from: B photos and, after them, their mirror images.

    Attributes:
        vectors: (2B, K, D) of every candidate.
        valid: (2B, K) bool, False on padding.
        image_vectors: (B, D) of the photos as they are.
        boxes, class_logits: (P, 4) and (P, 80) of the candidates that fit an annotated box.
        expressions, captions: (M, D) and (C, D).

    The others are as in `TrainBatch`.
    """

    vectors: Tensor
    valid: Tensor
    image_vectors: Tensor
    boxes: Tensor
    class_logits: Tensor
    expressions: Tensor
    captions: Tensor
    owner: Tensor
    overlap: Tensor
    sided: Tensor
    cross_weight: Tensor
    caption_owner: Tensor
    matched_boxes: Tensor
    matched_classes: Tensor

    @classmethod
    def of(cls, batch: TrainBatch, visual: VisualOutput, text_ND: Tensor) -> StepView:
        """Return what one worker sees."""
        photo, candidate = batch.matched.unbind(1)
        num_expressions = len(batch.owner)
        return cls(
            vectors=visual.vectors,
            valid=batch.candidates.valid,
            image_vectors=visual.image_vectors[: batch.num_photos],
            boxes=visual.boxes[photo, candidate],
            class_logits=visual.class_logits[photo, candidate],
            expressions=text_ND[:num_expressions],
            captions=text_ND[num_expressions:],
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
        """B, the photos without their mirror images."""
        return len(self.image_vectors)

    def of_all(self, workers: Workers) -> StepView:
        """Return what one worker would see that holds the photos of all; each holds as many."""
        first = workers.rank * self.num_photos
        moved = {
            "owner": self.owner + first,
            "caption_owner": torch.where(
                self.caption_owner >= 0, self.caption_owner + first, self.caption_owner
            ),
        }
        halves = {"vectors", "valid"}
        everything = {
            name: _all_halves(values, workers) if name in halves else workers.all(values)
            for name, values in (vars(self) | moved).items()
        }
        return StepView(**everything)

    def members(self, num_members: int) -> list[StepView]:
        """Return the step as each member sees it, by its own part of every vector."""
        names = ("vectors", "image_vectors", "expressions", "captions")
        parts = zip(*(split_members(getattr(self, n), num_members) for n in names), strict=True)
        return [replace(self, **dict(zip(names, part, strict=True))) for part in parts]


def _all_halves(values: Tensor, workers: Workers) -> Tensor:
    """(2B, ...) -> the photos of all workers, then the mirror images of all."""
    return torch.cat([workers.all(half) for half in values.chunk(2)])


class ClareObjective(nn.Module):
    """Model and losses in one module, which is what DeepSpeed wraps.

    Args:
        model: to train.
        tokenizer: of its text tower.
        weights: of the parts of the loss.
        workers: all workers; None on a single one.
        half: run the model under bf16 autocast.
    """

    def __init__(
        self,
        model: ClareNano,
        tokenizer: Tokenizer,
        weights: LossWeights,
        *,
        workers: Workers | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.log_ranking_scale = nn.Parameter(torch.tensor([20.0]).log())
        self._tokenizer, self._weights, self._workers = tokenizer, weights, workers
        self._half = half

    def forward(self, batch: TrainBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum and every part of the loss by name, over all workers."""
        device = batch.owner.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._half):
            visual = self.model.visual(batch.candidates)
            text = self._encode(batch.texts)
        step = StepView.of(batch, visual, text)
        if self._workers is not None:
            step = step.of_all(self._workers)
        members = step.members(self.model.config.num_members)
        parts = _mean([self._member_parts(each, stage) for each in members])
        parts |= self._boxes(step)
        weights = self._weights.model_dump()
        values = torch.stack(list(parts.values()))
        total = (values * values.new_tensor([weights[name] for name in parts])).sum()
        return total, dict(zip(parts, values.detach().tolist(), strict=True))

    def _member_parts(self, step: StepView, stage: Stage) -> dict[str, Tensor]:
        """The losses that compare one member's vectors."""
        parts = self._within(step)
        if stage == "clia":
            parts |= self._across(step)
            parts |= self._captions(step)
        return parts

    def _encode(self, texts: list[str]) -> Tensor:
        """(M + C, D) vectors; texts of like length go together, so that little is padding.

        The tower runs equally often whatever the number of texts: under ZeRO-3 its weights come
        together from all workers each time.
        """
        shown = texts + [""] * (LENGTH_BUCKETS - len(texts))
        order = torch.tensor(sorted(range(len(shown)), key=lambda i: len(shown[i])))
        outs = []
        device = self.log_ranking_scale.device
        for rows in order.tensor_split(LENGTH_BUCKETS):
            some = [shown[i] for i in rows.tolist()]
            ids_NL, mask_NL = tokenise(self._tokenizer, some, self.model.config.max_tokens)
            outs.append(self.model.text(ids_NL.to(device), mask_NL.to(device)))
        return torch.cat(outs)[order.argsort()[: len(texts)]]

    def _scale(self) -> Tensor:
        return self.log_ranking_scale.exp().clamp(max=MAX_SCALE)

    def _within(self, step: StepView) -> dict[str, Tensor]:
        """Stage 1: the right candidate among those of its own photo.

        Where the expression names a side, the candidates of the mirror image are wrong answers
        too, which differ from the right one in nothing else.
        """
        here, there = step.owner, step.owner + step.num_photos
        vectors_MKD = torch.cat([step.vectors[here], step.vectors[there]], dim=1)
        valid_MK = torch.cat([step.valid[here], step.valid[there] & step.sided[:, None]], dim=1)
        overlap_MK = torch.cat([step.overlap, torch.zeros_like(step.overlap)], dim=1)
        scale = self._scale()
        logits_MK = scale * torch.einsum("mkd,md->mk", vectors_MKD, step.expressions)
        return {
            "ranking": ranking_loss(logits_MK, soft_target(overlap_MK), valid_MK),
            "discrimination": discrimination_loss(logits_MK - scale / 2, overlap_MK, valid_MK),
        }

    def _boxes(self, step: StepView) -> dict[str, Tensor]:
        """Box and class of every candidate that fits an annotated box; both stages."""
        known = step.matched_classes >= 0
        class_logits = step.class_logits[known]
        category = class_logits.sum() * 0
        if len(class_logits):
            category = F.cross_entropy(
                class_logits, step.matched_classes[known], label_smoothing=0.1
            )
        return {"box": box_loss(step.boxes, step.matched_boxes), "category": category}

    def _across(self, step: StepView) -> dict[str, Tensor]:
        """Stage 2, CLIA: every expression against the candidates of every photo of the batch.

        Expressions that are unique only within their photo count less as queries. Of one photo and
        its mirror image every pair is known exactly, so nothing there needs to be masked.
        """
        shown = step.cross_weight > 0
        text_MD, owner = step.expressions[shown], step.owner[shown]
        weight_M = step.cross_weight[shown]
        valid_J = step.valid.flatten()
        similar_MJ = text_MD @ step.vectors.flatten(0, 1).T
        overlap_MJ = similar_MJ.new_zeros(len(owner), *step.valid.shape)
        rows, overlap_MK = torch.arange(len(owner)), step.overlap[shown]
        overlap_MJ[rows, owner] = overlap_MK
        overlap_MJ[rows, owner + step.num_photos] = overlap_MK * ~step.sided[shown][:, None]
        overlap_MJ = overlap_MJ.flatten(1)
        scale, bias = self.model.log_scale.exp().clamp(max=MAX_SCALE), self.model.bias
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

    def _captions(self, step: StepView) -> dict[str, Tensor]:
        """Photo vector against captions, both ways; near misses are extra wrong answers."""
        right = torch.nonzero(step.caption_owner >= 0)[:, 0]
        if not len(right):
            return {"caption": step.captions.sum() * 0}
        photos = step.caption_owner[right]
        logits_CB = self._scale() * step.captions @ step.image_vectors.T
        to_photo = F.cross_entropy(logits_CB[right], photos)
        to_caption = F.cross_entropy(logits_CB.T[photos], right)
        return {"caption": (to_photo + to_caption) / 2}


def _mean(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every part of the loss over the members."""
    return {name: torch.stack([each[name] for each in parts]).mean() for name in parts[0]}

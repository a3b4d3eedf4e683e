"""The loss of one step of either stage, on one device; gathering across workers is passed in."""

# Shapes: B photos, K candidates, J = B * K, M expressions, C captions, D dimension

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

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

Gather = Callable[[Tensor], Tensor]
"""(M, D) expression vectors of this worker -> (M', D) of the other workers, with gradients."""
LENGTH_BUCKETS = 3
MAX_SCALE = 100.0


class ClareObjective(nn.Module):
    """Model and losses in one module, which is what DeepSpeed wraps.

    Args:
        model: to train.
        tokenizer: of its text tower.
        weights: of the parts of the loss.
        gather: brings the other workers' expression vectors; None on a single worker.
        half: run the model under bf16 autocast.
    """

    def __init__(
        self,
        model: ClareNano,
        tokenizer: Tokenizer,
        weights: LossWeights,
        *,
        gather: Gather | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.log_ranking_scale = nn.Parameter(torch.tensor([20.0]).log())
        self._tokenizer, self._weights, self._gather = tokenizer, weights, gather
        self._half = half

    def forward(self, batch: TrainBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum and every part of the loss by name."""
        device = batch.owner.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._half):
            visual = self.model.visual(batch.candidates)
            text = self._encode(batch.texts)
        members = self.model.config.num_members
        parts = _mean(
            [
                self._member_parts(batch, replace(visual, vectors=v, image_vectors=i), t, stage)
                for v, i, t in zip(
                    *(
                        split_members(each, members)
                        for each in (visual.vectors, visual.image_vectors, text)
                    ),
                    strict=True,
                )
            ]
        )
        parts |= self._boxes(batch, visual)
        weights = self._weights.model_dump()
        values = torch.stack(list(parts.values()))
        total = (values * values.new_tensor([weights[name] for name in parts])).sum()
        return total, dict(zip(parts, values.detach().tolist(), strict=True))

    def _member_parts(
        self, batch: TrainBatch, visual: VisualOutput, text_ND: Tensor, stage: Stage
    ) -> dict[str, Tensor]:
        """The losses that compare one member's vectors."""
        num = len(batch.owner)
        parts = self._within(batch, visual, text_ND[:num])
        if stage == "clia":
            parts |= self._across(batch, visual, text_ND[:num])
            parts |= self._captions(batch, visual, text_ND[num:])
        return parts

    def _encode(self, texts: list[str]) -> Tensor:
        """(M + C, D) vectors; texts of like length go together, so that little is padding."""
        if not texts:
            return self.log_ranking_scale.new_zeros(0, self.model.config.dim)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        size = -(-len(order) // LENGTH_BUCKETS)
        buckets = [order[i : i + size] for i in range(0, len(order), size)]
        outs = []
        device = self.log_ranking_scale.device
        for rows in buckets:
            ids_NL, mask_NL = tokenise(
                self._tokenizer, [texts[i] for i in rows], self.model.config.max_tokens
            )
            outs.append(self.model.text(ids_NL.to(device), mask_NL.to(device)))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        return torch.cat(outs)[back]

    def _scale(self) -> Tensor:
        return self.log_ranking_scale.exp().clamp(max=MAX_SCALE)

    def _within(
        self, batch: TrainBatch, visual: VisualOutput, text_MD: Tensor
    ) -> dict[str, Tensor]:
        """Stage 1: the right candidate among those of its own photo.

        Where the expression names a side, the candidates of the mirror image are wrong answers
        too, which differ from the right one in nothing else.
        """
        here, there = batch.owner, batch.owner + batch.num_photos
        vectors_MKD = torch.cat([visual.vectors[here], visual.vectors[there]], dim=1)
        valid_MK = torch.cat(
            [
                batch.candidates.valid[here],
                batch.candidates.valid[there] & batch.sided[:, None],
            ],
            dim=1,
        )
        overlap_MK = torch.cat([batch.overlap, torch.zeros_like(batch.overlap)], dim=1)
        scale = self._scale()
        logits_MK = scale * torch.einsum("mkd,md->mk", vectors_MKD, text_MD)
        return {
            "ranking": ranking_loss(logits_MK, soft_target(overlap_MK), valid_MK),
            "discrimination": discrimination_loss(logits_MK - scale / 2, overlap_MK, valid_MK),
        }

    def _boxes(self, batch: TrainBatch, visual: VisualOutput) -> dict[str, Tensor]:
        """Box and class of every candidate that fits an annotated box; both stages."""
        photo, candidate = batch.matched.unbind(1)
        known = batch.matched_classes >= 0
        class_logits = visual.class_logits[photo, candidate][known]
        category = class_logits.sum() * 0
        if len(class_logits):
            category = F.cross_entropy(
                class_logits, batch.matched_classes[known], label_smoothing=0.1
            )
        return {
            "box": box_loss(visual.boxes[photo, candidate], batch.matched_boxes),
            "category": category,
        }

    def _across(
        self, batch: TrainBatch, visual: VisualOutput, text_MD: Tensor
    ) -> dict[str, Tensor]:
        """Stage 2, CLIA: every expression against the candidates of every photo of the batch.

        Expressions that are unique only within their photo count less as queries. Of one photo and
        its mirror image every pair is known exactly, so nothing there needs to be masked.
        """
        shown = batch.cross_weight > 0
        text_MD, owner = text_MD[shown], batch.owner[shown]
        weight_M = batch.cross_weight[shown]
        vectors_JD = visual.vectors.flatten(0, 1)
        valid_J = batch.candidates.valid.flatten()
        similar_MJ = text_MD @ vectors_JD.T
        num = batch.candidates.valid.shape[1]
        overlap_MJ = similar_MJ.new_zeros(len(owner), len(batch.candidates.valid), num)
        rows, overlap_MK = torch.arange(len(owner)), batch.overlap[shown]
        overlap_MJ[rows, owner] = overlap_MK
        overlap_MJ[rows, owner + batch.num_photos] = overlap_MK * ~batch.sided[shown][:, None]
        overlap_MJ = overlap_MJ.flatten(1)
        scale, bias = self.model.log_scale.exp().clamp(max=MAX_SCALE), self.model.bias
        share_M = weight_M / weight_M.mean().clamp(min=1e-9)
        clia = clia_loss(
            scale * similar_MJ + bias,
            overlap_MJ >= MATCH_IOU,
            valid_J.expand_as(similar_MJ),
            share_M,
        )
        if self._gather is not None:
            others_MJ = scale * (self._gather(text_MD) @ vectors_JD.T) + bias
            nothing = torch.zeros_like(others_MJ, dtype=torch.bool)
            clia = clia + clia_loss(others_MJ, nothing, valid_J.expand_as(others_MJ))
        target_MJ = soft_target(overlap_MJ) * share_M[:, None]
        ranking = ranking_loss(self._scale() * similar_MJ, target_MJ, valid_J.expand_as(similar_MJ))
        return {"clia": clia, "cross_ranking": ranking}

    def _captions(
        self, batch: TrainBatch, visual: VisualOutput, text_CD: Tensor
    ) -> dict[str, Tensor]:
        """Photo vector against captions, both ways; near misses are extra wrong answers."""
        right = torch.nonzero(batch.caption_owner >= 0)[:, 0]
        if not len(right):
            return {"caption": text_CD.sum() * 0}
        photos = batch.caption_owner[right]
        logits_CB = self._scale() * text_CD @ visual.image_vectors[: batch.num_photos].T
        to_photo = F.cross_entropy(logits_CB[right], photos)
        to_caption = F.cross_entropy(logits_CB.T[photos], right)
        return {"caption": (to_photo + to_caption) / 2}


def _mean(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every part of the loss over the members."""
    return {name: torch.stack([each[name] for each in parts]).mean() for name in parts[0]}

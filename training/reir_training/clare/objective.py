"""The objective of the published CLARE: one step of one worker, from a batch to the losses."""

# Shapes: B photos, H x W pixels, N queries, G targets per photo, C texts per photo, M texts, K
# layers, D dimension, F text width

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.models.clare.denoising import DenoisingContent, DenoisingQueries, denoising_queries
from reir.models.clare.encoder import model_input, tokenize
from reir.models.clare.masks import UPSAMPLING
from reir.models.clare.model import Clare, ClareOutput
from reir_training.clare.data import ClareBatch
from reir_training.clare.losses import (
    ClareLossWeights,
    CliaBatch,
    MeanOverWorkers,
    Predictions,
    StepOutputs,
    clare_losses,
)
from reir_training.clare.mask_losses import MaskOutputs
from reir_training.clare.matching import Targets
from reir_training.run.schedule import Stage


class WorkerExchange(Protocol):
    """Collective operations between workers; all workers must call them in the same order."""

    def gather_others(self, values: Tensor) -> Tensor:
        """Gather the rows of the other workers, (M, ...) -> (M', ...), floats with gradients."""
        ...

    def mean(self, counts: Tensor) -> Tensor:
        """Average (K,) numbers over all workers, without gradient."""
        ...


class ClareObjective(nn.Module):
    """The model and its losses in one module, which DeepSpeed wraps.

    Args:
        model: model to train.
        tokenizer: tokenizer of its text tower.
        weights: weights of the loss terms.
        workers: communication with the other workers; None for a single worker.
        half: run the model under bf16 autocast.
        denoising: train with denoising queries.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        model: Clare,
        tokenizer: Tokenizer,
        weights: ClareLossWeights,
        *,
        workers: WorkerExchange | None = None,
        half: bool = False,
        denoising: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.denoising = DenoisingContent(config.text_width, config.dim) if denoising else None
        self._tokenizer, self._weights, self._workers = tokenizer, weights, workers
        self._half = half

    def forward(self, batch: ClareBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of this worker, and the weighted loss terms averaged over all workers.

        The mean of the losses of all workers is the loss of the step.
        """
        pixels, mask = model_input(batch.pixels, batch.size_px, self.model.config)
        ids = tokenize(self._tokenizer, batch.texts, self.model.config).to(pixels.device)
        slots = PaddedTargets(batch)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._half):
            features_MF = self.model.text_features(ids)
            vectors_KMD = self.model.expressions(features_MF)
            known = self._denoising_queries(slots, features_MF)
            output = self.model(pixels, mask, known)
        parts = clare_losses(
            StepOutputs(
                decoder=Predictions(self._logits(output.objects, vectors_KMD, slots), output.boxes),
                proposals=(output.token_logits, output.token_boxes),
                denoising=self._denoising_predictions(output, vectors_KMD, slots, known),
                masks=self._masks(output, slots),
                clia=self._clia(output, vectors_KMD, slots) if stage == "clia" else None,
            ),
            slots.targets(),
            self._weights,
            self._mean_counts(),
        )
        values = torch.stack(list(parts.values()))
        of_all = self._workers.mean(values) if self._workers else values.detach()
        numbers = of_all.tolist()  # waits for the GPU, so it happens only once per step
        return values.sum(), dict(zip(parts, numbers, strict=True))

    def _mean_counts(self) -> MeanOverWorkers | None:
        """Return the function that averages the loss's divisors over all workers.

        With it, the workers together have the gradients of a single worker with all photos. It is
        None under `paper_parity`, because the released code divides by each worker's own matched
        queries and by the expressions of all workers, so that averaging gradients over G workers
        scales CLIA by 1 / G.
        """
        if self._workers is None or self.model.config.paper_parity:
            return None
        return self._workers.mean

    def _logits(self, objects: Tensor, vectors_KMD: Tensor, slots: PaddedTargets) -> Tensor:
        """Return the (K, B, N, C) score of each query for each text of its own photo."""
        # `text_BG` holds the first text of each target; further texts are only used by CLIA.
        texts = vectors_KMD if slots.by_class else vectors_KMD[:, slots.text_BG]
        return self.model.scores(objects, texts)

    def _denoising_queries(
        self, slots: PaddedTargets, features_MF: Tensor
    ) -> DenoisingQueries | None:
        """Make denoising queries of the targets; their content is the text of the target."""
        if self.denoising is None:
            return None
        # Padded targets point to text 0 (an index must be valid), so their content is set to zero.
        content_BGD = self.denoising(features_MF)[slots.text_BG] * slots.valid_BG[..., None]
        return denoising_queries(
            content_BGD,
            slots.boxes_BG4,
            slots.valid_BG,
            num_queries=self.model.config.num_queries,
            seeds=slots.batch.noise_seeds,
        )

    def _denoising_predictions(
        self,
        output: ClareOutput,
        vectors_KMD: Tensor,
        slots: PaddedTargets,
        known: DenoisingQueries | None,
    ) -> tuple[Predictions, DenoisingQueries] | None:
        if known is None or output.denoising_objects is None or output.denoising_boxes is None:
            return None
        logits = self._logits(output.denoising_objects, vectors_KMD, slots)
        return Predictions(logits, output.denoising_boxes), known

    def _masks(self, output: ClareOutput, slots: PaddedTargets) -> MaskOutputs | None:
        """Return the masks of the targets, and a function that predicts the masks of queries."""
        masks, has_mask, source = slots.batch.masks, slots.batch.has_mask, output.masks
        if masks is None or has_mask is None or source is None:
            return None
        # The model pads the photos further than the batch does.
        height, width = (UPSAMPLING * side for side in source.maps.shape[2:])
        padding = (0, width - masks.shape[2], 0, height - masks.shape[1])
        stride_px = self.model.config.strides[0] // UPSAMPLING
        return MaskOutputs(
            predict=lambda query: self.model.masks.of_queries(source, output.boxes, query),
            targets=slots.padded(F.pad(masks, padding), 0),
            known=slots.padded(has_mask, 0),
            inside=cells_inside(slots.batch.size_px, (height, width), stride_px),
        )

    def _clia(self, output: ClareOutput, vectors_KMD: Tensor, slots: PaddedTargets) -> CliaBatch:
        """Score every expression of the global batch with every query of this worker."""
        batch = slots.batch
        photo_M, target_M = batch.box_photo[batch.text_target], slots.slot_T[batch.text_target]
        image_M, instance_M = batch.photo_key[photo_M], batch.instance_key
        if self._workers is not None:
            # These texts keep their gradients, so that an expression is trained by the queries of
            # all workers. Their photos are on other workers: -1.
            gather_others = self._workers.gather_others
            others_KMD = gather_others(vectors_KMD.transpose(0, 1)).transpose(0, 1)
            vectors_KMD = torch.cat([vectors_KMD, others_KMD], dim=1)
            image_M = torch.cat([image_M, gather_others(image_M)])
            instance_M = torch.cat([instance_M, gather_others(instance_M)])
            num_others = len(image_M) - len(photo_M)
            photo_M, target_M = (F.pad(x, (0, num_others), value=-1) for x in (photo_M, target_M))
        # The first T texts are those of the T targets, in the same order, and so are their keys.
        return CliaBatch(
            logits=self.model.clia_logits(output.objects, vectors_KMD).permute(0, 3, 1, 2),
            photo=photo_M,
            target=target_M,
            image=image_M,
            instance=instance_M,
            photo_image=batch.photo_key,
            target_instance=slots.padded(batch.instance_key[: len(batch.boxes)], -1),
        )


def cells_inside(size_px_B2: Tensor, sides: tuple[int, int], stride_px: int) -> Tensor:
    """Return (B, h, w) bool: whether the center of a cell is in the photo, not in the padding."""
    rows, columns = (
        (torch.arange(side, device=size_B.device) + 0.5) * stride_px < size_B[:, None]
        for side, size_B in zip(sides, size_px_B2.T, strict=True)
    )
    inside: Tensor = rows[:, :, None] & columns[:, None]
    return inside


class PaddedTargets:
    """The targets of a batch as a (B, G) table, padded to the same number per photo.

    Attributes:
        batch: batch with the targets.
        by_class: True in detection, where all photos have the class names as texts; in grounding,
            each target has a text of its own.
        slot_T: (T,) column of each target in its row.
        valid_BG: bool, False on padding.
        text_BG: index of the target's text; 0 on padding.
        boxes_BG4: xyxy in [0, 1]; zeros on padding.
    """

    def __init__(self, batch: ClareBatch) -> None:
        self.batch = batch
        self.by_class = batch.by_class
        num_photos, device = len(batch.pixels), batch.boxes.device
        counts = torch.bincount(batch.box_photo, minlength=num_photos)
        first = counts.cumsum(0) - counts
        self.slot_T = torch.arange(len(batch.boxes), device=device) - first[batch.box_photo]
        self._shape = num_photos, batch.max_targets
        self.valid_BG = self.padded(torch.ones_like(self.slot_T, dtype=torch.bool), 0)
        self.text_BG = self.padded(batch.box_text, 0)
        self.boxes_BG4 = self.padded(batch.boxes, 0)

    def padded(self, values_T: Tensor, fill_value: int) -> Tensor:
        """Arrange one value per target, (T, ...) -> (B, G, ...), with padding."""
        table = values_T.new_full((*self._shape, *values_T.shape[1:]), fill_value)
        table[self.batch.box_photo, self.slot_T] = values_T
        return table

    def targets(self) -> Targets:
        """Return the targets in the form that the losses need."""
        if self.by_class:
            texts = F.one_hot(self.text_BG, len(self.batch.texts)).bool()
            text_valid = self.valid_BG.new_ones(len(self.valid_BG), len(self.batch.texts))
        else:
            # Every target has a text of its own, so the table of targets and texts is the identity.
            same = torch.eye(self._shape[1], dtype=torch.bool, device=self.valid_BG.device)
            texts = same.expand(self._shape[0], -1, -1)
            text_valid = self.valid_BG
        return Targets(
            boxes_xyxy=self.boxes_BG4,
            texts=texts & self.valid_BG[..., None],
            valid=self.valid_BG,
            text_valid=text_valid,
        )

"""The loss of one step of the published CLARE on one worker; exchange with others is passed in."""

# Shapes: B photos, H x W pixels, N queries, G targets a photo, C texts a photo, M texts, K layers,
#         D dimension, F text width

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from reir.clare_losses import (
    ClareLossWeights,
    CliaBatch,
    MeanOverWorkers,
    Predictions,
    StepOutputs,
    clare_losses,
)
from reir.mask_losses import MaskOutputs
from reir.matching import Targets
from reir.models.clare import Clare, ClareOutput
from reir.models.clare_encoder import model_input, tokenise
from reir.models.denoising import DenoisingContent, DenoisingQueries, denoising_queries
from reir.models.masks import UPSAMPLING
from reir_training.clare_data import ClareBatch
from reir_training.plan import Stage


class Workers(Protocol):
    """What a worker asks of the others; every worker asks the same, in the same order."""

    def others(self, values: Tensor) -> Tensor:
        """(M, ...) of this worker -> (M', ...) of all others; floats carry gradients back."""
        ...

    def mean(self, counts: Tensor) -> Tensor:
        """(K,) numbers of this worker -> their mean over all workers, without gradient."""
        ...


class ClareStepObjective(nn.Module):
    """Model and losses in one module, which is what DeepSpeed wraps.

    Args:
        model: to train.
        tokenizer: of its text tower.
        weights: of the parts of the loss.
        workers: the other workers; None on a single one.
        half: run the model under bf16 autocast.
        denoising: add denoising queries.
    """

    def __init__(  # noqa: PLR0913 - all but the three parts are by name
        self,
        model: Clare,
        tokenizer: Tokenizer,
        weights: ClareLossWeights,
        *,
        workers: Workers | None = None,
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
        """Return this worker's share of the loss, and every weighted part over all workers.

        The mean of the shares is the loss of the step.
        """
        pixels, mask = model_input(batch.pixels, batch.size_px, self.model.config)
        ids = tokenise(self._tokenizer, batch.texts, self.model.config).to(pixels.device)
        slots = Slots(batch)
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
        numbers = of_all.tolist()  # the one time that a step waits for the device
        return values.sum(), dict(zip(parts, numbers, strict=True))

    def _mean_counts(self) -> MeanOverWorkers | None:
        """Return the function that averages the loss's divisors over all workers.

        With it, workers learn what a single worker with all photos would. It is None under
        `paper_parity`: as in the released code, each worker then divides by its own matched
        queries and by the expressions of all workers, so that averaging gradients over G workers
        scales CLIA by 1 / G.
        """
        if self._workers is None or self.model.config.paper_parity:
            return None
        return self._workers.mean

    def _logits(self, objects: Tensor, vectors_KMD: Tensor, slots: Slots) -> Tensor:
        """(K, B, N, C) score of each query with each text of its own photo."""
        texts = vectors_KMD if slots.by_class else vectors_KMD[:, slots.text_BG]
        return self.model.scores(objects, texts)

    def _denoising_queries(self, slots: Slots, features_MF: Tensor) -> DenoisingQueries | None:
        """Queries of the targets; their content is the text that asks for them."""
        if self.denoising is None:
            return None
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
        slots: Slots,
        known: DenoisingQueries | None,
    ) -> tuple[Predictions, DenoisingQueries] | None:
        if known is None or output.denoising_objects is None or output.denoising_boxes is None:
            return None
        logits = self._logits(output.denoising_objects, vectors_KMD, slots)
        return Predictions(logits, output.denoising_boxes), known

    def _masks(self, output: ClareOutput, slots: Slots) -> MaskOutputs | None:
        """Masks of the targets, and how the model tells those of its queries."""
        masks, has_mask, source = slots.batch.masks, slots.batch.has_mask, output.masks
        if masks is None or has_mask is None or source is None:
            return None
        height, width = (UPSAMPLING * side for side in source.maps.shape[2:])
        padding = (0, width - masks.shape[2], 0, height - masks.shape[1])
        stride_px = self.model.config.strides[0] // UPSAMPLING
        return MaskOutputs(
            predict=lambda query: self.model.masks.of_queries(source, output.boxes, query),
            targets=slots.padded(F.pad(masks, padding), 0),
            known=slots.padded(has_mask, 0),
            inside=cells_inside(slots.batch.size_px, (height, width), stride_px),
        )

    def _clia(self, output: ClareOutput, vectors_KMD: Tensor, slots: Slots) -> CliaBatch:
        """Every expression of the global batch against every query of this worker."""
        batch = slots.batch
        photo_M, target_M = batch.box_photo[batch.text_target], slots.slot_T[batch.text_target]
        image_M, instance_M = batch.photo_key[photo_M], batch.instance_key
        if self._workers is not None:
            others = self._workers.others
            strangers = others(vectors_KMD.transpose(0, 1)).transpose(0, 1)
            vectors_KMD = torch.cat([vectors_KMD, strangers], dim=1)
            image_M = torch.cat([image_M, others(image_M)])
            instance_M = torch.cat([instance_M, others(instance_M)])
            missing = len(image_M) - len(photo_M)
            photo_M, target_M = (F.pad(x, (0, missing), value=-1) for x in (photo_M, target_M))
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
    """(B, h, w) bool, the cells of a padded batch whose centre lies in the photo."""
    rows, columns = (
        (torch.arange(side, device=size_B.device) + 0.5) * stride_px < size_B[:, None]
        for side, size_B in zip(sides, size_px_B2.T, strict=True)
    )
    inside: Tensor = rows[:, :, None] & columns[:, None]
    return inside


class Slots:
    """The targets of a batch, which follow one another, as a padded table: (B, G).

    Attributes:
        batch: whose targets.
        by_class: detection; all texts are asked of all photos, else each target has its own text.
        slot_T: (T,) place of each target in its row.
        valid_BG: bool, False on padding.
        text_BG: index of the text that asks for a target; 0 on padding.
        boxes_BG4: xyxy in [0, 1]; zeros on padding.
    """

    def __init__(self, batch: ClareBatch) -> None:
        self.batch = batch
        self.by_class = batch.by_class
        num_photos, device = len(batch.pixels), batch.boxes.device
        counts = torch.bincount(batch.box_photo, minlength=num_photos)
        first = counts.cumsum(0) - counts
        self.slot_T = torch.arange(len(batch.boxes), device=device) - first[batch.box_photo]
        self._shape = num_photos, batch.most_targets
        self.valid_BG = self.padded(torch.ones_like(self.slot_T, dtype=torch.bool), 0)
        self.text_BG = self.padded(batch.box_text, 0)
        self.boxes_BG4 = self.padded(batch.boxes, 0)

    def padded(self, values_T: Tensor, filling: int) -> Tensor:
        """(T, ...) one value a target -> (B, G, ...)."""
        table = values_T.new_full((*self._shape, *values_T.shape[1:]), filling)
        table[self.batch.box_photo, self.slot_T] = values_T
        return table

    def targets(self) -> Targets:
        """What the queries of each photo shall find."""
        if self.by_class:
            asked = F.one_hot(self.text_BG, len(self.batch.texts)).bool()
            text_valid = self.valid_BG.new_ones(len(self.valid_BG), len(self.batch.texts))
        else:
            same = torch.eye(self._shape[1], dtype=torch.bool, device=self.valid_BG.device)
            asked = same.expand(self._shape[0], -1, -1)
            text_valid = self.valid_BG
        return Targets(
            boxes_xyxy=self.boxes_BG4,
            texts=asked & self.valid_BG[..., None],
            valid=self.valid_BG,
            text_valid=text_valid,
        )

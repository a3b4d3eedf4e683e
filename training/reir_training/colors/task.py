"""The training task of the color head of a frozen `clare-nano`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.checkpoint import load_model, save_color_head
from reir.models.nano.color_head import ColorHead
from reir.models.nano.color_reader import color_head_for
from reir_training.colors.data import (
    ColorBatch,
    ColorExamples,
    build_color_cache,
    with_color_words,
)
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import TrainPhoto, count_annotations, split_held_out
from reir_training.report.model_card import write_colors_card
from reir_training.run.row_task import RowTask, copy_checkpoint
from reir_training.run.schedule import Stage

LABEL_SMOOTHING = 0.02


class ColorObjective(nn.Module):
    """The color head and its loss."""

    def __init__(self, model: ColorHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ColorBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its terms by name."""
        logits = self.model(batch.cells, batch.states)
        loss = F.cross_entropy(logits, batch.colors, label_smoothing=LABEL_SMOOTHING)
        return loss, {"color": loss.item()}


class ColorTask(RowTask[ColorBatch]):
    """Trains a color head on the color words of written expressions and of captions.

    Args:
        config: settings of the run.
        photos: photos of the run; those of split "val" are only validated on.
        cache: folder of the caches; what is missing is computed.
        init: checkpoint directory of the model.
        rank, world_size: rank of this worker, and number of workers.
    """

    rows_are = "color words of training photos"

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: NanoTrainConfig,
        photos: Sequence[TrainPhoto],
        *,
        cache: Path,
        init: Path,
        rank: int,
        world_size: int,
    ) -> None:
        self._photos, self._init = with_color_words(photos), init
        folder = build_color_cache(cache, self._photos, init)
        train, held_out = split_held_out(self._photos)
        self._held_out = ColorExamples(held_out, folder) if held_out else None
        examples = ColorExamples(train, folder)
        torch.manual_seed(config.optimization.seed)
        self.model = color_head_for(load_model(init)[0], config.colors.model_dump())
        super().__init__(
            config,
            ColorObjective(self.model),
            maker=examples,
            rows=np.arange(len(examples)),
            rank=rank,
            world_size=world_size,
        )

    def validate(self) -> dict[str, float]:
        """Return how often the most probable color of held-out words is right (percent)."""
        if self._held_out is None:
            return {}
        was_training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        with torch.inference_mode():
            batch = self._held_out.batch(range(len(self._held_out))).to(device)
            likely = self.model(batch.cells, batch.states).argmax(1)
        self.model.train(was_training)
        return {"color_accuracy": round(100 * float((likely == batch.colors).float().mean()), 2)}

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a copy of the checkpoint directory with this head added."""
        copy_checkpoint(self._init, folder)
        save_color_head(folder, self.model, about)
        write_colors_card(folder, self._init, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        counts = count_annotations(*split_held_out(self._photos))
        return counts | {"color_words": len(self._rows)}

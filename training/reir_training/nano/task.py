"""The training task of `clare-nano`: model, batches, validation and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reir.checkpoint import save_checkpoint
from reir.query.presence import save_background
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import TrainPhoto, count_annotations, split_held_out
from reir_training.nano.background import background_vectors
from reir_training.nano.batches import BatchMaker
from reir_training.nano.cache import FrozenCache
from reir_training.nano.initialization import (
    align_streams,
    parameter_groups,
    start_model,
    training_sentences,
)
from reir_training.nano.objective import NanoObjective
from reir_training.nano.query_bank import fill_query_bank
from reir_training.report.model_card import write_nano_card
from reir_training.run.collectives import WorkerCollectives
from reir_training.run.schedule import Epoch, Stage
from reir_training.run.validate import validate


class NanoTask:
    """Trains `clare-nano` on the cached output of its frozen part.

    Args:
        config: settings of the run.
        photos: training photos and held-out photos.
        cache: folder of the complete `FrozenCache` of these photos.
        init: checkpoint directory to start from.
        rank, world_size: rank of this worker, and number of workers.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: NanoTrainConfig,
        photos: Sequence[TrainPhoto],
        *,
        cache: Path,
        init: Path | None,
        rank: int,
        world_size: int,
    ) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._photos = photos
        self.model, self.tokenizer = start_model(config, init)
        # The streams of a checkpoint have been trained; aligning would overwrite them.
        if init is None:
            align_streams(self.model, self.tokenizer, training_sentences(self._photos))
        self._cache = FrozenCache(cache)
        self._half = config.optimization.precision == "bf16"
        self._maker = BatchMaker(self._photos, self._cache, config.optimization)
        self.objective = self._module_to_train(
            NanoObjective(
                self.model,
                self.tokenizer,
                config.loss,
                workers=WorkerCollectives() if world_size > 1 else None,
                half=self._half,
            )
        )

    def _module_to_train(self, streams: NanoObjective) -> nn.Module:
        """Return the module that a step calls, given the objective of the streams."""
        return streams

    @property
    def photos_per_step(self) -> int:
        """Photos per step, over all workers."""
        return self._config.optimization.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups."""
        return parameter_groups(self.objective, self._config.optimization)

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - the same for both stages
        """Return the number of steps per epoch."""
        # All epochs have the same number of steps.
        return len(self._maker.epoch(0, self._rank, self._world_size))

    def batches(self, epoch: Epoch, first: int) -> Iterator[Any]:
        """Yield this worker's batches from step `first` on, one per part of a step."""
        settings = self._config.optimization
        parts = settings.accumulate_steps
        # The parts of a step are divided like workers, so a step has the same photos for any
        # number.
        shares = range(self._rank * parts, (self._rank + 1) * parts)
        rows = [self._maker.epoch(epoch.number, s, self._world_size * parts) for s in shares]
        for i in range(first, self.steps(epoch.stage)):
            for of_share in rows:
                yield self._batch(of_share[i], [settings.seed, epoch.number, i])

    def _batch(self, rows: Sequence[int], seed: Sequence[int]) -> Any:
        """Build the batch of some photos; `seed` is that of the step."""
        return self._maker.batch(rows, seed)

    def validate(self) -> dict[str, float]:
        """Fill the query bank, and evaluate the current weights on the held-out photos."""
        with torch.autocast(self.model.log_scale.device.type, torch.bfloat16, enabled=self._half):
            fill_query_bank(
                self.model, self.tokenizer, self._photos, self._cache, self._maker.train_rows
            )
        return validate(self.model, self.tokenizer, self._photos, self._cache, half=self._half)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory, including the background and the model card."""
        digest = save_checkpoint(folder, self.model, self.tokenizer, about)
        rows = self._maker.train_rows
        vectors = background_vectors(self.model, self._cache, rows, half=self._half)
        save_background(folder, vectors, digest)
        write_nano_card(folder, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        return count_annotations(*split_held_out(self._photos))

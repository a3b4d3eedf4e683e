"""What a worker needs to train `clare-nano`: model, batches from the cache, figures, checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reir.checkpoint import save_checkpoint
from reir_training.assemble import align_streams, parameter_groups, start_model, training_sentences
from reir_training.batches import BatchMaker, TrainBatch
from reir_training.cache import FrozenCache
from reir_training.card import write_nano_card
from reir_training.config import TrainConfig
from reir_training.examples import TrainPhoto, describe, divided
from reir_training.gather import AllWorkers
from reir_training.objective import ClareObjective
from reir_training.plan import Epoch, Stage
from reir_training.validate import validate


class NanoTask:
    """Trains on the cached output of the frozen part.

    Args:
        config: of the run.
        photos: to train on, and held out.
        cache: folder of the frozen part's output of these photos, already built.
        init: checkpoint directory to start from.
        rank, world_size: of this worker.
    """

    def __init__(  # noqa: PLR0913 - one by one is clearer than a bag
        self,
        config: TrainConfig,
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
        if init is None:
            align_streams(self.model, self.tokenizer, training_sentences(self._photos))
        self._cache = FrozenCache(cache)
        self._half = config.optimisation.precision == "bf16"
        self._maker = BatchMaker(self._photos, self._cache, config.optimisation)
        self.objective = ClareObjective(
            self.model,
            self.tokenizer,
            config.loss,
            workers=AllWorkers() if world_size > 1 else None,
            half=self._half,
        )

    @property
    def photos_per_step(self) -> int:
        """Photos of one step over all workers."""
        return self._config.optimisation.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups."""
        return parameter_groups(self.objective, self._config.optimisation)

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - both stages show every photo
        """Steps of one epoch."""
        return len(self._maker.epoch(0, self._rank, self._world_size))

    def batches(self, epoch: Epoch, first: int) -> Iterator[TrainBatch]:
        """This worker's batches from step `first` on, one a part of a step."""
        settings = self._config.optimisation
        parts = settings.accumulate_steps
        shares = range(self._rank * parts, (self._rank + 1) * parts)
        rows = [self._maker.epoch(epoch.number, s, self._world_size * parts) for s in shares]
        for i in range(first, self.steps(epoch.stage)):
            for of_share in rows:
                yield self._maker.batch(of_share[i], [settings.seed, epoch.number, i])

    def validate(self) -> dict[str, float]:
        """Figures on the held-out photos, of the weights that the model has now."""
        return validate(self.model, self.tokenizer, self._photos, self._cache, half=self._half)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory with its model card."""
        save_checkpoint(folder, self.model, self.tokenizer, about)
        write_nano_card(folder, about)

    def about(self) -> dict[str, Any]:
        """What the checkpoint says of the data it was made from."""
        return describe(*divided(self._photos))

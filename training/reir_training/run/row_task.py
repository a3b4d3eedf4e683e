"""`RowTask`: what the tasks have in common that train a part of a finished `clare-nano`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from reir_training.config import NanoTrainConfig
from reir_training.nano.initialization import parameter_groups
from reir_training.run.schedule import Epoch, Stage, check_fills_batch

Batch = TypeVar("Batch")
MadeBatch = TypeVar("MadeBatch", covariant=True)


class BatchMaking(Protocol[MadeBatch]):
    """Builds the batches of a task."""

    def batch(self, rows: Sequence[int], rng: np.random.Generator) -> MadeBatch:
        """Build a batch of some rows of the training data."""
        ...


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copy the checkpoint directory of a model that is frozen, to add a part to it.

    All of its files, and with them its digest and its other parts, stay the same.
    """
    # Listed first, and without `folder`, which may be inside `source`.
    files = [each for each in source.rglob("*") if each.is_file()]
    for path in files:
        if not path.is_relative_to(folder):
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Without the permission bits: `source` may be read-only, and its copy is written to.
            shutil.copyfile(path, target)


class RowTask(Generic[Batch]):
    """A task of one stage, whose epochs use every row of the training data once.

    Attributes:
        rows_are: what a row is, in messages; each task has its own.

    Args:
        config: settings of the run.
        objective: module with the trained part and its losses.
        maker: builds a batch from rows.
        rows: rows to train on.
        rank, world_size: rank of this worker, and number of workers.

    Raises:
        ConfigError: there are fewer rows than photos per batch.
    """

    rows_are: ClassVar[str]

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: NanoTrainConfig,
        objective: nn.Module,
        *,
        maker: BatchMaking[Batch],
        rows: npt.NDArray[np.int64],
        rank: int,
        world_size: int,
    ) -> None:
        self._settings = config.optimization
        check_fills_batch(self._settings, len(rows), self.rows_are)
        self.objective, self._maker, self._rows = objective, maker, rows
        self._rank, self._world_size = rank, world_size

    @property
    def photos_per_step(self) -> int:
        """Rows per step, over all workers."""
        return self._settings.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups."""
        return parameter_groups(self.objective, self._settings)

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - there is one stage
        """Return the number of steps per epoch."""
        return len(self._rows) // self.photos_per_step

    def batches(self, epoch: Epoch, first: int) -> Iterator[Batch]:
        """Yield this worker's batches from step `first` on, one per part of a step."""
        size, seed = self.photos_per_step, self._settings.seed
        parts = self._settings.accumulate_steps
        order = np.random.default_rng([seed, epoch.number]).permutation(self._rows)
        for step in range(first, self.steps(epoch.stage)):
            whole = order[step * size : (step + 1) * size]
            for part in range(self._rank * parts, (self._rank + 1) * parts):
                share = np.array_split(whole, self._world_size * parts)[part]
                rng = np.random.default_rng([seed, epoch.number, step, part])
                yield self._maker.batch(share.tolist(), rng)

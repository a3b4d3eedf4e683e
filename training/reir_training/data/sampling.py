"""Chooses the samples of each step, as a pure function of seed and step.

Every step holds samples of one task and one orientation of photo (wide, or not), so that little of
a batch is padding (docs/clare.md, section 5.2). No state is kept between steps: a run that resumes
at step 10,000 takes the same samples in that step as an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir_training.data.hard_negatives import HardNegativeBatches, Rows


class TaskStream:
    """The batches of one task, in a new random order in each epoch.

    Every sample is used once per epoch. Exceptions are the few samples that fill the last batch of
    each orientation, and the epoch in which hard negatives begin.

    Args:
        name: name of the task.
        is_wide: (S,) bool, whether the photo of a sample is wider than high.
        batch_size: samples per batch, over all workers.
        seed: random seed.
        hard_negatives: arranges the batches from `first_hard_batch` on; None for random batches
            only.
        first_hard_batch: number of the first batch that consists of hard negatives.

    Raises:
        ConfigError: there are no samples.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        name: str,
        is_wide: Sequence[bool] | npt.NDArray[np.bool_],
        batch_size: int,
        seed: int,
        *,
        hard_negatives: HardNegativeBatches | None = None,
        first_hard_batch: int = 0,
    ) -> None:
        if not len(is_wide):
            raise ConfigError(
                f"task {name!r} has no samples: add data for it, or change `task` of a data source"
            )
        self.name, self.batch_size = name, batch_size
        self._seed = seed
        self._hard_negatives, self._first_hard_batch = hard_negatives, first_hard_batch
        wide = np.asarray(is_wide, dtype=bool)
        self._buckets = [rows for rows in map(np.flatnonzero, (wide, ~wide)) if len(rows)]
        # Not an `lru_cache`, because the stream must be picklable for the processes that load data.
        self._epoch: tuple[tuple[int, bool], npt.NDArray[np.int64]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches per epoch."""
        return sum(-(-len(rows) // self.batch_size) for rows in self._buckets)

    def batch(self, number: int) -> Rows:
        """Return the samples of a batch, numbered over all epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        hard = self._hard_negatives is not None and number >= self._first_hard_batch
        rows: Rows = self._order(epoch, hard)[place]
        return rows

    def _order(self, epoch: int, hard: bool) -> npt.NDArray[np.int64]:
        """Return the batches of an epoch, which are kept because they are requested one by one."""
        if self._epoch is None or self._epoch[0] != (epoch, hard):
            self._epoch = (epoch, hard), self._draw(epoch, self._hard_negatives if hard else None)
        return self._epoch[1]

    def _draw(
        self, epoch: int, hard_negatives: HardNegativeBatches | None
    ) -> npt.NDArray[np.int64]:
        """Draw the (batches, batch_size) samples of an epoch."""
        # The generator is seeded by the epoch, so that a resumed run draws the same order.
        rng = np.random.default_rng([self._seed, epoch])
        batches = []
        for rows in self._buckets:
            order = rng.permutation(rows)
            if hard_negatives is not None:
                order = hard_negatives.grouped(order, self.batch_size)
            missing = -len(order) % self.batch_size
            # A batch must be full, because its samples are divided evenly among the workers.
            filled = np.concatenate([order, rng.choice(rows, missing)])
            batches.append(filled.reshape(-1, self.batch_size))
        whole = np.concatenate(batches)
        # Batches are shuffled; otherwise, all batches of wide photos would come before the others.
        return np.asarray(rng.permutation(whole), dtype=np.int64)


@dataclass(frozen=True)
class Step:
    """The samples of one worker in one step.

    Attributes:
        number: number of the step, counted over the whole stage.
        task: name of the task, which is the same on all workers.
        rows: this worker's samples.
        all_rows: the samples of all workers, in order of rank.
        epoch: epoch of that task.
    """

    number: int
    task: str
    rows: Rows
    all_rows: Rows
    epoch: int


class Sampler:
    """Chooses the samples of each step; the tasks alternate.

    Args:
        streams: one per task, with the same batch size.

    Raises:
        ConfigError: raised by `step` if the batch does not divide evenly among the workers.
    """

    def __init__(self, streams: Sequence[TaskStream]) -> None:
        self._streams = tuple(streams)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps until the task with the fewest batches has used all its samples."""
        fewest = min(stream.batches_per_epoch for stream in self._streams)
        return fewest * len(self._streams)

    def step(self, number: int, rank: int = 0, world_size: int = 1) -> Step:
        """Return the samples of one of `world_size` workers in a step.

        The samples of all workers together are those that a single worker would get.
        """
        turn, which = divmod(number, len(self._streams))
        stream = self._streams[which]
        if stream.batch_size % world_size:
            raise ConfigError(
                f"batch_size={stream.batch_size} cannot be shared by {world_size} workers: "
                f"use a multiple of {world_size}"
            )
        share = stream.batch_size // world_size
        whole = stream.batch(turn)
        rows = whole[rank * share : (rank + 1) * share]
        return Step(number, stream.name, rows, whole, turn // stream.batches_per_epoch)

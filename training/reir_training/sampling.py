"""Which samples make up each step: a pure function of seed and step, so that a run can go on.

Every step holds samples of one task and one shape of photo (wide, or not), so that little of a
batch is padding (clare.md section 5). Nothing is kept between steps: step 10,000 of a run that was
killed is the same step 10,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir_training.look_alikes import LookAlikes, Rows


class TaskStream:
    """Batches of one task, epoch after epoch, each epoch in another order.

    Within an epoch every sample comes once, apart from the few that fill up the last batch of each
    shape, and from the epoch in which look-alikes begin.

    Args:
        name: of the task.
        is_wide: (S,) bool, whether the photo of a sample is wider than high.
        batch_size: samples a batch, over all workers.
        seed: of the orders.
        look_alikes: make up the batches from `alike_from` on; None leaves all to chance.
        alike_from: see `look_alikes`.

    Raises:
        ConfigError: there is no sample at all.
    """

    def __init__(  # noqa: PLR0913 - the last two are by name
        self,
        name: str,
        is_wide: Sequence[bool] | npt.NDArray[np.bool_],
        batch_size: int,
        seed: int,
        *,
        look_alikes: LookAlikes | None = None,
        alike_from: int = 0,
    ) -> None:
        if not len(is_wide):
            raise ConfigError(f"task {name!r} has no samples; add data for it or leave it out")
        self.name, self.batch_size = name, batch_size
        self._seed = seed
        self._look_alikes, self._alike_from = look_alikes, alike_from
        shapes = np.asarray(is_wide, dtype=bool)
        self._buckets = [rows for rows in map(np.flatnonzero, (shapes, ~shapes)) if len(rows)]
        self._drawn: tuple[tuple[int, bool], npt.NDArray[np.int64]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every sample has come."""
        return sum(-(-len(rows) // self.batch_size) for rows in self._buckets)

    def batch(self, number: int) -> Rows:
        """Samples of batch `number`, which counts on over the epochs."""
        epoch, place = divmod(number, self.batches_per_epoch)
        alike = self._look_alikes is not None and number >= self._alike_from
        rows: Rows = self._order(epoch, alike)[place]
        return rows

    def _order(self, epoch: int, alike: bool) -> npt.NDArray[np.int64]:
        """The last epoch drawn is kept, since its batches are asked for one by one."""
        if self._drawn is None or self._drawn[0] != (epoch, alike):
            self._drawn = (epoch, alike), self._draw(epoch, self._look_alikes if alike else None)
        return self._drawn[1]

    def _draw(self, epoch: int, look_alikes: LookAlikes | None) -> npt.NDArray[np.int64]:
        """(batches, batch_size) samples of an epoch."""
        rng = np.random.default_rng([self._seed, epoch])
        batches = []
        for rows in self._buckets:
            order = rng.permutation(rows)
            if look_alikes is not None:
                order = look_alikes.grouped(order, self.batch_size)
            missing = -len(order) % self.batch_size
            filled = np.concatenate([order, rng.choice(rows, missing)])
            batches.append(filled.reshape(-1, self.batch_size))
        whole = np.concatenate(batches)
        return np.asarray(rng.permutation(whole), dtype=np.int64)


@dataclass(frozen=True)
class Step:
    """What one worker does in one step.

    Attributes:
        number: counted over the whole run.
        task: name of the task, the same on all workers.
        rows: this worker's samples.
        all_rows: those of all workers, in order of rank.
        epoch: of that task.
    """

    number: int
    task: str
    rows: Rows
    all_rows: Rows
    epoch: int


class Sampler:
    """Steps of a run: the tasks take turns, one step each.

    Args:
        streams: one a task, with one batch size.

    Raises:
        ConfigError: the batch size cannot be shared evenly (asked by `step`).
    """

    def __init__(self, streams: Sequence[TaskStream]) -> None:
        self._streams = tuple(streams)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the task with the fewest batches has shown all its samples."""
        fewest = min(stream.batches_per_epoch for stream in self._streams)
        return fewest * len(self._streams)

    def step(self, number: int, rank: int = 0, world_size: int = 1) -> Step:
        """Step `number` as one of `world_size` workers sees it.

        The shares of all workers together are what a single worker would see.
        """
        turn, which = divmod(number, len(self._streams))
        stream = self._streams[which]
        if stream.batch_size % world_size:
            raise ConfigError(
                f"batch_size={stream.batch_size} cannot be shared by {world_size} workers; "
                f"take a multiple of {world_size}"
            )
        share = stream.batch_size // world_size
        whole = stream.batch(turn)
        rows = whole[rank * share : (rank + 1) * share]
        return Step(number, stream.name, rows, whole, turn // stream.batches_per_epoch)

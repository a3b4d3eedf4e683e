"""Ray Data in front of a training worker: steps are decoded by other processes, in order."""

# Shapes: see `reir_training.clare_data`

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray

from reir_training.clare_data import Arrays


def stream_steps(load: Callable[[int], Arrays], first: int, last: int) -> Iterator[Arrays]:
    """Yield what `load` returns for each step in [first, last), loaded ahead by Ray tasks.

    Args:
        load: picklable function of the number of a step alone.
        first, last: numbers of steps.

    Raises:
        ray.exceptions.RayTaskError: `load` failed; carries its error.
    """
    if first >= last:
        return

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        # arrays differ in shape from step to step, so every step is a block of one row
        return {name: value[None] for name, value in load(first + int(batch["id"][0])).items()}

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    numbers = ray.data.range(last - first, override_num_blocks=last - first)
    steps = numbers.map_batches(read, batch_size=1)
    for batch in steps.iter_batches(batch_size=1, prefetch_batches=2):
        yield {name: np.asarray(value[0]) for name, value in batch.items()}

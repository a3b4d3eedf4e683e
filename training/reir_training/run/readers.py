"""Loads the steps of one training worker ahead of time, in Ray Data actors."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import ray

from reir_training.clare.data import Arrays

MAX_READERS = 8
"""Maximum number of actors per training worker; Ray Data adds actors when steps run out."""
BLOCK_BYTES, MAX_STEPS_PER_BLOCK = 16 * 2**20, 8
"""Target size of a Ray Data block, and the maximum number of steps in it."""

PICKLE_PROTOCOL = 5
CPU_UNITS = 10_000
"""Ray rounds fractions of a CPU to 1/10,000."""


class ReaderLimits(NamedTuple):
    """Limits for the actors that load the steps of one training worker.

    Attributes:
        cpus: CPUs that each actor reserves.
        max_actors: maximum number of actors.
    """

    cpus: float
    max_actors: int


def reader_limits(cpus: float, num_workers: int) -> ReaderLimits:
    """Divide the CPUs that training does not use among the workers, so that all can load.

    A reader runs until the end of the stage. If the readers of one worker took the last CPU, those
    of another worker could never start, and all workers would wait in their first common step.

    Args:
        cpus: CPUs of the cluster; each worker trains on one of them.
        num_workers: number of workers of the run.
    """
    each = max(cpus - num_workers, 0) / num_workers
    if each >= 1:
        return ReaderLimits(1, min(int(each), MAX_READERS))
    return ReaderLimits(math.floor(each * CPU_UNITS) / CPU_UNITS, 1)


class _Reader:
    """Loads steps in an actor, so that the annotations in `load` are unpickled only once.

    Args:
        load: loads a step, given its number.
    """

    def __init__(self, load: Callable[[int], Arrays]) -> None:
        self._load = load

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # The shapes differ from step to step, so a row holds the pickled bytes of a whole step.
        steps = [pickle.dumps(self._load(int(number)), PICKLE_PROTOCOL) for number in batch["item"]]
        return {"step": np.array(steps, dtype=object)}


def stream_steps(
    load: Callable[[int], Arrays], first: int, last: int, *, readers: ReaderLimits
) -> Generator[Arrays, None, None]:
    """Yield what `load` returns for each step in [first, last), loaded ahead by Ray actors.

    Ray's overhead per block is about as large as the work for a small step, so small steps share
    a block.

    Args:
        load: picklable function that loads a step, given its number.
        first, last: range of step numbers.
        readers: limits for the actors.

    Raises:
        ray.exceptions.RayTaskError: `load` failed; contains its error.
    """
    if first >= last:
        return
    together = _steps_per_block(load(first))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # `from_items` creates the blocks right away. A data source that is read lazily would need a CPU
    # for reading, while the readers hold all of them.
    numbers = ray.data.from_items(
        list(range(first, last)), override_num_blocks=-(-(last - first) // together)
    )
    blocks = numbers.map_batches(
        _Reader,
        fn_constructor_args=(load,),
        batch_size=None,
        num_cpus=readers.cpus,
        concurrency=(1, readers.max_actors),
    )
    # `iter_batches` is not used because its threads outlive a stream that is closed early. If one
    # of them requests a block after Ray has shut down, the whole process exits.
    for bundle in blocks.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            for step in ray.get(entry.ref)["step"]:
                yield pickle.loads(step.as_buffer())


def _steps_per_block(arrays: Arrays) -> int:
    """Return how many steps of this size share a block."""
    num_bytes = sum(value.nbytes for value in arrays.values())
    return min(max(BLOCK_BYTES // num_bytes, 1), MAX_STEPS_PER_BLOCK)

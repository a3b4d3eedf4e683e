"""Ray around a training worker: steps are decoded by other processes, figures go to Prometheus."""

# Shapes: see `reir_training.clare_data`

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray
from ray.util.metrics import Counter, Gauge

from reir.sinks import Record
from reir_training.clare_data import Arrays
from reir_training.sinks import figures

MOST_READERS = 8
"""Actors that load steps for one training worker; Ray starts more than one when steps run out."""


BLOCK_BYTES, MOST_A_BLOCK = 16 * 2**20, 8
"""Of the steps that are loaded and handed over together."""

PROTOCOL = 5


class _Reader:
    """Loads steps in an actor, so that the annotations that `load` carries are unpacked once.

    Args:
        load: function of the number of a step alone.
    """

    def __init__(self, load: Callable[[int], Arrays]) -> None:
        self._load = load

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # arrays differ in shape from step to step, so a row is the bytes of a whole step
        steps = [pickle.dumps(self._load(int(number)), PROTOCOL) for number in batch["item"]]
        return {"step": np.array(steps, dtype=object)}


def stream_steps(load: Callable[[int], Arrays], first: int, last: int) -> Iterator[Arrays]:
    """Yield what `load` returns for each step in [first, last), loaded ahead by Ray actors.

    Ray's own work for a block is that of a small step, so small steps share one.

    Args:
        load: picklable function of the number of a step alone.
        first, last: numbers of steps.

    Raises:
        ray.exceptions.RayTaskError: `load` failed; carries its error.
    """
    if first >= last:
        return
    together = _steps_a_block(load(first))
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # blocks that are there from the start: reading them would wait for a CPU that readers hold
    numbers = ray.data.from_items(
        list(range(first, last)), override_num_blocks=-(-(last - first) // together)
    )
    blocks = numbers.map_batches(
        _Reader, fn_constructor_args=(load,), batch_size=None, concurrency=(1, MOST_READERS)
    )
    for block in blocks.iter_batches(batch_size=None, prefetch_batches=2):
        for step in block["step"]:
            yield pickle.loads(step)


def _steps_a_block(arrays: Arrays) -> int:
    """Return how many steps like this one share a block."""
    return min(max(BLOCK_BYTES // sum(value.nbytes for value in arrays.values()), 1), MOST_A_BLOCK)


GAUGES = {
    "loss": "Loss of the last step.",
    "learning_rate": "Highest rate of the optimiser's groups.",
    "step_seconds": "Mean of the last steps.",
    "epoch": "Epoch that runs, from 1.",
}


class Prometheus:
    """A sink: figures at the metrics port that every Ray node has, with the prefix `ray_`.

    Args:
        run: value of the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._gauges = {
            name: Gauge(f"reir_train_{name}", text, ("run",)) for name, text in GAUGES.items()
        }
        self._part = Gauge("reir_train_loss_part", "Mean of the epoch so far.", ("run", "part"))
        self._held_out = Gauge("reir_train_held_out", "On held-out photos.", ("run", "figure"))
        self._photos = Counter("reir_train_photos_total", "Seen, over all workers.", ("run",))

    def write(self, record: Record) -> None:
        """Take one record."""
        if record["event"] == "progress":
            for name, gauge in self._gauges.items():
                gauge.set(record[name], self._run)
            for name, value in record["parts"].items():
                self._part.set(value, {**self._run, "part": name})
            self._photos.inc(record["photos"], self._run)
        elif record["event"] == "epoch":
            for name, value in figures(record).items():
                self._held_out.set(value, {**self._run, "figure": name})

    def close(self) -> None:
        """Nothing is held back: the node asks for the figures."""

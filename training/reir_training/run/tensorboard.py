"""The records of a training run, as in `metrics.jsonl`, and a sink that writes them to TensorBoard.

{"event": "start", "time": ...}
{"event": "progress", ...}    the fields of `loop.TrainProgress`
{"event": "epoch", "epoch": 3, "best_epoch": 2, "losses": {...}, "br1_50": ..., ...}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from reir.sinks import Record

NO_FIGURES = ("event", "epoch", "best_epoch", "losses")


class TensorBoard:
    """Writes event files: training figures by step of the run, validation figures by epoch.

    Args:
        folder: folder for the event files.
        done: number of steps that were completed before this start. Later steps in the files of
            earlier starts are repeated now, so TensorBoard is told to ignore them.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, record: Record) -> None:
        """Write a record."""
        for name, value, step in scalars(record):
            self._writer.add_scalar(name, value, step)
        # The files are uploaded while they are open, and a killed run must not lose the last
        # figures.
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def scalars(record: Record) -> Iterator[tuple[str, float, int]]:
    """Yield (name, value, step or epoch) for each scalar in a record."""
    if record["event"] == "progress":
        step = (record["epoch"] - 1) * record["steps"] + record["step"]
        for name in ("loss", "learning_rate", "step_seconds", "photos_per_s"):
            yield f"train/{name}", record[name], step
        for name, value in record["parts"].items():
            yield f"train_loss/{name}", value, step
    elif record["event"] == "epoch":
        for name, value in validation_figures(record).items():
            yield f"held_out/{name}", value, record["epoch"]


def validation_figures(epoch: Record) -> dict[str, float]:
    """Return the validation figures in the record of an epoch."""
    return {name: value for name, value in epoch.items() if name not in NO_FIGURES}

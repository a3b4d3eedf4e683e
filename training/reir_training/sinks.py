"""The records of a training, those of `metrics.jsonl`, and TensorBoard as a sink for them.

{"event": "start", "time": ...}
{"event": "progress", ...}    the fields of `loop.Progress`
{"event": "epoch", "epoch": 3, "best_epoch": 2, "losses": {...}, "br1_50": ..., ...}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from reir.sinks import Record

NO_FIGURES = ("event", "epoch", "best_epoch", "losses")


class TensorBoard:
    """Event files: training over steps of the whole run, held-out figures over epochs.

    Args:
        folder: of the event files.
        done: steps that the run had come to before this start; later ones are dropped from the
            files of earlier starts.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, record: Record) -> None:
        """Take one record."""
        for name, value, step in scalars(record):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def scalars(record: Record) -> Iterator[tuple[str, float, int]]:
    """Yield name, value and step, or epoch, of what a record holds."""
    if record["event"] == "progress":
        step = (record["epoch"] - 1) * record["steps"] + record["step"]
        for name in ("loss", "learning_rate", "step_seconds", "photos_per_s"):
            yield f"train/{name}", record[name], step
        for name, value in record["parts"].items():
            yield f"train_loss/{name}", value, step
    elif record["event"] == "epoch":
        for name, value in figures(record).items():
            yield f"held_out/{name}", value, record["epoch"]


def figures(epoch: Record) -> dict[str, float]:
    """Figures on the held-out photos that the record of an epoch holds."""
    return {name: value for name, value in epoch.items() if name not in NO_FIGURES}

"""Exports the figures of a run to Prometheus, through Ray's metrics port."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from reir.sinks import Record
from reir_training.run.tensorboard import validation_figures

GAUGES = {
    "loss": "Loss of the last reported step.",
    "learning_rate": "Highest learning rate of the parameter groups.",
    "step_seconds": "Mean duration of a step since the last report, in seconds.",
    "epoch": "Current epoch, counted from 1.",
}


class Prometheus:
    """A sink that sets Prometheus metrics from the records of a run.

    Ray exports the metrics on the metrics port of each node, with the prefix `ray_`.

    Args:
        run: value of the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._gauges = {
            name: Gauge(f"reir_train_{name}", text, ("run",)) for name, text in GAUGES.items()
        }
        self._part = Gauge(
            "reir_train_loss_part", "Mean of a loss term over the epoch so far.", ("run", "part")
        )
        self._held_out = Gauge(
            "reir_train_held_out", "Validation figure of the last epoch.", ("run", "figure")
        )
        self._photos = Counter(
            "reir_train_photos_total", "Photos processed by all workers.", ("run",)
        )

    def write(self, record: Record) -> None:
        """Update the metrics from a record."""
        if record["event"] == "progress":
            for name, gauge in self._gauges.items():
                gauge.set(record[name], self._run)
            for name, value in record["parts"].items():
                self._part.set(value, {**self._run, "part": name})
            self._photos.inc(record["photos"], self._run)
        elif record["event"] == "epoch":
            for name, value in validation_figures(record).items():
                self._held_out.set(value, {**self._run, "figure": name})

    def close(self) -> None:
        """Do nothing: the metrics need no flushing."""

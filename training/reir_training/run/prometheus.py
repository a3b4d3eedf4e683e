"""Exports the figures of a run to Prometheus, through Ray's metrics port."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from reir.prometheus_metric import PrometheusMetric
from reir.sinks import Record
from reir_training.run.tensorboard import validation_figures

LOSS = PrometheusMetric("reir_train_loss", "gauge", "Loss of the last reported step.", ("run",))
LEARNING_RATE = PrometheusMetric(
    "reir_train_learning_rate",
    "gauge",
    "Highest learning rate of the optimizer's parameter groups.",
    ("run",),
)
STEP_SECONDS = PrometheusMetric(
    "reir_train_step_seconds",
    "gauge",
    "Mean duration of a step since the last report, in seconds.",
    ("run",),
)
EPOCH = PrometheusMetric("reir_train_epoch", "gauge", "Current epoch, counted from 1.", ("run",))
LOSS_PART = PrometheusMetric(
    "reir_train_loss_part", "gauge", "Mean of a loss term over the epoch so far.", ("run", "part")
)
HELD_OUT = PrometheusMetric(
    "reir_train_held_out", "gauge", "Validation figure of the last epoch.", ("run", "figure")
)
PHOTOS = PrometheusMetric(
    "reir_train_photos_total", "counter", "Photos processed by all workers.", ("run",)
)
METRICS = tuple(each for each in [*globals().values()] if isinstance(each, PrometheusMetric))

EXPORT_PREFIX = "ray_"
"""What Ray puts before the names on its metrics port."""


class Prometheus:
    """A sink that sets Prometheus metrics from the records of a run.

    Ray exports the metrics on the metrics port of each node, with the prefix `ray_`.

    Args:
        run: value of the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._gauges = {
            name: _gauge(metric)
            for name, metric in {
                "loss": LOSS,
                "learning_rate": LEARNING_RATE,
                "step_seconds": STEP_SECONDS,
                "epoch": EPOCH,
            }.items()
        }
        self._part, self._held_out = _gauge(LOSS_PART), _gauge(HELD_OUT)
        self._photos = Counter(PHOTOS.name, PHOTOS.help, PHOTOS.labels)

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


def _gauge(metric: PrometheusMetric) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels)

"""A Ray Train worker: trains a task, reports its states to Ray, and writes the output."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint

from reir.sinks import JsonLines, Record, Sink, records_of
from reir_training.config import TrainConfig
from reir_training.presets import PRESETS
from reir_training.run.engine import BestEpoch, RunState, save_state, start_engine
from reir_training.run.loop import ExponentialMovingAverage, Position, TrainLoop
from reir_training.run.prometheus import Prometheus
from reir_training.run.readers import reader_limits, stream_steps
from reir_training.run.schedule import Epoch, best_figure, plan
from reir_training.run.storage import CHECKPOINT, METRICS, TENSORBOARD, open_storage
from reir_training.run.tasks import AnyTask, make_task
from reir_training.run.tensorboard import TensorBoard

NO_FIGURE = -1.0
"""Ranks states that were saved within an epoch below all others; real figures are percentages."""
LOCAL_PATHS = {
    "data",
    "evaluation",
    "exclude_evaluation",
    "weights",
    "cache",
    "tokenizer",
    "towers",
    "base",
    "yolov3",
    "word_vectors",
}
"""Settings with paths on this machine, which are not saved in the checkpoint."""


def train_worker(job: Mapping[str, Any]) -> None:
    """Run one Ray Train worker; `job` is the `train_loop_config`."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job["threads"])
    config = PRESETS[job["preset"]].model_validate(job["config"])
    task = make_task(
        job["preset"],
        config,
        stage=job["stage"],
        init=Path(job["init"]) if job["init"] else None,
        cache=Path(job["cache"]),
        rank=rank,
        world_size=num_workers,
        stream=partial(
            stream_steps, readers=reader_limits(ray.cluster_resources().get("CPU", 0), num_workers)
        ),
    )
    # Before the engine is built, because its optimizer keeps references to the parameters.
    task.objective.to(ray.train.torch.get_device())
    decay = config.optimization.ema_decay
    averaged = ExponentialMovingAverage(decay) if decay else None
    with _resume_folder() as resume_from:
        engine, state = start_engine(
            task,
            config,
            averaged,
            num_workers=num_workers,
            local_rank=context.get_local_rank(),
            resume_from=resume_from,
        )
    epochs = plan(config.optimization, job["stage"])
    output = _RunOutput(job, config, task, epochs, state, active=rank == 0)

    def keep(position: Position) -> None:
        state.done = position
        with tempfile.TemporaryDirectory() as folder:
            _report_state(Path(folder), engine, averaged, state, {output.best_by: NO_FIGURE})
        output.upload_records()

    loop = TrainLoop(
        engine,
        task,
        config.optimization,
        rank=rank,
        zero_stage=config.zero_stage,
        averaged=averaged,
        on_progress=lambda progress: output.write({"event": "progress", **asdict(progress)}),
        on_position=keep,
    )
    for epoch in epochs[state.done.epochs :]:
        losses = loop.run_epoch(epoch, len(epochs), state.done)
        state.done = Position(epoch.number + 1)
        with tempfile.TemporaryDirectory() as folder:
            # All workers enter this block, because it gathers the weights from all of them.
            with loop.final_weights():
                figures = output.finish_epoch(epoch, losses, Path(folder))
            # Ray Train ranks the states by this figure, so every report needs it.
            figures = {output.best_by: NO_FIGURE, **figures}
            _report_state(Path(folder), engine, averaged, state, figures)
        output.upload_records()
    output.close()


@contextmanager
def _resume_folder() -> Iterator[Path | None]:
    """Yield the folder of the last reported state, or None at the start of a run."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def _report_state(
    folder: Path,
    engine: Any,
    averaged: ExponentialMovingAverage | None,
    state: RunState,
    figures: Mapping[str, float],
) -> None:
    """Save the state and report it to Ray Train, which passes it to the workers after a restart."""
    # Every worker reports a folder with its own shard; Ray Train stores all of them as one
    # checkpoint.
    rank = ray.train.get_context().get_world_rank()
    save_state(folder, engine, averaged, state, rank=rank)
    ray.train.report(dict(figures), checkpoint=Checkpoint.from_directory(str(folder)))


class _RunOutput:
    """Writes the output of the run on the first worker: records, checkpoints, uploads.

    Args:
        job, config, task, epochs, state: those of the run; `state.best` is updated here.
        active: whether this is the first worker; other workers write nothing.

    Attributes:
        best_by: the figure that determines the best epoch.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        job: Mapping[str, Any],
        config: TrainConfig,
        task: AnyTask,
        epochs: list[Epoch],
        state: RunState,
        *,
        active: bool,
    ) -> None:
        self._job, self._config, self._task = job, config, task
        self.best_by = best_figure(config, job["stage"])
        self._epochs, self._state, self._active = epochs, state, active
        self._folder = Path(job["output"])
        self._storage = open_storage(job["storage"]) if job["storage"] and active else None
        self._sinks: list[Sink] = []
        if active:
            self._folder.mkdir(parents=True, exist_ok=True)
            # This worker may run on another node than the driver, and after a restart on a new one.
            if self._storage is not None:
                self._storage.pull(self._folder / METRICS)
            done = sum(task.steps(epoch.stage) for epoch in epochs[: state.done.epochs])
            self._sinks = [
                JsonLines(self._folder / METRICS),
                TensorBoard(self._folder / TENSORBOARD, done + state.done.steps),
                Prometheus(self._folder.name),
            ]

    def write(self, record: Record) -> None:
        """Write a record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def finish_epoch(
        self, epoch: Epoch, losses: Mapping[str, float], folder: Path
    ) -> dict[str, float]:
        """Validate, write the checkpoint of an epoch into `folder`, and return the figures."""
        if not self._active:
            return {}
        number, figures = epoch.number + 1, self._task.validate()
        value, best = figures.get(self.best_by), self._state.best
        # Of equal epochs, the earliest is the best, since more training has brought nothing.
        if value is not None and (best is None or value > best.value):
            self._state.best = best = BestEpoch(number, value)
        best_epoch = best.epoch if best else None
        record = {"event": "epoch", "epoch": number, "best_epoch": best_epoch, "losses": losses}
        self.write({**record, **figures})
        about = _training_metadata(self._config, self._job, self._task, number, figures)
        self._task.save(folder / CHECKPOINT, about)
        chosen = best_epoch if best and self._config.final == "best" else len(self._epochs)
        # `best` may still change; then a later epoch replaces this checkpoint.
        if number == chosen:
            shutil.copytree(folder / CHECKPOINT, self._folder / CHECKPOINT, dirs_exist_ok=True)
            if self._storage is not None:
                self._storage.push(self._folder / CHECKPOINT)
        return figures

    def upload_records(self) -> None:
        """Upload the records to the remote storage."""
        if self._storage is not None:
            for name in (METRICS, TENSORBOARD):
                self._storage.push(self._folder / name)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def _training_metadata(
    config: TrainConfig,
    job: Mapping[str, Any],
    task: AnyTask,
    epoch: int,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Return the metadata that the checkpoint keeps about its training."""
    text = (Path(job["output"]) / METRICS).read_text(errors="replace")
    lines = list(records_of(text.splitlines()))
    starts = [line["time"] for line in lines if line["event"] == "start"]
    # After a restart, steps are repeated and logged again, but count only once.
    last_steps: dict[int, int] = {}
    for line in lines:
        if line["event"] == "progress":
            last_steps[line["epoch"]] = max(line["step"], last_steps.get(line["epoch"], 0))
    return {
        **task.about(),
        "stage": job["stage"],
        "epoch": epoch,
        "steps": sum(last_steps.values()),
        "hours": round((time.time() - starts[0]) / 3600, 2) if starts else None,
        "metrics": metrics,
        "settings": config.model_dump(mode="json", exclude=LOCAL_PATHS),
    }

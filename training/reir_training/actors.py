"""A training worker on Ray: others decode its steps; it hands in states, records, a checkpoint."""

# Shapes: see `reir_training.clare_data`

from __future__ import annotations

import json
import math
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.train import Checkpoint
from ray.util.metrics import Counter, Gauge

from reir.sinks import JsonLines, Record, Sink
from reir_training.clare_data import Arrays
from reir_training.config import PRESETS, CommonConfig
from reir_training.engine import Best, RunState, save_state, start_engine
from reir_training.loop import Averaged, Position, TrainLoop
from reir_training.plan import Epoch, plan
from reir_training.sinks import TensorBoard, figures
from reir_training.storage import CHECKPOINT, METRICS, TENSORBOARD, open_storage
from reir_training.tasks import AnyTask, make_task

NO_FIGURE = -1.0
"""Stands for the figure of a state that was kept within an epoch; figures are percentages."""
PLACES = {"data", "evaluation", "exclude_evaluation", "weights", "cache", "tokenizer", "towers"}
"""Settings that say where things lie on this machine, which a checkpoint does not keep."""
MOST_READERS = 8
"""Actors that load steps for one training worker; Ray starts more than one when steps run out."""
BLOCK_BYTES, MOST_A_BLOCK = 16 * 2**20, 8
"""Of the steps that are loaded and handed over together."""

PROTOCOL = 5
CPU_PARTS = 10_000
"""Ray counts a CPU in so many."""


class Readers(NamedTuple):
    """What loads the steps of one training worker.

    Attributes:
        cpus: that each actor reserves.
        most: actors at a time.
    """

    cpus: float
    most: int


def readers_of(cpus: float, num_workers: int) -> Readers:
    """Share the CPUs that training leaves, so that every worker's readers start with it.

    A reader that loads ahead does not end. Had the first worker's taken the last CPU, the others'
    would never start, and the first would wait for them in its first step.

    Args:
        cpus: of the cluster; each worker trains on one of them.
        num_workers: of the run.
    """
    each = max(cpus - num_workers, 0) / num_workers
    if each >= 1:
        return Readers(1, min(int(each), MOST_READERS))
    return Readers(math.floor(each * CPU_PARTS) / CPU_PARTS, 1)


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


def stream_steps(
    load: Callable[[int], Arrays], first: int, last: int, *, readers: Readers
) -> Generator[Arrays, None, None]:
    """Yield what `load` returns for each step in [first, last), loaded ahead by Ray actors.

    Ray's own work for a block is that of a small step, so small steps share one.

    Args:
        load: picklable function of the number of a step alone.
        first, last: numbers of steps.
        readers: actors that load.

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
        _Reader,
        fn_constructor_args=(load,),
        batch_size=None,
        num_cpus=readers.cpus,
        concurrency=(1, readers.most),
    )
    # by hand: threads of `iter_batches` outlive a stream that is closed early, and one that asks
    # for a block once Ray is shut down ends the whole process
    for bundle in blocks.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            for step in ray.get(entry.ref)["step"]:
                yield pickle.loads(step.as_buffer())


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


def train_worker(job: Mapping[str, Any]) -> None:
    """What each Ray Train worker runs."""
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
            stream_steps, readers=readers_of(ray.cluster_resources().get("CPU", 0), num_workers)
        ),
    )
    task.objective.to(ray.train.torch.get_device())
    decay = config.optimisation.ema_decay
    averaged = Averaged(decay) if decay else None
    with _kept() as kept:
        engine, state = start_engine(
            task,
            config,
            averaged,
            num_workers=num_workers,
            local_rank=context.get_local_rank(),
            kept=kept,
        )
    epochs = plan(config.optimisation, job["stage"])
    output = _Output(job, config, task, epochs, state, active=rank == 0)

    def keep(position: Position) -> None:
        state.done = position
        with tempfile.TemporaryDirectory() as folder:
            _hand_in(Path(folder), engine, averaged, state, {config.best_by: NO_FIGURE})
        output.copy_out()

    loop = TrainLoop(
        engine,
        task,
        config.optimisation,
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
            with loop.final_weights():
                figures = output.end_of(epoch, losses, Path(folder))
            figures = {config.best_by: NO_FIGURE, **figures}
            _hand_in(Path(folder), engine, averaged, state, figures)
        output.copy_out()
    output.close()


@contextmanager
def _kept() -> Iterator[Path | None]:
    """The folder of the last state that was handed in; None at the start of a run."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def _hand_in(
    folder: Path,
    engine: Any,
    averaged: Averaged | None,
    state: RunState,
    figures: Mapping[str, float],
) -> None:
    """Give the state to Ray Train, from where a rerun goes on."""
    rank = ray.train.get_context().get_world_rank()
    save_state(folder, engine, averaged, state, rank=rank)
    ray.train.report(dict(figures), checkpoint=Checkpoint.from_directory(str(folder)))


class _Output:
    """What the first worker writes: records, the checkpoint of each epoch, copies to the storage.

    Args:
        job, config, task, epochs, state: of the run; `state.best` is kept up here.
        active: whether this is the first worker; the others write nothing.
    """

    def __init__(  # noqa: PLR0913 - one by one is clearer than a bag
        self,
        job: Mapping[str, Any],
        config: CommonConfig,
        task: AnyTask,
        epochs: list[Epoch],
        state: RunState,
        *,
        active: bool,
    ) -> None:
        self._job, self._config, self._task = job, config, task
        self._epochs, self._state, self._active = epochs, state, active
        self._folder = Path(job["output"])
        self._storage = open_storage(job["storage"]) if job["storage"] and active else None
        self._sinks: list[Sink] = []
        if active:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._storage is not None:
                self._storage.pull(self._folder / METRICS)
            done = sum(task.steps(epoch.stage) for epoch in epochs[: state.done.epochs])
            self._sinks = [
                JsonLines(self._folder / METRICS),
                TensorBoard(self._folder / TENSORBOARD, done + state.done.steps),
                Prometheus(self._folder.name),
            ]

    def write(self, record: Record) -> None:
        """Give a record to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def end_of(self, epoch: Epoch, losses: Mapping[str, float], folder: Path) -> dict[str, float]:
        """Measure an epoch and write its checkpoint into `folder`; returns the figures."""
        if not self._active:
            return {}
        number, figures = epoch.number + 1, self._task.validate()
        value, best = figures.get(self._config.best_by), self._state.best
        if value is not None and (best is None or value > best.value):
            self._state.best = best = Best(number, value)
        best_epoch = best.epoch if best else None
        record = {"event": "epoch", "epoch": number, "best_epoch": best_epoch, "losses": losses}
        self.write({**record, **figures})
        about = _about(self._config, self._job, self._task, number, figures)
        self._task.save(folder / CHECKPOINT, about)
        chosen = best_epoch if best and self._config.final == "best" else len(self._epochs)
        if number == chosen:
            shutil.copytree(folder / CHECKPOINT, self._folder / CHECKPOINT, dirs_exist_ok=True)
            if self._storage is not None:
                self._storage.push(self._folder / CHECKPOINT)
        return figures

    def copy_out(self) -> None:
        """Bring the records in the storage up to date."""
        if self._storage is not None:
            for name in (METRICS, TENSORBOARD):
                self._storage.push(self._folder / name)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def _about(
    config: CommonConfig,
    job: Mapping[str, Any],
    task: AnyTask,
    epoch: int,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """What the checkpoint says of its own making."""
    lines = [json.loads(line) for line in (Path(job["output"]) / METRICS).read_text().splitlines()]
    starts = [line["time"] for line in lines if line["event"] == "start"]
    steps = {(line["epoch"], line["step"]) for line in lines if line["event"] == "progress"}
    last_steps = {epoch: max(s for e, s in steps if e == epoch) for epoch, _ in steps}
    return {
        **task.about(),
        "stage": job["stage"],
        "epoch": epoch,
        "steps": sum(last_steps.values()),
        "hours": round((time.time() - starts[0]) / 3600, 2) if starts else None,
        "metrics": metrics,
        "settings": config.model_dump(mode="json", exclude=PLACES),
    }

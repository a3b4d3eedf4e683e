"""Ray Train around the loop: workers, states to resume from, records, the final checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from pyarrow.fs import LocalFileSystem
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from reir.errors import ReirError
from reir.sinks import JsonLines, Record, Sink
from reir_training.actors import Prometheus, stream_steps
from reir_training.config import PRESETS, CommonConfig
from reir_training.engine import Best, RunState, save_state, start_engine
from reir_training.loop import Averaged, Position, TrainLoop
from reir_training.plan import Epoch, plan
from reir_training.sinks import TensorBoard
from reir_training.storage import Storage, open_storage
from reir_training.tasks import AnyTask, NumWorkers, make_task, shares_evenly

METRICS, CHECKPOINT, TENSORBOARD = "metrics.jsonl", "checkpoint", "tensorboard"
READERS = 1
NO_FIGURE = -1.0
"""Stands for the figure of a state that was kept within an epoch; figures are percentages."""
PLACES = {"data", "evaluation", "exclude_evaluation", "weights", "cache", "tokenizer", "towers"}
"""Settings that say where things lie on this machine, which a checkpoint does not keep."""


def train(  # noqa: PLR0913 - one by one is clearer than a bag
    preset: str,
    config: CommonConfig,
    *,
    output: Path,
    cache: Path | None,
    stage: str,
    init: Path | None = None,
    num_workers: NumWorkers = 1,
    use_gpu: bool = False,
    storage: str | None = None,
) -> Path:
    """Train on a local or remote Ray cluster; returns the checkpoint directory.

    A run with the same `output` (and `storage`) goes on from its last kept state.

    Args:
        preset: name of the model.
        config: of the run, of the kind that the preset takes.
        output: gets `checkpoint/`, `metrics.jsonl` and Ray's states; all workers must see it.
        cache: folder of the frozen part's output, already built; for `clare-nano` only.
        stage: "grounding", "clia", "all" (both) or "rerank".
        init: checkpoint directory to start from.
        num_workers: Ray Train workers.
        use_gpu: one GPU a worker.
        storage: URI that gets the states instead, and copies of the rest.
    """
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    cores = max((os.cpu_count() or 1) // most, 1)
    started_here = not ray.is_initialized()
    if started_here:
        _start_ray(most, cores, use_gpu)
    states = open_storage(storage) if storage else Storage(LocalFileSystem(), str(output.resolve()))
    try:
        trainer = _EvenTrainer(
            train_worker,
            train_loop_config={
                "preset": preset,
                "config": config.model_dump(mode="json"),
                "output": str(output),
                "cache": str(cache) if cache else None,
                "stage": stage,
                "init": str(init) if init else None,
                "threads": cores,
                "storage": storage,
            },
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(
                name="run",
                storage_path=f"{states.path}/ray",
                storage_filesystem=states.filesystem,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=config.keep_checkpoints, checkpoint_score_attribute=config.best_by
                ),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        trainer.can_share = lambda workers: shares_evenly(config.optimisation, workers)
        with _our_errors():
            trainer.fit()
    finally:
        if started_here:
            ray.shutdown()
    return output / CHECKPOINT


def _start_ray(num_workers: int, cores: int, use_gpu: bool) -> None:
    """Join the cluster that `RAY_ADDRESS` names, as within `ray job submit`; else start a Ray."""
    variables = {"OMP_NUM_THREADS": str(cores)}
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    own = {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, num_workers + READERS),
        "include_dashboard": False,
    }
    ray.init(
        **({} if os.environ.get("RAY_ADDRESS") else own),
        runtime_env={"env_vars": variables},
        log_to_driver=False,
    )


@contextmanager
def _our_errors() -> Iterator[None]:
    """Tell a mistake of the user's as such, not as a crash of workers."""
    try:
        yield
    except WorkerGroupError as failed:
        for error in failed.worker_failures.values():
            cause = getattr(error, "_base_exc", error)
            if isinstance(cause, ReirError):
                raise cause from failed
        raise


class _EvenTrainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Elastic within what can share the photos of a step.

    Ray 2.60 would take any number of the range, and has no public place to say which.
    """

    can_share: Callable[[int], bool]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if isinstance(parts["scaling_policy"], ElasticScalingPolicy):
            parts["scaling_policy"] = EvenPolicy(self.scaling_config, self.can_share)
        return super()._initialize_and_run_controller(**parts)


class EvenPolicy(ElasticScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as there is room for and as can share the photos of a step.

    Args:
        scaling_config: with a range of workers.
        can_share: whether so many can.
    """

    def __init__(self, scaling_config: ScalingConfig, can_share: Callable[[int], bool]) -> None:
        super().__init__(scaling_config)
        self._can_share = can_share

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return next((n for n in range(room, 0, -1) if self._can_share(n)), 0)


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
        cache=Path(job["cache"]) if job["cache"] else None,
        rank=rank,
        world_size=num_workers,
        stream=stream_steps,
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

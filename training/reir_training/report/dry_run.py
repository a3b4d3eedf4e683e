"""Estimates a run before it starts: parameters, memory, number of steps, and time per step.

A dry run takes a few real steps in this process, as one of the run's workers. It uses that worker's
share of the photos and the real DeepSpeed engine, but neither Ray nor communication between
workers. It leaves no files behind.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reir.errors import ConfigError
from reir_training.config import NanoTrainConfig, TrainConfig
from reir_training.data.examples import VAL
from reir_training.data.leakage import training_photos
from reir_training.nano.cache import build_cache
from reir_training.nano.initialization import start_model
from reir_training.report.memory import MemoryEstimate, estimate_memory
from reir_training.run.engine import start_engine
from reir_training.run.num_workers import NumWorkers, check_shares, shares_evenly
from reir_training.run.schedule import ADDED_PARTS, Epoch, plan
from reir_training.run.tasks import AnyTask, make_task
from reir_training.weak.config import WeakTrainConfig

WARM_UP, MEASURED = 1, 5


@dataclass(frozen=True)
class ModuleParameters:
    """Parameter counts of one part of the model, and its learning rates after warm-up."""

    name: str
    trainable: int
    frozen: int
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class StagePlan:
    """The length of a training stage."""

    stage: str
    epochs: int
    steps_per_epoch: int
    photos: int


@dataclass(frozen=True)
class StepMeasurement:
    """The measured time and memory of a step on one worker.

    Attributes:
        stage: stage of the measured steps.
        photos: photos per step on this worker.
        load_seconds: time to read and decode the photos of a step; a real run does this ahead of
            time, in other processes.
        step_seconds: time for the forward pass, the backward pass and the optimizer.
        activation_bytes: peak memory in a step, minus the memory in use between steps; None on a
            CPU, where it is not measured.
    """

    stage: str
    photos: int
    load_seconds: float
    step_seconds: float
    activation_bytes: int | None


@dataclass(frozen=True)
class DryRun:
    """The estimate for a run.

    Attributes:
        device: device of the measurement.
        num_workers: the largest possible number of workers.
        photos_per_s: throughput of all workers without communication, provided that loading the
            photos keeps up.
        hours: duration of the whole run at that throughput, without validation.
    """

    preset: str
    device: str
    num_workers: int
    zero_stage: int
    parts: tuple[ModuleParameters, ...]
    memory: tuple[MemoryEstimate, ...]
    stages: tuple[StagePlan, ...]
    measured: StepMeasurement
    photos_per_s: float
    hours: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir train --dry-run --json` prints."""
        return {**asdict(self), "memory": [each.to_dict() for each in self.memory]}


def dry_run(  # noqa: PLR0913 - most are keyword-only
    preset: str,
    config: TrainConfig,
    *,
    stage: str,
    init: Path | None,
    num_workers: NumWorkers,
    use_gpu: bool,
) -> DryRun:
    """Estimate the run that `driver.run` would start with these arguments.

    Raises:
        ConfigError: the photos of a step cannot be divided among the workers, the stage has no
            epochs, what is trained only takes minutes, or a GPU is requested and there is none.
    """
    brief = f"stage {stage!r}" if stage in ADDED_PARTS else ""
    if isinstance(config, WeakTrainConfig) and config.model.anchors == "candidates":
        brief = f"--preset {preset} with candidates as anchors"
    if brief:
        raise ConfigError(
            f"--dry-run is not available for {brief}, which only takes minutes to train"
        )
    check_shares(config.optimization, num_workers)
    workers = _max_workers(config, num_workers)
    epochs = plan(config.optimization, stage)
    if not epochs:
        raise ConfigError(
            f"stage {stage!r} has no epochs: set optimization.grounding_epochs or "
            "optimization.clia_epochs"
        )
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "--gpu: PyTorch finds no GPU on this machine; remove --gpu to measure on the CPU"
        )
    # As in a real run, where the workers share the cores of the machine.
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    with _task(preset, config, stage, init, workers) as (task, train_photos):
        task.objective.to("cuda" if use_gpu else "cpu")
        parts = _module_parameters(task)
        stages = _stages(task, config, epochs, train_photos)
        # The last stage is measured, because stage 2 computes all losses of stage 1, and CLIA.
        measured = _measure(task, config, epochs[-1], workers)
    photos_per_s = workers * measured.photos / measured.step_seconds
    trainable, frozen = sum(p.trainable for p in parts), sum(p.frozen for p in parts)
    return DryRun(
        preset=preset,
        device=torch.cuda.get_device_name()
        if use_gpu
        else f"CPU, {torch.get_num_threads()} threads",
        num_workers=workers,
        zero_stage=config.zero_stage,
        parts=parts,
        memory=tuple(
            estimate_memory(zero, trainable=trainable, frozen=frozen, num_workers=workers)
            for zero in range(4)
        ),
        stages=stages,
        measured=measured,
        photos_per_s=round(photos_per_s, 2),
        hours=round(sum(each.photos for each in stages) / photos_per_s / 3600, 3),
    )


def _max_workers(config: TrainConfig, num_workers: NumWorkers) -> int:
    """Return the largest number of workers that the run may have."""
    if isinstance(num_workers, int):
        return num_workers
    fewest, most = num_workers
    return max(n for n in range(fewest, most + 1) if shares_evenly(config.optimization, n))


@contextmanager
def _task(
    preset: str, config: TrainConfig, stage: str, init: Path | None, workers: int
) -> Iterator[tuple[AnyTask, int | None]]:
    """Yield the task of a single worker, and the number of training photos if it has only a few.

    The worker must get batches of the size that one of `workers` would get. A single worker that
    accumulates `workers` times as many parts per step gets such batches.
    """
    settings = config.optimization
    cut = settings.model_copy(update={"accumulate_steps": workers * settings.accumulate_steps})
    config = config.model_copy(update={"optimization": cut})
    if not isinstance(config, NanoTrainConfig):
        yield make_task(preset, config, stage=stage, init=init), None
        return
    train = [photo for photo in training_photos(config) if photo.split != VAL]
    # Running the frozen part on all photos would take minutes to hours, so use those of one step.
    few = train[: settings.photos_per_batch]
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(Path(folder), start_model(config, init)[0], few)
        yield make_task(preset, config, stage=stage, init=init, cache=cache, photos=few), len(train)


def _module_parameters(task: AnyTask) -> tuple[ModuleParameters, ...]:
    """Count the parameters of each module of the model and of what training adds to it."""
    rates = {id(p): group["base_lr"] for group in task.groups() for p in group["params"]}
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in task.objective.named_parameters():
        part, *_ = name.removeprefix("model.").split(".")[:-1] or ["model"]
        found.setdefault(part, []).append(parameter)
    return tuple(
        ModuleParameters(
            name,
            trainable=sum(p.numel() for p in members if p.requires_grad),
            frozen=sum(p.numel() for p in members if not p.requires_grad),
            learning_rates=tuple(
                sorted({rates[id(p)] for p in members if p.requires_grad and id(p) in rates})
            ),
        )
        for name, members in found.items()
    )


def _stages(
    task: AnyTask, config: TrainConfig, epochs: Sequence[Epoch], train_photos: int | None
) -> tuple[StagePlan, ...]:
    """Return the length of each stage, with the steps of the whole data set."""
    out = []
    for first in (epoch for epoch in epochs if epoch.number == epoch.first_of_stage):
        # The task of `clare-nano` only has the photos of one step, so its own number is too small.
        steps = (
            task.steps(first.stage)
            if train_photos is None
            else train_photos // config.optimization.photos_per_batch
        )
        photos = first.epochs_of_stage * steps * config.optimization.photos_per_batch
        out.append(StagePlan(first.stage, first.epochs_of_stage, steps, photos))
    return tuple(out)


def _measure(task: AnyTask, config: TrainConfig, epoch: Epoch, workers: int) -> StepMeasurement:
    """Measure real steps. The first is a warm-up that allocates memory and compiles kernels."""
    init_single_process_group()
    engine, _ = start_engine(task, config, None)
    device = next(engine.module.parameters()).device
    on_gpu = device.type == "cuda"
    # A GPU works asynchronously; without waiting, only the launch of its kernels would be timed.
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    batches = _batches(task, epoch)
    load = work = 0.0
    resting = peak = 0
    engine.train()
    for step in range(WARM_UP + MEASURED):
        if step == WARM_UP:
            load = work = 0.0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                resting = torch.cuda.memory_allocated()
        for _ in range(config.optimization.accumulate_steps):
            began = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            loss, _ = engine(batch.to(device), epoch.stage)
            engine.backward(loss)
            engine.step()
            wait()
            load, work = load + loaded - began, work + time.perf_counter() - loaded
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    return StepMeasurement(
        stage=epoch.stage,
        photos=config.optimization.photos_per_batch // workers,
        load_seconds=round(load / MEASURED, 4),
        step_seconds=round(work / MEASURED, 4),
        activation_bytes=peak - resting if on_gpu else None,
    )


def init_single_process_group() -> None:
    """Initialize a process group of one, because DeepSpeed requires a process group."""
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its log would go to standard output
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # A store within this process needs no port, which other processes might use.
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _batches(task: AnyTask, epoch: Epoch) -> Iterator[Any]:
    """Yield batches forever."""
    # An epoch of a tiny data set may have fewer batches than are measured.
    for number in count(epoch.first_of_stage):
        yield from task.batches(replace(epoch, number=number), 0)

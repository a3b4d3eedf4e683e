"""What a run will take, before it runs: parameters, memory, steps, and five measured steps.

In this process alone, without Ray, as one of the run's workers: its share of the photos, the real
engine, nothing exchanged. Writes nothing that outlives it.
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
from reir_training.assemble import start_model
from reir_training.cache import build_cache
from reir_training.checks import RERANK, NumWorkers, check_shares, shares_evenly
from reir_training.config import CommonConfig, TrainConfig
from reir_training.engine import start_engine
from reir_training.examples import VAL
from reir_training.leakage import training_photos
from reir_training.memory import Memory, memory_of
from reir_training.plan import Epoch, plan
from reir_training.tasks import AnyTask, make_task

WARM_UP, MEASURED = 1, 5


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model, and the learning rates they have after warm-up."""

    name: str
    trainable: int
    frozen: int
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class PlannedStage:
    """What a stage of training is to do."""

    stage: str
    epochs: int
    steps_per_epoch: int
    photos: int


@dataclass(frozen=True)
class Measured:
    """Five steps of one worker.

    Attributes:
        stage: that they belong to.
        photos: of one step on this worker.
        load_seconds: a step, to read and decode; a real run does this ahead, in other processes.
        step_seconds: a step, forward, backward and optimiser.
        activation_bytes: what forward and backward pass held above what is there between steps;
            None on a CPU, where this is not measured.
    """

    stage: str
    photos: int
    load_seconds: float
    step_seconds: float
    activation_bytes: int | None


@dataclass(frozen=True)
class DryRun:
    """What a run will take.

    Attributes:
        device: that was measured on.
        num_workers: the largest number that the run may have.
        photos_per_s: of all workers, if loading keeps up and exchange costs nothing.
        hours: of the whole plan at that rate, without validation.
    """

    preset: str
    device: str
    num_workers: int
    zero_stage: int
    parts: tuple[Part, ...]
    memory: tuple[Memory, ...]
    stages: tuple[PlannedStage, ...]
    measured: Measured
    photos_per_s: float
    hours: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the form that `reir train --dry-run --json` prints."""
        return {**asdict(self), "memory": [each.to_dict() for each in self.memory]}


def dry_run(  # noqa: PLR0913 - one by one is clearer than a bag
    preset: str,
    config: CommonConfig,
    *,
    stage: str,
    init: Path | None,
    num_workers: NumWorkers,
    use_gpu: bool,
) -> DryRun:
    """Return what a run with these arguments will take; see `run.run` for them.

    Raises:
        ConfigError: the workers cannot share the photos of a step, the plan is empty, the
            stage needs none, or there is no GPU where one is asked for.
    """
    if stage == RERANK:
        raise ConfigError(f"stage {stage!r} takes minutes; run it without --dry-run")
    check_shares(config.optimisation, num_workers)
    workers = _most(config, num_workers)
    epochs = plan(config.optimisation, stage)
    if not epochs:
        raise ConfigError(f"stage {stage!r} has no epochs; set grounding_epochs or clia_epochs")
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu: this machine has no GPU that torch can use; leave --gpu out")
    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    with _task(preset, config, stage, init, workers) as (task, train_photos):
        task.objective.to("cuda" if use_gpu else "cpu")
        parts = _parts(task)
        stages = _stages(task, config, epochs, train_photos)
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
            memory_of(zero, trainable=trainable, frozen=frozen, num_workers=workers)
            for zero in range(4)
        ),
        stages=stages,
        measured=measured,
        photos_per_s=round(photos_per_s, 2),
        hours=round(sum(each.photos for each in stages) / photos_per_s / 3600, 3),
    )


def _most(config: CommonConfig, num_workers: NumWorkers) -> int:
    """The largest number of workers that the run may have."""
    if isinstance(num_workers, int):
        return num_workers
    fewest, most = num_workers
    return max(n for n in range(fewest, most + 1) if shares_evenly(config.optimisation, n))


@contextmanager
def _task(
    preset: str, config: CommonConfig, stage: str, init: Path | None, workers: int
) -> Iterator[tuple[AnyTask, int]]:
    """The task with the batches of one of `workers`, and how many photos are trained on.

    A single worker that takes its steps in `workers` times as many parts sees the same batches.
    """
    settings = config.optimisation
    cut = settings.model_copy(update={"accumulate_steps": workers * settings.accumulate_steps})
    config = config.model_copy(update={"optimisation": cut})
    photos = training_photos(config)
    train = [photo for photo in photos if photo.split != VAL]
    if not isinstance(config, TrainConfig):
        yield make_task(preset, config, stage=stage, init=init), len(train)
        return
    # the frozen part of a single step's photos only: of all of them it takes minutes to hours
    few = train[: settings.photos_per_batch]
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(Path(folder), start_model(config, init)[0], few)
        yield make_task(preset, config, stage=stage, init=init, cache=cache, photos=few), len(train)


def _parts(task: AnyTask) -> tuple[Part, ...]:
    """Parameters by part: the modules of the model, and what training adds to it."""
    rates = {id(p): group["base_lr"] for group in task.groups() for p in group["params"]}
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in task.objective.named_parameters():
        part, *_ = name.removeprefix("model.").split(".")[:-1] or ["model"]
        found.setdefault(part, []).append(parameter)
    return tuple(
        Part(
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
    task: AnyTask, config: CommonConfig, epochs: Sequence[Epoch], train_photos: int
) -> tuple[PlannedStage, ...]:
    """The plan, with the steps of the whole data set."""
    out = []
    for first in (epoch for epoch in epochs if epoch.number == epoch.first_of_stage):
        steps = (
            train_photos // config.optimisation.photos_per_batch
            if isinstance(config, TrainConfig)
            else task.steps(first.stage)
        )
        photos = first.epochs_of_stage * steps * config.optimisation.photos_per_batch
        out.append(PlannedStage(first.stage, first.epochs_of_stage, steps, photos))
    return tuple(out)


def _measure(task: AnyTask, config: CommonConfig, epoch: Epoch, workers: int) -> Measured:
    """Take real steps; the first is not measured, since memory and kernels are set up in it."""
    _alone()
    engine, _ = start_engine(task, config, None)
    device = next(engine.module.parameters()).device
    on_gpu = device.type == "cuda"
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
        for _ in range(config.optimisation.accumulate_steps):
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
    return Measured(
        stage=epoch.stage,
        photos=config.optimisation.photos_per_batch // workers,
        load_seconds=round(load / MEASURED, 4),
        step_seconds=round(work / MEASURED, 4),
        activation_bytes=peak - resting if on_gpu else None,
    )


def _alone() -> None:
    """Make this process a group of one, which is all that DeepSpeed asks for."""
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it would write to standard output
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _batches(task: AnyTask, epoch: Epoch) -> Iterator[Any]:
    """Batches without end."""
    for number in count(epoch.first_of_stage):
        yield from task.batches(replace(epoch, number=number), 0)

"""What tests and benchmarks of training share: tiny tasks on scenes, and the steps of workers.

A step of several workers runs as `reir train` runs it, with the engine of `engine.py`; a step
alone is plain autograd on the whole global batch. Under ZeRO-3 every weight is split, also small
ones, which DeepSpeed would otherwise leave whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from reir.datasets.coco_classes import COCO_CLASSES
from reir.testing.scenes import make_scenes, save_scenes
from reir.testing.tiny import tiny_batch, tiny_model, tiny_tokenizer
from reir.testing.tiny_clare import tiny_clare_config
from reir_training.assemble import freeze, parameter_groups
from reir_training.batches import BatchMaker, TrainBatch
from reir_training.cache import FrozenCache
from reir_training.clare_task import ClareTask
from reir_training.config import (
    ClareTrainConfig,
    CommonConfig,
    LossWeights,
    ModelSettings,
    TrainConfig,
)
from reir_training.examples import TrainPhoto, Written
from reir_training.gather import AllWorkers, mean_over_workers
from reir_training.loop import Averaged, Position, Progress, TrainLoop
from reir_training.objective import ClareObjective
from reir_training.plan import Epoch, Stage

Model = Literal["clare", "clare-nano"]
TaskName = Literal["detection", "grounding", "clia"]
ZeroStage = Literal[1, 2, 3]
PHOTOS_PER_STEP = 4
NUM_NANO_PHOTOS, NUM_CANDIDATES = 9, 5
THREADS = 1


# ------------------------------------------------------------------------------------- tiny tasks


def write_scenes(folder: Path, *, train: int = 12, val: int = 4) -> None:
    """Write scenes as a folder of the format "photos", whose forms go by names of COCO's classes.

    So there is something to detect, too.
    """
    save_scenes(folder, {"train": make_scenes(train, 0, 96), "val": make_scenes(val, 1, 96)})
    path = folder / "instances.json"
    document = json.loads(path.read_text())
    for number, category in enumerate(document["categories"]):
        category["name"] = COCO_CLASSES[number]
    path.write_text(json.dumps(document))


def tiny_clare_settings(photos: Path, **changes: Any) -> dict[str, Any]:
    """Settings of `reir train --preset clare-base` that take milliseconds a step.

    Args:
        photos: folder that `write_scenes` wrote.
        changes: of the schedule.
    """
    shape = vars(tiny_clare_config(max_tokens=16))
    own = {"vocabulary", "clia_bias", "paper_parity"}
    return {
        "data": [{"format": "photos", "path": str(photos)}],
        "shape": {name: value for name, value in shape.items() if name not in own},
        "texts_per_photo": 2,
        "augmentation": {
            "short_sides": [64, 80, 96],
            "long_side": 128,
            "crop_short_sides": [96],
            "crop_sides": [64, 96],
        },
        "optimisation": {"photos_per_batch": PHOTOS_PER_STEP, "precision": "fp32", **changes},
    }


class TinyNanoTask:
    """`NanoTask` on random candidates instead of a cache of published networks.

    Args:
        folder: gets the cache, if it is not there yet.
        rank, world_size: of this worker.
    """

    photos_per_step = PHOTOS_PER_STEP

    def __init__(self, folder: Path, *, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self.config = TrainConfig.model_validate(
            {
                "data": [{"format": "photos", "path": str(folder)}],
                "weights": str(folder),
                "optimisation": {"photos_per_batch": PHOTOS_PER_STEP, "precision": "fp32"},
            }
        )
        if not folder.exists():
            _write_cache(folder)
        cache = FrozenCache(folder)
        photos = [_nano_photo(cache, row) for row in range(NUM_NANO_PHOTOS)]
        self._maker = BatchMaker(photos, cache, self.config.optimisation)
        self.model = tiny_model()
        freeze(self.model, ModelSettings(frozen_text_layers=0))
        self.objective = ClareObjective(
            self.model,
            tiny_tokenizer(),
            LossWeights(),
            workers=AllWorkers() if world_size > 1 else None,
        )

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups."""
        return parameter_groups(self.objective, self.config.optimisation)

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - the same for both
        """Steps of one epoch."""
        return NUM_NANO_PHOTOS // PHOTOS_PER_STEP

    def batches(self, epoch: Epoch, first: int) -> Iterator[TrainBatch]:
        """This worker's batches from step `first` on."""
        rows = self._maker.epoch(epoch.number, self._rank, self._world_size)
        for i in range(first, len(rows)):
            yield self._maker.batch(rows[i], [0, epoch.number, i])


def _write_cache(folder: Path) -> None:
    """Candidates of a few photos; some photos have fewer of them."""
    folder.mkdir(parents=True)
    batch = tiny_batch(NUM_NANO_PHOTOS, NUM_CANDIDATES)
    batch.valid[::2, -1] = False
    for name, value in batch.tensors().items():
        np.save(folder / f"{name}.npy", value.numpy())


def _nano_photo(cache: FrozenCache, row: int) -> TrainPhoto:
    """Unlike numbers of boxes, expressions and captions; every third has no caption."""
    boxes = cache.boxes(row)[: 1 + row % 3]
    texts = ("the red dog", "a blue car", "man left of the cat")
    kinds = ("long", "short", "long")
    return TrainPhoto(
        path=Path(f"{row}.jpg"),
        split="train",
        boxes=boxes.astype(np.float32),
        categories=np.arange(len(boxes)) - row % 2,
        names=("dog", "car", "man")[: len(boxes)],
        expressions=tuple(Written(texts[i], i, kinds[i]) for i in range(len(boxes))),
        captions=() if row % 3 == 2 else (f"a {WORDS[row % len(WORDS)]} in the car",),
        near_misses=("a man of the cat in the red car",) if row % 2 else (),
    )


WORDS = ("dog", "cat", "man", "red car")


def tiny_task(folder: Path, model: Model, rank: int, world_size: int) -> Any:
    """Return a `Task` with `config` and `groups`, its weights moved off their start.

    Args:
        folder: for photos and caches; whatever is missing is written.
        model: which objective.
        rank, world_size: of this worker.
    """
    task: Any
    if model == "clare-nano":
        task = TinyNanoTask(folder / "nano", rank=rank, world_size=world_size)
    else:
        if not (folder / "scenes").exists():
            write_scenes(folder / "scenes")
        settings = tiny_clare_settings(
            folder / "scenes", steps_per_epoch=3, save_every_steps=2, log_every_steps=1
        )
        config = ClareTrainConfig.model_validate(settings)
        task = ClareTask("clare-base", config, init=None, rank=rank, world_size=world_size)
        task.config = config
    _no_dropout(task.objective)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in task.objective.named_parameters():
            if not any(word in name for word in ("scale", "bias")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return task


def _no_dropout(module: nn.Module) -> None:
    """Turn dropout off: what it drops depends on the rank by design."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0


# ---------------------------------------------------------------------------------- steps compared


@dataclass(frozen=True)
class Case:
    """One step to compare.

    Attributes:
        model: which objective.
        task: "detection", "grounding" (stage 1) or "clia" (stage 2).
        zero_stage: of DeepSpeed.
    """

    model: Model
    task: TaskName
    zero_stage: ZeroStage

    def __str__(self) -> str:
        """Return a name without spaces."""
        return f"{self.model}_{self.task}_zero{self.zero_stage}"

    @property
    def stage(self) -> Stage:
        """Of training."""
        return "clia" if self.task == "clia" else "grounding"

    def batch(self, task: Any) -> Any:
        """One worker's part of the step."""
        first = 1 if self.model == "clare" and self.task == "grounding" else 0  # tasks take turns
        return next(iter(task.batches(Epoch(0, self.stage, 0, 1), first)))


TASKS: Mapping[Model, tuple[TaskName, ...]] = {
    "clare": ("detection", "grounding", "clia"),
    "clare-nano": ("grounding", "clia"),
}
ZERO_STAGES: tuple[ZeroStage, ...] = (1, 2, 3)
CASES = tuple(
    Case(model, task, zero_stage)
    for model, tasks in TASKS.items()
    for zero_stage in ZERO_STAGES
    for task in tasks
)


@dataclass(frozen=True)
class StepResult:
    """Loss and full gradients by name of parameter; zeros where there is none."""

    loss: Tensor
    gradients: dict[str, Tensor]

    def difference(self, other: StepResult) -> Difference:
        """Return how far another result of the same step is from this one."""
        assert self.gradients.keys() == other.gradients.keys()
        loss = float((self.loss - other.loss).abs())
        gradient = max(
            float((mine - other.gradients[name]).abs().max())
            for name, mine in self.gradients.items()
        )
        largest = max(float(mine.abs().max()) for mine in self.gradients.values())
        return Difference(loss / float(self.loss.abs()), gradient / largest, loss, gradient)


@dataclass(frozen=True)
class Difference:
    """Of two results of one step.

    Attributes:
        loss: relative.
        gradient: the largest over all elements, relative to the largest element of all gradients.
        loss_absolute, gradient_absolute: the same before division.
    """

    loss: float
    gradient: float
    loss_absolute: float
    gradient_absolute: float

    @property
    def largest(self) -> float:
        """The larger of the two relative ones."""
        return max(self.loss, self.gradient)


def step_alone(folder: Path, case: Case) -> StepResult:
    """Run the step on one worker, without DeepSpeed."""
    torch.set_num_threads(THREADS)
    task = tiny_task(folder, case.model, 0, 1)
    task.objective.train()
    loss, _ = task.objective(case.batch(task), case.stage)
    loss.backward()
    return StepResult(
        loss.detach(),
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in task.objective.named_parameters()
            if p.requires_grad
        },
    )


def steps_of_workers(
    folder: Path, cases: Sequence[Case], num_workers: int = 2
) -> dict[Case, StepResult]:
    """Run steps on several processes, joined by gloo.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; carries its traceback.
    """
    for model in {case.model for case in cases}:
        tiny_task(folder, model, 0, 1)  # writes photos and caches, which workers then share
    run_workers(folder, partial(_run_cases, folder, tuple(cases)), num_workers)
    results = {}
    for case in cases:
        tensors = load_file(folder / f"{case}.safetensors")
        results[case] = StepResult(tensors.pop("loss"), tensors)
    return results


def run_workers(folder: Path, job: Any, num_workers: int = 2) -> None:
    """Run `job(rank, world_size)`, which must pickle, in processes joined by gloo.

    Args:
        folder: where they meet.
        job: what each does.
        num_workers: processes.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    start_processes(  # type: ignore[no-untyped-call]
        _join, args=(num_workers, meeting, job), nprocs=num_workers, start_method="spawn"
    )


def _join(rank: int, world_size: int, meeting: Path, job: Any) -> None:
    torch.set_num_threads(THREADS)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    job(rank, world_size)
    dist.barrier()
    dist.destroy_process_group()


def tiny_engine(
    task: Any,
    zero_stage: int,
    world_size: int,
    averaged: Averaged | None = None,
    kept: Path | None = None,
) -> tuple[Any, Any]:
    """Return engine and state as `start_engine` does, but that ZeRO-3 splits every weight."""
    from reir_training.engine import start_engine

    config: CommonConfig = task.config.model_copy(update={"zero_stage": zero_stage})
    splitting = {"stage3_param_persistence_threshold": 0}
    return start_engine(task, config, averaged, num_workers=world_size, kept=kept, zero=splitting)


def _run_cases(folder: Path, cases: Sequence[Case], rank: int, world_size: int) -> None:
    """Write loss and full gradients of every case; one engine runs all steps of its kind."""
    from deepspeed.utils import safe_get_full_grad

    for (model, zero_stage), same in groupby(cases, lambda case: (case.model, case.zero_stage)):
        task = tiny_task(folder, model, rank, world_size)
        engine, _ = tiny_engine(task, zero_stage, world_size)
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0  # so that every step starts from the same weights
        for case in same:
            loss, _ = engine(case.batch(task), case.stage)
            engine.backward(loss)
            tensors = {"loss": mean_over_workers(loss)}
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradient = safe_get_full_grad(parameter)
                    assert gradient is not None, name
                    tensors[name] = gradient.clone()
            if rank == 0:
                save_file(tensors, folder / f"{case}.safetensors")
            engine.step()
        engine.destroy()


# --------------------------------------------------------------------------------- runs compared


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        losses: of every step, by epoch and step.
        averaged: weights, by name.
        validated: weights that the held-out photos were last seen with.
        figures: on these photos.
    """

    losses: dict[tuple[int, int], float]
    averaged: dict[str, Tensor]
    validated: dict[str, Tensor]
    figures: dict[str, float]


def runs_and_resumed_runs(
    folder: Path, zero_stages: Sequence[ZeroStage], num_workers: int = 2
) -> dict[ZeroStage, tuple[RunResult, RunResult]]:
    """Train CLARE for an epoch of each stage, and again from a state kept within the first.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; carries its traceback.
    """
    tiny_task(folder, "clare", 0, 1)
    run_workers(folder, partial(_run_twice, folder, tuple(zero_stages)), num_workers)
    # our own file of a moment ago
    return dict(torch.load(folder / "runs.pt", weights_only=False))


def _run_twice(folder: Path, zero_stages: Sequence[int], rank: int, world_size: int) -> None:
    results = {
        zero_stage: tuple(
            _run(folder, zero_stage, rank, world_size, resume=resume) for resume in (False, True)
        )
        for zero_stage in zero_stages
    }
    if rank == 0:
        torch.save(results, folder / "runs.pt")


def _run(folder: Path, zero_stage: int, rank: int, world_size: int, *, resume: bool) -> RunResult:
    """Train as `jobs.train_worker` does; a resumed run begins at the first state that was kept."""
    from reir_training.engine import save_state

    def kept_in(epoch: int) -> Path:
        return folder / f"state-{zero_stage}-{epoch}"

    task, averaged = tiny_task(folder, "clare", rank, world_size), Averaged(0.9)
    engine, state = tiny_engine(
        task, zero_stage, world_size, averaged, kept_in(0) if resume else None
    )
    result = RunResult({}, {}, {}, {})

    def log(progress: Progress) -> None:
        result.losses[progress.epoch, progress.step] = progress.loss

    def keep(position: Position) -> None:
        state.done = position
        save_state(kept_in(position.epochs), engine, averaged, state, rank=rank)

    loop = TrainLoop(
        engine,
        task,
        task.config.optimisation,
        rank=rank,
        zero_stage=zero_stage,
        averaged=averaged,
        on_progress=log,
        on_position=keep,
    )
    for epoch in (Epoch(0, "grounding", 0, 1), Epoch(1, "clia", 1, 1)):
        loop.run_epoch(epoch, 2, state.done)
        state.done = Position(epoch.number + 1)
        with loop.final_weights() as module:
            if rank == 0:
                result.figures.update(task.validate())
                named = module.named_parameters()
                result.validated.update({name: p.detach().clone() for name, p in named})
    engine.destroy()
    return replace(result, averaged=averaged.weights)

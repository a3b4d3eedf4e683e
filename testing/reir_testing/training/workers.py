"""Runs the same step, or the same training, on one worker and on several workers.

Several workers use the DeepSpeed engine, as in `reir train`. A single worker uses plain autograd on
the global batch. In ZeRO stage 3, all weights are sharded, including small ones, which DeepSpeed
would not shard by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reir_testing.training.processes import THREADS, run_workers
from reir_testing.training.tiny import ModelName, tiny_task
from reir_training.config import TrainConfig
from reir_training.run.collectives import mean_over_workers
from reir_training.run.loop import ExponentialMovingAverage, Position, TrainLoop, TrainProgress
from reir_training.run.schedule import Epoch, Stage

TaskName = Literal["detection", "grounding", "clia"]
ZeroStage = Literal[1, 2, 3]


@dataclass(frozen=True)
class StepCase:
    """A step to compare.

    Attributes:
        model: which model to train.
        task: "detection", "grounding" (stage 1) or "clia" (stage 2).
        zero_stage: ZeRO stage of DeepSpeed.
    """

    model: ModelName
    task: TaskName
    zero_stage: ZeroStage

    def __str__(self) -> str:
        """Return a name without spaces."""
        return f"{self.model}_{self.task}_zero{self.zero_stage}"

    @property
    def stage(self) -> Stage:
        """The training stage of the step."""
        return "clia" if self.task == "clia" else "grounding"

    def batch(self, task: Any) -> Any:
        """Return one worker's batch of the step."""
        # Stage 1 of CLARE alternates between detection (step 0) and grounding (step 1).
        first = 1 if self.model == "clare" and self.task == "grounding" else 0
        return next(iter(task.batches(Epoch(0, self.stage, 0, 1), first)))


TASKS: Mapping[ModelName, tuple[TaskName, ...]] = {
    "clare": ("detection", "grounding", "clia"),
    "clare-nano": ("grounding", "clia"),
    "piza": ("grounding",),
    "weak-candidates": ("grounding",),
    "weak-yolov3": ("grounding",),
}
ZERO_STAGES: tuple[ZeroStage, ...] = (1, 2, 3)
CASES = tuple(
    StepCase(model, task, zero_stage)
    for model, tasks in TASKS.items()
    for zero_stage in ZERO_STAGES
    for task in tasks
)


@dataclass(frozen=True)
class StepResult:
    """The loss and the full gradients of a step, by parameter name.

    A parameter without a gradient has a gradient of zeros.
    """

    loss: Tensor
    gradients: dict[str, Tensor]

    def difference(self, other: StepResult) -> Difference:
        """Return the difference to another result of the same step."""
        assert self.gradients.keys() == other.gradients.keys()
        loss = float((self.loss - other.loss).abs())
        gradient = max(
            float((mine - other.gradients[name]).abs().max())
            for name, mine in self.gradients.items()
        )
        # Relative to the largest element of all, because tiny gradients are mostly rounding errors.
        largest = max(float(mine.abs().max()) for mine in self.gradients.values())
        return Difference(loss / float(self.loss.abs()), gradient / largest, loss, gradient)


@dataclass(frozen=True)
class Difference:
    """The difference between two results of the same step.

    Attributes:
        loss: relative difference of the losses.
        gradient: largest difference of a gradient element, relative to the largest element.
        loss_absolute, gradient_absolute: the absolute differences.
    """

    loss: float
    gradient: float
    loss_absolute: float
    gradient_absolute: float

    @property
    def largest(self) -> float:
        """The larger of the two relative differences."""
        return max(self.loss, self.gradient)


def step_alone(folder: Path, case: StepCase) -> StepResult:
    """Run a step on one worker, without DeepSpeed."""
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
    folder: Path, cases: Sequence[StepCase], num_workers: int = 2
) -> dict[StepCase, StepResult]:
    """Run steps on several processes that communicate through gloo.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; contains its traceback.
    """
    for model in {case.model for case in cases}:
        tiny_task(folder, model, 0, 1)  # writes the photos and caches that the workers share
    run_workers(folder, partial(_run_cases, folder, tuple(cases)), num_workers)
    results = {}
    for case in cases:
        tensors = load_file(folder / f"{case}.safetensors")
        results[case] = StepResult(tensors.pop("loss"), tensors)
    return results


def tiny_engine(
    task: Any,
    zero_stage: int,
    world_size: int,
    averaged: ExponentialMovingAverage | None = None,
    resume_from: Path | None = None,
) -> tuple[Any, Any]:
    """Return engine and state as `start_engine` does, but let ZeRO stage 3 shard all weights."""
    # Importing DeepSpeed chooses its accelerator, so `run_workers` must set the environment first.
    from reir_training.run.engine import start_engine

    config: TrainConfig = task.config.model_copy(update={"zero_stage": zero_stage})
    splitting = {"stage3_param_persistence_threshold": 0}
    return start_engine(
        task, config, averaged, num_workers=world_size, resume_from=resume_from, zero=splitting
    )


def _run_cases(folder: Path, cases: Sequence[StepCase], rank: int, world_size: int) -> None:
    """Write the loss and the full gradients of every case; cases of one kind share an engine."""
    from deepspeed.utils import safe_get_full_grad

    for (model, zero_stage), same in groupby(cases, lambda case: (case.model, case.zero_stage)):
        task = tiny_task(folder, model, rank, world_size)
        engine, _ = tiny_engine(task, zero_stage, world_size)
        engine.train()
        for group in engine.optimizer.param_groups:
            # All cases share an engine, but must start from the same weights.
            group["lr"] = 0.0
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
    """The result of a run.

    Attributes:
        losses: loss of every step, by epoch and step.
        averaged: averaged weights by name.
        validated: weights of the last validation by name.
        figures: figures of the last validation.
    """

    losses: dict[tuple[int, int], float]
    averaged: dict[str, Tensor]
    validated: dict[str, Tensor]
    figures: dict[str, float]


def runs_and_resumed_runs(
    folder: Path, zero_stages: Sequence[ZeroStage], num_workers: int = 2
) -> dict[ZeroStage, tuple[RunResult, RunResult]]:
    """Train CLARE for an epoch of each stage, and again from a state saved within the first epoch.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; contains its traceback.
    """
    # Writes the photos that the workers share.
    tiny_task(folder, "clare", 0, 1)
    run_workers(folder, partial(_run_twice, folder, tuple(zero_stages)), num_workers)
    # Loading a pickle is safe here: `_run_twice` has just written it.
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
    """Train as `worker.train_worker` does; a resumed run starts from the first saved state."""
    from reir_training.run.engine import save_state

    def state_folder(epoch: int) -> Path:
        return folder / f"state-{zero_stage}-{epoch}"

    task, averaged = tiny_task(folder, "clare", rank, world_size), ExponentialMovingAverage(0.9)
    engine, state = tiny_engine(
        task, zero_stage, world_size, averaged, state_folder(0) if resume else None
    )
    result = RunResult({}, {}, {}, {})

    def log(progress: TrainProgress) -> None:
        result.losses[progress.epoch, progress.step] = progress.loss

    def keep(position: Position) -> None:
        state.done = position
        save_state(state_folder(position.epochs), engine, averaged, state, rank=rank)

    loop = TrainLoop(
        engine,
        task,
        task.config.optimization,
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

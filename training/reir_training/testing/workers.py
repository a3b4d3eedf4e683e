"""The same step, and the same run, on one worker and on several.

A step of several workers runs as `reir train` runs it, with the engine of `engine.py`; a step
alone is plain autograd on the whole global batch. Under ZeRO-3 every weight is split, also small
ones, which DeepSpeed would otherwise leave whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from reir_training.config import CommonConfig
from reir_training.gather import mean_over_workers
from reir_training.loop import Averaged, Position, Progress, TrainLoop
from reir_training.plan import Epoch, Stage
from reir_training.testing.tiny import Model, tiny_task

TaskName = Literal["detection", "grounding", "clia"]
ZeroStage = Literal[1, 2, 3]
THREADS = 1


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

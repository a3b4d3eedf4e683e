"""The training loop of one worker: schedule, steps, weight averaging, what an epoch reports.

One loop for every model: what is trained is a `Task`. Knows DeepSpeed's engine (forward, backward,
step) and no Ray; where states are kept is passed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from reir_training.config import Schedule
from reir_training.gather import mean_over_workers
from reir_training.plan import Epoch, Stage, rate_factor


class Task(Protocol):
    """What one worker trains."""

    @property
    def objective(self) -> nn.Module:
        """Called with a batch and the stage; returns the loss and its terms by name."""
        ...

    @property
    def photos_per_step(self) -> int:
        """Photos of one step over all workers."""
        ...

    def steps(self, stage: Stage) -> int:
        """Steps of one epoch."""
        ...

    def batches(self, epoch: Epoch, first: int) -> Iterator[Any]:
        """This worker's batches from step `first` on: a function of the seed and the step alone.

        A step has `accumulate_steps` of them.
        """
        ...


@dataclass
class Position:
    """How far a run has come: whole epochs, steps of the next, and what these steps summed up.

    A step is one of the optimiser, however many batches it takes.
    """

    epochs: int = 0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Averaged:
    """Exponential moving average of the trainable weights, by parameter name."""

    decay: float
    weights: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    @torch.no_grad()
    def update(self, objective: torch.nn.Module) -> None:
        """Move towards the current weights; early updates move faster."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                kept = self.weights.get(name)
                if kept is None:
                    self.weights[name] = parameter.detach().float().cpu().clone()
                else:
                    kept.lerp_(parameter.detach().float().cpu(), 1 - decay)

    @contextmanager
    def applied(self, objective: torch.nn.Module) -> Iterator[None]:
        """Put the averaged weights into the module for the length of the block."""
        live = {n: p.detach().clone() for n, p in objective.named_parameters() if n in self.weights}
        _copy(objective, self.weights)
        try:
            yield
        finally:
            _copy(objective, live)


@torch.no_grad()
def _copy(objective: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in objective.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


@contextmanager
def gathered(objective: torch.nn.Module, zero_stage: int) -> Iterator[None]:
    """Make whole parameters visible; only ZeRO-3 splits them."""
    parameters = list(objective.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=zero_stage == 3):
        yield


@dataclass
class Progress:
    """What is reported while training.

    Attributes:
        photos: seen by all workers since the last report.
        step_seconds: mean of the steps since the last report.
        photos_per_s: since the epoch began, or went on.
        loss: of this step, over all workers.
        parts: means of the epoch so far.
    """

    epoch: int
    epochs: int
    stage: str
    step: int
    steps: int
    photos: int
    step_seconds: float
    photos_per_s: float
    learning_rate: float
    loss: float
    parts: dict[str, float]


class TrainLoop:
    """Runs epochs of one worker.

    Args:
        engine: DeepSpeed engine around the task's objective.
        task: gives this worker's batches.
        settings: schedule.
        rank: of this worker.
        zero_stage: of the engine.
        averaged: weight average, None to keep the last weights.
        on_progress: called every `log_every_steps` steps and after the last of an epoch.
        on_position: called every `save_every_steps` steps within an epoch; may keep the state.
    """

    def __init__(  # noqa: PLR0913 - one by one is clearer than a bag
        self,
        engine: Any,
        task: Task,
        settings: Schedule,
        *,
        rank: int,
        zero_stage: int,
        averaged: Averaged | None,
        on_progress: Callable[[Progress], None],
        on_position: Callable[[Position], None] = lambda _: None,
    ) -> None:
        self._engine, self._task, self._settings = engine, task, settings
        self._rank, self._zero_stage = rank, zero_stage
        self._averaged = averaged
        self._on_progress, self._on_position = on_progress, on_position

    @property
    def objective(self) -> nn.Module:
        """The module under training."""
        module: nn.Module = self._engine.module
        return module

    def run_epoch(
        self, epoch: Epoch, num_epochs: int, done: Position | None = None
    ) -> dict[str, float]:
        """Train one epoch, or what is left of it; returns the mean of every part of the loss.

        Batches and dropout depend on seed, rank, epoch and step only, so a step that is repeated
        after a failure is the same step.
        """
        first, sums = (done.steps, dict(done.sums)) if done else (0, {})
        steps, parts = self._task.steps(epoch.stage), self._settings.accumulate_steps
        clock, loss = _Clock(self._task.photos_per_step, first), 0.0
        self._engine.train()
        for i, batch in enumerate(self._task.batches(epoch, first), start=first * parts):
            step, part = divmod(i, parts)
            self._set_rate((epoch.number - epoch.first_of_stage) * steps + step, epoch, steps)
            loss = (loss if part else 0.0) + self._learn(batch, epoch, i, sums)
            if part + 1 < parts:
                continue
            self._average()
            if (step + 1) % self._settings.log_every_steps == 0 or step + 1 == steps:
                self._on_progress(
                    Progress(
                        epoch=epoch.number + 1,
                        epochs=num_epochs,
                        stage=epoch.stage,
                        step=step + 1,
                        steps=steps,
                        **clock.lap(step + 1),
                        learning_rate=max(g["lr"] for g in self._engine.optimizer.param_groups),
                        loss=loss,
                        parts={k: round(v / (step + 1), 4) for k, v in sums.items()},
                    )
                )
            if (step + 1) % self._settings.save_every_steps == 0 and step + 1 < steps:
                self._on_position(Position(epoch.number, step + 1, sums))
        return {name: value / max(steps, 1) for name, value in sums.items()}

    def _learn(self, batch: Any, epoch: Epoch, number: int, sums: dict[str, float]) -> float:
        """Learn from one batch, `number` of its epoch; returns what it adds to its step's loss."""
        parts = self._settings.accumulate_steps
        device = next(self.objective.parameters()).device
        torch.manual_seed(hash((self._settings.seed, epoch.number, self._rank, number)) % 2**31)
        loss, terms = self._engine(batch.to(device), epoch.stage)
        self._engine.backward(loss)  # the engine divides by the number of parts,
        self._engine.step()  # and moves the weights after the last one only
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value / parts
        return float(mean_over_workers(loss)) / parts

    def _set_rate(self, step: int, epoch: Epoch, steps: int) -> None:
        num_steps = epoch.epochs_of_stage * steps
        factor = rate_factor(step, num_steps, self._settings)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _average(self) -> None:
        if self._averaged is not None:
            with gathered(self.objective, self._zero_stage):
                self._averaged.update(self.objective)

    @contextmanager
    def final_weights(self) -> Iterator[nn.Module]:
        """The module with the weights that would be kept if training ended now."""
        with gathered(self.objective, self._zero_stage), _by_itself(self._engine, self._zero_stage):
            if self._averaged is None:
                yield self.objective
                return
            with self._averaged.applied(self.objective):
                yield self.objective


@contextmanager
def _by_itself(engine: Any, zero_stage: int) -> Iterator[None]:
    """Let one worker call the module without the others.

    Under ZeRO-3 each call would gather weights from all workers, and split them again after it.
    """
    if zero_stage < 3:
        yield
        return
    offload = engine.optimizer.parameter_offload
    offload._remove_module_hooks()
    try:
        yield
    finally:
        offload.setup_zero_stage3_hooks()


class _Clock:
    """Measures steps of an epoch that begins, or goes on, at step `first`."""

    def __init__(self, photos_per_step: int, first: int) -> None:
        self._photos_per_step, self._first = photos_per_step, first
        self._started = self._last_time = time.perf_counter()
        self._last = first

    def lap(self, step: int) -> dict[str, Any]:
        """Figures of `Progress` after `step` steps of the epoch."""
        now = time.perf_counter()
        new, seconds = step - self._last, now - self._last_time
        self._last, self._last_time = step, now
        seen = (step - self._first) * self._photos_per_step
        return {
            "photos": new * self._photos_per_step,
            "step_seconds": round(seconds / new, 4),
            "photos_per_s": round(seen / (now - self._started), 2),
        }

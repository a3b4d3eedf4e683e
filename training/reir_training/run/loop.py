"""The training loop of one worker: steps, learning rate, weight averaging, progress reports.

One loop serves every model; a `TrainTask` supplies the objective and the batches. Uses DeepSpeed's
engine (forward, backward, step) but not Ray: the caller decides where states are saved.
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
from torch.nn.modules.batchnorm import _BatchNorm

from reir_training.config import Schedule
from reir_training.run.collectives import mean_over_workers
from reir_training.run.schedule import Epoch, Stage, rate_factor


class TrainTask(Protocol):
    """What a `TrainLoop` needs from the model that it trains."""

    @property
    def objective(self) -> nn.Module:
        """Module that takes a batch and the stage, and returns the loss and its terms by name."""
        ...

    @property
    def photos_per_step(self) -> int:
        """Photos per step, over all workers."""
        ...

    def steps(self, stage: Stage) -> int:
        """Return the number of steps per epoch."""
        ...

    def batches(self, epoch: Epoch, first: int) -> Iterator[Any]:
        """Yield this worker's batches from step `first` on, `accumulate_steps` per step.

        Batches may depend only on the seed and the step, so that a resumed run repeats them.
        """
        ...


@dataclass
class Position:
    """The completed part of a run.

    Attributes:
        epochs: number of completed epochs.
        steps: number of completed optimizer steps in the next epoch.
        sums: sums of the loss terms over these steps.
    """

    epochs: int = 0
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class ExponentialMovingAverage:
    """Exponential moving average of what training changes, by name: see `trained_tensors`."""

    decay: float
    weights: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    @torch.no_grad()
    def update(self, objective: torch.nn.Module) -> None:
        """Move the average toward the current weights; early updates move it faster."""
        # With a constant decay, the average would stay close to the initial weights for long.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, value in trained_tensors(objective).items():
            kept = self.weights.get(name)
            # On the host, so that the average takes no memory of the GPU.
            if kept is None:
                self.weights[name] = value.detach().float().cpu().clone()
            else:
                kept.lerp_(value.detach().float().cpu(), 1 - decay)

    @contextmanager
    def applied(self, objective: torch.nn.Module) -> Iterator[None]:
        """Use the averaged weights in the module within the block."""
        values = [*objective.named_parameters(), *objective.named_buffers()]
        live = {name: value.detach().clone() for name, value in values if name in self.weights}
        _copy(objective, self.weights)
        try:
            yield
        finally:
            _copy(objective, live)


@torch.no_grad()
def _copy(objective: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in [*objective.named_parameters(), *objective.named_buffers()]:
        if name in weights:
            value.copy_(weights[name])


def trained_tensors(objective: torch.nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights, and the running statistics of batch norms in training mode.

    The statistics have to be averaged too: those of the last weights do not fit averaged weights.
    """
    found: dict[str, Tensor] = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    for name, module in objective.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            found |= {f"{name}.{n}": b for n, b in module.named_buffers() if b.is_floating_point()}
    return found


@contextmanager
def gathered(objective: torch.nn.Module, zero_stage: int) -> Iterator[None]:
    """Gather the full parameters within the block; only ZeRO stage 3 shards them."""
    parameters = list(objective.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=zero_stage == 3):
        yield


@dataclass
class TrainProgress:
    """A progress report.

    Attributes:
        photos: photos processed by all workers since the last report.
        step_seconds: mean duration of the steps since the last report.
        photos_per_s: throughput since the epoch started or resumed.
        loss: loss of this step, over all workers.
        parts: means of the loss terms over the epoch so far.
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
    """Runs the epochs of one worker.

    Args:
        engine: DeepSpeed engine around the task's objective.
        task: supplies this worker's batches.
        settings: schedule.
        rank: rank of this worker.
        zero_stage: ZeRO stage of the engine.
        averaged: weight average; None to use the last weights.
        on_progress: called every `log_every_steps` steps and after the last step of an epoch.
        on_position: called every `save_every_steps` steps within an epoch, to save the state.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        engine: Any,
        task: TrainTask,
        settings: Schedule,
        *,
        rank: int,
        zero_stage: int,
        averaged: ExponentialMovingAverage | None,
        on_progress: Callable[[TrainProgress], None],
        on_position: Callable[[Position], None] = lambda _: None,
    ) -> None:
        self._engine, self._task, self._settings = engine, task, settings
        self._rank, self._zero_stage = rank, zero_stage
        self._averaged = averaged
        self._on_progress, self._on_position = on_progress, on_position

    @property
    def objective(self) -> nn.Module:
        """The module that is trained."""
        module: nn.Module = self._engine.module
        return module

    def run_epoch(
        self, epoch: Epoch, num_epochs: int, done: Position | None = None
    ) -> dict[str, float]:
        """Train one epoch, or the rest of it, and return the mean of each loss term.

        Batches and dropout depend only on seed, rank, epoch and step. So a step that is repeated
        after a failure gives the same result.
        """
        first, sums = (done.steps, dict(done.sums)) if done else (0, {})
        steps, parts = self._task.steps(epoch.stage), self._settings.accumulate_steps
        clock, loss = _StepTimer(self._task.photos_per_step, first), 0.0
        self._engine.train()
        for i, batch in enumerate(self._task.batches(epoch, first), start=first * parts):
            step, part = divmod(i, parts)
            self._set_rate((epoch.number - epoch.first_of_stage) * steps + step, epoch, steps)
            loss = (loss if part else 0.0) + self._train_on_batch(batch, epoch, i, sums)
            if part + 1 < parts:
                continue
            self._average()
            if (step + 1) % self._settings.log_every_steps == 0 or step + 1 == steps:
                self._on_progress(
                    TrainProgress(
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
            # The end of an epoch is saved by the caller, after validation.
            if (step + 1) % self._settings.save_every_steps == 0 and step + 1 < steps:
                self._on_position(Position(epoch.number, step + 1, sums))
        # `sums` includes the steps before a restart, so that the means are those of the whole
        # epoch.
        return {name: value / max(steps, 1) for name, value in sums.items()}

    def _train_on_batch(
        self, batch: Any, epoch: Epoch, number: int, sums: dict[str, float]
    ) -> float:
        """Train on batch `number` of an epoch; returns its contribution to the loss of the step."""
        parts = self._settings.accumulate_steps
        device = next(self.objective.parameters()).device
        # Dropout must not depend on how many random numbers were drawn before a run resumed. Unlike
        # that of a string, the hash of integers is the same in every process.
        torch.manual_seed(hash((self._settings.seed, epoch.number, self._rank, number)) % 2**31)
        loss, terms = self._engine(batch.to(device), epoch.stage)
        self._engine.backward(loss)  # divides the gradients by `accumulate_steps`
        self._engine.step()  # updates the weights only after the last part of a step
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value / parts
        # All workers report the same loss, whichever photos they have.
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
        """Yield the module with the weights that a checkpoint should have: averaged, if at all."""
        with (
            gathered(self.objective, self._zero_stage),
            _without_zero3_hooks(self._engine, self._zero_stage),
        ):
            if self._averaged is None:
                yield self.objective
                return
            with self._averaged.applied(self.objective):
                yield self.objective


@contextmanager
def _without_zero3_hooks(engine: Any, zero_stage: int) -> Iterator[None]:
    """Let one worker run the module without the others, which it needs for validation.

    Under ZeRO stage 3, hooks on every module gather its weights from all workers before it runs and
    release them afterward. With one worker alone, they would wait forever.
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


class _StepTimer:
    """Measures the steps of an epoch that starts or resumes at step `first`."""

    def __init__(self, photos_per_step: int, first: int) -> None:
        self._photos_per_step, self._first = photos_per_step, first
        self._started = self._last_time = time.perf_counter()
        self._last = first

    def lap(self, step: int) -> dict[str, Any]:
        """Return the timing fields of a `TrainProgress` after `step` steps of the epoch."""
        now = time.perf_counter()
        new, seconds = step - self._last, now - self._last_time
        self._last, self._last_time = step, now
        seen = (step - self._first) * self._photos_per_step
        return {
            "photos": new * self._photos_per_step,
            "step_seconds": round(seconds / new, 4),
            "photos_per_s": round(seen / (now - self._started), 2),
        }

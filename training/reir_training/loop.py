"""The training loop of one worker: schedule, steps, weight averaging, what an epoch reports.

Knows DeepSpeed's engine (forward, backward, step) and no Ray; where states are kept is passed in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor

from reir_training.batches import BatchMaker
from reir_training.config import Optimisation
from reir_training.objective import ClareObjective, Stage

FINAL_RATE = 0.02
LOG_EVERY_STEPS = 10


@dataclass(frozen=True)
class Epoch:
    """One epoch of the plan: its number over both stages, and where its stage begins and ends."""

    number: int
    stage: Stage
    first_of_stage: int
    epochs_of_stage: int


def plan(settings: Optimisation, stage: str) -> list[Epoch]:
    """Epochs of `stage` ("grounding", "clia" or "all") in order."""
    lengths: dict[Stage, int] = {
        "grounding": settings.grounding_epochs,
        "clia": settings.clia_epochs,
    }
    out: list[Epoch] = []
    for name, length in lengths.items():
        if stage in (name, "all"):
            first = len(out)
            out.extend(Epoch(first + i, name, first, length) for i in range(length))
    return out


def rate_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then cosine down to 2 %; `step` counts from the start of the stage."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(num_steps, 1), 1)))
    return min(1.0, (step + 1) / warmup_steps) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


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
    """What is reported while training; one JSON line each."""

    epoch: int
    epochs: int
    stage: str
    step: int
    steps: int
    photos_per_s: float
    loss: float
    parts: dict[str, float]


class TrainLoop:
    """Runs epochs of one worker.

    Args:
        engine: DeepSpeed engine around a `ClareObjective`.
        maker: builds this worker's batches.
        settings: schedule.
        rank, world_size: of this worker.
        zero_stage: of the engine.
        averaged: weight average, None to keep the last weights.
        on_progress: called every few steps.
    """

    def __init__(  # noqa: PLR0913 - one by one is clearer than a bag
        self,
        engine: Any,
        maker: BatchMaker,
        settings: Optimisation,
        *,
        rank: int,
        world_size: int,
        zero_stage: int,
        averaged: Averaged | None,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._engine, self._maker, self._settings = engine, maker, settings
        self._rank, self._world_size, self._zero_stage = rank, world_size, zero_stage
        self._averaged, self._on_progress = averaged, on_progress

    @property
    def _device(self) -> torch.device:
        return next(self.objective.parameters()).device

    @property
    def objective(self) -> ClareObjective:
        """The module under training."""
        module: ClareObjective = self._engine.module
        return module

    def run_epoch(self, epoch: Epoch, num_epochs: int) -> dict[str, float]:
        """Train one epoch; returns the mean of every part of the loss.

        Batches, mirror images and dropout depend on seed, epoch and rank only, so an epoch that
        is repeated after a failure is the same epoch.
        """
        seed = self._settings.seed
        torch.manual_seed(hash((seed, epoch.number, self._rank)) % 2**31)
        self._engine.train()
        batches = self._maker.epoch(epoch.number, self._rank, self._world_size)
        sums: dict[str, float] = {}
        started = time.perf_counter()
        for i, rows in enumerate(batches):
            done = (epoch.number - epoch.first_of_stage) * len(batches) + i
            self._set_rate(done, epoch.epochs_of_stage * len(batches))
            rng = np.random.default_rng([seed, epoch.number, self._rank, i])
            batch = self._maker.batch(rows, rng).to(self._device)
            loss, parts = self._engine(batch, epoch.stage)
            self._engine.backward(loss)
            self._engine.step()
            self._average()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
            if (i + 1) % LOG_EVERY_STEPS == 0 or i + 1 == len(batches):
                rate = (i + 1) * len(rows) * self._world_size / (time.perf_counter() - started)
                self._on_progress(
                    Progress(
                        epoch=epoch.number + 1,
                        epochs=num_epochs,
                        stage=epoch.stage,
                        step=i + 1,
                        steps=len(batches),
                        photos_per_s=round(rate, 2),
                        loss=round(float(loss.detach()), 4),
                        parts={k: round(v / (i + 1), 4) for k, v in sums.items()},
                    )
                )
        return {name: value / max(len(batches), 1) for name, value in sums.items()}

    def _set_rate(self, step: int, num_steps: int) -> None:
        factor = rate_factor(step, num_steps, self._settings.warmup_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _average(self) -> None:
        if self._averaged is not None:
            with gathered(self.objective, self._zero_stage):
                self._averaged.update(self.objective)

    @contextmanager
    def final_weights(self) -> Iterator[ClareObjective]:
        """The module with the weights that would be kept if training ended now."""
        with gathered(self.objective, self._zero_stage):
            if self._averaged is None:
                yield self.objective
                return
            with self._averaged.applied(self.objective):
                yield self.objective

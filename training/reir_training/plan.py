"""What a run is to do: stages, their epochs, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from reir_training.config import Schedule

Stage = Literal["grounding", "clia", "rerank"]
FINAL_RATE = 0.02
STEP_AT, STEP_TO = 0.8, 0.1


@dataclass(frozen=True)
class Epoch:
    """One epoch of the plan: its number over both stages, and where its stage begins and ends."""

    number: int
    stage: Stage
    first_of_stage: int
    epochs_of_stage: int


def plan(settings: Schedule, stage: str) -> list[Epoch]:
    """Epochs of `stage` in order; "all" is "grounding" and "clia", the dual stream's."""
    lengths: dict[Stage, int] = {
        "grounding": settings.grounding_epochs,
        "clia": settings.clia_epochs,
        "rerank": settings.rerank_epochs,
    }
    out: list[Epoch] = []
    for name, length in lengths.items():
        if stage == name or (stage == "all" and name != "rerank"):
            first = len(out)
            out.extend(Epoch(first + i, name, first, length) for i in range(length))
    return out


def rate_factor(step: int, num_steps: int, settings: Schedule) -> float:
    """Linear warm-up, then as `settings.decay` says; `step` counts from the start of the stage."""
    start = settings.warmup_start
    offset = 0 if start else 1  # a warm-up from 0 would waste its first step
    warm = min(1.0, start + (1 - start) * (step + offset) / settings.warmup_steps)
    done = min(step / max(num_steps, 1), 1)
    if settings.decay == "step":
        return warm * (1.0 if done < STEP_AT else STEP_TO)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

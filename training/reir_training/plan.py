"""What a run is to do: stages, their epochs, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from reir_training.config import Optimisation

Stage = Literal["grounding", "clia"]
FINAL_RATE = 0.02


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

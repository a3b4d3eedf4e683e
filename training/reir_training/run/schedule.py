"""The schedule of a run: its stages, their epochs, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reir.errors import ConfigError
from reir_training.config import Schedule, TrainConfig
from reir_training.figures import FIGURES

Stage = Literal[
    "grounding", "clia", "rerank", "masks", "query-zoom", "colors", "candidates", "crops"
]
PIZA, WEAK_REC = "piza", "weak-rec"
RERANK, MASKS, QUERY_ZOOM = "rerank", "masks", "query-zoom"
COLORS, CANDIDATES, CROPS = "colors", "candidates", "crops"
ADDED_PARTS: Mapping[str, str] = {
    RERANK: "re-ranker",
    MASKS: "mask head",
    QUERY_ZOOM: "zoom policy",
    COLORS: "color head",
    CANDIDATES: "candidate head",
    CROPS: "trained crop network",
}
"""Some stages start from a finished `clare-nano`. This maps the name of each such stage to the part
that it adds or trains."""
FINAL_RATE = 0.02


def check_stage(preset: str, stage: str, init: Path | None) -> None:
    """Check that a stage is possible for a preset.

    Raises:
        ConfigError: the stage adds a part to a finished `clare-nano`, but the preset is another one
            or `init` is missing; or the preset has no such stage, or does not start from `init`.
    """
    if preset == PIZA and init is not None:
        raise ConfigError(
            f"--preset {PIZA} starts from the base in its settings: remove --init {init}"
        )
    if preset in (PIZA, WEAK_REC) and stage not in ("all", "grounding"):
        raise ConfigError(
            f"--preset {preset} has a single stage, grounding: remove --stage {stage}"
        )
    if stage in ADDED_PARTS and preset != "clare-nano":
        raise ConfigError(f"--stage {stage} requires --preset clare-nano, got {preset!r}")
    if stage in ADDED_PARTS and init is None:
        raise ConfigError(
            f"--stage {stage} requires --init: the checkpoint that gets the {ADDED_PARTS[stage]}"
        )


def best_figure(config: TrainConfig, stage: str) -> str:
    """Return the validation figure that determines the best epoch of a stage.

    Raises:
        ConfigError: `best_by` is a figure of another stage.
    """
    known, best_by = config.part_figures.get(stage, config.figures), config.best_by
    if best_by == FIGURES[0] and best_by not in known:
        # Earlier releases wrote this default into `config.yaml` for all stages, so it is not known
        # to be a choice.
        best_by = None
    if best_by is not None and best_by not in known:
        raise ConfigError(
            f"best_by={best_by} is not a figure of --stage {stage}: "
            f"use one of {', '.join(known)}, or remove best_by"
        )
    return best_by or known[0]


def check_fills_batch(settings: Schedule, num: int, what: str) -> None:
    """Check that there is enough to train on for one step.

    Args:
        settings: of the run.
        num: how many there are.
        what: name of what a step is made of, in the message.

    Raises:
        ConfigError: there are fewer than `photos_per_batch`.
    """
    if num < settings.photos_per_batch:
        raise ConfigError(
            f"photos_per_batch={settings.photos_per_batch} is more than the {num} {what}: "
            f"{'lower it, or ' if num else ''}add photos"
        )


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number over all stages, and the first epoch and length of its stage."""

    number: int
    stage: Stage
    first_of_stage: int
    epochs_of_stage: int


def plan(settings: Schedule, stage: str) -> list[Epoch]:
    """Return the epochs of a stage in order; "all" means "grounding", then "clia"."""
    lengths: dict[Stage, int] = {
        "grounding": settings.grounding_epochs,
        "clia": settings.clia_epochs,
        "rerank": settings.rerank_epochs,
        "masks": settings.masks_epochs,
        "query-zoom": settings.query_zoom_epochs,
        "colors": settings.colors_epochs,
        "candidates": settings.candidates_epochs,
        "crops": settings.crops_epochs,
    }
    out: list[Epoch] = []
    for name, length in lengths.items():
        # "all" means the model itself; other parts are added to a finished one.
        if stage == name or (stage == "all" and name not in ADDED_PARTS):
            first = len(out)
            out.extend(Epoch(first + i, name, first, length) for i in range(length))
    return out


def rate_factor(step: int, num_steps: int, settings: Schedule) -> float:
    """Return the factor on the learning rate at a step of a stage: linear warm-up, then decay."""
    start = settings.warmup_start
    offset = 0 if start else 1  # a learning rate of 0 would waste the first step
    warm = min(1.0, start + (1 - start) * (step + offset) / settings.warmup_steps)
    done = min(step / max(num_steps, 1), 1)
    if settings.decay == "step":
        return warm * (1.0 if done < settings.step_at else settings.step_to)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)

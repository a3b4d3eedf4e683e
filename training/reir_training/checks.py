"""What `reir train` refuses before anything is loaded: workers and stages that do not fit."""

from __future__ import annotations

from pathlib import Path

from reir.errors import ConfigError
from reir_training.config import Schedule

RERANK = "rerank"
NumWorkers = int | tuple[int, int]
"""Ray Train workers: so many, or as many as there is room for from the first to the second."""


def check_stage(preset: str, stage: str, init: Path | None) -> None:
    """Refuse to train a re-ranker of a model that has none, or of no trained model.

    Raises:
        ConfigError: see above.
    """
    if stage == RERANK and preset != "clare-nano":
        raise ConfigError(f"stage {RERANK!r} is for clare-nano, not for {preset!r}")
    if stage == RERANK and init is None:
        raise ConfigError(f"stage {RERANK!r} needs --init: the checkpoint whose hits are re-ranked")


def parse_num_workers(text: str) -> NumWorkers:
    """Read "4", or "2:8" for two to eight.

    Raises:
        ConfigError: it is neither.
    """
    parts = text.split(":")
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(numbers) == len(parts) == 1 and numbers[0] > 0:
        return numbers[0]
    if len(numbers) == len(parts) == 2 and 0 < numbers[0] <= numbers[1]:
        return numbers[0], numbers[1]
    raise ConfigError(f"num_workers={text!r} must be a number such as 4, or a range such as 2:8")


def shares_evenly(settings: Schedule, num_workers: int) -> bool:
    """Whether so many workers can share the photos of a step."""
    return settings.photos_per_batch % (num_workers * settings.accumulate_steps) == 0


def check_shares(settings: Schedule, num_workers: NumWorkers) -> None:
    """Refuse a number of workers, or a range, that cannot share the photos of a step.

    Raises:
        ConfigError: see above.
    """
    fewest, most = (num_workers,) * 2 if isinstance(num_workers, int) else num_workers
    if not any(shares_evenly(settings, n) for n in range(fewest, most + 1)):
        workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise ConfigError(
            f"photos_per_batch={settings.photos_per_batch} cannot be shared by {workers} workers "
            f"with accumulate_steps={settings.accumulate_steps}; take a multiple of their product"
        )

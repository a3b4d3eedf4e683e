"""Which task a preset trains, and how its photos are shared: known here alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reir.errors import ConfigError
from reir_training.clare_task import ClareTask, Stream, load_here
from reir_training.config import ClareTrainConfig, CommonConfig, Schedule, TrainConfig
from reir_training.examples import TrainPhoto
from reir_training.leakage import training_photos
from reir_training.nano_task import NanoTask
from reir_training.rerank_task import RerankTask

AnyTask = NanoTask | ClareTask | RerankTask
RERANK = "rerank"
NumWorkers = int | tuple[int, int]
"""Ray Train workers: so many, or as many as there is room for from the first to the second."""


def make_task(  # noqa: PLR0913 - one by one is clearer than a bag
    preset: str,
    config: CommonConfig,
    *,
    stage: str,
    init: Path | None,
    cache: Path | None = None,
    photos: Sequence[TrainPhoto] | None = None,
    rank: int = 0,
    world_size: int = 1,
    stream: Stream = load_here,
) -> AnyTask:
    """Return what one worker trains.

    Args:
        preset: name of the model; `config` is of its kind.
        config: of the run.
        stage: of the run; "rerank" trains another model than the others.
        init: checkpoint directory to start from.
        cache: folder of the frozen part's output; for `clare-nano` only.
        photos: of `clare-nano`, in the order of the cache; None for all of the run's.
        rank, world_size: of this worker.
        stream: loads steps of the published CLARE ahead.
    """
    if isinstance(config, TrainConfig):
        assert cache is not None
        known = training_photos(config) if photos is None else photos
        if stage == RERANK:
            assert init is not None
            return RerankTask(
                config, known, cache=cache, init=init, rank=rank, world_size=world_size
            )
        return NanoTask(config, known, cache=cache, init=init, rank=rank, world_size=world_size)
    assert isinstance(config, ClareTrainConfig)
    return ClareTask(preset, config, init=init, rank=rank, world_size=world_size, stream=stream)


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

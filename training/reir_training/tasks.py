"""Which task a preset trains: known here alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reir_training.checks import RERANK
from reir_training.clare_task import ClareTask, Stream, load_here
from reir_training.config import ClareTrainConfig, CommonConfig, TrainConfig
from reir_training.examples import TrainPhoto
from reir_training.leakage import training_photos
from reir_training.nano_task import NanoTask
from reir_training.rerank_task import RerankTask

AnyTask = NanoTask | ClareTask | RerankTask


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
        cache: for `clare-nano`, folder with the output of its frozen part; for the published
            CLARE, folder in which workers share the annotations, or None to keep them in memory.
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
    return ClareTask(
        preset,
        config,
        init=init,
        rank=rank,
        world_size=world_size,
        cache=cache,
        stream=stream,
    )

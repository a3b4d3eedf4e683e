"""Builds the task of a preset and stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reir_training.candidates.task import CandidateTask
from reir_training.clare.task import ClareTask
from reir_training.colors.task import ColorTask
from reir_training.config import (
    ClareTrainConfig,
    NanoTrainConfig,
    PizaTrainConfig,
    TrainConfig,
)
from reir_training.crops.task import CropTask
from reir_training.data.examples import TrainPhoto
from reir_training.data.leakage import training_photos
from reir_training.masks.task import MaskTask
from reir_training.nano.task import NanoTask
from reir_training.piza.task import PizaTask
from reir_training.query_zoom.task import ZoomTask
from reir_training.rerank.task import RerankTask
from reir_training.run.schedule import (
    ADDED_PARTS,
    CANDIDATES,
    COLORS,
    CROPS,
    MASKS,
    QUERY_ZOOM,
    RERANK,
)
from reir_training.run.step_stream import Stream, load_in_process
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.task import WeakTask

PartTask = RerankTask | MaskTask | ZoomTask | ColorTask | CandidateTask | CropTask
AnyTask = NanoTask | ClareTask | PizaTask | WeakTask | PartTask
PARTS: Mapping[str, type[PartTask]] = {
    RERANK: RerankTask,
    MASKS: MaskTask,
    QUERY_ZOOM: ZoomTask,
    COLORS: ColorTask,
    CANDIDATES: CandidateTask,
    CROPS: CropTask,
}


def make_task(  # noqa: PLR0913 - most are keyword-only
    preset: str,
    config: TrainConfig,
    *,
    stage: str,
    init: Path | None,
    cache: Path | None = None,
    photos: Sequence[TrainPhoto] | None = None,
    rank: int = 0,
    world_size: int = 1,
    stream: Stream = load_in_process,
) -> AnyTask:
    """Build the task of one worker.

    Args:
        preset: name of the model; `config` must be of its class.
        config: settings of the run.
        stage: stage of the run; those of `ADDED_PARTS` train another part than the model
            itself.
        init: checkpoint directory to start from; `piza` starts from its base.
        cache: for `clare-nano` and for anchors from it, folder with the output of its frozen part;
            for other models, folder in which workers share the annotations, or None to keep them in
            memory.
        photos: for `clare-nano`, photos in the order of the cache; None for all photos of the run.
        rank, world_size: rank of this worker, and number of workers.
        stream: loads the steps, possibly ahead of time. `clare-nano` reads its steps from the cache
            instead.
    """
    if isinstance(config, NanoTrainConfig):
        # The driver builds the cache before it starts the workers, and so does a dry run.
        assert cache is not None
        known = training_photos(config, masks=stage == MASKS) if photos is None else photos
        if stage in ADDED_PARTS:
            assert init is not None
            return PARTS[stage](
                config, known, cache=cache, init=init, rank=rank, world_size=world_size
            )
        return NanoTask(config, known, cache=cache, init=init, rank=rank, world_size=world_size)
    if isinstance(config, PizaTrainConfig):
        return PizaTask(config, rank=rank, world_size=world_size, cache=cache, stream=stream)
    if isinstance(config, WeakTrainConfig):
        return WeakTask(
            config, init=init, cache=cache, rank=rank, world_size=world_size, stream=stream
        )
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

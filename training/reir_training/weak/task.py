"""The training task of the weakly supervised model: model, batches, validation and checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reir.images.decode import read_image
from reir.losses import pairwise_iou
from reir.models.nano.model import CandidateBatch
from reir.models.weak_rec.anchors import CandidateAnchors
from reir.models.weak_rec.cells import load_squares
from reir.models.weak_rec.checkpoint import save_weak_rec
from reir.models.weak_rec.model import WeakRec
from reir.models.weak_rec.phrases import PhraseLanguage
from reir_training.nano.cache import FrozenCache
from reir_training.report.model_card import write_weak_card
from reir_training.run.collectives import WorkerCollectives
from reir_training.run.schedule import Epoch, Stage
from reir_training.run.step_stream import Load, StepStream, Stream, load_in_process, load_share
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.data import (
    KnownSentence,
    PhotoInputs,
    WeakBatch,
    WeakData,
    read_weak_photos,
)
from reir_training.weak.objective import WeakObjective
from reir_training.weak.start import start_weak_rec

FIT_PHOTOS = 1000
"""Photos from whose candidates the mean and the deviation of each feature are computed."""
VALIDATION_BATCH = 64


class WeakTask:
    """Trains a `WeakRec` on photos and sentences.

    Args:
        config: settings of the run.
        init: checkpoint of the `clare-nano` with the frozen parts; None for published weights.
        cache: folder of the complete `FrozenCache` of the photos, if the anchors are candidates of
            `clare-nano`; else it is not used.
        rank, world_size: rank of this worker, and number of workers.
        stream: loads the steps, possibly ahead of time; cached photos need none.

    Raises:
        ConfigError: a setting is missing.
        DataError: the data cannot be read, has no sentences, or contains photos of an evaluation
            set.
        CheckpointError: the weights of a part are missing or do not fit.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: WeakTrainConfig,
        *,
        init: Path | None,
        cache: Path | None,
        rank: int = 0,
        world_size: int = 1,
        stream: Stream = load_in_process,
    ) -> None:
        settings = config.optimization
        photos = read_weak_photos(config)
        self._config, self._photos = config, photos
        self._place = (rank, world_size, settings.accumulate_steps)
        self.known = photos.known()
        """The sentences to validate with."""
        self.model = start_weak_rec(config, init)
        # The frozen text tower of a `PhraseLanguage` runs once here, and not again in each step.
        loaded = self.model.language.load(photos.sentences)
        self.inputs: PhotoInputs
        """Loads photos."""
        if config.model.anchors == "candidates":
            # The driver builds the cache before it starts the workers.
            assert cache is not None
            self.inputs, stream = CachedCandidates(cache), load_in_process
        else:
            self.inputs = PhotoFiles([each.path for each in photos.files])
        self._fit(loaded)
        self._stream = StepStream(stream, settings.accumulate_steps)
        self._batches = WeakData(
            photos.train,
            self.inputs,
            loaded,
            sentences_per_item=config.sentences_per_item,
            batch_size=settings.photos_per_batch,
            seed=settings.seed,
        )
        workers = WorkerCollectives() if world_size > 1 else None
        self.objective = WeakObjective(self.model, config.loss, workers=workers)

    @property
    def photos_per_step(self) -> int:
        """Items per step, over all workers."""
        return self._config.optimization.photos_per_batch

    def groups(self) -> list[dict[str, Any]]:
        """Return the only parameter group: everything that is trained."""
        settings = self._config.optimization
        return [
            {
                "params": [p for p in self.objective.parameters() if p.requires_grad],
                "lr": settings.learning_rate,
                "base_lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
            }
        ]

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - there is one stage
        """Return the number of steps per epoch, in which every item is used once."""
        return self._batches.sampler.steps_per_epoch

    def batches(self, epoch: Epoch, first: int) -> Iterator[WeakBatch]:
        """Yield this worker's batches from step `first` of the epoch on, one per part of a step."""
        for arrays in self._stream.epoch(epoch, self.steps(epoch.stage), first, self._loader):
            yield WeakBatch.from_arrays(arrays)

    def validate(self) -> dict[str, float]:
        """Localize the held-out sentences whose box is known; see `localization_accuracy`."""
        was_training = self.model.training
        self.model.eval()
        try:
            return localization_accuracy(self.model, self.known, self.inputs)
        finally:
            self.model.train(was_training)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory."""
        save_weak_rec(folder, self.model, about)
        write_weak_card(folder, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        return {
            "preset": "weak-rec",
            "photos": len(self._photos.train),
            "items": len(self._batches.items),
            "expressions": len(self._photos.sentences),
            "held_out_photos": len(self._photos.held_out),
        }

    def _loader(self, num_parts: int) -> Load:  # noqa: ARG002 - the same for any number
        return partial(load_share, self._batches.load, self._batches.sampler, self._place)

    def _fit(self, loaded: Tensor) -> None:
        """Compute what the model needs to know of the training data as a whole."""
        if isinstance(self.model.language, PhraseLanguage):
            self.model.language.fit(loaded)
        if isinstance(self.model.source, CandidateAnchors):
            rows = range(len(self._photos.train))
            found = self.inputs(rows[:: math.ceil(len(rows) / FIT_PHOTOS)])
            self.model.source.fit(CandidateBatch(**found))


class CachedCandidates:
    """The cached candidates of photos.

    Args:
        folder: of the complete `FrozenCache` of the photos.
    """

    def __init__(self, folder: Path) -> None:
        self._cache = FrozenCache(folder)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the fields of the `CandidateBatch` of some photos."""
        return self._cache.batch(rows).tensors()


class PhotoFiles:
    """Reads photos from their files. It is copied to other processes, and so holds no weights.

    Args:
        paths: of all photos.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Read some photos and resize them to squares with padding, as `load_squares` does.

        Raises:
            ImageError: a photo cannot be decoded.
        """
        return load_squares([read_image(self._paths[row]) for row in rows])


@torch.no_grad()
def localization_accuracy(
    model: WeakRec, sentences: Sequence[KnownSentence], inputs: PhotoInputs
) -> dict[str, float]:
    """Return the share of sentences whose best box has an IoU above .5.

    This is the published accuracy (docs/weak-rec.md, section 6).

    Args:
        model: in eval mode.
        sentences: with their true boxes.
        inputs: loads the photos.

    Returns:
        Percentages: p50 of all sentences, and p50_long and p50_short of those of that kind. Empty
        without sentences.
    """
    hits: dict[str, list[bool]] = {}
    device = next(model.parameters()).device
    for start in range(0, len(sentences), VALIDATION_BATCH):
        some = sentences[start : start + VALIDATION_BATCH]
        loaded = model.language.load([each.text for each in some]).to(device)
        found = {k: v.to(device) for k, v in inputs([each.photo for each in some]).items()}
        anchors = model.anchors(found)
        best_B = model.score(anchors, loaded).argmax(1)
        boxes = anchors.answers()[torch.arange(len(some)), best_B].cpu()
        overlap = pairwise_iou(boxes, torch.from_numpy(np.stack([s.box for s in some]))).diagonal()
        for each, iou in zip(some, overlap.tolist(), strict=True):
            # Strictly above, as in the released evaluation.
            for name in ("p50", f"p50_{each.kind}"):
                hits.setdefault(name, []).append(iou > 0.5)
    return {name: round(100 * float(np.mean(each)), 2) for name, each in hits.items()}

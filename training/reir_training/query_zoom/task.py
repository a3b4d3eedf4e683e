"""The training task of the zoom policy of a frozen `clare-nano`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.checkpoint import load_encoder, save_zoom_policy
from reir.models.query_zoom.policy import ZoomPolicy, ZoomPolicyConfig
from reir_training.config import NanoTrainConfig
from reir_training.data.examples import TrainPhoto, count_annotations, split_held_out
from reir_training.query_zoom.data import Example, ZoomBatch, ZoomExamples
from reir_training.query_zoom.looks import ZoomMosaics, build_look_cache
from reir_training.report.model_card import write_query_zoom_card
from reir_training.run.row_task import RowTask, copy_checkpoint
from reir_training.run.schedule import Stage, check_fills_batch


class ZoomObjective(nn.Module):
    """The zoom policy and its losses."""

    def __init__(self, model: ZoomPolicy) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ZoomBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the loss and its terms by name."""
        out = self.model(batch.features, batch.paths, batch.valid)
        closer = batch.closer
        terms = {
            "found": F.binary_cross_entropy_with_logits(out.found, batch.found.float()),
            # The sum is 0 if no look of the step can be followed by a closer one.
            "contains": F.binary_cross_entropy_with_logits(
                out.contains[closer], batch.contains[closer].float()
            )
            if closer.any()
            else out.contains[closer].sum(),
        }
        return torch.stack([*terms.values()]).sum(), {k: v.item() for k, v in terms.items()}


def mosaics_of(
    config: NanoTrainConfig, photos: Sequence[TrainPhoto]
) -> tuple[ZoomMosaics, ZoomMosaics | None]:
    """Return the mosaics to train on, and those of the held-out photos, if there are any.

    Raises:
        ConfigError: there are too few training photos for a mosaic, or too few held-out photos,
            unless there are none; or the mosaics have too few targets for a batch.
    """
    train, held_out = split_held_out(photos)
    settings, seed = config.query_zoom, config.optimization.seed
    mosaics = ZoomMosaics(train, settings.num_mosaics, seed)
    # Before looks are encoded, which takes long.
    check_fills_batch(config.optimization, len(mosaics.targets), ZoomTask.rows_are)
    return mosaics, ZoomMosaics(held_out, settings.num_held_out, seed) if held_out else None


def build_zoom_cache(
    config: NanoTrainConfig,
    photos: Sequence[TrainPhoto],
    *,
    root: Path,
    init: Path,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Encode all looks of a run that are not encoded yet.

    Args:
        config: settings of the run.
        photos: photos of the run.
        root: folder of the caches.
        init: checkpoint directory of the encoder.
        on_progress: called with the number of finished mosaics of each of the two sets.
    """
    encoder = load_encoder(init)
    for mosaics in mosaics_of(config, photos):
        if mosaics is not None:
            build_look_cache(root, encoder, mosaics, on_progress)


class ZoomTask(RowTask[ZoomBatch]):
    """Trains a zoom policy on mosaics of the training photos.

    Args:
        config: settings of the run.
        photos: photos of the run; those of split "val" are only validated on.
        cache: folder of the caches of looks; looks that are missing are encoded.
        init: checkpoint directory of the encoder.
        rank, world_size: rank of this worker, and number of workers.
    """

    rows_are = "long expressions in mosaics"

    def __init__(  # noqa: PLR0913 - most are keyword-only
        self,
        config: NanoTrainConfig,
        photos: Sequence[TrainPhoto],
        *,
        cache: Path,
        init: Path,
        rank: int,
        world_size: int,
    ) -> None:
        self._photos, self._init = photos, init
        encoder, settings = load_encoder(init), config.query_zoom
        self.digest = encoder.digest
        self._mosaics, held_out = mosaics_of(config, photos)
        self._held_out: list[list[Example]] = []

        def examples_of(mosaics: ZoomMosaics) -> ZoomExamples:
            vectors = encoder.encode_expressions([each.text for each in mosaics.targets])
            folder = build_look_cache(cache, encoder, mosaics)
            return ZoomExamples(mosaics, vectors, folder, settings)

        if held_out is not None:
            examples = examples_of(held_out)
            self._held_out = [examples.of_target(row) for row in range(len(held_out.targets))]
        torch.manual_seed(config.optimization.seed)
        self.model = ZoomPolicy(
            ZoomPolicyConfig(hidden=settings.hidden, max_looks=settings.max_looks)
        )
        super().__init__(
            config,
            ZoomObjective(self.model),
            maker=examples_of(self._mosaics),
            rows=np.arange(len(self._mosaics.targets)),
            rank=rank,
            world_size=world_size,
        )

    def validate(self) -> dict[str, float]:
        """Return how often the best candidate of all looks is the described instance (percent).

        `score_p50` is for the candidate with the best score, `policy_p50` for the one that the
        policy finds most probable.
        """
        if not self._held_out:
            return {}
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            pairs = [self._best(examples) for examples in self._held_out]
        self.model.train(was_training)
        by_score, by_policy = np.mean(pairs, axis=0).tolist()
        return {"score_p50": round(100 * by_score, 2), "policy_p50": round(100 * by_policy, 2)}

    def _best(self, examples: Sequence[Example]) -> tuple[bool, bool]:
        """Whether the candidate with the best score is right, and the most probable one."""
        device = next(self.model.parameters()).device
        found = np.concatenate([each.found for each in examples])
        scores = np.concatenate([each.scores for each in examples])
        read = (
            np.concatenate([getattr(each.read, name) for each in examples])
            for name in ("features", "paths", "valid")
        )
        out = self.model(*(torch.from_numpy(values).to(device) for values in read))
        return bool(found[scores.argmax()]), bool(found[int(out.found.argmax())])

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write a copy of the checkpoint directory with this policy added."""
        copy_checkpoint(self._init, folder)
        save_zoom_policy(folder, self.model, self.digest, about)
        write_query_zoom_card(folder, self._init, about)

    def about(self) -> dict[str, Any]:
        """Return metadata for the checkpoint: the size of the training data."""
        return count_annotations(*split_held_out(self._photos)) | {
            "mosaics": len(self._mosaics.mosaics),
            "targets": len(self._mosaics.targets),
        }

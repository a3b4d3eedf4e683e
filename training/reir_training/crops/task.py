"""The training task of `clare-nano` together with the coarse part of its crop network."""

# Shapes: B photos, K candidates, N crops, S scene tokens, C channels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.images.decode import read_image
from reir.models.nano.candidates import CropFeatures, SceneFeatures, pad_and_stack
from reir.models.nano.crop_network import CropNetwork
from reir.models.nano.model import CandidateBatch, ClareNanoConfig, mirror_scene
from reir_training.crops.data import CropBatch, changed_pixels, plain_pixels
from reir_training.data.examples import TrainPhoto
from reir_training.nano.cache import FrozenCache
from reir_training.nano.objective import NanoObjective
from reir_training.nano.task import NanoTask
from reir_training.run.schedule import Stage

PIXELS = 4
"""The part of a seed for random changes of pixels; `reir_training.nano.batches` has the others."""


class CropNetworkCache(FrozenCache):
    """A frozen cache whose crop features come from the present weights of a crop network.

    Args:
        folder: of the complete `FrozenCache`.
        photos: its photos.
        network: crop network in training; features are computed when a photo is first asked for.
        config: of the model.
    """

    def __init__(
        self,
        folder: Path,
        photos: Sequence[TrainPhoto],
        network: CropNetwork,
        config: ClareNanoConfig,
    ) -> None:
        super().__init__(folder)
        self._photos, self._config = photos, config
        self._crop_features, self._scene_features = CropFeatures(network), SceneFeatures(network)
        self._device = next(network.parameters()).device
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, rows: Sequence[int]) -> CandidateBatch:
        """Return the candidates of some photos, in float32."""
        cached = super().batch(rows)
        for i, row in enumerate(rows):
            if row not in self._known:
                self._known[row] = self._encode(row)
            crops, scene = self._known[row]
            cached.crops[i, : len(crops)], cached.scene[i] = crops, scene
        return cached

    @torch.no_grad()
    def _encode(self, row: int) -> tuple[Tensor, Tensor]:
        """Return (K', C) features of the candidates of a photo, and (S, C) of the whole photo."""
        photo = read_image(self._photos[row].path)
        crops, scene = plain_pixels(photo, self.boxes(row), self._config)
        # Padded, because on a GPU, cuDNN prepares each new number of crops.
        padded = pad_and_stack([crops], len(self._arrays["valid"][row]))[0]
        found = self._crop_features(padded.to(self._device))[: len(crops)]
        whole = self._scene_features(scene[None].to(self._device))[0]
        return found.float().cpu(), whole.float().cpu()


class CropObjective(nn.Module):
    """The objective of `clare-nano`, on features of a crop network that is trained with it.

    Args:
        objective: of the streams.
        teacher_weight: weight of the loss that keeps the features of crops like the cached ones.
        half: run the crop network under bf16 autocast.
    """

    def __init__(self, objective: NanoObjective, teacher_weight: float, *, half: bool) -> None:
        super().__init__()
        self.objective = objective
        for part in objective.model.crop_network.coarse_parts():
            part.requires_grad_(True)
        self._teacher_weight, self._half = teacher_weight, half

    def forward(self, batch: CropBatch, stage: Stage) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        """Return the weighted loss and its unweighted terms by name, over all workers."""
        step = batch.step
        valid = step.candidates.valid[: step.num_photos]
        network = self.objective.model.crop_network
        with torch.autocast(valid.device.type, torch.bfloat16, enabled=self._half):
            # With padding, for the same reason as in `CropNetworkCache`.
            found: Tensor = CropFeatures(network)(batch.crops.flatten(0, 1))
            scene = SceneFeatures(network)(batch.scenes).float()
        crops = found.float().view(*valid.shape, -1) * valid[..., None]
        taught = step.candidates.crops[: step.num_photos]
        halves = [mirror_scene(scene), scene] if step.mirrored else [scene, mirror_scene(scene)]
        seen = replace(step.candidates, crops=torch.cat([crops, crops]), scene=torch.cat(halves))
        loss, terms = self.objective(replace(step, candidates=seen), "clia")
        teacher = teacher_loss(crops, taught, valid)
        return loss + self._teacher_weight * teacher, terms | {"teacher": teacher.item()}


def teacher_loss(found_BKC: Tensor, taught_BKC: Tensor, valid_BK: Tensor) -> Tensor:
    """Return the mean of 1 - the correlation of the channels of two feature vectors.

    The streams normalize features, so that their mean and their size are free.
    """
    shape = found_BKC.shape[-1:]
    same = F.layer_norm(found_BKC, shape) * F.layer_norm(taught_BKC, shape)
    return ((1 - same.mean(-1)) * valid_BK).sum() / valid_BK.sum().clamp(min=1)


class CropTask(NanoTask):
    """Trains the streams of a `clare-nano` together with the coarse part of its crop network.

    Args:
        config: settings of the run.
        photos: training photos and held-out photos.
        cache: folder of the complete `FrozenCache` of these photos for the checkpoint `init`.
        init: checkpoint directory to start from.
        rank, world_size: rank of this worker, and number of workers.
    """

    def _module_to_train(self, streams: NanoObjective) -> nn.Module:
        settings = self._config.crops
        self.model.config = replace(self.model.config, crop_px=settings.crop_px)
        return CropObjective(streams, settings.teacher_weight, half=self._half)

    def _batch(self, rows: Sequence[int], seed: Sequence[int]) -> CropBatch:
        step = super()._batch(rows, seed)
        pixels = [self._pixels(row, seed) for row in rows]
        crops = pad_and_stack([of_photo for of_photo, _ in pixels], step.candidates.valid.shape[1])
        return CropBatch(step, crops, torch.stack([scene for _, scene in pixels]))

    def _pixels(self, row: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the changed pixels of a photo, which do not depend on the others of the step."""
        rng = np.random.default_rng([*seed, PIXELS, row])
        photo = read_image(self._photos[row].path)
        return changed_pixels(photo, self._cache.boxes(row), self.model.config, rng)

    def validate(self) -> dict[str, float]:
        """Evaluate the current weights on the held-out photos."""
        self._cache = self._present_cache()
        return super().validate()

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the checkpoint directory, including the background and the model card."""
        self._cache = self._present_cache()
        super().save(folder, about)

    def _present_cache(self) -> FrozenCache:
        """Return the cache for the present weights of the crop network."""
        network = self.model.crop_network
        return CropNetworkCache(self._cache.folder, self._photos, network, self.model.config)

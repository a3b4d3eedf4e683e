"""Tiny training tasks of all models, on generated scenes and on random candidates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from reir.datasets.coco_classes import COCO_CLASSES
from reir_testing.piza.large_scenes import make_large_scenes, save_large_scenes
from reir_testing.pretrained import save_tiny_grounding_dino
from reir_testing.scenes import make_scenes, save_scenes
from reir_testing.tiny import tiny_batch, tiny_model, tiny_tokenizer
from reir_testing.tiny_clare import tiny_clare_config
from reir_testing.training.tiny_weak import (
    NO_DROPOUT,
    WeakForm,
    tiny_weak_settings,
    tiny_weak_task,
)
from reir_training.clare.task import ClareTask
from reir_training.config import (
    ClareTrainConfig,
    NanoLossWeights,
    NanoModelSettings,
    NanoTrainConfig,
    PizaTrainConfig,
)
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.nano.batches import BatchMaker, NanoBatch
from reir_training.nano.cache import FrozenCache
from reir_training.nano.initialization import freeze, parameter_groups
from reir_training.nano.objective import NanoObjective
from reir_training.piza.task import PizaTask
from reir_training.run.collectives import WorkerCollectives
from reir_training.run.schedule import Epoch, Stage
from reir_training.weak.config import WeakTrainConfig

ModelName = Literal["clare", "clare-nano", "piza"] | WeakForm
PHOTOS_PER_STEP = 4
NUM_NANO_PHOTOS, NUM_CANDIDATES = 9, 5
WORDS = ("dog", "cat", "man", "red car")


def write_scenes(folder: Path, *, train: int = 12, val: int = 4) -> None:
    """Write scenes as a folder of the format "photos", with shapes named after COCO classes.

    The names make the scenes usable for detection, which only uses COCO's classes.
    """
    save_scenes(folder, {"train": make_scenes(train, 0, 96), "val": make_scenes(val, 1, 96)})
    path = folder / "instances.json"
    document = json.loads(path.read_text())
    for number, category in enumerate(document["categories"]):
        category["name"] = COCO_CLASSES[number]
    path.write_text(json.dumps(document))


def tiny_clare_settings(photos: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of `reir train --preset clare-base` for a model with very short steps.

    Args:
        photos: folder that `write_scenes` wrote.
        changes: changes to the schedule.
    """
    shape = vars(tiny_clare_config(max_tokens=16))
    own = {"vocabulary", "clia_bias", "paper_parity"}
    return {
        "data": [{"format": "photos", "path": str(photos)}],
        "shape": {name: value for name, value in shape.items() if name not in own},
        "texts_per_photo": 2,
        "augmentation": {
            "short_sides": [64, 80, 96],
            "long_side": 128,
            "crop_short_sides": [96],
            "crop_sides": [64, 96],
        },
        "optimization": {"photos_per_batch": PHOTOS_PER_STEP, "precision": "fp32", **changes},
    }


def tiny_piza_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of `reir train --preset piza` with very short steps.

    Args:
        folder: folder for a tiny base and large scenes of 256 px; missing files are written.
        changes: changes to the schedule.
    """
    if not (folder / "base").exists():
        save_tiny_grounding_dino(folder / "base", mm=True)
        scenes = make_large_scenes(3, 0, 256)
        save_large_scenes(folder / "large", {"train": scenes[:2], "val": scenes[2:]})
    return {
        "base": str(folder / "base"),
        "data": [
            {
                "format": "sorec",
                "path": str(folder / "large"),
                "images": "photos",
                "annotations": "train.json",
                "held_out": 1,
            }
        ],
        "rank": 4,
        "history": {"steps": 3, "batch": 4, "searches": {"least_side_px": 16}},
        "augmentation": {
            "short_sides": [64, 72],
            "long_side": 96,
            "crop_short_sides": [96],
            "crop_sides": [64, 96],
            "mirror_probability": 0,
        },
        "optimization": {"photos_per_batch": PHOTOS_PER_STEP, **changes},
    }


class TinyNanoTask:
    """`NanoTask` on random candidates instead of a cache of published networks.

    Args:
        folder: folder of the cache, which is created if it does not exist.
        rank, world_size: rank of this worker, and number of workers.
    """

    photos_per_step = PHOTOS_PER_STEP

    def __init__(self, folder: Path, *, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self.config = NanoTrainConfig.model_validate(
            {
                "data": [{"format": "photos", "path": str(folder)}],
                "weights": str(folder),
                "optimization": {"photos_per_batch": PHOTOS_PER_STEP, "precision": "fp32"},
            }
        )
        if not folder.exists():
            _write_cache(folder)
        cache = FrozenCache(folder)
        photos = [_nano_photo(cache, row) for row in range(NUM_NANO_PHOTOS)]
        self._maker = BatchMaker(photos, cache, self.config.optimization)
        self.model = tiny_model()
        freeze(self.model, NanoModelSettings(frozen_text_layers=0))
        self.objective = NanoObjective(
            self.model,
            tiny_tokenizer(),
            NanoLossWeights(),
            workers=WorkerCollectives() if world_size > 1 else None,
        )

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups."""
        return parameter_groups(self.objective, self.config.optimization)

    def steps(self, stage: Stage) -> int:  # noqa: ARG002 - the same for both stages
        """Return the number of steps per epoch."""
        return NUM_NANO_PHOTOS // PHOTOS_PER_STEP

    def batches(self, epoch: Epoch, first: int) -> Iterator[NanoBatch]:
        """Yield this worker's batches from step `first` on."""
        rows = self._maker.epoch(epoch.number, self._rank, self._world_size)
        for i in range(first, len(rows)):
            yield self._maker.batch(rows[i], [0, epoch.number, i])


def _write_cache(folder: Path) -> None:
    """Write random candidates of a few photos.

    Some photos have fewer candidates than others, so that there is padding.
    """
    folder.mkdir(parents=True)
    batch = tiny_batch(NUM_NANO_PHOTOS, NUM_CANDIDATES)
    batch.valid[::2, -1] = False
    for name, value in batch.tensors().items():
        np.save(folder / f"{name}.npy", value.numpy())


def _nano_photo(cache: FrozenCache, row: int) -> TrainPhoto:
    """Return a photo; the numbers of boxes, expressions and captions differ between photos."""
    # Workers then have different numbers of everything, which is where a mean over workers and a
    # mean over all photos would differ.
    boxes = cache.boxes(row)[: 1 + row % 3]
    texts = ("the red dog", "a blue car", "man left of the cat")
    kinds = ("long", "short", "long")
    return TrainPhoto(
        path=Path(f"{row}.jpg"),
        split="train",
        boxes=boxes.astype(np.float32),
        categories=np.arange(len(boxes)) - row % 2,
        names=("dog", "car", "man")[: len(boxes)],
        expressions=tuple(TrainExpression(texts[i], i, kinds[i]) for i in range(len(boxes))),
        captions=() if row % 3 == 2 else (f"a {WORDS[row % len(WORDS)]} in the car",),
        near_misses=("a man of the cat in the red car",) if row % 2 else (),
    )


def tiny_task(folder: Path, model: ModelName, rank: int, world_size: int) -> Any:
    """Return a `TrainTask` with `config` and `groups`, and with perturbed initial weights.

    Initial weights of zero would hide differences between workers.

    Args:
        folder: folder for photos and caches; missing files are written.
        model: which model to train.
        rank, world_size: rank of this worker, and number of workers.
    """
    task: Any
    if model == "clare-nano":
        task = TinyNanoTask(folder / "nano", rank=rank, world_size=world_size)
    elif model == "piza":
        piza = PizaTrainConfig.model_validate(tiny_piza_settings(folder / "piza"))
        task = PizaTask(piza, rank=rank, world_size=world_size)
        task.config = piza
    elif model == "weak-candidates" or model == "weak-yolov3":
        settings = tiny_weak_settings(folder / "weak", model)
        settings["model"] = settings["model"] | NO_DROPOUT
        task = tiny_weak_task(folder / "weak", settings, rank=rank, world_size=world_size)
        task.config = WeakTrainConfig.model_validate(settings)
    else:
        if not (folder / "scenes").exists():
            write_scenes(folder / "scenes")
        settings = tiny_clare_settings(
            folder / "scenes", steps_per_epoch=3, save_every_steps=2, log_every_steps=1
        )
        config = ClareTrainConfig.model_validate(settings)
        task = ClareTask("clare-base", config, init=None, rank=rank, world_size=world_size)
        task.config = config
    _no_dropout(task.objective)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in task.objective.named_parameters():
            # Without biases, a random base would have no features at all where a picture is padded,
            # and norms would multiply gradients there by a million.
            if model == "piza" or not any(word in name for word in ("scale", "bias")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return task


def _no_dropout(module: nn.Module) -> None:
    """Turn dropout off, because it depends on the rank by design."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        # Modules of `transformers` and of torch also keep a probability as a number of their own.
        for name in ("dropout", "activation_dropout", "attention_dropout", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)

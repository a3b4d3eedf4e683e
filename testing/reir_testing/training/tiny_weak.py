"""Tiny trainings of the weakly supervised model, in its shipped and in its published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from reir.checkpoint import save_checkpoint
from reir.models.weak_rec.vocabulary import split_words
from reir_testing.scenes import make_scenes, save_scenes
from reir_testing.tiny import tiny_tokenizer
from reir_testing.weak.tiny import lively_nano, tiny_yolo, write_glove
from reir_training.nano.cache import build_cache
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.data import read_weak_photos
from reir_training.weak.start import start_nano
from reir_training.weak.task import WeakTask

WeakForm = Literal["weak-candidates", "weak-yolov3"]
NUM_TRAIN, NUM_VAL = 5, 2
SCENE_PX = 96
NO_DROPOUT = {"anchor_dropout": 0.0, "text_dropout": 0.0}
CMA = {"sentences_per_item": 3, "loss": {"suppression": 0.1, "equivariance": 0.1}}
MODELS: dict[WeakForm, dict[str, Any]] = {
    "weak-candidates": {"dim": 16, "num_anchors": 4, "class_weight": 1.0},
    "weak-yolov3": {
        "anchors": "yolov3",
        "language": "gru",
        "dim": 16,
        "num_anchors": 17,
        "num_blocks": 1,
        "attention": True,
        "class_weight": 0.0,
    },
}


def tiny_weak_settings(folder: Path, form: WeakForm, **changes: Any) -> dict[str, Any]:
    """Return settings of `reir train --preset weak-rec` with very short steps.

    Args:
        folder: folder for the photos and for random weights of the frozen parts; missing files are
            written.
        form: "weak-candidates" also needs `init_of(folder)`.
        changes: changes to the schedule.
    """
    write_weak_files(folder)
    return {
        "data": [{"format": "photos", "path": str(folder / "photos")}],
        "yolov3": str(folder / "yolov3.safetensors"),
        "word_vectors": str(folder / "glove.txt"),
        "model": MODELS[form],
        **CMA,
        "optimization": {"photos_per_batch": 4, "warmup_steps": 2, **changes},
    }


def init_of(folder: Path) -> Path:
    """Return the checkpoint of a `clare-nano` with frozen parts for candidates."""
    return folder / "nano"


def write_weak_files(folder: Path) -> None:
    """Write scenes, and random weights of a `clare-nano`, of YOLOv3 and of words."""
    if folder.exists():
        return
    scenes = {
        "train": make_scenes(NUM_TRAIN, 0, SCENE_PX),
        "val": make_scenes(NUM_VAL, 1, SCENE_PX),
    }
    save_scenes(folder / "photos", scenes)
    save_checkpoint(init_of(folder), lively_nano(), tiny_tokenizer(), {})
    save_file(tiny_yolo().state_dict(), folder / "yolov3.safetensors")
    document = json.loads((folder / "photos" / "expressions.json").read_text())
    texts = [entry["expression"] for entry in document["expressions"]]
    write_glove(folder / "glove.txt", sorted({w for text in texts for w in split_words(text)}))


def tiny_weak_task(
    folder: Path, settings: dict[str, Any], *, rank: int = 0, world_size: int = 1
) -> WeakTask:
    """Return the task of one worker, after running the frozen part on the photos.

    Args:
        folder: that of `tiny_weak_settings`.
        settings: of the run.
        rank, world_size: rank of the worker, and number of workers.
    """
    config, init = WeakTrainConfig.model_validate(settings), init_of(folder)
    cache = None
    if config.model.anchors == "candidates":
        nano, _ = start_nano(config, init)
        cache = build_cache(folder / "cache", nano, read_weak_photos(config).files)
    return WeakTask(config, init=init, cache=cache, rank=rank, world_size=world_size)

"""Trains in this process, without Ray and DeepSpeed, for tests of what calls the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reir_training.config import NanoTrainConfig, TrainConfig
from reir_training.data.leakage import training_photos
from reir_training.nano.cache import build_cache
from reir_training.nano.initialization import start_model
from reir_training.run.schedule import plan
from reir_training.run.storage import CHECKPOINT
from reir_training.run.tasks import make_task
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.data import read_weak_photos
from reir_training.weak.start import start_nano


def train_in_process(
    preset: str, config: TrainConfig, *, output: Path, stage: str, init: Path | None, **_: Any
) -> Path:
    """Train as `reir_training.run.driver.run` does, but with a constant learning rate.

    Args:
        preset: "clare-nano" or "weak-rec".
        config: settings of the run.
        output: output folder.
        stage: stage to train.
        init: checkpoint directory to start from.

    Returns:
        The checkpoint directory.
    """
    task = make_task(preset, config, stage=stage, init=init, cache=_cache(config, output, init))
    optimizer = torch.optim.AdamW(task.groups())
    steps = 0
    for epoch in plan(config.optimization, stage):
        task.objective.train()
        for batch in task.batches(epoch, 0):
            loss, _terms = task.objective(batch, epoch.stage)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    about = {"stage": stage, "epoch": 1, "steps": steps, "hours": 0.0, "metrics": task.validate()}
    settings = config.model_dump(mode="json")
    task.save(output / CHECKPOINT, {**task.about(), **about, "settings": settings})
    return output / CHECKPOINT


def _cache(config: TrainConfig, output: Path, init: Path | None) -> Path:
    if isinstance(config, WeakTrainConfig):
        return build_cache(
            output / "cache", start_nano(config, init)[0], read_weak_photos(config).files
        )
    assert isinstance(config, NanoTrainConfig)
    return build_cache(output / "cache", start_model(config, init)[0], training_photos(config))

"""The settings of the two runs of a fine-tune: of the weak model, and of `clare-nano`."""

from __future__ import annotations

import math
from pathlib import Path

from reir.models.weak_rec.model import WeakRecConfig
from reir_training.config import DataSource, NanoModelSettings, NanoSchedule, NanoTrainConfig
from reir_training.weak.config import WeakSchedule, WeakTrainConfig

NUM_ANCHORS = 10
ITEMS_PER_BATCH, WEAK_STEPS, MAX_WEAK_EPOCHS = 64, 300, 40
PHOTOS_PER_BATCH, EPOCHS = 24, 8
TEXT_LAYERS = 6
"""Layers of the text tower, all of which are frozen."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


def weak_settings(data: DataSource, num_sentences: int) -> WeakTrainConfig:
    """Return the settings with which the weak model learns from a few hundred sentences or more.

    Args:
        data: sentences without boxes.
        num_sentences: their number.
    """
    batch = max(2, min(ITEMS_PER_BATCH, num_sentences))
    steps = max(1, num_sentences // batch)
    epochs = min(MAX_WEAK_EPOCHS, math.ceil(WEAK_STEPS / steps))
    return WeakTrainConfig(
        data=(data,),
        # With all 30 anchors, 73% instead of 87% of the boxes of drawn toys were right. On everyday
        # photos, it is the other way around, by a point or two (docs/LOG.md).
        model=WeakRecConfig(num_anchors=NUM_ANCHORS),
        optimization=WeakSchedule(
            grounding_epochs=epochs,
            photos_per_batch=batch,
            # 1e-3 labels drawn toys better, but everyday photos worse than without any training.
            learning_rate=3e-4,
            warmup_steps=_warm_up(epochs * steps),
            ema_decay=0.98,
            max_gradient_norm=1.0,
        ),
    )


def tune_settings(data: DataSource, num_photos: int, epochs: int) -> NanoTrainConfig:
    """Return the settings with which `clare-nano` learns from labels of a few hundred photos.

    Args:
        data: sentences with boxes, of which some photos are held out to choose the share of the
            new weights.
        num_photos: number of photos to train on.
        epochs: number of epochs.
    """
    batch = max(2, min(PHOTOS_PER_BATCH, num_photos))
    return NanoTrainConfig(
        data=(data,),
        weights=Path(),  # those of the checkpoint of the gallery are used
        # If the upper layers learn too, the model learns no more for the same loss of what it knew,
        # and more slowly (docs/LOG.md).
        model=NanoModelSettings(frozen_text_layers=TEXT_LAYERS),
        optimization=NanoSchedule(
            grounding_epochs=0,
            clia_epochs=epochs,
            photos_per_batch=batch,
            learning_rate=3e-4,
            warmup_steps=_warm_up(epochs * num_photos // batch),
            ema_decay=0.98,
            generated_per_photo=0,  # the classes of the objects are not known
        ),
    )


def _warm_up(steps: int) -> int:
    return max(1, round(WARM_UP * steps))

"""The presets: which models can be trained, and the class of the settings of each."""

from __future__ import annotations

from collections.abc import Mapping

from reir_training.config import ClareTrainConfig, NanoTrainConfig, PizaTrainConfig, TrainConfig
from reir_training.weak.config import WeakTrainConfig

PRESETS: Mapping[str, type[TrainConfig]] = {
    "clare-nano": NanoTrainConfig,
    "clare-base": ClareTrainConfig,
    "clare-large": ClareTrainConfig,
    "piza": PizaTrainConfig,
    "weak-rec": WeakTrainConfig,
}

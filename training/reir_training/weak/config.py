"""The settings of a `weak-rec` run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from reir.config import StrictConfig
from reir.models.weak_rec.model import WeakRecConfig
from reir_training.config import Schedule, TrainConfig


class WeakSchedule(Schedule):
    """Schedule of RefCLIP and CMA (docs/weak-rec.md, section 6): 25 epochs of batches of 64.

    Attributes:
        grounding_epochs: in each, every described instance is used once.
        clia_epochs: there is one stage only.
        photos_per_batch: items in an optimizer step: instances, each with a photo and sentences.
    """

    grounding_epochs: int = Field(25, ge=0)
    clia_epochs: int = Field(0, ge=0, le=0)
    photos_per_batch: int = Field(64, ge=2)
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    # Three epochs of RefCOCO.
    warmup_steps: int = Field(1980, ge=1)
    warmup_start: float = Field(1e-3, ge=0, le=1)
    max_gradient_norm: float = Field(0.15, gt=0)
    ema_decay: float = Field(0.9997, ge=0, lt=1)
    precision: Literal["fp32"] = "fp32"


class WeakLossWeights(StrictConfig):
    """The weight of each loss term; 0 turns a term off.

    Attributes:
        contrast: RefCLIP's contrast between the anchors of different photos.
        suppression, equivariance: CMA's false-negative suppression and equivariant regularizer; 0.1
            in CMA.
    """

    contrast: float = Field(1.0, gt=0)
    suppression: float = Field(0.0, ge=0)
    equivariance: float = Field(0.0, ge=0)


class WeakTrainConfig(TrainConfig):
    """The settings of a `weak-rec` run. Boxes in the data only serve to validate.

    Attributes:
        weights: folder of the published weights of `clare-nano`'s parts, for its candidates and its
            text tower; None with `--init`, whose parts are then used.
        yolov3: file with the weights of YOLOv3, for `model.anchors: yolov3`.
        word_vectors: text file of GloVe, for `model.language: gru`.
        cache: folder for the candidates of `clare-nano`; None for `cache` in the output folder.
        model: hyperparameters of the model.
        sentences_per_item: sentences of an item in a step; CMA has 3, RefCLIP 1.
        loss: weights of the loss terms.
    """

    weights: Path | None = None
    yolov3: Path | None = None
    word_vectors: Path | None = None
    cache: Path | None = None
    model: WeakRecConfig = WeakRecConfig()
    sentences_per_item: int = Field(1, ge=1)
    loss: WeakLossWeights = WeakLossWeights()
    optimization: WeakSchedule = WeakSchedule()
    figures: ClassVar[tuple[str, ...]] = ("p50", "p50_long", "p50_short")

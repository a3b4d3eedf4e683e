"""Everything a training run is made of; one YAML file, checked before hours are spent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from reir.clare_losses import ClareLossWeights
from reir.config import StrictConfig
from reir.datasets.formats import Format, SplitBy
from reir_training.augment import Augmentation


class DataSource(StrictConfig):
    """One folder of annotated photos.

    Attributes:
        format: "photos" (instances.json, expressions.json with splits, and where present
            captions.json and sugarcrepe_pairs.json), "coco" (instances, and captions.json where
            present), "reircoco", "refer" (RefCOCO/+/g: instances.json and `refs(<split_by>).p`)
            or "refer_json" (the same, with one JSON file per split).
        path: the folder.
        images: folder of the photos, relative to `path`.
        annotations: file in `path`, for "coco", "reircoco", "refer_json"; empty for instances.json,
            reircoco_train.json and refcoco.json.
        split_by: for "refer" only: "unc" (RefCOCO, RefCOCO+), "umd" or "google" (RefCOCOg).
        split: use only this split of the folder; None uses all.
        task: what the published CLARE learns from this source: "detection" (every box of COCO's
            classes), "grounding" (referring expressions), or "both", as far as it is annotated.
        held_out: number of photos that become the validation split, "val"; every run chooses the
            same ones. Only for a data set without splits, or together with `split`.
    """

    format: Format
    path: Path
    images: str = "images"
    annotations: str = ""
    split_by: SplitBy = "unc"
    split: str | None = None
    task: Literal["both", "detection", "grounding"] = "both"
    held_out: int = Field(0, ge=0)

    @property
    def file(self) -> str:
        """The file in `path` that is read first; empty for a folder in the layout "photos"."""
        usual = {
            "coco": "instances.json",
            "reircoco": "reircoco_train.json",
            "refer": f"refs({self.split_by}).p",
            "refer_json": "refcoco.json",
        }
        return self.annotations or usual.get(self.format, "")

    @property
    def label(self) -> str:
        """How messages name it."""
        file = f"/{self.file}" if self.file and self.format != "coco" else ""
        return f"{self.path}{file}" + (f" [{self.split}]" if self.split else "")


class DataConfig(StrictConfig):
    """What a run is trained on, and what it must not have seen.

    Attributes:
        data: sources; where a source has a split "train", only that is trained on. Photos of a
            split "val" are never trained on and choose nothing.
        evaluation: sets that the model will be measured on; training refuses to start when one of
            their photos is among the training photos.
        exclude_evaluation: leave such photos out of training instead.
    """

    data: tuple[DataSource, ...] = Field(min_length=1)
    evaluation: tuple[DataSource, ...] = ()
    exclude_evaluation: bool = False


class ModelSettings(StrictConfig):
    """The numbers of `clare-nano` that ablations change."""

    num_members: int = Field(2, ge=1, le=8)
    num_layers: int = Field(2, ge=0, le=12)
    crop_px: int = Field(96, ge=32, le=512, multiple_of=32)
    num_experts: int = Field(4, ge=0, le=64)
    clia_bias: float = -10.0
    dropout: float = Field(0.3, ge=0, lt=1)
    frozen_text_layers: int = Field(4, ge=0, le=6)


class LossWeights(StrictConfig):
    """Weight of each part of the loss; 0 turns a part off.

    Attributes:
        ranking, discrimination: within the photo, softmax and focal.
        clia, cross_ranking: across the photos of the batch, sigmoid and softmax (stage 2).
        caption: photo vector against captions (stage 2).
        box: L1 and GIoU.
        category: class of each candidate that fits an annotated box.
    """

    ranking: float = Field(1.0, ge=0)
    discrimination: float = Field(1.0, ge=0)
    clia: float = Field(1.0, ge=0)
    cross_ranking: float = Field(1.0, ge=0)
    caption: float = Field(0.5, ge=0)
    box: float = Field(0.5, ge=0)
    category: float = Field(0.3, ge=0)


class Schedule(StrictConfig):
    """Optimizer and schedule of all stages, for every model.

    Attributes:
        grounding_epochs, clia_epochs: length of stage 1 and stage 2.
        rerank_epochs: length of the stage that trains the relation re-ranker.
        photos_per_batch: batch size of an optimizer step, over all workers.
        accumulate_steps: gradient accumulation: number of parts into which each worker splits its
            share of the batch, to save memory. Photos of different parts are not negatives of one
            another, so a model that contrasts across photos (CLIA) sees fewer negatives.
        learning_rate: learning rate of new layers, after warm-up.
        betas: AdamW's decay rates of the first and second moments.
        warmup_start: fraction of the learning rate at the first step; with 0, the first step has
            1 / `warmup_steps` of it.
        decay: "cosine" to 2 % over each stage, or a "step" to 10 % after four fifths of it.
        ema_decay: decay of the moving average of the weights; 0 turns averaging off.
        save_every_steps: how often to save a state to resume from; also saved after each epoch.
        log_every_steps: how often to write a line to `metrics.jsonl`; also after each epoch.
    """

    grounding_epochs: int = Field(1, ge=0)
    clia_epochs: int = Field(8, ge=0)
    rerank_epochs: int = Field(2, ge=0)
    photos_per_batch: int = Field(48, ge=1)
    accumulate_steps: int = Field(1, ge=1)
    learning_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = Field(50, ge=1)
    warmup_start: float = Field(0.0, ge=0, le=1)
    decay: Literal["cosine", "step"] = "cosine"
    max_gradient_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    save_every_steps: int = Field(200, ge=1)
    log_every_steps: int = Field(10, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0


class Optimisation(Schedule):
    """Schedule of `clare-nano`, and what it draws.

    Attributes:
        text_tower_factor: learning rate of the text tower, relative; 0 freezes it.
        short_weight: weight across photos of short expressions, which are unique only within one.
        generated_per_photo: generated expressions drawn a photo and epoch; 0 turns them off.
    """

    text_tower_factor: float = Field(0.1, ge=0)
    short_weight: float = Field(0.3, ge=0, le=1)
    generated_per_photo: int = Field(1, ge=0)


class ClareSchedule(Schedule):
    """Schedule of the published CLARE (clare.md section 5): 60,000 steps per stage.

    Attributes:
        steps_per_epoch: steps between two validations.
        tower_factor: learning rate of the pretrained towers, the pyramid's upsampling layers and
            the sampling offsets, as a fraction of `learning_rate`.
        text_tower_factor: the same for the text tower; None uses `tower_factor`. Without pretrained
            weights, the vision tower needs a high learning rate and the text tower a low one.
    """

    grounding_epochs: int = Field(30, ge=0)
    clia_epochs: int = Field(30, ge=0)
    steps_per_epoch: int = Field(2000, ge=1)
    photos_per_batch: int = Field(32, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    tower_factor: float = Field(0.1, ge=0)
    text_tower_factor: float | None = Field(None, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(200, ge=1)
    warmup_start: float = Field(0.01, ge=0, le=1)
    decay: Literal["cosine", "step"] = "step"
    max_gradient_norm: float = Field(0.1, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "fp32"


class CommonConfig(DataConfig):
    """What every run has.

    Attributes:
        zero_stage: of DeepSpeed.
        keep_checkpoints: resume states kept, those of the best epochs; the last one is always kept.
        best_by: figure on the held-out photos that says which epoch is best, the higher the better;
            without held-out photos the latest is.
        final: the epoch whose weights become `checkpoint/`.
        max_failures: times that training goes on by itself after workers died; -1 for ever.
    """

    optimisation: Schedule = Schedule()
    zero_stage: Literal[0, 1, 2, 3] = 1
    keep_checkpoints: int = Field(2, ge=1)
    best_by: Literal["br1_50", "br5_50", "br10_50", "br1_70", "rec_long", "rec_short"] = "br1_50"
    final: Literal["last", "best"] = "last"
    max_failures: int = Field(2, ge=-1)


class RerankSettings(StrictConfig):
    """The relation re-ranker of `clare-nano`, and what its stage draws.

    Attributes:
        width, num_layers, num_heads, dropout, words, match, geometry, neighbours: as in
            `RerankerConfig`.
        rivals: other photos that each long expression is ranked against, drawn among those which
            the dual stream confuses most with the right one.
        generated_per_photo: generated expressions a photo; 0 turns them off.
        vector_dropout: of the dual stream's visual part when it encodes the training photos, which
            it has seen before: at .5 it is as unsure of them as of new ones.
        held_out: share of the training photos that chooses the best epoch and is not trained on.
    """

    width: int = Field(64, ge=8)
    num_layers: int = Field(2, ge=1, le=8)
    num_heads: int = Field(4, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    words: bool = True
    match: bool = True
    geometry: bool = True
    neighbours: bool = True
    rivals: int = Field(4, ge=0)
    generated_per_photo: int = Field(2, ge=0)
    vector_dropout: float = Field(0.5, ge=0, lt=1)
    held_out: float = Field(0.1, gt=0, lt=1)


class TrainConfig(CommonConfig):
    """A run of `clare-nano`.

    Attributes:
        weights: folder with the COCO-trained detector and the ImageNet crop network.
        cache: folder for the output of the frozen part; None puts it beside the output.
    """

    weights: Path
    cache: Path | None = None
    model: ModelSettings = ModelSettings()
    loss: LossWeights = LossWeights()
    rerank: RerankSettings = RerankSettings()
    optimisation: Optimisation = Optimisation()


class ClareTrainConfig(CommonConfig):
    """A run of `clare-base`, `clare-large` or a model of their shape.

    Attributes:
        towers: hub name or folder of the SigLIP towers to start from; None starts at random.
        tokenizer: folder or file of the tokenizer; None uses that of the towers.
        paper_parity: behave as the released code does, quirk by quirk (clare.md table 8.4),
            including how losses are normalized over several workers; with `--init` it must match
            the checkpoint.
        shape: settings of the model that differ from the preset's; with `--init`, from the
            checkpoint's, and then only those with which its weights still fit.
        augmentation: how photos are mirrored, resized and cropped.
        texts_per_photo: expressions per sample of a photo; the published recipe uses one.
        expressions_per_instance: expressions per instance that stage 2 contrasts; the published
            recipe uses one.
        look_alikes_from: fraction of stage 2 after which batches consist of photos of one gallery
            with similar expressions, which only details tell apart; 1, as published, for never.
        loss: weights of the loss terms.
        denoising: train with denoising queries.
        checkpoint_activations: recompute activations in the backward pass to save memory.
    """

    towers: str | None = None
    tokenizer: Path | None = None
    paper_parity: bool = False
    shape: dict[str, Any] = Field(default_factory=dict)
    augmentation: Augmentation = Augmentation()
    texts_per_photo: int = Field(1, ge=1)
    expressions_per_instance: int = Field(1, ge=1)
    look_alikes_from: float = Field(1.0, ge=0, le=1)
    loss: ClareLossWeights = ClareLossWeights()
    denoising: bool = True
    checkpoint_activations: bool = False
    optimisation: ClareSchedule = ClareSchedule()

    @field_validator("shape")
    @classmethod
    def _no_parity(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """Allow one setting for both the model and the loss, so that they cannot disagree."""
        if "paper_parity" in shape:
            raise ValueError(
                "paper_parity cannot be set in shape: move it out of shape, to the top level"
            )
        return shape

    @property
    def masks(self) -> bool:
        """Whether the mask branch is trained, and masks are read: `shape: {masks: true}`."""
        return bool(self.shape.get("masks", False))


PRESETS: Mapping[str, type[CommonConfig]] = {
    "clare-nano": TrainConfig,
    "clare-base": ClareTrainConfig,
    "clare-large": ClareTrainConfig,
}
"""Model -> the configuration that its training takes."""

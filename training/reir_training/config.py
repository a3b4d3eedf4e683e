"""The settings of a training run, loaded from one YAML file and validated before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from reir.config import StrictConfig
from reir.datasets.readers import Format, SplitBy
from reir.models.nano.crop_network import CropNetworkName
from reir.models.piza.config import Inserted, Method, PizaConfig
from reir_training.clare.losses import ClareLossWeights
from reir_training.data.augment import Augmentation
from reir_training.figures import FIGURES, PART_FIGURES
from reir_training.piza.history_training import HistoryTraining


class DataSource(StrictConfig):
    """One folder of annotated photos.

    Attributes:
        format: "photos" (instances.json, expressions.json with splits, and where present
            captions.json and sugarcrepe_pairs.json), "coco" (instances, and captions.json where
            present), "reircoco", "refer" (RefCOCO/+/g: instances.json and `refs(<split_by>).p`),
            "refer_json" (the same, with one JSON file per split), "simrec" (RefCOCO/+/g and
            ReferIt: one JSON file with all splits), "sorec" (one JSON file for each split) or
            "sentences" (CSV or JSON lines of photos and sentences, with or without boxes).
        path: the folder. If it has a look_alikes.json, which `reir build-dataset` writes, photos
            that look alike share the batches of `clare-nano`.
        images: folder of the photos, relative to `path`.
        annotations: file in `path`, for "coco", "reircoco", "refer_json", "simrec", "sorec" and
            "sentences"; empty for instances.json, reircoco_train.json, refcoco.json (twice),
            trainS.json and sentences.csv.
        split_by: for "refer" only: "unc" (RefCOCO, RefCOCO+), "umd" or "google" (RefCOCOg).
        split: use only this split of the folder; None uses all.
        task: what the published CLARE learns from this source: "detection" (every box of COCO's
            classes), "grounding" (referring expressions), or "both", as far as it is annotated.
        held_out: number of photos that become the validation split, "val"; every run chooses the
            same ones. Only for a data set without splits, or together with `split`.
        test: number of photos of the split "train" that become the split "test", which no run
            trains or chooses on; every run chooses the same ones.
    """

    format: Format
    path: Path
    images: str = "images"
    annotations: str = ""
    split_by: SplitBy = "unc"
    split: str | None = None
    task: Literal["both", "detection", "grounding"] = "both"
    held_out: int = Field(0, ge=0)
    test: int = Field(0, ge=0)

    @property
    def file(self) -> str:
        """The file in `path` that is read first; empty for a folder in the layout "photos"."""
        usual = {
            "coco": "instances.json",
            "reircoco": "reircoco_train.json",
            "refer": f"refs({self.split_by}).p",
            "refer_json": "refcoco.json",
            "simrec": "refcoco.json",
            "sorec": "trainS.json",
            "sentences": "sentences.csv",
        }
        return self.annotations or usual.get(self.format, "")

    @property
    def label(self) -> str:
        """The name of the source in messages."""
        file = f"/{self.file}" if self.file and self.format != "coco" else ""
        return f"{self.path}{file}" + (f" [{self.split}]" if self.split else "")


class DataConfig(StrictConfig):
    """The data sources of a run, and the evaluation sets that it must not be trained on.

    Attributes:
        data: data sources. If a source has a split "train", only that split is trained on. Photos
            of a split "val" are held out.
        evaluation: sets that the model will be evaluated on. Training refuses to start if one of
            their photos is among the training photos.
        exclude_evaluation: exclude such photos from training instead.
    """

    data: tuple[DataSource, ...] = Field(min_length=1)
    evaluation: tuple[DataSource, ...] = ()
    exclude_evaluation: bool = False


class NanoModelSettings(StrictConfig):
    """The settings of the `clare-nano` model that ablation runs change."""

    # Two members of 128 dimensions rank better than one model of 256 (docs/LOG.md, 2026-11-21).
    num_members: int = Field(2, ge=1, le=8)
    num_layers: int = Field(2, ge=0, le=12)
    crop_network: CropNetworkName = "efficientnet_lite2"
    # With a frozen crop network, crops of 96 px rank worse (docs/LOG.md, 2026-11-25). The stage
    # "crops" trains it for smaller ones.
    crop_px: int = Field(128, ge=32, le=512, multiple_of=32)
    num_experts: int = Field(4, ge=0, le=64)
    # As in SigLIP. With a bias of 0, every pair would start at a probability of one half, and the
    # many negatives would drown everything else: BR@1 falls from 18.7 to 5.0 (docs/LOG.md).
    clia_bias: float = -10.0
    dropout: float = Field(0.3, ge=0, lt=1)
    frozen_text_layers: int = Field(4, ge=0, le=6)


class NanoLossWeights(StrictConfig):
    """The weight of each loss term; 0 turns a term off.

    Attributes:
        ranking, discrimination: softmax loss and focal loss within the photo.
        wrong_word: loss of sentences with one wrong word, which must score lower.
        clia, cross_ranking: sigmoid loss and softmax loss across the photos of the batch (stage 2).
        caption: contrastive loss between photo vectors and captions (stage 2).
        box: L1 and GIoU.
        category: classification of candidates that match an annotated box.
    """

    ranking: float = Field(1.0, ge=0)
    discrimination: float = Field(1.0, ge=0)
    wrong_word: float = Field(0.5, ge=0)
    clia: float = Field(1.0, ge=0)
    cross_ranking: float = Field(1.0, ge=0)
    caption: float = Field(0.5, ge=0)
    box: float = Field(0.5, ge=0)
    category: float = Field(0.3, ge=0)


class Schedule(StrictConfig):
    """Settings of the optimizer and the schedule, for all models and stages.

    Attributes:
        grounding_epochs, clia_epochs: length of stage 1 and stage 2.
        rerank_epochs, masks_epochs, query_zoom_epochs, colors_epochs, candidates_epochs: length of
            the stages that train the relation re-ranker, the mask head, the zoom policy, the color
            head and the candidate head.
        crops_epochs: length of the stage that trains the model together with its crop network.
        photos_per_batch: batch size of an optimizer step, over all workers.
        accumulate_steps: gradient accumulation: number of parts into which each worker splits its
            share of the batch, to save memory. Photos of different parts are not negatives of one
            another, so a model that contrasts across photos (CLIA) sees fewer negatives.
        learning_rate: learning rate of layers that start from random weights, after warm-up.
        betas: AdamW's decay rates of the first and second moments.
        warmup_start: fraction of the learning rate at the first step; with 0, the first step has
            1 / `warmup_steps` of it.
        decay: "cosine" to 2 % over each stage, or a "step" to `step_to` of the learning rate after
            the share `step_at` of it. The defaults are those of CLARE (docs/clare.md, section 5.1).
        ema_decay: decay of the moving average of the weights; 0 turns averaging off.
        save_every_steps: how often to save a state to resume from; also saved after each epoch.
        log_every_steps: how often to write a line to `metrics.jsonl`; also after each epoch.
    """

    grounding_epochs: int = Field(1, ge=0)
    clia_epochs: int = Field(8, ge=0)
    # More epochs overfit: they help on held-out training photos, but not on `val` (docs/LOG.md).
    rerank_epochs: int = Field(2, ge=0)
    masks_epochs: int = Field(7, ge=0)
    query_zoom_epochs: int = Field(6, ge=0)
    colors_epochs: int = Field(12, ge=0)
    candidates_epochs: int = Field(14, ge=0)
    crops_epochs: int = Field(10, ge=0)
    photos_per_batch: int = Field(48, ge=1)
    accumulate_steps: int = Field(1, ge=1)
    learning_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = Field(50, ge=1)
    warmup_start: float = Field(0.0, ge=0, le=1)
    decay: Literal["cosine", "step"] = "cosine"
    # 48,000 of 60,000 steps.
    step_at: float = Field(0.8, ge=0, le=1)
    step_to: float = Field(0.1, gt=0, le=1)
    max_gradient_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    save_every_steps: int = Field(200, ge=1)
    log_every_steps: int = Field(10, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0


class NanoSchedule(Schedule):
    """Settings of the schedule and the texts of `clare-nano`.

    Attributes:
        text_tower_factor: learning rate of the text tower, as a fraction of `learning_rate`; 0
            freezes it.
        crop_network_factor: learning rate of a weight of the crop network in the stage "crops", as
            a fraction of `learning_rate` times the root mean square of its layer's weights.
        short_weight: weight of short expressions in the losses across photos, lower because they
            are unique only within their photo.
        generated_per_photo: generated expressions per photo and epoch; 0 turns them off.
        wrong_per_expression: sentences with one wrong word per written expression and epoch, which
            must score lower (`loss.wrong_word`); 0 turns them off.
    """

    text_tower_factor: float = Field(0.1, ge=0)
    crop_network_factor: float = Field(3.0, gt=0)
    short_weight: float = Field(0.3, ge=0, le=1)
    generated_per_photo: int = Field(1, ge=0)
    wrong_per_expression: int = Field(0, ge=0)


class ClareSchedule(Schedule):
    """Schedule of the published CLARE (docs/clare.md, section 5.1): 60,000 steps per stage.

    Attributes:
        steps_per_epoch: steps between two validations.
        tower_factor: learning rate of the pretrained towers, the pyramid's upsampling layers and
            the sampling offsets, as a fraction of `learning_rate`.
        text_tower_factor: the same for the text tower; None uses `tower_factor`. Without pretrained
            weights, the vision tower needs a high learning rate and the text tower a low one.
    """

    # 30 epochs of 2,000 steps are the published 60,000 steps.
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
    # CLIA is a sum over all queries, in the thousands; this low limit absorbs that.
    max_gradient_norm: float = Field(0.1, gt=0)
    # The published runs do not average the weights.
    ema_decay: float = Field(0.0, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "fp32"


class PizaSchedule(Schedule):
    """Schedule of PIZA (docs/piza.md): five epochs, with a tenth of the rate after the third.

    Attributes:
        grounding_epochs: in each, every expression is used once.
        clia_epochs: PIZA has one stage only.
        photos_per_batch: expressions in an optimizer step, each with a picture of its own.
        backbone_factor: learning rate of what is trained of the image backbone, as a fraction of
            `learning_rate`.
    """

    grounding_epochs: int = Field(5, ge=0)
    clia_epochs: int = Field(0, ge=0, le=0)
    # As released; the number of GPUs is not stated.
    photos_per_batch: int = Field(4, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    backbone_factor: float = Field(0.1, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(1, ge=1)
    decay: Literal["cosine", "step"] = "step"
    step_at: float = Field(0.6, ge=0, le=1)
    max_gradient_norm: float = Field(0.1, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "fp32"


class TrainConfig(DataConfig):
    """The settings that the training runs of all models have.

    Attributes:
        zero_stage: ZeRO stage of DeepSpeed.
        keep_checkpoints: number of states to keep, those of the best epochs; the last state is
            always kept.
        best_by: validation figure that determines the best epoch, where higher is better: one of
            `figures`, or of `part_figures` for a stage that is listed there; None for the first
            one. Without held-out photos, the last epoch is the best.
        final: which epoch's weights become `checkpoint/`.
        max_failures: number of automatic restarts after workers fail; -1 for no limit.
    """

    optimization: Schedule = Schedule()
    zero_stage: Literal[0, 1, 2, 3] = 1
    keep_checkpoints: int = Field(2, ge=1)
    best_by: str | None = None
    final: Literal["last", "best"] = "last"
    max_failures: int = Field(2, ge=-1)
    figures: ClassVar[tuple[str, ...]] = FIGURES
    part_figures: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @field_validator("best_by")
    @classmethod
    def _is_validation_figure(cls, best_by: str | None) -> str | None:
        known = dict.fromkeys(chain(cls.figures, *cls.part_figures.values()))
        if best_by is not None and best_by not in known:
            raise ValueError(f"must be one of {', '.join(known)}, got {best_by!r}")
        return best_by


class RerankSettings(StrictConfig):
    """Settings of the relation re-ranker of `clare-nano` and of its training data.

    Attributes:
        width, num_layers, num_heads, dropout, words, match, geometry, neighbors: see
            `RerankerConfig`.
        rivals: number of hard negatives per long expression: other photos, drawn from those that
            the dual stream confuses most with the right one.
        generated_per_photo: generated expressions per photo; 0 turns them off.
        vector_dropout: dropout of the dual stream's visual part when it encodes the training
            photos. The dual stream was trained on these photos, so it is too certain about them;
            with a dropout of .5, it is as uncertain as on new photos.
        held_out: share of the training photos that is held out to choose the best epoch.
    """

    width: int = Field(64, ge=8)
    num_layers: int = Field(2, ge=1, le=8)
    num_heads: int = Field(4, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    words: bool = True
    match: bool = True
    geometry: bool = True
    neighbors: bool = True
    rivals: int = Field(4, ge=0)
    generated_per_photo: int = Field(2, ge=0)
    vector_dropout: float = Field(0.5, ge=0, lt=1)
    held_out: float = Field(0.1, gt=0, lt=1)


class MaskSettings(StrictConfig):
    """Settings of the mask head of `clare-nano` and of its training data.

    Attributes:
        width, crop_px, margin: see `MaskHeadConfig`.
        per_photo: maximum number of instances of a photo in a step; those with a mask come first.
        found_share: share of instances with a mask whose prompt is a box of the detector, if it
            found them; the prompts of the others are true boxes and slightly moved ones.
    """

    width: int = Field(64, ge=8, multiple_of=2)
    crop_px: int = Field(128, ge=64, multiple_of=32)
    margin: float = Field(0.25, ge=0, le=1)
    per_photo: int = Field(8, ge=1)
    found_share: float = Field(0.6, ge=0, le=1)


class QueryZoomSettings(StrictConfig):
    """Settings of the zoom policy of `clare-nano` and of its training data.

    Attributes:
        hidden, max_looks: see `ZoomPolicyConfig`.
        num_mosaics, num_held_out: maximum number of mosaics of training photos, and of held-out
            photos.
        looks_per_level: looks of each level and target in a step: up to so many that show the
            target, and up to so many others.
        score_noise: standard deviation of noise on the scores, in a step. The encoder was trained
            on these photos, so without noise its scores would be more reliable than on new photos.
    """

    hidden: int = Field(32, ge=1)
    max_looks: int = Field(7, ge=1)
    num_mosaics: int = Field(40, ge=1)
    num_held_out: int = Field(12, ge=1)
    looks_per_level: int = Field(2, ge=1)
    score_noise: float = Field(0.03, ge=0)


class ColorSettings(StrictConfig):
    """Settings of the color head of `clare-nano`; see `ColorHeadConfig`."""

    width: int = Field(128, ge=8)
    num_heads: int = Field(2, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)


class CandidateSettings(StrictConfig):
    """Settings of the candidate head of `clare-nano`; see `CandidateHeadConfig`.

    Attributes:
        generated_per_photo: maximum number of generated expressions of a photo.
    """

    class_dims: int = Field(28, ge=1, le=80)
    width: int = Field(64, ge=8)
    dropout: float = Field(0.4, ge=0, lt=1)
    generated_per_photo: int = Field(6, ge=0)


class CropSettings(StrictConfig):
    """Settings of the stage "crops", which trains the model together with its crop network.

    Attributes:
        crop_px: input side of crops from then on; they may be smaller than those of the checkpoint.
        teacher_weight: weight of the loss that keeps the features of crops like those that the
            checkpoint's crop network has for its own, larger crops.
    """

    crop_px: int = Field(64, ge=32, le=512, multiple_of=32)
    teacher_weight: float = Field(1.0, ge=0)


class NanoTrainConfig(TrainConfig):
    """The settings of a `clare-nano` run.

    Attributes:
        weights: folder with the published weights of the detector and the crop network.
        cache: folder for the output of the frozen part; None for `cache` in the output folder.
    """

    weights: Path
    cache: Path | None = None
    model: NanoModelSettings = NanoModelSettings()
    loss: NanoLossWeights = NanoLossWeights()
    rerank: RerankSettings = RerankSettings()
    masks: MaskSettings = MaskSettings()
    query_zoom: QueryZoomSettings = QueryZoomSettings()
    colors: ColorSettings = ColorSettings()
    candidates: CandidateSettings = CandidateSettings()
    crops: CropSettings = CropSettings()
    optimization: NanoSchedule = NanoSchedule()
    part_figures: ClassVar[Mapping[str, tuple[str, ...]]] = PART_FIGURES


class ClareTrainConfig(TrainConfig):
    """The settings of a `clare-base` or `clare-large` run.

    Attributes:
        towers: hub name or folder of the SigLIP towers; None to initialize them at random.
        tokenizer: folder or file of the tokenizer; None to use that of the towers.
        paper_parity: behave as the released code does (docs/clare.md, section 9.1), including how
            losses are normalized over several workers; with `--init`, it must match the
            checkpoint.
        shape: settings of the model that differ from those of the preset. With `--init`, they
            differ from those of the checkpoint, and only settings are allowed for which its weights
            still fit.
        augmentation: how photos are mirrored, resized and cropped.
        texts_per_photo: expressions per sample of a photo; the published recipe uses one.
        expressions_per_instance: expressions per instance that stage 2 contrasts; the published
            recipe uses one.
        hard_negatives_from: fraction of stage 2 after which batches are made of hard negatives:
            photos of one gallery with similar expressions. 1 turns this off, as published.
        loss: weights of the loss terms.
        denoising: train with denoising queries.
        checkpoint_activations: recompute activations in the backward pass to save memory.
    """

    towers: str | None = None
    tokenizer: Path | None = None
    paper_parity: bool = False
    # A plain dictionary, because what is allowed depends on the preset and on the checkpoint of
    # `--init`. `ClareConfig` checks the values when the model is built.
    shape: dict[str, Any] = Field(default_factory=dict)
    augmentation: Augmentation = Augmentation()
    texts_per_photo: int = Field(1, ge=1)
    expressions_per_instance: int = Field(1, ge=1)
    # Off by default: such batches help late in stage 2, but harm an early model (docs/LOG.md).
    hard_negatives_from: float = Field(1.0, ge=0, le=1)
    loss: ClareLossWeights = ClareLossWeights()
    denoising: bool = True
    checkpoint_activations: bool = False
    optimization: ClareSchedule = ClareSchedule()

    @field_validator("shape")
    @classmethod
    def _reject_paper_parity(cls, shape: dict[str, Any]) -> dict[str, Any]:
        """Allow one setting for both the model and the loss, so that they cannot disagree."""
        if "paper_parity" in shape:
            raise ValueError(
                "paper_parity cannot be set in shape: move it out of shape, to the top level"
            )
        return shape

    @property
    def masks(self) -> bool:
        """Whether masks are read and the mask branch is trained: `shape: {masks: true}`."""
        return bool(self.shape.get("masks", False))


class PizaTrainConfig(TrainConfig):
    """The settings of a `piza` run.

    Attributes:
        base: hub name or folder of the grounding model, GroundingDINO or MM-GroundingDINO.
        method: what is trained; the methods that start with `piza-` zoom.
        rank, prompt_tokens, inserted, paper_parity: see `PizaConfig`.
        history: how the history encoder of a zooming method is trained, which comes first. Its
            `searches` are also those from which the adapters learn.
        augmentation: how each picture is resized and cropped. As published, it is not mirrored.
    """

    base: str
    method: Method = "piza-adapter"
    rank: int = Field(0, ge=0)
    prompt_tokens: int = Field(PizaConfig.prompt_tokens, ge=1)
    inserted: Inserted | None = None
    paper_parity: bool = False
    history: HistoryTraining = HistoryTraining()
    augmentation: Augmentation = Augmentation(mirror_probability=0.0)
    optimization: PizaSchedule = PizaSchedule()
    figures: ClassVar[tuple[str, ...]] = ("macc", "acc50", "acc75")

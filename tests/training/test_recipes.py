"""The shipped recipes: all can be read; those of published runs have the published settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from reir.config import load_config
from reir_training.clare.task import clare_shape
from reir_training.config import ClareTrainConfig
from reir_training.presets import PRESETS
from reir_training.report.data_check import DataOnlyConfig
from reir_training.run.num_workers import shares_evenly
from reir_training.run.schedule import best_figure, plan, rate_factor
from reir_training.weak.config import WeakLossWeights, WeakTrainConfig

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
REFCOCO = {("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")}


@dataclass(frozen=True)
class Published:
    """Settings of one run in the released configurations; the test has those that all runs share.

    Attributes:
        stage: our name of the training stage.
        sources: folder and task of each data source.
        towers: hub name of the towers; None for a run that starts from a checkpoint.
        photos: batch size, over 8 GPUs.
        steps: number of optimizer steps in the run.
        learning_rate: learning rate of new layers.
        weight_decay: weight decay of all parameters.
        experts: number of experts, how many are chosen, and their share; None if MORE is off.
        masks: whether the mask branch is trained.
    """

    stage: Literal["grounding", "clia"]
    sources: frozenset[tuple[str, str]]
    towers: str | None
    photos: int
    steps: int
    learning_rate: float
    weight_decay: float
    experts: tuple[int, int, float] | None
    masks: bool


STAGE_1 = frozenset({("coco", "detection"), *((name, "grounding") for name, _ in REFCOCO)})
STAGE_2 = frozenset({("reircoco", "grounding")})
REC = frozenset({*STAGE_2, *((name, "grounding") for name, _ in REFCOCO)})
MORE_OF_L = (2, 1, 0.2)
B, L = "google/siglip-base-patch16-384", "google/siglip-large-patch16-384"
RUNS = {
    "clare_base_grounding": Published(
        "grounding", STAGE_1, B, 4 * 8, 60_000, 2e-4, 0.05, None, False
    ),
    "clare_base_clia": Published("clia", STAGE_2, None, 8 * 8, 60_000, 2e-4, 1e-4, None, True),
    "clare_base_rec": Published("grounding", REC, None, 32, 30_000, 2e-5, 1e-4, None, True),
    # the release lacks the configuration of this run; we assume that of the smaller model
    "clare_large_grounding": Published(
        "grounding", STAGE_1, L, 4 * 8, 60_000, 2e-4, 0.05, None, False
    ),
    "clare_large_clia": Published(
        "clia", STAGE_2, None, 4 * 8, 60_000, 2e-4, 1e-4, MORE_OF_L, True
    ),
    "clare_large_rec": Published("grounding", REC, None, 32, 30_000, 2e-5, 1e-4, None, True),
}


@pytest.mark.parametrize("name", RUNS)
def test_recipe_matches_the_published_run(name: str) -> None:
    published = RUNS[name]
    config = load_config(ClareTrainConfig, RECIPES / f"{name}.yaml")
    settings, size = config.optimization, name.split("_")[1]
    assert {(source.path.name, source.task) for source in config.data} == published.sources
    refer = {(s.path.name, s.split_by) for s in config.data if s.format == "refer"}
    assert refer == (set() if published.stage == "clia" else REFCOCO)
    assert all(source.split == "train" for source in config.data if source.format == "refer")
    assert config.towers == published.towers

    epochs = plan(settings, published.stage)
    assert len(epochs) * settings.steps_per_epoch == published.steps
    assert settings.photos_per_batch == published.photos
    assert shares_evenly(settings, 8)
    assert settings.accumulate_steps == 1
    assert settings.learning_rate == published.learning_rate
    assert settings.weight_decay == published.weight_decay
    # both towers, the upsampling layers and the sampling offsets get a tenth of the learning rate
    assert (settings.tower_factor, settings.text_tower_factor) == (0.1, None)
    assert settings.betas == (0.9, 0.999)
    assert settings.max_gradient_norm == 0.1
    assert settings.precision == "fp32"
    assert settings.ema_decay == 0
    factors = {
        step: rate_factor(step, published.steps, settings)
        for step in (0, 200, int(0.8 * published.steps) - 1, int(0.8 * published.steps))
    }
    assert list(factors.values()) == pytest.approx([0.01, 1.0, 1.0, 0.1])

    model = clare_shape(f"clare-{size}", config, {})
    assert model.paper_parity
    assert model.masks == config.masks == published.masks
    assert model.vision_width == {"base": 768, "large": 1024}[size]
    experts = (model.num_experts, model.top_k_experts, model.expert_mix)
    assert (experts if model.num_experts else None) == published.experts
    assert (model.num_queries, model.first_clia_bias, model.clia_scale) == (900, 0.0, 10.0)
    assert (config.texts_per_photo, config.expressions_per_instance) == (1, 1)
    assert (config.hard_negatives_from, config.denoising) == (1.0, True)
    loss = config.loss
    assert (loss.classes, loss.l1, loss.giou) == (2, 5, 2)
    assert (loss.clia, loss.clia_auxiliary) == (4, 1)
    assert (loss.mask_focal, loss.mask_dice) == (2, 5)
    views = config.augmentation
    assert views.short_sides == tuple(range(480, 801, 32))
    assert (views.long_side, views.crop_short_sides) == (1333, (400, 500, 600))
    assert views.crop_sides == (384, 600)
    assert (views.crop_probability, views.mirror_probability) == (0.5, 0.5)


@pytest.mark.parametrize("name", RUNS)
def test_recipe_holds_out_validation_photos_and_excludes_the_evaluation_set(name: str) -> None:
    config = load_config(ClareTrainConfig, RECIPES / f"{name}.yaml")
    assert [source.held_out for source in config.data if source.held_out] == [200]
    assert [source.file for source in config.evaluation] == ["reircoco_val.json"]
    assert config.exclude_evaluation


def test_every_clare_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("clare_*.yaml")} == set(RUNS)


# ------------------------------------------------------------------------------- without boxes

COCO, REFERIT = "train2014", "refclef"
WEAK: dict[str, tuple[str, str, str, int, int, int]] = {
    # annotations, photos, weights of YOLOv3, anchors to choose among, words, self-attention blocks
    "weak_refcoco": ("refcoco.json", COCO, "yolov3_coco", 17, 15, 3),
    "weak_refcocoplus": ("refcoco+.json", COCO, "yolov3_coco", 17, 15, 3),
    "weak_refcocog": ("refcocog.json", COCO, "yolov3_coco", 17, 15, 3),
    "weak_referit": ("refclef.json", REFERIT, "yolov3_vg", 34, 20, 1),
}


@pytest.mark.parametrize("name", WEAK)
def test_recipe_without_boxes_matches_the_published_run(name: str) -> None:
    annotations, photos, weights, num_anchors, max_words, num_blocks = WEAK[name]
    config = load_config(WeakTrainConfig, RECIPES / f"{name}.yaml")
    (source,) = config.data
    assert (source.format, source.annotations) == ("simrec", annotations)
    assert source.images.endswith(photos)
    # The splits of the file say which photos are trained on and which validate.
    assert (source.split, source.held_out, source.test) == (None, 0, 0)
    assert config.yolov3 is not None
    assert config.yolov3.stem == weights
    assert (config.final, best_figure(config, "all")) == ("best", "p50")

    model = config.model
    assert (model.anchors, model.language, model.dim) == ("yolov3", "gru", 512)
    assert (model.num_anchors, model.max_words, model.num_blocks) == (
        num_anchors,
        max_words,
        num_blocks,
    )
    assert (model.class_weight, model.anchor_dropout, model.text_dropout) == (0, 0, 0)
    assert model.paper_parity
    # CMA's additions are off; the heading of the recipe says how to switch them on.
    assert not model.attention
    assert config.sentences_per_item == 1
    assert config.loss == WeakLossWeights(contrast=1, suppression=0, equivariance=0)

    settings = config.optimization
    assert (settings.grounding_epochs, settings.photos_per_batch) == (25, 64)
    assert settings.accumulate_steps == 1
    assert (settings.learning_rate, settings.weight_decay) == (1e-4, 0)
    assert settings.betas == (0.9, 0.98)
    assert (settings.max_gradient_norm, settings.ema_decay) == (0.15, 0.9997)
    assert settings.precision == "fp32"
    warm_up = settings.warmup_steps
    assert 1900 < warm_up < 2200
    steps = warm_up // 3 * 25
    first, warm, last = (rate_factor(s, steps, settings) for s in (0, warm_up, steps))
    assert first == pytest.approx(1e-3)
    assert 0.9 < warm < 1
    assert last == pytest.approx(0.02)


@pytest.mark.parametrize("name", WEAK)
def test_the_heading_of_a_recipe_switches_cma_on(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    changes = [word for line in text.splitlines() for word in line.split() if "=" in word]
    config = load_config(WeakTrainConfig, RECIPES / f"{name}.yaml", changes)
    assert config.model.attention
    assert config.sentences_per_item == 3
    assert config.loss == WeakLossWeights(contrast=1, suppression=0.1, equivariance=0.1)


def test_every_weak_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("weak_ref*.yaml")} == set(WEAK)


# -------------------------------------------------------------------------------------------- all


PRESET_OF = {
    "clare_base": "clare-base",
    "clare_large": "clare-large",
    "nano": "clare-nano",
    "piza": "piza",
    "weak": "weak-rec",
}
"""Beginning of the name of a recipe -> its preset."""


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path: Path) -> None:
    (preset,) = (each for start, each in PRESET_OF.items() if path.stem.startswith(start))
    config = load_config(PRESETS[preset], path)
    # `reir data check` reads the same file without knowing the preset.
    assert load_config(DataOnlyConfig, path).data == config.data

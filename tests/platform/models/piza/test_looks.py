"""Searches of a tiny random PIZA model, loaded by its spec."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForZeroShotObjectDetection

from reir.errors import CheckpointError
from reir.models.grounding_dino import BATCH, load_grounding_dino
from reir.models.localizers import load_localizer_spec
from reir.models.piza.checkpoint import WEIGHTS, load_piza_parts, save_piza
from reir.models.piza.config import Method, PizaConfig
from reir.models.piza.looks import PizaLooks
from reir.models.piza.model import add_adapters
from reir.models.piza.zoom import MAX_STEPS, ZoomingLocalizer
from reir.models.pretrained import PretrainedModel
from reir.records import RgbImage

SIZES = ((300, 200), (90, 700), (300, 200), (1, 40))
EXPRESSIONS = ("the red mug", "a man left of the bus", "x", "the far sign")


@pytest.fixture(scope="module")
def base_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base whose boxes are large enough for several looks."""
    folder = tmp_path_factory.mktemp("wide") / base_folder.name
    shutil.copytree(base_folder, folder)
    base = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        for head in base.bbox_embed:
            head.layers[-1].bias[2:] += 2
    base.save_pretrained(folder)
    return folder


def photos() -> list[RgbImage]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]


def save(base: Any, folder: Path, method: Method) -> str:
    """Write a model whose searches never end by themselves, and return its spec."""
    torch.manual_seed(0)
    model = add_adapters(base, PizaConfig(method=method, rank=4, prompt_tokens=3))
    if model.history is not None:
        nn.init.constant_(model.history.get_parameter("end.2.bias"), -9.0)
    save_piza(folder, model, {})
    return f"piza:{folder}"


def load(base: Any, folder: Path, method: Method) -> ZoomingLocalizer:
    localizer = load_localizer_spec(save(base, folder, method))
    assert isinstance(localizer, ZoomingLocalizer)
    return localizer


@pytest.mark.parametrize("method", ["piza-adapter", "piza-lora", "piza-coop"])
def test_single_photos_equal_a_batch(base: Any, tmp_path: Path, method: Method) -> None:
    localizer = load(base, tmp_path, method)
    images = photos()
    together = localizer.zoom(images, EXPRESSIONS)
    assert max(len(search.steps) for search in together) > 1
    for image, text, several in zip(images, EXPRESSIONS, together, strict=True):
        (alone,) = localizer.zoom([image], [text])
        assert len(alone.steps) == len(several.steps)
        for one, other in zip(alone.steps, several.steps, strict=True):
            assert one.frame == pytest.approx(other.frame, abs=1e-4)
            assert one.box == pytest.approx(other.box, abs=1e-4)
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert one.end == pytest.approx(other.end, abs=1e-5)


def test_every_look_is_that_of_the_base_at_the_same_crop(
    base: Any, base_folder: Path, tmp_path: Path
) -> None:
    # New LoRA does not change the base.
    localizer = load(base, tmp_path, "piza-lora")
    reference = load_grounding_dino(str(base_folder))
    image = np.random.default_rng(1).integers(0, 255, (1000, 1500, 3), dtype=np.uint8)
    (search,) = localizer.zoom([image], ["the red mug"])
    assert 2 <= len(search.steps) <= MAX_STEPS
    height, width = image.shape[:2]
    for step in search.steps:
        frame_px = np.array(step.frame) * (width, height, width, height)
        x1, y1, x2, y2 = frame_px.round().astype(int)
        (found,) = reference.localize([image[y1:y2, x1:x2]], ["the red mug"])
        low, size = np.array(step.frame[:2]), np.subtract(step.frame[2:], step.frame[:2])
        expected = found.boxes[0] * np.tile(size, 2) + np.tile(low, 2)
        assert step.box == pytest.approx(expected.tolist(), abs=1e-4)
        assert step.score == pytest.approx(float(found.scores[0]), abs=1e-4)


EVENTS: list[str] = []
"""What `Watched` prepares, and the passes of the model."""


class Watched(PretrainedModel):
    """Notes the crops that it prepares."""

    def pixels(self, images: Sequence[RgbImage]) -> Mapping[str, torch.Tensor]:
        EVENTS.extend("crop" for _ in images)
        return super().pixels(images)


def test_a_photo_is_prepared_once_and_only_the_crops_of_a_pass_at_the_same_time(
    base: Any, tmp_path: Path
) -> None:
    save(base, tmp_path, "lora")
    model, parts = load_piza_parts(tmp_path)
    localizer = ZoomingLocalizer(PizaLooks(model, Watched(**vars(parts)), "x"))
    model.register_forward_pre_hook(lambda *_: EVENTS.append("pass"))
    one, *_ = photos()

    EVENTS.clear()
    localizer.zoom([one] * (BATCH + 1), ["x"] * (BATCH + 1))
    assert EVENTS == ["crop", "pass", "pass"]
    EVENTS.clear()
    localizer.zoom([one.copy() for _ in range(2 * BATCH)], ["x"] * 2 * BATCH)
    assert EVENTS.count("crop") == 2 * BATCH
    assert EVENTS.index("pass") <= BATCH + 1


@pytest.mark.parametrize("method", ["adapter", "lora", "coop", "full"])
def test_method_without_history_looks_once(base: Any, tmp_path: Path, method: Method) -> None:
    searches = load(base, tmp_path, method).zoom(photos(), EXPRESSIONS)
    assert [len(search.steps) for search in searches] == [1] * len(SIZES)


def test_boxes_are_in_the_photo_and_best_first(base: Any, tmp_path: Path) -> None:
    for found in load(base, tmp_path, "piza-adapter").localize(photos(), EXPRESSIONS):
        assert len(found.boxes) == base.config.num_queries
        assert (found.boxes >= 0).all()
        assert (found.boxes <= 1).all()
        assert (np.diff(found.scores) <= 0).all()


def test_digest_depends_on_the_adapters(base: Any, tmp_path: Path) -> None:
    first = load(base, tmp_path / "a", "piza-adapter").digest
    again = load_localizer_spec(f"piza:{tmp_path / 'a'}").digest
    weights = load_file(tmp_path / "a" / WEIGHTS)
    save_file(weights | {"step.mlp.0.bias": torch.ones(256)}, tmp_path / "a" / WEIGHTS)
    changed = load_localizer_spec(f"piza:{tmp_path / 'a'}").digest
    assert first == again != changed


def test_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"contains no adapters: piza.json and"):
        load_localizer_spec(f"piza:{tmp_path}")

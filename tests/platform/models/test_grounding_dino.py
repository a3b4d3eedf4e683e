"""GroundingDINO as a localizer, with tiny random models of the library's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
    GroundingDinoProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS

from reir.errors import CheckpointError, ConfigError
from reir.models.grounding_dino import (
    BATCH,
    GroundingDinoLocalizer,
    batches_of_equal_size,
    captions_of,
    found_boxes,
    load_grounding_dino,
    stretched,
)
from reir.models.interfaces import ExpressionLocalizer
from reir.models.localizers import load_localizer_spec
from reir.records import RgbImage
from reir_testing.pretrained import save_tiny_grounding_dino, save_tiny_siglip

SIZES = ((50, 90), (60, 60), (50, 90), (90, 50), (50, 90), (64, 112))
EXPRESSIONS = (
    "the red mug",
    "a man in red, left of the bus",
    "x",
    "Zebra",
    "mr. b's cup?",
    "the blue one.",
)


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mm = request.param == "mm-grounding-dino"
    return save_tiny_grounding_dino(tmp_path_factory.mktemp(request.param), mm=mm)


@pytest.fixture(scope="module")
def localizer(folder: Path) -> GroundingDinoLocalizer:
    return load_grounding_dino(str(folder))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def photo(height: int, width: int, seed: int = 0) -> RgbImage:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photos() -> list[RgbImage]:
    return [photo(*size, seed) for seed, size in enumerate(SIZES)]


def test_boxes_and_scores_are_those_of_the_library(
    localizer: GroundingDinoLocalizer, folder: Path, tokenizer: Any
) -> None:
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil.from_pretrained(folder), tokenizer
    )
    for image, expression in zip(photos(), EXPRESSIONS, strict=True):
        text = f"{expression.lower().rstrip('.?')}."
        inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        with torch.inference_mode():
            output = model(**inputs)
        # The library also counts delimiters, which no expression consists of.
        special = torch.isin(inputs["input_ids"], torch.tensor(SPECIAL_TOKENS))
        special = F.pad(special, (0, output.logits.shape[-1] - special.shape[1]))
        output.logits = output.logits.masked_fill(special[:, None], -torch.inf)
        (expected,) = processor.post_process_grounded_object_detection(output, threshold=0.0)
        scores, order = expected["scores"].sort(descending=True)
        (found,) = localizer.localize([image], [expression])
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)
        np.testing.assert_allclose(found.boxes, expected["boxes"][order].clamp(0, 1), atol=1e-5)
        assert 0.01 < found.scores[0] < 0.999


def test_results_do_not_depend_on_the_batch(localizer: GroundingDinoLocalizer) -> None:
    images = [image for image in photos() for _ in EXPRESSIONS]
    texts = [*EXPRESSIONS] * len(SIZES)
    together = localizer.localize(images, texts)
    assert len(together) == len(images) > BATCH
    for image, text, found in zip(images, texts, together, strict=True):
        (alone,) = localizer.localize([image], [text])
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-5)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


def test_expression_and_photo_both_matter(localizer: GroundingDinoLocalizer) -> None:
    one, other = photo(50, 90), photo(50, 90, seed=1)
    mug, bus, same = localizer.localize([one, one, other], ["the red mug", "a bus", "the red mug"])
    assert np.abs(mug.boxes - bus.boxes).max() > 1e-3
    assert np.abs(mug.boxes - same.boxes).max() > 1e-3
    assert localizer.localize([], []) == []
    with pytest.raises(ValueError, match="each photo needs one expression, got 1 and 2"):
        localizer.localize([one], ["a", "b"])


def test_a_caption_is_one_phrase_that_ends_with_a_period(tokenizer: Any) -> None:
    captions = captions_of(tokenizer, ["A Cup?", "the red mug . ", "..."], 32)
    texts = [
        tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(captions.input_ids, captions.attention_mask, strict=True)
    ]
    assert texts[0] == "[CLS] a cup. [SEP]"
    assert texts[1].endswith("mug. [SEP]")
    assert texts[2] == "[CLS]. [SEP]"
    assert captions.is_word.sum(dim=1).tolist() == [4, 9, 0]
    assert not captions.is_word[captions.attention_mask == 0].any()


def test_a_long_expression_is_cut_before_the_period(
    localizer: GroundingDinoLocalizer, tokenizer: Any
) -> None:
    whole, cut = "mug " * 40, "mug " * 9 + "mu"
    captions = captions_of(tokenizer, [whole], 32)
    assert captions.input_ids.shape == (1, 32)
    assert captions.input_ids[0, -2:].tolist() == [1012, 102]
    assert int(captions.is_word.sum()) == 29
    image = photo(50, 90)
    long, short = localizer.localize([image, image], [whole, cut])
    np.testing.assert_allclose(long.scores, short.scores, atol=1e-6)


def test_padding_and_broken_logits_never_win() -> None:
    logits = torch.full((1, 4, 6), -torch.inf)
    logits[0, :, :3] = torch.tensor([[9.0, -1, 9], [0, 2, 0], [0, torch.nan, 0], [0, 1, 0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(4, 1)[None]
    boxes[0, 1], boxes[0, 3, 0] = torch.tensor([0.1, 0.5, 0.4, 1.0]), torch.nan
    (found,) = found_boxes(logits, boxes, torch.tensor([[False, True, False]]))
    expected = torch.tensor([2.0, -1.0]).sigmoid().tolist()
    assert found.scores.tolist() == pytest.approx([*expected, 0, 0])
    assert found.boxes[0].tolist() == pytest.approx([0, 0, 0.3, 1])
    assert found.boxes[2:].tolist() == [[0] * 4] * 2
    (nothing,) = found_boxes(logits, boxes, torch.tensor([[False] * 3]))
    assert nothing.scores.tolist() == [0] * 4


def test_batches_hold_photos_of_one_size() -> None:
    images = [photo(4, 4), photo(4, 5), *[photo(4, 4)] * BATCH]
    assert [*batches_of_equal_size(images)] == [[0, 2, 3, 4], [5], [1]]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2), (3, 40)])
def test_photos_of_extreme_shape_have_boxes(
    localizer: GroundingDinoLocalizer, size: tuple[int, int]
) -> None:
    (found,) = localizer.localize([photo(*size)], ["a red line"])
    assert found.boxes.shape == (20, 4)
    assert np.isfinite(found.boxes).all()


def test_only_very_long_photos_are_stretched() -> None:
    usual, long = photo(10, 160), photo(10, 161)
    assert stretched(usual) is usual
    assert stretched(long).shape == (83, 1333, 3)
    assert stretched(photo(500, 4)).shape == (1333, 83, 3)


def test_a_spec_loads_it_and_other_specs_are_explained(folder: Path, tmp_path: Path) -> None:
    loaded = load_localizer_spec(f"grounding-dino:{folder}")
    assert isinstance(loaded, ExpressionLocalizer)
    assert len(loaded.digest) == 64
    for spec in ("grounding-dyno:x", "grounding-dino", "grounding-dino:", ""):
        with pytest.raises(ConfigError, match=r"unknown localizer .* KIND:NAME_OR_DIR"):
            load_localizer_spec(spec)
    save_tiny_siglip(tmp_path)
    with pytest.raises(CheckpointError, match=r"'siglip', but what is needed is grounding-dino or"):
        load_localizer_spec(f"grounding-dino:{tmp_path}")

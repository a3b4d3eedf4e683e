"""OWLv2 as an instance encoder: its scores are the library's own, photo by photo and across."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Owlv2ForObjectDetection, Owlv2Processor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from reir.models.owlv2 import (
    Owlv2Encoder,
    best_boxes,
    boxes_without_padding,
    fill_to_unit_length,
    linear_range,
    load_owlv2,
    unit_form,
)
from reir.models.pretrained import PretrainedModel, load_pretrained
from reir.records import FloatArray, RgbImage
from reir_testing.pretrained import save_tiny_owlv2

EXPRESSIONS = ["a red dog", "cat", "the man in red left of the bus, with his hat on"]
SIZES = [(60, 120), (150, 70), (96, 96), (30, 96), (200, 199)]


def photo(height: int, width: int, seed: int) -> RgbImage:
    """Noise on a gradient, so that patches differ."""
    noise = np.random.default_rng(seed).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None] * np.ones((height, 1, 3))
    return np.asarray(noise + slope, dtype=np.uint8)


PHOTOS = [photo(*size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="module")
def parts(folder: Path) -> PretrainedModel:
    return load_pretrained(str(folder), Owlv2ForObjectDetection, ("owlv2",))


@pytest.fixture(scope="module")
def encoder(parts: PretrainedModel) -> Owlv2Encoder:
    """Keeps every box that lies in the photo."""
    return Owlv2Encoder(parts, num_candidates=36, nms_iou=1.0)


class Library:
    """Text-conditioned detection as the library's own documentation runs it."""

    def __init__(self, folder: Path) -> None:
        self.model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
        self.images = Owlv2ImageProcessorPil.from_pretrained(folder)
        self.processor = Owlv2Processor(self.images, AutoTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def detect(self, image: RgbImage, expression: str) -> tuple[FloatArray, FloatArray]:
        """(36, 4) boxes in pixels and (36,) logits."""
        inputs = self.processor(
            text=[[expression]],
            images=[image],
            truncation=True,
            return_tensors="pt",
            input_data_format="channels_last",
        )
        output = self.model(**inputs)
        (found,) = self.images.post_process_object_detection(
            output, threshold=0.0, target_sizes=[image.shape[:2]]
        )
        torch.testing.assert_close(found["scores"], output.logits[0, :, 0].sigmoid())
        return found["boxes"].numpy(), output.logits[0, :, 0].numpy()


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(folder)


def rows_of(boxes: FloatArray, library_boxes_px: FloatArray, image: RgbImage) -> list[int]:
    """The library's row of each of our boxes; each row is used once."""
    height, width = image.shape[:2]
    clipped = (library_boxes_px / [width, height, width, height]).clip(0, 1)
    distance = np.abs(boxes[:, None] - clipped[None]).max(axis=2)
    rows = [int(row) for row in distance.argmin(axis=1)]
    assert distance.min(axis=1).max() < 1e-4
    assert len(set(rows)) == len(rows)
    return rows


# ------------------------------------------------------------------------------------- the scores


def test_scores_equal_the_logits_of_transformers_within_and_across_photos(
    encoder: Owlv2Encoder, library: Library
) -> None:
    queries = encoder.encode_expressions(EXPRESSIONS)
    for expression, query in zip(EXPRESSIONS, queries, strict=True):
        ours: list[FloatArray] = []
        theirs: list[FloatArray] = []
        for image, found in zip(PHOTOS, encoder.encode_images(PHOTOS), strict=True):
            boxes_px, logits = library.detect(image, expression)
            assert len(found) > 0
            ours.append(found.vectors @ query)
            theirs.append(logits[rows_of(found.boxes, boxes_px, image)])
        scores, logits = np.concatenate(ours), np.concatenate(theirs)
        np.testing.assert_allclose(scores * encoder.score_scale, logits, atol=3e-5)
        assert np.ptp(logits) > 0.1  # else any order would do
        best = np.argsort(-logits)
        assert (np.diff(scores[best]) < 3e-5 / encoder.score_scale).all()


def test_shifts_and_scales_differ_enough_for_the_comparison_to_notice_them(
    parts: PretrainedModel,
) -> None:
    """Both differ from box to box in the tiny model, far more than the tolerance above."""
    with torch.inference_mode():
        maps, _ = parts.model.image_embedder(parts.pixels(PHOTOS[:1])["pixel_values"])
        assert parts.model.class_head.logit_shift(maps).std() > 0.01
        assert parts.model.class_head.logit_scale(maps).std() > 0.01


def test_vectors_have_unit_length_and_scores_are_at_most_one(encoder: Owlv2Encoder) -> None:
    queries = encoder.encode_expressions(EXPRESSIONS)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    for found in encoder.encode_images(PHOTOS):
        np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)
        assert np.linalg.norm(found.image_vector) == pytest.approx(1, abs=1e-6)
        assert np.abs(found.vectors @ queries.T).max() <= 1
    assert encoder.dim == queries.shape[1] == 34


@pytest.mark.parametrize("seed", range(4))
def test_bounds_of_linear_range_are_never_exceeded_and_are_reached(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head, norm = nn.Linear(24, 1), nn.LayerNorm(24, eps=0.0)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        samples = torch.randn(2000, 24)
    low, high = linear_range(head, norm)
    slope = (head.weight[0] * norm.weight).detach()
    with torch.inference_mode():
        values = head(norm(samples))
        assert values.min() >= low
        assert values.max() <= high
        assert float(head(norm(slope[None]))) == pytest.approx(high, abs=1e-4)
        assert float(head(norm(-slope[None]))) == pytest.approx(low, abs=1e-4)


def test_a_model_without_shift_still_has_a_unit_form(folder: Path) -> None:
    model = load_pretrained(str(folder), Owlv2ForObjectDetection, ("owlv2",)).model
    for head in (model.class_head.logit_shift, model.class_head.logit_scale):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    form = unit_form(model)
    assert form.max_scale == pytest.approx(1, abs=1e-4)
    unit = nn.functional.normalize(torch.arange(64.0).reshape(2, 32) - 20, dim=1)
    vectors = fill_to_unit_length(form.instances(unit, torch.zeros(2), torch.ones(2)))
    scores = vectors @ form.expressions(unit).T * form.score_scale
    torch.testing.assert_close(scores, unit @ unit.T, atol=1e-5, rtol=0)


def test_the_score_of_a_photo_is_the_weighted_mean_score_of_its_instances(
    encoder: Owlv2Encoder,
) -> None:
    queries = encoder.encode_expressions(EXPRESSIONS)
    for found in encoder.encode_images(PHOTOS[:3]):
        wanted = np.average(found.vectors @ queries.T, axis=0, weights=found.objectness)
        np.testing.assert_allclose(queries @ found.image_vector, wanted, atol=1e-6)


def test_a_photo_without_instances_has_the_same_low_score_everywhere(
    parts: PretrainedModel,
) -> None:
    encoder = Owlv2Encoder(parts)
    queries = encoder.encode_expressions(EXPRESSIONS)
    empty = unit_form(parts.model).photo(torch.zeros(0, 33), torch.zeros(0))
    scores = queries @ fill_to_unit_length(empty).numpy()
    np.testing.assert_allclose(scores, scores[0], atol=1e-6)
    for found in encoder.encode_images(PHOTOS):
        assert scores[0] < (found.vectors @ queries.T).min()


# -------------------------------------------------------------------------------------- the boxes


def reference_rows(
    boxes: FloatArray, scores: FloatArray, num_keep: int, max_iou: float, min_side: float
) -> list[int]:
    """Greedy suppression, one box after another."""

    def iou(a: FloatArray, b: FloatArray) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(width, 0.0) * max(height, 0.0)
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return float(overlap / (sum(areas) - overlap))

    kept: list[int] = []
    for row in sorted(range(len(boxes)), key=lambda row: (-scores[row], row)):
        x1, y1, x2, y2 = boxes[row]
        if min(x2 - x1, y2 - y1) < min_side or len(kept) == num_keep:
            continue
        if all(iou(boxes[row], boxes[other]) <= max_iou for other in kept):
            kept.append(row)
    return kept


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [False, True])
def test_best_boxes_equal_the_slow_reference(seed: int, tied: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=random) * 0.7
    boxes = torch.cat([corner, corner + torch.rand(60, 2, generator=random) * 0.3], dim=1)
    boxes[40:] = boxes[:20]  # the same box twice
    boxes[5, 2] = boxes[5, 0]
    scores = torch.rand(60, generator=random)
    scores = (scores * 4).ceil() / 4 if tied else scores
    for num_keep, max_iou in ((1, 0.5), (10, 0.1), (60, 0.7), (60, 1.0)):
        found = best_boxes(boxes, scores, num_keep, max_iou, 0.01).tolist()
        wanted = reference_rows(boxes.numpy(), scores.numpy(), num_keep, max_iou, 0.01)
        assert found == wanted


def test_boxes_without_area_are_never_chosen() -> None:
    boxes = torch.tensor([[0.1, 1.0, 0.4, 1.0], [0.2, 0.2, 0.2, 0.9]])
    assert best_boxes(boxes, torch.tensor([0.9, 0.8]), 5, 0.7, 0.01).tolist() == []


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((100, 200), [0.25, 0.0, 0.75, 1.0]),  # wide: the padding is below
        ((200, 100), [0.5, 0.0, 1.0, 0.5]),  # tall: it is to the right
        ((80, 80), [0.25, 0.0, 0.75, 0.5]),
    ],
)
def test_boxes_are_converted_from_the_padded_square_to_the_photo(
    size: tuple[int, int], wanted: Sequence[float]
) -> None:
    square = torch.tensor([[0.5, 0.25, 0.5, 0.5]])
    assert boxes_without_padding(square, *size)[0].tolist() == pytest.approx(wanted)


def test_boxes_in_the_padding_are_dropped(encoder: Owlv2Encoder) -> None:
    wide, square = encoder.encode_images([photo(24, 96, 1), photo(96, 96, 1)])
    assert 0 < len(wide) < len(square)
    assert (wide.boxes[:, 3] > wide.boxes[:, 1]).all()


def test_the_best_candidates_are_kept_in_order_of_objectness(
    parts: PretrainedModel, encoder: Owlv2Encoder
) -> None:
    few = Owlv2Encoder(parts, num_candidates=5, nms_iou=0.2).encode_images(PHOTOS[2:3])[0]
    every = encoder.encode_images(PHOTOS[2:3])[0]
    rows = reference_rows(every.boxes, every.objectness, 5, 0.2, 1 / 96)
    assert len(few) == 5
    np.testing.assert_allclose(few.boxes, every.boxes[rows], atol=1e-6)
    np.testing.assert_allclose(few.vectors, every.vectors[rows], atol=1e-6)
    assert (np.diff(few.objectness) <= 0).all()


# ------------------------------------------------------------------------------------ the encoder


def test_a_photo_has_the_same_vectors_alone_and_in_a_batch(encoder: Owlv2Encoder) -> None:
    assert encoder.encode_images([]) == []
    for image, found in zip(PHOTOS, encoder.encode_images(PHOTOS), strict=True):
        (alone,) = encoder.encode_images([image])
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-5)
        np.testing.assert_allclose(alone.vectors, found.vectors, atol=1e-5)
    queries = encoder.encode_expressions(EXPRESSIONS * 50)
    np.testing.assert_allclose(queries[147:], encoder.encode_expressions(EXPRESSIONS), atol=1e-6)
    assert encoder.encode_expressions([]).shape == (0, 34)


def test_case_and_spaces_of_an_expression_do_not_matter(encoder: Owlv2Encoder) -> None:
    first, second = encoder.encode_expressions(["A  Red\nDOG", "a red dog"])
    np.testing.assert_array_equal(first, second)


def test_concurrent_threads_get_the_same_vectors_as_one_thread(encoder: Owlv2Encoder) -> None:
    def both(number: int) -> tuple[Any, Any]:
        texts = [f"{'red ' * (number % 5)}dog {number}"]
        vectors = encoder.encode_images([PHOTOS[number % 3]])[0].vectors
        return encoder.encode_expressions(texts), vectors

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(both, range(24)))
    for number, (query, vectors) in enumerate(together):
        wanted_query, wanted_vectors = both(number)
        np.testing.assert_allclose(query, wanted_query, atol=1e-6)
        np.testing.assert_allclose(vectors, wanted_vectors, atol=1e-6)


def test_half_precision_of_the_vision_tower_changes_vectors_only_slightly(folder: Path) -> None:
    exact, half = (
        load_owlv2(str(folder), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_array_equal(
        exact.encode_expressions(EXPRESSIONS), half.encode_expressions(EXPRESSIONS)
    )
    first, second = (each.encode_images(PHOTOS[:1])[0].image_vector for each in (exact, half))
    assert 0 < np.abs(first - second).max() < 0.02
    assert exact.digest == half.digest


def test_num_candidates_below_one_is_refused(parts: PretrainedModel) -> None:
    assert Owlv2Encoder(parts, num_candidates=3).num_candidates == 3
    with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
        Owlv2Encoder(parts, num_candidates=0)


def test_photos_of_a_batch_do_not_affect_one_another(encoder: Owlv2Encoder) -> None:
    """Photos of one batch do not leak into each other: order does not matter."""
    forward, backward = encoder.encode_images(PHOTOS[:3]), encoder.encode_images(PHOTOS[2::-1])
    for first, second in zip(forward, backward[::-1], strict=True):
        np.testing.assert_allclose(first.vectors, second.vectors, atol=1e-5)


def test_loaded_parameters_require_no_gradient(parts: PretrainedModel) -> None:
    parameters: list[Tensor] = list(parts.model.parameters())
    assert not any(each.requires_grad for each in parameters)
    assert not parts.model.training

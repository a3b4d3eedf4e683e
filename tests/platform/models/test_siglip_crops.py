"""SigLIP on crops: its scores are the library's own up to scale and bias of the logit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from reir.models.nano.candidates import CandidateExtractor
from reir.models.pretrained import PretrainedModel, load_pretrained
from reir.models.proposals import Candidates
from reir.models.siglip_crops import (
    CLOSE_MARGIN,
    CONTEXT_MARGIN,
    CONTEXT_SHARE,
    RELATION_SCALE,
    Detector,
    SiglipCropsEncoder,
    crop,
)
from reir.records import FloatArray, RgbImage
from reir_testing.pretrained import save_tiny_siglip
from reir_testing.tiny import tiny_model

EXPRESSIONS = ["the red dog", "a blue cat left of the man"]
BOXES = np.array([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0], [0.7, 0.1, 0.72, 0.11]], np.float32)


def photo(height: int, width: int, seed: int) -> RgbImage:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


PHOTOS = [photo(60, 100, 0), photo(90, 50, 1)]


def fixed_boxes(images: Sequence[RgbImage], num: int) -> list[Candidates]:
    """The same boxes for every photo, none for one of a single pixel."""
    return [_candidates(BOXES[:num] if image.size > 3 else BOXES[:0]) for image in images]


def _candidates(boxes: FloatArray) -> Candidates:
    num = len(boxes)
    return Candidates(
        boxes=torch.from_numpy(boxes),
        class_scores=torch.linspace(0.9, 0.5, num)[:, None].expand(num, 80),
        features=torch.zeros(num, 64),
    )


DETECTOR = Detector(fixed_boxes, "d" * 64)


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp(request.param)
    return save_tiny_siglip(target, flexible=request.param == "siglip2")


@pytest.fixture(scope="module")
def parts(folder: Path) -> PretrainedModel:
    return load_pretrained(str(folder), AutoModel, ("siglip", "siglip2"))


class Library:
    """Logits of text and picture as the library's own documentation computes them."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModel.from_pretrained(folder).eval()
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def cosines(self, pictures: Sequence[RgbImage]) -> FloatArray:
        """(texts, pictures) logits without the scale and bias of the model."""
        tokens = self.tokenizer(
            EXPRESSIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        )
        pixels = self.images(list(pictures), return_tensors="pt", input_data_format="channels_last")
        output = self.model(input_ids=tokens["input_ids"], **pixels)
        logits = output.logits_per_text - self.model.logit_bias
        return np.asarray(logits / self.model.logit_scale.exp())


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return Library(folder)


def test_scores_equal_those_of_transformers_up_to_scale_and_bias(
    parts: PretrainedModel, library: Library
) -> None:
    encoder = SiglipCropsEncoder(parts, DETECTOR, context_share=0.0)
    queries = encoder.encode_expressions(EXPRESSIONS)
    for image, found in zip(PHOTOS, encoder.encode_images(PHOTOS), strict=True):
        wanted = library.cosines([crop(image, box, CLOSE_MARGIN) for box in BOXES])
        np.testing.assert_allclose(queries @ found.vectors.T, wanted, atol=2e-6)
        np.testing.assert_allclose(
            queries @ found.image_vector, library.cosines([image])[:, 0], atol=2e-6
        )
        assert np.ptp(wanted) > 0.01  # else any order would do
    assert encoder.dim == queries.shape[1] == 32


def test_vectors_mix_close_and_context_crops_by_the_context_share(
    parts: PretrainedModel, library: Library
) -> None:
    whole, near, context = (
        SiglipCropsEncoder(parts, DETECTOR, context_share=share)
        for share in (CONTEXT_SHARE, 0.0, 1.0)
    )
    queries = whole.encode_expressions(EXPRESSIONS)
    image = PHOTOS[0]
    found, close, around = (e.encode_images([image])[0].vectors for e in (whole, near, context))
    wanted = library.cosines([crop(image, box, CONTEXT_MARGIN) for box in BOXES])
    np.testing.assert_allclose(queries @ around.T, wanted, atol=2e-6)
    mixed = (1 - CONTEXT_SHARE) * close + CONTEXT_SHARE * around
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    np.testing.assert_allclose(found, mixed, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_relations_add_the_scores_of_neighbors_by_how_near_they_are(
    parts: PretrainedModel,
) -> None:
    share = 0.4
    plain, related = (
        SiglipCropsEncoder(parts, DETECTOR, relation_share=each) for each in (0.0, share)
    )
    (alone,), (found,) = (each.encode_images(PHOTOS[:1]) for each in (plain, related))
    centers = (BOXES[:, :2] + BOXES[:, 2:]) / 2
    queries = plain.encode_expressions(EXPRESSIONS)
    own_scores = queries @ alone.vectors.T
    for i, center in enumerate(centers):
        others = [j for j in range(len(BOXES)) if j != i]
        near = np.exp([-np.linalg.norm(center - centers[j]) / RELATION_SCALE for j in others])
        near /= near.sum()
        mixed = (1 - share) * alone.vectors[i] + share * near @ alone.vectors[others]
        wanted = (1 - share) * own_scores[:, i] + share * own_scores[:, others] @ near
        scores = queries @ found.vectors[i]
        np.testing.assert_allclose(scores * np.linalg.norm(mixed), wanted, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)
    assert np.abs(found.vectors - alone.vectors).max() > 0.01


def test_an_instance_without_neighbors_stays_as_it_is(parts: PretrainedModel) -> None:
    plain, related = (
        SiglipCropsEncoder(parts, DETECTOR, num_candidates=1, relation_share=share)
        for share in (0.0, 0.5)
    )
    one, other = (each.encode_images(PHOTOS[:1])[0].vectors for each in (plain, related))
    np.testing.assert_array_equal(one, other)
    assert plain.digest != related.digest


def test_given_boxes_get_the_vectors_of_found_ones(parts: PretrainedModel) -> None:
    encoder = SiglipCropsEncoder(parts, DETECTOR, relation_share=0.2)
    given = encoder.encode_boxes(PHOTOS[0], BOXES)
    (found,) = encoder.encode_images(PHOTOS[:1])
    np.testing.assert_array_equal(given.boxes, BOXES)
    np.testing.assert_allclose(given.vectors, found.vectors, atol=1e-6)
    assert given.objectness.tolist() == [1, 1, 1]
    assert len(encoder.encode_boxes(PHOTOS[0], BOXES[:0])) == 0


def test_boxes_and_objectness_come_from_the_detector(parts: PretrainedModel) -> None:
    encoder = SiglipCropsEncoder(parts, DETECTOR, num_candidates=2)
    (found,) = encoder.encode_images(PHOTOS[:1])
    np.testing.assert_array_equal(found.boxes, BOXES[:2])
    assert found.objectness.tolist() == pytest.approx([0.9, 0.5])
    assert encoder.num_candidates == 2


def test_photos_without_instances_and_empty_batches_are_encoded(parts: PretrainedModel) -> None:
    encoder = SiglipCropsEncoder(parts, DETECTOR)
    (found,) = encoder.encode_images([photo(1, 1, 0)])
    assert found.vectors.shape == (0, 32)
    assert np.linalg.norm(found.image_vector) == pytest.approx(1, abs=1e-6)
    assert encoder.encode_images([]) == []
    assert encoder.encode_expressions([]).shape == (0, 32)


def test_a_photo_has_the_same_vectors_alone_and_in_a_batch(parts: PretrainedModel) -> None:
    encoder = SiglipCropsEncoder(parts, DETECTOR)
    photos = [photo(40 + n, 70 - n, n) for n in range(9)]
    for image, found in zip(photos, encoder.encode_images(photos), strict=True):
        np.testing.assert_allclose(encoder.encode_images([image])[0].vectors, found.vectors)
    queries = encoder.encode_expressions(EXPRESSIONS * 70)
    np.testing.assert_allclose(queries[-2:], encoder.encode_expressions(EXPRESSIONS), atol=1e-6)


def test_the_detector_of_clare_nano_can_propose_candidates(parts: PretrainedModel) -> None:
    extractor = CandidateExtractor(tiny_model(), torch.float32)
    encoder = SiglipCropsEncoder(parts, Detector(extractor.propose, "digest"), num_candidates=4)
    wanted = extractor.propose(PHOTOS, 4)
    for found, candidates in zip(encoder.encode_images(PHOTOS), wanted, strict=True):
        np.testing.assert_allclose(found.boxes, candidates.boxes, atol=1e-6)
        assert len(found) > 0
    boxes, scores = encoder.propose_boxes(PHOTOS[0], 4)
    np.testing.assert_allclose(boxes, wanted[0].boxes, atol=1e-6)
    np.testing.assert_allclose(scores, wanted[0].scores, atol=1e-6)


def test_concurrent_threads_get_the_same_vectors_as_one_thread(parts: PretrainedModel) -> None:
    encoder = SiglipCropsEncoder(parts, DETECTOR)
    texts = [f"{'red ' * (number % 5)}dog" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: encoder.encode_expressions([text])[0], texts))
        photos = list(pool.map(lambda n: encoder.encode_images([PHOTOS[n % 2]])[0], range(8)))
    np.testing.assert_allclose(together, encoder.encode_expressions(texts), atol=1e-6)
    for number, found in enumerate(photos):
        (alone,) = encoder.encode_images([PHOTOS[number % 2]])
        np.testing.assert_allclose(found.vectors, alone.vectors, atol=1e-6)


def test_the_digest_depends_on_the_detector_and_the_context_share(parts: PretrainedModel) -> None:
    digests = [
        SiglipCropsEncoder(parts, DETECTOR).digest,
        SiglipCropsEncoder(parts, Detector(fixed_boxes, "e" * 64)).digest,
        SiglipCropsEncoder(parts, DETECTOR, context_share=0.5).digest,
        parts.digest,
    ]
    assert len(set(digests)) == 4
    assert {len(digest) for digest in digests} == {64}
    assert SiglipCropsEncoder(parts, DETECTOR).digest == digests[0]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"context_share": 1.5}, r"context_share must lie in \[0, 1\], got 1.5"),
        ({"relation_share": -0.1}, r"relation_share must lie in \[0, 1\], got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(
    parts: PretrainedModel, argument: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        SiglipCropsEncoder(parts, DETECTOR, **argument)


# ---------------------------------------------------------------------------------------- crops

UNIT = st.floats(0, 1, width=32)


@given(
    corners=st.tuples(UNIT, UNIT, UNIT, UNIT),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    margin=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_a_crop_contains_every_pixel_that_the_box_touches(
    corners: tuple[float, ...], size: tuple[int, int], margin: float
) -> None:
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, rows], axis=2).astype(np.uint8)
    x1, x2 = sorted(corners[:2])
    y1, y2 = sorted(corners[2:])
    pixels = crop(image, np.array([x1, y1, x2, y2], np.float32), margin)
    assert np.unique(pixels[..., 0]).tolist() == touched(y1, y2, height, margin)
    assert np.unique(pixels[..., 1]).tolist() == touched(x1, x2, width, margin)


def touched(low: float, high: float, size: int, margin: float) -> list[int]:
    """Pixels that share more than an edge with the widened side; the one it starts in if none."""
    wide = (high - low) * margin
    low, high = (low - wide) * size, (high + wide) * size
    pixels = [pixel for pixel in range(size) if pixel < high and pixel + 1 > low]
    return pixels or [min(int(low), size - 1)]

"""Pixels to instances: crops, colors, photos without candidates, independence of the batch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from reir.models.nano.candidates import CandidateExtractor, crop_boxes
from reir.models.nano.encoder import ClareNanoEncoder
from reir.models.nano.model import ClareNano
from reir.models.proposals import select_candidates
from reir.models.resizing import resize
from reir.records import Instances, RgbImage
from reir_testing import draw_scene
from reir_testing.tiny import tiny_model, tiny_tokenizer

SCENES = [
    draw_scene((90, 60), [("red", (5, 5, 30, 40)), ("blue", (50, 20, 80, 50))]),
    draw_scene((64, 128), [("green", (10, 60, 50, 110))]),
    draw_scene((150, 40), [("yellow", (100, 5, 140, 35)), ("red", (10, 10, 30, 30))]),
]


@pytest.fixture(scope="module")
def encoder() -> ClareNanoEncoder:
    return ClareNanoEncoder(tiny_model(), tiny_tokenizer(), "digest")


def blind_model() -> ClareNano:
    """A model whose detector is certain that there is nothing anywhere."""
    model = tiny_model()
    for name, parameter in model.detector.named_parameters():
        if name.endswith("predict.bias"):
            torch.nn.init.constant_(parameter, -200.0)
    return model


def assert_same(a: Instances, b: Instances, tolerance: float = 0.05) -> None:
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-4)
    np.testing.assert_allclose(a.objectness, b.objectness, atol=1e-5)
    np.testing.assert_allclose(a.vectors, b.vectors, atol=tolerance)
    np.testing.assert_allclose(a.image_vector, b.image_vector, atol=tolerance)


def test_instances_are_ordered_by_objectness_and_have_unit_vectors(
    encoder: ClareNanoEncoder,
) -> None:
    for found in encoder.encode_images(SCENES):
        assert 0 < len(found) <= encoder.num_candidates
        assert found.dim == encoder.dim == 33
        np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-4)
        assert (np.diff(found.objectness) <= 0).all()


def test_a_photo_has_the_same_instances_alone_and_in_a_batch(encoder: ClareNanoEncoder) -> None:
    together = encoder.encode_images(SCENES)
    for scene, found in zip(SCENES, together, strict=True):
        assert_same(found, encoder.encode_images([scene])[0])


def test_more_photos_than_one_batch_keep_their_order(encoder: ClareNanoEncoder) -> None:
    found = encoder.encode_images(SCENES * 4)
    assert len(found) == 12
    for i, instances in enumerate(found):
        assert_same(instances, found[i % 3])


def test_photos_without_candidates_have_only_an_image_vector() -> None:
    encoder = ClareNanoEncoder(blind_model(), tiny_tokenizer(), "digest")
    for found in encoder.encode_images(SCENES[:2]):
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)
        assert found.vectors.shape == (0, 33)
        assert np.linalg.norm(found.image_vector) == pytest.approx(1, abs=1e-4)


def test_num_candidates_keeps_the_best_candidates(encoder: ClareNanoEncoder) -> None:
    few = ClareNanoEncoder(tiny_model(), tiny_tokenizer(), "digest", num_candidates=2)
    assert few.num_candidates == 2
    two, six = few.encode_images(SCENES[:1])[0], encoder.encode_images(SCENES[:1])[0]
    assert len(two) == 2
    np.testing.assert_allclose(two.objectness, six.objectness[:2], atol=1e-6)
    np.testing.assert_allclose(two.boxes, six.boxes[:2], atol=1e-6)


def test_proposed_boxes_are_the_candidates_without_vectors(encoder: ClareNanoEncoder) -> None:
    for image in SCENES:
        boxes, scores = encoder.propose_boxes(image, 3)
        (found,) = encoder.encode_images([image])
        np.testing.assert_allclose(boxes, found.boxes[:3], atol=1e-4)
        np.testing.assert_allclose(scores, found.objectness[:3], atol=1e-5)
        more, _ = encoder.propose_boxes(image, encoder.num_candidates + 20)
        assert len(more) > encoder.num_candidates


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_candidates_below_one_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"num_candidates must be at least 1, got {number}"):
        ClareNanoEncoder(tiny_model(), tiny_tokenizer(), "digest", num_candidates=number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_extractor_gives_the_output_of_its_separate_networks(dtype: torch.dtype) -> None:
    model = tiny_model()
    extract, config = CandidateExtractor(model, dtype), model.config
    batch = extract(SCENES, 6)
    for i, scene in enumerate(SCENES):
        square = resize(scene, config.detector_px, config.detector_px)
        with torch.inference_mode():
            output = model.detector(square.permute(2, 0, 1)[None].float())
        if dtype == torch.float32:
            wanted = select_candidates(output, 6, nms_iou=config.nms_iou)[0]
            torch.testing.assert_close(batch.boxes[i, : len(wanted)], wanted.boxes)
            torch.testing.assert_close(batch.detector[i, : len(wanted)], wanted.features)
        found = batch.crops[i, batch.valid[i]]
        boxes = batch.boxes[i, batch.valid[i]].numpy()
        crops = crop_boxes(scene, boxes, config.crop_px, config.crop_margin)
        with torch.inference_mode():
            looks = model.crop_network(crops.permute(0, 3, 1, 2).float()).mean((2, 3))
        # OpenVINO sums in another order, and in bfloat16 it rounds at other places
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(found, looks, rtol=0.02, atol=tolerance)


def test_read_only_photos_are_encoded_without_warnings(encoder: ClareNanoEncoder) -> None:
    locked = SCENES[0].copy()
    locked.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        (found,) = encoder.encode_images([locked])
    assert_same(found, encoder.encode_images(SCENES[:1])[0])


def test_padding_is_zero_and_marked() -> None:
    extract = CandidateExtractor(tiny_model(), torch.float32)
    batch = extract(SCENES, 200)
    counts = [len(c) for c in extract.propose(SCENES, 200)]
    assert batch.valid.sum(1).tolist() == counts
    assert min(counts) < 200
    for name in ("boxes", "objectness", "class_scores", "detector", "colors", "crops"):
        assert not getattr(batch, name)[~batch.valid].any(), name
    expected = [np.log(s.shape[1] / s.shape[0]) for s in SCENES]
    np.testing.assert_allclose(batch.aspect.numpy(), expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------ crops


def halves() -> RgbImage:
    """Red on the left, blue on the right."""
    photo = np.zeros((40, 80, 3), dtype=np.uint8)
    photo[:, :40, 0], photo[:, 40:, 2] = 255, 255
    return photo


def test_crops_contain_the_pixels_of_the_box() -> None:
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1]], dtype=np.float32)
    left, right = crop_boxes(halves(), boxes, 16, 0.0).numpy()
    # the column at the border blends over into the other half
    assert (left[:, :-1] == (255, 0, 0)).all()
    assert (right[:, 1:] == (0, 0, 255)).all()


def test_a_margin_shows_the_surroundings_within_the_photo() -> None:
    box = np.array([[0, 0, 0.5, 1]], dtype=np.float32)
    (crop,) = crop_boxes(halves(), box, 16, 0.5).numpy()
    assert (crop[:, :8] == (255, 0, 0)).all()
    assert (crop[:, -4:] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "box",
    [(0.5, 0.5, 0.5, 0.5), (1, 1, 1, 1), (0, 0, 0, 0), (0.999999, 0, 1, 1), (0, 0, 1, 1)],
)
def test_boxes_at_the_border_or_without_area_give_crops(box: tuple[float, ...]) -> None:
    crops = crop_boxes(halves(), np.array([box], dtype=np.float32), 16, 0.1)
    assert crops.shape == (1, 16, 16, 3)


def test_crops_equal_those_of_pillow() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    boxes = np.array([[0.25, 0.1, 0.75, 0.6], [0.4, 0.5, 0.5, 0.6]], dtype=np.float32)
    areas = [(24, 5, 96, 65), (47, 49, 61, 61)]  # a tenth more on each side, whole pixels
    for crop, (x1, y1, x2, y2) in zip(
        crop_boxes(photo, boxes, 32, 0.1).numpy(), areas, strict=True
    ):
        part = Image.fromarray(photo[y1:y2, x1:x2])
        wanted = np.asarray(part.resize((32, 32), Image.Resampling.BILINEAR))
        assert np.abs(crop.astype(int) - wanted).max() <= 1


def test_no_boxes_give_no_crops() -> None:
    assert crop_boxes(halves(), np.zeros((0, 4), np.float32), 16, 0.1).shape[0] == 0


def test_colors_of_candidates_equal_the_means_of_their_crops() -> None:
    model = tiny_model()
    batch = CandidateExtractor(model, torch.float32)(SCENES[:1])
    photo, config = SCENES[0], model.config
    crops = crop_boxes(photo, batch.boxes[0].numpy(), config.crop_px, config.crop_margin).numpy()
    side = config.crop_px // 4
    for k in range(int(batch.valid[0].sum())):
        for y in range(4):
            for x in range(4):
                cell = crops[k, y * side : (y + 1) * side, x * side : (x + 1) * side]
                want = cell.reshape(-1, 3).mean(0) / 255
                np.testing.assert_allclose(batch.colors[0, k, y, x].numpy(), want, atol=1e-5)

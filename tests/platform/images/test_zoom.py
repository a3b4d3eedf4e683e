"""Zoom into large photos: where a closer look goes, what it costs, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from reir.errors import ConfigError
from reir.images.boxes import pairwise_iou
from reir.images.large_photos import LargePhotos, views_of, with_views
from reir.images.tiling import Tiling
from reir.images.zoom import Zoom, ZoomEncoder
from reir.models.interfaces import BoxProposer, Segment
from reir.models.masked_encoder import MaskedEncoder
from reir.records import FloatArray, Instances, MaskRle, RgbImage
from reir_testing import FakeEncoder, draw_scene

SMALL = Zoom(above_px=200, side_px=120, look_px=1000)
SHAPES = [
    ("red", (30, 40, 60, 70)),
    ("blue", (160, 320, 190, 350)),
    ("green", (420, 420, 450, 450)),
    ("magenta", (460, 20, 590, 150)),  # large enough for the whole photo
]


class FarSighted(FakeEncoder):
    """Finds rough boxes of everything, but instances only from 1 % of a view on.

    It notes the size of each view.
    """

    def __init__(self, num_candidates: int = 30, *, score: float = 0.5) -> None:
        super().__init__(num_candidates)
        self.score = score
        self.views: list[tuple[int, ...]] = []
        self.looks: list[tuple[int, ...]] = []

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        self.views += [image.shape[:2] for image in images]
        return [large_only(each) for each in super().encode_images(images)]

    def propose_boxes(self, image: RgbImage, num_boxes: int) -> tuple[FloatArray, FloatArray]:
        self.looks.append(image.shape[:2])
        (found,) = super().encode_images([image])
        boxes = found.boxes[:num_boxes]
        return boxes, np.full(len(boxes), self.score, dtype=np.float32)


def large_only(found: Instances) -> Instances:
    kept = found.areas > 0.01
    return replace(
        found,
        boxes=found.boxes[kept],
        objectness=found.objectness[kept],
        vectors=found.vectors[kept],
    )


def test_small_instances_are_found_in_fewer_views_than_with_tiles() -> None:
    image = draw_scene((600, 600), SHAPES)
    wanted = np.array([box for _, box in SHAPES]) / 600
    far = FarSighted()
    (plain,) = far.encode_images([image])
    far.views.clear()
    (found,) = ZoomEncoder(far, SMALL).encode_images([image])
    assert (pairwise_iou(wanted, plain.boxes).max(axis=1) > 0.9).tolist() == [False] * 3 + [True]
    assert (pairwise_iou(wanted, found.boxes) > 0.9).sum(axis=1).tolist() == [1, 1, 1, 1]
    assert far.views == [(600, 600), (120, 120), (120, 120), (120, 120)]
    assert len(Tiling(above_px=200, side_px=120).tiles(600, 600)) == 36


def test_a_small_photo_is_encoded_as_it_is_without_a_look() -> None:
    far = FarSighted()
    image = draw_scene((200, 150), SHAPES[:1])
    (found,) = ZoomEncoder(far, SMALL).encode_images([image])
    assert (far.views, far.looks) == ([(150, 200)], [])
    np.testing.assert_array_equal(found.boxes, FarSighted().encode_images([image])[0].boxes)


@pytest.mark.parametrize(
    ("zoom", "score"),
    [(replace(SMALL, max_share=0.04), 0.5), (replace(SMALL, min_score=0.6), 0.5), (SMALL, 0.01)],
    ids=["all are large enough", "all scores are too low", "all scores are below the default"],
)
def test_nothing_promising_costs_only_the_look(zoom: Zoom, score: float) -> None:
    far = FarSighted(score=score)
    ZoomEncoder(far, zoom).encode_images([draw_scene((600, 600), SHAPES)])
    assert (far.views, far.looks) == ([(600, 600)], [(600, 600)])


def test_a_huge_photo_is_looked_at_in_tiles() -> None:
    far = FarSighted()
    image = draw_scene((600, 600), SHAPES)
    (found,) = ZoomEncoder(far, replace(SMALL, look_px=340)).encode_images([image])
    assert far.looks == [(340, 340)] * 4
    wanted = np.array([box for _, box in SHAPES]) / 600
    assert (pairwise_iou(wanted, found.boxes).max(axis=1) > 0.9).all()


def test_an_encoder_without_proposals_looks_with_its_instances() -> None:
    encoder = FakeEncoder()
    assert isinstance(FarSighted(), BoxProposer)
    assert not isinstance(encoder, BoxProposer)
    boxes = ZoomEncoder(encoder, SMALL).parts(draw_scene((600, 600), SHAPES))
    expected = ZoomEncoder(FarSighted(), SMALL).parts(draw_scene((600, 600), SHAPES))
    assert {*map(tuple, boxes.tolist())} == {*map(tuple, expected.tolist())}


@pytest.mark.parametrize("size", [(3000, 3700), (1700, 300), (500, 4000)])
def test_parts_are_few_and_contain_every_box_that_fits(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for num_boxes in (1, 7, 60):
        start = rng.uniform(0, np.array(size) - 60, (num_boxes, 2))
        boxes_px = np.concatenate([start, start + rng.uniform(5, 60, (num_boxes, 2))], axis=1)
        scores = rng.uniform(0.05, 1, num_boxes).astype(np.float32)
        zoom = Zoom(max_parts=12)
        parts = zoom.parts(*size, boxes_px.astype(np.float32), scores)
        assert 1 <= len(parts) <= min(num_boxes, 12)
        assert (parts[:, :2] >= 0).all()
        assert (parts[:, 2:] <= size).all()
        within = (boxes_px[:, None, :2] >= parts[:, :2]) & (boxes_px[:, None, 2:] <= parts[:, 2:])
        assert np.asarray(within.all(axis=2)).any(axis=1).all()


def test_parts_are_at_full_resolution_until_there_would_be_too_many() -> None:
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 3900, (100, 2))
    boxes_px = np.concatenate([start, start + 20], axis=1).astype(np.float32)
    scores = np.full(100, 0.5, dtype=np.float32)
    few = Zoom().parts(4000, 4000, boxes_px[:10], scores[:10])
    many = Zoom().parts(4000, 4000, boxes_px, scores)
    assert {*(few[:, 2] - few[:, 0]).tolist()} == {540}
    assert (many[:, 2] - many[:, 0]).min() > 540
    assert len(many) <= 24


def test_a_box_lies_near_the_center_of_its_part() -> None:
    box = np.array([[1000, 2000, 1040, 2060]], dtype=np.float32)
    (part,) = Zoom().parts(4000, 4000, box, np.ones(1, dtype=np.float32))
    off = (part[:2] + part[2:] - box[0, :2] - box[0, 2:]) / 2
    assert np.abs(off).max() <= 540 / 6


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 3), (2, 2000), (2000, 2), (5000, 30), (201, 200)], ids=str
)
def test_photos_of_any_shape_are_encoded(size: tuple[int, int]) -> None:
    zoom = replace(SMALL, above_px=1)
    height, width = size
    (found,) = ZoomEncoder(FarSighted(), zoom).encode_images(
        [draw_scene((width, height), [("red", (0, 0, width, height))])]
    )
    assert len(found) == 1


class Squares:
    """Says that an instance is its whole box."""

    def segment(self, image: RgbImage, boxes: FloatArray) -> list[Segment]:
        mask = MaskRle(size=image.shape[:2], counts="1")
        return [Segment(box=tuple(box), mask=mask) for box in boxes.tolist()]


def test_masks_are_found_for_the_merged_instances() -> None:
    image = draw_scene((600, 600), SHAPES)
    masked = with_views(MaskedEncoder(FarSighted(), Squares()), SMALL)
    assert masked.masks
    (found,) = masked.encode_images([image])
    assert found.masks is not None
    assert len(found.masks) == len(found) == 4
    assert {mask.size for mask in found.masks if mask} == {(600, 600)}


def test_every_way_is_found_again_in_the_settings_of_a_version() -> None:
    for way in LargePhotos:
        views = way.views
        stored = {"num_candidates": 30, **(views.settings if views else {})}
        assert views_of(stored) == views
    assert LargePhotos.WHOLE.views is None
    encoder = FakeEncoder()
    assert with_views(encoder, None) is encoder
    assert with_views(encoder, Zoom()).num_candidates == 16 * 30
    assert with_views(encoder, Zoom()).digest == encoder.digest


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_parts must be 1 or more, got 0"):
        Zoom(max_parts=0)
    with pytest.raises(ConfigError, match=r"min_score must be above 0 and at most 1, got 0"):
        Zoom(min_score=0)

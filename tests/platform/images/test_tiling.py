"""Large photos in tiles: cover, what is cut, what is merged, and what stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest

from reir.errors import ConfigError
from reir.images.boxes import pairwise_iou
from reir.images.tiling import TiledEncoder, Tiling
from reir.images.views import VIEWS_AT_ONCE
from reir.records import Instances, RgbImage
from reir_testing import FakeEncoder, draw_scene

SMALL = Tiling(above_px=200, side_px=200, overlap=0.25)


@pytest.mark.parametrize(
    ("size", "overlap"),
    list(product([(201, 50), (640, 480), (1000, 201), (777, 3000)], [0.0, 0.2, 0.5])),
)
def test_tiles_cover_the_photo_and_overlap(size: tuple[int, int], overlap: float) -> None:
    tiling = Tiling(above_px=200, side_px=200, overlap=overlap, max_tiles=1000)
    tiles = tiling.tiles(*size)
    seen = np.zeros(size[::-1], dtype=int)
    for x1, y1, x2, y2 in tiles:
        assert 0 < x2 - x1 <= 200
        assert 0 < y2 - y1 <= 200
        seen[y1:y2, x1:x2] += 1
    assert seen.min() == 1
    for axis in (0, 1):
        starts = sorted({int(tile[axis]) for tile in tiles})
        assert all(b - a <= round(200 * (1 - overlap)) for a, b in pairwise(starts))


def test_a_small_photo_has_no_tiles_and_a_huge_one_not_too_many() -> None:
    assert SMALL.tiles(200, 200).shape == (0, 4)
    assert len(SMALL.tiles(20_000, 10_000)) <= SMALL.max_tiles
    assert SMALL.tiles(20_000, 10_000)[-1].tolist()[2:] == [20_000, 10_000]


class Seen(FakeEncoder):
    """Notes the views; sees nothing under 1 % of a view, as a model of fixed resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[tuple[int, ...]]] = []

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        self.calls.append([image.shape for image in images])
        return [large_only(each) for each in super().encode_images(images)]


def large_only(found: Instances) -> Instances:
    kept = found.areas > 0.01
    return Instances(
        boxes=found.boxes[kept],
        objectness=found.objectness[kept],
        vectors=found.vectors[kept],
        image_vector=found.image_vector,
    )


def test_small_photos_pass_as_they_are() -> None:
    image = draw_scene((200, 150), [("red", (10, 10, 60, 60))])
    encoder = Seen()
    (found,) = TiledEncoder(encoder, SMALL).encode_images([image])
    (expected,) = large_only_of(image)
    assert encoder.calls == [[(150, 200, 3)]]
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.vectors, expected.vectors)


def large_only_of(image: RgbImage) -> list[Instances]:
    return [large_only(each) for each in FakeEncoder().encode_images([image])]


def test_small_things_in_a_large_photo_are_found_once() -> None:
    shapes = [
        ("red", (30, 40, 60, 70)),  # in one tile
        ("blue", (160, 300, 190, 330)),  # in the overlap of two
        ("green", (420, 420, 450, 450)),
        ("magenta", (300, 100, 580, 380)),  # larger than a tile
    ]
    image = draw_scene((600, 600), shapes)
    wanted = np.array([box for _, box in shapes]) / 600
    (plain,) = large_only_of(image)
    (found,) = TiledEncoder(Seen(), SMALL).encode_images([image])
    assert (pairwise_iou(wanted, plain.boxes).max(axis=1) > 0.9).tolist() == [False] * 3 + [True]
    overlaps = pairwise_iou(wanted, found.boxes) > 0.9
    assert overlaps.sum(axis=1).tolist() == [1, 1, 1, 1]
    assert len(found) == 4
    assert found.objectness.tolist() == sorted(found.objectness.tolist(), reverse=True)
    np.testing.assert_array_equal(found.image_vector, plain.image_vector)


class Scripted(FakeEncoder):
    """Gives the instances that it was told, view by view."""

    def __init__(self, views: Sequence[Instances]) -> None:
        super().__init__(num_candidates=1)
        self.views = list(views)

    def encode_images(self, images: Sequence[RgbImage]) -> list[Instances]:
        return [self.views.pop(0) for _ in images]


def instances(*given: tuple[tuple[float, ...], float, int]) -> Instances:
    """Instances of (box, objectness, axis of the vector)."""
    return Instances(
        boxes=np.array([box for box, _, _ in given]).reshape(-1, 4),
        objectness=np.array([score for _, score, _ in given]),
        vectors=np.eye(16, dtype=np.float32)[[axis for _, _, axis in given]].reshape(-1, 16),
        image_vector=np.ones(16, dtype=np.float32),
    )


def test_equal_boxes_of_two_views_are_one_when_their_vectors_are_alike() -> None:
    tiling = Tiling(above_px=50, side_px=60, overlap=0.2, times=4)
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    assert tiling.tiles(100, 60).tolist() == [[0, 0, 60, 60], [40, 0, 100, 60]]
    middle = (0.45, 0.2, 0.55, 0.8)
    left = ((0.45 / 0.6, 0.2, 0.55 / 0.6, 0.8), 0.9, 1)
    right = ((0.05 / 0.6, 0.2, 0.15 / 0.6, 0.8), 0.8, 1)
    other = ((0.05 / 0.6, 0.2, 0.15 / 0.6, 0.8), 0.7, 2)
    cut = ((0.0, 0.1, 0.2, 0.5), 1.0, 3)  # at the inner edge of the right tile
    views = [instances((middle, 0.5, 1)), instances(left), instances(right, other, cut)]
    (found,) = TiledEncoder(Scripted(views), tiling).encode_images([image])
    np.testing.assert_allclose(found.boxes, [middle, middle], atol=1e-6)
    np.testing.assert_allclose(found.objectness, [0.9, 0.7])
    assert found.vectors.argmax(axis=1).tolist() == [1, 2]


def test_no_more_are_kept_than_are_told_and_few_views_are_encoded_at_once() -> None:
    tiling = Tiling(above_px=10, side_px=20, overlap=0.0, times=3)
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    views = [instances(((0.2, 0.2, 0.8, 0.8), 0.5 + n / 100, n % 16)) for n in range(26)]
    encoder = TiledEncoder(Scripted(views), tiling)
    (found,) = encoder.encode_images([image])
    assert len(found) == encoder.num_candidates == 3
    np.testing.assert_allclose(found.objectness, [0.75, 0.74, 0.73])
    seen = Seen()
    TiledEncoder(seen, tiling).encode_images([image, image])
    assert [len(call) for call in seen.calls[:-1]] == [VIEWS_AT_ONCE] * 6


def test_settings_name_every_value_and_wrong_ones_are_refused() -> None:
    assert SMALL.settings == {
        "tile_above_px": 200,
        "tile_side_px": 200,
        "tile_overlap": 0.25,
        "tile_max_tiles": 64,
        "tile_times": 4,
        "tile_same_iou": 0.5,
        "tile_same_similarity": 0.5,
    }
    assert Tiling.from_settings({"num_candidates": 30, **SMALL.settings}) == SMALL
    assert Tiling.from_settings({"num_candidates": 30, "layout": 2}) is None
    with pytest.raises(ConfigError, match="side_px must be 1 or more, got 0"):
        Tiling(side_px=0)
    with pytest.raises(ConfigError, match=r"overlap must be at least 0 and below 1, got 1.0"):
        Tiling(overlap=1.0)

    class Masked(FakeEncoder):
        masks = True

    with pytest.raises(ConfigError, match="--large-photos whole"):
        TiledEncoder(Masked(), SMALL)

"""Batches of PIZA, loaded from real photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.errors import ConfigError
from reir_training.data.augment import Augmentation
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.data.sampling import Step
from reir_training.piza.data import PizaBatch, PizaData
from reir_training.piza.trajectories import TrajectorySettings

PLAIN = Augmentation(short_sides=(64,), long_side=160, crop_probability=0.0, mirror_probability=0.0)
CUT = PLAIN.model_copy(
    update={"crop_probability": 1.0, "crop_short_sides": (80,), "crop_sides": (30, 70)}
)
SEARCHES = TrajectorySettings(usual_share=0.1, least_side_px=4)
SIZE_PX = (800, 600)
COLORS = {"the red one": (255, 0, 0), "the blue one": (0, 0, 255), "the green one": (0, 255, 0)}
BOXES_PX = ((200, 100, 240, 120), (600, 500, 624, 548), (700, 40, 732, 64))


@pytest.fixture
def photos(tmp_path: Path) -> list[TrainPhoto]:
    return [write_photo(tmp_path / f"{number}.jpg") for number in range(3)]


def write_photo(path: Path) -> TrainPhoto:
    """A gray photo with three small rectangles of different colors."""
    pixels = np.full((SIZE_PX[1], SIZE_PX[0], 3), 90, np.uint8)
    for (x1, y1, x2, y2), color in zip(BOXES_PX, COLORS.values(), strict=True):
        pixels[y1:y2, x1:x2] = color
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    return TrainPhoto(
        path=path,
        split="train",
        boxes=(np.array(BOXES_PX) / [*SIZE_PX, *SIZE_PX]).astype(np.float32),
        categories=np.full(3, -1),
        names=("", "", ""),
        expressions=tuple(TrainExpression(text, i, "long") for i, text in enumerate(COLORS)),
        is_wide=True,
        size_px=SIZE_PX,
    )


def make(
    photos: list[TrainPhoto],
    augmentation: Augmentation = PLAIN,
    searches: TrajectorySettings | None = SEARCHES,
) -> PizaData:
    return PizaData(photos, augmentation, searches, batch_size=4, seed=3)


def load(data: PizaData, number: int, rank: int = 0, world_size: int = 1) -> PizaBatch:
    step = data.sampler.step(number, rank, world_size)
    return PizaBatch.from_arrays(data.load(step, rank))


def color_in(batch: PizaBatch, row: int) -> tuple[int, int, int]:
    """The color in the middle of the box that a picture of the batch should give."""
    height, width = batch.size_px[row].tolist()
    x1, y1, x2, y2 = (batch.boxes[row].numpy() * [width, height, width, height]).tolist()
    middle = batch.pixels[row][:, int((y1 + y2) / 2), int((x1 + x2) / 2)]
    red, green, blue = middle.tolist()
    return red, green, blue


@pytest.mark.parametrize("augmentation", [PLAIN, CUT])
def test_the_last_box_of_a_search_shows_what_the_expression_describes(
    photos: list[TrainPhoto], augmentation: Augmentation
) -> None:
    data, colors = make(photos, augmentation), dict[str, set[tuple[int, ...]]]()
    for number in range(6):
        batch = load(data, number)
        for row, text in enumerate(batch.texts):
            target = np.array(BOXES_PX[[*COLORS].index(text)]) / [*SIZE_PX, *SIZE_PX]
            seen = batch.histories[row][batch.valid[row]][-1].numpy()
            assert (seen[:2] <= target[:2] + 1e-6).all()
            assert (seen[2:] >= target[2:] - 1e-6).all()
            if augmentation is PLAIN:
                # in the photo, the next box contains the target, and is within what is seen
                side = np.tile(seen[2:] - seen[:2], 2)
                box = np.tile(seen[:2], 2) + batch.boxes[row].numpy() * side
                assert (box[:2] <= target[:2] + 1e-3).all()
                assert (box[2:] >= target[2:] - 1e-3).all()
                if np.abs(box - target).max() < 1e-3:
                    colors.setdefault(text, set()).add(color_in(batch, row))
    for text, found in colors.items():
        assert all(np.abs(np.array(color) - COLORS[text]).max() < 40 for color in found)
    assert augmentation is CUT or len(colors) == len(COLORS)


def test_every_step_of_a_search_is_drawn(photos: list[TrainPhoto]) -> None:
    lengths = {
        int(length) for number in range(9) for length in load(make(photos), number).valid.sum(1)
    }
    assert {1, 2, 3} <= lengths


def test_without_zoom_the_only_step_goes_from_the_photo_to_the_target(
    photos: list[TrainPhoto],
) -> None:
    batch = load(make(photos, searches=None), 0)
    assert batch.histories.tolist() == [[[0, 0, 1, 1]]] * 4
    for row, text in enumerate(batch.texts):
        target = np.array(BOXES_PX[[*COLORS].index(text)]) / [*SIZE_PX, *SIZE_PX]
        np.testing.assert_allclose(batch.boxes[row], target, atol=1e-6)


def test_a_crop_has_the_detail_of_the_photo(tmp_path: Path, photos: list[TrainPhoto]) -> None:
    """Thin lines, which a smaller photo could not show, are seen in a small box."""
    pixels = np.zeros((SIZE_PX[1], SIZE_PX[0], 3), np.uint8)
    pixels[:, np.arange(SIZE_PX[0]) // 4 % 2 == 0] = 255
    path = tmp_path / "lines.jpg"
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    photo = replace(photos[0], path=path)
    data = make([photo], searches=replace(SEARCHES, usual_share=0.02))
    contrast = {1: 0.0, 2: 0.0}
    for number in range(12):
        batch = load(data, number)
        for row in range(4):
            length = int(batch.valid[row].sum())
            height, width = batch.size_px[row].tolist()
            gray = batch.pixels[row, 0, :height, :width].float()
            contrast[length] = max(contrast.get(length, 0.0), float(gray.std()))
    assert contrast[1] < 10 < 60 < contrast[2]


def test_workers_share_a_step_and_its_padding(photos: list[TrainPhoto]) -> None:
    data = make(photos, CUT)
    for number in range(3):
        whole = load(data, number)
        parts = [load(data, number, rank, 2) for rank in range(2)]
        assert [text for part in parts for text in part.texts] == whole.texts
        for name in ("pixels", "size_px", "boxes", "histories", "valid"):
            joined = np.concatenate([getattr(part, name).numpy() for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))


def test_a_file_of_another_size_than_annotated_shows_the_same(photos: list[TrainPhoto]) -> None:
    image = Image.open(photos[0].path)
    smaller = photos[0].path.with_name("smaller.png")
    image.resize((400, 300)).save(smaller)
    step = Step(0, "search", np.array([0]), np.array([0]), 0)
    full, half = (
        PizaData([photo], PLAIN, SEARCHES, batch_size=1).load(step)
        for photo in (photos[0], replace(photos[0], path=smaller))
    )
    np.testing.assert_array_equal(full["boxes"], half["boxes"])
    difference = full["pixels"].astype(np.float32) - half["pixels"].astype(np.float32)
    assert np.abs(difference).mean() < 4


def test_mirroring_and_photos_without_expressions_are_refused(photos: list[TrainPhoto]) -> None:
    with pytest.raises(ConfigError, match=r"mirror_probability=0\.5"):
        make(photos, PLAIN.model_copy(update={"mirror_probability": 0.5}))
    with pytest.raises(ConfigError, match="no samples"):
        make([replace(photos[0], expressions=())])

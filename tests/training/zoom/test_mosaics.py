"""Mosaics of photos: where photos and instances lie, which expressions are kept, backgrounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from reir.datasets.dataset import ReferringDataset
from reir.errors import ConfigError, DataError
from reir.images.decode import read_image
from reir_testing.photo_sets import draw_photo_set, random_scenes
from reir_training.zoom.mosaics import MosaicSet, MosaicSettings

SMALL = MosaicSettings(num_photos=(3, 5), side_px=(500, 700), kind=None)


@pytest.fixture
def photos(tmp_path: Path) -> ReferringDataset:
    return draw_photo_set(tmp_path, random_scenes(0, 20))


def mosaics(
    photos: ReferringDataset, folder: Path, settings: MosaicSettings = SMALL, *, seed: int = 0
) -> MosaicSet:
    return MosaicSet(photos, folder, settings, seed=seed)


def test_photos_lie_apart_at_their_own_size(photos: ReferringDataset, tmp_path: Path) -> None:
    found = mosaics(photos, tmp_path)
    assert len(found) >= 4
    for number, mosaic in enumerate(found.mosaics):
        pixels = found.draw(number)
        assert pixels.shape == (mosaic.image.height_px, mosaic.image.width_px, 3)
        assert 3 <= len(mosaic.photos) <= 5
        for photo, (x1, y1, x2, y2) in zip(mosaic.photos, mosaic.frames_px.tolist(), strict=True):
            np.testing.assert_array_equal(
                pixels[y1:y2, x1:x2], read_image(tmp_path / photo.file_name)
            )
        for one, other in combinations(mosaic.frames_px, 2):
            assert (one[:2] >= other[2:]).any() or (other[:2] >= one[2:]).any()
    used = [photo.image_id for mosaic in found.mosaics for photo in mosaic.photos]
    assert len(used) == len(set(used))


def test_boxes_lie_on_the_same_pixels_as_in_the_photo(
    photos: ReferringDataset, tmp_path: Path
) -> None:
    found = mosaics(photos, tmp_path)
    drawn = {each.image.image_id: found.draw(n) for n, each in enumerate(found.mosaics)}
    assert len(found.dataset.expressions) > 5
    for instance in found.dataset.instances:
        before = photos.instances_by_id[instance.instance_id]
        photo = read_image(tmp_path / photos.images_by_id[before.image_id].file_name)
        np.testing.assert_array_equal(
            part(drawn[instance.image_id], instance.box_xyxy_px), part(photo, before.box_xyxy_px)
        )


def part(pixels: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    x1, y1, x2, y2 = (round(each) for each in box)
    return pixels[y1:y2, x1:x2]


def test_only_expressions_of_the_chosen_kind_are_kept(
    photos: ReferringDataset, tmp_path: Path
) -> None:
    kinds = [("long", "short")[n % 2] for n in range(len(photos.expressions))]
    mixed = photos.with_expressions(
        replace(text, kind=kind) for text, kind in zip(photos.expressions, kinds, strict=True)
    )
    kept = mosaics(mixed, tmp_path, replace(SMALL, kind="long")).dataset
    assert {text.kind for text in kept.expressions} == {"long"}
    assert 0 < len(kept.expressions) < len(mosaics(mixed, tmp_path).dataset.expressions)


def test_a_dense_mosaic_is_full(photos: ReferringDataset, tmp_path: Path) -> None:
    settings = MosaicSettings(num_photos=(1, 1), side_px=(500, 500), dense=True)
    found = mosaics(photos, tmp_path, settings)
    assert [len(mosaic.photos) for mosaic in found.mosaics] == [12, 8]


def test_the_seed_decides_everything(photos: ReferringDataset, tmp_path: Path) -> None:
    one, again = mosaics(photos, tmp_path), mosaics(photos, tmp_path)
    other = mosaics(photos, tmp_path, seed=1)
    np.testing.assert_array_equal(one.draw(0), again.draw(0))
    assert one.dataset.images == again.dataset.images != other.dataset.images


def test_a_texture_shows_no_annotated_instance(tmp_path: Path) -> None:
    photos = draw_photo_set(tmp_path, [[("red", (10, 10, 60, 60), "")]] * 3)
    settings = replace(SMALL, num_photos=(3, 3), backgrounds=("texture",))
    found = mosaics(photos, tmp_path, settings)
    pixels, color = found.draw(0), read_image(tmp_path / "0.png")[35, 35]
    assert (pixels == color).all(axis=2).sum() == 3 * 50 * 50


def test_written_mosaics_have_the_names_of_the_data_set(
    photos: ReferringDataset, tmp_path: Path
) -> None:
    found = mosaics(photos, tmp_path)
    found.write(tmp_path / "mosaics")
    for number, image in enumerate(found.dataset.images):
        written = read_image(tmp_path / "mosaics" / image.file_name)
        np.testing.assert_array_equal(written, found.draw(number))


def listed_as(photos: ReferringDataset, width_px: int, height_px: int) -> ReferringDataset:
    """The same photos, of which the data set says that they have another size, without boxes."""
    images = (replace(each, width_px=width_px, height_px=height_px) for each in photos.images)
    return replace(photos, images=tuple(images), instances=(), expressions=())


def test_photos_are_shrunk_to_a_smaller_listed_size(
    photos: ReferringDataset, tmp_path: Path
) -> None:
    found = mosaics(listed_as(photos, 53, 40), tmp_path)
    (x1, y1, x2, y2), *_ = found.mosaics[0].frames_px.tolist()
    assert (x2 - x1, y2 - y1) == (53, 40)
    photo = read_image(tmp_path / found.mosaics[0].photos[0].file_name)
    pixels = found.draw(0)[y1:y2, x1:x2].astype(float)
    assert pixels.mean(axis=(0, 1)) == pytest.approx(photo.mean(axis=(0, 1)), abs=2)


@pytest.mark.parametrize("size", [(120, 160), (160, 110), (320, 240)])
def test_photos_are_never_stretched_or_enlarged(
    photos: ReferringDataset, tmp_path: Path, size: tuple[int, int]
) -> None:
    found = mosaics(listed_as(photos, *size), tmp_path, replace(SMALL, side_px=(1500, 1500)))
    named = found.mosaics[0].photos[0].file_name
    wanted = rf"{named} has 160 x 120 px, but is listed as {size[0]} x {size[1]} px"
    with pytest.raises(DataError, match=wanted):
        found.draw(0)


def test_wrong_settings_are_refused(photos: ReferringDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_photos must be two ascending numbers from 1 on"):
        MosaicSettings(num_photos=(5, 3))
    with pytest.raises(ConfigError, match="backgrounds must be some of"):
        MosaicSettings(backgrounds=())
    with pytest.raises(ConfigError, match="room for 12 photos of up to 160 x 120 px"):
        mosaics(photos, tmp_path, MosaicSettings(num_photos=(13, 13), side_px=(500, 500)))
    with pytest.raises(ConfigError, match="room for 0 photos of up to 160 x 120 px, but 1 are"):
        mosaics(photos, tmp_path, MosaicSettings(side_px=(100, 100), dense=True))
    with pytest.raises(ConfigError, match="20 photos, too few for one mosaic"):
        mosaics(photos, tmp_path, MosaicSettings(num_photos=(21, 21)))

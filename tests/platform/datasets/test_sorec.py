"""`reir.datasets.sorec`: the published lists, missing photos, and malformed files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reir.datasets import read_annotations, read_sorec
from reir.errors import DataError
from reir_testing import data_dir
from reir_testing.evaluation.hostile_resedis import HostileFile
from reir_testing.evaluation.hostile_sorec import (
    SIZE_PX,
    hostile_files,
    problem,
    save_photo,
    valid_entry,
)

DATA = data_dir()
needs_data = pytest.mark.skipif(DATA is None, reason="needs the real annotations: set REIR_DATA")


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    save_photo(folder)
    path = folder / "val.json"
    path.write_text(json.dumps(entries))
    return path


def test_entries_about_one_box_describe_one_instance(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        valid_entry(),
        valid_entry(id=7, ref="the sign on the left"),
        valid_entry(id=8, bbox=[5, 6, 10, 20], ref="the other sign"),
    )
    dataset = read_sorec(path, tmp_path)
    (photo,) = dataset.images
    assert (photo.file_name, photo.width_px, photo.height_px) == ("1.jpg", *SIZE_PX)
    assert [(each.instance_id, each.box_xyxy_px) for each in dataset.instances] == [
        ("1", (4, 6, 14, 26)),
        ("8", (5, 6, 15, 26)),
    ]
    assert [(text.expression_id, text.instance_id, text.text) for text in dataset.expressions] == [
        ("1", "1", "the red sign"),
        ("7", "1", "the sign on the left"),
        ("8", "8", "the other sign"),
    ]
    assert not dataset.splits


def test_a_box_may_reach_beyond_its_photo(tmp_path: Path) -> None:
    path = write(tmp_path, valid_entry(bbox=[60, 40, 10, 20]))
    assert read_sorec(path, tmp_path).instances[0].box_xyxy_px == (60, 40, 70, 60)


def test_a_photo_has_the_size_of_its_upright_file(tmp_path: Path) -> None:
    path = write(tmp_path, valid_entry())
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", SIZE_PX).save(tmp_path / "1.jpg", exif=exif)
    (photo,) = read_sorec(path, tmp_path).images
    assert (photo.width_px, photo.height_px) == SIZE_PX[::-1]


def test_missing_photos_are_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path,
        valid_entry(id=1, image="8.jpg"),
        valid_entry(id=2),
        valid_entry(id=3, image="8.jpg"),
        valid_entry(id=4, image="9.jpg"),
    )
    with pytest.raises(DataError, match=r"2 of 3 photos of .*val\.json are not in .*e\.g\. 8\.jpg"):
        read_sorec(path, tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = read_sorec(path, tmp_path, skip_missing=True)
    assert [text.expression_id for text in dataset.expressions] == ["2"]
    assert [image.file_name for image in dataset.images] == ["1.jpg"]
    (record,) = caplog.records
    assert "e.g. 8.jpg; 3 of 4 expressions are left out" in record.getMessage()


def test_expressions_of_missing_photos_are_checked_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, valid_entry(), valid_entry(id=2, image="9.jpg", bbox=[1, 2]))
    with pytest.raises(DataError, match=r"\[1\]\.bbox"):
        read_sorec(path, tmp_path, skip_missing=True)


def test_without_any_photo_there_is_nothing_to_measure(tmp_path: Path) -> None:
    path = write(tmp_path, valid_entry(image="9.jpg"))
    with pytest.raises(DataError, match=r"1 of 1 photos .* there is nothing to measure"):
        read_sorec(path, tmp_path, skip_missing=True)


def test_the_format_is_detected_and_needs_the_photos(tmp_path: Path) -> None:
    path = write(tmp_path, valid_entry())
    assert read_annotations(path, images_dir=tmp_path).expressions[0].text == "the red sign"
    with pytest.raises(DataError, match=r"looks like SOREC, which .* use `reir eval sorec`"):
        read_annotations(path)


def test_there_are_40_hostile_files() -> None:
    assert len({hostile.name for hostile in hostile_files()}) == 40


@pytest.mark.parametrize("hostile", hostile_files(), ids=lambda hostile: hostile.name)
@pytest.mark.timeout(20)
def test_a_malformed_file_is_named_with_its_key(hostile: HostileFile, tmp_path: Path) -> None:
    assert problem(hostile, tmp_path) == ""


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("split", "num_expressions", "num_photos"),
    [("trainS", 10_000, 1_446), ("val", 10_712, 2_382), ("testA", 10_815, 4_107)],
)
def test_real_splits_are_read_whole(
    split: str, num_expressions: int, num_photos: int, tmp_path: Path
) -> None:
    assert DATA is not None
    path = DATA / "refs_only" / "sorec" / f"{split}.json"
    # Stand-ins, large enough for all boxes, because only two of the photos are at hand.
    Image.new("L", (6000, 3000)).save(tmp_path / "any.jpg")
    for name in {entry["image"] for entry in json.loads(path.read_text())}:
        (tmp_path / name).hardlink_to(tmp_path / "any.jpg")
    dataset = read_sorec(path, tmp_path)
    assert (len(dataset.expressions), len(dataset.images)) == (num_expressions, num_photos)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (i.box_xyxy_px for i in dataset.instances)]
    assert (min(areas), max(areas)) == (714, 2000)


@pytest.mark.data
@needs_data
def test_real_photos_are_read_at_their_size(tmp_path: Path) -> None:
    assert DATA is not None
    folder = DATA / "refs_only" / "sorec"
    dataset = read_sorec(folder / "testA.json", folder, skip_missing=True)
    assert {(i.file_name, i.width_px, i.height_px) for i in dataset.images} == {
        ("21035.jpg", 2048, 1536),
        ("24244.jpg", 4000, 3000),
    }
    assert len(dataset.expressions) == len(dataset.instances) == 5
    shutil.copy(folder / "21035.jpg", tmp_path)
    assert len(read_sorec(folder / "testA.json", tmp_path, skip_missing=True).expressions) == 2

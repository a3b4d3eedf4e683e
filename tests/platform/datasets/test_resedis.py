"""`reir.datasets.resedis`: the published layout, and malformed files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.datasets import read_annotations, read_resedis
from reir.errors import DataError
from reir.images import rle
from reir_testing.evaluation.hostile_resedis import (
    SIZE_PX,
    SQUARE,
    HostileFile,
    hostile_files,
    problem,
    save_photo,
    valid_file,
)

WIDE = [[20, 4, 30, 4, 30, 8, 20, 8]]


def write(folder: Path, name: str, **changes: object) -> None:
    (folder / name).write_text(json.dumps(valid_file(**changes)))


def test_polygons_and_runs_give_the_same_targets(tmp_path: Path) -> None:
    save_photo(tmp_path)
    pixels = np.zeros(SIZE_PX[::-1], dtype=bool)
    pixels[2:12, 2:12] = True
    packed = rle.encode(pixels)
    # Two columns and two rows before the square; then ten columns of ten pixels.
    plain = [2 * SIZE_PX[1] + 2, *[10, SIZE_PX[1] - 10] * 9, 10, 492]
    for name, segmentation in {
        "polygons": SQUARE,
        "compressed": {"size": list(packed.size), "counts": packed.counts},
        "plain": {"size": list(packed.size), "counts": plain},
    }.items():
        write(tmp_path, f"{name}.json", target_annotation={"0": segmentation}, expression=name)
    dataset = read_resedis(tmp_path, tmp_path, masks=True)
    assert [(i.instance_id, i.category) for i in dataset.instances] == [
        ("compressed/0", "cup"),
        ("plain/0", "cup"),
        ("polygons/0", "cup"),
    ]
    assert {instance.box_xyxy_px for instance in dataset.instances} == {(2, 2, 12, 12)}
    masks = [instance.mask for instance in dataset.instances]
    assert all(mask is not None and (rle.decode(mask) == pixels).all() for mask in masks)
    (photo,) = dataset.images
    assert (photo.file_name, photo.width_px, photo.height_px) == ("000000000007.jpg", *SIZE_PX)
    assert {each.mask for each in read_resedis(tmp_path, tmp_path).instances} == {None}


def test_several_targets_of_one_expression_are_one_query(tmp_path: Path) -> None:
    save_photo(tmp_path)
    write(tmp_path, "a.json", target_annotation={"x": SQUARE, "y": WIDE})
    first, second = read_resedis(tmp_path, tmp_path).expressions
    assert (first.instance_id, second.instance_id) == ("a/x", "a/y")
    assert first.query == second.query
    assert first.text == second.text == "the red mug"


def test_an_expression_in_several_files_has_several_true_photos(tmp_path: Path) -> None:
    images = tmp_path / "coco"
    for folder, name in {
        "train2014": "COCO_train2014_000000000001.jpg",
        "val2017": "000000000002.jpg",
    }.items():
        (images / folder).mkdir(parents=True)
        Image.new("RGB", SIZE_PX).save(images / folder / name)
    write(tmp_path, "a.json", image_id=1)
    write(tmp_path, "b.json", image_id="000000000002", expression=" The  red mug")
    write(tmp_path, "c.json", image_id=2, expression="the red mug on the left")
    dataset = read_annotations(tmp_path, images_dir=images)
    assert [image.file_name for image in dataset.images] == [
        "train2014/COCO_train2014_000000000001.jpg",
        "val2017/000000000002.jpg",
    ]
    queries = [(each.query, each.image_id) for each in dataset.expressions]
    assert queries == [
        ("the red mug", "1"),
        ("the red mug", "2"),
        ("the red mug on the left", "2"),
    ]


def test_the_same_target_twice_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_photo(tmp_path)
    write(tmp_path, "a.json")
    write(tmp_path, "b.json", expression="The red mug")
    write(tmp_path, "c.json", target_annotation={"0": WIDE})
    with caplog.at_level(logging.WARNING):
        dataset = read_resedis(tmp_path, tmp_path)
    assert [each.instance_id for each in dataset.expressions] == ["a/0", "c/0"]
    assert "1 targets were left out" in caplog.text


def test_there_are_50_hostile_files() -> None:
    assert len({hostile.name for hostile in hostile_files()}) == 50


@pytest.mark.parametrize("hostile", hostile_files(), ids=lambda hostile: hostile.name)
@pytest.mark.timeout(20)
def test_a_malformed_file_is_named_with_its_key(hostile: HostileFile, tmp_path: Path) -> None:
    assert problem(hostile, tmp_path) == ""


def test_a_photo_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.json")
    (tmp_path / "000000000007.jpg").write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"a\.json: image_id: .*000000000007\.jpg"):
        read_resedis(tmp_path, tmp_path)


def test_a_folder_without_files_or_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains no \.json file"):
        read_resedis(tmp_path, tmp_path)
    write(tmp_path, "a.json")
    with pytest.raises(DataError, match="looks like ReSeDis, which is read together with its"):
        read_annotations(tmp_path)

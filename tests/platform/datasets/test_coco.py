"""`reir.datasets.coco` on small files and on the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.datasets import read_coco_captions, read_coco_instances
from reir.errors import DataError
from reir.images.rle import area_px, decode
from reir_testing import data_dir

DATA = data_dir()
needs_data = pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")


def document() -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "5.jpg", "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 64, 0], "iscrowd": 1},
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }


def write(folder: Path, value: object) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(value))
    return path


def test_boxes_classes_and_crowds(tmp_path: Path) -> None:
    dataset = read_coco_instances(write(tmp_path, document()))
    first, crowd = dataset.instances
    assert (first.instance_id, first.image_id, first.category) == ("1", "5", "cat")
    assert first.box_xyxy_px == (1, 2, 11, 22)
    assert not first.is_crowd
    assert crowd.is_crowd
    assert dataset.images[0].file_name == "5.jpg"


def test_malformed_entry_is_named(tmp_path: Path) -> None:
    broken = document()
    broken["annotations"][1]["category_id"] = 4
    path = write(tmp_path, broken)
    with pytest.raises(DataError) as caught:
        read_coco_instances(path)
    assert str(caught.value) == (
        f"{path}: annotations[1].category_id: expected the id of one of the file's categories, "
        "got 4"
    )


def test_captions(tmp_path: Path) -> None:
    path = write(tmp_path, {"annotations": [{"id": 9, "image_id": 5, "caption": "A cat."}]})
    (caption,) = read_coco_captions(path)
    assert (caption.caption_id, caption.image_id, caption.text) == ("9", "5", "A cat.")


def test_masks_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    masked = document()
    masked["annotations"][0]["segmentation"] = [[1, 2, 11, 2, 11, 22, 1, 22]]
    masked["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": [48 * 64]}
    path = write(tmp_path, masked)
    assert {instance.mask for instance in read_coco_instances(path).instances} == {None}
    first, nothing = (each.mask for each in read_coco_instances(path, masks=True).instances)
    assert first is not None
    assert (first.size, area_px(first)) == ((48, 64), 200)
    assert nothing is None, "a mask without a pixel is none"
    masked["annotations"][0]["segmentation"] = [[1, 2]]
    with pytest.raises(DataError, match=r"annotations\[0\].segmentation: expected a segmentation"):
        read_coco_instances(write(tmp_path, masked), masks=True)


@needs_data
@pytest.mark.data
def test_real_masks_fill_their_boxes() -> None:
    assert DATA is not None
    masked = read_coco_instances(DATA / "photos_masks" / "instances.json", masks=True)
    apart_px = []
    for instance in masked.instances:
        assert instance.mask is not None
        if not instance.is_crowd:
            y, x = np.nonzero(decode(instance.mask))
            box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
            apart_px.append(np.abs(box - instance.box_xyxy_px).max())
    assert np.mean(np.array(apart_px) < 1.5) > 0.95  # a tip thinner than a pixel covers none


@needs_data
@pytest.mark.data
def test_real_files() -> None:
    assert DATA is not None
    photos = read_coco_instances(DATA / "photos" / "instances.json")
    assert (len(photos.images), len(photos.instances)) == (2333, 21662)
    assert sum(instance.is_crowd for instance in photos.instances) == 247
    assert len({instance.category for instance in photos.instances}) == 80
    assert len(read_coco_captions(DATA / "photos" / "captions.json")) == 11672
    masks = read_coco_instances(DATA / "photos_masks" / "instances.json")
    assert (len(masks.images), len(masks.instances)) == (337, 2838)

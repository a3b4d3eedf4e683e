"""Reading annotated folders as training photos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reir.datasets.coco_classes import COCO_CLASSES
from reir.errors import DataError
from reir_testing.training.tiny import write_scenes
from reir_training.config import DataConfig, DataSource
from reir_training.data.examples import (
    UNKNOWN_CLASS,
    TrainExpression,
    TrainPhoto,
    read_dataset,
)
from reir_training.data.leakage import training_photos

IMAGES = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 50} for i in (1, 2)]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 4, "name": "gnome"}, {"id": 5, "name": "dog"}]


def read(source: DataSource) -> list[TrainPhoto]:
    """Read the photos of a single source as a run does."""
    return training_photos(DataConfig(data=(source,)))


def annotation(number: int, image: int, category: int, *box: float, crowd: int = 0) -> Any:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "iscrowd": crowd,
    }


def expression(number: int, target: Any, text: str, kind: str = "long") -> Any:
    return {
        "id": number,
        "image_id": 1,
        "ann_id": target["id"],
        "category": next(c["name"] for c in CATEGORIES if c["id"] == target["category_id"]),
        "bbox": target["bbox"],
        "expression": text,
        "kind": kind,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cat, a gnome, a box without area and a crowd of dogs; the second photo has a cat."""
    cat = annotation(10, 1, 3, 10, 5, 20, 40)
    gnome = annotation(11, 1, 4, 50, 10, 70, 20)  # reaches over the border
    flat = annotation(12, 1, 3, 5, 5, 0, 10)
    crowd = annotation(13, 1, 5, 0, 0, 100, 50, crowd=1)
    other = annotation(20, 2, 3, 0, 0, 100, 50)
    instances = {
        "images": IMAGES,
        "categories": CATEGORIES,
        "annotations": [cat, gnome, flat, crowd, other],
    }
    expressions = {
        "splits": {"train": [1], "val": [2]},
        "expressions": [
            expression(1, gnome, "the gnome"),
            expression(2, cat, "left cat", "short"),
            expression(4, crowd, "the dogs"),
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "expressions.json").write_text(json.dumps(expressions))
    return tmp_path


def test_a_photo_has_its_boxes_classes_and_expressions(folder: Path) -> None:
    first, second = read(DataSource(format="photos", path=folder))
    np.testing.assert_allclose(first.boxes, [[0.1, 0.1, 0.3, 0.9], [0.5, 0.2, 1.0, 0.6]], atol=1e-6)
    assert first.names == ("cat", "gnome")
    assert first.categories.tolist() == [COCO_CLASSES.index("cat"), UNKNOWN_CLASS]
    assert first.crowded == {"dog"}
    assert first.expressions == (
        TrainExpression("the gnome", 1, "long"),
        TrainExpression("left cat", 0, "short"),
    )
    assert first.path == folder / "images" / "1.jpg"
    assert (first.split, second.split) == ("train", "val")
    assert second.expressions == ()


def test_captions_and_near_misses_are_optional_and_stripped(folder: Path) -> None:
    source = DataSource(format="photos", path=folder)
    assert read(source)[0].captions == ()
    captions = {"annotations": [{"id": 1, "image_id": 1, "caption": " A cat and a gnome. \n"}]}
    (folder / "captions.json").write_text(json.dumps(captions))
    pair = {
        "image_id": 1,
        "type": "swap_att",
        "kind": "swap_att",
        "caption": "a red cat",
        "negative_caption": " a blue cat ",
    }
    (folder / "sugarcrepe_pairs.json").write_text(json.dumps([pair]))
    first, second = read(source)
    assert first.captions == ("A cat and a gnome.",)
    assert first.near_misses == ("a blue cat",)
    assert second.captions == second.near_misses == ()


def test_photos_with_look_alikes_are_known_by_their_paths(folder: Path) -> None:
    source = DataSource(format="photos", path=folder)
    assert [each.look_alikes for each in read(source)] == [frozenset()] * 2
    line = {
        "photo": "1.jpg",
        "instance": 1,
        "look_alikes": [{"photo": "2.jpg"}, {"photo": "1.jpg"}],
    }
    more = line | {"instance": 2, "look_alikes": [{"photo": "3.jpg"}]}
    (folder / "look_alikes.json").write_text(json.dumps([line, more]))
    first, second = read(source)
    images = folder / "images"
    assert first.look_alikes == {str(images / "2.jpg"), str(images / "3.jpg")}
    assert second.look_alikes == frozenset()
    (folder / "look_alikes.json").write_text(json.dumps([{"photo": "1.jpg"}]))
    with pytest.raises(DataError, match=r"look_alikes\.json.*\[0\].*look_alikes"):
        read(source)


def test_a_source_may_have_only_boxes(folder: Path) -> None:
    photos = read(DataSource(format="coco", path=folder, images="elsewhere"))
    assert [len(p.boxes) for p in photos] == [2, 1]
    assert {p.split for p in photos} == {"train"}
    assert not any(p.expressions for p in photos)
    assert photos[0].path.parent == folder / "elsewhere"


def test_photos_without_annotations_are_dropped(folder: Path) -> None:
    values = json.loads((folder / "instances.json").read_text())
    values["images"].append({"id": 3, "file_name": "3.jpg", "width": 10, "height": 10})
    (folder / "instances.json").write_text(json.dumps(values))
    assert len(read(DataSource(format="coco", path=folder))) == 2


def test_error_names_a_source_without_annotations(folder: Path) -> None:
    empty = {"images": IMAGES, "categories": CATEGORIES, "annotations": []}
    (folder / "instances.json").write_text(json.dumps(empty))
    with pytest.raises(DataError, match=rf"{folder.name} \(coco\) has no annotated photo"):
        read(DataSource(format="coco", path=folder))


def test_error_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instances\.json"):
        read(DataSource(format="photos", path=tmp_path))


@pytest.mark.parametrize(
    ("task", "detects", "grounds"),
    [
        ("both", True, True),
        ("detection", True, False),
        ("grounding", False, True),
    ],
)
def test_a_source_is_used_only_for_its_task(
    tmp_path: Path, task: str, detects: bool, grounds: bool
) -> None:
    write_scenes(tmp_path / "scenes", train=4, val=1)
    values = {"format": "photos", "path": tmp_path / "scenes", "task": task}
    source = DataSource.model_validate(values)
    photos = read(source)
    assert any((photo.categories >= 0).any() for photo in photos) == detects
    assert any(photo.expressions for photo in photos) == grounds
    assert all(len(photo.boxes) and any(photo.names) for photo in photos)


def test_every_run_sets_the_same_test_photos_aside(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=8, val=2)
    values = {"format": "photos", "path": tmp_path / "scenes"}

    def splits(num: int) -> Mapping[str, frozenset[str]]:
        return read_dataset(DataSource.model_validate(values | {"test": num})).splits

    assert set(splits(0)) == {"train", "val"}
    few, more = splits(2), splits(5)
    assert (len(few["test"]), len(few["train"]), len(few["val"])) == (2, 6, 2)
    assert few["test"] < more["test"]
    assert few["test"] | few["train"] == splits(0)["train"]
    shown = read(DataSource.model_validate(values | {"test": 2}))
    assert len(shown) == 8  # neither trained on nor validated on
    for num in (8, 9):
        with pytest.raises(DataError, match=rf"test={num} needs a split train of more photos"):
            splits(num)


def test_every_run_holds_out_the_same_photos(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=8, val=1)
    values = {"format": "photos", "path": tmp_path / "scenes", "split": "train"}

    def held_out(num: int) -> set[str]:
        source = DataSource.model_validate(values | {"held_out": num})
        photos = read(source)
        assert len(photos) == 8
        return {photo.path.name for photo in photos if photo.split == "val"}

    assert held_out(0) == set()
    assert len(held_out(2)) == 2
    assert held_out(2) < held_out(5)
    with pytest.raises(DataError, match=r"held_out=8 of 8 photos leaves none"):
        held_out(8)

"""`reir.datasets.reircoco`: the published form, read and written."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reir.datasets import (
    ReferringDataset,
    ReferringInstance,
    read_photos,
    read_reircoco,
    write_reircoco,
)
from reir.errors import DataError
from reir_testing import data_dir

DATA = data_dir()
needs_data = pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")


def entry(number: int, name: str, *expressions: str) -> dict[str, Any]:
    return {
        "id": number,
        "file_name": name,
        "width": 64,
        "height": 48,
        "expressions": list(expressions),
    }


def document() -> dict[str, Any]:
    """Two instances in a.jpg, one in b.jpg, c.jpg and d.jpg without expressions."""
    without = entry(4, "d.jpg")
    del without["expressions"]
    return {
        "images": [
            entry(1, "a.jpg", "the cat", "a grey cat"),
            entry(2, "b.jpg", "the dog"),
            entry(3, "c.jpg"),
            without,
            entry(9, "a.jpg", "the mouse"),
        ],
        "annotations": [
            {"id": 50, "image_id": 9, "bbox": [5, 5, 2, 2]},
            {"id": 51, "image_id": 1, "bbox": [1, 2, 10, 20], "category_id": 1, "iscrowd": 0},
            {"id": 52, "image_id": 2, "bbox": [3, 4, 5, 6]},
        ],
        "categories": [{"id": 1, "name": "object", "supercategory": "object"}],
    }


def write(folder: Path, value: object) -> Path:
    path = folder / "val.json"
    path.write_text(json.dumps(value))
    return path


def facts(dataset: ReferringDataset) -> list[tuple[object, ...]]:
    """Everything that the form can say, apart from identifiers."""
    return [
        (
            dataset.images_by_id[text.image_id].file_name,
            text.text,
            tuple(round(side, 6) for side in target.box_xyxy_px),
            target.category,
            target.is_crowd,
        )
        for text in dataset.expressions
        for target in [dataset.instances_by_id[str(text.instance_id)]]
    ]


def test_entries_of_one_file_name_are_one_photo(tmp_path: Path) -> None:
    dataset = read_reircoco(write(tmp_path, document()))
    assert [image.image_id for image in dataset.images] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert facts(dataset) == [
        ("a.jpg", "the cat", (1, 2, 11, 22), "object", False),
        ("a.jpg", "a grey cat", (1, 2, 11, 22), "object", False),
        ("b.jpg", "the dog", (3, 4, 8, 10), None, False),
        ("a.jpg", "the mouse", (5, 5, 7, 7), None, False),
    ]
    assert [t.expression_id for t in dataset.first_expressions().expressions] == [
        "1/0",
        "2/0",
        "9/0",
    ]


def test_only_the_certain_fields_are_needed(tmp_path: Path) -> None:
    bare = document()
    del bare["categories"]
    bare["annotations"] = [
        {"image_id": item["image_id"], "bbox": item["bbox"]} for item in bare["annotations"]
    ]
    assert len(read_reircoco(write(tmp_path, bare)).expressions) == 4


def test_last_annotation_is_the_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    several = document()
    several["annotations"].append({"id": 99, "image_id": 1, "bbox": [7, 7, 9, 9]})
    with caplog.at_level(logging.WARNING):
        dataset = read_reircoco(write(tmp_path, several))
    assert dataset.expressions[0].instance_id == "99"
    assert "51" in dataset.instances_by_id
    assert "1 entries have several annotations" in caplog.text


def test_round_trip(tmp_path: Path) -> None:
    dataset = read_reircoco(write(tmp_path, document()))
    write_reircoco(dataset, tmp_path / "again.json")
    again = read_reircoco(tmp_path / "again.json")
    assert {image.file_name for image in again.images} == {i.file_name for i in dataset.images}
    assert [fact[:3] for fact in facts(again)] == [fact[:3] for fact in facts(dataset)]


def test_scores_of_found_boxes_make_the_round_trip(tmp_path: Path) -> None:
    some = document()
    some["annotations"][0]["score"] = 0.73204
    dataset = read_reircoco(write(tmp_path, some))
    assert [each.score for each in dataset.instances].count(None) == len(dataset.instances) - 1
    write_reircoco(dataset, tmp_path / "again.json")
    again = read_reircoco(tmp_path / "again.json")
    assert {each.score for each in again.instances} == {None, 0.732}
    written = json.loads((tmp_path / "again.json").read_text())["annotations"]
    assert sum("score" in each for each in written) == 1


@pytest.mark.parametrize("score", [1.5, -0.1, "0.5", True])
def test_a_score_is_a_share(tmp_path: Path, score: object) -> None:
    some = document()
    some["annotations"][0]["score"] = score
    with pytest.raises(DataError, match=r"annotations\[0\]\.score: expected a number from 0 to 1"):
        read_reircoco(write(tmp_path, some))


def test_masks_make_the_round_trip(tmp_path: Path) -> None:
    some = document()
    for item in some["annotations"]:
        x, y, w, h = item["bbox"]
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    dataset = read_reircoco(write(tmp_path, some), masks=True)
    write_reircoco(dataset, tmp_path / "again.json")
    again = read_reircoco(tmp_path / "again.json", masks=True)
    for one, other in zip(*(targets(each) for each in (dataset, again)), strict=True):
        assert one.mask is not None
        assert one.mask == other.mask
    plain = read_reircoco(tmp_path / "again.json")
    assert {instance.mask for instance in plain.instances} == {None}


def targets(dataset: ReferringDataset) -> list[ReferringInstance]:
    return [dataset.instances_by_id[str(text.instance_id)] for text in dataset.expressions]


def test_expression_without_instance_cannot_be_written(tmp_path: Path) -> None:
    dataset = read_reircoco(write(tmp_path, document()))
    absent = dataset.with_expressions(
        replace(text, instance_id=None) for text in dataset.expressions
    )
    with pytest.raises(DataError, match=r"expression '1/0' has no instance.*with_targets"):
        write_reircoco(absent, tmp_path / "again.json")


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        (("images", 0), "width", None, r"images\[0\]\.width: expected a whole number"),
        (("images", 0), "expressions", "the cat", r"images\[0\]\.expressions: expected a list"),
        (("images", 4), "width", 65, r"images\[4\]\.file_name: expected 64 x 48 px as in"),
        (("images", 1), "id", 8, r"images\[1\]\.id: expected an annotation with this image_id"),
        (("annotations", 2), "bbox", [1, 2, 3], r"annotations\[2\]\.bbox: expected four finite"),
        (("annotations", 2), "id", 50, r"instance '50': this id is used twice"),
        (("annotations", 2), "bbox", [70, 2, 3, 4], r"expression '2/0': expected a target box"),
        (
            ("images", 2),
            "id",
            2,
            r"images\[2\]\.id: expected an id that no earlier entry has, got 2",
        ),
    ],
    ids=["width", "expressions", "size", "no-box", "box", "twice", "outside", "entry-twice"],
)
def test_malformed_entry_is_named(
    tmp_path: Path, place: tuple[str, int], key: str, value: object, message: str
) -> None:
    broken = document()
    broken[place[0]][place[1]][key] = value
    path = write(tmp_path, broken)
    with pytest.raises(DataError, match=message) as caught:
        read_reircoco(path)
    assert str(path) in str(caught.value)


def test_annotation_of_no_entry_is_named(tmp_path: Path) -> None:
    stray = document()
    stray["annotations"].append({"id": 53, "image_id": 77, "bbox": [1, 1, 2, 2]})
    with pytest.raises(DataError, match=r"annotations\[3\]\.image_id: expected the id of an entry"):
        read_reircoco(write(tmp_path, stray))


@needs_data
@pytest.mark.data
def test_our_val_photos_as_reircoco(tmp_path: Path) -> None:
    assert DATA is not None
    val = read_photos(DATA / "photos").split("val").of_kind("long")
    write_reircoco(val, tmp_path / "val.json")
    again = read_reircoco(tmp_path / "val.json")
    assert (len(again.images), len(again.instances), len(again.expressions)) == (251, 584, 584)
    assert sorted(facts(again), key=str) == sorted(facts(val), key=str)


def test_instances_without_expressions_can_be_written_too(tmp_path: Path) -> None:
    dataset = read_reircoco(write(tmp_path, document()))
    silent = dataset.with_expressions(dataset.expressions[:1])
    write_reircoco(silent, tmp_path / "all.json", every_instance=True)
    again = read_reircoco(tmp_path / "all.json")
    assert len(again.instances) == len(dataset.instances) > 1
    assert [each.text for each in again.expressions] == [dataset.expressions[0].text]
    assert {each.file_name for each in again.images} == {e.file_name for e in dataset.images}
    write_reircoco(silent, tmp_path / "described.json")
    assert len(read_reircoco(tmp_path / "described.json").instances) == 1

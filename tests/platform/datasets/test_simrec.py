"""`reir.datasets.simrec`: items of all splits, photos of both names, and malformed files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reir.datasets import ReferringDataset, read_annotations, read_as, read_refer, read_simrec
from reir.errors import DataError
from reir_testing import data_dir

DATA = data_dir()
SIZE_PX = (64, 48)


def item(**changes: Any) -> dict[str, Any]:
    """Return a valid item about photo 72, with some values changed."""
    valid = {
        "iid": 72,
        "bbox": [4.5, 6, 10, 20],
        "cat_id": 23,
        "refs": ["left giraffe", "the tall one"],
        "mask_id": 7,
    }
    return valid | changes


def write(folder: Path, document: Any, *, name: str = "COCO_train2014_{:012}.jpg") -> Path:
    """Write a file, and photos 72 and 9 under names of this pattern."""
    for number in (72, 9):
        Image.new("RGB", SIZE_PX, "gray").save(folder / name.format(number))
    path = folder / "refcoco.json"
    path.write_text(json.dumps(document))
    return path


def document() -> dict[str, Any]:
    """One instance of "train" with two sentences, and one of "val" with an item for each of two."""
    val = {"iid": 9, "bbox": [1, 2, 3, 4], "cat_id": 0, "mask_id": 8}
    return {
        "train": [item()],
        "val": [val | {"refs": ["man on the left"]}, val | {"refs": ["man in red"]}],
        "testA": [],
    }


def test_a_file_is_read_with_all_of_its_splits(tmp_path: Path) -> None:
    dataset = read_simrec(write(tmp_path, document()), tmp_path)
    assert [(i.image_id, i.file_name, i.width_px, i.height_px) for i in dataset.images] == [
        ("72", "COCO_train2014_000000000072.jpg", *SIZE_PX),
        ("9", "COCO_train2014_000000000009.jpg", *SIZE_PX),
    ]
    assert [(i.instance_id, i.image_id, i.box_xyxy_px, i.category) for i in dataset.instances] == [
        ("7", "72", (4.5, 6, 14.5, 26), "giraffe"),
        ("8", "9", (1, 2, 4, 6), "person"),
    ]
    assert [(e.image_id, e.instance_id, e.split, e.text) for e in dataset.expressions] == [
        ("72", "7", "train", "left giraffe"),
        ("72", "7", "train", "the tall one"),
        ("9", "8", "val", "man on the left"),
        ("9", "8", "val", "man in red"),
    ]
    assert dataset.splits == {"train": {"72"}, "val": {"9"}}


def test_photos_of_referit_have_their_number_as_name_and_no_class_of_coco(tmp_path: Path) -> None:
    path = write(tmp_path, {"test": [item(cat_id=250, refs=["sky"])]}, name="{}.jpg")
    dataset = read_simrec(path, tmp_path)
    assert [image.file_name for image in dataset.images] == ["72.jpg"]
    assert [instance.category for instance in dataset.instances] == [None]


def test_a_photo_in_two_splits_has_the_expressions_of_each(tmp_path: Path) -> None:
    other = item(bbox=[30, 6, 10, 20], mask_id=9, refs=["right giraffe"])
    dataset = read_simrec(write(tmp_path, {"train": [item()], "val": [other]}), tmp_path)
    assert [e.text for e in dataset.split("train").expressions] == ["left giraffe", "the tall one"]
    assert [e.text for e in dataset.split("val").expressions] == ["right giraffe"]


def test_without_mask_id_each_item_is_an_instance(tmp_path: Path) -> None:
    items = [item(mask_id=None), item(mask_id=None, cat_id=None)]
    dataset = read_simrec(write(tmp_path, {"train": items}), tmp_path)
    assert [(each.instance_id, each.category) for each in dataset.instances] == [
        ("train[0]", "giraffe"),
        ("train[1]", None),
    ]


def test_the_format_is_detected_and_needs_the_photos(tmp_path: Path) -> None:
    path = write(tmp_path, document())
    assert read_annotations(path, images_dir=tmp_path).splits.keys() == {"train", "val"}
    assert read_as("simrec", path, images_dir=tmp_path).splits.keys() == {"train", "val"}
    with pytest.raises(DataError, match=r"looks like SimREC, which .* use `reir eval rec`"):
        read_annotations(path)
    # Keys in another order, and sentences that are longer than what the detection reads.
    rest = {key: value for key, value in item().items() if key != "refs"}
    path = write(tmp_path, {"val": [{"refs": ["giraffe " * 500] * 10} | rest]})
    assert len(read_annotations(path, images_dir=tmp_path).expressions) == 10


def test_missing_photos_are_counted_in_one_line(tmp_path: Path) -> None:
    items = [item(), item(iid=5, mask_id=1), item(iid=5, mask_id=2), item(iid=6, mask_id=3)]
    path = write(tmp_path, {"train": items})
    with pytest.raises(DataError) as caught:
        read_simrec(path, tmp_path)
    assert str(caught.value) == (
        f"2 of 3 photos of {path} are not in {tmp_path}, e.g. COCO_train2014_000000000005.jpg; "
        f"add them, or remove their items from a copy of the file"
    )


def changed(**changes: Any) -> Callable[[], Any]:
    return lambda: {"train": [item()], "val": [item(mask_id=8) | changes]}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (dict, "has no items"),
        (lambda: {"train": []}, "has no items"),
        (lambda: [item()], "top level"),
        (lambda: {"train": item()}, "train: expected a list"),
        (lambda: {"train": ["a sentence"]}, r"train\[0\]: expected an object"),
        (changed(iid=None), r"val\[0\]\.iid"),
        (changed(iid="../72"), r"val\[0\]\.iid: .* of up to 12 digits, got '\.\./72'"),
        (changed(iid=-3), r"val\[0\]\.iid"),
        (changed(iid=10**13), r"val\[0\]\.iid"),
        (changed(bbox=[1, 2, 3]), r"val\[0\]\.bbox"),
        (changed(bbox=[1, 2, float("nan"), 3]), r"val\[0\]\.bbox"),
        (changed(bbox=[64, 2, 3, 4]), r"val\[0\]\.bbox: .* inside its photo, which has 64 x 48 px"),
        (changed(bbox=[1, 2, 0, 4]), r"val\[0\]\.bbox"),
        (changed(cat_id=80), r"val\[0\]\.cat_id: expected a whole number from 0 to 79, got 80"),
        (changed(cat_id="cat"), r"val\[0\]\.cat_id"),
        (changed(cat_id=True), r"val\[0\]\.cat_id"),
        (changed(refs=None), r"val\[0\]\.refs"),
        (changed(refs="a text"), r"val\[0\]\.refs"),
        (changed(refs=[]), r"val\[0\]\.refs: expected a list of at least one sentence"),
        (changed(refs=["the cup", " "]), r"val\[0\]\.refs\.1"),
        (changed(refs=["cup " * 2000]), r"val\[0\]\.refs\.0: expected up to 4096 characters"),
        (changed(mask_id=7, bbox=[1, 2, 3, 4]), r"val\[0\]\.mask_id: .* photo 72 and the box \(4"),
        (changed(mask_id=7, iid=9), r"val\[0\]\.mask_id"),
        (changed(mask_id=1.5), r"val\[0\]\.mask_id"),
    ],
)
def test_a_malformed_file_is_named_with_its_key(
    make: Callable[[], Any], named: str, tmp_path: Path
) -> None:
    path = write(tmp_path, make())
    with pytest.raises(DataError, match=named) as caught:
        read_simrec(path, tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_photo_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, document())
    (tmp_path / "COCO_train2014_000000000009.jpg").write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"val\[0\]\.iid: .*COCO_train2014_000000000009\.jpg"):
        read_simrec(path, tmp_path)


def as_simrec(dataset: ReferringDataset) -> dict[str, list[dict[str, Any]]]:
    """Convert a data set with splits: an item for each instance of "train", else each sentence."""
    items: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for text in dataset.expressions:
        assert text.instance_id
        assert text.split
        x1, y1, x2, y2 = dataset.instances_by_id[text.instance_id].box_xyxy_px
        made = {
            "iid": int(text.image_id),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "refs": [],
            "mask_id": int(text.instance_id),
        }
        key = text.instance_id if text.split == "train" else text.expression_id
        items[text.split].setdefault(key, made)["refs"].append(text.text)
    return {split: list(made.values()) for split, made in items.items()}


def described(dataset: ReferringDataset) -> set[tuple[Any, ...]]:
    """Return what the data set says, without the ids of expressions."""
    found = set()
    for text in dataset.expressions:
        photo = dataset.images_by_id[text.image_id]
        box = dataset.instances_by_id[text.instance_id or ""].box_xyxy_px
        rounded = tuple(round(value, 3) for value in box)
        size = (photo.width_px, photo.height_px)
        found.add((text.split, text.text, text.instance_id, photo.file_name, *size, rounded))
    return found


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="needs the shared annotations: set REIR_DATA")
@pytest.mark.parametrize(
    ("name", "split_by"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")]
)
def test_a_converted_data_set_equals_the_original(name: str, split_by: str, tmp_path: Path) -> None:
    assert DATA is not None
    photos = DATA / "photos_masks" / "images"
    original = read_refer(DATA / "photos_masks" / "refer_layout" / name, split_by)
    for image_id in {text.image_id for text in original.expressions}:
        (tmp_path / f"COCO_train2014_{int(image_id):012}.jpg").symlink_to(
            photos / f"{int(image_id):012}.jpg"
        )
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(as_simrec(original)))
    found = read_simrec(path, tmp_path)
    assert described(found) == described(original)
    assert len(found.expressions) == len(original.expressions)
    assert found.splits.keys() == {text.split for text in original.expressions}

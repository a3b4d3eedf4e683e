"""What learning without boxes sees, from every format: the same whatever the boxes are."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reir.errors import DataError
from reir_training.config import DataConfig, DataSource
from reir_training.data.examples import read_dataset
from reir_training.data.leakage import training_photos
from reir_training.data.sentence_groups import (
    PhotoSentences,
    held_out_photos,
    read_run_sentences,
    sentence_groups,
)

SIZE_PX = (100, 50)
# Photo -> instance -> sentences. Two instances of photo 3 are described by the same sentence.
WRITTEN: Mapping[int, Mapping[int, tuple[str, ...]]] = {
    1: {10: ("the red cup", "left cup", "cup"), 11: ("the plate",)},
    2: {20: ("a man in blue",), 21: ("a man in red", "tall man")},
    3: {30: ("the dog",), 31: ("the dog",)},
    4: {40: ("the tree", "tree on the left")},
}
VAL = (3,)
Boxes = Mapping[int, tuple[float, float, float, float]]
"""Instance -> [left, top, width, height] in pixels."""


def boxes(seed: int) -> Boxes:
    """Return a random box inside the photo for each instance."""
    rng = np.random.default_rng(seed)
    found = {}
    for number in (number for instances in WRITTEN.values() for number in instances):
        x, y = (int(rng.integers(0, side - 10)) for side in SIZE_PX)
        found[number] = (x, y, int(rng.integers(1, 100 - x)), int(rng.integers(1, 50 - y)))
    return found


def rows() -> list[tuple[int, int, str]]:
    """Return (photo, instance, sentence), with the sentences of an instance apart in the file."""
    every = [
        (at, photo, number, text)
        for photo, instances in WRITTEN.items()
        for number, texts in instances.items()
        for at, text in enumerate(texts)
    ]
    return [(photo, number, text) for _, photo, number, text in sorted(every)]


def split_of(photo: int) -> str:
    return "val" if photo in VAL else "train"


def instances_json(xywh: Boxes) -> dict[str, Any]:
    sizes = dict(zip(("width", "height"), SIZE_PX, strict=True))
    return {
        "images": [{"id": each, "file_name": f"{each}.jpg"} | sizes for each in WRITTEN],
        "annotations": [
            {"id": number, "image_id": photo, "category_id": 1, "bbox": list(xywh[number])}
            for photo, instances in WRITTEN.items()
            for number in instances
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }


def write_photos_format(folder: Path, xywh: Boxes) -> DataSource:
    (folder / "instances.json").write_text(json.dumps(instances_json(xywh)))
    texts = [
        {"id": at, "image_id": photo, "ann_id": number, "bbox": list(xywh[number])}
        | {"kind": "long", "expression": text}
        for at, (photo, number, text) in enumerate(rows())
    ]
    train = [photo for photo in WRITTEN if photo not in VAL]
    document = {"expressions": texts, "splits": {"train": train, "val": list(VAL)}}
    (folder / "expressions.json").write_text(json.dumps(document))
    return DataSource(format="photos", path=folder)


def write_reircoco_format(folder: Path, xywh: Boxes) -> DataSource:
    images, annotations = [], []
    for photo, instances in WRITTEN.items():
        for number, texts in instances.items():
            images.append(
                {"id": number, "file_name": f"{photo}.jpg", "expressions": list(texts)}
                | dict(zip(("width", "height"), SIZE_PX, strict=True))
            )
            annotations.append({"id": number, "image_id": number, "bbox": list(xywh[number])})
    document = {"images": images, "annotations": annotations}
    (folder / "reircoco_train.json").write_text(json.dumps(document))
    return DataSource(format="reircoco", path=folder, held_out=1)


def write_refer_format(folder: Path, xywh: Boxes) -> DataSource:
    (folder / "instances.json").write_text(json.dumps(instances_json(xywh)))
    refs = [
        {"split": split_of(photo), "image_id": photo, "ann_id": number}
        | {"sentences": [{"sent_id": 100 * number + at, "sent": text} for at, text in texts]}
        for photo, instances in WRITTEN.items()
        for number, texts in ((number, list(enumerate(t))) for number, t in instances.items())
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    return DataSource(format="refer", path=folder)


def write_refer_json_format(folder: Path, xywh: Boxes) -> DataSource:
    entries = [
        {"img_id": f"{photo}_{number}", "sents": text, "bbox": list(xywh[number])}
        | dict(zip(("width", "height"), SIZE_PX, strict=True))
        for photo, number, text in rows()
    ]
    (folder / "refcoco.json").write_text(json.dumps(entries))
    return DataSource(format="refer_json", path=folder, held_out=1)


def write_simrec_format(folder: Path, xywh: Boxes) -> DataSource:
    found: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for photo, instances in WRITTEN.items():
        for number, texts in instances.items():
            item = {"iid": photo, "bbox": list(xywh[number]), "mask_id": number}
            split = split_of(photo)
            parts = [list(texts)] if split == "train" else [[text] for text in texts]
            found[split] += [item | {"refs": part} for part in parts]
    (folder / "refcoco.json").write_text(json.dumps(found))
    return DataSource(format="simrec", path=folder)


def write_sorec_format(folder: Path, xywh: Boxes) -> DataSource:
    entries = [
        {"image": f"{photo}.jpg", "bbox": list(xywh[number]), "ref": text, "id": at}
        for at, (photo, number, text) in enumerate(rows())
    ]
    (folder / "trainS.json").write_text(json.dumps(entries))
    return DataSource(format="sorec", path=folder, held_out=1)


def write_sentences_format(folder: Path, xywh: Boxes | None) -> DataSource:
    with (folder / "sentences.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["photo", "sentence", "x1", "y1", "x2", "y2"])
        for photo, number, text in rows():
            box: tuple[float | str, ...] = ("",) * 4
            if xywh:
                x, y, w, h = xywh[number]
                box = (x, y, x + w, y + h)
            table.writerow([f"{photo}.jpg", text, *box])
    return DataSource(format="sentences", path=folder, held_out=1)


WITH_INSTANCES = (
    write_photos_format,
    write_reircoco_format,
    write_refer_format,
    write_refer_json_format,
    write_simrec_format,
)
KNOWN_BY_BOX = (write_sorec_format, write_sentences_format)
Write = Callable[[Path, Boxes], DataSource]
every_format = pytest.mark.parametrize(
    "write", [*WITH_INSTANCES, *KNOWN_BY_BOX], ids=lambda write: write.__name__
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with photos, into which the functions above write annotations."""
    (tmp_path / "images").mkdir()
    for photo in WRITTEN:
        Image.new("RGB", SIZE_PX).save(tmp_path / "images" / f"{photo}.jpg")
    return tmp_path


def content(photos: list[PhotoSentences]) -> dict[int, set[tuple[str, ...]]]:
    return {int(photo.path.stem): {tuple(sorted(g)) for g in photo.groups} for photo in photos}


@every_format
def test_wrong_boxes_change_nothing(write: Write, folder: Path) -> None:
    true = sentence_groups(write(folder, boxes(0)))
    for seed in range(1, 6):
        assert sentence_groups(write(folder, boxes(seed))) == true
    same_for_all = dict.fromkeys(boxes(0), (1, 2, 3, 4))
    assert sentence_groups(write(folder, same_for_all)) == true
    assert "box" not in " ".join(field.name for field in fields(PhotoSentences))


@every_format
def test_wrong_boxes_are_seen_where_boxes_are_read(write: Write, folder: Path) -> None:
    """The test above would be worthless if the wrong boxes did not reach the reader."""
    true = [each.box_xyxy_px for each in read_dataset(write(folder, boxes(0))).instances]
    assert [each.box_xyxy_px for each in read_dataset(write(folder, boxes(1))).instances] != true


@pytest.mark.parametrize("write", WITH_INSTANCES, ids=lambda write: write.__name__)
def test_sentences_of_one_instance_are_a_group(write: Write, folder: Path) -> None:
    photos = sentence_groups(write(folder, boxes(0)))
    assert content(photos) == {
        photo: {tuple(sorted(texts)) for texts in instances.values()}
        for photo, instances in WRITTEN.items()
    }
    by_number = {int(photo.path.stem): photo for photo in photos}
    assert len(by_number[3].groups) == 2  # the same sentence about two instances
    for number, photo in by_number.items():
        assert photo.path == folder / "images" / f"{number}.jpg"
        assert photo.size_px == SIZE_PX


@pytest.mark.parametrize("write", KNOWN_BY_BOX, ids=lambda write: write.__name__)
def test_formats_that_know_instances_by_their_boxes_have_groups_of_one(
    write: Write, folder: Path
) -> None:
    photos = sentence_groups(write(folder, boxes(0)))
    found = {int(p.path.stem): sorted(g for (g,) in p.groups) for p in photos}
    assert found == {
        photo: sorted(text for texts in instances.values() for text in texts)
        for photo, instances in WRITTEN.items()
    }


def test_a_list_without_boxes_gives_the_same_as_one_with_boxes(folder: Path) -> None:
    with_boxes = sentence_groups(write_sentences_format(folder, boxes(0)))
    assert sentence_groups(write_sentences_format(folder, None)) == with_boxes


@every_format
def test_splits_are_those_of_training_with_boxes(write: Write, folder: Path) -> None:
    source = write(folder, boxes(0))
    photos = sentence_groups(source)
    assert {(p.path, p.split, p.gallery, p.size_px) for p in photos} == {
        (p.path, p.split, p.gallery, p.size_px) for p in training_photos(DataConfig(data=(source,)))
    }
    assert sum(photo.split == "val" for photo in photos) == 1


def test_photos_set_aside_for_tests_are_not_read(folder: Path) -> None:
    source = write_sentences_format(folder, None).model_copy(update={"test": 2})
    assert sorted(photo.split for photo in sentence_groups(source)) == ["train", "val"]


def test_held_out_photos_have_boxes_if_the_data_has(folder: Path) -> None:
    source = write_simrec_format(folder, boxes(0))
    (photo,) = held_out_photos(source)
    assert photo.path.name == "3.jpg"
    assert photo.boxes.shape == (2, 4)
    x, y, w, h = boxes(0)[30]
    np.testing.assert_allclose(photo.boxes[0] * [100, 50, 100, 50], [x, y, x + w, y + h], rtol=1e-5)
    assert [text.text for text in photo.expressions] == ["the dog", "the dog"]
    assert held_out_photos(write_sentences_format(folder, None)) == []
    (photo,) = held_out_photos(write_sentences_format(folder, boxes(0)))
    assert photo.expressions


def test_a_run_learns_from_all_sources_and_from_no_photo_that_is_held_out(folder: Path) -> None:
    sources = (write_sentences_format(folder, None), write_simrec_format(folder, boxes(0)))
    config = DataConfig(data=sources, exclude_evaluation=True)
    train, held_out = read_run_sentences(config)
    # Photo 3 is held out by the second source, so the first one must not train on it either.
    one = next(p.path for p in sentence_groups(sources[0]) if p.split == "val")
    expected = [p for p in (1, 2, 4) if f"{p}.jpg" != one.name]
    assert sorted(int(photo.path.stem) for photo in train) == sorted(2 * expected)
    assert {photo.split for photo in train} == {"train"}
    assert [photo.path.name for photo in held_out] == ["3.jpg"]


def test_photos_of_an_evaluation_set_are_refused_or_excluded(folder: Path) -> None:
    simrec = write_simrec_format(folder, boxes(0))
    evaluation = (simrec.model_copy(update={"split": "train"}),)
    with pytest.raises(DataError, match=r"3 photos of the evaluation set .* would be trained on"):
        read_run_sentences(DataConfig(data=(simrec,), evaluation=evaluation))
    config = DataConfig(data=(simrec,), evaluation=evaluation, exclude_evaluation=True)
    with pytest.raises(DataError, match="all photos with sentences are held out"):
        read_run_sentences(config)


def test_a_source_without_sentences_is_named(folder: Path) -> None:
    write_photos_format(folder, boxes(0))
    for source in (
        DataSource(format="coco", path=folder),
        DataSource(format="photos", path=folder, task="detection"),
    ):
        with pytest.raises(DataError, match=r"has no sentence to learn from"):
            sentence_groups(source)


def test_a_sentence_about_a_crowd_is_kept(folder: Path) -> None:
    """Without boxes, nobody knows which annotation is one of a crowd."""
    source = write_photos_format(folder, boxes(0))
    before = sentence_groups(source)
    document = json.loads((folder / "instances.json").read_text())
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    (folder / "instances.json").write_text(json.dumps(document))
    assert sentence_groups(source) == before

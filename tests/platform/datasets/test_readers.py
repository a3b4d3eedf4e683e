"""One door to the formats: what lies at a path is read as what it is."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from reir.datasets import read_annotations, read_as, read_coco_images, write_reircoco
from reir.errors import DataError
from reir_testing import data_dir
from reir_testing.photo_sets import three_photos
from reir_testing.scenes import make_scenes, save_scenes

DATA = data_dir()


def refer_folder(folder: Path, *split_by: str) -> Path:
    image = {"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}
    box = {"id": 2, "image_id": 1, "bbox": [1, 1, 5, 5], "category_id": 3}
    document = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "cup"}]}
    (folder / "instances.json").write_text(json.dumps(document))
    for name in split_by:
        sentence = {"sent_id": 4, "sent": f"by {name}"}
        ref = {"split": "val", "image_id": 1, "ann_id": 2, "sentences": [sentence]}
        (folder / f"refs({name}).p").write_bytes(pickle.dumps([ref]))
    return folder


def test_a_json_object_is_reircoco_and_a_list_the_json_form(tmp_path: Path) -> None:
    write_reircoco(three_photos(tmp_path), tmp_path / "val.json")
    assert len(read_annotations(tmp_path / "val.json").expressions) == 4
    entry = {"img_id": "a_1", "sents": "cup", "bbox": [1, 1, 5, 5], "width": 9, "height": 9}
    (tmp_path / "list.json").write_text("\n " + json.dumps([entry]))
    assert read_annotations(tmp_path / "list.json").images[0].file_name == "a.jpg"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_does_not_change_the_format(tmp_path: Path, encoding: str) -> None:
    entry = {"img_id": "a_1", "sents": "cup", "bbox": [1, 1, 5, 5], "width": 9, "height": 9}
    (tmp_path / "list.json").write_text("\n" + json.dumps([entry]), encoding)
    assert read_annotations(tmp_path / "list.json").images[0].file_name == "a.jpg"
    for name, content in (("SOREC", [{"ref": "cup"}]), ("SimREC", {"val": [{"refs": ["cup"]}]})):
        (tmp_path / "photos.json").write_text(json.dumps(content), encoding)
        with pytest.raises(DataError, match=f"looks like {name}, which is read together with"):
            read_annotations(tmp_path / "photos.json")


def test_a_folder_is_told_by_its_files(tmp_path: Path) -> None:
    dataset = read_annotations(refer_folder(tmp_path, "unc"))
    assert [text.text for text in dataset.expressions] == ["by unc"]
    save_scenes(tmp_path / "photos", {"val": make_scenes(1, 1)})
    assert set(read_annotations(tmp_path / "photos").splits) == {"val"}


def test_which_of_several_must_be_said(tmp_path: Path) -> None:
    folder = refer_folder(tmp_path, "umd", "google")
    with pytest.raises(DataError, match="splits by umd and google; choose one with --split-by"):
        read_annotations(folder)
    assert read_annotations(folder, "google").expressions[0].text == "by google"
    assert read_as("refer", folder, "umd").expressions[0].text == "by umd"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains none of refs\(unc\|umd\|google\)\.p, grefs"):
        read_annotations(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*val\.json: No such file"):
        read_annotations(tmp_path / "val.json")


def test_photos_of_a_captions_file(tmp_path: Path) -> None:
    image = {"id": 7, "file_name": "7.jpg", "width": 9, "height": 8}
    (tmp_path / "captions.json").write_text(json.dumps({"images": [image], "annotations": []}))
    dataset = read_coco_images(tmp_path / "captions.json")
    assert [(i.image_id, i.width_px, i.height_px) for i in dataset.images] == [("7", 9, 8)]


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="needs the shared annotations: set REIR_DATA")
@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_real_refer_folders_need_no_hint(name: str) -> None:
    assert DATA is not None
    dataset = read_annotations(DATA / "photos_masks" / "refer_layout" / name)
    assert dataset.expressions
    assert dataset.splits

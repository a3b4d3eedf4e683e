"""`reir.datasets.grefcoco`: expressions about several instances, one or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reir.datasets import read_annotations, read_grefcoco
from reir.errors import DataError

REFS = "grefs(unc).json"


def ref(number: int, ann_id: list[int], **changes: Any) -> dict[str, Any]:
    sentences = [{"sent_id": number, "sent": f"sentence {number}", "raw": "unused"}]
    plain = {"ref_id": number, "image_id": 1, "split": "val", "file_name": "1.jpg"}
    absent = {"no_target": ann_id == [-1]}
    return plain | absent | {"ann_id": ann_id, "sentences": sentences} | changes


def write(folder: Path, *refs: dict[str, Any]) -> Path:
    size = {"width": 40, "height": 30}
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg", **size} for n in (1, 2, 3)],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "bbox": [number, 1, 5, 5],
                "category_id": 3,
                "segmentation": [[number, 1, number + 5, 1, number + 5, 6, number, 6]],
            }
            for number, image_id in ((10, 1), (11, 1), (12, 2))
        ],
        "categories": [{"id": 3, "name": "cup"}],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    (folder / REFS).write_text(json.dumps(refs))
    return folder


def test_one_several_and_no_targets(tmp_path: Path) -> None:
    write(
        tmp_path,
        ref(1, [10]),
        ref(2, [10, 11]),
        ref(3, [-1], split="testA"),
        ref(4, [12], image_id=2, split="testA"),
    )
    dataset = read_annotations(tmp_path)
    assert [(text.query, text.image_id, text.instance_id) for text in dataset.expressions] == [
        ("1/1", "1", "10"),
        ("2/2", "1", "10"),
        ("2/2", "1", "11"),
        ("3/3", "1", None),
        ("4/4", "2", "12"),
    ]
    # Photo 3 is in instances.json only.
    assert [photo.image_id for photo in dataset.images] == ["1", "2"]
    assert {name: sorted(ids) for name, ids in dataset.splits.items()} == {
        "val": ["1"],
        "testA": ["1", "2"],
    }
    assert [text.query for text in dataset.split("testA").expressions] == ["3/3", "4/4"]
    assert {instance.mask for instance in dataset.instances} == {None}
    masked = read_grefcoco(tmp_path, masks=True)
    assert all(instance.mask is not None for instance in masked.instances)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 9}, r"\[1\]\.image_id: expected the id of a photo in .*instances\.json"),
        ({"ann_id": [99]}, r"\[1\]\.ann_id: expected ids of annotations of its photo in"),
        ({"ann_id": 10}, r"\[1\]\.ann_id: expected a list of ids, got 10"),
        ({"ann_id": []}, r"\[1\]\.ann_id: expected at least one id"),
        ({"ann_id": [10, 10]}, r"\[1\]\.ann_id: expected at least one id, and none of them twice"),
        ({"ann_id": [-1]}, r"\[1\]\.ann_id: expected ids of annotations, got \[-1\]"),
        ({"no_target": True}, r"\[1\]\.ann_id: expected \[-1\], since no_target is true"),
        ({"no_target": "yes"}, r"\[1\]\.no_target: expected 0, 1, false or true, got 'yes'"),
        ({"sentences": None}, r"\[1\]\.sentences: expected a list, got None"),
        ({"sentences": [{"sent_id": 2, "sent": " "}]}, r"\[1\]\.sentences\[0\]\.sent: expected a"),
        ({"sentences": [{"sent": "cup"}]}, r"\[1\]\.sentences\[0\]\.sent_id: expected an id"),
        ({"split": None}, r"\[1\]\.split: expected a text"),
        ({"ann_id": [12]}, r"\[1\]\.ann_id: expected ids of annotations of its photo in"),
        ({"ref_id": 1, "sentences": ref(1, [10])["sentences"]}, r"'1/1/0': this id is used twice"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, ref(1, [10]), ref(2, [11]) | changes)
    with pytest.raises(DataError, match=message) as caught:
        read_grefcoco(tmp_path)
    assert REFS in str(caught.value)

"""`reir.datasets.photos` on small files and on the real ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reir.datasets import read_caption_pairs, read_human_expressions, read_photos
from reir.errors import DataError
from reir_testing import data_dir

DATA = data_dir()
needs_data = pytest.mark.skipif(DATA is None, reason="no REIR_DATA and no ../shared/data")


def write_folder(folder: Path, **changes: Any) -> Path:
    """Two photos, one cat in each; `changes` replace keys of the one expression."""
    instances = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in (1, 2)],
        "annotations": [
            {"id": 10 * i, "image_id": i, "category_id": 3, "bbox": [i, 2, 10, 20]} for i in (1, 2)
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }
    expression = {
        "id": 7,
        "image_id": 1,
        "ann_id": 10,
        "category": "cat",
        "bbox": [1, 2, 10, 20],
        "kind": "long",
        "expression": "the cat",
    }
    expressions = {"splits": {"train": [1], "val": [2]}, "expressions": [expression | changes]}
    human = [
        {
            "image_id": 2,
            "expression": "the cat",
            "bbox": [2, 2, 9, 9],
            "categories": {"empty_case": False},
        },
        {"image_id": 2, "expression": "the dog", "categories": {"empty_case": True}},
    ]
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "expressions.json").write_text(json.dumps(expressions))
    (folder / "refcocos_human.json").write_text(json.dumps(human))
    return folder


def test_expressions_refer_to_annotated_instances(tmp_path: Path) -> None:
    dataset = read_photos(write_folder(tmp_path))
    (expression,) = dataset.expressions
    assert (expression.expression_id, expression.instance_id, expression.kind) == (
        "7",
        "10",
        "long",
    )
    assert [len(dataset.split(name).images) for name in ("train", "val")] == [1, 1]
    assert not dataset.split("val").expressions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ann_id": 11}, r"expressions\[0\]\.ann_id: expected the id of an annotation in .*got 11"),
        ({"bbox": [1, 2, 10, 21]}, r"expressions\[0\]\.bbox: expected the box of annotation 10"),
        ({"expression": None}, r"expressions\[0\]\.expression: expected a text.*got None"),
        ({"image_id": 2}, r"expression '7': is about image '2' but its instance"),
    ],
    ids=["instance", "box", "text", "photo"],
)
def test_malformed_expression_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_photos(write_folder(tmp_path, **changes))
    assert str(tmp_path / "expressions.json") in str(caught.value)


def test_human_expressions_keep_those_without_instance(tmp_path: Path) -> None:
    dataset = read_human_expressions(write_folder(tmp_path))
    present, absent = dataset.expressions
    assert dataset.instances_by_id[str(present.instance_id)].box_xyxy_px == (2, 2, 11, 11)
    assert absent.instance_id is None
    assert [image.image_id for image in dataset.images] == ["2"]


def test_malformed_caption_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    pair = {"type": "swap_att", "image_id": 1, "caption": "a", "negative_caption": "b"}
    path.write_text(json.dumps([pair, pair | {"type": ""}]))
    with pytest.raises(DataError, match=r"pairs\.json: \[1\]\.type: expected a text"):
        read_caption_pairs(path)


@needs_data
@pytest.mark.data
def test_real_photos() -> None:
    assert DATA is not None
    dataset = read_photos(DATA / "photos")
    assert (len(dataset.images), len(dataset.instances)) == (2333, 21662)
    counts = {
        name: (len(part.images), len(part.expressions), len(part.of_kind("long").expressions))
        for name, part in ((name, dataset.split(name)) for name in dataset.splits)
    }
    assert counts == {"train": (2082, 12126, 8032), "val": (251, 873, 584)}
    assert len(dataset.split("val").first_expressions().expressions) == 584


@needs_data
@pytest.mark.data
def test_real_human_sets() -> None:
    assert DATA is not None
    human = read_human_expressions(DATA / "photos")
    assert (len(human.images), len(human.expressions)) == (283, 313)
    assert len(human.with_targets().expressions) == len(human.instances) == 303
    kinds = Counter(p.kind for p in read_caption_pairs(DATA / "photos" / "sugarcrepe_pairs.json"))
    assert (sum(kinds.values()), kinds["swap_att"], kinds["replace_rel"]) == (3434, 261, 698)

"""Hits as COCO, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from reir.errors import ConfigError
from reir.export import export
from reir.images import rle
from reir.results import Hit, SearchResult

MASK = np.zeros((60, 80), dtype=bool)
MASK[15:45, 8:40] = True


def hit(folder: Path, number: int, photo: str, *, masked: bool) -> Hit:
    return Hit(
        instance_id=f"{photo}#{number}",
        image_id=photo,
        uri=(folder / photo).as_uri(),
        box=(0.1, 0.25, 0.5, 0.75),
        score=0.5 - number / 10,
        objectness=0.9,
        presence=0.8 if masked else None,
        mask=rle.encode(MASK) if masked else None,
    )


@pytest.fixture
def result(tmp_path: Path) -> SearchResult:
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "b, c.png")
    return SearchResult(
        expression='the "red" box, left',
        gallery="g",
        version="v",
        hits=(
            hit(tmp_path, 0, "a.png", masked=True),
            hit(tmp_path, 1, "b, c.png", masked=False),
            hit(tmp_path, 2, "a.png", masked=False),
        ),
        timings_ms={},
    )


def test_coco_is_read_by_pycocotools(result: SearchResult, tmp_path: Path) -> None:
    (tmp_path / "hits.json").write_text(export(result, "coco"))
    found = COCO(tmp_path / "hits.json")
    assert [each["name"] for each in found.loadCats(found.getCatIds())] == [result.expression]
    images = found.loadImgs(found.getImgIds())
    assert [(each["file_name"], each["width"], each["height"]) for each in images] == [
        ("a.png", 80, 60),
        ("b, c.png", 200, 100),
    ]
    first, second, third = found.loadAnns(found.getAnnIds())
    assert first["bbox"] == [8, 15, 32, 30]
    assert second["bbox"] == [20, 25, 80, 50]
    assert [each["image_id"] for each in (first, second, third)] == [1, 2, 1]
    assert first["area"] == 960
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]).astype(bool), MASK)
    assert "segmentation" not in second
    # It can be evaluated as a result, which needs a score.
    assert len(found.loadRes([first, second]).anns) == 2


def test_a_mask_that_was_stored_smaller_gets_the_size_of_its_photo(
    result: SearchResult,
) -> None:
    small = rle.encode(MASK[::2, ::2])
    (first, *_) = json.loads(
        export(
            SearchResult(**{**vars(result), "hits": (Hit(**{**vars(result[0]), "mask": small}),)}),
            "coco",
        )
    )["annotations"]
    assert first["segmentation"]["size"] == [60, 80]
    assert first["area"] == pytest.approx(960, rel=0.1)


def test_csv_quotes_names_and_leaves_out_what_is_unknown(result: SearchResult) -> None:
    rows = list(csv.DictReader(io.StringIO(export(result, "csv"))))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert {row["expression"] for row in rows} == {result.expression}
    assert rows[1]["image_id"] == "b, c.png"
    assert [float(rows[0][side]) for side in ("x1", "y1", "x2", "y2")] == [0.1, 0.25, 0.5, 0.75]
    assert [row["presence"] for row in rows] == ["0.8", "", ""]


def test_json_lines_hold_the_hits_of_the_answer(result: SearchResult) -> None:
    lines = [json.loads(line) for line in export(result, "jsonl").splitlines()]
    assert [line["rank"] for line in lines] == [1, 2, 3]
    assert lines[0]["mask"]["size"] == [60, 80]
    assert [line["instance_id"] for line in lines] == [each.instance_id for each in result]


def test_an_answer_without_hits_is_no_error(result: SearchResult) -> None:
    empty = SearchResult(**{**vars(result), "hits": ()})
    assert json.loads(export(empty, "coco"))["annotations"] == []
    assert len(export(empty, "csv").splitlines()) == 1
    assert export(empty, "jsonl") == ""


def test_an_unknown_format_is_named(result: SearchResult) -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'json'; allowed: coco, csv, jsonl"):
        export(result, "json")

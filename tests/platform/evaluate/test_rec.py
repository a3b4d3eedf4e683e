"""REC from photos to figures, with answers worked out by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from reir.datasets import Expression, ReferringDataset
from reir.errors import DataError
from reir.evaluate import evaluate_rec
from reir.images.boxes import elementwise_iou
from reir_testing import ChoosingFakeEncoder, FakeEncoder
from reir_testing.photo_sets import draw_photo_set, three_photos


def with_splits(data: ReferringDataset, **splits: set[str]) -> ReferringDataset:
    return replace(data, splits={name: frozenset(ids) for name, ids in splits.items()})


def test_known_answers(tmp_path: Path) -> None:
    report = evaluate_rec(FakeEncoder(), three_photos(tmp_path), tmp_path).to_dict()
    assert list(report["splits"]) == ["drawn"]
    split = report["splits"]["drawn"]
    assert (split["photos"], split["expressions"]) == (2, 4)
    # "orange" is asked about the yellow shape; the green one beside it answers, with no overlap
    green, yellow = (60, 20, 90, 100), (100, 20, 120, 40)
    assert elementwise_iou(green, yellow) == 0
    assert split["query_free"] == {"p50": 75, "p70": 75, "p90": 75, "mean_iou": 75}
    low, high = split["intervals"]["query_free"]["p50"]
    assert 0 <= low <= 75 <= high <= 100
    assert split["by_expression"] is None
    assert "an expression cannot choose" in report["left_out"]["choice by expression"]
    assert report["counts"]["photos"] == 2  # the third has no expression: it is not even read


def test_thresholds_and_mean_iou(tmp_path: Path) -> None:
    data = draw_photo_set(tmp_path, [[("red", (10, 10, 50, 90), "red")]])
    (instance,) = data.instances
    wider = replace(instance, box_xyxy_px=(10, 10, 60, 90))  # IoU of 40 / 50
    figures = evaluate_rec(FakeEncoder(), replace(data, instances=(wider,)), tmp_path).to_dict()
    assert figures["splits"]["drawn"]["query_free"] == pytest.approx(
        {"p50": 100, "p70": 100, "p90": 0, "mean_iou": 80}
    )


def test_by_expression_sees_what_the_index_dropped(tmp_path: Path) -> None:
    data = draw_photo_set(
        tmp_path,
        [
            [("red", (10, 10, 100, 110), "red"), ("blue", (120, 10, 130, 20), "blue")],
            [("green", (10, 10, 100, 110), "green"), ("cyan", (120, 10, 130, 20), "green")],
        ],
    )
    report = evaluate_rec(ChoosingFakeEncoder(num_candidates=1), data, tmp_path)
    (split,) = report.splits
    assert split.query_free is not None
    assert split.query_free["p50"].mean == 50  # only the large ones are kept
    assert split.by_expression is not None
    assert split.by_expression["p50"].mean == 75  # blue is seen, cyan is not green


def test_an_expression_is_answered_in_its_own_turn(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    backwards = data.with_expressions(data.expressions[::-1])
    for each in (data, backwards):
        (split,) = evaluate_rec(ChoosingFakeEncoder(), each, tmp_path).splits
        assert split.by_expression == split.query_free


def test_all_splits_but_train_are_measured_each_with_its_own_expressions(tmp_path: Path) -> None:
    data = with_splits(three_photos(tmp_path), train={"2.png"}, testA={"0.png"}, testB={"1.png"})
    report = evaluate_rec(FakeEncoder(), data, tmp_path).to_dict()
    assert {name: s["query_free"]["p50"] for name, s in report["splits"].items()} == {
        "testA": 100,
        "testB": 50,
    }
    only = evaluate_rec(FakeEncoder(), data, tmp_path, splits=["testB"]).to_dict()
    assert list(only["splits"]) == ["testB"]
    assert only["counts"]["photos"] == 1
    with pytest.raises(DataError, match="no split 'testC'"):
        evaluate_rec(FakeEncoder(), data, tmp_path, splits=["testC"])
    with pytest.raises(DataError, match="none of 0 expressions describes an instance"):
        evaluate_rec(FakeEncoder(), data, tmp_path, splits=["train"])


def test_train_is_only_measured_by_request(tmp_path: Path) -> None:
    data = with_splits(three_photos(tmp_path), train={"0.png", "1.png"})
    with pytest.raises(DataError, match=r"drawn has no other split than 'train'.*give 'train'"):
        evaluate_rec(FakeEncoder(), data, tmp_path)
    report = evaluate_rec(FakeEncoder(), data, tmp_path, splits=["train"])
    assert [(split.name, split.num_photos) for split in report.splits] == [("train", 2)]


def test_splits_that_divide_expressions_rather_than_photos(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    texts = [replace(text, split=name) for text, name in zip(data.expressions, "vvtt", strict=True)]
    data = with_splits(data.with_expressions(texts), v={"0.png", "1.png"}, t={"0.png", "1.png"})
    report = evaluate_rec(FakeEncoder(), data, tmp_path).to_dict()
    assert {name: s["query_free"]["p50"] for name, s in report["splits"].items()} == {
        "v": 100,
        "t": 50,
    }


def test_kinds_of_expressions_are_told_apart(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    texts = [
        replace(text, kind="long" if text.text == "orange" else "short")
        for text in data.expressions
    ]
    data = with_splits(data.with_expressions(texts), val={"0.png", "1.png"})
    report = evaluate_rec(FakeEncoder(), data, tmp_path).to_dict()
    assert {name: s["query_free"]["p50"] for name, s in report["splits"].items()} == {
        "val short": 100,
        "val long": 0,
    }


def test_only_the_first_photos_of_each_split(tmp_path: Path) -> None:
    data = with_splits(three_photos(tmp_path), a={"0.png", "1.png"}, b={"1.png"})
    report = evaluate_rec(FakeEncoder(), data, tmp_path, max_photos=1)
    assert [split.num_expressions for split in report.splits] == [2, 2]


def test_expressions_about_nothing_are_no_queries(tmp_path: Path) -> None:
    data = three_photos(tmp_path)
    absent = Expression(expression_id="x", image_id="2.png", instance_id=None, text="a zebra")
    report = evaluate_rec(
        FakeEncoder(), data.with_expressions([*data.expressions, absent]), tmp_path
    )
    assert report.splits[0].num_expressions == 4


def test_table_fits_a_terminal_of_100_columns(tmp_path: Path) -> None:
    data = with_splits(three_photos(tmp_path), testA={"0.png"}, testB={"1.png"})
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(evaluate_rec(ChoosingFakeEncoder(), data, tmp_path).table())
    text = capture.get()
    assert text.index("Query-free: ") < text.index("By expression: ")
    rows = [line.split()[:4] for line in text.splitlines()]
    assert rows.count(["testB", "2", "50.0", "[50.0-50.0]"]) == 2
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text

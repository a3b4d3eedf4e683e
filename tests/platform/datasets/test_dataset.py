"""`reir.datasets.dataset`: what a dataset refuses, and what its views keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reir.datasets import Expression, ReferringDataset, ReferringImage, ReferringInstance
from reir.errors import DataError


def dataset() -> ReferringDataset:
    """Two photos; the first has two instances with three expressions, one describes nothing."""
    return ReferringDataset(
        source="made.json",
        images=tuple(
            ReferringImage(image_id=i, file_name=f"{i}.jpg", width_px=100, height_px=50)
            for i in ("a", "b")
        ),
        instances=tuple(
            ReferringInstance(instance_id=str(n), image_id="a", box_xyxy_px=(n, n, n + 9, n + 9))
            for n in (1, 2)
        ),
        expressions=(
            Expression(expression_id="1", image_id="a", instance_id="1", text="one", kind="long"),
            Expression(expression_id="2", image_id="a", instance_id="1", text="uno", kind="short"),
            Expression(expression_id="3", image_id="a", instance_id="2", text="two", split="val"),
            Expression(expression_id="4", image_id="b", instance_id=None, text="none"),
        ),
        splits={"train": frozenset("a"), "val": frozenset("ab")},
    )


def texts(data: ReferringDataset) -> list[str]:
    return [expression.text for expression in data.expressions]


def test_split_keeps_its_photos_and_its_own_expressions() -> None:
    train, val = dataset().split("train"), dataset().split("val")
    assert [image.image_id for image in train.images] == ["a"]
    assert texts(train) == ["one", "uno"]  # "two" belongs to val although the photo is shared
    assert texts(val) == ["one", "uno", "two", "none"]
    assert len(val.instances) == 2
    assert train.source == "made.json[train]"
    assert {text.split for text in val.expressions} == {None}  # its photos may be split again


def test_unknown_split_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no split 'vla', it has \['train', 'val'\].*'val'\?"):
        dataset().split("vla")


def test_views_choose_expressions_and_keep_the_gallery() -> None:
    assert texts(dataset().first_expressions()) == ["one", "two", "none"]
    assert texts(dataset().of_kind("short")) == ["uno"]
    assert texts(dataset().with_targets()) == ["one", "uno", "two"]
    assert len(dataset().of_kind("short").images) == 2


def test_a_dataset_may_be_empty() -> None:
    assert not ReferringDataset(source="x", images=(), instances=(), expressions=()).splits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_id": "9"}, "expression '1': unknown instance '9'"),
        ({"image_id": "z"}, "expression '1': unknown image 'z'"),
        ({"image_id": "b"}, "is about image 'b' but its instance '1' is in image 'a'"),
        ({"expression_id": "2"}, "expression '2': this id is used twice"),
        ({"text": " \n"}, "the text is blank"),
    ],
    ids=["instance", "image", "other-image", "twice", "blank"],
)
def test_wrong_expression_is_named(changes: dict[str, str], message: str) -> None:
    first, *others = dataset().expressions
    with pytest.raises(DataError, match=rf"made\.json: .*{message}"):
        replace(dataset(), expressions=(replace(first, **changes), *others))


@pytest.mark.parametrize(
    "box",
    [(5, 5, 5, 9), (100, 0, 110, 9), (5, 5, float("nan"), 9), (-9, 0, 0, 9)],
    ids=["no-area", "right-of-photo", "nan", "left-of-photo"],
)
def test_target_box_must_show(box: tuple[float, float, float, float]) -> None:
    first, second = dataset().instances
    with pytest.raises(DataError, match=r"expression '1': expected a target box .* 100 x 50 px"):
        replace(dataset(), instances=(replace(first, box_xyxy_px=box), second))


def test_wrong_references_of_instances_and_splits_are_named() -> None:
    first, second = dataset().instances
    with pytest.raises(DataError, match="instance '2': unknown image 'q'"):
        replace(dataset(), instances=(first, replace(second, image_id="q")), expressions=())
    with pytest.raises(DataError, match="image 'a': this id is used twice"):
        replace(dataset(), images=dataset().images * 2)
    with pytest.raises(DataError, match="split 'val': unknown image 'q'"):
        replace(dataset(), splits={"val": frozenset("aq")})

"""Large scenes: small shapes that only their neighbors identify, in SOREC's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reir.datasets import read_sorec
from reir_testing.fakes import PALETTE
from reir_testing.piza.large_scenes import (
    SMALL_AREA,
    LargeScene,
    make_large_scenes,
    save_large_scenes,
)
from reir_testing.scene_expressions import NEARBY, SceneShape


def holders(large: LargeScene, text: str) -> list[SceneShape]:
    """The shapes that an expression may be true of, by another reading of its words."""
    shapes = large.scene.shapes
    color, form, *relation, anchor_color, anchor_form = text.replace("the ", "").split()
    assert relation == ["next", "to"]
    (anchor,) = [s for s in shapes if (s.color, s.form) == (anchor_color, anchor_form)]
    alike = [shape for shape in shapes if (shape.color, shape.form) == (color, form)]
    return [shape for shape in alike if distance(shape, anchor) <= NEARBY]


def distance(one: SceneShape, other: SceneShape) -> float:
    """The distance of the closest points of two boxes, on a grid of points along each side."""
    points, others = (
        np.stack(np.meshgrid(*np.linspace(s.box[:2], s.box[2:], 9).T), axis=-1).reshape(-1, 1, 2)
        for s in (one, other)
    )
    return float(np.linalg.norm(points - others.swapaxes(0, 1), axis=-1).min())


def test_each_expression_is_true_of_one_shape_that_others_look_like() -> None:
    scenes = make_large_scenes(40, 3)
    assert sum(len(large.said) for large in scenes) > 200
    for large in scenes:
        for said in large.said:
            shape = large.scene.shapes[said.index]
            assert holders(large, said.text) == [shape]
            alike = [
                s for s in large.scene.shapes if (s.color, s.form) == (shape.color, shape.form)
            ]
            assert len(alike) > 1


def test_small_shapes_have_the_share_of_sorec_and_no_two_shapes_touch() -> None:
    for large in make_large_scenes(40, 3):
        for said in large.said:
            side = large.scene.shapes[said.index].side
            assert 0.97 * SMALL_AREA[0] <= side**2 <= 1.03 * SMALL_AREA[1]
        boxes = [np.array(shape.box) for shape in large.scene.shapes]
        for number, box in enumerate(boxes):
            assert (box >= 0).all()
            assert (box <= 1).all()
            for other in boxes[:number]:
                overlap = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
                assert overlap.min() < 0


def test_the_files_are_read_as_sorec_and_show_what_is_annotated(tmp_path: Path) -> None:
    scenes = make_large_scenes(2, 5, 512)
    save_large_scenes(tmp_path, {"train": scenes})
    dataset = read_sorec(tmp_path / "train.json", tmp_path / "photos")
    assert [e.text for e in dataset.expressions] == [s.text for large in scenes for s in large.said]
    boxes = {each.instance_id: each.box_xyxy_px for each in dataset.instances}
    large = scenes[0]
    photo = np.asarray(Image.open(tmp_path / "photos" / large.file_name)).astype(int)
    for said, expression in zip(large.said, dataset.expressions, strict=False):
        shape = large.scene.shapes[said.index]
        x1, y1, x2, y2 = map(int, boxes[str(expression.instance_id)])
        assert (x1, y1, x2, y2) == large.scene.box_px(shape)
        part = photo[y1:y2, x1:x2]
        near = np.abs(part - np.array(PALETTE[shape.color])).max(axis=-1) < 40
        assert near.any()
    assert {entry["id"] for entry in json.loads((tmp_path / "train.json").read_text())} == {
        *range(1, len(dataset.expressions) + 1)
    }


def test_more_scenes_start_with_the_same_and_none_are_no_split(tmp_path: Path) -> None:
    assert make_large_scenes(3, 7)[:2] == make_large_scenes(2, 7)
    with pytest.raises(ValueError, match="'val' has no expression"):
        save_large_scenes(tmp_path, {"val": ()})

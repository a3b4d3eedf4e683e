"""Scenes are exact: boxes fit the pixels, and every expression is true of exactly one shape.

`is_true` is the slow reference: it reads the sentence back and looks at the geometry, knowing
nothing of how the sentence was made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.datasets import read_photos
from reir.images.decode import read_image
from reir.text import has_ordinal, normalize_expression, swap_left_right
from reir_testing import PALETTE, FakeEncoder
from reir_testing.scene_expressions import (
    CLOSE,
    NEARBY,
    ORDINALS,
    Kind,
    SceneShape,
    expressions,
)
from reir_testing.scenes import (
    FORMS,
    NUM_SHAPES,
    SIZES,
    Scene,
    make_scenes,
    render,
    save_scenes,
    to_dataset,
)

SEEDS = st.integers(0, 2**31)
ENDS = {
    "leftmost": lambda s: s.center[0],
    "rightmost": lambda s: -s.center[0],
    "topmost": lambda s: s.center[1],
    "bottommost": lambda s: -s.center[1],
    "largest": lambda s: -s.side,
    "smallest": lambda s: s.side,
}
SIDES = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}


def fits(shape: SceneShape, phrase: str) -> bool:
    return set(phrase.split()) <= {shape.size, shape.color, shape.form, "shape"}


def related(one: SceneShape, word: str, other: SceneShape, neighbors: float) -> bool:
    (x, y), (ox, oy) = one.center, other.center
    gaps = (abs(a - b) - (one.side + other.side) / 2 for a, b in ((x, ox), (y, oy)))
    return {
        "left of": x < ox,
        "right of": x > ox,
        "above": y < oy,
        "below": y > oy,
        "next to": hypot(*(max(gap, 0) for gap in gaps)) <= neighbors,
    }[word]


def is_true(text: str, index: int, shapes: Sequence[SceneShape], neighbors: float) -> bool:
    """Whether a sentence holds of a shape; `neighbors` is the largest gap for "next to"."""
    one = shapes[index]
    if found := re.fullmatch(r"the (\w+) (.+) from the (\w+)", text):
        ordinal, phrase, side = found.groups()
        row = sorted((s for s in shapes if fits(s, phrase)), key=ENDS[SIDES[side]])
        place = ORDINALS.index(ordinal)
        return place < len(row) and row[place] is one
    if found := re.fullmatch(r"the (.+) nearest to the (.+)", text):
        for anchor in (s for s in shapes if fits(s, found[2])):
            rivals = [s for s in shapes if fits(s, found[1]) and s is not anchor]
            distances = [hypot(*np.subtract(s.center, anchor.center)) for s in rivals]
            if rivals and rivals[int(np.argmin(distances))] is one:
                return True
        return False
    if found := re.fullmatch(rf"the ({'|'.join(ENDS)}) (.+)", text):
        rivals = [s for s in shapes if fits(s, found[2])]
        return bool(rivals) and min(rivals, key=ENDS[found[1]]) is one
    word = "left of|right of|above|below|next to"
    head, *tail = re.split(rf" (?:and )?({word}) the ", text.removeprefix("the "))
    pairs = zip(tail[::2], tail[1::2], strict=True)
    return fits(one, head) and all(
        any(related(one, w, s, neighbors) for s in shapes if fits(s, phrase) and s is not one)
        for w, phrase in pairs
    )


def holders(text: str, scenes: Sequence[Scene], neighbors: float) -> list[tuple[int, int]]:
    return [
        (number, index)
        for number, scene in enumerate(scenes)
        for index in range(len(scene.shapes))
        if is_true(text, index, scene.shapes, neighbors)
    ]


def shape(form: str, color: str, size: str, x: float, y: float) -> SceneShape:
    half = {"small": 0.06, "medium": 0.1, "large": 0.15}[size]
    box = (x - half, y - half, x + half, y + half)
    return SceneShape(form=form, color=color, size=size, box=box, rgb=PALETTE[color])


def said_of(*shapes: SceneShape) -> dict[str, int]:
    return {each.text: each.index for each in expressions([shapes], "photo")[0]}


def mirrored(scene: Scene) -> Scene:
    def turn(one: SceneShape) -> SceneShape:
        x1, y1, x2, y2 = one.box
        return replace(one, box=(1 - x2, y1, 1 - x1, y2))

    return replace(scene, shapes=tuple(map(turn, scene.shapes)))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, neighbors=st.sampled_from([CLOSE, (CLOSE + NEARBY) / 2, NEARBY]))
def test_true_of_one_shape_of_the_photo(seed: int, neighbors: float) -> None:
    for scene in make_scenes(2, seed):
        said = expressions([scene.shapes], "photo")[0]
        assert {each.index for each in said} <= set(range(len(scene.shapes)))
        for each in said:
            assert holders(each.text, [scene], neighbors) == [(0, each.index)], each.text


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, neighbors=st.sampled_from([CLOSE, NEARBY]))
def test_true_of_one_shape_of_the_gallery(seed: int, neighbors: float) -> None:
    scenes = make_scenes(6, seed)
    in_gallery = expressions([scene.shapes for scene in scenes], "gallery")
    assert sum(map(len, in_gallery)) > 0
    for number, said in enumerate(in_gallery):
        for each in said:
            assert holders(each.text, scenes, neighbors) == [(number, each.index)], each.text


def test_the_gallery_takes_away_what_holds_in_another_photo_and_nothing_else() -> None:
    red, blue = shape("circle", "red", "small", 0.2, 0.2), shape("star", "blue", "large", 0.7, 0.7)
    green = shape("ring", "green", "small", 0.2, 0.4)
    first, second = (red, blue), (green, blue)
    alone = [{e.text for e in expressions([shapes], "photo")[0]} for shapes in (first, second)]
    both = [{e.text for e in said} for said in expressions([first, second], "gallery")]
    assert both[0] == alone[0] - alone[1]
    assert both[1] == alone[1] - alone[0]
    assert "the red circle" in both[0]
    assert "the blue star" not in both[0] | both[1]
    assert expressions([first, first], "gallery") == [[], []]


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_a_mirrored_scene_is_described_with_the_sides_swapped(seed: int) -> None:
    scene = make_scenes(1, seed)[0]
    plain = replace(scene, texture="plain")
    np.testing.assert_array_equal(render(mirrored(plain)), render(plain)[:, ::-1])
    there = {(e.text, e.index) for e in expressions([mirrored(scene).shapes], "photo")[0]}
    here = expressions([scene.shapes], "photo")[0]
    assert there == {(swap_left_right(e.text), e.index) for e in here}


def test_every_kind_of_the_grammar_is_there_and_reads_as_written() -> None:
    scenes = make_scenes(40, seed=3)
    said = [e for row in expressions([s.shapes for s in scenes], "photo") for e in row]
    assert {e.kind for e in said} == set(get_args(Kind))
    for each in said:
        assert normalize_expression(each.text) == each.text
        assert each.kind != "ordinal" or has_ordinal(each.text)
        assert not re.search(r"\b(?:not|no|without)\b", each.text)


def test_a_hand_made_scene() -> None:
    said = said_of(
        shape("circle", "red", "small", 0.15, 0.5),
        shape("circle", "red", "large", 0.5, 0.52),
        shape("square", "blue", "medium", 0.85, 0.2),
    )
    assert said["the small circle"] == 0
    assert said["the large red circle"] == said["the largest circle"] == 1
    assert said["the square"] == said["the blue shape"] == said["the topmost shape"] == 2
    assert said["the second shape from the left"] == 1
    assert said["the third shape from the right"] == 0
    assert said["the red circle nearest to the blue square"] == 1
    assert said["the circle left of the large red circle"] == 0
    assert said["the large red circle below the medium blue square and right of the small red circle"] == 1  # fmt: skip  # noqa: E501
    assert "the circle" not in said
    assert "the circle left of the blue square" not in said  # true of both
    assert "the second circle from the left" not in said  # people count in longer rows


@pytest.mark.parametrize(
    ("x", "expected"), [(0.5, False), (0.52, False), (0.57, True)], ids=["tie", "near", "clear"]
)
def test_what_is_close_is_not_said(x: float, expected: bool) -> None:
    said = said_of(
        shape("circle", "red", "small", 0.5, 0.2), shape("star", "blue", "small", x, 0.8)
    )
    assert ("the circle left of the star" in said) == expected
    assert ("the leftmost shape" in said) == expected
    assert "the circle right of the star" not in said
    assert "the largest shape" not in said  # of one size


def test_a_doubtful_rival_silences_the_sure_one() -> None:
    star = shape("star", "blue", "small", 0.6, 0.9)
    sure = shape("circle", "red", "small", 0.2, 0.1)
    doubtful = shape("circle", "green", "small", 0.58, 0.4)
    assert said_of(star, sure)["the circle left of the star"] == 1
    assert "the circle left of the star" not in said_of(star, sure, doubtful)
    assert said_of(star, sure, doubtful)["the red circle left of the star"] == 1


def test_an_ambiguous_anchor_is_not_pointed_at() -> None:
    stars = [shape("star", "blue", "small", x, 0.8) for x in (0.6, 0.9)]
    said = said_of(shape("circle", "red", "small", 0.2, 0.2), *stars)
    assert not [text for text in said if "of the star" in text or "of the blue star" in text]
    assert said["the leftmost star"] == 1


@pytest.mark.parametrize("scope", ["photo", "gallery"])
def test_nothing_to_describe(scope: str) -> None:
    assert expressions([], scope) == []  # type: ignore[arg-type]
    assert expressions([()], scope) == [[]]  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, side_px=st.sampled_from([48, 96, 128, 161]))
def test_boxes_are_tight_and_apart(seed: int, side_px: int) -> None:
    scene = make_scenes(1, seed, side_px)[0]
    drawn = render(scene).astype(int)
    assert drawn.shape == (side_px, side_px, 3)
    owners = np.zeros((side_px, side_px), dtype=int)
    for one in scene.shapes:
        without = replace(scene, shapes=tuple(s for s in scene.shapes if s is not one))
        changed = (drawn != render(without)).any(axis=-1)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert box == scene.box_px(one), one
        np.testing.assert_allclose(np.array(one.box) * side_px, box)
        owners += changed
    assert owners.max() <= 1


def test_shapes_are_as_they_are_called() -> None:
    scenes = make_scenes(300, seed=1)
    shapes = [one for scene in scenes for one in scene.shapes]
    assert {one.form for one in shapes} == set(FORMS)
    assert {one.color for one in shapes} == set(PALETTE)
    assert {len(scene.shapes) for scene in scenes} == set(range(NUM_SHAPES[0], NUM_SHAPES[1] + 1))
    assert len({scene.texture for scene in scenes}) == 4
    words = list(PALETTE)
    colors = np.array([PALETTE[word] for word in words])
    for one in shapes:
        low, high = SIZES[one.size]
        assert low - 0.5 / 128 <= one.side <= high + 0.5 / 128
        nearest = np.abs(colors - np.array(one.rgb)).sum(axis=1).argmin()
        assert words[nearest] == one.color


def test_a_plain_scene_is_read_by_the_fake_encoder() -> None:
    shapes = (shape("square", "red", "small", 0.2, 0.5), shape("square", "blue", "large", 0.7, 0.5))
    scene = Scene(image_id="one", side_px=100, shapes=shapes)
    found = FakeEncoder().encode_images([render(scene)])[0]
    np.testing.assert_allclose(found.boxes, [shapes[1].box, shapes[0].box], atol=1e-6)


def test_scenes_follow_from_the_seed_alone() -> None:
    assert make_scenes(5, seed=7) == make_scenes(9, seed=7)[:5]
    assert make_scenes(5, seed=7) != make_scenes(5, seed=8)
    ids = [scene.image_id for seed in (7, 8) for scene in make_scenes(5, seed)]
    assert len(set(ids)) == 10
    scene = make_scenes(1, seed=7)[0]
    np.testing.assert_array_equal(render(scene), render(scene))
    assert make_scenes(0, seed=7) == ()


@pytest.mark.parametrize(
    ("count", "side_px", "named"), [(-1, 128, "count .* got -1"), (1, 47, "side_px .* got 47")]
)
def test_what_cannot_be_made_is_refused(count: int, side_px: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_scenes(count, 0, side_px)


def test_as_dataset() -> None:
    scenes = make_scenes(30, seed=4)
    dataset = to_dataset(scenes, scope="photo", per_instance=3, seed=1)
    assert dataset == to_dataset(scenes, scope="photo", per_instance=3, seed=1)
    assert dataset != to_dataset(scenes, scope="photo", per_instance=3, seed=2)
    assert len(dataset.instances) == sum(len(scene.shapes) for scene in scenes)
    per_instance = Counter(text.instance_id for text in dataset.expressions)
    assert set(per_instance.values()) <= {1, 2, 3}
    assert len(per_instance) == len(dataset.instances)
    for text in dataset.expressions:
        number = int(text.image_id.rpartition("-")[2])
        index = int(str(text.instance_id).partition("#")[2])
        assert holders(text.text, [scenes[number]], NEARBY) == [(0, index)]
        box = dataset.instances_by_id[str(text.instance_id)].box_xyxy_px
        assert box == scenes[number].box_px(scenes[number].shapes[index])
    kinds = Counter(text.kind for text in dataset.expressions)
    assert set(kinds) == set(get_args(Kind))
    pairs = {(text.instance_id, text.text) for text in dataset.expressions}
    assert len(pairs) == len(dataset.expressions)


def test_saved_scenes_are_read_as_photos(tmp_path: Path) -> None:
    splits = {"train": make_scenes(4, seed=1), "val": make_scenes(3, seed=2)}
    save_scenes(tmp_path, splits, per_instance=2)
    dataset = read_photos(tmp_path, masks=True)
    for name, scenes in splits.items():
        expected, read = to_dataset(scenes, per_instance=2), dataset.split(name)
        assert set(read.images) == set(expected.images)
        assert read.instances == expected.instances
        assert [(t.text, t.instance_id, t.kind) for t in read.expressions] == [
            (t.text, t.instance_id, t.kind) for t in expected.expressions
        ]
        for scene in scenes:
            pixels = read_image(tmp_path / "images" / scene.file_name)
            np.testing.assert_array_equal(pixels, render(scene))

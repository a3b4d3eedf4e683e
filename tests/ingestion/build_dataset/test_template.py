"""What the template writer says about drawn scenes, and what it must not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reir_ingestion.build_dataset.nouns import plural
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader, _distinct
from reir_ingestion.build_dataset.tasks import WritingTask
from reir_ingestion.build_dataset.writers.template import TemplateWriter
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import Shape, draw_photos


def task_of(tmp_path: Path, shapes: Sequence[Shape]) -> WritingTask:
    photos = open_photos(str(draw_photos(tmp_path / "photos", [shapes]))).photos
    (scene,) = SceneReader(FakeEncoder(), tmp_path / "work").read(photos)
    return WritingTask(scene=scene)


def written(task: WritingTask) -> set[tuple[int, str]]:
    return {(each.number, each.text) for each in TemplateWriter().write(task).expressions}


def test_facts_are_joined_and_get_colors(tmp_path: Path) -> None:
    shapes: list[Shape] = [
        ("car", "green", (5, 5, 40, 35)),
        ("bus", "yellow", (110, 5, 150, 35)),
        ("dog", "red", (50, 80, 90, 115)),
    ]
    texts = written(task_of(tmp_path, shapes))
    assert (1, "green car left of the yellow bus and above the red dog") in texts
    assert (2, "yellow bus") in texts
    assert (3, "red dog in the bottom middle of the photo") in texts


def test_the_class_orange_gets_no_color(tmp_path: Path) -> None:
    shapes: list[Shape] = [
        ("orange", "orange", (5, 5, 40, 35)),
        ("bus", "yellow", (110, 80, 150, 115)),
    ]
    texts = {text for _, text in written(task_of(tmp_path, shapes))}
    assert "orange left of the yellow bus" in texts
    assert "yellow bus right of the orange" in texts
    assert not any("orange orange" in text for text in texts)


def test_groups_are_counted(tmp_path: Path) -> None:
    shapes: list[Shape] = [("dog", "red", (x, 40, x + 30, 70)) for x in (5, 60, 120)]
    texts = written(task_of(tmp_path, shapes))
    assert {(1, "leftmost of the three dogs"), (2, "second dog from the left")} <= texts
    # Read literally, it would count the red dogs only.
    assert not any("red dog from" in text for _, text in texts)


def test_nothing_is_beside_what_it_lies_on(tmp_path: Path) -> None:
    shapes: list[Shape] = [
        ("table", "blue", (10, 10, 150, 110)),
        ("pizza", "yellow", (20, 60, 70, 100)),
    ]
    texts = {text for _, text in written(task_of(tmp_path, shapes))}
    assert not any(text.endswith(("the table", "the pizza")) and " of " in text for text in texts)
    assert not any("above" in text or "below" in text for text in texts)
    assert "yellow pizza" in texts


def test_an_uncertain_instance_makes_facts_about_its_class_uncertain(tmp_path: Path) -> None:
    shapes: list[Shape] = [("dog", "red", (5, 40, 45, 80)), ("dog", "blue", (100, 40, 150, 90))]
    task = task_of(tmp_path, shapes)
    one, other = task.scene.instances
    doubtful = replace(other, certain=False, described=False)
    task = WritingTask(scene=replace(task.scene, instances=(one, doubtful)))
    texts = {text for _, text in written(task)}
    # It is not certain that there is a second dog, nor that there is none.
    assert not texts & {"the dog", "the left dog", "the left red dog", "dog on the left"}
    assert "red dog" in texts


def test_parts_of_an_instance_are_no_further_instances() -> None:
    boxes = np.array(
        [[0.1, 0.1, 0.5, 0.9], [0.1, 0.1, 0.5, 0.5], [0.6, 0.1, 0.9, 0.9], [0, 0, 1, 1]],
        dtype=np.float32,
    )
    scores = np.array([0.9, 0.5, 0.8, 0.1], dtype=np.float32)
    assert _distinct(boxes, scores, np.zeros(4, dtype=np.int64)) == [0, 2]
    # The upper body of another class stays.
    assert _distinct(boxes, scores, np.array([0, 1, 0, 0])) == [0, 2, 1]


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("dog", "dogs"),
        ("person", "people"),
        ("wine glass", "wine glasses"),
        ("bench", "benches"),
        ("sheep", "sheep"),
        ("knife", "knives"),
    ],
)
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def with_captions(task: WritingTask, *captions: str, crowded: str = "") -> WritingTask:
    photo = replace(task.scene.photo, captions=captions, crowded=frozenset(filter(None, [crowded])))
    return WritingTask(scene=replace(task.scene, photo=photo))


def test_a_caption_is_said_about_the_prominent_instance_of_its_class(tmp_path: Path) -> None:
    shapes: list[Shape] = [
        ("dog", "red", (5, 40, 45, 80)),
        ("dog", "blue", (60, 40, 100, 90)),
        ("bus", "yellow", (110, 5, 150, 35)),
        ("bus", "green", (110, 50, 125, 60)),
    ]
    task = with_captions(
        task_of(tmp_path, shapes),
        "A city bus passing two dogs.",
        "There is a dog in front of a bus",
        "Two dogs near a bus.",
        "A picture of a street.",
    )
    found = TemplateWriter().write(task).expressions
    assert next(each.text for each in found if each.number == 3) == "city bus passing two dogs"
    told = {text for _, text in written(task)}
    assert not any("in front" in text or "picture" in text or "near" in text for text in told)
    # Of a crowd of buses, the box shows only one.
    crowd = with_captions(task, "A city bus passing two dogs.", crowded="bus")
    assert (3, "city bus passing two dogs") not in written(crowd)

"""The rules judge: what it parses, and which planted faults it finds on drawn scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reir.checkpoint import load_color_reader
from reir.datasets.generated_expressions import generate_expressions
from reir_ingestion.build_dataset.judges.description import Description, Parser, Relation
from reir_ingestion.build_dataset.judges.language import language_problem
from reir_ingestion.build_dataset.judges.rules import RulesJudge
from reir_ingestion.build_dataset.look_alikes import find_look_alikes, groups_of_photos
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.tasks import WritingTask, Written, tasks_of
from reir_ingestion.build_dataset.writers.template import TemplateWriter
from reir_testing import FakeEncoder
from reir_testing.data_engine.drawn_photos import draw_photos
from reir_testing.data_engine.planted_faults import plant

PERSON = ("person",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the left person in red", {"categories": PERSON, "colors": ("red",), "sides": ("left",)}),
        ("Second CAR from the left", {"categories": ("car",), "order": (1, "left")}),
        ("leftmost of the three dogs", {"categories": ("dog",), "sides": ("left",)}),
        (
            "grey cup in the bottom left of the photo",
            {"categories": ("cup",), "colors": ("gray",), "sides": ("bottom", "left")},
        ),
        ("the largest dog", {"categories": ("dog",), "size": "largest"}),
        (
            "man left of the bus and above the dog",
            {
                "categories": PERSON,
                "relations": (
                    Relation(word="left of", categories=("bus",)),
                    Relation(word="above", categories=("dog",)),
                ),
            },
        ),
        ("orange on the left", {"categories": ("orange",), "sides": ("left",)}),
        ("an orange car", {"categories": ("car",), "colors": ("orange",)}),
        ("van", {"categories": ("car", "truck", "bus")}),
        ("zorb", {"rest": ("zorb",)}),
        # The side is that of the hand.
        ("phone in the left hand", {"categories": ("cell phone",), "rest": ("left", "hand")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_expressions_are_parsed(text: str, expected: dict[str, object]) -> None:
    found = Parser().parse(text)
    assert found == Description(text=text.lower(), **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "categories"),
    [
        ("orange and white tent", ()),
        ("orange and white umbrella", ("umbrella",)),
        ("tennis racket swung toward a yellow ball", ("tennis racket",)),
        ("bench where a person in blue sits", ("bench",)),
        ("black oven built into a steel table", ("oven",)),
        ("painted bowl", ("bowl",)),
        ("phone held near a cup", ("cell phone",)),
        ("toy bear", ("bear", "teddy bear")),
    ],
)
def test_the_class_is_that_of_the_object_itself(text: str, categories: tuple[str, ...]) -> None:
    assert Parser().parse(text).categories == categories


@pytest.fixture
def tasks(tmp_path: Path) -> list[WritingTask]:
    photos = open_photos(str(draw_photos(tmp_path / "photos"))).photos
    scenes = SceneReader(FakeEncoder(), tmp_path / "work").read(photos)
    return tasks_of(scenes, find_look_alikes(scenes, groups_of_photos(scenes)))


def refused(task: WritingTask, *expressions: Written, in_gallery: bool = False) -> list[list[str]]:
    judge = RulesJudge(FakeEncoder().encode_expressions, in_gallery=in_gallery)
    return [list(verdict.problems) for verdict in judge.judge(task, expressions)]


def test_what_the_generator_says_is_accepted(tasks: list[WritingTask]) -> None:
    for task in tasks:
        facts = generate_expressions(task.scene.annotated)
        assert facts
        for problems in refused(task, *(Written(i + 1, text) for i, text in facts)):
            assert problems == []


def test_planted_faults_are_found(tasks: list[WritingTask]) -> None:
    found = {"color": 0, "side": 0, "other_class": 0, "not_unique": 0, "other_object": 0}
    for task in tasks:
        for planted in plant(task.scene, TemplateWriter().write(task).expressions):
            (problems,) = refused(task, planted.written)
            # "red dog" about the blue dog, and "the dog" for one of two.
            assert problems, planted
            found[planted.kind] += 1
    assert all(found.values()), found


def test_a_look_alike_makes_an_expression_ambiguous_in_the_gallery(
    tasks: list[WritingTask],
) -> None:
    # The first and the last photo have a red dog each.
    alike = [(each.scene.photo.file_name, each.index) for each in tasks[0].look_alikes[1]]
    assert alike[0] == ("003.png", 0)
    first, second = Written(1, "red dog"), Written(1, "the left dog")
    assert refused(tasks[0], first, in_gallery=True) == [["unique in the gallery"]]
    assert refused(tasks[0], first, second, in_gallery=False) == [[], []]


def test_words_that_are_not_understood_are_judged_by_vectors(tasks: list[WritingTask]) -> None:
    # The fake encoder knows colors, so the zorb must be red.
    right, wrong = Written(1, "a red zorb"), Written(1, "a blue zorb")
    assert refused(tasks[0], right, wrong) == [[], ["grounded", "unique in the photo"]]


def test_the_side_of_an_instance_without_a_vector_is_that_of_its_place(
    tasks: list[WritingTask],
) -> None:
    scene = tasks[0].scene
    bare = tuple(replace(each, vector=None) for each in scene.instances)
    # Its box is at the left of the photo.
    task = replace(tasks[0], scene=replace(scene, instances=bare))
    left, right = Written(1, "a zorb at the left edge"), Written(1, "a zorb at the right edge")
    assert refused(task, left, right) == [[], ["grounded"]]


def test_colors_are_compared_with_the_pixels(tasks: list[WritingTask]) -> None:
    encode, reader = FakeEncoder().encode_expressions, load_color_reader()
    assert reader is not None
    judges = [RulesJudge(encode), RulesJudge(encode, colors=reader)]
    # The first instance is a red rectangle.
    doubtful = [Written(1, "a red zorb"), Written(1, "a blue zorb")]
    without, read = (judge.evidence(tasks[0], doubtful) for judge in judges)
    right, wrong = (
        after.gains["color"].amount - before.gains["color"].amount
        for before, after in zip(without, read, strict=True)
    )
    assert 0 < right < 0.1 < wrong
    # Words that are all understood are compared with the annotations, and nothing else.
    known = [Written(1, "the blue dog"), Written(1, "the left dog")]
    assert judges[0].evidence(tasks[0], known) == judges[1].evidence(tasks[0], known)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("the red mug left of the laptop", ""),
        ("der rote Becher links vom Laptop", ""),
        ("左边的 红色杯子", ""),
        ("mug", "has 1 words"),
        ("mug " * 41, "has 41 words"),
        ("a " + "x" * 300, "has 302 characters"),
        ("the red red mug", "repeats 'red'"),
        ("the mug next to the", "ends with 'the'"),
        ("the mug <b>left</b>", "has '<'"),
        ("the mug in bounding box 3", "has 'bounding box'"),
        ("I'm sorry, but I cannot help", 'has "I\'m sorry"'),
        ("the \u202egum", "has the character U+202E"),
    ],
)
def test_language(text: str, problem: str) -> None:
    found = language_problem(text)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)

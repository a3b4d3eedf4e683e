"""Writes expressions from templates, without a model: class, color, size, place, relation, count.

The facts come from `reir.datasets.generated_expressions`; each of them is true of exactly one
instance of the photo. What is added to them, such as a color or a second relation, is true as well,
so the expression stays unique in the photo and becomes rarer in the gallery.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from reir.datasets.generated_expressions import MAX_ORDERED, generate_expressions
from reir.datasets.wrong_words import PERSON
from reir_ingestion.build_dataset.scenes import SceneInstance
from reir_ingestion.build_dataset.tasks import Writing, WritingTask, Written

RELATION = re.compile(r" (?:left of|right of|above|below|nearest to) the ")
COUNTS = ("", "one", "two", "three", "four", "five", "six")
NOTHING_UNIQUE = "no template is true of this instance alone"

_IRREGULAR = {
    "person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis",
    "scissors": "scissors", "broccoli": "broccoli",
}  # fmt: skip


class TemplateWriter:
    """Writes all expressions that the templates give for a photo; see the module."""

    name, version = "template", "1"

    def write(self, task: WritingTask) -> Writing:
        """Write about one photo, the richest expressions about each instance first."""
        scene = task.scene
        facts: dict[int, list[str]] = defaultdict(list)
        for index, text in generate_expressions(scene.annotated, scene.photo.crowded):
            facts[index + 1].append(text)
        expressions: list[Written] = []
        refused: list[tuple[int | None, str]] = []
        for number in task.numbers:
            texts = dict.fromkeys(_expressions(task, number, facts[number]))
            expressions += (Written(number, text) for text in texts)
            if not texts:
                refused.append((number, NOTHING_UNIQUE))
        return Writing(expressions=tuple(expressions), refused=tuple(refused))


def _expressions(task: WritingTask, number: int, facts: Sequence[str]) -> Iterator[str]:
    """Yield expressions that combine the facts about an instance, the richest first."""
    one = task.instance(number)
    colors = _colors_of_single_classes(task)
    own = {} if any(f" in {one.color}" in fact for fact in facts) else {one.category: one.color}
    related = [_colored(fact, one, own, colors) for fact in facts if RELATION.search(fact)]
    plain = [_colored(fact, one, own, {}) for fact in facts if not RELATION.search(fact)]
    yield from _pairs(related)
    yield from related
    yield from (_counted(task, one, fact) for fact in plain)


def _pairs(related: Sequence[str]) -> Iterator[str]:
    """Yield "the car left of the bus and above the dog", for relations to different things."""
    for at, fact in enumerate(related):
        for other in related[at + 1 :]:
            (_, relation, anchor), (_, second, other_anchor) = _split(fact), _split(other)
            if relation and second and anchor != other_anchor:
                yield f"{fact} and{second}{other_anchor}"


def _colored(
    fact: str, one: SceneInstance, own: Mapping[str, str], others: Mapping[str, str]
) -> str:
    """Return a fact with the colors of the instance and of what it is related to."""
    head, relation, rest = _split(fact)
    color = own.get(one.category, "")
    if color and color not in head:
        described = f"person in {color}" if one.category == PERSON else f"{color} {one.category}"
        head = head.replace(one.category, described, 1)
    other = others.get(rest, "")
    if other:
        rest = f"{rest} in {other}" if rest == PERSON else f"{other} {rest}"
    return head + relation + rest


def _split(fact: str) -> tuple[str, str, str]:
    """Return a fact in three parts: "car", " left of the ", "bus"; the last two may be empty."""
    found = RELATION.search(fact)
    return (fact[: found.start()], found.group(), fact[found.end() :]) if found else (fact, "", "")


def _colors_of_single_classes(task: WritingTask) -> dict[str, str]:
    """Return the color of each class that has exactly one instance."""
    instances = task.scene.instances
    classes = [each.category for each in instances]
    return {e.category: e.color for e in instances if e.color and classes.count(e.category) == 1}


def _counted(task: WritingTask, one: SceneInstance, fact: str) -> str:
    """Return "leftmost of the three dogs" for a fact about the place or size in a group."""
    count = sum(each.category == one.category for each in task.scene.instances)
    bare = fact.removeprefix("the ")
    if not 2 < count <= MAX_ORDERED or not bare.endswith(f"most {one.category}"):
        return fact
    return f"{bare.removesuffix(one.category)}of the {COUNTS[count]} {plural(one.category)}"


def plural(noun: str) -> str:
    """Return the plural of a class name."""
    *before, last = noun.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last += "es"
    else:
        last += "s"
    return " ".join([*before, last])

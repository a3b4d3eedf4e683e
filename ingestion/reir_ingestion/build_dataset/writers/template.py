"""Writes expressions without a model: from captions, and from templates for facts.

The facts come from `reir.datasets.generated_expressions`; each of them is true of exactly one
instance of the photo. What is added to them, such as a color or a second relation, is true as well,
so the expression stays unique in the photo and becomes rarer in the gallery. The facts are class,
color, size, place, relation and count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from reir.datasets.generated_expressions import MAX_ORDERED, generate_expressions
from reir.datasets.wrong_words import PERSON
from reir.text import has_ordinal
from reir_ingestion.build_dataset.judges.description import Parser
from reir_ingestion.build_dataset.nouns import COUNTS, plural
from reir_ingestion.build_dataset.scenes import SceneInstance
from reir_ingestion.build_dataset.tasks import Writing, WritingTask, Written
from reir_ingestion.build_dataset.writers.captions import captions_about

# "in the top left of the photo" is a place and not a relation to something.
RELATION = re.compile(r" (?:left of|right of|above|below|nearest to) the (?!photo$)")
NOTHING_UNIQUE = "no template is true of this instance alone"


class TemplateWriter:
    """Writes all expressions that captions and templates give for a photo; see the module."""

    name, version = "template", "2"

    def __init__(self) -> None:
        self._parser = Parser()

    def write(self, task: WritingTask) -> Writing:
        """Write about one photo: captions first, then the most different facts."""
        captions: dict[int, list[str]] = defaultdict(list)
        for number, text in captions_about(task, self._parser):
            captions[number].append(text)
        facts: dict[int, list[str]] = defaultdict(list)
        for number, text in _certain_facts(task):
            facts[number].append(text)
        expressions: list[Written] = []
        refused: list[tuple[int | None, str]] = []
        for number in task.numbers:
            texts: dict[str, str] = {}
            for text in (*captions[number], *_expressions(task, number, facts[number])):
                # "the red car" and "red car" would take up two of its few expressions.
                texts.setdefault(text.removeprefix("the "), text)
            expressions += (Written(number, text) for text in texts.values())
            if not texts:
                refused.append((number, NOTHING_UNIQUE))
        return Writing(expressions=tuple(expressions), refused=tuple(refused))


def _certain_facts(task: WritingTask) -> list[tuple[int, str]]:
    """Return (number, text) of the facts that hold with and without the uncertain instances.

    If the second of two bears may be none, neither "the bear" nor "the left bear" is certain.
    """
    instances, crowded = task.scene.instances, task.scene.photo.crowded
    facts = [(i + 1, text) for i, text in generate_expressions(task.scene.annotated, crowded)]
    certain = [number for number, each in enumerate(instances, start=1) if each.certain]
    if len(certain) == len(instances):
        return facts
    alone = [instances[number - 1].annotated for number in certain]
    holds = {(certain[i], text) for i, text in generate_expressions(alone, crowded)}
    return [fact for fact in facts if fact in holds]


def _expressions(task: WritingTask, number: int, facts: Sequence[str]) -> Iterator[str]:
    """Yield expressions that combine the facts about an instance, of different kinds in turn."""
    one = task.instance(number)
    colors = _colors_of_single_classes(task)
    own = {} if any(f" in {one.color}" in fact for fact in facts) else {one.category: one.color}
    related = [_colored(fact, one, own, colors) for fact in facts if _is_apart(task, one, fact)]
    # "third red car from the left" would count the red cars only.
    plain = [
        fact if has_ordinal(fact) else _colored(fact, one, own, {})
        for fact in facts
        if not RELATION.search(fact)
    ]
    # Only the first few expressions of an instance are kept, so the kinds take turns.
    kinds = (_pairs(related), plain, related, _counted(task, one, facts))
    for in_turn in zip_longest(*kinds):
        yield from filter(None, in_turn)


def _is_apart(task: WritingTask, one: SceneInstance, fact: str) -> bool:
    """Whether a fact is a relation to something beside, and not around or inside the instance.

    The centers of a pizza and of the table under it say nothing that anybody would write.
    """
    _, relation, category = _split(fact)
    if not relation or "nearest" in relation:
        return bool(relation)
    others = (each for each in task.scene.instances if each.category == category)
    # "left of" and "right of" compare x, "above" and "below" compare y.
    axis = 0 if "of" in relation else 1
    ends = (axis, axis + 2)
    for each in others:
        (low, high), (other_low, other_high) = ([x.box[i] for i in ends] for x in (one, each))
        middle, other_middle = (low + high) / 2, (other_low + other_high) / 2
        if low <= other_middle <= high or other_low <= middle <= other_high:
            return False
    return True


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


def _counted(task: WritingTask, one: SceneInstance, facts: Sequence[str]) -> Iterator[str]:
    """Yield "leftmost of the three dogs" for "leftmost dog"."""
    count = sum(each.category == one.category for each in task.scene.instances)
    for fact in facts:
        # Two instances are "the left dog" and "the right dog", so none of them is "leftmost".
        if 2 < count <= MAX_ORDERED and fact.endswith(f"most {one.category}"):
            most = fact.removesuffix(one.category)
            yield f"{most}of the {COUNTS[count]} {plural(one.category)}"

"""Plants faults in expressions: a wrong color or side, a loss of uniqueness, another object."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.wrong_words import ABSENT, SIDE, wrong_sentences
from reir_ingestion.build_dataset.scenes import Scene
from reir_ingestion.build_dataset.tasks import Written

COLOR, NOT_UNIQUE, OTHER_OBJECT, OTHER_CLASS = "color", "not_unique", "other_object", "other_class"


@dataclass(frozen=True)
class Planted:
    """An expression with a fault.

    Attributes:
        kind: what is wrong.
        written: the expression, and the instance that it is said to describe.
    """

    kind: str
    written: Written


def plant(scene: Scene, expressions: Sequence[Written], seed: int = 0) -> Iterator[Planted]:
    """Yield the faults that can be planted in the good expressions of a photo.

    "color" and "side" exchange one word. "other_class" names a class that the photo lacks.
    "not_unique" leaves only the class of an instance that is not the only one of it.
    "other_object" is the unchanged expression, said about another instance of the photo.
    """
    rng = random.Random(f"{seed}/{scene.photo.file_name}")
    classes = [each.category for each in scene.instances]
    names: Mapping[str, str] = {COLOR: COLOR, SIDE: SIDE, ABSENT: OTHER_CLASS}
    for each in expressions:
        category = classes[each.number - 1]
        for kind, text in wrong_sentences(each.text, category, set(classes), COCO_CLASSES):
            if kind in names:
                yield Planted(names[kind], Written(each.number, text))
        if classes.count(category) > 1:
            yield Planted(NOT_UNIQUE, Written(each.number, f"the {category}"))
        others = [n for n, one in enumerate(scene.instances, 1) if n != each.number]
        if others:
            yield Planted(OTHER_OBJECT, Written(rng.choice(others), each.text))

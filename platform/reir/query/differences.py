"""What differs between a sentence and an instance: "blue, not red".

A color differs if it was verified, and the pixels show another one. A class or side differs if the
vector of the instance is clearly nearer to another one. For this, the names of all classes and
sides are encoded once, and nothing is encoded for a search.

`benchmarks/differences.py` measures how often the named difference is right. Differences in size,
number, relation and action are not named: the shipped model does not tell those words apart.
"""

# Shapes: A sentences, C classes, D vector dimension

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.wrong_words import PERSON, PERSONS, SIDE
from reir.models.color_reading import ColorReading
from reir.records import FloatArray
from reir.results import Difference
from reir.text import opening_phrase, swap_left_right

COLOR, OBJECT = "color", "object"
SIDE_GAIN, OBJECT_GAIN = 0.1, 0.3
"""The score of another side or class on the instance must exceed that of the side or class in the
sentence by this much. Otherwise, no difference is named."""

OBJECT_LEAD = 0.1
"""The score of the best class must also exceed that of the second best class by this much."""

MAX_WANTED, MIN_SEEN = 0.01, 0.7
"""Highest probability at which the pixels contradict a color of the sentence, and lowest
probability of another color for it to be named instead."""


@dataclass(frozen=True)
class Alternatives:
    """The classes and sides that a sentence could have named.

    Attributes:
        class_vectors: (C, D) unit vectors of the classes of COCO.
        right_minus_left: (D,) vector of "on the right" minus that of "on the left".
    """

    class_vectors: FloatArray
    right_minus_left: FloatArray

    SENTENCES: ClassVar = (
        *(f"the {name}" for name in COCO_CLASSES),
        "the object on the left",
        "the object on the right",
    )

    @staticmethod
    def of(vectors_AD: FloatArray) -> Alternatives:
        """Return the alternatives with the vectors of `SENTENCES`."""
        *classes, left, right = vectors_AD
        return Alternatives(np.stack(classes), right - left)


@dataclass(frozen=True)
class Comparison:
    """The words of a sentence that are compared with an instance.

    Attributes:
        noun: the word for what it describes; empty if that is no class of COCO.
        side: its first word with a left or right side, such as "leftmost"; empty if it has none.
    """

    noun: str
    side: str

    @staticmethod
    def of(sentence: str) -> Comparison:
        """Return the comparison for a normalized expression."""
        noun = _LAST_NOUN.search(opening_phrase(sentence))
        sides = (word for word in _WORD.findall(sentence) if swap_left_right(word) != word)
        return Comparison(noun.group() if noun else "", next(sides, ""))

    def differences(
        self,
        alternatives: Alternatives,
        instance_D: FloatArray,
        colors: Sequence[ColorReading] = (),
    ) -> tuple[Difference, ...]:
        """Return what differs between the sentence and an instance, at most two parts.

        Args:
            alternatives: of the encoder of the instance.
            instance_D: vector of the instance.
            colors: what the pixels say about the colors of the sentence; nothing without
                verification.
        """
        word = _other_color(colors) or self._other_side(alternatives, instance_D)
        found = (self._other_object(alternatives, instance_D), word)
        return tuple(each for each in found if each is not None)

    def _other_side(self, alternatives: Alternatives, instance_D: FloatArray) -> Difference | None:
        """Return the side of an instance if it is clearly not the one that the sentence names."""
        if not self.side:
            return None
        gain = float(alternatives.right_minus_left @ instance_D)
        if (gain if self.side.startswith("left") else -gain) < SIDE_GAIN:
            return None
        return Difference(kind=SIDE, wanted=self.side, seen=swap_left_right(self.side))

    def _other_object(
        self, alternatives: Alternatives, instance_D: FloatArray
    ) -> Difference | None:
        """Return the class of an instance if it is clearly not the one that the sentence names."""
        if not self.noun:
            return None
        wanted = PERSON if self.noun in PERSONS else self.noun
        scores_C = alternatives.class_vectors @ instance_D
        second, best = np.argsort(scores_C)[-2:]
        gain = scores_C[best] - scores_C[COCO_CLASSES.index(wanted)]
        if gain < OBJECT_GAIN or scores_C[best] - scores_C[second] < OBJECT_LEAD:
            return None
        return Difference(kind=OBJECT, wanted=self.noun, seen=COCO_CLASSES[best])


def _other_color(colors: Sequence[ColorReading]) -> Difference | None:
    """Return the least probable color of a sentence, if another one is certain in its place."""
    wrong = [
        each
        for each in colors
        if each.probability <= MAX_WANTED and each.likely_probability >= MIN_SEEN
    ]
    if not wrong:
        return None
    worst = min(wrong, key=lambda each: each.probability)
    return Difference(kind=COLOR, wanted=worst.word, seen=worst.likely)


_WORD = re.compile(r"\w+")
_NOUNS = sorted(map(re.escape, (*COCO_CLASSES, *PERSONS)), key=len, reverse=True)
# The last word of an English phrase says what it is about: "the dog bowl" is a bowl.
_LAST_NOUN = re.compile(rf"\b(?:{'|'.join(_NOUNS)})$")

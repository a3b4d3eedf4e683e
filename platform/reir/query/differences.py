"""What differs between a sentence and an instance: "blue, not red".

A color differs if it was verified, and the pixels show another one. A side differs if the sentence
with left and right exchanged scores clearly higher on the instance than the sentence does. For the
class that a sentence names, all classes of COCO are tried.

`benchmarks/differences.py` measures how often the named difference is right. Differences in size,
number, relation and action are not named: the shipped model does not tell those words apart.
"""

# Shapes: C classes, D vector dimension

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.wrong_words import PERSON, PERSONS, SIDE
from reir.models.color_reading import ColorReading
from reir.records import FloatArray
from reir.results import Difference
from reir.text import opening_phrase, swap_left_right

COLOR, OBJECT = "color", "object"
SIDE_GAIN, OBJECT_GAIN = 0.05, 0.3
"""The sentence with the other side, or the other class, must score higher on the instance than the
sentence, or the class that it names, by at least this difference."""

OBJECT_LEAD = 0.1
"""The best class must also score higher than the second best class by this difference."""

MAX_WANTED, MIN_SEEN = 0.01, 0.7
"""Highest probability at which the pixels contradict a color of the sentence, and lowest
probability of another color for it to be named instead."""

CLASS_SENTENCES = tuple(f"the {name}" for name in COCO_CLASSES)


@dataclass(frozen=True)
class Variant:
    """A sentence with one replaced word, and the difference that it stands for."""

    difference: Difference
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """The sentences with which an expression is compared.

    Attributes:
        sentence: the sentence.
        other_side: the sentence with left and right exchanged; None if it names no side.
        noun: the word for what it describes; empty if that is no class of COCO.
    """

    sentence: str
    other_side: Variant | None
    noun: str

    @staticmethod
    def of(sentence: str) -> Comparison:
        """Return the comparison for a normalized expression."""
        return Comparison(sentence, other_side(sentence), _head_noun(sentence))

    @property
    def sentences(self) -> tuple[str, ...]:
        """The other sentences whose vectors `differences` needs; none of them for a color."""
        side = (self.other_side.sentence,) if self.other_side else ()
        return (*side, *(CLASS_SENTENCES if self.noun else ()))

    def differences(
        self,
        sentence_D: FloatArray,
        vectors: Mapping[str, FloatArray],
        instance_D: FloatArray,
        colors: Sequence[ColorReading] = (),
    ) -> tuple[Difference, ...]:
        """Return what differs between the sentence and an instance, at most two parts.

        Args:
            sentence_D: unit vector of `sentence`.
            vectors: (D,) unit vectors of `sentences`, by sentence.
            instance_D: vector of the instance.
            colors: what the pixels say about the colors of the sentence; nothing without
                verification.
        """
        word = _other_color(colors) or self._wrong_side(sentence_D, vectors, instance_D)
        found = (self._other_object(vectors, instance_D), word)
        return tuple(each for each in found if each is not None)

    def _wrong_side(
        self, sentence_D: FloatArray, vectors: Mapping[str, FloatArray], instance_D: FloatArray
    ) -> Difference | None:
        """Return the side of the sentence if the other one clearly fits better."""
        if self.other_side is None:
            return None
        gain = (vectors[self.other_side.sentence] - sentence_D) @ instance_D
        return self.other_side.difference if gain >= SIDE_GAIN else None

    def _other_object(
        self, vectors: Mapping[str, FloatArray], instance_D: FloatArray
    ) -> Difference | None:
        """Return the class of an instance if it is clearly not the one that the sentence names."""
        if not self.noun:
            return None
        wanted = PERSON if self.noun in PERSONS else self.noun
        scores_C = np.stack([vectors[each] for each in CLASS_SENTENCES]) @ instance_D
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


def other_side(text: str) -> Variant | None:
    """Return the text with left and right exchanged; None if it names no side."""
    other = swap_left_right(text)
    for wanted, seen in zip(_WORD.findall(text), _WORD.findall(other), strict=True):
        if wanted != seen:
            return Variant(Difference(kind=SIDE, wanted=wanted, seen=seen), other)
    return None


def _head_noun(text: str) -> str:
    """Return the class that ends the first noun phrase: "cup" in "the red cup on the table"."""
    noun = _LAST_NOUN.search(opening_phrase(text))
    return noun.group() if noun else ""


_WORD = re.compile(r"\w+")
_NOUNS = sorted(map(re.escape, (*COCO_CLASSES, *PERSONS)), key=len, reverse=True)
_LAST_NOUN = re.compile(rf"\b(?:{'|'.join(_NOUNS)})$")

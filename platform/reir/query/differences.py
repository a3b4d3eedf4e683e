"""What differs between a sentence and an instance: "blue, not red".

A variant of a sentence has one word replaced. If a variant scores clearly higher on an instance
than the sentence does, the replaced word is what differs. For the class that a sentence names, all
classes of COCO are tried. If the colors of an instance were verified, its pixels tell which color
differs, which they know more often than its vector does.

`benchmarks/differences.py` measures how often the named difference is right. Differences in size,
number, relation and action are not named: the shipped model does not tell those words apart.
"""

# Shapes: V variants, C classes, D vector dimension

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.generated_expressions import COLORS
from reir.datasets.wrong_words import PERSON, PERSONS, SIDE, SWAPS
from reir.models.color_reading import ColorReading
from reir.records import FloatArray
from reir.results import Difference
from reir.text import opening_phrase, swap_left_right

COLOR, OBJECT = "color", "object"
MARGINS: Mapping[str, float] = {COLOR: 0.15, SIDE: 0.05, OBJECT: 0.3}
"""Kind of difference -> margin. A difference is named if the sentence with the replaced word, or
the other class, scores higher on the instance than the original does, by at least this margin."""

OBJECT_LEAD = 0.1
"""The best class must also score higher than the second best class by this margin."""

MAX_WANTED, MIN_SEEN = 0.01, 0.7
"""Highest probability at which the pixels contradict a color of the sentence, and lowest
probability of another color for it to be named instead."""

MAX_VARIANTS = 24
"""Maximum number of variants of a sentence, because each of them is encoded like a sentence."""

CLASS_SENTENCES = tuple(f"the {name}" for name in COCO_CLASSES)

# One word for each color.
_COLORS = tuple(each for each in SWAPS[COLOR] if COLORS[each] == each)


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
        variants: the sentence with replaced words, at most `MAX_VARIANTS`.
        noun: the word for what it describes; empty if that is no class of COCO.
    """

    sentence: str
    variants: tuple[Variant, ...]
    noun: str

    @staticmethod
    def of(sentence: str) -> Comparison:
        """Return the comparison for a normalized expression."""
        every = chain(_other_side(sentence), _other_colors(sentence))
        return Comparison(sentence, tuple(islice(every, MAX_VARIANTS)), _head_noun(sentence))

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences whose vectors `differences` needs; empty if nothing can be compared."""
        own = tuple(each.sentence for each in self.variants)
        needed = (*own, *(CLASS_SENTENCES if self.noun else ()))
        return (self.sentence, *needed) if needed else ()

    def differences(
        self,
        vectors: Mapping[str, FloatArray],
        instance_D: FloatArray,
        colors: Sequence[ColorReading] = (),
    ) -> tuple[Difference, ...]:
        """Return what differs between the sentence and an instance, at most two parts.

        Args:
            vectors: (D,) unit vectors of `sentences`, by sentence.
            instance_D: unit vector of the instance.
            colors: what the pixels say about the colors of the sentence; nothing without
                verification.
        """
        word = _other_color(colors) or self._other_word(vectors, instance_D, verified=bool(colors))
        found = (self._other_object(vectors, instance_D), word)
        return tuple(each for each in found if each is not None)

    def _other_word(
        self, vectors: Mapping[str, FloatArray], instance_D: FloatArray, *, verified: bool
    ) -> Difference | None:
        """Return the replaced word of the variant that exceeds its margin most.

        Args:
            vectors, instance_D: see `differences`.
            verified: whether the colors of the instance are known, so that only sides are compared.
        """
        variants = [
            each for each in self.variants if not (verified and each.difference.kind == COLOR)
        ]
        if not variants:
            return None
        variants_VD = np.stack([vectors[each.sentence] for each in variants])
        margins_V = np.array([MARGINS[each.difference.kind] for each in variants])
        excess_V = (variants_VD - vectors[self.sentence]) @ instance_D - margins_V
        best = int(np.argmax(excess_V))
        return variants[best].difference if excess_V[best] >= 0 else None

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
        if gain < MARGINS[OBJECT] or scores_C[best] - scores_C[second] < OBJECT_LEAD:
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


def _other_colors(text: str) -> Iterator[Variant]:
    """Yield the text with each color replaced by every other color."""
    for found in _COLOR.finditer(text):
        wanted = found.group()
        for seen in _COLORS:
            if seen != COLORS[wanted]:
                sentence = text[: found.start()] + seen + text[found.end() :]
                yield Variant(Difference(kind=COLOR, wanted=wanted, seen=seen), sentence)


def _other_side(text: str) -> Iterator[Variant]:
    """Yield the text with left and right exchanged, if it names a side."""
    other = swap_left_right(text)
    for wanted, seen in zip(_WORD.findall(text), _WORD.findall(other), strict=True):
        if wanted != seen:
            yield Variant(Difference(kind=SIDE, wanted=wanted, seen=seen), other)
            return


def _head_noun(text: str) -> str:
    """Return the class that ends the first noun phrase: "cup" in "the red cup on the table"."""
    noun = _LAST_NOUN.search(opening_phrase(text))
    return noun.group() if noun else ""


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern for any of the words, the longest first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_WORD = re.compile(r"\w+")
_COLOR = re.compile(rf"\b(?:{_any_of(SWAPS[COLOR])})\b")
_LAST_NOUN = re.compile(rf"\b(?:{_any_of((*COCO_CLASSES, *PERSONS))})$")

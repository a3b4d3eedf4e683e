"""What differs between a sentence and an instance: "blue, not red".

A sentence is compared with variants of itself, in which a word is replaced. If a variant fits the
instance clearly better than the sentence itself, the replaced word says what is different. The
class that a sentence names is compared with all classes instead.

`benchmarks/differences.py` measures how often the named difference is right. Differences in size,
number and relation are not named: the shipped model does not tell those words apart.
"""

# Shapes: V variants, C classes, D vector dimension

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

import numpy as np

from reir.datasets.coco_classes import COCO_CLASSES
from reir.datasets.wrong_words import PERSON, PERSONS, SIDE, SWAPS
from reir.records import FloatArray
from reir.results import Difference
from reir.text import swap_left_right

COLOR, ACTION, OBJECT = "color", "action", "object"
MARGINS: Mapping[str, float] = {COLOR: 0.15, ACTION: 0.15, SIDE: 0.05, OBJECT: 0.2}
"""A difference is named if its inner product exceeds that of the sentence, or of the class that the
sentence names, by this much."""

OBJECT_LEAD = 0.1
"""The class of an instance must also lead over the next best class by this much."""

MAX_VARIANTS = 24
"""Maximum number of variants of a sentence, because each of them is encoded like a sentence."""

CLASS_SENTENCES = tuple(f"the {name}" for name in COCO_CLASSES)

_GRAYS = frozenset({"gray", "grey", "silver"})
# One word for each color that can be told apart by its name.
_COLORS = tuple(each for each in SWAPS[COLOR] if each not in _GRAYS - {"gray"})


@dataclass(frozen=True)
class Variant:
    """A sentence with one replaced word, and the difference that it stands for."""

    difference: Difference
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """What a sentence can be compared with.

    Attributes:
        sentence: the sentence.
        variants: the sentence with replaced words, at most `MAX_VARIANTS`.
        noun: its word for a class of COCO; empty if it names none.
    """

    sentence: str
    variants: tuple[Variant, ...]
    noun: str

    @staticmethod
    def of(sentence: str) -> Comparison:
        """Return the comparison for a normalized expression."""
        every = chain(_other_side(sentence), *(_swapped(sentence, kind) for kind in _WORDS_OF))
        noun = _NOUN.search(sentence)
        return Comparison(
            sentence, tuple(islice(every, MAX_VARIANTS)), noun.group() if noun else ""
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences whose vectors `differences` needs; empty if nothing can be compared."""
        own = tuple(each.sentence for each in self.variants)
        needed = (*own, *(CLASS_SENTENCES if self.noun else ()))
        return (self.sentence, *needed) if needed else ()

    def differences(
        self, vectors: Mapping[str, FloatArray], instance_D: FloatArray
    ) -> tuple[Difference, ...]:
        """Return what differs between the sentence and an instance, at most two parts.

        Args:
            vectors: (D,) unit vectors of `sentences`, by sentence.
            instance_D: unit vector of the instance.
        """
        found = (self._other_object(vectors, instance_D), self._other_word(vectors, instance_D))
        return tuple(each for each in found if each is not None)

    def _other_word(
        self, vectors: Mapping[str, FloatArray], instance_D: FloatArray
    ) -> Difference | None:
        """Return the replaced word of the variant that exceeds its margin most."""
        if not self.variants:
            return None
        variants_VD = np.stack([vectors[each.sentence] for each in self.variants])
        margins_V = np.array([MARGINS[each.difference.kind] for each in self.variants])
        excess_V = (variants_VD - vectors[self.sentence]) @ instance_D - margins_V
        best = int(np.argmax(excess_V))
        return self.variants[best].difference if excess_V[best] >= 0 else None

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


def _swapped(text: str, kind: str) -> Iterator[Variant]:
    """Yield the text with each word of a kind replaced by each of its alternatives."""
    for found in _WORDS_OF[kind].finditer(text):
        for seen in _alternatives(kind, found.group()):
            sentence = text[: found.start()] + seen + text[found.end() :]
            yield Variant(Difference(kind=kind, wanted=found.group(), seen=seen), sentence)


def _other_side(text: str) -> Iterator[Variant]:
    """Yield the text with left and right exchanged, if it names a side."""
    other = swap_left_right(text)
    for wanted, seen in zip(_WORD.findall(text), _WORD.findall(other), strict=True):
        if wanted != seen:
            yield Variant(Difference(kind=SIDE, wanted=wanted, seen=seen), other)
            return


@cache
def _alternatives(kind: str, word: str) -> tuple[str, ...]:
    """Return the words that can take the place of a word: all colors, or its opposites."""
    if kind == COLOR:
        same = _GRAYS if word in _GRAYS else {word}
        return tuple(each for each in _COLORS if each not in same)
    swaps = SWAPS[kind]
    opposites = [swaps[word]] if word in swaps else []
    opposites += [each for each, other in swaps.items() if other == word]
    return tuple(dict.fromkeys(opposites))


def _pattern(words: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the words, the longest first."""
    return re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})\b")


_WORDS_OF = {
    kind: _pattern(frozenset({*SWAPS[kind], *SWAPS[kind].values()})) for kind in (COLOR, ACTION)
}
_WORD = re.compile(r"\w+")
_NOUN = _pattern(frozenset({*COCO_CLASSES, *PERSONS}))

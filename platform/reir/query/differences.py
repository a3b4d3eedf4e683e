"""What differs between a sentence and an instance: "blue, not red".

The sentence is compared with variants of itself, in which one word is replaced. If a variant fits
the instance clearly better than the sentence itself, the replaced word says what is different.
"""

# Shapes: V variants, D vector dimension

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice

import numpy as np

from reir.datasets.wrong_words import SIDE, SWAPS
from reir.records import FloatArray
from reir.results import Difference
from reir.text import swap_left_right

MAX_VARIANTS = 24
"""Maximum number of variants of a sentence, because each of them is encoded like a sentence."""

MARGIN = 0.1
"""A difference is named if its variant's inner product is higher than that of the sentence by this
much. `benchmarks/differences.py` measures how often the named difference is right."""

_GRAYS = frozenset({"gray", "grey", "silver"})
# One word for each color that can be told apart by its name.
_COLORS = tuple(each for each in SWAPS["color"] if each not in _GRAYS - {"gray"})


@dataclass(frozen=True)
class Variant:
    """A sentence with one replaced word, and the difference that it stands for."""

    difference: Difference
    sentence: str


def find_variants(text: str) -> list[Variant]:
    """Return the variants of an expression, at most `MAX_VARIANTS`, in the order of its words."""
    every = chain(_other_side(text), *(_swapped(text, kind) for kind in SWAPS))
    return list(islice(every, MAX_VARIANTS))


def difference(
    variants: Sequence[Variant],
    variants_VD: FloatArray,
    sentence_D: FloatArray,
    instance_D: FloatArray,
) -> Difference | None:
    """Return what differs between a sentence and an instance; None if no variant fits better.

    Args:
        variants: the variants of the sentence; not empty.
        variants_VD: their unit vectors.
        sentence_D: unit vector of the sentence.
        instance_D: unit vector of the instance.
    """
    gains_V = (variants_VD - sentence_D) @ instance_D
    best = int(np.argmax(gains_V))
    return variants[best].difference if gains_V[best] >= MARGIN else None


def _swapped(text: str, kind: str) -> Iterator[Variant]:
    """Yield the text with each word of a kind replaced by each of its alternatives."""
    for found in _pattern(kind).finditer(text):
        wanted = found.group().lower()
        for seen in _alternatives(kind, wanted):
            sentence = text[: found.start()] + seen + text[found.end() :]
            yield Variant(Difference(kind=kind, wanted=wanted, seen=seen), sentence)


def _other_side(text: str) -> Iterator[Variant]:
    """Yield the text with left and right exchanged, if it names a side."""
    swapped = swap_left_right(text)
    for wanted, seen in zip(text.split(), swapped.split(), strict=True):
        if wanted != seen:
            names = Difference(kind=SIDE, wanted=_word(wanted), seen=_word(seen))
            yield Variant(names, swapped)
            return


def _word(text: str) -> str:
    """Return a word without the punctuation around it."""
    return text.strip(".,;:!?()\"'").lower()


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    words = {*SWAPS[kind], *SWAPS[kind].values()}
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"\b(?:{either})\b", re.IGNORECASE)


@cache
def _alternatives(kind: str, word: str) -> tuple[str, ...]:
    """Return the words that can stand in the place of a word: all colors, or its opposites."""
    if kind == "color":
        same = _GRAYS if word in _GRAYS else {word}
        return tuple(each for each in _COLORS if each not in same)
    swaps = SWAPS[kind]
    opposites = [swaps[word]] if word in swaps else []
    opposites += [each for each, other in swaps.items() if other == word]
    return tuple(dict.fromkeys(opposites))

"""Variants of an expression with another color or side, whose vectors the judge compares."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from reir.datasets.generated_expressions import COLORS
from reir.datasets.wrong_words import SIDE, SWAPS
from reir.query.differences import COLOR
from reir.results import Difference
from reir.text import swap_left_right

MAX_VARIANTS = 24
"""Maximum number of variants of an expression, because each of them is encoded."""

# One word for each color.
_COLORS = tuple(each for each in SWAPS[COLOR] if COLORS[each] == each)
_COLOR = re.compile(rf"\b(?:{'|'.join(SWAPS[COLOR])})\b")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Variant:
    """A changed expression, and the difference between the original and it."""

    difference: Difference
    sentence: str


def variants_of(expression: str) -> tuple[Variant, ...]:
    """Return at most `MAX_VARIANTS` variants of an expression.

    In the first one, left and right are exchanged, if the expression names a side. In each of the
    others, one color is replaced by another color.
    """
    every = chain(_other_side(expression), _other_colors(expression))
    return tuple(islice(every, MAX_VARIANTS))


def _other_side(text: str) -> Iterator[Variant]:
    """Yield the text with left and right exchanged, if it names a side."""
    other = swap_left_right(text)
    for wanted, seen in zip(_WORD.findall(text), _WORD.findall(other), strict=True):
        if wanted != seen:
            yield Variant(Difference(kind=SIDE, wanted=wanted, seen=seen), other)
            return


def _other_colors(text: str) -> Iterator[Variant]:
    """Yield the text with each color replaced by every other color."""
    for found in _COLOR.finditer(text):
        wanted = found.group()
        for seen in _COLORS:
            if seen != COLORS[wanted]:
                sentence = text[: found.start()] + seen + text[found.end() :]
                yield Variant(Difference(kind=COLOR, wanted=wanted, seen=seen), sentence)

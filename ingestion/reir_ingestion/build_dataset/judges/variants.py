"""Variants of an expression with another color or side, whose vectors the judge compares."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice

from reir.datasets.generated_expressions import COLORS
from reir.datasets.wrong_words import SWAPS
from reir.query.differences import COLOR, Variant, other_side
from reir.results import Difference

MAX_VARIANTS = 24
"""Maximum number of variants of an expression, because each of them is encoded."""

# One word for each color.
_COLORS = tuple(each for each in SWAPS[COLOR] if COLORS[each] == each)
_COLOR = re.compile(rf"\b(?:{'|'.join(SWAPS[COLOR])})\b")


def variants_of(expression: str) -> tuple[Variant, ...]:
    """Return the expression with the other side, and with each color replaced by every other one.

    Returns:
        At most `MAX_VARIANTS`, each with one replaced word.
    """
    side = other_side(expression)
    every = chain([side] if side else [], _other_colors(expression))
    return tuple(islice(every, MAX_VARIANTS))


def _other_colors(text: str) -> Iterator[Variant]:
    """Yield the text with each color replaced by every other color."""
    for found in _COLOR.finditer(text):
        wanted = found.group()
        for seen in _COLORS:
            if seen != COLORS[wanted]:
                sentence = text[: found.start()] + seen + text[found.end() :]
                yield Variant(Difference(kind=COLOR, wanted=wanted, seen=seen), sentence)

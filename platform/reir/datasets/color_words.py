"""The words of expressions that name a color."""

from __future__ import annotations

import re
from collections.abc import Mapping

from reir.datasets.generated_expressions import COLOR_WORDS
from reir.text import normalize_expression

COLORS: Mapping[str, str] = {
    **{word: word for word in COLOR_WORDS},
    "grey": "gray",
    "silver": "gray",
}
"""Word of an expression -> its color in `COLOR_WORDS`."""
_COLOR_WORD = re.compile(rf"\b(?:{'|'.join(COLORS)})\b")


def names_color(text: str) -> bool:
    """Whether an expression has a color word."""
    return _COLOR_WORD.search(normalize_expression(text)) is not None

"""`ColorReading`: the result of a color reader, without the code that computes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True, kw_only=True)
class ColorReading:
    """What the pixels say about a color word of an expression.

    Attributes:
        word: of the expression.
        probability: of this color at the place of the word, in [0, 1].
        likely, likely_probability: the most probable color there, and how probable it is.
    """

    word: str
    probability: float
    likely: str
    likely_probability: float

    @property
    def surprisal(self) -> float:
        """Negative logarithm of the probability; 0 if the pixels leave no doubt."""
        return -math.log(max(self.probability, LEAST_PROBABILITY))


def surprisal(readings: Iterable[ColorReading]) -> float:
    """Return the summed surprisal of the colors of an expression."""
    return sum(each.surprisal for each in readings)

"""Generates expressions from annotated boxes: class, color, size, position, order, relation.

An expression is generated only if exactly one annotated instance of the photo satisfies it. Written
expressions are richer; generated ones add classes and relations that a small set of written
expressions does not cover. Uses no model and no files.
"""

# Shapes: N instances of one photo

from __future__ import annotations

import colorsys
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reir.records import FloatArray
from reir.text import normalize_expression

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
MAX_ORDERED = len(ORDINALS)
CLEAR_SHIFT = 0.04
"""Minimum distance, as a share of the image side, for a box to be left of or above another."""
CLEAR_SIZE = 1.4
"""Minimum ratio of areas for a box to be larger than another."""
# Smaller instances get no expressions, but still make those of others ambiguous.
MIN_AREA = 0.0015


COLOR_WORDS = (
    "black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown",
)  # fmt: skip
"""The names that `color_word` gives."""

COLORS: Mapping[str, str] = {
    **{word: word for word in COLOR_WORDS},
    "grey": "gray",
    "silver": "gray",
}
"""Word of an expression -> its color in `COLOR_WORDS`."""
_COLOR_WORD = re.compile(rf"\b(?:{'|'.join(COLORS)})\b")


@dataclass(frozen=True)
class AnnotatedInstance:
    """An annotated box: class name, xyxy in [0, 1], and a color word, or "" if unknown."""

    category: str
    box: tuple[float, float, float, float]
    color: str = ""

    @property
    def center(self) -> tuple[float, float]:
        """The center (x, y) in [0, 1]."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def area(self) -> float:
        """The area as a share of the photo."""
        x1, y1, x2, y2 = self.box
        return max(x2 - x1, 0) * max(y2 - y1, 0)


def color_word(rgb: Sequence[float]) -> str:
    """Return the name of an RGB color in [0, 1], or "" if no common name fits."""
    # Tones between two names get none, because a wrong word would make a wrong expression.
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) for c in rgb))
    if value < 0.2:
        return "black"
    if saturation < 0.12:
        return "white" if value > 0.78 else "gray" if 0.35 < value < 0.65 else ""
    if saturation < 0.3:
        return ""
    # Upper ends of the hues in degrees.
    bands = ((15, "red"), (40, "orange"), (66, "yellow"), (165, "green"), (260, "blue"))
    name = next((word for limit, word in bands if hue * 360 < limit), "")
    # Red is at both ends of the circle of hues.
    name = name or ("purple" if hue * 360 < 300 else "pink" if hue * 360 < 340 else "red")
    # Brown is a dark, dull orange or red, not a hue of its own.
    return "brown" if name in ("orange", "red") and value < 0.55 and saturation < 0.75 else name


def names_color(text: str) -> bool:
    """Return whether an expression contains a color word."""
    return _COLOR_WORD.search(normalize_expression(text)) is not None


def central_color(grid: FloatArray) -> str:
    """Return the color word of the inner cells of a (4, 4, 3) grid of mean RGB, if they agree."""
    # The outer cells of a crop often show the background.
    inner = np.asarray(grid, dtype=np.float32)[1:3, 1:3].reshape(-1, 3)
    words = {color_word(cell.tolist()) for cell in inner}
    return words.pop() if len(words) == 1 else ""


def generate_expressions(
    instances: Sequence[AnnotatedInstance], crowded: frozenset[str] = frozenset()
) -> list[tuple[int, str]]:
    """Generate all expressions that describe exactly one of the instances of a photo.

    Args:
        instances: annotated instances of a photo, including tiny ones, which no expression
            describes but which can make an expression ambiguous.
        crowded: classes with a crowd annotation. No expression mentions them, because it could not
            be unique. The same applies to instances without a class name.

    Returns:
        (index of the instance, text) without duplicates.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, instance in enumerate(instances):
        by_class[instance.category].append(i)
    groups = {c: g for c, g in by_class.items() if c and c not in crowded}
    # A dict as an ordered set: the order of a set of strings would differ from run to run.
    out: dict[tuple[int, str], None] = {}
    for category, members in groups.items():
        singles = [g[0] for c, g in groups.items() if len(g) == 1 and c != category]
        for i, text in _of_class(instances, category, members):
            out[i, text] = None
        for i, text in _related(instances, category, members, singles):
            out[i, text] = None
    return [(i, text) for i, text in out if instances[i].area >= MIN_AREA]


def _of_class(
    instances: Sequence[AnnotatedInstance], category: str, members: list[int]
) -> Iterator[tuple[int, str]]:
    """Yield expressions that distinguish an instance from the others of its class."""
    yield from _colored(instances, category, members)
    if len(members) == 1:
        yield from _alone(instances[members[0]], category, members[0])
        return
    yield from _sized(instances, category, members)
    for axis, (low, high) in enumerate((("left", "right"), ("top", "bottom"))):
        line = sorted(members, key=lambda i: instances[i].center[axis])
        places = [instances[i].center[axis] for i in line]
        gaps = np.diff(places)
        if gaps[0] >= CLEAR_SHIFT:
            yield line[0], _at_side(category, low, len(members))
            yield line[0], f"{category} on the {low}" if axis == 0 else f"{low} {category}"
        if gaps[-1] >= CLEAR_SHIFT:
            yield line[-1], _at_side(category, high, len(members))
            yield line[-1], f"{category} on the {high}" if axis == 0 else f"{high} {category}"
        # Two instances are called left and right, so ordinals start at three.
        if axis == 0 and 2 < len(members) <= MAX_ORDERED and gaps.min() >= CLEAR_SHIFT / 2:
            yield from _ordered(line, category)


def _alone(one: AnnotatedInstance, category: str, index: int) -> Iterator[tuple[int, str]]:
    """Yield expressions for the only instance of a class: its name, and its place in the photo."""
    x, y = one.center
    across = "left" if x < 0.35 else "right" if x > 0.65 else "middle"
    down = "top " if y < 0.35 else "bottom " if y > 0.65 else ""
    yield index, f"the {category}"
    yield index, f"{category} in the {down}{across} of the photo"


def _at_side(category: str, side: str, count: int) -> str:
    """Return "the left dog" for two dogs, "leftmost dog" for more."""
    if count == 2:
        return f"the {side} {category}"
    return f"{side}most {category}" if side in ("left", "right") else f"{category} at the {side}"


def _ordered(line: list[int], category: str) -> Iterator[tuple[int, str]]:
    """Yield expressions with ordinals, counted from either side."""
    for place, i in enumerate(line):
        yield i, f"{ORDINALS[place]} {category} from the left"
        yield i, f"{ORDINALS[len(line) - 1 - place]} {category} from the right"


def _sized(
    instances: Sequence[AnnotatedInstance], category: str, members: list[int]
) -> Iterator[tuple[int, str]]:
    """Yield expressions for the largest and the smallest of a class, if clear."""
    by_size = sorted(members, key=lambda i: instances[i].area)
    # Annotated boxes may have no area, by which the ratios below would divide.
    areas = [max(instances[i].area, 1e-9) for i in by_size]
    if areas[-1] / areas[-2] >= CLEAR_SIZE:
        # In a photo, the largest of equal things is usually the closest one.
        yield by_size[-1], f"the largest {category}"
        yield by_size[-1], f"the closest {category}"
    if areas[1] / areas[0] >= CLEAR_SIZE:
        yield by_size[0], f"the smallest {category}"


def _colored(
    instances: Sequence[AnnotatedInstance], category: str, members: list[int]
) -> Iterator[tuple[int, str]]:
    """Yield expressions for a unique color, if the colors of the whole class are known."""
    # If one color is unknown, it may be the same as another one, which would then not be unique.
    colors = [instances[i].color for i in members]
    for i, color in zip(members, colors, strict=True):
        if color and colors.count(color) == 1 and (len(members) == 1 or all(colors)):
            yield i, f"person in {color}" if category == "person" else f"{color} {category}"


def _related(
    instances: Sequence[AnnotatedInstance], category: str, members: list[int], singles: list[int]
) -> Iterator[tuple[int, str]]:
    """Yield relations to the only instance of another class."""
    for anchor in singles:
        other = instances[anchor]
        if other.area < MIN_AREA:
            continue
        name = f"the {other.category}"
        sides = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
        for word, (axis, sign) in sides.items():
            shifts = [sign * (instances[i].center[axis] - other.center[axis]) for i in members]
            clear = [i for i, s in zip(members, shifts, strict=True) if s >= 2 * CLEAR_SHIFT]
            # One that is only slightly on that side could also be meant.
            doubtful = [s for s in shifts if 0 < s < 2 * CLEAR_SHIFT]
            if len(clear) == 1 and not doubtful:
                yield clear[0], f"{category} {word} {name}"
        if len(members) > 1:
            far = sorted((_distance(instances[i], other), i) for i in members)
            if far[1][0] >= 1.5 * far[0][0] + CLEAR_SHIFT:
                yield far[0][1], f"{category} nearest to {name}"


def _distance(a: AnnotatedInstance, b: AnnotatedInstance) -> float:
    """Return the distance of the centers, as a share of the image side."""
    (ax, ay), (bx, by) = a.center, b.center
    return float(np.hypot(ax - bx, ay - by))

"""Generates expressions that are true of exactly one shape in a photo or in a whole gallery.

Some statements are doubtful, for example if a shape is only a hair left of another one, or if two
shapes have nearly the same size. So for each statement and shape, there are three cases: it is
certainly true, it is doubtful, or it is certainly false. An expression is kept only if it is
certainly true of one shape and certainly false of all others. Then it is correct, however people
would decide the doubtful cases. The module uses geometry and words, but no pixels.

The grammar, without negation:

    the small red circle                                         attribute
    the red circle left of the blue square                       relation; also "right of",
    the red circle nearest to the blue square                      "above", "below", "next to"
    the large red circle left of the small blue square           relation_pair
      and above the large green star
    the second red circle from the left                          ordinal
    the largest triangle, the leftmost shape                     superlative
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import hypot, log
from typing import Literal

Kind = Literal["attribute", "relation", "relation_pair", "ordinal", "superlative"]
Scope = Literal["photo", "gallery"]
Named = tuple[bool, bool, bool]
Reading = tuple[str, Kind, int, bool]

CLEAR_SHIFT = 0.06
"""Centers that differ by at least this, as a share of the scene's side, are certainly left of,
right of, above or below each other."""
CLEAR_ORDER = 0.04
"""The same for the order in a row, and for comparing two distances."""
CLEAR_RATIO = 1.15
"""A shape is certainly larger if the ratio of the sides is at least this."""
CLOSE, NEARBY = 0.08, 0.16
"""Shapes are certainly next to each other if the gap between their boxes is at most the first
number, as a share of the scene's side, and doubtfully if it is at most the second."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
MIN_ROW = 3
"""People count only in rows of at least this length; in shorter rows, they say "leftmost"."""

# Each triple says whether a phrase names size, color and form.
_SIZE_COLOR_FORM: Named = (True, True, True)
_COLOR_FORM: Named = (False, True, True)
_FORM: Named = (False, False, True)
_COLOR: Named = (False, True, False)
_NOTHING: Named = (False, False, False)
_ATTRIBUTES: Sequence[Named] = (
    _SIZE_COLOR_FORM,
    _COLOR_FORM,
    (True, False, True),
    _FORM,
    (True, True, False),
    _COLOR,
    (True, False, False),
)
_PHRASES: Sequence[Named] = (*_ATTRIBUTES, _NOTHING)
_HEADS: Sequence[Named] = (_SIZE_COLOR_FORM, _COLOR_FORM, _FORM, _COLOR, _NOTHING)
_ANCHORS: Sequence[Named] = (_SIZE_COLOR_FORM, _COLOR_FORM, _FORM)
_ROWS: Sequence[Named] = (_COLOR_FORM, _FORM, _COLOR, _NOTHING)
_ENDS = (("leftmost", "left"), ("rightmost", "right"), ("topmost", "top"), ("bottommost", "bottom"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneShape:
    """One instance of a scene.

    Attributes:
        form: noun, for example "circle".
        color: color word.
        size: "small", "medium" or "large".
        box: exact box, xyxy in [0, 1]; it is a square.
        rgb: color as drawn, similar to the color that the word stands for.
    """

    form: str
    color: str
    size: str
    box: tuple[float, float, float, float]
    rgb: tuple[int, int, int]

    @property
    def center(self) -> tuple[float, float]:
        """The center (x, y) in [0, 1]."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> float:
        """The width and height of the box, as a share of the scene's side."""
        return self.box[2] - self.box[0]


@dataclass(frozen=True, slots=True)
class SceneExpression:
    """A sentence about one shape of a scene.

    Attributes:
        text: lower-case text without a period, for example "the red circle left of the blue
            square".
        index: index of the shape in its scene.
        kind: rule of the grammar that generated it.
    """

    text: str
    index: int
    kind: Kind


def expressions(
    scenes: Sequence[Sequence[SceneShape]], scope: Scope
) -> list[list[SceneExpression]]:
    """Return all expressions of the grammar that are true of exactly one shape.

    Args:
        scenes: the shapes of each scene.
        scope: "photo": of exactly one shape in its scene; "gallery": of exactly one shape in all
            `scenes` together.

    Returns:
        The expressions of each scene.
    """
    holders = [_holders(shapes) for shapes in scenes]
    kept = [
        [
            SceneExpression(text, of_shapes.bit_length() - 1, kind)
            for text, (of_shapes, kind, sure) in found.items()
            if sure and of_shapes.bit_count() == 1
        ]
        for found in holders
    ]
    if scope == "photo":
        return kept
    # A text must not even be doubtful in another scene, so count all that it may hold of.
    in_scenes = Counter(text for found in holders for text in found)
    return [[each for each in said if in_scenes[each.text] == 1] for said in kept]


def _holders(shapes: Sequence[SceneShape]) -> dict[str, tuple[int, Kind, bool]]:
    """Map each text to the shapes that it may be true of, its kind, and whether none is doubtful.

    The shapes are the bits of an integer.
    """
    found: dict[str, tuple[int, Kind, bool]] = {}
    for text, kind, index, sure in _readings(_Layout(shapes)):
        of_shapes, _, all_sure = found.get(text, (0, kind, True))
        found[text] = of_shapes | 1 << index, kind, all_sure and sure
    return found


class _Layout:
    """The shapes of a scene with their phrases, which all rules of the grammar use."""

    def __init__(self, shapes: Sequence[SceneShape]) -> None:
        self.shapes = shapes
        self.phrases = [{named: _phrase(shape, named) for named in _PHRASES} for shape in shapes]
        self.counts = Counter(text for one in self.phrases for text in set(one.values()))

    def groups(self, named: Named, without: int = -1) -> dict[str, list[int]]:
        """Map each phrase to the shapes that it fits, ignoring the shape `without`."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, phrases in enumerate(self.phrases):
            if index != without:
                groups[phrases[named]].append(index)
        return groups


def _phrase(shape: SceneShape, named: Named) -> str:
    """Return a phrase such as "small red circle"; "shape" replaces a form that is not named."""
    words = (shape.size if named[0] else "", shape.color if named[1] else "")
    return " ".join([*filter(None, words), shape.form if named[2] else "shape"])


def _readings(layout: _Layout) -> Iterator[Reading]:
    """Yield every statement of the grammar that may be true of a shape."""
    for index, phrases in enumerate(layout.phrases):
        for phrase in (phrases[named] for named in _ATTRIBUTES):
            yield f"the {phrase}", "attribute", index, True
    yield from _relations(layout)
    yield from _nearest(layout)
    yield from _rows(layout)


def _relations(layout: _Layout) -> Iterator[Reading]:
    """Yield relations to one other shape, and pairs of relations to two."""
    full: dict[int, list[tuple[str, str, bool]]] = defaultdict(list)
    for one, other in permutations(range(len(layout.shapes)), 2):
        for word, sure in _related(layout.shapes[one], layout.shapes[other]):
            for named in _ANCHORS:
                anchor = layout.phrases[other][named]
                # If several shapes fit the anchor, it is doubtful which one is meant.
                known = sure and layout.counts[anchor] == 1
                for head in _HEADS:
                    text = f"the {layout.phrases[one][head]} {word} the {anchor}"
                    yield text, "relation", one, known
                if named == _SIZE_COLOR_FORM:
                    full[one].append((anchor, f"{word} the {anchor}", known))
    for one, facts in full.items():
        subject = layout.phrases[one][_SIZE_COLOR_FORM]
        # Sorted by anchor, so that a mirrored scene gives the same texts with sides swapped.
        for (anchor, first, sure), (another, second, also) in combinations(sorted(facts), 2):
            if anchor != another:
                yield f"the {subject} {first} and {second}", "relation_pair", one, sure and also


def _related(one: SceneShape, other: SceneShape) -> Iterator[tuple[str, bool]]:
    """Yield the relations that one shape may have to another, and whether it certainly has them."""
    for axis, (before, after) in enumerate((("left of", "right of"), ("above", "below"))):
        shift = other.center[axis] - one.center[axis]
        if shift:
            yield before if shift > 0 else after, abs(shift) >= CLEAR_SHIFT
    gap = _gap(one, other)
    if gap <= NEARBY:
        yield "next to", gap <= CLOSE


def is_next_to_one(shape: SceneShape, rivals: Sequence[SceneShape], anchor: SceneShape) -> bool:
    """Whether a shape is certainly next to another one, and its rivals certainly are not."""
    return _gap(shape, anchor) <= CLOSE and all(_gap(each, anchor) > NEARBY for each in rivals)


def _gap(one: SceneShape, other: SceneShape) -> float:
    """Return the distance of two boxes, as a share of the scene's side."""
    (left, top, right, bottom), (x1, y1, x2, y2) = one.box, other.box
    return hypot(max(left - x2, x1 - right, 0.0), max(top - y2, y1 - bottom, 0.0))


def _nearest(layout: _Layout) -> Iterator[Reading]:
    """Yield statements about which of several shapes is nearest to another one."""
    for other, shape in enumerate(layout.shapes):
        for head in _ROWS:
            for phrase, members in layout.groups(head, without=other).items():
                distances = [_distance(layout.shapes[index], shape) for index in members]
                for index, place, sure in _places(members, distances, CLEAR_ORDER):
                    for named in _ANCHORS if place == 0 else ():
                        anchor = layout.phrases[other][named]
                        known = sure and len(members) > 1 and layout.counts[anchor] == 1
                        yield f"the {phrase} nearest to the {anchor}", "relation", index, known


def _distance(one: SceneShape, other: SceneShape) -> float:
    """Return the distance of two centers, as a share of the scene's side."""
    return hypot(one.center[0] - other.center[0], one.center[1] - other.center[1])


def _rows(layout: _Layout) -> Iterator[Reading]:
    """Yield statements about places in a row, the ends of a row, and the largest and smallest."""
    for named in _ROWS:
        for phrase, members in layout.groups(named).items():
            shapes = [layout.shapes[index] for index in members]
            several = len(members) > 1
            # In logarithms, a ratio of sizes is a difference, as `_places` expects.
            sizes = [log(shape.side) for shape in shapes]
            for word, sign in (("smallest", 1), ("largest", -1)):
                keys = [sign * size for size in sizes]
                for index, place, sure in _places(members, keys, log(CLEAR_RATIO)):
                    if place == 0:
                        yield f"the {word} {phrase}", "superlative", index, sure and several
            for number, (end, side) in enumerate(_ENDS):
                axis, sign = number // 2, -1 if number % 2 else 1
                keys = [sign * shape.center[axis] for shape in shapes]
                for index, place, sure in _places(members, keys, CLEAR_ORDER):
                    if place == 0:
                        yield f"the {end} {phrase}", "superlative", index, sure and several
                    in_row = sure and len(members) >= MIN_ROW
                    yield (
                        f"the {ORDINALS[place]} {phrase} from the {side}",
                        "ordinal",
                        index,
                        in_row,
                    )


def _places(
    members: Sequence[int], keys: Sequence[float], clear: float
) -> Iterator[tuple[int, int, bool]]:
    """Yield (member, place, sure) for every place that a member may have.

    Args:
        members: shapes to put in order.
        keys: key of each member; the smallest key has place 0.
        clear: keys that differ by less are in doubtful order.
    """
    for at, (index, key) in enumerate(zip(members, keys, strict=True)):
        others = [other - key for i, other in enumerate(keys) if i != at]
        before = sum(step <= -clear for step in others)
        perhaps_before = sum(step < clear for step in others)
        for place in range(before, perhaps_before + 1):
            yield index, place, before == perhaps_before

"""Whether an instance is what a description says: certainly, doubtfully, or certainly not."""

# Shapes: N instances of one photo

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from reir.datasets.generated_expressions import (
    CLEAR_SHIFT,
    CLEAR_SIZE,
    COLOR_WORDS,
    AnnotatedInstance,
)
from reir_ingestion.build_dataset.judges.description import Description, Relation
from reir_ingestion.build_dataset.scenes import Scene, SceneInstance

CLEAR_COLOR, NO_COLOR = 0.25, 0.02
"""A color certainly fits from the first share of the box on, and certainly not up to the second."""
_AXIS = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
_RELATED = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
_MIDDLE = 0.35, 0.65


class Fit(IntEnum):
    """How an instance fits a statement."""

    FAILS = 0
    DOUBTFUL = 1
    FITS = 2


class Statement(NamedTuple):
    """A statement of a description in words, how an instance fits it, and whether it is a color."""

    words: str
    fit: Fit
    is_color: bool = False


def fits(description: Description, scene: Scene, index: int) -> Fit:
    """Return how the instance at an index fits the whole description."""
    found = (each.fit for each in statements(description, scene, index))
    return min(found, default=Fit.DOUBTFUL)


def statements(description: Description, scene: Scene, index: int) -> Iterator[Statement]:
    """Yield each statement of the description, and how the instance fits it."""
    one = scene.instances[index]
    if description.categories:
        fit = Fit.FITS if one.category in description.categories else Fit.FAILS
        words = f"it is a {' or '.join(description.categories)}"
        yield Statement(words, fit if one.category else Fit.DOUBTFUL)
    for color in description.colors:
        yield Statement(f"it is {color}", _color(one, color), is_color=True)
    peers = _peers(scene, index)
    for side in description.sides:
        yield Statement(f"it is at the {side}", _side(one.annotated, side, peers))
    if description.order is not None:
        place, side = description.order
        words = f"it is number {place + 1} from the {side}"
        yield Statement(words, _order(one, place, side, peers))
    if description.size:
        yield Statement(
            f"it is the {description.size}", _size(one.annotated, description.size, peers)
        )
    for relation in description.relations:
        words = f"it is {relation.word} a {' or '.join(relation.categories)}"
        yield Statement(words, _related(one.annotated, relation, scene, peers))


def _peers(scene: Scene, index: int) -> list[AnnotatedInstance]:
    """Return the other instances of the same class."""
    category = scene.instances[index].category
    return [
        e.annotated for i, e in enumerate(scene.instances) if i != index and e.category == category
    ]


def _color(one: SceneInstance, color: str) -> Fit:
    share = one.color_shares[COLOR_WORDS.index(color)]
    if one.color == color or share >= CLEAR_COLOR:
        return Fit.FITS
    return Fit.FAILS if share <= NO_COLOR and one.color else Fit.DOUBTFUL


def _side(one: AnnotatedInstance, side: str, peers: list[AnnotatedInstance]) -> Fit:
    if side not in _AXIS:
        x = one.center[0]
        return Fit.FITS if _MIDDLE[0] <= x <= _MIDDLE[1] else Fit.DOUBTFUL
    axis, sign = _AXIS[side]
    own = sign * one.center[axis]
    others = [sign * peer.center[axis] for peer in peers]
    # Positive distances from the middle of the photo are on the side that is named.
    from_middle = own - sign * 0.5
    if others and own >= max(others) + CLEAR_SHIFT:
        return Fit.FITS if from_middle > -0.25 else Fit.DOUBTFUL
    if others and own <= min(others) - CLEAR_SHIFT and from_middle < 0:
        return Fit.FAILS
    if from_middle < -0.15:
        return Fit.FAILS
    return Fit.FITS if not others and from_middle > 0.15 else Fit.DOUBTFUL


def _order(one: SceneInstance, place: int, side: str, peers: list[AnnotatedInstance]) -> Fit:
    axis, sign = _AXIS[side]
    steps = [sign * (peer.center[axis] - one.annotated.center[axis]) for peer in peers]
    # Peers that are about level with the instance may come before or after it.
    before = sum(step >= CLEAR_SHIFT / 2 for step in steps)
    perhaps = sum(step > -CLEAR_SHIFT / 2 for step in steps)
    if before == perhaps == place:
        return Fit.FITS
    return Fit.DOUBTFUL if before <= place <= perhaps else Fit.FAILS


def _size(one: AnnotatedInstance, size: str, peers: list[AnnotatedInstance]) -> Fit:
    if not peers:
        return Fit.DOUBTFUL
    areas = [max(peer.area, 1e-9) for peer in peers]
    own = max(one.area, 1e-9)
    ratio = own / max(areas) if size == "largest" else min(areas) / own
    if ratio >= CLEAR_SIZE:
        return Fit.FITS
    return Fit.DOUBTFUL if ratio >= 1 / CLEAR_SIZE else Fit.FAILS


def _related(
    one: AnnotatedInstance, relation: Relation, scene: Scene, peers: list[AnnotatedInstance]
) -> Fit:
    anchors = [
        each.annotated
        for each in scene.instances
        if each.category in relation.categories and each.annotated != one
    ]
    if not anchors:  # it may be there without being annotated
        return Fit.DOUBTFUL
    if relation.word not in _RELATED:
        own = min(_distance(one, anchor) for anchor in anchors)
        nearest = min((_distance(p, a) for p in peers for a in anchors), default=np.inf)
        return Fit.FITS if own + CLEAR_SHIFT <= nearest else Fit.DOUBTFUL
    axis, sign = _RELATED[relation.word]
    shifts = [sign * (one.center[axis] - anchor.center[axis]) for anchor in anchors]
    if max(shifts) >= 2 * CLEAR_SHIFT:
        return Fit.FITS
    return Fit.FAILS if max(shifts) <= -2 * CLEAR_SHIFT else Fit.DOUBTFUL


def _distance(one: AnnotatedInstance, other: AnnotatedInstance) -> float:
    (ax, ay), (bx, by) = one.center, other.center
    return float(np.hypot(ax - bx, ay - by))

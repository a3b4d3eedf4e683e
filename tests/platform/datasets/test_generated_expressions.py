"""Generated expressions describe exactly one instance, for any layout."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reir.datasets.generated_expressions import (
    CLEAR_SHIFT,
    CLEAR_SIZE,
    MIN_AREA,
    ORDINALS,
    AnnotatedInstance,
    central_color,
    color_word,
    generate_expressions,
)
from reir.text import swap_left_right

CATEGORIES = ("dog", "cat", "person")
many = settings(max_examples=150, deadline=None)


@st.composite
def instances(draw: st.DrawFn) -> AnnotatedInstance:
    """Boxes on a coarse grid: ties are common, and 1 - x is exact in binary."""
    x, y = draw(st.integers(0, 15)), draw(st.integers(0, 15))
    w, h = draw(st.integers(1, 16 - x)), draw(st.integers(1, 16 - y))
    return AnnotatedInstance(
        category=draw(st.sampled_from(CATEGORIES)),
        box=(x / 16, y / 16, (x + w) / 16, (y + h) / 16),
        color=draw(st.sampled_from(("", "red", "blue"))),
    )


layouts = st.lists(instances(), max_size=8)


def one(
    x: float, y: float, category: str = "dog", side: float = 0.1, color: str = ""
) -> AnnotatedInstance:
    half = side / 2
    return AnnotatedInstance(category, (x - half, y - half, x + half, y + half), color)


def texts_of(*layout: AnnotatedInstance) -> dict[str, int]:
    return {text: i for i, text in generate_expressions(layout)}


def fits(text: str, i: int, layout: list[AnnotatedInstance]) -> bool:
    """Whether instance `i` satisfies the text, by rules that compare it with all others."""
    me = layout[i]
    rivals = [o for j, o in enumerate(layout) if j != i and o.category == me.category]
    x, y = me.center
    if me.category not in text:
        return False
    if text == f"the {me.category}" or text.endswith("of the photo"):
        return not rivals
    if place := re.search(r" (left|right) of the (\w+)$| (above|below) the (\w+)$", text):
        side, anchor = place[1] or place[3], place[2] or place[4]
        if not text.startswith(me.category):
            return False
        (other,) = [o for o in layout if o.category == anchor]
        ox, oy = other.center
        return {"left": x < ox, "right": x > ox, "above": y < oy, "below": y > oy}[side]
    if near := re.search(r"^(\w+) nearest to the (\w+)$", text):
        (other,) = [o for o in layout if o.category == near[2]]
        return near[1] == me.category and all(
            distance(me, other) < distance(o, other) for o in rivals
        )
    if count := re.search(r"^(\w+) \w+ from the (left|right)$", text):
        before = sum((o.center[0] < x) == (count[2] == "left") for o in rivals)
        return ORDINALS[before] == count[1]
    if size := re.search(r"^the (largest|closest|smallest) ", text):
        if size[1] == "smallest":
            return all(me.area < o.area for o in rivals)
        return all(me.area > o.area for o in rivals)
    if color := re.search(r"^(red|blue) |^person in (red|blue)$", text):
        return me.color == (color[1] or color[2])
    side = re.search(r"left|right|top|bottom", text)
    assert side is not None, f"no rule for {text!r}"
    return {
        "left": all(x < o.center[0] for o in rivals),
        "right": all(x > o.center[0] for o in rivals),
        "top": all(y < o.center[1] for o in rivals),
        "bottom": all(y > o.center[1] for o in rivals),
    }[side[0]]


def distance(a: AnnotatedInstance, b: AnnotatedInstance) -> float:
    (ax, ay), (bx, by) = a.center, b.center
    return math.hypot(ax - bx, ay - by)


@given(layouts)
@many
def test_every_expression_describes_exactly_one_instance(layout: list[AnnotatedInstance]) -> None:
    for i, text in generate_expressions(layout):
        assert [j for j in range(len(layout)) if fits(text, j, layout)] == [i], text


@given(layouts)
@many
def test_texts_are_unique(layout: list[AnnotatedInstance]) -> None:
    counts = Counter(text for _, text in generate_expressions(layout))
    assert set(counts.values()) <= {1}


def mirrored(instance: AnnotatedInstance) -> AnnotatedInstance:
    x1, y1, x2, y2 = instance.box
    return replace(instance, box=(1 - x2, y1, 1 - x1, y2))


@given(layouts)
@many
def test_the_mirrored_photo_gets_the_swapped_expressions(layout: list[AnnotatedInstance]) -> None:
    here = {(i, swap_left_right(t)) for i, t in generate_expressions(layout)}
    there = set(generate_expressions([mirrored(i) for i in layout]))
    assert here == there


@given(layouts, st.sets(st.sampled_from(CATEGORIES)))
@many
def test_no_expression_mentions_a_crowded_class(
    layout: list[AnnotatedInstance], crowded: set[str]
) -> None:
    for i, text in generate_expressions(layout, frozenset(crowded)):
        assert layout[i].category not in crowded
        assert not any(name in text for name in crowded), text


@given(layouts)
@many
def test_the_order_of_the_annotations_does_not_matter(layout: list[AnnotatedInstance]) -> None:
    here = {(layout[i], text) for i, text in generate_expressions(layout)}
    reverse = layout[::-1]
    assert here == {(reverse[i], text) for i, text in generate_expressions(reverse)}


def test_no_instances_give_no_expressions() -> None:
    assert generate_expressions([]) == []


def test_expressions_for_two_instances_of_a_class() -> None:
    found = texts_of(one(0.2, 0.5), one(0.8, 0.5, side=0.2))
    assert found == {
        "the largest dog": 1,
        "the closest dog": 1,
        "the smallest dog": 0,
        "the left dog": 0,
        "dog on the left": 0,
        "the right dog": 1,
        "dog on the right": 1,
    }


def test_ordinals_count_from_both_sides() -> None:
    found = texts_of(one(0.5, 0.5), one(0.1, 0.5), one(0.9, 0.5), one(0.7, 0.5))
    assert found["first dog from the left"] == found["fourth dog from the right"] == 1
    assert found["third dog from the left"] == found["second dog from the right"] == 3
    assert found["leftmost dog"] == 1
    assert found["rightmost dog"] == 2


def test_too_many_instances_get_no_ordinals() -> None:
    row = [one(0.1 + 0.12 * i, 0.5) for i in range(len(ORDINALS) + 1)]
    assert not any("from the" in text for text in texts_of(*row))


def test_ties_give_no_expressions() -> None:
    assert texts_of(one(0.5, 0.5), one(0.5, 0.5)) == {}


def test_small_differences_give_no_expressions() -> None:
    side = 0.1
    larger = side * (CLEAR_SIZE * 0.95) ** 0.5
    assert texts_of(one(0.5, 0.5), one(0.5 + CLEAR_SHIFT * 0.9, 0.5, side=larger)) == {}


def test_expressions_for_the_only_instance_of_a_class() -> None:
    assert texts_of(one(0.1, 0.9)) == {
        "the dog": 0,
        "dog in the bottom left of the photo": 0,
    }
    assert "dog in the middle of the photo" in texts_of(one(0.5, 0.5))


def test_relations_to_the_only_instance_of_another_class() -> None:
    found = texts_of(one(0.1, 0.5), one(0.6, 0.5), one(0.4, 0.5, "cat"))
    assert found["dog left of the cat"] == 0
    assert found["dog right of the cat"] == 1
    assert "dog above the cat" not in found
    assert found["cat in the middle of the photo"] == 2


def test_an_unclear_second_instance_prevents_a_relation() -> None:
    found = texts_of(one(0.1, 0.5), one(0.4 - CLEAR_SHIFT, 0.5), one(0.4, 0.5, "cat"))
    assert "dog left of the cat" not in found


def test_tiny_instances_get_no_expressions_but_prevent_ambiguous_ones() -> None:
    tiny = one(0.9, 0.5, side=MIN_AREA**0.5 * 0.9)
    found = texts_of(one(0.2, 0.5), tiny)
    assert set(found.values()) == {0}
    assert "the dog" not in found


def test_colors_need_the_colors_of_the_whole_class() -> None:
    red, blue = one(0.2, 0.5, color="red"), one(0.8, 0.5, color="blue")
    assert texts_of(red, blue)["red dog"] == 0
    assert "red dog" not in texts_of(red, one(0.8, 0.5))
    assert "red dog" not in texts_of(red, one(0.8, 0.5, color="red"))
    assert texts_of(one(0.2, 0.5, "person", color="red"))["person in red"] == 0


def test_instances_without_a_class_name_get_no_expressions() -> None:
    found = texts_of(one(0.1, 0.5), one(0.8, 0.5, category=""))
    assert set(found) == {"the dog", "dog in the left of the photo"}


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((1, 0, 0), "red"),
        ((1, 0, 0.05), "red"),
        ((0, 0.6, 0), "green"),
        ((0, 0, 1), "blue"),
        ((1, 1, 0), "yellow"),
        ((1, 0.5, 0), "orange"),
        ((0.45, 0.25, 0.15), "brown"),
        ((0.5, 0, 0.8), "purple"),
        ((1, 0.3, 0.8), "pink"),
        ((0, 0, 0), "black"),
        ((1, 1, 1), "white"),
        ((0.5, 0.5, 0.5), "gray"),
        ((0.7, 0.7, 0.7), ""),
        ((0.6, 0.5, 0.48), ""),
    ],
)
def test_colors_get_their_common_names(rgb: tuple[float, float, float], word: str) -> None:
    assert color_word(rgb) == word


def test_the_central_color_needs_agreement_of_the_inner_cells() -> None:
    grid = np.zeros((4, 4, 3), dtype=np.float32)
    grid[1:3, 1:3] = (1, 0, 0)
    assert central_color(grid) == "red"
    grid[1, 1] = (0, 0, 1)
    assert central_color(grid) == ""

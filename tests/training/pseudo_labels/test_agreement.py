"""Which boxes of a localizer are believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from reir.models.interfaces import FoundBoxes
from reir.records import RgbImage
from reir_testing.fakes import FakeLocalizer, draw_scene
from reir_training.pseudo_labels.agreement import AgreementFilter, FoundLabel, Refusal

PHOTO = draw_scene((100, 50), [("red", (10, 10, 30, 30)), ("red", (60, 5, 90, 45))])


class FixedLocalizer:
    """Finds the same box in every photo, mirrored or not."""

    digest = "fixed"

    def __init__(self, *box: float, score: float = 0.9) -> None:
        self.box, self.score = box, score
        self.asked: list[str] = []

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        self.asked += expressions
        boxes = np.array([self.box] if self.box else np.zeros((0, 4)), dtype=np.float32)
        scores = np.full(len(boxes), self.score, dtype=np.float32)
        return [FoundBoxes(boxes, scores) for _ in images]


def test_a_localizer_that_understands_sides_agrees_with_itself() -> None:
    left, right = AgreementFilter(FakeLocalizer()).labels(
        PHOTO, ["the red one on the left", "the RIGHT red one"]
    )
    assert isinstance(left, FoundLabel)
    assert isinstance(right, FoundLabel)
    assert left.box == pytest.approx((0.1, 0.2, 0.3, 0.6))
    assert right.box == pytest.approx((0.6, 0.1, 0.9, 0.9))
    assert 0 < left.score <= 1


def test_sides_are_swapped_for_the_mirrored_photo() -> None:
    fixed = FixedLocalizer(0.4, 0.1, 0.6, 0.9)
    AgreementFilter(fixed).labels(PHOTO, ["the leftmost cup", "a cup"])
    assert fixed.asked == ["the leftmost cup", "a cup", "the rightmost cup", "a cup"]


@pytest.mark.parametrize(
    ("shift", "agrees"), [(0.0, True), (0.05, True), (0.12, False), (0.3, False)]
)
def test_two_looks_must_overlap(shift: float, agrees: bool) -> None:
    """A box that is off the middle by `shift` is off by twice as much in the mirrored photo."""
    localizer = FixedLocalizer(0.3 + shift, 0.2, 0.7 + shift, 0.8, score=0.25)
    (found,) = AgreementFilter(localizer).labels(PHOTO, ["the cup"])
    overlap = (0.4 - 2 * shift) / (0.4 + 2 * shift)
    assert agrees == (overlap >= 0.5)
    if agrees:
        assert isinstance(found, FoundLabel)
        assert found.box == pytest.approx((0.3 + shift, 0.2, 0.7 + shift, 0.8))
        assert found.score == pytest.approx(0.25)
    else:
        assert found is Refusal.MIRRORED
    (strict,) = AgreementFilter(localizer, min_iou=0.99).labels(PHOTO, ["the cup"])
    assert isinstance(strict, FoundLabel) == (shift == 0)


def test_a_second_localizer_is_asked_about_what_is_left() -> None:
    first = FixedLocalizer(0.3, 0.2, 0.7, 0.8, score=0.9)
    same, other = (
        FixedLocalizer(0.3, 0.2, 0.7, 0.7, score=0.5),
        FixedLocalizer(0.0, 0.2, 0.2, 0.8),
    )
    (agreed,) = AgreementFilter(first, same).labels(PHOTO, ["the left cup"])
    assert isinstance(agreed, FoundLabel)
    assert agreed.box == pytest.approx((0.3, 0.2, 0.7, 0.8))
    assert agreed.score == pytest.approx(0.5)
    assert same.asked == ["the left cup"]
    assert AgreementFilter(first, other).labels(PHOTO, ["a"]) == [Refusal.SECOND]
    never = FixedLocalizer(0.3, 0.2, 0.7, 0.8)
    off = FixedLocalizer(0.6, 0.2, 0.9, 0.8)
    assert AgreementFilter(off, never).labels(PHOTO, ["a"]) == [Refusal.MIRRORED]
    assert never.asked == []


def test_nothing_found_is_a_refusal() -> None:
    assert AgreementFilter(FixedLocalizer()).labels(PHOTO, ["a", "b"]) == (
        [Refusal.NOTHING_FOUND] * 2
    )
    found = FixedLocalizer(0.3, 0.2, 0.7, 0.8)
    assert AgreementFilter(found, FixedLocalizer()).labels(PHOTO, ["a"]) == [Refusal.SECOND]

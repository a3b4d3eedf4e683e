"""The control flow of a search that zooms, with a model that does as it is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from reir.models.interfaces import ExpressionLocalizer, FoundBoxes, Zoomer
from reir.models.piza.zoom import LEAST_CROP_PX, MAX_STEPS, ZoomingLocalizer
from reir.records import Box, FloatArray, RgbImage

NOTHING = FoundBoxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
UPPER_LEFT = (0.0, 0.0, 0.5, 0.5)
OTHER = (0.6, 0.6, 0.9, 0.9)


def photo(width: int, height: int, seed: int = 0) -> RgbImage:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def seen(*boxes: Box, score: float = 0.8) -> FoundBoxes:
    scores = np.linspace(score, score / 2, len(boxes), dtype=np.float32)
    return FoundBoxes(np.array(boxes, dtype=np.float32).reshape(-1, 4), scores)


class ScriptedModel:
    """Sees, and decides, what the script of each expression says for each look.

    Args:
        looks: by expression, what each look shows; the last one is repeated.
        ends: by expression, the probability of the end after each look; 0 after the last one.
    """

    digest = "scripted"

    def __init__(
        self,
        looks: dict[str, Sequence[FoundBoxes]],
        ends: dict[str, Sequence[float]] | None = None,
    ) -> None:
        self._looks, self._ends = looks, ends or {}
        self._expressions: list[str] = []
        self.batches: list[int] = []
        self.crops: list[RgbImage] = []
        self.histories: list[FloatArray] = []

    def look(
        self,
        crops: Sequence[RgbImage],
        expressions: Sequence[str],
        histories: Sequence[FloatArray],
    ) -> list[FoundBoxes]:
        self.batches.append(len(crops))
        self.crops += crops
        self.histories += histories
        self._expressions = [*expressions]
        rows = zip(expressions, histories, strict=True)
        return [self._looks[text][min(len(h), len(self._looks[text])) - 1] for text, h in rows]

    def end_probabilities(self, histories: Sequence[FloatArray]) -> list[float]:
        rows = zip(self._expressions, histories, strict=True)
        found = []
        for text, history in rows:
            ends = [*self._ends.get(text, ()), *[0.0] * MAX_STEPS]
            found.append(ends[max(len(history) - 2, 0)])
        return found


def test_it_is_a_localizer_and_a_zoomer() -> None:
    localizer = ZoomingLocalizer(ScriptedModel({}))
    assert isinstance(localizer, ExpressionLocalizer)
    assert isinstance(localizer, Zoomer)
    assert localizer.digest == "scripted"


def test_each_look_sees_the_best_box_of_the_one_before() -> None:
    image = photo(400, 200)
    model = ScriptedModel({"a": [seen(UPPER_LEFT, OTHER), seen(OTHER)]}, {"a": [0.2, 0.97]})
    (search,) = ZoomingLocalizer(model).zoom([image], ["a"])

    assert model.crops[0] is image
    assert np.array_equal(model.crops[1], image[:100, :200])
    assert [history.tolist() for history in model.histories] == [
        [[0, 0, 1, 1]],
        [[0, 0, 1, 1], [0, 0, 0.5, 0.5]],
    ]
    assert search.frames == ((0, 0, 1, 1), (0, 0, 0.5, 0.5))
    assert [step.end for step in search.steps] == [0.2, 0.97]
    assert [step.score for step in search.steps] == pytest.approx([0.8, 0.8])
    assert search.steps[0].box == (0, 0, 0.5, 0.5)
    assert search.box == search.steps[1].box == pytest.approx((0.3, 0.3, 0.45, 0.45))


def test_answer_is_all_boxes_of_the_last_look() -> None:
    model = ScriptedModel({"a": [seen(UPPER_LEFT), seen(OTHER, UPPER_LEFT)]}, {"a": [0, 1]})
    (found,) = ZoomingLocalizer(model).localize([photo(400, 200)], ["a"])
    assert found.boxes == pytest.approx(np.array([[0.3, 0.3, 0.45, 0.45], [0, 0, 0.25, 0.25]]))
    assert found.scores == pytest.approx(np.array([0.8, 0.4]))


@pytest.mark.parametrize(("end", "looks"), [(0.95, 1), (0.949, MAX_STEPS)])
def test_search_ends_at_the_published_probability(end: float, looks: int) -> None:
    model = ScriptedModel({"a": [seen((0.1, 0.1, 0.9, 0.9))]}, {"a": [end] * MAX_STEPS})
    (search,) = ZoomingLocalizer(model).zoom([photo(800, 800)], ["a"])
    assert len(search.steps) == looks


def test_photos_at_the_same_step_are_looked_at_together() -> None:
    model = ScriptedModel(
        {"one": [seen(UPPER_LEFT)], "two": [seen(OTHER)], "three": [seen(UPPER_LEFT)]},
        {"one": [1.0], "two": [0.0, 1.0], "three": [0.0, 0.0, 1.0]},
    )
    images = [photo(640, 480, seed) for seed in range(3)]
    together = ZoomingLocalizer(model).zoom(images, ["one", "two", "three"])
    assert model.batches == [3, 2, 1]
    assert [len(search.steps) for search in together] == [1, 2, 3]
    for image, text, search in zip(images, ("one", "two", "three"), together, strict=True):
        assert ZoomingLocalizer(model).zoom([image], [text]) == [search]


def test_search_stops_when_few_pixels_are_left() -> None:
    side = 4 * LEAST_CROP_PX
    model = ScriptedModel({"a": [seen(UPPER_LEFT)]})
    (search,) = ZoomingLocalizer(model).zoom([photo(side, side)], ["a"])
    # The third look sees the least side; its best box would be half as large.
    assert [crop.shape[0] for crop in model.crops] == [side, side // 2, side // 4]
    assert len(search.steps) == 3
    assert search.box == pytest.approx((0, 0, 0.125, 0.125))


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (LEAST_CROP_PX - 1, 40)])
def test_smallest_photo_is_looked_at_once(size: tuple[int, int]) -> None:
    model = ScriptedModel({"a": [seen((0.0, 0.0, 1.0, 1.0))]})
    (search,) = ZoomingLocalizer(model).zoom([photo(*size)], ["a"])
    assert len(search.steps) == 1
    assert search.box == (0, 0, 1, 1)


def test_probable_end_before_the_first_look_does_not_matter() -> None:
    class Eager(ScriptedModel):
        """Takes the whole photo for the target."""

        def end_probabilities(self, histories: Sequence[FloatArray]) -> list[float]:
            return [1.0] * len(histories)

    model = Eager({"a": [seen(OTHER)]})
    (search,) = ZoomingLocalizer(model).zoom([photo(300, 300)], ["a"])
    assert search.box == pytest.approx(OTHER)
    assert model.batches == [1]


@pytest.mark.parametrize(
    "empty",
    [
        NOTHING,
        seen((0.4, 0.4, 0.4, 0.9)),
        seen((0.9, 0.1, 0.2, 0.8)),
        seen((1.2, 0.1, 1.7, 0.8)),
        seen(OTHER, score=0.0),
    ],
)
def test_look_that_shows_nothing_ends_the_search(empty: FoundBoxes) -> None:
    localizer = ZoomingLocalizer(ScriptedModel({"a": [seen(UPPER_LEFT, score=0.6), empty]}))
    (search,) = localizer.zoom([photo(400, 200)], ["a"])
    assert [step.score for step in search.steps] == pytest.approx([0.6, 0])
    assert search.steps[1].box == search.steps[1].frame == (0, 0, 0.5, 0.5)
    assert search.box == (0, 0, 0.5, 0.5)
    assert search.score == pytest.approx(0.6)
    (found,) = localizer.localize([photo(400, 200)], ["a"])
    assert found.boxes.tolist() == [[0, 0, 0.5, 0.5]]


def test_nothing_in_the_whole_photo() -> None:
    localizer = ZoomingLocalizer(ScriptedModel({"a": [NOTHING]}))
    (search,) = localizer.zoom([photo(40, 20)], ["a"])
    assert (search.box, search.score) == ((0, 0, 1, 1), 0)
    (found,) = localizer.localize([photo(40, 20)], ["a"])
    assert found.boxes.shape == (0, 4)


def test_box_that_reaches_out_of_the_look_is_cut_off() -> None:
    model = ScriptedModel({"a": [seen((0.5, -0.2, 1.4, 0.5))]}, {"a": [1.0]})
    (search,) = ZoomingLocalizer(model).zoom([photo(40, 20)], ["a"])
    assert search.box == (0.5, 0, 1, 0.5)


def test_boxes_refer_to_the_pixels_that_were_cut_out() -> None:
    # From 33.3 to 66.6 px, so that 33 to 67 px are cut out.
    model = ScriptedModel({"a": [seen((0.333, 0.333, 0.666, 0.666)), seen(UPPER_LEFT)]})
    (search,) = ZoomingLocalizer(model).zoom([photo(100, 100)], ["a"])
    assert model.crops[1].shape[:2] == (34, 34)
    assert search.frames[1] == pytest.approx((0.33, 0.33, 0.67, 0.67))
    assert search.steps[1].box == pytest.approx((0.33, 0.33, 0.5, 0.5))


def test_numbers_of_photos_and_expressions_must_agree() -> None:
    localizer = ZoomingLocalizer(ScriptedModel({}))
    with pytest.raises(ValueError, match="each photo needs one expression, got 2 and 1"):
        localizer.localize([photo(4, 4)] * 2, ["a"])
    assert localizer.localize([], []) == []

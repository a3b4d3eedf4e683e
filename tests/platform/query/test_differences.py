"""What differs between a sentence and an instance, from the words to the hits of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from reir.models.color_reading import ColorReading
from reir.query.differences import (
    CLASS_SENTENCES,
    OBJECT_GAIN,
    OBJECT_LEAD,
    SIDE_GAIN,
    Comparison,
)
from reir.query.search import CheckpointExtras, Gallery
from reir.query.stages import VerifyRequest, VerifyResult
from reir.query.verify.photos import PixelVerifier
from reir.records import Instances
from reir.results import Difference
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.lookup_gallery import fill_gallery, indexed_image

from .test_answer import calibrated

SIZE = (640, 480)
ZERO, ONE = np.array([0], np.float32), np.array([1], np.float32)
"""The vectors of one dimension that stand for sentences and instances."""
LEFT, RIGHT = (40, 200, 160, 320), (480, 200, 600, 320)


def test_a_side_has_its_other_side() -> None:
    text = "the leftmost red cup, left of it"
    other = Comparison.of(text).other_side
    assert other is not None
    assert other.difference == Difference(kind="side", wanted="leftmost", seen="rightmost")
    assert other.sentence == "the rightmost red cup, right of it"
    assert Comparison.of("a big red thing behind two cups").other_side is None


def test_the_noun_is_what_the_sentence_describes() -> None:
    nouns = {
        "the lady with a dog": "lady",
        "a hot dog": "hot dog",
        "the white dining table, on the left": "dining table",
        "the bus driver": "",
        "the mug right of the laptop": "",
        "a slice of pizza": "",
        "the category": "",
        "": "",
    }
    assert {text: Comparison.of(text).noun for text in nouns} == nouns


def test_a_sentence_without_such_words_needs_no_vectors() -> None:
    comparison = Comparison.of("the red thing behind it")
    assert comparison.sentences == ()
    assert comparison.differences(ZERO, {}, ONE) == ()


def reading(word: str, probability: float, likely: str, its: float) -> ColorReading:
    return ColorReading(word=word, probability=probability, likely=likely, likely_probability=its)


@pytest.mark.parametrize(
    ("colors", "seen"),
    [
        ([("red", 0.005, "blue", 0.8)], "blue, not red"),
        ([("red", 0.02, "blue", 0.8)], ""),
        ([("red", 0.005, "blue", 0.6)], ""),
        ([("red", 0.005, "blue", 0.8), ("green", 0.001, "gray", 0.9)], "gray, not green"),
        ([("red", 0.9, "red", 0.9), ("green", 0.001, "gray", 0.9)], "gray, not green"),
    ],
)
def test_pixels_tell_which_verified_color_differs(
    colors: list[tuple[str, float, str, float]], seen: str
) -> None:
    comparison = Comparison.of("the red one beside the green one")
    told = comparison.differences(ZERO, {}, ONE, [reading(*each) for each in colors])
    assert " ".join(map(str, told)) == seen


def test_a_verified_sentence_still_has_a_side() -> None:
    comparison = Comparison.of("the red one on the left")
    vectors = {"the red one on the right": ONE}
    right = Difference(kind="side", wanted="left", seen="right")
    red = reading("red", 0.9, "red", 0.9)
    assert comparison.differences(ZERO, vectors, ONE, [red]) == (right,)


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_another_word_needs_a_clear_gain(share: float) -> None:
    comparison = Comparison.of("the one on the left")
    vectors = {"the one on the right": ONE * SIDE_GAIN * share}
    right = Difference(kind="side", wanted="left", seen="right")
    told = comparison.differences(ZERO, vectors, ONE)
    assert told == ((right,) if share > 1 else ())
    assert str(right) == "right, not left"


@pytest.mark.parametrize(
    ("cat", "dog", "told"),
    [
        (OBJECT_GAIN * 1.01, 0, "cat, not man"),
        (OBJECT_GAIN * 0.99, 0, ""),
        (OBJECT_GAIN * 2, OBJECT_GAIN * 2 - OBJECT_LEAD * 0.99, ""),
    ],
    ids=["clear", "hardly better than the named class", "another class is as good"],
)
def test_another_object_needs_a_clear_lead(cat: float, dog: float, told: str) -> None:
    comparison = Comparison.of("the man")
    gains = {"the cat": cat, "the dog": dog}
    vectors = {text: ONE * gains.get(text, 0) for text in CLASS_SENTENCES}
    found = comparison.differences(ZERO, vectors, ONE)
    assert ", ".join(map(str, found)) == told


class AllBlue(PixelVerifier):
    """Finds that every instance is blue."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def verify(self, requests: Sequence[VerifyRequest]) -> list[VerifyResult | None]:
        return [(reading("red", 0.001, "blue", 0.99),) for _ in requests]


def scenes() -> Gallery:
    """Two photos with a blue thing, one on the left and one on the right; presence by score."""
    encoder = FakeEncoder()
    store = MemoryStore()
    pictures = [draw_scene(SIZE, [("blue", box)]) for box in (LEFT, RIGHT)]
    found: list[Instances] = encoder.encode_images(pictures)
    fill_gallery(
        store,
        [
            replace(indexed_image(name, each.vectors), instances=each)
            for name, each in zip(("left", "right"), found, strict=True)
        ],
        spec=VersionSpec(dim=encoder.dim, digest=encoder.digest),
    )
    extras = CheckpointExtras(calibration=calibrated(), verifier=AllBlue())
    return Gallery("photos", store, encoder, extras)


def differs(gallery: Gallery, expression: str, **options: bool) -> dict[str, list[str]]:
    result = gallery.search(expression, **options)  # type: ignore[arg-type]
    return {hit.image_id: [str(each) for each in hit.differs] for hit in result}


def test_a_search_names_the_wrong_color_of_misses_if_it_verifies_colors() -> None:
    gallery = scenes()
    blue = ["blue, not red"]
    assert differs(gallery, "the red one", verify=True) == {"left": blue, "right": blue}
    assert differs(gallery, "the red one") == {"left": [], "right": []}


def test_a_search_that_finds_it_names_differences_only_on_request() -> None:
    gallery = scenes()
    found = gallery.search("the blue one on the left")
    assert found.found
    assert "compare" not in found.timings_ms
    assert [hit.differs for hit in found] == [(), ()]
    asked = differs(gallery, "the blue one on the left", explain=True)
    assert asked == {"left": [], "right": ["right, not left"]}


def test_a_comparison_without_time_is_left_out_and_named() -> None:
    gallery = scenes()
    for _ in range(3):
        gallery.stages.costs.note("compare", 60_000)
    result = gallery.search("the red one", verify=True, budget_ms=5_000)
    assert result.degraded == ("compare",)
    assert [hit.differs for hit in result] == [(), ()]

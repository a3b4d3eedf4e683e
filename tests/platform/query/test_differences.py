"""What differs between a sentence and an instance, from the words to the hits of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from reir.models.color_reading import ColorReading
from reir.query.differences import (
    OBJECT_GAIN,
    OBJECT_LEAD,
    SIDE_GAIN,
    Alternatives,
    Comparison,
)
from reir.query.search import CheckpointExtras, Gallery
from reir.query.stages import VerifyRequest, VerifyResult
from reir.query.verify.photos import PixelVerifier
from reir.records import Instances
from reir.store import VersionSpec
from reir.store.memory import MemoryStore
from reir_testing import FakeEncoder, draw_scene
from reir_testing.lookup_gallery import fill_gallery, indexed_image

from .test_answer import calibrated

SIZE = (640, 480)
LEFT, RIGHT = (40, 200, 160, 320), (480, 200, 600, 320)
INSTANCE = np.array([1], np.float32)


def alternatives(right: float = 0, **classes: float) -> Alternatives:
    """Alternatives of one dimension, with the scores of `INSTANCE`; 0 for the other sentences."""
    scores = {f"the {name}": score for name, score in classes.items()}
    scores["the object on the right"] = right
    vectors = [[scores.get(each, 0)] for each in Alternatives.SENTENCES]
    return Alternatives.of(np.array(vectors, np.float32))


def told(sentence: str, fitting: Alternatives, colors: Sequence[ColorReading] = ()) -> list[str]:
    return [str(each) for each in Comparison.of(sentence).differences(fitting, INSTANCE, colors)]


def test_the_side_is_the_first_word_with_one() -> None:
    sides = {
        "the leftmost red cup, right of it": "leftmost",
        "a right-hand cup": "right",
        "a big red thing behind two bright cups": "",
    }
    assert {text: Comparison.of(text).side for text in sides} == sides


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


def test_other_words_do_not_differ() -> None:
    assert told("the red thing behind it", alternatives(right=1, cat=1)) == []


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
    readings = [reading(*each) for each in colors]
    assert " ".join(told("the red one beside the green one", alternatives(), readings)) == seen


def test_a_verified_sentence_still_has_a_side() -> None:
    red = reading("red", 0.9, "red", 0.9)
    assert told("the red one on the left", alternatives(right=1), [red]) == ["right, not left"]


@pytest.mark.parametrize(
    ("sentence", "right", "seen"),
    [
        ("the one on the left", SIDE_GAIN * 1.01, ["right, not left"]),
        ("the one on the left", SIDE_GAIN * 0.99, []),
        ("the one on the left", -SIDE_GAIN * 1.01, []),
        ("the rightmost one", -SIDE_GAIN * 1.01, ["leftmost, not rightmost"]),
        ("the rightmost one", -SIDE_GAIN * 0.99, []),
    ],
)
def test_the_other_side_needs_a_clear_gain(sentence: str, right: float, seen: list[str]) -> None:
    assert told(sentence, alternatives(right=right)) == seen


@pytest.mark.parametrize(
    ("cat", "dog", "seen"),
    [
        (OBJECT_GAIN * 1.01, 0, ["cat, not man"]),
        (OBJECT_GAIN * 0.99, 0, []),
        (OBJECT_GAIN * 2, OBJECT_GAIN * 2 - OBJECT_LEAD * 0.99, []),
    ],
    ids=["clear", "hardly better than the named class", "another class is as good"],
)
def test_another_object_needs_a_clear_lead(cat: float, dog: float, seen: list[str]) -> None:
    assert told("the man", alternatives(cat=cat, dog=dog)) == seen


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

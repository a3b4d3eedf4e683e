"""The color reader: which words it covers, what it looks at, and what the shipped one reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reir.checkpoint import SHIPPED, load_color_reader, load_model
from reir.datasets.generated_expressions import names_color
from reir.models.nano.color_head import GRID, places_of
from reir.models.nano.color_reader import ColorParts, ColorReader, color_head_for
from reir_testing.tiny import tiny_model, tiny_tokenizer

BOX = np.array([0.25, 0.25, 0.75, 0.75], np.float32)


def photo_of(inside: tuple[int, int, int], outside: tuple[int, int, int]) -> np.ndarray:
    """A photo with `BOX` in one color and the rest in another one."""
    photo = np.full((160, 160, 3), outside, np.uint8)
    photo[40:120, 40:120] = inside
    return photo


def test_color_words_are_covered_one_at_a_time() -> None:
    tokenizer = tiny_tokenizer()
    parts = ColorParts(tiny_model(), tokenizer)
    covered = parts.cover("The red car left of the blue car")
    assert [(each.word, each.position) for each in covered] == [("red", 2), ("blue", 7)]
    written = [tokenizer.decode(each.ids.tolist(), skip_special_tokens=False) for each in covered]
    assert written == [
        "[CLS] the [MASK] car left of the blue car [SEP]",
        "[CLS] the red car left of the [MASK] car [SEP]",
    ]
    assert parts.cover("the car") == []
    # The text tower of this model reads 16 tokens.
    assert parts.cover("the " * 20 + "red car") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red bus beside the whiteboard", ["red"]),
        ("silverware, a brownie and blueberries", []),
        ("the white board, off-white, white", ["white", "white", "white"]),
    ],
)
def test_a_color_that_begins_a_longer_word_is_not_covered(text: str, expected: list[str]) -> None:
    parts = ColorParts(*load_model(SHIPPED))
    assert [each.word for each in parts.cover(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Silver van", True), ("a grey-haired man", True), ("the colored van", False), ("", False)],
)
def test_expressions_that_name_a_color_are_known(text: str, expected: bool) -> None:
    assert names_color(text) == expected


def test_places_tell_cells_of_the_box_from_those_around_it() -> None:
    whole, half = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]
    places = places_of(torch.tensor([[whole, half, [-1.0, 0.0, 2.0, 1.0]]]))
    assert places.shape == (1, 3 * GRID**2, 6)
    inside = places[0, :, 0].view(3, GRID, GRID)
    assert inside[0].all()
    assert inside[1, :, : GRID // 2].all()
    assert not inside[1, :, GRID // 2 :].any()
    assert inside[2].all()
    right = places[0, :, 1].view(3, GRID, GRID)
    assert (right[0].diff(dim=1) > 0).all()
    torch.testing.assert_close(right[0], -right[0].flip(1))
    assert torch.isfinite(places_of(torch.zeros(1, 3, 4))).all()


def test_a_reading_does_not_depend_on_what_else_is_asked() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    reader = ColorReader(model, tiny_tokenizer(), color_head_for(model, {"width": 32}))
    photo = np.random.default_rng(0).integers(0, 255, (90, 140, 3)).astype(np.uint8)
    asked = [
        (BOX, "red car left of the blue dog"),
        (np.array([0.0, 0.1, 0.3, 0.9], np.float32), "the dog"),
        (np.array([0.5, 0.5, 0.5, 0.5], np.float32), "green dog"),
    ]
    together = reader.read(photo, asked)
    assert [len(each) for each in together] == [2, 0, 1]
    for one, expected in zip(asked, together, strict=True):
        (alone,) = reader.read(photo, [one])
        assert [each.word for each in alone] == [each.word for each in expected]
        for a, b in zip(alone, expected, strict=True):
            assert a.surprisal == pytest.approx(b.surprisal, abs=0.02)
    assert reader.read(photo, []) == []


def test_the_text_tower_drops_nothing() -> None:
    parts = [ColorParts(tiny_model().train(), tiny_tokenizer()) for _ in range(2)]
    one, other = (each.states(each.cover("the red car")) for each in parts)
    torch.testing.assert_close(one, other)


def test_the_shipped_reader_sees_colors_of_the_box_and_around_it() -> None:
    reader = load_color_reader(SHIPPED)
    assert reader is not None
    photo = photo_of(inside=(210, 25, 30), outside=(30, 70, 200))
    (right,), (wrong,), (both) = reader.read(
        photo, [(BOX, "a red bus"), (BOX, "a yellow bus"), (BOX, "a red bus against a blue sky")]
    )
    assert right.likely == wrong.likely == "red"
    assert right.surprisal < 1 < wrong.surprisal
    assert [each.likely for each in both] == ["red", "blue"]

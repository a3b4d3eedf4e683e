"""Normalization, refusal and mirroring of expressions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reir.errors import QueryError
from reir.text import (
    first_phrase,
    has_ordinal,
    normalize_expression,
    opening_phrase,
    swap_left_right,
    validate_expression,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the red mug", "the red mug"),
        ("  The\tRED \n\r mug  ", "the red mug"),
        ("the\0red\x1bmug\x85now", "the red mug now"),
        ("\uff46\uff55\uff4c\uff4c\u3000\uff37\uff29\uff24\uff34\uff28", "full width"),
        ("ﬁne cat", "fine cat"),
        ("Cafe\u0301", "café"),
        ("STRASSE Straße", "strasse strasse"),
        ("zero\u200bwidth\u202emark", "zerowidthmark"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("le chat noir à gauche", "le chat noir à gauche"),
        ("红色的杯子", "红色的杯子"),
        ("a 🐱 cat", "a 🐱 cat"),
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize_expression(text) == expected


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalize_expression(text)
    assert normalize_expression(once) == once
    assert once == " ".join(once.split())


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1))
def test_visible_ascii_only_changes_case(text: str) -> None:
    assert normalize_expression(text) == text.lower()


def test_validate_returns_the_normalized_expression() -> None:
    assert validate_expression(" The Cat\n") == "the cat"


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u200b\u200b", "\0"])
def test_empty_expressions_are_refused(text: str) -> None:
    with pytest.raises(QueryError, match="expression: is empty") as caught:
        validate_expression(text)
    assert caught.value.field == "expression"


@pytest.mark.parametrize("value", [None, 7, b"cat", ["cat"], {"a": 1}], ids=repr)
def test_anything_but_text_is_refused(value: object) -> None:
    with pytest.raises(QueryError, match=f"must be text, got {type(value).__name__}"):
        validate_expression(value)


def test_the_length_limit_is_exact() -> None:
    assert validate_expression("x" * 512) == "x" * 512
    assert validate_expression(" " * 600 + "x" * 512) == "x" * 512
    with pytest.raises(QueryError, match="has 513 characters, at most 512"):
        validate_expression("x" * 513)
    with pytest.raises(QueryError, match="has 3 characters, at most 2"):
        validate_expression("cat", max_chars=2)
    with pytest.raises(QueryError, match="has 1000000 characters"):
        validate_expression("x" * 1_000_000)


def test_text_that_grows_in_normalization_is_measured_after_it() -> None:
    with pytest.raises(QueryError, match="has 540 characters"):
        validate_expression("\ufdfa" * 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat left of the cup", "the cat right of the cup"),
        ("rightmost man", "leftmost man"),
        ("Left-hand door", "Right-hand door"),
        ("THE LEFTMOST ONE", "THE RIGHTMOST ONE"),
        ("left or right?", "right or left?"),
        ("second from the left", "second from the right"),
        ("the lefthand cup, to the right", "the righthand cup, to the left"),
        ("bright upright leftover copyright rights", "bright upright leftover copyright rights"),
        ("the cup", "the cup"),
        ("", ""),
    ],
)
def test_swap(text: str, expected: str) -> None:
    assert swap_left_right(text) == expected


SIDE_WORDS = st.sampled_from(
    ["left", "right", "Left", "RIGHT", "leftmost", "Right-hand", "bright", "cat", "of", ",", "LEFT"]
)


@given(st.lists(SIDE_WORDS).map(" ".join))
def test_swapping_twice_gives_the_text_back(text: str) -> None:
    assert swap_left_right(swap_left_right(text)) == text


@given(st.text())
def test_swapping_keeps_all_other_text(text: str) -> None:
    assert swap_left_right(text + " left") == swap_left_right(text) + " right"


@pytest.mark.parametrize(
    "text", ["the second cup", "3rd from above", "THIRD man", "the last one", "the 21st door"]
)
def test_ordinals(text: str) -> None:
    assert has_ordinal(text)


@pytest.mark.parametrize(
    "text", ["the cup", "two cats", "a secondary road", "lasting", "at 3 st", ""]
)
def test_no_ordinals(text: str) -> None:
    assert not has_ordinal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the red cup on the table", "the red cup"),
        ("A Man Who is standing", "A Man"),
        ("guy wearing a hat", "guy"),
        ("woman, left", "woman"),
        ("the man to the left of the bus", "the man"),
        ("zebra closest to us", "zebra"),
        ("  the dog. ", "the dog"),
        ("two people and a dog", "two people"),
        ("le chat noir", "le chat noir"),
        # A side, a place or a number belongs to the phrase.
        ("left man", "left man"),
        ("right zebra", "right zebra"),
        ("man left", "man left"),
        ("bottom right bowl of soup", "bottom right bowl"),
        ("second giraffe from the left", "second giraffe"),
        ("the 3rd cup from left", "the 3rd cup"),
        # What does not say what the thing is, is no phrase.
        ("second from left", "second from left"),
        ("2nd from right", "2nd from right"),
        ("on the left", "on the left"),
        ("left of the bus", "left of the bus"),
        ("the one next to the dog", "the one next to the dog"),
        ("the back of the bus", "the back of the bus"),
        ("red", "red"),
        ("sitting", "sitting"),
        # It ends later if it starts with such a word.
        ("smiling woman in red", "smiling woman"),
        ("black and white cat on the sofa", "black and white cat"),
        ("in the red shirt on the bench", "in the red shirt"),
        # Nouns that end in "ing", unlike "wearing".
        ("the building on the right", "the building"),
        ("parking meter near the car", "parking meter"),
        ("the rings on her hand", "the rings"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_the_first_phrase(text: str, expected: str) -> None:
    assert first_phrase(text) == expected


WORDS = ("the", "red", "left", "of", "on", "cup", "man", "and", ",", "sitting", "second")


@given(st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_a_first_phrase_starts_the_text_and_is_its_own(text: str) -> None:
    phrase = first_phrase(text)
    assert bool(phrase) == bool(text.strip())
    assert text.strip().startswith(phrase)
    assert first_phrase(phrase) == phrase


def test_an_opening_phrase_may_be_empty() -> None:
    assert opening_phrase("the mug right of the laptop") == "the mug"
    assert opening_phrase("left of the bus") == opening_phrase("smiling woman") == ""
    assert opening_phrase("the second cup") == "the second cup"

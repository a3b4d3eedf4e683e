"""Variants of an expression with another color or the other side."""

from __future__ import annotations

from reir_ingestion.build_dataset.judges.variants import MAX_VARIANTS, variants_of


def words(text: str) -> set[tuple[str, str, str]]:
    found = (each.difference for each in variants_of(text))
    return {(each.kind, each.wanted, each.seen) for each in found}


def test_other_words_have_no_variants() -> None:
    assert words("a big thing standing behind two cups") == set()


def test_a_side_has_its_other_side() -> None:
    assert words("the leftmost cup, please") == {("side", "leftmost", "rightmost")}


def test_a_color_has_every_other_color_and_no_synonym() -> None:
    seen = {seen for _, _, seen in words("the grey cup")}
    assert {"red", "blue", "black"} <= seen
    assert not seen & {"gray", "grey", "silver"}
    assert {seen for _, _, seen in words("the red cup")} == seen - {"red"} | {"gray"}


def test_a_variant_differs_in_the_named_word_only() -> None:
    text = "the red cup left of it, near the sitting cat"
    for each in variants_of(text):
        told = each.difference
        assert each.sentence.replace(told.seen, told.wanted) == text


def test_a_long_sentence_has_a_limited_number_of_variants() -> None:
    assert len(variants_of("red black white blue green " * 20)) == MAX_VARIANTS

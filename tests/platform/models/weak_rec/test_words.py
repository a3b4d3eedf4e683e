"""Sentences as words of a vocabulary."""

from __future__ import annotations

import torch

from reir.models.weak_rec.vocabulary import PAD, UNK, build_vocabulary
from reir.models.weak_rec.words import WordLanguage
from reir_testing.weak.tiny import word_vectors

KNOWN = ("the red dog", "a cat on the car")


def tiny(*, max_words: int = 5, num_blocks: int = 1) -> WordLanguage:
    vocabulary = build_vocabulary(KNOWN)
    torch.manual_seed(0)
    vectors = word_vectors(vocabulary.words)
    return WordLanguage(vocabulary, vectors, max_words=max_words, num_blocks=num_blocks).eval()


def test_words_become_ids_and_the_rest_is_padding() -> None:
    language = tiny()
    ids = language.load(["The red zebra!", "a cat on the car on the dog"])
    number = language.vocabulary.words.index
    assert ids[0].tolist() == [number("the"), number("red"), UNK, PAD, PAD]
    assert ids[1].tolist() == [number(word) for word in ("a", "cat", "on", "the", "car")]


def test_padding_and_neighbors_in_a_batch_do_not_matter() -> None:
    language = tiny()
    both = language(language.load(["the red dog", "a cat on the car"]))
    assert both.shape == (2, language.width)
    alone = language(language.load(["the red dog"]))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    language._max_words = 9
    torch.testing.assert_close(language(language.load(["the red dog"])), alone)
    assert not torch.allclose(both[0], both[1])


def test_vectors_stay_as_they_are_and_everything_else_is_trained() -> None:
    language = tiny()
    frozen = {name for name, p in language.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.words.weight"}


def test_the_number_of_blocks_is_a_setting() -> None:
    assert [len(tiny(num_blocks=n).encoder.blocks) for n in (1, 2)] == [1, 2]


def test_words_have_no_classes() -> None:
    language = tiny()
    found = language.classes(language.load(KNOWN))
    assert (found.shape, found.dtype) == ((2, 0), torch.float32)

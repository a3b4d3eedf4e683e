"""First phrases of sentences, and the classes that they name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reir.datasets.coco_classes import COCO_CLASSES
from reir.models.nano.encoder import tokenize
from reir.models.weak_rec.phrases import CLASS_WORDS, PhraseLanguage
from reir_testing.tiny import tiny_model, tiny_tokenizer
from reir_testing.weak.tiny import SENTENCES


def tiny() -> PhraseLanguage:
    language = PhraseLanguage(tiny_model().text.tower, tiny_tokenizer()).eval()
    language.fit(language.load(SENTENCES))
    return language


def alone(language: PhraseLanguage, phrase: str) -> Tensor:
    """The mean of the token states of one phrase, without any batch."""
    ids, mask = tokenize(language.tokenizer, [phrase], 100)
    assert mask.all()
    with torch.no_grad():
        states: Tensor = language.tower(ids, mask)[0]
    return states.mean(0)


def test_a_sentence_is_loaded_as_the_mean_state_of_its_first_phrase() -> None:
    language = tiny()
    loaded = language.load(["the red dog left of the man", "the red dog", "a blue car"])
    torch.testing.assert_close(loaded[0], alone(language, "the red dog"))
    torch.testing.assert_close(loaded[2], alone(language, "a blue car"))
    assert torch.equal(loaded[0], loaded[1])
    assert not torch.allclose(loaded[0], loaded[2])


def test_equal_phrases_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    language, seen = tiny(), list[int]()
    language.tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    texts = [*SENTENCES, "the red dog on the car", SENTENCES[2], "a blue car left of the cat"]
    together = language.load(texts)
    assert sum(seen) == len(SENTENCES)
    one_by_one = torch.cat([language.load([text]) for text in texts])
    torch.testing.assert_close(together, one_by_one)
    monkeypatch.setattr("reir.models.weak_rec.phrases.TEXT_BATCH", 2)
    torch.testing.assert_close(language.load(texts), one_by_one)


def test_nothing_to_load() -> None:
    language = tiny()
    assert language.load([]).shape == (0, language.width)


def test_training_leaves_the_tower_in_eval_mode_while_it_loads() -> None:
    language = tiny()
    for part in language.tower.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.9
    before = language.load(SENTENCES)
    assert torch.equal(language.train().load(SENTENCES), before)
    assert not any(p.requires_grad for p in language.parameters())


def test_every_class_has_a_word_and_people_have_many() -> None:
    assert {number for number, _ in CLASS_WORDS} == set(range(len(COCO_CLASSES)))
    people = {word for number, word in CLASS_WORDS if COCO_CLASSES[number] == "person"}
    assert {"person", "man", "woman"} <= people
    for number, word in CLASS_WORDS:
        assert word == COCO_CLASSES[number] or word in people


def test_class_similarity_is_the_best_cosine_over_the_words_of_the_class() -> None:
    language = tiny()
    loaded = language.load(SENTENCES)
    found = language.classes(loaded).numpy()
    assert found.shape == (len(SENTENCES), len(COCO_CLASSES))

    def unit(x: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.linalg.norm(x))

    words = [unit(alone(language, f"the {word}").double().numpy()) for _, word in CLASS_WORDS]
    by_name = [v for v, (_, word) in zip(words, CLASS_WORDS, strict=True) if word in COCO_CLASSES]
    center = np.mean(by_name, axis=0)
    for row, text in enumerate(loaded.double().numpy()):
        phrase = unit(unit(text) - center)
        best = np.full(len(COCO_CLASSES), -1.0)
        for (number, _), word in zip(CLASS_WORDS, words, strict=True):
            best[number] = max(best[number], float(phrase @ unit(word - center)))
        np.testing.assert_allclose(found[row], best, atol=2e-5)


def test_a_phrase_is_most_similar_to_the_class_that_it_names() -> None:
    language = tiny()
    found = language.classes(language.load(["the dog", "the cat", "the man", "the car"]))
    names = [COCO_CLASSES[number] for number in found.argmax(1).tolist()]
    assert names == ["dog", "cat", "person", "car"]
    torch.testing.assert_close(found.max(1).values, torch.ones(4))


def test_features_are_standardized_over_the_training_sentences() -> None:
    language = tiny()
    found = language(language.load(SENTENCES))
    torch.testing.assert_close(found.mean(0), torch.zeros(language.width), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(language.width), atol=1e-2, rtol=0)

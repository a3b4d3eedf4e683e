"""Filling the query bank: sentences of every second photo; others tell how well photos fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reir.models.nano.model import ClareNano
from reir_testing.tiny import tiny_batch, tiny_model, tiny_tokenizer
from reir_training.data.examples import TrainExpression, TrainPhoto
from reir_training.nano.cache import FrozenCache
from reir_training.nano.query_bank import fill_query_bank

PHOTOS = 6
WORDS = ("red dog", "blue cat", "green man", "red car", "blue man", "green dog")


@pytest.fixture
def cache(tmp_path: Path) -> FrozenCache:
    for name, value in tiny_batch(PHOTOS, 4).tensors().items():
        np.save(tmp_path / f"{name}.npy", value.numpy())
    return FrozenCache(tmp_path)


def photos_with(kind: str) -> list[TrainPhoto]:
    photo = TrainPhoto(
        path=Path("photo.jpg"),
        split="train",
        boxes=np.zeros((1, 4), np.float32),
        categories=np.zeros(1, np.int64),
        names=("dog",),
        expressions=(),
    )
    return [
        replace(photo, expressions=(TrainExpression(text=word, box=0, kind=kind),))
        for word in WORDS
    ]


def usual_penalty(model: ClareNano, cache: FrozenCache, rows: list[int]) -> torch.Tensor:
    batch = cache.batch(rows)
    with torch.inference_mode():
        vectors = model.eval().visual(batch).vectors
        return model.bank.penalties(vectors, batch.valid)[batch.valid].mean()


def test_sentences_of_every_second_photo_enter_the_bank(cache: FrozenCache) -> None:
    model = tiny_model().train()
    fill_query_bank(model, tiny_tokenizer(), photos_with("long"), cache, [0, 1, 2, 3, 5])
    assert model.training
    bank = model.bank
    assert len(torch.unique(bank.vectors, dim=0)) == 3
    torch.testing.assert_close(bank.usual[0], usual_penalty(model, cache, [1, 3]))
    assert bank.usual[0] != 0


def test_filling_twice_gives_the_same_bank(cache: FrozenCache) -> None:
    model = tiny_model()
    found = []
    for _ in range(2):
        fill_query_bank(model, tiny_tokenizer(), photos_with("long"), cache, range(PHOTOS))
        found.append((model.bank.vectors.clone(), float(model.bank.usual)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


def test_without_long_sentences_the_bank_stays_empty(cache: FrozenCache) -> None:
    model = tiny_model()
    fill_query_bank(model, tiny_tokenizer(), photos_with("short"), cache, range(PHOTOS))
    assert not model.bank.vectors.any()


def test_the_sentences_of_an_extended_bank_stay(cache: FrozenCache) -> None:
    model = tiny_model()
    model.bank.fill(torch.nn.functional.normalize(torch.randn(7, model.config.dim), dim=-1))
    model.bank.usual.fill_(0.5)
    before = model.bank.vectors.clone()
    fill_query_bank(model, tiny_tokenizer(), photos_with("long"), cache, range(PHOTOS), extend=True)
    bank = model.bank
    assert torch.equal(bank.vectors[: len(before)], before)
    assert len(bank.vectors) == len(before) + 3  # the sentences of every second photo
    # The mean of the old value, and of how well the other photos fit the extended bank.
    torch.testing.assert_close(bank.usual[0], (0.5 + usual_penalty(model, cache, [1, 3, 5])) / 2)
    assert ClareNano(model.config).load_state_dict(model.state_dict())


def test_a_model_without_a_bank_is_not_extended(cache: FrozenCache) -> None:
    model = tiny_model(bank_sentences=0)
    fill_query_bank(model, tiny_tokenizer(), photos_with("long"), cache, range(PHOTOS), extend=True)
    assert len(model.bank.vectors) == model.config.bank_sentences == 0

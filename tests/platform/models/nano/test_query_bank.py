"""The query bank against loops: photos that fit many sentences get shorter vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reir.models.nano.query_bank import NEAREST, STRENGTH, QueryBank
from reir_testing.tiny import tiny_batch, tiny_model


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(num: int = 40) -> QueryBank:
    bank = QueryBank(num, 8)
    bank.fill(unit(num, 8, seed=1))
    bank.usual.fill_(0.3)
    return bank


def test_factors_equal_a_loop() -> None:
    bank, vectors = filled(), unit(3, 4, 8)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    for photo, factor in enumerate(bank.factors(vectors, valid).tolist()):
        fits = []
        for instance in vectors[photo][valid[photo]]:
            scores = sorted((float(instance @ each) for each in bank.vectors), reverse=True)
            fits.append(sum(scores[:NEAREST]) / NEAREST)
        assert factor == pytest.approx(1 - STRENGTH * (max(0.0, max(fits)) - 0.3), abs=1e-5)


def test_an_empty_bank_and_one_that_was_never_filled_have_no_effect() -> None:
    vectors, valid = unit(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    for bank in (QueryBank(0, 8), QueryBank(40, 8)):
        assert bank.factors(vectors, valid).tolist() == [1.0, 1.0]


def test_photos_without_instances_have_finite_factors() -> None:
    bank = filled()
    assert bank.factors(torch.zeros(2, 0, 8), torch.zeros(2, 0).bool()).isfinite().all()
    assert bank.factors(unit(2, 3, 8), torch.zeros(2, 3).bool()).isfinite().all()


@pytest.mark.parametrize("number", [10, 40, 95])
def test_a_bank_takes_sentences_evenly_and_repeats_them_if_there_are_few(number: int) -> None:
    bank, sentences = QueryBank(40, 8), unit(number, 8)
    bank.fill(sentences)
    rows = [int((each == sentences).all(1).nonzero()[0, 0]) for each in bank.vectors]
    assert len(set(rows)) == min(number, 40)
    if number >= 40:
        assert rows == sorted(rows)
        assert max(rows) >= number - 3


def test_the_stream_scales_all_vectors_of_a_photo_alike_but_not_in_training() -> None:
    model, batch = tiny_model(), tiny_batch(3, 5)
    with torch.inference_mode():
        plain = model.visual(batch)
        model.visual.bank.fill(plain.vectors.flatten(0, 1)[:7])
        scaled = model.visual(batch)
        factors = model.visual.bank.factors(plain.vectors, batch.valid)
        trained = model.train().visual(batch)
    assert len(set(factors.tolist())) == 3
    torch.testing.assert_close(scaled.vectors, plain.vectors * factors[:, None, None])
    torch.testing.assert_close(scaled.image_vectors, plain.image_vectors)
    torch.testing.assert_close(trained.vectors, plain.vectors)

"""The query bank against loops: what fits other sentences gets lower scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from reir.models.nano.candidate_head import CandidateHead, CandidateHeadConfig
from reir.models.nano.model import ClareNano
from reir.models.nano.query_bank import (
    MAX_PART,
    PHOTO_STRENGTH,
    QUERY_VALUE,
    STRENGTH,
    TEMPERATURE,
    QueryBank,
)
from reir_testing.tiny import tiny_batch, tiny_model


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(num: int = 40) -> QueryBank:
    bank = QueryBank(num, 8)
    bank.fill(unit(num, 8, seed=1))
    bank.usual.fill_(0.3)
    return bank


def test_what_the_bank_takes_from_a_score_equals_a_loop() -> None:
    bank, vectors = filled(), unit(3, 4, 8)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    values = QUERY_VALUE * bank(vectors, valid)[..., 0]
    for photo in range(3):
        fits = []
        for instance in vectors[photo][valid[photo]]:
            terms = [math.exp(float(instance @ each) / TEMPERATURE) for each in bank.vectors]
            fits.append(TEMPERATURE * math.log(sum(terms) / len(terms)))
        wanted = [0.3 - STRENGTH * fit - PHOTO_STRENGTH * max(fits) for fit in fits]
        assert values[photo][valid[photo]].tolist() == pytest.approx(wanted, abs=1e-5)


def test_an_empty_bank_and_one_that_was_never_filled_have_no_effect() -> None:
    vectors, valid = unit(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    for bank in (QueryBank(0, 8), QueryBank(40, 8)):
        torch.testing.assert_close(bank(vectors, valid), torch.zeros(2, 3, 1))


def test_photos_without_instances_have_finite_numbers() -> None:
    bank = filled()
    assert bank(torch.zeros(2, 0, 8), torch.zeros(2, 0).bool()).shape == (2, 0, 1)
    assert bank(unit(2, 3, 8), torch.zeros(2, 3).bool()).isfinite().all()


@pytest.mark.parametrize("number", [10, 40, 95])
def test_a_bank_takes_sentences_evenly_and_repeats_them_if_there_are_few(number: int) -> None:
    bank, sentences = QueryBank(40, 8), unit(number, 8)
    bank.fill(sentences)
    rows = [int((each == sentences).all(1).nonzero()[0, 0]) for each in bank.vectors]
    assert len(set(rows)) == min(number, 40)
    if number >= 40:
        assert rows == sorted(rows)
        assert max(rows) >= number - 3


def test_an_extended_bank_takes_old_and_new_sentences_up_to_a_limit() -> None:
    bank, old, new = QueryBank(40, 8), unit(40, 8), unit(MAX_PART + 5, 8, seed=1)
    bank.fill(old)
    bank.extend(new[:3])
    assert torch.equal(bank.vectors, torch.cat([old, new[:3]]))
    for _ in range(2):
        bank.extend(new)
    assert len(bank.vectors) == 2 * MAX_PART
    # Half of the old part was new the time before.
    assert len(torch.unique(torch.cat([bank.vectors[:MAX_PART], new]), dim=0)) < len(new) + 1100


def with_head() -> ClareNano:
    model = tiny_model()
    model.add_candidate_head(CandidateHead(CandidateHeadConfig(), model.text.tower.width))
    return model.eval()


@pytest.mark.parametrize("make", [tiny_model, with_head])
def test_the_bank_changes_the_scores_of_all_expressions_alike(
    make: Callable[[], ClareNano],
) -> None:
    model, batch = make(), tiny_batch(3, 5)
    states, mask = torch.randn(4, 6, model.text.tower.width), torch.ones(4, 6)
    mask[1, 3:] = mask[2, 1:] = 0

    def scores() -> torch.Tensor:
        with torch.inference_mode():
            vectors, texts = model.encode_photos(batch).vectors, model.encode_texts(states, mask)
        assert vectors.shape[-1] == texts.shape[-1] == model.config.vector_dim
        torch.testing.assert_close(texts.norm(dim=-1), torch.ones(4))
        return torch.einsum("bkv,nv->nbk", vectors, texts) / texts[:, None, None, model.config.dim]

    plain = scores()
    bank = model.bank
    bank.fill(unit(7, model.config.dim + model.config.candidate_dims))
    lowered = plain - scores()
    torch.testing.assert_close(lowered, lowered[:1].expand_as(lowered), atol=1e-5, rtol=0)
    assert lowered.std() > 0


def test_an_added_head_empties_the_bank() -> None:
    model = tiny_model()
    model.bank.fill(unit(7, model.config.dim))
    model.add_candidate_head(CandidateHead(CandidateHeadConfig(), model.text.tower.width))
    assert model.bank.vectors.shape[1] == model.config.dim + model.config.candidate_dims
    assert not model.bank.vectors.any()

"""Blending the weights before and after a fine-tune, and choosing how much of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reir_training.finetune.blend import blended, choose_share
from reir_training.finetune.measure import Ranks


def test_weights_lie_on_the_line_between_old_and_new() -> None:
    old = {"a": torch.tensor([0.0, 2.0]), "same": torch.tensor([0.1, 0.3]), "n": torch.tensor(3)}
    new = {"a": torch.tensor([1.0, -2.0]), "same": old["same"].clone(), "n": torch.tensor(5)}
    for share in (0.0, 0.25, 1.0):
        found = blended(old, new, share)
        assert found["a"].tolist() == pytest.approx([share, 2 - 4 * share])
        assert torch.equal(found["same"], old["same"])  # to the last bit
        assert found["n"].item() == 5
    half = blended({"a": torch.ones(2, dtype=torch.float16)}, {"a": torch.zeros(2).half()}, 0.5)
    assert half["a"].dtype == torch.float16


def ranks(firsts: list[int]) -> Ranks:
    """Ranks of sentences about photos 0, 0, 1, 1, ...; 1 means that the right photo is first."""
    count = len(firsts)
    photo_ranks = 1 - np.array(firsts)
    return Ranks(np.arange(count) // 2, photo_ranks, np.zeros(count, int), np.zeros(count, bool))


def test_the_smallest_share_that_is_not_clearly_worse_is_chosen() -> None:
    table = {
        0.0: ranks([0] * 20),
        0.2: ranks([1] * 4 + [0] * 16),
        0.4: ranks([1] * 12 + [0] * 7 + [1]),
        0.6: ranks([1] * 14 + [0] * 6),
        1.0: ranks([1] * 12 + [0] * 8),
    }
    choice = choose_share(table.__getitem__, (0.2, 0.4, 0.6, 1.0))
    assert choice.share == 0.4  # two sentences less than 0.6, one more
    assert choice.figures == {0.0: 0.0, 0.2: 20.0, 0.4: 65.0, 0.6: 70.0, 1.0: 60.0}


def test_a_share_that_is_clearly_worse_is_not_chosen() -> None:
    table = {0.0: ranks([0] * 20), 0.5: ranks([1] * 8 + [0] * 12), 1.0: ranks([1] * 18 + [0] * 2)}
    assert choose_share(table.__getitem__, (0.5, 1.0)).share == 1.0


def test_equal_shares_give_the_smallest() -> None:
    assert choose_share(lambda _: ranks([1, 0, 1, 0]), (0.1, 0.2)).share == 0.1

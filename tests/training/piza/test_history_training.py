"""The history encoder learns from generated searches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reir.errors import DataError
from reir.models.piza.history import HistoryConfig
from reir.records import FloatArray
from reir_training.piza.history_training import HistoryTraining, history_scores, train_history

SMALL = HistoryConfig(feedforward=64)
SHORT = HistoryTraining(steps=300, batch=16)


def small_targets(seed: int, count: int) -> tuple[FloatArray, list[tuple[int, int]]]:
    """Return targets of .02 to .1 % of photos of 3,000 x 2,000 px."""
    random = np.random.default_rng(seed)
    area, log_aspect = random.uniform(0.0002, 0.001, count), random.normal(0, 0.3, count)
    sides = np.sqrt(area[:, None] * np.exp(np.stack([log_aspect, -log_aspect], axis=1)))
    low = random.uniform(0, 1 - sides)
    return np.concatenate([low, low + sides], axis=1).astype(np.float32), [(3000, 2000)] * count


def test_encoder_learns_end_and_progress() -> None:
    encoder = train_history(*small_targets(0, 300), SMALL, SHORT)
    held_out = small_targets(1, 200)
    found = history_scores(encoder, *held_out)
    untrained = history_scores(
        train_history(*held_out, SMALL, HistoryTraining(steps=1, batch=1)), *held_out
    )
    # An untrained encoder never ends a search.
    assert untrained.missed_ends == 1
    assert untrained.progress_error > 0.2
    assert found.end_accuracy > 0.95
    assert found.missed_ends < 0.1
    assert found.early_ends < 0.02
    assert found.progress_error < 0.05
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_training_is_repeatable_and_leaves_the_random_state_alone() -> None:
    brief = HistoryTraining(steps=3, batch=4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again = (train_history(*small_targets(0, 9), SMALL, brief) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    other = train_history(*small_targets(0, 9), SMALL, HistoryTraining(steps=3, batch=4, seed=1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.out.weight, other.out.weight)


def test_no_targets_are_refused() -> None:
    with pytest.raises(DataError, match="learns from true boxes, but there are none"):
        train_history(np.zeros((0, 4), np.float32), [])

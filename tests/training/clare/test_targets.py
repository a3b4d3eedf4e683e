"""Targets of the matching: shapes that fit together, and the class-agnostic view."""

from __future__ import annotations

import pytest
import torch

from reir_training.clare.matching import Targets


def test_targets_with_inconsistent_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"valid must have shape \(2, 3\).*got \(2, 4\)"):
        Targets(
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, 5, dtype=torch.bool),
            torch.zeros(2, 4, dtype=torch.bool),
            torch.zeros(2, 5, dtype=torch.bool),
        )


def test_class_agnostic_targets_have_one_text() -> None:
    valid = torch.tensor([[True, True], [True, False]])
    texts = torch.tensor([[[True, False], [False, True]], [[False, True], [False, False]]])
    targets = Targets(torch.rand(2, 2, 4), texts, valid, torch.ones(2, 2, dtype=torch.bool))
    agnostic = targets.class_agnostic()
    assert agnostic.texts[..., 0].tolist() == valid.tolist()
    assert agnostic.text_valid.tolist() == [[True]] * 2

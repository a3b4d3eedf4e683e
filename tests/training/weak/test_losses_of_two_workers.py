"""Losses over the gathered batch of two workers have the gradients of one worker's batch."""

from __future__ import annotations

from pathlib import Path

import torch

from reir_testing.training.weak_losses import losses_of_one_worker, losses_of_workers


def test_two_workers_equal_one(tmp_path: Path) -> None:
    alone, together = losses_of_one_worker(), losses_of_workers(tmp_path)
    assert alone.keys() == together.keys()
    assert len(alone) == 3 * (1 + 4)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, msg=name)
    for loss in ("contrast", "suppression", "equivariance"):
        assert alone[loss] > 0
        assert alone[f"{loss} texts.weight"].any()
        assert alone[f"{loss} anchors.weight"].any()

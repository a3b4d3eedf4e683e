"""Batch norm over the batch of all workers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from reir_testing.training.batch_norms import norms_of_one_worker, norms_of_workers
from reir_training.run.batch_norm import GlobalBatchNorm, use_global_batch_norm
from reir_training.run.collectives import WorkerCollectives


def test_two_workers_compute_what_torch_computes_for_the_whole_batch(tmp_path: Path) -> None:
    alone, together = norms_of_one_worker(), norms_of_workers(tmp_path)
    assert alone.keys() == together.keys()
    # Outputs of two steps and in eval mode, gradients of eight weights, statistics of two norms.
    assert len(alone) == 3 + 8 + 6
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, msg=name)
    assert alone["maps.1.num_batches_tracked"] == 2
    assert alone["gradient maps.0.weight"].abs().max() > 0.1


def test_only_batch_norms_are_replaced_and_their_parameters_stay_the_same() -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.LayerNorm(3), nn.Sequential(nn.BatchNorm1d(3, eps=0.5, momentum=0.2))
    ).eval()
    weights, state = list(model.parameters()), model.state_dict()
    use_global_batch_norm(model, WorkerCollectives())
    norm = model.get_submodule("2.0")
    assert isinstance(norm, GlobalBatchNorm)
    assert (norm.eps, norm.momentum, norm.training) == (0.5, 0.2, False)
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    assert list(model.state_dict()) == list(state)
    assert type(model[1]) is nn.LayerNorm

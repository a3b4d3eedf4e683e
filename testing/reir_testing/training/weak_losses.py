"""Losses of training without boxes, computed by one worker or by several."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reir.losses import anchor_contrast, equivariance, false_negative_suppression
from reir_testing.training.processes import run_workers
from reir_training.run.collectives import WorkerCollectives, mean_over_workers

NUM_PAIRS, NUM_ANCHORS, NUM_PHOTOS = 7, 3, 5
WIDTH = 4


class Losses(nn.Module):
    """A tiny model of texts and anchors, and the three losses of the batch of all workers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.texts, self.anchors = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(
        self, batch: dict[str, Tensor], workers: WorkerCollectives | None
    ) -> dict[str, Tensor]:
        """Return the losses of a worker's pairs together with those of all other workers."""
        rows = {
            "texts": self.texts(batch["texts"]),
            "anchors": self.anchors(batch["anchors"]),
            "valid": batch["valid"],
            "photos": batch["photos"],
        }
        if workers is not None:
            rows = {name: workers.gather(values) for name, values in rows.items()}
        same_NN = rows["photos"][:, None] == rows["photos"][None, :]
        args = rows["texts"], rows["anchors"], rows["valid"]
        return {
            "contrast": anchor_contrast(*args, same_NN),
            "suppression": false_negative_suppression(*args),
            "equivariance": equivariance(*args),
        }


def global_batch() -> dict[str, Tensor]:
    """Return the pairs of all workers; a photo occurs twice, and a photo has no anchors."""
    random = torch.Generator().manual_seed(1)
    valid = torch.rand(NUM_PAIRS, NUM_ANCHORS, generator=random) < 0.7
    valid[3] = False
    return {
        "texts": torch.randn(NUM_PAIRS, WIDTH, generator=random, dtype=torch.float64),
        "anchors": torch.randn(NUM_PAIRS, NUM_ANCHORS, WIDTH, generator=random).double(),
        "valid": valid,
        "photos": torch.arange(NUM_PAIRS) % NUM_PHOTOS,
    }


def losses_of_one_worker() -> dict[str, Tensor]:
    """Return each loss and its gradients, by names such as "contrast" and "contrast texts.bias"."""
    return _losses_and_gradients(global_batch(), None)


def losses_of_workers(folder: Path, num_workers: int = 2) -> dict[str, Tensor]:
    """Return the same, averaged over several processes, whose shares of the batch differ in size.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; contains its traceback.
    """
    run_workers(folder, partial(_run_worker, folder), num_workers)
    return load_file(folder / "losses.safetensors")


def _run_worker(folder: Path, rank: int, world_size: int) -> None:
    starts = torch.linspace(0, NUM_PAIRS, world_size + 1).long()
    share = {n: values[starts[rank] : starts[rank + 1]] for n, values in global_batch().items()}
    results = _losses_and_gradients(share, WorkerCollectives())
    averaged = {name: mean_over_workers(value) for name, value in results.items()}
    if rank == 0:
        save_file(averaged, folder / "losses.safetensors")


def _losses_and_gradients(
    batch: dict[str, Tensor], workers: WorkerCollectives | None
) -> dict[str, Tensor]:
    model, results = Losses(), {}
    for name, loss in model(batch, workers).items():
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        results[name] = loss.detach()
        results |= {f"{name} {k}": g for k, g in zip(parameters, gradients, strict=True)}
    return results

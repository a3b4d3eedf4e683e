"""A batch norm in training, run by one worker or by several."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reir_testing.training.processes import run_workers
from reir_training.run.batch_norm import use_global_batch_norm
from reir_training.run.collectives import WorkerCollectives, mean_over_workers

NUM_ROWS, CHANNELS, STEPS = 6, 3, 2


class Norms(nn.Module):
    """Batch norms of a map and of vectors, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.Sequential(nn.Conv2d(2, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.vectors = nn.Sequential(nn.Linear(CHANNELS, 4), nn.BatchNorm1d(4, momentum=0.3))
        for norm in (self.maps[1], self.vectors[1]):
            assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, H, W) -> (B, 4)."""
        found: Tensor = self.vectors(self.maps(x).amax((2, 3)))
        return found


def norms_of_one_worker() -> dict[str, Tensor]:
    """Return the outputs, gradients and running statistics after a few steps, by name."""
    return _run(0, 1, None)


def norms_of_workers(folder: Path, num_workers: int = 2) -> dict[str, Tensor]:
    """Return the same of several processes, whose gradients are averaged.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker failed; contains its traceback.
    """
    run_workers(folder, partial(_run_worker, folder), num_workers)
    return load_file(folder / "norms.safetensors")


def _run_worker(folder: Path, rank: int, world_size: int) -> None:
    found = _run(rank, world_size, WorkerCollectives())
    if rank == 0:
        save_file(found, folder / "norms.safetensors")


def _run(rank: int, world_size: int, workers: WorkerCollectives | None) -> dict[str, Tensor]:
    model = Norms().train()
    if workers is not None:
        use_global_batch_norm(model, workers)
    share = NUM_ROWS // world_size
    random = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = torch.randn(NUM_ROWS, 2, 4, 5, generator=random, dtype=torch.float64)
        weight = torch.randn(NUM_ROWS, 4, generator=random, dtype=torch.float64)
        rows = model(x[rank * share : (rank + 1) * share])
        whole = rows if workers is None else workers.gather(rows)
        found[f"output {step}"] = whole.detach()
        (whole * weight).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"gradient {n}": mean_over_workers(gradient) for n, gradient in gradients.items()}
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        return found | statistics | {"output in eval mode": model(x)}

"""What workers tell one another within a step: vectors, labels, identities, counts."""

# Shapes: M rows of one worker, M' of all others

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """(M, C) of every worker -> (workers, M, C); back come the gradients that all of them have."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ARG004 - nothing is kept
        tables = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(tables, rows)
        return torch.stack(tables)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004 - nothing was kept
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_all(values: Tensor) -> list[Tensor]:
    """(M, ...) of every worker, in order of rank, on each of them; floats carry gradients back.

    Workers may hold different numbers of rows: all pad to the longest, and the padding is cut away
    again after the exchange.
    """
    here = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, here)
    longest = int(max(counts))
    rows = values.flatten(1) if values.ndim > 1 else values[:, None]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows))).contiguous()
    tables = _AllGather.apply(padded)  # type: ignore[no-untyped-call]
    return [
        table[: int(count)].reshape(-1, *values.shape[1:])
        for table, count in zip(tables, counts, strict=True)
    ]


def mean_over_workers(values: Tensor) -> Tensor:
    """Numbers of this worker -> their mean over all workers, if any, without gradient."""
    total = values.detach().clone()
    if not dist.is_initialized():
        return total
    dist.all_reduce(total)
    return total / dist.get_world_size()


class AllWorkers:
    """The workers of a distributed run, as an objective asks them."""

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank()

    def all(self, values: Tensor) -> Tensor:
        """(M, ...) of this worker -> those of all workers in order of rank; see `gather_all`."""
        return torch.cat(gather_all(values))

    def others(self, values: Tensor) -> Tensor:
        """(M, ...) of this worker -> (M', ...) of all other workers; see `gather_all`."""
        tables = gather_all(values)
        return torch.cat(tables[: self.rank] + tables[self.rank + 1 :])

    def mean(self, values: Tensor) -> Tensor:
        """See `mean_over_workers`."""
        return mean_over_workers(values)

"""What workers tell one another within a step: expression vectors, identities, counts."""

# Shapes: M expressions of one worker, M' of all others

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


def gather_others(values: Tensor) -> Tensor:
    """(M, ...) of this worker -> (M', ...) of all other workers; floats carry gradients back.

    Workers may hold different numbers of expressions: all pad to the longest, and the padding is
    cut away again after the exchange.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    here = torch.tensor([len(values)], device=values.device)
    counts = [torch.zeros_like(here) for _ in range(world_size)]
    dist.all_gather(counts, here)
    longest = int(max(counts))
    rows = values.flatten(1) if values.ndim > 1 else values[:, None]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows))).contiguous()
    tables = _AllGather.apply(padded)  # type: ignore[no-untyped-call]
    others = [t[: int(n)] for i, (t, n) in enumerate(zip(tables, counts, strict=True)) if i != rank]
    return torch.cat(others).reshape(-1, *values.shape[1:])


def mean_over_workers(counts: Tensor) -> Tensor:
    """(K,) counts of this worker -> their mean over all workers, without gradient."""
    total = counts.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class AllWorkers:
    """The other workers of a distributed run, as an objective asks them."""

    def others(self, values: Tensor) -> Tensor:
        """See `gather_others`."""
        return gather_others(values)

    def mean(self, counts: Tensor) -> Tensor:
        """See `mean_over_workers`."""
        return mean_over_workers(counts)

"""Collective communication between workers within a step."""

# Shapes: M rows of one worker, M' rows of all others

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """All-gather with gradients: (M, C) per worker -> (workers, M, C).

    `dist.all_gather` alone returns tensors without gradients. Every worker computes its loss from
    the rows of all workers, so the gradient of a row is the sum of its gradients on all workers.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ARG004 - backward needs no tensors
        tables = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(tables, rows)
        return torch.stack(tables)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004 - backward needs no tensors
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_all(values: Tensor) -> list[Tensor]:
    """Gather the (M, ...) rows of every worker, in order of rank, with gradients for floats.

    Workers may have different numbers of rows, but `all_gather` requires equal shapes. So the rows
    are padded to the longest, and the padding is removed afterwards.
    """
    # On the device of the values: nccl cannot communicate tensors of the host.
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
    """Average numbers over all workers, without gradient; on a single worker, return them."""
    total = values.detach().clone()
    if not dist.is_initialized():
        return total
    dist.all_reduce(total)
    return total / dist.get_world_size()


class WorkerCollectives:
    """The collective operations that the objectives use, on `torch.distributed`."""

    @property
    def rank(self) -> int:
        """The rank of this worker."""
        return dist.get_rank()

    def gather(self, values: Tensor) -> Tensor:
        """Gather the rows of all workers, in order of rank; see `gather_all`."""
        return torch.cat(gather_all(values))

    def gather_others(self, values: Tensor) -> Tensor:
        """Gather the rows of all other workers, (M, ...) -> (M', ...); see `gather_all`."""
        tables = gather_all(values)
        # The own rows are left out, since the caller has them already; their gradients need no
        # communication.
        return torch.cat(tables[: self.rank] + tables[self.rank + 1 :])

    def mean(self, values: Tensor) -> Tensor:
        """Average numbers over all workers; see `mean_over_workers`."""
        return mean_over_workers(values)

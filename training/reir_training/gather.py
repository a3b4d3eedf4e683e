"""Differentiable gathering of expression vectors across workers, for CLIA."""

# Shapes: M expressions of one worker, D dimension

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def gather_others(vectors_MD: Tensor) -> Tensor:
    """(M', D) vectors of all other workers, with gradients back to them.

    Workers may hold different numbers of expressions: all pad to the longest, and the padding is
    cut away again after the exchange.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    here = torch.tensor([len(vectors_MD)], device=vectors_MD.device)
    counts = [torch.zeros_like(here) for _ in range(world_size)]
    dist.all_gather(counts, here)
    longest = int(max(counts))
    padded = torch.nn.functional.pad(vectors_MD, (0, 0, 0, longest - len(vectors_MD)))
    parts: tuple[Tensor, ...] = all_gather(padded.contiguous())  # type: ignore[no-untyped-call]
    others = [p[: int(n)] for i, (p, n) in enumerate(zip(parts, counts, strict=True)) if i != rank]
    return torch.cat(others)

"""What a model and its optimiser weigh on one worker, for each stage of ZeRO.

The shares are those of Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models" (arXiv 1910.02054), section 5: stage 1 shares the states of the optimiser among
the workers, stage 2 the gradients too, stage 3 the weights too. The paper counts fp16 weights; ours
are float32 and bf16 is autocast, so every number takes 4 bytes:

    weights 4 (P + F), gradients 4 P, Adam's two moments 8 P

for P trainable and F frozen parameters. From stage 1 on DeepSpeed keeps a second copy of the
weights that the optimiser moves (4 P, shared like the moments) and a buffer in which gradients are
exchanged; stage 3 also holds parameters that were fetched from other workers, up to a limit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BYTES = 4
MAX_BUCKET = 500_000_000
"""Gradients that DeepSpeed exchanges at once."""
MAX_LIVE = 1_000_000_000
"""Parameters that stage 3 leaves whole at once (DeepSpeed's `stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker.

    Attributes:
        zero_stage: 0 to 3.
        weights, gradients, optimiser: of the model.
        buffers: of DeepSpeed.
    """

    zero_stage: int
    weights: int
    gradients: int
    optimiser: int
    buffers: int

    @property
    def total(self) -> int:
        """All but what the forward pass keeps for the backward pass."""
        return self.weights + self.gradients + self.optimiser + self.buffers

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "total": self.total}


def bucket_size(trainable: int) -> int:
    """Gradients exchanged at once: no buffer is larger than there are gradients."""
    return max(1, min(trainable, MAX_BUCKET))


def memory_of(zero_stage: int, *, trainable: int, frozen: int, num_workers: int) -> Memory:
    """Estimate by the formulas above.

    Args:
        zero_stage: 0 to 3.
        trainable, frozen: parameters of the model.
        num_workers: that share what the stage shares.
    """

    def shared(count: int, from_stage: int) -> int:
        return -(-count // num_workers) if zero_stage >= from_stage else count

    everything = trainable + frozen
    buffers = bucket_size(trainable) if zero_stage else 0
    if zero_stage == 3 and num_workers > 1:
        buffers += min(everything, MAX_LIVE)
    return Memory(
        zero_stage,
        weights=BYTES * shared(everything, 3),
        gradients=BYTES * shared(trainable, 2),
        optimiser=BYTES * shared((3 if zero_stage else 2) * trainable, 1),
        buffers=BYTES * buffers,
    )

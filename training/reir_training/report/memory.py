"""Estimates the memory of a model and its optimizer on one worker, for each ZeRO stage.

The shares are those of Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models" (arXiv 1910.02054), section 5: stage 1 shards the optimizer states across the
workers, stage 2 also the gradients, stage 3 also the weights. The paper assumes fp16 weights; ours
are float32, with bf16 only under autocast, so every number takes 4 bytes:

    weights 4 (P + F), gradients 4 P, Adam's two moments 8 P

for P trainable and F frozen parameters. From stage 1 on, DeepSpeed keeps a second copy of the
trainable weights for the optimizer (4 P, sharded like the moments) and a communication buffer for
gradients. In stage 3, each worker also holds parameters that it has fetched from other workers, up
to a limit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BYTES = 4
# DeepSpeed's defaults for `reduce_bucket_size` and `stage3_max_live_parameters`.
MAX_BUCKET = 500_000_000
"""Number of gradients that DeepSpeed communicates at once."""
MAX_LIVE = 1_000_000_000
"""Number of parameters that stage 3 keeps unsharded."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory on one worker, in bytes.

    Attributes:
        zero_stage: 0 to 3.
        weights, gradients, optimizer: memory for each.
        buffers: memory for the buffers of DeepSpeed.
    """

    zero_stage: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        """The sum of all parts, which does not include activations."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "total": self.total}


def bucket_size(trainable: int) -> int:
    """Return the size of the gradient buffer, which never exceeds the number of gradients."""
    return max(1, min(trainable, MAX_BUCKET))


def estimate_memory(
    zero_stage: int, *, trainable: int, frozen: int, num_workers: int
) -> MemoryEstimate:
    """Estimate by the formulas above.

    Args:
        zero_stage: 0 to 3.
        trainable, frozen: parameters of the model.
        num_workers: number of workers that the stage shards across.
    """

    def shared(count: int, from_stage: int) -> int:
        return -(-count // num_workers) if zero_stage >= from_stage else count

    everything = trainable + frozen
    # Stage 0 is plain data parallelism, without the buffer and the copy of the sharding optimizer.
    buffers = bucket_size(trainable) if zero_stage else 0
    if zero_stage == 3 and num_workers > 1:
        buffers += min(everything, MAX_LIVE)
    return MemoryEstimate(
        zero_stage,
        weights=BYTES * shared(everything, 3),
        gradients=BYTES * shared(trainable, 2),
        optimizer=BYTES * shared((3 if zero_stage else 2) * trainable, 1),
        buffers=BYTES * buffers,
    )

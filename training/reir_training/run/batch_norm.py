"""Batch norm over the batch of all workers, so that several workers compute what one would.

`torch.nn.SyncBatchNorm` does this on GPUs only.
"""

# Shapes: B rows of one worker, C channels

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reir_training.run.collectives import WorkerCollectives


class GlobalBatchNorm(_BatchNorm):
    """A batch norm whose mean and variance in training are those of the batch of all workers.

    Args:
        norm: batch norm that it replaces, and whose parameters and buffers it keeps.
        workers: all of them must run it in every training step.
    """

    def __init__(self, norm: _BatchNorm, workers: WorkerCollectives) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)
        self._workers = workers
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [-1, *[1] * (x.ndim - 2)]
        count = self._sum(x.new_tensor(x.numel() // x.shape[1]))
        mean_C = self._sum(x.sum(axes)) / count
        deviation = x - mean_C.view(shape)
        variance_C = self._sum(deviation.square().sum(axes)) / count
        self._follow(mean_C, variance_C * count / (count - 1))
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return deviation * scale_C.view(shape) + self.bias.view(shape)

    def _sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over all workers, with gradients."""
        return self._workers.gather(value[None]).sum(0)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, unbiased_variance_C: Tensor) -> None:
        """Move the running statistics toward those of the batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(unbiased_variance_C, self.momentum)
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - the name of the base class
        """Accept any number of axes."""


def use_global_batch_norm(model: nn.Module, workers: WorkerCollectives) -> None:
    """Replace the batch norms in a model; names in its state stay as they are."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm(child, workers))

"""Convolutions that apply their activation in the same pass over memory.

On a CPU, oneDNN can apply the activation while the output of the convolution is still in cache.
Torch exposes that only through `mkldnn._convolution_pointwise`, the operator that its compiler
emits. It has no gradient, so in training, and on any other device, convolution and activation run
one after the other, with the same result.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu6", "silu"]

# Scripted, since torch.jit.trace cannot record a call with a list of numbers such as `limits`.
_SOURCE = """
def relu6(x: Tensor, weight: Tensor, bias: Optional[Tensor],
          padding: List[int], stride: List[int], groups: int):
    limits: List[Optional[number]] = [0.0, 6.0]
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, [1, 1], groups, "hardtanh", limits, None)

def silu(x: Tensor, weight: Tensor, bias: Optional[Tensor],
         padding: List[int], stride: List[int], groups: int):
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, [1, 1], groups, "swish", [], None)
"""


class Convolution(NamedTuple):
    """A convolution without dilation, and with equal padding on opposite sides.

    Attributes:
        weight: (C_out, C / groups, height, width).
        bias: (C_out,).
        stride: along both axes.
        padding: cells added above and below, and to the left and right.
        groups: number of channel groups.
    """

    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int]
    groups: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, ...)."""
        return F.conv2d(x, *self[:4], groups=self.groups)

    def with_activation(self, x: Tensor, activation: Activation) -> Tensor:
        """Apply the convolution, then the activation."""
        if _can_fuse(x):
            weight, bias, stride, padding, groups = self
            fused = getattr(_fused_operators(), activation)
            return torch.as_tensor(fused(x, weight, bias, list(padding), [stride, stride], groups))
        y = self(x)
        # In place, which saves memory: nothing else reads the output of the convolution.
        return F.relu6(y, inplace=True) if activation == "relu6" else F.silu(y, inplace=True)


def _can_fuse(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and x.dtype in _FUSED_TYPES
    )


def _fused_types() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    # On a CPU with AVX2 only, oneDNN raises an error for bf16.
    halves = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    return (torch.float32, *halves)


_FUSED_TYPES = _fused_types()


@cache
def _fused_operators() -> torch.jit.CompilationUnit:
    # Compiled on first use, since it fails if torch was built without oneDNN.
    return torch.jit.CompilationUnit(_SOURCE)

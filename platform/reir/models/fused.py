"""A convolution and its activation in one pass over memory.

On the CPU oneDNN applies the activation while the convolution's output is still in cache; torch
reaches that only through the operator that its compiler emits. Used for inference; in training, and
on any other device, the two run one after the other, with the same result.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu6", "silu"]

# torch.jit.trace cannot pass the operator its list of numbers, a scripted function can
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
    """A convolution without dilation, which pads both sides alike.

    Attributes:
        weight: (C_out, C / groups, height, width).
        bias: (C_out,).
        stride: of both axes.
        padding: cells added above and below, and left and right.
        groups: of channels.
    """

    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int]
    groups: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, ...)."""
        return F.conv2d(x, *self[:4], groups=self.groups)

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """Return the activation of what it makes of x."""
        if _can_fuse(x):
            weight, bias, stride, padding, groups = self
            fused = getattr(_compiled(), activation)
            return torch.as_tensor(fused(x, weight, bias, list(padding), [stride, stride], groups))
        y = self(x)
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
    # on CPUs with AVX2 alone oneDNN has no bf16 and refuses it
    halves = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    return (torch.float32, *halves)


_FUSED_TYPES = _fused_types()


@cache
def _compiled() -> torch.jit.CompilationUnit:
    return torch.jit.CompilationUnit(_SOURCE)  # fails where torch has no oneDNN

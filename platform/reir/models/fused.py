"""A convolution and its activation in one pass over memory.

On the CPU oneDNN applies the activation while the convolution's output is still in cache; torch
reaches that only through the operator that its compiler emits. Used for inference; in training, and
on any other device, the two run one after the other, with the same result.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu6", "silu"]
_ONEDNN: dict[str, tuple[str, list[float]]] = {
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
}


def conv_activation(
    conv: nn.Conv2d, x: Tensor, padding: tuple[int, int], activation: Activation
) -> Tensor:
    """Return `activation(conv(x))`.

    Args:
        conv: without dilation; its own padding is not used.
        x: (N, C, H, W).
        padding: cells added above and below, and left and right.
        activation: what follows the convolution.
    """
    if _can_fuse(x):
        name, scalars = _ONEDNN[activation]
        stride, groups = list(conv.stride), conv.groups
        fused = torch.ops.mkldnn._convolution_pointwise
        return torch.as_tensor(
            fused(x, conv.weight, conv.bias, padding, stride, [1, 1], groups, name, scalars, None)
        )
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, groups=conv.groups)
    return F.relu6(y, inplace=True) if activation == "relu6" else F.silu(y, inplace=True)


def _can_fuse(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _multiplies_bf16()))
    )


@cache
def _multiplies_bf16() -> bool:
    """False on CPUs (AVX2 alone) for which oneDNN has no bf16 and refuses it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

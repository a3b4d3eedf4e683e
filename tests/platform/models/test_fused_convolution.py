"""Fused convolutions against the two steps that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reir.models.fused_convolution import Activation, Convolution

STEPS = {"relu6": F.relu6, "silu": F.silu}


@pytest.mark.parametrize("activation", ["relu6", "silu"])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 8), (2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [0, 3])
def test_a_fused_convolution_equals_convolution_then_activation(
    activation: Activation, stride: int, groups: int, dtype: torch.dtype, num: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, stride, 1, groups=groups).to(dtype)
    x = 4 * torch.randn(num, 8, 9, 7).to(dtype)
    with torch.inference_mode():
        expected = STEPS[activation](conv(x))
        convolution = Convolution(conv.weight, conv.bias, stride, (1, 1), groups)
        found = convolution.with_activation(x, activation)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if num:
        assert expected.std() > 0.5  # both branches of the activation are met


def test_gradients_flow_through_a_fused_convolution() -> None:
    conv = nn.Conv2d(3, 4, 1)
    convolution = Convolution(conv.weight, conv.bias, 1, (0, 0))
    total = convolution.with_activation(torch.randn(2, 3, 5, 5), "silu").sum()
    (gradient,) = torch.autograd.grad(total, [conv.weight])
    assert gradient.abs().sum() > 0

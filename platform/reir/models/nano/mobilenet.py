"""MobileNetV2 1.0 with folded batch norm and without its classifier.

Padding is TensorFlow's SAME (an odd cell goes to the right or bottom), as the published weights
expect. Submodules are declared in the order in which they run, since the weight loader matches
them to the published weights by that order.
"""

# Shapes: N crops or images, H height, W width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.fused_convolution import Convolution

CHANNELS = 1280
# (expansion, output channels, number of blocks, stride of the first block)
PLAN = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

FINE_BLOCKS = 6  # down to stride 8


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: the output has ceil(side / stride) cells."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(c_in, c_out, kernel, stride, 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        x, convolution = self.with_even_padding(x)
        return convolution(x)

    def with_even_padding(self, x: Tensor) -> tuple[Tensor, Convolution]:
        """Return an input and a convolution with equal padding on opposite sides; same result.

        The fused convolution of oneDNN accepts only equal padding.
        """
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(int(x.shape[2]), kernel, stride)
        left, right = same_padding(int(x.shape[3]), kernel, stride)
        weight, padding = self.weight, (top, left)
        if self.groups > 1:
            # Zeros around the kernel of a depthwise convolution, which has a single channel, are
            # cheaper than padding, and so copying, the feature maps.
            weight, padding = F.pad(weight, (right - left, 0, bottom - top, 0)), (bottom, right)
        elif (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return x, Convolution(weight, self.bias, stride, padding, self.groups)


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the cells to add before and after an axis of `length` cells."""
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


class ConvReLU6(nn.Module):
    """A convolution, then ReLU6."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = SameConv(c_in, c_out, kernel, stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        x, convolution = self.conv.with_even_padding(x)
        return convolution.with_activation(x, "relu6")


class InvertedResidual(nn.Module):
    """Inverted residual block: expand, depthwise convolution, project; residual if shapes match."""

    def __init__(self, c_in: int, c_out: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expand = ConvReLU6(c_in, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = ConvReLU6(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = SameConv(hidden, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.residual else y


class MobileNetV2(nn.Module):
    """Stem, inverted residual blocks to stride 32, and a wide convolution: 2.2 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvReLU6(3, 32, 3, stride=2)
        c_in, blocks = 32, []
        for expansion, c_out, depth, stride in PLAN:
            for i in range(depth):
                first = stride if i == 0 else 1
                blocks.append(InvertedResidual(c_in, c_out, expansion=expansion, stride=first))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvReLU6(c_in, CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images or crops.

        Args:
            images: (N, 3, H, W), RGB in [-1, 1], i.e. value / 127.5 - 1.

        Returns:
            (N, 1280, H/32, W/32), sides rounded up; the mean over cells is the usual vector.
        """
        y: Tensor = self.coarse(self.fine(images))
        return y

    @property
    def fine(self) -> nn.Sequential:
        """First part, (N, 3, H, W) -> (N, 32, H/8, W/8): few channels, large maps."""
        return nn.Sequential(self.stem, *list(self.blocks)[:FINE_BLOCKS])

    @property
    def coarse(self) -> nn.Sequential:
        """Second part, (N, 32, H/8, W/8) -> (N, 1280, H/32, W/32): many channels, small maps."""
        return nn.Sequential(*list(self.blocks)[FINE_BLOCKS:], self.head)

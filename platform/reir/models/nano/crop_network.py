"""Networks that encode crops: MobileNetV2 and EfficientNet-Lite.

They have the same parts and differ in a plan. Batch norm is folded into the convolutions, and the
classifier is left out. Padding is TensorFlow's SAME (an odd cell goes to the right or bottom), as
the published weights expect. Submodules are declared in the order in which they run, since the
weight loader matches them to the published weights by that order.

Sources: MobileNetV2 (Sandler et al. 2018, table 2); EfficientNet-Lite, the EfficientNet (Tan and Le
2019, table 1) without squeeze-and-excitation and with ReLU6, whose stem and head have the same
width in all sizes.
"""

# Shapes: N crops or images, H height, W width

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.fused_convolution import Convolution

CropNetworkName = Literal["mobilenet_v2", "efficientnet_lite0", "efficientnet_lite2"]

CHANNELS = 1280
STEM_CHANNELS = 32


class Stage(NamedTuple):
    """Blocks with the same number of output channels; only the first one may have a stride."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int = 3


@dataclass(frozen=True)
class Plan:
    """What distinguishes one network from another.

    Attributes:
        stages: inverted residual blocks, down to stride 32.
        center, scale: the network expects (value - center) / scale for values from 0 to 255.
    """

    stages: tuple[Stage, ...]
    center: float
    scale: float

    @property
    def fine_blocks(self) -> int:
        """Number of blocks down to stride 8."""
        return sum(stage.blocks for stage in self.stages[:3])


PLANS: dict[CropNetworkName, Plan] = {
    "mobilenet_v2": Plan(
        (
            Stage(1, 16, 1, 1),
            Stage(6, 24, 2, 2),
            Stage(6, 32, 3, 2),
            Stage(6, 64, 4, 2),
            Stage(6, 96, 3, 1),
            Stage(6, 160, 3, 2),
            Stage(6, 320, 1, 1),
        ),
        center=127.5,
        scale=127.5,
    ),
    "efficientnet_lite0": Plan(
        (
            Stage(1, 16, 1, 1),
            Stage(6, 24, 2, 2),
            Stage(6, 40, 2, 2, 5),
            Stage(6, 80, 3, 2),
            Stage(6, 112, 3, 1, 5),
            Stage(6, 192, 4, 2, 5),
            Stage(6, 320, 1, 1),
        ),
        center=127.0,
        scale=128.0,
    ),
    # 1.1 times as wide and 1.2 times as deep, rounded as published.
    "efficientnet_lite2": Plan(
        (
            Stage(1, 16, 1, 1),
            Stage(6, 24, 3, 2),
            Stage(6, 48, 3, 2, 5),
            Stage(6, 88, 4, 2),
            Stage(6, 120, 4, 1, 5),
            Stage(6, 208, 5, 2, 5),
            Stage(6, 352, 1, 1),
        ),
        center=127.0,
        scale=128.0,
    ),
}


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

    def __init__(
        self, c_in: int, c_out: int, *, expansion: int, stride: int, kernel: int = 3
    ) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.expand = ConvReLU6(c_in, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = ConvReLU6(hidden, hidden, kernel, stride=stride, groups=hidden)
        self.project = SameConv(hidden, c_out, 1)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.residual else y


class CropNetwork(nn.Module):
    """Stem, inverted residual blocks to stride 32, and a wide convolution.

    MobileNetV2 has 2.2 M parameters, EfficientNet-Lite0 3.4 M and -Lite2 4.8 M.

    Args:
        name: of the plan.
    """

    def __init__(self, name: CropNetworkName = "mobilenet_v2") -> None:
        super().__init__()
        self.plan = PLANS[name]
        self.stem = ConvReLU6(3, STEM_CHANNELS, 3, stride=2)
        c_in, blocks = STEM_CHANNELS, []
        for stage in self.plan.stages:
            for i in range(stage.blocks):
                blocks.append(
                    InvertedResidual(
                        c_in,
                        stage.channels,
                        expansion=stage.expansion,
                        stride=stage.stride if i == 0 else 1,
                        kernel=stage.kernel,
                    )
                )
                c_in = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvReLU6(c_in, CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images or crops.

        Args:
            images: (N, 3, H, W), RGB, normalized as the plan says.

        Returns:
            (N, 1280, H/32, W/32), sides rounded up; the mean over cells is the usual vector.
        """
        y: Tensor = self.coarse(self.fine(images))
        return y

    @property
    def fine(self) -> nn.Sequential:
        """First part, (N, 3, H, W) -> (N, C, H/8, W/8): few channels, large maps."""
        return nn.Sequential(self.stem, *list(self.blocks)[: self.plan.fine_blocks])

    @property
    def coarse(self) -> nn.Sequential:
        """Second part, (N, C, H/8, W/8) -> (N, 1280, H/32, W/32): many channels, small maps."""
        return nn.Sequential(*list(self.blocks)[self.plan.fine_blocks :], self.head)

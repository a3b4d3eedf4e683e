"""Networks that encode crops: EfficientNet-Lite0 and -Lite2.

They have the same parts and differ in a plan. Batch norm is folded into the convolutions, and the
classifier is left out. Padding is TensorFlow's SAME (an odd cell goes to the right or bottom), as
the published weights expect. Submodules are declared in the order in which they run, since the
weight loader matches them to the published weights by that order.

Source: EfficientNet-Lite, which is EfficientNet (Tan and Le 2019, table 1) with ReLU6 and without
squeeze-and-excitation; stem and head have the same width in all sizes.
"""

# Shapes: N crops or images, H height, W width

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

CropNetworkName = Literal["efficientnet_lite0", "efficientnet_lite2"]

CHANNELS = 1280
STEM_CHANNELS = 32


class Stage(NamedTuple):
    """Blocks with the same number of output channels; only the first one may have a stride."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int = 3


PLANS: dict[CropNetworkName, tuple[Stage, ...]] = {
    "efficientnet_lite0": (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 40, 2, 2, 5),
        Stage(6, 80, 3, 2),
        Stage(6, 112, 3, 1, 5),
        Stage(6, 192, 4, 2, 5),
        Stage(6, 320, 1, 1),
    ),
    # 1.1 times as wide and 1.2 times as deep, rounded as published.
    "efficientnet_lite2": (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 3, 2),
        Stage(6, 48, 3, 2, 5),
        Stage(6, 88, 4, 2),
        Stage(6, 120, 4, 1, 5),
        Stage(6, 208, 5, 2, 5),
        Stage(6, 352, 1, 1),
    ),
}
"""The stages of each network, down to stride 32."""

PIXEL_CENTER, PIXEL_SCALE = 127.0, 128.0
"""The published weights expect (value - center) / scale for values from 0 to 255."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: the output has ceil(side / stride) cells."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(c_in, c_out, kernel, stride, 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(int(x.shape[2]), kernel, stride)
        left, right = same_padding(int(x.shape[3]), kernel, stride)
        # If both sides get the same, the convolution can pad by itself, without a copy of the map.
        if (top, left) == (bottom, right):
            return F.conv2d(x, self.weight, self.bias, stride, (top, left), groups=self.groups)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight, self.bias, stride, groups=self.groups)


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
        return F.relu6(self.conv(x))


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
        self.stride = stride
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.residual else y


class CropNetwork(nn.Module):
    """Stem, inverted residual blocks to stride 32, and a wide convolution.

    EfficientNet-Lite0 has 3.4 M parameters, -Lite2 4.8 M.

    Args:
        name: of the plan.

    Attributes:
        level_channels: channels of each of `levels`.
    """

    def __init__(self, name: CropNetworkName) -> None:
        super().__init__()
        self.stem = ConvReLU6(3, STEM_CHANNELS, 3, stride=2)
        c_in, blocks = STEM_CHANNELS, []
        self.level_channels: list[int] = []
        for stage in PLANS[name]:
            if stage.stride > 1:
                self.level_channels.append(c_in)
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
        # The last block with a stride leads from stride 16 to stride 32.
        self._first_coarse = max(i for i, block in enumerate(blocks) if block.stride > 1)
        self.level_channels.append(c_in)
        self.head = ConvReLU6(c_in, CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images or crops.

        Args:
            images: (N, 3, H, W), RGB in 0-255.

        Returns:
            (N, 1280, H/32, W/32), sides rounded up; the mean over cells is the usual vector.
        """
        y: Tensor = self.head(self.levels(images)[-1])
        return y

    def coarse_parts(self) -> tuple[nn.Module, ...]:
        """Return the modules that compute features at stride 32; the others end at stride 16."""
        return (*self.blocks[self._first_coarse :].children(), self.head)

    def levels(self, images: Tensor) -> list[Tensor]:
        """Return the features at strides 2, 4, 8, 16 and 32: of the last block of each stride.

        Args:
            images: (N, 3, H, W), RGB in 0-255.
        """
        x = self.stem((images - PIXEL_CENTER) / PIXEL_SCALE)
        levels: list[Tensor] = []
        for block in self.blocks:
            assert isinstance(block, InvertedResidual)
            if block.stride > 1:
                levels.append(x)
            x = block(x)
        return [*levels, x]

"""PicoDet-S, the one-stage detector that proposes instances.

Batch norm is folded into the convolutions. Submodules are declared in the order in which they run,
since the weight loader matches them to the published weights by that order.

Source: PP-PicoDet (Yu et al. 2021, arXiv 2111.00902): the backbone ESNet (section 3.1), the neck
CSP-PAN with a fourth level (3.2), and a head that predicts each side of a box as a distribution
(3.3).
"""

# Shapes: B images, S side of the square input, A anchors (one per cell of the four maps),
#         C channels of the head (96), K classes

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.proposals import DetectorOutput

STRIDES = (8, 16, 32, 64)
NUM_CLASSES = 80
NECK_CHANNELS = 96
HEAD_CHANNELS = 96
DISTANCE_BINS = 8
# Mean and standard deviation of ImageNet's colors, for values from 0 to 255.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
SQUEEZE = 4


class ConvHardswish(nn.Module):
    """A convolution that keeps the map size, or divides it by the stride, then hard swish."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H/stride, W/stride), sides rounded up."""
        return F.hardswish(self.conv(x))


def depthwise(channels: int, *, stride: int = 1) -> nn.Conv2d:
    """Return a depthwise 3x3 convolution without activation."""
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)


def separable(channels: int, *, stride: int = 1) -> nn.Sequential:
    """Return a depthwise 5x5 and a pointwise convolution, each with hard swish."""
    return nn.Sequential(
        ConvHardswish(channels, channels, 5, stride=stride, groups=channels),
        ConvHardswish(channels, channels),
    )


class SqueezeExcite(nn.Module):
    """Scales each channel by a factor that is computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // SQUEEZE, 1)
        self.excite = nn.Conv2d(channels // SQUEEZE, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        means = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(means))))


class ShuffleBlock(nn.Module):
    """ESNet's block: half of the channels are transformed, then all are shuffled.

    Args:
        channels: of input and output.
        inner: channels of the depthwise convolution.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        half = channels // 2
        self.expand = ConvHardswish(half, inner)
        self.mix = depthwise(inner)
        self.attend = SqueezeExcite(2 * inner)
        self.project = ConvHardswish(2 * inner, half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        kept, changed = x.chunk(2, dim=1)
        y = self.expand(changed)
        y = self.project(self.attend(torch.cat((y, self.mix(y)), dim=1)))
        # The halves are interleaved, so that the next block transforms channels of both.
        return torch.stack((kept, y), dim=2).flatten(1, 2)


class DownsampleBlock(nn.Module):
    """ESNet's block of stride 2: two branches, concatenated and mixed."""

    def __init__(self, c_in: int, c_out: int, inner: int) -> None:
        super().__init__()
        half = c_out // 2
        self.shortcut = nn.Sequential(depthwise(c_in, stride=2), ConvHardswish(c_in, half))
        self.main = nn.Sequential(
            ConvHardswish(c_in, inner),
            depthwise(inner, stride=2),
            SqueezeExcite(inner),
            ConvHardswish(inner, half),
        )
        self.mix = nn.Sequential(
            ConvHardswish(c_out, c_out, 3, groups=c_out), ConvHardswish(c_out, c_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H/2, W/2)."""
        y: Tensor = self.mix(torch.cat((self.shortcut(x), self.main(x)), dim=1))
        return y


def stage(c_in: int, c_out: int, first: int, inner: Sequence[int]) -> nn.Sequential:
    """Return a stage of ESNet; `first` and `inner` are the inner channels of its blocks."""
    return nn.Sequential(
        DownsampleBlock(c_in, c_out, first), *(ShuffleBlock(c_out, each) for each in inner)
    )


class Backbone(nn.Module):
    """ESNet at .75 of its width, with the inner channels that an architecture search found."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvHardswish(3, 24, 3, stride=2)
        self.stage2 = stage(24, 96, 44, (24, 24))
        self.stage3 = stage(96, 192, 48, (60, 48, 60, 48, 48, 48))
        self.stage4 = stage(192, 384, 96, (96, 96))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) -> maps of stride 8, 16 and 32 with 96, 192 and 384 channels."""
        c3 = self.stage2(F.max_pool2d(self.stem(images), 3, stride=2, padding=1))
        c4 = self.stage3(c3)
        return c3, c4, self.stage4(c4)


class CspLayer(nn.Module):
    """Cross-stage partial layer: half of the channels pass a bottleneck, then all are fused."""

    def __init__(self) -> None:
        super().__init__()
        half = NECK_CHANNELS // 2
        self.shortcut = ConvHardswish(2 * NECK_CHANNELS, half)
        self.main = ConvHardswish(2 * NECK_CHANNELS, half)
        self.bottleneck = nn.Sequential(ConvHardswish(half, half), separable(half))
        self.fuse = ConvHardswish(NECK_CHANNELS, NECK_CHANNELS)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Two (B, 96, H, W) -> (B, 96, H, W)."""
        x = torch.cat((one, other), dim=1)
        short = self.shortcut(x)
        y: Tensor = self.fuse(torch.cat((self.bottleneck(self.main(x)), short), dim=1))
        return y


class Neck(nn.Module):
    """CSP-PAN: information flows from coarse to fine maps, then back, and to a coarser one."""

    def __init__(self) -> None:
        super().__init__()
        c = NECK_CHANNELS
        self.laterals = nn.ModuleList(ConvHardswish(c_in, c) for c_in in (96, 192, 384))
        self.topdown4, self.topdown3 = CspLayer(), CspLayer()
        self.down3, self.bottomup4 = separable(c, stride=2), CspLayer()
        self.down4, self.bottomup5 = separable(c, stride=2), CspLayer()
        self.lateral6, self.down5 = separable(c, stride=2), separable(c, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps of stride 8, 16 and 32 -> four maps of 96 channels, to stride 64."""
        c3, c4, c5 = (lateral(x) for lateral, x in zip(self.laterals, maps, strict=True))
        inner4 = self.topdown4(upsample(c5), c4)
        p3 = self.topdown3(upsample(inner4), c3)
        p4 = self.bottomup4(self.down3(p3), inner4)
        p5 = self.bottomup5(self.down4(p4), c5)
        return p3, p4, p5, self.lateral6(c5) + self.down5(p5)


def upsample(x: Tensor) -> Tensor:
    """(B, channels, H, W) -> (B, channels, 2H, 2W), each cell repeated."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class LevelHead(nn.Module):
    """Head for one map: class scores and boxes from the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(separable(HEAD_CHANNELS), separable(HEAD_CHANNELS))
        self.predict = nn.Conv2d(HEAD_CHANNELS, NUM_CLASSES + 4 * DISTANCE_BINS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits (K), logits of the distances (4 x 8) and features (C) of the cells.

        They are ordered by row, and logits are float32 whatever the precision of the convolutions.
        """
        features = self.features(x)
        # bfloat16 has 8 significant bits: a coordinate of 400 pixels would be rounded to 2 pixels.
        found = flatten_cells(self.predict(features)).float()
        return found[..., :NUM_CLASSES], found[..., NUM_CLASSES:], flatten_cells(features)


def flatten_cells(x: Tensor) -> Tensor:
    """(B, channels, H, W) -> (B, H * W, channels)."""
    return x.flatten(2).transpose(1, 2)


def decode_boxes(logits: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Convert the distributions of the heads to boxes.

    Args:
        logits: (B, A, 32) of the distances from the center of the cell to the left, upper, right
            and lower side; 8 for each, for distances of 0 to 7 cells.
        sides: (height, width) in cells of each map, in the order of `STRIDES`.

    Returns:
        (B, A, 4) xyxy in network pixels.
    """
    centers, strides = [], []
    for (height, width), stride in zip(sides, STRIDES, strict=True):
        y = torch.arange(height, device=logits.device, dtype=logits.dtype)
        x = torch.arange(width, device=logits.device, dtype=logits.dtype)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
        centers.append((grid + 0.5) * stride)
        strides.append(grid.new_full((height * width, 1), stride))
    bins = torch.arange(DISTANCE_BINS, device=logits.device, dtype=logits.dtype)
    shares = logits.reshape(*logits.shape[:-1], 4, DISTANCE_BINS).softmax(-1)
    # Summed instead of multiplied as matrices, which OpenVINO would round to bfloat16.
    cells = (shares * bins).sum(-1)  # (B, A, 4)
    distances, center = cells * torch.cat(strides), torch.cat(centers)
    return torch.cat((center - distances[..., :2], center + distances[..., 2:]), dim=-1)


class PicoDet(nn.Module):
    """The detector, with 1.2 M parameters and the 80 classes of COCO."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.heads = nn.ModuleList(LevelHead() for _ in STRIDES)

    def forward(self, images: Tensor) -> DetectorOutput:
        """Detect instances of a batch.

        Args:
            images: (B, 3, S, S), RGB in 0-255, stretched to a square; S a multiple of 32.

        Returns:
            Box, class scores and features of every anchor.

        Raises:
            ValueError: the shape is not (B, 3, H, W) with sides that are multiples of 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(s % 32 for s in images.shape[2:]):
            raise ValueError(
                f"images must have shape (B, 3, S, S) with S a multiple of 32, "
                f"got {tuple(images.shape)}"
            )
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        maps = self.neck(self.backbone((images - mean) / std))
        levels = [head(x) for head, x in zip(self.heads, maps, strict=True)]
        logits, distances, features = (
            torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)
        )
        sides = [(x.shape[2], x.shape[3]) for x in maps]
        return DetectorOutput(
            boxes=decode_boxes(distances, sides) / images.shape[-1],
            class_scores=logits.sigmoid(),
            features=features,
        )

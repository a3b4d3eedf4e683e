"""YOLOv3 with spatial pyramid pooling: the frozen anchor source of RefCLIP and CMA.

An anchor is a cell of the coarsest map. It has a feature vector and R boxes:

* The published weights have a guided head (`GuidedHead`, R = 4): three boxes start from fixed
  sizes and one from no size, and a deformable convolution reads the map at their predicted sizes.
* Weights in the format of darknet have the standard head (`StandardHead`, R = 3). They were trained
  on colors in [0, 1], so such a model undoes the normalization of its input.

The released code puts the model in eval mode once, but each epoch's `train()` switches its batch
norm back to the statistics of the batch, and its running statistics drift. Here the model stays in
eval mode, unless `paper_parity` is set.

Sources: Redmon and Farhadi 2018, "YOLOv3", with the pooling of darknet's yolov3-spp.cfg; Wang et
al. 2019, "Region Proposal by Guided Anchoring", in the form of Liu et al. 2019, "Learning Spatial
Fusion for Single-Shot Object Detection" (guided head); Jin et al. 2023, "RefCLIP" (as an anchor
source).
"""

# Shapes: B photos, S side of the square input, H x W cells of a map, A cells of the coarsest map
#         (169 at 416 pixels), R boxes of a cell, K classes, w width

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.resizing import resize
from reir.models.weak_rec.deformable_convolution import TAPS, DeformableConvolution
from reir.records import RgbImage

SIDE_PX = 416
STRIDE = 32
"""Of the coarsest map, in pixels."""
BORDER_GRAY = 127
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
WIDTH = 32
"""Channels of the first convolution."""
STAGE_BLOCKS = (1, 2, 8, 8, 4)
"""Residual blocks of the five stages of DarkNet-53."""
POOLING_SIDES = (5, 9, 13)
NUM_CLASSES = 80
BOX_NUMBERS = 5
"""What a head predicts of a box besides its classes: center, size and objectness."""
GUIDED_SIZES_PX = ((116, 90), (156, 198), (121, 240), (4 * STRIDE, 4 * STRIDE))
"""Sizes from which the boxes of the guided head start; the last one is the box without anchor."""
STANDARD_SIZES_PX = ((116, 90), (156, 198), (373, 326))


class YoloOutput(NamedTuple):
    """What YOLOv3 finds in B photos.

    Attributes:
        maps: features of stride 32, 16 and 8 (coarse, middle, fine): (B, 32w, 13, 13),
            (B, 16w, 26, 26) and (B, 8w, 52, 52) at 416 pixels; 1024, 512 and 256 channels.
        boxes: (B, A, R, 4) xyxy in [0, 1] of the square, clipped to it. Cells are ordered by row.
        confidence: (B, A, R) objectness of the boxes, in [0, 1].
    """

    maps: tuple[Tensor, Tensor, Tensor]
    boxes: Tensor
    confidence: Tensor


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm and leaky ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        return F.leaky_relu(self.norm(self.conv(x)), 0.1)


class ResidualBlock(nn.Module):
    """DarkNet's block: a 1x1 convolution to half of the channels, a 3x3 one back, and the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = ConvBlock(channels, channels // 2, 1)
        self.expand = ConvBlock(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        changed: Tensor = self.expand(self.squeeze(x))
        return x + changed


def stage(channels: int, num_blocks: int) -> nn.Sequential:
    """Return a stage of DarkNet: it halves the map, and doubles the channels to `channels`."""
    return nn.Sequential(
        ConvBlock(channels // 2, channels, 3, stride=2),
        *(ResidualBlock(channels) for _ in range(num_blocks)),
    )


class SpatialPyramidPooling(nn.Module):
    """Concatenates a map with its maxima over neighborhoods of three sizes, in RefCLIP's order."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4C, H, W)."""
        pooled = [F.max_pool2d(x, side, stride=1, padding=side // 2) for side in POOLING_SIDES]
        return torch.cat([x, *pooled], dim=1)


class UpBranch(nn.Module):
    """The branch of a finer map, which gets the next coarser branch and a map of DarkNet.

    Args:
        channels: of its hidden state; the branch below and DarkNet's map have twice as many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.lateral = ConvBlock(2 * c, c, 1)
        self.fuse = nn.Sequential(
            ConvBlock(3 * c, c, 1),
            ConvBlock(c, 2 * c, 3),
            ConvBlock(2 * c, c, 1),
            ConvBlock(c, 2 * c, 3),
            ConvBlock(2 * c, c, 1),
        )
        self.expand = ConvBlock(c, 2 * c, 3)

    def forward(self, coarser: Tensor, backbone_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden state (B, c, 2H, 2W) and the map (B, 2c, 2H, 2W).

        Args:
            coarser: (B, 2c, H, W) hidden state of the coarser branch.
            backbone_map: (B, 2c, 2H, 2W).
        """
        larger = F.interpolate(self.lateral(coarser), scale_factor=2.0, mode="nearest")
        hidden = self.fuse(torch.cat([larger, backbone_map], dim=1))
        return hidden, self.expand(hidden)


class StandardHead(nn.Module):
    """YOLOv3's head: boxes start from sizes that were found by clustering."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        num_boxes = len(STANDARD_SIZES_PX)
        self.predict = nn.Conv2d(channels, num_boxes * (BOX_NUMBERS + num_classes), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions of a map, see `decode`, and the sizes from which boxes start."""
        sizes = x.new_tensor(STANDARD_SIZES_PX)[:, :, None, None]
        return self.predict(x).unflatten(1, (len(STANDARD_SIZES_PX), -1)), sizes


class GuidedHead(nn.Module):
    """The head of the published weights: it first predicts the size from which each box starts.

    The logarithms of these sizes, relative to the fixed ones, also move the taps of a deformable
    convolution, so that the features of a cell cover its boxes.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        num_boxes = len(GUIDED_SIZES_PX)
        self.guide = nn.Conv2d(channels, 2 * num_boxes, 1)
        # One group for each box: its predicted size moves the taps of a quarter of the channels.
        self.offsets = nn.Conv2d(2 * num_boxes, 2 * TAPS * num_boxes, 1, groups=num_boxes)
        self.adapt = DeformableConvolution(channels, groups=num_boxes)
        self.predict = nn.Conv2d(channels, num_boxes * (BOX_NUMBERS + num_classes), 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions of a map, see `decode`, and the sizes from which boxes start."""
        guide = self.guide(x)
        adapted = self.adapt(x, self.offsets(guide))
        num_boxes = len(GUIDED_SIZES_PX)
        fixed = x.new_tensor(GUIDED_SIZES_PX)[:, :, None, None]
        sizes = guide.unflatten(1, (num_boxes, 2)).exp() * fixed
        return self.predict(adapted).unflatten(1, (num_boxes, -1)), sizes


def decode(predicted: Tensor, sizes_px: Tensor) -> tuple[Tensor, Tensor]:
    """Convert what a head predicts to boxes and their objectness.

    Args:
        predicted: (B, R, 5 + K, H, W): logits of the center within the cell, logarithms of the
            size relative to `sizes_px`, logit of the objectness, logits of the classes.
        sizes_px: (B or none, R, 2, H or 1, W or 1) width and height from which boxes start.

    Returns:
        (B, A, R, 4) xyxy in [0, 1] of the square, clipped to it, and (B, A, R) in [0, 1].
    """
    height, width = predicted.shape[-2:]
    y = torch.arange(height, device=predicted.device, dtype=predicted.dtype)
    x = torch.arange(width, device=predicted.device, dtype=predicted.dtype)
    cells = torch.stack(torch.meshgrid(x, y, indexing="xy"))
    center = (predicted[:, :, :2].sigmoid() + cells) * STRIDE
    half = predicted[:, :, 2:4].exp() * sizes_px / 2
    whole = predicted.new_tensor((width, height, width, height))[:, None, None] * STRIDE
    boxes = torch.cat([center - half, center + half], dim=2) / whole
    objectness = predicted[:, :, 4].sigmoid()
    # (B, R, 4, H, W) -> (B, A, R, 4)
    return boxes.clamp(0, 1).flatten(3).permute(0, 3, 1, 2), objectness.flatten(2).transpose(1, 2)


class YoloV3(nn.Module):
    """DarkNet-53 with spatial pyramid pooling, three branches and the coarsest head; frozen.

    Args:
        num_classes: K.
        guided: whether it has the head of the published weights, or the standard one.
        width: w; other widths than 32 are for tests.
        paper_parity: follow `train()`, as the released code does, instead of staying in eval mode.
    """

    def __init__(
        self,
        *,
        num_classes: int = NUM_CLASSES,
        guided: bool = True,
        width: int = WIDTH,
        paper_parity: bool = False,
    ) -> None:
        super().__init__()
        self.paper_parity = paper_parity
        self.shape = {"num_classes": num_classes, "guided": guided, "width": width}
        """The arguments with which a model of the same shape is built."""
        # In the order of the convolutions in weights files, which `yolov3_weights` relies on.
        self.stem = ConvBlock(3, width, 3)
        self.stages = nn.ModuleList(
            stage(width * 2 ** (i + 1), num_blocks) for i, num_blocks in enumerate(STAGE_BLOCKS)
        )
        c = 16 * width
        self.coarse = nn.Sequential(
            ConvBlock(2 * c, c, 1),
            ConvBlock(c, 2 * c, 3),
            ConvBlock(2 * c, c, 1),
            SpatialPyramidPooling(),
            ConvBlock(4 * c, c, 1),
            ConvBlock(c, 2 * c, 3),
            ConvBlock(2 * c, c, 1),
        )
        self.expand = ConvBlock(c, 2 * c, 3)
        head = GuidedHead if guided else StandardHead
        self.head: GuidedHead | StandardHead = head(2 * c, num_classes)
        self.middle = UpBranch(c // 2)
        self.fine = UpBranch(c // 4)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> YoloV3:
        """Stay in eval mode, unless `paper_parity` is set."""
        return super().train(mode and self.paper_parity)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> YoloOutput:
        """Detect instances of a batch, without gradients.

        Args:
            pixels: (B, 3, S, S) RGB, normalized by `PIXEL_MEAN` and `PIXEL_STD`, of letter-boxed
                photos; S a multiple of 32.

        Raises:
            ValueError: the shape is another one.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(s % STRIDE for s in pixels.shape[2:]):
            raise ValueError(
                f"pixels must have shape (B, 3, S, S) with S a multiple of {STRIDE}, "
                f"got {tuple(pixels.shape)}"
            )
        if isinstance(self.head, StandardHead):
            mean, std = (pixels.new_tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
            pixels = pixels * std + mean
        x, found = self.stem(pixels), []
        for each in self.stages:
            x = each(x)
            found.append(x)
        hidden = self.coarse(x)
        coarse_map = self.expand(hidden)
        # The last but one stage has stride 16, the one before it stride 8.
        hidden, middle_map = self.middle(hidden, found[-2])
        _, fine_map = self.fine(hidden, found[-3])
        boxes, confidence = decode(*self.head(coarse_map))
        return YoloOutput((coarse_map, middle_map, fine_map), boxes, confidence)


@dataclass(frozen=True)
class Placement:
    """Where a letter-boxed photo lies in its square, in pixels."""

    side_px: int
    left_px: int
    top_px: int
    width_px: int
    height_px: int

    def undo(self, boxes: Tensor) -> Tensor:
        """(..., 4) xyxy in [0, 1] of the square -> the same in [0, 1] of the photo, clipped to it.

        The released evaluation does not clip. Clipping never lowers the IoU with a box that lies
        within the photo.
        """
        start = boxes.new_tensor((self.left_px, self.top_px, self.left_px, self.top_px))
        size = boxes.new_tensor((self.width_px, self.height_px, self.width_px, self.height_px))
        return ((boxes * self.side_px - start) / size).clamp(0, 1)


def letter_box(photo: RgbImage, side_px: int = SIDE_PX) -> tuple[RgbImage, Placement]:
    """Fit a photo into the center of a gray square, keeping its aspect ratio, as published.

    It is resized without antialiasing, as the photos were on which the published weights were
    trained.

    Args:
        photo: (H, W, 3) upright.
        side_px: S.

    Returns:
        (S, S, 3) and where the photo lies in it.
    """
    height, width = photo.shape[:2]
    longest = max(height, width)
    # A very long photo keeps one row or column.
    new_height = max(1, side_px * height // longest)
    new_width = max(1, side_px * width // longest)
    left, top = (side_px - new_width) // 2, (side_px - new_height) // 2
    square = np.full((side_px, side_px, 3), BORDER_GRAY, np.uint8)
    resized = resize(photo, new_height, new_width, antialias=False).numpy()
    square[top : top + new_height, left : left + new_width] = resized
    return square, Placement(side_px, left, top, new_width, new_height)


def normalize_pixels(squares: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, the input of `YoloV3`."""
    pixels = squares.permute(0, 3, 1, 2).float() / 255
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std

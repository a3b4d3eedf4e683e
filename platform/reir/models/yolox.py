"""YOLOX-Nano, the one-stage detector that proposes instances, and the selection of candidates.

Batch norm is folded into the convolutions, so every block is a `Conv2d` with bias, then SiLU, and
training starts from folded weights. Submodules are declared in the order in which they run, since
the weight loader matches them to the published weights by that order.
"""

# Shapes: B images, S side of the square input, A anchors (one per cell of the three maps),
#         C channels of the class branch (64), K classes, N candidates of one image

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.fused_convolution import Convolution
from reir.models.resizing import resize

STRIDES = (8, 16, 32)
INPUT_SIDE_PX = 416
NUM_CLASSES = 80
HEAD_CHANNELS = 64
PADDING_VALUE = 114  # the gray that the published weights were trained with
# Number of boxes that enter NMS. Boxes of lower rank would not be among the first few hundred
# after it.
NMS_POOL = 1000
MIN_SIDE_PX = 1.0  # of the network input; thinner boxes are remains of clipping


class YoloxOutput(NamedTuple):
    """The output of the detector for a batch, before any selection.

    Attributes:
        boxes_xyxy_px: (B, A, 4) float32, in pixels of the square network input, unclipped.
        objectness: (B, A) float32 in [0, 1].
        class_scores: (B, A, K) float32 in [0, 1], not multiplied by objectness.
        class_features: (B, A, C) features from which the class scores are computed.
    """

    boxes_xyxy_px: Tensor
    objectness: Tensor
    class_scores: Tensor
    class_features: Tensor

    @property
    def scores(self) -> Tensor:
        """(B, A) objectness times the best class score: the query-free ranking."""
        return self.objectness * self.class_scores.amax(dim=2)


@dataclass(frozen=True)
class Candidates:
    """The instances proposed for one image, best first; N may be 0.

    Attributes:
        boxes: (N, 4) float32, xyxy in [0, 1] of the upright image.
        scores: (N,) float32, objectness times the best class score.
        class_scores: (N, K) float32.
        class_features: (N, C).
        anchors: (N,) int64, index of each on the A axis.
    """

    boxes: Tensor
    scores: Tensor
    class_scores: Tensor
    class_features: Tensor
    anchors: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.boxes)


# ---------------------------------------------------------------------------------------- blocks


class ConvSiLU(nn.Module):
    """A convolution that keeps the map size, or divides it by the stride, then SiLU."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""
        conv, side = self.conv, self.conv.kernel_size[0] // 2
        convolution = Convolution(conv.weight, conv.bias, conv.stride[0], (side, side), conv.groups)
        return convolution.with_activation(x, "silu")


def depthwise(c_in: int, c_out: int, *, stride: int = 1) -> nn.Sequential:
    """Return a depthwise 3x3 and a pointwise convolution, each with SiLU."""
    return nn.Sequential(ConvSiLU(c_in, c_in, 3, stride=stride, groups=c_in), ConvSiLU(c_in, c_out))


class Bottleneck(nn.Module):
    """Pointwise, then depthwise separable convolution, optionally with a residual connection."""

    def __init__(self, channels: int, *, residual: bool) -> None:
        super().__init__()
        self.reduce = ConvSiLU(channels, channels)
        self.mix = depthwise(channels, channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        y: Tensor = self.mix(self.reduce(x))
        return y + x if self.residual else y


class CspStage(nn.Module):
    """Cross-stage partial block: half of the channels pass bottlenecks, then all are fused."""

    def __init__(self, c_in: int, c_out: int, *, depth: int, residual: bool) -> None:
        super().__init__()
        hidden = c_out // 2
        self.main = ConvSiLU(c_in, hidden)
        self.shortcut = ConvSiLU(c_in, hidden)
        self.bottlenecks = nn.Sequential(
            *(Bottleneck(hidden, residual=residual) for _ in range(depth))
        )
        self.fuse = ConvSiLU(2 * hidden, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        main = self.bottlenecks(self.main(x))
        y: Tensor = self.fuse(torch.cat((main, self.shortcut(x)), dim=1))
        return y


class Focus(nn.Module):
    """Stem: each 2x2 patch becomes four groups of channels, then follows a 3x3 convolution.

    It is computed as the equivalent 6x6 convolution of stride 2, which does not have to copy the
    image into groups of channels first.
    """

    def __init__(self, c_out: int) -> None:
        super().__init__()
        self.conv = ConvSiLU(12, c_out, 3)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, c_out, S/2, S/2)."""
        # Input channels are ordered by group, then color; a group is a place in the patch, column
        # by column. Interleaving groups and kernel cells gives the 6x6 kernel.
        inner = self.conv.conv
        parts = inner.weight.reshape(-1, 2, 2, 3, 3, 3).permute(0, 3, 4, 2, 5, 1)
        kernel = Convolution(parts.reshape(-1, 3, 6, 6), inner.bias, 2, (2, 2))
        return kernel.with_activation(images, "silu")


class SpatialPyramidPool(nn.Module):
    """Concatenates max pools over 5, 9 and 13 cells; larger ones pool the smaller ones again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = ConvSiLU(channels, channels // 2)
        self.fuse = ConvSiLU(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        levels = [self.reduce(x)]
        for _ in range(3):
            levels.append(F.max_pool2d(levels[-1], kernel_size=5, stride=1, padding=2))
        y: Tensor = self.fuse(torch.cat(levels, dim=1))
        return y


# ------------------------------------------------------------------------- backbone, neck, head


class Backbone(nn.Module):
    """CSPDarknet with a quarter of its width and a third of its depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Focus(16)
        self.stage2 = nn.Sequential(
            depthwise(16, 32, stride=2), CspStage(32, 32, depth=1, residual=True)
        )
        self.stage3 = nn.Sequential(
            depthwise(32, 64, stride=2), CspStage(64, 64, depth=3, residual=True)
        )
        self.stage4 = nn.Sequential(
            depthwise(64, 128, stride=2), CspStage(128, 128, depth=3, residual=True)
        )
        self.stage5 = nn.Sequential(
            depthwise(128, 256, stride=2),
            SpatialPyramidPool(256),
            CspStage(256, 256, depth=1, residual=False),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) -> maps of stride 8, 16 and 32 with 64, 128 and 256 channels."""
        c3 = self.stage3(self.stage2(self.stem(images)))
        c4 = self.stage4(c3)
        return c3, c4, self.stage5(c4)


class Neck(nn.Module):
    """Path aggregation network: information flows from coarse to fine maps, then back."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral5 = ConvSiLU(256, 128)
        self.topdown4 = CspStage(256, 128, depth=1, residual=False)
        self.lateral4 = ConvSiLU(128, 64)
        self.topdown3 = CspStage(128, 64, depth=1, residual=False)
        self.down3 = depthwise(64, 64, stride=2)
        self.bottomup4 = CspStage(128, 128, depth=1, residual=False)
        self.down4 = depthwise(128, 128, stride=2)
        self.bottomup5 = CspStage(256, 256, depth=1, residual=False)

    def forward(self, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return maps of the same shapes."""
        inner5 = self.lateral5(c5)
        inner4 = self.lateral4(self.topdown4(torch.cat((upsample(inner5), c4), dim=1)))
        p3 = self.topdown3(torch.cat((upsample(inner4), c3), dim=1))
        p4 = self.bottomup4(torch.cat((self.down3(p3), inner4), dim=1))
        p5 = self.bottomup5(torch.cat((self.down4(p4), inner5), dim=1))
        return p3, p4, p5


def upsample(x: Tensor) -> Tensor:
    """(B, channels, H, W) -> (B, channels, 2H, 2W), each cell repeated."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class LevelHead(nn.Module):
    """Decoupled head for one map: a class branch, and a branch for box and objectness."""

    def __init__(self, c_in: int) -> None:
        super().__init__()
        c = HEAD_CHANNELS
        self.stem = ConvSiLU(c_in, c)
        self.class_branch = nn.Sequential(depthwise(c, c), depthwise(c, c))
        self.class_logits = nn.Conv2d(c, NUM_CLASSES, 1)
        self.box_branch = nn.Sequential(depthwise(c, c), depthwise(c, c))
        self.box_deltas = nn.Conv2d(c, 4, 1)
        self.objectness_logit = nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return box deltas (4), objectness (1), classes (K) and features (C) of the cells, by row.

        Deltas and logits are float32, whatever the precision of the convolutions.
        """
        x = self.stem(x)
        class_map, box_map = self.class_branch(x), self.box_branch(x)
        # bfloat16 has 8 significant bits: a coordinate of 400 pixels would be rounded to 2 pixels.
        deltas = flatten_cells(self.box_deltas(box_map)).float()
        objectness = flatten_cells(self.objectness_logit(box_map)).float()
        logits = flatten_cells(self.class_logits(class_map)).float()
        return deltas, objectness, logits, flatten_cells(class_map)


def flatten_cells(x: Tensor) -> Tensor:
    """(B, channels, H, W) -> (B, H * W, channels)."""
    return x.flatten(2).transpose(1, 2)


def decode_boxes(deltas: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Convert the box deltas of the heads to boxes.

    Args:
        deltas: (B, A, 4) center offset in cells and log size in cells.
        sides: (height, width) in cells of each map, in the order of `STRIDES`.

    Returns:
        (B, A, 4) xyxy in network pixels.
    """
    grids, strides = [], []
    for (height, width), stride in zip(sides, STRIDES, strict=True):
        y = torch.arange(height, device=deltas.device, dtype=deltas.dtype)
        x = torch.arange(width, device=deltas.device, dtype=deltas.dtype)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
        grids.append(grid)
        strides.append(grid.new_full((height * width, 1), stride))
    stride_A1 = torch.cat(strides)
    center = (deltas[..., :2] + torch.cat(grids)) * stride_A1
    half = deltas[..., 2:].exp() * stride_A1 / 2
    return torch.cat((center - half, center + half), dim=-1)


class YoloxNano(nn.Module):
    """The detector, with 0.9 M parameters and the 80 classes of COCO."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.heads = nn.ModuleList(LevelHead(channels) for channels in (64, 128, 256))

    def forward(self, images: Tensor) -> YoloxOutput:
        """Detect instances of a batch.

        Args:
            images: (B, 3, S, S), BGR in 0-255, letter-boxed; S a multiple of 32.

        Returns:
            Box, scores and class features of every anchor.

        Raises:
            ValueError: the shape is not (B, 3, H, W) with sides that are multiples of 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(s % 32 for s in images.shape[2:]):
            raise ValueError(
                f"images must have shape (B, 3, S, S) with S a multiple of 32, "
                f"got {tuple(images.shape)}; use letterbox()"
            )
        features = self.neck(*self.backbone(images))
        levels = [head(x) for head, x in zip(self.heads, features, strict=True)]
        deltas, objectness, logits, class_features = (
            torch.cat(parts, dim=1) for parts in zip(*levels, strict=True)
        )
        sides = [(x.shape[2], x.shape[3]) for x in features]
        return YoloxOutput(
            boxes_xyxy_px=decode_boxes(deltas, sides),
            objectness=objectness[..., 0].sigmoid(),
            class_scores=logits.sigmoid(),
            class_features=class_features,
        )


# ------------------------------------------------------------------------- before and after


def letterbox(image: npt.NDArray[np.uint8], size: int = INPUT_SIDE_PX) -> tuple[Tensor, float]:
    """Resize an image to fit the top left of a square, and pad the rest with gray.

    Args:
        image: (H, W, 3) uint8, RGB, upright.
        size: side of the square in pixels.

    Returns:
        (3, size, size) float32, BGR in 0-255, and the scale from image to network pixels.

    Raises:
        ValueError: the image is empty or not (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
        raise ValueError(
            f"image must have shape (H, W, 3) uint8, not empty, got {image.shape} {image.dtype}"
        )
    height, width = image.shape[:2]
    scale = min(size / width, size / height)
    width_px, height_px = max(int(width * scale), 1), max(int(height * scale), 1)
    square = torch.full((3, size, size), PADDING_VALUE, dtype=torch.float32)
    resized = resize(image, height_px, width_px)
    # RGB to BGR, in which the published weights were trained.
    square[:, :height_px, :width_px] = resized.flip(2).permute(2, 0, 1)
    return square, scale


def select_candidates(
    output: YoloxOutput,
    scales: Sequence[float],
    sizes_px: Sequence[tuple[int, int]],
    num_candidates: int,
    *,
    nms_iou: float = 0.7,
) -> list[Candidates]:
    """Choose the best instances of each image, without any query.

    Boxes are clipped to the image, and very thin boxes and boxes with score 0 are dropped. Then
    class-agnostic NMS keeps the best of boxes that overlap by more than `nms_iou`. Equal scores
    keep the order of the anchors.

    Args:
        output: of `YoloxNano`, B images.
        scales: B factors as `letterbox` returned them.
        sizes_px: B pairs (height, width) of the upright images.
        num_candidates: maximum number per image; an image may have fewer, or none.
        nms_iou: IoU above which the box with the lower score is dropped.

    Returns:
        The candidates of the B images.

    Raises:
        ValueError: lengths differ from B or num_candidates is below 1.
    """
    num_images = len(output.boxes_xyxy_px)
    if not len(scales) == len(sizes_px) == num_images:
        raise ValueError(
            f"{num_images} images need as many scales and sizes, "
            f"got {len(scales)} and {len(sizes_px)}"
        )
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    limits = output.boxes_xyxy_px.new_tensor(
        [(w * s, h * s) * 2 for (h, w), s in zip(sizes_px, scales, strict=True)]
    ).reshape(-1, 1, 4)
    boxes_px = output.boxes_xyxy_px.clamp(min=0).minimum(limits)
    # NaN is not larger than anything, so a box with NaN is dropped, too.
    usable = ((boxes_px[..., 2:] - boxes_px[..., :2]) >= MIN_SIDE_PX).all(dim=2)
    scores = torch.where(usable, output.scores, 0.0)
    # Stable, so that anchors with equal scores are chosen in the same order on every machine.
    pool_scores, pool = scores.sort(dim=1, descending=True, stable=True)
    pool_scores, pool = pool_scores[:, :NMS_POOL], pool[:, :NMS_POOL]
    pool_boxes_px = boxes_px.gather(1, pool[..., None].expand(-1, -1, 4))
    picks, counts = greedy_nms(pool_boxes_px, pool_scores, num_candidates, nms_iou)
    found = []
    for i, count in enumerate(counts.tolist()):
        anchors = pool[i, picks[i, :count]]
        found.append(
            Candidates(
                boxes=boxes_px[i, anchors] / limits[i],
                scores=scores[i, anchors],
                class_scores=output.class_scores[i, anchors],
                class_features=output.class_features[i, anchors],
                anchors=anchors,
            )
        )
    return found


def greedy_nms(
    boxes: Tensor, scores: Tensor, num_keep: int, max_iou: float
) -> tuple[Tensor, Tensor]:
    """Class-agnostic greedy non-maximum suppression of a whole batch at once.

    Each round keeps one box of every image, so the cost grows with the number of boxes kept and not
    with the square of the number of boxes. There is no data-dependent control flow, so a GPU never
    waits for the CPU.

    Args:
        boxes: (B, M, 4) xyxy, best first.
        scores: (B, M), descending; rows with score 0 are never kept.
        num_keep: number of rounds.
        max_iou: a box is dropped if its IoU with a kept box is larger than this.

    Returns:
        (B, num_keep) int64 rows to keep, in order, and (B,) how many of them are valid.
    """
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    alive = scores > 0
    picks, kept = [], []
    for _ in range(min(num_keep, scores.shape[1])):
        # Rows are sorted, so the first one that is left is the best; `argmax` takes no booleans.
        first = alive.byte().argmax(dim=1, keepdim=True)
        picks.append(first)
        kept.append(alive.gather(1, first))
        box = boxes.gather(1, first[..., None].expand(-1, -1, 4))
        sides = torch.minimum(boxes[..., 2:], box[..., 2:]) - torch.maximum(
            boxes[..., :2], box[..., :2]
        )
        overlap = sides.clamp_(min=0).prod(dim=2)
        union = area + area.gather(1, first) - overlap
        # Multiplied instead of divided, because two boxes without area have a union of 0.
        alive = (alive & (overlap <= max_iou * union)).scatter(1, first, False)
    return torch.cat(picks, dim=1), torch.cat(kept, dim=1).sum(dim=1)

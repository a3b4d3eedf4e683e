"""The frozen, query-free part of `clare-nano`: pixels -> `CandidateBatch`.

It runs the detector, and the crop network on the detected boxes. Training caches its output;
indexing continues with the trained part. The output for a photo does not depend on the other photos
of the batch, to the last bit.
"""

# Shapes: B photos, K candidates, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.nano.crop_network import CHANNELS
from reir.models.nano.model import COLOR_GRID, SCENE_GRID, CandidateBatch, ClareNano
from reir.models.resizing import resize
from reir.models.traced_module import TracedModule
from reir.models.yolox import Candidates, YoloxOutput, letterbox, select_candidates
from reir.records import RgbImage

Part = TypeVar("Part", bound=nn.Module)

FINE_PIXELS, COARSE_PIXELS = 8 * 96**2, 60 * 128**2
"""Batch sizes of the two parts of the crop network, in pixels. In the fine part, feature maps must
fit into the CPU's caches; in the coarse part, a large batch loads the large weights less often."""


def channels_last(part: Part) -> Part:
    """Store convolution weights in channels-last order, for which the CPU has faster kernels."""
    for parameter in part.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return part


class CandidateExtractor:
    """The frozen part of a `ClareNano`, prepared for inference; thread-safe.

    Args:
        model: its detector and crop network are converted in place, and cannot be trained after.
        dtype: of their computation.
    """

    def __init__(self, model: ClareNano, dtype: torch.dtype) -> None:
        self._config, self._dtype = model.config, dtype
        for part in model.frozen_parts():
            channels_last(part.to(dtype).eval().requires_grad_(False))
        self._detector, self._network = model.detector, model.crop_network
        self._parts_for_size = cache(self._traced_parts)

    def __call__(
        self, images: Sequence[RgbImage], num_candidates: int | None = None
    ) -> CandidateBatch:
        """Return the candidates of B photos of any sizes, without gradients.

        Args:
            images: upright RGB photos.
            num_candidates: K; None for the number of the model. Fewer candidates are padded.
        """
        num, config = num_candidates or self._config.num_candidates, self._config
        found = self.propose(images, num)
        with torch.inference_mode():
            # Crops of all photos go through the network together, and are divided again below.
            crops = [
                crop_boxes(image, c.boxes.numpy(), config.crop_px, config.crop_margin)
                for image, c in zip(images, found, strict=True)
            ]
            looks = self._maps(torch.cat(crops)).mean((2, 3)).float()
            return CandidateBatch(
                boxes=_pad_and_stack([c.boxes for c in found], num),
                objectness=_pad_and_stack([c.scores for c in found], num),
                class_scores=_pad_and_stack([c.class_scores * _objectness(c) for c in found], num),
                detector=_pad_and_stack([c.class_features.float() for c in found], num),
                colors=_pad_and_stack([_colors(each) for each in crops], num),
                crops=_pad_and_stack(torch.split(looks, [len(c) for c in found]), num),
                scene=self._scenes(images),
                aspect=torch.tensor([np.log(i.shape[1] / i.shape[0]) for i in images]).float(),
                valid=torch.arange(num)[None] < torch.tensor([len(c) for c in found])[:, None],
            )

    def propose(self, images: Sequence[RgbImage], num_candidates: int) -> list[Candidates]:
        """Return the best `num_candidates` instances of each photo by objectness after NMS."""
        side_px = self._config.detector_px
        squares, scales = zip(*(letterbox(image, side_px) for image in images), strict=True)
        sizes = [(i.shape[0], i.shape[1]) for i in images]
        with torch.inference_mode():
            batch = self._channels_last(torch.stack(squares))
            found = YoloxOutput(*self._detect(batch))
            return select_candidates(
                found, scales, sizes, num_candidates, nms_iou=self._config.nms_iou
            )

    @cached_property
    def _detect(self) -> TracedModule:
        # Any input of the right size will do: the control flow does not depend on the pixels.
        side_px = self._config.detector_px
        return TracedModule(
            self._detector, self._channels_last(torch.zeros(1, 3, side_px, side_px))
        )

    def _traced_parts(self, side_px: int) -> tuple[TracedModule, TracedModule]:
        """Trace both parts of the crop network for one input size, since padding depends on it."""
        fine, coarse = self._network.fine, self._network.coarse
        square = self._channels_last(torch.zeros(1, 3, side_px, side_px))
        with torch.inference_mode():
            maps = fine(square)
        return TracedModule(fine, square), TracedModule(coarse, maps)

    def _scenes(self, images: Sequence[RgbImage]) -> Tensor:
        """(B, S, 1280) features of each whole photo and of a grid over it."""
        side_px = self._config.scene_px
        squares = [resize(image, side_px, side_px) for image in images]
        maps = self._maps(torch.stack(squares)).float()
        grid = F.adaptive_avg_pool2d(maps, SCENE_GRID).flatten(2).transpose(1, 2)
        return torch.cat([maps.mean((2, 3))[:, None], grid], dim=1)

    def _maps(self, squares: Tensor) -> Tensor:
        """Feature maps of crops or photos: (N, s, s, 3) uint8 -> (N, 1280, s/32, s/32)."""
        side_px = squares.shape[1]
        if not len(squares):
            return torch.empty(0, CHANNELS, side_px // 32, side_px // 32)
        fine, coarse = self._parts_for_size(side_px)
        plan, parts = self._network.plan, []
        for some in torch.split(squares, max(1, FINE_PIXELS // side_px**2)):
            # Converted here, batch by batch, because floats take two or four times the memory.
            pixels = some.permute(0, 3, 1, 2).to(self._dtype)
            parts.append(fine(pixels.div_(plan.scale).sub_(plan.center / plan.scale)))
        some_maps = torch.split(torch.cat(parts), max(1, COARSE_PIXELS // side_px**2))
        return torch.cat([coarse(maps) for maps in some_maps])

    def _channels_last(self, images: Tensor) -> Tensor:
        return images.to(self._dtype).contiguous(memory_format=torch.channels_last)


def _objectness(found: Candidates) -> Tensor:
    """(N, 1) objectness, recovered from `scores`, which are objectness times best class score."""
    return (found.scores / found.class_scores.amax(-1).clamp(min=1e-9))[:, None]


def crop_boxes(photo: RgbImage, boxes: np.ndarray, side_px: int, margin: float) -> Tensor:
    """Return (N, side_px, side_px, 3) uint8 crops, stretched to a square.

    Args:
        photo: upright RGB.
        boxes: (N, 4) xyxy in [0, 1]; rounded to whole pixels.
        side_px: side of the crops.
        margin: fraction of the box side added on each side, as far as the photo goes.
    """
    height, width = photo.shape[:2]
    sizes_px = np.array([width, height] * 2)
    grow = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64) * margin
    edges = np.concatenate([boxes[:, :2] - grow, boxes[:, 2:] + grow], axis=1).clip(0, 1)
    # Whole pixels, so that a crop is a part of the array and not interpolated before it is resized.
    edges_px = np.rint(edges * sizes_px).astype(np.int64)
    first = edges_px[:, :2].clip(max=sizes_px[:2] - 1)
    last = np.maximum(edges_px[:, 2:], first + 1)
    crops = torch.empty(len(boxes), side_px, side_px, 3, dtype=torch.uint8)
    for crop, (x1, y1), (x2, y2) in zip(crops, first.tolist(), last.tolist(), strict=True):
        crop.copy_(resize(photo[y1:y2, x1:x2], side_px, side_px))
    return crops


def _colors(crops: Tensor) -> Tensor:
    """(N, 4, 4, 3) mean RGB in [0, 1] of a grid over each crop."""
    side = crops.shape[1] // COLOR_GRID
    # Sums of integers are exact, so colors do not depend on the order of summation.
    rows = crops.view(-1, COLOR_GRID, side, COLOR_GRID * side * 3).sum(2, dtype=torch.int32)
    cells = rows.view(-1, COLOR_GRID, COLOR_GRID, side, 3).sum(3)
    return cells.float() / (255 * side**2)


def _pad_and_stack(parts: Sequence[Tensor], num: int) -> Tensor:
    """Stack (n_i, ...) tensors to (B, num, ...), padded with zeros."""
    out = parts[0].new_zeros(len(parts), num, *parts[0].shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out

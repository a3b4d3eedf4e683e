"""`NanoSegmenter`: masks and tighter boxes for instances whose boxes are roughly known."""

# Shapes: N instances, s side of a crop in pixels, H x W pixels of the photo

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.images import rle
from reir.models.cpu_engine import CpuEngine
from reir.models.interfaces import Segment
from reir.models.nano.candidates import crop_boxes, crop_frames
from reir.models.nano.crop_network import CropNetwork
from reir.models.nano.mask_head import MaskHead
from reir.records import FloatArray, RgbImage

MIN_PROBABILITY = 0.4
"""A pixel belongs to the mask from here on; chosen on `val`. At .5, masks are smaller than the
annotated ones, and their mean IoU is lower by .007."""


class NanoSegmenter:
    """The crop network of a `ClareNano` and a mask head, prepared for the CPU; thread-safe.

    Args:
        network: that of the checkpoint for which the head was trained.
        head: trained head.
        dtype: of the computation.
    """

    def __init__(self, network: CropNetwork, head: MaskHead, dtype: torch.dtype) -> None:
        self._module, self._config, self._dtype = _Segmentation(network, head), head.config, dtype

    def segment(self, image: RgbImage, boxes: FloatArray) -> list[Segment]:
        """Return the segment of each box; see `Segmenter.segment`."""
        if not len(boxes):
            return []
        frames = crop_frames(image, boxes, self._config.margin)
        crops = crop_boxes(image, boxes, self._config.crop_px, self._config.margin)
        height, width = image.shape[:2]
        # Boxes relative to the crops, and back: `corner` and `size` are those of the crops.
        unit = frames / np.array([width, height] * 2)
        corner, size = np.tile(unit[:, :2], 2), np.tile(unit[:, 2:] - unit[:, :2], 2)
        prompts = torch.from_numpy(((boxes - corner) / size).astype(np.float32))
        logits, found = self._run(crops, prompts)
        tight = (found.numpy() * size + corner).clip(0, 1)
        # Nothing of the instance lies outside of both the prompt and the box that was found.
        low, high = np.minimum(tight, boxes)[:, :2], np.maximum(tight, boxes)[:, 2:]
        return [
            Segment(_ordered(box), rle.encode(_mask(each, frame, limits, (height, width))))
            for box, each, frame, limits in zip(
                tight.tolist(), logits, frames, np.concatenate([low, high], axis=1), strict=True
            )
        ]

    @cached_property
    def _run(self) -> CpuEngine:
        # Built at first use, because most servers are never asked for a mask.
        side_px = self._config.crop_px
        pixels = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8)
        return CpuEngine(self._module, pixels, torch.zeros(1, 4), dtype=self._dtype)


class _Segmentation(nn.Module):
    """(N, s, s, 3) uint8 crops and (N, 4) prompts -> (N, s/2, s/2) logits and (N, 4) boxes."""

    def __init__(self, network: CropNetwork, head: MaskHead) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, squares: Tensor, prompts_N4: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.network.levels(squares.permute(0, 3, 1, 2).float())
        output = self.head(levels, prompts_N4)
        return output.logits, output.boxes()


def _mask(
    logits: Tensor, frame_px: np.ndarray, limits: np.ndarray, photo_px: tuple[int, int]
) -> rle.BoolMask:
    """Return the (H, W) mask of a photo from the logits of a crop of it.

    Args:
        logits: (s/2, s/2).
        frame_px: (4,) xyxy of the crop.
        limits: (4,) xyxy in [0, 1] of the photo, outside of which the mask is empty.
        photo_px: height and width of the photo.
    """
    x1, y1, x2, y2 = frame_px.tolist()
    resized = F.interpolate(logits[None, None], (y2 - y1, x2 - x1), mode="bilinear")[0, 0]
    mask = np.zeros(photo_px, dtype=np.bool_)
    mask[y1:y2, x1:x2] = (resized.sigmoid() >= MIN_PROBABILITY).numpy()
    height, width = photo_px
    sizes_px = np.array([width, height])
    left, top = np.floor(limits[:2] * sizes_px).astype(int).tolist()
    right, bottom = np.ceil(limits[2:] * sizes_px).astype(int).tolist()
    inside = np.zeros_like(mask)
    inside[top:bottom, left:right] = True
    return np.asarray(mask & inside)


def _ordered(box: list[float]) -> tuple[float, float, float, float]:
    """Return a box whose edges are in order, although each edge was found by itself."""
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)

"""The frozen, query-free part of `clare-nano`: pixels -> `CandidateBatch`.

It runs the detector, and the crop network on the detected boxes. Training caches its output;
indexing continues with the trained part. The output for a photo does not depend on the other photos
of the batch, to the last bit.
"""

# Shapes: B photos, K candidates, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reir.models.cpu_engine import CpuEngine
from reir.models.nano.crop_network import CropNetwork
from reir.models.nano.model import COLOR_GRID, SCENE_GRID, CandidateBatch, ClareNanoConfig
from reir.models.picodet import PicoDet
from reir.models.proposals import Candidates, DetectorOutput, select_candidates
from reir.models.resizing import resize
from reir.records import RgbImage


class HasFrozenParts(Protocol):
    """A `ClareNano`, or another model with its detector and its crop network."""

    config: ClareNanoConfig
    detector: PicoDet
    crop_network: CropNetwork


class CandidateExtractor:
    """The frozen part of a `ClareNano`, prepared for inference on the CPU; thread-safe.

    Args:
        model: its detector and crop network are used as they are at the first photo.
        dtype: of their computation.
    """

    def __init__(self, model: HasFrozenParts, dtype: torch.dtype) -> None:
        self._config, self._dtype = model.config, dtype
        self._detector, self._network = model.detector, model.crop_network

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
        crops = [
            crop_boxes(image, c.boxes.numpy(), config.crop_px, config.crop_margin)
            for image, c in zip(images, found, strict=True)
        ]
        return CandidateBatch(
            boxes=pad_and_stack([c.boxes for c in found], num),
            objectness=pad_and_stack([c.scores for c in found], num),
            class_scores=pad_and_stack([c.class_scores for c in found], num),
            detector=pad_and_stack([c.features for c in found], num),
            colors=pad_and_stack([_colors(each) for each in crops], num),
            crops=pad_and_stack([self._encode_crops(each) for each in crops], num),
            scene=torch.cat([self._encode_scene(image) for image in images]),
            aspect=torch.tensor([np.log(i.shape[1] / i.shape[0]) for i in images]).float(),
            valid=torch.arange(num)[None] < torch.tensor([len(c) for c in found])[:, None],
        )

    def propose(self, images: Sequence[RgbImage], num_candidates: int) -> list[Candidates]:
        """Return the best `num_candidates` instances of each photo by class score after NMS."""
        side_px = self._config.detector_px
        # One photo at a time: the output of a larger batch could differ in the last bits.
        found = [self._detect(resize(image, side_px, side_px)[None]) for image in images]
        output = DetectorOutput(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        return select_candidates(output, num_candidates, nms_iou=self._config.nms_iou)

    def _encode_crops(self, crops: Tensor) -> Tensor:
        """(N, s, s, 3) uint8 -> (N, 1280)."""
        return self._crop_features(crops)[0]

    def _encode_scene(self, image: RgbImage) -> Tensor:
        """(1, S, 1280) features of the whole photo and of a grid over it."""
        side_px = self._config.scene_px
        return self._scene_features(resize(image, side_px, side_px)[None])[0]

    # Engines are built at first use, because building takes longer than loading a checkpoint, and a
    # server that only answers queries needs none.

    @cached_property
    def _detect(self) -> CpuEngine:
        return self._engine(_Detections(self._detector), self._config.detector_px, batch=1)

    @cached_property
    def _crop_features(self) -> CpuEngine:
        return self._engine(CropFeatures(self._network), self._config.crop_px)

    @cached_property
    def _scene_features(self) -> CpuEngine:
        return self._engine(SceneFeatures(self._network), self._config.scene_px, batch=1)

    def _engine(self, module: nn.Module, side_px: int, batch: int | None = None) -> CpuEngine:
        pixels = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8)
        return CpuEngine(module, pixels, dtype=self._dtype, batch=batch)


def _channels_first(squares: Tensor) -> Tensor:
    """(N, s, s, 3) uint8 -> (N, 3, s, s) float32 in 0-255."""
    return squares.permute(0, 3, 1, 2).float()


class _Detections(nn.Module):
    """The detector: (N, s, s, 3) uint8 photos -> the fields of `DetectorOutput`."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, squares: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.detector(_channels_first(squares)))


class CropFeatures(nn.Module):
    """The crop network: (N, s, s, 3) uint8 crops -> (N, 1280) features."""

    def __init__(self, network: CropNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, squares: Tensor) -> Tensor:
        """Return the mean over the cells of each crop."""
        maps: Tensor = self.network(_channels_first(squares))
        return maps.mean((2, 3))


class SceneFeatures(nn.Module):
    """The crop network: (N, s, s, 3) uint8 photos -> (N, S, 1280), the whole, then a grid."""

    def __init__(self, network: CropNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, squares: Tensor) -> Tensor:
        """Return the mean features of the whole photo, then of each cell of a grid over it."""
        maps = self.network(_channels_first(squares))
        grid = F.adaptive_avg_pool2d(maps, SCENE_GRID).flatten(2).transpose(1, 2)
        return torch.cat([maps.mean((2, 3))[:, None], grid], dim=1)


def crop_boxes(photo: RgbImage, boxes: np.ndarray, side_px: int, margin: float) -> Tensor:
    """Return (N, side_px, side_px, 3) uint8 crops, stretched to a square; see `crop_frames`."""
    frames = crop_frames(photo, boxes, margin)
    crops = torch.empty(len(boxes), side_px, side_px, 3, dtype=torch.uint8)
    for crop, (x1, y1, x2, y2) in zip(crops, frames.tolist(), strict=True):
        crop.copy_(resize(photo[y1:y2, x1:x2], side_px, side_px))
    return crops


def crop_frames(photo: RgbImage, boxes: np.ndarray, margin: float) -> npt.NDArray[np.int64]:
    """Return (N, 4) xyxy in pixels of the parts of a photo that crops show, at least one pixel.

    Args:
        photo: upright RGB.
        boxes: (N, 4) xyxy in [0, 1].
        margin: fraction of the box side added on each side, as far as the photo goes.
    """
    height, width = photo.shape[:2]
    sizes_px = np.array([width, height] * 2)
    grow = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64) * margin
    edges = np.concatenate([boxes[:, :2] - grow, boxes[:, 2:] + grow], axis=1).clip(0, 1)
    # Whole pixels, so that a crop is a part of the array and not interpolated before it is resized.
    edges_px = np.rint(edges * sizes_px).astype(np.int64)
    first = edges_px[:, :2].clip(max=sizes_px[:2] - 1)
    return np.concatenate([first, np.maximum(edges_px[:, 2:], first + 1)], axis=1)


def _colors(crops: Tensor) -> Tensor:
    """(N, 4, 4, 3) mean RGB in [0, 1] of a grid over each crop."""
    side = crops.shape[1] // COLOR_GRID
    # Sums of integers are exact, so colors do not depend on the order of summation.
    rows = crops.view(-1, COLOR_GRID, side, COLOR_GRID * side * 3).sum(2, dtype=torch.int32)
    cells = rows.view(-1, COLOR_GRID, COLOR_GRID, side, 3).sum(3)
    return cells.float() / (255 * side**2)


def pad_and_stack(parts: Sequence[Tensor], num: int) -> Tensor:
    """Stack (n_i, ...) tensors to (B, num, ...), padded with zeros."""
    out = parts[0].new_zeros(len(parts), num, *parts[0].shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out

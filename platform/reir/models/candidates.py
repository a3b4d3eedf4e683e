"""Pixels -> `CandidateBatch`: the frozen, query-free part of `clare-nano`.

Detector, crops and what the crop network sees in them. Training caches exactly this; indexing runs
it and goes on with the trained part. What is stored of a photo does not depend on its neighbours in
a batch: the same photo alone gives the same bits.
"""

# Shapes: B photos, K candidates, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from reir.models.clare_nano import COLOUR_GRID, SCENE_GRID, CandidateBatch, ClareNano
from reir.models.seams import RgbImage
from reir.models.yolox import Candidates, letterbox, select_candidates

Part = TypeVar("Part", bound=nn.Module)

FINE_PIXELS, COARSE_PIXELS = 8 * 128**2, 60 * 128**2
"""What goes at once through the fine part of the crop network, whose maps must fit into the caches,
and through its coarse part, where many crops share the reading of large weights."""


def channels_last(part: Part) -> Part:
    """Lay out the convolutions of a module for the CPU's faster kernels; changes no value."""
    for parameter in part.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return part


def prepare_frozen(model: ClareNano, dtype: torch.dtype) -> None:
    """Bring detector and crop network into the form in which they run."""
    model.eval()
    channels_last(model.detector.to(dtype))
    channels_last(model.crop_network.to(dtype))


def extract_candidates(
    model: ClareNano, images: Sequence[RgbImage], num_candidates: int | None = None
) -> CandidateBatch:
    """Run the frozen part on B photos of any sizes.

    Args:
        model: in eval mode; its crop network may be in bf16.
        images: upright RGB photos.
        num_candidates: K; None takes the model's own. Fewer found are padded with `valid` False.

    Returns:
        The batch, without gradients.
    """
    num = num_candidates or model.config.num_candidates
    with torch.inference_mode():
        found = propose(model, images, num)
        photos = [Image.fromarray(image) for image in images]
        crops = [
            cut(photo, c.boxes.numpy(), model.config.crop_px, model.config.crop_margin)
            for photo, c in zip(photos, found, strict=True)
        ]
        looks = _maps(model, torch.cat(crops)).mean((2, 3)).float()
        scene = _scenes(model, photos)
    return CandidateBatch(
        boxes=_padded([c.boxes for c in found], num),
        objectness=_padded([c.scores for c in found], num),
        class_scores=_padded([c.class_scores * _objectness(c) for c in found], num),
        detector=_padded([c.class_features.float() for c in found], num),
        colours=_padded([_colours(each) for each in crops], num),
        crops=_padded(torch.split(looks, [len(c) for c in found]), num),
        scene=scene,
        aspect=torch.tensor([np.log(i.shape[1] / i.shape[0]) for i in images]).float(),
        valid=torch.arange(num)[None] < torch.tensor([len(c) for c in found])[:, None],
    )


def propose(model: ClareNano, images: Sequence[RgbImage], num_candidates: int) -> list[Candidates]:
    """Best `num_candidates` instances of each photo by objectness after NMS."""
    config = model.config
    squares, scales = zip(*(letterbox(i, config.detector_px) for i in images), strict=True)
    batch = torch.stack(squares).to(_dtype(model)).contiguous(memory_format=torch.channels_last)
    sizes = [(i.shape[0], i.shape[1]) for i in images]
    return select_candidates(
        model.detector(batch), scales, sizes, num_candidates, nms_iou=config.nms_iou
    )


def _objectness(found: Candidates) -> Tensor:
    """(N, 1) objectness alone; `scores` is objectness times the best class score."""
    return (found.scores / found.class_scores.amax(-1).clamp(min=1e-9))[:, None]


def _scenes(model: ClareNano, photos: Sequence[Image.Image]) -> Tensor:
    """(B, S, 1280) features of each whole photo and of a grid over it."""
    everything = np.array([[0, 0, 1, 1]], dtype=np.float32)
    squares = torch.cat([cut(photo, everything, model.config.scene_px, 0.0) for photo in photos])
    maps = _maps(model, squares).float()
    grid = F.adaptive_avg_pool2d(maps, SCENE_GRID).flatten(2).transpose(1, 2)
    return torch.cat([maps.mean((2, 3))[:, None], grid], dim=1)


def cut(photo: Image.Image, boxes: np.ndarray, side_px: int, margin: float) -> torch.Tensor:
    """(N, side_px, side_px, 3) uint8 crops, stretched to a square.

    Args:
        photo: upright RGB.
        boxes: (N, 4) xyxy in [0, 1].
        side_px: of the crops.
        margin: share of the box side added on each side, within the photo.
    """
    width, height = photo.size
    out = np.zeros((len(boxes), side_px, side_px, 3), dtype=np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(np.float64)):
        dx, dy = (x2 - x1) * margin, (y2 - y1) * margin
        left, top = max(x1 - dx, 0) * width, max(y1 - dy, 0) * height
        right, bottom = min(x2 + dx, 1) * width, min(y2 + dy, 1) * height
        area = (left, top, max(right, left + 1e-3), max(bottom, top + 1e-3))
        area = (*area[:2], min(area[2], width), min(area[3], height))
        out[i] = np.asarray(photo.resize((side_px, side_px), Image.Resampling.BILINEAR, box=area))
    return torch.from_numpy(out)


def _maps(model: ClareNano, squares: Tensor) -> Tensor:
    """(N, 1280, s/32, s/32) of (N, s, s, 3) uint8 crops or photos."""
    network, area = model.crop_network, squares.shape[1] ** 2
    fine = []
    for some in torch.split(squares, max(1, FINE_PIXELS // area)):
        pixels = some.permute(0, 3, 1, 2).to(_dtype(model)).div(127.5).sub(1)
        fine.append(network.fine(pixels))
    some_maps = torch.split(torch.cat(fine), max(1, COARSE_PIXELS // area))
    return torch.cat([network.coarse(maps) for maps in some_maps])


def _dtype(model: ClareNano) -> torch.dtype:
    return next(model.crop_network.parameters()).dtype


def _colours(crops: Tensor) -> Tensor:
    """(N, 4, 4, 3) mean RGB in [0, 1] of a grid over each crop."""
    side = crops.shape[1] // COLOUR_GRID
    cells = crops.float().view(-1, COLOUR_GRID, side, COLOUR_GRID, side, 3)
    return cells.mean(dim=(2, 4)) / 255


def _padded(parts: Sequence[Tensor], num: int) -> Tensor:
    """Stack (n_i, ...) tensors to (B, num, ...), zeros behind."""
    out = parts[0].new_zeros(len(parts), num, *parts[0].shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out

"""Pixels -> `CandidateBatch`: the frozen, query-free part of `clare-nano`.

Detector, crops and the trunk's maps of the crops. Training caches exactly this; indexing runs it
and goes on with the trained part. Every photo goes through by itself after the detector, so that
what is stored of a photo does not depend on its neighbours in a batch.
"""

# Shapes: B photos, K candidates, H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reir.models.clare_nano import COLOUR_GRID, TRUNK_CHANNELS, CandidateBatch, ClareNano
from reir.models.seams import RgbImage
from reir.models.yolox import Candidates, letterbox, select_candidates

Part = TypeVar("Part", bound=nn.Module)


def channels_last(part: Part) -> Part:
    """Lay out the convolutions of a module for the CPU's faster kernels; changes no value."""
    for parameter in part.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return part


def prepare_frozen(model: ClareNano, dtype: torch.dtype) -> None:
    """Bring detector (float32) and trunk (`dtype`) into the form that `extract_candidates` runs."""
    model.eval()
    channels_last(model.detector)
    channels_last(model.trunk.to(dtype))


def extract_candidates(
    model: ClareNano, images: Sequence[RgbImage], num_candidates: int | None = None
) -> CandidateBatch:
    """Run the frozen part on B photos of any sizes.

    Args:
        model: in eval mode; its trunk may be in bf16.
        images: upright RGB photos.
        num_candidates: K; None takes the model's own. Fewer found are padded with `valid` False.

    Returns:
        The batch, without gradients; `crops` and `scene` in the dtype of the trunk.
    """
    num = num_candidates or model.config.num_candidates
    with torch.inference_mode():
        found = propose(model, images, num)
        maps = [_look(model, image, c) for image, c in zip(images, found, strict=True)]
    return CandidateBatch(
        boxes=_padded([c.boxes for c in found], num),
        objectness=_padded([c.scores for c in found], num),
        class_scores=_padded([c.class_scores * _objectness(c) for c in found], num),
        detector=_padded([c.class_features.float() for c in found], num),
        colours=_padded([m[1] for m in maps], num),
        crops=_padded([m[0] for m in maps], num),
        scene=torch.stack([m[2] for m in maps]),
        aspect=torch.tensor([np.log(i.shape[1] / i.shape[0]) for i in images]).float(),
        valid=torch.arange(num)[None] < torch.tensor([len(c) for c in found])[:, None],
    )


def propose(model: ClareNano, images: Sequence[RgbImage], num_candidates: int) -> list[Candidates]:
    """Best `num_candidates` instances of each photo by objectness after NMS."""
    config = model.config
    squares, scales = zip(*(letterbox(i, config.detector_px) for i in images), strict=True)
    batch = torch.stack(squares).contiguous(memory_format=torch.channels_last)
    sizes = [(i.shape[0], i.shape[1]) for i in images]
    return select_candidates(
        model.detector(batch), scales, sizes, num_candidates, nms_iou=config.nms_iou
    )


def _objectness(found: Candidates) -> Tensor:
    """(N, 1) objectness alone; `scores` is objectness times the best class score."""
    return (found.scores / found.class_scores.amax(-1).clamp(min=1e-9))[:, None]


def _look(model: ClareNano, image: RgbImage, found: Candidates) -> tuple[Tensor, Tensor, Tensor]:
    """Trunk maps of the crops, colour grids of the crops, trunk map of the whole photo."""
    config, photo = model.config, Image.fromarray(image)
    crops = cut(photo, found.boxes.numpy(), config.crop_px, config.crop_margin)
    scene = cut(photo, np.array([[0, 0, 1, 1]], dtype=np.float32), config.scene_px, 0.0)
    side = config.crop_px // 16
    maps = torch.zeros(0, side, side, TRUNK_CHANNELS, dtype=_trunk_dtype(model))
    if len(crops):
        maps = _maps(model, crops)
    return maps, _colours(crops), _maps(model, scene)[0]


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


def _trunk_dtype(model: ClareNano) -> torch.dtype:
    return next(model.trunk.parameters()).dtype


def _maps(model: ClareNano, crops: Tensor) -> Tensor:
    """(N, h, w, 96) trunk maps of (N, s, s, 3) uint8 crops."""
    x = crops.permute(0, 3, 1, 2).to(_trunk_dtype(model)).div(127.5).sub(1)
    return torch.as_tensor(model.trunk(x).permute(0, 2, 3, 1).contiguous())


def _colours(crops: Tensor) -> Tensor:
    """(N, 4, 4, 3) mean RGB in [0, 1] of a grid over each crop."""
    side = crops.shape[1] // COLOUR_GRID
    cells = crops.float().view(-1, COLOUR_GRID, side, COLOUR_GRID, side, 3)
    return cells.mean(dim=(2, 4)) / 255


def _padded(parts: list[Tensor], num: int) -> Tensor:
    """Stack (n_i, ...) tensors to (B, num, ...), zeros behind."""
    out = parts[0].new_zeros(len(parts), num, *parts[0].shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out

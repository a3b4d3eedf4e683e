"""The examples that a mask head is trained on: crops of photos around boxes that are not exact."""

# Shapes: N crops of a step, s side of a crop in pixels, C candidates of an instance

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reir.images import rle
from reir.images.boxes import pairwise_iou
from reir.images.decode import read_image
from reir.models.nano.candidates import crop_boxes, crop_frames
from reir.models.nano.mask_head import MaskHeadConfig
from reir.records import FloatArray, MaskRle, RgbImage
from reir_training.config import MaskSettings
from reir_training.data.examples import TrainPhoto

FOUND_IOU = 0.4
"""A box of the detector is a prompt for the instance that it overlaps most, from this IoU on."""

JITTER = 0.06
"""Standard deviation of the random shift of each edge of a prompt, as a share of the box's side."""

CONTRAST, BRIGHTNESS = 0.2, 15.0
"""Standard deviations of random changes of the pixels."""


@dataclass(frozen=True)
class MaskExample:
    """An instance that the mask head learns to segment.

    Attributes:
        box: (4,) xyxy in [0, 1].
        mask: None if only the box is annotated.
        candidates: (C, 4) boxes of the detector for this instance.
    """

    box: FloatArray
    mask: MaskRle | None
    candidates: FloatArray


@dataclass
class MaskBatch:
    """The input of one step.

    Attributes:
        crops: (N, s, s, 3) uint8.
        prompts: (N, 4) xyxy in [0, 1] of the crop.
        boxes: (N, 4) boxes of the instances in the crop.
        found: (N,) bool, whether the prompt is a box of the detector; only these train the edges,
            since the errors of other prompts are not those of a search.
        masks: (N, s/2, s/2) share of each cell that belongs to the instance.
        masked: (N,) bool, whether the mask is annotated.
    """

    crops: Tensor
    prompts: Tensor
    boxes: Tensor
    found: Tensor
    masks: Tensor
    masked: Tensor

    def to(self, device: torch.device | str) -> MaskBatch:
        """Return the batch on a device."""
        return MaskBatch(**{name: value.to(device) for name, value in vars(self).items()})


def mask_examples(photo: TrainPhoto, candidates: FloatArray) -> list[MaskExample]:
    """Return the instances of a photo that have a mask or a candidate.

    Args:
        photo: annotated photo.
        candidates: (C, 4) xyxy in [0, 1], all boxes that the detector found in it.
    """
    masks = photo.masks or (None,) * len(photo.boxes)
    iou = pairwise_iou(photo.boxes, candidates).reshape(len(photo.boxes), len(candidates))
    nearest = iou.argmax(axis=0) if iou.size else np.zeros(len(candidates), dtype=np.int64)
    examples = [
        MaskExample(box, mask, candidates[(nearest == i) & (iou[i] >= FOUND_IOU)])
        for i, (box, mask) in enumerate(zip(photo.boxes, masks, strict=True))
    ]
    return [each for each in examples if each.mask is not None or len(each.candidates)]


class MaskBatchMaker:
    """Builds batches from photos.

    Args:
        photos: annotated photos.
        examples: the instances of each photo.
        shape: of the head.
        settings: how examples are drawn.
    """

    def __init__(
        self,
        photos: Sequence[TrainPhoto],
        examples: Sequence[Sequence[MaskExample]],
        shape: MaskHeadConfig,
        settings: MaskSettings,
    ) -> None:
        self._photos, self._examples = photos, examples
        self._shape, self._settings = shape, settings

    def batch(self, rows: Sequence[int], rng: np.random.Generator) -> MaskBatch:
        """Build a batch of examples of some photos, some of them mirrored."""
        parts = [part for row in rows for part in self._of_photo(row, rng)]
        batch = MaskBatch(*(torch.stack(values) for values in zip(*parts, strict=True)))
        return _mirrored(_recolored(batch, rng), torch.from_numpy(rng.random(len(parts)) < 0.5))

    def _of_photo(self, row: int, rng: np.random.Generator) -> list[tuple[Tensor, ...]]:
        """Return the fields of `MaskBatch` for some examples of a photo."""
        drawn = self._drawn(self._examples[row], rng)
        pixels = read_image(self._photos[row].path)
        found = [_prompt(each, self._settings.found_share, rng) for each in drawn]
        prompts = np.array([prompt for prompt, _ in found], dtype=np.float32)
        frames = crop_frames(pixels, prompts, self._shape.margin)
        crops = crop_boxes(pixels, prompts, self._shape.crop_px, self._shape.margin)
        return [
            (
                crop,
                torch.from_numpy(_in_crop(prompt, frame, pixels)),
                # A prompt is not exact, so the instance may reach out of the crop around it, but
                # the head can only place edges inside.
                torch.from_numpy(_in_crop(each.box, frame, pixels).clip(0, 1)),
                torch.tensor(is_found),
                _mask_in_crop(each.mask, frame, pixels, self._shape.crop_px // 2),
                torch.tensor(each.mask is not None),
            )
            for each, (prompt, is_found), frame, crop in zip(
                drawn, found, frames, crops, strict=True
            )
        ]

    def _drawn(
        self, examples: Sequence[MaskExample], rng: np.random.Generator
    ) -> list[MaskExample]:
        """Draw examples of a photo; those with a mask come first, since they are fewer."""
        order = [examples[i] for i in rng.permutation(len(examples))]
        return sorted(order, key=lambda each: each.mask is None)[: self._settings.per_photo]


def _prompt(
    example: MaskExample, found_share: float, rng: np.random.Generator
) -> tuple[FloatArray, bool]:
    """Return a prompt for an instance, and whether the detector found it."""
    # Without a mask, only the edges are learned, and only from prompts of the detector;
    # `mask_examples` keeps no instance that has neither.
    if len(example.candidates) and (example.mask is None or rng.random() < found_share):
        return example.candidates[rng.integers(len(example.candidates))], True
    if rng.random() < 0.5:
        return example.box, False
    side = np.tile(example.box[2:] - example.box[:2], 2)
    moved = (example.box + rng.normal(0, JITTER, 4) * side).clip(0, 1).astype(np.float32)
    # A thin box could be turned inside out.
    return (moved if (moved[2:] > moved[:2]).all() else example.box), False


def _in_crop(box: FloatArray, frame_px: np.ndarray, pixels: RgbImage) -> FloatArray:
    """Return a box of the photo relative to a crop of it."""
    frame = frame_px / np.array([pixels.shape[1], pixels.shape[0]] * 2)
    size = np.tile(frame[2:] - frame[:2], 2)
    return np.asarray((box - np.tile(frame[:2], 2)) / size, dtype=np.float32)


def _mask_in_crop(
    mask: MaskRle | None, frame_px: np.ndarray, pixels: RgbImage, side: int
) -> Tensor:
    """(side, side) share of each cell of a crop that belongs to the mask; zeros without a mask."""
    if mask is None:
        return torch.zeros(side, side)
    x1, y1, x2, y2 = frame_px.tolist()
    whole = rle.decode(mask)
    # The mask has the annotated size, of which the file may be a smaller copy.
    if whole.shape != pixels.shape[:2]:
        whole = rle.resize_mask(whole, pixels.shape[:2])
    part = torch.from_numpy(whole[y1:y2, x1:x2]).float()[None, None]
    # With antialiasing, all pixels of a mask that is shrunk count, and not a sample of them.
    return F.interpolate(part, (side, side), mode="bilinear", antialias=True)[0, 0]


def _recolored(batch: MaskBatch, rng: np.random.Generator) -> MaskBatch:
    """Change contrast and brightness of each crop at random."""
    contrast, brightness = torch.from_numpy(rng.normal(size=(2, len(batch.crops), 1, 1, 1))).float()
    middle = 127.0
    pixels = (batch.crops.float() - middle) * (1 + CONTRAST * contrast) + middle
    batch.crops = (pixels + BRIGHTNESS * brightness).clamp(0, 255).byte()
    return batch


def _mirrored(batch: MaskBatch, chosen: Tensor) -> MaskBatch:
    """Flip some crops left to right, with everything that belongs to them."""
    batch.crops = torch.where(chosen[:, None, None, None], batch.crops.flip(2), batch.crops)
    batch.masks = torch.where(chosen[:, None, None], batch.masks.flip(2), batch.masks)
    batch.prompts = torch.where(chosen[:, None], _flipped(batch.prompts), batch.prompts)
    batch.boxes = torch.where(chosen[:, None], _flipped(batch.boxes), batch.boxes)
    return batch


def _flipped(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([1 - x2, y1, 1 - x1, y2], dim=1)

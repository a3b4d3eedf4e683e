"""Annotated photos -> the arrays of one CLARE step (clare.md section 5).

Loading a step is a pure function of the step, so it can run in any process, in any order, and again
after a failure. Two tasks: detection (every annotated box, asked for by class name) and grounding
(some referred instances of a photo, each asked for by one of its expressions).
"""

# Shapes: B photos of one worker, H x W pixels after padding, T target boxes, M texts, L tokens,
#         h x w cells of a mask after padding

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reir.datasets.coco_classes import COCO_CLASSES
from reir.images import read_image, stack_padded
from reir.models.seams import RgbImage
from reir.rle import BoolMask, decode
from reir_training.augment import (
    Augmentation,
    View,
    boxes_in,
    boxes_of_masks,
    draw_view,
    mask_in,
    see,
    text_in,
)
from reir_training.examples import TrainPhoto
from reir_training.look_alikes import LookAlikes
from reir_training.sampling import Sampler, Step, TaskStream

DETECTION, GROUNDING = "detection", "grounding"
NO_TARGET = -1
MAX_DRAWS = 10
MAX_BOXES_A_PHOTO = 1 << 16
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Samples:
    """The samples of one task, in arrays because there are hundreds of thousands of them.

    A sample is a photo with those of its boxes that one place of a batch asks for.

    Attributes:
        photo: (S,) row of the photo.
        chunk: (S,) which chunk of the photo's boxes the sample asks for, counted from 0.
        count: (S,) number of boxes in that chunk.
        wide: (S,) bool, whether the photo is wider than it is high.
    """

    photo: npt.NDArray[np.int32]
    chunk: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    wide: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, bool]]) -> Samples:
        """Build from one (photo, chunk, count, wide) per sample."""
        table = np.array(rows, dtype=np.int32).reshape(-1, 4)
        photo, chunk, count, wide = (column.copy() for column in table.T)
        return cls(photo, chunk, count, wide.astype(np.bool_))

    def __len__(self) -> int:
        """Return the number of samples, S."""
        return len(self.photo)


@dataclass
class ClareBatch:
    """One worker's part of a step.

    Attributes:
        pixels: (B, 3, H, W) uint8 RGB, zero to the right and below of each photo.
        size_px: (B, 2) height and width of each photo within.
        boxes: (T, 4) targets, xyxy in [0, 1] of their photo as seen.
        box_photo: (T,) photo of each target.
        box_text: (T,) text that asks for it.
        texts: M texts: the class names in detection; else one a target in the same order, and
            then further expressions of the targets.
        text_target: (M,) the target that a text was written for, -1 for class names.
        photo_key: (B,) names the photo over the whole data set.
        instance_key: (M,) names the described instance over the whole data set, -1 for classes.
        by_class: detection; else each target has a text of its own.
        most_targets: of one photo, over all workers at most; so many places each photo gets.
        noise_seeds: B, of what is drawn for each photo while it is trained on.
        masks: (T, h, w) bool, False where a target has none; None without a mask branch.
        has_mask: (T,) bool, likewise.
    """

    pixels: Tensor
    size_px: Tensor
    boxes: Tensor
    box_photo: Tensor
    box_text: Tensor
    texts: list[str]
    text_target: Tensor
    photo_key: Tensor
    instance_key: Tensor
    by_class: bool
    most_targets: int
    noise_seeds: list[int]
    masks: Tensor | None = None
    has_mask: Tensor | None = None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> ClareBatch:
        """Build from what `ClareData.load` returned, in pinned memory if there is a GPU."""
        host = {"texts", "most_targets", "noise_seeds"}
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items() if k not in host}
        if torch.cuda.is_available():  # lets `to` copy while the previous step is still running
            tensors = {k: tensor.pin_memory() for k, tensor in tensors.items()}
        return cls(
            **tensors,
            texts=[str(text) for text in arrays["texts"]],
            by_class=bool((arrays["text_target"] == NO_TARGET).any()),
            most_targets=int(arrays["most_targets"]),
            noise_seeds=[int(seed) for seed in arrays["noise_seeds"]],
        )

    def to(self, device: torch.device | str) -> ClareBatch:
        """Return the batch on a device."""
        tensors: dict[str, Any] = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **tensors)


class ClareData:
    """The samples of a set of photos, and how a step of them is loaded.

    Args:
        photos: those of the training split.
        augmentation: how views are drawn.
        batch_size: photos a step, over all workers.
        texts_per_photo: expressions asked of a photo in one step; the published recipe asks one.
        seed: of every draw.
        mask_stride_px: side of a cell of the masks; None for a model without the mask branch.

    Raises:
        ConfigError: a task that is asked for has no samples (by `sampler`).
    """

    def __init__(  # noqa: PLR0913 - all but the two parts are by name
        self,
        photos: Sequence[TrainPhoto],
        augmentation: Augmentation,
        *,
        batch_size: int,
        texts_per_photo: int = 1,
        seed: int = 0,
        mask_stride_px: int | None = None,
    ) -> None:
        self._photos, self._augmentation = photos, augmentation
        self._batch_size, self._seed = batch_size, seed
        self._mask_stride_px = mask_stride_px
        self._texts_per_photo = texts_per_photo
        self._samples = self._all_samples()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that there are samples of."""
        return tuple(name for name, samples in self._samples.items() if samples)

    def sampler(self, tasks: Sequence[str], alike_from: int | None = None) -> Sampler:
        """Steps of these tasks in turn.

        Args:
            tasks: names.
            alike_from: batch of a task from which on photos in a batch are look-alikes; None
                leaves all batches to chance.
        """
        streams = []
        for name in tasks:
            wide = self._samples[name].wide
            stream = partial(TaskStream, name, wide, self._batch_size, self._seed)
            if alike_from is not None:
                look_alikes = self._look_alikes(name)
                stream = partial(stream, look_alikes=look_alikes, alike_from=alike_from)
            streams.append(stream())
        return Sampler(streams)

    def _all_samples(self) -> dict[str, Samples]:
        """Return the samples of each task, in one pass over the photos."""
        detect: list[tuple[int, int, int, bool]] = []
        ground: list[tuple[int, int, int, bool]] = []
        for row, photo in enumerate(self._photos):
            if count := int((photo.categories >= 0).sum()):
                detect.append((row, 0, count, photo.is_wide))
            referred = len({expression.box for expression in photo.expressions})
            for chunk, first in enumerate(range(0, referred, self._texts_per_photo)):
                count = min(self._texts_per_photo, referred - first)
                ground.append((row, chunk, count, photo.is_wide))
        return {DETECTION: Samples.of(detect), GROUNDING: Samples.of(ground)}

    def _boxes(self, task: str, photo: TrainPhoto, chunk: int) -> list[int]:
        """Return the rows of the boxes that a sample of a photo asks for."""
        if task == DETECTION:
            return [int(row) for row in np.flatnonzero(photo.categories >= 0)]
        referred = sorted({expression.box for expression in photo.expressions})
        first = chunk * self._texts_per_photo
        return referred[first : first + self._texts_per_photo]

    def _look_alikes(self, task: str) -> LookAlikes:
        texts, galleries, samples = [], [], self._samples[task]
        for row, chunk in zip(samples.photo.tolist(), samples.chunk.tolist(), strict=True):
            photo = self._photos[row]
            boxes = self._boxes(task, photo, chunk)
            texts.append([e.text for e in photo.expressions if e.box in boxes])
            galleries.append(photo.gallery)
        return LookAlikes(texts, galleries)

    def load(self, step: Step, rank: int = 0, *, per_instance: int = 1) -> Arrays:
        """Decode, draw views and collect one worker's part of a step.

        Args:
            step: what to load.
            rank: of the worker.
            per_instance: expressions of each instance that is asked for, as far as it has them.

        Raises:
            ImageError: a photo cannot be decoded.
        """
        first = rank * len(step.rows)
        samples = self._samples[step.task]
        seen = [
            self._see(step.task, int(row), per_instance, [self._seed, step.number, first + i])
            for i, row in enumerate(step.rows)
        ]
        most_targets = samples.count[step.all_rows].max()
        arrays = _collate(step.task, seen) | {"most_targets": np.array(most_targets)}
        if self._mask_stride_px is not None:
            arrays |= _collate_masks(seen, self._mask_stride_px)
        return arrays

    def _see(self, task: str, row: int, per_instance: int, seed: Sequence[int]) -> _Seen:
        """Draw a view of one sample; draw again if it shows none of the boxes asked for."""
        samples = self._samples[task]
        number = int(samples.photo[row])
        photo = self._photos[number]
        asked = self._boxes(task, photo, int(samples.chunk[row]))
        rng = np.random.default_rng(seed)
        image = read_image(photo.path)
        height, width = image.shape[:2]
        boxes_px = photo.boxes[asked] * ([width, height] * 2)
        shrunk_by = masks = self._masks(photo, asked)
        texts = _texts(task, photo, asked, per_instance, rng)
        settings = self._augmentation
        for draw in range(MAX_DRAWS):
            if draw == MAX_DRAWS - 1:  # the whole photo, its boxes as annotated
                shrunk_by = [None] * len(masks)
                settings = settings.model_copy(update={"crop_probability": 0.0})
            said = [text for of_box in texts for text in of_box]
            view = draw_view(width, height, rng, settings, said if task == GROUNDING else ())
            boxes = boxes_in(view, boxes_of_masks(view, boxes_px, shrunk_by, (width, height)))
            left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            # detection may lose some of its boxes, a described instance must stay
            if left.any() if task == DETECTION else left.all():
                break
        keep = np.flatnonzero(left)
        return _Seen(
            photo=number,
            pixels=see(image, view),
            boxes=boxes[keep],
            box_rows=np.array(asked, np.int64)[keep],
            texts=[[text_in(view, text) for text in texts[i]] for i in keep],
            categories=photo.categories[asked][keep],
            noise_seed=int(rng.integers(2**31)),
            masks=[self._mask_in(view, masks[i], (width, height)) for i in keep],
        )

    def _masks(self, photo: TrainPhoto, boxes: Sequence[int]) -> list[BoolMask | None]:
        """(H, W) masks of some instances of a photo, None for those that have none."""
        if self._mask_stride_px is None or not photo.masks:
            return [None] * len(boxes)
        return [None if (rle := photo.masks[box]) is None else decode(rle) for box in boxes]

    def _mask_in(self, view: View, mask: BoolMask | None, size_px: tuple[int, int]) -> BoolMask:
        """(h, w) mask in the view; (0, 0) where there is none."""
        if mask is None or self._mask_stride_px is None:
            return np.zeros((0, 0), dtype=np.bool_)
        return mask_in(view, mask, size_px, self._mask_stride_px)


@dataclass(frozen=True)
class _Seen:
    """One sample in one view."""

    photo: int
    pixels: RgbImage
    boxes: npt.NDArray[np.float32]
    box_rows: npt.NDArray[np.int64]
    texts: list[list[str]]
    categories: npt.NDArray[np.int64]
    noise_seed: int
    masks: list[BoolMask]


def _texts(
    task: str,
    photo: TrainPhoto,
    boxes: Sequence[int],
    per_instance: int,
    rng: np.random.Generator,
) -> list[list[str]]:
    """What asks for each box: its class name, or some of its expressions, none of them twice."""
    if task == DETECTION:
        return [[photo.names[box]] for box in boxes]
    written: dict[int, list[str]] = defaultdict(list)
    for expression in photo.expressions:
        written[expression.box].append(expression.text)
    return [
        [written[box][i] for i in rng.permutation(len(written[box]))[:per_instance]]
        for box in boxes
    ]


def _collate(task: str, seen: Sequence[_Seen]) -> Arrays:
    """Pad to the largest photo and number targets and texts through."""
    pixels, size_px = stack_padded([each.pixels for each in seen])
    box_photo = np.repeat(np.arange(len(seen)), [len(each.boxes) for each in seen])
    keys = np.concatenate([each.photo * MAX_BOXES_A_PHOTO + each.box_rows for each in seen])
    by_class = task == DETECTION
    texts, target = (list(COCO_CLASSES), None) if by_class else _numbered(seen)
    none = np.full(len(texts), NO_TARGET, np.int64)
    return {
        "pixels": pixels,
        "size_px": size_px,
        "boxes": np.concatenate([each.boxes for each in seen]),
        "box_photo": box_photo.astype(np.int64),
        "box_text": (
            np.concatenate([each.categories for each in seen])
            if by_class
            else np.arange(len(keys), dtype=np.int64)
        ),
        "texts": np.array(texts, dtype=str),
        "text_target": none if target is None else target,
        "photo_key": np.array([each.photo for each in seen], np.int64),
        "instance_key": none if target is None else keys[target],
        "noise_seeds": np.array([each.noise_seed for each in seen], np.int64),
    }


def _numbered(seen: Sequence[_Seen]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """(M,) texts, the first of each target before all further ones, and their targets."""
    of_target = [texts for each in seen for texts in each.texts]
    pairs = [(texts[0], target) for target, texts in enumerate(of_target)]
    pairs += [(text, target) for target, texts in enumerate(of_target) for text in texts[1:]]
    return [text for text, _ in pairs], np.array([target for _, target in pairs], np.int64)


def _collate_masks(seen: Sequence[_Seen], stride_px: int) -> Arrays:
    """Masks of all targets, padded to the largest photo."""
    masks = [mask for each in seen for mask in each.masks]
    height, width = np.max([each.pixels.shape[:2] for each in seen], axis=0)
    table = np.zeros((len(masks), -(-height // stride_px), -(-width // stride_px)), dtype=np.bool_)
    for row, mask in zip(table, masks, strict=True):
        row[: mask.shape[0], : mask.shape[1]] = mask
    return {"masks": table, "has_mask": np.array([mask.size > 0 for mask in masks], np.bool_)}

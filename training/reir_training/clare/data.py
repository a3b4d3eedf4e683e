"""Loads the batches of CLARE from annotated photos (docs/clare.md, section 5.2).

Loading a step is a pure function of the step, so it can run in any process, in any order, and can
be repeated after a failure. There are two tasks: detection (all annotated boxes, with class names
as texts) and grounding (some instances of a photo, each with one of its expressions as text).
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
from reir.images.decode import pad_and_stack, read_image
from reir.images.rle import BoolMask, decode
from reir.records import RgbImage
from reir_training.data.augment import (
    Augmentation,
    AugmentedView,
    apply_view,
    boxes_in,
    draw_view,
    mask_in,
    shrink_boxes_to_masks,
    text_in,
)
from reir_training.data.examples import TrainPhoto
from reir_training.data.hard_negatives import HardNegativeBatches
from reir_training.data.sampling import Sampler, Step, TaskStream

DETECTION, GROUNDING = "detection", "grounding"
NO_TARGET = -1
# A sample cannot be exchanged for another one, because the sampler has already chosen those of all
# steps. So the last view shows the whole photo (docs/clare.md, section 9.4).
MAX_DRAWS = 10
# An instance key is one number, so that workers can exchange it: photo * this + row of the box.
MAX_BOXES_PER_PHOTO = 1 << 16
Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Samples:
    """The samples of one task, stored in arrays because there are hundreds of thousands of them.

    A sample is a photo with some of its boxes as targets.

    Attributes:
        photo: (S,) row of the photo.
        chunk: (S,) which chunk of the photo's boxes are the targets, counted from 0.
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
    """One worker's batch of a step.

    Attributes:
        pixels: (B, 3, H, W) uint8 RGB, padded with zeros on the right and at the bottom.
        size_px: (B, 2) height and width of each photo without padding.
        boxes: (T, 4) targets, xyxy in [0, 1] of the augmented photo.
        box_photo: (T,) photo of each target.
        box_text: (T,) text of each target.
        texts: M texts. In detection, the class names; in grounding, one expression per target in
            the same order, then further expressions of the targets.
        text_target: (M,) target that the text describes, -1 for class names.
        photo_key: (B,) id of the photo in the data set.
        instance_key: (M,) id of the described instance in the data set, -1 for class names.
        by_class: True in detection.
        max_targets: largest number of targets in a photo of the step, over all workers; the targets
            of all photos are padded to it.
        noise_seeds: B random seeds for the denoising noise of each photo.
        masks: (T, h, w) bool, all False for a target without mask; None without a mask branch.
        has_mask: (T,) bool; None without a mask branch.
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
    max_targets: int
    noise_seeds: list[int]
    masks: Tensor | None = None
    has_mask: Tensor | None = None

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> ClareBatch:
        """Build from the result of `ClareData.load`, in pinned memory if there is a GPU."""
        host = {"texts", "max_targets", "noise_seeds"}
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items() if k not in host}
        if torch.cuda.is_available():  # so that `to` copies during the previous step
            tensors = {k: tensor.pin_memory() for k, tensor in tensors.items()}
        return cls(
            **tensors,
            texts=[str(text) for text in arrays["texts"]],
            by_class=bool((arrays["text_target"] == NO_TARGET).any()),
            max_targets=int(arrays["max_targets"]),
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
    """The samples of a set of photos; loads the steps of a run from them.

    Args:
        photos: training photos.
        augmentation: settings of the augmentation.
        batch_size: photos per step, over all workers.
        texts_per_photo: instances per sample in grounding; the published recipe uses one.
        seed: random seed.
        mask_stride_px: side of a mask cell; None for a model without the mask branch.

    Raises:
        ConfigError: raised by `sampler` if a task has no samples.
    """

    def __init__(  # noqa: PLR0913 - most are keyword-only
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
        """The tasks that have samples."""
        return tuple(name for name, samples in self._samples.items() if samples)

    def sampler(self, tasks: Sequence[str], first_hard_batch: int | None = None) -> Sampler:
        """Return a sampler that alternates between tasks.

        Args:
            tasks: names of the tasks.
            first_hard_batch: first batch of each task that consists of hard negatives; None for
                random batches only.
        """
        streams = []
        for name in tasks:
            wide = self._samples[name].wide
            stream = partial(TaskStream, name, wide, self._batch_size, self._seed)
            if first_hard_batch is not None:
                hard_negatives = self._hard_negatives(name)
                stream = partial(
                    stream, hard_negatives=hard_negatives, first_hard_batch=first_hard_batch
                )
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
        """Return the rows of the boxes that are the targets of a sample."""
        if task == DETECTION:
            return [int(row) for row in np.flatnonzero(photo.categories >= 0)]
        referred = sorted({expression.box for expression in photo.expressions})
        first = chunk * self._texts_per_photo
        return referred[first : first + self._texts_per_photo]

    def _hard_negatives(self, task: str) -> HardNegativeBatches:
        texts, galleries, samples = [], [], self._samples[task]
        for row, chunk in zip(samples.photo.tolist(), samples.chunk.tolist(), strict=True):
            photo = self._photos[row]
            boxes = self._boxes(task, photo, chunk)
            texts.append([e.text for e in photo.expressions if e.box in boxes])
            galleries.append(photo.gallery)
        return HardNegativeBatches(texts, galleries)

    def load(self, step: Step, rank: int = 0, *, per_instance: int = 1) -> Arrays:
        """Load one worker's batch of a step: decode, augment and collate its samples.

        Args:
            step: step to load.
            rank: rank of the worker.
            per_instance: maximum number of expressions per instance.

        Raises:
            ImageError: a photo cannot be decoded.
        """
        # The views are seeded by the position in the global batch, so that they do not depend on
        # how the batch is divided among workers.
        first = rank * len(step.rows)
        samples = self._samples[step.task]
        views = [
            self._augmented(step.task, int(row), per_instance, [self._seed, step.number, first + i])
            for i, row in enumerate(step.rows)
        ]
        # Over all workers and before cropping, because the number of denoising queries follows from
        # it. So that number is the same for any number of workers (docs/clare.md, section 9.2).
        max_targets = samples.count[step.all_rows].max()
        arrays = _collate(step.task, views) | {"max_targets": np.array(max_targets)}
        if self._mask_stride_px is not None:
            arrays |= _collate_masks(views, self._mask_stride_px)
        return arrays

    def _augmented(
        self, task: str, row: int, per_instance: int, seed: Sequence[int]
    ) -> _SampleView:
        """Load one sample in a random view; draw a new view if its targets were cropped away."""
        samples = self._samples[task]
        number = int(samples.photo[row])
        photo = self._photos[number]
        box_rows = self._boxes(task, photo, int(samples.chunk[row]))
        rng = np.random.default_rng(seed)
        image = read_image(photo.path)
        height, width = image.shape[:2]
        boxes_px = photo.boxes[box_rows] * ([width, height] * 2)
        shrunk_by = masks = self._masks(photo, box_rows)
        texts = _texts(task, photo, box_rows, per_instance, rng)
        settings = self._augmentation
        for draw in range(MAX_DRAWS):
            if draw == MAX_DRAWS - 1:
                # Use the whole photo, and its boxes as annotated: a mask that lies outside of its
                # box would leave the box without area in any view.
                shrunk_by = [None] * len(masks)
                settings = settings.model_copy(update={"crop_probability": 0.0})
            expressions = [text for of_box in texts for text in of_box]
            # An ordinal in an expression forbids cropping; class names need no such check.
            view = draw_view(width, height, rng, settings, expressions if task == GROUNDING else ())
            boxes = boxes_in(
                view, shrink_boxes_to_masks(view, boxes_px, shrunk_by, (width, height))
            )
            visible = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            # Detection may lose some of its boxes, but an instance with an expression must remain.
            if visible.any() if task == DETECTION else visible.all():
                break
        keep = np.flatnonzero(visible)
        return _SampleView(
            photo=number,
            pixels=apply_view(image, view),
            boxes=boxes[keep],
            box_rows=np.array(box_rows, np.int64)[keep],
            texts=[[text_in(view, text) for text in texts[i]] for i in keep],
            categories=photo.categories[box_rows][keep],
            # Drawn from the sample's own random stream, so that the noise of its denoising queries
            # does not depend on the other photos of the batch either.
            noise_seed=int(rng.integers(2**31)),
            masks=[self._mask_in(view, masks[i], (width, height)) for i in keep],
        )

    def _masks(self, photo: TrainPhoto, boxes: Sequence[int]) -> list[BoolMask | None]:
        """Return the (H, W) masks of some instances of a photo, None for those without one."""
        if self._mask_stride_px is None or not photo.masks:
            return [None] * len(boxes)
        return [None if (rle := photo.masks[box]) is None else decode(rle) for box in boxes]

    def _mask_in(
        self, view: AugmentedView, mask: BoolMask | None, size_px: tuple[int, int]
    ) -> BoolMask:
        """Return the (h, w) mask in the view, or an empty array if there is none."""
        if mask is None or self._mask_stride_px is None:
            return np.zeros((0, 0), dtype=np.bool_)
        return mask_in(view, mask, size_px, self._mask_stride_px)


@dataclass(frozen=True)
class _SampleView:
    """A sample after augmentation."""

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
    """Return the texts of each box: its class name, or a random choice of its expressions."""
    if task == DETECTION:
        return [[photo.names[box]] for box in boxes]
    written: dict[int, list[str]] = defaultdict(list)
    for expression in photo.expressions:
        written[expression.box].append(expression.text)
    return [
        [written[box][i] for i in rng.permutation(len(written[box]))[:per_instance]]
        for box in boxes
    ]


def _collate(task: str, views: Sequence[_SampleView]) -> Arrays:
    """Pad the photos to the largest one, and number the targets and texts of the batch."""
    pixels, size_px = pad_and_stack([each.pixels for each in views])
    box_photo = np.repeat(np.arange(len(views)), [len(each.boxes) for each in views])
    keys = np.concatenate([each.photo * MAX_BOXES_PER_PHOTO + each.box_rows for each in views])
    by_class = task == DETECTION
    texts, target = (list(COCO_CLASSES), None) if by_class else _numbered(views)
    none = np.full(len(texts), NO_TARGET, np.int64)
    return {
        "pixels": pixels,
        "size_px": size_px,
        "boxes": np.concatenate([each.boxes for each in views]),
        "box_photo": box_photo.astype(np.int64),
        "box_text": (
            np.concatenate([each.categories for each in views])
            if by_class
            else np.arange(len(keys), dtype=np.int64)
        ),
        "texts": np.array(texts, dtype=str),
        "text_target": none if target is None else target,
        "photo_key": np.array([each.photo for each in views], np.int64),
        "instance_key": none if target is None else keys[target],
        "noise_seeds": np.array([each.noise_seed for each in views], np.int64),
    }


def _numbered(views: Sequence[_SampleView]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return (M,) texts and their targets: first one text per target, then all others."""
    # `box_text` and the objective rely on this order: text i belongs to target i, and what follows
    # the T first texts is only used by CLIA.
    of_target = [texts for each in views for texts in each.texts]
    pairs = [(texts[0], target) for target, texts in enumerate(of_target)]
    pairs += [(text, target) for target, texts in enumerate(of_target) for text in texts[1:]]
    return [text for text, _ in pairs], np.array([target for _, target in pairs], np.int64)


def _collate_masks(views: Sequence[_SampleView], stride_px: int) -> Arrays:
    """Collect the masks of all targets, padded to the largest photo."""
    masks = [mask for each in views for mask in each.masks]
    height, width = np.max([each.pixels.shape[:2] for each in views], axis=0)
    table = np.zeros((len(masks), -(-height // stride_px), -(-width // stride_px)), dtype=np.bool_)
    for row, mask in zip(table, masks, strict=True):
        row[: mask.shape[0], : mask.shape[1]] = mask
    return {"masks": table, "has_mask": np.array([mask.size > 0 for mask in masks], np.bool_)}

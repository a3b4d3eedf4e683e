"""Loads the batches of PIZA: for each expression, one random step of a search for its instance.

A search goes from the whole photo to the true box of the instance (`search_trajectory`). In one of
its steps, the model sees the photo within the last box so far, at full resolution, and should find
the next box. A method that does not zoom learns the only step of a search that goes straight from
the whole photo to the instance.

Loading a step is a pure function of the step, so it can run in any process, in any order, and can
be repeated after a failure.
"""

# Shapes: B expressions of one worker, H x W pixels after padding, T boxes of the longest search

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reir.errors import ConfigError
from reir.images.decode import decode, pad_and_stack, read_bytes
from reir.records import FloatArray, RgbImage
from reir_training.clare.data import Arrays
from reir_training.data.augment import Augmentation, AugmentedView, apply_view, boxes_in, draw_view
from reir_training.data.examples import TrainPhoto
from reir_training.data.sampling import Sampler, Step, TaskStream
from reir_training.piza.trajectories import WHOLE_PHOTO, TrajectorySettings, search_trajectory

SEARCH = "search"
"""The name of the only task."""
# After so many draws, the view shows the whole crop: the sampler has already chosen the samples.
MAX_DRAWS = 10
LEAST_VISIBLE = 0.999
"""A view must show the next box as a whole, up to rounding."""


@dataclass
class PizaBatch:
    """One worker's batch of a step.

    Attributes:
        pixels: (B, 3, H, W) uint8 RGB, padded with zeros on the right and at the bottom.
        size_px: (B, 2) height and width of each picture without padding.
        boxes: (B, 4) the next box of each search, xyxy in [0, 1] of the picture.
        histories: (B, T, 4) boxes so far, xyxy in [0, 1] of the photo; zeros where padded.
        valid: (B, T) bool, False where a shorter history is padded.
        texts: B expressions.
    """

    pixels: Tensor
    size_px: Tensor
    boxes: Tensor
    histories: Tensor
    valid: Tensor
    texts: list[str]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> PizaBatch:
        """Build from the result of `PizaData.load`."""
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items() if k != "texts"}
        return cls(**tensors, texts=[str(text) for text in arrays["texts"]])

    def to(self, device: torch.device | str) -> PizaBatch:
        """Return the batch on a device."""
        tensors: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class SearchStep:
    """One step of a search, with the view of the photo that the model gets.

    Attributes:
        photo: row of the photo.
        text: the expression.
        history: (T, 4) boxes so far, xyxy in [0, 1] of the photo; the last one is what it sees.
        view: what the model gets of the photo, in pixels of its annotated size.
        box: (4,) next box, xyxy in [0, 1] of the view.
    """

    photo: int
    text: str
    history: FloatArray
    view: AugmentedView
    box: FloatArray


class PizaData:
    """The expressions of a set of photos; loads the steps of a run from them.

    Args:
        photos: training photos.
        augmentation: how the picture of a step is resized and cropped.
        searches: how searches are generated; None for a method that does not zoom.
        batch_size: expressions per step, over all workers.
        seed: random seed.

    Raises:
        ConfigError: pictures would be mirrored, or there are no expressions.
    """

    def __init__(
        self,
        photos: Sequence[TrainPhoto],
        augmentation: Augmentation,
        searches: TrajectorySettings | None,
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if augmentation.mirror_probability:
            raise ConfigError(
                f"augmentation.mirror_probability={augmentation.mirror_probability}: mirrored "
                f"pictures would not fit the boxes of a search; set it to 0"
            )
        self._photos, self._augmentation, self._searches = photos, augmentation, searches
        self._seed = seed
        counts = [len(photo.expressions) for photo in photos]
        self._photo_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        firsts = np.cumsum([0, *counts[:-1]])
        self._place_of = np.arange(sum(counts), dtype=np.int32) - np.repeat(firsts, counts)
        wide = np.repeat(np.array([photo.is_wide for photo in photos], dtype=bool), counts)
        self._sampler = Sampler([TaskStream(SEARCH, wide, batch_size, seed)])

    @property
    def sampler(self) -> Sampler:
        """Chooses the expressions of each step."""
        return self._sampler

    def load(self, step: Step, rank: int = 0) -> Arrays:
        """Load one worker's batch of a step.

        Args:
            step: step to load.
            rank: rank of the worker.

        Raises:
            ImageError: a photo cannot be decoded.
        """
        # The steps of all workers are drawn, since padding changes what the model computes: all
        # pictures are padded to the largest one of the step, whoever loads it.
        drawn = [
            self._draw(int(row), np.random.default_rng([self._seed, step.number, place]))
            for place, row in enumerate(step.all_rows)
        ]
        first = rank * len(step.rows)
        own = drawn[first : first + len(step.rows)]
        pixels, size_px = pad_and_stack([self._pixels(each) for each in own])
        height = max(each.view.height_px for each in drawn) - pixels.shape[2]
        width = max(each.view.width_px for each in drawn) - pixels.shape[3]
        longest = max(len(each.history) for each in drawn)
        histories = np.zeros((len(own), longest, 4), dtype=np.float32)
        valid = np.zeros((len(own), longest), dtype=np.bool_)
        for number, each in enumerate(own):
            histories[number, : len(each.history)] = each.history
            valid[number, : len(each.history)] = True
        return {
            "pixels": np.pad(pixels, ((0, 0), (0, 0), (0, height), (0, width))),
            "size_px": size_px,
            "boxes": np.stack([each.box for each in own]),
            "histories": histories,
            "valid": valid,
            "texts": np.array([each.text for each in own], dtype=str),
        }

    def _draw(self, row: int, rng: np.random.Generator) -> SearchStep:
        """Draw a step of a search for one expression, and the view of it."""
        number = int(self._photo_of[row])
        photo = self._photos[number]
        expression = photo.expressions[int(self._place_of[row])]
        boxes = self._search(photo.boxes[expression.box], photo.size_px, rng)
        last = int(rng.integers(1, len(boxes)))
        size = np.array([*photo.size_px, *photo.size_px])
        seen, target = boxes[last - 1] * size, boxes[last] * size
        view = self._view(seen, target, expression.text, rng)
        box = boxes_in(view, target[None])[0]
        return SearchStep(number, expression.text, boxes[:last], view, box)

    def _search(
        self, box: FloatArray, size_px: tuple[int, int], rng: np.random.Generator
    ) -> FloatArray:
        if self._searches is None:
            return np.array([WHOLE_PHOTO, box], dtype=np.float32)
        x1, y1, x2, y2 = box.tolist()
        return search_trajectory((x1, y1, x2, y2), size_px, rng, self._searches).boxes

    def _view(
        self, seen: FloatArray, target: FloatArray, text: str, rng: np.random.Generator
    ) -> AugmentedView:
        """Draw a view of a crop (both xyxy in pixels) that shows the whole target."""
        settings = self._augmentation
        width, height = (max(float(side), 1.0) for side in seen[2:] - seen[:2])
        for draw in range(MAX_DRAWS):
            if draw == MAX_DRAWS - 1:
                settings = settings.model_copy(update={"crop_probability": 0.0})
            view = draw_view(width, height, rng, settings, [text])
            x1, y1, x2, y2 = view.region_px
            x, y = seen[:2].tolist()
            view = replace(view, region_px=(x + x1, y + y1, x + x2, y + y2))
            (shown,) = boxes_in(view, target[None]) * np.tile([x2 - x1, y2 - y1], 2)
            if (shown[2:] - shown[:2] >= LEAST_VISIBLE * (target[2:] - target[:2])).all():
                break
        return view

    def _pixels(self, step: SearchStep) -> RgbImage:
        """Return the pixels of a view, from a photo that is no smaller than the view needs."""
        photo, view = self._photos[step.photo], step.view
        x1, y1, x2, y2 = view.region_px
        scale = max(view.width_px / (x2 - x1), view.height_px / (y2 - y1))
        needed = max(math.ceil(scale * max(photo.size_px)), 1)
        image = decode(read_bytes(photo.path), at_least_px=needed).pixels
        size = np.array([image.shape[1], image.shape[0]] * 2)
        # Views are in pixels of the annotated size, which the decoded photo need not have.
        region = np.array(view.region_px) * size / np.tile(photo.size_px, 2)
        # Clipped, because rounding may put the region a little outside, which Pillow refuses.
        x1, y1, x2, y2 = np.clip(region, 0, size).tolist()
        return apply_view(image, replace(view, region_px=(x1, y1, x2, y2)))

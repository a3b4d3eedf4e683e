"""The examples that a zoom policy is trained on: looks on the way to a true box, and beside it."""

# Shapes: N candidates of a step, F features, T boxes of a path, L levels, D vector dimension

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reir.images.boxes import area, elementwise_iou
from reir.models.query_zoom.frames import NUM_LEVELS
from reir.models.query_zoom.looks import Look, as_box
from reir.models.query_zoom.policy import Candidates, candidates_of, closer_levels
from reir.records import Box, FloatArray
from reir_training.config import QueryZoomSettings
from reir_training.query_zoom.looks import ZoomMosaics, looks_path, read_looks

FOUND_IOU = 0.5
"""A candidate is the described instance from this IoU with the true box on."""
CONTAINED = 0.9
"""A frame contains an instance from this share of the instance's area on."""
DIRECT = 0.3
"""Share of looks that follow the look at the whole photo, without those between."""


@dataclass
class ZoomBatch:
    """The input of one step.

    Attributes:
        features: (N, F), see `Candidates`.
        paths: (N, T, 4).
        valid: (N, T) bool.
        found: (N,) bool, whether the candidate is the described instance.
        contains: (N, L) bool, whether the frame around it contains the described instance.
        closer: (N, L) bool, whether that frame is smaller than that of the look.
    """

    features: Tensor
    paths: Tensor
    valid: Tensor
    found: Tensor
    contains: Tensor
    closer: Tensor

    def to(self, device: torch.device | str) -> ZoomBatch:
        """Return the batch on a device."""
        return ZoomBatch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Example:
    """The candidates of a look, as the policy reads them, and their labels for one target.

    Attributes:
        read: input of the policy.
        scores: (N,) inner products with the vector of the target's expression.
        found, contains, closer: see `ZoomBatch`.
    """

    read: Candidates
    scores: FloatArray
    found: np.ndarray
    contains: np.ndarray
    closer: np.ndarray


class ZoomExamples:
    """Makes examples of the looks at mosaics.

    Args:
        mosaics: with their targets.
        vectors: (number of targets, D) of their expressions.
        cache: folder of the looks.
        settings: how examples are drawn.
    """

    def __init__(
        self, mosaics: ZoomMosaics, vectors: FloatArray, cache: Path, settings: QueryZoomSettings
    ) -> None:
        self._mosaics, self._vectors, self._settings = mosaics, vectors, settings
        self._looks = [
            _by_level(read_looks(looks_path(cache, number)), mosaics, number)
            for number in range(len(mosaics.mosaics))
        ]

    def batch(self, rows: Sequence[int], rng: np.random.Generator) -> ZoomBatch:
        """Build a batch of some looks for the targets of these rows."""
        made = [each for row in rows for each in self._drawn(row, rng)]
        parts = (
            (*vars(each.read).values(), each.found, each.contains, each.closer) for each in made
        )
        # The fourth field of `Candidates`, the frames, has already served to make the labels.
        features, paths, valid, _, *labels = map(np.concatenate, zip(*parts, strict=True))
        return ZoomBatch(*map(torch.from_numpy, (features, paths, valid, *labels)))

    def of_target(self, row: int) -> list[Example]:
        """Return the examples of all looks for a target, without noise."""
        whole, *closer = self._looks[self._mosaics.targets[row].mosaic]
        first = as_box(whole[0].frame)
        looks = [look for of_level in closer for look in of_level]
        found = [self._example(row, look, (first, as_box(look.frame))) for look in looks]
        return [self._example(row, whole[0], (first,)), *found]

    def _drawn(self, row: int, rng: np.random.Generator) -> Iterator[Example]:
        """Yield the look at the whole mosaic, and looks that show the target or do not."""
        target = self._mosaics.targets[row]
        whole, *closer = self._looks[target.mosaic]
        first = as_box(whole[0].frame)
        yield self._example(row, whole[0], (first,), rng)
        for level, looks in enumerate(closer):
            frames = np.array([look.frame for look in looks]).reshape(-1, 4)
            right = contains(frames, target.box)
            for numbers in (np.flatnonzero(right), np.flatnonzero(~right)):
                for number in rng.permutation(numbers)[: self._settings.looks_per_level]:
                    look = looks[number]
                    between = _way_to(look, closer[:level], rng)
                    yield self._example(row, look, (first, *between, as_box(look.frame)), rng)

    def _example(
        self,
        row: int,
        look: Look,
        path: tuple[Box, ...],
        rng: np.random.Generator | None = None,
    ) -> Example:
        target = self._mosaics.targets[row]
        grid = self._mosaics.grid(target.mosaic)
        scores = look.vectors @ self._vectors[row]
        if rng is not None:
            noise = rng.normal(0, self._settings.score_noise, len(scores))
            scores = scores + noise.astype(np.float32)
        read = candidates_of(look, scores, path, grid)
        closer = np.zeros((len(scores), NUM_LEVELS), dtype=np.bool_)
        closer[:, closer_levels(look.frame, grid)] = True
        return Example(
            read,
            scores,
            elementwise_iou(target.box, look.boxes) >= FOUND_IOU,
            contains(read.frames, target.box),
            closer,
        )


def contains(frames: FloatArray, box: FloatArray) -> np.ndarray:
    """(...) whether frames (..., 4) contain a box (4,), up to a small part of it."""
    sides = np.minimum(frames[..., 2:], box[2:]) - np.maximum(frames[..., :2], box[:2])
    return np.asarray(np.maximum(sides, 0).prod(-1) >= CONTAINED * area(box))


def _by_level(looks: Sequence[Look], mosaics: ZoomMosaics, number: int) -> list[list[Look]]:
    """Return the look at the whole mosaic, and then the looks of each level of its grid."""
    grid = mosaics.grid(number)
    num_levels = len(grid.sides_px)
    levels: list[list[Look]] = [[] for _ in range(num_levels + 1)]
    for look in looks:
        # Every level is closer than the whole mosaic, and none is closer than the last level, so
        # the number of closer levels tells the level of a look.
        levels[num_levels - len(closer_levels(look.frame, grid))].append(look)
    return levels


def _way_to(
    look: Look, levels: Sequence[Sequence[Look]], rng: np.random.Generator
) -> tuple[Box, ...]:
    """Return a frame of the level before that contains the look, or nothing: a direct way."""
    if not levels or rng.random() < DIRECT:
        return ()
    frames = np.array([each.frame for each in levels[-1]]).reshape(-1, 4)
    around = np.flatnonzero(contains(frames, look.frame))
    return (as_box(frames[rng.choice(around)]),) if len(around) else ()

"""`FrameGrid`: the parts of a photo that a search may look at.

They lie on a grid, so that searches of one photo for different expressions look at the same parts,
each of which is encoded once.
"""

# Shapes: N places

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from reir.records import FloatArray

ZOOM = 2.5
"""Side of a frame by the side of a frame of the next level."""
NUM_LEVELS = 2
MIN_SIDE_PX = 224
"""Smallest side of a frame; below it, a look would only enlarge the pixels that it has."""
OVERLAP = 0.5
"""Overlap of neighboring frames: an instance up to this share of the side is whole in one frame."""
WHOLE = np.array([0, 0, 1, 1], dtype=np.float32)


@dataclass(frozen=True)
class FrameGrid:
    """Square frames of one photo, on levels of smaller and smaller sides.

    Attributes:
        width_px, height_px: size of the upright photo.
    """

    width_px: int
    height_px: int

    @cached_property
    def sides_px(self) -> tuple[int, ...]:
        """Side of the frames of each level, at most `NUM_LEVELS`; none for a small photo."""
        longer = max(self.width_px, self.height_px)
        sides = (round(longer / ZOOM**level) for level in range(1, NUM_LEVELS + 1))
        return tuple(side for side in sides if side >= MIN_SIDE_PX)

    def around(self, level: int, centers_N2: FloatArray) -> FloatArray:
        """Return the (N, 4) frames of a level whose middles are next to places in [0, 1]."""
        lengths, side = np.array([self.width_px, self.height_px]), self.sides_px[level]
        sides = np.minimum(lengths, side)
        last = np.array([self._num_starts(each, side) for each in lengths.tolist()]) - 1
        free = lengths - sides
        share = (centers_N2 * lengths - sides / 2) / np.maximum(free, 1)
        number = np.rint(share.clip(0, 1) * last)
        start = np.rint(number / np.maximum(last, 1) * free)
        frames = np.concatenate([start, start + sides], axis=1) / np.tile(lengths, 2)
        return np.asarray(frames, dtype=np.float32)

    def every(self, level: int) -> Iterator[FloatArray]:
        """Yield all frames of a level, row by row."""
        side = self.sides_px[level]
        columns, rows = (self._num_starts(each, side) for each in (self.width_px, self.height_px))
        for row in range(rows):
            for column in range(columns):
                share = np.array([column / max(columns - 1, 1), row / max(rows - 1, 1)])
                lengths = np.array([self.width_px, self.height_px])
                sides = np.minimum(lengths, side)
                center = (share * (lengths - sides) + sides / 2) / lengths
                yield self.around(level, center[None].astype(np.float32))[0]

    def _num_starts(self, length_px: int, side_px: int) -> int:
        """Return how many frames cover a length."""
        if length_px <= side_px:
            return 1
        return 1 + math.ceil((length_px - side_px) / (side_px * (1 - OVERLAP)))

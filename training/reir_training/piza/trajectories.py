"""Generates the searches that PIZA learns from: from a whole photo to the true box of a target.

The paper describes its generator only in words, and the release contains none, so every constant
here is a decision (docs/piza.md). The number of boxes follows from how large instances usually are
in the photos of the base's training. From box to box, the logarithms of the sides fall to those of
the target, so that the aspect ratio changes gradually too. The boxes in between lie at random
around the target.
"""

# Shapes: T boxes of a search after the whole photo

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from reir.errors import ConfigError
from reir.records import Box, FloatArray

WHOLE_PHOTO = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """How searches are generated.

    Attributes:
        usual_share: share of the picture that an instance usually covers where the base finds it
            well. A search has as many boxes as needed for each to cover that share of the one
            before.
        share_spread: standard deviation of the natural logarithm of that share, which is drawn
            anew for every search.
        max_boxes: maximum of T; a search looks this many times at most.
        growth: each zoom is `exp(growth)` times the one before, in logarithms of the area. Above 0,
            the first zooms are the more careful ones: what they cut off is lost.
        jitter: how far a box may be off the center of the next one, as a fraction of what is
            possible; 0 leaves the target in the middle unless the edge of the photo is near.
        least_side_px: minimum side of a box before the last, as far as the photo allows.

    Raises:
        ConfigError: a value is out of range.
    """

    usual_share: float = 0.02
    share_spread: float = 0.5
    max_boxes: int = 5
    growth: float = 0.2
    jitter: float = 1.0
    least_side_px: int = 32

    def __post_init__(self) -> None:
        """Check the values."""
        ranges = {
            "usual_share": (1e-6, MAX_SHARE),
            "share_spread": (0, 10),
            "max_boxes": (1, 100),
            "growth": (-10, 10),
            "jitter": (0, 1),
            "least_side_px": (1, 100_000),
        }
        for each in fields(self):
            (low, high), value = ranges[each.name], getattr(self, each.name)
            if not low <= value <= high:
                raise ConfigError(f"{each.name} must be {low} to {high}, got {value}")


MAX_SHARE = 0.5
"""A larger usual share would need very many boxes."""
DEFAULTS = TrajectorySettings()


@dataclass(frozen=True)
class Trajectory:
    """A search from the whole photo to a target.

    Attributes:
        boxes: (T + 1, 4) float32 xyxy in [0, 1]; first the whole photo, last the target, each
            inside the one before.
        progress: (T + 1,) float32 from 0 for the whole photo to 1 for the target, in equal parts
            of the logarithm of the area.
        end: (T + 1,) bool, True for the target only.
    """

    boxes: FloatArray
    progress: FloatArray
    end: npt.NDArray[np.bool_]


def search_trajectory(
    target: Box,
    size_px: tuple[int, int],
    random: np.random.Generator,
    settings: TrajectorySettings = DEFAULTS,
) -> Trajectory:
    """Generate a search that ends at a target.

    Args:
        target: true box, xyxy in [0, 1].
        size_px: width and height of the photo.
        random: draws the number of boxes and their places.
        settings: how searches are generated.

    Raises:
        ValueError: the target has no area, or is not in [0, 1].
    """
    low, high = np.array(target[:2], dtype=np.float64), np.array(target[2:], dtype=np.float64)
    if not (np.all(low >= 0) and np.all(low < high) and np.all(high <= 1)):
        raise ValueError(f"the target must be a box with an area in [0, 1], got {target}")
    sides = high - low
    progress = _progress(float(np.log(sides).sum()), random, settings)
    least = np.minimum(settings.least_side_px / np.array(size_px, dtype=np.float64), 1)
    boxes = [np.concatenate([low, high])]
    # From the target to the photo: every box must contain the next one.
    for fraction in progress[-2:0:-1]:
        side = np.maximum(sides**fraction, least)
        boxes.append(_around(boxes[-1], side, random, settings.jitter))
    boxes.append(np.array(WHOLE_PHOTO))
    end = np.zeros(len(boxes), dtype=np.bool_)
    end[-1] = True
    return Trajectory(np.stack(boxes[::-1]).astype(np.float32), progress.astype(np.float32), end)


def _progress(
    log_share: float, random: np.random.Generator, settings: TrajectorySettings
) -> npt.NDArray[np.float64]:
    """Return (T + 1,) values from 0 to 1 for a target with this logarithm of its area."""
    drawn = math.log(settings.usual_share) + settings.share_spread * random.standard_normal()
    usual = min(drawn, math.log(MAX_SHARE))
    count = int(np.clip(round(log_share / usual), 1, settings.max_boxes))
    zooms = np.exp(settings.growth * np.arange(count))
    progress = np.concatenate([[0.0], zooms.cumsum() / zooms.sum()])
    progress[-1] = 1.0  # not off by rounding
    return progress


def _around(
    inner: npt.NDArray[np.float64],
    side: npt.NDArray[np.float64],
    random: np.random.Generator,
    jitter: float,
) -> npt.NDArray[np.float64]:
    """Return a box with these sides in the photo that contains another."""
    low, high = inner[:2], inner[2:]
    side = np.clip(side, high - low, 1)
    first = np.maximum(high - side, 0)
    last = np.maximum(np.minimum(low, 1 - side), first)
    central = np.clip((low + high - side) / 2, first, last)
    corner = central + jitter * (random.uniform(first, last) - central)
    # Against rounding, which could put a box that just fits a hair beside the inner one.
    corner, far = np.minimum(corner, low), np.maximum(corner + side, high)
    return np.concatenate([corner, np.minimum(far, 1)])

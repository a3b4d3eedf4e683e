"""Outlines of masks, as polygons that can be drawn at any size."""

# Shapes: H x W pixels of the mask, P points of a polygon

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from reir.images.rle import BoolMask, decode
from reir.records import MaskRle

Point = tuple[float, float]
_Corner = tuple[int, int]

SLACK_PX = 1.0
"""Largest distance of a polygon from the pixel border; it smooths the steps of slanted borders."""


def outlines(mask: MaskRle) -> list[list[Point]]:
    """Return the borders of a mask and of its holes, each a list of (x, y) in [0, 1].

    Pixels that touch only at a corner are not connected. Filled by the even-odd rule, the polygons
    reproduce the mask up to `SLACK_PX` along its border.
    """
    pixels_HW = decode(mask)
    height, width = pixels_HW.shape
    found = (_simplify(loop) for loop in _loops(pixels_HW))
    return [[(x / width, y / height) for x, y in loop] for loop in found if len(loop) > 2]


def _loops(pixels_HW: BoolMask) -> list[list[_Corner]]:
    """Return closed walks along the borders between pixels, with the mask on the right."""
    ahead: dict[_Corner, list[_Corner]] = defaultdict(list)
    for start, end in _borders(pixels_HW):
        ahead[start].append(end)
    loops = []
    while ahead:
        first = next(iter(ahead))
        loop, here = [first], _step(ahead, first, None)
        while here != first:
            loop.append(here)
            here = _step(ahead, here, loop[-2])
        loops.append(loop)
    return loops


def _step(ahead: dict[_Corner, list[_Corner]], here: _Corner, came: _Corner | None) -> _Corner:
    """Remove a border that starts at `here`, and return its end.

    Where two pixels touch at a corner, two borders start, and the one that turns right is taken:
    it stays with the same pixel, so the two are not connected.
    """
    ends = ahead[here]
    if came is not None and len(ends) > 1:
        dx, dy = here[0] - came[0], here[1] - came[1]
        # The y axis points down, so a right turn leads from (dx, dy) to (-dy, dx).
        right = (here[0] - dy, here[1] + dx)
        # Last, where `pop` takes it.
        ends.sort(key=lambda end: end == right)
    end = ends.pop()
    if not ends:
        del ahead[here]
    return end


def _borders(pixels_HW: BoolMask) -> list[tuple[_Corner, _Corner]]:
    """Return the sides of pixels, from (x, y) to (x, y), at which the mask begins or ends."""
    # Padded, so that the border of the mask is closed at the border of the photo; signed, because
    # differences of unsigned numbers are never -1.
    padded = np.pad(pixels_HW, 1).astype(np.int8)
    down = np.diff(padded, axis=0)[:, 1:-1]  # 1 where the mask begins below a horizontal side
    across = np.diff(padded, axis=1)[1:-1]
    return [
        *(((x, y), (x + 1, y)) for y, x in np.argwhere(down == 1).tolist()),
        *(((x + 1, y), (x, y)) for y, x in np.argwhere(down == -1).tolist()),
        *(((x, y + 1), (x, y)) for y, x in np.argwhere(across == 1).tolist()),
        *(((x, y), (x, y + 1)) for y, x in np.argwhere(across == -1).tolist()),
    ]


def _simplify(loop: list[_Corner]) -> list[_Corner]:
    """Leave out corners that lie within `SLACK_PX` of the rest (Douglas and Peucker, 1973)."""
    # The algorithm is for open lines, so the loop is divided at the corner farthest from its start.
    points_P2 = np.array([*loop, loop[0]], dtype=np.float64)
    middle = int(np.abs(points_P2 - points_P2[0]).sum(axis=1).argmax())
    kept = {0, middle}
    pending = [(0, middle), (middle, len(loop))]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        offsets = _distances(points_P2[first + 1 : last], points_P2[first], points_P2[last])
        far = int(offsets.argmax())
        if offsets[far] > SLACK_PX:
            kept.add(first + 1 + far)
            pending += [(first, first + 1 + far), (first + 1 + far, last)]
    return [loop[index] for index in sorted(kept)]


def _distances(
    points_P2: npt.NDArray[np.float64],
    start_2: npt.NDArray[np.float64],
    end_2: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """(P,) distances of points from the line through two others, or from both if they are equal."""
    along, offsets = end_2 - start_2, points_P2 - start_2
    length = float(np.hypot(*along))
    if length == 0:
        return np.asarray(np.hypot(offsets[:, 0], offsets[:, 1]))
    return np.asarray(np.abs(along[0] * offsets[:, 1] - along[1] * offsets[:, 0]) / length)

"""Run-length encoded masks in COCO's format, encoded and decoded by pycocotools."""

# Shapes: H x W pixels of the photo

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco

from reir.records import MAX_RLE_BYTES, MaskRle

MAX_OUTLINE_PX = 1_000_000
"""Length limit of a polygon's outline: pycocotools needs about 100 bytes for each pixel of it."""

# Without a limit, one run of a million characters would take minutes to add up.
_MAX_RUN_BITS = 60

BoolMask = npt.NDArray[np.bool_]
"""(H, W) bool, upright, True where the instance is."""


def encode(mask: BoolMask) -> MaskRle:
    """Return the runs of an (H, W) bool mask.

    If the runs take more than `MAX_RLE_BYTES`, the mask is repeatedly reduced to every second row
    and column; the size of the result tells.
    """
    whole = _runs(mask)
    return encode(mask[::2, ::2]) if len(whole.counts) > MAX_RLE_BYTES else whole


def decode(rle: MaskRle) -> BoolMask:
    """Return the (H, W) bool mask, of size `rle.size`."""
    found: BoolMask = coco.decode({"size": list(rle.size), "counts": rle.counts}).astype(bool)
    return found


def resize_mask(mask: BoolMask, size_px: tuple[int, int]) -> BoolMask:
    """Resize a mask to (height, width) by nearest neighbor."""
    rows, columns = (
        # The center of a new pixel decides; its corner would shift the mask to the lower right.
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip(size_px, mask.shape, strict=True)
    )
    moved: BoolMask = mask[rows[:, None], columns]
    return moved


def area_px(rle: MaskRle) -> int:
    """Return the number of pixels of the mask."""
    return int(coco.area({"size": list(rle.size), "counts": rle.counts}))


def fitted(rle: MaskRle, size_px: tuple[int, int]) -> MaskRle:
    """Return the mask at this size, (height, width); unchanged if it has this size.

    Its runs may take more than `MAX_RLE_BYTES`, so it is not for a row of a store.
    """
    return rle if rle.size == size_px else _runs(resize_mask(decode(rle), size_px))


def pairwise_iou(a: Sequence[MaskRle], b: Sequence[MaskRle]) -> npt.NDArray[np.float64]:
    """(N, M) intersection over union of every mask of `a` with every mask of `b`.

    Raises:
        ValueError: the masks differ in size.
    """
    sizes = {each.size for each in (*a, *b)}
    if len(sizes) > 1:
        raise ValueError(f"masks must have the same size, got {sorted(sizes)}")
    if not (a and b):
        return np.zeros((len(a), len(b)))
    rows, columns = (
        [{"size": list(each.size), "counts": each.counts} for each in masks] for masks in (a, b)
    )
    # No mask of `b` is a crowd, for which pycocotools would divide by the area of `a` alone.
    return np.asarray(coco.iou(rows, columns, [0] * len(columns)), dtype=np.float64)


def box_px(rle: MaskRle) -> tuple[float, float, float, float]:
    """Return the smallest box around the mask: xyxy in pixels; zeros if the mask is empty."""
    x, y, w, h = map(float, coco.toBbox({"size": list(rle.size), "counts": rle.counts}))
    return x, y, x + w, y + h


def from_annotation(segmentation: object, height_px: int, width_px: int) -> MaskRle:
    """Return the mask of a COCO `segmentation`: polygons, runs as a list, or compressed runs.

    Raises:
        ValueError: it is none of these, or its runs do not cover the photo.
    """
    if isinstance(segmentation, list):
        polygons = [_polygon(each) for each in segmentation]
        if not polygons:
            raise ValueError("it has no polygon")
        return _record(coco.merge(coco.frPyObjects(polygons, height_px, width_px)))
    if not isinstance(segmentation, Mapping):
        raise ValueError("it is neither a list of polygons nor an object with 'counts'")
    if segmentation.get("size") != [height_px, width_px]:
        raise ValueError(f"its size must be [{height_px}, {width_px}], the photo's")
    counts = segmentation.get("counts")
    runs = _decompress(counts) if isinstance(counts, str) else counts
    # By the exact type: to `isinstance`, true and false are whole numbers as well.
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("its counts are neither a text nor whole numbers of at least 0")
    # pycocotools does not check this.
    if sum(runs) != height_px * width_px:
        raise ValueError(f"its runs cover {sum(runs)} of {height_px * width_px} pixels")
    whole = {"size": [height_px, width_px], "counts": runs}
    return _record(coco.frPyObjects(whole, height_px, width_px))


def _polygon(points: object) -> Sequence[float]:
    """Return a polygon's x, y, x, y, ..; pycocotools takes fewer than three points for a box."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        raise ValueError("a polygon needs three points or more, as [x, y, x, y, ..]")
    if not all(type(each) in (int, float) and abs(each) < 1e6 for each in points):
        raise ValueError("a polygon holds something else than numbers of pixels")
    corners = np.array(points, dtype=np.float64).reshape(-1, 2)
    # pycocotools walks along each side, in a number of steps in proportion to its larger extent.
    outline_px = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum()
    if outline_px > MAX_OUTLINE_PX:
        raise ValueError(
            f"the outline of a polygon has {outline_px:.0f} pixels, at most {MAX_OUTLINE_PX} are "
            f"allowed"
        )
    return points


def _runs(mask: BoolMask) -> MaskRle:
    """Return the runs of a mask, however long they are."""
    # COCO's runs go down the columns, so pycocotools accepts only this memory layout.
    return _record(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def _record(found: Mapping[str, Any]) -> MaskRle:
    height, width = found["size"]
    return MaskRle((int(height), int(width)), found["counts"].decode("ascii"))


def _decompress(counts: str) -> list[int]:
    """Return the runs of COCO's compressed string, since pycocotools does not validate it.

    A character encodes six bits, starting at "0": five bits of a number, lowest first, and a flag
    that more follow. The highest bit of the last five is the sign. From the fourth run on, the
    difference from the run two before is stored.
    """
    runs: list[int] = []
    value = shift = 0
    for char in counts:
        bits = ord(char) - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"its counts hold {char!r}, which is no run")
        if shift > _MAX_RUN_BITS:
            raise ValueError("its counts hold a run that no photo is large enough for")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            # Two's complement: a sign bit that is set takes `2 ** shift` off.
            value -= (bits & 16) << (shift - 4) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its counts end within a run")
    return runs

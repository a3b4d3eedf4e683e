"""What tiles find in large photos: recall of annotated instances with and without them, and cost.

    python benchmarks/tiling.py

Real photos are combined into large canvases, so that every annotated instance is small relative to
the whole, as in a photo of a crowd or from the air. Recall is the share of the annotated instances
that some stored box overlaps with IoU .5, by their size in the canvas. The cost is the time to
encode; whole photos and tiles take turns.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
from _indexing import encoder_of, parser_of
from _report import write_report

from reir.datasets.dataset import ReferringDataset
from reir.datasets.photos import read_photos
from reir.images.boxes import pairwise_iou
from reir.images.decode import read_image
from reir.images.tiling import TiledEncoder, Tiling
from reir.models.interfaces import InstanceEncoder
from reir.records import RgbImage
from reir_testing import data_dir

CELL_PX = 448
SIZES_PX = {"small": (0, 32), "medium": (32, 96), "large": (96, 10_000)}
"""Limits of the square root of the box area, as in COCO."""


@dataclass(frozen=True)
class Canvas:
    """Photos side by side: pixels, and the (N, 4) normalized boxes and (N,) sides of instances."""

    pixels: RgbImage
    boxes: npt.NDArray[np.float64]
    sides_px: npt.NDArray[np.float64]


def canvases(dataset: ReferringDataset, cells: int) -> Iterator[Canvas]:
    """Yield squares of cells x cells photos; leftover photos are not used."""
    data = data_dir()
    if data is None:
        raise SystemExit("no real photos: set REIR_DATA to the folder that holds photos/images")
    boxes_of = defaultdict(list)
    for instance in dataset.instances:
        boxes_of[instance.image_id].append(instance.box_xyxy_px)
    side_px = cells * CELL_PX
    for start in range(0, len(dataset.images) - cells**2 + 1, cells**2):
        pixels = np.full((side_px, side_px, 3), 127, dtype=np.uint8)
        boxes = []
        for place, image in enumerate(dataset.images[start : start + cells**2]):
            y, x = (CELL_PX * each for each in divmod(place, cells))
            photo = read_image(data / "photos" / "images" / image.file_name)
            pixels[y : y + photo.shape[0], x : x + photo.shape[1]] = photo
            boxes += [np.add(box, (x, y, x, y)) for box in boxes_of[image.image_id]]
        found = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        sides_px = np.sqrt((found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1]))
        yield Canvas(pixels, found / side_px, sides_px)


def is_found(encoder: InstanceEncoder, canvas: Canvas) -> tuple[npt.NDArray[np.bool_], int, float]:
    """Return which annotated instances a stored box overlaps, the number stored, and seconds."""
    started = time.perf_counter()
    (instances,) = encoder.encode_images([canvas.pixels])
    seconds = time.perf_counter() - started
    if not len(instances):
        return np.zeros(len(canvas.boxes), dtype=bool), 0, seconds
    best = pairwise_iou(canvas.boxes, instances.boxes).max(axis=1)
    return best >= 0.5, len(instances), seconds


def measure(arguments: argparse.Namespace) -> dict[str, float | int]:
    """Return recall and cost of both ways, by number of photos per side."""
    data = data_dir()
    if data is None:
        raise SystemExit("no real photos: set REIR_DATA to the folder that holds photos/images")
    dataset = read_photos(data / "photos").split("val")
    encoder = encoder_of(arguments)
    tiling = Tiling(above_px=arguments.above_px, side_px=arguments.tile_px)
    ways = {"whole": encoder, "tiled": TiledEncoder(encoder, tiling)}
    figures: dict[str, float | int] = {"tiling.side_px": tiling.side_px}
    for cells in arguments.cells:
        side_px = cells * CELL_PX
        found: dict[str, list[npt.NDArray[np.bool_]]] = defaultdict(list)
        stored: dict[str, list[int]] = defaultdict(list)
        seconds: dict[str, list[float]] = defaultdict(list)
        sides: list[npt.NDArray[np.float64]] = []
        for canvas in canvases(dataset, cells):
            sides.append(canvas.sides_px)
            # Both ways take turns on each canvas, so that changes in the machine's speed cancel
            # out.
            for way, model in ways.items():
                which, number, spent_s = is_found(model, canvas)
                found[way].append(which)
                stored[way].append(number)
                seconds[way].append(spent_s)
        name = f"tiling.{side_px}px"
        figures[f"{name}.tiles"] = len(tiling.tiles(side_px, side_px))
        figures[f"{name}.canvases"] = len(sides)
        side_N = np.concatenate(sides)
        for way in ways:
            found_N = np.concatenate(found[way])
            for size, (low, high) in SIZES_PX.items():
                chosen = (low <= side_N) & (side_N < high)
                figures[f"{name}.recall_{size}_{way}"] = round(float(found_N[chosen].mean()), 4)
                figures[f"{name}.num_{size}"] = int(chosen.sum())
            figures[f"{name}.instances_{way}"] = round(float(np.mean(stored[way])), 1)
        figures[f"{name}.cost"] = round(median(seconds["tiled"]) / median(seconds["whole"]), 2)
    return figures


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=[3, 6], help="Photos per side.")
    parser.add_argument("--tile-px", type=int, default=Tiling().side_px)
    parser.add_argument("--above-px", type=int, default=1)
    arguments = parser.parse_args()
    figures = measure(arguments)
    for key, value in figures.items():
        print(f"{key:40} {value}")
    write_report("tiling", figures)


if __name__ == "__main__":
    main()

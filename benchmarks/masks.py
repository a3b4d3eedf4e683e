"""How exact are the masks of the shipped mask head, and what do they cost?

    python benchmarks/masks.py [--sheet masks.png]                     2 minutes on two cores

Every annotated mask of the held-out `val` photos is compared with the mask that the head finds from
its true box, with filling that box, and with the mask from the detector's box that overlaps the
true one most (`found`; 0 if none overlaps it by half). `masks.ms` is the processor time of one hit,
with reading and decoding its photo. `--sheet` draws the masks of 30 photos, to be looked at.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
from _indexing import encoder_of, parser_of
from _report import write_report
from PIL import Image

from reir.checkpoint import load_segmenter
from reir.datasets.dataset import ReferringDataset, ReferringInstance
from reir.datasets.photos import read_photos
from reir.images import rle
from reir.images.boxes import pairwise_iou
from reir.images.decode import canonical_uri, read_image
from reir.images.drawing import draw_boxes
from reir.metrics.bootstrap import bootstrap_intervals
from reir.models.interfaces import InstanceEncoder, Segmenter
from reir.query.localize import PixelLocalizer
from reir.query.stages import RefineRequest
from reir.records import Box, FloatArray, MaskRle, RgbImage
from reir_testing import data_dir

SHEET_PHOTOS, SHEET_COLUMNS, TILE_PX = 30, 6, 300
TIMED_HITS = 100


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sheet", type=Path, help="Picture of some masks to write.")
    arguments: argparse.Namespace = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    segmenter = load_segmenter(arguments.checkpoint)
    if segmenter is None:
        raise SystemExit(
            "the checkpoint has no mask head: train one with `reir train --stage masks`"
        )
    encoder = encoder_of(arguments)
    dataset = read_photos(root / "photos", masks=True).split("val")
    folder = root / "photos" / "images"
    photos = masked_instances(dataset)
    rows: list[tuple[float, float, float, str]] = []
    tiles: list[Image.Image] = []
    for image_id, instances in photos.items():
        photo = dataset.images_by_id[image_id]
        pixels = read_image(folder / photo.file_name)
        rows += [(*row, image_id) for row in overlaps(segmenter, encoder, pixels, instances)]
        if arguments.sheet and len(tiles) < SHEET_PHOTOS:
            tiles.append(tile(segmenter, pixels, instances))
    *columns, owners = zip(*rows, strict=True)
    values = np.array(columns, dtype=np.float64).T
    clusters = np.unique(owners, return_inverse=True)[1]
    figures: dict[str, float | int] = {"masks.photos": len(photos), "masks.instances": len(rows)}
    names = ("miou", "box_miou", "found_miou", "gain_over_box")
    gains = np.column_stack([values, values[:, 0] - values[:, 1]])
    for name, span in zip(names, bootstrap_intervals(gains, clusters=clusters), strict=True):
        figures |= {
            f"masks.{name}": round(span.mean, 4),
            f"masks.{name}_low": round(span.low, 4),
            f"masks.{name}_high": round(span.high, 4),
        }
    figures["masks.ms"] = round(milliseconds(segmenter, encoder, dataset, folder), 1)
    for name, value in figures.items():
        print(f"{name:26} {value}")
    if arguments.sheet:
        sheet(tiles).save(arguments.sheet)
    write_report("masks", figures)


def masked_instances(dataset: ReferringDataset) -> dict[str, list[ReferringInstance]]:
    """Image id -> its instances with a mask, without crowds."""
    photos: dict[str, list[ReferringInstance]] = {}
    for instance in dataset.instances:
        if instance.mask is not None and not instance.is_crowd:
            photos.setdefault(instance.image_id, []).append(instance)
    return photos


def true_boxes(pixels: RgbImage, instances: list[ReferringInstance]) -> FloatArray:
    """(N, 4) annotated boxes, xyxy in [0, 1]."""
    sizes = np.array([pixels.shape[1], pixels.shape[0]] * 2, dtype=np.float32)
    boxes = np.array([each.box_xyxy_px for each in instances], dtype=np.float32)
    return np.asarray(np.clip(boxes / sizes, 0, 1), dtype=np.float32)


def overlaps(
    segmenter: Segmenter,
    encoder: InstanceEncoder,
    pixels: RgbImage,
    instances: list[ReferringInstance],
) -> list[tuple[float, float, float]]:
    """Return the IoU of the mask from the true box, of the filled box and from the found box."""
    boxes = true_boxes(pixels, instances)
    truths = [each.mask for each in instances if each.mask is not None]
    prompted = [each.mask for each in segmenter.segment(pixels, boxes)]
    (found,) = encoder.encode_images([pixels])
    iou = pairwise_iou(boxes, found.boxes)
    nearest = iou.argmax(axis=1)
    from_found = [each.mask for each in segmenter.segment(pixels, found.boxes[nearest])]
    filled = [fill(box, pixels) for box in boxes]
    return [
        (
            mask_iou(prompted[i], truth),
            mask_iou(filled[i], truth),
            mask_iou(from_found[i], truth) if iou[i, nearest[i]] >= 0.5 else 0.0,
        )
        for i, truth in enumerate(truths)
    ]


def mask_iou(a: MaskRle, b: MaskRle) -> float:
    return float(rle.pairwise_iou([a], [rle.fitted(b, a.size)])[0, 0])


def fill(box: FloatArray, pixels: RgbImage) -> MaskRle:
    """Return the mask of all pixels in a box."""
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = np.rint(box * np.array([width, height] * 2)).astype(int).tolist()
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[y1:y2, x1:x2] = True
    return rle.encode(mask)


def milliseconds(
    segmenter: Segmenter, encoder: InstanceEncoder, dataset: ReferringDataset, folder: Path
) -> float:
    """Return the median processor time of a hit, each in a photo of its own."""
    localizer = PixelLocalizer(encoder, segmenter=segmenter)
    middle: Box = (0.3, 0.3, 0.7, 0.7)
    requests = [
        RefineRequest(
            image_id=each.image_id, uri=canonical_uri(folder / each.file_name), box=middle
        )
        for each in dataset.images[: TIMED_HITS + 5]
    ]
    localizer.refine(requests[:5])  # builds the engines
    times = []
    for request in requests[5:]:
        started = time.process_time()
        localizer.refine([request])
        times.append(time.process_time() - started)
    return 1e3 * median(times)


def tile(segmenter: Segmenter, pixels: RgbImage, instances: list[ReferringInstance]) -> Image.Image:
    """Draw the masks that the segmenter finds from the true boxes of a photo."""
    boxes = true_boxes(pixels, instances)
    found = segmenter.segment(pixels, boxes)
    drawn = draw_boxes(
        Image.fromarray(pixels),
        [each.box for each in found],
        [""] * len(found),
        [each.mask for each in found],
    )
    drawn.thumbnail((TILE_PX, TILE_PX))
    return drawn


def sheet(tiles: list[Image.Image]) -> Image.Image:
    """Put pictures in rows."""
    rows = -(-len(tiles) // SHEET_COLUMNS)
    whole = Image.new("RGB", (SHEET_COLUMNS * TILE_PX, rows * TILE_PX), "white")
    for number, each in enumerate(tiles):
        row, column = divmod(number, SHEET_COLUMNS)
        whole.paste(each, (column * TILE_PX, row * TILE_PX))
    return whole


if __name__ == "__main__":
    main()

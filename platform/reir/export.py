"""Writes the hits of a search in formats that other programs read: COCO, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from reir.errors import ConfigError, nearest_name
from reir.images import rle
from reir.images.decode import decode
from reir.results import Hit, SearchResult, file_name

CSV_COLUMNS = (
    *("rank", "expression", "image_id", "uri", "instance_id", "x1", "y1", "x2", "y2"),
    *("score", "objectness", "presence"),
)


def export(result: SearchResult, form: str) -> str:
    """Return the hits of a search as text.

    Args:
        result: the answer of a search.
        form: "coco": one JSON object with images, annotations and the expression as category;
            boxes are x, y, width and height in pixels of the photo, masks are compressed runs, and
            each annotation has a score, so that it is also what COCO calls a result. "csv": one
            row for each hit, without masks. "jsonl": one JSON object for each hit on a line of its
            own, as in `SearchResult.to_dict`.

    Raises:
        ConfigError: there is no such format.
        ImageError: a photo cannot be read, whose size "coco" needs.
    """
    if form not in WRITERS:
        nearest = nearest_name(form, tuple(WRITERS))
        raise ConfigError(f"unknown format {form!r}; allowed: {', '.join(WRITERS)}{nearest}")
    return WRITERS[form](result)


def _coco(result: SearchResult) -> str:
    numbers: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    for hit in result:
        if hit.image_id not in numbers:
            numbers[hit.image_id] = len(numbers) + 1
            images.append(_coco_image(hit, numbers[hit.image_id]))
    annotations = [
        _coco_annotation(hit, number, images[numbers[hit.image_id] - 1])
        for number, hit in enumerate(result, 1)
    ]
    categories = [{"id": 1, "name": result.expression}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps(whole, indent=2) + "\n"


def _coco_image(hit: Hit, number: int) -> dict[str, Any]:
    # Decoded as small as possible, since only the size of the photo is needed.
    photo = decode(hit.read(), at_least_px=1)
    return {
        "id": number,
        "file_name": file_name(hit.uri),
        "uri": hit.uri,
        "width": photo.width_px,
        "height": photo.height_px,
    }


def _coco_annotation(hit: Hit, number: int, image: Mapping[str, Any]) -> dict[str, Any]:
    width, height = image["width"], image["height"]
    x1, y1, x2, y2 = hit.box
    box_px = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
    annotation = {
        "id": number,
        "image_id": image["id"],
        "category_id": 1,
        "bbox": [round(value, 2) for value in box_px],
        "area": round(box_px[2] * box_px[3], 2),
        "iscrowd": 0,
        "score": hit.score,
    }
    if hit.mask is None:
        return annotation
    # A very detailed mask is stored smaller than its photo.
    mask = rle.fitted(hit.mask, (height, width))
    runs = {"size": list(mask.size), "counts": mask.counts}
    return annotation | {"segmentation": runs, "area": rle.area_px(mask)}


def _csv(result: SearchResult) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for rank, hit in enumerate(result, 1):
        values = (hit.image_id, hit.uri, hit.instance_id, *hit.box)
        known = (hit.score, hit.objectness, "" if hit.presence is None else hit.presence)
        writer.writerow([rank, result.expression, *values, *known])
    return text.getvalue()


def _jsonl(result: SearchResult) -> str:
    hits = result.to_dict()["hits"]
    return "".join(
        json.dumps({"rank": rank, "expression": result.expression, **hit}) + "\n"
        for rank, hit in enumerate(hits, 1)
    )


# At the end of the module, because it refers to the functions above.
WRITERS: Mapping[str, Callable[[SearchResult], str]] = {
    "coco": _coco,
    "csv": _csv,
    "jsonl": _jsonl,
}

"""Does `reir eval sorec` read the published annotations, and compute the published metric?

    python benchmarks/sorec.py

    sorec.annotations       entries of the published files trainS, val and testA
    sorec.photos_missing    their photos that the shared data lacks, which is nearly all of them
    sorec.expressions       entries of testA that were evaluated on generated photos of their names
    sorec.metric_diff       largest difference of mAcc, Acc50, Acc75 and the table of the first 1, 5
                            and 10 boxes from those of plain loops over the JSON file, in percent

The localizer of the comparison returns the true box moved at random, so that every IoU occurs.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _report import write_report
from PIL import Image

from reir.datasets.sorec import read_sorec
from reir.evaluate.sorec import evaluate_sorec_localizer
from reir.models.interfaces import FoundBoxes
from reir.records import RgbImage
from reir_testing import data_dir

SPLITS = ("trainS", "val", "testA")
SIZE_PX = (6000, 3000)
"""Width and height of the generated photos, in which every annotated box fits."""
EVALUATED = 800
NUM_BOXES = 10
BoxesPx = list[tuple[float, float, float, float]]


class MovedBoxes:
    """An `ExpressionLocalizer` that returns given boxes.

    Args:
        boxes_px: of each expression, best first.
    """

    digest = "moved boxes"

    def __init__(self, boxes_px: Mapping[str, BoxesPx]) -> None:
        self._boxes_px = boxes_px

    def localize(self, images: Sequence[RgbImage], expressions: Sequence[str]) -> list[FoundBoxes]:
        """Return the boxes of each expression, with descending scores."""
        del images
        scores = np.linspace(1, 0.5, NUM_BOXES, dtype=np.float32)
        size_px = np.array(SIZE_PX * 2, dtype=np.float32)
        boxes_px = (np.array(self._boxes_px[text], dtype=np.float32) for text in expressions)
        return [FoundBoxes(boxes / size_px, scores) for boxes in boxes_px]


def moved(box: Sequence[int], rng: random.Random) -> BoxesPx:
    """Return an xywh box as xyxy, moved and scaled at random, `NUM_BOXES` times."""
    x, y, w, h = box
    found: BoxesPx = []
    for _ in range(NUM_BOXES):
        far = rng.choice((0.0, 0.02, 0.1, 0.3))
        left, top = x + rng.gauss(0, far * w), y + rng.gauss(0, far * h)
        found.append((left, top, left + w * rng.uniform(1 - far, 1), top + h))
    return found


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the IoU of two xyxy boxes."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    common = max(wide, 0.0) * max(high, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)


def plain_figures(
    entries: Sequence[Mapping[str, Any]], found: Mapping[str, BoxesPx]
) -> dict[str, float]:
    """Return the figures by plain loops, in percent."""
    hits: dict[str, list[float]] = {}
    for entry in entries:
        x, y, w, h = entry["bbox"]
        boxes = [[np.float32(side) for side in box] for box in found[str(entry["ref"])]]
        ious = [overlap([float(side) for side in box], (x, y, x + w, y + h)) for box in boxes]
        at = {iou: [max(ious[:k]) >= iou / 100 for k in (1, 5, 10)] for iou in range(5, 100, 5)}
        hits.setdefault("macc", []).append(sum(at[iou][0] for iou in range(50, 100, 5)) / 10)
        for name, iou in (("acc50", 50), ("acc75", 75)):
            hits.setdefault(name, []).append(at[iou][0])
        for iou, reached in at.items():
            for k, hit in zip((1, 5, 10), reached, strict=True):
                hits.setdefault(f"top{k}_{iou:02d}", []).append(hit)
        hits.setdefault("mean_precision", []).append(sum(at[50]) / 3)
    return {name: 100 * sum(values) / len(values) for name, values in hits.items()}


def metric_difference(annotations: Path) -> dict[str, float | int]:
    """Evaluate generated photos, and compare every figure with that of plain loops."""
    entries = json.loads(annotations.read_text())[:EVALUATED]
    # The localizer knows a sentence by its words, so each sentence is used once.
    entries = [*{entry["ref"]: entry for entry in entries}.values()]
    rng = random.Random(0)
    found = {entry["ref"]: moved(entry["bbox"], rng) for entry in entries}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "testA.json").write_text(json.dumps(entries))
        Image.new("RGB", SIZE_PX, "gray").save(folder / "one.jpg")
        for photo in {entry["image"] for entry in entries}:
            os.link(folder / "one.jpg", folder / photo)
        dataset = read_sorec(folder / "testA.json", folder)
        report = evaluate_sorec_localizer(MovedBoxes(found), dataset, folder)
    ours = {name: value.mean for name, value in {**report.accuracy, **report.top_k}.items()}
    theirs = plain_figures(entries, found)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    largest = max(abs(ours[name] - theirs[name]) for name in ours)
    for key in ("macc", "acc50", "acc75"):
        print(f"{key}: {ours[key]:.4f}, by plain loops {theirs[key]:.4f}")
    return {"sorec.expressions": len(entries), "sorec.metric_diff": round(largest, 6)}


def main() -> None:
    root = data_dir()
    if root is None:
        raise SystemExit("no annotations: set REIR_DATA to the folder that has refs_only/sorec")
    folder = root / "refs_only" / "sorec"
    entries = [
        entry for split in SPLITS for entry in json.loads((folder / f"{split}.json").read_text())
    ]
    photos = {entry["image"] for entry in entries}
    figures: dict[str, float | int] = {
        "sorec.annotations": len(entries),
        "sorec.photos_missing": sum(not (folder / photo).exists() for photo in photos),
    }
    figures |= metric_difference(folder / "testA.json")
    for key, value in figures.items():
        print(f"{key:24} {value}")
    write_report("sorec", figures)


if __name__ == "__main__":
    main()

"""Does a second look at a crop of the photo give a more accurate box than the first look?

    python benchmarks/localization.py

For each long expression of the held-out `val` photos, this compares the box of the best instance in
the expression's own photo with the box that `PixelLocalizer.refine` returns for it, by the
checkpoint's mask head. Gains are in percentage points, with 95% bootstrap intervals over photos;
`p70_ratio` is P@.7 after the second look by P@.7 before it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from _indexing import encoder_of, parser_of
from _report import write_report

from reir.checkpoint import load_segmenter
from reir.datasets.photos import read_photos
from reir.images.boxes import elementwise_iou
from reir.images.decode import canonical_uri, read_image
from reir.metrics.bootstrap import bootstrap_intervals
from reir.query.localize import PixelLocalizer
from reir.query.stages import RefineRequest
from reir_testing import data_dir
from reir_testing.boxes import target_box


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--expressions", type=int, default=300)
    arguments: argparse.Namespace = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    folder = root / "photos"
    dataset = read_photos(folder).split("val").of_kind("long").with_targets()
    num = min(arguments.expressions, len(dataset.expressions))
    # Spread over the whole split, because neighbors are about the same photo.
    rows = np.linspace(0, len(dataset.expressions) - 1, num).round().astype(int)
    asked = [dataset.expressions[row] for row in rows]
    encoder = encoder_of(arguments)
    segmenter = load_segmenter(arguments.checkpoint)
    if segmenter is None:
        raise SystemExit(
            "the checkpoint has no mask head: train one with `reir train --stage masks`"
        )
    localizer = PixelLocalizer(encoder, segmenter=segmenter)
    requests, targets = [], []
    for expression in asked:
        photo = dataset.images_by_id[expression.image_id]
        path = folder / "images" / photo.file_name
        vector = encoder.encode_expressions([expression.text])[0]
        (instances,) = encoder.encode_images([read_image(path)])
        scores = instances.vectors @ vector
        best = int(scores.argmax())
        x1, y1, x2, y2 = instances.boxes[best].tolist()
        requests.append(
            RefineRequest(image_id=photo.image_id, uri=canonical_uri(path), box=(x1, y1, x2, y2))
        )
        targets.append(target_box(dataset, expression))
    started_s = time.perf_counter()
    refined = [found for each in requests for found in localizer.refine([each]) if found]
    each_ms = 1e3 * (time.perf_counter() - started_s) / len(requests)
    before = elementwise_iou(np.array([each.box for each in requests]), np.array(targets))
    after = elementwise_iou(np.array([each.box for each in refined]), np.array(targets))
    moved = np.array([a.box != b.box for a, b in zip(requests, refined, strict=True)])
    figures = {
        "localise.expressions": len(requests),
        "localise.moved": round(float(moved.mean()), 4),
        "localise.ms": round(each_ms, 1),
    }
    for name, iou in (("before", before), ("after", after)):
        figures[f"localise.iou_{name}"] = round(100 * float(iou.mean()), 2)
        for threshold in (0.5, 0.7, 0.9):
            share = round(100 * float((iou >= threshold).mean()), 2)
            figures[f"localise.p{round(100 * threshold)}_{name}"] = share
    ratio = figures["localise.p70_after"] / figures["localise.p70_before"]
    figures["localise.p70_ratio"] = round(ratio, 3)
    of_photo = np.unique([each.image_id for each in requests], return_inverse=True)[1]
    for threshold in (0.5, 0.7, 0.9):
        # Differences of pairs: the same expression before and after.
        gains = (after >= threshold).astype(float) - (before >= threshold)
        (span,) = bootstrap_intervals(gains[:, None], clusters=of_photo)
        for end, value in (("", span.mean), ("_low", span.low), ("_high", span.high)):
            figures[f"localise.p{round(100 * threshold)}_gain{end}"] = round(100 * value, 2)
    for key, value in figures.items():
        print(f"{key:24} {value}")
    write_report("localization", figures)


if __name__ == "__main__":
    main()

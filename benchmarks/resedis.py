"""Is it there, where exactly, which pixels: the shipped checkpoint on a set in ReSeDis' format.

    python benchmarks/resedis.py --work FOLDER

ReSeDis itself is for the user to download. The set is made of the held-out `val` photos: every long
expression, since these were written to be told apart in the whole gallery, and the short ones that
several photos share, each of which is one query with several true photos. It is written to a
temporary folder as ReSeDis is published, one JSON file for each expression, and read from there.

ReSeDis has a mask for every target. Here, only a part of the boxes has polygons; the others are
written as rectangles, and count for boxes only.

The calibration was fitted on these same photos, so the decisions are a little too good.
`resedis.hostile_ok` counts the malformed files whose error names the file and the key. FOLDER keeps
encoded photos, which a second run reads instead of encoding them again.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from _indexing import parser_of
from _report import write_report

from reir.checkpoint import SHIPPED, load_encoder
from reir.datasets import (
    Expression,
    ReferringDataset,
    ReferringInstance,
    read_photos,
    read_resedis,
)
from reir.datasets.json_entries import read_object
from reir.evaluate import Encoding, evaluate_resedis
from reir.query.presence import load_calibration
from reir.text import normalize_expression
from reir_testing import data_dir
from reir_testing.evaluation.hostile_resedis import hostile_files, problem

POLYGON, BOX = "polygon", "box"


def described(dataset: ReferringDataset) -> list[Expression]:
    """Return the long expressions, and the short ones that several photos share."""
    every = dataset.with_targets().expressions
    pairs = {(normalize_expression(text.text), text.image_id) for text in every}
    num_photos = Counter(text for text, _ in pairs)
    return [
        text
        for text in every
        if text.kind == "long" or num_photos[normalize_expression(text.text)] > 1
    ]


def write_set(folder: Path, photos: Path) -> None:
    """Write one JSON file for each expression; targets are named by what their outline is."""
    dataset = read_photos(photos).split("val")
    polygons = {
        entry.identifier("id"): entry.value.get("segmentation")
        for entry in read_object(photos / "instances.json").entries("annotations")
    }
    for text in described(dataset):
        instance = dataset.instances_by_id[str(text.instance_id)]
        outline = polygons[instance.instance_id]
        x1, y1, x2, y2 = instance.box_xyxy_px
        rectangle = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        document = {
            "image_id": int(text.image_id),
            "target_annotation": {POLYGON: outline} if outline else {BOX: rectangle},
            "expression": text.text,
            "category": instance.category,
        }
        path = folder / f"{text.expression_id}.json"
        path.write_text(json.dumps(document), encoding="utf-8")


def without_rectangles(instance: ReferringInstance) -> ReferringInstance:
    """Return the instance without its mask if that is only the rectangle of its box."""
    return replace(instance, mask=None) if instance.instance_id.endswith(BOX) else instance


def hostile_ok() -> int:
    """Return for how many malformed files the error names the file and the key."""
    count = 0
    for hostile in hostile_files():
        with TemporaryDirectory() as folder:
            wrong = problem(hostile, Path(folder))
        count += not wrong
        if wrong:
            print(f"{hostile.name}: {wrong}")
    return count


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="Folder that keeps encoded photos.")
    arguments = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    photos = root / "photos"
    encoder = load_encoder(arguments.checkpoint, masks=True)
    calibration = load_calibration(arguments.checkpoint or SHIPPED, encoder.digest)
    with TemporaryDirectory() as folder:
        write_set(Path(folder), photos)
        read = read_resedis(folder, photos / "images", masks=True)
    dataset = replace(read, instances=tuple(map(without_rectangles, read.instances)))
    report = evaluate_resedis(
        encoder,
        dataset,
        photos / "images",
        calibration=calibration,
        how=Encoding(work=arguments.work),
    ).to_dict()
    figures: dict[str, float] = {
        f"resedis.{name}": report["counts"][name] for name in ("photos", "expressions", "targets")
    }
    figures |= {f"resedis.{name}": value for name, value in report["retrieval"].items()}
    for kind in ("box", "mask"):
        for name, value in report.get(kind, {}).items():
            figures[f"resedis.{kind}_{name}"] = value
        for name, value in (report["matching"] or {}).get(kind, {}).items():
            figures[f"resedis.{kind}_matching_{name}"] = value
    for name, value in (report["decision"] or {}).items():
        figures[f"resedis.decision_{name}"] = value
    figures["resedis.hostile_ok"] = hostile_ok()
    for name, value in figures.items():
        print(f"{name:50} {value}")
    write_report("resedis", figures)


if __name__ == "__main__":
    main()

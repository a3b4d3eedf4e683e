"""Does zooming into the first photos of an answer find small instances, and in which order?

    python benchmarks/zoom_query.py [--split test] [--tile] [--rule]

Held-out photos are combined into mosaics of 3,000 to 4,000 px (`reir_training.zoom.mosaics`), which
are the photos of a gallery. Each long expression searches the gallery, and the zoomer searches the
first `ZOOMED_PHOTOS` photos of its answer. BR@1 is the share of expressions whose first hit is the
described instance (IoU .5); P@.5 is the share of the searched photos that have the described
instance in which the box is right. Both are in percent, before and after zooming.

`br1_kept` leaves the hits in the order of the index and changes only their boxes; `br1_by_score`
orders them by the score that zooming found, which is what a search does; `br1_by_end` by the
probability of the last step, and `br1_by_mean` by the mean of both scores. Gains have 95 %
bootstrap intervals over mosaics. The time is that of a photo whose parts no search has seen yet.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _indexing import TEST_PHOTOS, encoder_of, parser_of
from _report import write_report

from reir.checkpoint import SHIPPED, load_zoom_policy
from reir.datasets.dataset import Expression, ReferringDataset
from reir.datasets.photos import read_photos
from reir.images.boxes import elementwise_iou
from reir.images.tiling import TiledEncoder, Tiling
from reir.metrics.bootstrap import bootstrap_intervals
from reir.models.interfaces import InstanceEncoder
from reir.models.query_zoom.zoomer import InstanceZoomer, zoomer_of
from reir.models.zoom_steps import ZoomSearch
from reir.query.stages import ZOOMED_PHOTOS
from reir.records import FloatArray, Instances
from reir_testing import data_dir
from reir_testing.boxes import target_box
from reir_training.data.examples import set_test_photos_aside
from reir_training.zoom.mosaics import MosaicSet

MIN_IOU = 0.5
TIMED_PHOTOS = 8


@dataclass(frozen=True)
class Found:
    """The hit of one photo for one expression, before and after zooming.

    Attributes:
        photo: number of the mosaic.
        score: of the index.
        right: whether the photo has the described instance and the box of the index is right.
        zoom: the search of the photo.
        zoom_right: the same for the box that zooming found.
    """

    photo: int
    score: float
    right: bool
    zoom: ZoomSearch
    zoom_right: bool


def mosaics_of(split: str) -> MosaicSet:
    """Return the mosaics of the photos of a split."""
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    dataset = read_photos(root / "photos")
    if split == "test":
        dataset = set_test_photos_aside(dataset, TEST_PHOTOS)
    return MosaicSet(dataset.split(split), root / "photos" / "images")


def asked(dataset: ReferringDataset, number: int) -> list[Expression]:
    """Return so many expressions, spread over the whole set."""
    rows = np.linspace(0, len(dataset.expressions) - 1, min(number, len(dataset.expressions)))
    return [dataset.expressions[row] for row in np.unique(rows.round().astype(int))]


def best_hits(gallery: list[Instances], vector: FloatArray) -> list[tuple[int, int, float]]:
    """Return photo, instance and score of the best hit of each of the first photos."""
    scores = [found.vectors @ vector for found in gallery]
    hits = [
        (n, int(each.argmax()), float(each.max())) for n, each in enumerate(scores) if len(each)
    ]
    return sorted(hits, key=lambda hit: -hit[2])[:ZOOMED_PHOTOS]


def answers(
    mosaics: MosaicSet,
    expressions: list[Expression],
    encoder: InstanceEncoder,
    *,
    tile: bool,
    zoomer: InstanceZoomer,
) -> list[list[Found]]:
    """Return the first hits of each expression, before and after zooming."""
    dataset = mosaics.dataset
    indexer = TiledEncoder(encoder, Tiling()) if tile else encoder
    gallery = [indexer.encode_images([mosaics.draw(n)])[0] for n in range(len(mosaics))]
    vectors = encoder.encode_expressions([each.text for each in expressions])
    hits = [best_hits(gallery, vector) for vector in vectors]
    found: list[list[Found]] = [[] for _ in expressions]
    # Photo by photo, so that all searches of a photo share their looks.
    for number, mosaic in enumerate(mosaics.mosaics):
        rows = [row for row, of_row in enumerate(hits) if number in {hit[0] for hit in of_row}]
        image = mosaics.draw(number)
        searches = zoomer.zoom([image] * len(rows), [expressions[row].text for row in rows])
        print(f"searched mosaic {number + 1} of {len(mosaics)}: {len(rows)} searches", flush=True)
        for row, search in zip(rows, searches, strict=True):
            (hit,) = (each for each in hits[row] if each[0] == number)
            target = np.array(target_box(dataset, expressions[row]))
            own = expressions[row].image_id == mosaic.image.image_id
            first, second = gallery[number].boxes[hit[1]], np.array(search.box)
            found[row].append(
                Found(
                    number,
                    hit[2],
                    own and bool(elementwise_iou(first, target) >= MIN_IOU),
                    search,
                    own and bool(elementwise_iou(second, target) >= MIN_IOU),
                )
            )
    return [sorted(of_row, key=lambda each: -each.score) for of_row in found]


ORDERS: dict[str, Callable[[Found], float]] = {
    "kept": lambda each: each.score,
    "by_score": lambda each: each.zoom.score,
    "by_end": lambda each: each.zoom.steps[-1].end,
    "by_mean": lambda each: each.score + each.zoom.score,
}


def figures_of(
    found: list[list[Found]], expressions: list[Expression], mosaics: MosaicSet
) -> dict[str, float | int]:
    """Return the figures."""
    names = {each.image.image_id: n for n, each in enumerate(mosaics.mosaics)}
    owners = np.array([names[each.image_id] for each in expressions])
    before = np.array([of_row[0].right for of_row in found], dtype=float)
    own = [
        each
        for of_row, owner in zip(found, owners.tolist(), strict=True)
        for each in of_row
        if each.photo == owner
    ]
    figures: dict[str, float | int] = {
        "zoom_query.expressions": len(found),
        "zoom_query.mosaics": len(mosaics),
        "zoom_query.looks": round(
            float(np.mean([len(each.zoom.steps) for row in found for each in row])), 2
        ),
        "zoom_query.own_photo_searched": round(100 * len(own) / len(found), 2),
        "zoom_query.br1_before": round(100 * float(before.mean()), 2),
        "zoom_query.p50_before": round(100 * float(np.mean([each.right for each in own])), 2),
        "zoom_query.p50_after": round(100 * float(np.mean([each.zoom_right for each in own])), 2),
    }
    for name, key in ORDERS.items():
        after = np.array([max(of_row, key=key).zoom_right for of_row in found], dtype=float)
        figures[f"zoom_query.br1_{name}"] = round(100 * float(after.mean()), 2)
        (span,) = bootstrap_intervals((after - before)[:, None], clusters=owners)
        for end, value in (("", span.mean), ("_low", span.low), ("_high", span.high)):
            figures[f"zoom_query.br1_{name}_gain{end}"] = round(100 * value, 2)
    return figures


def seconds_per_photo(
    mosaics: MosaicSet, expressions: list[Expression], zoomer: InstanceZoomer
) -> float:
    """Return the median time to search a photo whose parts were not encoded before."""
    spent_s = []
    for number in range(min(TIMED_PHOTOS, len(mosaics))):
        image = mosaics.draw(number)
        started_s = time.perf_counter()
        zoomer.zoom([image], [expressions[number % len(expressions)].text])
        spent_s.append(time.perf_counter() - started_s)
    return float(np.median(spent_s))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--expressions", type=int, default=200)
    parser.add_argument("--tile", action="store_true", help="Index the mosaics in tiles.")
    parser.add_argument("--rule", action="store_true", help="Use the rule, not the policy.")
    arguments: argparse.Namespace = parser.parse_args()
    encoder = encoder_of(arguments)
    folder: Path = arguments.checkpoint or SHIPPED
    policy = None if arguments.rule else load_zoom_policy(folder, encoder.digest)
    zoomer = zoomer_of(encoder, policy)
    mosaics = mosaics_of(arguments.split)
    expressions = asked(mosaics.dataset, arguments.expressions)
    found = answers(mosaics, expressions, encoder, tile=arguments.tile, zoomer=zoomer)
    figures = figures_of(found, expressions, mosaics)
    figures["zoom_query.seconds_per_photo"] = round(
        seconds_per_photo(mosaics, expressions, zoomer), 2
    )
    for key, value in figures.items():
        print(f"{key:34} {value}")
    kind = "rule" if policy is None else "policy"
    tiled = "_tiled" if arguments.tile else ""
    write_report(f"zoom_query_{arguments.split}_{kind}{tiled}", figures)


if __name__ == "__main__":
    main()

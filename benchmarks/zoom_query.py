"""Does zooming into the first photos of an answer find small instances, and in which order?

    python benchmarks/zoom_query.py [--split test] [--tile]

Held-out photos are combined into mosaics of 3,000 to 4,000 px (`reir_training.zoom.mosaics`), which
are the photos of a gallery. Each long expression searches the gallery, and the first
`ZOOMED_PHOTOS` photos of its answer are searched again, by the rule and by the policy of the
checkpoint. BR@1 is the share of expressions whose first hit is the
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from _indexing import TEST_PHOTOS, encoder_of, parser_of
from _report import write_report

from reir.checkpoint import SHIPPED, load_zoom_policy
from reir.datasets.dataset import Expression, ReferringDataset
from reir.datasets.photos import read_photos
from reir.images.boxes import elementwise_iou
from reir.images.tiling import TiledEncoder, Tiling
from reir.metrics.bootstrap import bootstrap_intervals
from reir.models.interfaces import InstanceEncoder
from reir.models.query_zoom.looks import PhotoLooks
from reir.models.query_zoom.rule import ZoomRule
from reir.models.query_zoom.zoomer import InstanceZoomer, ZoomStrategy
from reir.models.zoom_steps import ZoomSearch
from reir.query.stages import ZOOMED_PHOTOS
from reir.records import Box, FloatArray, Instances
from reir_testing import data_dir
from reir_testing.boxes import target_box
from reir_training.data.examples import set_test_photos_aside
from reir_training.query_zoom.looks import looks_path, read_looks, save_looks
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


def answers(  # noqa: PLR0913 - most are keyword-only
    mosaics: MosaicSet,
    expressions: list[Expression],
    encoder: InstanceEncoder,
    strategies: Mapping[str, ZoomStrategy],
    *,
    tile: bool,
    work: Path,
) -> dict[str, list[list[Found]]]:
    """Return the first hits of each expression, before and after zooming with each strategy."""
    indexer = TiledEncoder(encoder, Tiling()) if tile else encoder
    gallery = [indexer.encode_images([mosaics.draw(n)])[0] for n in range(len(mosaics))]
    vectors = encoder.encode_expressions([each.text for each in expressions])
    hits = [best_hits(gallery, vector) for vector in vectors]
    found: dict[str, list[list[Found]]] = {name: [[] for _ in hits] for name in strategies}
    # Photo by photo, so that all searches of a photo share their looks.
    for number in range(len(mosaics)):
        path = looks_path(work, number)
        known = read_looks(path) if path.exists() else []
        photo = PhotoLooks.of(encoder, mosaics.draw(number), known)
        for row, of_row in enumerate(hits):
            for hit in (each for each in of_row if each[0] == number):
                target = target_in(mosaics, number, expressions[row])
                first = gallery[number].boxes[hit[1]]
                for name, strategy in strategies.items():
                    search = strategy.search(photo, vectors[row])
                    rights = (is_right(box, target) for box in (first, search.box))
                    found[name][row].append(
                        Found(number, hit[2], next(rights), search, next(rights))
                    )
        save_looks(path, photo.known)
        print(f"searched mosaic {number + 1} of {len(mosaics)}", flush=True)
    for of_strategy in found.values():
        for answer in of_strategy:
            answer.sort(key=lambda each: -each.score)
    return found


def target_in(mosaics: MosaicSet, number: int, expression: Expression) -> Box | None:
    """Return the box of the described instance, if it is in this mosaic."""
    own = mosaics.mosaics[number].image.image_id == expression.image_id
    return target_box(mosaics.dataset, expression) if own else None


def is_right(box: npt.ArrayLike, target: Box | None) -> bool:
    """Whether a box is that of the described instance."""
    return target is not None and bool(elementwise_iou(np.array(box), target) >= MIN_IOU)


ORDERS: dict[str, Callable[[Found], float]] = {
    "kept": lambda each: each.score,
    "by_score": lambda each: each.zoom.score,
    "by_end": lambda each: each.zoom.steps[-1].end,
    "by_mean": lambda each: each.score + each.zoom.score,
}


def figures_of(
    name: str, found: list[list[Found]], owners: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Return the figures of a strategy; `owners` are the mosaics of the expressions."""
    before = np.array([of_row[0].right for of_row in found], dtype=float)
    pairs = zip(found, owners.tolist(), strict=True)
    own = [each for of_row, owner in pairs for each in of_row if each.photo == owner]
    looks = [len(each.zoom.steps) for of_row in found for each in of_row]
    figures = {
        "looks": round(float(np.mean(looks)), 2),
        "p50_before": percent([each.right for each in own]),
        "p50": percent([each.zoom_right for each in own]),
    }
    for order, key in ORDERS.items():
        after = np.array([max(of_row, key=key).zoom_right for of_row in found], dtype=float)
        figures[f"br1_{order}"] = percent(after)
        (span,) = bootstrap_intervals((after - before)[:, None], clusters=owners)
        for end, value in (("", span.mean), ("_low", span.low), ("_high", span.high)):
            figures[f"br1_{order}_gain{end}"] = round(100 * value, 2)
    return {f"zoom_query.{name}.{key}": value for key, value in figures.items()}


def percent(hits: npt.ArrayLike) -> float:
    """Return the share of hits in percent."""
    return round(100 * float(np.asarray(hits, dtype=float).mean()), 2)


def seconds_per_photo(
    mosaics: MosaicSet,
    expressions: list[Expression],
    encoder: InstanceEncoder,
    strategy: ZoomStrategy,
) -> float:
    """Return the median time to search a photo whose parts were not encoded before."""
    spent_s = []
    for number in range(min(TIMED_PHOTOS, len(mosaics))):
        image = mosaics.draw(number)
        started_s = time.perf_counter()
        InstanceZoomer(encoder, strategy).zoom([image], [expressions[number].text])
        spent_s.append(time.perf_counter() - started_s)
    return round(float(np.median(spent_s)), 2)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--expressions", type=int, default=200)
    parser.add_argument(
        "--work",
        type=Path,
        help="Folder for looks, which later runs with the same split and checkpoint reuse.",
    )
    parser.add_argument("--tile", action="store_true", help="Index the mosaics in tiles.")
    arguments: argparse.Namespace = parser.parse_args()
    encoder = encoder_of(arguments)
    strategies: dict[str, ZoomStrategy] = {"rule": ZoomRule()}
    policy = load_zoom_policy(arguments.checkpoint or SHIPPED, encoder.digest)
    if policy is not None:
        strategies["policy"] = policy
    mosaics = mosaics_of(arguments.split)
    expressions = asked(mosaics.dataset, arguments.expressions)
    with TemporaryDirectory() as temporary:
        work: Path = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = answers(mosaics, expressions, encoder, strategies, tile=arguments.tile, work=work)
    names = {each.image.image_id: n for n, each in enumerate(mosaics.mosaics)}
    owners = np.array([names[each.image_id] for each in expressions])
    first = found["rule"]
    figures: dict[str, float | int] = {
        "zoom_query.expressions": len(expressions),
        "zoom_query.mosaics": len(mosaics),
        "zoom_query.own_photo_searched": percent(
            [
                owner in {each.photo for each in row}
                for owner, row in zip(owners, first, strict=True)
            ]
        ),
        "zoom_query.br1_before": percent([of_row[0].right for of_row in first]),
    }
    for name, strategy in strategies.items():
        figures |= figures_of(name, found[name], owners)
        figures[f"zoom_query.{name}.seconds_per_photo"] = seconds_per_photo(
            mosaics, expressions, encoder, strategy
        )
    for key, value in figures.items():
        print(f"{key:38} {value}")
    write_report(f"zoom_query_{arguments.split}{'_tiled' if arguments.tile else ''}", figures)


if __name__ == "__main__":
    main()

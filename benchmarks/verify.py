"""Does comparing colors with pixels put the right hit first more often, and what does it cost?

    python benchmarks/verify.py

The galleries are the photos of `val`, and the photos that the shipped checkpoint set aside as
`test`. Each written expression is searched twice: as usual, and with `verify`. A hit is right if it
is in the right photo with IoU .5. `rec` is about the right photo alone: the share of the
expressions for which `reir localize` finds the right box in it. Gains are in percentage points,
with 95 % bootstrap intervals over photos. The weight of a surprisal was chosen on `val`; on `test`,
nothing was chosen.

    verify.SPLIT.KIND.br1_before, br1_after   BR@1 without and with verification; also br5
    verify.SPLIT.KIND.rec_before, rec_after   precision in the photo without and with verification
    verify.SPLIT.KIND.br1_gain, rec_gain      the difference; also gain_low and gain_high
    verify.SPLIT.KIND.all_precision_before, all_recall_before, all_f1_before, and ..._after
                                              `Gallery.every_photo` without and with verification,
                                              for all pairs of a photo and an expression that names
                                              a color; only its own photo is right
    verify.named                              share of the expressions that name a color
    verify.ms_before, ms_after                median time of one search for an expression that names
                                              a color, photos not yet cached
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _indexing import TEST_PHOTOS
from _rec import right_boxes
from _report import write_report

from reir.checkpoint import SHIPPED, load_encoder
from reir.datasets.dataset import Expression, ReferringDataset
from reir.datasets.generated_expressions import names_color
from reir.datasets.photos import read_photos
from reir.images.boxes import elementwise_iou
from reir.metrics.bootstrap import bootstrap_intervals
from reir.query.search import Gallery, load_extras
from reir.results import SearchResult
from reir.store.memory import MemoryStore
from reir_testing import data_dir
from reir_testing.boxes import target_box
from reir_testing.serving import index_photos
from reir_training.data.examples import set_test_photos_aside

KINDS = ("long", "short")
NUM_TIMED = 60
BATCH = 100


def gallery_of(photos: Sequence[Path]) -> Gallery:
    """Index photos with the shipped checkpoint, and open the gallery."""
    encoder, store = load_encoder(), MemoryStore()
    index_photos(store, "photos", photos, encoder=encoder)
    return Gallery("photos", store, encoder, load_extras(SHIPPED, encoder))


def ranks(
    gallery: Gallery, dataset: ReferringDataset, asked: Sequence[Expression], *, verify: bool
) -> npt.NDArray[np.int64]:
    """Return the place of each right hit, counted from 0; the number of hits if there is none."""
    texts = [each.text for each in asked]
    results = [
        result
        for start in range(0, len(texts), BATCH)
        for result in gallery.search_batch(texts[start : start + BATCH], verify=verify)
    ]
    return np.array(
        [_rank(result, dataset, each) for result, each in zip(results, asked, strict=True)]
    )


def _rank(result: SearchResult, dataset: ReferringDataset, asked: Expression) -> int:
    name, box = dataset.images_by_id[asked.image_id].file_name, target_box(dataset, asked)
    right = (
        place
        for place, hit in enumerate(result)
        if Path(hit.path).name == name and elementwise_iou(np.array(box), np.array(hit.box)) >= 0.5
    )
    return next(right, len(result))


def split_figures(
    gallery: Gallery, dataset: ReferringDataset, photos: Path, asked: Sequence[Expression]
) -> dict[str, float]:
    """Return the figures of the expressions of one kind in one split."""
    encoder = load_encoder()
    extras = load_extras(SHIPPED, encoder)
    unverified = replace(extras, verifier=None)
    before, after = (ranks(gallery, dataset, asked, verify=verify) for verify in (False, True))
    found = {f"br{k}": (before < k, after < k) for k in (1, 5)}
    found["rec"] = (
        right_boxes(unverified.localizer(encoder), dataset, photos, asked),
        right_boxes(extras.localizer(encoder), dataset, photos, asked),
    )
    of_photo = np.unique([each.image_id for each in asked], return_inverse=True)[1]
    figures: dict[str, float] = {}
    for name, (without, with_) in found.items():
        figures |= {f"{name}_before": without.mean(), f"{name}_after": with_.mean()}
        (span,) = bootstrap_intervals((with_ - 1.0 * without)[:, None], clusters=of_photo)
        figures |= {
            f"{name}_gain": span.mean,
            f"{name}_gain_low": span.low,
            f"{name}_gain_high": span.high,
        }
    return {name: 100 * float(value) for name, value in figures.items()}


def decision_figures(
    gallery: Gallery, dataset: ReferringDataset, asked: Sequence[Expression]
) -> dict[str, float]:
    """Return precision, recall and F1 of `every_photo` in percent, without and with `verify`."""
    colored = [each for each in asked if names_color(each.text)]
    figures: dict[str, float] = {}
    for when, verify in (("before", False), ("after", True)):
        num_found = num_right = 0
        for each in colored:
            own = dataset.images_by_id[each.image_id].file_name
            names = [
                Path(found.uri).name for found in gallery.every_photo(each.text, verify=verify)
            ]
            num_found += len(names)
            num_right += own in names
        figures |= {
            f"all_precision_{when}": 100 * num_right / num_found,
            f"all_recall_{when}": 100 * num_right / len(colored),
            f"all_f1_{when}": 200 * num_right / (num_found + len(colored)),
        }
    return figures


def times_ms(gallery: Gallery, texts: Sequence[str]) -> dict[str, float]:
    """Return the median time of a search for one of the texts, without and with verification."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for text in texts:
        for verify, times in spent.items():
            started_s = time.perf_counter()
            gallery.search(text, verify=verify)
            times.append(1e3 * (time.perf_counter() - started_s))
    return {"before": float(np.median(spent[False])), "after": float(np.median(spent[True]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", nargs="+", choices=("val", "test"), default=["val", "test"])
    splits: Sequence[str] = parser.parse_args().splits
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    folder = root / "photos"
    everything = set_test_photos_aside(read_photos(folder), TEST_PHOTOS)
    figures: dict[str, float] = {}
    for split in splits:
        dataset = everything.split(split).with_targets()
        paths = [folder / "images" / each.file_name for each in dataset.images]
        with closing(gallery_of(paths)) as gallery:
            named = [each.text for each in dataset.expressions if names_color(each.text)]
            if split == "val":
                spent = times_ms(gallery, named[:: len(named) // NUM_TIMED])
                figures |= {f"verify.ms_{name}": value for name, value in spent.items()}
                figures["verify.named"] = len(named) / len(dataset.expressions)
            for kind in KINDS:
                asked = dataset.of_kind(kind).expressions
                found = split_figures(gallery, dataset, folder / "images", asked)
                found |= decision_figures(gallery, dataset, asked)
                figures |= {f"verify.{split}.{kind}.{name}": v for name, v in found.items()}
    figures = {name: round(value, 2) for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name:32} {value}")
    write_report("verify", figures)


if __name__ == "__main__":
    main()

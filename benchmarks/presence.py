"""Is the described object in the gallery? Calibrated presence compared with a cosine threshold.

    python benchmarks/presence.py --work FOLDER

Long expressions of the held-out `val` photos are searched for in galleries of several sizes, drawn
from these photos. Half of the galleries contain the expression's own photo; it is removed from the
others. As in `reir search`, the colors of the first hits are verified; `unverified_*` is without
that. `photo_*` and `box_*` are about single photos, as in `reir locate`. `all_*` and `all_photo_*`
have the short expressions, too, and `short_photo_*` has only these; what they describe is then
absent from photos without an instance of its class.

The benchmark measures the checkpoint's `calibration.json`, which every search uses: AUROC, expected
calibration error and the false positive rate at 90% recall, and for `found` also the effect of its
threshold. The file was fitted on these same photos, so its figures are too good. Two baselines are
therefore cross-fitted: the probabilities for each half of the photos come from a model fitted on
the other half. `refit_*` is the calibration, fitted again; `score_*` is a model of the best inner
product alone, which is what vector search offers without a calibration. `test_*` is the shipped
file on the test photos of the recipe, on which nothing was fitted or chosen.

Two harder questions follow. `swap`: is presence higher for a sentence than for the same sentence
with one wrong word, in the gallery of all photos, or in its own photo? `human`: people wrote
sentences about photos; a few of them fit nothing in their photo. FOLDER keeps encoded photos, which
a second run reads instead of encoding them again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _indexing import TEST_PHOTOS, encoder_of, parser_of
from _report import write_report

from reir.checkpoint import SHIPPED, load_color_reader
from reir.datasets import ReferringDataset
from reir.datasets.photos import read_human_expressions, read_photos
from reir.evaluate import Encoding, encode_gallery
from reir.evaluate.encoded_gallery import encode_expressions
from reir.evaluate.probes import find_probes
from reir.metrics import Gallery
from reir.metrics.calibration import auroc
from reir.models.interfaces import InstanceEncoder, candidate_dims
from reir.query.presence import Calibration, Logistic, count_words, load_calibration
from reir_testing import data_dir
from reir_training.data.examples import set_test_photos_aside
from reir_training.report.calibrate import score_photos
from reir_training.report.calibration import (
    SEED,
    Trials,
    calibration_figures,
    cross_validated,
    draw_galleries,
    draw_photos,
    first_hits,
    gallery_trials,
    photo_trials,
)
from reir_training.report.calibration_pixels import Searches, read_pixels
from reir_training.report.calibration_queries import CalibrationQueries, calibration_queries
from reir_training.report.score_table import ScoreTable

Verify = Callable[[ScoreTable, ReferringDataset, Searches, Searches], None]
"""Sets `ScoreTable.pixels` for searches of galleries and for single photos of a dataset."""


def compared(name: str, trials: Trials, plain: Trials, shipped: Logistic) -> dict[str, float]:
    """Print and return the figures of the shipped calibration and of its two baselines.

    The baselines are a cross-fitted calibration, and a cross-fitted model of the score alone in
    `plain`: the same trials, of searches without verification.
    """
    # The first feature is the best inner product.
    scores = Trials(plain.features[:, :1], plain.labels, plain.groups)
    methods = {
        "": (probabilities(shipped, trials), trials),
        "refit_": (cross_validated(trials, shipped.features), trials),
        "score_": (cross_validated(scores, shipped.features[:1]), scores),
    }
    found = {
        prefix: calibration_figures(given, of.labels) for prefix, (given, of) in methods.items()
    }
    for prefix, values in found.items():
        print(f"{name:14} {len(trials.labels):6} trials  {prefix.strip('_') or 'file':6} {values}")
    ratio = found[""]["fpr90"] / max(found["score_"]["fpr90"], 1e-9)
    flat = {
        prefix + key: value for prefix, values in found.items() for key, value in values.items()
    }
    return flat | {"fpr90_ratio": round(ratio, 3)}


def all_compared(cases: Mapping[str, tuple[Trials, Trials, Logistic]]) -> dict[str, float]:
    """Print and return the figures of `compared` for several kinds of trials, under their names."""
    found: dict[str, float] = {}
    for name, case in cases.items():
        prefix = f"p6.{name}_" if name else "p6."
        told = compared(name or "gallery", *case)
        found |= {f"{prefix}{key}": value for key, value in told.items()}
    return found


def probabilities(model: Logistic, trials: Trials) -> npt.NDArray[np.float64]:
    """Return the model's (R,) probabilities of the trials."""
    return np.array([model(row) for row in trials.features.tolist()])


def found_rates(name: str, model: Logistic, threshold: float, trials: Trials) -> dict[str, float]:
    """Print and return the rates of `found` among positive and among negative trials."""
    passed = probabilities(model, trials) >= threshold
    shares = {
        f"{name}found_if_there": round(float(passed[trials.labels].mean()), 4),
        f"{name}found_if_not": round(float(passed[~trials.labels].mean()), 4),
    }
    print(f"{name.strip('_') or 'gallery':8} threshold {threshold}: {shares}")
    return shares


def swap_figures(
    encoder: InstanceEncoder,
    dataset: ReferringDataset,
    gallery: Gallery,
    verify: Verify,
    shipped: Calibration,
) -> dict[str, float]:
    """Print and return how well presence tells sentences from those with one wrong word."""
    probes = list(find_probes(dataset))
    right = calibration_queries(encoder, dataset, [probe.expression for probe in probes])
    texts = [probe.altered for probe in probes]
    wrong = replace(right, vectors=encode_expressions(encoder, texts), texts=tuple(texts))
    tables = [
        ScoreTable(gallery, queries, shipped.background, candidate_dims(encoder))
        for queries in (right, wrong)
    ]
    for table in tables:
        everywhere = np.arange(len(table.counts))
        searches = ((expression, everywhere) for expression in range(len(table.own)))
        verify(table, dataset, searches, own_photos(table))
    labels = np.repeat([True, False], [len(each.own) for each in tables])
    whole = np.concatenate([gallery_presence(each, shipped) for each in tables])
    photo = np.concatenate([photo_presence(each, shipped) for each in tables])
    found = {
        "swap_sentences": len(texts),
        "swap_auroc": round(auroc(whole, labels), 4),
        "swap_photo_auroc": round(auroc(photo, labels), 4),
    }
    print(f"one wrong word: {found}")
    return found


def human_figures(
    encoder: InstanceEncoder, folder: Path, how: Encoding, verify: Verify, shipped: Calibration
) -> dict[str, float]:
    """Print and return how well presence in a photo tells that a human sentence fits nothing."""
    dataset = read_human_expressions(folder)
    gallery = encode_gallery(encoder, dataset, folder / "images", how=how).arrays
    fits = [each.instance_id is not None for each in dataset.expressions]
    position = {image.image_id: number for number, image in enumerate(dataset.images)}
    photos = np.array([position[each.image_id] for each in dataset.expressions])
    boxes = np.zeros((len(photos), 4))  # only decide which hit is right, which is not asked here
    texts = tuple(each.text for each in dataset.expressions)
    own = tuple(frozenset({photo}) for photo in photos.tolist())
    queries = CalibrationQueries(encode_expressions(encoder, texts), photos, boxes, texts, own)
    table = ScoreTable(gallery, queries, shipped.background, candidate_dims(encoder))
    verify(table, dataset, (), own_photos(table))
    found = {
        "human_sentences": len(fits),
        "human_absent": fits.count(False),
        "human_photo_auroc": round(auroc(photo_presence(table, shipped), np.array(fits)), 4),
    }
    print(f"human sentences: {found}")
    return found


def figures_of_test_photos(table: ScoreTable, shipped: Calibration) -> dict[str, float]:
    """Print and return the figures of the shipped calibration on photos it was not fitted on."""
    found: dict[str, float] = {"test_expressions": int(table.unique.sum())}
    for prefix, verified in (("test_", True), ("test_unverified_", False)):
        every, hits = gallery_trials(table, SEED, verified=verified)
        photos, _ = photo_trials(table, SEED, verified=verified)
        of_long, of_short = split_by(photos_of_unique(table), photos)
        for name, trials, model in (
            ("", every.rows(of_unique(table)), shipped.gallery),
            ("hit_", hits, shipped.hit),
            ("photo_", of_long, shipped.photo),
            ("short_photo_", of_short, shipped.photo),
        ):
            told = calibration_figures(probabilities(model, trials), trials.labels)
            print(f"{prefix}{name} {len(trials.labels)} trials {told}")
            found |= {f"{prefix}{name}{key}": value for key, value in told.items()}
    return found


def of_unique(table: ScoreTable) -> npt.NDArray[np.bool_]:
    """Return for each trial of a gallery whether its expression is unique."""
    return table.unique[[expression for expression, _, _ in draw_galleries(table, SEED)]]


def photos_of_unique(table: ScoreTable) -> npt.NDArray[np.bool_]:
    """Return for each trial of a photo whether its expression is unique."""
    unique = table.unique
    drawn = [np.full(len(photos), unique[m]) for m, photos in draw_photos(table, SEED)]
    return np.concatenate(drawn)


def split_by(chosen: npt.NDArray[np.bool_], trials: Trials) -> tuple[Trials, Trials]:
    """Return the chosen trials, and the others."""
    return trials.rows(chosen), trials.rows(~chosen)


def gallery_presence(table: ScoreTable, shipped: Calibration) -> npt.NDArray[np.float64]:
    """Return the (M,) presence of each expression in the gallery of all photos."""
    size, photos = int(table.counts.sum()), np.arange(len(table.counts))
    found = []
    for expression, (text, background) in enumerate(
        zip(table.texts, table.background, strict=True)
    ):
        hits = first_hits(table, expression, photos, verified=True)
        about = count_words(text), hits.surprisal
        found.append(shipped.of_gallery(hits.scores, background, size, *about))
    return np.array(found)


def photo_presence(table: ScoreTable, shipped: Calibration) -> npt.NDArray[np.float64]:
    """Return the (M,) presence of each expression in its own photo."""
    found = []
    for expression, (own, background) in enumerate(
        zip(table.own.tolist(), table.background, strict=True)
    ):
        ranked, _ = table.within(expression, own, verified=True)
        words = count_words(table.texts[expression])
        found.append(shipped.of_photo(ranked.score, background, words, ranked.colors))
    return np.array(found)


def own_photos(table: ScoreTable) -> Searches:
    """Return each expression with the photo that it describes."""
    return ((expression, own[None]) for expression, own in enumerate(table.own))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="Folder that keeps encoded photos.")
    arguments: argparse.Namespace = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    folder = root / "photos"
    encoder = encoder_of(arguments)
    shipped = load_calibration(arguments.checkpoint or SHIPPED, encoder.digest)
    if shipped is None:
        raise SystemExit(
            "the checkpoint has no calibration.json for its weights: run `reir calibrate` first"
        )
    everything = read_photos(folder)
    held_out = everything.split("val")
    tested = set_test_photos_aside(everything, TEST_PHOTOS).split("test")
    how = Encoding(work=arguments.work)
    reader = load_color_reader(arguments.checkpoint or SHIPPED, encoder)

    def verify(
        table: ScoreTable, dataset: ReferringDataset, searches: Searches, photos: Searches
    ) -> None:
        if reader is not None:
            images = folder / "images"
            table.pixels = read_pixels(
                reader, table, dataset, images, searches=searches, photos=photos
            )

    def scores_of(dataset: ReferringDataset) -> ScoreTable:
        described = dataset.with_targets().expressions
        model = encoder, reader, shipped.background
        return score_photos(*model, dataset, folder / "images", described, how=how)

    scored = scores_of(held_out)
    every, hits = gallery_trials(scored, SEED, verified=True)
    plain_every, plain_hits = gallery_trials(scored, SEED, verified=False)
    whole, plain = (each.rows(of_unique(scored)) for each in (every, plain_every))
    all_photos, boxes = photo_trials(scored, SEED, verified=True)
    plain_all_photos, plain_boxes = photo_trials(scored, SEED, verified=False)
    photos, short = split_by(photos_of_unique(scored), all_photos)
    plain_photos, plain_short = split_by(photos_of_unique(scored), plain_all_photos)
    found: dict[str, float] = {
        "p6.photos": len(scored.counts),
        "p6.expressions": int(scored.unique.sum()),
    }
    found |= all_compared(
        {
            "": (whole, plain, shipped.gallery),
            "unverified": (plain, plain, shipped.gallery),
            "all": (every, plain_every, shipped.gallery),
            "hit": (hits, plain_hits, shipped.hit),
            "unverified_hit": (plain_hits, plain_hits, shipped.hit),
            "photo": (photos, plain_photos, shipped.photo),
            "unverified_photo": (plain_photos, plain_photos, shipped.photo),
            "all_photo": (all_photos, plain_all_photos, shipped.photo),
            "short_photo": (short, plain_short, shipped.photo),
            "box": (boxes, plain_boxes, shipped.box),
        }
    )
    gallery = encode_gallery(encoder, held_out, folder / "images", how=how).arrays
    shares = {
        **found_rates("", shipped.gallery, shipped.threshold, whole),
        **found_rates("photo_", shipped.photo, shipped.photo_threshold, photos),
        **swap_figures(encoder, held_out.of_kind("long"), gallery, verify, shipped),
    }
    shares |= human_figures(encoder, folder, how, verify, shipped)
    shares |= figures_of_test_photos(scores_of(tested), shipped)
    found |= {f"p6.{key}": value for key, value in shares.items()}
    write_report("presence", found)


if __name__ == "__main__":
    main()

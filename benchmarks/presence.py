"""Is the described object in the gallery? Calibrated presence compared with a cosine threshold.

    python benchmarks/presence.py --work FOLDER

Expressions of the held-out `val` photos are searched for in galleries of several sizes, drawn from
these photos. Half of the galleries contain the expression's own photo; it is removed from the
others.

The benchmark measures the checkpoint's `calibration.json`, which every search uses: AUROC, expected
calibration error and the false positive rate at 90% recall, and for `found` also the effect of its
threshold. The file was fitted on these same photos, so its figures are too good. Two baselines are
therefore cross-fitted: the probabilities for each half of the photos come from a model fitted on
the other half. `refit_*` is the calibration, fitted again; `score_*` is a model of the best inner
product alone, which is what vector search offers without a calibration. FOLDER keeps the shards of
photos that were already encoded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _indexing import encoder_of, parser_of
from _report import write_report

from reir.checkpoint import SHIPPED
from reir.datasets.photos import read_photos
from reir.evaluate import Encoding, encode_gallery
from reir.evaluate.encoded_gallery import queries_of
from reir.query.presence import Logistic, load_calibration
from reir_testing import data_dir
from reir_training.report.calibration import (
    ScoreTable,
    Trials,
    calibration_figures,
    cross_validated,
    gallery_trials,
    photo_trials,
)


def compared(name: str, trials: Trials, shipped: Logistic) -> dict[str, float]:
    """Print and return the figures of the shipped calibration and of its two baselines.

    The baselines are a cross-fitted calibration and a cross-fitted model of the score alone.
    """
    # The first feature is the best inner product.
    scores = Trials(trials.features[:, :1], trials.labels, trials.groups)
    methods = {
        "": probabilities(shipped, trials),
        "refit_": cross_validated(trials, shipped.features),
        "score_": cross_validated(scores, shipped.features[:1]),
    }
    found = {prefix: calibration_figures(given, trials.labels) for prefix, given in methods.items()}
    for prefix, values in found.items():
        print(f"{name:8} {len(trials.labels):6} trials  {prefix.strip('_') or 'file':6} {values}")
    ratio = found[""]["fpr90"] / max(found["score_"]["fpr90"], 1e-9)
    flat = {
        prefix + key: value for prefix, values in found.items() for key, value in values.items()
    }
    return flat | {"fpr90_ratio": round(ratio, 3)}


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


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="Folder for finished shards.")
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
    held_out = read_photos(folder).split("val")
    queries = queries_of(encoder, held_out, held_out.of_kind("long").with_targets().expressions)
    how = Encoding(work=arguments.work)
    gallery = encode_gallery(encoder, held_out, folder / "images", how=how).arrays
    scored = ScoreTable(gallery, queries, shipped.background)
    whole, hits = gallery_trials(scored, seed=0)
    photos, boxes = photo_trials(scored, seed=0)
    found: dict[str, float] = {
        "p6.photos": len(scored.counts),
        "p6.expressions": len(scored.own),
    }
    for name, trials, model in (
        ("", whole, shipped.gallery),
        ("hit", hits, shipped.hit),
        ("photo", photos, shipped.photo),
        ("box", boxes, shipped.box),
    ):
        prefix = f"p6.{name}_" if name else "p6."
        told = compared(name or "gallery", trials, model)
        found |= {f"{prefix}{key}": value for key, value in told.items()}
    shares = found_rates("", shipped.gallery, shipped.threshold, whole)
    shares |= found_rates("photo_", shipped.photo, shipped.photo_threshold, photos)
    found |= {f"p6.{key}": value for key, value in shares.items()}
    write_report("presence", found)


if __name__ == "__main__":
    main()

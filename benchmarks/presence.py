"""Is the described object in the gallery at all? Calibrated presence against a cosine threshold.

    python benchmarks/presence.py --work FOLDER

Expressions of the held-out `val` photos, asked of galleries of several sizes drawn from these
photos: half of the time with their own photo among them, half of the time with it taken away. The
baseline is a threshold on the best inner product, which is what vector search without a calibration
offers. Every probability is said by a model that was fitted on the other half of the photos.
Finished shards of encoded photos stay in FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _indexing import encoder_of, parser_of
from _report import write_report

from reir.datasets.photos import read_photos
from reir.evaluate import Encoding, encode_gallery
from reir.evaluate.gallery import queries_of
from reir.presence import BOX_FEATURES, GALLERY_FEATURES, HIT_FEATURES, PHOTO_FEATURES
from reir.testing import data_dir
from reir_training.calibration import (
    Scored,
    Trials,
    crossed,
    figures,
    gallery_trials,
    photo_trials,
)


def compared(name: str, trials: Trials, features: tuple[str, ...]) -> dict[str, float]:
    """Print and return how presence does, beside a threshold on the score alone."""
    ours = figures(crossed(trials, features), trials.labels)
    scores = Trials(trials.features[:, :1], trials.labels, trials.groups)
    theirs = figures(crossed(scores, features[:1]), trials.labels)
    ratio = round(ours["fpr90"] / max(theirs["fpr90"], 1e-9), 3)
    print(f"{name:8} {len(trials.labels):6} trials  presence {ours}")
    print(f"{'':8} {'':6}         score    {theirs}  FPR ratio {ratio}")
    return {
        **ours,
        **{f"score_{key}": value for key, value in theirs.items()},
        "fpr90_ratio": ratio,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, help="folder for finished shards")
    arguments: argparse.Namespace = parser.parse_args()
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    folder = root / "photos"
    encoder = encoder_of(arguments)
    held_out = read_photos(folder).split("val")
    queries = queries_of(encoder, held_out, held_out.of_kind("long").with_targets().expressions)
    how = Encoding(work=arguments.work)
    gallery = encode_gallery(encoder, held_out, folder / "images", how=how).arrays
    scored = Scored(gallery, queries)
    whole, hits = gallery_trials(scored, seed=0)
    photos, boxes = photo_trials(scored, seed=0)
    found: dict[str, float] = {
        "p6.photos": len(scored.counts),
        "p6.expressions": len(scored.own),
    }
    for name, trials, features in (
        ("", whole, GALLERY_FEATURES),
        ("hit", hits, HIT_FEATURES),
        ("photo", photos, PHOTO_FEATURES),
        ("box", boxes, BOX_FEATURES),
    ):
        prefix = f"p6.{name}_" if name else "p6."
        told = compared(name or "gallery", trials, features)
        found |= {f"{prefix}{key}": value for key, value in told.items()}
    write_report("presence", found)


if __name__ == "__main__":
    main()

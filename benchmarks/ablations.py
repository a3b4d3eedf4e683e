"""What each ingredient of `clare-nano` contributes: short trainings that differ in one setting.

    python benchmarks/ablations.py [--epochs 4] [--only NAME ...]

Every run is `reir train` with the recipe of the shipped checkpoint, one epoch of grounding and
`--epochs` of CLIA, from one cache. The figures are those of the averaged weights after the last
epoch, on the held-out photos (definition B, IoU .5). The number of candidates needs no training and
is varied on the shipped checkpoint. The standard error of BR@1 is about 1.8 points.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _report import ROOT, write_report
from quality import KS, ask, encode_gallery, found, in_photo

from reir.checkpoint import SHIPPED, load_model
from reir.datasets.photos import read_photos
from reir_testing import data_dir

RECIPE = ROOT / "training" / "recipes" / "nano.yaml"
VARIANTS = {
    "base": [],
    "more_off": ["model.num_experts=0"],
    "clia_bias_0": ["model.clia_bias=0"],
    "neighbours_off": ["model.num_layers=0"],
    "generated_off": ["optimization.generated_per_photo=0"],
    "one_member": ["model.num_members=1"],
}
CANDIDATES = (10, 30, 100)
SHOWN = ("br1_50", "br5_50", "br10_50", "rec_long", "rec_short")


def trained(name: str, settings: list[str], folder: Path, epochs: int) -> dict[str, float]:
    """Train one variant in `folder` and return its figures after the last epoch."""
    output = folder / name
    settings = [
        *settings,
        f"cache={folder / 'cache'}",
        "optimization.grounding_epochs=1",
        f"optimization.clia_epochs={epochs}",
    ]
    command = [str(Path(sys.executable).with_name("reir")), "train", "--data", str(RECIPE)]
    command += ["--output", str(output)] + [part for s in settings for part in ("--set", s)]
    # All variants read one cache of the frozen part, so they see the same candidates.
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "epoch"][-1]
    return {key: last[key] for key in SHOWN}


def with_candidates(num: int) -> dict[str, float]:
    """Return the figures of the shipped checkpoint with `num` candidates per photo."""
    root = data_dir()
    assert root is not None
    model, tokenizer = load_model(SHIPPED)
    held_out = read_photos(root / "photos").split("val")
    gallery = encode_gallery(model, held_out, root / "photos" / "images", num)
    out: dict[str, float] = {}
    for kind in ("long", "short"):
        # BR@k only for long expressions: short ones are unique only within their photo.
        _, vectors, own, iou = ask(model, tokenizer, held_out.of_kind(kind), gallery)
        scores = vectors @ gallery.vectors.T
        if kind == "long":
            hits = 100 * found(gallery, scores, own, iou).mean(axis=0)
            out |= {f"br{k}_50": float(hit) for k, hit in zip(KS, hits, strict=True)}
        out[f"rec_{kind}"] = 100 * float(in_photo(gallery, scores, own, iou).mean())
    return {key: round(out[key], 2) for key in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=4, help="Epochs of CLIA.")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path, help="Folder of the runs, to resume them.")
    arguments = parser.parse_args()
    if data_dir() is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    figures: dict[str, float | int] = {"ablations.epochs": arguments.epochs}

    def show(name: str, values: dict[str, float]) -> None:
        print(f"{name:22s}" + "".join(f"{key} {value:6.2f}  " for key, value in values.items()))
        figures.update({f"ablations.{name}.{key}": value for key, value in values.items()})

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.runs or Path(temporary)).resolve()
        for name in arguments.only:
            show(name, trained(name, VARIANTS[name], folder, arguments.epochs))
    for num in CANDIDATES:
        show(f"candidates_{num}", with_candidates(num))
    write_report("ablations", figures)


if __name__ == "__main__":
    main()

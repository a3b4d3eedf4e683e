"""How much is a dataset worth that templates wrote, compared with written expressions?

    python benchmarks/template_data.py [--work DIR]

`reir build-dataset` writes and filters expressions about the photos of the split `train` from
templates, offline. `clare-nano` is trained from the published weights of its parts, once on these
expressions, and once on the written ones about the same photos, with the same boxes and settings.
Nothing else is learned from: no captions, and no other generated sentences. BR@1 (IoU .5) is that
of the long expressions of `val`.

    engine.template_share        BR@1 after templates / BR@1 after written expressions
    engine.template.br1          BR@1 after training on templates; also br5, br10 and rec
    engine.written.br1           the same after training on written expressions
    engine.untrained.br1         the same without any training
    engine.template.expressions  number of expressions; also of the photos that have any

What is already in `--work` is not made again. Takes about an hour of two idle cores.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from _report import ROOT, write_report
from quality import long_and_short, split_figures
from weak import save_untrained

from reir.checkpoint import load_model
from reir.datasets.photos import read_photos
from reir_testing import data_dir
from reir_training.config import DataSource
from reir_training.data.examples import read_dataset

SETTINGS = {
    "generated_per_photo": 0,
    "wrong_per_expression": 1,
    "photos_per_batch": 24,
    "grounding_epochs": 4,
    "clia_epochs": 8,
}
FIGURES = {"br1": "br1_50", "br5": "br5_50", "br10": "br10_50", "rec": "rec_long"}
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]


def reir(*words: str) -> None:
    """Run a `reir` command."""
    subprocess.run([*_REIR, *words], cwd=ROOT, check=True)


def figures_of(checkpoint: Path, photos: Path) -> dict[str, float]:
    """Return the figures of a checkpoint on `val`, by short names."""
    model, tokenizer = load_model(checkpoint)
    held_out = read_photos(photos).split("val")
    asked = long_and_short(model, tokenizer, held_out, photos, model.config.num_candidates)
    found = split_figures(*asked)
    return {name: found[long] for name, long in FIGURES.items()}


def make_sources(work: Path, photos: Path) -> dict[str, DataSource]:
    """Return what each model learns from, after making the files that are missing."""
    built, written, images = work / "built", work / "written-source", photos / "images"
    reir("build-dataset", str(photos), str(built), "--split", "train", "--val-share", "0")
    written.mkdir(exist_ok=True)
    # Without the captions, which are beside these files.
    for name in ("instances.json", "expressions.json"):
        shutil.copyfile(photos / name, written / name)
    return {
        "written": DataSource(format="photos", path=written, images=str(images), split="train"),
        "template": DataSource(
            format="reircoco", path=built, images=str(images), annotations="reircoco_train.json"
        ),
    }


def settings_of(work: Path, arm: str, source: DataSource) -> Path:
    """Write the settings of a training, and return the file."""
    config = {
        "data": [source.model_dump(mode="json")],
        "weights": str(ROOT.parent / "shared" / "weights"),
        "optimization": SETTINGS,
    }
    file = work / f"{arm}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run(work: Path) -> dict[str, float]:
    """Build, train and measure."""
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    photos = root / "photos"
    work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    for arm, source in make_sources(work, photos).items():
        settings, output = settings_of(work, arm, source), work / arm
        expressions = read_dataset(source).with_targets().expressions
        figures[f"engine.{arm}.expressions"] = len(expressions)
        figures[f"engine.{arm}.photos"] = len({each.image_id for each in expressions})
        if not (output / "checkpoint").exists():
            reir("train", "--data", str(settings), "--output", str(output))
        found = figures_of(output / "checkpoint", photos)
        figures |= {f"engine.{arm}.{name}": value for name, value in found.items()}
        print(arm, found, flush=True)
    found = figures_of(save_untrained(work / "written.yaml", work / "untrained"), photos)
    figures |= {f"engine.untrained.{name}": value for name, value in found.items()}
    share = figures["engine.template.br1"] / figures["engine.written.br1"]
    return figures | {"engine.template_share": round(share, 3)}


def main() -> None:
    """Measure, print and save the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="Folder to keep; a rerun continues there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = run((arguments.work or Path(temporary)).resolve())
    for name, value in figures.items():
        print(f"{name:32} {value}")
    print(f"figures in {write_report('template_data', figures).name}")


if __name__ == "__main__":
    main()

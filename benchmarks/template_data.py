"""How much is a dataset worth that no model wrote, compared with written expressions?

    python benchmarks/template_data.py [--work DIR]

`reir build-dataset` writes and filters expressions about the photos of the split `train`, from
their captions and from templates, offline. `clare-nano` is trained from the published weights of
its parts on the first `--photos` of them, each time with the same boxes and settings: with the
built dataset, which keeps the captions of the photos; with the written expressions alone; and with
the written expressions and the captions. BR@1 (IoU .5) is that of the long expressions of `val`.

    engine.template_share        BR@1 after the built dataset / after the written expressions
    engine.captioned_share       the same, with captions beside the written expressions, too
    engine.template.br1          BR@1 after training on the built dataset; also br5, br10 and rec
    engine.written.br1           the same after training on written expressions
    engine.captioned.br1         the same after training on written expressions and captions
    engine.untrained.br1         the same without any training
    engine.template.expressions  number of expressions; also of the photos that have any

What is already in `--work` is not made again. Takes about forty minutes of two idle cores.
"""

from __future__ import annotations

import argparse
import json
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
from reir.datasets.look_alikes import LOOK_ALIKES
from reir.datasets.photos import EXPRESSIONS, read_photos
from reir.datasets.reircoco import read_reircoco, write_reircoco
from reir_ingestion.build_dataset.photos import CAPTIONS
from reir_testing import data_dir
from reir_training.config import DataSource
from reir_training.data.examples import read_dataset

SETTINGS = {
    "generated_per_photo": 0,
    "wrong_per_expression": 1,
    "photos_per_batch": 24,
    "grounding_epochs": 2,
    "clia_epochs": 5,
}
ARMS = ("template", "written", "captioned")
MORE = ("--per-instance", "6")
"""A photo has five captions, which are often about the same instance."""
FIGURES = {"br1": "br1_50", "br5": "br5_50", "br10": "br10_50", "rec": "vectors_rec_long"}
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


def make_sources(work: Path, photos: Path, num_photos: int) -> dict[str, DataSource]:
    """Return what each model learns from, after making the files that are missing."""
    built = work / "built"
    reir("build-dataset", str(photos), str(built), "--split", "train", "--val-share", "0", *MORE)
    images = read_photos(photos).split("train").first_images(num_photos).images
    template, written, captioned = folders = [work / f"{arm}-source" for arm in ARMS]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    # Its photos have their file names as ids.
    dataset = read_reircoco(built / "reircoco_train.json")
    part = dataset.of_images({image.file_name for image in images})
    write_reircoco(part, template / "reircoco_train.json", every_instance=True)
    for name in (LOOK_ALIKES, CAPTIONS):
        shutil.copyfile(built / name, template / name)
    document = json.loads((photos / EXPRESSIONS).read_bytes())
    document["splits"] = {"train": [int(image.image_id) for image in images]}
    for folder in (written, captioned):
        shutil.copyfile(photos / "instances.json", folder / "instances.json")
        (folder / EXPRESSIONS).write_text(json.dumps(document))
    shutil.copyfile(photos / CAPTIONS, captioned / CAPTIONS)
    where = str(photos / "images")
    return {
        arm: DataSource(format="photos", path=folder, images=where, split="train")
        for arm, folder in zip(ARMS[1:], (written, captioned), strict=True)
    } | {ARMS[0]: DataSource(format="reircoco", path=template, images=where)}


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


def run(work: Path, num_photos: int) -> dict[str, float]:
    """Build, train and measure."""
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    photos = root / "photos"
    work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {"engine.training_photos": num_photos}
    for arm, source in make_sources(work, photos, num_photos).items():
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
    built = figures["engine.template.br1"]
    for share, arm in (("template_share", "written"), ("captioned_share", "captioned")):
        figures[f"engine.{share}"] = round(built / figures[f"engine.{arm}.br1"], 3)
    return figures


def main() -> None:
    """Measure, print and save the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=1000, help="Photos to train on.")
    parser.add_argument("--work", type=Path, help="Folder to keep; a rerun continues there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        figures = run(work, arguments.photos)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    print(f"figures in {write_report('template_data', figures).name}")


if __name__ == "__main__":
    main()

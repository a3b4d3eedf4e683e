"""Does `reir finetune` teach a model photos of a new style from sentences alone?

    python benchmarks/finetune.py [--work DIR]

The photos are drawn toys with invented names; the shipped model knows neither their look nor their
names. A gallery of 400 of them is indexed with the shipped checkpoint, in a new `REIR_HOME`. The
real command is then given a list of the sentences about 300 of them, without any box; it holds out
some of these itself. The other 100 photos it never sees: on them, BR@1 is measured with the true
boxes, over all of their sentences. What was forgotten is measured on the split `val` of the real
photos, as in `benchmarks/quality.py`. Finally, the command that the report recommends is run, which
checks the new checkpoint and makes it live.

    finetune.br1_before         BR@1 (IoU .5, percent) on the unseen toys, shipped checkpoint
    finetune.br1_after          the same with the new checkpoint; also br10_* and photo_p1_*
    finetune.br1_ratio          after / before
    finetune.br1_tuned          BR@1 of the tuned weights before they are blended with the old ones
    finetune.minutes            time of the command
    finetune.minutes_<part>     time of each of its parts
    finetune.label_precision    share of the boxes it found that are right (IoU .5), percent
    finetune.labels_kept        share of the sentences that got a box, percent
    finetune.candidate_recall   share of the toys that the shipped detector finds (IoU .5), percent
    finetune.val_br1_before     BR@1 on `val` before; also val_br1_after and val_br1_tuned
    finetune.forgotten          fall of BR@1 on `val`, in points
    finetune.forgotten_tuned    the same without blending
    finetune.reindexed          1 if the gate of `reir reindex` made the new checkpoint live
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _report import write_report
from PIL import Image
from quality import long_and_short, split_figures

from reir.checkpoint import SHIPPED, load_encoder, load_model
from reir.datasets import ReferringDataset, read_reircoco
from reir.datasets.photos import read_photos
from reir.images.boxes import elementwise_iou, pairwise_iou
from reir.images.decode import read_image
from reir_testing import data_dir
from reir_testing.scenes import to_dataset
from reir_testing.toys.scenes import make_toy_scenes, render_toys
from reir_training.finetune.measure import measure

GALLERY = "toys"
NUM_LISTED, NUM_UNSEEN = 300, 100
SEED = 0
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]


@dataclass
class Toys:
    """The photos and sentences, and the folder for everything.

    Attributes:
        folder: of the benchmark.
        dataset: all photos with true boxes.
        listed: the photos whose sentences are given to the command.
        unseen: the others.
    """

    folder: Path
    dataset: ReferringDataset
    listed: ReferringDataset
    unseen: ReferringDataset

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def list(self) -> Path:
        return self.folder / "pairs.csv"

    @property
    def output(self) -> Path:
        return self.folder / "out"


def draw_toys(folder: Path) -> Toys:
    """Draw the photos, and write the list of sentences."""
    scenes = make_toy_scenes(NUM_LISTED + NUM_UNSEEN, SEED)
    dataset = to_dataset(scenes, per_instance=1)
    listed, unseen = (
        dataset.of_images({scene.image_id for scene in some})
        for some in (scenes[:NUM_LISTED], scenes[NUM_LISTED:])
    )
    toys = Toys(folder, dataset, listed, unseen)
    toys.photos.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        if not (toys.photos / scene.file_name).exists():
            Image.fromarray(render_toys(scene)).save(toys.photos / scene.file_name)
    with toys.list.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "sentence"])
        names = {image.image_id: image.file_name for image in listed.images}
        writer.writerows([names[each.image_id], each.text] for each in listed.expressions)
    return toys


def reir(toys: Toys, *words: str) -> Any:
    """Run a `reir` command in a home of its own, and return what it prints as JSON."""
    done = subprocess.run(
        [*_REIR, *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"REIR_HOME": str(toys.folder / "home")},
    )
    if done.returncode:
        raise RuntimeError(f"reir {' '.join(words)} ended with {done.returncode}: {done.stdout}")
    return json.loads(done.stdout)


def candidate_recall(toys: Toys) -> float:
    """Return the percentage of unseen toys that the shipped detector finds."""
    encoder = load_encoder()
    found = []
    for image in toys.unseen.images:
        (instances,) = encoder.encode_images([read_image(toys.photos / image.file_name)])
        size = np.array([image.width_px, image.height_px] * 2)
        own = [each for each in toys.unseen.instances if each.image_id == image.image_id]
        true = np.array([each.box_xyxy_px for each in own]) / size
        found += (pairwise_iou(true, instances.boxes).max(axis=1, initial=0) >= 0.5).tolist()
    return round(100 * float(np.mean(found)), 2)


def label_figures(toys: Toys, report: dict[str, Any]) -> dict[str, float]:
    """Compare the boxes that the command found with the true ones."""
    true = {each.text: each for each in toys.listed.expressions}
    labels = read_reircoco(toys.output / "labels.json")
    right = [
        elementwise_iou(
            labels.instances_by_id[str(each.instance_id)].box_xyxy_px,
            toys.dataset.instances_by_id[str(true[each.text].instance_id)].box_xyxy_px,
        )
        >= 0.5
        for each in labels.expressions
    ]
    kept = report["labels"]["kept"] / report["labels"]["sentences"]
    return {
        "finetune.label_precision": round(100 * float(np.mean(right)), 2),
        "finetune.labels_kept": round(100 * kept, 2),
    }


def unseen_figures(toys: Toys, checkpoints: dict[str, Path]) -> dict[str, float]:
    """Return BR@1, BR@10 and the share of right photos on the unseen toys."""
    figures = {}
    for name, folder in checkpoints.items():
        found = measure(load_encoder(folder), toys.unseen, toys.photos).figures()
        for figure in ("br1", "br10", "photo_p1"):
            figures[f"finetune.{figure}_{name}"] = found[figure]
    return figures


def val_figures(checkpoints: dict[str, Path]) -> dict[str, float]:
    """Return BR@1 on the held-out real photos."""
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    held_out = read_photos(root / "photos").split("val")
    figures = {}
    for name, folder in checkpoints.items():
        model, tokenizer = load_model(folder)
        asked = long_and_short(
            model, tokenizer, held_out, root / "photos", model.config.num_candidates
        )
        figures[f"finetune.val_br1_{name}"] = split_figures(*asked)["br1_50"]
    return figures


def run(toys: Toys) -> dict[str, float]:
    """Index, fine-tune, measure and re-index."""
    reir(toys, "index", str(toys.photos), "--gallery", GALLERY)
    began_s = time.monotonic()
    report = reir(
        *(toys, "finetune", GALLERY, "--sentences", str(toys.list), "--output", str(toys.output))
    )
    minutes = (time.monotonic() - began_s) / 60
    print(json.dumps(report, indent=2), flush=True)
    checkpoints = {
        "before": SHIPPED,
        "after": toys.output / "checkpoint",
        "tuned": toys.output / "tuned" / "checkpoint",
    }
    figures = {
        "finetune.photos_listed": NUM_LISTED,
        "finetune.photos_unseen": NUM_UNSEEN,
        "finetune.sentences_listed": len(toys.listed.expressions),
        "finetune.sentences_unseen": len(toys.unseen.expressions),
        "finetune.minutes": round(minutes, 2),
        **{f"finetune.minutes_{name}": value for name, value in report["minutes"].items()},
        "finetune.share": report["blend"]["share"],
        "finetune.candidate_recall": candidate_recall(toys),
        **label_figures(toys, report),
        **unseen_figures(toys, checkpoints),
        **val_figures(checkpoints),
    }
    # A model that answers nothing right is counted as if it had answered one sentence.
    floor = 100 / len(toys.unseen.expressions)
    before = max(figures["finetune.br1_before"], floor)
    figures["finetune.br1_ratio"] = round(figures["finetune.br1_after"] / before, 2)
    for name, of in (("forgotten", "after"), ("forgotten_tuned", "tuned")):
        fall = figures["finetune.val_br1_before"] - figures[f"finetune.val_br1_{of}"]
        figures[f"finetune.{name}"] = round(fall, 2)
    promoted = reir(toys, *shlex.split(report["command"])[1:])
    figures["finetune.reindexed"] = int(promoted["passed"])
    return figures


def main() -> None:
    """Run all parts, print the figures and save them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="Folder to keep; a rerun continues there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = run(draw_toys((arguments.work or Path(temporary)).resolve()))
    for name, value in figures.items():
        print(f"{name:32} {value}")
    print(f"figures in {write_report('finetune', figures).name}")


if __name__ == "__main__":
    main()

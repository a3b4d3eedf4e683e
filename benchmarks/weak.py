"""Learning without boxes: what a model learns from photos and sentences alone.

    python benchmarks/weak.py [--seeds 3] [--cache DIR] [--only PART ...]

The first part trains `weak-rec` in the shipped form on the sentences of the split `train`, without
their boxes, and localizes the sentences of `val` in their photos: P@.5, the share of sentences
whose box has an IoU above .5, for all sentences, long ones and short ones. `val` served to choose
the settings. Compared are

* a random anchor, and the anchor of the highest confidence;
* the best class match: the anchor whose classes are most similar to the whole sentence, and to its
  first phrase. The latter is `weak-rec` before training;
* `weak-rec`, trained by RefCLIP's contrast alone, with cross-modality attention (CMA), with
  false-negative suppression (FNS), with the equivariant regularizer, and with all of them. Gains
  are differences in points to the contrast alone, over seeds.

The second part labels the sentences of some training photos with `reir label`, and trains
`clare-nano` on these labels, and on the true boxes of the same sentences, with the same settings.
It reports P@.5 of the two, and of the untrained model, on `val`.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import yaml
from _report import ROOT, write_report

from reir.checkpoint import save_checkpoint
from reir.config import load_config
from reir.datasets import ReferringDataset
from reir.datasets.photos import read_photos
from reir.datasets.reircoco import write_reircoco
from reir.losses import pairwise_iou
from reir.models.weak_rec.phrases import PhraseLanguage
from reir_testing import data_dir
from reir_training.config import NanoTrainConfig
from reir_training.data.leakage import training_photos
from reir_training.nano.cache import build_cache
from reir_training.nano.initialization import (
    align_streams,
    start_model,
    training_sentences,
)
from reir_training.report.dry_run import init_single_process_group
from reir_training.run.engine import start_engine
from reir_training.run.loop import ExponentialMovingAverage, TrainLoop
from reir_training.run.schedule import plan
from reir_training.weak.config import WeakTrainConfig
from reir_training.weak.data import read_weak_photos
from reir_training.weak.start import start_nano
from reir_training.weak.task import WeakTask

RECIPE = ROOT / "training" / "recipes" / "weak_photos.yaml"
CMA = ("model.attention=true", "sentences_per_item=3")
FNS, REGULARIZER = ("loss.suppression=0.1",), ("loss.equivariance=0.1",)
ARMS: dict[str, tuple[str, ...]] = {
    "contrast": (),
    "cma": CMA,
    "fns": FNS,
    "reg": REGULARIZER,
    "all": (*CMA, *FNS, *REGULARIZER),
}
FIGURES = ("p50", "p50_long", "p50_short")
NUM_LABELED = 600
"""Training photos of the second part, the first ones of the split."""
NANO_SETTINGS = {
    # Only the sentences and their boxes are learned from, in both runs.
    "generated_per_photo": 0,
    "wrong_per_expression": 0,
    "photos_per_batch": 24,
    "grounding_epochs": 4,
    "clia_epochs": 6,
}


def ablations(cache: Path, seeds: int) -> dict[str, float]:
    """Train every arm with every seed, print the table, and return the figures."""
    init_single_process_group()
    photos = read_weak_photos(settings(0, ())).files
    nano, _ = start_nano(settings(0, ()), None)
    folder = build_cache(cache, nano, photos, _show_progress)
    figures = baselines(folder)
    for arm, changes in ARMS.items():
        runs = [train(settings(seed, changes), folder) for seed in range(seeds)]
        for name in FIGURES:
            values = [run[name] for run in runs]
            figures[f"weak.{arm}.{name}"] = round(mean(values), 2)
            figures[f"weak.{arm}.{name}_sd"] = round(stdev(values), 2) if seeds > 1 else 0.0
        show(arm, figures)
    alone = figures["weak.contrast.p50"]
    for arm in ("cma", "fns", "reg"):
        figures[f"weak.{arm}_gain"] = round(figures[f"weak.{arm}.p50"] - alone, 2)
    for name, other in {
        "random": "random",
        "class": "class_of_sentence",
        "phrase_class": "class_of_phrase",
    }.items():
        figures[f"weak.vs_{name}"] = round(alone / figures[f"weak.{other}.p50"], 3)
    return figures


def settings(seed: int, changes: Sequence[str]) -> WeakTrainConfig:
    """Return the recipe with some changes."""
    return load_config(WeakTrainConfig, RECIPE, [f"optimization.seed={seed}", *changes])


def train(config: WeakTrainConfig, cache: Path) -> dict[str, float]:
    """Train in this process, and return the figures of the averaged weights."""
    task = WeakTask(config, init=None, cache=cache)
    averaged = ExponentialMovingAverage(config.optimization.ema_decay)
    engine, _ = start_engine(task, config, averaged)
    loop = TrainLoop(
        engine,
        task,
        config.optimization,
        rank=0,
        zero_stage=config.zero_stage,
        averaged=averaged,
        on_progress=lambda _: None,
    )
    epochs = plan(config.optimization, "all")
    for epoch in epochs:
        loop.run_epoch(epoch, len(epochs))
    with loop.final_weights():
        return task.validate()


@torch.no_grad()
def baselines(cache: Path) -> dict[str, float]:
    """Return P@.5 of answers that need no training."""
    task = WeakTask(settings(0, ()), init=None, cache=cache)
    model, known = task.model.eval(), task.known
    anchors = model.anchors(task.inputs([each.photo for each in known]))
    overlap = torch.stack(
        [
            pairwise_iou(boxes, torch.from_numpy(each.box)[None])[:, 0]
            for boxes, each in zip(anchors.answers(), known, strict=True)
        ]
    )
    texts = [each.text for each in known]
    assert isinstance(model.language, PhraseLanguage)
    whole = model.language.classes(model.language.means(texts))
    scores = {
        "confident": anchors.confidence[..., 0],
        "class_of_sentence": torch.einsum("nc,nac->na", whole, anchors.class_scores),
        "class_of_phrase": model.score(anchors, model.language.load(texts)),
    }
    right = {
        name: (overlap.gather(1, _best(each, anchors.valid)) > 0.5)[:, 0].float().numpy()
        for name, each in scores.items()
    }
    valid = anchors.valid.float()
    right["random"] = ((overlap > 0.5) * valid).sum(1).div(valid.sum(1).clamp(min=1)).numpy()
    is_long = np.array([each.kind == "long" for each in known])
    figures: dict[str, float] = {}
    for name, each in right.items():
        parts = {"p50": each, "p50_long": each[is_long], "p50_short": each[~is_long]}
        figures |= {f"weak.{name}.{k}": round(100 * float(v.mean()), 2) for k, v in parts.items()}
        show(name, figures)
    return figures


def _best(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)


def pseudo_labels(cache: Path) -> dict[str, float]:
    """Train on pseudo-labels and on true boxes, print P@.5, and return the figures."""
    root = data_dir()
    assert root is not None
    source = root / "photos"
    work = cache / "pseudo"
    work.mkdir(parents=True, exist_ok=True)
    train_photos = read_photos(source).split("train").first_images(NUM_LABELED).with_targets()
    write_reircoco(train_photos, work / "true.json")
    _write_sentences(train_photos, work / "sentences.csv")
    weak = work / "weak"
    if not (weak / "checkpoint").exists():
        reir("train", "--preset", "weak-rec", "--data", str(RECIPE), "--output", str(weak))
    reir(
        *("label", str(work / "sentences.csv"), str(work / "pseudo.json")),
        *("--localizer", f"weak:{weak / 'checkpoint'}", "--images", str(source / "images")),
    )
    figures: dict[str, float] = {}
    for arm in ("true", "pseudo"):
        config = {
            "data": [
                {
                    "format": "reircoco",
                    "path": str(work),
                    "annotations": f"{arm}.json",
                    "images": str(source / "images"),
                }
            ],
            "weights": str(ROOT.parent / "shared" / "weights"),
            "optimization": NANO_SETTINGS,
        }
        (work / f"{arm}.yaml").write_text(yaml.safe_dump(config))
        output = work / arm
        if not (output / "checkpoint").exists():
            reir("train", "--data", str(work / f"{arm}.yaml"), "--output", str(output))
        figures |= rec(arm, output / "checkpoint", source)
    figures |= rec("frozen", save_untrained(work / "true.yaml", work / "frozen"), source)
    figures["weak.pseudo_share"] = round(figures["weak.pseudo.p50"] / figures["weak.true.p50"], 3)
    return figures


def _write_sentences(dataset: ReferringDataset, path: Path) -> None:
    names = {image.image_id: image.file_name for image in dataset.images}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["photo", "sentence"])
        writer.writerows([names[each.image_id], each.text] for each in dataset.expressions)


def _show_progress(done: int, total: int) -> None:
    if done % 200 == 0:
        print(f"{done} of {total} photos", file=sys.stderr)


def save_untrained(settings: Path, folder: Path) -> Path:
    """Write a checkpoint of `clare-nano` with the published weights of its parts.

    Args:
        settings: file of a training, with whose photos the streams are aligned.
        folder: where to write the checkpoint.

    Returns:
        `folder`.
    """
    config = load_config(NanoTrainConfig, settings, [])
    model, tokenizer = start_model(config, None)
    align_streams(model, tokenizer, training_sentences(training_photos(config)))
    save_checkpoint(folder, model, tokenizer, {})
    return folder


def rec(arm: str, checkpoint: Path, source: Path) -> dict[str, float]:
    """Return P@.5 of a checkpoint on `val`, from `reir eval rec`."""
    printed = reir(
        *("eval", "rec", "--checkpoint", str(checkpoint), "--annotations", str(source)),
        *("--images", str(source / "images"), "--split", "val", "--json"),
    )
    splits = json.loads(printed)["splits"]
    figures = {
        f"weak.{arm}.p50_{kind}": splits[f"val {kind}"]["query_free"]["p50"]
        for kind in ("long", "short")
    }
    total = sum(each["expressions"] * each["query_free"]["p50"] for each in splits.values())
    num = sum(each["expressions"] for each in splits.values())
    figures[f"weak.{arm}.p50"] = round(total / num, 2)
    show(arm, figures)
    return figures


def reir(*arguments: str) -> str:
    """Run a `reir` command, and return what it prints."""
    command = [str(Path(sys.executable).with_name("reir")), *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def show(name: str, figures: dict[str, float]) -> None:
    """Print P@.5 of an arm."""
    values = (f"{part} {figures[f'weak.{name}.{part}']:5.1f}" for part in FIGURES)
    print(f"{name:20s}" + "   ".join(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="Folder to keep what can be reused.")
    parser.add_argument("--only", choices=("ablations", "labels"))
    arguments = parser.parse_args()
    if data_dir() is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.cache or Path(temporary)).resolve()
        if arguments.only != "labels":
            write_report(
                "weak", {"weak.seeds": arguments.seeds} | ablations(cache, arguments.seeds)
            )
        if arguments.only != "ablations":
            write_report("weak_labels", pseudo_labels(cache))


if __name__ == "__main__":
    main()

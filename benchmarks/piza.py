"""Does zooming find small instances that the same model without zoom misses?

    python benchmarks/piza.py [--work DIR] [--seeds N]

A small model of MM-GroundingDINO's class is trained on ordinary generated scenes. Then `reir train
--preset piza` trains adapters of it on large generated scenes, whose small instances cover .07 to
.1 % of the photo, each with the same number of steps: Adapter+ without zoom (`adapter`),
PIZA-Adapter+ whose adapters are told nothing about the search (`zoom_only`), and PIZA-Adapter+
(`piza`). All of them, and the base itself (`zero_shot`), search held-out scenes. Figures are means
over the seeds of the adapters. `piza.adapter_gain` is the mAcc of the worst training of `adapter`
minus that of `zero_shot`. `piza.zoom_ratio` is the mAcc of `piza` divided by that of
`adapter`, and `piza.first_look` the share of searches whose first look leads to a part of the photo
with the target's center. `near` is the percentage of sentences for which the centers of the answer
and of the target are at most a tenth of the photo's longer side apart: it tells methods apart whose
boxes never overlap such small targets.

What is already in `--work` is not trained again. On a CPU, the base takes `piza.base_hours`, which
is measured with a few steps, and each training of adapters about ten minutes of an idle core.
`piza.base_found` is 1 if the base was in `--work` before, as it was for the stored figures: an
earlier start of the same command had trained it. `--val` measures everything on validation scenes,
on which all choices were made.

The benchmark also kills and resumes a training of a tiny model, compares a step of two workers with
that of one, and searches the real photos of SOREC in the shared data. The last shows only that the
whole path works on them: the small base knows generated shapes, and no signs or cars.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _report import write_report

from reir.images.decode import read_image
from reir.models.grounding_dino import load_grounding_dino
from reir.models.interfaces import ExpressionLocalizer
from reir.models.piza.checkpoint import WEIGHTS, load_piza
from reir.models.piza.looks import load_zooming_localizer
from reir.models.zoom_steps import ZoomSearch
from reir_testing import data_dir
from reir_testing.piza.large_scenes import PHOTOS, make_large_scenes, save_large_scenes
from reir_testing.piza.small_base import (
    SIDE_PX,
    STEPS,
    WIDTH,
    save_small_base,
    train_small_base,
)
from reir_testing.training.kills import TrainCommand, compare, run_killed
from reir_testing.training.tiny import tiny_piza_settings
from reir_testing.training.workers import CASES, step_alone, steps_of_workers
from reir_training.config import DataSource, PizaTrainConfig
from reir_training.data.examples import TrainPhoto, build_photos, read_dataset
from reir_training.piza.history_training import history_scores
from reir_training.piza.validate import validate_localizer

SPLITS = {"train": (100, 10), "val": (24, 5), "test": (30, 71)}
"""Number of scenes and seed of each split."""
EPOCHS, EXPRESSIONS_PER_STEP, SEEDS = 6, 16, 3
SEARCHES = {"usual_share": 0.04, "share_spread": 0.1, "growth": 0.5, "jitter": 0.3}
"""Most searches take two looks, and the first one leads to a part with a quarter of the photo's
side, because the base reads pictures of only 256 px."""
COST_STEPS = 4
"""Steps with which the cost of the base is measured."""
NEAR = 0.1
LIMIT_S = 4 * 3600
"""Limit for one training, on a busy machine."""
SOURCE_KEYS = ("format", "path", "annotations", "images")
ARMS: Mapping[str, Mapping[str, str]] = {
    "adapter": {"method": "adapter"},
    "zoom_only": {"method": "piza-adapter", "inserted": "nothing"},
    "piza": {"method": "piza-adapter"},
}
Figures = dict[str, float | int | str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmark-piza"), help="Folder for all files."
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="Epochs of each training.")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="Trainings of each method.")
    parser.add_argument("--num-workers", type=int, default=1, help="Workers of each training.")
    parser.add_argument("--val", action="store_true", help="Measure on validation scenes.")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    base_found = (work / "base").exists()
    base = small_base(work / "base").resolve()
    if not (work / "large").exists():
        scenes = {name: make_large_scenes(*of) for name, of in SPLITS.items()}
        save_large_scenes(work / "large", scenes)
    source = _source(work, "val" if arguments.val else "test")
    held_out = build_photos(source, read_dataset(source))
    seeds = range(arguments.seeds)
    figures = learning(work, base, held_out, arguments.epochs, seeds, arguments.num_workers)
    figures["piza.base_found"] = int(base_found)
    if not arguments.val:
        figures |= base_cost() | resuming() | sharing()
        figures |= real_photos(_checkpoint(work, "piza", 0))
    for key, value in figures.items():
        print(f"{key:32} {value}")
    if not arguments.val:
        write_report("piza", figures)


def small_base(folder: Path) -> Path:
    """Return the folder of the small base, after training it if it is missing."""

    def report(step: int, loss: float, seconds: float) -> None:
        if step % 100 == 0:
            print(
                f"base: step {step} of {sum(STEPS)}, loss {loss:.2f}, {seconds:.0f} s", flush=True
            )

    if not folder.exists():
        save_small_base(folder, train_small_base(progress=report))
    return folder


def base_cost() -> Figures:
    """Return the seconds of a step of the base's training on this machine, and the hours of all."""
    times = [0.0]
    train_small_base((1, COST_STEPS), progress=lambda _, __, seconds: times.append(seconds))
    # Without the first step, which also allocates memory.
    per_step = (times[-1] - times[1]) / COST_STEPS
    return {
        "piza.base_step_s": round(per_step, 2),
        "piza.base_hours": round(per_step * sum(STEPS) / 3600, 2),
    }


def settings_of(
    work: Path, base: Path, epochs: int, arm: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Return the settings of `reir train` for one training."""
    return {
        "base": str(base),
        **arm,
        "rank": WIDTH,
        "data": [_source(work, "train").model_dump(mode="json", include={*SOURCE_KEYS})],
        "history": {"steps": 600, "searches": SEARCHES},
        "augmentation": {
            "short_sides": [SIDE_PX],
            "long_side": 2 * SIDE_PX,
            "crop_probability": 0,
            "mirror_probability": 0,
        },
        "optimization": {
            "seed": seed,
            "grounding_epochs": epochs,
            "photos_per_batch": EXPRESSIONS_PER_STEP,
            "learning_rate": 5e-4,
            "warmup_steps": 20,
            "step_at": 0.7,
            "max_gradient_norm": 1.0,
        },
    }


def _source(work: Path, split: str) -> DataSource:
    return DataSource(
        format="sorec", path=work / "large", annotations=f"{split}.json", images=PHOTOS
    )


def learning(  # noqa: PLR0913 - what is trained, where, how often and on what it is measured
    work: Path,
    base: Path,
    held_out: Sequence[TrainPhoto],
    epochs: int,
    seeds: Sequence[int],
    num_workers: int,
) -> Figures:
    """Train the adapters that have no checkpoint, and measure all on the held-out scenes."""
    figures: Figures = {
        "piza.expressions": sum(len(photo.expressions) for photo in held_out),
        "piza.seeds": len(seeds),
    }
    figures |= _named("zero_shot", [measured(load_grounding_dino(str(base)), held_out)])
    for name, arm in ARMS.items():
        found = []
        for seed in seeds:
            checkpoint = _checkpoint(work, name, seed)
            if not checkpoint.exists():
                print(f"training {name}, seed {seed}", flush=True)
                settings = settings_of(work, base, epochs, arm, seed)
                folder = checkpoint.parent.parent
                training = TrainCommand(folder, settings, num_workers, preset="piza")
                training.finish(training.start(), LIMIT_S)
            found.append(measured(load_zooming_localizer(str(checkpoint)), held_out))
            print(name, found[-1], flush=True)
        figures |= _named(name, found)
    gain = float(figures["piza.adapter.macc_least"]) - float(figures["piza.zero_shot.macc"])
    figures["piza.adapter_gain"] = round(gain, 2)
    without, full = (float(figures[f"piza.{name}.macc"]) for name in ("adapter", "piza"))
    # An accuracy of 0 would make the ratio infinite, which is no figure.
    figures["piza.zoom_ratio"] = round(full / max(without, 0.1), 2)
    config = PizaTrainConfig.model_validate(settings_of(work, base, epochs, ARMS["piza"], 0))
    return figures | _search_figures(_checkpoint(work, "piza", 0), config, held_out)


def measured(localizer: ExpressionLocalizer, held_out: Sequence[TrainPhoto]) -> dict[str, float]:
    """Return the accuracies of a localizer, and how often its answer is near the target."""
    near = []
    for photo in held_out:
        texts = [each.text for each in photo.expressions]
        answers = localizer.localize([read_image(photo.path)] * len(texts), texts)
        for each, answer in zip(photo.expressions, answers, strict=True):
            # xyxy of answer and target in [0, 1], or none of an empty answer
            corners = answer.boxes[:1] - photo.boxes[each.box]
            offset_px = (corners[:, :2] + corners[:, 2:]) / 2 * photo.size_px
            far = np.linalg.norm(offset_px, axis=1) > NEAR * max(photo.size_px)
            near.append(bool(len(far)) and not far[0])
    return validate_localizer(localizer, held_out) | {"near": 100 * float(np.mean(near))}


def _checkpoint(work: Path, name: str, seed: int) -> Path:
    return work / f"{name}-{seed}" / "run" / "checkpoint"


def _named(name: str, found: Sequence[Mapping[str, float]]) -> Figures:
    """Return the means of some measurements of a method, and the lowest and the highest mAcc."""
    means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
    maccs = [each["macc"] for each in found]
    means |= {"macc_least": min(maccs), "macc_most": max(maccs)}
    return {f"piza.{name}.{key}": round(value, 2) for key, value in means.items()}


def _search_figures(
    checkpoint: Path, config: PizaTrainConfig, held_out: Sequence[TrainPhoto]
) -> Figures:
    """Return the accuracy of the history encoder, and the number and place of the looks."""
    said = [(photo, e) for photo in held_out for e in photo.expressions]
    history = load_piza(checkpoint).history
    assert history is not None
    targets = np.stack([photo.boxes[e.box] for photo, e in said])
    scores = history_scores(history, targets, [photo.size_px for photo, _ in said], config.history)
    localizer = load_zooming_localizer(str(checkpoint))
    searches: list[ZoomSearch] = []
    for photo in held_out:
        texts = [e.text for e in photo.expressions]
        searches += localizer.zoom([read_image(photo.path)] * len(texts), texts)
    first = np.stack([search.steps[0].box for search in searches])
    center = (targets[:, :2] + targets[:, 2:]) / 2
    inside = (first[:, :2] <= center).all(1) & (center <= first[:, 2:]).all(1)
    return {
        "piza.end_accuracy": round(scores.end_accuracy, 4),
        "piza.progress_error": round(scores.progress_error, 4),
        "piza.first_look": round(float(inside.mean()), 3),
        "piza.mean_steps": round(float(np.mean([len(each.steps) for each in searches])), 2),
    }


def resuming() -> Figures:
    """Kill the worker of a tiny training, and compare the run with an undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        changes = {"grounding_epochs": 4, "save_every_steps": 3, "log_every_steps": 1}
        settings = tiny_piza_settings(work / "piza", **changes)
        whole, killed = (
            TrainCommand(work / name, settings, preset="piza", weights=WEIGHTS)
            for name in ("whole", "killed")
        )
        whole.finish(whole.start())
        at = random.Random(0).choice([step for step, _ in whole.losses()[1:-2]])
        run_killed(killed, "worker", at)
        outcome = compare(whole, killed)
        return {
            "piza.resume_max_diff": max(outcome.loss, outcome.weight),
            "piza.resume_killed_at": "epoch {} step {}".format(*at),
            "piza.resume_steps": len(whole.losses()),
            "piza.resume_steps_missing": outcome.missing,
        }


def sharing() -> Figures:
    """Compare loss and gradients of two workers under ZeRO 1, 2 and 3 with those of one process."""
    cases = [case for case in CASES if case.model == "piza"]
    with tempfile.TemporaryDirectory() as folder:
        alone = step_alone(Path(folder), cases[0])
        together = steps_of_workers(Path(folder), cases)
    found = [alone.difference(step) for step in together.values()]
    return {"piza.two_workers_max_diff": max(each.largest for each in found)}


def real_photos(checkpoint: Path) -> Figures:
    """Search the shared photos of SOREC, which only shows that the whole path works on them."""
    root = data_dir()
    folder = root / "refs_only" / "sorec" if root is not None else None
    if folder is None or not folder.exists():
        return {}
    localizer = load_zooming_localizer(str(checkpoint))
    entries = [
        each
        for each in json.loads((folder / "testA.json").read_text())
        if (folder / each["image"]).exists()
    ]
    photos = [read_image(folder / each["image"]) for each in entries]
    searches = localizer.zoom(photos, [each["ref"] for each in entries])
    for each, search in zip(entries, searches, strict=True):
        print(each["image"], [step.box for step in search.steps])
    return {
        "piza.real_photos": len({each["image"] for each in entries}),
        "piza.real_expressions": len(entries),
        "piza.real_steps": sum(len(search.steps) for search in searches),
    }


if __name__ == "__main__":
    main()

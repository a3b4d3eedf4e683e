"""Training without boxes gives the same result however it runs, and refuses lists it cannot use.

    python benchmarks/weak_training.py

Tiny models learn the sentences of generated scenes with `reir train --preset weak-rec` on CPUs:

* Two workers are compared with one worker, without dropout, which depends on the worker by design.
  This is the shipped form of the model, whose anchors are candidates of `clare-nano`.
* A training whose worker gets SIGKILL, after which it continues by itself, is compared with an
  undisturbed one. This is done for the shipped form and for the published one, whose anchors are
  cells of YOLOv3, with its batch norms as in the released code; both have dropout.
* Each of fifty hostile lists of photos and sentences is read, and some are given to `reir train`.
  Each error must name the file, the row and the value, and nothing may be trained on.

Differences are the largest absolute ones of a weight of the final checkpoints. One step of two
workers in both forms is compared with that of one process by `benchmarks/train_two_workers.py`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _report import write_report

from reir.models.weak_rec.checkpoint import WEIGHTS
from reir_testing.training.kills import Comparison, TrainCommand, compare, run_killed
from reir_testing.training.tiny_weak import (
    MODELS,
    NO_DROPOUT,
    WeakForm,
    init_of,
    tiny_weak_settings,
)
from reir_testing.weak.hostile_sentences import HOSTILE_LISTS, HostileList, problem, save_photos

EPOCHS, SAVE_EVERY_STEPS = 3, 4
GIVEN_TO_TRAIN = (
    "header-only",
    "no-photo-column",
    "sentence-empty",
    "photo-absent",
    "box-half-blank",
)
Figures = dict[str, float | int | str]


def command(
    work: Path, name: str, settings: Mapping[str, Any], num_workers: int = 1
) -> TrainCommand:
    needs_nano = settings["model"].get("anchors", "candidates") == "candidates"
    return TrainCommand(
        work / name,
        settings,
        num_workers,
        preset="weak-rec",
        weights=WEIGHTS,
        init=init_of(work / "files") if needs_nano else None,
    )


def settings_of(work: Path, form: WeakForm, **model: Any) -> dict[str, Any]:
    settings = tiny_weak_settings(
        work / "files",
        form,
        grounding_epochs=EPOCHS,
        save_every_steps=SAVE_EVERY_STEPS,
        log_every_steps=1,
    )
    return settings | {"model": settings["model"] | model}


def sharing(work: Path) -> Figures:
    """Compare a training on two workers with one on a single worker."""
    settings = settings_of(work, "weak-candidates", **NO_DROPOUT)
    one, two = (command(work, f"workers-{n}", settings, n) for n in (1, 2))
    for training in (one, two):
        training.finish(training.start())
    outcome = compare(one, two)
    return {
        "weak.two_workers_max_diff": outcome.weight,
        "weak.two_workers_max_loss_diff": outcome.loss,
        "weak.two_workers_steps": len(one.losses()),
    }


def resuming(work: Path, seed: int) -> Figures:
    """Compare trainings whose worker was killed with undisturbed ones."""
    rng, found = random.Random(seed), dict[WeakForm, Comparison]()
    figures: Figures = {}
    for form in MODELS:
        settings = settings_of(work, form, paper_parity=form == "weak-yolov3")
        whole, killed = (command(work, f"{form}-{name}", settings) for name in ("whole", "killed"))
        whole.finish(whole.start())
        # Neither the first nor the last steps, so that there is something to resume and to lose.
        at = rng.choice(sorted(dict(whole.losses()))[1:-2])
        run_killed(killed, "worker", at)
        found[form] = outcome = compare(whole, killed)
        print(f"{form} killed at {at}, {outcome}", flush=True)
        figures |= {
            f"weak.resume.{form}.killed_at": "epoch {} step {}".format(*at),
            f"weak.resume.{form}.steps_redone": outcome.redone,
            f"weak.resume.{form}.max_diff": outcome.weight,
        }
    return {
        "weak.resume_max_diff": max(each.weight for each in found.values()),
        "weak.resume_max_loss_diff": max(each.loss for each in found.values()),
        "weak.resume_steps_missing": sum(each.missing for each in found.values()),
        **figures,
    }


def refusing(work: Path) -> Figures:
    """Give hostile lists to the reader, and some to `reir train`."""
    ok = trained_ok = 0
    for number, hostile in enumerate(HOSTILE_LISTS):
        folder = work / "hostile" / str(number)
        folder.mkdir(parents=True)
        save_photos(folder)
        wrong = problem(hostile, folder)
        ok += not wrong
        if wrong:
            print(f"{hostile.name}: {wrong}")
        if hostile.name in GIVEN_TO_TRAIN:
            trained_ok += _is_refused_by_train(work, hostile, folder)
    return {
        "weak.hostile_ok": ok,
        "weak.hostile_lists": len(HOSTILE_LISTS),
        "weak.hostile_train_ok": trained_ok,
        "weak.hostile_train_lists": len(GIVEN_TO_TRAIN),
    }


def _is_refused_by_train(work: Path, hostile: HostileList, folder: Path) -> bool:
    """Whether `reir train` names what is wrong with a list, and trains on nothing."""
    file = f"{hostile.name}{hostile.suffix}"
    source = {"format": "sentences", "path": str(folder), "images": ".", "annotations": file}
    settings = settings_of(work, "weak-candidates") | {"data": [source]}
    training = command(work, f"train-{hostile.name}", settings)
    code = training.start().wait()
    said = (training.folder / "messages.txt").read_text()
    # The terminal's width divides long lines.
    named = all("".join(part.split()) in "".join(said.split()) for part in (file, *hostile.named))
    nothing = not (training.folder / "run" / "checkpoint").exists() and not training.losses()
    refused = bool(code) and named and nothing and "Traceback" not in said
    if not refused:
        print(f"reir train with {hostile.name}: exit code {code}, {said}")
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="Chooses the steps of the kills.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        figures = sharing(work) | resuming(work, arguments.seed) | refusing(work)
    for key, value in figures.items():
        print(f"{key:40} {value}")
    write_report("weak_training", figures)


if __name__ == "__main__":
    main()

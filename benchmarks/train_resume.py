"""A training that is killed and started again has the same losses as an undisturbed one.

    python benchmarks/train_resume.py

A tiny CLARE learns generated scenes with `reir train`, both stages, ZeRO 1, on CPUs. At a random
step one of these gets SIGKILL: a Ray Train worker, after which the trainer continues by itself; the
process of `reir train`; or every process of its Ray cluster. In the last two cases the same command
is started again. The benchmark compares the losses of every logged step, including steps that ran
twice, and the weights of the final checkpoint.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from _report import write_report

from reir_testing.training.kills import VICTIMS, TrainCommand, compare, run_killed
from reir_testing.training.tiny import tiny_clare_settings, write_scenes

EPOCHS_A_STAGE, STEPS_PER_EPOCH, SAVE_EVERY_STEPS = 2, 12, 5


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, float | int | str]:
    write_scenes(work / "scenes")
    settings = tiny_clare_settings(
        work / "scenes",
        grounding_epochs=EPOCHS_A_STAGE,
        clia_epochs=EPOCHS_A_STAGE,
        steps_per_epoch=STEPS_PER_EPOCH,
        save_every_steps=SAVE_EVERY_STEPS,
        log_every_steps=1,
        warmup_steps=4,
        ema_decay=0.9,
    )
    whole = TrainCommand(work / "whole", settings, arguments.num_workers)
    whole.finish(whole.start())
    steps = sorted(dict(whole.losses()))
    rng = random.Random(arguments.seed)
    figures: dict[str, float | int | str] = {}
    found = []
    for victim in VICTIMS:
        # Neither the first nor the last steps, so that there is something to resume and to lose.
        at = rng.choice(steps[1:-2])
        training, started = (
            TrainCommand(work / victim, settings, arguments.num_workers),
            time.time(),
        )
        killed = run_killed(training, victim, at)
        outcome = compare(whole, training)
        found.append(outcome)
        print(f"{victim} killed at {at}, {outcome}, {time.time() - started:.0f} s")
        figures |= {
            f"train.resume.{victim}.killed_at": "epoch {} step {}".format(*at),
            f"train.resume.{victim}.processes_killed": killed,
            f"train.resume.{victim}.steps_redone": outcome.redone,
            f"train.resume.{victim}.max_diff": outcome.loss,
        }
    return {
        "train.resume_max_diff": max(each.loss for each in found),
        "train.resume_max_weight_diff": max(each.weight for each in found),
        "train.resume_kills": len(found),
        "train.resume_steps": len(steps),
        "train.resume_steps_redone": sum(each.redone for each in found),
        "train.resume_steps_missing": sum(each.missing for each in found),
        "train.resume_workers": arguments.num_workers,
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(parser.parse_args(), Path(folder))
    for key, value in figures.items():
        print(f"{key:40} {value}")
    write_report("train_resume", figures)


if __name__ == "__main__":
    main()

"""Does CLARE learn? A small model of its architecture, from random weights, on generated scenes.

    python benchmarks/train_scenes.py [--only all_of_it more_off neighbours_off] [--quarter]

Scenes show colored shapes and their relations, so the ground truth is exact. Each test gallery has
200 scenes, drawn with a seed that was used neither for training nor for tuning; figures are the
mean over the galleries, with 95% bootstrap intervals over their scenes. Each variant is
`reir train`, stage 1 and then stage 2, on this machine's cores; stage 1 alone is measured too. An
expression is true of exactly one instance of the whole gallery. Nearly all of them are relations:
without its surroundings, hardly any instance can be told apart. BR@K uses IoU .5 (definition B),
candidates chosen without the query, and one expression per instance; chance is a random order of
the candidates. `--quarter` cuts stage 2 to a quarter, which is enough for ablations.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from _report import ROOT, write_report

from reir.checkpoint import load_clare
from reir.evaluate import evaluate_reir
from reir.metrics.bootstrap import Interval
from reir.models.clare.encoder import ClareEncoder
from reir_testing.scenes import Scene, make_scenes, save_scenes, to_dataset

SIDE_PX, NUM_TRAIN, NUM_TEST = 96, 6000, 200
# Expressions of the training scenes are unique in a gallery of the same size as in the test.
GALLERY = 200
TRAIN_SEED = 1
TEST_SEEDS = (20_251, 20_252, 20_253)
"""Seed 2 is left out, because the recipe was tuned on it."""
SHAPE = {
    "vision_width": 160,
    "vision_layers": 4,
    "vision_heads": 4,
    "vision_mlp": 320,
    "patch_px": 12,
    "native_grid": 8,
    "text_width": 128,
    "text_layers": 2,
    "text_heads": 32,  # words find their nouns far sooner than with 4
    "text_mlp": 256,
    "max_tokens": 18,
    "dim": 128,
    # A scene has at most six shapes.
    "num_queries": 12,
    "encoder_layers": 1,
    "decoder_layers": 4,  # what is around an instance reaches its vector from the second on
    "num_heads": 8,
    "num_points": 1,
    "ffn": 256,
    "num_candidates": 8,
    "shortest_side_px": SIDE_PX,
    "longest_side_px": SIDE_PX,
    "clia_scale": 20,
    "clia_bias": -8,  # a dozen queries a photo are fewer wrong answers than the 900 of the paper
}
RECIPE: dict[str, Any] = {
    "texts_per_photo": 6,
    "expressions_per_instance": 2,
    "hard_negatives_from": 0.5925,  # after the fifth time that all scenes have come
    "denoising": False,
    "loss": {"clia_auxiliary": 0.25},  # the first layers cannot know what is around an instance
    "augmentation": {"short_sides": [SIDE_PX], "long_side": SIDE_PX, "crop_probability": 0},
    "optimization": {
        "photos_per_batch": 12,
        "steps_per_epoch": 260,
        "grounding_epochs": 1,
        "clia_epochs": 16,
        "learning_rate": 1e-3,
        "tower_factor": 1.0,
        "text_tower_factor": 0.1,  # at the rate of the rest it stays with the subject
        "weight_decay": 0.05,
        "warmup_steps": 100,
        "decay": "cosine",
        "max_gradient_norm": 1.0,
        "save_every_steps": 1000,
        "precision": "fp32",
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "all_of_it": {},
    "more_off": {"num_experts": 0},
    "neighbours_off": {"neighbors": False},
}


@dataclass(frozen=True)
class TrainingResult:
    """A checkpoint, and the time from the command to the checkpoint."""

    checkpoint: Path
    minutes: float


def write_training_scenes(folder: Path) -> None:
    """Write the training scenes, as galleries of the same size as the test galleries."""
    scenes = make_scenes(NUM_TRAIN, TRAIN_SEED, SIDE_PX)
    galleries = {f"{i}": scenes[i : i + GALLERY] for i in range(0, NUM_TRAIN, GALLERY)}
    save_scenes(folder, galleries, scope="gallery", per_instance=4)


def train(stage: str, config: Path, output: Path, init: Path | None) -> TrainingResult:
    """Run one stage as a user would."""
    command = [str(Path(sys.executable).with_name("reir")), "train", "--preset", "clare-base"]
    command += ["--stage", stage, "--data", str(config), "--output", str(output)]
    command += ["--num-workers", str(os.cpu_count() or 1)]  # faster than threads, on small tensors
    command += ["--init", str(init)] if init else []
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return TrainingResult(output / "checkpoint", (time.perf_counter() - start) / 60)


Gallery = tuple[tuple[Scene, ...], Path]


def figures(checkpoint: Path, galleries: Sequence[Gallery]) -> dict[str, float]:
    """Return BR@K and precision within the true photo, in percent, as means over the galleries.

    The galleries are independent and equally large, so the half-width of the mean's interval is
    the root of the sum of their squared half-widths, divided by their number.
    """
    encoder = ClareEncoder(*load_clare(checkpoint), digest="scenes")
    found: dict[str, list[Interval]] = {}
    chances = []
    for scenes, images in galleries:
        report = evaluate_reir(encoder, to_dataset(scenes, per_instance=1), images)
        spans = {f"br{k}_50": report.query_free.definition_b[f"br{k}_50"] for k in (1, 5, 10)}
        for name, span in (spans | {"rec_50": report.query_free.rec["p50"]}).items():
            found.setdefault(name, []).append(span)
        chances.append(100 / report.info.counts["instances"])
    out = {"chance": mean(chances)}
    for name, each in found.items():
        half = hypot(*((span.high - span.low) / 2 for span in each)) / len(each)
        middle = mean(span.mean for span in each)
        out |= {name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=["all_of_it"])
    parser.add_argument("--quarter", action="store_true", help="Shorten stage 2.")
    parser.add_argument("--runs", type=Path, help="Folder of the runs, to resume them.")
    arguments = parser.parse_args()
    recipe = RECIPE
    if arguments.quarter:
        optimization = recipe["optimization"]
        short = optimization | {"clia_epochs": round(optimization["clia_epochs"] / 4)}
        recipe = recipe | {"optimization": short}
    results: dict[str, float] = {}

    def show(name: str, values: dict[str, float]) -> None:
        values = {key: round(value, 2) for key, value in values.items()}
        print(f"{name:26s}" + "  ".join(f"{key} {value}" for key, value in values.items()))
        results.update({f"train.scenes.{name}.{key}": value for key, value in values.items()})

    with tempfile.TemporaryDirectory() as temporary:
        root = (arguments.runs or Path(temporary)).resolve()
        write_training_scenes(root / "train")
        tests: list[Gallery] = []
        for seed in TEST_SEEDS:
            scenes = make_scenes(NUM_TEST, seed, SIDE_PX)
            save_scenes(root / f"test-{seed}", {"test": scenes})
            tests.append((scenes, root / f"test-{seed}" / "images"))
        for name in arguments.only:
            config = root / f"{name}.yaml"
            source = {"format": "photos", "path": str(root / "train")}
            values = recipe | {"data": [source], "shape": SHAPE | VARIANTS[name]}
            config.write_text(yaml.safe_dump(values))
            first = train("grounding", config, root / name / "grounding", None)
            second = train("clia", config, root / name / "clia", first.checkpoint)
            show(f"{name}.stage1", figures(first.checkpoint, tests))
            show(f"{name}.stage2", figures(second.checkpoint, tests))
            show(name, {"minutes": first.minutes + second.minutes})
    if "all_of_it" in arguments.only and not arguments.quarter:
        for end in ("", "_low", "_high"):
            results[f"train.scenes_br1_50{end}"] = results[
                f"train.scenes.all_of_it.stage2.br1_50{end}"
            ]
        results["train.scenes_minutes"] = results["train.scenes.all_of_it.minutes"]
    print(write_report("train_scenes_ablation" if arguments.quarter else "train_scenes", results))


if __name__ == "__main__":
    main()

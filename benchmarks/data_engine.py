"""The data engine: does its offline filter find planted faults, and does it survive a bad endpoint?

    python benchmarks/data_engine.py --work FOLDER [--only filter|endpoint|kills]

filter: faults are planted in the written expressions of the photos of `val`: a wrong color, a wrong
side, a loss of uniqueness, another object. The rules judge, with the shipped encoder, the shipped
color head and the true boxes, refuses some of them, and some of the good ones. Each kind of fault
counts the same. The
thresholds are chosen on every second photo, and the figures are from the other ones: the photos of
`train` would flatter the encoder, which was trained on them. With the same thresholds, expressions
that people wrote about several relations (refcocos_human.json) are judged: `engine.human_kept` is
the share that the rules accept, `engine.human_found` the share of faults that they find there.

endpoint: an endpoint on this machine fails in one way after the other, once for each photo.

kills: the command is killed while it asks the endpoint, and continued, until it is finished.

FOLDER keeps encoded photos and sentences, which a second run reads instead of encoding them again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
from _indexing import encoder_of, parser_of
from _planted import (
    FAULTS,
    GOOD,
    Judged,
    Remembered,
    evidence_of,
    human_trials,
    shares,
    trials_of,
)
from _report import RESULTS, write_report

from reir.checkpoint import load_color_reader
from reir.datasets.coco_classes import COCO_CLASSES
from reir_ingestion.build_dataset.answers.budget import Budget, Limits
from reir_ingestion.build_dataset.answers.cache import AnswerCache
from reir_ingestion.build_dataset.answers.endpoint import EndpointModel, EndpointSettings
from reir_ingestion.build_dataset.build import BuildOptions, build_dataset, work_folder
from reir_ingestion.build_dataset.judges.rules import RulesJudge, Thresholds
from reir_ingestion.build_dataset.outcomes import Builder
from reir_ingestion.build_dataset.photos import open_photos
from reir_ingestion.build_dataset.scenes import SceneReader
from reir_ingestion.build_dataset.writers.vision_language import VisionLanguageWriter
from reir_testing import FakeEncoder, data_dir
from reir_testing.data_engine.drawn_photos import draw_photos
from reir_testing.data_engine.fake_endpoint import FAULTS as ENDPOINT_FAULTS
from reir_testing.data_engine.fake_endpoint import fake_endpoint
from reir_testing.data_engine.kills import build_with_kills

MAX_LOSS = 0.08
"""Share of the good expressions that the choice of thresholds may lose; less than the limit of 0.1,
because it is higher on other photos."""
NUM_KILLS, KILLED_PHOTOS = 8, 40
COLORS = np.arange(0.1, 0.3, 0.01)
SIDES = np.arange(-0.04, 0.08, 0.02)
OTHERS = np.arange(0.0, 0.24, 0.02)


def filter_figures(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure the rules judge on planted faults."""
    root = data_dir()
    if root is None:
        raise SystemExit("the shared photos are needed: set REIR_DATA")
    encoder = encoder_of(arguments)
    trials = trials_of(root / "photos", "val", encoder, arguments.work / "scenes")
    encode = Remembered(encoder, arguments.work / "sentences.npz")
    judge = RulesJudge(encode, COCO_CLASSES, colors=load_color_reader(arguments.checkpoint))
    judged = evidence_of(trials, judge)
    encode.save()
    chosen = _best([each for each in judged if each.photo % 2 == 0])
    measured = [each for each in judged if each.photo % 2]
    found = shares(measured, chosen)
    figures = {
        "engine.filter_recall": float(np.mean([found[kind] for kind in FAULTS])),
        "engine.filter_loss": found[GOOD],
        **{f"engine.filter_recall.{kind}": found[kind] for kind in (*FAULTS, "other_class")},
        **{f"engine.filter.{name}": getattr(chosen, name) for name in ("color", "side", "other")},
        "engine.filter_good": sum(each.kind == GOOD for each in measured),
        "engine.filter_planted": sum(each.kind in FAULTS for each in measured),
    }
    human = human_trials(root / "photos", encoder, arguments.work / "human")
    judged = evidence_of(human, judge)
    encode.save()
    found = shares(judged, chosen)
    figures |= {
        "engine.human_kept": 1 - found[GOOD],
        "engine.human_found": float(np.mean([found[kind] for kind in FAULTS if kind in found])),
        "engine.human_good": sum(each.kind == GOOD for each in judged),
    }
    long = [each for each in measured if each.kind == GOOD and each.long]
    lost = [bool(each.evidence.problems(chosen)) for each in long]
    figures["engine.gallery_loss"] = float(np.mean(lost))
    return {name: round(value, 4) for name, value in figures.items()}


def _best(judged: list[Judged]) -> Thresholds:
    """Return the thresholds with the highest recall that lose at most `MAX_LOSS`."""
    best, recall = Thresholds(), -1.0
    for color, side, other in product(COLORS, SIDES, OTHERS):
        tried = Thresholds(color=float(color), side=float(side), other=float(other))
        found = shares(judged, tried)
        reached = float(np.mean([found[kind] for kind in FAULTS]))
        if found[GOOD] <= MAX_LOSS and reached > recall:
            best, recall = tried, reached
    return best


def endpoint_figures(_: argparse.Namespace) -> dict[str, float]:
    """Count photos without an outcome after an endpoint failed in every way."""
    with tempfile.TemporaryDirectory() as folder, fake_endpoint(ENDPOINT_FAULTS) as endpoint:
        photos = draw_photos(Path(folder) / "photos", num=len(ENDPOINT_FAULTS) + 5)
        out = Path(folder) / "out"
        work = work_folder(out)
        budget = Budget(Limits(), work)
        settings = EndpointSettings(url=endpoint.url, model="m", timeout_s=2.0, attempts=2)
        model = AnswerCache(EndpointModel(settings, budget), budget, work)
        report = build_dataset(
            open_photos(str(photos)),
            out,
            SceneReader(FakeEncoder(), work / "scenes"),
            lambda _: Builder(VisionLanguageWriter(model), [], 3),
            BuildOptions(threads=4),
        )
        lines = (out / "photos.jsonl").read_text().splitlines()
        told = {json.loads(line)["photo"] for line in lines}
        return {
            "engine.unaccounted": len(ENDPOINT_FAULTS) + 5 - len(told),
            "engine.endpoint_faults": len(ENDPOINT_FAULTS),
            **{f"engine.endpoint_{k}": v for k, v in report.statistics.photos.items()},
        }


def kill_figures(_: argparse.Namespace) -> dict[str, float]:
    """Count requests that are sent again after kills."""
    with tempfile.TemporaryDirectory() as folder, fake_endpoint(delay_s=0.2) as endpoint:
        photos = draw_photos(Path(folder) / "photos", num=KILLED_PHOTOS)
        done = build_with_kills(photos, Path(folder) / "out", endpoint, num_kills=NUM_KILLS)
        return {
            "engine.repeated": done.repeated,
            "engine.kills": done.kills,
            "engine.lost_on_the_way": done.lost,
            "engine.unaccounted_after_kills": done.unaccounted,
        }


PARTS: Mapping[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "filter": filter_figures,
    "endpoint": endpoint_figures,
    "kills": kill_figures,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="Folder for encoded photos.")
    parser.add_argument("--only", choices=PARTS, help="Measure only this; keep the other figures.")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    if arguments.only and (RESULTS / "engine.json").exists():
        figures = json.loads((RESULTS / "engine.json").read_text())["figures"]
    for name, measure in PARTS.items():
        if arguments.only in (None, name):
            figures |= measure(arguments)
    for name, value in figures.items():
        print(f"{name:36} {value}")
    write_report("engine", figures)


if __name__ == "__main__":
    main()

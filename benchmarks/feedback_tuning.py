"""Feedback of users makes a model better, and a hostile user does not make it worse.

    python benchmarks/feedback_tuning.py [--photos 240] [--feedback 500] [--manner shifted]

A gallery of drawn toys with invented names, a style that the shipped model does not know, is
indexed with it. Simulated users give feedback about it: four of them err in one of ten cases, and
one is hostile. `reir finetune --from feedback` learns from all of it, and from all but that of the
hostile user. Questions about other photos of the same style, which nobody gave feedback about, are
answered by the shipped model and by both results.

    feedback.br1_before         BR@1 of the questions with the shipped model, in percent
    feedback.br1_after          after learning from all users
    feedback.br1_without        after learning from all users but the hostile one
    feedback.br1_ratio          after by before, with all users
    feedback.poison_drop        points that the hostile user costs: without it minus with it
    feedback.poison_drop_low    lower end of the 95 % interval of that difference over photos
    feedback.poison_drop_high   upper end
    feedback.outliers           users that the guards leave out
    feedback.hostile_is_out     1 if the hostile user is among them
    feedback.forgotten          points of BR@1 lost on the built-in gallery
    feedback.tuned_from         feedback that was learned from
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from _report import write_report
from PIL import Image

import reir
from reir.checkpoint import SHIPPED, load_encoder
from reir.datasets.dataset import ReferringDataset
from reir.images.decode import canonical_uri
from reir.operations.feedback import Feedback
from reir.operations.feedback.records import user_of
from reir_testing.feedback.simulated_users import (
    Manner,
    record_feedback,
    simulate_feedback,
    users_with_hostile,
)
from reir_testing.scenes import to_dataset
from reir_testing.toys.scenes import make_toy_scenes, render_toys
from reir_training.finetune.measure import Ranks, measure

GALLERY = "toys"
USERS = 5
GALLERY_SEED, QUESTIONS_SEED, USERS_SEED = 21, 22, 23
PER_INSTANCE = 2
_REIR = [sys.executable, "-c", "from reir.cli.main import main; main()"]


@dataclass(frozen=True)
class Setting:
    """A gallery of toys, and questions about other toys.

    Attributes:
        folder: working directory.
        store: location of the store with the gallery.
        toys, questions: annotated photos.
    """

    folder: Path
    store: str
    toys: ReferringDataset
    questions: ReferringDataset

    @property
    def uris(self) -> dict[str, str]:
        """Image id -> URI of the photos of the gallery."""
        photos = self.folder / "toys"
        return {each.image_id: canonical_uri(photos / each.file_name) for each in self.toys.images}

    def finetune(self, name: str, feedback: Sequence[Feedback], epochs: int) -> dict[str, Any]:
        """Learn from feedback, and return the report."""
        log = self.folder / f"{name}-log"
        if not log.exists():
            record_feedback(log, GALLERY, feedback)
        words = [
            *("finetune", GALLERY, "--from", "feedback", "--search-log", str(log), "--json"),
            *("--output", str(self.folder / name), "--store", self.store, "--epochs", str(epochs)),
        ]
        done = subprocess.run([*_REIR, *words], check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def answer(self, checkpoint: Path) -> Ranks:
        """Answer the questions."""
        return measure(load_encoder(checkpoint), self.questions, self.folder / "questions")


def main() -> None:
    """Measure, print and save the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=240)
    parser.add_argument("--questions", type=int, default=120, help="photos to ask about")
    parser.add_argument("--feedback", type=int, default=500, help="number of verdicts")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--manner", choices=get_args(Manner), default="shifted")
    parser.add_argument("--folder", type=Path, help="keep the results of finished parts here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = compare(arguments, arguments.folder or Path(name))
    for key, value in figures.items():
        print(f"{key:28} {value}")
    print(f"figures in {write_report('feedback_tuning', figures).name}")


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Learn with and without the hostile user, and return the figures."""
    setting = prepare(folder, arguments.photos, arguments.questions)
    users = users_with_hostile(USERS, arguments.manner)
    hostile = user_of(users[-1].name)
    everything = simulate_feedback(
        setting.toys, setting.uris, users, arguments.feedback, USERS_SEED
    )
    good = [said for said in everything if said.user != hostile]
    reports = {
        "all": setting.finetune("all", everything, arguments.epochs),
        "without": setting.finetune("without", good, arguments.epochs),
    }
    before = setting.answer(SHIPPED)
    after, without = (setting.answer(Path(each["checkpoint"])) for each in reports.values())
    return figures_of(before, after, without, reports["all"], hostile)


def prepare(folder: Path, num_photos: int, num_questions: int) -> Setting:
    """Draw the photos, and index those of the gallery."""
    datasets = []
    for name, num, seed in (
        ("toys", num_photos, GALLERY_SEED),
        ("questions", num_questions, QUESTIONS_SEED),
    ):
        scenes = make_toy_scenes(num, seed)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for scene in scenes:
            Image.fromarray(render_toys(scene)).save(folder / name / scene.file_name)
        datasets.append(to_dataset(scenes, per_instance=PER_INSTANCE))
    store = str(folder / "store")
    reir.index(folder / "toys", gallery=GALLERY, store=store, checkpoint=SHIPPED, progress=False)
    return Setting(folder, store, *datasets)


def figures_of(
    before: Ranks, after: Ranks, without: Ranks, report: dict[str, Any], hostile: str
) -> dict[str, Any]:
    """Return the figures.

    Args:
        before, after, without: answers of the shipped model, and of the results with all users and
            without the hostile one.
        report: of the fine-tune with all users.
        hostile: pseudonym of the hostile user.
    """
    br1 = {
        name: ranks.figures()["br1"]
        for name, ranks in (("before", before), ("after", after), ("without", without))
    }
    drop = without.gain_over(after)["br1"]
    feedback, remembered = report["feedback"], report["remembered"]
    outliers = [each["user"] for each in feedback["users"] if each["decision"] == "outlier"]
    return {
        **{f"feedback.br1_{name}": value for name, value in br1.items()},
        "feedback.br1_ratio": round(br1["after"] / max(br1["before"], 1e-9), 3),
        "feedback.poison_drop": round(drop.mean, 2),
        "feedback.poison_drop_low": round(drop.low, 2),
        "feedback.poison_drop_high": round(drop.high, 2),
        "feedback.outliers": len(outliers),
        "feedback.hostile_is_out": int(hostile[:8] in outliers),
        "feedback.forgotten": round(remembered["before"]["br1"] - remembered["after"]["br1"], 2),
        "feedback.tuned_from": feedback["used"],
    }


if __name__ == "__main__":
    main()

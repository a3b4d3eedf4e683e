"""`reir data check` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from reir_testing.scenes import make_scenes, save_scenes
from reir_training.cli import data


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Scenes to train on; one of them is also in a set to be measured on."""
    save_scenes(tmp_path / "a", {"train": make_scenes(4, 1), "val": make_scenes(2, 2)})
    save_scenes(tmp_path / "b", {"val": make_scenes(1, 1)})
    values = {
        "data": [{"format": "photos", "path": str(tmp_path / "a")}],
        "evaluation": [{"format": "photos", "path": str(tmp_path / "b"), "split": "val"}],
        "weights": "not needed to look at data",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    data.register(app)
    done = CliRunner().invoke(app, ["data", "check", *arguments])
    return done.exit_code, done.stdout


def test_data_with_problems_exits_with_1_and_lists_them(config: Path) -> None:
    code, shown = run("--data", str(config))
    assert code == 1
    assert "train (train)" in shown
    assert "val (held out)" in shown
    assert "all (evaluation)" in shown
    assert "problem: 1 photo of the evaluation set" in shown
    assert "scene-1-000000.png" in shown
    assert "exclude_evaluation: true" in shown
    assert shown.rstrip().endswith("not ready for training")
    counts = [line.split() for line in shown.splitlines()]
    assert ["photos", "4", "2"] in counts
    assert ["leaked", "1", "0"] in counts
    assert ["photos", "1"] in counts
    assert any(words[:1] == ["relation_pair"] for words in counts)


def test_data_ready_for_training_exits_with_0(config: Path) -> None:
    code, shown = run("--data", str(config), "--set", "exclude_evaluation=true")
    assert code == 0
    assert "problem:" not in shown
    assert "excluded from training" in shown
    assert shown.rstrip().endswith("\nready for training")


def test_json_output_contains_the_report(config: Path) -> None:
    code, shown = run("--data", str(config), "--json")
    assert code == 1
    report = json.loads(shown)
    assert report["fit"] is False
    assert len(report["problems"]) == 2
    train, val = report["sets"][0]["splits"]
    assert (train["photos"], train["leaked"], val["photos"], val["use"]) == (4, 1, 2, "held out")
    code, shown = run("--data", str(config), "--json", "--set", "exclude_evaluation=true")
    assert (code, json.loads(shown)["fit"]) == (0, True)

"""`reir train --dry-run`: its output, and that it writes no files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from reir.errors import ConfigError
from reir_testing import data_dir
from reir_testing.tiny_clare import tiny_clare, tiny_training
from reir_training.cli import train


def dry_run(folder: Path, values: dict[str, Any], *arguments: str, preset: str) -> str:
    """Run the command; it must not create its output folder."""
    data, output = folder / "run.yaml", folder / "out"
    data.write_text(yaml.safe_dump(values))
    app = typer.Typer()
    train.register(app)
    command = ["--data", str(data), "--output", str(output), "--preset", preset, "--dry-run"]
    done = CliRunner().invoke(app, [*command, *arguments])
    if done.exception:
        raise done.exception
    assert not output.exists()
    return done.stdout


def test_dry_run_of_clare_reports_parts_memory_and_steps(tmp_path: Path) -> None:
    values = tiny_training(tmp_path, grounding_epochs=3, accumulate_steps=2)
    found = json.loads(
        dry_run(tmp_path, values, "--num-workers", "2", "--json", preset="clare-base")
    )
    parts = {part["name"]: part for part in found["parts"]}
    vision = sum(p.numel() for p in tiny_clare().vision.parameters())
    assert parts["vision"]["trainable"] == vision
    assert parts["vision"]["learning_rates"] == pytest.approx([2e-5])  # a tenth, as for all towers
    assert parts["proposals"]["learning_rates"] == [2e-4]
    trainable = sum(part["trainable"] for part in parts.values())
    assert found["memory"][1]["weights"] == 4 * trainable
    # three numbers for each, by half
    assert found["memory"][1]["optimizer"] == 4 * -(-3 * trainable // 2)
    assert [(s["stage"], s["epochs"], s["steps_per_epoch"]) for s in found["stages"]] == [
        ("grounding", 3, 2),
        ("clia", 1, 2),
    ]
    assert sum(s["photos"] for s in found["stages"]) == 4 * 2 * 4
    measured = found["measured"]
    assert (measured["stage"], measured["photos"], measured["activation_bytes"]) == (
        "clia",
        2,
        None,
    )
    assert measured["step_seconds"] > 0
    assert found["photos_per_s"] == pytest.approx(2 * 2 / measured["step_seconds"], rel=0.01)


@pytest.mark.slow
def test_dry_run_prints_tables(tmp_path: Path) -> None:
    shown = dry_run(tmp_path, tiny_training(tmp_path), "--stage", "clia", preset="clare-base")
    assert "not measured on a CPU" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["clia", "1", "2", "8"] in lines
    assert [line[:2] for line in lines if line[:1] == ["ZeRO"]] == [
        ["ZeRO", str(i)] for i in range(4)
    ]
    assert "5 steps of stage clia on CPU" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num-workers", "3"), "cannot be shared by 3 workers"),
        (("--gpu",), "no GPU"),
        (("--stage", "clia", "--set", "optimization.clia_epochs=0"), "no epochs"),
    ],
)
def test_dry_run_refuses_impossible_runs(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        dry_run(tmp_path, tiny_training(tmp_path), *arguments, preset="clare-base")


@pytest.mark.slow
@pytest.mark.data
def test_dry_run_of_clare_nano_caches_only_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the real model is slow on a CPU; that five steps are measured is seen with the tiny one
    monkeypatch.setattr("reir_training.report.dry_run.WARM_UP", 0)
    monkeypatch.setattr("reir_training.report.dry_run.MEASURED", 1)
    data = data_dir()
    if data is None:
        pytest.skip("needs the shared photos: set REIR_DATA")
    values = {
        "data": [{"format": "photos", "path": str(data / "photos")}],
        "weights": str(data.parent.resolve() / "weights"),
        "optimization": {
            "photos_per_batch": 4,
            "grounding_epochs": 1,
            "clia_epochs": 2,
            "precision": "fp32",
        },
    }
    found = json.loads(dry_run(tmp_path, values, "--json", preset="clare-nano"))
    splits = json.loads((data / "photos" / "expressions.json").read_text())["splits"]
    steps = len(splits["train"]) // 4
    assert [(s["stage"], s["steps_per_epoch"]) for s in found["stages"]] == [
        ("grounding", steps),
        ("clia", steps),
    ]
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["detector"]["trainable"] == 0
    assert parts["detector"]["frozen"] > 0
    assert found["measured"]["photos"] == 4

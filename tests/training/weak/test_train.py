"""`reir train --preset weak-rec` as a user types it, and what the commands do with the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml
from typer.testing import CliRunner

from reir.cli import evaluate, localize
from reir.errors import ConfigError, DataError
from reir_testing.training.tiny_weak import (
    NUM_TRAIN,
    NUM_VAL,
    WeakForm,
    init_of,
    tiny_weak_settings,
)
from reir_testing.weak.hostile_sentences import HOSTILE_LISTS, save_photos
from reir_training.cli import train
from reir_training.run.jobs import _start_ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weak") / "files"


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    """One Ray for all runs of this module."""
    _start_ray(1, 1, use_gpu=False)
    yield
    ray.shutdown()


def run(*arguments: object) -> Any:
    app = typer.Typer()
    for command in (train, evaluate, localize):
        command.register(app)
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception:
        raise done.exception
    return done


def train_command(folder: Path, settings: dict[str, Any], output: Path, *more: object) -> Path:
    data = output.with_suffix(".yaml")
    data.write_text(yaml.safe_dump(settings))
    run("train", "--preset", "weak-rec", "--data", data, "--output", output, *more)
    return output / "checkpoint"


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


# Slow, and fine-tuning from sentences alone trains such a model in the same way.
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("form", ["weak-candidates", "weak-yolov3"])
def test_a_run_writes_a_model_that_localizes(
    folder: Path, tmp_path: Path, running_ray: None, form: WeakForm
) -> None:
    settings = tiny_weak_settings(folder, form, grounding_epochs=2, log_every_steps=1)
    output = tmp_path / "run"
    more = ("--init", init_of(folder)) if form == "weak-candidates" else ()
    checkpoint = train_command(folder, settings, output, *more)

    epochs = events(output, "epoch")
    assert [each["epoch"] for each in epochs] == [1, 2]
    assert epochs[0]["losses"].keys() == {"contrast", "suppression", "equivariance"}
    assert all(0 <= each["p50"] <= 100 for each in epochs)
    about = json.loads((checkpoint / "weak_rec.json").read_text())["training"]
    assert (about["photos"], about["held_out_photos"]) == (NUM_TRAIN, NUM_VAL)
    assert about["metrics"]["p50"] == epochs[-1]["p50"]
    assert str(folder) not in (checkpoint / "weak_rec.json").read_text()
    assert (checkpoint / "README.md").read_text().startswith("# weak-rec")

    photos = folder / "photos"
    spec = f"weak:{checkpoint}"
    data = ("--annotations", photos, "--images", photos / "images", "--localizer", spec)
    report = json.loads(run("eval", "rec", *data, "--split", "val", "--json").stdout)
    figures = [each["by_expression"]["p50"] for each in report["splits"].values()]
    assert figures
    assert all(0 <= figure <= 100 for figure in figures)
    photo = min((photos / "images").iterdir())
    found = run("localize", photo, "the red circle", "--localizer", spec, "--json")
    boxes = json.loads(found.stdout)["boxes"]
    assert boxes
    scores = [box["score"] for box in boxes]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", ["photo-absent", "sentence-empty", "no-photo-column"])
def test_nothing_is_trained_on_a_list_that_cannot_be_used(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (hostile,) = (each for each in HOSTILE_LISTS if each.name == name)
    save_photos(tmp_path)
    path = hostile.write(tmp_path)
    source = {"format": "sentences", "path": str(tmp_path), "images": "."}
    settings = tiny_weak_settings(folder, "weak-candidates") | {
        "data": [source | {"annotations": path.name}]
    }
    output = tmp_path / "run"
    with pytest.raises(DataError) as refused:
        train_command(folder, settings, output, "--init", init_of(folder))
    assert all(part in str(refused.value) for part in (str(path), *hostile.named))
    assert not (output / "checkpoint").exists()
    assert not (output / "metrics.jsonl").exists()


def dry_run(folder: Path, tmp_path: Path, form: WeakForm) -> dict[str, Any]:
    data = tmp_path / "run.yaml"
    data.write_text(yaml.safe_dump(tiny_weak_settings(folder, form, grounding_epochs=3)))
    command = ("train", "--preset", "weak-rec", "--data", data, "--output", tmp_path / "out")
    done = run(*command, "--dry-run", "--json")
    assert not (tmp_path / "out").exists()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_dry_run_measures_the_published_form(folder: Path, tmp_path: Path) -> None:
    found = dry_run(folder, tmp_path, "weak-yolov3")
    (stage,) = found["stages"]
    assert (stage["stage"], stage["epochs"]) == ("grounding", 3)
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["source"]["trainable"] > 0
    assert parts["source"]["frozen"] > 0


def test_a_dry_run_of_the_shipped_form_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="candidates as anchors, which only takes minutes"):
        dry_run(folder, tmp_path, "weak-candidates")


def test_stages_of_other_presets_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path
) -> None:
    settings = tiny_weak_settings(folder, "weak-yolov3")
    for stage, message in (("clia", "single stage"), ("masks", "single stage")):
        with pytest.raises(ConfigError, match=message):
            train_command(folder, settings, tmp_path / "run", "--stage", stage)
    assert not (tmp_path / "run").exists()

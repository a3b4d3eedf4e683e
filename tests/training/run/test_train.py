"""`reir train` end to end on a small data set: Ray Train, DeepSpeed, published weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from reir.checkpoint import load_encoder, read_config
from reir.config import load_config
from reir.images.decode import read_image
from reir_testing import data_dir
from reir_training.config import NanoTrainConfig
from reir_training.run.driver import run

NUM_TRAIN, NUM_VAL = 20, 6


def small_copy(source: Path, target: Path) -> None:
    """Write the first photos of the shared set in the same layout."""
    expressions = json.loads((source / "expressions.json").read_text())
    splits = {
        "train": expressions["splits"]["train"][:NUM_TRAIN],
        "val": expressions["splits"]["val"][:NUM_VAL],
    }
    kept = {*splits["train"], *splits["val"]}
    instances = json.loads((source / "instances.json").read_text())
    instances["images"] = [i for i in instances["images"] if i["id"] in kept]
    instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] in kept]
    expressions["splits"] = splits
    expressions["expressions"] = [e for e in expressions["expressions"] if e["image_id"] in kept]
    captions = json.loads((source / "captions.json").read_text())
    captions["annotations"] = [c for c in captions["annotations"] if c["image_id"] in kept]
    target.mkdir()
    (target / "images").symlink_to(source / "images")
    for name, content in (
        ("instances", instances),
        ("expressions", expressions),
        ("captions", captions),
    ):
        (target / f"{name}.json").write_text(json.dumps(content))


def events(output: Path, kind: str) -> list[dict[str, object]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def recipe(folder: Path, *, clia_epochs: int) -> dict[str, object]:
    """A configuration of a few steps on a small copy of the shared photos in `folder`."""
    data = data_dir()
    if data is None:
        pytest.skip("needs the shared photos: set REIR_DATA")
    if not (folder / "photos").exists():
        small_copy((data / "photos").resolve(), folder / "photos")
    return {
        "data": [{"format": "photos", "path": str(folder / "photos")}],
        "weights": str(data.parent.resolve() / "weights"),
        "optimization": {
            "grounding_epochs": 1,
            "clia_epochs": clia_epochs,
            "photos_per_batch": 10,
            "warmup_steps": 2,
        },
    }


@pytest.mark.ray
@pytest.mark.data
@pytest.mark.slow
def test_two_stages_write_a_checkpoint_and_a_longer_run_resumes(tmp_path: Path) -> None:
    output = tmp_path / "run"

    def train(clia_epochs: int) -> Path:
        return run(
            "clare-nano",
            load_config(NanoTrainConfig, recipe(tmp_path, clia_epochs=clia_epochs)),
            output=output,
            stage="all",
            init=None,
            num_workers=1,
            use_gpu=False,
        )

    checkpoint = train(1)
    assert [e["epoch"] for e in events(output, "epoch")] == [1, 2]
    assert (checkpoint / "README.md").read_text().startswith("# clare-nano")
    assert read_config(checkpoint)["training"]["photos"] == NUM_TRAIN
    first = load_encoder(checkpoint)

    train(2)  # the same folder: only the third epoch is left to do
    assert [e["epoch"] for e in events(output, "epoch")] == [1, 2, 3]
    encoder = load_encoder(checkpoint)
    assert encoder.digest != first.digest
    photo = next((tmp_path / "photos" / "images").iterdir())
    found = encoder.encode_images([read_image(photo)])[0]
    assert found.dim == encoder.dim == 257


@pytest.mark.ray
@pytest.mark.data
@pytest.mark.slow
def test_a_killed_run_with_two_workers_resumes_from_the_last_epoch(tmp_path: Path) -> None:
    output, data = tmp_path / "run", tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump(recipe(tmp_path, clia_epochs=3)))
    command = [str(Path(sys.executable).with_name("reir")), "train", "--data", str(data)]
    command += ["--output", str(output), "--num-workers", "2"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (output / "metrics.jsonl").exists() or len(events(output, "epoch")) < 2:
        assert first.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "no epoch within five minutes"
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = len(events(output, "epoch"))
    assert done < 4

    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=400)
    epochs = [e["epoch"] for e in events(output, "epoch")]
    assert epochs[:done] == list(range(1, done + 1))
    # the last epoch before the kill may not have been reported yet, and is then run again
    assert epochs[done:] in (list(range(done + 1, 5)), list(range(done, 5)))
    assert load_encoder(output / "checkpoint").dim == 257
